//! What a grammar costs: making the compiler of a vocabulary, compiling, and the mask of each token of an answer.
//!
//! `cargo bench -p grammar --bench masks`

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use grammar::{Begin, Compiler, Form, Marks, Matcher, TokenTable};
use serde_json::{Value, json};
use types::{Constraint, TokenId};

const EOS: TokenId = TokenId(9);
/// The demo's vocabulary, and one as large as North's made of its words put together.
const SIZES: [u32; 2] = [4096, 262_144];

fn main() -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    for size in SIZES {
        let table = table(size);
        let started = Instant::now();
        let compiler = Compiler::new(&table, &[EOS], size).expect("a compiler");
        writeln!(out, "{size} tokens: compiler made in {} ms", started.elapsed().as_millis())?;
        for (name, grammar) in grammars() {
            let started = Instant::now();
            let matcher = compiler.compile(&grammar).expect("a grammar");
            let compiled = started.elapsed();
            let mut masks = Vec::new();
            for seed in 0..20 {
                walk(matcher.clone(), size, seed, &mut masks);
            }
            masks.sort_unstable();
            let at = |part: usize| masks[(masks.len() - 1) * part / 100].as_micros();
            writeln!(
                out,
                "  {name}: compiled in {} µs; {} masks, p50 {} µs, p99 {} µs, worst {} µs",
                compiled.as_micros(),
                masks.len(),
                at(50),
                at(99),
                at(100)
            )?;
        }
    }
    Ok(())
}

/// A table of `size` tokens: the demo's, then pairs and triples of them.
fn table(size: u32) -> TokenTable {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cli/assets/demo/tokenizer.json");
    let mut json: Value =
        serde_json::from_slice(&std::fs::read(path).expect("the demo's tokenizer")).expect("JSON");
    let vocab = json["model"]["vocab"].as_object_mut().expect("a vocabulary");
    let words: Vec<String> = vocab.keys().filter(|word| !word.starts_with('<')).cloned().collect();
    let (mut next, mut random) = (u64::from(SIZES[0]), 1_u64);
    while next < u64::from(size) {
        let mut pick = || {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            words[(random >> 33) as usize % words.len()].as_str()
        };
        let word = if next % 3 == 0 {
            format!("{}{}{}", pick(), pick(), pick())
        } else {
            format!("{}{}", pick(), pick())
        };
        if !vocab.contains_key(&word) {
            vocab.insert(word, next.into());
            next += 1;
        }
    }
    TokenTable::read(json.to_string().as_bytes()).expect("a table")
}

fn grammars() -> Vec<(&'static str, String)> {
    let schema = json!({
        "type": "object", "required": ["name", "age", "tags", "address"], "additionalProperties": false,
        "properties": {
            "name": { "type": "string", "maxLength": 40 },
            "age": { "type": "integer", "minimum": 0, "maximum": 150 },
            "tags": { "type": "array", "items": { "enum": ["a", "bb", "ccc"] }, "maxItems": 4 },
            "address": { "type": "object", "properties": { "street": { "type": "string", "maxLength": 60 }, "zip": { "type": "string", "pattern": "^[0-9]{5}$" } }, "required": ["street", "zip"], "additionalProperties": false },
        },
    });
    let pair = |start, end| [TokenId(start), TokenId(end)];
    let marks = Marks { thinking: pair(13, 14), text: vec![pair(15, 16)], action: pair(17, 18) };
    let compose = |begin, content: &Constraint| {
        let form = Form { begin, marks: Some(&marks), content: Some(content), calls: None };
        form.compose().expect("a form")
    };
    let json = Constraint::Json(schema.to_string());
    vec![
        ("schema", compose(Begin::Plain, &json)),
        ("schema after thoughts", compose(Begin::Thinking, &json)),
        ("any object", compose(Begin::Plain, &Constraint::JsonObject)),
        ("expression", compose(Begin::Plain, &Constraint::Regex("[a-f0-9]{8}(-[a-f0-9]{4}){3}".to_owned()))),
        ("choice", compose(Begin::Plain, &Constraint::Choice(vec!["yes".to_owned(), "no".to_owned()]))),
    ]
}

/// Follows random tokens for a while and adds the time of each mask.
fn walk(mut matcher: Matcher, size: u32, seed: u64, masks: &mut Vec<Duration>) {
    let mut random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    for _ in 0..100 {
        let started = Instant::now();
        let mask = matcher.mask().expect("a mask");
        masks.push(started.elapsed());
        let allowed: Vec<TokenId> =
            (0..size).map(TokenId).filter(|&id| id != EOS && mask.allows(id)).collect();
        if allowed.is_empty() {
            return;
        }
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let token = allowed[(random % allowed.len() as u64) as usize];
        let started = Instant::now();
        matcher.follow(token).expect("an allowed token");
        // Following is part of preparing the next mask.
        if let Some(last) = masks.last_mut() {
            *last += started.elapsed();
        }
    }
}

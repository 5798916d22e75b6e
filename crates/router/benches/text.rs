//! What text costs a router, in microseconds: rendering and tokenizing a chat, and taking an answer's tokens apart.
//!
//! `cargo bench -p router --bench text [DIR]` (the checkpoint's tokenizer and template; the demo's by default)

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use proto::{Prompt, v1};
use router::ModelFiles;
use router::text::{Detokenizer, Parsed, Text};

const SENTENCE: &str =
    "The trait Iterator has a method that returns the next value of the sequence, or None. ";
const ROUNDS: u32 = 400;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cli/assets/demo");
    let dir = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).map_or(demo, PathBuf::from);
    let files = ModelFiles::read_dir(&dir)?;
    let text = Text::load(&files)?.ok_or("no tokenizer.json")?;
    let library = tokenizers::Tokenizer::from_bytes(files.tokenizer_json.unwrap_or_default());
    let library = library.map_err(|error| error.to_string())?;
    let mut out = std::io::stdout().lock();
    for repeats in [1, 25, 400] {
        let chat = v1::ChatPrompt {
            messages: vec![v1::ChatMessage {
                role: "user".to_owned(),
                content: SENTENCE.repeat(repeats),
                ..v1::ChatMessage::default()
            }],
            ..v1::ChatPrompt::default()
        };
        let prompt = || {
            let prompt = v1::generate_request::Prompt::Chat(chat.clone());
            Prompt::try_from(Some(prompt))
        };
        let (rendered, ids) = text.tokenize(prompt()?)?;
        let both = micros(|| drop(text.tokenize(prompt().expect("a chat"))));
        let words = micros(|| drop(text.tokenizer().encode(&rendered, false)));
        let whole = micros(|| drop(library.encode_fast(rendered.as_str(), false)));
        let read = micros(|| {
            let (mut detokenizer, mut parser) = (Detokenizer::new(true), text.parser(&[], true));
            let (mut piece, mut parsed) = (String::new(), Parsed::default());
            for &id in &ids {
                piece.clear();
                detokenizer.push(text.tokenizer(), id, &mut piece);
                parser.push(&piece, &mut parsed);
            }
        });
        writeln!(
            out,
            "{} tokens: render and tokenize {both:.1} µs, tokenize {words:.1} µs (the library alone {whole:.1} µs), \
             read as an answer {read:.1} µs",
            ids.len()
        )?;
    }
    Ok(())
}

/// The median of many rounds.
fn micros(mut work: impl FnMut()) -> f64 {
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let started = Instant::now();
        work();
        times.push(started.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_unstable_by(f64::total_cmp);
    times[times.len() / 2]
}

//! From the text of a grammar to something that follows it.

use std::sync::Arc;
use std::thread;

use llguidance::ParserFactory;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use serde_json::{Value, json};
use types::TokenId;

use crate::constraint::{Reading, schema};
use crate::limits::{
    BLAME_STEPS_MAX, COMPILE_FUEL, GRAMMAR_BYTES_MAX, GRAMMAR_SYMBOLS_MAX, LEXER_STATES_MAX, MASK_FUEL,
    MASK_ITEMS_MAX, ROW_ITEMS_MAX, STACK_BYTES,
};
use crate::{Error, Matcher, Refused, TokenTable};

/// Begins a token that is not text, in the compiler's alphabet. No text has this byte.
const MARK: u8 = 0xFF;

/// Kinds of tokens, each a part of the next that contains it, which are allowed together where a grammar's terminal allows
/// all of them: blanks, and pieces of a JSON string up to a length. Near the end of a string of bounded length a mask is
/// the faster the closer one of the lengths is to what is left of it; each of them is a trie more that is made with a compiler.
const SLICES: [&str; 7] = [
    r"[\x20\x0A\x0D\x09]+",
    r#"[^"\\\x00-\x1F\x7F]{1,3}"#,
    r#"[^"\\\x00-\x1F\x7F]{1,6}"#,
    r#"[^"\\\x00-\x1F\x7F]{1,10}"#,
    r#"[^"\\\x00-\x1F\x7F]{1,16}"#,
    r#"[^"\\\x00-\x1F\x7F]{1,30}"#,
    r#"[^"\\\x00-\x1F\x7F]+"#,
];

/// Compiles grammars for one vocabulary.
pub struct Compiler {
    factory: ParserFactory,
}

impl Compiler {
    /// For a model with `vocab_size` tokens, of which `eos` end a sequence. Takes a while for a large vocabulary.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when `eos` is empty or not below `vocab_size`.
    pub fn new(table: &TokenTable, eos: &[TokenId], vocab_size: u32) -> Result<Self, Error> {
        let refuse = |reason: String| Error::Tokenizer { reason };
        let Some(first) = eos.first() else {
            return Err(refuse("cannot end an answer: the model has no end-of-sequence token".to_owned()));
        };
        if let Some(beyond) = eos.iter().find(|id| id.0 >= vocab_size) {
            let reason =
                format!("has end-of-sequence token {beyond}, not below the vocabulary size {vocab_size}");
            return Err(refuse(reason));
        }
        let words: Vec<Vec<u8>> = (0..vocab_size).map(|id| word(table, TokenId(id))).collect();
        let eos: Vec<u32> = eos.iter().map(|id| id.0).collect();
        let trie = TokTrie::from(&TokRxInfo::new(vocab_size, first.0), &words).with_eos_tokens(&eos);
        let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = SLICES.map(str::to_owned);
        let mut factory = ParserFactory::new(&tokens, InferenceCapabilities::default(), &slices)
            .map_err(|error| refuse(error.to_string()))?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            max_items_in_row: ROW_ITEMS_MAX,
            initial_lexer_fuel: COMPILE_FUEL,
            step_lexer_fuel: MASK_FUEL,
            step_max_items: MASK_ITEMS_MAX,
            max_lexer_states: LEXER_STATES_MAX,
            max_grammar_size: GRAMMAR_SYMBOLS_MAX,
            precompute_large_lexemes: true,
            verbose_errors: false,
        };
        Ok(Self { factory })
    }

    /// Compiles a grammar that [`crate::Form::compose`] made. Blocks for milliseconds, seconds at most.
    ///
    /// # Errors
    /// [`Error::Compile`] with what is wrong.
    pub fn compile(&self, grammar: &str) -> Result<Matcher, Error> {
        let refuse = |reason: String| Error::Compile { reason };
        if grammar.len() > GRAMMAR_BYTES_MAX {
            let reason = format!("it has {} bytes; at most {GRAMMAR_BYTES_MAX}", grammar.len());
            return Err(refuse(reason));
        }
        self.deep(|| {
            let grammar: TopLevelGrammar =
                serde_json::from_str(grammar).map_err(|error| refuse(error.to_string()))?;
            self.build(grammar).map_err(refuse)
        })
    }

    /// Looks for what is wrong with a schema: the deepest part that on its own fails in the same way. `None` when it
    /// compiles, with keywords that cannot be enforced passed over unless `strict`.
    #[must_use]
    pub fn blame(&self, root: &Value, strict: bool) -> Option<Refused> {
        self.deep(|| {
            let reason = self.failure(root, strict)?;
            let (mut path, mut part, mut steps) = (String::new(), root, 0);
            while let Some((key, deeper)) = children(part).into_iter().find(|(_, child)| {
                steps += 1;
                steps <= BLAME_STEPS_MAX
                    && self
                        .failure(&alone(root, child), strict)
                        .is_some_and(|own| cause(&own) == cause(&reason))
            }) {
                path.push_str(&key);
                part = deeper;
            }
            Some(Refused::new(path, reason))
        })
    }

    fn failure(&self, part: &Value, strict: bool) -> Option<String> {
        let reading = if strict { Reading::Strict } else { Reading::Lenient };
        let grammar = json!({ "grammars": [schema("", part.clone(), reading)], "max_tokens": null });
        let grammar = serde_json::from_value(grammar).map_err(|error| error.to_string());
        grammar.and_then(|grammar| self.build(grammar)).err()
    }

    fn build(&self, grammar: TopLevelGrammar) -> Result<Matcher, String> {
        let parser = self.factory.create_parser(grammar).map_err(|error| first_lines(&error.to_string()))?;
        Matcher::new(parser)
    }

    /// Runs `work` on a thread with room for the compiler's recursion.
    fn deep<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let builder = thread::Builder::new().name("grammar".to_owned()).stack_size(STACK_BYTES);
            match builder.spawn_scoped(scope, work) {
                Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                Err(error) => panic!("a thread for compiling a grammar cannot be started: {error}"),
            }
        })
    }
}

impl std::fmt::Debug for Compiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compiler").finish_non_exhaustive()
    }
}

/// A token in the compiler's alphabet. One that is neither text nor a marker cannot be drawn.
fn word(table: &TokenTable, id: TokenId) -> Vec<u8> {
    let bytes = table.bytes(id);
    match table.is_special(id) {
        true => [&[MARK], bytes].concat(),
        false if bytes.contains(&MARK) => Vec::new(),
        false => bytes.to_vec(),
    }
}

/// A part of a schema, with the definitions it may refer to.
fn alone(root: &Value, part: &Value) -> Value {
    let mut part = part.clone();
    if let Some(object) = part.as_object_mut() {
        for shared in ["$defs", "definitions"] {
            if let Some(definitions) = root.get(shared) {
                object.entry(shared).or_insert_with(|| definitions.clone());
            }
        }
    }
    part
}

/// The schemas directly inside a schema, with the way to them.
fn children(schema: &Value) -> Vec<(String, &Value)> {
    const MAPS: [&str; 4] = ["properties", "patternProperties", "$defs", "definitions"];
    const LISTS: [&str; 4] = ["anyOf", "oneOf", "allOf", "prefixItems"];
    const SINGLES: [&str; 3] = ["items", "additionalProperties", "not"];
    let mut found = Vec::new();
    for name in MAPS {
        let map = schema.get(name).and_then(Value::as_object);
        let inner = map.into_iter().flatten();
        found.extend(inner.map(|(key, value)| (format!("/{name}/{key}"), value)));
    }
    for name in LISTS {
        let list = schema.get(name).and_then(Value::as_array);
        let inner = list.into_iter().flatten().enumerate();
        found.extend(inner.map(|(index, value)| (format!("/{name}/{index}"), value)));
    }
    for name in SINGLES {
        found.extend(schema.get(name).map(|value| (format!("/{name}"), value)));
    }
    found
}

/// What went wrong, without where.
fn cause(reason: &str) -> &str {
    reason.lines().next().unwrap_or_default().trim()
}

const OVERLAPPING: &str = "oneOf is enforced where its alternatives exclude each other: by their types, or by a required property that \
    has another const in each; use that, or anyOf";

/// The beginning of a long error: what matters comes first.
fn first_lines(error: &str) -> String {
    const LINES: usize = 4;
    // Its own words name an option that callers do not have.
    if error.contains("oneOf constraints are not supported") {
        return OVERLAPPING.to_owned();
    }
    let lines: Vec<&str> = error.lines().filter(|line| !line.starts_with('<')).take(LINES).collect();
    lines.join("\n")
}

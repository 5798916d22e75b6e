//! Any text as an answer: however it is cut, the same comes out of it, and no marker shows.
#![no_main]

use std::path::Path;
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use router::text::{Markers, Parsed, Parser, Tokenizer};

static TOKENIZER: LazyLock<(Tokenizer, Arc<Markers>)> = LazyLock::new(|| {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/cli/assets/demo/tokenizer.json");
    let tokenizer = Tokenizer::from_bytes(&std::fs::read(demo).expect("the demo's tokenizer"));
    let tokenizer = tokenizer.expect("it can be used");
    let markers = Arc::new(Markers::of(&tokenizer).expect("it has all markers"));
    (tokenizer, markers)
});

/// What is thought and said, and the arguments of all calls.
fn parsed<'a>(cites: bool, pieces: impl Iterator<Item = &'a str>) -> [String; 3] {
    let mut parser = Parser::new(Arc::clone(&TOKENIZER.1), &[], true);
    if cites {
        parser = parser.with_citations();
    }
    let mut all = Parsed::default();
    pieces.for_each(|piece| parser.push(piece, &mut all));
    parser.finish(&mut all);
    let arguments = all.calls.iter().map(|piece| piece.arguments.as_str()).collect();
    [all.reasoning, all.text, arguments]
}

fuzz_target!(|answer: &str| {
    for cites in [false, true] {
        let whole = parsed(cites, [answer].into_iter());
        let letters = parsed(cites, answer.char_indices().map(|(at, c)| &answer[at..at + c.len_utf8()]));
        assert_eq!(whole, letters);
        for marker in TOKENIZER.0.special_tokens() {
            assert!(!whole.iter().any(|part| part.contains(marker)), "{marker} shows");
        }
    }
});

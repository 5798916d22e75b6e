//! Any text as an answer: however it is cut, the same comes out of it.
#![no_main]

use std::path::Path;
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use router::text::{Markers, Parsed, Parser, Tokenizer};

static MARKERS: LazyLock<Arc<Markers>> = LazyLock::new(|| {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/cli/assets/demo/tokenizer.json");
    let tokenizer = Tokenizer::from_bytes(&std::fs::read(demo).expect("the demo's tokenizer"));
    Arc::new(Markers::of(&tokenizer.expect("it can be used")).expect("it has all markers"))
});

/// What is thought and said, and the arguments of all calls.
fn parsed<'a>(pieces: impl Iterator<Item = &'a str>) -> (String, String, String) {
    let mut parser = Parser::new(Arc::clone(&MARKERS), &[], true);
    let mut all = Parsed::default();
    pieces.for_each(|piece| parser.push(piece, &mut all));
    parser.finish(&mut all);
    let arguments = all.calls.iter().map(|piece| piece.arguments.as_str()).collect();
    (all.reasoning, all.text, arguments)
}

fuzz_target!(|answer: &str| {
    let whole = parsed([answer].into_iter());
    let letters = parsed(answer.char_indices().map(|(at, c)| &answer[at..at + c.len_utf8()]));
    assert_eq!(whole, letters);
    // That no marker shows is not asserted here: what stands on both sides of one that is left out may look like another
    // together (`<|E<CLS>ND_TEXT|>`), which the model has not written.
});

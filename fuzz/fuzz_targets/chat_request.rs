//! Any bytes as the body of a chat completion: refused in words, or a conversation the demo's template takes or refuses.
#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use proto::Prompt;
use router::ModelFiles;
use router::text::Text;

static TEXT: LazyLock<Text> = LazyLock::new(|| {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/cli/assets/demo");
    let files = ModelFiles::read_dir(&demo).expect("the demo's files");
    Text::load(&files).expect("they can be used").expect("there is a tokenizer")
});

fuzz_target!(|body: &[u8]| {
    match router::read_chat(body, Some(&TEXT)) {
        Err(why) => assert!(!why.is_empty()),
        Ok(request) => {
            if let Ok(prompt) = Prompt::try_from(request.prompt) {
                let _ = TEXT.tokenize(prompt);
            }
        }
    }
});

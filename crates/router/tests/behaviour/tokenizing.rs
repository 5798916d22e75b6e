use router::text::Tokenizer;
use router::{Error, ModelFiles};
use types::TokenId;

use crate::support::{demo_files, demo_tokenizer};

fn demo_json() -> serde_json::Value {
    serde_json::from_slice(&demo_files().tokenizer_json.unwrap()).unwrap()
}

fn read(json: &serde_json::Value) -> Result<Tokenizer, Error> {
    Tokenizer::from_bytes(&serde_json::to_vec(json).unwrap())
}

#[test]
fn special_tokens_are_added_only_when_asked_for() {
    let tokenizer = demo_tokenizer();
    let bare = tokenizer.encode("Hello", false).unwrap();
    let mut with_bos = vec![TokenId(5)];
    with_bos.extend(&bare);
    assert_eq!(tokenizer.encode("Hello", true).unwrap(), with_bos);
}

#[test]
fn truncation_and_padding_of_the_file_are_not_applied() {
    let mut json = demo_json();
    json["truncation"] = serde_json::json!(
        {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    );
    json["padding"] = serde_json::json!({
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "<PAD>"
    });
    let text = "A text of more than two tokens.";
    let expected = demo_tokenizer().encode(text, true).unwrap();
    assert_eq!(read(&json).unwrap().encode(text, true).unwrap(), expected);
}

#[test]
fn a_decoder_that_depends_on_the_neighbours_is_refused_by_name() {
    let mut json = demo_json();
    json["decoder"] = serde_json::json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    let refused = read(&json).unwrap_err().to_string();
    assert!(refused.contains("tokenizer.json") && refused.contains("WordPiece"), "{refused}");
}

#[test]
fn a_file_that_is_no_tokenizer_is_refused() {
    assert!(matches!(Tokenizer::from_bytes(b"{}"), Err(Error::File { file: "tokenizer.json", .. })));
}

#[test]
fn a_directory_without_text_files_is_read_as_such() {
    let empty = std::env::temp_dir().join(format!("router-empty-{}", std::process::id()));
    std::fs::create_dir_all(&empty).unwrap();
    let files = ModelFiles::read_dir(&empty).unwrap();
    assert!(files.tokenizer_json.is_none() && files.chat_template.is_none());
    std::fs::remove_dir(&empty).unwrap();
    assert!(matches!(ModelFiles::read_dir(&empty), Err(Error::Read { .. })));
}

use router::text::Tokenizer;
use router::{Error, ModelFiles};
use serde_json::json;
use types::TokenId;

use crate::support::{Random, demo_files, demo_tokenizer};

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

/// Texts of everything that decides where words end.
fn soup(random: &mut Random, markers: &[String]) -> String {
    const PIECES: [&str; 40] = [
        "a",
        "Word",
        " ",
        "  ",
        "\n",
        "\t",
        "\r\n",
        "\u{a0}",
        "\u{2028}",
        "\u{3000}",
        "'",
        "'s",
        "'re",
        "'ll",
        "'D",
        "7",
        "42",
        "½",
        "Ⅷ",
        "٣",
        "é",
        "e\u{301}",
        "\u{301}",
        "Å",
        "\u{212b}",
        "ﬁ",
        "漢字",
        "かが",
        "か\u{3099}",
        "한국",
        "\u{1100}\u{1161}",
        "🦀",
        "—",
        "…",
        "\u{2000}",
        "<|",
        "|>",
        "_",
        "{\"k\": [1]}",
        "и\u{306}",
    ];
    let piece = |random: &mut Random| match random.below(8) {
        0 => markers[random.below(markers.len())].clone(),
        _ => PIECES[random.below(PIECES.len())].to_owned(),
    };
    (0..random.below(40)).map(|_| piece(random)).collect()
}

#[test]
fn words_that_are_remembered_give_the_ids_of_the_library() {
    let words =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let composing = json!({ "normalizer": { "type": "NFC" } });
    let no_digits = json!({ "pre_tokenizer": words });
    let other_words = json!({ "pre_tokenizer": { "type": "Sequence", "pretokenizers": [
        { "type": "Punctuation", "behavior": "Isolated" }, words] } });
    let mut random = Random::seeded(43);
    for changes in [json!({}), composing, no_digits, other_words] {
        let mut json = demo_json();
        for (key, value) in changes.as_object().unwrap() {
            json[key] = value.clone();
        }
        let ours = read(&json).unwrap();
        let library = tokenizers::Tokenizer::from_bytes(serde_json::to_vec(&json).unwrap()).unwrap();
        let markers: Vec<String> = ours.special_tokens().map(str::to_owned).collect();
        for _ in 0..3000 {
            let text = soup(&mut random, &markers);
            for add_special in [false, true] {
                let expected = library.encode_fast(text.as_str(), add_special).unwrap();
                let ids: Vec<u32> = ours.encode(&text, add_special).unwrap().iter().map(|id| id.0).collect();
                assert_eq!(ids, expected.get_ids(), "{text:?} with {changes}");
            }
        }
    }
}

#[test]
fn more_words_than_are_remembered_keep_their_ids() {
    let letters = |mut number: usize| {
        let mut word = String::new();
        while number > 0 {
            word.push(char::from(b'a' + (number % 26) as u8));
            number /= 26;
        }
        word
    };
    let text: String = (0..70_000).map(|number| format!(" {}", letters(number))).collect();
    let json = serde_json::to_vec(&demo_json()).unwrap();
    let expected =
        tokenizers::Tokenizer::from_bytes(json).unwrap().encode_fast(text.as_str(), false).unwrap();
    let ours = demo_tokenizer();
    for part in [&text[..], &text[..text.len() / 2], &text[..]] {
        let ids: Vec<u32> = ours.encode(part, false).unwrap().iter().map(|id| id.0).collect();
        assert!(part != text || ids == expected.get_ids());
    }
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

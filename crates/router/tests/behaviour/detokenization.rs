use router::text::{Detokenizer, Tokenizer};
use types::TokenId;

use crate::support::{Random, VOCAB, demo_files, demo_tokenizer};

/// The library that made the tokens decides what their text is.
fn library() -> tokenizers::Tokenizer {
    tokenizers::Tokenizer::from_bytes(demo_files().tokenizer_json.unwrap()).unwrap()
}

fn check_every_prefix(ours: &Tokenizer, library: &tokenizers::Tokenizer, ids: &[u32], keep_special: bool) {
    let mut detokenizer = Detokenizer::new(keep_special);
    let mut text = String::new();
    for (index, &id) in ids.iter().enumerate() {
        detokenizer.push(ours, TokenId(id), &mut text);
        let mut ended = text.clone();
        detokenizer.clone().finish(&mut ended);
        let expected = library.decode(&ids[..=index], !keep_special).unwrap();
        assert_eq!(ended, expected, "{:?}", &ids[..=index]);
        assert!(expected.starts_with(&text), "sent too early: {text:?} of {expected:?}");
    }
}

#[test]
fn every_token_stands_for_the_text_the_library_gives_it() {
    let (ours, library) = (demo_tokenizer(), library());
    for id in 0..VOCAB + 10 {
        let expected = library.decode(&[id], false).unwrap();
        assert_eq!(ours.decode(&[TokenId(id)], true), expected, "token {id}");
    }
}

#[test]
fn every_prefix_of_random_tokens_is_exact() {
    let (ours, library) = (demo_tokenizer(), library());
    let mut random = Random::seeded(0x0de7_0c3e);
    for round in 0..200 {
        // The first 300 ids are markers and single bytes: they make invalid and split characters.
        let below = if round % 2 == 0 { 300 } else { VOCAB as usize };
        let ids: Vec<u32> =
            (0..random.below(24)).map(|_| u32::try_from(random.below(below)).unwrap()).collect();
        check_every_prefix(&ours, &library, &ids, round % 3 == 0);
    }
}

#[test]
fn characters_cut_into_bytes_come_out_whole() {
    let (ours, library) = (demo_tokenizer(), library());
    let text = "naïve 漢字 🦀👩‍👩‍👧 ñandú";
    let ids: Vec<u32> = ours.encode(text, false).unwrap().iter().map(|id| id.0).collect();
    check_every_prefix(&ours, &library, &ids, false);
    let mut detokenizer = Detokenizer::new(false);
    let mut pieces = Vec::new();
    for &id in &ids {
        let mut piece = String::new();
        detokenizer.push(&ours, TokenId(id), &mut piece);
        pieces.push(piece);
    }
    assert!(pieces.iter().any(String::is_empty), "no character was cut: {pieces:?}");
    assert!(!pieces.concat().contains(char::REPLACEMENT_CHARACTER));
    assert_eq!(pieces.concat(), text);
}

#[test]
fn markers_are_left_out_unless_kept() {
    let ours = demo_tokenizer();
    let ids = ours.encode("<|START_TEXT|>Hi<|END_TEXT|>", false).unwrap();
    assert_eq!(ours.decode(&ids, false), "Hi");
    assert_eq!(ours.decode(&ids, true), "<|START_TEXT|>Hi<|END_TEXT|>");
}

//! What is tokenized where its request is handled, and what is left to a thread that may block: bounds, and the same ids.

use std::slice::from_ref;

use proto::{Prompt, v1};
use router::text::{
    Begun, IN_PLACE_BYTES_MAX, IN_PLACE_MESSAGES_MAX, IN_PLACE_STRANGERS_MAX, IN_PLACE_TOKENS_MAX, Rest, Text,
};
use types::TokenId;

use crate::support::{Random, demo_files};

fn text() -> Text {
    Text::load(&demo_files()).unwrap().unwrap()
}

fn chat(contents: &[String]) -> Prompt {
    let message = |(index, content): (usize, &String)| v1::ChatMessage {
        role: if index % 2 == 0 { "user" } else { "assistant" }.to_owned(),
        content: content.clone(),
        ..v1::ChatMessage::default()
    };
    let messages = contents.iter().enumerate().map(message).collect();
    let chat = v1::ChatPrompt { messages, ..v1::ChatPrompt::default() };
    Prompt::try_from(Some(v1::generate_request::Prompt::Chat(chat))).unwrap()
}

/// Words that nobody has seen before.
fn strangers(random: &mut Random, count: usize) -> String {
    let letter = |random: &mut Random| char::from(b'a' + random.below(26) as u8);
    let word = |random: &mut Random| (0..12).map(|_| letter(random)).collect::<String>();
    (0..count).map(|_| format!(" {}", word(random))).collect()
}

#[test]
fn a_chat_of_known_words_is_done_at_once_with_the_same_ids() {
    let (text, mut random) = (text(), Random::seeded(44));
    let words = strangers(&mut random, 100);
    let expected = text.tokenize(chat(from_ref(&words))).unwrap();
    match text.begin(chat(&[words])).unwrap() {
        Begun::Whole(whole) => assert_eq!(whole, expected),
        Begun::Part(rest) => panic!("left: {rest:?}"),
    }
}

#[test]
fn a_few_new_words_are_done_at_once_and_many_are_not() {
    let (text, mut random) = (text(), Random::seeded(45));
    text.tokenize(chat(&["Hello".to_owned()])).unwrap();
    let few = strangers(&mut random, IN_PLACE_STRANGERS_MAX);
    assert!(matches!(text.begin(chat(&[format!("Hello{few}")])).unwrap(), Begun::Whole(_)));
    let many = strangers(&mut random, IN_PLACE_STRANGERS_MAX + 1);
    let Begun::Part(rest) = text.begin(chat(from_ref(&many))).unwrap() else { panic!("done") };
    assert!(
        matches!(&rest, Rest::Rendered(rendered) if rendered.contains(&many)),
        "it is rendered once: {rest:?}"
    );
    assert_eq!(text.finish(rest).unwrap(), text.tokenize(chat(&[many])).unwrap());
}

#[test]
fn long_texts_words_and_conversations_are_left() {
    let text = text();
    let known = "Hello ".repeat(IN_PLACE_BYTES_MAX / 6 + 1);
    text.tokenize(chat(from_ref(&known))).unwrap();
    let turns = vec!["Hello".to_owned(); IN_PLACE_MESSAGES_MAX + 1];
    for prompt in [chat(&[known]), chat(&turns), Prompt::Text("Hello".to_owned())] {
        let Begun::Part(rest) = text.begin(prompt.clone()).unwrap() else { panic!("done") };
        assert!(matches!(rest, Rest::Prompt(_)));
        assert_eq!(text.finish(rest).unwrap(), text.tokenize(prompt).unwrap());
    }
    let long = "x".repeat(100);
    assert!(matches!(text.begin(chat(&[long])).unwrap(), Begun::Part(Rest::Rendered(_))));
}

#[tokio::test]
async fn many_tokens_become_the_same_text_as_few() {
    let text = text();
    let ids: Vec<TokenId> = (300..400).cycle().take(2 * IN_PLACE_TOKENS_MAX).map(TokenId).collect();
    let whole = text.detokenize(ids.clone(), false, ()).await.unwrap();
    assert_eq!(whole, text.tokenizer().decode(&ids, false));
    let few = ids[..IN_PLACE_TOKENS_MAX].to_vec();
    assert!(whole.starts_with(&text.detokenize(few, false, ()).await.unwrap()));
}

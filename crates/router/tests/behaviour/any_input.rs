//! What the fuzz targets do, over a seeded corpus: bodies and answers that nobody would send on purpose.

use std::sync::Arc;

use proto::Prompt;
use router::text::{Markers, Parsed, Parser, Text};
use serde_json::json;

use crate::support::{Random, demo_files, demo_tokenizer};

/// A body with every field there is.
fn body() -> String {
    json!({
        "model": "demo", "messages": [
            { "role": "system", "content": "Be brief." },
            { "role": "user", "content": [{ "type": "text", "text": "Grüße" }] },
            { "role": "assistant", "reasoning": "x", "tool_calls": [
                { "id": "1", "type": "function", "function": { "name": "f", "arguments": "{\"a\": [1, null]}" } }] },
            { "role": "tool", "tool_call_id": "1", "content": "{}" },
        ],
        "tools": [{ "type": "function", "function": { "name": "f", "strict": true, "parameters": { "type": "object" } } }],
        "tool_choice": { "type": "function", "function": { "name": "f" } }, "parallel_tool_calls": false,
        "response_format": { "type": "json_schema", "json_schema": { "name": "s", "schema": { "type": "integer" } } },
        "structured_outputs": { "choice": ["a", "b"] }, "thinking_token_budget": 5, "reasoning_effort": "low",
        "stop": ["a", "b"], "n": 2, "temperature": 0.5, "top_p": 0.9, "seed": -3, "stream": true,
        "stream_options": { "include_usage": true }, "logit_bias": { "5": -1 }, "bad_words": ["x"],
        "chat_template_kwargs": { "reasoning": false }, "logprobs": true, "top_logprobs": 2, "max_tokens": 10,
    })
    .to_string()
}

#[test]
fn broken_bodies_are_refused_in_words_or_read() {
    let text = Text::load(&demo_files()).unwrap().unwrap();
    let mut random = Random::seeded(41);
    let (mut read, mut refused) = (0, 0);
    for _ in 0..3000 {
        let mut bytes = body().into_bytes();
        for _ in 0..=random.below(4) {
            let at = random.below(bytes.len());
            let until = (at + random.below(40)).min(bytes.len());
            match random.below(4) {
                0 => bytes[at] = b" \"{}[],:\\0-x\xff"[random.below(13)],
                1 => drop(bytes.drain(at..until)),
                2 => bytes.splice(at..at, body().into_bytes()[..random.below(60)].to_vec()).for_each(drop),
                _ => bytes.truncate(at.max(1)),
            }
            if bytes.is_empty() {
                bytes.push(b'{');
            }
        }
        match router::read_chat(&bytes, Some(&text)) {
            Err(why) => {
                assert!(!why.is_empty());
                refused += 1;
            }
            Ok(request) => {
                if let Ok(prompt) = Prompt::try_from(request.prompt) {
                    let _ = text.tokenize(prompt);
                }
                read += 1;
            }
        }
    }
    assert!(refused > 100, "{read} read, {refused} refused");
}

#[test]
fn nesting_and_numbers_without_end_are_refused() {
    for body in [
        "[".repeat(100_000),
        format!("{{\"messages\": {}", "[".repeat(100_000)),
        format!("{{\"tools\": {}1{}}}", "[".repeat(500), "]".repeat(500)),
        format!("{{\"temperature\": 1{}}}", "0".repeat(100_000)),
    ] {
        assert!(!router::read_chat(body.as_bytes(), None).unwrap_err().is_empty());
    }
}

#[test]
fn soups_of_markers_read_the_same_however_they_are_cut_and_show_none() {
    let tokenizer = demo_tokenizer();
    let markers = Arc::new(Markers::of(&tokenizer).unwrap());
    let specials: Vec<&str> = tokenizer.special_tokens().collect();
    let mut words: Vec<&str> = specials.clone();
    words.extend([
        "<|",
        "|>",
        "{\"tool_name\": \"f\", \"parameters\": {",
        "}",
        "]",
        "[",
        "\\",
        "\"",
        "ü",
        "\n",
        ", ",
    ]);
    // What stands on both sides of a marker, or of a citation's tag, may be another one together.
    words.extend([
        "<|E",
        "ND_TEXT|>",
        "<|END_TEXT|",
        ">",
        "<C",
        "LS>",
        "<|START_",
        "ACTION|>",
        "<co>",
        "</co: 0:[0]>",
    ]);
    let mut random = Random::seeded(42);
    for round in 0..6000 {
        let soup: String = (0..random.below(30)).map(|_| words[random.below(words.len())]).collect();
        let parsed = |pieces: &mut dyn Iterator<Item = &str>| {
            let mut parser = Parser::new(Arc::clone(&markers), &[], true);
            if round % 2 == 0 {
                parser = parser.with_citations();
            }
            let mut all = Parsed::default();
            pieces.for_each(|piece| parser.push(piece, &mut all));
            parser.finish(&mut all);
            let arguments: String = all.calls.iter().map(|piece| piece.arguments.as_str()).collect();
            [all.reasoning, all.text, arguments]
        };
        let whole = parsed(&mut [soup.as_str()].into_iter());
        let letters = parsed(&mut soup.char_indices().map(|(at, c)| &soup[at..at + c.len_utf8()]));
        assert_eq!(whole, letters, "{soup}");
        for (part, marker) in whole.iter().flat_map(|part| specials.iter().map(move |marker| (part, *marker)))
        {
            assert!(!part.contains(marker), "{marker} shows in {part:?}, from {soup:?}");
        }
    }
}

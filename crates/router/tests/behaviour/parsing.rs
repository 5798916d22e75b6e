use std::sync::{Arc, LazyLock};

use router::text::{CallPiece, Markers, Parsed, Parser, Tokenizer};

use crate::support::{Random, demo_tokenizer};

/// Read once: thousands of parsers are made of it.
static TOKENIZER: LazyLock<(Tokenizer, Arc<Markers>)> = LazyLock::new(|| {
    let tokenizer = demo_tokenizer();
    let markers = Arc::new(Markers::of(&tokenizer).unwrap());
    (tokenizer, markers)
});

fn parser(prompt: &str) -> Parser {
    let (tokenizer, markers) = &*TOKENIZER;
    Parser::new(Arc::clone(markers), &tokenizer.encode(prompt, false).unwrap(), true)
}

const THINKS: &str = "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_THINKING|>";
const ANSWERS: &str = "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_THINKING|><|END_THINKING|>";

/// Everything that comes out of pushing `pieces`, with the pieces of each call put together.
fn parse<'a>(mut parser: Parser, pieces: impl IntoIterator<Item = &'a str>) -> Parsed {
    let mut all = Parsed::default();
    let mut calls: Vec<CallPiece> = Vec::new();
    for piece in pieces {
        parser.push(piece, &mut all);
    }
    parser.finish(&mut all);
    for piece in std::mem::take(&mut all.calls) {
        match calls.last_mut() {
            Some(call) if call.index == piece.index => {
                assert_eq!(piece.name, None, "a name comes once");
                call.arguments.push_str(&piece.arguments);
            }
            _ => {
                assert!(piece.name.is_some(), "a call begins with its name");
                calls.push(piece);
            }
        }
    }
    Parsed { calls, ..all }
}

fn call(index: u32, name: &str, arguments: &str) -> CallPiece {
    CallPiece { index, name: Some(name.to_owned()), arguments: arguments.to_owned() }
}

fn text_of(prompt: &str, answer: &str) -> Parsed {
    parse(parser(prompt), [answer])
}

#[test]
fn reasoning_and_text_are_told_apart_in_both_generations() {
    for (start, end) in [("<|START_TEXT|>", "<|END_TEXT|>"), ("<|START_RESPONSE|>", "<|END_RESPONSE|>")] {
        let answer = format!("Let me see.<|END_THINKING|>\n{start}It is\n 4.{end}<|END_OF_TURN_TOKEN|>");
        let parsed = text_of(THINKS, &answer);
        let expected = Parsed {
            reasoning: "Let me see.".to_owned(),
            text: "It is\n 4.".to_owned(),
            ..Parsed::default()
        };
        assert_eq!(parsed, expected);
        let parsed = text_of(ANSWERS, &format!("{start}Hi{end}"));
        assert_eq!((parsed.reasoning.as_str(), parsed.text.as_str()), ("", "Hi"));
        let parsed =
            text_of("a bare prompt", &format!("<|START_THINKING|>Hm.<|END_THINKING|>{start}Hi{end}"));
        assert_eq!((parsed.reasoning.as_str(), parsed.text.as_str()), ("Hm.", "Hi"));
    }
}

#[test]
fn halves_of_a_marker_do_not_become_one_when_what_was_between_them_is_left_out() {
    let parsed = text_of(ANSWERS, "a <|E<CLS>ND_TEXT|> b");
    assert_eq!((parsed.text.as_str(), parsed.reasoning.as_str()), ("a <|END_TEXT| b", ""));
    let parsed = text_of(ANSWERS, "<|E<C<PAD>LS>ND_TEXT|>>");
    assert_eq!(parsed.text, "<|E<CLSND_TEXT|>>");
    let parsed = text_of(THINKS, "<|END_<CLS>TEXT|><|END_THINKING|>said");
    assert_eq!((parsed.text.as_str(), parsed.reasoning.as_str()), ("said", "<|END_TEXT|"));
    let parsed = text_of(ANSWERS, "<|E<|END_TEXT|><|START_TEXT|>ND_TEXT|>");
    assert_eq!(parsed.text, "<|END_TEXT|");
    let call = "<|START_ACTION|>[{\"tool_name\": \"f\", \"parameters\": {\"a\": \"<|E<CLS>ND_TEXT|>\"}}]<|END_ACTION|>";
    assert_eq!(text_of(ANSWERS, call).calls[0].arguments, "{\"a\": \"<|END_TEXT|\"}");
}

#[test]
fn an_answer_without_markers_is_text() {
    assert_eq!(text_of(ANSWERS, " plain 1 < 2").text, " plain 1 < 2");
    assert_eq!(text_of(THINKS, "thought<|END_THINKING|>said").text, "said");
    assert_eq!(text_of(THINKS, "thought<|END_THINKING|><|END_OF_TURN_TOKEN|>").text, "");
    assert_eq!(text_of(THINKS, "only thought").reasoning, "only thought");
}

#[test]
fn tool_calls_come_with_their_names_and_arguments() {
    let answer = "I need two.<|END_THINKING|><|START_ACTION|>[\n    {\"tool_call_id\": \"0\", \"tool_name\": \"f\", \
         \"parameters\": {\"a\": [1, {\"b\": \"}]\"}]}},\n  {\"parameters\": {\"x\": -1.5e3}, \"tool_name\": \"g\"},\
         {\"tool_call_id\": 7, \"tool_name\": \"none\"}\n]<|END_ACTION|><|END_OF_TURN_TOKEN|>";
    let parsed = text_of(THINKS, answer);
    let calls = vec![
        call(0, "f", "{\"a\": [1, {\"b\": \"}]\"}]}"),
        call(1, "g", "{\"x\": -1.5e3}"),
        call(2, "none", "{}"),
    ];
    let reasoning = "I need two.".to_owned();
    assert_eq!(parsed, Parsed { reasoning, calls, ..Parsed::default() });
}

#[test]
fn arguments_stream_as_they_come() {
    let mut parser = parser(ANSWERS);
    let mut deltas = Vec::new();
    for piece in
        ["<|START_ACTION|>[{\"tool_name\": \"f\", ", "\"parameters\": {", "\"city\": \"Ber", "lin\"}}]"]
    {
        let mut out = Parsed::default();
        parser.push(piece, &mut out);
        deltas.push(out.calls.into_iter().map(|piece| piece.arguments).collect::<String>());
    }
    assert_eq!(deltas, ["", "{", "\"city\": \"Ber", "lin\"}"]);
}

#[test]
fn a_slip_inside_a_string_is_mended() {
    let answer = "<|START_ACTION|>[{\"tool_name\": \"grep\", \"parameters\": {\"re\": \"a\\|b\", \"text\": \"1\n2\"}}]";
    let parsed = text_of(ANSWERS, answer);
    let arguments: serde_json::Value = serde_json::from_str(&parsed.calls[0].arguments).unwrap();
    assert_eq!(arguments, serde_json::json!({ "re": "a\\|b", "text": "1\n2" }));
}

#[test]
fn what_is_no_tool_call_is_text_with_a_reason() {
    let list = [
        "I call f(1)",
        "{\"tool_name\": \"f\", \"parameters\": {}}",
        "[{\"tool_name\": \"f\", \"parameters\": \"a text\"}]",
        "[{\"tool_name\": \"f\", \"parameters\": [1]}]",
        "[{\"tool_name\": 1, \"parameters\": {}}]",
        "[{\"tool_name\": \"\", \"parameters\": {}}]",
        "[{\"parameters\": {}}]",
        "[{\"tool_name\" \"f\"}]",
        "[{tool_name: \"f\"}]",
        "[{\"a\": 01, \"tool_name\": \"f\"}]",
        "[{\"a\": tru, \"tool_name\": \"f\"}]",
        "[[]]",
        "[{\"tool_name\": \"f\"",
    ];
    for action in list {
        let parsed =
            text_of(ANSWERS, &format!("<|START_ACTION|>{action}<|END_ACTION|><|END_OF_TURN_TOKEN|>"));
        assert_eq!(
            (parsed.text.as_str(), parsed.calls.len(), parsed.faults.len()),
            (action, 0, 1),
            "{action}"
        );
    }
    let deep = format!("[{{\"parameters\": {}", "{\"a\":".repeat(200));
    let parsed = text_of(ANSWERS, &format!("<|START_ACTION|>{deep}<|END_ACTION|>"));
    assert_eq!((parsed.text, parsed.calls.len()), (deep, 0));
}

#[test]
fn a_call_that_goes_wrong_after_others_leaves_them_whole() {
    let first = "{\"tool_name\": \"f\", \"parameters\": {}}";
    let parsed = text_of(ANSWERS, &format!("<|START_ACTION|>[{first}, {{\"oops\"<|END_ACTION|>"));
    assert_eq!(parsed.calls, [call(0, "f", "{}")]);
    assert_eq!((parsed.text.as_str(), parsed.faults.len()), (", {\"oops\"", 1));
    let parsed = text_of(ANSWERS, "<|START_ACTION|>[{\"tool_name\": \"f\", \"parameters\": {\"a\": \"cut of");
    assert_eq!((parsed.calls, parsed.text.as_str()), (vec![call(0, "f", "{\"a\": \"cut of")], ""));
    assert_eq!(parsed.faults.len(), 1);
}

#[test]
fn calls_in_several_actions_count_on() {
    let action = "<|START_ACTION|>[{\"tool_name\": \"f\", \"parameters\": {}}]<|END_ACTION|>";
    let parsed = text_of(ANSWERS, &format!("{action}{action}"));
    assert_eq!(parsed.calls, [call(0, "f", "{}"), call(1, "f", "{}")]);
}

#[test]
fn a_model_that_was_offered_no_tools_calls_none() {
    let (tokenizer, markers) = &*TOKENIZER;
    let prompt = tokenizer.encode(ANSWERS, false).unwrap();
    let parsed =
        parse(Parser::new(Arc::clone(markers), &prompt, false), ["<|START_ACTION|>[{}]<|END_ACTION|>"]);
    assert_eq!((parsed.text.as_str(), parsed.calls.len(), parsed.faults.len()), ("[{}]", 0, 1));
}

#[test]
fn a_marker_that_is_cut_at_the_end_does_not_show() {
    let whole = "Hi<|END_TEXT|>";
    for end in 4..whole.len() {
        let parsed = text_of(ANSWERS, &format!("<|START_TEXT|>{}", &whole[..end]));
        assert_eq!(parsed.text, "Hi", "cut after {end} bytes");
    }
    assert_eq!(text_of(ANSWERS, "<|START_TEXT|>Vec<U").text, "Vec<U");
    assert_eq!(text_of(ANSWERS, "<|START_TEXT|>a <| b").text, "a <| b", "no marker goes on with a blank");
}

const PARTS: [&str; 32] = [
    "<|START_THINKING|>",
    "<|END_THINKING|>",
    "<|START_TEXT|>",
    "<|END_TEXT|>",
    "<|START_RESPONSE|>",
    "<|END_RESPONSE|>",
    "<|START_ACTION|>",
    "<|START_ACTION|>[{\"tool_name\": \"f\", \"parameters\": {",
    "<|END_ACTION|>",
    "<|END_OF_TURN_TOKEN|>",
    "<BOS_TOKEN>",
    "<|USER_TOKEN|>",
    "hello",
    " ",
    "\n",
    "<",
    "<|",
    "<|START",
    "|>",
    "Grüße 漢字",
    "[",
    "]",
    "{",
    "}",
    "{\"tool_name\": \"g\"",
    ",",
    "\"parameters\": {\"a\": 1.5}",
    ":",
    "\"x\"",
    "\\",
    "12e",
    "null",
];

#[test]
fn the_result_does_not_depend_on_how_an_answer_is_cut() {
    let mut random = Random::seeded(0x7061_7273);
    for case in 0..3000 {
        let answer: String = (0..1 + random.below(14)).map(|_| PARTS[random.below(PARTS.len())]).collect();
        let prompt = [THINKS, ANSWERS, "x"][random.below(3)];
        let whole = parse(parser(prompt), [answer.as_str()]);
        let by_character: Vec<&str> =
            answer.char_indices().map(|(at, c)| &answer[at..at + c.len_utf8()]).collect();
        assert_eq!(parse(parser(prompt), by_character), whole, "case {case}: {answer}");
        let mut cuts: Vec<&str> = Vec::new();
        let mut rest = answer.as_str();
        while !rest.is_empty() {
            let mut end = 1 + random.below(rest.len().min(12));
            while !rest.is_char_boundary(end) {
                end += 1;
            }
            cuts.push(&rest[..end]);
            rest = &rest[end..];
        }
        assert_eq!(parse(parser(prompt), cuts), whole, "case {case}: {answer}");
        for shown in [&whole.reasoning, &whole.text] {
            let leak = ["<|END_TEXT|>", "<|START_ACTION|>", "<BOS_TOKEN>", "<|USER_TOKEN|>"];
            assert!(!leak.iter().any(|marker| shown.contains(marker)), "case {case}: {answer} shows {shown}");
        }
    }
}

#[test]
fn a_tokenizer_that_lacks_a_marker_is_refused_by_its_name() {
    let json = String::from_utf8(crate::support::demo_files().tokenizer_json.unwrap()).unwrap();
    for (marker, named) in [("END_THINKING", "<|END_THINKING|>"), ("START_ACTION", "<|START_ACTION|>")] {
        let without = json.replace(&format!("<|{marker}|>"), "<|SOMETHING_ELSE|>");
        let tokenizer = Tokenizer::from_bytes(without.as_bytes()).unwrap();
        let error = Markers::of(&tokenizer).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
    let older = json.replace("<|START_TEXT|>", "<|A|>").replace("<|END_TEXT|>", "<|B|>");
    Markers::of(&Tokenizer::from_bytes(older.as_bytes()).unwrap()).unwrap();
    let foreign = json.replace("<|START_OF_TURN_TOKEN|>", "<|im_start|>");
    Markers::of(&Tokenizer::from_bytes(foreign.as_bytes()).unwrap()).unwrap();
}

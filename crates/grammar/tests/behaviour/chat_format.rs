//! Forms inside the chat format: markers where they belong, thinking before, calls that are calls.

use crate::support::{Random, chat, follows, matcher, walk};
use grammar::{Begin, Calls, Tool};
use serde_json::{Value, json};
use types::Constraint;

fn yes_or_no() -> Constraint {
    Constraint::Choice(vec!["yes".to_owned(), "no".to_owned()])
}

fn tool(name: &str, parameters: Option<Value>) -> Tool {
    Tool { name: name.to_owned(), parameters, strict: true }
}

fn weather() -> Tool {
    let parameters = json!({
        "type": "object",
        "properties": { "city": { "type": "string", "maxLength": 8 }, "days": { "type": "integer", "minimum": 1, "maximum": 9 } },
        "required": ["city", "days"],
        "additionalProperties": false,
    });
    tool("weather", Some(parameters))
}

fn calls(required: bool, several: bool) -> Calls {
    Calls { tools: vec![weather(), tool("now \"quoted\"", None)], several, required }
}

fn accepts(grammar: &str, text: &str) -> bool {
    follows(&mut matcher(grammar), text)
}

#[test]
fn text_stands_between_its_markers_of_either_generation() {
    let grammar = chat(Begin::Answer, Some(&yes_or_no()), None);
    assert!(accepts(&grammar, "<|START_TEXT|>yes<|END_TEXT|>"));
    assert!(accepts(&grammar, "<|START_RESPONSE|>no<|END_RESPONSE|>"));
    for wrong in
        ["yes", "<|START_TEXT|>yes", "<|START_TEXT|>maybe<|END_TEXT|>", "<|START_ACTION|>[]<|END_ACTION|>"]
    {
        assert!(!accepts(&grammar, wrong), "{wrong}");
    }
}

#[test]
fn thoughts_are_free_and_end_before_the_text() {
    let grammar = chat(Begin::Thinking, Some(&yes_or_no()), None);
    assert!(accepts(&grammar, "hmm {\"x\": <b>, grüße\n<|END_THINKING|><|START_TEXT|>no<|END_TEXT|>"));
    assert!(accepts(&grammar, "<|END_THINKING|><|START_TEXT|>yes<|END_TEXT|>"));
    assert!(!accepts(&grammar, "hmm<|START_TEXT|>no<|END_TEXT|>"));
    let turn = chat(Begin::Turn, Some(&yes_or_no()), None);
    assert!(accepts(&turn, "<|START_TEXT|>yes<|END_TEXT|>"));
    assert!(accepts(&turn, "<|START_THINKING|>a<|END_THINKING|><|START_TEXT|>yes<|END_TEXT|>"));
}

#[test]
fn a_text_that_has_begun_goes_on() {
    let grammar = chat(Begin::Text, Some(&yes_or_no()), None);
    assert!(accepts(&grammar, "yes") && accepts(&grammar, "no<|END_TEXT|>") && !accepts(&grammar, "x"));
}

#[test]
fn a_required_call_is_made_with_arguments_of_its_schema() {
    let grammar = chat(Begin::Answer, None, Some(&calls(true, true)));
    let first = matcher(&grammar);
    let mut random = Random::seeded(7);
    let mut seen = 0;
    for _ in 0..40 {
        let Some(answer) = walk(&mut first.clone(), &mut random, 300) else { continue };
        let list = answer.strip_prefix("<|START_ACTION|>").unwrap().strip_suffix("<|END_ACTION|>").unwrap();
        let list: Vec<Value> = serde_json::from_str(list).unwrap();
        assert!(!list.is_empty());
        for call in list {
            let parameters = call["parameters"].as_object().unwrap();
            match call["tool_name"].as_str().unwrap() {
                "weather" => assert!((1..=9).contains(&parameters["days"].as_i64().unwrap())),
                "now \"quoted\"" => assert!(parameters.is_empty()),
                other => panic!("there is no {other}"),
            }
            seen += 1;
        }
    }
    assert!(seen > 20, "{seen} calls");
}

#[test]
fn one_call_at_a_time_is_one_call() {
    let one = "{\"tool_call_id\": \"0\", \"tool_name\": \"weather\", \"parameters\": {\"city\": \"Bonn\", \"days\": 3}}";
    let both = format!("<|START_ACTION|>[\n    {one},\n    {one}\n]<|END_ACTION|>");
    let single = format!("<|START_ACTION|>[{one}]<|END_ACTION|>");
    assert!(accepts(&chat(Begin::Answer, None, Some(&calls(true, true))), &both));
    let grammar = chat(Begin::Answer, None, Some(&calls(true, false)));
    assert!(accepts(&grammar, &single) && !accepts(&grammar, &both));
}

#[test]
fn a_call_that_is_not_required_leaves_text_free_or_of_its_form() {
    let free = chat(Begin::Answer, None, Some(&calls(false, true)));
    assert!(accepts(&free, "<|START_TEXT|>I'd rather not [call].<|END_TEXT|>"));
    assert!(!accepts(
        &free,
        "<|START_ACTION|>[{\"tool_call_id\": \"0\", \"tool_name\": \"rm\", \"parameters\": {}}]<|END_ACTION|>"
    ));
    let formed = chat(Begin::Answer, Some(&yes_or_no()), Some(&calls(false, true)));
    assert!(
        accepts(&formed, "<|START_TEXT|>no<|END_TEXT|>") && !accepts(&formed, "<|START_TEXT|>I<|END_TEXT|>")
    );
    assert!(!accepts(&chat(Begin::Answer, None, Some(&calls(true, true))), "<|START_TEXT|>no<|END_TEXT|>"));
}

#[test]
fn markers_spelled_out_as_text_are_text() {
    // Free text may spell a marker letter by letter; it does not end the thoughts by that.
    let grammar = chat(Begin::Thinking, Some(&yes_or_no()), None);
    let mut matcher = matcher(&grammar);
    for c in "<|END_THINKING|>".chars() {
        let id = (0..crate::support::VOCAB)
            .map(types::TokenId)
            .find(|&id| crate::support::table().bytes(id) == c.to_string().as_bytes())
            .unwrap();
        matcher.follow(id).unwrap();
    }
    assert!(
        !crate::support::allowed(&mut matcher).contains(&types::TokenId(15)),
        "a text has not been begun"
    );
}

//! A limit to thoughts, alone and together with a form of the answer.

use grammar::{Begin, Form, Marks};
use proto::worker::{GenerateRequest, Guide, Thinking};
use types::{Constraint, TokenId};

use crate::group::{Group, guided};

const START: u32 = 13;
const END: u32 = 14;

fn thinking(tokens_max: u32, open: bool) -> Option<Thinking> {
    Some(Thinking { tokens_max, start_token_id: START, end_token_id: END, open })
}

fn limited(tokens_max: u32, grammar: String, seed: u64) -> GenerateRequest {
    let guide = Guide { grammar, thinking: thinking(tokens_max, true) };
    GenerateRequest { guide: Some(guide), ..guided(String::new(), seed) }
}

#[test]
fn thoughts_end_when_they_have_used_up_their_tokens() {
    let group = Group::start(1, |_| {});
    for (seed, most) in [(1, 0), (2, 1), (3, 17)] {
        let mut request = limited(most, String::new(), seed);
        let generation = request.generation.as_mut().unwrap();
        generation.max_tokens = Some(most + 5);
        generation.ignore_eos = true;
        let tokens = &group.ask(vec![request])[0][0].tokens;
        let end = tokens.iter().position(|&id| id == END).unwrap();
        assert!(end <= most as usize, "{tokens:?}");
    }
    group.stop();
}

#[test]
fn an_answer_of_a_form_follows_on_limited_thoughts() {
    let pair = |start, end| [TokenId(start), TokenId(end)];
    let marks = Marks { thinking: pair(START, END), text: vec![pair(15, 16)], action: pair(17, 18) };
    let content = Constraint::Choice(vec!["yes".to_owned(), "no".to_owned()]);
    let form = Form { begin: Begin::Thinking, marks: Some(&marks), content: Some(&content), calls: None };
    let grammar = form.compose().unwrap();
    let group = Group::start(1, |_| {});
    let requests = (0..20).map(|seed| limited(12, grammar.clone(), seed)).collect();
    for answers in group.ask(requests) {
        let text = answers[0].text();
        let (_, answer) = text.split_once("<|END_THINKING|>").unwrap();
        assert!(["yes", "no"].map(|a| format!("<|START_TEXT|>{a}<|END_TEXT|>")).contains(&answer.to_owned()));
        // A character that was begun is brought to its end first.
        let end = answers[0].tokens.iter().position(|&id| id == END).unwrap();
        assert!(end <= 12 + 3, "{end}");
    }
    group.stop();
}

//! Schemas, expressions, choices and grammars; alone and in company, cut and gone on with.

use proto::worker::GenerateRequest;
use serde_json::Value;
use tonic::Code;
use types::{BlockSize, Constraint};

use crate::group::{Group, guided, plain};
use crate::schemas::{Random, schema};
use crate::validity::admits;

/// Requests for answers to `count` schemas, with the schemas.
fn asked(seed: u64, count: u64) -> Vec<(Value, GenerateRequest)> {
    let mut random = Random::seeded(seed);
    let ask = |seed| {
        let schema = schema(&mut random);
        let grammar = plain(&Constraint::Json(schema.to_string()));
        (schema, guided(grammar, seed))
    };
    (0..count).map(ask).collect()
}

/// Asks for all of them at once and checks each answer against its schema.
fn check(group: &Group, asked: Vec<(Value, GenerateRequest)>) {
    let (schemas, requests): (Vec<Value>, Vec<GenerateRequest>) = asked.into_iter().unzip();
    let answers = group.ask(requests);
    for (schema, answers) in schemas.iter().zip(answers) {
        assert!(!answers.is_empty());
        for answer in answers {
            let text = answer.text();
            let value: Value =
                serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text} of {schema}"));
            assert!(admits(schema, schema, &value), "{text} is not of {schema}");
        }
    }
}

#[test]
fn answers_to_300_schemas_are_valid() {
    let group = Group::start(1, |_| {});
    check(&group, asked(20_261, 300));
    group.stop();
}

#[test]
fn answers_of_two_ranks_are_valid() {
    let group = Group::start(2, |_| {});
    check(&group, asked(20_262, 24));
    group.stop();
}

#[test]
fn answers_are_valid_and_the_same_when_sub_groups_draw_them() {
    let alone = Group::start(1, |_| {});
    let requests = || asked(20_264, 24).into_iter().map(|(_, request)| request).collect::<Vec<_>>();
    let expected = alone.ask(requests());
    alone.stop();
    for (tensor, data) in [(1, 2), (2, 2)] {
        let group = Group::among(tensor, data, |_| {});
        check(&group, asked(20_264, 24));
        assert_eq!(group.ask(requests()), expected, "{data} sub-groups of {tensor}");
        group.stop();
    }
}

#[test]
fn several_answers_to_one_schema_are_each_valid() {
    let group = Group::start(1, |_| {});
    let several = asked(20_263, 12).into_iter().map(|(schema, mut request)| {
        request.generation.as_mut().unwrap().n = Some(4);
        (schema, request)
    });
    check(&group, several.collect());
    group.stop();
}

#[test]
fn answers_that_lose_their_place_meanwhile_are_the_same() {
    let roomy = Group::start(1, |_| {});
    let requests =
        |asked: Vec<(Value, GenerateRequest)>| asked.into_iter().map(|(_, request)| request).collect();
    let undisturbed = roomy.ask(requests(asked(20_264, 40)));
    roomy.stop();
    // Room for the longest answer, and not for many at once.
    let narrow = Group::start(1, |limits| {
        limits.block_size = BlockSize::new(8).unwrap();
        limits.kv_tokens = 1600;
    });
    assert_eq!(narrow.ask(requests(asked(20_264, 40))), undisturbed);
    narrow.stop();
}

#[test]
fn an_answer_goes_on_from_where_it_was_cut() {
    let group = Group::start(1, |_| {});
    for (_, request) in asked(20_265, 10) {
        let whole = group.ask(vec![request.clone()]).remove(0).remove(0);
        let _ = whole.text();
        let cut = whole.tokens.len() / 2;
        let resumed = GenerateRequest { resume_tokens: whole.tokens[..cut].to_vec(), ..request };
        let rest = group.ask(vec![resumed]).remove(0).remove(0);
        assert_eq!(rest.tokens, whole.tokens[cut..]);
    }
    group.stop();
}

#[test]
fn tokens_that_the_grammar_does_not_allow_cannot_be_gone_on_with() {
    let group = Group::start(1, |_| {});
    let request = guided(plain(&Constraint::JsonObject), 1);
    let status =
        group.client.generate(GenerateRequest { resume_tokens: vec![600, 700], ..request }).unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("resume_tokens"), "{status:?}");
    group.stop();
}

#[test]
fn choices_expressions_and_grammars_hold() {
    let group = Group::start(1, |_| {});
    let choices: Vec<String> = ["red", "green", "dark green"].map(str::to_owned).to_vec();
    let sum = "start: NUMBER (\"+\" NUMBER){1,3}\nNUMBER: /[1-9][0-9]{0,2}/\n";
    let forms = [
        Constraint::Choice(choices.clone()),
        Constraint::Regex("[a-f0-9]{8}(-[a-f0-9]{4}){3}".to_owned()),
        Constraint::Grammar(sum.to_owned()),
    ];
    let requests = (0..45).map(|seed| guided(plain(&forms[seed as usize % 3]), seed)).collect();
    for (at, answers) in group.ask(requests).into_iter().enumerate() {
        let text = answers[0].text();
        let right = match at % 3 {
            0 => choices.contains(&text),
            1 => text.len() == 23 && text.split('-').count() == 4,
            _ => (2..=4)
                .contains(&text.split('+').filter(|n| n.parse::<u32>().is_ok_and(|n| n < 1000)).count()),
        };
        assert!(right, "{text}");
    }
    group.stop();
}

#[test]
fn a_grammar_that_cannot_be_is_refused_and_others_go_on() {
    let group = Group::start(1, |_| {});
    for grammar in ["no json", r#"{"grammars": [{"lark_grammar": "start: other"}], "max_tokens": null}"#] {
        let status = group.client.generate(guided(grammar.to_owned(), 1)).unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert!(status.message().contains("guide.grammar"), "{status:?}");
    }
    let mut starved = guided(plain(&Constraint::JsonObject), 1);
    starved.generation.as_mut().unwrap().min_tokens = Some(5);
    let status = group.client.generate(starved).unwrap_err();
    assert!(status.message().contains("generation.min_tokens"), "{status:?}");
    check(&group, asked(20_266, 2));
    group.stop();
}

//! What comes over the wire becomes our types, or is refused by the name its caller used.

use proto::{Failure, GenerationFields, Prompt, Role, constraint, priority, stop_strings, v1, worker};
use types::limits::{STOP_STRING_BYTES_MAX, STOP_STRINGS_MAX};
use types::{Constraint, GenerationSpec, Priority};

fn fields(failure: Failure) -> Vec<String> {
    match failure {
        Failure::Invalid(wrong) => wrong.into_iter().map(|v| v.field.into_owned()).collect(),
        other => panic!("not a refusal of fields: {other}"),
    }
}

fn spec() -> GenerationSpec {
    GenerationSpec {
        max_tokens: Some(9),
        min_tokens: Some(2),
        temperature: Some(0.5),
        top_k: Some(3),
        top_p: Some(0.75),
        min_p: Some(0.25),
        seed: Some(7),
        stop_token_ids: vec![4, 5],
        ignore_eos: true,
        logprobs: Some(1),
        prompt_logprobs: Some(0),
        n: Some(3),
        presence_penalty: Some(0.5),
        frequency_penalty: Some(-0.5),
        repetition_penalty: Some(1.25),
        logit_bias: vec![(3, -1.0), (7, 2.0)],
        allowed_token_ids: vec![3, 7, 8],
        ..GenerationSpec::default()
    }
}

#[test]
fn a_public_request_keeps_every_generation_field() {
    let request = v1::GenerateRequest {
        sampling: Some(v1::Sampling {
            temperature: Some(0.5),
            top_k: Some(3),
            top_p: Some(0.75),
            min_p: Some(0.25),
            seed: Some(7),
            n: Some(3),
            presence_penalty: Some(0.5),
            frequency_penalty: Some(-0.5),
            repetition_penalty: Some(1.25),
            logit_bias: [(7, 2.0), (3, -1.0)].into(),
            allowed_token_ids: vec![3, 7, 8],
            bad_words: vec!["text is not for this type".to_owned()],
            bad_word_token_ids: vec![v1::TokenIds { ids: vec![1, 2] }, v1::TokenIds { ids: vec![9] }],
        }),
        stopping: Some(v1::Stopping {
            max_tokens: Some(9),
            min_tokens: Some(2),
            stop: Vec::new(),
            stop_token_ids: vec![4, 5],
            ignore_eos: true,
            thinking_tokens_max: None,
        }),
        response: Some(v1::Response {
            logprobs: Some(1),
            prompt_logprobs: Some(0),
            keep_special_tokens: false,
            parse: false,
        }),
        ..v1::GenerateRequest::default()
    };
    let bad_words = vec![vec![1, 2], vec![9]];
    assert_eq!(GenerationSpec::from(&request), GenerationSpec { bad_words, ..spec() });
}

#[test]
fn a_generation_crosses_to_a_leader_unchanged() {
    let spec = || GenerationSpec { bad_words: vec![vec![1, 2], vec![9]], ..spec() };
    let generation = spec().validate(0, 100).unwrap();
    let wire = worker::Generation::from(&generation);
    assert_eq!(GenerationSpec::from(wire.clone()), spec());
    assert_eq!(GenerationSpec::from(wire).validate(1, 100).unwrap(), generation);
}

#[test]
fn a_refused_field_is_named_as_each_api_names_it() {
    let bad = || GenerationSpec {
        top_p: Some(f32::NAN),
        max_tokens: Some(0),
        logprobs: Some(u32::MAX),
        n: Some(0),
        presence_penalty: Some(3.0),
        bad_words: vec![vec![]],
        guided: true,
        ignore_eos: true,
        ..GenerationSpec::default()
    };
    let public = GenerationFields::Public.refuse(bad().validate(0, 10).unwrap_err());
    let expected = [
        "sampling.top_p",
        "sampling.presence_penalty",
        "stopping.max_tokens",
        "response.logprobs",
        "sampling.n",
        "stopping.ignore_eos",
        "sampling.bad_words",
    ];
    assert_eq!(fields(public), expected);
    let inner = GenerationFields::Worker.refuse(bad().validate(0, 10).unwrap_err());
    let plain = |name: &str| format!("generation.{}", name.split('.').next_back().unwrap_or_default());
    assert_eq!(fields(inner.clone()), expected.map(plain));
    assert_eq!(fields(GenerationFields::Public.rename(inner)), expected);
}

#[test]
fn a_callers_lowest_priority_is_the_engines_highest() {
    assert_eq!(priority(-100).unwrap(), Priority::HIGHEST);
    assert_eq!(priority(0).unwrap(), Priority::default());
    for wrong in [-101, 101, i32::MIN] {
        let refused = priority(wrong).unwrap_err();
        assert!(refused.to_string().contains(&wrong.to_string()), "{refused}");
        assert_eq!(fields(refused), ["priority"]);
    }
}

#[test]
fn a_constraint_keeps_its_form() {
    use v1::constraint::Form;
    let read = |form| {
        let wire = v1::Constraint { form: Some(form) };
        let ours = constraint(wire.clone());
        let request = v1::GenerateRequest { constraint: Some(wire), ..v1::GenerateRequest::default() };
        assert_eq!(GenerationSpec::from(&request).guided, ours.is_some());
        ours
    };
    assert_eq!(read(Form::Regex("a+".into())), Some(Constraint::Regex("a+".into())));
    let choices = vec!["a".to_owned(), "b".to_owned()];
    assert_eq!(
        read(Form::Choice(v1::Choices { choices: choices.clone() })),
        Some(Constraint::Choice(choices))
    );
    assert_eq!(read(Form::JsonObject(true)), Some(Constraint::JsonObject));
    assert_eq!(read(Form::JsonObject(false)), None);
}

#[test]
fn an_empty_prompt_is_refused_by_its_field() {
    use v1::generate_request::Prompt as Wire;
    let chat = v1::ChatPrompt::default();
    let table = [
        (None, "prompt"),
        (Some(Wire::Text(String::new())), "text"),
        (Some(Wire::Chat(chat)), "chat.messages"),
        (Some(Wire::TokenIds(v1::TokenIds { ids: Vec::new() })), "token_ids.ids"),
    ];
    for (prompt, field) in table {
        assert_eq!(fields(Prompt::try_from(prompt).unwrap_err()), [field]);
    }
    assert_eq!(fields(Prompt::try_from(None::<v1::tokenize_request::Prompt>).unwrap_err()), ["prompt"]);
}

#[test]
fn a_chat_keeps_its_roles_and_names_the_unknown_ones() {
    let message = |role: &str| v1::ChatMessage {
        role: role.to_owned(),
        content: "x".to_owned(),
        ..v1::ChatMessage::default()
    };
    let chat = |roles: &[&str]| {
        let messages = roles.iter().map(|role| message(role)).collect();
        proto::Chat::try_from(v1::ChatPrompt { messages, reasoning: Some(true), ..v1::ChatPrompt::default() })
    };
    let roles: Vec<Role> = chat(&["system", "developer", "user", "assistant", "tool"])
        .unwrap()
        .messages
        .into_iter()
        .map(|m| m.role)
        .collect();
    assert_eq!(roles, [Role::System, Role::Developer, Role::User, Role::Assistant, Role::Tool]);
    let refused = chat(&["user", "User", "", "tool"]).unwrap_err();
    assert_eq!(fields(refused), ["chat.messages[1].role", "chat.messages[2].role"]);
}

#[test]
fn stop_strings_are_bounded_in_number_and_length() {
    let long = "x".repeat(STOP_STRING_BYTES_MAX + 1);
    let wrong = stop_strings(&["ok".to_owned(), String::new(), long]);
    let fields: Vec<&str> = wrong.iter().map(|v| v.field.as_ref()).collect();
    assert_eq!(fields, ["stopping.stop[1]", "stopping.stop[2]"]);
    let many = vec!["x".to_owned(); STOP_STRINGS_MAX + 1];
    assert_eq!(stop_strings(&many)[0].field, "stopping.stop");
    assert!(stop_strings(&many[1..]).is_empty());
}

#[test]
fn a_leaders_finish_says_what_stopped_it() {
    let finish = |reason: worker::FinishReason, token_id| worker::Finish { reason: reason.into(), token_id };
    let eos = v1::Finish::try_from(finish(worker::FinishReason::Eos, Some(6))).unwrap();
    assert_eq!((eos.reason(), eos.matched), (v1::FinishReason::Stop, Some(v1::finish::Matched::TokenId(6))));
    let length = v1::Finish::try_from(finish(worker::FinishReason::Length, None)).unwrap();
    assert_eq!((length.reason(), length.matched), (v1::FinishReason::Length, None));
    assert!(v1::Finish::try_from(finish(worker::FinishReason::Unspecified, None)).is_err());
}

#[test]
fn the_descriptors_hold_both_services() {
    let text = String::from_utf8_lossy(proto::FILE_DESCRIPTOR_SET);
    assert!(text.contains("cohort.v1") && text.contains("cohort.worker.v1"));
}

//! What `cohort generate` sends and prints.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use clap::Parser;
use cli::command::generate::Answer;
use cli::command::{Cli, Command};
use proto::v1::generate_request::Prompt;
use proto::v1::{
    Alternative, Finish, FinishReason, GenerateRequest, GenerateResponse, PromptInfo, PromptLogprob,
    TokenLogprob, Usage,
};
use serde_json::json;

fn request(flags: &[&str]) -> anyhow::Result<GenerateRequest> {
    let line = ["cohort", "generate"].into_iter().chain(flags.iter().copied());
    let Command::Generate(args) = Cli::parse_from(line).command else { panic!("another command") };
    args.to_request()
}

fn logprob(token_id: u32) -> TokenLogprob {
    let top = vec![Alternative { token_id, logprob: -0.5 }, Alternative { token_id: 9, logprob: -1.25 }];
    TokenLogprob { token_id, logprob: -0.5, top }
}

fn answer() -> Answer {
    let mut answer = Answer::default();
    answer.add(GenerateResponse {
        prompt: Some(PromptInfo {
            token_ids: vec![1, 2],
            logprobs: vec![PromptLogprob { value: None }, PromptLogprob { value: Some(logprob(2)) }],
        }),
        ..GenerateResponse::default()
    });
    answer.add(GenerateResponse {
        text: "Hel".into(),
        token_ids: vec![3],
        logprobs: vec![logprob(3)],
        ..GenerateResponse::default()
    });
    answer.add(GenerateResponse {
        text: "lo".into(),
        token_ids: vec![4],
        logprobs: vec![logprob(4)],
        finish: Some(Finish { reason: FinishReason::Length.into(), matched: None }),
        usage: Some(Usage { prompt_tokens: 2, cached_tokens: 1, output_tokens: 2, ..Usage::default() }),
        ..GenerateResponse::default()
    });
    answer
}

fn printed(request: &GenerateRequest) -> serde_json::Value {
    serde_json::to_value(answer().to_json(request)).unwrap()
}

#[test]
fn one_object_holds_the_whole_answer() {
    let request = request(&["--token-ids", "1,2", "--logprobs", "2", "--prompt-logprobs", "2"]).unwrap();
    let entry = |id: u32| json!({"token_id": id, "logprob": -0.5, "top": [[id, -0.5], [9, -1.25]]});
    let expected = json!({
        "token_ids": [3, 4],
        "text": "Hello",
        "finish_reason": "length",
        "logprobs": [entry(3), entry(4)],
        "prompt_logprobs": [null, entry(2)],
        "usage": {"prompt_tokens": 2, "cached_tokens": 1, "output_tokens": 2},
    });
    assert_eq!(printed(&request), expected);
}

#[test]
fn log_probabilities_keep_their_shortest_form() {
    let mut answer = answer();
    answer.logprobs[0].logprob = -0.1;
    let text =
        serde_json::to_string(&answer.to_json(&request(&["--prompt", "x", "--logprobs", "0"]).unwrap()));
    assert!(text.unwrap().contains("\"logprob\":-0.1,"));
}

#[test]
fn log_probabilities_that_were_not_asked_for_are_null() {
    let json = printed(&request(&["--prompt", "x"]).unwrap());
    assert!(json["logprobs"].is_null() && json["prompt_logprobs"].is_null());
}

#[test]
fn unset_flags_stay_unset_on_the_wire() {
    let request = request(&["--prompt", ""]).unwrap();
    assert_eq!(request.prompt, Some(Prompt::Text(String::new())));
    assert_eq!(request.sampling, Some(proto::v1::Sampling::default()));
    assert_eq!(request.stopping, Some(proto::v1::Stopping::default()));
    assert_eq!(request.response, Some(proto::v1::Response::default()));
}

#[test]
fn several_answers_are_one_object_with_the_others_in_it() {
    let mut several = answer();
    several.add(GenerateResponse { text: "c".into(), index: 2, ..GenerateResponse::default() });
    several.add(GenerateResponse { text: "b".into(), index: 1, ..GenerateResponse::default() });
    several.add(GenerateResponse { text: "c".into(), index: 2, ..GenerateResponse::default() });
    let json =
        serde_json::to_value(several.to_json(&request(&["--prompt", "x", "-n", "3"]).unwrap())).unwrap();
    assert_eq!(json["text"], "Hello");
    let others: Vec<_> = json["others"].as_array().unwrap().iter().map(|other| &other["text"]).collect();
    assert_eq!(others, ["b", "cc"]);
    assert_eq!(printed(&request(&["--prompt", "x"]).unwrap()).get("others"), None);
}

#[test]
fn every_generation_flag_is_on_the_wire() {
    let flags = "--prompt x -n 2 --temperature 0.5 --top-k 3 --top-p 0.75 --min-p 0.25 --seed 7 --presence-penalty -1 \
        --frequency-penalty 0.5 --repetition-penalty 1.5 --logit-bias 5=-1.5,9=2 --allowed-token-ids 5,9 --bad-word a \
        --bad-word b --priority -3 --cache-salt s";
    let request = request(&flags.split_whitespace().collect::<Vec<_>>()).unwrap();
    let expected = proto::v1::Sampling {
        temperature: Some(0.5),
        top_k: Some(3),
        top_p: Some(0.75),
        min_p: Some(0.25),
        seed: Some(7),
        n: Some(2),
        presence_penalty: Some(-1.0),
        frequency_penalty: Some(0.5),
        repetition_penalty: Some(1.5),
        logit_bias: [(5, -1.5), (9, 2.0)].into(),
        allowed_token_ids: vec![5, 9],
        bad_words: vec!["a".to_owned(), "b".to_owned()],
        bad_word_token_ids: Vec::new(),
    };
    assert_eq!(request.sampling, Some(expected));
    assert_eq!((request.priority, request.cache_salt.as_str()), (-3, "s"));
    let both = ["cohort", "generate", "--prompt", "x", "--cache-salt", "s", "--bypass-prefix-cache"];
    assert!(Cli::try_parse_from(both).is_err());
    for wrong in ["5", "5=", "x=1", "=1"] {
        assert!(Cli::try_parse_from(["cohort", "chat", "--logit-bias", wrong]).is_err(), "{wrong}");
    }
}

#[test]
fn repeated_chat_flags_alternate_roles_after_the_system_messages() {
    let request = request(&["--chat", "a", "--system", "s", "--chat", "b", "--chat", "c"]).unwrap();
    let Some(Prompt::Chat(chat)) = request.prompt else { panic!("not a chat") };
    let said: Vec<_> = chat.messages.iter().map(|m| (m.role.as_str(), m.content.as_str())).collect();
    assert_eq!(said, [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]);
    assert_eq!(chat.reasoning, None);
}

#[test]
fn a_request_without_a_prompt_says_what_to_give() {
    let error = request(&[]).unwrap_err().to_string();
    assert!(error.contains("--prompt TEXT, --chat TEXT and --token-ids"), "{error}");
}

#[test]
fn the_form_of_an_answer_is_on_the_wire_and_only_one_is_taken() {
    use proto::v1::constraint::Form;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("form");
    std::fs::write(&file, "{\"type\": \"integer\"}").unwrap();
    let file = file.to_str().unwrap();
    let form = |flags: &[&str]| {
        let request = request(&[&["--chat", "x"], flags].concat()).unwrap();
        (request.constraint.unwrap().form.unwrap(), request.response.unwrap().parse)
    };
    assert_eq!(form(&["--json-schema", file]), (Form::Json("{\"type\": \"integer\"}".to_owned()), true));
    assert_eq!(form(&["--grammar", file]).0, Form::Grammar("{\"type\": \"integer\"}".to_owned()));
    assert_eq!(form(&["--regex", "a|b"]).0, Form::Regex("a|b".to_owned()));
    assert_eq!(form(&["--json-object"]).0, Form::JsonObject(true));
    let choices = vec!["yes".to_owned(), "no".to_owned()];
    assert_eq!(
        form(&["--choice", "yes", "--choice", "no", "--keep-special-tokens"]),
        (Form::Choice(proto::v1::Choices { choices }), false)
    );
    let budget = request(&["--chat", "x", "--thinking-tokens-max", "7"]).unwrap().stopping.unwrap();
    assert_eq!(budget.thinking_tokens_max, Some(7));
    let missing = request(&["--chat", "x", "--json-schema", "nowhere.json"]).unwrap_err();
    assert!(missing.to_string().contains("--json-schema nowhere.json: cannot be read"), "{missing}");
    let two = ["cohort", "chat", "--regex", "a", "--choice", "b"];
    assert!(Cli::try_parse_from(two).unwrap_err().to_string().contains("--choice"));
}

use minijinja::Value;
use proto::{Chat, v1};
use router::text::{Conversation, Template, Tokenizer, strftime};
use router::{Error, ModelFiles};
use serde::Deserialize;

use crate::support::{demo_dir, demo_files};

#[derive(Deserialize)]
struct Reference {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    messages: Value,
    tools: Option<Value>,
    reasoning: Option<bool>,
    rendered: String,
    prompt_ids: Vec<u32>,
    greedy_ids: Vec<u32>,
    text: String,
}

fn reference() -> (Vec<Case>, Template, Tokenizer) {
    let json = std::fs::read(demo_dir().join("reference.json")).unwrap();
    let reference: Reference = serde_json::from_slice(&json).unwrap();
    assert_eq!(reference.cases.len(), 30);
    let files = demo_files();
    let tokenizer = Tokenizer::from_bytes(files.tokenizer_json.as_deref().unwrap()).unwrap();
    (reference.cases, Template::load(&files).unwrap().unwrap(), tokenizer)
}

#[test]
fn every_reference_conversation_renders_and_tokenizes_exactly() {
    let (cases, template, tokenizer) = reference();
    for case in cases {
        let Case { messages, tools, reasoning, .. } = case;
        let rendered =
            template.render(Conversation { messages, tools, reasoning, ..Conversation::default() }).unwrap();
        assert_eq!(rendered, case.rendered);
        let ids: Vec<u32> = tokenizer.encode(&rendered, false).unwrap().iter().map(|id| id.0).collect();
        assert_eq!(ids, case.prompt_ids, "{rendered}");
    }
}

#[test]
fn a_chat_from_the_wire_renders_as_the_reference_does() {
    let (cases, template, _) = reference();
    for case in cases.into_iter().filter(|case| case.tools.is_none()) {
        let text = |message: &Value, key: &str| message.get_attr(key).unwrap().as_str().unwrap().to_owned();
        let message = |m: Value| v1::ChatMessage {
            role: text(&m, "role"),
            content: text(&m, "content"),
            ..v1::ChatMessage::default()
        };
        let messages = case.messages.try_iter().unwrap().map(message).collect();
        let chat = Chat::try_from(v1::ChatPrompt {
            messages,
            reasoning: case.reasoning,
            ..v1::ChatPrompt::default()
        })
        .unwrap();
        assert_eq!(template.render(Conversation::try_from(&chat).unwrap()).unwrap(), case.rendered);
    }
}

#[test]
fn every_reference_answer_detokenizes_exactly() {
    let (cases, _, tokenizer) = reference();
    for case in cases {
        let ids: Vec<types::TokenId> = case.greedy_ids.iter().map(|&id| types::TokenId(id)).collect();
        assert_eq!(tokenizer.decode(&ids, true), case.text);
    }
}

fn template(source: &str) -> Template {
    let files = ModelFiles { chat_template: Some(source.to_owned()), ..ModelFiles::default() };
    Template::load(&files).unwrap().unwrap()
}

fn render(source: &str) -> Result<String, String> {
    template(source).render(Conversation::default())
}

#[test]
fn tojson_writes_what_python_writes() {
    // Right sides are the output of json.dumps(value, ensure_ascii=False, …) in Python 3.
    let table = [
        (
            r#"{"a": [1, 2.0, true, none], "é": "<'&\n"}|tojson"#,
            r#"{"a": [1, 2.0, true, null], "é": "<'&\n"}"#,
        ),
        (
            "[1e16, 1e15, 1.5e-7, 0.0001, 123456.75, -0.5]|tojson",
            "[1e+16, 1000000000000000.0, 1.5e-07, 0.0001, 123456.75, -0.5]",
        ),
        ("{}|tojson(indent=2)", "{}"),
        (
            r#"{"b": [1], "a": {}}|tojson(indent=2, sort_keys=true)"#,
            "{\n  \"a\": {},\n  \"b\": [\n    1\n  ]\n}",
        ),
        (r#"{"b": [1, 2]}|tojson(separators=[",", ":"])"#, r#"{"b":[1,2]}"#),
        (r#"{1: "x"}|tojson"#, r#"{"1": "x"}"#),
    ];
    for (expression, expected) in table {
        assert_eq!(render(&format!("{{{{ {expression} }}}}")).unwrap(), expected, "{expression}");
    }
}

#[test]
fn tojson_refuses_arguments_it_does_not_know() {
    assert!(render("{{ 1|tojson(compact=true) }}").is_err());
}

#[test]
fn blocks_leave_no_lines_and_no_indentation() {
    let source = "a\n  {% if true %}\n  b\n  {% endif %}\nc\n";
    assert_eq!(render(source).unwrap(), "a\n  b\nc");
}

#[test]
fn python_methods_work_and_special_tokens_are_known() {
    let files = ModelFiles {
        tokenizer_config_json: Some(
            br#"{"bos_token": "<B>", "eos_token": {"content": "<E>"}, "chat_template": "{{ bos_token + ' x '.strip() + eos_token }}"}"#.to_vec(),
        ),
        ..ModelFiles::default()
    };
    let template = Template::load(&files).unwrap().unwrap();
    assert_eq!(template.render(Conversation::default()).unwrap(), "<B>x<E>");
}

#[test]
fn the_default_of_several_templates_is_taken() {
    let list = |name: &str| {
        let json = format!(
            r#"{{"chat_template": [{{"name": "rag", "template": "r"}}, {{"name": "{name}", "template": "d"}}]}}"#
        );
        Template::load(&ModelFiles {
            tokenizer_config_json: Some(json.into_bytes()),
            ..ModelFiles::default()
        })
    };
    assert_eq!(list("default").unwrap().unwrap().render(Conversation::default()).unwrap(), "d");
    let refused = list("tools").unwrap_err().to_string();
    assert!(refused.contains("tokenizer_config.json") && refused.contains("default"), "{refused}");
}

#[test]
fn the_file_of_its_own_wins_over_the_configuration() {
    let files = ModelFiles {
        tokenizer_config_json: Some(br#"{"chat_template": "old"}"#.to_vec()),
        chat_template: Some("new".to_owned()),
        ..ModelFiles::default()
    };
    assert_eq!(Template::load(&files).unwrap().unwrap().render(Conversation::default()).unwrap(), "new");
}

#[test]
fn a_raised_exception_is_told_in_its_own_words() {
    assert_eq!(render("{{ raise_exception('no images please') }}"), Err("no images please".to_owned()));
}

#[test]
fn a_template_that_does_not_parse_stops_the_start() {
    let files = ModelFiles { chat_template: Some("{% if %}".to_owned()), ..ModelFiles::default() };
    match Template::load(&files) {
        Err(Error::File { file: "chat_template.jinja", .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn dates_are_written_as_c_does() {
    // 2024-02-29 is day 60 of a leap year, a Thursday.
    let table = [
        (1_709_210_096, "%Y-%m-%d %H:%M:%S %j", "2024-02-29 12:34:56 060"),
        (1_709_210_096, "%A %a %d %B %b %y %I %p", "Thursday Thu 29 February Feb 24 12 PM"),
        (0, "%F %T %-d %-m %e %%", "1970-01-01 00:00:00 1 1  1 %"),
        (4_107_542_399, "%F %T", "2100-02-28 23:59:59"),
        (4_107_542_400, "%F %A", "2100-03-01 Monday"),
    ];
    for (seconds, format, expected) in table {
        assert_eq!(strftime(format, seconds).unwrap(), expected);
    }
    assert!(strftime("%Q", 0).is_err() && strftime("100%", 0).is_err());
}

#[test]
fn tool_calls_are_numbered_for_a_template_that_numbers_them() {
    let source = "{% set regen_tool_call_ids = regen_tool_call_ids | default(true) %}{{ regen_tool_call_ids }}\
        {% for m in messages %}{% for c in m.tool_calls %}<{{ c.id }}>{% endfor %}{{ m.tool_call_id }}{% endfor %}{{ documents | default([], true) | length }}";
    let files = ModelFiles { chat_template: Some(source.to_owned()), ..ModelFiles::default() };
    let template = Template::load(&files).unwrap().unwrap();
    let call = |id: &str| v1::ToolCall { id: id.to_owned(), name: "f".to_owned(), arguments: String::new() };
    let called = v1::ChatMessage {
        role: "assistant".to_owned(),
        tool_calls: vec![call("a"), call("b")],
        ..v1::ChatMessage::default()
    };
    let answered = v1::ChatMessage {
        role: "tool".to_owned(),
        tool_call_id: "b".to_owned(),
        content: "x".to_owned(),
        ..v1::ChatMessage::default()
    };
    let chat = |documents: &[&str], arguments: &str| {
        Chat::try_from(v1::ChatPrompt {
            messages: vec![called.clone(), answered.clone()],
            documents: documents.iter().map(|&text| text.to_owned()).collect(),
            template_arguments: arguments.to_owned(),
            ..v1::ChatPrompt::default()
        })
        .unwrap()
    };
    assert_eq!(template.render_chat(&chat(&["{}"], "")).unwrap(), "false<1><2>21");
    assert_eq!(template.render_chat(&chat(&[], "")).unwrap(), "false<0><1>10");
    let own = template.render_chat(&chat(&[], "{\"regen_tool_call_ids\": true}")).unwrap();
    assert_eq!(own, "true<a><b>b0");
}

//! The request of `/v1/chat/completions`.

use std::collections::BTreeMap;

use proto::v1;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::fields::Fields;
use super::generation::Common;
use crate::text::Text;

const TOP_LOGPROBS_MAX: u32 = 20;
const WITHOUT_EFFECT: [(&str, &str); 4] = [
    ("best_of", "1"),
    ("add_generation_prompt", "true"),
    ("continue_final_message", "false"),
    ("modalities", "[\"text\"]"),
];

/// A message as callers send it. Fields without a value come with messages that are sent back as they were got.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct InMessage {
    role: String,
    content: Option<Content>,
    #[serde(alias = "reasoning_content")]
    reasoning: Option<String>,
    tool_calls: Option<Vec<InCall>>,
    tool_call_id: Option<String>,
    #[serde(rename = "refusal")]
    _refusal: Option<()>,
    #[serde(rename = "annotations")]
    _annotations: Option<()>,
    #[serde(rename = "audio")]
    _audio: Option<()>,
    #[serde(rename = "function_call")]
    _function_call: Option<()>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "content must be a text or a list of parts {\"type\": \"text\", \"text\": …}")]
enum Content {
    Text(String),
    Parts(Vec<TextPart>),
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
enum TextPart {
    Text { text: String },
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct InCall {
    id: String,
    #[serde(rename = "type")]
    _kind: Option<Function>,
    #[serde(rename = "index")]
    _index: Option<u32>,
    function: InFunction,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Function {
    Function,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct InFunction {
    name: String,
    arguments: String,
}

/// Takes the fields of a chat completion. Its answer is taken apart unless the caller wants the markers.
pub(super) fn take(fields: &mut Fields, text: Option<&Text>) -> Common {
    let mut common = Common::take(fields);
    let chat = take_prompt(fields, text);
    common.request.prompt = Some(v1::generate_request::Prompt::Chat(chat));
    let response = common.request.response.get_or_insert_default();
    response.parse = !response.keep_special_tokens;
    let wanted: bool = fields.take("logprobs").unwrap_or(false);
    let top: Option<u32> = fields.take("top_logprobs");
    if let Some(top) = top.filter(|&top| top > TOP_LOGPROBS_MAX) {
        fields.refuse("top_logprobs", format!("must be at most {TOP_LOGPROBS_MAX}, not {top}"));
    }
    if !wanted && top.is_some_and(|top| top > 0) {
        fields.refuse("top_logprobs", "needs logprobs; set it to true");
    }
    response.logprobs = wanted.then_some(top.unwrap_or(0));
    common.logprobs = wanted;
    common
}

/// Takes what the template renders; also that of `/tokenize`.
pub(super) fn take_prompt(fields: &mut Fields, text: Option<&Text>) -> v1::ChatPrompt {
    let messages: Vec<Box<RawValue>> = fields.take("messages").unwrap_or_default();
    let messages = messages.iter().enumerate().filter_map(|(index, raw)| read_message(fields, index, raw));
    let messages: Vec<v1::ChatMessage> = messages.collect();
    let mut chat = v1::ChatPrompt {
        messages,
        reasoning: None,
        tools: take_definitions(fields),
        documents: texts(fields.take("documents")),
        template_arguments: fields.raw("chat_template_kwargs").unwrap_or_default(),
        tool_choice: take_choice(fields),
        parallel_tool_calls: fields.take("parallel_tool_calls"),
        strict_tools: false,
    };
    if let Some(effort) = fields.take::<String>("reasoning_effort") {
        apply_effort(fields, text, &effort, &mut chat);
    }
    fields.without_effect(&WITHOUT_EFFECT);
    chat
}

fn read_message(fields: &mut Fields, index: usize, raw: &RawValue) -> Option<v1::ChatMessage> {
    let message: InMessage = match serde_json::from_str(raw.get()) {
        Ok(message) => message,
        Err(error) => {
            let text = error.to_string();
            fields.refuse(format!("messages[{index}]"), text.split(" at line ").next().unwrap_or_default());
            return None;
        }
    };
    let content = match message.content {
        None => String::new(),
        Some(Content::Text(text)) => text,
        Some(Content::Parts(parts)) => parts.into_iter().map(|TextPart::Text { text }| text).collect(),
    };
    let call = |call: InCall| v1::ToolCall {
        id: call.id,
        name: call.function.name,
        arguments: call.function.arguments,
    };
    Some(v1::ChatMessage {
        role: message.role,
        content,
        reasoning: message.reasoning.unwrap_or_default(),
        tool_calls: message.tool_calls.unwrap_or_default().into_iter().map(call).collect(),
        tool_call_id: message.tool_call_id.unwrap_or_default(),
        results: Vec::new(),
    })
}

/// The definitions of tools.
pub(super) fn take_definitions(fields: &mut Fields) -> Vec<String> {
    let tools = texts(fields.take("tools"));
    for (index, tool) in tools.iter().enumerate() {
        let value: Value = serde_json::from_str(tool).unwrap_or_default();
        let named = value["function"]["name"].as_str().is_some_and(|name| !name.is_empty());
        if value["type"] != "function" || !named {
            let reason = "must be {\"type\": \"function\", \"function\": {\"name\": …}}";
            fields.refuse(format!("tools[{index}]"), reason);
        }
    }
    tools
}

#[derive(Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "must be auto, none, required or {\"type\": \"function\", \"function\": {\"name\": …}}"
)]
enum Choice {
    Mode(Mode),
    Tool {
        #[serde(rename = "type")]
        _kind: Function,
        function: Chosen,
    },
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    Auto,
    None,
    Required,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Chosen {
    name: String,
}

fn take_choice(fields: &mut Fields) -> Option<v1::ToolChoice> {
    use v1::tool_choice::{Choice as Wire, Mode as WireMode};
    let choice = match fields.take::<Choice>("tool_choice")? {
        Choice::Mode(Mode::Auto) => Wire::Mode(WireMode::Auto.into()),
        Choice::Mode(Mode::None) => Wire::Mode(WireMode::None.into()),
        Choice::Mode(Mode::Required) => Wire::Mode(WireMode::Required.into()),
        Choice::Tool { function, .. } => Wire::Name(function.name),
    };
    Some(v1::ToolChoice { choice: Some(choice) })
}

/// `none` is an answer without reasoning; every other effort is one with it. A template that knows efforts is told.
fn apply_effort(fields: &mut Fields, text: Option<&Text>, effort: &str, chat: &mut v1::ChatPrompt) {
    const EFFORTS: [&str; 6] = ["none", "minimal", "low", "medium", "high", "xhigh"];
    if !EFFORTS.contains(&effort) {
        return fields.refuse("reasoning_effort", format!("must be one of {}", EFFORTS.join(", ")));
    }
    let reads = |name| text.is_some_and(|text| text.template_reads(name));
    if !reads("reasoning_effort") {
        // A template that knows neither refuses `reasoning` by its name.
        chat.reasoning = Some(effort != "none");
        return;
    }
    chat.reasoning = reads("reasoning").then_some(effort != "none");
    let json = if chat.template_arguments.is_empty() { "{}" } else { &chat.template_arguments };
    // What is no object is refused with the template's arguments.
    let Ok(mut arguments) = serde_json::from_str::<BTreeMap<String, Value>>(json) else { return };
    arguments.insert("reasoning_effort".to_owned(), effort.into());
    chat.template_arguments = serde_json::to_string(&arguments).unwrap_or_default();
}

/// JSON texts as they were written: the model sees the order of their keys.
fn texts(list: Option<Vec<Box<RawValue>>>) -> Vec<String> {
    list.unwrap_or_default().iter().map(|raw| raw.get().to_owned()).collect()
}

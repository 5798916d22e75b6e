//! The request of `/v2/chat` as one of ours. Every field works or is refused by its name.

use proto::v1;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use super::super::chat::take_definitions;
use super::super::fields::Fields;
use super::message::{self, Citable};
use crate::text::Text;

/// As Cohere's API has them.
const TEMPERATURE_DEFAULT: f32 = 0.3;
const P_DEFAULT: f32 = 0.75;
/// A request in our terms.
pub(super) struct Asked {
    pub(super) request: v1::GenerateRequest,
    pub(super) stream: bool,
    pub(super) show: Show,
}

/// What is shown of the answer, and how.
#[derive(Debug, Clone)]
pub(super) struct Show {
    pub(super) thoughts: Thoughts,
    pub(super) citable: Citable,
    pub(super) citations: Citations,
    pub(super) logprobs: bool,
}

/// What thoughts before an answer are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Thoughts {
    /// Content of the message.
    Content,
    /// The plan of a model that was offered tools and does not reason otherwise.
    Plan,
}

/// Whether citations are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Citations {
    Shown,
    Dropped,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CitationOptions {
    mode: Option<CitationMode>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum CitationMode {
    Enabled,
    Fast,
    Accurate,
    Disabled,
    Off,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Thinking {
    #[serde(rename = "type")]
    kind: ThinkingKind,
    token_budget: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ThinkingKind {
    Enabled,
    Disabled,
}

/// Takes all fields.
pub(super) fn take(fields: &mut Fields, text: Option<&Text>) -> Asked {
    let stream = fields.take("stream").unwrap_or(false);
    let logprobs = fields.take("logprobs").unwrap_or(false);
    let thinking = fields.take::<Thinking>("thinking");
    let thinking_tokens_max = thinking.as_ref().and_then(|thinking| thinking.token_budget);
    let (chat, mut show) = take_chat(fields, thinking.map(|thinking| thinking.kind), text);
    show.logprobs = logprobs;
    let sampling = v1::Sampling {
        temperature: Some(fields.take("temperature").unwrap_or(TEMPERATURE_DEFAULT)),
        top_k: fields.take("k"),
        top_p: Some(fields.take("p").unwrap_or(P_DEFAULT)),
        seed: fields.take::<i64>("seed").map(i64::cast_unsigned),
        frequency_penalty: fields.take("frequency_penalty"),
        presence_penalty: fields.take("presence_penalty"),
        ..v1::Sampling::default()
    };
    let stopping = v1::Stopping {
        max_tokens: fields.take("max_tokens"),
        stop: fields.take("stop_sequences").unwrap_or_default(),
        thinking_tokens_max,
        ..v1::Stopping::default()
    };
    let response = v1::Response { logprobs: logprobs.then_some(0), parse: true, ..v1::Response::default() };
    let request = v1::GenerateRequest {
        model: fields.take("model").unwrap_or_default(),
        priority: fields.take("priority").unwrap_or_default(),
        prompt: Some(v1::generate_request::Prompt::Chat(chat)),
        sampling: Some(sampling),
        stopping: Some(stopping),
        response: Some(response),
        constraint: fields.take::<ResponseFormat>("response_format").and_then(ResponseFormat::constraint),
        ..v1::GenerateRequest::default()
    };
    Asked { request, stream, show }
}

/// Takes what the template renders.
fn take_chat(
    fields: &mut Fields,
    thinking: Option<ThinkingKind>,
    text: Option<&Text>,
) -> (v1::ChatPrompt, Show) {
    let mut citable = Citable::default();
    let documents: Vec<Box<RawValue>> = fields.take("documents").unwrap_or_default();
    for (index, raw) in documents.iter().enumerate() {
        match message::document(raw) {
            Ok(document) => citable.documents.push(document),
            Err(why) => fields.refuse(format!("documents[{index}]"), why),
        }
    }
    let messages: Vec<Box<RawValue>> = fields.take("messages").unwrap_or_default();
    let mut chat = v1::ChatPrompt {
        documents: citable.documents.iter().map(|document| document.data.clone()).collect(),
        ..v1::ChatPrompt::default()
    };
    for (index, raw) in messages.iter().enumerate() {
        match message::read(raw, &mut citable) {
            Ok(message) => chat.messages.push(message),
            Err(why) => fields.refuse(format!("messages[{index}]"), why),
        }
    }
    chat.tools = take_definitions(fields);
    chat.tool_choice = take_choice(fields);
    chat.strict_tools = fields.take("strict_tools").unwrap_or(false);
    let reads = |name: &str| text.is_some_and(|text| text.template_reads(name));
    let mut arguments = Map::new();
    chat.reasoning = thinking.map(|kind| kind == ThinkingKind::Enabled);
    let thoughts = match chat.reasoning {
        Some(true) => Thoughts::Content,
        None if reads("reasoning") || chat.tools.is_empty() => Thoughts::Content,
        Some(false) if chat.tools.is_empty() => Thoughts::Content,
        Some(false) | None => Thoughts::Plan,
    };
    let citations = take_citations(fields, &reads, &chat, &mut arguments);
    take_safety(fields, &reads, &mut arguments);
    if !arguments.is_empty() {
        chat.template_arguments = Value::Object(arguments).to_string();
    }
    (chat, Show { thoughts, citable, citations, logprobs: false })
}

/// Cohere's API has no tool named by its caller, and leaves the choice to the model by saying nothing.
fn take_choice(fields: &mut Fields) -> Option<v1::ToolChoice> {
    use v1::tool_choice::{Choice, Mode};
    let mode = match fields.take::<String>("tool_choice")?.as_str() {
        "NONE" => Mode::None,
        "REQUIRED" => Mode::Required,
        other => {
            fields.refuse("tool_choice", format!("must be NONE or REQUIRED, not `{other}`"));
            return None;
        }
    };
    Some(v1::ToolChoice { choice: Some(Choice::Mode(mode.into())) })
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum ResponseFormat {
    Text {},
    JsonObject {
        #[serde(alias = "schema")]
        json_schema: Option<Box<RawValue>>,
    },
}

impl ResponseFormat {
    fn constraint(self) -> Option<v1::Constraint> {
        use v1::constraint::Form;
        let form = match self {
            Self::Text {} => return None,
            Self::JsonObject { json_schema: None } => Form::JsonObject(true),
            Self::JsonObject { json_schema: Some(schema) } => Form::Json(schema.get().to_owned()),
        };
        Some(v1::Constraint { form: Some(form) })
    }
}

/// A model is told to cite when its template knows how and there is something to cite.
fn take_citations(
    fields: &mut Fields,
    reads: &impl Fn(&str) -> bool,
    chat: &v1::ChatPrompt,
    arguments: &mut Map<String, Value>,
) -> Citations {
    let mode = fields.take::<CitationOptions>("citation_options").and_then(|options| options.mode);
    let off = matches!(mode, Some(CitationMode::Disabled | CitationMode::Off));
    if off {
        if reads("grounding") {
            arguments.insert("grounding".to_owned(), json!("disabled"));
        }
        return Citations::Dropped;
    }
    // A template that was asked for by name and does not know how refuses it.
    let something = !chat.documents.is_empty() || !chat.tools.is_empty();
    if mode.is_some() || (something && reads("grounding")) {
        arguments.insert("grounding".to_owned(), json!("enabled"));
    }
    Citations::Shown
}

/// Safety instructions are the template's; one without them has none to leave out.
fn take_safety(fields: &mut Fields, reads: &impl Fn(&str) -> bool, arguments: &mut Map<String, Value>) {
    const MODES: [&str; 3] = ["CONTEXTUAL", "STRICT", "OFF"];
    let Some(mode) = fields.take::<String>("safety_mode") else { return };
    if !MODES.contains(&mode.as_str()) {
        return fields.refuse("safety_mode", format!("must be one of {}", MODES.join(", ")));
    }
    if mode != "OFF" || reads("safety_mode") {
        arguments.insert("safety_mode".to_owned(), json!(mode.to_lowercase()));
    }
}

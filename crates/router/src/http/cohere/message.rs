//! Messages and documents of a Cohere chat as ours, with what citations will refer to.

use proto::v1;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::super::fields::Fields;

/// A piece of a message's content. JSON keeps its text: the model sees the order of its keys.
enum Part {
    Text(String),
    Thinking(String),
    Document(Document),
}

/// A document of the request or of a tool's result.
#[derive(Debug, Clone)]
pub(super) struct Document {
    pub(super) id: Option<String>,
    /// A JSON object.
    pub(super) data: String,
}

/// What citations name by numbers: first the documents, then the results of each tool call of the conversation.
#[derive(Debug, Clone, Default)]
pub(super) struct Citable {
    pub(super) documents: Vec<Document>,
    /// The id of each call and its results.
    calls: Vec<(String, Vec<Document>)>,
}

impl Citable {
    /// The source with these numbers, as Cohere writes it; `None` when there is none.
    pub(super) fn source(&self, call: u32, result: u32) -> Option<Value> {
        let (call, result) = (call as usize, result as usize);
        let before = usize::from(!self.documents.is_empty());
        let data = |document: &Document| serde_json::from_str::<Value>(&document.data).unwrap_or_default();
        if call < before {
            let document = self.documents.get(result)?;
            let id = document.id.clone().unwrap_or_else(|| format!("doc:{result}"));
            let mut shown = data(document);
            shown["id"] = json!(id);
            return Some(json!({ "type": "document", "id": id, "document": shown }));
        }
        let (of, results) = self.calls.get(call - before)?;
        let document = results.get(result)?;
        let id = document.id.clone().unwrap_or_else(|| format!("{of}:{result}"));
        Some(json!({ "type": "tool", "id": id, "tool_output": data(document) }))
    }

    /// The numbers of the source with this id.
    fn numbers(&self, id: &str) -> Option<(usize, usize)> {
        let before = usize::from(!self.documents.is_empty());
        let named = |document: &Document, other: String| document.id.as_deref().unwrap_or(&other) == id;
        let document = self.documents.iter().enumerate().find(|(at, d)| named(d, format!("doc:{at}")));
        if let Some((at, _)) = document {
            return Some((0, at));
        }
        self.calls.iter().enumerate().find_map(|(call, (of, results))| {
            let result = results.iter().enumerate().find(|(at, d)| named(d, format!("{of}:{at}")));
            result.map(|(at, _)| (call + before, at))
        })
    }
}

/// A document: a text, or `{"data": …, "id": …}`.
pub(super) fn document(raw: &RawValue) -> Result<Document, String> {
    if let Ok(text) = serde_json::from_str::<String>(raw.get()) {
        return Ok(Document { id: None, data: json!({ "content": text }).to_string() });
    }
    let mut fields = Fields::within(raw)?;
    let id = fields.take("id");
    let data = match fields.raw("data") {
        Some(data) if data.trim_start().starts_with('{') => data,
        Some(data) => match serde_json::from_str::<String>(&data) {
            Ok(text) => json!({ "content": text }).to_string(),
            Err(_) => return Err("data must be an object".to_owned()),
        },
        None => return Err("must be a text or have data".to_owned()),
    };
    fields.faults().map(|()| Document { id, data })
}

/// Reads a message and adds what it brings to cite.
pub(super) fn read(raw: &RawValue, citable: &mut Citable) -> Result<v1::ChatMessage, String> {
    let mut fields = Fields::within(raw)?;
    let role: String = fields.take("role").unwrap_or_default();
    let mut message = v1::ChatMessage { role: role.clone(), ..v1::ChatMessage::default() };
    let content = fields.raw("content");
    let parts = content.map(|content| read_parts(&content)).transpose()?;
    match role.as_str() {
        "user" | "system" => match texts(parts.unwrap_or_default())? {
            (content, thinking) if thinking.is_empty() => message.content = content,
            _ => return Err(format!("content has thinking, and this one's role is {role}")),
        },
        "assistant" => {
            let (content, thinking) = texts(parts.unwrap_or_default())?;
            message.content = content;
            let plan: Option<String> = fields.take("tool_plan");
            message.reasoning = [thinking, plan.unwrap_or_default()].concat();
            let calls: Vec<Box<RawValue>> = fields.take("tool_calls").unwrap_or_default();
            for call in &calls {
                let call = read_call(call)?;
                citable.calls.push((call.id.clone(), Vec::new()));
                message.tool_calls.push(call);
            }
            let cited: Vec<Box<RawValue>> = fields.take("citations").unwrap_or_default();
            cite(&mut message, &cited, citable)?;
        }
        "tool" => {
            message.tool_call_id = fields.take("tool_call_id").unwrap_or_default();
            let results = read_results(parts.unwrap_or_default(), &mut message);
            let own = citable.calls.iter_mut().find(|(id, _)| *id == message.tool_call_id);
            if let Some((_, known)) = own {
                known.extend(results?);
            } else {
                results?;
            }
        }
        other => return Err(format!("role must be user, assistant, system or tool, not `{other}`")),
    }
    fields.faults().map(|()| message)
}

/// A result that is one text stays a text; several, and documents, can be cited one by one.
fn read_results(parts: Vec<Part>, message: &mut v1::ChatMessage) -> Result<Vec<Document>, String> {
    let text = |text: &str| Document { id: None, data: json!({ "content": text }).to_string() };
    if let [Part::Text(only)] = parts.as_slice() {
        message.content.clone_from(only);
        let object = serde_json::from_str::<Value>(only).is_ok_and(|value| value.is_object());
        return Ok(vec![if object { Document { id: None, data: only.clone() } } else { text(only) }]);
    }
    let mut results = Vec::with_capacity(parts.len());
    for part in parts {
        results.push(match part {
            Part::Text(own) => text(&own),
            Part::Document(document) => document,
            Part::Thinking(_) => {
                return Err("content of a tool has parts of type text and document".to_owned());
            }
        });
    }
    message.results = results.iter().map(|result| result.data.clone()).collect();
    Ok(results)
}

fn texts(parts: Vec<Part>) -> Result<(String, String), String> {
    let (mut text, mut thinking) = (String::new(), String::new());
    for part in parts {
        match part {
            Part::Text(more) => text.push_str(&more),
            Part::Thinking(more) => thinking.push_str(&more),
            Part::Document(_) => {
                return Err("content has a document, which only results of tools have".to_owned());
            }
        }
    }
    Ok((text, thinking))
}

fn read_parts(content: &str) -> Result<Vec<Part>, String> {
    if let Ok(text) = serde_json::from_str::<String>(content) {
        return Ok(vec![Part::Text(text)]);
    }
    let list: Vec<Box<RawValue>> =
        serde_json::from_str(content).map_err(|_| "content must be a text or a list of parts".to_owned())?;
    list.iter()
        .enumerate()
        .map(|(at, raw)| read_part(raw).map_err(|why| format!("content[{at}]: {why}")))
        .collect()
}

fn read_part(raw: &RawValue) -> Result<Part, String> {
    let mut fields = Fields::within(raw)?;
    let kind: String = fields.take("type").unwrap_or_default();
    let part = match kind.as_str() {
        "text" => Part::Text(needed(&mut fields, "text")?),
        "thinking" => Part::Thinking(needed(&mut fields, "thinking")?),
        "document" => {
            let own = fields.raw("document").ok_or("a part of type document has a document")?;
            let own: Box<RawValue> = serde_json::from_str(&own).map_err(|error| error.to_string())?;
            Part::Document(document(&own)?)
        }
        other => return Err(format!("type `{other}` is not supported; use text, thinking or document")),
    };
    fields.faults().map(|()| part)
}

fn needed(fields: &mut Fields, name: &'static str) -> Result<String, String> {
    fields.take(name).ok_or_else(|| format!("{name} must be a text"))
}

fn read_call(raw: &RawValue) -> Result<v1::ToolCall, String> {
    let mut fields = Fields::within(raw)?;
    let id = fields.take("id").unwrap_or_default();
    fields.without_effect(&[("type", "\"function\"")]);
    let function = fields.raw("function").ok_or("a tool call has a function")?;
    fields.faults()?;
    let function: Box<RawValue> = serde_json::from_str(&function).map_err(|error| error.to_string())?;
    let mut fields = Fields::within(&function)?;
    let name = needed(&mut fields, "name")?;
    let arguments = needed(&mut fields, "arguments")?;
    fields.faults().map(|()| v1::ToolCall { id, name, arguments })
}

/// Writes citations of an earlier answer into its text again, as the model wrote them.
fn cite(message: &mut v1::ChatMessage, cited: &[Box<RawValue>], citable: &Citable) -> Result<(), String> {
    let mut spans = Vec::new();
    for (at, raw) in cited.iter().enumerate() {
        let value: Value = serde_json::from_str(raw.get()).map_err(|error| error.to_string())?;
        let number = |name: &str| value[name].as_u64().and_then(|n| usize::try_from(n).ok());
        let (Some(start), Some(end)) = (number("start"), number("end")) else {
            return Err(format!("citations[{at}] must have start and end"));
        };
        let ids =
            value["sources"].as_array().into_iter().flatten().filter_map(|source| source["id"].as_str());
        let sources = ids.map(|id| citable.numbers(id)).collect::<Option<Vec<(usize, usize)>>>();
        let Some(sources) = sources.filter(|sources| !sources.is_empty()) else {
            return Err(format!(
                "citations[{at}].sources must name documents or results of this conversation"
            ));
        };
        // Those of thoughts and plans are not part of the text.
        if value["type"].as_str().is_none_or(|kind| kind == "TEXT_CONTENT") {
            spans.push((start, end, sources));
        }
    }
    spans.sort_by_key(|span| std::cmp::Reverse(span.0));
    let offsets: Vec<usize> =
        message.content.char_indices().map(|(byte, _)| byte).chain([message.content.len()]).collect();
    let mut limit = usize::MAX;
    // From the last to the first, so that earlier positions stay right.
    for (start, end, sources) in spans {
        let (Some(&from), Some(&to)) = (offsets.get(start), offsets.get(end)) else {
            return Err(format!("a citation goes from {start} to {end}, beyond the text"));
        };
        if start > end || end > limit {
            return Err(format!("the citation from {start} to {end} overlaps another one"));
        }
        limit = start;
        message.content.insert_str(to, &format!("</co: {}>", written(&sources)));
        message.content.insert_str(from, "<co>");
    }
    Ok(())
}

/// `0:[1,2],1:[0]`.
fn written(sources: &[(usize, usize)]) -> String {
    let mut calls: Vec<(usize, Vec<String>)> = Vec::new();
    for &(call, result) in sources {
        match calls.iter_mut().find(|(of, _)| *of == call) {
            Some((_, results)) => results.push(result.to_string()),
            None => calls.push((call, vec![result.to_string()])),
        }
    }
    let calls: Vec<String> =
        calls.into_iter().map(|(call, results)| format!("{call}:[{}]", results.join(","))).collect();
    calls.join(",")
}

//! A checkpoint's chat template, run as transformers would run it.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Object, Value, ValueKind};
use minijinja::{Environment, ErrorKind};
use proto::{Chat, Failure, Message, Violation, v1};

use super::reads::read_before_set;
use super::{strftime, to_python_json};
use crate::{Error, ModelFiles};

const NAME: &str = "chat";
/// Cohere's templates number tool calls unless this says that they are numbered. They count injected documents as a call
/// before all others where a call is written, and forget it where its results are.
const RENUMBERS: &str = "regen_tool_call_ids";
/// Variables that template arguments cannot set.
const OF_FIELDS: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];

/// What a template renders.
#[derive(Debug, Clone, Default)]
pub struct Conversation {
    /// A list of maps, each with `role`, `content` and what else the template reads.
    pub messages: Value,
    /// A list of tool definitions, or nothing.
    pub tools: Option<Value>,
    /// A list of documents, or nothing.
    pub documents: Option<Value>,
    /// Whether the model may think first; `None` leaves it to the template.
    pub reasoning: Option<bool>,
    /// Further variables by name.
    pub arguments: BTreeMap<String, Value>,
}

impl TryFrom<&Chat> for Conversation {
    type Error = Violation;

    /// # Errors
    /// A violation that names the part which is not a JSON object.
    fn try_from(chat: &Chat) -> Result<Self, Violation> {
        let messages = chat.messages.iter().enumerate().map(|(index, m)| message(index, m));
        let arguments = match &chat.template_arguments {
            None => BTreeMap::new(),
            Some(json) => serde_json::from_str(json).map_err(|error| {
                Violation::new("chat.template_arguments", format!("must be a JSON object: {error}"))
            })?,
        };
        Ok(Self {
            messages: messages.collect::<Result<Value, Violation>>()?,
            tools: objects("chat.tools", &chat.tools)?,
            documents: objects("chat.documents", &chat.documents)?,
            reasoning: chat.reasoning,
            arguments,
        })
    }
}

/// A message in the form transformers gives to templates. Keys that do not apply are left out, and the arguments of a
/// call are an object.
fn message(index: usize, message: &Message) -> Result<Value, Violation> {
    let mut map = BTreeMap::from([
        ("role", Value::from(message.role.name())),
        ("content", Value::from(message.content.as_str())),
    ]);
    if !message.reasoning.is_empty() {
        // Templates differ in the name they read.
        for name in ["reasoning", "reasoning_content"] {
            map.insert(name, Value::from(message.reasoning.as_str()));
        }
    }
    if !message.results.is_empty() {
        let document = |(at, json): (usize, &String)| {
            let data = object(|| format!("chat.messages[{index}].results[{at}]"), json)?;
            let document = Value::from_pairs([("data", data)]);
            Ok(Value::from_pairs([("type", Value::from("document")), ("document", document)]))
        };
        let documents = message.results.iter().enumerate().map(document);
        map.insert("content", documents.collect::<Result<Value, Violation>>()?);
    }
    if let Some(id) = &message.tool_call_id {
        map.insert("tool_call_id", Value::from(id.as_str()));
    }
    if !message.tool_calls.is_empty() {
        let call = |(at, call): (usize, &v1::ToolCall)| {
            let field = || format!("chat.messages[{index}].tool_calls[{at}].arguments");
            let arguments = match call.arguments.trim() {
                "" => "{}",
                text => text,
            };
            let function =
                [("name", Value::from(call.name.as_str())), ("arguments", object(field, arguments)?)];
            Ok(Value::from_pairs([
                ("id", Value::from(call.id.as_str())),
                ("type", Value::from("function")),
                ("function", Value::from_pairs(function)),
            ]))
        };
        let calls = message.tool_calls.iter().enumerate().map(call);
        map.insert("tool_calls", calls.collect::<Result<Value, Violation>>()?);
    }
    Ok(Value::from(map))
}

/// Names tool calls by their order in the conversation, from 1 when documents are the results of a call before them.
fn numbered(mut chat: Chat) -> Chat {
    let mut numbers: BTreeMap<String, String> = BTreeMap::new();
    let mut next = usize::from(!chat.documents.is_empty());
    for message in &mut chat.messages {
        for call in &mut message.tool_calls {
            let id = std::mem::replace(&mut call.id, next.to_string());
            numbers.entry(id).or_insert_with(|| next.to_string());
            next += 1;
        }
        if let Some(number) = message.tool_call_id.as_ref().and_then(|id| numbers.get(id)) {
            message.tool_call_id = Some(number.clone());
        }
    }
    chat
}

fn objects(field: &str, texts: &[String]) -> Result<Option<Value>, Violation> {
    let read = |(index, text): (usize, &String)| object(|| format!("{field}[{index}]"), text);
    match texts {
        [] => Ok(None),
        texts => texts.iter().enumerate().map(read).collect::<Result<Value, Violation>>().map(Some),
    }
}

/// A JSON object whose keys keep their order, which the model was trained to see.
fn object(field: impl Fn() -> String, json: &str) -> Result<Value, Violation> {
    let value: Value = serde_json::from_str(json)
        .map_err(|error| Violation::new(field(), format!("must be a JSON object: {error}")))?;
    match value.kind() {
        ValueKind::Map => Ok(value),
        kind => Err(Violation::new(field(), format!("must be a JSON object, not a {kind}"))),
    }
}

/// A compiled chat template.
pub struct Template {
    environment: Environment<'static>,
    special_tokens: Arc<BTreeMap<String, Value>>,
    /// Names the template takes from outside.
    reads: HashSet<String>,
}

impl Template {
    /// The checkpoint's template: `chat_template.jinja`, or `chat_template` in `tokenizer_config.json` (a text, or a
    /// list of named ones with one called `default`); `None` when it has neither.
    ///
    /// # Errors
    /// [`Error::File`] for a configuration that is not JSON of that shape, or a template that does not parse.
    pub fn load(files: &ModelFiles) -> Result<Option<Self>, Error> {
        let config = match &files.tokenizer_config_json {
            Some(json) => serde_json::from_slice(json).map_err(|error| in_config(error.to_string()))?,
            None => serde_json::Value::Null,
        };
        let (file, source) = match &files.chat_template {
            Some(source) => ("chat_template.jinja", source.clone()),
            None => match template_in(&config)? {
                Some(source) => ("tokenizer_config.json", source),
                None => return Ok(None),
            },
        };
        let mut reads = read_before_set(&source);
        let mut environment = environment();
        environment
            .add_template_owned(NAME, source)
            .map_err(|error| Error::File { file, reason: format!("chat template: {error:#}") })?;
        let template = environment.get_template(NAME);
        reads.extend(template.map(|template| template.undeclared_variables(false)).unwrap_or_default());
        Ok(Some(Self { environment, special_tokens: Arc::new(special_tokens(&config)), reads }))
    }

    /// Names each part of a chat that the template never looks at: refused, so that nothing is silently left out.
    ///
    /// # Errors
    /// One violation for each.
    pub fn check_reads(&self, conversation: &Conversation) -> Result<(), Vec<Violation>> {
        let given = [
            ("tools", conversation.tools.is_some()),
            ("documents", conversation.documents.is_some()),
            ("reasoning", conversation.reasoning.is_some()),
        ];
        let unread = |name: &str| !self.reads(name);
        let reason =
            |name: &str| format!("the chat template of the served checkpoint does not read `{name}`");
        let mut wrong: Vec<Violation> = given
            .into_iter()
            .filter(|(name, given)| *given && unread(name))
            .map(|(name, _)| Violation::new(format!("chat.{name}"), reason(name)))
            .collect();
        for name in conversation.arguments.keys() {
            let field = || format!("chat.template_arguments.{name}");
            if OF_FIELDS.contains(&name.as_str()) {
                wrong.push(Violation::new(field(), "is set by a field of its own"));
            } else if unread(name) {
                wrong.push(Violation::new(field(), reason(name)));
            }
        }
        if wrong.is_empty() { Ok(()) } else { Err(wrong) }
    }

    /// Whether the template looks at the variable `name`.
    #[must_use]
    pub fn reads(&self, name: &str) -> bool {
        self.reads.contains(name)
    }

    /// Checks that the template reads all of a chat, and renders it. For a template that numbers tool calls they are
    /// numbered here.
    ///
    /// # Errors
    /// [`Failure::Invalid`] with what the template does not read or refuses.
    pub fn render_chat(&self, chat: &Chat) -> Result<String, Failure> {
        let mut conversation = Conversation::try_from(chat)?;
        if self.reads(RENUMBERS) && !conversation.arguments.contains_key(RENUMBERS) {
            conversation = Conversation::try_from(&numbered(chat.clone()))?;
            conversation.arguments.insert(RENUMBERS.to_owned(), Value::from(false));
        }
        self.check_reads(&conversation).map_err(Failure::Invalid)?;
        let refused = |why| Violation::new("chat", format!("the chat template refused it: {why}")).into();
        self.render(conversation).map_err(refused)
    }

    /// Renders a conversation, ending where the model is to go on.
    ///
    /// # Errors
    /// The template's own words when it raises, else what went wrong in it.
    pub fn render(&self, conversation: Conversation) -> Result<String, String> {
        let context =
            Value::from_object(Variables { conversation, special_tokens: Arc::clone(&self.special_tokens) });
        let template = self.environment.get_template(NAME).map_err(|error| error.to_string())?;
        template.render(context).map_err(|error| match (error.kind(), error.detail()) {
            (ErrorKind::InvalidOperation, Some(detail)) => detail.to_owned(),
            _ => error.to_string(),
        })
    }
}

/// What a template finds by name.
#[derive(Debug)]
struct Variables {
    conversation: Conversation,
    special_tokens: Arc<BTreeMap<String, Value>>,
}

impl Object for Variables {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let (name, of) = (key.as_str()?, &self.conversation);
        let or_nothing = |value: &Option<Value>| value.clone().unwrap_or(Value::from(()));
        let given = match name {
            "messages" => Some(of.messages.clone()),
            "tools" => Some(or_nothing(&of.tools)),
            "documents" => Some(or_nothing(&of.documents)),
            "add_generation_prompt" => Some(Value::from(true)),
            "reasoning" => of.reasoning.map(Value::from),
            _ => None,
        };
        given.or_else(|| self.special_tokens.get(name).cloned()).or_else(|| of.arguments.get(name).cloned())
    }
}

impl fmt::Debug for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Template").field("special_tokens", &self.special_tokens).finish_non_exhaustive()
    }
}

/// transformers' settings and helpers, in minijinja.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let mut syntax = SyntaxConfig::builder();
    syntax.trim_blocks(true).lstrip_blocks(true);
    if let Ok(syntax) = syntax.build() {
        environment.set_syntax(syntax);
    }
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", |value: Value, kwargs: Kwargs| to_python_json(&value, &kwargs));
    environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        strftime(&format, now).map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, error))
    });
    environment
}

fn template_in(config: &serde_json::Value) -> Result<Option<String>, Error> {
    use serde_json::Value as Json;
    match config.get("chat_template") {
        None | Some(Json::Null) => Ok(None),
        Some(Json::String(source)) => Ok(Some(source.clone())),
        Some(Json::Array(named)) => {
            let default = named.iter().find(|entry| entry["name"] == "default");
            match default.and_then(|entry| entry["template"].as_str()) {
                Some(source) => Ok(Some(source.to_owned())),
                None => {
                    Err(in_config("chat_template is a list without a template named `default`".to_owned()))
                }
            }
        }
        Some(_) => Err(in_config("chat_template must be a text or a list of {name, template}".to_owned())),
    }
}

/// Every `…_token` of the configuration, as the templates name them: a text, or a map with `content`.
fn special_tokens(config: &serde_json::Value) -> BTreeMap<String, Value> {
    let Some(fields) = config.as_object() else { return BTreeMap::new() };
    let tokens = fields.iter().filter(|(name, _)| name.ends_with("_token"));
    tokens
        .filter_map(|(name, value)| {
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            Some((name.clone(), Value::from(text)))
        })
        .collect()
}

fn in_config(reason: String) -> Error {
    Error::File { file: "tokenizer_config.json", reason }
}

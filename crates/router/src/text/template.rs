//! A checkpoint's chat template, run as transformers would run it.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, ErrorKind};
use proto::Chat;

use super::{strftime, to_python_json};
use crate::{Error, ModelFiles};

const NAME: &str = "chat";

/// What a template renders.
#[derive(Debug, Clone, Default)]
pub struct Conversation {
    /// A list of maps, each with `role`, `content` and what else the template reads.
    pub messages: Value,
    /// A list of tool definitions, or nothing.
    pub tools: Option<Value>,
    /// Whether the model may think first; `None` leaves it to the template.
    pub reasoning: Option<bool>,
}

impl From<&Chat> for Conversation {
    fn from(chat: &Chat) -> Self {
        let message = |m: &proto::Message| {
            Value::from_pairs([("role", m.role.name()), ("content", m.content.as_str())])
        };
        let messages = chat.messages.iter().map(message).collect();
        Self { messages, tools: None, reasoning: chat.reasoning }
    }
}

/// A compiled chat template.
pub struct Template {
    environment: Environment<'static>,
    special_tokens: BTreeMap<String, String>,
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
        let mut environment = environment();
        environment
            .add_template_owned(NAME, source)
            .map_err(|error| Error::File { file, reason: format!("chat template: {error:#}") })?;
        Ok(Some(Self { environment, special_tokens: special_tokens(&config) }))
    }

    /// Renders a conversation, ending where the model is to go on.
    ///
    /// # Errors
    /// The template's own words when it raises, else what went wrong in it.
    pub fn render(&self, conversation: Conversation) -> Result<String, String> {
        let mut context = BTreeMap::from([
            ("messages".to_owned(), conversation.messages),
            ("tools".to_owned(), conversation.tools.unwrap_or(Value::from(()))),
            ("documents".to_owned(), Value::from(())),
            ("add_generation_prompt".to_owned(), Value::from(true)),
        ]);
        if let Some(reasoning) = conversation.reasoning {
            context.insert("reasoning".to_owned(), Value::from(reasoning));
        }
        for (name, token) in &self.special_tokens {
            context.insert(name.clone(), Value::from(token.as_str()));
        }
        let template = self.environment.get_template(NAME).map_err(|error| error.to_string())?;
        template.render(context).map_err(|error| match (error.kind(), error.detail()) {
            (ErrorKind::InvalidOperation, Some(detail)) => detail.to_owned(),
            _ => error.to_string(),
        })
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
fn special_tokens(config: &serde_json::Value) -> BTreeMap<String, String> {
    let Some(fields) = config.as_object() else { return BTreeMap::new() };
    let tokens = fields.iter().filter(|(name, _)| name.ends_with("_token"));
    tokens
        .filter_map(|(name, value)| {
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            Some((name.clone(), text.to_owned()))
        })
        .collect()
}

fn in_config(reason: String) -> Error {
    Error::File { file: "tokenizer_config.json", reason }
}

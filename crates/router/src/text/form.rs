//! What an answer must look like, put into the chat format of the checkpoint and behind the prompt at hand.

use std::sync::OnceLock;

use grammar::{Begin, Calls, Compiler, Form, Marks, Refused, TokenTable, Tool};
use proto::{Chat, Failure, ToolChoice, Violation, worker};
use serde_json::Value;
use types::{Constraint, TokenId};

use super::Text;

/// What a request asks of its answer's form.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Wanted {
    /// Of the text.
    pub constraint: Option<Constraint>,
    /// Of the tool calls.
    pub calls: Option<Calls>,
    /// Most tokens of reasoning.
    pub thinking_tokens_max: Option<u32>,
}

/// What is known of the model, beside its tokenizer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vocabulary {
    /// Tokens that end an answer.
    pub eos: Vec<TokenId>,
    /// Tokens there are.
    pub size: u32,
}

/// The compiler of the model that is served, made when it is first needed.
#[derive(Debug, Default)]
pub(super) struct Compilers(OnceLock<Result<Compiler, String>>);

impl Wanted {
    /// Whether the form is left to the model.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        self.constraint.is_none() && self.calls.is_none() && self.thinking_tokens_max.is_none()
    }

    /// What the tools of a chat ask for. Where the text has a form (`formed`), all that the model may write instead must
    /// be said, so calls have one too.
    ///
    /// # Errors
    /// A violation of `chat.tool_choice` or of one of `chat.tools`.
    pub fn calls(chat: &Chat, formed: bool) -> Result<Option<Calls>, Violation> {
        let refuse = |reason: String| Err(Violation::new("chat.tool_choice", reason));
        let required = matches!(chat.tool_choice, ToolChoice::Required | ToolChoice::Named(_));
        if chat.tools.is_empty() {
            return match required {
                true => refuse("asks for a call, and there are no tools".to_owned()),
                false => Ok(None),
            };
        }
        let tools = chat.tools.iter().enumerate().map(|(index, json)| read_tool(index, json));
        let mut tools = tools.collect::<Result<Vec<Tool>, Violation>>()?;
        tools.iter_mut().for_each(|tool| tool.strict |= chat.strict_tools);
        if let ToolChoice::Named(name) = &chat.tool_choice {
            tools.retain(|tool| tool.name == *name);
            if tools.is_empty() {
                return refuse(format!("names `{name}`, which is not among the tools"));
            }
        }
        let several = chat.parallel_tool_calls.unwrap_or(true);
        let strict = tools.iter().any(|tool| tool.strict);
        let asked = required || formed || strict || !several;
        Ok(asked.then_some(Calls { tools, several, required }))
    }
}

fn read_tool(index: usize, json: &str) -> Result<Tool, Violation> {
    let refuse = |reason: &str| Violation::new(format!("chat.tools[{index}]"), reason.to_owned());
    let mut value: Value =
        serde_json::from_str(json).map_err(|error| refuse(&format!("must be a JSON object: {error}")))?;
    let function = value["function"].take();
    let name = function["name"].as_str().filter(|name| !name.is_empty());
    let name = name.ok_or_else(|| refuse("must be {\"type\": \"function\", \"function\": {\"name\": …}}"))?;
    let strict = function["strict"].as_bool().unwrap_or(false);
    let parameters = function.get("parameters").filter(|parameters| !parameters.is_null());
    Ok(Tool { name: name.to_owned(), parameters: parameters.cloned(), strict })
}

impl Text {
    /// What a group must be told so that the answer behind `prompt` is as `wanted`. The grammar in it compiles. Takes
    /// milliseconds at least: call it on a thread that may block.
    ///
    /// # Errors
    /// [`Failure::Invalid`] naming the part that cannot be: `constraint.json/properties/x`, `chat.tools[2]…`.
    pub fn guide(
        &self,
        wanted: &Wanted,
        prompt: &[TokenId],
        vocabulary: &Vocabulary,
    ) -> Result<worker::Guide, Failure> {
        let (begin, marks) = (self.markers.begin_behind(prompt), self.markers.marks());
        let Wanted { constraint, calls, thinking_tokens_max } = wanted;
        let thinking = thinking_tokens_max.map(|most| thinking(most, marks, begin)).transpose()?;
        if constraint.is_none() && calls.is_none() {
            return Ok(worker::Guide { grammar: String::new(), thinking });
        }
        if calls.as_ref().is_some_and(|calls| calls.required) && !self.can_call(begin) {
            let reason =
                "asks for a call, and the answer to this prompt has no place for one in the chat format";
            return Err(Violation::new("chat.tool_choice", reason).into());
        }
        let form = Form { begin, marks, content: constraint.as_ref(), calls: calls.as_ref() };
        let named = |refused: Refused| Failure::from(name(refused, constraint.as_ref()));
        let grammar = form.compose().map_err(named)?;
        let compiler = self.compilers.get(self.tokenizer.table(), vocabulary)?;
        if let Err(error) = compiler.compile(&grammar) {
            return Err(named(blame(compiler, &error, constraint.as_ref(), calls.as_ref())));
        }
        Ok(worker::Guide { grammar, thinking })
    }

    fn can_call(&self, begin: Begin) -> bool {
        self.markers.marks().is_some() && matches!(begin, Begin::Turn | Begin::Thinking | Begin::Answer)
    }
}

impl Compilers {
    fn get(&self, table: &TokenTable, vocabulary: &Vocabulary) -> Result<&Compiler, Failure> {
        let made = self.0.get_or_init(|| {
            Compiler::new(table, &vocabulary.eos, vocabulary.size).map_err(|error| error.to_string())
        });
        made.as_ref().map_err(|why| Failure::Internal { why: why.clone() })
    }
}

fn thinking(most: u32, marks: Option<&Marks>, begin: Begin) -> Result<worker::Thinking, Violation> {
    let refuse = |reason: String| Violation::new("stopping.thinking_tokens_max", reason);
    let Some(marks) = marks else {
        return Err(refuse(
            "is not supported: the served checkpoint has no markers around reasoning".to_owned(),
        ));
    };
    let [start, end] = marks.thinking.map(|id| id.0);
    Ok(worker::Thinking {
        tokens_max: most,
        start_token_id: start,
        end_token_id: end,
        open: begin == Begin::Thinking,
    })
}

/// The field of a part that was refused.
fn name(refused: Refused, constraint: Option<&Constraint>) -> Violation {
    let Refused { path, reason } = refused;
    let field = match constraint {
        _ if path.starts_with("tools") => format!("chat.{path}"),
        Some(constraint) => format!("constraint.{}{path}", constraint.field()),
        None => "chat.tools".to_owned(),
    };
    Violation::new(field, reason)
}

/// The part of a request that the compiler's `error` is about.
fn blame(
    compiler: &Compiler,
    error: &grammar::Error,
    constraint: Option<&Constraint>,
    calls: Option<&Calls>,
) -> Refused {
    let reason = match error {
        grammar::Error::Compile { reason } => reason.clone(),
        other => other.to_string(),
    };
    if let Some(Constraint::Json(schema)) = constraint
        && let Ok(schema) = serde_json::from_str::<Value>(schema)
        && let Some(refused) = compiler.blame(&schema, true)
    {
        return refused;
    }
    let tools = calls.map_or(&[][..], |calls| &calls.tools).iter().enumerate();
    for (index, tool) in tools {
        let blamed = tool.parameters.as_ref().and_then(|schema| compiler.blame(schema, tool.strict));
        if let Some(Refused { path, reason }) = blamed {
            return Refused { path: format!("tools[{index}].function.parameters{path}"), reason };
        }
    }
    Refused { path: String::new(), reason }
}

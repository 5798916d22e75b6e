//! A request's form put into the chat format: thinking first where the prompt leaves room for it, then the text or the
//! tool calls between their markers.

use std::fmt::Write;

use serde_json::{Value, json};
use types::{Constraint, TokenId};

use crate::Refused;
use crate::constraint::{Reading, check_schema, grammars, literal, schema};
use crate::limits::TOOLS_MAX;

const CONTENT: &str = "content";
/// A model may break lines and indent between calls, as chat templates write them.
const BLANKS: &str = "BLANKS: /[ \\n]{1,16}/\n";
/// Calls are counted by whoever runs them; the format only wants a number.
const NUMBER: &str = "NUMBER: /0|[1-9][0-9]{0,2}/\n";

/// The markers of a chat format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marks {
    /// Around what the model thinks.
    pub thinking: [TokenId; 2],
    /// Around what it says; a tokenizer may have those of two generations.
    pub text: Vec<[TokenId; 2]>,
    /// Around the tools it calls.
    pub action: [TokenId; 2],
}

/// Where in an answer the prompt leaves the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// The prompt is no chat: the answer is nothing but text.
    Plain,
    /// At the beginning of its turn: it may think first.
    Turn,
    /// In its thoughts.
    Thinking,
    /// Behind its thoughts.
    Answer,
    /// In its text.
    Text,
}

/// A tool the model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// The schema of its arguments, an object; `None` for a tool that takes none.
    pub parameters: Option<Value>,
    /// Whether a schema that cannot be enforced to the letter is refused; otherwise what cannot be is passed over.
    pub strict: bool,
}

/// The tool calls of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Calls {
    /// What may be called.
    pub tools: Vec<Tool>,
    /// Whether several calls may be made at once.
    pub several: bool,
    /// Whether a call must be made; otherwise the model may say something instead.
    pub required: bool,
}

/// Everything an answer must look like.
#[derive(Debug, Clone, PartialEq)]
pub struct Form<'a> {
    /// Where it begins.
    pub begin: Begin,
    /// The chat format; `None` for a tokenizer that has none, which is always [`Begin::Plain`].
    pub marks: Option<&'a Marks>,
    /// The form of what is said; `None` leaves it free.
    pub content: Option<&'a Constraint>,
    /// The calls; `None` for an answer without any.
    pub calls: Option<&'a Calls>,
}

/// A grammar in the making.
struct Composer {
    /// The rules of the first grammar, which refers to the others by their names.
    rules: String,
    others: Vec<Value>,
}

impl Form<'_> {
    /// The grammar of such an answer, as text for [`crate::Compiler::compile`].
    ///
    /// # Errors
    /// [`Refused`] naming the part of the content (its path is as in [`Constraint`]) or the tool (`tools[2]`) that
    /// cannot be used.
    pub fn compose(&self) -> Result<String, Refused> {
        let mut composer = Composer { rules: String::new(), others: Vec::new() };
        let content = match self.content {
            Some(content) => {
                composer.others.extend(grammars(CONTENT, content)?);
                format!("@{CONTENT}")
            }
            None => "free".to_owned(),
        };
        let start = match (self.begin, self.marks) {
            (Begin::Plain, _) | (_, None) => content,
            (Begin::Text, Some(marks)) => {
                let ends: Vec<String> = marks.text.iter().map(|[_, end]| token(*end)).collect();
                format!("{content} ({})?", ends.join(" | "))
            }
            (Begin::Turn, Some(marks)) => {
                let [start, end] = marks.thinking.map(token);
                format!("({start} free {end})? ({})", composer.body(marks, &content, self.calls)?)
            }
            (Begin::Thinking, Some(marks)) => {
                let [_, end] = marks.thinking.map(token);
                format!("free {end} ({})", composer.body(marks, &content, self.calls)?)
            }
            (Begin::Answer, Some(marks)) => composer.body(marks, &content, self.calls)?,
        };
        let rules = format!("start: {start}\nfree: /(?s:.*)/\n{}", composer.rules);
        let grammars: Vec<Value> =
            std::iter::once(json!({ "lark_grammar": rules })).chain(composer.others).collect();
        Ok(json!({ "grammars": grammars, "max_tokens": null }).to_string())
    }
}

impl Composer {
    /// What comes behind the thoughts.
    fn body(&mut self, marks: &Marks, content: &str, calls: Option<&Calls>) -> Result<String, Refused> {
        let mut ways = Vec::new();
        if !calls.is_some_and(|calls| calls.required) {
            ways.extend(
                marks.text.iter().map(|&[start, end]| format!("{} {content} {}", token(start), token(end))),
            );
        }
        if let Some(calls) = calls {
            self.calls(calls)?;
            let [start, end] = marks.action.map(token);
            ways.push(format!("{start} calls {end}"));
        }
        Ok(ways.join(" | "))
    }

    /// The rule `calls`, and one for each tool.
    fn calls(&mut self, calls: &Calls) -> Result<(), Refused> {
        if calls.tools.is_empty() || calls.tools.len() > TOOLS_MAX {
            let reason = format!("has {} tools; a call needs 1 to {TOOLS_MAX}", calls.tools.len());
            return Err(Refused::new("tools", reason));
        }
        let more = if calls.several { r#"("," BLANKS? call)*"# } else { "" };
        // Writing to a string cannot fail.
        let _ = writeln!(self.rules, r#"calls: "[" BLANKS? call {more} BLANKS? "]""#);
        let names: Vec<String> = (0..calls.tools.len()).map(|index| format!("call_{index}")).collect();
        let _ = writeln!(self.rules, "call: {}", names.join(" | "));
        for (index, tool) in calls.tools.iter().enumerate() {
            let reading = if tool.strict { Reading::Strict } else { Reading::Lenient };
            let begin = literal(r#"{"tool_call_id": ""#);
            let middle = literal(&format!(r#"", "tool_name": {}, "parameters": "#, Value::from(&*tool.name)));
            let end = literal("}");
            let _ = writeln!(self.rules, "call_{index}: {begin} NUMBER {middle} @tool_{index} {end}");
            self.others.push(schema(&format!("tool_{index}"), parameters(index, tool)?, reading));
        }
        self.rules.push_str(BLANKS);
        self.rules.push_str(NUMBER);
        Ok(())
    }
}

/// The schema of a tool's arguments, which are always an object.
fn parameters(index: usize, tool: &Tool) -> Result<Value, Refused> {
    let path = || format!("tools[{index}].function.parameters");
    let Some(parameters) = &tool.parameters else {
        return Ok(json!({ "type": "object", "additionalProperties": false }));
    };
    let mut parameters = check_schema(parameters.clone(), &path())?;
    match parameters.as_object_mut() {
        Some(object) => {
            if object.get("type").is_some_and(|kind| kind != "object") {
                return Err(Refused::new(path(), "must be the schema of an object"));
            }
            let refers = ["$ref", "anyOf", "oneOf", "allOf"].iter().any(|key| object.contains_key(*key));
            if !refers {
                object.entry("type").or_insert_with(|| "object".into());
            }
        }
        None => parameters = json!({ "type": "object" }),
    }
    Ok(parameters)
}

fn token(id: TokenId) -> String {
    format!("<[{}]>", id.0)
}

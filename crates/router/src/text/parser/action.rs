//! The tool calls of one action: `[{"tool_call_id": "0", "tool_name": "f", "parameters": {…}}, …]`, read as they
//! stream. What cannot be read becomes text, from the last point where everything had been handed out.

use super::json::{Scanner, Step};
use super::{CallPiece, Parsed};

#[derive(Debug, Clone)]
enum At {
    List,
    CallOrEnd,
    Call,
    KeyOrEnd,
    Key,
    InKey(Reading),
    Colon(Field),
    InValue(Field, Reading),
    FieldEnd,
    CallEnd,
    End,
    Broken,
}

/// A value on its way.
#[derive(Debug, Clone)]
struct Reading {
    scanner: Scanner,
    /// What was read and not handed out.
    text: String,
    /// The blanks before it are over.
    begun: bool,
}

impl Reading {
    const fn new() -> Self {
        Self { scanner: Scanner::new(), text: String::new(), begun: false }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    Name,
    Parameters,
    /// `tool_call_id`, and what other checkpoints may add.
    Other,
}

/// The call that is being read.
#[derive(Debug, Clone, Default)]
struct Call {
    name: Option<String>,
    parameters: Parameters,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
enum Parameters {
    #[default]
    Unseen,
    /// They came before the name.
    Early(String),
    /// The call's first piece is out, and theirs follow as they come.
    Announced,
}

impl Call {
    fn announced(&self) -> bool {
        self.parameters == Parameters::Announced
    }
}

/// The parser of one action.
#[derive(Debug, Clone)]
pub(super) struct Action {
    at: At,
    call: Call,
    /// The index of `call`.
    index: u32,
    /// What was read since the last point where everything had been handed out.
    raw: String,
}

impl Action {
    /// `index`: that of its first call.
    pub(super) fn new(index: u32) -> Self {
        Self { at: At::List, call: Call::default(), index, raw: String::new() }
    }

    pub(super) fn push(&mut self, text: &str, out: &mut Parsed) {
        for (position, c) in text.char_indices() {
            if matches!(self.at, At::Broken) {
                return out.text.push_str(&text[position..]);
            }
            // What belongs to a call that was announced is handed out or dropped, never text.
            if !self.call.announced() {
                self.raw.push(c);
            }
            if let Err(reason) = self.step(c, out) {
                self.break_off(reason, c, out);
            }
        }
    }

    /// Ends the action; returns the index of the next call.
    pub(super) fn finish(&mut self, out: &mut Parsed) -> u32 {
        let structure_only = self.raw.trim_matches([' ', '\t', '\n', '\r', '[', ']', ',']).is_empty();
        match self.at {
            At::Broken | At::End => {}
            _ if self.call.announced() => {
                out.faults.push("a tool call was cut off inside its arguments".to_owned());
                self.index += 1;
            }
            _ if structure_only => {}
            _ => {
                out.faults.push("a tool call was cut off before its arguments".to_owned());
                out.text.push_str(&self.raw);
            }
        }
        self.at = At::Broken;
        self.index
    }

    fn break_off(&mut self, reason: &str, c: char, out: &mut Parsed) {
        out.faults.push(format!("not a tool call: {reason}, not {c:?}"));
        if self.call.announced() {
            out.text.push(c);
            self.index += 1;
        } else {
            out.text.push_str(&self.raw);
        }
        self.call = Call::default();
        self.at = At::Broken;
    }

    fn step(&mut self, c: char, out: &mut Parsed) -> Result<(), &'static str> {
        let at = std::mem::replace(&mut self.at, At::Broken);
        self.at = match at {
            At::InKey(reading) => Self::in_key(reading, c)?,
            At::InValue(field, reading) => self.in_value(field, reading, c, out)?,
            at if matches!(c, ' ' | '\t' | '\n' | '\r') => at,
            At::List if c == '[' => At::CallOrEnd,
            At::CallOrEnd | At::Call if c == '{' => At::KeyOrEnd,
            At::CallOrEnd if c == ']' => At::End,
            At::KeyOrEnd | At::Key if c == '"' => Self::in_key(Reading::new(), c)?,
            At::KeyOrEnd | At::FieldEnd if c == '}' => self.call_ended(out)?,
            At::Colon(field) if c == ':' => At::InValue(field, Reading::new()),
            At::FieldEnd if c == ',' => At::Key,
            At::CallEnd if c == ',' => At::Call,
            At::CallEnd if c == ']' => At::End,
            At::List => return Err("a list of calls was expected"),
            At::CallOrEnd | At::Call => return Err("a call was expected"),
            At::KeyOrEnd | At::Key => return Err("a key in quotes was expected"),
            At::Colon(_) => return Err("`:` was expected"),
            At::FieldEnd | At::CallEnd => return Err("`,` or the end of the object or list was expected"),
            At::End | At::Broken => return Err("nothing was expected after the list"),
        };
        Ok(())
    }

    fn in_key(mut reading: Reading, c: char) -> Result<At, &'static str> {
        match reading.scanner.push(c, &mut reading.text)? {
            Step::More => Ok(At::InKey(reading)),
            Step::Ended | Step::EndedBefore => Ok(At::Colon(match reading.text.as_str() {
                "\"tool_name\"" => Field::Name,
                "\"parameters\"" => Field::Parameters,
                _ => Field::Other,
            })),
        }
    }

    fn in_value(
        &mut self,
        field: Field,
        mut reading: Reading,
        c: char,
        out: &mut Parsed,
    ) -> Result<At, &'static str> {
        if !reading.begun {
            if matches!(c, ' ' | '\t' | '\n' | '\r') {
                return Ok(At::InValue(field, reading));
            }
            reading.begun = true;
            if field == Field::Parameters {
                self.begin_parameters(c, out)?;
            }
        }
        let step = reading.scanner.push(c, &mut reading.text)?;
        if field == Field::Parameters && self.call.announced() {
            out.arguments(self.index, &reading.text);
            reading.text.clear();
        }
        match step {
            Step::More => Ok(At::InValue(field, reading)),
            Step::Ended => {
                self.value_ended(field, reading.text, out)?;
                Ok(At::FieldEnd)
            }
            Step::EndedBefore => {
                self.value_ended(field, reading.text, out)?;
                self.at = At::FieldEnd;
                self.step(c, out)?;
                Ok(std::mem::replace(&mut self.at, At::Broken))
            }
        }
    }

    fn begin_parameters(&mut self, c: char, out: &mut Parsed) -> Result<(), &'static str> {
        if c != '{' {
            return Err("the parameters must be an object");
        }
        if self.call.parameters != Parameters::Unseen {
            return Err("another key was expected after the parameters");
        }
        if let Some(name) = self.call.name.clone() {
            self.start(name, String::new(), out);
        }
        Ok(())
    }

    fn value_ended(&mut self, field: Field, text: String, out: &mut Parsed) -> Result<(), &'static str> {
        match field {
            Field::Other => {}
            Field::Name => {
                let name: String = serde_json::from_str(&text).map_err(|_| "the name must be a string")?;
                if name.is_empty() || self.call.name.is_some() {
                    return Err("one name that is not empty was expected");
                }
                match std::mem::take(&mut self.call.parameters) {
                    Parameters::Early(arguments) => self.start(name, arguments, out),
                    Parameters::Unseen | Parameters::Announced => self.call.name = Some(name),
                }
            }
            Field::Parameters if self.call.announced() => {}
            Field::Parameters => self.call.parameters = Parameters::Early(text),
        }
        Ok(())
    }

    fn start(&mut self, name: String, arguments: String, out: &mut Parsed) {
        out.calls.push(CallPiece { index: self.index, name: Some(name.clone()), arguments });
        self.call.name = Some(name);
        self.call.parameters = Parameters::Announced;
        self.raw.clear();
    }

    fn call_ended(&mut self, out: &mut Parsed) -> Result<At, &'static str> {
        if !self.call.announced() {
            // A call without parameters is one of a tool that takes none.
            let name = self.call.name.clone().ok_or("a tool_name was expected")?;
            self.start(name, "{}".to_owned(), out);
        }
        self.call = Call::default();
        self.index += 1;
        Ok(At::CallEnd)
    }
}

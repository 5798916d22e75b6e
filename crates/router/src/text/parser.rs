//! Takes an answer apart by its markers while it streams: reasoning, text and tool calls.
//!
//! A marker is recognised by its text, wherever tokens are cut, and never shows. What comes out does not depend on how
//! the answer is cut into pieces. One parser serves one answer.

mod action;
mod citations;
mod guard;
mod json;
mod markers;

use std::sync::Arc;

use types::TokenId;

pub use citations::{Citation, Cited, CitedSource};
pub use markers::Markers;

use action::Action;
use citations::{Citations, Out};
use guard::Guard;
use markers::{Found, Kind};

/// What became certain with a piece of an answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parsed {
    /// What the model thought.
    pub reasoning: String,
    /// What it said, also what was meant as a tool call and is none.
    pub text: String,
    /// Pieces of the tools it calls.
    pub calls: Vec<CallPiece>,
    /// What is cited in the text and the reasoning.
    pub citations: Vec<Citation>,
    /// Why something was not taken as the tool call it was meant to be.
    pub faults: Vec<String>,
}

/// A piece of a tool call.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CallPiece {
    /// Counts the calls of one answer from 0.
    pub index: u32,
    /// The tool's name: in the first piece of each call, and only there.
    pub name: Option<String>,
    /// More of the arguments: all pieces together are a JSON object, unless the answer was cut or went wrong inside.
    pub arguments: String,
}

impl Parsed {
    /// Whether nothing became certain.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let said = self.reasoning.len() + self.text.len();
        said + self.calls.len() + self.citations.len() + self.faults.len() == 0
    }

    fn arguments(&mut self, index: u32, more: &str) {
        match self.calls.last_mut() {
            Some(last) if last.index == index => last.arguments.push_str(more),
            _ => self.calls.push(CallPiece { index, name: None, arguments: more.to_owned() }),
        }
    }
}

/// Where in its answer a model is.
#[derive(Debug, Clone)]
enum Place {
    /// Between the parts. Text here belongs to the answer, but not the blanks before the next part.
    Between {
        blanks: String,
    },
    Reasoning,
    Text,
    /// What goes into an action is guarded as a whole: what comes out is parts of it.
    Action(Action, Guard),
}

impl Place {
    const fn between() -> Self {
        Self::Between { blanks: String::new() }
    }

    /// An action whose first call has this index.
    fn action(index: u32) -> Self {
        Self::Action(Action::new(index), Guard::default())
    }
}

/// One answer's parser.
#[derive(Debug, Clone)]
pub struct Parser {
    markers: Arc<Markers>,
    place: Place,
    /// The end of the input that may yet become a marker: always a proper prefix of one.
    held: String,
    calls_tools: bool,
    calls: u32,
    said: Part,
    thought: Part,
}

/// One of the two parts that callers read.
#[derive(Debug, Clone, Default)]
struct Part {
    guard: Guard,
    /// When citations are looked for.
    citations: Option<Citations>,
}

impl Part {
    fn push(&mut self, more: &str, out: &mut Out<'_>) {
        match &mut self.citations {
            Some(citations) => citations.push(more, &mut self.guard, out),
            None => _ = out.say(more, &mut self.guard),
        }
    }

    /// Adds text that citations are not looked for in.
    fn pass_on(&mut self, more: &str, out: &mut Out<'_>) {
        let said = out.say(more, &mut self.guard);
        if let Some(citations) = &mut self.citations {
            citations.pass_over(said);
        }
    }

    fn finish(&mut self, out: &mut Out<'_>) {
        if let Some(citations) = &mut self.citations {
            citations.finish(&mut self.guard, out);
        }
    }
}

impl Parser {
    /// Starts where `prompt` left off: it may have opened the reasoning already. Without `calls_tools` (the model was
    /// offered none), what it writes as a tool call is text.
    #[must_use]
    pub fn new(markers: Arc<Markers>, prompt: &[TokenId], calls_tools: bool) -> Self {
        let place = match markers.last_in(prompt) {
            // A model without markers says all it says as text.
            None if markers.is_empty() => Place::Text,
            Some(Kind::StartThinking) => Place::Reasoning,
            Some(Kind::StartText) => Place::Text,
            Some(Kind::StartAction) if calls_tools => Place::action(0),
            Some(Kind::StartAction) => Place::Text,
            None | Some(Kind::EndThinking | Kind::EndText | Kind::EndAction | Kind::Turn | Kind::Other) => {
                Place::between()
            }
        };
        let (said, thought) = (Part::default(), Part::default());
        Self { markers, place, held: String::new(), calls_tools, calls: 0, said, thought }
    }

    /// Takes citations out of the text and the reasoning as well: for a conversation that has something to cite.
    #[must_use]
    pub fn with_citations(mut self) -> Self {
        self.said.citations = Some(Citations::new(Cited::Text));
        self.thought.citations = Some(Citations::new(Cited::Reasoning));
        self
    }

    /// Whether the model is thinking at this point.
    #[must_use]
    pub const fn is_reasoning(&self) -> bool {
        matches!(self.place, Place::Reasoning)
    }

    /// Takes more of the answer, markers included, and appends what became certain.
    pub fn push(&mut self, text: &str, out: &mut Parsed) {
        let markers = Arc::clone(&self.markers);
        let mut input = std::mem::take(&mut self.held);
        input.push_str(text);
        let mut rest = input.as_str();
        loop {
            match markers.first_in(rest) {
                Found::Nothing => return self.plain(rest, out),
                Found::Perhaps { at } => {
                    self.plain(&rest[..at], out);
                    rest[at..].clone_into(&mut self.held);
                    return;
                }
                Found::Marker { at, end, kind } => {
                    self.plain(&rest[..at], out);
                    self.marker(kind, out);
                    rest = &rest[end..];
                }
            }
        }
    }

    /// Ends the answer. A marker that was cut off is dropped like a whole one; a few characters that might as well be
    /// what the model wanted to say (`Vec<U`) are text.
    pub fn finish(&mut self, out: &mut Parsed) {
        let held = std::mem::take(&mut self.held);
        if held.len() < MARKER_BEGUN_BYTES && !held.starts_with("<|") {
            self.plain(&held, out);
        }
        self.leave(out);
    }

    fn plain(&mut self, text: &str, out: &mut Parsed) {
        if text.is_empty() {
            return;
        }
        match &mut self.place {
            Place::Reasoning => self.thought.push(
                text,
                &mut Out { markers: &self.markers, text: &mut out.reasoning, citations: &mut out.citations },
            ),
            Place::Text => self.say(text, out),
            Place::Action(action, guard) => {
                let (before, mut guarded) = (out.text.len(), String::new());
                guard.push(&self.markers, text, &mut guarded);
                action.push(&guarded, out);
                self.pass_on(before, out);
            }
            Place::Between { blanks } if text.trim_start().is_empty() => blanks.push_str(text),
            Place::Between { blanks } => {
                let blanks = std::mem::take(blanks);
                self.place = Place::Text;
                self.say(&blanks, out);
                self.say(text, out);
            }
        }
    }

    fn say(&mut self, text: &str, out: &mut Parsed) {
        let (text_out, citations) = (&mut out.text, &mut out.citations);
        self.said.push(text, &mut Out { markers: &self.markers, text: text_out, citations });
    }

    fn marker(&mut self, kind: Kind, out: &mut Parsed) {
        if kind == Kind::Other {
            return;
        }
        self.leave(out);
        self.place = match kind {
            Kind::StartThinking => Place::Reasoning,
            Kind::StartText => Place::Text,
            Kind::StartAction if self.calls_tools => Place::action(self.calls),
            Kind::StartAction => {
                out.faults.push("the model calls a tool and was offered none".to_owned());
                Place::Text
            }
            Kind::EndThinking | Kind::EndText | Kind::EndAction | Kind::Turn | Kind::Other => {
                Place::between()
            }
        };
    }

    fn leave(&mut self, out: &mut Parsed) {
        match std::mem::replace(&mut self.place, Place::between()) {
            Place::Action(mut action, _) => {
                let before = out.text.len();
                self.calls = action.finish(out);
                self.pass_on(before, out);
            }
            Place::Reasoning => self.thought.finish(&mut Out {
                markers: &self.markers,
                text: &mut out.reasoning,
                citations: &mut out.citations,
            }),
            Place::Text => {
                let (text, citations) = (&mut out.text, &mut out.citations);
                self.said.finish(&mut Out { markers: &self.markers, text, citations });
            }
            Place::Between { .. } => {}
        }
    }

    /// What an action made text from byte `before` on joins the rest of it; citations are not looked for there.
    fn pass_on(&mut self, before: usize, out: &mut Parsed) {
        let (more, text, citations) = (out.text.split_off(before), &mut out.text, &mut out.citations);
        self.said.pass_on(&more, &mut Out { markers: &self.markers, text, citations });
    }
}

/// From this length on, the beginning of a marker is taken for one that was cut off.
const MARKER_BEGUN_BYTES: usize = 4;

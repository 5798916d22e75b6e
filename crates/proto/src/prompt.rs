//! A prompt as a caller gave it, in one of its three forms.

use types::TokenId;

use crate::{Failure, Violation, v1};

/// What to continue; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// Plain text; the model's special tokens are added when it is tokenized.
    Text(String),
    /// A conversation for the checkpoint's chat template.
    Chat(Chat),
    /// Token ids, used as they are; not yet compared with a vocabulary.
    TokenIds(Vec<TokenId>),
}

impl Prompt {
    /// Bytes of everything it is made of.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Chat(chat) => chat.bytes(),
            Self::TokenIds(ids) => size_of_val(ids.as_slice()),
        }
    }
}

/// A conversation of at least one message. JSON texts are not yet parsed: that is the template's part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chat {
    /// Oldest first.
    pub messages: Vec<Message>,
    /// Whether the model may think first; `None` leaves it to the template.
    pub reasoning: Option<bool>,
    /// The tools the model may call, each a JSON object.
    pub tools: Vec<String>,
    /// Documents to answer from, each a JSON object.
    pub documents: Vec<String>,
    /// Further variables for the template, a JSON object; `None` for none.
    pub template_arguments: Option<String>,
    /// Which tools are called.
    pub tool_choice: ToolChoice,
    /// Whether one answer may call several tools; `None` for yes.
    pub parallel_tool_calls: Option<bool>,
    /// Whether the arguments of every call are held to the schema of its tool.
    pub strict_tools: bool,
}

/// Which tools a model must call.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ToolChoice {
    /// As it likes.
    #[default]
    Auto,
    /// None: it is not told of any.
    None,
    /// At least one.
    Required,
    /// The one of this name.
    Named(String),
}

impl TryFrom<Option<v1::ToolChoice>> for ToolChoice {
    type Error = Violation;

    fn try_from(wire: Option<v1::ToolChoice>) -> Result<Self, Violation> {
        use v1::tool_choice::{Choice, Mode};
        let refuse = |reason: String| Err(Violation::new("chat.tool_choice", reason));
        match wire.and_then(|wire| wire.choice) {
            None => Ok(Self::Auto),
            Some(Choice::Name(name)) if name.is_empty() => refuse("names no tool".to_owned()),
            Some(Choice::Name(name)) => Ok(Self::Named(name)),
            Some(Choice::Mode(mode)) => match Mode::try_from(mode) {
                Ok(Mode::Unspecified | Mode::Auto) => Ok(Self::Auto),
                Ok(Mode::None) => Ok(Self::None),
                Ok(Mode::Required) => Ok(Self::Required),
                Err(_) => refuse(format!("has mode {mode}, which is unknown")),
            },
        }
    }
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What was said; may be empty.
    pub content: String,
    /// What the assistant thought before; empty for everybody else.
    pub reasoning: String,
    /// The tools the assistant called; empty for everybody else.
    pub tool_calls: Vec<v1::ToolCall>,
    /// The call a tool's message answers, if it says; `None` for everybody else.
    pub tool_call_id: Option<String>,
    /// The results of that call when they come one by one, each a JSON object; then `content` is empty.
    pub results: Vec<String>,
}

impl Chat {
    /// Bytes of everything that ends up in the prompt.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let json = self.tools.iter().chain(&self.documents).chain(&self.template_arguments);
        self.messages.iter().map(Message::bytes).chain(json.map(String::len)).sum()
    }
}

impl Message {
    /// A message of nothing but content.
    #[must_use]
    pub const fn new(role: Role, content: String) -> Self {
        Self {
            role,
            content,
            reasoning: String::new(),
            tool_calls: Vec::new(),
            tool_call_id: None,
            results: Vec::new(),
        }
    }

    fn bytes(&self) -> usize {
        let calls = self.tool_calls.iter().map(|call| call.id.len() + call.name.len() + call.arguments.len());
        let id = self.tool_call_id.as_ref().map_or(0, String::len);
        let results: usize = self.results.iter().map(String::len).sum();
        self.content.len() + self.reasoning.len() + id + calls.sum::<usize>() + results
    }

    /// Checks message number `index` of a conversation and names what is wrong with it.
    fn from_wire(wire: v1::ChatMessage, index: usize, wrong: &mut Vec<Violation>) -> Option<Self> {
        let v1::ChatMessage { role, content, reasoning, tool_calls, tool_call_id, results } = wire;
        let mut refuse = |field: &str, reason: String| {
            wrong.push(Violation::new(format!("chat.messages[{index}].{field}"), reason));
        };
        let Some(role) = Role::from_name(&role) else {
            let reason = format!("must be system, developer, user, assistant or tool, not `{role}`");
            refuse("role", reason);
            return None;
        };
        if role != Role::Assistant && !tool_calls.is_empty() {
            refuse(
                "tool_calls",
                format!("belong to assistant messages, and this one's role is {}", role.name()),
            );
        }
        if role != Role::Assistant && !reasoning.is_empty() {
            refuse(
                "reasoning",
                format!("belongs to assistant messages, and this one's role is {}", role.name()),
            );
        }
        if role != Role::Tool && !tool_call_id.is_empty() {
            refuse(
                "tool_call_id",
                format!("belongs to tool messages, and this one's role is {}", role.name()),
            );
        }
        if role != Role::Tool && !results.is_empty() {
            refuse("results", format!("belong to tool messages, and this one's role is {}", role.name()));
        }
        if !results.is_empty() && !content.is_empty() {
            refuse("results", "are given beside content; give one of them".to_owned());
        }
        for (call, _) in tool_calls.iter().enumerate().filter(|(_, call)| call.name.is_empty()) {
            refuse(&format!("tool_calls[{call}].name"), "is empty; name the tool that was called".to_owned());
        }
        let tool_call_id = Some(tool_call_id).filter(|id| !id.is_empty());
        Some(Self { role, content, reasoning, tool_calls, tool_call_id, results })
    }
}

/// Who speaks in a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Instructions of the platform.
    System,
    /// Instructions of the application.
    Developer,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// The result of a tool call.
    Tool,
}

impl Role {
    /// The name on the wire and in chat templates.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Developer => "developer",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        [Self::System, Self::Developer, Self::User, Self::Assistant, Self::Tool]
            .into_iter()
            .find(|role| role.name() == name)
    }
}

impl TryFrom<Option<v1::generate_request::Prompt>> for Prompt {
    type Error = Failure;

    fn try_from(prompt: Option<v1::generate_request::Prompt>) -> Result<Self, Failure> {
        use v1::generate_request::Prompt as Wire;
        match prompt {
            None => Err(unset("set one of text, chat and token_ids")),
            Some(Wire::Text(text)) => text_prompt(text),
            Some(Wire::Chat(chat)) => Chat::try_from(chat).map(Self::Chat),
            Some(Wire::TokenIds(v1::TokenIds { ids })) if ids.is_empty() => {
                Err(Violation::new("token_ids.ids", "is empty; give at least one token id").into())
            }
            Some(Wire::TokenIds(v1::TokenIds { ids })) => {
                Ok(Self::TokenIds(ids.into_iter().map(TokenId).collect()))
            }
        }
    }
}

impl TryFrom<Option<v1::tokenize_request::Prompt>> for Prompt {
    type Error = Failure;

    fn try_from(prompt: Option<v1::tokenize_request::Prompt>) -> Result<Self, Failure> {
        use v1::tokenize_request::Prompt as Wire;
        match prompt {
            None => Err(unset("set one of text and chat")),
            Some(Wire::Text(text)) => text_prompt(text),
            Some(Wire::Chat(chat)) => Chat::try_from(chat).map(Self::Chat),
        }
    }
}

impl TryFrom<v1::ChatPrompt> for Chat {
    type Error = Failure;

    fn try_from(chat: v1::ChatPrompt) -> Result<Self, Failure> {
        if chat.messages.is_empty() {
            return Err(Violation::new("chat.messages", "is empty; give at least one message").into());
        }
        let mut messages = Vec::with_capacity(chat.messages.len());
        let mut wrong = Vec::new();
        for (index, message) in chat.messages.into_iter().enumerate() {
            messages.extend(Message::from_wire(message, index, &mut wrong));
        }
        let tool_choice = ToolChoice::try_from(chat.tool_choice).map_err(|violation| wrong.push(violation));
        let (Ok(tool_choice), true) = (tool_choice, wrong.is_empty()) else {
            return Err(Failure::Invalid(wrong));
        };
        Ok(Self {
            messages,
            reasoning: chat.reasoning,
            tools: if tool_choice == ToolChoice::None { Vec::new() } else { chat.tools },
            documents: chat.documents,
            template_arguments: Some(chat.template_arguments).filter(|json| !json.is_empty()),
            tool_choice,
            parallel_tool_calls: chat.parallel_tool_calls,
            strict_tools: chat.strict_tools,
        })
    }
}

fn text_prompt(text: String) -> Result<Prompt, Failure> {
    match text.is_empty() {
        true => Err(Violation::new("text", "is empty; give at least one character").into()),
        false => Ok(Prompt::Text(text)),
    }
}

fn unset(what: &str) -> Failure {
    Violation::new("prompt", format!("is not set; {what}")).into()
}

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

/// A conversation of at least one message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chat {
    /// Oldest first.
    pub messages: Vec<Message>,
    /// Whether the model may think first; `None` leaves it to the template.
    pub reasoning: Option<bool>,
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What was said; may be empty.
    pub content: String,
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
            match Role::from_name(&message.role) {
                Some(role) => messages.push(Message { role, content: message.content }),
                None => wrong.push(Violation::new(
                    format!("chat.messages[{index}].role"),
                    format!("must be system, developer, user, assistant or tool, not `{}`", message.role),
                )),
            }
        }
        match wrong.is_empty() {
            true => Ok(Self { messages, reasoning: chat.reasoning }),
            false => Err(Failure::Invalid(wrong)),
        }
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

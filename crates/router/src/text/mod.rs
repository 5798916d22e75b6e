//! Text in, text out: tokenizer, chat template, incremental detokenisation and stop strings.

mod detokenize;
mod form;
mod json;
mod parser;
mod reads;
mod stop;
mod strftime;
mod template;
mod tokenizer;
mod words;

pub use detokenize::Detokenizer;
pub use form::{Vocabulary, Wanted};
pub use json::to_python_json;
pub use parser::{CallPiece, Citation, Cited, CitedSource, Markers, Parsed, Parser};
pub use stop::{Matched, StopStrings};
pub use strftime::strftime;
pub use template::{Conversation, Template};
pub use tokenizer::Tokenizer;

use std::sync::Arc;

use proto::{Chat, Failure, Prompt, Violation};
use types::TokenId;

use crate::{Error, ModelFiles};

/// Bytes of a chat, and of what a template makes of it, that are tokenized where its request is handled: some 2,000 tokens,
/// which take less than two wakes of another thread when their words are known.
pub const IN_PLACE_BYTES_MAX: usize = 8 << 10;
/// Messages of a chat that is rendered where its request is handled.
pub const IN_PLACE_MESSAGES_MAX: usize = 32;
/// Words of such a chat that the tokenizer may have to be asked about; each takes it some 10 µs.
pub const IN_PLACE_STRANGERS_MAX: usize = 8;

/// Tokens that are made text where their request is handled: some 30 µs of work.
pub const IN_PLACE_TOKENS_MAX: usize = 4 << 10;

/// A prompt whose tokenizing has begun.
#[derive(Debug)]
pub enum Begun {
    /// It is done: the text that was tokenized, and its ids.
    Whole((String, Vec<TokenId>)),
    /// What is left would take a while.
    Part(Rest),
}

/// What is left to do of a prompt.
#[derive(Debug)]
pub enum Rest {
    /// All of it.
    Prompt(Prompt),
    /// A chat that was rendered.
    Rendered(String),
}

/// Everything a checkpoint says about text.
#[derive(Debug, Clone)]
pub struct Text {
    tokenizer: Arc<Tokenizer>,
    markers: Arc<Markers>,
    template: Option<Arc<Template>>,
    compilers: Arc<form::Compilers>,
}

impl Text {
    /// Loads a checkpoint's tokenizer and template; `None` when it has no tokenizer.
    ///
    /// # Errors
    /// [`Error::File`] for a file that is there and cannot be used.
    pub fn load(files: &ModelFiles) -> Result<Option<Self>, Error> {
        Self::load_telling(files, |_| {})
    }

    /// As [`Text::load`]; `told` hears how much of it is done, in per cent of the time it takes for a large vocabulary.
    ///
    /// # Errors
    /// As [`Text::load`].
    pub(crate) fn load_telling(files: &ModelFiles, told: impl Fn(u32)) -> Result<Option<Self>, Error> {
        let Some(tokenizer) = &files.tokenizer_json else { return Ok(None) };
        let tokenizer = Arc::new(Tokenizer::from_bytes(tokenizer)?);
        told(90);
        let markers = Arc::new(Markers::of(&tokenizer)?);
        told(95);
        let template = Template::load(files)?.map(Arc::new);
        told(100);
        Ok(Some(Self { tokenizer, markers, template, compilers: Arc::default() }))
    }

    /// The tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// A parser for the answer to `prompt`; see [`Parser::new`].
    #[must_use]
    pub fn parser(&self, prompt: &[TokenId], calls_tools: bool) -> Parser {
        Parser::new(Arc::clone(&self.markers), prompt, calls_tools)
    }

    /// Whether there is a chat template and it looks at the variable `name`.
    #[must_use]
    pub fn template_reads(&self, name: &str) -> bool {
        self.template.as_ref().is_some_and(|template| template.reads(name))
    }

    /// Whether conversations can be rendered.
    #[must_use]
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// The runs of tokens that would write one of `words`, as it is or after a space; each once.
    ///
    /// # Errors
    /// [`Failure::Invalid`] naming a word that cannot be tokenized.
    pub fn bad_words(&self, words: &[String]) -> Result<Vec<Vec<u32>>, Failure> {
        let mut runs = Vec::with_capacity(2 * words.len());
        for (index, word) in words.iter().enumerate() {
            let bare = match word.trim_start_matches(' ') {
                "" => word,
                bare => bare,
            };
            for form in [bare.to_owned(), format!(" {bare}")] {
                let ids = self.tokenizer.encode(&form, false);
                let ids = ids.map_err(|why| Violation::new(format!("sampling.bad_words[{index}]"), why))?;
                runs.push(ids.into_iter().map(|id| id.0).collect());
            }
        }
        runs.sort_unstable();
        runs.dedup();
        Ok(runs)
    }

    /// Renders (for a chat) and tokenizes a prompt. Returns the text that was tokenized and its token ids; token ids
    /// pass through with empty text. Takes time in proportion to the text: call it on a thread that may block.
    ///
    /// # Errors
    /// [`Failure::NoChatTemplate`], or [`Failure::Invalid`] when the template refuses the conversation.
    pub fn tokenize(&self, prompt: Prompt) -> Result<(String, Vec<TokenId>), Failure> {
        self.finish(Rest::Prompt(prompt))
    }

    /// Does what [`Text::tokenize`] does as far as it is done in no time ([`IN_PLACE_BYTES_MAX`],
    /// [`IN_PLACE_STRANGERS_MAX`]), so that short chats need no other thread.
    ///
    /// # Errors
    /// As [`Text::tokenize`]'s.
    pub fn begin(&self, prompt: Prompt) -> Result<Begun, Failure> {
        let chat = match prompt {
            Prompt::TokenIds(ids) => return Ok(Begun::Whole((String::new(), ids))),
            Prompt::Text(_) => return Ok(Begun::Part(Rest::Prompt(prompt))),
            Prompt::Chat(ref chat) => chat,
        };
        if chat.bytes() > IN_PLACE_BYTES_MAX || chat.messages.len() > IN_PLACE_MESSAGES_MAX {
            return Ok(Begun::Part(Rest::Prompt(prompt)));
        }
        let rendered = self.render(chat)?;
        let known = match rendered.len() > IN_PLACE_BYTES_MAX {
            true => None,
            false => self.tokenizer.encode_knowing(&rendered, IN_PLACE_STRANGERS_MAX).map_err(of_chat)?,
        };
        Ok(match known {
            Some(ids) => Begun::Whole((rendered, ids)),
            None => Begun::Part(Rest::Rendered(rendered)),
        })
    }

    /// The rest of what [`Text::begin`] has begun, on a thread that may block.
    ///
    /// # Errors
    /// As [`Text::tokenize`]'s.
    pub fn finish(&self, rest: Rest) -> Result<(String, Vec<TokenId>), Failure> {
        let rendered = match rest {
            Rest::Prompt(Prompt::TokenIds(ids)) => return Ok((String::new(), ids)),
            Rest::Prompt(Prompt::Text(text)) => {
                let ids = self.tokenizer.encode(&text, true).map_err(|why| Violation::new("text", why))?;
                return Ok((text, ids));
            }
            Rest::Prompt(Prompt::Chat(chat)) => self.render(&chat)?,
            Rest::Rendered(rendered) => rendered,
        };
        // The template has written the special tokens, BOS included.
        let ids = self.tokenizer.encode(&rendered, false).map_err(of_chat)?;
        Ok((rendered, ids))
    }

    /// The text of `ids`, as [`Tokenizer::decode`]: where it is called when they are few, else on a thread that may block,
    /// which holds `permit`.
    ///
    /// # Errors
    /// [`Failure::Internal`] when that thread failed.
    pub async fn detokenize(
        &self,
        ids: Vec<TokenId>,
        keep_special: bool,
        permit: impl Send + 'static,
    ) -> Result<String, Failure> {
        if ids.len() <= IN_PLACE_TOKENS_MAX {
            return Ok(self.tokenizer.decode(&ids, keep_special));
        }
        let tokenizer = Arc::clone(&self.tokenizer);
        let work = tokio::task::spawn_blocking(move || {
            let text = tokenizer.decode(&ids, keep_special);
            drop(permit);
            text
        });
        work.await.map_err(|error| Failure::Internal { why: format!("detokenizing failed: {error}") })
    }

    fn render(&self, chat: &Chat) -> Result<String, Failure> {
        let template = self.template.as_ref();
        let template = template.ok_or_else(|| Failure::NoChatTemplate { needed_for: "chat".to_owned() })?;
        template.render_chat(chat)
    }
}

fn of_chat(why: String) -> Violation {
    Violation::new("chat", why)
}

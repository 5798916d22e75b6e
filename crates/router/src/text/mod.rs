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

use proto::{Failure, Prompt, Violation};
use types::TokenId;

use crate::{Error, ModelFiles};

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
        let Some(tokenizer) = &files.tokenizer_json else { return Ok(None) };
        let tokenizer = Arc::new(Tokenizer::from_bytes(tokenizer)?);
        let markers = Arc::new(Markers::of(&tokenizer)?);
        let template = Template::load(files)?.map(Arc::new);
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
        match prompt {
            Prompt::TokenIds(ids) => Ok((String::new(), ids)),
            Prompt::Text(text) => {
                let ids = self.tokenizer.encode(&text, true).map_err(|why| Violation::new("text", why))?;
                Ok((text, ids))
            }
            Prompt::Chat(chat) => {
                let Some(template) = &self.template else {
                    return Err(Failure::NoChatTemplate { needed_for: "chat".to_owned() });
                };
                let rendered = template.render_chat(&chat)?;
                // The template has written the special tokens, BOS included.
                let ids =
                    self.tokenizer.encode(&rendered, false).map_err(|why| Violation::new("chat", why))?;
                Ok((rendered, ids))
            }
        }
    }
}

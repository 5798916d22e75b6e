//! Compiled grammars, made when a request first needs one and kept for the next that has the same.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use grammar::{Compiler, Matcher, TokenTable};
use model::Files;
use proto::worker::{self, ModelFacts};
use proto::{Failure, Violation};
use tokio::sync::Semaphore;
use types::TokenId;

use super::{Guidance, Thinking};

/// Grammars that are kept: callers tend to have a few, and ask for them again and again.
const KEPT_MAX: usize = 16;
/// Grammars compiled at the same time: more would only take the model's cores.
const COMPILING_MAX: usize = 2;

/// Makes the guidance of requests.
#[derive(Debug)]
pub(crate) struct Kitchen {
    files: Files,
    /// Made with the first grammar: it takes memory in proportion to the vocabulary.
    compiler: OnceLock<Result<Compiler, String>>,
    /// The last ones used, newest first.
    kept: Mutex<Vec<(Arc<str>, Matcher)>>,
    compiling: Semaphore,
}

impl Kitchen {
    /// For the checkpoint in `files`.
    pub(crate) fn new(files: Files) -> Self {
        let compiling = Semaphore::new(COMPILING_MAX);
        Self { files, compiler: OnceLock::new(), kept: Mutex::default(), compiling }
    }

    /// What a request asks of its sequences; `None` when it asks nothing.
    ///
    /// # Errors
    /// [`Failure::Invalid`] for a grammar that does not compile or a marker the model does not have,
    /// [`Failure::NoTokenizer`] for a checkpoint without one.
    pub(crate) async fn guidance(
        self: &Arc<Self>,
        guide: worker::Guide,
        facts: ModelFacts,
    ) -> Result<Option<Guidance>, Failure> {
        let thinking = guide.thinking.map(|thinking| read(thinking, facts.vocab_size)).transpose()?;
        let matcher = match guide.grammar.is_empty() {
            true => None,
            false => Some(self.compile(guide.grammar, facts).await?),
        };
        let asked = matcher.is_some() || thinking.is_some();
        Ok(asked.then_some(Guidance { matcher, thinking }))
    }

    async fn compile(self: &Arc<Self>, grammar: String, facts: ModelFacts) -> Result<Matcher, Failure> {
        if let Some(kept) = self.find(&grammar) {
            return Ok(kept);
        }
        let why =
            |what: &dyn std::fmt::Display| Failure::Internal { why: format!("compiling a grammar: {what}") };
        let _permit = self.compiling.acquire().await.map_err(|error| why(&error))?;
        let kitchen = Arc::clone(self);
        let work = tokio::task::spawn_blocking(move || kitchen.make(&grammar, &facts));
        work.await.unwrap_or_else(|error| Err(why(&error)))
    }

    fn make(&self, grammar: &str, facts: &ModelFacts) -> Result<Matcher, Failure> {
        // Another request may have brought it while this one waited.
        if let Some(kept) = self.find(grammar) {
            return Ok(kept);
        }
        let compiler = match self.compiler.get_or_init(|| self.compiler(facts)) {
            Ok(compiler) => compiler,
            Err(reason) => return Err(Failure::Internal { why: reason.clone() }),
        };
        let refuse = |error: grammar::Error| Violation::new("guide.grammar", error.to_string());
        let matcher = compiler.compile(grammar).map_err(refuse)?;
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.truncate(KEPT_MAX - 1);
        kept.insert(0, (grammar.into(), matcher.clone()));
        Ok(matcher)
    }

    fn find(&self, grammar: &str) -> Option<Matcher> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let at = kept.iter().position(|(text, _)| **text == *grammar)?;
        kept[..=at].rotate_right(1);
        Some(kept[0].1.clone())
    }

    fn compiler(&self, facts: &ModelFacts) -> Result<Compiler, String> {
        let json = self.files.read("tokenizer.json").map_err(|error| error.to_string())?;
        let json =
            json.ok_or_else(|| format!("{} has no tokenizer.json, which grammars need", self.files.place()))?;
        let table = TokenTable::read(&json).map_err(|error| error.to_string())?;
        let eos: Vec<TokenId> = facts.eos_token_ids.iter().copied().map(TokenId).collect();
        Compiler::new(&table, &eos, facts.vocab_size).map_err(|error| error.to_string())
    }
}

fn read(wire: worker::Thinking, vocab_size: u32) -> Result<Thinking, Failure> {
    let worker::Thinking { tokens_max, start_token_id, end_token_id, open } = wire;
    for (field, id) in [("start_token_id", start_token_id), ("end_token_id", end_token_id)] {
        if id >= vocab_size {
            let reason = format!("token id {id} is not below the vocabulary size {vocab_size}");
            return Err(Violation::new(format!("guide.thinking.{field}"), reason).into());
        }
    }
    Ok(Thinking { tokens_max, start: TokenId(start_token_id), end: TokenId(end_token_id), open })
}

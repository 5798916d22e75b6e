//! A checkpoint's tokenizer: text to ids through the `tokenizers` crate, ids to bytes through a table.

use std::fmt;

use grammar::TokenTable;
use types::TokenId;

use super::Detokenizer;
use super::words::Words;
use crate::Error;

const FILE: &str = "tokenizer.json";

/// Text to token ids, and token ids to the bytes they stand for.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    table: TokenTable,
    /// For a tokenizer whose words can be told from outside.
    words: Option<Words>,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::File`] when it is not a tokenizer or its decoder is not `ByteLevel`, the only one whose tokens stand
    /// for the same bytes wherever they are, which exact streaming needs; all Cohere checkpoints use it.
    pub fn from_bytes(json: &[u8]) -> Result<Self, Error> {
        let refuse = |reason: String| Error::File { file: FILE, reason };
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(|error| refuse(error.to_string()))?;
        // A file may ask for padding or truncation to a training length; a prompt is never changed silently.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| refuse(error.to_string()))?;
        let table = TokenTable::of(&inner).map_err(|error| match error {
            grammar::Error::Tokenizer { reason } => refuse(reason),
            other => refuse(other.to_string()),
        })?;
        let words = Words::of(&inner);
        Ok(Self { inner, table, words })
    }

    /// The token ids of `text`; with `add_special`, the tokens the tokenizer puts around a text (BOS) are added.
    ///
    /// # Errors
    /// The tokenizer's own words when it cannot encode the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, String> {
        if let (Some(words), false) = (&self.words, add_special) {
            return words.encode(&self.inner, text);
        }
        let encoding = self.inner.encode_fast(text, add_special).map_err(|error| error.to_string())?;
        Ok(encoding.get_ids().iter().map(|&id| TokenId(id)).collect())
    }

    /// The token ids of `text`, none added, when the library has to be asked about no more than `strangers_max` of its
    /// words; takes 0.1 µs for each of the others.
    ///
    /// # Errors
    /// The tokenizer's own words when it cannot encode the text.
    pub fn encode_knowing(&self, text: &str, strangers_max: usize) -> Result<Option<Vec<TokenId>>, String> {
        match &self.words {
            Some(words) => words.encode_knowing(&self.inner, text, Some(strangers_max)),
            None => Ok(None),
        }
    }

    /// The text of `ids`, all at once; bytes that are not UTF-8 become U+FFFD.
    #[must_use]
    pub fn decode(&self, ids: &[TokenId], keep_special: bool) -> String {
        let mut detokenizer = Detokenizer::new(keep_special);
        let mut text = String::new();
        for &id in ids {
            detokenizer.push(self, id, &mut text);
        }
        detokenizer.finish(&mut text);
        text
    }

    /// Every token as the bytes it stands for.
    #[must_use]
    pub const fn table(&self) -> &TokenTable {
        &self.table
    }

    /// The bytes token `id` stands for; nothing for an id the tokenizer does not have (a padded vocabulary).
    #[must_use]
    pub fn token_bytes(&self, id: TokenId) -> &[u8] {
        self.table.bytes(id)
    }

    /// The id of the token whose text is `text`, if there is one.
    #[must_use]
    pub fn id_of(&self, text: &str) -> Option<TokenId> {
        self.inner.token_to_id(text).map(TokenId)
    }

    /// The texts of all special tokens, in the order of their ids.
    pub fn special_tokens(&self) -> impl Iterator<Item = &str> {
        self.table.special_tokens()
    }

    /// Whether token `id` is a marker such as `<|END_TEXT|>`, left out of text unless asked for.
    #[must_use]
    pub fn is_special(&self, id: TokenId) -> bool {
        self.table.is_special(id)
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("tokens", &self.table.len()).finish_non_exhaustive()
    }
}

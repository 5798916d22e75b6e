//! A checkpoint's tokenizer: text to ids through the `tokenizers` crate, ids to bytes through a table.

use std::fmt;

use tokenizers::DecoderWrapper;
use types::TokenId;

use super::Detokenizer;
use crate::Error;

const FILE: &str = "tokenizer.json";

/// Text to token ids, and token ids to the bytes they stand for.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The bytes of all tokens one after another; token `i` is `ends[i - 1]..ends[i]`.
    bytes: Vec<u8>,
    ends: Vec<u32>,
    special: Vec<bool>,
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
        match inner.get_decoder() {
            Some(DecoderWrapper::ByteLevel(_)) => {}
            Some(other) => {
                let name = format!("{other:?}");
                let name = name.split(['(', ' ']).next().unwrap_or_default();
                return Err(refuse(format!("decoder `{name}` is not supported; use ByteLevel")));
            }
            None => return Err(refuse("has no decoder; ByteLevel is needed".to_owned())),
        }
        let added = inner.get_added_tokens_decoder();
        let last = inner.get_vocab(true).into_values().max().unwrap_or(0);
        let mut table = Self { inner, bytes: Vec::new(), ends: Vec::new(), special: Vec::new() };
        for id in 0..=last {
            if let Some(token) = table.inner.id_to_token(id) {
                push_bytes(&token, &mut table.bytes);
            }
            let end = u32::try_from(table.bytes.len()).map_err(|error| refuse(error.to_string()))?;
            table.ends.push(end);
            table.special.push(added.get(&id).is_some_and(|token| token.special));
        }
        Ok(table)
    }

    /// The token ids of `text`; with `add_special`, the tokens the tokenizer puts around a text (BOS) are added.
    ///
    /// # Errors
    /// The tokenizer's own words when it cannot encode the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, String> {
        let encoding = self.inner.encode_fast(text, add_special).map_err(|error| error.to_string())?;
        Ok(encoding.get_ids().iter().map(|&id| TokenId(id)).collect())
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

    /// The bytes token `id` stands for; nothing for an id the tokenizer does not have (a padded vocabulary).
    #[must_use]
    pub fn token_bytes(&self, id: TokenId) -> &[u8] {
        let index = id.0 as usize;
        let Some(&end) = self.ends.get(index) else { return &[] };
        let start = match index {
            0 => 0,
            _ => self.ends[index - 1],
        };
        &self.bytes[start as usize..end as usize]
    }

    /// The id of the token whose text is `text`, if there is one.
    #[must_use]
    pub fn id_of(&self, text: &str) -> Option<TokenId> {
        self.inner.token_to_id(text).map(TokenId)
    }

    /// The texts of all special tokens, in the order of their ids.
    pub fn special_tokens(&self) -> impl Iterator<Item = &str> {
        let special = (0..).map(TokenId).zip(&self.special).filter(|(_, special)| **special);
        special.filter_map(|(id, _)| std::str::from_utf8(self.token_bytes(id)).ok())
    }

    /// Whether token `id` is a marker such as `<|END_TEXT|>`, left out of text unless asked for.
    #[must_use]
    pub fn is_special(&self, id: TokenId) -> bool {
        self.special.get(id.0 as usize).copied().unwrap_or(false)
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("tokens", &self.ends.len()).finish_non_exhaustive()
    }
}

/// Appends what `token` stands for: in the byte-level alphabet each character is one byte; a token with a character
/// outside it (an added token with a space, say) is itself.
fn push_bytes(token: &str, out: &mut Vec<u8>) {
    let start = out.len();
    for c in token.chars() {
        match byte_of(c) {
            Some(byte) => out.push(byte),
            None => {
                out.truncate(start);
                out.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

/// GPT-2's alphabet: the printable bytes of Latin-1 are themselves; the 68 others are, in order, U+0100 to U+0143.
fn byte_of(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => u8::try_from(code).ok(),
        code @ 0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        code @ 0x121..=0x142 => u8::try_from(code - 0x121 + 0x7F).ok(),
        0x143 => Some(0xAD),
        _ => None,
    }
}

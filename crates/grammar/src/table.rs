//! A tokenizer's ids as the bytes they stand for.

use tokenizers::{DecoderWrapper, Tokenizer};
use types::TokenId;

use crate::Error;

/// The bytes of every token.
#[derive(Debug)]
pub struct TokenTable {
    /// The bytes of all tokens one after another; token `i` is `ends[i - 1]..ends[i]`.
    bytes: Vec<u8>,
    ends: Vec<u32>,
    special: Vec<bool>,
}

impl TokenTable {
    /// The table of `tokenizer`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when its decoder is not `ByteLevel`, the only one whose tokens stand for the same bytes
    /// wherever they are; all Cohere checkpoints use it.
    pub fn of(tokenizer: &Tokenizer) -> Result<Self, Error> {
        let refuse = |reason: String| Error::Tokenizer { reason };
        match tokenizer.get_decoder() {
            Some(DecoderWrapper::ByteLevel(_)) => {}
            Some(other) => {
                let name = format!("{other:?}");
                let name = name.split(['(', ' ']).next().unwrap_or_default();
                return Err(refuse(format!("decoder `{name}` is not supported; use ByteLevel")));
            }
            None => return Err(refuse("has no decoder; ByteLevel is needed".to_owned())),
        }
        let added = tokenizer.get_added_tokens_decoder();
        let last = tokenizer.get_vocab(true).into_values().max().unwrap_or(0);
        let mut table = Self { bytes: Vec::new(), ends: Vec::new(), special: Vec::new() };
        for id in 0..=last {
            if let Some(token) = tokenizer.id_to_token(id) {
                push_bytes(&token, &mut table.bytes);
            }
            let end = u32::try_from(table.bytes.len()).map_err(|error| refuse(error.to_string()))?;
            table.ends.push(end);
            table.special.push(added.get(&id).is_some_and(|token| token.special));
        }
        Ok(table)
    }

    /// The table of the tokenizer in `json`, a `tokenizer.json`.
    ///
    /// # Errors
    /// As [`TokenTable::of`], and for a file that is not a tokenizer.
    pub fn read(json: &[u8]) -> Result<Self, Error> {
        let tokenizer =
            Tokenizer::from_bytes(json).map_err(|error| Error::Tokenizer { reason: error.to_string() })?;
        Self::of(&tokenizer)
    }

    /// How many ids there are, those without a token included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is no token.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The bytes token `id` stands for; nothing for an id the tokenizer does not have (a padded vocabulary).
    #[must_use]
    pub fn bytes(&self, id: TokenId) -> &[u8] {
        let index = id.0 as usize;
        let Some(&end) = self.ends.get(index) else { return &[] };
        let start = match index {
            0 => 0,
            _ => self.ends[index - 1],
        };
        &self.bytes[start as usize..end as usize]
    }

    /// Whether token `id` is a marker such as `<|END_TEXT|>`.
    #[must_use]
    pub fn is_special(&self, id: TokenId) -> bool {
        self.special.get(id.0 as usize).copied().unwrap_or(false)
    }

    /// The texts of all special tokens, in the order of their ids.
    pub fn special_tokens(&self) -> impl Iterator<Item = &str> {
        let special = (0..).map(TokenId).zip(&self.special).filter(|(_, special)| **special);
        special.filter_map(|(id, _)| std::str::from_utf8(self.bytes(id)).ok())
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

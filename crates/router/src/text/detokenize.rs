//! Token ids to text as they come, never splitting a character.

use types::TokenId;

use super::Tokenizer;

/// Turns one sequence's tokens into text piece by piece. The pieces together equal the decoding of all tokens at once
/// (invalid UTF-8 becomes U+FFFD in the same places), and the work per token depends on that token only.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    keep_special: bool,
    /// The beginning of a character whose end has not come: at most three bytes.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// Starts a sequence; `keep_special` keeps marker tokens in the text.
    #[must_use]
    pub fn new(keep_special: bool) -> Self {
        Self { keep_special, pending: Vec::new() }
    }

    /// Takes the next token and appends the text that is now certain, which may be none.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: TokenId, text: &mut String) {
        if !self.keep_special && tokenizer.is_special(id) {
            return;
        }
        let token = tokenizer.token_bytes(id);
        if self.pending.is_empty() {
            let left = append_valid(token, text);
            self.pending.extend_from_slice(left);
            return;
        }
        self.pending.extend_from_slice(token);
        let left = append_valid(&self.pending, text).len();
        let done = self.pending.len() - left;
        self.pending.drain(..done);
    }

    /// Ends the sequence: an unfinished character becomes U+FFFD.
    pub fn finish(&mut self, text: &mut String) {
        if !self.pending.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
            self.pending.clear();
        }
    }
}

/// Appends the characters of `bytes`, U+FFFD for each invalid sequence, and returns the unfinished character at the
/// end.
fn append_valid<'a>(mut bytes: &'a [u8], text: &mut String) -> &'a [u8] {
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        bytes = &bytes[chunk.valid().len()..];
        let invalid = chunk.invalid();
        if invalid.is_empty() {
            break;
        }
        let unfinished = std::str::from_utf8(bytes)
            .is_err_and(|error| error.valid_up_to() == 0 && error.error_len().is_none());
        if unfinished {
            break;
        }
        text.push(char::REPLACEMENT_CHARACTER);
        bytes = &bytes[invalid.len()..];
    }
    bytes
}

//! Tokenizing word by word with a memory of words: the same ids as the tokenizer's own, several times sooner.
//!
//! A byte-level BPE tokenizer cuts a text at its markers, then into words by a regular expression, and merges bytes
//! within one word only. So the ids of a word do not depend on what stands around it, and most words of a prompt have
//! been seen before.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

use regex::Regex;
use tokenizers::{ModelWrapper, NormalizerWrapper, PreTokenizerWrapper};
use types::TokenId;

/// The words of GPT-2's expression, which `ByteLevel` uses. Its lookahead, `\s+(?!\S)`, leaves the last blank of a run
/// to the word after it; [`Words::words`] does that.
const WORD: &str = r"^(?:'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+)";
/// Words that are remembered; when there are more, the memory begins anew.
const WORDS_MAX: usize = 1 << 16;
/// A longer word is hardly seen twice.
const WORD_BYTES_MAX: usize = 64;

/// What is known of a tokenizer whose words can be told from outside.
#[derive(Debug)]
pub(super) struct Words {
    markers: Option<(Regex, HashMap<String, TokenId>)>,
    word: Regex,
    /// Whether every digit is a word.
    digits: bool,
    /// Whether texts are brought into Unicode's form C first.
    composes: bool,
    known: RwLock<HashMap<Box<str>, Box<[TokenId]>>>,
}

impl Words {
    /// `None` for a tokenizer that cuts texts in another way than Cohere's do: it is asked about whole texts.
    pub(super) fn of(tokenizer: &tokenizers::Tokenizer) -> Option<Self> {
        let composes = match tokenizer.get_normalizer() {
            None => false,
            Some(NormalizerWrapper::NFC(_)) => true,
            Some(_) => return None,
        };
        let digits = digits_apart(tokenizer.get_pre_tokenizer()?)?;
        // With dropout a word has different ids each time.
        match tokenizer.get_model() {
            ModelWrapper::BPE(bpe) if bpe.dropout.is_none() => {}
            _ => return None,
        }
        let added = tokenizer.get_added_tokens_decoder();
        let plain = |token: &tokenizers::AddedToken| {
            !(token.normalized
                || token.lstrip
                || token.rstrip
                || token.single_word
                || token.content.is_empty())
        };
        if !added.values().all(plain) {
            return None;
        }
        let mut texts: Vec<&str> = added.values().map(|token| token.content.as_str()).collect();
        // The first alternative that matches is taken: the longest is to be.
        texts.sort_unstable_by_key(|text| std::cmp::Reverse(text.len()));
        let any = texts.iter().map(|text| regex::escape(text)).collect::<Vec<String>>().join("|");
        let ids = added.iter().map(|(id, token)| (token.content.clone(), TokenId(*id))).collect();
        let markers = match texts.is_empty() {
            true => None,
            false => Some((Regex::new(&any).ok()?, ids)),
        };
        Some(Self { markers, word: Regex::new(WORD).ok()?, digits, composes, known: RwLock::default() })
    }

    /// The token ids of `text`, no special tokens added.
    ///
    /// # Errors
    /// The tokenizer's own words when it cannot encode the text.
    pub(super) fn encode(
        &self,
        tokenizer: &tokenizers::Tokenizer,
        text: &str,
    ) -> Result<Vec<TokenId>, String> {
        // About four letters a token.
        let mut ids = Vec::with_capacity(text.len() / 4 + 8);
        let mut met: HashMap<&str, Vec<TokenId>> = HashMap::new();
        let mut rest = text;
        if let Some((markers, of)) = &self.markers {
            let mut from = 0;
            for marker in markers.find_iter(text) {
                self.piece(tokenizer, &text[from..marker.start()], &mut ids, &mut met)?;
                ids.extend(of.get(marker.as_str()));
                from = marker.end();
            }
            rest = &text[from..];
        }
        self.piece(tokenizer, rest, &mut ids, &mut met)?;
        self.remember(met);
        Ok(ids)
    }

    /// Appends the ids of a text without markers; words that were not known are put into `met`.
    fn piece<'a>(
        &self,
        tokenizer: &tokenizers::Tokenizer,
        piece: &'a str,
        ids: &mut Vec<TokenId>,
        met: &mut HashMap<&'a str, Vec<TokenId>>,
    ) -> Result<(), String> {
        if self.composes && !is_composed(piece) {
            ids.extend(encode(tokenizer, piece)?);
            return Ok(());
        }
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        for word in self.parts(piece).flat_map(|part| self.words(part)) {
            if let Some(of) = known.get(word) {
                ids.extend_from_slice(of);
            } else if let Some(of) = met.get(word) {
                ids.extend_from_slice(of);
            } else {
                let of = encode(tokenizer, word)?;
                ids.extend_from_slice(&of);
                if word.len() <= WORD_BYTES_MAX {
                    met.insert(word, of);
                }
            }
        }
        Ok(())
    }

    /// What is cut into words by itself: digits, where each is a word, and what is between them.
    fn parts<'a>(&self, piece: &'a str) -> impl Iterator<Item = &'a str> {
        let digits = self.digits;
        let mut rest = piece;
        std::iter::from_fn(move || {
            let first = rest.chars().next()?;
            let end = match rest.find(char::is_numeric).filter(|_| digits) {
                None => rest.len(),
                Some(0) => first.len_utf8(),
                Some(digit) => digit,
            };
            let (part, after) = rest.split_at(end);
            rest = after;
            Some(part)
        })
    }

    /// The words of a part, which together are the part.
    fn words<'a>(&self, part: &'a str) -> impl Iterator<Item = &'a str> {
        let mut rest = part;
        std::iter::from_fn(move || {
            // The alternatives cover every letter, so there is a match.
            let found = self.word.find(rest)?;
            let blank = found.as_str().chars().next_back().filter(|last| last.is_whitespace());
            let before = found.end() - blank.map_or(0, char::len_utf8);
            let end = if before == 0 || found.end() == rest.len() { found.end() } else { before };
            let (word, after) = rest.split_at(end);
            rest = after;
            Some(word)
        })
    }

    fn remember(&self, met: HashMap<&str, Vec<TokenId>>) {
        if met.is_empty() {
            return;
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        if known.len() + met.len() > WORDS_MAX {
            known.clear();
        }
        known.extend(met.into_iter().take(WORDS_MAX).map(|(word, ids)| (word.into(), ids.into())));
    }
}

fn encode(tokenizer: &tokenizers::Tokenizer, text: &str) -> Result<Vec<TokenId>, String> {
    let encoding = tokenizer.encode_fast(text, false).map_err(|error| error.to_string())?;
    Ok(encoding.get_ids().iter().map(|&id| TokenId(id)).collect())
}

/// Whether `cuts` into GPT-2's words, and whether digits are words of their own; `None` for any other way.
fn digits_apart(cuts: &PreTokenizerWrapper) -> Option<bool> {
    let is_words = |cuts: &PreTokenizerWrapper| match cuts {
        PreTokenizerWrapper::ByteLevel(level) => level.use_regex && !level.add_prefix_space,
        _ => false,
    };
    match cuts {
        PreTokenizerWrapper::Sequence(sequence) => match sequence.as_ref() {
            [PreTokenizerWrapper::Digits(digits), words] => {
                (digits.individual_digits && is_words(words)).then_some(true)
            }
            [words] => is_words(words).then_some(false),
            _ => None,
        },
        words => is_words(words).then_some(false),
    }
}

/// Whether Unicode's form C surely leaves `text` as it is: no letter of these ranges is changed by it or combines with
/// one before it. Latin, Cyrillic, dashes and quotation marks, kana, Chinese, Korean, pictures.
fn is_composed(text: &str) -> bool {
    text.is_ascii() || text.chars().all(|c| {
        matches!(u32::from(c), 0..=0x2FF | 0x400..=0x482 | 0x2010..=0x2027 | 0x3041..=0x3096 | 0x4E00..=0x9FFF
                | 0xAC00..=0xD7A3 | 0x1F300..=0x1FAFF)
    })
}

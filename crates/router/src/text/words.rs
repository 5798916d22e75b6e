//! Tokenizing word by word with a memory of words: the same ids as the tokenizer's own, several times sooner.
//!
//! A byte-level BPE tokenizer cuts a text at its markers, then into words by a regular expression, and merges bytes
//! within one word only. So the ids of a word do not depend on what stands around it, and most words of a prompt have
//! been seen before.

use std::sync::{PoisonError, RwLock};

use ahash::{HashMap, HashMapExt};
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
    /// The longest first.
    markers: Vec<(String, TokenId)>,
    /// Whether a marker begins with this byte.
    begins: Box<[bool; 256]>,
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
        let mut markers: Vec<(String, TokenId)> =
            added.iter().map(|(id, token)| (token.content.clone(), TokenId(*id))).collect();
        markers.sort_unstable_by_key(|(text, _)| std::cmp::Reverse(text.len()));
        let mut begins = Box::new([false; 256]);
        for first in markers.iter().filter_map(|(text, _)| text.bytes().next()) {
            begins[usize::from(first)] = true;
        }
        Some(Self {
            markers,
            begins,
            word: Regex::new(WORD).ok()?,
            digits,
            composes,
            known: RwLock::default(),
        })
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
        match self.encode_knowing(tokenizer, text, None)? {
            Some(ids) => Ok(ids),
            None => encode(tokenizer, text),
        }
    }

    /// As [`Words::encode`], but `None` for a text of which the library would have to be asked about more than
    /// `strangers_max` words, when that is given, or about a word of any length.
    ///
    /// # Errors
    /// The tokenizer's own words when it cannot encode the text.
    pub(super) fn encode_knowing(
        &self,
        tokenizer: &tokenizers::Tokenizer,
        text: &str,
        strangers_max: Option<usize>,
    ) -> Result<Option<Vec<TokenId>>, String> {
        // About four letters a token.
        let ids = Vec::with_capacity(text.len() / 4 + 8);
        let mut work = Work { tokenizer, ids, met: HashMap::new(), strangers_max };
        let whole = self.pieces(text, &mut work);
        let Work { ids, met, .. } = work;
        // Also what was not done to its end has taught something.
        self.remember(met);
        Ok(whole?.then_some(ids))
    }

    /// Works through a text; whether it came to its end.
    fn pieces<'a>(&self, text: &'a str, work: &mut Work<'_, 'a>) -> Result<bool, String> {
        let mut rest = text;
        while let Some((at, (marker, id))) = self.first_marker(rest) {
            if !self.piece(&rest[..at], work)? {
                return Ok(false);
            }
            work.ids.push(*id);
            rest = &rest[at + marker.len()..];
        }
        self.piece(rest, work)
    }

    /// The first marker in `text`, and where it begins; the longest of those that begin there.
    fn first_marker(&self, text: &str) -> Option<(usize, &(String, TokenId))> {
        let places = text.bytes().enumerate().filter(|&(_, byte)| self.begins[usize::from(byte)]);
        let marker =
            |rest: &[u8]| self.markers.iter().find(|(marker, _)| rest.starts_with(marker.as_bytes()));
        places.map(|(at, _)| at).find_map(|at| Some((at, marker(&text.as_bytes()[at..])?)))
    }

    /// Works through a text without markers; whether it came to its end.
    fn piece<'a>(&self, piece: &'a str, work: &mut Work<'_, 'a>) -> Result<bool, String> {
        if self.composes && !is_composed(piece) {
            if work.strangers_max.is_some() {
                return Ok(false);
            }
            work.ids.extend(encode(work.tokenizer, piece)?);
            return Ok(true);
        }
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        for word in self.parts(piece).flat_map(|part| self.words(part)) {
            if let Some(of) = known.get(word) {
                work.ids.extend_from_slice(of);
            } else if let Some(of) = work.met.get(word) {
                work.ids.extend_from_slice(of);
            } else if !work.stranger(word)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What is cut into words by itself: digits, where each is a word, and what is between them.
    fn parts<'a>(&self, piece: &'a str) -> impl Iterator<Item = &'a str> {
        let digits = self.digits;
        let mut rest = piece;
        std::iter::from_fn(move || {
            let first = rest.chars().next()?;
            let end = match digits.then(|| first_digit(rest)).flatten() {
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
            let end = if rest.is_empty() { return None } else { ascii_word(rest.as_bytes()) };
            let end = end.or_else(|| self.any_word(rest))?;
            let (word, after) = rest.split_at(end);
            rest = after;
            Some(word)
        })
    }

    /// The length of the first word of a text that is not empty, as the expression says.
    fn any_word(&self, text: &str) -> Option<usize> {
        // The alternatives cover every letter, so there is a match.
        let found = self.word.find(text)?;
        let blank = found.as_str().chars().next_back().filter(|last| last.is_whitespace());
        let before = found.end() - blank.map_or(0, char::len_utf8);
        Some(if before == 0 || found.end() == text.len() { found.end() } else { before })
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

/// A text on its way to ids.
struct Work<'t, 'a> {
    tokenizer: &'t tokenizers::Tokenizer,
    ids: Vec<TokenId>,
    /// Words that were not known before.
    met: HashMap<&'a str, Vec<TokenId>>,
    /// Words that the library may be asked about, if they are counted.
    strangers_max: Option<usize>,
}

impl<'a> Work<'_, 'a> {
    /// Asks the library about a word; whether that may be.
    fn stranger(&mut self, word: &'a str) -> Result<bool, String> {
        let long = word.len() > WORD_BYTES_MAX;
        if self.strangers_max.is_some_and(|max| long || self.met.len() >= max) {
            return Ok(false);
        }
        let of = encode(self.tokenizer, word)?;
        self.ids.extend_from_slice(&of);
        if !long {
            self.met.insert(word, of);
        }
        Ok(true)
    }
}

/// What kind of letter a byte of a text is, as far as words are concerned.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Letter {
    Alphabetic,
    Digit,
    Blank,
    Other,
    /// A part of a letter that is not ASCII.
    Wide,
}

const fn letter(byte: u8) -> Letter {
    match byte {
        b'a'..=b'z' | b'A'..=b'Z' => Letter::Alphabetic,
        b'0'..=b'9' => Letter::Digit,
        b'\t'..=b'\r' | b' ' => Letter::Blank,
        0x80.. => Letter::Wide,
        _ => Letter::Other,
    }
}

/// The length of the first word of `text`, as [`WORD`] says, when ASCII decides it. Most words are such, and the expression
/// takes several times as long.
fn ascii_word(text: &[u8]) -> Option<usize> {
    match text {
        [b'\'', b's' | b't' | b'm' | b'd', ..] => return Some(2),
        [b'\'', b'r' | b'v', b'e', ..] | [b'\'', b'l', b'l', ..] => return Some(3),
        _ => {}
    }
    let run = |from: usize, kind: Letter| {
        let end =
            text[from..].iter().position(|&byte| letter(byte) != kind).map_or(text.len(), |at| from + at);
        // A letter that is not ASCII may be of the same kind.
        text.get(end).is_none_or(|&byte| letter(byte) != Letter::Wide).then_some(end)
    };
    let from = usize::from(text.first() == Some(&b' '));
    match text.get(from).map(|&byte| letter(byte)) {
        Some(Letter::Wide) => None,
        Some(kind @ (Letter::Alphabetic | Letter::Digit | Letter::Other)) => run(from, kind),
        Some(Letter::Blank) | None => {
            let end = run(0, Letter::Blank)?;
            // The last blank of a run belongs to the word after it.
            Some(if end == text.len() || end == 1 { end } else { end - 1 })
        }
    }
}

/// Where the first letter of `text` is that counts as a digit.
fn first_digit(text: &str) -> Option<usize> {
    let mut from = 0;
    loop {
        let at = text.as_bytes()[from..].iter().position(|byte| byte.is_ascii_digit() || !byte.is_ascii())?;
        let wide = text[from + at..].chars().next()?;
        if wide.is_numeric() {
            return Some(from + at);
        }
        from += at + wide.len_utf8();
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

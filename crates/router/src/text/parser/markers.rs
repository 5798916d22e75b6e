//! The markers of a tokenizer, looked up by their text: their ids differ between generations of checkpoints.

use std::collections::BTreeMap;

use grammar::{Begin, Marks};
use types::TokenId;

use crate::Error;
use crate::text::Tokenizer;

/// What a marker does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    StartThinking,
    EndThinking,
    StartText,
    EndText,
    StartAction,
    EndAction,
    /// A border between turns.
    Turn,
    /// Any other special token: it does nothing and never shows.
    Other,
}

/// Marker texts by what they do. Newer checkpoints write TEXT where older ones write RESPONSE.
const KINDS: [(&str, Kind); 12] = [
    ("<|START_THINKING|>", Kind::StartThinking),
    ("<|END_THINKING|>", Kind::EndThinking),
    ("<|START_TEXT|>", Kind::StartText),
    ("<|END_TEXT|>", Kind::EndText),
    ("<|START_RESPONSE|>", Kind::StartText),
    ("<|END_RESPONSE|>", Kind::EndText),
    ("<|START_ACTION|>", Kind::StartAction),
    ("<|END_ACTION|>", Kind::EndAction),
    ("<|START_OF_TURN_TOKEN|>", Kind::Turn),
    ("<|END_OF_TURN_TOKEN|>", Kind::Turn),
    ("<|CHATBOT_TOKEN|>", Kind::Turn),
    ("<EOS_TOKEN>", Kind::Turn),
];
/// A tokenizer with this marker is of Cohere's chat format, and needs the others.
const OF_COHERE: &str = "<|START_OF_TURN_TOKEN|>";
const NEEDED: [&str; 5] =
    ["<|END_OF_TURN_TOKEN|>", "<|START_THINKING|>", "<|END_THINKING|>", "<|START_ACTION|>", "<|END_ACTION|>"];
const NEEDED_PAIRS: [[&str; 2]; 2] =
    [["<|START_TEXT|>", "<|END_TEXT|>"], ["<|START_RESPONSE|>", "<|END_RESPONSE|>"]];

/// What the beginning of a text holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// No marker and no beginning of one.
    Nothing,
    /// From `at` to its end, the text is a proper prefix of a marker.
    Perhaps { at: usize },
    /// The first marker is `at..end`.
    Marker { at: usize, end: usize, kind: Kind },
}

/// The markers of one tokenizer.
#[derive(Debug, Default)]
pub struct Markers {
    /// Sorted, and none is a prefix of another.
    texts: Vec<(String, Kind)>,
    /// Whether a marker begins with this byte.
    begins: Vec<bool>,
    /// Whether a marker ends with this byte.
    ends: Vec<bool>,
    /// Bytes of the longest.
    longest: usize,
    structural: BTreeMap<TokenId, Kind>,
    /// Those that an answer's form is made of.
    marks: Option<Marks>,
}

impl Markers {
    /// Looks up the markers of `tokenizer`. One that is not of Cohere's chat format has none.
    ///
    /// # Errors
    /// [`Error::File`] naming a marker that is missing from a tokenizer of Cohere's chat format.
    pub fn of(tokenizer: &Tokenizer) -> Result<Self, Error> {
        if tokenizer.id_of(OF_COHERE).is_none() {
            return Ok(Self::default());
        }
        let missing = |text: &str| tokenizer.id_of(text).is_none();
        if let Some(text) = NEEDED.iter().find(|text| missing(text)) {
            return Err(lacks(text));
        }
        if NEEDED_PAIRS.iter().all(|pair| pair.iter().any(|text| missing(text))) {
            return Err(lacks("<|START_TEXT|> and <|END_TEXT|>, or <|START_RESPONSE|> and <|END_RESPONSE|>"));
        }
        let mut structural = BTreeMap::new();
        let mut texts = BTreeMap::new();
        for text in tokenizer.special_tokens() {
            texts.insert(text.to_owned(), Kind::Other);
        }
        for (text, kind) in KINDS {
            if let Some(id) = tokenizer.id_of(text) {
                structural.insert(id, kind);
                texts.insert(text.to_owned(), kind);
            }
        }
        Ok(Self { marks: marks(tokenizer), ..Self::new(texts, structural) })
    }

    fn new(sorted: BTreeMap<String, Kind>, structural: BTreeMap<TokenId, Kind>) -> Self {
        let mut texts: Vec<(String, Kind)> = Vec::with_capacity(sorted.len());
        for (text, kind) in sorted {
            let covered = texts.last().is_some_and(|(before, _)| text.starts_with(before.as_str()));
            if !text.is_empty() && !covered {
                texts.push((text, kind));
            }
        }
        let (mut begins, mut ends) = (vec![false; 256], vec![false; 256]);
        let bytes = || texts.iter().map(|(text, _)| text.as_bytes());
        for (first, last) in bytes().filter_map(|bytes| bytes.first().zip(bytes.last())) {
            begins[usize::from(*first)] = true;
            ends[usize::from(*last)] = true;
        }
        let longest = bytes().map(<[u8]>::len).max().unwrap_or_default();
        Self { texts, begins, ends, longest, structural, marks: None }
    }

    #[cfg(test)]
    pub(super) fn of_texts<const N: usize>(texts: [&str; N]) -> Self {
        Self::new(texts.map(|text| (text.to_owned(), Kind::Other)).into(), BTreeMap::new())
    }

    /// Whether a marker ends with `byte`.
    pub(super) fn ends_with(&self, byte: u8) -> bool {
        self.ends.get(usize::from(byte)).copied().unwrap_or_default()
    }

    /// Whether `text` ends with a marker.
    pub(super) fn is_complete(&self, text: &str) -> bool {
        let last = text.as_bytes().last();
        last.is_some_and(|&last| self.ends_with(last))
            && self.texts.iter().any(|(marker, _)| text.ends_with(marker.as_str()))
    }

    /// Bytes of the longest marker.
    pub(super) const fn longest(&self) -> usize {
        self.longest
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }

    /// The markers that an answer's form is made of; `None` for a tokenizer that is not of Cohere's chat format.
    pub(in crate::text) const fn marks(&self) -> Option<&Marks> {
        self.marks.as_ref()
    }

    /// Where a prompt leaves the model.
    pub(in crate::text) fn begin_behind(&self, prompt: &[TokenId]) -> Begin {
        match self.last_in(prompt) {
            None | Some(Kind::StartAction | Kind::Other) => Begin::Plain,
            Some(Kind::StartThinking) => Begin::Thinking,
            Some(Kind::StartText) => Begin::Text,
            Some(Kind::EndThinking | Kind::EndText | Kind::EndAction) => Begin::Answer,
            Some(Kind::Turn) => Begin::Turn,
        }
    }

    /// The last structural marker among `tokens`.
    pub(super) fn last_in(&self, tokens: &[TokenId]) -> Option<Kind> {
        tokens.iter().rev().find_map(|id| self.structural.get(id).copied())
    }

    /// The first marker in `text`, or the beginning of one at its end.
    pub(super) fn first_in(&self, text: &str) -> Found {
        if self.is_empty() {
            return Found::Nothing;
        }
        for (at, _) in text.bytes().enumerate().filter(|&(_, byte)| self.begins[usize::from(byte)]) {
            // A marker's first byte begins a character, so this is a character's border.
            let Some(rest) = text.get(at..) else { continue };
            let next = self.texts.partition_point(|(marker, _)| marker.as_str() <= rest);
            if let Some((marker, kind)) = next.checked_sub(1).map(|last| &self.texts[last])
                && rest.starts_with(marker.as_str())
            {
                return Found::Marker { at, end: at + marker.len(), kind: *kind };
            }
            if self.texts.get(next).is_some_and(|(marker, _)| marker.starts_with(rest)) {
                return Found::Perhaps { at };
            }
        }
        Found::Nothing
    }
}

/// The pairs of markers around the parts of an answer, those of both generations where a tokenizer has both.
fn marks(tokenizer: &Tokenizer) -> Option<Marks> {
    let pair = |[start, end]: [&str; 2]| Some([tokenizer.id_of(start)?, tokenizer.id_of(end)?]);
    Some(Marks {
        thinking: pair(["<|START_THINKING|>", "<|END_THINKING|>"])?,
        text: NEEDED_PAIRS.into_iter().filter_map(pair).collect(),
        action: pair(["<|START_ACTION|>", "<|END_ACTION|>"])?,
    })
}

fn lacks(what: &str) -> Error {
    let reason = format!("has {OF_COHERE} and lacks {what}, which answers are taken apart by");
    Error::File { file: "tokenizer.json", reason }
}

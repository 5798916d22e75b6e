//! Stop strings in streamed text: found wherever tokens are cut, held back before they are certain, never leaked.

/// A stop string that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Matched {
    /// The stop string.
    pub stop: String,
}

/// Watches one sequence's text for stop strings. The one that is complete first ends it; of several complete at the
/// same character, the longest. The result does not depend on how the text is cut into pieces.
#[derive(Debug, Clone)]
pub struct StopStrings {
    patterns: Vec<Pattern>,
    /// The end of the text that may yet become a stop string: always a prefix of one.
    held: String,
}

impl StopStrings {
    /// Watches for each of `stop`; empty strings never match.
    #[must_use]
    pub fn new(stop: Vec<String>) -> Self {
        let patterns = stop.into_iter().filter(|text| !text.is_empty()).map(Pattern::new).collect();
        Self { patterns, held: String::new() }
    }

    /// Takes more text and appends to `out` what can be shown. On a match, `out` ends just before the stop string and
    /// the rest of `text` is dropped; nothing may be pushed after that.
    pub fn push(&mut self, text: &str, out: &mut String) -> Option<Matched> {
        if self.patterns.is_empty() {
            out.push_str(text);
            return None;
        }
        for (index, byte) in text.bytes().enumerate() {
            if let Some(pattern) = self.advance(byte) {
                let (length, stop) = (pattern.text.len(), pattern.text.clone());
                self.held.push_str(&text[..=index]);
                out.push_str(&self.held[..self.held.len() - length]);
                self.held.clear();
                return Some(Matched { stop });
            }
        }
        self.held.push_str(text);
        // A partial match begins where a stop string begins, so this cut is between characters.
        let keep = self.patterns.iter().map(|pattern| pattern.matched).max().unwrap_or(0);
        let shown = self.held.len() - keep;
        out.push_str(&self.held[..shown]);
        self.held.drain(..shown);
        None
    }

    /// Ends the text: what was held back was no stop string after all.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    /// Takes one byte; returns the longest pattern it completes.
    fn advance(&mut self, byte: u8) -> Option<&Pattern> {
        for pattern in &mut self.patterns {
            pattern.advance(byte);
        }
        let complete = self.patterns.iter().filter(|pattern| pattern.matched == pattern.text.len());
        complete.max_by_key(|pattern| pattern.text.len())
    }
}

/// One stop string as a Knuth–Morris–Pratt automaton: constant work per byte on average, whatever the text.
#[derive(Debug, Clone)]
struct Pattern {
    text: String,
    /// `border[i]`: length of the longest proper prefix of `text[..=i]` that is also its suffix.
    border: Vec<usize>,
    /// Bytes of `text` that the end of the input matches.
    matched: usize,
}

impl Pattern {
    fn new(text: String) -> Self {
        let bytes = text.as_bytes();
        let mut border = vec![0; bytes.len()];
        let mut length = 0;
        for at in 1..bytes.len() {
            while length > 0 && bytes[at] != bytes[length] {
                length = border[length - 1];
            }
            if bytes[at] == bytes[length] {
                length += 1;
            }
            border[at] = length;
        }
        Self { text, border, matched: 0 }
    }

    fn advance(&mut self, byte: u8) {
        let text = self.text.as_bytes();
        if self.matched == text.len() {
            self.matched = self.border[self.matched - 1];
        }
        while self.matched > 0 && text[self.matched] != byte {
            self.matched = self.border[self.matched - 1];
        }
        if text[self.matched] == byte {
            self.matched += 1;
        }
    }
}

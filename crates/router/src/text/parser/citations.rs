//! Citations in a text: `<co>span</co: 0:[1,2],1:[0]>` says that `span` rests on the results 1 and 2 of tool call 0 and
//! on result 0 of tool call 1. The tags are taken out while the text streams.

use super::guard::Guard;
use super::markers::Markers;

const OPEN: &str = "<co>";
const CLOSE: &str = "</co: ";
/// A closing tag longer than this is text.
const CLOSE_BYTES_MAX: usize = 4096;

/// Which part of an answer a citation is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cited {
    /// What is said.
    Text,
    /// What was thought before.
    Reasoning,
}

/// A span of a text and what it rests on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Citation {
    /// The part whose characters are counted.
    pub part: Cited,
    /// Its first character.
    pub start: u32,
    /// The character after its last.
    pub end: u32,
    /// The span itself.
    pub text: String,
    /// In the order the model wrote them.
    pub sources: Vec<CitedSource>,
}

/// Results of one tool call. Injected documents are results too, of a call before all others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CitedSource {
    /// Counts the calls of the conversation from 0.
    pub call: u32,
    /// Results of that call, counted from 0.
    pub results: Vec<u32>,
}

/// Where one part of an answer goes: its text and what it cites.
pub(super) struct Out<'a> {
    pub(super) markers: &'a Markers,
    pub(super) text: &'a mut String,
    pub(super) citations: &'a mut Vec<Citation>,
}

impl Out<'_> {
    /// Adds to the text; returns what the guard has let through.
    pub(super) fn say(&mut self, more: &str, guard: &mut Guard) -> &str {
        let before = self.text.len();
        guard.push(self.markers, more, self.text);
        &self.text[before..]
    }
}

/// Takes the tags out of one part of an answer.
#[derive(Debug, Clone)]
pub(super) struct Citations {
    part: Cited,
    /// Characters handed out.
    characters: u32,
    /// The span that is open: where it began and what it holds so far.
    open: Option<(u32, String)>,
    /// The end of the input that may become a tag.
    held: String,
}

impl Citations {
    pub(super) const fn new(part: Cited) -> Self {
        Self { part, characters: 0, open: None, held: String::new() }
    }

    /// Takes more of the part; appends its text and the citations that are complete.
    pub(super) fn push(&mut self, more: &str, guard: &mut Guard, out: &mut Out<'_>) {
        let mut input = std::mem::take(&mut self.held);
        input.push_str(more);
        let mut rest = input.as_str();
        while let Some(at) = rest.find('<') {
            self.plain(&rest[..at], guard, out);
            rest = &rest[at..];
            let tag = if self.open.is_some() { CLOSE } else { OPEN };
            if tag.len() > rest.len() && tag.starts_with(rest) {
                rest.clone_into(&mut self.held);
                return;
            }
            if !rest.starts_with(tag) {
                // No tag begins here: the character is text.
                self.plain(&rest[..1], guard, out);
                rest = &rest[1..];
                continue;
            }
            match self.open.take() {
                None => {
                    self.open = Some((self.characters, String::new()));
                    rest = &rest[OPEN.len()..];
                }
                Some(open) => match rest.find('>') {
                    Some(end) => {
                        out.citations.extend(self.cited(open, &rest[CLOSE.len()..end]));
                        rest = &rest[end + 1..];
                    }
                    None => {
                        self.open = Some(open);
                        if rest.len() <= CLOSE_BYTES_MAX {
                            rest.clone_into(&mut self.held);
                            return;
                        }
                        self.plain(&rest[..1], guard, out);
                        rest = &rest[1..];
                    }
                },
            }
        }
        self.plain(rest, guard, out);
    }

    /// Ends the part. A tag that was cut off does not show; a lone `<` does.
    pub(super) fn finish(&mut self, guard: &mut Guard, out: &mut Out<'_>) {
        let held = std::mem::take(&mut self.held);
        if held.len() < OPEN.len() - 1 {
            self.plain(&held, guard, out);
        }
        self.open = None;
    }

    /// Counts text of the part that was handed out without looking for tags.
    pub(super) fn pass_over(&mut self, text: &str) {
        let characters = u32::try_from(text.chars().count()).unwrap_or(u32::MAX);
        self.characters = self.characters.saturating_add(characters);
    }

    fn plain(&mut self, more: &str, guard: &mut Guard, out: &mut Out<'_>) {
        let said = out.say(more, guard);
        self.pass_over(said);
        if let Some((_, span)) = &mut self.open {
            span.push_str(said);
        }
    }

    /// The citation of a span; none when its sources cannot be read.
    fn cited(&self, (start, text): (u32, String), sources: &str) -> Option<Citation> {
        let sources = read_sources(sources)?;
        Some(Citation { part: self.part, start, end: self.characters, text, sources })
    }
}

/// `0:[1,2],1:[0]`, with blanks anywhere between.
fn read_sources(text: &str) -> Option<Vec<CitedSource>> {
    let mut sources = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let (call, after) = rest.split_once(':')?;
        let (results, after) = after.trim_start().strip_prefix('[')?.split_once(']')?;
        let numbers = results.split(',').map(str::trim).filter(|number| !number.is_empty());
        let results = numbers.map(|number| number.parse().ok()).collect::<Option<Vec<u32>>>()?;
        sources.push(CitedSource { call: call.trim().parse().ok()?, results });
        let after = after.trim_start();
        rest = match after.strip_prefix(',') {
            Some(next) => next.trim_start(),
            None if after.is_empty() => after,
            None => return None,
        };
    }
    (!sources.is_empty()).then_some(sources)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pieces: &[&str]) -> (String, Vec<Citation>) {
        let (mut text, mut found, mut guard) = (String::new(), Vec::new(), Guard::default());
        let markers = Markers::of_texts(["<END>"]);
        let mut out = Out { markers: &markers, text: &mut text, citations: &mut found };
        let mut citations = Citations::new(Cited::Text);
        for piece in pieces {
            citations.push(piece, &mut guard, &mut out);
        }
        citations.finish(&mut guard, &mut out);
        (text, found)
    }

    #[test]
    fn tags_are_taken_out_wherever_the_text_is_cut() {
        let whole = "Ö <co>wörld is</co: 0:[1,2], 1:[0]> nice, 1 < 2 <b> <co>x</co: 0:[0]>.";
        let expected = read(&[whole]);
        assert_eq!(expected.0, "Ö wörld is nice, 1 < 2 <b> x.");
        let first = &expected.1[0];
        assert_eq!((first.start, first.end, first.text.as_str()), (2, 10, "wörld is"));
        let second = CitedSource { call: 1, results: vec![0] };
        assert_eq!(first.sources, [CitedSource { call: 0, results: vec![1, 2] }, second]);
        assert_eq!(expected.1.len(), 2);
        for at in (1..whole.len()).filter(|&at| whole.is_char_boundary(at)) {
            assert_eq!(read(&[&whole[..at], &whole[at..]]), expected, "cut at {at}");
        }
        let characters: Vec<String> = whole.chars().map(String::from).collect();
        assert_eq!(read(&characters.iter().map(String::as_str).collect::<Vec<_>>()), expected);
    }

    #[test]
    fn what_is_left_out_is_not_counted() {
        let (text, found) = read(&["<EN<co>D></co: 0:[0]> <co>so</co: 0:[0]>"]);
        assert_eq!(text, "<END so");
        let places: Vec<_> = found.iter().map(|one| (one.start, one.end, one.text.as_str())).collect();
        assert_eq!(places, [(3, 4, "D"), (5, 7, "so")]);
    }

    #[test]
    fn what_is_no_citation_is_text_or_nothing() {
        assert_eq!(read(&["a</co: 0:[0]> b"]).0, "a</co: 0:[0]> b");
        let (text, found) = read(&["a <co>b</co: zz> c <co>open"]);
        assert_eq!((text.as_str(), found.len()), ("a b c open", 0));
        assert_eq!(read(&["cut <co>x</co: 0:["]).0, "cut x");
        assert_eq!(read(&["Vec<"]).0, "Vec<");
        let long = format!("<co>x</co: {}", "1".repeat(CLOSE_BYTES_MAX));
        assert_eq!(read(&[&long]).0, long[OPEN.len()..]);
    }
}

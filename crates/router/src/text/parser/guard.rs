//! The last look at what a caller reads: no marker is ever complete in it.
//!
//! Markers are taken out before. But what stands on both sides of one that was taken out, or of a citation's tag, may be a
//! marker together (`<|E<CLS>ND_TEXT|>`). The model has not written that one, so it does nothing; but sent back as a part
//! of the conversation it would be one. Its last letter is left out.

use super::markers::Markers;

/// Watches over one part of an answer.
#[derive(Debug, Clone, Default)]
pub(super) struct Guard {
    /// The end of what was said, at least as long as any marker but its last letter.
    tail: String,
}

impl Guard {
    /// Appends `more` to `out`, but for the letters that would complete a marker. What comes out does not depend on how
    /// the part is cut into pieces.
    pub(super) fn push(&mut self, markers: &Markers, more: &str, out: &mut String) {
        if markers.is_empty() {
            return out.push_str(more);
        }
        if !more.bytes().any(|byte| markers.ends_with(byte)) {
            self.tail.push_str(more);
            out.push_str(more);
        } else {
            for letter in more.chars() {
                self.tail.push(letter);
                match markers.is_complete(&self.tail) {
                    true => _ = self.tail.pop(),
                    false => out.push(letter),
                }
            }
        }
        let over = self.tail.len().saturating_sub(markers.longest());
        if over > markers.longest() {
            let from = (over..).find(|&at| self.tail.is_char_boundary(at)).unwrap_or(over);
            self.tail.drain(..from);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_was_said_completes_a_marker() {
        let markers = Markers::of_texts(["<|END|>", "<A>", "x\u{e9}"]);
        let said = |pieces: &[&str]| {
            let (mut guard, mut out) = (Guard::default(), String::new());
            for piece in pieces {
                guard.push(&markers, piece, &mut out);
            }
            out
        };
        assert_eq!(said(&["1 > 0, <B>, x\u{e8}"]), "1 > 0, <B>, x\u{e8}");
        assert_eq!(said(&["a<|E", "ND|>b"]), "a<|END|b");
        assert_eq!(said(&["<|END", "|>>>", "<", "A>>"]), "<|END|<A");
        assert_eq!(said(&["x", "\u{e9}y"]), "xy");
        let long = "<".repeat(1000);
        assert_eq!(said(&[&long, "A>."]), format!("{long}A."));
    }
}

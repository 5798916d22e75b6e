//! What rows of other sub-groups may draw, when a grammar says so. The grammars are followed at the leader alone.
//!
//! ```text
//! magic "CM", version u8,
//! step, row count, then of each such row:
//!   logit row of the step, 0 (anything), 1 (nothing) or 2 with a word count and that many words, u32 little-endian,
//! CRC-32 of all of the above, u32 little-endian
//! ```

use types::TokenMask;

use crate::Error;
use crate::wire::{MASKS, Reader, open, put, seal, start, within};

const WORD_BYTES: usize = size_of::<u32>();

/// What the guided rows of a step may draw.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Masks {
    /// The step; 0 when it is none.
    pub step: u64,
    /// Logit rows of the step, ascending, and what they may draw. Any other row may draw anything.
    pub rows: Vec<(u32, Allowed)>,
}

/// The tokens one row may draw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Allowed {
    /// Whatever the request's own rules allow.
    Any,
    /// None: the grammar could not be followed.
    Nothing,
    /// These.
    Of(TokenMask),
}

impl Masks {
    /// What logit row `row` may draw.
    #[must_use]
    pub fn of(&self, row: u32) -> &Allowed {
        self.rows.binary_search_by_key(&row, |entry| entry.0).map_or(&Allowed::Any, |at| &self.rows[at].1)
    }

    /// Appends the masks to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let begin = start(out, MASKS);
        put(out, self.step);
        put(out, self.rows.len() as u64);
        for (row, allowed) in &self.rows {
            put(out, (*row).into());
            match allowed {
                Allowed::Any => put(out, 0),
                Allowed::Nothing => put(out, 1),
                Allowed::Of(mask) => {
                    put(out, 2);
                    put(out, mask.words().len() as u64);
                    out.extend(mask.words().iter().flat_map(|word| word.to_le_bytes()));
                }
            }
        }
        seal(out, begin);
    }

    /// Reads masks that fill `bytes`.
    ///
    /// # Errors
    /// As [`crate::StepPlan::decode`].
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        open(bytes, MASKS, read)
    }
}

fn read(reader: &mut Reader<'_>) -> Result<Masks, Error> {
    let step = reader.number("the step number", u64::MAX)?;
    let mut rows: Vec<(u32, Allowed)> = Vec::new();
    for _ in 0..reader.count("rows")? {
        let row = reader.small("a row")?;
        let least = rows.last().map_or(0, |last| u64::from(last.0) + 1);
        within("a row", row.into(), least, u32::MAX.into())?;
        let allowed = match reader.number("what a row may draw", 2)? {
            0 => Allowed::Any,
            1 => Allowed::Nothing,
            _ => {
                let words = reader.count("words")? as usize;
                let bytes = reader.take("a mask", words * WORD_BYTES)?;
                let word = |bytes: &[u8; WORD_BYTES]| u32::from_le_bytes(*bytes);
                Allowed::Of(TokenMask::from_words(bytes.as_chunks().0.iter().map(word).collect()))
            }
        };
        rows.push((row, allowed));
    }
    Ok(Masks { step, rows })
}

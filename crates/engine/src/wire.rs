//! Step plans, and the tokens they refer to, as bytes.
//!
//! ```text
//! magic "CP", version u8,
//! step, released count, released slots,
//! sequence count, then of each sequence:
//!   slot, start, rows, logit rows, dropped, new full blocks, new sliding blocks,
//!   inputs (token × 2, or logit row of the step before × 2 + 1), block ids,
//! CRC-32 of all of the above, u32 little-endian
//!
//! magic "CT", version u8,
//! step, row count, then of each logit row the token + 1, or 0 when none was drawn,
//! CRC-32 likewise
//! ```
//! `briefing.rs` and `masks.rs` have two frames more, for groups of several sub-groups.
//! Numbers are LEB128 (7 bits a byte, low bits first): a sequence in steady decode takes about ten bytes.

use types::limits::CONTEXT_TOKENS_MAX;
use types::{BlockId, Position, SlotId, TokenId};

use crate::plan::SequenceEntry;
use crate::{Briefing, Drawn, Error, Input, Masks, StepPlan};

/// Version of the encoding. Ranks of one group run the same build, so there is no need to read older ones.
pub const PLAN_VERSION: u8 = 3;

const PLAN: [u8; 2] = *b"CP";
const DRAWN: [u8; 2] = *b"CT";
pub(crate) const BRIEFING: [u8; 2] = *b"CW";
pub(crate) const MASKS: [u8; 2] = *b"CM";
const HEADER_BYTES: usize = PLAN.len() + 1;
const CHECKSUM_BYTES: usize = size_of::<u32>();

impl StepPlan {
    /// Appends the plan to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let begin = start(out, PLAN);
        put(out, self.step);
        put(out, self.released.len() as u64);
        for slot in &self.released {
            put(out, slot.0.into());
        }
        put(out, self.sequences.len() as u64);
        for (entry, sequence) in self.sequences.iter().zip(self.sequences()) {
            let SequenceEntry { slot, start, rows, logit_rows, dropped, new_blocks: [full, sliding] } =
                *entry;
            for number in [slot.0, start.0, rows, logit_rows, dropped, full, sliding] {
                put(out, number.into());
            }
            for input in sequence.inputs {
                put(out, number(*input));
            }
            for block in sequence.new_blocks.into_iter().flatten() {
                put(out, block.0.into());
            }
        }
        seal(out, begin);
    }

    /// Reads a plan that fills `bytes`.
    ///
    /// # Errors
    /// When the bytes are not a plan of this version, whole and unharmed. Memory in proportion to their length is
    /// used at most, whatever they say.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        open(bytes, PLAN, |reader| reader.plan())
    }
}

impl Drawn {
    /// Appends the tokens to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let begin = start(out, DRAWN);
        put(out, self.step);
        put(out, self.tokens.len() as u64);
        for token in &self.tokens {
            put(out, token.map_or(0, |token| u64::from(token.0) + 1));
        }
        seal(out, begin);
    }

    /// Reads tokens that fill `bytes`.
    ///
    /// # Errors
    /// As [`StepPlan::decode`].
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        open(bytes, DRAWN, |reader| reader.drawn())
    }
}

/// What a leader sends its followers.
#[derive(Debug, Clone, PartialEq)]
pub enum Frame {
    /// The next step.
    Plan(StepPlan),
    /// What a step drew. It comes when the step has run, so that may be after the next step's plan.
    Drawn(Drawn),
    /// How other sub-groups sample the rows of the plan that came before it.
    Briefing(Briefing),
    /// What those rows may draw that a grammar limits; sent while the step runs.
    Masks(Masks),
}

impl Frame {
    /// Reads whichever of them fills `bytes`.
    ///
    /// # Errors
    /// As [`StepPlan::decode`].
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        match bytes.first_chunk() {
            Some(&DRAWN) => Drawn::decode(bytes).map(Self::Drawn),
            Some(&BRIEFING) => Briefing::decode(bytes).map(Self::Briefing),
            Some(&MASKS) => Masks::decode(bytes).map(Self::Masks),
            _ => StepPlan::decode(bytes).map(Self::Plan),
        }
    }
}

/// Begins a frame; where it begins.
pub(crate) fn start(out: &mut Vec<u8>, magic: [u8; 2]) -> usize {
    let begin = out.len();
    out.extend_from_slice(&magic);
    out.push(PLAN_VERSION);
    begin
}

/// Ends the frame that began at `begin`.
pub(crate) fn seal(out: &mut Vec<u8>, begin: usize) {
    let checksum = crc32fast::hash(&out[begin..]);
    out.extend_from_slice(&checksum.to_le_bytes());
}

/// Checks what encloses a frame and lets `read` read the rest.
pub(crate) fn open<T>(
    bytes: &[u8],
    magic: [u8; 2],
    read: fn(&mut Reader<'_>) -> Result<T, Error>,
) -> Result<T, Error> {
    let Some((body, stated)) = bytes.split_last_chunk::<CHECKSUM_BYTES>() else {
        return Err(Error::PlanTruncated { field: "the checksum", len: bytes.len() });
    };
    let stated = u32::from_le_bytes(*stated);
    let computed = crc32fast::hash(body);
    if computed != stated {
        return Err(Error::PlanChecksum { computed, stated });
    }
    let Some(([m0, m1, version], rest)) = body.split_first_chunk::<HEADER_BYTES>() else {
        return Err(Error::PlanTruncated { field: "the header", len: bytes.len() });
    };
    let expected = u16::from_be_bytes(magic).into();
    within("the magic number", u16::from_be_bytes([*m0, *m1]).into(), expected, expected)?;
    if *version != PLAN_VERSION {
        return Err(Error::PlanVersion { got: *version, expected: PLAN_VERSION });
    }
    let mut reader = Reader { rest, len: bytes.len() };
    let content = read(&mut reader)?;
    match reader.rest.len() {
        0 => Ok(content),
        extra => Err(Error::PlanTrailing { extra }),
    }
}

fn number(input: Input) -> u64 {
    match input {
        Input::Known(token) => u64::from(token.0) << 1,
        Input::Drawn { row } => u64::from(row) << 1 | 1,
    }
}

pub(crate) fn put(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

pub(crate) fn within(field: &'static str, got: u64, min: u64, max: u64) -> Result<(), Error> {
    if (min..=max).contains(&got) { Ok(()) } else { Err(Error::PlanField { field, got, min, max }) }
}

pub(crate) struct Reader<'a> {
    rest: &'a [u8],
    /// Bytes of the whole plan, for errors.
    len: usize,
}

impl Reader<'_> {
    fn plan(&mut self) -> Result<StepPlan, Error> {
        let mut plan = StepPlan { step: self.number("the step number", u64::MAX)?, ..StepPlan::default() };
        let released = self.count("released slots")?;
        for _ in 0..released {
            plan.released.push(SlotId(self.small("a released slot")?));
        }
        let sequences = self.count("sequences")?;
        for _ in 0..sequences {
            self.sequence(&mut plan)?;
        }
        Ok(plan)
    }

    fn drawn(&mut self) -> Result<Drawn, Error> {
        let mut drawn = Drawn { step: self.number("the step number", u64::MAX)?, tokens: Vec::new() };
        for _ in 0..self.count("rows")? {
            let number = self.number("a token", u64::from(u32::MAX) + 1)?;
            drawn.tokens.push(number.checked_sub(1).map(|token| TokenId(token as u32)));
        }
        Ok(drawn)
    }

    /// The next `bytes` as they are.
    pub(crate) fn take(&mut self, field: &'static str, bytes: usize) -> Result<&[u8], Error> {
        let Some((taken, rest)) = self.rest.split_at_checked(bytes) else {
            return Err(Error::PlanTruncated { field, len: self.len });
        };
        self.rest = rest;
        Ok(taken)
    }

    fn sequence(&mut self, plan: &mut StepPlan) -> Result<(), Error> {
        let slot = SlotId(self.small("a slot")?);
        let start = self.small("a start position")?;
        let rows = self.small("a number of rows")?;
        within("a number of rows", rows.into(), 1, CONTEXT_TOKENS_MAX.into())?;
        within("an end position", u64::from(start) + u64::from(rows), 1, CONTEXT_TOKENS_MAX.into())?;
        let logit_rows = self.small("a number of logit rows")?;
        within("a number of logit rows", logit_rows.into(), 0, rows.into())?;
        let dropped = self.small("a number of dropped blocks")?;
        let new_blocks = [self.count("new full blocks")?, self.count("new sliding blocks")?];
        for _ in 0..rows {
            let number = self.number("a token or row", u64::from(u32::MAX) << 1 | 1)?;
            let half = (number >> 1) as u32;
            plan.inputs.push(match number & 1 {
                0 => Input::Known(TokenId(half)),
                _ => Input::Drawn { row: half },
            });
        }
        for _ in 0..u64::from(new_blocks[0]) + u64::from(new_blocks[1]) {
            plan.blocks.push(BlockId(self.small("a block")?));
        }
        let start = Position(start);
        plan.sequences.push(SequenceEntry { slot, start, rows, logit_rows, dropped, new_blocks });
        Ok(())
    }

    /// A number of things to come, each of which takes at least a byte.
    pub(crate) fn count(&mut self, field: &'static str) -> Result<u32, Error> {
        let count = self.small(field)?;
        within(field, count.into(), 0, self.rest.len() as u64)?;
        Ok(count)
    }

    pub(crate) fn small(&mut self, field: &'static str) -> Result<u32, Error> {
        let number = self.number(field, u32::MAX.into())?;
        u32::try_from(number).map_err(|_| Error::PlanField {
            field,
            got: number,
            min: 0,
            max: u32::MAX.into(),
        })
    }

    pub(crate) fn number(&mut self, field: &'static str, max: u64) -> Result<u64, Error> {
        let mut number = 0_u64;
        for shift in (0..u64::BITS).step_by(7) {
            let Some((&byte, rest)) = self.rest.split_first() else {
                return Err(Error::PlanTruncated { field, len: self.len });
            };
            self.rest = rest;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                break;
            }
            number |= bits << shift;
            if byte < 0x80 {
                within(field, number, 0, max)?;
                return Ok(number);
            }
        }
        Err(Error::PlanField { field, got: u64::MAX, min: 0, max })
    }
}

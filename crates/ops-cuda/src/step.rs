//! What a step's ops read of the batch, copied to the card once: tokens, positions, sequences, logit rows, and both
//! groups' block tables.

use cudarc::driver::result;
use ops::{Batch, BatchSequence, Error, Fed, KvGroup, KvLayerSpec, Window};

use crate::device::Device;
use crate::graph::Event;
use crate::kernels::Address;
use crate::memory::{DeviceBuffer, Pinned};

const WORD: usize = size_of::<u32>();
/// Rows of a prompt that one block of attention takes.
pub(crate) const TILE_ROWS: usize = 16;
/// Bytes that the metadata's place on the card has at first; it doubles.
const FIRST_BYTES: usize = 1 << 20;
/// Marks a token as the number of the logit row of the step before whose token it is.
const FED: u32 = 1 << 31;
/// Position of a row that pads a recorded step: it has no keys and chooses no expert.
const PADDING: u32 = u32::MAX;

/// One step's metadata, always at the same place on the card. The host side is page-locked and used again by the next
/// step.
#[derive(Debug)]
pub(crate) struct Step {
    staging: Pinned,
    copied: Event,
    words: Vec<u32>,
    offsets: Offsets,
    sequences: Vec<BatchSequence>,
    longest: u32,
    padded: bool,
    on_device: DeviceBuffer,
}

/// First word of each part, and how much some have.
#[derive(Debug, Clone, Copy, Default)]
struct Offsets {
    rows: usize,
    logit_count: usize,
    positions: usize,
    sequence: usize,
    logit_rows: usize,
    singles: usize,
    single_count: usize,
    tiles: usize,
    tile_count: usize,
    tables: [usize; 2],
}

impl Step {
    pub(crate) fn new() -> Result<Self, crate::Error> {
        Ok(Self {
            staging: Pinned::new(1 << 16)?,
            copied: Event::new()?,
            words: Vec::new(),
            offsets: Offsets::default(),
            sequences: Vec::new(),
            longest: 0,
            padded: false,
            on_device: DeviceBuffer::new("a step's metadata", FIRST_BYTES)?,
        })
    }

    /// Checks `batch`, lays it out, padded to `rows` rows if that is more, and queues its copy behind the step before, of
    /// which `drawn` logit rows have a place for their tokens. Whether the metadata's place has changed. The staging memory
    /// is free again when the step before has begun, so this does not wait while that runs.
    pub(crate) fn begin(
        &mut self,
        device: &Device,
        batch: &Batch,
        (rows, drawn): (Option<usize>, usize),
    ) -> Result<bool, Error> {
        check(batch, drawn)?;
        self.padded = rows.is_some();
        self.lay_out(batch, rows.unwrap_or(0));
        self.sequences.clone_from(&batch.sequences);
        let last = batch.sequences.iter().map(|s| s.start.0 + s.rows.len() as u32).max();
        self.longest = last.unwrap_or(0);
        let bytes = self.words.len() * WORD;
        let moves = bytes > self.on_device.bytes() as usize;
        if moves {
            self.on_device = DeviceBuffer::new("a step's metadata", bytes.next_power_of_two())?;
        }
        self.copied.wait()?;
        self.staging.reserve(bytes)?;
        let staged = &mut self.staging.as_mut_slice()[..bytes];
        for (to, word) in staged.chunks_exact_mut(WORD).zip(&self.words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        // SAFETY: the buffer has `bytes` bytes; the staging memory is not written again before `copied` has passed.
        unsafe { result::memcpy_htod_async(self.on_device.address(), staged, device.stream()) }
            .map_err(crate::Error::driver("cuMemcpyHtoDAsync"))?;
        self.copied.record(device.stream())?;
        Ok(moves)
    }

    /// The parts' places depend on the number of rows alone, but for the blocks, which come last.
    fn lay_out(&mut self, batch: &Batch, padded: usize) {
        let Self { words, offsets, .. } = self;
        let (own, rows) = (batch.tokens.len(), batch.tokens.len().max(padded));
        words.clear();
        words.extend(batch.tokens.iter().map(|token| token.0));
        words.resize(rows, 0);
        for &Fed { row, from } in &batch.fed {
            words[row as usize] = FED | from;
        }
        offsets.rows = rows;
        offsets.positions = words.len();
        words.extend(batch.positions());
        words.resize(offsets.positions + rows, PADDING);
        offsets.sequence = words.len();
        let numbered = (0_u32..).zip(&batch.sequences);
        words.extend(numbered.flat_map(|(i, s)| std::iter::repeat_n(i, s.rows.len())));
        words.extend(own as u32..rows as u32);
        offsets.logit_rows = words.len();
        offsets.logit_count = batch.logit_rows.len();
        words.extend(&batch.logit_rows);
        words.resize(words.len().max(offsets.logit_rows + padded), 0);
        offsets.singles = words.len();
        let singles = batch.sequences.iter().filter(|s| s.rows.len() == 1);
        words.extend(singles.map(|s| s.rows.start as u32).chain(own as u32..rows as u32));
        offsets.single_count = words.len() - offsets.singles;
        offsets.tiles = words.len();
        for sequence in batch.sequences.iter().filter(|s| s.rows.len() > 1) {
            let starts = sequence.rows.clone().step_by(TILE_ROWS);
            words.extend(starts.flat_map(|at| [at as u32, TILE_ROWS.min(sequence.rows.end - at) as u32]));
        }
        offsets.tile_count = (words.len() - offsets.tiles) / 2;
        // For each sequence where its blocks begin, counted from the group's table, and the number of the first of them.
        let heads = 2 * batch.sequences.len().max(padded);
        for group in KvGroup::ALL {
            offsets.tables[group.index()] = words.len();
            words.resize(words.len() + heads, 0);
        }
        for group in KvGroup::ALL {
            let table = offsets.tables[group.index()];
            for (i, sequence) in batch.sequences.iter().enumerate() {
                let blocks = &sequence.tables[group.index()];
                words[table + 2 * i] = (words.len() - table) as u32;
                words[table + 2 * i + 1] = blocks.first;
                words.extend(blocks.blocks.iter().map(|block| block.0));
            }
        }
    }

    const fn at(&self, word: usize) -> Address {
        self.on_device.address() + (word * WORD) as u64
    }

    /// T
    pub(crate) const fn rows(&self) -> usize {
        self.offsets.rows
    }

    /// Rows that are alone in their sequence: where their numbers are, and how many.
    pub(crate) const fn singles(&self) -> (Address, usize) {
        (self.at(self.offsets.singles), self.offsets.single_count)
    }

    /// Tiles of longer sequences' rows: where their first rows and lengths are, and how many.
    pub(crate) const fn tiles(&self) -> (Address, usize) {
        (self.at(self.offsets.tiles), self.offsets.tile_count)
    }

    /// Whether this step's launches are the same for every step of as many rows.
    pub(crate) const fn is_padded(&self) -> bool {
        self.padded
    }

    /// Keys of the longest sequence, this step's included.
    pub(crate) const fn longest(&self) -> u32 {
        self.longest
    }

    pub(crate) const fn tokens(&self) -> Address {
        self.at(0)
    }

    pub(crate) const fn positions(&self) -> Address {
        self.at(self.offsets.positions)
    }

    pub(crate) const fn sequence_of_row(&self) -> Address {
        self.at(self.offsets.sequence)
    }

    pub(crate) const fn logit_count(&self) -> usize {
        self.offsets.logit_count
    }

    pub(crate) const fn logit_rows(&self, first: usize) -> Address {
        self.at(self.offsets.logit_rows + first)
    }

    pub(crate) const fn tables(&self, group: KvGroup) -> Address {
        self.at(self.offsets.tables[group.index()])
    }

    /// A table that misses a block would read another sequence's keys; that is refused before anything is written.
    pub(crate) fn check_tables(&self, spec: &KvLayerSpec, window: Window) -> Result<(), Error> {
        let block = spec.block_size.tokens();
        for sequence in &self.sequences {
            let table = &sequence.tables[spec.group.index()];
            let first_key = match window {
                Window::All => 0,
                Window::Keys(keys) => (sequence.start.0 + 1).saturating_sub(keys),
            };
            let first_needed = first_key / block;
            let last_needed = (sequence.start.0 + sequence.rows.len() as u32 - 1) / block;
            let covered = u64::from(table.first) + table.blocks.len() as u64;
            let in_pool = table.blocks.iter().all(|b| (b.0 as usize) < spec.blocks);
            if first_needed < table.first || u64::from(last_needed) >= covered || !in_pool {
                let detail = format!(
                    "blocks {first_needed}..={last_needed} are needed, the table has {}..{covered} of a pool of {}",
                    table.first, spec.blocks
                );
                return Err(Error::Shape { op: "attention", detail });
            }
        }
        Ok(())
    }
}

fn check(batch: &Batch, drawn: usize) -> Result<(), Error> {
    let rows = batch.tokens.len();
    let fits = |fed: &&Fed| (fed.row as usize) < rows && (fed.from as usize) < drawn;
    if let Some(fed) = batch.fed.iter().find(|fed| !fits(fed)) {
        let detail = format!("{fed:?} in a step of {rows} rows, behind one of at most {drawn} logit rows");
        return Err(Error::Shape { op: "begin_step", detail });
    }
    let mut next = 0;
    for sequence in &batch.sequences {
        if sequence.rows.start != next || sequence.rows.is_empty() {
            let detail = format!("rows {:?} of a sequence do not follow row {next}", sequence.rows);
            return Err(Error::Shape { op: "begin_step", detail });
        }
        next = sequence.rows.end;
    }
    let past_logits = batch.logit_rows.iter().max().map_or(0, |&row| row as usize + 1);
    if next != rows || past_logits > rows {
        let detail = format!("{rows} tokens, sequences over {next} rows, logits up to row {past_logits}");
        return Err(Error::Shape { op: "begin_step", detail });
    }
    Ok(())
}

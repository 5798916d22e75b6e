//! What a step's ops read of the batch, copied to the card once: tokens, positions, sequences, logit rows, and both
//! groups' block tables.

use std::rc::Rc;

use cudarc::driver::result::{self, event};
use cudarc::driver::sys::{CUevent, CUevent_flags};
use ops::{Batch, BatchSequence, Error, KvGroup, KvLayerSpec, Window};

use crate::arena::Piece;
use crate::device::Device;
use crate::kernels::Address;
use crate::memory::Pinned;

const WORD: usize = size_of::<u32>();

/// One step's metadata. The host side is page-locked and used again by the next step.
#[derive(Debug)]
pub(crate) struct Step {
    staging: Pinned,
    copied: Event,
    words: Vec<u32>,
    offsets: Offsets,
    sequences: Vec<BatchSequence>,
    longest: u32,
    on_device: Option<Piece>,
}

/// First word of each part.
#[derive(Debug, Clone, Copy, Default)]
struct Offsets {
    rows: usize,
    logit_count: usize,
    positions: usize,
    sequence: usize,
    logit_rows: usize,
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
            on_device: None,
        })
    }

    /// Checks `batch`, lays it out and queues its copy.
    pub(crate) fn begin(&mut self, device: &Rc<Device>, batch: &Batch) -> Result<(), Error> {
        check(batch)?;
        self.lay_out(batch);
        self.sequences.clone_from(&batch.sequences);
        let last = batch.sequences.iter().map(|s| s.start.0 + s.rows.len() as u32).max();
        self.longest = last.unwrap_or(0);
        // The last step's metadata returns before this one's is taken.
        self.on_device = None;
        let bytes = self.words.len() * WORD;
        let piece = Piece::new(device, bytes)?;
        self.copied.wait()?;
        self.staging.reserve(bytes)?;
        let staged = &mut self.staging.as_mut_slice()[..bytes];
        for (to, word) in staged.chunks_exact_mut(WORD).zip(&self.words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        // SAFETY: the piece has `bytes` bytes; the staging memory is not written again before `copied` has passed.
        unsafe { result::memcpy_htod_async(piece.address(), staged, device.stream()) }
            .map_err(crate::Error::driver("cuMemcpyHtoDAsync"))?;
        self.copied.record(device)?;
        self.on_device = Some(piece);
        Ok(())
    }

    fn lay_out(&mut self, batch: &Batch) {
        let Self { words, offsets, .. } = self;
        words.clear();
        words.extend(batch.tokens.iter().map(|token| token.0));
        offsets.rows = batch.tokens.len();
        offsets.positions = words.len();
        words.extend(batch.positions());
        offsets.sequence = words.len();
        let numbered = (0_u32..).zip(&batch.sequences);
        words.extend(numbered.flat_map(|(i, s)| std::iter::repeat_n(i, s.rows.len())));
        offsets.logit_rows = words.len();
        offsets.logit_count = batch.logit_rows.len();
        words.extend(&batch.logit_rows);
        for group in KvGroup::ALL {
            offsets.tables[group.index()] = words.len();
            // For each sequence where its blocks begin, counted from here, and the number of the first of them.
            let mut next = 2 * batch.sequences.len();
            for sequence in &batch.sequences {
                let table = &sequence.tables[group.index()];
                words.extend([next as u32, table.first]);
                next += table.blocks.len();
            }
            words.extend(
                batch.sequences.iter().flat_map(|s| &s.tables[group.index()].blocks).map(|block| block.0),
            );
        }
    }

    fn at(&self, word: usize) -> Result<Address, Error> {
        match &self.on_device {
            Some(piece) => Ok(piece.address() + (word * WORD) as u64),
            None => Err(Error::Shape { op: "step", detail: "no step was begun".to_owned() }),
        }
    }

    /// T
    pub(crate) const fn rows(&self) -> usize {
        self.offsets.rows
    }

    /// Whether every sequence brings one row.
    pub(crate) const fn single_tokens(&self) -> bool {
        self.sequences.len() == self.offsets.rows
    }

    /// Keys of the longest sequence, this step's included.
    pub(crate) const fn longest(&self) -> u32 {
        self.longest
    }

    pub(crate) fn tokens(&self) -> Result<Address, Error> {
        self.at(0)
    }

    pub(crate) fn positions(&self) -> Result<Address, Error> {
        self.at(self.offsets.positions)
    }

    pub(crate) fn sequence_of_row(&self) -> Result<Address, Error> {
        self.at(self.offsets.sequence)
    }

    pub(crate) const fn logit_count(&self) -> usize {
        self.offsets.logit_count
    }

    pub(crate) fn logit_rows(&self, first: usize) -> Result<Address, Error> {
        self.at(self.offsets.logit_rows + first)
    }

    pub(crate) fn tables(&self, group: KvGroup) -> Result<Address, Error> {
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

fn check(batch: &Batch) -> Result<(), Error> {
    let rows = batch.tokens.len();
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

/// A mark in the stream.
#[derive(Debug)]
struct Event(CUevent);

impl Event {
    fn new() -> Result<Self, crate::Error> {
        event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING)
            .map(Self)
            .map_err(crate::Error::driver("cuEventCreate"))
    }

    fn record(&self, device: &Device) -> Result<(), crate::Error> {
        // SAFETY: the event and the stream are alive.
        unsafe { event::record(self.0, device.stream()) }.map_err(crate::Error::driver("cuEventRecord"))
    }

    /// Returns at once when nothing was recorded.
    fn wait(&self) -> Result<(), crate::Error> {
        // SAFETY: the event is alive.
        unsafe { event::synchronize(self.0) }.map_err(crate::Error::driver("cuEventSynchronize"))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created by this value and destroyed only here.
        let _ = unsafe { event::destroy(self.0) };
    }
}

//! Tokens drawn on the card: only their numbers come back ([`crate::landing`]).

use cudarc::driver::result;
use ops::Error;
use ops::sample::{Choice, Plain};
use types::{DType, TokenId};

use crate::backend::CudaBackend;
use crate::device::{Device, Grid};
use crate::graph::Event;
use crate::kernels::{Address, JoinParams, SampleParams};
use crate::landing::{Drawing, TOKEN_BYTES};
use crate::memory::{DeviceBuffer, Pinned};
use crate::tensor::{Tensor, size};

/// Rows of logits that are made and drawn from at once at most: 256 of a 262,144-entry vocabulary are 128 MiB in bf16.
pub const DRAWN_ROWS_MAX: usize = 256;
/// Threads of a block, which has a row.
const THREADS: u32 = 1024;
/// Blocks that share a row's columns when parts of rows are joined.
const JOIN_BLOCKS: u32 = 16;

/// What the kernel reads of a row, byte by byte as `SampleRow` in sample.cu.
const ROW_BYTES: usize = 32;

/// How each row of a step is drawn, always at the same place on the card. The host side is page-locked and used again by
/// the next step.
#[derive(Debug)]
pub(crate) struct Rows {
    staging: Pinned,
    copied: Event,
    on_device: DeviceBuffer,
}

impl Rows {
    pub(crate) fn new() -> Result<Self, crate::Error> {
        let bytes = DRAWN_ROWS_MAX * ROW_BYTES;
        Ok(Self {
            staging: Pinned::new(bytes)?,
            copied: Event::new()?,
            on_device: DeviceBuffer::new("how tokens are drawn", bytes)?,
        })
    }

    /// Queues the copy of `how`, at most [`DRAWN_ROWS_MAX`] rows.
    fn stage(&mut self, device: &Device, how: &[Option<Plain>]) -> Result<Address, Error> {
        self.copied.wait().map_err(Error::from)?;
        let staged = &mut self.staging.as_mut_slice()[..how.len() * ROW_BYTES];
        for (to, how) in staged.as_chunks_mut().0.iter_mut().zip(how) {
            *to = row(how.as_ref());
        }
        // SAFETY: the buffer has room for every row; the staging memory is not written again before `copied` has passed.
        unsafe { result::memcpy_htod_async(self.on_device.address(), staged, device.stream()) }
            .map_err(crate::Error::driver("cuMemcpyHtoDAsync"))?;
        self.copied.record(device.stream())?;
        device.unchain();
        Ok(self.on_device.address())
    }
}

fn row(how: Option<&Plain>) -> [u8; ROW_BYTES] {
    let kind: u32 = match how {
        None => 0,
        Some(how) if how.is_greedy() => 1,
        Some(_) => 2,
    };
    let how = how.copied().unwrap_or(Plain::GREEDY);
    let words = [
        how.temperature.to_bits(),
        how.top_p.to_bits(),
        how.min_p.to_bits(),
        how.top_k.unwrap_or(0),
        kind,
        0,
    ];
    let mut bytes = [0; ROW_BYTES];
    bytes[..8].copy_from_slice(&how.at.to_le_bytes());
    for (to, word) in bytes[8..].chunks_exact_mut(4).zip(words) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

impl CudaBackend {
    pub(crate) fn draw_rows(
        &mut self,
        logits: &Tensor,
        (width, scale): (usize, f32),
        (first, how): (usize, &[Option<Plain>]),
    ) -> Result<Drawing, Error> {
        if how.len() != logits.rows() || how.len() > DRAWN_ROWS_MAX {
            let detail =
                format!("{} rows of logits for {} draws, at most {DRAWN_ROWS_MAX}", logits.rows(), how.len());
            return Err(Error::Shape { op: "draw", detail });
        }
        self.reserve_drawn(first + how.len())?;
        let (rows, device) = self.draws();
        let rows = rows.stage(device, how)?;
        let best = self.largest_keys(logits, width, scale)?;
        let (drawn, device) = self.drawn();
        drawn.hold(device)?;
        let params = SampleParams {
            tokens: drawn.at(first),
            x: logits.address(),
            best: best.address(),
            rows,
            width: size("draw", width)?,
            is_f32: logits.is_f32(),
            scale,
        };
        let grid = Grid::new(size("draw", how.len())?, 1, THREADS);
        device.launch(device.kernels.sample, grid, &params)?;
        self.land_drawn((first, how.len()))
    }

    /// See [`ops::Backend::feed`].
    pub(crate) fn feed_tokens(&mut self, first: usize, tokens: &[TokenId]) -> Result<(), Error> {
        self.reserve_drawn(first + tokens.len())?;
        let (drawn, device) = self.drawn();
        drawn.hold(device)?;
        let words: Vec<u32> = tokens.iter().map(|token| token.0).collect();
        Ok(device.upload(drawn.at(first), &words)?)
    }

    /// See [`ops::Backend::tokens_drawn`].
    pub(crate) fn copy_of_drawn(&mut self, (first, rows): (usize, usize)) -> Result<Tensor, Error> {
        self.reserve_drawn(first + rows)?;
        let out = Tensor::new(self.device(), 1, rows, DType::F32)?;
        let (drawn, device) = self.drawn();
        device.copy(out.address(), drawn.at(first), rows * TOKEN_BYTES)?;
        Ok(out)
    }

    /// See [`ops::Backend::feed_tensor`].
    pub(crate) fn feed_copy(&mut self, first: usize, tokens: &Tensor) -> Result<(), Error> {
        tokens.expect("feed", tokens.elements(), DType::F32)?;
        self.reserve_drawn(first + tokens.elements())?;
        let (drawn, device) = self.drawn();
        drawn.hold(device)?;
        Ok(device.copy(drawn.at(first), tokens.address(), tokens.bytes())?)
    }

    /// See [`ops::Backend::collect`].
    pub(crate) fn collect_drawn(&mut self, drawing: Drawing) -> Result<Vec<Choice>, Error> {
        while !drawing.is_done(self.device())? {
            std::hint::spin_loop();
        }
        self.measure_idle(drawing.step);
        Ok(self.drawn().0.take(drawing))
    }

    /// See [`ops::Backend::join_ranks`].
    pub(crate) fn join_parts(
        &mut self,
        parts: Tensor,
        (rows, each, width): (usize, usize, usize),
    ) -> Result<Tensor, Error> {
        let whole = rows.checked_mul(each).filter(|&part| part > 0 && parts.elements().is_multiple_of(part));
        let columns = whole.map_or(0, |part| parts.elements() / part * each);
        if columns < width || parts.dtype() != self.storage() {
            let detail = format!(
                "{} {} for {rows} rows of {width} in parts of {each}",
                parts.elements(),
                parts.dtype()
            );
            return Err(Error::Shape { op: "join_ranks", detail });
        }
        if rows == 1 {
            return Ok(parts.into_row(width));
        }
        let out = self.tensor(rows, width)?;
        let params = JoinParams {
            out: out.address(),
            parts: parts.address(),
            rows: size("join_ranks", rows)?,
            each: size("join_ranks", each)?,
            width: size("join_ranks", width)?,
        };
        let grid = Grid { blocks: (JOIN_BLOCKS, params.rows, 1), threads: 256, shared: 0 };
        self.device().launch(self.device().kernels.join_ranks, grid, &params)?;
        Ok(out)
    }
}

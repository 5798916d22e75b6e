//! Tokens drawn on the card: only their numbers come back.

use cudarc::driver::result;
use ops::Error;
use ops::sample::{Choice, Plain};
use types::TokenId;

use crate::arena::Piece;
use crate::backend::CudaBackend;
use crate::device::{Device, Grid};
use crate::graph::Event;
use crate::kernels::{Address, SampleParams};
use crate::memory::{DeviceBuffer, Pinned};
use crate::tensor::{Tensor, size};

/// Rows of logits that are made and drawn from at once at most: 256 of a 262,144-entry vocabulary are 128 MiB in bf16.
pub const DRAWN_ROWS_MAX: usize = 256;
/// Threads of a block, which has a row.
const THREADS: u32 = 1024;
/// What the kernel answers where there is no token.
const LEFT: u32 = u32::MAX;
const NOT_A_NUMBER: u32 = u32::MAX - 1;

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
        how: &[Option<Plain>],
    ) -> Result<Vec<Choice>, Error> {
        if how.len() != logits.rows() || how.len() > DRAWN_ROWS_MAX {
            let detail =
                format!("{} rows of logits for {} draws, at most {DRAWN_ROWS_MAX}", logits.rows(), how.len());
            return Err(Error::Shape { op: "draw", detail });
        }
        if how.iter().flatten().all(Plain::is_greedy) {
            let largest = self.largest_of_rows(logits, width, scale)?;
            let choice = |(token, how): (Option<TokenId>, &Option<Plain>)| match how {
                None => Choice::Left,
                Some(_) => token.map_or(Choice::NotANumber, Choice::Token),
            };
            return Ok(largest.into_iter().zip(how).map(choice).collect());
        }
        let rows = self.stage_draws(how)?;
        let best = self.largest_keys(logits, width, scale)?;
        let tokens = Piece::new(self.device(), how.len() * size_of::<u32>())?;
        let params = SampleParams {
            tokens: tokens.address(),
            x: logits.address(),
            best: best.address(),
            rows,
            width: size("draw", width)?,
            is_f32: logits.is_f32(),
            scale,
        };
        let grid = Grid::new(size("draw", how.len())?, 1, THREADS);
        self.device().launch(self.device().kernels.sample, grid, &params)?;
        let landed = self.land(tokens.address(), how.len() * size_of::<u32>())?;
        let token = |&bytes: &[u8; 4]| match u32::from_le_bytes(bytes) {
            LEFT => Choice::Left,
            NOT_A_NUMBER => Choice::NotANumber,
            token => Choice::Token(TokenId(token)),
        };
        Ok(landed.as_chunks().0.iter().map(token).collect())
    }

    fn stage_draws(&mut self, how: &[Option<Plain>]) -> Result<Address, Error> {
        let (rows, device) = self.draws();
        rows.stage(device, how)
    }
}

//! Tokens drawn on the card: their numbers come back, and the log-probabilities that were asked for
//! ([`crate::landing`]).

use ops::Error;
use ops::sample::{Ask, Choice};
use types::{DType, TokenId};

use crate::arena::Piece;
use crate::backend::CudaBackend;
use crate::device::Grid;
use crate::kernels::{JoinParams, SampleParams};
use crate::landing::{Drawing, Reports, TOKEN_BYTES};
use crate::sampling::{
    ADJUST_BYTES, BINS_BYTES, DRAWN_ROWS_MAX, FOUND_BYTES, JOB_BYTES, LIST_BYTES, Plan, Rows, STATE_BYTES,
    THREADS, scratch_bytes, segment, write,
};
use crate::tensor::{Tensor, size};

/// Blocks that share a row's columns when parts of rows are joined.
const JOIN_BLOCKS: u32 = 16;

impl CudaBackend {
    pub(crate) fn draw_rows(
        &mut self,
        logits: &Tensor,
        (width, scale): (usize, f32),
        (first, asks): (usize, &[Ask<'_>]),
    ) -> Result<Drawing, Error> {
        if asks.len() != logits.rows() || asks.len() > DRAWN_ROWS_MAX || logits.width() != width {
            let detail = format!(
                "{} rows of {} logits for {} asks of {width}, at most {DRAWN_ROWS_MAX}",
                logits.rows(),
                logits.width(),
                asks.len()
            );
            return Err(Error::Shape { op: "draw", detail });
        }
        self.reserve_drawn(first + asks.len())?;
        let plan = Plan::new(asks, width);
        let (jobs, [_, adjusts, words, staged_bytes]) = (plan.jobs(), plan.places());
        let piece = |bytes: usize| Piece::new(self.device(), bytes);
        let (staged, states) = (piece(staged_bytes)?, piece(jobs * STATE_BYTES)?);
        let (bins, lists) = (piece(plan.bins * BINS_BYTES)?, piece(plan.bins * LIST_BYTES)?);
        let scratch = piece(plan.scratch() * scratch_bytes(width))?;
        let (found, reported) = (piece(jobs * FOUND_BYTES + plan.tops * 8)?, plan.report_bytes());
        let rows = Rows {
            logits: logits.address(),
            bytes: width * logits.dtype().bytes(),
            is_f32: logits.is_f32(),
            scale,
            scratch: scratch.address(),
        };
        let (staging, device) = self.staging();
        if jobs > 0 {
            staging.stage(device, (staged.address(), staged_bytes), |staged| write(&plan, &rows, staged))?;
            device.zero(states.address(), jobs * STATE_BYTES)?;
        }
        if plan.bins > 0 {
            device.zero(bins.address(), plan.bins * BINS_BYTES)?;
        }
        let (drawn, device) = self.drawn();
        drawn.hold(device)?;
        let kernels = device.kernels.sampling;
        let each = segment(width);
        let blocks = size("draw", width.div_ceil(each))?;
        for round in &plan.rounds {
            let job = round.jobs.start;
            let params = SampleParams {
                jobs: staged.address() + (job * JOB_BYTES) as u64,
                adjusts: staged.address() + (adjusts + round.adjusted.start * ADJUST_BYTES) as u64,
                words: staged.address() + words as u64,
                states: states.address() + (job * STATE_BYTES) as u64,
                bins: bins.address(),
                lists: lists.address(),
                tokens: drawn.at(first),
                found: found.address() + (job * FOUND_BYTES) as u64,
                tops: found.address() + (jobs * FOUND_BYTES) as u64,
                width: size("draw", width)?,
                segment: size("draw", each)?,
            };
            let grid = Grid::new(blocks, size("draw", round.jobs.len())?, THREADS);
            let adjusted = Grid::new(blocks, size("draw", round.adjusted.len())?, THREADS);
            device.launch(kernels.adjust, adjusted, &params)?;
            device.launch_early(kernels.survey, grid, &params)?;
            if round.cuts {
                device.launch_early(kernels.spread, grid, &params)?;
                device.launch_early(kernels.cut, grid, &params)?;
            }
            if round.draws {
                device.launch_early(kernels.draw, grid, &params)?;
            }
        }
        device.unchain();
        let reports = Reports { asked: plan.asked, jobs, from: found.address(), bytes: reported };
        self.land_drawn((first, asks.len()), reports)
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

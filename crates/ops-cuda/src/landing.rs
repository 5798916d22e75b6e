//! Drawn tokens: where they stay on the card for the next step, and how they come to the host while it runs.
//!
//! A step's tokens lie at a fixed place, by logit row. The next step's embedding reads them there, and a stream of its
//! own copies them to page-locked memory: the card's other work does not wait for that, and neither does the host
//! before it collects them.

use std::cell::Cell;
use std::time::{Duration, Instant};

use cudarc::driver::result;
use cudarc::driver::sys::CUstream;
use ops::Error;
use ops::sample::{Choice, LogSum, TokenLogprob};
use types::TokenId;

use crate::device::Device;
use crate::graph::{Event, Side};
use crate::kernels::Address;
use crate::memory::{DeviceBuffer, Pinned};
use crate::sampling::{Asked, FOUND_BYTES, Report, TOP_BYTES};

/// Bytes of a token on the card.
pub(crate) const TOKEN_BYTES: usize = size_of::<u32>();
/// Logit rows of a step that have a place at first; it doubles.
const FIRST_ROWS: usize = 4096;
/// What the kernel answers where there is no token.
const NOT_A_NUMBER: u32 = u32::MAX - 1;

/// The tokens of the last step by logit row, on the card, and what it takes to bring them to the host.
#[derive(Debug)]
pub(crate) struct DrawnTokens {
    // Freed first to last: what streams still copy to after the streams.
    side: Side,
    /// In the stream of all other work: the newest tokens were drawn.
    drawn: Event,
    /// Beside it: they were copied.
    copied: Event,
    on_device: DeviceBuffer,
    spare: Vec<Landing>,
}

#[derive(Debug)]
struct Landing {
    host: Pinned,
    /// Reports, in the layout of sample.cu.
    reports: Pinned,
    done: Event,
}

/// Tokens on their way to the host, or a mark without any.
#[derive(Debug)]
pub struct Drawing {
    landing: Landing,
    asked: Vec<Asked>,
    /// Jobs whose results come before the tokens that reports list.
    jobs: usize,
    /// The step it belongs to.
    pub(crate) step: usize,
    begun: Instant,
    /// When those that wait for other cards look after them next.
    next: Cell<Duration>,
}

impl DrawnTokens {
    pub(crate) fn new() -> Result<Self, crate::Error> {
        Ok(Self {
            side: Side::new()?,
            drawn: Event::new()?,
            copied: Event::new()?,
            on_device: DeviceBuffer::new("drawn tokens", FIRST_ROWS * TOKEN_BYTES)?,
            spare: Vec::new(),
        })
    }

    /// Logit rows that have a place.
    pub(crate) const fn rows(&self) -> usize {
        self.on_device.bytes() as usize / TOKEN_BYTES
    }

    /// Makes room for `rows` logit rows; whether the tokens' place has changed.
    pub(crate) fn reserve(&mut self, device: &Device, rows: usize) -> Result<bool, crate::Error> {
        if rows <= self.rows() {
            return Ok(false);
        }
        let more = DeviceBuffer::new("drawn tokens", rows.next_power_of_two() * TOKEN_BYTES)?;
        device.copy(more.address(), self.at(0), self.rows() * TOKEN_BYTES)?;
        self.copied.wait()?;
        device.synchronize()?;
        self.on_device = more;
        Ok(true)
    }

    /// The place of logit row `row`.
    pub(crate) const fn at(&self, row: usize) -> Address {
        self.on_device.address() + (row * TOKEN_BYTES) as u64
    }

    /// What is queued from here on may write over the tokens: the host has those of before.
    pub(crate) fn hold(&self, device: &Device) -> Result<(), crate::Error> {
        device.unchain();
        self.copied.hold(device.stream())
    }

    /// Queues the copy of the tokens of `rows` rows from `first` on, behind all work so far but before none.
    /// The copy of reports is part of that work: their place may be used again behind it.
    pub(crate) fn land(
        &mut self,
        device: &Device,
        (first, rows): (usize, usize),
        (reports, step): (Reports, usize),
    ) -> Result<Drawing, crate::Error> {
        let mut drawing = self.drawing(rows, step)?;
        let landing = &mut drawing.landing;
        if reports.bytes > 0 {
            landing.reports.reserve(reports.bytes)?;
            landing.reports.fill(reports.from, reports.bytes, device.stream())?;
        }
        (drawing.asked, drawing.jobs) = (reports.asked, reports.jobs);
        let Landing { host, done, .. } = &drawing.landing;
        self.drawn.record(device.stream())?;
        let side = self.side.stream();
        self.drawn.hold(side)?;
        host.fill(self.at(first), rows * TOKEN_BYTES, side)?;
        self.copied.record(side)?;
        done.record(side)?;
        Ok(drawing)
    }

    /// A drawing of nothing.
    pub(crate) fn mark(&mut self, device: &Device, step: usize) -> Result<Drawing, crate::Error> {
        let drawing = self.drawing(0, step)?;
        drawing.landing.done.record(device.stream())?;
        Ok(drawing)
    }

    fn drawing(&mut self, rows: usize, step: usize) -> Result<Drawing, crate::Error> {
        let mut landing = match self.spare.pop() {
            Some(landing) => landing,
            None => Landing {
                host: Pinned::new(FIRST_ROWS)?,
                reports: Pinned::new(FIRST_ROWS)?,
                done: Event::new()?,
            },
        };
        landing.host.reserve(rows * TOKEN_BYTES)?;
        Ok(Drawing {
            landing,
            asked: Vec::new(),
            jobs: 0,
            step,
            begun: Instant::now(),
            next: Cell::default(),
        })
    }

    /// The outcome of a drawing that has landed.
    pub(crate) fn take(&mut self, drawing: Drawing) -> Vec<Choice> {
        let Drawing { landing, asked, jobs, .. } = drawing;
        let tokens = landing.host.as_slice().as_chunks().0;
        let landed = Landed { bytes: landing.reports.as_slice(), jobs };
        let choices =
            asked.iter().zip(tokens).map(|(asked, &token)| landed.choice(asked, u32::from_le_bytes(token)));
        let choices = choices.collect();
        self.spare.push(landing);
        choices
    }
}

/// What lies on the card to be brought to the host beside tokens.
#[derive(Debug)]
pub(crate) struct Reports {
    /// Of each row what was asked.
    pub(crate) asked: Vec<Asked>,
    pub(crate) jobs: usize,
    /// Where the reports are, and their bytes: 0 when none was asked for.
    pub(crate) from: Address,
    pub(crate) bytes: usize,
}

/// Reports that have landed: `SampleFound` of each job, then `SampleTop` of each token listed, as in sample.cu.
struct Landed<'a> {
    bytes: &'a [u8],
    jobs: usize,
}

impl Landed<'_> {
    fn choice(&self, asked: &Asked, token: u32) -> Choice {
        match *asked {
            Asked::Nothing => Choice::Left,
            Asked::Token(..) if token == NOT_A_NUMBER => Choice::NotANumber,
            Asked::Token(job, report) => {
                let token = TokenId(token);
                let logprob = report.map(|report| self.logprob(token, self.logit(job), &report));
                Choice::Token { token, logprob }
            }
            Asked::Likelihood(_, report) if self.is_wrong(report.job) => Choice::NotANumber,
            Asked::Likelihood(token, report) => {
                Choice::Likelihood(self.logprob(token, self.logit(report.job), &report))
            }
        }
    }

    fn logprob(&self, token: TokenId, logit: f32, report: &Report) -> TokenLogprob {
        let sum = self.word(report.job * FOUND_BYTES);
        let sum = f64::from_bits(u64::from(self.word(report.job * FOUND_BYTES + 4)) << 32 | u64::from(sum));
        let sum = LogSum::new(f32::from_bits(self.word(report.job * FOUND_BYTES + 8)), sum);
        let (first, count) = report.tops;
        let listed = (first..first + count).map(|place| {
            let at = self.jobs * FOUND_BYTES + place * TOP_BYTES;
            (TokenId(self.word(at)), sum.of(f32::from_bits(self.word(at + 4))))
        });
        TokenLogprob { token, logprob: sum.of(logit), top: listed.collect() }
    }

    /// The logit of the token of a job.
    fn logit(&self, job: usize) -> f32 {
        f32::from_bits(self.word(job * FOUND_BYTES + 12))
    }

    fn is_wrong(&self, job: usize) -> bool {
        self.word(job * FOUND_BYTES + 20) != 0
    }

    fn word(&self, at: usize) -> u32 {
        let word = self.bytes[at..].first_chunk().copied();
        u32::from_le_bytes(word.unwrap_or_default())
    }
}

impl Drawing {
    /// Whether it has landed.
    pub(crate) fn is_done(&self, device: &Device) -> Result<bool, Error> {
        Ok(device.has_passed(&self.landing.done, (self.begun, &self.next))?)
    }
}

impl Pinned {
    /// Queues a copy from the card; nothing reads this memory before it is done.
    fn fill(&self, from: Address, bytes: usize, stream: CUstream) -> Result<(), crate::Error> {
        // SAFETY: the card's memory has `bytes` bytes there by the caller's count, and so has this, which its owner
        // neither reads, moves nor frees before the mark behind the copy has passed.
        unsafe { result::memcpy_dtoh_async(self.unread(bytes), from, stream) }
            .map_err(crate::Error::driver("cuMemcpyDtoHAsync"))
    }
}

//! What the kernels of `sample.cu` are told of a step's rows: jobs, adjusted rows, and the tokens that rules, penalties and
//! masks name, laid out in one piece of page-locked memory and copied at once.

use std::ops::Range;

use cudarc::driver::result;
use ops::Error;
use ops::sample::{Ask, Recipe};
use types::TokenId;
use types::limits::{BAD_WORDS_MAX, LOGPROBS_TOP_MAX};

use crate::device::{Device, Function, Module};
use crate::graph::Event;
use crate::kernels::Address;
use crate::memory::Pinned;

/// Rows of logits that are made and drawn from at once at most: 256 of a 262,144-entry vocabulary are 128 MiB in bf16.
pub const DRAWN_ROWS_MAX: usize = 256;
/// Rows that rules or penalties change which are in scratch memory at once: 64 of a 262,144-entry vocabulary are 64 MiB.
pub(crate) const ADJUSTED_ROWS_MAX: usize = 64;
/// Different tokens of a history that go to the card for one row: a text of a million tokens has fewer. With more the row
/// is drawn by the host.
pub(crate) const SEEN_MAX: usize = 1 << 15;
/// Bytes that are copied to the card for one step: masks of 256 rows of a 262,144-entry vocabulary are 8 MiB, 8,192
/// different tokens of each of their histories 16 MiB. Rows beyond
/// are drawn by the host.
pub(crate) const STAGED_BYTES_MAX: usize = 32 << 20;
/// Blocks' threads, and the numbers that a block reads at once.
pub(crate) const THREADS: u32 = 512;
const TILE: usize = 4096;
/// Blocks that share a row at most.
const SEGMENTS_MAX: usize = THREADS as usize;
/// Bytes of what the kernels keep of a job, of its bins and of its list, as in sample.cu.
pub(crate) const STATE_BYTES: usize = 5200;
pub(crate) const BINS_BYTES: usize = 24_576;
pub(crate) const LIST_BYTES: usize = 4096 * size_of::<u64>();
/// Bytes of what comes back of a job, and of each token that a report lists.
pub(crate) const FOUND_BYTES: usize = 24;
pub(crate) const TOP_BYTES: usize = 8;
pub(crate) const JOB_BYTES: usize = 88;
pub(crate) const ADJUST_BYTES: usize = 80;
/// What stands for nothing.
const NONE: u32 = u32::MAX;
/// Staging buffers: one is filled while the card still reads the other.
const STAGED_STEPS: usize = 2;

/// The kernels of `sample.cu`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sampling {
    pub(crate) adjust: Function,
    pub(crate) survey: Function,
    pub(crate) spread: Function,
    pub(crate) cut: Function,
    pub(crate) draw: Function,
}

impl Sampling {
    pub(crate) fn of(module: &Module) -> Result<Self, crate::Error> {
        Ok(Self {
            adjust: module.function("adjust")?,
            survey: module.function("survey")?,
            spread: module.function("spread")?,
            cut: module.function("cut")?,
            draw: module.function("draw")?,
        })
    }
}

/// Bytes of device memory that drawing from `rows` rows of `width` logits takes at most, without the logits.
pub(crate) fn bytes(rows: usize, width: usize) -> usize {
    // A draw and a report of each row.
    let jobs = 2 * rows * (STATE_BYTES + BINS_BYTES + LIST_BYTES + FOUND_BYTES);
    let tops = rows * LOGPROBS_TOP_MAX as usize * TOP_BYTES;
    jobs + tops
        + STAGED_BYTES_MAX.min(rows * staged_max(width))
        + rows.min(ADJUSTED_ROWS_MAX) * scratch_bytes(width)
}

/// Bytes that are staged for one row at most.
fn staged_max(width: usize) -> usize {
    2 * JOB_BYTES + ADJUST_BYTES + width.div_ceil(8) + 4 + 8 * SEEN_MAX.min(width) + (16 << 10)
}

/// Bytes of one row in scratch memory: rows begin at multiples of 16 bytes.
pub(crate) const fn scratch_bytes(width: usize) -> usize {
    (width * size_of::<f32>()).next_multiple_of(16)
}

/// Numbers of a row that one block has.
pub(crate) fn segment(width: usize) -> usize {
    TILE * width.div_ceil(TILE * SEGMENTS_MAX).max(1)
}

/// Bytes that an ask's tokens take; `None` when it names more than the card takes of one row.
fn word_bytes(ask: &Ask<'_>, width: usize) -> Option<usize> {
    let Ask::Token(recipe) = ask else { return Some(0) };
    let seen = recipe.penalties.as_ref().map_or(0, |penalties| penalties.seen.len());
    if seen > SEEN_MAX || recipe.bad_ends.len() > BAD_WORDS_MAX {
        return None;
    }
    let masked = recipe.mask.is_some() || recipe.allowed.is_some();
    let mask = if masked { width.div_ceil(32) } else { 0 };
    let words = mask + 2 * (recipe.bias.len() + seen) + recipe.banned.len() + recipe.bad_ends.len();
    Some(words * size_of::<u32>())
}

/// Which rows are left to the host: those that name too many tokens, and those for which a step's memory does not last.
pub(crate) fn left_to_host(asks: &[Ask<'_>], width: usize) -> Vec<usize> {
    let mut left = Vec::new();
    let mut staged = asks.len() * (2 * JOB_BYTES + ADJUST_BYTES);
    for (row, ask) in asks.iter().enumerate() {
        match word_bytes(ask, width).map(|bytes| staged + bytes) {
            Some(with) if with <= STAGED_BYTES_MAX => staged = with,
            _ => left.push(row),
        }
    }
    left
}

/// What is asked of a row, and where the answer will be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Asked {
    /// Nothing.
    Nothing,
    /// A token: the job that draws it, and its report.
    Token(usize, Option<Report>),
    /// How likely a token is.
    Likelihood(TokenId, Report),
}

/// Where a report will be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Report {
    /// The job that makes it.
    pub(crate) job: usize,
    /// The first of the tokens it lists, and how many they are.
    pub(crate) tops: (usize, usize),
}

/// One job: a draw or a report of one row.
#[derive(Debug)]
struct Job<'a> {
    row: usize,
    /// How a token is drawn; `None` makes a report.
    recipe: Option<&'a Recipe<'a>>,
    target: u32,
    /// How many tokens are listed, and where.
    tops: (usize, usize),
    /// Which bins and list are its own.
    bins: Option<usize>,
    /// Which of the adjusted rows of its round is its own.
    scratch: Option<usize>,
}

/// Jobs that run at the same time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Round {
    pub(crate) jobs: Range<usize>,
    pub(crate) adjusted: Range<usize>,
    /// Whether there are cuts to find.
    pub(crate) cuts: bool,
    /// Whether there is more to do than to find the best token.
    pub(crate) draws: bool,
}

/// Everything that is to be done for the rows of a step.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    width: usize,
    jobs: Vec<Job<'a>>,
    pub(crate) asked: Vec<Asked>,
    pub(crate) rounds: Vec<Round>,
    /// Bins and lists that are needed.
    pub(crate) bins: usize,
    /// Tokens that reports list.
    pub(crate) tops: usize,
}

impl<'a> Plan<'a> {
    pub(crate) fn new(asks: &'a [Ask<'a>], width: usize) -> Self {
        let mut plan =
            Self { width, jobs: Vec::new(), asked: Vec::new(), rounds: Vec::new(), bins: 0, tops: 0 };
        let left = left_to_host(asks, width);
        let mut left = left.iter().peekable();
        for (row, ask) in asks.iter().enumerate() {
            let here = left.next_if_eq(&&row).is_none();
            let asked = match ask {
                Ask::Token(recipe) if here => {
                    let job = plan.draw(row, recipe);
                    Asked::Token(job, recipe.report.map(|top| plan.report(row, NONE, top)))
                }
                Ask::Likelihood { token, top } if here => {
                    Asked::Likelihood(*token, plan.report(row, token.0, *top))
                }
                Ask::Nothing | Ask::Token(_) | Ask::Likelihood { .. } => Asked::Nothing,
            };
            plan.asked.push(asked);
        }
        plan
    }

    pub(crate) fn jobs(&self) -> usize {
        self.jobs.len()
    }

    /// Rows in scratch memory at once at most.
    pub(crate) fn scratch(&self) -> usize {
        self.rounds.iter().map(|round| round.adjusted.len()).max().unwrap_or(0)
    }

    /// Bytes that come back of reports; 0 without any.
    pub(crate) fn report_bytes(&self) -> usize {
        let reports = self.jobs.iter().any(|job| job.recipe.is_none());
        if reports { self.jobs.len() * FOUND_BYTES + self.tops * TOP_BYTES } else { 0 }
    }

    fn draw(&mut self, row: usize, recipe: &'a Recipe<'a>) -> usize {
        let how = &recipe.how;
        let cuts = !how.is_greedy() && (how.top_k.is_some_and(|k| k > 0) || how.top_p < 1.0);
        let bins = cuts.then_some(self.bins);
        self.bins += usize::from(cuts);
        let full = self
            .rounds
            .last()
            .is_none_or(|round| !recipe.is_plain() && round.adjusted.len() == ADJUSTED_ROWS_MAX);
        if full {
            self.open();
        }
        let round = self.last();
        let scratch = (!recipe.is_plain()).then_some(round.adjusted.len());
        round.adjusted.end += usize::from(scratch.is_some());
        round.cuts |= cuts;
        round.draws |= !how.is_greedy();
        self.job(Job { row, recipe: Some(recipe), target: NONE, tops: (0, 0), bins, scratch })
    }

    fn report(&mut self, row: usize, target: u32, top: u32) -> Report {
        let tops = (self.tops, (top as usize).min(self.width));
        let bins = (tops.1 > 0).then_some(self.bins);
        self.tops += tops.1;
        self.bins += usize::from(bins.is_some());
        if self.rounds.is_empty() {
            self.open();
        }
        let round = self.last();
        round.cuts |= bins.is_some();
        round.draws = true;
        Report { job: self.job(Job { row, recipe: None, target, tops, bins, scratch: None }), tops }
    }

    fn job(&mut self, job: Job<'a>) -> usize {
        self.jobs.push(job);
        self.last().jobs.end += 1;
        self.jobs.len() - 1
    }

    /// Begins a round.
    fn open(&mut self) {
        let (jobs, adjusted) =
            self.rounds.last().map_or((0, 0), |round| (round.jobs.end, round.adjusted.end));
        let (jobs, adjusted) = (jobs..jobs, adjusted..adjusted);
        self.rounds.push(Round { jobs, adjusted, cuts: false, draws: false });
    }

    fn last(&mut self) -> &mut Round {
        let last = self.rounds.len() - 1;
        &mut self.rounds[last]
    }

    fn adjusted(&self) -> usize {
        self.rounds.last().map_or(0, |round| round.adjusted.end)
    }

    /// Where jobs, adjusted rows and words begin in what is staged, and its end.
    pub(crate) fn places(&self) -> [usize; 4] {
        let adjusts = self.jobs.len() * JOB_BYTES;
        let words = adjusts + self.adjusted() * ADJUST_BYTES;
        let masked = |recipe: &Recipe<'_>| recipe.mask.is_some() || recipe.allowed.is_some();
        let of = |recipe: &Recipe<'_>| {
            let seen = recipe.penalties.as_ref().map_or(0, |penalties| penalties.seen.len());
            let mask = if masked(recipe) { self.width.div_ceil(32) } else { 0 };
            mask + 2 * (recipe.bias.len() + seen) + recipe.banned.len() + recipe.bad_ends.len()
        };
        let count: usize = self.jobs.iter().filter_map(|job| job.recipe.map(of)).sum();
        [0, adjusts, words, words + count * size_of::<u32>()]
    }
}

/// Where the rows are that jobs read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows {
    /// Logits as the model made them.
    pub(crate) logits: Address,
    /// Bytes of a row of them.
    pub(crate) bytes: usize,
    pub(crate) is_f32: u32,
    pub(crate) scale: f32,
    /// Rows that rules and penalties have changed.
    pub(crate) scratch: Address,
}

/// Writes words one behind the other.
struct Writer<'a> {
    out: &'a mut [u8],
    at: usize,
}

impl Writer<'_> {
    fn word(&mut self, word: u32) {
        self.out[self.at..self.at + 4].copy_from_slice(&word.to_le_bytes());
        self.at += 4;
    }

    fn float(&mut self, number: f32) {
        self.word(number.to_bits());
    }

    fn long(&mut self, long: u64) {
        self.word(long as u32);
        self.word((long >> 32) as u32);
    }

    fn words(&mut self, words: impl IntoIterator<Item = u32>) {
        words.into_iter().for_each(|word| self.word(word));
    }
}

/// Runs of words of one adjusted row: where each begins, and how many entries it has.
#[derive(Debug, Default)]
struct Runs {
    mask: Option<(u32, u32)>,
    bias: (u32, u32),
    seen: (u32, u32),
    banned: (u32, u32),
    bad: (u32, u32),
}

/// Lays `plan` out in `staged`, which has the room that [`Plan::places`] says.
pub(crate) fn write(plan: &Plan<'_>, rows: &Rows, staged: &mut [u8]) {
    let [jobs, adjusts, words, _] = plan.places();
    let (head, tail) = staged.split_at_mut(words);
    let (head, middle) = head.split_at_mut(adjusts);
    let mut jobs = Writer { out: head, at: jobs };
    let mut adjusts = Writer { out: middle, at: 0 };
    let mut tail = Writer { out: tail, at: 0 };
    for round in &plan.rounds {
        for (place, job) in plan.jobs[round.jobs.clone()].iter().enumerate() {
            let raw = rows.logits + (job.row * rows.bytes) as u64;
            let scratch = job.scratch.map(|slot| rows.scratch + (slot * scratch_bytes(plan.width)) as u64);
            let mut runs = Runs::default();
            if let (Some(out), Some(recipe)) = (scratch, job.recipe) {
                runs = write_words(recipe, plan.width, &mut tail);
                write_adjust(&mut adjusts, (out, raw), rows, (place, recipe, &runs));
            }
            write_job(&mut jobs, job, rows, (scratch, raw, runs.bad));
        }
    }
}

/// As `SampleJob` in sample.cu.
fn write_job(
    out: &mut Writer<'_>,
    job: &Job<'_>,
    rows: &Rows,
    (scratch, raw, bad): (Option<Address>, Address, (u32, u32)),
) {
    let how = job.recipe.map(|recipe| recipe.how);
    let kind = match &how {
        None => 3,
        Some(how) if how.is_greedy() => 1,
        Some(_) => 2,
    };
    let listed = u32::try_from(job.tops.1).unwrap_or(NONE);
    out.long(how.map_or(0.0, |how| how.at).to_bits());
    out.long(scratch.unwrap_or(raw));
    out.long(raw);
    out.float(if scratch.is_some() { 1.0 } else { rows.scale });
    out.float(rows.scale);
    out.float(how.map_or(1.0, |how| how.temperature));
    out.float(how.map_or(1.0, |how| how.top_p));
    out.float(how.map_or(0.0, |how| how.min_p));
    out.word(how.map_or(listed, |how| how.top_k.unwrap_or(0)));
    out.word(kind);
    out.word(if scratch.is_some() { 1 } else { rows.is_f32 });
    out.word(rows.is_f32);
    out.word(number(job.row));
    out.word(job.target);
    out.word(job.bins.map_or(NONE, number));
    out.word(bad.0);
    out.word(bad.1);
    out.word(number(job.tops.0));
    out.word(0);
}

/// As `SampleAdjust` in sample.cu.
fn write_adjust(
    to: &mut Writer<'_>,
    (out, raw): (Address, Address),
    rows: &Rows,
    (job, recipe, runs): (usize, &Recipe<'_>, &Runs),
) {
    let penalties = recipe.penalties.as_ref();
    to.long(out);
    to.long(raw);
    to.float(rows.scale);
    to.word(rows.is_f32);
    to.float(penalties.map_or(1.0, |penalties| penalties.repetition));
    to.float(penalties.map_or(0.0, |penalties| penalties.frequency));
    to.float(penalties.map_or(0.0, |penalties| penalties.presence));
    to.word(number(job));
    let mask = runs.mask.unwrap_or((NONE, 0));
    for (at, count) in [mask, runs.bias, runs.seen, runs.banned, runs.bad] {
        to.word(at);
        to.word(count);
    }
}

fn write_words(recipe: &Recipe<'_>, width: usize, out: &mut Writer<'_>) -> Runs {
    let begin = |out: &Writer<'_>, count: usize| (number(out.at / 4), number(count));
    let mut runs = Runs::default();
    if recipe.mask.is_some() || recipe.allowed.is_some() {
        let count = width.div_ceil(32);
        runs.mask = Some(begin(out, count));
        let own = recipe.mask.map_or(&[][..], |mask| mask.words());
        match recipe.allowed {
            None => {
                // What the mask does not cover is not allowed.
                out.words(own.iter().copied().chain(std::iter::repeat(0)).take(count));
            }
            Some(allowed) => {
                let mut words = vec![0_u32; count];
                let within = allowed.iter().filter(|token| (token.0 as usize) < width);
                for token in within.filter(|&&token| recipe.mask.is_none_or(|mask| mask.allows(token))) {
                    words[token.0 as usize / 32] |= 1 << (token.0 % 32);
                }
                out.words(words);
            }
        }
    }
    runs.bias = begin(out, recipe.bias.len());
    out.words(recipe.bias.iter().flat_map(|(token, bias)| [token.0, bias.to_bits()]));
    let seen = recipe.penalties.as_ref().map_or(&[][..], |penalties| &penalties.seen);
    runs.seen = begin(out, seen.len());
    out.words(seen.iter().flat_map(|&(token, times)| [token.0, times]));
    runs.banned = begin(out, recipe.banned.len());
    out.words(recipe.banned.iter().map(|token| token.0));
    runs.bad = begin(out, recipe.bad_ends.len());
    out.words(recipe.bad_ends.iter().map(|token| token.0));
    runs
}

fn number(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(NONE)
}

/// Page-locked memory for what is staged, in turns.
#[derive(Debug)]
pub(crate) struct Staging {
    buffers: [(Pinned, Event); STAGED_STEPS],
    turn: usize,
}

impl Staging {
    pub(crate) fn new() -> Result<Self, crate::Error> {
        let buffer = || Ok::<_, crate::Error>((Pinned::new(DRAWN_ROWS_MAX * JOB_BYTES)?, Event::new()?));
        Ok(Self { buffers: [buffer()?, buffer()?], turn: 0 })
    }

    /// Queues the copy of `bytes` bytes that `fill` writes.
    pub(crate) fn stage(
        &mut self,
        device: &Device,
        (to, bytes): (Address, usize),
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<(), Error> {
        self.turn = (self.turn + 1) % STAGED_STEPS;
        let (staging, copied) = &mut self.buffers[self.turn];
        copied.wait().map_err(Error::from)?;
        staging.reserve(bytes)?;
        let staged = &mut staging.as_mut_slice()[..bytes];
        fill(staged);
        // SAFETY: the caller's piece has room for so many bytes; this memory is not written again before `copied` has
        // passed.
        unsafe { result::memcpy_htod_async(to, staged, device.stream()) }
            .map_err(crate::Error::driver("cuMemcpyHtoDAsync"))?;
        copied.record(device.stream())?;
        device.unchain();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use ops::sample::{Penalties, Plain};
    use types::TokenMask;

    use super::*;

    const WIDTH: usize = 100;

    fn greedy() -> Recipe<'static> {
        Recipe::plain(Plain::GREEDY)
    }

    fn penalties(count: usize) -> Option<Penalties> {
        let seen = (0..count).map(|token| (TokenId(token as u32), 1)).collect();
        Some(Penalties { repetition: 2.0, frequency: 0.0, presence: 0.0, seen })
    }

    #[test]
    fn rows_are_left_to_the_host_that_name_more_than_the_card_takes() {
        let few = Ask::Token(Recipe { penalties: penalties(SEEN_MAX), ..greedy() });
        let many = Ask::Token(Recipe { penalties: penalties(SEEN_MAX + 1), ..greedy() });
        let asks = [Ask::GREEDY, many.clone(), few.clone(), Ask::Nothing];
        assert_eq!(left_to_host(&asks, WIDTH), [1]);
        let asked = Plan::new(&asks, WIDTH).asked;
        assert_eq!(asked, [Asked::Token(0, None), Asked::Nothing, Asked::Token(1, None), Asked::Nothing]);
        // What all rows together may take.
        let asks = vec![few; 200];
        let left = left_to_host(&asks, WIDTH);
        assert!(!left.is_empty() && left.iter().all(|&row| row > 100), "{left:?}");
        let staged = Plan::new(&asks, WIDTH).places()[3];
        assert!(staged <= STAGED_BYTES_MAX && staged > STAGED_BYTES_MAX / 2, "{staged} B");
    }

    #[test]
    fn adjusted_rows_come_in_rounds_that_scratch_memory_holds() {
        let banned = [TokenId(3)];
        let adjusted = Ask::Token(Recipe { banned: &banned, report: Some(2), ..greedy() });
        let mut asks = vec![adjusted; 2 * ADJUSTED_ROWS_MAX + 1];
        asks.insert(0, Ask::GREEDY);
        let plan = Plan::new(&asks, WIDTH);
        let adjusted: Vec<usize> = plan.rounds.iter().map(|round| round.adjusted.len()).collect();
        assert_eq!(adjusted, [ADJUSTED_ROWS_MAX, ADJUSTED_ROWS_MAX, 1]);
        assert_eq!(plan.scratch(), ADJUSTED_ROWS_MAX);
        let jobs: Vec<usize> = plan.rounds.iter().map(|round| round.jobs.len()).collect();
        assert_eq!(jobs, [1 + 2 * ADJUSTED_ROWS_MAX, 2 * ADJUSTED_ROWS_MAX, 2]);
        assert_eq!(plan.jobs(), jobs.iter().sum::<usize>());
        assert_eq!((plan.bins, plan.tops), (asks.len() - 1, 2 * (asks.len() - 1)));
    }

    #[test]
    fn what_is_written_is_what_was_reserved() {
        let (bias, allowed) = ([(TokenId(7), -1.5)], [TokenId(1), TokenId(40), TokenId(99)]);
        let (mask, banned) = (TokenMask::of(&[TokenId(1), TokenId(99)]), [TokenId(5)]);
        let recipe = Recipe {
            bias: &bias,
            penalties: penalties(2),
            allowed: Some(&allowed),
            mask: Some(&mask),
            banned: &banned,
            bad_ends: vec![TokenId(77)],
            report: Some(500),
            ..Recipe::plain(Plain { temperature: 0.5, top_k: Some(9), ..Plain::GREEDY })
        };
        let asks = [Ask::Likelihood { token: TokenId(6), top: 0 }, Ask::Token(recipe)];
        let plan = Plan::new(&asks, WIDTH);
        let [_, adjusts, words, end] = plan.places();
        let rows = Rows { logits: 4096, bytes: 200, is_f32: 0, scale: 0.25, scratch: 1 << 20 };
        let mut staged = vec![0xAB_u8; end];
        write(&plan, &rows, &mut staged);
        let word = |at: usize| u32::from_le_bytes(staged[at..at + 4].try_into().unwrap_or_default());
        assert_eq!((plan.jobs(), adjusts, words), (3, 3 * JOB_BYTES, 3 * JOB_BYTES + ADJUST_BYTES));
        // Kind and target of each job, and where the second one reads.
        assert_eq!([0, 1, 2].map(|job| word(job * JOB_BYTES + 48)), [3, 2, 3]);
        assert_eq!([0, 1, 2].map(|job| word(job * JOB_BYTES + 64)), [6, NONE, NONE]);
        assert_eq!([8, 16].map(|at| word(JOB_BYTES + at)), [1 << 20, 4096 + 200]);
        // The mask and the allowed tokens have two in common; then one bias, two seen, one banned, one bad.
        let tail: Vec<u32> = (words..end).step_by(4).map(word).collect();
        assert_eq!(tail, [2, 0, 0, 8, 7, (-1.5_f32).to_bits(), 0, 1, 1, 1, 5, 77]);
        assert_eq!(word(adjusts + 36), 1, "the job of the round");
        assert_eq!(plan.asked[1], Asked::Token(1, Some(Report { job: 2, tops: (0, WIDTH) })));
    }
}

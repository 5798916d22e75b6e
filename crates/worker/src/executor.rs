//! Runs step plans on one rank: plan → batch → model → (on the first rank of its sub-group) tokens. Where tokens reach the
//! next step on the device, that one begins before they are collected.

use std::time::Duration;

use engine::{Brief, Drawn, RowKind, RowOutput, RowPurpose, RowWork, SlotTables, Step, StepPlan};
use model::Activity;
use ops::sample::{Ask, Choice, Draw, TokenLogprob};
use ops::{Batch, BatchSequence, BlockTable, Fed};
use types::{History, Logprobs, TokenId, TpRank, TpSize};

use crate::Error;
use crate::device::{QueuedForward, QueuedTokens, RankModel};
use crate::guide::{Choices, Limit};
use crate::numerics::Numerics;
use crate::pipeline::Progress;

/// Most tokens of a vocabulary in a group of several sub-groups: ranks tell each other what they drew as fp32 numbers, which
/// hold whole numbers exactly up to 2^24.
pub(crate) const VOCABULARY_MAX: u32 = (1 << 24) - 2;

/// A rank's model with the block tables its plans refer to.
pub(crate) struct Executor {
    rank: TpRank,
    model: RankModel,
    numerics: Option<Numerics>,
    tables: SlotTables,
    inputs: Vec<TokenId>,
    /// Rows of the step whose token the device has, and which it is.
    on_device: Vec<(u32, u32)>,
    batch: Batch,
    portion: Portion,
    /// What the last step drew; in a group of one sub-group a follower is told by its leader.
    pub(crate) drawn: Drawn,
}

/// A step whose tokens are being drawn.
pub(crate) struct Drawing(QueuedTokens);

/// Which rows of a step are this rank's: those of its sub-group.
struct Portion {
    engine: engine::Config,
    /// This rank's sub-group.
    own: usize,
    /// Ranks of a sub-group.
    tensor: TpSize,
    /// Rows of each sub-group in the step.
    rows: Vec<usize>,
    /// The sub-group of each logit row of the step.
    places: Vec<usize>,
}

impl Portion {
    /// Whether the sequence in a slot is this sub-group's.
    const fn has(&self, slot: types::SlotId) -> bool {
        self.engine.sub_group(slot) as usize == self.own
    }

    /// Which logit rows of the step are this sub-group's.
    fn own_rows(&self) -> impl Iterator<Item = usize> + '_ {
        self.places.iter().enumerate().filter(|(_, place)| **place == self.own).map(|(row, _)| row)
    }

    /// Which are not.
    fn other_rows(&self) -> impl Iterator<Item = usize> + '_ {
        self.places.iter().enumerate().filter(|(_, place)| **place != self.own).map(|(row, _)| row)
    }
}

impl Executor {
    /// For a rank of a group whose sub-groups have `tensor` ranks each.
    pub(crate) fn new(
        rank: TpRank,
        tensor: TpSize,
        model: RankModel,
        config: &engine::Config,
    ) -> Result<Self, Error> {
        let tables = SlotTables::new(config).map_err(|source| Error::Engine { rank, source })?;
        let (engine, own) = (config.clone(), rank.as_usize() / tensor.as_usize());
        let rows = vec![0; config.data_parallel as usize];
        let portion = Portion { engine, own, tensor, rows, places: Vec::new() };
        let (inputs, on_device, batch, drawn) = (Vec::new(), Vec::new(), Batch::default(), Drawn::default());
        let numerics = model.numerics();
        Ok(Self { rank, model, numerics, tables, inputs, on_device, batch, portion, drawn })
    }

    /// Whether what a step draws reaches the next one on the device, on every rank.
    pub(crate) fn feeds(&self) -> bool {
        self.model.feeds()
    }

    /// Whether a step can begin before the one before it has ended. Not when every layer is looked at: what is found then is
    /// the newest step's.
    fn runs_ahead(&self) -> bool {
        self.model.feeds() && !self.model.looks()
    }

    /// Queues a step up to its last layer. Behind it come [`Executor::draw`] at the leader, [`Executor::follow`] or
    /// [`Executor::follow_among`] elsewhere.
    pub(crate) fn begin(&mut self, plan: &StepPlan) -> Result<QueuedForward, Error> {
        self.prepare(plan)?;
        let forward = self.model.begin(&self.batch, &self.portion.rows);
        self.exchange_tables(plan);
        Ok(forward?)
    }

    /// A follower's part of a step in a group of one sub-group: logits are the leader's business.
    pub(crate) fn follow(&mut self, forward: QueuedForward) -> Result<QueuedTokens, Error> {
        Ok(self.model.follow(forward)?)
    }

    /// A follower's part of a step in a group of several sub-groups, the first rank of which samples its rows.
    pub(crate) fn follow_among(
        &mut self,
        plan: &StepPlan,
        brief: &Brief,
        choices: &mut impl Choices,
    ) -> Result<(), Error> {
        let forward = self.begin(plan)?;
        let work: Vec<&RowWork> = brief.work.iter().collect();
        let outputs = if self.samples() {
            let drawing = self.draw_own(forward, &work, choices)?;
            self.collect_own(drawing, &work, choices)?
        } else {
            let pending = self.model.follow(forward)?;
            self.model.collect(pending)?;
            Vec::new()
        };
        let outputs = self.exchange_outputs(&brief.kinds, &outputs)?;
        self.drawn.take(plan.step(), &outputs);
        Ok(())
    }

    /// The leader's part of a step that has begun: one result for each piece of its work, of which `choices` say what may be
    /// drawn. They are known at once, or collected later when the next step can begin before. `before_exchange` is
    /// called when only the results of other sub-groups are missing, with their logit rows.
    pub(crate) fn draw(
        &mut self,
        forward: QueuedForward,
        step: &Step,
        choices: &mut impl Choices,
        before_exchange: impl FnOnce(&mut dyn Iterator<Item = usize>) -> Result<(), Error>,
    ) -> Result<Progress<Drawing>, Error> {
        let Step { plan, work } = step;
        let own: Vec<&RowWork> = self.portion.own_rows().map(|row| &work[row]).collect();
        let drawing = self.draw_own(forward, &own, choices)?;
        // What is there already is not held back for the next step, which takes its whole time on the CPU.
        if self.runs_ahead() && !self.is_drawn(&drawing)? {
            return Ok(Progress::Queued(drawing));
        }
        let mut outputs = self.collect_own(drawing, &own, choices)?;
        if self.portion.rows.len() > 1 {
            before_exchange(&mut self.portion.other_rows())?;
            let kinds: Vec<RowKind> = work.iter().map(|row| RowKind::of(&row.purpose)).collect();
            outputs = self.exchange_outputs(&kinds, &outputs)?;
            self.portion.other_rows().for_each(|row| note(&work[row], &outputs[row], choices));
        }
        self.drawn.take(plan.step(), &outputs);
        Ok(Progress::Done(outputs))
    }

    /// Whether [`Executor::collect`] would not wait.
    pub(crate) fn is_drawn(&mut self, drawing: &Drawing) -> Result<bool, Error> {
        Ok(self.model.is_drawn(&drawing.0)?)
    }

    /// The results of a step that [`Executor::draw`] left.
    pub(crate) fn collect(
        &mut self,
        drawing: Drawing,
        step: &Step,
        choices: &mut impl Choices,
    ) -> Result<Vec<RowOutput>, Error> {
        let work: Vec<&RowWork> = step.work.iter().collect();
        self.collect_own(drawing, &work, choices)
    }

    /// Whether a follower's part of a step is over.
    pub(crate) fn has_followed(&mut self, pending: &QueuedTokens) -> Result<bool, Error> {
        Ok(self.model.is_drawn(pending)?)
    }

    /// Waits for the end of a follower's part of a step.
    pub(crate) fn followed(&mut self, pending: QueuedTokens) -> Result<(), Error> {
        self.model.collect(pending)?;
        Ok(())
    }

    /// How long the device had nothing to do before the step that was collected last, where it says so.
    pub(crate) fn idle(&self) -> Option<Duration> {
        self.model.idle()
    }

    /// Whether this is the first rank of its sub-group, which samples.
    fn samples(&self) -> bool {
        self.rank.as_usize().is_multiple_of(self.portion.tensor.as_usize())
    }

    /// Has this sub-group's logit rows drawn: by the device where it can, else here.
    fn draw_own(
        &mut self,
        forward: QueuedForward,
        work: &[&RowWork],
        choices: &mut impl Choices,
    ) -> Result<Drawing, Error> {
        let Self { rank, model, batch, portion, .. } = self;
        assert_eq!(work.len(), batch.logit_rows.len(), "{rank}: each logit row has work");
        let limits: Vec<Limit> =
            portion.own_rows().zip(work).map(|(at, row)| limit(at, row, choices)).collect();
        let asks: Vec<Ask<'_>> = work.iter().zip(&limits).map(|(row, limit)| ask(row, limit)).collect();
        Ok(Drawing(model.draw(forward, &asks)?))
    }

    /// The results of this sub-group's logit rows.
    fn collect_own(
        &mut self,
        Drawing(pending): Drawing,
        work: &[&RowWork],
        choices: &mut impl Choices,
    ) -> Result<Vec<RowOutput>, Error> {
        let chosen = self.model.collect(pending)?;
        let output = |(choice, work): (Choice, &&RowWork)| {
            let output = output(choice);
            note(work, &output, choices);
            output
        };
        Ok(chosen.into_iter().zip(work).map(output).collect())
    }

    /// Every sub-group's results, in the order of the step's logit rows: the first rank of each brings its own, and all ranks
    /// get all of them, because the inputs of the next step refer to them.
    fn exchange_outputs(&mut self, kinds: &[RowKind], own: &[RowOutput]) -> Result<Vec<RowOutput>, Error> {
        if kinds.is_empty() {
            return Ok(Vec::new());
        }
        let Self { rank, model, portion, numerics, .. } = self;
        let tensor = portion.tensor.as_usize();
        // A number before the results says where a value came from that is none.
        let mut counts = vec![0; rank.size().as_usize()];
        counts.iter_mut().step_by(tensor).for_each(|count| *count = 1);
        for (kind, place) in kinds.iter().zip(&portion.places) {
            counts[place * tensor] += kind.width();
        }
        let mut numbers = Vec::with_capacity(counts[rank.as_usize()]);
        if counts[rank.as_usize()] > 0 {
            let found = numerics.as_ref().filter(|_| !rank.is_leader()).map_or(0, Numerics::take);
            numbers.push(found as f32);
            let kinds = kinds.iter().zip(&portion.places).filter(|(_, place)| **place == portion.own);
            kinds.zip(own).for_each(|((kind, _), output)| kind.put(output, &mut numbers));
        }
        let all = model.gather_numbers(&numbers, &counts)?;
        let mut rest: Vec<&[f32]> = Vec::with_capacity(portion.rows.len());
        let mut from = 0;
        for count in counts.iter().step_by(tensor) {
            let leader = numerics.iter().filter(|_| rank.is_leader());
            leader.for_each(|numerics| numerics.found(all[from] as u32));
            rest.push(&all[from + 1..from + count]);
            from += count;
        }
        let read = |(kind, place): (&RowKind, &usize)| {
            let (numbers, behind) = rest[*place].split_at(kind.width());
            rest[*place] = behind;
            kind.read(numbers)
        };
        Ok(kinds.iter().zip(&portion.places).map(read).collect())
    }

    /// Every rank's activity so far, in rank order; all ranks ask together.
    pub(crate) fn activity(&mut self) -> Result<Vec<Activity>, Error> {
        Ok(self.model.gather_activity()?)
    }

    fn prepare(&mut self, plan: &StepPlan) -> Result<(), Error> {
        let (rank, feeds) = (self.rank, self.model.feeds());
        let refuse = |source| Error::Engine { rank, source };
        let Self { tables, inputs, on_device, batch, portion, drawn, .. } = self;
        tables.apply(plan).map_err(refuse)?;
        let Batch { tokens, sequences, logit_rows, fed } = batch;
        fed.clear();
        if feeds {
            // The rows of the step are all this rank's.
            tables.known(plan, inputs, on_device);
            fed.extend(on_device.iter().map(|&(row, from)| Fed { row, from }));
        } else {
            tables.resolve(plan, drawn, inputs).map_err(refuse)?;
        }
        tokens.clear();
        logit_rows.clear();
        portion.places.clear();
        portion.rows.fill(0);
        let mut count = 0;
        for planned in plan.sequences() {
            let place = portion.engine.sub_group(planned.slot) as usize;
            portion.places.extend(std::iter::repeat_n(place, planned.logit_rows as usize));
            portion.rows[place] += planned.rows.len();
            if place != portion.own {
                continue;
            }
            if count == sequences.len() {
                let tables = [BlockTable::default(), BlockTable::default()];
                sequences.push(BatchSequence { rows: 0..0, start: types::Position(0), tables });
            }
            let first = tokens.len();
            tokens.extend_from_slice(&inputs[planned.rows]);
            sequences[count].rows = first..tokens.len();
            sequences[count].start = planned.start;
            count += 1;
            let end = u32::try_from(tokens.len()).unwrap_or(u32::MAX);
            logit_rows.extend(end - planned.logit_rows..end);
        }
        sequences.truncate(count);
        self.exchange_tables(plan);
        Ok(())
    }

    /// Lends the batch the tables of the plan's slots, and takes them back when the step has run: no copy is made.
    fn exchange_tables(&mut self, plan: &StepPlan) {
        let Self { tables, batch, portion, .. } = self;
        let own = plan.sequences().filter(|planned| portion.has(planned.slot));
        for (sequence, planned) in batch.sequences.iter_mut().zip(own) {
            tables.swap(planned.slot, &mut sequence.tables);
        }
    }
}

/// What a row may draw. A grammar's mask that is not ready is computed now: the row's logits are still under way.
fn limit(at: usize, row: &RowWork, choices: &mut impl Choices) -> Limit {
    match &row.purpose {
        RowPurpose::Sample { banned, .. } if choices.limits(at, row) => match choices.limit(at, row) {
            Limit::To(mask) if !mask.leaves(banned) => Limit::Nothing,
            limit => limit,
        },
        RowPurpose::Sample { .. } | RowPurpose::PromptLogprob { .. } => Limit::None,
    }
}

/// What is asked of a row's logits. Its history has all tokens before: the results of earlier steps have been collected.
fn ask<'a>(row: &'a RowWork, limit: &'a Limit) -> Ask<'a> {
    match &row.purpose {
        RowPurpose::Sample { params, rules, history, banned, logprobs, stream, position } => {
            let mask = match limit {
                Limit::None => None,
                Limit::To(mask) => Some(mask),
                Limit::Nothing => return Ask::Nothing,
            };
            let draw = Draw { params, rules, stream: *stream, position: *position, banned, mask };
            let report = logprobs.map(Logprobs::top);
            Ask::Token(match history {
                Some(history) => history.look(|history| draw.recipe(history, report)),
                None => draw.recipe(&History::default(), report),
            })
        }
        RowPurpose::PromptLogprob { target, top, .. } => Ask::Likelihood { token: *target, top: top.top() },
    }
}

/// Takes note of what was drawn for a sequence.
fn note(work: &RowWork, output: &RowOutput, choices: &mut impl Choices) {
    if let (RowPurpose::Sample { history, .. }, RowOutput::Sampled { token, .. }) = (&work.purpose, output) {
        if let Some(history) = history {
            history.draw(|_| *token);
        }
        choices.drew(work, *token);
    }
}

fn output(choice: Choice) -> RowOutput {
    match choice {
        Choice::Token { token, logprob } => RowOutput::Sampled { token, logprob: logprob.map(ours) },
        Choice::Likelihood(logprob) => RowOutput::PromptLogprob(ours(logprob)),
        Choice::NotANumber => RowOutput::NotANumber,
        // Nothing was asked for: there is nothing that it may draw.
        Choice::Left => RowOutput::NoToken,
    }
}

fn ours(from: TokenLogprob) -> engine::TokenLogprob {
    engine::TokenLogprob { token: from.token, logprob: from.logprob, top: from.top }
}

//! A step in two parts: the forward pass ([`Model::begin`]), and the tokens of its logit rows ([`Model::draw`]), which are
//! collected when the device has them ([`Model::collect`]). None but the last waits for the device, unless the host has a
//! part in the step; so the next step can be queued before this one has ended. A row of it whose token this step draws
//! takes it where it was drawn ([`ops::Batch::fed`]).

use std::ops::Range;

use collectives::{Collective, Counters};
use ops::sample::{Ask, Choice, answer};
use ops::{Backend, Batch, joined};
use types::{Dispatch, TokenId};

use super::{LOGIT_ROWS_MAX, Model};
use crate::Error;

/// A step that is queued up to the residual stream after the last layer.
#[must_use = "its tokens are still to be drawn"]
pub struct Forward<B: Backend> {
    x: B::Tensor,
    rows: usize,
    logit_rows: usize,
    before: Counters,
}

/// A step that is queued to its end.
#[must_use = "its tokens are still to be collected"]
pub struct Pending<B: Backend>(Vec<Part<B>>);

/// What became of some of the logit rows of a step, in order.
enum Part<B: Backend> {
    Known(Vec<Choice>),
    /// With those of rows that the device left to the host.
    Drawing(B::Drawing, Vec<(usize, Choice)>),
}

impl<B: Backend, C: Collective<B::Tensor>> Model<B, C> {
    /// Whether tokens that were drawn for a step reach the next one on the device ([`ops::Batch::fed`]), on every rank: a
    /// rank that is alone in its group, or a group whose collectives are queued on the device like all else.
    pub fn feeds(&self) -> bool {
        self.plan.subgroups() == 1
            && self.dispatch == Dispatch::Replicated
            && self.plan.placement.is_none()
            && self.draws_on_device()
    }

    /// Queues one step up to its last layer. Every rank calls it, as [`Model::step_among`], and then draws its tokens
    /// before the next step begins.
    ///
    /// # Errors
    /// As [`Model::step_among`].
    pub fn begin(&mut self, batch: &Batch, rows: &[usize]) -> Result<Forward<B>, Error> {
        let before = self.check(batch, rows)?;
        let x = self.hidden(batch, rows)?;
        Ok(Forward { x, rows: batch.tokens.len(), logit_rows: batch.logit_rows.len(), before })
    }

    /// As [`Model::begin`]; `observe` sees what it sees in [`Model::step_observed`].
    ///
    /// # Errors
    /// As [`Model::step_observed`].
    pub fn begin_observed(
        &mut self,
        batch: &Batch,
        rows: &[usize],
        mut observe: impl FnMut(&mut B, usize, &B::Tensor) -> Result<(), Error>,
    ) -> Result<Forward<B>, Error> {
        let before = self.check(batch, rows)?;
        self.backend.begin_step(batch)?;
        let x = self.layers(rows, &mut observe)?;
        Ok(Forward { x, rows: batch.tokens.len(), logit_rows: batch.logit_rows.len(), before })
    }

    /// Queues making what `asks`, as long as there are logit rows, want of each. Rows that hold more than the device takes
    /// are made here at once, for which this waits.
    ///
    /// In a group whose collectives are queued on the device the first rank of a sub-group draws and tells the others,
    /// on the device: there this is [`Model::follow`].
    ///
    /// # Errors
    /// As [`Model::step_among`].
    ///
    /// # Panics
    /// When `asks` has another length.
    pub fn draw(&mut self, forward: Forward<B>, asks: &[Ask<'_>]) -> Result<Pending<B>, Error> {
        assert_eq!(asks.len(), forward.logit_rows, "each logit row is asked for something, or for nothing");
        let on_device = self.draws_on_device();
        if on_device && self.plan.rank.index() > 0 {
            return self.follow(forward);
        }
        let most = self.rows_at_once();
        let mut parts = Vec::with_capacity(1 + asks.len() / most);
        for (chunk, asks) in asks.chunks(most).enumerate() {
            let rows = (chunk * most, asks);
            parts.push(match on_device {
                true => self.draw_on_device(&forward.x, rows)?,
                false => Part::Known(self.draw_on_host(&forward.x, rows)?),
            });
        }
        self.end(forward, parts)
    }

    /// The part in [`Model::draw`] of a rank that does not draw: its share of the logits. The choices are those of rows that
    /// were left.
    ///
    /// # Errors
    /// As [`Model::step_among`].
    pub fn follow(&mut self, forward: Forward<B>) -> Result<Pending<B>, Error> {
        let (on_device, most) = (self.draws_on_device(), self.rows_at_once());
        for first in (0..forward.logit_rows).step_by(most) {
            let rows = first..forward.logit_rows.min(first + most);
            drop(self.own_logits(&forward.x, rows.clone())?);
            if on_device {
                self.share(rows)?;
            }
        }
        let left = vec![Choice::Left; forward.logit_rows];
        self.end(forward, vec![Part::Known(left)])
    }

    /// Whether [`Model::collect`] would not wait.
    ///
    /// # Errors
    /// On a device failure, or when a rank is late.
    pub fn is_drawn(&mut self, pending: &Pending<B>) -> Result<bool, Error> {
        for part in pending.0.iter().rev() {
            if let Part::Drawing(drawing, _) = part {
                return Ok(self.backend.is_drawn(drawing)?);
            }
        }
        Ok(true)
    }

    /// What became of each logit row of a step, when the device has come so far. Steps are collected in the order in which
    /// they were begun.
    ///
    /// # Errors
    /// As [`Model::is_drawn`].
    pub fn collect(&mut self, pending: Pending<B>) -> Result<Vec<Choice>, Error> {
        let mut choices = Vec::new();
        for part in pending.0 {
            match part {
                Part::Known(known) => choices.extend(known),
                Part::Drawing(drawing, by_host) => {
                    let first = choices.len();
                    choices.extend(self.backend.collect(drawing)?);
                    by_host.into_iter().for_each(|(row, choice)| choices[first + row] = choice);
                }
            }
        }
        Ok(choices)
    }

    /// One step from its beginning to its tokens.
    ///
    /// # Errors
    /// As [`Model::draw`].
    pub fn choose(
        &mut self,
        (batch, rows): (&Batch, &[usize]),
        asks: &[Ask<'_>],
    ) -> Result<Vec<Choice>, Error> {
        let forward = self.begin(batch, rows)?;
        let pending = self.draw(forward, asks)?;
        self.collect(pending)
    }

    /// As [`Model::step`], for steps that need no more of the logits than each row's most likely token (the lowest on a
    /// tie); `None` for a row with a logit that is not a number.
    ///
    /// # Errors
    /// As [`Model::step`].
    pub fn most_likely(&mut self, batch: &Batch) -> Result<Vec<Option<TokenId>>, Error> {
        let asks = vec![Ask::GREEDY; batch.logit_rows.len()];
        let chosen = self.choose((batch, &[batch.tokens.len()]), &asks)?;
        let token = |choice| match choice {
            Choice::Token { token, .. } => Some(token),
            Choice::Likelihood(_) | Choice::NotANumber | Choice::Left => None,
        };
        Ok(chosen.into_iter().map(token).collect())
    }

    /// Counts the step, and marks its end; tokens that are told to other ranks have arrived there by then.
    fn end(&mut self, forward: Forward<B>, mut parts: Vec<Part<B>>) -> Result<Pending<B>, Error> {
        let Forward { x, rows, before, .. } = forward;
        self.count(rows, &before);
        drop(x);
        if !matches!(parts.last(), Some(Part::Drawing(..))) || self.plan.rank.size().as_usize() > 1 {
            parts.push(Part::Drawing(self.backend.mark()?, Vec::new()));
        }
        Ok(Pending(parts))
    }

    /// Whether a device has all logits of a row: its rank is alone in its sub-group, or they are gathered there.
    fn draws_on_device(&self) -> bool {
        let queues = self.subgroup.as_ref().map_or(self.comm.queues(), Collective::queues);
        self.plan.rank.size().as_usize() == 1 || queues
    }

    /// Logit rows that are made at once; all ranks of a sub-group say the same.
    fn rows_at_once(&self) -> usize {
        if self.draws_on_device() { self.backend.drawn_rows_max() } else { LOGIT_ROWS_MAX }
    }

    fn draw_on_device(
        &mut self,
        x: &B::Tensor,
        (first, asks): (usize, &[Ask<'_>]),
    ) -> Result<Part<B>, Error> {
        let (vocab, scale) = (self.config.vocab_size, self.config.logit_scale);
        let rows = first..first + asks.len();
        let mut logits = self.own_logits(x, rows.clone())?;
        if self.plan.rank.size().as_usize() > 1 {
            logits = self.backend.join_ranks(logits, (asks.len(), self.plan.vocab_rows, vocab))?;
        }
        let drawing = self.backend.draw(&logits, (vocab, scale), (first, asks))?;
        let mut by_host = Vec::new();
        for row in self.backend.left_to_host(asks, vocab) {
            let mut values = self.backend.read_rows(&logits, row..row + 1)?;
            if scale != 1.0 {
                values.iter_mut().for_each(|value| *value *= scale);
            }
            let choice = answer(first + row, &values, &asks[row]);
            if let Choice::Token { token, .. } = &choice {
                self.backend.feed(first + row, &[*token])?;
            }
            by_host.push((row, choice));
        }
        drop(logits);
        self.share(rows)?;
        Ok(Part::Drawing(drawing, by_host))
    }

    /// The first rank's tokens of logit rows `rows`, for all ranks of the sub-group.
    fn share(&mut self, rows: Range<usize>) -> Result<(), Error> {
        let Self { plan, backend, comm, subgroup, .. } = self;
        if plan.rank.size().as_usize() == 1 {
            return Ok(());
        }
        let comm = subgroup.as_mut().unwrap_or(comm);
        let own = plan.rank.index() == 0;
        let mut tokens = match own {
            true => backend.tokens_drawn(rows.clone())?,
            false => backend.buffer(1, rows.len())?,
        };
        comm.broadcast(0, &mut tokens)?;
        if own { Ok(()) } else { Ok(backend.feed_tensor(rows.start, &tokens)?) }
    }

    fn draw_on_host(
        &mut self,
        x: &B::Tensor,
        (first, asks): (usize, &[Ask<'_>]),
    ) -> Result<Vec<Choice>, Error> {
        let logits = self.logits(x, first..first + asks.len())?;
        let rows = (first..).zip(logits.chunks_exact(self.config.vocab_size).zip(asks));
        Ok(rows.map(|(row, (logits, ask))| answer(row, logits, ask)).collect())
    }

    /// Gives `sink` the logits of all of a step's rows, a number of rows at a time.
    pub(super) fn sink_logits(
        &mut self,
        batch: &Batch,
        x: &B::Tensor,
        mut sink: impl FnMut(usize, &[f32]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut first = 0;
        while first < batch.logit_rows.len() {
            let end = batch.logit_rows.len().min(first + LOGIT_ROWS_MAX);
            sink(first, &self.logits(x, first..end)?)?;
            first = end;
        }
        Ok(())
    }

    /// Logits [which, vocabulary], scaled; equal on all ranks of the sub-group.
    fn logits(&mut self, x: &B::Tensor, which: Range<usize>) -> Result<Vec<f32>, Error> {
        let rows = which.len();
        let all = self.own_logits(x, which)?;
        let Self { config, plan, backend, .. } = self;
        let mut logits = backend.read(&all)?;
        if plan.rank.size().as_usize() > 1 {
            logits = joined(&logits, (rows, plan.vocab_rows, config.vocab_size));
        }
        if config.logit_scale != 1.0 {
            logits.iter_mut().for_each(|l| *l *= config.logit_scale);
        }
        Ok(logits)
    }

    /// Logits on the device: [which, vocabulary] of a rank that is alone in its sub-group, else
    /// [ranks, which, rows of a rank].
    fn own_logits(&mut self, x: &B::Tensor, which: Range<usize>) -> Result<B::Tensor, Error> {
        let rows = which.len();
        let Self { config, plan, backend, comm, subgroup, weights, .. } = self;
        let comm = subgroup.as_mut().unwrap_or(comm);
        let x = backend.logit_rows(x, which)?;
        let n = backend.norm(&x, &weights.final_norm, config.norm)?;
        let own = backend.linear(&n, weights.head.as_ref().unwrap_or(&weights.embed))?;
        let ranks = comm.rank().size().as_usize();
        if ranks == 1 {
            return Ok(own);
        }
        let mut all = backend.buffer_like(&own, ranks * rows, plan.vocab_rows)?;
        comm.all_gather(&own, &vec![rows * plan.vocab_rows; ranks], &mut all)?;
        Ok(all)
    }
}

//! Runs one step plan on one rank: plan → batch → model → (on the leader) tokens.

use engine::{Drawn, RowOutput, RowPurpose, RowWork, SlotTables, Step, StepPlan};
use model::Activity;
use ops::sample::{self, Draw, Logits, Plain};
use ops::{Batch, BatchSequence, BlockTable};
use types::{History, TpRank};

use crate::Error;
use crate::device::RankModel;
use crate::guide::{Choice, Guides};

/// A rank's model with the block tables its plans refer to.
pub(crate) struct Executor {
    rank: TpRank,
    model: RankModel,
    tables: SlotTables,
    batch: Batch,
    /// What the last step drew; a follower is told by its leader.
    pub(crate) drawn: Drawn,
}

impl Executor {
    pub(crate) fn new(rank: TpRank, model: RankModel, config: &engine::Config) -> Result<Self, Error> {
        let tables = SlotTables::new(config).map_err(|source| Error::Engine { rank, source })?;
        Ok(Self { rank, model, tables, batch: Batch::default(), drawn: Drawn::default() })
    }

    /// A follower's part of a step: logits are the leader's business.
    pub(crate) fn follow(&mut self, plan: &StepPlan) -> Result<(), Error> {
        self.prepare(plan)?;
        self.model.step(&self.batch, |_, _| Ok(()))?;
        self.exchange_tables(plan);
        Ok(())
    }

    /// The leader's part of a step: one result for each piece of its work, of which `guides` say what may be drawn.
    pub(crate) fn lead(&mut self, step: &Step, guides: &Guides) -> Result<Vec<RowOutput>, Error> {
        let Step { plan, work } = step;
        self.prepare(plan)?;
        assert_eq!(work.len(), self.batch.logit_rows.len(), "each logit row has work");
        let how: Vec<Option<Plain>> = work.iter().map(|row| plain(row, guides)).collect();
        let outputs = if !self.model.looks() && how.iter().any(Option::is_some) {
            self.choose(&how, (work, guides))?
        } else {
            self.sample(work, guides)?
        };
        self.exchange_tables(plan);
        self.drawn.take(plan.step(), &outputs);
        Ok(outputs)
    }

    /// The device draws where it can; the other rows' logits come to the host.
    fn choose(
        &mut self,
        how: &[Option<Plain>],
        (work, guides): (&[RowWork], &Guides),
    ) -> Result<Vec<RowOutput>, Error> {
        let mut left = Vec::new();
        let chosen = self.model.choose(&self.batch, how, |row, logits| {
            left.push(row_output(row, logits, &work[row], guides));
            Ok(())
        })?;
        let mut left = left.into_iter();
        let output = |choice| match choice {
            sample::Choice::Token(token) => RowOutput::Sampled { token, logprob: None },
            sample::Choice::NotANumber => RowOutput::NotANumber,
            sample::Choice::Left => left.next().unwrap_or(RowOutput::NotANumber),
        };
        Ok(chosen.into_iter().map(output).collect())
    }

    fn sample(&mut self, work: &[RowWork], guides: &Guides) -> Result<Vec<RowOutput>, Error> {
        let vocab = self.model.config().vocab_size;
        let mut outputs = Vec::with_capacity(work.len());
        self.model.step(&self.batch, |first, logits| {
            for (i, row) in logits.chunks_exact(vocab).enumerate() {
                outputs.push(row_output(first + i, row, &work[first + i], guides));
            }
            Ok(())
        })?;
        Ok(outputs)
    }

    /// Every rank's activity so far, in rank order; all ranks ask together.
    pub(crate) fn activity(&mut self) -> Result<Vec<Activity>, Error> {
        Ok(self.model.gather_activity()?)
    }

    fn prepare(&mut self, plan: &StepPlan) -> Result<(), Error> {
        let rank = self.rank;
        let refuse = |source| Error::Engine { rank, source };
        self.tables.apply(plan).map_err(refuse)?;
        let Batch { tokens, sequences, logit_rows } = &mut self.batch;
        self.tables.resolve(plan, &self.drawn, tokens).map_err(refuse)?;
        logit_rows.clear();
        logit_rows.extend(plan.logit_rows());
        sequences.resize_with(plan.sequence_count(), || BatchSequence {
            rows: 0..0,
            start: types::Position(0),
            tables: [BlockTable::default(), BlockTable::default()],
        });
        for (sequence, planned) in sequences.iter_mut().zip(plan.sequences()) {
            sequence.rows = planned.rows;
            sequence.start = planned.start;
        }
        self.exchange_tables(plan);
        Ok(())
    }

    /// Lends the batch the tables of the plan's slots, and takes them back when the step has run: no copy is made.
    fn exchange_tables(&mut self, plan: &StepPlan) {
        for (sequence, planned) in self.batch.sequences.iter_mut().zip(plan.sequences()) {
            self.tables.swap(planned.slot, &mut sequence.tables);
        }
    }
}

/// How a row's token is drawn when nothing but its logits as they are matters, and nothing but the token is asked for.
fn plain(row: &RowWork, guides: &Guides) -> Option<Plain> {
    match &row.purpose {
        RowPurpose::Sample { params, rules, history, banned, logprobs, stream, position } => {
            let draw = Draw { params, rules, stream: *stream, position: *position, banned, mask: None };
            draw.plain().filter(|_| history.is_none() && logprobs.is_none() && !guides.guide(row.seq))
        }
        RowPurpose::PromptLogprob { .. } => None,
    }
}

fn row_output(row: usize, logits: &[f32], work: &RowWork, guides: &Guides) -> RowOutput {
    let Ok(logits) = Logits::new(row, logits) else {
        return RowOutput::NotANumber;
    };
    match &work.purpose {
        RowPurpose::Sample { params, rules, history, stream, position, banned, logprobs } => {
            let choice = guides.choice(work.seq, *position);
            let mask = match &choice {
                Ok(Choice::Any) => None,
                Ok(Choice::Of(mask)) if mask.leaves(banned) => Some(mask),
                Ok(Choice::Of(_)) => return RowOutput::NoToken,
                Err(error) => {
                    tracing::warn!(seq = %work.seq, %error, "a sequence is ended");
                    return RowOutput::NoToken;
                }
            };
            let draw = Draw { params, rules, stream: *stream, position: *position, banned, mask };
            let token = match history {
                Some(history) => history.draw(|history| logits.sample(&draw, history)),
                None => logits.sample(&draw, &History::default()),
            };
            guides.drew(work.seq, *position, token);
            let logprob = logprobs.map(|asked| ours(logits.logprob(token, asked.top())));
            RowOutput::Sampled { token, logprob }
        }
        RowPurpose::PromptLogprob { target, top, .. } => {
            RowOutput::PromptLogprob(ours(logits.logprob(*target, top.top())))
        }
    }
}

fn ours(from: sample::TokenLogprob) -> engine::TokenLogprob {
    engine::TokenLogprob { token: from.token, logprob: from.logprob, top: from.top }
}

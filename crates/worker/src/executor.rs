//! Runs one step plan on one rank: plan → batch → model → (on the leader) tokens.

use engine::{RowOutput, RowPurpose, RowWork, SlotTables, StepPlan};
use model::Activity;
use ops::sample::{Draw, Logits};
use ops::{Batch, BatchSequence, BlockTable};
use types::{History, TpRank};

use crate::Error;
use crate::device::RankModel;

/// A rank's model with the block tables its plans refer to.
pub(crate) struct Executor {
    rank: TpRank,
    model: RankModel,
    tables: SlotTables,
    batch: Batch,
}

impl Executor {
    pub(crate) fn new(rank: TpRank, model: RankModel, config: &engine::Config) -> Result<Self, Error> {
        let tables = SlotTables::new(config).map_err(|source| Error::Engine { rank, source })?;
        Ok(Self { rank, model, tables, batch: Batch::default() })
    }

    /// A follower's part of a step: logits are the leader's business.
    pub(crate) fn follow(&mut self, plan: &StepPlan) -> Result<(), Error> {
        self.prepare(plan)?;
        Ok(self.model.step(&self.batch, |_, _| Ok(()))?)
    }

    /// The leader's part of a step: one result for each entry of `work`.
    pub(crate) fn lead(&mut self, plan: &StepPlan, work: &[RowWork]) -> Result<Vec<RowOutput>, Error> {
        self.prepare(plan)?;
        assert_eq!(work.len(), self.batch.logit_rows.len(), "each logit row has work");
        let vocab = self.model.config().vocab_size;
        let mut outputs = Vec::with_capacity(work.len());
        self.model.step(&self.batch, |first, logits| {
            for (i, row) in logits.chunks_exact(vocab).enumerate() {
                outputs.push(row_output(first + i, row, &work[first + i].purpose));
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
        self.tables.apply(plan).map_err(|source| Error::Engine { rank, source })?;
        let Batch { tokens, sequences, logit_rows } = &mut self.batch;
        tokens.clear();
        tokens.extend_from_slice(plan.tokens());
        logit_rows.clear();
        logit_rows.extend(plan.logit_rows());
        sequences.truncate(plan.sequence_count());
        for (i, planned) in plan.sequences().enumerate() {
            if sequences.len() == i {
                let tables = [BlockTable::default(), BlockTable::default()];
                sequences.push(BatchSequence { rows: 0..0, start: planned.start, tables });
            }
            let sequence = &mut sequences[i];
            sequence.rows = planned.rows;
            sequence.start = planned.start;
            for (own, table) in sequence.tables.iter_mut().zip(self.tables.tables(planned.slot)) {
                own.first = table.first;
                own.blocks.clone_from(&table.blocks);
            }
        }
        Ok(())
    }
}

fn row_output(row: usize, logits: &[f32], purpose: &RowPurpose) -> RowOutput {
    let Ok(logits) = Logits::new(row, logits) else {
        return RowOutput::NotANumber;
    };
    match purpose {
        RowPurpose::Sample { params, rules, history, stream, position, banned, logprobs } => {
            let draw = Draw { params, rules, stream: *stream, position: *position, banned };
            let token = match history {
                Some(history) => history.read(|history| logits.sample(&draw, history)),
                None => logits.sample(&draw, &History::default()),
            };
            let logprob = logprobs.map(|asked| ours(logits.logprob(token, asked.top())));
            RowOutput::Sampled { token, logprob }
        }
        RowPurpose::PromptLogprob { target, top, .. } => {
            RowOutput::PromptLogprob(ours(logits.logprob(*target, top.top())))
        }
    }
}

fn ours(from: ops::sample::TokenLogprob) -> engine::TokenLogprob {
    engine::TokenLogprob { token: from.token, logprob: from.logprob, top: from.top }
}

//! The mirror image of the plans: every rank's block tables, kept from step to step so that a plan only carries
//! what changed.

use types::{BlockTable, SlotId, TokenId};

use crate::kv::Geometry;
use crate::{Config, Drawn, Error, Input, KvGroup, PlannedSequence, StepPlan};

/// What one slot holds; empty when no sequence uses it.
#[derive(Debug, Clone, Default)]
struct Slot {
    /// Step that used it last; 0 before any did.
    step: u64,
    /// Tokens cached: the position the next row must have. 0 before its sequence's first row, which may be at the
    /// start of any block: the blocks before it were computed for another sequence.
    computed: u32,
    tables: [BlockTable; 2],
}

/// The block tables of every slot, as they follow from the plans executed so far.
#[derive(Debug, Clone)]
pub struct SlotTables {
    config: Config,
    geometry: Geometry,
    slots: Vec<Slot>,
    step: u64,
    /// Logit rows of that step.
    logit_rows: u32,
    /// Rows and logit rows of a step by sub-group; only memory.
    rows: Vec<[u32; 2]>,
}

impl SlotTables {
    /// Empty tables for the engine that `config` describes.
    ///
    /// # Errors
    /// As [`Config::check`].
    pub fn new(config: &Config) -> Result<Self, Error> {
        config.check()?;
        Ok(Self {
            geometry: Geometry { block_size: config.block_size, window_keys: config.window_keys },
            slots: vec![Slot::default(); config.slots() as usize],
            step: 0,
            logit_rows: 0,
            rows: Vec::new(),
            config: config.clone(),
        })
    }

    /// Updates the tables to what they must be while `plan` is executed.
    ///
    /// # Errors
    /// When the plan is not the next one, or does not fit the state here or the configuration: leader and rank
    /// have parted, and nothing computed from these tables can be trusted any more.
    pub fn apply(&mut self, plan: &StepPlan) -> Result<(), Error> {
        if plan.step() != self.step + 1 {
            return Err(Error::PlanOrder { got: plan.step(), expected: self.step + 1 });
        }
        self.step = plan.step();
        self.check_budgets(plan)?;
        for &slot in plan.released() {
            *self.slot(slot)? = Slot::default();
        }
        for sequence in plan.sequences() {
            self.extend(&sequence)?;
        }
        Ok(())
    }

    /// The tables of `slot` by [`KvGroup::index`]; those of a group the model has no layers of stay empty.
    ///
    /// # Panics
    /// When there is no such slot; [`SlotTables::apply`] refuses plans that name one.
    #[must_use]
    pub fn tables(&self, slot: SlotId) -> &[BlockTable; 2] {
        &self.slots[slot.0 as usize].tables
    }

    /// Exchanges the tables of `slot` for `other`, so that a step can have them without a copy; the caller does it again
    /// when the step has run.
    ///
    /// # Panics
    /// As [`SlotTables::tables`].
    pub fn swap(&mut self, slot: SlotId, other: &mut [BlockTable; 2]) {
        std::mem::swap(&mut self.slots[slot.0 as usize].tables, other);
    }

    /// Fills `tokens` with the input token of every row of `plan`, in order, where `drawn` is what the step before drew.
    /// A row whose result was not a token has no successor whose result anybody wants: its input is token 0.
    ///
    /// # Errors
    /// When `plan` names rows of the step before, and `drawn` is another step's or has tokens the model does not have.
    pub fn resolve(&self, plan: &StepPlan, drawn: &Drawn, tokens: &mut Vec<TokenId>) -> Result<(), Error> {
        tokens.clear();
        for input in plan.inputs() {
            tokens.push(match *input {
                Input::Known(token) => token,
                Input::Drawn { row } => {
                    drawn.answers(plan.step() - 1)?;
                    let token = drawn.tokens().get(row as usize).copied().flatten().unwrap_or(TokenId(0));
                    let max = u64::from(self.config.vocab_size) - 1;
                    if u64::from(token.0) > max {
                        let got = token.0.into();
                        return Err(Error::PlanField { field: "a drawn token", got, min: 0, max });
                    }
                    token
                }
            });
        }
        Ok(())
    }

    /// As [`SlotTables::resolve`] for a device that has what the step before drew: rows whose token that is are put into
    /// `drawn`, with the logit row that draws it, and their input is token 0 here.
    pub fn known(&self, plan: &StepPlan, tokens: &mut Vec<TokenId>, drawn: &mut Vec<(u32, u32)>) {
        tokens.clear();
        drawn.clear();
        for (at, input) in (0_u32..).zip(plan.inputs()) {
            tokens.push(match *input {
                Input::Known(token) => token,
                Input::Drawn { row } => {
                    drawn.push((at, row));
                    TokenId(0)
                }
            });
        }
    }

    fn slot(&mut self, slot: SlotId) -> Result<&mut Slot, Error> {
        let slots = self.slots.len() as u64;
        self.slots.get_mut(slot.0 as usize).ok_or(Error::PlanField {
            field: "a slot",
            got: slot.0.into(),
            min: 0,
            max: slots.saturating_sub(1),
        })
    }

    fn check_budgets(&mut self, plan: &StepPlan) -> Result<(), Error> {
        let limit = |field, got: u64, max: u64| {
            if got > max { Err(Error::PlanField { field, got, min: 0, max }) } else { Ok(()) }
        };
        self.rows.clear();
        self.rows.resize(self.config.data_parallel as usize, [0; 2]);
        for sequence in plan.sequences() {
            let max = u64::from(self.config.slots()) - 1;
            limit("a slot", sequence.slot.0.into(), max)?;
            let [rows, logit_rows] = &mut self.rows[self.config.sub_group(sequence.slot) as usize];
            *rows = rows.saturating_add(u32::try_from(sequence.rows.len()).unwrap_or(u32::MAX));
            *logit_rows = logit_rows.saturating_add(sequence.logit_rows);
        }
        for [rows, logit_rows] in &self.rows {
            limit("rows", (*rows).into(), self.config.step_tokens_max.into())?;
            limit("logit rows", (*logit_rows).into(), self.config.logit_rows_max.into())?;
        }
        let before = std::mem::replace(&mut self.logit_rows, plan.logit_row_count());
        for input in plan.inputs() {
            match *input {
                Input::Known(token) => {
                    limit("a token", token.0.into(), u64::from(self.config.vocab_size) - 1)?;
                }
                Input::Drawn { row } => {
                    limit("a row of the step before, counted from 1", u64::from(row) + 1, before.into())?;
                }
            }
        }
        Ok(())
    }

    fn extend(&mut self, sequence: &PlannedSequence<'_>) -> Result<(), Error> {
        let (geometry, step, pools) = (self.geometry, self.step, self.config.blocks);
        let context = self.config.context_tokens_max;
        let slot = self.slot(sequence.slot)?;
        let same = |what, got: u32, expected: u32| match got == expected {
            true => Ok(()),
            false => {
                let (got, expected) = (got.into(), expected.into());
                Err(Error::PlanSlot { step, slot: sequence.slot, what, got, expected })
            }
        };
        let start = sequence.start.0;
        same("the number of uses", 1 + u32::from(slot.step == step), 1)?;
        let fresh = slot.computed == 0;
        if !(fresh && start.is_multiple_of(geometry.block_size.tokens())) {
            same("the start position", start, slot.computed)?;
        }
        let end = start + u32::try_from(sequence.inputs.len()).expect("bounded by step_tokens_max");
        same("the end position", end, end.min(context))?;
        for group in KvGroup::ALL {
            let table = &mut slot.tables[group.index()];
            let new = sequence.new_blocks[group.index()];
            let total = pools[group.index()];
            let (first, held_after) = match total {
                0 => (0, 0),
                _ => (geometry.first_needed(group, start), geometry.block_size.blocks_for(end)),
            };
            if group == KvGroup::Sliding {
                let passed = if fresh { 0 } else { first - table.first };
                same("the number of dropped blocks", sequence.dropped, passed)?;
                table.blocks.drain(..sequence.dropped as usize);
                table.first = first;
            }
            let added = u32::try_from(new.len()).expect("counts in a plan are u32");
            let held = table.first + u32::try_from(table.blocks.len()).expect("bounded by the pool");
            same("the number of new blocks", added, held_after - held)?;
            if let Some(&block) = new.iter().find(|block| block.0 >= total) {
                return Err(Error::PlanBlock { step, slot: sequence.slot, group, block, blocks: total });
            }
            table.blocks.extend_from_slice(new);
        }
        slot.computed = end;
        slot.step = step;
        Ok(())
    }
}

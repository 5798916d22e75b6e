//! Bugs that can be switched on, so that a test can show that the simulation finds each of them. Nothing but tests
//! builds an engine with one.

use crate::kv::Root;
use crate::rank::Rank;
use crate::sequence::{Running, Sequence};
use crate::{Config, Engine, Error, Input, RowPurpose, Step};

/// A bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sabotage {
    /// The blocks of a sequence that is cancelled while it runs do not come back.
    LeakBlocks,
    /// The slot of a sequence that leaves comes back twice.
    FreeSlotTwice,
    /// Sliding blocks are given back one row too early.
    WindowOffByOne,
    /// Priorities are all that counts.
    SkipAgeing,
    /// A request with a salt shares with everybody.
    IgnoreSalt,
    /// A prompt may be found as a whole, with no row left to compute.
    ReuseEveryBlock,
    /// A hit does not ask for the window's blocks.
    SkipWindowCheck,
    /// The block being filled is put into the prefix tree.
    PublishEarly,
    /// A preempted sequence loses its last token.
    LoseTokenAtPreemption,
    /// All sequences of a request draw from the same stream.
    IgnoreStream,
    /// The generator of a resumed sequence starts again.
    RestartGenerator,
    /// Stop tokens are not kept from being drawn too early.
    ForgetMinTokens,
    /// A step may have one row more than the budget.
    ExceedBudget,
    /// Sequences that wait for another one of their request are never let go.
    ForgetFamily,
    /// An input that is not known names another row than the one that draws it.
    NameWrongRow,
    /// The generator's position leaves out tokens that are not known yet.
    ForgetPending,
    /// What is computed for a sequence after its end is delivered all the same.
    DeliverDiscarded,
    /// Blocks that a step in flight fills are put into the prefix tree.
    PublishUnanswered,
    /// A deadline that passes ends nothing.
    ForgetDeadline,
    /// Every slot comes back to the first sub-group.
    MixSubGroups,
}

impl Sabotage {
    /// All of them.
    pub const ALL: [Self; 20] = [
        Self::LeakBlocks,
        Self::FreeSlotTwice,
        Self::WindowOffByOne,
        Self::SkipAgeing,
        Self::IgnoreSalt,
        Self::ReuseEveryBlock,
        Self::SkipWindowCheck,
        Self::PublishEarly,
        Self::LoseTokenAtPreemption,
        Self::IgnoreStream,
        Self::RestartGenerator,
        Self::ForgetMinTokens,
        Self::ExceedBudget,
        Self::ForgetFamily,
        Self::NameWrongRow,
        Self::ForgetPending,
        Self::DeliverDiscarded,
        Self::PublishUnanswered,
        Self::ForgetDeadline,
        Self::MixSubGroups,
    ];
}

impl Engine {
    /// An engine with a bug.
    ///
    /// # Errors
    /// As [`Engine::new`].
    pub fn sabotaged(config: Config, bug: Sabotage) -> Result<Self, Error> {
        let mut engine = Self::new(config)?;
        engine.sabotage = Some(bug);
        for group in &mut engine.groups {
            group.kv.skip_window_check(bug == Sabotage::SkipWindowCheck);
        }
        Ok(engine)
    }

    /// Whether this engine has `bug`.
    pub(crate) fn has_bug(&self, bug: Sabotage) -> bool {
        self.sabotage == Some(bug)
    }

    /// Spoils a sequence that has just been submitted.
    pub(crate) fn spoil_sequence(&self, sequence: &mut Sequence) {
        if self.has_bug(Sabotage::SkipAgeing) {
            sequence.rank = Rank::without_age(sequence.rank, sequence.priority());
        }
        if self.has_bug(Sabotage::IgnoreSalt) && matches!(sequence.root, Some(Root::Shared(_))) {
            sequence.root = Some(Root::Shared(None));
        }
    }

    /// Spoils the rows `step` has just got for `sequence`, whose work is that from `first` on.
    pub(crate) fn spoil_rows(bug: Sabotage, step: &mut Step, first: usize, sequence: &Sequence) {
        if bug == Sabotage::NameWrongRow
            && let Some(Input::Drawn { row }) = step.plan.inputs.last_mut()
        {
            *row = row.saturating_sub(1);
        }
        for row in &mut step.work[first..] {
            let RowPurpose::Sample { stream, position, banned, .. } = &mut row.purpose else { continue };
            match bug {
                Sabotage::IgnoreStream => *stream = 0,
                Sabotage::RestartGenerator => *position -= sequence.resumed(),
                Sabotage::ForgetPending => *position -= sequence.expected() - sequence.len(),
                Sabotage::ForgetMinTokens => *banned = [].into(),
                _ => {}
            }
        }
    }

    /// How many tokens of `one` can be shared: those of steps that have been answered. A step may yet turn out to have
    /// computed what are not numbers.
    pub(crate) fn publishable(&self, one: &Running) -> u32 {
        match self.sabotage {
            Some(Sabotage::PublishEarly) => one.answered + self.config.block_size.tokens(),
            Some(Sabotage::PublishUnanswered) => one.computed,
            _ => one.answered,
        }
    }

    /// The sub-group that gets the slot of a sequence that leaves sub-group `at`.
    pub(crate) fn slot_home(&self, at: usize) -> usize {
        if self.has_bug(Sabotage::MixSubGroups) { 0 } else { at }
    }

    /// Whether a sequence that has ended stays for what a later step computes for it.
    pub(crate) fn haunts(&self, one: &Running) -> bool {
        self.has_bug(Sabotage::DeliverDiscarded) && one.flights.iter().any(Option::is_some)
    }
}

impl Rank {
    fn without_age(self, priority: types::Priority) -> Self {
        Self::new(self.id(), types::Micros(0), priority)
    }
}

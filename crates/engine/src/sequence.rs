//! One sequence: what is known of it ([`Sequence`]), and what it holds while it runs ([`Running`]). A sequence that
//! waits is a plain [`Sequence`], so it cannot hold a slot or a block.

use std::ops::Range;
use std::sync::Arc;

use types::{
    BlockId, Generation, History, Logprobs, Micros, Position, Priority, SeqId, SharedHistory, SlotId,
    TokenId, TokenRules,
};

use crate::kv::{Cursor, Kv, Root, Tables};
use crate::rank::Rank;
use crate::{
    Config, Effect, Finish, Input, KvGroup, PrefixReuse, Request, RowOutput, RowPurpose, STEPS_IN_FLIGHT_MAX,
    TokenLogprob, Usage,
};

/// What rows without constraints carry, one of each for all sequences: a step of thousands of rows then counts references
/// in one place instead of one for each row.
#[derive(Debug)]
pub(crate) struct Free {
    /// No token is banned.
    banned: Arc<[TokenId]>,
    rules: Arc<TokenRules>,
}

impl Default for Free {
    fn default() -> Self {
        Self { banned: Arc::from([]), rules: Arc::default() }
    }
}

/// Tokens and progress of one sequence; nothing in here depends on when or beside what it runs.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: SeqId,
    pub(crate) rank: Rank,
    priority: Priority,
    resumed: u32,
    /// Which of the request's sequences it is, for the generator.
    stream: u32,
    /// Prompt, then what was generated: after a preemption all of it is computed again.
    tokens: Vec<TokenId>,
    /// Tokens that steps in flight draw.
    pending: u32,
    prompt_tokens: u32,
    generation: Generation,
    /// Whether the generation has rules about tokens.
    ruled: bool,
    deadline: Option<Micros>,
    /// What ends it, and must not be drawn before `min_tokens`.
    stops: Arc<[TokenId]>,
    /// Present while the caller is owed the prompt's log-probabilities.
    owed: Option<OwedLogprobs>,
    /// With whom it shares blocks; `None` when with nobody.
    pub(crate) root: Option<Root>,
    /// The sequence of its request that computes their prompt; it starts when that is done.
    pub(crate) held_by: Option<SeqId>,
    /// Whether others wait for it to compute their prompt.
    pub(crate) leads: bool,
    /// Tokens of the prompt that were there when it first started; `None` before.
    cached_tokens: Option<u32>,
    /// Present from its first start when drawing needs it.
    history: Option<SharedHistory>,
}

/// Prompt log-probabilities gathered so far. They survive a preemption: rows already gathered are not asked again.
#[derive(Debug)]
struct OwedLogprobs {
    top: Logprobs,
    gathered: Vec<TokenLogprob>,
}

impl Sequence {
    /// The sequences of a request that has been checked, with the ids from `first` on; their output is limited to what
    /// the context holds.
    ///
    /// The first computes the prompt, and the others then find its full blocks in the prefix tree. They compute the
    /// last, partial block again, each its own: it is less than one block of rows, once, and it leaves plans, ranks
    /// and kernels without a copy operation that nothing else needs.
    pub(crate) fn of(
        first: SeqId,
        request: Request,
        now: Micros,
        config: &Config,
    ) -> impl Iterator<Item = Self> + use<> {
        let Request { prompt, generation, deadline, options } = request;
        let prompt_tokens = u32::try_from(prompt.len()).expect("the prompt is checked to fit the context");
        let sequences = generation.sequences();
        let generation = generation.limited_to(config.context_tokens_max - prompt_tokens);
        let stops = stops(&generation, config);
        let root = match options.reuse {
            PrefixReuse::Open => Some(Root::Shared(None)),
            PrefixReuse::Salted(salt) => Some(Root::Shared(Some(salt))),
            PrefixReuse::Bypass if sequences > 1 => Some(Root::Private(first)),
            PrefixReuse::Bypass => None,
        };
        let fresh = options.resume_tokens.is_empty();
        let resumed = u32::try_from(options.resume_tokens.len()).expect("checked to fit the context");
        let tokens = [prompt, options.resume_tokens].concat();
        (0..sequences).map(move |index| {
            let id = SeqId(first.0 + u64::from(index));
            let owed = generation.prompt_logprobs().filter(|_| fresh && index == 0);
            Self {
                id,
                rank: Rank::new(id, now, options.priority),
                priority: options.priority,
                resumed,
                stream: options.first_stream + index,
                tokens: tokens.clone(),
                pending: 0,
                prompt_tokens,
                ruled: !generation.rules().is_empty(),
                generation: generation.clone(),
                deadline,
                stops: Arc::clone(&stops),
                owed: owed.map(|top| OwedLogprobs { top, gathered: Vec::new() }),
                root,
                held_by: (index > 0).then_some(first),
                leads: index == 0 && sequences > 1,
                cached_tokens: None,
                history: None,
            }
        })
    }

    /// Tokens known, prompt and generated.
    pub(crate) fn len(&self) -> u32 {
        u32::try_from(self.tokens.len()).expect("a sequence fits the context")
    }

    /// Tokens it has once the steps in flight have run, if none of them ends it.
    pub(crate) fn expected(&self) -> u32 {
        self.len() + self.pending
    }

    /// Tokens that are inputs of rows, once the steps in flight have run: all but the last it may ever have.
    pub(crate) fn inputs(&self) -> u32 {
        self.expected().min(self.cached_tokens_max())
    }

    /// Most tokens whose keys and values are ever cached: the last token generated is never an input.
    pub(crate) fn cached_tokens_max(&self) -> u32 {
        self.prompt_tokens + self.generation.max_tokens() - 1
    }

    pub(crate) fn tokens(&self, rows: Range<u32>) -> &[TokenId] {
        &self.tokens[rows.start as usize..rows.end as usize]
    }

    pub(crate) fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.cached_tokens.unwrap_or(0),
            output_tokens: self.generated(),
        }
    }

    fn generated(&self) -> u32 {
        self.len() - self.prompt_tokens
    }

    pub(crate) const fn deadline(&self) -> Option<Micros> {
        self.deadline
    }

    pub(crate) fn is_late(&self, now: Micros) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }

    /// Tokens it was resumed with.
    pub(crate) const fn resumed(&self) -> u32 {
        self.resumed
    }

    pub(crate) const fn priority(&self) -> Priority {
        self.priority
    }

    /// Forgets its last token: a bug, see [`crate::Sabotage`].
    pub(crate) fn forget_last(&mut self) {
        if self.generated() > self.resumed {
            self.tokens.pop();
        }
    }

    /// Prompt and output.
    pub(crate) fn all_tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// Prepares it to run, its first `start` tokens being computed already: makes room for the longest output, so that
    /// no later step allocates.
    pub(crate) fn start(&mut self, start: u32) {
        self.cached_tokens.get_or_insert(start.min(self.prompt_tokens));
        self.tokens.reserve((self.generation.max_tokens() - self.generated()) as usize);
        if self.history.is_none() && self.generation.needs_history() {
            let (prompt, generated) = self.tokens.split_at(self.prompt_tokens as usize);
            self.history = Some(SharedHistory::new(History::new(prompt, generated)));
        }
    }

    /// The first row whose logits are wanted, whatever is computed.
    pub(crate) fn first_logit_row(&self) -> u32 {
        self.first_owed_row(0).unwrap_or(u32::MAX).min(self.len() - 1)
    }

    /// First row from `start` on whose logits are wanted even if no token is drawn from it.
    fn first_owed_row(&self, start: u32) -> Option<u32> {
        let owed = self.owed.as_ref()?;
        Some(start.max(u32::try_from(owed.gathered.len()).expect("at most one for each prompt token")))
    }

    /// How many of `rows` want logits; they are always the last ones.
    pub(crate) fn logit_rows(&self, rows: &Range<u32>) -> u32 {
        match self.first_owed_row(rows.start) {
            Some(first) => rows.end.saturating_sub(first),
            None => u32::from(rows.end == self.expected()),
        }
    }

    /// The longest run of rows from `start` on that stays within `tokens` rows and `logits` logit rows.
    pub(crate) fn longest(&self, start: u32, tokens: u32, logits: u32) -> u32 {
        let rows = tokens.min(self.inputs() - start);
        match self.first_owed_row(start) {
            Some(first) => rows.min((first - start).saturating_add(logits)),
            None if logits == 0 && start + rows == self.expected() => rows.saturating_sub(1),
            None => rows,
        }
    }

    /// What the logits of row `row` are for. `free` is what it carries when nothing is constrained.
    pub(crate) fn purpose(&self, row: u32, free: &Free) -> RowPurpose {
        if row + 1 == self.expected() {
            let position = self.expected() - self.prompt_tokens;
            let early = position < self.generation.min_tokens();
            return RowPurpose::Sample {
                params: *self.generation.sampling(),
                rules: Arc::clone(if self.ruled { self.generation.rules() } else { &free.rules }),
                history: self.history.clone(),
                stream: self.stream,
                position,
                banned: Arc::clone(if early { &self.stops } else { &free.banned }),
                logprobs: self.generation.logprobs(),
            };
        }
        let owed =
            self.owed.as_ref().expect("logits of a row before the last are for prompt log-probabilities");
        RowPurpose::PromptLogprob {
            position: Position(row + 1),
            target: self.tokens[row as usize + 1],
            top: owed.top,
        }
    }

    /// Takes the log-probability of the next prompt token the caller is owed.
    fn take_prompt_logprob(&mut self, entry: &mut TokenLogprob) {
        let id = self.id;
        let owed =
            self.owed.as_mut().unwrap_or_else(|| panic!("{id}: no prompt log-probability was asked for"));
        let target = self.tokens[owed.gathered.len() + 1];
        assert_eq!(entry.token, target, "{id}: the log-probability is another token's");
        let top = std::mem::take(&mut entry.top);
        owed.gathered.push(TokenLogprob { top, ..*entry });
    }

    /// Takes note of the rows it has got in a step.
    pub(crate) fn fly(&mut self, logit_rows: Range<usize>, end: u32) -> Flight {
        let draws = end == self.expected();
        self.pending += u32::from(draws);
        let row = |row| u32::try_from(row).expect("bounded by logit_rows_max");
        Flight { first: row(logit_rows.start), last: row(logit_rows.end), end, draws }
    }

    /// Takes the results of the logit rows of `flight`: the last one drew a token if `flight` says so, the others are
    /// prompt log-probabilities. Says whether the sequence ends.
    pub(crate) fn take(
        &mut self,
        flight: &Flight,
        outputs: &mut [RowOutput],
        config: &Config,
        effects: &mut Vec<Effect>,
    ) -> Option<Finish> {
        self.pending -= u32::from(flight.draws);
        let outputs = &mut outputs[flight.logit_rows()];
        let last = outputs.len().checked_sub(1);
        for (index, output) in outputs.iter_mut().enumerate() {
            match (output, flight.draws && Some(index) == last) {
                (RowOutput::NotANumber, _) => return Some(Finish::NotANumber),
                (RowOutput::NoToken, true) => return Some(Finish::NoToken),
                (RowOutput::PromptLogprob(entry), false) => self.take_prompt_logprob(entry),
                (RowOutput::Sampled { token, logprob }, true) => {
                    return self.take_token(*token, logprob.take(), config, effects);
                }
                (output, _) => panic!("{}: {output:?} answers another kind of row", self.id),
            }
        }
        None
    }

    /// Takes its next token: emits it, and says whether it ends the sequence.
    fn take_token(
        &mut self,
        token: TokenId,
        logprob: Option<TokenLogprob>,
        config: &Config,
        effects: &mut Vec<Effect>,
    ) -> Option<Finish> {
        let asked = self.generation.logprobs().is_some();
        assert_eq!(logprob.is_some(), asked, "{}: log-probability of a drawn token", self.id);
        if let Some(owed) = self.owed.take() {
            effects.push(Effect::PromptLogprobs { seq: self.id, logprobs: owed.gathered });
        }
        effects.push(Effect::Token { seq: self.id, token, logprob });
        self.push(token, config)
    }

    fn push(&mut self, token: TokenId, config: &Config) -> Option<Finish> {
        assert!(token.0 < config.vocab_size, "{}: token {token} is outside the vocabulary", self.id);
        let stops = self.stops.contains(&token);
        let early = self.generated() < self.generation.min_tokens();
        assert!(!(stops && early), "{}: stop token {token} was drawn although it was banned", self.id);
        self.tokens.push(token);
        if stops {
            let requested = self.generation.stop_token_ids().contains(&token);
            let is_eos = !self.generation.ignore_eos() && config.eos_token_ids.contains(&token);
            debug_assert!(is_eos || requested, "stops are made of these two");
            return Some(if is_eos { Finish::Eos(token) } else { Finish::StopToken(token) });
        }
        (self.generated() == self.generation.max_tokens()).then_some(Finish::Length)
    }
}

/// Tokens that end a sequence of `generation`: the model's unless it ignores them, and its own.
pub(crate) fn stops(generation: &Generation, config: &Config) -> Arc<[TokenId]> {
    let eos = if generation.ignore_eos() { &[] } else { config.eos_token_ids.as_slice() };
    eos.iter().chain(generation.stop_token_ids()).copied().collect()
}

/// The part of a sequence that is computed already when it starts.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) tables: Tables,
    /// Its place in the prefix tree, if it has one.
    pub(crate) cursor: Option<Cursor>,
    /// Tokens.
    pub(crate) start: u32,
}

/// A sequence's part of a step that has not been answered.
#[derive(Debug)]
pub(crate) struct Flight {
    /// Its first logit row among those of the step, and the one behind its last.
    first: u32,
    last: u32,
    /// Tokens cached once the step has run.
    pub(crate) end: u32,
    /// Whether the last of its logit rows draws a token.
    pub(crate) draws: bool,
}

impl Flight {
    /// Its logit rows among those of the step.
    pub(crate) const fn logit_rows(&self) -> Range<usize> {
        self.first as usize..self.last as usize
    }
}

/// A sequence that lost its blocks while a step in flight draws its next token. It waits when it has that token.
#[derive(Debug)]
pub(crate) struct Leaving {
    pub(crate) sequence: Sequence,
    pub(crate) flight: Flight,
}

/// A sequence in the running batch.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) sequence: Sequence,
    pub(crate) slot: SlotId,
    /// Tokens whose keys and values are cached, those of steps in flight included.
    pub(crate) computed: u32,
    /// Tokens whose keys and values are cached for certain: those of steps in flight are not.
    pub(crate) answered: u32,
    pub(crate) tables: Tables,
    /// Blocks in its tables that the ranks know of, by [`KvGroup::index`].
    pub(crate) announced: [u32; 2],
    /// Its place in the prefix tree; `None` when it shares nothing.
    pub(crate) cursor: Option<Cursor>,
    /// Its part of the steps in flight; that of step `n` is at `n % 2`.
    pub(crate) flights: [Option<Flight>; STEPS_IN_FLIGHT_MAX],
}

impl Running {
    /// A sequence that has just got `slot`, and what was found of it.
    pub(crate) fn new(sequence: Sequence, slot: SlotId, found: Found) -> Self {
        let Found { tables, cursor, start } = found;
        let flights = [const { None }; STEPS_IN_FLIGHT_MAX];
        Self { sequence, slot, computed: start, answered: start, tables, announced: [0; 2], cursor, flights }
    }

    /// Appends the blocks the ranks do not know of yet to `blocks`, group by group; how many of each.
    pub(crate) fn announce(&mut self, blocks: &mut Vec<BlockId>) -> [u32; 2] {
        KvGroup::ALL.map(|group| {
            let table = &self.tables[group.index()];
            let new = table.len() - self.announced[group.index()];
            blocks.extend(table.ids_after(self.announced[group.index()]));
            self.announced[group.index()] = table.len();
            new
        })
    }

    /// Puts the blocks within the first `tokens` tokens into the prefix tree.
    pub(crate) fn publish(&mut self, kv: &mut Kv, tokens: u32) {
        let size = kv.geometry().block_size.tokens();
        if self.cursor.as_ref().is_none_or(|cursor| tokens < (cursor.blocks() + 1) * size) {
            return;
        }
        let Some(mut cursor) = self.cursor.take() else { return };
        while cursor.blocks() < tokens / size {
            let start = cursor.blocks() * size;
            if start + size > self.sequence.len() {
                break;
            }
            if !kv.publish(&mut self.tables, &mut cursor, self.sequence.tokens(start..start + size)) {
                kv.close(cursor);
                return;
            }
        }
        self.cursor = Some(cursor);
    }

    /// Inputs that have no row yet: more than one while the prompt (or a preempted sequence) is being computed, exactly
    /// one when it decodes, none when steps in flight draw all that it may have.
    pub(crate) fn remaining(&self) -> u32 {
        self.sequence.inputs() - self.computed
    }

    /// Whether one row is left to compute, which draws the next token.
    pub(crate) fn is_decoding(&self) -> bool {
        self.remaining() == 1
    }

    /// Appends the inputs of `rows`. One that is not known yet is drawn by the step in flight at `before`.
    pub(crate) fn inputs(&self, rows: Range<u32>, before: usize, inputs: &mut Vec<Input>) {
        let known = rows.start..rows.end.min(self.sequence.len());
        inputs.extend(self.sequence.tokens(known.clone()).iter().copied().map(Input::Known));
        if known.end < rows.end {
            let flight = self.flights[before].as_ref().filter(|flight| flight.draws);
            let flight = flight.expect("a token that is not known is drawn by the step before");
            assert_eq!(known.end + 1, rows.end, "{}: one unknown input at most", self.sequence.id);
            inputs.push(Input::Drawn { row: flight.last - 1 });
        }
    }
}

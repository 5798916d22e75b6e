//! One sequence: what is known of it ([`Sequence`]), and what it holds while it runs ([`Running`]). A sequence that
//! waits is a plain [`Sequence`], so it cannot hold a slot or a block.

use std::ops::Range;
use std::sync::Arc;

use types::{Generation, Logprobs, Micros, Position, SeqId, SlotId, TokenId};

use crate::kv::Tables;
use crate::rank::Rank;
use crate::{Config, Effect, Finish, Request, RowOutput, RowPurpose, TokenLogprob, Usage};

/// Tokens and progress of one request; nothing in here depends on when or beside what it runs.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: SeqId,
    pub(crate) rank: Rank,
    /// Prompt, then what was generated: after a preemption all of it is computed again.
    tokens: Vec<TokenId>,
    prompt_tokens: u32,
    generation: Generation,
    deadline: Option<Micros>,
    /// What ends it, and must not be drawn before `min_tokens`.
    stops: Arc<[TokenId]>,
    /// Present while the caller is owed the prompt's log-probabilities.
    owed: Option<OwedLogprobs>,
}

/// Prompt log-probabilities gathered so far. They survive a preemption: rows already gathered are not asked again.
#[derive(Debug)]
struct OwedLogprobs {
    top: Logprobs,
    gathered: Vec<TokenLogprob>,
}

impl Sequence {
    /// A request that has been checked; its output is limited to what the context holds.
    pub(crate) fn new(id: SeqId, request: Request, now: Micros, config: &Config) -> Self {
        let Request { prompt, generation, deadline, options } = request;
        let rank = Rank::new(id, now, options.priority);
        let prompt_tokens = u32::try_from(prompt.len()).expect("the prompt is checked to fit the context");
        let generation = generation.limited_to(config.context_tokens_max - prompt_tokens);
        let eos = if generation.ignore_eos() { &[] } else { config.eos_token_ids.as_slice() };
        let stops = eos.iter().chain(generation.stop_token_ids()).copied().collect();
        let owed = generation.prompt_logprobs().map(|top| OwedLogprobs { top, gathered: Vec::new() });
        Self { id, rank, tokens: prompt, prompt_tokens, generation, deadline, stops, owed }
    }

    /// Tokens known, prompt and generated.
    pub(crate) fn len(&self) -> u32 {
        u32::try_from(self.tokens.len()).expect("a sequence fits the context")
    }

    /// Most tokens whose keys and values are ever cached: the last token generated is never an input.
    pub(crate) fn cached_tokens_max(&self) -> u32 {
        self.prompt_tokens + self.generation.max_tokens() - 1
    }

    pub(crate) fn tokens(&self, rows: Range<u32>) -> &[TokenId] {
        &self.tokens[rows.start as usize..rows.end as usize]
    }

    pub(crate) fn usage(&self) -> Usage {
        Usage { prompt_tokens: self.prompt_tokens, output_tokens: self.generated() }
    }

    fn generated(&self) -> u32 {
        self.len() - self.prompt_tokens
    }

    pub(crate) fn is_late(&self, now: Micros) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }

    /// Makes room for the longest output, so that no later step allocates.
    pub(crate) fn reserve(&mut self) {
        self.tokens.reserve((self.generation.max_tokens() - self.generated()) as usize);
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
            None => u32::from(rows.end == self.len()),
        }
    }

    /// The longest run of rows from `start` on that stays within `tokens` rows and `logits` logit rows.
    pub(crate) fn longest(&self, start: u32, tokens: u32, logits: u32) -> u32 {
        let rows = tokens.min(self.len() - start);
        match self.first_owed_row(start) {
            Some(first) => rows.min((first - start).saturating_add(logits)),
            None if logits == 0 && start + rows == self.len() => rows.saturating_sub(1),
            None => rows,
        }
    }

    /// What the logits of row `row` are for. `unbanned` is the empty list of banned tokens, shared.
    pub(crate) fn purpose(&self, row: u32, unbanned: &Arc<[TokenId]>) -> RowPurpose {
        if row + 1 == self.len() {
            let position = self.generated();
            let early = position < self.generation.min_tokens();
            return RowPurpose::Sample {
                params: *self.generation.sampling(),
                position,
                banned: Arc::clone(if early { &self.stops } else { unbanned }),
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
    pub(crate) fn take_prompt_logprob(&mut self, entry: TokenLogprob) {
        let id = self.id;
        let owed =
            self.owed.as_mut().unwrap_or_else(|| panic!("{id}: no prompt log-probability was asked for"));
        let target = self.tokens[owed.gathered.len() + 1];
        assert_eq!(entry.token, target, "{id}: the log-probability is another token's");
        owed.gathered.push(entry);
    }

    /// Takes its next token: emits it, and says whether it ends the sequence.
    pub(crate) fn take_token(
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

/// A sequence in the running batch.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) sequence: Sequence,
    pub(crate) slot: SlotId,
    /// Tokens whose keys and values are cached, those of the step that runs now included.
    pub(crate) computed: u32,
    pub(crate) tables: Tables,
    /// Its logit rows among those of the step that runs now.
    pub(crate) logit_rows: Range<usize>,
}

impl Running {
    /// A sequence that has just got `slot` and holds no block yet.
    pub(crate) fn new(sequence: Sequence, slot: SlotId) -> Self {
        Self { sequence, slot, computed: 0, tables: Tables::default(), logit_rows: 0..0 }
    }

    /// Known tokens that have not been computed: more than one while the prompt (or a preempted sequence) is being
    /// computed, exactly one when it decodes, none while its next token is being computed.
    pub(crate) fn remaining(&self) -> u32 {
        self.sequence.len() - self.computed
    }

    /// Takes the results of its logit rows: the last one drew a token if every known token was computed, the others
    /// are prompt log-probabilities. Says whether the sequence ends.
    pub(crate) fn take(
        &mut self,
        outputs: impl ExactSizeIterator<Item = RowOutput>,
        config: &Config,
        effects: &mut Vec<Effect>,
    ) -> Option<Finish> {
        let draws = self.remaining() == 0;
        let last = outputs.len().checked_sub(1);
        for (index, output) in outputs.enumerate() {
            match (output, draws && Some(index) == last) {
                (RowOutput::NotANumber, _) => return Some(Finish::NotANumber),
                (RowOutput::PromptLogprob(entry), false) => self.sequence.take_prompt_logprob(entry),
                (RowOutput::Sampled { token, logprob }, true) => {
                    return self.sequence.take_token(token, logprob, config, effects);
                }
                (output, _) => panic!("{}: {output:?} answers another kind of row", self.sequence.id),
            }
        }
        None
    }

    /// Whether one row is left to compute, which draws the next token.
    pub(crate) fn is_decoding(&self) -> bool {
        self.remaining() == 1
    }
}

//! How the first rank of a sub-group samples its rows: logits do not leave the sub-group, so what the leader knows of
//! the requests comes to them. A sequence's parameters and history are told with its first row in a slot; from
//! then on its history grows there as it grows at the leader, by what is drawn.
//!
//! ```text
//! magic "CW", version u8,
//! step, row count, then of each logit row of the step's plan:
//!   0 (a token is asked for) or 1 (a prompt token's log-probability), added to 2 (not the leader's sub-group's row),
//!   alternatives + 1, or 0 for no log-probability; and in case 2
//!     sequence, position, then of a prompt token the token, else:
//!     stream, banned count, banned tokens, 0 (known), 1 (guided) added to 2 (told here):
//!       temperature, top-k or 0, top-p, min-p, seed, three penalties; biases, allowed tokens, bad words;
//!       0 (no history) or 1 with the tokens seen and those generated
//! CRC-32 of all of the above, u32 little-endian
//! ```
//! Numbers are LEB128; an fp32 number is its bits. Lists come with their length.

use std::sync::Arc;

use types::limits::LOGPROBS_TOP_MAX;
use types::{
    Generation, GenerationSpec, History, Logprobs, Position, SamplingParams, SeqId, SharedHistory, SlotId,
    TokenId, TokenRules,
};

use crate::wire::{BRIEFING, Reader, open, put, seal, start};
use crate::{Config, Error, RowKind, RowPurpose, RowWork, Step, StepPlan};

const PROMPT: u64 = 1;
const REMOTE: u64 = 2;
const GUIDED: u64 = 1;
const TOLD: u64 = 2;

/// The leader's side: which sequences have been told.
#[derive(Debug)]
pub struct Briefings {
    config: Config,
    /// By slot.
    told: Vec<bool>,
}

/// How the rows of one step are sampled, as it came.
#[derive(Debug, Clone, PartialEq)]
pub struct Briefing {
    step: u64,
    rows: Vec<Row>,
}

#[derive(Debug, Clone, PartialEq)]
struct Row {
    kind: RowKind,
    /// Of rows outside the leader's sub-group.
    work: Option<Work>,
}

#[derive(Debug, Clone, PartialEq)]
struct Work {
    seq: SeqId,
    position: u32,
    ask: Ask,
}

#[derive(Debug, Clone, PartialEq)]
enum Ask {
    Prompt { target: TokenId, top: Logprobs },
    Sample { stream: u32, banned: Vec<TokenId>, guided: bool, told: Option<Box<Told>> },
}

/// A sequence's way of drawing; nothing has been checked.
#[derive(Debug, Clone, PartialEq)]
struct Told {
    spec: GenerationSpec,
    history: Option<History>,
}

/// A follower's side: how the sequences of its sub-group are sampled.
#[derive(Debug)]
pub struct Briefed {
    config: Config,
    sub_group: u32,
    /// By slot of the sub-group.
    sequences: Vec<Option<Drawing>>,
}

#[derive(Debug)]
struct Drawing {
    seq: SeqId,
    generation: Generation,
    history: Option<SharedHistory>,
}

/// What a rank knows of the logit rows of a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Brief {
    /// Of every logit row what is asked.
    pub kinds: Vec<RowKind>,
    /// What to do with those of this rank's sub-group, in order.
    pub work: Vec<RowWork>,
    /// Whether [`crate::Masks`] come for some of them.
    pub guided: bool,
}

impl Briefings {
    /// Nothing has been told.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self { told: vec![false; config.slots() as usize], config: config.clone() }
    }

    /// Appends how `step` is sampled to `out`. `guided` says whether a grammar limits what a sequence may draw; true when one
    /// does for a row of another sub-group than the leader's.
    pub fn encode(&mut self, step: &Step, guided: impl Fn(SeqId) -> bool, out: &mut Vec<u8>) -> bool {
        for slot in step.plan.released() {
            self.told[slot.0 as usize] = false;
        }
        let begin = start(out, BRIEFING);
        put(out, step.plan.step());
        put(out, step.work.len() as u64);
        let mut any = false;
        for (slot, work) in slots(&step.plan).zip(&step.work) {
            let remote = self.config.sub_group(slot) > 0;
            kind(out, RowKind::of(&work.purpose), if remote { REMOTE } else { 0 });
            if !remote {
                continue;
            }
            put(out, work.seq.0);
            match &work.purpose {
                RowPurpose::PromptLogprob { position, target, .. } => {
                    put(out, position.0.into());
                    put(out, target.0.into());
                }
                RowPurpose::Sample { params, rules, history, stream, position, banned, .. } => {
                    put(out, (*position).into());
                    put(out, (*stream).into());
                    tokens(out, banned);
                    let fresh = !std::mem::replace(&mut self.told[slot.0 as usize], true);
                    let guided = guided(work.seq);
                    any |= guided;
                    put(out, u64::from(guided) * GUIDED + u64::from(fresh) * TOLD);
                    if fresh {
                        tell(out, params, rules, history.as_ref());
                    }
                }
            }
        }
        seal(out, begin);
        any
    }
}

/// The slot of each logit row.
fn slots(plan: &StepPlan) -> impl Iterator<Item = SlotId> {
    plan.sequences().flat_map(|one| std::iter::repeat_n(one.slot, one.logit_rows as usize))
}

fn kind(out: &mut Vec<u8>, kind: RowKind, remote: u64) {
    let (prompt, logprobs) = match kind {
        RowKind::Sample(logprobs) => (0, logprobs),
        RowKind::PromptLogprob(top) => (PROMPT, Some(top)),
    };
    put(out, prompt | remote);
    put(out, logprobs.map_or(0, |asked| u64::from(asked.top()) + 1));
}

fn tokens(out: &mut Vec<u8>, tokens: &[TokenId]) {
    put(out, tokens.len() as u64);
    tokens.iter().for_each(|token| put(out, token.0.into()));
}

fn tell(out: &mut Vec<u8>, params: &SamplingParams, rules: &TokenRules, history: Option<&SharedHistory>) {
    let float = |out: &mut Vec<u8>, number: f32| put(out, number.to_bits().into());
    float(out, params.temperature());
    put(out, params.top_k().unwrap_or(0).into());
    float(out, params.top_p());
    float(out, params.min_p());
    put(out, params.seed());
    float(out, params.presence_penalty());
    float(out, params.frequency_penalty());
    float(out, params.repetition_penalty());
    put(out, rules.logit_bias().len() as u64);
    for &(token, bias) in rules.logit_bias() {
        put(out, token.0.into());
        float(out, bias);
    }
    tokens(out, rules.allowed().unwrap_or_default());
    put(out, rules.bad_words().len() as u64);
    rules.bad_words().iter().for_each(|word| tokens(out, word));
    put(out, u64::from(history.is_some()));
    if let Some(history) = history.map(SharedHistory::snapshot) {
        let mut seen: Vec<TokenId> = history.seen().map(|(token, _)| token).collect();
        seen.sort_unstable();
        tokens(out, &seen);
        tokens(out, history.generated());
    }
}

impl Briefing {
    /// Reads a briefing that fills `bytes`.
    ///
    /// # Errors
    /// As [`StepPlan::decode`].
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        open(bytes, BRIEFING, |reader| reader.briefing())
    }
}

impl Briefed {
    /// Nothing has been told; `sub_group` is this rank's, which is not the leader's.
    #[must_use]
    pub fn new(config: &Config, sub_group: u32) -> Self {
        let sequences = (0..config.running_max).map(|_| None).collect();
        Self { config: config.clone(), sub_group, sequences }
    }

    /// What this rank does with the rows of `plan`, in the order of steps.
    ///
    /// # Errors
    /// When the briefing is another step's, or does not say how to sample a row of this sub-group.
    pub fn take(&mut self, plan: &StepPlan, briefing: Briefing) -> Result<Brief, Error> {
        let (step, rows, expected) = (briefing.step, briefing.rows.len(), plan.logit_row_count());
        if step != plan.step() || rows != expected as usize {
            return Err(Error::BriefingRows { step, rows, plan: plan.step(), expected });
        }
        let own = |slot: &SlotId| self.config.sub_group(*slot) == self.sub_group;
        let first = self.sub_group * self.config.running_max;
        for slot in plan.released().iter().filter(|slot| own(slot)) {
            self.sequences[(slot.0 - first) as usize] = None;
        }
        let mut brief = Brief { kinds: Vec::with_capacity(rows), work: Vec::new(), guided: false };
        for (slot, row) in slots(plan).zip(briefing.rows) {
            brief.kinds.push(row.kind);
            let Some(work) = row.work.filter(|_| self.config.sub_group(slot) == self.sub_group) else {
                continue;
            };
            brief.guided |= matches!(work.ask, Ask::Sample { guided: true, .. });
            let known = &mut self.sequences[(slot.0 - first) as usize];
            let purpose = purpose(known, (step, slot), (row.kind, &self.config), &work)?;
            brief.work.push(RowWork { seq: work.seq, purpose });
        }
        Ok(brief)
    }
}

/// What a row is for, whose slot is `known` for this.
fn purpose(
    known: &mut Option<Drawing>,
    (step, slot): (u64, SlotId),
    (kind, config): (RowKind, &Config),
    work: &Work,
) -> Result<RowPurpose, Error> {
    let Work { seq, position, ask } = work;
    let (stream, banned, told) = match ask {
        Ask::Prompt { target, top } => {
            let (position, target, top) = (Position(*position), *target, *top);
            return Ok(RowPurpose::PromptLogprob { position, target, top });
        }
        Ask::Sample { stream, banned, told, .. } => (*stream, banned, told),
    };
    if let Some(told) = told {
        let Told { spec, history } = told.as_ref().clone();
        let invalid = |source| Error::BriefingInvalid { step, slot, source };
        let generation = spec.validate(0, config.vocab_size).map_err(invalid)?;
        *known = Some(Drawing { seq: *seq, generation, history: history.map(SharedHistory::new) });
    }
    let Some(Drawing { generation, history, .. }) = known.as_ref().filter(|known| known.seq == *seq) else {
        return Err(Error::BriefingMissing { step, slot, seq: *seq });
    };
    Ok(RowPurpose::Sample {
        params: *generation.sampling(),
        rules: Arc::clone(generation.rules()),
        history: history.clone(),
        stream,
        position: *position,
        banned: banned.as_slice().into(),
        logprobs: match kind {
            RowKind::Sample(logprobs) => logprobs,
            RowKind::PromptLogprob(_) => None,
        },
    })
}

impl Reader<'_> {
    fn briefing(&mut self) -> Result<Briefing, Error> {
        let step = self.number("the step number", u64::MAX)?;
        let rows = (0..self.count("rows")?).map(|_| self.row()).collect::<Result<_, _>>()?;
        Ok(Briefing { step, rows })
    }
    fn row(&mut self) -> Result<Row, Error> {
        let flags = self.number("what is asked of a row", PROMPT | REMOTE)?;
        let alternatives = self.number("alternatives", u64::from(LOGPROBS_TOP_MAX) + 1)?;
        let asked = alternatives.checked_sub(1).and_then(|top| Logprobs::new(top as u32).ok());
        let kind = match (flags & PROMPT, asked) {
            (0, logprobs) => RowKind::Sample(logprobs),
            (_, Some(top)) => RowKind::PromptLogprob(top),
            (_, None) => {
                let max = u64::from(LOGPROBS_TOP_MAX) + 1;
                return Err(Error::PlanField { field: "alternatives", got: 0, min: 1, max });
            }
        };
        let work = if flags & REMOTE == 0 { None } else { Some(self.work(kind)?) };
        Ok(Row { kind, work })
    }

    fn work(&mut self, kind: RowKind) -> Result<Work, Error> {
        let seq = SeqId(self.number("a sequence", u64::MAX)?);
        let position = self.small("a position")?;
        let ask = match kind {
            RowKind::PromptLogprob(top) => {
                Ask::Prompt { target: TokenId(self.small("a prompt token")?), top }
            }
            RowKind::Sample(_) => {
                let stream = self.small("a generator stream")?;
                let banned = self.tokens("banned tokens")?;
                let flags = self.number("what is told of a sequence", GUIDED | TOLD)?;
                let told = if flags & TOLD == 0 { None } else { Some(Box::new(self.told()?)) };
                Ask::Sample { stream, banned, guided: flags & GUIDED != 0, told }
            }
        };
        Ok(Work { seq, position, ask })
    }

    fn told(&mut self) -> Result<Told, Error> {
        let mut spec = GenerationSpec {
            temperature: Some(self.float("a temperature")?),
            top_k: Some(self.small("a top-k")?),
            top_p: Some(self.float("a top-p")?),
            min_p: Some(self.float("a min-p")?),
            seed: Some(self.number("a seed", u64::MAX)?),
            presence_penalty: Some(self.float("a presence penalty")?),
            frequency_penalty: Some(self.float("a frequency penalty")?),
            repetition_penalty: Some(self.float("a repetition penalty")?),
            ..GenerationSpec::default()
        };
        for _ in 0..self.count("biases")? {
            spec.logit_bias.push((self.small("a biased token")?, self.float("a bias")?));
        }
        let raw = |tokens: Vec<TokenId>| tokens.into_iter().map(|token| token.0).collect();
        spec.allowed_token_ids = raw(self.tokens("allowed tokens")?);
        for _ in 0..self.count("bad words")? {
            spec.bad_words.push(raw(self.tokens("a bad word")?));
        }
        let history = match self.number("whether there is a history", 1)? {
            0 => None,
            _ => Some(History::new(&self.tokens("tokens seen")?, &self.tokens("tokens generated")?)),
        };
        Ok(Told { spec, history })
    }

    fn tokens(&mut self, field: &'static str) -> Result<Vec<TokenId>, Error> {
        (0..self.count(field)?).map(|_| Ok(TokenId(self.small(field)?))).collect()
    }

    fn float(&mut self, field: &'static str) -> Result<f32, Error> {
        Ok(f32::from_bits(self.small(field)?))
    }
}

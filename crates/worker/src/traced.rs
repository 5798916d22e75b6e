//! The spans of a traced request: at its leader the stages of each sequence, at a follower what it computes for it.
//! Followers never see a request; they are told the slot it has and the trace it belongs to, on the plan channel, before
//! the plan that begins with it. Of a request that is not traced nothing of this exists.

use std::collections::BTreeMap;
use std::time::Instant;

use engine::{Effect, Finish, StepPlan, Usage};
use trace::{Kind, PARENT_BYTES, Parent, Span};
use types::{SeqId, SlotId};

/// The stages of one sequence at its leader.
#[derive(Debug)]
pub(crate) struct Stages {
    request: Span,
    /// Queue, prefill or decode.
    now: Span,
    sequence: u32,
    arrived: Instant,
    started: Option<Instant>,
    first: Option<Instant>,
}

impl Stages {
    /// A sequence that waits from now on; `None` when its request is not traced.
    pub(crate) fn queued(request: &Span, sequence: u32) -> Option<Box<Self>> {
        request.is_on().then(|| {
            let (request, arrived) = (request.clone(), Instant::now());
            let mut stages =
                Self { request, now: Span::none(), sequence, arrived, started: None, first: None };
            stages.enter("queue");
            Box::new(stages)
        })
    }

    /// What followers name as the parent of their spans.
    pub(crate) fn parent(&self) -> Option<Parent> {
        self.request.parent()
    }

    fn enter(&mut self, stage: &'static str) {
        // One ends before the next begins.
        self.now = Span::none();
        self.now = self.request.child(stage, Kind::Internal);
        self.now.set("cohort.sequence", i64::from(self.sequence));
    }

    /// It got a place in the batch.
    pub(crate) fn started(&mut self, cached_tokens: u32) {
        let waited = self.started.get_or_insert_with(Instant::now).duration_since(self.arrived);
        self.request.set("gen_ai.latency.time_in_queue", waited.as_secs_f64());
        self.enter("prefill");
        self.now.set("gen_ai.usage.cache_read.input_tokens", i64::from(cached_tokens));
    }

    /// It lost its place.
    pub(crate) fn preempted(&mut self) {
        self.enter("queue");
        self.now.set("cohort.preempted", true);
    }

    /// It drew a token. Nothing but a look after the first.
    pub(crate) fn drew(&mut self) {
        if self.first.is_some() {
            return;
        }
        let now = Instant::now();
        self.first = Some(now);
        let since = |at: Instant| now.duration_since(at).as_secs_f64();
        self.request.set("gen_ai.latency.time_to_first_token", since(self.arrived));
        self.request.set_some("gen_ai.latency.time_in_model_prefill", self.started.map(since));
        self.enter("decode");
    }

    /// It ended by itself.
    pub(crate) fn finished(self, finish: Finish, usage: &Usage) {
        let since = |at: Instant| at.elapsed().as_secs_f64();
        self.request.set_some("gen_ai.latency.time_in_model_decode", self.first.map(since));
        self.request.set_some("gen_ai.latency.time_in_model_inference", self.started.map(since));
        self.now.set("gen_ai.usage.output_tokens", i64::from(usage.output_tokens));
        let reason = match finish {
            Finish::Eos(_) | Finish::StopToken(_) => "stop",
            Finish::Length => "length",
            Finish::Cancelled => "cancelled",
            Finish::DeadlineExceeded => "deadline_exceeded",
            Finish::NoToken => "no_token",
            Finish::NotANumber => "not_a_number",
        };
        self.now.set_all("gen_ai.response.finish_reasons", [reason]);
    }

    /// It did not come to its end.
    pub(crate) fn failed(&self, kind: &'static str, why: &str) {
        self.now.fail(kind, why);
    }
}

/// What a leader tells its followers of a traced sequence.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Note {
    /// From the next plan on this slot is a traced request's.
    Begin(SlotId, Parent),
    /// It is so no more.
    End(SlotId),
}

/// How notes begin; no other frame begins like this.
const BEGIN: u8 = 1;
const END: u8 = 2;
const SLOT_BYTES: usize = 4;

impl Note {
    /// Appends it to `frame`.
    pub(crate) fn encode(&self, frame: &mut Vec<u8>) {
        let (kind, slot) = match self {
            Self::Begin(slot, _) => (BEGIN, slot),
            Self::End(slot) => (END, slot),
        };
        frame.push(kind);
        frame.extend_from_slice(&slot.0.to_le_bytes());
        if let Self::Begin(_, parent) = self {
            frame.extend_from_slice(&parent.to_bytes());
        }
    }

    /// Reads a frame; `None` for one that is no note.
    pub(crate) fn decode(frame: &[u8]) -> Option<Self> {
        let (&kind, rest) = frame.split_first()?;
        let (slot, rest) = rest.split_first_chunk::<SLOT_BYTES>()?;
        let slot = SlotId(u32::from_le_bytes(*slot));
        match (kind, rest) {
            (END, []) => Some(Self::End(slot)),
            (BEGIN, rest) => {
                let parent: &[u8; PARENT_BYTES] = rest.try_into().ok()?;
                Parent::from_bytes(parent).map(|parent| Self::Begin(slot, parent))
            }
            _ => None,
        }
    }
}

/// The leader's side: which slots followers hold to be traced.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    slots: BTreeMap<SeqId, SlotId>,
    /// How many of the effects that wait to be delivered have been looked at.
    seen: usize,
}

impl Notes {
    /// What followers must hear of the effects that have come up since the last look, before the next plan. `parent` says
    /// what a traced sequence belongs to.
    pub(crate) fn take(
        &mut self,
        effects: &[Effect],
        parent: impl Fn(SeqId) -> Option<Parent>,
        mut tell: impl FnMut(&Note),
    ) {
        for effect in effects.get(self.seen..).unwrap_or_default() {
            match effect {
                Effect::Started { seq, slot, .. } => {
                    if let Some(parent) = parent(*seq) {
                        self.slots.insert(*seq, *slot);
                        tell(&Note::Begin(*slot, parent));
                    }
                }
                Effect::Preempted { seq } | Effect::Finished { seq, .. } | Effect::Refused { seq, .. } => {
                    if let Some(slot) = self.slots.remove(seq) {
                        tell(&Note::End(slot));
                    }
                }
                Effect::PromptLogprobs { .. } | Effect::Token { .. } => {}
            }
        }
        self.seen = effects.len();
    }

    /// The effects have been delivered.
    pub(crate) const fn delivered(&mut self) {
        self.seen = 0;
    }
}

/// The follower's side: the traced sequences it computes.
#[derive(Debug, Default)]
pub(crate) struct Followed {
    slots: BTreeMap<SlotId, Execution>,
}

/// What a follower does for one sequence.
#[derive(Debug)]
struct Execution {
    parent: Parent,
    /// Prefill, then decode, from the first step on.
    now: Span,
    decodes: bool,
    steps: i64,
    rows: i64,
}

impl Followed {
    /// Takes a note in its place among the plans; `own` says which slots are this rank's.
    pub(crate) fn note(&mut self, note: Note, own: impl Fn(SlotId) -> bool) {
        match note {
            Note::Begin(slot, parent) if own(slot) => {
                let (now, decodes) = (Span::none(), false);
                self.slots.insert(slot, Execution { parent, now, decodes, steps: 0, rows: 0 });
            }
            Note::Begin(..) => {}
            Note::End(slot) => _ = self.slots.remove(&slot),
        }
    }

    /// A step is about to run.
    pub(crate) fn before(&mut self, plan: &StepPlan) {
        if self.slots.is_empty() {
            return;
        }
        for planned in plan.sequences() {
            let Some(one) = self.slots.get_mut(&planned.slot) else { continue };
            if !one.now.is_on() {
                one.now = Span::begin("prefill", Kind::Internal, Some(&one.parent));
            }
        }
    }

    /// It has run; only now it counts, because the step behind it may have begun before it ended.
    pub(crate) fn after(&mut self, plan: &StepPlan) {
        if self.slots.is_empty() {
            return;
        }
        for planned in plan.sequences() {
            let Some(one) = self.slots.get_mut(&planned.slot) else { continue };
            one.steps += 1;
            one.rows += planned.rows.len() as i64;
            if one.decodes || planned.logit_rows == 0 {
                continue;
            }
            one.close();
            one.decodes = true;
            one.now = Span::begin("decode", Kind::Internal, Some(&one.parent));
        }
    }
}

impl Execution {
    fn close(&mut self) {
        self.now.set("cohort.steps", std::mem::take(&mut self.steps));
        self.now.set("cohort.rows", std::mem::take(&mut self.rows));
        self.now = Span::none();
    }
}

impl Drop for Execution {
    fn drop(&mut self) {
        self.close();
    }
}

//! Our answers in the form of vLLM's API.

use proto::v1;
use proto::v1::finish::Matched;
use proto::vllm::candidate_token_info::TokenInfo;
use proto::vllm::finish_info::{FinishReason, StopReason};
use proto::vllm::{CandidateTokenInfo, FinishInfo, GenerateResponse, PromptInfo, SequenceOutput};

use super::request::{Part, Shown};

/// How the answers to one request are shown, and what is remembered of them.
#[derive(Debug)]
pub(super) struct View {
    shown: Shown,
    eos_token_ids: Vec<u32>,
    prompt_shown: bool,
    sequences: Vec<Sequence>,
}

/// One of the answers so far.
#[derive(Debug, Clone, Copy, Default)]
struct Sequence {
    tokens: u32,
    ended: bool,
}

impl View {
    pub(super) fn new(shown: Shown, eos_token_ids: Vec<u32>) -> Self {
        let sequences = vec![Sequence::default(); shown.sequences as usize];
        Self { shown, eos_token_ids, prompt_shown: false, sequences }
    }

    /// One message of a sequence.
    pub(super) fn message(&mut self, message: v1::GenerateResponse) -> GenerateResponse {
        let index = message.index;
        let Part { text, token_ids, logprobs } = self.shown.output;
        let count = u32::try_from(message.token_ids.len()).unwrap_or(u32::MAX);
        if let Some(sequence) = self.sequences.get_mut(index as usize) {
            sequence.tokens = sequence.tokens.saturating_add(count);
            sequence.ended = message.finish.is_some();
        }
        let prompt_info = message.prompt.filter(|_| !std::mem::replace(&mut self.prompt_shown, true));
        let positions: Vec<Option<&v1::TokenLogprob>> = message.logprobs.iter().map(Some).collect();
        let mut output = SequenceOutput {
            index,
            num_tokens: count,
            finish_info: message.finish.as_ref().map(|finish| self.finish(finish, message.usage)),
            ..SequenceOutput::default()
        };
        if text {
            output.text = message.text;
            if let (true, Some(Matched::Stop(stop))) =
                (self.shown.include_stop, message.finish.as_ref().and_then(|finish| finish.matched.as_ref()))
            {
                output.text.push_str(stop);
            }
        }
        if let Some(asked) = logprobs {
            if asked.own {
                (output.logprobs, output.ranks) = own(&positions);
            }
            output.candidate_tokens = candidates(&positions, asked.candidates);
        }
        if token_ids {
            output.token_ids = message.token_ids;
        }
        let prompt_info = prompt_info.map(|prompt| self.prompt(prompt));
        GenerateResponse { prompt_info, outputs: Some(output) }
    }

    /// The last message of a sequence that was ended by its id, with what is still to be shown of it.
    pub(super) fn aborted(&mut self, rest: v1::GenerateResponse) -> GenerateResponse {
        let index = rest.index as usize;
        let mut message = self.message(rest);
        let info = FinishInfo {
            num_output_tokens: self.sequences.get(index).map_or(0, |sequence| sequence.tokens),
            finish_reason: FinishReason::Aborted.into(),
            ..FinishInfo::default()
        };
        message.outputs.get_or_insert_default().finish_info = Some(info);
        message
    }

    /// The last messages of all sequences that still ran when their request was ended by its id.
    pub(super) fn aborted_all(&mut self) -> Vec<GenerateResponse> {
        let open = self.sequences.iter().zip(0_u32..).filter(|(sequence, _)| !sequence.ended);
        let open: Vec<u32> = open.map(|(_, index)| index).collect();
        let ended = |index| self.aborted(v1::GenerateResponse { index, ..v1::GenerateResponse::default() });
        open.into_iter().map(ended).collect()
    }

    fn finish(&self, finish: &v1::Finish, usage: Option<v1::Usage>) -> FinishInfo {
        let reason = match finish.reason() {
            v1::FinishReason::Length => FinishReason::Length,
            v1::FinishReason::Stop | v1::FinishReason::Unspecified => FinishReason::Stop,
        };
        let stop_reason = finish.matched.as_ref().map(|matched| match matched {
            Matched::TokenId(id) if self.eos_token_ids.contains(id) => StopReason::EosTokenId(*id),
            Matched::TokenId(id) => StopReason::StopTokenId(*id),
            Matched::Stop(stop) => StopReason::StopString(stop.clone()),
        });
        let usage = usage.unwrap_or_default();
        FinishInfo {
            num_output_tokens: usage.output_tokens,
            num_cached_tokens: Some(usage.cached_tokens),
            finish_reason: reason.into(),
            stop_reason,
            ..FinishInfo::default()
        }
    }

    fn prompt(&self, prompt: v1::PromptInfo) -> PromptInfo {
        let Part { token_ids, logprobs, .. } = self.shown.prompt;
        let num_prompt_tokens = u32::try_from(prompt.token_ids.len()).unwrap_or(u32::MAX);
        let mut info = PromptInfo { num_prompt_tokens, ..PromptInfo::default() };
        if let Some(asked) = logprobs {
            let positions: Vec<Option<&v1::TokenLogprob>> =
                prompt.logprobs.iter().map(|position| position.value.as_ref()).collect();
            if asked.own {
                (info.logprobs, info.ranks) = own(&positions);
            }
            info.candidate_tokens = candidates(&positions, asked.candidates);
        }
        if token_ids {
            info.token_ids = prompt.token_ids;
        }
        info
    }
}

/// The log-probability and rank of each token.
fn own(positions: &[Option<&v1::TokenLogprob>]) -> (Vec<f32>, Vec<u32>) {
    let rank = |position: &v1::TokenLogprob| {
        let at = position.top.iter().zip(1..).find(|(top, _)| top.token_id == position.token_id);
        at.map_or(0, |(_, rank)| rank)
    };
    positions
        .iter()
        .map(|position| position.map_or((0.0, 0), |position| (position.logprob, rank(position))))
        .unzip()
}

/// Up to `most` others at each position; nothing when none are wanted.
fn candidates(positions: &[Option<&v1::TokenLogprob>], most: u32) -> Vec<CandidateTokenInfo> {
    if most == 0 {
        return Vec::new();
    }
    let others = |position: &v1::TokenLogprob| {
        let ranked = position.top.iter().zip(1..).take(most as usize);
        let ranked = ranked.filter(|(top, _)| top.token_id != position.token_id);
        ranked.map(|(top, rank)| TokenInfo { id: top.token_id, logprob: top.logprob, rank }).collect()
    };
    let info = |position: &Option<&v1::TokenLogprob>| CandidateTokenInfo {
        tokens: position.map(others).unwrap_or_default(),
    };
    positions.iter().map(info).collect()
}

/// Adds a message of a stream to those before it.
pub(super) fn append(whole: &mut v1::GenerateResponse, message: v1::GenerateResponse) {
    whole.prompt = whole.prompt.take().or(message.prompt);
    whole.text.push_str(&message.text);
    whole.token_ids.extend(message.token_ids);
    whole.logprobs.extend(message.logprobs);
    whole.finish = message.finish;
    whole.usage = message.usage;
}

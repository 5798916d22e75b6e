//! What a request's rules and penalties make of the logits, before any probability is computed.

use types::{History, TokenId};

use super::Draw;

/// The logits of a row as [`Draw`] wants them; tokens that must not be drawn have negative infinity.
pub(super) fn adjusted(logits: &[f32], draw: &Draw<'_>, history: &History) -> Vec<f32> {
    let mut out = logits.to_vec();
    bias(&mut out, draw);
    penalise(&mut out, draw, history);
    exclude_unallowed(&mut out, draw);
    exclude_masked(&mut out, draw);
    exclude(&mut out, draw.banned.iter().copied());
    let before_bad_words = out.clone();
    exclude(&mut out, bad_word_ends(draw, history));
    // Bad words that leave nothing to draw are let through: a sequence must go on, and only they can be overruled.
    if out.iter().all(|&logit| logit == f32::NEG_INFINITY) { before_bad_words } else { out }
}

fn bias(out: &mut [f32], draw: &Draw<'_>) {
    for &(token, bias) in draw.rules.logit_bias() {
        if let Some(logit) = out.get_mut(token.0 as usize) {
            *logit += bias;
        }
    }
}

fn penalise(out: &mut [f32], draw: &Draw<'_>, history: &History) {
    if !draw.params.has_penalties() {
        return;
    }
    let repetition = draw.params.repetition_penalty();
    let (presence, frequency) = (draw.params.presence_penalty(), draw.params.frequency_penalty());
    for (token, times) in history.seen() {
        let Some(logit) = out.get_mut(token.0 as usize) else { continue };
        *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
        if times > 0 {
            *logit -= frequency * times as f32 + presence;
        }
    }
}

fn exclude_unallowed(out: &mut [f32], draw: &Draw<'_>) {
    let Some(allowed) = draw.rules.allowed() else { return };
    let mut next = allowed.iter().peekable();
    for (id, logit) in (0_u32..).zip(out) {
        if next.next_if_eq(&&TokenId(id)).is_none() {
            *logit = f32::NEG_INFINITY;
        }
    }
}

fn exclude_masked(out: &mut [f32], draw: &Draw<'_>) {
    let Some(mask) = draw.mask else { return };
    // A vocabulary may be padded beyond the last word.
    let words = mask.words().iter().copied().chain(std::iter::repeat(0));
    for (word, logits) in words.zip(out.chunks_mut(32)) {
        if word == u32::MAX {
            continue;
        }
        for (bit, logit) in logits.iter_mut().enumerate() {
            if word & (1 << bit) == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

fn exclude(out: &mut [f32], tokens: impl Iterator<Item = TokenId>) {
    for token in tokens {
        if let Some(logit) = out.get_mut(token.0 as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// Tokens that would complete a bad word.
fn bad_word_ends<'a>(draw: &'a Draw<'_>, history: &'a History) -> impl Iterator<Item = TokenId> + 'a {
    draw.rules.bad_words().iter().filter_map(|word| {
        let (&last, begin) = word.split_last()?;
        history.generated().ends_with(begin).then_some(last)
    })
}

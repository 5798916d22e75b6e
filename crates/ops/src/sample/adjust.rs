//! What a request's rules and penalties make of the logits, before any probability is computed.

use types::{TokenId, TokenMask};

use super::{Penalties, Recipe};

/// The logits of a row as `recipe` wants them; tokens that must not be drawn have negative infinity.
pub(super) fn adjusted(logits: &[f32], recipe: &Recipe<'_>) -> Vec<f32> {
    let mut out = logits.to_vec();
    bias(&mut out, recipe.bias);
    if let Some(penalties) = &recipe.penalties {
        penalise(&mut out, penalties);
    }
    if let Some(allowed) = recipe.allowed {
        exclude_unallowed(&mut out, allowed);
    }
    if let Some(mask) = recipe.mask {
        exclude_masked(&mut out, mask);
    }
    exclude(&mut out, recipe.banned);
    if recipe.bad_ends.is_empty() {
        return out;
    }
    let before_bad_words = out.clone();
    exclude(&mut out, &recipe.bad_ends);
    // Bad words that leave nothing to draw are let through: a sequence must go on, and only they can be overruled.
    if out.iter().all(|&logit| logit == f32::NEG_INFINITY) { before_bad_words } else { out }
}

fn bias(out: &mut [f32], bias: &[(TokenId, f32)]) {
    for &(token, bias) in bias {
        if let Some(logit) = out.get_mut(token.0 as usize) {
            *logit += bias;
        }
    }
}

fn penalise(out: &mut [f32], penalties: &Penalties) {
    for &(token, times) in &penalties.seen {
        if let Some(logit) = out.get_mut(token.0 as usize) {
            *logit = penalties.of(*logit, times);
        }
    }
}

fn exclude_unallowed(out: &mut [f32], allowed: &[TokenId]) {
    let mut next = allowed.iter().peekable();
    for (id, logit) in (0_u32..).zip(out) {
        if next.next_if_eq(&&TokenId(id)).is_none() {
            *logit = f32::NEG_INFINITY;
        }
    }
}

fn exclude_masked(out: &mut [f32], mask: &TokenMask) {
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

fn exclude(out: &mut [f32], tokens: &[TokenId]) {
    for token in tokens {
        if let Some(logit) = out.get_mut(token.0 as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

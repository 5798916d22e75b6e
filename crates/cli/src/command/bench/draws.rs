//! `cohort bench kernels`: drawing a token of each row, with one rule or filter at a time.

use ops::sample::{Ask, Penalties, Plain, Recipe};
use types::{TokenId, TokenMask};

use super::machine::{self, Settled};
use super::ops::Bench;

/// Tokens whose logits penalties change: a conversation of 8K different ones.
const SEEN: usize = 8192;
/// Tokens that are listed with their log-probabilities: as many as OpenAI's API allows.
const LISTED: u32 = 20;
/// A uniform number like any other.
const AT: f64 = 0.618_033_988_75;

impl<B: Settled> Bench<'_, B> {
    /// Each way to draw, from queueing it to having the tokens on the host.
    pub(super) fn draws(&mut self, rows: &[u32]) -> anyhow::Result<()> {
        let vocab = self.target.config.vocab_size;
        let seen = (0..SEEN.min(vocab)).map(|i| TokenId((i * (vocab / SEEN.min(vocab))) as u32));
        let seen: Vec<(TokenId, u32)> = seen.map(|token| (token, 1)).collect();
        let mask = TokenMask::from_words(vec![0x5555_5555; vocab.div_ceil(32)]);
        let plain = Plain { temperature: 1.0, top_k: None, top_p: 1.0, min_p: 0.0, at: AT };
        let greedy = || Recipe::plain(Plain::GREEDY);
        let penalties = Penalties { repetition: 1.1, frequency: 0.2, presence: 0.1, seen };
        let ways: [(&'static str, Recipe<'_>); 9] = [
            ("draw: greedy", greedy()),
            ("draw: temperature", Recipe::plain(plain)),
            ("draw: top-k 50", Recipe::plain(Plain { top_k: Some(50), ..plain })),
            ("draw: top-p 0.95", Recipe::plain(Plain { top_p: 0.95, ..plain })),
            ("draw: top-k 50, top-p 0.95", Recipe::plain(Plain { top_k: Some(50), top_p: 0.95, ..plain })),
            ("draw: min-p 0.05", Recipe::plain(Plain { min_p: 0.05, ..plain })),
            ("draw: penalties of 8K tokens", Recipe { penalties: Some(penalties), ..greedy() }),
            ("draw: mask", Recipe { mask: Some(&mask), ..greedy() }),
            ("draw: 20 log-probabilities", Recipe { report: Some(LISTED), ..greedy() }),
        ];
        for &count in rows {
            let most = self.backend.drawn_rows_max();
            let t = (count as usize).min(most);
            let logits = machine::rows(&mut self.backend, t, vocab)?;
            let bytes = (t * vocab * self.target.dtype.bytes()) as f64;
            for (name, recipe) in &ways {
                let asks = vec![Ask::Token(recipe.clone()); t];
                self.note((name, u32::try_from(t)?), (bytes, 0.0), 4, |backend, _| {
                    let drawing = backend.draw(&logits, (vocab, 1.0), (0, &asks))?;
                    backend.collect(drawing).map(drop)
                })?;
            }
        }
        Ok(())
    }
}

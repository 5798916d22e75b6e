//! Drawing: seeded asks with every rule, and whether a device answers them as the reference does.

use types::{TokenId, TokenMask};

use super::{Bench, Mismatch, Random};
use crate::sample::{Ask, Choice, Penalties, Plain, Recipe, TokenLogprob, answer};
use crate::{Backend, Error};

/// How far from a boundary, in probability, reference and device may see the uniform number on different sides: both take
/// weights and their sums in fp64, in another order.
const BOUNDARY: f64 = 1e-11;
/// Widths of the rows drawn from: fewer than a vector, not a multiple of one, several blocks' worth.
const WIDTHS: [usize; 4] = [7, 300, 4096, 8195];

/// An ask, with all that it borrows.
#[derive(Debug, Clone, PartialEq)]
pub struct AnyAsk {
    bias: Vec<(TokenId, f32)>,
    penalties: Option<Penalties>,
    allowed: Option<Vec<TokenId>>,
    mask: Option<TokenMask>,
    banned: Vec<TokenId>,
    bad_ends: Vec<TokenId>,
    how: Plain,
    report: Option<u32>,
    known: Option<TokenId>,
}

impl AnyAsk {
    /// One of a row of `width` logits; each rule is there or not.
    #[must_use]
    pub fn new(random: &mut Random, width: usize) -> Self {
        let k = [1, 2, 40, 1000, width as u32 / 2, width as u32 * 2][random.below(6)];
        let how = Plain {
            temperature: [0.0, 0.05, 0.7, 1.0, 3.0][random.below(5)],
            top_k: (random.below(2) == 1).then_some(k),
            top_p: [1.0, 1.0, 0.95, 0.5, 0.01][random.below(5)],
            min_p: [0.0, 0.0, 0.05, 1.0][random.below(4)],
            at: random.unit(),
        };
        let mut maybe = |among: usize| random.below(among) == 0;
        let [bias, penalties, allowed, mask, banned, bad, report, known] =
            [4, 3, 6, 4, 4, 4, 3, 8].map(&mut maybe);
        // Names beyond the vocabulary change nothing.
        let some = |random: &mut Random, most: usize| {
            let count = 1 + random.below(most.min(width));
            let mut tokens: Vec<TokenId> =
                (0..count).map(|_| TokenId(random.below(width + 2) as u32)).collect();
            tokens.sort_unstable();
            tokens.dedup();
            tokens
        };
        let bias = if bias { some(random, 20) } else { Vec::new() };
        let seen = if penalties { some(random, 900) } else { Vec::new() };
        let mut allowed = allowed.then(|| some(random, 400));
        let banned = if banned { some(random, 5) } else { Vec::new() };
        let bad_ends = if bad { some(random, 5) } else { Vec::new() };
        if bad && random.below(3) == 0 {
            // Bad words that would leave nothing.
            allowed = Some(bad_ends.clone());
        }
        Self {
            bias: bias.into_iter().map(|token| (token, 5.0 * random.normal())).collect(),
            penalties: penalties.then(|| Penalties {
                repetition: [1.0, 1.3, 0.8][random.below(3)],
                frequency: [0.0, 0.3, -0.7][random.below(3)],
                presence: [0.0, 1.1][random.below(2)],
                seen: seen.into_iter().map(|token| (token, random.below(4) as u32)).collect(),
            }),
            allowed,
            mask: mask.then(|| any_mask(random, width)),
            banned,
            bad_ends,
            how,
            report: report.then(|| [0, 1, 20, 128][random.below(4)]),
            known: known.then(|| TokenId(random.below(width) as u32)),
        }
    }

    /// What it asks for.
    #[must_use]
    pub fn ask(&self) -> Ask<'_> {
        let Self { bias, penalties, allowed, mask, banned, bad_ends, how, report, known } = self;
        match known {
            Some(token) => Ask::Likelihood { token: *token, top: report.unwrap_or(3) },
            None => Ask::Token(Recipe {
                bias,
                penalties: penalties.clone(),
                allowed: allowed.as_deref(),
                mask: mask.as_ref(),
                banned,
                bad_ends: bad_ends.clone(),
                how: *how,
                report: *report,
            }),
        }
    }
}

/// A mask that may be shorter than the vocabulary.
fn any_mask(random: &mut Random, width: usize) -> TokenMask {
    let words = if random.below(2) == 0 { width.div_ceil(32) } else { width.div_ceil(64) };
    let word = |random: &mut Random| match random.below(3) {
        0 => random.bits() as u32,
        1 => u32::MAX,
        _ => 0,
    };
    TokenMask::from_words((0..words).map(|_| word(random)).collect())
}

/// Whether `choice` is what the reference makes of row number `row`, whose logits are already scaled; else what that is.
///
/// Tokens are the same, unless the uniform number lies within 10^-11 of a boundary. Log-probabilities are sums in fp64 in
/// another order, which is off by 10^-12 at most, rounded to fp32: they differ by one rounding at most.
///
/// # Errors
/// The reference's choice.
pub fn agrees(choice: &Choice, (row, logits): (usize, &[f32]), ask: &Ask<'_>) -> Result<(), Choice> {
    let expected = answer(row, logits, ask);
    let close =
        |got: f32, wanted: f32| got == wanted || (got - wanted).abs() <= f32::EPSILON * wanted.abs().max(1.0);
    let alike = |got: &TokenLogprob, wanted: &TokenLogprob| {
        let pairs = got.top.iter().zip(&wanted.top);
        got.token == wanted.token
            && close(got.logprob, wanted.logprob)
            && got.top.len() == wanted.top.len()
            && pairs.into_iter().all(|(got, wanted)| got.0 == wanted.0 && close(got.1, wanted.1))
    };
    let same = |expected: &Choice| match (choice, expected) {
        (Choice::Token { token, logprob: None }, Choice::Token { token: wanted, logprob: None }) => {
            token == wanted
        }
        (Choice::Token { logprob: Some(got), token }, Choice::Token { logprob: Some(wanted), .. }) => {
            alike(got, wanted) && *token == got.token
        }
        (Choice::Likelihood(got), Choice::Likelihood(wanted)) => alike(got, wanted),
        (got, wanted) => got == wanted,
    };
    if same(&expected) {
        return Ok(());
    }
    let Ask::Token(recipe) = ask else { return Err(expected) };
    let moved = [-BOUNDARY, BOUNDARY].map(|by| {
        let how = Plain { at: (recipe.how.at + by).clamp(0.0, 1.0 - f64::EPSILON), ..recipe.how };
        answer(row, logits, &Ask::Token(Recipe { how, ..recipe.clone() }))
    });
    if moved.iter().any(same) { Ok(()) } else { Err(expected) }
}

pub(super) fn draws<B: Backend>(bench: &mut Bench<B>) -> Result<(), Error> {
    for width in WIDTHS {
        for (spread, scale) in [(0.3, 1.0), (2.0, 0.25), (8.0, 1.0)] {
            let rows = 12;
            let mut data: Vec<f32> =
                bench.values(rows * width).into_iter().map(|value| bf16(value * spread / scale)).collect();
            // A row with one token, a row of equals, one with a logit that is none.
            data[width..2 * width].fill(f32::NEG_INFINITY);
            data[width + 5] = 1.0;
            data[2 * width..3 * width].fill(0.5);
            data[3 * width + 6] = f32::NAN;
            let asks: Vec<AnyAsk> = (0..rows).map(|_| AnyAsk::new(&mut bench.random, width)).collect();
            let mut asks: Vec<Ask<'_>> = asks.iter().map(AnyAsk::ask).collect();
            asks[4] = Ask::Nothing;
            asks[5] = Ask::GREEDY;
            let logits = bench.rows(width, &data)?;
            data.iter_mut().for_each(|value| *value *= scale);
            let backend = &mut bench.backend;
            // What an earlier draw left must not pass for this one's.
            backend.feed(0, &vec![TokenId(u32::MAX / 2); rows])?;
            let drawing = backend.draw(&logits, (width, scale), (0, &asks))?;
            let choices = backend.collect(drawing)?;
            for (row, (choice, ask)) in choices.iter().zip(&asks).enumerate() {
                bench.report.compared += 1;
                if let Err(expected) = agrees(choice, (row, &data[row * width..][..width]), ask) {
                    let case = format!(
                        "draw from {width}, spread {spread}: {choice:?} and not {expected:?} by {ask:?}"
                    );
                    let (got, expected) = (number(choice), number(&expected));
                    bench.report.mismatches.push(Mismatch {
                        case,
                        element: row,
                        got,
                        expected,
                        allowed: 0.0,
                    });
                }
            }
        }
    }
    Ok(())
}

/// As the narrower of the compute dtypes keeps it.
fn bf16(value: f32) -> f32 {
    half::bf16::from_f32(value).to_f32()
}

/// A choice's token.
fn number(choice: &Choice) -> f64 {
    match choice {
        Choice::Token { token, .. } => f64::from(token.0),
        Choice::Likelihood(of) => f64::from(of.token.0),
        Choice::NotANumber | Choice::Left => f64::NAN,
    }
}

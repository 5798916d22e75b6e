//! How other sub-groups sample: what the leader tells them is what it would do itself, whole or not at all.

mod support;

use engine::{
    Allowed, Brief, Briefed, Briefing, Briefings, Config, Error, Frame, Masks, RowKind, RowOutput, RowWork,
    Step, TokenLogprob,
};
use support::random::Random;
use support::{Driver, VOCAB, config, request, spec, valid};
use types::{GenerationSpec, Logprobs, TokenId, TokenMask};

fn two() -> Config {
    // So few blocks that sequences are preempted, and told again.
    Config {
        data_parallel: 2,
        blocks: [14, 12],
        waiting_requests_max: 64,
        waiting_tokens_max: 4096,
        ..config()
    }
}

/// A request with some of everything.
fn mixed(random: &mut Random, tag: u32) -> engine::Request {
    let rich = tag.is_multiple_of(2);
    let generation = GenerationSpec {
        temperature: Some(if rich { 0.7 } else { 0.0 }),
        top_k: rich.then_some(40),
        seed: Some(u64::MAX - u64::from(tag)),
        presence_penalty: rich.then_some(0.5),
        logit_bias: if rich { vec![(3, -1.5), (tag, 2.0)] } else { Vec::new() },
        allowed_token_ids: if rich { (0..VOCAB).collect() } else { Vec::new() },
        bad_words: if rich { vec![vec![9, 10], vec![tag]] } else { Vec::new() },
        min_tokens: rich.then_some(2),
        ignore_eos: true,
        logprobs: rich.then_some(tag % 4),
        prompt_logprobs: tag.is_multiple_of(3).then_some(1),
        n: Some(1 + tag % 2),
        ..spec(random.range(2, 20))
    };
    engine::Request { generation: valid(generation), ..request(tag, random.range(1, 20), 1) }
}

/// Runs a busy engine and shows each step with the bytes of its briefing.
fn each_step(seed: u64, mut see: impl FnMut(&Config, &Step, &[u8])) {
    let (config, mut random) = (two(), Random::new(seed));
    let mut driver = Driver::new(config.clone());
    for tag in 1..=12 {
        let request = mixed(&mut random, tag);
        driver.submit(2 * u64::from(tag), request);
    }
    let (mut briefings, mut bytes) = (Briefings::new(&config), Vec::new());
    while let Some(step) = driver.plan() {
        bytes.clear();
        let guided = briefings.encode(&step, |seq| seq.0 % 4 == 0, &mut bytes);
        let expected = remote(&config, &step).iter().any(|work| draws(work) && work.seq.0 % 4 == 0);
        assert_eq!(guided, expected, "seed {seed}, step {}", step.plan.step());
        see(&config, &step, &bytes);
        driver.answer(&step, |seq| TokenId(50 + seq.0 as u32));
    }
    assert!(driver.effects.iter().any(|effect| matches!(effect, engine::Effect::Preempted { .. })));
}

fn draws(work: &RowWork) -> bool {
    matches!(RowKind::of(&work.purpose), RowKind::Sample(_))
}

/// The work of sub-group 1.
fn remote(config: &Config, step: &Step) -> Vec<RowWork> {
    let slots = step.plan.sequences().flat_map(|one| std::iter::repeat_n(one.slot, one.logit_rows as usize));
    let rows = slots.zip(&step.work).filter(|(slot, _)| config.sub_group(*slot) == 1);
    rows.map(|(_, work)| work.clone()).collect()
}

/// Adds what was drawn to the follower's histories, as sampling does.
fn draw(brief: &Brief) {
    for work in &brief.work {
        if let engine::RowPurpose::Sample { history: Some(history), .. } = &work.purpose {
            history.draw(|_| TokenId(50 + work.seq.0 as u32));
        }
    }
}

#[test]
fn a_sub_group_is_told_what_the_leader_would_do() {
    let mut briefed = Briefed::new(&two(), 1);
    each_step(20_261_124, |config, step, bytes| {
        let Ok(Frame::Briefing(briefing)) = Frame::decode(bytes) else { panic!("a briefing") };
        let brief = briefed.take(&step.plan, briefing).unwrap();
        let kinds: Vec<RowKind> = step.work.iter().map(|work| RowKind::of(&work.purpose)).collect();
        assert_eq!(brief.kinds, kinds);
        assert_eq!(brief.work, remote(config, step), "step {}", step.plan.step());
        draw(&brief);
    });
}

#[test]
fn every_truncation_and_every_flipped_bit_is_noticed() {
    let mut tried = 0;
    each_step(7, |_, step, bytes| {
        if step.plan.step() != 2 {
            return;
        }
        for len in 0..bytes.len() {
            assert!(Briefing::decode(&bytes[..len]).is_err(), "{len} bytes");
        }
        let body = &bytes[..bytes.len() - 4];
        for len in 0..body.len() {
            let mut sealed = body[..len].to_vec();
            sealed.extend(crc32fast::hash(&sealed).to_le_bytes());
            assert!(Briefing::decode(&sealed).is_err(), "{len} bytes, sealed");
        }
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.to_vec();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Briefing::decode(&damaged).is_err(), "bit {bit}");
        }
        tried += 1;
    });
    assert_eq!(tried, 1);
}

#[test]
fn a_briefing_of_another_step_and_a_sequence_nobody_told_of_are_refused() {
    let (mut known, mut refused) = (Briefed::new(&two(), 1), 0);
    let mut earlier: Option<Vec<u8>> = None;
    each_step(11, |config, step, bytes| {
        if let Some(earlier) = &earlier {
            let other = Briefed::new(&two(), 1).take(&step.plan, Briefing::decode(earlier).unwrap());
            assert!(matches!(other, Err(Error::BriefingRows { .. })), "{other:?}");
        }
        // Who comes late was not told of those that had begun.
        let late = Briefed::new(&two(), 1).take(&step.plan, Briefing::decode(bytes).unwrap());
        if let Err(error) = &late {
            assert!(matches!(error, Error::BriefingMissing { .. }), "{error}");
            refused += 1;
        }
        let brief = known.take(&step.plan, Briefing::decode(bytes).unwrap()).unwrap();
        assert_eq!(brief.work.len(), remote(config, step).len());
        draw(&brief);
        earlier = Some(bytes.to_vec());
    });
    assert!(refused > 0);
}

#[test]
fn masks_survive_their_encoding_and_belong_to_rows() {
    let mask = TokenMask::of(&[TokenId(3), TokenId(70)]);
    let rows = vec![(1, Allowed::Of(mask.clone())), (4, Allowed::Nothing), (9, Allowed::Any)];
    let masks = Masks { step: 12, rows };
    let mut bytes = Vec::new();
    masks.encode(&mut bytes);
    assert_eq!(Frame::decode(&bytes), Ok(Frame::Masks(masks.clone())));
    assert_eq!(
        (masks.of(1), masks.of(4), masks.of(2)),
        (&Allowed::Of(mask), &Allowed::Nothing, &Allowed::Any)
    );
    for len in 0..bytes.len() {
        assert!(Masks::decode(&bytes[..len]).is_err(), "{len} bytes");
    }
}

#[test]
fn results_survive_as_numbers() {
    let top = |top| Logprobs::new(top).unwrap();
    let told = TokenLogprob {
        token: TokenId(261_999),
        logprob: f32::NEG_INFINITY,
        top: vec![(TokenId(0), -0.25), (TokenId(7), -1e-9)],
    };
    let sampled = |logprob: Option<TokenLogprob>| RowOutput::Sampled { token: TokenId(261_999), logprob };
    let few = TokenLogprob { top: Vec::new(), ..told.clone() };
    for (kind, output) in [
        (RowKind::Sample(None), sampled(None)),
        (RowKind::Sample(None), RowOutput::Sampled { token: TokenId(0), logprob: None }),
        (RowKind::Sample(Some(top(0))), sampled(Some(few.clone()))),
        (RowKind::Sample(Some(top(2))), sampled(Some(told.clone()))),
        (RowKind::Sample(Some(top(5))), sampled(Some(told.clone()))),
        (RowKind::Sample(Some(top(2))), RowOutput::NoToken),
        (RowKind::Sample(None), RowOutput::NotANumber),
        (RowKind::PromptLogprob(top(2)), RowOutput::PromptLogprob(told)),
        (RowKind::PromptLogprob(top(0)), RowOutput::NotANumber),
    ] {
        let mut numbers = vec![9.0];
        kind.put(&output, &mut numbers);
        assert_eq!(numbers.len(), 1 + kind.width());
        assert_eq!(kind.read(&numbers[1..]), output);
    }
}

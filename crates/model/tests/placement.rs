//! Placements of experts: what a file may say, what a load proposes, and that the model computes the same under any.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod golden;

use std::sync::Arc;

use golden::{CASES, Golden, Run, distance, load, log_probabilities};
use model::{ExpertLoad, Mlp, ModelConfig, Placement, Preset, ShardPlan, Sharing};
use ops::conformance::Random;
use types::{Dispatch, ExpertSharding, TpRank, TpSize};

const LOGPROB_TOLERANCE: f64 = 2e-4;

fn size(ranks: u32) -> TpSize {
    TpSize::new(ranks).unwrap()
}

fn check(golden: &Golden, run: &Run) {
    let outputs = golden.run(run);
    for (i, (prompt, output)) in golden.prompts.iter().zip(&outputs).enumerate() {
        let place = format!("{} prompt {i} on {} ranks, {}", golden.name, run.ranks, run.dispatch);
        let vocab = golden.config.vocab_size;
        let [ours, theirs] = [&output.logits, &prompt.logits].map(|logits| log_probabilities(logits, vocab));
        let off = distance(&ours, &theirs);
        assert!(off <= LOGPROB_TOLERANCE, "{place}: a log-probability is off by {off:e}");
        assert_eq!(output.greedy, prompt.greedy, "{place}: greedy tokens");
    }
}

#[test]
fn shuffled_and_replicated_experts_agree_with_the_reference() {
    for name in CASES {
        let golden = load(name);
        for (ranks, data) in [(1, 1), (2, 1), (4, 1), (4, 2), (4, 4)] {
            for replicas in [0, 1] {
                let experts = golden.config.moe.unwrap().experts;
                if experts / ranks as usize + replicas > experts {
                    continue;
                }
                let load = ExpertLoad::zipf(&golden.config, 11);
                let placement = Placement::balanced(&golden.config, &load, size(ranks), replicas).unwrap();
                for dispatch in [Dispatch::Replicated, Dispatch::AllToAll] {
                    if data > 1 && dispatch == Dispatch::Replicated {
                        continue;
                    }
                    let placement = Some(Arc::new(placement.clone()));
                    let experts = ExpertSharding::Expert;
                    check(&golden, &Run { data, placement, experts, dispatch, ..Run::whole(ranks) });
                }
            }
        }
    }
}

/// Replicated rows, whole experts on each rank: which copy works for a row follows from the row, not from the batch.
#[test]
fn with_copies_too_a_prompt_in_chunks_gives_the_same_bits_as_in_one_go() {
    let golden = load("north");
    let load = ExpertLoad::zipf(&golden.config, 3);
    let placement = Placement::balanced(&golden.config, &load, size(2), 2).unwrap();
    let run = |chunks: Vec<usize>| {
        let placement = Some(Arc::new(placement.clone()));
        golden.run(&Run { chunks, placement, experts: ExpertSharding::Expert, ..Run::whole(2) })
    };
    for (whole, cut) in run(vec![usize::MAX]).iter().zip(run(vec![3, 1, 7])) {
        assert!(whole.logits == cut.logits, "a cut changes the logits");
    }
}

#[test]
fn a_placement_survives_its_file() {
    let config = Preset::NorthMiniCode.config().unwrap();
    let placement = Placement::balanced(&config, &ExpertLoad::zipf(&config, 5), size(8), 2).unwrap();
    let text = placement.to_json();
    let read = Placement::from_json(text.as_bytes(), "proposal").unwrap();
    assert_eq!(read, placement);
    let load = ExpertLoad::zipf(&config, 5);
    assert_eq!(ExpertLoad::from_json(load.to_json().as_bytes(), "zipf:5").unwrap(), load);
}

/// Largest load of a rank over the mean, in the layer where it is largest.
fn imbalance(placement: &Placement, config: &ModelConfig, load: &ExpertLoad) -> f64 {
    let layers = (0..config.layers.len()).filter(|at| placement.slots(*at).is_some());
    let of_layer = |at: usize| {
        let loads = placement.rank_loads(at, load.of(at));
        loads.iter().copied().fold(0.0, f64::max) * loads.len() as f64 / loads.iter().sum::<f64>()
    };
    layers.map(of_layer).fold(0.0, f64::max)
}

#[test]
fn a_skewed_load_is_spread_and_copies_spread_it_further() {
    let config = Preset::NorthMiniCode.config().unwrap();
    for seed in 0..5 {
        let load = ExpertLoad::zipf(&config, seed);
        for ranks in [2, 4, 8] {
            let before = Placement::in_order(&config, size(ranks)).unwrap();
            let moved = Placement::balanced(&config, &load, size(ranks), 0).unwrap();
            let copied = Placement::balanced(&config, &load, size(ranks), 2).unwrap();
            let [before, moved, copied] =
                [before, moved, copied].map(|placement| imbalance(&placement, &config, &load));
            println!("seed {seed}, {ranks} ranks: {before:.3}, moved {moved:.3}, copied {copied:.3}");
            assert!(moved < before && copied <= moved + 1e-9, "seed {seed}: {before} {moved} {copied}");
            assert!(copied < 1.02, "seed {seed}, {ranks} ranks: {copied}");
        }
    }
}

#[test]
fn proposals_are_legal_for_any_load() {
    let seed = 20_261_125;
    let mut random = Random::new(seed);
    let mut config = load("north").config;
    for draw in 0..300 {
        let ranks = [1, 2, 4, 8][random.below(4)];
        let experts = ranks as usize * (1 + random.below(4));
        config.moe.as_mut().unwrap().experts = experts;
        let replicas = random.below(experts - experts / ranks as usize + 1);
        let count = |random: &mut Random| [0, 1, 1, 5, 1000][random.below(5)] as u64;
        let layer = |mlp: Mlp| match mlp {
            Mlp::Dense => Vec::new(),
            Mlp::Sparse => (0..experts).map(|at| count(&mut random) + u64::from(at == 0)).collect(),
        };
        let layers: Vec<Mlp> = config.layers.iter().map(|layer| layer.mlp).collect();
        let load = ExpertLoad::new("drawn", layers.into_iter().map(layer).collect());
        // Building it checks it: every expert somewhere, none twice on a rank, equally many everywhere.
        let placement = Placement::balanced(&config, &load, size(ranks), replicas);
        assert!(placement.is_ok(), "seed {seed}, draw {draw}: {placement:?}");
    }
}

#[test]
fn what_is_wrong_with_a_placement_is_named_with_the_numbers() {
    let told = |layers: &str| {
        let text = format!(
            "{{\"format\": \"cohort-expert-placement-1\", \"experts\": 4, \"ranks\": 2, \"layers\": {layers}}}"
        );
        Placement::from_json(text.as_bytes(), "place.json").unwrap_err().to_string()
    };
    for (layers, expected) in [
        ("[[[0, 1], [2, 4]]]", "layer 0: slot 3 holds expert 4 of 4"),
        ("[null, [[0, 1], [2, 2]]]", "layer 1: rank 1 holds expert 2 twice"),
        ("[[[0, 1], [2, 1]]]", "layer 0: expert 3 of 4 is in no slot"),
        ("[[[0, 1, 2], [2, 3]]]", "layer 0: rank 1 holds 2 experts, others 3"),
        ("[[[0, 1, 2, 3]]]", "layer 0 lists 1 ranks, not 2"),
        ("[[0, 1]]", "`layers` must list"),
        ("7", "`layers` must list"),
    ] {
        let told = told(layers);
        assert!(told.contains("place.json") && told.contains(expected), "{layers}: {told}");
    }
    for text in ["[]", "{", "{\"format\": \"other\"}"] {
        assert!(Placement::from_json(text.as_bytes(), "place.json").is_err(), "{text}");
    }
}

#[test]
fn a_placement_of_another_model_or_group_is_refused() {
    let golden = load("north");
    let placement = Arc::new(Placement::in_order(&golden.config, size(2)).unwrap());
    let plan = |config: &ModelConfig, ranks: u32, experts| {
        let sharing = Sharing { tensor: size(ranks), experts, placement: Some(Arc::clone(&placement)) };
        ShardPlan::shared(config, TpRank::new(0, size(ranks)).unwrap(), &sharing)
    };
    plan(&golden.config, 2, ExpertSharding::Expert).unwrap();
    let told = plan(&golden.config, 4, ExpertSharding::Expert).unwrap_err().to_string();
    assert!(told.contains("it is for 2 ranks, not 4"), "{told}");
    let told = plan(&golden.config, 2, ExpertSharding::Tensor).unwrap_err().to_string();
    assert!(told.contains("--experts expert"), "{told}");
    let mut other = golden.config.clone();
    other.moe.as_mut().unwrap().experts *= 2;
    other.layers.iter_mut().for_each(|layer| layer.mlp = Mlp::Sparse);
    other.layers.push(other.layers[0]);
    let told = plan(&other, 2, ExpertSharding::Expert).unwrap_err().to_string();
    for part in ["experts, not", "layers, not"] {
        assert!(told.contains(part), "{part}: {told}");
    }
}

#[test]
fn counts_of_another_model_or_of_nothing_are_refused() {
    let config = load("north").config;
    let propose = |chosen| Placement::balanced(&config, &ExpertLoad::new("load.json", chosen), size(2), 0);
    let told = propose(vec![vec![1, 2]]).unwrap_err().to_string();
    assert!(told.contains("load.json: it counts 1 layers"), "{told}");
    let mut counts: Vec<Vec<u64>> = (0..config.layers.len())
        .map(|at| ExpertLoad::zipf(&config, 1).of(at).iter().map(|_| 0).collect())
        .collect();
    let told = propose(counts.clone()).unwrap_err().to_string();
    assert!(told.contains("no expert was chosen"), "{told}");
    counts.iter_mut().for_each(|layer| layer.push(1));
    let told = propose(counts).unwrap_err().to_string();
    assert!(told.contains("experts, and the model has"), "{told}");
}

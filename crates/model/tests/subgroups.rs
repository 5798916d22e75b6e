//! Data-parallel attention: sub-groups with rows of their own share the routed experts of all ranks, and compute what
//! one rank computes.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod golden;

use std::sync::Arc;

use golden::{CASES, Golden, Run, distance, load, log_probabilities};
use model::{Error, KvBudget, Mlp, Model, Parts, Placement, ShardPlan, Sharing};
use ops::Batch;
use ops::conformance::Random;
use ops_cpu::{CpuBackend, HostCollective};
use types::{BlockSize, DType, Dispatch, ExpertSharding, TpRank, TpSize};

const LOGPROB_TOLERANCE: f64 = 2e-4;

fn among(ranks: u32, data: u32) -> Run {
    Run { data, experts: ExpertSharding::Expert, dispatch: Dispatch::AllToAll, ..Run::whole(ranks) }
}

/// Every plan with several sub-groups that a model with so many heads divides into.
fn plans() -> Vec<(u32, u32)> {
    vec![(2, 2), (4, 2), (4, 4), (8, 2), (8, 4), (8, 8)]
}

fn check(golden: &Golden, run: &Run) {
    let outputs = golden.run(run);
    for (i, (prompt, output)) in golden.prompts.iter().zip(&outputs).enumerate() {
        let place = format!(
            "{} prompt {i} on {} ranks in {} sub-groups, cut {:?}",
            golden.name, run.ranks, run.data, run.chunks
        );
        let vocab = golden.config.vocab_size;
        let [ours, theirs] = [&output.logits, &prompt.logits].map(|logits| log_probabilities(logits, vocab));
        let off = distance(&ours, &theirs);
        assert!(off <= LOGPROB_TOLERANCE, "{place}: a log-probability is off by {off:e}");
        assert_eq!(output.greedy, prompt.greedy, "{place}: greedy tokens");
    }
}

/// Eight sub-groups of one rank have four prompts: half of them only work for the others.
#[test]
fn subgroups_agree_with_the_reference_also_where_some_have_nothing_to_do() {
    for (ranks, data) in plans() {
        CASES.iter().for_each(|name| check(&load(name), &among(ranks, data)));
    }
}

#[test]
fn subgroups_whose_steps_differ_in_size_agree_with_the_reference() {
    for (ranks, data) in [(4, 2), (4, 4)] {
        let run = Run { chunks: vec![3, 1, 16, 7], ..among(ranks, data) };
        CASES.iter().for_each(|name| check(&load(name), &run));
    }
}

#[test]
fn plans_placements_batches_and_lengths_drawn_at_random_agree_with_one_rank() {
    let seed = 20_261_124;
    let mut random = Random::new(seed);
    for draw in 0..16 {
        let golden = load(CASES[random.below(CASES.len())]);
        let mut config = golden.config.clone();
        let experts = config.moe.unwrap().experts;
        config.moe.as_mut().unwrap().routing.top_k = 1 + random.below(experts);
        let (ranks, data) = [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (4, 4), (8, 2), (8, 4), (8, 8)]
            [random.below(10)];
        let mut run = Run { continued: 3, ..among(ranks, data) };
        run.chunks = (0..3).map(|_| 1 + random.below(9)).collect();
        if data == 1 && random.below(2) == 0 {
            run.dispatch = Dispatch::Replicated;
        }
        if random.below(2) == 0 {
            run.placement = Some(Arc::new(drawn(&golden, ranks, &mut random)));
        }
        let prompts: Vec<Vec<u32>> = (0..1 + random.below(6))
            .map(|_| (0..1 + random.below(30)).map(|_| random.below(config.vocab_size) as u32).collect())
            .collect();
        let placed = run.placement.is_some();
        println!("seed {seed}, draw {draw}: {} on {ranks} ranks in {data}, placed: {placed}", golden.name);
        let alone = Run { continued: 3, chunks: run.chunks.clone(), ..Run::whole(1) };
        let [expected, got] =
            [&alone, &run].map(|run| golden.run_with(run, &config, &prompts, |backend| backend));
        for (expected, got) in expected.iter().zip(&got) {
            let vocab = config.vocab_size;
            let [a, b] = [expected, got].map(|output| log_probabilities(&output.logits, vocab));
            let off = distance(&a, &b);
            assert!(off <= LOGPROB_TOLERANCE, "draw {draw}: a log-probability is off by {off:e}");
            assert_eq!(expected.greedy, got.greedy, "draw {draw}");
        }
    }
}

/// A random placement with up to one copy more on each rank.
fn drawn(golden: &Golden, ranks: u32, random: &mut Random) -> Placement {
    let experts = golden.config.moe.unwrap().experts;
    let each = experts / ranks as usize;
    let more = random.below(2);
    let mut layer = |mlp: Mlp| {
        (mlp == Mlp::Sparse).then(|| {
            let order = random.shuffled(experts);
            let mut held: Vec<Vec<u32>> =
                order.chunks(each).map(|held| held.iter().map(|e| *e as u32).collect()).collect();
            for held in held.iter_mut().filter(|_| more == 1 && each < experts) {
                let absent: Vec<u32> = (0..experts as u32).filter(|e| !held.contains(e)).collect();
                held.push(absent[random.below(absent.len())]);
            }
            held
        })
    };
    let layers: Vec<_> = golden.config.layers.iter().map(|of| layer(of.mlp)).collect();
    Placement::new("drawn", experts, TpSize::new(ranks).unwrap(), &layers).unwrap()
}

#[test]
fn parts_of_experts_and_uneven_subgroups_are_refused_with_the_numbers() {
    let config = load("north").config;
    let whole = TpRank::new(0, TpSize::new(4).unwrap()).unwrap();
    let refused = |tensor: u32, experts| {
        let tensor = TpSize::new(tensor).unwrap();
        let sharing = Sharing { tensor, experts, placement: None };
        ShardPlan::shared(&config, whole, &sharing).unwrap_err().to_string()
    };
    let parts = refused(2, ExpertSharding::Tensor);
    assert!(parts.contains("2 data-parallel sub-groups of 2 need whole experts"), "{parts}");
    let uneven = refused(3, ExpertSharding::Expert);
    assert!(uneven.contains("4 ranks do not make sub-groups of 3"), "{uneven}");
}

fn model(dispatch: Dispatch) -> Result<Model<CpuBackend, HostCollective<collectives::InProcess>>, Error> {
    let golden = load("north");
    let whole =
        collectives::InProcess::group(TpSize::new(2).unwrap(), std::time::Duration::from_secs(1)).remove(0);
    let sharing = Sharing { tensor: TpSize::ONE, experts: ExpertSharding::Expert, placement: None };
    let rank = TpRank::new(0, TpSize::new(2).unwrap()).unwrap();
    let plan = ShardPlan::shared(&golden.config, rank, &sharing).unwrap();
    let mut backend = CpuBackend::new(DType::F32, 1).unwrap();
    let checkpoint = model::Checkpoint::open(model::Files::Directory(golden.directory.clone())).unwrap();
    let (weights, _) = model::load(&checkpoint, &golden.config, &plan, &mut backend, &()).unwrap();
    let subgroup = Some(HostCollective(whole.split(TpSize::ONE).unwrap()));
    let parts = Parts {
        config: golden.config,
        plan,
        backend,
        comm: HostCollective(whole),
        subgroup,
        weights,
        dispatch,
    };
    Model::new(parts, KvBudget { block_size: BlockSize::new(4).unwrap(), blocks: [4; 2] })
}

#[test]
fn subgroups_with_replicated_rows_are_refused() {
    let refused = model(Dispatch::Replicated).err().unwrap().to_string();
    assert!(refused.contains("one of 2 data-parallel sub-groups"), "{refused}");
}

#[test]
fn row_counts_that_contradict_the_batch_or_the_plan_are_refused_before_anything_is_sent() {
    let mut model = model(Dispatch::AllToAll).unwrap();
    for rows in [&[1, 0][..], &[0], &[0, 0, 0]] {
        let refused = model.step_among(&Batch::default(), rows, |_, _| Ok(())).unwrap_err();
        assert!(matches!(refused, Error::Rows { subgroups: 2, got: 0, .. }), "{refused}");
    }
}

//! What ranks count of what they say to each other is what is worked out beforehand, number by number.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod golden;

use std::thread;
use std::time::Duration;

use collectives::{Collective, Counters, Member, Op, Rendezvous, RendezvousOptions, Tcp, join};
use golden::{CASES, Golden, load};
use model::{
    Activity, Checkpoint, Files, KvBudget, Model, Parts, ShardPlan, Sharing, StepRows, step_traffic,
};
use ops::{Batch, BatchSequence, BlockTable};
use ops_cpu::{CpuBackend, HostCollective};
use types::{BlockId, BlockSize, DType, Dispatch, ExpertSharding, Position, TokenId, TpRank, TpSize};

/// Rows of the steps of each sub-group, and how many of them have logits: more than are made at once, some, none.
const STEPS: [[(usize, usize); 2]; 4] =
    [[(70, 70), (5, 1)], [(1, 1), (40, 40)], [(3, 0), (0, 0)], [(1, 1), (1, 1)]];

/// A plan of a group.
#[derive(Clone, Copy)]
struct Plan {
    ranks: u32,
    data: u32,
    experts: ExpertSharding,
    dispatch: Dispatch,
}

/// One rank per thread, over TCP.
fn tcp<R: Send>(ranks: u32, work: impl Fn(TpRank, Tcp) -> R + Sync) -> Vec<R> {
    let size = TpSize::new(ranks).unwrap();
    let member = |rank| Member { rank, plan: String::new(), config_hash: [0; 32] };
    let options = RendezvousOptions { within: Duration::from_secs(60), ..RendezvousOptions::default() };
    let door = Rendezvous::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let (address, work, options) = (&door.local_addr().to_string(), &work, &options);
    let mut door = Some(door);
    thread::scope(|scope| {
        let threads: Vec<_> = size
            .ranks()
            .map(|rank| {
                let door = door.take();
                scope.spawn(move || {
                    let joined = match door {
                        Some(door) => door.lead(&member(rank), options),
                        None => join(address, &member(rank), options),
                    };
                    work(rank, joined.unwrap().collective)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn batch(rows: usize, logit_rows: usize) -> Batch {
    let table = || BlockTable { first: 0, blocks: (0..rows.div_ceil(4) as u32).map(BlockId).collect() };
    let sequence = BatchSequence { rows: 0..rows, start: Position(0), tables: [table(), table()] };
    Batch {
        tokens: (0..rows as u32).map(|at| TokenId(3 + 7 * at % 50)).collect(),
        sequences: if rows == 0 { Vec::new() } else { vec![sequence] },
        logit_rows: (0..logit_rows as u32).collect(),
        ..Batch::default()
    }
}

/// What each rank counted over the steps, and what was worked out for it.
fn counted(golden: &Golden, of: Plan) -> Vec<(Activity, Counters)> {
    tcp(of.ranks, |rank, comm| {
        let tensor = TpSize::new(of.ranks / of.data).unwrap();
        let sharing = Sharing { tensor, experts: of.experts, placement: None };
        let plan = ShardPlan::shared(&golden.config, rank, &sharing).unwrap();
        let mut backend = CpuBackend::new(DType::F32, 1).unwrap();
        let checkpoint = Checkpoint::open(Files::Directory(golden.directory.clone())).unwrap();
        let (weights, _) = model::load(&checkpoint, &golden.config, &plan, &mut backend, &()).unwrap();
        let subgroup = (of.data > 1).then(|| HostCollective(comm.split(tensor).unwrap()));
        let parts = Parts {
            config: golden.config.clone(),
            plan: plan.clone(),
            backend,
            comm: HostCollective(comm),
            subgroup,
            weights,
            dispatch: of.dispatch,
        };
        let budget = KvBudget { block_size: BlockSize::new(4).unwrap(), blocks: [32; 2] };
        let mut model = Model::new(parts, budget).unwrap();
        let mut expected = Counters::default();
        for step in STEPS {
            let (rows, logit_rows) = step[plan.subgroup()];
            let all: Vec<usize> = step.iter().take(plan.subgroups()).map(|of| of.0).collect();
            let before = model.activity();
            model.step_among(&batch(rows, logit_rows), &all, |_, _| Ok(())).unwrap();
            let after = model.activity();
            let step = StepRows {
                rows,
                logit_rows,
                sent: (after.rows_sent - before.rows_sent) as usize,
                received: (after.rows_received - before.rows_received) as usize,
            };
            expected = expected.plus(&step_traffic(&golden.config, &plan, of.dispatch, &step));
        }
        // Asking for the counters of all ranks is no part of a step.
        let gathered = model.gather_activity().unwrap();
        let own = model.activity();
        assert_eq!(gathered[rank.as_usize()], own);
        (own, expected)
    })
}

#[test]
fn what_is_counted_over_a_run_is_what_was_worked_out() {
    for name in CASES {
        let golden = load(name);
        for (ranks, data) in [(2, 1), (4, 1), (2, 2), (4, 2)] {
            for (experts, dispatch) in [
                (ExpertSharding::Tensor, Dispatch::Replicated),
                (ExpertSharding::Expert, Dispatch::Replicated),
                (ExpertSharding::Expert, Dispatch::AllToAll),
            ] {
                if data > 1 && dispatch == Dispatch::Replicated {
                    continue;
                }
                let results = counted(&golden, Plan { ranks, data, experts, dispatch });
                for (rank, (own, expected)) in results.iter().enumerate() {
                    assert_eq!(own.collectives, *expected, "{name}, rank {rank} of {ranks}, {dispatch}");
                }
                let moved = |of: fn(&Activity) -> u64| results.iter().map(|(own, _)| of(own)).sum::<u64>();
                assert_eq!(moved(|own| own.rows_sent), moved(|own| own.rows_received));
                if dispatch == Dispatch::AllToAll {
                    assert!(moved(|own| own.rows_sent) > 0, "{name}: no row was sent");
                }
            }
        }
    }
}

/// Every choice of a row is counted once: by all ranks in replicated dispatch, by one in all-to-all dispatch.
#[test]
fn every_choice_of_an_expert_is_counted() {
    let golden = load("north");
    let top_k = golden.config.moe.unwrap().routing.top_k as u64;
    for (data, dispatch) in [(1, Dispatch::Replicated), (1, Dispatch::AllToAll), (2, Dispatch::AllToAll)] {
        let plan = Plan { ranks: 4, data, experts: ExpertSharding::Expert, dispatch };
        let results = counted(&golden, plan);
        let rows = |subgroup: usize| STEPS.iter().map(|step| step[subgroup].0 as u64).sum::<u64>();
        let all: u64 = (0..data as usize).map(rows).sum();
        let counting = if dispatch == Dispatch::Replicated { 1 } else { 4 };
        for (layer, of) in golden.config.layers.iter().enumerate() {
            let chosen: u64 = results.iter().take(counting).flat_map(|(own, _)| &own.chosen[layer]).sum();
            let expected = if of.mlp == model::Mlp::Sparse { all * top_k } else { 0 };
            assert_eq!(chosen, expected, "layer {layer}, {dispatch}, {data} sub-groups");
        }
    }
}

/// Whatever the rows: there and back, and their numbers in the head of the message there.
#[test]
fn a_sparse_layer_takes_at_most_two_messages_to_every_other_rank() {
    let golden = load("command-a-plus");
    for ranks in [2, 4, 8] {
        for data in [1, 2] {
            let plan = Plan { ranks, data, experts: ExpertSharding::Expert, dispatch: Dispatch::AllToAll };
            let exchanges = (STEPS.len() * golden.config.sparse_layers()) as u64;
            for (own, _) in counted(&golden, plan) {
                let sent = own.collectives.of(Op::AllToAll);
                assert_eq!(sent.messages_sent, exchanges * 2 * u64::from(ranks - 1), "{ranks} ranks");
                assert_eq!(sent.ops, 2 * exchanges);
            }
        }
    }
}

#[test]
fn a_group_of_one_sends_nothing() {
    let golden = load("north");
    let plan = Plan { ranks: 1, data: 1, experts: ExpertSharding::Tensor, dispatch: Dispatch::Replicated };
    let (own, expected) = counted(&golden, plan).remove(0);
    assert_eq!(own.collectives, expected);
    assert_eq!((own.collectives.bytes_sent(), own.collectives.messages_sent()), (0, 0));
    assert_eq!(Collective::<[f32]>::counters(&collectives::Solo::new()), Counters::default());
}

//! What the ranks of a group have done is told while they work, counts every rank, and changes no answer.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use proto::worker::{GetActivityRequest, GroupActivity};
use support::{Client, Rank, config, request};
use tonic::Code;
use types::{Dispatch, ExpertSharding};
use worker::{Config, Report};

const RANKS: u32 = 2;

fn group(experts: ExpertSharding, dispatch: Dispatch) -> (Vec<Rank>, Client) {
    let plan = |rank| Config { experts, dispatch, ..config(rank, RANKS) };
    let leader = Rank::start(plan(0));
    let listening = leader.listening();
    let rendezvous = leader.wait(|r| if let Report::Rendezvous(address) = r { Some(*address) } else { None });
    let follower = Rank::start(Config { rendezvous, ..plan(1) });
    let client = Client::connect(listening);
    leader.ready();
    (vec![leader, follower], client)
}

fn stop(ranks: Vec<Rank>) {
    ranks[0].shutdown.cancel();
    ranks.into_iter().for_each(|rank| rank.end().unwrap());
}

fn activity(client: &Client) -> GroupActivity {
    let mut worker = client.client.clone();
    client.runtime.block_on(worker.get_activity(GetActivityRequest {})).unwrap().into_inner()
}

fn tokens(client: &Client) -> Vec<u32> {
    let chunks = client.generate(request(vec![5, 600, 7], 120)).unwrap();
    chunks.iter().flat_map(|chunk| chunk.token_ids.clone()).collect()
}

#[test]
fn every_rank_and_every_choice_is_counted() {
    for (experts, dispatch) in [
        (ExpertSharding::Tensor, Dispatch::Replicated),
        (ExpertSharding::Expert, Dispatch::Replicated),
        (ExpertSharding::Expert, Dispatch::AllToAll),
    ] {
        let (ranks, client) = group(experts, dispatch);
        let before = activity(&client);
        tokens(&client);
        let after = activity(&client);
        assert_eq!(after.plan, format!("tensor=2 data=1 experts={experts} dispatch={dispatch}"));
        // The prompt's three, and every answer's token but the last goes through the model once.
        let computed = after.tokens - before.tokens;
        assert_eq!(computed, 3 + 119, "{dispatch}");
        assert_eq!(after.ranks.len(), RANKS as usize);
        for (rank, earlier) in after.ranks.iter().zip(&before.ranks) {
            assert_eq!(rank.rows - earlier.rows, computed);
            let all_reduces = |of: &proto::worker::RankActivity| of.collectives[0].calls;
            // Six layers and the embedding.
            assert_eq!(all_reduces(rank) - all_reduces(earlier), 7 * (rank.steps - earlier.steps));
        }
        let chosen = |of: &GroupActivity| -> Vec<u64> {
            of.layers.iter().map(|layer| layer.chosen.iter().sum()).collect()
        };
        for (layer, (now, then)) in chosen(&after).iter().zip(chosen(&before)).enumerate() {
            let expected = if layer == 0 { 0 } else { 4 * computed };
            assert_eq!(now - then, expected, "layer {layer}, {dispatch}");
        }
        stop(ranks);
    }
}

#[test]
fn asking_again_and_again_while_a_request_runs_changes_no_token() {
    let (ranks, client) = group(ExpertSharding::Expert, Dispatch::AllToAll);
    let alone = tokens(&client);
    let asked = client.runtime.block_on(async {
        let mut generating = client.client.clone();
        let mut asking = client.client.clone();
        let mut stream = generating.generate(request(vec![5, 600, 7], 120)).await.unwrap().into_inner();
        let (mut told, mut got) = (Vec::new(), Vec::new());
        while let Some(chunk) = stream.message().await.unwrap() {
            got.extend(chunk.token_ids);
            told.push(asking.get_activity(GetActivityRequest {}).await.unwrap().into_inner().tokens);
        }
        assert_eq!(got, alone);
        told
    });
    assert!(asked.windows(2).all(|pair| pair[0] <= pair[1]), "{asked:?}");
    assert!(asked.len() > 2, "the answer came in {} pieces", asked.len());
    stop(ranks);
}

#[test]
fn a_group_that_does_not_serve_yet_says_so() {
    let leader = Rank::start(config(0, RANKS));
    let client = Client::connect(leader.listening());
    let mut worker = client.client.clone();
    let status = client.runtime.block_on(worker.get_activity(GetActivityRequest {})).unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    let rendezvous = leader.wait(|r| if let Report::Rendezvous(address) = r { Some(*address) } else { None });
    let follower = Rank::start(Config { rendezvous, ..config(1, RANKS) });
    leader.ready();
    stop(vec![leader, follower]);
}

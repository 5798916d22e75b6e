//! Callers without a key, many of them, beside those who have one.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use futures::future::join_all;
use proto::v1::cohort_client::CohortClient;
use security::{Badge, Limits, generate_key, key_line};
use tonic::Code;
use tonic::transport::Channel;

use crate::support::{Cluster, tokens};

/// Strangers that are refused at least, while others are served.
const REFUSED: u32 = 1000;
/// Connections they come on.
const STRANGERS: usize = 8;
/// Callers that are served meanwhile, and requests of each at least.
const SERVED: u32 = 4;
const REQUESTS: u32 = 10;

#[test]
fn a_thousand_strangers_are_refused_and_those_who_are_served_get_the_same_answers_as_before() {
    let dir = tempfile::tempdir().unwrap();
    let key = generate_key().unwrap();
    let keys = dir.path().join("keys.toml");
    fs::write(&keys, key_line("alice", &key, &Limits::default()).unwrap()).unwrap();
    let cluster = Cluster::up(&[&format!("--keys-file={}", keys.display())]);
    let channel = cluster.block_on(Channel::from_shared(cluster.server()).unwrap().connect()).unwrap();
    let known = CohortClient::with_interceptor(channel, Badge::of_caller(Some(&key)));
    let asked = |caller: u32| tokens(&[5, 600 + caller], 24);
    let alone: Vec<Vec<u32>> = (0..SERVED)
        .map(|caller| {
            let mut known = known.clone();
            cluster.block_on(known.generate_once(asked(caller))).unwrap().into_inner().token_ids
        })
        .collect();

    let (refused, enough) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicBool::new(false)));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let strangers: Vec<_> = (0..STRANGERS)
        .map(|stranger| {
            let (refused, enough, server) = (Arc::clone(&refused), Arc::clone(&enough), cluster.server());
            runtime.spawn(async move {
                let channel = Channel::from_shared(server).unwrap().connect().await.unwrap();
                // Every other one shows a key that is none.
                let shown = (stranger % 2 == 0).then_some("cohort-other");
                let mut client = CohortClient::with_interceptor(channel, Badge::of_caller(shown));
                while !enough.load(Ordering::Relaxed) {
                    let refusal = client.generate_once(tokens(&[5, 6], 3)).await.unwrap_err();
                    assert_eq!(refusal.code(), Code::Unauthenticated, "{refusal}");
                    refused.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let served = join_all((0..SERVED).map(|caller| {
        let (mut known, refused) = (known.clone(), Arc::clone(&refused));
        async move {
            let mut answers = Vec::new();
            while answers.len() < REQUESTS as usize || refused.load(Ordering::Relaxed) < REFUSED {
                answers.push(known.generate_once(asked(caller)).await.unwrap().into_inner().token_ids);
            }
            answers
        }
    }));
    let served = cluster.block_on(served);
    enough.store(true, Ordering::Relaxed);
    cluster.block_on(join_all(strangers)).into_iter().for_each(|ended| ended.unwrap());
    assert!(refused.load(Ordering::Relaxed) >= REFUSED);
    for (answers, alone) in served.iter().zip(&alone) {
        assert!(answers.len() >= REQUESTS as usize && answers.iter().all(|answer| answer == alone));
    }
}

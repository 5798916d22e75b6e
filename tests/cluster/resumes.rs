//! A rank is killed under open streams: they go on elsewhere, and their callers get what they would have got.

use futures::future::join_all;
use proto::v1::{GenerateRequest, GenerateResponse, Sampling};
use rustix::process::Signal;

use crate::support::{Cluster, signal, tokens};

const OUTPUT: u32 = 120;

/// Request number `index`: drawn by chance, with penalties, some with several answers.
fn request(index: u32) -> GenerateRequest {
    let ids: Vec<u32> = (0..20 + index * 5).map(|k| (k * 31 + index * 97) % 4000 + 20).collect();
    let mut request = tokens(&ids, OUTPUT);
    request.sampling = Some(Sampling {
        temperature: Some(0.9),
        top_p: Some(0.95),
        seed: Some(u64::from(index)),
        n: Some(1 + index % 2),
        presence_penalty: Some(0.3),
        repetition_penalty: Some(1.1),
        ..Sampling::default()
    });
    request
}

/// Tokens and text of each answer.
fn answers(messages: &[GenerateResponse]) -> Vec<(Vec<u32>, String)> {
    let mut answers = vec![(Vec::new(), String::new()); 2];
    for message in messages {
        let (tokens, text) = &mut answers[message.index as usize];
        tokens.extend(&message.token_ids);
        text.push_str(&message.text);
    }
    answers
}

/// All streams to their end; `interrupt` happens when each has begun.
fn run(cluster: &Cluster, interrupt: impl FnOnce()) -> Vec<Vec<(Vec<u32>, String)>> {
    let client = cluster.client();
    cluster.block_on(async {
        let streams = (0..6).map(|index| {
            let mut client = client.clone();
            async move {
                let mut stream = client.generate(request(index)).await.unwrap().into_inner();
                let first = stream.message().await.unwrap().unwrap();
                (stream, vec![first])
            }
        });
        let begun = join_all(streams).await;
        interrupt();
        let rest = begun.into_iter().map(|(mut stream, mut messages)| async move {
            while let Some(message) = stream.message().await.unwrap() {
                messages.push(message);
            }
            answers(&messages)
        });
        join_all(rest).await
    })
}

fn undisturbed_and_interrupted(flags: &[&str], rank: u32) {
    let mut cluster = Cluster::up(flags);
    let undisturbed = run(&cluster, || {});
    let victim = cluster.rank(rank);
    let interrupted = run(&cluster, || signal(victim, Signal::KILL));
    for (index, (expected, got)) in undisturbed.iter().zip(&interrupted).enumerate() {
        assert_eq!(expected, got, "request {index}");
        assert_eq!(got[0].0.len(), OUTPUT as usize);
    }
    cluster.wait_for_line("resumed after the loss of its group");
}

#[test]
fn streams_of_a_killed_follower_go_on_in_the_other_group() {
    undisturbed_and_interrupted(&["--tensor-parallel=2", "--groups=2"], 1);
}

#[test]
fn streams_of_a_killed_leader_go_on_in_the_other_group() {
    undisturbed_and_interrupted(&["--tensor-parallel=2", "--groups=2"], 0);
}

#[test]
fn streams_of_the_only_group_go_on_when_it_is_back() {
    undisturbed_and_interrupted(&["--tensor-parallel=2", "--resume-grace=60"], 0);
}

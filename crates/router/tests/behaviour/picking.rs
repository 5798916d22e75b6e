//! Which group gets a request, when a failing one is left alone, and how often a request is tried again.

use std::time::{Duration, Instant};

use router::affinity::{Affinity, Chain, LINK_TOKENS};
use router::breaker::{Breaker, RetryBudget};
use router::pick::{Candidate, Why, choose};

use crate::support::{Leader, Random, TestRouter, all, answer, from_ids};

fn candidate(eligible: bool, in_flight: usize, reported: u64) -> Candidate {
    Candidate { eligible, in_flight, reported, known_tokens: 0 }
}

fn knowing(known_tokens: usize, in_flight: usize) -> Candidate {
    Candidate { known_tokens, ..candidate(true, in_flight, 0) }
}

#[test]
fn the_least_loaded_eligible_group_is_picked() {
    let table: [(&[Candidate], Option<usize>); 6] = [
        (&[], None),
        (&[candidate(false, 0, 0)], None),
        (&[candidate(true, 2, 0), candidate(true, 1, 9)], Some(1)),
        (&[candidate(true, 1, 5), candidate(true, 1, 4)], Some(1)),
        (&[candidate(true, 1, 5), candidate(true, 1, 5)], Some(0)),
        (&[candidate(false, 0, 0), candidate(true, 7, 7)], Some(1)),
    ];
    for (candidates, expected) in table {
        assert_eq!(choose(candidates), expected.map(|index| (index, Why::LeastLoaded)), "{candidates:?}");
    }
}

#[test]
fn a_group_that_knows_the_prompt_is_picked_unless_it_has_much_more_to_do() {
    let table: [(&[Candidate], (usize, Why)); 5] = [
        (&[knowing(0, 0), knowing(16, 0)], (1, Why::Prefix)),
        (&[knowing(0, 0), knowing(16, 4)], (1, Why::Prefix)),
        (&[knowing(0, 0), knowing(16, 5)], (0, Why::LeastLoaded)),
        (&[knowing(0, 8), knowing(32, 14), knowing(16, 9)], (1, Why::Prefix)),
        (&[knowing(16, 0), knowing(16, 1)], (0, Why::LeastLoaded)),
    ];
    for (candidates, expected) in table {
        assert_eq!(choose(candidates), Some(expected), "{candidates:?}");
    }
    let gone = Candidate { eligible: false, ..knowing(64, 0) };
    assert_eq!(choose(&[gone, knowing(0, 3)]), Some((1, Why::LeastLoaded)));
}

#[test]
fn what_is_known_is_the_longest_common_beginning_with_anything_sent_there() {
    let mut random = Random::seeded(7);
    let now = Instant::now();
    for _ in 0..50 {
        let mut affinity = Affinity::new(now);
        let mut sent: Vec<(usize, Vec<u32>)> = Vec::new();
        for _ in 0..12 {
            // Few different tokens, so that beginnings are shared.
            let links = random.below(5);
            let prompt: Vec<u32> =
                (0..links).flat_map(|_| vec![u32::try_from(random.below(2)).unwrap(); LINK_TOKENS]).collect();
            let common = |other: &[u32]| {
                let same = prompt.iter().zip(other).take_while(|(a, b)| a == b).count();
                same / LINK_TOKENS * LINK_TOKENS
            };
            let expected: Vec<usize> = (0..3)
                .map(|group| {
                    let there = sent.iter().filter(|(at, _)| *at == group);
                    there.map(|(_, other)| common(other)).max().unwrap_or(0)
                })
                .collect();
            let chain = Chain::of(&prompt, b"");
            assert_eq!(affinity.known(&chain, 3), expected, "{prompt:?} after {sent:?}");
            assert_eq!(affinity.known(&Chain::of(&prompt, b"salt"), 3), [0; 3], "salts share nothing");
            let group = random.below(3);
            affinity.learn(&chain, group, now);
            sent.push((group, prompt));
        }
        affinity.forget(1);
        let known = sent.iter().map(|(_, prompt)| affinity.known(&Chain::of(prompt, b""), 3)[1]);
        assert_eq!(known.sum::<usize>(), 0);
    }
}

#[test]
fn what_was_not_sent_for_long_is_forgotten() {
    let now = Instant::now();
    let mut affinity = Affinity::new(now);
    let (old, other) = (Chain::of(&[1; LINK_TOKENS], b""), Chain::of(&[2; LINK_TOKENS], b""));
    affinity.learn(&old, 0, now);
    affinity.learn(&other, 0, now + Duration::from_secs(301));
    assert_eq!(affinity.known(&old, 1), [LINK_TOKENS]);
    affinity.learn(&other, 0, now + Duration::from_secs(602));
    assert_eq!(affinity.known(&old, 1), [0]);
    assert_eq!(affinity.known(&other, 1), [LINK_TOKENS]);
}

#[test]
fn a_breaker_opens_after_failures_in_a_row_and_closes_after_a_trial_that_succeeds() {
    let start = Instant::now();
    let later = |ms| start + Duration::from_millis(ms);
    let mut breaker = Breaker::default();
    for _ in 0..4 {
        assert!(!breaker.failed(start));
    }
    breaker.succeeded();
    for _ in 0..4 {
        assert!(!breaker.failed(start) && breaker.lets_through(start));
    }
    assert!(breaker.failed(start));
    assert!(!breaker.lets_through(later(999)) && breaker.lets_through(later(1000)));
    // The trial keeps others away until it is known what became of it.
    breaker.sent(later(1000));
    assert!(!breaker.lets_through(later(1500)));
    assert!(breaker.failed(later(1500)));
    assert!(!breaker.lets_through(later(3400)) && breaker.lets_through(later(3500)));
    breaker.succeeded();
    assert!(breaker.lets_through(later(3500)) && !breaker.failed(later(3500)));
}

#[test]
fn retries_are_a_share_of_the_requests() {
    let mut budget = RetryBudget::default();
    let at_once = (0..1000).filter(|_| budget.spend()).count();
    assert_eq!(at_once, 20);
    for _ in 0..10 {
        budget.earn();
    }
    assert_eq!((0..1000).filter(|_| budget.spend()).count(), 2);
}

#[tokio::test]
async fn a_prompt_goes_to_the_group_that_has_its_beginning() {
    let (mut first, mut second) = (Leader::serving().await, Leader::serving().await);
    let router = TestRouter::ready(&[&first.address, &second.address]).await;
    let prompt: Vec<u32> = (100..140).collect();
    let mut client = router.client().await;
    let asked = prompt.clone();
    // The first group is kept busy with it, so by load alone the next one would go to the second.
    let busy = tokio::spawn(async move { client.generate(from_ids(&asked)).await });
    let open = first.next().await;
    let answered = tokio::spawn(async move {
        let again = first.next().await;
        again.play(answer("hi")).await;
        first
    });
    all(&router, from_ids(&[prompt.as_slice(), &[7]].concat())).await.unwrap();
    let _first = answered.await.unwrap();
    // Another prompt goes by load.
    let played = tokio::spawn(async move {
        second.next().await.play(answer("hi")).await;
        second
    });
    all(&router, from_ids(&(200..240).collect::<Vec<u32>>())).await.unwrap();
    played.await.unwrap();
    drop(open);
    busy.abort();
}

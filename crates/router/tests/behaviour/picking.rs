//! Which group gets a request, when a failing one is left alone, and how often a request is tried again.

use std::time::{Duration, Instant};

use router::affinity::{Affinity, Chain, HALF_LIFE, LINK_TOKENS};
use router::breaker::{Breaker, RetryBudget};
use router::pick::{Candidate, Why, choose};

use crate::support::{Leader, Random, TestRouter, all, answer, from_ids};

fn candidate(eligible: bool, in_flight: usize, others: usize) -> Candidate {
    Candidate { eligible, weight: 1, in_flight, others, known_tokens: 0 }
}

fn weighing(weight: u32, in_flight: usize) -> Candidate {
    Candidate { weight, ..candidate(true, in_flight, 0) }
}

/// Where nothing is drawn: there are two groups at most.
fn none_drawn(_: usize) -> usize {
    panic!("two groups are compared as they are")
}

fn knowing(known_tokens: usize, in_flight: usize) -> Candidate {
    Candidate { known_tokens, ..candidate(true, in_flight, 0) }
}

#[test]
fn the_less_loaded_of_two_eligible_groups_is_picked() {
    let table: [(&[Candidate], Option<usize>); 6] = [
        (&[], None),
        (&[candidate(false, 0, 0)], None),
        (&[candidate(true, 2, 0), candidate(true, 1, 9)], Some(0)),
        (&[candidate(true, 2, 4), candidate(true, 5, 0)], Some(1)),
        (&[candidate(true, 1, 5), candidate(true, 1, 5)], Some(0)),
        (&[candidate(false, 0, 0), candidate(true, 7, 7)], Some(1)),
    ];
    for (candidates, expected) in table {
        let chosen = choose(candidates, none_drawn);
        assert_eq!(chosen, expected.map(|index| (index, Why::LeastLoaded)), "{candidates:?}");
    }
}

#[test]
fn of_many_groups_two_different_ones_are_drawn_and_the_less_loaded_is_picked() {
    let groups: Vec<Candidate> = (0..4).map(|load| candidate(load != 1, load, 0)).collect();
    // Of the eligible ones: 0, 2 and 3.
    for (draws, expected) in [([0, 0], 0), ([1, 1], 2), ([2, 1], 2), ([2, 0], 0), ([1, 0], 0)] {
        let mut bounds = Vec::new();
        let draw = |bound| {
            bounds.push(bound);
            draws[bounds.len() - 1]
        };
        assert_eq!(choose(&groups, draw), Some((expected, Why::LeastLoaded)), "{draws:?}");
        assert_eq!(bounds, [3, 2]);
    }
}

#[test]
fn two_choices_keep_many_groups_even() {
    for seed in 0..8 {
        let mut random = Random::seeded(seed);
        let mut groups = vec![candidate(true, 0, 0); 16];
        for _ in 0..16_000 {
            let (index, _) = choose(&groups, |count| random.below(count)).unwrap();
            groups[index].in_flight += 1;
        }
        let most = groups.iter().map(|group| group.in_flight).max().unwrap();
        // One choice at random would leave the fullest some 60 above the mean of 1000.
        assert!(most <= 1008, "{groups:?}");
    }
}

#[test]
fn routers_that_see_the_same_reports_do_not_all_pick_the_same_group() {
    let mut random = Random::seeded(3);
    let mut groups = vec![candidate(true, 0, 5); 8];
    groups[6].others = 0;
    let picked: Vec<usize> =
        (0..800).map(|_| choose(&groups, |count| random.below(count)).unwrap().0).collect();
    let idle = picked.iter().filter(|&&index| index == 6).count();
    // It is one of the two drawn for a quarter of the routers.
    assert!((150..250).contains(&idle), "{idle}");
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
        // The first two of three are drawn.
        assert_eq!(choose(candidates, |_| 0), Some(expected), "{candidates:?}");
    }
    let gone = Candidate { eligible: false, ..knowing(64, 0) };
    assert_eq!(choose(&[gone, knowing(0, 3)], none_drawn), Some((1, Why::LeastLoaded)));
}

#[test]
fn of_two_groups_the_one_with_less_to_do_for_its_weight_is_picked() {
    let table: [(&[Candidate], usize); 6] = [
        (&[weighing(1, 0), weighing(3, 0)], 1),
        (&[weighing(1, 0), weighing(3, 2)], 0),
        (&[weighing(1, 1), weighing(3, 4)], 1),
        (&[weighing(1, 1), weighing(3, 6)], 0),
        (&[weighing(100, 98), weighing(1, 0)], 0),
        (&[weighing(100, 100), weighing(1, 0)], 1),
    ];
    for (candidates, expected) in table {
        assert_eq!(choose(candidates, none_drawn), Some((expected, Why::LeastLoaded)), "{candidates:?}");
    }
}

#[test]
fn a_group_of_weight_0_gets_nothing_whatever_it_knows_and_however_little_it_has_to_do() {
    let paused = Candidate { weight: 0, ..knowing(64, 0) };
    assert_eq!(choose(&[paused], none_drawn), None);
    assert_eq!(choose(&[paused, candidate(true, 90, 9)], none_drawn), Some((1, Why::LeastLoaded)));
    let mut random = Random::seeded(11);
    let groups = [knowing(0, 5), paused, knowing(0, 7), paused, knowing(0, 9)];
    for _ in 0..1000 {
        let (index, _) = choose(&groups, |count| random.below(count)).unwrap();
        assert!(groups[index].weight > 0);
    }
}

#[test]
fn many_groups_get_shares_of_the_requests_as_their_weights_say() {
    for seed in 20..24 {
        let mut random = Random::seeded(seed);
        // One weighs as much as all others together, so it must be among the two drawn far more often than those.
        let weights = [15_u32, 1, 2, 3, 4, 5];
        let mut groups = weights.map(|weight| weighing(weight, 0));
        for _ in 0..30_000 {
            let (index, _) = choose(&groups, |count| random.below(count)).unwrap();
            groups[index].in_flight += 1;
        }
        for group in &groups {
            let share = group.in_flight as f64 / f64::from(group.weight);
            assert!((share / 1000.0 - 1.0).abs() < 0.02, "{groups:?}");
        }
    }
}

#[test]
fn what_a_group_knows_counts_as_far_as_its_weight_carries_what_it_has_to_do() {
    let knows = |weight, in_flight| Candidate { weight, ..knowing(16, in_flight) };
    // Four requests more at weight 1 are twelve at weight 3.
    assert_eq!(choose(&[weighing(1, 0), knows(3, 12)], none_drawn), Some((1, Why::Prefix)));
    assert_eq!(choose(&[weighing(1, 0), knows(3, 13)], none_drawn), Some((0, Why::LeastLoaded)));
    assert_eq!(choose(&[weighing(3, 0), knows(1, 1)], none_drawn), Some((1, Why::Prefix)));
    assert_eq!(choose(&[weighing(3, 0), knows(1, 2)], none_drawn), Some((0, Why::LeastLoaded)));
    // Of two that know as much, the one with less to do for its weight; the first and the last are drawn.
    let draw = |bound| if bound == 6 { 0 } else { 4 };
    assert_eq!(choose(&[knows(1, 2), knows(4, 5), weighing(1, 1)], draw), Some((1, Why::Prefix)));
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
            assert_eq!(affinity.known(&chain, 3, now), expected, "{prompt:?} after {sent:?}");
            assert_eq!(affinity.known(&Chain::of(&prompt, b"salt"), 3, now), [0; 3], "salts share nothing");
            let group = random.below(3);
            affinity.learn(&chain, group, now);
            sent.push((group, prompt));
        }
        affinity.forget(1);
        let known = sent.iter().map(|(_, prompt)| affinity.known(&Chain::of(prompt, b""), 3, now)[1]);
        assert_eq!(known.sum::<usize>(), 0);
    }
}

#[test]
fn of_a_long_prompt_all_but_a_quarter_is_known_at_least() {
    let now = Instant::now();
    let prompt: Vec<u32> = (0..100_000).collect();
    for common in [16, 127, 128, 129, 300, 524, 4_096, 10_000, 99_999] {
        let mut affinity = Affinity::new(now);
        let other: Vec<u32> = prompt.iter().map(|&id| if id < common { id } else { id + 1 }).collect();
        affinity.learn(&Chain::of(&other, b""), 0, now);
        let known = affinity.known(&Chain::of(&prompt, b""), 1, now)[0];
        let common = common as usize;
        assert!(known <= common && common - known < (common / 4).max(LINK_TOKENS), "{known} of {common}");
    }
}

#[test]
fn what_was_not_sent_for_long_is_forgotten() {
    let now = Instant::now();
    let mut affinity = Affinity::new(now);
    let (old, other) = (Chain::of(&[1; LINK_TOKENS], b""), Chain::of(&[2; LINK_TOKENS], b""));
    let later = |seconds| now + Duration::from_secs(seconds);
    affinity.learn(&old, 0, now);
    affinity.learn(&other, 0, later(901));
    assert_eq!(affinity.known(&old, 1, now), [LINK_TOKENS]);
    affinity.learn(&other, 0, later(1802));
    assert_eq!(affinity.known(&old, 1, now), [0]);
    assert_eq!(affinity.known(&other, 1, later(1802)), [LINK_TOKENS]);
}

#[test]
fn what_was_sent_is_worth_less_with_time_and_all_of_it_when_it_is_sent_again() {
    let now = Instant::now();
    let mut affinity = Affinity::new(now);
    let prompt: Vec<u32> = (0..4 * LINK_TOKENS as u32).collect();
    let (whole, beginning) = (Chain::of(&prompt, b""), Chain::of(&prompt[..2 * LINK_TOKENS], b""));
    affinity.learn(&whole, 0, now);
    let at = |halves| now + HALF_LIFE * halves;
    assert_eq!(affinity.known(&whole, 1, at(0)), [64]);
    assert_eq!(affinity.known(&whole, 1, at(1)), [32]);
    assert_eq!(affinity.known(&whole, 1, at(2)), [16]);
    affinity.learn(&beginning, 0, at(1));
    assert_eq!(affinity.known(&whole, 1, at(1)), [32 + 16]);
    affinity.learn(&whole, 1, at(1));
    assert_eq!(affinity.known(&whole, 2, at(1)), [48, 64]);
}

#[test]
fn a_node_remembers_the_groups_that_were_sent_it_last() {
    let start = Instant::now();
    let mut affinity = Affinity::new(start);
    let chain = Chain::of(&[1; LINK_TOKENS], b"");
    for group in 0..100 {
        affinity.learn(&chain, group, start + Duration::from_millis(group as u64));
    }
    let known = affinity.known(&chain, 100, start + Duration::from_millis(100));
    let remembered: Vec<usize> = (0..100).filter(|&group| known[group] > 0).collect();
    assert_eq!(remembered, (92..100).collect::<Vec<usize>>());
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

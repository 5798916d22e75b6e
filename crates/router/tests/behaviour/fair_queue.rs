//! In which order those that wait are let in.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use router::fair::{AGEING_PER_LEVEL, Bounds, Full, Queue, Ticket, Waiter};
use types::Priority;

use crate::support::Random;

const WIDE: Bounds = Bounds { requests: 1 << 20, tokens: 1 << 40, bytes: 1 << 40, key_requests: 1 << 20 };

fn waiter(key: &str, tokens: u64) -> Waiter {
    Waiter { key: Arc::from(key), priority: Priority::default(), places: 1, tokens, bytes: 10 }
}

fn urgent(key: &str, level: i32) -> Waiter {
    Waiter { priority: Priority::new(level).unwrap(), ..waiter(key, 10) }
}

fn push(queue: &mut Queue<u32>, waiter: Waiter, own: u32, now: Instant) -> Ticket {
    queue.push(waiter, own, &WIDE, now).unwrap()
}

fn order(queue: &mut Queue<u32>) -> Vec<u32> {
    std::iter::from_fn(|| queue.pop()).map(|(_, own)| own).collect()
}

#[test]
fn those_of_one_key_go_in_the_order_in_which_they_came() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    for (own, tokens) in [(0, 500), (1, 1), (2, 90)] {
        push(&mut queue, waiter("a", tokens), own, now);
    }
    assert_eq!(order(&mut queue), [0, 1, 2]);
}

#[test]
fn keys_that_wait_get_equally_many_tokens_whatever_each_request_costs() {
    for seed in 0..20 {
        let (mut random, now) = (Random::seeded(seed), Instant::now());
        let mut queue = Queue::default();
        let keys: Vec<(String, usize)> =
            (0..5).map(|key| (format!("key-{key}"), 1 + random.below(400))).collect();
        for at in 0..300 {
            for (key, most) in &keys {
                push(&mut queue, waiter(key, 1 + random.below(*most) as u64), at, now);
            }
        }
        let mut served: HashMap<Arc<str>, u64> = HashMap::new();
        // As long as everybody waits; the cheapest key is the first to have nobody left.
        while served.values().copied().max().unwrap_or_default() < 300 {
            let (gone, _) = queue.pop().unwrap();
            *served.entry(gone.key).or_default() += gone.tokens;
        }
        let of = |(key, most): &(String, usize)| {
            (served.get(key.as_str()).copied().unwrap_or_default(), *most as u64)
        };
        for (a, a_most) in keys.iter().map(of) {
            for (b, b_most) in keys.iter().map(of) {
                assert!(a.abs_diff(b) <= a_most + b_most, "{served:?} of {keys:?}");
            }
        }
    }
}

#[test]
fn a_key_that_floods_the_room_keeps_another_one_waiting_for_one_request() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    for own in 0..100 {
        push(&mut queue, waiter("flood", 50), own, now);
    }
    assert_eq!(queue.pop().unwrap().1, 0);
    push(&mut queue, waiter("other", 50), 1000, now + Duration::from_secs(1));
    let next: Vec<u32> = (0..2).map(|_| queue.pop().unwrap().1).collect();
    assert!(next.contains(&1000), "{next:?}");
}

#[test]
fn the_more_urgent_go_first_and_waiting_makes_up_for_it() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    let later = |levels: u32| now + AGEING_PER_LEVEL * levels;
    push(&mut queue, urgent("a", 0), 0, now);
    push(&mut queue, urgent("b", 5), 1, later(4));
    push(&mut queue, urgent("c", 5), 2, later(6));
    push(&mut queue, urgent("d", -100), 3, now);
    push(&mut queue, urgent("e", 100), 4, later(199));
    push(&mut queue, urgent("f", 100), 5, later(201));
    assert_eq!(order(&mut queue), [1, 0, 2, 4, 3, 5]);
}

#[test]
fn who_leaves_has_cost_nothing() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    let dear = push(&mut queue, waiter("a", 1_000_000), 0, now);
    push(&mut queue, waiter("a", 10), 1, now);
    push(&mut queue, waiter("b", 10), 2, now);
    push(&mut queue, waiter("b", 10), 3, now);
    assert_eq!(queue.remove(&dear).unwrap().1, 0);
    assert!(queue.remove(&dear).is_none());
    assert_eq!(order(&mut queue), [1, 2, 3]);
}

#[test]
fn each_bound_is_kept_and_named_and_what_leaves_makes_room() {
    let bounds = Bounds { requests: 4, tokens: 100, bytes: 100, key_requests: 3 };
    let now = Instant::now();
    let full = |first: &Waiter, next: &Waiter| {
        let mut queue = Queue::default();
        let ticket = queue.push(first.clone(), (), &bounds, now).unwrap();
        let full = queue.push(next.clone(), (), &bounds, now).unwrap_err();
        queue.remove(&ticket).unwrap();
        queue.push(next.clone(), (), &bounds, now).unwrap();
        full
    };
    let of = |key, places, tokens, bytes| Waiter { places, bytes, ..waiter(key, tokens) };
    assert_eq!(full(&of("a", 3, 1, 1), &of("b", 2, 1, 1)), Full::Requests);
    assert_eq!(full(&of("a", 2, 1, 1), &of("a", 2, 1, 1)), Full::KeyRequests);
    assert_eq!(full(&of("a", 1, 90, 1), &of("b", 1, 11, 1)), Full::Tokens);
    assert_eq!(full(&of("a", 1, 1, 90), &of("b", 1, 1, 11)), Full::Bytes);
    let mut queue = Queue::default();
    let nobody = of("", 2, 1, 1);
    queue.push(nobody.clone(), (), &bounds, now).unwrap();
    queue.push(nobody, (), &bounds, now).expect("callers without a key are bounded together only");
}

#[test]
fn nobody_is_lost_whoever_comes_and_goes() {
    for seed in 0..50 {
        let mut random = Random::seeded(seed);
        let (mut queue, start) = (Queue::default(), Instant::now());
        let mut inside: HashMap<u32, (Ticket, Waiter)> = HashMap::new();
        for number in 0..400_u32 {
            let now = start + Duration::from_millis(10) * number;
            match random.below(5) {
                0..3 => {
                    let key = ["", "a", "b", "c"][random.below(4)];
                    let level = i32::try_from(random.below(5)).unwrap() - 2;
                    let waiter = Waiter { tokens: random.below(100) as u64, ..urgent(key, level) };
                    let ticket = push(&mut queue, waiter.clone(), number, now);
                    inside.insert(number, (ticket, waiter));
                }
                3 => {
                    let expected = queue.peek().cloned();
                    let popped = queue.pop();
                    assert_eq!(popped.as_ref().map(|(waiter, _)| waiter), expected.as_ref());
                    if let Some((waiter, own)) = popped {
                        assert_eq!(inside.remove(&own).unwrap().1, waiter);
                    }
                }
                _ => {
                    let mut numbers: Vec<u32> = inside.keys().copied().collect();
                    numbers.sort_unstable();
                    if let Some(&gone) = numbers.get(random.below(numbers.len().max(1))) {
                        let (ticket, waiter) = inside.remove(&gone).unwrap();
                        assert_eq!(queue.remove(&ticket), Some((waiter, gone)));
                    }
                }
            }
            let tokens: u64 = inside.values().map(|(_, waiter)| waiter.tokens).sum();
            assert_eq!((queue.requests() as usize, queue.tokens()), (inside.len(), tokens));
            assert_eq!(queue.is_empty(), inside.is_empty());
        }
        let mut left = order(&mut queue);
        left.sort_unstable();
        let mut expected: Vec<u32> = inside.into_keys().collect();
        expected.sort_unstable();
        assert_eq!(left, expected);
    }
}

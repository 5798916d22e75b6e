use router::pick::{Candidate, least_loaded};

fn candidate(eligible: bool, in_flight: usize, reported: u64) -> Candidate {
    Candidate { eligible, in_flight, reported }
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
        assert_eq!(least_loaded(candidates), expected, "{candidates:?}");
    }
}

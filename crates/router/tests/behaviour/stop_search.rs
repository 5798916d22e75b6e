use router::text::{Matched, StopStrings};

use crate::support::Random;

/// The plain definition: the smallest end at which any stop string is complete, the longest one there.
fn naive(text: &str, stop: &[&str]) -> (String, Option<String>) {
    for end in (0..=text.len()).filter(|&end| text.is_char_boundary(end)) {
        let complete = stop.iter().filter(|s| text[..end].ends_with(**s)).max_by_key(|s| s.len());
        if let Some(found) = complete {
            return (text[..end - found.len()].to_owned(), Some((*found).to_owned()));
        }
    }
    (text.to_owned(), None)
}

/// Feeds `pieces`; checks at every step that nothing is shown that a later piece could take back.
fn streamed(pieces: &[&str], stop: &[&str]) -> (String, Option<String>) {
    let mut search = StopStrings::new(stop.iter().map(|&s| s.to_owned()).collect());
    let mut shown = String::new();
    for piece in pieces {
        if let Some(Matched { stop }) = search.push(piece, &mut shown) {
            return (shown, Some(stop));
        }
    }
    search.finish(&mut shown);
    (shown, None)
}

fn random_pieces<'a>(text: &'a str, random: &mut Random) -> Vec<&'a str> {
    let mut pieces = Vec::new();
    let mut start = 0;
    for (at, _) in text.char_indices().skip(1) {
        if random.below(3) == 0 {
            pieces.push(&text[start..at]);
            start = at;
        }
    }
    pieces.push(&text[start..]);
    pieces
}

#[test]
fn the_search_agrees_with_the_definition_however_text_is_cut() {
    let mut random = Random::seeded(0x5709_5709);
    let alphabet = ['a', 'b', 'é', '漢'];
    for _ in 0..5000 {
        let mut word = |longest: usize| -> String {
            let length = random.below(longest) + 1;
            (0..length).map(|_| alphabet[random.below(alphabet.len())]).collect()
        };
        let text = word(20);
        let stop = [word(3), word(4), word(5)];
        let stop: Vec<&str> = stop.iter().map(String::as_str).collect();
        let pieces = random_pieces(&text, &mut random);
        assert_eq!(streamed(&pieces, &stop), naive(&text, &stop), "{pieces:?} {stop:?}");
    }
}

#[test]
fn a_match_is_cut_off_with_all_that_follows() {
    let found = streamed(&["one EN", "D two"], &["END"]);
    assert_eq!(found, ("one ".to_owned(), Some("END".to_owned())));
}

#[test]
fn text_that_only_looked_like_a_stop_string_is_shown_as_soon_as_it_is_certain() {
    let mut search = StopStrings::new(vec!["abcd".to_owned()]);
    let mut shown = String::new();
    assert_eq!(search.push("xabc", &mut shown), None);
    assert_eq!(shown, "x");
    assert_eq!(search.push("ab", &mut shown), None);
    assert_eq!(shown, "xabc");
    search.finish(&mut shown);
    assert_eq!(shown, "xabcab");
}

#[test]
fn the_first_to_be_complete_wins_and_of_those_the_longest() {
    assert_eq!(streamed(&["abcd"], &["abcd", "bc"]), ("a".to_owned(), Some("bc".to_owned())));
    assert_eq!(streamed(&["xabc"], &["bc", "abc"]), ("x".to_owned(), Some("abc".to_owned())));
}

#[test]
fn without_stop_strings_everything_is_shown_at_once() {
    let mut search = StopStrings::new(Vec::new());
    let mut shown = String::new();
    assert_eq!(search.push("anything", &mut shown), None);
    assert_eq!(shown, "anything");
}

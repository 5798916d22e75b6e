use super::*;

const START: TokenId = TokenId(13);
const END: TokenId = TokenId(14);

fn thinking(tokens_max: u32, open: bool) -> Guidance {
    Guidance { matcher: None, thinking: Some(Thinking { tokens_max, start: START, end: END, open }) }
}

fn ids(tokens: &[u32]) -> Vec<TokenId> {
    tokens.iter().copied().map(TokenId).collect()
}

/// The choice behind some output.
fn behind(guidance: &Guidance, output: &[u32]) -> Choice {
    let guide = guidance.resume(&ids(output)).unwrap();
    guide.choice(output.len() as u32).unwrap().choice
}

fn the_end() -> Choice {
    Choice::Of(TokenMask::of(&[END]))
}

#[test]
fn thoughts_end_after_as_many_tokens_as_they_may_have() {
    let three = thinking(3, true);
    assert_eq!(behind(&three, &[]), Choice::Any);
    assert_eq!(behind(&three, &[50, 51]), Choice::Any);
    assert_eq!(behind(&three, &[50, 51, 52]), the_end());
    assert_eq!(behind(&three, &[50, 51, 52, END.0]), Choice::Any);
    assert_eq!(behind(&three, &[50, END.0, 51, 52, 53, 54]), Choice::Any);
    assert_eq!(behind(&thinking(0, true), &[]), the_end());
}

#[test]
fn thoughts_that_begin_in_the_output_count_from_there_and_add_up() {
    let two = thinking(2, false);
    assert_eq!(behind(&two, &[50, 51, 52]), Choice::Any);
    assert_eq!(behind(&two, &[50, START.0, 51]), Choice::Any);
    assert_eq!(behind(&two, &[50, START.0, 51, 52]), the_end());
    assert_eq!(behind(&two, &[START.0, 51, END.0, START.0, 52]), the_end());
}

#[test]
fn a_mask_belongs_to_a_position_and_is_ready_when_it_was_prepared() {
    let guide = thinking(1, true).resume(&[]).unwrap();
    assert!(!guide.choice(0).unwrap().was_ready, "nobody prepared the first one");
    guide.drew(0, TokenId(50));
    guide.prepare();
    assert_eq!(guide.choice(1).unwrap(), Asked { choice: the_end(), was_ready: true });
    guide.drew(1, END);
    assert_eq!(guide.choice(2).unwrap(), Asked { choice: Choice::Any, was_ready: false });
    assert!(guide.choice(4).is_err(), "two tokens were never drawn");
}

#[test]
fn a_token_that_is_drawn_again_takes_the_place_of_the_first() {
    let guide = thinking(1, true).resume(&[]).unwrap();
    guide.drew(0, END);
    guide.prepare();
    assert_eq!(guide.choice(1).unwrap().choice, Choice::Any);
    assert_eq!(guide.choice(0).unwrap().choice, Choice::Any);
    guide.drew(0, TokenId(50));
    assert_eq!(guide.choice(1).unwrap().choice, the_end());
}

#[test]
fn sequences_without_a_guide_may_draw_anything() {
    let guides = Guides::start().unwrap();
    let seq = types::SeqId(3);
    assert_eq!(guides.choice(seq, 5).unwrap(), Choice::Any);
    guides.open(seq, thinking(0, true).resume(&[]).unwrap(), "r".into());
    assert_eq!(guides.choice(seq, 0).unwrap(), the_end());
    guides.close(seq);
    assert_eq!(guides.choice(seq, 0).unwrap(), Choice::Any);
    assert_eq!(guides.counts().iter().sum::<u64>(), 1);
}

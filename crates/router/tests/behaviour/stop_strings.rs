use proto::v1;
use proto::v1::finish::Matched;

use crate::support::{EOS, Leader, TestRouter, all, answer, chunk, from_text, ids, last, soon, with_stop};

fn text(messages: &[v1::GenerateResponse]) -> String {
    messages.iter().map(|m| m.text.as_str()).collect()
}

#[tokio::test]
async fn a_stop_string_across_tokens_ends_the_stream_and_cancels_at_the_leader() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let generated = ids("One two. Three four");
    let stop = "wo. Thr";
    let call = tokio::spawn(async move { all(&router, with_stop(from_text("x"), &[stop])).await });
    let open = leader.next().await;
    open.play(generated.iter().map(|&id| chunk(&[id])).collect()).await;
    soon(open.chunks.closed()).await;

    let messages = soon(call).await.unwrap().unwrap();
    assert_eq!(text(&messages), "One t");
    let end = messages.last().unwrap();
    let finish = end.finish.clone().unwrap();
    assert_eq!(finish.reason(), v1::FinishReason::Stop);
    assert_eq!(finish.matched, Some(Matched::Stop(stop.to_owned())));
    let returned: Vec<u32> = messages.iter().flat_map(|m| m.token_ids.clone()).collect();
    assert!(generated.starts_with(&returned) && returned.len() < generated.len(), "{returned:?}");
    assert_eq!(end.usage.unwrap().output_tokens as usize, returned.len());
}

#[tokio::test]
async fn tokens_after_the_one_that_completes_a_stop_string_are_not_returned() {
    let mut generated = ids("One STOP and more");
    generated.push(EOS);
    let whole = last(&generated, proto::worker::FinishReason::Eos, Some(EOS));
    let leader = Leader::serving().await.play_always(vec![whole]);
    let router = TestRouter::ready(&[&leader]).await;
    let messages = all(&router, with_stop(from_text("x"), &["STOP"])).await.unwrap();
    assert_eq!(messages.len(), 1);
    assert_eq!(messages[0].text, "One ");
    assert!(messages[0].token_ids.len() < generated.len());
    assert!(generated.starts_with(&messages[0].token_ids));
    assert_eq!(messages[0].finish.clone().unwrap().matched, Some(Matched::Stop("STOP".to_owned())));
}

#[tokio::test]
async fn what_was_held_back_is_sent_when_the_answer_ends() {
    let leader = Leader::serving().await.play_always(answer("almost STO"));
    let router = TestRouter::ready(&[&leader]).await;
    let messages = all(&router, with_stop(from_text("x"), &["STOP"])).await.unwrap();
    assert_eq!(text(&messages), "almost STO");
    assert_eq!(messages.last().unwrap().finish.clone().unwrap().matched, Some(Matched::TokenId(EOS)));
}

#[tokio::test]
async fn a_stop_string_matches_visible_text_only() {
    let script = answer("a<|END_TEXT|>b");
    let leader = Leader::serving().await.play_always(script);
    let router = TestRouter::ready(&[&leader]).await;
    let unseen = all(&router, with_stop(from_text("x"), &["<|END_TEXT|>"])).await.unwrap();
    assert_eq!(text(&unseen), "ab");
    let across = all(&router, with_stop(from_text("x"), &["ab"])).await.unwrap();
    assert_eq!(text(&across), "");
    let response = Some(v1::Response { keep_special_tokens: true, ..v1::Response::default() });
    let seen = v1::GenerateRequest { response, ..with_stop(from_text("x"), &["<|END_TEXT|>"]) };
    assert_eq!(text(&all(&router, seen).await.unwrap()), "a");
}

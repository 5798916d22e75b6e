//! A group is lost under streams, and they go on at another one as if nothing had been.

use proto::{Failure, Phase, v1, worker};
use router::{Config, ModelFiles};
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::support::{
    EOS, Leader, Open, PATIENCE, TestRouter, answer, chunk, config, demo_files, facts, failure, from_text,
    ids, last, of, soon, state,
};

type Messages = tonic::Streaming<v1::GenerateResponse>;

async fn router(workers: &[&Leader]) -> TestRouter {
    with_files(workers, demo_files()).await
}

async fn with_files(workers: &[&Leader], files: ModelFiles) -> TestRouter {
    let addresses: Vec<&str> = workers.iter().map(|leader| leader.address.as_str()).collect();
    let router = TestRouter::start(Config { resume_grace: PATIENCE, ..config(&addresses) }, files).await;
    router.wait_for(ServingStatus::Serving).await;
    router.wait_for_groups(workers.len()).await;
    router
}

async fn generate(router: &TestRouter, request: v1::GenerateRequest) -> Messages {
    soon(router.client().await.generate(request)).await.unwrap().into_inner()
}

/// Reads messages until these tokens have come.
async fn read(stream: &mut Messages, tokens: usize) -> Vec<v1::GenerateResponse> {
    let mut messages: Vec<v1::GenerateResponse> = Vec::new();
    while messages.iter().map(|message| message.token_ids.len()).sum::<usize>() < tokens {
        messages.push(soon(stream.message()).await.unwrap().expect("more is to come"));
    }
    messages
}

async fn rest(mut stream: Messages) -> Vec<v1::GenerateResponse> {
    let mut messages = Vec::new();
    while let Some(message) = soon(stream.message()).await.unwrap() {
        messages.push(message);
    }
    messages
}

fn text(messages: &[v1::GenerateResponse]) -> String {
    messages.iter().map(|message| message.text.as_str()).collect()
}

fn chunks(ids: &[u32]) -> Vec<worker::GenerateChunk> {
    ids.iter().map(|&id| chunk(&[id])).collect()
}

/// Sends some tokens and waits until the caller has them.
async fn begin(open: &Open, stream: &mut Messages, ids: &[u32]) -> Vec<v1::GenerateResponse> {
    open.play(chunks(ids)).await;
    read(stream, ids.len()).await
}

#[tokio::test]
async fn the_caller_sees_neither_gap_nor_repeat() {
    let (mut first, mut second) = (Leader::serving().await, Leader::serving().await);
    let router = router(&[&first, &second]).await;
    let request = v1::GenerateRequest { priority: 5, cache_salt: "s".to_owned(), ..from_text("x") };
    let mut stream = generate(&router, request).await;
    let open = first.next().await;
    // Lost in the middle of a character, and of what might become a stop string.
    let said = ids("Grüße, 漢字 und mehr");
    let (had, left) = said.split_at(said.len() / 2);
    let mut messages = begin(&open, &mut stream, had).await;
    first.kill().await;
    let again = second.next().await;
    let worker::GenerateRequest { resume_tokens, first_stream, .. } = &again.request;
    assert_eq!((resume_tokens.as_slice(), *first_stream), (had, 0));
    let sent = |open: &Open| worker::GenerateRequest { resume_tokens: Vec::new(), ..open.request.clone() };
    assert_eq!(sent(&again), sent(&open), "everything else is as it was, the seed too");
    again.play(chunks(left)).await;
    again.play(vec![last(&[EOS], worker::FinishReason::Eos, Some(EOS))]).await;
    messages.extend(rest(stream).await);
    assert_eq!(text(&messages), "Grüße, 漢字 und mehr");
    let tokens: Vec<u32> = messages.iter().flat_map(|message| message.token_ids.clone()).collect();
    assert_eq!(tokens, [said.as_slice(), &[EOS]].concat());
    let usage = messages.last().unwrap().usage.unwrap();
    assert_eq!(usage.output_tokens as usize, said.len() + 1);
    assert_eq!(messages.iter().filter(|message| message.prompt.is_some()).count(), 1);
}

#[tokio::test]
async fn whatever_ends_a_stream_for_a_groups_own_reasons_is_a_loss() {
    let reported = [
        Failure::GroupLost { group: "g0".to_owned(), why: "rank 1 left".to_owned() },
        Failure::Unavailable { why: "the group is stopping".to_owned(), retry_after: proto::RETRY_AFTER },
    ];
    for reported in reported {
        let (mut first, second) = (Leader::serving().await, Leader::serving().await);
        let router = router(&[&first, &second]).await;
        let mut stream = generate(&router, from_text("x")).await;
        let open = first.next().await;
        let mut messages = begin(&open, &mut stream, &ids("one ")).await;
        second.play_always(answer("two"));
        open.chunks.send(Err(reported.to_status())).await.unwrap();
        messages.extend(rest(stream).await);
        assert_eq!(text(&messages), "one two", "{reported}");
    }
}

#[tokio::test]
async fn a_failure_of_the_request_itself_is_passed_on() {
    let (mut first, mut second) = (Leader::serving().await, Leader::serving().await);
    let router = router(&[&first, &second]).await;
    let mut stream = generate(&router, from_text("x")).await;
    let open = first.next().await;
    begin(&open, &mut stream, &[300]).await;
    let reported = Failure::Internal { why: "a logit is not a number".to_owned() };
    open.chunks.send(Err(reported.to_status())).await.unwrap();
    assert_eq!(failure(&soon(stream.message()).await.unwrap_err()), reported);
    assert!(second.opened.try_recv().is_err());
}

#[tokio::test]
async fn each_unfinished_answer_goes_on_by_itself() {
    let (mut first, mut second) = (Leader::serving().await, Leader::serving().await);
    let router = router(&[&first, &second]).await;
    let sampling = v1::Sampling { n: Some(3), seed: Some(4), ..v1::Sampling::default() };
    let mut stream =
        generate(&router, v1::GenerateRequest { sampling: Some(sampling), ..from_text("x") }).await;
    let open = first.next().await;
    open.play(chunks(&ids("zero "))).await;
    let end = last(&[EOS], worker::FinishReason::Eos, Some(EOS));
    open.play(vec![of(1, chunk(&ids("one"))), of(1, end.clone())]).await;
    let mut messages = read(&mut stream, ids("zero ").len() + ids("one").len() + 1).await;
    first.kill().await;
    let mut resumed = Vec::new();
    for _ in 0..2 {
        let again = second.next().await;
        assert_eq!((again.sequences(), again.request.generation.as_ref().unwrap().seed), (1, Some(4)));
        let index = again.request.first_stream;
        let left = ["continued", "", "two"][index as usize];
        again.play(ids(left).iter().map(|&id| of(index, chunk(&[id]))).collect()).await;
        again.play(vec![of(index, end.clone())]).await;
        resumed.push((index, again.request.resume_tokens.clone()));
    }
    resumed.sort_unstable();
    assert_eq!(resumed, [(0, ids("zero ")), (2, Vec::new())]);
    messages.extend(rest(stream).await);
    let of =
        |index| messages.iter().filter(move |message| message.index == index).cloned().collect::<Vec<_>>();
    assert_eq!([0, 1, 2].map(|index| text(&of(index))), ["zero continued", "one", "two"]);
    assert!([0, 1, 2].iter().all(|&index| of(index).iter().filter(|one| one.finish.is_some()).count() == 1));
}

#[tokio::test]
async fn answers_that_had_not_begun_begin_again_together() {
    let (mut first, mut second) = (Leader::serving().await, Leader::serving().await);
    let router = router(&[&first, &second]).await;
    let sampling = v1::Sampling { n: Some(2), ..v1::Sampling::default() };
    let stream = generate(&router, v1::GenerateRequest { sampling: Some(sampling), ..from_text("x") }).await;
    let open = first.next().await;
    second.refuse(Failure::Overloaded {
        what: "waiting requests".to_owned(),
        max: 1,
        retry_after: proto::RETRY_AFTER,
    });
    first.kill().await;
    second.refused().await;
    second.accept();
    let again = second.next().await;
    assert_eq!(again.request, open.request);
    for index in [0, 1] {
        again.play(answer("ok").into_iter().map(|chunk| of(index, chunk)).collect()).await;
    }
    assert_eq!(text(&rest(stream).await), "okok");
}

#[tokio::test]
async fn an_answer_that_was_at_its_end_is_not_generated_further() {
    let stopping = v1::Stopping { max_tokens: Some(3), stop_token_ids: vec![301], ..v1::Stopping::default() };
    let cases = [
        (vec![300, EOS], v1::FinishReason::Stop, Some(EOS)),
        (vec![300, 301], v1::FinishReason::Stop, Some(301)),
        (vec![300, 302, 303], v1::FinishReason::Length, None),
    ];
    for (tokens, reason, token_id) in cases {
        let (mut first, mut second) = (Leader::serving().await, Leader::serving().await);
        let router = router(&[&first, &second]).await;
        let request = v1::GenerateRequest { stopping: Some(stopping.clone()), ..from_text("x") };
        let mut stream = generate(&router, request).await;
        let open = first.next().await;
        begin(&open, &mut stream, &tokens).await;
        first.kill().await;
        let end = rest(stream).await.pop().unwrap();
        let finish = end.finish.unwrap();
        assert_eq!((finish.reason(), finish.matched), (reason, token_id.map(v1::finish::Matched::TokenId)));
        assert_eq!(end.usage.unwrap().output_tokens as usize, tokens.len());
        assert!(second.opened.try_recv().is_err());
    }
}

#[tokio::test]
async fn a_group_that_comes_back_goes_on_with_what_it_had() {
    let mut leader = Leader::serving().await;
    let router = router(&[&leader]).await;
    let mut stream = generate(&router, from_text("x")).await;
    let open = leader.next().await;
    let mut messages = begin(&open, &mut stream, &ids("before ")).await;
    let address = leader.address.strip_prefix("http://").unwrap().parse().unwrap();
    leader.kill().await;
    router.wait_for(ServingStatus::NotServing).await;
    let again = Leader::start_at(address, state(Phase::Serving, 100, Some(facts("demo")))).await;
    again.play_always(answer("and after"));
    messages.extend(rest(stream).await);
    assert_eq!(text(&messages), "before and after");
}

#[tokio::test]
async fn a_group_that_is_full_is_asked_again() {
    let (mut first, mut second) = (Leader::serving().await, Leader::serving().await);
    let router = router(&[&first, &second]).await;
    let mut stream = generate(&router, from_text("x")).await;
    let open = first.next().await;
    let mut messages = begin(&open, &mut stream, &ids("one ")).await;
    let retry_after = proto::RETRY_AFTER;
    second.refuse(Failure::Overloaded { what: "waiting requests".to_owned(), max: 1, retry_after });
    first.kill().await;
    second.refused().await;
    second.accept();
    let again = second.next().await;
    again.play(answer("two")).await;
    messages.extend(rest(stream).await);
    assert_eq!(text(&messages), "one two");
}

#[tokio::test]
async fn a_request_that_brings_down_every_group_is_given_up() {
    let mut leader = Leader::serving().await;
    let router = router(&[&leader]).await;
    let mut stream = generate(&router, from_text("x")).await;
    let mut deaths = 0;
    loop {
        tokio::select! {
            open = leader.next() => {
                open.chunks.send(Ok(chunk(&[300]))).await.unwrap();
                deaths += 1;
            }
            message = stream.message() => match message {
                Ok(message) => assert!(message.is_some()),
                Err(status) => {
                    assert_eq!(status.code(), Code::Aborted);
                    break;
                }
            }
        }
    }
    assert_eq!(deaths, 4, "three resumes");
}

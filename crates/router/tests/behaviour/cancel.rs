use crate::support::{Leader, TestRouter, chunk, from_text, soon};

#[tokio::test]
async fn dropping_the_stream_cancels_at_the_leader() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let mut stream = soon(router.client().await.generate(from_text("x"))).await.unwrap().into_inner();
    let open = leader.next().await;
    open.chunks.send(Ok(chunk(&[300]))).await.unwrap();
    soon(stream.message()).await.unwrap().unwrap();
    drop(stream);
    soon(open.chunks.closed()).await;
}

#[tokio::test]
async fn dropping_the_stream_before_the_first_token_cancels_too() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let stream = soon(router.client().await.generate(from_text("x"))).await.unwrap();
    let open = leader.next().await;
    drop(stream);
    soon(open.chunks.closed()).await;
}

#[tokio::test]
async fn dropping_a_call_for_everything_at_once_cancels_too() {
    let mut leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let mut client = router.client().await;
    let call = tokio::spawn(async move { client.generate_once(from_text("x")).await });
    let open = leader.next().await;
    call.abort();
    soon(open.chunks.closed()).await;
}

//! Messages that cannot be read are refused with the same details as all others.

use proto::v1;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::{Code, Request};
use tonic_prost::ProstCodec;

use crate::support::{Leader, TestRouter, fields, from_text, soon};

#[tokio::test]
async fn a_message_above_the_limit_is_refused_by_its_size() {
    let leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let text = "a".repeat(types::limits::MESSAGE_BYTES_MAX + 1);
    let mut client = router.client().await.max_encoding_message_size(usize::MAX);
    let status = soon(client.generate_once(from_text(&text))).await.unwrap_err();
    assert_eq!((status.code(), fields(&status)), (Code::InvalidArgument, vec!["message".to_owned()]));
    assert!(status.message().contains("16777216"), "{status:?}");
}

#[tokio::test]
async fn text_that_is_not_utf8_is_refused_with_its_field() {
    let leader = Leader::serving().await;
    let router = TestRouter::ready(&[&leader.address]).await;
    let mut client = tonic::client::Grpc::new(router.channel().await);
    client.ready().await.unwrap();
    // Its first field has bytes where a request has its id.
    let request = vllm_proto::InitWeightTransferEngineRequest { init_info_json: vec![0xFF, 0xFE] };
    let path = PathAndQuery::from_static("/cohort.v1.Cohort/GenerateOnce");
    let codec = ProstCodec::<_, v1::GenerateOnceResponse>::default();
    let status = soon(client.unary(Request::new(request), path, codec)).await.unwrap_err();
    assert_eq!((status.code(), fields(&status)), (Code::InvalidArgument, vec!["message".to_owned()]));
    assert!(status.message().contains("request_id"), "{status:?}");
}

//! Callers that show a token of an identity provider.

use std::io::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use proto::v1;
use ring::rand::SystemRandom;
use ring::signature::{Ed25519KeyPair, KeyPair};
use router::{Access, Config};
use security::{JwtRules, Limits};
use serde_json::{Value, json};
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::access::{KeyRing, chat_with, refusal, with_key};
use crate::support::{Leader, TestRouter, all, answer, config, demo_files, from_ids};

/// Somebody whose tokens a router believes.
struct Provider {
    key: Ed25519KeyPair,
    file: tempfile::NamedTempFile,
}

impl Provider {
    fn new() -> Self {
        let key = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        let key = Ed25519KeyPair::from_pkcs8(key.as_ref()).unwrap();
        let x = URL_SAFE_NO_PAD.encode(key.public_key().as_ref());
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let keys = json!({ "keys": [{ "kty": "OKP", "crv": "Ed25519", "kid": "k", "x": x }] });
        file.write_all(keys.to_string().as_bytes()).unwrap();
        Self { key, file }
    }

    fn rules(&self) -> JwtRules {
        JwtRules {
            jwks: self.file.path().to_owned(),
            issuers: vec!["https://id.example".to_owned()],
            audiences: vec!["cohort".to_owned()],
            leeway: Duration::ZERO,
            limits_claim: "cohort".to_owned(),
            limits: Limits { priority_min: Some(0), ..Limits::default() },
        }
    }

    /// A token of alice that is valid for so many seconds, with further claims.
    fn token(&self, seconds: i64, more: &Value) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let mut claims = json!({
            "sub": "alice", "iss": "https://id.example", "aud": "cohort",
            "exp": i64::try_from(now).unwrap() + seconds,
        });
        claims.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string().as_bytes());
        let body = format!("{}.{}", part(&json!({ "alg": "EdDSA", "kid": "k" })), part(&claims));
        let signature = URL_SAFE_NO_PAD.encode(self.key.sign(body.as_bytes()).as_ref());
        format!("{body}.{signature}")
    }
}

async fn router(leader: &str, access: Access) -> TestRouter {
    let router = TestRouter::start(Config { access, ..config(&[leader]) }, demo_files()).await;
    router.wait_for(ServingStatus::Serving).await;
    router
}

#[tokio::test]
async fn a_token_that_is_believed_gets_an_answer_and_any_other_does_not() {
    let leader = Leader::serving().await.play_always(answer("hi"));
    let provider = Provider::new();
    let router = router(&leader, Access { jwt: Some(provider.rules()), ..Access::default() }).await;
    let good = provider.token(600, &json!({}));
    all(&router, with_key(from_ids(&[1]), &good)).await.unwrap();
    let answered = chat_with(&router, &format!("authorization: Bearer {good}\r\n")).await;
    assert_eq!(answered.code, 200, "{answered:?}");

    let stranger = Provider::new().token(600, &json!({}));
    for (shown, why) in [
        (provider.token(-5, &json!({})), "it has expired"),
        (provider.token(600, &json!({ "aud": "others" })), "it is for another audience (aud)"),
        (stranger, "its signature is wrong"),
        ("cohort-key".to_owned(), "a JSON Web Token is needed"),
    ] {
        let (code, failure) = refusal(all(&router, with_key(from_ids(&[1]), &shown)).await);
        assert_eq!(code, Code::Unauthenticated, "{failure}");
        assert!(failure.to_string().contains(why), "{failure}");
        let refused = chat_with(&router, &format!("authorization: Bearer {shown}\r\n")).await;
        assert!(refused.code == 401 && !refused.body.contains(&shown), "{refused:?}");
    }
    assert_eq!(chat_with(&router, "").await.code, 401);
}

#[tokio::test]
async fn keys_and_tokens_are_taken_side_by_side() {
    let leader = Leader::serving().await.play_always(answer("hi"));
    let (provider, ring) = (Provider::new(), KeyRing::new(&[Limits::default()]));
    let access =
        Access { keys: Some(ring.file.path().to_owned()), jwt: Some(provider.rules()), ..Access::default() };
    let router = router(&leader, access).await;
    all(&router, with_key(from_ids(&[1]), &ring.keys[0])).await.unwrap();
    all(&router, with_key(from_ids(&[1]), &provider.token(60, &json!({})))).await.unwrap();
    let (code, _) = refusal(all(&router, with_key(from_ids(&[1]), "cohort-other")).await);
    assert_eq!(code, Code::Unauthenticated);
}

#[tokio::test]
async fn a_token_may_use_what_its_claim_or_the_configuration_says() {
    let leader = Leader::serving().await.play_always(answer("hi"));
    let provider = Provider::new();
    let router = router(&leader, Access { jwt: Some(provider.rules()), ..Access::default() }).await;
    let asking = |priority, token: &str| with_key(v1::GenerateRequest { priority, ..from_ids(&[1]) }, token);
    let plain = provider.token(60, &json!({}));
    let (code, _) = refusal(all(&router, asking(-1, &plain)).await);
    assert_eq!(code, Code::PermissionDenied);
    let urgent = provider.token(60, &json!({ "cohort": { "priority_min": -5, "requests_per_minute": 2 } }));
    all(&router, asking(-5, &urgent)).await.unwrap();
    all(&router, asking(-5, &urgent)).await.unwrap();
    let (code, failure) = refusal(all(&router, asking(0, &urgent)).await);
    assert!(
        code == Code::ResourceExhausted && failure.to_string().contains("requests a minute"),
        "{failure}"
    );
}

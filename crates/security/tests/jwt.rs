//! Tokens of identity providers: which are believed, and what their subjects may use.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::io::Write;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::SystemRandom;
use ring::rsa::PublicKeyComponents;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RSA_PKCS1_SHA256, RsaKeyPair,
};
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::pki_types::pem::PemObject;
use security::{JwtRules, Limits, Refused, Tokens};
use serde_json::{Value, json};

/// A key of nobody: it signs in these tests only.
const RSA_KEY: &[u8] = include_bytes!("data/rsa-2048-for-tests.pem");

fn encode(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Somebody who signs tokens.
enum Signer {
    Rsa(RsaKeyPair),
    P256(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
}

impl Signer {
    fn rsa() -> Self {
        let key = PrivatePkcs8KeyDer::from_pem_slice(RSA_KEY).unwrap();
        Self::Rsa(RsaKeyPair::from_pkcs8(key.secret_pkcs8_der()).unwrap())
    }

    fn p256() -> Self {
        let random = SystemRandom::new();
        let key = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).unwrap();
        Self::P256(EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, key.as_ref(), &random).unwrap())
    }

    fn ed25519() -> Self {
        let key = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        Self::Ed25519(Ed25519KeyPair::from_pkcs8(key.as_ref()).unwrap())
    }

    fn algorithm(&self) -> &'static str {
        match self {
            Self::Rsa(_) => "RS256",
            Self::P256(_) => "ES256",
            Self::Ed25519(_) => "EdDSA",
        }
    }

    /// Its line of the provider's file.
    fn public(&self, kid: &str) -> Value {
        match self {
            Self::Rsa(key) => {
                let PublicKeyComponents { n, e } = PublicKeyComponents::<Vec<u8>>::from(key.public());
                json!({ "kty": "RSA", "kid": kid, "use": "sig", "alg": "RS256", "n": encode(&n), "e": encode(&e) })
            }
            Self::P256(key) => {
                let (x, y) = key.public_key().as_ref()[1..].split_at(32);
                json!({ "kty": "EC", "crv": "P-256", "kid": kid, "x": encode(x), "y": encode(y) })
            }
            Self::Ed25519(key) => {
                let x = encode(key.public_key().as_ref());
                json!({ "kty": "OKP", "crv": "Ed25519", "kid": kid, "alg": "EdDSA", "x": x })
            }
        }
    }

    fn sign(&self, message: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        match self {
            Self::Rsa(key) => {
                let mut signature = vec![0; key.public().modulus_len()];
                key.sign(&RSA_PKCS1_SHA256, &random, message, &mut signature).unwrap();
                signature
            }
            Self::P256(key) => key.sign(&random, message).unwrap().as_ref().to_vec(),
            Self::Ed25519(key) => key.sign(message).as_ref().to_vec(),
        }
    }

    fn token(&self, header: &Value, claims: &Value) -> String {
        let body =
            format!("{}.{}", encode(header.to_string().as_bytes()), encode(claims.to_string().as_bytes()));
        format!("{body}.{}", encode(&self.sign(body.as_bytes())))
    }

    /// A token with a header as it should be.
    fn issue(&self, kid: &str, claims: &Value) -> String {
        self.token(&json!({ "alg": self.algorithm(), "kid": kid, "typ": "JWT" }), claims)
    }
}

fn seconds_from_now(seconds: i64) -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    i64::try_from(now).unwrap() + seconds
}

fn claims() -> Value {
    json!({ "sub": "alice", "iss": "https://id.example", "aud": "cohort", "exp": seconds_from_now(600) })
}

fn with(claim: &str, value: Value) -> Value {
    let mut claims = claims();
    claims[claim] = value;
    claims
}

fn without(claim: &str) -> Value {
    let mut claims = claims();
    claims.as_object_mut().unwrap().remove(claim);
    claims
}

fn file(keys: &[Value]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(json!({ "keys": keys }).to_string().as_bytes()).unwrap();
    file
}

fn rules(jwks: &std::path::Path) -> JwtRules {
    JwtRules {
        jwks: jwks.to_owned(),
        issuers: vec!["https://id.example".to_owned(), "https://other.example".to_owned()],
        audiences: vec!["cohort".to_owned()],
        leeway: Duration::from_secs(30),
        limits_claim: "cohort".to_owned(),
        limits: Limits { requests_per_minute: Some(7), ..Limits::default() },
    }
}

fn refused(tokens: &Tokens, token: &str) -> Refused {
    tokens.find(token, Instant::now()).unwrap_err()
}

#[test]
fn tokens_signed_by_any_of_the_three_algorithms_are_believed() {
    let signers = [Signer::rsa(), Signer::p256(), Signer::ed25519()];
    let keys: Vec<Value> = signers.iter().map(|signer| signer.public(signer.algorithm())).collect();
    let file = file(&keys);
    let tokens = Tokens::open(rules(file.path())).unwrap();
    for signer in &signers {
        let token = signer.issue(signer.algorithm(), &claims());
        assert!(Tokens::looks_like_one(&token));
        let meter = tokens.find(&token, Instant::now()).unwrap();
        assert_eq!((meter.name(), meter.limits().requests_per_minute), ("jwt:alice", Some(7)));
        // The same claims with any byte of the signature changed.
        let (body, signature) = token.rsplit_once('.').unwrap();
        let mut bytes = URL_SAFE_NO_PAD.decode(signature).unwrap();
        bytes[10] ^= 1;
        assert_eq!(refused(&tokens, &format!("{body}.{}", encode(&bytes))), Refused::Signature);
        // Other claims with the same signature.
        let (head, _) = body.split_once('.').unwrap();
        let other = encode(with("sub", json!("root")).to_string().as_bytes());
        assert_eq!(refused(&tokens, &format!("{head}.{other}.{signature}")), Refused::Signature);
    }
}

#[test]
fn claims_are_checked_one_by_one() {
    let signer = Signer::ed25519();
    let file = file(&[signer.public("k")]);
    let tokens = Tokens::open(rules(file.path())).unwrap();
    let claim = |name: &str| Refused::Claim(name.to_owned());
    let table = [
        (with("exp", json!(seconds_from_now(-31))), Refused::Expired),
        (with("exp", json!("tomorrow")), claim("exp")),
        (without("exp"), claim("exp")),
        (with("nbf", json!(seconds_from_now(60))), Refused::NotYet),
        (with("nbf", json!("yesterday")), claim("nbf")),
        (with("iss", json!("https://evil.example")), Refused::Issuer),
        (without("iss"), claim("iss")),
        (with("aud", json!("somebody else")), Refused::Audience),
        (with("aud", json!(["a", "b"])), Refused::Audience),
        (without("aud"), claim("aud")),
        (with("sub", json!("")), claim("sub")),
        (with("sub", json!("x".repeat(300))), claim("sub")),
        (with("cohort", json!({ "concurrency": 0 })), claim("cohort")),
        (with("cohort", json!({ "rpm": 1 })), claim("cohort")),
        (with("cohort", json!("all of it")), claim("cohort")),
        (with("cohort", json!({ "priority_min": -101 })), claim("cohort")),
    ];
    for (claims, why) in table {
        assert_eq!(refused(&tokens, &signer.issue("k", &claims)), why, "{claims}");
    }
    for claims in [
        with("exp", json!(seconds_from_now(-10))),
        with("nbf", json!(seconds_from_now(10))),
        with("iss", json!("https://other.example")),
        with("aud", json!(["cohort", "others"])),
    ] {
        tokens
            .find(&signer.issue("k", &claims), Instant::now())
            .unwrap_or_else(|why| panic!("{claims}: {why}"));
    }
}

#[test]
fn no_token_chooses_how_it_is_checked() {
    let (signer, other) = (Signer::rsa(), Signer::ed25519());
    let public = signer.public("k");
    let file = file(std::slice::from_ref(&public));
    let tokens = Tokens::open(rules(file.path())).unwrap();
    let body = |alg: &str| {
        let header = json!({ "alg": alg, "kid": "k" }).to_string();
        format!("{}.{}", encode(header.as_bytes()), encode(claims().to_string().as_bytes()))
    };
    // No signature; a secret that is the public key, as an old attack has it; another key's algorithm.
    assert_ne!(tokens.find(&format!("{}.", body("none")), Instant::now()).map(|_| ()), Ok(()));
    for alg in ["HS256", "HS512", "RS384", "PS256", "ES256", "EdDSA"] {
        let token = format!("{}.{}", body(alg), encode(public.to_string().as_bytes()));
        assert_eq!(refused(&tokens, &token), Refused::Algorithm, "{alg}");
    }
    assert_eq!(refused(&tokens, &other.issue("k", &claims())), Refused::Algorithm);
    assert_eq!(refused(&tokens, &signer.issue("nobody's", &claims())), Refused::UnknownKey);
    let header = json!({ "alg": "RS256", "kid": "k", "crit": ["exp"] });
    tokens.find(&signer.token(&header, &claims()), Instant::now()).unwrap_err();
    for junk in ["", ".", "..", "a.b.c", &"x".repeat(9000), &format!("{}.a.b", encode(b"{}"))] {
        tokens.find(junk, Instant::now()).unwrap_err();
    }
    // With one key in the file a token need not name it.
    let unnamed = signer.token(&json!({ "alg": "RS256" }), &claims());
    tokens.find(&unnamed, Instant::now()).unwrap();
}

#[test]
fn a_refusal_shows_nothing_of_the_token() {
    let signer = Signer::ed25519();
    let file = file(&[signer.public("k")]);
    let tokens = Tokens::open(rules(file.path())).unwrap();
    let token = signer.issue("k", &with("sub", json!("x".repeat(400))));
    let expired = signer.issue("k", &with("exp", json!(1)));
    for token in [token.as_str(), &expired, "secret.secret.secret"] {
        let why = refused(&tokens, token).to_string();
        assert!(!why.contains("xxx") && !why.contains("secret") && !why.contains(&token[..10]), "{why}");
    }
    tokens.find(&signer.issue("k", &claims()), Instant::now()).unwrap();
    let shown = format!("{tokens:?}");
    assert!(!shown.contains("alice"), "{shown}");
}

#[test]
fn the_claim_of_a_token_goes_before_the_configuration() {
    let signer = Signer::ed25519();
    let file = file(&[signer.public("k")]);
    let tokens = Tokens::open(rules(file.path())).unwrap();
    let own = json!({ "tokens_per_minute": 50, "concurrency": 1, "priority_min": 5 });
    let meter = tokens.find(&signer.issue("k", &with("cohort", own)), Instant::now()).unwrap();
    let expected = Limits {
        requests_per_minute: Some(7),
        tokens_per_minute: Some(50),
        concurrency: Some(1),
        priority_min: Some(5),
    };
    assert_eq!(meter.limits(), &expected);
}

#[test]
fn what_a_subject_has_used_is_counted_over_all_its_tokens() {
    let signer = Signer::ed25519();
    let file = file(&[signer.public("k")]);
    let tokens = Tokens::open(rules(file.path())).unwrap();
    let limits = |concurrency: u32| with("cohort", json!({ "concurrency": concurrency }));
    let now = Instant::now();
    let first = tokens.find(&signer.issue("k", &limits(1)), now).unwrap();
    let open = first.enter(now).unwrap();
    let second = signer.issue("k", &with("exp", json!(seconds_from_now(1200))));
    tokens.find(&second, now).unwrap().enter(now).unwrap();
    let third = tokens.find(&signer.issue("k", &limits(1)), now).unwrap();
    assert_eq!(third.enter(now).unwrap_err().what, "requests at once");
    drop(open);
    third.enter(now).unwrap();
    let mut bob = limits(1);
    bob["sub"] = json!("bob");
    tokens.find(&signer.issue("k", &bob), now).unwrap().enter(now).unwrap();
}

#[test]
fn keys_for_something_else_are_passed_over_and_wrong_ones_are_named() {
    let signer = Signer::ed25519();
    let mut encryption = Signer::p256().public("enc");
    encryption["use"] = json!("enc");
    let mut pss = Signer::rsa().public("pss");
    pss["alg"] = json!("PS256");
    let p384 =
        json!({ "kty": "EC", "crv": "P-384", "kid": "p384", "x": encode(&[1; 48]), "y": encode(&[2; 48]) });
    let good = file(&[encryption.clone(), pss, p384, signer.public("k")]);
    let tokens = Tokens::open(rules(good.path())).unwrap();
    tokens.find(&signer.issue("k", &claims()), Instant::now()).unwrap();

    let open = |keys: &[Value]| {
        let file = file(keys);
        let error = Tokens::open(rules(file.path())).unwrap_err().to_string();
        assert!(error.contains(&file.path().display().to_string()), "{error}");
        error
    };
    let none = open(&[encryption]);
    assert!(none.contains("has no public key for signatures by RS256, ES256 or EdDSA"), "{none}");
    let secret = open(&[json!({ "kty": "oct", "kid": "s", "k": encode(b"hush hush") })]);
    assert!(
        secret.contains("key 0 (\"s\"): is a shared secret (oct)") && !secret.contains("hush"),
        "{secret}"
    );
    let twice = open(&[signer.public("k"), Signer::ed25519().public("k")]);
    assert!(twice.contains("key 1 (\"k\"): has the name (kid) of an earlier one"), "{twice}");
    let mut short = Signer::rsa().public("r");
    short["n"] = json!(encode(&[0xff; 128]));
    let short = open(&[short]);
    assert!(short.contains("an RSA key that does not have 2048 to 8192 bits"), "{short}");
    let mut cut = signer.public("c");
    cut["x"] = json!(encode(&[7; 31]));
    assert!(open(&[cut]).contains("does not have the length of such a key"));

    let mut text = tempfile::NamedTempFile::new().unwrap();
    text.write_all(b"{\"keys\": [\n  top secret\n]}").unwrap();
    let error = Tokens::open(rules(text.path())).unwrap_err().to_string();
    assert!(error.contains("is no JSON Web Key Set (line 2, column ") && !error.contains("top"), "{error}");
    let error = Tokens::open(rules("/nonexistent/jwks.json".as_ref())).unwrap_err().to_string();
    assert!(error.contains("/nonexistent/jwks.json") && error.contains("No such file"), "{error}");
}

#[tokio::test]
async fn a_key_that_comes_is_believed_and_one_that_goes_is_not_without_a_restart() {
    let (old, new) = (Signer::ed25519(), Signer::p256());
    let file = file(&[old.public("old")]);
    let tokens = Tokens::open(rules(file.path())).unwrap();
    tokens.watch();
    let (of_old, of_new) = (old.issue("old", &claims()), new.issue("new", &claims()));
    tokens.find(&of_old, Instant::now()).unwrap();
    assert_eq!(refused(&tokens, &of_new), Refused::UnknownKey);
    let next = file.path().with_extension("next");
    std::fs::write(&next, json!({ "keys": [new.public("new")] }).to_string()).unwrap();
    std::fs::rename(&next, file.path()).unwrap();
    let changed = async {
        while tokens.find(&of_new, Instant::now()).is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), changed).await.unwrap();
    assert_eq!(refused(&tokens, &of_old), Refused::UnknownKey);
}

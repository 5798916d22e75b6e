//! Callers whose tokens an identity provider has signed: JSON Web Tokens, checked against the provider's public keys in a
//! file (a JSON Web Key Set). What a token may use is said by the configuration, or by a claim of the token itself: whoever
//! signs it is trusted with that.

mod subjects;
mod verify;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, JwkSet, KeyAlgorithm, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use serde::Deserialize;
use serde_json::Value;

use crate::live::{Live, read_text};
use crate::{Error, Limits, Meter};

use subjects::Subjects;

/// Bytes of a token that is looked at; real ones have one or two thousand.
const TOKEN_BYTES_MAX: usize = 8 << 10;
/// Bytes of a subject: it is kept, with what it has used.
const SUBJECT_BYTES_MAX: usize = 256;
/// Keys of one set.
const KEYS_MAX: usize = 256;
/// What a subject's name begins with, so that none is taken for an API key's.
const NAME_PREFIX: &str = "jwt:";

/// Which tokens are believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtRules {
    /// The file of the provider's public keys.
    pub jwks: PathBuf,
    /// Who must have issued a token, one of these (`iss`).
    pub issuers: Vec<String>,
    /// For whom it must be, one of these (`aud`).
    pub audiences: Vec<String>,
    /// How far clocks may be apart.
    pub leeway: Duration,
    /// The claim that says what a token may use, if it has it.
    pub limits_claim: String,
    /// What it may use where the claim says nothing.
    pub limits: Limits,
}

/// Why a token is not believed, in words its caller may read: nothing of the token is in them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is no token at all, or larger than any real one.
    #[error("it is no JSON Web Token of at most {TOKEN_BYTES_MAX} bytes")]
    NoToken,
    /// An algorithm that is not taken, `none` and those with shared secrets among them.
    #[error("it must be signed by RS256, ES256 or EdDSA, as its key is for")]
    Algorithm,
    /// No key of the file is the one it names.
    #[error("no key of the file of keys is the one it names (kid)")]
    UnknownKey,
    /// Somebody has changed it, or signed it with another key.
    #[error("its signature is wrong")]
    Signature,
    /// Its time is over.
    #[error("it has expired")]
    Expired,
    /// Its time has not come.
    #[error("it is not valid yet (nbf)")]
    NotYet,
    /// Somebody else issued it.
    #[error("it was issued by somebody else (iss)")]
    Issuer,
    /// It is for somebody else.
    #[error("it is for another audience (aud)")]
    Audience,
    /// A claim that must be there is not, or is not what it should be.
    #[error("its claim `{0}` is missing or not what it should be")]
    Claim(String),
}

/// Checks tokens, and keeps what their subjects have used.
#[derive(Debug, Clone)]
pub struct Tokens {
    rules: Arc<JwtRules>,
    keys: Arc<Live<KeySet>>,
    subjects: Arc<Subjects>,
}

/// The provider's keys by their names; one without a name has an empty one.
#[derive(Debug)]
struct KeySet(BTreeMap<String, (Algorithm, DecodingKey)>);

#[derive(Deserialize)]
struct Claims {
    sub: String,
    #[serde(flatten)]
    others: serde_json::Map<String, Value>,
}

/// What the claim of limits may say.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct LimitsClaim {
    requests_per_minute: Option<u64>,
    tokens_per_minute: Option<u64>,
    concurrency: Option<u32>,
    priority_min: Option<i32>,
}

impl Tokens {
    /// Reads the file of keys a first time.
    ///
    /// # Errors
    /// What [`Error`] says of a file, and [`Error::Content`] with what is wrong in it.
    pub fn open(rules: JwtRules) -> Result<Self, Error> {
        verify::install();
        let path = rules.jwks.clone();
        let make = move |_: Option<&KeySet>| KeySet::read(&path);
        let keys = Live::new("the keys of JSON Web Tokens", vec![rules.jwks.clone()], make)?;
        Ok(Self { rules: Arc::new(rules), keys, subjects: Arc::default() })
    }

    /// Reads the file again whenever it changes. Inside a runtime.
    pub fn watch(&self) {
        self.keys.watch();
    }

    /// Whether a bearer's text may be a token: an API key has no dots.
    #[must_use]
    pub fn looks_like_one(text: &str) -> bool {
        text.bytes().filter(|&byte| byte == b'.').count() == 2
    }

    /// Whose token this is, with what it may use and has used.
    ///
    /// # Errors
    /// Why it is not believed.
    pub fn find(&self, token: &str, now: Instant) -> Result<Meter, Refused> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(Refused::NoToken);
        }
        let header = decode_header(token).map_err(|error| refused(&error))?;
        let keys = self.keys.get();
        let (algorithm, key) = keys.find(header.kid.as_deref()).ok_or(Refused::UnknownKey)?;
        // What the token says of its algorithm only has to agree with the key: the key decides.
        if header.alg != *algorithm {
            return Err(Refused::Algorithm);
        }
        let claims: Claims =
            decode(token, key, &self.validation(*algorithm)).map_err(|error| refused(&error))?.claims;
        if claims.sub.is_empty() || claims.sub.len() > SUBJECT_BYTES_MAX {
            return Err(Refused::Claim("sub".to_owned()));
        }
        let limits = self.limits(&claims)?;
        Ok(self.subjects.meter(&format!("{NAME_PREFIX}{}", claims.sub), limits, now))
    }

    fn validation(&self, algorithm: Algorithm) -> Validation {
        let mut validation = Validation::new(algorithm);
        validation.set_issuer(&self.rules.issuers);
        validation.set_audience(&self.rules.audiences);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        validation.validate_nbf = true;
        validation.leeway = self.rules.leeway.as_secs();
        validation
    }

    fn limits(&self, claims: &Claims) -> Result<Limits, Refused> {
        let claim = &self.rules.limits_claim;
        let said = match claims.others.get(claim) {
            None => LimitsClaim::default(),
            Some(value) => LimitsClaim::deserialize(value).map_err(|_| Refused::Claim(claim.clone()))?,
        };
        let rules = &self.rules.limits;
        let limits = Limits {
            requests_per_minute: said.requests_per_minute.or(rules.requests_per_minute),
            tokens_per_minute: said.tokens_per_minute.or(rules.tokens_per_minute),
            concurrency: said.concurrency.or(rules.concurrency),
            priority_min: said.priority_min.or(rules.priority_min),
        };
        limits.check().map_err(|_| Refused::Claim(claim.clone()))?;
        Ok(limits)
    }
}

/// In our words, without anything of the token.
fn refused(error: &jsonwebtoken::errors::Error) -> Refused {
    match error.kind() {
        ErrorKind::InvalidSignature => Refused::Signature,
        ErrorKind::ExpiredSignature => Refused::Expired,
        ErrorKind::ImmatureSignature => Refused::NotYet,
        ErrorKind::InvalidIssuer => Refused::Issuer,
        ErrorKind::InvalidAudience => Refused::Audience,
        ErrorKind::InvalidAlgorithm
        | ErrorKind::InvalidAlgorithmName
        | ErrorKind::MissingAlgorithm
        | ErrorKind::UnsupportedAlgorithm => Refused::Algorithm,
        ErrorKind::MissingRequiredClaim(claim) | ErrorKind::InvalidClaimFormat(claim) => {
            Refused::Claim(claim.clone())
        }
        _ => Refused::NoToken,
    }
}

impl KeySet {
    fn read(path: &Path) -> Result<Self, Error> {
        let wrong = |reason: String| Error::Content { path: path.to_owned(), reason };
        let text = read_text(path)?;
        let set: JwkSet = serde_json::from_str(&text).map_err(|error| {
            // The message may show a part of the file; its place is enough to find it.
            wrong(format!("is no JSON Web Key Set (line {}, column {})", error.line(), error.column()))
        })?;
        if set.keys.len() > KEYS_MAX {
            return Err(wrong(format!("has {} keys; at most {KEYS_MAX}", set.keys.len())));
        }
        let mut keys = BTreeMap::new();
        for (index, jwk) in set.keys.iter().enumerate() {
            let name = jwk.common.key_id.clone().unwrap_or_default();
            let of_key = |why: &str| wrong(format!("key {index} ({name:?}): {why}"));
            let Some(algorithm) = algorithm(jwk).map_err(|why| of_key(&why))? else { continue };
            let key = DecodingKey::from_jwk(jwk).map_err(|_| of_key("is not readable"))?;
            verify::check(algorithm, &key).map_err(&of_key)?;
            if keys.insert(name.clone(), (algorithm, key)).is_some() {
                return Err(of_key("has the name (kid) of an earlier one"));
            }
        }
        if keys.is_empty() {
            return Err(wrong("has no public key for signatures by RS256, ES256 or EdDSA".to_owned()));
        }
        Ok(Self(keys))
    }

    /// The key a token names; a token that names none may mean the only one.
    fn find(&self, name: Option<&str>) -> Option<&(Algorithm, DecodingKey)> {
        match name {
            Some(name) => self.0.get(name),
            None if self.0.len() == 1 => self.0.values().next(),
            None => None,
        }
    }
}

/// The one algorithm a key is used with; `None` for a key that is for something else.
///
/// # Errors
/// For a key that must not be in such a file.
fn algorithm(jwk: &Jwk) -> Result<Option<Algorithm>, String> {
    if jwk.common.public_key_use.as_ref().is_some_and(|purpose| *purpose != PublicKeyUse::Signature) {
        return Ok(None);
    }
    let (algorithm, name) = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => (Algorithm::RS256, KeyAlgorithm::RS256),
        AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P256 => {
            (Algorithm::ES256, KeyAlgorithm::ES256)
        }
        AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => {
            (Algorithm::EdDSA, KeyAlgorithm::EdDSA)
        }
        AlgorithmParameters::OctetKey(_) => {
            return Err("is a shared secret (oct); this file is for public keys".to_owned());
        }
        _ => return Ok(None),
    };
    let same = jwk.common.key_algorithm.is_none_or(|own| own == name);
    Ok(same.then_some(algorithm))
}

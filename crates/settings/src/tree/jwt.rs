//! The part of the tree for tokens of identity providers.

use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use types::limits::PRIORITY_MAX;

use crate::check::LEEWAY_MAX_S;
use crate::strict;

/// `[router.jwt]`: callers show tokens (JSON Web Tokens) that an identity provider has signed by RS256, ES256 or EdDSA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RouterJwt {
    /// File of the provider's public keys, a JSON Web Key Set; read again when it changes. Default: no tokens are taken.
    #[serde(deserialize_with = "strict::text_option::deserialize")]
    #[schemars(with = "String", length(min = 1))]
    pub jwks_file: Option<PathBuf>,
    /// Who must have issued a token (`iss`), one of these. Needed with `jwks_file`.
    #[serde(deserialize_with = "strict::text_list::deserialize")]
    pub issuers: Vec<String>,
    /// For whom a token must be (`aud`), one of these. Needed with `jwks_file`.
    #[serde(deserialize_with = "strict::text_list::deserialize")]
    pub audiences: Vec<String>,
    /// How far the provider's clock may be from ours, in seconds.
    #[serde(with = "strict::seconds")]
    #[schemars(with = "f64", range(min = 0, max = LEEWAY_MAX_S))]
    pub leeway_s: Duration,
    /// Claim of a token that says what it may use: an object with the four keys that follow, each of which counts where it
    /// says nothing.
    #[serde(deserialize_with = "strict::text::deserialize")]
    #[schemars(length(min = 1))]
    pub limits_claim: String,
    /// Calls of one subject (`sub`) in a minute. Default: any number.
    #[serde(deserialize_with = "strict::whole_option::deserialize")]
    #[schemars(with = "u64", range(min = 1))]
    pub requests_per_minute: Option<u64>,
    /// Prompt and generated tokens of one subject in a minute. Default: any number.
    #[serde(deserialize_with = "strict::whole_option::deserialize")]
    #[schemars(with = "u64", range(min = 1))]
    pub tokens_per_minute: Option<u64>,
    /// Calls of one subject at once. Default: any number.
    #[serde(deserialize_with = "strict::whole_option::deserialize")]
    #[schemars(with = "u32", range(min = 1))]
    pub concurrency: Option<u32>,
    /// The most urgent priority that a subject may ask for; lower numbers are served first. Default: any.
    #[serde(deserialize_with = "strict::integer_option::deserialize")]
    #[schemars(with = "i32", range(min = -PRIORITY_MAX, max = PRIORITY_MAX))]
    pub priority_min: Option<i32>,
}

impl Default for RouterJwt {
    fn default() -> Self {
        Self {
            jwks_file: None,
            issuers: Vec::new(),
            audiences: Vec::new(),
            leeway_s: Duration::from_secs(30),
            limits_claim: "cohort".to_owned(),
            requests_per_minute: None,
            tokens_per_minute: None,
            concurrency: None,
            priority_min: None,
        }
    }
}

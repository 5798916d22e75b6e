//! Flags for tokens of identity providers.

use settings::{Flag, Settings};

use super::{ConfigFlags, given, shown};

/// Which tokens a router takes.
#[derive(Debug, Clone, PartialEq, Default, clap::Args)]
pub struct JwtFlags {
    /// File of an identity provider's public keys, a JSON Web Key Set; read again when it changes [default: no tokens are
    /// taken]
    #[arg(long, value_name = "FILE")]
    pub jwt_jwks_file: Option<String>,
    /// Who must have issued a token (iss), one of these; separate several with commas
    #[arg(long, value_name = "NAME,…")]
    pub jwt_issuers: Option<String>,
    /// For whom a token must be (aud), one of these; separate several with commas
    #[arg(long, value_name = "NAME,…")]
    pub jwt_audiences: Option<String>,
    /// How far the provider's clock may be from ours, in seconds [default: 30]
    #[arg(long = "jwt-leeway", value_name = "SECONDS")]
    pub jwt_leeway_s: Option<f64>,
    /// Claim of a token that says what it may use [default: cohort]
    #[arg(long, value_name = "NAME")]
    pub jwt_limits_claim: Option<String>,
    /// Calls of one subject of tokens in a minute [default: any number]
    #[arg(long, value_name = "N")]
    pub jwt_requests_per_minute: Option<u64>,
    /// Prompt and generated tokens of one subject in a minute [default: any number]
    #[arg(long, value_name = "N")]
    pub jwt_tokens_per_minute: Option<u64>,
    /// Calls of one subject at once [default: any number]
    #[arg(long, value_name = "N")]
    pub jwt_concurrency: Option<u32>,
    /// The most urgent priority that a subject may ask for; lower numbers are served first [default: any]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub jwt_priority_min: Option<i32>,
}

impl ConfigFlags for JwtFlags {
    fn flags(&self) -> Vec<Flag> {
        let (requests, tokens) = (&self.jwt_requests_per_minute, &self.jwt_tokens_per_minute);
        [
            given("--jwt-jwks-file", "router.jwt.jwks_file", self.jwt_jwks_file.as_ref()),
            given("--jwt-issuers", "router.jwt.issuers", self.jwt_issuers.as_ref()),
            given("--jwt-audiences", "router.jwt.audiences", self.jwt_audiences.as_ref()),
            given("--jwt-leeway", "router.jwt.leeway_s", self.jwt_leeway_s.as_ref()),
            given("--jwt-limits-claim", "router.jwt.limits_claim", self.jwt_limits_claim.as_ref()),
            given("--jwt-requests-per-minute", "router.jwt.requests_per_minute", requests.as_ref()),
            given("--jwt-tokens-per-minute", "router.jwt.tokens_per_minute", tokens.as_ref()),
            given("--jwt-concurrency", "router.jwt.concurrency", self.jwt_concurrency.as_ref()),
            given("--jwt-priority-min", "router.jwt.priority_min", self.jwt_priority_min.as_ref()),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

impl From<&Settings> for JwtFlags {
    fn from(settings: &Settings) -> Self {
        let jwt = &settings.router.jwt;
        let joined = |list: &[String]| (!list.is_empty()).then(|| list.join(","));
        Self {
            jwt_jwks_file: shown(jwt.jwks_file.as_deref()),
            jwt_issuers: joined(&jwt.issuers),
            jwt_audiences: joined(&jwt.audiences),
            jwt_leeway_s: Some(jwt.leeway_s.as_secs_f64()),
            jwt_limits_claim: Some(jwt.limits_claim.clone()),
            jwt_requests_per_minute: jwt.requests_per_minute,
            jwt_tokens_per_minute: jwt.tokens_per_minute,
            jwt_concurrency: jwt.concurrency,
            jwt_priority_min: jwt.priority_min,
        }
    }
}

//! What is served, and how far the cluster is with it.

use std::fmt;

use proto::{Failure, Phase, RETRY_AFTER, worker};
use types::limits::CONTEXT_TOKENS_MAX;

/// What a group says of its model, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) name: String,
    pub(crate) vocab_size: u32,
    pub(crate) context_tokens_max: u32,
    pub(crate) eos_token_ids: Vec<u32>,
    pub(crate) dtype: String,
    pub(crate) tensor_parallel: u32,
    pub(crate) config_hash: String,
}

impl Facts {
    pub(crate) fn from_wire(wire: worker::ModelFacts) -> Result<Self, String> {
        let worker::ModelFacts {
            name,
            vocab_size,
            context_tokens_max,
            eos_token_ids,
            dtype,
            tensor_parallel,
            config_hash,
        } = wire;
        if vocab_size == 0 || !(1..=CONTEXT_TOKENS_MAX).contains(&context_tokens_max) {
            return Err(format!("reports vocabulary {vocab_size} and context {context_tokens_max}"));
        }
        Ok(Self { name, vocab_size, context_tokens_max, eos_token_ids, dtype, tensor_parallel, config_hash })
    }

    /// Whether a request checked against `self` may run where `other` is served.
    pub(super) fn same_model(&self, other: &Self) -> bool {
        // Asked for every group and request; why not is asked seldom.
        (&self.name, self.vocab_size, self.context_tokens_max, &self.config_hash)
            == (&other.name, other.vocab_size, other.context_tokens_max, &other.config_hash)
    }

    /// The first thing that keeps a request checked against `self` from running where `other` is served.
    pub(crate) fn difference(&self, other: &Self) -> Option<String> {
        let pairs: [(&str, &dyn fmt::Display, &dyn fmt::Display); 4] = [
            ("model", &self.name, &other.name),
            ("vocabulary", &self.vocab_size, &other.vocab_size),
            ("longest context", &self.context_tokens_max, &other.context_tokens_max),
            ("configuration hash", &self.config_hash, &other.config_hash),
        ];
        let shown = pairs.map(|(what, own, others)| (what, own.to_string(), others.to_string()));
        let (what, own, others) = shown.into_iter().find(|(_, own, others)| own != others)?;
        Some(format!("{what} {others}, where the cluster has {own}"))
    }
}

/// How far the cluster is, as health and refusals say it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Progress {
    /// At least one group takes requests.
    Serving,
    /// Groups serve, and all of them have weight 0.
    Withheld,
    /// The most advanced group is in this phase, so many per cent of it done.
    Phase(Phase, u32),
    /// No leader answers.
    Unreachable(String),
}

impl Progress {
    /// The refusal that says why nothing is served now.
    pub(crate) fn refusal(self) -> Failure {
        match self {
            Self::Phase(phase, percent) => Failure::NotServing { phase, percent, retry_after: RETRY_AFTER },
            Self::Unreachable(why) => Failure::Unavailable { why, retry_after: RETRY_AFTER },
            Self::Withheld => Failure::Unavailable {
                why: "every group that serves has weight 0, in router.weights or cluster.weights".to_owned(),
                retry_after: RETRY_AFTER,
            },
            Self::Serving => Failure::Unavailable {
                why: "the groups that serve have just refused this request".to_owned(),
                retry_after: RETRY_AFTER,
            },
        }
    }

    /// The phase's name and percent.
    pub(crate) fn describe(&self) -> (&'static str, u32) {
        match self {
            Self::Serving => (Phase::Serving.name(), 100),
            Self::Phase(phase, percent) => (phase.name(), *percent),
            Self::Unreachable(_) => ("connecting", 0),
            Self::Withheld => ("withheld", 100),
        }
    }
}

//! Published models whose configuration is built in, so that their needs can be worked out with no checkpoint at hand.

use std::fmt;
use std::str::FromStr;

use crate::checkpoint::Files;
use crate::config::ModelConfig;
use crate::error::Error;

/// A published model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Preset {
    /// North-Mini-Code-1.0: 30.5 billion parameters.
    NorthMiniCode,
    /// The language model of Command A+ (05-2026): 218.3 billion parameters.
    CommandAPlus,
}

impl Preset {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::NorthMiniCode, Self::CommandAPlus];

    /// The name used in flags.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NorthMiniCode => "north-mini-code",
            Self::CommandAPlus => "command-a-plus",
        }
    }

    /// What the model computes, read from its `config.json` as that of any checkpoint.
    ///
    /// # Errors
    /// As [`ModelConfig::from_files`]; a test reads every preset.
    pub fn config(self) -> Result<ModelConfig, Error> {
        ModelConfig::from_files(&self.files())
    }

    /// All that is built in of it: a `config.json`; no weights, no tokenizer.
    #[must_use]
    pub const fn files(self) -> Files {
        const NORTH: &[(&str, &[u8])] = &[("config.json", include_bytes!("../presets/north-mini-code.json"))];
        const COMMAND: &[(&str, &[u8])] =
            &[("config.json", include_bytes!("../presets/command-a-plus.json"))];
        Files::Embedded(match self {
            Self::NorthMiniCode => NORTH,
            Self::CommandAPlus => COMMAND,
        })
    }
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Preset {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|preset| preset.name() == text).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(" or ");
            format!("unknown preset `{text}`; use {names}")
        })
    }
}

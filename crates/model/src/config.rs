//! What a checkpoint computes, decided once when `config.json` is read.

mod fields;
mod parse;

use ops::{KvGroup, Norm, Rope, Routing};
use types::{DType, TokenId};

use crate::checkpoint::Files;
use crate::error::Error;

/// A model, with every choice made. Nothing in here is optional because a file forgot it.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// H, the residual stream's width.
    pub hidden_size: usize,
    /// Vocabulary entries.
    pub vocab_size: usize,
    /// Most positions a sequence may have.
    pub context_tokens_max: u32,
    /// Query heads over all ranks; times `head_dim` this need not be `hidden_size`.
    pub query_heads: usize,
    /// Key/value heads over all ranks; divides `query_heads`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// The one kind of normalisation used everywhere.
    pub norm: Norm,
    /// Rotary embedding of the layers that have one.
    pub rope: Rope,
    /// Keys a sliding layer sees, the query's own included.
    pub window_keys: u32,
    /// Factor on the logits.
    pub logit_scale: f32,
    /// Whether the head is the embedding table.
    pub tied_head: bool,
    /// The layers, first to last.
    pub layers: Vec<LayerConfig>,
    /// Width of dense layers' MLP; present when a layer is dense.
    pub dense_intermediate_size: Option<usize>,
    /// Experts; present when a layer is sparse.
    pub moe: Option<MoeConfig>,
    /// Tokens that end a sequence.
    pub eos_token_ids: Vec<TokenId>,
    /// Type the file announces for its weights, if it is one of ours. For sums made without a checkpoint: loading goes
    /// by the type of each tensor.
    pub stored_dtype: Option<DType>,
}

impl ModelConfig {
    /// Reads a `config.json` in any of its forms: as `cohere2_moe`, or as the `text_config` of a `cohere2_vision`
    /// model. `generation_config` is the `generation_config.json` beside it, whose stop ids win.
    ///
    /// # Errors
    /// [`Error::Json`] when a file is no JSON object; [`Error::Config`] with everything that is missing, out of
    /// range, contradictory or not implemented.
    pub fn from_json(bytes: &[u8], file_name: &str, generation_config: Option<&[u8]>) -> Result<Self, Error> {
        parse::parse(bytes, file_name, generation_config)
    }

    /// Reads the `config.json` of a checkpoint, and its `generation_config.json` if it has one.
    ///
    /// # Errors
    /// As [`ModelConfig::from_json`]; [`Error::Missing`] without a `config.json`; [`Error::Io`].
    pub fn from_files(files: &Files) -> Result<Self, Error> {
        let file = files.path(CONFIG_FILE);
        let Some(config) = files.read(CONFIG_FILE)? else { return Err(Error::Missing { file }) };
        let generation = files.read(GENERATION_FILE)?;
        Self::from_json(&config, &file, generation.as_deref())
    }

    /// The model of the first `layers` layers alone, head and final norm included: for measuring and testing shapes.
    ///
    /// # Errors
    /// [`Error::Layers`] when it has no such number of layers.
    pub fn cut(&mut self, layers: usize) -> Result<(), Error> {
        if layers == 0 || layers > self.layers.len() {
            return Err(Error::Layers { wanted: layers, found: self.layers.len() });
        }
        self.layers.truncate(layers);
        let has = |mlp| self.layers.iter().any(|layer| layer.mlp == mlp);
        let (dense, sparse) = (has(Mlp::Dense), has(Mlp::Sparse));
        self.dense_intermediate_size = self.dense_intermediate_size.filter(|_| dense);
        self.moe = self.moe.filter(|_| sparse);
        Ok(())
    }

    /// Layers whose keys and values live in `group`.
    #[must_use]
    pub fn layers_in(&self, group: KvGroup) -> usize {
        self.layers.iter().filter(|layer| layer.attention.kv_group() == group).count()
    }
}

/// What a checkpoint computes.
pub(crate) const CONFIG_FILE: &str = "config.json";
/// How it is to be sampled, and where a sequence ends.
pub(crate) const GENERATION_FILE: &str = "generation_config.json";

/// One layer: `x + attention(n) + mlp(n)` with `n = norm(x)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerConfig {
    /// Which keys its attention sees.
    pub attention: Attention,
    /// Whether queries and keys are turned by position: sliding layers, and a dense prefix that forces it.
    pub rope: bool,
    /// What follows attention.
    pub mlp: Mlp,
}

/// Reach of a layer's attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attention {
    /// The whole sequence.
    Full,
    /// The last `window_keys` positions.
    Sliding,
}

/// Kind of a layer's MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mlp {
    /// One MLP for every token.
    Dense,
    /// Routed experts, and shared ones if the model has them.
    Sparse,
}

/// The sparse layers' experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MoeConfig {
    /// Routed experts.
    pub experts: usize,
    /// How a token chooses among them.
    pub routing: Routing,
    /// Width of one routed expert.
    pub intermediate_size: usize,
    /// Experts every token passes through, fused into one MLP.
    pub shared: Option<SharedExperts>,
}

/// The fused shared experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SharedExperts {
    /// Their joint width: experts times the width of one.
    pub intermediate_size: usize,
    /// How their output joins the routed experts'.
    pub combination: Combination,
}

/// How shared and routed outputs are combined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Combination {
    /// `(routed + shared) / 2`.
    Average,
    /// `routed + shared`.
    Sum,
}

//! A rank's resident weights.

use ops::Backend;

/// All weights of one rank, on its device.
pub struct Weights<B: Backend> {
    /// [V, H]: this rank's rows of the embedding table, padded to the same count on every rank.
    pub embed: B::Weight,
    /// [V, H]: this rank's rows of an untied head; `None` when the head is `embed`.
    pub head: Option<B::Weight>,
    /// [H]
    pub final_norm: B::Weight,
    /// First to last.
    pub layers: Vec<LayerWeights<B>>,
}

/// One layer.
pub struct LayerWeights<B: Backend> {
    /// [H]
    pub norm: B::Weight,
    /// [(Q + 2K)·D, H]: q rows, then k rows, then v rows of this rank's heads.
    pub qkv: B::Weight,
    /// [H, Q·D]
    pub o: B::Weight,
    /// What follows attention.
    pub mlp: MlpWeights<B>,
}

impl<B: Backend> LayerWeights<B> {
    /// [experts, H], of a sparse layer.
    #[must_use]
    pub const fn router(&self) -> Option<&B::Weight> {
        match &self.mlp {
            MlpWeights::Dense(_) => None,
            MlpWeights::Sparse { router, .. } => Some(router),
        }
    }
}

/// Weights of a layer's MLP.
pub enum MlpWeights<B: Backend> {
    /// One MLP for every token.
    Dense(GatedMlp<B>),
    /// Routed experts.
    Sparse {
        /// [experts, H], replicated.
        router: B::Weight,
        /// [E, 2I, H]: gate rows, then up rows.
        gate_up: B::Experts,
        /// [E, H, I]
        down: B::Experts,
        /// The fused shared experts.
        shared: Option<GatedMlp<B>>,
    },
}

/// down(silu(gate(x)) · up(x))
pub struct GatedMlp<B: Backend> {
    /// [2I, H]: gate rows, then up rows.
    pub gate_up: B::Weight,
    /// [H, I]
    pub down: B::Weight,
}

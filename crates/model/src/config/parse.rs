//! `config.json` to [`ModelConfig`]. A field that selects behaviour is required wherever it matters: the defaults of
//! the library that wrote the file are wrong for these models, so a forgotten field must not fall back to them.
//! Fields that only the published files carry are checked against what is implemented; the rest cannot change the
//! computation and is ignored. `norm_type` is among the ignored: the reference chooses by `rms_norm_eps` alone.

use ops::{Norm, Rope, Routing, Scoring};
use serde_json::{Map, Value, json};
use types::limits::CONTEXT_TOKENS_MAX;
use types::{DType, TokenId};

use super::fields::{Complaints, Fields};
use super::{Attention, Combination, LayerConfig, Mlp, ModelConfig, MoeConfig, SharedExperts};
use crate::error::{Complaint, Error};
use crate::strict_json;

/// Layers of one model: ten times the deepest in use.
const LAYERS_MAX: usize = 512;
/// Widths (hidden, intermediate): twenty times the widest in use, and small enough that no product of sizes below
/// overflows 64 bits.
const WIDTH_MAX: usize = 1 << 20;
/// Vocabulary entries: four times the largest in use.
const VOCAB_MAX: usize = 1 << 20;
/// Query heads.
const HEADS_MAX: usize = 1 << 12;
/// Width of one head.
const HEAD_DIM_MAX: usize = 1 << 10;
/// Routed or shared experts of one layer.
const EXPERTS_MAX: usize = 1 << 10;
/// Stop ids a configuration may list.
const EOS_MAX: usize = 64;

const _: () = assert!(LAYERS_MAX * EXPERTS_MAX < (1 << 20));
const _: () = assert!(WIDTH_MAX * WIDTH_MAX <= 1 << 40);

/// See [`ModelConfig::from_json`].
pub(super) fn parse(bytes: &[u8], file: &str, generation: Option<&[u8]>) -> Result<ModelConfig, Error> {
    let root = strict_json::object(bytes).map_err(|reason| Error::Json { file: file.to_owned(), reason })?;
    let generation = generation
        .map(strict_json::object)
        .transpose()
        .map_err(|reason| Error::Json { file: "generation_config.json".to_owned(), reason })?;
    let mut complaints = Complaints::default();
    let config = from_objects(&root, generation.as_ref(), &mut complaints);
    match config {
        Some(config) if complaints.0.is_empty() => Ok(config),
        _ => Err(Error::Config { file: file.to_owned(), complaints: complaints.0 }),
    }
}

/// Where the fields lie: at the top, or in the `text_config` of a vision model.
struct Scopes<'a> {
    /// The language model's fields.
    text: Fields<'a>,
    /// The vision model's own fields, when there is one around the language model.
    outer: Option<Fields<'a>>,
}

fn from_objects(
    root: &Map<String, Value>,
    generation: Option<&Map<String, Value>>,
    complaints: &mut Complaints,
) -> Option<ModelConfig> {
    let scopes = language_model(root, complaints)?;
    check_implemented(&scopes, complaints);
    let text = scopes.text;
    let hidden_size = complaints.keep(text.count("hidden_size", 1, WIDTH_MAX));
    let vocab_size = complaints.keep(text.count("vocab_size", 1, VOCAB_MAX));
    let context = complaints.keep(text.count("max_position_embeddings", 1, CONTEXT_TOKENS_MAX as usize));
    let heads = heads(&text, complaints);
    let norm = complaints.keep(norm(&text));
    let theta = rope_theta(&text, complaints);
    let logit_scale = complaints.keep(text.positive("logit_scale"));
    let tied_head = complaints.keep(tied_head(&scopes));
    let eos_token_ids = complaints.keep(eos(&scopes, generation, vocab_size));
    let layers = layers(&text, complaints);
    let window = layers.as_ref().and_then(|layers| window_keys(&text, layers, context, complaints));
    let has = |kind| layers.as_ref().is_some_and(|layers| layers.iter().any(|layer| layer.mlp == kind));
    let dense =
        has(Mlp::Dense).then(|| complaints.keep(text.count("prefix_dense_intermediate_size", 1, WIDTH_MAX)));
    let moe = has(Mlp::Sparse).then(|| moe(&text, complaints));
    let (query_heads, kv_heads, head_dim) = heads?;
    Some(ModelConfig {
        hidden_size: hidden_size?,
        vocab_size: vocab_size?,
        context_tokens_max: u32::try_from(context?).ok()?,
        query_heads,
        kv_heads,
        head_dim,
        norm: norm?,
        rope: Rope { theta: theta? },
        window_keys: window?,
        logit_scale: logit_scale?,
        tied_head: tied_head?,
        layers: layers?,
        dense_intermediate_size: match dense {
            Some(width) => Some(width?),
            None => None,
        },
        moe: match moe {
            Some(moe) => Some(moe?),
            None => None,
        },
        eos_token_ids: eos_token_ids?,
        stored_dtype: stored_dtype(&scopes),
    })
}

fn language_model<'a>(root: &'a Map<String, Value>, complaints: &mut Complaints) -> Option<Scopes<'a>> {
    let top = Fields::new(root, "");
    let wrapped =
        complaints.keep(top.choice("model_type", &[("cohere2_moe", false), ("cohere2_vision", true)]))?;
    if !wrapped {
        return Some(Scopes { text: top, outer: None });
    }
    let Some(inner) = complaints.keep(top.object("text_config"))? else {
        let reason = "is missing; a cohere2_vision model keeps its language model there";
        complaints.0.push(top.complaint("text_config", reason));
        return None;
    };
    let text = Fields::new(inner, "text_config.");
    complaints.keep(text.choice("model_type", &[("cohere2_moe", ())]))?;
    Some(Scopes { text, outer: Some(top) })
}

fn check_implemented(scopes: &Scopes<'_>, complaints: &mut Complaints) {
    let implemented = [
        ("use_parallel_block", json!(true)),
        ("use_gated_activation", json!(true)),
        ("use_qk_norm", json!(false)),
        ("attention_bias", json!(false)),
        ("mlp_bias", json!(false)),
        ("hidden_act", json!("silu")),
        ("position_embedding_type", json!("rope_gptj")),
        ("rotary_pct", json!(1.0)),
        ("partial_rotary_factor", json!(1.0)),
        ("rope_scaling", Value::Null),
        ("attn_logit_softcapping", Value::Null),
        ("final_logit_softcapping", Value::Null),
        ("routed_scaling_factor", json!(1.0)),
    ];
    for (name, value) in &implemented {
        complaints.keep(scopes.text.fixed(name, value));
    }
    for scope in [Some(scopes.text), scopes.outer].into_iter().flatten() {
        complaints.keep(not_quantized(&scope));
    }
}

fn not_quantized(scope: &Fields<'_>) -> Result<(), Complaint> {
    let Some(config) = scope.get("quantization_config") else { return Ok(()) };
    let named: Vec<String> =
        ["quant_method", "format"].iter().filter_map(|key| config.get(key)).map(strict_json::kind).collect();
    let method = if named.is_empty() { "an unnamed method".to_owned() } else { named.join(", ") };
    let reason = format!("asks for {method}; only checkpoints stored as F32, BF16 or F16 are read");
    Err(scope.complaint("quantization_config", reason))
}

/// Query heads, key/value heads and head dimension.
fn heads(text: &Fields<'_>, complaints: &mut Complaints) -> Option<(usize, usize, usize)> {
    let query = complaints.keep(text.count("num_attention_heads", 1, HEADS_MAX));
    let kv = complaints.keep(text.count("num_key_value_heads", 1, HEADS_MAX));
    let dim = complaints.keep(text.count("head_dim", 2, HEAD_DIM_MAX));
    if let Some(odd) = dim.filter(|dim| dim % 2 != 0) {
        let reason = format!("is {odd}; it must be even, because rotary embedding turns pairs");
        complaints.0.push(text.complaint("head_dim", reason));
    }
    let (query, kv, dim) = (query?, kv?, dim?);
    if query % kv != 0 {
        let reason = format!("is {query}; it must be a multiple of num_key_value_heads, which is {kv}");
        complaints.0.push(text.complaint("num_attention_heads", reason));
    }
    Some((query, kv, dim))
}

/// An `rms_norm_eps` selects RMSNorm, its absence LayerNorm: `layer_norm_eps` is written by both kinds of model.
fn norm(text: &Fields<'_>) -> Result<Norm, Complaint> {
    if text.get("rms_norm_eps").is_some() {
        return text.positive("rms_norm_eps").map(|eps| Norm::Rms { eps });
    }
    text.positive("layer_norm_eps").map(|eps| Norm::Layer { eps })
}

fn rope_theta(text: &Fields<'_>, complaints: &mut Complaints) -> Option<f32> {
    let parameters = complaints.keep(text.object("rope_parameters"))?;
    let Some(parameters) = parameters else { return complaints.keep(text.positive("rope_theta")) };
    let inner = Fields::new(parameters, "rope_parameters.");
    complaints.keep(inner.fixed("rope_type", &json!("default")));
    complaints.keep(inner.fixed("partial_rotary_factor", &json!(1.0)));
    let known = ["rope_type", "rope_theta", "partial_rotary_factor"];
    for name in inner.names().filter(|name| !known.contains(name)) {
        let reason = "is not implemented; only plain rotary embedding (rope_type, rope_theta) is";
        complaints.0.push(inner.complaint(name, reason));
    }
    let theta = complaints.keep(inner.positive("rope_theta"))?;
    if text.get("rope_theta").is_some() {
        let outer = complaints.keep(text.positive("rope_theta"))?;
        if outer != theta {
            let reason = format!("is {outer}, and rope_parameters.rope_theta is {theta}; they must agree");
            complaints.0.push(text.complaint("rope_theta", reason));
        }
    }
    Some(theta)
}

/// Null means tied, as in the published files; a file without the field in any scope says nothing, and is refused.
fn tied_head(scopes: &Scopes<'_>) -> Result<bool, Complaint> {
    const NAMES: [&str; 2] = ["tie_word_embeddings", "use_embedding_sharing"];
    let scoped: Vec<Fields<'_>> = [scopes.outer, Some(scopes.text)].into_iter().flatten().collect();
    let mut tied = None;
    for scope in &scoped {
        for name in NAMES.into_iter().filter(|name| scope.get(name).is_some()) {
            let found = scope.flag(name)?;
            if tied.is_some_and(|earlier| earlier != found) {
                let reason = format!("is {found}, and another field says {}; they must agree", !found);
                return Err(scope.complaint(name, reason));
            }
            tied = Some(found);
        }
    }
    let mentioned = scoped.iter().any(|scope| scope.has(NAMES[0]));
    match tied {
        Some(tied) => Ok(tied),
        None if mentioned => Ok(true),
        None => {
            Err(scoped[0]
                .complaint(NAMES[0], "is missing; it must be true, false or null (which means tied)"))
        }
    }
}

/// Stop ids: a number or a list, from the generation configuration when it has them.
fn eos(
    scopes: &Scopes<'_>,
    generation: Option<&Map<String, Value>>,
    vocab_size: Option<usize>,
) -> Result<Vec<TokenId>, Complaint> {
    const NAME: &str = "eos_token_id";
    let generation = generation.map(|map| Fields::new(map, "generation_config.json: "));
    let places = [generation, scopes.outer, Some(scopes.text)];
    let found = places.into_iter().flatten().find_map(|scope| scope.get(NAME).map(|value| (scope, value)));
    let Some((scope, value)) = found else {
        let reason =
            "is missing, there and in generation_config.json; it must be a token id or a list of them";
        return Err(scopes.text.complaint(NAME, reason));
    };
    let items = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    if items.is_empty() || items.len() > EOS_MAX {
        return Err(scope.complaint(NAME, format!("lists {} ids; it must list 1 to {EOS_MAX}", items.len())));
    }
    let vocab = vocab_size.unwrap_or(VOCAB_MAX);
    let id = |item: &Value| {
        let number = item.as_u64().and_then(|id| u32::try_from(id).ok()).filter(|id| (*id as usize) < vocab);
        number.map(TokenId).ok_or_else(|| {
            let reason =
                format!("holds {}; token ids are whole numbers below {vocab}", strict_json::kind(item));
            scope.complaint(NAME, reason)
        })
    };
    items.iter().map(id).collect()
}

/// A type we do not know is no complaint here: the tensors say what they are, and are refused by name.
fn stored_dtype(scopes: &Scopes<'_>) -> Option<DType> {
    let scoped = [Some(scopes.text), scopes.outer].into_iter().flatten();
    let named = scoped.flat_map(|scope| ["dtype", "torch_dtype"].map(|name| scope.get(name)));
    named.flatten().find_map(|value| value.as_str()?.parse().ok())
}

fn layers(text: &Fields<'_>, complaints: &mut Complaints) -> Option<Vec<LayerConfig>> {
    let count = complaints.keep(text.count("num_hidden_layers", 1, LAYERS_MAX))?;
    let mlps = mlp_kinds(text, count, complaints)?;
    let explicit = complaints.keep(text.list("layer_types", count, &ATTENTIONS))?;
    let attentions = match explicit {
        Some(list) => list,
        None => derived_attention(text, &mlps, complaints)?,
    };
    let full_dense =
        |(attention, mlp): (&Attention, &Mlp)| *attention == Attention::Full && *mlp == Mlp::Dense;
    let forced = if attentions.iter().zip(&mlps).any(full_dense) {
        complaints.keep(text.count("prefix_dense_sliding_window_pattern", 1, LAYERS_MAX))? == 1
    } else {
        false
    };
    let layer = |(attention, mlp)| LayerConfig {
        attention,
        rope: attention == Attention::Sliding || (mlp == Mlp::Dense && forced),
        mlp,
    };
    Some(attentions.into_iter().zip(mlps).map(layer).collect())
}

const ATTENTIONS: [(&str, Attention); 2] =
    [("full_attention", Attention::Full), ("sliding_attention", Attention::Sliding)];

fn mlp_kinds(text: &Fields<'_>, count: usize, complaints: &mut Complaints) -> Option<Vec<Mlp>> {
    const COUNTED: &str = "first_k_dense_replace";
    const LISTED: &str = "mlp_layer_types";
    let listed =
        complaints.keep(text.list(LISTED, count, &[("dense", Mlp::Dense), ("sparse", Mlp::Sparse)]))?;
    if text.get(COUNTED).is_none() {
        if listed.is_none() {
            let reason =
                format!("is missing, and so is {COUNTED}; one of them must say which layers are dense");
            complaints.0.push(text.complaint(LISTED, reason));
        }
        return listed;
    }
    let dense = complaints.keep(text.count(COUNTED, 0, count))?;
    let counted: Vec<Mlp> = (0..count).map(|at| if at < dense { Mlp::Dense } else { Mlp::Sparse }).collect();
    if listed.is_some_and(|listed| listed != counted) {
        let reason =
            format!("makes exactly the first {dense} layers dense, and {LISTED} does not; they must agree");
        complaints.0.push(text.complaint(COUNTED, reason));
        return None;
    }
    Some(counted)
}

/// Attention without a `layer_types`: every n-th layer is full, counted from the model's start in the dense prefix
/// and anew from the first sparse layer.
fn derived_attention(text: &Fields<'_>, mlps: &[Mlp], complaints: &mut Complaints) -> Option<Vec<Attention>> {
    let prefix = mlps.iter().take_while(|mlp| **mlp == Mlp::Dense).count();
    if mlps[prefix..].contains(&Mlp::Dense) {
        let reason = "is missing; it can be derived only when the dense layers come before all sparse ones";
        complaints.0.push(text.complaint("layer_types", reason));
        return None;
    }
    let mut run = |name: &str, count: usize| {
        if count == 0 {
            return Some(Vec::new());
        }
        let pattern = complaints.keep(text.count(name, 1, LAYERS_MAX))?;
        let kind =
            |at: usize| if (at + 1).is_multiple_of(pattern) { Attention::Full } else { Attention::Sliding };
        Some((0..count).map(kind).collect())
    };
    let first = run("prefix_dense_sliding_window_pattern", prefix);
    let rest = run("sliding_window_pattern", mlps.len() - prefix);
    Some(first?.into_iter().chain(rest?).collect())
}

fn window_keys(
    text: &Fields<'_>,
    layers: &[LayerConfig],
    context: Option<usize>,
    complaints: &mut Complaints,
) -> Option<u32> {
    let slides = layers.iter().any(|layer| layer.attention == Attention::Sliding);
    let keys = if slides {
        complaints.keep(text.count("sliding_window", 1, CONTEXT_TOKENS_MAX as usize))?
    } else {
        // No layer has a window, so it is as wide as the model can see.
        context?
    };
    u32::try_from(keys).ok()
}

fn moe(text: &Fields<'_>, complaints: &mut Complaints) -> Option<MoeConfig> {
    let experts = complaints.keep(text.count("num_experts", 1, EXPERTS_MAX));
    let top_k = complaints.keep(text.count("num_experts_per_tok", 1, EXPERTS_MAX));
    if let (Some(top_k), Some(experts)) = (top_k, experts)
        && top_k > experts
    {
        let reason = format!("is {top_k}; it must be at most num_experts, which is {experts}");
        complaints.0.push(text.complaint("num_experts_per_tok", reason));
    }
    let width = complaints.keep(text.count("intermediate_size", 1, WIDTH_MAX));
    let sigmoid =
        complaints.keep(text.choice("expert_selection_fn", &[("sigmoid", true), ("softmax", false)]));
    let scoring = match sigmoid {
        Some(true) => {
            complaints.keep(text.flag("norm_topk_prob")).map(|renormalize| Scoring::Sigmoid { renormalize })
        }
        Some(false) => Some(Scoring::Softmax),
        None => None,
    };
    let shared_experts = complaints.keep(text.count("num_shared_experts", 0, EXPERTS_MAX));
    let combination = shared_experts.filter(|count| *count > 0).map(|_| {
        let choices = [("average", Combination::Average), ("sum", Combination::Sum)];
        complaints.keep(text.choice("shared_expert_combination_strategy", &choices))
    });
    let intermediate_size = width?;
    let shared = match combination {
        Some(combination) => Some(SharedExperts {
            intermediate_size: shared_experts? * intermediate_size,
            combination: combination?,
        }),
        None => None,
    };
    shared_experts?;
    Some(MoeConfig {
        experts: experts?,
        routing: Routing { top_k: top_k?, scoring: scoring? },
        intermediate_size,
        shared,
    })
}

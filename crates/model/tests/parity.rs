//! The forward pass computes what the reference computes (transformers 5.23.0, float32, eager), on one rank and on
//! several, however a prompt is cut.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod golden;

use golden::{CASES, Golden, Output, Run, distance, load, log_probabilities};
use model::{Files, ModelConfig};
use safetensors::SafeTensors;
use types::{DType, Dispatch, ExpertSharding};

/// Largest |Δ log-probability| allowed in f32.
const LOGPROB_TOLERANCE: f64 = 2e-4;
/// Largest |Δ| of a residual stream element, relative to the stream's largest.
const HIDDEN_TOLERANCE: f64 = 1e-4;

fn check(golden: &Golden, run: &Run) {
    let outputs = golden.run(run);
    for (i, (prompt, output)) in golden.prompts.iter().zip(&outputs).enumerate() {
        let place = format!(
            "{} prompt {i} on {} ranks, experts by {}, cut {:?}",
            golden.name, run.ranks, run.experts, run.chunks
        );
        check_hidden(golden, &prompt.hidden, output, &place);
        let vocab = golden.config.vocab_size;
        let (ours, theirs) =
            (log_probabilities(&output.logits, vocab), log_probabilities(&prompt.logits, vocab));
        let off = distance(&ours, &theirs);
        assert!(off <= LOGPROB_TOLERANCE, "{place}: a log-probability is off by {off:e}");
        assert_eq!(output.greedy, prompt.greedy, "{place}: greedy tokens");
    }
}

/// Names the first layer that differs, which the logits cannot.
fn check_hidden(golden: &Golden, theirs: &[f32], output: &Output, place: &str) {
    let size = output.hidden[0].len();
    for layer in 0..golden.config.layers.len() {
        let theirs = &theirs[layer * size..(layer + 1) * size];
        let most = theirs.iter().fold(0.0_f32, |most, v| most.max(v.abs()));
        let wide = |v: &[f32]| v.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
        let off = distance(&wide(&output.hidden[layer]), &wide(theirs)) / f64::from(most);
        assert!(
            off <= HIDDEN_TOLERANCE,
            "{place}: the stream before layer {layer} is off by {off:e} of its size"
        );
    }
}

#[test]
fn one_rank_agrees_with_the_reference() {
    CASES.iter().for_each(|name| check(&load(name), &Run::whole(1)));
}

#[test]
fn two_ranks_agree_with_the_reference() {
    CASES.iter().for_each(|name| check(&load(name), &Run::whole(2)));
}

#[test]
fn four_ranks_agree_with_the_reference_also_where_they_share_key_value_heads() {
    assert!(CASES.iter().any(|name| load(name).config.kv_heads < 4), "no case replicates KV heads");
    CASES.iter().for_each(|name| check(&load(name), &Run::whole(4)));
}

#[test]
fn eight_ranks_agree_with_the_reference() {
    CASES.iter().for_each(|name| check(&load(name), &Run::whole(8)));
}

#[test]
fn whole_experts_on_each_rank_agree_with_the_reference() {
    for ranks in [1, 2, 4, 8] {
        let run = Run { experts: ExpertSharding::Expert, ..Run::whole(ranks) };
        CASES.iter().for_each(|name| check(&load(name), &run));
    }
}

/// Steps of one row leave all ranks but one without a row to route; prompts cut unevenly leave uneven slices.
#[test]
fn rows_sent_to_their_experts_agree_with_the_reference() {
    for ranks in [1, 2, 4, 8] {
        for chunks in [vec![usize::MAX], vec![3, 1, 16, 7]] {
            let run = Run { chunks, ..sent(ranks) };
            CASES.iter().for_each(|name| check(&load(name), &run));
        }
    }
}

fn sent(ranks: u32) -> Run {
    Run { experts: ExpertSharding::Expert, dispatch: Dispatch::AllToAll, ..Run::whole(ranks) }
}

#[test]
fn a_prompt_in_chunks_or_token_by_token_gives_the_same_bits_as_in_one_go() {
    for name in CASES {
        let golden = load(name);
        let whole = golden.run(&Run::whole(2));
        for chunks in [vec![1], vec![5], vec![3, 1, 16, 7]] {
            let run = Run { chunks, ..Run::whole(2) };
            check(&golden, &run);
            for (whole, cut) in whole.iter().zip(golden.run(&run)) {
                assert!(whole.logits == cut.logits, "{name}: cut {:?} changes the logits", run.chunks);
                assert_eq!(whole.greedy, cut.greedy, "{name}: cut {:?}", run.chunks);
            }
        }
    }
}

/// bf16 has 8 bits of precision: its log-probabilities scatter around the reference's, and most choices agree.
#[test]
fn bf16_stays_near_the_reference() {
    for name in CASES {
        let golden = load(name);
        let run = Run { dtype: DType::BF16, continued: 0, ..Run::whole(2) };
        for (prompt, output) in golden.prompts.iter().zip(golden.run(&run)) {
            let vocab = golden.config.vocab_size;
            let (ours, theirs) =
                (log_probabilities(&output.logits, vocab), log_probabilities(&prompt.logits, vocab));
            let squares: f64 = ours.iter().zip(&theirs).map(|(a, b)| (a - b) * (a - b)).sum();
            let off = (squares / ours.len() as f64).sqrt();
            assert!(off < 0.15, "{name}: bf16 log-probabilities are off by {off} (root mean square)");
        }
    }
}

/// Attention, routed and shared experts are added up before they are reduced; the embedding is one more.
#[test]
fn every_layer_takes_part_in_exactly_one_all_reduce() {
    for name in CASES {
        let golden = load(name);
        let plans = [Run::whole(2), Run { experts: ExpertSharding::Expert, ..Run::whole(2) }, sent(2)];
        for plan in plans {
            let experts = plan.experts;
            let run = Run { chunks: vec![9], continued: 3, ..plan };
            for output in golden.run(&run) {
                let expected = output.steps * (golden.config.layers.len() as u64 + 1);
                assert_eq!(
                    output.all_reduces, expected,
                    "{name}, experts by {experts}, {} steps",
                    output.steps
                );
            }
        }
    }
}

/// The same numbers under another name: a head of its own that equals the embedding.
#[test]
fn an_untied_head_is_loaded_and_used() {
    let mut golden = load("north");
    let bytes = std::fs::read(golden.directory.join("model.safetensors")).unwrap();
    let mut tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
    let embedding = tensors.iter().find(|(name, _)| name == "model.embed_tokens.weight").unwrap().1.clone();
    tensors.push(("lm_head.weight".into(), embedding));
    let untied = tempfile::tempdir().unwrap();
    let written = safetensors::serialize(tensors, None).unwrap();
    std::fs::write(untied.path().join("model.safetensors"), written).unwrap();
    let config = std::fs::read_to_string(golden.directory.join("config.json")).unwrap();
    let config = config.replace("\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false");
    std::fs::write(untied.path().join("config.json"), config).unwrap();
    golden.directory = untied.path().into();
    golden.config = ModelConfig::from_files(&Files::Directory(untied.path().into())).unwrap();
    assert!(!golden.config.tied_head);
    check(&golden, &Run::whole(2));
}

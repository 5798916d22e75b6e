//! `cohort plan`, as its users run it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::process::{Command, Output};

use serde_json::Value;

fn plan(line: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cohort"));
    command.arg("plan").args(line.split_whitespace()).env_clear().output().unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_published_model_on_two_gpus_fits_and_says_how_much_it_serves() {
    let output = plan("--preset north-mini-code --tensor-parallel 2 --memory 139GiB --context 131072 --json");
    assert!(output.status.success(), "{output:?}");
    let plan = json(&output);
    assert_eq!(plan["fits"], true);
    let ranks = plan["ranks"].as_array().unwrap();
    assert_eq!(ranks.len(), 2);
    for rank in ranks {
        let (weights, kv) = (rank["weights_bytes"].as_u64().unwrap(), rank["kv_bytes"].as_u64().unwrap());
        assert!(weights + kv <= 139 << 30, "{rank}");
        assert!(weights > 30_484_303_872, "half of two bytes for each parameter, and what is replicated");
        assert_eq!(
            rank["weights"].as_object().unwrap().values().filter_map(Value::as_u64).sum::<u64>(),
            weights
        );
    }
    assert_eq!(plan["collectives"]["all_reduces"], 50);
    assert_eq!(plan["collectives"]["all_gathers"], 1);
    assert_eq!(plan["context_tokens"], 131_072);
    let (tokens, concurrency) = (plan["kv_tokens"].as_u64().unwrap(), plan["concurrency"].as_u64().unwrap());
    assert!(concurrency > 1 && concurrency * 131_072 <= tokens, "{plan}");
}

#[test]
fn a_plan_that_does_not_fit_ends_with_the_numbers_and_with_what_would() {
    let output = plan("--preset command-a-plus --tensor-parallel 2 --memory 139GiB --json");
    assert!(!output.status.success());
    assert_eq!(json(&output)["fits"], false);
    let told = stderr(&output);
    for part in ["command-a-plus does not fit on 2 ranks", "in 139.0 GiB on each", "--tensor-parallel 4, 8"] {
        assert!(told.contains(part), "{part}: {told}");
    }
}

#[test]
fn a_plan_that_is_not_legal_ends_with_the_counts_that_do_not_divide() {
    let output = plan("--preset north-mini-code --tensor-parallel 3 --json");
    assert!(!output.status.success());
    assert_eq!(json(&output)["fits"], false);
    let told = stderr(&output);
    assert!(told.contains("32 query heads do not divide by 3 ranks"), "{told}");
    let experts = stderr(&plan("--preset north-mini-code --tensor-parallel 3 --experts expert"));
    assert!(experts.contains("128 routed experts do not divide by 3 ranks"), "{experts}");
}

#[test]
fn a_cache_that_is_given_has_to_fit_and_to_hold_a_sequence() {
    let fits = "--preset north-mini-code --memory 139GiB --kv-tokens 65536 --context 65536 --json";
    assert_eq!(json(&plan(fits))["kv_tokens"], 65_536);
    let small = plan("--preset north-mini-code --kv-tokens 4096 --context 8192");
    assert!(stderr(&small).contains("4096 tokens does not hold a sequence of 8192 tokens"), "{small:?}");
    let large = plan("--preset north-mini-code --memory 64GiB --kv-tokens 1000000");
    assert!(stderr(&large).contains("in 64.0 GiB on each"), "{large:?}");
    let long = plan("--preset north-mini-code --context 500001");
    assert!(stderr(&long).contains("1 to 500000, the model's context"), "{long:?}");
}

#[test]
fn a_checkpoint_is_planned_from_its_config_alone() {
    let directory = tempfile::tempdir().unwrap();
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/demo/config.json");
    std::fs::copy(config, directory.path().join("config.json")).unwrap();
    let line = format!("--model {} --tensor-parallel 2", directory.path().display());
    let output = plan(&line);
    assert!(output.status.success(), "{output:?}");
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(told.contains("computed in f32, weights in bf16"), "{told}");
    assert!(told.contains("7 all-reduces, 1 all-gather"), "{told}");
}

#[test]
fn subgroups_are_planned_with_all_their_ranks() {
    let line = "--preset north-mini-code --tensor-parallel 2 --data-parallel 2 --experts expert --memory 139GiB --json";
    let plan = json(&plan(line));
    assert_eq!((plan["fits"].as_bool(), plan["data_parallel"].as_u64()), (Some(true), Some(2)));
    assert_eq!(plan["dispatch"], "all-to-all");
    assert_eq!(plan["ranks"].as_array().unwrap().len(), 4);
    assert_eq!(plan["kv_tokens"].as_u64(), plan["kv_tokens_per_subgroup"].as_u64().map(|each| 2 * each));
    let costs = &plan["collectives"];
    assert_eq!(costs["all_reduces_per_layer"], 1);
    assert_eq!(costs["all_to_all_messages_per_layer"], 2 * 3);
    // Routed experts over four ranks, attention over two.
    let alone = json(&self::plan("--preset north-mini-code --tensor-parallel 2 --memory 139GiB --json"));
    let weights = |plan: &Value, kind: &str| plan["ranks"][0]["weights"][kind].as_u64().unwrap();
    assert_eq!(weights(&plan, "attention"), weights(&alone, "attention"));
    assert_eq!(2 * weights(&plan, "experts"), weights(&alone, "experts"));
}

#[test]
fn auto_sends_rows_exactly_when_sub_groups_have_rows_of_their_own() {
    let planned =
        |line: &str| json(&plan(&format!("--preset north-mini-code --json {line}")))["dispatch"].clone();
    for one in ["--tensor-parallel 1", "--tensor-parallel 4", "--tensor-parallel 4 --experts expert"] {
        assert_eq!(planned(one), "replicated", "{one}");
    }
    for several in ["--data-parallel 2", "--tensor-parallel 2 --data-parallel 4"] {
        assert_eq!(planned(&format!("{several} --experts expert")), "all-to-all", "{several}");
    }
    let asked = "--tensor-parallel 4 --experts expert --dispatch all-to-all";
    assert_eq!(planned(asked), "all-to-all", "what is asked for goes before");
}

#[test]
fn subgroups_that_cannot_work_are_refused_with_the_numbers() {
    let parts = stderr(&plan("--preset north-mini-code --data-parallel 2"));
    assert!(parts.contains("2 sub-groups share whole experts"), "{parts}");
    let line = "--preset north-mini-code --data-parallel 2 --experts expert --dispatch replicated";
    let replicated = stderr(&plan(line));
    assert!(replicated.contains("the rows of 2 sub-groups differ"), "{replicated}");
    let many =
        stderr(&plan("--preset north-mini-code --tensor-parallel 64 --data-parallel 4 --experts expert"));
    assert!(many.contains("4 sub-groups of 64 ranks are more than the 128"), "{many}");
}

/// Counts of a model of 48 sparse layers after a dense one, in which few experts have most of the choices.
fn skewed() -> String {
    let layer: Vec<u64> = (0..128).map(|expert| 1_000_000 / (expert + 1)).collect();
    let mut layers = vec![serde_json::json!([])];
    layers.extend((0..48).map(|_| serde_json::json!(layer)));
    serde_json::json!({ "format": "cohort-expert-load-1", "layers": layers }).to_string()
}

#[test]
fn a_placement_is_proposed_written_and_planned_with() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name).display().to_string();
    let (load, out) = (file("load.json"), file("placement.json"));
    std::fs::write(&load, skewed()).unwrap();
    let group = "--preset north-mini-code --tensor-parallel 4 --experts expert --json";
    let line = format!("{group} --expert-load {load} --expert-replicas 2 --placement-out {out}");
    let proposed = json(&plan(&line));
    let of = |when: &str| proposed["placement"][when]["worst_max_over_mean"].as_f64().unwrap();
    // In order, the first rank has the first 32 of 128 experts: most of a harmonic sum.
    assert!(of("before") > 2.5 && of("after") < 1.02, "{proposed}");
    assert_eq!(proposed["placement"]["experts_per_rank"], 34);
    let placed = json(&plan(&format!("{group} --expert-placement {out}")));
    let experts = |plan: &Value| plan["ranks"][0]["weights"]["experts"].as_u64().unwrap();
    assert_eq!(experts(&placed), experts(&proposed));
    assert_eq!(experts(&placed) * 32, experts(&json(&plan(group))) * 34);
    let other = plan(&format!(
        "--preset north-mini-code --tensor-parallel 8 --experts expert --expert-placement {out}"
    ));
    assert!(stderr(&other).contains("it is for 4 ranks, not 8"), "{other:?}");
    let parts = plan(&format!("--preset north-mini-code --tensor-parallel 4 --expert-load {load}"));
    assert!(stderr(&parts).contains("add --experts expert"), "{parts:?}");
}

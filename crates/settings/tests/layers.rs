//! Which layer wins.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::time::Duration;

use settings::{HttpListen, Origin, Settings, Sources};
use support::{file, flag, from_environment, from_file, toml};
use types::DType;
use worker::Device;

#[test]
fn nothing_given_means_defaults() {
    assert_eq!(Settings::load(&Sources::default()).unwrap(), Settings::default());
}

#[test]
fn the_defaults_pass_their_own_checks_when_written_out() {
    let mut text = String::new();
    for (key, value) in Settings::default().entries() {
        if !value.is_null() {
            text.push_str(&format!("{key} = {value}\n"));
        }
    }
    assert_eq!(toml(&text).unwrap(), Settings::default());
}

#[test]
fn a_file_sets_every_kind_of_key() {
    let settings = toml(
        r#"
        [model]
        path = "/models/north"
        name = "north"
        dtype = "bf16"
        device = "cpu"
        window_keys = 96
        [router]
        grpc_listen = "0.0.0.0:9000"
        http_listen = "off"
        workers = ["http://10.0.0.1:7000", "http://[::1]:7001"]
        limits.requests_max = 9
        [group]
        tensor_parallel = 4
        threads = 3
        block_size = 32
        step_timeout_s = 2.5
        [cluster]
        groups = 2
        "#,
    )
    .unwrap();
    assert_eq!(settings.model.path.as_deref(), Some(std::path::Path::new("/models/north")));
    assert_eq!(settings.model.name.as_deref(), Some("north"));
    assert_eq!((settings.model.dtype, settings.model.device), (DType::BF16, Device::Cpu));
    assert_eq!(settings.model.window_keys, Some(96));
    assert_eq!(settings.router.grpc_listen, "0.0.0.0:9000".parse().unwrap());
    assert_eq!(settings.router.http_listen, HttpListen::Off);
    assert_eq!(settings.router.workers.len(), 2);
    assert_eq!(settings.router.limits.requests_max, 9);
    assert_eq!((settings.group.tensor_parallel.get(), settings.group.threads), (4, Some(3)));
    assert_eq!(settings.group.block_size.tokens(), 32);
    assert_eq!(settings.group.step_timeout_s, Duration::from_millis(2500));
    assert_eq!(settings.cluster.groups, 2);
}

#[test]
fn yaml_reads_like_toml() {
    let yaml = file(".yaml", "group:\n  tensor_parallel: 2\n  kv_tokens: 4096\nmodel:\n  dtype: bf16\n");
    let from_yaml = Settings::load(&from_file(&yaml)).unwrap();
    let from_toml = toml("group.tensor_parallel = 2\ngroup.kv_tokens = 4096\nmodel.dtype = 'bf16'").unwrap();
    assert_eq!(from_yaml, from_toml);
}

#[test]
fn a_variable_wins_over_the_file_and_a_flag_over_both() {
    let file = file(".toml", "[group]\nkv_tokens = 1024\nrunning_max = 1\nblock_size = 8\n");
    let mut sources = from_environment(&[
        ("COHORT__GROUP__KV_TOKENS", "2048"),
        ("COHORT__GROUP__RUNNING_MAX", "2"),
        ("HOME", "/root"),
        ("COHORT_LOG", "debug"),
    ]);
    sources.files.push(file.path().to_owned());
    sources.flags.push(flag("--kv-tokens", "group.kv_tokens", "4096"));
    let group = Settings::load(&sources).unwrap().group;
    assert_eq!((group.kv_tokens, group.running_max, group.block_size.tokens()), (4096, 2, 8));
}

#[test]
fn a_list_comes_from_a_variable_with_commas() {
    let sources = from_environment(&[("COHORT__ROUTER__WORKERS", "http://a:1, http://b:2")]);
    assert_eq!(Settings::load(&sources).unwrap().router.workers, ["http://a:1", "http://b:2"]);
}

#[test]
fn a_name_that_looks_like_a_number_stays_as_it_was_typed() {
    let sources = from_environment(&[("COHORT__MODEL__NAME", "007")]);
    assert_eq!(Settings::load(&sources).unwrap().model.name.as_deref(), Some("007"));
}

#[test]
fn a_later_file_wins_over_an_earlier_one_key_by_key() {
    let base = file(".toml", "[group]\nkv_tokens = 1024\nrunning_max = 1\n");
    let site = file(".yaml", "group:\n  kv_tokens: 2048\n");
    let files = vec![base.path().to_owned(), site.path().to_owned()];
    let loaded = Settings::load_traced(&Sources { files, ..Sources::default() }).unwrap();
    assert_eq!((loaded.settings.group.kv_tokens, loaded.settings.group.running_max), (2048, 1));
    assert_eq!(loaded.origin("group.kv_tokens").to_string(), format!("{}:2", site.path().display()));
    assert_eq!(loaded.origin("group.running_max").to_string(), format!("{}:3", base.path().display()));
}

#[test]
fn every_value_knows_where_it_comes_from() {
    let mut sources = from_environment(&[("COHORT__ROUTER__LIMITS__REQUESTS_MAX", "7")]);
    sources.flags.push(flag("--groups", "cluster.groups", "3"));
    let loaded = Settings::load_traced(&sources).unwrap();
    assert_eq!(
        loaded.origin("router.limits.requests_max"),
        Origin::Variable("COHORT__ROUTER__LIMITS__REQUESTS_MAX".into())
    );
    assert_eq!(loaded.origin("cluster.groups"), Origin::Flag("--groups"));
    assert_eq!(loaded.origin("group.kv_tokens"), Origin::Default);
}

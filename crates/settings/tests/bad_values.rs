//! Values that do not fit their keys.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use settings::{Error, Settings, Sources};
use support::{complaints, file, flag, from_file, wrong};

#[test]
fn ten_mistakes_list_ten() {
    let found = wrong(
        r#"
        [model]
        dtype = "f16"
        device = "tpu"
        nmae = "x"
        [router]
        grpc_listen = "localhost"
        http_listen = "yes"
        workers = ["10.0.0.1:7000"]
        [group]
        tensor_parallel = 0
        block_size = 5000
        kv_tokens = -1
        [cluster]
        groups = 0
        "#,
    );
    assert_eq!(found.len(), 10, "{found:#?}");
}

#[test]
#[allow(clippy::too_many_lines, reason = "a table, which grows with the keys")]
fn each_bad_value_is_refused_with_its_key() {
    let cases = [
        ("model.dtype = 'f16'", "model.dtype: \"f16\": unknown dtype `f16`; use f32 or bf16"),
        ("model.device = 'gpu'", "model.device: unknown device \"gpu\"; use auto, cpu or cuda"),
        ("model.path = ''", "model.path: must not be empty; leave the key out instead"),
        ("model.name = 5", "model.name: invalid type: integer `5`, expected text in quotes"),
        ("model.window_keys = 0", "model.window_keys: must be between 1 and 16777216, not 0"),
        (
            "group.kv_tokens = 1.5",
            "group.kv_tokens: invalid type: floating point `1.5`, expected a whole number",
        ),
        ("group.kv_tokens = true", "group.kv_tokens: invalid type: boolean `true`, expected a whole number"),
        ("group.kv_tokens = -1", "group.kv_tokens: must be a whole number of at least 0, not -1"),
        ("group.kv_tokens = 4294967296", "group.kv_tokens: 4294967296 is too large"),
        ("group.kv_tokens = 8", "group.kv_tokens: 8 tokens do not hold one block of 16 (group.block_size)"),
        (
            "group.tensor_parallel = 129",
            "group.tensor_parallel: tensor parallel size must be between 1 and 128",
        ),
        (
            "group.dispatch = 'sometimes'",
            "group.dispatch: \"sometimes\": unknown dispatch `sometimes`; use auto, replicated or all-to-all",
        ),
        (
            "group.dispatch = 'all-to-all'",
            "group.dispatch: all-to-all sends rows to whole experts, and group.experts is tensor; set it to expert",
        ),
        ("group.block_size = 0", "group.block_size: block size must be between 1 and 1024, not 0"),
        ("group.threads = 0", "group.threads: must be between 1 and 4096, not 0"),
        ("group.step_tokens_max = 5", "group.step_tokens_max: 5 is below group.running_max, 64"),
        ("group.step_timeout_s = 0", "group.step_timeout_s: must be between 0.001 and 86400 seconds, not 0"),
        (
            "group.step_timeout_s = -1",
            "group.step_timeout_s: must be a number of seconds of at least 0, not -1",
        ),
        (
            "group.step_timeout_s = nan",
            "group.step_timeout_s: must be a number of seconds of at least 0, not NaN",
        ),
        ("router.grpc_listen = 'x'", "router.grpc_listen: \"x\": invalid socket address syntax"),
        (
            "router.http_listen = 'x'",
            "router.http_listen: \"x\": use an address such as 127.0.0.1:8080, or off",
        ),
        (
            "router.queue.tokens_max = 0",
            "router.queue.tokens_max: must be between 1 and 17592186044416, not 0",
        ),
        (
            "router.jwt.jwks_file = 'k'\nrouter.jwt.audiences = ['a']",
            "router.jwt.issuers: is needed where router.jwt.jwks_file is set",
        ),
        ("router.jwt.audiences = ['a']", "router.jwt.audiences: is of no use without router.jwt.jwks_file"),
        ("router.jwt.leeway_s = 601", "router.jwt.leeway_s: must be between 0 and 600 seconds, not 601"),
        ("router.jwt.concurrency = 0", "router.jwt.concurrency: must be at least 1"),
        ("router.jwt.limits_claim = ''", "router.jwt.limits_claim: must not be empty"),
        ("router.jwt.priority_min = 101", "router.jwt.priority_min: must be between -100 and 100, not 101"),
        ("router.jwt.priority_min = 'x'", "router.jwt.priority_min: must be a whole number, not \"x\""),
        (
            "router.queue.wait_max_s = 0",
            "router.queue.wait_max_s: must be between 0.001 and 86400 seconds, not 0",
        ),
        (
            "router.workers = ['a:1']",
            "router.workers: \"a:1\" is not an address such as http://10.0.0.1:7000 or dns+http://groups:7000",
        ),
        ("router.workers = ['http://a:1/x']", "router.workers: \"http://a:1/x\" is not an address"),
        ("router.workers = [1]", "router.workers: invalid type: integer `1`, expected text in quotes"),
        (
            "router.http_listen = '127.0.0.1:50051'",
            "router.http_listen: is the same address as router.grpc_listen",
        ),
        (
            "group.metrics_listen = '127.0.0.1:50050'\ncluster.groups = 2",
            "group.metrics_listen: one of the groups would take 127.0.0.1:50051, which is the router's",
        ),
        (
            "group.metrics_listen = '0.0.0.0:65535'\ncluster.groups = 2",
            "group.metrics_listen: leaves no ports for 2 groups after 65535",
        ),
        ("telemetry.log_format = 'xml'", "telemetry.log_format: \"xml\": use human or json"),
        ("telemetry.sample_ratio = 1.5", "telemetry.sample_ratio: must be between 0 and 1, not 1.5"),
        ("telemetry.sample_ratio = 'all'", "telemetry.sample_ratio: must be a number, not \"all\""),
        (
            "telemetry.otlp_endpoint = 'https://a'\ntelemetry.otlp_ca = 'c'",
            "telemetry.otlp_endpoint: \"https://a\" is not an address such as http://127.0.0.1:4317",
        ),
        (
            "telemetry.otlp_endpoint = 'https://a:1'",
            "telemetry.otlp_ca: is needed where telemetry.otlp_endpoint is https://",
        ),
        (
            "telemetry.otlp_endpoint = 'http://a:1'\ntelemetry.otlp_ca = 'c'",
            "telemetry.otlp_ca: is of no use without an https:// telemetry.otlp_endpoint",
        ),
        (
            "telemetry.record_content = true",
            "telemetry.record_content: is of no use without telemetry.otlp_endpoint",
        ),
        ("cluster.groups = 0", "cluster.groups: must be between 1 and 256, not 0"),
        (
            "router.weights = ['http://a:1']",
            "router.weights: \"http://a:1\" is not an address and its weight, 0 to 100, such as http://10.0.0.1:7000=2",
        ),
        (
            "router.workers = ['http://a:1']\nrouter.weights = ['http://a:1=101']",
            "router.weights: \"http://a:1=101\" is not an address and its weight",
        ),
        (
            "router.workers = ['http://a:1']\nrouter.weights = ['http://b:1=2']",
            "router.weights: http://b:1 is not in router.workers",
        ),
        (
            "router.registration = true\nrouter.weights = ['http://b:1=2', 'http://b:1=0']",
            "router.weights: http://b:1 has two weights, 2 and 0",
        ),
        ("cluster.weights = [101]", "cluster.weights: must be between 0 and 100 each, not 101"),
        ("cluster.weights = [1, 0]", "cluster.weights: has 2 weights for 1 group(s)"),
        ("cluster.weights = ['x']", "cluster.weights: must be a whole number of at least 0, not \"x\""),
    ];
    refused(&cases);
}

#[test]
fn what_protects_nothing_alone_is_refused() {
    let cases = [
        ("router.tls.certificate = 'c'", "router.tls.certificate: is of no use without router.tls.key"),
        ("group.tls.key = 'k'", "group.tls.key: is of no use without group.tls.certificate"),
        ("group.tls.client_ca = 'a'", "group.tls.client_ca: is of no use without group.tls.certificate"),
        (
            "cluster.tls.certificate = 'c'\ncluster.tls.key = 'k'",
            "cluster.tls.certificate: is of no use without cluster.tls.ca",
        ),
        (
            "router.workers = ['https://a:1']",
            "cluster.tls.ca: is needed where router.workers has an https:// address",
        ),
        ("router.keys_file = ''", "router.keys_file: must not be empty; leave the key out instead"),
    ];
    refused(&cases);
}

#[test]
fn each_parallel_plan_that_cannot_work_is_refused_with_the_numbers() {
    refused(&[
        ("group.data_parallel = 0", "group.data_parallel: must be between 1 and 128, not 0"),
        (
            "group.data_parallel = 2",
            "group.experts: 2 sub-groups share whole experts, and group.experts is tensor; set it to expert",
        ),
        (
            "group = { data_parallel = 2, experts = 'expert', dispatch = 'replicated' }",
            "group.dispatch: the rows of 2 sub-groups differ, so they must be sent: set all-to-all or auto",
        ),
        (
            "group = { data_parallel = 64, tensor_parallel = 4, experts = 'expert' }",
            "group.data_parallel: 64 sub-groups of 4 ranks are more than the 128 a group may have",
        ),
        (
            "group.expert_placement = 'place.json'",
            "group.expert_placement: place.json places whole experts, and group.experts is tensor",
        ),
        ("group.hosts = ['a b']", "group.hosts: \"a b\" is not a host such as 10.0.0.1"),
    ]);
}

fn refused(cases: &[(&str, &str)]) {
    for (text, expected) in cases {
        let found = wrong(text);
        assert_eq!(found.len(), 1, "{text}: {found:#?}");
        assert!(found[0].starts_with(expected), "{text}: {}", found[0]);
    }
}

#[test]
fn a_bad_flag_is_named_as_typed() {
    let flags = vec![flag("--kv-tokens", "group.kv_tokens", "many")];
    let found = complaints(&Sources { flags, ..Sources::default() });
    assert_eq!(found[0].origin.to_string(), "--kv-tokens");
    assert_eq!(found[0].reason, "must be a whole number of at least 0, not \"many\"");
}

#[test]
fn the_message_lists_every_mistake_on_its_own_line() {
    let file = file(".toml", "cluster.groups = 0\nmodel.dtype = 'f16'\n");
    let message = Settings::load(&from_file(&file)).unwrap_err().to_string();
    let lines: Vec<_> = message.lines().collect();
    assert_eq!(lines.len(), 3);
    assert_eq!(lines[0], "2 mistakes in the configuration:");
    assert!(lines[1].ends_with("cluster.groups: must be between 1 and 256, not 0"), "{message}");
}

#[test]
fn a_file_that_cannot_be_used_is_named() {
    let broken = file(".toml", "[group\n");
    let odd = file(".ini", "");
    let large = file(".toml", &"#".repeat(2 << 20));
    let yaml = file(".yaml", "group: [1\n");
    for path in [broken.path(), odd.path(), large.path(), yaml.path(), "/nonexistent/cluster.toml".as_ref()] {
        let error =
            Settings::load(&Sources { files: vec![path.to_owned()], ..Sources::default() }).unwrap_err();
        assert!(matches!(&error, Error::File { path: named, .. } if named == path), "{error}");
    }
}

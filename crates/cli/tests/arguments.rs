//! Command lines: what children are started with is what they read, and what users type is understood.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{CommandFactory, Parser};
use cli::args::{
    ComputeFlags, ConfigFlags, FileFlag, GroupFlags, JwtFlags, LogFlags, ModelFlags, RouterFlags, TraceFlags,
};
use cli::command::{Cli, Command, group, router, worker};
use proptest::option::of;
use proptest::prelude::*;
use settings::{ClusterTls, HttpListen, RouterJwt, Settings, Sources, Tls};

fn parse(argv: &[String]) -> Cli {
    let line = std::iter::once("cohort".to_owned()).chain(argv.iter().cloned());
    Cli::try_parse_from(line).unwrap_or_else(|error| panic!("{argv:?}: {error}"))
}

fn refused(argv: &[&str]) -> String {
    let line = std::iter::once("cohort").chain(argv.iter().copied());
    Cli::try_parse_from(line).map(|cli| panic!("{cli:?}")).unwrap_or_else(|error| error.to_string())
}

fn address() -> impl Strategy<Value = SocketAddr> {
    any::<([u8; 4], u16)>().prop_map(SocketAddr::from)
}

fn http() -> impl Strategy<Value = HttpListen> {
    prop_oneof![Just(HttpListen::Off), address().prop_map(HttpListen::At)]
}

fn file() -> impl Strategy<Value = FileFlag> {
    prop::collection::vec("[ -~]{1,12}", 0..3)
        .prop_map(|paths| FileFlag { config: paths.into_iter().map(PathBuf::from).collect() })
}

fn model() -> impl Strategy<Value = ModelFlags> {
    let preset = of(prop_oneof![Just("north-mini-code"), Just("command-a-plus")].prop_map(str::to_owned));
    let format = of(prop_oneof![Just("checkpoint"), Just("dummy")].prop_map(str::to_owned));
    (of("[ -~]{1,12}"), of("[ -~]{1,12}"), preset, format, any::<Option<u32>>()).prop_map(
        |(model, model_name, preset, load_format, layers)| {
            // The two are refused together.
            let preset = preset.filter(|_| model.is_none());
            ModelFlags { model, preset, load_format, layers, model_name }
        },
    )
}

fn compute() -> impl Strategy<Value = ComputeFlags> {
    let dtype = prop_oneof![Just("f32"), Just("bf16")].prop_map(str::to_owned);
    let device = prop_oneof![Just("auto"), Just("cpu"), Just("cuda")].prop_map(str::to_owned);
    (of(dtype), of(device), any::<(Option<bool>, Option<u32>)>()).prop_map(
        |(dtype, device, (check_numerics, window_keys))| ComputeFlags {
            dtype,
            device,
            check_numerics,
            window_keys,
        },
    )
}

fn group_flags() -> impl Strategy<Value = GroupFlags> {
    let seconds = || of(0.0..1e6_f64);
    let counts = any::<([Option<u32>; 8], Option<usize>)>();
    let experts = of(prop_oneof![Just("tensor".to_owned()), Just("expert".to_owned())]);
    let dispatch =
        of(prop_oneof![Just("auto"), Just("replicated"), Just("all-to-all")].prop_map(str::to_owned));
    let (experts, spans) = (
        (experts, dispatch, of("[ -~]{1,12}"), of(http())),
        (seconds(), seconds(), seconds(), of("[ -~]{1,12}")),
    );
    (counts, experts, spans).prop_map(|((counts, threads), experts, (boot, step, drain, fault))| GroupFlags {
        tensor_parallel: counts[0],
        data_parallel: counts[7],
        experts: experts.0,
        dispatch: experts.1,
        expert_placement: experts.2.clone(),
        threads,
        kv_tokens: counts[1],
        block_size: counts[2],
        step_tokens_max: counts[3],
        running_max: counts[4],
        waiting_requests_max: counts[5],
        waiting_tokens_max: counts[6],
        metrics_listen: experts.3,
        rank_metrics_listen: experts.3,
        group_tls_certificate: experts.2.clone(),
        group_tls_key: experts.2.clone(),
        group_tls_client_ca: experts.2.clone(),
        routers: experts.2.clone(),
        advertise: experts.2.clone(),
        routers_ca: experts.2.clone(),
        boot_timeout_s: boot,
        step_timeout_s: step,
        drain_grace_s: drain,
        fault_dir: fault,
    })
}

/// A file's name, or none where there is no number.
fn numbered(name: &str, number: Option<u32>) -> Option<String> {
    number.map(|number| format!("{name} {number}"))
}

/// Yes or no, or nothing where there is no number.
fn oddly(number: Option<u32>) -> Option<bool> {
    number.map(|number| number % 2 == 0)
}

fn router_flags() -> impl Strategy<Value = RouterFlags> {
    let seconds = || of(0.0..1e6_f64);
    let graces = (seconds(), seconds(), seconds());
    let patience = (seconds(), seconds(), seconds(), seconds());
    let limits = any::<(Option<u32>, Option<usize>)>();
    (of(address()), of(http()), limits, graces, patience).prop_map(
        |(grpc_listen, http_listen, (requests_max, prompt_bytes_max), graces, patience)| RouterFlags {
            tls_certificate: numbered("certificate", requests_max),
            tls_key: numbered("key", requests_max),
            tls_client_ca: numbered("client ca", requests_max),
            keys_file: numbered("keys", requests_max),
            jwt: JwtFlags {
                jwt_jwks_file: numbered("jwks", requests_max),
                jwt_issuers: numbered("issuer", requests_max),
                jwt_audiences: numbered("audience", requests_max),
                jwt_leeway_s: graces.0,
                jwt_limits_claim: numbered("claim", requests_max),
                jwt_requests_per_minute: requests_max.map(u64::from),
                jwt_tokens_per_minute: requests_max.map(u64::from),
                jwt_concurrency: requests_max,
                jwt_priority_min: requests_max.map(|number| -i32::from(number.to_le_bytes()[0])),
            },
            cluster_secret_file: numbered("secret", requests_max),
            cluster_tls_ca: numbered("ca", requests_max),
            cluster_tls_certificate: numbered("certificate", requests_max),
            cluster_tls_key: numbered("key", requests_max),
            grpc_listen,
            http_listen,
            requests_max,
            prompt_bytes_max,
            queue_requests_max: requests_max,
            queue_tokens_max: requests_max.map(u64::from),
            queue_bytes_max: prompt_bytes_max,
            queue_key_requests_max: requests_max,
            queue_wait_max_s: patience.0,
            http_head_timeout_s: patience.0,
            http_body_timeout_s: patience.1,
            http_write_timeout_s: patience.2,
            http_keep_alive_s: patience.3,
            connection_age_max_s: graces.0,
            registration: oddly(requests_max),
            registration_hold_s: patience.2,
            dns_interval_s: patience.0,
            dns_hold_s: patience.1,
            resume_grace_s: graces.0,
            withdraw_grace_s: graces.1,
            router_drain_grace_s: graces.2,
        },
    )
}

fn trace_flags() -> impl Strategy<Value = TraceFlags> {
    let otlp = (of("http://[a-z]{1,8}:[1-9][0-9]{0,3}"), of("[a-z]{1,8}"));
    (otlp, of(0.0..1.0_f64), any::<[Option<bool>; 2]>()).prop_map(
        |((otlp_endpoint, otlp_ca), trace_sample_ratio, [trace_follow_callers, trace_record_content])| {
            TraceFlags {
                otlp_endpoint,
                otlp_ca,
                trace_sample_ratio,
                trace_follow_callers,
                trace_record_content,
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_worker_reads_back_what_it_was_started_with(
        file in file(), rank: u32, rendezvous in address(), listen in address(), model in model(),
        compute in compute(), group in group_flags(), trace in trace_flags(), supervised: bool,
    ) {
        let leader = Some(format!("leader.of.group:{}", listen.port()));
        let args =
            worker::Args { file, rank, rendezvous, leader, listen, model, compute, group, trace, supervised };
        let Command::Worker(read) = parse(&args.to_argv()).command else { panic!("another command") };
        prop_assert_eq!(*read, args);
    }

    #[test]
    fn a_group_reads_back_what_it_was_started_with(
        file in file(), rendezvous in address(), listen in address(), model in model(), compute in compute(),
        group in group_flags(), trace in trace_flags(),
        supervised: bool,
    ) {
        let (hosts, host_index) = (vec!["10.0.0.1:7070".to_owned(), "other".to_owned()], Some(1));
        let args = group::Args {
            file, rendezvous, hosts, host_index, listen, model, compute, group, trace, supervised
        };
        let Command::Group(read) = parse(&args.to_argv()).command else { panic!("another command") };
        prop_assert_eq!(*read, args);
    }

    #[test]
    fn a_router_reads_back_what_it_was_started_with(
        file in file(), workers in prop::collection::vec("http://[a-z]{1,8}:[1-9][0-9]{0,3}", 0..4),
        weights in prop::collection::vec("http://[a-z]{1,8}:[1-9][0-9]{0,3}=[0-9]", 0..4),
        model in model(), router in router_flags(), trace in trace_flags(), supervised: bool,
    ) {
        let args = router::Args { file, workers, weights, model, router, trace, supervised };
        let Command::Router(read) = parse(&args.to_argv()).command else { panic!("another command") };
        prop_assert_eq!(*read, args);
    }
}

#[test]
fn flags_made_from_settings_give_the_same_settings() {
    let text = "model.path = '/m'\nmodel.dtype = 'bf16'\nmodel.device = 'cuda'\nmodel.window_keys = 7\n\
                group.tensor_parallel = 4\ngroup.experts = 'expert'\ngroup.dispatch = 'all-to-all'\ngroup.threads = 2\ngroup.kv_tokens = 99\ngroup.block_size = 8\n\
                group.step_tokens_max = 70\ngroup.running_max = 5\ngroup.waiting_requests_max = 6\n\
                group.waiting_tokens_max = 7\ngroup.boot_timeout_s = 0.1\ngroup.step_timeout_s = 2.5\ngroup.metrics_listen = '0.0.0.0:9100'\ngroup.rank_metrics_listen = '0.0.0.0:9200'\n\
                group.drain_grace_s = 0\nrouter.grpc_listen = '0.0.0.0:1'\nrouter.http_listen = 'off'\n\
                router.limits.requests_max = 3\nrouter.limits.prompt_bytes_max = 4\nrouter.withdraw_grace_s = 1.25\n\
                router.http.head_timeout_s = 8\nrouter.http.body_timeout_s = 9.5\nrouter.http.write_timeout_s = 10\n\
                router.queue.requests_max = 5\nrouter.queue.tokens_max = 6\nrouter.queue.bytes_max = 7\n\
                router.queue.key_requests_max = 8\nrouter.queue.wait_max_s = 9.5\nrouter.http.keep_alive_s = 0.5\nrouter.resume_grace_s = 7\n\
                router.drain_grace_s = 3\nrouter.tls.certificate = 'a'\nrouter.tls.key = 'b'\nrouter.tls.client_ca = 'c'\n\
                router.keys_file = 'd'\n\
                router.jwt.jwks_file = 'l'\nrouter.jwt.issuers = ['m', 'n']\nrouter.jwt.audiences = ['o']\nrouter.jwt.leeway_s = 2\n\
                router.jwt.limits_claim = 'p'\nrouter.jwt.requests_per_minute = 1\nrouter.jwt.tokens_per_minute = 2\n\
                router.jwt.concurrency = 3\nrouter.jwt.priority_min = -4\ngroup.tls.certificate = 'e'\ngroup.tls.key = 'f'\ngroup.tls.client_ca = 'g'\n\
                cluster.secret_file = 'k'\ncluster.tls.ca = 'h'\ncluster.tls.certificate = 'i'\ncluster.tls.key = 'j'\n\
                telemetry.log_level = 'router=debug,info'\ntelemetry.log_format = 'json'\n\
                telemetry.otlp_endpoint = 'https://a:1'\ntelemetry.otlp_ca = 'q'\ntelemetry.sample_ratio = 0.25\n\
                telemetry.follow_callers = false\ntelemetry.record_content = true";
    let mut path = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
    std::io::Write::write_all(&mut path, text.as_bytes()).unwrap();
    let settings =
        Settings::load(&Sources { files: vec![path.path().into()], ..Sources::default() }).unwrap();
    let mut flags = ModelFlags::from(&settings).flags();
    flags.extend(ComputeFlags::from(&settings).flags());
    flags.extend(GroupFlags::from(&settings).flags());
    flags.extend(RouterFlags::from(&settings).flags());
    flags.extend(TraceFlags::from(&settings).flags());
    flags.extend(LogFlags::from(&settings.telemetry).flags());
    assert_eq!(Settings::load(&Sources { flags, ..Sources::default() }).unwrap(), settings);
}

#[test]
fn every_flag_names_a_key_that_exists() {
    let keys = Settings::keys();
    let mut settings = Settings::default();
    settings.model.path = Some("m".into());
    settings.model.name = Some("m".into());
    settings.model.preset = Some(model::Preset::NorthMiniCode);
    settings.model.layers = Some(1);
    settings.model.window_keys = Some(1);
    settings.group.threads = Some(1);
    let tls = Tls { certificate: Some("c".into()), key: Some("k".into()), client_ca: Some("a".into()) };
    (settings.router.tls, settings.group.tls) = (tls.clone(), tls);
    settings.router.keys_file = Some("f".into());
    settings.router.jwt = RouterJwt {
        jwks_file: Some("j".into()),
        issuers: vec!["i".to_owned()],
        audiences: vec!["a".to_owned()],
        requests_per_minute: Some(1),
        tokens_per_minute: Some(1),
        concurrency: Some(1),
        priority_min: Some(1),
        ..RouterJwt::default()
    };
    settings.cluster.secret_file = Some("s".into());
    settings.cluster.tls =
        ClusterTls { ca: Some("a".into()), certificate: Some("c".into()), key: Some("k".into()) };
    settings.group.expert_placement = Some("p".into());
    settings.group.fault_dir = Some("p".into());
    settings.telemetry.log_level = Some("info".into());
    settings.telemetry.otlp_endpoint = Some("http://a:1".into());
    settings.telemetry.otlp_ca = Some("c".into());
    settings.group.routers = vec!["r".into()];
    (settings.group.advertise, settings.group.routers_ca) = (Some("a".into()), Some("c".into()));
    let mut flags = ModelFlags::from(&settings).flags();
    flags.extend(ComputeFlags::from(&settings).flags());
    flags.extend(GroupFlags::from(&settings).flags());
    flags.extend(RouterFlags::from(&settings).flags());
    flags.extend(TraceFlags::from(&settings).flags());
    flags.extend(LogFlags::from(&settings.telemetry).flags());
    // All but the five that are flags of one command or of none: the router's workers and their weights, the group's hosts, the
    // number of groups and the weights of those.
    assert_eq!(flags.len(), keys.len() - 5);
    for flag in flags {
        assert!(keys.contains(flag.key), "{flag:?}");
    }
}

#[test]
fn log_flags_are_passed_on() {
    let log = LogFlags { log_level: Some("debug,h2=warn".into()), log_format: Some("json".into()) };
    let mut argv = vec!["worker".to_owned()];
    argv.extend(log.to_argv());
    assert_eq!(parse(&argv).log, log);
}

#[test]
fn the_help_of_every_subcommand_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn the_commands_of_the_readme_are_understood() {
    let lines = [
        "demo",
        "up",
        "up --config cluster.toml --model /m --tensor-parallel 2 --groups 2 --device cpu --dtype bf16 --grpc-listen \
         127.0.0.1:0 --http-listen 127.0.0.1:0",
        "generate --server http://127.0.0.1:50051 --token-ids 1,2,3 --max-tokens 4 --temperature 0 --top-k 1 --top-p \
         0.5 --min-p 0.1 --seed 7 --stop a --stop b --stop-token-ids 5,6 --ignore-eos --logprobs 2 --prompt-logprobs \
         0 --timeout 2.5 --json",
        "generate --chat x --json-schema s.json --thinking-tokens-max 50",
        "chat --choice yes --choice no",
        "bench --clients 4 --json",
        "keys new alice --requests-per-minute 60 --tokens-per-minute 1000 --concurrency 2 --priority-min -3 --json",
        "bench serve --rate 3.5 --requests 10",
        "config check --config cluster.toml",
        "plan --preset north-mini-code --tensor-parallel 2 --memory 139GiB --context 131072 --json",
        "plan --model /m --config cluster.toml --experts expert",
        "up --device cuda --dtype bf16 --preset north-mini-code --load-format dummy --layers 4",
        "worker --rank 1 --tensor-parallel 2 --rendezvous 127.0.0.1:7000",
    ];
    for line in lines {
        parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
    }
}

#[test]
fn contradicting_flags_are_refused() {
    assert!(refused(&["generate", "--prompt", "a", "--chat", "b"]).contains("cannot be used with"));
    assert!(refused(&["generate", "--chat", "a", "--token-ids", "1"]).contains("cannot be used with"));
    assert!(refused(&["generate", "--prompt", "a", "--system", "b"]).contains("cannot be used with"));
    assert!(refused(&["generate", "--system", "b"]).contains("--chat <TEXT>"));
    assert!(refused(&["bench", "--clients", "2", "--rate", "1"]).contains("cannot be used with"));
    assert!(refused(&["bench", "--clients", "0"]).contains("--clients"));
    assert!(refused(&["plan", "--preset", "a", "--model", "b"]).contains("--preset"));
    assert!(refused(&["plan", "--memory", "12 parsecs"]).contains("139GiB"));
    assert!(refused(&["up", "--device", "tpu"]).contains("possible values: auto, cpu, cuda"));
}

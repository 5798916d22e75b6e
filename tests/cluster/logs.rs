//! What processes log, and what becomes of them when nobody can read it.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::support::{Cluster, cohort, tokens};

#[test]
fn every_line_of_a_request_has_its_id_at_the_router_and_at_the_leader() {
    let cluster = Cluster::up(&["--tensor-parallel=2", "--log-format=json", "--log-level=debug"]);
    let mut request = tokens(&[5, 6, 7], 3);
    request.request_id = "plum-1".into();
    cluster.generate(request).unwrap();
    let mut refused = tokens(&[5, 6, 7], 3);
    refused.request_id = "plum-2".into();
    refused.model = "another".into();
    cluster.generate(refused).unwrap_err();
    cluster.signal(Signal::TERM);
    let (_, said) = cluster.end();
    let lines: Vec<Value> = said.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let of = |crate_name: &str, id: &str| {
        let of = |line: &&Value| {
            line["target"].as_str().is_some_and(|target| target.starts_with(crate_name))
                && line["request"] == id
        };
        lines.iter().filter(of).count()
    };
    assert!(of("router", "plum-1") >= 1, "{said}");
    assert!(of("worker", "plum-1") >= 1, "{said}");
    assert!(of("router", "plum-2") >= 1, "{said}");
    for line in &lines {
        assert!(line["timestamp"].is_string() && line["level"].is_string(), "{line}");
        let about = line["message"].as_str().unwrap_or_default();
        let of_request = ["finished", "failed", "refused", "ended", "its caller left"].contains(&about);
        assert!(!of_request || line["request"].as_str().is_some_and(|id| id.starts_with("plum-")), "{line}");
    }
}

#[test]
fn the_level_and_form_of_logs_are_what_the_cluster_file_says() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("cluster.toml");
    std::fs::write(&file, "[telemetry]\nlog_level = 'router=debug,error'\nlog_format = 'json'\n").unwrap();
    let cluster = Cluster::up(&[&format!("--config={}", file.display())]);
    cluster.generate(tokens(&[5, 6, 7], 3)).unwrap();
    cluster.signal(Signal::TERM);
    let (_, said) = cluster.end();
    let lines: Vec<Value> = said.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    assert!(lines.iter().any(|line| line["level"] == "DEBUG"), "{said}");
    assert!(
        lines.iter().all(|line| line["target"].as_str().is_some_and(|target| target.starts_with("router"))),
        "{said}"
    );
}

/// A cluster whose stderr is of no use: once it serves, an answer, and its end in good order.
fn serves(mut command: Command) {
    let mut up = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(up.stdout.take().unwrap());
    let mut ready = String::new();
    said.read_line(&mut ready).unwrap();
    let address = ready.split("gRPC at ").nth(1).unwrap_or_else(|| panic!("{ready:?}, {:?}", up.wait()));
    let server = format!("http://{}", address.split([',', ' ']).next().unwrap().trim());
    let args = ["generate", "--server", &server, "--token-ids", "5,6,7", "--max-tokens", "3", "--json"];
    for _ in 0..3 {
        let answer = cohort(&args).output().unwrap();
        assert!(answer.status.success(), "{answer:?}");
    }
    kill_process(Pid::from_child(&up), Signal::TERM).unwrap();
    assert!(ended(&mut up).success());
}

fn ended(up: &mut Child) -> std::process::ExitStatus {
    up.wait().unwrap()
}

const UP: [&str; 6] = [
    "up",
    "--grpc-listen=127.0.0.1:0",
    "--http-listen=off",
    "--device=cpu",
    "--tensor-parallel=2",
    "--log-level=trace",
];

#[test]
fn a_full_disk_behind_the_log_stops_nothing() {
    let mut command = cohort(&UP);
    command.stderr(OpenOptions::new().write(true).open("/dev/full").unwrap());
    serves(command);
}

#[test]
fn a_closed_stderr_stops_nothing() {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "exec \"$0\" \"$@\" 2>&-", env!("CARGO_BIN_EXE_cohort")]).args(UP).env_clear();
    serves(command);
}

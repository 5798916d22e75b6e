//! Every group of a cluster shows what it counts.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};

use crate::support::{Cluster, tokens};

/// The sum of a counter over all groups that say where their metrics are.
fn sum(cluster: &Cluster, sample: &str) -> (usize, f64) {
    let said = cluster.said();
    let addresses: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("metrics are served"))
        .filter_map(|line| line.split("address=").nth(1))
        .collect();
    let values = addresses.iter().map(|address| {
        let mut stream = TcpStream::connect(address.trim()).unwrap();
        write!(stream, "GET /metrics HTTP/1.1\r\nhost: group\r\nconnection: close\r\n\r\n").unwrap();
        let mut page = String::new();
        stream.read_to_string(&mut page).unwrap();
        let line = page.lines().find(|line| line.starts_with(sample)).unwrap_or_else(|| panic!("{page}"));
        line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
    });
    (addresses.len(), values.sum())
}

/// Names that others chose, and our own that dashboards know by now, and what Prometheus' own habits say against them.
const KNOWN: [&str; 4] = [
    "metric names should not contain ':'",
    "vllm:iteration_tokens_total non-counter metrics should not have \"_total\" suffix",
    "cohort_expert_rows_total ",
    "cohort_host_gap_seconds non-summary metrics should not have \"quantile\" label",
];

/// A page in the form that promtool reads.
fn page(address: &str) -> String {
    let mut stream = TcpStream::connect(address.trim().trim_start_matches("http://")).unwrap();
    write!(stream, "GET /metrics HTTP/1.1\r\nhost: x\r\naccept: text/plain\r\nconnection: close\r\n\r\n")
        .unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    let (head, body) = page.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("text/plain; version=0.0.4"), "{head}");
    body.to_owned()
}

#[test]
fn every_process_has_a_page_that_prometheus_has_nothing_to_say_against() {
    let mut cluster = Cluster::up(&[
        "--tensor-parallel=2",
        "--http-listen=127.0.0.1:0",
        "--metrics-listen=127.0.0.1:0",
        "--rank-metrics-listen=127.0.0.1:0",
        "--log-level=worker=info,warn",
    ]);
    let http = cluster.http();
    cluster.generate(tokens(&[5, 6, 7], 5)).unwrap();
    cluster.wait("both ranks' metrics", |cluster| {
        (cluster.said().matches("metrics are served").count() == 2).then_some(())
    });
    let said = cluster.said();
    let ranks = said
        .lines()
        .filter(|line| line.contains("metrics are served"))
        .filter_map(|line| line.split("address=").nth(1));
    let pages: Vec<String> = ranks.chain([http.as_str()]).map(page).collect();
    let followers = pages.iter().filter(|page| page.contains("cohort_step_wait_seconds")).count();
    assert_eq!((pages.len(), followers), (3, 1));
    if Command::new("promtool").arg("--version").output().is_err() {
        // It is not on this machine.
        return;
    }
    for page in pages {
        let mut promtool = Command::new("promtool")
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        promtool.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
        let output = promtool.wait_with_output().unwrap();
        let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
        let against: Vec<&str> =
            said.lines().filter(|line| !KNOWN.iter().any(|known| line.contains(known))).collect();
        assert!(against.is_empty(), "{against:#?}\n{page}");
    }
}

#[test]
fn two_groups_on_one_machine_have_metrics_of_their_own() {
    let mut cluster =
        Cluster::up(&["--groups=2", "--metrics-listen=127.0.0.1:0", "--log-level=worker=info,warn"]);
    cluster.wait("both groups' metrics", |cluster| {
        (cluster.said().matches("metrics are served").count() == 2).then_some(())
    });
    for _ in 0..4 {
        cluster.generate(tokens(&[5, 6, 7], 5)).unwrap();
    }
    assert_eq!(sum(&cluster, "vllm:prompt_tokens_total"), (2, 12.0));
    assert_eq!(sum(&cluster, "vllm:generation_tokens_total"), (2, 20.0));
}

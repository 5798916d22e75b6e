//! Every group of a cluster shows what it counts.

use std::io::{Read, Write};
use std::net::TcpStream;

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

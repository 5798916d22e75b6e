//! What `cohort top` makes of metrics pages, recorded from a cluster of the demo model.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on says where")]

use std::time::Duration;

use cli::top::{Cluster, Page, Sample, Shown, draw};
use ratatui::Terminal;
use ratatui::backend::TestBackend;

const ROUTER: [&str; 2] = [include_str!("golden/top/router-1.txt"), include_str!("golden/top/router-2.txt")];
const GROUP: [&str; 2] = [include_str!("golden/top/group-1.txt"), include_str!("golden/top/group-2.txt")];
const SCREEN: &str = include_str!("golden/top/screen.txt");

/// Two seconds lie between the two.
fn sample(index: usize) -> Sample {
    let page = |text: &str| Ok(Page::parse(text).unwrap());
    let down = Err("Connection refused (os error 111)".to_owned());
    Sample {
        at: Duration::from_secs(2 * index as u64),
        routers: [("http://10.0.0.1:8080".to_owned(), page(ROUTER[index]))].into(),
        groups: [
            ("http://10.0.0.2:9100".to_owned(), page(GROUP[index])),
            ("http://10.0.0.3:9100".to_owned(), down),
        ]
        .into(),
    }
}

fn screen(cluster: &Cluster, shown: Shown) -> String {
    let mut terminal = Terminal::new(TestBackend::new(110, 16)).unwrap();
    terminal.draw(|frame| draw(frame, cluster, shown)).unwrap();
    let buffer = terminal.backend().buffer();
    let cells: Vec<&str> = buffer.content().iter().map(ratatui::buffer::Cell::symbol).collect();
    cells.chunks(110).map(|line| format!("{}\n", line.concat().trim_end())).collect()
}

#[test]
fn the_screen_of_a_recorded_cluster_is_as_it_was() {
    let cluster = Cluster::between(Some(&sample(0)), &sample(1));
    let drawn = screen(&cluster, Shown { ranks: true, ..Shown::default() });
    assert_eq!(drawn, SCREEN, "crates/cli/tests/golden/top/screen.txt");
}

#[test]
fn a_group_has_the_weight_that_routers_say_and_is_shown_with_none() {
    let weighed = |weights: [&str; 2]| {
        let router = |weight: &str| {
            let group = "http://10.0.0.2:7000";
            let info =
                format!("cohort_router_group_info{{group=\"{group}\",metrics=\"http://10.0.0.2:9100\"}} 1\n");
            Page::parse(&format!("{info}cohort_router_group_weight{{group=\"{group}\"}} {weight}\n"))
        };
        let mut sample = sample(1);
        sample.routers = weights.map(|weight| (weight.to_owned(), Ok(router(weight).unwrap()))).into();
        Cluster::between(None, &sample)
    };
    let of = |cluster: &Cluster| cluster.groups[0].shows.as_ref().unwrap().weight;
    assert_eq!(of(&Cluster::between(None, &sample(1))), None, "an older router does not say");
    let held = weighed(["0", "0.0"]);
    assert_eq!(of(&held), Some(0.0));
    assert!(screen(&held, Shown::default()).contains("  weight 0  "));
    // One router gives it requests.
    let used = weighed(["0", "3"]);
    assert_eq!(of(&used), Some(3.0));
    assert!(screen(&used, Shown::default()).contains("   serving  "));
}

#[test]
fn a_screen_that_is_too_small_shows_what_fits() {
    let cluster = Cluster::between(Some(&sample(0)), &sample(1));
    for (width, height) in [(1, 1), (20, 4), (300, 2)] {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, &cluster, Shown::default())).unwrap();
    }
}

#[test]
fn rates_are_what_counters_grew_by_in_the_time_between() {
    let page = |text: &str| Page::parse(text).unwrap();
    let at = |seconds, text: &str| Sample {
        at: Duration::from_secs(seconds),
        groups: [("g".to_owned(), Ok(page(text)))].into(),
        ..Sample::default()
    };
    let tokens = |before: Option<&str>, now: &str| {
        let before = before.map(|text| at(1, text));
        let cluster = Cluster::between(before.as_ref(), &at(5, now));
        cluster.groups[0].shows.as_ref().unwrap().output_tokens_per_s
    };
    let counted = |total: u32| format!("vllm:generation_tokens_total{{engine=\"0\"}} {total}\n");
    assert_eq!(tokens(Some(&counted(100)), &counted(300)), Some(50.0));
    // A group that began anew has a smaller count.
    assert_eq!(tokens(Some(&counted(100)), &counted(40)), Some(10.0));
    assert_eq!(tokens(None, &counted(300)), None);
    assert_eq!(tokens(Some(""), &counted(8)), Some(2.0));
}

#[test]
fn latencies_are_those_of_the_requests_in_between() {
    let histogram = |counts: [u32; 3]| {
        let bounds = ["0.1", "0.2", "+Inf"];
        let line = |(bound, count): (&str, u32)| {
            format!("vllm:time_to_first_token_seconds_bucket{{le=\"{bound}\",engine=\"0\"}} {count}\n")
        };
        bounds.into_iter().zip(counts).map(line).collect::<String>()
    };
    let at = |seconds, text: &str| Sample {
        at: Duration::from_secs(seconds),
        groups: [("g".to_owned(), Ok(Page::parse(text).unwrap()))].into(),
        ..Sample::default()
    };
    let before = at(0, &histogram([1000, 1000, 1000]));
    let cluster = Cluster::between(Some(&before), &at(1, &histogram([1000, 1010, 1010])));
    let latency = cluster.groups[0].shows.as_ref().unwrap().first_token;
    assert!((latency.p50_s.unwrap() - 0.15).abs() < 1e-9, "{latency:?}");
    // Nothing came in between.
    let cluster = Cluster::between(Some(&before), &at(1, &histogram([1000, 1000, 1000])));
    assert_eq!(cluster.groups[0].shows.as_ref().unwrap().first_token.p50_s, None);
}

#[test]
fn pages_are_read_with_escapes_timestamps_and_exemplars() {
    let page = Page::parse(
        "# HELP a text\n# TYPE a counter\na_total{x=\"1, }\\\"\\\\\\n\",y=\"2\"} 5 1700000000\na_total 7\n\
         b_bucket{le=\"+Inf\"} 3 # {trace=\"x\"} 0.5\nc 1e-3\nd NaN\n# EOF\n",
    )
    .unwrap();
    assert_eq!(page.sum("a_total", &[("x", "1, }\"\\\n")]), Some(5.0));
    assert_eq!(page.sum("a_total", &[]), Some(12.0));
    assert_eq!(page.sum("c", &[]), Some(0.001));
    assert_eq!(page.sum("e", &[]), None);
    assert_eq!(page.buckets("b", &[]), [(f64::INFINITY, 3.0)]);
}

#[test]
fn a_page_that_is_none_is_refused_with_its_line() {
    for text in ["a 1\n<html>\n", "a 1\nb{x=\"1} 2\n", "a 1\nb{} x\n", "a 1\nb{x=1} 2\n"] {
        let error = Page::parse(text).unwrap_err();
        assert_eq!(error.line, 2, "{text:?}");
        assert!(error.to_string().starts_with("line 2 is not a metric: "), "{error}");
    }
}

//! `cohort batch` against a real cluster: every request has one answer, however often the batch is killed.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{Cluster, cohort};

/// Longest wait for a batch to write something.
const PATIENCE: Duration = Duration::from_secs(60);

fn request(id: usize, tokens: u32) -> Value {
    let body = json!({ "prompt": "The trait Iterator", "max_tokens": tokens, "temperature": 0, "seed": id });
    json!({ "custom_id": format!("request-{id}"), "method": "POST", "url": "/v1/completions", "body": body })
}

fn write(path: &Path, lines: impl IntoIterator<Item = Value>) {
    let text: String = lines.into_iter().map(|line| format!("{line}\n")).collect();
    fs::write(path, text).unwrap();
}

/// The answers by `custom_id`; each must be there once.
fn answers(path: &Path) -> BTreeMap<String, Value> {
    let mut answers = BTreeMap::new();
    for line in fs::read_to_string(path).unwrap().lines() {
        let answer: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        let id = answer["custom_id"].as_str().unwrap().to_owned();
        assert!(answers.insert(id.clone(), answer).is_none(), "{id} is there twice");
    }
    answers
}

/// Runs a batch to its end: whether it ended well, and what it printed.
fn batch(server: &str, input: &Path, output: &Path, more: &[&str]) -> (bool, String, String) {
    let (input, output) = (input.to_str().unwrap(), output.to_str().unwrap());
    let args = [&["batch", input, output, "--server", server][..], more].concat();
    let ended = cohort(&args).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (ended.status.success(), text(&ended.stdout), text(&ended.stderr))
}

#[test]
fn a_batch_that_is_killed_goes_on_where_it_was() {
    let mut cluster = Cluster::up(&["--http-listen=127.0.0.1:0"]);
    let server = cluster.http();
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("in.jsonl"), folder.path().join("out.jsonl"));
    let chat = json!({ "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 4 });
    let wrong = json!({ "prompt": "x", "top_p": 2 });
    let special = [("chat", "/v1/chat/completions", chat), ("wrong", "/v1/completions", wrong)];
    let special =
        special.map(|(id, url, body)| json!({ "custom_id": id, "method": "POST", "url": url, "body": body }));
    write(&input, (0..60).map(|id| request(id, 200)).chain(special));

    let paths = [input.to_str().unwrap(), output.to_str().unwrap()];
    let args = ["batch", paths[0], paths[1], "--server", &server, "--in-flight", "2"];
    let mut first = cohort(&args).spawn().unwrap();
    let since = Instant::now();
    while fs::read_to_string(&output).unwrap_or_default().lines().count() < 3 {
        assert!(since.elapsed() < PATIENCE, "nothing was answered");
        assert!(first.try_wait().unwrap().is_none(), "it ended before it was killed");
        std::thread::yield_now();
    }
    first.kill().unwrap();
    first.wait().unwrap();
    let mut torn = fs::OpenOptions::new().append(true).open(&output).unwrap();
    torn.write_all(b"{\"id\":\"batch_req_1\",\"custom_id\":\"request-5").unwrap();
    let before = fs::read_to_string(&output).unwrap();
    let kept: Vec<&str> = before.lines().collect();

    let (ended_well, said, errors) = batch(&server, &input, &output, &["--json"]);
    assert!(ended_well, "{errors}");
    let summary: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(
        (&summary["requests"], &summary["left"], &summary["refused"]),
        (&json!(62), &json!(0), &json!(1))
    );
    assert_eq!(summary["answered_before"], json!(kept.len() - 1));
    let after = fs::read_to_string(&output).unwrap();
    assert!(after.lines().zip(&kept[..kept.len() - 1]).all(|(now, then)| now == *then), "a line has changed");
    let answers = answers(&output);
    assert_eq!(answers.len(), 62);
    let status = |id: &str| answers[id]["response"]["status_code"].clone();
    assert_eq!((status("chat"), status("wrong"), status("request-59")), (json!(200), json!(400), json!(200)));
    assert_eq!(answers["wrong"]["response"]["body"]["error"]["param"], "top_p");
    let text = |id: &str| answers[id]["response"]["body"]["choices"][0]["text"].clone();
    assert_eq!(text("request-0"), text("request-59"));
    assert!(answers["chat"]["response"]["request_id"].is_string());

    let (ended_well, said, _) = batch(&server, &input, &output, &[]);
    assert!(ended_well && said.contains("answered before"), "{said}");
    assert_eq!(fs::read_to_string(&output).unwrap(), after);
}

#[test]
fn a_file_with_wrong_lines_is_refused_before_anything_is_sent() {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("in.jsonl"), folder.path().join("out.jsonl"));
    let mut elsewhere = request(2, 1);
    elsewhere["url"] = json!("/v1/embeddings");
    let mut streamed = request(3, 1);
    streamed["body"]["stream"] = json!(true);
    let mut text: String =
        [request(0, 1), request(0, 1), elsewhere, streamed].iter().map(|line| format!("{line}\n")).collect();
    text.push_str("{\"custom_id\": \"x\"\n");
    fs::write(&input, text).unwrap();
    let (ended_well, _, errors) = batch("http://127.0.0.1:9", &input, &output, &[]);
    assert!(!ended_well);
    for part in
        ["line 2: custom_id `request-0`", "line 3: url is /v1/embeddings", "line 4: body.stream", "line 5:"]
    {
        assert!(errors.contains(part), "{part} is not in {errors}");
    }
    assert!(!output.exists());
}

#[test]
fn a_server_that_is_gone_ends_a_batch_with_the_answers_so_far() {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("in.jsonl"), folder.path().join("out.jsonl"));
    write(&input, (0..3).map(|id| request(id, 1)));
    let (ended_well, _, errors) = batch("http://127.0.0.1:9", &input, &output, &["--retries", "1"]);
    assert!(!ended_well && errors.contains("gave up after 2 tries"), "{errors}");
    fs::write(&output, "{\"custom_id\": \"another\"}\n").unwrap();
    let (ended_well, _, errors) = batch("http://127.0.0.1:9", &input, &output, &[]);
    assert!(!ended_well && errors.contains("`another`, which is not in"), "{errors}");
}

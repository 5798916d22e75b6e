//! A cluster that does not trust its network: TLS everywhere, keys for callers, a secret between its processes.

use std::fs;
use std::path::Path;
use std::process::Command;

use proto::worker::WatchRequest;
use proto::worker::worker_client::WorkerClient;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustix::process::Signal;
use tonic::Code;
use tonic::transport::Channel;

use crate::support::{Cluster, cohort, ended, tokens};

/// Writes an authority, `ca.crt`, and a certificate it signed, `NAME.crt` and `NAME.key`, for each name.
pub(crate) fn certificates(dir: &Path, names: &[&str]) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    fs::write(dir.join("ca.crt"), issuer.pem()).unwrap();
    for name in names {
        let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &issuer).unwrap();
        fs::write(dir.join(format!("{name}.crt")), certificate.pem()).unwrap();
        fs::write(dir.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    }
}

/// A new key and its line.
fn new_key() -> (String, String) {
    let output = cohort(&["keys", "new", "alice", "--json"]).output().unwrap();
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    (said["key"].as_str().unwrap().to_owned(), said["line"].as_str().unwrap().to_owned())
}

fn with_variables(mut command: Command, dir: &Path, key: &str) -> Command {
    command.env("COHORT_API_KEY", key).env("COHORT_CA_FILE", dir.join("ca.crt"));
    command.env("COHORT_CERTIFICATE_FILE", dir.join("caller.crt"));
    command.env("COHORT_CERTIFICATE_KEY_FILE", dir.join("caller.key"));
    command
}

#[test]
fn a_cluster_behind_certificates_and_keys_serves_those_who_have_them() {
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path(), &["router", "group", "caller"]);
    let (key, line) = new_key();
    fs::write(dir.path().join("keys.toml"), line).unwrap();
    let file = |name: &str| dir.path().join(name).display().to_string();
    let mut cluster = Cluster::up(&[
        "--http-listen=127.0.0.1:0",
        &format!("--tls-certificate={}", file("router.crt")),
        &format!("--tls-key={}", file("router.key")),
        &format!("--tls-client-ca={}", file("ca.crt")),
        &format!("--keys-file={}", file("keys.toml")),
        &format!("--group-tls-certificate={}", file("group.crt")),
        &format!("--group-tls-key={}", file("group.key")),
        &format!("--group-tls-client-ca={}", file("ca.crt")),
        &format!("--cluster-tls-ca={}", file("ca.crt")),
        &format!("--cluster-tls-certificate={}", file("router.crt")),
        &format!("--cluster-tls-key={}", file("router.key")),
    ]);
    let server = cluster.server().replace("http://", "https://");
    let args = ["generate", "--server", &server, "--token-ids", "1,2,3", "--max-tokens", "3", "--json"];
    let asked = |key: &str| with_variables(cohort(&args), dir.path(), key).output().unwrap();
    // The router has been told of its groups, and may not have reached them yet.
    let good = cluster.wait("an answer", |_| Some(asked(&key)).filter(|output| output.status.success()));
    assert!(String::from_utf8_lossy(&good.stdout).contains("token_ids"), "{good:?}");
    let refused = asked("cohort-other");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("UNAUTHENTICATED"), "{said}");

    // The same over HTTP, whose flags come before the variables.
    let server = cluster.http().replace("http://", "https://");
    let body = "{\"prompt\": \"Hi\", \"max_tokens\": 2}";
    let line = format!(
        "{{\"custom_id\": \"a\", \"method\": \"POST\", \"url\": \"/v1/completions\", \"body\": {body}}}\n"
    );
    fs::write(file("in.jsonl"), line).unwrap();
    let batch = |out: &str, flags: &[&str], key: &str| {
        let (input, out) = (file("in.jsonl"), file(out));
        let args = ["batch", &input, &out, "--server", &server, "--retries", "0", "--json"];
        let output = cohort(&[&args, flags].concat()).env("COHORT_API_KEY", key).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (text(&output.stdout), text(&output.stderr))
    };
    let (ca, certificate, own) = (file("ca.crt"), file("caller.crt"), file("caller.key"));
    let all = ["--ca", &ca, "--certificate", &certificate, "--certificate-key", &own];
    let (said, errors) = batch("good.jsonl", &all, &key);
    assert!(said.contains("\"answered\":1"), "{said}{errors}");
    assert!(fs::read_to_string(file("good.jsonl")).unwrap().contains("\"status_code\":200"));
    for (out, flags, key) in [("wrong.jsonl", &all[..], "cohort-other"), ("bare.jsonl", &all[..2], &key)] {
        let (said, errors) = batch(out, flags, key);
        assert!(said.contains("\"refused\":1"), "{said}{errors}");
        assert!(fs::read_to_string(file(out)).unwrap().contains("\"status_code\":401"));
    }
    let (_, errors) = batch("none.jsonl", &[], &key);
    assert!(errors.contains("--ca") && errors.contains("COHORT_CA_FILE"), "{errors}");
    let other = tempfile::tempdir().unwrap();
    certificates(other.path(), &[]);
    let stranger = other.path().join("ca.crt").display().to_string();
    let (_, errors) = batch("none.jsonl", &["--ca", &stranger], &key);
    assert!(errors.contains("TLS with 127.0.0.1"), "{errors}");
}

#[test]
fn worker_ports_refuse_whoever_is_not_of_their_cluster() {
    let cluster = Cluster::up(&["--log-level=info"]);
    cluster.generate(tokens(&[1, 2], 2)).unwrap();
    let lines = cluster.processes();
    let leader = lines.iter().find_map(|(_, line)| line.split("--workers=").nth(1)).unwrap();
    let leader = leader.split_whitespace().next().unwrap().to_owned();
    let status = cluster.block_on(async {
        let channel = Channel::from_shared(leader).unwrap().connect().await.unwrap();
        WorkerClient::new(channel).watch(WatchRequest::default()).await.map(drop).unwrap_err()
    });
    assert_eq!(status.code(), Code::Unauthenticated, "{status}");
    for (_, line) in &lines {
        let words = line.split([' ', '=']).filter(|word| word.len() >= 32);
        let secrets: Vec<&str> =
            words.filter(|word| word.bytes().all(|byte| byte.is_ascii_hexdigit())).collect();
        assert!(secrets.is_empty(), "a secret stands on a command line: {line}");
    }
}

#[test]
fn neither_keys_nor_secrets_nor_prompts_are_in_the_log_even_at_trace() {
    let dir = tempfile::tempdir().unwrap();
    let (key, line) = new_key();
    let (secret, prompt, wrong) =
        ("5ecret".repeat(8), "the plumtree in the garden", "cohort-mistyped-but-nearly-right");
    let file = |name: &str| dir.path().join(name).display().to_string();
    fs::write(file("keys.toml"), line).unwrap();
    fs::write(file("secret"), &secret).unwrap();
    let cluster = Cluster::up(&[
        "--log-level=trace",
        &format!("--keys-file={}", file("keys.toml")),
        &format!("--cluster-secret-file={}", file("secret")),
    ]);
    let server = cluster.server();
    let asked = |key: &str| {
        let args = ["generate", "--server", &server, "--prompt", prompt, "--max-tokens", "3", "--json"];
        cohort(&args).env("COHORT_API_KEY", key).output().unwrap().status.success()
    };
    assert!(asked(&key) && !asked(wrong));
    cluster.signal(Signal::TERM);
    let (status, said) = cluster.end();
    assert!(status.success() && said.contains("refused at the door"), "the log was not read");
    for hidden in [key.as_str(), wrong, &secret, "plumtree"] {
        let shown: Vec<&str> = said.lines().filter(|line| line.contains(hidden)).collect();
        assert!(shown.is_empty(), "{hidden} is in {shown:#?}");
    }
}

#[test]
fn files_that_cannot_be_used_stop_the_start_and_are_named() {
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path(), &["router", "other"]);
    let file = |name: &str| dir.path().join(name).display().to_string();
    fs::write(file("short"), "hunter2").unwrap();
    fs::write(file("keys.toml"), "alice = { sha256 = 'x' }").unwrap();
    let base = ["up", "--grpc-listen=127.0.0.1:0", "--http-listen=off", "--device=cpu"];
    let (certificate, key) = (format!("--tls-certificate={}", file("router.crt")), "--tls-key=");
    let (other, missing) = (format!("{key}{}", file("other.key")), format!("{key}{}", file("missing")));
    let keys = format!("--keys-file={}", file("keys.toml"));
    let table: [(&[&str], [&str; 2]); 4] = [
        (&[&certificate, &other], ["other.key is not the key of the certificate in", "router.crt"]),
        (&[&certificate, &missing], ["cannot read", "missing"]),
        (&[&certificate], ["router.tls.certificate", "is of no use without router.tls.key"]),
        (&[&keys], ["keys.toml: key \"alice\"", "64 hexadecimal digits"]),
    ];
    for (flags, names) in table {
        let args: Vec<&str> = base.iter().chain(flags).copied().collect();
        let (status, said) = ended(&args);
        assert!(!status.success(), "{flags:?} was accepted");
        assert!(names.iter().all(|name| said.contains(name)), "{flags:?}: {said}");
    }
    let mut short = cohort(&base);
    let short = short.env("COHORT__CLUSTER__SECRET_FILE", file("short")).output().unwrap();
    let said = String::from_utf8_lossy(&short.stderr).into_owned();
    assert!(!short.status.success() && said.contains("32 to 512 characters, not 7"), "{said}");
}

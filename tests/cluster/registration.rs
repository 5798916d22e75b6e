//! A router without a list, and groups that register at it: processes that nobody supervises together.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use proto::v1::GetModelInfoRequest;
use proto::v1::cohort_client::CohortClient;
use rustix::process::{Pid, Signal, kill_process};
use security::{ClientTls, Dialer};
use tonic::transport::Channel;

use crate::security::certificates;
use crate::support::{cohort, tokens};

const PATIENCE: Duration = Duration::from_secs(60);

/// A process, and what it says on stderr line by line; killed when dropped.
struct Process {
    child: Child,
    lines: Receiver<String>,
}

impl Process {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::null()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (tell, lines) = channel();
        std::thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|line| tell.send(line)));
        Self { child, lines }
    }

    /// The first line from now on with this text.
    fn says(&self, text: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(PATIENCE);
            let line = line.unwrap_or_else(|error| panic!("waiting for {text:?}: {error}"));
            if line.contains(text) {
                return line;
            }
        }
    }

    fn stop(mut self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const SECRET: &str = "0123456789abcdef0123456789abcdef";

fn router() -> (Process, String) {
    let (router, address) = router_with(&[]);
    (router, format!("http://{address}"))
}

fn router_with(flags: &[&str]) -> (Process, String) {
    let all =
        [&["router", "--registration", "--grpc-listen=127.0.0.1:0", "--http-listen=off"], flags].concat();
    let mut command = cohort(&all);
    command.env("COHORT_CLUSTER_SECRET", SECRET);
    let router = Process::start(command);
    let line = router.says("serving gRPC at ");
    (router, line.split("serving gRPC at ").nth(1).unwrap().trim().to_owned())
}

fn group(router: &str, secret: &str, flags: &[&str]) -> Process {
    let routers = format!("--routers={router}");
    let mut command = cohort(&[&["group", "--device=cpu", &routers], flags].concat());
    command.env("COHORT_CLUSTER_SECRET", secret);
    Process::start(command)
}

/// Waits until so many groups take requests.
async fn groups_ready(client: &mut CohortClient<Channel>, groups: u32) {
    loop {
        let info = client.get_model_info(GetModelInfoRequest {}).await.map(tonic::Response::into_inner);
        if info.is_ok_and(|info| (info.groups, info.groups_ready) == (groups, groups)) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[test]
fn groups_register_serve_and_leave_and_strangers_are_refused() {
    let (router, url) = router();
    let (one, other) = (group(&url, SECRET, &[]), group(&url, SECRET, &[]));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let within = |what: std::pin::Pin<Box<dyn Future<Output = ()> + '_>>| {
        runtime.block_on(async { tokio::time::timeout(PATIENCE, what).await.expect("in time") });
    };
    let mut client = runtime.block_on(CohortClient::connect(url.clone())).unwrap();
    one.says("a router uses this group");
    other.says("a router uses this group");
    within(Box::pin(groups_ready(&mut client, 2)));
    within(Box::pin(async {
        let answer = client.generate_once(tokens(&[5, 600], 3)).await.unwrap().into_inner();
        assert_eq!(answer.token_ids.len(), 3);
    }));
    let stranger = group(&url, &"x".repeat(32), &[]);
    stranger.says("its secret was not shown, or is another one");
    let unlike = group(&url, SECRET, &["--model-name=other"]);
    assert!(unlike.says("a router does not use this group").contains("model other, where the cluster has"));
    // It drains, says so, and is forgotten a while after it has ended.
    other.stop();
    within(Box::pin(groups_ready(&mut client, 1)));
    within(Box::pin(async {
        client.generate_once(tokens(&[5, 600], 3)).await.unwrap();
    }));
    // Without any router it is not ready, and says so to whoever probes.
    router.stop();
    one.says("no router uses this group any more");
}

#[test]
fn groups_with_other_plans_and_budgets_serve_one_model_together() {
    let (_router, url) = router();
    let plans: [&[&str]; 3] = [&[], &["--tensor-parallel=2"], &["--kv-tokens=8192", "--running-max=4"]];
    let groups = plans.map(|flags| group(&url, SECRET, flags));
    for group in &groups {
        group.says("a router uses this group");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut client = CohortClient::connect(url.clone()).await.unwrap();
        tokio::time::timeout(PATIENCE, groups_ready(&mut client, 3)).await.expect("in time");
    });
}

#[test]
fn a_group_behind_tls_registers_at_a_router_behind_tls_when_both_believe_each_other() {
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path(), &["router", "group", "caller"]);
    let file = |name: &str| dir.path().join(name).display().to_string();
    let (ca, other) = (file("ca.crt"), tempfile::tempdir().unwrap());
    certificates(other.path(), &[]);
    // Callers, and so groups that register, need a certificate of the same authority.
    let (_router, address) = router_with(&[
        &format!("--tls-certificate={}", file("router.crt")),
        &format!("--tls-key={}", file("router.key")),
        &format!("--tls-client-ca={ca}"),
        &format!("--cluster-tls-ca={ca}"),
        &format!("--cluster-tls-certificate={}", file("router.crt")),
        &format!("--cluster-tls-key={}", file("router.key")),
    ]);
    let url = format!("https://{address}");
    let own = [
        format!("--group-tls-certificate={}", file("group.crt")),
        format!("--group-tls-key={}", file("group.key")),
        format!("--group-tls-client-ca={ca}"),
    ];
    let own: Vec<&str> = own.iter().map(String::as_str).collect();
    let believing = |ca: &str| {
        let believes = format!("--routers-ca={ca}");
        group(&url, SECRET, &[&own[..], &[&believes]].concat())
    };
    let misled = believing(&other.path().join("ca.crt").display().to_string());
    misled.says("a router did not take the registration");
    let group = believing(&ca);
    group.says("registered at a router");
    group.says("a router uses this group");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let identity = Some((dir.path().join("caller.crt"), dir.path().join("caller.key")));
        let tls = ClientTls { ca: dir.path().join("ca.crt"), identity };
        let endpoint = tonic::transport::Endpoint::from_shared(url.clone()).unwrap();
        let mut client = CohortClient::new(Dialer::new(&tls, &[b"h2"]).unwrap().channel(&endpoint));
        tokio::time::timeout(PATIENCE, groups_ready(&mut client, 1)).await.expect("in time");
        let answer = client.generate_once(tokens(&[5, 600], 3)).await.unwrap().into_inner();
        assert_eq!(answer.token_ids.len(), 3);
    });
}

//! A running `cohort up`, its processes, and a client.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use proto::v1::cohort_client::CohortClient;
use proto::v1::{
    GenerateOnceResponse, GenerateRequest, Response, Sampling, Stopping, TokenIds, generate_request,
};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use tokio::runtime::Runtime;
use tonic::Status;
use tonic::transport::Channel;

/// Longest wait for anything that must happen; tests that pass are far from it.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn cohort(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cohort"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // Neither the developer's settings nor their log filter belong to a test.
    command.env_clear();
    // A group that is killed writes down its last steps.
    command.env("TMPDIR", env!("CARGO_TARGET_TMPDIR"));
    command
}

/// What a command that ends by itself printed on stderr, and how it ended.
pub(crate) fn ended(args: &[&str]) -> (ExitStatus, String) {
    let output = cohort(args).output().unwrap();
    (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
}

/// A cluster of the embedded model, or of `--model`.
pub(crate) struct Cluster {
    up: Child,
    said: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
    grpc: SocketAddr,
    runtime: Runtime,
}

impl Cluster {
    /// `cohort up` with these flags, ready to serve.
    pub(crate) fn up(args: &[&str]) -> Self {
        Self::up_with(&[], args)
    }

    /// As [`Cluster::up`], with variables.
    pub(crate) fn up_with(variables: &[(&str, &str)], args: &[&str]) -> Self {
        let mut all = vec!["up", "--grpc-listen=127.0.0.1:0", "--device=cpu"];
        if !args.iter().any(|arg| arg.starts_with("--http-listen")) {
            all.push("--http-listen=off");
        }
        all.extend(args);
        let mut up = cohort(&all).envs(variables.iter().copied()).spawn().unwrap();
        let said = Arc::new(Mutex::new(String::new()));
        let pipes: [Box<dyn Read + Send>; 2] =
            [Box::new(up.stdout.take().unwrap()), Box::new(up.stderr.take().unwrap())];
        let readers = pipes.map(|pipe| listen(pipe, Arc::clone(&said))).into();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let mut cluster = Self { up, said, readers, grpc: ([0, 0, 0, 0], 0).into(), runtime };
        let ready = cluster.wait_for_line("gRPC at ");
        let address = ready.split("gRPC at ").nth(1).unwrap().split([',', ' ']).next().unwrap();
        cluster.grpc = address.trim().parse().unwrap();
        cluster
    }

    /// Everything printed so far.
    pub(crate) fn said(&self) -> String {
        self.said.lock().unwrap().clone()
    }

    /// The first printed line that contains `text`, waiting for it.
    pub(crate) fn wait_for_line(&mut self, text: &str) -> String {
        self.wait(text, |cluster| cluster.said().lines().find(|line| line.contains(text)).map(str::to_owned))
    }

    /// Waits until `found` finds something.
    pub(crate) fn wait<T>(&mut self, what: &str, mut found: impl FnMut(&mut Self) -> Option<T>) -> T {
        let since = Instant::now();
        loop {
            if let Some(found) = found(self) {
                return found;
            }
            let gone = self.up.try_wait().unwrap();
            let patient = since.elapsed() < PATIENCE && gone.is_none();
            assert!(patient, "waiting for {what}: up ended {gone:?}, it said:\n{}", self.said());
            thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn client(&self) -> CohortClient<Channel> {
        let address = format!("http://{}", self.grpc);
        self.block_on(async { CohortClient::connect(address).await.unwrap() })
    }

    pub(crate) fn server(&self) -> String {
        format!("http://{}", self.grpc)
    }

    /// Where HTTP is served, for a cluster that was told to.
    pub(crate) fn http(&mut self) -> String {
        let ready = self.wait_for_line("HTTP at ");
        let address = ready.split("HTTP at ").nth(1).unwrap().split([',', ' ']).next().unwrap();
        format!("http://{}", address.trim())
    }

    /// Runs a future; one that hangs fails the test.
    pub(crate) fn block_on<F: Future>(&self, future: F) -> F::Output {
        let limited = async { tokio::time::timeout(PATIENCE, future).await };
        self.runtime.block_on(limited).expect("an answer or an error, never a hang")
    }

    /// One answer.
    pub(crate) fn generate(&self, request: GenerateRequest) -> Result<GenerateOnceResponse, Status> {
        let mut client = self.client();
        self.block_on(client.generate_once(request)).map(tonic::Response::into_inner)
    }

    /// Process ids below `up`, with their command lines.
    pub(crate) fn processes(&self) -> Vec<(u32, String)> {
        descendants(self.up.id())
    }

    /// The process id of a rank of the first group.
    pub(crate) fn rank(&self, rank: u32) -> u32 {
        let flag = format!("--rank={rank}");
        let found =
            self.processes().into_iter().find(|(_, line)| line.contains(" worker ") && line.contains(&flag));
        found.unwrap_or_else(|| panic!("no rank {rank} in {:?}", self.processes())).0
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.up), signal).unwrap();
    }

    /// Waits for `up` to end.
    pub(crate) fn end(mut self) -> (ExitStatus, String) {
        let status = self.up.wait().unwrap();
        self.readers.drain(..).for_each(|reader| reader.join().unwrap());
        (status, self.said())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // A failed test leaves nothing behind: the others end when their lifelines do.
        let _ = self.up.kill();
        let _ = self.up.wait();
    }
}

fn listen(pipe: Box<dyn Read + Send>, said: Arc<Mutex<String>>) -> JoinHandle<()> {
    thread::spawn(move || {
        for line in BufReader::new(pipe).lines() {
            let Ok(line) = line else { return };
            let mut said = said.lock().unwrap();
            said.push_str(&line);
            said.push('\n');
        }
    })
}

fn descendants(of: u32) -> Vec<(u32, String)> {
    let children = fs::read_to_string(format!("/proc/{of}/task/{of}/children"));
    // A process started from another thread is listed there.
    let tasks = fs::read_dir(format!("/proc/{of}/task"));
    let mut ids: Vec<u32> =
        children.unwrap_or_default().split_whitespace().map(|id| id.parse().unwrap()).collect();
    for task in tasks.into_iter().flatten().flatten() {
        let text = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        ids.extend(text.split_whitespace().map(|id| id.parse::<u32>().unwrap()));
    }
    ids.sort_unstable();
    ids.dedup();
    let mut all = Vec::new();
    for id in ids {
        let line = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
        all.push((id, String::from_utf8_lossy(&line).replace('\0', " ")));
        all.extend(descendants(id));
    }
    all
}

/// Sends a signal to any process.
pub(crate) fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal).unwrap();
}

/// Whether a process runs (a zombie does not).
pub(crate) fn runs(pid: u32) -> bool {
    let exists = test_kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()).is_ok();
    let status = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    exists && !status.rsplit(')').next().unwrap_or_default().trim_start().starts_with('Z')
}

/// A prompt of token ids, greedy, going on past the end of sequence.
pub(crate) fn tokens(ids: &[u32], max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(generate_request::Prompt::TokenIds(TokenIds { ids: ids.to_vec() })),
        sampling: Some(Sampling { temperature: Some(0.0), ..Sampling::default() }),
        stopping: Some(Stopping { max_tokens: Some(max_tokens), ignore_eos: true, ..Stopping::default() }),
        response: Some(Response { keep_special_tokens: true, ..Response::default() }),
        ..GenerateRequest::default()
    }
}

/// The repository.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The demo model's directory.
pub(crate) fn demo() -> PathBuf {
    root().join("crates/cli/assets/demo")
}

//! One child process: its lifeline on stdin, its reports on stdout, and the way it ended.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};
use security::{SECRET_FILE_VARIABLE, SECRET_VARIABLE, SharedSecret};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;

use super::orders::Order;
use crate::report::{Event, Line};

/// Longest report line, in bytes; a longer one is cut and not understood.
const LINE_BYTES_MAX: u64 = 64 << 10;
/// Orders held for a child that does not read them; further ones are lost.
const ORDERS_MAX: usize = 16;
/// How long to read on after the child's end: what it said last lies in the pipe, but a process it left behind may
/// hold the pipe open.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// What to start.
#[derive(Debug, Clone)]
pub struct Spec {
    /// The program's file.
    pub program: OsString,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// The cluster's secret; it travels in a variable, which other users cannot read.
    pub secret: Option<SharedSecret>,
}

impl Spec {
    /// This same binary with these arguments, in the cluster of `secret`.
    ///
    /// # Errors
    /// When the binary's own path cannot be found.
    pub fn own(args: Vec<String>, secret: Option<SharedSecret>) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("find this program's own file")?;
        Ok(Self { program: program.into(), args: args.into_iter().map(OsString::from).collect(), secret })
    }
}

/// What a supervisor hears of a child.
#[derive(Debug)]
pub enum Update {
    /// The child said something.
    Said(Line),
    /// The child is gone; the last update of it.
    Exited(Exit),
}

/// What a child was told before it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// Nothing.
    Nothing,
    /// To stop (SIGTERM).
    Stop,
    /// To stop, and then it was killed (SIGKILL).
    Kill,
}

/// How a child ended.
#[derive(Debug, Clone)]
pub struct Exit {
    /// Its process id.
    pub pid: u32,
    /// What the kernel says.
    pub status: ExitStatus,
    /// What it was told before.
    pub told: Told,
    /// The error it reported.
    pub error: Option<String>,
}

impl Exit {
    /// Whether the child was ended by a signal that its supervisor did not send. It may have been told to stop all
    /// the same, a moment too late.
    #[must_use]
    pub fn killed_by_others(&self) -> bool {
        match (self.status.signal(), self.told) {
            (None, _) | (_, Told::Kill) => false,
            (Some(signal), Told::Stop) => signal != Signal::TERM.as_raw(),
            (Some(_), Told::Nothing) => true,
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pid = self.pid;
        match (self.status.signal(), self.status.code(), &self.error) {
            (Some(signal), ..) => {
                write!(f, "(pid {pid}) was killed by signal {signal}{}", signal_name(signal))
            }
            (None, _, Some(error)) => write!(f, "(pid {pid}) failed: {error}"),
            (None, Some(0), None) => write!(f, "(pid {pid}) ended though nobody asked it to"),
            (None, Some(code), None) => write!(f, "(pid {pid}) exited with code {code}"),
            (None, None, None) => write!(f, "(pid {pid}) ended: {}", self.status),
        }
    }
}

fn signal_name(signal: i32) -> &'static str {
    match signal {
        2 => " (SIGINT)",
        6 => " (SIGABRT)",
        7 => " (SIGBUS)",
        9 => " (SIGKILL)",
        11 => " (SIGSEGV)",
        15 => " (SIGTERM)",
        _ => "",
    }
}

/// A running child. Dropping it kills the child.
#[derive(Debug)]
pub struct Handle {
    pid: u32,
    stop: watch::Sender<Option<Duration>>,
    orders: mpsc::Sender<Order>,
}

impl Handle {
    /// The child's process id.
    #[must_use]
    pub const fn pid(&self) -> u32 {
        self.pid
    }

    /// Asks the child to stop (SIGTERM), and kills it when it has not within `grace`. Only the first call counts.
    pub fn stop(&self, grace: Duration) {
        self.stop.send_if_modified(|order| {
            let first = order.is_none();
            order.get_or_insert(grace);
            first
        });
    }

    /// Tells the child something, and whether it was passed on. One that does not listen is not waited for.
    pub fn order(&self, order: Order) -> bool {
        let passed = self.orders.try_send(order).is_ok();
        if !passed {
            tracing::warn!(pid = self.pid, "an order was lost: the process does not read what it is told");
        }
        passed
    }
}

/// Starts a child; everything it says and its end arrive at `updates` with `key`.
///
/// # Errors
/// When the program cannot be started.
pub fn spawn<K: Copy + Send + 'static>(
    spec: &Spec,
    key: K,
    updates: mpsc::Sender<(K, Update)>,
) -> anyhow::Result<Handle> {
    let mut child = Command::new(&spec.program)
        .args(&spec.args)
        // That of this process, if it has one, is not meant for others.
        .env_remove(SECRET_FILE_VARIABLE)
        .envs(spec.secret.iter().map(|secret| (SECRET_VARIABLE, secret.now().expose_all())))
        .envs(spec.secret.iter().filter_map(|secret| Some((SECRET_FILE_VARIABLE, secret.file()?))))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("start {}", spec.program.display()))?;
    let pid = child.id().context("a child that was just started has a process id")?;
    let stdout = child.stdout.take().context("a child's stdout was asked for as a pipe")?;
    // Held until the child is gone: closing it is what tells the child to end. `wait` would close it at once.
    let stdin = child.stdin.take().context("a child's stdin was asked for as a pipe")?;
    let (orders, given) = mpsc::channel(ORDERS_MAX);
    let lifeline = AbortOnDropHandle::new(tokio::spawn(hold(stdin, given)));
    let (stop, stops) = watch::channel(None);
    tokio::spawn(follow((child, lifeline), pid, stdout, stops, (key, updates)));
    Ok(Handle { pid, stop, orders })
}

type Listener<K> = (K, mpsc::Sender<(K, Update)>);

/// Writes orders down a lifeline, and holds it until this is aborted.
async fn hold(mut stdin: ChildStdin, mut orders: mpsc::Receiver<Order>) {
    while let Some(order) = orders.recv().await {
        if let Err(error) = stdin.write_all(&order.to_line()).await {
            tracing::debug!(%error, "an order did not arrive");
        }
    }
    std::future::pending().await
}

async fn follow<K: Copy + Send + 'static>(
    (mut child, lifeline): (Child, AbortOnDropHandle<()>),
    pid: u32,
    stdout: ChildStdout,
    mut orders: watch::Receiver<Option<Duration>>,
    (key, updates): Listener<K>,
) {
    let mut reader = tokio::spawn(read(stdout, (key, updates.clone())));
    let (status, told) = wait(&mut child, pid, &mut orders).await;
    drop(lifeline);
    let error = match tokio::time::timeout(LAST_WORDS, &mut reader).await {
        Ok(last_words) => last_words.ok().flatten(),
        Err(_) => {
            reader.abort();
            None
        }
    };
    match status {
        Ok(status) => _ = updates.send((key, Update::Exited(Exit { pid, status, told, error }))).await,
        Err(error) => tracing::error!(pid, %error, "cannot wait for a child"),
    }
}

async fn wait(
    child: &mut Child,
    pid: u32,
    orders: &mut watch::Receiver<Option<Duration>>,
) -> (std::io::Result<ExitStatus>, Told) {
    let order = tokio::select! {
        biased;
        status = child.wait() => return (status, Told::Nothing),
        order = orders.changed() => order,
    };
    // A dropped handle leaves nobody to wait for a graceful end.
    let grace = order.ok().and_then(|()| *orders.borrow()).unwrap_or_default();
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, Signal::TERM);
    }
    if let Ok(status) = tokio::time::timeout(grace, child.wait()).await {
        return (status, Told::Stop);
    }
    tracing::warn!(pid, grace_s = grace.as_secs_f64(), "killed: it did not stop in time");
    let _ = child.start_kill();
    (child.wait().await, Told::Kill)
}

/// Passes on what the child says until its stdout ends; returns the error it reported.
async fn read<K: Copy>(stdout: ChildStdout, (key, updates): Listener<K>) -> Option<String> {
    let mut stdout = BufReader::new(stdout);
    let mut failed = None;
    let mut text = Vec::new();
    loop {
        text.clear();
        let read = (&mut stdout).take(LINE_BYTES_MAX).read_until(b'\n', &mut text).await;
        if !matches!(read, Ok(bytes) if bytes > 0) {
            return failed;
        }
        match serde_json::from_slice::<Line>(&text) {
            Ok(Line { event: Event::Failed { error }, .. }) => failed = Some(error),
            Ok(line) => {
                if updates.send((key, Update::Said(line))).await.is_err() {
                    return failed;
                }
            }
            Err(_) => tracing::debug!("a child said: {}", String::from_utf8_lossy(&text).trim_end()),
        }
    }
}

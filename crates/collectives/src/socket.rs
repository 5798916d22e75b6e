//! Non-blocking sockets with deadlines: the few calls the mesh, the plan channel and the rendezvous share.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;

/// A host that vanished without closing its sockets is noticed after idle + count × interval = 10 s.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(5);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
const KEEPALIVE_COUNT: u32 = 5;

/// Stands in for times too far away for the system's clock.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// The moment `span` from now.
pub(crate) fn from_now(span: Duration) -> Instant {
    Instant::now() + span.min(LONGEST)
}

/// Why a read or write did not finish.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The other end closed or reset the connection.
    Closed,
    /// The deadline passed.
    Late,
    /// The system refused.
    Io(io::Error),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::UnexpectedEof
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
            | ErrorKind::NotConnected => Self::Closed,
            // Keepalive reports a vanished host this way.
            ErrorKind::TimedOut | ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => Self::Closed,
            _ => Self::Io(error),
        }
    }
}

/// Makes a connection ready for this crate: non-blocking, no delay, and a vanished host is noticed.
pub(crate) fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_COUNT)?;
    Ok(())
}

/// One `poll`; `None` waits without end. Returns whether anything is ready; a signal counts as "nothing yet".
pub(crate) fn ready(fds: &mut [PollFd<'_>], timeout: Option<Duration>) -> io::Result<bool> {
    // A timeout too long for the system's clock is as good as none.
    let timeout = timeout.and_then(|span| Timespec::try_from(span).ok());
    match poll(fds, timeout.as_ref()) {
        Ok(count) => Ok(count > 0),
        Err(error) if error == rustix::io::Errno::INTR => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Waits until `stream` is ready for `flags`, or the deadline.
pub(crate) fn wait(stream: &TcpStream, flags: PollFlags, until: Option<Instant>) -> Result<(), Stop> {
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        if ready(&mut [PollFd::new(stream, flags)], left).map_err(Stop::Io)? {
            return Ok(());
        }
        if until.is_some_and(|until| Instant::now() >= until) {
            return Err(Stop::Late);
        }
    }
}

/// Fills `buf`. `until` of `None` waits without end.
pub(crate) fn read_full(stream: &TcpStream, buf: &mut [u8], until: Option<Instant>) -> Result<(), Stop> {
    let mut filled = 0;
    while filled < buf.len() {
        let mut from = stream;
        match from.read(&mut buf[filled..]) {
            Ok(0) => return Err(Stop::Closed),
            Ok(count) => filled += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => wait(stream, PollFlags::IN, until)?,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Writes `head` and `body`, in one system call when the socket has room.
pub(crate) fn write_full(stream: &TcpStream, head: &[u8], body: &[u8], until: Instant) -> Result<(), Stop> {
    let mut written = 0;
    while written < head.len() + body.len() {
        let head_left = &head[written.min(head.len())..];
        let body_left = &body[written.saturating_sub(head.len())..];
        let mut to = stream;
        match to.write_vectored(&[IoSlice::new(head_left), IoSlice::new(body_left)]) {
            Ok(0) => return Err(Stop::Closed),
            Ok(count) => written += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                wait(stream, PollFlags::OUT, Some(until))?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

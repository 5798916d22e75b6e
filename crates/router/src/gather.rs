//! A connection whose writes of one turn leave together.
//!
//! HTTP/2 flushes behind every frame of some size: the head of a request and its message are one write and its end another,
//! an answer of one message takes two or three. Each costs a system call and wakes whoever reads. Here a flush waits for
//! the next turns of the connection's task, which are behind the tasks that are ready now, for as long as each of them
//! brings more: what those tasks have to say goes along.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use security::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

/// Bytes that wait at most; more are written at once.
const BYTES_MAX: usize = 64 << 10;
/// Turns that bytes wait at most.
const TURNS_MAX: u32 = 4;
/// Flushes that wait at most: a turn that never reads would otherwise keep bytes back.
const FLUSHES_MAX: u32 = 8;
/// An empty buffer keeps no more than this.
const BYTES_KEPT: usize = 4 << 10;

/// A connection over `S`.
#[derive(Debug)]
pub(crate) struct Gathered<S> {
    inner: S,
    /// What was written; the first `done` bytes have left.
    bytes: Vec<u8>,
    done: usize,
    /// Flushes that wait.
    flushes: u32,
    /// Turns that they have waited, and the bytes there were at the last of them.
    turns: u32,
    seen: usize,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Gathered<S> {
    pub(crate) const fn new(inner: S) -> Self {
        Self { inner, bytes: Vec::new(), done: 0, flushes: 0, turns: 0, seen: 0 }
    }

    /// Writes what waits.
    fn drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.done < self.bytes.len() {
            match ready!(Pin::new(&mut self.inner).poll_write(cx, &self.bytes[self.done..]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.done += written,
            }
        }
        self.bytes.clear();
        self.bytes.shrink_to(BYTES_KEPT);
        (self.done, self.flushes, self.turns, self.seen) = (0, 0, 0, 0);
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    /// Makes room for more bytes; how many.
    fn room(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.bytes.len() >= BYTES_MAX {
            ready!(self.drain(cx))?;
        }
        Poll::Ready(Ok(BYTES_MAX - self.bytes.len()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Gathered<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // A turn of an HTTP/2 connection begins with reading, and ends with a flush.
        if self.flushes > 0 {
            if self.bytes.len() > self.seen && self.turns < TURNS_MAX && self.done == 0 {
                self.seen = self.bytes.len();
                self.turns += 1;
            } else if let Poll::Ready(Err(error)) = self.drain(cx) {
                return Poll::Ready(Err(error));
            }
        }
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Gathered<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let room = ready!(self.room(cx))?;
        let taken = &buf[..buf.len().min(room)];
        self.bytes.extend_from_slice(taken);
        Poll::Ready(Ok(taken.len()))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let room = ready!(self.room(cx))?;
        let mut left = room;
        for buf in bufs {
            let taken = &buf[..buf.len().min(left)];
            self.bytes.extend_from_slice(taken);
            left -= taken.len();
        }
        Poll::Ready(Ok(room - left))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let brought_nothing = self.turns > 0 && self.bytes.len() == self.seen;
        if self.bytes.is_empty() || brought_nothing || self.flushes >= FLUSHES_MAX {
            return self.drain(cx);
        }
        self.flushes += 1;
        cx.waker().wake_by_ref();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.drain(cx))?;
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

impl Connected for Gathered<Stream> {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::*;

    /// A turn that finds nothing to read.
    async fn turn(of: &mut Gathered<DuplexStream>) {
        let mut bytes = [0; 8];
        let nothing = poll_fn(|cx| {
            Poll::Ready(Pin::new(&mut *of).poll_read(cx, &mut ReadBuf::new(&mut bytes)).is_pending())
        });
        assert!(nothing.await);
    }

    #[tokio::test]
    async fn what_is_flushed_leaves_when_a_turn_brings_no_more() {
        let (ours, mut theirs) = duplex(1024);
        let mut ours = Gathered::new(ours);
        ours.write_all(b"head").await.unwrap();
        ours.flush().await.unwrap();
        ours.write_all(b" and more").await.unwrap();
        ours.flush().await.unwrap();
        let mut read = [0; 64];
        let nothing = poll_fn(|cx| {
            let mut buf = ReadBuf::new(&mut read);
            Poll::Ready(Pin::new(&mut theirs).poll_read(cx, &mut buf).is_pending())
        });
        assert!(nothing.await);
        // Each turn reads first and flushes last. One that brings nothing ends the wait.
        for more in [&b", "[..], b"and its end", b""] {
            turn(&mut ours).await;
            ours.write_all(more).await.unwrap();
            ours.flush().await.unwrap();
        }
        let length = theirs.read(&mut read).await.unwrap();
        assert_eq!(&read[..length], b"head and more, and its end");
    }

    #[tokio::test]
    async fn nothing_waits_for_ever() {
        let (ours, mut theirs) = duplex(1 << 20);
        let mut ours = Gathered::new(ours);
        ours.write_all(b"x").await.unwrap();
        for _ in 0..=FLUSHES_MAX {
            ours.flush().await.unwrap();
        }
        assert_eq!(theirs.read_u8().await.unwrap(), b'x');
        ours.write_all(&vec![b'y'; BYTES_MAX + 1]).await.unwrap();
        let mut read = vec![0; BYTES_MAX];
        theirs.read_exact(&mut read).await.unwrap();
        ours.shutdown().await.unwrap();
        assert_eq!(theirs.read_u8().await.unwrap(), b'y');
    }

    #[tokio::test]
    async fn a_full_connection_takes_no_more() {
        let (ours, mut theirs) = duplex(16);
        let mut ours = Gathered::new(ours);
        let writing = tokio::spawn(async move {
            ours.write_all(&vec![b'z'; 3 * BYTES_MAX]).await.unwrap();
            ours.shutdown().await.unwrap();
        });
        let mut read = Vec::new();
        theirs.read_to_end(&mut read).await.unwrap();
        assert_eq!(read.len(), 3 * BYTES_MAX);
        writing.await.unwrap();
    }
}

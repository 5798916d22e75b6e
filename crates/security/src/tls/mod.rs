//! TLS by rustls over ring: 1.2 and 1.3, certificates from PEM files.

mod client;
mod files;
mod server;
mod stream;

pub use client::{ClientTls, Dialer};
pub use server::{Acceptor, Clients, ServerTls, incoming};
pub use stream::Stream;

use std::sync::Arc;

use rustls::crypto::CryptoProvider;

/// The one set of ciphers; named everywhere, so that no process-wide default decides.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

//! Who may talk to whom: TLS for listeners and connections, the secret that makes processes one cluster, and the API keys
//! of callers. Everything that comes from a file is read again when the file changes; a new file that cannot be used
//! leaves the old contents in force.
#![forbid(unsafe_code)]

mod badge;
mod bucket;
mod error;
mod jwt;
mod keys;
mod live;
mod meter;
mod secret;
mod shared;
mod tls;

pub use badge::{Badge, Identified, SECRET_HEADER};
pub use error::Error;
pub use jwt::{JwtRules, Refused, Tokens};
pub use keys::{KeyFile, KeyLine, Keys, generate_key, key_line};
pub use live::POLL;
pub use meter::{Limited, Limits, Meter, Visit};
pub use secret::{SECRET_FILE_VARIABLE, SECRET_VARIABLE, Secret};
pub use shared::SharedSecret;
pub use tls::{Acceptor, ClientTls, Clients, Dialer, ServerTls, Stream, incoming};

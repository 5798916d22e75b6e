//! Processes of one machine: a supervisor starts children, reads their reports, and no child outlives it.
//!
//! - [`child`]: one child process, from start to the way it ended;
//! - [`lifeline`]: the child's end of the pipe that tells it its supervisor is gone;
//! - [`orders`]: what comes down that pipe;
//! - [`signals`]: Ctrl-C, SIGTERM and SIGHUP;
//! - [`group`]: the ranks of one worker group, which live and die together;
//! - [`cluster`]: a router and groups, restarted when they die;
//! - [`backoff`]: how long to wait before a restart.

pub mod backoff;
pub mod child;
pub mod cluster;
pub mod group;
pub mod lifeline;
pub mod orders;
pub mod signals;

pub use backoff::Backoff;
pub use child::{Exit, Handle, Spec, Told, Update};
pub use orders::Order;

//! A cluster seen through its metrics pages: what `cohort top` shows.
//!
//! [`Page`] is one page as it was read, [`Sample`] the pages of one moment, [`Cluster`] what two moments say together, and
//! [`draw`] how a person sees it.

mod cluster;
mod draw;
mod page;

pub use cluster::{Cluster, Endpoint, Group, Latency, Rank, Router, Sample};
pub use draw::{Shown, draw};
pub use page::{Page, Unread};

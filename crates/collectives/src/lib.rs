//! What the ranks of one group say to each other.
//!
//! [`Collective`] is the contract; [`Solo`] (a group of one), [`InProcess`] (threads) and [`Tcp`] (processes and hosts)
//! keep it for host buffers of `f32`, and one contract suite runs over all of them. [`Rendezvous`] and [`join`] bring
//! the ranks together, refuse ranks that disagree, and hand out the data mesh and the plan channel. [`Faulty`] wraps
//! any of them to rehearse failures.
//!
//! Sums are always taken in rank order, so a result does not depend on the transport, on timing or on the algorithm.
#![forbid(unsafe_code)]

mod check;
mod collective;
mod counters;
mod error;
mod faulty;
mod in_process;
mod link;
mod rendezvous;
mod socket;
mod solo;
mod sum;
mod tcp;

pub use collective::Collective;
pub use counters::{Counters, Op, Traffic};
pub use error::{Cause, Error, Field};
pub use faulty::{Fault, Faulty};
pub use in_process::InProcess;
pub use link::{HangUp, PLAN_BYTES_MAX, PlanChannel, PlanReceiver, PlanSender, PlanWatch};
pub use rendezvous::{GroupSecret, Joined, Member, PROTOCOL_VERSION, Rendezvous, RendezvousOptions, join};
pub use solo::Solo;
pub use tcp::{AbortHandle, ONE_SHOT_BYTES_MAX, Tcp, TcpOptions};

//! Answers of a given form from the real model on real ranks: whatever it draws, the whole answer is of that form.
#![allow(clippy::unwrap_used, reason = "helpers of tests, which clippy does not see as tests")]

#[path = "../support/mod.rs"]
mod support;

mod forms;
mod group;
mod schemas;
mod thinking;
mod validity;

//! How long the card had nothing to do between two steps, as the card's own marks say.

use std::time::Duration;

use crate::Error;
use crate::device::Device;
use crate::graph::Event;

/// Marks around the last steps: one may begin before the one before it is measured.
#[derive(Debug)]
pub(crate) struct Idle {
    began: [Event; 2],
    ended: [Event; 2],
    steps: usize,
    /// From the end of a step's last kernel to its successor's first one: what lies between is copies and nothing.
    pub(crate) between: Option<Duration>,
}

impl Idle {
    pub(crate) fn new() -> Result<Self, Error> {
        let began = [Event::timed()?, Event::timed()?];
        let ended = [Event::timed()?, Event::timed()?];
        Ok(Self { began, ended, steps: 0, between: None })
    }

    /// A step's first kernel is queued next.
    pub(crate) fn begins(&mut self, device: &Device) -> Result<(), Error> {
        self.steps += 1;
        self.began[self.steps % 2].record(device.stream())
    }

    /// The last kernel of the step that began last is queued.
    pub(crate) fn ends(&mut self, device: &Device) -> Result<(), Error> {
        self.ended[self.steps % 2].record(device.stream())
    }

    /// The number of the step that began last.
    pub(crate) const fn step(&self) -> usize {
        self.steps
    }

    /// Step `step` is over, and at most one has begun since.
    pub(crate) fn measure(&mut self, step: usize) {
        let before = self.ended[(step + 1) % 2].until(&self.began[step % 2]);
        self.between = before.filter(|&ms| step > 1 && ms >= 0.0).map(|ms| Duration::from_secs_f32(ms / 1e3));
    }
}

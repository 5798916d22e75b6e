//! How long the card had nothing to do between two steps, as the card's own marks say.

use std::time::Duration;

use crate::Error;
use crate::device::Device;
use crate::graph::Event;

/// Marks around the last two steps.
#[derive(Debug)]
pub(crate) struct Idle {
    began: Event,
    ended: [Event; 2],
    steps: usize,
    /// From the end of the last step but one (before its result was copied) to the beginning of the last one.
    pub(crate) between: Option<Duration>,
}

impl Idle {
    pub(crate) fn new() -> Result<Self, Error> {
        let (began, ended) = (Event::timed()?, [Event::timed()?, Event::timed()?]);
        Ok(Self { began, ended, steps: 0, between: None })
    }

    /// A step begins.
    pub(crate) fn begins(&mut self, device: &Device) -> Result<(), Error> {
        self.steps += 1;
        self.began.record(device.stream())
    }

    /// Everything of the step but the copy of its result is queued.
    pub(crate) fn ends(&mut self, device: &Device) -> Result<(), Error> {
        self.ended[self.steps % 2].record(device.stream())
    }

    /// The step is over.
    pub(crate) fn measure(&mut self) {
        let before = self.ended[(self.steps + 1) % 2].until(&self.began);
        self.between =
            before.filter(|&ms| self.steps > 1 && ms >= 0.0).map(|ms| Duration::from_secs_f32(ms / 1e3));
    }
}

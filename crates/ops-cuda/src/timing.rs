//! How long launches take inside a recorded graph, by the card's own marks.

use std::time::Duration;

use ops::Error;

use crate::CudaBackend;
use crate::graph::Event;

impl CudaBackend {
    /// Records `op` `repeats` times in one graph, launches that `launches` times, and returns what one `op` took on the card in
    /// each launch. What `op` leaves behind must be fit to be repeated. When other ranks have a part in it, all of them call
    /// this together.
    ///
    /// # Errors
    /// What `op` returns, or a device failure.
    pub fn time_recorded<E: From<Error>>(
        &mut self,
        (repeats, launches): (u32, u32),
        mut op: impl FnMut(&mut Self) -> Result<(), E>,
    ) -> Result<Vec<Duration>, E> {
        let failed = |error: crate::Error| E::from(Error::from(error));
        let device = self.device().clone();
        device.bind().map_err(failed)?;
        device.alone();
        device.synchronize().map_err(failed)?;
        device.lanes().begin_capture().map_err(failed)?;
        device.unchain();
        let queued = (0..repeats).try_for_each(|_| op(self));
        // The stream leaves capture whatever the outcome.
        let graph = device.lanes().end_capture();
        device.unchain();
        queued?;
        let graph = graph.map_err(failed)?;
        let marks = [Event::timed().map_err(failed)?, Event::timed().map_err(failed)?];
        let mut times = Vec::with_capacity(launches as usize);
        for _ in 0..launches {
            marks[0].record(device.stream()).map_err(failed)?;
            graph.launch(device.stream()).map_err(failed)?;
            marks[1].record(device.stream()).map_err(failed)?;
            device.synchronize().map_err(failed)?;
            let ms = marks[0].until(&marks[1]).unwrap_or(0.0);
            times.push(Duration::from_secs_f32(ms / 1e3) / repeats.max(1));
        }
        Ok(times)
    }
}

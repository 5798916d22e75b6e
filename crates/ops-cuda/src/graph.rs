//! Recorded steps. A decode step of a given number of rows is the same launches every time: what changes lies in the
//! step's metadata, at a fixed place on the card. The second step of a form is captured as a graph and from then on
//! launched as one piece.

use cudarc::driver::result::{event, graph, stream};
use cudarc::driver::sys::{
    CUevent, CUevent_flags, CUevent_wait_flags, CUgraphExec, CUgraphInstantiate_flags, CUresult, CUstream,
    CUstreamCaptureMode, cuEventQuery,
};
use ops::{Batch, KvLayerSpec, Window};

use crate::Error;
use crate::tensor::Kept;

/// Rows of the forms that are recorded; a step has the next larger one.
const FORMS: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];
/// The largest of them.
pub(crate) const RECORDED_ROWS_MAX: usize = 256;

/// The smallest recorded form that takes `rows` rows.
pub(crate) fn form_rows(rows: usize) -> Option<usize> {
    FORMS.into_iter().find(|&form| form >= rows)
}

/// Two streams: all work goes through the first, and between a fork and its join some of it through the second.
#[derive(Debug)]
pub(crate) struct Lanes {
    streams: [CUstream; 2],
    marks: [Event; 2],
    /// Where the second lane was when the first one may go on.
    passed: Event,
}

impl Lanes {
    /// The context must be current. The second stream's blocks go first: it has the chain of small launches.
    pub(crate) fn new() -> Result<Self, Error> {
        let (_, greatest) =
            stream::get_priority_range().map_err(Error::driver("cuCtxGetStreamPriorityRange"))?;
        let create = |priority| {
            stream::create_with_priority(stream::StreamKind::NonBlocking, priority)
                .map_err(Error::driver("cuStreamCreateWithPriority"))
        };
        let marks = [Event::new()?, Event::new()?];
        Ok(Self { streams: [create(0)?, create(greatest)?], marks, passed: Event::new()? })
    }

    pub(crate) const fn stream(&self, lane: usize) -> CUstream {
        self.streams[lane]
    }

    /// What is queued on `lane` from here on comes after what is queued on the other one so far.
    pub(crate) fn follow(&self, lane: usize) -> Result<(), Error> {
        let other = 1 - lane;
        self.marks[other].record(self.streams[other])?;
        self.marks[other].hold(self.streams[lane])
    }

    /// Marks the place in the second lane that [`Lanes::pass`] waits for.
    pub(crate) fn mark(&self) -> Result<(), Error> {
        self.passed.record(self.streams[1])
    }

    /// What is queued on the first lane from here on comes after the place that was marked last.
    pub(crate) fn pass(&self) -> Result<(), Error> {
        self.passed.hold(self.streams[0])
    }

    /// Begins to record the first lane; the other one joins by [`Lanes::follow`].
    pub(crate) fn begin_capture(&self) -> Result<(), Error> {
        // SAFETY: the stream is alive and not capturing.
        unsafe { stream::begin_capture(self.streams[0], CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED) }
            .map_err(Error::driver("cuStreamBeginCapture"))
    }

    /// Ends [`Lanes::begin_capture`].
    pub(crate) fn end_capture(&self) -> Result<Graph, Error> {
        // SAFETY: the stream is alive and capturing.
        let captured =
            unsafe { stream::end_capture(self.streams[0]) }.map_err(Error::driver("cuStreamEndCapture"))?;
        if captured.is_null() {
            return Err(Error::Driver { call: "cuStreamEndCapture", reason: "no graph".to_owned() });
        }
        // Without the flag all kernels would have the priority of the stream that the graph is launched on.
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY;
        // SAFETY: the graph was just captured; it is destroyed below and not used by its executable copy.
        let exec = unsafe { graph::instantiate(captured, flags) };
        // SAFETY: as above.
        let _ = unsafe { graph::destroy(captured) };
        exec.map(Graph).map_err(Error::driver("cuGraphInstantiate"))
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        for stream in self.streams {
            // SAFETY: created by this value and destroyed only here.
            let _ = unsafe { stream::destroy(stream) };
        }
    }
}

/// A stream for what goes on beside all other work.
#[derive(Debug)]
pub(crate) struct Side(CUstream);

impl Side {
    pub(crate) fn new() -> Result<Self, Error> {
        stream::create(stream::StreamKind::NonBlocking).map(Self).map_err(Error::driver("cuStreamCreate"))
    }

    pub(crate) const fn stream(&self) -> CUstream {
        self.0
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        // SAFETY: created by this value and destroyed only here; what copies to is freed after it has ended.
        let _ = unsafe { stream::synchronize(self.0).and_then(|()| stream::destroy(self.0)) };
    }
}

/// A mark in a stream.
#[derive(Debug)]
pub(crate) struct Event(CUevent);

impl Event {
    pub(crate) fn new() -> Result<Self, Error> {
        Self::with(CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    /// One that notes when it is passed.
    pub(crate) fn timed() -> Result<Self, Error> {
        Self::with(CUevent_flags::CU_EVENT_DEFAULT)
    }

    fn with(flags: CUevent_flags) -> Result<Self, Error> {
        event::create(flags).map(Self).map_err(Error::driver("cuEventCreate"))
    }

    pub(crate) fn record(&self, stream: CUstream) -> Result<(), Error> {
        // SAFETY: the event and the stream are alive.
        unsafe { event::record(self.0, stream) }.map_err(Error::driver("cuEventRecord"))
    }

    /// What is queued on `stream` from here on comes after this mark; nothing when it was not recorded.
    pub(crate) fn hold(&self, stream: CUstream) -> Result<(), Error> {
        // SAFETY: the stream and the event are alive.
        unsafe { stream::wait_event(stream, self.0, CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT) }
            .map_err(Error::driver("cuStreamWaitEvent"))
    }

    /// Returns at once when nothing was recorded.
    pub(crate) fn wait(&self) -> Result<(), Error> {
        // SAFETY: the event is alive.
        unsafe { event::synchronize(self.0) }.map_err(Error::driver("cuEventSynchronize"))
    }

    /// As [`Event::is_passed`], or what went wrong before it.
    pub(crate) fn has_passed(&self) -> Result<bool, Error> {
        // SAFETY: the event is alive.
        match unsafe { cuEventQuery(self.0) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            other => other.result().map(|()| true).map_err(Error::driver("cuEventQuery")),
        }
    }

    /// Whether the card has come past it; so it has where nothing was recorded.
    pub(crate) fn is_passed(&self) -> bool {
        // SAFETY: the event is alive.
        unsafe { event::query(self.0) }.is_ok()
    }

    /// Milliseconds from this mark to `later`, once both were passed.
    pub(crate) fn until(&self, later: &Self) -> Option<f32> {
        // SAFETY: both events are alive; the driver refuses when one has not been passed.
        unsafe { event::elapsed(self.0, later.0) }.ok()
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created by this value and destroyed only here.
        let _ = unsafe { event::destroy(self.0) };
    }
}

/// Launches that the driver knows as one piece.
#[derive(Debug)]
pub(crate) struct Graph(CUgraphExec);

impl Graph {
    pub(crate) fn launch(&self, stream: CUstream) -> Result<(), Error> {
        // SAFETY: both are alive; the graph's addresses are those of the arena, the metadata and resident weights.
        unsafe { graph::launch(self.0, stream) }.map_err(Error::driver("cuGraphLaunch"))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: instantiated by this value's maker and destroyed only here.
        let _ = unsafe { graph::exec_destroy(self.0) };
    }
}

/// What is kept of one form.
#[derive(Debug, Default)]
enum Form {
    /// No step yet.
    #[default]
    New,
    /// One step ran: what is made at first use is there.
    Seen,
    /// Recorded.
    Kept(Box<Recording>),
}

/// One recorded form.
#[derive(Debug)]
pub(crate) struct Recording {
    pub(crate) graph: Graph,
    pub(crate) result: Kept,
    /// The cache layers it attends to: tables are checked against each.
    pub(crate) layers: Vec<(KvLayerSpec, Window)>,
}

/// What to do with a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Course {
    /// Run its ops.
    Run,
    /// Record its ops, padded to so many rows.
    Record(usize),
    /// Launch what was recorded, padded to so many rows.
    Repeat(usize),
}

/// The recorded forms of one backend.
#[derive(Debug, Default)]
pub(crate) struct Recordings {
    forms: [Form; FORMS.len()],
    open: Option<(usize, Vec<(KvLayerSpec, Window)>)>,
}

impl Recordings {
    /// What to do with `batch`, the next step.
    pub(crate) fn course(&mut self, batch: &Batch) -> Course {
        let single = batch.sequences.len() == batch.tokens.len();
        let Some(rows) = form_rows(batch.tokens.len()).filter(|_| single && !batch.tokens.is_empty()) else {
            return Course::Run;
        };
        let form = &mut self.forms[place(rows)];
        match form {
            Form::New => {
                *form = Form::Seen;
                Course::Run
            }
            Form::Seen => Course::Record(rows),
            Form::Kept(_) => Course::Repeat(rows),
        }
    }

    pub(crate) fn open(&mut self, rows: usize) {
        self.open = Some((rows, Vec::new()));
    }

    pub(crate) const fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Notes a cache layer that the open recording attends to.
    pub(crate) fn note(&mut self, layer: (KvLayerSpec, Window)) {
        if let Some((_, layers)) = &mut self.open
            && !layers.contains(&layer)
        {
            layers.push(layer);
        }
    }

    /// Ends the open recording without a result.
    pub(crate) fn abandon(&mut self) -> bool {
        self.open.take().is_some()
    }

    /// Keeps what was open.
    pub(crate) fn keep(&mut self, graph: Graph, result: Kept) -> Option<&Recording> {
        let (rows, layers) = self.open.take()?;
        self.forms[place(rows)] = Form::Kept(Box::new(Recording { graph, result, layers }));
        self.get(rows)
    }

    pub(crate) fn get(&self, rows: usize) -> Option<&Recording> {
        match &self.forms[place(rows)] {
            Form::Kept(recording) => Some(recording),
            Form::New | Form::Seen => None,
        }
    }

    /// Drops every recording: an address in them is no longer right.
    pub(crate) fn forget(&mut self) {
        for form in &mut self.forms {
            if let Form::Kept(_) = form {
                *form = Form::Seen;
            }
        }
    }
}

fn place(rows: usize) -> usize {
    FORMS.iter().position(|&form| form >= rows).unwrap_or(FORMS.len() - 1)
}

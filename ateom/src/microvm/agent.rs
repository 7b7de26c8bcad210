// SPDX-License-Identifier: Apache-2.0
//! The host's end of the agent in a guest (`ateom_guest` has the protocol).
//!
//! ```text
//! boot, quiesce, resume ──▶ ┌ writer task ┐ ──▶ stream ──▶ guest
//! exec input, windows   ──▶ └ held while quiet ┘
//! guest ──▶ reader task ──▶ logs (files) │ exits (watch) │ answers │ exec outputs (a queue each, bounded by the window)
//! ```
//! Between `Quiesce` and `Resume` the writer sends nothing else, so that a snapshot never holds half a frame.
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write as _;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ateom_guest::{Boot, CHUNK, Frame, FromGuest, HEADER, Kind, Process, Renewal, ToGuest, VERSION, WINDOW};
use substrate_proto::types::ExitStatus;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use crate::children::Exit;
use crate::launcher::Streams;
use crate::microvm::streams::{self, Input, Output};
use crate::runtime::{ExecProcess, RuntimeError};

/// Frames that wait to be written.
const QUEUE: usize = 64;

fn locked<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

fn lost(what: &str) -> RuntimeError {
    RuntimeError::Failed(format!("the guest's agent is gone during {what}"))
}

enum Outgoing {
    /// Sent when not quiet.
    Frame(Frame),
    /// Sent at once; from then on quiet, or no more.
    Turn { frame: Frame, quiet: bool },
}

/// An exec as the reader sees it.
struct ExecEntry {
    outputs: [mpsc::UnboundedSender<Vec<u8>>; 2],
    input_window: Arc<Semaphore>,
    started: Option<oneshot::Sender<()>>,
    exit: Option<oneshot::Sender<Result<Exit, RuntimeError>>>,
    /// Dropped when the exec is over.
    _over: watch::Sender<()>,
}

#[derive(Default)]
struct Shared {
    execs: Mutex<HashMap<u32, ExecEntry>>,
    answer: Mutex<Option<oneshot::Sender<Result<FromGuest, String>>>>,
    logs: Mutex<Vec<File>>,
}

/// A connection to an agent.
pub struct Agent {
    frames: mpsc::Sender<Outgoing>,
    turns: mpsc::Sender<Outgoing>,
    shared: Arc<Shared>,
    next: AtomicU32,
    ended: watch::Receiver<BTreeMap<usize, ExitStatus>>,
    hello: watch::Receiver<Option<u32>>,
    tasks: [tokio::task::AbortHandle; 2],
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").finish_non_exhaustive()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Agent {
    /// Takes a connection. `quiet`: the guest waits for [`Agent::resume`] (it comes from a snapshot). `logs` are of the
    /// containers in order.
    pub fn new(stream: UnixStream, quiet: bool, names: Vec<String>, logs: Vec<File>) -> Self {
        let (stream, writer) = stream.into_split();
        let (frames, frames_queue) = mpsc::channel(QUEUE);
        let (turns, turns_queue) = mpsc::channel(1);
        let (ended_sender, ended) = watch::channel(BTreeMap::new());
        let (hello_sender, hello) = watch::channel(None);
        let shared = Arc::new(Shared { logs: Mutex::new(logs), ..Shared::default() });
        let write = tokio::spawn(write_frames(writer, frames_queue, turns_queue, quiet));
        let reader = Reader { shared: Arc::clone(&shared), names, ended: ended_sender, hello: hello_sender };
        let read = tokio::spawn(reader.run(stream));
        Self {
            frames,
            turns,
            shared,
            next: AtomicU32::new(1),
            ended,
            hello,
            tasks: [write.abort_handle(), read.abort_handle()],
        }
    }
    /// Waits for the agent's first word and checks its version.
    ///
    /// # Errors
    /// [`RuntimeError::Timeout`], or [`RuntimeError::Failed`] for an agent of another version.
    pub async fn greeted(&self, limit: Duration) -> Result<(), RuntimeError> {
        let mut hello = self.hello.clone();
        let waited = tokio::time::timeout(limit, hello.wait_for(Option::is_some)).await;
        let version = match waited {
            Ok(Ok(version)) => *version,
            Ok(Err(_)) => return Err(lost("the guest's start")),
            Err(_) => {
                return Err(RuntimeError::Timeout {
                    what: "the guest's start".to_owned(),
                    seconds: limit.as_secs(),
                });
            }
        };
        if version == Some(VERSION) {
            return Ok(());
        }
        Err(RuntimeError::Failed(format!(
            "the guest's agent speaks version {} of its protocol, this ateom {VERSION}",
            version.unwrap_or(0)
        )))
    }

    /// Sends what is answered by one message; one at a time.
    async fn ask(&self, what: &str, outgoing: Outgoing, limit: Duration) -> Result<FromGuest, RuntimeError> {
        let (sender, answer) = oneshot::channel();
        *locked(&self.shared.answer) = Some(sender);
        self.turns.send(outgoing).await.map_err(|_| lost(what))?;
        match tokio::time::timeout(limit, answer).await {
            Ok(Ok(Ok(message))) => Ok(message),
            Ok(Ok(Err(message))) => Err(RuntimeError::Failed(message)),
            Ok(Err(_)) => Err(lost(what)),
            Err(_) => Err(RuntimeError::Timeout { what: what.to_owned(), seconds: limit.as_secs() }),
        }
    }

    fn turn(message: &ToGuest, quiet: bool) -> Result<Outgoing, RuntimeError> {
        let frame = Frame::control(message).map_err(|error| RuntimeError::Failed(error.to_string()))?;
        Ok(Outgoing::Turn { frame, quiet })
    }

    /// Makes the guest into what it is to be; returns when its containers' processes run.
    ///
    /// # Errors
    /// The agent's words.
    pub async fn boot(&self, boot: Boot, limit: Duration) -> Result<(), RuntimeError> {
        let message = Self::turn(&ToGuest::Boot(Box::new(boot)), false)?;
        self.ask("the containers' start", message, limit).await.map(drop)
    }

    /// Has the workload stand still and the stream be silent.
    ///
    /// # Errors
    /// The agent's words; the workload goes on then, unless it is unknown ([`RuntimeError::Timeout`]).
    pub async fn quiesce(&self, limit: Duration) -> Result<(), RuntimeError> {
        let message = Self::turn(&ToGuest::Quiesce, true)?;
        self.ask("the workload's standing still", message, limit).await.map(drop)
    }

    /// Renews what a guest has from outside and lets its workload go on.
    ///
    /// # Errors
    /// The agent's words.
    pub async fn resume(&self, renewal: Renewal, limit: Duration) -> Result<(), RuntimeError> {
        let message = Self::turn(&ToGuest::Resume(renewal), false)?;
        self.ask("the workload's going on", message, limit).await.map(drop)
    }

    /// Returns when a container's main process has ended.
    ///
    /// # Errors
    /// When the agent is gone.
    pub async fn ended(&self, container: usize) -> Result<ExitStatus, RuntimeError> {
        let mut ended = self.ended.clone();
        let found = ended.wait_for(|ended| ended.contains_key(&container)).await;
        let found = found.map_err(|_| lost("waiting for a container"))?;
        found.get(&container).cloned().ok_or_else(|| lost("waiting for a container"))
    }

    /// Starts a process in a container, number `container`.
    ///
    /// # Errors
    /// When its streams cannot be used, or the agent is gone.
    pub async fn exec(
        &self,
        container: usize,
        process: Process,
        streams: Streams,
        terminal: bool,
    ) -> Result<ExecProcess, RuntimeError> {
        let failed =
            |error: std::io::Error| RuntimeError::Failed(format!("cannot use an exec's streams: {error}"));
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let size = if terminal { Some(streams::make_raw(&streams.stdin).map_err(failed)?) } else { None };
        let input = Input::new(streams.stdin).map_err(failed)?;
        let outputs =
            [Output::new(streams.stdout).map_err(failed)?, Output::new(streams.stderr).map_err(failed)?];
        let (started, started_receiver) = oneshot::channel();
        let (exit, exit_receiver) = oneshot::channel();
        let (over, is_over) = watch::channel(());
        let input_window = Arc::new(Semaphore::new(WINDOW));
        let mut senders = Vec::new();
        for (number, output) in outputs.into_iter().enumerate() {
            let (sender, queue) = mpsc::unbounded_channel();
            senders.push(sender);
            tokio::spawn(copy_out(output, queue, id, number == 1, self.frames.clone()));
        }
        let (Some(errors), Some(output)) = (senders.pop(), senders.pop()) else {
            return Err(lost("an exec"));
        };
        let entry = ExecEntry {
            outputs: [output, errors],
            input_window: Arc::clone(&input_window),
            started: Some(started),
            exit: Some(exit),
            _over: over,
        };
        locked(&self.shared.execs).insert(id, entry);
        self.tell(&ToGuest::Exec { id, container, process, terminal: size }).await?;
        tokio::spawn(copy_in(input, id, input_window, self.frames.clone(), is_over.clone()));
        let (signals, signals_queue) = mpsc::channel(8);
        let (resizes, resizes_queue) = mpsc::channel(8);
        tokio::spawn(relay(id, signals_queue, resizes_queue, self.frames.clone(), is_over));
        Ok(ExecProcess {
            started: started_receiver,
            exit: exit_receiver,
            signals,
            resizes: terminal.then_some(resizes),
        })
    }

    async fn tell(&self, message: &ToGuest) -> Result<(), RuntimeError> {
        let frame = Frame::control(message).map_err(|error| RuntimeError::Failed(error.to_string()))?;
        self.frames.send(Outgoing::Frame(frame)).await.map_err(|_| lost("an exec"))
    }
}

async fn send(frames: &mpsc::Sender<Outgoing>, message: &ToGuest) -> bool {
    match Frame::control(message) {
        Ok(frame) => frames.send(Outgoing::Frame(frame)).await.is_ok(),
        Err(_) => false,
    }
}

/// Passes input on within its window, until its end or the process's.
async fn copy_in(
    mut input: Input,
    id: u32,
    window: Arc<Semaphore>,
    frames: mpsc::Sender<Outgoing>,
    mut over: watch::Receiver<()>,
) {
    let copy = async {
        let mut buffer = vec![0; CHUNK];
        loop {
            let length = match input.read(&mut buffer).await {
                // EIO is a terminal's end.
                Ok(0) | Err(_) => break,
                Ok(length) => length,
            };
            let Ok(permit) = window.acquire_many(length as u32).await else { return };
            permit.forget();
            let frame = Frame { kind: Kind::Stdin, channel: id, payload: buffer[..length].to_vec() };
            if frames.send(Outgoing::Frame(frame)).await.is_err() {
                return;
            }
        }
        send(&frames, &ToGuest::CloseStdin { id }).await;
    };
    tokio::select! {
        () = copy => {}
        _ = over.changed() => {}
    }
}

/// Passes output on and gives the window back. Ends when the sender is dropped and all was passed on.
async fn copy_out(
    mut output: Output,
    mut queue: mpsc::UnboundedReceiver<Vec<u8>>,
    id: u32,
    errors: bool,
    frames: mpsc::Sender<Outgoing>,
) {
    let mut open = true;
    while let Some(bytes) = queue.recv().await {
        // One who reads no more loses the rest, as in a pipe.
        open = open && output.write_all(&bytes).await.is_ok();
        send(&frames, &ToGuest::Taken { id, errors, bytes: bytes.len() as u32 }).await;
    }
}

/// Passes signals and sizes on. A caller that is gone takes the process with it.
async fn relay(
    id: u32,
    mut signals: mpsc::Receiver<i32>,
    mut resizes: mpsc::Receiver<(u16, u16)>,
    frames: mpsc::Sender<Outgoing>,
    mut over: watch::Receiver<()>,
) {
    let mut resizable = true;
    loop {
        tokio::select! {
            _ = over.changed() => return,
            signal = signals.recv() => {
                // Without a caller it is killed.
                let (signal, last) = signal.map_or((nix::libc::SIGKILL, true), |signal| (signal, false));
                send(&frames, &ToGuest::Signal { id, signal }).await;
                if last {
                    return;
                }
            }
            size = resizes.recv(), if resizable => match size {
                Some((rows, columns)) => drop(send(&frames, &ToGuest::Resize { id, rows, columns }).await),
                None => resizable = false,
            },
        }
    }
}

async fn write_frames(
    mut writer: OwnedWriteHalf,
    mut frames: mpsc::Receiver<Outgoing>,
    mut turns: mpsc::Receiver<Outgoing>,
    mut quiet: bool,
) {
    loop {
        let outgoing = tokio::select! {
            biased;
            turn = turns.recv() => turn,
            frame = frames.recv(), if !quiet => frame,
        };
        let frame = match outgoing {
            None => return,
            Some(Outgoing::Frame(frame)) => frame,
            Some(Outgoing::Turn { frame, quiet: now }) => {
                quiet = now;
                frame
            }
        };
        let mut bytes = frame.header().to_vec();
        bytes.extend_from_slice(&frame.payload);
        if let Err(error) = writer.write_all(&bytes).await {
            tracing::debug!(%error, "the agent's stream is gone");
            return;
        }
    }
}

struct Reader {
    shared: Arc<Shared>,
    names: Vec<String>,
    ended: watch::Sender<BTreeMap<usize, ExitStatus>>,
    hello: watch::Sender<Option<u32>>,
}

impl Reader {
    async fn run(self, mut stream: OwnedReadHalf) {
        let error = loop {
            let mut header = [0; HEADER];
            if let Err(error) = stream.read_exact(&mut header).await {
                break error;
            }
            let (kind, channel, length) = match Frame::parse(header) {
                Ok(parsed) => parsed,
                Err(error) => break error,
            };
            let mut payload = vec![0; length];
            if let Err(error) = stream.read_exact(&mut payload).await {
                break error;
            }
            match kind {
                Kind::Control => match serde_json::from_slice(&payload) {
                    Ok(message) => self.handle(message),
                    Err(error) => break error.into(),
                },
                Kind::Log => self.log(channel as usize, &payload),
                Kind::Stdout | Kind::Stderr => {
                    if let Some(exec) = locked(&self.shared.execs).get(&channel) {
                        // Its copier ends with the exec.
                        let _ = exec.outputs[usize::from(kind == Kind::Stderr)].send(payload);
                    }
                }
                Kind::Stdin => break std::io::Error::other("the guest sends input"),
            }
        };
        tracing::debug!(%error, "the agent's stream ended");
        // Whoever waits is told by the drop.
        locked(&self.shared.answer).take();
        locked(&self.shared.execs).clear();
    }

    fn log(&self, container: usize, bytes: &[u8]) {
        // A write to a file of ours: the page cache takes it.
        if let Some(file) = locked(&self.shared.logs).get_mut(container)
            && let Err(error) = file.write_all(bytes)
        {
            tracing::warn!(%error, container, "lines of a container's log are lost");
        }
    }

    fn handle(&self, message: FromGuest) {
        match message {
            FromGuest::Hello { version } => drop(self.hello.send_replace(Some(version))),
            FromGuest::Booted | FromGuest::Quiet | FromGuest::Resumed => self.answer(Ok(message)),
            FromGuest::Failed { message } => self.answer(Err(message)),
            FromGuest::Ended { container, code, signal, time_ms } => {
                let name = self.names.get(container).cloned().unwrap_or_default();
                let status = ExitStatus { container: name, code, signal, time_ms };
                self.ended.send_modify(|ended| drop(ended.insert(container, status)));
            }
            FromGuest::Started { id } => {
                if let Some(started) =
                    locked(&self.shared.execs).get_mut(&id).and_then(|exec| exec.started.take())
                {
                    // The caller may not care.
                    let _ = started.send(());
                }
            }
            FromGuest::NotStarted { id, code, message } => {
                tracing::debug!(message, "exec could not start");
                let result = match code {
                    126 | 127 => Ok(Exit { code, signal: 0 }),
                    _ => Err(RuntimeError::Failed(message)),
                };
                self.exit(id, result);
            }
            FromGuest::Exited { id, code, signal } => self.exit(id, Ok(Exit { code, signal })),
            FromGuest::Taken { id, bytes } => {
                if let Some(exec) = locked(&self.shared.execs).get(&id) {
                    exec.input_window.add_permits(bytes as usize);
                }
            }
        }
    }

    fn answer(&self, answer: Result<FromGuest, String>) {
        if let Some(waiting) = locked(&self.shared.answer).take() {
            // Its caller may have given up.
            let _ = waiting.send(answer);
        }
    }

    fn exit(&self, id: u32, result: Result<Exit, RuntimeError>) {
        let entry = locked(&self.shared.execs).remove(&id);
        if let Some(exit) = entry.and_then(|mut exec| exec.exit.take()) {
            // Its caller may have given up.
            let _ = exit.send(result);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a guest that says this is answered with.
    async fn greeting(version: u32) -> Result<(), RuntimeError> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let agent = Agent::new(ours, false, Vec::new(), Vec::new());
        let frame = Frame::control(&FromGuest::Hello { version }).unwrap();
        theirs.write_all(&[&frame.header()[..], &frame.payload].concat()).await.unwrap();
        agent.greeted(Duration::from_secs(5)).await
    }

    #[tokio::test]
    async fn an_agent_of_another_protocol_is_refused_by_its_version() {
        greeting(VERSION).await.unwrap();
        let older = greeting(VERSION - 1).await.unwrap_err().to_string();
        assert!(older.contains(&format!("version {} of its protocol", VERSION - 1)), "{older}");
    }

    #[tokio::test]
    async fn a_guest_that_talks_nonsense_is_lost_not_believed() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let agent = Agent::new(ours, true, Vec::new(), Vec::new());
        theirs.write_all(&[9; HEADER]).await.unwrap();
        let lost = agent.resume(Renewal::default(), Duration::from_secs(5)).await.unwrap_err().to_string();
        assert!(lost.contains("agent is gone"), "{lost}");
    }
}

// SPDX-License-Identifier: Apache-2.0
//! Streams over a link: what both the hub and the shim run.
//!
//! One task owns the link, the table of streams and the present connection. Streams are opened by the shim; each
//! carries a head, data and an end one way, and headers, data and trailers the other. Data is sent within a window per
//! stream that the receiver opens again as it consumes ([`Receiver::next`]), so what is kept for replay is bounded by
//! windows times streams, also while the other end sleeps. A stream is over with trailers or a reset.
//!
//! ```text
//! handles ──commands──▶ ┌──────┐ ◀──frames── reader ◀─┐
//!         ◀───said───── │ task │                      ├─ connection (comes and goes)
//!                       └──────┘ ──bytes───▶ writer ──┘
//! ```
use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use substrate_proto::session::stream_frame::Frame;
use substrate_proto::session::{Head, Position, Reset, StreamFrame};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_util::task::AbortOnDropHandle;

use crate::link::{Link, Outgoing};
use crate::wire;

/// Unconsumed data of one stream in one direction, bytes.
pub const WINDOW: usize = 128 << 10;
/// Streams at once.
pub const MAX_STREAMS: usize = 256;
/// Most headers of one head, and their bytes.
const MAX_HEADERS: usize = 64;
const MAX_HEADER_BYTES: usize = 64 << 10;
/// Consumed bytes are granted anew in steps of this.
const GRANT: usize = WINDOW / 4;
const QUEUE: usize = 32;
/// An acknowledgement goes out with the next frame, or by itself once it is for so many bytes: most of what passes is short
/// and answered at once. What is never acknowledged is kept by the other end, which a handshake frees too.
const OWED: usize = GRANT;

/// gRPC status codes used here.
pub mod code {
    /// Done.
    pub const OK: u32 = 0;
    /// The caller is gone.
    pub const CANCELLED: u32 = 1;
    /// What was asked for makes no sense.
    pub const INVALID_ARGUMENT: u32 = 3;
    /// What was asked for does not exist.
    pub const NOT_FOUND: u32 = 5;
    /// A limit.
    pub const RESOURCE_EXHAUSTED: u32 = 8;
    /// What was asked for failed for reasons of our own.
    pub const INTERNAL: u32 = 13;
    /// May be tried again.
    pub const UNAVAILABLE: u32 = 14;
    /// Who asks is not known.
    pub const UNAUTHENTICATED: u32 = 16;
}

/// What the other end said on a stream.
#[derive(Debug, Clone, PartialEq)]
pub enum Said {
    /// The answer begins.
    Headers(Head),
    /// Bytes.
    Data(Bytes),
    /// The opener has said everything.
    End,
    /// The answer is complete; the stream is over.
    Trailers(Head),
    /// The stream is over.
    Reset(Reset),
}

/// The stream is over, or the link is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the stream is over")]
pub struct Over;

enum Command {
    Open {
        head: Head,
        reply: oneshot::Sender<Stream>,
    },
    Say {
        stream: Name,
        frame: Frame,
    },
    Consumed {
        stream: Name,
        bytes: usize,
    },
    Dropped {
        stream: Name,
    },
    Stand {
        reply: oneshot::Sender<Position>,
    },
    Accepts {
        other: Position,
        reply: oneshot::Sender<bool>,
    },
    Attach {
        ours: Position,
        other: Position,
        fresh: Option<u64>,
        connection: Connection,
        reply: oneshot::Sender<bool>,
    },
    Detach,
}

/// Which stream a handle is of: a fresh link numbers its streams from 1 again, and handles of the old one may outlive it.
#[derive(Clone, Copy)]
struct Name {
    /// How many fresh links there were before.
    epoch: u64,
    stream: u64,
}

/// Tells the task when all handles of a stream are gone.
struct Guard {
    stream: Name,
    commands: mpsc::UnboundedSender<Command>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        // No task: no stream either.
        let _ = self.commands.send(Command::Dropped { stream: self.stream });
    }
}

/// A stream; in two halves, so that both directions go on at the same time.
pub struct Stream {
    /// To the other end.
    pub sender: Sender,
    /// From it.
    pub receiver: Receiver,
}

/// The sending half.
pub struct Sender {
    guard: Arc<Guard>,
    window: Arc<Semaphore>,
}

impl Sender {
    /// Sends data, as the window allows.
    ///
    /// # Errors
    /// [`Over`].
    pub async fn data(&self, mut data: Bytes) -> Result<(), Over> {
        while !data.is_empty() {
            let chunk = data.split_to(data.len().min(wire::CHUNK));
            self.window.acquire_many(chunk.len() as u32).await.map_err(|_| Over)?.forget();
            self.say(Frame::Data(chunk.into()))?;
        }
        Ok(())
    }

    /// Sends data at once, or not at all.
    ///
    /// # Errors
    /// [`Over`]; also when the window does not allow it.
    pub fn offer(&self, data: &Bytes) -> Result<(), Over> {
        self.window.try_acquire_many(data.len() as u32).map_err(|_| Over)?.forget();
        for chunk in data.chunks(wire::CHUNK) {
            self.say(Frame::Data(chunk.to_vec()))?;
        }
        Ok(())
    }

    /// Sends anything else.
    ///
    /// # Errors
    /// [`Over`].
    pub fn say(&self, frame: Frame) -> Result<(), Over> {
        self.guard.commands.send(Command::Say { stream: self.guard.stream, frame }).map_err(|_| Over)
    }

    /// Ends the stream with a reason.
    pub fn reset(&self, code: u32, message: impl Into<String>) {
        // Over already: nobody to tell.
        let _ = self.say(Frame::Reset(Reset { code, message: message.into() }));
    }
}

/// The receiving half.
pub struct Receiver {
    guard: Arc<Guard>,
    said: mpsc::UnboundedReceiver<Said>,
    consumed: usize,
}

impl Receiver {
    /// What comes next; none when the stream is over. Bytes count as consumed when they are taken.
    pub async fn next(&mut self) -> Option<Said> {
        let said = self.said.recv().await?;
        if let Said::Data(data) = &said {
            self.consumed += data.len();
            if self.consumed >= GRANT {
                let command = Command::Consumed {
                    stream: self.guard.stream,
                    bytes: std::mem::take(&mut self.consumed),
                };
                // No task: the stream's end comes next.
                let _ = self.guard.commands.send(command);
            }
        }
        Some(said)
    }
}

/// A stream that the other end opened.
pub struct Opened {
    /// What it wants.
    pub head: Head,
    /// The stream.
    pub stream: Stream,
}

struct Connection {
    incoming: mpsc::Receiver<io::Result<Outgoing>>,
    outgoing: mpsc::Sender<Bytes>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

impl Connection {
    fn new(stream: impl AsyncRead + AsyncWrite + Send + 'static) -> Self {
        let (reader, mut writer) = tokio::io::split(stream);
        // A frame is read in four parts.
        let mut reader = tokio::io::BufReader::new(reader);
        let (arrived, incoming) = mpsc::channel(QUEUE);
        let (outgoing, mut to_write) = mpsc::channel::<Bytes>(QUEUE);
        let failed = arrived.clone();
        let reading = async move {
            loop {
                let frame = wire::read_frame(&mut reader).await;
                let ended = frame.is_err();
                if arrived.send(frame).await.is_err() || ended {
                    return;
                }
            }
        };
        let writing = async move {
            let mut batch = Vec::new();
            while to_write.recv_many(&mut batch, QUEUE).await > 0 {
                let mut bytes = BytesMut::new();
                for frame in batch.drain(..) {
                    bytes.extend_from_slice(&frame);
                }
                if let Err(error) = writer.write_all(&bytes).await {
                    // The reader may have said so already.
                    let _ = failed.send(Err(error)).await;
                    return;
                }
            }
        };
        let tasks =
            [AbortOnDropHandle::new(tokio::spawn(reading)), AbortOnDropHandle::new(tokio::spawn(writing))];
        Self { incoming, outgoing, _tasks: tasks }
    }
}

/// A handle on the task; cheap to clone. The task ends with its last handle and stream.
#[derive(Clone)]
pub struct Mux {
    commands: mpsc::UnboundedSender<Command>,
    connected: watch::Receiver<bool>,
}

struct Entry {
    said: mpsc::UnboundedSender<Said>,
    window: Arc<Semaphore>,
    /// Bytes that arrived and were not consumed.
    unconsumed: usize,
}

struct Task {
    link: Link,
    /// Counts fresh links.
    epoch: u64,
    streams: HashMap<u64, Entry>,
    /// The last number given to a stream.
    last_stream: u64,
    connection: Option<Connection>,
    connected: watch::Sender<bool>,
    commands: mpsc::WeakUnboundedSender<Command>,
    opened: Option<mpsc::UnboundedSender<Opened>>,
}

impl Mux {
    /// An end that opens streams.
    pub fn opener() -> Self {
        Self::start(None)
    }

    /// An end that answers streams.
    pub fn answerer() -> (Self, mpsc::UnboundedReceiver<Opened>) {
        let (opened, streams) = mpsc::unbounded_channel();
        (Self::start(Some(opened)), streams)
    }

    fn start(opened: Option<mpsc::UnboundedSender<Opened>>) -> Self {
        let (commands, received) = mpsc::unbounded_channel();
        let (connected, is_connected) = watch::channel(false);
        let task = Task {
            link: Link::default(),
            epoch: 0,
            streams: HashMap::new(),
            last_stream: 0,
            connection: None,
            connected,
            commands: commands.downgrade(),
            opened,
        };
        tokio::spawn(task.run(received));
        Self { commands, connected: is_connected }
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Over> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).map_err(|_| Over)?;
        answer.await.map_err(|_| Over)
    }

    /// Opens a stream.
    ///
    /// # Errors
    /// [`Over`]: the limit of streams is reached.
    pub async fn open(&self, head: Head) -> Result<Stream, Over> {
        self.ask(|reply| Command::Open { head, reply }).await
    }

    /// How far this end has received.
    ///
    /// # Errors
    /// [`Over`].
    pub async fn stand(&self) -> Result<Position, Over> {
        self.ask(|reply| Command::Stand { reply }).await
    }

    /// Whether the other end, which stands there, has the same past.
    ///
    /// # Errors
    /// [`Over`].
    pub async fn accepts(&self, other: Position) -> Result<bool, Over> {
        self.ask(|reply| Command::Accepts { other, reply }).await
    }

    /// Goes on over a connection, in the place of the present one. With `fresh` a new link begins and all streams are
    /// reset. False when this end does not stand at `ours` any more: the handshake has to be done again.
    ///
    /// # Errors
    /// [`Over`].
    pub async fn attach(
        &self,
        ours: Position,
        other: Position,
        fresh: Option<u64>,
        stream: impl AsyncRead + AsyncWrite + Send + 'static,
    ) -> Result<bool, Over> {
        let connection = Connection::new(stream);
        self.ask(|reply| Command::Attach { ours, other, fresh, connection, reply }).await
    }

    /// Gives the present connection up.
    pub fn detach(&self) {
        // No task: no connection.
        let _ = self.commands.send(Command::Detach);
    }

    /// Whether there is a connection; changes with it.
    pub fn connected(&self) -> watch::Receiver<bool> {
        self.connected.clone()
    }
}

impl Task {
    async fn run(mut self, mut commands: mpsc::UnboundedReceiver<Command>) {
        loop {
            let may_write = self.link.has_frame() || self.link.owed() >= OWED;
            match turn(&mut commands, self.connection.as_mut(), may_write).await {
                Turn::Command(Some(command)) => self.command(command),
                Turn::Command(None) => return,
                Turn::Frame(frame) => self.arrived(frame),
                Turn::Writable(Some(permit)) => {
                    if let Some(outgoing) = self.link.next_outgoing() {
                        permit.send(wire::encode(&outgoing));
                    }
                }
                Turn::Writable(None) => self.disconnect("the connection ended"),
            }
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Open { head, reply } => {
                if self.streams.len() >= MAX_STREAMS {
                    return;
                }
                let id = self.last_stream + 1;
                let Some(stream) = self.admit(id) else { return };
                self.say(id, Frame::Open(head));
                // The caller may have given up; then the stream's handles are dropped with this.
                let _ = reply.send(stream);
            }
            Command::Say { stream, frame } => {
                if let Some(stream) = self.present(stream) {
                    let last = matches!(frame, Frame::Trailers(_) | Frame::Reset(_));
                    self.say(stream, frame);
                    if last {
                        self.close(stream);
                    }
                }
            }
            Command::Consumed { stream, bytes } => {
                if let Some(stream) = self.present(stream)
                    && let Some(entry) = self.streams.get_mut(&stream)
                {
                    entry.unconsumed = entry.unconsumed.saturating_sub(bytes);
                    self.say(stream, Frame::Credit(bytes as u32));
                }
            }
            Command::Dropped { stream } => {
                if let Some(stream) = self.present(stream) {
                    let reset = Reset { code: code::CANCELLED, message: "given up".to_owned() };
                    self.say(stream, Frame::Reset(reset));
                    self.close(stream);
                }
            }
            // Who asked may have given up.
            Command::Stand { reply } => drop(reply.send(self.link.position())),
            Command::Accepts { other, reply } => drop(reply.send(self.link.accepts(&other))),
            Command::Attach { ours, other, fresh, connection, reply } => {
                let attached = self.attach(&ours, &other, fresh, connection);
                let _ = reply.send(attached);
            }
            Command::Detach => self.disconnect("given up"),
        }
    }

    /// The number of a stream that is not over.
    fn present(&self, name: Name) -> Option<u64> {
        (name.epoch == self.epoch && self.streams.contains_key(&name.stream)).then_some(name.stream)
    }

    fn attach(
        &mut self,
        ours: &Position,
        other: &Position,
        fresh: Option<u64>,
        connection: Connection,
    ) -> bool {
        match fresh {
            // Nobody was ever connected: what was said so far is only waiting.
            Some(id) if self.link.begin(id) => self.link.resume(&Position::default()),
            Some(id) => {
                self.link = Link::new(id);
                self.epoch += 1;
                self.last_stream = 0;
                for (_, entry) in self.streams.drain() {
                    entry.window.close();
                    let message =
                        "the sandbox does not continue where it was: it was started afresh, or came back \
                                   in an older state"
                            .to_owned();
                    // Whoever dropped the stream does not need to know.
                    let _ = entry.said.send(Said::Reset(Reset { code: code::UNAVAILABLE, message }));
                }
            }
            None => {
                if *ours != self.link.position() || !self.link.accepts(other) {
                    return false;
                }
                self.link.resume(other);
            }
        }
        self.connection = Some(connection);
        self.connected.send_replace(true);
        true
    }

    fn disconnect(&mut self, why: &str) {
        if self.connection.take().is_some() {
            tracing::debug!(why, "the link lost its connection");
            self.connected.send_replace(false);
        }
    }

    fn arrived(&mut self, frame: Option<io::Result<Outgoing>>) {
        let incoming = match frame {
            Some(Ok(incoming)) => incoming,
            Some(Err(error)) => return self.disconnect(&error.to_string()),
            None => return self.disconnect("it was closed"),
        };
        let understood = self.link.receive(incoming).map_err(io::Error::other);
        match understood.and_then(|frame| frame.map(wire::unpack).transpose()) {
            Ok(Some(frame)) => self.frame(frame),
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(%error, "the other end of a link broke its rules");
                self.disconnect("the rules were broken");
            }
        }
    }

    fn frame(&mut self, StreamFrame { stream, frame }: StreamFrame) {
        let Some(frame) = frame else { return };
        if let Frame::Open(head) = frame {
            return self.opened(stream, head);
        }
        // Of a stream that is over here, while the other end did not know yet.
        let Some(entry) = self.streams.get_mut(&stream) else { return };
        let (said, last) = match frame {
            Frame::Credit(bytes) => {
                let room = WINDOW.saturating_sub(entry.window.available_permits());
                entry.window.add_permits((bytes as usize).min(room));
                return;
            }
            Frame::Data(data) => {
                entry.unconsumed += data.len();
                if entry.unconsumed > WINDOW + GRANT {
                    self.refuse(stream, code::RESOURCE_EXHAUSTED, "more data than the window allows");
                    return self.close(stream);
                }
                (Said::Data(data.into()), false)
            }
            Frame::Headers(head) => (Said::Headers(head), false),
            Frame::End(_) => (Said::End, false),
            Frame::Trailers(head) => (Said::Trailers(head), true),
            Frame::Reset(reset) => (Said::Reset(reset), true),
            Frame::Open(_) => return,
        };
        // Whoever dropped it says so by itself.
        let _ = entry.said.send(said);
        if last {
            self.close(stream);
        }
    }

    fn opened(&mut self, stream: u64, head: Head) {
        let bytes: usize = head.headers.iter().map(|header| header.name.len() + header.value.len()).sum();
        let Some(opened) = self.opened.clone().filter(|_| stream > self.last_stream) else {
            return self.refuse(stream, code::INTERNAL, "streams are not opened here, or not in this order");
        };
        self.last_stream = stream;
        if self.streams.len() >= MAX_STREAMS || head.headers.len() > MAX_HEADERS || bytes > MAX_HEADER_BYTES {
            return self.refuse(
                stream,
                code::RESOURCE_EXHAUSTED,
                "too many streams at once, or too many headers",
            );
        }
        let Some(handles) = self.admit(stream) else { return };
        if opened.send(Opened { head, stream: handles }).is_err() {
            tracing::debug!("nobody answers streams any more");
        }
    }

    fn admit(&mut self, stream: u64) -> Option<Stream> {
        let guard = Arc::new(Guard {
            stream: Name { epoch: self.epoch, stream },
            commands: self.commands.upgrade()?,
        });
        let (said, receiver) = mpsc::unbounded_channel();
        let window = Arc::new(Semaphore::new(WINDOW));
        self.last_stream = stream;
        self.streams.insert(stream, Entry { said, window: Arc::clone(&window), unconsumed: 0 });
        Some(Stream {
            sender: Sender { guard: Arc::clone(&guard), window },
            receiver: Receiver { guard, said: receiver, consumed: 0 },
        })
    }

    fn refuse(&mut self, stream: u64, code: u32, message: &str) {
        self.say(stream, Frame::Reset(Reset { code, message: message.to_owned() }));
    }

    fn close(&mut self, stream: u64) {
        if let Some(entry) = self.streams.remove(&stream) {
            entry.window.close();
        }
    }

    fn say(&mut self, stream: u64, frame: Frame) {
        self.link.push(wire::pack(&StreamFrame { stream, frame: Some(frame) }));
    }
}

/// What the task turns to next.
enum Turn {
    Command(Option<Command>),
    Frame(Option<io::Result<Outgoing>>),
    Writable(Option<mpsc::OwnedPermit<Bytes>>),
}

async fn turn(
    commands: &mut mpsc::UnboundedReceiver<Command>,
    connection: Option<&mut Connection>,
    may_write: bool,
) -> Turn {
    let Some(Connection { incoming, outgoing, .. }) = connection else {
        return Turn::Command(commands.recv().await);
    };
    tokio::select! {
        command = commands.recv() => Turn::Command(command),
        frame = incoming.recv() => Turn::Frame(frame),
        permit = outgoing.clone().reserve_owned(), if may_write => Turn::Writable(permit.ok()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn handles_of_a_link_that_was_given_up_do_not_touch_the_streams_of_the_next() {
        let mux = Mux::opener();
        let old = mux.open(Head::default()).await.unwrap();
        let (one, _far) = tokio::io::duplex(1 << 16);
        let position = mux.stand().await.unwrap();
        assert!(mux.attach(position.clone(), Position::default(), Some(7), one).await.unwrap());
        let (two, _far) = tokio::io::duplex(1 << 16);
        assert!(mux.attach(position, Position::default(), Some(8), two).await.unwrap());
        // The same number again.
        let mut new = mux.open(Head::default()).await.unwrap();
        old.sender.reset(code::CANCELLED, "");
        drop(old);
        // Commands are taken in order: this one after those.
        mux.stand().await.unwrap();
        new.sender.offer(&Bytes::from_static(b"x")).unwrap();
        assert!(new.receiver.said.try_recv().is_err(), "the stream is still there");
        assert!(!new.receiver.said.is_closed());
    }
}

// SPDX-License-Identifier: Apache-2.0
//! A process that lives in an actor's control group and starts the runtime's commands there.
//!
//! ```text
//! ateom ──SOCK_SEQPACKET (its stdin)──▶ launcher ──fork, exec──▶ runsc create │ restore │ exec …
//!       ◀── spawned, exited ──────────          ◀── orphans: sandbox, gofers ──
//! ```
//! Why not fork from the ateom itself: a process that moves between v1 control groups waits for an RCU grace period
//! (7–20 ms seen), on every command of a wake-up. What the launcher starts is *born* in the right group, and also the
//! accounting and the fence cover runsc's own processes. It is a subreaper, so the sandbox's processes are reaped as
//! they end. It is this same program under another argument, single-threaded and without a runtime.
//!
//! When the ateom dies, nobody enforces the lease any more: the launcher sees the end of its socket and kills its
//! group (P1 in depth; the node agent fences besides).
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::cgroup::{Cgroup, Hierarchy};
use crate::children::{Children, Exit};
use crate::seqpacket::{self, SeqPacket};

/// First argument of the program that makes it a launcher; the second is its control group's name.
pub const ARGUMENT: &str = "launcher";

#[derive(Debug, Serialize, Deserialize)]
enum Request {
    /// With three descriptors: standard input, output and error.
    Spawn {
        id: u64,
        argv: Vec<String>,
        terminal: bool,
    },
    Signal {
        id: u64,
        signal: i32,
    },
}

#[derive(Debug, Serialize, Deserialize)]
enum Reply {
    Ready,
    Failed { id: u64, error: String },
    Exited { id: u64, exit: Exit },
}

/// Why a command could not be run.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The launcher itself could not be started.
    #[error("cannot start the launcher process in cgroup {cgroup}: {source}")]
    Start {
        /// Where it was to live.
        cgroup: String,
        /// The system's reason.
        source: io::Error,
    },
    /// The launcher is dead: its group was killed.
    #[error("the actor's cgroup was killed while {0} ran")]
    Gone(String),
    /// The program cannot be executed.
    #[error("cannot execute {program}: {reason}")]
    Exec {
        /// Path of the program.
        program: String,
        /// The system's reason.
        reason: String,
    },
    /// Talking to the launcher failed.
    #[error("cannot talk to the launcher: {0}")]
    Io(#[from] io::Error),
}

type Waiting = Arc<Mutex<HashMap<u64, oneshot::Sender<Result<Exit, String>>>>>;

/// The ateom's end of a launcher. Dropping the last clone makes the launcher kill its group.
#[derive(Debug, Clone)]
pub struct Launcher {
    socket: Arc<SeqPacket>,
    waiting: Waiting,
    next: Arc<std::sync::atomic::AtomicU64>,
    gone: CancellationToken,
    /// Held for its drop: the reader has a share of the socket, which must close with the last handle.
    _reader: Arc<AbortOnDrop>,
}

#[derive(Debug)]
struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A command that was asked for.
#[derive(Debug)]
pub struct Job {
    id: u64,
    program: String,
    launcher: Launcher,
    exit: oneshot::Receiver<Result<Exit, String>>,
}

/// Standard streams of a command.
#[derive(Debug)]
pub struct Streams {
    /// Descriptor 0.
    pub stdin: OwnedFd,
    /// Descriptor 1.
    pub stdout: OwnedFd,
    /// Descriptor 2.
    pub stderr: OwnedFd,
}

impl Streams {
    /// Reads nothing, writes nowhere.
    ///
    /// # Errors
    /// When /dev/null cannot be opened.
    pub fn null() -> io::Result<Self> {
        let file = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
        let fd = OwnedFd::from(file);
        Ok(Self { stdin: fd.try_clone()?, stdout: fd.try_clone()?, stderr: fd })
    }

    /// Reads nothing and writes both outputs to one descriptor.
    ///
    /// # Errors
    /// When /dev/null cannot be opened.
    pub fn output(fd: OwnedFd) -> io::Result<Self> {
        let stdin = OwnedFd::from(std::fs::File::open("/dev/null")?);
        Ok(Self { stdin, stdout: fd.try_clone()?, stderr: fd })
    }
}

impl Launcher {
    /// Starts a launcher and returns when it lives in `cgroup`, which must exist.
    ///
    /// # Errors
    /// [`LaunchError::Start`].
    pub async fn start(children: &Children, cgroup: &Cgroup) -> Result<Self, LaunchError> {
        let failed = |source| LaunchError::Start { cgroup: cgroup.name().to_owned(), source };
        let (ours, theirs) = seqpacket::pair().map_err(failed)?;
        let mut command = Command::new("/proc/self/exe");
        command.args([ARGUMENT, cgroup.name()]).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command.stdin(Stdio::from(theirs)).stdout(Stdio::null());
        children.spawn(&mut command).map_err(failed)?;
        // Holds the other end of the pair; a dead launcher is seen only when it is closed here.
        drop(command);
        let socket = Arc::new(SeqPacket::new(ours).map_err(failed)?);
        match socket.receive().await.map_err(failed)? {
            Some((message, _)) if matches!(serde_json::from_slice(&message), Ok(Reply::Ready)) => {}
            _ => return Err(failed(io::Error::other("it ended before it was ready; see this ateom's log"))),
        }
        let waiting = Waiting::default();
        let gone = CancellationToken::new();
        let reader = tokio::spawn(read_replies(Arc::clone(&socket), Arc::clone(&waiting), gone.clone()));
        Ok(Self {
            socket,
            waiting,
            next: Arc::default(),
            gone,
            _reader: Arc::new(AbortOnDrop(reader.abort_handle())),
        })
    }

    /// Returns when the launcher is dead: nothing can be started in the group any more.
    pub async fn gone(&self) {
        self.gone.cancelled().await;
    }

    /// Starts a command in the group. With `terminal`, its standard input becomes its controlling terminal.
    ///
    /// # Errors
    /// [`LaunchError::Gone`] when the group was killed.
    pub async fn spawn(
        &self,
        argv: Vec<String>,
        streams: Streams,
        terminal: bool,
    ) -> Result<Job, LaunchError> {
        let id = self.next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let program = argv.first().cloned().unwrap_or_default();
        let (sender, exit) = oneshot::channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(id, sender);
        let job = Job {
            id,
            program: argv.get(..2).map_or_else(|| program.clone(), |two| two.join(" ")),
            launcher: self.clone(),
            exit,
        };
        let message = encode(&Request::Spawn { id, argv, terminal })?;
        let fds = [streams.stdin.as_raw_fd(), streams.stdout.as_raw_fd(), streams.stderr.as_raw_fd()];
        if self.socket.send(&message, &fds).await.is_err() {
            return Err(LaunchError::Gone(program));
        }
        Ok(job)
    }
}

impl Job {
    /// Waits for its end.
    ///
    /// # Errors
    /// [`LaunchError::Exec`] or [`LaunchError::Gone`].
    pub async fn wait(&mut self) -> Result<Exit, LaunchError> {
        match (&mut self.exit).await {
            Ok(Ok(exit)) => Ok(exit),
            Ok(Err(reason)) => Err(LaunchError::Exec { program: self.program.clone(), reason }),
            Err(_) => Err(LaunchError::Gone(self.program.clone())),
        }
    }

    /// Sends a signal to the command itself; one that has ended is left alone.
    pub async fn signal(&self, signal: Signal) {
        let request = Request::Signal { id: self.id, signal: signal as i32 };
        if let Ok(message) = encode(&request)
            && let Err(error) = self.launcher.socket.send(&message, &[]).await
        {
            tracing::debug!(%error, "the launcher is gone, and its commands with it");
        }
    }
}

async fn read_replies(socket: Arc<SeqPacket>, waiting: Waiting, gone: CancellationToken) {
    loop {
        let message = match socket.receive().await {
            Ok(Some((message, _))) => message,
            Ok(None) => break,
            Err(error) => {
                tracing::debug!(%error, "lost the launcher");
                break;
            }
        };
        let (id, result) = match serde_json::from_slice(&message) {
            Ok(Reply::Exited { id, exit }) => (id, Ok(exit)),
            Ok(Reply::Failed { id, error }) => (id, Err(error)),
            Ok(Reply::Ready) => continue,
            Err(error) => {
                tracing::error!(%error, "unreadable reply of the launcher");
                continue;
            }
        };
        let sender = waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        if let Some(sender) = sender {
            // The caller may have lost interest.
            drop(sender.send(result));
        }
    }
    // Dropping the senders tells every caller that the launcher is gone.
    waiting.lock().unwrap_or_else(PoisonError::into_inner).clear();
    gone.cancel();
}

fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > seqpacket::MAX_MESSAGE {
        return Err(io::Error::other(format!(
            "a command line of {} bytes is too long, at most {} fit",
            bytes.len(),
            seqpacket::MAX_MESSAGE
        )));
    }
    Ok(bytes)
}

/// The launcher's own life: until its socket closes, then the end of its group.
///
/// # Errors
/// When it cannot join the group or talk to the ateom.
pub fn serve(cgroup: &str) -> anyhow::Result<()> {
    use anyhow::Context as _;
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.thread_block().context("cannot block SIGCHLD")?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .context("cannot watch SIGCHLD")?;
    nix::sys::prctl::set_child_subreaper(true).context("cannot become a subreaper")?;
    nix::sys::prctl::set_name(c"ateom-launcher").context("cannot name the process")?;
    let group = Cgroup::at(&Hierarchy::detect()?, cgroup);
    group.add(0)?;
    // Children get streams of their own, so the socket must not pass to them.
    let socket = nix::fcntl::fcntl(io::stdin(), nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(3))
        .map(|fd| crate::sys::received(&[fd]))?
        .pop()
        .context("no socket")?;
    let null = std::fs::File::open("/dev/null").context("cannot open /dev/null")?;
    nix::unistd::dup2_stdin(&null).context("cannot replace stdin")?;
    seqpacket::send(socket.as_raw_fd(), &encode(&Reply::Ready)?, &[])?;
    let mut jobs: HashMap<i32, u64> = HashMap::new();
    loop {
        let mut fds =
            [PollFd::new(socket.as_fd(), PollFlags::POLLIN), PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context("poll"),
        }
        let (asked, ended) = (fds[0].any().unwrap_or(false), fds[1].any().unwrap_or(false));
        if ended {
            while let Ok(Some(_)) = signals.read_signal() {}
            while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                let Some((pid, exit)) = Exit::from_status(status) else { break };
                if let Some(id) = jobs.remove(&pid.as_raw()) {
                    seqpacket::send(socket.as_raw_fd(), &encode(&Reply::Exited { id, exit })?, &[])?;
                }
            }
        }
        if asked {
            let Ok(Some((message, streams))) = seqpacket::receive(socket.as_raw_fd()) else {
                // The ateom is dead or has let go of this actor: so must everything in the group.
                group.kill()?;
                return Ok(());
            };
            handle(&message, streams, &mut jobs, &socket)?;
        }
    }
}

fn handle(
    message: &[u8],
    streams: Vec<OwnedFd>,
    jobs: &mut HashMap<i32, u64>,
    socket: &OwnedFd,
) -> anyhow::Result<()> {
    match serde_json::from_slice(message)? {
        Request::Spawn { id, argv, terminal } => {
            let result = match (argv.split_first(), <[OwnedFd; 3]>::try_from(streams)) {
                (Some((program, arguments)), Ok([stdin, stdout, stderr])) => {
                    let mut command = Command::new(program);
                    command.args(arguments).stdin(stdin).stdout(stdout).stderr(stderr);
                    if terminal {
                        crate::sys::with_terminal(&mut command);
                    }
                    command.spawn().map_err(|error| error.to_string())
                }
                _ => Err("malformed request".to_owned()),
            };
            match result {
                Ok(child) => {
                    jobs.insert(child.id() as i32, id);
                }
                Err(error) => {
                    seqpacket::send(socket.as_raw_fd(), &encode(&Reply::Failed { id, error })?, &[])?;
                }
            }
        }
        Request::Signal { id, signal } => {
            let pid = jobs.iter().find(|(_, job)| **job == id).map(|(pid, _)| *pid);
            if let (Some(pid), Ok(signal)) = (pid, Signal::try_from(signal)) {
                // It is not reaped yet, so the pid is still its own.
                let _ = nix::sys::signal::kill(Pid::from_raw(pid), signal);
            }
        }
    }
    Ok(())
}

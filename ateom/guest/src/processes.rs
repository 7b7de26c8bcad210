// SPDX-License-Identifier: Apache-2.0
//! Processes of the workload and their streams.
//!
//! One thread starts a process in the right pid namespace and waits for its end; one more for each stream copies. What
//! waits for the other side of the connection waits in its own thread only ([`Credit`]).
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};
use std::thread;

use ateom_guest::{CHUNK, Frame, Kind, WINDOW};
use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, setns, unshare};

use crate::agent::Link;
use crate::stage::{self, Plan};
use crate::sys;

/// Where a process is born.
#[derive(Debug, Clone, Copy)]
pub enum Born {
    /// As the first one of a new pid namespace.
    First,
    /// In the pid namespace of another.
    Beside(i32),
}

/// Why a process could not be started.
#[derive(Debug)]
pub struct NotStarted {
    /// 127, 126, or 0 for another reason.
    pub code: i32,
    /// For people.
    pub message: String,
}

impl NotStarted {
    fn because(what: &str, error: impl std::fmt::Display) -> Self {
        Self { code: 0, message: format!("cannot {what}: {error}") }
    }
}

/// Starts a process; returns when it has become its program, or with the reason why it did not.
pub fn start(plan: &Plan, born: Born, streams: [Stdio; 3]) -> Result<Child, NotStarted> {
    // On a thread of its own: one whose children are born in another pid namespace can start no threads (clone(2)).
    let started = thread::scope(|scope| scope.spawn(|| start_here(plan, born, streams)).join());
    started.unwrap_or_else(|_| Err(NotStarted::because("start a process", "its thread panicked")))
}

fn start_here(plan: &Plan, born: Born, streams: [Stdio; 3]) -> Result<Child, NotStarted> {
    match born {
        Born::First => unshare(CloneFlags::CLONE_NEWPID)
            .map_err(|errno| NotStarted::because("make a pid namespace", errno))?,
        Born::Beside(pid) => {
            let namespace = File::open(format!("/proc/{pid}/ns/pid"))
                .map_err(|error| NotStarted::because("find the container's pid namespace", error))?;
            setns(namespace, CloneFlags::CLONE_NEWPID)
                .map_err(|errno| NotStarted::because("join the container's pid namespace", errno))?;
        }
    }
    let (errors, their_errors) =
        nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|errno| NotStarted::because("make a pipe", errno))?;
    let text = serde_json::to_vec(plan).map_err(|error| NotStarted::because("write the plan", error))?;
    let memory = nix::sys::memfd::memfd_create(c"plan", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
        .map_err(|errno| NotStarted::because("write the plan", errno))?;
    let mut memory = File::from(memory);
    memory
        .write_all(&text)
        .and_then(|()| std::io::Seek::rewind(&mut memory))
        .map_err(|error| NotStarted::because("write the plan", error))?;
    let [stdin, stdout, stderr] = streams;
    let mut command = Command::new("/proc/self/exe");
    command.arg(stage::ARGUMENT).env_clear().stdin(stdin).stdout(stdout).stderr(stderr);
    // Copies with high numbers: neither may be one that the other is put on.
    let high = |fd: &OwnedFd| {
        nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(16))
            .map_err(|errno| NotStarted::because("copy a descriptor", errno))
    };
    let (errors_high, plan_high) = (high(&their_errors)?, high(&OwnedFd::from(memory))?);
    sys::inherit(&mut command, [(errors_high, stage::ERRORS), (plan_high, stage::PLAN)]);
    let spawned = command.spawn();
    // The streams' other ends are closed with the command.
    drop(command);
    drop(their_errors);
    for fd in [errors_high, plan_high] {
        let _ = nix::unistd::close(fd);
    }
    let mut child = spawned.map_err(|error| NotStarted::because("start a process", error))?;
    let mut message = String::new();
    // What cannot be read is told by the exit code alone.
    let _ = File::from(errors).read_to_string(&mut message);
    if message.is_empty() {
        return Ok(child);
    }
    let code = child.wait().ok().and_then(|status| status.code()).unwrap_or(0);
    Err(NotStarted { code: if matches!(code, 126 | 127) { code } else { 0 }, message })
}

/// Exit code as a shell says it, and the signal.
pub fn outcome(status: ExitStatus) -> (i32, i32) {
    match status.signal() {
        Some(signal) => (128 + signal, signal),
        None => (status.code().unwrap_or(255), 0),
    }
}

/// What of a window is still free.
#[derive(Debug)]
pub struct Credit {
    free: Mutex<Option<usize>>,
    changed: Condvar,
}

impl Credit {
    /// A whole window.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { free: Mutex::new(Some(WINDOW)), changed: Condvar::new() })
    }

    /// Waits for room; `false`: nobody listens any more.
    fn take(&self, bytes: usize) -> bool {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match &mut *free {
                None => return false,
                Some(room) if *room >= bytes => {
                    *room -= bytes;
                    return true;
                }
                Some(_) => free = self.changed.wait(free).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Gives room back.
    pub fn give(&self, bytes: usize) {
        if let Some(room) = &mut *self.free.lock().unwrap_or_else(PoisonError::into_inner) {
            *room += bytes;
        }
        self.changed.notify_all();
    }

    /// Ends all waiting.
    pub fn close(&self) {
        *self.free.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.changed.notify_all();
    }
}

/// Copies a stream into frames until its end. The receiver is told of the end by its sender's drop.
pub fn pump(
    mut from: impl Read + Send + 'static,
    link: &Arc<Link>,
    kind: Kind,
    channel: u32,
    credit: Option<Arc<Credit>>,
) -> mpsc::Receiver<()> {
    let (done, ended) = mpsc::channel();
    let link = Arc::clone(link);
    thread::spawn(move || {
        let _done = done;
        let mut buffer = vec![0; CHUNK];
        loop {
            match from.read(&mut buffer) {
                Ok(length) if length > 0 => {
                    if credit.as_ref().is_some_and(|credit| !credit.take(length)) {
                        return;
                    }
                    link.send(&Frame { kind, channel, payload: buffer[..length].to_vec() });
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                // EIO is the end of a terminal.
                _ => return,
            }
        }
    });
    ended
}

/// Takes input for a process, which sees its end when the sender is dropped. `taken` is told what was passed on.
pub fn feed(
    mut to: impl Write + Send + 'static,
    taken: impl Fn(usize) + Send + 'static,
) -> mpsc::Sender<Vec<u8>> {
    let (sender, receiver) = mpsc::channel::<Vec<u8>>();
    thread::spawn(move || {
        let mut open = true;
        for bytes in receiver {
            // One that reads no more loses the rest, as in a pipe.
            open = open && to.write_all(&bytes).is_ok();
            taken(bytes.len());
        }
    });
    sender
}

/// A terminal of a container's: the master, and the other end for the process.
pub fn terminal(pid: i32, size: (u16, u16)) -> Result<(OwnedFd, OwnedFd), NotStarted> {
    let failed = |error: std::io::Error| NotStarted::because("make a terminal", error);
    let master = File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/{pid}/root/dev/pts/ptmx"))
        .map(OwnedFd::from)
        .map_err(failed)?;
    let peer = sys::terminal_peer(master.as_fd()).map_err(failed)?;
    sys::set_terminal_size(master.as_fd(), size.0, size.1).map_err(failed)?;
    debug_assert!(peer.as_raw_fd() >= 0);
    Ok((master, peer))
}

// SPDX-License-Identifier: Apache-2.0
//! A process in an actor for someone outside: streams of messages on one side, pipes or a terminal on the other.
//!
//! The other ends of pipes or terminal are handed to the sandbox; here are only ours. A client that goes away takes
//! its process with it, and so does the end of the activation. Counted as activity for the idle decision.
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::pty::openpty;
use nix::unistd::pipe2;
use substrate_proto::types::exec_input::Input;
use substrate_proto::types::exec_output::Output;
use substrate_proto::types::{ExecInput, ExecOutput, ExecStart, ExitStatus, TerminalSize};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::sync::oneshot::error::RecvError;
use tokio::task::JoinSet;
use tokio_stream::{Stream, StreamExt as _};
use tonic::Status;

use crate::children::Exit;
use crate::error::SlotError;
use crate::launcher::Streams;
use crate::occupancy::Pass;
use crate::runtime::{ExecProcess, ExecRequest, RuntimeError, Sandbox};
use crate::sys::watched;

/// Bytes of one message.
const CHUNK: usize = 32 * 1024;
/// Messages that a slow client may be behind.
const QUEUE: usize = 16;
/// How long output may still come after the process's end, from children that keep its streams open.
const LINGER: Duration = Duration::from_millis(250);
/// Most arguments and variables.
const MAX_ITEMS: usize = 4096;

/// What a client may ask for, checked.
///
/// # Errors
/// [`SlotError::Invalid`] naming the field.
pub fn request_of(start: &ExecStart) -> Result<ExecRequest, SlotError> {
    let invalid = |message: String| Err(SlotError::Invalid(message));
    if start.command.is_empty() {
        return invalid("exec: command is empty".to_owned());
    }
    if start.command.len() > MAX_ITEMS || start.env.len() > MAX_ITEMS {
        return invalid(format!("exec: more than {MAX_ITEMS} arguments or variables"));
    }
    if !start.working_dir.is_empty() && !start.working_dir.starts_with('/') {
        return invalid(format!("exec: working directory {:?} is not absolute", start.working_dir));
    }
    if let Some(name) = start.env.keys().find(|name| name.is_empty() || name.contains('=')) {
        return invalid(format!("exec: {name:?} is not a variable's name"));
    }
    let mut env: Vec<String> = start.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
    env.sort();
    if start.tty && !start.env.contains_key("TERM") {
        env.push("TERM=xterm".to_owned());
    }
    Ok(ExecRequest {
        container: start.container.clone(),
        args: start.command.clone(),
        env,
        working_dir: start.working_dir.clone(),
        user: parse_user(&start.user)?,
        terminal: start.tty,
    })
}

fn parse_user(user: &str) -> Result<Option<(u32, Option<u32>)>, SlotError> {
    if user.is_empty() {
        return Ok(None);
    }
    let (uid, gid) = user.split_once(':').map_or((user, None), |(uid, gid)| (uid, Some(gid)));
    match (uid.parse(), gid.map(str::parse).transpose()) {
        (Ok(uid), Ok(gid)) => Ok(Some((uid, gid))),
        _ => Err(SlotError::Invalid(format!("exec: user {user:?} is not uid or uid:gid in numbers"))),
    }
}

/// Our end of a descriptor that the process has the other end of.
type End = Arc<AsyncFd<OwnedFd>>;

/// Our ends. With a terminal all are its master.
struct Ends {
    stdin: End,
    stdout: End,
    stderr: Option<End>,
    terminal: bool,
}

fn end(fd: OwnedFd) -> io::Result<End> {
    nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
    Ok(Arc::new(watched(fd)?))
}

fn pipes() -> io::Result<(Ends, Streams)> {
    let flags = nix::fcntl::OFlag::O_CLOEXEC;
    let ((their_in, our_in), (our_out, their_out), (our_err, their_err)) =
        (pipe2(flags)?, pipe2(flags)?, pipe2(flags)?);
    let ends =
        Ends { stdin: end(our_in)?, stdout: end(our_out)?, stderr: Some(end(our_err)?), terminal: false };
    Ok((ends, Streams { stdin: their_in, stdout: their_out, stderr: their_err }))
}

fn terminal(size: Option<TerminalSize>) -> io::Result<(Ends, Streams)> {
    let pty = openpty(None, None)?;
    for fd in [&pty.master, &pty.slave] {
        nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    }
    resize(&pty.master, size.unwrap_or(TerminalSize { rows: 24, columns: 80 }))?;
    let master = end(pty.master)?;
    let ends = Ends { stdin: Arc::clone(&master), stdout: master, stderr: None, terminal: true };
    let streams =
        Streams { stdin: pty.slave.try_clone()?, stdout: pty.slave.try_clone()?, stderr: pty.slave };
    Ok((ends, streams))
}

fn resize(master: &OwnedFd, size: TerminalSize) -> io::Result<()> {
    let bounded = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
    crate::sys::set_terminal_size(master.as_fd(), bounded(size.rows), bounded(size.columns))
}

/// Waits for bytes; 0 is the end.
pub(crate) async fn read_some(fd: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        let mut ready = fd.readable().await?;
        match ready.try_io(|fd| Ok(nix::unistd::read(fd.get_ref(), buffer)?)) {
            Ok(result) => return result,
            Err(_would_block) => {}
        }
    }
}

/// Writes all, waiting for room.
pub(crate) async fn write_all(fd: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let mut ready = fd.writable().await?;
        match ready.try_io(|fd| Ok(nix::unistd::write(fd.get_ref(), bytes)?)) {
            Ok(written) => bytes = &bytes[written?..],
            Err(_would_block) => {}
        }
    }
    Ok(())
}

type Sender = mpsc::Sender<Result<ExecOutput, Status>>;

/// Starts the process and returns what comes out of it. What moves the bytes ends with the process, with its client,
/// or with the activation.
///
/// # Errors
/// [`SlotError`] when it cannot be started at all.
pub async fn run(
    sandbox: &dyn Sandbox,
    pass: Pass,
    start: &ExecStart,
    input: impl Stream<Item = Result<ExecInput, Status>> + Send + Unpin + 'static,
) -> Result<mpsc::Receiver<Result<ExecOutput, Status>>, SlotError> {
    let refused = |message: String| SlotError::Refused { reason: "EXEC", message };
    let request = request_of(start)?;
    let made = if start.tty { terminal(start.size) } else { pipes() };
    let (ends, streams) =
        made.map_err(|error| refused(format!("cannot make the streams of an exec: {error}")))?;
    let process = sandbox.exec(request, streams).await.map_err(|error| refused(error.to_string()))?;
    let (sender, receiver) = mpsc::channel(QUEUE);
    tokio::spawn(serve(ends, process, Arc::new(pass), start.container.clone(), input, sender));
    Ok(receiver)
}

async fn serve(
    ends: Ends,
    process: ExecProcess,
    pass: Arc<Pass>,
    container: String,
    input: impl Stream<Item = Result<ExecInput, Status>> + Send + Unpin + 'static,
    sender: Sender,
) {
    let ExecProcess { started, mut exit, signals, resizes } = process;
    // Dropped, and with them the signals' sender, when this function returns: that kills what still runs.
    let mut helpers = JoinSet::new();
    let mut outputs = JoinSet::new();
    let announce = sender.clone();
    helpers.spawn(async move {
        if started.await.is_ok() {
            // The client may have gone.
            drop(announce.send(Ok(message(Output::Started(true)))).await);
        }
        // Not a reason to end.
        std::future::pending::<()>().await;
    });
    outputs.spawn(copy_out(ends.stdout, Output::Stdout, Arc::clone(&pass), sender.clone()));
    if let Some(stderr) = ends.stderr {
        outputs.spawn(copy_out(stderr, Output::Stderr, Arc::clone(&pass), sender.clone()));
    }
    helpers.spawn(copy_in(ends.stdin, ends.terminal, input, signals.clone(), resizes, Arc::clone(&pass)));
    let result = tokio::select! {
        result = &mut exit => result,
        () = sender.closed() => return,
        // The client's side failed.
        _ = helpers.join_next() => return,
        () = pass.cut.cancelled() => {
            drop(sender.send(Err(Status::aborted("the process ended with its actor"))).await);
            return;
        }
    };
    // Children of the process may keep its streams open for ever.
    let drained = async { while outputs.join_next().await.is_some() {} };
    if tokio::time::timeout(LINGER, drained).await.is_err() {
        tracing::debug!("output is still open after the end of its process");
    }
    // The client may have gone.
    drop(sender.send(exit_message(container, result)).await);
}

fn message(output: Output) -> ExecOutput {
    ExecOutput { output: Some(output) }
}

async fn copy_out(end: End, kind: fn(Vec<u8>) -> Output, pass: Arc<Pass>, sender: Sender) {
    let mut buffer = vec![0; CHUNK];
    loop {
        match read_some(&end, &mut buffer).await {
            Ok(length) if length > 0 => {
                pass.touch();
                if sender.send(Ok(message(kind(buffer[..length].to_vec())))).await.is_err() {
                    return;
                }
            }
            // EIO is the end of a terminal.
            _ => return,
        }
    }
}

/// Ends only when the client's side fails; its orderly end is the end of the process's input.
async fn copy_in(
    end: End,
    terminal: bool,
    mut input: impl Stream<Item = Result<ExecInput, Status>> + Send + Unpin,
    signals: mpsc::Sender<i32>,
    resizes: Option<mpsc::Sender<(u16, u16)>>,
    pass: Arc<Pass>,
) {
    /// What a terminal takes for the end of input (VEOF, termios(3)).
    const END_OF_INPUT: &[u8] = &[4];
    let mut end = Some(end);
    loop {
        let asked = match input.next().await {
            Some(Ok(message)) => message.input,
            Some(Err(_)) => return,
            None => break,
        };
        match (asked, &end) {
            (Some(Input::Stdin(bytes)), Some(open)) => {
                pass.touch();
                // A client is read only as fast as the process reads.
                if write_all(open, &bytes).await.is_err() {
                    end = None;
                }
            }
            (Some(Input::CloseStdin(true)), Some(open)) => {
                if !terminal {
                    end = None;
                } else if let Err(error) = write_all(open, END_OF_INPUT).await {
                    tracing::debug!(%error, "cannot end a terminal's input");
                }
            }
            (Some(Input::Resize(size)), Some(open)) if terminal => {
                if let Some(resizes) = &resizes {
                    let bounded = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
                    // Its process may be gone.
                    let _ = resizes.send((bounded(size.rows), bounded(size.columns))).await;
                }
                if let Err(error) = resize(open.get_ref(), size) {
                    tracing::debug!(%error, "cannot resize a terminal");
                }
            }
            (Some(Input::Signal(signal)), _) => drop(signals.send(signal).await),
            _ => {}
        }
    }
    if !terminal {
        drop(end.take());
    }
    std::future::pending::<()>().await;
}

fn exit_message(
    container: String,
    result: Result<Result<Exit, RuntimeError>, RecvError>,
) -> Result<ExecOutput, Status> {
    match result {
        Ok(Ok(exit)) => {
            let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            // A process that is killed inside ends its runsc with 128 + signal.
            let signal = if (129..=128 + 64).contains(&exit.code) { exit.code - 128 } else { 0 };
            let status = ExitStatus { container, code: exit.code, signal, time_ms: time.as_millis() as i64 };
            Ok(message(Output::Exit(status)))
        }
        Ok(Err(error)) => Err(Status::aborted(format!("the process ended with its actor: {error}"))),
        Err(_) => Err(Status::aborted("the process ended with its actor")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(change: impl FnOnce(&mut ExecStart)) -> Result<ExecRequest, SlotError> {
        let mut start = ExecStart { command: vec!["sh".into()], ..ExecStart::default() };
        change(&mut start);
        request_of(&start)
    }

    #[test]
    fn requests_are_checked_field_by_field() {
        assert_eq!(start(|s| s.user = "5:6".into()).unwrap().user, Some((5, Some(6))));
        assert_eq!(start(|s| s.user = "5".into()).unwrap().user, Some((5, None)));
        let request = start(|s| {
            s.tty = true;
            s.env = [("B".to_owned(), "2".to_owned()), ("A".to_owned(), "1".to_owned())].into();
        });
        assert_eq!(request.unwrap().env, ["A=1", "B=2", "TERM=xterm"]);
        for (what, refused) in [
            ("command", start(|s| s.command.clear())),
            ("user", start(|s| s.user = "root".into())),
            ("user", start(|s| s.user = "1:".into())),
            ("working directory", start(|s| s.working_dir = "tmp".into())),
            ("variable", start(|s| drop(s.env.insert("A=B".into(), String::new())))),
        ] {
            let error = refused.unwrap_err();
            assert!(error.to_string().contains(what), "{error}");
        }
    }

    #[tokio::test]
    async fn a_terminal_has_the_size_that_was_asked_for() {
        let (ends, streams) = terminal(Some(TerminalSize { rows: 7, columns: 33 })).unwrap();
        let size = || {
            let output = std::process::Command::new("stty")
                .arg("size")
                .stdin(streams.stdin.try_clone().unwrap())
                .output()
                .unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        assert_eq!(size().trim(), "7 33");
        resize(ends.stdin.get_ref(), TerminalSize { rows: 9, columns: 100 }).unwrap();
        assert_eq!(size().trim(), "9 100");
    }

    #[tokio::test]
    async fn bytes_pass_through_pipes_in_order() {
        let (ends, streams) = pipes().unwrap();
        let text: Vec<u8> = (0..200_000u32).flat_map(u32::to_le_bytes).collect();
        let (stdin, expected) = (ends.stdin, text.clone());
        let writing = tokio::spawn(async move { write_all(&stdin, &text).await });
        let theirs = end(streams.stdin).unwrap();
        let (mut got, mut buffer) = (Vec::new(), vec![0; 1000]);
        while got.len() < expected.len() {
            let length = read_some(&theirs, &mut buffer).await.unwrap();
            got.extend_from_slice(&buffer[..length]);
        }
        writing.await.unwrap().unwrap();
        assert!(got == expected);
    }
}

// SPDX-License-Identifier: Apache-2.0
//! `substrate exec`: a command in an actor, with its input, output, terminal and exit code.
//!
//! Ctrl-C without a terminal of its own is passed on as SIGINT (SIGTERM likewise), so that the remote command ends as
//! it would here. With `-t` the local terminal is raw: keys are bytes, and SIGWINCH travels as a resize.
use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use substrate_proto::types::exec_input::Input;
use substrate_proto::types::exec_output::Output;
use substrate_proto::types::{ExecInput, ExecOutput, ExecStart, TerminalSize};
use tokio::io::AsyncReadExt as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::args::{Exec, Global};
use crate::client::{Control, connect};
use crate::failure::{Doing as _, Exit, Failure};

/// Messages between us and the network; a slow command holds our stdin back.
const DEPTH: usize = 16;
/// Read from stdin at once, bytes.
const CHUNK: usize = 32 << 10;

/// `substrate exec`.
pub async fn run(options: Exec, global: &Global) -> Result<ExitCode, Failure> {
    if options.tty && !std::io::stdin().is_terminal() {
        return Err(Failure::usage("-t needs a terminal as standard input")
            .with_way_out("leave -t out, or run it from a terminal"));
    }
    let mut client = connect(global).await?;
    let start = ExecStart {
        atespace: global.atespace.clone(),
        actor: options.name.clone(),
        container: options.container.unwrap_or_default(),
        command: options.command,
        env: options.env.into_iter().collect(),
        working_dir: options.workdir.unwrap_or_default(),
        user: options.user.unwrap_or_default(),
        tty: options.tty,
        size: options.tty.then(terminal_size),
        no_wake: options.no_wake,
        assignment: None,
    };
    let mut session = Session::open(&mut client, start).await?;
    let raw = if options.tty { Some(RawTerminal::enter()?) } else { None };
    if options.stdin || options.tty {
        session.forward_stdin();
    } else {
        session.send(Input::CloseStdin(true)).await;
    }
    if options.tty {
        session.forward_resizes()?;
    } else {
        session.forward_signals()?;
    }
    let code = session
        .copy_output(|output| {
            let result = match output {
                Output::Stdout(data) => write_all(&mut std::io::stdout().lock(), &data),
                Output::Stderr(data) => write_all(&mut std::io::stderr().lock(), &data),
                _ => Ok(()),
            };
            result.doing(|| "cannot write the command's output".to_owned())
        })
        .await;
    drop(raw);
    code.map(|code| ExitCode::from(code.clamp(0, 255) as u8))
}

fn write_all(out: &mut impl std::io::Write, data: &[u8]) -> std::io::Result<()> {
    out.write_all(data)?;
    out.flush()
}

/// One running exec.
pub struct Session {
    input: mpsc::Sender<ExecInput>,
    output: tonic::Streaming<ExecOutput>,
}

impl Session {
    /// Starts a command.
    pub async fn open(client: &mut Control, start: ExecStart) -> Result<Self, Failure> {
        let (input, receiver) = mpsc::channel(DEPTH);
        // The channel is empty and has room: this cannot wait.
        let first = ExecInput { input: Some(Input::Start(start)) };
        input.send(first).await.doing(|| "cannot start the command".to_owned())?;
        let output = client.exec_actor(ReceiverStream::new(receiver)).await?.into_inner();
        Ok(Self { input, output })
    }

    /// Sends one message; a command that has ended takes none, and its end is seen on the other side.
    pub async fn send(&self, input: Input) {
        let _ = self.input.send(ExecInput { input: Some(input) }).await;
    }

    /// A handle for sending from elsewhere.
    pub fn sender(&self) -> mpsc::Sender<ExecInput> {
        self.input.clone()
    }

    /// Passes every piece of output on and returns the exit code.
    pub async fn copy_output(
        &mut self,
        mut sink: impl FnMut(Output) -> Result<(), Failure>,
    ) -> Result<i32, Failure> {
        while let Some(message) = self.output.message().await? {
            match message.output {
                Some(Output::Exit(status)) => return Ok(status.code),
                Some(output) => sink(output)?,
                None => {}
            }
        }
        Err(Failure::new(Exit::Unavailable, "the connection to the command ended before it did")
            .with_way_out("the actor may have been suspended or moved: run it again"))
    }

    fn forward_stdin(&self) {
        let input = self.sender();
        tokio::spawn(async move {
            let mut stdin = tokio::io::stdin();
            loop {
                let mut chunk = vec![0; CHUNK];
                let message = match stdin.read(&mut chunk).await {
                    Ok(0) | Err(_) => Input::CloseStdin(true),
                    Ok(count) => {
                        chunk.truncate(count);
                        Input::Stdin(chunk)
                    }
                };
                let is_end = matches!(message, Input::CloseStdin(_));
                if input.send(ExecInput { input: Some(message) }).await.is_err() || is_end {
                    return;
                }
            }
        });
    }

    fn forward_resizes(&self) -> Result<(), Failure> {
        let input = self.sender();
        let mut changes =
            signal(SignalKind::window_change()).doing(|| "cannot watch the terminal's size".to_owned())?;
        tokio::spawn(async move {
            while changes.recv().await.is_some() {
                let message = ExecInput { input: Some(Input::Resize(terminal_size())) };
                if input.send(message).await.is_err() {
                    return;
                }
            }
        });
        Ok(())
    }

    fn forward_signals(&self) -> Result<(), Failure> {
        for (kind, number) in [(SignalKind::interrupt(), 2), (SignalKind::terminate(), 15)] {
            let input = self.sender();
            let mut signals = signal(kind).doing(|| "cannot handle signals".to_owned())?;
            tokio::spawn(async move {
                while signals.recv().await.is_some() {
                    if input.send(ExecInput { input: Some(Input::Signal(number)) }).await.is_err() {
                        return;
                    }
                }
            });
        }
        Ok(())
    }
}

/// Runs a command to its end with the given input and collects its output (bounded by `limit` bytes each).
pub async fn collect(
    client: &mut Control,
    global: &Global,
    actor: &str,
    container: Option<&str>,
    command: &[&str],
    limit: usize,
) -> Result<(i32, Vec<u8>, String), Failure> {
    let start = ExecStart {
        atespace: global.atespace.clone(),
        actor: actor.to_owned(),
        container: container.unwrap_or_default().to_owned(),
        command: command.iter().map(|&word| word.to_owned()).collect(),
        ..Default::default()
    };
    let mut session = Session::open(client, start).await?;
    session.send(Input::CloseStdin(true)).await;
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let code = session
        .copy_output(|output| {
            let (buffer, data) = match output {
                Output::Stdout(data) => (&mut stdout, data),
                Output::Stderr(data) => (&mut stderr, data),
                _ => return Ok(()),
            };
            if buffer.len() + data.len() <= limit {
                buffer.extend_from_slice(&data);
            }
            Ok(())
        })
        .await?;
    Ok((code, stdout, String::from_utf8_lossy(&stderr).trim().to_owned()))
}

fn terminal_size() -> TerminalSize {
    match terminal_size::terminal_size() {
        Some((columns, rows)) => TerminalSize { rows: u32::from(rows.0), columns: u32::from(columns.0) },
        None => TerminalSize { rows: 24, columns: 80 },
    }
}

/// The local terminal without line editing, echo and signals; as it was when dropped.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    fn enter() -> Result<Self, Failure> {
        let stdin = std::io::stdin();
        let before = tcgetattr(&stdin).doing(|| "cannot read the terminal's settings".to_owned())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&stdin, SetArg::TCSANOW, &raw)
            .doing(|| "cannot change the terminal's settings".to_owned())?;
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Err(error) = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &self.before) {
            eprintln!("substrate: cannot restore the terminal's settings: {error}; type `reset`");
        }
        let _ = std::io::stdout().flush();
    }
}

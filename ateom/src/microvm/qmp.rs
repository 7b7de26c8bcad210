// SPDX-License-Identifier: Apache-2.0
//! QEMU's monitor: one JSON object a line in both directions (QEMU: docs/interop/qmp-spec).
//!
//! QEMU connects to a socket that is listened on before it is started, so nothing waits for a path to appear. One
//! command is under way at a time; events that come meanwhile are kept for who waits for them.
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd as _, BorrowedFd};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use crate::runtime::RuntimeError;

/// Events kept while nobody waits for them.
const EVENTS: usize = 64;

/// Why a command had no effect.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// QEMU refused it.
    #[error("QEMU refused {command}: {message}")]
    Refused {
        /// Which.
        command: String,
        /// QEMU's words.
        message: String,
    },
    /// QEMU is gone.
    #[error("QEMU ended during {0}")]
    Gone(String),
    /// The connection failed.
    #[error("cannot talk to QEMU: {0}")]
    Io(#[from] io::Error),
}

impl From<QmpError> for RuntimeError {
    fn from(error: QmpError) -> Self {
        Self::Failed(error.to_string())
    }
}

/// A connection that was greeted.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Takes the connection that QEMU made, up to the end of the greeting.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn new(stream: UnixStream) -> Result<Self, QmpError> {
        let (reader, writer) = stream.into_split();
        let mut qmp = Self { reader: BufReader::new(reader), writer, events: VecDeque::new() };
        qmp.read("its greeting").await?;
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    async fn read(&mut self, during: &str) -> Result<Value, QmpError> {
        let mut line = String::new();
        match self.reader.read_line(&mut line).await {
            Ok(0) => Err(QmpError::Gone(during.to_owned())),
            Ok(_) => Ok(serde_json::from_str(&line).map_err(io::Error::from)?),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                Err(QmpError::Gone(during.to_owned()))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Runs a command to its answer.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_with(command, arguments, None).await
    }

    /// Runs a command that takes a descriptor.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn execute_with(
        &mut self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, QmpError> {
        let mut line = json!({"execute": command, "arguments": arguments}).to_string();
        line.push('\n');
        let mut rest = line.as_bytes();
        let mut fd = fd.map(|fd| [fd.as_raw_fd()]);
        while !rest.is_empty() {
            self.writer.writable().await?;
            let socket: &UnixStream = self.writer.as_ref();
            let sent = socket.try_io(Interest::WRITABLE, || {
                let rights = fd.as_ref().map(|fd| [ControlMessage::ScmRights(fd)]);
                let control = rights.as_ref().map_or(&[][..], |rights| &rights[..]);
                Ok(sendmsg::<()>(
                    socket.as_raw_fd(),
                    &[IoSlice::new(rest)],
                    control,
                    MsgFlags::MSG_NOSIGNAL,
                    None,
                )?)
            });
            match sent {
                Ok(sent) => {
                    rest = &rest[sent..];
                    fd = None;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                    return Err(QmpError::Gone(command.to_owned()));
                }
                Err(error) => return Err(error.into()),
            }
        }
        loop {
            let mut message = self.read(command).await?;
            if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = message.get("error") {
                let message = error["desc"].as_str().unwrap_or_default().to_owned();
                return Err(QmpError::Refused { command: command.to_owned(), message });
            }
            self.keep(message);
        }
    }

    fn keep(&mut self, message: Value) {
        if self.events.len() == EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(message);
    }

    /// Waits until a migration (either direction) has completed.
    ///
    /// # Errors
    /// [`QmpError::Refused`] when it failed.
    pub async fn migrated(&mut self, what: &str) -> Result<(), QmpError> {
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.read(what).await?,
            };
            if event["event"] != "MIGRATION" {
                continue;
            }
            match event["data"]["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    let info = self.execute("query-migrate", json!({})).await?;
                    let message = info["error-desc"].as_str().unwrap_or("no reason given").to_owned();
                    return Err(QmpError::Refused { command: what.to_owned(), message });
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    /// A QEMU that says these lines, each after a command.
    async fn said(lines: &'static [&'static str]) -> Result<(), QmpError> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let fake = tokio::spawn(async move {
            let (reader, mut writer) = theirs.into_split();
            let mut commands = BufReader::new(reader).lines();
            writer.write_all(b"{\"QMP\": {}}\n").await.unwrap();
            for line in [&["{\"return\": {}}"][..], lines].concat() {
                if !line.starts_with("{\"event\"") && commands.next_line().await.unwrap().is_none() {
                    return;
                }
                writer.write_all(format!("{line}\n").as_bytes()).await.unwrap();
            }
        });
        let mut qmp = Qmp::new(ours).await?;
        qmp.execute("migrate", json!({})).await?;
        let result = qmp.migrated("the snapshot").await;
        drop(qmp);
        fake.await.unwrap();
        result
    }

    #[tokio::test]
    async fn events_that_come_before_an_answer_are_not_lost() {
        said(&[
            r#"{"event": "STOP"}"#,
            r#"{"event": "MIGRATION", "data": {"status": "setup"}}"#,
            r#"{"event": "MIGRATION", "data": {"status": "completed"}}"#,
            r#"{"return": {}}"#,
        ])
        .await
        .unwrap();
    }

    #[tokio::test]
    async fn failures_are_told_in_qemus_words() {
        let refused = said(&[r#"{"error": {"class": "GenericError", "desc": "no such thing"}}"#]).await;
        assert_eq!(refused.unwrap_err().to_string(), "QEMU refused migrate: no such thing");
        let failed = said(&[
            r#"{"event": "MIGRATION", "data": {"status": "failed"}}"#,
            r#"{"return": {}}"#,
            r#"{"return": {"status": "failed", "error-desc": "disk is full"}}"#,
        ])
        .await;
        assert_eq!(failed.unwrap_err().to_string(), "QEMU refused the snapshot: disk is full");
        let gone = said(&[r#"{"return": {}}"#]).await;
        assert_eq!(gone.unwrap_err().to_string(), "QEMU ended during the snapshot");
    }
}

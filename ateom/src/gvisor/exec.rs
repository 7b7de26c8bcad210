// SPDX-License-Identifier: Apache-2.0
//! Processes in containers: `runsc exec`, and waiting for a container's end with `runsc wait`.
//!
//! A process's streams are handed to the sandbox as they are (pipes, or a terminal's descriptor). When it runs, runsc
//! renames a file with its pid inside into place; the directory is watched for that with inotify(7).
use std::io::{Read as _, Seek as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::Signal;
use substrate_proto::types::ExitStatus;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};

use super::command::{Output, Runsc, read_log};
use super::{COMMAND_LIMIT, GvisorSandbox, bundle};
use crate::children::Exit;
use crate::container;
use crate::launcher::{Job, Streams};
use crate::runtime::{ExecProcess, ExecRequest, RuntimeError, file_error};

/// What runsc ends with when a process could not be started.
const NOT_STARTED: i32 = 128;
/// What a shell says for it.
const NOT_FOUND: i32 = 127;
const NOT_EXECUTABLE: i32 = 126;
const SIGNAL_QUEUE: usize = 16;

impl GvisorSandbox {
    pub(super) async fn start_process(
        &self,
        request: ExecRequest,
        streams: Streams,
    ) -> Result<ExecProcess, RuntimeError> {
        let (index, container) = self.container(&request.container)?;
        let container = container::for_exec(&container, &request);
        let cwd = if container.working_dir.is_empty() { "/" } else { &container.working_dir };
        let directory = tempdir(&self.directory)?;
        let process_file = directory.join("process.json");
        let process = bundle::process(&container, &request.args, &container.env, cwd, request.terminal);
        std::fs::write(&process_file, process.to_string()).map_err(file_error("write", &process_file))?;
        let started = watch_for_file(&directory)?;
        let id = bundle::container_id(index, &container.name);
        let pid_file = directory.join("pid");
        let args = [
            "exec",
            "--process",
            &process_file.display().to_string(),
            "--internal-pid-file",
            &pid_file.display().to_string(),
            &id,
        ];
        let (job, log) = self.runsc.spawn(&args, streams, request.terminal).await?;
        let (started_sender, started_receiver) = oneshot::channel();
        let (exit_sender, exit) = oneshot::channel();
        let (signals, signal_receiver) = mpsc::channel(SIGNAL_QUEUE);
        let driver = Driver {
            runsc: std::sync::Arc::clone(&self.runsc),
            container: id,
            job,
            log,
            directory,
            started: Some(started_sender),
            signals: signal_receiver,
            pid: None,
        };
        tokio::spawn(async move {
            let result = driver.run(started).await;
            // Nobody may be waiting any more.
            drop(exit_sender.send(result));
        });
        Ok(ExecProcess { started: started_receiver, exit, signals, resizes: None })
    }

    /// Waits for a container's own end.
    pub(super) async fn wait_container(&self, id: &str, name: &str) -> Result<ExitStatus, RuntimeError> {
        let memfd = nix::sys::memfd::memfd_create(c"runsc-wait", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
            .map_err(|errno| file_error("create", Path::new("memfd"))(errno.into()))?;
        let mut said =
            std::fs::File::from(memfd.try_clone().map_err(file_error("duplicate", Path::new("memfd")))?);
        let streams = Streams::output(memfd).map_err(file_error("open", Path::new("/dev/null")))?;
        let (mut job, log) = self.runsc.spawn(&["wait", id], streams, false).await?;
        let exit = job.wait().await?;
        let mut text = String::new();
        said.rewind()
            .and_then(|()| said.read_to_string(&mut text))
            .map_err(file_error("read", Path::new("memfd")))?;
        let status = text
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .find_map(|value| value["exitStatus"].as_i64());
        match status {
            Some(code) if exit.success() => Ok(exit_status(name, code as i32)),
            _ => Err(RuntimeError::Failed(format!(
                "cannot wait for container {name}: {} {}",
                text.trim(),
                read_log(&log)
            ))),
        }
    }
}

/// runsc says 128 + signal for a process that was killed; one that exits with such a code by itself looks the same.
fn exit_status(container: &str, code: i32) -> ExitStatus {
    let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    ExitStatus {
        container: container.to_owned(),
        code,
        signal: if (129..=128 + 64).contains(&code) { code - 128 } else { 0 },
        time_ms: time.as_millis() as i64,
    }
}

fn tempdir(parent: &Path) -> Result<PathBuf, RuntimeError> {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let path = parent.join(format!("exec-{number}"));
    std::fs::create_dir(&path).map_err(file_error("create", &path))?;
    Ok(path)
}

/// Becomes readable when a file is renamed into the directory.
fn watch_for_file(directory: &Path) -> Result<AsyncFd<OwnedFd>, RuntimeError> {
    let watch = || {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        inotify.add_watch(directory, AddWatchFlags::IN_MOVED_TO)?;
        let fd = inotify.as_fd().try_clone_to_owned()?;
        crate::sys::watched(fd)
    };
    watch().map_err(file_error("watch", directory))
}

struct Driver {
    runsc: std::sync::Arc<Runsc>,
    container: String,
    job: Job,
    log: PathBuf,
    directory: PathBuf,
    started: Option<oneshot::Sender<()>>,
    signals: mpsc::Receiver<i32>,
    /// In the container's pid namespace.
    pid: Option<i32>,
}

impl Driver {
    async fn run(mut self, file_arrived: AsyncFd<OwnedFd>) -> Result<Exit, RuntimeError> {
        let mut waiting_signals = Vec::new();
        let mut abandoned = false;
        let result = loop {
            tokio::select! {
                biased;
                exit = self.job.wait() => break exit,
                _ = file_arrived.readable(), if self.pid.is_none() => {
                    self.note_started();
                    if self.pid.is_none() {
                        break Err(crate::launcher::LaunchError::Gone("exec".to_owned()));
                    }
                    for signal in std::mem::take(&mut waiting_signals) {
                        self.kill(signal).await;
                    }
                }
                signal = self.signals.recv(), if !abandoned => {
                    let signal = signal.unwrap_or_else(|| {
                        // Its client is gone.
                        abandoned = true;
                        Signal::SIGKILL as i32
                    });
                    if self.pid.is_some() {
                        self.kill(signal).await;
                    } else {
                        waiting_signals.push(signal);
                    }
                }
            }
        };
        self.note_started();
        let result = match result {
            Ok(exit) if exit.code == NOT_STARTED && self.pid.is_none() => {
                let text = read_log(&self.log);
                tracing::debug!(%text, "exec could not start");
                let code = if text.contains("permission denied") { NOT_EXECUTABLE } else { NOT_FOUND };
                Ok(Exit { code, signal: 0 })
            }
            Ok(exit) => Ok(exit),
            Err(error) => Err(error.into()),
        };
        for removed in [std::fs::remove_dir_all(&self.directory), std::fs::remove_file(&self.log)] {
            match removed {
                // The slot removes the whole place after a teardown.
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(%error, directory = %self.directory.display(), "cannot remove files of an exec");
                }
                _ => {}
            }
        }
        result
    }

    fn note_started(&mut self) {
        if self.pid.is_some() {
            return;
        }
        self.pid = std::fs::read_to_string(self.directory.join("pid"))
            .ok()
            .and_then(|text| text.trim().parse().ok());
        if self.pid.is_some()
            && let Some(started) = self.started.take()
        {
            // The caller may not care.
            let _ = started.send(());
        }
    }

    async fn kill(&self, signal: i32) {
        let Some(pid) = self.pid else { return };
        let args = ["kill", "--pid", &pid.to_string(), &self.container, &signal.to_string()];
        if let Err(error) = self.runsc.run(&args, Output::Own, COMMAND_LIMIT).await {
            // It has ended meanwhile, or the signal's number means nothing to runsc.
            tracing::debug!(%error, signal, "cannot signal a process of an exec");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_by_signal_are_told_from_exits() {
        assert_eq!((exit_status("a", 3).code, exit_status("a", 3).signal), (3, 0));
        assert_eq!((exit_status("a", 137).code, exit_status("a", 137).signal), (137, 9));
        assert_eq!(exit_status("a", 255).signal, 0);
    }
}

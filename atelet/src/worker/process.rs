// SPDX-License-Identifier: Apache-2.0
//! The process of a worker: started so that it outlives us, recognised after our restart, watched by pidfd.
//!
//! A pid alone does not name a process: it is recognised by pid, start time (proc_pid_stat(5), field 22) and boot id,
//! noted in `process.json` right after the start. A worker without a valid note is not adopted: its control group is
//! fenced before another is started.
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

use crate::{durable, sys};

/// Everything that identifies a process on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Process id.
    pub pid: i32,
    /// Clock ticks after boot.
    pub start_time: u64,
    /// Of the machine's run.
    pub boot_id: String,
}

/// Boot id of this run of the machine.
pub fn boot_id() -> io::Result<String> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    Ok(std::fs::read_to_string(path).map_err(durable::at("read", path))?.trim().to_owned())
}

/// The pid in a note, if that process still runs.
pub(crate) fn noted_pid(note: &Path) -> Option<i32> {
    let identity: Identity = serde_json::from_slice(&std::fs::read(note).ok()?).ok()?;
    let runs = boot_id().ok()? == identity.boot_id && start_time(identity.pid) == Some(identity.start_time);
    runs.then_some(identity.pid)
}

fn start_time(pid: i32) -> Option<u64> {
    parse_start_time(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The name in field 2 may hold anything, also parentheses and spaces: fields are counted from its end. A zombie has
/// ended.
fn parse_start_time(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// A running worker process.
#[derive(Debug)]
pub struct Process {
    /// Who it is.
    pub identity: Identity,
    pidfd: AsyncFd<OwnedFd>,
    /// `None` for one that was adopted: somebody else reaps it.
    child: Option<Child>,
}

/// How to start one.
#[derive(Debug, Clone)]
pub struct Launch {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Standard output and error are appended here.
    pub log: PathBuf,
    /// Where it is noted.
    pub note: PathBuf,
}

impl Process {
    /// Starts a worker in a session of its own and notes it. Blocks briefly; needs a runtime.
    ///
    /// # Errors
    /// The system's; then nothing runs.
    pub fn start(launch: &Launch) -> io::Result<Self> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(&launch.log)
            .map_err(durable::at("open", &launch.log))?;
        let mut command = Command::new(&launch.program);
        command
            .args(&launch.args)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .current_dir("/")
            .env_clear()
            // What is in our environment may be secret; these are not.
            .envs(
                ["PATH", "HOME", "LANG", "SUBSTRATE_LOG", "RUST_BACKTRACE"]
                    .iter()
                    .filter_map(|name| std::env::var_os(name).map(|value| (name, value))),
            );
        sys::own_session(&mut command);
        let mut child = command.spawn().map_err(durable::at("start", &launch.program))?;
        let started = (|| {
            let pid = child.id() as i32;
            let pidfd = ateom::sys::pidfd_open(pid)?;
            let Some(start_time) = start_time(pid) else {
                let status = child.wait()?;
                return Err(io::Error::other(format!(
                    "{} ended at once: {status}",
                    launch.program.display()
                )));
            };
            let identity = Identity { pid, start_time, boot_id: boot_id()? };
            // Not fsynced: it is of use only as long as the machine runs.
            let text = serde_json::to_vec(&identity)?;
            let temp = launch.note.with_extension("tmp");
            std::fs::write(&temp, text)
                .and_then(|()| std::fs::rename(&temp, &launch.note))
                .map_err(durable::at("write", &launch.note))?;
            Ok((identity, sys::readable(pidfd)?))
        })();
        match started {
            Ok((identity, pidfd)) => Ok(Self { identity, pidfd, child: Some(child) }),
            Err(error) => {
                if let Err(error) = child.kill().and_then(|()| child.wait().map(drop)) {
                    tracing::warn!(%error, "cannot end a worker that could not be noted");
                }
                Err(error)
            }
        }
    }

    /// The worker that an earlier process of ours noted, if it still runs.
    pub fn adopt(note: &Path) -> Option<Self> {
        let identity: Identity = serde_json::from_slice(&std::fs::read(note).ok()?).ok()?;
        if boot_id().ok()? != identity.boot_id {
            return None;
        }
        let pidfd = ateom::sys::pidfd_open(identity.pid).ok()?;
        // Looked at after the pidfd was opened: if it is the same now, the pidfd is of the same process.
        if start_time(identity.pid)? != identity.start_time {
            return None;
        }
        Some(Self { identity, pidfd: sys::readable(pidfd).ok()?, child: None })
    }

    /// Whether it was started by an earlier process of ours.
    pub fn is_adopted(&self) -> bool {
        self.child.is_none()
    }

    /// Returns when the process has ended, with how.
    pub async fn ended(&mut self) -> String {
        match self.pidfd.readable().await {
            // Readable stays readable: the next call returns at once.
            Ok(mut ready) => ready.retain_ready(),
            // The runtime is being shut down. Taken for an end, it would get a healthy worker killed.
            Err(_) => std::future::pending().await,
        }
        match self.child.as_mut().map(Child::try_wait) {
            Some(Ok(Some(status))) => format!("its process ended: {status}"),
            Some(Err(error)) => format!("its process ended ({error})"),
            _ => "its process ended".to_owned(),
        }
    }

    /// How the process ended, if it has and is our child.
    pub fn has_ended(&mut self) -> Option<String> {
        let status = self.child.as_mut()?.try_wait().ok()??;
        Some(format!("its process ended: {status}"))
    }

    /// Kills the process itself, in case it is not in its control group.
    pub fn kill(&mut self) {
        let outcome = match &mut self.child {
            Some(child) => child.kill(),
            None if start_time(self.identity.pid) == Some(self.identity.start_time) => {
                let pid = nix::unistd::Pid::from_raw(self.identity.pid);
                nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).map_err(io::Error::from)
            }
            None => Ok(()),
        };
        if let Err(error) = outcome {
            tracing::warn!(pid = self.identity.pid, %error, "cannot kill a worker");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_times_are_read_past_any_name() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 9 9";
        assert_eq!(parse_start_time(stat), Some(4242));
        assert_eq!(parse_start_time(&stat.replace(" S ", " Z ")), None);
        assert_eq!(parse_start_time("nonsense"), None);
        assert!(start_time(std::process::id() as i32).is_some());
    }

    fn launch(dir: &Path, program: &str, args: &[&str]) -> Launch {
        Launch {
            program: program.into(),
            args: args.iter().map(ToString::to_string).collect(),
            log: dir.join("log"),
            note: dir.join("process.json"),
        }
    }

    #[tokio::test]
    async fn a_worker_is_adopted_by_who_it_is_and_its_end_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let launch = launch(dir.path(), "/bin/sleep", &["600"]);
        let mut first = Process::start(&launch).unwrap();
        let mut second = Process::adopt(&launch.note).unwrap();
        assert!(second.is_adopted() && second.identity == first.identity);
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", first.identity.pid)).unwrap();
        let session: i32 =
            stat.rsplit_once(')').unwrap().1.split_whitespace().nth(3).unwrap().parse().unwrap();
        assert_eq!(session, first.identity.pid, "it is not in a session of its own");
        // Another process under the same pid.
        let other = Identity { start_time: first.identity.start_time + 1, ..first.identity.clone() };
        std::fs::write(&launch.note, serde_json::to_vec(&other).unwrap()).unwrap();
        assert!(Process::adopt(&launch.note).is_none());
        // Of another run of the machine.
        let other = Identity { boot_id: "x".into(), ..first.identity.clone() };
        std::fs::write(&launch.note, serde_json::to_vec(&other).unwrap()).unwrap();
        assert!(Process::adopt(&launch.note).is_none());
        second.kill();
        assert!(first.ended().await.contains("signal: 9"));
        second.ended().await;
        second.kill();
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = Process::start(&launch(dir.path(), "/no/such/ateom", &[])).unwrap_err();
        assert!(error.to_string().contains("/no/such/ateom"), "{error}");
    }
}

// SPDX-License-Identifier: Apache-2.0
//! What a slot asks of a sandbox class: gVisor's or a microVM's.
//!
//! The slot owns order, generations, lease, gate, namespaces and control groups; a runtime owns how one sandbox is
//! made, saved and brought back in the place it is given. Everything a runtime starts must be started through the
//! place's [`Launcher`], so that it is born in the actor's control group and dies with it: no call here has to be
//! made for a sandbox to be gone.
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use async_trait::async_trait;
use substrate_proto::ateom::{SandboxSpec, SnapshotFile, StepTime};
use substrate_proto::types::{Compatibility, ExitStatus};
use tokio::sync::{mpsc, oneshot};

use crate::children::Exit;
use crate::error::SlotError;
use crate::launcher::{LaunchError, Launcher, Streams};
use crate::network::LinkKind;

/// Where one sandbox lives, made for it alone.
#[derive(Debug)]
pub struct Place {
    /// An empty directory for its files.
    pub directory: PathBuf,
    /// Starts processes in its control group.
    pub launcher: Launcher,
    /// Path of the actor's network namespace; with a veth, its link and addresses are in place.
    pub network_namespace: PathBuf,
    /// The link of a class that asked for a tap.
    pub tap: Option<OwnedFd>,
}

/// What a runtime is, for scheduling and for people.
#[derive(Debug, Clone, Default)]
pub struct Description {
    /// "gvisor" or "microvm".
    pub sandbox_class: String,
    /// sha256 (hex) of the binary: its identity.
    pub digest: String,
    /// For people.
    pub version: String,
    /// "amd64" or "arm64".
    pub architecture: String,
    /// What the processor offers.
    pub cpu_features: Vec<String>,
    /// Must be equal where a snapshot is restored.
    pub facts: BTreeMap<String, String>,
    /// A checkpoint may keep the actor and its connections.
    pub checkpoint_keeps_running: bool,
    /// Snapshots can hold only what changed.
    pub incremental: bool,
}

/// What went wrong in a runtime.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// A command failed; the message says what it means and what to do.
    #[error("{0}")]
    Failed(String),
    /// A checkpoint failed, and the sandbox goes on as before.
    #[error("{0}")]
    CheckpointRefused(String),
    /// A command could not be started, or died with its group.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// A file could not be written or read.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// What was attempted.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A command did not end in time.
    #[error("{what} did not end within {seconds} s")]
    Timeout {
        /// Which command.
        what: String,
        /// Its limit.
        seconds: u64,
    },
}

/// For `map_err` on file operations.
pub(crate) fn file_error(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> RuntimeError {
    let path = path.to_owned();
    move |source| RuntimeError::File { action, path, source }
}

/// A process to be started in a container.
#[derive(Debug, Clone, Default)]
pub struct ExecRequest {
    /// Empty: the first one.
    pub container: String,
    /// Complete argument vector.
    pub args: Vec<String>,
    /// Over the container's own, "K=V".
    pub env: Vec<String>,
    /// Empty: the container's.
    pub working_dir: String,
    /// Uid and, if given, gid; `None`: the container's user.
    pub user: Option<(u32, Option<u32>)>,
    /// Its streams are one terminal.
    pub terminal: bool,
}

/// A process in a container. Dropping it kills the process.
#[derive(Debug)]
pub struct ExecProcess {
    /// Told once it runs; dropped when it never did.
    pub started: oneshot::Receiver<()>,
    /// Told when it has ended.
    pub exit: oneshot::Receiver<Result<Exit, RuntimeError>>,
    /// Signal numbers for it.
    pub signals: mpsc::Sender<i32>,
    /// Rows and columns, where the terminal that counts is not the one whose descriptors it was given.
    pub resizes: Option<mpsc::Sender<(u16, u16)>>,
}

/// A class of sandboxes.
#[async_trait]
pub trait Runtime: Send + Sync + 'static {
    /// What it is.
    fn describe(&self) -> &Description;

    /// How its sandboxes are linked to the worker's namespace.
    fn link(&self) -> LinkKind {
        LinkKind::Veth
    }

    /// Bytes that a sandbox itself needs beside what its workload may use.
    fn overhead_bytes(&self) -> u64;

    /// Whether a spec can be run at all, before anything is touched.
    ///
    /// # Errors
    /// [`SlotError::Invalid`] naming the field.
    fn validate(&self, spec: &SandboxSpec) -> Result<(), SlotError>;

    /// What a snapshot of this spec needs where it is restored.
    fn compatibility(&self, spec: &SandboxSpec) -> Compatibility;

    /// What a snapshot says that it needs, in the words of this build: an older one may have said more, or otherwise.
    fn in_own_words(&self, needed: &Compatibility) -> Compatibility {
        needed.clone()
    }

    /// Creates, ahead of time, what does not depend on the actor.
    ///
    /// # Errors
    /// [`RuntimeError`]; what is left dies with the place's control group.
    async fn prepare(&self, place: Place) -> Result<Box<dyn Sandbox>, RuntimeError>;
}

/// One sandbox, from its preparation to its end.
#[async_trait]
pub trait Sandbox: Send + Sync + 'static {
    /// Boots the workload; returns when its processes run.
    async fn boot(&self, spec: &SandboxSpec, steps: &Steps) -> Result<(), RuntimeError>;

    /// Brings the workload up from a snapshot; returns when its processes run.
    async fn restore(&self, spec: &SandboxSpec, directory: &Path, steps: &Steps) -> Result<(), RuntimeError>;

    /// Saves the workload into an empty directory and fsyncs it. With `keep_running` it goes on, with its
    /// connections; otherwise it stands still from the moment that was saved until it is killed.
    ///
    /// # Errors
    /// [`RuntimeError::CheckpointRefused`] when the workload goes on as if nothing had been asked; after any other it
    /// is to be taken for lost.
    async fn checkpoint(
        &self,
        directory: &Path,
        keep_running: bool,
        steps: &Steps,
    ) -> Result<Vec<SnapshotFile>, RuntimeError>;

    /// Starts a process in a container.
    async fn exec(&self, request: ExecRequest, streams: Streams) -> Result<ExecProcess, RuntimeError>;

    /// Returns when a container (empty: the main one) has ended by itself. Call after `boot` or `restore`.
    async fn exited(&self, container: &str) -> Result<ExitStatus, RuntimeError>;

    /// Bytes of the sandbox's memory that hold files which the workload wrote outside its volumes; none where they are
    /// on a disk, or cannot be told.
    async fn written_bytes(&self) -> Option<u64> {
        None
    }

    /// Returns, with a reason for people, when the sandbox itself is dead.
    async fn died(&self) -> String;
}

/// Runs a process to its end with no streams.
///
/// # Errors
/// As [`Sandbox::exec`].
pub async fn run_quietly(sandbox: &dyn Sandbox, request: ExecRequest) -> Result<Exit, RuntimeError> {
    let streams = Streams::null().map_err(file_error("open", Path::new("/dev/null")))?;
    let ExecProcess { exit, signals: _keep, started: _, resizes: _ } = sandbox.exec(request, streams).await?;
    match exit.await {
        Ok(result) => result,
        Err(_) => Err(RuntimeError::Failed("the sandbox ended meanwhile".to_owned())),
    }
}

/// Named parts of an operation and how long they took.
#[derive(Debug, Default)]
pub struct Steps(Mutex<Vec<StepTime>>);

impl Steps {
    /// Times a part.
    pub async fn time<T>(&self, name: &str, work: impl Future<Output = T>) -> T {
        let before = Instant::now();
        let value = work.await;
        self.add(name, before);
        value
    }

    /// Adds a part that began at `since` and ends now.
    pub fn add(&self, name: &str, since: Instant) {
        let step = StepTime { name: name.to_owned(), micros: since.elapsed().as_micros() as u64 };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(step);
    }

    /// What was timed, in order of their ends.
    pub fn take(&self) -> Vec<StepTime> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Whether a snapshot can be restored by this runtime, field by field (P3).
///
/// # Errors
/// [`SlotError::Incompatible`] naming the first field that does not match.
pub fn check_compatibility(here: &Compatibility, needed: &Compatibility) -> Result<(), SlotError> {
    let mismatch = |field: &str, here: &str, needed: &str| {
        Err(SlotError::Incompatible {
            field: field.to_owned(),
            here: here.to_owned(),
            needed: needed.to_owned(),
        })
    };
    for (field, ours, theirs) in [
        ("sandbox_class", &here.sandbox_class, &needed.sandbox_class),
        ("runtime_digest", &here.runtime_digest, &needed.runtime_digest),
        ("architecture", &here.architecture, &needed.architecture),
    ] {
        if ours != theirs {
            return mismatch(field, ours, theirs);
        }
    }
    let missing: Vec<&str> = needed
        .cpu_features
        .iter()
        .filter(|feature| !here.cpu_features.contains(feature))
        .map(String::as_str)
        .collect();
    if !missing.is_empty() {
        return mismatch("cpu_features", "without them", &missing.join(" "));
    }
    for (kind, ours, theirs) in
        [("facts", &here.facts, &needed.facts), ("images", &here.images, &needed.images)]
    {
        let names: std::collections::BTreeSet<&String> = ours.keys().chain(theirs.keys()).collect();
        for name in names {
            let empty = String::new();
            let (ours, theirs) = (ours.get(name).unwrap_or(&empty), theirs.get(name).unwrap_or(&empty));
            if ours != theirs {
                return mismatch(&format!("{kind}.{name}"), ours, theirs);
            }
        }
    }
    if here.spec_digest != needed.spec_digest {
        return mismatch("spec_digest", &here.spec_digest, &needed.spec_digest);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Compatibility {
        Compatibility {
            sandbox_class: "gvisor".into(),
            runtime_digest: "d1".into(),
            architecture: "amd64".into(),
            cpu_features: vec!["sse".into(), "avx".into()],
            facts: [("overlay".to_owned(), "memory".to_owned())].into(),
            spec_digest: "s1".into(),
            images: [("main".to_owned(), "sha256:1".to_owned())].into(),
        }
    }

    #[test]
    fn each_field_is_compared_and_named() {
        type Change = fn(&mut Compatibility);
        check_compatibility(&facts(), &facts()).unwrap();
        let changes: [(&str, Change); 8] = [
            ("sandbox_class", |c| c.sandbox_class = "microvm".into()),
            ("runtime_digest", |c| c.runtime_digest = "d2".into()),
            ("architecture", |c| c.architecture = "arm64".into()),
            ("cpu_features", |c| c.cpu_features.push("avx512f".into())),
            ("facts.overlay", |c| drop(c.facts.insert("overlay".into(), "self".into()))),
            ("facts.kernel", |c| drop(c.facts.insert("kernel".into(), "k".into()))),
            ("images.main", |c| c.images.clear()),
            ("spec_digest", |c| c.spec_digest.clear()),
        ];
        for (name, change) in changes {
            let mut needed = facts();
            change(&mut needed);
            match check_compatibility(&facts(), &needed) {
                Err(SlotError::Incompatible { field, .. }) => assert_eq!(field, name),
                other => panic!("{name}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_host_may_offer_more_than_a_snapshot_needs() {
        let mut needed = facts();
        needed.cpu_features.pop();
        check_compatibility(&facts(), &needed).unwrap();
    }
}

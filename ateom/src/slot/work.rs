// SPDX-License-Identifier: Apache-2.0
//! What the slot's task hands out because it takes time. Each piece reports back by a message; none owns state.
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use substrate_proto::ateom::{
    CheckpointRequest, CheckpointResponse, EgressCidr, SandboxSpec, StepTime, checkpoint_request, slot_event,
};
use substrate_proto::types::{ExitStatus, Hook, Hooks};
use tokio::sync::{Mutex, broadcast, mpsc};
use tokio_util::sync::CancellationToken;

use super::{Activation, Config, FENCE_LIMIT, FREEZE_LIMIT, Internal, StartRequest, notify};
use crate::cgroup::{Cgroup, Limits, blocking};
use crate::children::Children;
use crate::error::SlotError;
use crate::launcher::Launcher;
use crate::network::{Link, build_actor_namespace, egress_elements, load_rules, remove_link};
use crate::occupancy::Occupancy;
use crate::readiness::Probe;
use crate::runtime::{ExecRequest, Place, Runtime, RuntimeError, Sandbox, Steps, run_quietly};

/// How long a hook may take (design section 9).
const HOOK_LIMIT: Duration = Duration::from_secs(5);
/// Tasks of the sandbox itself beside the workload's.
const OVERHEAD_TASKS: u64 = 512;
/// Between attempts to wait for a workload's end.
const WAIT_AGAIN: Duration = Duration::from_secs(1);
/// Left free on the disk beside the memory that is saved.
const DISK_MARGIN: u64 = 64 << 20;

/// Makes an activation: control group, launcher, namespace, sandbox. Removes fenced ones first, whose link has the
/// name that is needed.
pub(super) async fn prepare(
    config: &Config,
    number: u64,
    old: Vec<Activation>,
) -> Result<Activation, String> {
    if let Err(error) = remove(old).await {
        tracing::error!(error, "cannot remove all of a past sandbox");
    }
    let cgroup = config.cgroup.child(&format!("actor-{number}"));
    let directory = config.directory.join(number.to_string());
    match build(config, number, &cgroup, &directory).await {
        Ok(activation) => Ok(activation),
        Err(error) => {
            if let Err(worse) = cgroup.fence(FENCE_LIMIT).await.and_then(|()| cgroup.remove()) {
                tracing::error!(error = %worse, "cannot remove the control group of a failed preparation");
            }
            if let Err(worse) = crate::mounts::remove_tree(&directory) {
                tracing::error!(error = %worse, directory = %directory.display(), "cannot remove a directory");
            }
            Err(error)
        }
    }
}

async fn build(
    config: &Config,
    number: u64,
    cgroup: &Cgroup,
    directory: &Path,
) -> Result<Activation, String> {
    let before = Instant::now();
    std::fs::create_dir_all(directory)
        .map_err(|error| format!("cannot create {}: {error}", directory.display()))?;
    cgroup.ensure().map_err(|error| error.to_string())?;
    let (launcher, link) =
        tokio::join!(Launcher::start(&config.children, cgroup), build_actor_namespace(config.runtime.link()));
    let launcher = launcher.map_err(|error| error.to_string())?;
    let Link { namespace, tap } = link.map_err(|error| error.to_string())?;
    let network_namespace = namespace.path();
    let place = Place { directory: directory.to_owned(), launcher, network_namespace, tap };
    let sandbox = config.runtime.prepare(place).await.map_err(|error| error.to_string())?;
    tracing::debug!(number, ms = before.elapsed().as_millis(), "prepared a sandbox");
    Ok(Activation {
        number,
        sandbox: sandbox.into(),
        cgroup: cgroup.clone(),
        namespace,
        directory: directory.to_owned(),
        cancel: CancellationToken::new(),
        spec: Arc::default(),
    })
}

/// Removes what is left of activations: link, namespace, control group, files.
pub(super) async fn remove(old: Vec<Activation>) -> Result<(), String> {
    if old.is_empty() {
        return Ok(());
    }
    let mut result = remove_link().await.map_err(|error| error.to_string());
    for activation in old {
        activation.cancel.cancel();
        let Activation { cgroup, directory, namespace, sandbox, .. } = activation;
        // The launcher goes with the last user of the sandbox, the namespace with its descriptor.
        drop((namespace, sandbox));
        let removed = blocking(move || {
            cgroup
                .kill_and_wait_empty(FENCE_LIMIT)
                .and_then(|()| cgroup.remove())
                .map_err(|error| error.to_string())
                .and_then(|()| {
                    crate::mounts::remove_tree(&directory)
                        .map_err(|error| format!("cannot remove {}: {error}", directory.display()))
                })
        })
        .await;
        result = result.and(removed);
    }
    result
}

/// Replaces what the actor may reach by address.
pub(super) async fn load_egress(
    children: Children,
    rules: Arc<Mutex<()>>,
    cidrs: Vec<EgressCidr>,
) -> Result<(), SlotError> {
    let commands = egress_elements(&cidrs).map_err(|error| SlotError::Invalid(error.to_string()))?;
    let _one_at_a_time = rules.lock().await;
    load_rules(&children, commands).await.map_err(|error| SlotError::StartFailed(error.to_string()))
}

/// A change for the freezer.
pub(super) struct Freeze {
    pub(super) number: u64,
    pub(super) cgroup: Cgroup,
    pub(super) stop: bool,
}

/// Freezes and thaws in the order it was asked.
pub(super) async fn freezer(mut queue: mpsc::Receiver<Freeze>, internal: mpsc::Sender<Internal>) {
    while let Some(job) = queue.recv().await {
        let Freeze { number, cgroup, stop } = job;
        let result = blocking(move || if stop { cgroup.freeze(FREEZE_LIMIT) } else { cgroup.thaw() }).await;
        if let Err(error) = result {
            // The slot's task outlives its work.
            drop(internal.send(Internal::FreezeFailed(number, error.to_string())).await);
        }
    }
}

async fn run_hook(sandbox: &dyn Sandbox, hook: &Hook) -> Result<(), String> {
    let request = ExecRequest {
        container: hook.container.clone(),
        args: hook.command.clone(),
        ..ExecRequest::default()
    };
    let name = hook.command.join(" ");
    match tokio::time::timeout(HOOK_LIMIT, run_quietly(sandbox, request)).await {
        Ok(Ok(exit)) if exit.success() => Ok(()),
        Ok(Ok(exit)) => Err(format!("hook {name:?} ended with code {}", exit.code)),
        Ok(Err(error)) => Err(format!("hook {name:?}: {error}")),
        Err(_) => Err(format!("hook {name:?} did not end within {} s and was killed", HOOK_LIMIT.as_secs())),
    }
}

fn hook_of(spec: &SandboxSpec, which: fn(&Hooks) -> &Option<Hook>) -> Option<&Hook> {
    which(spec.hooks.as_ref()?).as_ref().filter(|hook| !hook.command.is_empty())
}

/// Brings one actor up.
pub(super) struct StartWork {
    pub(super) number: u64,
    pub(super) sandbox: Arc<dyn Sandbox>,
    pub(super) cgroup: Cgroup,
    pub(super) children: Children,
    pub(super) rules: Arc<Mutex<()>>,
    pub(super) overhead_bytes: u64,
    pub(super) load_egress: bool,
    pub(super) events: broadcast::Sender<slot_event::Event>,
    pub(super) internal: mpsc::Sender<Internal>,
    pub(super) cancel: CancellationToken,
}

impl StartWork {
    pub(super) async fn run(self, request: StartRequest) -> Result<Vec<StepTime>, SlotError> {
        let steps = Steps::default();
        let spec = &request.spec;
        let probes: Vec<Probe> = spec
            .containers
            .iter()
            .filter_map(|c| Probe::of(&c.name, c.readiness.as_ref()).transpose())
            .collect::<Result<_, _>>()?;
        let non_zero = |value: u64| (value != 0).then_some(value);
        self.cgroup
            .set_limits(Limits {
                cpu_millis: non_zero(spec.cpu_millis),
                memory_bytes: non_zero(spec.memory_bytes).map(|bytes| bytes + self.overhead_bytes),
                pids: non_zero(u64::from(spec.pids)).map(|pids| pids + OVERHEAD_TASKS),
            })
            .map_err(|error| SlotError::StartFailed(error.to_string()))?;
        if self.load_egress {
            let load = load_egress(self.children.clone(), Arc::clone(&self.rules), spec.egress_cidrs.clone());
            steps.time("egress_rules", load).await?;
        }
        let up = match &request.snapshot {
            None => self.sandbox.boot(spec, &steps).await,
            Some(snapshot) => self.sandbox.restore(spec, &snapshot.directory, &steps).await,
        };
        let verb = if request.snapshot.is_some() { "restore" } else { "boot" };
        up.map_err(|error| SlotError::StartFailed(format!("cannot {verb} the actor: {error}")))?;
        self.watch_exits(spec);
        if let Some(snapshot) = &request.snapshot
            && let Some(hook) = hook_of(spec, |hooks| &hooks.after_restore)
            && let Err(why) = steps.time("hook", run_hook(&*self.sandbox, hook)).await
        {
            if snapshot.clone {
                // A clone that keeps the original's identity must not be reachable (P6).
                return Err(SlotError::StartFailed(format!("the clone has no identity of its own: {why}")));
            }
            notify(&self.events, "HOOK_FAILED", why);
        }
        let before = Instant::now();
        for probe in &probes {
            probe.wait(&*self.sandbox).await?;
        }
        if !probes.is_empty() {
            steps.add("probe", before);
        }
        Ok(steps.take())
    }

    /// The main container's end is the actor's; another's is told.
    fn watch_exits(&self, spec: &SandboxSpec) {
        for (index, container) in spec.containers.iter().enumerate() {
            let (sandbox, internal, number) = (Arc::clone(&self.sandbox), self.internal.clone(), self.number);
            let (cancel, events, name) = (self.cancel.clone(), self.events.clone(), container.name.clone());
            let exited = async move {
                loop {
                    match sandbox.exited(&name).await {
                        Ok(exit) => return exit,
                        // Mostly the sandbox is going down, and whoever watches it says why.
                        Err(error) => tracing::debug!(%error, "cannot wait for a container"),
                    }
                    tokio::time::sleep(WAIT_AGAIN).await;
                }
            };
            tokio::spawn(async move {
                tokio::select! {
                    biased;
                    () = cancel.cancelled() => {}
                    // The slot's task outlives its work.
                    exit = exited => if index == 0 {
                        drop(internal.send(Internal::Exited(number, exit)).await);
                    } else {
                        let ExitStatus { container, code, .. } = exit;
                        notify(&events, "CONTAINER_EXITED", format!("container {container} ended with code {code}"));
                    },
                }
            });
        }
    }
}

/// How a checkpoint ended.
pub(super) enum Outcome {
    /// Durable on this node's disk; with STOP also whether the control group was seen empty.
    Saved(CheckpointResponse, Result<(), String>),
    /// The actor goes on.
    Refused(SlotError),
    /// The actor's memory is gone.
    Lost(String),
    /// The sandbox was ended meanwhile.
    Cancelled,
}

/// A checkpoint's end, for the slot's task.
pub(super) struct Checkpointed {
    pub(super) stop: bool,
    pub(super) outcome: Outcome,
}

/// Saves one actor.
pub(super) struct CheckpointWork {
    pub(super) sandbox: Arc<dyn Sandbox>,
    pub(super) cgroup: Cgroup,
    pub(super) occupancy: Occupancy,
    pub(super) events: broadcast::Sender<slot_event::Event>,
}

impl CheckpointWork {
    pub(super) async fn run(
        &self,
        request: &CheckpointRequest,
        runtime: &dyn Runtime,
        spec: &SandboxSpec,
    ) -> Outcome {
        let steps = Steps::default();
        let stop = request.mode() == checkpoint_request::Mode::Stop;
        let directory = Path::new(&request.directory);
        let cgroup = self.cgroup.clone();
        let memory = blocking(move || cgroup.stats().memory_bytes).await;
        if let Err(refusal) = check_directory(directory, memory) {
            return Outcome::Refused(refusal);
        }
        if stop {
            let limit = Duration::from_millis(u64::from(request.drain_ms));
            if !steps.time("drain", self.occupancy.drained(limit)).await {
                notify(
                    &self.events,
                    "REQUESTS_CUT",
                    format!("requests were still in flight after {limit:?}"),
                );
            }
            self.occupancy.cut();
        }
        if let Some(hook) = hook_of(spec, |hooks| &hooks.before_snapshot)
            && let Err(why) = steps.time("hook", run_hook(&*self.sandbox, hook)).await
        {
            notify(&self.events, "HOOK_FAILED", why);
        }
        let files = match self.sandbox.checkpoint(directory, !stop, &steps).await {
            Ok(files) => files,
            Err(RuntimeError::CheckpointRefused(why)) => {
                let message = format!("{why}; the actor goes on");
                return Outcome::Refused(SlotError::Refused { reason: "CHECKPOINT_FAILED", message });
            }
            Err(error) => {
                return Outcome::Lost(format!("the checkpoint failed and ended the sandbox: {error}"));
            }
        };
        let fenced = if stop {
            steps.time("kill", self.cgroup.fence(FENCE_LIMIT)).await.map_err(|error| error.to_string())
        } else {
            Ok(())
        };
        let response = CheckpointResponse {
            files,
            compatibility: Some(runtime.compatibility(spec)),
            steps: steps.take(),
            memory_bytes: memory,
        };
        Outcome::Saved(response, fenced)
    }
}

/// Refuses what would fail halfway.
fn check_directory(directory: &Path, memory: u64) -> Result<(), SlotError> {
    let shown = directory.display();
    if !directory.is_absolute() {
        return Err(SlotError::Invalid(format!("checkpoint directory {shown} is not an absolute path")));
    }
    let refused = |reason, message| SlotError::Refused { reason, message };
    let mut entries = std::fs::read_dir(directory).map_err(|error| {
        refused("DIRECTORY", format!("cannot list checkpoint directory {shown}: {error}"))
    })?;
    if entries.next().is_some() {
        return Err(refused("DIRECTORY", format!("checkpoint directory {shown} is not empty")));
    }
    let free = nix::sys::statvfs::statvfs(directory)
        .map(|stat| stat.blocks_available() * stat.fragment_size())
        .map_err(|errno| refused("DIRECTORY", format!("cannot ask for free space of {shown}: {errno}")))?;
    if free < memory + DISK_MARGIN {
        return Err(refused(
            "DISK_FULL",
            format!(
                "{} MiB are free at {shown}, a snapshot of this actor needs up to {} MiB: free space and retry",
                free >> 20,
                (memory + DISK_MARGIN) >> 20
            ),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_that_cannot_hold_a_snapshot_are_refused_before_anything_is_touched() {
        let directory = tempfile::tempdir().unwrap();
        check_directory(directory.path(), 1 << 20).unwrap();
        assert_eq!(check_directory(directory.path(), u64::MAX / 2).unwrap_err().reason(), "DISK_FULL");
        assert_eq!(check_directory(&directory.path().join("no"), 1).unwrap_err().reason(), "DIRECTORY");
        assert_eq!(check_directory(Path::new("relative"), 1).unwrap_err().reason(), "INVALID");
        std::fs::write(directory.path().join("pages.img"), b"x").unwrap();
        assert_eq!(check_directory(directory.path(), 1).unwrap_err().reason(), "DIRECTORY");
    }
}

// SPDX-License-Identifier: Apache-2.0
//! What `supervisor.mode = "auto"` rests on: whether a runtime brings a sandbox with a supervisor back after a sleep.
//!
//! No version says so: with some builds of runsc a third of the programs that a supervisor is like (tokio, connections
//! on loopback) hung after a restore. So it is tried. A *probe sandbox* runs the session shim and, in the supervisor's
//! place, a program that holds a connection to it; it is put to sleep and woken [`SLEEPS`] times, and counts as awake
//! only when the shim answers again.
//!
//! ```text
//! create in auto ─▶ runtimes of its class, by digest ─▶ all known? ─yes─▶ all good? ─yes─▶ the class's mode, with the reason
//!                                                     │ no              │ no
//!                                                     ▼                 ▼
//!                              probe (one at a time) ─▶ verdict     refused, with what was seen
//!                                   │ could not be tried (full pool, control plane away)
//!                                   ▼
//!                               refused for now; the next create tries again
//! ```
//!
//! A verdict belongs to the runtime's digest and is kept in `probes.json` of the driver's store, so a runtime is probed
//! once. Probe sandboxes live in an atespace of their own, without the labels of sandboxes: no gateway sees them.
//!
//! `strict` and `sidecar` are not tried on gVisor: docs/decisions/2026-11-supervisor-modes.md.
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use substrate_proto::ateapi::{Actor, Worker};
use substrate_proto::types::{ActorSpec, TemplateSpec};
use tonic::Code;

use crate::control::{Control, SHORT};
use crate::driver_config::SandboxClass;
use crate::failure::Failure;
use crate::mirror::now_ms;

/// How often a probe sandbox sleeps.
pub const SLEEPS: u32 = 3;
/// Name of the verdicts' file in the store.
pub const FILE: &str = "probes.json";
/// Where probe sandboxes live.
const ATESPACE: &str = "substrate-probe";
/// For a boot, a sleep and a wake-up each; machines may be emulated.
const fn limit(class: SandboxClass) -> Duration {
    match class {
        SandboxClass::Gvisor => Duration::from_secs(30),
        SandboxClass::Microvm => Duration::from_mins(3),
    }
}
/// A probe sandbox older than this was left by a driver that died.
const LEFT_AFTER_MS: i64 = 5 * 60_000;

/// What was seen of a runtime.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Verdict {
    /// `gvisor` or `microvm`.
    pub sandbox_class: String,
    /// The runtime's own name for its version.
    pub runtime_version: String,
    /// Wake-ups that worked.
    pub wakes: u32,
    /// Why the next one did not; none: all did.
    pub problem: Option<String>,
    /// When, ms since the epoch.
    pub probed_ms: i64,
}

impl Verdict {
    /// What is to be said of the runtime with that digest.
    pub fn sentence(&self, digest: &str) -> String {
        let runtime = format!("{} {} ({})", self.sandbox_class, self.runtime_version, short(digest));
        match &self.problem {
            None => format!(
                "on {runtime} a probe sandbox slept and woke {} times with its connections",
                self.wakes
            ),
            Some(problem) => format!(
                "on {runtime} a probe sandbox did not wake after {} sleeps: {problem}",
                self.wakes + 1
            ),
        }
    }
}

fn short(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}

/// Verdicts by digest, as they are kept at a path; none where there is no file.
///
/// # Errors
/// When the file is there and cannot be read.
pub fn verdicts(path: &Path) -> std::io::Result<BTreeMap<String, Verdict>> {
    match std::fs::read(path) {
        Ok(text) => serde_json::from_slice(&text).map_err(std::io::Error::other),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(BTreeMap::new()),
        Err(error) => Err(error),
    }
}

/// What is to be done, given the workers there are.
#[derive(Debug, PartialEq, Eq)]
enum Judgement {
    /// All runtimes are good; why.
    Good(String),
    /// One is not.
    Bad(String),
    /// These are not known.
    Unknown(BTreeSet<String>),
    /// There is nothing to judge.
    NoWorkers,
}

fn judge(workers: &[Worker], class: &str, known: &BTreeMap<String, Verdict>) -> Judgement {
    let digests: BTreeSet<&String> = workers
        .iter()
        .filter(|worker| worker.alive && !worker.cordoned && worker.sandbox_class == class)
        .map(|worker| &worker.runtime_digest)
        .collect();
    let bad = digests.iter().find_map(|digest| {
        known.get(*digest).filter(|verdict| verdict.problem.is_some()).map(|verdict| verdict.sentence(digest))
    });
    let unknown: BTreeSet<String> = digests
        .iter()
        .filter(|digest| !known.contains_key(**digest))
        .map(|digest| (*digest).clone())
        .collect();
    let good: Vec<String> = digests
        .iter()
        .filter_map(|digest| known.get(*digest).map(|verdict| verdict.sentence(digest)))
        .collect();
    match bad {
        Some(bad) => Judgement::Bad(bad),
        None if !unknown.is_empty() => Judgement::Unknown(unknown),
        None if good.is_empty() => Judgement::NoWorkers,
        None => Judgement::Good(good.join("; ")),
    }
}

/// The runtime that an actor ran on: its worker's, or the only one there is.
fn runtime_of<'a>(actor: &Actor, workers: &'a [Worker], class: &str) -> Option<&'a Worker> {
    let of_class = || workers.iter().filter(|worker| worker.sandbox_class == class);
    of_class().find(|worker| worker.id == actor.worker_id).or_else(|| {
        let digests: BTreeSet<_> = of_class().map(|worker| &worker.runtime_digest).collect();
        (digests.len() == 1).then(|| of_class().next()).flatten()
    })
}

/// A failure that says nothing about the runtime.
fn is_inconclusive(failure: &Failure) -> bool {
    matches!(failure, Failure::Unreachable { .. })
        || matches!(
            failure.code(),
            Code::ResourceExhausted | Code::Unavailable | Code::Aborted | Code::NotFound
        )
}

/// Tries runtimes and remembers what was seen; cheap to clone.
#[derive(Clone)]
pub struct Probes {
    control: Control,
    template: TemplateSpec,
    files: ActorSpec,
    path: PathBuf,
    known: Arc<Mutex<BTreeMap<String, Verdict>>>,
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl Probes {
    /// With what a probe sandbox is made of ([`crate::supervisor::probe_sandbox`]), for any class.
    pub fn new(control: Control, template: TemplateSpec, files: ActorSpec, store: &Path) -> Self {
        let path = store.join(FILE);
        let known = verdicts(&path).unwrap_or_else(|error| {
            tracing::warn!(path = %path.display(), %error, "cannot read what was probed; it is probed again");
            BTreeMap::new()
        });
        Self { control, template, files, path, known: Arc::new(Mutex::new(known)), turn: Arc::default() }
    }

    /// Why a supervisor can be had on all runtimes that a new sandbox of a class may get; probes those that are not known.
    ///
    /// # Errors
    /// Where one cannot bring it back, or that could not be found out.
    pub async fn reason(&self, class: SandboxClass) -> Result<String, Failure> {
        let refused = |why: String| {
            Failure::Precondition(format!(
                "supervisor.mode = \"auto\": {why}; a runtime that restores them is needed (docs/runsc.md), or \
                 supervisor.mode = \"process\" to go without the probe"
            ))
        };
        let _turn = self.turn.lock().await;
        let mut attempts = BTreeSet::new();
        loop {
            let workers = self.control.list_workers().await?;
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let unknown = match judge(&workers, class.as_str(), &known) {
                Judgement::Good(reason) => return Ok(reason),
                Judgement::Bad(reason) => {
                    return Err(refused(format!("{reason} (remembered in {})", self.path.display())));
                }
                Judgement::NoWorkers => {
                    return Err(refused(format!("no worker of class {} is up to be probed", class.as_str())));
                }
                Judgement::Unknown(unknown) => unknown,
            };
            // Each attempt may land on one that is known already.
            if !attempts.insert(unknown.clone()) {
                let names: Vec<&str> = unknown.iter().map(|digest| short(digest)).collect();
                return Err(refused(format!("runtime {} could not be probed yet", names.join(", "))));
            }
            // To its end, also when who asked is gone.
            let probes = self.clone();
            let probed = tokio::spawn(async move { probes.probe(class, &workers).await }).await;
            match probed {
                Ok(Ok(())) => {}
                Ok(Err(failure)) => {
                    return Err(refused(format!("the runtime could not be probed yet: {failure}")));
                }
                Err(error) => return Err(refused(format!("the probe was interrupted: {error}"))),
            }
        }
    }

    /// Makes a probe sandbox, tries, and takes it away.
    async fn probe(&self, class: SandboxClass, workers: &[Worker]) -> Result<(), Failure> {
        self.control.create_atespace(ATESPACE, BTreeMap::new()).await?;
        for left in self.control.list_actors(ATESPACE, "", BTreeMap::new()).await? {
            if now_ms() - left.created_ms > LEFT_AFTER_MS {
                self.control.delete_actor(&left.uid, SHORT).await?;
            }
        }
        let uid = uuid::Uuid::new_v4().to_string();
        let name = format!("probe-{}", &uid[..8]);
        let template = TemplateSpec { sandbox_class: class.as_str().to_owned(), ..self.template.clone() };
        self.control.create_template(ATESPACE, &name, template, BTreeMap::new(), false).await?;
        let spec = ActorSpec { template: name.clone(), ..self.files.clone() };
        let tried = match self.control.create_actor(ATESPACE, &name, &uid, spec).await {
            Ok(_) => self.sleep_and_wake(&uid, limit(class)).await,
            Err(failure) => Err(failure),
        };
        let ended = [
            self.control.delete_actor(&uid, limit(class)).await.map(drop),
            self.control.delete_template(ATESPACE, &name).await.map(drop),
            self.control.delete_atespace(ATESPACE).await.map(drop),
        ];
        for failure in ended.into_iter().filter_map(Result::err) {
            // Another driver may probe there as well.
            if failure.code() != Code::FailedPrecondition {
                tracing::warn!(actor = uid, error = %failure, "cannot take a probe sandbox away");
            }
        }
        let (actor, wakes, problem) = tried?;
        let worker = runtime_of(&actor, workers, class.as_str())
            .ok_or_else(|| Failure::Precondition("the workers changed while one was probed".to_owned()))?;
        let verdict = Verdict {
            sandbox_class: class.as_str().to_owned(),
            runtime_version: worker.runtime_version.clone(),
            wakes,
            problem,
            probed_ms: now_ms(),
        };
        tracing::info!(good = verdict.problem.is_none(), "{}", verdict.sentence(&worker.runtime_digest));
        self.remember(worker.runtime_digest.clone(), verdict);
        Ok(())
    }

    /// The actor as it last ran, how often it woke, and why it did not again.
    async fn sleep_and_wake(
        &self,
        uid: &str,
        limit: Duration,
    ) -> Result<(Actor, u32, Option<String>), Failure> {
        let mut actor = self.control.resume(uid, limit).await?;
        for wakes in 0..SLEEPS {
            let woken = match self.control.suspend(uid, limit).await {
                Ok(_) => self.control.resume(uid, limit).await,
                Err(failure) => Err(failure),
            };
            match woken {
                Ok(awake) => actor = awake,
                Err(failure) if is_inconclusive(&failure) => return Err(failure),
                Err(failure) => return Ok((actor, wakes, Some(failure.to_string()))),
            }
        }
        Ok((actor, SLEEPS, None))
    }

    fn remember(&self, digest: String, verdict: Verdict) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(digest, verdict);
        if let Err(error) = write(&self.path, &known) {
            tracing::warn!(path = %self.path.display(), %error, "cannot keep what was probed; a restart probes again");
        }
    }
}

fn write(path: &Path, known: &BTreeMap<String, Verdict>) -> std::io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(dir)?;
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    file.write_all(&serde_json::to_vec_pretty(known)?)?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(digest: &str, class: &str) -> Worker {
        Worker {
            id: format!("w-{digest}"),
            sandbox_class: class.to_owned(),
            runtime_digest: digest.to_owned(),
            alive: true,
            ..Worker::default()
        }
    }

    fn verdict(problem: Option<&str>) -> Verdict {
        Verdict {
            sandbox_class: "gvisor".to_owned(),
            runtime_version: "r1".to_owned(),
            wakes: 1,
            problem: problem.map(str::to_owned),
            probed_ms: 0,
        }
    }

    #[test]
    fn every_runtime_that_a_sandbox_may_get_is_judged() {
        let known: BTreeMap<_, _> =
            [("good".to_owned(), verdict(None)), ("bad".to_owned(), verdict(Some("it hung")))].into();
        let judged = |workers: &[Worker]| judge(workers, "gvisor", &known);
        assert_eq!(judged(&[]), Judgement::NoWorkers);
        assert!(matches!(judged(&[worker("good", "gvisor"), worker("new", "microvm")]), Judgement::Good(_)));
        let Judgement::Bad(why) =
            judged(&[worker("good", "gvisor"), worker("bad", "gvisor"), worker("new", "gvisor")])
        else {
            panic!("one bad runtime is enough");
        };
        assert!(why.contains("bad") && why.contains("it hung") && why.contains("2 sleeps"), "{why}");
        let unknown = Judgement::Unknown(["new".to_owned()].into());
        assert_eq!(judged(&[worker("good", "gvisor"), worker("new", "gvisor")]), unknown);
        // None that a new sandbox cannot get.
        let cordoned = Worker { cordoned: true, ..worker("bad", "gvisor") };
        let dead = Worker { alive: false, ..worker("new", "gvisor") };
        assert!(matches!(judged(&[worker("good", "gvisor"), cordoned, dead]), Judgement::Good(_)));
    }

    #[test]
    fn a_verdict_is_of_the_runtime_that_ran_it() {
        let workers = [worker("a", "gvisor"), worker("b", "gvisor")];
        let on = |id: &str| Actor { worker_id: id.to_owned(), ..Actor::default() };
        let digest = |actor: &Actor, workers: &[Worker]| {
            runtime_of(actor, workers, "gvisor").map(|worker| worker.runtime_digest.clone())
        };
        assert_eq!(digest(&on("w-b"), &workers).as_deref(), Some("b"));
        assert_eq!(digest(&on("gone"), &workers), None, "it may have been either");
        assert_eq!(digest(&on("gone"), &workers[..1]).as_deref(), Some("a"));
    }

    #[test]
    fn verdicts_outlive_the_driver() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store").join(FILE);
        assert!(verdicts(&path).unwrap().is_empty());
        let known: BTreeMap<_, _> = [("a".to_owned(), verdict(None))].into();
        write(&path, &known).unwrap();
        assert_eq!(verdicts(&path).unwrap(), known);
        std::fs::write(&path, "no JSON").unwrap();
        assert!(verdicts(&path).is_err());
    }
}

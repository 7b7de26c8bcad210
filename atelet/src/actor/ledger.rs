// SPDX-License-Identifier: Apache-2.0
//! The highest generation of each actor that this node has seen (P1, P5).
//!
//! A call of a lower generation is refused; so is the *start* of one that has ended here, because a late retry of an
//! Activate must not bring back what was released. Kept in `actors/<uid>/actor.json`, so that it survives this
//! process. It is not fsynced: after a crash of the machine nothing of it runs, and the lease guards what comes.
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use substrate_proto::types::Assignment;

use crate::durable;
use crate::error::{NodeError, actor_name};
use crate::snapshot::check_name;

/// What is known of an actor.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Entry {
    /// Where it lives.
    pub atespace: String,
    /// Its name there.
    pub name: String,
    /// The highest seen.
    pub generation: u64,
    /// That generation was ended here.
    pub ended: bool,
    /// Where that generation was started.
    pub worker: String,
    /// Names, the main one first.
    pub containers: Vec<String>,
    /// Lease request last sent when it was activated; see [`crate::lease::Local`].
    #[serde(skip)]
    pub since: u64,
}

/// All actors of a node.
#[derive(Debug)]
pub struct Ledger {
    dir: PathBuf,
    entries: Mutex<HashMap<String, Entry>>,
}

impl Ledger {
    /// Reads what is in `dir` (`DIR/node/actors`).
    ///
    /// # Errors
    /// The system's; an entry that cannot be read is logged and taken as not known.
    pub fn open(dir: &Path) -> io::Result<Self> {
        durable::create_dir(dir)?;
        let mut entries = HashMap::new();
        for actor in std::fs::read_dir(dir).map_err(durable::at("list", dir))? {
            let path = actor?.path().join("actor.json");
            let Ok(text) = std::fs::read(&path) else { continue };
            match (
                serde_json::from_slice(&text),
                path.parent().and_then(Path::file_name).and_then(|name| name.to_str()),
            ) {
                (Ok(entry), Some(uid)) => drop(entries.insert(uid.to_owned(), entry)),
                (Err(error), _) => {
                    tracing::warn!(path = %path.display(), %error, "unreadable; taken as an unknown actor");
                }
                _ => {}
            }
        }
        Ok(Self { dir: dir.to_owned(), entries: Mutex::new(entries) })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of an actor.
    pub fn get(&self, uid: &str) -> Option<Entry> {
        self.lock().get(uid).cloned()
    }

    /// Refuses a generation below the highest known.
    ///
    /// # Errors
    /// [`NodeError::Stale`].
    pub fn check(&self, assignment: &Assignment) -> Result<(), NodeError> {
        match self.lock().get(&assignment.actor_uid) {
            Some(entry) if entry.generation > assignment.generation => Err(NodeError::Stale {
                actor: actor_name(assignment),
                got: assignment.generation,
                known: entry.generation,
            }),
            _ => Ok(()),
        }
    }

    /// Notes that an assignment starts here.
    ///
    /// # Errors
    /// [`NodeError::Stale`], [`NodeError::Ended`], [`NodeError::Io`] when it cannot be kept.
    pub fn begin(
        &self,
        assignment: &Assignment,
        containers: Vec<String>,
        since: u64,
    ) -> Result<(), NodeError> {
        self.check(assignment)?;
        let mut entries = self.lock();
        if let Some(known) = entries.get(&assignment.actor_uid)
            && known.generation == assignment.generation
        {
            if known.ended {
                return Err(NodeError::Ended {
                    actor: actor_name(assignment),
                    generation: assignment.generation,
                });
            }
            if known.since > 0 && known.containers == containers && known.worker == assignment.worker_id {
                // A retry: what the first call noted stands.
                return Ok(());
            }
        }
        let entry = Entry {
            atespace: assignment.atespace.clone(),
            name: assignment.actor_name.clone(),
            generation: assignment.generation,
            ended: false,
            worker: assignment.worker_id.clone(),
            containers,
            since,
        };
        self.keep(&assignment.actor_uid, &entry)?;
        entries.insert(assignment.actor_uid.clone(), entry);
        Ok(())
    }

    /// Notes that an assignment has ended here, or is never to start. Lower than known: nothing to do.
    ///
    /// # Errors
    /// [`NodeError::Io`] when it cannot be kept; it holds for this process all the same.
    pub fn end(&self, assignment: &Assignment) -> Result<(), NodeError> {
        let mut entries = self.lock();
        let entry = entries.entry(assignment.actor_uid.clone()).or_default();
        if entry.generation > assignment.generation
            || (entry.generation == assignment.generation && entry.ended)
        {
            return Ok(());
        }
        if entry.name.is_empty() {
            entry.atespace.clone_from(&assignment.atespace);
            entry.name.clone_from(&assignment.actor_name);
        }
        entry.generation = assignment.generation;
        entry.ended = true;
        let entry = entry.clone();
        self.keep(&assignment.actor_uid, &entry)
    }

    /// What was started on a worker and not ended since, as far as this node knows.
    pub fn on_worker(&self, worker: &str) -> Vec<Assignment> {
        self.lock()
            .iter()
            .filter(|(_, entry)| entry.worker == worker && !entry.ended)
            .map(|(uid, entry)| Assignment {
                actor_uid: uid.clone(),
                atespace: entry.atespace.clone(),
                actor_name: entry.name.clone(),
                generation: entry.generation,
                worker_id: worker.to_owned(),
            })
            .collect()
    }

    /// Nothing of an assignment is on its worker: its start failed. It may be started again.
    pub fn displaced(&self, assignment: &Assignment) {
        let mut entries = self.lock();
        if let Some(entry) = entries.get_mut(&assignment.actor_uid)
            && entry.generation == assignment.generation
        {
            entry.worker.clear();
            let entry = entry.clone();
            if let Err(error) = self.keep(&assignment.actor_uid, &entry) {
                tracing::warn!(%error, "a loss may be told of what never ran");
            }
        }
    }

    /// Forgets an actor whose directory is removed.
    pub fn forget(&self, uid: &str) {
        self.lock().remove(uid);
    }

    fn keep(&self, uid: &str, entry: &Entry) -> Result<(), NodeError> {
        let failed = |error| NodeError::io("noting the actor's generation")(error);
        let dir = self.dir.join(check_name("actor uid", uid)?);
        std::fs::create_dir_all(&dir).map_err(failed)?;
        let text = serde_json::to_vec(entry).map_err(io::Error::other).map_err(failed)?;
        let (temp, path) = (dir.join(".actor.json.tmp"), dir.join("actor.json"));
        std::fs::write(&temp, text).and_then(|()| std::fs::rename(&temp, &path)).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assignment(generation: u64) -> Assignment {
        Assignment {
            actor_uid: "u1".into(),
            atespace: "a".into(),
            actor_name: "n".into(),
            generation,
            worker_id: "w".into(),
        }
    }

    #[test]
    fn what_is_of_the_past_is_refused_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        ledger.begin(&assignment(3), vec!["main".into()], 9).unwrap();
        ledger.begin(&assignment(3), vec!["main".into()], 12).unwrap();
        assert_eq!(ledger.get("u1").unwrap().since, 9, "a retry must not look younger");
        assert!(matches!(ledger.begin(&assignment(2), vec![], 1), Err(NodeError::Stale { .. })));
        ledger.end(&assignment(2)).unwrap();
        assert!(!ledger.get("u1").unwrap().ended, "a lower end is of the past");
        assert_eq!(ledger.on_worker("w"), [assignment(3)]);
        ledger.displaced(&assignment(3));
        assert!(ledger.on_worker("w").is_empty());
        ledger.begin(&assignment(3), vec!["main".into()], 12).unwrap();
        assert_eq!(ledger.on_worker("w").len(), 1);
        ledger.end(&assignment(3)).unwrap();
        assert!(ledger.on_worker("w").is_empty());
        let ledger = Ledger::open(dir.path()).unwrap();
        assert!(matches!(ledger.begin(&assignment(3), vec![], 1), Err(NodeError::Ended { .. })));
        assert!(ledger.check(&assignment(3)).is_ok());
        assert_eq!(ledger.get("u1").unwrap().containers, ["main"]);
        ledger.begin(&assignment(4), vec![], 1).unwrap();
        // An end that comes before its beginning.
        ledger.end(&assignment(7)).unwrap();
        assert!(matches!(ledger.begin(&assignment(7), vec![], 1), Err(NodeError::Ended { .. })));
        assert!(matches!(ledger.check(&assignment(6)), Err(NodeError::Stale { .. })));
        ledger.forget("u1");
        assert!(ledger.get("u1").is_none());
    }
}

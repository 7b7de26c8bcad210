// SPDX-License-Identifier: Apache-2.0
//! Forks: a new actor from a snapshot of another, which must be durable first. What holds a supervisor's identity in its
//! memory is refused (design, section 9).
use super::admit::Admitted;
use super::driver::{Driver, End};
use super::{Call, CallError};
use crate::model::{Actor, ActorUid, Generation, Snapshot, State, Stored as _};
use crate::retention;
use crate::state::{self, Event};
use crate::store::{Check, Expect, Kind, RefChange, RequestRecord, StoreError, Tx, UsageChange};

impl Driver {
    pub(super) async fn admit_fork(&mut self, call: Call, name: &str, asked: &str) -> Result<Admitted, End> {
        if self.actor.holds_identity {
            let error = CallError::Precondition {
                reason: "HOLDS_IDENTITY",
                message: format!(
                    "actor {} keeps an identity in its memory (an OpenShell supervisor's): a copy would claim the same",
                    self.label()
                ),
                way_out: "create another actor from the template",
            };
            return Ok(self.reply(call, Err(error)));
        }
        match self.actor.state {
            State::Suspending | State::Pausing => return Ok(Admitted::Wait(call)),
            State::Suspended | State::Paused => {}
            _ => {
                let refused = self.refused("fork");
                return Ok(self.reply(call, Err(refused)));
            }
        }
        let found =
            if asked.is_empty() { self.actor.last_snapshot() } else { self.actor.find_snapshot(asked) };
        let Some(snapshot) = found.cloned() else {
            let unknown = self.unknown_snapshot(asked);
            return Ok(self.reply(call, Err(unknown)));
        };
        if !snapshot.is_durable() {
            if self.actor.last.as_ref() != Some(&snapshot.id) {
                let error = CallError::Precondition {
                    reason: "NOT_DURABLE",
                    message: format!("snapshot {} is only on its node", snapshot.id),
                    way_out: "revert to it and promote the actor first",
                };
                return Ok(self.reply(call, Err(error)));
            }
            match &snapshot.upload {
                Some(wish) if wish.attempts > 0 && call.after_upload => {
                    let error = self.upload_failed(&snapshot.id, &wish.error);
                    return Ok(self.reply(call, Err(error)));
                }
                Some(wish) if wish.attempts == 0 => {}
                _ => self.apply(Event::Promote, None).await?,
            }
            return Ok(Admitted::Wait(Call { after_upload: true, ..call }));
        }
        let outcome = self.fork(name, snapshot, &call).await;
        match outcome {
            Ok(fork) => {
                let mut answer = self.answer(fork.last_snapshot().cloned(), false);
                answer.actor = fork;
                let _ = call.reply.send(Ok(answer));
                Ok(Admitted::Yes)
            }
            Err(error) => Ok(self.reply(call, Err(error))),
        }
    }

    /// The new actor's record, its hold on the snapshot's blobs and its files in one commit. This driver is the only
    /// one that could retire the snapshot, and is busy here.
    async fn fork(&mut self, name: &str, mut snapshot: Snapshot, call: &Call) -> Result<Actor, CallError> {
        self.engine.snapshot_quota(&self.actor.atespace).await?;
        let now = self.engine.clock.wall_ms();
        let uid = ActorUid::draw(&*self.engine.clock);
        snapshot.tags.clear();
        snapshot.upload = None;
        let source = &self.actor;
        let files = self.engine.files_of(&source.uid).await?;
        let mut spec = source.spec.clone();
        spec.labels.retain(|key, _| !key.starts_with("openshell.ai/"));
        let fork = Actor {
            uid: uid.clone(),
            name: name.to_owned(),
            spec,
            state: State::Suspended,
            reason: String::new(),
            message: String::new(),
            state_since_ms: now,
            created_ms: now,
            generation: Generation(0),
            placement: None,
            ingress_endpoint: String::new(),
            last: Some(snapshot.id.clone()),
            snapshots: vec![snapshot.clone()],
            exit: None,
            suspended_by: String::new(),
            progress_step: String::new(),
            progress_percent: 0,
            work: None,
            nodes: std::collections::BTreeSet::new(),
            promote_at_ms: 0,
            clone: true,
            revision: 0,
            ..source.clone()
        };
        let event = state::draft(
            &fork,
            now,
            "Forked",
            format!("from snapshot {} of {}", snapshot.id, self.label()),
            false,
        );
        let mut tx = Tx {
            checks: vec![Check::Exists(Kind::Template, fork.template_uid.0.clone())],
            puts: vec![(fork.object(), Expect::Absent)],
            events: vec![event],
            refs: vec![RefChange::Hold {
                holder: retention::holder(&fork, &snapshot),
                blobs: retention::blobs(&snapshot),
            }],
            usage: vec![UsageChange {
                atespace: fork.atespace.clone(),
                actors: 1,
                bytes: fork.snapshot_bytes() as i64,
            }],
            ..Tx::default()
        };
        tx.checks.extend(self.engine.actor_quota(&fork.atespace));
        if !files.is_empty() {
            tx.seals.push((uid.0.clone(), Some(self.engine.sealer.seal(uid.as_str(), &files)?)));
        }
        tx.request = call.request.as_ref().map(|key| RequestRecord {
            id: key.id.clone(),
            fingerprint: key.fingerprint.clone(),
            outcome: uid.0.clone(),
            time_ms: now,
        });
        let committed = self.engine.store.commit(tx).await.map_err(|error| match error {
            StoreError::Exists { .. } => CallError::Exists(format!(
                "actor {}/{name} exists already; choose another name",
                fork.atespace
            )),
            other => super::Engine::refused_commit(other),
        })?;
        Ok(Actor { revision: committed.puts.first().copied().unwrap_or_default(), ..fork })
    }
}

// SPDX-License-Identifier: Apache-2.0
//! How a driver's record changes: one transaction holds the record, its events, what is retired with it and the request
//! that asked for it. Nothing in memory moves before it is committed.
use std::time::Duration;

use super::driver::{Driver, End};
use super::{Reply, RequestKey};
use crate::model::{Actor, Snapshot, SnapshotNote, State, Stored as _};
use crate::retention;
use crate::state::{self, Effect, Event, Refused};
use crate::store::{Expect, Garbage, Kind, Note, RefChange, RequestRecord, StoreError, Tx, UsageChange};
use crate::workflow::steps::{self, Killed};
use crate::workflow::{self, StepName, When};

impl Driver {
    /// Applies an event and commits. A refusal is logged: only admitted and owed events come here.
    pub(super) async fn apply(&mut self, event: Event, request: Option<&RequestKey>) -> Result<(), End> {
        match self.try_apply(event, request).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(refused)) => {
                tracing::debug!(actor = %self.uid, %refused, "an event came too late");
                Ok(())
            }
            Err(end) => Err(end),
        }
    }

    /// Applies an event and commits, or says why the state refuses it.
    pub(super) async fn try_apply(
        &mut self,
        event: Event,
        request: Option<&RequestKey>,
    ) -> Result<Result<(), Refused>, End> {
        // The node is to end what is left of it, and tells when its slot is free.
        let ended_there = matches!(&event, Event::WorkerLost { .. } | Event::Exited { .. });
        let assignment = self.actor.assignment().zip(self.actor.placement.clone());
        let snapshot = match &event {
            Event::Stop { snapshot, .. } | Event::Checkpoint { snapshot, .. } => Some(snapshot.clone()),
            _ => None,
        };
        let (next, effects) = match state::transition(&self.actor, event, self.engine.clock.wall_ms()) {
            Ok(step) => step,
            Err(refused) => return Ok(Err(refused)),
        };
        let outcome = snapshot.map_or_else(|| self.uid.0.clone(), |id| id.0);
        let request = request.map(|key| (key.clone(), outcome));
        let mut events = Vec::new();
        let mut freed = Vec::new();
        for effect in effects {
            match effect {
                Effect::Record(event) => events.push(event),
                Effect::Free { worker, generation, .. } => freed.push((worker, generation)),
                Effect::Remove => {}
            }
        }
        if self.write(next, events, request).await? {
            let mut pool = super::lock(&self.engine.pool);
            for (worker, generation) in &freed {
                pool.free(worker, &self.uid, *generation, !ended_there);
            }
            drop(pool);
            if ended_there
                && !freed.is_empty()
                && let Some((assignment, placement)) = assignment
            {
                self.engine.release_quietly(assignment, &placement.node);
            }
            if let Some(placement) = &self.actor.placement {
                freed.push((placement.worker.clone(), self.actor.generation));
            }
            if !freed.is_empty() {
                self.engine.pool_touched(freed.into_iter().map(|(worker, _)| worker));
            }
        }
        Ok(Ok(()))
    }

    /// Commits a new record with its events. False: it was not, and the record was read anew.
    pub(super) async fn write(
        &mut self,
        mut next: Actor,
        events: Vec<crate::model::EventDraft>,
        request: Option<(RequestKey, String)>,
    ) -> Result<bool, End> {
        steps::hit(&self.engine, StepName::Commit, When::Before).map_err(|Killed| End)?;
        let mut tx = Tx { events, ..Tx::default() };
        let given_up =
            self.actor.snapshots.iter().filter(|it| it.is_durable() && next.snapshot(&it.id).is_none());
        tx.refs.extend(given_up.map(|it| RefChange::Drop { holder: retention::holder(&self.actor, it) }));
        if next.state != State::Deleting {
            let retired = retention::retire(&mut next);
            tx.refs.extend(retired.refs);
            tx.garbage.extend(retired.garbage);
        }
        for snapshot in &next.snapshots {
            let before = self.actor.snapshot(&snapshot.id);
            if before == Some(snapshot) {
                continue;
            }
            tx.notes.extend(note(&next, snapshot, false));
            #[cfg(test)]
            if self.engine.faults.undoes(crate::workflow::Rule::DropAfterDurable)
                && let Some(node) = &snapshot.node
            {
                tx.garbage.push(retention::node_copy(snapshot, node));
            }
            if snapshot.is_durable() && !before.is_some_and(Snapshot::is_durable) {
                let holder = retention::holder(&next, snapshot);
                tx.refs.push(RefChange::Hold { holder, blobs: retention::blobs(snapshot) });
                // Only now may the node drop its copy (P2); it may keep it as cache.
                if let Some(node) = &snapshot.node {
                    tx.garbage.push(retention::node_copy(snapshot, node));
                }
            }
        }
        for snapshot in &self.actor.snapshots {
            if next.snapshot(&snapshot.id).is_none() {
                tx.notes.extend(note(&next, snapshot, true));
            }
        }
        let garbage = !tx.garbage.is_empty() || !tx.refs.is_empty();
        let now = self.engine.clock.wall_ms();
        tx.request = request.map(|(key, outcome)| RequestRecord {
            id: key.id,
            fingerprint: key.fingerprint,
            outcome,
            time_ms: now,
        });
        let bytes = next.snapshot_bytes() as i64 - self.actor.snapshot_bytes() as i64;
        if bytes != 0 && next.golden.is_none() {
            tx.usage.push(UsageChange { atespace: next.atespace.clone(), actors: 0, bytes });
        }
        tx.puts.push((next.object(), Expect::Revision(self.actor.revision)));
        let reasons: Vec<String> = tx.events.iter().map(|event| event.reason.clone()).collect();
        match self.engine.store.commit(tx).await {
            Ok(committed) => {
                crate::metrics::events(reasons.iter().map(String::as_str));
                let took = next.state_since_ms - self.actor.state_since_ms;
                crate::metrics::moved(self.actor.state, next.state, took);
                next.revision = committed.puts.first().copied().unwrap_or(committed.revision);
                self.actor = next;
                self.failures = 0;
                self.engine.note_live(&self.actor);
                self.engine.note_timer(&self.actor);
                if garbage {
                    self.engine.garbage_added.notify_one();
                }
                steps::hit(&self.engine, StepName::Commit, When::After).map_err(|Killed| End)?;
                Ok(true)
            }
            Err(error) => {
                self.start_over(error).await?;
                Ok(false)
            }
        }
    }

    /// A commit failed: nothing in memory counts any more. Whoever waits is told, and the record is read anew.
    async fn start_over(&mut self, error: StoreError) -> Result<(), End> {
        tracing::error!(actor = %self.uid, %error, "a commit failed, reading the record anew");
        self.op = None;
        self.upload = None;
        self.held = None;
        self.steps.clear();
        let replies = self.waiters.drain(..).map(|waiter| waiter.call.reply);
        let replies: Vec<Reply> = replies.chain(self.queue.drain(..).map(|call| call.reply)).collect();
        for reply in replies {
            let _ = reply.send(Err(error.clone().into()));
        }
        // For the call whose commit it was: it waits from now on.
        self.refusal = Some(error.clone().into());
        loop {
            self.failures += 1;
            if !matches!(error, StoreError::Conflict { .. }) || self.failures > 1 {
                let pause = workflow::backoff_ms(self.failures.min(4)) as u64;
                self.engine.pause(Duration::from_millis(pause)).await;
            }
            match super::golden::load(&self.engine, &self.uid).await {
                Ok(Some(actor)) => {
                    self.actor = actor;
                    return Ok(());
                }
                Ok(None) => return Err(End),
                Err(error) => tracing::error!(actor = %self.uid, %error, "cannot read an actor's record"),
            }
        }
    }

    /// The last step of a deletion: the record goes, and with it every reference; what is left to delete is garbage.
    pub(super) async fn remove(&mut self, unpurged: Vec<crate::model::NodeName>) -> Result<(), End> {
        let now = self.engine.clock.wall_ms();
        let effects = match state::transition(&self.actor, Event::Deleted, now) {
            Ok((_, effects)) => effects,
            Err(refused) => {
                tracing::error!(actor = %self.uid, %refused, "a deletion came too early");
                return Ok(());
            }
        };
        steps::hit(&self.engine, StepName::Commit, When::Before).map_err(|Killed| End)?;
        let actor = &self.actor;
        let mut tx = Tx {
            deletes: vec![(actor.kind(), actor.uid.0.clone(), Expect::Revision(actor.revision))],
            seals: vec![(actor.uid.0.clone(), None)],
            ..Tx::default()
        };
        if actor.golden.is_none() {
            let (atespace, bytes) = (actor.atespace.clone(), -(actor.snapshot_bytes() as i64));
            tx.usage.push(UsageChange { atespace, actors: -1, bytes });
        }
        for effect in effects {
            if let Effect::Record(event) = effect {
                tx.events.push(event);
            }
        }
        for snapshot in &actor.snapshots {
            tx.notes.extend(note(actor, snapshot, true));
            if snapshot.is_durable() {
                tx.refs.push(RefChange::Drop { holder: retention::holder(actor, snapshot) });
            }
        }
        tx.garbage.extend(unpurged.into_iter().map(|node| Garbage::Purge {
            node: node.0,
            actor: actor.uid.0.clone(),
            atespace: actor.atespace.clone(),
            name: actor.name.clone(),
        }));
        if let Err(error) = self.engine.store.commit(tx).await {
            return self.start_over(error).await;
        }
        super::lock(&self.engine.live).remove(&self.uid);
        steps::hit(&self.engine, StepName::Commit, When::After).map_err(|Killed| End)?;
        // So that the blobs are gone when the caller is told; what cannot be deleted now stays garbage.
        if self.engine.collect(Duration::from_secs(10)).await {
            self.engine.garbage_added.notify_one();
        }
        Err(End)
    }
}

/// What watches are told of a snapshot.
fn note(actor: &Actor, snapshot: &Snapshot, deleted: bool) -> Option<Note> {
    if actor.golden.is_some() {
        return None;
    }
    let shown = SnapshotNote {
        actor_uid: actor.uid.clone(),
        atespace: actor.atespace.clone(),
        actor_name: actor.name.clone(),
        snapshot: snapshot.clone(),
    };
    Some(Note {
        kind: Kind::Snapshot,
        key: snapshot.id.0.clone(),
        atespace: actor.atespace.clone(),
        name: actor.name.clone(),
        deleted,
        doc: serde_json::to_string(&shown).unwrap_or_default(),
    })
}

// SPDX-License-Identifier: Apache-2.0
//! An administrator's word that a node will not come back: the way out of PAUSED on a node that is gone (P3).
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;

use super::driver::{Driver, End};
use super::{Call, CallError, Engine, Link, Verb, lock};
use crate::model::{Actor, EventDraft, NodeName};
use crate::state::Event;
use crate::store::{self, Kind, Query, Tx};

/// Actors told at once.
const TOLD_AT_ONCE: usize = 16;

impl Engine {
    /// Ends what was booked on a node and gives up what only it had. How many assignments ended, and snapshots are lost.
    ///
    /// Race: a lease that may still run is waited out like everywhere else; only a node that is silent beyond it, or
    /// that the configuration no longer names, can be declared lost, so that nothing of it runs (P1).
    pub(crate) async fn declare_node_lost(
        self: &Arc<Self>,
        name: &NodeName,
    ) -> Result<(u32, u32), CallError> {
        let message = format!("node {name} was declared lost");
        if let Some(node) = self.node(name) {
            if node.is_up() {
                return Err(CallError::Precondition {
                    reason: "NODE_CONNECTED",
                    message: format!("node {name} is connected, so it is not lost"),
                    way_out: "drain its workers instead, or stop its agent first",
                });
            }
            let left = (node.lease_until() + self.settings.lease_margin).saturating_sub(self.clock.now());
            let is_given_up = node.link.read(|link| matches!(link, Link::Lost(_)));
            if !is_given_up && left > Duration::ZERO && !lock(&self.pool).assignments(name).is_empty() {
                return Err(CallError::LeaseRuns { node: name.0.clone(), left });
            }
            node.link.set(Link::Lost(message.clone()));
        }
        let mut actors: Vec<Actor> = store::list_all(&*self.store, Query::all(Kind::Actor)).await?;
        actors.extend(store::list_all::<Actor>(&*self.store, Query::all(Kind::Golden)).await?);
        let concerned: Vec<_> = actors
            .into_iter()
            .filter(|actor| {
                actor.placement.as_ref().is_some_and(|it| it.node == *name)
                    || actor.snapshots.iter().any(|it| it.node.as_ref() == Some(name))
            })
            .map(|actor| {
                let held = actor.placement.as_ref().is_some_and(|it| it.node == *name);
                let only_there =
                    actor.snapshots.iter().filter(|it| it.node.as_ref() == Some(name) && !it.is_durable());
                (u32::from(held), only_there.count() as u32, actor.uid)
            })
            .collect();
        let ended = concerned.iter().map(|(held, ..)| held).sum();
        let lost = concerned.iter().map(|(_, snapshots, _)| snapshots).sum();
        let outcomes: Vec<Result<_, CallError>> = futures::stream::iter(concerned)
            .map(|(_, _, uid)| {
                let verb = Verb::NodeLost { node: name.clone(), message: message.clone() };
                async move { self.ask(&uid, verb, None).await }
            })
            .buffer_unordered(TOLD_AT_ONCE)
            .collect()
            .await;
        for outcome in outcomes {
            match outcome {
                Ok(_) | Err(CallError::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let gone = {
            let mut pool = lock(&self.pool);
            pool.silence(name);
            pool.prune(name)
        };
        self.pool_touched(gone.into_iter().map(|record| record.id));
        let event = EventDraft {
            kind: "node".to_owned(),
            atespace: String::new(),
            subject: name.0.clone(),
            subject_uid: String::new(),
            reason: "NodeDeclaredLost".to_owned(),
            message: format!("{message}: {ended} assignments ended, {lost} snapshots were only there"),
            warning: true,
            metadata: std::collections::BTreeMap::new(),
            time_ms: self.clock.wall_ms(),
        };
        self.store.commit(Tx { events: vec![event], ..Tx::default() }).await?;
        Ok((ended, lost))
    }
}

impl Driver {
    /// What the actor has on a lost node is gone. It overtakes whatever waits for that node.
    pub(super) async fn node_lost(&mut self, call: Call, node: &NodeName, message: &str) -> Result<(), End> {
        if self.actor.placement.as_ref().is_some_and(|it| it.node == *node) {
            self.op = None;
            self.held = None;
            let event = Event::WorkerLost { generation: self.actor.generation, message: message.to_owned() };
            self.apply(event, None).await?;
        }
        let there = self.actor.snapshots.iter().filter(|it| it.node.as_ref() == Some(node));
        for snapshot in there.map(|it| it.id.clone()).collect::<Vec<_>>() {
            if self.upload.as_ref().is_some_and(|(id, _)| *id == snapshot) {
                self.upload = None;
            }
            let event = Event::NodeCopyLost { snapshot: snapshot.clone(), message: message.to_owned() };
            self.apply(event, None).await?;
            self.fail_those_who_wait_for(&snapshot);
        }
        let answer = self.answer(self.actor.last_snapshot().cloned(), false);
        let _ = call.reply.send(Ok(answer));
        Ok(())
    }
}

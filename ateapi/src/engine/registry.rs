// SPDX-License-Identifier: Apache-2.0
//! Drivers: spawned when something happens to an actor, gone when nothing is left to do.
//!
//! A command is put into a driver's queue under the registry's lock, and a driver leaves the registry under the same
//! lock after it saw its queue empty: no command is ever lost between the two.
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::driver::DriverStart;
use super::{Answer, Call, CallError, Command, Engine, RequestKey, Verb, lock};
use crate::model::{Actor, ActorKey, ActorUid};
use crate::store;

impl Engine {
    /// Sends a command to an actor's driver, starting one if there is none.
    pub(crate) fn tell_driver(self: &Arc<Self>, uid: &ActorUid, command: Command) -> Result<(), CallError> {
        if self.dead.is_cancelled() {
            return Err(CallError::Stopping);
        }
        let mut drivers = lock(&self.drivers);
        let command = match drivers.get(uid) {
            None => command,
            Some(queue) => match queue.try_send(command) {
                Ok(()) => return Ok(()),
                Err(mpsc::error::TrySendError::Full(_)) => {
                    return Err(CallError::Overloaded(self.settings.calls_per_actor));
                }
                // It ended without leaving (a panic): start another.
                Err(mpsc::error::TrySendError::Closed(command)) => command,
            },
        };
        let (queue, inbox) = mpsc::channel(self.settings.calls_per_actor.max(1));
        // A fresh queue has room.
        let _ = queue.try_send(command);
        drivers.insert(uid.clone(), queue);
        self.spawn(DriverStart { engine: Arc::clone(self), uid: uid.clone(), inbox }.run());
        Ok(())
    }

    /// Sends what nobody waits for.
    pub(crate) fn tell(self: &Arc<Self>, uid: &ActorUid, command: Command) {
        if let Err(error) = self.tell_driver(uid, command) {
            tracing::warn!(actor = %uid, %error, "could not tell an actor's driver");
        }
    }

    /// Takes a driver out if nothing waits for it.
    pub(super) fn retire_driver(&self, uid: &ActorUid, inbox: &mpsc::Receiver<Command>) -> bool {
        let mut drivers = lock(&self.drivers);
        let idle = inbox.is_empty();
        if idle {
            drivers.remove(uid);
        }
        idle
    }

    /// Drivers that exist now.
    #[cfg(test)]
    pub(crate) fn drivers(&self) -> usize {
        lock(&self.drivers).len()
    }

    /// Asks for a verb and waits for its end.
    pub(crate) async fn ask(
        self: &Arc<Self>,
        uid: &ActorUid,
        verb: Verb,
        request: Option<RequestKey>,
    ) -> Result<Answer, CallError> {
        let (reply, answer) = oneshot::channel();
        let call = Call { verb, request, reply, tries: 0, after_upload: false };
        self.tell_driver(uid, Command::Call(call))?;
        answer.await.map_err(|_| CallError::Stopping)?
    }

    /// Asks for a verb without waiting; failures are in the record and the log.
    pub(crate) fn ask_quietly(self: &Arc<Self>, uid: &ActorUid, verb: Verb) {
        let (reply, _) = oneshot::channel();
        let call = Call { verb, request: None, reply, tries: 0, after_upload: false };
        if let Err(error) = self.tell_driver(uid, Command::Call(call)) {
            tracing::warn!(actor = %uid, %error, "could not ask an actor's driver");
            self.disturb(uid);
        }
    }

    /// The uid a request means.
    pub(crate) async fn resolve(&self, key: &ActorKey) -> Result<ActorUid, CallError> {
        match key {
            ActorKey::Uid(uid) => Ok(uid.clone()),
            ActorKey::Name { atespace, name } => {
                let actor: Option<Actor> = store::find(&*self.store, atespace, name).await?;
                actor
                    .map(|actor| actor.uid)
                    .ok_or_else(|| CallError::NotFound { kind: "actor", name: key.to_string() })
            }
        }
    }

    /// The record a request means.
    pub(crate) async fn lookup(&self, key: &ActorKey) -> Result<Actor, CallError> {
        let actor = match key {
            ActorKey::Uid(uid) => store::load(&*self.store, uid.as_str()).await?,
            ActorKey::Name { atespace, name } => store::find(&*self.store, atespace, name).await?,
        };
        actor.ok_or_else(|| CallError::NotFound { kind: "actor", name: key.to_string() })
    }
}

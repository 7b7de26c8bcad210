// SPDX-License-Identifier: Apache-2.0
//! StopSandbox, StartSandbox and DeleteSandbox. All idempotent; stops and starts of one sandbox take turns.
//!
//! A stop is complete when the actor holds no worker and the annotation says at which generation it was stopped. It
//! waits for whatever the actor is in the middle of: a waking actor is stopped once it is up, because the gateway sees
//! it as ready and may stop it at any time. The state is read again after each step rather than assumed, so a stop
//! that races with a drain, an eviction or going idle ends in the same place.
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use substrate_proto::ateapi::{Actor, ActorState};
use tonic::Code;

use crate::condition;
use crate::driver::Driver;
use crate::failure::Failure;
use crate::gates::Key;
use crate::names;

const STEPS: usize = 16;
const DELETE_DEADLINE: Duration = Duration::from_mins(2);

impl Driver {
    /// Suspends a sandbox for its user; returns when it is stopped.
    pub async fn stop(&self, sandbox_id: &str) -> Result<(), Failure> {
        let _turn = self.gates.own(Key::Lifecycle(names::uid(sandbox_id))).await;
        let deadline = Instant::now() + self.config.stop_timeout;
        let mut last = None;
        for _ in 0..STEPS {
            let actor = self.sandbox(sandbox_id).await?;
            let uid = &actor.uid;
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let step = match actor.state() {
                ActorState::Suspended => return self.mark_stopped(&actor).await,
                ActorState::Paused => match self.control.promote(uid, left).await {
                    Err(failure) if failure.code() != Code::Aborted => {
                        // It holds no worker and its bytes are safe on the node; durability follows.
                        tracing::warn!(actor = uid, error = %failure, "stopped, but its snapshot is not durable yet");
                        return self.mark_stopped(&actor).await;
                    }
                    promoted => promoted,
                },
                ActorState::Running | ActorState::Suspending | ActorState::Pausing => {
                    self.control.suspend(uid, left).await
                }
                // Ends when the resume that is under way does, one way or the other.
                ActorState::Resuming => self.control.resume(uid, left).await,
                ActorState::New | ActorState::Unspecified => {
                    return Err(Failure::Precondition(format!(
                        "sandbox {sandbox_id} has not started yet: wait until it is ready, or delete it"
                    )));
                }
                ActorState::Exited | ActorState::Crashed => return Err(ended(sandbox_id, &actor)),
                ActorState::Deleting => {
                    return Err(Failure::Precondition(format!("sandbox {sandbox_id} is being deleted")));
                }
            };
            if let Err(failure) = step {
                if failure.code() == Code::NotFound {
                    return Err(Failure::Missing(format!("sandbox {sandbox_id} was deleted meanwhile")));
                }
                // A refusal because the actor has moved on is no failure: look again. One that leaves it where it
                // was is.
                let now = self.sandbox(sandbox_id).await?;
                if now.state() == actor.state() && now.generation == actor.generation {
                    return Err(failure);
                }
                last = Some(failure);
            }
        }
        Err(last.unwrap_or_else(|| {
            Failure::Precondition(format!(
                "sandbox {sandbox_id} did not stop within {} s (stop_timeout_secs)",
                self.config.stop_timeout.as_secs()
            ))
        }))
    }

    /// Brings a stopped or sleeping sandbox up; returns when it runs.
    pub async fn start(&self, sandbox_id: &str) -> Result<(), Failure> {
        let _turn = self.gates.own(Key::Lifecycle(names::uid(sandbox_id))).await;
        let actor = self.sandbox(sandbox_id).await?;
        match actor.state() {
            ActorState::Running => return Ok(()),
            ActorState::Exited | ActorState::Crashed => return Err(ended(sandbox_id, &actor)),
            ActorState::Deleting => {
                return Err(Failure::Precondition(format!("sandbox {sandbox_id} is being deleted")));
            }
            _ => {}
        }
        let stopped = condition::standing(&actor) == condition::Standing::Stopped;
        let Err(failure) = self.control.resume(&actor.uid, self.config.stop_timeout).await else {
            return Ok(());
        };
        if stopped {
            // The attempt raised the generation and so wiped the mark, but the sandbox is still stopped.
            let now = self.sandbox(sandbox_id).await?;
            let asleep = matches!(now.state(), ActorState::Suspended | ActorState::Paused);
            if asleep && condition::stopped_at(&now) != Some(now.generation) {
                self.mark_stopped(&now).await?;
            }
        }
        Err(failure)
    }

    /// Deletes a sandbox and the template that only it used; false when there is no such sandbox.
    pub async fn delete(&self, sandbox_id: &str) -> Result<bool, Failure> {
        let uid = names::uid(sandbox_id);
        let _creation = self.gates.own(Key::Creation(uid.clone())).await;
        let Some(actor) = self.find(sandbox_id).await? else {
            return Ok(false);
        };
        let deleted = self.control.delete_actor(&uid, DELETE_DEADLINE).await?;
        self.hub.gone(&uid, sandbox_id).await;
        let template = actor.spec.map(|spec| spec.template).unwrap_or_default();
        if let Err(failure) = self.reap_template(&actor.atespace, &template).await {
            tracing::warn!(template, error = %failure, "cannot delete an unused template; it is tried again");
            self.sweep.notify_one();
        }
        tracing::info!(sandbox = sandbox_id, "sandbox deleted");
        Ok(deleted)
    }

    async fn mark_stopped(&self, actor: &Actor) -> Result<(), Failure> {
        if condition::stopped_at(actor) == Some(actor.generation) {
            return Ok(());
        }
        let generation = actor.generation.to_string();
        self.annotate(&actor.uid, BTreeMap::from([(names::STOPPED, generation)])).await
    }

    /// Adds annotations to those an actor has.
    pub async fn annotate(&self, uid: &str, added: BTreeMap<&str, String>) -> Result<(), Failure> {
        let _turn = self.gates.own(Key::Annotations(uid.to_owned())).await;
        // They are replaced as a whole, so what others added meanwhile has to be among them.
        let actor = self.control.get_actor(uid).await?;
        let actor = actor.ok_or_else(|| Failure::Missing(format!("actor {uid} was deleted meanwhile")))?;
        let mut annotations = actor.spec.unwrap_or_default().annotations;
        annotations.extend(added.into_iter().map(|(key, value)| (key.to_owned(), value)));
        self.control.annotate(uid, annotations).await.map(|_| ())
    }
}

fn ended(sandbox_id: &str, actor: &Actor) -> Failure {
    let what = match actor.state() {
        ActorState::Exited => condition::exit_message(actor),
        _ => format!("it crashed ({})", actor.message),
    };
    Failure::Precondition(format!(
        "sandbox {sandbox_id} does not run any more: {what}; delete it, or bring it back with `substrate reset actor {}`",
        actor.name
    ))
}

// SPDX-License-Identifier: Apache-2.0
//! CreateSandbox: three records, then an answer; whatever fails on the way takes all of them back.
//!
//! ```text
//! atespace ensured → template made (or found) → actor made, marked pending, boots → marked made → answer
//!    undo: delete        undo: delete if            undo: delete
//!    if made here        unused
//! ```
//!
//! The gateway neither retries a failed create nor compensates it, so the driver must leave nothing. The mark on the
//! actor (`pending-<nonce>`, then `made-<nonce>`) is the journal: while it says pending, no create has been answered
//! with success, so whoever finds it and knows of no create under way (the sweep of [`crate::journal`], after a crash)
//! may delete the actor. A sandbox that the gateway knows of is never pending. When even marking it made ends without
//! a clear answer, the actor is looked at again; what cannot be found out now is a debt that the sweep works off by
//! the nonce. Whether the answer arrived is found out later ([`crate::receipt`]): then the mark says `done-<nonce>`. Templates need no mark: one that no actor uses is deleted whoever left it.
//!
//! A create runs to its end in a task of its own, also when the gateway hangs up. It holds the creation gate of its
//! sandbox all the while, and the atespace and template while it uses them, so that neither is reaped under its feet.
//! Another driver on the same control plane may still reap the template in between: then the actor is refused, and the
//! template made again.
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use substrate_proto::ateapi::Actor;
use substrate_proto::compute::DriverSandbox;
use tonic::Code;

use crate::condition;
use crate::control::SHORT;
use crate::driver::{Driver, Plan};
use crate::failure::Failure;
use crate::gates::Key;
use crate::{metrics, mirror, names, synthesize, token};

const PENDING: &str = "pending-";
const MADE: &str = "made-";
const DONE: &str = "done-";
const ATTEMPTS: usize = 3;

/// What a create has made, and must take back if it fails.
#[derive(Default)]
struct Made {
    atespace: bool,
    template: bool,
    /// The nonce of the actor, which may exist whatever the call said.
    actor: Option<String>,
}

enum Outcome {
    Made,
    /// A retry of a create that had succeeded.
    Found,
}

impl Driver {
    /// Makes a sandbox and has it boot; see the module.
    pub async fn create(self: Arc<Self>, sandbox: DriverSandbox) -> Result<(), Failure> {
        let driver = Arc::clone(&self);
        let create = self
            .tasks
            .spawn(async move { metrics::of_call("create", driver.create_to_the_end(&sandbox)).await });
        create.await.map_err(|error| Failure::Precondition(format!("the create was interrupted: {error}")))?
    }

    async fn create_to_the_end(&self, sandbox: &DriverSandbox) -> Result<(), Failure> {
        let mut plan = self.plan(sandbox).await?;
        if self.config.supervisor.mode.has_session() && plan.wanted.token.is_empty() {
            return Err(Failure::Precondition(
                "the gateway gave no token for the sandbox, without which its supervisor does not start: set up \
                 [openshell.gateway.gateway_jwt], or supervisor.mode = \"none\" for sandboxes without a supervisor"
                    .to_owned(),
            ));
        }
        let uid = plan.wanted.uid.clone();
        let _creation = self.gates.own(Key::Creation(uid.clone())).await;
        // Where there is a session, its hub renews the token.
        if !self.config.supervisor.mode.has_session() {
            plan.advisories.extend(token::advisory(&plan.wanted, mirror::now_ms()));
        }
        let mut made = Made { atespace: plan.made_atespace, ..Made::default() };
        match self.make(&plan, &mut made).await {
            Ok(Outcome::Made) => {
                self.announce(&plan).await;
                Ok(())
            }
            Ok(Outcome::Found) => Ok(()),
            Err(failure) => {
                tracing::warn!(sandbox = plan.wanted.id, error = %failure, "create failed and is taken back");
                self.take_back(&plan, made, failure.is_ambiguous()).await;
                Err(failure)
            }
        }
    }

    async fn make(&self, plan: &Plan, made: &mut Made) -> Result<Outcome, Failure> {
        let wanted = &plan.wanted;
        if let Some(actor) = self.control.get_actor(&wanted.uid).await? {
            let same = condition::sandbox_id(&actor) == Some(&wanted.id)
                && condition::annotation(&actor, names::REQUEST_DIGEST) == Some(&wanted.digest);
            if !same {
                return Err(Failure::Exists(format!("sandbox id {:?} is in use already", wanted.id)));
            }
            // A retry. The creation gate is ours, so whoever left the mark is gone: the work is done but for it.
            return self.settle(&wanted.uid).await.map(|()| Outcome::Found);
        }
        let _atespace = self.gates.hold(Key::Atespace(wanted.atespace.clone())).await;
        let ensured = self.ensure_atespace(&wanted.tenant, true).await;
        // One that failed may have had its effect; only an implicit, empty atespace is taken back anyway.
        made.atespace |= *ensured.as_ref().unwrap_or(&true);
        ensured?;
        for attempt in 1.. {
            let held = match &plan.template {
                None => None,
                Some(spec) => {
                    let key = Key::Template(wanted.atespace.clone(), plan.template_name.clone());
                    let held = self.gates.hold(key).await;
                    made.template = true;
                    let labels = synthesize::template_labels();
                    self.control
                        .create_template(&wanted.atespace, &plan.template_name, spec.clone(), labels, false)
                        .await?;
                    Some(held)
                }
            };
            let nonce = uuid::Uuid::new_v4().simple().to_string();
            let mut actor = plan.actor.clone();
            actor.annotations.insert(names::CREATE.to_owned(), format!("{PENDING}{nonce}"));
            made.actor = Some(nonce);
            let answer =
                self.control.create_actor(&wanted.atespace, &wanted.actor_name, &wanted.uid, actor).await;
            drop(held);
            match answer {
                Ok(_) => break,
                Err(failure) if failure.is_ambiguous() => return Err(failure),
                Err(failure) => {
                    let vanished = plan.template.is_some()
                        && attempt < ATTEMPTS
                        && matches!(failure.code(), Code::NotFound | Code::FailedPrecondition)
                        && self.control.get_template(&wanted.atespace, &plan.template_name).await?.is_none();
                    if vanished {
                        continue;
                    }
                    return Err(match failure.code() {
                        Code::AlreadyExists
                            if attempt < ATTEMPTS && self.replace_unclaimed(wanted).await? =>
                        {
                            continue;
                        }
                        Code::AlreadyExists => Failure::Exists(format!(
                            "a sandbox named {:?} exists already in workspace {:?}",
                            wanted.name, wanted.tenant
                        )),
                        _ => failure,
                    });
                }
            }
        }
        self.settle(&wanted.uid).await.map(|()| Outcome::Made)
    }

    /// Marks the actor made: from here on the sweep leaves it alone.
    async fn settle(&self, uid: &str) -> Result<(), Failure> {
        let Some(actor) = self.control.get_actor(uid).await? else {
            return Err(Failure::Precondition("the sandbox was deleted while it was made".to_owned()));
        };
        let Some(nonce) = pending(&actor) else { return Ok(()) };
        let made = format!("{MADE}{nonce}");
        let Err(failure) = self.annotate(uid, BTreeMap::from([(names::CREATE, made)])).await else {
            return Ok(());
        };
        match self.control.get_actor(uid).await {
            Ok(Some(actor)) if pending(&actor).is_none() => Ok(()),
            _ => Err(failure),
        }
    }

    async fn take_back(&self, plan: &Plan, made: Made, ambiguous: bool) {
        let wanted = &plan.wanted;
        let mut clean = !ambiguous;
        if let Some(nonce) = made.actor {
            let deleted = self.delete_made(&wanted.uid, &nonce).await;
            if !report("actor", &deleted) || ambiguous {
                clean = false;
                self.debts.lock().unwrap_or_else(PoisonError::into_inner).push((wanted.uid.clone(), nonce));
            }
        }
        if made.template {
            clean &= report("template", &self.reap_template(&wanted.atespace, &plan.template_name).await);
        }
        if made.atespace {
            clean &= report("atespace", &self.reap_atespace(&wanted.atespace).await);
        }
        if !clean {
            // Something may be left, or may still appear when a call that timed out comes through.
            self.sweep.notify_one();
        }
    }

    /// Deletes the actor that the create of that nonce made, if it exists. The caller owns its creation gate.
    pub async fn delete_made(&self, uid: &str, nonce: &str) -> Result<(), Failure> {
        let Some(actor) = self.control.get_actor(uid).await? else {
            return Ok(());
        };
        if pending(&actor).or_else(|| made(&actor)) == Some(nonce) {
            self.control.delete_actor(uid, SHORT).await?;
        }
        Ok(())
    }

    /// Deletes a synthesized template that no actor uses and no create is about to use.
    pub async fn reap_template(&self, atespace: &str, name: &str) -> Result<(), Failure> {
        let _own = self.gates.own(Key::Template(atespace.to_owned(), name.to_owned())).await;
        let Some(template) = self.control.get_template(atespace, name).await? else {
            return Ok(());
        };
        let ours = template.labels.get(names::SYNTHESIZED).is_some_and(|value| value == "true");
        if !ours || !self.control.list_actors(atespace, name, BTreeMap::new()).await?.is_empty() {
            return Ok(());
        }
        match self.control.delete_template(atespace, name).await {
            Ok(_) => Ok(()),
            // Another driver's create was faster; its sandbox deletes it in the end.
            Err(failure) if failure.code() == Code::FailedPrecondition => Ok(()),
            Err(failure) => Err(failure),
        }
    }

    async fn announce(&self, plan: &Plan) {
        let wanted = &plan.wanted;
        let now = mirror::now_ms();
        tracing::info!(
            sandbox = wanted.id,
            name = wanted.name,
            template = plan.template_name,
            "sandbox created"
        );
        let image = if wanted.premade.is_some() { "" } else { &wanted.image };
        self.hub.tell(mirror::platform_event(&wanted.id, mirror::scheduled(now, image))).await;
        for advisory in &plan.advisories {
            let message = format!("{}: {}", advisory.subsystem, advisory.message);
            self.hub
                .tell(mirror::platform_event(&wanted.id, mirror::warning(now, "Advisory", message)))
                .await;
        }
    }
}

/// The nonce of a create that has not succeeded yet.
pub fn pending(actor: &Actor) -> Option<&str> {
    condition::annotation(actor, names::CREATE)?.strip_prefix(PENDING)
}

/// The nonce of a create of which nobody knows whether the gateway got the answer.
pub fn made(actor: &Actor) -> Option<&str> {
    condition::annotation(actor, names::CREATE)?.strip_prefix(MADE)
}

/// The mark of a create whose answer the gateway got.
pub fn done(nonce: &str) -> String {
    format!("{DONE}{nonce}")
}

fn report(what: &str, result: &Result<(), Failure>) -> bool {
    if let Err(failure) = result {
        tracing::warn!(error = %failure, "cannot take back the {what} of a failed create; it is tried again");
    }
    result.is_ok()
}

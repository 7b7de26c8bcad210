// SPDX-License-Identifier: Apache-2.0
//! Golden snapshots: a template that asks for them is booted once per runtime digest until it is ready, and captured;
//! new actors start from that.
//!
//! ```text
//!   template (golden: true) ─▶ maker NEW ─resume─▶ RUNNING (ready) ─suspend─▶ SUSPENDED, durable ─▶ READY
//!                                 ▲                    │
//!                                 └── backoff ◀── failed (event GoldenFailed with the end of the log)
//! ```
//!
//! The *maker* is an actor of its own kind of record ([`Kind::Golden`]), so that it has all that actors have (leases,
//! workflows, recovery) and none of what tenants see: no list, watch, quota or verb knows it. Its uid follows from template
//! and runtime, so that a control plane that starts anew goes on with what is there. It gets a worker only when others are
//! left free: no wake-up waits for it. One at a time is made. Its snapshots' ids are drawn, as all are: what a second
//! attempt stores is told from what a late message of the first is about.
//!
//! A new actor takes a golden snapshot as its first, as a fork takes its source's. Where it cannot be restored, the
//! actor forgets it and boots from its image. Files and environment of one actor are not in it, so an actor that has
//! some boots from its image as well.
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use sha2::{Digest as _, Sha256};
use substrate_proto::{ateapi, atelet, types};

use super::create::class_of;
use super::{CallError, Engine, Verb, lock};
use crate::model::{
    Actor, ActorUid, EventDraft, GoldenMaker, Snapshot, State, Stored as _, Template, TemplateUid,
};
use crate::store::{self, Expect, Kind, Query, StoreError, Tx};
use crate::workflow;

/// How often a worker is looked for that is not needed by others.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// How long one attempt may take.
const ATTEMPT: Duration = Duration::from_mins(20);
/// Lines of a failed workload's log that are told.
const LOG_LINES: u32 = 20;

/// What is known of one golden snapshot.
#[derive(Debug, Clone, Default)]
struct Golden {
    ready: Option<Snapshot>,
    attempts: u32,
    /// On the engine's clock.
    not_before: Duration,
    message: String,
}

/// Templates that ask for golden snapshots, and what there is of them by runtime digest.
#[derive(Debug, Default)]
pub(crate) struct Goldens(BTreeMap<TemplateUid, (Template, BTreeMap<String, Golden>)>);

/// The maker's uid; no caller can choose one that begins so.
fn maker_uid(template: &TemplateUid, runtime_digest: &str) -> ActorUid {
    let digest = Sha256::digest(format!("golden {template} {runtime_digest}"));
    ActorUid(format!("_golden-{}", hex::encode(&digest[..16])))
}

/// The kind of record that an actor's uid leads to.
fn kind_of(uid: &ActorUid) -> Kind {
    if uid.as_str().starts_with("_golden-") { Kind::Golden } else { Kind::Actor }
}

/// An actor's record, a maker's too.
pub(super) async fn load(engine: &Engine, uid: &ActorUid) -> Result<Option<Actor>, StoreError> {
    store::load_kind(&*engine.store, kind_of(uid), uid.as_str()).await
}

/// What a maker needs of a worker: its runtime.
pub(super) fn needs(actor: &Actor) -> Option<types::Compatibility> {
    let golden = actor.golden.as_ref()?;
    Some(types::Compatibility {
        sandbox_class: actor.class.clone(),
        runtime_digest: golden.runtime_digest.clone(),
        ..Default::default()
    })
}

fn maker(template: &Template, runtime_digest: &str, now: i64) -> Actor {
    let uid = maker_uid(&template.uid, runtime_digest);
    Actor {
        name: uid.as_str().trim_start_matches('_').to_owned(),
        atespace: template.atespace.clone(),
        spec: types::ActorSpec { template: template.name.clone(), ..Default::default() },
        class: class_of(&template.spec),
        pool: template.spec.worker_pool.clone(),
        ports: template.ports.clone(),
        idle: types::IdlePolicy { suspend_after: "never".to_owned(), ..Default::default() },
        golden: Some(GoldenMaker { runtime_digest: runtime_digest.to_owned() }),
        ..Actor::fresh(uid, template.uid.clone(), now)
    }
}

impl Engine {
    /// Golden snapshots that a new actor may start from.
    pub(super) fn goldens_for(&self, actor: &Actor) -> Vec<Snapshot> {
        let is_plain = actor.spec.files.is_empty() && actor.spec.env.is_empty();
        if actor.state != State::New || actor.boots_cold || actor.golden.is_some() || !is_plain {
            return Vec::new();
        }
        let goldens = lock(&self.goldens);
        let of = goldens.0.get(&actor.template_uid);
        of.into_iter().flat_map(|(_, of)| of.values()).filter_map(|golden| golden.ready.clone()).collect()
    }

    /// As a template shows them.
    pub(crate) fn golden_status(&self, template: &TemplateUid) -> Vec<ateapi::Golden> {
        let goldens = lock(&self.goldens);
        let of = goldens.0.get(template).into_iter().flat_map(|(_, of)| of);
        of.map(|(runtime_digest, golden)| ateapi::Golden {
            id: maker_uid(template, runtime_digest).0.trim_start_matches('_').to_owned(),
            runtime_digest: runtime_digest.clone(),
            state: match golden {
                Golden { ready: Some(_), .. } => "READY",
                Golden { attempts: 0, .. } => "PENDING",
                Golden { .. } => "FAILED",
            }
            .to_owned(),
            snapshot_id: golden.ready.as_ref().map_or_else(String::new, |snapshot| snapshot.id.0.clone()),
            attempts: golden.attempts,
            message: golden.message.clone(),
        })
        .collect()
    }

    /// Takes a template up that asks for golden snapshots.
    pub(super) fn want_golden(&self, template: &Template) {
        if template.spec.golden {
            lock(&self.goldens)
                .0
                .entry(template.uid.clone())
                .or_insert_with(|| (template.clone(), BTreeMap::new()));
            self.golden_wanted.notify_one();
        }
    }

    /// Gives up what was made for a template that is gone.
    pub(super) async fn forget_golden(self: &Arc<Self>, template: &TemplateUid) {
        let known = lock(&self.goldens).0.remove(template);
        for runtime_digest in known.iter().flat_map(|(_, of)| of.keys()) {
            let uid = maker_uid(template, runtime_digest);
            match self.ask(&uid, Verb::Delete, None).await {
                Ok(_) | Err(CallError::NotFound { .. }) => {}
                Err(error) => {
                    tracing::warn!(%uid, %error, "deleting a golden snapshot is left for the next start");
                }
            }
        }
    }

    pub(super) async fn run_golden(self: Arc<Self>) {
        while let Err(error) = self.recall_golden().await {
            tracing::warn!(%error, "cannot read which golden snapshots there are");
            self.pause(LOOK_AGAIN).await;
        }
        loop {
            let wanted = self.golden_wanted.notified();
            match self.make_golden().await {
                None => wanted.await,
                Some(wait) => tokio::select! {
                    biased;
                    () = wanted => {}
                    () = self.pause(wait) => {}
                },
            }
        }
    }

    /// After a start: which templates ask, and what there is.
    async fn recall_golden(self: &Arc<Self>) -> Result<(), StoreError> {
        let mut query = Query::all(Kind::Template);
        query.states = vec![1];
        for template in store::list_all::<Template>(&*self.store, query).await? {
            self.want_golden(&template);
        }
        for maker in store::list_all::<Actor>(&*self.store, Query::all(Kind::Golden)).await? {
            let is_wanted = lock(&self.goldens).0.contains_key(&maker.template_uid);
            if !is_wanted {
                // Its template went just before a stop.
                self.ask_quietly(&maker.uid, Verb::Delete);
                continue;
            }
            self.know(&maker, |golden| golden.ready = ready(&maker));
        }
        Ok(())
    }

    fn know(&self, maker: &Actor, change: impl FnOnce(&mut Golden)) {
        let Some(runtime) = maker.golden.as_ref().map(|it| it.runtime_digest.clone()) else { return };
        if let Some((_, of)) = lock(&self.goldens).0.get_mut(&maker.template_uid) {
            change(of.entry(runtime).or_default());
        }
    }

    /// Makes what can be made now. When to look again, if anything is wanted.
    async fn make_golden(self: &Arc<Self>) -> Option<Duration> {
        let mut wait: Option<Duration> = None;
        let mut later = |time: Duration| wait = Some(wait.map_or(time, |least| least.min(time)));
        let templates: Vec<Template> =
            lock(&self.goldens).0.values().map(|(template, _)| template.clone()).collect();
        for template in templates {
            let class = class_of(&template.spec);
            let runtimes = lock(&self.pool).runtimes(&template.spec.worker_pool, &class);
            // New runtimes and first workers are found by looking.
            later(Duration::from_secs(30));
            for (runtime, all, free) in runtimes {
                let known = {
                    let mut goldens = lock(&self.goldens);
                    let Some((_, of)) = goldens.0.get_mut(&template.uid) else { break };
                    of.entry(runtime.clone()).or_default().clone()
                };
                let now = self.clock.now();
                if known.ready.is_some() {
                    continue;
                }
                if known.not_before > now {
                    later(known.not_before.saturating_sub(now));
                    continue;
                }
                // The last free worker is for those who wait; one that a maker has already is to be freed.
                let spare = free > usize::from(all > 1);
                if !spare && !self.holds_worker(&maker_uid(&template.uid, &runtime)).await {
                    later(LOOK_AGAIN);
                    continue;
                }
                self.attempt(&template, &runtime).await;
                later(LOOK_AGAIN);
            }
        }
        wait
    }

    async fn holds_worker(&self, maker: &ActorUid) -> bool {
        let known = store::load_kind::<Actor>(&*self.store, Kind::Golden, maker.as_str()).await;
        known.ok().flatten().is_some_and(|maker| maker.placement.is_some())
    }

    async fn attempt(self: &Arc<Self>, template: &Template, runtime: &str) {
        let new = maker(template, runtime, self.clock.wall_ms());
        let made = self.clock.now() + ATTEMPT;
        let outcome = tokio::select! {
            biased;
            outcome = self.boot_and_capture(&new) => outcome,
            () = self.clock.sleep_until(made) => {
                Err(CallError::Failed {
                    actor: new.name.clone(),
                    state: State::Resuming,
                    reason: "GOLDEN_TIMEOUT".to_owned(),
                    message: format!("it was not ready and captured within {} min", ATTEMPT.as_secs() / 60),
                    snapshot: None,
                })
            }
        };
        match outcome {
            Ok(maker) => {
                tracing::info!(template = template.name, runtime, "a golden snapshot is ready");
                self.know(&maker, |golden| {
                    *golden = Golden { ready: ready(&maker), ..Golden::default() };
                });
                self.tell_golden(template, "GoldenReady", "new actors start from it".to_owned(), false).await;
            }
            Err(error) => {
                let log = self.log_of(&new.uid).await;
                let message =
                    if log.is_empty() { error.to_string() } else { format!("{error}; log:\n{log}") };
                let now = self.clock.now();
                self.know(&new, |golden| {
                    golden.attempts += 1;
                    golden.not_before =
                        now + Duration::from_millis(workflow::backoff_ms(golden.attempts + 2) as u64);
                    golden.message.clone_from(&message);
                });
                self.tell_golden(template, "GoldenFailed", message, true).await;
            }
        }
    }

    /// The maker after its snapshot is durable.
    async fn boot_and_capture(self: &Arc<Self>, new: &Actor) -> Result<Actor, CallError> {
        let suspend = Verb::Suspend { by: "golden".to_owned(), only_if_idle: false, drain_ms: 0 };
        let find = async || store::load_kind::<Actor>(&*self.store, Kind::Golden, new.uid.as_str()).await;
        let maker = if let Some(maker) = find().await? {
            maker
        } else {
            self.store.commit(Tx { puts: vec![(new.object(), Expect::Absent)], ..Tx::default() }).await?;
            new.clone()
        };
        // An earlier attempt, or an earlier start of this process, may have come some way.
        let end = match maker.state {
            State::Suspended | State::Suspending if maker.last_snapshot().is_some() => Verb::Promote,
            State::Running => suspend,
            State::Exited | State::Crashed => {
                self.ask(&new.uid, Verb::Reset, None).await?;
                suspend
            }
            _ => {
                self.ask(&new.uid, Verb::Resume { cause: "golden".to_owned() }, None).await?;
                suspend
            }
        };
        let answer = self.ask(&new.uid, end, None).await?;
        match ready(&answer.actor) {
            Some(_) => Ok(answer.actor),
            None => Err(CallError::Failed {
                actor: new.name.clone(),
                state: answer.actor.state,
                reason: answer.actor.reason,
                message: "its snapshot is not durable".to_owned(),
                snapshot: answer.actor.last,
            }),
        }
    }

    /// The end of what a maker's workload wrote, from wherever it ran last.
    async fn log_of(&self, uid: &ActorUid) -> String {
        let maker = store::load_kind::<Actor>(&*self.store, Kind::Golden, uid.as_str()).await;
        let nodes = maker.ok().flatten().map(|maker| maker.nodes).unwrap_or_default();
        let mut text = Vec::new();
        for node in nodes.iter().rev().filter_map(|name| self.node(name)).filter(|node| node.is_up()) {
            let request =
                atelet::LogsRequest { actor_uid: uid.0.clone(), tail: LOG_LINES, ..Default::default() };
            match node.client.logs(request).await {
                Ok(mut chunks) => {
                    while let Some(Ok(chunk)) = chunks.next().await {
                        text.extend(chunk.data);
                    }
                }
                Err(status) => tracing::debug!(%uid, node = %node.name, %status, "no log of a golden boot"),
            }
            if !text.is_empty() {
                break;
            }
        }
        let from = text.len().saturating_sub(4_096);
        String::from_utf8_lossy(&text[from..]).trim_end().to_owned()
    }

    async fn tell_golden(&self, template: &Template, reason: &str, message: String, warning: bool) {
        let event = EventDraft {
            kind: "template".to_owned(),
            atespace: template.atespace.clone(),
            subject: template.name.clone(),
            subject_uid: template.uid.0.clone(),
            reason: reason.to_owned(),
            message,
            warning,
            metadata: BTreeMap::new(),
            time_ms: self.clock.wall_ms(),
        };
        if let Err(error) = self.store.commit(Tx { events: vec![event], ..Tx::default() }).await {
            tracing::warn!(%error, "recording an event of a golden snapshot failed");
        }
    }
}

/// What a maker made, once nothing of it runs any more.
fn ready(maker: &Actor) -> Option<Snapshot> {
    maker.last_snapshot().filter(|it| maker.state == State::Suspended && it.is_durable()).cloned()
}

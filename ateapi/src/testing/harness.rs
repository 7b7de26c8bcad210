// SPDX-License-Identifier: Apache-2.0
//! An engine over stub nodes and the store in memory, that can be crashed and started again.
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use substrate_proto::types;

use super::stub::{Blobs, Stub, StubNode};
use crate::engine::{Answer, CallError, Engine, Settings, Verb};
use crate::model::{Actor, ActorUid, EventDraft, NodeName, State};
use crate::node::SharedNode;
use crate::secrets::Sealer;
use crate::store::{self, EventQuery, MemoryStore, SharedStore, Store as _};
use crate::workflow::{FaultPoint, Faults, Injected};
use crate::{Clock, TokioClock};

/// One fault, at the n-th time a point is reached.
#[derive(Default)]
pub struct OneFault {
    plan: Mutex<Option<(FaultPoint, usize, Injected)>>,
}

impl OneFault {
    pub fn set(&self, point: FaultPoint, nth: usize, what: Injected) {
        *self.plan.lock().unwrap() = Some((point, nth, what));
    }

    pub fn clear(&self) {
        *self.plan.lock().unwrap() = None;
    }

    /// Whether the planned fault has happened.
    pub fn is_spent(&self) -> bool {
        self.plan.lock().unwrap().is_none()
    }
}

impl Faults for OneFault {
    fn hit(&self, point: FaultPoint) -> Injected {
        let mut plan = self.plan.lock().unwrap();
        match plan.take() {
            Some((at, 0, what)) if at == point => what,
            Some((at, nth, what)) => {
                *plan = Some((at, if at == point { nth - 1 } else { nth }, what));
                Injected::Nothing
            }
            None => Injected::Nothing,
        }
    }
}

pub struct Harness {
    pub engine: Arc<Engine>,
    pub store: Arc<MemoryStore>,
    pub nodes: Vec<Arc<StubNode>>,
    pub blobs: Arc<Blobs>,
    pub clock: Arc<dyn Clock>,
    pub faults: Arc<OneFault>,
    pub settings: Settings,
}

pub fn settings() -> Settings {
    Settings {
        lease_term: Duration::from_secs(30),
        lease_margin: Duration::from_secs(5),
        idle_suspend_after: Some(Duration::from_mins(1)),
        evict_after: Some(Duration::from_secs(5)),
        place_wait: Duration::from_secs(2),
        changelog_keep: 100_000,
        events_keep: 10_000,
        calls_per_actor: 64,
    }
}

impl Harness {
    /// Nodes n0, n1, … with that many workers each.
    pub async fn new(workers: &[usize]) -> Self {
        let clock: Arc<dyn Clock> = Arc::new(TokioClock::new(1_000_000));
        let blobs = Arc::new(Blobs::default());
        let nodes: Vec<_> = workers
            .iter()
            .enumerate()
            .map(|(i, count)| StubNode::new(&format!("n{i}"), *count, Arc::clone(&blobs), Arc::clone(&clock)))
            .collect();
        let store = Arc::new(MemoryStore::new());
        let faults = Arc::new(OneFault::default());
        let engine = start(&store, &clock, &nodes, &faults, settings()).await;
        let harness = Self { engine, store, nodes, blobs, clock, faults, settings: settings() };
        harness.engine.create_atespace("space", BTreeMap::new()).await.unwrap();
        harness.template("t", |_| {}).await;
        harness
    }

    pub async fn template(&self, name: &str, change: impl FnOnce(&mut types::TemplateSpec)) {
        let mut spec = types::TemplateSpec {
            containers: vec![types::Container {
                name: "main".into(),
                image: "oci:/images/counter".into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        change(&mut spec);
        // The node may just be connecting.
        let mut tries = 0;
        while let Err(error) = self.engine.create_template("space", name, &spec, BTreeMap::new(), false).await
        {
            tries += 1;
            assert!(tries < 100, "{error}");
            self.clock.sleep_until(self.clock.now() + Duration::from_millis(50)).await;
        }
    }

    pub async fn create_from(&self, template: &str, name: &str) -> ActorUid {
        let spec = types::ActorSpec { template: template.into(), ..Default::default() };
        // A uid that is not drawn, so that a simulation replays.
        let uid = Some(format!("uid-{name}").into());
        self.engine.create_actor("space", name, spec, uid, false, None).await.unwrap().uid
    }

    pub async fn create(&self, name: &str) -> ActorUid {
        self.create_from("t", name).await
    }

    pub async fn running(&self, name: &str) -> ActorUid {
        let uid = self.create(name).await;
        self.resume(&uid).await.unwrap();
        uid
    }

    pub async fn ask(&self, uid: &ActorUid, verb: Verb) -> Result<Answer, CallError> {
        self.engine.ask(uid, verb, None).await
    }

    pub async fn resume(&self, uid: &ActorUid) -> Result<Answer, CallError> {
        self.ask(uid, Verb::Resume { cause: "user".into() }).await
    }

    pub async fn suspend(&self, uid: &ActorUid) -> Result<Answer, CallError> {
        self.ask(uid, Verb::Suspend { by: "user".into(), only_if_idle: false, drain_ms: 0 }).await
    }

    pub async fn pause(&self, uid: &ActorUid) -> Result<Answer, CallError> {
        self.ask(
            uid,
            Verb::Pause { by: "user".into(), only_if_idle: false, drain_ms: 0, promote_after: None },
        )
        .await
    }

    pub async fn checkpoint(&self, uid: &ActorUid, durable: bool) -> Result<Answer, CallError> {
        self.ask(uid, Verb::Checkpoint { durable, generation: 0, max_heap: 0 }).await
    }

    pub async fn delete(&self, uid: &ActorUid) -> Result<Answer, CallError> {
        self.ask(uid, Verb::Delete).await
    }

    pub async fn actor(&self, uid: &ActorUid) -> Actor {
        self.find(uid).await.expect("the actor exists")
    }

    pub async fn find(&self, uid: &ActorUid) -> Option<Actor> {
        store::load(&*self.store, uid.as_str()).await.unwrap()
    }

    /// Waits for the commit that brings an actor there.
    pub async fn until(&self, uid: &ActorUid, wanted: impl Fn(&Actor) -> bool) -> Actor {
        let mut revisions = self.store.revisions();
        let waiting = async {
            loop {
                let actor = self.actor(uid).await;
                if wanted(&actor) {
                    return actor;
                }
                revisions.changed().await.unwrap();
            }
        };
        match tokio::time::timeout(Duration::from_mins(10), waiting).await {
            Ok(actor) => actor,
            Err(tokio::time::error::Elapsed { .. }) => {
                panic!("never came there: {:#?}", self.actor(uid).await)
            }
        }
    }

    pub async fn until_state(&self, uid: &ActorUid, state: State) -> Actor {
        self.until(uid, |actor| actor.state == state).await
    }

    pub async fn events(&self, reason: &str) -> Vec<EventDraft> {
        let query = EventQuery { reason: Some(reason.into()), limit: 1_000, ..EventQuery::default() };
        self.store.events(&query).await.unwrap().into_iter().map(|(_, event)| event).collect()
    }

    /// The node that runs the actor.
    pub fn host(&self, uid: &ActorUid) -> &Arc<StubNode> {
        self.nodes.iter().find(|node| node.copy_of(uid.as_str()).is_some()).expect("the actor runs")
    }

    pub fn copies(&self, uid: &ActorUid) -> usize {
        self.nodes.iter().filter(|node| node.copy_of(uid.as_str()).is_some()).count()
    }

    /// Starts anew over what was committed, as after a crash or a stop.
    pub async fn restart(&mut self) {
        self.engine.kill();
        self.engine.stop().await;
        self.engine = start(&self.store, &self.clock, &self.nodes, &self.faults, self.settings).await;
    }
}

async fn start(
    store: &Arc<MemoryStore>,
    clock: &Arc<dyn Clock>,
    nodes: &[Arc<StubNode>],
    faults: &Arc<OneFault>,
    settings: Settings,
) -> Arc<Engine> {
    let clients = nodes
        .iter()
        .map(|node| (NodeName(node.name.clone()), Arc::new(Stub(Arc::clone(node))) as SharedNode))
        .collect();
    let shared: SharedStore = Arc::clone(store) as SharedStore;
    let faults = Arc::clone(faults) as Arc<dyn Faults>;
    Engine::start(shared, Arc::clone(clock), Sealer::with_key([7; 32]), settings, clients, faults)
        .await
        .unwrap()
}

// SPDX-License-Identifier: Apache-2.0
//! What commands print of the control plane's messages: one struct a kind, the same for JSON and YAML, and a table row.
//!
//! The JSON form is stable: keys are camelCase and only ever added; times are RFC 3339 (`…At`, `…Since`), durations are
//! milliseconds (`…Ms`), sizes are bytes (`…Bytes`), states are UPPER_CASE words.
use std::collections::BTreeMap;

use serde::Serialize;
use substrate_proto::ateapi as api;
use substrate_proto::types;

use crate::quantity::bytes;
use crate::table::Table;
use crate::time::{age, when};

/// How the rows of a table are to be made.
#[derive(Debug, Clone, Copy)]
pub struct Columns {
    /// More of them.
    pub wide: bool,
    /// With the atespace in front.
    pub atespace: bool,
    /// What ages are counted from, unix ms.
    pub now_ms: i64,
}

/// What can be listed.
pub trait View: Serialize {
    /// Header of its table.
    fn header(columns: Columns) -> Vec<&'static str>;
    /// Its row.
    fn row(&self, columns: Columns) -> Vec<String>;
    /// What `-o name` prints.
    fn name(&self) -> String;

    /// A table of many.
    fn table(items: &[Self], columns: Columns) -> Table
    where
        Self: Sized,
    {
        let mut table = Table::new(&Self::header(columns));
        for item in items {
            table.row(item.row(columns));
        }
        table
    }
}

/// The word of an actor's state.
pub fn state_word(state: i32) -> &'static str {
    match api::ActorState::try_from(state) {
        Ok(api::ActorState::Unspecified) | Err(_) => "UNKNOWN",
        Ok(state) => state.as_str_name(),
    }
}

fn durability_word(durability: i32) -> &'static str {
    match types::Durability::try_from(durability) {
        Ok(types::Durability::Durable) => "durable",
        Ok(types::Durability::Node) => "node",
        _ => "unknown",
    }
}

/// An actor.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Actor {
    /// Its id, which outlives every machine it runs on.
    pub uid: String,
    /// Where it lives.
    pub atespace: String,
    /// Unique in its atespace.
    pub name: String,
    /// State of the design's table.
    pub state: &'static str,
    /// Why it is in this state.
    pub reason: String,
    /// The same in words.
    pub message: String,
    /// Number of its assignment.
    pub generation: u64,
    /// Its worker while it holds one.
    pub worker: Option<String>,
    /// Its node while it holds one.
    pub node: Option<String>,
    /// Its template.
    pub template: String,
    /// `gvisor` or `microvm`.
    pub sandbox_class: String,
    /// When it was created.
    pub created_at: Option<String>,
    /// Since when it is in this state.
    pub state_since: Option<String>,
    /// Its latest snapshot.
    pub last_snapshot: Option<Snapshot>,
    /// How its workload ended.
    pub exit: Option<ExitView>,
    /// Who asked for its present sleep.
    pub suspended_by: Option<String>,
    /// Progress of a boot.
    pub progress: Option<Progress>,
    /// Memory it costs now.
    pub memory_bytes: u64,
    /// Disk it costs now.
    pub disk_bytes: u64,
    /// Its TCP ports.
    pub ports: Vec<u32>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// Whether a request wakes it.
    pub wake_on_traffic: bool,
    /// Revision of the store at its last change.
    pub revision: u64,
    #[serde(skip)]
    created_ms: i64,
}

/// How a workload ended.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ExitView {
    /// Which container.
    pub container: String,
    /// 0..255, or 128 + signal.
    pub code: i32,
    /// 0 when it exited by itself.
    pub signal: i32,
    /// When.
    pub at: Option<String>,
}

/// Progress of a boot.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// What is being done.
    pub step: String,
    /// 0..100.
    pub percent: u32,
}

fn some(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

impl From<api::Actor> for Actor {
    fn from(actor: api::Actor) -> Self {
        let spec = actor.spec.unwrap_or_default();
        Self {
            uid: actor.uid,
            atespace: actor.atespace,
            name: actor.name,
            state: state_word(actor.state),
            reason: actor.reason,
            message: actor.message,
            generation: actor.generation,
            worker: some(actor.worker_id),
            node: some(actor.node),
            template: spec.template,
            sandbox_class: actor.sandbox_class,
            created_at: when(actor.created_ms),
            state_since: when(actor.state_since_ms),
            last_snapshot: actor.last_snapshot.filter(|snapshot| !snapshot.id.is_empty()).map(Snapshot::from),
            exit: actor.exit.map(|exit| ExitView {
                container: exit.container,
                code: exit.code,
                signal: exit.signal,
                at: when(exit.time_ms),
            }),
            suspended_by: some(actor.suspended_by),
            progress: some(actor.progress_step)
                .map(|step| Progress { step, percent: actor.progress_percent.min(100) }),
            memory_bytes: actor.memory_bytes,
            disk_bytes: actor.disk_bytes,
            ports: actor.ports,
            labels: spec.labels,
            annotations: spec.annotations,
            wake_on_traffic: actor.wake_on_traffic,
            revision: actor.revision,
            created_ms: actor.created_ms,
        }
    }
}

impl Actor {
    /// Its state with what a person wants to know at a glance: progress, exit code.
    pub fn state_text(&self) -> String {
        match (&self.progress, &self.exit) {
            (Some(progress), _) if matches!(self.state, "NEW" | "RESUMING") && progress.percent > 0 => {
                format!("{} {}%", self.state, progress.percent)
            }
            (_, Some(exit)) if self.state == "EXITED" => format!("EXITED ({})", exit.code),
            _ => self.state.to_owned(),
        }
    }
}

impl View for Actor {
    fn header(columns: Columns) -> Vec<&'static str> {
        let mut header = vec!["NAME", "STATE", "AGE", "WORKER", "SNAPSHOT", "MEMORY", "DISK"];
        if columns.atespace {
            header.insert(0, "ATESPACE");
        }
        if columns.wide {
            header.extend(["TEMPLATE", "CLASS", "GENERATION", "NODE", "REASON", "UID"]);
        }
        header
    }

    fn row(&self, columns: Columns) -> Vec<String> {
        let snapshot = self.last_snapshot.as_ref().map_or_else(String::new, |snapshot| {
            format!("{} {}", age(snapshot.time_ms, columns.now_ms), snapshot.durability)
        });
        let mut row = vec![
            self.name.clone(),
            self.state_text(),
            age(self.created_ms, columns.now_ms),
            self.worker.clone().unwrap_or_default(),
            snapshot,
            bytes(self.memory_bytes),
            bytes(self.disk_bytes),
        ];
        if columns.atespace {
            row.insert(0, self.atespace.clone());
        }
        if columns.wide {
            row.extend([
                self.template.clone(),
                self.sandbox_class.clone(),
                self.generation.to_string(),
                self.node.clone().unwrap_or_default(),
                self.reason.clone(),
                self.uid.clone(),
            ]);
        }
        row
    }

    fn name(&self) -> String {
        format!("actor/{}", self.name)
    }
}

/// A committed snapshot.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Snapshot {
    /// Its id.
    pub id: String,
    /// Whose it is.
    pub actor: String,
    /// Whose it is.
    pub actor_uid: String,
    /// Where the actor lives.
    pub atespace: String,
    /// Of which assignment.
    pub generation: u64,
    /// `durable` or `node`.
    pub durability: &'static str,
    /// When the memory was captured.
    pub captured_at: Option<String>,
    /// Size of its files.
    pub size_bytes: u64,
    /// Newly written to the store.
    pub stored_bytes: u64,
    /// Names given to it.
    pub tags: Vec<String>,
    /// Node that holds a copy.
    pub node: Option<String>,
    /// Why it was made.
    pub cause: String,
    /// Digest of its manifest.
    pub manifest_digest: Option<String>,
    /// sha256 of the runtime that made it.
    pub runtime_digest: String,
    #[serde(skip)]
    pub(crate) time_ms: i64,
}

impl From<api::Snapshot> for Snapshot {
    fn from(snapshot: api::Snapshot) -> Self {
        Self {
            id: snapshot.id,
            actor: snapshot.actor_name,
            actor_uid: snapshot.actor_uid,
            atespace: snapshot.atespace,
            generation: snapshot.generation,
            durability: durability_word(snapshot.durability),
            captured_at: when(snapshot.time_ms),
            size_bytes: snapshot.bytes,
            stored_bytes: snapshot.stored_bytes,
            tags: snapshot.tags,
            node: some(snapshot.node),
            cause: snapshot.cause,
            manifest_digest: some(snapshot.manifest_digest),
            runtime_digest: snapshot.runtime_digest,
            time_ms: snapshot.time_ms,
        }
    }
}

impl View for Snapshot {
    fn header(columns: Columns) -> Vec<&'static str> {
        let mut header = vec!["ID", "ACTOR", "AGE", "DURABILITY", "CAUSE", "SIZE", "STORED", "TAGS"];
        if columns.atespace {
            header.insert(0, "ATESPACE");
        }
        if columns.wide {
            header.extend(["GENERATION", "NODE", "RUNTIME"]);
        }
        header
    }

    fn row(&self, columns: Columns) -> Vec<String> {
        let mut row = vec![
            self.id.clone(),
            if self.actor.is_empty() { self.actor_uid.clone() } else { self.actor.clone() },
            age(self.time_ms, columns.now_ms),
            self.durability.to_owned(),
            self.cause.clone(),
            bytes(self.size_bytes),
            bytes(self.stored_bytes),
            self.tags.join(","),
        ];
        if columns.atespace {
            row.insert(0, self.atespace.clone());
        }
        if columns.wide {
            row.extend([
                self.generation.to_string(),
                self.node.clone().unwrap_or_default(),
                short_digest(&self.runtime_digest),
            ]);
        }
        row
    }

    fn name(&self) -> String {
        format!("snapshot/{}", self.id)
    }
}

/// The first 12 digits of a digest.
pub fn short_digest(digest: &str) -> String {
    digest.trim_start_matches("sha256:").chars().take(12).collect()
}

/// A worker.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Worker {
    /// Its id.
    pub id: String,
    /// Its node.
    pub node: String,
    /// Its pool.
    pub pool: String,
    /// `gvisor` or `microvm`.
    pub sandbox_class: String,
    /// FREE, ASSIGNED, CORDONED or LOST.
    pub state: &'static str,
    /// What its slot does.
    pub phase: String,
    /// Whether new actors are kept off it.
    pub cordoned: bool,
    /// Whether its process lives.
    pub alive: bool,
    /// The actor on it.
    pub actor: Option<String>,
    /// Where that actor lives.
    pub atespace: Option<String>,
    /// Assignment of that actor.
    pub generation: u64,
    /// Memory in use.
    pub memory_bytes: u64,
    /// Processes in its cgroup.
    pub processes: u32,
    /// Process of its slot.
    pub pid: u32,
    /// sha256 of its runtime.
    pub runtime_digest: String,
    /// Version of its runtime.
    pub runtime_version: String,
    /// Revision of the store at its last change.
    pub revision: u64,
}

impl From<api::Worker> for Worker {
    fn from(worker: api::Worker) -> Self {
        let state = match (worker.alive, worker.actor_uid.is_empty(), worker.cordoned) {
            (false, _, _) => "LOST",
            (true, false, _) => "ASSIGNED",
            (true, true, true) => "CORDONED",
            (true, true, false) => "FREE",
        };
        Self {
            id: worker.id,
            node: worker.node,
            pool: worker.pool,
            sandbox_class: worker.sandbox_class,
            state,
            phase: worker.phase,
            cordoned: worker.cordoned,
            alive: worker.alive,
            actor: some(worker.actor_name),
            atespace: some(worker.atespace),
            generation: worker.generation,
            memory_bytes: worker.memory_bytes,
            processes: worker.processes,
            pid: worker.pid,
            runtime_digest: worker.runtime_digest,
            runtime_version: worker.runtime_version,
            revision: worker.revision,
        }
    }
}

impl View for Worker {
    fn header(columns: Columns) -> Vec<&'static str> {
        let mut header = vec!["ID", "STATE", "ACTOR", "PHASE", "CORDONED", "MEMORY", "PROCESSES"];
        if columns.wide {
            header.extend(["NODE", "POOL", "CLASS", "GENERATION", "PID", "RUNTIME"]);
        }
        header
    }

    fn row(&self, columns: Columns) -> Vec<String> {
        let actor = match (&self.atespace, &self.actor) {
            (Some(atespace), Some(actor)) => format!("{atespace}/{actor}"),
            (None, Some(actor)) => actor.clone(),
            _ => String::new(),
        };
        let mut row = vec![
            self.id.clone(),
            self.state.to_owned(),
            actor,
            self.phase.clone(),
            if self.cordoned { "yes" } else { "no" }.to_owned(),
            bytes(self.memory_bytes),
            self.processes.to_string(),
        ];
        if columns.wide {
            row.extend([
                self.node.clone(),
                self.pool.clone(),
                self.sandbox_class.clone(),
                self.generation.to_string(),
                self.pid.to_string(),
                format!("{} {}", self.runtime_version, short_digest(&self.runtime_digest)).trim().to_owned(),
            ]);
        }
        row
    }

    fn name(&self) -> String {
        format!("worker/{}", self.id)
    }
}

/// An actor template.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Template {
    /// Its id.
    pub uid: String,
    /// Where it lives.
    pub atespace: String,
    /// Unique in its atespace.
    pub name: String,
    /// What actors are made from; images pinned by digest.
    pub spec: types::TemplateSpec,
    /// sha256 of the spec's canonical form.
    pub spec_digest: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// When it was created.
    pub created_at: Option<String>,
    /// Revision of the store at its last change.
    pub revision: u64,
    #[serde(skip)]
    created_ms: i64,
}

impl From<api::Template> for Template {
    fn from(template: api::Template) -> Self {
        Self {
            uid: template.uid,
            atespace: template.atespace,
            name: template.name,
            spec: template.spec.unwrap_or_default(),
            spec_digest: template.spec_digest,
            labels: template.labels,
            created_at: when(template.created_ms),
            revision: template.revision,
            created_ms: template.created_ms,
        }
    }
}

impl Template {
    /// `gvisor` where the spec leaves it to the default.
    pub fn class(&self) -> &str {
        if self.spec.sandbox_class.is_empty() { "gvisor" } else { &self.spec.sandbox_class }
    }
}

impl View for Template {
    fn header(columns: Columns) -> Vec<&'static str> {
        let mut header = vec!["NAME", "CLASS", "CONTAINERS", "IMAGE", "AGE"];
        if columns.atespace {
            header.insert(0, "ATESPACE");
        }
        if columns.wide {
            header.extend(["CPU", "MEMORY-LIMIT", "CHECKPOINT", "DIGEST", "UID"]);
        }
        header
    }

    fn row(&self, columns: Columns) -> Vec<String> {
        let image = self.spec.containers.first().map_or_else(String::new, |main| short_image(&main.image));
        let mut row = vec![
            self.name.clone(),
            self.class().to_owned(),
            self.spec.containers.len().to_string(),
            image,
            age(self.created_ms, columns.now_ms),
        ];
        if columns.atespace {
            row.insert(0, self.atespace.clone());
        }
        if columns.wide {
            let resources = self.spec.resources.clone().unwrap_or_default();
            let checkpoint = self.spec.checkpoint.clone().unwrap_or_default();
            row.extend([
                resources.cpu,
                resources.memory,
                checkpoint.on_reply,
                short_digest(&self.spec_digest),
                self.uid.clone(),
            ]);
        }
        row
    }

    fn name(&self) -> String {
        format!("template/{}", self.name)
    }
}

/// An image reference whose digest is shortened.
pub fn short_image(image: &str) -> String {
    match image.split_once("@sha256:") {
        Some((name, digest)) => format!("{name}@{}", short_digest(digest)),
        None => image.to_owned(),
    }
}

/// An atespace.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Atespace {
    /// Its name.
    pub name: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// When it was created.
    pub created_at: Option<String>,
    /// Revision of the store at its last change.
    pub revision: u64,
    #[serde(skip)]
    created_ms: i64,
}

impl From<api::Atespace> for Atespace {
    fn from(atespace: api::Atespace) -> Self {
        Self {
            name: atespace.name,
            labels: atespace.labels,
            created_at: when(atespace.created_ms),
            revision: atespace.revision,
            created_ms: atespace.created_ms,
        }
    }
}

impl View for Atespace {
    fn header(_: Columns) -> Vec<&'static str> {
        vec!["NAME", "LABELS", "AGE"]
    }

    fn row(&self, columns: Columns) -> Vec<String> {
        vec![self.name.clone(), pairs(&self.labels), age(self.created_ms, columns.now_ms)]
    }

    fn name(&self) -> String {
        format!("atespace/{}", self.name)
    }
}

/// `a=1,b=2`.
pub fn pairs(map: &BTreeMap<String, String>) -> String {
    map.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
}

/// Something that happened.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Event {
    /// When.
    pub at: Option<String>,
    /// `Normal` or `Warning`.
    #[serde(rename = "type")]
    pub kind_of: &'static str,
    /// In CamelCase.
    pub reason: String,
    /// Kind of its subject.
    pub kind: String,
    /// Where its subject lives.
    pub atespace: String,
    /// Name of its subject.
    pub subject: String,
    /// Uid of its subject.
    pub subject_uid: String,
    /// In words.
    pub message: String,
    /// More, for programs.
    pub metadata: BTreeMap<String, String>,
    /// Revision of the store.
    pub revision: u64,
    #[serde(skip)]
    time_ms: i64,
}

impl From<api::Event> for Event {
    fn from(event: api::Event) -> Self {
        Self {
            at: when(event.time_ms),
            kind_of: if event.warning { "Warning" } else { "Normal" },
            reason: event.reason,
            kind: event.kind,
            atespace: event.atespace,
            subject: event.subject,
            subject_uid: event.subject_uid,
            message: event.message,
            metadata: event.metadata,
            revision: event.revision,
            time_ms: event.time_ms,
        }
    }
}

impl View for Event {
    fn header(columns: Columns) -> Vec<&'static str> {
        let mut header = vec!["AGE", "TYPE", "REASON", "SUBJECT", "MESSAGE"];
        if columns.wide {
            header[0] = "TIME";
        }
        if columns.atespace {
            header.insert(1, "ATESPACE");
        }
        header
    }

    fn row(&self, columns: Columns) -> Vec<String> {
        let time = if columns.wide {
            self.at.clone().unwrap_or_default()
        } else {
            age(self.time_ms, columns.now_ms)
        };
        let mut row = vec![
            time,
            self.kind_of.to_owned(),
            self.reason.clone(),
            format!("{}/{}", self.kind, self.subject),
            self.message.clone(),
        ];
        if columns.atespace {
            row.insert(1, self.atespace.clone());
        }
        row
    }

    fn name(&self) -> String {
        format!("event/{}", self.revision)
    }
}

#[cfg(test)]
#[path = "view_tests.rs"]
mod tests;

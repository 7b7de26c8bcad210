// SPDX-License-Identifier: Apache-2.0
//! Watch: every committed change once, in order of revision.
//!
//! A watcher is a cursor into the changelog and nothing else: it reads what follows its revision whenever the store
//! says that there is more. A slow watcher holds no memory but its own page; one that falls behind the changelog's
//! floor is told so. A watch from revision 0 first sends every record that is there, page by page, then a bookmark,
//! then the changes since it began; a change that a page already showed is not shown again.
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use substrate_proto::ateapi;
use substrate_proto::ateapi::watch_response::Change as Shown;
use tokio::sync::mpsc;
use tonic::Status;

use super::convert;
use crate::engine::{CallError, Engine};
use crate::model::{Actor, Atespace, EventDraft, SnapshotNote, Template, WorkerRecord};
use crate::store::{self, Change, Kind, Object, Query, StoreError};

/// Changes read at once.
const PAGE: usize = 256;
/// A bookmark is sent after this much silence, so that a client sees that the watch lives.
const BOOKMARK_EVERY: Duration = Duration::from_secs(15);

pub(super) type Sender = mpsc::Sender<Result<ateapi::WatchResponse, Status>>;

/// The kinds a request may name.
pub(super) fn kinds(names: &[String]) -> Result<Vec<Kind>, crate::model::Invalid> {
    let known = [Kind::Actor, Kind::Template, Kind::Worker, Kind::Snapshot, Kind::Event, Kind::Atespace];
    if names.is_empty() {
        return Ok(known.to_vec());
    }
    names
        .iter()
        .enumerate()
        .map(|(index, name)| {
            known.into_iter().find(|kind| kind.as_str() == name).ok_or_else(|| crate::model::Invalid {
                field: format!("kinds[{index}]"),
                message: format!(
                    "{name:?} is none of \"actor\", \"template\", \"worker\", \"snapshot\", \"event\", \"atespace\""
                ),
            })
        })
        .collect()
}

pub(super) struct Watcher {
    pub(super) engine: Arc<Engine>,
    pub(super) kinds: Vec<Kind>,
    pub(super) atespace: String,
    pub(super) from: u64,
}

/// The client has gone, or was told why the watch ends.
struct Ended;

impl Watcher {
    /// Serves one watch until its client goes.
    pub(super) async fn run(self, to: Sender) {
        let mut revisions = self.engine.store.revisions();
        let latest = *revisions.borrow();
        if self.from > latest {
            let unknown = StoreError::Unknown { asked: self.from, latest };
            let _ = to.send(Err(CallError::from(unknown).into())).await;
            return;
        }
        let (mut cursor, mut shown) = if self.from == 0 {
            let began = *revisions.borrow();
            match self.initial(&to, began).await {
                Ok(shown) => (began, shown),
                Err(Ended) => return,
            }
        } else {
            (self.from, HashMap::new())
        };
        loop {
            let latest = *revisions.borrow_and_update();
            if cursor < latest {
                match self.catch_up(&to, &mut cursor, &mut shown).await {
                    Ok(()) => {}
                    Err(Ended) => return,
                }
            }
            tokio::select! {
                changed = revisions.changed() => {
                    if changed.is_err() {
                        let _ = to.send(Err(CallError::Stopping.into())).await;
                        return;
                    }
                }
                () = self.engine.pause(BOOKMARK_EVERY) => {
                    let bookmark = Shown::Bookmark(ateapi::Bookmark { initial_done: false });
                    if self.send(&to, cursor, bookmark).await.is_err() {
                        return;
                    }
                }
                () = self.engine.dead.cancelled() => {
                    let _ = to.try_send(Err(CallError::Stopping.into()));
                    return;
                }
                () = to.closed() => return,
            }
        }
    }

    async fn send(&self, to: &Sender, revision: u64, change: Shown) -> Result<(), Ended> {
        let response = ateapi::WatchResponse { revision, change: Some(change) };
        to.send(Ok(response)).await.map_err(|_| Ended)
    }

    async fn fail(&self, to: &Sender, error: StoreError) -> Ended {
        let _ = to.send(Err(CallError::from(error).into())).await;
        Ended
    }

    /// Everything that is there. Returns the rows that were newer than `began`: their changes follow in the changelog.
    async fn initial(&self, to: &Sender, began: u64) -> Result<HashMap<(Kind, String), u64>, Ended> {
        let mut newer = HashMap::new();
        let wants_snapshots = self.kinds.contains(&Kind::Snapshot);
        for kind in [Kind::Atespace, Kind::Template, Kind::Actor, Kind::Worker] {
            let for_snapshots = kind == Kind::Actor && wants_snapshots;
            if !self.kinds.contains(&kind) && !for_snapshots {
                continue;
            }
            let mut query = Query::all(kind);
            query.atespace = Some(self.atespace.clone()).filter(|it| !it.is_empty() && kind != Kind::Worker);
            loop {
                let page = match self.engine.store.list(&query).await {
                    Ok(page) => page,
                    Err(error) => return Err(self.fail(to, error).await),
                };
                for object in &page {
                    if object.revision > began {
                        newer.insert((kind, object.key.clone()), object.revision);
                    }
                    let shown = match self.show(object) {
                        Ok(shown) => shown,
                        Err(error) => return Err(self.fail(to, error).await),
                    };
                    for change in shown {
                        self.send(to, object.revision, change).await?;
                    }
                }
                match page.last() {
                    Some(last) if page.len() == query.limit => {
                        query.after = Some((last.atespace.clone(), last.name.clone()));
                    }
                    _ => break,
                }
            }
        }
        self.send(to, began, Shown::Bookmark(ateapi::Bookmark { initial_done: true })).await?;
        Ok(newer)
    }

    fn show(&self, object: &Object) -> Result<Vec<Shown>, StoreError> {
        Ok(match object.kind {
            Kind::Actor => {
                let actor: Actor = store::parse(object)?;
                let mut shown = Vec::new();
                if self.kinds.contains(&Kind::Snapshot) {
                    shown.extend(
                        actor.snapshots.iter().map(|it| Shown::Snapshot(convert::snapshot(&actor, it))),
                    );
                }
                if self.kinds.contains(&Kind::Actor) {
                    shown.push(Shown::Actor(convert::actor(&self.engine, actor)));
                }
                shown
            }
            Kind::Template => vec![Shown::Template(convert::template(store::parse::<Template>(object)?))],
            Kind::Atespace => vec![Shown::Atespace(convert::atespace(store::parse::<Atespace>(object)?))],
            Kind::Worker => vec![self.show_worker(store::parse(object)?)],
            Kind::Node | Kind::Golden | Kind::Snapshot | Kind::Event => Vec::new(),
        })
    }

    /// A worker as it was recorded, with what is only known now.
    fn show_worker(&self, record: WorkerRecord) -> Shown {
        Shown::Worker(convert::worker(&self.engine, self.engine.worker_of(record)))
    }

    async fn catch_up(
        &self,
        to: &Sender,
        cursor: &mut u64,
        shown: &mut HashMap<(Kind, String), u64>,
    ) -> Result<(), Ended> {
        loop {
            let page = match self.engine.store.changes(*cursor, PAGE).await {
                Ok(page) => page,
                Err(error) => return Err(self.fail(to, error).await),
            };
            let full = page.len() == PAGE;
            for change in page {
                *cursor = change.revision;
                let key = (change.kind, change.key.clone());
                let known = shown.get(&key).is_some_and(|at| change.revision <= *at);
                let wanted = self.kinds.contains(&change.kind)
                    && (self.atespace.is_empty()
                        || change.atespace == self.atespace
                        || change.kind == Kind::Worker);
                if known || !wanted {
                    continue;
                }
                let revision = change.revision;
                match self.changed(change) {
                    Ok(Some(change)) => self.send(to, revision, change).await?,
                    Ok(None) => {}
                    Err(error) => return Err(self.fail(to, error).await),
                }
            }
            if !full {
                return Ok(());
            }
        }
    }

    fn changed(&self, change: Change) -> Result<Option<Shown>, StoreError> {
        if change.deleted {
            return Ok(Some(Shown::Deleted(ateapi::Deleted {
                kind: change.kind.as_str().to_owned(),
                atespace: change.atespace,
                name: change.name,
                uid: change.key,
            })));
        }
        let unreadable = |error: serde_json::Error| {
            StoreError::Unusable(format!("change {} cannot be read: {error}", change.revision))
        };
        Ok(match change.kind {
            Kind::Snapshot => {
                let note: SnapshotNote = serde_json::from_str(&change.doc).map_err(unreadable)?;
                Some(Shown::Snapshot(convert::noted_snapshot(note)))
            }
            Kind::Event => {
                let event: EventDraft = serde_json::from_str(&change.doc).map_err(unreadable)?;
                Some(Shown::Event(convert::event(change.revision, event)))
            }
            Kind::Actor => {
                let mut actor: Actor = serde_json::from_str(&change.doc).map_err(unreadable)?;
                actor.revision = change.revision;
                Some(Shown::Actor(convert::actor(&self.engine, actor)))
            }
            Kind::Template => {
                let mut template: Template = serde_json::from_str(&change.doc).map_err(unreadable)?;
                template.revision = change.revision;
                Some(Shown::Template(convert::template(template)))
            }
            Kind::Atespace => {
                let mut atespace: Atespace = serde_json::from_str(&change.doc).map_err(unreadable)?;
                atespace.revision = change.revision;
                Some(Shown::Atespace(convert::atespace(atespace)))
            }
            Kind::Worker => {
                let mut record: WorkerRecord = serde_json::from_str(&change.doc).map_err(unreadable)?;
                record.revision = change.revision;
                Some(self.show_worker(record))
            }
            Kind::Node | Kind::Golden => None,
        })
    }
}

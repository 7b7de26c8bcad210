// SPDX-License-Identifier: Apache-2.0
//! The store in memory, for tests and simulation: the same specification, nothing durable.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::{
    Change, Check, Committed, EventQuery, Expect, Garbage, Kind, Object, Query, RefChange, RequestRecord,
    Store, StoreError, Trim, Tx, Usage,
};
use crate::model::EventDraft;

#[derive(Default)]
struct Inner {
    revision: u64,
    floor: u64,
    closed: bool,
    objects: BTreeMap<(Kind, String), Object>,
    names: BTreeMap<(Kind, String, String), String>,
    changelog: BTreeMap<u64, Change>,
    events: BTreeMap<u64, EventDraft>,
    requests: BTreeMap<String, RequestRecord>,
    sealed: BTreeMap<String, Vec<u8>>,
    refs: BTreeSet<(String, Garbage)>,
    garbage: BTreeMap<i64, (String, Garbage)>,
    next_garbage: i64,
    usage: BTreeMap<String, (i64, i64)>,
}

/// See the module.
pub struct MemoryStore {
    inner: Mutex<Inner>,
    revisions: watch::Sender<u64>,
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self { inner: Mutex::default(), revisions: watch::Sender::new(0) }
    }
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Opens it again after `close`, as a process that starts would: what was committed is there.
    pub fn reopen(&self) {
        self.lock().closed = false;
    }

    /// What is referenced, by whom, and what is garbage; of one moment.
    #[cfg(test)]
    pub(crate) fn blobs(&self) -> (Vec<(String, Garbage)>, Vec<Garbage>) {
        let inner = self.lock();
        let garbage = inner.garbage.values().map(|(_, item)| item.clone()).collect();
        (inner.refs.iter().cloned().collect(), garbage)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self) -> Result<MutexGuard<'_, Inner>, StoreError> {
        let inner = self.lock();
        if inner.closed { Err(StoreError::Io("the store is closed".to_owned())) } else { Ok(inner) }
    }
}

impl Inner {
    fn next(&mut self) -> u64 {
        self.revision += 1;
        self.revision
    }

    fn log(&mut self, change: Change) {
        if change.kind.is_watched() {
            self.changelog.insert(change.revision, change);
        }
    }

    fn verify(&self, tx: &Tx) -> Result<(), StoreError> {
        let of_kind = |kind, atespace: &str| {
            self.names
                .range((kind, atespace.to_owned(), String::new())..)
                .next()
                .is_some_and(|((k, a, _), _)| *k == kind && a == atespace)
        };
        for check in &tx.checks {
            let holds = match check {
                Check::Exists(kind, key) => self.objects.contains_key(&(*kind, key.clone())),
                Check::TemplateUnused(uid) => {
                    !self.objects.values().any(|object| object.kind == Kind::Actor && object.template == *uid)
                }
                Check::ActorsBelow(name, limit) => {
                    self.usage.get(name).is_none_or(|(actors, _)| *actors < *limit as i64)
                }
                Check::AtespaceEmpty(name) => !of_kind(Kind::Actor, name) && !of_kind(Kind::Template, name),
            };
            if !holds {
                return Err(StoreError::Check(check.clone()));
            }
        }
        for (object, expect) in &tx.puts {
            let old = self.objects.get(&(object.kind, object.key.clone()));
            let holder = self.names.get(&(object.kind, object.atespace.clone(), object.name.clone()));
            let exists = || StoreError::Exists {
                kind: object.kind,
                atespace: object.atespace.clone(),
                name: object.name.clone(),
            };
            match (expect, old) {
                (Expect::Absent, Some(_)) => return Err(exists()),
                (Expect::Revision(revision), old) if old.map(|o| o.revision) != Some(*revision) => {
                    return Err(StoreError::Conflict { kind: object.kind, key: object.key.clone() });
                }
                _ => {}
            }
            if holder.is_some_and(|key| *key != object.key) {
                return Err(exists());
            }
        }
        for (kind, key, expect) in &tx.deletes {
            if !expect.fits(self.objects.get(&(*kind, key.clone())).map(|object| object.revision)) {
                return Err(StoreError::Conflict { kind: *kind, key: key.clone() });
            }
        }
        Ok(())
    }

    fn apply(&mut self, tx: Tx) -> Vec<u64> {
        let mut puts = Vec::new();
        for (mut object, _) in tx.puts {
            let revision = self.next();
            object.revision = revision;
            puts.push(revision);
            self.log(Change {
                revision,
                kind: object.kind,
                key: object.key.clone(),
                atespace: object.atespace.clone(),
                name: object.name.clone(),
                deleted: false,
                doc: object.doc.clone(),
            });
            let key = (object.kind, object.key.clone());
            if let Some(old) = self.objects.get(&key) {
                self.names.remove(&(old.kind, old.atespace.clone(), old.name.clone()));
            }
            self.names
                .insert((object.kind, object.atespace.clone(), object.name.clone()), object.key.clone());
            self.objects.insert(key, object);
        }
        for (kind, key, _) in tx.deletes {
            if let Some(old) = self.objects.remove(&(kind, key)) {
                self.names.remove(&(kind, old.atespace.clone(), old.name.clone()));
                let revision = self.next();
                self.log(Change {
                    revision,
                    kind,
                    key: old.key,
                    atespace: old.atespace,
                    name: old.name,
                    deleted: true,
                    doc: String::new(),
                });
            }
        }
        for note in tx.notes {
            let revision = self.next();
            self.log(Change {
                revision,
                kind: note.kind,
                key: note.key,
                atespace: note.atespace,
                name: note.name,
                deleted: note.deleted,
                doc: note.doc,
            });
        }
        for event in tx.events {
            let revision = self.next();
            self.log(Change {
                revision,
                kind: Kind::Event,
                key: String::new(),
                atespace: event.atespace.clone(),
                name: event.subject.clone(),
                deleted: false,
                doc: serde_json::to_string(&event).unwrap_or_default(),
            });
            self.events.insert(revision, event);
        }
        if let Some(request) = tx.request {
            self.requests.insert(request.id.clone(), request);
        }
        for (key, value) in tx.seals {
            match value {
                Some(value) => self.sealed.insert(key, value),
                None => self.sealed.remove(&key),
            };
        }
        for change in tx.refs {
            match change {
                RefChange::Hold { holder, blobs } => {
                    self.refs.extend(blobs.into_iter().map(|blob| (holder.clone(), blob)));
                }
                RefChange::Drop { holder } => {
                    let held: Vec<_> = self.refs.iter().filter(|(h, _)| *h == holder).cloned().collect();
                    for pair in held {
                        self.refs.remove(&pair);
                        if !self.refs.iter().any(|(_, blob)| *blob == pair.1) {
                            self.discard(holder.clone(), pair.1);
                        }
                    }
                }
            }
        }
        for item in tx.garbage {
            self.discard(String::new(), item);
        }
        for change in tx.usage {
            let used = self.usage.entry(change.atespace).or_default();
            *used = (used.0 + change.actors, used.1 + change.bytes);
        }
        for id in tx.garbage_done {
            self.garbage.remove(&id);
        }
        puts
    }

    fn discard(&mut self, holder: String, item: Garbage) {
        self.next_garbage += 1;
        self.garbage.insert(self.next_garbage, (holder, item));
    }
}

#[async_trait::async_trait]
impl Store for MemoryStore {
    async fn commit(&self, tx: Tx) -> Result<Committed, StoreError> {
        let mut inner = self.open()?;
        inner.verify(&tx)?;
        let puts = inner.apply(tx);
        let revision = inner.revision;
        // Under the lock, so that revisions are announced in order.
        self.revisions.send_replace(revision);
        Ok(Committed { puts, revision })
    }

    async fn get(&self, kind: Kind, key: &str) -> Result<Option<Object>, StoreError> {
        Ok(self.open()?.objects.get(&(kind, key.to_owned())).cloned())
    }

    async fn find(&self, kind: Kind, atespace: &str, name: &str) -> Result<Option<Object>, StoreError> {
        let inner = self.open()?;
        let key = inner.names.get(&(kind, atespace.to_owned(), name.to_owned()));
        Ok(key.and_then(|key| inner.objects.get(&(kind, key.clone()))).cloned())
    }

    async fn list(&self, query: &Query) -> Result<Vec<Object>, StoreError> {
        let inner = self.open()?;
        let (atespace, name) = query.after.clone().unwrap_or_default();
        Ok(inner
            .names
            .range((query.kind, atespace, name)..)
            .take_while(|((kind, ..), _)| *kind == query.kind)
            .filter(|((_, atespace, name), _)| {
                query.after.as_ref().is_none_or(|after| (atespace, name) > (&after.0, &after.1))
            })
            .filter_map(|(_, key)| inner.objects.get(&(query.kind, key.clone())))
            .filter(|object| {
                query.atespace.as_ref().is_none_or(|atespace| object.atespace == *atespace)
                    && (query.states.is_empty() || query.states.contains(&object.state))
                    && query.template.as_ref().is_none_or(|template| object.template == *template)
                    && (!query.busy || object.busy)
            })
            .take(query.limit)
            .cloned()
            .collect())
    }

    async fn changes(&self, after: u64, limit: usize) -> Result<Vec<Change>, StoreError> {
        let inner = self.open()?;
        if after < inner.floor {
            return Err(StoreError::Compacted { oldest: inner.floor });
        }
        Ok(inner.changelog.range(after + 1..).take(limit).map(|(_, change)| change.clone()).collect())
    }

    async fn events(&self, query: &EventQuery) -> Result<Vec<(u64, EventDraft)>, StoreError> {
        let inner = self.open()?;
        let fits = |wanted: &Option<String>, text: &str| wanted.as_ref().is_none_or(|it| it == text);
        let wanted = |(_, event): &(&u64, &EventDraft)| {
            fits(&query.atespace, &event.atespace)
                && fits(&query.subject, &event.subject)
                && fits(&query.reason, &event.reason)
        };
        let own = |(revision, event): (&u64, &EventDraft)| (*revision, event.clone());
        let all = inner.events.range(query.after + 1..);
        if query.after > 0 {
            return Ok(all.filter(wanted).take(query.limit).map(own).collect());
        }
        let mut events: Vec<_> = all.rev().filter(wanted).take(query.limit).map(own).collect();
        events.reverse();
        Ok(events)
    }

    async fn request(&self, id: &str) -> Result<Option<RequestRecord>, StoreError> {
        Ok(self.open()?.requests.get(id).cloned())
    }

    async fn sealed(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.open()?.sealed.get(key).cloned())
    }

    async fn garbage(&self, limit: usize) -> Result<Vec<(i64, String, Garbage)>, StoreError> {
        let inner = self.open()?;
        Ok(inner
            .garbage
            .iter()
            .take(limit)
            .map(|(id, (holder, item))| (*id, holder.clone(), item.clone()))
            .collect())
    }

    async fn usage(&self, atespace: &str) -> Result<Usage, StoreError> {
        let (actors, bytes) = self.open()?.usage.get(atespace).copied().unwrap_or_default();
        Ok(Usage { actors: actors.max(0) as u64, bytes: bytes.max(0) as u64 })
    }

    fn revisions(&self) -> watch::Receiver<u64> {
        self.revisions.subscribe()
    }

    async fn trim(&self, trim: Trim) -> Result<(), StoreError> {
        let mut inner = self.open()?;
        let floor = inner.revision.saturating_sub(trim.changelog_keep).max(inner.floor);
        inner.floor = floor;
        inner.changelog = inner.changelog.split_off(&(floor + 1));
        while inner.events.len() as u64 > trim.events_keep {
            inner.events.pop_first();
        }
        inner.requests.retain(|_, request| request.time_ms >= trim.requests_before_ms);
        Ok(())
    }

    async fn close(&self) {
        self.lock().closed = true;
    }
}

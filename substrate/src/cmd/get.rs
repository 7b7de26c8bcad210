// SPDX-License-Identifier: Apache-2.0
//! `substrate get` and `events`: lists, and what changes in them.
//!
//! A watch opens the control plane's stream at revision 0, prints what is there up to the first bookmark as a list, and
//! every change after it as a row (or, for programs, one JSON object a line: the thing, or `{"deleted": …}`).
use std::collections::HashSet;

use serde::Serialize;
use substrate_proto::ateapi::watch_response::Change;
use substrate_proto::ateapi::{self as api, ActorState};

use crate::args::{Events, Get, Global, Kind, Output};
use crate::client::{Control, actor_ref, connect};
use crate::cmd::{columns, list_text, machine_text, print};
use crate::failure::{Exit, Failure};
use crate::view::{Actor, Atespace, Event, Snapshot, Template, View, Worker};

/// Rows asked for at once.
const PAGE: u32 = 500;
/// Events shown when nothing else is asked for.
const EVENTS: u32 = 1000;

/// `substrate get`.
pub async fn run(options: Get, global: &Global) -> Result<(), Failure> {
    let mut client = connect(global).await?;
    let states = options.states.iter().map(|word| parse_state(word)).collect::<Result<Vec<_>, _>>()?;
    let wanted = Wanted {
        atespace: if options.all_atespaces { String::new() } else { global.atespace.clone() },
        names: options.names.iter().cloned().collect(),
        labels: options.labels.iter().cloned().collect(),
        states,
        template: options.template.clone().unwrap_or_default(),
    };
    let show = Show { output: global.output, all: options.all_atespaces };
    if options.watch {
        return match options.kind {
            Kind::Actors => watch::<Actor>(&mut client, "actor", &wanted, show).await,
            Kind::Workers => watch::<Worker>(&mut client, "worker", &wanted, show).await,
            Kind::Templates => watch::<Template>(&mut client, "template", &wanted, show).await,
            Kind::Snapshots => watch::<Snapshot>(&mut client, "snapshot", &wanted, show).await,
            Kind::Atespaces => watch::<Atespace>(&mut client, "atespace", &wanted, show).await,
            Kind::Events => watch::<Event>(&mut client, "event", &wanted, show).await,
        };
    }
    match options.kind {
        Kind::Actors if !wanted.names.is_empty() => {
            let mut actors = Vec::new();
            for name in &options.names {
                let request = api::GetActorRequest { actor: Some(actor_ref(global, name)) };
                actors.push(Actor::from(client.get_actor(request).await?.into_inner()));
            }
            show.named(&actors)
        }
        Kind::Actors => show.list(&list_actors(&mut client, &wanted).await?),
        Kind::Workers => {
            let workers = client.list_workers(api::ListWorkersRequest {}).await?.into_inner().workers;
            let workers: Vec<Worker> = workers.into_iter().map(Worker::from).collect();
            wanted.pick(workers, |worker| &worker.id, "worker", show)
        }
        Kind::Templates => {
            let templates = list_templates(&mut client, &wanted.atespace).await?;
            wanted.pick(templates, |template| &template.name, "template", show)
        }
        Kind::Atespaces => {
            let mut all = Vec::new();
            let mut page_token = String::new();
            loop {
                let request = api::ListAtespacesRequest { page_size: PAGE, page_token };
                let page = client.list_atespaces(request).await?.into_inner();
                all.extend(page.atespaces.into_iter().map(Atespace::from));
                page_token = page.next_page_token;
                if page_token.is_empty() {
                    break;
                }
            }
            wanted.pick(all, |atespace| &atespace.name, "atespace", show)
        }
        Kind::Snapshots => {
            let mut all = Vec::new();
            if options.names.is_empty() {
                all = list_snapshots(&mut client, &wanted.atespace, None).await?;
            }
            for name in &options.names {
                all.extend(
                    list_snapshots(&mut client, &wanted.atespace, Some(actor_ref(global, name))).await?,
                );
            }
            show.list(&all)
        }
        Kind::Events => {
            let names: Vec<Option<&String>> =
                if options.names.is_empty() { vec![None] } else { options.names.iter().map(Some).collect() };
            let mut all = Vec::new();
            for name in names {
                all.extend(
                    list_events(&mut client, &wanted.atespace, name.map_or("", String::as_str), "").await?,
                );
            }
            all.sort_by_key(|event| event.revision);
            show.list(&all)
        }
    }
}

/// `substrate events`.
pub async fn events(options: Events, global: &Global) -> Result<(), Failure> {
    let mut client = connect(global).await?;
    let atespace = if options.all_atespaces { String::new() } else { global.atespace.clone() };
    let subject = options.actor.clone().unwrap_or_default();
    let reason = options.reason.clone().unwrap_or_default();
    let show = Show { output: global.output, all: options.all_atespaces };
    if !options.follow {
        return show.list(&list_events(&mut client, &atespace, &subject, &reason).await?);
    }
    // The stream is opened first, so that nothing falls between the list and it.
    let request =
        api::WatchRequest { from_revision: 0, kinds: vec!["event".into()], atespace: atespace.clone() };
    let mut stream = client.watch(request).await?.into_inner();
    let past = list_events(&mut client, &atespace, &subject, &reason).await?;
    let mut last = past.last().map_or(0, |event| event.revision);
    let mut printer = Printer::new(show);
    printer.first(&past)?;
    while let Some(message) = stream.message().await? {
        if let Some(Change::Event(event)) = message.change {
            let event = Event::from(event);
            let fits = (subject.is_empty() || event.subject == subject)
                && (reason.is_empty() || event.reason == reason);
            if event.revision > last && fits {
                last = event.revision;
                printer.change(&event)?;
            }
        }
    }
    Err(closed())
}

/// What of a kind is asked for.
#[derive(Debug, Default)]
struct Wanted {
    atespace: String,
    names: HashSet<String>,
    labels: std::collections::BTreeMap<String, String>,
    states: Vec<i32>,
    template: String,
}

impl Wanted {
    /// Prints those of a whole list that are named, or refuses when one is not there.
    fn pick<V: View>(
        &self,
        items: Vec<V>,
        name: impl Fn(&V) -> &String,
        kind: &str,
        show: Show,
    ) -> Result<(), Failure> {
        if self.names.is_empty() {
            return show.list(&items);
        }
        if let Some(missing) =
            self.names.iter().find(|wanted| !items.iter().any(|item| name(item) == *wanted))
        {
            return Err(Failure::new(Exit::NotFound, format!("there is no {kind} {missing:?}"))
                .with_way_out(format!("`substrate get {kind}s` lists those there are")));
        }
        let picked: Vec<V> = items.into_iter().filter(|item| self.names.contains(name(item))).collect();
        show.named(&picked)
    }
}

fn parse_state(word: &str) -> Result<i32, Failure> {
    let upper = word.to_ascii_uppercase();
    match ActorState::from_str_name(&upper) {
        Some(state) if state != ActorState::Unspecified => Ok(state as i32),
        _ => {
            let known: Vec<&str> = (1..=10).map(crate::view::state_word).collect();
            Err(Failure::usage(format!("there is no state {word:?}: use one of {}", known.join(", "))))
        }
    }
}

async fn list_actors(client: &mut Control, wanted: &Wanted) -> Result<Vec<Actor>, Failure> {
    let mut all = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = api::ListActorsRequest {
            atespace: wanted.atespace.clone(),
            template: wanted.template.clone(),
            states: wanted.states.clone(),
            labels: wanted.labels.clone(),
            page_size: PAGE,
            page_token,
        };
        let page = client.list_actors(request).await?.into_inner();
        all.extend(page.actors.into_iter().map(Actor::from));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(all);
        }
    }
}

async fn list_templates(client: &mut Control, atespace: &str) -> Result<Vec<Template>, Failure> {
    let mut all = Vec::new();
    let mut page_token = String::new();
    loop {
        let request =
            api::ListTemplatesRequest { atespace: atespace.to_owned(), page_size: PAGE, page_token };
        let page = client.list_templates(request).await?.into_inner();
        all.extend(page.templates.into_iter().map(Template::from));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(all);
        }
    }
}

/// Every snapshot of an atespace, or of one actor.
pub async fn list_snapshots(
    client: &mut Control,
    atespace: &str,
    actor: Option<api::ActorRef>,
) -> Result<Vec<Snapshot>, Failure> {
    let mut all = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = api::ListSnapshotsRequest {
            atespace: atespace.to_owned(),
            actor: actor.clone(),
            page_size: PAGE,
            page_token,
        };
        let page = client.list_snapshots(request).await?.into_inner();
        all.extend(page.snapshots.into_iter().map(Snapshot::from));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(all);
        }
    }
}

/// Events, oldest first.
pub async fn list_events(
    client: &mut Control,
    atespace: &str,
    subject: &str,
    reason: &str,
) -> Result<Vec<Event>, Failure> {
    let request = api::ListEventsRequest {
        atespace: atespace.to_owned(),
        subject: subject.to_owned(),
        reason: reason.to_owned(),
        after_revision: 0,
        limit: EVENTS,
    };
    Ok(client.list_events(request).await?.into_inner().events.into_iter().map(Event::from).collect())
}

/// How lists are shown.
#[derive(Debug, Clone, Copy)]
struct Show {
    output: Output,
    all: bool,
}

impl Show {
    fn list<V: View>(self, items: &[V]) -> Result<(), Failure> {
        if items.is_empty() && matches!(self.output, Output::Table | Output::Wide) {
            eprintln!("none");
            return Ok(());
        }
        print(&list_text(items, self.output, self.all)?)
    }

    /// One named thing is printed as itself for programs, several as a list.
    fn named<V: View>(self, items: &[V]) -> Result<(), Failure> {
        match items {
            [one] if self.output.is_machine() => print(&machine_text(one, self.output)?),
            items => self.list(items),
        }
    }
}

/// A view that a watch delivers.
trait Watched: View + Sized {
    /// The thing of a change, when it is of this kind and wanted.
    fn of(change: &Change, wanted: &Wanted) -> Option<Self>;
}

fn is_named(wanted: &Wanted, name: &str, uid: &str) -> bool {
    wanted.names.is_empty() || wanted.names.contains(name) || wanted.names.contains(uid)
}

impl Watched for Actor {
    fn of(change: &Change, wanted: &Wanted) -> Option<Self> {
        let Change::Actor(actor) = change else { return None };
        let spec = actor.spec.clone().unwrap_or_default();
        let fits = is_named(wanted, &actor.name, &actor.uid)
            && (wanted.states.is_empty() || wanted.states.contains(&actor.state))
            && (wanted.template.is_empty() || wanted.template == spec.template)
            && wanted.labels.iter().all(|(key, value)| spec.labels.get(key) == Some(value));
        fits.then(|| Self::from(actor.clone()))
    }
}

impl Watched for Worker {
    fn of(change: &Change, wanted: &Wanted) -> Option<Self> {
        match change {
            Change::Worker(worker) if is_named(wanted, &worker.id, "") => Some(Self::from(worker.clone())),
            _ => None,
        }
    }
}

impl Watched for Template {
    fn of(change: &Change, wanted: &Wanted) -> Option<Self> {
        match change {
            Change::Template(one) if is_named(wanted, &one.name, &one.uid) => Some(Self::from(one.clone())),
            _ => None,
        }
    }
}

impl Watched for Snapshot {
    fn of(change: &Change, wanted: &Wanted) -> Option<Self> {
        match change {
            Change::Snapshot(one) if is_named(wanted, &one.actor_name, &one.actor_uid) => {
                Some(Self::from(one.clone()))
            }
            _ => None,
        }
    }
}

impl Watched for Atespace {
    fn of(change: &Change, wanted: &Wanted) -> Option<Self> {
        match change {
            Change::Atespace(one) if is_named(wanted, &one.name, "") => Some(Self::from(one.clone())),
            _ => None,
        }
    }
}

impl Watched for Event {
    fn of(change: &Change, wanted: &Wanted) -> Option<Self> {
        match change {
            Change::Event(one) if is_named(wanted, &one.subject, &one.subject_uid) => {
                Some(Self::from(one.clone()))
            }
            _ => None,
        }
    }
}

async fn watch<V: Watched>(
    client: &mut Control,
    kind: &str,
    wanted: &Wanted,
    show: Show,
) -> Result<(), Failure> {
    // Workers and atespaces live in no atespace.
    let atespace =
        if matches!(kind, "worker" | "atespace") { String::new() } else { wanted.atespace.clone() };
    let request = api::WatchRequest { from_revision: 0, kinds: vec![kind.to_owned()], atespace };
    let mut stream = client.watch(request).await?.into_inner();
    let mut initial = Some(Vec::new());
    let mut printer = Printer::new(show);
    while let Some(message) = stream.message().await? {
        let Some(change) = message.change else { continue };
        match &change {
            Change::Bookmark(bookmark) => {
                if bookmark.initial_done
                    && let Some(items) = initial.take()
                {
                    printer.first::<V>(&items)?;
                }
            }
            Change::Deleted(deleted)
                if deleted.kind == kind && is_named(wanted, &deleted.name, &deleted.uid) =>
            {
                printer.deleted(deleted)?;
            }
            change => {
                if let Some(item) = V::of(change, wanted) {
                    match &mut initial {
                        Some(items) => items.push(item),
                        None => printer.change(&item)?,
                    }
                }
            }
        }
    }
    Err(closed())
}

fn closed() -> Failure {
    Failure::new(Exit::Unavailable, "the control plane closed the watch")
        .with_way_out("it was probably stopped; start it again with `substrate up`")
}

/// Prints a list once and changes after it.
struct Printer {
    show: Show,
    widths: Vec<usize>,
}

#[derive(Serialize)]
struct Gone<'a> {
    deleted: GoneThing<'a>,
}

#[derive(Serialize)]
struct GoneThing<'a> {
    kind: &'a str,
    atespace: &'a str,
    name: &'a str,
    uid: &'a str,
}

impl Printer {
    fn new(show: Show) -> Self {
        Self { show, widths: Vec::new() }
    }

    fn first<V: View>(&mut self, items: &[V]) -> Result<(), Failure> {
        match self.show.output {
            Output::Table | Output::Wide => {
                let table = V::table(items, columns(self.show.output, self.show.all));
                self.widths = table.widths();
                print(&table.render())
            }
            _ => items.iter().try_for_each(|item| self.change(item)),
        }
    }

    fn change<V: View>(&mut self, item: &V) -> Result<(), Failure> {
        match self.show.output {
            Output::Table | Output::Wide => {
                let mut table =
                    crate::table::Table::new(&V::header(columns(self.show.output, self.show.all)));
                table.row(item.row(columns(self.show.output, self.show.all)));
                print(&table.render_rows(&self.widths))
            }
            Output::Name => print(&(item.name() + "\n")),
            output => print(&stream_text(item, output)?),
        }
    }

    fn deleted(&mut self, deleted: &api::Deleted) -> Result<(), Failure> {
        let api::Deleted { kind, atespace, name, uid } = deleted;
        match self.show.output {
            Output::Table | Output::Wide => print(&format!("{name}   DELETED\n")),
            Output::Name => print(&format!("{kind}/{name} deleted\n")),
            output => {
                print(&stream_text(&Gone { deleted: GoneThing { kind, atespace, name, uid } }, output)?)
            }
        }
    }
}

/// One thing of a stream: a line of JSON, or a YAML document.
fn stream_text(item: &impl Serialize, output: Output) -> Result<String, Failure> {
    if output == Output::Yaml {
        return Ok(format!("---\n{}", machine_text(item, output)?));
    }
    serde_json::to_string(item)
        .map(|text| text + "\n")
        .map_err(|error| Failure::general(format!("cannot write JSON: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_read_in_any_case_and_listed_when_wrong() {
        assert_eq!(parse_state("suspended"), Ok(ActorState::Suspended as i32));
        let failure = parse_state("asleep").unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        assert!(failure.message.contains("CRASHED"), "{}", failure.message);
        assert!(parse_state("ACTOR_STATE_UNSPECIFIED").is_err());
    }

    #[test]
    fn a_watch_filters_by_name_state_and_label() {
        let actor = |name: &str, state: ActorState, label: &str| {
            Change::Actor(api::Actor {
                name: name.into(),
                state: state as i32,
                spec: Some(substrate_proto::types::ActorSpec {
                    labels: [("team".to_owned(), label.to_owned())].into(),
                    ..Default::default()
                }),
                ..Default::default()
            })
        };
        let wanted = Wanted {
            names: ["alice".to_owned()].into(),
            states: vec![ActorState::Running as i32],
            labels: [("team".to_owned(), "a".to_owned())].into(),
            ..Wanted::default()
        };
        assert!(Actor::of(&actor("alice", ActorState::Running, "a"), &wanted).is_some());
        assert!(Actor::of(&actor("bob", ActorState::Running, "a"), &wanted).is_none());
        assert!(Actor::of(&actor("alice", ActorState::Paused, "a"), &wanted).is_none());
        assert!(Actor::of(&actor("alice", ActorState::Running, "b"), &wanted).is_none());
    }
}

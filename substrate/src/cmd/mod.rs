// SPDX-License-Identifier: Apache-2.0
//! The commands that are clients of the control plane, and how they print what it answers.
pub mod admin;
pub mod apply;
pub mod backup;
pub mod cp;
pub mod create;
pub mod describe;
pub mod exec;
pub mod fsck;
pub mod gc;
pub mod get;
pub mod logs;
pub mod request;
pub mod rotate_key;
mod stored;
pub mod verbs;
pub mod version;

use std::io::Write as _;

use serde::Serialize;
use substrate_proto::ateapi as api;

use crate::args::Output;
use crate::failure::{Doing as _, Failure};
use crate::time;
use crate::view::{Columns, View};

/// Writes to stdout; a closed pipe (`| head`) ends the process quietly, as people expect of a filter.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        result => result.doing(|| "cannot write to standard output".to_owned()),
    }
}

/// One value as JSON or YAML.
pub fn machine_text(value: &impl Serialize, output: Output) -> Result<String, Failure> {
    match output {
        Output::Yaml => serde_saphyr::to_string(value).doing(|| "cannot write YAML".to_owned()),
        _ => serde_json::to_string_pretty(value)
            .map(|text| text + "\n")
            .doing(|| "cannot write JSON".to_owned()),
    }
}

/// A list: `{"items": […]}` for programs, a table or names for people.
pub fn list_text<V: View>(items: &[V], output: Output, all_atespaces: bool) -> Result<String, Failure> {
    #[derive(Serialize)]
    struct List<'a, V> {
        items: &'a [V],
    }
    match output {
        Output::Json | Output::Yaml => machine_text(&List { items }, output),
        Output::Name => Ok(items.iter().map(|item| item.name() + "\n").collect()),
        Output::Table | Output::Wide => Ok(V::table(items, columns(output, all_atespaces)).render()),
    }
}

/// Columns for a format, now.
pub fn columns(output: Output, all_atespaces: bool) -> Columns {
    Columns { wide: output == Output::Wide, atespace: all_atespaces, now_ms: time::now_ms() }
}

/// What a verb did: one line for people, the thing itself for programs.
pub fn print_done<V: View>(item: &V, line: &str, output: Output) -> Result<(), Failure> {
    match output {
        Output::Json | Output::Yaml => print(&machine_text(item, output)?),
        Output::Name => print(&(item.name() + "\n")),
        Output::Table | Output::Wide => print(&format!("{line}\n")),
    }
}

/// The names of a verb after the optional word for their kind: `suspend actor a b` is `suspend a b`. A single word is
/// always a name.
pub fn names_after<'a>(words: &'a [String], kinds: &[&str]) -> &'a [String] {
    match words {
        [first, rest @ ..] if !rest.is_empty() && kinds.contains(&first.as_str()) => rest,
        all => all,
    }
}

/// Runs a verb on each name; all are tried, each failure but the last is printed, the last is returned.
pub async fn each<'a, F>(names: &'a [String], mut verb: impl FnMut(&'a String) -> F) -> Result<(), Failure>
where
    F: Future<Output = Result<(), Failure>>,
{
    let mut last = Ok(());
    for name in names {
        if let Err(failure) = verb(name).await
            && let Err(earlier) = std::mem::replace(&mut last, Err(failure))
        {
            earlier.report();
        }
    }
    last
}

/// Follows an actor until its boot has ended one way or the other, and says how far it is meanwhile.
pub async fn wait_until_ready(
    client: &mut crate::client::Control,
    created: &api::Actor,
) -> Result<api::Actor, Failure> {
    use api::ActorState as State;
    let (uid, name) = (&created.uid, &created.name);
    let mut spinner = crate::progress::Spinner::new(format!("starting {name}"));
    // Only its atespace: the caller may have no right to see others.
    let atespace = created.atespace.clone();
    let watch = api::WatchRequest { from_revision: 0, kinds: vec!["actor".into()], atespace };
    let mut stream = client.watch(watch).await?.into_inner();
    let patience = tokio::time::sleep(std::time::Duration::from_secs(1));
    tokio::pin!(patience);
    let mut shown = false;
    loop {
        let message = tokio::select! {
            message = stream.message() => message?,
            () = &mut patience, if !shown => { shown = true; spinner.show(); continue }
        };
        let Some(change) = message.and_then(|message| message.change) else {
            return Err(Failure::new(
                crate::failure::Exit::Unavailable,
                format!("the control plane closed the watch while {name} was starting"),
            )
            .with_way_out(format!("see `substrate describe actor {name}`")));
        };
        match change {
            api::watch_response::Change::Actor(actor) if actor.uid == *uid => match actor.state() {
                State::Running => return Ok(actor),
                State::New if actor.reason.is_empty() => {}
                State::New | State::Crashed | State::Exited => {
                    let view = crate::view::Actor::from(actor);
                    let why =
                        if view.message.is_empty() { view.reason.clone() } else { view.message.clone() };
                    return Err(Failure::general(format!("actor {name} is {}: {why}", view.state_text()))
                        .with_way_out(format!(
                            "see `substrate describe actor {name}` and `substrate logs {name}`"
                        )));
                }
                _ => {
                    if !actor.progress_step.is_empty() {
                        let step = actor.progress_step.replace('_', " ");
                        spinner.say(format!("starting {name}: {step} {}%", actor.progress_percent));
                    }
                }
            },
            api::watch_response::Change::Deleted(deleted) if deleted.uid == *uid => {
                return Err(Failure::new(
                    crate::failure::Exit::NotFound,
                    format!("actor {name} was deleted meanwhile"),
                ));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn the_word_for_the_kind_is_optional_and_a_single_word_is_a_name() {
        assert_eq!(names_after(&words("actor a b"), &["actor", "actors"]), words("a b"));
        assert_eq!(names_after(&words("a b"), &["actor"]), words("a b"));
        assert_eq!(names_after(&words("actor"), &["actor"]), words("actor"));
    }

    #[tokio::test]
    async fn every_name_is_tried_and_the_last_failure_counts() {
        let names = words("a b c");
        let tried = std::cell::RefCell::new(Vec::new());
        let result = each(&names, |name| {
            tried.borrow_mut().push(name.clone());
            async move { if name == "b" { Err(Failure::general("no b")) } else { Ok(()) } }
        })
        .await;
        assert_eq!(*tried.borrow(), names);
        assert_eq!(result, Err(Failure::general("no b")));
    }
}

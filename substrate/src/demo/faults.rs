// SPDX-License-Identifier: Apache-2.0
//! Beat 9: a worker dies in the moment after an answer, with another request in flight.
//!
//! The template says `checkpoint: {onReply: sync, durability: node}`: an answer is out only when a checkpoint that
//! began after it is committed. So whatever dies then, the next request finds every answered turn. The request in
//! flight fails clearly, and may be asked again.
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use substrate_proto::ateapi as api;

use super::beats::{Played, facts, number, text};
use super::gateway::WORKSPACE;
use super::processes::{kill_group, worker_cgroup};
use super::report::{Miss, Report, expect};
use super::world::World;
use crate::failure::{Doing as _, Failure};
use crate::http::Answer;

/// Longest pause between two of bob's ticks that is none: ticks come each 100 ms, and each of his own replies is
/// followed by a checkpoint.
const GAP_MS: u64 = 2500;

/// What is killed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Victim {
    Ateom,
    Group,
}

impl Victim {
    fn word(self) -> &'static str {
        match self {
            Self::Ateom => "ateom",
            Self::Group => "cgroup",
        }
    }
}

/// Plays the beat.
pub async fn play(world: &mut World, report: &Report) -> Played {
    let bob_before = Bob::look(world).await?;
    let mut rounds = Vec::new();
    let mut worst = 0;
    for (victim, fact, question) in [
        (Victim::Ateom, "Please also note invoice 1207.", "Which invoice number did I tell you?"),
        (Victim::Group, "Please also note ticket 9135.", "Which ticket number did I tell you?"),
    ] {
        let round = one_kill(world, report, victim, fact, question).await?;
        worst = worst.max(number(&round, "recovery_ms"));
        rounds.push(round);
    }
    if let Some(stock) = world.gateway.stock() {
        stock.until("alice", "Ready").await?;
        let said = stock.exec("alice", &["cat", "/run/ate/name"], b"").await?;
        expect(said == "alice", "exec to print alice after the kills", &said)?;
        report.detail("alice: Ready at the gateway, exec answers")?;
    }
    let bob_after = Bob::look(world).await?;
    bob_before.went_on(&bob_after)?;
    let ticks = bob_after.ticks - bob_before.ticks;
    report.detail(&format!(
        "bob: still on {}, {ticks} ticks later, longest gap {} ms",
        bob_after.worker, bob_after.gap_ms
    ))?;
    let summary =
        format!("twice answered elsewhere within {worst} ms, nothing answered was lost, bob did not notice");
    let bob = json!({"worker": bob_after.worker, "ticks": ticks, "max_tick_gap_ms": bob_after.gap_ms});
    Ok((summary, facts(json!({"kills": rounds, "bob": bob}))))
}

async fn one_kill(
    world: &mut World,
    report: &Report,
    victim: Victim,
    fact: &str,
    question: &str,
) -> Result<Value, Miss> {
    let actor = world.actor("alice").await?;
    let worker = world.worker(&actor.worker_id).await?;
    let group = worker_cgroup(worker.pid, &worker.id)?;
    let known = world.events("alice").await?.last().map_or(0, |event| event.revision);
    let in_flight = InFlight::send(world)?;
    let answer = world.chat("alice", fact).await?;
    // The answer is here: now.
    match victim {
        Victim::Ateom => {
            let pid = nix::unistd::Pid::from_raw(worker.pid as i32);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)
                .doing(|| format!("cannot kill process {}", worker.pid))?;
        }
        Victim::Group => kill_group(&group)?,
    }
    let killed = Instant::now();
    match victim {
        Victim::Ateom => {
            report.command(&format!("kill -9 {}     # the ateom of {}", worker.pid, worker.id))?;
        }
        Victim::Group => report.command(&format!("echo 1 > {}/cgroup.kill", group.display()))?,
    }
    let turns = number(&answer, "history_turns");
    expect(turns == world.memory.alice_turns + 1, format!("turn {}", world.memory.alice_turns + 1), turns)?;
    let next = world.chat("alice", question).await?;
    let recovery_ms = killed.elapsed().as_millis() as u64;
    let said = text(&next, "answer");
    report.detail(&format!("alice: {said}"))?;
    let expected: String = fact.chars().filter(char::is_ascii_digit).collect();
    expect(said.contains(&expected), format!("an answer that knows {expected}"), &said)?;
    let nonce = text(&next, "nonce");
    expect(
        nonce == world.memory.alice_nonce,
        format!("nonce {}: her memory", world.memory.alice_nonce),
        &nonce,
    )?;
    let now = number(&next, "history_turns");
    expect(now == turns + 1, format!("history_turns {}: no answered turn lost", turns + 1), now)?;
    world.memory.alice_turns = now;
    let after = world.actor("alice").await?;
    expect(after.worker_id != worker.id, format!("a worker that is not {}", worker.id), &after.worker_id)?;
    expect(
        after.generation > actor.generation,
        format!("a generation above {}", actor.generation),
        after.generation,
    )?;
    world.memory.alice_worker.clone_from(&after.worker_id);
    let events = world.events("alice").await?;
    let told = events.iter().find(|event| event.revision > known && event.reason == "RolledBack");
    let new: Vec<&str> =
        events.iter().filter(|event| event.revision > known).map(|event| event.reason.as_str()).collect();
    let Some(told) = told else {
        return Err(Miss {
            expected: "an event RolledBack that says how old the snapshot was".into(),
            seen: new.join(", "),
        });
    };
    expect(told.metadata.contains_key("age_ms"), "the snapshot's age in the event", &told.message)?;
    report.command(&format!("substrate -a {WORKSPACE} events --actor alice"))?;
    let open_request = in_flight.end().await?;
    // It may be asked again.
    world.json("alice", "GET", "/slow?ms=10", None).await?;
    until_back(world, &worker.id).await?;
    report.detail(&format!(
        "{} → {}, answered {recovery_ms} ms after the kill; event: {}; request in flight: {open_request}",
        worker.id, after.worker_id, told.message
    ))?;
    Ok(json!({
        "killed": victim.word(), "from_worker": worker.id, "to_worker": after.worker_id, "recovery_ms": recovery_ms,
        "history_turns": now, "event": told.message, "events": new, "in_flight": open_request,
    }))
}

/// Waits until a killed worker serves again, so that the pool is whole for what follows.
async fn until_back(world: &mut World, id: &str) -> Result<(), Miss> {
    let request =
        api::WatchRequest { from_revision: 0, kinds: vec!["worker".into()], atespace: String::new() };
    let mut stream = world.control.watch(request).await?.into_inner();
    while let Some(message) = stream.message().await? {
        if let Some(api::watch_response::Change::Worker(worker)) = message.change
            && worker.id == id
            && worker.alive
            && worker.actor_uid.is_empty()
        {
            return Ok(());
        }
    }
    Err(Failure::general("the control plane closed the watch").into())
}

/// A request that alice has not answered when her worker dies.
struct InFlight {
    task: tokio::task::JoinHandle<Result<Answer, Failure>>,
}

impl InFlight {
    /// Sends it. That it has reached her by the time of the kill shows in how it ends: what never reached an actor is
    /// sent again by the router and would wait for its answer on the new copy.
    fn send(world: &World) -> Result<Self, Miss> {
        let request = world.request("alice", "GET", "/slow?ms=120000", None)?;
        let ingress = world.info.ingress;
        let task = tokio::spawn(crate::http::send(ingress, request, Duration::from_mins(2)));
        Ok(Self { task })
    }

    /// How it ended: with a clear failure, soon.
    async fn end(self) -> Result<String, Miss> {
        let expected = "502 for the request that was in flight";
        let ended = tokio::time::timeout(Duration::from_secs(20), self.task).await;
        match ended {
            Ok(Ok(Ok(answer))) => {
                let said = format!("{}: {}", answer.status, answer.text().trim());
                expect(answer.status == 502, expected, &said)?;
                Ok(said)
            }
            Ok(Ok(Err(failure))) => Err(Miss { expected: expected.to_owned(), seen: failure.message }),
            Ok(Err(error)) => Err(Miss { expected: expected.to_owned(), seen: error.to_string() }),
            Err(_) => Err(Miss { expected: expected.to_owned(), seen: "nothing for 20 s".to_owned() }),
        }
    }
}

/// What must not change for bob.
struct Bob {
    worker: String,
    nonce: String,
    pid: u64,
    ticks: u64,
    uptime_ms: u64,
    gap_ms: u64,
    seen: Instant,
}

impl Bob {
    async fn look(world: &mut World) -> Result<Self, Miss> {
        let worker = world.actor("bob").await?.worker_id;
        let status = world.status("bob").await?;
        Ok(Self {
            worker,
            nonce: text(&status, "nonce"),
            pid: number(&status, "pid"),
            ticks: number(&status, "ticks"),
            uptime_ms: (status["uptime_s"].as_f64().unwrap_or_default() * 1000.0) as u64,
            gap_ms: number(&status, "max_tick_gap_ms"),
            seen: Instant::now(),
        })
    }

    /// Same place, same memory, and time went on for him as it did for us.
    fn went_on(&self, after: &Self) -> Result<(), Miss> {
        expect(after.worker == self.worker, format!("bob still on {}", self.worker), &after.worker)?;
        expect(
            after.nonce == self.nonce && after.pid == self.pid,
            "bob's nonce and pid as before",
            &after.nonce,
        )?;
        let wall_ms = after.seen.duration_since(self.seen).as_millis() as u64;
        let uptime_ms = after.uptime_ms.saturating_sub(self.uptime_ms);
        expect(
            uptime_ms.abs_diff(wall_ms) < GAP_MS,
            format!("bob's clock {wall_ms} ms later"),
            format!("{uptime_ms} ms later"),
        )?;
        expect(
            after.gap_ms < GAP_MS,
            format!("no gap of {GAP_MS} ms in bob's ticks"),
            format!("{} ms", after.gap_ms),
        )?;
        // A tick takes 100 ms and a little; a busy machine makes it more, a stopped bob makes it none.
        let ticks = after.ticks.saturating_sub(self.ticks);
        let least = uptime_ms / 100 / 3;
        expect(ticks >= least, format!("at least {least} ticks of bob in {uptime_ms} ms"), ticks)
    }
}

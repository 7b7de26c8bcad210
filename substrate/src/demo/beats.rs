// SPDX-License-Identifier: Apache-2.0
//! Beats 1 to 7 and 10: provisioning, one actor's life, and its end.
use std::time::Duration;

use serde_json::{Value, json};
use substrate_proto::ateapi::{self as api, ActorState};
use substrate_proto::types::Durability;

use super::gateway::{WORKSPACE, condition};
use super::processes::{disk_bytes, members_without, worker_cgroup};
use super::report::{Facts, Miss, Report, expect};
use super::world::World;
use crate::cmd::exec::Session;
use crate::quantity::bytes;
use crate::view::state_word;

/// What every beat ends with: a sentence and facts.
pub type Played = Result<(String, Facts), Miss>;

/// The number that only turn 1 names.
const ORDER: &str = "4711";

/// Facts from a JSON object.
pub fn facts(value: Value) -> Facts {
    match value {
        Value::Object(map) => map,
        _ => Facts::new(),
    }
}

/// A field of the agent's answer as text.
pub fn text(value: &Value, key: &str) -> String {
    value[key].as_str().unwrap_or_default().to_owned()
}

/// A field of the agent's answer as a number.
pub fn number(value: &Value, key: &str) -> u64 {
    value[key].as_f64().unwrap_or_default() as u64
}

async fn create(world: &mut World, report: &Report, name: &str) -> Result<(Value, api::Actor), Miss> {
    let from = match world.gateway.stock() {
        // The gateway's default image.
        Some(_) => {
            " --policy examples/helpdesk/gateway/policy.yaml -- python3 -S /app/helpdesk.py".to_owned()
        }
        None => format!(" --from {}", world.recipe.image),
    };
    report.command(&format!("openshell sandbox create --name {name}{from}"))?;
    let ready = world.gateway.create(&world.recipe, name).await?;
    expect(ready.name == name, format!("the name {name} echoed"), &ready.name)?;
    world.sandboxes.insert(name.to_owned(), ready.clone());
    let got = world.gateway.get(&ready).await?;
    expect(got.id == ready.id, format!("the id {} from GetSandbox", ready.id), &got.id)?;
    if let Some(stock) = world.gateway.stock() {
        report.command(&format!("openshell sandbox exec --name {name} -- cat /run/ate/name"))?;
        let said = stock.exec(name, &["cat", "/run/ate/name"], b"").await?;
        expect(said == name, format!("exec to print {name}"), &said)?;
        world.until_answers(name).await?;
    }
    deliver_key(world, name).await?;
    report.command(&format!("substrate -a {WORKSPACE} request {name} /status"))?;
    let status = world.status(name).await?;
    expect(text(&status, "name") == name, format!("/run/ate/name to say {name}"), &status["name"])?;
    let actor = world.actor(name).await?;
    Ok((status, actor))
}

/// A real model's key goes into the actor's memory, never into its template or environment.
async fn deliver_key(world: &mut World, name: &str) -> Result<(), Miss> {
    use substrate_proto::types::exec_input::Input;
    let Some(key) = world.model.key.clone() else { return Ok(()) };
    if let Some(stock) = world.gateway.stock() {
        let keep = ["sh", "-c", "umask 077; cat > \"$0\"", super::model::KEY_FILE];
        stock.exec(name, &keep, key.as_bytes()).await?;
        return Ok(());
    }
    let start = substrate_proto::types::ExecStart {
        atespace: WORKSPACE.to_owned(),
        actor: name.to_owned(),
        command: ["sh", "-c", "umask 077; cat > \"$0\"", super::model::KEY_FILE].map(str::to_owned).to_vec(),
        ..Default::default()
    };
    let mut session = Session::open(&mut world.control, start).await?;
    session.send(Input::Stdin(key.into_bytes())).await;
    session.send(Input::CloseStdin(true)).await;
    let code = session.copy_output(|_| Ok(())).await?;
    expect(code == 0, "the model's key delivered", format!("code {code}"))
}

/// Beat 1.
pub async fn create_alice(world: &mut World, report: &Report) -> Played {
    let driver = world.gateway.describe().await?;
    let (status, actor) = create(world, report, "alice").await?;
    let nonce = text(&status, "nonce");
    expect(!nonce.is_empty(), "a nonce", &status)?;
    world.memory.alice_nonce.clone_from(&nonce);
    world.memory.alice_worker.clone_from(&actor.worker_id);
    world.memory.template = actor.spec.clone().unwrap_or_default().template;
    let summary = format!("ready on {}, nonce {nonce}", actor.worker_id);
    Ok((summary, facts(json!({"nonce": nonce, "worker": actor.worker_id, "driver": driver}))))
}

/// Beat 2.
pub async fn create_bob(world: &mut World, report: &Report) -> Played {
    let (status, actor) = create(world, report, "bob").await?;
    let nonce = text(&status, "nonce");
    let other = world.memory.alice_nonce.clone();
    expect(!nonce.is_empty() && nonce != other, "a nonce that is not alice's", &nonce)?;
    let template = actor.spec.clone().unwrap_or_default().template;
    expect(
        template == world.memory.template,
        format!("alice's template {}", world.memory.template),
        &template,
    )?;
    let summary = format!("ready on {}, nonce {nonce}: another one", actor.worker_id);
    Ok((summary, facts(json!({"nonce": nonce, "worker": actor.worker_id, "template": template}))))
}

/// Beat 3.
pub async fn list(world: &mut World, report: &Report) -> Played {
    report.command("openshell sandbox list")?;
    let mut sandboxes = world.gateway.list().await?;
    sandboxes.sort_by(|a, b| a.name.cmp(&b.name));
    let names: Vec<&str> = sandboxes.iter().map(|sandbox| sandbox.name.as_str()).collect();
    expect(names == ["alice", "bob"], "alice and bob", format!("{names:?}"))?;
    for sandbox in &sandboxes {
        let (status, reason, _) = condition(sandbox, "Ready");
        expect(status == "True", format!("{} Ready", sandbox.name), format!("Ready={status} ({reason})"))?;
        let created = world.sandbox(&sandbox.name)?;
        expect(sandbox.id == created.id, format!("the id {} of {}", created.id, sandbox.name), &sandbox.id)?;
        expect(sandbox.workspace == WORKSPACE, format!("workspace {WORKSPACE}"), &sandbox.workspace)?;
    }
    Ok(("alice and bob, both Ready".to_owned(), facts(json!({"sandboxes": names}))))
}

/// Beat 4.
pub async fn first_question(world: &mut World, report: &Report) -> Played {
    let message = format!("Hello, my name is Alice. My coffee machine is broken, order {ORDER}.");
    report.command(&format!(
        "substrate -a {WORKSPACE} request alice /chat -d '{{\"message\": \"{message}\"}}'"
    ))?;
    let answer = world.chat("alice", &message).await?;
    let turns = number(&answer, "history_turns");
    expect(turns == 1, "history_turns 1", turns)?;
    world.memory.alice_turns = 1;
    let said = text(&answer, "answer");
    report.detail(&format!("alice: {said}"))?;
    Ok(("one turn".to_owned(), facts(json!({"answer": said, "history_turns": turns}))))
}

/// Beat 5.
pub async fn stop(world: &mut World, report: &Report) -> Played {
    let before = world.actor("alice").await?;
    let worker = world.worker(&before.worker_id).await?;
    let group = worker_cgroup(worker.pid, &worker.id)?;
    let hers = members_without(&group, worker.pid);
    expect(!hers.is_empty(), "processes of alice while she runs", format!("none in {}", group.display()))?;
    report.command("openshell sandbox stop alice")?;
    let sandbox = world.sandbox("alice")?;
    world.gateway.stop(&sandbox).await?;
    let (suspended, _, _) = condition(&world.gateway.get(&sandbox).await?, "Suspended");
    expect(suspended == "True", "Suspended=True from the driver", format!("Suspended={suspended}"))?;
    let actor = world.actor("alice").await?;
    expect(actor.state() == ActorState::Suspended, "SUSPENDED", state_word(actor.state))?;
    let snapshot = actor.last_snapshot.clone().unwrap_or_default();
    let durable = snapshot.durability() == Durability::Durable && !snapshot.manifest_digest.is_empty();
    expect(durable, "a durable snapshot with a manifest", format!("{:?}", snapshot.durability()))?;
    let stored = disk_bytes(&world.info.dir.join("blobs/actors").join(&actor.uid));
    expect(stored > 0, "her pack and manifest in the blob store", "nothing there")?;
    let left: Vec<_> = hers.iter().filter(|process| process.is_alive()).collect();
    expect(left.is_empty(), "no process of hers left on the machine", format!("{left:?}"))?;
    let free = world.worker(&worker.id).await?;
    expect(free.actor_uid.is_empty() && free.alive, format!("{} free", worker.id), &free.actor_name)?;
    world.memory.alice_worker.clone_from(&worker.id);
    let summary = format!(
        "snapshot {} is durable ({}, {} in the store); {} processes gone, {} is free",
        snapshot.id,
        bytes(snapshot.bytes),
        bytes(stored),
        hers.len(),
        worker.id
    );
    let beat_facts = json!({
        "snapshot": snapshot.id, "snapshot_bytes": snapshot.bytes, "stored_bytes": stored,
        "processes_gone": hers.len(), "worker": worker.id,
    });
    Ok((summary, facts(beat_facts)))
}

/// Beat 6.
pub async fn cost(world: &mut World, report: &Report) -> Played {
    report.command(&format!("substrate -a {WORKSPACE} get actor alice"))?;
    let actor = world.actor("alice").await?;
    expect(actor.worker_id.is_empty(), "no worker", &actor.worker_id)?;
    expect(actor.memory_bytes == 0, "no memory", bytes(actor.memory_bytes))?;
    let holding: Vec<String> = world
        .workers()
        .await?
        .into_iter()
        .filter(|worker| worker.actor_uid == actor.uid)
        .map(|worker| worker.id)
        .collect();
    expect(holding.is_empty(), "no worker that holds her", holding.join(", "))?;
    let dir = world.info.dir.clone();
    let places = [dir.join("blobs/actors"), dir.join("node/snapshots"), dir.join("node/actors")];
    let disk: u64 = places.iter().map(|place| disk_bytes(&place.join(&actor.uid))).sum();
    expect(disk > 0, "bytes on disk", "none")?;
    let summary = format!("processes 0, memory 0, disk {}", bytes(disk));
    Ok((summary, facts(json!({"processes": 0, "memory_bytes": 0, "disk_bytes": disk}))))
}

/// Beat 7.
pub async fn second_question(world: &mut World, report: &Report) -> Played {
    let old = world.memory.alice_worker.clone();
    report.command(&format!("substrate cordon {old}"))?;
    world.control.cordon_worker(api::CordonWorkerRequest { id: old.clone(), uncordon: false }).await?;
    let message = "Which order was that?";
    let began = std::time::Instant::now();
    if world.gateway.stock().is_some() {
        // Who stopped a sandbox starts it: to its gateway it stays stopped until then.
        report.command("openshell sandbox start alice")?;
        let sandbox = world.sandbox("alice")?;
        world.gateway.start(&sandbox).await?;
    }
    report.command(&format!(
        "substrate -a {WORKSPACE} request alice /chat -d '{{\"message\": \"{message}\"}}'"
    ))?;
    let answer = world.chat("alice", message).await?;
    let wake_ms = began.elapsed().as_millis() as u64;
    let said = text(&answer, "answer");
    report.detail(&format!("alice: {said}"))?;
    let nonce = text(&answer, "nonce");
    expect(
        nonce == world.memory.alice_nonce,
        format!("nonce {}: her memory", world.memory.alice_nonce),
        &nonce,
    )?;
    expect(said.contains(ORDER), format!("an answer that refers to turn 1 ({ORDER})"), &said)?;
    let turns = number(&answer, "history_turns");
    expect(turns == 2, "history_turns 2", turns)?;
    world.memory.alice_turns = 2;
    let actor = world.actor("alice").await?;
    let elsewhere = !actor.worker_id.is_empty() && actor.worker_id != old;
    expect(elsewhere, format!("a worker that is not {old}"), &actor.worker_id)?;
    world.control.cordon_worker(api::CordonWorkerRequest { id: old.clone(), uncordon: true }).await?;
    world.memory.alice_worker.clone_from(&actor.worker_id);
    let exec_ms = asleep_and_ready(world, report).await?;
    let summary =
        format!("woke on {} instead of {old}, same nonce, answered in {wake_ms} ms", actor.worker_id);
    let mut beat_facts = json!({
        "answer": said, "from_worker": old, "to_worker": actor.worker_id, "nonce": nonce, "history_turns": turns,
        "wake_ms": wake_ms,
    });
    if let Some(exec_ms) = exec_ms {
        beat_facts["exec_asleep_ms"] = exec_ms.into();
    }
    Ok((summary, facts(beat_facts)))
}

/// Behind a gateway: alice falls asleep by herself, stays Ready, and an exec wakes her.
async fn asleep_and_ready(world: &mut World, report: &Report) -> Result<Option<u64>, Miss> {
    if world.gateway.stock().is_none() {
        return Ok(None);
    }
    let actor = world.actor("alice").await?;
    let reference = api::ActorRef { uid: actor.uid, ..Default::default() };
    let request =
        api::SuspendActorRequest { actor: Some(reference), cause: "idle".to_owned(), ..Default::default() };
    report.detail("alice falls asleep, as after an idle while")?;
    world.control.suspend_actor(request).await?;
    let asleep = world.actor("alice").await?;
    expect(asleep.state() == ActorState::Suspended, "SUSPENDED", state_word(asleep.state))?;
    let (ready, reason, _) = condition(&world.gateway.get(&world.sandbox("alice")?).await?, "Ready");
    expect(ready == "True", "Ready at the gateway while she sleeps", reason)?;
    report.command("openshell sandbox exec --name alice -- cat /run/ate/name")?;
    let began = std::time::Instant::now();
    let said = match world.gateway.stock() {
        Some(stock) => stock.exec("alice", &["cat", "/run/ate/name"], b"").await?,
        None => String::new(),
    };
    let exec_ms = began.elapsed().as_millis() as u64;
    expect(said == "alice", "exec to print alice", &said)?;
    let awake = world.actor("alice").await?;
    expect(awake.state() == ActorState::Running, "RUNNING", state_word(awake.state))?;
    world.memory.alice_worker.clone_from(&awake.worker_id);
    report.detail(&format!("asleep and Ready; woken and answered by exec in {exec_ms} ms"))?;
    Ok(Some(exec_ms))
}

/// Beat 10.
pub async fn delete(world: &mut World, report: &Report) -> Played {
    let sandbox = world.sandbox("alice")?;
    let uid = world.actor("alice").await?.uid;
    report.command("openshell sandbox delete alice")?;
    world.gateway.delete(&sandbox).await?;
    world.gateway.until_deleted(&sandbox.id).await?;
    let names: Vec<String> = world.gateway.list().await?.into_iter().map(|sandbox| sandbox.name).collect();
    expect(names == ["bob"], "only bob in the list", format!("{names:?}"))?;
    let answer = world.http("alice", "GET", "/status", None).await?;
    expect(answer.status == 404, "404 from the router", answer.status)?;
    let dir = world.info.dir.clone();
    for place in ["blobs/actors", "node/snapshots", "node/actors"] {
        let path = dir.join(place).join(&uid);
        let gone = || (!path.exists()).then_some(());
        expect(eventually(gone).await, format!("nothing of hers in {place}"), path.display())?;
    }
    let before = world.status("bob").await?;
    report.command("openshell sandbox stop bob && openshell sandbox start bob")?;
    let bob = world.sandbox("bob")?;
    world.gateway.stop(&bob).await?;
    world.gateway.start(&bob).await?;
    let status = world.status("bob").await?;
    let is_same = text(&status, "name") == "bob" && status["nonce"] == before["nonce"];
    expect(is_same, format!("bob to answer with nonce {}", before["nonce"]), &status)?;
    let template = world.memory.template.clone();
    report.command(&format!("substrate -a {WORKSPACE} get template {template}"))?;
    let request = api::GetTemplateRequest { atespace: WORKSPACE.into(), name: template.clone() };
    world.control.get_template(request).await?;
    let summary = format!(
        "gone from list, routes and disk; bob, stopped and started, answers; template {template} is still there"
    );
    Ok((summary, facts(json!({"template": template, "bob_ticks": number(&status, "ticks")}))))
}

/// Looks at something that has no event to wait for (a file, a log) until it is there, for at most ten seconds.
pub async fn eventually(mut look: impl FnMut() -> Option<()>) -> bool {
    let mut pace = tokio::time::interval(Duration::from_millis(50));
    for _ in 0..200 {
        pace.tick().await;
        if look().is_some() {
            return true;
        }
    }
    false
}

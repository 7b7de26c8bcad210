// SPDX-License-Identifier: Apache-2.0
//! What commands print, compared with what was agreed.
use super::*;

const NOW: i64 = 1_795_327_805_000;

fn columns(wide: bool, atespace: bool) -> Columns {
    Columns { wide, atespace, now_ms: NOW }
}

fn actors() -> Vec<Actor> {
    let alice = api::Actor {
        uid: "6b1c0f4e-7d1c-4a53-9d53-1e9f6a3b2c11".into(),
        atespace: "default".into(),
        name: "alice".into(),
        spec: Some(types::ActorSpec { template: "helpdesk".into(), ..Default::default() }),
        state: api::ActorState::Running as i32,
        generation: 3,
        worker_id: "w1".into(),
        node: "local".into(),
        last_snapshot: Some(api::Snapshot {
            id: "s7".into(),
            durability: types::Durability::Durable as i32,
            time_ms: NOW - 120_000,
            bytes: 12 << 20,
            ..Default::default()
        }),
        created_ms: NOW - 3_600_000,
        state_since_ms: NOW - 5_000,
        memory_bytes: 40 << 20,
        disk_bytes: 3 << 20,
        ports: vec![8080],
        sandbox_class: "gvisor".into(),
        wake_on_traffic: true,
        revision: 41,
        ..Default::default()
    };
    let bob = api::Actor {
        uid: "0f2f7fb6-55a1-4f5e-8d0b-8a6a0a8b9c22".into(),
        atespace: "team".into(),
        name: "bob".into(),
        state: api::ActorState::Exited as i32,
        exit: Some(types::ExitStatus { code: 3, ..Default::default() }),
        created_ms: NOW - 90_000,
        ..Default::default()
    };
    let carol = api::Actor {
        name: "carol".into(),
        state: api::ActorState::Resuming as i32,
        progress_step: "pulling_image".into(),
        progress_percent: 40,
        created_ms: NOW - 2_000,
        ..Default::default()
    };
    [alice, bob, carol].into_iter().map(Actor::from).collect()
}

#[test]
fn the_table_of_actors_is_what_a_person_reads() {
    let text = Actor::table(&actors(), columns(false, false)).render();
    assert_eq!(
        text,
        "\
NAME    STATE          AGE     WORKER   SNAPSHOT     MEMORY   DISK
alice   RUNNING        1h      w1       2m durable   40MiB    3.0MiB
bob     EXITED (3)     1m30s   -        -            0        0
carol   RESUMING 40%   2s      -        -            0        0
"
    );
}

#[test]
fn wide_and_all_atespaces_only_add_columns() {
    let text = Actor::table(&actors(), columns(true, true)).render();
    let header = text.lines().next().unwrap();
    assert!(header.starts_with("ATESPACE   NAME "), "{header}");
    assert!(header.ends_with("UID"), "{header}");
    assert!(text.lines().nth(1).unwrap().contains("6b1c0f4e-7d1c-4a53-9d53-1e9f6a3b2c11"));
}

#[test]
fn the_json_of_an_actor_is_stable() {
    let value = serde_json::to_value(&actors()[0]).unwrap();
    assert_eq!(
        value,
        serde_json::json!({
            "uid": "6b1c0f4e-7d1c-4a53-9d53-1e9f6a3b2c11", "atespace": "default", "name": "alice",
            "state": "RUNNING", "reason": "", "message": "", "generation": 3, "worker": "w1", "node": "local",
            "template": "helpdesk", "sandboxClass": "gvisor", "createdAt": "2026-11-22T05:10:05.000Z",
            "stateSince": "2026-11-22T06:10:00.000Z",
            "lastSnapshot": {
                "id": "s7", "actor": "", "actorUid": "", "atespace": "", "generation": 0,
                "durability": "durable", "capturedAt": "2026-11-22T06:08:05.000Z", "sizeBytes": 12_582_912,
                "storedBytes": 0, "tags": [], "node": null, "cause": "", "manifestDigest": null,
                "runtimeDigest": "",
            },
            "exit": null, "suspendedBy": null, "progress": null, "memoryBytes": 41_943_040,
            "diskBytes": 3_145_728, "ports": [8080], "labels": {}, "annotations": {}, "wakeOnTraffic": true,
            "revision": 41,
        })
    );
}

#[test]
fn a_workers_state_is_one_word() {
    let worker = |alive, actor: &str, cordoned| {
        Worker::from(api::Worker { alive, cordoned, actor_uid: actor.into(), ..Default::default() }).state
    };
    assert_eq!(worker(false, "u", false), "LOST");
    assert_eq!(worker(true, "u", true), "ASSIGNED");
    assert_eq!(worker(true, "", true), "CORDONED");
    assert_eq!(worker(true, "", false), "FREE");
}

#[test]
fn long_digests_are_cut_in_tables_only() {
    let digest = "a".repeat(64);
    assert_eq!(short_image(&format!("reg.example/app@sha256:{digest}")), "reg.example/app@aaaaaaaaaaaa");
    assert_eq!(short_image("oci:/images/app:latest"), "oci:/images/app:latest");
}

#[test]
fn every_state_has_a_word() {
    for state in 1..=10 {
        assert_ne!(state_word(state), "UNKNOWN");
    }
    assert_eq!(state_word(99), "UNKNOWN");
    assert_eq!(state_word(9), "CRASHED");
}

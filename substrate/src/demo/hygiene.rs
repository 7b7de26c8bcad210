// SPDX-License-Identifier: Apache-2.0
//! Beat 8: what an actor cannot reach, seen from inside and in the audit log.
//!
//! Every target that is denied here is first reached from this machine, so that it is the policy that denies it and
//! not its absence; and what the policy allows works.
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::{TcpStream, UdpSocket};

use super::beats::{Played, eventually, facts, text};
use super::network::{DENIED, DOCS, MODEL, NEIGHBOUR};
use super::report::{Miss, Report, expect};
use super::world::{World, listen_on};
use crate::failure::Doing as _;

/// How long a probe may take inside; a denial is quick.
const PROBE_MS: u64 = 4000;

/// One thing that bob tries.
struct Attempt {
    what: &'static str,
    probe: Value,
    /// What the audit record's destination, name or reason has to mention.
    mentions: String,
    /// Where it is, when it can be reached from this machine.
    control: Option<SocketAddr>,
}

/// Plays the beat.
pub async fn play(world: &mut World, report: &Report) -> Played {
    let at = world.internet.addresses;
    let (node, listener) = listen_on(SocketAddr::from((at.node(), 0))).await?;
    let played = attempts(world, report, node).await;
    listener.abort();
    played
}

async fn attempts(world: &mut World, report: &Report, node: SocketAddr) -> Played {
    let at = world.internet.addresses;
    let (elsewhere, v6) = (at.elsewhere(), at.elsewhere_v6());
    let reachable = |port: u16| Some(SocketAddr::from((elsewhere, port)));
    let list = [
        Attempt {
            what: "a name that is not allowed",
            probe: json!({"url": format!("http://{DENIED}/healthz")}),
            mentions: DENIED.to_owned(),
            control: reachable(80),
        },
        Attempt {
            what: "a raw address",
            probe: json!({"url": format!("http://{elsewhere}/healthz")}),
            mentions: format!("{elsewhere}:80"),
            control: reachable(80),
        },
        Attempt {
            what: "IPv6",
            probe: json!({"url": format!("tcp://[{v6}]:443")}),
            mentions: v6.to_string(),
            control: world.internet.has_v6.then(|| SocketAddr::from((v6, 443))),
        },
        Attempt {
            what: "UDP/53 to another resolver",
            probe: json!({"url": format!("udp-dns://{elsewhere}/{MODEL}")}),
            mentions: format!("{elsewhere}:53"),
            control: None,
        },
        Attempt {
            what: "DNS over HTTPS",
            probe: json!({"url": format!("doh://{elsewhere}/dns-query?name={MODEL}"), "insecure": true}),
            mentions: format!("{elsewhere}:443"),
            control: reachable(443),
        },
        Attempt {
            what: "the metadata address",
            probe: json!({"url": "http://169.254.169.254/latest/meta-data/"}),
            mentions: "169.254.169.254".to_owned(),
            control: None,
        },
        // Workers have the same inner addresses; alice's is as far away as her name.
        Attempt {
            what: "alice's worker, by address",
            probe: json!({"url": "tcp://169.254.17.1:8080"}),
            mentions: "169.254.17.1:8080".to_owned(),
            control: None,
        },
        Attempt {
            what: "alice's worker, by her route's name",
            probe: json!({"url": "http://alice.demo.actors.localhost/status"}),
            mentions: "alice.demo.actors.localhost".to_owned(),
            control: None,
        },
        Attempt {
            what: "the node",
            probe: json!({"url": format!("tcp://{node}")}),
            mentions: node.to_string(),
            control: Some(node),
        },
        Attempt {
            what: "a neighbour of an allowed name, by SNI",
            probe: json!({
                "url": format!("https://{DOCS}/healthz"), "sni": NEIGHBOUR, "host": NEIGHBOUR, "insecure": true,
            }),
            mentions: NEIGHBOUR.to_owned(),
            control: Some(SocketAddr::from((at.allowed(), 443))),
        },
        Attempt {
            what: "a neighbour of an allowed name, by Host",
            probe: json!({"url": format!("http://{MODEL}/healthz"), "host": NEIGHBOUR}),
            mentions: NEIGHBOUR.to_owned(),
            control: Some(SocketAddr::from((at.allowed(), 80))),
        },
    ];
    other_resolver_answers(SocketAddr::from((elsewhere, 53))).await?;
    let bob = world.actor("bob").await?;
    let mut denials = Vec::new();
    for attempt in &list {
        if let Some(control) = attempt.control {
            let reached = tokio::time::timeout(Duration::from_secs(3), TcpStream::connect(control)).await;
            expect(
                matches!(reached, Ok(Ok(_))),
                format!("{} ({control}) to be reachable from this machine", attempt.what),
                format!("{reached:?}"),
            )?;
        }
        denials.push(try_one(world, report, attempt, &bob.uid).await?);
    }
    let allowed = [
        json!({"url": format!("http://{MODEL}/healthz")}),
        json!({"url": format!("https://{DOCS}/healthz"), "insecure": true}),
    ];
    for probe in allowed {
        let seen = probe_from_bob(world, &probe).await?;
        expect(seen["ok"] == true, format!("{} to be reached: it is allowed", probe["url"]), &seen)?;
        report.detail(&format!("reached: {} ({} ms)", text(&probe, "url"), seen["ms"]))?;
    }
    let summary =
        format!("{} ways out denied and written down with bob's name; the allowed names work", list.len());
    Ok((summary, facts(json!({"denied": denials, "allowed": [MODEL, DOCS]}))))
}

async fn probe_from_bob(world: &World, probe: &Value) -> Result<Value, Miss> {
    let mut request = probe.clone();
    request["timeout_ms"] = PROBE_MS.into();
    world.json("bob", "POST", "/probe", Some(&request)).await
}

async fn try_one(world: &World, report: &Report, attempt: &Attempt, uid: &str) -> Result<Value, Miss> {
    let (_, offset) = world.audit(0)?;
    let seen = probe_from_bob(world, &attempt.probe).await?;
    let url = text(&attempt.probe, "url");
    expect(seen["ok"] == false, format!("{} ({url}) to be denied", attempt.what), &seen)?;
    let mut record = Value::Null;
    let is_recorded = eventually(|| {
        let (records, _) = world.audit(offset).ok()?;
        record = records.into_iter().find(|record| is_denial(record, uid, &attempt.mentions))?;
        Some(())
    })
    .await;
    let records = world.audit(offset)?.0;
    expect(
        is_recorded,
        format!("a denial of bob's that mentions {} in logs/egress-audit.jsonl", attempt.mentions),
        format!("{}: {}", attempt.what, Value::from(records)),
    )?;
    report.detail(&format!(
        "denied: {}: {url} ({} in {} ms)",
        attempt.what,
        text(&seen, "kind"),
        seen["ms"]
    ))?;
    Ok(json!({
        "what": attempt.what, "url": url, "seen": seen["kind"], "probe_ms": seen["ms"],
        "recorded": record["destination"], "reason": record["reason"],
    }))
}

/// Whether a record is a denial of this actor, under its name, about this.
fn is_denial(record: &Value, uid: &str, mentions: &str) -> bool {
    let about = ["destination", "name", "reason"];
    record["verdict"] == "denied"
        && record["actor"] == "bob"
        && record["uid"] == uid
        && about.iter().any(|key| record[*key].as_str().is_some_and(|value| value.contains(mentions)))
}

/// The resolver that bob must not ask does answer, here.
async fn other_resolver_answers(server: SocketAddr) -> Result<(), Miss> {
    let socket =
        UdpSocket::bind((IpAddr::from([0, 0, 0, 0]), 0)).await.doing(|| "cannot open a socket".to_owned())?;
    // One question for A of a name (RFC 1035, section 4.1).
    let mut query = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in MODEL.split('.') {
        query.push(label.len() as u8);
        query.extend(label.as_bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    socket.send_to(&query, server).await.doing(|| format!("cannot ask {server}"))?;
    let mut reply = [0; 512];
    let answered = tokio::time::timeout(Duration::from_secs(3), socket.recv_from(&mut reply)).await;
    let is_answer = matches!(answered, Ok(Ok((count, _))) if count > 12 && reply[7] > 0);
    expect(is_answer, format!("{server} to answer DNS queries of this machine"), format!("{answered:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_counts_only_with_the_actors_own_name_and_uid() {
        let record = json!({
            "verdict": "denied", "actor": "bob", "uid": "u1", "destination": "203.0.113.66:80", "reason": "no rule",
        });
        assert!(is_denial(&record, "u1", "203.0.113.66:80"));
        assert!(!is_denial(&record, "u2", "203.0.113.66:80"));
        assert!(!is_denial(&record, "u1", "203.0.113.67"));
        for (key, value) in [("verdict", "allowed"), ("actor", "alice")] {
            let mut other = record.clone();
            other[key] = value.into();
            assert!(!is_denial(&other, "u1", "203.0.113.66:80"), "{key}");
        }
    }
}

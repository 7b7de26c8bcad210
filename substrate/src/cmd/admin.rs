// SPDX-License-Identifier: Apache-2.0
//! What administrators decide: quotas, and that a node will not come back.
use substrate_proto::ateapi as api;
use substrate_proto::ateapi::admin_client::AdminClient;

use crate::args::{Global, NodeLost, Quota};
use crate::client::{connect, connect_admin};
use crate::cmd::{machine_text, print};
use crate::failure::Failure;
use crate::quantity::bytes;

/// Limits and what is used of them, for programs.
#[derive(serde::Serialize)]
#[serde(rename_all = "camelCase")]
struct Shown {
    atespace: String,
    quota: Limits,
    usage: Used,
}

#[derive(serde::Serialize)]
#[serde(rename_all = "camelCase")]
struct Limits {
    actors: u32,
    running: u32,
    snapshot_bytes: u64,
    wakeups_per_s: u32,
}

#[derive(serde::Serialize)]
#[serde(rename_all = "camelCase")]
struct Used {
    actors: u64,
    running: u64,
    snapshot_bytes: u64,
}

fn of(limit: u64, show: impl Fn(u64) -> String) -> String {
    if limit == 0 { "no limit".to_owned() } else { format!("of {}", show(limit)) }
}

/// `substrate quota`.
///
/// # Errors
/// As the control plane answers.
pub async fn quota(options: Quota, global: &Global) -> Result<(), Failure> {
    let name = options.atespace;
    let now = connect(global).await?.get_atespace(api::GetAtespaceRequest { name: name.clone() }).await?;
    let mut atespace = now.into_inner();
    let old = atespace.quota.unwrap_or_default();
    let new = api::Quota {
        actors: options.actors.unwrap_or(old.actors),
        running: options.running.unwrap_or(old.running),
        snapshot_bytes: options.snapshot_bytes.unwrap_or(old.snapshot_bytes),
        wakeups_per_s: options.wakeups_per_s.unwrap_or(old.wakeups_per_s),
    };
    if new != old {
        let mut client: AdminClient<_> = connect_admin(global).await?;
        let request = api::SetQuotaRequest { atespace: name, quota: Some(new) };
        atespace = client.set_quota(request).await?.into_inner();
    }
    let used = atespace.usage.unwrap_or_default();
    if global.output.is_machine() {
        let shown = Shown {
            atespace: atespace.name,
            quota: Limits {
                actors: new.actors,
                running: new.running,
                snapshot_bytes: new.snapshot_bytes,
                wakeups_per_s: new.wakeups_per_s,
            },
            usage: Used { actors: used.actors, running: used.running, snapshot_bytes: used.snapshot_bytes },
        };
        return print(&machine_text(&shown, global.output)?);
    }
    let number = |count: u64| count.to_string();
    print(&format!(
        "atespace/{}\n  actors          {} {}\n  running         {} {}\n  snapshot bytes  {} {}\n  starts per s    {}\n",
        atespace.name,
        used.actors,
        of(new.actors.into(), number),
        used.running,
        of(new.running.into(), number),
        bytes(used.snapshot_bytes),
        of(new.snapshot_bytes, bytes),
        if new.wakeups_per_s == 0 { "no limit".to_owned() } else { new.wakeups_per_s.to_string() },
    ))
}

/// `substrate node-lost`.
///
/// # Errors
/// As the control plane answers: the node is connected, or its lease may still run.
pub async fn node_lost(options: NodeLost, global: &Global) -> Result<(), Failure> {
    let mut client: AdminClient<_> = connect_admin(global).await?;
    let request = api::DeclareNodeLostRequest { node: options.node.clone() };
    let answer = client.declare_node_lost(request).await?.into_inner();
    if global.output.is_machine() {
        let value = serde_json::json!({
            "node": options.node, "ended": answer.ended, "snapshotsLost": answer.snapshots_lost
        });
        return print(&machine_text(&value, global.output)?);
    }
    print(&format!(
        "node/{} is lost: {} assignments ended, {} snapshots were only there\n",
        options.node, answer.ended, answer.snapshots_lost
    ))
}

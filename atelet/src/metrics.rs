// SPDX-License-Identifier: Apache-2.0
//! What the node agent counts. Names and meaning are in docs/metrics.md. Whoever runs it installs a recorder (the
//! `metrics` crate); without one all of this costs nothing.
//!
//! No label names a tenant: metrics are read by people who may not know what runs, and a fleet has too many actors.
use std::time::Instant;

use metrics::{counter, gauge, histogram};

use crate::disk::Usage as Disk;
use crate::image::Usage as Images;

fn result(ok: bool) -> &'static str {
    if ok { "ok" } else { "failed" }
}

/// A start ended. `from`: `image`, `node` or `durable`.
pub(crate) fn activation(from: &'static str, ok: bool, begun: Instant) {
    histogram!("substrate_node_activation_seconds", "from" => from, "result" => result(ok))
        .record(begun.elapsed());
}

/// A checkpoint ended. `mode`: `stop` or `keep`.
pub(crate) fn checkpoint(mode: &'static str, ok: bool, begun: Instant) {
    histogram!("substrate_node_checkpoint_seconds", "mode" => mode, "result" => result(ok))
        .record(begun.elapsed());
}

/// An upload ended; bytes of the snapshot, and those that were written to the store.
pub(crate) fn upload(ended: Option<(u64, u64)>, begun: Instant) {
    histogram!("substrate_node_upload_seconds", "result" => result(ended.is_some())).record(begun.elapsed());
    if let Some((bytes, stored)) = ended {
        counter!("substrate_node_snapshot_bytes_total").increment(bytes);
        counter!("substrate_node_stored_bytes_total").increment(stored);
    }
}

/// A snapshot was fetched from the store, with its bytes; or could not be.
pub(crate) fn fetch(bytes: Option<u64>, begun: Instant) {
    histogram!("substrate_node_fetch_seconds", "result" => result(bytes.is_some())).record(begun.elapsed());
    counter!("substrate_node_fetched_bytes_total").increment(bytes.unwrap_or(0));
}

/// A worker was lost.
pub(crate) fn worker_lost() {
    counter!("substrate_node_workers_lost_total").increment(1);
}

/// Something was collected. `kind`: `image` or `snapshot`.
pub(crate) fn collected(kind: &'static str, bytes: u64) {
    counter!("substrate_node_collected_bytes_total", "kind" => kind).increment(bytes);
}

/// How the node stands.
pub(crate) fn standing(
    disk: Option<Disk>,
    reserve: u64,
    images: &Images,
    workers: (usize, usize),
    lease_s: f64,
) {
    if let Some(disk) = disk {
        gauge!("substrate_node_disk_free_bytes").set(disk.free as f64);
        gauge!("substrate_node_disk_used_bytes").set(disk.used as f64);
    }
    gauge!("substrate_node_disk_reserve_bytes").set(reserve as f64);
    gauge!("substrate_node_images").set(images.images as f64);
    gauge!("substrate_node_image_layers").set(images.layers as f64);
    gauge!("substrate_node_image_bytes").set(images.bytes as f64);
    counter!("substrate_node_image_pulled_bytes_total").absolute(images.pulled_bytes);
    counter!("substrate_node_image_extractions_total").absolute(images.extractions);
    let (up, all) = workers;
    gauge!("substrate_node_workers", "state" => "up").set(up as f64);
    gauge!("substrate_node_workers", "state" => "down").set((all - up) as f64);
    gauge!("substrate_node_lease_seconds").set(lease_s);
}

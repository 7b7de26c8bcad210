// SPDX-License-Identifier: Apache-2.0
//! One worker slot: boot, checkpoint, restore, freeze and terminate one actor, class-neutrally.
//!
//! ```text
//!  node agent ── gRPC ──▶ service ──▶ slot (one task) ──▶ state (pure)
//!                                      │ └ work ──▶ runtime ◀── gvisor (runsc), microvm (VMM, agent)
//!  router ── ingress.sock ─▶ ingress ──┤                 │
//!  actor ─── TCP, DNS, :80 ▶ egress,   occupancy         └─▶ launcher ─▶ processes in the actor's cgroup
//!                            dns, nflog, endpoint
//! ```
//! [`worker`] is the process around it. [`cgroup`] is also what the node agent fences with.
#![deny(unsafe_code)]

pub mod cgroup;
pub mod children;
pub mod container;
pub mod dns;
pub mod egress;
pub mod endpoint;
pub mod error;
pub mod exec;
pub mod gvisor;
pub mod ingress;
pub mod launcher;
pub mod lease;
pub mod microvm;
mod mounts;
pub mod netlink;
pub mod network;
pub mod nflog;
pub mod occupancy;
pub mod readiness;
pub mod runtime;
pub mod seccomp;
mod seqpacket;
pub mod service;
pub mod slot;
mod sockets;
pub mod state;
pub mod sys;
pub mod volume;
pub mod worker;

pub use sys::boottime_ns;
pub use worker::WorkerRecord;

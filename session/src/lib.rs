// SPDX-License-Identifier: Apache-2.0
//! Keeps the session of an OpenShell supervisor alive while its sandbox sleeps.
//!
//! A stock gateway takes a sandbox for Ready as long as its supervisor holds a stream to it, and reaches into the
//! sandbox by asking for relays on that stream. A stock supervisor that finds its connection broken waits, longer each
//! time. So a sandbox that sleeps has to keep its connection, on both sides:
//!
//! ```text
//!  in the sandbox (memory is in the snapshot)                    beside the driver (never on the node left behind)
//! ┌─────────────────────────────────────────┐                   ┌────────────────────────────────────────────┐
//! │ supervisor ──HTTP/2 on a socket─▶ shim ◀┼──link over a──────┼─ hub ──HTTP/2 (TLS)──▶ gateway             │
//! └─────────────────────────────────────────┘  connection that  └────────────────────────────────────────────┘
//!                                              comes and goes      answers pings, keeps the session, wakes
//! ```
//!
//! * **HTTP/2 ends in the shim** ([`shim`]), so what is known of streams is part of the snapshot. Between shim and hub
//!   run streams ([`mux`]) over a link ([`link`]) that numbers, acknowledges and replays, so that a connection may break
//!   at any byte, and the sandbox may be frozen at any instruction, without a byte lost or doubled.
//! * **The hub dials**, through the worker's ingress, when the control plane's watch says that the actor is up: nothing
//!   in the sandbox has to know an address, to be let out, or to retry; the slot has checked actor and generation; and
//!   a key of the sandbox's own proves each to the other ([`wire`]).
//! * **The hub owns the session at the gateway** ([`hub::control`]). It is opened with the supervisor's Hello and stays
//!   while the sandbox sleeps, moves or is restored. The only thing that wakes an actor is a relay.
//!
//! ```text
//!                   first Hello                     actor suspended by itself
//!  (no session) ───────────────▶ Ready, connected ──────────────────────────▶ Ready, asleep
//!        ▲                          ▲        │  ▲                                │
//!        │ deleted, ended           │        │  └──── dialled, frames replayed ◀─┘ RelayOpen: ResumeActor
//!        │                          │        │ StopSandbox
//!        │         dialled, Hello   │        ▼
//!        └──────────────────────────┴── stopped: the session is given up, the link is kept
//! ```
//!
//! **When it cannot go on.** A sandbox restored to an older state than the hub knows of (its node was lost), or booted
//! afresh, begins a new link: its calls fail with UNAVAILABLE, the supervisor says Hello again, and is told at once that
//! the session it had goes on. A hub that was killed takes the gateway's legs with it: running sandboxes say Hello again
//! in a second or two, sleeping ones get their session back when the hub is back. The gateway gone and back: the hub
//! opens the legs again with the last Hello, and no supervisor notices.
//!
//! **Bounds.** Per stream and direction 128 KiB wait at most, 256 streams per sandbox, 1 MiB per control message.
#![forbid(unsafe_code)]

pub mod grpc;
pub mod hub;
pub mod link;
pub mod mux;
pub mod shim;
pub mod wire;

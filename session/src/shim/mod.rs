// SPDX-License-Identifier: Apache-2.0
//! The shim: first process of a sandbox with a supervisor.
//!
//! It starts the supervisor as its child, serves it HTTP/2 on a Unix socket, and waits for the hub on a port of its own.
//! All of that is memory of the sandbox and connections within it, so a snapshot holds it, and the supervisor never
//! notices that it slept. The hub's connection is the only thing that is lost.
pub mod hub_side;
pub mod supervise;
pub mod supervisor_side;

/// Where the supervisor finds its gateway; its directory is root's alone, as the supervisor is.
pub const SUPERVISOR_SOCKET: &str = "/run/substrate-session/gateway.sock";
/// Where the hub finds the shim.
pub const HUB_PORT: u16 = 48_082;
/// The shim's word for being what it starts, in the place of a supervisor: it holds a connection to the shim.
pub const STAND_IN: &str = "stand-in";
/// What OpenShell's supervisor runs every command with (crates/openshell-supervisor-process/src/ssh.rs at 2f7fb655).
pub const SHELL: &str = "/bin/bash";
/// What the hub's port answers to an HTTP GET: the shim's loop turns.
pub const READY_PATH: &str = "/ready";

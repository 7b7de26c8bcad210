// SPDX-License-Identifier: Apache-2.0
//! The init and agent of a microVM: the only program that is not the workload's.
//!
//! ```text
//! kernel ─▶ init: modules, root in memory ─▶ agent: hello ─▶ boot: clock, entropy, eth0, disks, containers
//!                                              │              (stage.rs, one process for each: namespaces, mounts,
//!                                              │               user, capabilities, execve)
//!                                              └─▶ exec, logs, exits │ quiesce … resume around a snapshot
//! ```
//! As pid 1 it must not end: what it cannot do it says on the console and by ending, which the kernel makes a panic and
//! the VMM the end of the machine. There is no shell in here.
#![deny(unsafe_code)]

mod agent;
mod boot;
mod cache;
mod processes;
mod stage;
mod sys;

use std::io::Write as _;
use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(stage::ARGUMENT) {
        return stage::run();
    }
    let begun = boot::prepare().inspect(|_| drop(std::thread::spawn(cache::give_back)));
    let Err(error) = begun.and_then(agent::serve);
    say(&error);
    ExitCode::FAILURE
}

/// Writes a line to the kernel's log, which goes to the console.
fn say(text: &str) {
    if let Ok(mut kmsg) = std::fs::OpenOptions::new().write(true).open("/dev/kmsg") {
        // Nobody else can be told.
        let _ = kmsg.write_all(format!("<2>ateom-guest: {text}\n").as_bytes());
    }
}

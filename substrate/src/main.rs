// SPDX-License-Identifier: Apache-2.0
//! The command line of substrate and its one-machine process (design, section 10).
//!
//! ```text
//!  main ──▶ args (clap) ──▶ up      wires driver, ateapi, atelet, atenet into one process
//!                      ├──▶ doctor  what this machine lacks; the same checks are `up`'s preflight
//!                      ├──▶ demo    the helpdesk demo: starts its own `up`, is a client of everything
//!                      └──▶ cmd/*   clients of `ateapi.v1.Control` over RUN/ateapi.sock
//! ```
//!
//! There is no logic here that another crate owns: commands ask, `view` and `table` show. A command ends in an exit
//! code of [`failure::Exit`]; everything else a command says about a failure is one message, its cause and the way out.
#![forbid(unsafe_code)]

mod args;
mod client;
mod cmd;
mod demo;
mod doctor;
mod document;
mod failure;
mod http;
mod progress;
mod quantity;
mod table;
#[cfg(test)]
mod testserver;
mod time;
mod up;
mod view;

use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _};

use crate::args::{Args, Command};
use crate::failure::Failure;

fn main() -> ExitCode {
    let matches = Args::command().get_matches();
    let args = match Args::from_arg_matches(&matches) {
        Ok(args) => args,
        Err(error) => error.exit(),
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return Failure::general(format!("cannot start the async runtime: {error}")).report(),
    };
    let code = match runtime.block_on(run(args)) {
        Ok(code) => code,
        Err(failure) => failure.report(),
    };
    // Reading from a terminal cannot be cancelled: nothing is left that would have to be waited for.
    runtime.shutdown_background();
    code
}

async fn run(args: Args) -> Result<ExitCode, Failure> {
    let Args { global, command } = args;
    let done = |()| ExitCode::SUCCESS;
    match command {
        Command::Up(options) => Box::pin(up::run(*options, &global)).await,
        Command::Doctor(options) => doctor::run(&options, &global).await,
        Command::Demo(options) => demo::run(options).await,
        Command::DemoInternet(options) => demo::internet::serve(options).await.map(done),
        Command::Get(options) => cmd::get::run(options, &global).await.map(done),
        Command::Describe(options) => cmd::describe::run(options, &global).await.map(done),
        Command::Create(options) => cmd::create::run(options, &global).await.map(done),
        Command::Delete(options) => cmd::verbs::delete(options, &global).await.map(done),
        Command::Gc(options) => cmd::gc::run(options, &global).await.map(done),
        Command::Fsck(options) => cmd::fsck::run(options, &global).await,
        Command::RotateKey(options) => cmd::rotate_key::run(options, &global).await.map(done),
        Command::Suspend(options) => cmd::verbs::suspend(options, &global).await.map(done),
        Command::Pause(options) => cmd::verbs::pause(options, &global).await.map(done),
        Command::Resume(options) => cmd::verbs::resume(options, &global).await.map(done),
        Command::Checkpoint(options) => cmd::verbs::checkpoint(options, &global).await.map(done),
        Command::Promote(options) => cmd::verbs::promote(options, &global).await.map(done),
        Command::Reset(options) => cmd::verbs::reset(options, &global).await.map(done),
        Command::Revert(options) => cmd::verbs::revert(options, &global).await.map(done),
        Command::Fork(options) => cmd::verbs::fork(options, &global).await.map(done),
        Command::Tag(options) => cmd::verbs::tag(options, &global).await.map(done),
        Command::Untag(options) => cmd::verbs::untag(options, &global).await.map(done),
        Command::Cordon(options) => cmd::verbs::cordon(options, &global, false).await.map(done),
        Command::Uncordon(options) => cmd::verbs::cordon(options, &global, true).await.map(done),
        Command::Drain(options) => cmd::verbs::drain(options, &global).await.map(done),
        Command::Quota(options) => cmd::admin::quota(options, &global).await.map(done),
        Command::NodeLost(options) => cmd::admin::node_lost(options, &global).await.map(done),
        Command::Exec(options) => cmd::exec::run(options, &global).await,
        Command::Cp(options) => cmd::cp::run(options, &global).await.map(done),
        Command::Logs(options) => cmd::logs::run(options, &global).await.map(done),
        Command::Events(options) => cmd::get::events(options, &global).await.map(done),
        Command::Apply(options) => cmd::apply::run(options, &global).await.map(done),
        Command::Backup(options) => cmd::backup::backup(&options, &global).await.map(done),
        Command::Restore(options) => cmd::backup::restore(&options, &global).await.map(done),
        Command::Token(options) => cmd::request::token(&options, &global).map(done),
        Command::Request(options) => cmd::request::run(options, &global).await.map(done),
        Command::Version => cmd::version::run(&global).await.map(done),
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "substrate", &mut script);
            cmd::print(&String::from_utf8_lossy(&script)).map(done)
        }
    }
}

// SPDX-License-Identifier: Apache-2.0
//! The process that becomes a VMM: this same program under another argument, started by the launcher and so born in the
//! actor's control group.
//!
//! It enters the machine's network namespace, which is empty (the link to the worker's comes as descriptor 0 and is
//! handed on as [`TAP`]), opens the files that the VMM must be able to open again when it is nobody, leaves core dumps
//! and new privileges behind, and goes to the machine's directory, so that socket paths on the command line are short.
use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use nix::sched::CloneFlags;
use nix::sys::resource::{Resource, setrlimit};

/// First argument of the program; then network namespace, directory, program, the number of files, each as "r" or "w"
/// before its path, the number of environment variables, each as "K=V", and the program's arguments.
pub const ARGUMENT: &str = "vmm";
/// The descriptor of the link that the VMM gets.
pub const TAP: i32 = 3;

/// The descriptor of the first file that is opened for the VMM; the others follow. Beyond what a process inherits by
/// accident.
pub const FILES: i32 = 200;

/// The command line for a program in a jail, which finds `files` (whether writable, and where) open from [`FILES`] on and
/// has no environment but this.
pub fn command(
    network_namespace: &Path,
    directory: &Path,
    program: &Path,
    files: &[(bool, PathBuf)],
    environment: &[(&str, String)],
    args: Vec<String>,
) -> Vec<String> {
    let path = |path: &Path| path.display().to_string();
    let mut argv = vec![
        "/proc/self/exe".to_owned(),
        ARGUMENT.to_owned(),
        path(network_namespace),
        path(directory),
        path(program),
        files.len().to_string(),
    ];
    argv.extend(
        files.iter().map(|(write, file)| format!("{}{}", if *write { "w" } else { "r" }, path(file))),
    );
    argv.push(environment.len().to_string());
    argv.extend(environment.iter().map(|(name, value)| format!("{name}={value}")));
    argv.extend(args);
    argv
}

/// Becomes the program.
///
/// # Errors
/// With the reason, for the VMM's log.
pub fn enter(mut args: impl Iterator<Item = String>) -> anyhow::Result<()> {
    let (Some(namespace), Some(directory), Some(program), Some(files)) =
        (args.next(), args.next(), args.next(), args.next())
    else {
        bail!("{ARGUMENT} needs a network namespace, a directory, a program and a number of files");
    };
    let files: i32 = files.parse().with_context(|| format!("{files:?} is not a number of files"))?;
    let file = File::open(&namespace).with_context(|| format!("cannot open {namespace}"))?;
    nix::sched::setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("cannot enter {namespace}"))?;
    std::env::set_current_dir(&directory).with_context(|| format!("cannot enter {directory}"))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).context("cannot turn core dumps off")?;
    nix::sys::prctl::set_no_new_privs().context("cannot set no_new_privs")?;
    let tap = nix::fcntl::fcntl(std::io::stdin(), nix::fcntl::FcntlArg::F_DUPFD(TAP))
        .context("cannot hand the link on")?;
    anyhow::ensure!(tap == TAP, "descriptor {TAP} is taken: {tap}");
    for number in 0..files {
        let name = args.next().context("fewer files than announced")?;
        let (mode, path) = name.split_at_checked(1).context("a file without a name")?;
        let file = File::options().read(true).write(mode == "w").open(path);
        let file = file.with_context(|| format!("cannot open {path}"))?;
        let fd = nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_DUPFD(FILES + number));
        let fd = fd.with_context(|| format!("cannot hand {path} on"))?;
        anyhow::ensure!(fd == FILES + number, "descriptor {} is taken", FILES + number);
    }
    let count = args.next().context("no number of environment variables")?;
    let mut environment = Vec::new();
    for _ in 0..count.parse().with_context(|| format!("{count:?} is not a number of variables"))? {
        let variable = args.next().context("fewer variables than announced")?;
        let (name, value) = variable.split_once('=').context("a variable without a value")?;
        environment.push((name.to_owned(), value.to_owned()));
    }
    let null = File::open("/dev/null").context("cannot open /dev/null")?;
    anyhow::ensure!(null.as_raw_fd() != TAP, "descriptor {TAP} is taken");
    let error = Command::new(&program).args(args).env_clear().envs(environment).stdin(null).exec();
    Err(error).with_context(|| format!("cannot execute {program}"))
}

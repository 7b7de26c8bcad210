// SPDX-License-Identifier: Apache-2.0
//! `substrate doctor`: what this machine lacks, each with the command that installs it.
//!
//! ```text
//!  probe (looks at the machine) ──▶ Facts ──▶ check (pure) ──▶ checks ──▶ table, JSON, or up's preflight
//! ```
mod microvm;
mod probe;

pub use microvm::{Microvm, Named};
pub use probe::{Runtime, gather, runtime, workspace};

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;

use crate::args::{Doctor, Global, Output};
use crate::cmd::{machine_text, print};
use crate::failure::{Exit, Failure};
use crate::quantity::bytes;
use crate::table::Table;

/// Oldest runsc that is good: before it, a third of suspended tokio programs hang after a restore (docs/runsc.md).
pub const OLDEST_RUNSC: u32 = 20_260_401;
/// Free bytes without which nothing starts.
pub const LEAST_DISK: u64 = 512 << 20;
/// Free bytes below which it will soon be tight.
pub const GOOD_DISK: u64 = 4 << 30;

/// What was found out about a machine.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Effective user id.
    pub uid: u32,
    /// Kernel release.
    pub kernel: String,
    /// Command that installs packages, for example `apt-get install -y`.
    pub installer: Option<String>,
    /// `scripts/setup` of a checkout, where there is one.
    pub setup_script: Option<PathBuf>,
    /// runsc, or why it was not found.
    pub runsc: Result<Runsc, String>,
    /// ateom-gvisor, or why it was not found.
    pub ateom: Result<PathBuf, String>,
    /// What the microVM class needs, or why it cannot be used.
    pub microvm: Result<Microvm, String>,
    /// First line of `nft --version`, or why there is none.
    pub nft: Result<String, String>,
    /// Whether `nft list tables` works; not tried without root.
    pub nft_works: Option<Result<(), String>>,
    /// cgroup v2 mount, if any.
    pub cgroup2: Option<PathBuf>,
    /// Whether a child of it can be frozen and killed; not tried without root.
    pub cgroup2_works: Option<Result<(), String>>,
    /// Whether cgroup v1's freezer is mounted.
    pub freezer1: bool,
    /// Resource controllers that any hierarchy offers.
    pub controllers: Vec<String>,
    /// Whether the kernel has overlayfs.
    pub overlayfs: bool,
    /// Whether a network namespace can be made; not tried without root.
    pub netns: Option<Result<(), String>>,
    /// Where state will be.
    pub dir: PathBuf,
    /// Free bytes there, or why that is unknown.
    pub free: Result<u64, String>,
    /// What the driver's probes saw of each runtime, by digest.
    pub probes: BTreeMap<String, openshell_driver_substrate::probe::Verdict>,
    /// Whether `ip` is there; the demo uses it.
    pub ip: bool,
    /// Whether `python3` is there; the demo uses it.
    pub python: bool,
}

/// A runsc that was found.
#[derive(Debug, Clone)]
pub struct Runsc {
    /// Where.
    pub path: PathBuf,
    /// What `runsc --version` says.
    pub version: String,
    /// Its date as yyyymmdd, when its version names one.
    pub date: Option<u32>,
    /// Whether it knows `checkpoint` with what we use of it.
    pub has_checkpoint: bool,
    /// What it said where it did not.
    pub complaint: String,
}

/// How one check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Works, but.
    Warning,
    /// `up` refuses to start.
    Missing,
    /// Could not be looked at.
    Unknown,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Check {
    /// What is looked at.
    pub name: &'static str,
    /// How it came out.
    pub verdict: Verdict,
    /// What was found, or what is wrong, in one sentence.
    pub message: String,
    /// What to do about it: a command where one does it.
    pub way_out: Option<String>,
}

impl Check {
    fn ok(name: &'static str, message: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Ok, message: message.into(), way_out: None }
    }

    fn with(
        verdict: Verdict,
        name: &'static str,
        message: impl Into<String>,
        way_out: impl Into<String>,
    ) -> Self {
        Self { name, verdict, message: message.into(), way_out: Some(way_out.into()) }
    }

    fn missing(name: &'static str, message: impl Into<String>, way_out: impl Into<String>) -> Self {
        Self::with(Verdict::Missing, name, message, way_out)
    }
}

/// Judges a machine.
pub fn check(facts: &Facts) -> Vec<Check> {
    let mut checks = vec![
        check_root(facts),
        check_kernel(facts),
        check_runsc(facts),
        check_ateom(facts),
        microvm::check(facts),
        check_nft(facts),
        check_cgroup(facts),
        check_controllers(facts),
        check_overlayfs(facts),
        check_netns(facts),
        check_disk(facts),
        check_demo(facts),
    ];
    checks.extend(facts.probes.iter().map(|(digest, verdict)| check_probe(digest, verdict)));
    checks
}

/// What `supervisor.mode = "auto"` of the driver rests on.
fn check_probe(digest: &str, verdict: &openshell_driver_substrate::probe::Verdict) -> Check {
    let sentence = verdict.sentence(digest);
    match verdict.problem {
        None => Check::ok("supervisor", format!("auto: process mode; {sentence}")),
        Some(_) => Check::with(
            Verdict::Warning,
            "supervisor",
            format!("auto: none; {sentence}"),
            "pin a runtime that restores it (docs/runsc.md)",
        ),
    }
}

fn install(facts: &Facts, package: &str) -> String {
    match &facts.installer {
        Some(command) => format!("{command} {package}"),
        None => format!("install the package {package} of your distribution"),
    }
}

fn check_root(facts: &Facts) -> Check {
    if facts.uid == 0 {
        return Check::ok("root", "runs as root");
    }
    Check::missing(
        "root",
        format!("this is uid {}, but sandboxes, namespaces and cgroups need root", facts.uid),
        "run it with sudo",
    )
}

fn check_kernel(facts: &Facts) -> Check {
    let mut numbers = facts.kernel.split(['.', '-']).map(|part| part.parse::<u32>().ok());
    match (numbers.next().flatten(), numbers.next().flatten()) {
        // cgroup.kill is from 5.14; pidfd and openat2 are older.
        (Some(major), Some(minor)) if (major, minor) >= (5, 14) => {
            Check::ok("kernel", format!("Linux {}", facts.kernel))
        }
        (Some(_), Some(_)) => Check::missing(
            "kernel",
            format!("Linux {} is too old, 5.14 or newer is needed (cgroup.kill)", facts.kernel),
            "boot a newer kernel, for example that of Debian 12 or Ubuntu 24.04",
        ),
        _ => Check::with(
            Verdict::Unknown,
            "kernel",
            format!("the kernel release {:?} is not understood", facts.kernel),
            "make sure that it is 5.14 or newer",
        ),
    }
}

fn runsc_way_out(facts: &Facts) -> String {
    match &facts.setup_script {
        Some(script) => script.display().to_string(),
        None => "curl -fL -o /usr/local/bin/runsc \
                 https://storage.googleapis.com/gvisor/releases/release/latest/$(uname -m)/runsc && \
                 chmod 755 /usr/local/bin/runsc"
            .to_owned(),
    }
}

fn check_runsc(facts: &Facts) -> Check {
    let runsc = match &facts.runsc {
        Ok(runsc) => runsc,
        Err(why) => return Check::missing("runsc", why, runsc_way_out(facts)),
    };
    let shown = format!("{} ({})", runsc.path.display(), runsc.version);
    if !runsc.has_checkpoint {
        let complaint =
            if runsc.complaint.is_empty() { String::new() } else { format!(": {}", runsc.complaint) };
        return Check::missing(
            "runsc",
            format!("{shown} has no usable checkpoint command{complaint}"),
            runsc_way_out(facts),
        );
    }
    match runsc.date {
        Some(date) if date < OLDEST_RUNSC => Check::missing(
            "runsc",
            format!("{shown} is older than 2026-04, and restores of such a one hang"),
            runsc_way_out(facts),
        ),
        Some(_) => Check::ok("runsc", shown),
        None => Check::with(
            Verdict::Warning,
            "runsc",
            format!("{shown} does not say how old it is; 2026-04 or newer is needed"),
            runsc_way_out(facts),
        ),
    }
}

fn check_ateom(facts: &Facts) -> Check {
    match &facts.ateom {
        Ok(path) => Check::ok("ateom-gvisor", path.display().to_string()),
        Err(why) => Check::missing(
            "ateom-gvisor",
            why,
            "install it beside substrate (cargo build --bins), or name it with --ateom",
        ),
    }
}

fn check_nft(facts: &Facts) -> Check {
    match (&facts.nft, &facts.nft_works) {
        (Err(why), _) => Check::missing("nft", why, install(facts, "nftables")),
        (Ok(_), Some(Err(why))) => Check::missing(
            "nft",
            format!("nft cannot read the kernel's tables: {why}"),
            "modprobe nf_tables, or boot a kernel that has it",
        ),
        (Ok(version), _) => Check::ok("nft", version),
    }
}

fn check_cgroup(facts: &Facts) -> Check {
    match (&facts.cgroup2, &facts.cgroup2_works, facts.freezer1) {
        (Some(mount), Some(Ok(())), _) => {
            Check::ok("cgroup", format!("freeze and kill by cgroup v2 at {}", mount.display()))
        }
        (Some(mount), None, _) => Check::with(
            Verdict::Unknown,
            "cgroup",
            format!("cgroup v2 is at {}; without root it cannot be tried", mount.display()),
            "run doctor as root",
        ),
        (_, _, true) => Check::with(
            Verdict::Warning,
            "cgroup",
            "freeze by the v1 freezer and kill by a loop: slower, but safe",
            "mount -t cgroup2 none /sys/fs/cgroup/unified",
        ),
        (Some(mount), Some(Err(why)), false) => Check::missing(
            "cgroup",
            format!("no control group under {} can be frozen and killed: {why}", mount.display()),
            "run it where /sys/fs/cgroup is writable (in a container: --privileged --cgroupns=host)",
        ),
        (None, _, false) => Check::missing(
            "cgroup",
            "neither cgroup v2 nor the v1 freezer is mounted, so no worker could be fenced",
            "mount -t cgroup2 none /sys/fs/cgroup",
        ),
    }
}

fn check_controllers(facts: &Facts) -> Check {
    let lacking: Vec<&str> = ["cpu", "memory", "pids"]
        .into_iter()
        .filter(|name| !facts.controllers.iter().any(|has| has == name))
        .collect();
    if lacking.is_empty() {
        return Check::ok("limits", "cpu, memory and pids controllers");
    }
    Check::with(
        Verdict::Warning,
        "limits",
        format!("no cgroup controller for {}: such limits of templates are not enforced", lacking.join(", ")),
        "enable them at boot, for example with cgroup_enable=memory",
    )
}

fn check_overlayfs(facts: &Facts) -> Check {
    if facts.overlayfs {
        return Check::ok("overlayfs", "in the kernel");
    }
    Check::missing(
        "overlayfs",
        "the kernel has no overlayfs, so images cannot be shared by actors",
        "modprobe overlay",
    )
}

fn check_netns(facts: &Facts) -> Check {
    match &facts.netns {
        Some(Ok(())) => Check::ok("network namespaces", "can be made"),
        Some(Err(why)) => Check::missing(
            "network namespaces",
            format!("none can be made: {why}"),
            "run it with CAP_SYS_ADMIN and a kernel that has CONFIG_NET_NS",
        ),
        None => Check::with(
            Verdict::Unknown,
            "network namespaces",
            "without root it cannot be tried",
            "run doctor as root",
        ),
    }
}

fn check_disk(facts: &Facts) -> Check {
    let dir = facts.dir.display();
    match facts.free {
        Ok(free) if free < LEAST_DISK => Check::missing(
            "disk",
            format!("only {} are free for {dir}, at least {} are needed", bytes(free), bytes(LEAST_DISK)),
            "free some space, or choose another --dir",
        ),
        Ok(free) if free < GOOD_DISK => Check::with(
            Verdict::Warning,
            "disk",
            format!("only {} are free for {dir}", bytes(free)),
            "free some space: snapshots and images live there",
        ),
        Ok(free) => Check::ok("disk", format!("{} free for {dir}", bytes(free))),
        Err(ref why) => Check::missing(
            "disk",
            format!("cannot tell the free space for {dir}: {why}"),
            "choose another --dir",
        ),
    }
}

fn check_demo(facts: &Facts) -> Check {
    match (facts.ip, facts.python) {
        (true, true) => Check::ok("demo", "ip and python3 are there"),
        (false, _) => {
            Check::with(Verdict::Warning, "demo", "`substrate demo` needs ip", install(facts, "iproute2"))
        }
        (true, false) => {
            Check::with(Verdict::Warning, "demo", "`substrate demo` needs python3", install(facts, "python3"))
        }
    }
}

/// Refuses when something is missing that `up` cannot do without; names all of it.
pub fn preflight(checks: &[Check]) -> Result<(), Failure> {
    let missing: Vec<&Check> = checks.iter().filter(|check| check.verdict == Verdict::Missing).collect();
    let [first, rest @ ..] = &missing[..] else { return Ok(()) };
    // Without root the rest is noise: most of it could not even be tried.
    let rest: &[&Check] = if first.name == "root" { &[] } else { rest };
    let sentence = |check: &Check| match &check.way_out {
        Some(way_out) => format!("{}: {}\n  → {way_out}", check.name, check.message),
        None => format!("{}: {}", check.name, check.message),
    };
    let mut message = format!("this machine cannot run it yet\n{}", sentence(first));
    for check in rest {
        message.push('\n');
        message.push_str(&sentence(check));
    }
    Err(Failure::new(Exit::Failed, message))
}

/// `substrate doctor`. Exit code 1 when something is missing.
pub async fn run(options: &Doctor, global: &Global) -> Result<ExitCode, Failure> {
    let mut facts =
        gather(&options.dir, options.runsc.as_deref(), options.ateom.as_deref(), Named::default()).await;
    if let Ok(found) = &mut facts.microvm {
        microvm::ask_of_kvm(found).await;
    }
    let checks = check(&facts);
    let is_ready = checks.iter().all(|check| check.verdict != Verdict::Missing);
    if global.output.is_machine() {
        #[derive(Serialize)]
        struct Report<'a> {
            ready: bool,
            checks: &'a [Check],
        }
        print(&machine_text(&Report { ready: is_ready, checks: &checks }, global.output)?)?;
    } else {
        print(&text(&checks, global.output))?;
        print(if is_ready { "\nready for `substrate up`\n" } else { "\nnot ready: see → above\n" })?;
    }
    Ok(if is_ready { ExitCode::SUCCESS } else { ExitCode::from(Exit::Failed as u8) })
}

fn text(checks: &[Check], output: Output) -> String {
    if output == Output::Name {
        let names = checks.iter().filter(|check| check.verdict == Verdict::Missing);
        return names.flat_map(|check| [check.name, "\n"]).collect();
    }
    let mut table = Table::new(&[" ", "CHECK", "FOUND"]);
    for check in checks {
        let mark = match check.verdict {
            Verdict::Ok => "✓",
            Verdict::Warning => "!",
            Verdict::Missing => "✗",
            Verdict::Unknown => "?",
        };
        table.row(vec![mark.to_owned(), check.name.to_owned(), check.message.clone()]);
        if let Some(way_out) = check.way_out.as_ref().filter(|_| check.verdict != Verdict::Ok) {
            table.row(vec![" ".to_owned(), " ".to_owned(), format!("→ {way_out}")]);
        }
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Facts {
        Facts {
            uid: 0,
            kernel: "6.1.0-13-amd64".into(),
            installer: Some("apt-get install -y".into()),
            setup_script: None,
            runsc: Ok(Runsc {
                path: "/usr/local/bin/runsc".into(),
                version: "release-20260901.0".into(),
                date: Some(20_260_901),
                has_checkpoint: true,
                complaint: String::new(),
            }),
            ateom: Ok("/usr/local/bin/ateom-gvisor".into()),
            microvm: Ok(microvm::sample()),
            nft: Ok("nftables v1.0.6".into()),
            nft_works: Some(Ok(())),
            cgroup2: Some("/sys/fs/cgroup".into()),
            cgroup2_works: Some(Ok(())),
            freezer1: false,
            controllers: ["cpu", "memory", "pids"].map(str::to_owned).to_vec(),
            overlayfs: true,
            netns: Some(Ok(())),
            dir: "/var/lib/substrate".into(),
            free: Ok(100 << 30),
            probes: BTreeMap::new(),
            ip: true,
            python: true,
        }
    }

    fn verdict(facts: &Facts, name: &str) -> Check {
        check(facts).into_iter().find(|check| check.name == name).unwrap()
    }

    #[test]
    fn a_good_machine_passes() {
        let checks = check(&good());
        assert!(checks.iter().all(|check| check.verdict == Verdict::Ok), "{checks:?}");
        assert_eq!(preflight(&checks), Ok(()));
    }

    /// Check, what it says, its way out, how the machine differs from a good one.
    type Case = (&'static str, &'static str, &'static str, fn(&mut Facts));

    #[test]
    fn each_thing_that_is_missing_is_named_with_a_way_out() {
        let cases: [Case; 14] = [
            ("root", "uid 1000", "sudo", |f| f.uid = 1000),
            ("kernel", "5.10", "newer kernel", |f| f.kernel = "5.10.0-28-amd64".into()),
            ("runsc", "not found", "curl", |f| f.runsc = Err("runsc was not found in PATH".into())),
            ("runsc", "no usable checkpoint", "curl", |f| {
                f.runsc = Ok(Runsc { has_checkpoint: false, ..f.runsc.clone().unwrap() });
            }),
            ("runsc", "older than 2026-04", "/src/scripts/setup", |f| {
                f.runsc = Ok(Runsc { date: Some(20_240_729), ..f.runsc.clone().unwrap() });
                f.setup_script = Some("/src/scripts/setup".into());
            }),
            ("ateom-gvisor", "not", "--ateom", |f| {
                f.ateom = Err("ateom-gvisor is not beside substrate".into());
            }),
            ("nft", "nft", "apt-get install -y nftables", |f| {
                f.nft = Err("nft was not found in PATH".into());
            }),
            ("nft", "tables", "modprobe nf_tables", |f| f.nft_works = Some(Err("denied".into()))),
            ("cgroup", "neither", "mount", |f| f.cgroup2 = None),
            ("cgroup", "read-only", "writable", |f| f.cgroup2_works = Some(Err("read-only".into()))),
            ("overlayfs", "no overlayfs", "modprobe overlay", |f| f.overlayfs = false),
            ("network namespaces", "EPERM", "CAP_SYS_ADMIN", |f| f.netns = Some(Err("EPERM".into()))),
            ("disk", "only 100MiB", "--dir", |f| f.free = Ok(100 << 20)),
            ("disk", "EACCES", "--dir", |f| f.free = Err("EACCES".into())),
        ];
        for (name, says, way_out, change) in cases {
            let mut facts = good();
            change(&mut facts);
            let check_ = verdict(&facts, name);
            assert_eq!(check_.verdict, Verdict::Missing, "{name}");
            assert!(check_.message.contains(says), "{name}: {}", check_.message);
            assert!(check_.way_out.as_ref().unwrap().contains(way_out), "{name}: {:?}", check_.way_out);
            let failure = preflight(&check(&facts)).unwrap_err();
            assert!(
                failure.message.contains(says) && failure.message.contains(way_out),
                "{}",
                failure.message
            );
        }
    }

    #[test]
    fn what_only_degrades_does_not_stop_up() {
        let mut facts = good();
        facts.cgroup2 = None;
        facts.freezer1 = true;
        facts.controllers.clear();
        facts.ip = false;
        facts.free = Ok(1 << 30);
        if let Ok(runsc) = &mut facts.runsc {
            runsc.date = None;
        }
        let checks = check(&facts);
        let warnings: Vec<&str> =
            checks.iter().filter(|check| check.verdict == Verdict::Warning).map(|check| check.name).collect();
        assert_eq!(warnings, ["runsc", "cgroup", "limits", "disk", "demo"]);
        assert_eq!(preflight(&checks), Ok(()));
    }

    #[test]
    fn without_root_only_that_is_said() {
        let mut facts = good();
        facts.uid = 1000;
        facts.nft = Err("nft was not found".into());
        let failure = preflight(&check(&facts)).unwrap_err();
        assert!(failure.message.contains("root") && !failure.message.contains("nft"), "{}", failure.message);
    }

    #[test]
    fn the_report_reads_well() {
        let mut facts = good();
        facts.nft = Err("nft was not found in PATH".into());
        let text = text(&check(&facts), Output::Table);
        assert!(text.contains("✗   nft                  nft was not found in PATH\n"), "{text}");
        assert!(text.contains("→ apt-get install -y nftables\n"), "{text}");
    }
}

// SPDX-License-Identifier: Apache-2.0
//! Processes of a worker, as the kernel tells them apart: by control group, and by pid with start time.
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::failure::{Doing as _, Failure};

/// One process, for good: pids are used again, start times with them are not.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    pid: i32,
    /// Clock ticks since boot (proc(5), field 22).
    start: u64,
}

impl Process {
    fn of(pid: i32) -> Option<Self> {
        let (state, start) = stat(pid)?;
        // A zombie holds nothing any more.
        (state != 'Z' && state != 'X').then_some(Self { pid, start })
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid).as_ref() == Some(self)
    }
}

/// State and start time, from `/proc/PID/stat`; the name in it may hold anything but ends with the last parenthesis.
fn stat(pid: i32) -> Option<(char, u64)> {
    parse_stat(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse_stat(text: &str) -> Option<(char, u64)> {
    let (_, rest) = text.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let state = fields.next()?.chars().next()?;
    let start = fields.nth(18)?.parse().ok()?;
    Some((state, start))
}

/// The control group of a worker: that of its ateom, or the one above it that is named after the worker.
///
/// # Errors
/// When the process is gone or in no such group.
pub fn worker_cgroup(ateom_pid: u32, worker: &str) -> Result<PathBuf, Failure> {
    let text = std::fs::read_to_string(format!("/proc/{ateom_pid}/cgroup"))
        .doing(|| format!("cannot read the control groups of process {ateom_pid}"))?;
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    find_group(&text, &mounts, worker).filter(|path| path.is_dir()).ok_or_else(|| {
        Failure::general(format!(
            "process {ateom_pid} of worker {worker} is in no group of that name: {text}"
        ))
    })
}

/// Prefers cgroup v2, else v1's freezer.
fn find_group(membership: &str, mounts: &str, worker: &str) -> Option<PathBuf> {
    let mount = |kind: &str, option: Option<&str>| {
        mounts.lines().find_map(|line| {
            let mut words = line.split(' ').skip(1);
            let (place, is, options) = (words.next()?, words.next()?, words.next()?);
            let fits = is == kind && option.is_none_or(|option| options.split(',').any(|has| has == option));
            fits.then(|| PathBuf::from(place))
        })
    };
    let relative = |controller: &str| {
        membership.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            let (controllers, path) = (parts.next()?, parts.next()?);
            let fits = controllers.split(',').any(|has| has == controller);
            let mut path = Path::new(path);
            while fits && path.file_name()? != worker {
                path = path.parent()?;
            }
            fits.then(|| path.strip_prefix("/").unwrap_or(path).to_owned())
        })
    };
    let v2 = mount("cgroup2", None).zip(relative(""));
    let v1 = || mount("cgroup", Some("freezer")).zip(relative("freezer"));
    v2.or_else(v1).map(|(mount, path)| mount.join(path))
}

/// Everything that runs in a group and below it.
pub fn members(group: &Path) -> BTreeSet<Process> {
    let mut all = BTreeSet::new();
    let mut groups = vec![group.to_owned()];
    while let Some(group) = groups.pop() {
        let pids = std::fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
        all.extend(pids.lines().filter_map(|pid| Process::of(pid.parse().ok()?)));
        if let Ok(entries) = std::fs::read_dir(&group) {
            groups.extend(entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()));
        }
    }
    all
}

/// Everything in a group but one process.
pub fn members_without(group: &Path, pid: u32) -> BTreeSet<Process> {
    members(group).into_iter().filter(|process| process.pid != pid as i32).collect()
}

/// Kills a whole group at once where the kernel can, else member by member.
///
/// # Errors
/// When it cannot.
pub fn kill_group(group: &Path) -> Result<(), Failure> {
    let file = group.join("cgroup.kill");
    if file.exists() {
        return std::fs::write(&file, "1").doing(|| format!("cannot write {}", file.display()));
    }
    for process in members(group) {
        let pid = nix::unistd::Pid::from_raw(process.pid);
        match nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
            Err(error) => {
                return Err(Failure::general(format!("cannot kill process {}: {error}", process.pid)));
            }
        }
    }
    Ok(())
}

/// Bytes that a tree takes on the disk; nothing for one that is not there.
pub fn disk_bytes(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let Ok(meta) = std::fs::symlink_metadata(path) else { return 0 };
    let below: u64 = if meta.is_dir() {
        std::fs::read_dir(path)
            .map_or(0, |entries| entries.flatten().map(|entry| disk_bytes(&entry.path())).sum())
    } else {
        0
    };
    meta.blocks() * 512 + below
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_its_pid_and_its_start() {
        let own = Process::of(std::process::id() as i32).unwrap();
        assert!(own.is_alive());
        assert!(!Process { start: own.start + 1, ..own }.is_alive());
        let line = format!("7 (a) b) S {} 99 0", ["0"; 18].join(" "));
        assert_eq!(parse_stat(&line), Some(('S', 99)));
    }

    #[test]
    fn the_group_of_a_worker_is_found_on_hybrid_and_unified_machines() {
        let mounts = "cgroup /sys/fs/cgroup/freezer cgroup rw,freezer 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        let membership = "3:freezer:/substrate/w1/ateom\n0::/substrate/w1/ateom\n";
        let found = find_group(membership, mounts, "w1").unwrap();
        assert_eq!(found, Path::new("/sys/fs/cgroup/unified/substrate/w1"));
        let v1 = mounts.lines().next().unwrap();
        assert_eq!(
            find_group(membership, v1, "w1").unwrap(),
            Path::new("/sys/fs/cgroup/freezer/substrate/w1")
        );
        assert_eq!(find_group(membership, mounts, "w2"), None);
    }
}

// SPDX-License-Identifier: Apache-2.0
//! Looks at the machine; changes nothing on it that outlives the look.
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use tokio::process::Command;

use super::{Facts, Named, Runsc};
use crate::failure::{Doing as _, Failure};

/// No tool takes longer to say its version.
const PATIENCE: Duration = Duration::from_secs(10);

/// Gathers what [`super::check`] judges.
pub async fn gather(dir: &Path, runsc: Option<&Path>, ateom: Option<&Path>, named: Named<'_>) -> Facts {
    let uid = nix::unistd::geteuid().as_raw();
    let is_root = uid == 0;
    let exe = std::env::current_exe().unwrap_or_default();
    let runsc = match find_runsc(runsc, dir, &exe) {
        Ok(path) => look_at_runsc(path).await,
        Err(why) => Err(why),
    };
    let nft = run("nft", &["--version"])
        .await
        .map(|text| text.lines().next().unwrap_or_default().trim().to_owned());
    let nft_works = match (&nft, is_root) {
        (Ok(_), true) => Some(run("nft", &["list", "tables"]).await.map(drop)),
        _ => None,
    };
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let (cgroup2, freezer1) = cgroup_mounts(&mounts);
    let cgroup2_works = cgroup2.as_deref().filter(|_| is_root).map(try_cgroup2);
    let controllers = controllers(cgroup2.as_deref(), &mounts);
    let filesystems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let mut overlayfs = has_overlayfs(&filesystems);
    if !overlayfs && is_root && run("modprobe", &["overlay"]).await.is_ok() {
        overlayfs = has_overlayfs(&std::fs::read_to_string("/proc/filesystems").unwrap_or_default());
    }
    Facts {
        uid,
        kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
        installer: installer(),
        setup_script: setup_script(&exe),
        runsc,
        ateom: find_ateom(ateom, &exe),
        microvm: super::microvm::find(named, &exe).await,
        nft,
        nft_works,
        cgroup2,
        cgroup2_works,
        freezer1,
        controllers,
        overlayfs,
        netns: is_root.then(try_netns),
        dir: dir.to_owned(),
        free: free_bytes(dir),
        // A file that cannot be read is probed again; the driver says so.
        probes: openshell_driver_substrate::probe::verdicts(
            &dir.join("driver").join(openshell_driver_substrate::probe::FILE),
        )
        .unwrap_or_default(),
        ip: in_path("ip").is_some(),
        python: in_path("python3").is_some(),
    }
}

/// Runs a tool and returns its standard output.
pub(super) async fn run(program: &str, args: &[&str]) -> Result<String, String> {
    run_within(program, args, PATIENCE).await
}

/// As [`run`], for one that may take its time.
pub(super) async fn run_within(program: &str, args: &[&str], limit: Duration) -> Result<String, String> {
    if !program.contains('/') && in_path(program).is_none() {
        return Err(format!("{program} was not found in PATH"));
    }
    let mut command = Command::new(program);
    command.args(args).stdin(std::process::Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(limit, command.output())
        .await
        .map_err(|_| format!("{program} did not answer within {} s", limit.as_secs()))?
        .map_err(|error| format!("{program} cannot be run: {error}"))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let line = stderr.lines().find(|line| !line.trim().is_empty()).unwrap_or("no message");
        return Err(format!("{line} ({})", output.status));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

pub(super) fn is_executable(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

pub(super) fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|path| is_executable(path))
}

/// Where runsc is: `--runsc`, `$SUBSTRATE_RUNSC`, DIR/node/runtimes, beside the program, `target/tools` of its
/// workspace, PATH. What is named has to be there; what is looked for need not.
///
/// # Errors
/// A sentence naming the place that was named, or all places that were looked at.
pub fn find_runsc(named: Option<&Path>, dir: &Path, exe: &Path) -> Result<PathBuf, String> {
    let from_environment =
        std::env::var_os("SUBSTRATE_RUNSC").filter(|value| !value.is_empty()).map(PathBuf::from);
    let explicit = [("--runsc", named.map(Path::to_owned)), ("SUBSTRATE_RUNSC", from_environment)];
    for (what, path) in explicit {
        if let Some(path) = path {
            return usable(&path).map_err(|why| format!("{what} names {}, {why}", path.display()));
        }
    }
    let mut places = Vec::new();
    if let Ok(entries) = std::fs::read_dir(dir.join("node/runtimes")) {
        let mut found: Vec<_> =
            entries.flatten().map(|entry| entry.path().join("runsc")).filter(|p| p.exists()).collect();
        // The newest; older ones are there for older snapshots.
        found.sort_by_key(|path| std::fs::metadata(path).and_then(|meta| meta.modified()).ok());
        places.extend(found.into_iter().rev());
    }
    if let Some(beside) = exe.parent() {
        places.push(beside.join("runsc"));
    }
    places.extend(
        exe.ancestors()
            .filter(|dir| dir.file_name().is_some_and(|n| n == "target"))
            .map(|d| d.join("tools/runsc")),
    );
    places.extend(workspace(exe).map(|root| root.join("target/tools/runsc")));
    if let Some(path) = places.iter().find(|path| is_executable(path)) {
        return usable(path).map_err(|why| format!("{}: {why}", path.display()));
    }
    in_path("runsc").ok_or_else(|| {
        let looked: Vec<String> = places.iter().map(|path| path.display().to_string()).collect();
        format!("runsc was not found: not at {} and not in PATH", looked.join(", "))
    })
}

pub(super) fn usable(path: &Path) -> Result<PathBuf, String> {
    match path.canonicalize() {
        Err(error) => Err(format!("which cannot be used: {error}")),
        Ok(path) if is_executable(&path) => Ok(path),
        Ok(_) => Err("which is not an executable file".to_owned()),
    }
}

/// Where ateom-gvisor is: `--ateom`, beside the program, PATH.
///
/// # Errors
/// A sentence naming the place.
pub fn find_ateom(named: Option<&Path>, exe: &Path) -> Result<PathBuf, String> {
    const NAME: &str = "ateom-gvisor";
    if let Some(path) = named {
        return usable(path).map_err(|why| format!("--ateom names {}, {why}", path.display()));
    }
    let beside = exe.parent().map(|dir| dir.join(NAME));
    if let Some(path) = beside.as_ref().filter(|path| is_executable(path)) {
        return Ok(path.clone());
    }
    in_path(NAME).ok_or_else(|| {
        let beside = beside.unwrap_or_default();
        format!("{NAME} was not found: not at {} and not in PATH", beside.display())
    })
}

/// The checkout that a program was built in, if it still lies there.
pub fn workspace(exe: &Path) -> Option<PathBuf> {
    exe.ancestors()
        .find(|dir| dir.join("scripts/lib.sh").is_file() && dir.join("Cargo.toml").is_file())
        .map(Path::to_owned)
}

fn setup_script(exe: &Path) -> Option<PathBuf> {
    workspace(exe).map(|root| root.join("scripts/setup")).filter(|path| path.is_file())
}

async fn look_at_runsc(path: PathBuf) -> Result<Runsc, String> {
    let program = path.display().to_string();
    let version = run(&program, &["--version"])
        .await
        .map_err(|why| format!("{program} does not say its version: {why}"))?;
    let version =
        version.lines().next().unwrap_or_default().trim_start_matches("runsc version ").trim().to_owned();
    let (has_checkpoint, complaint) = match run(&program, &["help", "checkpoint"]).await {
        Ok(help) => (help.contains("-image-path") && help.contains("-leave-running"), String::new()),
        Err(why) => (false, why),
    };
    Ok(Runsc { date: version_date(&version), path, version, has_checkpoint, complaint })
}

/// The date in a version such as `release-20260901.0` or `20240729.0`, as yyyymmdd.
fn version_date(version: &str) -> Option<u32> {
    version
        .split(|c: char| !c.is_ascii_digit())
        .filter(|part| part.len() == 8)
        .filter_map(|part| part.parse().ok())
        .find(|date| (20_180_101..21_000_101).contains(date))
}

/// The runtime that `up` hands to workers.
#[derive(Debug, Clone)]
pub struct Runtime {
    /// Absolute path.
    pub path: PathBuf,
    /// sha256, hex: its identity.
    pub sha256: String,
    /// What it calls itself.
    pub version: String,
}

/// Reads a runtime's identity.
///
/// # Errors
/// When it cannot be read.
pub async fn runtime(runsc: &Runsc) -> Result<Runtime, Failure> {
    let sha256 = sha256(&runsc.path).await.doing(|| format!("cannot read {}", runsc.path.display()))?;
    Ok(Runtime { path: runsc.path.clone(), sha256, version: runsc.version.clone() })
}

/// sha256 (hex) of a file.
pub(super) async fn sha256(path: &Path) -> std::io::Result<String> {
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || {
        let mut file = std::fs::File::open(path)?;
        let mut digest = Sha256::new();
        std::io::copy(&mut file, &mut digest)?;
        Ok(hex::encode(digest.finalize()))
    })
    .await
    .map_err(std::io::Error::other)?
}

fn installer() -> Option<String> {
    let commands = [
        ("apt-get", "apt-get install -y"),
        ("dnf", "dnf install -y"),
        ("zypper", "zypper install -y"),
        ("pacman", "pacman -S --noconfirm"),
        ("apk", "apk add"),
    ];
    let installed = |tool: &str| {
        ["/usr/bin", "/sbin", "/usr/sbin"].iter().any(|dir| is_executable(&Path::new(dir).join(tool)))
    };
    commands.into_iter().find(|(tool, _)| installed(tool)).map(|(_, command)| command.to_owned())
}

/// Where cgroup v2 is mounted, and whether the v1 freezer is, from `/proc/self/mounts` (proc(5)).
fn cgroup_mounts(mounts: &str) -> (Option<PathBuf>, bool) {
    let mut v2 = None;
    let mut freezer = false;
    for line in mounts.lines() {
        let mut words = line.split(' ');
        let (Some(_), Some(place), Some(kind), Some(options)) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            continue;
        };
        match kind {
            "cgroup2" if v2.is_none() => v2 = Some(PathBuf::from(place)),
            "cgroup" => freezer |= options.split(',').any(|option| option == "freezer"),
            _ => {}
        }
    }
    (v2, freezer)
}

fn controllers(cgroup2: Option<&Path>, mounts: &str) -> Vec<String> {
    let mut names: Vec<String> = cgroup2
        .and_then(|mount| std::fs::read_to_string(mount.join("cgroup.controllers")).ok())
        .map(|text| text.split_whitespace().map(str::to_owned).collect())
        .unwrap_or_default();
    for line in mounts.lines().filter(|line| line.split(' ').nth(2) == Some("cgroup")) {
        if let Some(options) = line.split(' ').nth(3) {
            names.extend(options.split(',').map(str::to_owned));
        }
    }
    names
}

fn try_cgroup2(mount: &Path) -> Result<(), String> {
    let group = mount.join(format!("substrate-doctor-{}", std::process::id()));
    std::fs::create_dir(&group).map_err(|error| error.to_string())?;
    let lacking = ["cgroup.freeze", "cgroup.kill"].into_iter().find(|file| !group.join(file).exists());
    std::fs::remove_dir(&group).map_err(|error| format!("{}: {error}", group.display()))?;
    match lacking {
        Some(file) => Err(format!("the kernel has no {file}")),
        None => Ok(()),
    }
}

fn has_overlayfs(filesystems: &str) -> bool {
    filesystems.lines().any(|line| line.split_whitespace().last() == Some("overlay"))
}

/// In a thread of its own, which takes the namespace with it when it ends.
fn try_netns() -> Result<(), String> {
    std::thread::spawn(|| nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET))
        .join()
        .map_err(|_| "the thread that tried it died".to_owned())?
        .map_err(|error| error.to_string())
}

/// Free bytes for us on the filesystem that a directory is, or will be, on.
fn free_bytes(dir: &Path) -> Result<u64, String> {
    let there = dir.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
    let stat = nix::sys::statvfs::statvfs(there).map_err(|error| error.to_string())?;
    Ok(stat.blocks_available() * stat.fragment_size())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_read_from_versions() {
        assert_eq!(version_date("release-20260901.0"), Some(20_260_901));
        assert_eq!(version_date("substrate-20260905"), Some(20_260_905));
        assert_eq!(version_date("20240729.0"), Some(20_240_729));
        assert_eq!(version_date("0.0~20221219.0"), Some(20_221_219));
        assert_eq!(version_date("VERSION_MISSING"), None);
    }

    #[test]
    fn hybrid_and_unified_machines_are_told_apart() {
        let hybrid = "cgroup /sys/fs/cgroup/freezer cgroup rw,relatime,freezer 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(cgroup_mounts(hybrid), (Some("/sys/fs/cgroup/unified".into()), true));
        assert_eq!(controllers(None, hybrid), ["rw", "relatime", "freezer"]);
        assert_eq!(
            cgroup_mounts("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n"),
            (Some("/sys/fs/cgroup".into()), false)
        );
        assert_eq!(cgroup_mounts("tmpfs /tmp tmpfs rw 0 0\n"), (None, false));
    }

    #[test]
    fn what_is_named_must_be_there() {
        let dir = tempfile::tempdir().unwrap();
        let missing =
            find_runsc(Some(Path::new("/nonexistent/runsc")), dir.path(), Path::new("/x/substrate"));
        assert!(missing.unwrap_err().contains("--runsc names /nonexistent/runsc"));
        let file = dir.path().join("ateom-gvisor");
        std::fs::write(&file, "x").unwrap();
        assert!(
            find_ateom(Some(&file), Path::new("/x/substrate")).unwrap_err().contains("not an executable")
        );
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(find_ateom(None, &dir.path().join("substrate")).unwrap(), file);
    }

    #[test]
    fn the_newest_of_the_nodes_runtimes_comes_first() {
        let dir = tempfile::tempdir().unwrap();
        let mut last = PathBuf::new();
        for (name, seconds) in [("aaa", 1_000), ("bbb", 2_000)] {
            let runtime = dir.path().join("node/runtimes").join(name);
            std::fs::create_dir_all(&runtime).unwrap();
            last = runtime.join("runsc");
            std::fs::write(&last, "x").unwrap();
            std::fs::set_permissions(&last, std::fs::Permissions::from_mode(0o755)).unwrap();
            let file = std::fs::File::options().write(true).open(&last).unwrap();
            file.set_modified(std::time::UNIX_EPOCH + Duration::from_secs(seconds)).unwrap();
        }
        if std::env::var_os("SUBSTRATE_RUNSC").is_none() {
            assert_eq!(
                find_runsc(None, dir.path(), Path::new("/x/substrate")).unwrap(),
                last.canonicalize().unwrap()
            );
        }
    }
}

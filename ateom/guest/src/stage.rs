// SPDX-License-Identifier: Apache-2.0
//! The process between the agent and a workload's program: it makes or joins the container and becomes the program.
//!
//! The agent starts itself once more with this argument, in the container's pid namespace, with standard streams in
//! place, the plan on descriptor 4 and, on 3, a pipe for what goes wrong, which the program's start closes.
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::os::unix::process::CommandExt as _;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, ExitCode};

use ateom_guest::{Container, Process, Source};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::{Gid, Uid};
use serde::{Deserialize, Serialize};

use crate::{boot, sys};

/// First argument of the program that makes it a stage.
pub const ARGUMENT: &str = "stage";
/// Descriptor for errors.
pub const ERRORS: i32 = 3;
/// Descriptor of the plan.
pub const PLAN: i32 = 4;
/// What CAP_SYS_ADMIN is in a set of capabilities (linux/capability.h).
const SYS_ADMIN: u64 = 1 << 21;
/// RLIMIT_NOFILE, as the gVisor class has it.
const NOFILE: u64 = 65_536;
/// As a shell says that a program was not found.
const NOT_FOUND: u8 = 127;
/// As a shell says that a program cannot be executed.
const NOT_EXECUTABLE: u8 = 126;
/// Something else failed.
const OTHER: u8 = 125;

/// What a stage is to do.
#[derive(Debug, Serialize, Deserialize)]
pub enum Plan {
    /// Make the container and become its main process.
    Make {
        /// What it is.
        container: Container,
        /// Host name.
        hostname: String,
    },
    /// Join the container whose main process has this pid.
    Join {
        /// In the agent's pid namespace.
        pid: i32,
        /// What to run.
        process: Process,
        /// Descriptor 0 becomes its terminal.
        terminal: bool,
    },
}

/// What went wrong, with the exit code that says so.
struct Failure(u8, String);

impl<T: std::fmt::Display> From<(&str, T)> for Failure {
    fn from((what, error): (&str, T)) -> Self {
        Self(OTHER, format!("cannot {what}: {error}"))
    }
}

/// The stage's life.
pub fn run() -> ExitCode {
    let (Ok(errors), Ok(plan)) = (sys::inherited(ERRORS), sys::inherited(PLAN)) else {
        return ExitCode::from(OTHER);
    };
    let Failure(code, message) = match enter(plan) {
        Ok(never) => match never {},
        Err(failure) => failure,
    };
    // Then only the code tells.
    let _ = fs::File::from(errors).write_all(message.as_bytes());
    ExitCode::from(code)
}

enum Never {}

fn enter(plan: OwnedFd) -> Result<Never, Failure> {
    let mut text = String::new();
    fs::File::from(plan).read_to_string(&mut text).map_err(|error| ("read the plan", error))?;
    let plan: Plan = serde_json::from_str(&text).map_err(|error| ("read the plan", error))?;
    boot::write(&format!("{}/cgroup.procs", boot::GROUP), "0").map_err(|error| Failure(OTHER, error))?;
    let process = match plan {
        Plan::Make { container, hostname } => {
            unshare(
                CloneFlags::CLONE_NEWNS
                    | CloneFlags::CLONE_NEWIPC
                    | CloneFlags::CLONE_NEWUTS
                    | CloneFlags::CLONE_NEWCGROUP,
            )
            .map_err(|errno| ("make namespaces", errno))?;
            nix::unistd::sethostname(hostname).map_err(|errno| ("set the host name", errno))?;
            make_root(&container)?;
            container.process
        }
        Plan::Join { pid, process, terminal } => {
            for (name, kind) in [
                ("ipc", CloneFlags::CLONE_NEWIPC),
                ("uts", CloneFlags::CLONE_NEWUTS),
                ("cgroup", CloneFlags::CLONE_NEWCGROUP),
                ("mnt", CloneFlags::CLONE_NEWNS),
            ] {
                let namespace = fs::File::open(format!("/proc/{pid}/ns/{name}"))
                    .map_err(|error| ("find the container's namespaces", error))?;
                setns(namespace, kind).map_err(|errno| ("join the container's namespaces", errno))?;
            }
            if terminal {
                sys::take_terminal().map_err(|error| ("take the terminal", error))?;
                // Its user may open it by name.
                let stdin = std::io::stdin();
                let _ = nix::unistd::fchown(stdin.as_fd(), Some(Uid::from_raw(process.uid)), None);
            }
            process
        }
    };
    become_program(&process)
}

/// An overlay over the image's root with the usual mounts, made the root.
fn make_root(container: &Container) -> Result<(), Failure> {
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
        .map_err(|errno| ("make mounts private", errno))?;
    let lower = format!("{}/{}", boot::IMAGES, container.image);
    let place = PathBuf::from(boot::CONTAINERS).join(&container.name);
    let layer = container.layer.map(|disk| PathBuf::from(format!("{}/{disk}", boot::VOLUMES)));
    let layer = layer.as_ref().unwrap_or(&place);
    let (upper, work, root) = (layer.join("upper"), layer.join("work"), place.join("root"));
    for dir in [&upper, &work, &root] {
        fs::create_dir_all(dir).map_err(|error| ("make the writable layer", error))?;
    }
    let of = fs::metadata(&lower).map_err(|error| ("look at the image", error))?;
    chown(&upper, Some(of.uid()), Some(of.gid())).map_err(|error| ("prepare the writable layer", error))?;
    fs::set_permissions(&upper, fs::Permissions::from_mode(of.mode() & 0o7777))
        .map_err(|error| ("prepare the writable layer", error))?;
    let options = format!("lowerdir={lower},upperdir={},workdir={}", upper.display(), work.display());
    mount(Some("overlay"), &root, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
        .map_err(|errno| ("mount the container's root", errno))?;
    let over = |destination: &str| container.mounts.iter().any(|mount| mount.destination == destination);
    for (destination, kind, flags, data) in defaults() {
        if !over(destination) {
            let point = mount_point(&root, destination, true)?;
            mount(Some(kind), &path_of(&point), Some(kind), flags, Some(data))
                .map_err(|errno| Failure(OTHER, format!("cannot mount {destination}: {errno}")))?;
            if destination == "/dev" {
                let mounted = mount_point(&root, "/dev", true)?;
                let dev = path_of(&mounted);
                make_devices(&dev)?;
                if container.process.capabilities.iter().any(|name| name.ends_with("SYSLOG")) {
                    make_device(&dev, "kmsg", 1, 11, 0o600)?;
                }
            }
        }
    }
    for entry in fs::read_dir(boot::ETC).map_err(|error| ("list files of /etc", error))? {
        let entry = entry.map_err(|error| ("list files of /etc", error))?;
        let destination = format!("/etc/{}", entry.file_name().to_string_lossy());
        if !over(&destination) {
            bind(&entry.path(), &root, &destination, true)?;
        }
    }
    for one in &container.mounts {
        let source = match &one.source {
            Source::Delivery(key) => Path::new(boot::DELIVERIES).join(key),
            Source::Volume(index) => PathBuf::from(format!("{}/{index}", boot::VOLUMES)),
            Source::Image { image, path } => Path::new(boot::IMAGES).join(image.to_string()).join(path),
            Source::Memory => {
                let point = mount_point(&root, &one.destination, true)?;
                let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
                if one.read_only {
                    flags |= MsFlags::MS_RDONLY;
                }
                mount(Some("tmpfs"), &path_of(&point), Some("tmpfs"), flags, None::<&str>)
                    .map_err(|errno| Failure(OTHER, format!("cannot mount {}: {errno}", one.destination)))?;
                continue;
            }
        };
        bind(&source, &root, &one.destination, one.read_only)?;
    }
    nix::unistd::chdir(&root).map_err(|errno| ("enter the container's root", errno))?;
    // The old root is stacked on the new one and taken away (pivot_root(2)).
    nix::unistd::pivot_root(".", ".").map_err(|errno| ("change the root", errno))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(|errno| ("leave the old root", errno))?;
    nix::unistd::chdir("/").map_err(|errno| ("enter the new root", errno))?;
    if container.read_only_root {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
            .map_err(|errno| ("make the root read-only", errno))?;
    }
    Ok(())
}

type Default = (&'static str, &'static str, MsFlags, &'static str);

fn defaults() -> [Default; 6] {
    let (suid, exec, dev) = (MsFlags::MS_NOSUID, MsFlags::MS_NOEXEC, MsFlags::MS_NODEV);
    [
        ("/proc", "proc", suid | exec | dev, ""),
        ("/dev", "tmpfs", suid | MsFlags::MS_STRICTATIME, "mode=755,size=65536k"),
        ("/dev/pts", "devpts", suid | exec, "newinstance,ptmxmode=0666,mode=0620,gid=5"),
        ("/dev/shm", "tmpfs", suid | exec | dev, "mode=1777,size=65536k"),
        ("/sys", "sysfs", suid | exec | dev | MsFlags::MS_RDONLY, ""),
        // Its root is the workload's own group, whose limits may be read.
        ("/sys/fs/cgroup", "cgroup2", suid | exec | dev | MsFlags::MS_RDONLY, ""),
    ]
}

fn make_devices(dev: &Path) -> Result<(), Failure> {
    for (name, major, minor) in
        [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)]
    {
        make_device(dev, name, major, minor, 0o666)?;
    }
    for (target, name) in [
        ("/proc/self/fd", "fd"),
        ("/proc/self/fd/0", "stdin"),
        ("/proc/self/fd/1", "stdout"),
        ("/proc/self/fd/2", "stderr"),
        ("pts/ptmx", "ptmx"),
    ] {
        symlink(target, dev.join(name)).map_err(|error| ("make devices", error))?;
    }
    Ok(())
}

fn make_device(dev: &Path, name: &str, major: u64, minor: u64, mode: u32) -> Result<(), Failure> {
    let path = dev.join(name);
    mknod(&path, SFlag::S_IFCHR, Mode::from_bits_truncate(mode), makedev(major, minor))
        .map_err(|errno| ("make devices", errno))?;
    // Not by mknod: the umask would take bits away.
    fs::set_permissions(&path, fs::Permissions::from_mode(mode))
        .map_err(|error| ("make devices", error).into())
}

fn path_of(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Opens a mount point inside a root, made with its parents where it is missing. No link of the image leads out.
fn mount_point(root: &Path, destination: &str, directory: bool) -> Result<OwnedFd, Failure> {
    let failed = |error: String| Failure(OTHER, format!("cannot make mount point {destination}: {error}"));
    let top = fs::File::open(root).map_err(|error| failed(error.to_string()))?;
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_IN_ROOT);
    let mut at = PathBuf::from("/");
    let mut parent = openat2(&top, &at, how).map_err(|errno| failed(errno.to_string()))?;
    let parts: Vec<_> =
        Path::new(destination).components().filter(|part| matches!(part, Component::Normal(_))).collect();
    for (number, part) in parts.iter().enumerate() {
        at.push(part);
        let last = number + 1 == parts.len();
        let found = match openat2(&top, &at, how) {
            Err(Errno::ENOENT) => {
                let name = part.as_os_str();
                if last && !directory {
                    let flags = OFlag::O_CREAT | OFlag::O_WRONLY | OFlag::O_CLOEXEC | OFlag::O_EXCL;
                    nix::fcntl::openat(&parent, name, flags, Mode::from_bits_truncate(0o644)).map(drop)
                } else {
                    nix::sys::stat::mkdirat(&parent, name, Mode::from_bits_truncate(0o755))
                }
                .map_err(|errno| failed(errno.to_string()))?;
                openat2(&top, &at, how)
            }
            other => other,
        };
        parent = found.map_err(|errno| failed(errno.to_string()))?;
    }
    Ok(parent)
}

fn bind(source: &Path, root: &Path, destination: &str, read_only: bool) -> Result<(), Failure> {
    let failed = |errno: Errno| Failure(OTHER, format!("cannot mount {destination}: {errno}"));
    let point = mount_point(root, destination, source.is_dir())?;
    mount(Some(source), &path_of(&point), None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .map_err(failed)?;
    if read_only {
        // What is mounted there now.
        let point = mount_point(root, destination, source.is_dir())?;
        let flags = MsFlags::MS_REMOUNT
            | MsFlags::MS_BIND
            | MsFlags::MS_RDONLY
            | MsFlags::MS_NOSUID
            | MsFlags::MS_NODEV;
        mount(None::<&str>, &path_of(&point), None::<&str>, flags, None::<&str>).map_err(failed)?;
    }
    Ok(())
}

/// Names of capabilities in the order of their numbers (linux/capability.h).
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

fn capability_mask(names: &[String]) -> Result<u64, Failure> {
    names.iter().try_fold(0, |mask, name| {
        let upper = name.to_ascii_uppercase();
        let plain = upper.strip_prefix("CAP_").unwrap_or(&upper);
        let number = CAPABILITIES.iter().position(|known| *known == plain);
        number
            .map(|number| mask | 1 << number)
            .ok_or_else(|| Failure(OTHER, format!("the guest's kernel has no capability {name}")))
    })
}

fn become_program(process: &Process) -> Result<Never, Failure> {
    let (program, arguments) = process.args.split_first().ok_or(Failure(OTHER, "no command".to_owned()))?;
    setrlimit(Resource::RLIMIT_NOFILE, NOFILE, NOFILE).map_err(|errno| ("set RLIMIT_NOFILE", errno))?;
    let cwd = if process.cwd.is_empty() { "/" } else { &process.cwd };
    if !Path::new(cwd).is_dir() {
        fs::create_dir_all(cwd).map_err(|error| Failure(OTHER, format!("cannot make {cwd}: {error}")))?;
    }
    nix::unistd::chdir(cwd).map_err(|errno| Failure(OTHER, format!("cannot enter {cwd}: {errno}")))?;
    let mask = capability_mask(&process.capabilities)?;
    for number in 0..64 {
        if mask & (1 << number) == 0 {
            match sys::drop_bound(number) {
                // Beyond the last one that the kernel knows.
                Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => break,
                other => other.map_err(|error| ("drop capabilities", error))?,
            }
        }
    }
    let groups: Vec<Gid> = process.groups.iter().copied().map(Gid::from_raw).collect();
    nix::unistd::setgroups(&groups).map_err(|errno| ("set the groups", errno))?;
    let (uid, gid) = (Uid::from_raw(process.uid), Gid::from_raw(process.gid));
    nix::unistd::setresgid(gid, gid, gid).map_err(|errno| ("set the group", errno))?;
    sys::keep_capabilities().map_err(|error| ("keep capabilities", error))?;
    nix::unistd::setresuid(uid, uid, uid).map_err(|errno| ("set the user", errno))?;
    if process.no_new_privileges {
        nix::sys::prctl::set_no_new_privs().map_err(|errno| ("set no_new_privs", errno))?;
    }
    nix::sys::stat::umask(Mode::from_bits_truncate(0o022));
    let mut command = Command::new(program);
    command.args(arguments).env_clear();
    command.envs(process.env.iter().filter_map(|entry| entry.split_once('=')));
    if process.seccomp.is_empty() {
        sys::set_capabilities(mask).map_err(|error| ("set capabilities", error))?;
    } else {
        // A filter needs CAP_SYS_ADMIN (seccomp(2)), and comes last, so that only the program's own start has to pass it.
        // execve(2) takes the capability away again: what root has afterwards is in the bounding set, and nobody else
        // has anything.
        sys::set_capabilities(mask | SYS_ADMIN).map_err(|error| ("set capabilities", error))?;
        sys::filter_calls(&process.seccomp).map_err(|error| ("filter system calls", error))?;
    }
    let error = command.exec();
    let code = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT) => NOT_FOUND,
        _ => NOT_EXECUTABLE,
    };
    Err(Failure(code, format!("cannot run {program}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_have_the_kernels_numbers() {
        let mask = |names: &[&str]| {
            capability_mask(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).map_err(|f| f.1)
        };
        assert_eq!(mask(&["CHOWN", "CAP_SETUID", "net_admin"]), Ok(1 | 1 << 7 | 1 << 12));
        assert_eq!(mask(&["CHECKPOINT_RESTORE"]), Ok(1 << 40));
        assert_eq!(mask(&["SYS_ADMIN"]), Ok(SYS_ADMIN));
        assert!(mask(&["FLY"]).unwrap_err().contains("FLY"));
    }

    #[test]
    fn mount_points_do_not_leave_the_root() {
        let dir = std::env::temp_dir().join(format!("stage-{}", std::process::id()));
        let (root, outside) = (dir.join("root"), dir.join("outside"));
        fs::create_dir_all(&root).unwrap();
        fs::create_dir_all(&outside).unwrap();
        symlink(&outside, root.join("out")).unwrap();
        symlink("/run", root.join("var")).unwrap();
        fs::create_dir(root.join("run")).unwrap();
        // An absolute link is of the container: there its target does not exist.
        assert!(mount_point(&root, "/out/x", true).is_err());
        assert!(mount_point(&root, "/var/ate", true).is_ok());
        assert!(mount_point(&root, "/a/b/file", false).is_ok());
        assert!(root.join("run/ate").is_dir() && root.join("a/b/file").is_file());
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
        fs::remove_dir_all(&dir).unwrap();
    }
}

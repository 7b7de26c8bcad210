// SPDX-License-Identifier: Apache-2.0
//! Control groups of a worker: where its processes are, what they may use, and how they are fenced.
//!
//! A worker owns the group `<root>/substrate/<worker>` and below it `ateom` (its own process) and one `actor-<n>` for
//! each activation, so that killing the worker's group kills everything of it, and killing an actor's group leaves
//! the ateom alone. A group exists in several places at once, always under the same relative name:
//!
//! | Machine | Limits (memory, cpu, pids) | Freeze and kill |
//! |---|---|---|
//! | pure v2 | the v2 tree | `cgroup.freeze`, `cgroup.kill` |
//! | hybrid | the v1 controllers | the v2 tree, which has no controllers but freezes and kills |
//! | pure v1 | the v1 controllers | the v1 freezer, and a loop of SIGKILL while frozen |
//!
//! **Fencing** (promise P1) means killed *and* seen empty: [`Cgroup::kill_and_wait_empty`] waits for the kernel's
//! notification on `cgroup.events` (poll(2), POLLPRI), or where there is only v1, for the pidfd of every member. A
//! frozen group is killed as well as a running one.
//!
//! Moving a process into a v1 group waits for an RCU grace period (7–20 ms seen), so nothing is moved while an actor
//! wakes up: processes are born in their group (see the `launcher` module).
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::sys::pidfd_open;

/// What went wrong with a control group.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// Neither cgroup v2 nor the v1 controllers are mounted.
    #[error(
        "no cgroup v2 and no v1 freezer is mounted (/proc/self/mountinfo): mount cgroup2 on /sys/fs/cgroup"
    )]
    NotMounted,
    /// The system refused an operation.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Processes survived until the deadline.
    #[error(
        "cgroup {name} still has processes {pids:?} {waited_ms} ms after they were killed (stuck in the kernel?)"
    )]
    NotEmpty {
        /// The group's relative name.
        name: String,
        /// Who is left.
        pids: Vec<i32>,
        /// How long it was waited for.
        waited_ms: u128,
    },
    /// The group did not freeze until the deadline.
    #[error("cgroup {0} did not freeze in time")]
    NotFrozen(String),
}

type Result<T> = std::result::Result<T, CgroupError>;

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::Io { action, path, source }
}

/// Where control groups are mounted on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    unified: Option<PathBuf>,
    /// Mount point by v1 controller name.
    v1: BTreeMap<String, PathBuf>,
}

impl Hierarchy {
    /// Reads the mounts of this process.
    ///
    /// # Errors
    /// [`CgroupError::NotMounted`] where nothing can freeze and kill.
    pub fn detect() -> Result<Arc<Self>> {
        let path = Path::new("/proc/self/mountinfo");
        let text = std::fs::read_to_string(path).map_err(io_error("read", path))?;
        let found = Self::parse(&text);
        if found.unified.is_none() && !found.v1.contains_key("freezer") {
            return Err(CgroupError::NotMounted);
        }
        Ok(Arc::new(found))
    }

    /// Reads lines of proc_pid_mountinfo(5).
    fn parse(mountinfo: &str) -> Self {
        const WANTED: [&str; 5] = ["memory", "cpu", "cpuacct", "pids", "freezer"];
        let mut found = Self { unified: None, v1: BTreeMap::new() };
        for line in mountinfo.lines() {
            let Some((left, right)) = line.split_once(" - ") else { continue };
            let Some(mount_point) = left.split(' ').nth(4) else { continue };
            let mut right = right.split(' ');
            let (fstype, options) = (right.next().unwrap_or(""), right.nth(1).unwrap_or(""));
            match fstype {
                "cgroup2" if found.unified.is_none() => found.unified = Some(PathBuf::from(mount_point)),
                "cgroup" => {
                    for controller in options.split(',').filter(|option| WANTED.contains(option)) {
                        found.v1.entry(controller.to_owned()).or_insert_with(|| PathBuf::from(mount_point));
                    }
                }
                _ => {}
            }
        }
        found
    }

    /// Each place where a group has a directory, once.
    fn roots(&self) -> Vec<&Path> {
        let mut roots: Vec<&Path> = self.unified.iter().map(PathBuf::as_path).collect();
        for root in self.v1.values() {
            if !roots.contains(&root.as_path()) {
                roots.push(root);
            }
        }
        roots
    }
}

/// Limits of a group; `None` leaves what is there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Cores × 1000.
    pub cpu_millis: Option<u64>,
    /// Bytes, swap not included.
    pub memory_bytes: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u64>,
}

/// What a group uses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CgroupStats {
    /// Microseconds of CPU since the group was made.
    pub cpu_usec: u64,
    /// Bytes of anonymous and shared memory; page cache of files is left out, since it can be reclaimed.
    pub memory_bytes: u64,
    /// Processes now.
    pub processes: u32,
    /// How often the kernel killed for lack of memory.
    pub oom_kills: u64,
}

/// One control group, in all hierarchies of the machine.
#[derive(Debug, Clone)]
pub struct Cgroup {
    hierarchy: Arc<Hierarchy>,
    name: String,
}

impl Cgroup {
    /// Names a group without touching the system; it need not exist. `name` is relative, e.g. `substrate/w1`.
    pub fn at(hierarchy: &Arc<Hierarchy>, name: &str) -> Self {
        Self { hierarchy: Arc::clone(hierarchy), name: name.trim_matches('/').to_owned() }
    }

    /// Makes the group (and its parents) in every hierarchy; one that exists is kept.
    ///
    /// # Errors
    /// [`CgroupError::Io`] naming the directory.
    pub fn create(hierarchy: &Arc<Hierarchy>, name: &str) -> Result<Self> {
        let group = Self::at(hierarchy, name);
        for root in hierarchy.roots() {
            let path = root.join(&group.name);
            std::fs::create_dir_all(&path).map_err(io_error("create cgroup", &path))?;
        }
        if let Some(root) = &hierarchy.unified {
            group.enable_controllers(root)?;
        }
        Ok(group)
    }

    /// In the v2 tree a group has the controllers that its parents hand down.
    fn enable_controllers(&self, root: &Path) -> Result<()> {
        let mut path = root.to_owned();
        for part in Path::new(&self.name) {
            let available = read(&path.join("cgroup.controllers"))?;
            let wanted: Vec<String> = ["cpu", "memory", "pids"]
                .into_iter()
                .filter(|name| available.split_whitespace().any(|have| have == *name))
                .map(|name| format!("+{name}"))
                .collect();
            if !wanted.is_empty() {
                write(&path.join("cgroup.subtree_control"), &wanted.join(" "))?;
            }
            path.push(part);
        }
        Ok(())
    }

    /// The group `name` below this one, not yet created.
    #[must_use]
    pub fn child(&self, name: &str) -> Self {
        Self { hierarchy: Arc::clone(&self.hierarchy), name: format!("{}/{name}", self.name) }
    }

    /// Makes a group named by [`Cgroup::child`] or [`Cgroup::at`].
    ///
    /// # Errors
    /// As [`Cgroup::create`].
    pub fn ensure(&self) -> Result<()> {
        Self::create(&self.hierarchy, &self.name).map(drop)
    }

    /// Relative name, e.g. `substrate/w1/actor-3`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Names of the groups directly below this one.
    pub fn children(&self) -> Vec<Self> {
        let mut names = std::collections::BTreeSet::new();
        for root in self.hierarchy.roots() {
            names.extend(subdirectories(&root.join(&self.name)));
        }
        names.iter().map(|name| self.child(name)).collect()
    }

    fn unified(&self) -> Option<PathBuf> {
        self.hierarchy.unified.as_ref().map(|root| root.join(&self.name))
    }

    fn v1(&self, controller: &str) -> Option<PathBuf> {
        self.hierarchy.v1.get(controller).map(|root| root.join(&self.name))
    }

    /// The directory that is asked who is a member: v2 where it is mounted, else the freezer's.
    fn membership(&self) -> Option<PathBuf> {
        self.unified().or_else(|| self.v1("freezer"))
    }

    /// Moves a process (0: the calling one) into the group. May block for tens of ms on v1.
    ///
    /// # Errors
    /// [`CgroupError::Io`]; ESRCH when there is no such process.
    pub fn add(&self, pid: u32) -> Result<()> {
        for root in self.hierarchy.roots() {
            write(&root.join(&self.name).join("cgroup.procs"), &pid.to_string())?;
        }
        Ok(())
    }

    /// Members of the group and of all below it.
    ///
    /// # Errors
    /// [`CgroupError::Io`]; a group that does not exist has none.
    pub fn processes(&self) -> Result<Vec<i32>> {
        fn collect(path: &Path, pids: &mut Vec<i32>) -> Result<()> {
            match std::fs::read_to_string(path.join("cgroup.procs")) {
                Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok())),
                Err(error) if gone(&error) => return Ok(()),
                Err(error) => return Err(io_error("read", &path.join("cgroup.procs"))(error)),
            }
            for name in subdirectories(path) {
                collect(&path.join(name), pids)?;
            }
            Ok(())
        }
        let mut pids = Vec::new();
        if let Some(path) = self.membership() {
            collect(&path, &mut pids)?;
        }
        Ok(pids)
    }

    /// Whether any process lives in the group or below it.
    ///
    /// # Errors
    /// As [`Cgroup::processes`].
    pub fn is_populated(&self) -> Result<bool> {
        if let Some(path) = self.unified() {
            return match std::fs::read_to_string(path.join("cgroup.events")) {
                Ok(text) => Ok(key(&text, "populated") == Some(1)),
                Err(error) if gone(&error) => Ok(false),
                Err(error) => Err(io_error("read", &path.join("cgroup.events"))(error)),
            };
        }
        Ok(!self.processes()?.is_empty())
    }

    /// Stops every process of the group where it stands and returns when the kernel says that they all are.
    ///
    /// # Errors
    /// [`CgroupError::NotFrozen`] after `limit`.
    pub fn freeze(&self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        if let Some(path) = self.unified() {
            write(&path.join("cgroup.freeze"), "1")?;
            return if wait_event(&path, "frozen", 1, deadline)? {
                Ok(())
            } else {
                Err(CgroupError::NotFrozen(self.name.clone()))
            };
        }
        let Some(path) = self.v1("freezer") else { return Err(CgroupError::NotMounted) };
        let state = path.join("freezer.state");
        while Instant::now() < deadline {
            // The v1 freezer has no notification; writing FROZEN again also catches children forked meanwhile.
            write(&state, "FROZEN")?;
            if read(&state)?.trim() == "FROZEN" {
                return Ok(());
            }
            std::thread::yield_now();
        }
        Err(CgroupError::NotFrozen(self.name.clone()))
    }

    /// Lets the group go on.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn thaw(&self) -> Result<()> {
        if let Some(path) = self.unified() {
            return write(&path.join("cgroup.freeze"), "0");
        }
        let Some(path) = self.v1("freezer") else { return Err(CgroupError::NotMounted) };
        write(&path.join("freezer.state"), "THAWED")
    }

    /// Kills every process in the group and below it; does not wait. A group that does not exist is empty.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn kill(&self) -> Result<()> {
        if let Some(path) = self.unified() {
            match write(&path.join("cgroup.kill"), "1") {
                Ok(()) => return Ok(()),
                Err(CgroupError::Io { source, .. }) if gone(&source) && !path.exists() => return Ok(()),
                // Kernels before 5.14 have no cgroup.kill.
                Err(CgroupError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        for pid in self.processes()? {
            match nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(errno) => {
                    return Err(io_error("kill a process of", Path::new(&self.name))(errno.into()));
                }
            }
        }
        Ok(())
    }

    /// Fences the group: kills everything in it and returns when it is empty. Blocks; see
    /// [`Cgroup::fence`] for tasks.
    ///
    /// # Errors
    /// [`CgroupError::NotEmpty`] when something is left after `limit`.
    pub fn kill_and_wait_empty(&self, limit: Duration) -> Result<()> {
        let started = Instant::now();
        let deadline = started + limit;
        let not_empty = |pids| CgroupError::NotEmpty {
            name: self.name.clone(),
            pids,
            waited_ms: started.elapsed().as_millis(),
        };
        loop {
            self.kill()?;
            if let Some(path) = self.unified().filter(|path| path.join("cgroup.kill").exists()) {
                return if wait_event(&path, "populated", 0, deadline)? {
                    Ok(())
                } else {
                    Err(not_empty(self.processes()?))
                };
            }
            // v1: freeze against forks, signal all, thaw to let them die, wait for each, and look again.
            if let Some(freezer) = self.v1("freezer").filter(|path| path.exists()) {
                write(&freezer.join("freezer.state"), "FROZEN")?;
                self.kill()?;
                write(&freezer.join("freezer.state"), "THAWED")?;
            }
            let pids = self.processes()?;
            if pids.is_empty() {
                return Ok(());
            }
            for pid in &pids {
                // ESRCH: it is gone already.
                if let Ok(pidfd) = pidfd_open(*pid)
                    && !wait_fd(&pidfd, PollFlags::POLLIN, deadline)
                        .map_err(io_error("wait for a process of", Path::new(&self.name)))?
                {
                    return Err(not_empty(pids));
                }
            }
            if Instant::now() >= deadline {
                return Err(not_empty(pids));
            }
        }
    }

    /// [`Cgroup::kill_and_wait_empty`] on a blocking thread.
    ///
    /// # Errors
    /// As [`Cgroup::kill_and_wait_empty`].
    pub async fn fence(&self, limit: Duration) -> Result<()> {
        let group = self.clone();
        blocking(move || group.kill_and_wait_empty(limit)).await
    }

    /// Waits until nothing lives in the group, without killing. `false` at the deadline.
    ///
    /// # Errors
    /// As [`Cgroup::processes`].
    pub fn wait_empty(&self, limit: Duration) -> Result<bool> {
        let deadline = Instant::now() + limit;
        if let Some(path) = self.unified() {
            return wait_event(&path, "populated", 0, deadline);
        }
        loop {
            let pids = self.processes()?;
            let Some(pid) = pids.first() else { return Ok(true) };
            if let Ok(pidfd) = pidfd_open(*pid)
                && !wait_fd(&pidfd, PollFlags::POLLIN, deadline)
                    .map_err(io_error("wait for a process of", Path::new(&self.name)))?
            {
                return Ok(false);
            }
        }
    }

    /// Sets limits on whichever hierarchy has the controller.
    ///
    /// # Errors
    /// [`CgroupError::Io`] when a limit that was asked for cannot be set.
    pub fn set_limits(&self, limits: Limits) -> Result<()> {
        const PERIOD_USEC: u64 = 100_000;
        let unified = |file: &str| self.unified().map(|path| path.join(file)).filter(|path| path.exists());
        if let Some(millis) = limits.cpu_millis {
            let quota = millis * PERIOD_USEC / 1000;
            if let Some(path) = unified("cpu.max") {
                write(&path, &format!("{quota} {PERIOD_USEC}"))?;
            } else if let Some(path) = self.v1("cpu") {
                write(&path.join("cpu.cfs_period_us"), &PERIOD_USEC.to_string())?;
                write(&path.join("cpu.cfs_quota_us"), &quota.to_string())?;
            }
        }
        if let Some(bytes) = limits.memory_bytes {
            if let Some(path) = unified("memory.max") {
                write(&path, &bytes.to_string())?;
            } else if let Some(path) = self.v1("memory") {
                write(&path.join("memory.limit_in_bytes"), &bytes.to_string())?;
            }
        }
        if let Some(pids) = limits.pids {
            if let Some(path) = unified("pids.max") {
                write(&path, &pids.to_string())?;
            } else if let Some(path) = self.v1("pids") {
                write(&path.join("pids.max"), &pids.to_string())?;
            }
        }
        Ok(())
    }

    /// How the group fares against its siblings when processors are short: as any other, or in the background, where
    /// it gets a sixteenth of that. Without a cpu controller this does nothing.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn set_background(&self, background: bool) -> Result<()> {
        // Defaults of the kernel's cgroup-v2.rst and sched-design-CFS.rst.
        let (weight, shares) = if background { ("6", "64") } else { ("100", "1024") };
        if let Some(path) = self.unified().map(|path| path.join("cpu.weight")).filter(|path| path.exists()) {
            write(&path, weight)
        } else if let Some(path) = self.v1("cpu") {
            write(&path.join("cpu.shares"), shares)
        } else {
            Ok(())
        }
    }

    /// What the group uses now; a group that does not exist uses nothing.
    pub fn stats(&self) -> CgroupStats {
        let text = |path: Option<PathBuf>, file: &str| {
            path.and_then(|path| std::fs::read_to_string(path.join(file)).ok()).unwrap_or_default()
        };
        // v2 counts CPU in every group, also without the controller.
        let cpu_usec = key(&text(self.unified(), "cpu.stat"), "usage_usec").unwrap_or_else(|| {
            text(self.v1("cpuacct"), "cpuacct.usage").trim().parse::<u64>().unwrap_or(0) / 1000
        });
        let mut stats = CgroupStats { cpu_usec, ..CgroupStats::default() };
        if let Some(path) = self.v1("memory") {
            let memory = text(Some(path.clone()), "memory.stat");
            stats.memory_bytes =
                key(&memory, "total_rss").unwrap_or(0) + key(&memory, "total_shmem").unwrap_or(0);
            stats.oom_kills = key(&text(Some(path), "memory.oom_control"), "oom_kill").unwrap_or(0);
        } else {
            let memory = text(self.unified(), "memory.stat");
            stats.memory_bytes = key(&memory, "anon").unwrap_or(0) + key(&memory, "shmem").unwrap_or(0);
            stats.oom_kills = key(&text(self.unified(), "memory.events"), "oom_kill").unwrap_or(0);
        }
        stats.processes = self.processes().map_or(0, |pids| pids.len() as u32);
        stats
    }

    /// Removes the group and those below it from every hierarchy. They must be empty.
    ///
    /// # Errors
    /// [`CgroupError::Io`] naming the first that could not be removed (EBUSY: processes live in it).
    pub fn remove(&self) -> Result<()> {
        fn remove_tree(path: &Path) -> Result<()> {
            for name in subdirectories(path) {
                remove_tree(&path.join(name))?;
            }
            match std::fs::remove_dir(path) {
                Ok(()) => Ok(()),
                Err(error) if gone(&error) => Ok(()),
                Err(error) => Err(io_error("remove cgroup", path)(error)),
            }
        }
        self.hierarchy.roots().into_iter().try_for_each(|root| remove_tree(&root.join(&self.name)))
    }
}

/// Runs blocking work of this crate on a thread of its own.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

fn gone(error: &io::Error) -> bool {
    // ENODEV is what an open file of a removed group answers.
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::ENODEV as i32)
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(io_error("read", path))
}

fn write(path: &Path, value: &str) -> Result<()> {
    // Not std::fs::write: a control file must never be created or truncated.
    use std::io::Write as _;
    std::fs::OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(value.as_bytes()))
        .map_err(io_error("write", path))
}

fn key(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(' ')?;
        (key == name).then(|| value.trim().parse().ok())?
    })
}

fn subdirectories(path: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(path) else { return Vec::new() };
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            entry.file_type().ok()?.is_dir().then(|| entry.file_name().to_string_lossy().into_owned())
        })
        .collect()
}

/// Waits until `name` in `cgroup.events` is `value`; a group that does not exist is neither populated nor frozen.
fn wait_event(path: &Path, name: &str, value: u64, deadline: Instant) -> Result<bool> {
    use std::io::{Read as _, Seek as _};
    let events = path.join("cgroup.events");
    let mut file = match std::fs::File::open(&events) {
        Ok(file) => file,
        Err(error) if gone(&error) => return Ok(value == 0),
        Err(error) => return Err(io_error("open", &events)(error)),
    };
    loop {
        let mut text = String::new();
        // Reading arms the notification for what comes after.
        let read = file.rewind().and_then(|()| file.read_to_string(&mut text));
        match read {
            Ok(_) if key(&text, name) == Some(value) => return Ok(true),
            Ok(_) => {}
            Err(error) if gone(&error) => return Ok(value == 0),
            Err(error) => return Err(io_error("read", &events)(error)),
        }
        if !wait_fd(&file, PollFlags::POLLPRI, deadline).map_err(io_error("poll", &events))? {
            return Ok(false);
        }
    }
}

/// Waits for an event on a descriptor; `false` at the deadline.
fn wait_fd(fd: &impl std::os::fd::AsFd, flags: PollFlags, deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, so that a deadline is never missed early and 0 means that it has passed.
        let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(fd.as_fd(), flags)];
        match nix::poll::poll(&mut fds, timeout) {
            Ok(0) if Instant::now() >= deadline => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
25 1 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
26 25 0:23 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
27 25 0:24 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
28 25 0:25 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer
29 25 0:26 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate
";

    #[test]
    fn mounts_of_a_hybrid_machine_are_told_apart() {
        let found = Hierarchy::parse(HYBRID);
        assert_eq!(found.unified.as_deref(), Some(Path::new("/sys/fs/cgroup/unified")));
        assert_eq!(found.v1["cpu"], Path::new("/sys/fs/cgroup/cpu,cpuacct"));
        assert_eq!(found.v1["cpuacct"], Path::new("/sys/fs/cgroup/cpu,cpuacct"));
        assert!(!found.v1.contains_key("pids"));
        // cpu and cpuacct share one directory, which must be used once.
        assert_eq!(found.roots().len(), 4);
    }

    #[test]
    fn a_pure_v2_machine_has_one_root() {
        let found = Hierarchy::parse("30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup rw\n");
        assert_eq!(found.roots(), [Path::new("/sys/fs/cgroup")]);
    }

    #[test]
    fn keys_are_matched_whole() {
        let text = "total_rss_huge 1\ntotal_rss 7\n";
        assert_eq!(key(text, "total_rss"), Some(7));
        assert_eq!(key(text, "rss"), None);
    }

    /// This machine has one kind of hierarchy; the other is played by plain files.
    #[test]
    fn limits_go_to_v2_where_it_has_the_controllers_and_else_to_v1() {
        const V2: [&str; 4] = ["cpu.max", "memory.max", "pids.max", "cpu.weight"];
        const V1: [&str; 5] =
            ["cpu.cfs_period_us", "cpu.cfs_quota_us", "memory.limit_in_bytes", "pids.max", "cpu.shares"];
        let limits = Limits { cpu_millis: Some(1500), memory_bytes: Some(64 << 20), pids: Some(33) };
        let play = |v2_files: &[&str], with_v1: bool| {
            let scratch = tempfile::tempdir().unwrap();
            let dir = scratch.path().to_owned();
            let group = |tree: &str, files: &[&str]| {
                let path = dir.join(tree).join("substrate/w1");
                std::fs::create_dir_all(&path).unwrap();
                for place in [dir.join(tree), dir.join(tree).join("substrate")] {
                    std::fs::write(place.join("cgroup.controllers"), "cpuset cpu io memory pids\n").unwrap();
                    std::fs::write(place.join("cgroup.subtree_control"), "").unwrap();
                }
                for file in files {
                    std::fs::write(path.join(file), "").unwrap();
                }
            };
            group("v2", v2_files);
            let mut v1 = BTreeMap::new();
            if with_v1 {
                group("v1", &V1);
                v1 = ["cpu", "memory", "pids"].map(|name| (name.to_owned(), dir.join("v1"))).into();
            }
            let hierarchy = Arc::new(Hierarchy { unified: Some(dir.join("v2")), v1 });
            let group = Cgroup::create(&hierarchy, "substrate/w1").unwrap();
            group.set_limits(limits).unwrap();
            group.set_background(true).unwrap();
            scratch
        };
        let said = |path: PathBuf| std::fs::read_to_string(path).unwrap();
        let scratch = play(&V2, false);
        let dir = scratch.path();
        for place in ["v2", "v2/substrate"] {
            assert_eq!(said(dir.join(place).join("cgroup.subtree_control")), "+cpu +memory +pids");
        }
        let values = V2.map(|file| said(dir.join("v2/substrate/w1").join(file)));
        assert_eq!(values, ["150000 100000", "67108864", "33", "6"]);
        // Hybrid: v2 is mounted, v1 has the controllers.
        let scratch = play(&[], true);
        let dir = scratch.path();
        let values = V1.map(|file| said(dir.join("v1/substrate/w1").join(file)));
        assert_eq!(values, ["100000", "150000", "67108864", "33", "64"]);
    }

    fn scratch(name: &str) -> Option<Cgroup> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: not root, cannot make cgroups");
            return None;
        }
        let hierarchy = Hierarchy::detect().unwrap();
        Some(
            Cgroup::create(&hierarchy, &format!("substrate-test/cgroup-{name}-{}", std::process::id()))
                .unwrap(),
        )
    }

    fn sleeper(group: &Cgroup) -> std::process::Child {
        let child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        group.add(child.id()).unwrap();
        child
    }

    #[test]
    fn a_frozen_group_is_killed_and_seen_empty() {
        let Some(group) = scratch("fence") else { return };
        let inner = group.child("actor-1");
        inner.ensure().unwrap();
        let mut child = sleeper(&inner);
        inner.freeze(Duration::from_secs(5)).unwrap();
        assert_eq!(group.processes().unwrap(), [child.id() as i32]);
        assert!(group.remove().is_err(), "a populated group was removed");
        group.kill_and_wait_empty(Duration::from_secs(5)).unwrap();
        assert!(!group.is_populated().unwrap());
        child.wait().unwrap();
        group.remove().unwrap();
        assert!(group.children().is_empty());
        // Fencing what is gone is no error: calls are retried.
        group.kill_and_wait_empty(Duration::from_secs(1)).unwrap();
    }

    #[test]
    fn without_a_kill_waiting_ends_at_the_deadline() {
        let Some(group) = scratch("wait") else { return };
        let mut child = sleeper(&group);
        assert!(!group.wait_empty(Duration::from_millis(20)).unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(group.wait_empty(Duration::from_secs(5)).unwrap());
        group.remove().unwrap();
    }

    #[test]
    fn limits_land_in_a_controller_and_use_is_counted() {
        let Some(group) = scratch("limits") else { return };
        group
            .set_limits(Limits { cpu_millis: Some(500), memory_bytes: Some(64 << 20), pids: Some(33) })
            .unwrap();
        let mut child = sleeper(&group);
        let stats = group.stats();
        assert_eq!(stats.processes, 1);
        if let Some(path) = group.v1("pids") {
            assert_eq!(read(&path.join("pids.max")).unwrap().trim(), "33");
            let path = group.v1("memory").unwrap();
            assert_eq!(read(&path.join("memory.limit_in_bytes")).unwrap().trim(), (64 << 20).to_string());
        }
        let share = || {
            let v2 = group.unified().map(|path| path.join("cpu.weight")).filter(|path| path.exists());
            read(&v2.or_else(|| Some(group.v1("cpu")?.join("cpu.shares"))).unwrap())
                .unwrap()
                .trim()
                .to_owned()
        };
        let usual = share();
        group.set_background(true).unwrap();
        assert_ne!(share(), usual);
        group.set_background(false).unwrap();
        assert_eq!(share(), usual);
        group.kill_and_wait_empty(Duration::from_secs(5)).unwrap();
        child.wait().unwrap();
        group.remove().unwrap();
    }

    #[test]
    fn the_v1_way_of_killing_works_alone() {
        let Some(group) = scratch("v1") else { return };
        let hierarchy = Hierarchy { unified: None, ..(*group.hierarchy).clone() };
        if !hierarchy.v1.contains_key("freezer") {
            eprintln!("skipped: no v1 freezer on this machine");
            group.remove().unwrap();
            return;
        }
        let old = Cgroup { hierarchy: Arc::new(hierarchy), name: group.name.clone() };
        let mut child = sleeper(&old);
        old.freeze(Duration::from_secs(5)).unwrap();
        old.kill_and_wait_empty(Duration::from_secs(5)).unwrap();
        child.wait().unwrap();
        assert!(old.processes().unwrap().is_empty());
        group.remove().unwrap();
    }
}

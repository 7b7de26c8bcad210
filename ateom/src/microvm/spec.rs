// SPDX-License-Identifier: Apache-2.0
//! From a [`SandboxSpec`] to a machine and to what its agent is told.
//!
//! **Roots.** `rootfs` is the read-only EROFS file of an image, as is the source of a mount of kind `image`; equal files
//! are one disk. **Mounts.** There is no shared file system with a guest. A directory that is not late-bound is a volume:
//! it holds one sparse disk of ext4. What is late-bound, and single files, are delivered by the agent after boot and
//! again after each restore.
//!
//! What the guest holds in its memory cannot be changed by a restore: [`digest`] covers it.
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use ateom_guest as guest;
use sha2::{Digest as _, Sha256};
use substrate_proto::ateom::{Mount, ResolvedContainer, SandboxSpec};

use crate::container;
use crate::error::SlotError;
use crate::network::{ACTOR_V4, ACTOR_V6, V4_PREFIX, V6_PREFIX, WORKER_V4, WORKER_V6};
use crate::runtime::{RuntimeError, file_error};
use crate::seccomp;
use crate::volume::DEFAULT_SIZE;

/// Memory of an actor that names none, bytes.
const DEFAULT_MEMORY: u64 = 512 << 20;
/// Least memory that a guest boots in, bytes.
const LEAST_MEMORY: u64 = 96 << 20;
/// What kernel, agent and the workload's page tables take of a guest's memory, bytes.
pub const GUEST_OVERHEAD: u64 = 64 << 20;
/// Most bytes of all deliveries.
const MAX_DELIVERED: u64 = 4 << 20;
/// Name of a volume's disk in its directory.
pub const VOLUME_DISK: &str = "disk.ext4";
/// Most image and volume disks: each takes a slot of the machine's bus.
const MAX_DISKS: usize = 20;

/// Kind of a mount that is a directory of an image.
const IMAGE: &str = "image";

/// A disk of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// By which the guest finds it.
    pub serial: String,
    /// On this host.
    pub path: PathBuf,
    /// Nobody may write to it.
    pub read_only: bool,
}

/// The virtual hardware. Equal shapes are equal machines; paths are of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Bytes; whole MiB.
    pub memory: u64,
    /// Virtual processors.
    pub processors: u32,
    /// Its kernel has what makes and filters networks: a container may administrate them.
    pub network_modules: bool,
    /// In order.
    pub disks: Vec<Disk>,
}

/// Where a volume is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Its directory on the host.
    pub directory: PathBuf,
    /// Bytes that it holds.
    pub size: u64,
}

impl Volume {
    /// Its disk.
    pub fn disk(&self) -> PathBuf {
        self.directory.join(VOLUME_DISK)
    }
}

/// Everything that follows from a spec without looking at the host.
#[derive(Debug, Clone)]
pub struct Layout {
    /// The machine.
    pub machine: Machine,
    /// Names of the images that containers mount beside their roots, with their EROFS files.
    pub mounted: Vec<(String, PathBuf)>,
    /// Distinct volumes, as their disks are numbered.
    pub volumes: Vec<Volume>,
    /// What the guest's containers are.
    pub containers: Vec<guest::Container>,
    /// Source on the host, and key, of each delivery.
    pub deliveries: Vec<(PathBuf, String)>,
}

fn is_volume(mount: &Mount) -> bool {
    matches!(mount.kind.as_str(), "" | "bind") && !mount.late_bound && !Path::new(&mount.source).is_file()
}

/// Lays a spec out.
pub fn layout(spec: &SandboxSpec) -> Layout {
    let (mut roots, mut volumes, mut deliveries) = (Vec::<&str>::new(), Vec::<Volume>::new(), Vec::new());
    let mut containers = Vec::new();
    for container in &spec.containers {
        let image = index_of(&mut roots, &container.rootfs.as_str());
        let mut volume = |directory: &str, bytes: u64| {
            let size = if bytes == 0 { DEFAULT_SIZE } else { bytes };
            let directory = PathBuf::from(directory);
            let known = volumes.iter().position(|volume| volume.directory == directory);
            known.unwrap_or_else(|| {
                volumes.push(Volume { directory, size });
                volumes.len() - 1
            })
        };
        let layer = (!container.layer.is_empty()).then(|| volume(&container.layer, container.layer_bytes));
        let mounts = container
            .mounts
            .iter()
            .map(|mount| {
                let source = if mount.kind == "tmpfs" {
                    guest::Source::Memory
                } else if mount.kind == IMAGE {
                    let image = index_of(&mut roots, &mount.source.as_str());
                    guest::Source::Image { image, path: mount.subpath.trim_matches('/').to_owned() }
                } else if is_volume(mount) {
                    guest::Source::Volume(volume(&mount.source, mount.size_bytes))
                } else {
                    let number = index_of(&mut deliveries, &PathBuf::from(&mount.source));
                    guest::Source::Delivery(number.to_string())
                };
                let read_only = mount.read_only || mount.kind == IMAGE;
                guest::Mount { destination: mount.destination.clone(), read_only, source }
            })
            .collect();
        containers.push(guest::Container {
            name: container.name.clone(),
            image,
            process: process(container, container.args.clone()),
            read_only_root: container.read_only_root,
            layer,
            mounts,
        });
    }
    let disk = |serial: String, path: PathBuf, read_only| Disk { serial, path, read_only };
    let images =
        roots.iter().enumerate().map(|(n, path)| disk(format!("image{n}"), PathBuf::from(path), true));
    let own = volumes.iter().enumerate().map(|(n, volume)| disk(format!("volume{n}"), volume.disk(), false));
    let memory = if spec.memory_bytes == 0 { DEFAULT_MEMORY } else { spec.memory_bytes };
    let machine = Machine {
        memory: (memory + GUEST_OVERHEAD).max(LEAST_MEMORY).next_multiple_of(2 << 20),
        processors: spec.cpu_millis.div_ceil(1000).clamp(1, host_processors()) as u32,
        network_modules: spec.containers.iter().any(administrates_networks),
        disks: images.chain(own).collect(),
    };
    let deliveries = deliveries.into_iter().enumerate().map(|(n, path)| (path, n.to_string())).collect();
    let is_root = |path: &Path| spec.containers.iter().any(|container| Path::new(&container.rootfs) == path);
    let mounted = machine.disks.iter().filter(|disk| disk.read_only && !is_root(&disk.path));
    let mounted = mounted.map(|disk| (disk.serial.clone(), disk.path.clone())).collect();
    Layout { machine, mounted, volumes, containers, deliveries }
}

fn administrates_networks(container: &ResolvedContainer) -> bool {
    container
        .capabilities
        .iter()
        .any(|name| name.trim_start_matches("CAP_").eq_ignore_ascii_case("NET_ADMIN"))
}

fn host_processors() -> u64 {
    std::thread::available_parallelism().map_or(1, |count| count.get() as u64)
}

fn index_of<T: PartialEq + Clone>(list: &mut Vec<T>, value: &T) -> usize {
    list.iter().position(|known| known == value).unwrap_or_else(|| {
        list.push(value.clone());
        list.len() - 1
    })
}

/// How a process of a container runs.
pub fn process(container: &ResolvedContainer, args: Vec<String>) -> guest::Process {
    guest::Process {
        args,
        env: container.env.clone(),
        cwd: container.working_dir.clone(),
        uid: container.uid,
        gid: container.gid,
        groups: container.additional_gids.clone(),
        capabilities: container.capabilities.clone(),
        no_new_privileges: container.no_new_privileges,
        // One that is wrong was refused before; whatever comes here all the same runs nothing.
        seccomp: seccomp::program(container.seccomp.as_ref(), &container.capabilities)
            .unwrap_or_else(|_| seccomp::REFUSE_ALL.to_vec()),
    }
}

/// What the agent is told at boot, but for what is new at every start.
pub fn boot(spec: &SandboxSpec, layout: &Layout, fresh: &[bool]) -> guest::Boot {
    let hostname = if spec.hostname.is_empty() { "actor" } else { &spec.hostname };
    let hosts =
        format!("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{hostname}\n");
    let resolver = format!("nameserver {WORKER_V4}\noptions timeout:5 attempts:2\n");
    let network = |address, prefix, gateway| guest::Network { address, prefix, gateway };
    guest::Boot {
        renewal: guest::Renewal::default(),
        hostname: hostname.to_owned(),
        pids: spec.pids,
        networks: vec![
            network(ACTOR_V4.into(), V4_PREFIX, WORKER_V4.into()),
            network(ACTOR_V6.into(), V6_PREFIX, WORKER_V6.into()),
        ],
        images: layout
            .machine
            .disks
            .iter()
            .filter(|disk| disk.read_only)
            .map(|disk| disk.serial.clone())
            .collect(),
        volumes: (layout.volumes.iter().enumerate())
            .map(|(n, _)| guest::VolumeDisk {
                serial: format!("volume{n}"),
                fresh: fresh.get(n).copied().unwrap_or(false),
            })
            .collect(),
        etc: vec![
            ("resolv.conf".to_owned(), resolver),
            ("hosts".to_owned(), hosts),
            ("hostname".to_owned(), format!("{hostname}\n")),
        ],
        containers: layout.containers.clone(),
    }
}

/// Reads everything that is to be delivered.
///
/// # Errors
/// [`RuntimeError::File`], or [`RuntimeError::Failed`] where it is too much.
pub fn deliveries(layout: &Layout) -> Result<Vec<guest::Delivery>, RuntimeError> {
    let mut left = MAX_DELIVERED;
    layout
        .deliveries
        .iter()
        .map(|(source, key)| {
            let meta = std::fs::metadata(source).map_err(file_error("read", source))?;
            let mut files = Vec::new();
            if meta.is_dir() {
                read_tree(source, "", &mut left, &mut files)?;
            } else {
                read_one(source, String::new(), &mut left, &mut files)?;
            }
            let mode = meta.mode() & 0o7777;
            Ok(guest::Delivery { key: key.clone(), directory: meta.is_dir(), mode, files })
        })
        .collect()
}

fn read_tree(
    directory: &Path,
    prefix: &str,
    left: &mut u64,
    files: &mut Vec<guest::DeliveredFile>,
) -> Result<(), RuntimeError> {
    let mut names: Vec<_> = std::fs::read_dir(directory)
        .and_then(|entries| {
            entries.map(|entry| entry.map(|entry| entry.file_name())).collect::<io::Result<_>>()
        })
        .map_err(file_error("list", directory))?;
    names.sort();
    for name in names {
        let path = directory.join(&name);
        let relative = format!("{prefix}{}", name.to_string_lossy());
        if std::fs::metadata(&path).map_err(file_error("read", &path))?.is_dir() {
            read_tree(&path, &format!("{relative}/"), left, files)?;
        } else {
            read_one(&path, relative, left, files)?;
        }
    }
    Ok(())
}

fn read_one(
    path: &Path,
    name: String,
    left: &mut u64,
    files: &mut Vec<guest::DeliveredFile>,
) -> Result<(), RuntimeError> {
    let meta = std::fs::metadata(path).map_err(file_error("read", path))?;
    *left = left.checked_sub(meta.len()).ok_or_else(|| {
        RuntimeError::Failed(format!(
            "more than {} MiB are to be delivered into the guest, up to {}: use a volume",
            MAX_DELIVERED >> 20,
            path.display()
        ))
    })?;
    let content = std::fs::read(path).map_err(file_error("read", path))?;
    files.push(guest::DeliveredFile {
        name,
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
        content,
    });
    Ok(())
}

/// sha256 (hex) of everything that a snapshot of this spec holds in its memory and that a restore cannot change.
pub fn digest(spec: &SandboxSpec) -> String {
    let layout = layout(spec);
    let mut containers = layout.containers;
    for container in &mut containers {
        container.process.env.clear();
        // What was asked for counts, not the program that comes of it.
        container.process.seccomp.clear();
    }
    let filters: Vec<_> =
        spec.containers.iter().filter_map(|it| Some((&it.name, it.seccomp.as_ref()?))).collect();
    let disks: Vec<(String, bool)> =
        layout.machine.disks.iter().map(|disk| (disk.serial.clone(), disk.read_only)).collect();
    let sizes: Vec<u64> = layout.volumes.iter().map(|volume| volume.size).collect();
    let shape = (layout.machine.memory, layout.machine.processors, spec.pids);
    // Structures and tuples only: their fields have an order.
    let mut text = serde_json::to_string(&(shape, disks, sizes, containers)).unwrap_or_default();
    // Snapshots of earlier builds know none.
    if !filters.is_empty() {
        text += &serde_json::to_string(&filters).unwrap_or_default();
    }
    hex::encode(Sha256::digest(text))
}

/// Checks what can be checked before anything is touched.
///
/// # Errors
/// [`SlotError::Invalid`] naming container and field.
pub fn validate(spec: &SandboxSpec) -> Result<(), SlotError> {
    container::validate(spec, |container| {
        if let Some(filter) = &container.seccomp {
            seccomp::check(filter)
                .map_err(|problem| format!("container {}: seccomp: {problem}", container.name))?;
        }
        let layer = &container.layer;
        if !layer.is_empty() && !Path::new(layer).is_dir() {
            let name = &container.name;
            return Err(format!(
                "container {name}: {layer} for its writable layer is no directory on this node"
            ));
        }
        let images = container.mounts.iter().filter(|mount| mount.kind == IMAGE).map(|mount| &mount.source);
        for (what, file) in std::iter::once(("rootfs", &container.rootfs)).chain(images.map(|it| (IMAGE, it)))
        {
            if !Path::new(file).is_file() {
                return Err(format!(
                    "container {}: {what} {file} is not an EROFS file on this node",
                    container.name
                ));
            }
        }
        Ok(())
    })?;
    let disks = layout(spec).machine.disks.len();
    if disks > MAX_DISKS {
        return Err(SlotError::Invalid(format!(
            "{disks} images and volumes are more than the {MAX_DISKS} disks of a microVM"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use substrate_proto::types::{Seccomp, SeccompRule};

    use super::*;

    type Change = fn(&mut SandboxSpec);

    fn container(name: &str) -> ResolvedContainer {
        ResolvedContainer {
            name: name.into(),
            rootfs: "/proc/self/exe".into(),
            args: vec!["/bin/app".into()],
            env: vec!["A=1".into()],
            uid: 1000,
            ..ResolvedContainer::default()
        }
    }

    fn mount(source: &Path, destination: &str, late_bound: bool) -> Mount {
        Mount {
            source: source.display().to_string(),
            destination: destination.into(),
            read_only: true,
            kind: "bind".into(),
            late_bound,
            size_bytes: 0,
            subpath: String::new(),
        }
    }

    #[test]
    fn images_and_volumes_are_shared_disks_and_the_rest_is_delivered() {
        let dir = tempfile::tempdir().unwrap();
        let (late, volume, file) = (dir.path().join("late"), dir.path().join("v"), dir.path().join("f"));
        std::fs::create_dir_all(late.join("sub")).unwrap();
        std::fs::create_dir(&volume).unwrap();
        std::fs::write(late.join("name"), "alice").unwrap();
        std::fs::write(late.join("sub/x"), "deep").unwrap();
        std::fs::write(&file, "secret").unwrap();
        let (mut one, mut two) = (container("one"), container("two"));
        one.mounts =
            vec![mount(&late, "/run/ate", true), mount(&volume, "/data", false), mount(&file, "/key", false)];
        two.mounts = vec![mount(&late, "/run/ate", true), mount(&volume, "/data", false)];
        let spec =
            SandboxSpec { containers: vec![one, two], memory_bytes: 256 << 20, ..SandboxSpec::default() };
        validate(&spec).unwrap();
        let layout = layout(&spec);
        let serials: Vec<&str> = layout.machine.disks.iter().map(|disk| disk.serial.as_str()).collect();
        assert_eq!(serials, ["image0", "volume0"]);
        assert_eq!(layout.machine.memory, (256 << 20) + GUEST_OVERHEAD);
        assert_eq!(layout.containers[1].mounts[0].source, guest::Source::Delivery("0".into()));
        assert_eq!(layout.containers[0].mounts[2].source, guest::Source::Delivery("1".into()));
        let delivered = deliveries(&layout).unwrap();
        let names: Vec<&str> = delivered[0].files.iter().map(|file| file.name.as_str()).collect();
        assert_eq!(names, ["name", "sub/x"]);
        assert_eq!(
            (delivered[1].directory, delivered[1].files[0].content.as_slice()),
            (false, &b"secret"[..])
        );
    }

    #[test]
    fn a_mounted_image_is_one_more_disk_shared_with_roots_of_the_same_file() {
        let image = |source: &str, subpath: &str| Mount {
            kind: IMAGE.into(),
            subpath: subpath.into(),
            read_only: false,
            ..mount(Path::new(source), "/opt/tools", false)
        };
        let (mut one, mut two) = (container("one"), container("two"));
        one.mounts = vec![image("/proc/self/status", "/bin/tools")];
        two.rootfs = "/proc/self/status".into();
        two.mounts = vec![image("/proc/self/exe", "")];
        let mut spec = SandboxSpec { containers: vec![one, two], ..SandboxSpec::default() };
        validate(&spec).unwrap();
        let laid = layout(&spec);
        assert_eq!(laid.machine.disks.len(), 2);
        assert!(laid.machine.disks.iter().all(|disk| disk.read_only));
        let first = &laid.containers[0].mounts[0];
        assert!(first.read_only, "nobody writes to an image");
        assert_eq!(first.source, guest::Source::Image { image: 1, path: "bin/tools".into() });
        assert!(laid.mounted.is_empty(), "both are roots: {:?}", laid.mounted);
        let before = digest(&spec);
        spec.containers[0].mounts[0].subpath = "/bin".into();
        assert_ne!(before, digest(&spec), "another directory");
        spec.containers.pop();
        let mounted = layout(&spec).mounted;
        assert_eq!(mounted, [("image1".to_owned(), PathBuf::from("/proc/self/status"))]);
        spec.containers[0].mounts[0].source = "/proc/self".into();
        assert!(validate(&spec).unwrap_err().to_string().contains("EROFS"));
    }

    #[test]
    fn a_layer_on_a_disk_is_one_more_volume() {
        let dir = tempfile::tempdir().unwrap();
        let mut main = container("main");
        main.mounts = vec![mount(dir.path(), "/data", false)];
        main.layer = "/tmp".into();
        main.layer_bytes = 5 << 30;
        let mut spec = SandboxSpec { containers: vec![main, container("side")], ..SandboxSpec::default() };
        validate(&spec).unwrap();
        let laid = layout(&spec);
        let (layer, data) = (PathBuf::from("/tmp"), dir.path().to_owned());
        let sizes: Vec<_> = laid.volumes.iter().map(|it| (it.directory.clone(), it.size)).collect();
        assert_eq!(sizes, [(layer, 5 << 30), (data, DEFAULT_SIZE)]);
        assert_eq!((laid.containers[0].layer, laid.containers[1].layer), (Some(0), None));
        assert_eq!(laid.containers[0].mounts[0].source, guest::Source::Volume(1));
        assert!(laid.machine.disks.iter().any(|disk| disk.path == Path::new("/tmp").join(VOLUME_DISK)));
        spec.containers[0].layer = "/no/such/place".into();
        assert!(validate(&spec).unwrap_err().to_string().contains("/no/such/place"));
    }

    #[test]
    fn a_process_is_always_filtered() {
        let mut main = container("main");
        assert!(!process(&main, vec!["x".into()]).seccomp.is_empty());
        let rule = SeccompRule { names: vec!["teleport".into()], action: "errno".into(), errno: 0 };
        main.seccomp = Some(Seccomp { rules: vec![rule], ..Seccomp::default() });
        assert_eq!(process(&main, vec!["x".into()]).seccomp, seccomp::REFUSE_ALL);
        let spec = SandboxSpec { containers: vec![main], ..SandboxSpec::default() };
        assert!(validate(&spec).unwrap_err().to_string().contains("teleport"));
    }

    #[test]
    fn the_digest_covers_what_memory_holds_and_nothing_else() {
        let of = |change: fn(&mut SandboxSpec)| {
            let mut spec = SandboxSpec { containers: vec![container("main")], ..SandboxSpec::default() };
            change(&mut spec);
            digest(&spec)
        };
        let same = of(|_| ());
        // As snapshots have it that exist: what a spec does not say must not change it.
        assert_eq!(same, "c10fe4ee9b0a2c9120cf0766e2befa2fd93a8878884118235b40937b15316996");
        let different: [(&str, Change); 10] = [
            ("memory", |s| s.memory_bytes = 64 << 20),
            ("pids", |s| s.pids = 9),
            ("args", |s| s.containers[0].args.push("-v".into())),
            ("user", |s| s.containers[0].uid = 0),
            ("capabilities", |s| s.containers[0].capabilities.push("CHOWN".into())),
            ("read-only root", |s| s.containers[0].read_only_root = true),
            ("a layer on a disk", |s| s.containers[0].layer = "/tmp".into()),
            ("seccomp", |s| {
                let rule = SeccompRule { names: vec!["mount".into()], action: "errno".into(), errno: 0 };
                s.containers[0].seccomp = Some(Seccomp { rules: vec![rule], ..Seccomp::default() });
            }),
            ("name", |s| s.containers[0].name = "other".into()),
            ("a mount", |s| s.containers[0].mounts.push(mount(Path::new("/etc/hostname"), "/x", true))),
        ];
        for (what, change) in different {
            assert_ne!(same, of(change), "{what}");
        }
        assert_eq!(same, of(|s| s.containers[0].env.push("B=2".into())), "env");
        assert_eq!(same, of(|s| s.containers[0].rootfs = "/other".into()), "path of the image");
        assert_eq!(same, of(|s| s.hostname = "bob".into()), "host name");
        assert_eq!(same, of(|s| s.containers[0].log_path = "/l".into()), "log");
    }

    #[test]
    fn too_much_to_deliver_is_refused_with_a_way_out() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("big"), vec![1; MAX_DELIVERED as usize + 1]).unwrap();
        let mut main = container("main");
        main.mounts = vec![mount(dir.path(), "/x", true)];
        let spec = SandboxSpec { containers: vec![main], ..SandboxSpec::default() };
        let error = deliveries(&layout(&spec)).unwrap_err().to_string();
        assert!(error.contains("big") && error.contains("volume"), "{error}");
    }
}

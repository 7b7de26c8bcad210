// SPDX-License-Identifier: Apache-2.0
//! An actor's directories on this host.
//!
//! ```text
//! DIR/node/actors/<uid>/actor.json         see ledger
//!                      /volumes/<name>/    volumes ([`quota`]); `volumes-at` says which snapshot they are equal to
//!                      /images             digests of the images it needs
//! RUN/actors/<uid>/identity/               content of /run/ate
//!                 /files/<n>               ActorSpec.files
//! ```
//!
//! Identity and files may be secrets, so they are on a tmpfs: if RUN is on a disk, one is mounted on `RUN/actors`.
//! Both are written anew before each activation, while nothing of the actor runs, in a directory beside that is then
//! renamed: a restored sandbox sees the new content (its mounts take another source).
use std::collections::BTreeMap;
use std::fs::{File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use ateom::microvm::spec::VOLUME_DISK;
use ateom::volume::{DEFAULT_SIZE, give_back, reserved};
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags};
use substrate_proto::types::{ActorSpec, Assignment, TemplateSpec, Volume};

use super::quantity;
use super::quota::{self, QuotaVolume};
use super::resolve::{self, Places};
use crate::durable;
use crate::error::NodeError;
use crate::snapshot::node::NodeSnapshot;
use crate::snapshot::{check_name, volume};

/// Most that one actor's identity and files may hold, bytes.
const MAX_LATE_BOUND: usize = 8 << 20;
/// The note of an actor's images.
const IMAGES: &str = "images";
/// Size of the tmpfs for all actors.
const TMPFS_OPTIONS: &str = "mode=0700,size=256m";

/// Where all actors' directories are.
#[derive(Debug, Clone)]
pub struct ActorPlaces {
    state: PathBuf,
    run: PathBuf,
    logs: PathBuf,
    /// `run` is in memory.
    volatile: bool,
}

impl ActorPlaces {
    /// Makes the directories, and mounts a tmpfs if `run` is not on one. Without the right to mount, actors with
    /// files are refused later.
    ///
    /// # Errors
    /// The system's.
    pub fn open(state: &Path, run: &Path, logs: &Path) -> io::Result<Self> {
        durable::create_dir(state)?;
        durable::create_dir(run)?;
        std::fs::set_permissions(run, Permissions::from_mode(0o700)).map_err(durable::at("chmod", run))?;
        durable::create_dir(logs)?;
        let mut volatile = is_memory(run)?;
        if !volatile {
            let mounted = nix::mount::mount(
                Some("substrate"),
                run,
                Some("tmpfs"),
                MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
                Some(TMPFS_OPTIONS),
            );
            match mounted {
                Ok(()) => volatile = true,
                Err(error) => {
                    tracing::warn!(
                        path = %run.display(), %error,
                        "cannot mount a tmpfs for secrets: actors with files will be refused"
                    );
                }
            }
        }
        Ok(Self { state: state.to_owned(), run: run.to_owned(), logs: logs.to_owned(), volatile })
    }

    /// Unmounts the tmpfs that [`ActorPlaces::open`] mounted on `run`, once nothing uses it.
    pub fn unmount(run: &Path) {
        let (Ok(inner), Some(Ok(outer))) = (device(run), run.parent().map(device)) else { return };
        if inner != outer
            && let Err(error) = nix::mount::umount2(run, MntFlags::empty())
        {
            tracing::warn!(path = %run.display(), %error, "cannot unmount the tmpfs of actors' files");
        }
    }

    fn dirs(&self, uid: &str) -> Result<(PathBuf, PathBuf), NodeError> {
        let uid = check_name("actor uid", uid)?;
        Ok((self.state.join(uid), self.run.join(uid)))
    }

    /// Directory of an actor's logs.
    pub fn log_dir(&self, atespace: &str, actor: &str) -> PathBuf {
        self.logs.join(atespace).join(actor)
    }

    /// Writes an actor's identity and files, and makes its volumes: empty, kept, or as the snapshot has them. Nothing
    /// of the actor may run.
    ///
    /// # Errors
    /// [`NodeError::Invalid`] where a limit is broken, [`NodeError::Io`].
    pub fn prepare(
        &self,
        assignment: &Assignment,
        template: &TemplateSpec,
        actor: &ActorSpec,
        identity: &BTreeMap<String, Vec<u8>>,
        snapshot: Option<&NodeSnapshot>,
        keep_volumes: bool,
    ) -> Result<Places, NodeError> {
        let (state, run) = self.dirs(&assignment.actor_uid)?;
        let total: usize = identity.values().map(Vec::len).sum::<usize>()
            + actor.files.iter().map(|file| file.content.len()).sum::<usize>();
        if total > MAX_LATE_BOUND {
            return Err(NodeError::invalid(
                "files",
                format!("hold {total} bytes with the identity, at most {MAX_LATE_BOUND} are delivered"),
            ));
        }
        if !self.volatile && !actor.files.is_empty() {
            return Err(NodeError::Io {
                what: "delivering the actor's files".to_owned(),
                source: io::Error::new(
                    io::ErrorKind::PermissionDenied,
                    format!(
                        "{} is on a disk and no tmpfs could be mounted there: run as root",
                        self.run.display()
                    ),
                ),
            });
        }
        let failed = NodeError::io("preparing the actor's directories");
        let logs = self.log_dir(&assignment.atespace, &assignment.actor_name);
        let prepared = (|| {
            private_dir(&run)?;
            let identity: Vec<(String, u32, &[u8])> = identity
                .iter()
                .map(|(name, content)| {
                    check_name("identity", name)
                        .map(|name| (name.to_owned(), 0o444, content.as_slice()))
                        .map_err(io::Error::other)
                })
                .collect::<io::Result<_>>()?;
            write_tree(&run.join("identity"), 0o755, &identity)?;
            let files: Vec<(String, u32, &[u8])> = actor
                .files
                .iter()
                .enumerate()
                .map(|(at, file)| (at.to_string(), file.mode & 0o777, file.content.as_slice()))
                .collect();
            write_tree(&run.join("files"), 0o700, &files)?;
            durable::create_dir(&logs)?;
            write_labels(&logs, assignment, actor)?;
            Self::prepare_volumes(&state, template, snapshot, keep_volumes)
        })();
        let volumes = prepared.map_err(failed)?;
        Ok(Places {
            identity: run.join("identity"),
            volumes,
            files: actor
                .files
                .iter()
                .enumerate()
                .map(|(at, file)| (file.path.clone(), run.join("files").join(at.to_string())))
                .collect(),
            logs,
        })
    }

    fn prepare_volumes(
        state: &Path,
        template: &TemplateSpec,
        snapshot: Option<&NodeSnapshot>,
        keep: bool,
    ) -> io::Result<BTreeMap<String, PathBuf>> {
        let (volumes, note) = (state.join("volumes"), state.join("volumes-at"));
        private_dir(state)?;
        let mut found = BTreeMap::new();
        let layers: Vec<Volume> = template.containers.iter().filter_map(resolve::layer).collect();
        if template.volumes.is_empty() && layers.is_empty() {
            return Ok(found);
        }
        private_dir(&volumes)?;
        let _held = hold(state)?;
        let at = std::fs::read_to_string(&note).unwrap_or_default();
        // From here on they are no snapshot's.
        durable::remove_file(&note)?;
        // A layer is never without its memory or a snapshot: a reset starts from the image.
        let volumes_of = template.volumes.iter().map(|spec| (spec, keep));
        for (spec, keep) in volumes_of.chain(layers.iter().map(|spec| (spec, false))) {
            let plain = volumes.join(&spec.name);
            let limited = QuotaVolume::at(&volumes, &spec.name);
            let archive = snapshot.and_then(|snapshot| {
                let file = (snapshot.record.files.iter())
                    .find(|file| file.kind == crate::snapshot::FileKind::Volume && file.name == spec.name)?;
                Some((snapshot, snapshot.path(file)))
            });
            let stays = match &archive {
                Some((snapshot, _)) => at == mark(snapshot),
                None => keep,
            };
            // A machine has a disk of that size in its directory; a directory that stays is of an earlier release.
            let of_machine = template.sandbox_class == "microvm";
            if of_machine || (stays && plain.is_dir() && !limited.exists()) {
                match &archive {
                    _ if stays && plain.is_dir() => {}
                    Some((_, archive)) => volume::unpack(archive, &plain)?,
                    None => {
                        durable::remove_tree(&plain)?;
                        std::fs::create_dir(&plain).map_err(durable::at("create", &plain))?;
                        std::fs::set_permissions(&plain, Permissions::from_mode(0o777))
                            .map_err(durable::at("chmod", &plain))?;
                    }
                }
                found.insert(spec.name.clone(), plain);
                continue;
            }
            let was_there = limited.exists();
            if was_there && archive.is_none() && !stays {
                limited.remove()?;
            }
            let data = limited.open(volume_size(spec)?)?;
            if let Some((_, archive)) = archive.filter(|_| !(stays && was_there)) {
                // First, or there would have to be room for both.
                durable::remove_tree(&data)?;
                volume::unpack(&archive, &data)?;
            }
            found.insert(spec.name.clone(), data);
        }
        Ok(found)
    }

    /// Bytes that the volumes of a template take on the disk while an actor is awake.
    ///
    /// # Errors
    /// [`NodeError::Invalid`] for a size that is none.
    pub fn volume_bytes(template: &TemplateSpec) -> Result<u64, NodeError> {
        let layers = template.containers.iter().filter_map(resolve::layer);
        let sizes =
            template.volumes.iter().cloned().chain(layers).map(|spec| volume_size(&spec).map(reserved));
        let sizes: io::Result<Vec<u64>> = sizes.collect();
        Ok(sizes.map_err(|error| NodeError::invalid("volumes.size", error.to_string()))?.into_iter().sum())
    }

    /// Notes which images an actor needs, here and to be restored: they are not collected as long as it is known here.
    ///
    /// # Errors
    /// [`NodeError::Io`].
    pub fn note_images(&self, uid: &str, digests: &[String]) -> Result<(), NodeError> {
        let path = self.dirs(uid)?.0.join(IMAGES);
        let content = digests.join("\n");
        if std::fs::read(&path).is_ok_and(|known| known == content.as_bytes()) {
            return Ok(());
        }
        durable::write(&path, content.as_bytes(), 0o600).map_err(NodeError::io("noting the actor's images"))
    }

    /// Digests of the images that actors known here need.
    ///
    /// # Errors
    /// The system's: then nothing may be collected.
    pub fn noted_images(&self) -> io::Result<std::collections::HashSet<String>> {
        let mut found = std::collections::HashSet::new();
        for entry in std::fs::read_dir(&self.state)? {
            match std::fs::read_to_string(entry?.path().join(IMAGES)) {
                Ok(text) => found.extend(text.lines().map(str::to_owned)),
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    /// Unmounts the volumes of an actor if it does not run, which is asked while no start can prepare them. Cleanup:
    /// what fails is logged, and costs space only.
    pub fn close_volumes(&self, uid: &str, is_idle: impl FnOnce() -> bool) {
        let Ok((state, _)) = self.dirs(uid) else { return };
        match hold(&state) {
            Ok(Some(_held)) if is_idle() => close_volumes(&state),
            Ok(_) => {}
            Err(error) => tracing::warn!(actor_uid = uid, %error, "the actor's volumes stay mounted"),
        }
    }

    /// Unmounts the volumes of all actors below `state`, none of which runs.
    pub fn close_all_volumes(state: &Path) {
        for entry in std::fs::read_dir(state).into_iter().flatten().flatten() {
            close_volumes(&entry.path());
        }
    }

    /// Directories of an actor's volumes that exist.
    ///
    /// # Errors
    /// [`NodeError::Io`].
    pub fn volumes(&self, uid: &str) -> Result<Vec<(String, PathBuf)>, NodeError> {
        let volumes = self.dirs(uid)?.0.join("volumes");
        let entries = match std::fs::read_dir(&volumes) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(NodeError::io("reading the actor's volumes"))?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(NodeError::io("reading the actor's volumes"))?;
            if let Ok(name) = entry.file_name().into_string()
                && !name.starts_with('.')
            {
                let limited = QuotaVolume::at(&volumes, &name);
                let dir = if limited.exists() { limited.data() } else { entry.path() };
                found.push((name, dir));
            }
        }
        found.sort();
        Ok(found)
    }

    /// Notes that the volumes are as a snapshot has them, so that the next restore of it need not unpack them.
    pub fn volumes_are_at(&self, uid: &str, snapshot: &NodeSnapshot) {
        if let Ok((state, _)) = self.dirs(uid)
            && let Err(error) = std::fs::write(state.join("volumes-at"), mark(snapshot))
        {
            tracing::warn!(actor_uid = uid, %error, "cannot note the state of the volumes; they will be unpacked");
        }
    }

    /// Forgets the secrets of an actor that does not run. Cleanup: what fails is logged.
    pub fn forget_secrets(&self, uid: &str) {
        if let Ok((_, run)) = self.dirs(uid)
            && let Err(error) = durable::remove_tree(&run)
        {
            tracing::warn!(actor_uid = uid, %error, "identity and files of the actor stay behind");
        }
    }

    /// Removes everything of an actor but its snapshots.
    ///
    /// # Errors
    /// [`NodeError::Io`]; the call may be sent again.
    pub fn purge(&self, uid: &str, atespace: &str, actor: &str) -> Result<(), NodeError> {
        let (state, run) = self.dirs(uid)?;
        durable::remove_tree(&run)
            .and_then(|()| remove_bundle(&state))
            .and_then(|()| durable::remove_tree(&self.log_dir(atespace, actor)))
            .map_err(NodeError::io("removing the actor's directories"))?;
        // The atespace's directory goes with its last actor.
        let _ = std::fs::remove_dir(self.logs.join(atespace));
        Ok(())
    }
}

/// Beside an actor's logs, for whoever ships them: what they belong to.
fn write_labels(logs: &Path, assignment: &Assignment, actor: &ActorSpec) -> io::Result<()> {
    let mut labels = actor.labels.clone();
    for (name, value) in [
        ("atespace", &assignment.atespace),
        ("actor", &assignment.actor_name),
        ("uid", &assignment.actor_uid),
        ("generation", &assignment.generation.to_string()),
        ("worker", &assignment.worker_id),
        ("template", &actor.template),
    ] {
        labels.insert(format!("ate.dev/{name}"), value.clone());
    }
    let path = logs.join("labels.json");
    let new = logs.join(".labels.new");
    std::fs::write(&new, serde_json::to_vec(&labels)?).map_err(durable::at("write", &new))?;
    std::fs::rename(&new, &path).map_err(durable::at("rename to", &path))
}

/// Directories of actors' volumes and other files below `state`, by uid.
///
/// # Errors
/// When they cannot be listed.
pub fn bundles(state: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let entries = match std::fs::read_dir(state) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if let Ok(uid) = entry.file_name().into_string()
            && !uid.starts_with('.')
            && entry.file_type()?.is_dir()
        {
            found.push((uid, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

/// Removes one of [`bundles`], also when its volumes are mounted. Nothing may use them any more.
///
/// # Errors
/// The system's.
pub fn remove_bundle(state: &Path) -> io::Result<()> {
    let _held = hold(state)?;
    close_volumes(state);
    durable::remove_tree(state)
}

/// Waits until nothing else changes the mounts below an actor's directory; nothing to hold if there is none.
fn hold(state: &Path) -> io::Result<Option<Flock<File>>> {
    let dir = match File::open(state) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(durable::at("open", state))?,
    };
    match Flock::lock(dir, FlockArg::LockExclusive) {
        Ok(held) => Ok(Some(held)),
        Err((_, error)) => Err(durable::at("lock", state)(error.into())),
    }
}

fn close_volumes(state: &Path) {
    let volumes = state.join("volumes");
    for name in quota::all(&volumes) {
        if let Err(error) = QuotaVolume::at(&volumes, &name).close() {
            tracing::warn!(volumes = %volumes.display(), name, %error, "a volume stays mounted");
        }
    }
    // Those of machines. There may be none.
    for entry in std::fs::read_dir(&volumes).into_iter().flatten().flatten() {
        let disk = entry.path().join(VOLUME_DISK);
        let given = match File::options().write(true).open(&disk) {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                Ok(())
            }
            other => other.and_then(|file| give_back(&file)),
        };
        if let Err(error) = given {
            // Only costs space.
            tracing::debug!(disk = %disk.display(), %error, "cannot give back unused space");
        }
    }
}

fn volume_size(spec: &Volume) -> io::Result<u64> {
    let size = quantity::bytes(&spec.size)
        .map_err(|rule| io::Error::new(io::ErrorKind::InvalidInput, format!("volumes.size: {rule}")))?;
    Ok(if size == 0 { DEFAULT_SIZE } else { size })
}

fn mark(snapshot: &NodeSnapshot) -> String {
    format!("{} {}", snapshot.record.snapshot_id, snapshot.node_digest)
}

/// Makes one directory, 0700; not fsynced.
fn private_dir(path: &Path) -> io::Result<()> {
    match std::fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(durable::at("create", path)(error));
        }
        _ => {}
    }
    std::fs::set_permissions(path, Permissions::from_mode(0o700)).map_err(durable::at("chmod", path))
}

/// Replaces a directory by one with exactly these files.
fn write_tree(dir: &Path, mode: u32, files: &[(String, u32, &[u8])]) -> io::Result<()> {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let fresh = dir.with_file_name(format!(".{name}.new"));
    durable::remove_tree(&fresh)?;
    std::fs::create_dir(&fresh).map_err(durable::at("create", &fresh))?;
    for (name, mode, content) in files {
        let path = fresh.join(name);
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(durable::at("create", &path))?;
        file.write_all(content).map_err(durable::at("write", &path))?;
        // Not by `mode`: the umask would take bits away.
        file.set_permissions(Permissions::from_mode(*mode)).map_err(durable::at("chmod", &path))?;
    }
    std::fs::set_permissions(&fresh, Permissions::from_mode(mode)).map_err(durable::at("chmod", &fresh))?;
    durable::remove_tree(dir)?;
    std::fs::rename(&fresh, dir).map_err(durable::at("rename to", dir))
}

fn is_memory(path: &Path) -> io::Result<bool> {
    let kind = nix::sys::statfs::statfs(path)
        .map_err(io::Error::from)
        .map_err(durable::at("statfs", path))?
        .filesystem_type();
    Ok(kind == nix::sys::statfs::TMPFS_MAGIC)
}

fn device(path: &Path) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata(path).map(|meta| meta.dev())
}

#[cfg(test)]
mod tests {
    use substrate_proto::types::{Container, File as ActorFile};

    use super::*;

    struct Bed {
        dir: tempfile::TempDir,
        places: ActorPlaces,
    }

    impl Bed {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let places = ActorPlaces::open(
                &dir.path().join("state"),
                &dir.path().join("run"),
                &dir.path().join("logs"),
            )
            .unwrap();
            Self { dir, places }
        }
    }

    impl Drop for Bed {
        fn drop(&mut self) {
            ActorPlaces::unmount(&self.dir.path().join("run"));
        }
    }

    fn assignment() -> Assignment {
        Assignment {
            actor_uid: "u1".into(),
            atespace: "blue".into(),
            actor_name: "alice".into(),
            generation: 1,
            worker_id: "w".into(),
        }
    }

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn identity_and_files_are_written_anew_and_never_on_a_disk() {
        let bed = Bed::new();
        let template = TemplateSpec::default();
        let with_file = |content: &[u8]| ActorSpec {
            files: vec![ActorFile { path: "/t".into(), mode: 0o400, content: content.to_vec() }],
            ..ActorSpec::default()
        };
        let identity = |entries: &[(&str, &str)]| {
            entries.iter().map(|(name, value)| ((*name).to_owned(), value.as_bytes().to_vec())).collect()
        };
        let prepare = |actor: &ActorSpec, identity: &BTreeMap<String, Vec<u8>>| {
            bed.places.prepare(&assignment(), &template, actor, identity, None, false)
        };
        if !bed.places.volatile {
            let error = prepare(&with_file(b"secret"), &BTreeMap::new()).unwrap_err();
            assert!(error.to_string().contains("tmpfs"), "{error}");
            eprintln!("skipped: cannot mount a tmpfs");
            return;
        }
        prepare(&with_file(b"secret"), &identity(&[("generation", "1"), ("old", "x")])).unwrap();
        let places = prepare(&with_file(b"renewed"), &identity(&[("generation", "2")])).unwrap();
        assert_eq!(std::fs::read(places.identity.join("generation")).unwrap(), b"2");
        assert!(!places.identity.join("old").exists());
        assert_eq!((mode(&places.identity), mode(&places.identity.join("generation"))), (0o755, 0o444));
        let (path, source) = &places.files[0];
        assert_eq!((path.as_str(), mode(source)), ("/t", 0o400));
        assert_eq!(std::fs::read(source).unwrap(), b"renewed");
        assert!(is_memory(source.parent().unwrap()).unwrap());
        assert_eq!(mode(source.parent().unwrap()), 0o700);
        assert!(prepare(&ActorSpec::default(), &identity(&[("../x", "")])).is_err());
        let large = with_file(&vec![0; MAX_LATE_BOUND + 1]);
        assert!(matches!(prepare(&large, &BTreeMap::new()), Err(NodeError::Invalid { .. })));
        bed.places.forget_secrets("u1");
        assert!(!source.exists());
        let labels = std::fs::read(bed.dir.path().join("logs/blue/alice/labels.json")).unwrap();
        let labels: BTreeMap<String, String> = serde_json::from_slice(&labels).unwrap();
        assert_eq!((labels["ate.dev/actor"].as_str(), labels["ate.dev/uid"].as_str()), ("alice", "u1"));
        bed.places.note_images("u1", &["sha256:a".into(), "sha256:b".into()]).unwrap();
        assert_eq!(bed.places.noted_images().unwrap().len(), 2);
        bed.places.purge("u1", "blue", "alice").unwrap();
        for dir in ["state", "run", "logs"] {
            assert_eq!(std::fs::read_dir(bed.dir.path().join(dir)).unwrap().count(), 0, "{dir}");
        }
    }

    #[test]
    fn volumes_start_empty_unless_they_are_kept() {
        let bed = Bed::new();
        let template = TemplateSpec {
            volumes: vec![Volume { name: "data".into(), size: "16MiB".into() }],
            ..TemplateSpec::default()
        };
        let prepare = |keep| {
            let none = BTreeMap::new();
            let places = bed
                .places
                .prepare(&assignment(), &template, &ActorSpec::default(), &none, None, keep)
                .unwrap();
            places.volumes["data"].clone()
        };
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: not root, cannot mount");
            return;
        }
        let data = prepare(false);
        assert_eq!(mode(&data), 0o777);
        std::fs::write(data.join("x"), b"1").unwrap();
        assert!(prepare(true).join("x").exists());
        assert!(!prepare(false).join("x").exists());
        assert_eq!(bed.places.volumes("u1").unwrap(), [("data".to_owned(), data.clone())]);
        assert!(bed.places.volumes("other").unwrap().is_empty());
        bed.places.close_volumes("u1", || false);
        assert!(data.exists(), "unmounted under a start");
        bed.places.close_volumes("u1", || true);
        assert!(!data.exists(), "still mounted");
        assert_eq!(ActorPlaces::volume_bytes(&template).unwrap(), reserved(16 << 20));
        prepare(true);
        let state = bed.dir.path().join("state");
        assert_eq!(bundles(&state).unwrap(), [("u1".to_owned(), state.join("u1"))]);
        bed.places.purge("u1", "blue", "alice").unwrap();
        assert_eq!(std::fs::read_dir(bed.dir.path().join("state")).unwrap().count(), 0);
    }

    #[test]
    fn a_root_on_a_disk_does_not_outlive_its_memory() {
        let bed = Bed::new();
        let container = Container { name: "main".into(), rootfs: "persist".into(), ..Container::default() };
        let mut template = TemplateSpec {
            sandbox_class: "microvm".into(),
            containers: vec![container],
            ..TemplateSpec::default()
        };
        let prepare = |template: &TemplateSpec| {
            let none = BTreeMap::new();
            bed.places.prepare(&assignment(), template, &ActorSpec::default(), &none, None, true).unwrap()
        };
        let layer = prepare(&template).volumes["root.main"].clone();
        std::fs::write(layer.join("disk.ext4"), b"1").unwrap();
        assert_eq!(
            bed.places.volumes("u1").unwrap(),
            [("root.main".to_owned(), layer.clone())],
            "it is archived"
        );
        template.volumes = vec![Volume { name: "data".into(), size: String::new() }];
        let data = prepare(&template).volumes["data"].clone();
        std::fs::write(data.join("disk.ext4"), b"2").unwrap();
        assert_eq!(prepare(&template).volumes["root.main"], layer);
        assert!(!layer.join("disk.ext4").exists(), "a reset kept the root");
        assert_eq!(ActorPlaces::volume_bytes(&template).unwrap(), 2 * reserved(1 << 30));
        assert!(data.join("disk.ext4").exists(), "a reset lost the volume");
    }

    #[test]
    fn a_directory_of_an_earlier_release_is_kept_and_a_machine_has_its_own_disk() {
        let bed = Bed::new();
        let mut template = TemplateSpec {
            volumes: vec![Volume { name: "data".into(), size: "16MiB".into() }],
            ..TemplateSpec::default()
        };
        let old = bed.dir.path().join("state/u1/volumes/data");
        std::fs::create_dir_all(&old).unwrap();
        std::fs::write(old.join("x"), b"1").unwrap();
        let prepare = |template: &TemplateSpec| {
            let none = BTreeMap::new();
            bed.places.prepare(&assignment(), template, &ActorSpec::default(), &none, None, true).unwrap()
        };
        assert_eq!(prepare(&template).volumes["data"], old);
        assert!(old.join("x").exists());
        template.sandbox_class = "microvm".into();
        assert_eq!(prepare(&template).volumes["data"], old);
        assert_eq!(ActorPlaces::volume_bytes(&template).unwrap(), reserved(16 << 20));
    }
}

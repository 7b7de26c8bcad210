// SPDX-License-Identifier: Apache-2.0
//! Volumes that cannot outgrow their size: a file system of that size in a file, mounted while the actor is awake.
//!
//! ```text
//! volumes/.<name>.img      ext4; all of it reserved on the disk while it is mounted, only what is used while it is not
//!        /<name>/          where it is mounted
//!        /<name>/data/     the volume
//! ```
//! Its space is [`ateom::volume`]'s: reserved while the actor is awake, and given back (fstrim(8)) when it goes to sleep.
//!
//! mount(8) sets the loop device up: it takes the one that already stands for this file, so that two mounts of a file
//! are one file system.
use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ateom::volume::{reserve, reserved};
use nix::errno::Errno;
use nix::mount::MntFlags;

use crate::durable;

/// Name of the volume's own directory in its file system.
const DATA: &str = "data";
/// How often unused space is given back at most before a volume stays as large as it is.
const TRIMS: u32 = 5;
/// What a volume's file may hold beyond what is in it, bytes.
const SLACK: u64 = 1 << 20;
/// How long a volume may be in somebody's use before it stays mounted.
const BUSY: Duration = Duration::from_secs(5);

/// A volume in `volumes`.
#[derive(Debug, Clone)]
pub struct QuotaVolume {
    image: PathBuf,
    mount: PathBuf,
}

impl QuotaVolume {
    /// Names it; touches nothing.
    pub fn at(volumes: &Path, name: &str) -> Self {
        Self { image: volumes.join(format!(".{name}.img")), mount: volumes.join(name) }
    }

    /// Whether it has been made.
    pub fn exists(&self) -> bool {
        self.image.exists()
    }

    /// The volume's own directory, if it is made and mounted.
    pub fn data(&self) -> PathBuf {
        self.mount.join(DATA)
    }

    /// Mounts it, makes it first if it is not there, and reserves its space. Its data is as it was, or empty.
    ///
    /// # Errors
    /// The system's or the tool's, with the way out; [`io::ErrorKind::StorageFull`] when the space is not there.
    pub fn open(&self, size: u64) -> io::Result<PathBuf> {
        if !self.exists() {
            self.make(reserved(size))?;
        } else if is_mounted(&self.mount)? {
            return Ok(self.data());
        }
        let file = File::options().write(true).open(&self.image).map_err(durable::at("open", &self.image))?;
        reserve(&file).map_err(durable::at("reserve the space of", &self.image))?;
        drop(file);
        self.mount()?;
        let data = self.data();
        if !data.is_dir() {
            std::fs::create_dir(&data).map_err(durable::at("create", &data))?;
            // As Kubernetes' emptyDir: whoever the containers run as can write.
            std::fs::set_permissions(&data, Permissions::from_mode(0o777))
                .map_err(durable::at("chmod", &data))?;
        }
        Ok(data)
    }

    fn mount(&self) -> io::Result<()> {
        match std::fs::create_dir(&self.mount) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(durable::at("create", &self.mount)(error));
            }
            _ => {}
        }
        run(Command::new("mount")
            .args(["-t", "ext4", "-o", "loop,noatime,nosuid,nodev,noinit_itable"])
            .args([&self.image, &self.mount]))
    }

    fn make(&self, size: u64) -> io::Result<()> {
        // Of an earlier release: a plain directory. Whoever makes a volume anew gives up what was there.
        durable::remove_tree(&self.mount)?;
        let new = self.image.with_extension("new");
        durable::remove_file(&new)?;
        let made = (|| {
            let file = File::options()
                .create_new(true)
                .write(true)
                .open(&new)
                .map_err(durable::at("create", &new))?;
            file.set_permissions(Permissions::from_mode(0o600))?;
            file.set_len(size)?;
            reserve(&file).map_err(durable::at("reserve the space of", &new))?;
            run(Command::new("mkfs.ext4")
                .args([
                    "-q",
                    "-F",
                    "-m",
                    "0",
                    "-E",
                    "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0",
                ])
                .arg(&new))?;
            std::fs::rename(&new, &self.image).map_err(durable::at("rename to", &self.image))
        })();
        if made.is_err() {
            durable::remove_file(&new)?;
        }
        made
    }

    /// Unmounts it and gives back what it does not hold. Nothing may use it any more.
    ///
    /// # Errors
    /// When it is busy; then it stays as it is.
    pub fn close(&self) -> io::Result<()> {
        if !is_mounted(&self.mount)? {
            return Ok(());
        }
        for attempt in 1.. {
            let trimmed = self.trim();
            self.unmount()?;
            // What was deleted is free once its journal is written and nobody has it open: sure only now.
            match trimmed.and_then(|()| self.kept()) {
                Ok(kept) if kept > SLACK && attempt < TRIMS => self.mount()?,
                Ok(_) => break,
                Err(error) => {
                    // Only costs space.
                    tracing::debug!(volume = %self.mount.display(), %error, "cannot give back unused space");
                    break;
                }
            }
        }
        Ok(())
    }

    fn trim(&self) -> io::Result<()> {
        nix::unistd::syncfs(File::open(&self.mount)?)?;
        run(Command::new("fstrim").arg(&self.mount))
    }

    fn unmount(&self) -> io::Result<()> {
        let deadline = Instant::now() + BUSY;
        loop {
            match nix::mount::umount2(&self.mount, MntFlags::empty()) {
                // Who looks through directories (du, a backup) holds one for a moment.
                Err(Errno::EBUSY) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                other => {
                    return other.map_err(io::Error::from).map_err(durable::at("unmount", &self.mount));
                }
            }
        }
    }

    /// Bytes the unmounted volume's file takes on the disk for nothing.
    fn kept(&self) -> io::Result<u64> {
        let file = File::open(&self.image).map_err(durable::at("open", &self.image))?;
        let mut superblock = [0; 1024];
        file.read_exact_at(&mut superblock, 1024).map_err(durable::at("read", &self.image))?;
        let meta = file.metadata()?;
        Ok((meta.blocks() * 512).saturating_sub(meta.len().saturating_sub(free_space(&superblock))))
    }

    /// Removes it with its data.
    ///
    /// # Errors
    /// As [`QuotaVolume::close`].
    pub fn remove(&self) -> io::Result<()> {
        self.close()?;
        durable::remove_file(&self.image)?;
        durable::remove_tree(&self.mount)
    }
}

/// Bytes an ext4 file system has free, by its superblock: `s_free_blocks_count_lo` at 0xc, `s_log_block_size` at 0x18
/// and `s_free_blocks_count_hi` at 0x158 (the kernel's Documentation/filesystems/ext4/super.rst).
fn free_space(superblock: &[u8; 1024]) -> u64 {
    let field = |at: usize| {
        let bytes = superblock[at..at + 4].try_into().expect("four bytes");
        u64::from(u32::from_le_bytes(bytes))
    };
    (field(0x158) << 32 | field(0xc)) << (10 + field(0x18))
}

/// Every volume in `volumes` that has a file system of its own, by name.
pub fn all(volumes: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(volumes) else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter_map(|name| Some(name.strip_prefix('.')?.strip_suffix(".img")?.to_owned()))
        .collect()
}

fn is_mounted(path: &Path) -> io::Result<bool> {
    let device = |path: &Path| match std::fs::metadata(path) {
        Ok(meta) => Ok(Some(meta.dev())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(durable::at("read", path)(error)),
    };
    let parent = path.parent().map_or(Ok(None), device)?;
    Ok(device(path)?.is_some_and(|own| Some(own) != parent))
}

fn run(command: &mut Command) -> io::Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let path = std::env::var("PATH").unwrap_or_default();
    let output = command
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("cannot run {program}: {error}; install it (apt-get install e2fsprogs util-linux)"),
            )
        })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let first = said.lines().find(|line| !line.trim().is_empty()).unwrap_or("no message").trim();
    let hint = if first.contains("loop") { " (volumes need loop devices: modprobe loop)" } else { "" };
    Err(io::Error::other(format!("{program}: {first}{hint}")))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn a_volume_takes_its_size_and_no_more_and_sleeps_with_what_it_holds() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: not root, cannot mount");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let volume = QuotaVolume::at(dir.path(), "data");
        let size = 64 << 20;
        let data = volume.open(size).unwrap();
        assert_eq!(std::fs::metadata(&data).unwrap().mode() & 0o7777, 0o777);
        let image = dir.path().join(".data.img");
        let on_disk = || std::fs::metadata(&image).unwrap().blocks() * 512;
        assert!(on_disk() >= size, "its space is not reserved");
        // What fits, fits; what does not is refused by the file system.
        let piece = vec![7; 1 << 20];
        let mut file = File::create(data.join("big")).unwrap();
        let mut written = 0_u64;
        let error = loop {
            match file.write_all(&piece) {
                Ok(()) => written += piece.len() as u64,
                Err(error) => break error,
            }
            assert!(written < 2 * size, "nothing stops it");
        };
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!(written >= size && written <= reserved(size), "{written} of {size} bytes fit");
        std::fs::remove_file(data.join("big")).unwrap();
        std::fs::write(data.join("small"), b"kept").unwrap();
        assert_eq!(volume.open(size).unwrap(), data, "open once more is nothing");
        // In somebody's use for a moment, as is what was deleted.
        let used = (File::open(&data).unwrap(), file);
        let user = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            drop(used);
        });
        volume.close().unwrap();
        user.join().unwrap();
        volume.close().unwrap();
        assert!(!data.exists());
        assert!(on_disk() < size / 4, "{} bytes while it sleeps", on_disk());
        assert_eq!(std::fs::read(volume.open(size).unwrap().join("small")).unwrap(), b"kept");
        assert!(on_disk() >= size, "its space is not reserved again");
        assert_eq!(all(dir.path()), ["data"]);
        volume.remove().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn space_that_is_not_there_is_said_and_nothing_stays() {
        let dir = tempfile::tempdir().unwrap();
        let volume = QuotaVolume::at(dir.path(), "data");
        // Larger than any disk of a test.
        let error = volume.open(1 << 46).unwrap_err();
        assert!(matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::FileTooLarge), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

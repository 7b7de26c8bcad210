// SPDX-License-Identifier: Apache-2.0
//! One read-only overlay per image.
//!
//! An overlay without an upper layer is read-only whatever its mount flags say. An image of one layer gets an empty
//! directory below, which overlayfs requires, and in return whiteouts mean the same everywhere. Mounts are made with
//! the new mount API (`lowerdir+`, Linux 6.5): it has no limit on the length of the option string, says in words what
//! it dislikes, and the mount appears under its name only when it is complete. On older kernels mount(2) is used,
//! with `/proc/self/fd/N` for each layer so that 200 of them fit into its one page.
//!
//! `redirect_dir` and `metacopy` are off: no attribute in a layer can point to another place. `nosuid` and `nodev`
//! hold for the host only; the sandbox reads modes through the gofer. Not `noexec`: the sandbox maps binaries from
//! these descriptors.
//!
//! **Implicit directories.** A directory that an upper layer only implied (see `tree.rs`) would show root:root 0755
//! instead of what a lower layer says, e.g. for `/tmp`. Such images get one more layer on top that holds these
//! directories with the right attributes. The layers themselves depend on nothing but their content, so that all
//! images share them.
use std::collections::BTreeMap;
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags};

use super::tree::OPAQUE;

/// Longest value of a mount option, bytes: fsconfig(2).
const MAX_VALUE: usize = 255;

/// A layer as the overlay needs it.
#[derive(Debug, Clone)]
pub(super) struct Lower {
    pub dir: PathBuf,
    /// See [`super::tree::Finished`].
    pub implicit: Vec<Vec<u8>>,
    pub opaque_root: bool,
}

/// Mounts `lowers` (topmost first, at least two) read-only at `target`. `name` shows in `/proc/mounts`.
pub(super) fn mount(lowers: &[PathBuf], target: &Path, name: &str) -> io::Result<()> {
    match mount_new(lowers, target, name) {
        Ok(()) => Ok(()),
        Err((Errno::NOSYS | Errno::INVAL, said)) => {
            tracing::debug!(error = said, "the new mount API is not usable, trying mount(2)");
            mount_old(lowers, target, name).map_err(|error| {
                io::Error::new(io::Error::from(error).kind(), format!("{said}; with mount(2): {error}"))
            })
        }
        Err((error, said)) => Err(io::Error::new(io::Error::from(error).kind(), said)),
    }
}

fn mount_new(lowers: &[PathBuf], target: &Path, name: &str) -> Result<(), (Errno, String)> {
    let plain = |error: Errno| (error, error.to_string());
    let context = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map_err(plain)?;
    let configure = || -> Result<OwnedFd, Errno> {
        rustix::mount::fsconfig_set_string(&context, "source", name)?;
        for lower in lowers {
            if lower.as_os_str().len() <= MAX_VALUE {
                rustix::mount::fsconfig_set_string(&context, "lowerdir+", lower)?;
            } else {
                let dir = open_dir(lower)?;
                let path = format!("/proc/self/fd/{}", dir.as_raw_fd());
                rustix::mount::fsconfig_set_string(&context, "lowerdir+", path)?;
            }
        }
        rustix::mount::fsconfig_set_string(&context, "redirect_dir", "nofollow")?;
        rustix::mount::fsconfig_set_string(&context, "metacopy", "off")?;
        rustix::mount::fsconfig_create(&context)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOATIME;
        rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
    };
    let mounted = configure().map_err(|error| match said(&context) {
        said if said.is_empty() => plain(error),
        said => (error, format!("{error} ({said})")),
    })?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(&mounted, "", rustix::fs::CWD, target, flags).map_err(plain)
}

/// The kernel's messages about a mount being configured.
fn said(context: &OwnedFd) -> String {
    let Ok(copy) = context.try_clone() else { return String::new() };
    let mut log = std::fs::File::from(copy);
    let mut lines = Vec::new();
    let mut buffer = [0; 1024];
    while let Ok(read @ 1..) = log.read(&mut buffer) {
        lines.push(String::from_utf8_lossy(&buffer[..read]).trim().to_owned());
        if lines.len() == 8 {
            break;
        }
    }
    lines.join("; ")
}

fn mount_old(lowers: &[PathBuf], target: &Path, name: &str) -> Result<(), Errno> {
    let dirs = lowers.iter().map(|lower| open_dir(lower)).collect::<Result<Vec<_>, _>>()?;
    let paths: Vec<String> = dirs.iter().map(|dir| format!("/proc/self/fd/{}", dir.as_raw_fd())).collect();
    let options = format!("lowerdir={},redirect_dir=nofollow,metacopy=off", paths.join(":"));
    let options = std::ffi::CString::new(options).map_err(|_| Errno::INVAL)?;
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME;
    rustix::mount::mount(name, target, "overlay", flags, options.as_c_str())
}

fn open_dir(path: &Path) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Unmounts `target` if it is a mount. `false` means that it is in use here and still mounted.
pub(super) fn unmount(target: &Path) -> io::Result<bool> {
    while is_mounted(target)? {
        match rustix::mount::unmount(target, UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::BUSY) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(true)
}

/// Whether something is mounted at `target`, which is no mount point of its parent's file system then.
pub(super) fn is_mounted(target: &Path) -> io::Result<bool> {
    let parent = target.parent().ok_or(io::ErrorKind::InvalidInput)?;
    match std::fs::symlink_metadata(target) {
        Ok(meta) => Ok(meta.dev() != std::fs::symlink_metadata(parent)?.dev()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Tries in `scratch`, an empty directory, whether this kernel and file system can do what layers need; says what is
/// missing.
pub(super) fn probe(scratch: &Path) -> Result<(), String> {
    let dirs = ["top", "bottom", "mount"].map(|name| scratch.join(name));
    let [top, bottom, target] = &dirs;
    let make = |path: &Path| std::fs::create_dir(path).map_err(|error| error.to_string());
    for dir in &dirs {
        make(dir)?;
    }
    make(&bottom.join("dir"))?;
    make(&top.join("dir"))?;
    for hidden in ["dir/hidden", "gone"] {
        std::fs::write(bottom.join(hidden), b"").map_err(|error| error.to_string())?;
    }
    let root = open_dir(top).map_err(|error| error.to_string())?;
    rustix::fs::mknodat(&root, "gone", rustix::fs::FileType::CharacterDevice, Mode::empty(), 0)
        .map_err(|error| format!("whiteouts (0:0 character devices) cannot be made: {error}; run as root"))?;
    rustix::fs::lsetxattr(top.join("dir"), OPAQUE, b"y", rustix::fs::XattrFlags::empty()).map_err(
        |error| {
            format!(
                "the file system has no trusted attributes ({error}): choose a directory on ext4, xfs or btrfs"
            )
        },
    )?;
    mount(&[top.clone(), bottom.clone()], target, "substrate-probe")
        .map_err(|error| format!("overlayfs cannot be mounted: {error}"))?;
    let works = !target.join("gone").exists() && !target.join("dir/hidden").exists();
    match unmount(target) {
        Ok(true) => {}
        Ok(false) => return Err("an overlay cannot be unmounted: it is busy".into()),
        Err(error) => return Err(format!("an overlay cannot be unmounted: {error}")),
    }
    if !works {
        return Err(
            "overlayfs on this file system does not honour whiteouts: choose a directory on ext4, xfs or \
             btrfs, not on another overlay"
                .into(),
        );
    }
    Ok(())
}

/// Mount points beneath `dir`, from `/proc/self/mountinfo` (proc(5)).
pub(super) fn mounts_beneath(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let table = std::fs::read("/proc/self/mountinfo")?;
    let mut found = Vec::new();
    for line in table.split(|&byte| byte == b'\n') {
        let Some(point) = line.split(|&byte| byte == b' ').nth(4) else { continue };
        let point = PathBuf::from(std::ffi::OsString::from_vec(unescape(point)));
        if point.starts_with(dir) && point != dir && !found.contains(&point) {
            found.push(point);
        }
    }
    Ok(found)
}

/// Blanks and backslashes are written as three octal digits.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, after)) = rest.split_first() {
        let code = after
            .get(..3)
            .filter(|_| first == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        if let Some(code) = code {
            out.push(code);
            rest = &after[3..];
        } else {
            out.push(first);
            rest = after;
        }
    }
    out
}

/// Attributes of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Attributes {
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: (i64, i64),
}

/// Fills the empty directory `target` with what the topmost layer must say about implicit directories; `false` if
/// nothing is needed. `lowers` are topmost first.
pub(super) fn write_attributes(lowers: &[Lower], target: &Path) -> io::Result<bool> {
    let mut wanted: BTreeMap<Vec<u8>, Attributes> = BTreeMap::new();
    for path in lowers.iter().flat_map(|lower| &lower.implicit) {
        if let Some((attributes, true)) = effective(lowers, path)? {
            wanted.insert(path.clone(), attributes);
        }
    }
    if wanted.is_empty() {
        return Ok(false);
    }
    // The directories above them appear in this layer too and must not change either.
    for path in wanted.keys().cloned().collect::<Vec<_>>() {
        for (slash, _) in path.iter().enumerate().filter(|(_, byte)| **byte == b'/') {
            let above = &path[..slash];
            if !wanted.contains_key(above)
                && let Some((attributes, _)) = effective(lowers, above)?
            {
                wanted.insert(above.to_vec(), attributes);
            }
        }
    }
    if let Some((attributes, _)) = effective(lowers, b"")? {
        wanted.insert(Vec::new(), attributes);
    }
    for path in wanted.keys().filter(|path| !path.is_empty()) {
        let dir = target.join(std::ffi::OsStr::from_bytes(path));
        std::fs::DirBuilder::new().mode(0o700).create(dir)?;
    }
    // Deepest first: making entries changes the time of the directory above.
    for (path, attributes) in wanted.iter().rev() {
        let dir = target.join(std::ffi::OsStr::from_bytes(path));
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::open(&dir, flags, Mode::empty())?;
        let (uid, gid) =
            (rustix::fs::Uid::from_raw(attributes.uid), rustix::fs::Gid::from_raw(attributes.gid));
        rustix::fs::fchown(&fd, Some(uid), Some(gid))?;
        rustix::fs::fchmod(&fd, Mode::from_raw_mode(attributes.mode))?;
        let times = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec: attributes.mtime.0, tv_nsec: attributes.mtime.1 },
        };
        rustix::fs::futimens(&fd, &times)?;
    }
    rustix::fs::syncfs(open_for_sync(target)?)?;
    Ok(true)
}

fn open_for_sync(path: &Path) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// The attributes that the directory `path` should show: those of the topmost layer that lists it, as far down as it
/// is one and the same directory. The flag says that an implicit one above would hide them. None where no layer lists
/// it.
fn effective(lowers: &[Lower], path: &[u8]) -> io::Result<Option<(Attributes, bool)>> {
    let mut hidden = false;
    for lower in lowers {
        let (found, ends) = look(lower, path)?;
        if let Some(attributes) = found {
            if !lower.implicit.iter().any(|implicit| implicit == path) {
                return Ok(Some((attributes, hidden)));
            }
            hidden = true;
        }
        if ends {
            return Ok(None);
        }
    }
    Ok(None)
}

/// Looks `path` up in one layer: its attributes if it is a directory there, and whether the layers below are hidden
/// at this path.
fn look(lower: &Lower, path: &[u8]) -> io::Result<(Option<Attributes>, bool)> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = open_dir(&lower.dir)?;
    let mut ends = lower.opaque_root;
    let ancestors =
        path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(slash, _)| &path[..slash]);
    for prefix in ancestors.chain(std::iter::once(path)) {
        let name = if prefix.is_empty() { b".".as_slice() } else { prefix };
        let fd = match rustix::fs::openat2(&root, name, flags, Mode::empty(), resolve) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok((None, ends)),
            Err(error) => return Err(error.into()),
        };
        let stat = rustix::fs::statat(&fd, "", AtFlags::EMPTY_PATH)?;
        if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::Directory {
            return Ok((None, true));
        }
        let inside = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let mut value = [0; 1];
        ends |= rustix::fs::getxattr(inside, OPAQUE, &mut value).is_ok_and(|_| value == *b"y");
        if prefix == path {
            let attributes = Attributes {
                mode: stat.st_mode & 0o7777,
                uid: stat.st_uid,
                gid: stat.st_gid,
                mtime: (stat.st_mtime, stat.st_mtime_nsec as i64),
            };
            return Ok((Some(attributes), ends));
        }
    }
    Ok((None, ends))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both ways of mounting take as many layers as an image may have, under long names, topmost first.
    #[test]
    fn old_and_new_kernels_mount_the_same() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: mounting needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("n".repeat(200));
        let lowers: Vec<PathBuf> = (0..super::super::spec::MAX_LAYERS + 2)
            .map(|number| {
                let lower = long.join(format!("{number}-{}", "m".repeat(60)));
                std::fs::create_dir_all(&lower).unwrap();
                std::fs::write(lower.join("which"), number.to_string()).unwrap();
                std::fs::write(lower.join(format!("only-{number}")), b"").unwrap();
                lower
            })
            .collect();
        let target = dir.path().join("target");
        std::fs::create_dir(&target).unwrap();
        let new = |lowers: &[PathBuf]| mount_new(lowers, &target, "test").map_err(|(error, _)| error);
        let old = |lowers: &[PathBuf]| mount_old(lowers, &target, "test");
        for is_new in [true, false] {
            if is_new { new(&lowers) } else { old(&lowers) }.unwrap();
            let which = std::fs::read_to_string(target.join("which"));
            let entries = std::fs::read_dir(&target).unwrap().count();
            let write = std::fs::write(target.join("new"), b"");
            assert!(unmount(&target).unwrap());
            assert!(!is_mounted(&target).unwrap());
            assert_eq!(which.unwrap(), "0");
            assert_eq!(entries, lowers.len() + 1);
            assert_eq!(write.unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
        }
        let missing = new(&[dir.path().join("none"), lowers[0].clone()]);
        assert_eq!(missing, Err(Errno::NOENT));
    }

    #[test]
    fn mount_points_with_blanks_are_read() {
        assert_eq!(unescape(br"/a\040b\134c\9"), br"/a b\c\9");
    }
}

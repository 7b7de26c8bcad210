// SPDX-License-Identifier: Apache-2.0
//! Placing the members of a layer beneath one directory and nowhere else, in the form overlayfs wants.
//!
//! **Rooted.** The directory of a member is opened with `openat2(RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS |
//! RESOLVE_NO_XDEV)` relative to the layer's root, and the member itself is made by its last name relative to that
//! descriptor without following links. A link that a layer made earlier may lead to another directory of the same
//! layer; one that is absolute or leads out is refused by the kernel, also when it is swapped in between. (Beneath
//! is stricter than RESOLVE_IN_ROOT, which would silently reinterpret an absolute link; links inside a *finished*
//! image are read with IN_ROOT, see `user.rs`.)
//!
//! **Whiteouts.** `.wh.NAME` becomes a 0:0 character device, `.wh..wh..opq` the attribute `trusted.overlay.opaque`.
//! A whiteout hides what lower layers have, never what the same layer has, whichever comes first in the archive: a
//! directory that is made in place of a whiteout is opaque. Other names that begin with `.wh..wh.` are bookkeeping of
//! aufs and passed over. An opaque root has no meaning for overlayfs and is reported to the caller.
//!
//! **Kept**: owners, modes with setuid, setgid and sticky, modification times, hard links, symlinks as they are,
//! FIFOs, holes, and the attributes `security.capability`, `user.*` and POSIX ACLs. Other attributes are of the
//! machine they were made on and left out; `trusted.overlay.*` would be obeyed by our overlay and is refused.
//!
//! **Devices** below `dev/` are left out, since the runtime gives each sandbox its own `/dev`; anywhere else the
//! layer is refused.
//!
//! A directory that an archive uses without listing it ("implicit") is made root:root 0755 and reported, because the
//! overlay would show these attributes instead of those of the layer below.
use std::collections::BTreeSet;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::Path;
use std::rc::Rc;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags,
};
use rustix::io::Errno;

use super::tarball::{Kind, Member};

pub(super) const OPAQUE: &str = "trusted.overlay.opaque";
/// Longest path in a layer, bytes: what PATH_MAX leaves when the path is below a root.
const MAX_PATH: usize = 4000;
/// Longest name, bytes.
const MAX_NAME: usize = 255;

/// Up to so many inodes are made durable one by one; beyond, flushing the whole file system is quicker.
const SYNC_EACH: u64 = 64;

/// Why a member cannot be placed.
#[derive(Debug)]
pub(super) enum PlaceError {
    /// No layer may do this.
    Refused(String),
    /// The system failed.
    Io(io::Error),
}

impl From<Errno> for PlaceError {
    fn from(error: Errno) -> Self {
        Self::Io(error.into())
    }
}

impl From<io::Error> for PlaceError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn refuse<T>(reason: impl Into<String>) -> Result<T, PlaceError> {
    Err(PlaceError::Refused(reason.into()))
}

/// What to do with a member's data.
pub(super) enum Placed {
    /// Nothing: there is none.
    Done,
    /// Write it into this file, then hand it to [`finish_file`].
    File(File),
}

/// A layer being put together.
pub(super) struct Tree {
    root: OwnedFd,
    root_path: Vec<u8>,
    /// The directory of the last member: archives list a directory's members together.
    parent: Option<(Vec<u8>, Rc<OwnedFd>)>,
    /// Modification times set at the end, since every new entry changes its directory's.
    times: Vec<(Vec<u8>, (i64, u32))>,
    implicit: BTreeSet<Vec<u8>>,
    opaque_root: bool,
    inodes: u64,
}

/// What is known of a finished tree.
#[derive(Debug)]
pub(super) struct Finished {
    pub inodes: u64,
    /// Paths of directories that the archive did not list.
    pub implicit: Vec<Vec<u8>>,
    /// Nothing of the layers below is visible.
    pub opaque_root: bool,
}

impl Tree {
    /// Starts in an empty directory.
    pub fn new(root: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::open(root, flags, Mode::empty())?;
        let root_path = descriptor_path(&fd)?;
        Ok(Self {
            root: fd,
            root_path,
            parent: None,
            times: Vec::new(),
            implicit: BTreeSet::new(),
            opaque_root: false,
            inodes: 0,
        })
    }

    /// Inodes made so far.
    pub fn inodes(&self) -> u64 {
        self.inodes
    }

    /// Places a member; the data of a file is written by the caller.
    pub fn place(&mut self, member: &Member) -> Result<Placed, PlaceError> {
        let path = clean(&member.path)?;
        let Some((dir, name)) = split(&path) else {
            if member.kind != Kind::Directory {
                return refuse("it stands for the root but is not a directory");
            }
            let root = self.root.try_clone()?;
            apply(&root, member)?;
            self.times.push((Vec::new(), member.mtime));
            return Ok(Placed::Done);
        };
        if let Some(hidden) = name.strip_prefix(b".wh.") {
            return self.whiteout(dir, hidden).map(|()| Placed::Done);
        }
        match member.kind {
            Kind::Device if dir == b"dev" || dir.starts_with(b"dev/") => {
                tracing::debug!(entry = %String::from_utf8_lossy(&path), "device left out");
                return Ok(Placed::Done);
            }
            Kind::Device => return refuse("it is a device node outside /dev"),
            Kind::Other(flag) => return refuse(format!("its type {:?} is not known", char::from(flag))),
            _ => {}
        }
        let parent = self.parent(dir)?;
        let name = CString::new(name).map_err(io::Error::from)?;
        let existing = existing_at(&parent, &name)?;
        if member.kind == Kind::Directory {
            return self.directory(&parent, &name, existing, &path, member).map(|()| Placed::Done);
        }
        let link = if member.kind == Kind::Hardlink { Some(self.link_target(member, &path)?) } else { None };
        if existing.is_some() {
            self.remove(&parent, &name, existing)?;
        }
        self.inodes += 1;
        match member.kind {
            Kind::File => {
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let fd = rustix::fs::openat(&*parent, &name, flags, Mode::from_raw_mode(0o600))?;
                return Ok(Placed::File(fd.into()));
            }
            Kind::Symlink => {
                if member.link.is_empty() || member.link.contains(&0) || member.link.len() > MAX_PATH {
                    return refuse("its link target is empty, too long or contains a zero byte");
                }
                rustix::fs::symlinkat(member.link.as_slice(), &*parent, &name)?;
                apply_at(&parent, &name, member, false)?;
            }
            Kind::Fifo => {
                let mode = Mode::from_raw_mode(0o600);
                rustix::fs::mknodat(&*parent, &name, FileType::Fifo, mode, 0)?;
                apply_at(&parent, &name, member, true)?;
            }
            Kind::Hardlink => {
                if let Some((target_dir, target)) = link {
                    self.inodes -= 1;
                    rustix::fs::linkat(&*target_dir, &target, &*parent, &name, AtFlags::empty()).or_else(
                        |error| match error {
                            Errno::MLINK => refuse("its target has more hard links than the disk allows"),
                            error => Err(error.into()),
                        },
                    )?;
                }
            }
            Kind::Directory | Kind::Device | Kind::Other(_) => {}
        }
        Ok(Placed::Done)
    }

    /// Sets what had to wait, and makes everything durable.
    pub fn finish(self) -> io::Result<Finished> {
        for (path, mtime) in &self.times {
            let path = if path.is_empty() { b".".as_slice() } else { path };
            match self.open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW) {
                Ok(dir) => rustix::fs::futimens(&dir, &timestamps(*mtime))?,
                // Replaced by a later member.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if self.inodes <= SYNC_EACH {
            sync_tree(Path::new(OsStr::from_bytes(&self.root_path)))?;
        } else {
            rustix::fs::syncfs(&self.root)?;
        }
        Ok(Finished {
            inodes: self.inodes,
            implicit: self.implicit.into_iter().collect(),
            opaque_root: self.opaque_root,
        })
    }

    fn open(&self, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        loop {
            match rustix::fs::openat2(&self.root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
                // The kernel could not rule out a race with a rename elsewhere on the machine: openat2(2).
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return other,
            }
        }
    }

    /// The directory with this path, made where it is missing.
    fn parent(&mut self, dir: &[u8]) -> Result<Rc<OwnedFd>, PlaceError> {
        if let Some((path, fd)) = &self.parent
            && path == dir
        {
            return Ok(Rc::clone(fd));
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let path = if dir.is_empty() { b".".as_slice() } else { dir };
        let fd = match self.open(path, flags) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR) => self.make_parents(dir)?,
            Err(error) => return Err(unusable_parent(dir, error)),
        };
        let fd = Rc::new(fd);
        self.parent = Some((dir.to_vec(), Rc::clone(&fd)));
        Ok(fd)
    }

    fn make_parents(&mut self, dir: &[u8]) -> Result<OwnedFd, PlaceError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let mut above = self.open(b".", flags)?;
        let mut end = 0;
        for part in dir.split(|&byte| byte == b'/') {
            end += part.len() + usize::from(end > 0);
            let prefix = &dir[..end];
            above = match self.open(prefix, flags) {
                Ok(fd) => fd,
                Err(error @ (Errno::NOENT | Errno::NOTDIR)) => {
                    let name = CString::new(part).map_err(io::Error::from)?;
                    let existing = existing_at(&above, &name)?;
                    let hidden = existing.is_some_and(|kind| kind == Existing::Whiteout);
                    if existing.is_some() && !hidden {
                        return Err(unusable_parent(prefix, error));
                    }
                    self.mkdir(&above, &name, hidden)?;
                    let fd = self.open(prefix, flags)?;
                    if !hidden {
                        self.implicit.insert(self.inside(&fd)?);
                    }
                    fd
                }
                Err(error) => return Err(unusable_parent(prefix, error)),
            };
        }
        Ok(above)
    }

    /// Makes a directory, in place of a whiteout if there is one.
    fn mkdir(&mut self, parent: &OwnedFd, name: &CString, hidden: bool) -> Result<(), PlaceError> {
        if hidden {
            rustix::fs::unlinkat(parent, name, AtFlags::empty())?;
        } else {
            self.inodes += 1;
        }
        rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = rustix::fs::openat(parent, name, flags, Mode::empty())?;
        rustix::fs::fchmod(&dir, Mode::from_raw_mode(0o755))?;
        // Not the time of the extraction, which would make two extractions differ.
        rustix::fs::futimens(&dir, &timestamps((0, 0)))?;
        if hidden {
            rustix::fs::fsetxattr(&dir, OPAQUE, b"y", XattrFlags::empty())?;
        }
        Ok(())
    }

    fn directory(
        &mut self,
        parent: &OwnedFd,
        name: &CString,
        existing: Option<Existing>,
        path: &[u8],
        member: &Member,
    ) -> Result<(), PlaceError> {
        match existing {
            Some(Existing::Directory) => {}
            Some(Existing::Whiteout) => self.mkdir(parent, name, true)?,
            Some(Existing::Other) => {
                self.remove(parent, name, existing)?;
                self.mkdir(parent, name, false)?;
            }
            None => self.mkdir(parent, name, false)?,
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = rustix::fs::openat(parent, name, flags, Mode::empty())?;
        apply(&dir, member)?;
        if !self.implicit.is_empty() {
            let inside = self.inside(&dir)?;
            self.implicit.remove(&inside);
        }
        self.times.push((path.to_vec(), member.mtime));
        Ok(())
    }

    fn whiteout(&mut self, dir: &[u8], hidden: &[u8]) -> Result<(), PlaceError> {
        if hidden == b".wh..opq" {
            if dir.is_empty() {
                self.opaque_root = true;
                return Ok(());
            }
            let parent = self.parent(dir)?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let fd = rustix::fs::openat(&*parent, c".", flags, Mode::empty())?;
            rustix::fs::fsetxattr(&fd, OPAQUE, b"y", XattrFlags::empty())?;
            return Ok(());
        }
        if hidden.starts_with(b".wh.") {
            return Ok(());
        }
        if matches!(hidden, b"" | b"." | b"..") {
            return refuse("it is a whiteout of nothing that has a name");
        }
        let parent = self.parent(dir)?;
        let name = CString::new(hidden).map_err(io::Error::from)?;
        match existing_at(&parent, &name)? {
            Some(Existing::Directory) => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let fd = rustix::fs::openat(&*parent, &name, flags, Mode::empty())?;
                rustix::fs::fsetxattr(&fd, OPAQUE, b"y", XattrFlags::empty())?;
            }
            Some(_) => {}
            None => {
                self.inodes += 1;
                let mode = Mode::empty();
                rustix::fs::mknodat(&*parent, &name, FileType::CharacterDevice, mode, 0)?;
            }
        }
        Ok(())
    }

    /// Directory and name of a hard link's target, which must be a file that this layer already has.
    fn link_target(&mut self, member: &Member, own: &[u8]) -> Result<(Rc<OwnedFd>, CString), PlaceError> {
        let target = clean(&member.link)?;
        let shown = String::from_utf8_lossy(&target).into_owned();
        let Some((dir, name)) = split(&target) else {
            return refuse("it is a hard link to the root");
        };
        if target == own {
            return refuse("it is a hard link to itself");
        }
        let path = if dir.is_empty() { b".".as_slice() } else { dir };
        let parent = match self.open(path, OFlags::PATH | OFlags::DIRECTORY) {
            Ok(fd) => Rc::new(fd),
            Err(Errno::NOENT | Errno::NOTDIR) => {
                return refuse(format!("it is a hard link to `{shown}`, which the layer does not have"));
            }
            Err(error) => return Err(unusable_parent(dir, error)),
        };
        let name = CString::new(name).map_err(io::Error::from)?;
        match existing_at(&parent, &name)? {
            Some(Existing::Other) => Ok((parent, name)),
            Some(Existing::Directory) => refuse(format!("it is a hard link to the directory `{shown}`")),
            Some(Existing::Whiteout) | None => {
                refuse(format!("it is a hard link to `{shown}`, which the layer does not have"))
            }
        }
    }

    /// Removes what an earlier member of the same archive made.
    fn remove(
        &mut self,
        parent: &OwnedFd,
        name: &CString,
        existing: Option<Existing>,
    ) -> Result<(), PlaceError> {
        if existing == Some(Existing::Directory) {
            self.parent = None;
            // Through the descriptor, so that no link can lead elsewhere; std's removal follows none below.
            let mut path = format!("/proc/self/fd/{}/", parent.as_fd().as_raw_fd()).into_bytes();
            path.extend_from_slice(name.as_bytes());
            std::fs::remove_dir_all(OsStr::from_bytes(&path))?;
            return Ok(());
        }
        rustix::fs::unlinkat(parent, name, AtFlags::empty())?;
        Ok(())
    }

    /// The real path of a descriptor inside the layer.
    fn inside(&self, fd: &OwnedFd) -> io::Result<Vec<u8>> {
        let path = descriptor_path(fd)?;
        path.strip_prefix(self.root_path.as_slice())
            .and_then(|rest| rest.strip_prefix(b"/"))
            .map(<[u8]>::to_vec)
            .ok_or_else(|| io::Error::other("a directory of the layer is outside the layer"))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Existing {
    Directory,
    Whiteout,
    Other,
}

/// Makes a finished tree durable; nobody else can reach it.
fn sync_tree(dir: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            File::open(entry.path())?.sync_all()?;
        }
    }
    File::open(dir)?.sync_all()
}

/// Gives a file whose data is complete its attributes.
pub(super) fn finish_file(file: &File, member: &Member) -> Result<(), PlaceError> {
    apply(file, member)?;
    rustix::fs::futimens(file, &timestamps(member.mtime))?;
    Ok(())
}

fn existing_at(parent: &OwnedFd, name: &CString) -> Result<Option<Existing>, PlaceError> {
    match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Existing::Directory,
            // Devices are never extracted, so this one is ours.
            FileType::CharacterDevice => Existing::Whiteout,
            _ => Existing::Other,
        })),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn descriptor_path(fd: &OwnedFd) -> io::Result<Vec<u8>> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    Ok(link.into_os_string().into_vec())
}

fn unusable_parent(dir: &[u8], error: Errno) -> PlaceError {
    let dir = String::from_utf8_lossy(dir);
    PlaceError::Refused(match error {
        Errno::XDEV => format!("its directory `{dir}` is a link that is absolute or leads out of the layer"),
        Errno::LOOP => format!("its directory `{dir}` is a link that leads to itself"),
        Errno::NOTDIR | Errno::NOENT => format!("its directory `{dir}` is not a directory"),
        error => return PlaceError::Io(error.into()),
    })
}

/// A path as names separated by single slashes, without a leading one; empty for the root.
fn clean(path: &[u8]) -> Result<Vec<u8>, PlaceError> {
    if path.contains(&0) {
        return refuse("its path contains a zero byte");
    }
    let mut clean = Vec::with_capacity(path.len());
    for part in path.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return refuse("its path contains `..`"),
            part if part.len() > MAX_NAME => {
                return refuse(format!("a name in its path is longer than {MAX_NAME} bytes"));
            }
            part => {
                if !clean.is_empty() {
                    clean.push(b'/');
                }
                clean.extend_from_slice(part);
            }
        }
    }
    if clean.len() > MAX_PATH {
        return refuse(format!("its path is longer than {MAX_PATH} bytes"));
    }
    Ok(clean)
}

fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    if path.is_empty() {
        return None;
    }
    match path.iter().rposition(|&byte| byte == b'/') {
        Some(slash) => Some((&path[..slash], &path[slash + 1..])),
        None => Some((b"", path)),
    }
}

fn timestamps(mtime: (i64, u32)) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: mtime.0, tv_nsec: mtime.1.into() },
    }
}

/// Owner first, then mode (chown clears setuid), then attributes (chown clears capabilities).
fn apply(fd: impl std::os::fd::AsFd, member: &Member) -> Result<(), PlaceError> {
    rustix::fs::fchown(&fd, Some(Uid::from_raw(member.uid)), Some(Gid::from_raw(member.gid)))?;
    rustix::fs::fchmod(&fd, Mode::from_raw_mode(member.mode))?;
    for (name, value) in &member.xattrs {
        if let Some(name) = kept_xattr(name, true)? {
            set_xattr(&name, rustix::fs::fsetxattr(&fd, &name, value, XattrFlags::empty()))?;
        }
    }
    Ok(())
}

/// The same for what cannot be opened.
fn apply_at(parent: &OwnedFd, name: &CString, member: &Member, mode: bool) -> Result<(), PlaceError> {
    let (uid, gid) = (Uid::from_raw(member.uid), Gid::from_raw(member.gid));
    rustix::fs::chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    if mode {
        rustix::fs::chmodat(parent, name, Mode::from_raw_mode(member.mode), AtFlags::empty())?;
    }
    let mut path = format!("/proc/self/fd/{}/", parent.as_raw_fd()).into_bytes();
    path.extend_from_slice(name.as_bytes());
    for (name, value) in &member.xattrs {
        if let Some(name) = kept_xattr(name, false)? {
            set_xattr(&name, rustix::fs::lsetxattr(path.as_slice(), &name, value, XattrFlags::empty()))?;
        }
    }
    rustix::fs::utimensat(parent, name, &timestamps(member.mtime), AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(())
}

/// The attribute's name if it is kept; see the module.
fn kept_xattr(name: &[u8], is_file_or_directory: bool) -> Result<Option<CString>, PlaceError> {
    if name.starts_with(b"trusted.overlay.") {
        return refuse(format!(
            "its attribute `{}` would be obeyed by the overlay",
            String::from_utf8_lossy(name)
        ));
    }
    let kept = name == b"security.capability"
        || (name.starts_with(b"user.") && is_file_or_directory)
        || name == b"system.posix_acl_access"
        || name == b"system.posix_acl_default";
    if !kept {
        return Ok(None);
    }
    match CString::new(name) {
        Ok(name) => Ok(Some(name)),
        Err(_) => refuse("the name of an attribute contains a zero byte"),
    }
}

fn set_xattr(name: &CString, result: Result<(), Errno>) -> Result<(), PlaceError> {
    let Err(error) = result else { return Ok(()) };
    let shown = name.to_string_lossy();
    if error == Errno::OPNOTSUPP && name.as_c_str() != c"security.capability" {
        tracing::debug!(attribute = %shown, "the file system has no such attributes, left out");
        return Ok(());
    }
    // ENOSPC means here that the attribute is too large for the file system, not that the disk is full.
    refuse(format!("its attribute `{shown}` cannot be set here: {error}"))
}

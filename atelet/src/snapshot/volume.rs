// SPDX-License-Identifier: Apache-2.0
//! Archives of volumes: one tar file each, with owners, modes, extended attributes, hard links and holes.
//!
//! A volume is archived while its actor is stopped and unpacked before it is started. The archive has one top
//! directory, `volume`, which carries the owner and mode of the volume itself. Sockets are left out: nothing listens
//! on them after a restore.
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use crate::durable;

const TOP: &str = "volume";

/// Writes the archive of `dir` to the new file `archive` and returns its size in bytes. It is not fsynced: the commit of
/// the snapshot does that.
///
/// # Errors
/// The system's, naming the path; the file may be left.
pub fn pack(dir: &Path, archive: &Path) -> io::Result<u64> {
    archive.parent().map_or(Ok(()), std::fs::create_dir_all)?;
    let file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(archive)
        .map_err(durable::at("create", archive))?;
    let mut builder = tar::Builder::new(io::BufWriter::with_capacity(1 << 20, file));
    builder.follow_symlinks(false);
    let mut links = HashMap::new();
    append(&mut builder, dir, Path::new(TOP), &mut links)?;
    let file = builder.into_inner()?.into_inner().map_err(io::IntoInnerError::into_error)?;
    Ok(file.metadata()?.len())
}

fn append<W: io::Write>(
    builder: &mut tar::Builder<W>,
    path: &Path,
    name: &Path,
    links: &mut HashMap<(u64, u64), PathBuf>,
) -> io::Result<()> {
    let meta = std::fs::symlink_metadata(path).map_err(durable::at("read", path))?;
    if meta.file_type().is_socket() {
        return Ok(());
    }
    if meta.is_file() && meta.nlink() > 1 {
        if let Some(first) = links.get(&(meta.dev(), meta.ino())) {
            let mut header = tar::Header::new_gnu();
            header.set_metadata(&meta);
            header.set_entry_type(tar::EntryType::Link);
            header.set_size(0);
            return builder.append_link(&mut header, name, first);
        }
        links.insert((meta.dev(), meta.ino()), name.to_owned());
    }
    if !meta.is_symlink() {
        append_xattrs(builder, path)?;
    }
    builder.append_path_with_name(path, name).map_err(durable::at("archive", path))?;
    if meta.is_dir() {
        let mut names: Vec<_> = std::fs::read_dir(path)
            .map_err(durable::at("list", path))?
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<io::Result<_>>()?;
        names.sort();
        for entry in names {
            append(builder, &path.join(&entry), &name.join(&entry), links)?;
        }
    }
    Ok(())
}

fn append_xattrs<W: io::Write>(builder: &mut tar::Builder<W>, path: &Path) -> io::Result<()> {
    let Ok(names) = xattr::list(path) else { return Ok(()) };
    let mut records = Vec::new();
    for name in names {
        if let (Some(text), Ok(Some(value))) = (name.to_str(), xattr::get(path, &name)) {
            records.push((format!("SCHILY.xattr.{text}"), value));
        }
    }
    if records.is_empty() {
        return Ok(());
    }
    builder.append_pax_extensions(records.iter().map(|(name, value)| (name.as_str(), value.as_slice())))
}

/// Replaces `dir` by what `archive` holds.
///
/// # Errors
/// The system's, naming the path; then `dir` is as before or gone.
pub fn unpack(archive: &Path, dir: &Path) -> io::Result<()> {
    let scratch = sibling(dir, ".unpack");
    durable::remove_tree(&scratch)?;
    let result = (|| {
        durable::create_dir(&scratch)?;
        let mut archive = tar::Archive::new(io::BufReader::with_capacity(
            1 << 20,
            File::open(archive).map_err(durable::at("open", archive))?,
        ));
        archive.set_preserve_permissions(true);
        archive.set_preserve_ownerships(nix::unistd::geteuid().is_root());
        archive.set_unpack_xattrs(true);
        archive.unpack(&scratch)?;
        durable::remove_tree(dir)?;
        std::fs::rename(scratch.join(TOP), dir).map_err(durable::at("rename to", dir))
    })();
    durable::remove_tree(&scratch)?;
    result
}

fn sibling(dir: &Path, suffix: &str) -> PathBuf {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    dir.with_file_name(format!(".{name}{suffix}"))
}

/// Bytes that a tree occupies on disk.
pub fn disk_bytes(path: &Path) -> u64 {
    let Ok(meta) = std::fs::symlink_metadata(path) else { return 0 };
    let own = meta.blocks() * 512;
    if !meta.is_dir() {
        return own;
    }
    let Ok(entries) = std::fs::read_dir(path) else { return own };
    own + entries.flatten().map(|entry| disk_bytes(&entry.path())).sum::<u64>()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_volume_comes_back_with_modes_links_and_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        std::fs::create_dir_all(from.join("sub")).unwrap();
        std::fs::set_permissions(&from, std::fs::Permissions::from_mode(0o1777)).unwrap();
        std::fs::write(from.join("a"), b"hello").unwrap();
        std::fs::set_permissions(from.join("a"), std::fs::Permissions::from_mode(0o640)).unwrap();
        std::fs::hard_link(from.join("a"), from.join("sub/b")).unwrap();
        symlink("/etc/passwd", from.join("link")).unwrap();
        symlink("nowhere", from.join("dangling")).unwrap();
        let sparse = File::create(from.join("sparse")).unwrap();
        sparse.set_len(64 << 20).unwrap();
        drop(std::os::unix::net::UnixListener::bind(from.join("sock")).unwrap());
        let with_xattr = xattr::set(from.join("a"), "user.k", b"v").is_ok();
        let archive = dir.path().join("x/v");
        let size = pack(&from, &archive).unwrap();
        assert!(size < 1 << 20, "holes were archived: {size}");
        // Replaces what is there.
        std::fs::create_dir(&to).unwrap();
        std::fs::write(to.join("old"), b"").unwrap();
        unpack(&archive, &to).unwrap();
        assert!(!to.join("old").exists() && !to.join("sock").exists());
        assert_eq!(std::fs::read(to.join("sub/b")).unwrap(), b"hello");
        let (a, b) = (std::fs::metadata(to.join("a")).unwrap(), std::fs::metadata(to.join("sub/b")).unwrap());
        assert_eq!((a.ino(), a.mode() & 0o7777), (b.ino(), 0o640));
        assert_eq!(std::fs::metadata(&to).unwrap().mode() & 0o7777, 0o1777);
        assert_eq!(std::fs::read_link(to.join("link")).unwrap(), Path::new("/etc/passwd"));
        assert!(std::fs::symlink_metadata(to.join("dangling")).unwrap().is_symlink());
        assert_eq!(std::fs::metadata(to.join("sparse")).unwrap().len(), 64 << 20);
        if with_xattr {
            assert_eq!(xattr::get(to.join("a"), "user.k").unwrap().unwrap(), b"v");
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3, "scratch stays behind");
    }
}

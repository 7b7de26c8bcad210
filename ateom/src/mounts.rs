// SPDX-License-Identifier: Apache-2.0
//! A place for mount points over a shared read-only root.
//!
//! An image's root is mounted once per node, read-only, for all its actors. runsc makes the mount points of a container
//! (`/etc/resolv.conf`, `/run/ate`, volumes, files) in its root on the host, so each container gets an overlay with a
//! small tmpfs on top. Nothing else is ever written there: what the workload writes goes to runsc's own overlay in
//! memory (`--overlay2=root:memory`).
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Room for mount points: names only.
const SCAFFOLD_OPTIONS: &str = "size=1m,nr_inodes=4096,mode=0700";

/// Mounts the tmpfs that holds the mount points of all containers of one sandbox.
///
/// # Errors
/// When the system refuses.
pub fn scaffold(directory: &Path) -> io::Result<PathBuf> {
    let path = directory.join("scaffold");
    std::fs::create_dir(&path)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("substrate-scaffold"), &path, Some("tmpfs"), flags, Some(SCAFFOLD_OPTIONS))?;
    Ok(path)
}

/// Mounts a root for one container, named by its id, over the shared `lower`; returns where.
///
/// # Errors
/// When the system refuses.
pub fn root(scaffold: &Path, id: &str, lower: &Path) -> io::Result<PathBuf> {
    let place = scaffold.join(id);
    let (upper, work, merged) = (place.join("upper"), place.join("work"), place.join("root"));
    for path in [&place, &upper, &work, &merged] {
        std::fs::create_dir(path)?;
    }
    // The root directory's own attributes come from the upper layer.
    let of = std::fs::metadata(lower)?;
    std::fs::set_permissions(&upper, of.permissions())?;
    std::os::unix::fs::chown(
        &upper,
        Some(std::os::unix::fs::MetadataExt::uid(&of)),
        Some(std::os::unix::fs::MetadataExt::gid(&of)),
    )?;
    let options = format!("lowerdir={},upperdir={},workdir={}", escape(lower), escape(&upper), escape(&work));
    mount(Some("substrate-root"), &merged, Some("overlay"), MsFlags::empty(), Some(options.as_str()))?;
    Ok(merged)
}

/// Escapes what separates options and layers (kernel: Documentation/filesystems/overlayfs.rst).
fn escape(path: &Path) -> String {
    let mut out = String::new();
    for c in path.to_string_lossy().chars() {
        if matches!(c, ':' | ',' | '\\') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// Detaches every mount below a directory, the innermost first.
///
/// # Errors
/// With the mount point that could not be detached.
pub fn unmount_below(directory: &Path) -> io::Result<()> {
    let text = std::fs::read_to_string("/proc/self/mountinfo")?;
    let points: Vec<&str> = text.lines().filter_map(|line| line.split(' ').nth(4)).collect();
    for point in points.into_iter().rev().map(Path::new).filter(|point| point.starts_with(directory)) {
        umount2(point, MntFlags::MNT_DETACH)
            .map_err(|errno| io::Error::other(format!("cannot unmount {}: {errno}", point.display())))?;
    }
    Ok(())
}

/// Removes a directory with the mounts below it.
///
/// # Errors
/// With the path that could not be unmounted or removed.
pub fn remove_tree(directory: &Path) -> io::Result<()> {
    unmount_below(directory)?;
    std::fs::remove_dir_all(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_made_over_a_read_only_root_and_leave_no_trace_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let lower = dir.path().join("a:b,c");
        std::fs::create_dir(&lower).unwrap();
        std::fs::write(lower.join("file"), "of the image").unwrap();
        let place = dir.path().join("place");
        std::fs::create_dir(&place).unwrap();
        let merged = root(&scaffold(&place).unwrap(), "w00", &lower).unwrap();
        std::fs::write(merged.join("point"), "").unwrap();
        assert_eq!(std::fs::read_to_string(merged.join("file")).unwrap(), "of the image");
        assert!(!lower.join("point").exists());
        remove_tree(&place).unwrap();
        assert!(!place.exists());
        assert!(lower.join("file").exists(), "removal reached the image");
    }
}

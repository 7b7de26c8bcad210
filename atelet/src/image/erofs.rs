// SPDX-License-Identifier: Apache-2.0
//! Images as disks for microVMs: one read-only EROFS file for each image digest, made once, shared by all actors.
//!
//! ```text
//! erofs/<hex>.img          made from the image's root by mkfs.erofs, in a temporary file that is renamed
//! erofs/<hex>.img.sha256   its digest, written before the rename
//! ```
//! The same image gives the same bytes on every node (a fixed file system id, no time of its making), because a
//! restored guest has parts of the file in its page cache; the digest travels with each snapshot and is compared.
//!
//! Making one goes on when its caller gives up, so no deadline of a call has to be as long as it takes.
use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sha2::{Digest as _, Sha256};

use super::error::ImageError;
use super::locks::Locks;
use super::reference::Digest;
use super::store::Image;
use crate::durable;

/// The file system's id; the same for all, because the image's digest is its name.
const ID: &str = "73756273-7472-4174-8565-726f66730001";
/// Later than any file's time: mkfs.erofs takes it for its own, and earlier times stay.
const EPOCH: &str = "4102444800";

/// The EROFS files of a node.
#[derive(Debug)]
pub struct ErofsImages {
    dir: PathBuf,
    locks: Locks<Digest>,
}

impl ErofsImages {
    /// Opens the directory; what a killed process left unfinished is removed.
    ///
    /// # Errors
    /// [`ImageError::Io`].
    pub fn open(dir: PathBuf) -> Result<Self, ImageError> {
        let cleared = durable::create_dir(&dir).and_then(|()| {
            for entry in std::fs::read_dir(&dir)? {
                let entry = entry?;
                if entry.file_name().as_encoded_bytes().starts_with(b".new-") {
                    durable::remove_file(&entry.path())?;
                }
            }
            Ok(())
        });
        cleared.map_err(|error| ImageError::io("open the images of microVMs", &dir, error))?;
        Ok(Self { dir, locks: Locks::default() })
    }

    /// Removes the files of images that are not in `present` any more; answers their bytes. What is being made is of an
    /// image that is held, and so is present.
    ///
    /// # Errors
    /// The system's.
    pub fn collect(&self, present: &HashSet<Digest>) -> io::Result<u64> {
        use std::os::unix::fs::MetadataExt as _;
        let mut freed = 0;
        for entry in std::fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let Some(hex) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".img")) else {
                continue;
            };
            if hex.starts_with('.') || present.iter().any(|digest| digest.hex() == hex) {
                continue;
            }
            freed += std::fs::metadata(&path)?.blocks() * 512;
            durable::remove_file(&path)?;
            durable::remove_file(&path.with_extension("img.sha256"))?;
        }
        Ok(freed)
    }

    /// The file of an image, made if it is not there.
    ///
    /// # Errors
    /// [`ImageError::Io`] where mkfs.erofs is missing or fails.
    pub async fn ensure(&self, image: &Image) -> Result<PathBuf, ImageError> {
        let path = self.dir.join(format!("{}.img", image.digest.hex()));
        let _turn = self.locks.lock(image.digest.clone()).await;
        if path.exists() {
            return Ok(path);
        }
        let (made, image) = (path.clone(), image.clone());
        // The image is held until it is done, whoever still waits.
        crate::blocking(move || {
            let begun = std::time::Instant::now();
            make(&image.rootfs, &made)
                .map_err(|error| ImageError::io("make a microVM's disk of an image", &made, error))?;
            tracing::info!(image = %image.digest, ms = begun.elapsed().as_millis(), "made an EROFS image");
            Ok(())
        })
        .await?;
        Ok(path)
    }
}

fn make(rootfs: &Path, path: &Path) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let unfinished = path.with_file_name(format!(".new-{name}-{}", uuid::Uuid::new_v4().simple()));
    let result = (|| {
        let output = Command::new("mkfs.erofs")
            .args(["--quiet", "-U", ID])
            .args([&unfinished, rootfs])
            .env("SOURCE_DATE_EPOCH", EPOCH)
            .stdin(Stdio::null())
            .output()
            .map_err(|error| {
                io::Error::new(
                    error.kind(),
                    format!("cannot run mkfs.erofs: {error}; install it (apt-get install erofs-utils)"),
                )
            })?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let last = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default().to_owned();
            return Err(io::Error::other(format!("mkfs.erofs ended with {}: {last}", output.status)));
        }
        let mut file = File::open(&unfinished)?;
        let mut hasher = Sha256::new();
        io::copy(&mut file, &mut hasher)?;
        file.sync_all()?;
        let digest = path.with_file_name(format!("{name}.sha256"));
        std::fs::write(&digest, hex::encode(hasher.finalize()))?;
        File::open(&digest)?.sync_all()?;
        std::fs::rename(&unfinished, path)?;
        File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
    })();
    if result.is_err()
        && let Err(error) = durable::remove_file(&unfinished)
    {
        tracing::warn!(path = %unfinished.display(), %error, "an unfinished EROFS image stays behind");
    }
    result
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn the_same_files_give_the_same_bytes_with_their_digest_beside() {
        let dir = tempfile::tempdir().unwrap();
        let tree = |name: &str, reverse: bool| {
            let root = dir.path().join(name);
            std::fs::create_dir_all(root.join("bin")).unwrap();
            let mut files = ["a", "b", "c"];
            if reverse {
                files.reverse();
            }
            for file in files {
                let path = root.join("bin").join(file);
                std::fs::write(&path, file.repeat(5000)).unwrap();
                File::open(&path).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
            }
            symlink("bin/a", root.join("link")).unwrap();
            let touch = ["-h", "-d", "2020-01-01", "link", "bin", "."];
            assert!(Command::new("touch").args(touch).current_dir(&root).status().unwrap().success());
            root
        };
        let (one, two) = (dir.path().join("one.img"), dir.path().join("two.img"));
        make(&tree("one", false), &one).unwrap();
        make(&tree("two", true), &two).unwrap();
        let bytes = std::fs::read(&one).unwrap();
        assert!(
            bytes == std::fs::read(&two).unwrap(),
            "what a guest has in its cache would be wrong elsewhere"
        );
        let digest = std::fs::read_to_string(dir.path().join("one.img.sha256")).unwrap();
        assert_eq!(digest, hex::encode(Sha256::digest(&bytes)));
        let store = ErofsImages { dir: dir.path().to_owned(), locks: Locks::default() };
        let (kept, gone) = (Digest::of(b"kept"), Digest::of(b"gone"));
        for digest in [&kept, &gone] {
            std::fs::copy(&one, dir.path().join(format!("{}.img", digest.hex()))).unwrap();
            std::fs::write(dir.path().join(format!("{}.img.sha256", digest.hex())), "x").unwrap();
        }
        std::fs::remove_file(&one).unwrap();
        std::fs::remove_file(&two).unwrap();
        assert!(store.collect(&[kept.clone()].into()).unwrap() > 0);
        assert!(dir.path().join(format!("{}.img", kept.hex())).exists());
        assert!(!dir.path().join(format!("{}.img", gone.hex())).exists());
        assert!(!dir.path().join(format!("{}.img.sha256", gone.hex())).exists());
        let error = make(&dir.path().join("none"), &dir.path().join("x.img")).unwrap_err().to_string();
        assert!(error.contains("mkfs.erofs"), "{error}");
        assert!(!dir.path().join("x.img").exists());
    }
}

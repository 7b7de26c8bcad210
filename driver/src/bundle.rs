// SPDX-License-Identifier: Apache-2.0
//! Binaries of this machine as images: an OCI layout of one layer, so that they reach sandboxes the way images do
//! (verified, extracted once per node, mounted read-only, pinned by digest in templates and snapshots).
//!
//! The layout of a binary is named by its content. It is written beside its place and renamed into it, and never
//! changed or removed: sandboxes that sleep are pinned to it.
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use serde_json::json;
use sha2::{Digest as _, Sha256};

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Makes a binary an image that holds it as `name`; its reference, with digest.
///
/// # Errors
/// When it cannot be read or the layout not be written.
pub fn image(binary: &Path, name: &str, store: &Path) -> io::Result<String> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", binary.display()));
    let content = fs::read(binary).map_err(named)?;
    if !content.starts_with(b"\x7fELF") && !content.starts_with(b"#!") {
        return Err(io::Error::other(format!("{} is no program", binary.display())));
    }
    let layer = layer(name, &content)?;
    let diff_id = digest(&layer);
    let architecture = match std::env::consts::ARCH {
        "aarch64" => "arm64",
        _ => "amd64",
    };
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{diff_id}")]},
    })
    .to_string();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {"mediaType": CONFIG, "digest": format!("sha256:{}", digest(config.as_bytes())), "size": config.len()},
        "layers": [{"mediaType": LAYER, "digest": format!("sha256:{diff_id}"), "size": layer.len()}],
    })
    .to_string();
    let manifest_digest = digest(manifest.as_bytes());
    let index = json!({
        "schemaVersion": 2,
        "manifests": [{"mediaType": MANIFEST, "digest": format!("sha256:{manifest_digest}"), "size": manifest.len()}],
    })
    .to_string();
    let place = store.join(format!("{name}-{}", &manifest_digest[..16]));
    let reference = format!("oci:{}@sha256:{manifest_digest}", place.display());
    if place.join("oci-layout").is_file() {
        return Ok(reference);
    }
    fs::DirBuilder::new().recursive(true).mode(0o755).create(store)?;
    let made = tempfile::Builder::new().prefix(".making-").tempdir_in(store)?;
    let blobs = made.path().join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    write(&blobs.join(&diff_id), &layer)?;
    write(&blobs.join(digest(config.as_bytes())), config.as_bytes())?;
    write(&blobs.join(&manifest_digest), manifest.as_bytes())?;
    write(&made.path().join("index.json"), index.as_bytes())?;
    write(&made.path().join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    match fs::rename(made.path(), &place) {
        // Another driver was faster.
        Err(_) if place.join("oci-layout").is_file() => {}
        renamed => renamed?,
    }
    // What was renamed is not there to be removed.
    drop(made);
    File::open(store)?.sync_all()?;
    Ok(reference)
}

fn layer(name: &str, content: &[u8]) -> io::Result<Vec<u8>> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Regular);
    header.set_size(content.len() as u64);
    header.set_mode(0o755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    let mut builder = tar::Builder::new(Vec::with_capacity(content.len() + 4096));
    builder.append_data(&mut header, name, content)?;
    builder.into_inner()
}

fn digest(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// A key of random bytes in a file that only its owner reads; drawn if there is none.
///
/// # Errors
/// When it cannot be read or written.
pub fn key(path: &Path) -> io::Result<Vec<u8>> {
    use std::os::unix::fs::OpenOptionsExt as _;
    match fs::read(path) {
        Ok(key) if key.len() >= 32 => return Ok(key),
        Ok(_) => {
            return Err(io::Error::other(format!("{} is shorter than 32 bytes", path.display())));
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Err(_) => {}
    }
    let parent: PathBuf = path.parent().unwrap_or(Path::new("/")).to_owned();
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&parent)?;
    let key: [u8; 32] = rand::random();
    let made = parent.join(format!(".{}.new", uuid::Uuid::new_v4().simple()));
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&made)?;
    file.write_all(&key)?;
    file.sync_all()?;
    // Fails when another driver was faster; then its key is the one.
    let linked = fs::hard_link(&made, path);
    fs::remove_file(&made)?;
    match linked {
        Ok(()) => {
            File::open(&parent)?.sync_all()?;
            Ok(key.to_vec())
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => fs::read(path),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_binary_has_one_image_as_long_as_it_is_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let (binary, store) = (dir.path().join("bin"), dir.path().join("store"));
        fs::write(&binary, "#!/bin/sh\necho one\n").unwrap();
        let first = image(&binary, "tool", &store).unwrap();
        assert_eq!(image(&binary, "tool", &store).unwrap(), first);
        fs::write(&binary, "#!/bin/sh\necho two\n").unwrap();
        let second = image(&binary, "tool", &store).unwrap();
        assert_ne!(first, second);
        assert_eq!(fs::read_dir(&store).unwrap().count(), 2, "both stay, nothing else does");
        fs::write(&binary, "text").unwrap();
        assert!(image(&binary, "tool", &store).unwrap_err().to_string().contains("no program"));
    }

    #[test]
    fn a_key_is_drawn_once_and_kept_to_its_owner() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys/session.key");
        let drawn = key(&path).unwrap();
        assert_eq!(key(&path).unwrap(), drawn);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(&path, "short").unwrap();
        assert!(key(&path).is_err());
    }
}

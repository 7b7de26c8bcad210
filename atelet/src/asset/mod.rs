// SPDX-License-Identifier: Apache-2.0
//! Runtime assets: the binaries and kernels that sandboxes run on, by their content (design §2, "sandbox config").
//!
//! ```text
//! sandbox.toml ──▶ Asset {url, sha256} ──fetch──▶ .new-…/ ──hash right, fsynced──rename──▶ runtimes/<sha256>/runsc
//!      │                                                                                                /vmm
//!      └─▶ Policy: revoked digests, ages, overrides; asked at every start                               /kernel/{vmlinuz,modules}
//! ```
//!
//! **Identity** is the sha256, never a version: a snapshot names the digest of the runtime that made it, and only a
//! worker of that very runtime restores it. So the runtimes of a config after the first have workers of their own.
//!
//! **Prefetched.** Every asset of the config is fetched at the start; the runtime that new actors start on has to be
//! there before anything is announced, an older one is tried again whenever its worker is, until it is there. What is
//! in the cache needs its source no more.
//!
//! **Verified.** On the way in; and the ateom hashes the binary it is given once more at each start of a worker. A
//! machine monitor may be an archive: QEMU is no single file, it loads firmware and modules from beside itself. Then the
//! runtime's identity is the archive's digest, which covers all of them.
//!
//! **Collected** ([`AssetStore::collect`]) is only what neither the config, nor a snapshot, nor a worker that runs
//! names.
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::config::WorkerClass;
use crate::durable;
use crate::image::http::HttpClient;
use crate::image::locks::Locks;

mod config;
mod fetch;
mod policy;
#[cfg(test)]
mod tests;

pub use config::{Asset, ClassConfig, Override, PerArchitecture, RuntimeConfig, SandboxConfig};
pub use policy::{Policy, Start, judge};

/// How long fetching one asset may take.
const FETCH_LIMIT: Duration = Duration::from_mins(30);
/// An entry this young may be of a config that the caller has not seen.
const GRACE: Duration = Duration::from_mins(10);

/// What goes wrong with assets.
#[derive(Debug, thiserror::Error)]
pub enum AssetError {
    /// The sandbox config cannot be used.
    #[error("sandbox config {}: {reason}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// An asset cannot be had.
    #[error(
        "cannot fetch the runtime asset {url}: {reason}; put it where the sandbox config says, or correct the url"
    )]
    Fetch {
        /// Where it should be.
        url: String,
        /// Why not.
        reason: String,
    },
    /// It is another.
    #[error(
        "the runtime asset {url} ({bytes} bytes) has sha256 {found}, the sandbox config says {wanted}: nothing of it \
         was kept; correct the config, or find out who changed the file"
    )]
    Digest {
        /// Where it is.
        url: String,
        /// Its digest.
        found: String,
        /// That of the config.
        wanted: String,
        /// Its size.
        bytes: u64,
    },
    /// An archive is none, or lacks something.
    #[error("the archive {url} cannot be used: {reason}")]
    Archive {
        /// Where it came from.
        url: String,
        /// Why.
        reason: String,
    },
    /// The system refused something.
    #[error("the cache of runtime assets: {0}")]
    Io(#[from] std::io::Error),
}

/// A machine monitor of the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmmFile {
    /// Its program.
    pub path: PathBuf,
    /// sha256 (hex) of the asset.
    pub sha256: String,
    /// The asset is an archive with this in it.
    pub is_packed: bool,
}

/// The files of a runtime on this node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RuntimeFiles {
    /// `runsc`, with its sha256.
    pub runsc: Option<(PathBuf, String)>,
    /// The machine monitor.
    pub vmm: Option<VmmFile>,
    /// Directory with `vmlinuz` and `modules/`.
    pub kernel: Option<PathBuf>,
}

/// The cache of a node.
#[derive(Debug)]
pub struct AssetStore {
    dir: PathBuf,
    locks: Locks<String>,
    client: HttpClient,
}

impl AssetStore {
    /// Opens `DIR/node/runtimes`; what a killed process left unfinished is removed.
    ///
    /// # Errors
    /// The system's.
    pub fn open(dir: &Path) -> Result<Self, AssetError> {
        durable::create_dir(dir)?;
        for entry in std::fs::read_dir(dir)? {
            let entry = entry?;
            if entry.file_name().as_encoded_bytes().starts_with(b".new-") {
                durable::remove_tree(&entry.path())?;
            }
        }
        Ok(Self { dir: dir.to_owned(), locks: Locks::default(), client: HttpClient::default() })
    }

    fn place(&self, part: &str, asset: &Asset) -> PathBuf {
        self.dir.join(&asset.sha256).join(part)
    }

    /// Makes an asset local; callers of the same one share the work.
    ///
    /// # Errors
    /// See [`AssetError`]; nothing of it is left then.
    pub async fn ensure(&self, part: &'static str, asset: &Asset) -> Result<PathBuf, AssetError> {
        let path = self.place(part, asset);
        let _turn = self.locks.lock(asset.sha256.clone()).await;
        if path.exists() {
            return Ok(path);
        }
        let new = self.dir.join(format!(".new-{}", uuid::Uuid::new_v4().simple()));
        durable::create_dir(&new)?;
        let fetched =
            tokio::time::timeout(FETCH_LIMIT, self.bring(part, asset, &new)).await.unwrap_or_else(|_| {
                Err(AssetError::Fetch {
                    url: asset.url.clone(),
                    reason: format!("it took more than {} min", FETCH_LIMIT.as_secs() / 60),
                })
            });
        if let Err(error) = fetched {
            if let Err(error) = durable::remove_tree(&new) {
                tracing::warn!(path = %new.display(), %error, "what was fetched of an asset stays behind");
            }
            return Err(error);
        }
        let target = self.dir.join(&asset.sha256);
        // Something else of this digest that lacks the part; no worker uses it then.
        durable::remove_tree(&target)?;
        std::fs::rename(&new, &target).map_err(durable::at("rename to", &target))?;
        durable::sync_dir(&self.dir)?;
        tracing::info!(part, sha256 = asset.sha256, "fetched a runtime asset");
        Ok(path)
    }

    async fn bring(&self, part: &'static str, asset: &Asset, new: &Path) -> Result<(), AssetError> {
        let file = new.join(part);
        let archive = new.join("archive");
        fetch::fetch(&self.client, asset, &archive).await?;
        let (url, new) = (asset.url.clone(), new.to_owned());
        crate::blocking(move || {
            use std::os::unix::fs::PermissionsExt as _;
            if part != "kernel" && !(part == "vmm" && is_archive(&archive)?) {
                std::fs::rename(&archive, &file)?;
                std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755))?;
                return Ok(durable::sync_dir(&new)?);
            }
            let unusable = |reason: String| AssetError::Archive { url: url.clone(), reason };
            crate::image::unpack_archive(&archive, &file).map_err(unusable)?;
            if part == "kernel" {
                let kernel = file.join("vmlinuz");
                if !kernel.is_file() || !file.join("modules").is_dir() {
                    return Err(unusable("it has no vmlinuz or no modules/ at its top".to_owned()));
                }
                // Snapshots know the kernel by the digest of this file.
                std::fs::write(new.join("holds"), sha256_file(&kernel)?)?;
            } else if vmm_in(&file).is_none() {
                return Err(unusable(format!("it has none of {}", VMMS.join(", "))));
            }
            durable::remove_file(&archive)?;
            Ok(durable::sync_dir(&new)?)
        })
        .await
    }

    /// Makes the files of a runtime local.
    ///
    /// # Errors
    /// As [`AssetStore::ensure`].
    pub async fn runtime(&self, runtime: &RuntimeConfig) -> Result<RuntimeFiles, AssetError> {
        let mut files = RuntimeFiles::default();
        for (part, of) in runtime.parts() {
            // A config without one for this machine is refused as it is read.
            let Some(asset) = of.here() else { continue };
            let path = self.ensure(part, asset).await?;
            match part {
                "runsc" => files.runsc = Some((path, asset.sha256.clone())),
                "vmm" => {
                    let found = path.is_dir().then(|| vmm_in(&path));
                    files.vmm = Some(VmmFile {
                        is_packed: found.is_some(),
                        path: found.flatten().unwrap_or(path),
                        sha256: asset.sha256.clone(),
                    });
                }
                _ => files.kernel = Some(path),
            }
        }
        Ok(files)
    }

    /// Fetches everything that a config names, so that no restore waits for it. Failures are logged: each worker that
    /// needs one of them asks again.
    pub async fn prefetch(&self, config: &SandboxConfig) {
        for (part, asset) in config.assets() {
            if let Err(error) = self.ensure(part, asset).await {
                tracing::warn!(%error, "a runtime asset is missing; snapshots made with it cannot be restored yet");
            }
        }
    }

    /// Removes what `keep` (digests of assets, runtimes and kernels) does not name and no worker of `workers`
    /// (`DIR/node/workers`) runs; answers their digests with bytes. `dry_run` only says.
    ///
    /// # Errors
    /// The system's; what was removed until then stays removed.
    pub fn collect(
        dir: &Path,
        workers: &Path,
        keep: &HashSet<String>,
        dry_run: bool,
    ) -> std::io::Result<Vec<(String, u64)>> {
        let entries = match std::fs::read_dir(dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let lines = command_lines(workers);
        let mut gone = Vec::new();
        for entry in entries {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            let held = std::fs::read_to_string(entry.path().join("holds")).unwrap_or_default();
            let is_young = entry
                .metadata()?
                .modified()
                .ok()
                .and_then(|made| SystemTime::now().duration_since(made).ok())
                .is_none_or(|age| age < GRACE);
            let is_ours = name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
            let runs = lines.iter().any(|line| line.contains(&name));
            if !is_ours || is_young || runs || keep.contains(&name) || keep.contains(held.trim()) {
                continue;
            }
            let bytes = crate::snapshot::volume::disk_bytes(&entry.path());
            if !dry_run {
                durable::remove_tree(&entry.path())?;
            }
            gone.push((name, bytes));
        }
        gone.sort();
        Ok(gone)
    }
}

/// Where an archive may have its machine monitor.
const VMMS: [&str; 6] = [
    "usr/bin/qemu-system-x86_64",
    "usr/bin/qemu-system-aarch64",
    "bin/qemu-system-x86_64",
    "bin/qemu-system-aarch64",
    "bin/cloud-hypervisor",
    "bin/firecracker",
];

fn vmm_in(unpacked: &Path) -> Option<PathBuf> {
    VMMS.iter().map(|name| unpacked.join(name)).find(|path| path.is_file())
}

/// Whether a file is a tar archive, perhaps in gzip or zstd (RFC 1952, RFC 8878), by its first bytes.
fn is_archive(path: &Path) -> std::io::Result<bool> {
    use std::io::Read as _;
    let mut head = Vec::new();
    std::fs::File::open(path)?.take(512).read_to_end(&mut head)?;
    let is_tar = head.get(257..262).is_some_and(|magic| magic == b"ustar");
    Ok(is_tar || head.starts_with(&[0x1f, 0x8b]) || head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]))
}

/// Command lines of the workers that have a note: they name what they run.
fn command_lines(workers: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(workers) else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| crate::worker::process::noted_pid(&entry.path().join("process.json")))
        .filter_map(|pid| std::fs::read(format!("/proc/{pid}/cmdline")).ok())
        .map(|line| String::from_utf8_lossy(&line).into_owned())
        .collect()
}

/// Whether a file has the content that its name promises.
///
/// # Errors
/// When it cannot be read.
pub fn sha256_file(path: &Path) -> std::io::Result<String> {
    use sha2::Digest as _;
    let mut hash = sha2::Sha256::new();
    std::io::copy(&mut std::fs::File::open(path)?, &mut hash)?;
    Ok(hex::encode(hash.finalize()))
}

/// The runtime that new actors of a class start on, and the others with their worker slots.
pub fn workers_of(config: &SandboxConfig, class: WorkerClass) -> Vec<(&RuntimeConfig, u32)> {
    config.class(class).runtimes.iter().skip(1).map(|it| (it, it.workers.unwrap_or(1))).collect()
}

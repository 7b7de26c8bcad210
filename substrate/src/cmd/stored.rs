// SPDX-License-Identifier: Apache-2.0
//! What a machine keeps, opened beside a substrate that may be running.
use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use ateapi::inventory::Inventory;
use atelet::actor::place;
use atelet::asset::{AssetStore, SandboxConfig};
use atelet::blob::{self, BlobError, BlobStore, BlobUrl};
use atelet::snapshot::FileKeyStore;
use atelet::snapshot::node::NodeSnapshots;

use crate::args::{Place, Up};
use crate::failure::{Doing as _, Exit, Failure};
use crate::up::config::{self, Settings};

/// A machine's state.
pub struct Stored {
    /// Its directory.
    pub dir: PathBuf,
    /// Name of its node.
    pub node: String,
    /// Where durable snapshots are.
    pub store: Arc<dyn BlobStore>,
    /// Snapshots on this machine.
    pub local: NodeSnapshots,
    /// The sandbox config, if one is named.
    pub sandbox: Option<SandboxConfig>,
}

impl Stored {
    /// Opens it.
    ///
    /// # Errors
    /// When there is none, or its configuration is wrong.
    pub async fn open(place: &Place) -> Result<Self, Failure> {
        let file = match &place.config {
            Some(path) => config::read(path)?,
            None => config::File::default(),
        };
        let cwd = std::env::current_dir().doing(|| "cannot tell the working directory".to_owned())?;
        let options = Up { dir: place.dir.clone(), ..Up::default() };
        let Settings { dir, file, .. } = Settings::resolve(&options, file, 1, &cwd)?;
        if !dir.join("control/state.db").exists() {
            let message = format!("{} holds no state of substrate", dir.display());
            return Err(Failure::new(Exit::NotFound, message).with_way_out("name its directory with --dir"));
        }
        let url = file.node.blobs.clone().unwrap_or_else(|| BlobUrl::Local(dir.join("blobs")));
        let store = blob::open(&url, false).await.map_err(|error| failed(&error))?;
        let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        let local = NodeSnapshots::beside(&dir.join("node/snapshots"), threads);
        let node = file.node.name.unwrap_or_else(|| "local".to_owned());
        let sandbox = match file.sandbox_config.map(|path| cwd.join(path)) {
            None => None,
            Some(path) => Some(
                SandboxConfig::read(&path).doing(|| "cannot tell which runtimes are in use".to_owned())?,
            ),
        };
        Ok(Self { dir, node, store, local, sandbox })
    }

    /// The keys of its snapshots.
    ///
    /// # Errors
    /// When there are none: opening would make some, and hide that they are lost.
    pub fn keys(&self) -> Result<FileKeyStore, Failure> {
        let dir = self.dir.join("keys");
        if !dir.join("master.key").exists() {
            return Err(Failure::general(format!(
                "{} has no master.key: nothing can be opened",
                dir.display()
            ))
            .with_way_out("restore the directory from its backup"));
        }
        FileKeyStore::open(&dir).doing(|| "cannot open the keys".to_owned())
    }

    /// Removes runtime assets that neither a snapshot, nor the sandbox config, nor a worker names. Without a sandbox
    /// config nothing is: the newest in the cache is what a start finds.
    ///
    /// # Errors
    /// The system's.
    pub fn collect_runtimes(
        &self,
        inventory: &Inventory,
        dry_run: bool,
    ) -> Result<Vec<(String, u64)>, Failure> {
        let Some(config) = &self.sandbox else { return Ok(Vec::new()) };
        let mut keep: HashSet<String> = config.assets().map(|(_, asset)| asset.sha256.clone()).collect();
        for (_, snapshot) in inventory.snapshots() {
            keep.insert(snapshot.compatibility.runtime_digest.clone());
            keep.extend(snapshot.compatibility.facts.get("kernel").cloned());
        }
        let node = self.dir.join("node");
        AssetStore::collect(&node.join("runtimes"), &node.join("workers"), &keep, dry_run)
            .doing(|| "cannot collect runtime assets".to_owned())
    }

    /// Directories of actors' volumes and other files on this machine, by uid.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub fn bundles(&self) -> Result<Vec<(String, PathBuf)>, Failure> {
        let dir = self.dir.join("node/actors");
        place::bundles(&dir).doing(|| format!("cannot list {}", dir.display()))
    }

    /// What the database says now.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn inventory(&self) -> Result<Inventory, Failure> {
        Inventory::read(&self.dir.join("control/state.db"))
            .await
            .map_err(|error| Failure::general(error.to_string()))
    }
}

/// An error of the blob store as the end of a command.
pub fn failed(error: &BlobError) -> Failure {
    let exit = if matches!(error, BlobError::Unavailable { .. }) { Exit::Unavailable } else { Exit::Failed };
    Failure::new(exit, error.to_string())
}

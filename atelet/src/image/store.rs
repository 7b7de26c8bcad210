// SPDX-License-Identifier: Apache-2.0
//! The image store: what is asked of it, and in which order it does it. The module above tells the whole.
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

use super::auth::Credentials;
use super::error::ImageError;
use super::index::{Collected, ImageRecord, Index, LayerRecord, Pin, Usage};
use super::layer::{self, Expected, Limits};
use super::layout::Layout;
use super::locks::Locks;
use super::progress::{JobState, Meter, Phase, Progress};
use super::reference::{Digest, Reference, Source};
use super::registry::{Caller, Registry, RegistryConfig};
use super::rights::{Rights, Standing};
use super::spec::{self, Descriptor, Document, ImageConfig, MAX_CONFIG, Platform};
use super::user::{self, User};

/// Settings of an image store.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where images are kept; on a file system that can be an overlay's lower layer (ext4, xfs, btrfs).
    pub dir: PathBuf,
    /// Credentials for registries, see `auth.rs`; none means anonymous.
    pub credentials: Option<PathBuf>,
    /// Directories that `oci:` and `oci-archive:` references must be beneath; empty means anywhere.
    pub local_roots: Vec<PathBuf>,
    /// Which image of a multi-platform index is taken, default this machine's.
    pub platform: Platform,
    /// What images may cost.
    pub limits: Limits,
    /// Deadlines and retries with registries.
    pub registry: RegistryConfig,
    /// How long a check of an atespace's right holds, default 10 min.
    pub right_ttl: Duration,
    /// How long it still counts when the source cannot be asked, default 24 h.
    pub right_grace: Duration,
    /// Layers pulled at the same time, default 4.
    pub parallel_pulls: usize,
    /// Layers unpacked at the same time, default the number of cores.
    pub parallel_unpacks: usize,
}

impl Config {
    /// The defaults for a directory.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            credentials: None,
            local_roots: Vec::new(),
            platform: Platform::host(),
            limits: Limits::default(),
            registry: RegistryConfig::default(),
            right_ttl: Duration::from_mins(10),
            right_grace: Duration::from_hours(24),
            parallel_pulls: 4,
            parallel_unpacks: std::thread::available_parallelism().map_or(2, usize::from),
        }
    }
}

/// What a reference means now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedImage {
    /// Of the manifest for this platform.
    pub digest: Digest,
    /// The reference with that digest in place of the tag.
    pub pinned_reference: Reference,
    /// How it wants to be run.
    pub config: ImageConfig,
}

/// An image that is on this node and stays there as long as this is held.
#[derive(Debug, Clone)]
pub struct Image {
    /// Of the manifest for this platform.
    pub digest: Digest,
    /// The reference with that digest in place of the tag.
    pub pinned_reference: Reference,
    /// All its layers in one, read-only.
    pub rootfs: PathBuf,
    /// How it wants to be run.
    pub config: ImageConfig,
    /// Disk space of its layers, bytes.
    pub size: u64,
    _pin: Arc<Pin>,
}

impl Image {
    /// Resolves the user that a container of this image runs as, inside the image: `run_as` if it is given and not
    /// empty, else what the image says, else root. Reads two small files.
    ///
    /// # Errors
    /// [`ImageError::NoUser`].
    pub fn user(&self, run_as: Option<&str>) -> Result<User, ImageError> {
        let user = run_as.filter(|user| !user.is_empty()).unwrap_or(&self.config.user);
        user::resolve(&self.rootfs, user).map_err(|reason| ImageError::NoUser {
            user: user.to_owned(),
            image: self.digest.to_string(),
            reason,
        })
    }
}

/// Keeps images for a node; cheap to clone.
#[derive(Debug, Clone)]
pub struct ImageStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: Config,
    index: Arc<Index>,
    registry: Registry,
    rights: Mutex<Rights>,
    /// Held while `rights.json` is written, so that an older state never replaces a newer one.
    rights_file: tokio::sync::Mutex<()>,
    layer_locks: Locks<Digest>,
    image_locks: Locks<Digest>,
    pulls: Semaphore,
    unpacks: Semaphore,
    jobs: Mutex<HashMap<(String, Reference), watch::Receiver<JobState>>>,
    extractions: AtomicU64,
    pulled_bytes: AtomicU64,
}

impl ImageStore {
    /// Opens the store: takes its lock, drops what a crash left unfinished, and mounts the images it has.
    ///
    /// # Errors
    /// [`ImageError::InUse`], [`ImageError::Unsuitable`], or what the system refused.
    pub async fn open(config: Config) -> Result<Self, ImageError> {
        let dir = config.dir.clone();
        let (index, rights) = blocking("opening the image store", move || {
            let index = Index::open(&dir)?;
            let rights = index
                .read_file("rights.json")
                .map_err(|error| ImageError::io("read the rights of the image store", &dir, error))?;
            Ok((index, rights.map_or_else(Rights::default, |bytes| Rights::from_bytes(&bytes))))
        })
        .await?;
        let credentials = Credentials::new(config.credentials.clone());
        Ok(Self {
            inner: Arc::new(Inner {
                registry: Registry::new(config.registry.clone(), credentials, config.dir.clone()),
                index,
                rights: Mutex::new(rights),
                rights_file: tokio::sync::Mutex::default(),
                layer_locks: Locks::default(),
                image_locks: Locks::default(),
                pulls: Semaphore::new(config.parallel_pulls.max(1)),
                unpacks: Semaphore::new(config.parallel_unpacks.max(1)),
                jobs: Mutex::default(),
                extractions: AtomicU64::new(0),
                pulled_bytes: AtomicU64::new(0),
                config,
            }),
        })
    }

    /// Finds out which image a reference means, with the atespace's own credentials.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub async fn resolve(&self, atespace: &str, reference: &Reference) -> Result<ResolvedImage, ImageError> {
        let inner = &self.inner;
        let deadline = inner.config.limits.image_time;
        let work = async {
            let (digest, config) = if let Some((record, _)) = inner.known(atespace, reference).await? {
                (record.digest.clone(), record.config.clone())
            } else {
                let described = inner.describe(atespace, reference).await?;
                (described.digest, described.config.config)
            };
            Ok(ResolvedImage { pinned_reference: reference.with_digest(digest.clone()), digest, config })
        };
        timed(deadline, || format!("resolving image `{reference}`"), work).await
    }

    /// Makes an image local and mounts it. `progress` is called from this future as things go on, the last time with
    /// [`Phase::Ready`]; steps of less than half a per cent are left out. Callers of the same image share the work,
    /// which goes on when this future is dropped.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub async fn ensure(
        &self,
        atespace: &str,
        reference: &Reference,
        mut progress: impl FnMut(Progress) + Send,
    ) -> Result<Image, ImageError> {
        let ready = Progress { phase: Phase::Ready, bytes_done: 0, bytes_total: 0 };
        if let Some(image) = self.inner.at_hand(atespace, reference).await {
            progress(ready);
            return Ok(image);
        }
        let mut job = self.join(atespace, reference);
        loop {
            let state = job.borrow_and_update().clone();
            match state.outcome {
                Some(Ok(image)) => {
                    progress(Progress { phase: Phase::Ready, ..state.progress });
                    return Ok(image);
                }
                Some(Err(error)) => return Err(error),
                None => progress(state.progress),
            }
            if job.changed().await.is_err() && job.borrow().outcome.is_none() {
                return Err(ImageError::Internal {
                    what: format!("pulling image `{reference}`"),
                    reason: "the task that did it ended".into(),
                });
            }
        }
    }

    /// Frees space: layers of no image, then the least recently used images, until at most `limit_bytes` are left.
    /// Images of which an [`Image`] is held or whose digest is in `in_use` stay. With `dry_run` nothing is removed.
    ///
    /// # Errors
    /// [`ImageError::Io`]: what was removed until then stays removed.
    pub async fn collect(
        &self,
        in_use: HashSet<Digest>,
        limit_bytes: u64,
        dry_run: bool,
    ) -> Result<Collected, ImageError> {
        let inner = Arc::clone(&self.inner);
        blocking("collecting images", move || {
            inner
                .index
                .collect(&in_use, limit_bytes, dry_run)
                .map_err(|error| ImageError::io("remove unused images", &inner.config.dir, error))
        })
        .await
    }

    /// The images there are.
    pub fn digests(&self) -> HashSet<Digest> {
        self.inner.index.digests()
    }

    /// Space and counts.
    pub fn usage(&self) -> Usage {
        Usage {
            extractions: self.inner.extractions.load(Ordering::Relaxed),
            pulled_bytes: self.inner.pulled_bytes.load(Ordering::Relaxed),
            ..self.inner.index.usage()
        }
    }

    /// Follows the task that makes this image local, starting it if there is none.
    fn join(&self, atespace: &str, reference: &Reference) -> watch::Receiver<JobState> {
        let key = (atespace.to_owned(), reference.clone());
        let mut jobs = locked(&self.inner.jobs);
        if let Some(job) = jobs.get(&key) {
            return job.clone();
        }
        let (sender, receiver) = watch::channel(JobState { progress: Progress::START, outcome: None });
        jobs.insert(key.clone(), receiver.clone());
        // However it ends, also by a panic, the next caller must find the place free.
        let place = Place { inner: Arc::clone(&self.inner), key };
        tokio::spawn(async move {
            let (atespace, reference) = &place.key;
            let meter = Arc::new(Meter::new(sender));
            let limit = place.inner.config.limits.image_time;
            let work = place.inner.pull(atespace, reference, &meter);
            let outcome = timed(limit, || format!("pulling image `{reference}`"), work).await;
            if let Err(error) = &outcome {
                tracing::warn!(atespace, image = %reference, %error, "image not available");
            }
            drop(place);
            meter.sender.send_modify(|state| state.outcome = Some(outcome));
        });
        receiver
    }
}

struct Place {
    inner: Arc<Inner>,
    key: (String, Reference),
}

impl Drop for Place {
    fn drop(&mut self) {
        locked(&self.inner.jobs).remove(&self.key);
    }
}

/// Where a reference leads, opened for an atespace.
#[derive(Debug, Clone)]
enum Origin {
    Registry(Caller),
    Layout(Arc<Layout>),
}

/// An image as its source describes it.
#[derive(Debug)]
struct Described {
    digest: Digest,
    aliases: BTreeSet<Digest>,
    layers: Vec<Descriptor>,
    config: spec::Config,
    origin: Origin,
}

impl Inner {
    /// The image if nothing has to be done or asked for it.
    async fn at_hand(self: &Arc<Self>, atespace: &str, reference: &Reference) -> Option<Image> {
        let digest = reference.digest.as_ref()?;
        if !matches!(reference.source, Source::Registry(_)) {
            return None;
        }
        let source = reference.source.to_string();
        let right = (atespace, source.as_str(), digest);
        let (ttl, grace) = (self.config.right_ttl, self.config.right_grace);
        if locked(&self.rights).standing(right, ttl, grace, SystemTime::now()) != Standing::Fresh {
            return None;
        }
        let (record, pin) = self.find(digest, &source)?;
        self.mounted(reference, &record, pin).await.ok()
    }

    /// The image with this digest if this very source delivered it; pinned.
    fn find(&self, digest: &Digest, source: &str) -> Option<(Arc<ImageRecord>, Pin)> {
        let found = self.index.image(digest)?;
        let pin = self.index.pin(&found.digest);
        // Only with the pin held is it sure to stay.
        let record = self.index.image(&found.digest)?;
        record.sources.contains(source).then_some((record, pin))
    }

    /// The image if this node has it from this very source, after the atespace's right was checked.
    async fn known(
        self: &Arc<Self>,
        atespace: &str,
        reference: &Reference,
    ) -> Result<Option<(Arc<ImageRecord>, Pin)>, ImageError> {
        self.check_roots(reference)?;
        let Some(digest) = &reference.digest else { return Ok(None) };
        let source = reference.source.to_string();
        let Some(found) = self.find(digest, &source) else { return Ok(None) };
        let right = (atespace, source.as_str(), digest);
        let (ttl, grace) = (self.config.right_ttl, self.config.right_grace);
        let standing = locked(&self.rights).standing(right, ttl, grace, SystemTime::now());
        let is_local = !matches!(reference.source, Source::Registry(_));
        // A look at a local layout costs nothing and is always made.
        if standing == Standing::Fresh && !is_local {
            return Ok(Some(found));
        }
        let checked = match self.origin(atespace, reference).await {
            Ok(Origin::Registry(caller)) => self.registry.check(&caller, "manifests", digest).await,
            Ok(Origin::Layout(layout)) => {
                let (reference, platform) = (reference.clone(), self.config.platform.clone());
                blocking("reading a layout", move || layout.manifest(&reference, &platform).map(drop)).await
            }
            Err(error) => Err(error),
        };
        match checked {
            Ok(()) => self.grant(right).await?,
            // A layout that was moved away says as little about rights as a registry that is down.
            Err(error)
                if standing != Standing::None
                    && (error.is_transient() || is_local && matches!(error, ImageError::NotFound { .. })) =>
            {
                tracing::warn!(atespace, image = %reference, %error, "right not checked anew, the last check counts");
            }
            Err(error) => {
                if !error.is_transient() {
                    locked(&self.rights).revoke(right);
                }
                return Err(error);
            }
        }
        Ok(Some(found))
    }

    async fn grant(self: &Arc<Self>, right: (&str, &str, &Digest)) -> Result<(), ImageError> {
        locked(&self.rights).grant(right, SystemTime::now());
        let _turn = self.rights_file.lock().await;
        let bytes = locked(&self.rights).prune(self.config.right_grace, SystemTime::now());
        let inner = Arc::clone(self);
        blocking("noting rights", move || {
            inner.index.write_file("rights.json", &bytes).map_err(|error| {
                ImageError::io("write the rights of the image store", &inner.config.dir, error)
            })
        })
        .await
    }

    /// Refuses local images outside of the allowed directories; links are resolved first.
    fn check_roots(&self, reference: &Reference) -> Result<(), ImageError> {
        let roots = &self.config.local_roots;
        let (Source::Layout(path) | Source::Archive(path)) = &reference.source else { return Ok(()) };
        // What does not exist is refused by its name, so that no one learns here what exists elsewhere.
        let real = path.canonicalize().unwrap_or_else(|_| path.clone());
        if roots.is_empty() || roots.iter().any(|root| path.starts_with(root) && real.starts_with(root)) {
            return Ok(());
        }
        let allowed: Vec<_> = roots.iter().map(|root| root.display().to_string()).collect();
        Err(ImageError::OutsideRoots { reference: reference.to_string(), allowed: allowed.join(", ") })
    }

    async fn origin(&self, atespace: &str, reference: &Reference) -> Result<Origin, ImageError> {
        match &reference.source {
            Source::Registry(repository) => {
                Ok(Origin::Registry(Caller { atespace: atespace.to_owned(), repository: repository.clone() }))
            }
            source => {
                let (source, atespace) = (source.clone(), atespace.to_owned());
                blocking("opening a layout", move || Layout::open(&source, &atespace))
                    .await
                    .map(|layout| Origin::Layout(Arc::new(layout)))
            }
        }
    }

    async fn manifest(&self, origin: &Origin, reference: &Reference) -> Result<(Bytes, Digest), ImageError> {
        match origin {
            Origin::Registry(caller) => {
                self.registry.manifest(caller, reference.tag.as_deref(), reference.digest.as_ref()).await
            }
            Origin::Layout(layout) => {
                let (layout, reference) = (Arc::clone(layout), reference.clone());
                let platform = self.config.platform.clone();
                let (bytes, digest) =
                    blocking("reading a layout", move || layout.manifest(&reference, &platform)).await?;
                Ok((bytes.into(), digest))
            }
        }
    }

    async fn small_blob(&self, origin: &Origin, blob: &Descriptor, limit: u64) -> Result<Bytes, ImageError> {
        match origin {
            Origin::Registry(caller) => self.registry.blob(caller, &blob.digest, blob.size, limit).await,
            Origin::Layout(layout) => {
                let (layout, digest, size) = (Arc::clone(layout), blob.digest.clone(), blob.size);
                blocking("reading a layout", move || layout.small(&digest, Some(size), limit))
                    .await
                    .map(Into::into)
            }
        }
    }

    /// Reads manifest and configuration from the source, which is also the check of the atespace's right.
    async fn describe(
        self: &Arc<Self>,
        atespace: &str,
        reference: &Reference,
    ) -> Result<Described, ImageError> {
        self.check_roots(reference)?;
        let name = reference.to_string();
        let origin = self.origin(atespace, reference).await?;
        let mut aliases = BTreeSet::new();
        let mut at = reference.clone();
        // An index of indexes is allowed by the specification; two levels are in use.
        for _ in 0..4 {
            let (bytes, digest) = self.manifest(&origin, &at).await?;
            match spec::parse_document(&bytes, &format!("manifest of `{name}`"))? {
                Document::Index(manifests) => {
                    let chosen = spec::select(&manifests, &self.config.platform, &name)?;
                    aliases.insert(digest);
                    at = reference.with_digest(chosen.digest.clone());
                }
                Document::Manifest(manifest) => {
                    let bytes = self.small_blob(&origin, &manifest.config, MAX_CONFIG).await?;
                    let config = spec::parse_config(&bytes, &manifest, &self.config.platform, &name)?;
                    let source = reference.source.to_string();
                    for digest in aliases.iter().chain(std::iter::once(&digest)) {
                        self.grant((atespace, &source, digest)).await?;
                    }
                    return Ok(Described { digest, aliases, layers: manifest.layers, config, origin });
                }
            }
        }
        Err(ImageError::Unsupported {
            what: format!("image `{name}`"),
            reason: "its indexes are nested more than three deep".into(),
        })
    }

    /// The work of [`ImageStore::ensure`].
    async fn pull(
        self: &Arc<Self>,
        atespace: &str,
        reference: &Reference,
        meter: &Arc<Meter>,
    ) -> Result<Image, ImageError> {
        if let Some((record, pin)) = self.known(atespace, reference).await? {
            return self.mounted(reference, &record, pin).await;
        }
        let described = self.describe(atespace, reference).await?;
        let total = described.layers.iter().try_fold(0_u64, |sum, layer| sum.checked_add(layer.size));
        let limit = self.config.limits.image_bytes;
        let Some(total) = total.filter(|total| *total <= limit) else {
            return Err(ImageError::TooLarge {
                what: format!("image `{reference}`"),
                limit: format!("{limit} bytes compressed"),
            });
        };
        let source = reference.source.to_string();
        let diff_ids = &described.config.diff_ids;
        // Pinned before anything is looked up, until the image's record keeps them.
        let pins: Vec<Pin> = diff_ids.iter().map(|diff_id| self.index.pin(diff_id)).collect();
        meter.begin(total);
        // The first failure stops the others; all are waited for, so that nothing of them is left when it is told.
        let cancel = CancellationToken::new();
        let _stop = cancel.clone().drop_guard();
        let failed = OnceLock::new();
        let layers = described.layers.iter().zip(diff_ids).map(|(layer, diff_id)| {
            let expected = Expected {
                blob: layer.digest.clone(),
                size: layer.size,
                diff_id: diff_id.clone(),
                source: source.clone(),
            };
            let (origin, cancel, failed) = (&described.origin, &cancel, &failed);
            async move {
                if let Err(error) = self.layer(origin, expected, meter, cancel).await {
                    // Later ones are consequences of the first.
                    let _ = failed.set(error);
                    cancel.cancel();
                }
            }
        });
        futures::future::join_all(layers).await;
        if let Some(error) = failed.into_inner() {
            return Err(error);
        }
        let record = ImageRecord {
            digest: described.digest.clone(),
            aliases: described.aliases,
            sources: BTreeSet::from([source]),
            layers: diff_ids.clone(),
            config: described.config.config,
            size: 0,
        };
        let pin = self.index.pin(&described.digest);
        let inner = Arc::clone(self);
        let record = blocking("recording an image", move || {
            inner
                .index
                .add_image(record)
                .map_err(|error| ImageError::io("record an image", &inner.config.dir, error))
        })
        .await?;
        drop(pins);
        self.mounted(reference, &record, pin).await
    }

    /// Makes sure that a layer is here and that this source has it.
    async fn layer(
        self: &Arc<Self>,
        origin: &Origin,
        expected: Expected,
        meter: &Arc<Meter>,
        cancel: &CancellationToken,
    ) -> Result<(), ImageError> {
        let given_up = || ImageError::Internal {
            what: format!("pulling layer {}", expected.diff_id),
            reason: "it was given up, another layer of the image failed".into(),
        };
        let alone = self.layer_locks.lock(expected.diff_id.clone());
        let _alone = cancel.run_until_cancelled(alone).await.ok_or_else(given_up)?;
        let known = self.index.layer(&expected.diff_id);
        let sources = known.as_ref().and_then(|layer| layer.blobs.get(&expected.blob));
        if sources.is_some_and(|sources| sources.contains(&expected.source)) {
            meter.skip(expected.size);
            return Ok(());
        }
        let pull = async {
            if let (Origin::Registry(caller), Some(sources)) = (origin, sources) {
                let registry = format!("{}/", caller.repository.registry);
                let same_registry = sources.iter().any(|source| source.starts_with(&registry));
                if same_registry && self.registry.check(caller, "blobs", &expected.blob).await.is_ok() {
                    return Ok(None);
                }
            }
            let pulled = self.blob(origin, &expected, meter).await?;
            Ok(Some((pulled, self.unpacks.acquire().await)))
        };
        let Some((pulled, _permit)) = cancel.run_until_cancelled(pull).await.ok_or_else(given_up)?? else {
            meter.skip(expected.size);
            return self.add_blob(&expected).await;
        };
        let (inner, meter, cancel) = (Arc::clone(self), Arc::clone(meter), cancel.clone());
        let (is_known, is_mapped) = (known.is_some(), sources.is_some());
        let (origin, wanted) = (origin.clone(), expected.clone());
        blocking("unpacking a layer", move || {
            let blob: Box<dyn std::io::Read + Send> = match (&pulled, &origin) {
                (Some((_, file)), _) => Box::new(
                    file.try_clone()
                        .map_err(|error| ImageError::io("read a blob", &inner.config.dir, error))?,
                ),
                (None, Origin::Layout(layout)) => layout.blob(&wanted.blob)?,
                (None, Origin::Registry(_)) => Box::new(std::io::empty()),
            };
            if is_known {
                layer::verify(blob, &wanted, &inner.config.limits, !is_mapped, &cancel)?;
                meter.unpacked(wanted.size);
                return Ok(());
            }
            inner.extract(blob, &wanted, &meter, &cancel)
        })
        .await?;
        self.add_blob(&expected).await
    }

    async fn add_blob(self: &Arc<Self>, expected: &Expected) -> Result<(), ImageError> {
        let (inner, expected) = (Arc::clone(self), expected.clone());
        blocking("recording a layer", move || {
            inner
                .index
                .add_blob(&expected.diff_id, &expected.blob, &expected.source)
                .map_err(|error| ImageError::io("record a layer", &inner.config.dir, error))
        })
        .await
    }

    /// Pulls a blob into a file at its start; none where it can be read in place.
    async fn blob(
        self: &Arc<Self>,
        origin: &Origin,
        expected: &Expected,
        meter: &Arc<Meter>,
    ) -> Result<Option<(super::index::Temporary, std::fs::File)>, ImageError> {
        let Origin::Registry(caller) = origin else {
            meter.pulled(expected.size);
            return Ok(None);
        };
        let _permit = self.pulls.acquire().await;
        let io = |error| ImageError::io("create a file for a blob", &self.config.dir, error);
        let temporary = self.index.temporary();
        let path = temporary.path();
        // Not by tokio: an opening that nobody waits for any more would make the file after its removal.
        let mut options = std::fs::OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).open(path).map_err(io)?;
        let mut file = tokio::fs::File::from_std(file);
        let last = AtomicU64::new(0);
        let progress = |done: u64| {
            let before = last.swap(done, Ordering::Relaxed);
            // Less than before when the registry made us begin again: what is shown does not go back.
            meter.pulled(done.saturating_sub(before));
            self.pulled_bytes.fetch_add(done.saturating_sub(before), Ordering::Relaxed);
        };
        self.registry.download(caller, &expected.blob, expected.size, &mut file, &progress).await?;
        let mut file = file.into_std().await;
        std::io::Seek::rewind(&mut file).map_err(io)?;
        Ok(Some((temporary, file)))
    }

    /// Unpacks a verified layer into its place. Blocks.
    fn extract(
        &self,
        blob: impl std::io::Read,
        expected: &Expected,
        meter: &Meter,
        cancel: &CancellationToken,
    ) -> Result<(), ImageError> {
        let io =
            |error| ImageError::io(format!("unpack layer {}", expected.diff_id), &self.config.dir, error);
        let target = self.index.temporary();
        std::fs::create_dir(target.path()).map_err(io)?;
        // What a layer does not say about its root.
        std::fs::set_permissions(target.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .map_err(io)?;
        std::fs::File::open(target.path())
            .and_then(|dir| dir.set_modified(SystemTime::UNIX_EPOCH))
            .map_err(io)?;
        let last = std::cell::Cell::new(0);
        let progress = |done| meter.unpacked(done - last.replace(done));
        let limits = &self.config.limits;
        let extracted = layer::extract(blob, expected, limits, target.path(), &progress, cancel)?;
        self.extractions.fetch_add(1, Ordering::Relaxed);
        let record = LayerRecord {
            diff_id: expected.diff_id.clone(),
            bytes: extracted.bytes,
            inodes: extracted.tree.inodes,
            implicit: extracted.tree.implicit.iter().map(hex::encode).collect(),
            opaque_root: extracted.tree.opaque_root,
            blobs: BTreeMap::new(),
        };
        self.index.add_layer(&target, record).map_err(io)
    }

    /// Mounts an image of the index and hands it out.
    async fn mounted(
        self: &Arc<Self>,
        reference: &Reference,
        record: &Arc<ImageRecord>,
        pin: Pin,
    ) -> Result<Image, ImageError> {
        let _alone = self.image_locks.lock(record.digest.clone()).await;
        let inner = Arc::clone(self);
        let of_record = Arc::clone(record);
        let rootfs = blocking("mounting an image", move || {
            let rootfs = inner.index.mount(&of_record).map_err(|error| {
                ImageError::io(format!("mount image {}", of_record.digest), &inner.config.dir, error)
            })?;
            inner.index.touch(&of_record.digest);
            Ok(rootfs)
        })
        .await?;
        Ok(Image {
            pinned_reference: reference.with_digest(record.digest.clone()),
            digest: record.digest.clone(),
            rootfs,
            config: record.config.clone(),
            size: record.size,
            _pin: Arc::new(pin),
        })
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn timed<T>(
    after: Duration,
    what: impl FnOnce() -> String,
    work: impl Future<Output = Result<T, ImageError>>,
) -> Result<T, ImageError> {
    match tokio::time::timeout(after, work).await {
        Ok(result) => result,
        Err(_) => Err(ImageError::TimedOut { what: what(), after }),
    }
}

/// Runs what blocks on a thread for that.
async fn blocking<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(ImageError::Internal { what: what.to_owned(), reason: error.to_string() }),
    }
}

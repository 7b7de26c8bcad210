// SPDX-License-Identifier: Apache-2.0
//! Start, shutdown and upkeep of a node agent.
//!
//! **Start.** Directories, keys, images, then the workers (adopted or started), then the socket; `ready` is told when
//! the socket serves. Workers come up meanwhile: calls wait for them, the session tells about them.
//!
//! **Shutdown.** The workers stay: they outlive this process by design, and the next one adopts them. A full stop is
//! [`stop_workers`] afterwards: it ends workers whose slots are empty and leaves those that still hold an actor.
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use ateom::cgroup::Hierarchy;
use nix::fcntl::{Flock, FlockArg};
use substrate_proto::atelet::node_server::NodeServer;
use substrate_proto::ateom::slot_status::Phase;
use substrate_proto::ateom::{GetStatusRequest, ShutdownRequest};
use substrate_proto::seam;
use substrate_proto::tls::{self, Peer};
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::service::interceptor::InterceptedService;

use super::Node;
use super::service::Service;
use super::session::Hub;
use crate::actor::ledger::Ledger;
use crate::actor::place::ActorPlaces;
use crate::asset::{AssetStore, Policy, SandboxConfig};
use crate::blob::{self, BlobError, BlobStore};
use crate::config::{WorkerConfig, admits, cores};
use crate::disk::Disk;
use crate::flight::Flights;
use crate::image::{ErofsImages, ImageStore};
use crate::logs::Logs;
use crate::snapshot::FileKeyStore;
use crate::snapshot::node::NodeSnapshots;
use crate::snapshot::restore::Durable;
use crate::worker::process::{Process, boot_id};
use crate::worker::{News, OwnRuntime, Settings, Worker, dial};
use crate::{Config, Error, durable};

/// How often logs are looked at: often, because a workload that writes without end fills the disk meanwhile.
const UPKEEP: Duration = Duration::from_secs(1);
/// How many times rarer caches are.
const CACHES: u32 = 10;
/// How long calls under way may take to end at a shutdown.
const DRAIN: Duration = Duration::from_secs(5);
/// How long a worker may take to end.
const WORKER_END: Duration = Duration::from_secs(30);
/// How long a task of this process may take to end at a shutdown. One that still fences a worker is abandoned: the next
/// start fences it again.
const TASK_END: Duration = Duration::from_secs(20);
/// How long an ateom may take to say what its slot holds.
const ANSWER: Duration = Duration::from_secs(10);
/// How long the blob store may take to answer at a start.
const STORE_CHECK: Duration = Duration::from_secs(10);
/// Uploads at the same time: each uses all cores by itself.
const UPLOADS: usize = 2;
/// Boots at the same time for each restore.
const BOOTS: usize = 4;
/// Largest message: a template with files.
const MAX_MESSAGE: usize = 16 << 20;

/// Runs the node agent until `shutdown`. `ready` is told once the socket serves. Workers stay when it returns.
///
/// # Errors
/// [`Error`]; what was started of the workers goes on and is adopted by the next start.
pub async fn serve(
    config: Config,
    ready: oneshot::Sender<()>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    config.validate()?;
    let (preparing, lock) = {
        let config = config.clone();
        crate::blocking(move || prepare(&config)).await?
    };
    let store = open_store(&config).await?;
    let images = ImageStore::open(config.image_limits.store(config.dir.join("images"))).await?;
    let erofs = ErofsImages::open(config.dir.join("erofs"))?;
    let hierarchy = Hierarchy::detect()?;
    let settings = Arc::new(settings(&config)?);
    let sandbox = match &config.sandbox_config {
        None => None,
        Some(path) => Some(Policy::new(path, SandboxConfig::read(path)?)),
    };
    let runtimes = runtimes(&config, sandbox.as_ref())?;
    let stop = CancellationToken::new();
    let hub = Arc::new(Hub::default());
    let mut tasks = Vec::new();
    let node = Arc::new_cyclic(|node: &Weak<Node>| {
        let mut workers = BTreeMap::new();
        for (worker, runtime) in config.workers.iter().zip(runtimes) {
            let node = node.clone();
            let listener = Arc::new(move |id: &str, news: News| {
                if let Some(node) = node.upgrade() {
                    node.take_news(id, news);
                }
            });
            let (handle, task) =
                Worker::supervise(Arc::clone(&settings), &hierarchy, worker, runtime, listener, stop.clone());
            tasks.push(task);
            workers.insert(worker.id.clone(), handle);
        }
        let Prepared { boot_id, snapshots, keys, places, ledger } = preparing;
        let durable = Durable::new(store, keys, cores());
        Node {
            boot_id,
            images,
            erofs,
            sandbox,
            snapshots,
            durable,
            places,
            ledger,
            logs: Logs::new(&config.logs.join("actors"), config.log_max_bytes, config.log_files),
            disk: Disk::new(&config.dir, config.min_free_bytes),
            workers,
            hub: Arc::clone(&hub),
            session: Mutex::default(),
            lease: Mutex::default(),
            granted: watch::Sender::new(None),
            lease_wanted: tokio::sync::Notify::new(),
            starting: Mutex::default(),
            held: Mutex::default(),
            activations: Flights::default(),
            checkpoints: Flights::default(),
            refused: Mutex::default(),
            uploads: Flights::default(),
            fetches: Flights::default(),
            releases: Flights::default(),
            restores: Arc::new(Semaphore::new(config.concurrent_starts.max(1))),
            boots: Arc::new(Semaphore::new(config.concurrent_starts.max(1) * BOOTS)),
            fetch_slots: Arc::new(Semaphore::new(cores().max(2))),
            upload_slots: Arc::new(Semaphore::new(UPLOADS)),
            config,
        }
    });
    end_strangers(&settings, &node.config).await;
    if let Some(policy) = &node.sandbox {
        let (settings, wanted, stop) = (Arc::clone(&settings), policy.now(), stop.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = settings.assets.prefetch(&wanted) => {}
                () = stop.cancelled() => {}
            }
        });
    }
    let upkeep = tokio::spawn(upkeep(Arc::clone(&node), stop.clone()));
    let socket = node.config.socket.clone();
    let local = seam::listen(&socket, seam::Peers::default())?;
    let remote = match &node.config.remote {
        Some(remote) => Some(tls::Listener::bind(remote.listener()).await?),
        None => None,
    };
    let clients = node.config.remote.as_ref().map_or_else(Vec::new, |remote| remote.clients.clone());
    let service = NodeServer::new(Service(Arc::clone(&node)))
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let service = InterceptedService::new(service, move |request: tonic::Request<()>| {
        admits(&clients, request.extensions().get::<Option<Peer>>().and_then(Option::as_ref))
            .map(|()| request)
    });
    tracing::info!(node = node.config.node, socket = %socket.display(), workers = node.workers.len(), "node agent");
    // The caller may not care.
    let _ = ready.send(());
    let stopping = shutdown.clone();
    let server = tonic::transport::Server::builder().add_service(service).serve_with_incoming_shutdown(
        tls::either(local, remote),
        async move {
            stopping.cancelled().await;
            // Its stream would not end by itself.
            hub.close();
        },
    );
    let mut server = std::pin::pin!(server);
    let served = tokio::select! {
        served = &mut server => served,
        // Somebody may follow a log, or sit at a terminal.
        () = async { shutdown.cancelled().await; tokio::time::sleep(DRAIN).await } => Ok(()),
    };
    stop.cancel();
    let ends = tasks.into_iter().chain([upkeep]).map(|mut task| async move {
        match timeout(TASK_END, &mut task).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "a task of the node agent failed"),
            Err(_) => {
                // It holds nothing that a next start would not find as after a kill.
                tracing::error!("a task of the node agent did not end in time and is abandoned");
                task.abort();
            }
        }
    });
    futures::future::join_all(ends).await;
    drop(lock);
    served.map_err(|source| Error::Serve { socket, source })
}

/// Opens the blob store. One that is set up wrongly is an error; one that does not answer now is not: what runs here
/// must be adopted all the same, and uploads are sent again.
async fn open_store(config: &Config) -> Result<Arc<dyn BlobStore>, Error> {
    let store = blob::open(&config.blobs, true).await?;
    match timeout(STORE_CHECK, store.check()).await {
        Ok(Ok(())) => {}
        Ok(Err(error @ BlobError::Unusable { .. })) => return Err(error.into()),
        Ok(Err(error)) => {
            tracing::warn!(%error, "the blob store does not answer; nothing can be suspended into it");
        }
        Err(_) => tracing::warn!(
            store = store.location(),
            "the blob store does not answer; nothing can be suspended into it"
        ),
    }
    Ok(store)
}

struct Prepared {
    boot_id: String,
    snapshots: NodeSnapshots,
    keys: Arc<FileKeyStore>,
    places: ActorPlaces,
    ledger: Ledger,
}

fn prepare(config: &Config) -> Result<(Prepared, Flock<std::fs::File>), Error> {
    for dir in [&config.dir, &config.run_dir, &config.keys, &config.logs] {
        durable::create_dir(dir)?;
    }
    durable::create_dir(&config.logs.join("workers"))?;
    let lock = lock(&config.dir.join("atelet.lock"))?;
    let keys = Arc::new(FileKeyStore::open(&config.keys)?);
    let prepared = Prepared {
        boot_id: boot_id()?,
        snapshots: NodeSnapshots::open(&config.dir.join("snapshots"), cores())?,
        keys,
        places: ActorPlaces::open(
            &config.dir.join("actors"),
            &config.run_dir.join("actors"),
            &config.logs.join("actors"),
        )?,
        ledger: Ledger::open(&config.dir.join("actors"))?,
    };
    Ok((prepared, lock))
}

/// One node agent on a directory: two would adopt the same workers.
fn lock(path: &Path) -> Result<Flock<std::fs::File>, Error> {
    let file = std::fs::File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(durable::at("open", path))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| Error::Locked(path.to_owned()))
}

/// The runtime of each worker that has one of its own.
fn runtimes(config: &Config, policy: Option<&Policy>) -> Result<Vec<Option<OwnRuntime>>, Error> {
    let known = policy.map(Policy::now);
    let of = |worker: &WorkerConfig| {
        let Some(name) = &worker.runtime else { return Ok(None) };
        let class = known.as_ref().map(|known| known.class(worker.class));
        let runtimes = class.into_iter().flat_map(|class| class.runtimes.iter().enumerate());
        let found = runtimes.into_iter().find(|(_, runtime)| runtime.name == *name);
        let own = found.map(|(at, config)| OwnRuntime { config: config.clone(), is_older: at > 0 });
        own.map(Some).ok_or_else(|| {
            Error::Config(format!(
                "workers: {} is to run the runtime {name:?}, which the sandbox config does not name",
                worker.id
            ))
        })
    };
    config.workers.iter().map(of).collect()
}

fn settings(config: &Config) -> Result<Settings, Error> {
    Ok(Settings {
        assets: Arc::new(AssetStore::open(&config.dir.join("runtimes"))?),
        state: config.dir.join("workers"),
        run: config.run_dir.join("workers"),
        logs: config.logs.join("workers"),
        ateom: config.ateom_binary.clone(),
        runsc: config.runsc.clone(),
        runsc_sha256: config.runsc_sha256.clone(),
        microvm: config.microvm.clone(),
        egress_socket: config.egress_socket.clone(),
        cgroup: config.cgroup.clone(),
        start_limit: Duration::from_millis(config.worker_start_ms),
    })
}

impl Node {
    fn report_standing(&self) {
        let up = self.workers.values().filter(|worker| worker.view().up.is_some()).count();
        let left_ns = self
            .granted
            .borrow()
            .map_or(0, |granted| granted.deadline_for(u64::MAX).saturating_sub(ateom::boottime_ns()).max(0));
        crate::metrics::standing(
            self.disk.usage().ok(),
            self.config.min_free_bytes,
            &self.images.usage(),
            (up, self.workers.len()),
            left_ns as f64 / 1e9,
        );
    }

    /// News of a worker: what was lost is noted before it is told.
    pub(super) fn take_news(&self, id: &str, news: News) {
        let Some(worker) = self.workers.get(id) else { return };
        let (message, view) = (Self::worker_message(worker), worker.view());
        // How a start ends is told by the call that asked for it.
        let quiet = view.assignment().is_some_and(|held| self.is_starting(held));
        if matches!(news, News::Lost { .. }) {
            crate::metrics::worker_lost();
        }
        let lost = match &news {
            News::Lost { assignment, .. } => assignment.clone().into_iter().collect(),
            // It died while nobody watched: what was started there is in the ledger.
            News::Vacant => self.ledger.on_worker(id),
            News::Changed if view.phase() == Phase::Lost && !quiet => {
                view.assignment().cloned().into_iter().collect()
            }
            _ => Vec::new(),
        };
        for assignment in &lost {
            // Its generation must not come back by a late retry.
            if let Err(error) = self.ledger.end(assignment) {
                tracing::warn!(%error, "a late start would not be recognised after a restart of this process");
            }
            self.release_images(assignment);
        }
        if matches!(news, News::Vacant) {
            for assignment in lost {
                let reason = "its process was gone when the node agent started".to_owned();
                let news = News::Lost { assignment: Some(assignment), reason };
                self.hub.news(id, news, message.clone(), &view, quiet);
            }
        } else {
            self.hub.news(id, news, message, &view, quiet);
        }
    }
}

async fn upkeep(node: Arc<Node>, stop: CancellationToken) {
    let mut ticks = 0_u32;
    let mut interval = tokio::time::interval(UPKEEP);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = interval.tick() => {}
            () = stop.cancelled() => return,
        }
        ticks += 1;
        let (node, turn) = (Arc::clone(&node), ticks.is_multiple_of(CACHES));
        let standing = Arc::clone(&node);
        crate::blocking(move || {
            node.logs.rotate();
            if !turn {
                return;
            }
            // A disk that fills up takes the cache first.
            let tight = node.disk.admit("the cache", node.config.min_free_bytes).is_err();
            let limit = if tight { 0 } else { node.config.snapshot_cache_bytes };
            match node.snapshots.evict(limit) {
                Ok(0) => {}
                Ok(freed) => {
                    crate::metrics::collected("snapshot", freed);
                    tracing::info!(freed, "evicted cached snapshots");
                }
                Err(error) => tracing::warn!(%error, "cannot evict cached snapshots"),
            }
        })
        .await;
        if turn {
            collect_images(&standing).await;
            standing.report_standing();
        }
    }
}

/// Removes images beyond the limit, all that nobody needs when the disk is tight. What an actor that is known here needs
/// stays, asleep or awake.
async fn collect_images(node: &Arc<Node>) {
    let tight = node.disk.admit("the cache", node.config.min_free_bytes).is_err();
    let limit = if tight { 0 } else { node.config.image_cache_bytes };
    if node.images.usage().bytes <= limit {
        return;
    }
    let (noting, digests) = (Arc::clone(node), |noted: std::collections::HashSet<String>| {
        noted.iter().filter_map(|digest| digest.parse().ok()).collect()
    });
    let needed = match crate::blocking(move || noting.places.noted_images()).await {
        Ok(noted) => digests(noted),
        Err(error) => {
            tracing::warn!(%error, "cannot tell which images are needed; none is removed");
            return;
        }
    };
    match node.images.collect(needed, limit, false).await {
        Ok(collected) if collected.images.is_empty() && collected.layers.is_empty() => {}
        Ok(collected) => {
            let (images, bytes) = (collected.images.len(), collected.bytes);
            tracing::info!(
                images,
                layers = collected.layers.len(),
                bytes,
                "removed images that nobody needs"
            );
            crate::metrics::collected("image", bytes);
        }
        Err(error) => tracing::warn!(%error, "cannot remove unused images"),
    }
    let node = Arc::clone(node);
    let removed = crate::blocking(move || node.erofs.collect(&node.images.digests())).await;
    match removed {
        Ok(bytes) => crate::metrics::collected("image", bytes),
        Err(error) => tracing::warn!(%error, "cannot remove disks of images that are gone"),
    }
}

/// Workers of an earlier configuration: ended if they are empty, else left and said so.
async fn end_strangers(settings: &Settings, config: &Config) {
    for id in noted(&settings.state) {
        if config.workers.iter().any(|worker| worker.id == id) {
            continue;
        }
        match stop_worker(settings, &id).await {
            Ok(true) => tracing::info!(worker = id, "ended: it is not configured any more"),
            Ok(false) => {}
            Err(error) => tracing::warn!(worker = id, %error, "not configured any more, but it goes on"),
        }
    }
}

/// Ids of workers that have a note.
fn noted(state: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(state) else { return Vec::new() };
    let mut ids: Vec<String> = entries
        .flatten()
        .filter(|entry| entry.path().join("process.json").exists())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    ids.sort();
    ids
}

/// Ends the workers of a node whose agent has stopped: those whose slots are empty. One that still holds an actor is
/// left alone, goes on, and is adopted by the next start.
///
/// # Errors
/// [`Error::Worker`] for one that still holds an actor or did not end in time; the others were ended.
pub async fn stop_workers(config: &Config) -> Result<(), Error> {
    let settings = settings(config)?;
    let stops = noted(&settings.state).into_iter().map(|id| {
        let settings = &settings;
        async move {
            let stopped = stop_worker(settings, &id).await;
            stopped.map_err(|error| Error::Worker { worker: id, reason: error.to_string() })
        }
    });
    for stopped in futures::future::join_all(stops).await {
        stopped?;
    }
    let run: PathBuf = config.run_dir.join("actors");
    let images = config.dir.join("images");
    let actors = config.dir.join("actors");
    crate::blocking(move || {
        ActorPlaces::close_all_volumes(&actors);
        ActorPlaces::unmount(&run);
        if let Err(error) = crate::image::unmount_all(&images) {
            tracing::warn!(path = %images.display(), %error, "cannot unmount the images");
        }
    })
    .await;
    Ok(())
}

#[derive(Debug, thiserror::Error)]
enum Stop {
    #[error("its slot is {0}: suspend or delete the actor first")]
    Busy(String),
    #[error("{0}")]
    Failed(String),
}

/// Ends an empty worker. `false`: it did not run.
async fn stop_worker(settings: &Settings, id: &str) -> Result<bool, Stop> {
    let note = settings.note(id);
    let Some(mut process) = Process::adopt(&note) else {
        return durable::remove_file(&note).map(|()| false).map_err(|error| Stop::Failed(error.to_string()));
    };
    let mut client = timeout(WORKER_END, dial(&settings.socket(id)))
        .await
        .unwrap_or_else(|_| Err("no answer in time".to_owned()))
        .map_err(|error| Stop::Failed(format!("it does not answer: {error}")))?;
    let slot = timeout(ANSWER, client.get_status(GetStatusRequest {}))
        .await
        .map_err(|_| Stop::Failed("it does not say what its slot holds".to_owned()))?
        .map_err(|status| Stop::Failed(status.message().to_owned()))?
        .into_inner();
    if !matches!(slot.phase(), Phase::Empty | Phase::Exited | Phase::Lost) {
        return Err(Stop::Busy(format!("{:?}", slot.phase())));
    }
    // Its answer may be lost with its process.
    let answer = timeout(WORKER_END, client.shutdown(ShutdownRequest {})).await;
    match (timeout(WORKER_END, process.ended()).await, answer) {
        (Ok(_), _) => {
            durable::remove_file(&note).map(|()| true).map_err(|error| Stop::Failed(error.to_string()))
        }
        (Err(_), Ok(Err(status))) => Err(Stop::Failed(status.message().to_owned())),
        (Err(_), _) => Err(Stop::Failed("it did not end in time".to_owned())),
    }
}

// SPDX-License-Identifier: Apache-2.0
//! The parts of the one-machine process: each a task that ends with a result, told to end by a token, and named in
//! what goes wrong with it.
//!
//! ```text
//!   front token: driver, ingress                     end first, so that nothing wakes what is being suspended
//!   back token:  ateapi, atelet, egress              end last
//! ```
use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use atelet::WorkerClass;
use sha2::{Digest as _, Sha256};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::config::Settings;
use crate::doctor::Runtime;
use crate::failure::{Doing as _, Failure};

/// What one part's task ended with.
type Ended = (&'static str, Result<(), String>);

/// The running parts.
pub struct Parts {
    tasks: JoinSet<Ended>,
    front: CancellationToken,
    back: CancellationToken,
    /// Parts that belong to the front and still run.
    front_running: usize,
}

/// Which token ends a part.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Front,
    Back,
}

impl Parts {
    /// None yet.
    pub fn new() -> Self {
        Self {
            tasks: JoinSet::new(),
            front: CancellationToken::new(),
            back: CancellationToken::new(),
            front_running: 0,
        }
    }

    /// Starts everything in the order in which each finds what it needs; returns the addresses of ingress and of the
    /// control plane's TCP listener.
    ///
    /// # Errors
    /// The first part that ends before it is ready, by name.
    pub async fn start(
        &mut self,
        settings: &Settings,
        runtime: &Runtime,
        ateom: PathBuf,
    ) -> Result<(SocketAddr, Option<SocketAddr>), Failure> {
        let api = format!("unix:{}", settings.run.join("ateapi.sock").display());
        let keys =
            atenet::token::ensure_key_pair(&settings.dir.join("keys")).doing(|| "ingress keys".to_owned())?;
        self.spawn("node agent", Side::Back, |ready, token| {
            atelet::serve(node_config(settings, Some(runtime), ateom), ready, token)
        })
        .await?;
        let egress = egress_config(settings, &api);
        self.spawn("egress proxy", Side::Back, |ready, token| atenet::egress::serve(egress, ready, token))
            .await?;
        let control = control_config(settings)?;
        let remote = self
            .spawn("control plane", Side::Back, |ready, token| ateapi::serve(control, ready, token))
            .await?;
        let mut ingress = atenet::ingress::Config::new(api.clone(), keys.public);
        ingress.listen = settings.listen;
        if let Some(domain) = &settings.domain {
            ingress.domain.clone_from(domain);
        }
        let address = self
            .spawn("ingress", Side::Front, |ready, token| atenet::ingress::serve(ingress, ready, token))
            .await?;
        let driver = driver_config(settings, &api)?;
        self.spawn("driver", Side::Front, |ready, token| {
            openshell_driver_substrate::serve(driver, ready, token)
        })
        .await?;
        Ok((address, remote))
    }

    /// Spawns a part and waits until it is ready.
    async fn spawn<R, F, E>(
        &mut self,
        name: &'static str,
        side: Side,
        part: impl FnOnce(oneshot::Sender<R>, CancellationToken) -> F,
    ) -> Result<R, Failure>
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: std::fmt::Display,
    {
        let token = match side {
            Side::Front => &self.front,
            Side::Back => &self.back,
        };
        let (ready, is_ready) = oneshot::channel();
        let work = part(ready, token.child_token());
        self.tasks.spawn(async move { (name, work.await.map_err(|error| error.to_string())) });
        self.front_running += usize::from(side == Side::Front);
        tokio::select! {
            biased;
            // A part that ends drops its sender, so its result is there in a moment.
            Ok(value) = is_ready => {
                tracing::info!(part = name, "ready");
                Ok(value)
            }
            failure = self.failed() => Err(failure),
        }
    }

    /// Waits until a part ends although nobody told it to.
    pub async fn failed(&mut self) -> Failure {
        match self.tasks.join_next().await {
            None => std::future::pending().await,
            Some(joined) => {
                let (name, result) = ended(joined);
                let why = result.err().unwrap_or_else(|| "it ended by itself".to_owned());
                tracing::error!(part = name, why, "a part failed");
                Failure::general(format!("the {name} failed: {why}"))
            }
        }
    }

    /// Ends the driver and ingress, and waits for them.
    pub async fn stop_front(&mut self) {
        self.front.cancel();
        while self.front_running > 0 {
            let Some(joined) = self.tasks.join_next().await else { return };
            let (name, result) = ended(joined);
            if matches!(name, "driver" | "ingress") {
                self.front_running -= 1;
            }
            note(name, result);
        }
    }

    /// Ends everything and waits for it.
    pub async fn stop(&mut self) {
        self.front.cancel();
        self.back.cancel();
        while let Some(joined) = self.tasks.join_next().await {
            let (name, result) = ended(joined);
            note(name, result);
        }
    }
}

fn ended(joined: Result<Ended, tokio::task::JoinError>) -> Ended {
    joined.unwrap_or_else(|error| ("process", Err(format!("a part died: {error}"))))
}

fn note(name: &str, result: Result<(), String>) {
    match result {
        Ok(()) => tracing::info!(part = name, "ended"),
        Err(why) => tracing::error!(part = name, why, "ended badly"),
    }
}

fn control_config(settings: &Settings) -> Result<ateapi::Config, Failure> {
    let node = ateapi::NodeEndpoint {
        name: node_name(settings),
        endpoint: format!("unix:{}", settings.run.join("atelet.sock").display()),
        tls: None,
    };
    let mut config = ateapi::Config::new(
        settings.dir.join("control/state.db"),
        settings.dir.join("keys"),
        settings.run.join("ateapi.sock"),
        vec![node],
    );
    let given = &settings.file.control;
    let set = |place: &mut u64, value: Option<u64>| *place = value.unwrap_or(*place);
    set(&mut config.idle_suspend_after_ms, given.idle_suspend_after_ms);
    set(&mut config.evict_after_ms, given.evict_after_ms);
    set(&mut config.place_wait_ms, given.place_wait_ms);
    set(&mut config.lease_term_ms, given.lease_term_ms);
    set(&mut config.lease_margin_ms, given.lease_margin_ms);
    set(&mut config.events_keep, given.events_keep);
    config.audit = Some(settings.dir.join("logs/control-audit.jsonl"));
    config.remote = remote_config(settings)?;
    Ok(config)
}

/// The control plane's TCP listener. Where nothing says who is believed, tokens of a key of our own are.
fn remote_config(settings: &Settings) -> Result<Option<ateapi::access::Remote>, Failure> {
    let given = &settings.file.api;
    let (Some(listen), Some(cert), Some(key)) = (given.listen, &given.cert, &given.key) else {
        return Ok(None);
    };
    let token_keys = match (&given.client_ca, &given.token_keys) {
        (None, None) => {
            let files = atenet::token::ensure_key_pair_named(&settings.dir.join("keys"), CONTROL_KEYS)
                .doing(|| "control plane keys".to_owned())?;
            Some(files.public)
        }
        (_, keys) => keys.clone(),
    };
    Ok(Some(ateapi::access::Remote {
        listen,
        cert: cert.clone(),
        key: key.clone(),
        client_ca: given.client_ca.clone(),
        token_keys,
        grants: given.grants.clone(),
    }))
}

/// Name of the key pair of tokens for the control plane.
pub const CONTROL_KEYS: &str = "control";

fn node_name(settings: &Settings) -> String {
    settings.file.node.name.clone().unwrap_or_else(|| "local".to_owned())
}

fn driver_config(settings: &Settings, api: &str) -> Result<openshell_driver_substrate::Config, Failure> {
    use openshell_driver_substrate::Config;
    let given = &settings.file.driver;
    let mut config = match &given.gateway_config {
        None => Config::default(),
        Some(path) => {
            let (config, warnings) =
                Config::load(path).map_err(|error| Failure::usage(format!("{}: {error}", path.display())))?;
            for warning in warnings {
                tracing::warn!(file = %path.display(), warning);
            }
            config
        }
    };
    api.clone_into(&mut config.api_endpoint);
    config.socket_path.clone_from(&settings.driver_socket);
    config.socket_peer_uid = given.peer_uid.or(config.socket_peer_uid);
    config.socket_peer_gid = given.peer_gid.or(config.socket_peer_gid);
    if config.supervisor.store == openshell_driver_substrate::Supervisor::default().store {
        config.supervisor.store = settings.dir.join("driver");
    }
    if let Some(image) = &given.default_image {
        config.default_image.clone_from(image);
    }
    Ok(config)
}

fn node_config(settings: &Settings, runtime: Option<&Runtime>, ateom: PathBuf) -> atelet::Config {
    let given = &settings.file.node;
    let pool = given.pool.clone().unwrap_or_else(|| "default".to_owned());
    let worker = |class, runtime: Option<String>| {
        let pool = pool.clone();
        move |id| atelet::WorkerConfig { id, pool: pool.clone(), class, runtime: runtime.clone() }
    };
    let older = settings.older_workers().into_iter().map(|(id, class, runtime)| atelet::WorkerConfig {
        id,
        pool: pool.clone(),
        class,
        runtime: Some(runtime),
    });
    let gvisor = settings.worker_ids().into_iter().map(worker(WorkerClass::Gvisor, None));
    let microvm = settings
        .microvm_worker_ids()
        .into_iter()
        .map(worker(WorkerClass::Microvm, settings.microvm_runtime()));
    let workers = gvisor.chain(microvm).chain(older).collect();
    let runsc = runtime.map(|runtime| runtime.path.clone()).unwrap_or_default();
    let mut config = atelet::Config::for_machine(
        &node_name(settings),
        &settings.dir,
        &settings.run,
        workers,
        ateom,
        runsc,
    );
    config.microvm.clone_from(&settings.microvm);
    config.cgroup = cgroup(&settings.dir);
    config.sandbox_config = settings.sandbox.as_ref().map(|(path, _)| path.clone());
    config.runsc_sha256 = runtime.map(|runtime| runtime.sha256.clone());
    config.blobs = given.blobs.clone().unwrap_or(config.blobs);
    config.min_free_bytes = given.min_free_bytes.unwrap_or(config.min_free_bytes);
    config.snapshot_cache_bytes = given.snapshot_cache_bytes.unwrap_or(config.snapshot_cache_bytes);
    config.image_cache_bytes = given.image_cache_bytes.unwrap_or(config.image_cache_bytes);
    config.log_max_bytes = given.log_max_bytes.unwrap_or(config.log_max_bytes);
    config.log_files = given.log_files.unwrap_or(config.log_files);
    config.concurrent_starts = given.concurrent_starts.unwrap_or(config.concurrent_starts);
    config
}

/// Parent of the workers' control groups: two machines in one (a test beside the real one) must not share them.
fn cgroup(dir: &Path) -> String {
    if dir == Path::new(crate::args::DEFAULT_DIR) {
        return "substrate".to_owned();
    }
    let digest = Sha256::digest(dir.as_os_str().as_encoded_bytes());
    format!("substrate-{}", hex::encode(&digest[..4]))
}

fn egress_config(settings: &Settings, api: &str) -> atenet::egress::Config {
    let audit = settings.dir.join("logs/egress-audit.jsonl");
    let mut config = atenet::egress::Config::new(settings.run.join("egress.sock"), api, audit);
    let given = &settings.file.egress;
    config.resolver = given.resolver;
    config.refuse.clone_from(&given.refuse);
    config.publish = given
        .published
        .iter()
        .map(|service| atenet::egress::Published {
            name: service.name.clone(),
            port: service.port,
            target: service.target,
            atespaces: service.atespaces.clone(),
        })
        .collect();
    config
}

/// Ends the worker processes of an orderly stop.
///
/// # Errors
/// When one does not end.
pub async fn stop_workers(settings: &Settings, ateom: PathBuf) -> Result<(), Failure> {
    let config = node_config(settings, None, ateom);
    atelet::stop_workers(&config).await.doing(|| "cannot end the workers".to_owned())?;
    let mounts =
        std::fs::read_to_string("/proc/self/mounts").doing(|| "cannot read the mounts".to_owned())?;
    for group in groups(&mounts, &config.cgroup) {
        match std::fs::remove_dir(&group) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                tracing::warn!(group = %group.display(), %error, "cannot remove the workers' parent group");
            }
        }
    }
    Ok(())
}

/// A control group in every hierarchy there is (proc(5), `/proc/self/mounts`).
fn groups(mounts: &str, name: &str) -> Vec<PathBuf> {
    let mut groups: Vec<PathBuf> = mounts
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ').skip(1);
            let (place, kind) = (words.next()?, words.next()?);
            matches!(kind, "cgroup" | "cgroup2").then(|| Path::new(place).join(name))
        })
        .collect();
    groups.sort();
    groups.dedup();
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A part that is ready at once and runs until it is told to end.
    async fn obedient(ready: oneshot::Sender<u32>, token: CancellationToken) -> Result<(), String> {
        let _ = ready.send(7);
        token.cancelled().await;
        Ok(())
    }

    #[tokio::test]
    async fn a_part_that_fails_before_it_is_ready_is_named_with_its_reason() {
        let mut parts = Parts::new();
        assert_eq!(parts.spawn("control plane", Side::Back, obedient).await.unwrap(), 7);
        let failing = |ready: oneshot::Sender<()>, _| async move {
            drop(ready);
            Err::<(), _>("the database is corrupt")
        };
        let failure = parts.spawn("node agent", Side::Back, failing).await.unwrap_err();
        assert_eq!(failure.message, "the node agent failed: the database is corrupt");
        parts.stop().await;
    }

    #[tokio::test]
    async fn a_part_that_ends_by_itself_later_is_a_failure_too() {
        let mut parts = Parts::new();
        let brief = |ready: oneshot::Sender<()>, _| async move {
            let _ = ready.send(());
            Ok::<_, String>(())
        };
        parts.spawn("egress proxy", Side::Back, brief).await.unwrap();
        assert_eq!(parts.failed().await.message, "the egress proxy failed: it ended by itself");
    }

    #[tokio::test]
    async fn the_front_ends_first_and_alone() {
        let mut parts = Parts::new();
        parts.spawn("control plane", Side::Back, obedient).await.unwrap();
        parts.spawn("ingress", Side::Front, obedient).await.unwrap();
        parts.spawn("driver", Side::Front, obedient).await.unwrap();
        parts.stop_front().await;
        assert_eq!(parts.tasks.len(), 1, "only the control plane runs");
        parts.stop().await;
        assert!(parts.tasks.is_empty());
    }

    #[test]
    fn the_parent_group_is_looked_for_in_every_hierarchy() {
        let mounts = "cgroup /sys/fs/cgroup/pids cgroup rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        let expected = ["/sys/fs/cgroup/pids/substrate-a", "/sys/fs/cgroup/unified/substrate-a"];
        assert_eq!(groups(mounts, "substrate-a"), expected.map(PathBuf::from));
    }

    #[test]
    fn machines_on_other_directories_have_groups_of_their_own() {
        assert_eq!(cgroup(Path::new("/var/lib/substrate")), "substrate");
        assert_ne!(cgroup(Path::new("/tmp/a")), cgroup(Path::new("/tmp/b")));
    }
}

// SPDX-License-Identifier: Apache-2.0
//! What a node agent is told at its start.
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use substrate_proto::tls::{Listen, Peer};
use tonic::Status;

use crate::blob::BlobUrl;
use crate::{Error, image};

/// One worker slot of the node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkerConfig {
    /// Unique on the node and in the cluster; a DNS-1123 label.
    pub id: String,
    /// Pool it belongs to. Default: `default`.
    #[serde(default = "default_pool")]
    pub pool: String,
    /// What it runs: `gvisor` or `microvm`. Default: `gvisor`.
    #[serde(default)]
    pub class: WorkerClass,
    /// Name of the runtime in the sandbox config that it runs. Default: the class's own (`runsc`, `microvm`).
    #[serde(default)]
    pub runtime: Option<String>,
}

/// What a worker runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkerClass {
    /// gVisor sandboxes.
    #[default]
    Gvisor,
    /// Virtual machines.
    Microvm,
}

/// What workers of the microVM class need.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MicrovmConfig {
    /// The `ateom-microvm` to start.
    pub ateom_binary: PathBuf,
    /// The QEMU that it runs.
    pub qemu: PathBuf,
    /// Its sha256 (hex), checked by each ateom. Default: not checked.
    #[serde(default)]
    pub qemu_sha256: Option<String>,
    /// Directory of the guests' kernel: `vmlinuz` and `modules/`.
    pub kernel: PathBuf,
    /// What runs the guests' processors. Default: `auto`.
    #[serde(default)]
    pub accelerator: Accelerator,
}

/// What runs the processors of QEMU's guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// KVM where a guest boots under it, else emulation.
    #[default]
    Auto,
    /// KVM; no worker comes up without it.
    Kvm,
    /// Emulation.
    Tcg,
}

impl Accelerator {
    /// As ateom-microvm takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// What images may cost and where they may come from.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ImageLimits {
    /// Compressed bytes of one image. Default: 32 GiB.
    pub image_bytes: u64,
    /// Uncompressed bytes of one layer. Default: 32 GiB.
    pub layer_bytes: u64,
    /// Files, directories and links of one layer. Default: 1,000,000.
    pub layer_inodes: u64,
    /// Time to unpack one layer, s. Default: 1200.
    pub layer_seconds: u64,
    /// Time for a whole image, s. Default: 3600.
    pub image_seconds: u64,
    /// Directories that `oci:` and `oci-archive:` references must be beneath. Default: none, which allows any.
    pub local_roots: Vec<PathBuf>,
    /// Credentials for registries. Default: none, which means anonymous.
    pub credentials: Option<PathBuf>,
}

impl Default for ImageLimits {
    fn default() -> Self {
        let limits = image::Limits::default();
        Self {
            image_bytes: limits.image_bytes,
            layer_bytes: limits.layer_bytes,
            layer_inodes: limits.layer_inodes,
            layer_seconds: limits.layer_time.as_secs(),
            image_seconds: limits.image_time.as_secs(),
            local_roots: Vec::new(),
            credentials: None,
        }
    }
}

impl ImageLimits {
    /// Settings of the image store in `dir`.
    pub(crate) fn store(&self, dir: PathBuf) -> image::Config {
        image::Config {
            credentials: self.credentials.clone(),
            local_roots: self.local_roots.clone(),
            limits: image::Limits {
                image_bytes: self.image_bytes,
                layer_bytes: self.layer_bytes,
                layer_inodes: self.layer_inodes,
                layer_time: Duration::from_secs(self.layer_seconds),
                image_time: Duration::from_secs(self.image_seconds),
            },
            ..image::Config::new(dir)
        }
    }
}

/// The TCP listener for a control plane on another machine.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Remote {
    /// Address; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Its certificate chain, PEM; names the host that the control plane dials.
    pub cert: PathBuf,
    /// The certificate's private key, PEM.
    pub key: PathBuf,
    /// Authorities of client certificates, PEM.
    pub client_ca: PathBuf,
    /// Names of the certificates that may command this node: each the first URI name, else the first DNS name, else
    /// the common name.
    pub clients: Vec<String>,
}

/// Configuration of a node agent. Paths are absolute; sizes are bytes.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name of this node, unique in the cluster.
    pub node: String,
    /// State: images, node snapshots, actors' volumes, workers. Made 0700.
    pub dir: PathBuf,
    /// Sockets and what may never be on a disk (identity and files of actors). If it is not on a tmpfs, one is
    /// mounted below it.
    pub run_dir: PathBuf,
    /// Where durable snapshots are: `/absolute/path`, `file:/absolute/path`, or
    /// `s3://BUCKET[/PREFIX][?endpoint=URL&region=NAME&path_style=BOOL]`.
    pub blobs: BlobUrl,
    /// Keys: `master.key` and `atespaces/<name>.key`. Made 0700.
    pub keys: PathBuf,
    /// Logs: of the workers (`workers/<id>.log`) and of actors (`actors/<atespace>/<actor>/<container>.log`).
    pub logs: PathBuf,
    /// Where `atelet.v1.Node` is served.
    pub socket: PathBuf,
    /// Where it is served besides, for a control plane on another machine. Default: nowhere.
    #[serde(default)]
    pub remote: Option<Remote>,
    /// The worker slots. Workers of an earlier run that are not named here are ended when they are empty.
    #[serde(default)]
    pub workers: Vec<WorkerConfig>,
    /// The `ateom-gvisor` to start.
    pub ateom_binary: PathBuf,
    /// The runsc that ateoms run.
    pub runsc: PathBuf,
    /// Its sha256 (hex), checked by each ateom. Default: not checked.
    #[serde(default)]
    pub runsc_sha256: Option<String>,
    /// The sandbox config: runtimes by content, what is revoked. Default: none.
    #[serde(default)]
    pub sandbox_config: Option<PathBuf>,
    /// For workers of the microVM class. Default: none, which allows no such worker.
    #[serde(default)]
    pub microvm: Option<MicrovmConfig>,
    /// Socket of the egress proxy, handed to ateoms.
    pub egress_socket: PathBuf,
    /// Parent of the workers' control groups, relative. Default: `substrate`.
    #[serde(default = "default_cgroup")]
    pub cgroup: String,
    /// Limits on images.
    #[serde(default)]
    pub image_limits: ImageLimits,
    /// New work is refused when less than this is free on the disk of `dir`. Default: 512 MiB.
    #[serde(default = "default_min_free")]
    pub min_free_bytes: u64,
    /// Node snapshots that the control plane allowed to drop stay as cache up to this much in all. Default: 8 GiB.
    #[serde(default = "default_cache")]
    pub snapshot_cache_bytes: u64,
    /// Images that no actor known here needs stay as a cache up to this much with those that are needed. Default:
    /// 64 GiB.
    #[serde(default = "default_images")]
    pub image_cache_bytes: u64,
    /// An actor's log is rotated beyond this size. Default: 16 MiB.
    #[serde(default = "default_log_bytes")]
    pub log_max_bytes: u64,
    /// Rotated logs kept for each container. Default: 2.
    #[serde(default = "default_log_files")]
    pub log_files: u32,
    /// Restores and boots at the same time; more wait. Default: the number of cores, at least 2.
    #[serde(default = "default_restores")]
    pub concurrent_starts: usize,
    /// How long a new ateom may take until it answers, ms. Default: 30 s.
    #[serde(default = "default_start_ms")]
    pub worker_start_ms: u64,
}

fn default_pool() -> String {
    "default".to_owned()
}
fn default_cgroup() -> String {
    "substrate".to_owned()
}
fn default_min_free() -> u64 {
    512 << 20
}
fn default_cache() -> u64 {
    8 << 30
}
fn default_images() -> u64 {
    64 << 30
}
fn default_log_bytes() -> u64 {
    16 << 20
}
fn default_log_files() -> u32 {
    2
}
fn default_restores() -> usize {
    cores().max(2)
}
fn default_start_ms() -> u64 {
    30_000
}

/// Cores this process may use.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(2, std::num::NonZero::get)
}

impl Config {
    /// The layout of one machine as docs/architecture.md draws it: state under `dir`, sockets under `run`.
    pub fn for_machine(
        node: &str,
        dir: &Path,
        run: &Path,
        workers: Vec<WorkerConfig>,
        ateom_binary: PathBuf,
        runsc: PathBuf,
    ) -> Self {
        Self {
            node: node.to_owned(),
            dir: dir.join("node"),
            run_dir: run.to_owned(),
            blobs: BlobUrl::Local(dir.join("blobs")),
            keys: dir.join("keys"),
            logs: dir.join("logs"),
            socket: run.join("atelet.sock"),
            remote: None,
            workers,
            ateom_binary,
            runsc,
            runsc_sha256: None,
            sandbox_config: None,
            microvm: None,
            egress_socket: run.join("egress.sock"),
            cgroup: default_cgroup(),
            image_limits: ImageLimits::default(),
            min_free_bytes: default_min_free(),
            snapshot_cache_bytes: default_cache(),
            image_cache_bytes: default_images(),
            log_max_bytes: default_log_bytes(),
            log_files: default_log_files(),
            concurrent_starts: default_restores(),
            worker_start_ms: default_start_ms(),
        }
    }

    /// Checks what can be checked without touching the machine.
    pub(crate) fn validate(&self) -> Result<(), Error> {
        let mut seen = std::collections::BTreeSet::new();
        for worker in &self.workers {
            if !is_label(&worker.id) {
                return Err(Error::Config(format!(
                    "workers: id {:?} is not a DNS-1123 label (a-z, 0-9, '-', at most 63)",
                    worker.id
                )));
            }
            if !seen.insert(&worker.id) {
                return Err(Error::Config(format!("workers: id {:?} is named twice", worker.id)));
            }
            if worker.class == WorkerClass::Microvm && self.microvm.is_none() {
                return Err(Error::Config(format!(
                    "workers: {} is of the class microvm, but the key microvm is missing",
                    worker.id
                )));
            }
        }
        if self.remote.as_ref().is_some_and(|remote| remote.clients.is_empty()) {
            return Err(Error::Config("remote: clients names nobody who may command this node".to_owned()));
        }
        for (name, path) in [
            ("dir", &self.dir),
            ("run_dir", &self.run_dir),
            ("keys", &self.keys),
            ("logs", &self.logs),
            ("ateom_binary", &self.ateom_binary),
            ("runsc", &self.runsc),
        ] {
            if !path.is_absolute() {
                return Err(Error::Config(format!("{name}: {} is not an absolute path", path.display())));
            }
        }
        Ok(())
    }
}

impl Remote {
    pub(crate) fn listener(&self) -> Listen {
        Listen {
            address: self.listen,
            cert: self.cert.clone(),
            key: self.key.clone(),
            client_ca: Some(self.client_ca.clone()),
            wants_certificate: true,
        }
    }
}

/// Who may command this node: what its socket lets in, and over TCP the certificates that are named. A certificate ends
/// at its own end also on a connection that was opened before.
pub(crate) fn admits(clients: &[String], peer: Option<&Peer>) -> Result<(), Status> {
    match peer {
        Some(Peer::Local { .. }) => Ok(()),
        Some(Peer::Remote { certificate: Some(shown), .. }) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
            if shown.not_after < i64::try_from(now).unwrap_or(i64::MAX) {
                Err(Status::unauthenticated(format!(
                    "the certificate of {} has expired: renew it",
                    shown.name
                )))
            } else if clients.contains(&shown.name) {
                Ok(())
            } else {
                Err(Status::permission_denied(format!(
                    "{} may not command this node: its node agent names who may (remote.clients)",
                    shown.name
                )))
            }
        }
        _ => Err(Status::unauthenticated("the connection does not say who calls: show a client certificate")),
    }
}

/// A DNS-1123 label: what names of workers, atespaces, actors, containers and volumes are.
pub(crate) fn is_label(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

#[cfg(test)]
mod tests {
    use substrate_proto::tls::Certificate;

    use super::*;

    #[test]
    fn names_that_could_leave_their_directory_are_no_labels() {
        for good in ["a", "w-1", "0"] {
            assert!(is_label(good), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "A", "-a", "a-", "a_b", &"x".repeat(64)] {
            assert!(!is_label(bad), "{bad}");
        }
    }

    #[test]
    fn only_named_certificates_that_are_good_command_a_node() {
        let clients = ["ateapi.example".to_owned()];
        let remote = |name: &str, not_after| {
            let certificate = Certificate { name: name.to_owned(), not_after };
            Peer::Remote { address: ([127, 0, 0, 1], 1).into(), certificate: Some(Box::new(certificate)) }
        };
        let code = |peer: Option<&Peer>| admits(&clients, peer).map_err(|status| status.code());
        assert_eq!(code(Some(&Peer::Local { uid: 0 })), Ok(()));
        assert_eq!(code(Some(&remote("ateapi.example", i64::MAX))), Ok(()));
        assert_eq!(code(Some(&remote("ateapi.example", 1))), Err(tonic::Code::Unauthenticated));
        assert_eq!(code(Some(&remote("other.example", i64::MAX))), Err(tonic::Code::PermissionDenied));
        let nobody = Peer::Remote { address: ([127, 0, 0, 1], 1).into(), certificate: None };
        assert_eq!(code(Some(&nobody)), Err(tonic::Code::Unauthenticated));
        assert_eq!(code(None), Err(tonic::Code::Unauthenticated));
    }

    #[test]
    fn unknown_keys_are_refused() {
        let text = r#"{"id": "w1", "pol": "x"}"#;
        let error = serde_json::from_str::<WorkerConfig>(text).unwrap_err().to_string();
        assert!(error.contains("pol"), "{error}");
    }
}

// SPDX-License-Identifier: Apache-2.0
//! What `substrate up` is told: a TOML file, overridden by options. docs/config.md lists every key; a test compares.
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use atelet::blob::BlobUrl;
use serde::{Deserialize, Serialize};

use crate::args::{DEFAULT_DIR, DEFAULT_RUN_DIR, Up};
use crate::failure::{Exit, Failure};

/// The configuration file. Paths are absolute or relative to the working directory; every key is optional.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct File {
    /// Where everything is kept. Default: `/var/lib/substrate`.
    pub dir: Option<PathBuf>,
    /// Where sockets are. Default: `/run/substrate` for the default `dir`, else `DIR/run`.
    pub run_dir: Option<PathBuf>,
    /// Worker slots of the gVisor class. Default: twice the cores, at least 2.
    pub workers: Option<u32>,
    /// Worker slots of the microVM class. Default: 0.
    pub microvm_workers: Option<u32>,
    /// Address of the HTTP ingress. Default: `127.0.0.1:8480`.
    pub listen: Option<SocketAddr>,
    /// Actors are `ACTOR.ATESPACE.DOMAIN` to ingress. Default: `actors.localhost`.
    pub domain: Option<String>,
    /// The runsc binary. Default: looked for, see docs/cli.md.
    pub runsc: Option<PathBuf>,
    /// The ateom-gvisor binary. Default: beside substrate, then PATH.
    pub ateom: Option<PathBuf>,
    /// The QEMU of microVMs. Default: from PATH.
    pub qemu: Option<PathBuf>,
    /// Directory of the guests' kernel: `vmlinuz`, `modules/`. Default: looked for, see docs/microvm.md.
    pub kernel: Option<PathBuf>,
    /// What runs the processors of microVMs: `auto`, `kvm` or `tcg`. Default: `auto`.
    pub accelerator: Option<atelet::Accelerator>,
    /// The sandbox config: runtimes by content, what is revoked. Default: none.
    pub sandbox_config: Option<PathBuf>,
    /// A level or tracing filter. Default: `info`.
    pub log: Option<String>,
    /// Leave workers running on exit. Default: false.
    pub leave_workers: Option<bool>,
    /// The compute driver.
    pub driver: Driver,
    /// What actors may reach.
    pub egress: Egress,
    /// The control plane.
    pub control: Control,
    /// The control plane's TCP listener.
    pub api: Api,
    /// The node agent.
    pub node: Node,
    /// Figures for monitoring.
    pub metrics: Metrics,
}

/// `[metrics]`; see docs/metrics.md.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    /// Address of `GET /metrics`. Default: none.
    pub listen: Option<SocketAddr>,
}

/// `[driver]`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Driver {
    /// A `gateway.toml` whose table `[openshell.drivers.substrate]` is read; keys below win. Default: none.
    pub gateway_config: Option<PathBuf>,
    /// Its socket. Default: `RUN/driver/driver.sock`.
    pub socket: Option<PathBuf>,
    /// User id that may use it, besides root. Default: none.
    pub peer_uid: Option<u32>,
    /// Group id that may use it. Default: none.
    pub peer_gid: Option<u32>,
    /// Image of sandboxes that name none. Default: none.
    pub default_image: Option<String>,
}

/// `[egress]`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Egress {
    /// DNS server for names that actors may reach. Default: the system's.
    pub resolver: Option<SocketAddr>,
    /// Services of this machine or its networks that actors may reach by name although their addresses are refused.
    /// Default: none.
    pub published: Vec<Published>,
    /// Further networks that no rule opens. Default: none.
    pub refuse: Vec<ipnet::IpNet>,
}

/// `[[egress.published]]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Published {
    /// Name that templates allow, lower case.
    pub name: String,
    /// Port that actors dial.
    pub port: u16,
    /// Where it really is.
    pub target: SocketAddr,
    /// Atespaces that may use it. Default: all.
    #[serde(default)]
    pub atespaces: Vec<String>,
}

/// `[control]`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Control {
    /// Idle time after which an actor whose template does not say is suspended, ms; 0: never. Default: 60000.
    pub idle_suspend_after_ms: Option<u64>,
    /// Quiet time from which an actor may be suspended to make room, ms; 0: never. Default: 5000.
    pub evict_after_ms: Option<u64>,
    /// How long a resume waits for a worker that is being freed, ms. Default: 5000.
    pub place_wait_ms: Option<u64>,
    /// Term of the node's lease, ms. Default: 60000.
    pub lease_term_ms: Option<u64>,
    /// What is waited beyond a lease, ms. Default: 5000.
    pub lease_margin_ms: Option<u64>,
    /// Events kept. Default: 50000.
    pub events_keep: Option<u64>,
}

/// `[api]`; see docs/access.md.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Api {
    /// Address for clients of other machines. Default: none.
    pub listen: Option<SocketAddr>,
    /// Its certificate chain, PEM. Needed with `listen`.
    pub cert: Option<PathBuf>,
    /// The certificate's key, PEM. Needed with `listen`.
    pub key: Option<PathBuf>,
    /// Authorities of client certificates, PEM. Default: none.
    pub client_ca: Option<PathBuf>,
    /// Ed25519 public keys of bearer tokens, PEM. Default: none; without `client_ca` a pair drawn in `DIR/keys`.
    pub token_keys: Option<PathBuf>,
    /// Who may do what. Default: nobody anything.
    pub grants: Vec<ateapi::access::Grant>,
}

/// `[node]`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Node {
    /// Name of this node. Default: `local`.
    pub name: Option<String>,
    /// Pool of its workers. Default: `default`.
    pub pool: Option<String>,
    /// Where durable snapshots are: a directory, or `s3://BUCKET[/PREFIX]`. Default: `DIR/blobs`.
    pub blobs: Option<BlobUrl>,
    /// New work is refused when less is free on the disk, bytes. Default: 536870912.
    pub min_free_bytes: Option<u64>,
    /// Node snapshots kept as cache, bytes. Default: 8589934592.
    pub snapshot_cache_bytes: Option<u64>,
    /// Images kept as a cache, with those that are needed, bytes. Default: 68719476736.
    pub image_cache_bytes: Option<u64>,
    /// An actor's log is rotated beyond this size, bytes. Default: 16777216.
    pub log_max_bytes: Option<u64>,
    /// Rotated logs kept for each container. Default: 2.
    pub log_files: Option<u32>,
    /// Boots and restores at the same time. Default: the cores, at least 2.
    pub concurrent_starts: Option<usize>,
}

/// Reads a configuration file.
///
/// # Errors
/// Exit code 2 naming file, line and key.
pub fn read(path: &Path) -> Result<File, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        let exit = if error.kind() == std::io::ErrorKind::NotFound { Exit::NotFound } else { Exit::Failed };
        Failure::new(exit, format!("cannot read {}: {error}", path.display()))
    })?;
    parse(&text).map_err(|why| {
        Failure::usage(format!("{}: {why}", path.display())).with_way_out("docs/config.md lists every key")
    })
}

/// Parses a configuration file's text.
///
/// # Errors
/// What the parser says, with line and key.
pub fn parse(text: &str) -> Result<File, String> {
    toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())
}

/// Everything decided; what `up` works with.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// State directory, absolute.
    pub dir: PathBuf,
    /// Directory of sockets, absolute.
    pub run: PathBuf,
    /// Worker slots of the gVisor class.
    pub workers: u32,
    /// Worker slots of the microVM class.
    pub microvm_workers: u32,
    /// What they need; found by `doctor`.
    pub microvm: Option<atelet::MicrovmConfig>,
    /// Address of the HTTP ingress.
    pub listen: SocketAddr,
    /// Domain of ingress.
    pub domain: Option<String>,
    /// Named runsc.
    pub runsc: Option<PathBuf>,
    /// Named ateom-gvisor.
    pub ateom: Option<PathBuf>,
    /// Named QEMU.
    pub qemu: Option<PathBuf>,
    /// Named directory of the guests' kernel.
    pub kernel: Option<PathBuf>,
    /// What runs the processors of microVMs.
    pub accelerator: atelet::Accelerator,
    /// The sandbox config with its content.
    pub sandbox: Option<(PathBuf, atelet::asset::SandboxConfig)>,
    /// Tracing filter.
    pub log: String,
    /// Leave workers on exit.
    pub leave_workers: bool,
    /// Socket of the compute driver, absolute.
    pub driver_socket: PathBuf,
    /// The rest of the file.
    pub file: File,
}

impl Settings {
    /// Options win over the file, the file over defaults. `cores` and `cwd` are the machine's.
    ///
    /// # Errors
    /// When a socket would not fit into its address.
    pub fn resolve(options: &Up, file: File, cores: usize, cwd: &Path) -> Result<Self, Failure> {
        let absolute = |path: PathBuf| if path.is_absolute() { path } else { cwd.join(path) };
        let dir = absolute(options.dir.clone().or(file.dir.clone()).unwrap_or_else(|| DEFAULT_DIR.into()));
        let run = match options.run_dir.clone().or(file.run_dir.clone()) {
            Some(run) => absolute(run),
            None if dir == Path::new(DEFAULT_DIR) => DEFAULT_RUN_DIR.into(),
            None => dir.join("run"),
        };
        let driver_socket = options.driver_socket.clone().or(file.driver.socket.clone());
        let settings = Self {
            workers: options.workers.or(file.workers).unwrap_or_else(|| (cores as u32 * 2).max(2)),
            microvm_workers: options.microvm_workers.or(file.microvm_workers).unwrap_or(0),
            microvm: None,
            qemu: options.qemu.clone().or(file.qemu.clone()).map(absolute),
            kernel: options.kernel.clone().or(file.kernel.clone()).map(absolute),
            accelerator: options.accelerator.or(file.accelerator).unwrap_or_default(),
            sandbox: None,
            listen: options.listen.or(file.listen).unwrap_or(SocketAddr::from(([127, 0, 0, 1], 8480))),
            domain: file.domain.clone(),
            runsc: options.runsc.clone().or(file.runsc.clone()).map(absolute),
            ateom: options.ateom.clone().or(file.ateom.clone()).map(absolute),
            log: options.log.clone().or(file.log.clone()).unwrap_or_else(|| "info".to_owned()),
            leave_workers: options.leave_workers || file.leave_workers.unwrap_or(false),
            driver_socket: driver_socket.map_or_else(|| run.join("driver/driver.sock"), absolute),
            file: File {
                driver: Driver {
                    peer_uid: options.driver_peer_uid.or(file.driver.peer_uid),
                    peer_gid: options.driver_peer_gid.or(file.driver.peer_gid),
                    ..file.driver.clone()
                },
                egress: Egress {
                    resolver: options.egress_resolver.or(file.egress.resolver),
                    ..file.egress.clone()
                },
                api: Api {
                    listen: options.api_listen.or(file.api.listen),
                    cert: file.api.cert.map(absolute),
                    key: file.api.key.map(absolute),
                    client_ca: file.api.client_ca.map(absolute),
                    token_keys: file.api.token_keys.map(absolute),
                    grants: file.api.grants,
                },
                ..file
            },
            dir,
            run,
        };
        settings.check()?;
        Ok(settings)
    }

    /// Reads the sandbox config, if one is named; `cwd` is where a relative path starts.
    ///
    /// # Errors
    /// When it cannot be used, or a runtime of it is also named otherwise.
    pub fn read_sandbox(&mut self, cwd: &Path) -> Result<(), Failure> {
        let Some(path) = self.file.sandbox_config.as_ref().map(|path| cwd.join(path)) else { return Ok(()) };
        let config = atelet::asset::SandboxConfig::read(&path).map_err(|error| {
            Failure::usage(error.to_string()).with_way_out("docs/config.md lists every key")
        })?;
        let twice = |what: &str| {
            Failure::usage(format!("{what} is named, and {} says which one runs", path.display()))
                .with_way_out(format!("leave {what} out, or the runtimes there"))
        };
        if self.runsc.is_some() && !config.gvisor.runtimes.is_empty() {
            return Err(twice("runsc"));
        }
        let first = config.microvm.runtimes.first();
        if self.qemu.is_some() && first.is_some_and(|first| first.vmm.is_some()) {
            return Err(twice("qemu"));
        }
        if self.kernel.is_some() && first.is_some_and(|first| first.kernel.is_some()) {
            return Err(twice("kernel"));
        }
        self.sandbox = Some((path, config));
        Ok(())
    }

    fn check(&self) -> Result<(), Failure> {
        if self.workers == 0 && self.microvm_workers == 0 {
            return Err(Failure::usage("workers and microvm_workers are 0: give at least 1"));
        }
        let api = &self.file.api;
        if let Some(listen) = api.listen
            && (api.cert.is_none() || api.key.is_none())
        {
            return Err(Failure::usage(format!("the control plane cannot listen on {listen} without TLS"))
                .with_way_out("name api.cert and api.key in the configuration file; see docs/access.md"));
        }
        // The longest that parts make below the run directory: an ateom's.
        // Those of older runtimes have longer names.
        let longest = self.file.sandbox_config.as_ref().map(|_| "o123456-10".to_owned());
        let longest = longest.unwrap_or_else(|| worker_id(self.all_workers()));
        let worker = self.run.join(format!("workers/{longest}/ingress.sock"));
        for socket in [&worker, &self.driver_socket] {
            let length = socket.as_os_str().len();
            if length > substrate_proto::seam::MAX_SOCKET_PATH {
                return Err(Failure::usage(format!(
                    "socket path {} has {length} bytes, at most {} fit",
                    socket.display(),
                    substrate_proto::seam::MAX_SOCKET_PATH
                ))
                .with_way_out("choose a shorter --dir or --run-dir"));
            }
        }
        Ok(())
    }

    /// Ids of the workers of the gVisor class, from 1.
    pub fn worker_ids(&self) -> Vec<String> {
        (1..=self.workers).map(worker_id).collect()
    }

    /// Ids of the workers of the microVM class, from 1.
    pub fn microvm_worker_ids(&self) -> Vec<String> {
        (1..=self.microvm_workers).map(|number| format!("m{number}")).collect()
    }

    /// Worker slots of all classes, without those for snapshots of older runtimes.
    pub fn all_workers(&self) -> u32 {
        self.workers + self.microvm_workers
    }

    /// Name of the runtime that new actors of the microVM class start on, if the sandbox config says it. It is known by
    /// more than the path of its binary; that of gVisor is not.
    pub fn microvm_runtime(&self) -> Option<String> {
        self.sandbox.as_ref()?.1.microvm.runtimes.first().map(|first| first.name.clone())
    }

    /// Workers for snapshots of runtimes after the first of each class: id, class, the runtime's name. The id says
    /// the runtime: one that is adopted must not be taken for another's.
    pub fn older_workers(&self) -> Vec<(String, atelet::WorkerClass, String)> {
        use atelet::WorkerClass::{Gvisor, Microvm};
        let Some((_, config)) = &self.sandbox else { return Vec::new() };
        let classes = [(Gvisor, "o", self.workers), (Microvm, "p", self.microvm_workers)];
        let of = |(class, letter, wanted): (atelet::WorkerClass, &'static str, u32)| {
            let older = if wanted > 0 { atelet::asset::workers_of(config, class) } else { Vec::new() };
            older.into_iter().flat_map(move |(runtime, slots)| {
                let content = runtime.short_digests();
                (1..=slots)
                    .map(move |number| (format!("{letter}{content}-{number}"), class, runtime.name.clone()))
            })
        };
        classes.into_iter().flat_map(of).collect()
    }
}

fn worker_id(number: u32) -> String {
    format!("w{number}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(options: &Up, text: &str) -> Result<Settings, Failure> {
        Settings::resolve(options, parse(text).unwrap(), 2, Path::new("/cwd"))
    }

    #[test]
    fn defaults_are_those_of_the_help() {
        let settings = resolve(&Up::default(), "").unwrap();
        assert_eq!(settings.dir, Path::new("/var/lib/substrate"));
        assert_eq!(settings.run, Path::new("/run/substrate"));
        assert_eq!(settings.driver_socket, Path::new("/run/substrate/driver/driver.sock"));
        assert_eq!(settings.listen.to_string(), "127.0.0.1:8480");
        assert_eq!(settings.worker_ids(), ["w1", "w2", "w3", "w4"]);
    }

    #[test]
    fn options_win_over_the_file_and_paths_become_absolute() {
        let options =
            Up { workers: Some(3), dir: Some("d".into()), driver_peer_uid: Some(7), ..Up::default() };
        let settings = resolve(
            &options,
            "workers = 9\ndir = \"/other\"\nlog = \"debug\"\n[driver]\npeer_uid = 1\npeer_gid = 2\n",
        )
        .unwrap();
        assert_eq!(settings.workers, 3);
        assert_eq!(settings.dir, Path::new("/cwd/d"));
        assert_eq!(settings.run, Path::new("/cwd/d/run"));
        assert_eq!(settings.log, "debug");
        assert_eq!((settings.file.driver.peer_uid, settings.file.driver.peer_gid), (Some(7), Some(2)));
    }

    #[test]
    fn a_socket_that_does_not_fit_is_refused_before_anything_is_made() {
        let options = Up { dir: Some(format!("/{}", "x".repeat(100)).into()), ..Up::default() };
        let failure = resolve(&options, "").unwrap_err();
        assert!(failure.message.contains("at most 107 fit"), "{}", failure.message);
        assert!(failure.way_out.unwrap().contains("--run-dir"));
    }

    #[test]
    fn a_listener_for_the_control_plane_needs_a_certificate() {
        let options = Up { api_listen: Some(([127, 0, 0, 1], 1).into()), ..Up::default() };
        assert!(resolve(&options, "").unwrap_err().way_out.unwrap().contains("api.cert"));
        let text =
            "[api]\ncert = \"c\"\nkey = \"/k\"\n[[api.grants]]\nsubject = \"cert:x\"\nrole = \"admin\"\n";
        let api = resolve(&options, text).unwrap().file.api;
        assert_eq!((api.cert, api.key), (Some("/cwd/c".into()), Some("/k".into())));
        assert!(parse("[[api.grants]]\nsubject = \"cert:x\"\nrole = \"god\"\n").is_err());
    }

    #[test]
    fn unknown_keys_are_refused_with_their_line() {
        let error = parse("workers = 2\n[egress]\nresolvre = \"1.1.1.1:53\"\n").unwrap_err();
        assert!(error.contains("line 3") && error.contains("resolvre"), "{error}");
        assert!(parse("listen = \"nowhere\"").is_err());
    }

    /// Every key of a value, dotted; lists count as their first element.
    fn keys(value: &serde_json::Value, prefix: &str, out: &mut std::collections::BTreeSet<String>) {
        match value {
            serde_json::Value::Object(map) => {
                for (key, value) in map {
                    let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                    if !value.is_object() {
                        out.insert(name.clone());
                    }
                    keys(value, &name, out);
                }
            }
            serde_json::Value::Array(items) => items.iter().take(1).for_each(|item| keys(item, prefix, out)),
            _ => {}
        }
    }

    #[test]
    fn the_document_lists_exactly_the_keys_there_are() {
        let document = include_str!("../../../docs/config.md");
        let mut known = std::collections::BTreeSet::new();
        let published =
            Published { name: "a".into(), port: 1, target: ([127, 0, 0, 1], 1).into(), atespaces: vec![] };
        let mut file = File::default();
        file.egress.published.push(published);
        file.api.grants.push(ateapi::access::Grant {
            subject: "cert:a".into(),
            role: ateapi::access::Role::Viewer,
            atespaces: vec![],
        });
        keys(&serde_json::to_value(file).unwrap(), "", &mut known);
        let listed: std::collections::BTreeSet<String> = document
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.split_once('`').map(|(key, _)| key.to_owned()))
            .collect();
        assert_eq!(listed, known);
        let example = document.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
        parse(example).unwrap();
    }
}

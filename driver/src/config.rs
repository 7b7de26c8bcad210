// SPDX-License-Identifier: Apache-2.0
//! The driver's configuration: the table `[openshell.drivers.substrate]` of a `gateway.toml`.
//!
//! The gateway reads only `socket_path` of that table and passes none of it on, so the driver reads the same file by
//! itself and ignores every other table. Keys are snake_case. An unknown key is refused with the nearest known one;
//! keys that earlier drivers had and that mean nothing any more are accepted with a warning. `docs/driver.md` lists
//! the keys with their defaults, and a test compares that list with [`KEYS`].
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::driver_config::SandboxClass;
use crate::names;

/// Every key of the table.
pub const KEYS: [&str; 22] = [
    "api_bearer_token_path",
    "api_client_cert_path",
    "api_client_key_path",
    "api_endpoint",
    "api_tls_ca_path",
    "api_tls_server_name",
    "default_image",
    "default_namespace",
    "default_sandbox_class",
    "default_worker_pool",
    "gateway_endpoint",
    "pause_image",
    "request_capabilities",
    "runsc_amd64_sha256",
    "runsc_amd64_url",
    "snapshots_location",
    "socket_path",
    "socket_peer_gid",
    "socket_peer_uid",
    "stop_timeout_secs",
    "supervisor",
    "template_ready_timeout_secs",
];
/// Every key of its table `supervisor`.
pub const SUPERVISOR_KEYS: [&str; 15] = [
    "best_effort",
    "gateway_ca_path",
    "gateway_cert_path",
    "gateway_key_path",
    "gateway_server_name",
    "image",
    "image_dir",
    "mode",
    "path",
    "sandbox_gid",
    "sandbox_uid",
    "settings_poll_secs",
    "shim_path",
    "store",
    "telemetry",
];

/// What the driver was told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Unix socket the gateway dials.
    pub socket_path: PathBuf,
    /// A uid besides root and the process's own that may connect to it.
    pub socket_peer_uid: Option<u32>,
    /// A gid whose processes may connect to it.
    pub socket_peer_gid: Option<u32>,
    /// Where the control plane listens: `unix:/path`, `http://host:port` or `https://host:port`.
    pub api_endpoint: String,
    /// PEM file of the authorities that may sign the control plane's certificate; needed with `https`.
    pub api_tls_ca_path: Option<PathBuf>,
    /// Name expected in that certificate; by default the endpoint's host.
    pub api_tls_server_name: Option<String>,
    /// PEM file of the driver's own certificate, for mutual TLS.
    pub api_client_cert_path: Option<PathBuf>,
    /// PEM file of its key.
    pub api_client_key_path: Option<PathBuf>,
    /// File with the bearer token sent with every call.
    pub api_bearer_token_path: Option<PathBuf>,
    /// Workspace assumed where a request names none.
    pub default_namespace: String,
    /// Worker pool of sandboxes that name none; empty: the control plane's default.
    pub default_worker_pool: String,
    /// Image the gateway uses when the user names none.
    pub default_image: String,
    /// Sandbox class of sandboxes that name none.
    pub default_sandbox_class: SandboxClass,
    /// Where supervisors reach the gateway; none: they stand alone.
    pub gateway_endpoint: Option<String>,
    /// Where snapshots go; the control plane's business, kept here for `substrate up`.
    pub snapshots_location: Option<String>,
    /// How long a sandbox may take from its creation until it is ready.
    pub template_ready_timeout: Duration,
    /// How long a stop or a start may take.
    pub stop_timeout: Duration,
    /// Capabilities added to every sandbox that the driver synthesizes, without `CAP_`.
    pub request_capabilities: Vec<String>,
    /// How OpenShell's supervisor is delivered.
    pub supervisor: Supervisor,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            socket_path: "/run/substrate/driver/driver.sock".into(),
            socket_peer_uid: None,
            socket_peer_gid: None,
            api_endpoint: "unix:/run/substrate/ateapi.sock".to_owned(),
            api_tls_ca_path: None,
            api_tls_server_name: None,
            api_client_cert_path: None,
            api_client_key_path: None,
            api_bearer_token_path: None,
            default_namespace: "default".to_owned(),
            default_worker_pool: String::new(),
            default_image: String::new(),
            default_sandbox_class: SandboxClass::Gvisor,
            gateway_endpoint: None,
            snapshots_location: None,
            template_ready_timeout: Duration::from_mins(5),
            stop_timeout: Duration::from_mins(5),
            request_capabilities: Vec::new(),
            supervisor: Supervisor::default(),
        }
    }
}

/// How OpenShell's supervisor gets into a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SupervisorMode {
    /// Not at all: the sandbox runs the user's command, and substrate's own egress policy holds.
    #[default]
    None,
    /// Without its network half, behind the session shim.
    Process,
    /// In full, behind the session shim: in microVMs only.
    Strict,
}

/// `[openshell.drivers.substrate.supervisor]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Supervisor {
    /// Which part of it runs.
    pub mode: SupervisorMode,
    /// Nobody named the mode: each class has its own ([`Supervisor::mode_in`]), and it is had only where a probe sandbox
    /// shows that it can sleep ([`crate::probe`]).
    pub auto: bool,
    /// Its binary on this machine.
    pub path: Option<PathBuf>,
    /// Its image, in place of `path`.
    pub image: Option<String>,
    /// Directory of that image with `openshell-sandbox` in it; empty: its root.
    pub image_dir: String,
    /// The session shim's binary.
    pub shim_path: PathBuf,
    /// Where images of these binaries and the session key are kept.
    pub store: PathBuf,
    /// Whom the user's processes run as where nothing else is asked for.
    pub sandbox_uid: u32,
    /// Their group.
    pub sandbox_gid: u32,
    /// Tell the supervisor to go on where something is not to be had.
    pub best_effort: bool,
    /// Let it send telemetry.
    pub telemetry: bool,
    /// How often it asks the gateway for settings and policy, in seconds, where that is not its own 10.
    pub settings_poll_secs: Option<u32>,
    /// PEM file of the authorities of the gateway's certificate; needed with an `https` endpoint.
    pub gateway_ca_path: Option<PathBuf>,
    /// PEM file of the certificate that supervisors show to the gateway.
    pub gateway_cert_path: Option<PathBuf>,
    /// PEM file of its key.
    pub gateway_key_path: Option<PathBuf>,
    /// Name expected in the gateway's certificate; by default the endpoint's host.
    pub gateway_server_name: Option<String>,
}

impl Supervisor {
    /// Which part of it runs in sandboxes of a class: the strongest that can sleep there, where nobody named one.
    #[must_use]
    pub fn mode_in(&self, class: SandboxClass) -> SupervisorMode {
        match (self.auto, self.mode, class) {
            (true, SupervisorMode::Process, SandboxClass::Microvm) => SupervisorMode::Strict,
            (_, mode, _) => mode,
        }
    }
}

impl Default for Supervisor {
    fn default() -> Self {
        let shim = "substrate-session-shim";
        let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(shim)));
        Self {
            mode: SupervisorMode::None,
            auto: false,
            path: None,
            image: None,
            image_dir: String::new(),
            shim_path: beside.unwrap_or_else(|| shim.into()),
            store: "/var/lib/substrate/driver".into(),
            sandbox_uid: 10_001,
            sandbox_gid: 10_001,
            best_effort: false,
            telemetry: false,
            settings_poll_secs: None,
            gateway_ca_path: None,
            gateway_cert_path: None,
            gateway_key_path: None,
            gateway_server_name: None,
        }
    }
}

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}; name the gateway's configuration with --config")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("not valid TOML: {0}")]
    Syntax(#[source] Box<toml::de::Error>),
    /// A key nobody knows.
    #[error("unknown key {key} in [{table}]{}; docs/driver.md lists the known ones",
        nearest.map(|nearest| format!(": did you mean {nearest}?")).unwrap_or_default())]
    UnknownKey {
        /// The key.
        key: String,
        /// Where it stands.
        table: String,
        /// The known key closest to it.
        nearest: Option<&'static str>,
    },
    /// A value that cannot be used.
    #[error("openshell.drivers.substrate.{key}: {problem}")]
    Value {
        /// The key.
        key: String,
        /// What is wrong and what to write instead.
        problem: String,
    },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Capabilities {
    OfTheMode(bool),
    Named(Vec<String>),
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Table {
    socket_path: Option<PathBuf>,
    socket_peer_uid: Option<u32>,
    socket_peer_gid: Option<u32>,
    api_endpoint: Option<String>,
    api_tls_ca_path: Option<PathBuf>,
    api_tls_server_name: Option<String>,
    api_client_cert_path: Option<PathBuf>,
    api_client_key_path: Option<PathBuf>,
    api_bearer_token_path: Option<PathBuf>,
    default_namespace: Option<String>,
    default_worker_pool: Option<String>,
    default_image: Option<String>,
    default_sandbox_class: Option<String>,
    gateway_endpoint: Option<String>,
    snapshots_location: Option<String>,
    template_ready_timeout_secs: Option<u64>,
    stop_timeout_secs: Option<u64>,
    request_capabilities: Option<Capabilities>,
    supervisor: Option<SupervisorTable>,
    pause_image: Option<String>,
    runsc_amd64_sha256: Option<String>,
    runsc_amd64_url: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct SupervisorTable {
    mode: Option<String>,
    path: Option<PathBuf>,
    image: Option<String>,
    image_dir: Option<String>,
    shim_path: Option<PathBuf>,
    store: Option<PathBuf>,
    sandbox_uid: Option<u32>,
    sandbox_gid: Option<u32>,
    best_effort: bool,
    telemetry: bool,
    settings_poll_secs: Option<u32>,
    gateway_ca_path: Option<PathBuf>,
    gateway_cert_path: Option<PathBuf>,
    gateway_key_path: Option<PathBuf>,
    gateway_server_name: Option<String>,
}

impl Config {
    /// Reads a `gateway.toml`; warnings about keys without effect come along.
    pub fn load(path: &Path) -> Result<(Self, Vec<String>), ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::from_toml(&text)
    }

    /// Reads the text of a `gateway.toml`.
    pub fn from_toml(text: &str) -> Result<(Self, Vec<String>), ConfigError> {
        const TABLE: &str = "openshell.drivers.substrate";
        let document: toml::Table = text.parse().map_err(|error| ConfigError::Syntax(Box::new(error)))?;
        let mut warnings = Vec::new();
        let table = ["openshell", "drivers", "substrate"]
            .iter()
            .try_fold(&document, |table, key| table.get(*key).and_then(toml::Value::as_table));
        let Some(table) = table else {
            warnings.push(format!("there is no table [{TABLE}]: every setting has its default"));
            return Ok((Self::default(), warnings));
        };
        refuse_unknown(table, &KEYS, TABLE)?;
        if let Some(supervisor) = table.get("supervisor").and_then(toml::Value::as_table) {
            refuse_unknown(supervisor, &SUPERVISOR_KEYS, &format!("{TABLE}.supervisor"))?;
        }
        let table: Table =
            serde_path_to_error::deserialize(toml::Value::Table(table.clone())).map_err(|error| {
                ConfigError::Value {
                    key: error.path().to_string(),
                    problem: error.inner().message().to_owned(),
                }
            })?;
        let config = Self::from_table(table, &mut warnings)?;
        Ok((config, warnings))
    }

    fn from_table(table: Table, warnings: &mut Vec<String>) -> Result<Self, ConfigError> {
        let wrong = |key: &str, problem: String| Err(ConfigError::Value { key: key.to_owned(), problem });
        let text = |value: Option<String>| value.map(|v| v.trim().to_owned()).filter(|v| !v.is_empty());
        let path = |value: Option<PathBuf>| value.filter(|v| !v.as_os_str().is_empty());
        let legacy = [
            ("pause_image", table.pause_image.is_some(), "the pause container is substrate's own"),
            ("runsc_amd64_sha256", table.runsc_amd64_sha256.is_some(), RUNSC_MOVED),
            ("runsc_amd64_url", table.runsc_amd64_url.is_some(), RUNSC_MOVED),
        ];
        for (key, given, why) in legacy {
            if given {
                warnings.push(format!("{key} has no effect any more ({why}): remove it"));
            }
        }
        let default = Self::default();
        let mut config = Self {
            socket_path: path(table.socket_path).unwrap_or(default.socket_path),
            socket_peer_uid: table.socket_peer_uid,
            socket_peer_gid: table.socket_peer_gid,
            api_endpoint: text(table.api_endpoint).unwrap_or(default.api_endpoint),
            api_tls_ca_path: path(table.api_tls_ca_path),
            api_tls_server_name: text(table.api_tls_server_name),
            api_client_cert_path: path(table.api_client_cert_path),
            api_client_key_path: path(table.api_client_key_path),
            api_bearer_token_path: path(table.api_bearer_token_path),
            default_namespace: text(table.default_namespace).unwrap_or(default.default_namespace),
            default_worker_pool: text(table.default_worker_pool).unwrap_or_default(),
            default_image: text(table.default_image).unwrap_or_default(),
            gateway_endpoint: text(table.gateway_endpoint),
            snapshots_location: text(table.snapshots_location),
            ..default
        };
        if let Some(name) = text(table.default_sandbox_class) {
            let Some(class) = SandboxClass::parse(&name) else {
                return wrong(
                    "default_sandbox_class",
                    format!("{name:?} is no sandbox class: write \"gvisor\" or \"microvm\""),
                );
            };
            config.default_sandbox_class = class;
        }
        for (key, given, target) in [
            (
                "template_ready_timeout_secs",
                table.template_ready_timeout_secs,
                &mut config.template_ready_timeout,
            ),
            ("stop_timeout_secs", table.stop_timeout_secs, &mut config.stop_timeout),
        ] {
            match given {
                None => {}
                Some(seconds @ 1..=86_400) => *target = Duration::from_secs(seconds),
                Some(other) => {
                    return wrong(key, format!("{other} is not between 1 and 86400 seconds"));
                }
            }
        }
        config.supervisor = Self::supervisor(
            table.supervisor.unwrap_or_default(),
            config.gateway_endpoint.is_some(),
            warnings,
        )?;
        config.request_capabilities = match table.request_capabilities {
            None | Some(Capabilities::OfTheMode(false)) => Vec::new(),
            Some(Capabilities::OfTheMode(true)) => config.supervisor.mode.capabilities(),
            Some(Capabilities::Named(names)) => names,
        };
        for name in &config.request_capabilities {
            if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_') {
                return wrong(
                    "request_capabilities",
                    format!("{name:?} is no capability: write names like \"NET_ADMIN\", without CAP_"),
                );
            }
        }
        config.check()?;
        Ok(config)
    }

    fn supervisor(
        table: SupervisorTable,
        has_gateway: bool,
        warnings: &mut Vec<String>,
    ) -> Result<Supervisor, ConfigError> {
        let wrong = |problem: String| Err(ConfigError::Value { key: "supervisor.mode".to_owned(), problem });
        let text = |value: Option<String>| value.map(|v| v.trim().to_owned()).filter(|v| !v.is_empty());
        let path = |value: Option<PathBuf>| value.filter(|v| !v.as_os_str().is_empty());
        let default = Supervisor::default();
        let mut supervisor = Supervisor {
            mode: SupervisorMode::None,
            auto: matches!(table.mode.as_deref().map(str::trim), None | Some("" | "auto")),
            path: path(table.path),
            image: text(table.image),
            image_dir: text(table.image_dir).unwrap_or_default(),
            shim_path: path(table.shim_path).unwrap_or(default.shim_path),
            store: path(table.store).unwrap_or(default.store),
            sandbox_uid: table.sandbox_uid.unwrap_or(default.sandbox_uid),
            sandbox_gid: table.sandbox_gid.unwrap_or(default.sandbox_gid),
            best_effort: table.best_effort,
            telemetry: table.telemetry,
            // 0 would be no pause at all.
            settings_poll_secs: table.settings_poll_secs.filter(|secs| *secs > 0),
            gateway_ca_path: path(table.gateway_ca_path),
            gateway_cert_path: path(table.gateway_cert_path),
            gateway_key_path: path(table.gateway_key_path),
            gateway_server_name: text(table.gateway_server_name),
        };
        let has_supervisor = supervisor.path.is_some() || supervisor.image.is_some();
        supervisor.mode = match text(table.mode).as_deref() {
            Some("none") => SupervisorMode::None,
            Some("process") => SupervisorMode::Process,
            Some("strict") => SupervisorMode::Strict,
            None | Some("auto") if has_gateway && has_supervisor => SupervisorMode::Process,
            None | Some("auto") => {
                if has_gateway {
                    warnings.push(
                        "gateway_endpoint is set but no supervisor: sandboxes run without one; name it in \
                         supervisor.path or supervisor.image"
                            .to_owned(),
                    );
                }
                SupervisorMode::None
            }
            Some("sidecar") => {
                return wrong(
                    "\"sidecar\" is not available: on gVisor, where nftables does not work inside, a direct connection \
                     goes around its proxy (docs/decisions/2026-11-supervisor-modes.md); write \"process\" or \"auto\""
                        .to_owned(),
                );
            }
            Some(mode) => {
                return wrong(format!(
                    "{mode:?} is no mode: write one of auto, strict, sidecar, process, none"
                ));
            }
        };
        Ok(supervisor)
    }

    fn check_supervisor(&self) -> Result<(), ConfigError> {
        let supervisor = &self.supervisor;
        let wrong = |key: &str, problem: &str| {
            Err(ConfigError::Value { key: format!("supervisor.{key}"), problem: problem.to_owned() })
        };
        if supervisor.gateway_cert_path.is_some() != supervisor.gateway_key_path.is_some() {
            return wrong(
                "gateway_cert_path",
                "a certificate needs both gateway_cert_path and gateway_key_path",
            );
        }
        if !supervisor.mode.has_session() {
            return Ok(());
        }
        let Some(gateway) = &self.gateway_endpoint else {
            return wrong(
                "mode",
                "a supervisor needs gateway_endpoint: http://host:port or https://host:port",
            );
        };
        if !gateway.starts_with("http://") && !gateway.starts_with("https://") {
            return Err(ConfigError::Value {
                key: "gateway_endpoint".to_owned(),
                problem: format!("{gateway:?} is no endpoint: write http://host:port or https://host:port"),
            });
        }
        if gateway.starts_with("https://") && supervisor.gateway_ca_path.is_none() {
            return wrong(
                "gateway_ca_path",
                "is needed with an https gateway_endpoint: name the PEM file of its authority",
            );
        }
        match (&supervisor.path, &supervisor.image) {
            (None, None) => wrong("path", "is needed, or supervisor.image: name the supervisor"),
            (Some(_), Some(_)) => wrong("image", "and supervisor.path are both given: name one of them"),
            (None, Some(image)) if crate::image::digest(image).is_none() => wrong(
                "image",
                "has no digest: write registry/repo@sha256:…, so that it cannot change under sandboxes",
            ),
            _ => Ok(()),
        }
    }

    /// Checks what one key means for another; also for configurations that were not read from a file.
    pub fn check(&self) -> Result<(), ConfigError> {
        let wrong = |key: &str, problem: String| Err(ConfigError::Value { key: key.to_owned(), problem });
        if !self.socket_path.is_absolute() {
            return wrong("socket_path", format!("{} is not an absolute path", self.socket_path.display()));
        }
        let scheme = self.api_endpoint.split(':').next().unwrap_or_default();
        match scheme {
            "unix" => {
                let path = self.api_endpoint["unix:".len()..].trim_start_matches("//");
                if !Path::new(path).is_absolute() {
                    return wrong("api_endpoint", format!("{:?} names no absolute path", self.api_endpoint));
                }
            }
            "https" if self.api_tls_ca_path.is_none() => {
                return wrong(
                    "api_tls_ca_path",
                    format!("needed with {}: name the PEM file of its authority", self.api_endpoint),
                );
            }
            "http" | "https" => {}
            _ => {
                return wrong(
                    "api_endpoint",
                    format!(
                        "{:?} is no endpoint: write unix:/path, http://host:port or https://host:port",
                        self.api_endpoint
                    ),
                );
            }
        }
        if self.api_client_cert_path.is_some() != self.api_client_key_path.is_some() {
            return wrong(
                "api_client_cert_path",
                "a client certificate needs both api_client_cert_path and api_client_key_path".to_owned(),
            );
        }
        if !names::is_dns_label(&self.default_namespace) {
            return wrong(
                "default_namespace",
                format!("{:?} is not a DNS-1123 label of at most 63 characters", self.default_namespace),
            );
        }
        self.check_supervisor()
    }
}

const RUNSC_MOVED: &str = "runtime binaries are pinned in the sandbox config";

fn refuse_unknown(table: &toml::Table, known: &[&'static str], name: &str) -> Result<(), ConfigError> {
    match table.keys().find(|key| !known.contains(&key.as_str())) {
        None => Ok(()),
        Some(key) => Err(ConfigError::UnknownKey {
            key: key.clone(),
            table: name.to_owned(),
            nearest: names::nearest(key, known.iter().copied()),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: &str = r#"
        [openshell.gateway]
        compute_drivers = ["substrate"]
        anything = { goes = "here" }
        [openshell.drivers.docker]
        whatever = 1
        [openshell.drivers.substrate]
        socket_path = "/run/substrate/driver.sock"
        socket_peer_uid = 1000
        socket_peer_gid = 1000
        api_endpoint = "https://ateapi.example:8443"
        api_tls_ca_path = "/etc/substrate/ca.pem"
        api_tls_server_name = "ateapi"
        api_bearer_token_path = "/var/run/token"
        api_client_cert_path = "/etc/substrate/client.pem"
        api_client_key_path = "/etc/substrate/client.key"
        default_namespace = "default"
        default_worker_pool = "pool-a"
        default_image = "registry.example/agent:1"
        default_sandbox_class = "gvisor"
        pause_image = "pause:3.10"
        snapshots_location = "s3://bucket/prefix"
        runsc_amd64_sha256 = "00"
        runsc_amd64_url = "https://example/runsc"
        gateway_endpoint = ""
        template_ready_timeout_secs = 120
        stop_timeout_secs = 60
        request_capabilities = ["NET_ADMIN"]
        [openshell.drivers.substrate.supervisor]
        mode = "none"
    "#;

    #[test]
    fn every_key_is_read_and_legacy_ones_warn() {
        let (config, warnings) = Config::from_toml(FULL).unwrap();
        assert_eq!(config.socket_path, Path::new("/run/substrate/driver.sock"));
        assert_eq!((config.socket_peer_uid, config.socket_peer_gid), (Some(1000), Some(1000)));
        assert_eq!(config.api_endpoint, "https://ateapi.example:8443");
        assert_eq!(config.default_worker_pool, "pool-a");
        assert_eq!(config.template_ready_timeout, Duration::from_mins(2));
        assert_eq!(config.stop_timeout, Duration::from_mins(1));
        assert_eq!(config.request_capabilities, ["NET_ADMIN"]);
        assert_eq!(config.gateway_endpoint, None);
        assert_eq!(config.snapshots_location.as_deref(), Some("s3://bucket/prefix"));
        for key in ["pause_image", "runsc_amd64_sha256", "runsc_amd64_url"] {
            assert_eq!(warnings.iter().filter(|warning| warning.starts_with(key)).count(), 1, "{key}");
        }
        assert_eq!(warnings.len(), 3);
        for key in KEYS {
            assert!(FULL.contains(key), "the test lacks {key}");
        }
    }

    #[test]
    fn auto_takes_a_supervisor_where_there_is_one() {
        let read =
            |lines: &str| Config::from_toml(&format!("[openshell.drivers.substrate]\n{lines}")).unwrap();
        let (config, warnings) = read("gateway_endpoint = \"http://g:1\"\nsupervisor = { path = \"/s\" }");
        let modes = |config: &Config| {
            [SandboxClass::Gvisor, SandboxClass::Microvm].map(|class| config.supervisor.mode_in(class))
        };
        assert_eq!(modes(&config), [SupervisorMode::Process, SupervisorMode::Strict]);
        assert_eq!(warnings.len(), 0);
        for (name, mode) in [("process", SupervisorMode::Process), ("strict", SupervisorMode::Strict)] {
            let named = format!(
                "gateway_endpoint = \"http://g:1\"\nsupervisor = {{ mode = {name:?}, path = \"/s\" }}"
            );
            assert_eq!(modes(&read(&named).0), [mode; 2], "what is named is taken");
        }
        let (config, warnings) = read("gateway_endpoint = \"http://g:1\"");
        assert_eq!((config.supervisor.mode, warnings.len()), (SupervisorMode::None, 1));
        let (config, warnings) = read("supervisor = { mode = \"auto\", path = \"/s\" }");
        assert_eq!((config.supervisor.mode, warnings.len()), (SupervisorMode::None, 0));
    }

    #[test]
    fn no_table_means_defaults_and_a_warning() {
        let (config, warnings) = Config::from_toml("[openshell.gateway]\nport = 1\n").unwrap();
        assert_eq!(config, Config::default());
        assert_eq!(warnings.len(), 1);
    }

    fn error(lines: &str) -> String {
        Config::from_toml(&format!("[openshell.drivers.substrate]\n{lines}")).unwrap_err().to_string()
    }

    #[test]
    fn unknown_keys_are_refused_with_the_nearest_one() {
        let message = error("socket_pth = \"/x\"");
        assert!(message.contains("unknown key socket_pth") && message.contains("did you mean socket_path?"));
        assert!(error("apiEndpoint = \"x\"").contains("did you mean api_endpoint?"));
        assert!(!error("colour = 1").contains("did you mean"));
        assert!(error("[openshell.drivers.substrate.supervisor]\nmoed = 1").contains("did you mean mode?"));
    }

    #[test]
    fn bad_values_name_the_key_and_the_way_out() {
        for (lines, key, way_out) in [
            ("socket_path = \"driver.sock\"", "socket_path", "absolute"),
            ("socket_path = 3", "socket_path", "string"),
            ("api_endpoint = \"ftp://x\"", "api_endpoint", "unix:/path"),
            ("api_endpoint = \"unix:relative\"", "api_endpoint", "absolute"),
            ("api_endpoint = \"https://x:1\"", "api_tls_ca_path", "PEM"),
            ("api_client_cert_path = \"/c\"", "api_client_cert_path", "api_client_key_path"),
            ("default_namespace = \"Not Ok\"", "default_namespace", "DNS-1123"),
            ("default_sandbox_class = \"docker\"", "default_sandbox_class", "microvm"),
            ("template_ready_timeout_secs = 0", "template_ready_timeout_secs", "between"),
            ("request_capabilities = [\"cap_net\"]", "request_capabilities", "CAP_"),
            ("supervisor = { mode = \"strict\" }", "supervisor.mode", "gateway_endpoint"),
            ("supervisor = { mode = \"sidecar\" }", "supervisor.mode", "process"),
            ("supervisor = { mode = \"process\" }", "supervisor.mode", "gateway_endpoint"),
            (
                "gateway_endpoint = \"http://g:1\"\nsupervisor = { mode = \"process\" }",
                "supervisor.path",
                "name",
            ),
            (
                "gateway_endpoint = \"http://g:1\"\nsupervisor = { image = \"r.example/s:1\" }",
                "supervisor.image",
                "@sha256",
            ),
            (
                "gateway_endpoint = \"https://g:1\"\nsupervisor = { path = \"/s\" }",
                "supervisor.gateway_ca_path",
                "PEM",
            ),
            ("supervisor = { mode = \"x\" }", "supervisor.mode", "auto"),
        ] {
            let message = error(lines);
            assert!(message.contains(&format!("substrate.{key}:")), "{message}");
            assert!(message.contains(way_out), "{message}");
        }
        assert!(matches!(Config::from_toml("x ="), Err(ConfigError::Syntax(_))));
    }

    #[test]
    fn the_documentation_lists_every_key() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/driver.md");
        let text = std::fs::read_to_string(path).unwrap();
        for key in SUPERVISOR_KEYS {
            assert!(
                text.contains(&format!("| `supervisor.{key}`")),
                "docs/driver.md has no row for supervisor.{key}"
            );
        }
        for key in KEYS {
            assert!(
                text.contains(&format!("| `{key}`")) || text.contains(&format!("| `{key}.")),
                "docs/driver.md has no row for {key}"
            );
        }
        let rows =
            text.lines().filter(|line| line.starts_with("| `")).filter_map(|line| line.split('`').nth(1));
        for row in rows.filter(|row| row.contains('_') && !row.starts_with("openshell")) {
            let key = row.split('.').next().unwrap_or(row);
            assert!(KEYS.contains(&key), "docs/driver.md lists {row}, which does not exist");
        }
    }
}

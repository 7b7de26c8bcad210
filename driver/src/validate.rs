// SPDX-License-Identifier: Apache-2.0
//! Reads a sandbox request into what is wanted, or names everything that is wrong with it.
//!
//! Pure: what only the control plane can judge (does the image exist, is the pool known) is asked in
//! [`crate::service`]. Nothing that the caller wrote is dropped in silence: what has no meaning here is refused with
//! its path. `ValidateSandboxCreate` and `CreateSandbox` both go through [`read`], so they cannot disagree.
use std::collections::BTreeMap;
use std::fmt;

use prost::Message as _;
use prost_types::value::Kind;
use substrate_proto::compute::{DriverSandbox, DriverSandboxTemplate};

use crate::config::{Config, SupervisorMode};
use crate::driver_config::{DriverConfig, SandboxClass};
use crate::failure::Violation;
use crate::supervisor::Advisory;
use crate::{image, names, quantity};

/// What the gateway puts in place of an empty command (its `CreateSandbox` handler).
pub const GATEWAY_DEFAULT_COMMAND: [&str; 2] = ["/bin/bash", "-l"];
const MAX_NAME: usize = 253;
/// Most labels or annotations of a caller; the driver adds its own.
const MAX_LABELS: usize = 48;
const MAX_LABEL: usize = 256;
const MAX_ANNOTATION: usize = 16 << 10;

/// A string that no message and no log shows.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Hides a string.
    pub fn new(secret: String) -> Self {
        Self(secret)
    }

    /// The string itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "none" } else { "[hidden]" })
    }
}

/// A request that can be carried out as far as the driver alone can tell.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The gateway's id.
    pub id: String,
    /// The actor's uid.
    pub uid: String,
    /// The sandbox's name as given.
    pub name: String,
    /// The workspace as given.
    pub workspace: String,
    /// The workspace meant: the given one, or the configured default.
    pub tenant: String,
    /// Its atespace.
    pub atespace: String,
    /// The actor's name.
    pub actor_name: String,
    /// Image reference; empty only with a pre-made template.
    pub image: String,
    /// Command as given; empty: the image's own.
    pub command: Vec<String>,
    /// Whether it gets a terminal.
    pub tty: bool,
    /// Environment: the template's, overridden by the sandbox's.
    pub env: BTreeMap<String, String>,
    /// Labels of the caller.
    pub labels: BTreeMap<String, String>,
    /// Annotations of the caller.
    pub annotations: BTreeMap<String, String>,
    /// CPU limit in thousandths of a core.
    pub millicores: Option<u64>,
    /// Memory limit in bytes.
    pub memory: Option<u64>,
    /// Sandbox class that was asked for.
    pub class: Option<SandboxClass>,
    /// Name of the pre-made template.
    pub premade: Option<String>,
    /// The rest of what `driver_config` says.
    pub config: DriverConfig,
    /// Log level for the supervisor.
    pub log_level: String,
    /// The gateway's token for the sandbox.
    pub token: Secret,
    /// What the user should know.
    pub advisories: Vec<Advisory>,
    /// Digest of the request without its token.
    pub digest: String,
}

/// Reads a request.
///
/// # Errors
/// Everything that is wrong with it.
pub fn read(sandbox: &DriverSandbox, config: &Config) -> Result<Wanted, Vec<Violation>> {
    let mut reader = Reader { violations: Vec::new() };
    let wanted = reader.read(sandbox, config);
    if reader.violations.is_empty() { Ok(wanted) } else { Err(reader.violations) }
}

struct Reader {
    violations: Vec<Violation>,
}

impl Reader {
    fn refuse(&mut self, path: impl Into<String>, problem: impl Into<String>) {
        self.violations.push(Violation::new(path, problem));
    }

    fn read(&mut self, sandbox: &DriverSandbox, config: &Config) -> Wanted {
        let spec = sandbox.spec.clone().unwrap_or_default();
        if sandbox.spec.is_none() {
            self.refuse("spec", "is missing");
        }
        let template = spec.template.clone().unwrap_or_default();
        let id = &sandbox.id;
        if id.is_empty() || !names::is_label_value(id) {
            self.refuse("id", format!("{id:?} is not 1 to 63 letters, digits, dots, dashes or underscores"));
        }
        for (path, value, required) in
            [("name", &sandbox.name, true), ("workspace", &sandbox.workspace, false)]
        {
            if value.is_empty() && required {
                self.refuse(path, "is empty");
            } else if value.len() > MAX_NAME || value.chars().any(char::is_control) {
                self.refuse(path, format!("is longer than {MAX_NAME} bytes or holds control characters"));
            }
        }
        if spec.resource_requirements.as_ref().is_some_and(|requirements| requirements.gpu.is_some()) {
            self.refuse(
                "spec.resource_requirements.gpu",
                "this driver has no GPUs: leave the GPU out or choose a driver that has them",
            );
        }
        if !template.agent_socket_path.is_empty() {
            self.refuse(
                "spec.template.agent_socket_path",
                "is not supported: let the workload listen on a TCP port and name it in driver_config ports",
            );
        }
        for (index, argument) in spec.command.iter().enumerate() {
            if argument.contains('\0') {
                self.refuse(format!("spec.command[{index}]"), "holds a NUL character");
            }
        }
        if spec.command.first().is_some_and(String::is_empty) {
            self.refuse(
                "spec.command[0]",
                "is empty: name a program, or leave the command out for the image's own",
            );
        }
        let mut env = template.environment.clone();
        env.extend(spec.environment.clone());
        for (name, value) in &env {
            if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
                self.refuse(
                    "spec.environment",
                    format!("{name:?} is no variable: a name is not empty and holds no '=', neither part holds NUL"),
                );
            }
        }
        let platform = self.platform_config(&template);
        let driver_config = match DriverConfig::from_struct(template.driver_config.as_ref()) {
            Ok(read) => read,
            Err(error) => {
                self.refuse(format!("spec.template.{}", error.path), error.problem);
                DriverConfig::default()
            }
        };
        self.driver_config(&driver_config);
        let class = self.class(platform.class, driver_config.sandbox_class);
        let effective = class.unwrap_or(config.default_sandbox_class);
        if effective == SandboxClass::Gvisor && config.supervisor.mode_in(effective) == SupervisorMode::Strict
        {
            self.refuse(
                "spec.template.driver_config.substrate.sandboxClass",
                "is gvisor, where supervisor.mode = \"strict\" cannot be had: its network namespace is not restored, \
                 so the sandbox could never sleep (docs/decisions/2026-11-supervisor-modes.md); use microvm, or a \
                 driver with supervisor.mode = \"auto\"",
            );
        }
        let premade = self.premade(platform.template, driver_config.template.as_deref());
        let mut advisories = Vec::new();
        let (millicores, memory) = self.resources(&template, &driver_config, &mut advisories);
        let image = if template.image.is_empty() { &config.default_image } else { &template.image };
        if image.is_empty() {
            if premade.is_none() {
                self.refuse(
                    "spec.template.image",
                    "is empty and the driver has no default_image: name an image",
                );
            }
        } else if let Err(problem) = image::check(image) {
            self.refuse("spec.template.image", problem);
        }
        self.labels("spec.template.labels", &template.labels, MAX_LABEL);
        self.labels("spec.template.platform_config.annotations", &platform.annotations, MAX_ANNOTATION);
        let tenant =
            if sandbox.workspace.is_empty() { &config.default_namespace } else { &sandbox.workspace };
        Wanted {
            id: id.clone(),
            uid: names::uid(id),
            name: sandbox.name.clone(),
            workspace: sandbox.workspace.clone(),
            tenant: tenant.clone(),
            atespace: names::atespace(tenant),
            actor_name: names::actor(&sandbox.name),
            image: image.clone(),
            command: spec.command.clone(),
            tty: spec.tty,
            env,
            labels: template.labels.clone(),
            annotations: platform.annotations,
            millicores,
            memory,
            class,
            premade,
            config: driver_config,
            log_level: spec.log_level.clone(),
            token: Secret::new(spec.sandbox_token),
            advisories,
            digest: digest(sandbox),
        }
    }

    fn labels(&mut self, path: &str, labels: &BTreeMap<String, String>, longest: usize) {
        if labels.len() > MAX_LABELS {
            self.refuse(path, format!("holds {} entries, more than {MAX_LABELS}", labels.len()));
        }
        for (key, value) in labels {
            if key.starts_with(names::RESERVED_PREFIX) {
                self.refuse(path, format!("{key:?} is reserved for the driver: use another prefix"));
            } else if !names::is_label_key(key) {
                self.refuse(
                    path,
                    format!("{key:?} is no key: a DNS name and '/' (optional), then 1 to 63 letters, digits, '-', '_', '.'"),
                );
            }
            if value.len() > longest || value.contains('\0') {
                self.refuse(
                    path,
                    format!("{key:?} has a value longer than {longest} bytes or with NUL in it"),
                );
            }
        }
    }

    fn platform_config(&mut self, template: &DriverSandboxTemplate) -> Platform {
        const ROOT: &str = "spec.template.platform_config";
        const KNOWN: [&str; 3] = ["annotations", "runtime_class_name", names::PREMADE_TEMPLATE];
        let mut platform = Platform::default();
        let Some(fields) = template.platform_config.as_ref().map(|config| &config.fields) else {
            return platform;
        };
        for (key, value) in fields {
            let path = format!("{ROOT}.{key}");
            match (key.as_str(), &value.kind) {
                (names::PREMADE_TEMPLATE, Some(Kind::StringValue(name))) => {
                    platform.template = Some(name.clone());
                }
                ("runtime_class_name", Some(Kind::StringValue(name))) => {
                    match SandboxClass::parse(name) {
                        Some(class) => platform.class = Some(class),
                        None => self.refuse(
                            path,
                            format!("{name:?} is no sandbox class: write \"gvisor\" or \"microvm\", or leave it out"),
                        ),
                    }
                }
                ("annotations", Some(Kind::StructValue(inner))) => {
                    self.annotations(&path, inner, &mut platform);
                }
                (known, _) if KNOWN.contains(&known) => {
                    self.refuse(path, "has the wrong type");
                }
                ("host_users", _) => self.refuse(
                    path,
                    "user namespaces are no setting here (each sandbox has a kernel of its own): leave user_namespaces out",
                ),
                ("resources_raw", _) => self.refuse(
                    path,
                    "only limits and requests of cpu and memory, written as strings, are supported: leave the others out",
                ),
                _ => {
                    let nearest = names::nearest(key, KNOWN)
                        .map(|known| format!(": did you mean {known}?"))
                        .unwrap_or_default();
                    self.refuse(path, format!("is not supported{nearest}"));
                }
            }
        }
        platform
    }

    fn annotations(&mut self, path: &str, fields: &prost_types::Struct, platform: &mut Platform) {
        for (key, value) in &fields.fields {
            let Some(Kind::StringValue(text)) = &value.kind else {
                self.refuse(format!("{path}.{key}"), "is not a string");
                continue;
            };
            if key == names::PREMADE_TEMPLATE {
                if platform.template.as_ref().is_some_and(|other| other != text) {
                    self.refuse(format!("{path}.{key}"), "names another template than platform_config does");
                }
                platform.template = Some(text.clone());
            } else if key.starts_with("substrate") {
                self.refuse(
                    format!("{path}.{key}"),
                    format!("is not known: did you mean {}?", names::PREMADE_TEMPLATE),
                );
            } else {
                platform.annotations.insert(key.clone(), text.clone());
            }
        }
    }

    fn class(&mut self, runtime: Option<SandboxClass>, config: Option<SandboxClass>) -> Option<SandboxClass> {
        if let (Some(runtime), Some(config)) = (runtime, config)
            && runtime != config
        {
            self.refuse(
                "spec.template.driver_config.substrate.sandboxClass",
                format!(
                    "is {}, but the runtime class is {}: name one of them",
                    config.as_str(),
                    runtime.as_str()
                ),
            );
        }
        config.or(runtime)
    }

    fn premade(&mut self, annotation: Option<String>, config: Option<&str>) -> Option<String> {
        if let (Some(annotation), Some(config)) = (annotation.as_deref(), config)
            && annotation != config
        {
            self.refuse(
                "spec.template.driver_config.substrate.template",
                format!(
                    "is {config:?}, but the annotation {} is {annotation:?}: name one of them",
                    names::PREMADE_TEMPLATE
                ),
            );
        }
        let name = annotation.or_else(|| config.map(str::to_owned))?;
        if !names::is_dns_label(&name) {
            self.refuse(
                names::PREMADE_TEMPLATE,
                format!("{name:?} is no template's name: it is a DNS-1123 label of at most 63 characters"),
            );
        }
        Some(name)
    }

    fn resources(
        &mut self,
        template: &DriverSandboxTemplate,
        config: &DriverConfig,
        advisories: &mut Vec<Advisory>,
    ) -> (Option<u64>, Option<u64>) {
        const ROOT: &str = "spec.template.resources";
        const CONFIG: &str = "spec.template.driver_config.substrate.resources";
        let given = template.resources.clone().unwrap_or_default();
        let own = config.resources.clone().unwrap_or_default();
        let mut limits = [None, None];
        let rows = [
            ("cpu", given.cpu_request, given.cpu_limit, own.cpu, quantity::millicores as ReadQuantity),
            ("memory", given.memory_request, given.memory_limit, own.memory, quantity::bytes as ReadQuantity),
        ];
        for (row, slot) in rows.into_iter().zip(&mut limits) {
            let (what, request, limit, own, read) = row;
            let mut amount = |path: String, text: &str| match read(text) {
                Ok(amount) => Some(amount),
                Err(error) => {
                    self.refuse(path, error.to_string());
                    None
                }
            };
            let request_path = format!("{ROOT}.{what}_request");
            let request = (!request.is_empty()).then(|| amount(request_path.clone(), &request)).flatten();
            let limit = (!limit.is_empty()).then(|| amount(format!("{ROOT}.{what}_limit"), &limit)).flatten();
            let own = own.and_then(|text| amount(format!("{CONFIG}.{what}"), &text));
            if let (Some(limit), Some(own)) = (limit, own)
                && limit != own
            {
                self.refuse(
                    format!("{CONFIG}.{what}"),
                    format!("differs from {ROOT}.{what}_limit: name one of them"),
                );
            }
            *slot = limit.or(own);
            match (request, *slot) {
                (Some(request), Some(limit)) if request > limit => {
                    self.refuse(request_path, "is larger than the limit");
                }
                (Some(_), _) => advisories.push(Advisory {
                    subsystem: "resources",
                    message: format!(
                        "the {what} request is not reserved: an actor has a worker slot while it runs, and its limit holds"
                    ),
                }),
                (None, _) => {}
            }
        }
        (limits[0], limits[1])
    }

    fn driver_config(&mut self, config: &DriverConfig) {
        const ROOT: &str = "spec.template.driver_config.substrate";
        let idle = config.idle.clone().unwrap_or_default();
        let checkpoint = config.checkpoint.clone().unwrap_or_default();
        let readiness = config.readiness.clone().unwrap_or_default();
        let durations = [
            ("idle.suspendAfter", idle.suspend_after.filter(|text| text != "never")),
            ("idle.pauseFirst", idle.pause_first),
            ("checkpoint.maxHold", checkpoint.max_hold),
            ("checkpoint.interval", checkpoint.interval),
            ("readiness.timeout", readiness.timeout),
            ("readiness.period", readiness.period),
        ];
        for (path, text) in durations {
            if let Some(Err(error)) = text.as_deref().map(quantity::milliseconds) {
                self.refuse(format!("{ROOT}.{path}"), error.to_string());
            }
        }
        if let Some(Err(error)) = checkpoint.max_heap.as_deref().map(quantity::bytes) {
            self.refuse(format!("{ROOT}.checkpoint.maxHeap"), error.to_string());
        }
        self.volumes(config, &format!("{ROOT}.volumes"));
        let probes = [readiness.http_get.is_some(), readiness.tcp_port.is_some(), readiness.exec.is_some()];
        if probes.iter().filter(|given| **given).count() > 1 {
            self.refuse(format!("{ROOT}.readiness"), "names more than one of httpGet, tcpPort and exec");
        }
        if readiness.http_get.is_some_and(|get| !get.path.starts_with('/')) {
            self.refuse(format!("{ROOT}.readiness.httpGet.path"), "does not begin with '/'");
        }
        let hooks = config.hooks.clone().unwrap_or_default();
        for (path, command) in [
            ("readiness.exec", readiness.exec),
            ("hooks.beforeSnapshot.command", hooks.before_snapshot.map(|hook| hook.command)),
            ("hooks.afterRestore.command", hooks.after_restore.map(|hook| hook.command)),
        ] {
            if command.is_some_and(|command| command.first().is_none_or(String::is_empty)) {
                self.refuse(format!("{ROOT}.{path}"), "names no program");
            }
        }
        let mut seen = Vec::new();
        for (index, port) in config.ports.iter().enumerate() {
            if *port == 0 || seen.contains(port) {
                self.refuse(format!("{ROOT}.ports[{index}]"), format!("{port} is 0 or named twice"));
            }
            seen.push(*port);
        }
        if config.working_dir.as_ref().is_some_and(|path| !path.starts_with('/')) {
            self.refuse(format!("{ROOT}.workingDir"), "is not an absolute path");
        }
        let retention = config.retention.as_ref().and_then(|retention| retention.keep_last);
        if retention == Some(0) {
            self.refuse(format!("{ROOT}.retention.keepLast"), "is 0: at least one snapshot is kept");
        }
        if config.resources.as_ref().and_then(|resources| resources.pids) == Some(0) {
            self.refuse(format!("{ROOT}.resources.pids"), "is 0: leave it out for the default of 1024");
        }
        self.egress(config, &format!("{ROOT}.egress.allow"));
    }

    fn volumes(&mut self, config: &DriverConfig, root: &str) {
        for (index, volume) in config.volumes.iter().enumerate() {
            let path = format!("{root}[{index}]");
            if !names::is_dns_label(&volume.name) {
                self.refuse(format!("{path}.name"), format!("{:?} is not a DNS-1123 label", volume.name));
            }
            let clean = volume.path.starts_with('/')
                && volume.path.len() > 1
                && volume.path[1..].split('/').all(|part| !matches!(part, "" | "." | ".."));
            if !clean {
                self.refuse(
                    format!("{path}.path"),
                    format!("{:?} is not an absolute path below / without empty or dot parts", volume.path),
                );
            }
            if let Some(Err(error)) = volume.size.as_deref().map(quantity::bytes) {
                self.refuse(format!("{path}.size"), error.to_string());
            }
            let earlier = &config.volumes[..index];
            if earlier.iter().any(|other| other.name == volume.name || other.path == volume.path) {
                self.refuse(path, "has the name or the path of an earlier volume");
            }
        }
    }

    fn egress(&mut self, config: &DriverConfig, root: &str) {
        let rules = config.egress.iter().flat_map(|egress| &egress.allow);
        for (index, rule) in rules.enumerate() {
            let path = format!("{root}[{index}]");
            match (&rule.host, &rule.cidr) {
                (Some(host), None) => {
                    let name = host.strip_prefix("*.").unwrap_or(host);
                    let labels_hold = name.len() <= MAX_NAME
                        && name.split('.').all(|label| names::is_dns_label(&label.to_ascii_lowercase()));
                    if !labels_hold || name.parse::<std::net::IpAddr>().is_ok() {
                        self.refuse(
                            format!("{path}.host"),
                            format!("{host:?} is no host name: write api.example.com or *.example.com, or use cidr for addresses"),
                        );
                    }
                }
                (None, Some(cidr)) => {
                    if !is_cidr(cidr) {
                        self.refuse(
                            format!("{path}.cidr"),
                            format!("{cidr:?} is no address range: write 192.0.2.0/24 or 2001:db8::/32"),
                        );
                    }
                    if rule.ports.is_empty() {
                        self.refuse(format!("{path}.ports"), "is empty: a cidr needs its ports named");
                    }
                }
                _ => self.refuse(path.clone(), "names not exactly one of host and cidr"),
            }
            if rule.ports.contains(&0) {
                self.refuse(format!("{path}.ports"), "holds port 0");
            }
        }
    }
}

type ReadQuantity = fn(&str) -> Result<u64, quantity::QuantityError>;

#[derive(Default)]
struct Platform {
    class: Option<SandboxClass>,
    template: Option<String>,
    annotations: BTreeMap<String, String>,
}

fn is_cidr(text: &str) -> bool {
    let Some((address, length)) = text.split_once('/') else {
        return text.parse::<std::net::IpAddr>().is_ok();
    };
    match (address.parse::<std::net::IpAddr>(), length.parse::<u8>()) {
        (Ok(std::net::IpAddr::V4(_)), Ok(length)) => length <= 32,
        (Ok(std::net::IpAddr::V6(_)), Ok(length)) => length <= 128,
        _ => false,
    }
}

/// Digest of what was asked, without the token (each create mints a new one) and the status.
fn digest(sandbox: &DriverSandbox) -> String {
    let mut plain = sandbox.clone();
    plain.status = None;
    if let Some(spec) = &mut plain.spec {
        spec.sandbox_token.clear();
    }
    names::short_hash(&plain.encode_to_vec(), 40)
}

// SPDX-License-Identifier: Apache-2.0
//! `driver_config`: what a user of `--driver-config-json '{"substrate": {…}}'` may say.
//!
//! The gateway passes the inner object on as a `google.protobuf.Struct` (whose numbers are doubles); other callers may
//! send the outer one, and both are read. Fields are camelCase, as in templates. An unknown field is refused with its
//! path and the nearest known one. `docs/driver-config.schema.json` is generated from these types, and a test keeps
//! it equal to them. Forms that only the control plane can judge (does the image exist, is there such a pool) are
//! left to it; the rest of the rules is in [`crate::validate`].
use prost_types::value::Kind;
use schemars::JsonSchema;
use serde::Deserialize;

use crate::names;

/// The object under `substrate`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schemars(title = "driver_config.substrate")]
pub struct DriverConfig {
    /// How the actor is isolated. Default: the driver's `default_sandbox_class`, which is `gvisor` unless set.
    pub sandbox_class: Option<SandboxClass>,
    /// Name of a pre-made actor template of the workspace's atespace, used instead of a synthesized one. The same as
    /// the annotation `substrate_actor_template`. Default: none.
    #[schemars(length(min = 1, max = 63))]
    pub template: Option<String>,
    /// When the actor goes to sleep by itself. Default: after 60 s.
    pub idle: Option<Idle>,
    /// Checkpoints beyond those of going to sleep. Default: none.
    pub checkpoint: Option<Checkpoint>,
    /// What the actor may reach. Default: nothing.
    pub egress: Option<Egress>,
    /// Directories outside the memory snapshot, kept when the actor is reset. Default: none.
    pub volumes: Vec<Volume>,
    /// Commands run around snapshots, 5 s at most each. Default: none.
    pub hooks: Option<Hooks>,
    /// When the workload counts as ready. Default: when its process runs.
    pub readiness: Option<Readiness>,
    /// TCP ports the workload listens on; the first is where ingress goes by default. Default: none.
    #[schemars(inner(range(min = 1, max = 65535)))]
    pub ports: Vec<u16>,
    /// Limits of the sandbox. `cpu` and `memory` may instead be given as the sandbox's resource limits.
    pub resources: Option<Resources>,
    /// Which snapshots are kept. Default: the last 2.
    pub retention: Option<Retention>,
    /// Arguments of the command, in place of the image's CMD. Default: the image's, or none when a command is given.
    pub args: Option<Vec<String>>,
    /// Working directory, an absolute path. Default: the image's.
    pub working_dir: Option<String>,
    /// User and capabilities of the workload. Default: the image's user and the runtime's default capabilities.
    pub security_context: Option<SecurityContext>,
    /// The root filesystem is read-only. Default: false.
    pub read_only_root: bool,
    /// Whether a request through the router wakes the sleeping actor. Default: true.
    pub wake_on_traffic: Option<bool>,
    /// Pool whose workers may run it. Default: the driver's `default_worker_pool`.
    pub worker_pool: Option<String>,
}

/// How an actor is isolated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SandboxClass {
    /// A gVisor sandbox.
    #[default]
    Gvisor,
    /// A virtual machine with a kernel of its own.
    Microvm,
}

impl SandboxClass {
    /// Its name in templates.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Gvisor => "gvisor",
            Self::Microvm => "microvm",
        }
    }

    /// The class of that name.
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Gvisor, Self::Microvm].into_iter().find(|class| class.as_str() == name)
    }
}

/// Sleep after idleness.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Idle {
    /// Idle time until it is suspended, e.g. `"90s"`; `"never"` turns it off. Default: `"60s"`.
    pub suspend_after: Option<String>,
    /// Pause first (bytes stay on the node) and go on to a durable snapshot after this much more idle time. Default:
    /// durable at once.
    pub pause_first: Option<String>,
}

/// Checkpoints while the actor runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Checkpoint {
    /// `sync`: a reply through the router is held until a checkpoint holds it. `async`: the checkpoint follows.
    /// Default: neither.
    pub on_reply: Option<OnReply>,
    /// How safe such a checkpoint is. Default: `durable`.
    pub durability: Option<Durability>,
    /// Longest that a reply is held. Default: `"2s"`.
    pub max_hold: Option<String>,
    /// Beyond this much memory `sync` falls back to `async`. Default: `"256MiB"`.
    pub max_heap: Option<String>,
    /// Background checkpoint interval. Default: none.
    pub interval: Option<String>,
}

/// When a reply waits for its checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnReply {
    /// It does not wait.
    Async,
    /// It waits.
    Sync,
}

/// How safe a snapshot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// On one node's disk.
    Node,
    /// In the blob store.
    Durable,
}

/// What may be reached; nothing else is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Egress {
    /// Allowed destinations.
    pub allow: Vec<EgressRule>,
    /// Allow rules of the sandbox's own policy also where they can only be enforced more broadly than they are written
    /// (programs and requests are not told apart). Default: false, such a rule is denied.
    pub allow_coarse: bool,
}

/// One allowed destination: a `host` or a `cidr`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct EgressRule {
    /// A name (`api.example.com`) or a one-label wildcard (`*.example.com`).
    pub host: Option<String>,
    /// Addresses, TCP only, e.g. `192.0.2.0/24`.
    pub cidr: Option<String>,
    /// TCP ports. Default: 443 for a host; required for a cidr.
    #[schemars(inner(range(min = 1, max = 65535)))]
    pub ports: Vec<u16>,
    /// What is checked on the connection. Default: `tls` on port 443, `http` on port 80, else `tcp`.
    pub protocol: Option<Protocol>,
}

/// What an egress rule checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// The server name of the TLS handshake.
    Tls,
    /// The Host header.
    Http,
    /// Nothing.
    Tcp,
}

/// A directory kept outside the memory snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Volume {
    /// A DNS-1123 label, unique in the sandbox.
    pub name: String,
    /// Where it is mounted, an absolute path.
    pub path: String,
    /// Quota. Default: `"1GiB"`.
    #[serde(default)]
    pub size: Option<String>,
    /// Mounted read-only. Default: false.
    #[serde(default)]
    pub read_only: bool,
}

/// Commands run inside the sandbox around snapshots.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Hooks {
    /// Before a snapshot is taken.
    pub before_snapshot: Option<Hook>,
    /// After a restore, before any traffic.
    pub after_restore: Option<Hook>,
}

/// One command.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Hook {
    /// The program and its arguments.
    #[schemars(length(min = 1))]
    pub command: Vec<String>,
}

/// One of `httpGet`, `tcpPort`, `exec`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Readiness {
    /// Ready when this request is answered with a 2xx or 3xx status.
    pub http_get: Option<HttpGet>,
    /// Ready when this port accepts.
    #[schemars(range(min = 1, max = 65535))]
    pub tcp_port: Option<u16>,
    /// Ready when this command exits with 0.
    pub exec: Option<Vec<String>>,
    /// How long the first boot may take until ready. Default: `"60s"`.
    pub timeout: Option<String>,
    /// How often it is probed. Default: `"20ms"`, growing to `"500ms"`.
    pub period: Option<String>,
}

/// A request to the workload.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HttpGet {
    /// Path and query, starting with `/`.
    pub path: String,
    /// TCP port.
    #[schemars(range(min = 1, max = 65535))]
    pub port: u16,
}

/// Limits of the sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Resources {
    /// Cores, e.g. `"500m"` or `"2"`. Default: unlimited.
    pub cpu: Option<String>,
    /// Bytes, e.g. `"512MiB"`. Default: the worker's own limit.
    pub memory: Option<String>,
    /// Processes and threads. Default: 1024.
    #[schemars(range(min = 1))]
    pub pids: Option<u32>,
}

/// Which durable snapshots are kept besides the tagged ones.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Retention {
    /// How many. Default: 2.
    #[schemars(range(min = 1))]
    pub keep_last: Option<u32>,
}

/// User and capabilities of the workload.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct SecurityContext {
    /// `uid[:gid]` or `name[:group]`, resolved inside the image. Default: the image's USER.
    pub run_as: Option<String>,
    /// Capabilities added to the default ones, without `CAP_`.
    pub add_capabilities: Vec<String>,
    /// Capabilities removed; `ALL` removes every default one.
    pub drop_capabilities: Vec<String>,
    /// Programs gain no privileges by exec. Default: false.
    pub no_new_privileges: bool,
}

/// Why a `driver_config` was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {problem}")]
pub struct DriverConfigError {
    /// Path of the offending value, from `driver_config` down.
    pub path: String,
    /// What is wrong with it and what to write instead.
    pub problem: String,
}

impl DriverConfig {
    /// Reads the object the gateway passes on; none means all defaults.
    pub fn from_struct(config: Option<&prost_types::Struct>) -> Result<Self, DriverConfigError> {
        const ROOT: &str = "driver_config.substrate";
        let Some(config) = config else {
            return Ok(Self::default());
        };
        let mut value = struct_to_json(config, ROOT)?;
        // `substrate` is no field of the object itself, so a lone one can only be the wrapper.
        if let Some(map) = value.as_object_mut()
            && map.len() == 1
            && map.get("substrate").is_some_and(serde_json::Value::is_object)
            && let Some(inner) = map.remove("substrate")
        {
            value = inner;
        }
        serde_path_to_error::deserialize(value).map_err(|error| {
            let inside = error.path().to_string();
            DriverConfigError {
                path: if inside == "." { ROOT.to_owned() } else { format!("{ROOT}.{inside}") },
                problem: explain(&error.inner().to_string()),
            }
        })
    }

    /// The published JSON schema.
    pub fn schema() -> serde_json::Value {
        schemars::schema_for!(Self).to_value()
    }
}

/// Adds the nearest known word to serde's message about an unknown one.
fn explain(message: &str) -> String {
    let mut quoted = message.split('`').skip(1).step_by(2);
    if let (true, Some(word)) = (message.starts_with("unknown "), quoted.next())
        && let Some(known) = names::nearest(word, quoted)
    {
        let head = message.split(", expected").next().unwrap_or(message);
        return format!("{head}: did you mean `{known}`?");
    }
    message.to_owned()
}

/// Turns a Struct into JSON; whole doubles become integers, as they were when the user wrote them.
fn struct_to_json(fields: &prost_types::Struct, path: &str) -> Result<serde_json::Value, DriverConfigError> {
    let mut map = serde_json::Map::new();
    for (name, value) in &fields.fields {
        map.insert(name.clone(), value_to_json(value, &format!("{path}.{name}"), 0)?);
    }
    Ok(map.into())
}

fn value_to_json(
    value: &prost_types::Value,
    path: &str,
    depth: usize,
) -> Result<serde_json::Value, DriverConfigError> {
    let wrong = |problem: &str| DriverConfigError { path: path.to_owned(), problem: problem.to_owned() };
    if depth > 16 {
        return Err(wrong("nested deeper than 16 levels"));
    }
    Ok(match &value.kind {
        None | Some(Kind::NullValue(_)) => serde_json::Value::Null,
        Some(Kind::BoolValue(value)) => (*value).into(),
        Some(Kind::StringValue(value)) => value.clone().into(),
        // Beyond 2^53 a double no longer tells whole numbers apart.
        Some(Kind::NumberValue(number))
            if number.fract() == 0.0 && number.abs() < 9_007_199_254_740_992.0 =>
        {
            (*number as i64).into()
        }
        Some(Kind::NumberValue(number)) => {
            serde_json::Number::from_f64(*number).ok_or_else(|| wrong("not a finite number"))?.into()
        }
        Some(Kind::ListValue(list)) => list
            .values
            .iter()
            .enumerate()
            .map(|(index, value)| value_to_json(value, &format!("{path}[{index}]"), depth + 1))
            .collect::<Result<Vec<_>, _>>()?
            .into(),
        Some(Kind::StructValue(inner)) => {
            let mut map = serde_json::Map::new();
            for (name, value) in &inner.fields {
                map.insert(name.clone(), value_to_json(value, &format!("{path}.{name}"), depth + 1)?);
            }
            map.into()
        }
    })
}

/// Turns JSON into a Struct, numbers into doubles, as the gateway does. For tests and for callers that stand in for it.
pub fn json_to_struct(value: &serde_json::Value) -> prost_types::Struct {
    fn convert(value: &serde_json::Value) -> prost_types::Value {
        let kind = match value {
            serde_json::Value::Null => Kind::NullValue(0),
            serde_json::Value::Bool(value) => Kind::BoolValue(*value),
            serde_json::Value::Number(value) => Kind::NumberValue(value.as_f64().unwrap_or_default()),
            serde_json::Value::String(value) => Kind::StringValue(value.clone()),
            serde_json::Value::Array(values) => {
                Kind::ListValue(prost_types::ListValue { values: values.iter().map(convert).collect() })
            }
            serde_json::Value::Object(_) => Kind::StructValue(json_to_struct(value)),
        };
        prost_types::Value { kind: Some(kind) }
    }
    let fields = value
        .as_object()
        .map(|map| map.iter().map(|(name, value)| (name.clone(), convert(value))).collect())
        .unwrap_or_default();
    prost_types::Struct { fields }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: &serde_json::Value) -> Result<DriverConfig, DriverConfigError> {
        DriverConfig::from_struct(Some(&json_to_struct(value)))
    }

    #[test]
    fn reads_the_inner_and_the_outer_object_with_doubles() {
        let inner = json!({"sandboxClass": "gvisor", "ports": [8080, 9090], "retention": {"keepLast": 3},
            "idle": {"suspendAfter": "20s"}, "egress": {"allow": [{"host": "api.example.com", "ports": [443]}]},
            "readiness": {"httpGet": {"path": "/status", "port": 8080}}, "resources": {"pids": 256}});
        let config = read(&inner).unwrap();
        assert_eq!(config.ports, [8080, 9090]);
        assert_eq!(config.retention.as_ref().unwrap().keep_last, Some(3));
        assert_eq!(read(&json!({"substrate": inner})).unwrap(), config);
        assert_eq!(DriverConfig::from_struct(None).unwrap(), DriverConfig::default());
    }

    #[test]
    fn an_unknown_field_is_refused_with_its_path_and_the_nearest_one() {
        let error = read(&json!({"egress": {"allow": [{"hots": "a.example"}]}})).unwrap_err();
        assert_eq!(error.path, "driver_config.substrate.egress.allow[0].hots");
        assert_eq!(error.problem, "unknown field `hots`: did you mean `host`?");
        let error = read(&json!({"sandbox_class": "gvisor"})).unwrap_err();
        assert_eq!(
            error.to_string(),
            "driver_config.substrate.sandbox_class: unknown field `sandbox_class`: did you mean `sandboxClass`?"
        );
        let error = read(&json!({"sandboxClass": "gvisr"})).unwrap_err();
        assert!(error.to_string().contains("did you mean `gvisor`?"), "{error}");
        let error = read(&json!({"substrate": {"nope": 1}, "ports": []})).unwrap_err();
        assert_eq!(error.path, "driver_config.substrate.substrate");
    }

    #[test]
    fn wrong_types_are_refused_with_their_path() {
        for (value, path) in [
            (json!({"ports": [70000]}), "ports[0]"),
            (json!({"ports": [80.5]}), "ports[0]"),
            (json!({"idle": {"suspendAfter": 60}}), "idle.suspendAfter"),
            (json!({"volumes": [{"name": "data"}]}), "volumes[0]"),
            (json!({"hooks": {"afterRestore": ["x"]}}), "hooks.afterRestore"),
            (json!({"readOnlyRoot": "yes"}), "readOnlyRoot"),
        ] {
            let error = read(&value).unwrap_err();
            assert!(
                error.path.starts_with(&format!("driver_config.substrate.{path}")),
                "{error} for {value}"
            );
        }
    }

    #[test]
    fn the_published_schema_is_the_one_of_these_types() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/driver-config.schema.json");
        let generated = format!("{:#}\n", DriverConfig::schema());
        if std::env::var_os("SUBSTRATE_WRITE_SCHEMA").is_some() {
            std::fs::write(path, &generated).unwrap();
        }
        let published = std::fs::read_to_string(path).unwrap();
        assert_eq!(
            published, generated,
            "write it again: SUBSTRATE_WRITE_SCHEMA=1 cargo test -p openshell-driver-substrate schema"
        );
    }
}

// SPDX-License-Identifier: Apache-2.0
//! How OpenShell's supervisor gets into a sandbox, and what stands in for what it cannot do there.
//!
//! [`deliver`] is given what the user asked for and completes the template and the actor. It runs after the template
//! was synthesized and before it is keyed, so that what it adds to the template is part of the key, while what it adds
//! to the actor (identity, the user's command) is not.
//!
//! | Mode | Runs | What is left out, and what stands in |
//! |---|---|---|
//! | `none` | the user's command | everything of the supervisor's; substrate's egress policy holds, no session |
//! | `process` | the session shim, the supervisor without its network half, the user's command | the proxy with its L7 rules and `inference.local`; substrate's egress policy (default deny) holds |
//! | `strict` | the session shim, the supervisor in full, the user's command in its network namespace | nothing; substrate's egress follows the policy's names and ports and stands around the proxy |
//!
//! `strict` needs a kernel of the sandbox's own: on gVisor the inner network namespace is not restored, so such a sandbox
//! could never sleep. `sidecar` leaves a way around its proxy there (nftables does not work inside). `auto` takes the
//! strongest that can sleep, which [`crate::probe`] tries: `strict` in a microVM, `process` on gVisor, `none` where no
//! gateway or supervisor is configured.
//!
//! Supervisor and shim come as images ([`crate::bundle`]), mounted read-only.
use std::collections::BTreeMap;
use std::io;

use serde_json::json;
use substrate_proto::compute::GatewayListenerRequirement;
use substrate_proto::types::{
    ActorSpec, Container, File, HttpGet, ImageMount, Readiness, SecurityContext, TemplateSpec,
};
use substrate_session::shim::{HUB_PORT, READY_PATH, STAND_IN, SUPERVISOR_SOCKET};
use substrate_session::wire::SessionKey;

use crate::bundle;
use crate::config::{Config, ConfigError, SupervisorMode};
use crate::driver_config::SandboxClass;
use crate::names;
use crate::validate::Wanted;

/// Where the gateway's token appears in the sandbox.
pub const TOKEN_PATH: &str = "/etc/openshell/auth/sandbox.jwt";
/// Where the session key appears.
pub const KEY_PATH: &str = "/etc/openshell/session.key";
const SUPERVISOR_DIR: &str = "/opt/openshell/bin";
const SUPERVISOR: &str = "openshell-sandbox";
const SHIM_DIR: &str = "/opt/substrate/bin";
const SHIM: &str = "substrate-session-shim";
const SSH_SOCKET: &str = "/run/openshell/ssh.sock";
/// Where programs are that a supervisor starts as root: never of the user's choice.
const ROOT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const SECRET_MODE: u32 = 0o400;

/// Something the user should know although the sandbox was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advisory {
    /// Which subsystem it is about.
    pub subsystem: &'static str,
    /// What is weaker than asked for, and what stands in for it.
    pub message: String,
}

/// What is mounted into sandboxes, made once when the driver starts.
#[derive(Debug, Clone, Default)]
pub struct Delivery {
    supervisor: Option<ImageMount>,
    shim: Option<ImageMount>,
    /// Session keys are derived from it.
    pub master_key: Vec<u8>,
}

impl Delivery {
    /// Makes images of the configured binaries, and the key.
    ///
    /// # Errors
    /// When a binary, the store or the key cannot be used.
    pub fn prepare(config: &Config) -> Result<Self, ConfigError> {
        let supervisor = &config.supervisor;
        if !supervisor.mode.has_session() {
            return Ok(Self::default());
        }
        let wrong = |key: &str, error: io::Error| ConfigError::Value {
            key: format!("supervisor.{key}"),
            problem: error.to_string(),
        };
        let images = supervisor.store.join("images");
        let (image, source) = match (&supervisor.image, &supervisor.path) {
            (Some(image), _) => (image.clone(), supervisor.image_dir.clone()),
            (None, Some(path)) => (
                bundle::image(path, SUPERVISOR, &images).map_err(|error| wrong("path", error))?,
                String::new(),
            ),
            (None, None) => {
                return Err(wrong(
                    "path",
                    io::Error::other("is needed, or supervisor.image: name the supervisor"),
                ));
            }
        };
        let shim =
            bundle::image(&supervisor.shim_path, SHIM, &images).map_err(|error| wrong("shim_path", error))?;
        let key =
            bundle::key(&supervisor.store.join("session.key")).map_err(|error| wrong("store", error))?;
        Ok(Self {
            supervisor: Some(ImageMount { image, path: SUPERVISOR_DIR.to_owned(), source }),
            shim: Some(ImageMount { image: shim, path: SHIM_DIR.to_owned(), source: String::new() }),
            master_key: key,
        })
    }
}

/// Completes the template and the actor of a sandbox by the configured mode.
pub fn deliver(
    config: &Config,
    delivery: &Delivery,
    wanted: &Wanted,
    template: &mut TemplateSpec,
    actor: &mut ActorSpec,
) -> Vec<Advisory> {
    let user_env = actor.env.clone();
    identify(wanted, &mut actor.env);
    if !wanted.token.is_empty() {
        actor.env.insert("OPENSHELL_SANDBOX_TOKEN_FILE".to_owned(), TOKEN_PATH.to_owned());
        actor.files.push(secret(TOKEN_PATH, wanted.token.reveal().as_bytes()));
    }
    if !config.supervisor.mode.has_session() {
        return Vec::new();
    }
    environment(config, wanted, &user_env, &mut actor.env);
    actor.annotations.insert(names::SESSION.to_owned(), "true".to_owned());
    if wanted.config.egress.as_ref().is_some_and(|egress| egress.allow_coarse) {
        actor.annotations.insert(names::ALLOW_COARSE.to_owned(), "true".to_owned());
    }
    actor.files.push(secret(KEY_PATH, &SessionKey::derive(&delivery.master_key, &wanted.uid)));
    let class = wanted.class.unwrap_or(config.default_sandbox_class);
    let mode = config.supervisor.mode_in(class);
    run_supervisor(mode, delivery, template);
    if wanted.premade.is_some() {
        return vec![Advisory {
            subsystem: "supervisor",
            message: "a pre-made template is used as it is: it has to run the supervisor by itself"
                .to_owned(),
        }];
    }
    let readiness = wanted.config.readiness.is_some().then(|| Advisory {
        subsystem: "readiness",
        message: "with a supervisor its session is what counts; the sandbox's own readiness is not asked"
            .to_owned(),
    });
    if mode == SupervisorMode::Strict {
        actor.annotations.insert(names::STRICT.to_owned(), "true".to_owned());
    }
    degradations(mode, class).into_iter().chain(readiness).collect()
}

/// What a mode leaves out in a class, and what stands in for it.
fn degradations(mode: SupervisorMode, class: SandboxClass) -> Vec<Advisory> {
    if mode != SupervisorMode::Process {
        return Vec::new();
    }
    let landlock = (class == SandboxClass::Gvisor).then_some((
        "landlock",
        "gVisor has no Landlock: the sandbox's own kernel and seccomp stand in for it",
    ));
    let of_the_mode = [
        (
            "network",
            "the supervisor runs without its proxy (process mode): substrate's egress policy stands in for it, which \
             denies by default and knows names, ports and SNI, but neither programs nor requests",
        ),
        ("inference", "inference.local belongs to the proxy and is not there in process mode"),
    ];
    let all = of_the_mode.into_iter().chain(landlock);
    all.map(|(subsystem, message)| Advisory { subsystem, message: message.to_owned() }).collect()
}

/// A sandbox that shows whether a supervisor could sleep: the shim, and a stand-in for the supervisor that holds a
/// connection to it; none where no mode is to be chosen. Its class is the probe's.
pub fn probe_sandbox(config: &Config, delivery: &Delivery) -> Option<(TemplateSpec, ActorSpec)> {
    let shim =
        delivery.shim.clone().filter(|_| config.supervisor.auto && config.supervisor.mode.has_session())?;
    // The shim needs nothing of an image when it is linked statically, and else what the usual image has.
    let image =
        if config.default_image.is_empty() { shim.image.clone() } else { config.default_image.clone() };
    let program = format!("{SHIM_DIR}/{SHIM}");
    let main = Container {
        name: crate::synthesize::CONTAINER.to_owned(),
        image,
        command: vec![
            program.clone(),
            "--key".to_owned(),
            KEY_PATH.to_owned(),
            "--".to_owned(),
            program,
            STAND_IN.to_owned(),
        ],
        image_mounts: vec![shim],
        security_context: Some(SecurityContext { run_as: "0:0".to_owned(), ..SecurityContext::default() }),
        readiness: Some(Readiness {
            http_get: Some(HttpGet { path: READY_PATH.to_owned(), port: u32::from(HUB_PORT) }),
            ..Readiness::default()
        }),
        ..Container::default()
    };
    let template = TemplateSpec {
        containers: vec![main],
        worker_pool: config.default_worker_pool.clone(),
        holds_identity: true,
        ..TemplateSpec::default()
    };
    let key = SessionKey::derive(&delivery.master_key, "probe");
    Some((template, ActorSpec { files: vec![secret(KEY_PATH, &key)], ..ActorSpec::default() }))
}

fn secret(path: &str, content: &[u8]) -> File {
    File { path: path.to_owned(), mode: SECRET_MODE, content: content.to_vec() }
}

/// Puts shim and supervisor in the place of the user's command.
fn run_supervisor(mode: SupervisorMode, delivery: &Delivery, template: &mut TemplateSpec) {
    template.holds_identity = true;
    let Some(main) = template.containers.first_mut() else { return };
    let mut command = vec![
        format!("{SHIM_DIR}/{SHIM}"),
        "--key".to_owned(),
        KEY_PATH.to_owned(),
        "--".to_owned(),
        format!("{SUPERVISOR_DIR}/{SUPERVISOR}"),
    ];
    if mode == SupervisorMode::Process {
        command.push("--mode=process".to_owned());
    }
    if !main.working_dir.is_empty() {
        command.push(format!("--workdir={}", main.working_dir));
    }
    main.command = command;
    main.args.clear();
    main.tty = false;
    main.image_mounts.extend(delivery.supervisor.iter().chain(&delivery.shim).cloned());
    let given = main.security_context.take().unwrap_or_default();
    let mut added = given.add_capabilities;
    added.extend(mode.capabilities());
    added.sort();
    added.dedup();
    main.security_context = Some(SecurityContext {
        run_as: "0:0".to_owned(),
        add_capabilities: added,
        drop_capabilities: given.drop_capabilities,
        // It gives its rights up by itself, which the user's processes then cannot undo.
        no_new_privileges: given.no_new_privileges,
        seccomp: given.seccomp,
    });
    // Never the user's own: the user's command starts only once the supervisor has its policy, which it gets through a
    // session with an actor that counts as ready.
    main.readiness = Some(Readiness {
        http_get: Some(HttpGet { path: READY_PATH.to_owned(), port: u32::from(HUB_PORT) }),
        ..Readiness::default()
    });
}

/// Listeners the mode needs of the gateway: none, for the hub dials it as anyone does.
pub fn listener_requirements(_config: &Config) -> Vec<GatewayListenerRequirement> {
    Vec::new()
}

/// Who the sandbox is; set last, so that no user environment can pretend otherwise.
fn identify(wanted: &Wanted, env: &mut BTreeMap<String, String>) {
    for name in
        ["OPENSHELL_SANDBOX_TOKEN", "OPENSHELL_SANDBOX_TOKEN_FILE", "OPENSHELL_GATEWAY_TLS_SERVER_NAME"]
    {
        env.remove(name);
    }
    env.insert("OPENSHELL_SANDBOX_ID".to_owned(), wanted.id.clone());
    env.insert("OPENSHELL_SANDBOX".to_owned(), wanted.name.clone());
    if !wanted.log_level.is_empty() {
        env.insert("OPENSHELL_LOG_LEVEL".to_owned(), wanted.log_level.clone());
    }
}

/// What the supervisor reads; over the user's.
fn environment(
    config: &Config,
    wanted: &Wanted,
    user: &BTreeMap<String, String>,
    env: &mut BTreeMap<String, String>,
) {
    let mut set = |name: &str, value: String| {
        env.insert(name.to_owned(), value);
    };
    let (user_name, uid, gid) = sandbox_user(config, wanted);
    set("OPENSHELL_ENDPOINT", format!("unix:{SUPERVISOR_SOCKET}"));
    set("OPENSHELL_SSH_SOCKET_PATH", SSH_SOCKET.to_owned());
    set("OPENSHELL_OCI_IMAGE_USER", user_name);
    set("OPENSHELL_SANDBOX_UID", uid);
    set("OPENSHELL_SANDBOX_GID", gid);
    set("OPENSHELL_TELEMETRY_ENABLED", config.supervisor.telemetry.to_string());
    set("PATH", ROOT_PATH.to_owned());
    set("HOME", "/root".to_owned());
    set("TERM", "xterm".to_owned());
    if !user.is_empty() {
        set("OPENSHELL_USER_ENVIRONMENT", json!(user).to_string());
    }
    if let Some(secs) = config.supervisor.settings_poll_secs {
        set("OPENSHELL_POLICY_POLL_INTERVAL_SECS", secs.to_string());
    }
    if config.supervisor.best_effort {
        set("OPENSHELL_BEST_EFFORT_FAILURES", "1".to_owned());
    }
    let command: Vec<&String> = wanted.command.iter().chain(wanted.config.args.iter().flatten()).collect();
    if !command.is_empty() {
        let spec = json!({"version": 1, "command": command, "tty": wanted.tty});
        set("OPENSHELL_MAIN_PROCESS_SPEC", spec.to_string());
    }
}

/// Whom the user's processes run as: by name, or by numbers.
fn sandbox_user(config: &Config, wanted: &Wanted) -> (String, String, String) {
    let asked = wanted.config.security_context.as_ref().and_then(|context| context.run_as.clone());
    let numbers = |uid: &str, gid: &str| (String::new(), uid.to_owned(), gid.to_owned());
    let Some(asked) = asked.filter(|asked| !asked.is_empty()) else {
        return numbers(
            &config.supervisor.sandbox_uid.to_string(),
            &config.supervisor.sandbox_gid.to_string(),
        );
    };
    let (user, group) = asked.split_once(':').unwrap_or((&asked, &asked));
    if user.parse::<u32>().is_ok() && group.parse::<u32>().is_ok() {
        numbers(user, group)
    } else {
        (asked, String::new(), String::new())
    }
}

impl SupervisorMode {
    /// Whether a supervisor holds a session with the gateway.
    pub fn has_session(self) -> bool {
        match self {
            Self::None => false,
            Self::Process | Self::Strict => true,
        }
    }

    /// Capabilities its supervisor needs, without `CAP_`.
    pub fn capabilities(self) -> Vec<String> {
        let names: &[&str] = match self {
            Self::None => &[],
            // Mounts and namespaces, veth and nftables, the kernel's log of what they reject.
            Self::Strict => {
                let mut names = Self::Process.capabilities();
                names.extend(["NET_ADMIN", "SYS_ADMIN", "SYSLOG"].map(str::to_owned));
                return names;
            }
            Self::Process => &[
                "CHOWN",
                "DAC_OVERRIDE",
                "FOWNER",
                "FSETID",
                "KILL",
                "SETGID",
                "SETPCAP",
                "SETUID",
                "SYS_PTRACE",
            ],
        };
        names.iter().map(|name| (*name).to_owned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Supervisor;

    fn config() -> Config {
        let supervisor =
            Supervisor { mode: SupervisorMode::Process, best_effort: true, ..Supervisor::default() };
        Config { supervisor, ..Config::default() }
    }

    fn wanted() -> Wanted {
        let sandbox = substrate_proto::compute::DriverSandbox {
            id: "sb-1".to_owned(),
            name: "alice".to_owned(),
            spec: Some(substrate_proto::compute::DriverSandboxSpec {
                environment: [
                    ("OPENSHELL_SANDBOX_ID", "other"),
                    ("OPENSHELL_SANDBOX_TOKEN", "stolen"),
                    ("OPENSHELL_ENDPOINT", "http://evil"),
                    ("PATH", "/evil"),
                    ("MINE", "kept"),
                ]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
                sandbox_token: "token".to_owned(),
                command: vec!["sh".to_owned(), "-c".to_owned(), "id".to_owned()],
                tty: true,
                template: Some(substrate_proto::compute::DriverSandboxTemplate {
                    image: "registry.example/agent:1".to_owned(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        crate::validate::read(&sandbox, &config()).unwrap()
    }

    #[test]
    fn strict_is_for_machines_and_auto_knows_which() {
        let sandbox = |class: &str| substrate_proto::compute::DriverSandbox {
            id: "sb-1".to_owned(),
            name: "alice".to_owned(),
            spec: Some(substrate_proto::compute::DriverSandboxSpec {
                template: Some(substrate_proto::compute::DriverSandboxTemplate {
                    image: "registry.example/agent:1".to_owned(),
                    driver_config: Some(crate::driver_config::json_to_struct(
                        &json!({"sandboxClass": class}),
                    )),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let with = |mode, auto| Config {
            supervisor: Supervisor { mode, auto, ..Supervisor::default() },
            ..Config::default()
        };
        let made = |config: &Config, class: &str| {
            let wanted = crate::validate::read(&sandbox(class), config).unwrap();
            let mut template = crate::synthesize::template(&wanted, config);
            let mut actor = crate::synthesize::actor(&wanted, "t", "");
            let said = deliver(config, &Delivery::default(), &wanted, &mut template, &mut actor);
            let main = template.containers.remove(0);
            let may = main.security_context.unwrap().add_capabilities;
            (main.command.contains(&"--mode=process".to_owned()), may, actor.annotations, said)
        };
        let is_in = |may: &[String], name: &str| may.iter().any(|given| given == name);
        for config in [with(SupervisorMode::Strict, false), with(SupervisorMode::Process, true)] {
            let (process, may, annotations, said) = made(&config, "microvm");
            assert!(!process, "something is left out");
            for name in ["NET_ADMIN", "SYS_ADMIN", "SYSLOG", "SYS_PTRACE"] {
                assert!(is_in(&may, name), "{name}: {may:?}");
            }
            assert!(annotations.contains_key(names::STRICT) && said.is_empty(), "{said:?}");
        }
        let (process, may, annotations, said) = made(&with(SupervisorMode::Process, false), "microvm");
        assert!(process && !is_in(&may, "SYS_ADMIN") && !annotations.contains_key(names::STRICT));
        let subsystems: Vec<_> = said.iter().map(|advisory| advisory.subsystem).collect();
        assert_eq!(subsystems, ["network", "inference"], "a guest's kernel has Landlock");
        let refused = crate::validate::read(&sandbox("gvisor"), &with(SupervisorMode::Strict, false));
        let refused = format!("{:?}", refused.unwrap_err());
        assert!(refused.contains("sandboxClass") && refused.contains("microvm"), "{refused}");
        let (process, may, ..) = made(&with(SupervisorMode::Process, true), "gvisor");
        assert!(process && !is_in(&may, "SYS_ADMIN"), "no more than it needs");
    }

    #[test]
    fn readiness_of_the_users_own_is_not_waited_for_and_said() {
        let mut wanted = wanted();
        wanted.config.readiness = Some(crate::driver_config::Readiness::default());
        let delivery = Delivery { master_key: vec![7; 32], ..Delivery::default() };
        let mut template = crate::synthesize::template(&wanted, &config());
        let mut actor = crate::synthesize::actor(&wanted, "t", "");
        let advisories = deliver(&config(), &delivery, &wanted, &mut template, &mut actor);
        assert_eq!(advisories.last().unwrap().subsystem, "readiness");
        let readiness = template.containers[0].readiness.clone().unwrap();
        assert_eq!(readiness.http_get.unwrap().path, READY_PATH);
    }

    fn delivered() -> (TemplateSpec, ActorSpec, Vec<Advisory>) {
        let wanted = wanted();
        let mount = |path: &str| ImageMount {
            image: format!("oci:{path}"),
            path: path.to_owned(),
            ..Default::default()
        };
        let delivery = Delivery {
            supervisor: Some(mount("/opt/openshell/bin")),
            shim: Some(mount("/opt/substrate/bin")),
            master_key: vec![7; 32],
        };
        let mut template = crate::synthesize::template(&wanted, &config());
        let mut actor = crate::synthesize::actor(&wanted, "t", "");
        let advisories = deliver(&config(), &delivery, &wanted, &mut template, &mut actor);
        (template, actor, advisories)
    }

    #[test]
    fn the_shim_starts_the_supervisor_which_starts_the_users_command() {
        let (template, actor, _) = delivered();
        let main: &Container = &template.containers[0];
        assert_eq!(main.command[0], "/opt/substrate/bin/substrate-session-shim");
        assert!(
            main.command.ends_with(&["/opt/openshell/bin/openshell-sandbox".into(), "--mode=process".into()])
        );
        assert_eq!(main.image_mounts.len(), 2);
        let context = main.security_context.as_ref().unwrap();
        assert_eq!(context.run_as, "0:0");
        assert!(context.add_capabilities.contains(&"SYS_PTRACE".to_owned()));
        assert!(!context.add_capabilities.contains(&"SYS_ADMIN".to_owned()), "no more than it needs");
        assert!(template.holds_identity && !main.tty);
        assert_eq!(main.readiness.as_ref().unwrap().http_get.as_ref().unwrap().port, u32::from(HUB_PORT));
        let spec: serde_json::Value =
            serde_json::from_str(&actor.env["OPENSHELL_MAIN_PROCESS_SPEC"]).unwrap();
        assert_eq!(spec, json!({"version": 1, "command": ["sh", "-c", "id"], "tty": true}));
    }

    #[test]
    fn no_environment_of_the_user_replaces_what_the_driver_says() {
        let (template, actor, _) = delivered();
        assert_eq!(actor.env["OPENSHELL_SANDBOX_ID"], "sb-1");
        assert_eq!(actor.env["OPENSHELL_ENDPOINT"], format!("unix:{SUPERVISOR_SOCKET}"));
        assert_eq!(actor.env["OPENSHELL_SANDBOX_TOKEN_FILE"], TOKEN_PATH);
        assert_eq!(actor.env["OPENSHELL_BEST_EFFORT_FAILURES"], "1");
        assert_eq!(actor.env["PATH"], ROOT_PATH);
        assert!(!actor.env.contains_key("OPENSHELL_SANDBOX_TOKEN"));
        assert!(actor.env["OPENSHELL_USER_ENVIRONMENT"].contains("\"MINE\":\"kept\""));
        assert!(template.containers[0].env.is_empty(), "who it is stands in no template");
        let modes: Vec<_> = actor.files.iter().map(|file| (file.path.as_str(), file.mode)).collect();
        assert_eq!(modes, [(TOKEN_PATH, 0o400), (KEY_PATH, 0o400)]);
    }

    #[test]
    fn every_degradation_is_said_with_what_stands_in() {
        let (_, _, advisories) = delivered();
        let subsystems: Vec<_> = advisories.iter().map(|advisory| advisory.subsystem).collect();
        assert_eq!(subsystems, ["network", "inference", "landlock"]);
    }

    #[test]
    fn whom_the_user_runs_as_is_asked_for_or_configured() {
        let mut wanted = wanted();
        let user = |wanted: &Wanted| sandbox_user(&config(), wanted);
        assert_eq!(user(&wanted), (String::new(), "10001".into(), "10001".into()));
        let mut ask = |run_as: &str| {
            wanted.config.security_context = Some(crate::driver_config::SecurityContext {
                run_as: Some(run_as.to_owned()),
                ..Default::default()
            });
            user(&wanted)
        };
        assert_eq!(ask("1000:100"), (String::new(), "1000".into(), "100".into()));
        assert_eq!(ask("1000"), (String::new(), "1000".into(), "1000".into()));
        assert_eq!(ask("app"), ("app".into(), String::new(), String::new()));
    }
}

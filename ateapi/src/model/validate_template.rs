// SPDX-License-Identifier: Apache-2.0
//! The rules of a template. Everything that a node could only find out while booting and that can be known from the
//! text is refused here.
use std::net::IpAddr;

use substrate_proto::{system_calls, types};

use super::validate::{Invalid, checkpoint_policy, ensure, env, idle, resource_name};
use super::{names, quantity};

/// capabilities(7), without CAP_.
const CAPABILITIES: [&str; 41] = [
    "AUDIT_CONTROL",
    "AUDIT_READ",
    "AUDIT_WRITE",
    "BLOCK_SUSPEND",
    "BPF",
    "CHECKPOINT_RESTORE",
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "IPC_LOCK",
    "IPC_OWNER",
    "KILL",
    "LEASE",
    "LINUX_IMMUTABLE",
    "MAC_ADMIN",
    "MAC_OVERRIDE",
    "MKNOD",
    "NET_ADMIN",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_RAW",
    "PERFMON",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYSLOG",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_CHROOT",
    "SYS_MODULE",
    "SYS_NICE",
    "SYS_PACCT",
    "SYS_PTRACE",
    "SYS_RAWIO",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "WAKE_ALARM",
];

/// Most rules of an egress policy.
const MAX_RULES: usize = 256;
/// Most arguments of a command, and their longest sum in bytes.
const MAX_ARGS: usize = 256;
const MAX_ARGS_BYTES: usize = 128 * 1024;

/// Most rules of a system call filter.
const MAX_SECCOMP_RULES: usize = 64;

/// Most images that are mounted into one container.
const MAX_IMAGE_MOUNTS: usize = 8;

pub(super) fn is_reserved_path(path: &str) -> bool {
    ["/proc", "/sys", "/dev", "/run/ate"]
        .iter()
        .any(|dir| path.strip_prefix(dir).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
}

/// A template's spec; `field` is where it stands in the request.
pub fn template_spec<'a>(
    field: &str,
    spec: Option<&'a types::TemplateSpec>,
) -> Result<&'a types::TemplateSpec, Invalid> {
    let spec = spec.ok_or_else(|| Invalid::new(field, "is missing"))?;
    ensure(
        matches!(spec.sandbox_class.as_str(), "" | "gvisor" | "microvm"),
        format!("{field}.sandboxClass"),
        || format!("{:?} is neither \"gvisor\" nor \"microvm\"", spec.sandbox_class),
    )?;
    ensure((1..=10).contains(&spec.containers.len()), format!("{field}.containers"), || {
        format!("has {} containers, 1 to 10 are allowed", spec.containers.len())
    })?;
    for (index, volume) in spec.volumes.iter().enumerate() {
        let at = format!("{field}.volumes[{index}]");
        resource_name(&format!("{at}.name"), &volume.name)?;
        ensure(
            spec.volumes[..index].iter().all(|other| other.name != volume.name),
            format!("{at}.name"),
            || format!("{:?} is there twice", volume.name),
        )?;
        if !volume.size.is_empty() {
            quantity::bytes(&volume.size).map_err(|error| Invalid::new(format!("{at}.size"), error))?;
        }
    }
    ensure(spec.volumes.len() <= 16, format!("{field}.volumes"), || "has more than 16 volumes".to_owned())?;
    ensure(!(spec.golden && spec.holds_identity), format!("{field}.golden"), || {
        "cannot be: holdsIdentity says that the workload keeps an identity in its memory, which a copy would claim too"
            .to_owned()
    })?;
    for index in 0..spec.containers.len() {
        container(&format!("{field}.containers[{index}]"), spec, index)?;
    }
    if let Some(resources) = &spec.resources {
        if !resources.cpu.is_empty() {
            quantity::cpu_millis(&resources.cpu)
                .map_err(|error| Invalid::new(format!("{field}.resources.cpu"), error))?;
        }
        if !resources.memory.is_empty() {
            let bytes = quantity::bytes(&resources.memory)
                .map_err(|error| Invalid::new(format!("{field}.resources.memory"), error))?;
            ensure(bytes >= 16 << 20, format!("{field}.resources.memory"), || {
                format!("{:?} is less than 16MiB, in which nothing boots", resources.memory)
            })?;
        }
    }
    if let Some(policy) = &spec.idle {
        idle(&format!("{field}.idle"), policy)?;
    }
    if let Some(policy) = &spec.checkpoint {
        checkpoint_policy(&format!("{field}.checkpoint"), policy)?;
    }
    if let Some(policy) = &spec.egress {
        egress_policy(&format!("{field}.egress"), policy)?;
    }
    if let Some(hooks) = &spec.hooks {
        hook(&format!("{field}.hooks.beforeSnapshot"), spec, hooks.before_snapshot.as_ref())?;
        hook(&format!("{field}.hooks.afterRestore"), spec, hooks.after_restore.as_ref())?;
    }
    if let Some(retention) = &spec.retention {
        ensure(retention.keep_last <= 100, format!("{field}.retention.keepLast"), || {
            format!("is {}, at most 100 is allowed; tag what has to stay", retention.keep_last)
        })?;
    }
    if !spec.worker_pool.is_empty() {
        resource_name(&format!("{field}.workerPool"), &spec.worker_pool)?;
    }
    Ok(spec)
}

fn args(field: String, args: &[String]) -> Result<(), Invalid> {
    let bytes: usize = args.iter().map(String::len).sum();
    ensure(
        args.len() <= MAX_ARGS && bytes <= MAX_ARGS_BYTES && args.iter().all(|arg| !arg.contains('\0')),
        field,
        || {
            format!(
                "has {} arguments of {bytes} bytes, at most {MAX_ARGS} of {MAX_ARGS_BYTES} bytes without NUL are allowed",
                args.len()
            )
        },
    )
}

fn container(at: &str, spec: &types::TemplateSpec, index: usize) -> Result<(), Invalid> {
    let container = &spec.containers[index];
    resource_name(&format!("{at}.name"), &container.name)?;
    ensure(
        spec.containers[..index].iter().all(|other| other.name != container.name),
        format!("{at}.name"),
        || format!("{:?} is there twice", container.name),
    )?;
    image(&format!("{at}.image"), &container.image)?;
    args(format!("{at}.command"), &container.command)?;
    args(format!("{at}.args"), &container.args)?;
    ensure(
        container.command.first().is_none_or(|program| !program.is_empty()),
        format!("{at}.command[0]"),
        || "is empty: name the program".to_owned(),
    )?;
    env(&format!("{at}.env"), &container.env)?;
    if !container.working_dir.is_empty() {
        ensure(
            container.working_dir == "/" || names::is_clean_path(&container.working_dir),
            format!("{at}.workingDir"),
            || format!("{:?} is no absolute path without \"..\"", container.working_dir),
        )?;
    }
    if let Some(context) = &container.security_context {
        security(&format!("{at}.securityContext"), context)?;
        if let Some(filter) = &context.seccomp {
            seccomp(&format!("{at}.securityContext.seccomp"), filter, spec.sandbox_class == "microvm")?;
        }
    }
    rootfs(at, container, spec.sandbox_class == "microvm")?;
    if let Some(readiness) = &container.readiness {
        self::readiness(&format!("{at}.readiness"), readiness)?;
    }
    for (i, port) in container.ports.iter().enumerate() {
        tcp_port(format!("{at}.ports[{i}]"), *port)?;
    }
    for (i, mount) in container.volume_mounts.iter().enumerate() {
        let at = format!("{at}.volumeMounts[{i}]");
        ensure(
            spec.volumes.iter().any(|volume| volume.name == mount.volume),
            format!("{at}.volume"),
            || format!("{:?} is no volume of this template", mount.volume),
        )?;
        ensure(
            names::is_clean_path(&mount.path) && !is_reserved_path(&mount.path),
            format!("{at}.path"),
            || format!("{:?} is no absolute path outside /proc, /sys, /dev and /run/ate", mount.path),
        )?;
        ensure(
            container.volume_mounts[..i].iter().all(|other| other.path != mount.path),
            format!("{at}.path"),
            || format!("{:?} is there twice", mount.path),
        )?;
    }
    ensure(container.image_mounts.len() <= MAX_IMAGE_MOUNTS, format!("{at}.imageMounts"), || {
        format!("has more than {MAX_IMAGE_MOUNTS} entries")
    })?;
    for (i, mount) in container.image_mounts.iter().enumerate() {
        let field = format!("{at}.imageMounts[{i}]");
        image(&format!("{field}.image"), &mount.image)?;
        ensure(
            names::is_clean_path(&mount.path) && !is_reserved_path(&mount.path),
            format!("{field}.path"),
            || format!("{:?} is no absolute path outside /proc, /sys, /dev and /run/ate", mount.path),
        )?;
        ensure(
            mount.source.is_empty() || names::is_clean_path(&mount.source),
            format!("{field}.source"),
            || format!("{:?} is no absolute path without \"..\"", mount.source),
        )?;
        let twice = container.image_mounts[..i].iter().any(|other| other.path == mount.path)
            || container.volume_mounts.iter().any(|other| other.path == mount.path);
        ensure(!twice, format!("{field}.path"), || format!("{:?} is there twice", mount.path))?;
    }
    Ok(())
}

fn tcp_port(field: String, port: u32) -> Result<(), Invalid> {
    ensure((1..=65_535).contains(&port), field, || format!("{port} is no TCP port: 1 to 65535"))
}

fn rootfs(at: &str, container: &types::Container, of_machine: bool) -> Result<(), Invalid> {
    let field = format!("{at}.rootfs");
    let persists = match container.rootfs.as_str() {
        "" | "ephemeral" => false,
        "persist" => true,
        other => {
            let problem = format!("{other:?} is neither \"ephemeral\" nor \"persist\"");
            return Err(Invalid::new(field, problem));
        }
    };
    ensure(!persists || of_machine, &field, || {
        "\"persist\" needs sandboxClass \"microvm\": in gVisor what is written to a root is in the sandbox's memory; \
         mount a volume where the workload writes"
            .to_owned()
    })?;
    ensure(!persists || !container.read_only_root, &field, || {
        "\"persist\" and readOnlyRoot exclude each other: nothing is written".to_owned()
    })?;
    if container.rootfs_size.is_empty() {
        return Ok(());
    }
    let field = format!("{at}.rootfsSize");
    ensure(persists, &field, || {
        "is for rootfs \"persist\"; what is written to another root is bounded by resources.memory".to_owned()
    })?;
    quantity::bytes(&container.rootfs_size).map(drop).map_err(|error| Invalid::new(field, error))
}

fn seccomp(at: &str, filter: &types::Seccomp, of_machine: bool) -> Result<(), Invalid> {
    let known = |action: &str| matches!(action, "allow" | "errno" | "kill");
    let which = "is none of \"allow\", \"errno\" and \"kill\"";
    let default = filter.default_action.as_str();
    ensure(default.is_empty() || known(default), format!("{at}.defaultAction"), || {
        format!("{default:?} {which}")
    })?;
    let rules = format!("{at}.rules");
    ensure(filter.rules.len() <= MAX_SECCOMP_RULES, &rules, || {
        format!("has more than {MAX_SECCOMP_RULES} entries")
    })?;
    let mut named = std::collections::BTreeSet::new();
    for (i, rule) in filter.rules.iter().enumerate() {
        let at = format!("{rules}[{i}]");
        ensure(known(&rule.action), format!("{at}.action"), || format!("{:?} {which}", rule.action))?;
        let field = format!("{at}.errno");
        ensure(rule.errno == 0 || rule.action == "errno", &field, || "is for action \"errno\"".to_owned())?;
        ensure(rule.errno < 4096, &field, || format!("{} is no error number", rule.errno))?;
        ensure(rule.errno <= 1 || of_machine, &field, || {
            "needs sandboxClass \"microvm\": in gVisor a refused call fails with EPERM (1)".to_owned()
        })?;
        ensure(!rule.names.is_empty(), format!("{at}.names"), || "is empty".to_owned())?;
        for name in &rule.names {
            ensure(system_calls::number(name).is_some(), format!("{at}.names"), || {
                format!("{name:?} is no system call: write it as in syscalls(2), e.g. \"mount\"")
            })?;
            ensure(named.insert(name), format!("{at}.names"), || format!("{name:?} is named twice"))?;
        }
    }
    let passes = matches!(default, "" | "allow") || filter.rules.iter().any(|rule| rule.action == "allow");
    ensure(passes, rules, || "allow nothing: name what the program needs, execve too".to_owned())
}

fn security(at: &str, context: &types::SecurityContext) -> Result<(), Invalid> {
    if !context.run_as.is_empty() {
        let mut parts = context.run_as.split(':');
        let valid = |part: Option<&str>| {
            part.is_none_or(|part| {
                !part.is_empty()
                    && part.len() <= 64
                    && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
            })
        };
        ensure(
            valid(parts.next()) && valid(parts.next()) && parts.next().is_none(),
            format!("{at}.runAs"),
            || format!("{:?} is neither \"uid[:gid]\" nor \"name[:group]\"", context.run_as),
        )?;
    }
    let lists =
        [("addCapabilities", &context.add_capabilities), ("dropCapabilities", &context.drop_capabilities)];
    for (name, list) in lists {
        for (i, capability) in list.iter().enumerate() {
            let known = CAPABILITIES.contains(&capability.as_str())
                || (capability == "ALL" && name == "dropCapabilities");
            ensure(known, format!("{at}.{name}[{i}]"), || {
                format!(
                    "{capability:?} is no capability: write it as in capabilities(7) without CAP_, e.g. \"NET_ADMIN\""
                )
            })?;
        }
    }
    Ok(())
}

fn readiness(at: &str, readiness: &types::Readiness) -> Result<(), Invalid> {
    let kinds = usize::from(readiness.http_get.is_some())
        + usize::from(readiness.tcp_port != 0)
        + usize::from(!readiness.exec.is_empty());
    ensure(kinds <= 1, at, || "has more than one of httpGet, tcpPort and exec".to_owned())?;
    if let Some(get) = &readiness.http_get {
        tcp_port(format!("{at}.httpGet.port"), get.port)?;
        ensure(
            get.path.starts_with('/')
                && get.path.len() <= 1024
                && get.path.bytes().all(|b| b.is_ascii_graphic()),
            format!("{at}.httpGet.path"),
            || format!("{:?} is no path of an HTTP request: it begins with \"/\"", get.path),
        )?;
    }
    if readiness.tcp_port != 0 {
        tcp_port(format!("{at}.tcpPort"), readiness.tcp_port)?;
    }
    args(format!("{at}.exec"), &readiness.exec)?;
    for (name, text, longest) in [("timeout", &readiness.timeout, 3_600), ("period", &readiness.period, 60)] {
        if !text.is_empty() {
            let value =
                quantity::duration(text).map_err(|error| Invalid::new(format!("{at}.{name}"), error))?;
            ensure(!value.is_zero() && value.as_secs() <= longest, format!("{at}.{name}"), || {
                format!("{text:?} is zero or more than {longest} s")
            })?;
        }
    }
    Ok(())
}

fn hook(at: &str, spec: &types::TemplateSpec, hook: Option<&types::Hook>) -> Result<(), Invalid> {
    let Some(hook) = hook else { return Ok(()) };
    ensure(
        hook.container.is_empty() || spec.containers.iter().any(|it| it.name == hook.container),
        format!("{at}.container"),
        || format!("{:?} is no container of this template", hook.container),
    )?;
    ensure(hook.command.first().is_some_and(|program| !program.is_empty()), format!("{at}.command"), || {
        "is empty: name the program".to_owned()
    })?;
    args(format!("{at}.command"), &hook.command)
}

fn is_digest(text: &str) -> bool {
    text.strip_prefix("sha256:").is_some_and(|hex| {
        hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    })
}

fn image(field: &str, reference: &str) -> Result<(), Invalid> {
    let wrong = |why: &str| {
        Err(Invalid::new(
            field,
            format!(
                "{reference:?} {why}: write \"registry/repository@sha256:…\", \"registry/repository:tag\", \
                 \"oci:/directory[:tag|@digest]\" or \"oci-archive:/file.tar[:tag]\""
            ),
        ))
    };
    if reference.is_empty() || reference.len() > 1024 || !reference.bytes().all(|b| b.is_ascii_graphic()) {
        return wrong("is no image reference");
    }
    let (local, rest) = match reference.split_once(':') {
        Some(("oci" | "oci-archive", rest)) => (true, rest),
        _ => (false, reference),
    };
    let (name, digest) = rest.split_once('@').map_or((rest, None), |(name, digest)| (name, Some(digest)));
    if digest.is_some_and(|digest| !is_digest(digest)) {
        return wrong("has a malformed digest (sha256: and 64 hexadecimal digits)");
    }
    if local {
        let path = name.split_once(':').map_or(name, |(path, _)| path);
        return if names::is_clean_path(path) {
            Ok(())
        } else {
            wrong("has no absolute path without \"..\"")
        };
    }
    let (registry, repository) = name.split_once('/').unwrap_or(("", name));
    let repository = if digest.is_none() {
        repository.rsplit_once(':').map_or(repository, |(repository, _)| repository)
    } else {
        repository
    };
    if !(registry.contains('.') || registry.contains(':') || registry == "localhost") {
        return wrong("names no registry");
    }
    let component = |part: &str| {
        !part.is_empty()
            && part
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-'))
            && part.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric)
    };
    let repository = if digest.is_some() {
        repository.rsplit_once(':').map_or(repository, |(repository, _)| repository)
    } else {
        repository
    };
    if repository.split('/').all(component) { Ok(()) } else { wrong("has a malformed repository") }
}

/// An egress policy.
pub fn egress_policy(field: &str, policy: &types::EgressPolicy) -> Result<(), Invalid> {
    ensure(policy.allow.len() <= MAX_RULES, format!("{field}.allow"), || {
        format!("has {} rules, at most {MAX_RULES} are allowed", policy.allow.len())
    })?;
    for (index, rule) in policy.allow.iter().enumerate() {
        let at = format!("{field}.allow[{index}]");
        ensure(rule.host.is_empty() != rule.cidr.is_empty(), at.clone(), || {
            "has to have exactly one of host and cidr".to_owned()
        })?;
        for (i, port) in rule.ports.iter().enumerate() {
            tcp_port(format!("{at}.ports[{i}]"), *port)?;
        }
        ensure(rule.ports.len() <= 64, format!("{at}.ports"), || "has more than 64 ports".to_owned())?;
        ensure(
            matches!(rule.protocol.as_str(), "" | "tls" | "http" | "tcp"),
            format!("{at}.protocol"),
            || format!("{:?} is neither \"tls\", \"http\" nor \"tcp\"", rule.protocol),
        )?;
        if rule.host.is_empty() {
            let net: ipnet::IpNet =
                rule.cidr.parse().or_else(|_| rule.cidr.parse::<IpAddr>().map(ipnet::IpNet::from)).map_err(
                    |_| {
                        Invalid::new(
                            format!("{at}.cidr"),
                            format!("{:?} is no address range, as in \"203.0.113.0/24\"", rule.cidr),
                        )
                    },
                )?;
            ensure(!rule.ports.is_empty(), format!("{at}.ports"), || {
                "is empty: an address range needs its ports named".to_owned()
            })?;
            ensure(net.prefix_len() > 0, format!("{at}.cidr"), || {
                format!("{:?} is every address: name what is needed", rule.cidr)
            })?;
            ensure(matches!(rule.protocol.as_str(), "" | "tcp"), format!("{at}.protocol"), || {
                format!("{:?} cannot be checked for an address range: only \"tcp\" is allowed", rule.protocol)
            })?;
        } else {
            ensure(names::is_host(&rule.host, true), format!("{at}.host"), || {
                format!("{:?} is no lower-case DNS name, exact or with one \"*.\" in front", rule.host)
            })?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> types::TemplateSpec {
        types::TemplateSpec {
            containers: vec![types::Container {
                name: "main".into(),
                image: "oci:/images/counter".into(),
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    fn refused(change: impl FnOnce(&mut types::TemplateSpec)) -> String {
        let mut spec = good();
        change(&mut spec);
        template_spec("spec", Some(&spec)).unwrap_err().field
    }

    #[test]
    fn each_rule_names_its_field() {
        template_spec("spec", Some(&good())).unwrap();
        assert_eq!(template_spec("spec", None).unwrap_err().field, "spec");
        assert_eq!(refused(|s| s.sandbox_class = "docker".into()), "spec.sandboxClass");
        assert_eq!(refused(|s| s.containers.clear()), "spec.containers");
        assert_eq!(refused(|s| s.containers = vec![s.containers[0].clone(); 2]), "spec.containers[1].name");
        assert_eq!(refused(|s| s.containers[0].working_dir = "tmp".into()), "spec.containers[0].workingDir");
        assert_eq!(refused(|s| s.containers[0].ports = vec![0]), "spec.containers[0].ports[0]");
        assert_eq!(
            refused(|s| s.containers[0].command = vec![String::new()]),
            "spec.containers[0].command[0]"
        );
        assert_eq!(refused(|s| s.worker_pool = "Big".into()), "spec.workerPool");
        assert_eq!(
            refused(|s| {
                s.resources = Some(types::Resources { memory: "1KiB".into(), ..Default::default() });
            }),
            "spec.resources.memory"
        );
        assert_eq!(
            refused(|s| {
                s.containers[0].volume_mounts =
                    vec![types::VolumeMount { volume: "data".into(), path: "/d".into(), read_only: false }];
            }),
            "spec.containers[0].volumeMounts[0].volume"
        );
        assert_eq!(
            refused(|s| {
                s.containers[0].security_context = Some(types::SecurityContext {
                    add_capabilities: vec!["CAP_KILL".into()],
                    ..Default::default()
                });
            }),
            "spec.containers[0].securityContext.addCapabilities[0]"
        );
        assert_eq!(
            refused(|s| {
                s.containers[0].readiness =
                    Some(types::Readiness { tcp_port: 1, exec: vec!["x".into()], ..Default::default() });
            }),
            "spec.containers[0].readiness"
        );
        assert_eq!(
            refused(|s| {
                s.hooks = Some(types::Hooks {
                    after_restore: Some(types::Hook { container: "no".into(), command: vec!["x".into()] }),
                    ..Default::default()
                });
            }),
            "spec.hooks.afterRestore.container"
        );
    }

    #[test]
    fn a_root_persists_in_a_microvm_only() {
        let with = |class: &str, rootfs: &str, size: &str, read_only: bool| {
            let mut spec = good();
            spec.sandbox_class = class.into();
            let main = &mut spec.containers[0];
            (main.rootfs, main.rootfs_size, main.read_only_root) = (rootfs.into(), size.into(), read_only);
            template_spec("spec", Some(&spec)).map(drop)
        };
        with("microvm", "persist", "2GiB", false).unwrap();
        with("microvm", "persist", "", false).unwrap();
        with("gvisor", "ephemeral", "", true).unwrap();
        for (class, rootfs, size, read_only, field, word) in [
            ("gvisor", "persist", "", false, "rootfs", "volume"),
            ("", "persist", "", false, "rootfs", "microvm"),
            ("microvm", "persist", "", true, "rootfs", "readOnlyRoot"),
            ("microvm", "forever", "", false, "rootfs", "forever"),
            ("microvm", "ephemeral", "1GiB", false, "rootfsSize", "persist"),
            ("microvm", "persist", "much", false, "rootfsSize", "much"),
        ] {
            let error = with(class, rootfs, size, read_only).unwrap_err();
            assert_eq!(error.field, format!("spec.containers[0].{field}"), "{error}");
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn system_call_filters() {
        let with = |class: &str, default: &str, rules: &[(&[&str], &str, u32)]| {
            let mut spec = good();
            spec.sandbox_class = class.into();
            let rule = |(names, action, errno): &(&[&str], &str, u32)| types::SeccompRule {
                names: names.iter().map(ToString::to_string).collect(),
                action: (*action).into(),
                errno: *errno,
            };
            let seccomp =
                types::Seccomp { default_action: default.into(), rules: rules.iter().map(rule).collect() };
            spec.containers[0].security_context =
                Some(types::SecurityContext { seccomp: Some(seccomp), ..Default::default() });
            template_spec("spec", Some(&spec)).map(drop)
        };
        with("gvisor", "", &[(&["mkdir", "mkdirat"], "errno", 0), (&["ptrace"], "kill", 0)]).unwrap();
        with("microvm", "errno", &[(&["read", "execve"], "allow", 0), (&["mount"], "errno", 38)]).unwrap();
        with("microvm", "allow", &[]).unwrap();
        for (class, default, rules, field) in [
            ("microvm", "log", &[][..], "defaultAction"),
            ("microvm", "kill", &[(&["read"][..], "errno", 0)][..], "rules"),
            ("microvm", "", &[(&["read"], "trap", 0)], "rules[0].action"),
            ("microvm", "", &[(&["teleport"], "errno", 0)], "rules[0].names"),
            ("microvm", "", &[(&[], "errno", 0)], "rules[0].names"),
            ("microvm", "", &[(&["read"], "errno", 0), (&["read"], "allow", 0)], "rules[1].names"),
            ("microvm", "", &[(&["read"], "allow", 5)], "rules[0].errno"),
            ("microvm", "", &[(&["read"], "errno", 4096)], "rules[0].errno"),
            ("gvisor", "", &[(&["read"], "errno", 38)], "rules[0].errno"),
        ] {
            let error = with(class, default, rules).unwrap_err();
            assert_eq!(error.field, format!("spec.containers[0].securityContext.seccomp.{field}"), "{error}");
        }
    }

    #[test]
    fn images() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for good in [
            "oci:/images/x",
            "oci:/images/x:latest",
            "oci-archive:/x.tar:v1",
            "registry.example.com/a/b:1",
            "localhost:5000/a",
            &format!("oci:/images/x@{digest}"),
            &format!("ghcr.io/a/b@{digest}"),
            &format!("ghcr.io/a/b:tag@{digest}"),
        ] {
            image("i", good).unwrap_or_else(|error| panic!("{good}: {error}"));
        }
        for bad in [
            "",
            "debian",
            "oci:relative",
            "oci:/a/../b",
            "ghcr.io/A/b:1",
            "ghcr.io/a@sha256:abc",
            "a b",
            "x/y",
        ] {
            assert!(image("i", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn egress_rules() {
        let rule = |host: &str, cidr: &str, ports: &[u32], protocol: &str| types::EgressPolicy {
            allow: vec![types::EgressRule {
                host: host.into(),
                cidr: cidr.into(),
                ports: ports.to_vec(),
                protocol: protocol.into(),
            }],
        };
        egress_policy("e", &rule("*.example.com", "", &[], "")).unwrap();
        egress_policy("e", &rule("", "203.0.113.0/24", &[5432], "tcp")).unwrap();
        for (policy, field) in [
            (rule("a.com", "10.0.0.0/8", &[1], ""), "e.allow[0]"),
            (rule("", "", &[1], ""), "e.allow[0]"),
            (rule("", "203.0.113.0/24", &[], ""), "e.allow[0].ports"),
            (rule("", "0.0.0.0/0", &[1], ""), "e.allow[0].cidr"),
            (rule("", "host", &[1], ""), "e.allow[0].cidr"),
            (rule("", "10.0.0.1", &[1], "tls"), "e.allow[0].protocol"),
            (rule("10.0.0.1", "", &[], ""), "e.allow[0].host"),
            (rule("a.com", "", &[70_000], ""), "e.allow[0].ports[0]"),
        ] {
            assert_eq!(egress_policy("e", &policy).unwrap_err().field, field);
        }
    }
}

// SPDX-License-Identifier: Apache-2.0
//! OCI bundles for runsc, made from a [`SandboxSpec`].
//!
//! runsc compares the spec of a restore with that of the checkpoint and refuses what differs (docs/runsc.md, "What a
//! restore checks"). So specs are generated in one place and deterministically, and [`enforced`] says which part of
//! one is compared: its digest travels with the snapshot, and a mismatch is refused here, before runsc sees the image.
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};
use substrate_proto::ateom::{Mount, ResolvedContainer, SandboxSpec};
use substrate_proto::types::{Seccomp, SeccompRule};

use crate::container;
use crate::error::SlotError;
use crate::network::WORKER_V4;
use crate::runtime::{RuntimeError, file_error};
use crate::seccomp;

/// Id of the root container. No id may be the prefix of another.
pub const ROOT: &str = "root";
const OCI_VERSION: &str = "1.2.0";
/// RLIMIT_NOFILE inside; compared at a restore, so a constant.
const NOFILE: u64 = 65_536;
/// Files that every container gets unless it mounts its own there.
const ETC: [&str; 3] = ["resolv.conf", "hosts", "hostname"];
/// What gethostname(2) says inside. All containers share the root's, which is fixed when it is created ahead and put
/// back at every restore: so the same for all actors. The actor's own name is in `/etc/hostname` and `/etc/hosts`.
pub const HOSTNAME: &str = "actor";

/// Id of a workload container: numbered, so that no name can make one id the prefix of another.
pub fn container_id(index: usize, name: &str) -> String {
    format!("w{index:02}-{name}")
}

/// Checks what can be checked before anything is touched.
///
/// # Errors
/// [`SlotError::Invalid`] naming container and field.
pub fn validate(spec: &SandboxSpec) -> Result<(), SlotError> {
    container::validate(spec, |container| {
        let (name, rootfs) = (&container.name, &container.rootfs);
        if name == "pause" {
            return Err("container name \"pause\" is taken by the sandbox's own".to_owned());
        }
        if !rootfs.starts_with('/') {
            return Err(format!("container {name}: rootfs {rootfs:?} is not an absolute path"));
        }
        if !Path::new(rootfs).is_dir() {
            return Err(format!("container {name}: rootfs {rootfs} is not a directory on this node"));
        }
        if !container.layer.is_empty() {
            return Err(format!("container {name}: a writable layer on a disk is for microVMs"));
        }
        if let Some(seccomp) = &container.seccomp {
            seccomp::check(seccomp).map_err(|problem| format!("container {name}: seccomp: {problem}"))?;
        }
        if container.mounts.iter().any(|mount| mount.kind == "image") {
            return Err(format!("container {name}: an image is mounted as a directory here, not as a disk"));
        }
        Ok(())
    })
}

/// Spec of the root container.
pub fn root_spec(rootfs: &Path, network_namespace: &Path) -> Value {
    json!({
        "ociVersion": OCI_VERSION,
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["/pause"],
            "env": [],
            "cwd": "/",
            "capabilities": {},
            "noNewPrivileges": true,
        },
        "root": {"path": rootfs, "readonly": true},
        "hostname": HOSTNAME,
        "mounts": default_mounts(),
        "annotations": {
            "io.kubernetes.cri.container-type": "sandbox",
            "io.kubernetes.cri.container-name": "pause",
        },
        "linux": {"namespaces": namespaces(network_namespace)},
    })
}

/// Spec of a workload container. `etc` holds the files of [`write_etc`].
pub fn workload_spec(container: &ResolvedContainer, etc: &Path, network_namespace: &Path) -> Value {
    let mut mounts = default_mounts();
    for name in ETC {
        let destination = format!("/etc/{name}");
        if !container.mounts.iter().any(|mount| mount.destination == destination) {
            mounts.push(json!({
                "destination": destination, "type": "bind", "source": etc.join(name), "options": ["rbind", "ro"],
            }));
        }
    }
    // A mount of the template's takes the place of a default one.
    mounts.retain(|mount| {
        !container.mounts.iter().any(|theirs| mount["destination"] == theirs.destination.as_str())
    });
    mounts.extend(container.mounts.iter().map(mount));
    let cwd = if container.working_dir.is_empty() { "/" } else { &container.working_dir };
    let mut linux = json!({"namespaces": namespaces(network_namespace)});
    if let Some(seccomp) = &container.seccomp {
        linux["seccomp"] = filter(seccomp);
    }
    json!({
        "ociVersion": OCI_VERSION,
        "process": process(container, &container.args, &container.env, cwd, false),
        "root": {"path": container.rootfs, "readonly": container.read_only_root},
        "hostname": HOSTNAME,
        "mounts": mounts,
        "annotations": {
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.container-name": container.name,
            "io.kubernetes.cri.sandbox-id": ROOT,
        },
        "linux": linux,
    })
}

/// A filter of system calls as the OCI has it. runsc applies it to execs too.
fn filter(seccomp: &Seccomp) -> Value {
    let action = |name: &str| match name {
        "errno" => "SCMP_ACT_ERRNO",
        "kill" => "SCMP_ACT_KILL",
        _ => "SCMP_ACT_ALLOW",
    };
    let rule = |rule: &SeccompRule| json!({"names": rule.names, "action": action(&rule.action)});
    json!({
        "defaultAction": action(&seccomp.default_action),
        "syscalls": seccomp.rules.iter().map(rule).collect::<Vec<_>>(),
    })
}

/// The `process` object, for a bundle or for an exec.
pub fn process(
    container: &ResolvedContainer,
    args: &[String],
    env: &[String],
    cwd: &str,
    terminal: bool,
) -> Value {
    let capabilities: Vec<String> = container
        .capabilities
        .iter()
        .map(|name| name.to_ascii_uppercase())
        .map(|name| if name.starts_with("CAP_") { name } else { format!("CAP_{name}") })
        .collect();
    json!({
        "terminal": terminal,
        "user": {
            "uid": container.uid,
            "gid": container.gid,
            "additionalGids": container.additional_gids,
        },
        "args": args,
        "env": env,
        "cwd": cwd,
        "capabilities": {
            "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
        },
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": NOFILE, "soft": NOFILE}],
        "noNewPrivileges": container.no_new_privileges,
    })
}

fn default_mounts() -> Vec<Value> {
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": kind, "options": options});
    vec![
        mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
        mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
    ]
}

fn mount(mount: &Mount) -> Value {
    let access = if mount.read_only { "ro" } else { "rw" };
    if mount.kind == "tmpfs" {
        json!({
            "destination": mount.destination, "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "nodev", access],
        })
    } else {
        json!({
            "destination": mount.destination, "type": "bind", "source": mount.source, "options": ["rbind", access],
        })
    }
}

fn namespaces(network: &Path) -> Value {
    json!([
        {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
        {"type": "network", "path": network},
    ])
}

/// The part of a spec that runsc compares at a restore, as one canonical value.
fn enforced(spec: &Value) -> Value {
    let mut spec = spec.clone();
    let strip = |value: &mut Value, keys: &[&str]| {
        if let Some(object) = value.as_object_mut() {
            for key in keys {
                object.remove(*key);
            }
        }
    };
    strip(&mut spec, &["hostname", "annotations"]);
    strip(&mut spec["root"], &["path"]);
    strip(&mut spec["process"], &["env"]);
    for entry in spec["linux"]["namespaces"].as_array_mut().into_iter().flatten() {
        strip(entry, &["path"]);
    }
    if let Some(mounts) = spec["mounts"].as_array_mut() {
        for mount in mounts.iter_mut() {
            strip(mount, &["source"]);
        }
        mounts.sort_by_key(|mount| mount["destination"].as_str().unwrap_or_default().to_owned());
    }
    sorted(spec)
}

/// Objects with their keys in order, whatever the map type of this build keeps.
fn sorted(value: Value) -> Value {
    match value {
        Value::Object(object) => {
            let mut entries: Vec<(String, Value)> = object.into_iter().collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(entries.into_iter().map(|(key, value)| (key, sorted(value))).collect::<Map<_, _>>())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        other => other,
    }
}

/// sha256 (hex) of what a restore compares, over the root container and all workloads by name.
pub fn spec_digest(spec: &SandboxSpec) -> String {
    let mut all = Map::new();
    all.insert("pause".to_owned(), enforced(&root_spec(Path::new("/"), Path::new("/"))));
    for container in &spec.containers {
        let value = workload_spec(container, Path::new("/"), Path::new("/"));
        all.insert(container.name.clone(), enforced(&value));
    }
    hex::encode(Sha256::digest(sorted(Value::Object(all)).to_string()))
}

/// Writes a bundle: a directory with `config.json`.
///
/// # Errors
/// [`RuntimeError::File`].
pub fn write(directory: &Path, spec: &Value) -> Result<(), RuntimeError> {
    std::fs::create_dir_all(directory).map_err(file_error("create", directory))?;
    let path = directory.join("config.json");
    std::fs::write(&path, spec.to_string()).map_err(file_error("write", &path))
}

/// Writes the files that containers see in `/etc`; returns their directory.
///
/// # Errors
/// [`RuntimeError::File`].
pub fn write_etc(directory: &Path, hostname: &str) -> Result<PathBuf, RuntimeError> {
    let etc = directory.join("etc");
    std::fs::create_dir_all(&etc).map_err(file_error("create", &etc))?;
    let names = if hostname == HOSTNAME { HOSTNAME.to_owned() } else { format!("{hostname} {HOSTNAME}") };
    let hosts =
        format!("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{names}\n");
    let resolver = format!("nameserver {WORKER_V4}\noptions timeout:5 attempts:2\n");
    for (name, content) in ETC.into_iter().zip([resolver, hosts, format!("{hostname}\n")]) {
        let path = etc.join(name);
        std::fs::write(&path, content).map_err(file_error("write", &path))?;
    }
    Ok(etc)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container() -> ResolvedContainer {
        ResolvedContainer {
            name: "main".into(),
            rootfs: "/".into(),
            args: vec!["/bin/app".into()],
            env: vec!["A=1".into()],
            uid: 1000,
            gid: 1000,
            capabilities: vec!["NET_BIND_SERVICE".into()],
            mounts: vec![Mount {
                source: "/tmp".into(),
                destination: "/run/ate".into(),
                read_only: true,
                kind: "bind".into(),
                late_bound: true,
                size_bytes: 0,
                subpath: String::new(),
            }],
            ..ResolvedContainer::default()
        }
    }

    fn spec(container: ResolvedContainer) -> SandboxSpec {
        SandboxSpec { containers: vec![container], ..SandboxSpec::default() }
    }

    fn changed(change: impl FnOnce(&mut ResolvedContainer)) -> String {
        let mut container = container();
        change(&mut container);
        spec_digest(&spec(container))
    }

    #[test]
    fn the_digest_covers_what_a_restore_compares() {
        let digest = spec_digest(&spec(container()));
        for (what, other) in [
            ("args", changed(|c| c.args.push("-v".into()))),
            ("cwd", changed(|c| c.working_dir = "/srv".into())),
            ("user", changed(|c| c.uid = 0)),
            ("groups", changed(|c| c.additional_gids.push(5))),
            ("capabilities", changed(|c| c.capabilities.clear())),
            ("read-only root", changed(|c| c.read_only_root = true)),
            ("no new privileges", changed(|c| c.no_new_privileges = true)),
            ("seccomp", changed(|c| c.seccomp = Some(Seccomp::default()))),
            (
                "mount added",
                changed(|c| {
                    c.mounts.push(Mount {
                        destination: "/x".into(),
                        kind: "tmpfs".into(),
                        ..Mount::default()
                    });
                }),
            ),
            ("mount options", changed(|c| c.mounts[0].read_only = false)),
            ("name", changed(|c| c.name = "other".into())),
        ] {
            assert_ne!(digest, other, "{what}");
        }
    }

    #[test]
    fn the_digest_leaves_out_what_may_differ() {
        let digest = spec_digest(&spec(container()));
        assert_eq!(digest, changed(|c| c.env.push("B=2".into())), "env");
        assert_eq!(digest, changed(|c| c.rootfs = "/other".into()), "rootfs path");
        assert_eq!(digest, changed(|c| c.mounts[0].source = "/var".into()), "mount source");
        assert_eq!(digest, changed(|c| c.log_path = "/var/log/x".into()), "log");
        let named = SandboxSpec { hostname: "bob".into(), ..spec(container()) };
        assert_eq!(digest, spec_digest(&named), "hostname");
    }

    #[test]
    fn a_templates_mount_takes_the_place_of_a_default() {
        let mut container = container();
        container.mounts.push(Mount {
            source: "/etc/hosts".into(),
            destination: "/etc/hosts".into(),
            read_only: true,
            kind: "bind".into(),
            late_bound: false,
            size_bytes: 0,
            subpath: String::new(),
        });
        let spec = workload_spec(&container, Path::new("/etc-of-ours"), Path::new("/netns"));
        let at = |destination: &str| {
            spec["mounts"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|mount| mount["destination"] == destination)
                .map(|mount| mount["source"].as_str().unwrap_or_default().to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(at("/etc/hosts"), ["/etc/hosts"]);
        assert_eq!(at("/etc/resolv.conf"), ["/etc-of-ours/resolv.conf"]);
    }

    fn forbids(name: &str) -> Seccomp {
        let rule = SeccompRule { names: vec![name.into()], action: "errno".into(), errno: 0 };
        Seccomp { default_action: String::new(), rules: vec![rule] }
    }

    #[test]
    fn a_filter_is_written_as_the_oci_has_it_and_none_is_written_where_none_was_asked_for() {
        let mut container = container();
        let linux = |container: &ResolvedContainer| {
            workload_spec(container, Path::new("/etc"), Path::new("/netns"))["linux"].clone()
        };
        assert!(linux(&container).get("seccomp").is_none());
        container.seccomp = Some(forbids("mkdir"));
        let expected = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}],
        });
        assert_eq!(linux(&container)["seccomp"], expected);
    }

    #[test]
    fn what_cannot_run_is_named() {
        validate(&spec(container())).unwrap();
        let refused = |change: fn(&mut ResolvedContainer)| {
            let mut container = container();
            change(&mut container);
            validate(&spec(container)).unwrap_err().to_string()
        };
        assert!(refused(|c| c.args.clear()).contains("no command"));
        assert!(refused(|c| c.rootfs = "/does/not/exist".into()).contains("/does/not/exist"));
        assert!(refused(|c| c.name = "Main".into()).contains("DNS label"));
        assert!(refused(|c| c.mounts[0].source = "/does/not/exist".into()).contains("/run/ate"));
        assert!(refused(|c| c.mounts[0].kind = "nfs".into()).contains("nfs"));
        assert!(refused(|c| c.mounts[0].kind = "image".into()).contains("as a directory"));
        assert!(refused(|c| c.layer = "/tmp".into()).contains("microVMs"));
        assert!(refused(|c| c.seccomp = Some(forbids("teleport"))).contains("teleport"));
        assert!(validate(&SandboxSpec::default()).is_err());
        let twins = SandboxSpec { containers: vec![container(), container()], ..SandboxSpec::default() };
        assert!(validate(&twins).unwrap_err().to_string().contains("two containers"));
    }

    #[test]
    fn ids_are_never_prefixes_of_each_other() {
        let ids: Vec<String> =
            ["a", "a-b", "a", "root"].iter().enumerate().map(|(n, name)| container_id(n, name)).collect();
        for (n, id) in ids.iter().enumerate() {
            assert!(!id.starts_with(ROOT) && !ROOT.starts_with(id.as_str()));
            assert!(ids.iter().enumerate().all(|(m, other)| n == m || !other.starts_with(id.as_str())));
        }
    }
}

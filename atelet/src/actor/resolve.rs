// SPDX-License-Identifier: Apache-2.0
//! Template + actor + images → what an ateom starts. Pure.
//!
//! Commands as Kubernetes reads them:
//!
//! | `command` | `args` | runs |
//! |---|---|---|
//! | – | – | image ENTRYPOINT + image CMD |
//! | – | set | image ENTRYPOINT + `args` |
//! | set | – | `command` (the image's CMD is ignored) |
//! | set | set | `command` + `args` |
//!
//! Environment: the image's, then the template's, then the actor's, a later one replacing an earlier one in place.
//! `PATH`, `HOME` and (with a terminal) `TERM` get what container engines give them when nothing sets them.
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use substrate_proto::ateom::{EgressCidr, Mount, ResolvedContainer, SandboxSpec};
use substrate_proto::types::{ActorSpec, Assignment, Container, EgressPolicy, TemplateSpec, Volume};

use super::{capabilities, quantity};
use crate::config::is_label;
use crate::error::NodeError;

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const DEFAULT_PIDS: u32 = 1024;
const MAX_CONTAINERS: usize = 10;
/// Where the actor finds its identity.
pub const IDENTITY: &str = "/run/ate";

/// An image as far as resolution needs it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageFacts {
    /// sha256:… of the platform's manifest.
    pub digest: String,
    /// Read-only root on this host.
    pub rootfs: PathBuf,
    /// ENTRYPOINT.
    pub entrypoint: Vec<String>,
    /// CMD.
    pub cmd: Vec<String>,
    /// ENV, "K=V".
    pub env: Vec<String>,
    /// WORKDIR.
    pub working_dir: String,
    /// EXPOSE, TCP.
    pub exposed_ports: Vec<u16>,
    /// Who runs: of the security context, else of the image, resolved inside the image.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: String,
    /// The images that are mounted into the container, in the order of its `image_mounts`.
    pub mounted: Vec<MountedImage>,
}

/// An image that is mounted into a container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MountedImage {
    /// Its root on this host.
    pub root: PathBuf,
    /// The same as an EROFS file, which a microVM is given instead.
    pub disk: Option<PathBuf>,
}

/// Where the actor's things are on this host.
#[derive(Debug, Clone, Default)]
pub struct Places {
    /// Content of [`IDENTITY`].
    pub identity: PathBuf,
    /// The volumes' directories, by name.
    pub volumes: BTreeMap<String, PathBuf>,
    /// Path inside → path on this host.
    pub files: Vec<(String, PathBuf)>,
    /// Directory of the containers' logs.
    pub logs: PathBuf,
}

/// Checks everything that needs no image: names, paths, quantities.
///
/// # Errors
/// [`NodeError::Invalid`] naming field and rule.
pub fn validate(
    assignment: &Assignment,
    template: &TemplateSpec,
    actor: &ActorSpec,
) -> Result<(), NodeError> {
    let label = |field: &str, value: &str| {
        if is_label(value) {
            Ok(())
        } else {
            Err(NodeError::invalid(field, format!("{value:?} is not a DNS-1123 label")))
        }
    };
    label("assignment.atespace", &assignment.atespace)?;
    label("assignment.actorName", &assignment.actor_name)?;
    label("assignment.workerId", &assignment.worker_id)?;
    crate::snapshot::check_name("actor uid", &assignment.actor_uid)?;
    if assignment.generation == 0 {
        return Err(NodeError::invalid("assignment.generation", "must be at least 1"));
    }
    if template.containers.is_empty() || template.containers.len() > MAX_CONTAINERS {
        return Err(NodeError::invalid("containers", format!("1 to {MAX_CONTAINERS} are needed")));
    }
    let mut names = BTreeSet::new();
    for (at, container) in template.containers.iter().enumerate() {
        label(&format!("containers[{at}].name"), &container.name)?;
        if !names.insert(&container.name) {
            return Err(NodeError::invalid(format!("containers[{at}].name"), "is used twice"));
        }
    }
    let mut volumes = BTreeSet::new();
    for (at, volume) in template.volumes.iter().enumerate() {
        label(&format!("volumes[{at}].name"), &volume.name)?;
        if !volumes.insert(&volume.name) {
            return Err(NodeError::invalid(format!("volumes[{at}].name"), "is used twice"));
        }
    }
    for (at, file) in actor.files.iter().enumerate() {
        inside(&format!("files[{at}].path"), &file.path)?;
    }
    Ok(())
}

/// Resolves a sandbox.
///
/// # Errors
/// [`NodeError::Invalid`] naming field and rule.
pub fn sandbox(
    assignment: &Assignment,
    template: &TemplateSpec,
    actor: &ActorSpec,
    images: &BTreeMap<String, ImageFacts>,
    places: &Places,
) -> Result<SandboxSpec, NodeError> {
    validate(assignment, template, actor)?;
    let containers = template
        .containers
        .iter()
        .enumerate()
        .map(|(at, container)| {
            let image = images
                .get(&container.name)
                .ok_or_else(|| NodeError::invalid(format!("containers[{at}].image"), "is not local"))?;
            resolve_container(at, container, template, actor, image, places)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let resources = template.resources.clone().unwrap_or_default();
    let declared = template.containers.iter().flat_map(|container| container.ports.iter().copied());
    let exposed = template
        .containers
        .iter()
        .filter_map(|container| images.get(&container.name))
        .flat_map(|image| image.exposed_ports.iter().map(|port| u32::from(*port)));
    Ok(SandboxSpec {
        containers,
        cpu_millis: quantity::cpu_millis(&resources.cpu)
            .map_err(|rule| NodeError::invalid("resources.cpu", rule))?,
        memory_bytes: quantity::bytes(&resources.memory)
            .map_err(|rule| NodeError::invalid("resources.memory", rule))?,
        pids: if resources.pids == 0 { DEFAULT_PIDS } else { resources.pids },
        hostname: assignment.actor_name.clone(),
        hooks: template.hooks.clone(),
        egress_cidrs: egress_cidrs(template.egress.as_ref()),
        ingress_port: declared.chain(exposed).next().unwrap_or(0),
    })
}

/// The part of a policy that an ateom enforces: explicit addresses. Names are the egress proxy's.
pub fn egress_cidrs(policy: Option<&EgressPolicy>) -> Vec<EgressCidr> {
    policy
        .into_iter()
        .flat_map(|policy| &policy.allow)
        .filter(|rule| !rule.cidr.is_empty())
        .map(|rule| EgressCidr { cidr: rule.cidr.clone(), ports: rule.ports.clone() })
        .collect()
}

fn resolve_container(
    at: usize,
    container: &Container,
    template: &TemplateSpec,
    actor: &ActorSpec,
    image: &ImageFacts,
    places: &Places,
) -> Result<ResolvedContainer, NodeError> {
    let field = |name: &str| format!("containers[{at}].{name}");
    let args = arguments(container, image);
    if args.first().is_none_or(String::is_empty) {
        return Err(NodeError::invalid(
            field("command"),
            format!("is needed: image {} has neither ENTRYPOINT nor CMD", container.image),
        ));
    }
    let working_dir = match (container.working_dir.as_str(), image.working_dir.as_str()) {
        ("", "") => "/",
        ("", of_image) => of_image,
        (own, _) => own,
    };
    if !working_dir.starts_with('/') {
        return Err(NodeError::invalid(field("workingDir"), format!("{working_dir:?} is not absolute")));
    }
    let security = container.security_context.as_ref();
    Ok(ResolvedContainer {
        name: container.name.clone(),
        image_digest: image.digest.clone(),
        rootfs: image.rootfs.display().to_string(),
        args,
        env: environment(container, actor, image),
        working_dir: working_dir.to_owned(),
        uid: image.uid,
        gid: image.gid,
        additional_gids: image.groups.clone(),
        capabilities: capabilities::resolve(security)
            .map_err(|rule| NodeError::invalid(field("securityContext"), rule))?,
        no_new_privileges: security.is_some_and(|security| security.no_new_privileges),
        tty: container.tty,
        read_only_root: container.read_only_root,
        mounts: mounts(at, container, template, image, places)?,
        readiness: container.readiness.clone(),
        log_path: places.logs.join(format!("{}.log", container.name)).display().to_string(),
        layer: match layer(container) {
            Some(Volume { name, .. }) => places
                .volumes
                .get(&name)
                .ok_or_else(|| NodeError::invalid(field("rootfs"), "was not prepared"))?
                .display()
                .to_string(),
            None => String::new(),
        },
        layer_bytes: quantity::bytes(&container.rootfs_size)
            .map_err(|rule| NodeError::invalid(field("rootfsSize"), rule))?,
        seccomp: security.and_then(|security| security.seccomp.clone()),
    })
}

/// The writable layer of a container as a volume, where it is to be kept on a disk. No volume of a template has such a
/// name, which is no DNS label.
pub fn layer(container: &Container) -> Option<Volume> {
    let name = format!("root.{}", container.name);
    (container.rootfs == "persist").then(|| Volume { name, size: container.rootfs_size.clone() })
}

fn arguments(container: &Container, image: &ImageFacts) -> Vec<String> {
    let (command, rest) = if container.command.is_empty() {
        (&image.entrypoint, if container.args.is_empty() { &image.cmd } else { &container.args })
    } else {
        (&container.command, &container.args)
    };
    command.iter().chain(rest).cloned().collect()
}

fn environment(container: &Container, actor: &ActorSpec, image: &ImageFacts) -> Vec<String> {
    let mut env: Vec<(String, String)> = Vec::new();
    let mut set = |name: &str, value: &str, over: bool| match env.iter_mut().find(|(old, _)| old == name) {
        Some((_, old)) if over => value.clone_into(old),
        Some(_) => {}
        None => env.push((name.to_owned(), value.to_owned())),
    };
    for entry in &image.env {
        if let Some((name, value)) = entry.split_once('=') {
            set(name, value, true);
        }
    }
    for (name, value) in container.env.iter().chain(&actor.env) {
        set(name, value, true);
    }
    set("PATH", DEFAULT_PATH, false);
    if !image.home.is_empty() {
        set("HOME", &image.home, false);
    }
    if container.tty {
        set("TERM", "xterm", false);
    }
    env.into_iter().map(|(name, value)| format!("{name}={value}")).collect()
}

fn mounts(
    at: usize,
    container: &Container,
    template: &TemplateSpec,
    image: &ImageFacts,
    places: &Places,
) -> Result<Vec<Mount>, NodeError> {
    let mut mounts = vec![Mount {
        source: places.identity.display().to_string(),
        destination: IDENTITY.to_owned(),
        read_only: true,
        kind: "bind".to_owned(),
        late_bound: true,
        size_bytes: 0,
        subpath: String::new(),
    }];
    for (nth, mount) in container.volume_mounts.iter().enumerate() {
        let field = format!("containers[{at}].volumeMounts[{nth}]");
        let Some(volume) = template.volumes.iter().find(|volume| volume.name == mount.volume) else {
            return Err(NodeError::invalid(
                format!("{field}.volume"),
                format!("no volume is named {:?}", mount.volume),
            ));
        };
        let size_bytes =
            quantity::bytes(&volume.size).map_err(|rule| NodeError::invalid("volumes.size", rule))?;
        let source = places
            .volumes
            .get(&mount.volume)
            .ok_or_else(|| NodeError::invalid(format!("{field}.volume"), "was not prepared"))?;
        mounts.push(Mount {
            source: source.display().to_string(),
            destination: inside(&format!("{field}.path"), &mount.path)?,
            read_only: mount.read_only,
            kind: "bind".to_owned(),
            late_bound: false,
            size_bytes,
            subpath: String::new(),
        });
    }
    for (nth, mount) in container.image_mounts.iter().enumerate() {
        let field = format!("containers[{at}].imageMounts[{nth}]");
        let MountedImage { root, disk } = image
            .mounted
            .get(nth)
            .ok_or_else(|| NodeError::invalid(format!("{field}.image"), "is not local"))?;
        let found = within(&format!("{field}.source"), root, &mount.source)?;
        let subpath = found.strip_prefix(root).map(|path| path.display().to_string()).unwrap_or_default();
        let (kind, source, subpath) = match disk {
            Some(disk) => ("image", disk, subpath),
            None => ("bind", &found, String::new()),
        };
        mounts.push(Mount {
            source: source.display().to_string(),
            destination: inside(&format!("{field}.path"), &mount.path)?,
            read_only: true,
            kind: kind.to_owned(),
            late_bound: false,
            size_bytes: 0,
            subpath,
        });
    }
    for (path, source) in &places.files {
        mounts.push(Mount {
            source: source.display().to_string(),
            destination: inside("files.path", path)?,
            read_only: true,
            kind: "bind".to_owned(),
            late_bound: true,
            size_bytes: 0,
            subpath: String::new(),
        });
    }
    let mut seen = BTreeSet::new();
    if let Some(twice) = mounts.iter().find(|mount| !seen.insert(mount.destination.as_str())) {
        return Err(NodeError::invalid(
            format!("containers[{at}]"),
            format!("{} is mounted twice", twice.destination),
        ));
    }
    Ok(mounts)
}

/// A directory of an image on this host. Symbolic links are the image's and would lead out of its root: the way must
/// hold none.
fn within(field: &str, root: &Path, path: &str) -> Result<PathBuf, NodeError> {
    let mut found = root.to_owned();
    for part in Path::new(path).components() {
        match part {
            Component::Normal(name) => found.push(name),
            Component::RootDir | Component::CurDir => continue,
            _ => return Err(NodeError::invalid(field, format!("{path:?} must not contain .."))),
        }
        let is_dir = std::fs::symlink_metadata(&found).is_ok_and(|meta| meta.is_dir());
        if !is_dir {
            return Err(NodeError::invalid(field, format!("{path:?} is no directory of the image")));
        }
    }
    Ok(found)
}

/// A path inside a sandbox where something of ours may be mounted, in its plain form.
fn inside(field: &str, path: &str) -> Result<String, NodeError> {
    let invalid = |rule: &str| NodeError::invalid(field, format!("{path:?} {rule}"));
    if !path.starts_with('/') || path.contains('\0') || path.len() > 4095 {
        return Err(invalid("is not an absolute path"));
    }
    let mut plain = PathBuf::from("/");
    for part in Path::new(path).components() {
        match part {
            Component::Normal(name) => plain.push(name),
            Component::RootDir | Component::CurDir => {}
            _ => return Err(invalid("must not contain ..")),
        }
    }
    let reserved = ["/proc", "/sys", "/dev", IDENTITY];
    if plain == Path::new("/") || reserved.iter().any(|dir| plain.starts_with(dir)) {
        return Err(invalid("is reserved (/, /proc, /sys, /dev and /run/ate are)"));
    }
    Ok(plain.display().to_string())
}

#[cfg(test)]
mod tests {
    use substrate_proto::types::{EgressRule, File, Resources, Seccomp, SecurityContext, VolumeMount};

    use super::*;

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(ToString::to_string).collect()
    }

    fn image() -> ImageFacts {
        ImageFacts {
            digest: "sha256:1".into(),
            rootfs: "/r".into(),
            entrypoint: strings(&["/entry"]),
            cmd: strings(&["cmd"]),
            env: strings(&["A=image", "B=image", "broken"]),
            working_dir: "/work".into(),
            exposed_ports: vec![9000],
            uid: 7,
            gid: 8,
            groups: vec![9],
            home: "/home/x".into(),
            mounted: Vec::new(),
        }
    }

    fn assignment() -> Assignment {
        Assignment {
            actor_uid: "u-1".into(),
            atespace: "blue".into(),
            actor_name: "alice".into(),
            generation: 1,
            worker_id: "w1".into(),
        }
    }

    fn resolve(template: &TemplateSpec, actor: &ActorSpec) -> Result<SandboxSpec, NodeError> {
        let images = template.containers.iter().map(|one| (one.name.clone(), image())).collect();
        let places = Places {
            identity: "/h/id".into(),
            volumes: (template.volumes.iter().cloned())
                .chain(template.containers.iter().filter_map(layer))
                .map(|volume| (volume.name.clone(), PathBuf::from("/h/volumes").join(&volume.name)))
                .collect(),
            files: actor.files.iter().map(|file| (file.path.clone(), "/h/files/0".into())).collect(),
            logs: "/logs/blue/alice".into(),
        };
        sandbox(&assignment(), template, actor, &images, &places)
    }

    fn template(container: Container) -> TemplateSpec {
        TemplateSpec {
            containers: vec![Container { name: "main".into(), image: "i".into(), ..container }],
            ..TemplateSpec::default()
        }
    }

    #[test]
    fn commands() {
        for (command, args, expected) in [
            (&[][..], &[][..], &["/entry", "cmd"][..]),
            (&[], &["x"], &["/entry", "x"]),
            (&["/c"], &[], &["/c"]),
            (&["/c"], &["x", "y"], &["/c", "x", "y"]),
        ] {
            let container =
                Container { command: strings(command), args: strings(args), ..Container::default() };
            assert_eq!(arguments(&container, &image()), expected, "{command:?} {args:?}");
        }
        let mut images = BTreeMap::new();
        images.insert("main".to_owned(), ImageFacts::default());
        let template = template(Container::default());
        let error = sandbox(&assignment(), &template, &ActorSpec::default(), &images, &Places::default())
            .unwrap_err();
        assert!(error.to_string().contains("neither ENTRYPOINT nor CMD"), "{error}");
    }

    #[test]
    fn later_environment_replaces_earlier() {
        let container = Container {
            env: [("B".into(), "template".into()), ("C".into(), "template".into())].into(),
            tty: true,
            ..Container::default()
        };
        let actor = ActorSpec { env: [("C".into(), "actor".into())].into(), ..ActorSpec::default() };
        let spec = resolve(&template(container), &actor).unwrap();
        assert_eq!(
            spec.containers[0].env,
            [
                "A=image",
                "B=template",
                "C=actor",
                &format!("PATH={DEFAULT_PATH}"),
                "HOME=/home/x",
                "TERM=xterm"
            ]
        );
    }

    #[test]
    fn defaults_come_from_the_image() {
        let spec = resolve(&template(Container::default()), &ActorSpec::default()).unwrap();
        let main = &spec.containers[0];
        assert_eq!((main.uid, main.gid, main.additional_gids.as_slice()), (7, 8, &[9][..]));
        assert_eq!(
            (main.working_dir.as_str(), main.log_path.as_str()),
            ("/work", "/logs/blue/alice/main.log")
        );
        assert_eq!(main.capabilities, capabilities::DEFAULT);
        assert_eq!((spec.ingress_port, spec.pids, spec.memory_bytes, spec.cpu_millis), (9000, 1024, 0, 0));
        assert_eq!(spec.hostname, "alice");
        let identity = &main.mounts[0];
        assert!(identity.read_only && identity.late_bound && identity.destination == IDENTITY);
    }

    #[test]
    fn everything_set() {
        let container = Container {
            ports: vec![8080, 1],
            working_dir: "/w".into(),
            read_only_root: true,
            security_context: Some(SecurityContext {
                drop_capabilities: strings(&["ALL"]),
                no_new_privileges: true,
                ..SecurityContext::default()
            }),
            volume_mounts: vec![VolumeMount {
                volume: "data".into(),
                path: "/data/".into(),
                read_only: true,
            }],
            ..Container::default()
        };
        let template = TemplateSpec {
            resources: Some(Resources { cpu: "500m".into(), memory: "64MiB".into(), pids: 5 }),
            volumes: vec![Volume { name: "data".into(), size: String::new() }],
            egress: Some(EgressPolicy {
                allow: vec![
                    EgressRule { host: "h".into(), ..EgressRule::default() },
                    EgressRule { cidr: "10.0.0.0/8".into(), ports: vec![5], ..EgressRule::default() },
                ],
            }),
            ..template(container)
        };
        let actor = ActorSpec {
            files: vec![File { path: "/etc/token".into(), mode: 0o400, content: vec![1] }],
            ..ActorSpec::default()
        };
        let spec = resolve(&template, &actor).unwrap();
        assert_eq!(
            (spec.cpu_millis, spec.memory_bytes, spec.pids, spec.ingress_port),
            (500, 64 << 20, 5, 8080)
        );
        assert_eq!(spec.egress_cidrs.len(), 1);
        let main = &spec.containers[0];
        assert!(main.capabilities.is_empty() && main.no_new_privileges && main.read_only_root);
        let mounts: Vec<_> = main
            .mounts
            .iter()
            .map(|mount| {
                (mount.source.as_str(), mount.destination.as_str(), mount.read_only, mount.late_bound)
            })
            .collect();
        assert_eq!(
            mounts,
            [
                ("/h/id", "/run/ate", true, true),
                ("/h/volumes/data", "/data", true, false),
                ("/h/files/0", "/etc/token", true, true)
            ]
        );
    }

    #[test]
    fn a_root_on_a_disk_is_a_volume_of_its_own() {
        let container = Container {
            rootfs: "persist".into(),
            rootfs_size: "3MiB".into(),
            security_context: Some(SecurityContext {
                seccomp: Some(Seccomp { default_action: "allow".into(), rules: Vec::new() }),
                ..SecurityContext::default()
            }),
            ..Container::default()
        };
        let spec = resolve(&template(container), &ActorSpec::default()).unwrap();
        let main = &spec.containers[0];
        assert_eq!((main.layer.as_str(), main.layer_bytes), ("/h/volumes/root.main", 3 << 20));
        assert_eq!(main.seccomp.as_ref().unwrap().default_action, "allow");
        let spec = resolve(&template(Container::default()), &ActorSpec::default()).unwrap();
        let main = &spec.containers[0];
        assert!(main.layer.is_empty() && main.layer_bytes == 0 && main.seccomp.is_none());
        assert!(!is_label("root.main"), "a volume may have the name of a layer");
    }

    #[test]
    fn what_cannot_be_is_refused_by_field() {
        type Change = fn(&mut TemplateSpec, &mut ActorSpec);
        let cases: [(&str, Change); 12] = [
            ("containers:", |template, _| template.containers.clear()),
            ("containers[0].name", |template, _| template.containers[0].name = "A/b".into()),
            ("containers[1].name", |template, _| template.containers.push(template.containers[0].clone())),
            ("containers[0].workingDir", |template, _| template.containers[0].working_dir = "x".into()),
            ("containers[0].volumeMounts[0].volume", |template, _| {
                template.containers[0].volume_mounts =
                    vec![VolumeMount { volume: "none".into(), path: "/x".into(), read_only: false }];
            }),
            ("volumes[0].name", |template, _| {
                template.volumes = vec![Volume { name: "..".into(), size: String::new() }];
            }),
            ("resources.memory", |template, _| {
                template.resources = Some(Resources { memory: "much".into(), ..Resources::default() });
            }),
            ("resources.cpu", |template, _| {
                template.resources = Some(Resources { cpu: "-1".into(), ..Resources::default() });
            }),
            ("containers[0].securityContext", |template, _| {
                template.containers[0].security_context = Some(SecurityContext {
                    add_capabilities: vec!["EVERYTHING".into()],
                    ..SecurityContext::default()
                });
            }),
            ("files[0].path", |_, actor| {
                actor.files = vec![File { path: "/a/../etc/x".into(), ..File::default() }];
            }),
            ("files[0].path", |_, actor| {
                actor.files = vec![File { path: "/proc/x".into(), ..File::default() }];
            }),
            ("mounted twice", |_, actor| {
                actor.files = vec![File { path: "/x".into(), ..File::default() }; 2];
            }),
        ];
        for (expected, change) in cases {
            let (mut template, mut actor) = (template(Container::default()), ActorSpec::default());
            change(&mut template, &mut actor);
            let error = resolve(&template, &actor).unwrap_err().to_string();
            assert!(error.contains(expected), "{error} does not name {expected}");
        }
        let elsewhere = Assignment { atespace: "../x".into(), ..assignment() };
        let valid = template(Container::default());
        assert!(validate(&elsewhere, &valid, &ActorSpec::default()).is_err());
    }
}

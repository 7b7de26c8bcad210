// SPDX-License-Identifier: Apache-2.0
//! What every class asks of a sandbox's containers.
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use substrate_proto::ateom::{ResolvedContainer, SandboxSpec};

use crate::error::SlotError;
use crate::runtime::{ExecRequest, RuntimeError, file_error};

/// Most containers of one sandbox.
pub const MAX_CONTAINERS: usize = 10;

/// Checks what can be checked before anything is touched; `of_class` says what else a container lacks for its class.
///
/// # Errors
/// [`SlotError::Invalid`] naming container and field.
pub fn validate(
    spec: &SandboxSpec,
    of_class: impl Fn(&ResolvedContainer) -> Result<(), String>,
) -> Result<(), SlotError> {
    let count = spec.containers.len();
    if count == 0 || count > MAX_CONTAINERS {
        return Err(SlotError::Invalid(format!(
            "a sandbox has 1 to {MAX_CONTAINERS} containers, not {count}"
        )));
    }
    let mut names = std::collections::BTreeSet::new();
    for container in &spec.containers {
        check(container).and_then(|()| of_class(container)).map_err(SlotError::Invalid)?;
        if !names.insert(&container.name) {
            return Err(SlotError::Invalid(format!("two containers are named {}", container.name)));
        }
    }
    Ok(())
}

fn check(container: &ResolvedContainer) -> Result<(), String> {
    let name = &container.name;
    let label = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.is_empty() || name.len() > 63 || !name.chars().all(label) {
        return Err(format!("container name {name:?} is not a DNS label"));
    }
    if container.args.is_empty() {
        return Err(format!(
            "container {name} has no command: the image has none and the template gives none"
        ));
    }
    if !(container.working_dir.is_empty() || container.working_dir.starts_with('/')) {
        return Err(format!(
            "container {name}: working_dir {:?} is not an absolute path",
            container.working_dir
        ));
    }
    for mount in &container.mounts {
        let (source, destination) = (&mount.source, &mount.destination);
        let bind = matches!(mount.kind.as_str(), "" | "bind");
        let image = mount.kind == "image";
        if !destination.starts_with('/') || ((bind || image) && !source.starts_with('/')) {
            return Err(format!(
                "container {name}: mount {source:?} at {destination:?} needs absolute paths"
            ));
        }
        if !bind && !image && mount.kind != "tmpfs" {
            return Err(format!(
                "container {name}: mount kind {:?} is none of bind, tmpfs, image",
                mount.kind
            ));
        }
        if (bind || image) && !Path::new(source).exists() {
            return Err(format!(
                "container {name}: {source} to be mounted at {destination} does not exist on this node"
            ));
        }
    }
    Ok(())
}

/// A container by name (empty: the first) with its number.
///
/// # Errors
/// [`RuntimeError::Failed`] naming those there are.
pub fn find<'a>(
    containers: &'a [ResolvedContainer],
    name: &str,
) -> Result<(usize, &'a ResolvedContainer), RuntimeError> {
    let found = containers.iter().enumerate().find(|(_, it)| name.is_empty() || it.name == name);
    found.ok_or_else(|| {
        let names: Vec<&str> = containers.iter().map(|it| it.name.as_str()).collect();
        RuntimeError::Failed(format!("no container {name:?} in this actor; it has {}", names.join(", ")))
    })
}

/// The container as a process sees it that is started in it later: user, environment and directory as asked for.
#[must_use]
pub fn for_exec(container: &ResolvedContainer, request: &ExecRequest) -> ResolvedContainer {
    let mut container = container.clone();
    if let Some((uid, gid)) = request.user {
        container.uid = uid;
        container.gid = gid.unwrap_or(container.gid);
        container.additional_gids.clear();
    }
    let name = |pair: &str| pair.split_once('=').map_or(pair.to_owned(), |(name, _)| name.to_owned());
    container.env.retain(|pair| !request.env.iter().any(|other| name(other) == name(pair)));
    container.env.extend(request.env.iter().cloned());
    if !request.working_dir.is_empty() {
        container.working_dir.clone_from(&request.working_dir);
    }
    container
}

/// Opens a container's log for appending: a restored sandbox would otherwise seek to where the old one was in its file.
///
/// # Errors
/// When its directory or the file cannot be made.
pub fn open_log(container: &ResolvedContainer) -> Result<File, RuntimeError> {
    let path =
        if container.log_path.is_empty() { Path::new("/dev/null") } else { Path::new(&container.log_path) };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(file_error("create", parent))?;
    }
    let opened = File::options().create(true).append(true).mode(0o640).open(path);
    opened.map_err(file_error("open for appending", path))
}

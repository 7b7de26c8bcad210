// SPDX-License-Identifier: Apache-2.0
//! The sandbox config: a TOML file of the administrators', see docs/config.md.
use std::path::Path;

use serde::Deserialize;

use super::AssetError;
use crate::config::WorkerClass;

/// The whole file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SandboxConfig {
    /// What gVisor actors run on.
    pub gvisor: ClassConfig,
    /// What microVMs run on.
    pub microvm: ClassConfig,
    /// Actors that may be restored although a rule below would stop it.
    pub overrides: Vec<Override>,
}

/// One sandbox class.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClassConfig {
    /// The first is what new actors start on; the others are kept for the snapshots that were made with them.
    /// Default: none, which means that the runtime is named or found otherwise.
    pub runtimes: Vec<RuntimeConfig>,
    /// sha256 (hex) of runtimes on which nothing may be started or restored. Default: none.
    pub revoked: Vec<String>,
    /// Age from which a snapshot is not restored, in days. Default: none.
    pub max_age_days: Option<u32>,
}

/// One runtime: the files that make it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuntimeConfig {
    /// For people; unique in its class.
    pub name: String,
    /// gVisor: the runsc binary.
    pub runsc: Option<PerArchitecture>,
    /// microVM: the machine monitor's binary, or a tar archive (plain, gzip or zstd) of `usr/` with it, its firmware and
    /// modules. Default: the one that was found.
    pub vmm: Option<PerArchitecture>,
    /// microVM: a tar archive (plain, gzip or zstd) with `vmlinuz` and `modules/`. Default: what was found.
    pub kernel: Option<PerArchitecture>,
    /// Worker slots for snapshots of a runtime that is not the first. Default: 1.
    pub workers: Option<u32>,
}

/// A file for each architecture.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PerArchitecture {
    /// x86_64.
    pub amd64: Option<Asset>,
    /// aarch64.
    pub arm64: Option<Asset>,
}

/// A file, by its content.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asset {
    /// `https://…`, `http://` on this machine only, `s3://BUCKET/KEY[?endpoint=…]` or `file:/…`.
    pub url: String,
    /// sha256 (hex) of what is there.
    pub sha256: String,
}

/// Lets some actors pass.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Override {
    /// `atespace/actor`, or `atespace/*`.
    pub actors: Vec<String>,
    /// For whoever reads it later, and the log.
    pub reason: String,
}

impl PerArchitecture {
    /// The file for this machine.
    pub fn here(&self) -> Option<&Asset> {
        if cfg!(target_arch = "aarch64") { self.arm64.as_ref() } else { self.amd64.as_ref() }
    }

    fn all(&self) -> impl Iterator<Item = &Asset> {
        self.amd64.iter().chain(&self.arm64)
    }
}

impl RuntimeConfig {
    /// Its parts, by name.
    pub fn parts(&self) -> impl Iterator<Item = (&'static str, &PerArchitecture)> {
        [("runsc", &self.runsc), ("vmm", &self.vmm), ("kernel", &self.kernel)]
            .into_iter()
            .filter_map(|(name, part)| Some((name, part.as_ref()?)))
    }

    /// The first six digits of each part's sha256 for this machine, for a worker's name: another content is another one.
    pub fn short_digests(&self) -> String {
        let here = self.parts().filter_map(|(_, of)| of.here());
        here.map(|asset| asset.sha256.get(..6).unwrap_or("none")).collect::<Vec<_>>().join("-")
    }

    /// What the class's snapshots call it: the sha256 of the binary for this machine.
    pub fn digest(&self, class: WorkerClass) -> Option<&str> {
        let binary = match class {
            WorkerClass::Gvisor => &self.runsc,
            WorkerClass::Microvm => &self.vmm,
        };
        Some(binary.as_ref()?.here()?.sha256.as_str())
    }
}

impl SandboxConfig {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`AssetError::Config`] with the file and what is wrong.
    pub fn read(path: &Path) -> Result<Self, AssetError> {
        let bad = |reason: String| AssetError::Config { path: path.to_owned(), reason };
        let text = std::fs::read_to_string(path).map_err(|error| bad(format!("cannot be read: {error}")))?;
        Self::parse(&text).map_err(bad)
    }

    /// Parses and checks a file's text.
    ///
    /// # Errors
    /// What is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        let config: Self = toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        for (class, name, parts) in
            [(&self.gvisor, "gvisor", &["runsc"][..]), (&self.microvm, "microvm", &["vmm", "kernel"])]
        {
            let mut names = std::collections::BTreeSet::new();
            for runtime in &class.runtimes {
                let place = format!("{name}.runtimes {:?}", runtime.name);
                if runtime.name.is_empty() || !names.insert(&runtime.name) {
                    return Err(format!("{place}: the name is empty or used twice"));
                }
                let mut given = 0;
                for (part, files) in runtime.parts() {
                    if !parts.contains(&part) {
                        return Err(format!("{place}: {part} is no part of the class {name}"));
                    }
                    given += 1;
                    for asset in files.all() {
                        check_digest(&asset.sha256).map_err(|why| format!("{place}: {part}: {why}"))?;
                        super::fetch::Place::parse(&asset.url)
                            .map_err(|why| format!("{place}: {part}: {why}"))?;
                    }
                    if files.here().is_none() {
                        let here = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
                        return Err(format!("{place}: {part} has no {here}, which this machine is"));
                    }
                }
                if given == 0 {
                    return Err(format!("{place} names none of {}", parts.join(", ")));
                }
            }
            for digest in &class.revoked {
                check_digest(digest).map_err(|why| format!("{name}.revoked: {why}"))?;
            }
            let kind = if name == "gvisor" { WorkerClass::Gvisor } else { WorkerClass::Microvm };
            let first = class.runtimes.first().and_then(|first| first.digest(kind));
            if let Some(first) = first.filter(|first| class.is_revoked(first)) {
                return Err(format!(
                    "{name}: the runtime that new actors start on, {first}, is revoked: put another one first"
                ));
            }
        }
        let pattern = |text: &str| {
            text.split_once('/').is_some_and(|(atespace, actor)| {
                crate::config::is_label(atespace) && (actor == "*" || crate::config::is_label(actor))
            })
        };
        for entry in &self.overrides {
            if let Some(bad) = entry.actors.iter().find(|actor| !pattern(actor)) {
                return Err(format!("overrides.actors: {bad:?} is neither ATESPACE/ACTOR nor ATESPACE/*"));
            }
        }
        Ok(())
    }

    /// What is said of a class.
    pub fn class(&self, class: WorkerClass) -> &ClassConfig {
        match class {
            WorkerClass::Gvisor => &self.gvisor,
            WorkerClass::Microvm => &self.microvm,
        }
    }

    /// Every file for this machine, with the name of its part.
    pub fn assets(&self) -> impl Iterator<Item = (&'static str, &Asset)> {
        let runtimes = self.gvisor.runtimes.iter().chain(&self.microvm.runtimes);
        runtimes.flat_map(RuntimeConfig::parts).filter_map(|(name, part)| Some((name, part.here()?)))
    }

    /// The override that lets an actor pass.
    pub fn pass(&self, atespace: &str, actor: &str) -> Option<&Override> {
        self.overrides.iter().find(|entry| {
            entry.actors.iter().any(|pattern| {
                pattern
                    .split_once('/')
                    .is_some_and(|(space, name)| space == atespace && (name == "*" || name == actor))
            })
        })
    }
}

impl ClassConfig {
    /// Whether nothing may be started on a runtime.
    pub fn is_revoked(&self, digest: &str) -> bool {
        self.revoked.iter().any(|revoked| revoked.eq_ignore_ascii_case(digest))
    }
}

fn check_digest(digest: &str) -> Result<(), String> {
    if digest.len() == 64 && digest.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        Ok(())
    } else {
        Err(format!("{digest:?} is no sha256 (64 digits 0-9, a-f)"))
    }
}

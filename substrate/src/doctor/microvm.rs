// SPDX-License-Identifier: Apache-2.0
//! What the microVM class needs on this machine, and which machine monitor it will use.
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::probe::{in_path, is_executable, run, run_within, sha256, usable, workspace};
use super::{Check, Facts, Verdict, install};

/// Names of QEMU for this architecture.
const QEMU: &str = if cfg!(target_arch = "x86_64") { "qemu-system-x86_64" } else { "qemu-system-aarch64" };
const ATEOM: &str = "ateom-microvm";
/// How long the probe of KVM may take; it ends by itself before.
const PROBE_LIMIT: Duration = Duration::from_secs(30);

/// What was named on the command line or in the configuration.
#[derive(Debug, Clone, Copy, Default)]
pub struct Named<'a> {
    /// QEMU.
    pub qemu: Option<&'a Path>,
    /// Directory of the guests' kernel.
    pub kernel: Option<&'a Path>,
}

/// What was found for the microVM class.
#[derive(Debug, Clone)]
pub struct Microvm {
    /// For the node agent.
    pub config: atelet::MicrovmConfig,
    /// What QEMU calls itself.
    pub version: String,
    /// What a guest that was booted under KVM showed. None: not asked.
    pub kvm: Option<Result<Kvm, String>>,
}

/// What `ateom-microvm probe` says.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Kvm {
    /// Why QEMU does not use it; empty if it does.
    #[serde(default)]
    pub why_not_kvm: String,
    /// How long the guest took to its agent's first word, ms.
    #[serde(default)]
    pub boot_ms: u64,
}

/// Looks for everything that workers of the class need.
///
/// # Errors
/// A sentence naming the first thing that is missing and where it was looked for.
pub async fn find(named: Named<'_>, exe: &Path) -> Result<Microvm, String> {
    let qemu = match named.qemu {
        Some(path) => usable(path).map_err(|why| format!("--qemu names {}, {why}", path.display()))?,
        None => in_path(QEMU).ok_or_else(|| format!("{QEMU} was not found in PATH"))?,
    };
    let version = run(&qemu.display().to_string(), &["--version"])
        .await
        .map_err(|why| format!("{} does not say its version: {why}", qemu.display()))?;
    let version = version.lines().next().unwrap_or_default().replace("QEMU emulator version", "QEMU");
    let beside = exe.parent().map(|dir| dir.join(ATEOM)).filter(|path| is_executable(path));
    let ateom_binary = beside
        .or_else(|| in_path(ATEOM))
        .ok_or_else(|| format!("{ATEOM} is neither beside {} nor in PATH", exe.display()))?;
    let environment =
        std::env::var_os("SUBSTRATE_KERNEL").filter(|value| !value.is_empty()).map(PathBuf::from);
    let kernel = find_kernel(named.kernel, environment, exe)?;
    if in_path("mkfs.erofs").is_none() {
        return Err("mkfs.erofs was not found in PATH".to_owned());
    }
    let digest = sha256(&qemu).await.map_err(|error| format!("cannot read {}: {error}", qemu.display()))?;
    let config = atelet::MicrovmConfig {
        ateom_binary,
        qemu,
        qemu_sha256: Some(digest),
        kernel,
        accelerator: atelet::Accelerator::Auto,
    };
    Ok(Microvm { config, version, kvm: None })
}

/// Boots a guest under KVM, where it is offered; takes some seconds where that fails slowly.
pub async fn ask_of_kvm(found: &mut Microvm) {
    if !found.version.starts_with("QEMU") {
        return;
    }
    let config = &found.config;
    let path = |path: &Path| path.display().to_string();
    let args = ["probe", "--qemu", &path(&config.qemu), "--kernel", &path(&config.kernel)];
    let said = run_within(&path(&config.ateom_binary), &args, PROBE_LIMIT).await;
    found.kvm = Some(said.and_then(|said| {
        serde_json::from_str(said.trim()).map_err(|error| format!("{ATEOM} probe says no JSON: {error}"))
    }));
}

/// The directory with `vmlinuz` and `modules/`: named, `$SUBSTRATE_KERNEL`, in `target/tools` of a workspace, or
/// installed.
fn find_kernel(named: Option<&Path>, environment: Option<PathBuf>, exe: &Path) -> Result<PathBuf, String> {
    let is_one = |dir: &Path| dir.join("vmlinuz").is_file() && dir.join("modules/kernel").is_dir();
    let explicit = [("--kernel", named.map(Path::to_owned)), ("SUBSTRATE_KERNEL", environment)];
    if let Some((what, dir)) = explicit.into_iter().find_map(|(what, dir)| Some((what, dir?))) {
        let dir = dir.canonicalize().map_err(|error| format!("{what} names {}: {error}", dir.display()))?;
        return if is_one(&dir) {
            Ok(dir)
        } else {
            Err(format!("{what} names {}, which has no vmlinuz and modules/kernel", dir.display()))
        };
    }
    let mut places: Vec<PathBuf> = exe
        .ancestors()
        .filter(|dir| dir.file_name().is_some_and(|name| name == "target"))
        .map(|dir| dir.join("tools/microvm"))
        .collect();
    places.extend(workspace(exe).map(|root| root.join("target/tools/microvm")));
    places.push("/usr/lib/substrate/microvm".into());
    places.iter().find(|dir| is_one(dir)).cloned().ok_or_else(|| {
        let looked: Vec<String> = places.iter().map(|path| path.display().to_string()).collect();
        format!("no kernel for guests: not in {}", looked.join(", "))
    })
}

/// How guests of QEMU run.
fn accelerated(kvm: Option<&Result<Kvm, String>>) -> String {
    match kvm {
        None => String::new(),
        Some(Ok(kvm)) if kvm.why_not_kvm.is_empty() => {
            format!(" under KVM, where a guest booted in {} ms", kvm.boot_ms)
        }
        Some(Ok(kvm)) => format!(" by emulation (TCG), not under KVM: {}", kvm.why_not_kvm),
        Some(Err(why)) => format!("; whether guests run under KVM could not be found out: {why}"),
    }
}

/// Why the others are not used, or what is to be known of the one that was named.
fn others(version: &str) -> &'static str {
    if version.starts_with("Firecracker v") || version.starts_with("cloud-hypervisor v") {
        "; experimental: nobody has seen Linux boot under it in our tests, and it needs KVM and an ELF vmlinux"
    } else {
        "; cloud-hypervisor and Firecracker are experimental, and used only where --qemu names one"
    }
}

/// The class is a choice: what is missing is a warning.
pub fn check(facts: &Facts) -> Check {
    const NAME: &str = "microvm";
    match &facts.microvm {
        Ok(found) => Check::ok(
            NAME,
            format!(
                "{} at {}{}{}",
                found.version,
                found.config.qemu.display(),
                accelerated(found.kvm.as_ref()),
                others(&found.version)
            ),
        ),
        Err(why) => Check::with(
            Verdict::Warning,
            NAME,
            format!("workers of the class microvm cannot run: {why}"),
            match &facts.setup_script {
                Some(script) => script.display().to_string(),
                None => install(facts, "qemu-system-x86 erofs-utils"),
            },
        ),
    }
}

/// What a good machine has, for tests.
#[cfg(test)]
pub(super) fn sample() -> Microvm {
    Microvm {
        config: atelet::MicrovmConfig {
            ateom_binary: "/usr/local/bin/ateom-microvm".into(),
            qemu: "/usr/bin/qemu-system-x86_64".into(),
            qemu_sha256: None,
            kernel: "/usr/lib/substrate/microvm".into(),
            accelerator: atelet::Accelerator::Auto,
        },
        version: "QEMU 7.2.22".into(),
        kvm: Some(Ok(Kvm { why_not_kvm: "there is no /dev/kvm".into(), boot_ms: 0 })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_guests_run_is_said_with_the_reason() {
        let said = |text: &str| accelerated(Some(&Ok(serde_json::from_str(text).unwrap())));
        assert_eq!(
            said(r#"{"accelerator":"kvm","boot_ms":900}"#),
            " under KVM, where a guest booted in 900 ms"
        );
        let emulated = said(r#"{"accelerator":"tcg","why_not_kvm":"there is no /dev/kvm","boot_ms":0}"#);
        assert_eq!(emulated, " by emulation (TCG), not under KVM: there is no /dev/kvm");
        assert!(
            accelerated(Some(&Err("no such file".into()))).contains("could not be found out: no such file")
        );
        assert_eq!(accelerated(None), "");
        assert!(others("Firecracker v1.12.1").contains("nobody has seen Linux boot"));
        assert!(others("QEMU 7.2.22").contains("only where --qemu names one"));
    }

    #[test]
    fn a_kernel_is_a_directory_with_its_modules() {
        let dir = tempfile::tempdir().unwrap();
        let (kernel, exe) =
            (dir.path().join("target/tools/microvm"), dir.path().join("target/debug/substrate"));
        std::fs::create_dir_all(kernel.join("modules/kernel")).unwrap();
        let none = find_kernel(Some(&kernel), None, &exe).unwrap_err();
        assert!(none.contains("no vmlinuz"), "{none}");
        std::fs::write(kernel.join("vmlinuz"), "k").unwrap();
        assert_eq!(find_kernel(None, None, &exe).unwrap(), kernel);
        let missing = find_kernel(None, Some("/does/not/exist".into()), &exe).unwrap_err();
        assert!(missing.contains("SUBSTRATE_KERNEL") && missing.contains("/does/not/exist"), "{missing}");
    }
}

// SPDX-License-Identifier: Apache-2.0
//! How QEMU runs a guest's processors: KVM where a guest was seen to boot under it, emulation (TCG) elsewhere.
//!
//! ```text
//! auto ─▶ /dev/kvm opens? ──no─▶ TCG
//!               │ yes
//!         known of this boot, QEMU and kernel? ──yes─▶ as it was found then
//!               │ no
//!         a small machine with our kernel and init ─▶ its agent says hello in time? ─▶ KVM, else TCG
//! ```
//! That the device is there proves nothing: under some nested ones a machine of Linux stands still for ever. The
//! processor is the named, masked one in both cases; under KVM it must be there in full (`enforce`), so that a snapshot
//! means the same wherever it is restored.
use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use ateom_guest::{Frame, FromGuest};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::qemu::CPU;
use super::vmm::Kernel;
use super::{MicrovmError, process};
use crate::runtime::file_error;

/// How long a guest may take to its agent's first word; on hardware it takes a second.
const LIMIT: Duration = Duration::from_secs(15);
/// The probe's memory, MiB.
const MEMORY_MIB: u32 = 256;

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Wanted {
    /// KVM if it is proven, else TCG.
    #[default]
    Auto,
    /// KVM, or nothing.
    Kvm,
    /// Emulation.
    Tcg,
}

/// What runs a guest's processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// The host's kernel.
    Kvm,
    /// QEMU itself.
    Tcg,
}

impl Accelerator {
    /// As a snapshot's record and QEMU name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    /// QEMU's words for it and the processor.
    pub(super) fn arguments(self) -> [String; 4] {
        let (accel, cpu) = match self {
            Self::Kvm => ("kvm", format!("{CPU},enforce")),
            Self::Tcg => ("tcg,thread=multi,tb-size=32", CPU.to_owned()),
        };
        ["-accel".to_owned(), accel.to_owned(), "-cpu".to_owned(), cpu]
    }

    /// The kernel's, beside those of every guest.
    pub(super) fn kernel_arguments(self) -> &'static str {
        match self {
            Self::Kvm => "",
            // Measured under TCG, whose guest has no host to leak from: what mitigates only costs.
            Self::Tcg => " clocksource=hpet mitigations=off",
        }
    }
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What will be used.
    pub accelerator: Accelerator,
    /// Why it is not KVM. Empty if it is, or was not asked for.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub why_not_kvm: String,
    /// How long the probe took to its agent's first word, ms; 0 without one.
    #[serde(default)]
    pub boot_ms: u64,
}

impl Finding {
    /// Emulation, as it was asked for.
    pub fn emulation() -> Self {
        Self { accelerator: Accelerator::Tcg, why_not_kvm: String::new(), boot_ms: 0 }
    }
}

/// A QEMU and a kernel to be probed.
#[derive(Debug)]
pub struct Probe<'a> {
    /// QEMU.
    pub binary: &'a Path,
    /// Its machine type.
    pub machine: &'a str,
    /// What is booted.
    pub kernel: &'a Kernel,
    /// For its log and console; they stay.
    pub directory: &'a Path,
    /// The device.
    pub device: &'a Path,
}

/// A finding, and what it is of.
#[derive(Serialize, Deserialize)]
struct Known {
    of: String,
    finding: Finding,
}

impl Probe<'_> {
    /// Decides. `known` is a file of what was found before, shared by workers, and `of` what the finding is of: another
    /// boot of the host, QEMU or kernel is another. Runs a process: call before children are reaped elsewhere.
    ///
    /// # Errors
    /// [`MicrovmError::Unsuitable`] if KVM is wanted and not proven.
    pub fn choose(&self, wanted: Wanted, of: &str, known: Option<&Path>) -> Result<Finding, MicrovmError> {
        if wanted == Wanted::Tcg {
            return Ok(Finding::emulation());
        }
        let finding = match known {
            Some(path) => self.remembered(of, path)?,
            None => self.look(),
        };
        if wanted == Wanted::Kvm && finding.accelerator != Accelerator::Kvm {
            let lack = format!("cannot run guests under KVM: {}", finding.why_not_kvm);
            return Err(MicrovmError::Unsuitable { path: self.binary.to_owned(), lack });
        }
        Ok(finding)
    }

    fn remembered(&self, of: &str, path: &Path) -> Result<Finding, MicrovmError> {
        let lock = path.with_extension("lock");
        let file = File::create(&lock).map_err(file_error("create", &lock))?;
        // Until it is closed: the others find what the first one writes.
        let _held = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, error)| file_error("lock", &lock)(error.into()))?;
        let known = std::fs::read(path).ok().and_then(|text| serde_json::from_slice::<Known>(&text).ok());
        if let Some(known) = known.filter(|known| known.of == of) {
            return Ok(known.finding);
        }
        let known = Known { of: of.to_owned(), finding: self.look() };
        let text = serde_json::to_vec(&known).unwrap_or_default();
        let new = path.with_extension("new");
        std::fs::write(&new, text)
            .and_then(|()| std::fs::rename(&new, path))
            .map_err(file_error("write", path))?;
        Ok(known.finding)
    }

    fn look(&self) -> Finding {
        let begun = Instant::now();
        match self.boot() {
            Ok(()) => Finding {
                accelerator: Accelerator::Kvm,
                why_not_kvm: String::new(),
                boot_ms: begun.elapsed().as_millis() as u64,
            },
            Err(why_not_kvm) => Finding { why_not_kvm, ..Finding::emulation() },
        }
    }

    /// Boots a guest under KVM; the error says why none did.
    fn boot(&self) -> Result<(), String> {
        let device = self.device.display();
        File::options().read(true).write(true).open(self.device).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => format!("there is no {device}"),
            io::ErrorKind::PermissionDenied => {
                format!("{device} cannot be opened: {error}; run as root, or as a member of its group")
            }
            _ => format!("{device} cannot be opened: {error}"),
        })?;
        let (log, console) = (self.directory.join("probe.log"), self.directory.join("probe.console"));
        let said = File::create(&log).map_err(|error| format!("cannot create {}: {error}", log.display()))?;
        let mut child = Command::new(self.binary)
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-sandbox", "on,obsolete=deny,spawn=deny,resourcecontrol=deny"])
            .args(Accelerator::Kvm.arguments())
            .args(["-machine", &format!("{},vmport=off,smbus=off,sata=off,usb=off", self.machine)])
            .args(["-smp", "1", "-m", &format!("{MEMORY_MIB}M")])
            .arg("-kernel")
            .arg(&self.kernel.image)
            .arg("-initrd")
            .arg(&self.kernel.initramfs)
            .args(["-append", &super::qemu::kernel_command_line(Accelerator::Kvm)])
            .args(["-chardev", &format!("file,id=console,path={}", super::qemu::comma(&console))])
            .args(["-serial", "chardev:console", "-chardev", "stdio,id=agent,signal=off"])
            .args(["-device", "virtio-serial-pci,max_ports=2"])
            .args(["-device", &format!("virtserialport,chardev=agent,name={}", ateom_guest::PORT)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(said)
            .spawn()
            .map_err(|error| format!("cannot run {}: {error}", self.binary.display()))?;
        let (sender, hello) = mpsc::channel();
        if let Some(mut stream) = child.stdout.take() {
            // Ends with the process at the latest.
            std::thread::spawn(move || sender.send(Frame::read(&mut stream)));
        }
        let heard = hello.recv_timeout(LIMIT);
        if let Err(error) = child.kill() {
            tracing::warn!(%error, "cannot end the machine of the KVM probe");
        }
        let status = child.wait().map_err(|error| format!("the probe cannot be waited for: {error}"))?;
        match heard {
            Ok(Ok(frame)) => match serde_json::from_slice(&frame.payload) {
                Ok(FromGuest::Hello { .. }) => Ok(()),
                _ => Err("a guest booted under it, but its first word was no hello".to_owned()),
            },
            Ok(Err(_)) => {
                let said = std::fs::read_to_string(&log).unwrap_or_default();
                let last = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("nothing");
                Err(format!("a guest did not boot under it: QEMU ended with {status} and said {last}"))
            }
            Err(_) => {
                let words = process::last_words(&log, &console);
                Err(format!("a guest did not boot under it within {} s{words}", LIMIT.as_secs()))
            }
        }
    }
}

/// Writes what was found, as JSON on one line.
///
/// # Errors
/// The stream's.
pub fn print(finding: &Finding) -> io::Result<()> {
    let text = serde_json::to_string(finding)?;
    writeln!(io::stdout(), "{text}")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::PathBuf;

    use super::*;

    /// A program in QEMU's place: it counts its starts, and says what `script` says.
    fn bed(script: &str) -> (tempfile::TempDir, PathBuf, Kernel) {
        let dir = tempfile::tempdir().unwrap();
        let binary = dir.path().join("qemu");
        let text = format!("#!/bin/sh\necho start >> {}/starts\n{script}\n", dir.path().display());
        std::fs::write(&binary, text).unwrap();
        std::fs::set_permissions(&binary, std::fs::Permissions::from_mode(0o755)).unwrap();
        let kernel = Kernel { image: "/k".into(), initramfs: "/i".into() };
        (dir, binary, kernel)
    }

    fn hello(dir: &Path) -> String {
        let frame = Frame::control(&FromGuest::Hello { version: 1 }).unwrap();
        let mut bytes = Vec::new();
        frame.write(&mut bytes).unwrap();
        std::fs::write(dir.join("hello"), bytes).unwrap();
        format!("cat {}/hello; exec sleep 100", dir.display())
    }

    fn starts(dir: &Path) -> usize {
        std::fs::read_to_string(dir.join("starts")).unwrap_or_default().lines().count()
    }

    #[test]
    fn kvm_is_used_where_a_guest_said_hello_and_asked_about_once() {
        let (dir, binary, kernel) = bed("");
        let text = std::fs::read_to_string(&binary).unwrap();
        std::fs::write(&binary, format!("{text}{}\n", hello(dir.path()))).unwrap();
        let device = Path::new("/dev/null");
        let probe = Probe { binary: &binary, machine: "q35", kernel: &kernel, directory: dir.path(), device };
        let known = dir.path().join("known.json");
        for _ in 0..2 {
            let found = probe.choose(Wanted::Auto, "a", Some(&known)).unwrap();
            assert_eq!(found.accelerator, Accelerator::Kvm);
            assert_eq!(starts(dir.path()), 1);
        }
        // Of another kernel it says nothing.
        probe.choose(Wanted::Kvm, "b", Some(&known)).unwrap();
        assert_eq!(starts(dir.path()), 2);
        assert_eq!(probe.choose(Wanted::Tcg, "c", None).unwrap().accelerator, Accelerator::Tcg);
        assert_eq!(starts(dir.path()), 2, "nobody asked");
    }

    #[test]
    fn what_speaks_against_kvm_is_said() {
        let (dir, binary, kernel) = bed("echo 'kvm: no such feature' >&2; exit 1");
        let probe = |device| Probe {
            binary: &binary,
            machine: "q35",
            kernel: &kernel,
            directory: dir.path(),
            device,
        };
        let found = probe(Path::new("/dev/null")).choose(Wanted::Auto, "a", None).unwrap();
        assert_eq!(found.accelerator, Accelerator::Tcg);
        assert!(found.why_not_kvm.contains("no such feature"), "{found:?}");
        let none = probe(Path::new("/does/not/exist"));
        let found = none.choose(Wanted::Auto, "a", None).unwrap();
        assert_eq!(found.why_not_kvm, "there is no /does/not/exist");
        let error = none.choose(Wanted::Kvm, "a", None).unwrap_err().to_string();
        assert!(error.contains("cannot run guests under KVM: there is no"), "{error}");
        // Permission that root lacks too (kernfs gives EACCES where a file has no bit for writing).
        let forbidden = probe(Path::new("/sys/devices/system/cpu/online"));
        let found = forbidden.choose(Wanted::Auto, "a", None).unwrap();
        assert_eq!(found.accelerator, Accelerator::Tcg);
        let error = forbidden.choose(Wanted::Kvm, "a", None).unwrap_err().to_string();
        for said in [found.why_not_kvm, error] {
            assert!(said.contains("Permission denied") && said.contains("member of its group"), "{said}");
        }
        assert_eq!(starts(dir.path()), 1, "the other two are known without a guest");
    }
}

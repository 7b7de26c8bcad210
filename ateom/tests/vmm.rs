// SPDX-License-Identifier: Apache-2.0
//! The experimental machine monitors, each over its whole life cycle with a toy kernel: boot, stop, snapshot, kill,
//! restore in a new process, and the count goes on; three times.
//!
//! A Linux guest needs more of KVM than many nested machines have; the toy does not. It runs where a binary is named by
//! `SUBSTRATE_FIRECRACKER` or `SUBSTRATE_CLOUD_HYPERVISOR`, and is counted as ignored elsewhere.
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ateom::cgroup::{Cgroup, Hierarchy};
use ateom::children::Children;
use ateom::launcher::{self, Launcher};
use ateom::microvm::cloud_hypervisor::CloudHypervisor;
use ateom::microvm::firecracker::Firecracker;
use ateom::microvm::jail;
use ateom::microvm::spec::{Disk, Machine};
use ateom::microvm::vmm::{Home, Kernel, Vm, Vmm};
use ateom::network::{Link, LinkKind, build_actor_namespace, remove_link};
use ateom::runtime::Steps;

/// Where the toy is loaded and entered.
const ENTRY: u64 = 0x10_0000;
/// How long anything here may take.
const PATIENCE: Duration = Duration::from_mins(1);

/// 32-bit code that counts in memory at 2 MiB and says each count on COM1, as eight letters of a to p and a newline.
fn code() -> Vec<u8> {
    let mut code = vec![0xbc, 0x00, 0x00, 0x30, 0x00]; // mov esp, 0x300000
    let again = code.len();
    code.extend([0xa1, 0x00, 0x00, 0x20, 0x00]); // mov eax, [0x200000]
    code.extend([0x40]); // inc eax
    code.extend([0xa3, 0x00, 0x00, 0x20, 0x00]); // mov [0x200000], eax
    code.extend([0xb9, 0x08, 0x00, 0x00, 0x00]); // mov ecx, 8
    code.extend([0x66, 0xba, 0xf8, 0x03]); // mov dx, 0x3f8
    let digit = code.len();
    code.extend([0xc1, 0xc0, 0x04, 0x89, 0xc3]); // rol eax, 4; mov ebx, eax
    code.extend([0x80, 0xe3, 0x0f, 0x80, 0xc3, b'a']); // and bl, 15; add bl, 'a'
    code.extend([0x50, 0x88, 0xd8, 0xee, 0x58]); // push eax; mov al, bl; out dx, al; pop eax
    let back = digit as i64 - (code.len() as i64 + 2);
    code.extend([0xe2, back as u8]); // loop digit
    code.extend([0xb0, b'\n', 0xee]); // mov al, '\n'; out dx, al
    code.extend([0xb9, 0x00, 0x40, 0x00, 0x00]); // mov ecx, 0x4000
    code.extend([0x49, 0x75, 0xfd]); // dec ecx; jnz
    let back = again as i64 - (code.len() as i64 + 5);
    code.push(0xe9); // jmp again
    code.extend((back as i32).to_le_bytes());
    code
}

/// The toy as a kernel: an ELF file with a PVH entry (a note of the name "Xen" and type 18).
fn toy() -> Vec<u8> {
    const CODE_AT: u64 = 0x1000;
    const NOTE_AT: u64 = 64 + 2 * 56;
    let code = code();
    let mut note = Vec::new();
    for word in [4_u32, 8, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(ENTRY.to_le_bytes());
    // 64 bits, little-endian; an executable for x86-64.
    let mut elf = [&b"\x7fELF\x02\x01\x01"[..], &[0; 9]].concat();
    for half in [2_u16, 62] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(1_u32.to_le_bytes());
    for word in [ENTRY, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 2, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    // PT_LOAD, PT_NOTE; readable and executable.
    for (kind, at, address, size) in [(1_u32, CODE_AT, ENTRY, code.len()), (4, NOTE_AT, 0, note.len())] {
        elf.extend(kind.to_le_bytes());
        elf.extend(5_u32.to_le_bytes());
        for word in [at, address, address, size as u64, size as u64, 4] {
            elf.extend(word.to_le_bytes());
        }
    }
    elf.extend(note);
    elf.resize(CODE_AT as usize, 0);
    elf.extend(code);
    elf
}

/// Where one machine lives, and what ends it.
struct Nest {
    directory: PathBuf,
    cgroup: Cgroup,
    /// Holds the namespace.
    _link: ateom::network::Namespace,
}

async fn nest(
    root: &Path,
    number: u32,
    children: &Children,
    hierarchy: &Arc<Hierarchy>,
) -> Result<(Nest, Home)> {
    let directory = root.join(format!("m{number}"));
    std::fs::create_dir(&directory)?;
    let cgroup = Cgroup::create(hierarchy, &format!("substrate-test/vmm{}-{number}", std::process::id()))?;
    let launcher = Launcher::start(children, &cgroup).await?;
    let Link { namespace, tap } = build_actor_namespace(LinkKind::Tap).await?;
    let home = Home {
        directory: directory.clone(),
        memory: directory.clone(),
        launcher,
        network_namespace: namespace.path(),
        tap: tap.context("no tap")?,
    };
    Ok((Nest { directory, cgroup, _link: namespace }, home))
}

impl Nest {
    /// The counts that were said, in order. A monitor's own lines are between them.
    fn counts(&self) -> Vec<u32> {
        let text =
            ["console", "vmm.log"].map(|name| std::fs::read(self.directory.join(name)).unwrap_or_default());
        let text = String::from_utf8_lossy(&text.concat()).into_owned();
        let number = |line: &str| {
            let letters = line.len() == 8 && line.bytes().all(|byte| (b'a'..=b'p').contains(&byte));
            letters.then(|| line.bytes().fold(0, |sum, byte| sum * 16 + u32::from(byte - b'a')))
        };
        text.lines().filter_map(number).collect()
    }

    /// Waits until a machine has said some counts; returns all.
    async fn counted(&self, vm: &dyn Vm, at_least: usize) -> Result<Vec<u32>> {
        let watch = async {
            loop {
                let counts = self.counts();
                if counts.len() >= at_least {
                    return counts;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::select! {
            counted = tokio::time::timeout(PATIENCE, watch) => counted.context("it does not count"),
            why = vm.died() => anyhow::bail!("it died: {why}"),
        }
    }

    fn end(self) -> Result<()> {
        self.cgroup.kill_and_wait_empty(PATIENCE)?;
        Ok(self.cgroup.remove()?)
    }
}

async fn story(vmm: &dyn Vmm) -> Result<()> {
    let root = tempfile::tempdir()?;
    let disk = root.path().join("disk");
    std::fs::write(&disk, vec![7; 1 << 20])?;
    let disk = Disk { serial: "image0".into(), path: disk, read_only: true };
    let machine = Machine { memory: 64 << 20, processors: 1, network_modules: false, disks: vec![disk] };
    let (children, hierarchy) = (Children::reap()?, Hierarchy::detect()?);
    let steps = Steps::default();
    let (mut at, home) = nest(root.path(), 0, &children, &hierarchy).await?;
    let mut vm = vmm.boot(home, &machine, &steps).await?;
    ensure!(vm.agent().is_some() && vm.agent().is_none(), "the agent's stream is taken once");
    let counts = at.counted(&*vm, 3).await?;
    ensure!(counts.starts_with(&[1, 2, 3]), "{counts:?}");
    for cycle in 1..=3 {
        vm.pause().await?;
        let image = root.path().join(format!("image{cycle}"));
        std::fs::create_dir(&image)?;
        let saved = vm.snapshot(&image, false, &steps).await?;
        ensure!(saved.files.iter().filter(|file| file.memory).count() == 1, "{:?}", saved.files);
        for file in &saved.files {
            ensure!(std::fs::metadata(image.join(&file.name))?.len() == file.size, "{file:?}");
        }
        let last = *at.counts().last().context("no count")?;
        drop(vm);
        at.end()?;
        let (next, home) = nest(root.path(), cycle, &children, &hierarchy).await?;
        at = next;
        vm = vmm.restore(home, &machine, &image, &steps).await?;
        ensure!(at.counts().is_empty(), "it runs before it was let go on");
        vm.resume().await?;
        let counts = at.counted(&*vm, 3).await?;
        // A count may be half said when the processor stops.
        let first = counts[0];
        ensure!(first == last + 1 || first == last + 2, "cycle {cycle}: {last}, then {counts:?}");
        ensure!(counts.windows(2).all(|pair| pair[1] == pair[0] + 1), "cycle {cycle}: {counts:?}");
    }
    drop(vm);
    at.end()?;
    remove_link().await?;
    let took: Vec<String> =
        steps.take().iter().map(|step| format!("{}={:.0}", step.name, step.micros as f64 / 1000.0)).collect();
    println!("{} {}: ms {}", vmm.capabilities().name, vmm.capabilities().version, took.join(" "));
    Ok(())
}

type Make = fn(&Path, Kernel) -> Result<Box<dyn Vmm>>;

fn run(variable: &str, make: Make) -> Result<Option<String>> {
    let Some(binary) = std::env::var_os(variable).filter(|value| !value.is_empty()) else {
        return Ok(Some(format!("{variable} names no binary")));
    };
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        return Ok(Some(format!("/dev/kvm: {error}")));
    }
    let dir = tempfile::tempdir()?;
    let kernel = Kernel { image: dir.path().join("toy"), initramfs: dir.path().join("initramfs") };
    std::fs::write(&kernel.image, toy())?;
    std::fs::write(&kernel.initramfs, vec![0; 4096])?;
    let vmm = make(Path::new(&binary), kernel)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().worker_threads(2).build()?;
    runtime.block_on(async {
        tokio::time::timeout(PATIENCE * 2, story(&*vmm)).await.context("not done in time")?
    })?;
    Ok(None)
}

fn main() -> Result<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        Some(launcher::ARGUMENT) => {
            launcher::serve(&arguments.next().context("no control group")?)?;
            return Ok(ExitCode::SUCCESS);
        }
        Some(jail::ARGUMENT) => {
            jail::enter(arguments)?;
            return Ok(ExitCode::SUCCESS);
        }
        _ => {}
    }
    let filters: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let tests: [(&str, &str, Make); 2] = [
        ("firecracker_counts_on_over_three_lives", "SUBSTRATE_FIRECRACKER", |binary, kernel| {
            Ok(Box::new(Firecracker::new(binary, "test".into(), kernel)?))
        }),
        ("cloud_hypervisor_counts_on_over_three_lives", "SUBSTRATE_CLOUD_HYPERVISOR", |binary, kernel| {
            Ok(Box::new(CloudHypervisor::new(binary, "test".into(), kernel)?))
        }),
    ];
    let chosen = tests.into_iter().filter(|(name, _, _)| {
        filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()))
    });
    // Its link is not the system's.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).context("these tests need root")?;
    let (mut passed, mut failed, mut ignored) = (0, 0, 0);
    for (name, variable, make) in chosen {
        match run(variable, make) {
            Ok(None) => {
                passed += 1;
                println!("test {name} ... ok");
            }
            Ok(Some(why)) => {
                ignored += 1;
                println!("test {name} ... ignored, {why}");
            }
            Err(error) => {
                failed += 1;
                println!("test {name} ... FAILED: {error:#}");
            }
        }
    }
    let result = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {result}. {passed} passed; {failed} failed; {ignored} ignored; 0 measured; 0 filtered out"
    );
    std::io::stdout().flush()?;
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

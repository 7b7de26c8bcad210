// SPDX-License-Identifier: Apache-2.0
//! The initramfs: our init and the kernel modules that it loads, as an uncompressed cpio archive (a kernel need not
//! know any compression for it, and unpacking costs a guest's first second nothing).
//!
//! Modules come from the kernel's own directory. Their order is computed from what each says that it depends on
//! (`.modinfo`), because a package as it was unpacked has no `modules.dep` yet.
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

/// The init of every guest; see build.rs.
const INIT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/ateom-guest"));

/// What a guest needs; those that a kernel has built in are left out.
const WANTED: [&str; 7] =
    ["virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "virtio_balloon", "erofs", "overlay"];
/// What containers need that make networks of their own and filter them, as OpenShell's supervisor does in full; those that
/// a kernel has not at all are left out.
const NETWORK: [&str; 10] = [
    "veth",
    "nf_tables",
    "nft_ct",
    "nft_limit",
    "nft_log",
    "nf_log_syslog",
    "nft_reject_inet",
    "nft_chain_nat",
    "nft_nat",
    "nft_redir",
];
/// Longest name of a module's file extension that is known: plain and zstd (Ubuntu).
const KINDS: [&str; 2] = [".ko", ".ko.zst"];

/// Why there is no initramfs.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The kernel has no such module, neither built in.
    #[error(
        "kernel modules in {directory} lack {module}: use a kernel with virtio, EROFS and overlay support"
    )]
    Missing {
        /// Where was looked.
        directory: PathBuf,
        /// Which.
        module: String,
    },
}

/// The initramfs for the modules of `directory` (`…/lib/modules/VERSION`), with `more` than every guest needs.
///
/// # Errors
/// See [`InitramfsError`].
pub fn build(directory: &Path, more: &[&str]) -> Result<Vec<u8>, InitramfsError> {
    let mut archive = Archive::default();
    archive.directory("dev");
    archive.device("dev/console", 5, 1);
    archive.device("dev/null", 1, 3);
    let Modules { base, network } = modules(directory, more)?;
    for (place, modules) in [("modules", base), ("modules-network", network)] {
        archive.directory(place);
        for (number, (name, content)) in modules.into_iter().enumerate() {
            archive.file(&format!("{place}/{number:02}-{name}.ko"), &content, 0o644);
        }
    }
    archive.file("init", INIT, 0o755);
    Ok(archive.finish())
}

/// Modules by name, in the order in which they are to be loaded.
type Ordered = Vec<(String, Vec<u8>)>;

/// What a kernel has of what is wanted, with what it depends on.
#[derive(Debug)]
struct Modules {
    /// For every guest.
    base: Ordered,
    /// Beyond these, for networks.
    network: Ordered,
}

fn modules(directory: &Path, more: &[&str]) -> Result<Modules, InitramfsError> {
    let built_in: BTreeSet<String> = std::fs::read_to_string(directory.join("modules.builtin"))
        .unwrap_or_default()
        .lines()
        .filter_map(|line| module_name(Path::new(line)))
        .collect();
    let mut paths = BTreeMap::new();
    find(&directory.join("kernel"), &mut paths)?;
    let mut order = Vec::new();
    let mut seen = BTreeSet::new();
    for name in more.iter().copied().chain(WANTED) {
        visit(name, directory, &paths, &built_in, &mut seen, &mut order)?;
    }
    let base = std::mem::take(&mut order);
    for name in NETWORK {
        if paths.contains_key(name) || built_in.contains(name) {
            visit(name, directory, &paths, &built_in, &mut seen, &mut order)?;
        } else {
            tracing::warn!(module = name, "the guests' kernel lacks it: networks inside a guest are limited");
        }
    }
    Ok(Modules { base, network: order })
}

fn visit(
    name: &str,
    directory: &Path,
    paths: &BTreeMap<String, PathBuf>,
    built_in: &BTreeSet<String>,
    seen: &mut BTreeSet<String>,
    order: &mut Ordered,
) -> Result<(), InitramfsError> {
    if built_in.contains(name) || !seen.insert(name.to_owned()) {
        return Ok(());
    }
    let path = paths.get(name).ok_or_else(|| InitramfsError::Missing {
        directory: directory.to_owned(),
        module: name.to_owned(),
    })?;
    let failed = |source| InitramfsError::Read { path: path.clone(), source };
    let content = std::fs::read(path).map_err(failed)?;
    let content = if path.extension().is_some_and(|kind| kind == "zst") {
        zstd::decode_all(content.as_slice()).map_err(failed)?
    } else {
        content
    };
    for needed in dependencies(&content) {
        visit(&needed, directory, paths, built_in, seen, order)?;
    }
    order.push((name.to_owned(), content));
    Ok(())
}

/// What a module says it depends on: `depends=a,b` in its `.modinfo`, NUL-terminated.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let value = &module[start + KEY.len()..];
    let value = &value[..value.iter().position(|byte| *byte == 0).unwrap_or(0)];
    String::from_utf8_lossy(value)
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

/// A module's name as the kernel says it.
fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    KINDS.iter().find_map(|kind| file.strip_suffix(kind)).map(|name| name.replace('-', "_"))
}

fn find(directory: &Path, paths: &mut BTreeMap<String, PathBuf>) -> Result<(), InitramfsError> {
    let failed = |source| InitramfsError::Read { path: directory.to_owned(), source };
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let path = entry.path();
        if entry.file_type().map_err(failed)?.is_dir() {
            find(&path, paths)?;
        } else if let Some(name) = module_name(&path) {
            paths.insert(name, path);
        }
    }
    Ok(())
}

/// A cpio archive in the kernel's format ("newc", Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Debug, Default)]
struct Archive {
    bytes: Vec<u8>,
    inodes: u32,
}

impl Archive {
    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.inodes += 1;
        // Magic; inode, mode, uid, gid, links, mtime, size, device (2), represented device (2), name's length, sum.
        let fields = [
            self.inodes,
            mode,
            0,
            0,
            1,
            0,
            content.len() as u32,
            0,
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn directory(&mut self, name: &str) {
        self.entry(name, 0o40755, (0, 0), &[]);
    }

    fn device(&mut self, name: &str, major: u32, minor: u32) {
        self.entry(name, 0o20600, (major, minor), &[]);
    }

    fn file(&mut self, name: &str, content: &[u8], mode: u32) {
        self.entry(name, 0o100_000 | mode, (0, 0), content);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(depends: &str) -> Vec<u8> {
        format!("ELF…\0license=GPL\0depends={depends}\0name=x\0").into_bytes()
    }

    #[test]
    fn modules_follow_what_they_depend_on() {
        let dir = tempfile::tempdir().unwrap();
        let drivers = dir.path().join("kernel/drivers");
        std::fs::create_dir_all(&drivers).unwrap();
        std::fs::write(
            dir.path().join("modules.builtin"),
            "kernel/fs/overlayfs/overlay.ko\nkernel/lib/virtio.ko\n",
        )
        .unwrap();
        for (file, depends) in [
            ("virtio_pci", "virtio,virtio-ring"),
            ("virtio-ring", "virtio"),
            ("virtio_blk", "virtio_ring"),
            ("virtio_net", "virtio_ring,net_failover"),
            ("net_failover", ""),
            ("virtio_console", ""),
            ("virtio_balloon", ""),
            ("nf_tables", "nfnetlink"),
            ("nfnetlink", ""),
            ("nft_ct", "nf_tables,nf_conntrack,virtio_ring"),
            ("nf_conntrack", ""),
        ] {
            std::fs::write(drivers.join(format!("{file}.ko")), module(depends)).unwrap();
        }
        let error = build(dir.path(), &[]).unwrap_err().to_string();
        assert!(error.contains("lack erofs"), "{error}");
        std::fs::write(drivers.join("erofs.ko.zst"), zstd::encode_all(module("").as_slice(), 1).unwrap())
            .unwrap();
        let Modules { base: order, network } = modules(dir.path(), &[]).unwrap();
        let names: Vec<&str> = order.iter().map(|(name, _)| name.as_str()).collect();
        let of_network: Vec<&str> = network.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(of_network, ["nfnetlink", "nf_tables", "nf_conntrack", "nft_ct"], "what is there, once");
        assert_eq!(
            names,
            [
                "virtio_ring",
                "virtio_pci",
                "virtio_blk",
                "net_failover",
                "virtio_net",
                "virtio_console",
                "virtio_balloon",
                "erofs"
            ]
        );
        assert_eq!(order.last().unwrap().1, module(""), "what was compressed is not loaded compressed");
    }

    #[test]
    fn the_archive_is_what_cpio_reads() {
        let mut archive = Archive::default();
        archive.directory("d");
        archive.file("d/f", b"hello", 0o644);
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        // The second header begins right after the first one and its padded name.
        let second = 6 + 13 * 8 + 2;
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[second..second + 6], b"070701");
        let size = &bytes[second + 6 + 6 * 8..second + 6 + 7 * 8];
        assert_eq!(size, b"00000005");
        assert!(bytes.windows(10).any(|window| window == b"TRAILER!!!"));
    }
}

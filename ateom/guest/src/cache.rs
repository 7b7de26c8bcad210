// SPDX-License-Identifier: Apache-2.0
//! Gives the page cache back while no file is read or written.
//!
//! What the guest reads from its disks and writes to its volumes stays in its memory as long as there is room, and its
//! memory is the snapshot: a volume would be stored twice. So once the disks have been quiet for a moment, clean pages
//! are dropped (proc_sys_vm(5), `drop_caches`), and the kernel reports the free memory to the VMM (free page reporting,
//! Documentation/mm/free_page_reporting.rst, within some seconds), which gives it back. What is read again comes from
//! the host's own cache.
use std::time::Duration;

/// How long disks are quiet first, and how often that is looked at.
const QUIET: Duration = Duration::from_secs(2);
/// Page cache that is left alone, KiB.
const KEPT_KIB: u64 = 16 << 10;

/// Looks for as long as the machine runs.
pub fn give_back() {
    let (mut before, mut dropped) = (None, None);
    loop {
        std::thread::sleep(QUIET);
        let (Ok(meminfo), Ok(vmstat)) =
            (std::fs::read_to_string("/proc/meminfo"), std::fs::read_to_string("/proc/vmstat"))
        else {
            return crate::say("cannot read how much of the memory is page cache; it is not given back");
        };
        let moved = Some((number(&vmstat, "pgpgin"), number(&vmstat, "pgpgout")));
        // After a drop, what is left is in use; it is tried again once something was read or written.
        if moved == before && moved != dropped && droppable_kib(&meminfo) > KEPT_KIB {
            if let Err(error) = std::fs::write("/proc/sys/vm/drop_caches", "1") {
                return crate::say(&format!("cannot give page cache back: {error}"));
            }
            dropped = moved;
        }
        before = moved;
    }
}

/// Page cache of files on disks that is written, KiB.
fn droppable_kib(meminfo: &str) -> u64 {
    let kib = |name| number(meminfo, name);
    (kib("Cached:") + kib("Buffers:")).saturating_sub(kib("Shmem:") + kib("Dirty:") + kib("Writeback:"))
}

/// The number on the line that begins with a word; 0 if there is none.
fn number(text: &str, name: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_memory_and_what_is_not_written_yet_stay() {
        let text = "MemFree: 7 kB\nBuffers:  5 kB\nCached:   100 kB\nSwapCached: 9 kB\nDirty: 3 kB\nWriteback: 2 kB\n\
                    Shmem:  40 kB\n";
        assert_eq!(droppable_kib(text), 60);
        assert_eq!(droppable_kib("Cached: 1 kB\nShmem: 4 kB\n"), 0);
        assert_eq!(number("pgpgin 12\npgpgout 34\n", "pgpgout"), 34);
    }
}

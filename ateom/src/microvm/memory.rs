// SPDX-License-Identifier: Apache-2.0
//! A guest's memory as a file: copies that leave out holes and zeros, the file system in memory where it is live, and
//! what a machine that maps a file privately has written.
//!
//! **Private memory.** A page that was written through a private mapping of a file is the process's own: anonymous, or
//! swapped. `/proc/PID/pagemap` says so of each page without any help of the kernel's build or of the VMM
//! (Documentation/admin-guide/mm/pagemap.rst: bits 61 to 63), and process_vm_readv(2) reads it. So what a machine has
//! written since it was restored is known at the moment it stands still, and is all that has to be copied before it
//! goes on ([`Private::copy_dirty`]); the other pages are those of the file, which nobody changes ([`Rest`]).
//!
//! **Shared memory** of a machine that was booted changes under a copy. Where the kernel tells which pages were written
//! since they were last asked for (PAGEMAP_SCAN, Linux 6.7), almost all is copied before it stands still, and then only
//! what it has written meanwhile ([`Ahead`]).
use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::mount::{MsFlags, mount};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::{Pid, Whence, lseek64};

use crate::sys::{self, Region};

/// Bytes of a piece that one thread copies at a time.
const PIECE: u64 = 1 << 20;
/// Bytes that are left out when they are zero; a page.
const GRAIN: usize = 4096;
/// Pieces that one call reads at most (IOV_MAX of Linux).
const PIECES: usize = 1024;
/// Room on the file system in memory beside the guest's own, bytes: console, its inodes.
const BESIDE: u64 = 4 << 20;

/// Mounts a file system in memory for a guest of `bytes`; it goes with its directory.
///
/// # Errors
/// When the system refuses.
pub fn mount_memory(directory: &Path, bytes: u64) -> io::Result<PathBuf> {
    let path = directory.join("memory");
    std::fs::create_dir(&path)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let options = format!("size={},mode=0711", bytes + BESIDE);
    mount(Some("substrate-memory"), &path, Some("tmpfs"), flags, Some(options.as_str()))?;
    Ok(path)
}

/// A new sparse file.
///
/// # Errors
/// When the system refuses.
pub fn create(path: &Path, bytes: u64) -> io::Result<File> {
    let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    file.set_len(bytes)?;
    Ok(file)
}

/// Copies the data of a file of `size` bytes to a new one of the same size on `threads` threads; returns how many
/// bytes were written. Pages of zeros, holes and the pages of `except` become holes.
///
/// # Errors
/// A read or write that failed; the file's being shorter than `size` is one.
pub fn copy_sparse(
    from: &File,
    to: &File,
    size: u64,
    except: Option<&Pages>,
    threads: usize,
) -> io::Result<u64> {
    if from.metadata()?.len() < size {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let (next, written) = (AtomicU64::new(0), AtomicU64::new(0));
    let work = || -> io::Result<()> {
        let mut buffer = vec![0; PIECE as usize];
        loop {
            let start = next.fetch_add(PIECE, Ordering::Relaxed);
            if start >= size {
                return Ok(());
            }
            let end = size.min(start + PIECE);
            // SEEK_DATA does not depend on the shared offset, and pread and pwrite do not move it.
            let mut at = match lseek64(from, start as i64, Whence::SeekData) {
                Ok(data) if (data as u64) < end => data as u64,
                Ok(_) | Err(Errno::ENXIO) => continue,
                Err(Errno::EINVAL) => start,
                Err(errno) => return Err(errno.into()),
            };
            let bytes = &mut buffer[..(end - at) as usize];
            from.read_exact_at(bytes, at)?;
            let mut rest = &bytes[..];
            let left_out = |at: u64, grain: &[u8]| {
                is_zero(grain) || except.is_some_and(|pages| pages.contains(at / GRAIN as u64))
            };
            while !rest.is_empty() {
                let holes = grains(rest, at, true, left_out);
                at += holes as u64;
                rest = &rest[holes..];
                let data = grains(rest, at, false, left_out);
                to.write_all_at(&rest[..data], at)?;
                written.fetch_add(data as u64, Ordering::Relaxed);
                at += data as u64;
                rest = &rest[data..];
            }
        }
    };
    on_threads(threads, &work)?;
    Ok(written.into_inner())
}

/// Does the same work on several threads, which share it out among themselves.
fn on_threads(threads: usize, work: &(impl Fn() -> io::Result<()> + Sync)) -> io::Result<()> {
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads.max(1)).map(|_| scope.spawn(work)).collect();
        let mut result = work();
        for thread in others {
            let ended = thread.join().unwrap_or_else(|_| Err(io::Error::other("a copying thread panicked")));
            result = result.and(ended);
        }
        result
    })
}

fn is_zero(grain: &[u8]) -> bool {
    // Compared with itself one further: memcmp is as fast as memory is.
    grain[0] == 0 && grain[..grain.len() - 1] == grain[1..]
}

/// Bytes of the leading grains, the first of which is at `at`, that are all left out, or are not.
fn grains(bytes: &[u8], at: u64, wanted: bool, left_out: impl Fn(u64, &[u8]) -> bool) -> usize {
    let grains = (0_u64..).step_by(GRAIN).zip(bytes.chunks(GRAIN));
    grains
        .take_while(|(offset, grain)| left_out(at + offset, grain) == wanted)
        .map(|(_, grain)| grain.len())
        .sum()
}

/// Threads that copying may use.
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |count| count.get().min(4))
}

/// A set of pages.
#[derive(Debug, Clone, Default)]
pub struct Pages(Vec<u64>);

impl Pages {
    fn insert(&mut self, page: u64) {
        let word = (page / 64) as usize;
        if word >= self.0.len() {
            self.0.resize(word + 1, 0);
        }
        self.0[word] |= 1 << (page % 64);
    }

    fn contains(&self, page: u64) -> bool {
        self.0.get((page / 64) as usize).is_some_and(|word| word & (1 << (page % 64)) != 0)
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum::<u64>() * GRAIN as u64
    }
}

/// A stretch of a file in a process's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stretch {
    address: u64,
    offset: u64,
    length: u64,
}

/// The mappings of a file in `/proc/PID/maps`, which are to be private, or shared.
fn stretches(maps: &str, inode: u64, shared: bool) -> io::Result<Vec<Stretch>> {
    let mut found = Vec::new();
    for line in maps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(range), Some(access), Some(offset), Some(_), Some(own)) =
            (words.next(), words.next(), words.next(), words.next(), words.next())
        else {
            continue;
        };
        if own.parse() != Ok(inode) {
            continue;
        }
        match (access.ends_with('s'), shared) {
            (true, false) => return Err(io::Error::other("it maps the file shared, and would write to it")),
            (false, true) => return Err(io::Error::other("it maps the file privately")),
            _ => {}
        }
        let hex = |text: &str| u64::from_str_radix(text, 16).map_err(io::Error::other);
        let (start, end) = range.split_once('-').ok_or(io::ErrorKind::InvalidData)?;
        let address = hex(start)?;
        found.push(Stretch { address, offset: hex(offset)?, length: hex(end)? - address });
    }
    Ok(found)
}

/// A process that maps a file privately as a guest's memory.
#[derive(Debug, Clone)]
pub struct Private {
    pid: i32,
    base: Arc<File>,
    size: u64,
    stretches: Vec<Stretch>,
}

/// Swapped or present, and neither of a file nor shared.
fn is_own(entry: u64) -> bool {
    entry >> 62 & 1 == 1 || entry >> 61 & 0b101 == 0b100
}

impl Private {
    /// Finds the mapping.
    ///
    /// # Errors
    /// When the process does not map all of it, or not privately.
    pub fn find(pid: i32, base: File, size: u64) -> io::Result<Self> {
        use std::os::unix::fs::MetadataExt as _;
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let stretches = stretches(&maps, base.metadata()?.ino(), false)?;
        let mapped: u64 = stretches.iter().map(|stretch| stretch.length).sum();
        if mapped != size {
            return Err(io::Error::other(format!("it maps {mapped} of {size} bytes")));
        }
        Ok(Self { pid, base: Arc::new(base), size, stretches })
    }

    /// Copies what the process has written, `room` bytes of it into our own memory, which is quicker, and what is more
    /// to a file, which is as long as the memory. What is left to be done then does not need the process.
    ///
    /// # Errors
    /// A read or write that failed.
    pub fn copy_dirty(&self, to: File, room: u64, threads: usize) -> io::Result<Rest> {
        let (pages, mut pieces) = self.written()?;
        let mut held = 0;
        let own = pieces.iter().take_while(|piece| {
            held += piece.length;
            held <= room
        });
        let direct = pieces.split_off(own.count());
        let held = self.hold(pieces, threads)?;
        let memory = File::open(format!("/proc/{}/mem", self.pid))?;
        let next = AtomicUsize::new(0);
        let work = || -> io::Result<()> {
            let mut buffer = vec![0; PIECE as usize];
            while let Some(piece) = direct.get(next.fetch_add(1, Ordering::Relaxed)) {
                let bytes = &mut buffer[..piece.length as usize];
                memory.read_exact_at(bytes, piece.address)?;
                write_data(&to, bytes, piece.offset)?;
            }
            Ok(())
        };
        on_threads(if direct.is_empty() { 1 } else { threads }, &work)?;
        Ok(Rest { from: Arc::clone(&self.base), except: pages, held, to, size: self.size })
    }

    /// Which pages it has written, and where they are.
    fn written(&self) -> io::Result<(Pages, Vec<Piece>)> {
        let pagemap = File::open(format!("/proc/{}/pagemap", self.pid))?;
        let mut pages = Pages::default();
        let mut pieces: Vec<Piece> = Vec::new();
        let mut entries = vec![0; PIECE as usize / GRAIN * 8];
        for stretch in &self.stretches {
            for start in (0..stretch.length).step_by(PIECE as usize) {
                let length = PIECE.min(stretch.length - start);
                let entries = &mut entries[..length as usize / GRAIN * 8];
                pagemap.read_exact_at(entries, (stretch.address + start) / GRAIN as u64 * 8)?;
                for (at, entry) in (start..).step_by(GRAIN).zip(entries.chunks_exact(8)) {
                    if !is_own(u64::from_ne_bytes(entry.try_into().unwrap_or_default())) {
                        continue;
                    }
                    let (address, offset) = (stretch.address + at, stretch.offset + at);
                    pages.insert(offset / GRAIN as u64);
                    match pieces.last_mut() {
                        Some(last) if last.address + last.length == address && last.length < PIECE => {
                            last.length += GRAIN as u64;
                        }
                        _ => pieces.push(Piece { address, offset, length: GRAIN as u64 }),
                    }
                }
            }
        }
        Ok((pages, pieces))
    }

    /// Reads pieces into our memory.
    fn hold(&self, pieces: Vec<Piece>, threads: usize) -> io::Result<Held> {
        let length: u64 = pieces.iter().map(|piece| piece.length).sum();
        let mut bytes = vec![0; length as usize];
        let mut jobs = Vec::new();
        let mut rest = &mut bytes[..];
        for some in pieces.chunks(PIECES) {
            let (own, others) = rest.split_at_mut(some.iter().map(|piece| piece.length as usize).sum());
            rest = others;
            jobs.push((some, own));
        }
        let jobs = Mutex::new(jobs);
        let work = || -> io::Result<()> {
            loop {
                let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).pop();
                let Some((some, own)) = job else { return Ok(()) };
                self.read(some, own)?;
            }
        };
        on_threads(threads, &work)?;
        drop(jobs);
        Ok(Held { bytes, pieces })
    }

    /// Reads pieces, one after the other, into a buffer as long as all of them.
    fn read(&self, pieces: &[Piece], buffer: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            let mut skip = done;
            let left = pieces.iter().filter_map(|piece| {
                let length = piece.length as usize;
                let (base, len) = (piece.address as usize + skip.min(length), length - skip.min(length));
                skip -= skip.min(length);
                (len > 0).then_some(RemoteIoVec { base, len })
            });
            let left: Vec<_> = left.collect();
            let mut local = [io::IoSliceMut::new(&mut buffer[done..])];
            match process_vm_readv(Pid::from_raw(self.pid), &mut local, &left)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => done += read,
            }
        }
        Ok(())
    }
}

/// Pages in a row.
#[derive(Debug, Clone, Copy)]
struct Piece {
    /// In the process.
    address: u64,
    /// In the file.
    offset: u64,
    /// Bytes.
    length: u64,
}

/// Pieces that were read, one after the other.
#[derive(Debug, Default)]
struct Held {
    bytes: Vec<u8>,
    pieces: Vec<Piece>,
}

/// Writes bytes at an offset of a file of holes; pages of zeros stay holes.
fn write_data(to: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    let mut at = 0;
    while at < bytes.len() {
        at += grains(&bytes[at..], 0, true, |_, grain| is_zero(grain));
        let data = grains(&bytes[at..], 0, false, |_, grain| is_zero(grain));
        to.write_all_at(&bytes[at..at + data], offset + at as u64)?;
        at += data;
    }
    Ok(())
}

/// A copy of a file that a process maps shared and writes to, which comes to be complete when the process stands still.
#[derive(Debug)]
pub struct Ahead {
    pagemap: File,
    stretches: Vec<Stretch>,
    from: File,
    to: File,
    size: u64,
}

impl Ahead {
    /// Copies all of a file of `size` bytes, then what was written to it meanwhile.
    ///
    /// # Errors
    /// As [`sys::written`], where it cannot be told what is written; a read or write that failed.
    pub fn begin(pid: i32, from: File, to: File, size: u64) -> io::Result<Self> {
        use std::os::unix::fs::MetadataExt as _;
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let stretches = stretches(&maps, from.metadata()?.ino(), true)?;
        let mapped: u64 = stretches.iter().map(|stretch| stretch.length).sum();
        if mapped != size {
            return Err(io::Error::other(format!("it maps {mapped} of {size} bytes")));
        }
        let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
        let copy = Self { pagemap, stretches, from, to, size };
        // From here on what is written is noted; what was before does not count.
        copy.written()?;
        copy_sparse(&copy.from, &copy.to, size, None, threads())?;
        copy.catch_up()?;
        Ok(copy)
    }

    /// Copies what was written since; the process stands still. Returns how many bytes that were.
    ///
    /// # Errors
    /// A read or write that failed.
    pub fn finish(self) -> io::Result<u64> {
        let bytes = self.catch_up()?;
        // What was given back reads as zeros now and may be taken for them, but giving back is not writing.
        let mut at = 0;
        while at < self.size {
            let seek = |file, from: u64, whence| match lseek64(file, from as i64, whence) {
                Err(Errno::ENXIO) => Ok(self.size),
                other => other.map(|found| found as u64),
            };
            let hole = seek(&self.from, at, Whence::SeekHole)?;
            let end = seek(&self.from, hole, Whence::SeekData)?;
            if hole < end && seek(&self.to, hole, Whence::SeekData)? < end {
                let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                fallocate(&self.to, punch, hole as i64, (end - hole) as i64)?;
            }
            at = end;
        }
        Ok(bytes)
    }

    /// Offset and length in the file of what was written since this was last asked.
    fn written(&self) -> io::Result<Vec<(u64, u64)>> {
        let mut found = Vec::new();
        let mut regions = vec![Region::default(); 1024];
        for stretch in &self.stretches {
            let (mut at, end) = (stretch.address, stretch.address + stretch.length);
            while at < end {
                let (filled, reached) = sys::written(self.pagemap.as_fd(), at, end, &mut regions)?;
                let offset = |address: u64| address - stretch.address + stretch.offset;
                found.extend(regions[..filled].iter().map(|one| (offset(one.start), one.end - one.start)));
                if reached <= at {
                    return Err(io::Error::other("the kernel does not look further"));
                }
                at = reached;
            }
        }
        Ok(found)
    }

    fn catch_up(&self) -> io::Result<u64> {
        let written = self.written()?;
        let pieces: Vec<(u64, u64)> = (written.iter())
            .flat_map(|&(offset, length)| {
                let end = offset + length;
                (offset..end).step_by(PIECE as usize).map(move |at| (at, PIECE.min(end - at)))
            })
            .collect();
        let next = AtomicUsize::new(0);
        on_threads(threads(), &|| {
            let mut buffer = vec![0; PIECE as usize];
            while let Some((offset, length)) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                let bytes = &mut buffer[..*length as usize];
                self.from.read_exact_at(bytes, *offset)?;
                // Zeros too: there may be something else in the copy.
                self.to.write_all_at(bytes, *offset)?;
            }
            Ok(())
        })?;
        Ok(pieces.iter().map(|(_, length)| length).sum())
    }
}

/// What is still to be copied into a snapshot's memory: what is held, and the rest of a file that nobody changes
/// meanwhile.
#[derive(Debug)]
pub struct Rest {
    from: Arc<File>,
    except: Pages,
    held: Held,
    to: File,
    size: u64,
}

impl Rest {
    /// All of a file.
    pub fn of(from: File, to: File, size: u64) -> Self {
        Self { from: Arc::new(from), except: Pages::default(), held: Held::default(), to, size }
    }

    /// Bytes of the pages that the machine had written.
    pub fn dirty(&self) -> u64 {
        self.except.bytes()
    }

    /// Copies it; returns how many bytes of the file were written.
    ///
    /// # Errors
    /// A read or write that failed.
    pub fn copy(&self) -> io::Result<u64> {
        let mut bytes = &self.held.bytes[..];
        for piece in &self.held.pieces {
            let (own, others) = bytes.split_at(piece.length as usize);
            bytes = others;
            write_data(&self.to, own, piece.offset)?;
        }
        copy_sparse(&self.from, &self.to, self.size, Some(&self.except), threads())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn copies_are_complete_and_keep_no_zeros() {
        let size = 5 * PIECE + 4096;
        let from = tempfile::tempfile().unwrap();
        from.set_len(size).unwrap();
        for (at, byte) in [(0, 1), (4095, 2), (PIECE - 1, 3), (3 * PIECE + 8192, 4), (size - 1, 5)] {
            from.write_all_at(&[byte], at).unwrap();
        }
        // Written zeros take room in the source.
        from.write_all_at(&vec![0; 1 << 20], 2 * PIECE).unwrap();
        let to = tempfile::tempfile().unwrap();
        to.set_len(size).unwrap();
        let written = copy_sparse(&from, &to, size, None, 3).unwrap();
        assert_eq!(written, 4 * 4096, "pages with data, the first of which holds two bytes");
        let read = |file: &File| {
            let mut bytes = vec![0; size as usize];
            file.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        assert!(read(&from) == read(&to));
        assert!(to.metadata().unwrap().blocks() < from.metadata().unwrap().blocks());
    }

    #[test]
    fn a_truncated_file_is_an_error() {
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        from.set_len(PIECE).unwrap();
        assert_eq!(
            copy_sparse(&from, &to, PIECE + 1, None, 2).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }
    #[test]
    fn pages_that_were_written_meanwhile_are_not_overwritten() {
        let size = 64 * GRAIN as u64;
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        from.write_all_at(&vec![1; size as usize], 0).unwrap();
        to.set_len(size).unwrap();
        let mut except = Pages::default();
        for page in [0, 7, 8, 63] {
            except.insert(page);
        }
        // Page 7 became zeros: a hole, which has to stay one.
        to.write_all_at(&[2; GRAIN], 8 * GRAIN as u64).unwrap();
        assert_eq!(except.bytes(), 4 * GRAIN as u64);
        let held = Held::default();
        let rest = Rest { from: Arc::new(from), except, held, to, size };
        assert_eq!(rest.copy().unwrap(), 60 * GRAIN as u64);
        let page = |number: u64| {
            let mut bytes = [9; GRAIN];
            rest.to.read_exact_at(&mut bytes, number * GRAIN as u64).unwrap();
            assert!(bytes.iter().all(|byte| *byte == bytes[0]));
            bytes[0]
        };
        assert_eq!([0, 1, 6, 7, 8, 9, 62, 63].map(page), [0, 1, 1, 0, 2, 1, 1, 0]);
    }

    #[test]
    fn what_a_process_has_written_is_held_or_copied_and_the_rest_follows() {
        let pages = 3000;
        let size = pages * GRAIN;
        let base = tempfile::tempfile().unwrap();
        base.write_all_at(&vec![1; size], 0).unwrap();
        // Memory of our own that nobody has touched, as the process's.
        let mut memory = vec![0_u8; size + GRAIN];
        let skip = (memory.as_ptr() as usize).next_multiple_of(GRAIN) - memory.as_ptr() as usize;
        let address = memory.as_ptr() as u64 + skip as u64;
        let touched: Vec<usize> = (5..9).chain((20..pages).step_by(2)).collect();
        for page in &touched {
            let at = skip + page * GRAIN;
            memory[at..at + GRAIN].fill((page % 250 + 2) as u8);
        }
        let private = Private {
            pid: std::process::id() as i32,
            base: Arc::new(base),
            size: size as u64,
            stretches: vec![Stretch { address, offset: 0, length: size as u64 }],
        };
        for room in [0, 700 * GRAIN, 2 * size] {
            let to = tempfile::tempfile().unwrap();
            to.set_len(size as u64).unwrap();
            let rest = private.copy_dirty(to, room as u64, 2).unwrap();
            assert!(rest.held.bytes.len() <= room && rest.dirty() >= (touched.len() * GRAIN) as u64);
            assert_eq!(rest.held.bytes.is_empty(), room == 0);
            rest.copy().unwrap();
            let mut copied = vec![0; size];
            rest.to.read_exact_at(&mut copied, 0).unwrap();
            for (page, found) in copied.chunks(GRAIN).enumerate() {
                // The kernel may have made whole huge pages ours.
                let is_own = rest.except.contains(page as u64);
                assert!(is_own || !touched.contains(&page), "page {page} was written");
                let own = &memory[skip + page * GRAIN..][..GRAIN];
                assert!(found == if is_own { own } else { &[1; GRAIN] }, "page {page} with room for {room}");
            }
        }
    }

    #[test]
    fn mappings_are_read_and_shared_ones_refused() {
        let maps = "7f0000000000-7f0000200000 rw-p 00000000 fe:00 42 /s/memory\n\
                    7f0000200000-7f0000201000 rw-p 00000000 00:00 0\n\
                    7f0000300000-7f0000400000 rw-p 00200000 fe:00 42 /s/memory (deleted)\n";
        let found = stretches(maps, 42, false).unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!(found[1], Stretch { address: 0x7f00_0030_0000, offset: 0x20_0000, length: 0x10_0000 });
        let shared = maps.replace("rw-p 00200000", "rw-s 00200000");
        assert!(stretches(&shared, 42, false).unwrap_err().to_string().contains("shared"));
        assert!(stretches(&shared, 42, true).unwrap_err().to_string().contains("privately"));
        assert_eq!(stretches(&maps.replace("rw-p", "rw-s"), 42, true).unwrap(), found);
        assert!(is_own(1 << 63) && is_own(1 << 62) && !is_own(1 << 63 | 1 << 61) && !is_own(0));
    }
}

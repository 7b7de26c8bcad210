// SPDX-License-Identifier: Apache-2.0
//! The digest of a whole file: SHA-256 over the SHA-256 of each of its 1 MiB pieces.
//!
//! One SHA-256 over a file runs on one core; pieces run on all. A piece that lies wholly in a hole is not read: the
//! digest of 1 MiB of zeros is known. The same file always has the same digest, however sparse it is.
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};
use sha2::{Digest as _, Sha256};

/// A SHA-256.
pub type Sha = [u8; 32];

/// Bytes of a piece.
pub const PIECE: u64 = 1 << 20;

/// SHA-256 of bytes.
pub fn sha256(content: &[u8]) -> Sha {
    Sha256::digest(content).into()
}

fn zero_piece() -> &'static Sha {
    static ZERO: OnceLock<Sha> = OnceLock::new();
    ZERO.get_or_init(|| sha256(&vec![0; PIECE as usize]))
}

/// Where data may be in `start..end`: the part from the first to the last byte that is not in a hole, `None` when all
/// of it is a hole. A filesystem without holes answers that all is data.
pub fn data_extent(file: &File, start: u64, end: u64) -> io::Result<Option<std::ops::Range<u64>>> {
    match lseek64(file, start as i64, Whence::SeekData) {
        Ok(first) if (first as u64) < end => {
            let first = first as u64;
            // Only the beginning is trimmed: finding the last hole would take a call for each extent.
            Ok(Some(first..end))
        }
        Ok(_) | Err(Errno::ENXIO) => Ok(None),
        Err(Errno::EINVAL) => Ok(Some(start..end)),
        Err(errno) => Err(errno.into()),
    }
}

/// Digest of a file of `size` bytes, computed on up to `threads` threads. The calling one works too.
///
/// # Errors
/// A read that failed; the file's being shorter than `size` is one.
pub fn of_file(file: &File, size: u64, threads: usize) -> io::Result<Sha> {
    let count = size.div_ceil(PIECE);
    let mut pieces = vec![[0_u8; 32]; count as usize];
    let next = AtomicU64::new(0);
    let work = || -> io::Result<Vec<(u64, Sha)>> {
        let mut buffer = vec![0; PIECE.min(size) as usize];
        let mut done = Vec::new();
        loop {
            let piece = next.fetch_add(1, Ordering::Relaxed);
            if piece >= count {
                return Ok(done);
            }
            let start = piece * PIECE;
            let end = size.min(start + PIECE);
            // Each piece has an lseek of its own file offset; the threads share the descriptor, which is fine:
            // SEEK_DATA does not depend on the offset and pread does not move it.
            let digest = if end - start == PIECE && data_extent(file, start, end)?.is_none() {
                // A hole that reaches beyond the end of the file would hide a truncation.
                if file.metadata()?.len() < end {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                *zero_piece()
            } else {
                let buffer = &mut buffer[..(end - start) as usize];
                file.read_exact_at(buffer, start)?;
                sha256(buffer)
            };
            done.push((piece, digest));
        }
    };
    let threads = threads.clamp(1, count.max(1) as usize);
    let found = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut all = vec![work()];
        all.extend(others.into_iter().map(|thread| {
            thread.join().unwrap_or_else(|_| Err(io::Error::other("a hashing thread panicked")))
        }));
        all
    });
    for part in found {
        for (piece, digest) in part? {
            pieces[piece as usize] = digest;
        }
    }
    Ok(sha256(pieces.as_flattened()))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn plain(content: &[u8]) -> Sha {
        let pieces: Vec<u8> = content.chunks(PIECE as usize).flat_map(sha256).collect();
        sha256(&pieces)
    }

    #[test]
    fn holes_and_zeros_have_the_same_digest() {
        let size = 5 * PIECE + 12_345;
        let mut content = vec![0_u8; size as usize];
        content[(3 * PIECE + 7) as usize] = 9;
        let mut dense = tempfile::tempfile().unwrap();
        dense.write_all(&content).unwrap();
        let sparse = tempfile::tempfile().unwrap();
        sparse.set_len(size).unwrap();
        sparse.write_all_at(&[9], 3 * PIECE + 7).unwrap();
        for threads in [1, 4, 64] {
            assert_eq!(of_file(&dense, size, threads).unwrap(), plain(&content));
            assert_eq!(of_file(&sparse, size, threads).unwrap(), plain(&content));
        }
        assert_eq!(of_file(&dense, 0, 2).unwrap(), sha256(&[]));
        sparse.write_all_at(&[1], PIECE).unwrap();
        assert_ne!(of_file(&sparse, size, 2).unwrap(), plain(&content));
    }

    #[test]
    fn a_shorter_file_is_an_error_also_when_it_is_a_hole() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(PIECE).unwrap();
        assert!(of_file(&file, 2 * PIECE, 2).is_err());
        assert!(of_file(&file, PIECE + 1, 2).is_err());
        assert!(of_file(&file, PIECE, 2).is_ok());
    }
}

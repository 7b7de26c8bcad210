// SPDX-License-Identifier: Apache-2.0
//! From a layer's blob to a verified directory.
//!
//! The blob is hashed as it is read and again after decompression, while its members are placed by [`super::tree`].
//! Nothing is known to be true until the end: the caller gives an empty temporary directory and makes it visible only
//! after this returns. A stream that breaks is read to its end all the same, so that a corrupt blob is called corrupt
//! and not a malformed archive.
//!
//! The compression is told by the first bytes. zstd windows are limited to 128 MiB, the default of its own tool.
use std::io::{self, BufRead, BufReader, Read, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use super::error::ImageError;
use super::reference::Digest;
use super::tarball::{Kind, TarError, Tarball};
use super::tree::{Finished, PlaceError, Placed, Tree, finish_file};

/// What images may cost.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Compressed bytes of one image, default 32 GiB.
    pub image_bytes: u64,
    /// Uncompressed bytes of one layer, and the apparent size of each file in it, default 32 GiB.
    pub layer_bytes: u64,
    /// Files, directories and links of one layer, and members of its archive, default 1,000,000.
    pub layer_inodes: u64,
    /// Time to unpack one layer, default 20 min.
    pub layer_time: Duration,
    /// Time for a whole image from the first request to its mount, default 60 min.
    pub image_time: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            image_bytes: 32 << 30,
            layer_bytes: 32 << 30,
            layer_inodes: 1_000_000,
            layer_time: Duration::from_mins(20),
            image_time: Duration::from_hours(1),
        }
    }
}

/// What a blob must turn out to be.
#[derive(Debug, Clone)]
pub(super) struct Expected {
    /// Digest of the blob as stored.
    pub blob: Digest,
    /// Its size, bytes.
    pub size: u64,
    /// Digest of the uncompressed archive.
    pub diff_id: Digest,
    /// Where it comes from, for messages.
    pub source: String,
}

/// A verified tree.
#[derive(Debug)]
pub(super) struct Extracted {
    /// Disk space, bytes: data and a block per inode.
    pub bytes: u64,
    pub tree: Finished,
}

/// When to stop: at a deadline, or when nobody wants the result any more.
#[derive(Debug, Clone)]
struct Until {
    deadline: Instant,
    cancel: CancellationToken,
}

/// Hashes and counts what passes; stops at a limit and when it is told to.
struct Meter<R> {
    inner: R,
    hash: Sha256,
    count: u64,
    limit: u64,
    until: Until,
}

/// Marks the errors that a [`Meter`] raises itself.
#[derive(Debug, Clone, Copy, thiserror::Error)]
enum Stop {
    #[error("too many bytes")]
    TooLarge,
    #[error("too slow")]
    TooSlow,
    #[error("given up")]
    Cancelled,
}

impl<R: Read> Meter<R> {
    fn new(inner: R, limit: u64, until: Until) -> Self {
        Self { inner, hash: Sha256::new(), count: 0, limit, until }
    }

    fn digest(&self) -> Digest {
        Digest::from_hash(self.hash.clone().finalize().into())
    }
}

impl<R: Read> Read for Meter<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hash.update(&buffer[..read]);
        self.count += read as u64;
        if self.count > self.limit {
            return Err(io::Error::other(Stop::TooLarge));
        }
        if Instant::now() > self.until.deadline {
            return Err(io::Error::other(Stop::TooSlow));
        }
        if self.until.cancel.is_cancelled() {
            return Err(io::Error::other(Stop::Cancelled));
        }
        Ok(read)
    }
}

/// Hashes a blob without unpacking it: proof that its source has it. `diff_id` is computed too if `unpack` is set.
pub(super) fn verify(
    blob: impl Read,
    expected: &Expected,
    limits: &Limits,
    unpack: bool,
    cancel: &CancellationToken,
) -> Result<(), ImageError> {
    let until = Until { deadline: Instant::now() + limits.layer_time, cancel: cancel.clone() };
    let mut outer = Meter::new(blob, expected.size, until.clone());
    let result = if unpack {
        decoder(BufReader::with_capacity(1 << 17, &mut outer)).and_then(|plain| {
            let mut inner = Meter::new(plain, limits.layer_bytes, until);
            io::copy(&mut inner, &mut io::sink())?;
            Ok(Some(inner.digest()))
        })
    } else {
        Ok(None)
    };
    check_blob(&mut outer, expected, limits)?;
    match result {
        Ok(None) => Ok(()),
        Ok(Some(found)) => check_diff_id(&found, expected),
        Err(error) => Err(unreadable(&error, expected, limits)),
    }
}

/// Unpacks a blob into the empty directory `target`. `progress` gets the compressed bytes read so far.
pub(super) fn extract(
    blob: impl Read,
    expected: &Expected,
    limits: &Limits,
    target: &Path,
    progress: &dyn Fn(u64),
    cancel: &CancellationToken,
) -> Result<Extracted, ImageError> {
    let until = Until { deadline: Instant::now() + limits.layer_time, cancel: cancel.clone() };
    let mut outer = Meter::new(Reporting { inner: blob, count: 0, progress }, expected.size, until.clone());
    let result = unpack(BufReader::with_capacity(1 << 17, &mut outer), expected, limits, until, target);
    check_blob(&mut outer, expected, limits)?;
    let (extracted, found) = result?;
    check_diff_id(&found, expected)?;
    Ok(extracted)
}

/// Unpacks an archive of the administrators' (plain, gzip or zstd), whose bytes are known to be right, into the new
/// directory `target`, by the rules for layers.
pub(crate) fn unpack_archive(archive: &Path, target: &Path) -> Result<(), String> {
    let text = |error: io::Error| format!("{}: {error}", archive.display());
    let open = || std::fs::File::open(archive).map_err(text);
    let mut blob = Sha256::new();
    let size = io::copy(&mut open()?, &mut blob).map_err(text)?;
    let mut plain = Sha256::new();
    let mut decoded = decoder(BufReader::with_capacity(1 << 17, open()?)).map_err(text)?;
    io::copy(&mut decoded, &mut plain).map_err(text)?;
    let expected = Expected {
        blob: Digest::from_hash(blob.finalize().into()),
        size,
        diff_id: Digest::from_hash(plain.finalize().into()),
        source: archive.display().to_string(),
    };
    std::fs::create_dir(target).map_err(text)?;
    let cancel = CancellationToken::new();
    extract(open()?, &expected, &Limits::default(), target, &|_| {}, &cancel)
        .map(drop)
        .map_err(|error| error.to_string())
}

struct Reporting<'a, R> {
    inner: R,
    count: u64,
    progress: &'a dyn Fn(u64),
}

impl<R: Read> Read for Reporting<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.count += read as u64;
        (self.progress)(self.count);
        Ok(read)
    }
}

/// Reads the rest of the blob and compares it with what it must be.
fn check_blob(outer: &mut Meter<impl Read>, expected: &Expected, limits: &Limits) -> Result<(), ImageError> {
    let rest = io::copy(outer, &mut io::sink());
    let corrupt = |reason: String| ImageError::Corrupt {
        what: format!("layer blob {} from {}", expected.blob, expected.source),
        reason,
    };
    match rest {
        Ok(_) => {}
        Err(error) => match stop(&error) {
            Some(Stop::TooLarge) => {
                return Err(corrupt(format!(
                    "it is longer than the {} bytes of its manifest",
                    expected.size
                )));
            }
            _ => return Err(unreadable(&error, expected, limits)),
        },
    }
    if outer.count != expected.size {
        return Err(corrupt(format!(
            "it has {} bytes instead of the {} of its manifest",
            outer.count, expected.size
        )));
    }
    let found = outer.digest();
    if found != expected.blob {
        return Err(corrupt(format!("its content has digest {found}")));
    }
    Ok(())
}

fn check_diff_id(found: &Digest, expected: &Expected) -> Result<(), ImageError> {
    if *found == expected.diff_id {
        return Ok(());
    }
    Err(ImageError::Corrupt {
        what: format!("layer blob {} from {}", expected.blob, expected.source),
        reason: format!(
            "uncompressed it has digest {found} instead of the {} of the image's configuration",
            expected.diff_id
        ),
    })
}

fn stop(error: &io::Error) -> Option<Stop> {
    error.get_ref().and_then(|inner| inner.downcast_ref::<Stop>()).copied()
}

fn unreadable(error: &io::Error, expected: &Expected, limits: &Limits) -> ImageError {
    match stop(error) {
        Some(Stop::TooLarge) => ImageError::TooLarge {
            what: format!("layer {}", expected.diff_id),
            limit: format!("{} bytes uncompressed", limits.layer_bytes),
        },
        Some(Stop::TooSlow) => ImageError::TimedOut {
            what: format!("unpacking layer {}", expected.diff_id),
            after: limits.layer_time,
        },
        Some(Stop::Cancelled) => ImageError::Internal {
            what: format!("unpacking layer {}", expected.diff_id),
            reason: "it was given up, another layer of the image failed".into(),
        },
        None => ImageError::Corrupt {
            what: format!("layer blob {} from {}", expected.blob, expected.source),
            reason: format!("it cannot be uncompressed: {error}"),
        },
    }
}

fn decoder<'a>(mut blob: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let head = blob.fill_buf()?;
    if head.starts_with(&[0x1f, 0x8b]) {
        return Ok(Box::new(flate2::bufread::MultiGzDecoder::new(blob)));
    }
    if head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(blob)?;
        decoder.window_log_max(27)?;
        return Ok(Box::new(decoder));
    }
    Ok(Box::new(blob))
}

fn unpack(
    blob: impl BufRead,
    expected: &Expected,
    limits: &Limits,
    until: Until,
    target: &Path,
) -> Result<(Extracted, Digest), ImageError> {
    let io = |error: io::Error| ImageError::io(format!("unpack layer {}", expected.diff_id), target, error);
    let broken = |near: &str, reason: &str| ImageError::Refused {
        layer: expected.diff_id.to_string(),
        entry: near.to_owned(),
        reason: format!("the archive is malformed near it: {reason}"),
    };
    let tar = |error: TarError| match error {
        TarError::Format { near, reason } => broken(&near, &reason),
        TarError::Io(error) => unreadable(&error, expected, limits),
    };
    let plain = decoder(blob).map_err(|error| unreadable(&error, expected, limits))?;
    let mut archive = Tarball::new(Meter::new(plain, limits.layer_bytes, until));
    let mut tree = Tree::new(target).map_err(io)?;
    let (mut members, mut bytes) = (0_u64, 0_u64);
    let mut buffer = vec![0; 128 << 10];
    while let Some(member) = archive.next_member().map_err(tar)? {
        members += 1;
        let entry = || String::from_utf8_lossy(&member.path).chars().take(200).collect::<String>();
        let place = |error: PlaceError| match error {
            PlaceError::Refused(reason) => {
                ImageError::Refused { layer: expected.diff_id.to_string(), entry: entry(), reason }
            }
            PlaceError::Io(error) => {
                ImageError::io(format!("unpack `{}` of layer {}", entry(), expected.diff_id), target, error)
            }
        };
        if members.max(tree.inodes()) > limits.layer_inodes {
            return Err(ImageError::TooLarge {
                what: format!("layer {}", expected.diff_id),
                limit: format!("{} files and directories", limits.layer_inodes),
            });
        }
        if member.kind == Kind::File && member.size > limits.layer_bytes {
            return Err(ImageError::TooLarge {
                what: format!("file `{}` of layer {}", entry(), expected.diff_id),
                limit: format!("{} bytes", limits.layer_bytes),
            });
        }
        let Placed::File(mut file) = tree.place(&member).map_err(place)? else { continue };
        let write = |error: io::Error| place(PlaceError::Io(error));
        if let Some(pieces) = &member.pieces {
            file.set_len(member.size).map_err(write)?;
            for &(offset, length) in pieces {
                let mut at = offset;
                while at < offset + length {
                    let most = usize::try_from(offset + length - at).unwrap_or(usize::MAX).min(buffer.len());
                    let read = archive.read_data(&mut buffer[..most]).map_err(tar)?;
                    if read == 0 {
                        return Err(broken(&entry(), "a sparse file ends early"));
                    }
                    file.write_all_at(&buffer[..read], at).map_err(write)?;
                    at += read as u64;
                    bytes += read as u64;
                }
            }
        } else {
            loop {
                let read = archive.read_data(&mut buffer).map_err(tar)?;
                if read == 0 {
                    break;
                }
                file.write_all(&buffer[..read]).map_err(write)?;
            }
            bytes += member.size.next_multiple_of(4096);
        }
        finish_file(&file, &member).map_err(place)?;
    }
    // The digest is of everything, also of what comes after the end of the archive.
    let mut meter = archive.into_inner();
    io::copy(&mut meter, &mut io::sink()).map_err(|error| unreadable(&error, expected, limits))?;
    let found = meter.digest();
    if found != expected.diff_id {
        // Not worth the flushing of the disk.
        check_diff_id(&found, expected)?;
    }
    let tree = tree.finish().map_err(io)?;
    Ok((Extracted { bytes: bytes + tree.inodes * 4096, tree }, found))
}

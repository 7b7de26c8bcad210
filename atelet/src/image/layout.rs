// SPDX-License-Identifier: Apache-2.0
//! OCI image layouts: a directory, or a tar file of one.
//!
//! A layout is someone else's: its files are opened beneath its root (no link leads out), only regular files are
//! read, and every byte is checked against its digest by whoever reads it. Archives are indexed by their headers and
//! read in place.
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::error::ImageError;
use super::reference::{Digest, Reference, Source};
use super::spec::{Descriptor, Document, MAX_MANIFEST, Platform, parse_document, select};

/// Most members of an archive that are indexed.
const MAX_MEMBERS: usize = 10_000;

/// An open layout.
#[derive(Debug)]
pub(super) struct Layout {
    name: String,
    files: Files,
}

#[derive(Debug)]
enum Files {
    Directory(File),
    /// Offset and length of each regular member.
    Archive {
        path: PathBuf,
        members: HashMap<String, (u64, u64)>,
    },
}

impl Layout {
    /// Opens the layout of a reference.
    ///
    /// # Errors
    /// [`ImageError::NotFound`] where there is none, [`ImageError::Denied`] where it cannot be read,
    /// [`ImageError::Unsupported`] where it is something else.
    pub fn open(source: &Source, atespace: &str) -> Result<Self, ImageError> {
        let name = source.to_string();
        let (path, files) = match source {
            Source::Registry(_) => {
                return Err(ImageError::Internal {
                    what: format!("opening {name}"),
                    reason: "a registry is no layout".into(),
                });
            }
            Source::Layout(path) => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                (path, rustix::fs::open(path, flags, Mode::empty()).map(|fd| Files::Directory(fd.into())))
            }
            Source::Archive(path) => {
                (path, Ok(Files::Archive { path: path.clone(), members: HashMap::new() }))
            }
        };
        let mut layout =
            Self { files: files.map_err(|error| unreadable(&name, atespace, path, &error.into()))?, name };
        if let Files::Archive { path, members } = &mut layout.files {
            let mut file =
                open_regular(path).map_err(|error| unreadable(&layout.name, atespace, path, &error))?;
            *members = index(&mut file).map_err(|reason| ImageError::Unsupported {
                what: layout.name.clone(),
                reason: format!("it is not a plain tar file of an OCI image layout ({reason})"),
            })?;
        }
        if let Err(error) = layout.open_file("oci-layout") {
            return Err(match error.kind() {
                io::ErrorKind::NotFound => ImageError::Unsupported {
                    what: layout.name,
                    reason: "it has no file `oci-layout`: it is not an OCI image layout".into(),
                },
                _ => unreadable(&layout.name, atespace, path, &error),
            });
        }
        Ok(layout)
    }

    /// The manifest or index that the reference means.
    pub fn manifest(
        &self,
        reference: &Reference,
        platform: &Platform,
    ) -> Result<(Vec<u8>, Digest), ImageError> {
        let digest = match &reference.digest {
            Some(digest) => digest.clone(),
            None => self.find(reference, platform)?,
        };
        let bytes = self.small(&digest, None, MAX_MANIFEST)?;
        Ok((bytes, digest))
    }

    /// Looks a tag up in `index.json`.
    fn find(&self, reference: &Reference, platform: &Platform) -> Result<Digest, ImageError> {
        let what = format!("index.json of {}", self.name);
        let bytes = self.read("index.json", MAX_MANIFEST, &what)?;
        let Document::Index(manifests) = parse_document(&bytes, &what)? else {
            return Err(ImageError::Unsupported { what, reason: "it is not an index".into() });
        };
        let Some(tag) = &reference.tag else {
            return match manifests.as_slice() {
                [] => Err(not_found(reference, "its index is empty")),
                [only] => Ok(only.digest.clone()),
                _ if manifests.iter().all(|entry| entry.tag().is_none()) => {
                    select(&manifests, platform, &self.name).map(|entry| entry.digest.clone())
                }
                _ => Err(not_found(reference, &format!("it holds several, name one: {}", tags(&manifests)))),
            };
        };
        let tagged: Vec<Descriptor> =
            manifests.iter().filter(|entry| entry.tag() == Some(tag.as_str())).cloned().collect();
        match tagged.as_slice() {
            [] => Err(not_found(reference, &format!("it has no tag `{tag}`, but: {}", tags(&manifests)))),
            [only] => Ok(only.digest.clone()),
            several => select(several, platform, &self.name).map(|entry| entry.digest.clone()),
        }
    }

    /// A small blob, verified. `size` is checked where it is known.
    pub fn small(&self, digest: &Digest, size: Option<u64>, limit: u64) -> Result<Vec<u8>, ImageError> {
        let what = format!("blob {digest} of {}", self.name);
        let bytes = self.read(&blob_path(digest), limit, &what)?;
        let found = Digest::of(&bytes);
        if found != *digest || size.is_some_and(|size| size != bytes.len() as u64) {
            return Err(ImageError::Corrupt {
                what,
                reason: format!("the file has {} bytes with digest {found}", bytes.len()),
            });
        }
        Ok(bytes)
    }

    /// Opens a blob to be read and verified by the caller.
    pub fn blob(&self, digest: &Digest) -> Result<Box<dyn Read + Send>, ImageError> {
        let what = format!("blob {digest} of {}", self.name);
        self.open_file(&blob_path(digest))
            .map(|(file, length)| Box::new(file.take(length)) as Box<dyn Read + Send>)
            .map_err(|error| missing(&what, error))
    }

    fn read(&self, path: &str, limit: u64, what: &str) -> Result<Vec<u8>, ImageError> {
        let (file, length) = self.open_file(path).map_err(|error| missing(what, error))?;
        let mut bytes = Vec::new();
        file.take(length.min(limit + 1)).read_to_end(&mut bytes).map_err(|error| missing(what, error))?;
        if bytes.len() as u64 > limit {
            return Err(ImageError::TooLarge { what: what.to_owned(), limit: format!("{limit} bytes") });
        }
        Ok(bytes)
    }

    /// A file positioned at the content, and its length.
    fn open_file(&self, path: &str) -> io::Result<(File, u64)> {
        match &self.files {
            Files::Directory(root) => {
                // Not blocking: a FIFO in place of a file must not hang the node.
                let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
                let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
                let fd = rustix::fs::openat2(root, path, flags, Mode::empty(), resolve)?;
                regular(fd.into())
            }
            Files::Archive { path: archive, members } => {
                let &(offset, length) =
                    members.get(path).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
                let mut file = open_regular(archive)?;
                file.seek(SeekFrom::Start(offset))?;
                Ok((file, length))
            }
        }
    }
}

fn not_found(reference: &Reference, reason: &str) -> ImageError {
    ImageError::NotFound { image: reference.to_string(), reason: format!("the layout was read, {reason}") }
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn tags(manifests: &[Descriptor]) -> String {
    let mut tags: Vec<&str> = manifests.iter().filter_map(Descriptor::tag).take(20).collect();
    tags.sort_unstable();
    if tags.is_empty() { "(no tags)".into() } else { tags.join(", ") }
}

fn open_regular(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    Ok(regular(rustix::fs::open(path, flags, Mode::empty())?.into())?.0)
}

fn regular(file: File) -> io::Result<(File, u64)> {
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    let length = meta.len();
    Ok((file, length))
}

fn missing(what: &str, error: io::Error) -> ImageError {
    if error.kind() == io::ErrorKind::NotFound {
        return ImageError::NotFound {
            image: what.to_owned(),
            reason: "the layout does not contain it: it is incomplete, write it again".into(),
        };
    }
    ImageError::Io { what: format!("read {what}"), source: error.into() }
}

fn unreadable(name: &str, atespace: &str, path: &Path, error: &io::Error) -> ImageError {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => ImageError::NotFound {
            image: name.to_owned(),
            reason: format!("there is no {} ({error})", path.display()),
        },
        _ => ImageError::Denied {
            atespace: atespace.to_owned(),
            image: name.to_owned(),
            reason: format!("{} cannot be read: {error}", path.display()),
        },
    }
}

/// Finds the regular members of an archive by their headers.
fn index(file: &mut File) -> Result<HashMap<String, (u64, u64)>, String> {
    let mut magic = [0; 4];
    let mut head = &*file;
    if head.read_exact(&mut magic).is_ok()
        && (magic[..2] == [0x1f, 0x8b] || magic == [0x28, 0xb5, 0x2f, 0xfd])
    {
        return Err("it is compressed: unpack it with gunzip or zstd first".into());
    }
    file.rewind().map_err(|error| error.to_string())?;
    let mut archive = tar::Archive::new(file);
    let mut members = HashMap::new();
    // Raw: the crate's own handling of long names reads them without a limit, and layouts have none.
    for member in archive.entries_with_seek().map_err(|error| error.to_string())?.raw(true) {
        let member = member.map_err(|error| error.to_string())?;
        if !member.header().entry_type().is_file() {
            continue;
        }
        if members.len() >= MAX_MEMBERS {
            return Err(format!("it has more than {MAX_MEMBERS} members"));
        }
        let name = String::from_utf8_lossy(&member.path_bytes()).trim_start_matches("./").to_owned();
        members.insert(name, (member.raw_file_position(), member.size()));
    }
    Ok(members)
}

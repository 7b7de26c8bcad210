// SPDX-License-Identifier: Apache-2.0
//! From a backup into an empty directory.
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Component, Path, PathBuf};

use super::{BackupError, DATABASE, Entry, FORMAT, INDEX, Index, Progress, STAGING, at, files};
use crate::secrets::Sealer;

/// Largest index that is read, bytes: some millions of files.
const MAX_INDEX: u64 = 1 << 30;
/// The parts that move into place, the database last: without it there is no control plane.
const PARTS: [&str; 3] = ["blobs", "keys", "control"];

/// Restores into `dir`, which has to be absent or empty; `keys` is where the keys are when the backup has none.
pub async fn restore(
    from: &Path,
    dir: &Path,
    keys: Option<&Path>,
    progress: Progress<'_>,
) -> Result<Index, BackupError> {
    if !files::is_empty(dir)? {
        return Err(BackupError::NotEmpty {
            path: dir.to_owned(),
            way_out: "restore into a new directory; what is there is left alone",
        });
    }
    let staging = dir.join(STAGING);
    let index = tokio::task::block_in_place(|| -> Result<Index, BackupError> {
        let meta = std::fs::metadata(from).map_err(at("read", from))?;
        if meta.is_dir() {
            let index = read_index(from)?;
            check(&index, from, keys)?;
            files::make_dir(&staging)?;
            unpack_directory(from, &index, &staging, progress)?;
            Ok(index)
        } else {
            files::make_dir(&staging)?;
            let index = unpack_archive(from, meta.len(), &staging, progress)?;
            check(&index, from, keys)?;
            Ok(index)
        }
    })?;
    if !index.has_keys
        && let Some(keys) = keys
    {
        let mut plan = Vec::new();
        files::list(keys, "keys", &mut plan)?;
        for file in &plan {
            if let Some((open, _)) = file.open()? {
                files::copy(open, &file.path, &staging.join(&file.path), &mut |_| {})?;
            }
        }
    }
    let database = staging.join(DATABASE);
    crate::store::check_copy(&database).await?;
    let schema = crate::store::schema_of(&database).await?;
    newer("schema", schema, crate::store::known_schema())?;
    check_keys(&staging, &database).await?;
    crate::store::begin_new_history(&database).await?;
    files::sync_tree(&staging)?;
    for part in PARTS {
        let (old, new) = (staging.join(part), dir.join(part));
        match std::fs::rename(&old, &new) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other.map_err(at("move into place", &new))?,
        }
        files::sync_dir(dir)?;
    }
    std::fs::remove_dir_all(&staging).map_err(at("remove", &staging))?;
    files::sync_dir(dir)?;
    Ok(index)
}

fn newer(what: &'static str, found: i64, known: i64) -> Result<(), BackupError> {
    if found > known { Err(BackupError::Newer { what, found, known }) } else { Ok(()) }
}

fn parse(from: &Path, text: &[u8]) -> Result<Index, BackupError> {
    serde_json::from_slice(text).map_err(|error| BackupError::Incomplete {
        path: from.to_owned(),
        reason: format!("its {INDEX} is not understood: {error}"),
    })
}

fn read_index(from: &Path) -> Result<Index, BackupError> {
    let path = from.join(INDEX);
    match std::fs::read(&path) {
        Ok(text) => parse(from, &text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(BackupError::Incomplete {
            path: from.to_owned(),
            reason: format!("it has no {INDEX}, which is written last"),
        }),
        Err(error) => Err(at("read", &path)(error)),
    }
}

fn check(index: &Index, from: &Path, keys: Option<&Path>) -> Result<(), BackupError> {
    newer("format", i64::from(index.format), i64::from(FORMAT))?;
    newer("schema", index.schema, crate::store::known_schema())?;
    if !index.has_keys && keys.is_none() {
        return Err(BackupError::NoKeys);
    }
    let places: BTreeSet<&str> = index.files.iter().map(|file| file.path.as_str()).collect();
    if !places.contains(DATABASE) || places.len() != index.files.len() {
        let reason = "its index names no database, or a file twice".to_owned();
        return Err(BackupError::Incomplete { path: from.to_owned(), reason });
    }
    Ok(())
}

/// A place inside the backup, never outside.
fn place(path: &str) -> Result<PathBuf, BackupError> {
    let plain = Path::new(path);
    let inside = plain.components().all(|part| matches!(part, Component::Normal(_)));
    let known =
        plain.components().next().is_some_and(|first| PARTS.iter().any(|it| first.as_os_str() == *it));
    if inside && known && plain.components().count() > 1 {
        Ok(plain.to_owned())
    } else {
        Err(BackupError::Damaged { file: path.to_owned(), reason: "it is no place of a backup".to_owned() })
    }
}

fn compare(expected: &Entry, found: &Entry) -> Result<(), BackupError> {
    let damaged = |reason: String| Err(BackupError::Damaged { file: expected.path.clone(), reason });
    if expected.size != found.size {
        return damaged(format!("it has {} bytes, not {}", found.size, expected.size));
    }
    if expected.sha256 != found.sha256 {
        return damaged("its SHA-256 is not the recorded one".to_owned());
    }
    Ok(())
}

fn unpack_directory(
    from: &Path,
    index: &Index,
    staging: &Path,
    progress: Progress<'_>,
) -> Result<(), BackupError> {
    let (total, mut sum) = (index.bytes(), 0);
    for entry in &index.files {
        let place = place(&entry.path)?;
        let source = from.join(&place);
        let file = File::open(&source)
            .map_err(|error| BackupError::Damaged { file: entry.path.clone(), reason: error.to_string() })?;
        let mut told = |bytes: u64| {
            sum += bytes;
            progress(sum, total);
        };
        let found = files::copy(file, &entry.path, &staging.join(&place), &mut told)?;
        compare(entry, &found)?;
    }
    Ok(())
}

fn unpack_archive(
    from: &Path,
    total: u64,
    staging: &Path,
    progress: Progress<'_>,
) -> Result<Index, BackupError> {
    let incomplete = |reason: String| BackupError::Incomplete { path: from.to_owned(), reason };
    let broken = |error: io::Error| incomplete(format!("the archive cannot be read: {error}"));
    let file = File::open(from).map_err(at("read", from))?;
    let mut archive = tar::Archive::new(BufReader::with_capacity(1 << 20, file));
    let mut found: BTreeMap<String, Entry> = BTreeMap::new();
    let mut index = None;
    let mut sum = 0;
    for entry in archive.entries().map_err(broken)? {
        let entry = entry.map_err(broken)?;
        let path = entry.path().map_err(broken)?.to_string_lossy().into_owned();
        if !entry.header().entry_type().is_file() {
            return Err(BackupError::Damaged { file: path, reason: "it is no regular file".to_owned() });
        }
        if path == INDEX {
            let mut text = Vec::new();
            entry.take(MAX_INDEX).read_to_end(&mut text).map_err(broken)?;
            index = Some(parse(from, &text)?);
            break;
        }
        let place = place(&path)?;
        let mut told = |bytes: u64| {
            sum += bytes;
            progress(sum, total);
        };
        let copied = files::copy(entry, &path, &staging.join(&place), &mut told)?;
        found.insert(path, copied);
    }
    let index = index.ok_or_else(|| incomplete(format!("it has no {INDEX}, which is written last")))?;
    for expected in &index.files {
        let copied = found.remove(&expected.path).ok_or_else(|| BackupError::Damaged {
            file: expected.path.clone(),
            reason: "it is not there".to_owned(),
        })?;
        compare(expected, &copied)?;
    }
    match found.keys().next() {
        None => Ok(index),
        Some(stray) => {
            Err(BackupError::Damaged { file: stray.clone(), reason: "the index does not know it".to_owned() })
        }
    }
}

/// The keys open what the database holds sealed.
async fn check_keys(staging: &Path, database: &Path) -> Result<(), BackupError> {
    let Some((owner, sealed)) = crate::store::any_sealed(database).await? else { return Ok(()) };
    let keys = staging.join("keys");
    if !keys.join("at-rest.key").exists() {
        return Err(BackupError::WrongKeys("at-rest.key is not among them".to_owned()));
    }
    Sealer::open(&keys)
        .and_then(|sealer| sealer.unseal(&owner, &sealed))
        .map(drop)
        .map_err(|error| BackupError::WrongKeys(error.to_string()))
}

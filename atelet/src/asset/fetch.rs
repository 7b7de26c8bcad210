// SPDX-License-Identifier: Apache-2.0
//! Getting the bytes of an asset: they are hashed as they come, and nothing that does not match is kept.
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt as _, Full};
use hyper::{Request, Response, StatusCode, Uri, header};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::AssetError;
use super::config::Asset;
use crate::blob::{self, BlobUrl, Key};
use crate::image::http::{HttpClient, chain, is_loopback, join};

/// Largest asset, bytes.
const MAX_BYTES: u64 = 4 << 30;
/// Attempts that get nowhere.
const ATTEMPTS: u32 = 4;
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// From a request to its headers, and between two chunks.
const IDLE: Duration = Duration::from_secs(30);
const REDIRECTS: u32 = 5;
/// Bytes of one read from a bucket.
const PIECE: u64 = 8 << 20;

/// Where an asset is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    Http(Uri),
    Bucket(BlobUrl, Key),
    File(PathBuf),
}

impl Place {
    pub(super) fn parse(url: &str) -> Result<Self, String> {
        if let Some(path) = url.strip_prefix("file:") {
            let path = path.strip_prefix("//").filter(|path| path.starts_with('/')).unwrap_or(path);
            if !path.starts_with('/') {
                return Err(format!("{url:?} is not file:/absolute/path"));
            }
            return Ok(Self::File(path.into()));
        }
        if url.starts_with("s3://") {
            let (place, query) =
                url.split_once('?').map_or((url, None), |(place, query)| (place, Some(query)));
            let (directory, name) = place
                .rsplit_once('/')
                .filter(|(bucket, _)| bucket.len() > "s3:/".len())
                .ok_or_else(|| format!("{url:?} is not s3://BUCKET/KEY"))?;
            let directory =
                query.map_or_else(|| directory.to_owned(), |query| format!("{directory}?{query}"));
            let store = directory.parse::<BlobUrl>().map_err(|error| error.to_string())?;
            let key = Key::new(name).map_err(|error| error.to_string())?;
            return Ok(Self::Bucket(store, key));
        }
        let uri: Uri = url.parse().map_err(|error| format!("{url:?} is no URL: {error}"))?;
        if may_visit(&uri) {
            return Ok(Self::Http(uri));
        }
        Err(format!("{url:?}: https, s3 and file are possible (http on this machine only)"))
    }
}

fn may_visit(uri: &Uri) -> bool {
    match (uri.scheme_str(), uri.authority()) {
        (Some("https"), Some(_)) => true,
        (Some("http"), Some(authority)) => is_loopback(authority.as_str()),
        _ => false,
    }
}

/// A file that is being written, with what it holds so far.
struct Target<'a> {
    file: tokio::fs::File,
    hash: Sha256,
    done: u64,
    path: &'a Path,
}

impl Target<'_> {
    async fn write(&mut self, bytes: &[u8]) -> Result<(), Trouble> {
        self.done += bytes.len() as u64;
        if self.done > MAX_BYTES {
            return Err(Trouble::Final(format!("it has more than {} GiB", MAX_BYTES >> 30)));
        }
        self.hash.update(bytes);
        self.file.write_all(bytes).await.map_err(|error| self.local(&error))
    }

    fn local(&self, error: &std::io::Error) -> Trouble {
        Trouble::Final(format!("cannot write {}: {error}", self.path.display()))
    }

    async fn restart(&mut self) -> Result<(), Trouble> {
        use tokio::io::AsyncSeekExt as _;
        (self.hash, self.done) = (Sha256::new(), 0);
        let emptied = match self.file.set_len(0).await {
            Ok(()) => self.file.rewind().await.map(drop),
            Err(error) => Err(error),
        };
        emptied.map_err(|error| self.local(&error))
    }
}

/// How an attempt failed.
enum Trouble {
    Again(String),
    Final(String),
}

/// Writes an asset into a new file; what does not match is an error.
pub(super) async fn fetch(client: &HttpClient, asset: &Asset, path: &Path) -> Result<(), AssetError> {
    let failed = |reason: String| AssetError::Fetch { url: without_query(&asset.url), reason };
    let place = Place::parse(&asset.url).map_err(failed)?;
    let file = tokio::fs::File::create_new(path)
        .await
        .map_err(|error| failed(format!("cannot create {}: {error}", path.display())))?;
    let mut target = Target { file, hash: Sha256::new(), done: 0, path };
    let (mut left, mut pause) = (ATTEMPTS, FIRST_PAUSE);
    loop {
        let before = target.done;
        let attempt = match &place {
            Place::Http(uri) => http(client, uri, &mut target).await,
            Place::Bucket(store, key) => bucket(store, key, &mut target).await,
            Place::File(source) => file_at(source, &mut target).await,
        };
        match attempt {
            Ok(()) => break,
            Err(Trouble::Final(reason)) => return Err(failed(reason)),
            Err(Trouble::Again(reason)) => {
                if target.done > before {
                    (left, pause) = (ATTEMPTS, FIRST_PAUSE);
                }
                left -= 1;
                if left == 0 {
                    return Err(failed(reason));
                }
                tracing::info!(url = without_query(&asset.url), reason, "an asset is asked for again");
                tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.5))).await;
                pause *= 2;
            }
        }
    }
    let found = hex::encode(target.hash.clone().finalize());
    if found != asset.sha256 {
        return Err(AssetError::Digest {
            url: without_query(&asset.url),
            found,
            wanted: asset.sha256.clone(),
            bytes: target.done,
        });
    }
    target.file.sync_all().await.map_err(|error| failed(format!("cannot fsync {}: {error}", path.display())))
}

async fn http(client: &HttpClient, uri: &Uri, target: &mut Target<'_>) -> Result<(), Trouble> {
    let response = follow(client, uri.clone(), target.done).await?;
    if target.done > 0 && response.status() != StatusCode::PARTIAL_CONTENT {
        target.restart().await?;
    }
    let expected = response
        .headers()
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<u64>().ok())
        .map(|length| target.done + length);
    let mut body = response.into_body();
    loop {
        match tokio::time::timeout(IDLE, body.frame()).await {
            Ok(None) => break,
            Ok(Some(Ok(frame))) => {
                if let Ok(data) = frame.into_data() {
                    target.write(&data).await?;
                }
            }
            Ok(Some(Err(error))) => return Err(Trouble::Again(chain(&error))),
            Err(_) => return Err(Trouble::Again(format!("nothing came for {} s", IDLE.as_secs()))),
        }
    }
    if let Some(expected) = expected
        && target.done < expected
    {
        return Err(Trouble::Again(format!("it ended after {} of {expected} bytes", target.done)));
    }
    Ok(())
}

async fn follow(
    client: &HttpClient,
    mut uri: Uri,
    from: u64,
) -> Result<Response<hyper::body::Incoming>, Trouble> {
    for _ in 0..=REDIRECTS {
        let mut request =
            Request::get(&uri).header(header::USER_AGENT, concat!("substrate/", env!("CARGO_PKG_VERSION")));
        if from > 0 {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        let request = request.body(Full::default()).map_err(|error| Trouble::Final(error.to_string()))?;
        let response = match tokio::time::timeout(IDLE, client.request(request)).await {
            Ok(response) => response.map_err(Trouble::Again)?,
            Err(_) => return Err(Trouble::Again(format!("no answer within {} s", IDLE.as_secs()))),
        };
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        if status.is_redirection() {
            let location = response.headers().get(header::LOCATION).and_then(|to| to.to_str().ok());
            uri = location.and_then(|location| join(&uri, location)).filter(may_visit).ok_or_else(|| {
                Trouble::Final(format!("it redirects ({status}) to where https does not lead"))
            })?;
            continue;
        }
        let reason = format!("the server answered {status}");
        return Err(if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
            Trouble::Again(reason)
        } else {
            Trouble::Final(reason)
        });
    }
    Err(Trouble::Final(format!("it redirects more than {REDIRECTS} times")))
}

async fn bucket(store: &BlobUrl, key: &Key, target: &mut Target<'_>) -> Result<(), Trouble> {
    // The SDK has tried again by itself.
    let failed = |error: blob::BlobError| Trouble::Final(error.to_string());
    let store = blob::open(store, false).await.map_err(failed)?;
    let size = store
        .head(key)
        .await
        .map_err(failed)?
        .ok_or_else(|| Trouble::Final(format!("{key} is not in {}", store.location())))?;
    while target.done < size {
        let range = target.done..(target.done + PIECE).min(size);
        let bytes = store.get(key, range).await.map_err(failed)?;
        target.write(&bytes).await?;
    }
    Ok(())
}

async fn file_at(source: &Path, target: &mut Target<'_>) -> Result<(), Trouble> {
    let failed = |error: std::io::Error| Trouble::Final(format!("cannot read it: {error}"));
    let mut file = tokio::fs::File::open(source).await.map_err(failed)?;
    let mut piece = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut piece).await.map_err(failed)?;
        if read == 0 {
            return Ok(());
        }
        target.write(&piece[..read]).await?;
    }
}

/// Signed URLs carry secrets in their query.
fn without_query(url: &str) -> String {
    url.split('?').next().unwrap_or(url).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_told_apart() {
        let bucket = Place::parse("s3://assets/gvisor/runsc?endpoint=http://127.0.0.1:1&region=x").unwrap();
        let Place::Bucket(BlobUrl::S3(store), key) = bucket else { panic!("{bucket:?}") };
        assert_eq!(
            (store.bucket.as_str(), store.prefix.as_str(), key.as_str()),
            ("assets", "gvisor", "runsc")
        );
        assert_eq!(store.endpoint.as_deref(), Some("http://127.0.0.1:1"));
        assert_eq!(Place::parse("file:///a/b").unwrap(), Place::File("/a/b".into()));
        assert!(matches!(Place::parse("https://example.com/runsc?X-Amz=1").unwrap(), Place::Http(_)));
        assert!(matches!(Place::parse("http://localhost:8080/runsc").unwrap(), Place::Http(_)));
        for bad in
            ["", "runsc", "http://example.com/runsc", "s3://bucket", "s3:///key", "file:runsc", "ftp://h/x"]
        {
            assert!(Place::parse(bad).is_err(), "{bad}");
        }
        assert_eq!(without_query("https://h/x?sig=secret"), "https://h/x");
    }
}

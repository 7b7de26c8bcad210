// SPDX-License-Identifier: Apache-2.0
//! A blob store in a bucket of S3, or of something that speaks its language.
//!
//! * **Once or never.** Every object is written with `If-None-Match: *`: a single PUT up to [`PART`], else a multipart
//!   upload whose completion carries the condition. Each put marks its object with an id of its own, so that after a
//!   lost answer, or a refusal of the SDK's own second attempt, the object itself says whether this put made it.
//! * **Whole or not at all.** Parts are not an object; a put that fails ends its upload. What a killed process leaves
//!   is found by [`BlobStore::abandon`].
//! * **Bounded.** At most [`IN_FLIGHT`] bytes of a put are in memory, beside the part that is being filled.
//! * **Retries** are the SDK's (standard mode: exponential backoff with jitter, and a budget over all requests); what
//!   it does not retry, a body that breaks off and a conditional write in conflict, is retried here. The budget is this
//!   store's own: the SDK's default is one for all clients of a process and region, and a store that is down would use
//!   up the retries of one that is not.
//! * **Silence** is short: a request that carries no content must begin to be answered within [`Patience::answer`], so
//!   that a connection that died unnoticed while it was idle costs seconds, not the time of a slow upload.
//!
//! Credentials come from the SDK's chain: environment, profile files, web identity, container, instance.
use std::io;
use std::ops::Range;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_sdk_s3::Client;
use aws_sdk_s3::config::SharedHttpClient;
use aws_sdk_s3::config::retry::{RetryConfig, RetryPartition};
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::ByteStream as Body;
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};
use aws_smithy_http_client::tls;
use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;

use super::{BlobError, BlobStore, ByteStream, Key, Listed, S3Url};

/// Bytes of a part (S3 takes 5 MiB or more but for the last), and the largest object that is one request.
const PART: usize = 8 << 20;
/// Bytes of the parts from number [`LARGE_FROM`] on: 10,000 parts is S3's limit, and packs may be larger than 80 GiB.
const LARGE_PART: usize = 64 << 20;
/// See [`LARGE_PART`].
const LARGE_FROM: i32 = 4_000;
/// Bytes of a put that are on their way at the same time; one part always is.
const IN_FLIGHT: usize = 4 * PART;
/// Where a put notes its id.
const MARK: &str = "substrate-put";
/// Attempts at what the SDK does not retry by itself.
const ATTEMPTS: u32 = 4;

/// Objects in a bucket, below a prefix.
#[derive(Debug, Clone)]
pub struct S3Store {
    client: Client,
    bucket: String,
    prefix: String,
    location: String,
    backoff: Duration,
    answer: Duration,
}

/// How patient a store is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// Attempts of a request.
    pub attempts: u32,
    /// Until a connection stands.
    pub connect: Duration,
    /// Of one attempt: a part goes over 1 Mbit/s in it.
    pub attempt: Duration,
    /// Until the answer to a request without content begins.
    pub answer: Duration,
    /// Before the second attempt; doubled for each further one, with jitter.
    pub backoff: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            attempts: 6,
            connect: Duration::from_secs(5),
            attempt: Duration::from_secs(90),
            answer: Duration::from_secs(15),
            backoff: Duration::from_millis(200),
        }
    }
}

/// A failed request in plain words.
struct Failed {
    /// HTTP status; none: no answer.
    status: Option<u16>,
    /// S3's name of the error.
    code: String,
    text: String,
}

impl Failed {
    fn of<E: ProvideErrorMetadata + std::error::Error + 'static>(error: &SdkError<E>) -> Self {
        let status = error.raw_response().map(|response| response.status().as_u16());
        let code = error.code().unwrap_or_default().to_owned();
        let mut text = match error {
            SdkError::ServiceError(_) => {
                let shown = if code.is_empty() { "an error" } else { &code };
                format!("{shown} (HTTP {})", status.unwrap_or_default())
            }
            error => chain(error),
        };
        if let Some(message) = error.message().filter(|message| !message.is_empty()) {
            text = format!("{text}: {message}");
        }
        if let Some(way_out) = way_out(&code) {
            text = format!("{text}: {way_out}");
        }
        Self { status, code, text }
    }

    /// Whether the service may have done what was asked all the same.
    fn is_open(&self) -> bool {
        self.status.is_none_or(|status| status >= 500)
    }

    /// The condition did not hold.
    fn is_taken(&self) -> bool {
        self.status == Some(412) || self.code == "PreconditionFailed"
    }

    /// Another conditional write of the key was under way.
    fn is_in_conflict(&self) -> bool {
        self.status == Some(409) && self.code != "NoSuchUpload"
    }

    fn is_missing(&self) -> bool {
        self.status == Some(404)
    }
}

/// HTTP with TLS by rustls and ring, as everywhere here.
pub(super) fn http_client() -> SharedHttpClient {
    aws_smithy_http_client::Builder::new()
        .tls_provider(tls::Provider::Rustls(tls::rustls_provider::CryptoMode::Ring))
        .build_https()
}

/// An error with its causes, each once.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        source = inner.source();
    }
    text
}

/// What an administrator does about an error code.
fn way_out(code: &str) -> Option<&'static str> {
    Some(match code {
        "RequestTimeTooSkewed" => "this machine's clock is wrong: set it (timedatectl set-ntp true)",
        "AccessDenied" | "Forbidden" => {
            "the credentials need s3:GetObject, s3:PutObject, s3:DeleteObject, s3:ListBucket, \
             s3:AbortMultipartUpload and s3:ListBucketMultipartUploads there"
        }
        "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "ExpiredToken" | "InvalidToken" => {
            "renew the credentials where the AWS SDK finds them"
        }
        "NoSuchBucket" => "make the bucket, or name another one",
        "PermanentRedirect" | "AuthorizationHeaderMalformed" => "name the bucket's region in the URL",
        _ => return None,
    })
}

impl S3Store {
    /// Opens it without a request: [`BlobStore::check`] makes some.
    pub async fn open(url: &S3Url) -> Self {
        let mut loader = aws_config::defaults(BehaviorVersion::v2026_01_12()).http_client(http_client());
        if let Some(region) = &url.region {
            loader = loader.region(Region::new(region.clone()));
        }
        Self::with(url, &loader.load().await, Patience::default())
    }

    pub(super) fn with(url: &S3Url, sdk: &SdkConfig, patience: Patience) -> Self {
        let mut config = aws_sdk_s3::config::Builder::from(sdk)
            .force_path_style(url.path_style.unwrap_or(url.endpoint.is_some()))
            .retry_config(
                RetryConfig::standard()
                    .with_max_attempts(patience.attempts)
                    .with_initial_backoff(patience.backoff),
            )
            .retry_partition(RetryPartition::custom("store").build())
            .timeout_config(
                TimeoutConfig::builder()
                    .connect_timeout(patience.connect)
                    .operation_attempt_timeout(patience.attempt)
                    .build(),
            );
        if let Some(endpoint) = &url.endpoint {
            config = config.endpoint_url(endpoint);
        }
        if sdk.region().is_none() {
            config = config.region(Region::new(url.region.clone().unwrap_or_else(|| "us-east-1".to_owned())));
        }
        Self {
            client: Client::from_conf(config.build()),
            bucket: url.bucket.clone(),
            prefix: if url.prefix.is_empty() { String::new() } else { format!("{}/", url.prefix) },
            location: url.to_string(),
            backoff: patience.backoff,
            answer: patience.answer,
        }
    }

    /// For requests without content.
    fn promptly(&self) -> aws_sdk_s3::config::Builder {
        let timeouts = TimeoutConfig::builder().read_timeout(self.answer).build();
        aws_sdk_s3::config::Builder::new().timeout_config(timeouts)
    }

    #[cfg(test)]
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    fn name(&self, key: &Key) -> String {
        format!("{}{key}", self.prefix)
    }

    fn failed(&self, key: &str, failed: &Failed) -> BlobError {
        let full = failed.status == Some(507)
            || ["QuotaExceeded", "InsufficientStorage", "XMinioStorageFull"].contains(&failed.code.as_str());
        if full && let Ok(key) = Key::new(key) {
            return BlobError::Full { key, store: self.location.clone() };
        }
        let kind = match (failed.status, failed.code.as_str()) {
            (Some(401 | 403), _) => io::ErrorKind::PermissionDenied,
            (Some(404), "NoSuchBucket") => io::ErrorKind::NotFound,
            _ => io::ErrorKind::Other,
        };
        BlobError::Unavailable {
            key: key.to_owned(),
            store: self.location.clone(),
            source: io::Error::new(kind, failed.text.clone()),
        }
    }

    fn not_found(&self, key: &Key) -> BlobError {
        BlobError::NotFound { key: key.clone(), store: self.location.clone() }
    }

    /// Waits before another attempt: between half and all of a time that doubles.
    async fn back_off(&self, attempt: u32) {
        let time = self.backoff * 2u32.pow(attempt.min(6));
        tokio::time::sleep(time.mul_f64(rand::random_range(0.5..1.0))).await;
    }

    /// Size and mark of an object.
    async fn look(&self, key: &Key) -> Result<Option<(u64, Option<String>)>, BlobError> {
        let answer = self
            .client
            .head_object()
            .bucket(&self.bucket)
            .key(self.name(key))
            .customize()
            .config_override(self.promptly())
            .send()
            .await;
        match answer {
            Ok(object) => {
                let size = object.content_length().unwrap_or_default().max(0) as u64;
                let mark = object.metadata().and_then(|metadata| metadata.get(MARK).cloned());
                Ok(Some((size, mark)))
            }
            Err(error) => match Failed::of(&error) {
                failed if failed.is_missing() => Ok(None),
                failed => Err(self.failed(key.as_str(), &failed)),
            },
        }
    }

    /// What became of a put whose answer was an error: the object says whose it is.
    async fn settle(&self, key: &Key, mark: &str, size: u64, failed: &Failed) -> Result<u64, BlobError> {
        if failed.is_taken() || failed.is_in_conflict() || failed.is_missing() || failed.is_open() {
            match self.look(key).await? {
                Some((found, Some(by))) if by == mark && found == size => return Ok(size),
                Some(_) => return Err(BlobError::Exists(key.clone())),
                None => {}
            }
        }
        Err(self.failed(key.as_str(), failed))
    }

    async fn put_single(&self, key: &Key, mark: &str, content: Bytes) -> Result<u64, BlobError> {
        let size = content.len() as u64;
        let mut attempt = 0;
        loop {
            let answer = self
                .client
                .put_object()
                .bucket(&self.bucket)
                .key(self.name(key))
                .if_none_match("*")
                .metadata(MARK, mark)
                .body(Body::from(content.clone()))
                .send()
                .await;
            let failed = match answer {
                Ok(_) => return Ok(size),
                Err(error) => Failed::of(&error),
            };
            attempt += 1;
            if failed.is_in_conflict() && attempt < ATTEMPTS {
                self.back_off(attempt).await;
                continue;
            }
            return self.settle(key, mark, size, &failed).await;
        }
    }

    async fn put_parts(&self, key: &Key, mark: &str, mut source: Parts) -> Result<u64, BlobError> {
        let begun = self
            .client
            .create_multipart_upload()
            .bucket(&self.bucket)
            .key(self.name(key))
            .metadata(MARK, mark)
            .send()
            .await
            .map_err(|error| self.failed(key.as_str(), &Failed::of(&error)))?;
        let upload = begun.upload_id().unwrap_or_default().to_owned();
        let written = self.send_parts(key, mark, &upload, &mut source).await;
        if written.is_err() {
            let ended = self
                .client
                .abort_multipart_upload()
                .bucket(&self.bucket)
                .key(self.name(key))
                .upload_id(&upload)
                .send()
                .await;
            if let Err(error) = ended {
                let failed = Failed::of(&error);
                // After a completion whose answer was lost there is nothing to end.
                if !failed.is_missing() {
                    tracing::warn!(%key, store = self.location, error = failed.text,
                        "parts of an unfinished object stay behind until they are collected");
                }
            }
        }
        written
    }

    async fn send_parts(
        &self,
        key: &Key,
        mark: &str,
        upload: &str,
        source: &mut Parts,
    ) -> Result<u64, BlobError> {
        let mut sending = FuturesUnordered::new();
        let (mut in_flight, mut number, mut size) = (0, 0, 0u64);
        let mut done = Vec::new();
        loop {
            let part = source
                .next(part_size(number + 1))
                .await
                .map_err(|error| BlobError::Source { key: key.clone(), source: error })?;
            let Some(part) = part else { break };
            number += 1;
            let length = part.len();
            size += length as u64;
            while in_flight > 0 && in_flight + length > IN_FLIGHT {
                let Some(sent) = sending.next().await else { break };
                let (sent, length) = sent?;
                done.push(sent);
                in_flight -= length;
            }
            in_flight += length;
            sending.push(self.send_part(key, upload, number, part));
        }
        while let Some(sent) = sending.next().await {
            done.push(sent?.0);
        }
        done.sort_by_key(CompletedPart::part_number);
        let answer = self
            .client
            .complete_multipart_upload()
            .bucket(&self.bucket)
            .key(self.name(key))
            .upload_id(upload)
            .if_none_match("*")
            .multipart_upload(CompletedMultipartUpload::builder().set_parts(Some(done)).build())
            .send()
            .await;
        match answer {
            Ok(_) => Ok(size),
            Err(error) => self.settle(key, mark, size, &Failed::of(&error)).await,
        }
    }

    async fn send_part(
        &self,
        key: &Key,
        upload: &str,
        number: i32,
        content: Bytes,
    ) -> Result<(CompletedPart, usize), BlobError> {
        let length = content.len();
        let sent = self
            .client
            .upload_part()
            .bucket(&self.bucket)
            .key(self.name(key))
            .upload_id(upload)
            .part_number(number)
            .body(Body::from(content))
            .send()
            .await
            .map_err(|error| self.failed(key.as_str(), &Failed::of(&error)))?;
        let part = CompletedPart::builder()
            .part_number(number)
            .set_e_tag(sent.e_tag)
            .set_checksum_crc32(sent.checksum_crc32)
            .set_checksum_crc64_nvme(sent.checksum_crc64_nvme)
            .build();
        Ok((part, length))
    }

    /// One attempt to read a range; `None`: worth another.
    async fn try_get(&self, key: &Key, range: &Range<u64>) -> Result<Result<Bytes, BlobError>, BlobError> {
        let answer = self
            .client
            .get_object()
            .bucket(&self.bucket)
            .key(self.name(key))
            .range(format!("bytes={}-{}", range.start, range.end - 1))
            .customize()
            .config_override(self.promptly())
            .send()
            .await;
        let object = match answer {
            Ok(object) => object,
            Err(error) => {
                return Err(match Failed::of(&error) {
                    failed if failed.is_missing() && failed.code != "NoSuchBucket" => self.not_found(key),
                    failed if failed.status == Some(416) => self.out_of_range(key, range).await,
                    failed => self.failed(key.as_str(), &failed),
                });
            }
        };
        let broken =
            |text: String| self.failed(key.as_str(), &Failed { status: None, code: String::new(), text });
        let content = match object.body.collect().await {
            Ok(content) => content.into_bytes(),
            Err(error) => {
                return Ok(Err(broken(format!("its answer broke off: {}", chain(&error)))));
            }
        };
        if content.len() as u64 == range.end - range.start {
            return Ok(Ok(content));
        }
        match self.look(key).await? {
            Some((size, _)) if size >= range.end => {
                Ok(Err(broken(format!("it answered {} bytes for {range:?}", content.len()))))
            }
            _ => Err(self.out_of_range(key, range).await),
        }
    }

    async fn out_of_range(&self, key: &Key, range: &Range<u64>) -> BlobError {
        match self.look(key).await {
            Ok(Some((size, _))) => BlobError::OutOfRange { key: key.clone(), size, range: range.clone() },
            Ok(None) => self.not_found(key),
            Err(error) => error,
        }
    }
}

/// Bytes of a part by its number.
fn part_size(number: i32) -> usize {
    if number < LARGE_FROM { PART } else { LARGE_PART }
}

/// Cuts a stream into parts.
struct Parts {
    content: ByteStream,
    rest: BytesMut,
    is_over: bool,
}

impl Parts {
    /// The next part: of exactly `size` bytes but for the last; `None` at the end.
    async fn next(&mut self, size: usize) -> io::Result<Option<Bytes>> {
        while self.rest.len() < size && !self.is_over {
            match self.content.next().await {
                Some(piece) => self.rest.extend_from_slice(&piece?),
                None => self.is_over = true,
            }
        }
        let length = size.min(self.rest.len());
        Ok((length > 0).then(|| self.rest.split_to(length).freeze()))
    }

    /// Whether nothing follows; only after [`Parts::next`].
    async fn is_at_end(&mut self) -> io::Result<bool> {
        while self.rest.is_empty() && !self.is_over {
            match self.content.next().await {
                Some(piece) => self.rest.extend_from_slice(&piece?),
                None => self.is_over = true,
            }
        }
        Ok(self.rest.is_empty())
    }
}

#[async_trait]
impl BlobStore for S3Store {
    fn location(&self) -> String {
        self.location.clone()
    }

    async fn put(&self, key: &Key, content: ByteStream) -> Result<u64, BlobError> {
        let failed = |source| BlobError::Source { key: key.clone(), source };
        let mark = uuid::Uuid::new_v4().simple().to_string();
        let mut source = Parts { content, rest: BytesMut::new(), is_over: false };
        let first = source.next(PART).await.map_err(failed)?.unwrap_or_default();
        if source.is_at_end().await.map_err(failed)? {
            return self.put_single(key, &mark, first).await;
        }
        let rest = std::mem::take(&mut source.rest);
        source.rest = BytesMut::from(first);
        source.rest.unsplit(rest);
        self.put_parts(key, &mark, source).await
    }

    async fn get(&self, key: &Key, range: Range<u64>) -> Result<Bytes, BlobError> {
        if range.start >= range.end {
            // HTTP has no empty range.
            return match self.look(key).await? {
                None => Err(self.not_found(key)),
                Some((size, _)) if range.start > range.end || range.end > size => {
                    Err(BlobError::OutOfRange { key: key.clone(), size, range })
                }
                Some(_) => Ok(Bytes::new()),
            };
        }
        let mut attempt = 0;
        loop {
            match self.try_get(key, &range).await? {
                Ok(content) => return Ok(content),
                Err(error) if attempt + 1 >= ATTEMPTS => return Err(error),
                Err(error) => tracing::debug!(%error, "reading again"),
            }
            attempt += 1;
            self.back_off(attempt).await;
        }
    }

    async fn head(&self, key: &Key) -> Result<Option<u64>, BlobError> {
        Ok(self.look(key).await?.map(|(size, _)| size))
    }

    async fn delete(&self, key: &Key) -> Result<(), BlobError> {
        let answer = self
            .client
            .delete_object()
            .bucket(&self.bucket)
            .key(self.name(key))
            .customize()
            .config_override(self.promptly())
            .send()
            .await;
        match answer.as_ref().map_err(Failed::of) {
            Err(failed) if !(failed.is_missing() && failed.code != "NoSuchBucket") => {
                Err(self.failed(key.as_str(), &failed))
            }
            _ => Ok(()),
        }
    }

    async fn list(&self, directory: &Key) -> Result<Vec<Listed>, BlobError> {
        let mut pages = self
            .client
            .list_objects_v2()
            .bucket(&self.bucket)
            .prefix(format!("{}/", self.name(directory)))
            .into_paginator()
            .send();
        let mut found = Vec::new();
        while let Some(page) = pages.next().await {
            let page = page.map_err(|error| self.failed(directory.as_str(), &Failed::of(&error)))?;
            for object in page.contents() {
                let name = object.key().unwrap_or_default();
                // Others may keep things beside ours.
                let Some(Ok(key)) = name.strip_prefix(&self.prefix).map(Key::new) else { continue };
                let written = object.last_modified().and_then(|time| SystemTime::try_from(*time).ok());
                found.push(Listed {
                    key,
                    size: object.size().unwrap_or_default().max(0) as u64,
                    written: written.unwrap_or(SystemTime::UNIX_EPOCH),
                });
            }
        }
        found.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(found)
    }

    async fn check(&self) -> Result<(), BlobError> {
        let unusable = |reason: String| BlobError::Unusable { store: self.location.clone(), reason };
        let judged = |error: BlobError| match error {
            BlobError::Unavailable { source, .. }
                if matches!(source.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::NotFound) =>
            {
                unusable(source.to_string())
            }
            error => error,
        };
        if let Err(error) = self
            .client
            .head_bucket()
            .bucket(&self.bucket)
            .customize()
            .config_override(self.promptly())
            .send()
            .await
        {
            let failed = Failed::of(&error);
            return Err(match failed.status {
                Some(404) => {
                    unusable(format!("there is no bucket {}: make it, or name another one", self.bucket))
                }
                Some(301 | 400) => unusable(format!("{}: is the region right?", failed.text)),
                _ => judged(self.failed("", &failed)),
            });
        }
        // What everything rests on: a name is written once.
        let probe = Key::new(format!("probe/{}", uuid::Uuid::new_v4().simple()))?;
        let twice = async {
            self.put(&probe, super::whole("a")).await?;
            match self.put(&probe, super::whole("b")).await {
                Ok(_) => Ok(false),
                Err(BlobError::Exists(_)) => Ok(true),
                Err(error) => Err(error),
            }
        }
        .await
        .map_err(|error| match error {
            BlobError::Unavailable { source, .. } if source.to_string().contains("(HTTP 501)") => {
                unusable(format!("it does not know conditional writes (If-None-Match: *): {source}"))
            }
            error => error,
        });
        if let Err(error) = self.delete(&probe).await {
            tracing::warn!(%error, "a probe of the blob store stays behind");
        }
        if twice.map_err(judged)? {
            return Ok(());
        }
        Err(unusable(
            "it replaces objects although told not to (If-None-Match: *): use a store that honours conditional writes"
                .to_owned(),
        ))
    }

    async fn abandon(&self, older_than: Duration, dry_run: bool) -> Result<u64, BlobError> {
        let limit = SystemTime::now().checked_sub(older_than).unwrap_or(SystemTime::UNIX_EPOCH);
        let mut found = 0;
        let (mut key_marker, mut id_marker) = (None, None);
        loop {
            let page = self
                .client
                .list_multipart_uploads()
                .bucket(&self.bucket)
                .prefix(&self.prefix)
                .set_key_marker(key_marker)
                .set_upload_id_marker(id_marker)
                .customize()
                .config_override(self.promptly())
                .send()
                .await
                .map_err(|error| self.failed("", &Failed::of(&error)))?;
            for upload in page.uploads() {
                let (Some(name), Some(id)) = (upload.key(), upload.upload_id()) else { continue };
                let ours = name.strip_prefix(&self.prefix).is_some_and(|key| Key::new(key).is_ok());
                let begun = upload.initiated().and_then(|time| SystemTime::try_from(*time).ok());
                if !ours || begun.is_none_or(|begun| begun > limit) {
                    continue;
                }
                found += 1;
                if dry_run {
                    continue;
                }
                let ended = self
                    .client
                    .abort_multipart_upload()
                    .bucket(&self.bucket)
                    .key(name)
                    .upload_id(id)
                    .send()
                    .await;
                match ended.as_ref().map_err(Failed::of) {
                    Err(failed) if !failed.is_missing() => return Err(self.failed(name, &failed)),
                    _ => {}
                }
            }
            (key_marker, id_marker) = (page.next_key_marker, page.next_upload_id_marker);
            if !page.is_truncated.unwrap_or_default() || key_marker.is_none() {
                break;
            }
        }
        Ok(found)
    }
}

// SPDX-License-Identifier: Apache-2.0
//! Everything that can go wrong with an image, in words that say what to do.
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Why an image cannot be had.
///
/// Cloneable because callers that wait for the same pull all get its outcome.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ImageError {
    /// The reference does not parse.
    #[error("image reference `{reference}` is not valid: {reason}")]
    BadReference {
        /// As it was given, shortened.
        reference: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The digest does not parse.
    #[error("digest `{digest}` is not valid: {reason}")]
    BadDigest {
        /// As it was given, shortened.
        digest: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A digest is required here.
    #[error(
        "image `{reference}` is not pinned: name it by digest (`…@sha256:…`), as resolving its tag shows it"
    )]
    Unpinned {
        /// The reference.
        reference: String,
    },
    /// Local images may only come from certain directories.
    #[error("image `{reference}` is outside the directories that local images may come from: {allowed}")]
    OutsideRoots {
        /// The reference.
        reference: String,
        /// The directories.
        allowed: String,
    },
    /// There is no such image.
    #[error("image `{image}` does not exist: {reason}")]
    NotFound {
        /// Name of the image or blob.
        image: String,
        /// Who says so, and what there is instead.
        reason: String,
    },
    /// The atespace has no right to it.
    #[error("atespace `{atespace}` may not pull `{image}`: {reason}")]
    Denied {
        /// Who asked.
        atespace: String,
        /// What for.
        image: String,
        /// What the registry said and which credentials it saw.
        reason: String,
    },
    /// Too many requests.
    #[error(
        "registry {host} limits requests{}: try again later, or add credentials for it",
        retry_after.map(|after| format!(" for another {} s", after.as_secs())).unwrap_or_default()
    )]
    RateLimited {
        /// The registry.
        host: String,
        /// As the registry asked, if it did.
        retry_after: Option<Duration>,
    },
    /// No answer.
    #[error("registry {host} cannot be reached: {reason}")]
    Unreachable {
        /// The registry, or its token service.
        host: String,
        /// Of the last attempt.
        reason: String,
    },
    /// An answer that says that the registry is broken.
    #[error("registry {host} failed: {reason}")]
    Registry {
        /// The registry, or its token service.
        host: String,
        /// Status and what it said.
        reason: String,
    },
    /// The content is not what its digest or size says.
    #[error("{what} is corrupt: {reason}; nothing of it was kept, repair or push the image again")]
    Corrupt {
        /// A blob, layer or manifest by digest, and where it came from.
        what: String,
        /// What was expected and what was found.
        reason: String,
    },
    /// The image is for other machines.
    #[error("image `{image}` has nothing for {wanted}; it has: {available}")]
    Platform {
        /// The image.
        image: String,
        /// This machine's platform.
        wanted: String,
        /// Those of the image.
        available: String,
    },
    /// The image uses something that we do not have.
    #[error("{what} is not supported: {reason}")]
    Unsupported {
        /// Manifest, layer or config.
        what: String,
        /// What to use instead.
        reason: String,
    },
    /// A layer tries to do what no layer may.
    #[error("layer {layer} is refused because of its entry `{entry}`: {reason}")]
    Refused {
        /// Digest of the layer's content.
        layer: String,
        /// Path of the entry in the archive, shortened.
        entry: String,
        /// What it tried.
        reason: String,
    },
    /// Larger than we take.
    #[error("{what} has more than {limit}: make it smaller, or raise the limit of the image store")]
    TooLarge {
        /// The image, layer or document.
        what: String,
        /// The limit with its unit.
        limit: String,
    },
    /// A deadline passed.
    #[error("{what} took longer than {} s and was given up; it begins again when it is asked for", after.as_secs())]
    TimedOut {
        /// What took too long.
        what: String,
        /// The deadline.
        after: Duration,
    },
    /// A user or group that the image does not have.
    #[error("user `{user}` cannot be resolved in image {image}: {reason}")]
    NoUser {
        /// As in `USER` or `runAs`.
        user: String,
        /// Digest of the image.
        image: String,
        /// Which part, and where it was looked up.
        reason: String,
    },
    /// No space or no inodes left.
    #[error("the disk of {path} is full: free some space or collect images, then try again")]
    DiskFull {
        /// The directory of the store.
        path: PathBuf,
    },
    /// Another process has the store.
    #[error("image store {dir} is in use by another process: stop it or choose another directory")]
    InUse {
        /// The store's directory.
        dir: PathBuf,
    },
    /// The store cannot be where it is.
    #[error("images cannot be kept in {dir}: {reason}")]
    Unsuitable {
        /// The store's directory.
        dir: PathBuf,
        /// What the file system or kernel lacks.
        reason: String,
    },
    /// A file that an administrator wrote does not parse.
    #[error("credentials file {path} is not usable: {reason}")]
    Credentials {
        /// The file.
        path: PathBuf,
        /// Where and why; never the content.
        reason: String,
    },
    /// The system refused.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was attempted, and on what.
        what: String,
        /// The system's reason.
        source: Arc<io::Error>,
    },
    /// A task of ours died.
    #[error("internal error while {what}: {reason}")]
    Internal {
        /// What was going on.
        what: String,
        /// What is known.
        reason: String,
    },
}

impl ImageError {
    /// The system refused `what`; a full disk gets its own variant, `dir` being the store's.
    pub(super) fn io(what: impl Into<String>, dir: &Path, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::DiskFull { path: dir.to_owned() }
            }
            _ => Self::Io { what: what.into(), source: Arc::new(source) },
        }
    }

    /// Whether the same request may succeed later without anyone changing anything.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::RateLimited { .. }
                | Self::Unreachable { .. }
                | Self::Registry { .. }
                | Self::TimedOut { .. }
                | Self::DiskFull { .. }
        )
    }
}

/// The only place where image errors become gRPC statuses.
impl From<&ImageError> for tonic::Status {
    fn from(error: &ImageError) -> Self {
        use tonic::Code;
        let code = match error {
            ImageError::BadReference { .. } | ImageError::BadDigest { .. } | ImageError::Unpinned { .. } => {
                Code::InvalidArgument
            }
            ImageError::NotFound { .. } => Code::NotFound,
            ImageError::Denied { .. } | ImageError::OutsideRoots { .. } => Code::PermissionDenied,
            ImageError::RateLimited { .. }
            | ImageError::Unreachable { .. }
            | ImageError::Registry { .. }
            | ImageError::TimedOut { .. } => Code::Unavailable,
            ImageError::Corrupt { .. } => Code::DataLoss,
            ImageError::DiskFull { .. } => Code::ResourceExhausted,
            ImageError::Platform { .. }
            | ImageError::Unsupported { .. }
            | ImageError::Refused { .. }
            | ImageError::TooLarge { .. }
            | ImageError::NoUser { .. }
            | ImageError::InUse { .. }
            | ImageError::Unsuitable { .. }
            | ImageError::Credentials { .. } => Code::FailedPrecondition,
            ImageError::Io { .. } | ImageError::Internal { .. } => Code::Internal,
        };
        Self::new(code, error.to_string())
    }
}

// SPDX-License-Identifier: Apache-2.0
//! Names of blob stores, as configurations spell them.
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{BlobError, Key};

/// A blob store: `/absolute/path`, `file:/absolute/path`, or
/// `s3://BUCKET[/PREFIX][?endpoint=URL&region=NAME&path_style=BOOL]`.
///
/// Credentials are never part of it: they come from the AWS SDK's chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum BlobUrl {
    /// A directory.
    Local(PathBuf),
    /// A bucket.
    S3(S3Url),
}

/// A place in a bucket of S3 or of something that speaks its language.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3Url {
    /// Name of the bucket.
    pub bucket: String,
    /// Components before every key; empty: none.
    pub prefix: String,
    /// Where the service is. Default: AWS, or what `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL` say.
    pub endpoint: Option<String>,
    /// Default: the SDK's (`AWS_REGION`, profile, instance), else `us-east-1`.
    pub region: Option<String>,
    /// The bucket is in the path, not in the host's name. Default: with an `endpoint`.
    pub path_style: Option<bool>,
}

impl FromStr for BlobUrl {
    type Err = BlobError;

    fn from_str(text: &str) -> Result<Self, BlobError> {
        let bad = |reason: &str| BlobError::BadUrl {
            url: text.chars().take(200).collect(),
            reason: reason.to_owned(),
        };
        if let Some(rest) = text.strip_prefix("s3://") {
            return s3(rest).map(Self::S3).map_err(|reason| bad(&reason));
        }
        let path = text.strip_prefix("file:").unwrap_or(text);
        // file:///x and file:/x are the same place; a host has no meaning here.
        let path = path.strip_prefix("//").filter(|path| path.starts_with('/')).unwrap_or(path);
        if !path.starts_with('/') || path.starts_with("//") {
            return Err(bad("it is neither an absolute path nor s3://"));
        }
        Ok(Self::Local(path.into()))
    }
}

fn s3(rest: &str) -> Result<S3Url, String> {
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
    let prefix = prefix.trim_end_matches('/');
    // https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-".contains(&byte);
    if !(3..=63).contains(&bucket.len()) || !bucket.bytes().all(plain) {
        return Err(format!("bucket {bucket:?} is not 3 to 63 of a-z, 0-9, '.' and '-'"));
    }
    if !prefix.is_empty() && Key::new(prefix).is_err() {
        return Err(format!("prefix {prefix:?} is not components of letters, digits, '.', '_' and '-'"));
    }
    let mut url = S3Url {
        bucket: bucket.to_owned(),
        prefix: prefix.to_owned(),
        endpoint: None,
        region: None,
        path_style: None,
    };
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').ok_or_else(|| format!("{pair:?} has no value"))?;
        match name {
            "endpoint" if value.starts_with("http://") || value.starts_with("https://") => {
                if value.contains('@') {
                    return Err(
                        "credentials do not belong there: put them where the AWS SDK looks".to_owned()
                    );
                }
                url.endpoint = Some(value.trim_end_matches('/').to_owned());
            }
            "endpoint" => return Err(format!("endpoint {value:?} does not begin with http:// or https://")),
            "region" if !value.is_empty() => url.region = Some(value.to_owned()),
            "path_style" => {
                url.path_style = Some(
                    value.parse().map_err(|_| format!("path_style {value:?} is neither true nor false"))?,
                );
            }
            _ => return Err(format!("{pair:?} is not endpoint, region or path_style")),
        }
    }
    Ok(url)
}

impl fmt::Display for BlobUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local(path) => write!(f, "{}", path.display()),
            Self::S3(url) => url.fmt(f),
        }
    }
}

impl fmt::Display for S3Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}", self.bucket)?;
        if !self.prefix.is_empty() {
            write!(f, "/{}", self.prefix)?;
        }
        let path_style = self.path_style.map(|value| value.to_string());
        let mut between = '?';
        for (name, value) in
            [("endpoint", &self.endpoint), ("region", &self.region), ("path_style", &path_style)]
        {
            if let Some(value) = value {
                write!(f, "{between}{name}={value}")?;
                between = '&';
            }
        }
        Ok(())
    }
}

impl TryFrom<String> for BlobUrl {
    type Error = BlobError;

    fn try_from(text: String) -> Result<Self, BlobError> {
        text.parse()
    }
}

impl From<BlobUrl> for String {
    fn from(url: BlobUrl) -> Self {
        url.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_as_they_were() {
        for good in [
            "/var/lib/x",
            "s3://bucket",
            "s3://my.bucket-1/a/b",
            "s3://bucket/a?endpoint=http://127.0.0.1:8333&region=eu-1&path_style=false",
        ] {
            assert_eq!(good.parse::<BlobUrl>().unwrap().to_string(), good);
        }
        for same in ["file:/a/b", "file:///a/b", "/a/b"] {
            assert_eq!(same.parse::<BlobUrl>().unwrap(), BlobUrl::Local("/a/b".into()));
        }
    }

    #[test]
    fn what_names_no_store_is_refused_with_the_reason() {
        for (bad, reason) in [
            ("", "absolute"),
            ("a/b", "absolute"),
            ("gs://bucket", "absolute"),
            ("file://host/a", "absolute"),
            ("s3://", "3 to 63"),
            ("s3://UPPER", "3 to 63"),
            ("s3://bucket/../x", "prefix"),
            ("s3://bucket?endpoint=ftp://x", "http://"),
            ("s3://bucket?endpoint=http://user:secret@x", "credentials"),
            ("s3://bucket?path_style=yes", "path_style"),
            ("s3://bucket?pathstyle=true", "pathstyle"),
        ] {
            let error = bad.parse::<BlobUrl>().unwrap_err().to_string();
            assert!(error.contains(reason), "{bad}: {error}");
        }
    }
}

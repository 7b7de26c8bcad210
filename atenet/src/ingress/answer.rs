// SPDX-License-Identifier: Apache-2.0
//! The router's own answers: JSON that says what is wrong, with which actor, and what helps.
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use serde::Serialize;

use super::Body;
use super::address::Key;

/// An answer that the router gives instead of the actor.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    /// Machine-readable, snake_case.
    pub(crate) error: &'static str,
    pub(crate) message: String,
    /// A command or step that helps.
    pub(crate) hint: Option<String>,
    pub(crate) actor: Option<Box<Key>>,
    /// Asking again may succeed.
    pub(crate) retry: bool,
    pub(crate) retry_after: Option<Duration>,
}

#[derive(Serialize)]
struct Json<'a> {
    error: &'a str,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    actor: Option<String>,
    retry: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<&'a str>,
}

impl Answer {
    pub(crate) fn new(status: StatusCode, error: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            error,
            message: message.into(),
            hint: None,
            actor: None,
            retry: false,
            retry_after: None,
        }
    }

    /// 503 for a while: `after` goes into `retry-after` (whole seconds, at least one).
    pub(crate) fn later(error: &'static str, message: impl Into<String>, after: Duration) -> Self {
        Self {
            retry: true,
            retry_after: Some(after),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, error, message)
        }
    }

    /// 502 for a request that reached an actor and was not answered: its effects are unknown, the client may retry.
    pub(crate) fn interrupted(message: impl Into<String>) -> Self {
        Self { retry: true, ..Self::new(StatusCode::BAD_GATEWAY, "interrupted", message) }
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub(crate) fn about(mut self, key: &Key) -> Self {
        self.actor = Some(Box::new(key.clone()));
        self
    }

    pub(crate) fn into_response(self) -> Response<Body> {
        let json = Json {
            error: self.error,
            message: &self.message,
            actor: self.actor.as_ref().map(ToString::to_string),
            retry: self.retry,
            hint: self.hint.as_deref(),
        };
        let mut text = serde_json::to_vec(&json).unwrap_or_default();
        text.push(b'\n');
        let body = Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed_unsync();
        let mut response = Response::new(body);
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(after) = self.retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(after.as_secs().max(1)));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"substrate\""));
        }
        response
    }
}

// SPDX-License-Identifier: Apache-2.0
//! `substrate token` and `request`: the way to an actor through the router. Tokens are signed here, with the key of
//! the state directory, so only who may read that key can make one.
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::time::Duration;

use atenet::token::{Grant, ensure_key_pair, mint};
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HOST, HeaderName, HeaderValue};
use hyper::{Method, StatusCode};

use crate::args::{Global, Request, Token};
use crate::client::{UpInfo, up_info};
use crate::cmd::{machine_text, print};
use crate::failure::{Doing as _, Exit, Failure};
use crate::progress::during;

/// A wake-up of a large actor takes a while.
const PATIENCE: Duration = Duration::from_mins(5);
/// For one request.
const TTL: Duration = Duration::from_mins(10);

/// Signs a token with the key of a state directory.
pub fn sign(dir: &Path, atespace: &str, actor: Option<String>, ttl: Duration) -> Result<String, Failure> {
    let keys = dir.join("keys");
    let files = ensure_key_pair(&keys).map_err(|error| {
        Failure::general(error.to_string())
            .with_way_out("run this as the user that runs `substrate up`, usually root")
    })?;
    let private = std::fs::read_to_string(&files.private).map_err(|error| {
        Failure::general(format!("cannot read {}: {error}", files.private.display()))
            .with_way_out("run this as the user that runs `substrate up`, usually root")
    })?;
    mint(&private, &Grant { atespace: atespace.to_owned(), actor }, Some(ttl))
        .doing(|| "cannot make a token".to_owned())
}

/// `substrate token`.
pub fn token(options: &Token, global: &Global) -> Result<(), Failure> {
    let up = up_info(global)?;
    if let Some(subject) = &options.control {
        return control_token(&up, subject, options.ttl, global);
    }
    let token = sign(&up.dir, &global.atespace, options.actor.clone(), options.ttl)?;
    if global.output.is_machine() {
        let value = serde_json::json!({
            "token": token,
            "atespace": global.atespace,
            "actor": options.actor,
            "ttlMs": options.ttl.as_millis() as u64,
            "ingress": format!("http://{}", up.ingress),
            "header": "ate-authorization",
        });
        return print(&machine_text(&value, global.output)?);
    }
    print(&(token + "\n"))
}

/// A token for the control plane's TCP listener.
fn control_token(up: &UpInfo, subject: &str, ttl: Duration, global: &Global) -> Result<(), Failure> {
    let path = up.dir.join("keys").join(format!("{}.key", crate::up::CONTROL_KEYS));
    let private = std::fs::read_to_string(&path).map_err(|error| {
        Failure::general(format!("cannot read {}: {error}", path.display())).with_way_out(
            "it is made when api.listen is set with neither api.client_ca nor api.token_keys; tokens of other keys \
             are signed where those keys are",
        )
    })?;
    let token = ateapi::access::mint(&private, subject, ttl).doing(|| "cannot make a token".to_owned())?;
    if !global.output.is_machine() {
        return print(&(token + "\n"));
    }
    let value = serde_json::json!({
        "token": token,
        "subject": format!("token:{subject}"),
        "ttlMs": ttl.as_millis() as u64,
        "endpoint": up.api.map(|address| format!("https://{address}")),
        "header": "authorization",
    });
    print(&machine_text(&value, global.output)?)
}

/// `substrate request`.
pub async fn run(options: Request, global: &Global) -> Result<(), Failure> {
    let (method, path) = method_and_path(&options.words, options.data.is_some())?;
    let up = up_info(global)?;
    let token = sign(&up.dir, &global.atespace, Some(options.name.clone()), TTL)?;
    let port = options.port.map_or_else(String::new, |port| format!(":{port}"));
    let target = format!("{}/{}{port}", global.atespace, options.name);
    let mut request = hyper::Request::builder()
        .method(method)
        .uri(&path)
        .header(HOST, up.ingress.to_string())
        .header("ate-actor", target)
        .header("ate-authorization", format!("Bearer {token}"))
        .body(Full::new(body(options.data.as_deref())?))
        .map_err(|error| Failure::usage(format!("this is no request: {error}")))?;
    if options.data.is_some() {
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    for header in &options.headers {
        let (name, value) = header_of(header)?;
        request.headers_mut().insert(name, value);
    }
    let answer =
        during(format!("asking {}", options.name), crate::http::send(up.ingress, request, PATIENCE)).await?;
    let mut out = std::io::stdout().lock();
    if options.include {
        let _ = writeln!(out, "HTTP/1.1 {}", answer.status);
        for (name, value) in &answer.headers {
            let _ = writeln!(out, "{name}: {}", String::from_utf8_lossy(value.as_bytes()));
        }
        let _ = writeln!(out);
    }
    out.write_all(&answer.body).and_then(|()| out.flush()).doing(|| "cannot write the answer".to_owned())?;
    if answer.status.is_client_error() || answer.status.is_server_error() {
        let exit = match answer.status {
            StatusCode::NOT_FOUND => Exit::NotFound,
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT => Exit::Unavailable,
            _ => Exit::Failed,
        };
        return Err(Failure::new(exit, format!("{} answered {}", options.name, answer.status)));
    }
    Ok(())
}

fn method_and_path(words: &[String], has_data: bool) -> Result<(Method, String), Failure> {
    let (method, path) = match words {
        [path] => (if has_data { Method::POST } else { Method::GET }, path),
        [method, path] => {
            let method = Method::from_bytes(method.to_ascii_uppercase().as_bytes())
                .map_err(|_| Failure::usage(format!("{method:?} is not an HTTP method")))?;
            (method, path)
        }
        _ => return Err(Failure::usage("give a path, or a method and a path")),
    };
    let path = if path.starts_with('/') { path.clone() } else { format!("/{path}") };
    Ok((method, path))
}

fn body(data: Option<&str>) -> Result<Bytes, Failure> {
    match data {
        None => Ok(Bytes::new()),
        Some("@-") => {
            let mut content = Vec::new();
            std::io::stdin().read_to_end(&mut content).doing(|| "cannot read standard input".to_owned())?;
            Ok(content.into())
        }
        Some(text) => match text.strip_prefix('@') {
            Some(file) => Ok(std::fs::read(file).doing(|| format!("cannot read {file}"))?.into()),
            None => Ok(Bytes::from(text.to_owned())),
        },
    }
}

fn header_of(text: &str) -> Result<(HeaderName, HeaderValue), Failure> {
    let wrong = || Failure::usage(format!("header {text:?} is not \"Name: value\""));
    let (name, value) = text.split_once(':').ok_or_else(wrong)?;
    let name = HeaderName::from_bytes(name.trim().as_bytes()).map_err(|_| wrong())?;
    let value = HeaderValue::from_str(value.trim()).map_err(|_| wrong())?;
    Ok((name, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_method_follows_from_the_data() {
        let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(method_and_path(&words("/status"), false).unwrap(), (Method::GET, "/status".into()));
        assert_eq!(method_and_path(&words("chat"), true).unwrap(), (Method::POST, "/chat".into()));
        assert_eq!(method_and_path(&words("delete /heap"), false).unwrap(), (Method::DELETE, "/heap".into()));
        assert!(header_of("no colon").is_err());
        assert_eq!(header_of("X-A: b").unwrap().1, "b");
    }

    #[test]
    fn a_token_is_good_for_what_it_names() {
        let dir = tempfile::tempdir().unwrap();
        let token = sign(dir.path(), "team", Some("alice".into()), TTL).unwrap();
        let verifier = atenet::token::Verifier::from_file(&dir.path().join("keys/ingress.pub")).unwrap();
        let grant = verifier.verify(&token).unwrap();
        assert!(grant.permits("team", "alice") && !grant.permits("team", "bob"));
    }
}

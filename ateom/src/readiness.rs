// SPDX-License-Identifier: Apache-2.0
//! Readiness: when a container counts as up, seen from the worker's namespace as a client would see it.
//!
//! Probed after a boot and after every restore (a restored program may sit on a dead listener, or a truncated file). A
//! restored workload usually answers the first probe, so probing begins tight and slows down to the template's period,
//! then to half a second.
use std::net::SocketAddr;
use std::time::Duration;

use substrate_proto::types::Readiness;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use crate::error::SlotError;
use crate::network::ACTOR_V4;
use crate::runtime::{ExecRequest, Sandbox, run_quietly};

const FIRST_DELAY: Duration = Duration::from_millis(2);
const LONGEST_PERIOD: Duration = Duration::from_millis(500);
const DEFAULT_PERIOD: Duration = Duration::from_millis(20);
const DEFAULT_TIMEOUT: Duration = Duration::from_mins(1);
/// A SYN that is lost is sent again after a second; a new attempt is quicker.
const CONNECT_LIMIT: Duration = Duration::from_millis(250);
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Http { path: String, port: u16 },
    Tcp(u16),
    Exec(Vec<String>),
}

/// One container's readiness.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    container: String,
    kind: Kind,
    timeout: Duration,
    period: Duration,
}

/// Reads "500ms", "60s", "5m", "1h"; `None` for anything else.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let number: u64 = text[..digits].parse().ok()?;
    match &text[digits..] {
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        "m" => number.checked_mul(60).map(Duration::from_secs),
        "h" => number.checked_mul(3600).map(Duration::from_secs),
        _ => None,
    }
}

impl Probe {
    /// What to ask of a container; `None`: it is ready when its process runs.
    ///
    /// # Errors
    /// [`SlotError::Invalid`] naming the field.
    pub fn of(container: &str, readiness: Option<&Readiness>) -> Result<Option<Self>, SlotError> {
        let Some(readiness) = readiness else { return Ok(None) };
        let port = |port: u32| {
            u16::try_from(port).ok().filter(|port| *port != 0).ok_or_else(|| {
                SlotError::Invalid(format!("readiness of container {container}: port {port} is not one"))
            })
        };
        let kind = if let Some(http) = &readiness.http_get {
            let path = if http.path.is_empty() { "/" } else { &http.path };
            if !path.starts_with('/') || path.contains(|c: char| c.is_whitespace() || c.is_control()) {
                return Err(SlotError::Invalid(format!(
                    "readiness of container {container}: path {path:?} must begin with / and hold no blanks"
                )));
            }
            Kind::Http { path: path.to_owned(), port: port(http.port)? }
        } else if readiness.tcp_port != 0 {
            Kind::Tcp(port(readiness.tcp_port)?)
        } else if readiness.exec.is_empty() {
            return Ok(None);
        } else {
            Kind::Exec(readiness.exec.clone())
        };
        let time = |text: &str, default| match text {
            "" => Ok(default),
            text => parse_duration(text).filter(|time| !time.is_zero()).ok_or_else(|| {
                SlotError::Invalid(format!(
                    "readiness of container {container}: {text:?} is not a time such as 60s"
                ))
            }),
        };
        Ok(Some(Self {
            container: container.to_owned(),
            kind,
            timeout: time(&readiness.timeout, DEFAULT_TIMEOUT)?,
            period: time(&readiness.period, DEFAULT_PERIOD)?,
        }))
    }

    /// Probes until it answers.
    ///
    /// # Errors
    /// [`SlotError::NotReady`] after its timeout, with what it said last.
    pub async fn wait(&self, sandbox: &dyn Sandbox) -> Result<(), SlotError> {
        let deadline = Instant::now() + self.timeout;
        let mut delay = FIRST_DELAY;
        loop {
            let last = match self.attempt(sandbox).await {
                Ok(()) => return Ok(()),
                Err(last) => last,
            };
            if Instant::now() + delay >= deadline {
                return Err(SlotError::NotReady(format!(
                    "container {} was not ready within {} s: {last}; see its log, or raise readiness.timeout",
                    self.container,
                    self.timeout.as_secs_f32()
                )));
            }
            sleep(delay).await;
            delay = if delay < self.period { (delay * 2).min(self.period) } else { delay * 5 / 4 };
            delay = delay.min(LONGEST_PERIOD.max(self.period));
        }
    }

    async fn attempt(&self, sandbox: &dyn Sandbox) -> Result<(), String> {
        match &self.kind {
            Kind::Tcp(port) => connect(*port).await.map(drop),
            Kind::Http { path, port } => {
                let mut stream = connect(*port).await?;
                timeout(ANSWER_LIMIT, ask(&mut stream, path)).await.unwrap_or_else(|_| {
                    Err(format!("no answer to GET {path} on port {port} in {} s", ANSWER_LIMIT.as_secs()))
                })
            }
            Kind::Exec(args) => {
                let request = ExecRequest {
                    container: self.container.clone(),
                    args: args.clone(),
                    ..ExecRequest::default()
                };
                match timeout(ANSWER_LIMIT, run_quietly(sandbox, request)).await {
                    Ok(Ok(exit)) if exit.success() => Ok(()),
                    Ok(Ok(exit)) => Err(format!("{} exited with {}", args.join(" "), exit.code)),
                    Ok(Err(error)) => Err(error.to_string()),
                    Err(_) => Err(format!("{} did not end in {} s", args.join(" "), ANSWER_LIMIT.as_secs())),
                }
            }
        }
    }
}

async fn connect(port: u16) -> Result<TcpStream, String> {
    let address = SocketAddr::new(ACTOR_V4.into(), port);
    match timeout(CONNECT_LIMIT, TcpStream::connect(address)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(format!("port {port}: {error}")),
        Err(_) => Err(format!("port {port} does not answer")),
    }
}

/// 200 to 399 is ready.
async fn ask(stream: &mut TcpStream, path: &str) -> Result<(), String> {
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: ateom\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.map_err(|error| error.to_string())?;
    // "HTTP/1.1 200" is all there is to know.
    let mut status = [0; 12];
    stream.read_exact(&mut status).await.map_err(|error| format!("GET {path}: {error}"))?;
    match std::str::from_utf8(&status[9..]).ok().and_then(|code| code.parse::<u16>().ok()) {
        Some(200..=399) if status.starts_with(b"HTTP/1.") => Ok(()),
        Some(code) => Err(format!("GET {path} answered {code}")),
        None => Err(format!("GET {path} did not answer in HTTP")),
    }
}

#[cfg(test)]
mod tests {
    use substrate_proto::types::HttpGet;

    use super::*;

    #[test]
    fn durations() {
        assert_eq!(parse_duration("20ms"), Some(Duration::from_millis(20)));
        assert_eq!(parse_duration("2m"), Some(Duration::from_mins(2)));
        for bad in ["", "5", "s", "-1s", "1.5s", "5 s", "99999999999999999999s", "18446744073709551615h"] {
            assert_eq!(parse_duration(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn probes_are_read_with_their_defaults_and_checked() {
        assert_eq!(Probe::of("a", None), Ok(None));
        assert_eq!(Probe::of("a", Some(&Readiness::default())), Ok(None));
        let http = |path: &str, port| Readiness {
            http_get: Some(HttpGet { path: path.into(), port }),
            ..Readiness::default()
        };
        let probe = Probe::of("a", Some(&http("", 8080))).unwrap().unwrap();
        assert_eq!(probe.kind, Kind::Http { path: "/".into(), port: 8080 });
        assert_eq!((probe.timeout, probe.period), (DEFAULT_TIMEOUT, DEFAULT_PERIOD));
        assert!(Probe::of("a", Some(&http("/", 0))).is_err());
        assert!(Probe::of("a", Some(&http("/", 65536))).is_err());
        assert!(Probe::of("a", Some(&http("/ HTTP/1.1\r\nX: y", 80))).is_err());
        let timed = Readiness { tcp_port: 80, timeout: "soon".into(), ..Readiness::default() };
        assert!(Probe::of("a", Some(&timed)).unwrap_err().to_string().contains("\"soon\""));
    }

    #[tokio::test]
    async fn an_answer_is_judged_by_its_status() {
        for (answer, ready) in [
            ("HTTP/1.1 204 No Content\r\n\r\n", true),
            ("HTTP/1.0 503 Busy\r\n\r\n", false),
            ("SSH-2.0-OpenSSH_9\r\n", false),
        ] {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let (mut server, _) = listener.accept().await.unwrap();
            server.write_all(answer.as_bytes()).await.unwrap();
            assert_eq!(ask(&mut client, "/").await.is_ok(), ready, "{answer}");
        }
    }
}

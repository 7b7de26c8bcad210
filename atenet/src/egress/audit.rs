// SPDX-License-Identifier: Apache-2.0
//! What the proxy carried and refused: one JSON line per flow and per denial, each with the actor's name.
//!
//! One task owns the file and the report to the control plane. Nothing is dropped: when the disk is slow, flows wait.
//! Equal denials are folded: the first is written at once, those of the next second become one line with a `count`.
//! The file is rotated by size. Reports to the control plane are batched each second, bounded, and dropped with a
//! log line only when it cannot be reached for long; the file has them all.
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use substrate_proto::ateapi::{Denial, ReportDenialsRequest};
use tokio::io::AsyncWriteExt as _;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::control::Control;

/// How long equal denials are folded, and how often reports are sent.
const FOLD: Duration = Duration::from_secs(1);
/// Different denials folded at a time; more are written one by one.
const FOLDED: usize = 4096;
/// Denials waiting for the control plane.
const UNREPORTED: usize = 4096;
/// Denials per report.
const BATCH: usize = 256;
const QUEUE: usize = 1024;

/// What became of a connection or query.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    /// Carried; `reason` says how it ended when not in order.
    Allowed,
    /// Refused by policy or address filter.
    Denied,
    /// Allowed, but the other side could not be reached.
    Failed,
}

/// One line of the audit log.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Record {
    /// RFC 3339, UTC, ms.
    pub(crate) time: String,
    pub(crate) verdict: Verdict,
    pub(crate) atespace: String,
    pub(crate) actor: String,
    pub(crate) uid: String,
    pub(crate) generation: u64,
    pub(crate) worker: String,
    /// "dns", "tls", "http", "tcp", "udp", "icmp", …
    pub(crate) protocol: String,
    /// What the actor dialled, or the name it asked for.
    pub(crate) destination: String,
    /// The name that the address stands for.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) name: String,
    /// The address that was connected to.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) upstream: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) reason: String,
    /// Bytes from the actor.
    pub(crate) sent: u64,
    /// Bytes to the actor.
    pub(crate) received: u64,
    /// How long it took.
    pub(crate) ms: u64,
    /// How many alike this line stands for.
    pub(crate) count: u32,
}

impl Record {
    fn key(&self) -> Key {
        Key {
            uid: self.uid.clone(),
            generation: self.generation,
            protocol: self.protocol.clone(),
            destination: self.destination.clone(),
            reason: self.reason.clone(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    uid: String,
    generation: u64,
    protocol: String,
    destination: String,
    reason: String,
}

/// Folds equal denials.
#[derive(Default)]
struct Fold {
    seen: HashMap<Key, Option<Record>>,
}

impl Fold {
    /// The record to be written now, unless it is folded into a later line.
    fn add(&mut self, record: Record) -> Option<Record> {
        if record.verdict != Verdict::Denied {
            return Some(record);
        }
        let room = self.seen.len() < FOLDED;
        match self.seen.get_mut(&record.key()) {
            Some(Some(folded)) => {
                folded.count = folded.count.saturating_add(record.count);
                folded.time = record.time;
                None
            }
            Some(folded @ None) => {
                *folded = Some(record);
                None
            }
            None => {
                if room {
                    self.seen.insert(record.key(), None);
                }
                Some(record)
            }
        }
    }

    /// The window is over.
    fn drain(&mut self) -> impl Iterator<Item = Record> + use<> {
        std::mem::take(&mut self.seen).into_values().flatten()
    }
}

/// Where records go; cheap to clone.
#[derive(Clone)]
pub(crate) struct Audit(mpsc::Sender<Record>);

impl Audit {
    /// Writes a record; waits while the writer is behind.
    pub(crate) async fn write(&self, record: Record) {
        if self.0.send(record).await.is_err() {
            tracing::error!("the audit log's task has ended; a record is lost");
        }
    }
}

/// Size and number of files.
#[derive(Debug, Clone)]
pub(crate) struct Rotation {
    /// Bytes of a file before it is rotated.
    pub(crate) bytes: u64,
    /// Rotated files kept.
    pub(crate) keep: u32,
}

struct Log {
    path: PathBuf,
    rotation: Rotation,
    file: tokio::fs::File,
    len: u64,
}

impl Log {
    async fn open(path: &Path, rotation: Rotation) -> io::Result<Self> {
        if let Some(dir) = path.parent() {
            tokio::fs::create_dir_all(dir).await?;
        }
        let file = tokio::fs::OpenOptions::new().create(true).append(true).mode(0o640).open(path).await?;
        let len = file.metadata().await?.len();
        Ok(Self { path: path.to_owned(), rotation, file, len })
    }

    fn rotated(&self, number: u32) -> PathBuf {
        let mut name = self.path.as_os_str().to_owned();
        name.push(format!(".{number}"));
        name.into()
    }

    async fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        if self.len > 0 && self.len + lines.len() as u64 > self.rotation.bytes {
            self.file.flush().await?;
            if self.rotation.keep == 0 {
                tokio::fs::remove_file(&self.path).await?;
            } else {
                for number in (1..self.rotation.keep).rev() {
                    match tokio::fs::rename(self.rotated(number), self.rotated(number + 1)).await {
                        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                        _ => {}
                    }
                }
                tokio::fs::rename(&self.path, self.rotated(1)).await?;
            }
            *self = Self::open(&self.path, self.rotation.clone()).await?;
        }
        self.file.write_all(lines).await?;
        self.file.flush().await?;
        self.len += lines.len() as u64;
        Ok(())
    }
}

/// Opens the log and starts its task, which ends once every [`Audit`] is gone or some time after `stop`.
pub(crate) async fn start(
    path: &Path,
    rotation: Rotation,
    control: Control,
    stop: CancellationToken,
) -> io::Result<(Audit, tokio::task::JoinHandle<()>)> {
    let log = Log::open(path, rotation).await?;
    let (send, receive) = mpsc::channel(QUEUE);
    Ok((Audit(send), tokio::spawn(run(log, receive, control, stop))))
}

async fn run(mut log: Log, mut records: mpsc::Receiver<Record>, control: Control, stop: CancellationToken) {
    let (reports, reporter) = mpsc::channel(UNREPORTED);
    let reporter = tokio::spawn(report(reporter, control, stop.clone()));
    let mut fold = Fold::default();
    let mut failing = false;
    let mut tick = tokio::time::interval_at(Instant::now() + FOLD, FOLD);
    let mut dropped = 0_u64;
    loop {
        let mut batch = Vec::new();
        tokio::select! {
            received = records.recv_many(&mut batch, 64) => if received == 0 { break },
            _ = tick.tick() => {}
            () = stop.cancelled() => break,
        }
        let folded = if batch.is_empty() { Some(fold.drain()) } else { None };
        let ready: Vec<Record> = batch
            .into_iter()
            .filter_map(|record| fold.add(record))
            .chain(folded.into_iter().flatten())
            .collect();
        write(&mut log, &ready, &mut failing).await;
        dropped += hand_over(ready, &reports);
        if dropped > 0 && reports.capacity() > 0 {
            tracing::warn!(dropped, "denials were not reported to the control plane; the audit log has them");
            dropped = 0;
        }
    }
    // What was sent before the end is written still.
    records.close();
    while let Some(record) = records.recv().await {
        if let Some(record) = fold.add(record) {
            write(&mut log, &[record], &mut failing).await;
        }
    }
    let rest: Vec<Record> = fold.drain().collect();
    write(&mut log, &rest, &mut failing).await;
    drop(reports);
    if tokio::time::timeout(FOLD, reporter).await.is_err() {
        tracing::debug!("the last denials were not reported");
    }
}

async fn write(log: &mut Log, records: &[Record], failing: &mut bool) {
    if records.is_empty() {
        return;
    }
    let mut lines = Vec::new();
    for record in records {
        match serde_json::to_writer(&mut lines, record) {
            Ok(()) => lines.push(b'\n'),
            Err(error) => tracing::error!(%error, "cannot encode an audit record"),
        }
    }
    match log.write(&lines).await {
        Ok(()) => *failing = false,
        Err(error) => {
            // The records are not lost entirely: they go to the process's own log.
            if !*failing {
                tracing::error!(path = %log.path.display(), %error, "cannot write the egress audit log");
            }
            *failing = true;
            tracing::warn!(records = %String::from_utf8_lossy(&lines), "egress audit");
        }
    }
}

/// Hands denials to the reporter; answers how many it had no room for.
fn hand_over(records: Vec<Record>, reports: &mpsc::Sender<Denial>) -> u64 {
    let mut dropped = 0;
    for record in records {
        if record.verdict != Verdict::Denied || record.uid.is_empty() {
            continue;
        }
        let denial = Denial {
            actor_uid: record.uid,
            generation: record.generation,
            time_ms: now_ms(),
            protocol: record.protocol,
            destination: if record.name.is_empty() || record.name == record.destination {
                record.destination
            } else {
                format!("{} ({})", record.destination, record.name)
            },
            reason: record.reason,
            count: record.count,
        };
        dropped += u64::from(reports.try_send(denial).is_err());
    }
    dropped
}

async fn report(mut denials: mpsc::Receiver<Denial>, mut control: Control, stop: CancellationToken) {
    loop {
        let mut batch = Vec::new();
        if denials.recv_many(&mut batch, BATCH).await == 0 {
            return;
        }
        let mut pause = Duration::from_millis(200);
        loop {
            let request = control.report_denials(ReportDenialsRequest { denials: batch.clone() });
            let error = match tokio::time::timeout(Duration::from_secs(5), request).await {
                Ok(Ok(_)) => break,
                Ok(Err(status)) => match status.code() {
                    tonic::Code::Unavailable | tonic::Code::DeadlineExceeded | tonic::Code::Aborted => {
                        status.message().to_owned()
                    }
                    _ => {
                        tracing::warn!(%status, denials = batch.len(), "the control plane refused denials");
                        break;
                    }
                },
                Err(_) => "no answer".to_owned(),
            };
            tracing::debug!(%error, denials = batch.len(), "cannot report denials yet");
            if stop.is_cancelled() {
                return;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(10));
        }
        // One report a second at most; the queue folds what comes meanwhile into the next.
        tokio::select! {
            () = tokio::time::sleep(FOLD) => {}
            () = stop.cancelled() => {}
        }
    }
}

fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// Now, RFC 3339 in UTC with ms.
pub(crate) fn now() -> String {
    rfc3339(now_ms())
}

/// Days to a civil date after Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms".
fn rfc3339(ms: i64) -> String {
    let (days, ms) = (ms.div_euclid(86_400_000), ms.rem_euclid(86_400_000));
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (seconds, ms) = (ms / 1000, ms % 1000);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{ms:03}Z",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(actor: &str, destination: &str, verdict: Verdict) -> Record {
        Record {
            time: now(),
            verdict,
            atespace: "team".into(),
            actor: actor.into(),
            uid: format!("uid-{actor}"),
            generation: 1,
            worker: "w".into(),
            protocol: "tcp".into(),
            destination: destination.into(),
            name: String::new(),
            upstream: String::new(),
            reason: String::new(),
            sent: 0,
            received: 0,
            ms: 0,
            count: 1,
        }
    }

    #[test]
    fn equal_denials_are_folded_and_nothing_else() {
        let mut fold = Fold::default();
        assert!(fold.add(record("bob", "1.1.1.1:80", Verdict::Denied)).is_some());
        for _ in 0..5 {
            assert!(fold.add(record("bob", "1.1.1.1:80", Verdict::Denied)).is_none());
        }
        assert!(fold.add(record("eve", "1.1.1.1:80", Verdict::Denied)).is_some());
        assert!(fold.add(record("bob", "1.1.1.1:81", Verdict::Denied)).is_some());
        assert!(fold.add(record("bob", "1.1.1.1:80", Verdict::Allowed)).is_some());
        let rest: Vec<_> = fold.drain().collect();
        assert_eq!(rest.len(), 1);
        assert_eq!(rest[0].count, 5);
        assert_eq!(fold.drain().count(), 0);
        for n in 0..2 * FOLDED {
            assert!(fold.add(record("bob", &n.to_string(), Verdict::Denied)).is_some());
        }
        assert_eq!(fold.seen.len(), FOLDED, "bounded, and nothing is lost beyond the bound");
    }

    #[test]
    fn times_are_written_in_utc() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_123, "2000-02-29T00:00:00.123Z"),
            (1_767_225_599_999, "2025-12-31T23:59:59.999Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(rfc3339(ms), text);
        }
    }

    #[tokio::test]
    async fn the_log_rotates_by_size_and_keeps_so_many() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("logs/audit.jsonl");
        let mut log = Log::open(&path, Rotation { bytes: 10, keep: 2 }).await.unwrap();
        for line in ["aaaaaa\n", "bbbbbb\n", "cccccc\n", "dddddd\n"] {
            log.write(line.as_bytes()).await.unwrap();
        }
        let read = |name: &str| std::fs::read_to_string(dir.path().join("logs").join(name)).ok();
        assert_eq!(read("audit.jsonl").unwrap(), "dddddd\n");
        assert_eq!(read("audit.jsonl.1").unwrap(), "cccccc\n");
        assert_eq!(read("audit.jsonl.2").unwrap(), "bbbbbb\n");
        assert!(read("audit.jsonl.3").is_none());
    }
}

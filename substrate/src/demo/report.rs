// SPDX-License-Identifier: Apache-2.0
//! What the demo says: for people what it does, the command they would type, the time and ✓ or ✗; for programs one
//! JSON object a beat.
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Map, Value};

use crate::cmd::print;
use crate::failure::Failure;

/// Facts of a beat, for its JSON object.
pub type Facts = Map<String, Value>;

/// Why a beat is a ✗.
#[derive(Debug)]
pub struct Miss {
    /// What had to be.
    pub expected: String,
    /// What was.
    pub seen: String,
}

impl From<Failure> for Miss {
    fn from(failure: Failure) -> Self {
        let way_out = failure.way_out.map_or_else(String::new, |way_out| format!(" ({way_out})"));
        Self { expected: "the call to succeed".to_owned(), seen: format!("{}{way_out}", failure.message) }
    }
}

impl From<tonic::Status> for Miss {
    fn from(status: tonic::Status) -> Self {
        Failure::from(status).into()
    }
}

/// Asserts something of a beat.
///
/// # Errors
/// A ✗ that says what was expected and what was seen.
pub fn expect(is_so: bool, expected: impl Into<String>, seen: impl std::fmt::Display) -> Result<(), Miss> {
    if is_so { Ok(()) } else { Err(Miss { expected: expected.into(), seen: seen.to_string() }) }
}

/// Prints the demo.
pub struct Report {
    json: bool,
    color: bool,
    act: &'static str,
    beat: u32,
    title: String,
    began: Instant,
}

#[derive(Serialize)]
struct Line<'a> {
    beat: u32,
    ok: bool,
    ms: u64,
    title: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    expected: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seen: Option<&'a str>,
    #[serde(flatten)]
    facts: Facts,
}

impl Report {
    /// For people, or one object a line.
    pub fn new(json: bool) -> Self {
        let color = !json && std::io::stdout().is_terminal();
        Self { json, color, act: "", beat: 0, title: String::new(), began: Instant::now() }
    }

    /// A line for people.
    pub fn say(&self, text: &str) -> Result<(), Failure> {
        if self.json { Ok(()) } else { print(&format!("{text}\n")) }
    }

    /// The command that a person would type for what comes now.
    pub fn command(&self, command: &str) -> Result<(), Failure> {
        self.say(&self.paint("2", &format!("     $ {command}")))
    }

    /// Something seen in the middle of a beat.
    pub fn detail(&self, text: &str) -> Result<(), Failure> {
        self.say(&format!("     {text}"))
    }

    /// Begins a beat.
    pub fn begin(&mut self, act: &'static str, beat: u32, title: &str) -> Result<(), Failure> {
        if act != self.act {
            self.act = act;
            self.say(&format!("\n{}", self.paint("1", act)))?;
        }
        self.beat = beat;
        title.clone_into(&mut self.title);
        self.began = Instant::now();
        self.say(&format!("{beat:>3}. {title}"))
    }

    /// Ends it well.
    pub fn hit(&self, summary: &str, facts: Facts) -> Result<(), Failure> {
        let took = self.began.elapsed();
        if !self.json {
            let mark = self.paint("32", "✓");
            return self.say(&format!("   {mark} {summary} ({})", seconds(took)));
        }
        Self::line(&Line {
            beat: self.beat,
            ok: true,
            ms: ms(took),
            title: &self.title,
            expected: None,
            seen: None,
            facts,
        })
    }

    /// Ends it badly.
    pub fn miss(&self, miss: &Miss) -> Result<(), Failure> {
        let took = self.began.elapsed();
        if !self.json {
            let mark = self.paint("31", "✗");
            return self.say(&format!(
                "   {mark} after {}\n     expected: {}\n     seen:     {}",
                seconds(took),
                miss.expected,
                miss.seen
            ));
        }
        Self::line(&Line {
            beat: self.beat,
            ok: false,
            ms: ms(took),
            title: &self.title,
            expected: Some(&miss.expected),
            seen: Some(&miss.seen),
            facts: Facts::new(),
        })
    }

    fn line(line: &Line<'_>) -> Result<(), Failure> {
        let text = serde_json::to_string(line)
            .map_err(|error| Failure::general(format!("cannot write JSON: {error}")))?;
        print(&(text + "\n"))
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.color { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
    }
}

fn ms(took: Duration) -> u64 {
    took.as_millis() as u64
}

fn seconds(took: Duration) -> String {
    if took < Duration::from_secs(1) {
        format!("{} ms", took.as_millis())
    } else {
        format!("{:.1} s", took.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_begins_with_beat_ok_and_ms_and_carries_its_facts() {
        let mut facts = Facts::new();
        facts.insert("nonce".into(), "ab".into());
        let line =
            Line { beat: 1, ok: true, ms: 12, title: "Create alice", expected: None, seen: None, facts };
        assert_eq!(
            serde_json::to_string(&line).unwrap(),
            r#"{"beat":1,"ok":true,"ms":12,"title":"Create alice","nonce":"ab"}"#
        );
    }
}

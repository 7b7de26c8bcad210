// SPDX-License-Identifier: Apache-2.0
//! Documents of `substrate apply`: YAML or JSON, one or many, `kind: Atespace | ActorTemplate | Actor`.
//!
//! ```yaml
//! kind: ActorTemplate
//! metadata: {name: helpdesk}
//! spec: {containers: [{name: main, image: "oci:/images/helpdesk"}]}
//! ---
//! kind: Actor
//! metadata: {name: alice}
//! spec: {template: helpdesk}
//! ```
//!
//! Unknown fields are refused with file, line and column. A document is read twice: once for its kind, once as that
//! kind, so that errors point into the text instead of into a buffered value. Which YAML library and why:
//! docs/decisions/2026-11-yaml.md.
use std::collections::BTreeMap;
use std::path::Path;

use base64::Engine as _;
use serde::Deserialize;
use substrate_proto::types;

use crate::failure::Failure;

/// Largest input, bytes.
pub const MAX_INPUT: usize = 16 << 20;

/// One document.
#[derive(Debug, Clone, PartialEq)]
pub enum Document {
    /// `kind: Atespace`.
    Atespace(Metadata),
    /// `kind: ActorTemplate`.
    Template(Metadata, Box<types::TemplateSpec>),
    /// `kind: Actor`; the flag is `start`.
    Actor(Metadata, types::ActorSpec, bool),
}

/// Who it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Metadata {
    /// Its name.
    pub name: String,
    /// Its atespace; empty: the command's.
    pub atespace: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations; actors only.
    pub annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Header {
    #[serde(default)]
    kind: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Typed<S> {
    #[serde(default, rename = "apiVersion")]
    api_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    #[serde(default)]
    metadata: Option<Metadata>,
    #[serde(default)]
    name: String,
    #[serde(default)]
    atespace: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    spec: S,
}

impl<S> Typed<S> {
    /// Who it is: `metadata`, or the same four fields beside `kind`.
    fn identify(self) -> Result<(Metadata, S), Wrong> {
        if !matches!(self.api_version.as_str(), "" | "substrate/v1") {
            return Err(Wrong::new(format!(
                "apiVersion {:?} is not known: write substrate/v1, or leave it out",
                self.api_version
            )));
        }
        let Self { name, atespace, labels, annotations, .. } = self;
        let flat = Metadata { name, atespace, labels, annotations };
        let metadata = match self.metadata {
            Some(_) if flat != Metadata::default() => {
                return Err(Wrong::new(
                    "name, atespace, labels and annotations stand in metadata or beside kind, not both",
                ));
            }
            Some(metadata) => metadata,
            None => flat,
        };
        if metadata.name.is_empty() {
            return Err(Wrong::new("metadata.name is missing"));
        }
        Ok((metadata, self.spec))
    }
}

/// An atespace has no spec; an empty one is let pass.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

/// An actor's spec as a person writes it: like `ActorSpec`, with files that can be read and a `start`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ActorDocument {
    template: String,
    #[serde(default)]
    env: BTreeMap<String, String>,
    #[serde(default)]
    files: Vec<FileDocument>,
    #[serde(default = "yes")]
    start: bool,
    #[serde(default = "yes")]
    wake_on_traffic: bool,
}

fn yes() -> bool {
    true
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct FileDocument {
    path: String,
    /// Octal text, "0400".
    #[serde(default)]
    mode: String,
    text: Option<String>,
    base64: Option<String>,
    source: Option<String>,
}

/// Reads every document of one input.
///
/// # Errors
/// Exit code 2 naming `origin`, the line and what is wrong; nothing is applied then.
pub fn parse(origin: &str, base: &Path, text: &str) -> Result<Vec<Document>, Failure> {
    if text.len() > MAX_INPUT {
        return Err(Failure::usage(format!(
            "{origin} has {} bytes, at most {MAX_INPUT} are read: split it",
            text.len()
        )));
    }
    let mut documents = Vec::new();
    for (first_line, part) in split(text) {
        if is_blank(part) {
            continue;
        }
        documents.push(parse_one(part, base).map_err(|error| error.at(origin, first_line))?);
    }
    if documents.is_empty() {
        return Err(Failure::usage(format!("{origin} holds no document: write kind, metadata and spec")));
    }
    Ok(documents)
}

/// What is wrong, and where inside its document when that is known (line and column from 1).
struct Wrong {
    message: String,
    position: Option<(u64, u64)>,
}

impl Wrong {
    fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), position: None }
    }

    fn at(&self, origin: &str, first_line: usize) -> Failure {
        let (line, column) = self.position.unwrap_or((1, 0));
        let line = line as usize + first_line - 1;
        let place = if column > 0 { format!("{origin}:{line}:{column}") } else { format!("{origin}:{line}") };
        Failure::usage(format!("{place}: {}", self.message))
    }
}

impl From<serde_saphyr::Error> for Wrong {
    fn from(error: serde_saphyr::Error) -> Self {
        let position = error.location().map(|place| (place.line(), place.column()));
        let text = error.without_snippet().to_string();
        // The position is said in front, in the whole file's lines.
        let message = match text.rsplit_once(" at line ") {
            Some((message, _)) => message.to_owned(),
            None => text,
        };
        Self { message, position: position.filter(|(line, _)| *line > 0) }
    }
}

fn parse_one(text: &str, base: &Path) -> Result<Document, Wrong> {
    let header: Header = serde_saphyr::from_str(text)?;
    match header.kind.as_str() {
        "Atespace" => {
            let document: Typed<Option<Nothing>> = serde_saphyr::from_str(text)?;
            Ok(Document::Atespace(document.identify()?.0))
        }
        "ActorTemplate" => {
            let document: Typed<types::TemplateSpec> = serde_saphyr::from_str(text)?;
            let (metadata, spec) = document.identify()?;
            if !metadata.annotations.is_empty() {
                return Err(Wrong::new("annotations: only actors have them"));
            }
            Ok(Document::Template(metadata, Box::new(spec)))
        }
        "Actor" => {
            let document: Typed<ActorDocument> = serde_saphyr::from_str(text)?;
            let (metadata, spec) = document.identify()?;
            let files = spec.files.into_iter().map(|file| read_file(file, base)).collect::<Result<_, _>>()?;
            let start = spec.start;
            let spec = types::ActorSpec {
                template: spec.template,
                env: spec.env,
                files,
                labels: metadata.labels.clone(),
                annotations: metadata.annotations.clone(),
                wake_on_traffic_disabled: !spec.wake_on_traffic,
            };
            Ok(Document::Actor(metadata, spec, start))
        }
        "" => Err(Wrong::new("kind is missing: write Atespace, ActorTemplate or Actor")),
        other => {
            Err(Wrong::new(format!("kind {other:?} is not known: write Atespace, ActorTemplate or Actor")))
        }
    }
}

fn read_file(file: FileDocument, base: &Path) -> Result<types::File, Wrong> {
    let path = file.path;
    let content = match (file.text, file.base64, file.source) {
        (Some(text), None, None) => text.into_bytes(),
        (None, Some(coded), None) => base64::engine::general_purpose::STANDARD
            .decode(coded.trim())
            .map_err(|error| Wrong::new(format!("file {path}: base64: {error}")))?,
        (None, None, Some(source)) => {
            let source = base.join(source);
            std::fs::read(&source).map_err(|error| {
                Wrong::new(format!("file {path}: cannot read {}: {error}", source.display()))
            })?
        }
        _ => return Err(Wrong::new(format!("file {path}: give exactly one of text, base64 and source"))),
    };
    let mode = match file.mode.as_str() {
        "" => 0o400,
        text => u32::from_str_radix(text.trim_start_matches("0o"), 8)
            .ok()
            .filter(|mode| *mode <= 0o777)
            .ok_or_else(|| Wrong::new(format!("file {path}: mode {text:?} is not octal: write \"0400\"")))?,
    };
    Ok(types::File { path, mode, content })
}

/// The documents of a stream with the line each begins on. A line that begins with `---` is a marker wherever it
/// stands (YAML 1.2, section 9.1.2: content may not begin a line with it).
fn split(text: &str) -> Vec<(usize, &str)> {
    let mut parts = Vec::new();
    let (mut start, mut start_line, mut offset) = (0, 1, 0);
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let is_marker = line.strip_prefix("---").is_some_and(|rest| rest.trim().is_empty());
        if is_marker {
            parts.push((start_line, &text[start..offset]));
            start = offset + line.len();
            start_line = index + 2;
        }
        offset += line.len();
    }
    parts.push((start_line, &text[start..]));
    parts
}

fn is_blank(text: &str) -> bool {
    text.lines().all(|line| {
        let line = line.trim();
        line.is_empty() || line.starts_with('#') || line == "..."
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<Document>, String> {
        parse("f.yaml", Path::new("."), text).map_err(|failure| failure.message)
    }

    #[test]
    fn several_documents_in_yaml_and_json() {
        let documents = read(
            "# a comment\n---\nkind: Atespace\nmetadata: {name: team}\n---\n\
             {\"kind\": \"ActorTemplate\", \"metadata\": {\"name\": \"t\"},\n \"spec\": {\"sandboxClass\": \"gvisor\", \
             \"containers\": [{\"name\": \"main\", \"image\": \"oci:/i\", \"ports\": [80]}]}}\n---\n\
             apiVersion: substrate/v1\nkind: Actor\nmetadata:\n  name: alice\n  labels: {a: b}\nspec:\n  template: t\n\
             \x20 files:\n  - {path: /etc/key, text: secret}\n  start: false\n",
        )
        .unwrap();
        assert_eq!(documents.len(), 3);
        let Document::Template(_, spec) = &documents[1] else { panic!("not a template") };
        assert_eq!(spec.containers[0].ports, [80]);
        let Document::Actor(metadata, spec, start) = &documents[2] else { panic!("not an actor") };
        assert_eq!((metadata.name.as_str(), *start), ("alice", false));
        assert_eq!(spec.files[0].content, b"secret");
        assert_eq!(spec.files[0].mode, 0o400);
        assert_eq!(spec.labels["a"], "b");
    }

    #[test]
    fn identity_may_stand_beside_kind_but_not_twice() {
        let documents = read("kind: Actor\nname: alice\natespace: team\nspec: {template: t}\n").unwrap();
        let Document::Actor(metadata, ..) = &documents[0] else { panic!("not an actor") };
        assert_eq!((metadata.name.as_str(), metadata.atespace.as_str()), ("alice", "team"));
        assert!(
            read("kind: Actor\nname: a\nmetadata: {name: a}\nspec: {template: t}\n")
                .unwrap_err()
                .contains("both")
        );
    }

    #[test]
    fn an_unknown_field_is_named_with_its_line_in_the_file() {
        let error = read(
            "kind: Atespace\nmetadata: {name: a}\n---\nkind: ActorTemplate\nmetadata: {name: t}\nspec:\n  containers:\n\
             \x20 - name: main\n    imgae: x\n",
        )
        .unwrap_err();
        assert!(error.starts_with("f.yaml:9:5: unknown field `imgae`"), "{error}");
        assert!(error.contains("image"), "{error}");
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        let cases = [
            ("metadata: {name: a}\n", "f.yaml:1: kind is missing"),
            ("kind: Pod\n", "f.yaml:1: kind \"Pod\" is not known"),
            ("kind: Atespace\nmetadata: {}\n", "f.yaml:1: metadata.name is missing"),
            ("kind: Actor\nmetadata: {name: a}\nspec: {}\n", "missing field `template`"),
            ("kind: Actor\nmetadata: {name: a}\nspec:\n  template: t\n  start: maybe\n", "f.yaml:5:10: "),
            ("kind: Atespace\nkind: Actor\n", "f.yaml:2:1: duplicate"),
            ("kind: Atespace\napiVersion: v2\nmetadata: {name: a}\n", "apiVersion \"v2\" is not known"),
            ("# nothing\n", "f.yaml holds no document"),
            ("kind: [\n", "f.yaml:"),
            (
                "kind: Actor\nmetadata: {name: a}\nspec: {template: t, files: [{path: /k, text: a, base64: b}]}\n",
                "file /k: give exactly one of",
            ),
            (
                "kind: Actor\nmetadata: {name: a}\nspec: {template: t, files: [{path: /k, text: a, mode: \"9\"}]}\n",
                "mode \"9\" is not octal",
            ),
        ];
        for (text, expected) in cases {
            let error = read(text).unwrap_err();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
    }

    #[test]
    fn a_bomb_of_aliases_is_refused() {
        let mut text = String::from(
            "kind: Atespace\nmetadata:\n  name: a\n  labels:\n    a: &a x\nx0: &x0 [y,y,y,y,y,y,y,y,y]\n",
        );
        for level in 1..12 {
            let reference = format!("*x{},", level - 1).repeat(9);
            text.extend(["x", &level.to_string(), ": &x", &level.to_string(), " [", &reference, "]\n"]);
        }
        let error = read(&text).unwrap_err();
        assert!(error.contains("budget") || error.contains("alias"), "{error}");
    }
}

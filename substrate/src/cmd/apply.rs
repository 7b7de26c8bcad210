// SPDX-License-Identifier: Apache-2.0
//! `substrate apply`: brings the control plane to what documents say. Every file is read and checked before the first
//! call, and documents are applied in the order atespaces, templates, actors, whatever their order in the files.
use std::io::Read as _;
use std::path::{Path, PathBuf};

use substrate_proto::ateapi as api;
use substrate_proto::types;

use crate::args::{Apply, Global, Output};
use crate::client::{Control, connect, request_id};
use crate::cmd::create::{check_name, ensure_atespace};
use crate::cmd::{machine_text, print, wait_until_ready};
use crate::document::{self, Document, Metadata};
use crate::failure::{Doing as _, Exit, Failure};
use crate::progress::during;

/// `substrate apply`.
pub async fn run(options: Apply, global: &Global) -> Result<(), Failure> {
    let mut documents = Vec::new();
    for file in &options.files {
        let (origin, base, text) = read(file)?;
        documents.extend(document::parse(&origin, &base, &text)?);
    }
    documents.sort_by_key(|document| match document {
        Document::Atespace(_) => 0,
        Document::Template(..) => 1,
        Document::Actor(..) => 2,
    });
    for document in &documents {
        let (kind, metadata) = match document {
            Document::Atespace(metadata) => ("atespace", metadata),
            Document::Template(metadata, _) => ("template", metadata),
            Document::Actor(metadata, ..) => ("actor", metadata),
        };
        check_name(kind, &metadata.name)?;
    }
    let mut client = connect(global).await?;
    for document in documents {
        let (kind, name, outcome) = apply(&mut client, document, &options, global).await?;
        report(kind, &name, outcome, options.dry_run, global.output)?;
    }
    Ok(())
}

/// Name for messages, directory that relative paths start from, text.
fn read(file: &Path) -> Result<(String, PathBuf, String), Failure> {
    if file == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).doing(|| "cannot read standard input".to_owned())?;
        return Ok(("standard input".to_owned(), PathBuf::from("."), text));
    }
    let text = std::fs::read_to_string(file).map_err(|error| {
        let exit = if error.kind() == std::io::ErrorKind::NotFound { Exit::NotFound } else { Exit::Failed };
        Failure::new(exit, format!("cannot read {}: {error}", file.display()))
    })?;
    let base = file.parent().unwrap_or(Path::new(".")).to_owned();
    Ok((file.display().to_string(), base, text))
}

fn report(kind: &str, name: &str, outcome: &str, dry_run: bool, output: Output) -> Result<(), Failure> {
    match output {
        output if output.is_machine() => {
            let value =
                serde_json::json!({"kind": kind, "name": name, "outcome": outcome, "dryRun": dry_run});
            print(&machine_text(&value, output)?)
        }
        Output::Name => print(&format!("{kind}/{name}\n")),
        _ => print(&format!("{kind}/{name} {outcome}{}\n", if dry_run { " (dry run)" } else { "" })),
    }
}

async fn apply(
    client: &mut Control,
    document: Document,
    options: &Apply,
    global: &Global,
) -> Result<(&'static str, String, &'static str), Failure> {
    match document {
        Document::Atespace(metadata) => {
            let outcome = atespace(client, &metadata, options.dry_run).await?;
            Ok(("atespace", metadata.name, outcome))
        }
        Document::Template(metadata, spec) => {
            let outcome = template(client, &metadata, *spec, options.dry_run, global).await?;
            Ok(("template", metadata.name, outcome))
        }
        Document::Actor(metadata, spec, start) => {
            let outcome = actor(client, &metadata, spec, start, options, global).await?;
            Ok(("actor", metadata.name, outcome))
        }
    }
}

fn atespace_of(metadata: &Metadata, global: &Global) -> String {
    if metadata.atespace.is_empty() { global.atespace.clone() } else { metadata.atespace.clone() }
}

async fn atespace(client: &mut Control, metadata: &Metadata, dry_run: bool) -> Result<&'static str, Failure> {
    match client.get_atespace(api::GetAtespaceRequest { name: metadata.name.clone() }).await {
        Ok(_) => return Ok("unchanged"),
        Err(status) if status.code() == tonic::Code::NotFound => {}
        Err(status) => return Err(status.into()),
    }
    if !dry_run {
        let request = api::CreateAtespaceRequest {
            name: metadata.name.clone(),
            labels: metadata.labels.clone(),
            request_id: request_id(),
        };
        client.create_atespace(request).await?;
    }
    Ok("created")
}

async fn template(
    client: &mut Control,
    metadata: &Metadata,
    mut spec: types::TemplateSpec,
    dry_run: bool,
    global: &Global,
) -> Result<&'static str, Failure> {
    let atespace = atespace_of(metadata, global);
    for container in &mut spec.containers {
        container.image = super::create::absolute_image(&container.image)?;
    }
    let get = api::GetTemplateRequest { atespace: atespace.clone(), name: metadata.name.clone() };
    let before = match client.get_template(get).await {
        Ok(template) => Some(template.into_inner().uid),
        Err(status) if status.code() == tonic::Code::NotFound => None,
        Err(status) => return Err(status.into()),
    };
    if !dry_run {
        ensure_atespace(client, &atespace).await?;
    }
    let request = api::CreateTemplateRequest {
        atespace,
        name: metadata.name.clone(),
        spec: Some(spec),
        labels: metadata.labels.clone(),
        request_id: request_id(),
        dry_run,
    };
    let doing = format!("resolving the images of template {}", metadata.name);
    let answer = during(doing, client.create_template(request)).await.map_err(|status| {
        let exists = status.code() == tonic::Code::AlreadyExists;
        let failure = Failure::from(status).context(&format!("template {}", metadata.name));
        if exists && failure.way_out.is_none() {
            return failure.with_way_out("templates are immutable: give the changed one another name");
        }
        failure
    })?;
    let unchanged = before.is_some_and(|uid| uid == answer.into_inner().uid);
    Ok(if unchanged { "unchanged" } else { "created" })
}

async fn actor(
    client: &mut Control,
    metadata: &Metadata,
    spec: types::ActorSpec,
    start: bool,
    options: &Apply,
    global: &Global,
) -> Result<&'static str, Failure> {
    let atespace = atespace_of(metadata, global);
    let reference =
        api::ActorRef { atespace: atespace.clone(), name: metadata.name.clone(), uid: String::new() };
    let there = match client.get_actor(api::GetActorRequest { actor: Some(reference.clone()) }).await {
        Ok(actor) => Some(actor.into_inner()),
        Err(status) if status.code() == tonic::Code::NotFound => None,
        Err(status) => return Err(status.into()),
    };
    let Some(there) = there else {
        if !options.dry_run {
            let request = api::CreateActorRequest {
                atespace,
                name: metadata.name.clone(),
                spec: Some(spec),
                start,
                request_id: request_id(),
                uid: String::new(),
            };
            let created = client
                .create_actor(request)
                .await
                .map_err(|status| Failure::from(status).context(&format!("actor {}", metadata.name)))?
                .into_inner();
            if options.wait && start {
                wait_until_ready(client, &created).await?;
            }
        }
        return Ok("created");
    };
    let has = there.spec.unwrap_or_default();
    if has.template != spec.template {
        return Err(Failure::new(
            Exit::Refused,
            format!("actor {} is made from template {}, not {}", metadata.name, has.template, spec.template),
        )
        .with_way_out("an actor keeps its template: delete it first, or choose another name"));
    }
    if has.labels == spec.labels && has.annotations == spec.annotations {
        return Ok("unchanged");
    }
    if !options.dry_run {
        let request = api::UpdateActorRequest {
            actor: Some(reference),
            labels: Some(api::LabelSet { entries: spec.labels }),
            annotations: Some(api::LabelSet { entries: spec.annotations }),
            request_id: request_id(),
            ..Default::default()
        };
        client.update_actor(request).await?;
    }
    Ok("updated")
}

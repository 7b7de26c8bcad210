// SPDX-License-Identifier: Apache-2.0
//! `substrate create`.
//!
//! `create actor --image` makes a template of its own for what was typed, named by the digest of its spec, so that the
//! same command twice makes one template. When the actor is then refused, a template that was new is removed again.
use std::collections::BTreeMap;

use sha2::{Digest as _, Sha256};
use substrate_proto::ateapi as api;
use substrate_proto::types;

use crate::args::{ContainerArgs, Create, CreateActor, CreateTemplate, Global};
use crate::client::{Control, connect, request_id};
use crate::cmd::{print_done, wait_until_ready};
use crate::failure::{Doing as _, Failure};
use crate::progress::during;
use crate::view::{Actor, Atespace, Template};

/// Largest file that is delivered into an actor, bytes; well below what one gRPC message holds.
const MAX_FILE: u64 = 1 << 20;

/// `substrate create`.
pub async fn run(options: Create, global: &Global) -> Result<(), Failure> {
    match options {
        Create::Actor(options) => actor(*options, global).await,
        Create::Template(options) => template(*options, global).await,
        Create::Atespace { name, labels } => {
            let mut client = connect(global).await?;
            let request = api::CreateAtespaceRequest {
                name,
                labels: labels.into_iter().collect(),
                request_id: request_id(),
            };
            let atespace = Atespace::from(client.create_atespace(request).await?.into_inner());
            let line = format!("atespace/{} created", atespace.name);
            print_done(&atespace, &line, global.output)
        }
    }
}

async fn actor(options: CreateActor, global: &Global) -> Result<(), Failure> {
    check_name("actor", &options.name)?;
    let mut spec = types::ActorSpec {
        template: options.template.clone().unwrap_or_default(),
        env: options.env.into_iter().collect(),
        files: options
            .files
            .iter()
            .map(|(path, source)| read_file(path, source))
            .collect::<Result<_, _>>()?,
        labels: options.labels.into_iter().collect(),
        annotations: BTreeMap::new(),
        wake_on_traffic_disabled: options.no_wake_on_traffic,
    };
    let mut client = connect(global).await?;
    let mut fresh = None;
    if options.template.is_none() {
        let (template, is_new) = own_template(&mut client, &options.container, global).await?;
        spec.template.clone_from(&template);
        fresh = is_new.then_some(template);
    }
    let request = api::CreateActorRequest {
        atespace: global.atespace.clone(),
        name: options.name.clone(),
        spec: Some(spec),
        start: !options.no_start,
        request_id: request_id(),
        uid: String::new(),
    };
    let created = match client.create_actor(request).await {
        Ok(answer) => answer.into_inner(),
        Err(status) => {
            if let Some(template) = fresh {
                remove_template(&mut client, &template, global).await;
            }
            return Err(status.into());
        }
    };
    let actor = if options.wait { wait_until_ready(&mut client, &created).await? } else { created };
    let actor = Actor::from(actor);
    let line = format!("actor/{} created ({})", actor.name, actor.state_text());
    print_done(&actor, &line, global.output)
}

/// The template of an image typed on the command line, and whether it is new.
async fn own_template(
    client: &mut Control,
    container: &ContainerArgs,
    global: &Global,
) -> Result<(String, bool), Failure> {
    let spec = template_spec(container, BTreeMap::new())?;
    let canonical = serde_json::to_vec(&spec).doing(|| "cannot write the template".to_owned())?;
    let name = format!("image-{}", &hex::encode(Sha256::digest(canonical))[..12]);
    let get = api::GetTemplateRequest { atespace: global.atespace.clone(), name: name.clone() };
    match client.get_template(get).await {
        Ok(_) => return Ok((name, false)),
        Err(status) if status.code() == tonic::Code::NotFound => {}
        Err(status) => return Err(status.into()),
    }
    ensure_atespace(client, &global.atespace).await?;
    let request = api::CreateTemplateRequest {
        atespace: global.atespace.clone(),
        name: name.clone(),
        spec: Some(spec),
        labels: BTreeMap::new(),
        request_id: request_id(),
        dry_run: false,
    };
    let doing = format!("resolving {}", container.image.as_deref().unwrap_or_default());
    during(doing, client.create_template(request)).await?;
    Ok((name, true))
}

async fn remove_template(client: &mut Control, name: &str, global: &Global) {
    let request = api::DeleteTemplateRequest {
        atespace: global.atespace.clone(),
        name: name.to_owned(),
        request_id: request_id(),
    };
    if let Err(status) = client.delete_template(request).await {
        eprintln!("substrate: cannot remove template {name} again: {}", status.message());
    }
}

/// The default atespace is there for everyone; any other is created on purpose.
pub async fn ensure_atespace(client: &mut Control, name: &str) -> Result<(), Failure> {
    if name != crate::args::DEFAULT_ATESPACE {
        return Ok(());
    }
    let request =
        api::CreateAtespaceRequest { name: name.to_owned(), request_id: request_id(), ..Default::default() };
    match client.create_atespace(request).await {
        Ok(_) => Ok(()),
        Err(status) if status.code() == tonic::Code::AlreadyExists => Ok(()),
        Err(status) => Err(status.into()),
    }
}

async fn template(options: CreateTemplate, global: &Global) -> Result<(), Failure> {
    check_name("template", &options.name)?;
    if options.container.image.is_none() {
        return Err(Failure::usage(format!("template {} needs an image", options.name))
            .with_way_out("give --image REF, or write a document for `substrate apply -f`"));
    }
    let spec = template_spec(&options.container, options.env.into_iter().collect())?;
    let mut client = connect(global).await?;
    ensure_atespace(&mut client, &global.atespace).await?;
    let request = api::CreateTemplateRequest {
        atespace: global.atespace.clone(),
        name: options.name,
        spec: Some(spec),
        labels: options.labels.into_iter().collect(),
        request_id: request_id(),
        dry_run: false,
    };
    let template =
        Template::from(during("resolving the image", client.create_template(request)).await?.into_inner());
    let line = format!("template/{} created", template.name);
    print_done(&template, &line, global.output)
}

/// What the options describe, as a template.
fn template_spec(
    options: &ContainerArgs,
    env: BTreeMap<String, String>,
) -> Result<types::TemplateSpec, Failure> {
    let readiness = match (&options.ready_path, options.ports.first()) {
        (Some(path), Some(port)) => Some(types::Readiness {
            http_get: Some(types::HttpGet { path: path.clone(), port: *port }),
            ..Default::default()
        }),
        (None, Some(port)) => Some(types::Readiness { tcp_port: *port, ..Default::default() }),
        _ => None,
    };
    let (command, args) = match options.command.split_first() {
        Some((program, rest)) => (vec![program.clone()], rest.to_vec()),
        None => (Vec::new(), Vec::new()),
    };
    let container = types::Container {
        name: "main".to_owned(),
        image: absolute_image(options.image.as_deref().unwrap_or_default())?,
        command,
        args,
        env,
        readiness,
        ports: options.ports.clone(),
        ..Default::default()
    };
    let resources = (options.cpu.is_some() || options.memory.is_some()).then(|| types::Resources {
        cpu: options.cpu.clone().unwrap_or_default(),
        memory: options.memory.clone().unwrap_or_default(),
        pids: 0,
    });
    let allow = options.allow.iter().map(|text| egress_rule(text)).collect::<Result<Vec<_>, _>>()?;
    Ok(types::TemplateSpec {
        sandbox_class: options.class.clone().unwrap_or_default(),
        containers: vec![container],
        resources,
        idle: options
            .suspend_after
            .clone()
            .map(|suspend_after| types::IdlePolicy { suspend_after, ..Default::default() }),
        egress: (!allow.is_empty()).then_some(types::EgressPolicy { allow }),
        ..Default::default()
    })
}

/// `oci:` references are paths of the machine that resolves them; a person types them relative to where they are.
pub fn absolute_image(image: &str) -> Result<String, Failure> {
    for scheme in ["oci:", "oci-archive:"] {
        if let Some(path) = image.strip_prefix(scheme)
            && !path.starts_with('/')
        {
            let here = std::env::current_dir().doing(|| "cannot tell the current directory".to_owned())?;
            return Ok(format!("{scheme}{}", here.join(path).display()));
        }
    }
    Ok(image.to_owned())
}

fn egress_rule(text: &str) -> Result<types::EgressRule, Failure> {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) => {
            let port = port.parse::<u16>().ok().filter(|port| *port > 0).ok_or_else(|| {
                Failure::usage(format!("--allow {text}: {port:?} is not a port (1 to 65535)"))
            })?;
            (host, port)
        }
        None => (text, 443),
    };
    let protocol = match port {
        443 => "tls",
        80 => "http",
        _ => "tcp",
    };
    Ok(types::EgressRule {
        host: host.to_owned(),
        ports: vec![u32::from(port)],
        protocol: protocol.to_owned(),
        cidr: String::new(),
    })
}

fn read_file(path: &str, source: &str) -> Result<types::File, Failure> {
    let size = std::fs::metadata(source).doing(|| format!("--file {path}: cannot read {source}"))?.len();
    if size > MAX_FILE {
        return Err(Failure::usage(format!(
            "--file {path}: {source} has {size} bytes, at most {MAX_FILE} are delivered"
        ))
        .with_way_out("put large files into the image or a volume, or copy them with `substrate cp`"));
    }
    let content = std::fs::read(source).doing(|| format!("--file {path}: cannot read {source}"))?;
    Ok(types::File { path: path.to_owned(), mode: 0o400, content })
}

/// Names are checked before anything is made for them; the control plane checks them again.
pub fn check_name(kind: &str, name: &str) -> Result<(), Failure> {
    if ateapi::model::names::is_label(name) {
        return Ok(());
    }
    Err(Failure::usage(format!(
        "{kind} name {name:?} is not a DNS-1123 label: use 1 to 63 of a-z, 0-9 and '-', begun and ended by a letter \
         or digit"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(image: &str) -> ContainerArgs {
        ContainerArgs { image: Some(image.to_owned()), ..ContainerArgs::default() }
    }

    #[test]
    fn what_is_typed_becomes_a_template() {
        let options = ContainerArgs {
            ports: vec![8080, 9090],
            ready_path: Some("/healthz".into()),
            command: vec!["sh".into(), "-c".into(), "x".into()],
            allow: vec!["api.example.com".into(), "db.example.com:5432".into()],
            memory: Some("256MiB".into()),
            ..container("oci:/i")
        };
        let spec = template_spec(&options, BTreeMap::new()).unwrap();
        let main = &spec.containers[0];
        assert_eq!((main.command.len(), main.args.len()), (1, 2));
        assert_eq!(main.readiness.as_ref().unwrap().http_get.as_ref().unwrap().port, 8080);
        let rules = spec.egress.unwrap().allow;
        assert_eq!((rules[0].ports[0], rules[0].protocol.as_str()), (443, "tls"));
        assert_eq!((rules[1].ports[0], rules[1].protocol.as_str()), (5432, "tcp"));
        assert_eq!(spec.resources.unwrap().memory, "256MiB");
    }

    #[test]
    fn a_relative_layout_is_made_absolute() {
        let here = std::env::current_dir().unwrap();
        assert_eq!(
            absolute_image("oci:images/a:v1").unwrap(),
            format!("oci:{}", here.join("images/a:v1").display())
        );
        assert_eq!(absolute_image("oci:/images/a").unwrap(), "oci:/images/a");
        assert_eq!(absolute_image("reg.example/a:v1").unwrap(), "reg.example/a:v1");
    }

    #[test]
    fn wrong_input_is_usage() {
        assert_eq!(check_name("actor", "Not_DNS").unwrap_err().exit, crate::failure::Exit::Usage);
        assert!(egress_rule("a.example:0").is_err());
        assert!(
            read_file("/etc/key", "/nonexistent/file").unwrap_err().message.contains("/nonexistent/file")
        );
    }
}

// SPDX-License-Identifier: Apache-2.0
//! What all calls share, and how actors are looked up.
use std::sync::{Arc, Mutex};

use substrate_proto::ateapi::Actor;
use substrate_proto::types::{ActorSpec, TemplateSpec};
use tokio::sync::{Notify, mpsc};
use tokio_util::task::TaskTracker;
use tonic::Code;

use crate::condition;
use crate::config::Config;
use crate::control::Control;
use crate::driver_config::SandboxClass;
use crate::failure::Failure;
use crate::gates::{Gates, Key};
use crate::hub::Hub;
use crate::probe::Probes;
use crate::receipt::Receipt;
use crate::supervisor::{self, Advisory};
use crate::validate::{self, Wanted};
use crate::{names, synthesize};

/// The driver's parts.
pub struct Driver {
    /// What it was told.
    pub config: Config,
    /// What is mounted into sandboxes with a supervisor.
    pub delivery: supervisor::Delivery,
    /// What `auto` rests on, where nobody named the supervisor's mode.
    pub probes: Option<Probes>,
    /// The control plane.
    pub control: Control,
    /// The watch.
    pub hub: Hub,
    /// Who touches what.
    pub gates: Gates,
    /// Wakes the sweep of what a failed or interrupted create left ([`crate::journal`]).
    pub sweep: Arc<Notify>,
    /// Actors (uid and nonce) of failed creates that may exist or may still appear.
    pub debts: Mutex<Vec<(String, String)>>,
    /// What the gateway has shown of sandboxes ([`crate::receipt`]).
    pub receipts: mpsc::UnboundedSender<Receipt>,
    /// Work that outlives its call.
    pub tasks: TaskTracker,
}

/// A request, ready to be carried out.
pub struct Plan {
    /// What is wanted.
    pub wanted: Wanted,
    /// The template, images pinned; none with a pre-made one.
    pub template: Option<TemplateSpec>,
    /// Name of the template.
    pub template_name: String,
    /// The actor, without its create mark.
    pub actor: ActorSpec,
    /// What the user should know.
    pub advisories: Vec<Advisory>,
    /// The atespace had to be made to ask about the template.
    pub made_atespace: bool,
}

impl Driver {
    /// The sandbox of that id, if there is one.
    pub async fn find(&self, sandbox_id: &str) -> Result<Option<Actor>, Failure> {
        if sandbox_id.is_empty() {
            return Err(Failure::Invalid(vec![crate::failure::Violation::new("sandbox_id", "is empty")]));
        }
        let actor = self.control.get_actor(&names::uid(sandbox_id)).await?;
        // An actor of that uid that is not this sandbox is none of the gateway's.
        Ok(actor.filter(|actor| condition::sandbox_id(actor) == Some(sandbox_id)))
    }

    /// The sandbox of that id.
    pub async fn sandbox(&self, sandbox_id: &str) -> Result<Actor, Failure> {
        self.find(sandbox_id)
            .await?
            .ok_or_else(|| Failure::Missing(format!("there is no sandbox with id {sandbox_id:?}")))
    }

    /// Turns a request into a plan, asking the control plane what only it can judge; changes nothing.
    pub async fn plan(&self, sandbox: &substrate_proto::compute::DriverSandbox) -> Result<Plan, Failure> {
        let wanted = validate::read(sandbox, &self.config).map_err(Failure::Invalid)?;
        let mut spec = synthesize::template(&wanted, &self.config);
        let mut actor = synthesize::actor(&wanted, "", "");
        let mut advisories = wanted.advisories.clone();
        advisories.extend(supervisor::deliver(&self.config, &self.delivery, &wanted, &mut spec, &mut actor));
        self.tenancy(&wanted).await?;
        advisories.extend(self.chosen_mode(&wanted).await?);
        let mut made_atespace = false;
        let (template, template_name) = if let Some(name) = &wanted.premade {
            self.premade(&wanted, name, spec).await?;
            (None, name.clone())
        } else {
            let pinned;
            (pinned, made_atespace) = self.pin(&wanted, spec).await?;
            let name = names::template(&pinned);
            (Some(pinned), name)
        };
        actor.template.clone_from(&template_name);
        Ok(Plan { wanted, template, template_name, actor, advisories, made_atespace })
    }

    /// Why a sandbox gets the supervisor's mode that nobody named.
    async fn chosen_mode(&self, wanted: &Wanted) -> Result<Option<Advisory>, Failure> {
        let class = wanted.class.unwrap_or(self.config.default_sandbox_class);
        let Some(probes) = &self.probes else { return Ok(None) };
        let seen = probes.reason(class).await?;
        let message = match class {
            SandboxClass::Gvisor => {
                format!("auto chose process mode: {seen}; strict and sidecar cannot be had on gVisor")
            }
            SandboxClass::Microvm => format!("auto chose strict mode: {seen}"),
        };
        Ok(Some(Advisory { subsystem: "supervisor", message }))
    }

    /// The same spec with its images pinned, if the control plane accepts it; and whether the atespace had to be made
    /// to ask. It then stays for the create that follows, and goes again if the answer is no.
    async fn pin(&self, wanted: &Wanted, spec: TemplateSpec) -> Result<(TemplateSpec, bool), Failure> {
        match self.dry_run(wanted, &spec).await {
            Err(failure)
                if failure.code() == Code::NotFound
                    && self.control.get_atespace(&wanted.atespace).await?.is_none() =>
            {
                let held = self.gates.hold(Key::Atespace(wanted.atespace.clone())).await;
                let answer = match self.ensure_atespace(&wanted.tenant, true).await {
                    Ok(made) => self.dry_run(wanted, &spec).await.map(|pinned| (pinned, made)),
                    Err(failure) => Err(failure),
                };
                drop(held);
                if answer.is_err()
                    && let Err(failure) = self.reap_atespace(&wanted.atespace).await
                {
                    tracing::warn!(error = %failure, "cannot take an atespace back; it is tried again");
                    self.sweep.notify_one();
                }
                answer
            }
            answer => answer.map(|pinned| (pinned, false)),
        }
    }

    async fn dry_run(&self, wanted: &Wanted, spec: &TemplateSpec) -> Result<TemplateSpec, Failure> {
        let name = names::template(spec);
        let answer = self
            .control
            .create_template(&wanted.atespace, &name, spec.clone(), synthesize::template_labels(), true)
            .await?;
        Ok(answer.spec.unwrap_or_else(|| spec.clone()))
    }

    async fn premade(&self, wanted: &Wanted, name: &str, ours: TemplateSpec) -> Result<(), Failure> {
        let template = self.control.get_template(&wanted.atespace, name).await?.ok_or_else(|| {
            Failure::Precondition(format!(
                "{}: there is no template {name:?} in atespace {:?}: create it there first, or leave the annotation out",
                names::PREMADE_TEMPLATE,
                wanted.atespace
            ))
        })?;
        let premade = template.spec.unwrap_or_default();
        let image = premade.containers.first().map(|container| container.image.as_str());
        // Only a resolved tag can be compared with a pinned image.
        let resolve = !wanted.image.is_empty()
            && wanted.image != self.config.default_image
            && image != Some(&wanted.image)
            && crate::image::digest(&wanted.image).is_none();
        let pinned = if resolve { Some(self.dry_run(wanted, &ours).await?) } else { None };
        let pinned_image = pinned
            .as_ref()
            .and_then(|spec| spec.containers.first())
            .map(|container| container.image.as_str());
        let violations = synthesize::unmet(wanted, &self.config, &premade, pinned_image);
        if violations.is_empty() { Ok(()) } else { Err(Failure::Invalid(violations)) }
    }
}

// SPDX-License-Identifier: Apache-2.0
//! The session hub ([`substrate_session`]) beside the driver: fed from the driver's one watch, dialling the configured
//! gateway, waking through the driver's client.
use std::io;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};

use substrate_proto::ateapi::{Actor, ActorState, WatchResponse, watch_response::Change};
use substrate_proto::compute::{WatchSandboxesEvent, watch_sandboxes_event::Payload};
use substrate_session::hub::gateway::{Carrier, Connector};
use substrate_session::hub::{self, Awake, Hub, View};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::transport::Uri;

use crate::condition::{self, Standing};
use crate::config::Config;
use crate::control::Control;
use crate::policy::Policies;
use crate::receipt::Receipt;
use crate::{names, tls};

/// Sessions of all sandboxes with a supervisor.
#[derive(Clone)]
pub struct Sessions {
    hub: Hub,
}

impl Sessions {
    /// The hub, if the mode has sessions and a gateway is configured.
    /// Policies are known a moment later: they tell the watchers what they deny, and the watch feeds the sessions.
    ///
    /// # Errors
    /// When the hub cannot be started.
    pub fn new(
        config: &Config,
        control: &Control,
        master_key: &[u8],
        policies: &Arc<OnceLock<Policies>>,
        receipts: mpsc::UnboundedSender<Receipt>,
        shutdown: CancellationToken,
    ) -> io::Result<Option<Self>> {
        let gateway = config.gateway_endpoint.clone().filter(|_| config.supervisor.mode.has_session());
        let Some(gateway) = gateway else { return Ok(None) };
        let (control, limit) = (control.clone(), config.stop_timeout);
        let waker: hub::Waker = Arc::new(move |uid| {
            let control = control.clone();
            Box::pin(async move {
                control.wake(&uid, limit).await.map(drop).map_err(|failure| failure.to_string())
            })
        });
        let policies = Arc::clone(policies);
        let inspector: hub::Inspector = Arc::new(move |uid, answer| {
            let policies = policies.get().cloned();
            Box::pin(async move {
                let policies = policies.ok_or("the driver is not ready")?;
                policies.apply(&uid, answer).await.map_err(|failure| failure.to_string())
            })
        });
        let witness: hub::Witness = Arc::new(move |uid, shown| {
            if receipts.send(Receipt { uid: uid.to_owned(), shown }).is_err() {
                tracing::debug!("nobody takes receipts: the driver is shutting down");
            }
        });
        let connector = connector(&gateway, config);
        let memory = config.supervisor.store.join("sessions");
        let master_key = master_key.to_vec();
        let config = hub::Config { master_key, memory, inspector, witness, gateway, connector, waker };
        Ok(Some(Self { hub: Hub::new(config, shutdown)? }))
    }

    /// Takes a change in, with what it means to the gateway.
    pub fn observe(&self, change: &WatchResponse) {
        if let Some(Change::Actor(actor)) = &change.change
            && condition::sandbox_id(actor).is_some()
            && condition::annotation(actor, names::SESSION).is_some()
        {
            self.hub.update(&actor.uid, view(actor));
        }
    }

    /// Ends the session of a sandbox that an event says is gone.
    pub fn follow(&self, event: &WatchSandboxesEvent) {
        if let Some(Payload::Deleted(deleted)) = &event.payload {
            self.hub.gone(&names::uid(&deleted.sandbox_id));
        }
    }
}

/// What a session has to know of its actor.
pub fn view(actor: &Actor) -> View {
    match condition::standing(actor) {
        Standing::Starting => View::Starting,
        Standing::Stopped => View::Stopped,
        Standing::Exited | Standing::Dead | Standing::Deleting => View::Ended,
        Standing::Ready if actor.state() == ActorState::Running && !actor.ingress_endpoint.is_empty() => {
            View::Awake(Awake { generation: actor.generation, endpoint: actor.ingress_endpoint.clone() })
        }
        Standing::Ready => View::Asleep,
    }
}

fn connector(gateway: &str, config: &Config) -> Connector {
    let gateway = gateway.to_owned();
    let supervisor = &config.supervisor;
    let files = tls::Files {
        prefix: "supervisor.gateway",
        ca: supervisor.gateway_ca_path.clone(),
        cert: supervisor.gateway_cert_path.clone(),
        key: supervisor.gateway_key_path.clone(),
        server_name: supervisor.gateway_server_name.clone(),
    };
    Arc::new(move || {
        let (gateway, files) = (gateway.clone(), files.clone());
        Box::pin(async move {
            let uri: Uri = gateway.parse().map_err(io::Error::other)?;
            let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
            let secure = uri.scheme_str() == Some("https");
            let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
            let stream = TcpStream::connect((host, port)).await?;
            stream.set_nodelay(true)?;
            if secure {
                Ok(Box::pin(files.handshake(host, stream).await?) as Pin<Box<dyn Carrier>>)
            } else {
                Ok(Box::pin(stream) as Pin<Box<dyn Carrier>>)
            }
        })
    })
}

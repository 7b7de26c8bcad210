// SPDX-License-Identifier: Apache-2.0
//! Exec and logs: carried to and from the actor's node.
use std::sync::Arc;

use futures::StreamExt as _;
use futures::stream::BoxStream;
use substrate_proto::types::exec_input::Input;
use substrate_proto::{ateapi, atelet, types};
use tonic::{Response, Status};

use super::invalid;
use crate::engine::{CallError, Engine, NodeHandle, Verb};
use crate::model::{self, Actor, ActorKey, Invalid, NodeName, State};
use crate::state::{Refused, way_out};

pub(crate) type ExecStream = BoxStream<'static, Result<types::ExecOutput, Status>>;
pub(super) type LogStream = BoxStream<'static, Result<ateapi::ActorLogsChunk, Status>>;

fn connected(engine: &Engine, name: Option<&NodeName>) -> Result<Arc<NodeHandle>, CallError> {
    let label = || name.map_or_else(|| "?".to_owned(), ToString::to_string);
    name.and_then(|name| engine.node(name))
        .filter(|node| node.is_up())
        .ok_or_else(|| CallError::NodeUnreachable(label()))
}

/// Runs a command in an actor; wakes it first unless it is told not to. While it runs the slot counts it, so that the
/// actor is not idle.
pub(super) async fn exec(
    engine: &Arc<Engine>,
    first: Option<types::ExecInput>,
    mut inputs: tonic::Streaming<types::ExecInput>,
) -> Result<Response<ExecStream>, Status> {
    let Some(Input::Start(mut start)) = first.and_then(|message| message.input) else {
        return Err(invalid(Invalid {
            field: "input".to_owned(),
            message: "the first message has to be start".to_owned(),
        }));
    };
    if start.command.is_empty() {
        return Err(invalid(Invalid { field: "start.command".to_owned(), message: "is empty".to_owned() }));
    }
    let key = model::actor_key(Some(&ateapi::ActorRef {
        atespace: start.atespace.clone(),
        name: start.actor.clone(),
        uid: String::new(),
    }))
    .map_err(invalid)?;
    let actor = awake(engine, &key, start.no_wake).await?;
    let node = connected(engine, actor.placement.as_ref().map(|placement| &placement.node))?;
    start.assignment = actor.assignment();
    let begin = types::ExecInput { input: Some(Input::Start(start)) };
    let (to_node, from_caller) = tokio::sync::mpsc::channel(16);
    let outputs = node.client.exec(from_caller);
    engine.spawn(async move {
        let mut next = Some(begin);
        while let Some(input) = next.take() {
            if to_node.send(input).await.is_err() {
                return;
            }
            // The caller's end, broken or not, ends the input.
            next = inputs.message().await.ok().flatten();
        }
    });
    let outputs = outputs.await?;
    // A stop of the control plane does not wait for them.
    Ok(Response::new(outputs.take_until(engine.dead.clone().cancelled_owned()).boxed()))
}

async fn awake(engine: &Arc<Engine>, key: &ActorKey, no_wake: bool) -> Result<Actor, CallError> {
    let actor = engine.lookup(key).await?;
    if actor.state == State::Running {
        return Ok(actor);
    }
    if no_wake {
        return Err(CallError::Refused(Refused {
            reason: "NOT_RUNNING",
            state: actor.state,
            message: format!(
                "actor {}/{} is {} and was not to be woken",
                actor.atespace, actor.name, actor.state
            ),
            way_out: way_out(actor.state),
        }));
    }
    let answer = engine.ask(&actor.uid, Verb::Resume { cause: "exec".to_owned() }, None).await?;
    Ok(answer.actor)
}

/// Logs are on the node that the actor runs on, or last ran on.
pub(super) async fn logs(
    engine: &Arc<Engine>,
    request: ateapi::ActorLogsRequest,
) -> Result<Response<LogStream>, Status> {
    let key = model::actor_key(request.actor.as_ref()).map_err(invalid)?;
    if !request.container.is_empty() {
        model::resource_name("container", &request.container).map_err(invalid)?;
    }
    let actor = engine.lookup(&key).await?;
    let last = actor.last_snapshot().and_then(|snapshot| snapshot.node.as_ref());
    let name = actor.placement.as_ref().map(|placement| &placement.node).or(last).or(actor.nodes.first());
    if name.is_none() {
        return Err(CallError::Precondition {
            reason: "NEVER_RAN",
            message: format!("actor {}/{} has not run yet: it has no logs", actor.atespace, actor.name),
            way_out: "resume it first",
        }
        .into());
    }
    let node = connected(engine, name)?;
    let request = atelet::LogsRequest {
        actor_uid: actor.uid.0,
        container: request.container,
        follow: request.follow,
        tail: request.tail,
    };
    let chunks = node.client.logs(request).await?;
    let chunks = chunks.map(|chunk| chunk.map(|chunk| ateapi::ActorLogsChunk { data: chunk.data }));
    Ok(Response::new(chunks.take_until(engine.dead.clone().cancelled_owned()).boxed()))
}

// SPDX-License-Identifier: Apache-2.0
//! Bytes off the wire to a request and through its rules. The first byte chooses the message.
//!
//! What must hold: nothing panics; a refusal names a field and a rule; what was accepted is accepted again after it was
//! written and read once more.
use ateapi::model::{self, Invalid};
use prost::Message;
use substrate_proto::{ateapi as api, types};

fn rules<M: Message + Default + PartialEq>(data: &[u8], rules: impl Fn(&M) -> Result<(), Invalid>) {
    let Ok(message) = M::decode(data) else { return };
    if let Err(refused) = rules(&message) {
        assert!(!refused.field.is_empty(), "a refusal without a field: {refused}");
        assert!(!refused.message.is_empty(), "a refusal of {} without a rule", refused.field);
        // Somebody has to read it, and a log has to hold it.
        assert!(refused.to_string().len() < 64 * 1024, "an endless refusal of {}", refused.field);
        return;
    }
    let again = M::decode(message.encode_to_vec().as_slice()).expect("what we wrote ourselves");
    rules(&again).expect("accepted once, refused the second time");
}

/// Checks one input.
pub fn check(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    match kind % 12 {
        0 => rules(data, |it: &api::CreateTemplateRequest| {
            model::atespace_name("atespace", &it.atespace)?;
            model::resource_name("name", &it.name)?;
            model::labels("labels", &it.labels)?;
            model::request_id(&it.request_id)?;
            model::template_spec("spec", it.spec.as_ref()).map(drop)
        }),
        1 => rules(data, |it: &types::TemplateSpec| model::template_spec("spec", Some(it)).map(drop)),
        2 => rules(data, |it: &api::CreateActorRequest| {
            model::atespace_name("atespace", &it.atespace)?;
            model::resource_name("name", &it.name)?;
            model::uid("uid", &it.uid)?;
            model::spec_of_actor(it.spec.as_ref()).map(drop)
        }),
        3 => rules(data, |it: &types::ActorSpec| model::spec_of_actor(Some(it)).map(drop)),
        4 => rules(data, |it: &api::UpdateActorRequest| {
            model::actor_key(it.actor.as_ref())?;
            if let Some(labels) = &it.labels {
                model::labels("labels", &labels.entries)?;
            }
            if let Some(annotations) = &it.annotations {
                model::annotations("annotations", &annotations.entries)?;
            }
            if let Some(idle) = &it.idle {
                model::idle("idle", idle)?;
            }
            it.egress.as_ref().map_or(Ok(()), |egress| model::egress("egress", egress))
        }),
        5 => rules(data, |it: &types::EgressPolicy| model::egress("egress", it)),
        6 => rules(data, |it: &types::IdlePolicy| model::idle("idle", it)),
        7 => rules(data, |it: &types::CheckpointPolicy| model::checkpoint_policy("checkpoint", it)),
        8 => rules(data, |it: &api::ListActorsRequest| {
            model::labels("labels", &it.labels)?;
            model::page(it.page_size, &it.page_token).map(drop)
        }),
        9 => rules(data, |it: &api::TagSnapshotRequest| {
            model::actor_key(it.actor.as_ref())?;
            model::tag("tag", &it.tag)?;
            model::snapshot_ref("snapshot", &it.snapshot, true)
        }),
        10 => rules(data, |it: &api::CordonWorkerRequest| model::call_id("id", &it.id)),
        _ => {
            // Everything else that is decoded without rules of its own.
            let _ = types::ExecInput::decode(data);
            let _ = api::WatchRequest::decode(data);
            let _ = api::ReportDenialsRequest::decode(data);
            let _ = api::CheckpointActorRequest::decode(data);
        }
    }
}

// SPDX-License-Identifier: Apache-2.0
//! A simulated network between the control plane and one node, and the control plane's simulated disk.
//!
//! A call is carried by a task of its own: giving it up does not take it back, so it may still arrive, late and more
//! than once, or its answer may be lost. Streams keep their order, stall while the network is cut, and break when that
//! lasts longer than their keepalive.
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use substrate_proto::{atelet, types};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::stub::{Stub, StubNode, unavailable};
use super::world::World;
use crate::engine::Signal;
use crate::model::EventDraft;
use crate::node::{Messages, NodeClient};
use crate::store::{
    Change, Committed, EventQuery, Garbage, Kind, MemoryStore, Object, Query, RequestRecord, Store,
    StoreError, Trim, Tx, Usage,
};

/// Silence after which a stream breaks.
const KEEPALIVE: Duration = Duration::from_secs(15);
/// How long a call waits for its answer.
const DEADLINE: Duration = Duration::from_secs(20);

/// The way to one node.
pub struct Link {
    world: Arc<World>,
    node: Arc<StubNode>,
    cut: Signal<bool>,
}

impl Link {
    pub fn new(world: &Arc<World>, node: &Arc<StubNode>) -> Arc<Self> {
        Arc::new(Self { world: Arc::clone(world), node: Arc::clone(node), cut: Signal::new(false) })
    }

    /// Cuts the network, or mends it.
    pub fn cut(&self, cut: bool) {
        self.world.note(format_args!("the network to {} is cut: {cut}", self.node.name));
        self.cut.set(cut);
    }

    fn is_cut(&self) -> bool {
        self.cut.read(|cut| *cut)
    }

    /// Returns when the network was cut for longer than a stream lives.
    async fn broken(&self) {
        loop {
            self.cut.wait_for(|cut| cut.then_some(())).await;
            tokio::select! {
                biased;
                () = self.cut.wait_for(|cut| (!cut).then_some(())) => {}
                () = tokio::time::sleep(KEEPALIVE) => return,
            }
        }
    }

    /// Carries messages in order until either end is gone or the network was away for too long.
    async fn pump<T: Send>(
        self: Arc<Self>,
        mut from: impl futures::Stream<Item = T> + Unpin,
        to: mpsc::Sender<T>,
    ) {
        let carrying = async {
            while let Some(message) = from.next().await {
                tokio::time::sleep(self.world.delay().min(KEEPALIVE)).await;
                self.cut.wait_for(|cut| (!cut).then_some(())).await;
                if to.send(message).await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            biased;
            () = self.broken() => {}
            () = to.closed() => {}
            () = carrying => {}
        }
    }

    /// Carries one call. See the module.
    async fn carry<T, F, R>(self: &Arc<Self>, method: &'static str, call: F) -> Result<T, Status>
    where
        T: Send + 'static,
        F: Fn(Stub) -> R + Send + Sync + 'static,
        R: Future<Output = Result<T, Status>> + Send + 'static,
    {
        let (tell, told) = oneshot::channel();
        let call = Arc::new(call);
        let lost = self.world.roll(0.02);
        let twice = self.world.roll(0.03);
        for (lost, tell) in [(lost, Some(tell)), (!twice, None)] {
            let (link, call, delay) = (Arc::clone(self), Arc::clone(&call), self.world.delay());
            if tell.is_none() && lost {
                continue;
            }
            tokio::spawn(async move {
                tokio::time::sleep(delay).await;
                if lost || link.is_cut() {
                    link.world.note(format_args!("lost on the way to {}: {method}", link.node.name));
                    return;
                }
                let result = call(Stub(Arc::clone(&link.node))).await;
                let said = result.as_ref().err().map(Status::code);
                link.world.note(format_args!("{} did {method}: {said:?}", link.node.name));
                tokio::time::sleep(link.world.delay()).await;
                match tell {
                    Some(tell) if !link.is_cut() && !link.world.roll(0.02) => {
                        let _ = tell.send(result);
                    }
                    _ => {}
                }
            });
        }
        tokio::select! {
            biased;
            result = told => result.unwrap_or_else(|_| Err(unavailable())),
            () = tokio::time::sleep(DEADLINE) => Err(Status::deadline_exceeded("no answer")),
        }
    }
}

/// A node as the control plane reaches it.
pub struct Far(pub Arc<Link>);

#[async_trait::async_trait]
impl NodeClient for Far {
    async fn get_node(&self) -> Result<atelet::GetNodeResponse, Status> {
        self.0.carry("get_node", |node| async move { node.get_node().await }).await
    }

    async fn session(
        &self,
        requests: mpsc::Receiver<atelet::SessionRequest>,
    ) -> Result<Messages<atelet::SessionEvent>, Status> {
        if self.0.is_cut() {
            tokio::time::sleep(Duration::from_secs(1)).await;
            return Err(unavailable());
        }
        let (say, heard) = mpsc::channel(64);
        // The hello is on its way before the node answers.
        tokio::spawn(Arc::clone(&self.0).pump(ReceiverStream::new(requests), say));
        let said = Stub(Arc::clone(&self.0.node)).session(heard).await?;
        let (tell, told) = mpsc::channel(64);
        tokio::spawn(Arc::clone(&self.0).pump(said, tell));
        Ok(ReceiverStream::new(told).boxed())
    }

    async fn ensure_image(
        &self,
        request: atelet::EnsureImageRequest,
    ) -> Result<Messages<atelet::EnsureImageProgress>, Status> {
        let call = move |node: Stub| {
            let request = request.clone();
            async move { node.ensure_image(request).await }
        };
        self.0.carry("ensure_image", call).await
    }

    async fn activate(&self, request: atelet::ActivateRequest) -> Result<atelet::ActivateResponse, Status> {
        let call = move |node: Stub| {
            let request = request.clone();
            async move { node.activate(request).await }
        };
        self.0.carry("activate", call).await
    }

    async fn checkpoint(
        &self,
        request: atelet::CheckpointRequest,
    ) -> Result<atelet::CheckpointResponse, Status> {
        let call = move |node: Stub| {
            let request = request.clone();
            async move { node.checkpoint(request).await }
        };
        self.0.carry("checkpoint", call).await
    }

    async fn upload(&self, request: atelet::UploadRequest) -> Result<atelet::UploadResponse, Status> {
        let call = move |node: Stub| {
            let request = request.clone();
            async move { node.upload(request).await }
        };
        self.0.carry("upload", call).await
    }

    async fn release(&self, request: atelet::ReleaseRequest) -> Result<(), Status> {
        let call = move |node: Stub| {
            let request = request.clone();
            async move { node.release(request).await }
        };
        self.0.carry("release", call).await
    }

    async fn drop_snapshot(&self, request: atelet::DropSnapshotRequest) -> Result<(), Status> {
        let call = move |node: Stub| {
            let request = request.clone();
            async move { node.drop_snapshot(request).await }
        };
        self.0.carry("drop_snapshot", call).await
    }

    async fn delete_blobs(&self, request: atelet::DeleteBlobsRequest) -> Result<(), Status> {
        let call = move |node: Stub| {
            let request = request.clone();
            async move { node.delete_blobs(request).await }
        };
        self.0.carry("delete_blobs", call).await
    }

    async fn purge(&self, request: atelet::PurgeRequest) -> Result<(), Status> {
        let call = move |node: Stub| {
            let request = request.clone();
            async move { node.purge(request).await }
        };
        self.0.carry("purge", call).await
    }

    async fn set_egress(&self, request: atelet::SetEgressRequest) -> Result<(), Status> {
        let call = move |node: Stub| {
            let request = request.clone();
            async move { node.set_egress(request).await }
        };
        self.0.carry("set_egress", call).await
    }

    async fn exec(
        &self,
        inputs: mpsc::Receiver<types::ExecInput>,
    ) -> Result<Messages<types::ExecOutput>, Status> {
        Stub(Arc::clone(&self.0.node)).exec(inputs).await
    }

    async fn logs(&self, request: atelet::LogsRequest) -> Result<Messages<atelet::LogsChunk>, Status> {
        Stub(Arc::clone(&self.0.node)).logs(request).await
    }
}

/// The store on a disk that takes its time, refuses, or takes a commit and says that it failed.
pub struct Disk {
    pub world: Arc<World>,
    pub store: Arc<MemoryStore>,
}

#[async_trait::async_trait]
impl Store for Disk {
    async fn commit(&self, tx: Tx) -> Result<Committed, StoreError> {
        if self.world.roll(0.2) {
            tokio::time::sleep(self.world.ms(1, 30)).await;
        }
        if self.world.roll(0.002) {
            return Err(StoreError::Io("the disk is full".to_owned()));
        }
        let committed = self.store.commit(tx).await;
        if let Ok(committed) = &committed {
            self.world.note(format_args!("committed {}", committed.revision));
        }
        if self.world.roll(0.002) {
            return Err(StoreError::Io("the disk does not say whether it has it".to_owned()));
        }
        committed
    }

    async fn get(&self, kind: Kind, key: &str) -> Result<Option<Object>, StoreError> {
        self.store.get(kind, key).await
    }

    async fn find(&self, kind: Kind, atespace: &str, name: &str) -> Result<Option<Object>, StoreError> {
        self.store.find(kind, atespace, name).await
    }

    async fn list(&self, query: &Query) -> Result<Vec<Object>, StoreError> {
        self.store.list(query).await
    }

    async fn changes(&self, after: u64, limit: usize) -> Result<Vec<Change>, StoreError> {
        self.store.changes(after, limit).await
    }

    async fn events(&self, query: &EventQuery) -> Result<Vec<(u64, EventDraft)>, StoreError> {
        self.store.events(query).await
    }

    async fn request(&self, id: &str) -> Result<Option<RequestRecord>, StoreError> {
        self.store.request(id).await
    }

    async fn sealed(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.store.sealed(key).await
    }

    async fn garbage(&self, limit: usize) -> Result<Vec<(i64, String, Garbage)>, StoreError> {
        self.store.garbage(limit).await
    }

    async fn usage(&self, atespace: &str) -> Result<Usage, StoreError> {
        self.store.usage(atespace).await
    }

    fn revisions(&self) -> tokio::sync::watch::Receiver<u64> {
        self.store.revisions()
    }

    async fn trim(&self, trim: Trim) -> Result<(), StoreError> {
        self.store.trim(trim).await
    }

    async fn close(&self) {
        self.store.close().await;
    }
}

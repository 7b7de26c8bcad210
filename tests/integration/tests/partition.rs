// SPDX-License-Identifier: Apache-2.0
//! A node that is cut off while its actor runs and serves (P1).
//!
//! Two node agents, each in a network namespace of its own with the control plane at the other end of a veth pair, over
//! mutual TLS. The link to the one that runs the actor is taken down; the actor goes on serving whoever reaches its
//! worker, until its lease ends. The successor starts only after that and the margin. Meanwhile the old worker is asked
//! without a pause by somebody with the old route, and a checkpoint that was asked of it just after the cut is uploaded
//! long after the successor began.
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ateom::cgroup::{Cgroup, Hierarchy};
use prost::Message as _;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};
use substrate_integration::{PATIENCE, actor, binary, counter_template, image, runsc};
use substrate_proto::ateapi::control_client::ControlClient;
use substrate_proto::ateapi::{self as proto, ActorState};
use substrate_proto::atelet::node_client::NodeClient;
use substrate_proto::atenet::{IngressOpen, IngressOpened, ingress_opened};
use substrate_proto::ateom::checkpoint_request::Mode;
use substrate_proto::tls::ClientFiles;
use substrate_proto::{atelet as node_api, types};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

/// Of a lease, and beyond it. Renewals are asked for every third of a term.
const TERM: Duration = Duration::from_secs(6);
const MARGIN: Duration = Duration::from_secs(2);
/// What freezing may take, and an answer that was under way.
const SLACK: Duration = Duration::from_millis(1500);

fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip").args(arguments.split(' ')).output().context("running ip (iproute2)")?;
    ensure!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// A network namespace at the other end of a veth pair; both go with it.
struct Link {
    name: String,
    far: Ipv4Addr,
}

impl Link {
    /// `number` tells the links of this process apart.
    fn new(number: u8) -> Result<Self> {
        let pid = std::process::id();
        // Of TEST-NET-2 (RFC 5737): two addresses for each link, other ones for tests that run beside this one.
        let base = u8::try_from(pid % 31)? * 8 + number * 4;
        let [near, far] = [1, 2].map(|host| Ipv4Addr::new(198, 51, 100, base + host));
        let link = Self { name: format!("sp{number}{pid}"), far };
        let name = &link.name;
        ip(&format!("netns add {name}"))?;
        ip(&format!("link add {name} type veth peer name up0 netns {name}"))?;
        ip(&format!("addr add {near}/30 dev {name}"))?;
        ip(&format!("link set {name} up"))?;
        for inside in
            ["link set lo up".to_owned(), format!("addr add {far}/30 dev up0"), "link set up0 up".into()]
        {
            ip(&format!("-n {name} {inside}"))?;
        }
        Ok(link)
    }

    fn cut(&self) -> Result<()> {
        ip(&format!("link set {} down", self.name))
    }

    fn heal(&self) -> Result<()> {
        ip(&format!("link set {} up", self.name))
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // The pair goes with one end.
        for arguments in [format!("link del {}", self.name), format!("netns del {}", self.name)] {
            if let Err(error) = ip(&arguments) {
                eprintln!("{error:#}");
            }
        }
    }
}

/// An authority, and what the parties show each other.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    dir: PathBuf,
}

impl Authority {
    fn new(dir: &Path) -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        std::fs::write(dir.join("ca.pem"), params.self_signed(&key)?.pem())?;
        Ok(Self { issuer: Issuer::new(params, key), dir: dir.to_owned() })
    }

    /// Certificate and key of `name`, as files.
    fn sign(&self, name: &str, address: Option<Ipv4Addr>) -> Result<ClientFiles> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.subject_alt_names = address.map(|it| SanType::IpAddress(it.into())).into_iter().collect();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let [cert, private] = ["crt", "key"].map(|kind| self.dir.join(format!("{name}.{kind}")));
        std::fs::write(&cert, params.signed_by(&key, &self.issuer)?.pem())?;
        std::fs::write(&private, key.serialize_pem())?;
        Ok(ClientFiles { ca: self.dir.join("ca.pem"), cert, key: private })
    }
}

/// A node agent in a link's namespace.
struct Node {
    link: Link,
    config: atelet::Config,
    address: SocketAddr,
    shutdown: CancellationToken,
    thread: Option<std::thread::JoinHandle<Result<(), atelet::Error>>>,
}

impl Node {
    async fn start(root: &Path, number: u8, authority: &Authority) -> Result<Self> {
        let name = format!("n{number}");
        let link = Link::new(number)?;
        let dir = root.join(&name);
        let worker = atelet::WorkerConfig {
            id: format!("w{number}"),
            pool: "default".into(),
            class: atelet::WorkerClass::Gvisor,
            runtime: None,
        };
        let run = dir.join("run");
        let mut config =
            atelet::Config::for_machine(&name, &dir, &run, vec![worker], binary("ateom-gvisor")?, runsc()?);
        // One blob store and one key store for both.
        config.blobs = atelet::blob::BlobUrl::Local(root.join("blobs"));
        config.keys = root.join("keys");
        config.cgroup = format!("substrate-test/partition-{}-{number}", std::process::id());
        let address = SocketAddr::from((link.far, 7443));
        let files = authority.sign(&name, Some(link.far))?;
        config.remote = Some(atelet::Remote {
            listen: address,
            cert: files.cert,
            key: files.key,
            client_ca: files.ca,
            clients: vec!["ateapi".into()],
        });
        let shutdown = CancellationToken::new();
        let (ready, is_ready) = tokio::sync::oneshot::channel();
        let namespace = std::fs::File::open(format!("/run/netns/{}", link.name))?;
        let (own, stop) = (config.clone(), shutdown.clone());
        // A thread's namespace is that of the threads it starts, and so of all this agent's.
        let thread = std::thread::spawn(move || {
            nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET)
                .map_err(std::io::Error::from)?;
            tokio::runtime::Runtime::new()?.block_on(atelet::serve(own, ready, stop))
        });
        let mut node = Self { link, config, address, shutdown, thread: Some(thread) };
        if tokio::time::timeout(PATIENCE, is_ready).await?.is_err() {
            node.stop()?;
        }
        Ok(node)
    }

    /// A client through its Unix socket, which no link leads to: what was on its way before the cut.
    async fn client(&self) -> Result<NodeClient<Channel>> {
        let endpoint = Endpoint::from_shared(format!("unix:{}", self.config.socket.display()))?;
        Ok(NodeClient::new(endpoint.connect().await?))
    }

    fn stop(&mut self) -> Result<()> {
        self.shutdown.cancel();
        let Some(thread) = self.thread.take() else { return Ok(()) };
        thread.join().map_err(|_| anyhow::anyhow!("the node agent panicked"))??;
        Ok(())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("node agent {}: {error:#}", self.config.node);
        }
        let ended = Hierarchy::detect().map(|it| Cgroup::at(&it, &self.config.cgroup)).and_then(|group| {
            group.kill_and_wait_empty(PATIENCE)?;
            group.remove()
        });
        if let Err(error) = ended {
            eprintln!("workers of {}: {error}", self.config.node);
        }
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let dir = self.config.dir.parent().unwrap_or(&self.config.dir);
        for point in mounts.lines().rev().filter_map(|line| line.split(' ').nth(4)).map(Path::new) {
            if point.starts_with(dir)
                && let Err(error) = nix::mount::umount2(point, nix::mount::MntFlags::MNT_DETACH)
            {
                eprintln!("unmounting {}: {error}", point.display());
            }
        }
    }
}

/// A request straight to a worker, with a route that somebody remembers: the count, unless it refused.
async fn ask(endpoint: &str, uid: &str, generation: u64) -> Result<u64> {
    let path = endpoint.strip_prefix("unix:").context("an endpoint on a Unix socket")?;
    let mut stream = UnixStream::connect(path).await?;
    let open = IngressOpen { actor_uid: uid.into(), generation, port: 8080, ..Default::default() };
    stream.write_all(&open.encode_length_delimited_to_vec()).await?;
    let mut opened = vec![0; usize::from(stream.read_u8().await?)];
    if let Some(last) = opened.len().checked_sub(1).filter(|_| opened.len() >= 128) {
        // Longer than a length of one byte says: a refusal with a long message.
        anyhow::bail!("refused with {last} bytes or more");
    }
    stream.read_exact(&mut opened).await?;
    let opened = IngressOpened::decode(opened.as_slice())?;
    ensure!(opened.code() == ingress_opened::Code::Ok, "{:?}: {}", opened.code(), opened.message);
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let body = answer.split("\r\n\r\n").nth(1).context("no body")?;
    serde_json::from_str::<serde_json::Value>(body)?["count"].as_u64().context("no count")
}

type Api = ControlClient<Channel>;

async fn get(api: &mut Api) -> Result<proto::Actor> {
    Ok(api.get_actor(proto::GetActorRequest { actor: Some(actor("a")) }).await?.into_inner())
}

async fn resume(api: &mut Api) -> Result<proto::Actor> {
    let request = proto::ResumeActorRequest { actor: Some(actor("a")), ..Default::default() };
    api.resume_actor(request).await?.into_inner().actor.context("no actor")
}

async fn make(api: &mut Api) -> Result<()> {
    let atespace = proto::CreateAtespaceRequest { name: "default".into(), ..Default::default() };
    api.create_atespace(atespace).await?;
    let spec = counter_template(image("counter")?);
    api.create_template(proto::CreateTemplateRequest {
        atespace: "default".into(),
        name: "t".into(),
        spec: Some(spec),
        ..Default::default()
    })
    .await?;
    api.create_actor(proto::CreateActorRequest {
        atespace: "default".into(),
        name: "a".into(),
        spec: Some(types::ActorSpec { template: "t".into(), ..Default::default() }),
        start: true,
        ..Default::default()
    })
    .await?;
    Ok(())
}

/// Waits until something holds.
async fn until<T>(what: &str, mut holds: impl AsyncFnMut() -> Result<Option<T>>) -> Result<T> {
    tokio::time::timeout(PATIENCE, async {
        loop {
            if let Some(value) = holds().await? {
                return Ok(value);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .with_context(|| format!("{what}: not within {PATIENCE:?}"))?
}

/// Asks a worker all the time: when it answered last.
struct Prober {
    last: Arc<Mutex<Option<Instant>>>,
    over: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<()>,
}

impl Prober {
    fn start(old: &proto::Actor) -> Self {
        let (last, over) = (Arc::new(Mutex::new(None)), Arc::new(AtomicBool::new(false)));
        let (seen, stop) = (Arc::clone(&last), Arc::clone(&over));
        let (endpoint, uid, generation) = (old.ingress_endpoint.clone(), old.uid.clone(), old.generation);
        let task = tokio::spawn(async move {
            while !stop.load(Ordering::SeqCst) {
                // One that hangs in a frozen actor would hide one that is answered.
                let answer =
                    tokio::time::timeout(Duration::from_millis(300), ask(&endpoint, &uid, generation));
                if let Ok(Ok(_)) = answer.await {
                    *seen.lock().unwrap() = Some(Instant::now());
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        Self { last, over, task }
    }

    fn last(&self) -> Option<Instant> {
        *self.last.lock().unwrap()
    }

    async fn end(self) -> Result<Option<Instant>> {
        self.over.store(true, Ordering::SeqCst);
        self.task.await?;
        Ok(*self.last.lock().unwrap())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_cut_off_never_serves_beside_its_successor() -> Result<()> {
    tokio::time::timeout(Duration::from_mins(3), partition()).await.context("it hangs")?
}

async fn partition() -> Result<()> {
    let root = tempfile::Builder::new().prefix("sub-").tempdir_in("/tmp")?;
    let authority = Authority::new(root.path())?;
    let mut nodes =
        [Node::start(root.path(), 0, &authority).await?, Node::start(root.path(), 1, &authority).await?];
    let tls = authority.sign("ateapi", None)?;
    let endpoints = nodes.iter().map(|node| ateapi::NodeEndpoint {
        name: node.config.node.clone(),
        endpoint: format!("https://{}", node.address),
        tls: Some(tls.clone()),
    });
    let path = |name: &str| root.path().join(name);
    let mut config = ateapi::Config::new(
        path("control/state.db"),
        path("control/keys"),
        path("control/run/ateapi.sock"),
        endpoints.collect(),
    );
    config.lease_term_ms = u64::try_from(TERM.as_millis())?;
    config.lease_margin_ms = u64::try_from(MARGIN.as_millis())?;
    let shutdown = CancellationToken::new();
    let (ready, is_ready) = tokio::sync::oneshot::channel();
    let served = tokio::spawn(ateapi::serve(config, ready, shutdown.clone()));
    is_ready.await.context("the control plane did not come up")?;
    let endpoint = Endpoint::from_shared(format!("unix:{}", path("control/run/ateapi.sock").display()))?;
    let mut api = ControlClient::new(endpoint.connect().await?);
    until("both workers", async || {
        let workers = api.list_workers(proto::ListWorkersRequest {}).await?.into_inner().workers;
        Ok((workers.iter().filter(|worker| worker.phase == "empty").count() == 2).then_some(()))
    })
    .await?;
    // Another certificate of the same authority commands nothing.
    let stranger = authority.sign("stranger", None)?;
    let refused = ateapi::node::GrpcNode::new(&format!("https://{}", nodes[0].address), Some(&stranger))
        .map_err(anyhow::Error::msg)?;
    let refused = ateapi::node::NodeClient::get_node(&refused).await.err().context("it was let in")?;
    ensure!(refused.code() == tonic::Code::PermissionDenied, "{refused}");

    make(&mut api).await?;
    let old = until("the actor", async || {
        Ok(Some(get(&mut api).await?).filter(|it| it.state() == ActorState::Running))
    })
    .await?;
    let ask_old = async || ask(&old.ingress_endpoint, &old.uid, old.generation).await;
    for count in 1..=3 {
        ensure!(ask_old().await? == count);
    }
    let checkpoint = proto::CheckpointActorRequest {
        actor: Some(actor("a")),
        durability: types::Durability::Durable.into(),
        ..Default::default()
    };
    api.checkpoint_actor(checkpoint).await?;
    ensure!(ask_old().await? == 4);

    let here = usize::from(old.node == nodes[1].config.node);
    let prober = Prober::start(&old);
    nodes[here].link.cut()?;
    let cut = Instant::now();
    // What the control plane had asked for before the cut.
    let mut stale = nodes[here].client().await?;
    let assignment = types::Assignment {
        actor_uid: old.uid.clone(),
        atespace: "default".into(),
        actor_name: "a".into(),
        generation: old.generation,
        worker_id: old.worker_id.clone(),
    };
    let late = stale
        .checkpoint(node_api::CheckpointRequest {
            assignment: Some(assignment.clone()),
            snapshot_id: "late".into(),
            mode: Mode::KeepRunning.into(),
            ..Default::default()
        })
        .await?
        .into_inner()
        .snapshot
        .context("no snapshot")?;
    tokio::time::sleep(Duration::from_millis(100)).await;
    ensure!(prober.last().is_some_and(|last| last > cut), "the actor that was cut off does not serve");

    // Asked again and again for the actor, the control plane names the old copy until it may start another.
    let (asked, new) = until("the successor", async || {
        let asked = Instant::now();
        let now = resume(&mut api).await;
        Ok(now.ok().filter(|it| it.generation > old.generation).map(|it| (asked, it)))
    })
    .await?;
    let began = Instant::now();
    ensure!(new.node != old.node, "{new:?}");
    let stopped = prober.last().context("the old copy never served")?;
    ensure!(stopped < asked, "the old copy answered {:?} after its successor was asked for", stopped - asked);
    ensure!(stopped < cut + TERM + SLACK, "the old copy served {:?} after the cut", stopped - cut);
    // The last renewal may have been asked for a third of a term before.
    ensure!(
        began + TERM / 3 + SLACK > cut + TERM + MARGIN,
        "the successor began {:?} after the cut, too soon",
        began - cut
    );
    ensure!(
        ask(&new.ingress_endpoint, &new.uid, new.generation).await? == 4,
        "not the state of the checkpoint"
    );
    let events = proto::ListEventsRequest { subject: "a".into(), ..Default::default() };
    let events = api.list_events(events).await?.into_inner().events;
    ensure!(
        events.iter().any(|event| event.reason == "RolledBack"),
        "nothing says what was lost: {events:?}"
    );

    // Its late snapshot goes where nothing looks.
    let upload = node_api::UploadRequest {
        actor_uid: old.uid.clone(),
        atespace: "default".into(),
        generation: old.generation,
        snapshot_id: late.snapshot_id.clone(),
        node_digest: late.node_digest.clone(),
        parents: Vec::new(),
    };
    let uploaded = stale.upload(upload).await;
    println!("the late upload: {:?}", uploaded.as_ref().map(|_| "done").map_err(tonic::Status::message));
    let record = get(&mut api).await?;
    ensure!(record.last_snapshot.as_ref().is_some_and(|it| it.id != "late"), "{record:?}");
    let suspend = proto::SuspendActorRequest { actor: Some(actor("a")), ..Default::default() };
    api.suspend_actor(suspend.clone()).await?;
    let new = resume(&mut api).await?;
    ensure!(ask(&new.ingress_endpoint, &new.uid, new.generation).await? == 5, "the late snapshot did harm");

    // Healed: the old copy is ended without having served again, and its worker is of use.
    nodes[here].link.heal()?;
    until("the old worker", async || {
        let workers = api.list_workers(proto::ListWorkersRequest {}).await?.into_inner().workers;
        let free =
            |worker: &proto::Worker| worker.id == old.worker_id && worker.alive && worker.phase == "empty";
        Ok(workers.iter().any(free).then_some(()))
    })
    .await?;
    ensure!(ask_old().await.is_err(), "the old copy serves again");
    ensure!(prober.end().await? == Some(stopped), "the old copy served again");
    api.cordon_worker(proto::CordonWorkerRequest { id: new.worker_id.clone(), uncordon: false }).await?;
    api.suspend_actor(suspend).await?;
    let back = resume(&mut api).await?;
    ensure!(back.node == old.node, "{back:?}");
    ensure!(ask(&back.ingress_endpoint, &back.uid, back.generation).await? == 6);

    api.delete_actor(proto::DeleteActorRequest { actor: Some(actor("a")), ..Default::default() }).await?;
    drop(api);
    shutdown.cancel();
    served.await??;
    for node in &mut nodes {
        node.stop()?;
    }
    Ok(())
}

// SPDX-License-Identifier: Apache-2.0
//! Features of the gateway as assertions: settings (F1), inference (F2), logs (F3), isolation (F5). F4, exec and
//! forwards across sleep and moves, is in `moves`.
use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use substrate_proto::supervisor::{GatewayMessage, SupervisorHello, SupervisorMessage, supervisor_message};
use tonic::Code;

use crate::bed::{Bed, bin_dir};

/// Requests about one sandbox: `GetSandboxConfigRequest`, and the same field of others (proto/sandbox.proto,
/// proto/openshell.proto at 2f7fb655).
#[derive(Clone, PartialEq, prost::Message)]
struct About {
    #[prost(string, tag = "1")]
    sandbox_id: String,
}

/// An answer that is not read.
#[derive(Clone, PartialEq, prost::Message)]
struct Unread {}

#[tokio::test]
#[ignore = "needs OpenShell's own programs: set OPENSHELL_BIN_DIR and run with --ignored"]
async fn f1_settings_and_policies_reach_a_sandbox_and_take_effect() -> Result<()> {
    let mut bed = Bed::start(&bin_dir()?, 1).await?;
    let uid = bed.create("alice", &["sleep", "100000"]).await?;
    // The setting: structured records of what happens, in a file of the supervisor's. An exec is such a thing.
    let records = |bed: &Bed| bed.as_root("alice", "cat /var/log/openshell-ocsf* 2>/dev/null | wc -l");
    let is_written = async |bed: &Bed| {
        let before = records(bed)?;
        bed.exec("alice", "true").await?;
        Ok(records(bed)? != before)
    };
    ensure!(!is_written(&bed).await?, "records are written before anybody asked for them");
    bed.say(&["settings", "set", "alice", "--key", "ocsf_json_enabled", "--value", "true"]).await?;
    bed.until("the setting takes effect", is_written).await?;
    // Changed while it sleeps: nothing wakes it, and it follows once it is awake.
    bed.fall_asleep(&uid).await?;
    bed.say(&["settings", "set", "alice", "--key", "ocsf_json_enabled", "--value", "false"]).await?;
    let generation = bed.actor(&uid).await?.generation;
    bed.until("the setting is taken back", async |bed| Ok(!is_written(bed).await?)).await?;
    ensure!(bed.actor(&uid).await?.generation == generation + 1, "woken more than once");

    // A policy, followed by what substrate lets out.
    let before = bed.egress(&uid).await?;
    ensure!(!before.iter().any(|rule| rule.contains("api.example.com")), "{before:?}");
    let add =
        ["policy", "update", "alice", "--add-endpoint", "api.example.com:443", "--binary", "/**", "--wait"];
    bed.say(&add).await?;
    let after = bed.egress(&uid).await?;
    ensure!(after.contains(&"api.example.com:[443]".to_owned()), "{after:?}");
    bed.say(&["policy", "update", "alice", "--remove-endpoint", "api.example.com:443", "--wait"]).await?;
    let left = bed.egress(&uid).await?;
    ensure!(left == before, "{left:?}");
    bed.stop().await
}

#[tokio::test]
#[ignore = "needs OpenShell's own programs: set OPENSHELL_BIN_DIR and run with --ignored"]
async fn a_mode_that_nobody_named_is_what_a_probe_shows() -> Result<()> {
    let bed = Bed::start_mode(&bin_dir()?, 2, 0, "auto").await?;
    bed.create("alice", &["sleep", "100000"]).await?;
    ensure!(bed.exec("alice", "echo here").await? == "here");
    let path = bed.machine.dir.join("driver/probes.json");
    let seen: serde_json::Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    let seen = seen.as_object().context("verdicts by digest")?;
    ensure!(seen.len() == 1, "{seen:?}");
    for (digest, verdict) in seen {
        ensure!(
            digest.len() == 64 && verdict["problem"].is_null() && verdict["wakes"] == 3,
            "{digest}: {verdict}"
        );
    }
    // Of the probe itself nothing is left, and nobody sees it.
    ensure!(bed.machine.cli(&["get", "actors", "-A"])?.stdout.windows(5).all(|part| part != b"probe"));
    bed.stop().await
}

#[tokio::test]
#[ignore = "needs OpenShell's own programs: set OPENSHELL_BIN_DIR and run with --ignored"]
async fn f2_inference_is_refused_clearly_where_there_is_no_proxy() -> Result<()> {
    let mut bed = Bed::start(&bin_dir()?, 1).await?;
    let uid = bed.create("alice", &["sleep", "100000"]).await?;
    // Said when it was made, where users look.
    bed.until_told(&uid, "inference.local").await?;
    // And when somebody tries: at once, with a record that names it.
    let began = std::time::Instant::now();
    let resolve = "import socket\ntry: print(socket.getaddrinfo(\"inference.local\", 443))\nexcept OSError as e: print(e.errno)";
    let said = bed.exec("alice", &format!("python3 -S -c '{resolve}'")).await?;
    // EAI_NONAME: there is no such name.
    ensure!(said == "-2", "{said}");
    ensure!(began.elapsed() < Duration::from_secs(5), "the refusal took {:?}", began.elapsed());
    let audit = bed.machine.dir.join("logs/egress-audit.jsonl");
    bed.until("the refusal is written down", async |_| {
        let text = std::fs::read_to_string(&audit).unwrap_or_default();
        Ok(text.lines().any(|line| line.contains("inference.local") && line.contains(&uid)))
    })
    .await?;
    ensure!(bed.actor(&uid).await?.generation == 1);
    bed.stop().await
}

#[tokio::test]
#[ignore = "needs OpenShell's own programs: set OPENSHELL_BIN_DIR and run with --ignored"]
async fn f3_logs_arrive_in_batches() -> Result<()> {
    let mut bed = Bed::start(&bin_dir()?, 1).await?;
    let uid = bed.create("alice", &["sleep", "100000"]).await?;
    let lines = async |bed: &Bed| {
        let said = bed.say(&["logs", "alice", "--source", "sandbox", "-n", "10000"]).await?;
        Ok::<_, anyhow::Error>(said.lines().count())
    };
    bed.until("logs of the sandbox arrive", async |bed| Ok(lines(bed).await? > 0)).await?;
    let (before, first, began) = (bed.calls().await?, lines(&bed).await?, std::time::Instant::now());
    // Each exec is some lines of the supervisor's log.
    let mut execs = 0_u32;
    while began.elapsed() < Duration::from_secs(4) {
        tokio::try_join!(bed.exec("alice", "true"), bed.exec("alice", "true"), bed.exec("alice", "true"))?;
        execs += 3;
    }
    bed.until("every exec is logged", async |bed| Ok(lines(bed).await? >= first + 2 * execs as usize))
        .await?;
    let (after, took) = (bed.calls().await?, began.elapsed());
    // Users call these; everything else is the sandbox's.
    let of_users =
        ["ExecSandbox", "GetSandbox", "GetSandboxLogs", "ListSandboxes", "GetGatewayInfo", "Health"];
    let made: BTreeMap<String, u64> = after
        .into_iter()
        .map(|(method, count)| (count - before.get(&method).copied().unwrap_or_default(), method))
        .filter(|(count, method)| *count > 0 && !of_users.iter().any(|user| method.ends_with(user)))
        .map(|(count, method)| (method, count))
        .collect();
    let rate = made.values().sum::<u64>() as f64 / took.as_secs_f64();
    ensure!(rate < 20.0, "{rate:.1} calls a second: {made:?}");
    let pushes: u64 =
        made.iter().filter(|(method, _)| method.contains("PushSandboxLogs")).map(|(_, n)| n).sum();
    ensure!(pushes <= 1, "a call for each line: {made:?}");
    // Across a sleep too, on the same stream.
    bed.fall_asleep(&uid).await?;
    bed.exec("alice", "true").await?;
    let seen = lines(&bed).await?;
    bed.exec("alice", "true").await?;
    bed.until("logs go on arriving", async |bed| Ok(lines(bed).await? > seen)).await?;
    bed.stop().await
}

#[tokio::test]
#[ignore = "needs OpenShell's own programs: set OPENSHELL_BIN_DIR and run with --ignored"]
async fn f5_a_sandbox_is_itself_and_reaches_nothing_it_was_not_given() -> Result<()> {
    const CONFIG: &str = "/openshell.v1.OpenShell/GetSandboxConfig";
    const CONNECT: &str = "/openshell.v1.OpenShell/ConnectSupervisor";
    let bed = Bed::start(&bin_dir()?, 2).await?;
    // Everything is allowed that a rule can allow: what is refused below is refused before any rule.
    let listener = TcpListener::bind("0.0.0.0:0")?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for mut peer in listener.incoming().flatten() {
            let _ = peer.write_all(b"hello from the node");
        }
    });
    let ports = [22, 80, 443, 8080, port, bed.port(), bed.machine.ingress.port()];
    let halves = ["0.0.0.0/1", "128.0.0.0/1"].map(|cidr| serde_json::json!({"cidr": cidr, "ports": ports}));
    let open = serde_json::json!({
        "substrate": {"idle": {"suspendAfter": "never"}, "egress": {"allow": halves}},
    });
    let options = ["--driver-config-json", &open.to_string()];
    let alice = bed.create_with("alice", &options, &["sleep", "100000"]).await?;
    let bob = bed.create("bob", &["sleep", "100000"]).await?;

    // Its token is its own, and what runs in it cannot read it.
    let denied = bed.exec("alice", "cat /etc/openshell/auth/sandbox.jwt 2>&1 || true").await?;
    ensure!(denied.contains("Permission denied"), "{denied}");
    let token = bed.as_root("alice", "cat /etc/openshell/auth/sandbox.jwt")?;
    let about = |id: &str| About { sandbox_id: id.to_owned() };
    let own: Result<Unread, _> = bed.call(CONFIG, &token, about(&alice)).await?;
    own.context("its own configuration")?;
    let other: Result<Unread, _> = bed.call(CONFIG, &token, about(&bob)).await?;
    ensure!(other.as_ref().is_err_and(|status| status.code() == Code::PermissionDenied), "{other:?}");
    let hello = SupervisorHello { sandbox_id: bob.clone(), instance_id: "stolen".to_owned() };
    let hello = SupervisorMessage { payload: Some(supervisor_message::Payload::Hello(hello)) };
    let posed: Result<GatewayMessage, _> = bed.call(CONNECT, &token, hello).await?;
    ensure!(posed.as_ref().is_err_and(|status| status.code() == Code::PermissionDenied), "{posed:?}");
    let forged: Result<Unread, _> = bed.call(CONFIG, &format!("{token}x"), about(&alice)).await?;
    ensure!(forged.as_ref().is_err_and(|status| status.code() == Code::Unauthenticated), "{forged:?}");
    ensure!(bed.exec("bob", "echo mine").await? == "mine", "bob's session was taken");

    // Nothing of the machine, of the control plane, or of another sandbox.
    let mut targets: Vec<(String, u16)> =
        own_addresses()?.into_iter().map(|address| (address.to_string(), port)).collect();
    ensure!(!targets.is_empty(), "this machine has no address but loopback: nothing to show");
    for (host, port) in &targets {
        let mut said = [0];
        TcpStream::connect((host.as_str(), *port))
            .and_then(|mut peer| peer.read_exact(&mut said))
            .with_context(|| format!("{host}:{port} from here"))?;
    }
    let router = bed.machine.ingress;
    targets.extend([
        ("169.254.17.2".to_owned(), 47_060),
        (router.ip().to_string(), router.port()),
        ("127.0.0.1".to_owned(), bed.port()),
        ("169.254.169.254".to_owned(), 80),
        ("169.254.17.1".to_owned(), 22),
        ("fd00:ec2::254".to_owned(), 80),
        ("bob.default.actors.localhost".to_owned(), 80),
        ("host.openshell.internal".to_owned(), bed.port()),
    ]);
    // What answers with so much as a byte is reached: the node's proxy itself may take a connection, and end it.
    let probe = |host: &str, port: u16| {
        format!(
            "timeout 8 bash -c 'exec 3<>/dev/tcp/{host}/{port} && printf \"GET / HTTP/1.0\\r\\n\\r\\n\" >&3 && \
             head -c 1 <&3' 2>/dev/null | wc -c"
        )
    };
    for (host, port) in targets {
        let seen = bed.exec("alice", &probe(&host, port)).await?;
        ensure!(seen == "0", "alice reaches {host}:{port}: {seen:?}");
    }
    // The way of asking does find what is there.
    let serve = "import socket\ns=socket.create_server((\"127.0.0.1\",22001))\nprint(flush=True)\n\
                 p=s.accept()[0]\np.sendall(b\"x\")\np.recv(99)";
    let heard = format!("python3 -S -c '{serve}' | (read up; {})", probe("127.0.0.1", 22001));
    let seen = bed.exec("alice", &heard).await?;
    ensure!(seen == "1", "the probe finds nothing at all: {seen:?}");

    // The supervisor's own way to the gateway is root's alone: through it this gateway takes everybody for a user.
    let asks = format!("python3 -S -c '{ASKS_FOR_A_GATEWAY}' {SUPERVISOR_SOCKET}");
    let seen = bed.exec("alice", &asks).await?;
    ensure!(
        seen.ends_with("PermissionError") && !seen.contains("settings"),
        "alice reaches the gateway: {seen}"
    );
    let seen = bed.as_root("alice", &asks)?;
    ensure!(seen.trim_end().ends_with("settings"), "the way of asking finds nothing: {seen}");
    bed.stop().await
}

/// Where the supervisor finds its gateway (docs/session.md).
const SUPERVISOR_SOCKET: &str = "/run/substrate-session/gateway.sock";
/// Whom it finds to speak HTTP/2, at each port that is listened on in the sandbox and at the Unix socket it is given.
const ASKS_FOR_A_GATEWAY: &str = r#"
import socket, sys
def ask(family, address):
    try:
        s = socket.socket(family)
        s.settimeout(5)
        s.connect(address)
        s.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\4" + bytes(5))
        frame = s.recv(9)
        return "settings" if frame[3:4] == b"\4" else "nothing"
    except OSError as error:
        return type(error).__name__
rows = [row.split() for row in open("/proc/net/tcp").readlines()[1:]]
ports = {int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A"}
assert ports, "not even the port of the hub"
for port in ports:
    print(port, ask(socket.AF_INET, ("127.0.0.1", port)))
print(ask(socket.AF_UNIX, sys.argv[1]))
"#;

/// Addresses of this machine that others could reach.
fn own_addresses() -> Result<Vec<IpAddr>> {
    let interfaces = nix::ifaddrs::getifaddrs()?;
    let v4 = interfaces.filter_map(|interface| Some(interface.address?.as_sockaddr_in()?.ip()));
    Ok(v4.filter(|ip| !ip.is_loopback() && !ip.is_link_local()).map(IpAddr::V4).collect())
}

// SPDX-License-Identifier: Apache-2.0
//! OpenShell's supervisor in full, in microVMs: network namespace, proxy, nftables, Landlock, and all of it asleep and
//! awake again.
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use substrate_integration::workspace;
use substrate_proto::ateapi::ActorState;

use crate::bed::{Bed, Setting, bin_dir};

/// What a supervisor in full needs of an image, and where it looks for it.
const TOOLS: [(&str, &str); 3] =
    [("ip", "usr/bin/ip"), ("nsenter", "usr/bin/nsenter"), ("nft", "usr/sbin/nft")];

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// The helpdesk's image with this machine's own `ip`, `nsenter` and `nft` in one more layer: both are of the same
/// distribution.
fn with_tools(root: &Path) -> Result<String> {
    let (stage, image) = (root.join("layer"), root.join("image"));
    for (name, place) in TOOLS {
        let path = run(Command::new("sh").args(["-c", "command -v \"$0\"", name]))?;
        let libraries = run(Command::new("ldd").arg(path.trim()))?;
        let libraries = libraries.lines().filter_map(|line| line.split("=> ").nth(1)?.split(' ').next());
        let libraries = libraries.filter(|path| !path.contains("/libc.so"));
        let put = |from: &str, to: PathBuf| -> Result<()> {
            std::fs::create_dir_all(to.parent().context("parent")?)?;
            std::fs::copy(from, &to).map(drop).with_context(|| format!("{from} to {}", to.display()))
        };
        put(path.trim(), stage.join(place))?;
        for library in libraries {
            let name = Path::new(library).file_name().context("name")?;
            put(library, stage.join("usr/lib/x86_64-linux-gnu").join(name))?;
        }
    }
    // As distributions have it: `ip` knows namespaces in one of them, the supervisor in the other.
    std::fs::create_dir_all(stage.join("var"))?;
    std::os::unix::fs::symlink("../run", stage.join("var/run"))?;
    let base = workspace().join("target/images/helpdesk");
    run(Command::new("cp").arg("-r").args([&base, &image]))?;
    let blobs = image.join("blobs/sha256");
    let layer = root.join("layer.tar");
    run(Command::new("tar")
        .args(["--owner=0", "--group=0", "-C"])
        .arg(&stage)
        .arg("-cf")
        .arg(&layer)
        .arg("."))?;
    let read = |digest: &Value| -> Result<Value> {
        let hex = digest.as_str().and_then(|digest| digest.strip_prefix("sha256:")).context("digest")?;
        Ok(serde_json::from_slice(&std::fs::read(blobs.join(hex))?)?)
    };
    let put = |file: &Path| -> Result<(String, u64)> {
        let sum = run(Command::new("sha256sum").arg(file))?;
        let hex = sum.split(' ').next().context("sum")?;
        std::fs::copy(file, blobs.join(hex))?;
        Ok((format!("sha256:{hex}"), file.metadata()?.len()))
    };
    let put_json = |value: &Value| -> Result<(String, u64)> {
        let file = root.join("json");
        std::fs::write(&file, serde_json::to_vec(value)?)?;
        put(&file)
    };
    let mut index: Value = serde_json::from_slice(&std::fs::read(image.join("index.json"))?)?;
    let mut manifest = read(&index["manifests"][0]["digest"])?;
    let mut config = read(&manifest["config"]["digest"])?;
    let (digest, size) = put(&layer)?;
    config["rootfs"]["diff_ids"].as_array_mut().context("diff_ids")?.push(json!(digest));
    let kind = "application/vnd.oci.image.layer.v1.tar";
    let entry = json!({"mediaType": kind, "digest": digest, "size": size});
    manifest["layers"].as_array_mut().context("layers")?.push(entry);
    let (digest, size) = put_json(&config)?;
    (manifest["config"]["digest"], manifest["config"]["size"]) = (json!(digest), json!(size));
    let (digest, size) = put_json(&manifest)?;
    let entry = &mut index["manifests"][0];
    (entry["digest"], entry["size"]) = (json!(digest), json!(size));
    std::fs::write(image.join("index.json"), serde_json::to_vec(&index)?)?;
    Ok(format!("oci:{}", image.display()))
}

/// Answers every request with what it was asked for.
fn server() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for peer in listener.incoming().flatten() {
            std::thread::spawn(move || answer(&peer));
        }
    });
    Ok(port)
}

fn answer(mut peer: &TcpStream) -> Result<()> {
    let mut lines = BufReader::new(peer);
    let (mut request, mut line, mut length) = (String::new(), String::new(), 0);
    while lines.read_line(&mut line)? > 2 {
        let lower = line.to_ascii_lowercase();
        if let Some(value) = lower.strip_prefix("content-length:") {
            length = value.trim().parse()?;
        } else if request.is_empty() {
            line.trim_end().clone_into(&mut request);
        }
        line.clear();
    }
    let mut body = vec![0; length];
    lines.read_exact(&mut body)?;
    let body =
        json!({"object": "chat.completion", "asked": request, "model": "m", "choices": []}).to_string();
    let head =
        format!("content-type: application/json\r\ncontent-length: {}\r\nconnection: close", body.len());
    Ok(peer.write_all(format!("HTTP/1.1 200 OK\r\n{head}\r\n\r\n{body}").as_bytes())?)
}

/// The sandbox's own command: does what is written to one pipe and says on the other how often it did, and what came of
/// it. So requests are made as an agent makes them, by children of the main process.
const AGENT: &str = "i=0; mkfifo /tmp/ask /tmp/said; while :; do sh /tmp/ask > /tmp/out 2>&1; i=$((i+1)); \
                     { echo $i; cat /tmp/out; } > /tmp/said; done";

/// Has the sandbox's command run a script: how often it ran one, and what this one printed.
async fn ask(bed: &Bed, script: &str) -> Result<(u32, Vec<String>)> {
    let relay = "until [ -p /tmp/said ]; do sleep 0.2; done; cat > /tmp/ask; cat /tmp/said";
    let exec = ["sandbox", "exec", "--name", "alice", "--no-tty", "--", "sh", "-c", relay];
    let mut said = bed.cli_with(&exec, script.as_bytes()).await?;
    // The gateway waits 10 s for a sandbox to take an exec up: an emulated one on a busy machine may miss that. Nothing of
    // it has run then.
    for _ in 0..5 {
        if !String::from_utf8_lossy(&said.stderr).contains("relay") || said.status.success() {
            break;
        }
        said = bed.cli_with(&exec, script.as_bytes()).await?;
    }
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    ensure!(said.status.success(), "{text}{}", String::from_utf8_lossy(&said.stderr));
    let mut lines = text.lines().map(str::to_owned);
    let count = lines.next().context("no answer")?.parse().with_context(|| text.clone())?;
    Ok((count, lines.collect()))
}

/// A line about a page, asked for as programs do, by the proxy that their environment names: the answer's code and what
/// was asked there, or what refused it.
fn fetch(url: &str, content: &str) -> String {
    format!(
        "python3 -S -c 'import json, urllib.request as r, urllib.error as e\n\
         try: print(200, json.load(r.urlopen(r.Request(\"{url}\", {content}), timeout=240))[\"asked\"])\n\
         except e.HTTPError as x: print(x.code)\n\
         except OSError as x: print(x)'\n"
    )
}

const PYTHON: &str = "/usr/bin/python3*";
const MODEL: &str = "model.strict.test:8080";
const ROUTED: &str = "routed.strict.test:8080";

#[tokio::test]
#[ignore = "needs OpenShell's own programs: set OPENSHELL_BIN_DIR and run with --ignored"]
async fn a_supervisor_in_full_works_in_a_microvm_and_sleeps() -> Result<()> {
    let root = tempfile::tempdir()?;
    let port = server()?;
    let published = [MODEL, ROUTED].map(|service| {
        let name = service.trim_end_matches(":8080");
        format!("[[egress.published]]\nname = \"{name}\"\nport = 8080\ntarget = \"127.0.0.1:{port}\"\n")
    });
    let setting = Setting {
        workers: 0,
        token_ttl_secs: 0,
        mode: "auto",
        image: with_tools(root.path())?,
        microvm_workers: 2,
        up: published.concat(),
    };
    let mut bed = Bed::of(&bin_dir()?, setting).await?;
    // Inference by the gateway's own configuration.
    let url = format!("OPENAI_BASE_URL=http://{ROUTED}/v1");
    let provider = ["provider", "create", "--name", "local", "--type", "openai"];
    bed.say(&[&provider[..], &["--credential", "OPENAI_API_KEY=key", "--config", &url]].concat()).await?;
    bed.say(&["inference", "set", "--provider", "local", "--model", "m", "--no-verify"]).await?;
    // One name for one program: what only the proxy can enforce. Without Landlock it does not start.
    let policy = root.path().join("policy.yaml");
    let text = format!(
        "version: 1\n\
         filesystem_policy:\n  read_only: [/usr, /bin, /lib, /lib64, /proc, /dev/urandom, /etc]\n  \
         read_write: [/tmp, /dev/null]\n\
         landlock:\n  compatibility: hard_requirement\n\
         network_policies:\n  model:\n    name: model\n    endpoints:\n    - host: {}\n      port: 8080\n    \
         binaries:\n    - path: \"{PYTHON}\"\n",
        MODEL.trim_end_matches(":8080"),
    );
    std::fs::write(&policy, text)?;
    // The model server that inference is routed to is none of the policy's; substrate lets the supervisor out to it.
    let open = json!({"host": ROUTED.trim_end_matches(":8080"), "ports": [8080], "protocol": "http"});
    let substrate = json!({"idle": {"suspendAfter": "never"}, "egress": {"allow": [open]}});
    let driver_config = json!({"substrate": substrate}).to_string();
    let options =
        ["--policy", policy.to_str().context("a path in UTF-8")?, "--driver-config-json", &driver_config];
    let uid = bed.create_with("alice", &options, &["sh", "-c", AGENT]).await?;
    bed.until_told(&uid, "auto chose strict mode").await?;
    let rules = bed.egress(&uid).await?;
    ensure!(rules.contains(&"model.strict.test:[8080]".to_owned()), "{rules:?}");

    // Its processes are in a namespace of their own, with one way out.
    let rules = bed.as_root("alice", "nsenter --net=$(echo /run/netns/sandbox-*) nft list ruleset")?;
    ensure!(rules.contains("reject") && rules.contains("ct state"), "{rules}");
    // For Landlock: a place that modes allow and the policy does not.
    bed.as_root("alice", "mkdir -p /opt/open; chmod 777 /opt /opt/open")?;

    let direct = "python3 -S -c 'import socket\ntry: socket.create_connection((\"192.0.2.1\", 80), 60)\n\
                  except OSError as x: print(x.errno)'\n";
    let by_bash = format!(
        "bash -c 'exec 3<>/dev/tcp/10.200.0.1/3128; printf \"GET http://{MODEL}/ HTTP/1.1\\r\\nHost: \
         {MODEL}\\r\\nConnection: close\\r\\n\\r\\n\" >&3; read -r line <&3; echo \"$line\"'\n"
    );
    let chat =
        fetch("https://inference.local/v1/chat/completions", r#"b"{\"model\":\"x\",\"messages\":[]}""#);
    // What is expected of each line, and the script that prints it; the second is done once.
    let often = [
        ("10001", "id -u\n".to_owned()),
        // Landlock's.
        ("refused", "(echo x > /opt/open/x) 2> /dev/null || echo refused\n".to_owned()),
        ("200 GET /allowed HTTP/1.1", fetch(&format!("http://{MODEL}/allowed"), "None")),
        // substrate would let it out; the policy does not.
        ("403", fetch(&format!("http://{ROUTED}/v1/models"), "None")),
        // Another program.
        ("HTTP/1.1 403 Forbidden", by_bash),
    ];
    let once = [
        // Without the actor's own link.
        ("0", "grep -c eth0 /proc/net/dev\n".to_owned()),
        // ECONNREFUSED, by nftables.
        ("111", direct.to_owned()),
        ("200 POST /v1/chat/completions HTTP/1.1", chat),
    ];
    for (round, lines) in [(1, &often[..]), (2, &once), (3, &often)] {
        let (expected, script): (Vec<&str>, Vec<String>) = lines.iter().cloned().unzip();
        let (count, said) = ask(&bed, &script.concat()).await.with_context(|| format!("round {round}"))?;
        let said: Vec<&str> = said.iter().map(|line| line.trim()).collect();
        ensure!(said == expected, "round {round}: {said:#?}");
        ensure!(count == round, "the command began anew: {count}");
        // Not refused by its mode: without Landlock the same user may.
        let plain = "python3 -S -c 'import os; os.setuid(10001); open(\"/opt/open/y\", \"w\")'; ls /opt/open";
        ensure!(bed.as_root("alice", plain)? == "y", "round {round}: not Landlock's doing");
        if round == 2 {
            bed.fall_asleep(&uid).await?;
            ensure!(bed.phase("alice").await? == "Ready", "asleep");
            ensure!(bed.actor(&uid).await?.state() == ActorState::Suspended);
            // Woken by the next exec, with namespaces, rules, proxy and memory as they were.
        }
    }
    ensure!(bed.phase("alice").await? == "Ready");
    ensure!(bed.actor(&uid).await?.generation == 2, "woken once");
    let disconnects = bed.gateway_log().matches("supervisor session: ended").count();
    ensure!(disconnects == 0, "the gateway lost the session {disconnects} times");
    bed.say(&["sandbox", "delete", "alice"]).await?;
    bed.until_phase("alice", "gone").await?;
    bed.stop().await
}

// SPDX-License-Identifier: Apache-2.0
//! The control plane over TCP, as a user meets it: `[api]` in the configuration, a token, the command line from afar.
use anyhow::{Context as _, Result, ensure};
use substrate_integration::{Machine, binary};

#[tokio::test]
async fn the_command_line_reaches_a_machine_over_tls_and_only_what_it_was_granted() -> Result<()> {
    let root = tempfile::Builder::new().prefix("sub-").tempdir_in("/tmp")?;
    let path = |name: &str| root.path().join(name).to_string_lossy().into_owned();
    let key = rcgen::KeyPair::generate()?;
    let cert = rcgen::CertificateParams::new(vec!["localhost".to_owned()])?.self_signed(&key)?;
    std::fs::write(path("cert.pem"), cert.pem())?;
    std::fs::write(path("key.pem"), key.serialize_pem())?;
    let config = format!(
        "[api]\nlisten = \"127.0.0.1:0\"\ncert = {:?}\nkey = {:?}\n\
         [[api.grants]]\nsubject = \"token:ci\"\nrole = \"viewer\"\natespaces = [\"team\"]\n",
        path("cert.pem"),
        path("key.pem")
    );
    std::fs::write(path("up.toml"), config)?;
    let mut machine = Machine::start(1, &["--config", &path("up.toml")]).await?;
    machine.ensure_atespace("team").await?;
    machine.ensure_atespace("other").await?;
    let up: serde_json::Value = serde_json::from_slice(&std::fs::read(machine.dir.join("run/up.json"))?)?;
    let port = up["api"].as_str().and_then(|api| api.rsplit(':').next()).context("no api in up.json")?;
    let token = machine.cli(&["token", "--control", "ci", "--ttl", "5m"])?;
    ensure!(token.status.success(), "{token:?}");
    std::fs::write(path("token"), &token.stdout)?;
    let endpoint = format!("https://localhost:{port}");
    let from_afar = |args: &[&str]| -> Result<(Option<i32>, String, String)> {
        let output = std::process::Command::new(binary("substrate")?)
            .args(["--endpoint", &endpoint, "--ca", &path("cert.pem"), "--token-file", &path("token")])
            .args(args)
            .output()?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok((output.status.code(), text(output.stdout), text(output.stderr)))
    };
    let (code, seen, error) = from_afar(&["get", "atespaces", "-o", "name"])?;
    ensure!(code == Some(0) && seen == "atespace/team\n", "{code:?} {seen} {error}");
    let (code, _, error) = from_afar(&["create", "atespace", "more"])?;
    ensure!(code == Some(1) && error.contains("may not call CreateAtespace"), "{code:?} {error}");
    let (code, _, error) = from_afar(&["-a", "other", "get", "actors"])?;
    ensure!(code == Some(1) && error.contains("in atespace other"), "{code:?} {error}");
    let audit = std::fs::read_to_string(machine.dir.join("logs/control-audit.jsonl"))?;
    let refused = audit.lines().map(serde_json::from_str::<serde_json::Value>).find(|line| {
        line.as_ref().is_ok_and(|line| line["who"] == "token:ci" && line["verb"] == "CreateAtespace")
    });
    ensure!(refused.context("no audit line")??["outcome"] == "PERMISSION_DENIED");
    machine.stop()
}

// SPDX-License-Identifier: Apache-2.0
//! A stock OpenShell gateway in front of the demo's machine, used as a person does: with the `openshell` command line.
//!
//! `examples/helpdesk/gateway/setup` writes its configuration and keys into the demo's directory before the machine
//! starts; the gateway follows once the driver listens.
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use substrate_proto::compute::{DriverCondition, DriverSandbox, DriverSandboxStatus};
use tokio::io::AsyncWriteExt as _;
use tokio::process::{Child, Command};

use super::gateway::{Recipe, WORKSPACE};
use super::report::{Miss, expect};
use crate::failure::{Doing as _, Failure};

/// How long one command may take: a create boots a sandbox.
const COMMAND_PATIENCE: Duration = Duration::from_mins(1);
/// How long a phase may take to be shown.
const PHASE_PATIENCE: Duration = Duration::from_secs(30);
/// What runs in a sandbox: OpenShell's supervisor takes the place of the image's own command.
const AGENT: [&str; 3] = ["/usr/bin/python3", "-S", "/app/helpdesk.py"];

/// Configuration and keys, made before the machine starts.
#[derive(Debug, Clone)]
pub struct Prepared {
    dir: PathBuf,
    bins: PathBuf,
    policy: PathBuf,
    port: u16,
}

impl Prepared {
    /// Makes them.
    ///
    /// # Errors
    /// When OpenShell's programs are not in `bins`, or make no keys.
    pub async fn make(scratch: &Path, examples: &Path, bins: &Path) -> Result<Self, Failure> {
        let bins =
            std::path::absolute(bins).doing(|| format!("cannot tell the path of {}", bins.display()))?;
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .and_then(|listener| listener.local_addr())
            .doing(|| "cannot find a free port for the gateway".to_owned())?
            .port();
        let dir = scratch.join("g");
        let setup = examples.join("gateway/setup");
        let output = Command::new(&setup)
            .arg(&dir)
            .arg(&bins)
            .arg(port.to_string())
            .stdin(Stdio::null())
            .output()
            .await
            .doing(|| format!("cannot run {}", setup.display()))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(Failure::general(format!("cannot prepare the gateway: {}", said.trim()))
                .with_way_out(
                    "--gateway names the directory of openshell-gateway, openshell and openshell-sandbox",
                ));
        }
        Ok(Self { dir, bins, policy: examples.join("gateway/policy.yaml"), port })
    }

    /// Where the machine keeps its state: the configuration names its socket.
    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// What it adds to the machine's configuration.
    pub fn config(&self) -> String {
        format!("\n[driver]\ngateway_config = \"{}\"\n", self.dir.join("gateway.toml").display())
    }

    /// Starts the gateway on a machine that is ready.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn start(self) -> Result<Stock, Failure> {
        let log = self.dir.join("gateway.log");
        let file = std::fs::File::create(&log).doing(|| format!("cannot write {}", log.display()))?;
        let copy = file.try_clone().doing(|| format!("cannot write {}", log.display()))?;
        let program = self.bins.join("openshell-gateway");
        let child = Command::new(&program)
            .arg("--config")
            .arg(self.dir.join("gateway.toml"))
            .env("XDG_STATE_HOME", &self.dir)
            .env("XDG_CONFIG_HOME", &self.dir)
            .stdin(Stdio::null())
            .stdout(copy)
            .stderr(file)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .doing(|| format!("cannot start {}", program.display()))?;
        let mut stock = Stock { prepared: self, child };
        let began = Instant::now();
        while !stock.openshell(&["workspace", "list"], b"").await?.status.success() {
            let ended = stock.child.try_wait().doing(|| "cannot ask after the gateway".to_owned())?;
            if let Some(status) = ended {
                return Err(Failure::general(format!(
                    "openshell-gateway ended with {status}:\n{}",
                    std::fs::read_to_string(&log).unwrap_or_default().trim()
                )));
            }
            if began.elapsed() > PHASE_PATIENCE {
                return Err(Failure::general(format!(
                    "openshell-gateway does not answer: see {}",
                    log.display()
                )));
            }
            // Asked by command: there is nothing to wait on.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        stock.say(&["workspace", "create", "--name", WORKSPACE]).await?;
        Ok(stock)
    }
}

/// The gateway and its command line.
pub struct Stock {
    prepared: Prepared,
    child: Child,
}

impl Stock {
    async fn openshell(&self, arguments: &[&str], input: &[u8]) -> Result<Output, Failure> {
        let program = self.prepared.bins.join("openshell");
        let doing = || format!("cannot run {} {}", program.display(), arguments.join(" "));
        let mut child = Command::new(&program)
            .args(arguments)
            .env("OPENSHELL_GATEWAY_ENDPOINT", format!("http://127.0.0.1:{}", self.prepared.port))
            .env("OPENSHELL_WORKSPACE", WORKSPACE)
            .env("XDG_STATE_HOME", &self.prepared.dir)
            .env("XDG_CONFIG_HOME", &self.prepared.dir)
            .env("NO_COLOR", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .doing(doing)?;
        let stdin = child.stdin.take();
        let run = async {
            if let Some(mut stdin) = stdin {
                // A command that reads nothing closes it.
                let _ = stdin.write_all(input).await;
            }
            child.wait_with_output().await
        };
        match tokio::time::timeout(COMMAND_PATIENCE, run).await {
            Ok(output) => output.doing(doing),
            Err(_) => Err(Failure::general(format!(
                "openshell {} does not end within {} s",
                arguments.join(" "),
                COMMAND_PATIENCE.as_secs()
            ))),
        }
    }

    /// A command that has to succeed; its output.
    async fn say(&self, arguments: &[&str]) -> Result<String, Failure> {
        self.say_with(arguments, b"").await
    }

    async fn say_with(&self, arguments: &[&str], input: &[u8]) -> Result<String, Failure> {
        let output = self.openshell(arguments, input).await?;
        if !output.status.success() {
            return Err(Failure::general(format!(
                "openshell {}: {}",
                arguments.join(" "),
                String::from_utf8_lossy(&output.stderr).trim()
            )));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Which gateway it is.
    pub async fn describe(&self) -> Result<String, Failure> {
        Ok(format!("{} and its gateway", self.say(&["--version"]).await?.trim()))
    }

    /// `sandbox create`, until the sandbox is Ready.
    ///
    /// # Errors
    /// A refusal, or another phase.
    pub async fn create(&self, recipe: &Recipe, name: &str) -> Result<DriverSandbox, Miss> {
        let config = json!({"substrate": recipe.driver_config()}).to_string();
        let policy = self.prepared.policy.display().to_string();
        let mut arguments = ["sandbox", "create", "--name", name, "--detach", "--policy", &policy].to_vec();
        arguments.extend(["--driver-config-json", &config, "--no-credential-warnings"]);
        let environment: Vec<String> =
            recipe.environment.iter().map(|(key, value)| format!("{key}={value}")).collect();
        for variable in &environment {
            arguments.extend(["--env", variable]);
        }
        arguments.push("--");
        arguments.extend(AGENT);
        self.say(&arguments).await?;
        self.until(name, "Ready").await
    }

    /// Waits for a phase.
    ///
    /// # Errors
    /// When it does not come.
    pub async fn until(&self, name: &str, phase: &str) -> Result<DriverSandbox, Miss> {
        let began = Instant::now();
        loop {
            let found = self.rows().await?.into_iter().find(|row| row["name"] == name);
            let seen = found.as_ref().map_or("no row", |row| row["phase"].as_str().unwrap_or_default());
            if let Some(row) = found.as_ref().filter(|_| seen == phase) {
                return Ok(sandbox(row));
            }
            let waits = seen != "Error" && began.elapsed() < PHASE_PATIENCE;
            expect(waits, format!("{name} to be {phase} at the gateway"), seen)?;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn rows(&self) -> Result<Vec<Value>, Failure> {
        let text = self.say(&["sandbox", "list", "-o", "json"]).await?;
        serde_json::from_str(&text).doing(|| format!("`openshell sandbox list` is not understood: {text}"))
    }

    /// `sandbox list`.
    pub async fn list(&self) -> Result<Vec<DriverSandbox>, Failure> {
        Ok(self.rows().await?.iter().map(sandbox).collect())
    }

    /// One of the list.
    pub async fn get(&self, name: &str) -> Result<DriverSandbox, Failure> {
        let found = self.list().await?.into_iter().find(|sandbox| sandbox.name == name);
        found.ok_or_else(|| Failure::general(format!("`openshell sandbox list` does not show {name}")))
    }

    /// `sandbox stop`, until it is.
    ///
    /// # Errors
    /// When it is not.
    pub async fn stop(&self, name: &str) -> Result<(), Miss> {
        self.say(&["sandbox", "stop", name]).await?;
        self.until(name, "Stopped").await.map(drop)
    }

    /// `sandbox start`, until the sandbox is Ready.
    ///
    /// # Errors
    /// When it is not.
    pub async fn start(&self, name: &str) -> Result<(), Miss> {
        self.say(&["sandbox", "start", name]).await?;
        self.until(name, "Ready").await.map(drop)
    }

    /// `sandbox delete`.
    ///
    /// # Errors
    /// When the gateway refuses.
    pub async fn delete(&self, name: &str) -> Result<(), Failure> {
        self.say(&["sandbox", "delete", name]).await.map(drop)
    }

    /// Waits until the gateway has no such sandbox.
    ///
    /// # Errors
    /// When it keeps it.
    pub async fn until_deleted(&self, id: &str) -> Result<(), Miss> {
        let began = Instant::now();
        while self.rows().await?.iter().any(|row| row["id"] == id) {
            expect(began.elapsed() < PHASE_PATIENCE, "no row at the gateway", id)?;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// `sandbox exec`; what it prints.
    ///
    /// # Errors
    /// When the command does not end well.
    pub async fn exec(&self, name: &str, command: &[&str], input: &[u8]) -> Result<String, Failure> {
        let fixed = ["sandbox", "exec", "--name", name, "--no-tty", "--"];
        Ok(self.say_with(&[&fixed, command].concat(), input).await?.trim_end().to_owned())
    }

    /// The last lines of its log.
    pub fn last_log_lines(&self, count: usize) -> String {
        let text = std::fs::read_to_string(self.prepared.dir.join("gateway.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(count)..].join("\n")
    }

    /// Ends it.
    pub async fn end(mut self) {
        if let Err(error) = self.child.kill().await {
            eprintln!("substrate: cannot end the gateway: {error}");
        }
    }

    /// Leaves it running; how to use and end it.
    pub fn keep(self) -> String {
        let text = format!(
            "      OPENSHELL_GATEWAY_ENDPOINT=http://127.0.0.1:{} {}/openshell --workspace {WORKSPACE} sandbox list\n\
             end:  kill {}\n",
            self.prepared.port,
            self.prepared.bins.display(),
            self.child.id().unwrap_or_default()
        );
        // Its handle would end it.
        std::mem::forget(self.child);
        text
    }
}

/// A row of the list as the driver would report it: what users see stands for what the driver said.
fn sandbox(row: &Value) -> DriverSandbox {
    let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
    let condition = |kind: &str, holds: bool| DriverCondition {
        r#type: kind.to_owned(),
        status: if holds { "True" } else { "False" }.to_owned(),
        reason: text("phase"),
        ..Default::default()
    };
    let phase = text("phase");
    let conditions = vec![condition("Ready", phase == "Ready"), condition("Suspended", phase == "Stopped")];
    DriverSandbox {
        id: text("id"),
        name: text("name"),
        workspace: WORKSPACE.to_owned(),
        status: Some(DriverSandboxStatus { conditions, ..Default::default() }),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::gateway::condition;

    #[test]
    fn a_row_of_the_gateway_reads_as_the_drivers_word() {
        let row = json!({"id": "1", "name": "alice", "phase": "Stopped"});
        let seen = sandbox(&row);
        assert_eq!((seen.id.as_str(), seen.name.as_str()), ("1", "alice"));
        assert_eq!(condition(&seen, "Suspended").0, "True");
        assert_eq!(condition(&seen, "Ready").0, "False");
    }
}

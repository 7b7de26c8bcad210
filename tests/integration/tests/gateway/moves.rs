// SPDX-License-Identifier: Apache-2.0
//! F4: what runs through a session while its sandbox sleeps and moves — execs with input and exit code, terminals,
//! forwarded connections — loses no byte and notices nothing.
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use substrate_integration::PATIENCE;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdin, ChildStdout};

use crate::bed::{Bed, bin_dir, free_port};

/// Gives back what it is sent, on port 9000.
const ECHO: &str = r#"
import socket, threading
def serve(peer):
    while data := peer.recv(65536):
        peer.sendall(data)
    peer.close()
server = socket.create_server(("127.0.0.1", 9000))
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"#;

/// A running `openshell sandbox exec`.
struct Exec {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: ChildStdout,
}

impl Exec {
    /// Without a terminal: OpenShell's command line reads all its input before it begins.
    async fn piped(bed: &Bed, script: &str, input: &[u8]) -> Result<Self> {
        let mut command = bed.command();
        command.args(["sandbox", "exec", "--name", "alice", "--no-tty", "--", "sh", "-c", script]);
        let mut exec = Self::start(command)?;
        let mut stdin = exec.stdin.take().context("stdin")?;
        stdin.write_all(input).await?;
        Ok(exec)
    }

    /// At a terminal, here (which `script` makes) and there.
    fn terminal(bed: &Bed, script: &str) -> Result<Self> {
        let openshell = bed.command();
        let openshell = openshell.as_std();
        let mut command = tokio::process::Command::new("script");
        for (name, value) in openshell.get_envs() {
            command.env(name, value.unwrap_or_default());
        }
        command.env("OPENSHELL", openshell.get_program()).env("SCRIPT", script).env("TERM", "xterm").args([
            "-qec",
            "exec \"$OPENSHELL\" sandbox exec --name alice --tty -- sh -c \"$SCRIPT\"",
            "/dev/null",
        ]);
        Self::start(command)
    }

    fn start(mut command: tokio::process::Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .context("openshell sandbox exec")?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().context("stdout")?);
        Ok(Self { child, stdin, stdout })
    }

    async fn say(&mut self, text: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("its input is closed")?;
        stdin.write_all(text.as_bytes()).await?;
        Ok(stdin.flush().await?)
    }

    /// Reads until its output has that.
    async fn hear_part(&mut self, part: &str) -> Result<()> {
        let mut heard = Vec::new();
        let reading = async {
            while !String::from_utf8_lossy(&heard).contains(part) {
                ensure!(self.stdout.read_buf(&mut heard).await? > 0, "its output ended");
            }
            Ok(())
        };
        let read = tokio::time::timeout(PATIENCE, reading).await;
        let text = || String::from_utf8_lossy(&heard).into_owned();
        match read {
            Ok(read) => read.with_context(|| format!("before {part:?}: {:?}", text())),
            Err(_) => bail!("no {part:?} in {:?}", text()),
        }
    }

    /// Ends its input; the rest of its output and its code.
    async fn end(mut self) -> Result<(String, Option<i32>)> {
        drop(self.stdin.take());
        let mut rest = String::new();
        tokio::time::timeout(PATIENCE, self.stdout.read_to_string(&mut rest)).await.context("no end")??;
        let status = tokio::time::timeout(PATIENCE, self.child.wait()).await.context("no exit")??;
        Ok((rest, status.code()))
    }
}

/// Sends numbered lines through a connection that echoes, until told to stop; how many bytes came back.
async fn echo_load(stream: TcpStream, stop: Arc<AtomicBool>, echoed: Arc<AtomicU64>) -> Result<u64> {
    let (mut reader, mut writer) = stream.into_split();
    let sending = tokio::spawn(async move {
        let mut pace = tokio::time::interval(Duration::from_millis(2));
        let mut number = 0_u64;
        while !stop.load(Ordering::Relaxed) {
            pace.tick().await;
            writer.write_all(&line(number)).await?;
            number += 1;
        }
        // Not closed: a forward may then end before its last bytes are back.
        Ok::<_, std::io::Error>((number, writer))
    });
    let (mut number, mut pending, mut buffer) = (0_u64, Vec::new(), vec![0; 65536]);
    let mut total = None;
    let mut sending = Some(sending);
    let mut writer = None;
    while total != Some(number) {
        let silent = tokio::time::timeout(PATIENCE, reader.read(&mut buffer));
        let count = tokio::select! {
            ended = async { sending.as_mut().expect("guarded").await }, if sending.is_some() => {
                sending = None;
                let (count, open) = ended??;
                (total, writer) = (Some(count), Some(open));
                continue;
            }
            read = silent => read.context("nothing comes back")??,
        };
        ensure!(count > 0, "the connection ended after line {number}");
        pending.extend_from_slice(&buffer[..count]);
        let mut rest = &pending[..];
        loop {
            let expected = line(number);
            if rest.len() < expected.len() {
                break;
            }
            ensure!(rest.starts_with(&expected), "line {number} came back changed");
            rest = &rest[expected.len()..];
            number += 1;
        }
        pending = rest.to_vec();
        echoed.store(number, Ordering::Relaxed);
    }
    drop(writer);
    Ok(number)
}

/// 1 KiB that no other line has.
fn line(number: u64) -> Vec<u8> {
    let mut line = format!("{number:020} ").repeat(49).into_bytes();
    line.resize(1023, b'.');
    line.push(b'\n');
    line
}

#[tokio::test]
#[ignore = "needs OpenShell's own programs: set OPENSHELL_BIN_DIR and run with --ignored"]
async fn f4_execs_terminals_and_forwards_go_on_across_moves() -> Result<()> {
    let mut bed = Bed::start(&bin_dir()?, 2).await?;
    let uid = bed.create("alice", &["/usr/bin/python3", "-S", "-c", ECHO]).await?;
    let port = free_port()?;
    let _forward = bed.forward("alice", 9000, port)?;
    bed.until("the forward listens", async |_| Ok(TcpStream::connect(("127.0.0.1", port)).await.is_ok()))
        .await?;

    let (stop, echoed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let load = tokio::spawn(echo_load(stream, Arc::clone(&stop), Arc::clone(&echoed)));
    let input = (0..64).flat_map(line).collect::<Vec<u8>>();
    let counting = "n=0; until [ -e /dev/shm/go ]; do n=$((n+1)); echo $n; sleep 0.05; done; cat; exit 5";
    let piped = Exec::piped(&bed, counting, &input).await?;
    let mut terminal =
        Exec::terminal(&bed, "tty; stty size; while read word; do echo \"got $word\"; done; exit 6")?;
    terminal.hear_part("/dev/pts/").await?;
    bed.until("the forward echoes", async |_| Ok(echoed.load(Ordering::Relaxed) > 0)).await?;
    for round in 0..4 {
        let from = bed.leave_worker(&uid).await?;
        // Said while it sleeps or wakes.
        terminal.say(&format!("word{round}\n")).await?;
        terminal.hear_part(&format!("got word{round}")).await?;
        bed.until_elsewhere(&uid, &from).await?;
        let known = echoed.load(Ordering::Relaxed);
        bed.until("the forward goes on", async |_| Ok(echoed.load(Ordering::Relaxed) > known)).await?;
        ensure!(bed.phase("alice").await? == "Ready", "round {round}");
    }
    stop.store(true, Ordering::Relaxed);
    let lines = tokio::time::timeout(PATIENCE, load).await.context("the echo does not end")???;
    ensure!(lines > 100, "only {lines} lines went through");
    bed.exec("alice", "touch /dev/shm/go").await?;
    let (said, code) = piped.end().await?;
    let counted = said.len().checked_sub(input.len()).context("its input did not come back")?;
    let numbers: Vec<u64> = said[..counted].lines().map(str::parse).collect::<Result<_, _>>()?;
    ensure!(numbers.iter().copied().eq(1..=numbers.len() as u64), "numbers are missing: {numbers:?}");
    ensure!(said.as_bytes()[counted..] == input && code == Some(5), "{code:?}");
    // End of input at a terminal is a key.
    terminal.say("\u{4}").await?;
    let (rest, code) = terminal.end().await?;
    ensure!(code == Some(6), "{rest:?} {code:?}");
    // A connection, and one that begins while it sleeps.
    bed.leave_worker(&uid).await?;
    let mut late = TcpStream::connect(("127.0.0.1", port)).await?;
    late.write_all(b"late").await?;
    let mut back = [0; 4];
    tokio::time::timeout(PATIENCE, late.read_exact(&mut back)).await.context("no echo")??;
    ensure!(&back == b"late");
    bed.stop().await
}

#[tokio::test]
#[ignore = "needs OpenShell's own programs: set OPENSHELL_BIN_DIR and run with --ignored"]
async fn many_sleeps_under_load_change_no_phase_and_lose_no_byte() -> Result<()> {
    let cycles: u32 = match std::env::var("SUBSTRATE_SLEEP_CYCLES") {
        Ok(cycles) => cycles.parse().context("SUBSTRATE_SLEEP_CYCLES")?,
        Err(_) => 20,
    };
    let mut bed = Bed::start(&bin_dir()?, 2).await?;
    bed.machine.allow(Duration::from_mins(5) + Duration::from_secs(10) * cycles);
    let uid = bed.create("alice", &["sleep", "100000"]).await?;
    let stop = Arc::new(AtomicBool::new(false));
    // Users that never rest: each counts in the sandbox's memory, and each answer has to follow the last.
    let users: Vec<_> = (0..2)
        .map(|user| {
            let (program, stop) = (bed.program(), Arc::clone(&stop));
            tokio::spawn(async move {
                let mut count = 0_u64;
                while !stop.load(Ordering::Relaxed) {
                    count += 1;
                    let script = format!(
                        "n=$(cat /dev/shm/{user} 2>/dev/null || echo 0); n=$((n+1)); echo $n > /dev/shm/{user}; \
                         cat; echo $n; exit $((n % 100))"
                    );
                    let mut command = program();
                    command.args(["sandbox", "exec", "--name", "alice", "--no-tty", "--", "sh", "-c", &script]);
                    let payload = line(count).repeat(64);
                    let (out, code) = run(command, &payload).await.with_context(|| format!("exec {count} of user {user}"))?;
                    let expected = [&payload[..], format!("{count}\n").as_bytes()].concat();
                    ensure!(out == expected, "exec {count} of user {user}: {} bytes of {}", out.len(), expected.len());
                    ensure!(code == Some((count % 100) as i32), "exec {count} of user {user} ended with {code:?}");
                }
                Ok::<_, anyhow::Error>(count)
            })
        })
        .collect();
    let cycling = async {
        for cycle in 1..=cycles {
            let from = bed.leave_worker(&uid).await.with_context(|| format!("cycle {cycle}"))?;
            let phase = bed.phase("alice").await?;
            ensure!(phase == "Ready", "cycle {cycle}: {phase}");
            bed.until_elsewhere(&uid, &from).await.with_context(|| format!("cycle {cycle}"))?;
            let phase = bed.phase("alice").await?;
            ensure!(phase == "Ready", "cycle {cycle}: {phase}");
            ensure!(!users.iter().any(tokio::task::JoinHandle::is_finished), "a user ended in cycle {cycle}");
        }
        Ok(())
    };
    let cycled: Result<()> = cycling.await;
    stop.store(true, Ordering::Relaxed);
    let mut execs = 0;
    for user in users {
        execs += tokio::time::timeout(PATIENCE, user).await.context("an exec hangs")???;
    }
    cycled?;
    ensure!(execs >= u64::from(cycles), "only {execs} execs in {cycles} cycles");
    let ends = bed.gateway_log().matches("supervisor session: ended").count();
    ensure!(ends == 0, "the gateway lost the session {ends} times");
    bed.stop().await
}

#[tokio::test]
#[ignore = "needs OpenShell's own programs: set OPENSHELL_BIN_DIR and run with --ignored"]
async fn a_token_is_renewed_while_its_sandbox_sleeps() -> Result<()> {
    const TTL: u64 = 6;
    let mut bed = Bed::start_with(&bin_dir()?, 1, TTL).await?;
    let uid = bed.create("alice", &["sleep", "100000"]).await?;
    bed.fall_asleep(&uid).await?;
    let renewals = async |bed: &Bed| {
        let calls = bed.calls().await?;
        Ok::<_, anyhow::Error>(
            calls
                .iter()
                .filter(|(method, _)| method.contains("RefreshSandboxToken"))
                .map(|(_, n)| n)
                .sum::<u64>(),
        )
    };
    let before = renewals(&bed).await?;
    // Twice its life: what the supervisor holds has expired.
    bed.until("the hub renews it", async |bed| Ok(renewals(bed).await? >= before + 3)).await?;
    ensure!(bed.actor(&uid).await?.generation == 1, "woken for a token");
    ensure!(bed.phase("alice").await? == "Ready");
    ensure!(bed.exec("alice", "echo here").await? == "here");
    // The hub dies, and comes back to a sandbox that sleeps with an old token.
    bed.fall_asleep(&uid).await?;
    let before = renewals(&bed).await?;
    bed.until("the hub renews it again", async |bed| Ok(renewals(bed).await? >= before + 2)).await?;
    bed.machine.kill();
    bed.machine.restart().await?;
    bed.until_phase("alice", "Ready").await?;
    let before = renewals(&bed).await?;
    bed.until("the hub that came back renews it", async |bed| Ok(renewals(bed).await? >= before + 2)).await?;
    ensure!(bed.exec("alice", "echo still here").await? == "still here");
    bed.stop().await
}

/// Runs a command on an input; its output and code.
async fn run(mut command: tokio::process::Command, input: &[u8]) -> Result<(Vec<u8>, Option<i32>)> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut stdin = child.stdin.take().context("stdin")?;
    let input = input.to_vec();
    let feeding = tokio::spawn(async move { stdin.write_all(&input).await });
    let output =
        tokio::time::timeout(PATIENCE, child.wait_with_output()).await.context("it does not end")??;
    feeding.await?.with_context(|| format!("its input: {}", String::from_utf8_lossy(&output.stderr)))?;
    Ok((output.stdout, output.status.code()))
}

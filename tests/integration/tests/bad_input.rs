// SPDX-License-Identifier: Apache-2.0
//! What users get wrong and machines lack: each message names the thing, the cause and the way out, and nothing is
//! left behind.
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, Result, ensure};
use substrate_integration::{Machine, actor, binary, files_below, runsc};
use substrate_proto::ateapi::{self, ActorState, control_client::ControlClient};
use substrate_proto::types::{ExecInput, ExecStart, exec_input::Input};
use tonic::transport::Channel;

/// Runs a `substrate up` that is expected to refuse.
fn up(dir: &Path, runsc: &Path, change: impl FnOnce(&mut Command)) -> Result<Output> {
    let mut command = Command::new(binary("substrate")?);
    command.args(["up", "--workers", "1", "--dir"]).arg(dir).arg("--runsc").arg(runsc).stdin(Stdio::null());
    change(&mut command);
    Ok(command.output()?)
}

/// A refusal with every one of these words on standard error.
fn refused(output: &Output, words: &[&str]) -> Result<()> {
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success(), "it was not refused: {text}");
    for word in words {
        ensure!(text.contains(word), "the message lacks {word:?}: {text}");
    }
    Ok(())
}

#[test]
fn a_missing_runsc_is_named() -> Result<()> {
    let dir = tempfile::tempdir()?;
    refused(&up(dir.path(), Path::new("/nonexistent/runsc"), |_| ())?, &["/nonexistent/runsc"])
}

#[test]
fn a_runsc_without_checkpoint_is_refused() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let fake = dir.path().join("runsc");
    let mut file = std::fs::File::create(&fake)?;
    file.write_all(
        b"#!/bin/sh\ncase \"$*\" in *version*) echo 'runsc version release-20260901.0';; \
          *) echo \"flag provided but not defined: $*\" >&2; exit 2;; esac\n",
    )?;
    file.set_permissions(std::fs::Permissions::from_mode(0o755))?;
    drop(file);
    refused(&up(&dir.path().join("d"), &fake, |_| ())?, &["checkpoint"])
}

#[test]
fn without_root_it_says_so() -> Result<()> {
    let dir = tempfile::tempdir()?;
    // The binary has to be reachable for another user.
    let copy = dir.path().join("substrate");
    std::fs::copy(binary("substrate")?, &copy)?;
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755))?;
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&copy)
        .args(["up", "--dir"])
        .arg(dir.path().join("d"))
        .stdin(Stdio::null())
        .output()?;
    refused(&output, &["root"])
}

#[test]
fn a_missing_nft_is_named_with_its_package() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let output = up(dir.path(), &runsc()?, |command| {
        command.env("PATH", dir.path());
    })?;
    refused(&output, &["nft", "install"])
}

#[test]
fn a_socket_path_that_is_too_long_is_refused() -> Result<()> {
    let dir = tempfile::tempdir()?;
    refused(&up(&dir.path().join("x".repeat(120)), &runsc()?, |_| ())?, &["107"])
}

#[tokio::test]
async fn a_second_up_on_the_directory_and_a_taken_port_are_refused() -> Result<()> {
    let machine = Machine::start(1, &[]).await?;
    refused(&up(&machine.dir, &runsc()?, |_| ())?, &["another substrate"])?;
    let other = tempfile::tempdir()?;
    let port = machine.ingress.to_string();
    let output = up(other.path(), &runsc()?, |command| {
        command.args(["--listen", &port]);
    })?;
    refused(&output, &[port.as_str()])
}

#[tokio::test]
async fn names_fields_and_images_are_checked_before_anything_runs() -> Result<()> {
    let mut machine = Machine::start(1, &[]).await?;
    refused(&machine.cli(&["create", "actor", "Not_DNS", "--image", "oci:/nowhere"])?, &["Not_DNS"])?;
    refused(&machine.cli(&["create", "actor", "ghost", "--image", "oci:/nowhere"])?, &["/nowhere"])?;
    let file = machine.dir.join("bad.yaml");
    std::fs::write(&file, "kind: ActorTemplate\nname: t\nspec:\n  containers: []\n  nonsense: 1\n")?;
    refused(&machine.cli(&["apply", "-f", file.to_str().context("path")?])?, &["nonsense"])?;
    let actors = machine.api.list_actors(ateapi::ListActorsRequest::default()).await?.into_inner().actors;
    ensure!(actors.is_empty(), "left behind: {actors:?}");
    let templates =
        machine.api.list_templates(ateapi::ListTemplatesRequest::default()).await?.into_inner().templates;
    ensure!(templates.is_empty(), "left behind: {templates:?}");
    Ok(())
}

#[tokio::test]
async fn a_command_that_exits_at_once_is_exited_with_its_code() -> Result<()> {
    let mut machine = Machine::start(1, &[]).await?;
    let outcome = machine
        .counter("brief", |spec| {
            spec.containers[0].command = vec!["/bin/sh".into(), "-c".into(), "exit 7".into()];
        })
        .await;
    ensure!(outcome.is_err(), "a resume that ends in EXITED is no success");
    let actor = machine.wait_for("brief", ActorState::Exited).await?;
    ensure!(actor.exit.context("no exit status")?.code == 7);
    Ok(())
}

#[tokio::test]
async fn a_full_pool_refuses_and_loses_nothing() -> Result<()> {
    let mut machine = Machine::start(1, &[]).await?;
    machine.counter("first", |_| ()).await?;
    // Kept busy, so that it is not evicted for the second.
    let held = hold_exec(machine.api.clone()).await?;
    let error = machine.counter("second", |_| ()).await.err().context("a full pool must refuse")?;
    ensure!(format!("{error:#}").contains("worker"), "unclear: {error:#}");
    ensure!(machine.get("second").await?.state() == ActorState::New);
    ensure!(machine.count("first").await?.0 == 1);
    drop(held);
    Ok(())
}

/// An exec in actor `first` that runs until its handle is dropped.
async fn hold_exec(mut api: ControlClient<Channel>) -> Result<tokio::sync::mpsc::Sender<ExecInput>> {
    let (send, receive) = tokio::sync::mpsc::channel(4);
    send.send(ExecInput {
        input: Some(Input::Start(ExecStart {
            atespace: "default".into(),
            actor: "first".into(),
            command: vec!["/bin/cat".into()],
            ..Default::default()
        })),
    })
    .await?;
    let stream = tokio_stream::wrappers::ReceiverStream::new(receive);
    let mut output = api.exec_actor(stream).await?.into_inner();
    output.message().await?.context("exec ended at once")?;
    tokio::spawn(async move { while let Ok(Some(_)) = output.message().await {} });
    Ok(send)
}

#[tokio::test]
async fn damaged_snapshots_are_refused_before_the_runtime_sees_them() -> Result<()> {
    let mut machine = Machine::start(2, &[]).await?;
    machine.counter("damaged", |_| ()).await?;
    machine.count("damaged").await?;
    machine.suspend("damaged").await?;
    let uid = machine.get("damaged").await?.uid;
    let node = machine.dir.join("node/snapshots").join(&uid);
    // One bit of guest memory in the node's copy, which runsc itself would restore without a word: the durable copy
    // takes its place.
    flip(&machine.latest_on_node(&uid)?.join("files/pages.img"))?;
    ensure!(machine.count("damaged").await?.0 == 2, "the good copy was not used");
    machine.suspend("damaged").await?;
    // Now every copy: refused, named, and left where a verb leads on.
    let packs = files_below(&machine.dir.join("blobs"))?;
    let packs = packs.iter().filter(|path| path.to_string_lossy().contains("pack"));
    let newest = packs.max_by_key(|path| path.metadata().and_then(|meta| meta.modified()).ok());
    flip(newest.context("no pack")?)?;
    std::fs::remove_dir_all(&node)?;
    let error = machine.resume("damaged").await.err().context("a damaged snapshot was restored")?;
    let message = format!("{error:#}");
    let snapshot = machine.get("damaged").await?.last_snapshot.context("the record lost its snapshot")?;
    ensure!(message.contains(&snapshot.id), "the message does not name the snapshot: {message}");
    machine
        .api
        .reset_actor(ateapi::ResetActorRequest { actor: Some(actor("damaged")), ..Default::default() })
        .await?;
    ensure!(machine.count("damaged").await?.0 == 1);
    Ok(())
}

/// A disk of its own for a machine: small enough to be filled.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new(mib: u32) -> Result<Self> {
        let point = tempfile::Builder::new().prefix("sub-").tempdir_in("/tmp")?;
        let size = format!("size={mib}m");
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("small"), point.path(), Some("tmpfs"), flags, Some(size.as_str()))?;
        Ok(Self(point))
    }

    /// Starts a machine on it that keeps this much free.
    async fn machine(&self, reserve_mib: u64) -> Result<Machine> {
        let config = self.0.path().join("substrate.toml");
        std::fs::write(&config, format!("[node]\nmin_free_bytes = {}\n", reserve_mib << 20))?;
        let config = config.to_str().context("path")?;
        Machine::start_in(self.0.path().join("d"), None, 1, &["--config", config]).await
    }

    /// Fills it until this much is left.
    fn fill(&self, left_kib: u64) -> Result<()> {
        let file = std::fs::File::create(self.0.path().join("ballast"))?;
        for _ in 0..50 {
            let stat = nix::sys::statvfs::statvfs(self.0.path())?;
            let free = stat.blocks_available() * stat.fragment_size();
            let size = i64::try_from(free.saturating_sub(left_kib << 10))?;
            match nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, size) {
                // The machine wrote meanwhile: there is less to fill.
                Err(nix::errno::Errno::ENOSPC) => {}
                filled => return Ok(filled?),
            }
        }
        anyhow::bail!("the machine writes faster than its disk can be filled")
    }

    fn relieve(&self) -> Result<()> {
        Ok(std::fs::remove_file(self.0.path().join("ballast"))?)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if let Err(error) = nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH) {
            eprintln!("unmounting the test's disk: {error}");
        }
    }
}

/// Suspends with this much room, which must be refused and lose nothing, and again with enough.
async fn suspend_on_a_full_disk(reserve_mib: u64, left_kib: u64, words: &[&str]) -> Result<()> {
    let disk = SmallDisk::new(640)?;
    let mut machine = disk.machine(reserve_mib).await?;
    machine.counter("full", |_| ()).await?;
    let (count, nonce) = machine.count("full").await?;
    disk.fill(left_kib)?;
    let error = machine.suspend("full").await.err().context("there was no room for a snapshot")?;
    let text = format!("{error:#}");
    for word in words {
        ensure!(text.contains(word), "the message lacks {word:?}: {text}");
    }
    ensure!(machine.count("full").await? == (count + 1, nonce.clone()), "it did not run on");
    disk.relieve()?;
    machine.suspend("full").await?;
    ensure!(machine.count("full").await? == (count + 2, nonce), "the snapshot is not good");
    Ok(())
}

#[tokio::test]
async fn a_suspend_that_would_eat_the_reserve_is_refused() -> Result<()> {
    suspend_on_a_full_disk(128, 64 << 10, &["MiB free", "delete actors"]).await
}

#[tokio::test]
async fn a_disk_without_a_byte_left_loses_nothing() -> Result<()> {
    suspend_on_a_full_disk(0, 0, &["full"]).await
}

/// Inverts one bit in the middle of a file.
fn flip(path: &Path) -> Result<()> {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path)?;
    let middle = file.metadata()?.len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, middle)?;
    file.write_all_at(&[byte[0] ^ 1], middle)?;
    Ok(())
}

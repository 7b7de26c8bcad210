// SPDX-License-Identifier: Apache-2.0
//! `substrate cp`: files between an actor and this machine, as a tar stream through exec.
//!
//! From an actor the stream is unpacked into a new directory beside the target and moved into place when it is complete,
//! so that a broken copy leaves nothing, and names that point out of it are refused. An image without tar still gives
//! and takes single files, by `cat`.
use std::io::Read;
use std::path::{Path, PathBuf};

use substrate_proto::types::exec_input::Input;
use substrate_proto::types::exec_output::Output;
use substrate_proto::types::{ExecInput, ExecStart};
use tokio::sync::mpsc;

use crate::args::{Cp, Global};
use crate::client::{Control, connect};
use crate::cmd::exec::{Session, collect};
use crate::failure::{Doing as _, Exit, Failure};

/// What is kept of a command's complaints, bytes.
const COMPLAINTS: usize = 8 << 10;
/// Codes of a command that could not be started: of a shell, and of runsc.
const NOT_STARTED: [i32; 3] = [126, 127, 128];

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Side {
    Local(PathBuf),
    Actor { name: String, path: String },
}

/// `NAME:/PATH` is in an actor; anything else is local (`./a:b` is, too).
fn side(text: &str) -> Side {
    match text.split_once(':') {
        Some((name, path)) if !name.is_empty() && !name.contains('/') && !path.is_empty() => {
            Side::Actor { name: name.to_owned(), path: path.to_owned() }
        }
        _ => Side::Local(PathBuf::from(text)),
    }
}

/// Directory and last name of a path inside an actor; a trailing slash is ignored.
fn split_remote(path: &str) -> Result<(String, String), Failure> {
    let trimmed = path.trim_end_matches('/');
    let (dir, base) = match trimmed.rsplit_once('/') {
        Some(("", base)) => ("/", base),
        Some((dir, base)) => (dir, base),
        None => (".", trimmed),
    };
    if base.is_empty() || matches!(base, "." | "..") {
        return Err(Failure::usage(format!("{path:?} names no file or directory: end it with a name")));
    }
    Ok((dir.to_owned(), base.to_owned()))
}

/// `substrate cp`.
pub async fn run(options: Cp, global: &Global) -> Result<(), Failure> {
    let target = Place { global, container: options.container.as_deref() };
    match (side(&options.source), side(&options.target)) {
        (Side::Actor { name, path }, Side::Local(local)) => {
            let mut client = connect(global).await?;
            target.download(&mut client, &name, &path, &local).await
        }
        (Side::Local(local), Side::Actor { name, path }) => {
            if !local.exists() {
                return Err(Failure::new(Exit::NotFound, format!("{} does not exist", local.display())));
            }
            let mut client = connect(global).await?;
            target.upload(&mut client, &local, &name, &path).await
        }
        _ => Err(Failure::usage("one side must be in an actor (NAME:/PATH), the other on this machine")),
    }
}

struct Place<'a> {
    global: &'a Global,
    container: Option<&'a str>,
}

impl Place<'_> {
    fn start(&self, actor: &str, command: &[&str]) -> ExecStart {
        ExecStart {
            atespace: self.global.atespace.clone(),
            actor: actor.to_owned(),
            container: self.container.unwrap_or_default().to_owned(),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            ..Default::default()
        }
    }

    async fn download(
        &self,
        client: &mut Control,
        actor: &str,
        path: &str,
        local: &Path,
    ) -> Result<(), Failure> {
        let (dir, base) = split_remote(path)?;
        let final_path = if local.is_dir() { local.join(&base) } else { local.to_owned() };
        let parent = final_path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let staging = tempfile::Builder::new()
            .prefix(".substrate-cp-")
            .tempdir_in(parent)
            .doing(|| format!("cannot write to {}", parent.display()))?;
        let mut session =
            Session::open(client, self.start(actor, &["tar", "-C", &dir, "-cf", "-", &base])).await?;
        session.send(Input::CloseStdin(true)).await;
        let (send, receive) = mpsc::channel::<Vec<u8>>(16);
        let into = staging.path().to_owned();
        let unpack = tokio::task::spawn_blocking(move || unpack(ChunkReader::new(receive), &into));
        let mut complaints = Vec::new();
        let mut bytes = 0_usize;
        let code = copy_to(&mut session, send, &mut complaints, &mut bytes).await?;
        let unpacked = unpack.await.doing(|| "unpacking was interrupted".to_owned())?;
        let complaint = String::from_utf8_lossy(&complaints).trim().to_owned();
        if code != 0 {
            if bytes == 0 && NOT_STARTED.contains(&code) {
                return self
                    .download_by_cat(client, actor, path, &staging.path().join(&base), &final_path)
                    .await;
            }
            return Err(remote_error("tar", actor, path, code, &complaint));
        }
        unpacked.doing(|| format!("cannot unpack {path} of {actor}"))?;
        move_into_place(&staging.path().join(&base), &final_path)
    }

    async fn download_by_cat(
        &self,
        client: &mut Control,
        actor: &str,
        path: &str,
        staged: &Path,
        target: &Path,
    ) -> Result<(), Failure> {
        let mut session = Session::open(client, self.start(actor, &["cat", path])).await?;
        session.send(Input::CloseStdin(true)).await;
        let mut file =
            std::fs::File::create(staged).doing(|| format!("cannot write {}", staged.display()))?;
        let mut complaints = Vec::new();
        let code = session
            .copy_output(|output| match output {
                Output::Stdout(data) => std::io::Write::write_all(&mut file, &data)
                    .doing(|| format!("cannot write {}", staged.display())),
                Output::Stderr(data) => {
                    keep(&mut complaints, &data);
                    Ok(())
                }
                _ => Ok(()),
            })
            .await?;
        if code != 0 {
            return Err(Self::without_tar(actor, path, code, &String::from_utf8_lossy(&complaints)));
        }
        move_into_place(staged, target)
    }

    async fn upload(
        &self,
        client: &mut Control,
        local: &Path,
        actor: &str,
        path: &str,
    ) -> Result<(), Failure> {
        let local_base = local
            .canonicalize()
            .ok()
            .and_then(|path| path.file_name().map(|name| name.to_string_lossy().into_owned()))
            .ok_or_else(|| Failure::usage(format!("{} has no name to copy it under", local.display())))?;
        let (is_dir, _, _) =
            collect(client, self.global, actor, self.container, &["test", "-d", path], COMPLAINTS).await?;
        let (dir, base) = if is_dir == 0 || path.ends_with('/') {
            (path.to_owned(), local_base)
        } else {
            split_remote(path)?
        };
        let mut session = Session::open(client, self.start(actor, &["tar", "-C", &dir, "-xf", "-"])).await?;
        let input = session.sender();
        let (from, name) = (local.to_owned(), base.clone());
        let pack = tokio::task::spawn_blocking(move || pack(&from, &name, &input));
        let mut complaints = Vec::new();
        let code = session
            .copy_output(|output| {
                if let Output::Stderr(data) = output {
                    keep(&mut complaints, &data);
                }
                Ok(())
            })
            .await?;
        drop(session);
        let packed = pack.await.doing(|| "packing was interrupted".to_owned())?;
        let complaint = String::from_utf8_lossy(&complaints).trim().to_owned();
        let remote = format!("{}/{base}", dir.trim_end_matches('/'));
        if NOT_STARTED.contains(&code) {
            if local.is_file() {
                return self.upload_by_cat(client, local, actor, &remote).await;
            }
            return Err(Self::without_tar(actor, path, code, &complaint));
        }
        if code != 0 {
            return Err(remote_error("tar", actor, &remote, code, &complaint));
        }
        packed.doing(|| format!("cannot read {}", local.display()))
    }

    async fn upload_by_cat(
        &self,
        client: &mut Control,
        local: &Path,
        actor: &str,
        remote: &str,
    ) -> Result<(), Failure> {
        let command = ["sh", "-c", "cat > \"$0\"", remote];
        let mut session = Session::open(client, self.start(actor, &command)).await?;
        let input = session.sender();
        let from = local.to_owned();
        let send = tokio::task::spawn_blocking(move || {
            let mut file = std::fs::File::open(from)?;
            std::io::copy(&mut file, &mut ExecWriter { input: input.clone() })?;
            close_stdin(&input);
            Ok::<_, std::io::Error>(())
        });
        let mut complaints = Vec::new();
        let code = session
            .copy_output(|output| {
                if let Output::Stderr(data) = output {
                    keep(&mut complaints, &data);
                }
                Ok(())
            })
            .await?;
        drop(session);
        let sent = send.await.doing(|| "reading was interrupted".to_owned())?;
        if code != 0 {
            return Err(Self::without_tar(actor, remote, code, &String::from_utf8_lossy(&complaints)));
        }
        sent.doing(|| format!("cannot read {}", local.display()))
    }

    fn without_tar(actor: &str, path: &str, code: i32, complaint: &str) -> Failure {
        let complaint = complaint.trim();
        let why = if complaint.is_empty() { format!("code {code}") } else { complaint.to_owned() };
        Failure::general(format!(
            "cannot copy {path} of {actor}: its image has no tar, and the plain copy failed: {why}"
        ))
        .with_way_out("without tar only single files can be copied: add tar to the image for directories")
    }
}

fn remote_error(tool: &str, actor: &str, path: &str, code: i32, complaint: &str) -> Failure {
    let exit = if complaint.contains("No such file") { Exit::NotFound } else { Exit::Failed };
    let why = if complaint.is_empty() { format!("it ended with code {code}") } else { complaint.to_owned() };
    Failure::new(exit, format!("{tool} in {actor} cannot copy {path}: {why}"))
}

fn keep(complaints: &mut Vec<u8>, data: &[u8]) {
    let room = COMPLAINTS.saturating_sub(complaints.len());
    complaints.extend_from_slice(&data[..data.len().min(room)]);
}

/// Passes a command's stdout to a channel that may close early; the rest is then dropped.
async fn copy_to(
    session: &mut Session,
    send: mpsc::Sender<Vec<u8>>,
    complaints: &mut Vec<u8>,
    bytes: &mut usize,
) -> Result<i32, Failure> {
    // The unpacker runs on a thread of its own, so waiting for room here is short and bounded by the disk.
    session
        .copy_output(|output| {
            match output {
                Output::Stdout(data) => {
                    *bytes += data.len();
                    let _ = tokio::task::block_in_place(|| send.blocking_send(data));
                }
                Output::Stderr(data) => keep(complaints, &data),
                _ => {}
            }
            Ok(())
        })
        .await
}

fn unpack(reader: impl Read, into: &Path) -> std::io::Result<()> {
    let mut archive = tar::Archive::new(reader);
    archive.set_preserve_permissions(false);
    for entry in archive.entries()? {
        let mut entry = entry?;
        // Refuses names and links that lead out of the directory.
        if !entry.unpack_in(into)? {
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            return Err(std::io::Error::other(format!("{name:?} points out of the copy")));
        }
    }
    Ok(())
}

fn pack(from: &Path, name: &str, input: &mpsc::Sender<ExecInput>) -> std::io::Result<()> {
    let mut builder = tar::Builder::new(ExecWriter { input: input.clone() });
    builder.follow_symlinks(false);
    if from.is_dir() {
        builder.append_dir_all(name, from)?;
    } else {
        builder.append_file(name, &mut std::fs::File::open(from)?)?;
    }
    builder.finish()?;
    close_stdin(input);
    Ok(())
}

fn close_stdin(input: &mpsc::Sender<ExecInput>) {
    // A command that has ended already needs no end of its input.
    let _ = input.blocking_send(ExecInput { input: Some(Input::CloseStdin(true)) });
}

fn move_into_place(staged: &Path, target: &Path) -> Result<(), Failure> {
    if target.is_dir() && staged.is_dir() {
        return Err(Failure::new(Exit::Refused, format!("{} exists", target.display()))
            .with_way_out("remove it first, or name another target"));
    }
    std::fs::rename(staged, target).doing(|| format!("cannot write {}", target.display()))
}

/// Standard input of a remote command, for a blocking writer.
struct ExecWriter {
    input: mpsc::Sender<ExecInput>,
}

impl std::io::Write for ExecWriter {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        let data = &data[..data.len().min(32 << 10)];
        let message = ExecInput { input: Some(Input::Stdin(data.to_vec())) };
        self.input.blocking_send(message).map_err(|_| std::io::ErrorKind::BrokenPipe)?;
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A channel of chunks as a blocking reader.
struct ChunkReader {
    receive: mpsc::Receiver<Vec<u8>>,
    chunk: std::io::Cursor<Vec<u8>>,
}

impl ChunkReader {
    fn new(receive: mpsc::Receiver<Vec<u8>>) -> Self {
        Self { receive, chunk: std::io::Cursor::default() }
    }
}

impl Read for ChunkReader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        loop {
            let count = self.chunk.read(buffer)?;
            if count > 0 || buffer.is_empty() {
                return Ok(count);
            }
            match self.receive.blocking_recv() {
                Some(chunk) => self.chunk = std::io::Cursor::new(chunk),
                None => return Ok(0),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_and_a_colon_mean_an_actor() {
        assert_eq!(side("alice:/etc/x"), Side::Actor { name: "alice".into(), path: "/etc/x".into() });
        assert_eq!(side("./a:b"), Side::Local("./a:b".into()));
        assert_eq!(side("/tmp/a"), Side::Local("/tmp/a".into()));
        assert_eq!(split_remote("/a/b/").unwrap(), ("/a".into(), "b".into()));
        assert_eq!(split_remote("/a").unwrap(), ("/".into(), "a".into()));
        assert_eq!(split_remote("a").unwrap(), (".".into(), "a".into()));
        assert!(split_remote("/").is_err());
        assert!(split_remote("/a/..").is_err());
    }

    #[test]
    fn an_archive_that_leaves_its_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("in");
        std::fs::create_dir(&inner).unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_size(1);
        header.set_mode(0o644);
        header.as_old_mut().name[..10].copy_from_slice(b"../escaped");
        header.set_cksum();
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend([b'x']);
        bytes.resize(2048, 0);
        assert!(unpack(&bytes[..], &inner).is_err());
        assert!(!dir.path().join("escaped").exists());
    }
}

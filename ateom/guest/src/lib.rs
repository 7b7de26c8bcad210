// SPDX-License-Identifier: Apache-2.0
//! What an ateom and the agent inside its microVM say to each other.
//!
//! One byte stream (virtio-serial under QEMU, vsock elsewhere) carries frames in both directions:
//!
//! ```text
//! kind u8 │ channel u32 LE │ length u32 LE │ payload
//!    0 control   JSON, ToGuest or FromGuest         2, 3 output, errors of exec CHANNEL
//!    1 input of exec CHANNEL                         4 output of container number CHANNEL
//! ```
//! **Life.** The guest says [`FromGuest::Hello`] once; the host answers with [`ToGuest::Boot`]. Around a snapshot the
//! host says [`ToGuest::Quiesce`]: the guest stops the workload, ends what it is writing, says [`FromGuest::Quiet`] and
//! writes nothing until [`ToGuest::Resume`]. So the stream is between two frames in every snapshot, and no process of
//! the workload runs after a restore before clock, entropy and identity are new.
//!
//! **Windows.** Of the input and of each output of an exec at most [`WINDOW`] bytes are under way; the receiver says
//! what it has passed on ([`ToGuest::Taken`], [`FromGuest::Taken`]). So one slow reader holds up nobody else.
//!
//! **Versions.** A host refuses an agent of another [`VERSION`]. The agent is part of a snapshot, so it may be older than
//! the host: what a restored one is told (resume, quiesce, exec and what belongs to it) and what it answers keeps its
//! form and its meaning within a version; fields may be added where an agent that does not know them does no harm. What
//! only [`ToGuest::Boot`] carries may change freely: an agent that boots comes from the host's own initramfs.
#![deny(unsafe_code)]

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// Version of this protocol.
pub const VERSION: u32 = 1;
/// Name of the virtio-serial port.
pub const PORT: &str = "substrate.agent";
/// Longest payload, bytes.
pub const MAX_PAYLOAD: usize = 8 << 20;
/// Bytes of a stream that may be under way.
pub const WINDOW: usize = 256 << 10;
/// Bytes of one data frame.
pub const CHUNK: usize = 32 << 10;
/// Bytes of a frame's header.
pub const HEADER: usize = 9;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A message.
    Control = 0,
    /// Input of an exec.
    Stdin = 1,
    /// Output of an exec.
    Stdout = 2,
    /// Errors of an exec.
    Stderr = 3,
    /// Output of a container.
    Log = 4,
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it carries.
    pub kind: Kind,
    /// Id of the exec, or number of the container.
    pub channel: u32,
    /// The payload.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A message's frame.
    ///
    /// # Errors
    /// When it does not fit.
    pub fn control(message: &impl Serialize) -> io::Result<Self> {
        let payload = serde_json::to_vec(message)?;
        if payload.len() > MAX_PAYLOAD {
            return Err(io::Error::other(format!(
                "a message of {} bytes is too long, at most {MAX_PAYLOAD} fit",
                payload.len()
            )));
        }
        Ok(Self { kind: Kind::Control, channel: 0, payload })
    }

    /// The header.
    pub fn header(&self) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[0] = self.kind as u8;
        header[1..5].copy_from_slice(&self.channel.to_le_bytes());
        header[5..9].copy_from_slice(&(self.payload.len() as u32).to_le_bytes());
        header
    }

    /// What a header says: kind, channel and length of the payload.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] for what no frame begins with.
    pub fn parse(header: [u8; HEADER]) -> io::Result<(Kind, u32, usize)> {
        let kind = match header[0] {
            0 => Kind::Control,
            1 => Kind::Stdin,
            2 => Kind::Stdout,
            3 => Kind::Stderr,
            4 => Kind::Log,
            other => {
                return Err(io::Error::new(io::ErrorKind::InvalidData, format!("no frame has kind {other}")));
            }
        };
        let number =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let length = number(5) as usize;
        if length > MAX_PAYLOAD {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a frame of {length} bytes is too long"),
            ));
        }
        Ok((kind, number(1), length))
    }

    /// Reads one, waiting for it.
    ///
    /// # Errors
    /// As the reader; [`io::ErrorKind::InvalidData`].
    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut header = [0; HEADER];
        from.read_exact(&mut header)?;
        let (kind, channel, length) = Self::parse(header)?;
        let mut payload = vec![0; length];
        from.read_exact(&mut payload)?;
        Ok(Self { kind, channel, payload })
    }

    /// Writes it.
    ///
    /// # Errors
    /// As the writer.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(HEADER + self.payload.len());
        bytes.extend_from_slice(&self.header());
        bytes.extend_from_slice(&self.payload);
        to.write_all(&bytes)
    }
}

/// Bytes in JSON.
mod base64_bytes {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&STANDARD.encode(bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        STANDARD.decode(String::deserialize(from)?).map_err(serde::de::Error::custom)
    }
}

/// What is new whenever a guest begins to run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewal {
    /// Unix time, ns.
    pub time_ns: i64,
    /// For the kernel's random number generator; empty: nothing was copied, so nothing needs renewal.
    #[serde(with = "base64_bytes")]
    pub entropy: Vec<u8>,
    /// Everything that is delivered late, complete.
    pub delivered: Vec<Delivery>,
}

/// A directory or file whose content comes from the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delivery {
    /// Names it among deliveries; no '/'.
    pub key: String,
    /// A directory, or one file whose name does not count.
    pub directory: bool,
    /// Mode of the directory.
    pub mode: u32,
    /// What is in it.
    pub files: Vec<DeliveredFile>,
}

/// A file of a delivery.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeliveredFile {
    /// Relative; may hold '/'.
    pub name: String,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Content.
    #[serde(with = "base64_bytes")]
    pub content: Vec<u8>,
}

/// What a guest is made into.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    /// Clock, entropy, deliveries.
    pub renewal: Renewal,
    /// What gethostname(2) says.
    pub hostname: String,
    /// Most processes of the workload; 0: as many as fit.
    pub pids: u32,
    /// Address, prefix and gateway.
    pub networks: Vec<Network>,
    /// Serial numbers of the disks with read-only EROFS roots.
    pub images: Vec<String>,
    /// Disks with ext4 file systems of volumes.
    pub volumes: Vec<VolumeDisk>,
    /// Files of `/etc` by name.
    pub etc: Vec<(String, String)>,
    /// The containers, the main one first.
    pub containers: Vec<Container>,
}

/// An address of the guest's `eth0`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// The guest's.
    pub address: std::net::IpAddr,
    /// Bits.
    pub prefix: u8,
    /// Its default route.
    pub gateway: std::net::IpAddr,
}

/// A volume's disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeDisk {
    /// Serial number of the disk.
    pub serial: String,
    /// It was made just now: its root becomes writable by everybody.
    pub fresh: bool,
}

/// One container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// Unique in the guest.
    pub name: String,
    /// Index of its root in [`Boot::images`].
    pub image: usize,
    /// How its main process runs.
    pub process: Process,
    /// No process may write to the root.
    pub read_only_root: bool,
    /// Index in [`Boot::volumes`] of the disk with its writable layer; none: the layer is in memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer: Option<usize>,
    /// What is mounted besides the defaults.
    pub mounts: Vec<Mount>,
}

/// A process to run in a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Complete.
    pub args: Vec<String>,
    /// Complete, "K=V".
    pub env: Vec<String>,
    /// Made if it does not exist.
    pub cwd: String,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Further groups.
    pub groups: Vec<u32>,
    /// With or without CAP_.
    pub capabilities: Vec<String>,
    /// execve(2) gives no privileges.
    pub no_new_privileges: bool,
    /// Judges its system calls: classic BPF, `struct sock_filter`s as they are in memory (seccomp(2)); empty: nothing
    /// does. An agent that does not know it runs a process unfiltered, in a container that is so too.
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "base64_bytes")]
    pub seccomp: Vec<u8>,
}

/// A mount of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Absolute, inside the container.
    pub destination: String,
    /// No process may write to it.
    pub read_only: bool,
    /// What is there.
    pub source: Source,
}

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// [`Delivery::key`].
    Delivery(String),
    /// Index in [`Boot::volumes`].
    Volume(usize),
    /// An empty file system in memory.
    Memory,
    /// A directory of an image.
    Image {
        /// Index in [`Boot::images`].
        image: usize,
        /// Relative, without links on the way; empty: the image's root.
        path: String,
    },
}

/// From host to guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToGuest {
    /// Answered by `Booted` or `Failed`.
    Boot(Box<Boot>),
    /// Answered by `Quiet` or `Failed`.
    Quiesce,
    /// After a snapshot or a restore; answered by `Resumed` or `Failed`.
    Resume(Renewal),
    /// Answered by `Started` or `NotStarted`, later `Exited`.
    Exec {
        /// Chosen by the host, never used twice.
        id: u32,
        /// Number of the container.
        container: usize,
        /// What to run.
        process: Process,
        /// Its terminal's rows and columns.
        terminal: Option<(u16, u16)>,
    },
    /// End of an exec's input.
    CloseStdin {
        /// Of which exec.
        id: u32,
    },
    /// A new size of an exec's terminal.
    Resize {
        /// Of which exec.
        id: u32,
        /// Lines.
        rows: u16,
        /// Characters of a line.
        columns: u16,
    },
    /// A signal for an exec's process.
    Signal {
        /// Of which exec.
        id: u32,
        /// Its number.
        signal: i32,
    },
    /// Output of an exec that was passed on.
    Taken {
        /// Of which exec.
        id: u32,
        /// Of its second stream.
        errors: bool,
        /// How much.
        bytes: u32,
    },
}

/// From guest to host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromGuest {
    /// The agent runs.
    Hello {
        /// [`VERSION`].
        version: u32,
    },
    /// The containers' processes run.
    Booted,
    /// The workload stands still and nothing more is written.
    Quiet,
    /// Clock, entropy and deliveries are new, the workload runs.
    Resumed,
    /// What was asked could not be done.
    Failed {
        /// Why.
        message: String,
    },
    /// A container's main process has ended.
    Ended {
        /// Number of the container.
        container: usize,
        /// Exit code, or 128 + signal.
        code: i32,
        /// 0: it exited by itself.
        signal: i32,
        /// Unix time, ms.
        time_ms: i64,
    },
    /// An exec's process runs.
    Started {
        /// Which.
        id: u32,
    },
    /// An exec could not be started.
    NotStarted {
        /// Which.
        id: u32,
        /// As a shell says it: 127 not found, 126 not executable, 0: another reason.
        code: i32,
        /// Why.
        message: String,
    },
    /// An exec's process has ended, and all its output was sent.
    Exited {
        /// Which.
        id: u32,
        /// Exit code, or 128 + signal.
        code: i32,
        /// 0: it exited by itself.
        signal: i32,
    },
    /// Input of an exec that was passed on.
    Taken {
        /// Of which exec.
        id: u32,
        /// How much.
        bytes: u32,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_as_they_were() {
        let frame = Frame { kind: Kind::Log, channel: 7, payload: b"line\n".to_vec() };
        let message = FromGuest::Hello { version: VERSION };
        let mut bytes = Vec::new();
        frame.write(&mut bytes).unwrap();
        Frame::control(&message).unwrap().write(&mut bytes).unwrap();
        let mut reader = bytes.as_slice();
        assert_eq!(Frame::read(&mut reader).unwrap(), frame);
        let control = Frame::read(&mut reader).unwrap();
        assert_eq!(serde_json::from_slice::<FromGuest>(&control.payload).unwrap(), message);
        assert!(reader.is_empty());
    }

    #[test]
    fn what_is_no_frame_is_refused_before_memory_is_taken() {
        let mut header = Frame { kind: Kind::Control, channel: 0, payload: Vec::new() }.header();
        header[5..9].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(Frame::parse(header).is_err());
        header[0] = 9;
        assert!(Frame::parse(header).is_err());
    }

    /// Written down when version 1 was all there was. Whoever has to change this raises [`VERSION`].
    #[test]
    fn agents_of_version_1_are_spoken_to_as_they_were() {
        assert_eq!(VERSION, 1);
        let process = Process { args: vec!["/bin/true".into()], cwd: "/".into(), ..Process::default() };
        let plain = r#"{"args":["/bin/true"],"env":[],"cwd":"/","uid":0,"gid":0,"groups":[],"capabilities":[],"no_new_privileges":false}"#;
        let told = [
            (ToGuest::Quiesce, r#""Quiesce""#.to_owned()),
            (
                ToGuest::Resume(Renewal { time_ns: 5, entropy: vec![1], delivered: Vec::new() }),
                r#"{"Resume":{"time_ns":5,"entropy":"AQ==","delivered":[]}}"#.to_owned(),
            ),
            (
                ToGuest::Exec { id: 1, container: 0, process, terminal: None },
                format!(r#"{{"Exec":{{"id":1,"container":0,"process":{plain},"terminal":null}}}}"#),
            ),
            (ToGuest::CloseStdin { id: 1 }, r#"{"CloseStdin":{"id":1}}"#.to_owned()),
            (
                ToGuest::Resize { id: 1, rows: 2, columns: 3 },
                r#"{"Resize":{"id":1,"rows":2,"columns":3}}"#.to_owned(),
            ),
            (ToGuest::Signal { id: 1, signal: 9 }, r#"{"Signal":{"id":1,"signal":9}}"#.to_owned()),
            (
                ToGuest::Taken { id: 1, errors: true, bytes: 2 },
                r#"{"Taken":{"id":1,"errors":true,"bytes":2}}"#.to_owned(),
            ),
        ];
        for (message, text) in told {
            assert_eq!(serde_json::to_string(&message).unwrap(), text);
        }
        for answer in [
            r#""Quiet""#,
            r#""Resumed""#,
            r#"{"Failed":{"message":"m"}}"#,
            r#"{"Ended":{"container":0,"code":1,"signal":0,"time_ms":3}}"#,
            r#"{"Started":{"id":1}}"#,
            r#"{"NotStarted":{"id":1,"code":127,"message":"m"}}"#,
            r#"{"Exited":{"id":1,"code":0,"signal":9}}"#,
            r#"{"Taken":{"id":1,"bytes":2}}"#,
        ] {
            serde_json::from_str::<FromGuest>(answer).unwrap();
        }
    }

    #[test]
    fn content_is_any_bytes() {
        let renewal = Renewal {
            time_ns: 5,
            entropy: vec![0, 255, 1],
            delivered: vec![Delivery {
                key: "0".into(),
                directory: true,
                mode: 0o755,
                files: vec![DeliveredFile {
                    name: "n".into(),
                    mode: 0o444,
                    uid: 0,
                    gid: 0,
                    content: vec![0, 159],
                }],
            }],
        };
        let text = serde_json::to_string(&ToGuest::Resume(renewal.clone())).unwrap();
        assert_eq!(serde_json::from_str::<ToGuest>(&text).unwrap(), ToGuest::Resume(renewal));
    }
}

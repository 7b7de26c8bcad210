// SPDX-License-Identifier: Apache-2.0
//! Arguments of what is about a whole machine: starting it, looking after its state, showing it.
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args as ClapArgs, ValueEnum};

use super::{DEFAULT_DIR, key_value};

/// `substrate up`. Every option overrides the key of the same name in the `--config` file; see docs/config.md.
#[derive(Debug, Clone, Default, ClapArgs)]
pub struct Up {
    /// Worker slots: how many actors can run at once [default: twice the cores, at least 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1024))]
    pub workers: Option<u32>,
    /// Worker slots for templates of the class microvm [default: 0]; docs/microvm.md
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1024))]
    pub microvm_workers: Option<u32>,
    /// The QEMU of microVMs [default: from PATH]
    #[arg(long, value_name = "PATH")]
    pub qemu: Option<PathBuf>,
    /// Directory of the kernel of microVMs: vmlinuz, modules/ [default: $SUBSTRATE_KERNEL, target/tools/microvm of
    /// the workspace, /usr/lib/substrate/microvm]
    #[arg(long, value_name = "DIR")]
    pub kernel: Option<PathBuf>,
    /// What runs the processors of microVMs: auto (kvm where a guest boots under it), kvm, tcg [default: auto]
    #[arg(long, value_name = "NAME", value_parser = super::accelerator)]
    pub accelerator: Option<atelet::Accelerator>,
    /// Where everything is kept [default: /var/lib/substrate]
    #[arg(long, value_name = "DIR", env = "SUBSTRATE_DIR")]
    pub dir: Option<PathBuf>,
    /// Where sockets are [default: /run/substrate for the default directory, else DIR/run]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Address of the HTTP ingress [default: 127.0.0.1:8480]; port 0 takes a free one
    #[arg(long, value_name = "IP:PORT")]
    pub listen: Option<SocketAddr>,
    /// Address where the control plane listens for clients of other machines, TLS [default: none]; docs/access.md
    #[arg(long, value_name = "IP:PORT")]
    pub api_listen: Option<SocketAddr>,
    /// Configuration file (TOML)
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The runsc binary [default: $SUBSTRATE_RUNSC, DIR/node/runtimes/*/runsc, beside this program,
    /// target/tools/runsc of its workspace, PATH]
    #[arg(long, value_name = "PATH")]
    pub runsc: Option<PathBuf>,
    /// The ateom-gvisor binary [default: beside this program, then PATH]
    #[arg(long, value_name = "PATH")]
    pub ateom: Option<PathBuf>,
    /// DNS server for the names that actors may reach [default: the system's]
    #[arg(long, value_name = "IP:PORT")]
    pub egress_resolver: Option<SocketAddr>,
    /// Leave workers and their actors running on exit, for the next start to adopt
    #[arg(long)]
    pub leave_workers: bool,
    /// What to log: a level or a tracing filter, for example info,atenet=debug [default: info]
    #[arg(long, value_name = "FILTER")]
    pub log: Option<String>,
    /// Log to stderr too
    #[arg(short, long)]
    pub verbose: bool,
    /// Socket of the compute driver [default: RUN/driver/driver.sock]
    #[arg(long, value_name = "PATH")]
    pub driver_socket: Option<PathBuf>,
    /// User id that may use the driver's socket, besides root and this process's own
    #[arg(long, value_name = "UID")]
    pub driver_peer_uid: Option<u32>,
    /// Group id that may use the driver's socket
    #[arg(long, value_name = "GID")]
    pub driver_peer_gid: Option<u32>,
    /// Print the ready line as one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Where a machine's state is, for commands that read it themselves.
#[derive(Debug, Clone, ClapArgs)]
pub struct Place {
    /// Where everything is kept [default: /var/lib/substrate]
    #[arg(long, value_name = "DIR", env = "SUBSTRATE_DIR")]
    pub dir: Option<PathBuf>,
    /// Configuration file (TOML) that `up` was started with
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// `substrate gc`. Safe while substrate runs.
#[derive(Debug, ClapArgs)]
pub struct Gc {
    /// Where
    #[command(flatten)]
    pub place: Place,
    /// Only say what would be deleted
    #[arg(long)]
    pub dry_run: bool,
}

/// `substrate rotate-key`. Safe while substrate runs.
#[derive(Debug, ClapArgs)]
pub struct RotateKey {
    /// Where
    #[command(flatten)]
    pub place: Place,
}

/// `substrate fsck`. Reads only; safe while substrate runs.
///
/// Ends with 0 when everything is sound, 1 when something is missing or damaged, 5 when the store does not answer.
#[derive(Debug, ClapArgs)]
pub struct Fsck {
    /// Where
    #[command(flatten)]
    pub place: Place,
    /// Only manifests, sizes and references: read no blocks
    #[arg(long)]
    pub quick: bool,
}

/// `substrate doctor`.
#[derive(Debug, ClapArgs)]
pub struct Doctor {
    /// Directory that `up` will use
    #[arg(long, value_name = "DIR", env = "SUBSTRATE_DIR", default_value = DEFAULT_DIR)]
    pub dir: PathBuf,
    /// The runsc binary to look at
    #[arg(long, value_name = "PATH")]
    pub runsc: Option<PathBuf>,
    /// The ateom-gvisor binary to look at
    #[arg(long, value_name = "PATH")]
    pub ateom: Option<PathBuf>,
}

/// `substrate backup`.
#[derive(Debug, ClapArgs)]
pub struct Backup {
    /// Where
    #[command(flatten)]
    pub place: Place,
    /// Where to: a directory, absent or empty, or a file that ends in .tar
    #[arg(long, value_name = "PATH")]
    pub to: PathBuf,
    /// Leave the key files out; without a copy of them the backup cannot be opened by anyone
    #[arg(long)]
    pub without_keys: bool,
}

/// `substrate restore`.
#[derive(Debug, ClapArgs)]
pub struct Restore {
    /// A backup: a directory or a tar file
    #[arg(long, value_name = "PATH")]
    pub from: PathBuf,
    /// Directory for `substrate up`, absent or empty
    #[arg(long, value_name = "DIR", env = "SUBSTRATE_DIR", default_value = DEFAULT_DIR)]
    pub dir: PathBuf,
    /// Directory of the key files, for a backup without keys
    #[arg(long, value_name = "DIR")]
    pub keys: Option<PathBuf>,
}

/// `substrate demo`.
#[derive(Debug, ClapArgs)]
pub struct Demo {
    /// Which demo
    #[arg(value_enum)]
    pub name: DemoName,
    /// One JSON object a line and beat
    #[arg(long)]
    pub json: bool,
    /// Leave everything running and on disk afterwards
    #[arg(long)]
    pub keep: bool,
    /// Sandbox class
    #[arg(long, value_name = "CLASS", default_value = "gvisor")]
    pub class: String,
    /// Create, stop, start, delete and exec with a stock OpenShell gateway: DIR holds openshell-gateway, openshell and
    /// openshell-sandbox
    #[arg(long, value_name = "DIR")]
    pub gateway: Option<PathBuf>,
    /// Image of the agent [default: target/images/helpdesk of the workspace]
    #[arg(long, value_name = "REF")]
    pub image: Option<String>,
    /// Directory of the demo's scripts [default: examples/helpdesk of the workspace]
    #[arg(long, value_name = "DIR")]
    pub examples: Option<PathBuf>,
    /// The runsc binary, as for `up`
    #[arg(long, value_name = "PATH")]
    pub runsc: Option<PathBuf>,
    /// The ateom-gvisor binary, as for `up`
    #[arg(long, value_name = "PATH")]
    pub ateom: Option<PathBuf>,
}

/// Demos there are.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum DemoName {
    /// A help desk agent that sleeps, wakes, moves and survives kills with its memory
    Helpdesk,
}

/// `substrate demo-internet`: a DNS server for the demo's names and TCP listeners that greet.
#[derive(Debug, Clone, ClapArgs)]
pub struct DemoInternet {
    /// Where DNS is served, UDP and TCP (repeatable)
    #[arg(long = "dns", value_name = "IP:PORT")]
    pub dns: Vec<SocketAddr>,
    /// A name and its address (repeatable)
    #[arg(long = "name", value_name = "NAME=IP", value_parser = key_value)]
    pub names: Vec<(String, String)>,
    /// TCP listener that greets and closes (repeatable)
    #[arg(long = "tcp", value_name = "IP:PORT")]
    pub tcp: Vec<SocketAddr>,
}

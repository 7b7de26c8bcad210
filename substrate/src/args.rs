// SPDX-License-Identifier: Apache-2.0
//! What a person can type. Help texts here are the reference; docs/cli.md is the tour.
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};

mod machine;

pub use machine::{Backup, Demo, DemoInternet, Doctor, Fsck, Gc, Place, Restore, RotateKey, Up};

/// Default of `--atespace`.
pub const DEFAULT_ATESPACE: &str = "default";
/// Default of `--dir`.
pub const DEFAULT_DIR: &str = "/var/lib/substrate";
/// Where sockets are for the default directory.
pub const DEFAULT_RUN_DIR: &str = "/run/substrate";

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed
  2  wrong usage: an argument, a document or a field of it
  3  not found
  4  refused by the state it is in
  5  unavailable: substrate does not run, the pool is full, or a deadline passed
  exec ends with the code of the command it ran.";

/// Runs and manages suspendable actors on this machine.
#[derive(Debug, Parser)]
#[command(name = "substrate", version, after_help = EXIT_CODES, propagate_version = true, max_term_width = 110)]
#[command(disable_help_subcommand = true, subcommand_required = true, arg_required_else_help = true)]
pub struct Args {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, ClapArgs)]
pub struct Global {
    /// Atespace to work in
    #[arg(short, long, global = true, env = "SUBSTRATE_ATESPACE", value_name = "NAME", default_value = DEFAULT_ATESPACE)]
    pub atespace: String,
    /// Socket of the control plane, or the directory that holds `ateapi.sock`
    #[arg(
        long,
        global = true,
        env = "SUBSTRATE_SOCKET",
        value_name = "PATH",
        default_value = "/run/substrate/ateapi.sock"
    )]
    pub socket: PathBuf,
    /// The control plane of another machine
    #[command(flatten)]
    pub remote: Remote,
    /// How to print results
    #[arg(short, long, global = true, value_enum, default_value_t)]
    pub output: Output,
}

/// How to reach a control plane over TCP; see docs/access.md.
#[derive(Debug, Clone, Default, ClapArgs)]
pub struct Remote {
    /// The control plane of another machine, https://HOST:PORT; instead of --socket
    #[arg(long, global = true, env = "SUBSTRATE_ENDPOINT", value_name = "URL")]
    pub endpoint: Option<String>,
    /// Authorities of its certificate (PEM)
    #[arg(long, global = true, env = "SUBSTRATE_CA", value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Your certificate (PEM)
    #[arg(long, global = true, env = "SUBSTRATE_CERT", value_name = "FILE")]
    pub cert: Option<PathBuf>,
    /// Its private key (PEM)
    #[arg(long, global = true, env = "SUBSTRATE_KEY", value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// File with your bearer token; read at each call
    #[arg(long, global = true, env = "SUBSTRATE_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
}

/// Formats of `--output`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Output {
    /// For people
    #[default]
    Table,
    /// For people with a wide terminal
    Wide,
    /// One JSON document; one object a line where things are watched
    Json,
    /// YAML
    Yaml,
    /// Names only, one a line
    Name,
}

impl Output {
    /// For programs, not people.
    pub fn is_machine(self) -> bool {
        matches!(self, Self::Json | Self::Yaml)
    }
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run everything on this machine: driver, control plane, node agent, network, workers
    Up(Box<Up>),
    /// Say what this machine lacks, and the command that installs it
    Doctor(Doctor),
    /// List actors, workers, templates, snapshots, atespaces or events
    Get(Get),
    /// Show everything known about one actor, worker or template
    Describe(Describe),
    /// Create an actor, a template or an atespace
    #[command(subcommand)]
    Create(Create),
    /// Create or update what a YAML or JSON file describes
    Apply(Apply),
    /// Delete actors, templates or atespaces
    Delete(Delete),
    /// Snapshot actors into the durable store and release their workers
    Suspend(Suspend),
    /// Snapshot actors on the node and release their workers
    Pause(Suspend),
    /// Bring actors up from their latest snapshot
    Resume(Verb),
    /// Snapshot actors while they keep running
    Checkpoint(Checkpoint),
    /// Make the node snapshot of paused actors durable
    Promote(Verb),
    /// Boot actors afresh from their image; volumes are kept, memory is not
    Reset(Verb),
    /// Make an earlier snapshot of an actor its latest
    Revert(Revert),
    /// Make a new actor from a snapshot of another
    Fork(Fork),
    /// Name a snapshot, so that it is kept
    Tag(Tag),
    /// Take a snapshot's name away
    Untag(Untag),
    /// Keep new actors off workers
    Cordon(Workers),
    /// Allow actors on workers again
    Uncordon(Workers),
    /// Keep new actors off workers and suspend those that run there
    Drain(Workers),
    /// Show what an atespace may use and uses, or change its limits
    Quota(Quota),
    /// Declare that a node will not come back: snapshots that only it had are lost
    NodeLost(NodeLost),
    /// Run a command in an actor; a sleeping actor is woken
    Exec(Exec),
    /// Copy files between an actor and this machine
    Cp(Cp),
    /// Print what an actor's containers wrote
    Logs(Logs),
    /// Print what happened
    Events(Events),
    /// Print a bearer token for HTTP requests to actors
    Token(Token),
    /// Send an HTTP request to an actor; a sleeping actor is woken
    Request(Request),
    /// Copy a machine's database, keys and durable snapshots to another place; also while it runs
    Backup(Backup),
    /// Make a machine's directory from a backup
    Restore(Restore),
    /// Delete what the blob store and this machine hold without anything naming it
    Gc(Gc),
    /// Verify everything that is stored: every manifest, every block, every copy on this machine
    Fsck(Fsck),
    /// Make a new key for an atespace: later snapshots use it, earlier ones stay readable
    RotateKey(RotateKey),
    /// Run a demonstration on this machine, every step asserted
    Demo(Demo),
    /// The part of the demo's internet that is not Python
    #[command(hide = true)]
    DemoInternet(DemoInternet),
    /// Print the versions of this program and of the running one
    Version,
    /// Print a completion script for your shell
    ///
    /// For example: substrate completion bash > /etc/bash_completion.d/substrate
    Completion {
        /// Which shell
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
}

/// What `get` lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Actors
    #[value(alias = "actor")]
    Actors,
    /// Workers
    #[value(alias = "worker")]
    Workers,
    /// Actor templates
    #[value(alias = "template")]
    Templates,
    /// Committed snapshots
    #[value(alias = "snapshot")]
    Snapshots,
    /// Atespaces
    #[value(alias = "atespace")]
    Atespaces,
    /// Events
    #[value(alias = "event")]
    Events,
}

/// `substrate get`.
#[derive(Debug, ClapArgs)]
pub struct Get {
    /// What to list
    #[arg(value_enum)]
    pub kind: Kind,
    /// Only these; for snapshots and events: of these actors
    #[arg(value_name = "NAME")]
    pub names: Vec<String>,
    /// Keep printing what changes
    #[arg(short, long)]
    pub watch: bool,
    /// All atespaces
    #[arg(short = 'A', long)]
    pub all_atespaces: bool,
    /// Actors with this label (repeatable; all must match)
    #[arg(short = 'l', long = "label", value_name = "KEY=VALUE", value_parser = key_value)]
    pub labels: Vec<(String, String)>,
    /// Actors in this state (repeatable), for example SUSPENDED
    #[arg(long = "state", value_name = "STATE")]
    pub states: Vec<String>,
    /// Actors of this template
    #[arg(long, value_name = "NAME")]
    pub template: Option<String>,
}

/// What `describe` shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DescribeKind {
    /// An actor
    #[value(alias = "actors")]
    Actor,
    /// A worker
    #[value(alias = "workers")]
    Worker,
    /// An actor template
    #[value(alias = "templates")]
    Template,
}

/// `substrate describe`.
#[derive(Debug, ClapArgs)]
pub struct Describe {
    /// Kind
    #[arg(value_enum)]
    pub kind: DescribeKind,
    /// Name
    pub name: String,
}

/// `substrate create`.
#[derive(Debug, Subcommand)]
pub enum Create {
    /// Create an actor from a template or straight from an image, and boot it
    Actor(Box<CreateActor>),
    /// Create an actor template
    Template(Box<CreateTemplate>),
    /// Create an atespace
    Atespace {
        /// Name (DNS-1123 label)
        name: String,
        /// Label (repeatable)
        #[arg(short = 'l', long = "label", value_name = "KEY=VALUE", value_parser = key_value)]
        labels: Vec<(String, String)>,
    },
}

/// `substrate create actor`.
#[derive(Debug, ClapArgs)]
pub struct CreateActor {
    /// Name (DNS-1123 label)
    pub name: String,
    /// Template to make it from
    #[arg(short, long, value_name = "NAME", conflicts_with_all = ["image", "command"], required_unless_present = "image")]
    pub template: Option<String>,
    /// Image to run: registry/repo@sha256:…, registry/repo:tag, oci:/dir[:tag] or oci-archive:/file.tar
    #[command(flatten)]
    pub container: ContainerArgs,
    /// Environment variable (repeatable)
    #[arg(short, long = "env", value_name = "KEY=VALUE", value_parser = key_value)]
    pub env: Vec<(String, String)>,
    /// File delivered read-only into the actor, mode 0400 (repeatable)
    #[arg(long = "file", value_name = "PATH=SOURCE", value_parser = key_value)]
    pub files: Vec<(String, String)>,
    /// Label (repeatable)
    #[arg(short = 'l', long = "label", value_name = "KEY=VALUE", value_parser = key_value)]
    pub labels: Vec<(String, String)>,
    /// Only record it
    #[arg(long, conflicts_with = "wait")]
    pub no_start: bool,
    /// Return when it is ready
    #[arg(short, long)]
    pub wait: bool,
    /// Only an explicit resume wakes it, not a request
    #[arg(long)]
    pub no_wake_on_traffic: bool,
}

/// One container, as `create` can describe it; `apply` can do everything.
#[derive(Debug, Clone, Default, ClapArgs)]
pub struct ContainerArgs {
    /// Image to run: registry/repo@sha256:…, registry/repo:tag, oci:/dir[:tag] or oci-archive:/file.tar
    #[arg(long, value_name = "REF")]
    pub image: Option<String>,
    /// TCP port it listens on (repeatable; the first is where requests go)
    #[arg(short, long = "port", value_name = "PORT", value_parser = clap::value_parser!(u32).range(1..=65535), requires = "image")]
    pub ports: Vec<u32>,
    /// Sandbox class
    #[arg(long, value_name = "CLASS", requires = "image")]
    pub class: Option<String>,
    /// Memory limit, for example 512MiB
    #[arg(long, value_name = "SIZE", requires = "image")]
    pub memory: Option<String>,
    /// CPU limit in cores, for example 500m or 2
    #[arg(long, value_name = "CORES", requires = "image")]
    pub cpu: Option<String>,
    /// Name it may reach (TLS on 443), NAME:PORT for another port (repeatable); nothing else is reachable
    #[arg(long = "allow", value_name = "NAME[:PORT]", requires = "image")]
    pub allow: Vec<String>,
    /// HTTP path that answers when it is ready (on the first port)
    #[arg(long, value_name = "PATH", requires = "ports")]
    pub ready_path: Option<String>,
    /// Suspend it after this much idle time, or "never"
    #[arg(long, value_name = "DURATION", requires = "image")]
    pub suspend_after: Option<String>,
    /// Command to run instead of the image's
    #[arg(last = true, value_name = "COMMAND", requires = "image")]
    pub command: Vec<String>,
}

/// `substrate create template`.
#[derive(Debug, ClapArgs)]
pub struct CreateTemplate {
    /// Name (DNS-1123 label)
    pub name: String,
    /// Its container
    #[command(flatten)]
    pub container: ContainerArgs,
    /// Environment variable (repeatable)
    #[arg(short, long = "env", value_name = "KEY=VALUE", value_parser = key_value)]
    pub env: Vec<(String, String)>,
    /// Label (repeatable)
    #[arg(short = 'l', long = "label", value_name = "KEY=VALUE", value_parser = key_value)]
    pub labels: Vec<(String, String)>,
}

/// `substrate apply`.
#[derive(Debug, ClapArgs)]
pub struct Apply {
    /// File with one or more documents, or - for standard input (repeatable)
    #[arg(short, long = "filename", value_name = "FILE", required = true)]
    pub files: Vec<PathBuf>,
    /// Validate only
    #[arg(long)]
    pub dry_run: bool,
    /// Return when its actors are ready
    #[arg(short, long)]
    pub wait: bool,
}

/// `substrate delete`.
#[derive(Debug, ClapArgs)]
#[command(override_usage = "substrate delete [actor|template|atespace] <NAME>...")]
pub struct Delete {
    /// Names, after an optional kind (default: actor)
    #[arg(required = true, value_name = "NAME")]
    pub words: Vec<String>,
    /// Succeed when there is none
    #[arg(long)]
    pub ignore_not_found: bool,
}

/// A verb on actors without further options.
#[derive(Debug, ClapArgs)]
pub struct Verb {
    /// Names of actors, after an optional word "actor"
    #[arg(required = true, value_name = "NAME")]
    pub words: Vec<String>,
}

/// `substrate suspend` and `pause`.
#[derive(Debug, ClapArgs)]
pub struct Suspend {
    /// Names of actors, after an optional word "actor"
    #[arg(required = true, value_name = "NAME")]
    pub words: Vec<String>,
    /// How long requests in flight may end before they are cut [default: 2s]
    #[arg(long, value_name = "DURATION", value_parser = crate::quantity::duration)]
    pub drain: Option<Duration>,
    /// Refuse when it is in use
    #[arg(long)]
    pub only_if_idle: bool,
}

/// `substrate checkpoint`.
#[derive(Debug, ClapArgs)]
pub struct Checkpoint {
    /// Names of actors, after an optional word "actor"
    #[arg(required = true, value_name = "NAME")]
    pub words: Vec<String>,
    /// Where it must be before the command returns [default: what the template says]
    #[arg(long, value_enum)]
    pub durability: Option<Durability>,
}

/// How safe a checkpoint is.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Durability {
    /// On the node's disk
    Node,
    /// In the durable store
    Durable,
}

/// `substrate revert`.
#[derive(Debug, ClapArgs)]
pub struct Revert {
    /// Name of the actor, after an optional word "actor"
    #[arg(required = true, value_name = "NAME")]
    pub words: Vec<String>,
    /// Snapshot: its id or a tag; see `substrate get snapshots NAME`
    #[arg(long, value_name = "SNAPSHOT")]
    pub to: String,
}

/// `substrate fork`.
#[derive(Debug, ClapArgs)]
pub struct Fork {
    /// Actor to copy
    pub name: String,
    /// Name of the new actor
    pub new_name: String,
    /// Snapshot: its id or a tag [default: the latest]
    #[arg(long, value_name = "SNAPSHOT")]
    pub from: Option<String>,
}

/// `substrate tag`.
// The field is what the option is called.
#[allow(clippy::struct_field_names)]
#[derive(Debug, ClapArgs)]
pub struct Tag {
    /// Actor
    pub name: String,
    /// Tag to give
    pub tag: String,
    /// Snapshot id [default: the latest]
    #[arg(long, value_name = "SNAPSHOT")]
    pub snapshot: Option<String>,
}

/// `substrate untag`.
#[derive(Debug, ClapArgs)]
pub struct Untag {
    /// Actor
    pub name: String,
    /// Tag to take away
    pub tag: String,
}

/// Verbs on workers.
#[derive(Debug, ClapArgs)]
pub struct Workers {
    /// Ids of workers, after an optional word "worker"
    #[arg(required = true, value_name = "ID")]
    pub words: Vec<String>,
}

/// `substrate quota`. What is not given stays; 0 is no limit.
#[derive(Debug, ClapArgs)]
pub struct Quota {
    /// Name of the atespace
    pub atespace: String,
    /// Actors, asleep or awake
    #[arg(long, value_name = "N")]
    pub actors: Option<u32>,
    /// Actors that hold a worker
    #[arg(long, value_name = "N")]
    pub running: Option<u32>,
    /// Bytes of all snapshots
    #[arg(long, value_name = "BYTES")]
    pub snapshot_bytes: Option<u64>,
    /// Starts of actors per second
    #[arg(long, value_name = "N")]
    pub wakeups_per_s: Option<u32>,
}

/// `substrate node-lost`.
#[derive(Debug, ClapArgs)]
pub struct NodeLost {
    /// Name of the node
    pub node: String,
    /// Needed, because what only the node had is gone for good
    #[arg(long, required = true)]
    pub yes: bool,
}

/// `substrate exec`.
#[derive(Debug, ClapArgs)]
pub struct Exec {
    /// Pass standard input on
    #[arg(short = 'i', long)]
    pub stdin: bool,
    /// Give the command a terminal
    #[arg(short = 't', long)]
    pub tty: bool,
    /// Container [default: the first]
    #[arg(short, long, value_name = "NAME")]
    pub container: Option<String>,
    /// Environment variable (repeatable)
    #[arg(short, long = "env", value_name = "KEY=VALUE", value_parser = key_value)]
    pub env: Vec<(String, String)>,
    /// Working directory
    #[arg(short = 'w', long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// User, as uid[:gid]
    #[arg(short, long, value_name = "UID[:GID]")]
    pub user: Option<String>,
    /// Fail when the actor sleeps instead of waking it
    #[arg(long)]
    pub no_wake: bool,
    /// Actor
    pub name: String,
    /// Command, after --
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// `substrate cp`.
#[derive(Debug, ClapArgs)]
#[command(override_usage = "substrate cp <NAME:/PATH> <LOCAL>\n       substrate cp <LOCAL> <NAME:/PATH>")]
pub struct Cp {
    /// NAME:/PATH in an actor, or a local path
    pub source: String,
    /// NAME:/PATH in an actor, or a local path
    pub target: String,
    /// Container [default: the first]
    #[arg(short, long, value_name = "NAME")]
    pub container: Option<String>,
}

/// `substrate logs`.
#[derive(Debug, ClapArgs)]
pub struct Logs {
    /// Actor
    pub name: String,
    /// Keep printing
    #[arg(short, long)]
    pub follow: bool,
    /// Only the last lines
    #[arg(long, value_name = "N")]
    pub tail: Option<u32>,
    /// Container [default: the first]
    #[arg(short, long, value_name = "NAME")]
    pub container: Option<String>,
}

/// `substrate events`.
#[derive(Debug, ClapArgs)]
pub struct Events {
    /// Keep printing
    #[arg(short, long)]
    pub follow: bool,
    /// Of this actor
    #[arg(long, value_name = "NAME")]
    pub actor: Option<String>,
    /// With this reason, for example WorkerLost
    #[arg(long, value_name = "REASON")]
    pub reason: Option<String>,
    /// All atespaces
    #[arg(short = 'A', long)]
    pub all_atespaces: bool,
}

/// `substrate token`.
#[derive(Debug, ClapArgs)]
pub struct Token {
    /// Only for this actor [default: all of the atespace]
    #[arg(long, value_name = "NAME")]
    pub actor: Option<String>,
    /// A token of the control plane's TCP listener instead, for the subject token:NAME; see docs/access.md
    #[arg(long, value_name = "NAME", conflicts_with = "actor")]
    pub control: Option<String>,
    /// How long it is good for
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = crate::quantity::duration)]
    pub ttl: Duration,
}

/// `substrate request`.
#[derive(Debug, ClapArgs)]
#[command(override_usage = "substrate request [OPTIONS] <NAME> [METHOD] <PATH>")]
pub struct Request {
    /// Actor
    pub name: String,
    /// Method (default GET, or POST with --data) and path
    #[arg(required = true, num_args = 1..=2, value_names = ["METHOD_OR_PATH", "PATH"])]
    pub words: Vec<String>,
    /// Body; @FILE reads it from a file, @- from standard input
    #[arg(short, long, value_name = "TEXT")]
    pub data: Option<String>,
    /// Header (repeatable)
    #[arg(short = 'H', long = "header", value_name = "NAME: VALUE")]
    pub headers: Vec<String>,
    /// Port of the actor [default: its first]
    #[arg(short, long, value_name = "PORT")]
    pub port: Option<u16>,
    /// Print status and headers too
    #[arg(short, long)]
    pub include: bool,
}

/// Splits `KEY=VALUE`.
fn accelerator(text: &str) -> Result<atelet::Accelerator, String> {
    use atelet::Accelerator::{Auto, Kvm, Tcg};
    let known = [Auto, Kvm, Tcg];
    let found = known.into_iter().find(|accelerator| accelerator.name() == text);
    found.ok_or_else(|| format!("is none of {}", known.map(atelet::Accelerator::name).join(", ")))
}

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is not KEY=VALUE")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    fn parse(line: &str) -> Result<Args, clap::Error> {
        Args::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_definition_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn global_options_work_before_and_after_the_command() {
        for line in ["substrate -a team -o json get actors", "substrate get actors -a team -o json"] {
            let args = parse(line).unwrap();
            assert_eq!(args.global.atespace, "team");
            assert_eq!(args.global.output, Output::Json);
        }
    }

    #[test]
    fn an_actor_comes_from_a_template_or_an_image() {
        assert!(parse("substrate create actor a").is_err());
        assert!(parse("substrate create actor a --template t --image i").is_err());
        assert!(parse("substrate create actor a --template t -- sh").is_err());
        assert!(parse("substrate create actor a --template t --no-start --wait").is_err());
        let args = parse("substrate create actor a --image oci:/i -e A=b=c -p 80 -- sh -c x").unwrap();
        let Command::Create(Create::Actor(actor)) = args.command else { panic!("not create actor") };
        assert_eq!(actor.container.command, ["sh", "-c", "x"]);
        assert_eq!(actor.env, [("A".to_owned(), "b=c".to_owned())]);
        assert_eq!(actor.container.ports, [80]);
    }

    #[test]
    fn exec_needs_the_double_dash_and_keeps_the_commands_own_options() {
        assert!(parse("substrate exec alice ls").is_err());
        let args = parse("substrate exec -it alice -- ls -l --all").unwrap();
        let Command::Exec(exec) = args.command else { panic!("not exec") };
        assert!(exec.stdin && exec.tty);
        assert_eq!(exec.command, ["ls", "-l", "--all"]);
    }

    #[test]
    fn wrong_usage_is_code_2() {
        for line in [
            "substrate up --workers 1025",
            "substrate up --listen nowhere",
            "substrate get nothing",
            "substrate revert alice",
            "substrate create actor a --image i -e NOVALUE",
        ] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn singular_and_plural_kinds_are_the_same() {
        for (word, kind) in [("actor", Kind::Actors), ("actors", Kind::Actors), ("snapshot", Kind::Snapshots)]
        {
            let args = parse(&format!("substrate get {word}")).unwrap();
            let Command::Get(get) = args.command else { panic!("not get") };
            assert_eq!(get.kind, kind);
        }
    }
}

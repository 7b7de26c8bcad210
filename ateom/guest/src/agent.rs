// SPDX-License-Identifier: Apache-2.0
//! The agent: reads what the host asks and does it. The main thread only reads; nothing that can wait for the workload
//! or for the host happens on it, but for boot, quiesce and resume, during which the host asks nothing else.
use std::collections::HashMap;
use std::convert::Infallible;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::Path;
use std::process::Stdio;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ateom_guest::{Boot, Delivery, Frame, FromGuest, Kind, Process, Renewal, ToGuest, VERSION};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use nix::unistd::Pid;

use crate::boot::{self, DELIVERIES, GROUP};
use crate::processes::{self, Born, Credit, NotStarted};
use crate::stage::Plan;
use crate::sys;

/// How long the workload may take to stand still.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);
/// How long output may still come after its process's end.
const LINGER: Duration = Duration::from_millis(200);
/// Between looks for a host that is not connected.
const ABSENT: Duration = Duration::from_millis(5);

fn locked<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The way to the host; silent between [`Link::quiet`] and [`Link::speak`].
#[derive(Debug)]
pub struct Link {
    port: Mutex<(File, bool)>,
    changed: Condvar,
}

impl Link {
    /// Writes a frame, waiting for the host and for the end of a silence.
    pub fn send(&self, frame: &Frame) {
        let mut port = locked(&self.port);
        while port.1 {
            port = self.changed.wait(port).unwrap_or_else(PoisonError::into_inner);
        }
        write(&mut port.0, frame);
    }

    /// Writes a message.
    pub fn tell(&self, message: &FromGuest) {
        if let Ok(frame) = Frame::control(message) {
            self.send(&frame);
        }
    }

    /// Writes the last message before a silence.
    fn quiet(&self) {
        let mut port = locked(&self.port);
        port.1 = true;
        if let Ok(frame) = Frame::control(&FromGuest::Quiet) {
            write(&mut port.0, &frame);
        }
    }

    /// Writes to another connection from now on.
    fn replace(&self, port: &File) -> Result<(), String> {
        let writer = port.try_clone().map_err(|error| format!("cannot copy the port: {error}"))?;
        locked(&self.port).0 = writer;
        Ok(())
    }

    /// Ends the silence.
    fn speak(&self) {
        locked(&self.port).1 = false;
        self.changed.notify_all();
    }
}

fn write(port: &mut File, frame: &Frame) {
    if let Err(error) = frame.write(port) {
        crate::say(&format!("cannot write to the host: {error}"));
    }
}

/// The port as a stream that does not end: it reads as empty while no host is connected.
struct Port(File);

impl Read for Port {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(buffer) {
                Ok(0) => thread::sleep(ABSENT),
                other => return other,
            }
        }
    }
}

/// A process that the host asked for.
struct Exec {
    input: Option<mpsc::Sender<Vec<u8>>>,
    credits: [Arc<Credit>; 2],
    master: Option<Arc<OwnedFd>>,
    pid: Option<i32>,
}

#[derive(Default)]
struct State {
    /// Pids of the containers' main processes.
    containers: Vec<i32>,
    execs: HashMap<u32, Exec>,
    volumes: usize,
}

struct Agent {
    link: Arc<Link>,
    state: Mutex<State>,
}

/// Serves the host for ever.
pub fn serve(port: boot::Port) -> Result<Infallible, String> {
    match port {
        boot::Port::Serial(port) => {
            let agent = Agent::new(&port)?;
            agent.link.tell(&FromGuest::Hello { version: VERSION });
            Err(agent.listen(Port(port)))
        }
        boot::Port::Vsock(listener) => {
            let first = accept(&listener)?;
            let agent = Agent::new(&first)?;
            agent.link.tell(&FromGuest::Hello { version: VERSION });
            let mut connection = first;
            loop {
                // The host goes with its end of the connection and comes back with a new one: a restore.
                let ended = agent.listen(connection);
                crate::say(&format!("the host's connection ended: {ended}"));
                connection = accept(&listener)?;
                agent.link.replace(&connection)?;
            }
        }
    }
}

fn accept(listener: &OwnedFd) -> Result<File, String> {
    let accepted = nix::sys::socket::accept4(listener.as_raw_fd(), nix::sys::socket::SockFlag::SOCK_CLOEXEC);
    accepted.map(sys::accepted).map_err(|errno| format!("cannot accept the host's connection: {errno}"))
}

impl Agent {
    fn new(port: &File) -> Result<Arc<Self>, String> {
        let writer = port.try_clone().map_err(|error| format!("cannot copy the port: {error}"))?;
        let link = Arc::new(Link { port: Mutex::new((writer, false)), changed: Condvar::new() });
        Ok(Arc::new(Self { link, state: Mutex::default() }))
    }

    /// Does what the host asks until its stream ends; returns why.
    fn listen(self: &Arc<Self>, mut port: impl Read) -> String {
        loop {
            let frame = match Frame::read(&mut port) {
                Ok(frame) => frame,
                Err(error) => return format!("cannot read from the host: {error}"),
            };
            match frame.kind {
                Kind::Control => match serde_json::from_slice(&frame.payload) {
                    Ok(message) => self.handle(message),
                    Err(error) => return format!("the host says what this agent does not know: {error}"),
                },
                Kind::Stdin => {
                    let state = locked(&self.state);
                    if let Some(input) = state.execs.get(&frame.channel).and_then(|exec| exec.input.as_ref())
                    {
                        // Its process may be gone.
                        let _ = input.send(frame.payload);
                    }
                }
                Kind::Stdout | Kind::Stderr | Kind::Log => {}
            }
        }
    }
}

impl Agent {
    fn handle(self: &Arc<Self>, message: ToGuest) {
        let answer = |done: Result<(), String>, good: FromGuest| {
            self.link.tell(&done.map_or_else(|message| FromGuest::Failed { message }, |()| good));
        };
        match message {
            ToGuest::Boot(request) => answer(self.boot(&request), FromGuest::Booted),
            ToGuest::Quiesce => match self.stand_still() {
                Ok(()) => self.link.quiet(),
                Err(message) => self.link.tell(&FromGuest::Failed { message }),
            },
            ToGuest::Resume(renewal) => {
                let done = renew(&renewal).and_then(|()| freeze(false));
                self.link.speak();
                answer(done, FromGuest::Resumed);
            }
            ToGuest::Exec { id, container, process, terminal } => self.exec(id, container, process, terminal),
            ToGuest::CloseStdin { id } => {
                if let Some(exec) = locked(&self.state).execs.get_mut(&id) {
                    exec.input = None;
                }
            }
            ToGuest::Resize { id, rows, columns } => {
                if let Some(master) = locked(&self.state).execs.get(&id).and_then(|exec| exec.master.as_ref())
                    && let Err(error) = sys::set_terminal_size(master.as_fd(), rows, columns)
                {
                    crate::say(&format!("cannot resize a terminal: {error}"));
                }
            }
            ToGuest::Signal { id, signal } => {
                // Its process is not reaped before it leaves the table, so the pid is its own.
                let pid = locked(&self.state).execs.get(&id).and_then(|exec| exec.pid);
                if let (Some(pid), Ok(signal)) = (pid, Signal::try_from(signal)) {
                    let _ = kill(Pid::from_raw(pid), signal);
                }
            }
            ToGuest::Taken { id, errors, bytes } => {
                if let Some(exec) = locked(&self.state).execs.get(&id) {
                    exec.credits[usize::from(errors)].give(bytes as usize);
                }
            }
        }
    }

    fn boot(self: &Arc<Self>, request: &Boot) -> Result<(), String> {
        boot::furnish(request)?;
        renew(&request.renewal)?;
        locked(&self.state).volumes = request.volumes.len();
        for (number, container) in request.containers.iter().enumerate() {
            let plan = Plan::Make { container: container.clone(), hostname: request.hostname.clone() };
            let (agent, (started, result)) = (Arc::clone(self), mpsc::channel());
            thread::spawn(move || agent.run_container(number, &plan, &started));
            let pid = result
                .recv()
                .unwrap_or_else(|_| Err("the thread that starts it ended".to_owned()))
                .map_err(|why| format!("container {}: {why}", container.name))?;
            locked(&self.state).containers.push(pid);
        }
        Ok(())
    }

    fn run_container(&self, number: usize, plan: &Plan, started: &mpsc::Sender<Result<i32, String>>) {
        let streams = [Stdio::null(), Stdio::piped(), Stdio::piped()];
        let mut child = match processes::start(plan, Born::First, streams) {
            Ok(child) => child,
            Err(NotStarted { message, .. }) => {
                let _ = started.send(Err(message));
                return;
            }
        };
        let channel = number as u32;
        let outputs = [
            child.stdout.take().map(|from| processes::pump(from, &self.link, Kind::Log, channel, None)),
            child.stderr.take().map(|from| processes::pump(from, &self.link, Kind::Log, channel, None)),
        ];
        // The receiver waits for it.
        let _ = started.send(Ok(child.id() as i32));
        let (code, signal) = child.wait().map_or((255, 0), processes::outcome);
        linger(outputs);
        let time_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as i64);
        self.link.tell(&FromGuest::Ended { container: number, code, signal, time_ms });
    }

    fn exec(self: &Arc<Self>, id: u32, container: usize, process: Process, terminal: Option<(u16, u16)>) {
        let credits = [Credit::new(), Credit::new()];
        let mut state = locked(&self.state);
        let Some(pid) = state.containers.get(container).copied() else {
            drop(state);
            let message = format!("there is no container number {container}");
            self.link.tell(&FromGuest::NotStarted { id, code: 0, message });
            return;
        };
        let (input, waiting) = mpsc::channel();
        let exec = Exec { input: Some(input), credits: credits.clone(), master: None, pid: None };
        state.execs.insert(id, exec);
        drop(state);
        let agent = Arc::clone(self);
        thread::spawn(move || {
            let ended = agent.run_exec(id, pid, process, terminal, waiting, &credits);
            for credit in &credits {
                credit.close();
            }
            locked(&agent.state).execs.remove(&id);
            agent.link.tell(&match ended {
                Ok((code, signal)) => FromGuest::Exited { id, code, signal },
                Err(NotStarted { code, message }) => FromGuest::NotStarted { id, code, message },
            });
        });
    }

    /// Runs a process to its end. What `waiting` holds already goes to its input first.
    fn run_exec(
        &self,
        id: u32,
        pid: i32,
        process: Process,
        terminal: Option<(u16, u16)>,
        waiting: mpsc::Receiver<Vec<u8>>,
        credits: &[Arc<Credit>; 2],
    ) -> Result<(i32, i32), NotStarted> {
        let because =
            |error: io::Error| NotStarted { code: 0, message: format!("cannot copy a descriptor: {error}") };
        let plan = Plan::Join { pid, process, terminal: terminal.is_some() };
        let link = Arc::clone(&self.link);
        let taken = move |bytes: usize| link.tell(&FromGuest::Taken { id, bytes: bytes as u32 });
        let (mut child, outputs) = if let Some(size) = terminal {
            let (master, peer) = processes::terminal(pid, size)?;
            let streams = [
                Stdio::from(peer.try_clone().map_err(because)?),
                Stdio::from(peer.try_clone().map_err(because)?),
                Stdio::from(peer),
            ];
            let child = processes::start(&plan, Born::Beside(pid), streams)?;
            let reader = File::from(master.try_clone().map_err(because)?);
            let writer = File::from(master.try_clone().map_err(because)?);
            if let Some(exec) = locked(&self.state).execs.get_mut(&id) {
                exec.master = Some(Arc::new(master));
            }
            forward(waiting, processes::feed(writer, taken));
            let output = processes::pump(reader, &self.link, Kind::Stdout, id, Some(Arc::clone(&credits[0])));
            (child, [Some(output), None])
        } else {
            let streams = [Stdio::piped(), Stdio::piped(), Stdio::piped()];
            let mut child = processes::start(&plan, Born::Beside(pid), streams)?;
            if let Some(stdin) = child.stdin.take() {
                forward(waiting, processes::feed(stdin, taken));
            }
            let outputs = [
                child.stdout.take().map(|from| {
                    processes::pump(from, &self.link, Kind::Stdout, id, Some(Arc::clone(&credits[0])))
                }),
                child.stderr.take().map(|from| {
                    processes::pump(from, &self.link, Kind::Stderr, id, Some(Arc::clone(&credits[1])))
                }),
            ];
            (child, outputs)
        };
        if let Some(exec) = locked(&self.state).execs.get_mut(&id) {
            exec.pid = Some(child.id() as i32);
        }
        self.link.tell(&FromGuest::Started { id });
        let status = child.wait().map_or((255, 0), processes::outcome);
        if let Some(exec) = locked(&self.state).execs.get_mut(&id) {
            exec.pid = None;
        }
        linger(outputs);
        Ok(status)
    }

    /// Freezes the workload, and makes its volumes' disks complete and no larger than what they hold.
    fn stand_still(&self) -> Result<(), String> {
        freeze(true)?;
        let volumes = locked(&self.state).volumes;
        if volumes > 0 {
            nix::unistd::sync();
        }
        for index in 0..volumes {
            let root = format!("{}/{index}", boot::VOLUMES);
            match File::open(&root).and_then(|root| sys::trim(&root)) {
                Err(error) if error.kind() != io::ErrorKind::Unsupported => {
                    eprintln!("cannot give back what volume {index} does not need: {error}");
                }
                // A disk that takes no such hint costs space.
                _ => {}
            }
        }
        Ok(())
    }
}

/// Hands input on as it comes, and its end.
fn forward(from: mpsc::Receiver<Vec<u8>>, to: mpsc::Sender<Vec<u8>>) {
    thread::spawn(move || from.into_iter().try_for_each(|bytes| to.send(bytes)));
}

/// Waits for the ends of outputs, which other processes may keep open.
fn linger(outputs: [Option<mpsc::Receiver<()>>; 2]) {
    for output in outputs.into_iter().flatten() {
        if output.recv_timeout(LINGER) == Err(RecvTimeoutError::Timeout) {
            return;
        }
    }
}

/// Stops or goes on with all processes of the workload (cgroup v2 freezer).
fn freeze(stop: bool) -> Result<(), String> {
    boot::write(&format!("{GROUP}/cgroup.freeze"), if stop { "1" } else { "0" })?;
    if !stop {
        return Ok(());
    }
    let path = format!("{GROUP}/cgroup.events");
    let events = File::open(&path).map_err(|error| format!("cannot open {path}: {error}"))?;
    let until = std::time::Instant::now() + FREEZE_LIMIT;
    loop {
        // Reading takes note of the event that poll waits for.
        let mut text = String::new();
        let mut reader = &events;
        io::Seek::rewind(&mut reader)
            .and_then(|()| reader.read_to_string(&mut text).map(drop))
            .map_err(|error| format!("cannot read {path}: {error}"))?;
        if text.lines().any(|line| line == "frozen 1") {
            return Ok(());
        }
        let left = until.saturating_duration_since(std::time::Instant::now());
        if left.is_zero() {
            boot::write(&format!("{GROUP}/cgroup.freeze"), "0")?;
            return Err(format!("the workload does not stand still after {} s", FREEZE_LIMIT.as_secs()));
        }
        let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        if let Err(errno) = poll(&mut fds, timeout)
            && errno != nix::errno::Errno::EINTR
        {
            return Err(format!("cannot wait for {path}: {errno}"));
        }
    }
}

/// Sets the clock, renews the kernel's entropy and writes what is delivered.
fn renew(renewal: &Renewal) -> Result<(), String> {
    let time = TimeSpec::new(renewal.time_ns / 1_000_000_000, renewal.time_ns % 1_000_000_000);
    clock_settime(ClockId::CLOCK_REALTIME, time).map_err(|errno| format!("cannot set the clock: {errno}"))?;
    if !renewal.entropy.is_empty() {
        File::open("/dev/random")
            .and_then(|random| sys::add_entropy(&random, &renewal.entropy))
            .map_err(|error| format!("cannot renew the kernel's entropy: {error}"))?;
    }
    for delivery in &renewal.delivered {
        deliver(delivery).map_err(|error| format!("cannot deliver {}: {error}", delivery.key))?;
    }
    Ok(())
}

/// Makes a delivery's place hold exactly what was delivered. Files are written in place, so that open descriptors and
/// mounts of single files see what is new.
fn deliver(delivery: &Delivery) -> io::Result<()> {
    let place = Path::new(DELIVERIES).join(&delivery.key);
    if delivery.directory {
        fs::create_dir_all(&place)?;
        fs::set_permissions(&place, fs::Permissions::from_mode(delivery.mode))?;
        remove_others(&place, "", delivery)?;
    }
    for file in &delivery.files {
        let path = if delivery.directory { place.join(&file.name) } else { place.clone() };
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&path, &file.content)?;
        chown(&path, Some(file.uid), Some(file.gid))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(file.mode))?;
    }
    Ok(())
}

fn remove_others(directory: &Path, prefix: &str, delivery: &Delivery) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if delivery.files.iter().any(|file| file.name == name) {
            continue;
        }
        let below = format!("{name}/");
        if delivery.files.iter().any(|file| file.name.starts_with(&below)) {
            remove_others(&entry.path(), &below, delivery)?;
        } else if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

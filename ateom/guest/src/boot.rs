// SPDX-License-Identifier: Apache-2.0
//! From the kernel's first process to an agent: modules, file systems, the agent's port; later network and disks.
use std::fs::{self, File};
use std::io::Write as _;
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ateom_guest::{Boot, PORT};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, VsockAddr, bind, recv,
    send, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};

use crate::sys;

/// How long a device may take to appear after its driver was loaded.
const DEVICE_LIMIT: Duration = Duration::from_secs(20);
/// Where modules are in the initramfs, named in the order in which they are to be loaded.
const MODULES: &str = "/modules";
/// Those for containers that make networks of their own.
const NETWORK_MODULES: &str = "/modules-network";
/// The kernel's argument that asks for them.
const NETWORK_ARGUMENT: &str = "ateom.network";
/// Where image roots are mounted.
pub const IMAGES: &str = "/run/images";
/// Where volumes are mounted.
pub const VOLUMES: &str = "/run/volumes";
/// Where deliveries are.
pub const DELIVERIES: &str = "/run/deliveries";
/// Where the writable layers are.
pub const CONTAINERS: &str = "/run/containers";
/// Where the files of `/etc` are.
pub const ETC: &str = "/run/etc";
/// The workload's control group.
pub const GROUP: &str = "/sys/fs/cgroup/actor";

fn failed(what: impl std::fmt::Display) -> impl FnOnce(std::io::Error) -> String {
    move |error| format!("cannot {what}: {error}")
}

fn mount_kind(kind: &str, at: &str, flags: MsFlags, data: &str) -> Result<(), String> {
    fs::create_dir_all(at).map_err(failed(format!("make {at}")))?;
    mount(Some(kind), at, Some(kind), flags, Some(data))
        .map_err(|errno| format!("cannot mount {kind} at {at}: {errno}"))
}

/// The way to the host.
#[derive(Debug)]
pub enum Port {
    /// A virtio-serial port: one stream for the machine's whole life.
    Serial(File),
    /// A listening vsock: a restore breaks the connection, and the host connects again.
    Vsock(OwnedFd),
}

/// Makes a system of the initramfs; returns the agent's port.
pub fn prepare() -> Result<Port, String> {
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
    mount_kind("proc", "/proc", plain, "")?;
    mount_kind("sysfs", "/sys", plain, "")?;
    mount_kind("devtmpfs", "/dev", MsFlags::MS_NOSUID, "mode=0755")?;
    let events = Uevents::listen()?;
    let arguments = fs::read_to_string("/proc/cmdline").map_err(failed("read the kernel's arguments"))?;
    load_modules(MODULES)?;
    if arguments.split_ascii_whitespace().any(|word| word == NETWORK_ARGUMENT) {
        load_modules(NETWORK_MODULES)?;
    }
    switch_root()?;
    mount_kind("devpts", "/dev/pts", MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, "newinstance,ptmxmode=0666")?;
    mount_kind("cgroup2", "/sys/fs/cgroup", plain, "")?;
    for dir in [IMAGES, VOLUMES, DELIVERIES, CONTAINERS, ETC] {
        fs::create_dir_all(dir).map_err(failed(format!("make {dir}")))?;
    }
    if let Some(port) = vsock_port(&arguments) {
        return listen(port)
            .map(Port::Vsock)
            .map_err(|errno| format!("cannot listen on vsock port {port}: {errno}"));
    }
    let port = events.wait_for("the agent's virtio-serial port", agent_port)?;
    let opened = File::options().read(true).write(true).open(&port);
    opened.map(Port::Serial).map_err(failed(format!("open {}", port.display())))
}

/// The vsock port that the host names, where there is no virtio-serial.
fn vsock_port(arguments: &str) -> Option<u32> {
    arguments.split_ascii_whitespace().find_map(|word| word.strip_prefix("ateom.vsock=")?.parse().ok())
}

fn listen(port: u32) -> Result<OwnedFd, Errno> {
    let listener = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(listener.as_raw_fd(), &VsockAddr::new(nix::libc::VMADDR_CID_ANY, port))?;
    nix::sys::socket::listen(&listener, Backlog::new(1)?)?;
    Ok(listener)
}

fn load_modules(directory: &str) -> Result<(), String> {
    let Ok(entries) = fs::read_dir(directory) else { return Ok(()) };
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    for path in paths {
        let file = File::open(&path).map_err(failed(format!("open {}", path.display())))?;
        match sys::load_module(&file) {
            Err(error) if error.raw_os_error() != Some(Errno::EEXIST as i32) => {
                return Err(format!("cannot load module {}: {error}", path.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Leaves the initramfs for a file system in memory from which containers can be pivoted, and frees its pages.
fn switch_root() -> Result<(), String> {
    let root = "/newroot";
    mount_kind("tmpfs", root, MsFlags::MS_NOSUID, "mode=0755,size=90%")?;
    for dir in ["dev", "proc", "sys", "run", "sbin", "tmp"] {
        fs::create_dir(format!("{root}/{dir}")).map_err(failed(format!("make {root}/{dir}")))?;
    }
    let program = format!("{root}/sbin/ateom-guest");
    fs::copy("/proc/self/exe", &program).map_err(failed("copy the agent"))?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).map_err(failed("chmod the agent"))?;
    // The running program keeps its own pages; the modules are loaded.
    for path in [MODULES, NETWORK_MODULES, "/init"] {
        let removed = if path == "/init" { fs::remove_file(path) } else { fs::remove_dir_all(path) };
        match removed {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                crate::say(&format!("cannot remove {path}: {error}"));
            }
            _ => {}
        }
    }
    let moved = |from: &str| {
        mount(Some(from), format!("{root}{from}").as_str(), None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .map_err(|errno| format!("cannot move {from}: {errno}"))
    };
    for path in ["/dev", "/proc", "/sys"] {
        moved(path)?;
    }
    nix::unistd::chdir(root).map_err(|errno| format!("cannot enter {root}: {errno}"))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .map_err(|errno| format!("cannot move the root: {errno}"))?;
    nix::unistd::chroot(".").map_err(|errno| format!("cannot change the root: {errno}"))?;
    nix::unistd::chdir("/").map_err(|errno| format!("cannot enter the root: {errno}"))
}

/// The kernel's word that devices have come.
struct Uevents(std::os::fd::OwnedFd);

impl Uevents {
    fn listen() -> Result<Self, String> {
        let open = || {
            let socket = socket(
                AddressFamily::Netlink,
                SockType::Datagram,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::NetlinkKObjectUEvent,
            )?;
            bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 1))?;
            setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(DEVICE_LIMIT.as_secs() as i64))?;
            Ok::<_, Errno>(socket)
        };
        open().map(Self).map_err(|errno| format!("cannot listen for devices: {errno}"))
    }

    /// Looks after each event until it is found.
    fn wait_for<T>(&self, what: &str, look: impl Fn() -> Option<T>) -> Result<T, String> {
        let mut buffer = [0; 8192];
        loop {
            if let Some(found) = look() {
                return Ok(found);
            }
            match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(_) | Err(Errno::EINTR | Errno::ENOBUFS) => {}
                Err(errno) => return Err(format!("{what} did not appear: {errno}")),
            }
        }
    }
}

fn agent_port() -> Option<PathBuf> {
    let port = fs::read_dir("/sys/class/virtio-ports")
        .ok()?
        .filter_map(Result::ok)
        .find(|entry| fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.trim() == PORT))?;
    let device = Path::new("/dev").join(port.file_name());
    device.exists().then_some(device)
}

fn disk(serial: &str) -> Option<PathBuf> {
    let disk = fs::read_dir("/sys/block").ok()?.filter_map(Result::ok).find(|entry| {
        fs::read_to_string(entry.path().join("serial")).is_ok_and(|own| own.trim() == serial)
    })?;
    let device = Path::new("/dev").join(disk.file_name());
    device.exists().then_some(device)
}

/// Sets the network up, mounts disks, writes the files of `/etc` and makes the workload's control group.
pub fn furnish(boot: &Boot) -> Result<(), String> {
    let events = Uevents::listen()?;
    sys::loopback_up().map_err(failed("bring the loopback up"))?;
    set_network(boot)?;
    for (index, serial) in boot.images.iter().enumerate() {
        let device = events.wait_for(&format!("disk {serial}"), || disk(serial))?;
        let at = format!("{IMAGES}/{index}");
        fs::create_dir_all(&at).map_err(failed(format!("make {at}")))?;
        mount(Some(&device), at.as_str(), Some("erofs"), MsFlags::MS_RDONLY, None::<&str>)
            .map_err(|errno| format!("cannot mount image {serial} ({}): {errno}", device.display()))?;
    }
    for (index, volume) in boot.volumes.iter().enumerate() {
        let device = events.wait_for(&format!("disk {}", volume.serial), || disk(&volume.serial))?;
        let at = format!("{VOLUMES}/{index}");
        fs::create_dir_all(&at).map_err(failed(format!("make {at}")))?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some(&device), at.as_str(), Some("ext4"), flags, None::<&str>).map_err(|errno| {
            format!("cannot mount volume {} ({}): {errno}", volume.serial, device.display())
        })?;
        if volume.fresh {
            // mkfs made it; the workload's directory is empty.
            let _ = fs::remove_dir(format!("{at}/lost+found"));
            fs::set_permissions(&at, fs::Permissions::from_mode(0o777)).map_err(failed("chmod a volume"))?;
        }
    }
    for (name, content) in &boot.etc {
        write(&format!("{ETC}/{name}"), content)?;
    }
    nix::unistd::sethostname(&boot.hostname).map_err(|errno| format!("cannot set the host name: {errno}"))?;
    write("/sys/fs/cgroup/cgroup.subtree_control", "+pids")?;
    fs::create_dir_all(GROUP).map_err(failed("make the workload's control group"))?;
    if boot.pids > 0 {
        write(&format!("{GROUP}/pids.max"), &boot.pids.to_string())?;
    }
    Ok(())
}

/// Writes a file of the kernel's or of ours.
pub fn write(path: &str, content: &str) -> Result<(), String> {
    File::create(path)
        .and_then(|mut file| file.write_all(content.as_bytes()))
        .map_err(failed(format!("write {path}")))
}

/// NLM_F_REQUEST | NLM_F_ACK (netlink(7)).
const REQUEST: u16 = 0x5;
/// NLM_F_CREATE | NLM_F_REPLACE.
const NEW: u16 = 0x500;

/// Brings `eth0` up with the addresses and routes that the host gives.
fn set_network(boot: &Boot) -> Result<(), String> {
    let index = nix::net::if_::if_nametoindex("eth0").map_err(|errno| format!("no eth0: {errno}"))?;
    // Addresses are the host's to give: no discovery, no delays.
    for (file, value) in [("accept_dad", "0"), ("accept_ra", "0"), ("addr_gen_mode", "1")] {
        let path = format!("/proc/sys/net/ipv6/conf/eth0/{file}");
        if Path::new(&path).exists() {
            write(&path, value)?;
        }
    }
    let up = 1_u32.to_ne_bytes();
    let mut link = vec![0, 0, 0, 0];
    link.extend_from_slice(&index.to_ne_bytes());
    link.extend_from_slice(&up);
    link.extend_from_slice(&up);
    netlink("bring eth0 up", nix::libc::RTM_NEWLINK, REQUEST, &link)?;
    for network in &boot.networks {
        let (family, address) = octets(network.address);
        let mut body = vec![family, network.prefix, nix::libc::IFA_F_NODAD as u8, 0];
        body.extend_from_slice(&index.to_ne_bytes());
        attribute(&mut body, nix::libc::IFA_LOCAL, &address);
        attribute(&mut body, nix::libc::IFA_ADDRESS, &address);
        netlink("add an address", nix::libc::RTM_NEWADDR, REQUEST | NEW, &body)?;
        let (_, gateway) = octets(network.gateway);
        // Main table, static, universe, unicast.
        let mut body = vec![family, 0, 0, 0, 254, 4, 0, 1, 0, 0, 0, 0];
        attribute(&mut body, nix::libc::RTA_GATEWAY, &gateway);
        attribute(&mut body, nix::libc::RTA_OIF, &index.to_ne_bytes());
        netlink("add a default route", nix::libc::RTM_NEWROUTE, REQUEST | NEW, &body)?;
    }
    Ok(())
}

fn octets(address: IpAddr) -> (u8, Vec<u8>) {
    match address {
        IpAddr::V4(address) => (nix::libc::AF_INET as u8, address.octets().to_vec()),
        IpAddr::V6(address) => (nix::libc::AF_INET6 as u8, address.octets().to_vec()),
    }
}

fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    body.extend_from_slice(&((4 + value.len()) as u16).to_ne_bytes());
    body.extend_from_slice(&kind.to_ne_bytes());
    body.extend_from_slice(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// Sends one request; the kernel's answer is its error number.
fn netlink(what: &str, kind: u16, flags: u16, body: &[u8]) -> Result<(), String> {
    let ask = || {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        let mut message = ((16 + body.len()) as u32).to_ne_bytes().to_vec();
        message.extend_from_slice(&kind.to_ne_bytes());
        message.extend_from_slice(&flags.to_ne_bytes());
        message.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]);
        message.extend_from_slice(body);
        send(socket.as_raw_fd(), &message, MsgFlags::empty())?;
        let mut answer = [0; 1024];
        let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        // The error number follows the header; 0 is the acknowledgement.
        let code = answer[..length]
            .get(16..20)
            .and_then(|bytes| bytes.try_into().ok())
            .map_or(0, i32::from_ne_bytes);
        if code == 0 { Ok(()) } else { Err(Errno::from_raw(-code)) }
    };
    ask().map_err(|errno| format!("cannot {what}: {errno}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_names_a_vsock_port_or_none() {
        assert_eq!(vsock_port("console=ttyS0 quiet ateom.vsock=1024 panic=-1\n"), Some(1024));
        assert_eq!(vsock_port("console=ttyS0 quiet"), None);
        assert_eq!(vsock_port("ateom.vsock=x"), None);
    }
}

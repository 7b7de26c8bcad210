// SPDX-License-Identifier: Apache-2.0
//! System calls that no safe wrapper offers. The only module of the crate that uses `unsafe`.
#![allow(unsafe_code)]
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use nix::libc;

mod ioctl {
    use nix::libc;

    nix::ioctl_write_int_bad!(tiocsctty, libc::TIOCSCTTY);
    nix::ioctl_write_ptr_bad!(tiocswinsz, libc::TIOCSWINSZ, libc::winsize);
    nix::ioctl_write_ptr_bad!(tiocsptlck, libc::TIOCSPTLCK, libc::c_int);
    nix::ioctl_write_int_bad!(tiocgptpeer, libc::TIOCGPTPEER);
    // linux/random.h
    nix::ioctl_write_ptr_bad!(rndaddentropy, 0x4008_5203, super::Entropy);
    nix::ioctl_none_bad!(rndreseedcrng, 0x5207);
    // linux/fs.h
    nix::ioctl_readwrite_bad!(fitrim, 0xc018_5879, super::Trim);
    nix::ioctl_write_ptr_bad!(siocsifflags, libc::SIOCSIFFLAGS, libc::ifreq);
}

/// `struct fstrim_range`.
#[repr(C)]
#[derive(Debug)]
pub struct Trim {
    start: u64,
    length: u64,
    shortest: u64,
}

/// `struct rand_pool_info` with its buffer.
#[repr(C)]
#[derive(Debug)]
pub struct Entropy {
    bits: libc::c_int,
    size: libc::c_int,
    bytes: [u8; 64],
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Loads a kernel module (finit_module(2)).
pub fn load_module(file: &std::fs::File) -> io::Result<()> {
    // SAFETY: a descriptor, a NUL-terminated string that lives through the call, and flags.
    check(unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) }).map(drop)
}

/// Gives the kernel's random number generator new bytes, counted as fully random, and makes it use them now.
pub fn add_entropy(random: &std::fs::File, seed: &[u8]) -> io::Result<()> {
    let mut bytes = [0; 64];
    for (to, from) in bytes.iter_mut().zip(seed) {
        *to = *from;
    }
    let size = seed.len().min(64);
    let pool = Entropy { bits: (size * 8) as libc::c_int, size: size as libc::c_int, bytes };
    // SAFETY: the pool lives through the call, which reads `size` bytes of its buffer.
    unsafe { ioctl::rndaddentropy(random.as_raw_fd(), &raw const pool) }?;
    // SAFETY: takes no argument.
    unsafe { ioctl::rndreseedcrng(random.as_raw_fd()) }?;
    Ok(())
}

/// Tells a file system's disk which of its blocks are free (ioctl_fstrim(2)).
pub fn trim(root: &std::fs::File) -> io::Result<()> {
    let mut whole = Trim { start: 0, length: u64::MAX, shortest: 0 };
    // SAFETY: `whole` lives through the call, which reads it and writes how much was free into it.
    unsafe { ioctl::fitrim(root.as_raw_fd(), &raw mut whole) }?;
    Ok(())
}

/// Makes descriptor 0 the controlling terminal of the calling process, in a session of its own.
pub fn take_terminal() -> io::Result<()> {
    nix::unistd::setsid()?;
    // SAFETY: an integer argument.
    unsafe { ioctl::tiocsctty(0, 0) }?;
    Ok(())
}

/// Tells a terminal its size.
pub fn set_terminal_size(terminal: BorrowedFd<'_>, rows: u16, columns: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: `size` lives through the call, which only reads it.
    unsafe { ioctl::tiocswinsz(terminal.as_raw_fd(), &raw const size) }?;
    Ok(())
}

/// The other end of a terminal's master (ioctl_tty(2), TIOCGPTPEER).
pub fn terminal_peer(master: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let unlocked: libc::c_int = 0;
    // SAFETY: `unlocked` lives through the call, which only reads it.
    unsafe { ioctl::tiocsptlck(master.as_raw_fd(), &raw const unlocked) }?;
    // SAFETY: an integer argument.
    let fd =
        unsafe { ioctl::tiocgptpeer(master.as_raw_fd(), libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC) }?;
    // SAFETY: the kernel just made this descriptor for us and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Brings the loopback link up.
pub fn loopback_up() -> io::Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: a structure of integers and arrays of them, for which zeros are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: `request` lives through the call, which only reads it.
    unsafe { ioctl::siocsifflags(socket.as_raw_fd(), &raw const request) }?;
    Ok(())
}

/// Replaces the calling process's capabilities: effective and permitted are these, inheritable none.
pub fn set_capabilities(mask: u64) -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    // _LINUX_CAPABILITY_VERSION_3
    let header = Header { version: 0x2008_0522, pid: 0 };
    let half = |bits: u64| Data { effective: bits as u32, permitted: bits as u32, inheritable: 0 };
    let data = [half(mask), half(mask >> 32)];
    // SAFETY: both live through the call and have the layout of capset(2)'s version 3.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) }).map(drop)
}

/// Takes a capability out of the bounding set.
pub fn drop_bound(capability: u32) -> io::Result<()> {
    // SAFETY: integer arguments.
    let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability), 0, 0, 0) };
    check(libc::c_long::from(result)).map(drop)
}

/// Keeps permitted capabilities over the next change of the user.
pub fn keep_capabilities() -> io::Result<()> {
    // SAFETY: integer arguments.
    check(libc::c_long::from(unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) })).map(drop)
}

/// Has a program of `struct sock_filter`s judge the system calls of the calling thread, and of what it becomes.
pub fn filter_calls(program: &[u8]) -> io::Result<()> {
    let wrong = |what| io::Error::new(io::ErrorKind::InvalidInput, what);
    let (instructions, []) = program.as_chunks::<{ size_of::<libc::sock_filter>() }>() else {
        return Err(wrong("no whole number of instructions"));
    };
    let mut instructions: Vec<libc::sock_filter> = instructions
        .iter()
        .map(|&[c0, c1, jt, jf, k0, k1, k2, k3]| libc::sock_filter {
            code: u16::from_ne_bytes([c0, c1]),
            jt,
            jf,
            k: u32::from_ne_bytes([k0, k1, k2, k3]),
        })
        .collect();
    let len = u16::try_from(instructions.len()).map_err(|_| wrong("too many instructions"))?;
    let program = libc::sock_fprog { len, filter: instructions.as_mut_ptr() };
    // SAFETY: the program and its instructions live through the call, which only reads them.
    check(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) })
        .map(drop)
}

/// Has a command inherit descriptors under fixed numbers.
pub fn inherit(command: &mut Command, fds: [(RawFd, RawFd); 2]) {
    // SAFETY: between fork and exec only the async-signal-safe dup2(2) and fcntl(2) are called.
    unsafe {
        command.pre_exec(move || {
            for (from, to) in fds {
                let done =
                    if from == to { libc::fcntl(from, libc::F_SETFD, 0) } else { libc::dup2(from, to) };
                if done < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
}

/// Takes over a descriptor that was inherited under a fixed number; it is closed at the next exec.
pub fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: called once for each number, at the start of a program that was given it by `inherit`.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    Ok(fd)
}

/// Takes over a descriptor that the kernel just made.
pub fn accepted(fd: RawFd) -> std::fs::File {
    // SAFETY: accept4(2) made it for us and nobody else owns it.
    unsafe { std::fs::File::from_raw_fd(fd) }
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;

    fn program(instructions: &[(u16, u8, u8, u32)]) -> Vec<u8> {
        let bytes = |&(code, jt, jf, k): &(u16, u8, u8, u32)| {
            [&code.to_ne_bytes()[..], &[jt, jf], &k.to_ne_bytes()[..]].concat()
        };
        instructions.iter().flat_map(bytes).collect()
    }

    #[test]
    fn a_filter_judges_the_thread_that_asked_for_it() {
        // The call's number; getpriority fails with EDOM, the rest passes.
        let filter = program(&[
            (0x20, 0, 0, 0),
            (0x15, 0, 1, libc::SYS_getpriority as u32),
            (0x06, 0, 0, 0x0005_0000 | libc::EDOM as u32),
            (0x06, 0, 0, 0x7fff_0000),
        ]);
        // SAFETY: integer arguments.
        let ask = || check(unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, 0) });
        std::thread::spawn(move || {
            nix::sys::prctl::set_no_new_privs().unwrap();
            for (wrong, expected) in [(&filter[1..], libc::EINVAL), (&[][..], libc::EINVAL)] {
                let error = filter_calls(wrong).unwrap_err();
                let is_said =
                    error.raw_os_error() == Some(expected) || error.kind() == io::ErrorKind::InvalidInput;
                assert!(is_said, "{error}");
            }
            ask().unwrap();
            filter_calls(&filter).unwrap();
            assert_eq!(ask().unwrap_err().raw_os_error(), Some(Errno::EDOM as i32));
        })
        .join()
        .unwrap();
        ask().unwrap();
    }
}

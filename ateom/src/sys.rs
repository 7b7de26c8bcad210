// SPDX-License-Identifier: Apache-2.0
//! System calls that no safe wrapper offers. The only module of the crate that uses `unsafe`.
#![allow(unsafe_code)]
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use nix::libc;
use tokio::io::unix::AsyncFd;

mod ioctl {
    use nix::libc;

    nix::ioctl_write_int_bad!(tiocsctty, libc::TIOCSCTTY);
    nix::ioctl_write_ptr_bad!(tiocswinsz, libc::TIOCSWINSZ, libc::winsize);
    nix::ioctl_read_bad!(tiocgwinsz, libc::TIOCGWINSZ, libc::winsize);
    // linux/if_tun.h
    nix::ioctl_write_ptr_bad!(tunsetiff, 0x4004_54ca, libc::ifreq);
    nix::ioctl_write_int_bad!(tunsetpersist, 0x4004_54cb);
    // linux/fs.h
    nix::ioctl_readwrite_bad!(pagemap_scan, 0xc060_6610, super::Scan);
}

/// `struct page_region`: addresses, and what is the case.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Region {
    pub start: u64,
    pub end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Debug)]
pub struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    regions: u64,
    regions_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Which pages of a process were written since they were last asked for, which they are from now on again
/// (PAGEMAP_SCAN, Documentation/admin-guide/mm/pagemap.rst). `pagemap` is the process's; all of `start..end` has to be
/// under asynchronous write protection (userfaultfd(2)). Returns how many regions were filled and up to where was looked.
///
/// # Errors
/// EPERM where it is not so protected; ENOTTY before Linux 6.7.
pub(crate) fn written(
    pagemap: BorrowedFd<'_>,
    start: u64,
    end: u64,
    regions: &mut [Region],
) -> io::Result<(usize, u64)> {
    const PAGE_IS_WRITTEN: u64 = 1 << 1;
    // PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC
    const PROTECT_AGAIN: u64 = 0b11;
    let mut scan = Scan {
        size: size_of::<Scan>() as u64,
        flags: PROTECT_AGAIN,
        start,
        end,
        walk_end: 0,
        regions: regions.as_mut_ptr() as u64,
        regions_len: regions.len() as u64,
        max_pages: 0,
        category_inverted: 0,
        category_mask: PAGE_IS_WRITTEN,
        category_anyof_mask: 0,
        return_mask: PAGE_IS_WRITTEN,
    };
    // SAFETY: both structures have the layout of linux/fs.h; `scan` and the regions, of which it has the number, live
    // through the call, which fills them.
    let filled = unsafe { ioctl::pagemap_scan(pagemap.as_raw_fd(), &raw mut scan) }?;
    Ok((filled as usize, scan.walk_end))
}

/// A descriptor that becomes readable when the process ends (pidfd_open(2)).
///
/// # Errors
/// ESRCH when there is no such process.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes two integers and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for us and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Nanoseconds on CLOCK_BOOTTIME: goes on while the machine sleeps and never jumps. The clock of leases.
pub fn boottime_ns() -> i64 {
    use nix::sys::time::TimeValLike as _;
    // The clock exists since Linux 2.6.39. Should it fail, every lease must look expired rather than endless.
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
        .map_or(i64::MAX, |time| time.num_nanoseconds())
}

/// Has the runtime watch a descriptor.
///
/// # Errors
/// When it cannot be registered with epoll(7).
pub(crate) fn watched(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open descriptor from here until it is dropped, which is when AsyncFd
    // deregisters it.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

/// Takes ownership of descriptors that the kernel delivered in an SCM_RIGHTS message.
pub(crate) fn received(fds: &[RawFd]) -> Vec<OwnedFd> {
    // SAFETY: called once on the numbers that recvmsg(2) just installed for us; nobody else owns them.
    fds.iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }).collect()
}

/// Makes the command's standard input its controlling terminal, in a session of its own.
pub(crate) fn with_terminal(command: &mut Command) {
    // SAFETY: between fork and exec only the async-signal-safe setsid(2) and ioctl(2) are called, on descriptor 0,
    // which the standard library has set up before.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            ioctl::tiocsctty(0, 0)?;
            Ok(())
        });
    }
}

/// Tells a terminal its size; the kernel sends SIGWINCH to its foreground processes.
///
/// # Errors
/// ENOTTY when `terminal` is none.
pub(crate) fn set_terminal_size(terminal: BorrowedFd<'_>, rows: u16, columns: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: `size` lives through the call, which only reads it.
    unsafe { ioctl::tiocswinsz(terminal.as_fd().as_raw_fd(), &raw const size) }?;
    Ok(())
}

/// Rows and columns of a terminal.
///
/// # Errors
/// ENOTTY when `terminal` is none.
pub(crate) fn terminal_size(terminal: BorrowedFd<'_>) -> io::Result<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: `size` lives through the call, which fills it.
    unsafe { ioctl::tiocgwinsz(terminal.as_raw_fd(), &raw mut size) }?;
    Ok((size.ws_row, size.ws_col))
}

/// Makes a tap in the calling thread's network namespace; it goes with the last copy of the descriptor (tuntap(4)).
///
/// # Errors
/// EBUSY when the name is taken; ENOENT without the tun driver.
pub(crate) fn make_tap(name: &str) -> io::Result<OwnedFd> {
    let file = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: a structure of integers and arrays of them, for which zeros are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: `request` lives through the call, which only reads it.
    unsafe { ioctl::tunsetiff(file.as_raw_fd(), &raw const request) }?;
    Ok(file.into())
}

/// Lets a tap be there without its descriptor, until its link is deleted.
pub(crate) fn keep_tap(tap: &OwnedFd) -> io::Result<()> {
    // SAFETY: an integer argument.
    unsafe { ioctl::tunsetpersist(tap.as_raw_fd(), 1) }?;
    Ok(())
}

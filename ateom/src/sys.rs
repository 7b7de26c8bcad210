// SPDX-License-Identifier: Apache-2.0
//! System calls that no safe wrapper offers. The only module of the crate, with its children, that uses `unsafe`.
#![allow(unsafe_code)]
use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd, RawFd};

/// A descriptor that becomes readable when the process ends (pidfd_open(2)).
///
/// # Errors
/// ESRCH when there is no such process.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes two integers and returns a new descriptor or -1.
    let fd = unsafe { nix::libc::syscall(nix::libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for us and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Nanoseconds on CLOCK_BOOTTIME: goes on while the machine sleeps and never jumps. The clock of leases.
pub fn boottime_ns() -> i64 {
    use nix::sys::time::TimeValLike as _;
    // The clock exists since Linux 2.6.39; 0 would only make every lease look unexpired and is never returned.
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).map_or(0, |time| time.num_nanoseconds())
}

// SPDX-License-Identifier: Apache-2.0
//! Preloaded into a QEMU. **Restored**, it maps the snapshot's memory file privately where QEMU asks for it shared.
//!
//! QEMU leaves the memory out of its stream only where it takes it for shared, and a shared mapping would write to the
//! snapshot. With this, it keeps its belief and the snapshot stays as it is: pages come from the file as they are
//! touched (one page cache for all clones), those that are written become the process's own. The descriptor that QEMU
//! keeps is made read-only, and holes that it wants to punch there (free page reporting) are not: it drops its own
//! copies of the pages itself (madvise).
//!
//! **Booted**, it maps its memory file shared, and has the kernel note what is written to it (userfaultfd(2),
//! asynchronous write protection, Linux 6.7), so that a snapshot can be copied while it runs. The descriptor that this
//! hangs on stays open as long as the process lives. A kernel that cannot does without.
//!
//! No runtime, no allocation, nothing but system calls: it lives in somebody else's process.
#![no_std]

use core::ffi::{CStr, c_char, c_int, c_long, c_void};

#[link(name = "c")]
unsafe extern "C" {
    fn syscall(number: c_long, ...) -> c_long;
    fn getenv(name: *const c_char) -> *const c_char;
    fn abort() -> !;
}

/// "DEVICE:INODE" of the file, decimal.
const PRIVATE: &CStr = c"ATEOM_PRIVATE_MEMORY";
/// Likewise.
const TRACKED: &CStr = c"ATEOM_TRACKED_MEMORY";
const MAP_SHARED: c_int = 1;
const MAP_PRIVATE: c_int = 2;
const MAP_NORESERVE: c_int = 0x4000;
const O_CLOEXEC: c_int = 0o2_000_000;
const AT_FDCWD: c_int = -100;
/// linux/userfaultfd.h
const UFFD_API: u64 = 0xaa;
const UFFDIO_API: c_long = 0xc018_aa3f;
const UFFDIO_REGISTER: c_long = 0xc020_aa00;
/// UFFD_FEATURE_WP_HUGETLBFS_SHMEM, UFFD_FEATURE_WP_UNPOPULATED, UFFD_FEATURE_WP_ASYNC.
const FEATURES: u64 = 1 << 12 | 1 << 13 | 1 << 15;
/// UFFDIO_REGISTER_MODE_WP
const WRITES: u64 = 1 << 1;

/// Numbers of system calls.
#[cfg(target_arch = "x86_64")]
mod call {
    use core::ffi::c_long;
    pub const MMAP: c_long = 9;
    pub const FSTAT: c_long = 5;
    pub const OPENAT: c_long = 257;
    pub const DUP3: c_long = 292;
    pub const FALLOCATE: c_long = 285;
    pub const CLOSE: c_long = 3;
    pub const IOCTL: c_long = 16;
    pub const USERFAULTFD: c_long = 323;
}
/// Numbers of system calls.
#[cfg(target_arch = "aarch64")]
mod call {
    use core::ffi::c_long;
    pub const MMAP: c_long = 222;
    pub const FSTAT: c_long = 80;
    pub const OPENAT: c_long = 56;
    pub const DUP3: c_long = 24;
    pub const FALLOCATE: c_long = 47;
    pub const CLOSE: c_long = 57;
    pub const IOCTL: c_long = 29;
    pub const USERFAULTFD: c_long = 282;
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // SAFETY: ends the process, which nothing survives.
    unsafe { abort() }
}

fn number(mut text: *const c_char) -> (u64, *const c_char) {
    let mut value = 0_u64;
    // SAFETY: reads up to the first byte that is no digit, which the terminating zero is at the latest.
    unsafe {
        while (*text as u8).is_ascii_digit() {
            value = value.wrapping_mul(10).wrapping_add(u64::from(*text as u8 - b'0'));
            text = text.add(1);
        }
    }
    (value, text)
}

/// Whether a descriptor is of the file that a variable names.
fn is(name: &CStr, fd: c_int) -> bool {
    // SAFETY: getenv(3) gives a string or nothing; the kernel fills at most its `struct stat`, which is shorter.
    unsafe {
        let wanted = getenv(name.as_ptr());
        if fd < 0 || wanted.is_null() {
            return false;
        }
        let (device, rest) = number(wanted);
        if *rest as u8 != b':' {
            return false;
        }
        let (inode, _) = number(rest.add(1));
        // Device and inode are the first two fields on both architectures.
        let mut stat = [0_u64; 64];
        syscall(call::FSTAT, c_long::from(fd), stat.as_mut_ptr()) == 0
            && stat[0] == device
            && stat[1] == inode
    }
}

/// Puts a read-only description of the same file in a descriptor's place.
fn make_read_only(fd: c_int) -> bool {
    // No indexing: nothing here may bring a panic's machinery in. Digits are made from the end.
    let mut digits = [0_u8; 11];
    let mut rest = fd;
    let mut length = 0;
    for digit in digits.iter_mut().rev().skip(1) {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
        length += 1;
        if rest == 0 {
            break;
        }
    }
    let mut path = *b"/proc/self/fd/\0\0\0\0\0\0\0\0\0\0\0";
    for (to, from) in path.iter_mut().skip(14).zip(digits.iter().skip(10 - length)) {
        *to = *from;
    }
    // SAFETY: the path is terminated; the descriptors are ours to open, replace and close.
    unsafe {
        let opened =
            syscall(call::OPENAT, c_long::from(AT_FDCWD), path.as_ptr(), c_long::from(O_CLOEXEC), 0_i64);
        if opened < 0 {
            return false;
        }
        let done = syscall(call::DUP3, opened, c_long::from(fd), c_long::from(O_CLOEXEC)) >= 0;
        syscall(call::CLOSE, opened);
        done
    }
}

/// Has the kernel note what is written to a stretch of memory; it may not be able to.
fn track(address: u64, length: usize) {
    let mut api = [UFFD_API, FEATURES, 0];
    let mut range = [address, length as u64, WRITES, 0];
    // SAFETY: both have the layout of linux/userfaultfd.h and live through the calls, which write into them at most; the
    // descriptor is ours to close.
    unsafe {
        let fd = syscall(call::USERFAULTFD, c_long::from(O_CLOEXEC));
        if fd < 0 {
            return;
        }
        if syscall(call::IOCTL, fd, UFFDIO_API, &raw mut api) != 0
            || syscall(call::IOCTL, fd, UFFDIO_REGISTER, &raw mut range) != 0
        {
            syscall(call::CLOSE, fd);
        }
    }
}

/// mmap(2) of a program with 64-bit offsets.
///
/// # Safety
/// As mmap(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap64(
    address: *mut c_void,
    length: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    let mut flags = flags;
    let shared = flags & (MAP_SHARED | MAP_PRIVATE) == MAP_SHARED;
    if shared && is(PRIVATE, fd) {
        if !make_read_only(fd) {
            return usize::MAX as *mut c_void;
        }
        flags = flags & !MAP_SHARED | MAP_PRIVATE | MAP_NORESERVE;
    }
    // SAFETY: the caller's promise; syscall(2) sets errno as mmap(2) does.
    let mapped = unsafe {
        syscall(
            call::MMAP,
            address,
            length,
            c_long::from(protection),
            c_long::from(flags),
            c_long::from(fd),
            offset,
        )
    };
    if mapped != -1 && shared && is(TRACKED, fd) {
        track(mapped as u64, length);
    }
    mapped as *mut c_void
}

/// fallocate(2) of a program with 64-bit offsets.
///
/// # Safety
/// As fallocate(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fallocate64(fd: c_int, mode: c_int, offset: i64, length: i64) -> c_int {
    if is(PRIVATE, fd) {
        return 0;
    }
    // SAFETY: integers only.
    unsafe { syscall(call::FALLOCATE, c_long::from(fd), c_long::from(mode), offset, length) as c_int }
}

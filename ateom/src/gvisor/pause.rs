// SPDX-License-Identifier: Apache-2.0
//! The root container of every sandbox: a program that does nothing, in a root filesystem that holds nothing else.
//!
//! A root container is bound to its root filesystem when it is created, so what is created ahead of time cannot be a
//! workload. A static program of a few bytes needs no image, no C library and nothing of the host.
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use crate::runtime::{RuntimeError, file_error};

/// `loop: pause()`.
#[cfg(target_arch = "x86_64")]
const CODE: &[u8] = &[
    0xb8, 0x22, 0x00, 0x00, 0x00, // mov eax, 34 (pause)
    0x0f, 0x05, // syscall
    0xeb, 0xf7, // jmp loop
];
/// `loop: ppoll(NULL, 0, NULL, NULL, 0)`; this architecture has no pause.
#[cfg(target_arch = "aarch64")]
const CODE: &[u8] = &[
    0x00, 0x00, 0x80, 0xd2, // mov x0, 0
    0x01, 0x00, 0x80, 0xd2, // mov x1, 0
    0x02, 0x00, 0x80, 0xd2, // mov x2, 0
    0x03, 0x00, 0x80, 0xd2, // mov x3, 0
    0x04, 0x00, 0x80, 0xd2, // mov x4, 0
    0x28, 0x09, 0x80, 0xd2, // mov x8, 73 (ppoll)
    0x01, 0x00, 0x00, 0xd4, // svc 0
    0xf9, 0xff, 0xff, 0x17, // b loop
];
/// ELF machine number.
const MACHINE: u16 = if cfg!(target_arch = "x86_64") { 62 } else { 183 };

/// A static executable: ELF header, one program header that maps the whole file read-execute, the code.
pub fn program() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const ELF_HEADER: u64 = 64;
    const PROGRAM_HEADER: u64 = 56;
    let entry = ELF_HEADER + PROGRAM_HEADER;
    let size = entry + CODE.len() as u64;
    // Magic, 64 bits, little endian, version 1, System V.
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    // Executable, machine, version.
    file.extend_from_slice(&2u16.to_le_bytes());
    file.extend_from_slice(&MACHINE.to_le_bytes());
    file.extend_from_slice(&1u32.to_le_bytes());
    for value in [BASE + entry, ELF_HEADER, 0] {
        file.extend_from_slice(&value.to_le_bytes());
    }
    // Flags; then sizes and counts: this header, program headers (one), section headers (none).
    file.extend_from_slice(&0u32.to_le_bytes());
    for value in [ELF_HEADER as u16, PROGRAM_HEADER as u16, 1, 0, 0, 0] {
        file.extend_from_slice(&value.to_le_bytes());
    }
    // PT_LOAD, read and execute.
    file.extend_from_slice(&1u32.to_le_bytes());
    file.extend_from_slice(&5u32.to_le_bytes());
    for value in [0, BASE, BASE, size, size, 4096] {
        file.extend_from_slice(&value.to_le_bytes());
    }
    file.extend_from_slice(CODE);
    file
}

/// Writes the root filesystem into a directory; one that is there already is kept.
///
/// # Errors
/// [`RuntimeError::File`].
pub fn write_rootfs(directory: &Path) -> Result<(), RuntimeError> {
    for mount_point in ["dev", "proc", "sys", "tmp", "etc"] {
        let path = directory.join(mount_point);
        std::fs::create_dir_all(&path).map_err(file_error("create", &path))?;
    }
    let path = directory.join("pause");
    std::fs::write(&path, program()).map_err(file_error("write", &path))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))
        .map_err(file_error("chmod", &path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_runs_and_waits_for_a_signal() {
        let directory = tempfile::tempdir().unwrap();
        write_rootfs(directory.path()).unwrap();
        let mut child = std::process::Command::new(directory.path().join("pause")).spawn().unwrap();
        let pid = nix::unistd::Pid::from_raw(child.id() as i32);
        // A program that had crashed or ended would report that instead of the signal.
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        let status = child.wait().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(15));
    }
}

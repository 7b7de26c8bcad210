// SPDX-License-Identifier: Apache-2.0
//! Builds the guest's init and what is preloaded into QEMU, and puts them into this crate's output: `ateom-microvm`
//! carries both.
//!
//! It has to be a static program, which the flags of the outer build do not make; so cargo is called once more, with a
//! target directory of its own, this workspace's lock file and `+crt-static` (which needs no musl).
use std::path::{Path, PathBuf};
use std::process::Command;

/// One file without dependencies, so the compiler alone makes it.
const PRELOAD: &str = "preload/private.rs";

fn main() -> Result<(), String> {
    let var = |name: &str| std::env::var(name).map_err(|error| format!("{name}: {error}"));
    let manifest = PathBuf::from(var("CARGO_MANIFEST_DIR")?).join("guest/Cargo.toml");
    let out = PathBuf::from(var("OUT_DIR")?);
    let target = var("TARGET")?;
    for path in ["guest/src", "guest/Cargo.toml", "../Cargo.lock", "build.rs", PRELOAD] {
        println!("cargo::rerun-if-changed={path}");
    }
    if !target.ends_with("-linux-gnu") {
        return Err(format!("the guest's init is built for *-linux-gnu, not for {target}"));
    }
    let mut cargo = Command::new(var("CARGO")?);
    cargo
        .args([
            "build",
            "--quiet",
            "--locked",
            "--profile",
            "guest",
            "--bin",
            "ateom-guest",
            "--target",
            &target,
        ])
        .arg("--manifest-path")
        .arg(&manifest)
        .arg("--target-dir")
        .arg(out.join("guest"))
        .env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static");
    // The outer build's wrappers (clippy) and flags are not meant for it.
    for name in
        ["RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "CARGO_BUILD_RUSTFLAGS", "CARGO_TARGET_DIR"]
    {
        cargo.env_remove(name);
    }
    let status = cargo.status().map_err(|error| format!("cannot run cargo: {error}"))?;
    if !status.success() {
        return Err(format!("the guest's init could not be built: {status}"));
    }
    let built = out.join("guest").join(&target).join("guest/ateom-guest");
    copy(&built, &out.join("ateom-guest"))?;
    let mut rustc = Command::new(var("RUSTC")?);
    rustc
        .args(["--edition", "2024", "--crate-type", "cdylib", "--crate-name", "private", "--target", &target])
        .args(["-Copt-level=2", "-Cpanic=abort", "-Cstrip=symbols", "-o"])
        .arg(out.join("private.so"))
        .arg(PRELOAD);
    let status = rustc.status().map_err(|error| format!("cannot run rustc: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("{PRELOAD} could not be built: {status}")) }
}

fn copy(from: &Path, to: &Path) -> Result<(), String> {
    std::fs::copy(from, to)
        .map(drop)
        .map_err(|error| format!("cannot copy {} to {}: {error}", from.display(), to.display()))
}

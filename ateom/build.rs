// SPDX-License-Identifier: Apache-2.0
//! Builds the guest's init and puts it into this crate's output: `ateom-microvm` carries it.
//!
//! It has to be a static program, which the flags of the outer build do not make; so cargo is called once more, with a
//! target directory of its own, this workspace's lock file and `+crt-static` (which needs no musl).
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() -> Result<(), String> {
    let var = |name: &str| std::env::var(name).map_err(|error| format!("{name}: {error}"));
    let manifest = PathBuf::from(var("CARGO_MANIFEST_DIR")?).join("guest/Cargo.toml");
    let out = PathBuf::from(var("OUT_DIR")?);
    let target = var("TARGET")?;
    for path in ["guest/src", "guest/Cargo.toml", "../Cargo.lock", "build.rs"] {
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
    copy(&built, &out.join("ateom-guest"))
}

fn copy(from: &Path, to: &Path) -> Result<(), String> {
    std::fs::copy(from, to)
        .map(drop)
        .map_err(|error| format!("cannot copy {} to {}: {error}", from.display(), to.display()))
}

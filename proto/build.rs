// SPDX-License-Identifier: Apache-2.0
//! Compiles the contracts with protox, so that no `protoc` has to be installed.
use std::path::PathBuf;

use prost::Message as _;

const FILES: [&str; 8] = [
    "substrate/v1/types.proto",
    "ateapi/v1/ateapi.proto",
    "atelet/v1/atelet.proto",
    "ateom/v1/ateom.proto",
    "atenet/v1/flow.proto",
    "openshell/compute/v1/compute_driver.proto",
    "openshell/session.proto",
    "session/v1/session.proto",
];

/// Messages that are also documents a person writes: camelCase, unknown fields refused, missing ones default.
const DOCUMENTS: [&str; 21] = [
    "TemplateSpec",
    "Container",
    "SecurityContext",
    "Seccomp",
    "SeccompRule",
    "Readiness",
    "HttpGet",
    "VolumeMount",
    "ImageMount",
    "Volume",
    "Resources",
    "IdlePolicy",
    "CheckpointPolicy",
    "EgressPolicy",
    "EgressRule",
    "Hooks",
    "Hook",
    "RetentionPolicy",
    "ActorSpec",
    "File",
    "Compatibility",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(FILES, ["proto"])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    let mut build = tonic_prost_build::configure().btree_map(".");
    for name in DOCUMENTS {
        build = build.type_attribute(
            format!(".substrate.v1.{name}"),
            "#[derive(serde::Serialize, serde::Deserialize)] \
             #[serde(rename_all = \"camelCase\", deny_unknown_fields, default)]",
        );
    }
    build.compile_fds(descriptors)?;
    Ok(())
}

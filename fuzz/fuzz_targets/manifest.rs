// SPDX-License-Identifier: Apache-2.0
//! Manifests of snapshots, as they come from a blob store.
#![no_main]

#[path = "../src/manifest.rs"]
mod manifest;

libfuzzer_sys::fuzz_target!(|data: &[u8]| manifest::check(data));

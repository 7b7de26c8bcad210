// SPDX-License-Identifier: Apache-2.0
//! Requests to the control plane: decoders and every rule.
#![no_main]

#[path = "../src/api.rs"]
mod api;

libfuzzer_sys::fuzz_target!(|data: &[u8]| api::check(data));

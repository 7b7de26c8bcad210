// SPDX-License-Identifier: Apache-2.0
//! The image store as the node uses it: real layouts, real overlays, registries on loopback.
//!
//! All of it needs root (device nodes, trusted attributes, mounts); without, every test says so and does nothing.
mod features;
mod hostile;
mod registry;
mod store;
mod stub;
mod support;
mod tools;

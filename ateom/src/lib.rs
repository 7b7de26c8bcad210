// SPDX-License-Identifier: Apache-2.0
//! One worker slot.
#![deny(unsafe_code)]

pub mod cgroup;
pub mod sys;

pub use sys::boottime_ns;

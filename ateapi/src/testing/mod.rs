// SPDX-License-Identifier: Apache-2.0
//! What tests share.
pub mod fixtures;
mod harness;
pub mod stub;

pub use harness::Harness;

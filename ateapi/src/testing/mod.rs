// SPDX-License-Identifier: Apache-2.0
//! What tests share, and the measurement of `bench/control`.
#[cfg(feature = "testing")]
#[allow(missing_docs)]
pub mod bench;
#[cfg(test)]
pub mod fixtures;
#[cfg(test)]
mod harness;
#[cfg(test)]
pub mod net;
#[cfg_attr(not(test), allow(dead_code, missing_docs))]
pub mod stub;
#[cfg_attr(not(test), allow(dead_code, missing_docs))]
pub mod world;

#[cfg(test)]
pub use harness::{Harness, settings};

// SPDX-License-Identifier: Apache-2.0
//! The words of the control plane.
pub mod names;

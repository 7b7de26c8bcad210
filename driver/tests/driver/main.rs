// SPDX-License-Identifier: Apache-2.0
//! The driver as a whole: served on a socket, over a control plane in memory.
mod contract;
mod create;
mod faults;
mod gateway;
mod lifecycle;
mod probe;
mod real;
mod receipt;
mod stub;
mod tls;
mod validate;
mod watch;

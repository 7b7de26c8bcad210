// SPDX-License-Identifier: Apache-2.0
//! The network parts of substrate: the ingress router and the egress proxy of a node.
//!
//! ```text
//!  client ──HTTP──▶ ingress ──IngressOpen, bytes──▶ ateom ──▶ actor      P1 P6 P8, wake on traffic, onReply
//!  actor ──▶ ateom ──EgressFrame + SCM_RIGHTS──▶ egress ──TCP──▶ out     P1 P7 P8, by name, audited
//! ```
//!
//! Both are clients of `ateapi.v1.Control` and know neither storage nor runtimes. Neither holds anything that is
//! not rebuilt from the control plane after a restart: a killed router or proxy costs the connections it carried.
//!
//! * [`ingress::serve`]: routes a request to its actor, wakes it when it sleeps, keeps `checkpoint.onReply`.
//! * [`egress::serve`]: answers an actor's DNS and carries its connections, as far as its policy allows.
//! * [`token`]: the bearer tokens that ingress asks for.
#![deny(unsafe_code)]

pub mod control;
pub mod egress;
mod hop;
pub mod ingress;
mod pipe;
#[cfg(test)]
mod testing;
pub mod token;

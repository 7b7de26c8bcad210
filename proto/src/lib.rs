// SPDX-License-Identifier: Apache-2.0
//! The wire contracts of substrate and the types generated from them.
//!
//! Every seam between two processes is a service here, also where both run in one process on one machine. The
//! comments on messages and fields in `proto/proto/` are the contract.
#![forbid(unsafe_code)]

pub mod seam;
pub mod system_calls;
#[cfg(feature = "tls")]
pub mod tls;

/// Encoded `FileDescriptorSet` of all contracts, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

// The generated code refers to other packages by their path, so the modules nest as the packages do.
#[allow(missing_docs, clippy::pedantic, clippy::all)]
mod generated {
    pub mod substrate {
        pub mod v1 {
            tonic::include_proto!("substrate.v1");
        }
    }
    pub mod ateapi {
        pub mod v1 {
            tonic::include_proto!("ateapi.v1");
        }
    }
    pub mod atelet {
        pub mod v1 {
            tonic::include_proto!("atelet.v1");
        }
    }
    pub mod ateom {
        pub mod v1 {
            tonic::include_proto!("ateom.v1");
        }
    }
    pub mod atenet {
        pub mod v1 {
            tonic::include_proto!("atenet.v1");
        }
    }
    pub mod session {
        pub mod v1 {
            tonic::include_proto!("session.v1");
        }
    }
    pub mod openshell {
        pub mod v1 {
            tonic::include_proto!("openshell.v1");
        }
        pub mod compute {
            pub mod v1 {
                tonic::include_proto!("openshell.compute.v1");
            }
        }
    }
}

/// The control plane.
pub use generated::ateapi::v1 as ateapi;
/// The node agent.
pub use generated::atelet::v1 as atelet;
/// Frames between a worker slot and its node's network parts.
pub use generated::atenet::v1 as atenet;
/// A worker slot.
pub use generated::ateom::v1 as ateom;
/// OpenShell's compute driver contract.
pub use generated::openshell::compute::v1 as compute;
/// What is understood of the conversation between OpenShell's supervisor and its gateway.
pub use generated::openshell::v1 as supervisor;
/// Between the session hub and the shim in a sandbox.
pub use generated::session::v1 as session;
/// Shared words: templates, containers, policies, exec.
pub use generated::substrate::v1 as types;

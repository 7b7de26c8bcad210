// SPDX-License-Identifier: Apache-2.0
//! What is local to this node of an actor: what it is resolved to, its directories, and its generation.
//!
//! * [`resolve`]: template + actor + images → the sandbox that an ateom starts; pure.
//! * [`place`]: directories and late-bound files on this host.
//! * [`quota`]: volumes that cannot outgrow their size.
//! * [`ledger`]: the highest generation of each actor seen here, so that what is of the past is refused.
pub mod capabilities;
pub mod ledger;
pub mod place;
pub mod quantity;
pub mod quota;
pub mod resolve;

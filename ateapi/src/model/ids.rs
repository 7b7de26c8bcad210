// SPDX-License-Identifier: Apache-2.0
//! Typed ids: an actor's uid cannot be passed where a snapshot's id is meant.
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Clock;

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub String);

        impl $name {
            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.to_owned())
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                Self(text)
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
    )+};
}

ids! {
    /// An actor, for as long as it exists, wherever it runs.
    ActorUid,
    /// A snapshot; unique over all actors.
    SnapshotId,
    /// A template.
    TemplateUid,
    /// A worker slot.
    WorkerId,
    /// A node.
    NodeName,
}

/// A random UUID (version 4).
pub fn uuid(clock: &dyn Clock) -> String {
    uuid::Builder::from_random_bytes(clock.draw().to_be_bytes()).into_uuid().to_string()
}

impl ActorUid {
    /// Draws one.
    pub fn draw(clock: &dyn Clock) -> Self {
        Self(uuid(clock))
    }
}

impl TemplateUid {
    /// Draws one.
    pub fn draw(clock: &dyn Clock) -> Self {
        Self(uuid(clock))
    }
}

impl SnapshotId {
    /// Draws one (UUID version 7); ids sort by the millisecond in which they were drawn.
    pub fn draw(clock: &dyn Clock) -> Self {
        let [random @ .., _, _, _, _, _, _] = clock.draw().to_be_bytes();
        let millis = clock.wall_ms().max(0) as u64;
        Self(format!("s-{}", uuid::Builder::from_unix_timestamp_millis(millis, &random).into_uuid().simple()))
    }
}

/// The number of an actor's assignment: the fencing token of P1. 0: never assigned.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u64);

impl Generation {
    /// The next assignment's.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

// SPDX-License-Identifier: Apache-2.0
//! `substrate rotate-key`: a new key for the snapshots of an atespace.
use atelet::snapshot::KeyStore as _;

use super::print;
use super::stored::Stored;
use crate::args::{Global, RotateKey};
use crate::failure::{Doing as _, Failure};

/// Rotates. A running node agent uses the new version from its next snapshot on.
pub async fn run(options: RotateKey, global: &Global) -> Result<(), Failure> {
    let stored = Stored::open(&options.place).await?;
    let keys = stored.keys()?;
    let atespace = &global.atespace;
    let version =
        keys.rotate(atespace).await.doing(|| format!("cannot rotate the key of atespace {atespace}"))?;
    print(&format!("atespace {atespace}: later snapshots use version {version} of its key\n"))
}

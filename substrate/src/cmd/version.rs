// SPDX-License-Identifier: Apache-2.0
//! `substrate version`.
use serde::Serialize;

use crate::args::Global;
use crate::client::up_info;
use crate::cmd::{machine_text, print};
use crate::failure::Failure;

/// Prints the versions of this program and of the running one, if any.
pub async fn run(global: &Global) -> Result<(), Failure> {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Versions {
        version: &'static str,
        running: Option<crate::client::UpInfo>,
    }
    let running = match crate::client::connect_unix(&crate::client::socket_path(global)).await {
        Ok(_) => up_info(global).ok(),
        Err(_) => None,
    };
    let versions = Versions { version: env!("CARGO_PKG_VERSION"), running };
    if global.output.is_machine() {
        return print(&machine_text(&versions, global.output)?);
    }
    let running = match &versions.running {
        Some(up) => format!(
            "running   {} (pid {}, {})\nrunsc     {} (sha256 {})\n",
            up.version,
            up.pid,
            up.dir.display(),
            up.runsc_version,
            up.runsc_sha256
        ),
        None => "running   nothing here\n".to_owned(),
    };
    print(&format!("substrate {}\n{running}", versions.version))
}

// SPDX-License-Identifier: Apache-2.0
//! Logs of the main process: DIR/logs/substrate.log always, stderr when asked for.
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, fmt};

use crate::failure::{Doing as _, Failure};

/// A log beyond this is kept as `substrate.log.1` at the next start, bytes.
const ROTATE: u64 = 64 << 20;

/// Starts logging and says where to.
///
/// # Errors
/// When the filter is not understood or the file cannot be written.
pub fn start(dir: &Path, filter: &str, to_stderr: bool) -> Result<PathBuf, Failure> {
    let logs = dir.join("logs");
    let path = logs.join("substrate.log");
    if std::fs::metadata(&path).is_ok_and(|meta| meta.len() > ROTATE) {
        let old = logs.join("substrate.log.1");
        std::fs::rename(&path, &old).doing(|| format!("cannot rotate {}", path.display()))?;
    }
    let file = File::options()
        .append(true)
        .create(true)
        .open(&path)
        .doing(|| format!("cannot write the log {}", path.display()))?;
    let to_file = fmt::layer().with_ansi(false).with_writer(Arc::new(file)).with_filter(parse(filter)?);
    let to_terminal = if to_stderr {
        let layer = fmt::layer().with_target(false).with_writer(std::io::stderr).with_filter(parse(filter)?);
        Some(layer)
    } else {
        None
    };
    tracing_subscriber::registry()
        .with(to_file)
        .with(to_terminal)
        .try_init()
        .doing(|| "cannot start logging".to_owned())?;
    Ok(path)
}

fn parse(filter: &str) -> Result<EnvFilter, Failure> {
    // Libraries say little of use below warnings.
    let whole = format!("warn,{}", scoped(filter));
    EnvFilter::try_new(&whole).map_err(|error| {
        Failure::usage(format!("--log {filter:?} is not understood: {error}")).with_way_out(
            "use a level (error, warn, info, debug, trace) or a filter such as info,atenet=debug",
        )
    })
}

/// A bare level is meant for our own crates.
fn scoped(filter: &str) -> String {
    const OURS: [&str; 8] = [
        "substrate",
        "ateapi",
        "atelet",
        "atenet",
        "ateom",
        "openshell_driver_substrate",
        "substrate_proto",
        "audit",
    ];
    filter
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .map(|part| {
            if part.contains('=') || part.contains('[') {
                part.to_owned()
            } else if OURS.contains(&part) {
                format!("{part}=trace")
            } else {
                OURS.map(|krate| format!("{krate}={part}")).join(",")
            }
        })
        .collect::<Vec<_>>()
        .join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_for_our_own_crates() {
        assert!(scoped("debug").starts_with("substrate=debug,ateapi=debug"));
        assert!(scoped("info,h2=trace").ends_with(",h2=trace"));
        assert!(parse("info").is_ok());
        assert_eq!(parse("substrate=loud").unwrap_err().exit, crate::failure::Exit::Usage);
    }
}

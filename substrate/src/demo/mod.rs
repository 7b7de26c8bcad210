// SPDX-License-Identifier: Apache-2.0
//! Demo.
pub mod internet;

use crate::args::Demo;
use crate::failure::Failure;
use std::process::ExitCode;

pub async fn run(_options: Demo) -> Result<ExitCode, Failure> {
    Err(Failure::general("not there yet"))
}

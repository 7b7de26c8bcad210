// SPDX-License-Identifier: Apache-2.0
//! The measuring program of `bench/control`: figures as one JSON object on the last line.
#![forbid(unsafe_code)]

use ateapi::bench::{Options, run};

fn number(name: &str, default: usize) -> Result<usize, String> {
    let mut words = std::env::args().skip_while(|word| word != name);
    match (words.next(), words.next()) {
        (None, _) => Ok(default),
        (Some(_), Some(text)) => text.parse().map_err(|_| format!("{name}: {text:?} is no number")),
        (Some(_), None) => Err(format!("{name} needs a number")),
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let dir =
        std::env::args().nth(1).ok_or("usage: control_bench DIR [--rounds N] [--writers N] [--many N]")?;
    let options = Options {
        rounds: number("--rounds", 12)?,
        writers: number("--writers", 64)?,
        wave: 256,
        many: number("--many", 100_000)?,
    };
    println!("{}", run(dir.as_ref(), options).await?);
    Ok(())
}

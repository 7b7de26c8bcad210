// SPDX-License-Identifier: Apache-2.0
//! `substrate logs`.
use std::io::Write as _;

use substrate_proto::ateapi as api;

use crate::args::{Global, Logs};
use crate::client::{actor_ref, connect};
use crate::failure::{Doing as _, Failure};

/// Copies an actor's log to stdout.
pub async fn run(options: Logs, global: &Global) -> Result<(), Failure> {
    let mut client = connect(global).await?;
    let request = api::ActorLogsRequest {
        actor: Some(actor_ref(global, &options.name)),
        container: options.container.unwrap_or_default(),
        follow: options.follow,
        tail: options.tail.unwrap_or(0),
    };
    let mut stream = client.actor_logs(request).await?.into_inner();
    while let Some(chunk) = stream.message().await? {
        let mut out = std::io::stdout().lock();
        match out.write_all(&chunk.data).and_then(|()| out.flush()) {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
            result => result.doing(|| "cannot write to standard output".to_owned())?,
        }
    }
    Ok(())
}

// SPDX-License-Identifier: Apache-2.0
//! `GET /metrics` in Prometheus' text format: what all parts of the process count (docs/metrics.md).
use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tokio::net::TcpListener;

use crate::failure::{Doing as _, Failure};

/// Upper bounds of all histograms, s: from a wake-up to a large upload.
const BUCKETS: [f64; 14] =
    [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0];
/// Between tidying of what was recorded.
const UPKEEP: Duration = Duration::from_secs(5);
/// How long a client may take to ask.
const PATIENCE: Duration = Duration::from_secs(10);
/// Clients at a time.
const CLIENTS: usize = 16;

/// Takes up what is counted from now on, and serves it for the rest of the process's life.
///
/// # Errors
/// When the address cannot be listened on, or there is a recorder already.
pub async fn serve(listen: SocketAddr) -> Result<SocketAddr, Failure> {
    let listener = TcpListener::bind(listen).await.map_err(|error| {
        Failure::general(format!("cannot listen on {listen} for metrics: {error}"))
            .with_way_out("choose another address with the key metrics.listen (port 0 takes a free one)")
    })?;
    let address = listener.local_addr().doing(|| "cannot tell the address of the metrics".to_owned())?;
    let handle = PrometheusBuilder::new()
        .set_buckets(&BUCKETS)
        .and_then(PrometheusBuilder::install_recorder)
        .doing(|| "cannot count".to_owned())?;
    let upkeep = handle.clone();
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(UPKEEP).await;
            upkeep.run_upkeep();
        }
    });
    let clients = std::sync::Arc::new(tokio::sync::Semaphore::new(CLIENTS));
    tokio::spawn(async move {
        loop {
            // Never closed.
            let Ok(place) = std::sync::Arc::clone(&clients).acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let handle = handle.clone();
                    tokio::spawn(async move {
                        let service = hyper::service::service_fn(move |request| {
                            std::future::ready(Ok::<_, Infallible>(answer(&handle, &request)))
                        });
                        let connection = hyper::server::conn::http1::Builder::new()
                            .timer(TokioTimer::new())
                            .header_read_timeout(PATIENCE)
                            .serve_connection(TokioIo::new(stream), service);
                        if let Err(error) = connection.await {
                            tracing::debug!(%error, "a reader of metrics went away");
                        }
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a reader of metrics");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    });
    Ok(address)
}

fn answer<T>(handle: &PrometheusHandle, request: &Request<T>) -> Response<Full<Bytes>> {
    let (status, header, body) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => {
            (StatusCode::OK, (CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8"), handle.render())
        }
        (_, "/metrics") => (StatusCode::METHOD_NOT_ALLOWED, (ALLOW, "GET"), String::new()),
        _ => (StatusCode::NOT_FOUND, (CONTENT_TYPE, "text/plain"), "only /metrics is here\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header.0, hyper::header::HeaderValue::from_static(header.1));
    response
}

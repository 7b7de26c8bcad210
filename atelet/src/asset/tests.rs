// SPDX-License-Identifier: Apache-2.0
//! The cache, over files and a server on this machine; buckets are tested with the blob store's server.
use std::convert::Infallible;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use sha2::{Digest as _, Sha256};

use super::*;

fn asset(url: String, content: &[u8]) -> Asset {
    Asset { url, sha256: hex::encode(Sha256::digest(content)) }
}

fn entries(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

/// Serves `content`; some paths answer otherwise.
async fn serve(content: &'static [u8]) -> (String, Arc<AtomicU32>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/runsc", listener.local_addr().unwrap());
    let asked = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&asked);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let count = Arc::clone(&count);
            let answer = move |request: Request<hyper::body::Incoming>| {
                count.fetch_add(1, Ordering::Relaxed);
                let response = match request.uri().path() {
                    "/moved" => Response::builder().status(302).header("location", "http://example.com/x"),
                    "/gone" => Response::builder().status(404),
                    "/busy" => Response::builder().status(503),
                    _ => Response::builder(),
                };
                let response = response.body(Full::new(Bytes::from_static(content))).unwrap();
                std::future::ready(Ok::<_, Infallible>(response))
            };
            tokio::spawn(
                hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), hyper::service::service_fn(answer)),
            );
        }
    });
    (url, asked)
}

#[tokio::test]
async fn a_transfer_that_breaks_goes_on_where_it_broke() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/runsc", listener.local_addr().unwrap());
    let server = tokio::spawn(async move {
        let answers = [
            ("", "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n0123"),
            ("range: bytes=4-", "HTTP/1.1 206 Partial Content\r\ncontent-length: 6\r\n\r\n456789"),
        ];
        for (wanted, answer) in answers {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            assert!(String::from_utf8_lossy(&head).contains(wanted));
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let store = AssetStore::open(dir.path()).unwrap();
    let path = store.ensure("runsc", &asset(url, b"0123456789")).await.unwrap();
    assert_eq!(std::fs::read(path).unwrap(), b"0123456789");
    server.await.unwrap();
}

#[tokio::test]
async fn an_asset_is_fetched_once_and_needs_its_source_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    std::fs::write(&source, b"a runtime").unwrap();
    let cache = dir.path().join("runtimes");
    let store = AssetStore::open(&cache).unwrap();
    let wanted = asset(format!("file:{}", source.display()), b"a runtime");
    let path = store.ensure("runsc", &wanted).await.unwrap();
    assert_eq!(path, cache.join(&wanted.sha256).join("runsc"));
    assert_eq!(std::fs::read(&path).unwrap(), b"a runtime");
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o755);
    std::fs::remove_file(&source).unwrap();
    assert_eq!(store.ensure("runsc", &wanted).await.unwrap(), path);
}

#[tokio::test]
async fn what_is_not_what_the_config_says_is_refused_and_nothing_of_it_stays() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    std::fs::write(&source, b"another runtime").unwrap();
    let cache = dir.path().join("runtimes");
    let store = AssetStore::open(&cache).unwrap();
    let wanted = asset(format!("file:{}", source.display()), b"a runtime");
    let error = store.ensure("runsc", &wanted).await.unwrap_err();
    assert!(matches!(error, AssetError::Digest { .. }), "{error}");
    assert!(error.to_string().contains(&wanted.sha256), "{error}");
    assert_eq!(entries(&cache), 0);
    let missing = asset("file:/nonexistent/runsc".into(), b"x");
    assert!(matches!(store.ensure("runsc", &missing).await, Err(AssetError::Fetch { .. })));
    assert_eq!(entries(&cache), 0);
    // What a killed process left is removed by the next one.
    std::fs::create_dir(cache.join(".new-x")).unwrap();
    AssetStore::open(&cache).unwrap();
    assert_eq!(entries(&cache), 0);
}

#[tokio::test]
async fn over_http_callers_share_one_fetch_and_refusals_are_named() {
    static CONTENT: &[u8] = b"0123456789";
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(AssetStore::open(&dir.path().join("runtimes")).unwrap());
    let (url, asked) = serve(CONTENT).await;
    let wanted = asset(url.clone(), CONTENT);
    let all = (0..8).map(|_| {
        let (store, wanted) = (Arc::clone(&store), wanted.clone());
        async move { store.ensure("vmm", &wanted).await }
    });
    for path in futures::future::join_all(all).await {
        assert_eq!(std::fs::read(path.unwrap()).unwrap(), CONTENT);
    }
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    for (path, says) in [("moved", "https does not lead"), ("gone", "404"), ("busy", "503")] {
        let wanted = asset(url.replace("runsc", path), path.as_bytes());
        let error = store.ensure("vmm", &wanted).await.unwrap_err().to_string();
        assert!(error.contains(says), "{path}: {error}");
    }
    // The busy one was asked again, the others were not.
    assert_eq!(asked.load(Ordering::Relaxed), 1 + 1 + 1 + 4);
}

#[tokio::test]
async fn a_kernel_is_unpacked_and_known_by_its_image() {
    let dir = tempfile::tempdir().unwrap();
    let make = |files: &[&str]| {
        let mut archive =
            tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
        for path in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(4);
            header.set_mode(0o644);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(1);
            archive.append_data(&mut header, path, &b"data"[..]).unwrap();
        }
        archive.into_inner().unwrap().finish().unwrap()
    };
    let cache = dir.path().join("runtimes");
    let store = AssetStore::open(&cache).unwrap();
    let source = dir.path().join("kernel.tar.gz");
    let good = make(&["vmlinuz", "modules/kernel/a.ko"]);
    std::fs::write(&source, &good).unwrap();
    let wanted = asset(format!("file:{}", source.display()), &good);
    let path = store.ensure("kernel", &wanted).await.unwrap();
    assert!(path.join("modules/kernel/a.ko").is_file());
    let held = std::fs::read_to_string(cache.join(&wanted.sha256).join("holds")).unwrap();
    assert_eq!(held, hex::encode(Sha256::digest(b"data")));
    let bad = make(&["boot/vmlinuz"]);
    std::fs::write(&source, &bad).unwrap();
    let error = store.ensure("kernel", &asset(wanted.url.clone(), &bad)).await.unwrap_err().to_string();
    assert!(error.contains("vmlinuz"), "{error}");
    assert_eq!(entries(&cache), 1);
    // A machine monitor in an archive, with what it loads.
    let good = make(&["usr/bin/qemu-system-x86_64", "usr/share/qemu/bios.bin"]);
    std::fs::write(&source, &good).unwrap();
    let wanted = asset(wanted.url, &good);
    let path = store.ensure("vmm", &wanted).await.unwrap();
    assert_eq!(vmm_in(&path), Some(path.join("usr/bin/qemu-system-x86_64")));
    assert!(path.join("usr/share/qemu/bios.bin").is_file());
    let bad = make(&["usr/share/qemu/bios.bin"]);
    std::fs::write(&source, &bad).unwrap();
    let error = store.ensure("vmm", &asset(wanted.url, &bad)).await.unwrap_err().to_string();
    assert!(error.contains("it has none of usr/bin/qemu-system-x86_64"), "{error}");
}

#[tokio::test]
async fn what_a_snapshot_or_the_config_needs_is_never_collected() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("runtimes");
    let store = AssetStore::open(&cache).unwrap();
    let source = dir.path().join("source");
    let mut digests = Vec::new();
    for content in ["of the config", "of a snapshot", "of nobody", "of nobody, but new"] {
        std::fs::write(&source, content).unwrap();
        let wanted = asset(format!("file:{}", source.display()), content.as_bytes());
        store.ensure("runsc", &wanted).await.unwrap();
        digests.push(wanted.sha256);
    }
    let hour_ago = SystemTime::now() - Duration::from_hours(1);
    for digest in &digests[..3] {
        std::fs::File::open(cache.join(digest)).unwrap().set_modified(hour_ago).unwrap();
    }
    let keep: HashSet<String> = digests[..2].iter().cloned().collect();
    let workers = dir.path().join("workers");
    for dry_run in [true, false] {
        let gone = AssetStore::collect(&cache, &workers, &keep, dry_run).unwrap();
        assert_eq!(gone.iter().map(|(name, _)| name).collect::<Vec<_>>(), [&digests[2]]);
        assert_eq!(cache.join(&digests[2]).exists(), dry_run);
    }
    assert_eq!(entries(&cache), 3);
}

// SPDX-License-Identifier: Apache-2.0
//! Pulling: authentication, tenancy, retries and everything a registry may do wrong, against a stub on loopback.
use std::time::Duration;

use atelet::image::{Config, Digest, ImageError, ImageStore, Reference};
use serde_json::json;

use crate::stub::{Auth, Fault, Stub};
use crate::support::*;

fn built(name: &str) -> Built {
    gzip_image(vec![
        Layer::default().file("base", &vec![9; 300_000]).finish(),
        Layer::default().file(name, name.as_bytes()).finish(),
    ])
}

fn with_credentials(home: &Home, registry: &Stub, logins: &[(&str, &str, &str)]) -> Config {
    let host = format!("127.0.0.1:{}", registry.address.port());
    let mut file = json!({});
    for (atespace, username, password) in logins {
        file[*atespace] = json!({"auths": {&host: {"username": username, "password": password}}});
    }
    std::fs::write(home.path("auth.json"), file.to_string()).unwrap();
    let mut config = home.config();
    config.credentials = Some(home.path("auth.json"));
    config
}

fn pulls(log: &[String], what: &str) -> usize {
    log.iter().filter(|line| line.starts_with("GET") && line.contains(what)).count()
}

#[tokio::test]
async fn an_open_registry_is_pulled_once_and_a_tag_becomes_a_digest() {
    need_root!();
    let (home, registry) = (Home::new(), Stub::start().await);
    let image = built("a");
    let reference = registry.push("team/agent", "v1", &image);
    let store = home.open().await;
    let resolved = store.resolve("tenant", &reference).await.unwrap();
    assert_eq!(resolved.pinned_reference, registry.reference(&format!("team/agent@{}", image.digest())));
    let steps = Steps::default();
    let local = store.ensure("tenant", &reference, |step| steps.push(step)).await.unwrap();
    assert_eq!(std::fs::read(local.rootfs.join("a")).unwrap(), b"a");
    let phases = steps.phases();
    assert_eq!((phases.first(), phases.last()), (Some(&"resolving"), Some(&"ready")));
    let steps = steps.0.into_inner().unwrap();
    assert!(steps.windows(2).all(|pair| pair[0].phase <= pair[1].phase), "{steps:?}");
    let total: usize = image.blobs[..2].iter().map(Vec::len).sum();
    assert_eq!(store.usage().pulled_bytes, total as u64);

    // Pinned: nothing is asked for again while the check is fresh.
    registry.log();
    ensure(&store, &local.pinned_reference).await.unwrap();
    assert_eq!(registry.log(), [""; 0]);
    // The tag moves: only what is new is pulled.
    let moved = gzip_image(vec![
        Layer::default().file("base", &vec![9; 300_000]).finish(),
        Layer::default().file("b", b"b").finish(),
    ]);
    registry.push("team/agent", "v1", &moved);
    let second = ensure(&store, &reference).await.unwrap();
    assert_eq!(second.digest, moved.digest());
    assert_eq!(pulls(&registry.log(), "/blobs/"), 2, "the configuration and one layer");
    assert_eq!(store.usage().extractions, 3);
}

#[tokio::test]
async fn basic_credentials_are_sent_when_asked_for() {
    need_root!();
    let (home, registry) = (Home::new(), Stub::start().await);
    registry.change(|state| state.auth = Auth::Basic("me", "pass:word"));
    let reference = registry.push("a", "v1", &built("a"));
    let config = with_credentials(&home, &registry, &[("good", "me", "pass:word"), ("bad", "me", "guess")]);
    let store = ImageStore::open(config).await.unwrap();
    store.ensure("good", &reference, |_| {}).await.unwrap();
    let log = registry.log();
    assert!(log.iter().skip(1).all(|line| line.contains("+auth")), "{log:?}");
    for (atespace, says) in [("bad", "were not accepted"), ("nobody", "has no credentials")] {
        let error = store.ensure(atespace, &reference, |_| {}).await.unwrap_err();
        assert!(matches!(error, ImageError::Denied { .. }), "{error}");
        let text = error.to_string();
        for part in [atespace, says, "auth.json", "authentication required"] {
            assert!(text.contains(part), "`{part}` is not in: {text}");
        }
        assert!(!text.contains("guess"));
    }
}

#[tokio::test]
async fn tokens_are_fetched_with_and_without_credentials() {
    need_root!();
    let (home, registry) = (Home::new(), Stub::start().await);
    registry.change(|state| {
        state.auth = Auth::Bearer(vec![("", "", "open/image"), ("me", "secret", "team/private")]);
    });
    let open = registry.push("open/image", "v1", &built("open"));
    let private = registry.push("team/private", "v1", &built("private"));
    let config = with_credentials(&home, &registry, &[("team", "me", "secret"), ("typo", "me", "secert")]);
    let store = ImageStore::open(config).await.unwrap();
    store.ensure("anyone", &open, |_| {}).await.unwrap();
    assert_eq!(pulls(&registry.log(), "/token"), 1, "one token serves all requests");
    store.ensure("team", &private, |_| {}).await.unwrap();
    assert!(registry.log().iter().any(|line| line == "GET /token +auth"));
    for atespace in ["anyone", "typo"] {
        let error = store.ensure(atespace, &private, |_| {}).await.unwrap_err();
        assert!(matches!(error, ImageError::Denied { .. }), "{error}");
    }
}

/// P6: what tenant A pulled privately is on the node; B gets at it by none of its means.
#[tokio::test]
async fn a_tenant_cannot_run_the_private_digest_of_another() {
    need_root!();
    let (home, registry, evil) = (Home::new(), Stub::start().await, Stub::start().await);
    registry.change(|state| {
        state.auth =
            Auth::Bearer(vec![("a", "pa", "a/private"), ("b", "pb", "b/own"), ("c", "pc", "a/private")]);
    });
    let secret = built("secret");
    registry.push("a/private", "v1", &secret);
    let pinned = registry.reference(&format!("a/private@{}", secret.digest()));
    let config = with_credentials(&home, &registry, &[("a", "a", "pa"), ("b", "b", "pb"), ("c", "c", "pc")]);
    let store = ImageStore::open(config).await.unwrap();
    store.ensure("a", &pinned, |_| {}).await.unwrap();

    // By its own name.
    let error = store.ensure("b", &pinned, |_| {}).await.unwrap_err();
    assert!(matches!(error, ImageError::Denied { .. }), "{error}");
    assert!(store.resolve("b", &pinned).await.is_err());
    // By the name of another repository of the same registry.
    let own = registry.reference(&format!("b/own@{}", secret.digest()));
    let error = store.ensure("b", &own, |_| {}).await.unwrap_err();
    assert!(matches!(error, ImageError::NotFound { .. }), "{error}");
    // By a registry of its own that claims to have it; and that has the manifest, which is no secret, but not the rest.
    evil.change(|state| state.claims_everything = true);
    let claimed = evil.reference(&format!("x@{}", secret.digest()));
    assert!(store.ensure("b", &claimed, |_| {}).await.is_err());
    evil.change(|state| {
        let manifests = state.manifests.entry("x".into()).or_default();
        manifests.insert(secret.digest().to_string(), secret.manifest.clone());
        let config = secret.blobs.last().unwrap().clone();
        state.blobs.entry("x".into()).or_default().insert(Digest::of(&config).to_string(), config);
    });
    let error = store.ensure("b", &claimed, |_| {}).await.unwrap_err();
    assert!(matches!(error, ImageError::NotFound { .. }), "{error}");
    // By a configuration that lists the private layers, with blobs of its own: in a registry and in a layout.
    let junk = compress(&Layer::default().file("junk", b"").finish(), Compression::Gzip);
    let lying = assemble(&secret.config, vec![junk.clone(), junk]);
    let error = store.ensure("b", &registry.push("b/own", "lie", &lying), |_| {}).await.unwrap_err();
    assert!(matches!(error, ImageError::Corrupt { .. }), "{error}");
    let error = store.ensure("b", &home.layout("lie", &lying), |_| {}).await.unwrap_err();
    assert!(matches!(error, ImageError::Corrupt { .. }), "{error}");

    // C has a right of its own: one check, nothing pulled, nothing unpacked.
    registry.log();
    let image = store.ensure("c", &pinned, |_| {}).await.unwrap();
    assert!(image.rootfs.join("secret").exists());
    let log = registry.log();
    assert_eq!(pulls(&log, "/v2/"), 0, "{log:?}");
    assert_eq!(store.usage().extractions, 2);
    // A's credentials did not leak into requests to another host.
    assert!(!evil.log().iter().any(|line| line.contains("+auth")));
}

#[tokio::test]
async fn a_registry_vouches_for_its_own_blobs_and_others_prove_theirs() {
    need_root!();
    let (home, registry, other) = (Home::new(), Stub::start().await, Stub::start().await);
    let image = built("a");
    let first = registry.push("one", "v1", &image);
    let store = home.open().await;
    ensure(&store, &first).await.unwrap();
    let pulled = store.usage().pulled_bytes;
    registry.log();
    ensure(&store, &registry.push("two", "v1", &image)).await.unwrap();
    let log = registry.log();
    assert_eq!(log.iter().filter(|line| line.starts_with("HEAD /v2/two/blobs/")).count(), 2, "{log:?}");
    assert_eq!(store.usage().pulled_bytes, pulled);
    ensure(&store, &other.push("one", "v1", &image)).await.unwrap();
    let usage = store.usage();
    assert_eq!(
        (usage.pulled_bytes, usage.extractions),
        (pulled * 2, 2),
        "pulled as proof, not unpacked again"
    );
    // Packed differently it is the same layer, if it unpacks to the same.
    let tars = [
        (Layer::default().file("base", &vec![9; 300_000]).finish(), Compression::Zstd),
        (Layer::default().file("a", b"a").finish(), Compression::None),
    ];
    ensure(&store, &other.push("packed", "v1", &image_of(&tars))).await.unwrap();
    let usage = store.usage();
    assert_eq!((usage.images, usage.layers, usage.extractions), (2, 2, 2));
}

fn image_of(tars: &[(Vec<u8>, Compression)]) -> Built {
    crate::support::image(tars, &json!({}))
}

#[tokio::test]
async fn rights_are_checked_again_and_survive_an_outage_but_not_a_refusal() {
    need_root!();
    let (home, registry) = (Home::new(), Stub::start().await);
    let image = built("a");
    registry.push("a", "v1", &image);
    let pinned = registry.reference(&format!("a@{}", image.digest()));
    let mut config = home.config();
    config.right_ttl = Duration::ZERO;
    config.registry.attempts = 2;
    let store = ImageStore::open(config.clone()).await.unwrap();
    ensure(&store, &pinned).await.unwrap();
    registry.log();
    ensure(&store, &pinned).await.unwrap();
    let head = format!("HEAD /v2/a/manifests/{}", image.digest());
    assert_eq!(registry.log(), [head.as_str()]);
    let down = || ("manifests", Fault::Answer(503, vec![], String::new()));
    registry.change(|state| state.faults.extend([down(), down()]));
    ensure(&store, &pinned).await.unwrap();
    // Also after a restart of the node, but not for someone else.
    drop(store);
    let store = ImageStore::open(config).await.unwrap();
    registry.change(|state| state.faults.extend([down(), down(), down(), down()]));
    ensure(&store, &pinned).await.unwrap();
    assert!(matches!(store.ensure("other", &pinned, |_| {}).await, Err(ImageError::Registry { .. })));
    // Gone, and from then on an outage does not help either.
    let gone = registry.state.lock().unwrap().manifests.remove("a").unwrap();
    assert!(matches!(ensure(&store, &pinned).await, Err(ImageError::NotFound { .. })));
    registry.change(|state| state.faults.extend([down(), down()]));
    assert!(matches!(ensure(&store, &pinned).await, Err(ImageError::Registry { .. })));
    registry.change(|state| drop(state.manifests.insert("a".into(), gone)));
    ensure(&store, &pinned).await.unwrap();
}

#[tokio::test]
async fn a_layout_that_was_moved_away_is_an_outage_and_a_changed_one_a_refusal() {
    need_root!();
    let home = Home::new();
    let reference = home.layout("l", &built("a"));
    let store = home.open().await;
    let pinned = ensure(&store, &reference).await.unwrap().pinned_reference;
    std::fs::rename(home.path("l"), home.path("away")).unwrap();
    ensure(&store, &pinned).await.unwrap();
    assert!(store.ensure("other", &pinned, |_| {}).await.is_err(), "who never saw it has no right to it");
    std::fs::rename(home.path("away"), home.path("l")).unwrap();
    let digest = pinned.pinned().unwrap();
    std::fs::write(home.path("l/blobs/sha256").join(digest.hex()), b"{}").unwrap();
    assert!(matches!(ensure(&store, &pinned).await, Err(ImageError::Corrupt { .. })));
}

#[tokio::test]
async fn a_pull_goes_on_where_it_broke_off() {
    need_root!();
    let (home, registry) = (Home::new(), Stub::start().await);
    let mut noise = vec![0_u8; 400_000];
    noise.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at.wrapping_mul(2_654_435_761) >> 13) as u8);
    let image = image_of(&[(Layer::default().file("f", &noise).finish(), Compression::None)]);
    let layer = Digest::of(&image.blobs[0]).to_string();
    let reference = registry.push("a", "v1", &image);
    registry.change(|state| {
        let name: &'static str = layer.clone().leak();
        state.faults.extend([(name, Fault::Cut(100_000)), (name, Fault::Cut(50_000))]);
        state.faults.push_back((name, Fault::Answer(502, vec![], String::new())));
    });
    let store = home.open().await;
    ensure(&store, &reference).await.unwrap();
    let log: Vec<_> = registry.log().into_iter().filter(|line| line.contains(&layer)).collect();
    assert_eq!(log.len(), 4, "{log:?}");
    assert!(!log[0].contains("bytes="), "{log:?}");
    assert!(log[1..].iter().all(|line| line.contains("bytes=")), "{log:?}");

    // A registry that knows no ranges: from the beginning, and right all the same.
    registry.change(|state| {
        state.ignores_ranges = true;
        state.faults.push_back((layer.clone().leak(), Fault::Cut(100_000)));
    });
    let home = Home::new();
    let store = home.open().await;
    let local = ensure(&store, &reference).await.unwrap();
    assert_eq!(std::fs::read(local.rootfs.join("f")).unwrap(), noise);
}

/// Name, faults by part of the path, and what the error says.
type Case = (&'static str, Vec<(&'static str, Fault)>, &'static str);

#[tokio::test]
async fn what_a_registry_does_wrong_is_said() {
    need_root!();
    let (home, registry) = (Home::new(), Stub::start().await);
    let image = built("a");
    let reference = registry.push("a", "v1", &image);
    let mut config = home.config();
    config.registry.attempts = 2;
    config.registry.idle_timeout = Duration::from_millis(200);
    let store = ImageStore::open(config).await.unwrap();
    let answer = |status, headers: &[(&'static str, &str)]| {
        let headers = headers.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        Fault::Answer(status, headers, r#"{"errors":[{"code":"X","message":"because"}]}"#.into())
    };
    let layer: &'static str = Digest::of(&image.blobs[0]).to_string().leak();
    let mut flipped = image.blobs[0].clone();
    flipped[100] ^= 1;
    let cases: Vec<Case> = vec![
        ("403", vec![("manifests", answer(403, &[]))], "may not pull"),
        ("418", vec![("manifests", answer(418, &[]))], "because"),
        (
            "500 twice",
            vec![("manifests", answer(500, &[])), ("manifests", answer(500, &[]))],
            "it answered 500",
        ),
        ("429 for long", vec![("manifests", answer(429, &[("retry-after", "3600")]))], "another 3600 s"),
        ("hangs twice", vec![("manifests", Fault::Hang), ("manifests", Fault::Hang)], "no answer within"),
        ("other manifest", vec![("manifests", Fault::Replace(b"\"x\"".to_vec()))], "not an image manifest"),
        ("huge manifest", vec![("manifests", Fault::Replace(vec![b' '; 5 << 20]))], "4194304 bytes"),
        ("flipped layer", vec![(layer, Fault::Replace(flipped))], "corrupt"),
        (
            "longer layer",
            vec![(layer, Fault::Replace([image.blobs[0].as_slice(), b"x"].concat()))],
            "more than the",
        ),
        (
            "shorter layer",
            vec![(layer, Fault::Replace(image.blobs[0][..50].into())), (layer, answer(404, &[]))],
            "404",
        ),
        (
            "redirect to metadata",
            vec![(layer, answer(307, &[("location", "http://169.254.169.254/latest?token=t")]))],
            "`http://169.254.169.254/latest`: only https",
        ),
        (
            "redirect to a file",
            vec![(layer, answer(302, &[("location", "file:///etc/passwd")]))],
            "only https",
        ),
        ("redirect to nowhere", vec![(layer, answer(302, &[]))], "without saying where"),
        (
            "token service inside",
            vec![(
                "manifests",
                answer(401, &[("www-authenticate", "Bearer realm=\"http://169.254.169.254/token\"")]),
            )],
            "not at an https URL",
        ),
    ];
    for (name, faults, says) in cases {
        registry.change(|state| state.faults = faults.into());
        let error = ensure(&store, &reference).await.unwrap_err().to_string();
        assert!(error.contains(says), "{name}: `{says}` is not in: {error}");
        assert!(!error.contains("token=t"), "{name}: {error}");
        assert!(
            home.contents().iter().all(|path| !path.starts_with("tmp/")),
            "{name}: {:?}",
            home.contents()
        );
    }
    registry.change(|state| state.faults.clear());
    let circle = (0..9).map(|_| (layer, answer(307, &[("location", &format!("/v2/a/blobs/{layer}"))])));
    registry.change(|state| state.faults = circle.collect());
    assert!(ensure(&store, &reference).await.unwrap_err().to_string().contains("more than 5 times"));
    registry.change(|state| state.faults = [("manifests", answer(429, &[("retry-after", "0")]))].into());
    ensure(&store, &reference).await.expect("one more attempt after a short pause");

    let error = ensure(&store, &registry.reference("a:nope")).await.unwrap_err();
    assert!(matches!(error, ImageError::NotFound { .. }), "{error}");
    assert!(error.to_string().contains("manifest unknown"), "{error}");
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let unreachable: Reference = format!("{nobody}/a:v1").parse().unwrap();
    let error = ensure(&store, &unreachable).await.unwrap_err().to_string();
    assert!(error.contains(&nobody.to_string()) && error.contains("refused"), "{error}");
}

#[tokio::test]
async fn redirected_blobs_are_followed_without_the_credentials() {
    need_root!();
    let (home, registry, storage) = (Home::new(), Stub::start().await, Stub::start().await);
    registry.change(|state| {
        state.auth = Auth::Basic("me", "secret");
        state.blobs_at = Some(storage.address);
    });
    let image = built("a");
    let reference = registry.push("a", "v1", &image);
    storage.push("a", "v1", &image);
    let config = with_credentials(&home, &registry, &[("tenant", "me", "secret")]);
    let store = ImageStore::open(config).await.unwrap();
    ensure(&store, &reference).await.unwrap();
    let log = storage.log();
    assert_eq!(log.len(), 3);
    assert!(!log.iter().any(|line| line.contains("+auth")), "{log:?}");
}

#[tokio::test]
async fn plain_http_is_spoken_on_loopback_only() {
    need_root!();
    let home = Home::new();
    let mut config = home.config();
    config.registry.attempts = 1;
    let store = ImageStore::open(config).await.unwrap();
    let registry = Stub::start().await;
    // Another loopback address is not in the list, so it is spoken to in TLS, which the stub does not understand.
    let reference = format!("127.0.0.2:{}/a:v1", registry.address.port()).parse().unwrap();
    assert!(ensure(&store, &reference).await.is_err());
    assert_eq!(registry.log(), [""; 0]);
}

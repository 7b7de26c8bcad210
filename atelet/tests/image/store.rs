// SPDX-License-Identifier: Apache-2.0
//! One extraction whatever the concurrency, crashes, restarts, collection.
use std::collections::HashSet;
use std::time::Instant;

use atelet::image::{ImageError, ImageStore};

use crate::support::*;

fn simple(name: &str) -> Built {
    gzip_image(vec![Layer::default().file(name, name.as_bytes()).finish()])
}

#[tokio::test(flavor = "multi_thread")]
async fn eight_callers_cost_one_extraction() {
    need_root!();
    let home = Home::new();
    let shared = Layer::default().file("shared", &vec![3; 2 << 20]).finish();
    let own = |name: &str| Layer::default().file(name, b"").finish();
    // Four of one image, by two names, and four images that share a layer.
    let one = gzip_image(vec![shared.clone(), own("one")]);
    let mut references = vec![home.layout("one", &one); 4];
    for name in ["a", "b", "c", "d"] {
        references.push(home.layout(name, &gzip_image(vec![shared.clone(), own(name)])));
    }
    let store = home.open().await;
    let tasks: Vec<_> = references
        .into_iter()
        .map(|reference| {
            let store = store.clone();
            tokio::spawn(async move { ensure(&store, &reference).await })
        })
        .collect();
    for task in tasks {
        let image = task.await.unwrap().unwrap();
        assert_eq!(std::fs::read(image.rootfs.join("shared")).unwrap().len(), 2 << 20);
    }
    let usage = store.usage();
    assert_eq!((usage.images, usage.layers, usage.extractions), (5, 6, 6));
}

#[tokio::test]
async fn a_caller_that_goes_away_does_not_stop_the_work() {
    need_root!();
    let home = Home::new();
    let reference = home.layout("l", &simple("f"));
    let store = home.open().await;
    {
        let work = ensure(&store, &reference);
        tokio::pin!(work);
        // Polled once, which starts the task, then dropped.
        assert!(futures::poll!(&mut work).is_pending());
    }
    ensure(&store, &reference).await.unwrap();
    assert_eq!(store.usage().extractions, 1);
}

#[tokio::test]
async fn the_second_actor_of_a_large_image_pays_nothing() {
    need_root!();
    let home = Home::new();
    let mut large = Layer::default();
    for number in 0..4_000 {
        large = large.file(&format!("d{}/f{number}", number % 100), b"x");
    }
    let large = home.layout("large", &gzip_image(vec![large.finish()]));
    let small = home.layout("small", &simple("f"));
    let store = home.open().await;
    let mut pinned = Vec::new();
    for reference in [&large, &small] {
        pinned.push(ensure(&store, reference).await.unwrap().pinned_reference);
    }
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..40 {
        for (which, reference) in pinned.iter().enumerate() {
            let start = Instant::now();
            ensure(&store, reference).await.unwrap();
            times[which].push(start.elapsed());
        }
    }
    let [large, small] = times.map(|mut times| {
        times.sort();
        times[20]
    });
    eprintln!("second use: 4,000 files {large:?}, one file {small:?}");
    assert!(large < small * 3, "{large:?} against {small:?}");
    assert_eq!(store.usage().extractions, 2);
}

#[tokio::test]
async fn a_restart_keeps_images_and_a_reboot_mounts_them_again() {
    need_root!();
    let home = Home::new();
    let reference = home.layout("l", &simple("f"));
    let store = home.open().await;
    let image = ensure(&store, &reference).await.unwrap();
    let rootfs = image.rootfs.clone();
    let second = ImageStore::open(home.config()).await;
    assert!(matches!(second, Err(ImageError::InUse { .. })), "two stores in one directory");
    drop((image, store));

    // The process again: the mount is still there and stays.
    let before = std::fs::metadata(&rootfs).unwrap();
    let store = home.open().await;
    let after = std::fs::metadata(&rootfs).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::dev(&before), std::os::unix::fs::MetadataExt::dev(&after));
    drop(store);

    // The machine again: mounts are gone, files are not.
    home.unmount_all();
    assert!(!rootfs.join("f").exists());
    let store = home.open().await;
    assert!(rootfs.join("f").exists());
    ensure(&store, &reference).await.unwrap();
    assert_eq!(store.usage().extractions, 0);

    // Unmounted behind our back.
    home.unmount_all();
    assert!(ensure(&store, &reference).await.unwrap().rootfs.join("f").exists());
}

#[tokio::test]
async fn what_a_crash_leaves_is_dropped() {
    need_root!();
    let home = Home::new();
    let good = home.layout("good", &simple("good"));
    let lost = home.layout("lost", &simple("lost"));
    let store = home.open().await;
    ensure(&store, &good).await.unwrap();
    let lost_image = ensure(&store, &lost).await.unwrap();
    let lost_digest = lost_image.digest.clone();
    drop((store, lost_image));
    let kept = home.path("store");
    // In the middle of an extraction; renamed but not recorded; recorded but the content is gone; torn record; a mount
    // of an image that is not known any more.
    std::fs::create_dir_all(kept.join("tmp/7/half/unpacked")).unwrap();
    let unrecorded = kept.join("layers").join("0".repeat(64));
    std::fs::create_dir(&unrecorded).unwrap();
    std::fs::write(unrecorded.join("f"), b"").unwrap();
    std::fs::write(kept.join("images").join(format!("{}.json", "1".repeat(64))), b"{\"dig").unwrap();
    for entry in std::fs::read_dir(kept.join("layers")).unwrap() {
        let path = entry.unwrap().path();
        if path.join("lost").exists() {
            std::fs::remove_dir_all(path).unwrap();
        }
    }
    let stray = kept.join("mounts").join("2".repeat(64));
    std::fs::create_dir(&stray).unwrap();
    nix::mount::mount(Some("x"), &stray, Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>).unwrap();

    let store = home.open().await;
    let usage = store.usage();
    assert_eq!((usage.images, usage.layers), (1, 1));
    assert_eq!(home.mounts().len(), 1, "{:?}", home.mounts());
    let contents = home.contents();
    assert_eq!(contents.len(), 4, "{contents:?}");
    assert!(!contents.iter().any(|name| name.contains(lost_digest.hex())), "{contents:?}");
    // What was lost is made again.
    assert!(ensure(&store, &lost).await.unwrap().rootfs.join("lost").exists());
}

#[tokio::test]
async fn collection_takes_the_oldest_and_never_what_is_used() {
    need_root!();
    let home = Home::new();
    let store = home.open().await;
    let base = Layer::default().file("base", &vec![1; 1 << 20]).finish();
    let mut images = Vec::new();
    for name in ["first", "second", "third", "fourth"] {
        let built = gzip_image(vec![base.clone(), Layer::default().file(name, &vec![2; 1 << 20]).finish()]);
        images.push(ensure(&store, &home.layout(name, &built)).await.unwrap());
    }
    let full = store.usage().bytes;
    let digests: Vec<_> = images.iter().map(|image| image.digest.clone()).collect();
    let collect = async |in_use: &[usize], limit: u64, dry_run: bool| {
        let in_use: HashSet<_> = in_use.iter().map(|&index| digests[index].clone()).collect();
        store.collect(in_use, limit, dry_run).await.unwrap()
    };
    assert_eq!(collect(&[], 0, false).await.images, [], "all are held");
    assert_eq!(collect(&[], full, false).await.layers, [], "there is room");
    let held = images.remove(2);
    let again = images[0].pinned_reference.clone();
    images.clear();
    // The first becomes the most recently used.
    drop(ensure(&store, &again).await.unwrap());

    let dry = collect(&[3], full - 1, true).await;
    assert_eq!((dry.images, dry.layers.len()), (vec![digests[1].clone()], 1));
    assert_eq!(store.usage().images, 4);
    let real = collect(&[3], full - 1, false).await;
    assert_eq!(real.images, [digests[1].clone()]);
    assert!(real.bytes > 1 << 20 && real.bytes < 2 << 20, "{}", real.bytes);
    assert_eq!(home.mounts().len(), 3);

    let all = collect(&[3], 0, false).await;
    assert_eq!(all.images, [digests[0].clone()], "one is held, one is in use");
    assert!(held.rootfs.join("base").exists() && held.rootfs.join("third").exists());
    drop(held);
    let rest = collect(&[], 0, false).await;
    assert_eq!((rest.images.len(), rest.layers.len()), (2, 3), "with the last image the shared layer goes");
    assert_eq!((home.contents(), home.mounts()), (vec![], vec![]));
    let usage = store.usage();
    assert_eq!((usage.images, usage.layers, usage.bytes, usage.inodes), (0, 0, 0, 0));
    assert!(ensure(&store, &again).await.is_ok(), "and comes back when it is asked for");
}

#[tokio::test]
async fn a_busy_mount_is_kept() {
    need_root!();
    let home = Home::new();
    let reference = home.layout("l", &simple("f"));
    let store = home.open().await;
    let image = ensure(&store, &reference).await.unwrap();
    let open = std::fs::File::open(image.rootfs.join("f")).unwrap();
    drop(image);
    assert_eq!(store.collect(HashSet::new(), 0, false).await.unwrap().images, []);
    assert!(ensure(&store, &reference).await.unwrap().rootfs.join("f").exists());
    drop(open);
    assert_eq!(store.collect(HashSet::new(), 0, false).await.unwrap().images.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn collecting_in_a_loop_never_hurts_who_is_working() {
    need_root!();
    let home = Home::new();
    let base = Layer::default().file("base", b"base").finish();
    let references: Vec<_> = (0..4)
        .map(|number| {
            let own = Layer::default().file("own", format!("{number}").as_bytes()).finish();
            home.layout(&format!("l{number}"), &gzip_image(vec![base.clone(), own]))
        })
        .collect();
    let store = home.open().await;
    let stop = tokio_util::sync::CancellationToken::new();
    let collector = {
        let (store, stop) = (store.clone(), stop.clone());
        tokio::spawn(async move {
            let mut removed = 0;
            while !stop.is_cancelled() {
                removed += store.collect(HashSet::new(), 0, false).await.unwrap().images.len();
            }
            removed
        })
    };
    let workers: Vec<_> = references
        .into_iter()
        .enumerate()
        .map(|(number, reference)| {
            let store = store.clone();
            tokio::spawn(async move {
                for _ in 0..15 {
                    let image = ensure(&store, &reference).await.unwrap();
                    let own = std::fs::read_to_string(image.rootfs.join("own")).unwrap();
                    assert_eq!(own, number.to_string());
                    assert_eq!(std::fs::read(image.rootfs.join("base")).unwrap(), b"base");
                }
            })
        })
        .collect();
    for worker in workers {
        worker.await.unwrap();
    }
    stop.cancel();
    assert!(collector.await.unwrap() > 0, "the collector removed nothing, so this proved nothing");
}

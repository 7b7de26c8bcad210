// SPDX-License-Identifier: Apache-2.0
//! Layers and layouts that mean harm: each is refused with a message that names the entry, and nothing of it stays.
use std::time::Duration;

use atelet::image::ImageError;
use serde_json::json;
use tar::EntryType;

use crate::support::*;

/// The layer is refused; the message contains all of `says`; nothing is left; nothing appeared beside the store.
async fn refused(name: &str, layer: Vec<u8>, says: &[&str]) {
    let home = Home::new();
    let reference = home.layout("layout", &gzip_image(vec![layer]));
    let before = names(&home);
    let store = home.open().await;
    let error = match ensure(&store, &reference).await {
        Err(error) => error.to_string(),
        Ok(image) => panic!("{name} was accepted: {}", image.rootfs.display()),
    };
    for part in says {
        assert!(error.contains(part), "{name}: `{part}` is not in: {error}");
    }
    assert_eq!(home.contents(), [""; 0], "{name} left something behind");
    assert_eq!(home.mounts(), [""; 0], "{name}");
    let mut after = names(&home);
    after.retain(|name| name != "store");
    assert_eq!(after, before, "{name} wrote beside the store");
    // The store works on.
    let good = home.layout("good", &gzip_image(vec![Layer::default().file("ok", b"").finish()]));
    ensure(&store, &good).await.unwrap();
}

fn names(home: &Home) -> Vec<String> {
    let entries = std::fs::read_dir(home.dir.path()).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[tokio::test]
async fn nothing_gets_out_of_the_layer() {
    need_root!();
    let layer = Layer::default;
    let attr = Attr::default;
    let deep = format!("{}x", "../".repeat(40));
    let cases = [
        ("dot-dot", layer().file("a/../../escape", b"x").finish(), vec!["a/../../escape", "`..`"]),
        ("dot-dot first", layer().file("../escape", b"x").finish(), vec!["../escape"]),
        ("dot-dot absolute", layer().file("/../../escape", b"x").finish(), vec!["/../../escape"]),
        (
            "absolute link as parent",
            layer().symlink("etc", "/etc").file("etc/passwd", b"x").finish(),
            vec!["etc/passwd", "`etc` is a link that is absolute or leads out"],
        ),
        (
            "link out as parent",
            layer().dir("a").symlink("a/b", &deep).file("a/b/escape", b"x").finish(),
            vec!["a/b/escape", "leads out"],
        ),
        (
            "link out as parent of a new directory",
            layer().symlink("b", "..").file("b/new/escape", b"x").finish(),
            vec!["b/new/escape", "leads out"],
        ),
        (
            "link through proc",
            layer().symlink("p", "/proc/self/cwd").file("p/escape", b"x").finish(),
            vec!["p/escape", "leads out"],
        ),
        (
            "links in a circle",
            layer().symlink("x", "y").symlink("y", "x").file("x/f", b"").finish(),
            vec!["x/f", "itself"],
        ),
        (
            "link swapped in for a directory",
            layer().dir("d").file("d/one", b"").symlink("d", "..").file("d/two", b"").finish(),
            vec!["d/two", "leads out"],
        ),
        (
            "hard link out",
            layer().hardlink("shadow", "../../../../etc/shadow").finish(),
            vec!["shadow", "`..`"],
        ),
        (
            "hard link to what is not there",
            layer().hardlink("shadow", "/etc/shadow").finish(),
            vec!["shadow", "`etc/shadow`, which the layer does not have"],
        ),
        (
            "hard link through a link",
            layer().symlink("e", "/etc").hardlink("shadow", "e/shadow").finish(),
            vec!["shadow", "leads out"],
        ),
        ("hard link to a directory", layer().dir("d").hardlink("l", "d").finish(), vec!["directory `d`"]),
        (
            "hard link to a whiteout",
            layer().file(".wh.gone", b"").hardlink("l", "gone").finish(),
            vec!["which the layer does not have"],
        ),
        ("hard link to itself", layer().file("l", b"").hardlink("l", "l").finish(), vec!["to itself"]),
        (
            "device",
            layer().raw(EntryType::Block, b"sda", b"", b"", attr()).finish(),
            vec!["`sda`", "device node"],
        ),
        (
            "device that would be a whiteout",
            layer().raw(EntryType::Char, b"etc/passwd", b"", b"", attr()).finish(),
            vec!["etc/passwd", "device node"],
        ),
        (
            "attributes of the overlay",
            layer().pax(&[("SCHILY.xattr.trusted.overlay.redirect", b"/")]).dir("d").finish(),
            vec!["`d`", "trusted.overlay.redirect"],
        ),
        (
            "unknown type",
            layer().raw(EntryType::new(b'Z'), b"odd", b"", b"", attr()).finish(),
            vec!["`odd`", "'Z'"],
        ),
        ("whiteout of the parent", layer().file("a/.wh...", b"").finish(), vec!["a/.wh...", "nothing"]),
        ("whiteout of nothing", layer().file(".wh.", b"").finish(), vec![".wh.", "nothing"]),
        ("file as parent", layer().file("f", b"").file("f/x", b"").finish(), vec!["f/x", "not a directory"]),
        ("root as a file", layer().file("./", b"").file(".", b"").finish(), vec!["root"]),
        ("zero byte", layer().pax(&[("path", b"a\0b")]).file("x", b"").finish(), vec!["zero byte"]),
        ("long name", layer().file(&"n".repeat(300), b"").finish(), vec!["longer than 255"]),
        ("long path", layer().file(&"n/".repeat(2500), b"").finish(), vec!["longer than 4000"]),
        (
            "negative owner",
            layer().pax(&[("uid", b"4294967295")]).file("x", b"").finish(),
            vec!["uid 4294967295"],
        ),
    ];
    for (name, tar, says) in cases {
        refused(name, tar, &says).await;
    }
}

#[tokio::test]
async fn broken_archives_are_refused() {
    need_root!();
    let whole = Layer::default().file("first", b"1").file("second", &[7; 3000]).finish();
    refused("truncated in data", whole[..2000].to_vec(), &["second", "middle of a member"]).await;
    refused("truncated in a header", whole[..1300].to_vec(), &["first", "middle of a header"]).await;
    let mut flipped = whole.clone();
    flipped[1030] ^= 1;
    refused("broken checksum", flipped, &["first", "checksum"]).await;
    refused("not an archive", vec![b'x'; 5000], &["checksum"]).await;
}

#[tokio::test]
async fn bombs_stop_at_the_limits() {
    need_root!();
    let home = Home::new();
    let mut config = home.config();
    config.limits.layer_bytes = 1 << 20;
    config.limits.layer_inodes = 500;
    config.limits.image_bytes = 4 << 20;
    let store = atelet::image::ImageStore::open(config).await.unwrap();
    let refuse = async |name: &str, layer: Vec<u8>, says: &str| {
        let reference = home.layout(name, &gzip_image(vec![layer]));
        let error = ensure(&store, &reference).await.unwrap_err();
        assert!(matches!(error, ImageError::TooLarge { .. } | ImageError::Refused { .. }), "{name}: {error}");
        assert!(error.to_string().contains(says), "{name}: {error}");
        assert_eq!(home.contents(), [""; 0], "{name}");
    };
    refuse("zeros", Layer::default().file("bomb", &vec![0; 8 << 20]).finish(), "1048576 bytes").await;
    let after_the_end = [Layer::default().file("small", b"").finish(), vec![0; 8 << 20]].concat();
    refuse("zeros-after-the-end", after_the_end, "1048576 bytes uncompressed").await;
    let mut entries = Layer::default();
    for number in 0..600 {
        entries = entries.file(&format!("f{number}"), b"");
    }
    refuse("entries", entries.finish(), "500 files").await;
    let mut same = Layer::default();
    for _ in 0..600 {
        same = same.file("one", b"");
    }
    refuse("one-file-many-times", same.finish(), "500 files").await;
    refuse("deep", Layer::default().file(&"d/".repeat(600), b"").file("x", b"").finish(), "500 files").await;
    let hole = Layer::default()
        .pax(&[("GNU.sparse.size", b"1099511627776"), ("GNU.sparse.map", b""), ("GNU.sparse.name", b"hole")])
        .file("x", b"")
        .finish();
    refuse("hole", hole, "`hole`").await;
    let long = Layer::default().raw(EntryType::GNULongName, b"x", b"", &vec![b'a'; 1 << 19], Attr::default());
    refuse("long-name", long.finish(), "524288 bytes").await;

    let mut noise = vec![0; 5 << 20];
    let mut state = 1_u32;
    for byte in &mut noise {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (state >> 24) as u8;
    }
    refuse("pulled-bytes", Layer::default().file("noise", &noise).finish(), "4194304 bytes compressed").await;
}

#[tokio::test]
async fn unpacking_has_a_deadline() {
    need_root!();
    let home = Home::new();
    let mut config = home.config();
    config.limits.layer_time = Duration::ZERO;
    let store = atelet::image::ImageStore::open(config).await.unwrap();
    let layer = Layer::default().file("f", &vec![1; 100_000]).finish();
    let error = ensure(&store, &home.layout("l", &gzip_image(vec![layer]))).await.unwrap_err();
    assert!(matches!(error, ImageError::TimedOut { .. }), "{error}");
    assert_eq!(home.contents(), [""; 0]);
}

#[tokio::test]
async fn content_that_is_not_what_it_says_is_corrupt() {
    need_root!();
    let home = Home::new();
    let store = home.open().await;
    let tar = Layer::default().file("f", &vec![5; 20_000]).finish();
    let built = gzip_image(vec![tar.clone()]);
    let blob = home.path("layout/blobs/sha256").join(atelet::image::Digest::of(&built.blobs[0]).hex());
    let reference = home.layout("layout", &built);
    let fails = async |says: &str| {
        let error = ensure(&store, &reference).await.unwrap_err();
        assert!(matches!(error, ImageError::Corrupt { .. }), "{error}");
        assert!(error.to_string().contains(says), "`{says}` is not in: {error}");
        assert_eq!(home.contents(), [""; 0]);
    };
    let mut flipped = built.blobs[0].clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 4;
    std::fs::write(&blob, &flipped).unwrap();
    fails("its content has digest").await;
    std::fs::write(&blob, &built.blobs[0][..30]).unwrap();
    fails("it has 30 bytes").await;
    std::fs::write(&blob, [built.blobs[0].as_slice(), b"more"].concat()).unwrap();
    fails("longer than").await;

    // Intact, but not the layer that the configuration names.
    let mut config = built.config.clone();
    config["rootfs"]["diff_ids"] = json!([atelet::image::Digest::of(b"another layer")]);
    let lying = assemble(&config, vec![built.blobs[0].clone()]);
    let error = ensure(&store, &home.layout("lying", &lying)).await.unwrap_err();
    assert!(matches!(error, ImageError::Corrupt { .. }), "{error}");
    assert!(error.to_string().contains("uncompressed it has digest"), "{error}");

    // The manifest itself, and the configuration.
    let reference = home.layout("manifest", &built);
    let path = home.path("manifest/blobs/sha256").join(built.digest().hex());
    std::fs::write(&path, b"{}").unwrap();
    let error = ensure(&store, &reference).await.unwrap_err().to_string();
    assert!(error.contains(&built.digest().to_string()) && error.contains("corrupt"), "{error}");
    assert_eq!(home.contents(), [""; 0]);
}

#[tokio::test]
async fn layouts_that_are_none_or_lead_elsewhere_are_refused() {
    need_root!();
    let home = Home::new();
    let store = home.open().await;
    let built = gzip_image(vec![Layer::default().file("f", b"").finish()]);
    let reference = home.layout("good", &built);
    let fails = async |reference: &str, says: &str| {
        let error = ensure(&store, &reference.parse().unwrap()).await.unwrap_err().to_string();
        assert!(error.contains(says), "{reference}: {error}");
    };
    let at = |name: &str| home.path(name).display().to_string();
    fails(&format!("oci:{}", at("none")), "does not exist").await;
    std::fs::create_dir(home.path("empty")).unwrap();
    fails(&format!("oci:{}", at("empty")), "not an OCI image layout").await;
    fails(&format!("oci:{}:nope", at("good")), "no tag `nope`, but: latest").await;
    let unknown = atelet::image::Digest::of(b"?");
    fails(&format!("oci:{}@{unknown}", at("good")), &unknown.to_string()).await;
    write_layout(&home.path("two"), &[("one", &built), ("two", &built)]);
    fails(&format!("oci:{}", at("two")), "name one: one, two").await;
    fails(&format!("oci-archive:{}", at("good")), "cannot be read").await;
    std::fs::write(home.path("text"), b"hello").unwrap();
    fails(&format!("oci-archive:{}", at("text")), "not a plain tar file").await;

    // A manifest that is a link to a file elsewhere, and one that is a FIFO.
    let manifest = home.path("good/blobs/sha256").join(built.digest().hex());
    std::fs::rename(&manifest, home.path("moved")).unwrap();
    std::os::unix::fs::symlink("../../../moved", &manifest).unwrap();
    assert!(ensure(&store, &reference).await.is_err());
    std::fs::remove_file(&manifest).unwrap();
    nix::unistd::mkfifo(&manifest, nix::sys::stat::Mode::S_IRWXU).unwrap();
    fails(&reference.to_string(), "not a regular file").await;
    assert_eq!(home.contents(), [""; 0]);
}

#[tokio::test]
async fn local_images_stay_within_their_roots() {
    need_root!();
    let home = Home::new();
    let built = gzip_image(vec![Layer::default().file("f", b"").finish()]);
    std::fs::create_dir(home.path("allowed")).unwrap();
    let inside = home.layout("allowed/a", &built);
    let outside = home.layout("b", &built);
    std::os::unix::fs::symlink(home.path("b"), home.path("allowed/link")).unwrap();
    let mut config = home.config();
    config.local_roots = vec![home.path("allowed")];
    let store = atelet::image::ImageStore::open(config).await.unwrap();
    ensure(&store, &inside).await.unwrap();
    let linked = format!("oci:{}", home.path("allowed/link").display()).parse().unwrap();
    for reference in [&outside, &linked] {
        let error = ensure(&store, reference).await.unwrap_err();
        assert!(matches!(error, ImageError::OutsideRoots { .. }), "{error}");
        assert!(store.resolve("tenant", reference).await.is_err());
    }
}

#[tokio::test]
async fn a_full_disk_is_said_and_left_as_it_was() {
    need_root!();
    for (option, files) in [("size=6m", vec![8 << 20]), ("nr_inodes=200", vec![1; 400])] {
        let home = Home::new();
        let small = home.path("store");
        std::fs::create_dir(&small).unwrap();
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("small"), &small, Some("tmpfs"), flags, Some(option)).unwrap();
        let mut layer = Layer::default();
        for (number, size) in files.into_iter().enumerate() {
            layer = layer.file(&format!("f{number}"), &vec![7; size]);
        }
        let reference = home.layout("layout", &gzip_image(vec![layer.finish()]));
        let good = home.layout("good", &gzip_image(vec![Layer::default().file("ok", b"").finish()]));
        let store = home.open().await;
        let error = ensure(&store, &reference).await.unwrap_err();
        assert!(matches!(error, ImageError::DiskFull { .. }), "{option}: {error}");
        assert!(error.to_string().contains(&small.display().to_string()), "{error}");
        assert_eq!(home.contents(), [""; 0], "{option}");
        ensure(&store, &good).await.unwrap();
    }
}

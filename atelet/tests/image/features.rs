// SPDX-License-Identifier: Apache-2.0
//! What a sandbox must find in an image, looked at through the mounted overlay.
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use atelet::image::{Digest, ImageError};
use serde_json::json;
use tar::{EntryType, GnuHeader, Header};

use crate::support::*;

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn the_configuration_and_every_compression_are_honoured() {
    need_root!();
    let home = Home::new();
    let run = json!({"User": "agent:video", "Env": ["A=1", "PATH=/bin"], "Entrypoint": ["/bin/agent"],
        "Cmd": ["--serve"], "WorkingDir": "/work", "ExposedPorts": {"8080/tcp": {}, "53/udp": {}}});
    let layers = [
        (Layer::default().dir("etc").file("etc/plain", b"plain").finish(), Compression::None),
        (
            Layer::default()
                .file("etc/passwd", b"root:x:0:0::/root:/bin/sh\nagent:x:1000:1001::/home/agent:/bin/sh\n")
                .file("etc/group", b"video:x:44:agent\naudio:x:29:agent\n")
                .finish(),
            Compression::Gzip,
        ),
        (Layer::default().dir("etc").file("etc/zstd", b"zstd").finish(), Compression::Zstd),
    ];
    let built = image(&layers, &run);
    let reference = home.layout("layout", &built);
    let store = home.open().await;
    let resolved = store.resolve("tenant", &reference).await.unwrap();
    assert_eq!(resolved.digest, built.digest());
    assert_eq!(store.usage().layers, 0, "resolving pulls nothing");
    let steps = Steps::default();
    let image = store.ensure("tenant", &reference, |step| steps.push(step)).await.unwrap();
    assert_eq!(steps.phases().last(), Some(&"ready"));
    assert_eq!((&image.digest, &image.config), (&resolved.digest, &resolved.config));
    assert_eq!(
        image.pinned_reference.to_string(),
        format!("oci:{}@{}", home.path("layout").display(), built.digest())
    );
    assert_eq!(image.config.entrypoint, ["/bin/agent"]);
    assert_eq!(image.config.cmd, ["--serve"]);
    assert_eq!(image.config.env, ["A=1", "PATH=/bin"]);
    assert_eq!((image.config.working_dir.as_str(), &image.config.exposed_ports), ("/work", &vec![8080]));
    assert_eq!(std::fs::read(image.rootfs.join("etc/plain")).unwrap(), b"plain");
    assert_eq!(std::fs::read(image.rootfs.join("etc/zstd")).unwrap(), b"zstd");
    let user = image.user(None).unwrap();
    assert_eq!((user.uid, user.gid, user.groups, user.home.as_str()), (1000, 44, vec![], "/home/agent"));
    assert_eq!(image.user(Some("agent")).unwrap().groups, [29, 44]);
    assert_eq!(image.user(Some("7:8")).unwrap().gid, 8);
    let message = image.user(Some("nobody")).unwrap_err().to_string();
    assert!(message.contains("nobody") && message.contains("/etc/passwd"), "{message}");
    let write = std::fs::write(image.rootfs.join("etc/new"), b"").unwrap_err();
    assert_eq!(write.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
}

#[tokio::test]
async fn owners_modes_times_links_and_attributes_are_kept() {
    need_root!();
    let capability = [1, 0, 0, 2, 0, 10, 0, 0, 0, 0, 0, 0, 10, 10, 0, 0, 0, 0, 0, 0];
    let layer = Layer::default()
        .dir_with("", Attr { mode: 0o711, mtime: 77, ..Attr::default() })
        .dir_with("tmp", Attr { mode: 0o1777, mtime: 5, ..Attr::default() })
        .file_with("su", b"#!", Attr { mode: 0o4755, uid: 12, gid: 34, mtime: 9 })
        .file("tmp/late", b"changes the time of tmp unless it is set at the end")
        .symlink("absolute", "/su")
        .symlink("outside", "../../outside")
        .hardlink("su-again", "su")
        .raw(EntryType::Fifo, b"pipe", b"", b"", Attr { mode: 0o620, ..Attr::default() })
        .raw(EntryType::Char, b"dev/null", b"", b"", Attr::default())
        .pax(&[
            ("SCHILY.xattr.security.capability", &capability),
            ("SCHILY.xattr.user.note", b"two\nlines"),
            ("SCHILY.xattr.security.selinux", b"of_another:machine:t:s0\0"),
            ("mtime", b"12.5"),
        ])
        .file("capable", b"x")
        .pax(&[("path", "f\u{fc}r/na\u{ef}ve".as_bytes())])
        .file("short", b"long names too")
        .finish();
    let (_home, _store, image) = mount(vec![layer]).await;
    let root = image.unwrap().rootfs;
    let stat = |name: &str| std::fs::symlink_metadata(root.join(name)).unwrap();
    assert_eq!((stat("").mode() & 0o7777, stat("").mtime()), (0o711, 77));
    assert_eq!((stat("tmp").mode() & 0o7777, stat("tmp").mtime()), (0o1777, 5));
    let su = stat("su");
    assert_eq!((su.mode() & 0o7777, su.uid(), su.gid(), su.mtime(), su.nlink()), (0o4755, 12, 34, 9, 2));
    assert_eq!(stat("su-again").ino(), su.ino());
    assert_eq!(std::fs::read_link(root.join("absolute")).unwrap(), Path::new("/su"));
    assert!(stat("pipe").file_type().is_fifo());
    assert_eq!(stat("pipe").mode() & 0o7777, 0o620);
    assert!(!root.join("dev").exists(), "devices are left out");
    assert_eq!((stat("capable").mtime(), stat("capable").mtime_nsec()), (12, 500_000_000));
    let attribute = |name| xattr::get(root.join("capable"), name).unwrap();
    assert_eq!(attribute("security.capability").as_deref(), Some(capability.as_slice()));
    assert_eq!(attribute("user.note").as_deref(), Some(b"two\nlines".as_slice()));
    assert_eq!(attribute("security.selinux"), None);
    assert_eq!(std::fs::read(root.join("f\u{fc}r/na\u{ef}ve")).unwrap(), b"long names too");
}

#[tokio::test]
async fn whiteouts_hide_what_is_below_and_nothing_else() {
    need_root!();
    let bottom = Layer::default()
        .dir("a")
        .file("a/gone", b"1")
        .file("a/stays", b"1")
        .dir("b")
        .file("b/hidden", b"1")
        .dir("b/sub")
        .file("b/sub/deep", b"1")
        .dir("replaced")
        .file("replaced/old", b"1")
        .dir("replaced-late")
        .file("replaced-late/old", b"1")
        .dir("implied")
        .file("implied/old", b"1")
        .file("file-to-dir", b"1")
        .dir("dir-to-file")
        .file("dir-to-file/x", b"1")
        .finish();
    let top = Layer::default()
        .dir("a")
        .file("a/.wh.gone", b"")
        .dir("b")
        .file("b/new", b"2")
        .file("b/.wh..wh..opq", b"")
        // Whiteout before and after the directory that replaces what it hides.
        .file(".wh.replaced", b"")
        .dir("replaced")
        .file("replaced/new", b"2")
        .dir("replaced-late")
        .file("replaced-late/new", b"2")
        .file(".wh.replaced-late", b"")
        // The directory itself is not listed.
        .file(".wh.implied", b"")
        .file("implied/new", b"2")
        .file(".wh.file-to-dir", b"")
        .dir("file-to-dir")
        .file("dir-to-file", b"2")
        .file(".wh..wh.plnk", b"bookkeeping of aufs")
        .finish();
    let (_home, _store, image) = mount(vec![bottom, top]).await;
    let root = image.unwrap().rootfs;
    assert_eq!(
        names(&root),
        ["a", "b", "dir-to-file", "file-to-dir", "implied", "replaced", "replaced-late"]
    );
    assert_eq!(names(&root.join("a")), ["stays"]);
    for (dir, only) in [("b", "new"), ("replaced", "new"), ("replaced-late", "new"), ("implied", "new")] {
        assert_eq!(names(&root.join(dir)), [only], "{dir}");
    }
    assert!(root.join("file-to-dir").is_dir() && root.join("dir-to-file").is_file());
    assert_eq!(names(&root.join("file-to-dir")), [""; 0]);
}

#[tokio::test]
async fn a_whiteout_without_anything_below_and_an_opaque_root_are_harmless() {
    need_root!();
    let bottom = Layer::default().file("old", b"1").file(".wh.never-there", b"").finish();
    let top = Layer::default().file(".wh..wh..opq", b"").file("new", b"2").finish();
    let (_home, _store, image) = mount(vec![bottom.clone(), top]).await;
    assert_eq!(names(&image.unwrap().rootfs), ["new"]);
    let (_home, _store, image) = mount(vec![bottom]).await;
    assert_eq!(names(&image.unwrap().rootfs), ["old"]);
}

#[tokio::test]
async fn directories_that_a_layer_only_implies_keep_their_attributes() {
    need_root!();
    let bottom = Layer::default()
        .dir_with("tmp", Attr { mode: 0o1777, uid: 3, gid: 4, mtime: 11 })
        .dir_with("var", Attr { mode: 0o750, mtime: 12, ..Attr::default() })
        .dir_with("var/tmp", Attr { mode: 0o1777, mtime: 13, ..Attr::default() })
        .symlink("lib", "usr/lib")
        .dir("usr")
        .finish();
    let middle = Layer::default().file("tmp/a", b"").file("var/tmp/b", b"").finish();
    // A link of the same layer on the way: the directory made behind it is usr/lib/x, not lib/x.
    let top = Layer::default()
        .file("var/tmp/c", b"")
        .dir_with("usr", Attr { mode: 0o755, ..Attr::default() })
        .dir("usr/lib")
        .symlink("lib", "usr/lib")
        .file("lib/x/y", b"through a link")
        .finish();
    let (home, _store, image) = mount(vec![bottom, middle, top]).await;
    let root = image.unwrap().rootfs;
    let stat = |name: &str| {
        let stat = std::fs::symlink_metadata(root.join(name)).unwrap();
        (stat.mode() & 0o7777, stat.uid(), stat.gid(), stat.mtime())
    };
    assert_eq!(stat("tmp"), (0o1777, 3, 4, 11));
    assert_eq!(stat("var"), (0o750, 0, 0, 12));
    assert_eq!(stat("var/tmp"), (0o1777, 0, 0, 13));
    assert_eq!(names(&root.join("var/tmp")), ["b", "c"]);
    assert!(root.join("lib").is_symlink());
    assert_eq!(std::fs::read(root.join("usr/lib/x/y")).unwrap(), b"through a link");
    assert!(home.contents().iter().any(|name| name.starts_with("attributes/")));
}

#[tokio::test]
async fn sparse_files_keep_their_holes() {
    need_root!();
    let real: u64 = 64 << 20;
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::GNUSparse);
    header.set_path("old").unwrap();
    header.set_size(8192);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1);
    let gnu: &mut GnuHeader = header.as_gnu_mut().unwrap();
    let octal =
        |field: &mut [u8; 12], value: u64| field.copy_from_slice(format!("{value:011o}\0").as_bytes());
    octal(&mut gnu.sparse[0].offset, 0);
    octal(&mut gnu.sparse[0].numbytes, 4096);
    octal(&mut gnu.sparse[1].offset, real - 4096);
    octal(&mut gnu.sparse[1].numbytes, 4096);
    octal(&mut gnu.realsize, real);
    header.set_cksum();
    let mut data = vec![1; 4096];
    data.extend([2; 4096]);
    let mut map = format!("2\n0\n4096\n{}\n4096\n", real - 4096).into_bytes();
    map.resize(512, 0);
    map.extend_from_slice(&data);
    let size = real.to_string();
    let layer = Layer::default()
        .header(&header, &data)
        .pax(&[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"new"),
            ("GNU.sparse.realsize", size.as_bytes()),
        ])
        .file("GNUSparseFile.0/new", &map)
        .finish();
    let (_home, _store, image) = mount(vec![layer]).await;
    let root = image.unwrap().rootfs;
    assert_eq!(names(&root), ["new", "old"]);
    for name in ["old", "new"] {
        let content = std::fs::read(root.join(name)).unwrap();
        assert_eq!(content.len() as u64, real);
        assert!(content[..4096].iter().all(|&byte| byte == 1), "{name}");
        assert!(content[4096..content.len() - 4096].iter().all(|&byte| byte == 0), "{name}");
        assert!(content[content.len() - 4096..].iter().all(|&byte| byte == 2), "{name}");
        let blocks = std::fs::metadata(root.join(name)).unwrap().blocks();
        assert!(blocks * 512 < 1 << 20, "{name} takes {blocks} blocks");
    }
}

#[tokio::test]
async fn many_layers_some_of_them_twice() {
    need_root!();
    let empty = Layer::default().finish();
    let mut layers = Vec::new();
    for number in 0..130 {
        layers.push(
            Layer::default()
                .file(&format!("f{number}"), b"x")
                .file("last", format!("{number}").as_bytes())
                .finish(),
        );
        layers.push(empty.clone());
    }
    layers.truncate(200);
    let (_home, store, image) = mount(layers).await;
    let image = image.unwrap();
    assert_eq!(names(&image.rootfs).len(), 100 + 1);
    assert_eq!(std::fs::read(image.rootfs.join("last")).unwrap(), b"99");
    assert_eq!(store.usage().extractions, 101);
}

#[tokio::test]
async fn an_index_leads_to_this_platform_and_its_digest_is_a_name_of_the_image() {
    need_root!();
    let home = Home::new();
    let built = gzip_image(vec![Layer::default().file("here", b"").finish()]);
    let dir = home.path("multi");
    write_layout(&dir, &[("x", &built)]);
    let entry = |architecture: &str, digest: &Digest, size: usize| {
        json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": size,
            "platform": {"os": "linux", "architecture": architecture}})
    };
    let index = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [
        entry("s390x", &Digest::of(b"other"), 1), entry(architecture(), &built.digest(), built.manifest.len())]})
    .to_string();
    let digest = Digest::of(index.as_bytes());
    std::fs::write(dir.join("blobs/sha256").join(digest.hex()), &index).unwrap();
    write_index(
        &dir,
        &json!({"schemaVersion": 2, "manifests": [
        {"mediaType": "application/vnd.oci.image.index.v1+json", "digest": digest, "size": index.len(),
         "annotations": {"org.opencontainers.image.ref.name": "v1"}}]}),
    );
    let store = home.open().await;
    let tagged = format!("oci:{}:v1", dir.display()).parse().unwrap();
    let by_index = format!("oci:{}@{digest}", dir.display()).parse().unwrap();
    for reference in [&tagged, &by_index] {
        assert_eq!(ensure(&store, reference).await.unwrap().digest, built.digest());
    }
    assert_eq!((store.usage().images, store.usage().extractions), (1, 1));

    let other = json!({"schemaVersion": 2, "manifests": [entry("s390x", &Digest::of(b"other"), 1),
        entry("ppc64le", &Digest::of(b"another"), 1)]});
    write_index(&dir, &other);
    let reference = format!("oci:{}", dir.display()).parse().unwrap();
    let error = ensure(&store, &reference).await.unwrap_err();
    assert!(matches!(error, ImageError::Platform { .. }), "{error}");
    assert!(error.to_string().contains("linux/ppc64le, linux/s390x"), "{error}");
}

#[tokio::test]
async fn an_archive_is_read_in_place() {
    need_root!();
    let home = Home::new();
    let built = gzip_image(vec![Layer::default().file("a", b"from an archive").finish()]);
    write_layout(&home.path("layout"), &[("v1", &built)]);
    let archive = home.path("image.tar");
    let mut builder = tar::Builder::new(std::fs::File::create(&archive).unwrap());
    builder.append_dir_all(".", home.path("layout")).unwrap();
    builder.finish().unwrap();
    let store = home.open().await;
    let reference = |suffix: &str| format!("oci-archive:{}{suffix}", archive.display()).parse().unwrap();
    let image = ensure(&store, &reference(":v1")).await.unwrap();
    assert_eq!(std::fs::read(image.rootfs.join("a")).unwrap(), b"from an archive");
    assert_eq!(image.pinned_reference, reference(&format!("@{}", built.digest())));
    ensure(&store, &image.pinned_reference).await.unwrap();
    let error = ensure(&store, &reference(":v2")).await.unwrap_err().to_string();
    assert!(error.contains("no tag `v2`") && error.contains("v1"), "{error}");

    let packed = compress(&std::fs::read(&archive).unwrap(), Compression::Gzip);
    std::fs::write(&archive, packed).unwrap();
    let error = ensure(&store, &reference(":v1")).await.unwrap_err().to_string();
    assert!(error.contains("gunzip"), "{error}");
}

#[tokio::test]
async fn the_store_is_closed_to_other_users() {
    need_root!();
    let home = Home::new();
    let _store = home.open().await;
    let mode = std::fs::metadata(home.path("store")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700, "layers hold setuid files");
}

// SPDX-License-Identifier: Apache-2.0
//! Building layers and layouts byte by byte, and a store that cleans up after itself.
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use atelet::image::{Config, Digest, Image, ImageError, ImageStore, Progress, Reference};
use serde_json::{Value, json};
use tar::{EntryType, Header};

/// Ends the test where it cannot run.
macro_rules! need_root {
    () => {
        if !rustix_is_root() {
            eprintln!("skipped: the image store needs root");
            return;
        }
    };
}
pub(crate) use need_root;

pub fn rustix_is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A layer's archive in the making; nothing in it is checked.
#[derive(Default)]
pub struct Layer {
    bytes: Vec<u8>,
}

/// Attributes of an entry.
#[derive(Clone, Copy)]
pub struct Attr {
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    pub mtime: u64,
}

impl Default for Attr {
    fn default() -> Self {
        Self { mode: 0o644, uid: 0, gid: 0, mtime: 1_000_000_000 }
    }
}

impl Layer {
    pub fn raw(mut self, kind: EntryType, path: &[u8], link: &[u8], data: &[u8], attr: Attr) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(data.len() as u64);
        header.set_mode(attr.mode);
        header.set_uid(attr.uid);
        header.set_gid(attr.gid);
        header.set_mtime(attr.mtime);
        if path.len() > 100 {
            self = self.raw(EntryType::GNULongName, b"././@LongLink", b"", path, Attr::default());
        }
        if link.len() > 100 {
            self = self.raw(EntryType::GNULongLink, b"././@LongLink", b"", link, Attr::default());
        }
        let old = header.as_old_mut();
        let short = path.len().min(100);
        old.name[..short].copy_from_slice(&path[..short]);
        let short = link.len().min(100);
        old.linkname[..short].copy_from_slice(&link[..short]);
        header.set_cksum();
        self.header(&header, data)
    }

    pub fn header(mut self, header: &Header, data: &[u8]) -> Self {
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    pub fn dir(self, path: &str) -> Self {
        self.dir_with(path, Attr { mode: 0o755, ..Attr::default() })
    }

    pub fn dir_with(self, path: &str, attr: Attr) -> Self {
        self.raw(EntryType::Directory, path.as_bytes(), b"", b"", attr)
    }

    pub fn file(self, path: &str, data: &[u8]) -> Self {
        self.file_with(path, data, Attr::default())
    }

    pub fn file_with(self, path: &str, data: &[u8], attr: Attr) -> Self {
        self.raw(EntryType::Regular, path.as_bytes(), b"", data, attr)
    }

    pub fn symlink(self, path: &str, to: &str) -> Self {
        self.raw(EntryType::Symlink, path.as_bytes(), to.as_bytes(), b"", Attr::default())
    }

    pub fn hardlink(self, path: &str, to: &str) -> Self {
        self.raw(EntryType::Link, path.as_bytes(), to.as_bytes(), b"", Attr::default())
    }

    /// PAX records for the next entry.
    pub fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut data = Vec::new();
        for (key, value) in records {
            let body = key.len() + value.len() + 3;
            let mut length = body;
            while length != body + length.to_string().len() {
                length = body + length.to_string().len();
            }
            write!(data, "{length} {key}=").unwrap();
            data.extend_from_slice(value);
            data.push(b'\n');
        }
        self.raw(EntryType::XHeader, b"pax", b"", &data, Attr::default())
    }

    pub fn finish(mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 1024, 0);
        self.bytes
    }
}

#[derive(Clone, Copy)]
pub enum Compression {
    None,
    Gzip,
    Zstd,
}

pub fn compress(bytes: &[u8], how: Compression) -> Vec<u8> {
    match how {
        Compression::None => bytes.to_vec(),
        Compression::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
        Compression::Zstd => zstd::encode_all(bytes, 1).unwrap(),
    }
}

/// An image as its blobs.
#[derive(Clone)]
pub struct Built {
    pub blobs: Vec<Vec<u8>>,
    pub manifest: Vec<u8>,
    pub config: Value,
}

impl Built {
    pub fn digest(&self) -> Digest {
        Digest::of(&self.manifest)
    }
}

pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// An image of these archives; `run` is the `config` object of its configuration.
pub fn image(layers: &[(Vec<u8>, Compression)], run: &Value) -> Built {
    let diff_ids: Vec<Digest> = layers.iter().map(|(tar, _)| Digest::of(tar)).collect();
    let config = json!({"os": "linux", "architecture": architecture(), "config": run,
        "rootfs": {"type": "layers", "diff_ids": diff_ids}});
    let blobs: Vec<Vec<u8>> = layers.iter().map(|(tar, how)| compress(tar, *how)).collect();
    assemble(&config, blobs)
}

/// An image of any configuration and blobs.
pub fn assemble(config: &Value, mut blobs: Vec<Vec<u8>>) -> Built {
    let config_bytes = config.to_string().into_bytes();
    let layers: Vec<Value> = blobs
        .iter()
        .map(|blob| {
            json!({"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                "digest": Digest::of(blob), "size": blob.len()})
        })
        .collect();
    let manifest = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": Digest::of(&config_bytes), "size": config_bytes.len()},
        "layers": layers})
    .to_string()
    .into_bytes();
    blobs.push(config_bytes);
    Built { blobs, manifest, config: config.clone() }
}

pub fn gzip_image(layers: Vec<Vec<u8>>) -> Built {
    let layers: Vec<_> = layers.into_iter().map(|tar| (tar, Compression::Gzip)).collect();
    image(&layers, &json!({}))
}

/// Writes images with their tags as a layout.
pub fn write_layout(dir: &Path, images: &[(&str, &Built)]) {
    let blobs = dir.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let mut manifests = Vec::new();
    for (tag, image) in images {
        for blob in image.blobs.iter().chain([&image.manifest]) {
            std::fs::write(blobs.join(Digest::of(blob).hex()), blob).unwrap();
        }
        manifests.push(json!({"mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": image.digest(), "size": image.manifest.len(),
            "annotations": {"org.opencontainers.image.ref.name": tag}}));
    }
    write_index(dir, &json!({"schemaVersion": 2, "manifests": manifests}));
}

pub fn write_index(dir: &Path, index: &Value) {
    std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    std::fs::write(dir.join("index.json"), index.to_string()).unwrap();
}

/// A scratch directory with a store in it; whatever a test leaves mounted is unmounted.
pub struct Home {
    pub dir: tempfile::TempDir,
}

impl Home {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn config(&self) -> Config {
        let mut config = Config::new(self.path("store"));
        config.registry.pause = Duration::from_millis(2);
        config.registry.idle_timeout = Duration::from_secs(5);
        config
    }

    pub async fn open(&self) -> ImageStore {
        ImageStore::open(self.config()).await.unwrap()
    }

    /// Writes a layout with one image and gives its reference.
    pub fn layout(&self, name: &str, image: &Built) -> Reference {
        write_layout(&self.path(name), &[("latest", image)]);
        format!("oci:{}:latest", self.path(name).display()).parse().unwrap()
    }

    /// What the store holds, without its fixed files.
    pub fn contents(&self) -> Vec<String> {
        let mut found = Vec::new();
        for kind in ["layers", "images", "attributes", "mounts", "tmp"] {
            for entry in std::fs::read_dir(self.path("store").join(kind)).unwrap() {
                found.push(format!("{kind}/{}", entry.unwrap().file_name().to_string_lossy()));
            }
        }
        found.sort();
        found
    }

    pub fn mounts(&self) -> Vec<String> {
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let root = self.dir.path().canonicalize().unwrap();
        table
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            .filter(|point| Path::new(point).starts_with(&root))
            .map(str::to_owned)
            .collect()
    }

    pub fn unmount_all(&self) {
        // The last one mounted first: they may lie in each other.
        for point in self.mounts().iter().rev() {
            nix::mount::umount2(point.as_str(), nix::mount::MntFlags::MNT_DETACH).unwrap();
        }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        self.unmount_all();
    }
}

pub async fn ensure(store: &ImageStore, reference: &Reference) -> Result<Image, ImageError> {
    store.ensure("tenant", reference, |_| {}).await
}

/// Makes the image of these gzip layers local; the home and store must outlive it.
pub async fn mount(layers: Vec<Vec<u8>>) -> (Home, ImageStore, Result<Image, ImageError>) {
    let home = Home::new();
    let reference = home.layout("layout", &gzip_image(layers));
    let store = home.open().await;
    let image = ensure(&store, &reference).await;
    (home, store, image)
}

/// Collects progress.
#[derive(Default)]
pub struct Steps(pub Mutex<Vec<Progress>>);

impl Steps {
    pub fn push(&self, progress: Progress) {
        self.0.lock().unwrap().push(progress);
    }

    /// The names of the phases in the order they were first seen.
    pub fn phases(&self) -> Vec<&'static str> {
        let mut names: Vec<_> = self.0.lock().unwrap().iter().map(|step| step.phase.as_str()).collect();
        names.dedup();
        names
    }
}

// SPDX-License-Identifier: Apache-2.0
//! Manifests, indexes and image configurations, as far as a node needs them.
//!
//! OCI image-spec 1.1 and Docker schema 2 share these shapes. The types are our own and not `oci-spec`'s because only
//! a dozen fields are read, documents written by real tools must pass where that crate's stricter types refuse them
//! (`null` for an empty list, missing `mediaType`), and unknown keys never matter.
use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use super::error::ImageError;
use super::reference::Digest;

/// Largest manifest or index taken, bytes; the distribution specification asks registries for 4 MiB.
pub(super) const MAX_MANIFEST: u64 = 4 << 20;
/// Largest image configuration taken, bytes.
pub(super) const MAX_CONFIG: u64 = 8 << 20;
/// Most layers of an image; overlayfs stacks up to 500, mount(2) takes as many as fit into a page, builders stop at
/// 127.
pub(super) const MAX_LAYERS: usize = 200;

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// What is asked for in `Accept`.
pub(super) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json";

/// Operating system and processor, in the names of Go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// `linux`.
    pub os: String,
    /// `amd64`, `arm64`…
    pub architecture: String,
    /// `v8`…; empty where there is none.
    #[serde(default, deserialize_with = "nullable")]
    pub variant: String,
}

impl Platform {
    /// The platform of this machine.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "riscv64" => "riscv64",
            other => other,
        };
        Self { os: "linux".into(), architecture: architecture.into(), variant: String::new() }
    }

    /// Whether an image for `other` runs here. The baseline variant of arm64 may be written or not.
    fn runs(&self, other: &Self) -> bool {
        let variant = |platform: &Self| match (platform.architecture.as_str(), platform.variant.as_str()) {
            ("arm64", "v8") | ("amd64", "v1") => String::new(),
            (_, variant) => variant.to_owned(),
        };
        self.os == other.os && self.architecture == other.architecture && variant(self) == variant(other)
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if !self.variant.is_empty() {
            write!(f, "/{}", self.variant)?;
        }
        Ok(())
    }
}

/// A reference to a blob.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    #[serde(default, deserialize_with = "nullable")]
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    #[serde(default, deserialize_with = "nullable")]
    pub annotations: BTreeMap<String, String>,
    #[serde(default)]
    pub platform: Option<Platform>,
}

impl Descriptor {
    /// The tag in an image layout.
    pub fn tag(&self) -> Option<&str> {
        self.annotations.get("org.opencontainers.image.ref.name").map(String::as_str)
    }
}

/// An image for one platform.
#[derive(Debug, Clone)]
pub(super) struct Manifest {
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

/// What is behind a manifest digest.
#[derive(Debug)]
pub(super) enum Document {
    Manifest(Manifest),
    Index(Vec<Descriptor>),
}

/// `null` and a missing key are the same as empty.
fn nullable<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    #[serde(default)]
    schema_version: Option<u32>,
    #[serde(default, deserialize_with = "nullable")]
    media_type: String,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Option<Vec<Descriptor>>,
    #[serde(default)]
    manifests: Option<Vec<Descriptor>>,
}

/// Parses a manifest or index. `what` names it in errors. The document itself decides what it is: a header that
/// contradicts it could make two readers see two images behind one digest.
pub(super) fn parse_document(bytes: &[u8], what: &str) -> Result<Document, ImageError> {
    let unsupported = |reason: String| ImageError::Unsupported { what: what.to_owned(), reason };
    let raw: RawDocument = serde_json::from_slice(bytes)
        .map_err(|error| unsupported(format!("it is not an image manifest or index ({error})")))?;
    if raw.schema_version == Some(1) {
        return Err(unsupported("Docker schema 1 is obsolete, push it again with a current tool".into()));
    }
    match (raw.media_type.as_str(), raw.config, raw.layers, raw.manifests) {
        ("" | OCI_MANIFEST | DOCKER_MANIFEST, Some(config), layers, None) => {
            let layers = layers.unwrap_or_default();
            if layers.len() > MAX_LAYERS {
                return Err(ImageError::TooLarge {
                    what: what.to_owned(),
                    limit: format!("{MAX_LAYERS} layers"),
                });
            }
            for layer in &layers {
                check_layer_type(layer)?;
            }
            Ok(Document::Manifest(Manifest { config, layers }))
        }
        ("" | OCI_INDEX | DOCKER_LIST, None, None, Some(manifests)) => Ok(Document::Index(manifests)),
        (media_type, ..) => Err(unsupported(format!(
            "media type `{media_type}` with these fields is neither an image manifest nor an index"
        ))),
    }
}

/// The compression is found out from the content; what is checked here is that the layer is a plain tar at all.
fn check_layer_type(layer: &Descriptor) -> Result<(), ImageError> {
    let unsupported = |reason: &str| {
        Err(ImageError::Unsupported {
            what: format!("layer {} of type `{}`", layer.digest, layer.media_type),
            reason: reason.to_owned(),
        })
    };
    let media_type = layer.media_type.as_str();
    if media_type.contains("encrypted") {
        return unsupported("encrypted layers cannot be read");
    }
    if media_type.contains("foreign") || media_type.contains("nondistributable") {
        return unsupported("its content is not in the registry; rebuild the image without such layers");
    }
    match media_type {
        "application/vnd.oci.image.layer.v1.tar"
        | "application/vnd.oci.image.layer.v1.tar+gzip"
        | "application/vnd.oci.image.layer.v1.tar+zstd"
        | "application/vnd.docker.image.rootfs.diff.tar"
        | "application/vnd.docker.image.rootfs.diff.tar.gzip"
        | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Ok(()),
        _ => unsupported("a layer is a tar archive, plain or compressed with gzip or zstd"),
    }
}

/// Picks the manifest for a platform out of an index.
pub(super) fn select<'a>(
    manifests: &'a [Descriptor],
    platform: &Platform,
    image: &str,
) -> Result<&'a Descriptor, ImageError> {
    let fits = |entry: &&Descriptor| entry.platform.as_ref().is_some_and(|offered| platform.runs(offered));
    if let Some(entry) = manifests.iter().find(fits) {
        return Ok(entry);
    }
    // Layouts often say no platform: then the one image that they hold is checked by its configuration.
    let unnamed: Vec<_> = manifests.iter().filter(|entry| entry.platform.is_none()).collect();
    if let [only] = unnamed.as_slice() {
        return Ok(only);
    }
    let mut available: Vec<String> = manifests
        .iter()
        .filter_map(|entry| entry.platform.as_ref())
        .filter(|offered| offered.os != "unknown")
        .map(Platform::to_string)
        .collect();
    available.sort();
    available.dedup();
    Err(ImageError::Platform {
        image: image.to_owned(),
        wanted: platform.to_string(),
        available: if available.is_empty() { "no platform at all".into() } else { available.join(", ") },
    })
}

/// How an image wants to be run; what the runtime does not use (labels, declared volumes) is left out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// ENTRYPOINT.
    pub entrypoint: Vec<String>,
    /// CMD.
    pub cmd: Vec<String>,
    /// ENV, `K=V`.
    pub env: Vec<String>,
    /// USER as written; see [`super::Image::user`].
    pub user: String,
    /// WORKDIR; empty means `/`.
    pub working_dir: String,
    /// EXPOSEd TCP ports, ascending.
    pub exposed_ports: Vec<u16>,
}

/// An image configuration with what ties it to its layers.
#[derive(Debug)]
pub(super) struct Config {
    pub config: ImageConfig,
    pub diff_ids: Vec<Digest>,
}

#[derive(Deserialize)]
struct RawConfig {
    #[serde(default, deserialize_with = "nullable")]
    os: String,
    #[serde(default, deserialize_with = "nullable")]
    architecture: String,
    #[serde(default, deserialize_with = "nullable")]
    variant: String,
    #[serde(default, deserialize_with = "nullable")]
    config: RawRun,
    rootfs: RawRootfs,
}

#[derive(Deserialize)]
struct RawRootfs {
    #[serde(default, deserialize_with = "nullable")]
    diff_ids: Vec<Digest>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase")]
struct RawRun {
    #[serde(default, deserialize_with = "nullable")]
    user: String,
    #[serde(default, deserialize_with = "nullable")]
    exposed_ports: serde_json::Map<String, serde_json::Value>,
    #[serde(default, deserialize_with = "nullable")]
    env: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    entrypoint: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    cmd: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    working_dir: String,
}

/// Parses an image configuration and checks that it belongs to the manifest and runs here.
pub(super) fn parse_config(
    bytes: &[u8],
    manifest: &Manifest,
    platform: &Platform,
    image: &str,
) -> Result<Config, ImageError> {
    let raw: RawConfig = serde_json::from_slice(bytes).map_err(|error| ImageError::Unsupported {
        what: format!("configuration {} of `{image}`", manifest.config.digest),
        reason: format!("it is not an image configuration ({error})"),
    })?;
    let offered = Platform { os: raw.os, architecture: raw.architecture, variant: raw.variant };
    // Tools that pack plain directories leave both empty.
    let says_nothing = offered.os.is_empty() && offered.architecture.is_empty();
    if !says_nothing && !platform.runs(&offered) {
        return Err(ImageError::Platform {
            image: image.to_owned(),
            wanted: platform.to_string(),
            available: offered.to_string(),
        });
    }
    if raw.rootfs.diff_ids.len() != manifest.layers.len() {
        return Err(ImageError::Corrupt {
            what: format!("image `{image}`"),
            reason: format!(
                "its manifest has {} layers, its configuration {}",
                manifest.layers.len(),
                raw.rootfs.diff_ids.len()
            ),
        });
    }
    let mut exposed_ports: Vec<u16> = raw
        .config
        .exposed_ports
        .keys()
        .filter_map(|port| match port.split_once('/') {
            Some((port, "tcp")) => port.parse().ok(),
            Some(_) => None,
            None => port.parse().ok(),
        })
        .collect();
    exposed_ports.sort_unstable();
    exposed_ports.dedup();
    Ok(Config {
        config: ImageConfig {
            entrypoint: raw.config.entrypoint,
            cmd: raw.config.cmd,
            env: raw.config.env,
            user: raw.config.user,
            working_dir: raw.config.working_dir,
            exposed_ports,
        },
        diff_ids: raw.rootfs.diff_ids,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn descriptor(media_type: &str, platform: Option<(&str, &str, &str)>) -> serde_json::Value {
        let mut value =
            json!({"mediaType": media_type, "digest": Digest::of(media_type.as_bytes()), "size": 3});
        if let Some((os, architecture, variant)) = platform {
            value["platform"] = json!({"os": os, "architecture": architecture, "variant": variant});
        }
        value
    }

    fn document(value: &serde_json::Value) -> Result<Document, String> {
        parse_document(value.to_string().as_bytes(), "image x").map_err(|error| error.to_string())
    }

    fn host(architecture: &str) -> Platform {
        Platform { os: "linux".into(), architecture: architecture.into(), variant: String::new() }
    }

    #[test]
    fn the_platform_is_picked_and_attestations_are_not() {
        let index = json!({"schemaVersion": 2, "manifests": [
            descriptor("attestation", Some(("unknown", "unknown", ""))),
            descriptor("arm", Some(("linux", "arm64", "v8"))),
            descriptor("amd", Some(("linux", "amd64", ""))),
        ]});
        let Document::Index(manifests) = document(&index).unwrap() else { panic!() };
        assert_eq!(select(&manifests, &host("arm64"), "x").unwrap().media_type, "arm");
        assert_eq!(select(&manifests, &host("amd64"), "x").unwrap().media_type, "amd");
        let message = select(&manifests, &host("riscv64"), "x").unwrap_err().to_string();
        assert!(message.contains("linux/riscv64") && message.contains("linux/amd64, linux/arm64/v8"));
        assert!(!message.contains("unknown"), "{message}");
    }

    #[test]
    fn what_a_document_is_comes_from_its_content() {
        let both = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [],
            "config": descriptor("c", None), "layers": []});
        assert!(document(&both).unwrap_err().contains("neither"));
        let lying = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "config": descriptor("c", None)});
        assert!(document(&lying).unwrap_err().contains("neither"));
        assert!(document(&json!({"schemaVersion": 1})).unwrap_err().contains("schema 1"));
        assert!(document(&json!("x")).unwrap_err().contains("not an image manifest"));
        let null = json!({"schemaVersion": 2, "config": descriptor("c", None), "layers": null});
        assert!(
            matches!(document(&null).unwrap(), Document::Manifest(manifest) if manifest.layers.is_empty())
        );
    }

    #[test]
    fn layers_that_cannot_be_had_are_refused_by_type() {
        for (media_type, says) in [
            ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "not in the registry"),
            ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "encrypted"),
            ("application/vnd.wasm", "tar archive"),
        ] {
            let manifest = json!({"schemaVersion": 2, "config": descriptor("c", None),
                "layers": [descriptor(media_type, None)]});
            let message = document(&manifest).unwrap_err();
            assert!(message.contains(says), "{message}");
        }
    }

    #[test]
    fn a_config_is_read_with_nulls_and_checked_against_the_manifest() {
        let manifest = Manifest {
            config: serde_json::from_value(descriptor("c", None)).unwrap(),
            layers: vec![serde_json::from_value(descriptor("l", None)).unwrap()],
        };
        let config = |value: serde_json::Value| {
            parse_config(value.to_string().as_bytes(), &manifest, &host("amd64"), "x")
        };
        let diff = Digest::of(b"layer");
        let good = config(json!({"os": "linux", "architecture": "amd64",
            "config": {"Env": null, "Cmd": ["sh"], "ExposedPorts": {"80/tcp": {}, "53/udp": {}, "22": {}}},
            "rootfs": {"type": "layers", "diff_ids": [diff]}}))
        .unwrap();
        assert_eq!(good.config.exposed_ports, [22, 80]);
        assert_eq!(good.config.cmd, ["sh"]);
        let other = config(json!({"os": "linux", "architecture": "arm64", "rootfs": {"diff_ids": [diff]}}));
        assert!(matches!(other, Err(ImageError::Platform { .. })));
        let fewer = config(json!({"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": []}}));
        assert!(fewer.unwrap_err().to_string().contains("1 layers, its configuration 0"));
    }
}

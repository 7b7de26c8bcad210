// SPDX-License-Identifier: Apache-2.0
//! Images: pulled once per node, verified, unpacked once, shared read-only (design §7).
//!
//! ```text
//!  reference ──▶ rights? ──▶ manifest ──▶ config ──▶ each layer, several at once ──▶ record ──▶ overlay mount
//!                (rights.rs)  (registry.rs,           pull ▶ verify ▶ unpack          (index.rs)  (overlay.rs)
//!                              layout.rs, spec.rs)    (registry.rs, layer.rs, tree.rs, tarball.rs)
//! ```
//!
//! **Happy path.** [`ImageStore::ensure`] of an image that this node has: the atespace's right is fresh, the image is
//! in the index, its overlay is mounted: two look-ups in memory and a `stat`, whatever the image's size. Otherwise one
//! task per (atespace, reference) does the work and every caller that asks meanwhile follows it; it goes on when they
//! all give up, so that a retry finds it finished or further on. Layers are pulled and unpacked side by side, each
//! once per node whoever asks: a lock per layer, a bound on pulls and on unpacking.
//!
//! **Failure.** Whatever goes wrong, what is visible is complete: content moves from `tmp/` into place only when its
//! digests are right and it is durable, and its record is written last. A failed image leaves the layers that were
//! finished, which the next attempt finds and the collector drops if there is none. Errors say what to do
//! ([`ImageError`]).
//!
//! **Tenants (P6).** An atespace gets an image only from a source that has shown, to this atespace's own credentials,
//! that it may have it: the manifest is asked for at the source it names, at most [`Config::right_ttl`] ago. For a
//! local layout the check is that the layout can be read and its manifest is intact. A cached layer or image counts
//! as available from a source only if that very source delivered its bytes to us once, or the same registry did from
//! another repository and says that this one has the blob too; otherwise the bytes are pulled again and only hashed.
//! So neither a registry that claims to have someone's private digest nor a configuration that lists someone's layer
//! gets at it.
//!
//! **What a sandbox sees** is the mount at [`Image::rootfs`], in this process's mount namespace. It stays as long as
//! an [`Image`] is held, or the caller lists its digest as in use when it collects.
mod auth;
mod erofs;
mod error;
pub(crate) mod http;
mod index;
mod layer;
mod layout;
pub(crate) mod locks;
mod overlay;
mod progress;
mod reference;
mod registry;
mod rights;
mod spec;
mod store;
mod tarball;
mod tree;
mod user;

pub use erofs::ErofsImages;
pub use error::ImageError;
pub use index::{Collected, Usage, unmount_all};
pub use layer::Limits;
pub(crate) use layer::unpack_archive;
pub use progress::{Phase, Progress};
pub use reference::{Digest, Reference, Repository, Source};
pub use registry::RegistryConfig;
pub use spec::{ImageConfig, Platform};
pub use store::{Config, Image, ImageStore, ResolvedImage};
pub use user::User;

//! From an OCI image to what a container runs from and as.
//!
//! Called by `pericarp run` on the host, as root or as a plain user, in this order:
//!
//! 1. [`image`] opens an image (OCI layout or `oci-archive`) and checks what it says;
//! 2. [`disk`] makes a read-only EROFS disk of its layers, once per image, for a virtual machine;
//!    or [`rootfs`] unpacks them into a directory for a container on the host;
//! 3. [`config`] puts together the image's defaults and the command line;
//! 4. [`user`] looks a user up in a container's own files, where that is done on the host;
//! 5. [`runtime`] describes the container to an OCI runtime.
//!
//! Images are hostile input. This crate starts no process, knows nothing of virtual machines and
//! fetches nothing from a registry.

pub mod config;
pub mod digest;
pub mod disk;
pub mod image;
mod layer;
pub mod rootfs;
pub mod runtime;
mod tar;
pub mod user;

#[cfg(test)]
mod testing;

pub use tar::TarError;

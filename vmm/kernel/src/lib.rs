//! A guest's kernel, from the distribution's file to the form in which it is loaded.
//!
//! A distribution ships a bzImage, a compressed kernel behind a small program
//! that unpacks it. That program would run in the guest, on memory it touches
//! for the first time; [`payload`] unpacks here instead, once for each file,
//! [`cache`] keeps what came out, and [`elf`] knows whether it can be entered. Called by
//! `pericarp-vmm`, which loads it itself, and by the driver of QEMU, which names a file.

pub mod cache;
pub mod elf;
pub mod payload;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use thiserror::Error;

/// What a kernel's file turned out to be.
#[derive(Debug)]
pub enum Image {
    /// A plain kernel.
    Elf(File),
    /// A compressed one whose payload is not unpacked here.
    BzImage(File),
}

/// Why a kernel cannot be used.
#[derive(Debug, Error)]
pub enum KernelError {
    /// It cannot be read.
    #[error("cannot read the kernel")]
    Read(#[from] io::Error),
    /// It is neither of the two forms.
    #[error("it is no Linux kernel: neither an ELF file nor a bzImage")]
    Unknown,
    /// Its setup header contradicts itself.
    #[error("its setup header is wrong: {0}")]
    Header(&'static str),
    /// Its payload cannot be unpacked.
    #[error("its {0} payload cannot be unpacked: {1}")]
    Payload(&'static str, String),
    /// It was to choose its address.
    #[error(
        "it is a plain ELF kernel, which stands where it was linked: give its bzImage, or leave \
         out --kaslr"
    )]
    Placed,
}

/// Tells the form of a kernel's file, by its first bytes.
pub(crate) fn is_elf(file: &File) -> Result<bool, KernelError> {
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, 0)
        .map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => KernelError::Unknown,
            _ => KernelError::Read(e),
        })?;
    Ok(&magic == b"\x7fELF")
}

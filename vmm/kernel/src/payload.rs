//! The compressed kernel within a bzImage (Linux's Documentation/arch/x86/boot.rst,
//! `payload_offset`): found by the setup header, unpacked by its own magic.
//! Called by [`super::cache`].
//!
//! The file is the operator's and not the guest's, but may be damaged: sizes are
//! checked, and what comes out is bounded.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use crate::KernelError;

/// A kernel larger than this is not believed.
const LARGEST: u64 = 1 << 30;

const SETUP_SECTS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const HEADER: usize = 0x268;
const SECTOR: u64 = 512;
/// The first protocol that says where the payload is.
const WITH_PAYLOAD: u16 = 0x0208;

/// Where the payload lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    offset: u64,
    length: u64,
}

/// Finds the payload of a bzImage; `None` in one too old to say.
pub(crate) fn find(file: &File) -> Result<Option<Place>, KernelError> {
    let mut header = [0; HEADER];
    file.read_exact_at(&mut header, 0)
        .map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => KernelError::Unknown,
            _ => KernelError::Read(e),
        })?;
    place(&header, file.metadata()?.len())
}

fn place(header: &[u8; HEADER], size: u64) -> Result<Option<Place>, KernelError> {
    if &header[MAGIC..MAGIC + 4] != b"HdrS" {
        return Err(KernelError::Unknown);
    }
    let word = |at: usize| {
        let bytes = [header[at], header[at + 1], header[at + 2], header[at + 3]];
        u64::from(u32::from_le_bytes(bytes))
    };
    let version = u16::from_le_bytes([header[VERSION], header[VERSION + 1]]);
    let (relative, length) = (word(PAYLOAD_OFFSET), word(PAYLOAD_LENGTH));
    if version < WITH_PAYLOAD || length == 0 {
        return Ok(None);
    }
    // Zero is four, for a reason nobody remembers.
    let sectors = match header[SETUP_SECTS] {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let offset = (sectors + 1) * SECTOR + relative;
    if offset + length > size {
        return Err(KernelError::Header("the payload ends beyond the file"));
    }
    Ok(Some(Place { offset, length }))
}

/// Unpacks the payload. `None` where its compression is not one of those known
/// here: the kernel then unpacks itself.
pub(crate) fn unpack(file: &File, place: Place) -> Result<Option<Vec<u8>>, KernelError> {
    let mut packed = vec![0; place.length as usize];
    file.read_exact_at(&mut packed, place.offset)?;
    let Some((name, kernel)) = unpacked(&packed) else {
        return Ok(None);
    };
    let kernel = kernel.map_err(|e| KernelError::Payload(name, e.to_string()))?;
    if !kernel.starts_with(b"\x7fELF") {
        return Err(KernelError::Payload(name, "it is no ELF file".to_owned()));
    }
    Ok(Some(kernel))
}

fn unpacked(packed: &[u8]) -> Option<(&'static str, io::Result<Vec<u8>>)> {
    match packed {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(("zstd", zstd(packed))),
        [0x02, 0x21, 0x4c, 0x18, blocks @ ..] => Some(("lz4", lz4(blocks))),
        [0x1f, 0x8b, ..] => Some(("gzip", bounded(flate2::read::GzDecoder::new(packed)))),
        _ => None,
    }
}

fn zstd(packed: &[u8]) -> io::Result<Vec<u8>> {
    let decoder = ruzstd::decoding::StreamingDecoder::new(packed).map_err(io::Error::other)?;
    bounded(decoder)
}

/// lz4's legacy frame: blocks of 8 MiB, each behind its packed size. The
/// kernel's build appends the unpacked size, which ends the blocks.
fn lz4(mut blocks: &[u8]) -> io::Result<Vec<u8>> {
    const BLOCK: usize = 8 << 20;
    let mut kernel = Vec::new();
    while let Some((size, rest)) = blocks.split_first_chunk::<4>() {
        let size = u32::from_le_bytes(*size) as usize;
        let Some((block, rest)) = rest.split_at_checked(size) else {
            break;
        };
        let start = kernel.len();
        if (start + BLOCK) as u64 > LARGEST {
            return Err(io::Error::other("it is too large"));
        }
        kernel.resize(start + BLOCK, 0);
        let written = lz4_flex::block::decompress_into(block, &mut kernel[start..])
            .map_err(io::Error::other)?;
        kernel.truncate(start + written);
        blocks = rest;
    }
    Ok(kernel)
}

fn bounded(reader: impl Read) -> io::Result<Vec<u8>> {
    let mut kernel = Vec::new();
    reader.take(LARGEST + 1).read_to_end(&mut kernel)?;
    if kernel.len() as u64 > LARGEST {
        return Err(io::Error::other("it is too large"));
    }
    Ok(kernel)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn header(sectors: u8, version: u16, offset: u32, length: u32) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[SETUP_SECTS] = sectors;
        header[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        header[VERSION..VERSION + 2].copy_from_slice(&version.to_le_bytes());
        header[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&offset.to_le_bytes());
        header[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&length.to_le_bytes());
        header
    }

    #[test]
    fn the_payload_is_where_the_header_says_and_in_the_file() {
        let of = |header: [u8; HEADER], size| place(&header, size);
        let place = of(header(39, 0x20f, 0x2cc, 100), 1 << 20).unwrap().unwrap();
        assert_eq!(place.offset, 40 * 512 + 0x2cc);
        let place = of(header(0, 0x20f, 0, 1), 1 << 20).unwrap().unwrap();
        assert_eq!(place.offset, 5 * 512);
        assert!(of(header(1, 0x207, 0, 1), 1 << 20).unwrap().is_none());
        let error = of(header(1, 0x20f, u32::MAX, u32::MAX), 1 << 20);
        assert!(matches!(error, Err(KernelError::Header(_))));
        assert!(matches!(
            of([0; HEADER], 1 << 20),
            Err(KernelError::Unknown)
        ));
    }

    #[test]
    fn each_compression_is_known_by_its_magic() {
        let kernel: Vec<u8> = (0..100_000u32).map(|i| (i / 7) as u8).collect();
        let mut lz4 = vec![0x02, 0x21, 0x4c, 0x18];
        for part in kernel.chunks(60_000) {
            let block = lz4_flex::block::compress(part);
            lz4.extend((block.len() as u32).to_le_bytes());
            lz4.extend(block);
        }
        lz4.extend((kernel.len() as u32).to_le_bytes());
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&kernel).unwrap();
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        let zstd = ruzstd::encoding::compress_to_vec(&kernel[..], level);
        for (name, packed) in [
            ("lz4", lz4),
            ("gzip", gzip.finish().unwrap()),
            ("zstd", zstd),
        ] {
            let (found, unpacked) = unpacked(&packed).unwrap();
            assert_eq!(found, name);
            assert!(unpacked.unwrap() == kernel, "{name}");
            // What is cut off or damaged is an error or less, and no panic.
            for at in (0..packed.len().min(2000)).step_by(7) {
                let mut damaged = packed[..packed.len() - at].to_vec();
                damaged[at.min(packed.len() - at - 1)] ^= 0x55;
                let _ = super::unpacked(&damaged).map(|(_, kernel)| kernel.is_ok());
            }
        }
        assert!(super::unpacked(b"\xfd7zXZ").is_none());
    }
}

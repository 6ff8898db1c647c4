//! The superblock of EROFS, as far as it says whether a file is a whole one.
//!
//! Used by `disk`. The layout is that of `struct erofs_super_block` in the kernel's
//! `fs/erofs/erofs_fs.h`; its checksum (`EROFS_FEATURE_COMPAT_SB_CHKSUM`) covers the first block
//! from the superblock on.

use std::{fs::File, os::unix::fs::FileExt as _};

const OFFSET: usize = 1024;
const BLOCK: usize = 4096;
const MAGIC: u32 = 0xe0f5_e1e2;
const CHECKSUM: std::ops::Range<usize> = 4..8;
const FEATURE_CHECKSUM: u32 = 1;

/// Whether the file begins with a superblock of this identity and is as long as that says.
pub(super) fn is_file_system(file: &File, length: u64, uuid: [u8; 16]) -> bool {
    let mut block = [0; BLOCK];
    file.read_exact_at(&mut block, 0).is_ok() && is_superblock(&block[OFFSET..], length, uuid)
}

fn is_superblock(block: &[u8], length: u64, uuid: [u8; 16]) -> bool {
    let number = |at: usize| {
        let bytes = block.get(at..at + 4).and_then(|it| it.try_into().ok());
        bytes.map_or(0, u32::from_le_bytes)
    };
    let mut unsummed = block.to_vec();
    unsummed[CHECKSUM].fill(0);
    number(0) == MAGIC
        && number(8) & FEATURE_CHECKSUM != 0
        && number(4) == crc32c(&unsummed)
        // The block size's exponent; then the number of blocks.
        && block[12] == 12
        && u64::from(number(36)) * BLOCK as u64 == length
        && block[48..64] == uuid
}

/// CRC-32C without the final inversion, as the kernel's `crc32c(~0, ...)`.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg())
        })
    })
}

/// The usual way to write one.
pub(super) fn uuid_text(uuid: [u8; 16]) -> String {
    let mut text = String::new();
    for (at, byte) in uuid.iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text += &format!("{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_castagnolis() {
        // The check value of every catalogue of CRCs, less the inversion at the end.
        assert_eq!(crc32c(b"123456789"), !0xe306_9283);
    }

    #[test]
    fn an_identity_is_written_as_everywhere() {
        let uuid = std::array::from_fn(|at| u8::try_from(at).unwrap());
        assert_eq!(uuid_text(uuid), "00010203-0405-0607-0809-0a0b0c0d0e0f");
    }
}

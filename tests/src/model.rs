//! What a disk must contain: a copy in memory, and a random sequence that is
//! the same in every run.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes per sector, the unit of every request.
pub const SECTOR: u64 = 512;

/// A xorshift sequence: repeatable, and good enough to fill blocks.
#[derive(Clone, Debug)]
pub struct Sequence(u64);

impl Sequence {
    /// The sequence that belongs to `seed`.
    pub fn new(seed: u64) -> Self {
        Sequence(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// The next number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        (self.number() >> 11) % end
    }

    /// `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend_from_slice(&self.number().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}

/// The expected content of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model(Vec<u8>);

impl Model {
    /// A disk of zeroes.
    pub fn zeroed(len: u64) -> Self {
        Model(vec![0; len as usize])
    }

    /// Bytes on the disk.
    pub fn len(&self) -> u64 {
        self.0.len() as u64
    }

    /// True for a disk without a byte.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What a read at `offset` must return.
    pub fn read(&self, offset: u64, len: usize) -> &[u8] {
        &self.0[offset as usize..offset as usize + len]
    }

    /// Notes a write that was acknowledged.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.0[offset as usize..offset as usize + bytes.len()].copy_from_slice(bytes);
    }

    /// The first place where the file at `path` differs.
    pub fn differs(&self, path: &Path) -> Option<String> {
        let mut found = vec![0; self.0.len()];
        let read = File::open(path).and_then(|file| file.read_exact_at(&mut found, 0));
        if let Err(error) = read {
            return Some(format!("{}: {error}", path.display()));
        }
        let at = self
            .0
            .iter()
            .zip(&found)
            .position(|(want, have)| want != have)?;
        Some(format!(
            "byte {at} (sector {}) is {:#04x}, should be {:#04x}",
            at as u64 / SECTOR,
            found[at],
            self.0[at]
        ))
    }
}

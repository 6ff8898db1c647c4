//! What a pod's writer keeps on a volume: blocks of which each has two places, so that the one that
//! was flushed last is never what is being written. A pod that ends in the middle of a write leaves
//! the generation before it whole. Called by `pericarp-writer`, in the guest.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use crate::verified::{BLOCK, origin, pattern};

/// Blocks of a volume.
pub const BLOCKS: usize = 64;
/// Bytes that a volume must have.
pub const SIZE: u64 = (2 * BLOCKS * BLOCK) as u64;
/// What transfers past the guest's cache are aligned to, bytes.
const ALIGNMENT: usize = 4096;

/// A volume, a file or a block device.
#[derive(Debug)]
pub struct Store {
    file: File,
    first: usize,
    generations: Vec<u32>,
    buffer: Vec<u8>,
    at: usize,
}

impl Store {
    /// Opens the volume, past the guest's cache where that can be, and looks for the newest whole
    /// generation of each block. Blocks of no two tags are alike.
    ///
    /// # Errors
    /// When it cannot be opened or read.
    pub fn open(path: &Path, tag: usize) -> io::Result<Self> {
        let open = |flags| {
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(false);
            options.custom_flags(flags).open(path)
        };
        let file = open(libc::O_DIRECT).or_else(|_| open(0))?;
        let found = file.metadata()?;
        if found.is_file() && found.len() < SIZE {
            file.set_len(SIZE)?;
            file.sync_all()?;
        }
        let buffer = vec![0; BLOCK + ALIGNMENT];
        let at = buffer.as_ptr().align_offset(ALIGNMENT);
        let mut store = Self {
            file,
            first: tag * BLOCKS,
            generations: vec![0; BLOCKS],
            buffer,
            at,
        };
        for block in 0..BLOCKS {
            store.generations[block] = store.newest(block)?;
        }
        Ok(store)
    }

    /// The newest generation of each block; 0 is none.
    pub fn generations(&self) -> &[u32] {
        &self.generations
    }

    fn newest(&mut self, block: usize) -> io::Result<u32> {
        let mut newest = 0;
        for place in 0..2 {
            self.read(block, place)?;
            let bytes = &self.buffer[self.at..][..BLOCK];
            let word = u64::from_le_bytes(bytes[..8].try_into().unwrap_or_default());
            let generation = (word >> 16) as u32;
            if generation % 2 == place && bytes == pattern(self.first + block, generation) {
                newest = newest.max(generation);
            }
        }
        Ok(newest)
    }

    fn read(&mut self, block: usize, place: u32) -> io::Result<()> {
        let bytes = &mut self.buffer[self.at..][..BLOCK];
        self.file.read_exact_at(bytes, offset(block, place))
    }

    /// Writes the next generation of a block and has it flushed; which that is.
    ///
    /// # Errors
    /// When it is not on the volume.
    pub fn write(&mut self, block: usize) -> io::Result<u32> {
        let next = self.generations[block] + 1;
        let bytes = &mut self.buffer[self.at..][..BLOCK];
        bytes.copy_from_slice(&pattern(self.first + block, next));
        self.file.write_all_at(bytes, offset(block, next % 2))?;
        self.file.sync_data()?;
        self.generations[block] = next;
        Ok(next)
    }

    /// Reads the newest generation of a block, and sees that it is what was written.
    ///
    /// # Errors
    /// When it cannot be read, or is something else.
    pub fn compare(&mut self, block: usize) -> io::Result<()> {
        let want = self.generations[block];
        self.read(block, want % 2)?;
        let bytes = &self.buffer[self.at..][..BLOCK];
        if want == 0 || bytes == pattern(self.first + block, want) {
            return Ok(());
        }
        let (own, found) = (self.first + block, origin(bytes));
        let what = format!("block {own} generation {want} holds {found}");
        Err(io::Error::other(what))
    }
}

fn offset(block: usize, place: u32) -> u64 {
    (2 * block as u64 + u64::from(place)) * BLOCK as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;

    #[test]
    fn what_was_flushed_is_found_also_when_the_next_write_is_torn() {
        let scratch = Scratch::new();
        let path = scratch.path("volume");
        let mut store = Store::open(&path, 3).unwrap();
        assert!(store.generations().iter().all(|&one| one == 0));
        for want in 1..=4 {
            assert_eq!(store.write(7).unwrap(), want);
            store.compare(7).unwrap();
        }
        let whole = Store::open(&path, 3).unwrap();
        assert_eq!(whole.generations()[7], 4);
        // The fifth has the place of the third; half of it arrives.
        let file = File::options().write(true).open(&path).unwrap();
        let half = &pattern(3 * BLOCKS + 7, 5)[..BLOCK / 2];
        file.write_all_at(half, offset(7, 1)).unwrap();
        assert_eq!(Store::open(&path, 3).unwrap().generations()[7], 4);
        // Another's block is none.
        assert_eq!(Store::open(&path, 4).unwrap().generations()[7], 0);
        // What is spoiled is seen.
        file.write_all_at(b"spoiled", offset(7, 0) + 9000).unwrap();
        let error = store.compare(7).unwrap_err().to_string();
        assert!(error.contains("generation 4"), "{error}");
        assert_eq!(Store::open(&path, 3).unwrap().generations()[7], 0);
    }
}

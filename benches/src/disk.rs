//! The disk image that all targets of a run share.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use crate::Outcome;

/// Size of the disk that is made.
const DISK_BYTES: u64 = 1 << 30;

/// One step of xorshift64*.
pub fn next_random(mut state: u64) -> u64 {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    state.wrapping_mul(0x2545_f491_4f6c_dd1d)
}

/// Makes the disk if it is not there. Its blocks are written, so that reads
/// reach the medium and not a hole.
///
/// # Errors
/// When it cannot be made.
pub fn prepare(path: &Path) -> Outcome<()> {
    prepare_of(path, DISK_BYTES)
}

/// As [`prepare`], with so many bytes, a multiple of 1 MiB.
///
/// # Errors
/// When it cannot be made.
pub fn prepare_of(path: &Path, bytes: u64) -> Outcome<()> {
    if path.exists() {
        return Ok(());
    }
    eprintln!("filling {}", path.display());
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    // Moved to its place whole: half a disk would be taken for one.
    let unfinished = path.with_extension(format!("{}", std::process::id()));
    let made = File::create(&unfinished)
        .and_then(|mut file| fill(&mut file, bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&unfinished, path));
    if made.is_err() {
        let _ = fs::remove_file(&unfinished);
    }
    made.map_err(|e| format!("cannot make the disk {}: {e}", path.display()).into())
}

/// Writes `len` random bytes, whole MiB of them.
///
/// # Errors
/// When they cannot be written.
pub fn fill(to: &mut impl Write, len: u64) -> std::io::Result<()> {
    let mut block = vec![0u8; 1 << 20];
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..len / block.len() as u64 {
        for word in block.chunks_exact_mut(8) {
            state = next_random(state);
            word.copy_from_slice(&state.to_ne_bytes());
        }
        to.write_all(&block)?;
    }
    Ok(())
}

//! Memory of another crate's that its front end takes away: see `pericarp_ring::Watched`. In a
//! process of its own, since the threads of loom's tests take SIGBUS for themselves.
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::fs::File;
use std::sync::Arc;

use pericarp_ring::Watched;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

/// A file without a name, which knows no seals.
fn file(len: u64) -> File {
    let path = std::env::temp_dir().join(format!("pericarp-watched-{}", std::process::id()));
    let mut options = File::options();
    let file = options
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    std::fs::remove_file(path).unwrap();
    file.set_len(len).unwrap();
    file
}

fn memory(file: &File, len: usize) -> Arc<GuestMemoryMmap> {
    let offset = FileOffset::new(file.try_clone().unwrap(), 0);
    let ranges = [(GuestAddress(0), len, Some(offset))];
    Arc::new(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap())
}

#[test]
fn memory_of_others_that_is_taken_away_is_lost_to_all_who_watch_it() {
    let file = file(0x4000);
    let memory = memory(&file, 0x4000);
    let watched = Watched::new(Arc::clone(&memory)).unwrap();
    // As when the next table has some of the same regions.
    let again = Watched::new(Arc::clone(&memory)).unwrap();
    assert!(watched.is_of(&memory) && !watched.is_lost());
    memory.write_obj(7_u64, GuestAddress(0x3000)).unwrap();
    file.set_len(0x1000).unwrap();
    let read: u64 = memory.read_obj(GuestAddress(0x3000)).unwrap();
    assert_eq!(read, 0);
    assert!(watched.is_lost() && again.is_lost());
}

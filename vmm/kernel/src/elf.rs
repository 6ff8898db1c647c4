//! What is read of a plain kernel's ELF headers: where its parts go, and whether it has a PVH
//! entry (Xen's `docs/misc/pvh.pandoc`). Called by the monitor, which has its memory ready before
//! it loads the parts, and before QEMU is given a kernel that it may not know how to enter.
//!
//! The file is the operator's and not the guest's, but may be damaged: no more is read than a
//! kernel has.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const LOAD: u64 = 1;
const NOTE: u64 = 4;
const ENTRY: u64 = 56;
const MOST: u64 = 16;
/// A part of a kernel that is larger is not believed.
const LARGEST: u64 = 64 << 20;
/// All notes of a kernel together are smaller.
const NOTES: u64 = 64 << 10;
const XEN: &[u8] = b"Xen\0";
/// XEN_ELFNOTE_PHYS32_ENTRY.
const PHYS32_ENTRY: u32 = 18;

/// A part of the kernel.
struct Segment {
    kind: u64,
    offset: u64,
    address: u64,
    /// In the file.
    length: u64,
    /// In memory.
    size: u64,
}

fn all(file: &File) -> io::Result<Vec<Segment>> {
    let field = |at: u64, size: usize| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes[..size], at)?;
        Ok::<_, io::Error>(u64::from_le_bytes(bytes))
    };
    let (table, count) = (field(32, 8)?, field(56, 2)?);
    let mut segments = Vec::new();
    for index in 0..count.min(MOST) {
        let entry = table.saturating_add(index * ENTRY);
        segments.push(Segment {
            kind: field(entry, 4)?,
            offset: field(entry.saturating_add(8), 8)?,
            address: field(entry.saturating_add(24), 8)?,
            length: field(entry.saturating_add(32), 8)?,
            size: field(entry.saturating_add(40), 8)?,
        });
    }
    Ok(segments)
}

/// Where the parts of a plain kernel go: address and size of each, in bytes. No more of them and
/// no larger than those of a kernel.
///
/// # Errors
/// The headers cannot be read.
pub fn segments(file: &File) -> io::Result<Vec<(u64, u64)>> {
    let mut segments = all(file)?;
    segments.retain(|segment| segment.kind == LOAD);
    let placed = |segment: Segment| (segment.address, segment.size.min(LARGEST));
    Ok(segments.into_iter().map(placed).collect())
}

/// Whether a plain kernel has a PVH entry; one whose headers or notes are damaged has none.
#[must_use]
pub fn has_pvh_entry(file: &File) -> bool {
    let notes = |segment: &Segment| {
        let mut notes = vec![0; segment.length.min(NOTES) as usize];
        let read = file.read_exact_at(&mut notes, segment.offset);
        read.is_ok() && is_among(&notes)
    };
    let segments = all(file).unwrap_or_default();
    segments.iter().filter(|s| s.kind == NOTE).any(notes)
}

/// Whether the note of the entry is among these: sizes of name and content and the type, then
/// name and content, each filled up to four bytes.
fn is_among(mut notes: &[u8]) -> bool {
    while let Some((head, rest)) = notes.split_first_chunk::<12>() {
        let word = |at: usize| {
            let bytes = [head[at], head[at + 1], head[at + 2], head[at + 3]];
            u32::from_le_bytes(bytes)
        };
        let filled = |size: u32| (size as usize).next_multiple_of(4);
        let (name, content, kind) = (word(0), word(4), word(8));
        if kind == PHYS32_ENTRY && name as usize == XEN.len() && rest.starts_with(XEN) {
            return true;
        }
        let Some(next) = rest.get(filled(name).saturating_add(filled(content))..) else {
            return false;
        };
        notes = next;
    }
    false
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

    use super::*;

    fn note(name: &[u8], kind: u32, content: &[u8]) -> Vec<u8> {
        let mut note = Vec::new();
        for word in [name.len() as u32, content.len() as u32, kind] {
            note.extend(word.to_le_bytes());
        }
        for part in [name, content] {
            note.extend(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        note
    }

    fn file(bytes: &[u8]) -> File {
        let memfd = rustix::fs::memfd_create("elf", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(memfd);
        file.write_all(bytes).unwrap();
        file
    }

    /// Headers with one part to load and these notes.
    fn kernel(notes: &[u8]) -> File {
        let mut bytes = vec![0; 64 + 2 * 56];
        bytes[..4].copy_from_slice(b"\x7fELF");
        bytes[32] = 64;
        bytes[56] = 2;
        let mut put = |at: usize, value: u64| {
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        };
        put(64, LOAD);
        put(64 + 24, 0x100_0000);
        put(64 + 40, 1 << 40);
        put(120, NOTE);
        put(120 + 8, 64 + 2 * 56);
        put(120 + 32, notes.len() as u64);
        bytes.extend(notes);
        file(&bytes)
    }

    #[test]
    fn the_entry_is_found_among_notes() {
        let others = [note(b"Linux\0", 0x101, b"abc"), note(b"Xen\0", 6, b"linux")].concat();
        let entry = note(XEN, PHYS32_ENTRY, &[0; 8]);
        assert!(has_pvh_entry(&kernel(&[&others[..], &entry].concat())));
        assert!(!has_pvh_entry(&kernel(&others)));
        assert!(!has_pvh_entry(&kernel(&note(b"GNU\0", PHYS32_ENTRY, b""))));
        assert!(!has_pvh_entry(&file(b"\x7fELF")));
    }

    #[test]
    fn parts_are_no_larger_than_a_kernels() {
        let parts = segments(&kernel(b"")).unwrap();
        assert_eq!(parts, [(0x100_0000, LARGEST)]);
        assert!(segments(&file(b"")).is_err());
    }

    proptest! {
        #[test]
        fn no_notes_harm(notes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = is_among(&notes);
        }

        #[test]
        fn no_headers_harm(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let damaged = file(&bytes);
            let _ = (segments(&damaged), has_pvh_entry(&damaged));
        }
    }
}

//! Puts a kernel, its command line and its initramfs into guest memory, and the
//! structure by which it learns of them: `hvm_start_info` for a plain kernel with
//! a PVH entry, the zero page for a bzImage. Called by [`crate::machine`] for
//! every start of the guest, on memory that is all zero.
//!
//! Both entries are 32-bit ones with a flat view of memory, so that one state of
//! the CPU serves both: see [`crate::cpu`].

use std::fs::File;
use std::io::{self, Seek, SeekFrom};

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::boot_params;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::{BzImage, Elf, KernelLoader, elf::PvhBootCapability};
use pericarp_kernel::{Image, elf};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use crate::layout;
use crate::memory::Ram;

const PAGE: u64 = 4096;
/// XEN_HVM_START_MAGIC_VALUE.
const START_MAGIC: u32 = 0x336e_c578;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// Below this any kernel of our time finds its initramfs.
const INITRAMFS_END: u64 = 0x7fff_ffff;

/// What a kernel of 6.12 touches at its start, above its own end and below its initramfs.
const FIRST_LOW: u64 = 6 << 20;
const FIRST_HIGH: u64 = 12 << 20;
/// Its list of all pages, above its own end too, takes this part of them.
const PAGES: u64 = 64;

/// Why a kernel cannot be put into the guest's memory.
#[derive(Debug, Error)]
pub enum LoadError {
    /// It or the initramfs cannot be read.
    #[error("cannot read the kernel")]
    Read(#[from] io::Error),
    /// A bzImage without what says how to load it.
    #[error("it has no setup header")]
    NoHeader,
    /// Its parts do not fit together.
    #[error("it cannot be loaded: {0}")]
    Load(String),
    /// The guest's memory is too small.
    #[error("{what} of {size} bytes does not fit into the guest's memory of {memory} bytes")]
    Memory {
        /// The kernel or the initramfs.
        what: &'static str,
        /// Its size.
        size: u64,
        /// Of the guest.
        memory: u64,
    },
}

/// How the first CPU enters the kernel: 32-bit, flat, without paging.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The instruction.
    pub rip: u64,
    /// PVH: address of the start info.
    pub rbx: u64,
    /// Linux boot protocol: address of the zero page.
    pub rsi: u64,
}

/// Loads all of it.
///
/// # Errors
/// Something does not fit or cannot be read.
pub fn load(
    ram: &Ram,
    image: &Image,
    initramfs: Option<&File>,
    command_line: &str,
) -> Result<Entry, LoadError> {
    let memory = ram.mmap();
    let mut line = command_line.as_bytes().to_vec();
    line.push(0);
    memory
        .write_slice(&line, GuestAddress(layout::COMMAND_LINE))
        .map_err(unloadable)?;
    let start = Some(GuestAddress(layout::HIGH));
    // What the firmware would have used, and what the kernel uses before it knows its memory.
    ram.prepare(0, layout::HIGH);
    match image {
        Image::Elf(file) => {
            let mut file = file.try_clone()?;
            // Only to be quicker: what is wrong with them the loader says.
            for (address, size) in elf::segments(&file).unwrap_or_default() {
                ram.prepare(address, size);
            }
            file.rewind()?;
            let loaded = Elf::load(memory, None, &mut file, start).map_err(unloadable)?;
            let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
                let reason = "it has no PVH entry (CONFIG_PVH): give its bzImage instead";
                return Err(LoadError::Load(reason.to_owned()));
            };
            let after = loaded.kernel_end;
            let pages = match ram.slots().len() {
                1 => ram.size() / PAGES,
                // It lies elsewhere where there is memory above the hole.
                _ => 0,
            };
            ram.prepare(after, FIRST_LOW + pages);
            let initramfs = place(ram, initramfs, after, INITRAMFS_END)?;
            start_info(ram, initramfs)?;
            Ok(Entry {
                rip: entry.0,
                rbx: layout::START_INFO,
                rsi: 0,
            })
        }
        Image::BzImage(file) => {
            let mut file = file.try_clone()?;
            file.rewind()?;
            let loaded = BzImage::load(memory, None, &mut file, start).map_err(unloadable)?;
            let header = loaded.setup_header.ok_or(LoadError::NoHeader)?;
            // It unpacks itself to its preferred address and needs so much there.
            let unpacked = header.pref_address.saturating_add(header.init_size.into());
            let after = loaded.kernel_end.max(unpacked);
            let last = u64::from(header.initrd_addr_max).min(INITRAMFS_END);
            let initramfs = place(ram, initramfs, after, last)?;
            let mut params = boot_params {
                hdr: header,
                acpi_rsdp_addr: layout::RSDP,
                ..boot_params::default()
            };
            params.hdr.type_of_loader = LOADER_UNDEFINED;
            params.hdr.cmd_line_ptr = layout::COMMAND_LINE as u32;
            if let Some((address, size)) = initramfs {
                params.hdr.ramdisk_image = address as u32;
                params.hdr.ramdisk_size = size as u32;
            }
            let map = memory_map(ram);
            for (slot, (address, size, kind)) in params.e820_table.iter_mut().zip(&map) {
                slot.addr = *address;
                slot.size = *size;
                slot.r#type = *kind;
            }
            params.e820_entries = map.len() as u8;
            let params = BootParams::new(&params, GuestAddress(layout::MEMORY_MAP));
            LinuxBootConfigurator::write_bootparams(&params, memory).map_err(unloadable)?;
            Ok(Entry {
                rip: loaded.kernel_load.0,
                rbx: 0,
                rsi: layout::MEMORY_MAP,
            })
        }
    }
}

fn unloadable(error: impl std::fmt::Display) -> LoadError {
    LoadError::Load(error.to_string())
}

/// Puts the initramfs as high as it goes below `last`, above `after`. Returns
/// its address and size.
fn place(
    ram: &Ram,
    initramfs: Option<&File>,
    after: u64,
    last: u64,
) -> Result<Option<(u64, u64)>, LoadError> {
    let Some(file) = initramfs else {
        return Ok(None);
    };
    let mut file = file.try_clone()?;
    let size = file.seek(SeekFrom::End(0))?;
    file.rewind()?;
    let (_, low, _) = ram.slots().first().copied().unwrap_or_default();
    let end = low.min(last + 1);
    let address = end.checked_sub(size).map(|start| start / PAGE * PAGE);
    let Some(address) = address.filter(|address| *address >= after.max(layout::HIGH)) else {
        return Err(LoadError::Memory {
            what: "the initramfs",
            size,
            memory: low,
        });
    };
    let first = address.saturating_sub(FIRST_HIGH).max(after);
    ram.prepare(first, end - first);
    let size_here = usize::try_from(size).map_err(unloadable)?;
    ram.mmap()
        .read_exact_volatile_from(GuestAddress(address), &mut file, size_here)
        .map_err(unloadable)?;
    Ok(Some((address, size)))
}

/// Address, size and type of every range.
fn memory_map(ram: &Ram) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, layout::LOW_END, E820_RAM),
        (
            layout::LOW_END,
            layout::HIGH - layout::LOW_END,
            E820_RESERVED,
        ),
    ];
    for (start, size, _) in ram.slots() {
        let begin = start.max(layout::HIGH);
        map.push((begin, start + size - begin, E820_RAM));
    }
    // Linux uses the memory-mapped configuration space only where this says so.
    map.push((layout::ECAM, layout::ECAM_SIZE, E820_RESERVED));
    map
}

fn start_info(ram: &Ram, initramfs: Option<(u64, u64)>) -> Result<(), LoadError> {
    let map: Vec<hvm_memmap_table_entry> = memory_map(ram)
        .into_iter()
        .map(|(addr, size, type_)| hvm_memmap_table_entry {
            addr,
            size,
            type_,
            reserved: 0,
        })
        .collect();
    let modules: Vec<hvm_modlist_entry> = initramfs
        .into_iter()
        .map(|(paddr, size)| hvm_modlist_entry {
            paddr,
            size,
            ..hvm_modlist_entry::default()
        })
        .collect();
    let info = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        cmdline_paddr: layout::COMMAND_LINE,
        rsdp_paddr: layout::RSDP,
        memmap_paddr: layout::MEMORY_MAP,
        memmap_entries: map.len() as u32,
        nr_modules: modules.len() as u32,
        modlist_paddr: layout::MODULES,
        ..hvm_start_info::default()
    };
    let mut params = BootParams::new(&info, GuestAddress(layout::START_INFO));
    params.set_sections(&map, GuestAddress(layout::MEMORY_MAP));
    if !modules.is_empty() {
        params.set_modules(&modules, GuestAddress(layout::MODULES));
    }
    PvhBootConfigurator::write_bootparams(&params, ram.mmap()).map_err(unloadable)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::memory::{Backing, GRAIN};

    fn file(bytes: &[u8]) -> File {
        let memfd = rustix::fs::memfd_create("f", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(memfd);
        file.write_all(bytes).unwrap();
        file
    }

    /// The smallest kernel: one segment of four bytes and the note of the entry.
    fn elf() -> Vec<u8> {
        let mut note = Vec::new();
        for word in [4u32, 4, 18] {
            note.extend(word.to_le_bytes());
        }
        note.extend(b"Xen\0");
        note.extend(0x100_0a30u32.to_le_bytes());
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(16, 0);
        for half in [2u16, 62] {
            elf.extend(half.to_le_bytes());
        }
        elf.extend(1u32.to_le_bytes());
        for word in [0x100_0000u64, 64, 0] {
            elf.extend(word.to_le_bytes());
        }
        elf.extend(0u32.to_le_bytes());
        for half in [64u16, 56, 2, 64, 0, 0] {
            elf.extend(half.to_le_bytes());
        }
        let data = 64 + 2 * 56;
        let mut segment = |kind: u32, offset: u64, size: u64, address: u64| {
            elf.extend(kind.to_le_bytes());
            elf.extend(0u32.to_le_bytes());
            for word in [offset, address, address, size, size, 0] {
                elf.extend(word.to_le_bytes());
            }
        };
        segment(1, data, 4, 0x100_0000);
        segment(4, data + 4, note.len() as u64, 0);
        elf.extend(b"code");
        elf.extend(note);
        elf
    }

    #[test]
    fn a_plain_kernel_is_entered_by_its_note() {
        let ram = Ram::new(16 * GRAIN, Backing::default()).unwrap();
        let initramfs = file(&[7; 5000]);
        let image = Image::Elf(file(&elf()));
        let entry = load(&ram, &image, Some(&initramfs), "quiet").unwrap();
        assert_eq!(entry.rip, 0x100_0a30);
        assert_eq!(entry.rbx, layout::START_INFO);
        let memory = ram.mmap();
        let mut code = [0; 4];
        memory
            .read_slice(&mut code, GuestAddress(0x100_0000))
            .unwrap();
        assert_eq!(&code, b"code");
        let info: hvm_start_info = memory.read_obj(GuestAddress(entry.rbx)).unwrap();
        assert_eq!(info.nr_modules, 1);
        let module: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!((module.size, module.paddr % PAGE), (5000, 0));
        let byte: u8 = memory.read_obj(GuestAddress(module.paddr + 4999)).unwrap();
        assert_eq!(byte, 7);
        let mut line = [0; 6];
        memory
            .read_slice(&mut line, GuestAddress(info.cmdline_paddr))
            .unwrap();
        assert_eq!(&line, b"quiet\0");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let ram = Ram::new(16 * GRAIN, Backing::default()).unwrap();
        let initramfs = file(&[]);
        initramfs.set_len(32 * GRAIN).unwrap();
        let image = Image::Elf(file(&elf()));
        let error = load(&ram, &image, Some(&initramfs), "").unwrap_err();
        assert!(matches!(error, LoadError::Memory { .. }), "{error}");
        let small = Ram::new(GRAIN, Backing::default()).unwrap();
        let error = load(&small, &image, None, "").unwrap_err();
        assert!(matches!(error, LoadError::Load(_)), "{error}");
    }

    #[test]
    fn the_map_has_the_configuration_space_and_no_overlaps() {
        let ram = Ram::new(layout::HOLE + GRAIN, Backing::default()).unwrap();
        let mut map = memory_map(&ram);
        map.sort_unstable();
        let apart = map
            .windows(2)
            .all(|pair| pair[0].0 + pair[0].1 <= pair[1].0);
        assert!(apart, "{map:x?}");
        assert!(map.contains(&(layout::ECAM, layout::ECAM_SIZE, E820_RESERVED)));
        assert!(map.contains(&(layout::ABOVE, GRAIN, E820_RAM)));
    }
}

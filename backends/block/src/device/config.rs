//! The configuration space (virtio 1.3, 5.2.4): what the driver is told of the
//! disk. The device's `config` calls it; each field stands beside the feature
//! that makes it valid.
//!
//! SIZE_MAX is not offered: segments of any size are taken, and a limit would
//! only make drivers cut what the disk takes whole. GEOMETRY is not offered:
//! cylinders and heads are an invention for firmware of the 1990s, which works
//! one out itself where it wants one.

use std::sync::atomic::Ordering;

use super::BlockDevice;
use super::space::{
    MAX_DISCARD_RANGES, MAX_DISCARD_SECTORS, MAX_ZEROES_RANGES, MAX_ZEROES_SECTORS,
};
use crate::disk::{DiscardBy, SECTOR};

/// Offset of the writeback byte.
pub(super) const WRITEBACK_OFFSET: usize = 32;
/// Length up to and including the fields of WRITE_ZEROES.
pub(super) const CONFIG_BYTES: usize = 60;

/// Linux rejects more than this in a vectored call, less header and status.
const SEG_MAX_LIMIT: u16 = 254;

impl BlockDevice {
    /// What requests are made by, as text: all of the space but the size, the
    /// hints of TOPOLOGY, and what the driver sets.
    pub(crate) fn promises(&self) -> String {
        let space = self.config_space();
        let lasting = [8..24, 34..CONFIG_BYTES].into_iter();
        let bytes = lasting.flat_map(|range| space[range].to_vec());
        bytes.map(|byte| format!("{byte:02x}")).collect()
    }

    pub(super) fn config_space(&self) -> Vec<u8> {
        let seg_max = (self.queue_size - 2).min(SEG_MAX_LIMIT);
        let logical = self.disk.logical_block;
        let topology = &self.disk.topology;
        let ratio = self.disk.physical_block / logical;
        let exponent = ratio.trailing_zeros().min(255) as u8;
        let align_offset = u8::try_from(topology.align_offset / logical).unwrap_or(0);
        let min_io = u16::try_from(topology.min_io / logical).unwrap_or(1);
        let mut space = vec![0; CONFIG_BYTES];
        let mut put = |offset: usize, bytes: &[u8]| {
            space[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        put(0, &(self.size() / SECTOR).to_le_bytes());
        put(12, &u32::from(seg_max).to_le_bytes());
        put(20, &logical.to_le_bytes());
        // TOPOLOGY: all in logical blocks.
        put(24, &[exponent, align_offset]);
        put(26, &min_io.max(1).to_le_bytes());
        put(28, &(topology.opt_io / logical).to_le_bytes());
        let writeback = self.writeback.load(Ordering::Relaxed);
        put(WRITEBACK_OFFSET, &[u8::from(writeback)]);
        put(34, &self.queues.to_le_bytes());
        if topology.discard != DiscardBy::Nothing {
            let granularity = topology.granularity.max(logical) / SECTOR as u32;
            put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
            put(40, &(MAX_DISCARD_RANGES as u32).to_le_bytes());
            put(44, &granularity.to_le_bytes());
        }
        if !self.disk.read_only {
            put(48, &MAX_ZEROES_SECTORS.to_le_bytes());
            put(52, &(MAX_ZEROES_RANGES as u32).to_le_bytes());
            put(56, &[u8::from(topology.unmap_zeroes)]);
        }
        space
    }
}

//! A disk: requests that are nearly right, and I/O that shows that all is well.

use std::path::{Path, PathBuf};
use std::time::Duration;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::chance::Chance;
use super::session::{Request, Victim};
use super::witness::Innocent;
use crate::frontend::{Driver, Op, Setup};
use crate::model::SECTOR;
use crate::verified::{BLOCK, BLOCKS, Load};

/// Bytes of the part of a disk that is written.
pub(super) const DISK: u64 = (BLOCK * BLOCKS) as u64;
/// Bytes behind it, which hold what nobody else may see.
pub(super) const TAIL: u64 = 64 << 10;

/// The disk that is attacked.
#[derive(Debug, Default)]
pub(super) struct Disk;

impl Victim for Disk {
    fn queues(&self) -> u16 {
        2
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
    }

    fn request(&mut self, chance: &mut Chance) -> Request {
        let sectors = (DISK + TAIL) / SECTOR;
        let kind = match chance.below(16) {
            0..=4 => VIRTIO_BLK_T_IN,
            5..=9 => VIRTIO_BLK_T_OUT,
            10 => VIRTIO_BLK_T_FLUSH,
            11 => VIRTIO_BLK_T_GET_ID,
            12 => VIRTIO_BLK_T_DISCARD,
            13 => VIRTIO_BLK_T_WRITE_ZEROES,
            14 => chance.below(32) as u32,
            _ => chance.word(),
        };
        let sector = match chance.below(8) {
            0 => chance.number(),
            1 => sectors.wrapping_sub(chance.below(9)),
            2 => (1 << 55) - chance.below(4),
            _ => chance.below(sectors),
        };
        let len = match chance.below(8) {
            0 => chance.below(0x4000),
            1 => 0,
            _ => SECTOR << chance.below(6),
        } as usize;
        let mut header = Vec::new();
        header.extend(kind.to_le_bytes());
        // Reserved: it means nothing.
        header.extend(chance.word().to_le_bytes());
        header.extend(sector.to_le_bytes());
        if chance.one_in(24) {
            header.truncate(chance.below(17) as usize);
        }
        let mut readable = vec![header];
        let mut writable = Vec::new();
        match kind {
            VIRTIO_BLK_T_IN => writable.push(len as u32),
            VIRTIO_BLK_T_OUT => readable.push(chance.bytes(len)),
            VIRTIO_BLK_T_GET_ID => writable.push(chance.pick(&[20, 20, 0, 1, 512])),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                let mut ranges = Vec::new();
                for _ in 0..chance.below(5) {
                    let mut range = sector.to_le_bytes().to_vec();
                    range.extend((chance.below(64) as u32).to_le_bytes());
                    range.extend(chance.pick(&[0_u32, 1, 2]).to_le_bytes());
                    if chance.one_in(3) {
                        chance.spoil(&mut range);
                    }
                    ranges.extend(range);
                }
                readable.push(ranges);
            }
            _ => writable.push(len as u32),
        }
        // The status.
        writable.push(if chance.one_in(24) {
            chance.word() % 64
        } else {
            1
        });
        writable.retain(|len| *len > 0 || chance.one_in(8));
        readable.retain(|piece| !piece.is_empty() || chance.one_in(8));
        Request {
            queue: chance.below(2) as usize,
            readable,
            writable,
            what: kind,
        }
    }
}

/// Whoever has a disk of the same process.
pub(super) struct Neighbour {
    driver: Driver,
    load: Load,
    disk: PathBuf,
    tail: Vec<u8>,
}

impl Neighbour {
    /// Connects. Behind [`DISK`] its disk holds `tail`.
    pub(super) fn connect(socket: &Path, disk: &Path, tail: Vec<u8>) -> Result<Self, String> {
        // Three descriptors for each request of the load.
        let setup = Setup {
            queue_size: 256,
            ..Setup::default()
        };
        let driver = Driver::connect(socket, &setup).map_err(|e| e.to_string())?;
        Ok(Self {
            driver,
            load: Load::new(1),
            disk: disk.to_owned(),
            tail,
        })
    }
}

impl Innocent for Neighbour {
    fn turn(&mut self) -> Result<(), String> {
        self.load.run(&mut self.driver, Duration::from_millis(20))?;
        self.load.drain(&mut self.driver)?;
        let sector = DISK / SECTOR;
        let len = self.tail.len() as u32;
        let read = Op::Read { sector, len };
        let answer = self.driver.request(0, &read).map_err(|e| e.to_string())?;
        // What the load has not seen is not a call of its own.
        while self.driver.rings[0].called() {}
        match answer.status == 0 && answer.data == self.tail {
            true => Ok(()),
            false => Err(format!("the end of the disk: status {}", answer.status)),
        }
    }

    fn finish(&mut self) -> Result<(), String> {
        self.load.compare(&self.disk)
    }
}

/// One who comes in between: what is written is what is read.
pub(super) fn probe(socket: &Path) -> Result<(), String> {
    let mut driver = Driver::connect(socket, &Setup::default()).map_err(|e| e.to_string())?;
    for block in 0..8_u64 {
        let sector = block * 128;
        let data: Vec<u8> = (0..8192_u64).map(|at| (at * 7 + block) as u8).collect();
        let len = data.len() as u32;
        let write = Op::Write {
            sector,
            data: data.clone(),
        };
        for (op, want) in [(write, None), (Op::Read { sector, len }, Some(data))] {
            let answer = driver.request(0, &op).map_err(|e| e.to_string())?;
            if answer.status != 0 || want.is_some_and(|want| want != answer.data) {
                return Err(format!("sector {sector}: status {}", answer.status));
            }
        }
    }
    Ok(())
}

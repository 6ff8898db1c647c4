//! vhost-user messages that nobody should send: any request with any size, payload and
//! descriptors, and those that are right but for one field.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rustix::event::EventfdFlags;

use super::chance::Chance;
use super::report::Tally;
use crate::frontend::Driver;
use crate::wire::{self, NEED_REPLY, NO_FD, VERSION, request, sized, state, words};

/// Requests of the specification, and a few beyond.
const REQUESTS: u64 = 48;

/// Sends some of them on a connection that is set up. Hears what is answered at once.
pub(super) fn play(driver: &Driver, chance: &mut Chance, tally: &mut Tally) {
    let _ = driver
        .stream
        .set_read_timeout(Some(Duration::from_millis(2)));
    let null = File::open("/dev/null").ok();
    let directory = File::open("/").ok();
    // One that blocks, for two queues, and the other end of the connection stop `pericarp-vsock`
    // for good: see the known gaps in SECURITY.md.
    let event = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    let event = rustix::event::eventfd(0, event).ok();
    for _ in 0..1 + chance.below(16) {
        let (number, mut payload) = message(driver, chance);
        if chance.one_in(3) {
            chance.spoil(&mut payload);
        }
        let size = match chance.below(12) {
            0 => chance.word(),
            1 => payload.len() as u32 + 1,
            _ => payload.len() as u32,
        };
        let flags = match chance.below(8) {
            0 => chance.word(),
            1 => VERSION,
            _ => VERSION | NEED_REPLY,
        };
        let files = &driver.guest.files;
        let mut pool: Vec<BorrowedFd<'_>> = files.iter().map(File::as_fd).collect();
        pool.extend(null.iter().chain(&directory).map(File::as_fd));
        pool.extend(event.iter().map(AsFd::as_fd));
        let wanted = match number {
            request::SET_MEM_TABLE => 3,
            request::SET_VRING_KICK | request::SET_VRING_CALL | request::ADD_MEM_REG => 1,
            _ => 0,
        };
        let count = match chance.below(6) {
            0 => chance.below(9),
            _ => wanted,
        };
        let straight = count == 3 && wanted == 3 && !chance.one_in(4);
        let fds: Vec<BorrowedFd<'_>> = match straight {
            true => pool[..3].to_vec(),
            false => (0..count).map(|_| chance.pick(&pool)).collect(),
        };
        tally.tries += 1;
        if wire::send(&driver.stream, &sized(number, flags, size, &payload), &fds).is_err() {
            return;
        }
        tally.answered += u64::from(wire::receive(&driver.stream).is_ok());
        if let Some(ring) = driver.rings.first() {
            ring.notify();
        }
    }
}

/// A request's number and a payload of its shape.
fn message(driver: &Driver, chance: &mut Chance) -> (u32, Vec<u8>) {
    let queue = match chance.one_in(6) {
        true => chance.word(),
        false => chance.below(driver.rings.len() as u64) as u32,
    };
    let number = chance.below(REQUESTS) as u32;
    let payload = match number {
        request::SET_MEM_TABLE => {
            let mut bytes = Vec::new();
            let count = if chance.one_in(5) { chance.word() } else { 3 };
            bytes.extend(count.to_le_bytes());
            bytes.extend(0_u32.to_le_bytes());
            for region in driver.guest.table() {
                let fields = [
                    region.guest_phys_addr,
                    region.memory_size,
                    region.userspace_addr,
                    region.mmap_offset,
                ];
                bytes.extend(words(&fields));
            }
            if chance.one_in(2) {
                chance.spoil(&mut bytes[8..]);
            }
            bytes
        }
        request::SET_VRING_NUM
        | request::SET_VRING_BASE
        | request::GET_VRING_BASE
        | request::SET_VRING_ENABLE => state(queue, chance.word()),
        request::SET_VRING_ADDR => {
            let at = |address| driver.guest.pointer(address).unwrap_or_default();
            let ring = &driver.rings[0];
            let places = [
                at(ring.desc_at(0)),
                at(ring.used_at()),
                at(ring.avail_at()),
                0,
            ];
            let mut bytes = [state(queue, 0), words(&places)].concat();
            if !chance.one_in(3) {
                chance.spoil(&mut bytes[8..]);
            }
            bytes
        }
        request::SET_VRING_KICK | request::SET_VRING_CALL => {
            let none = if chance.one_in(2) { NO_FD } else { 0 };
            words(&[u64::from(queue & 0xff) | none])
        }
        request::SET_FEATURES | request::SET_PROTOCOL_FEATURES => words(&[chance.number()]),
        request::GET_CONFIG => {
            let size = chance.pick(&[0, 8, 60, 256, 257, 4096]);
            let mut bytes = Vec::new();
            for word in [chance.below(64) as u32, size, 0] {
                bytes.extend(word.to_le_bytes());
            }
            bytes.resize(12 + size.min(256) as usize, 0);
            bytes
        }
        request::ADD_MEM_REG => words(&[0, chance.number(), 1 << 20, chance.number(), 0]),
        _ => {
            let len = chance.pick(&[0, 4, 8, 16, 24, 40, 272]);
            chance.bytes(len)
        }
    };
    (number, payload)
}

//! One front end of a script, which says and does anything.

use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixStream};

use pericarp_vhost::features;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::LIMIT;
use crate::memory::memfd;
use crate::script::Script;

/// Bytes of guest memory, in one region at guest address 0.
const MEMORY: u64 = 0x1_0000;
const USER: u64 = 0x7000_0000_0000;
const AVAILABLE: u64 = 0x1000;
pub(super) const USED: u64 = 0x2000;
pub(super) const SIZE: u16 = 16;

/// Request numbers of the vhost-user protocol.
mod code {
    pub(super) const SET_FEATURES: u32 = 2;
    pub(super) const SET_MEM_TABLE: u32 = 5;
    pub(super) const SET_VRING_NUM: u32 = 8;
    pub(super) const SET_VRING_ADDR: u32 = 9;
    pub(super) const SET_VRING_BASE: u32 = 10;
    pub(super) const GET_VRING_BASE: u32 = 11;
    pub(super) const SET_VRING_KICK: u32 = 12;
    pub(super) const SET_VRING_CALL: u32 = 13;
    pub(super) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(super) const SET_VRING_ENABLE: u32 = 18;
    pub(super) const GET_INFLIGHT_FD: u32 = 31;
    pub(super) const SET_INFLIGHT_FD: u32 = 32;
    pub(super) const ADD_MEM_REG: u32 = 37;
    pub(super) const REM_MEM_REG: u32 = 38;
}

/// One front end.
pub(super) struct Client {
    stream: UnixStream,
    pub(super) memory: File,
    kick: OwnedFd,
    call: OwnedFd,
    avail: u16,
    /// What it keeps for the next backend.
    record: File,
}

/// Room for the records of one queue of [`SIZE`], and more.
const RECORD: u64 = 0x2000;
/// Where the first queue's part begins, and its first request.
const REGION: u64 = 128;
const ENTRIES: u64 = REGION + 16;

/// Memory as a front end keeps it for its backends.
fn sealable() -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("record", flags).expect("a memfd"));
    file.set_len(RECORD).expect("a sized memfd");
    file
}

fn bell() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd")
}

fn pair(index: u32, number: u32) -> Vec<u8> {
    [index.to_ne_bytes(), number.to_ne_bytes()].concat()
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

impl Client {
    pub(super) fn new(address: &SocketAddr) -> Self {
        let stream = UnixStream::connect_addr(address).expect("the server listens");
        stream.set_read_timeout(Some(LIMIT)).expect("a timeout");
        // A script that never reads its answers must not wait for itself.
        stream
            .set_write_timeout(Some(std::time::Duration::from_millis(20)))
            .expect("a timeout");
        Self {
            stream,
            memory: memfd(MEMORY),
            kick: bell(),
            call: bell(),
            avail: 0,
            record: sealable(),
        }
    }

    fn send(&self, code: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        let mut bytes: Vec<u8> = [code, 1 | flags, payload.len() as u32]
            .iter()
            .flat_map(|w| w.to_ne_bytes())
            .collect();
        bytes.extend_from_slice(payload);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(40))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        sendmsg(
            &self.stream,
            &[IoSlice::new(&bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        )
        .is_ok()
    }

    fn table(&self) -> Vec<u8> {
        let mut payload = pair(1, 0);
        payload.extend(words(&[0, MEMORY, USER, 0]));
        payload
    }

    /// The protocol features of a front end that wants them all.
    pub(super) fn agree(&self) {
        let protocol = 1u64 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15;
        self.send(code::SET_PROTOCOL_FEATURES, 0, &words(&[protocol]), &[]);
    }

    /// What a correct front end says, without waiting for answers.
    pub(super) fn set_up(&self, queue: u32) {
        // FLUSH, CONFIG_WCE, DISCARD, WRITE_ZEROES.
        let features = features::COMMON | 1 << 9 | 1 << 11 | 1 << 13 | 1 << 14;
        self.agree();
        self.send(code::SET_FEATURES, 0, &words(&[features]), &[]);
        self.send(
            code::SET_MEM_TABLE,
            0,
            &self.table(),
            &[self.memory.as_fd()],
        );
        self.send(code::SET_VRING_NUM, 0, &pair(queue, u32::from(SIZE)), &[]);
        self.send(
            code::SET_VRING_BASE,
            0,
            &pair(queue, u32::from(self.avail)),
            &[],
        );
        let mut addresses = pair(queue, 0);
        addresses.extend(words(&[USER, USER + USED, USER + AVAILABLE, 0]));
        self.send(code::SET_VRING_ADDR, 0, &addresses, &[]);
        let index = words(&[u64::from(queue)]);
        self.send(code::SET_VRING_CALL, 0, &index, &[self.call.as_fd()]);
        self.send(code::SET_VRING_KICK, 0, &index, &[self.kick.as_fd()]);
        self.send(code::SET_VRING_ENABLE, 0, &pair(queue, 1), &[]);
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        // Beyond the end the file would grow again after it was cut short.
        if self
            .memory
            .metadata()
            .is_ok_and(|m| at + bytes.len() as u64 <= m.len())
        {
            let _ = self.memory.write_all_at(bytes, at);
        }
    }

    fn kick(&self) {
        let _ = rustix::io::write(&self.kick, &1u64.to_ne_bytes());
    }

    /// A request as a driver makes it, in descriptors of its own.
    pub(super) fn request(&mut self, kind: u8, sector: u8, blocks: u8) -> u64 {
        let slot = u64::from(self.avail % 5);
        let at = 0x4000 + slot * 0x2000;
        let mut header = [0; 16];
        header[0] = kind;
        header[8] = sector;
        self.put(at, &header);
        self.put(at + 32, &[0xee]);
        let write = if matches!(kind, 1 | 11 | 13) { 0u16 } else { 2 };
        let first = slot * 3;
        let len = u32::from(blocks % 8) * 512;
        for (n, (at, len, flags)) in [(at, 16, 1), (at + 64, len, write | 1), (at + 32, 1, 2)]
            .into_iter()
            .enumerate()
        {
            let mut raw = at.to_le_bytes().to_vec();
            raw.extend(len.to_le_bytes());
            raw.extend(flags.to_le_bytes());
            raw.extend((first as u16 + n as u16 + 1).to_le_bytes());
            self.put(16 * (first + n as u64), &raw);
        }
        self.put(
            AVAILABLE + 4 + 2 * u64::from(self.avail % SIZE),
            &(first as u16).to_le_bytes(),
        );
        self.avail = self.avail.wrapping_add(1);
        self.put(AVAILABLE + 2, &self.avail.to_le_bytes());
        self.kick();
        at
    }

    pub(super) fn act(&mut self, script: &mut Script<'_>, address: &SocketAddr) {
        match script.u8() % 12 {
            0 => self.set_up(0),
            1 => {
                let (number, flags, count) = (script.u8() % 48, script.u8() & 8, script.u8());
                let payload = script.take(usize::from(count));
                self.send(u32::from(number), u32::from(flags), payload, &[]);
            }
            2 => {
                let (number, index, value) = (script.u8() % 40, script.u8() % 4, script.u8());
                // A later answer is left in the socket; there is room for many.
                self.send(
                    u32::from(number),
                    0,
                    &pair(u32::from(index), u32::from(value)),
                    &[],
                );
            }
            3 => {
                let (what, offset) = (script.u8() % 3, u64::from(script.u8() & 3) * 0x1000);
                let mut single = words(&[0, offset, MEMORY - offset, USER + offset, offset]);
                match what {
                    0 => {
                        self.send(
                            code::SET_MEM_TABLE,
                            8,
                            &self.table(),
                            &[self.memory.as_fd()],
                        );
                    }
                    1 => {
                        self.send(code::ADD_MEM_REG, 8, &single, &[self.memory.as_fd()]);
                    }
                    _ => {
                        single.truncate(40);
                        self.send(code::REM_MEM_REG, 8, &single, &[]);
                    }
                }
            }
            4 => {
                let (at, count) = (u64::from(script.u16()), script.u8() % 64);
                self.put(at, script.take(usize::from(count)));
            }
            5 => {
                let (kind, sector, blocks) = (script.u8() % 16, script.u8(), script.u8());
                self.request(kind, sector, blocks);
            }
            6 => self.kick(),
            7 => {
                let _ = self.memory.set_len(u64::from(script.u8()) * 0x100);
            }
            8 => *self = Self::new(address),
            11 => self.record(script, address),
            9 => {
                let (number, index, kind) = (script.u8(), script.u8() & 3, script.u8());
                self.descriptor(u32::from(number % 40), u64::from(index), kind);
            }
            _ => {
                let (index, base) = (script.u8() % 3, script.u16());
                self.send(code::GET_VRING_BASE, 0, &pair(u32::from(index), 0), &[]);
                self.send(
                    code::SET_VRING_BASE,
                    0,
                    &pair(u32::from(index), u32::from(base)),
                    &[],
                );
                self.set_up(u32::from(index & 1));
            }
        }
    }

    /// A message with a descriptor that may not belong to it.
    fn descriptor(&mut self, number: u32, index: u64, kind: u8) {
        let path = |fd: BorrowedFd<'_>| {
            let raw = std::os::fd::AsRawFd::as_raw_fd(&fd);
            rustix::fs::open(
                format!("/proc/self/fd/{raw}"),
                OFlags::PATH | OFlags::CLOEXEC,
                Mode::empty(),
            )
        };
        let fd: OwnedFd = match kind % 8 {
            0 => bell(),
            1 => match std::io::pipe() {
                Ok((_, writer)) => writer.into(),
                Err(_) => return,
            },
            2 => match UnixStream::pair() {
                Ok((one, _)) => one.into(),
                Err(_) => return,
            },
            3 => memfd(0x1000).into(),
            4 => match File::open("/dev/null") {
                Ok(file) => file.into(),
                Err(_) => return,
            },
            5 => match path(self.kick.as_fd()) {
                Ok(fd) => fd,
                Err(_) => return,
            },
            6 => match File::open("/") {
                Ok(file) => file.into(),
                Err(_) => return,
            },
            _ => match std::io::pipe() {
                Ok((reader, _)) => reader.into(),
                Err(_) => return,
            },
        };
        self.send(number, 8, &words(&[index]), &[fd.as_fd()]);
        if number == code::SET_VRING_KICK && kind.is_multiple_of(8) {
            self.kick = fd;
        }
    }

    /// Hands the record over: its offset, queues, and their size.
    pub(super) fn hand_record(&self, offset: u64, queues: u16, size: u16) {
        let mut payload = words(&[RECORD, offset]);
        payload.extend(queues.to_ne_bytes());
        payload.extend(size.to_ne_bytes());
        payload.extend([0; 4]);
        self.send(code::SET_INFLIGHT_FD, 0, &payload, &[self.record.as_fd()]);
    }

    /// The version that the backend gave the first queue's part: 1 once it
    /// records there.
    pub(super) fn recorded(&self) -> u16 {
        let mut version = [0; 2];
        let read = self.record.read_exact_at(&mut version, REGION + 8);
        read.expect("a record");
        u16::from_le_bytes(version)
    }

    /// Requests in flight: asks for memory, hands some over, lies in it, and
    /// comes again as the next backend's front end.
    fn record(&mut self, script: &mut Script<'_>, address: &SocketAddr) {
        match script.u8() % 7 {
            0 => {
                let (queues, size) = (u16::from(script.u8() % 4), script.u16());
                let mut payload = words(&[0, 0]);
                payload.extend(queues.to_ne_bytes());
                payload.extend(size.to_ne_bytes());
                payload.extend([0; 4]);
                self.send(code::GET_INFLIGHT_FD, 0, &payload, &[]);
            }
            1 => self.hand_record(0, 1, SIZE),
            2 => {
                let (offset, queues, size) = (script.u8(), script.u8(), script.u8());
                let offset = u64::from(offset >> 4) * 0x1000 + u64::from(offset & 1);
                self.hand_record(offset, u16::from(queues % 4), u16::from(size));
            }
            3 => {
                let (at, count) = (u64::from(script.u16()) % RECORD, script.u8() % 64);
                let _ = self
                    .record
                    .write_all_at(script.take(usize::from(count)), at);
            }
            // Heads in flight that may be none, in any order, and what the
            // dead backend had published.
            4 => {
                for _ in 0..script.u8() % SIZE as u8 {
                    let (head, order) = (script.u8() % SIZE as u8, script.u8());
                    let at = ENTRIES + 16 * u64::from(head);
                    let _ = self.record.write_all_at(&[1], at);
                    let counter = u64::from(order).to_le_bytes();
                    let _ = self.record.write_all_at(&counter, at + 8);
                }
                let (batch, used) = (script.u8(), script.u8());
                let ends = [u16::from(batch), u16::from(used)].map(u16::to_le_bytes);
                let _ = self.record.write_all_at(&ends.concat(), REGION + 12);
            }
            5 => {
                let _ = self.record.set_len(u64::from(script.u8()) * 0x100);
            }
            // The backend is gone, and its successor gets what was kept.
            _ => {
                let next = Self::new(address);
                let old = std::mem::replace(self, next);
                self.avail = old.avail;
                (self.memory, self.record) = (old.memory, old.record);
                self.agree();
                self.hand_record(0, 1, SIZE);
                self.set_up(0);
            }
        }
    }
}

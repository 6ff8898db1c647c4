//! Plays a script: the acts of a guest, its front end and the host, and the
//! worker's between them. `requests::play` makes one for each script.

mod chains;
mod steps;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::sync::Arc;

use pericarp_fs::{FsDevice, Request};
use pericarp_ring::{QueueLayout, RequestQueue, SplitQueue};
use pericarp_vhost::{Device, Step};

use super::bodies::{self, Known, code};
use super::judge::{Flight, Header};
use super::rig::{Rig, Stage};
use crate::chain::Named;
use crate::memory::USER;
use crate::script::Script;

/// Acts, as the first byte of each.
pub(super) const REQUEST: u8 = 0;
pub(super) const COMPLETE: u8 = 1;
const SPOILT: u8 = 2;
const RAW: u8 = 3;
pub(super) const POKE: u8 = 4;
pub(super) const FLOOD: u8 = 5;
pub(super) const HOST: u8 = 6;
pub(super) const MOUNT: u8 = 7;
pub(super) const LEAVE: u8 = 8;
const ACTS: u8 = 9;

/// Descriptors of the ring.
const SIZE: u16 = 16;
/// Acts in a script.
const MOST_ACTS: usize = 80;

const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x500;
const USED_END: u64 = 0x800;

/// One script being played.
pub(super) struct Player<'r, 's> {
    rig: &'r mut Rig,
    script: Script<'s>,
    device: Arc<FsDevice>,
    read_only: bool,
    limits: (u32, u32, u32),
    queue: RequestQueue<Request>,
    avail: u16,
    flights: BTreeMap<u16, Flight>,
    /// Heads whose steps are to be done.
    issued: Vec<u16>,
    known: Known,
    mounted: bool,
    unique: u64,
    /// The ring is broken: nothing is popped any more.
    broken: bool,
}

impl<'r, 's> Player<'r, 's> {
    pub(super) fn new(rig: &'r mut Rig, stage: &Stage, script: Script<'s>) -> Self {
        let layout = QueueLayout {
            size: SIZE,
            descriptors: USER,
            available: USER + AVAILABLE,
            used: USER + USED,
        };
        let memory = Arc::clone(&rig.memory.tables[0]);
        let queue = SplitQueue::new(memory, layout, 0, false).expect("the rings are in memory");
        Self {
            rig,
            script,
            device: Arc::clone(&stage.device),
            read_only: stage.read_only,
            limits: stage.limits,
            queue: RequestQueue::new(queue),
            avail: 0,
            flights: BTreeMap::new(),
            issued: Vec::new(),
            known: Known::default(),
            mounted: false,
            unique: 0,
            broken: false,
        }
    }

    pub(super) fn run(&mut self) {
        self.mount(7, 41, u64::MAX);
        for _ in 0..MOST_ACTS {
            if self.script.is_over() {
                break;
            }
            self.act();
            self.settle(None);
            let (now, most) = (self.device.share().counts(), self.limits);
            let within = now.0 <= most.0 && now.1 <= most.1 && now.2 <= most.2;
            assert!(within, "{now:?} of {most:?}");
        }
        self.drain();
        assert_eq!(self.queue.in_flight(), 0, "nothing is left in flight");
        assert!(self.flights.is_empty(), "every popped head was completed");
        self.device.abandoned();
    }

    fn act(&mut self) {
        match self.script.u8() % ACTS {
            REQUEST => self.request(false),
            SPOILT => self.request(true),
            COMPLETE => self.complete_some(),
            RAW => {
                let len = usize::from(self.script.u8());
                let bytes = self.script.take(len).to_vec();
                self.send(bytes);
            }
            POKE => {
                let (at, len) = (self.script.address(), self.script.u8() % 64);
                let bytes = self.script.take(usize::from(len));
                self.rig.memory.put(at, bytes);
                for flight in self.flights.values_mut() {
                    (flight.alone, flight.own) = (false, false);
                }
            }
            FLOOD => self.flood(),
            HOST => self.host(),
            MOUNT => {
                let (major, minor) = (self.script.u8().into(), self.script.u8().into());
                let features = match self.script.u8() {
                    0xff => u64::MAX,
                    0xfe => self.script.u64(),
                    low => u64::from(low) << 12 | 1 << 30,
                };
                self.mount(major, minor, features);
            }
            _ => {
                if self.script.u8() & 1 == 0 {
                    let bytes = self.header(code::DESTROY, 0, &[]);
                    self.send_whole(bytes);
                } else {
                    // What the session does when a front end goes, but that it
                    // would wait for what is in flight.
                    self.device.abandoned();
                    self.mounted = false;
                    self.known.forget_all();
                }
            }
        }
    }

    fn mount(&mut self, major: u32, minor: u32, features: u64) {
        let bytes = self.header(code::INIT, 0, &bodies::init(major, minor, features));
        self.send_whole(bytes);
    }

    /// A request whose header tells the truth.
    fn header(&mut self, code: u32, node: u64, body: &[u8]) -> Vec<u8> {
        self.unique += 2;
        let mut bytes = (40 + body.len() as u32).to_le_bytes().to_vec();
        bytes.extend(code.to_le_bytes());
        bytes.extend(self.unique.to_le_bytes());
        bytes.extend(node.to_le_bytes());
        bytes.extend([0; 16]);
        bytes.extend(body);
        bytes
    }

    fn request(&mut self, spoilt: bool) {
        let kind = self.script.u8();
        let code = match kind {
            0xff => self.script.u32(),
            place => bodies::KINDS[usize::from(place) % bodies::KINDS.len()].0,
        };
        let node = self.known.node(&mut self.script);
        let who = self.script.u8();
        let body = bodies::body(code, &self.known, &mut self.script);
        let mut bytes = self.header(code, node, &body);
        // Root, a user, somebody whose number is none; with a group perhaps.
        let uid = [0u32, 1000, u32::MAX, 65_534][usize::from(who % 4)];
        let gid = [0u32, 1000, u32::MAX, 65_534][usize::from(who / 4 % 4)];
        bytes[24..28].copy_from_slice(&uid.to_le_bytes());
        bytes[28..32].copy_from_slice(&gid.to_le_bytes());
        if who & 0x10 != 0 {
            let size = if who & 0x20 == 0 {
                16u32
            } else {
                self.script.u8().into()
            };
            for word in [size, 32, 1, 1000] {
                bytes.extend(word.to_le_bytes());
            }
            bytes[36..38].copy_from_slice(&2u16.to_le_bytes());
            let len = bytes.len() as u32;
            bytes[..4].copy_from_slice(&len.to_le_bytes());
        }
        if spoilt {
            self.spoil(&mut bytes);
        }
        self.send(bytes);
    }

    /// One lie or a few.
    fn spoil(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..=self.script.u8() % 3 {
            let (what, at, value) = (self.script.u8(), self.script.u8(), self.script.u8());
            let at = usize::from(at) % bytes.len().max(1);
            match what % 6 {
                0 => {
                    let len = self.script.u32().to_le_bytes();
                    bytes[..4].copy_from_slice(&len);
                }
                1 => bytes[0] = value,
                2 => bytes.truncate(at.max(4)),
                3 => bytes.extend(std::iter::repeat_n(value, at)),
                _ => bytes[at] = value,
            }
        }
    }

    /// The same request many times over: as much as a guest may have.
    fn flood(&mut self) {
        let (what, count) = (self.script.u8() % 5, self.script.u8());
        for number in 0..count {
            let file = self.known.nodes.first().copied().unwrap_or(1);
            let (code, node, body) = match what {
                0 => (code::OPEN, file, vec![2, 0, 0, 0, 0, 0, 0, 0]),
                1 => (code::OPENDIR, 1, vec![0; 8]),
                2 => {
                    let mut body = vec![0xed, 1, 0, 0, 0, 0, 0, 0];
                    body.extend(format!("n{number}\0").bytes());
                    (9, 1, body)
                }
                3 => (1, 1, format!("n{number}\0").into_bytes()),
                _ => {
                    let handle = self.known.order.first().copied().unwrap_or_default();
                    let code = if number % 2 == 0 {
                        code::RELEASE
                    } else {
                        code::FORGET
                    };
                    (code, file, [handle.to_le_bytes(), [0; 8], [0; 8]].concat())
                }
            };
            let bytes = self.header(code, node, &body);
            self.send_whole(bytes);
        }
    }

    /// Somebody on the host changes the directory.
    fn host(&mut self) {
        let share = self.rig.share();
        let path = |name: &str| share.join(name);
        // The guest may have made anything of these names: a fifo, or a link.
        let file = |name: &str| {
            fs::File::options()
                .write(true)
                .create(true)
                .truncate(false)
                .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
                .open(share.join(name))
        };
        let _ = match self.script.u8() % 8 {
            _ if self.read_only => Ok(()),
            0 => fs::rename(path("dir"), path("moved"))
                .and_then(|()| symlink("../outside", path("dir"))),
            1 => fs::remove_file(path("file")).and_then(|()| symlink("../secret", path("file"))),
            2 => fs::rename(path("fifo"), path("file")),
            3 => fs::remove_file(path("file")),
            4 => file("new").and_then(|file| file.set_len(5000)),
            5 => file("file").and_then(|file| file.set_len(10)),
            6 => fs::rename(path("dir/inner"), path("file")),
            _ => fs::remove_file(path("dir/inner")).and_then(|()| fs::remove_dir(path("dir"))),
        };
    }

    /// Pops the chain that was offered, as a worker's turn does.
    fn turn(&mut self, own: bool) {
        if self.broken {
            return;
        }
        let (head, loaded) = match self.queue.pop() {
            Ok(Some(popped)) => popped,
            Ok(None) => return,
            Err(_) => {
                self.broken = true;
                return;
            }
        };
        let named = Named::walk(&self.rig.memory, 0, SIZE, head);
        if !named.long {
            assert_eq!(
                loaded.is_ok(),
                named.sound,
                "head {head}: {loaded:?} {named:?}"
            );
        }
        let alone = self.flights.is_empty();
        let own = own && self.flights.values().all(|flight| flight.own);
        for flight in self.flights.values_mut() {
            flight.alone = false;
            flight.own &= own;
        }
        let header = Header::read(&named, &self.rig.memory).filter(|_| loaded.is_ok());
        let named = Named {
            sound: loaded.is_ok(),
            ..named
        };
        let (chain, request) = self.queue.request(head);
        let step = self.device.start(loaded, chain, request);
        let flight = Flight {
            named,
            header,
            mounted: self.mounted,
            step,
            alone,
            own,
            file: None,
            touched: Vec::new(),
        };
        let had = self.flights.insert(head, flight);
        assert!(had.is_none(), "head {head} was in flight");
        self.take(head, step);
    }

    /// What the worker does with a step.
    fn take(&mut self, head: u16, step: Step) {
        self.settle(Some(head));
        let flight = self.flights.get_mut(&head).expect("in flight");
        flight.step = step;
        if let Step::Done { written } = step {
            let flight = self.flights.remove(&head).expect("in flight");
            flight.judge(self.rig, self.read_only, written, &mut self.known);
            self.session(&flight, written);
            self.queue.finish(head, written);
            self.queue.ring().publish();
            self.settle(None);
        } else {
            let file = steps::file_of(step);
            if let (Some(header), Some((_, ino)), None) = (flight.header, file, flight.file) {
                self.known.check(header.words[0], ino);
            }
            assert!(
                flight.file.is_none() || flight.file == file,
                "another file: {flight:?}"
            );
            flight.file = file;
            self.issued.push(head);
        }
    }

    /// INIT and DESTROY that were taken for good.
    fn session(&mut self, flight: &Flight, written: u32) {
        let Some(header) = flight.header else { return };
        match header.code {
            // A later version is told ours, and asks again.
            code::INIT if written == 80 && header.words[0] as u32 == 7 => {
                self.mounted = true;
                self.known.forget_all();
            }
            code::DESTROY if written == 16 && header.is_whole(&flight.named) => {
                self.mounted = false;
                self.known.forget_all();
            }
            _ => {}
        }
    }

    /// Everything the device wrote meanwhile was the guest's to give.
    fn settle(&mut self, of: Option<u16>) {
        let mut touched = Vec::new();
        let flights = &self.flights;
        self.rig.memory.changes(|at, _| {
            let ring = (USED..USED_END).contains(&at);
            assert!(
                ring || flights.values().any(|flight| flight.named.names(at)),
                "byte {at:#x} of guest memory was written and nobody named it"
            );
            if !ring {
                touched.push(at);
            }
        });
        if let Some(flight) = of.and_then(|head| self.flights.get_mut(&head)) {
            flight.touched.extend(touched);
        }
    }
}

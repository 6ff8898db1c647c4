//! The block device's state machine: a request's header alone, and requests
//! from the available ring to the used ring on a disk that has every block at
//! once.

use std::fs::File;
use std::hint::black_box;
use std::os::fd::AsRawFd;

use pericarp_block::{BlockDevice, Command, Disk, Request};
use pericarp_ring::{Buffer, ChainError, RequestQueue};
use pericarp_vhost::{Device, Step};

use super::{BATCH, Piece};
use crate::guest::{Guest, Layout, memory};

const BLOCK: u32 = 4096;

/// A popped request.
type Popped = (u16, Result<(), ChainError>);

struct Engine {
    guest: Guest,
    queue: RequestQueue<Request>,
    device: BlockDevice,
    /// What it is on.
    _disk: File,
    heads: Vec<(u16, Buffer)>,
}

fn engine(layout: Layout) -> Engine {
    let (guest, queue) = Guest::with_requests(BATCH, layout);
    let file = memory(u64::from(BATCH) * u64::from(BLOCK));
    // By its command line, which every build of the device understands.
    let arguments = [
        "--socket-path=/unused".to_owned(),
        format!("--blk-file=/proc/self/fd/{}", file.as_raw_fd()),
        "--cache=buffered".to_owned(),
    ];
    let Ok(Command::Serve(options)) = pericarp_block::parse(arguments.map(Into::into)) else {
        panic!("a command line for a disk in memory");
    };
    let options = options.devices[0].disk.clone();
    let disk = Disk::open(&options).expect("a disk in memory");
    let device = BlockDevice::new(disk, "gate", 1, 256);
    device.negotiated(device.features());
    Engine {
        guest,
        queue,
        device,
        _disk: file,
        heads: Vec::with_capacity(usize::from(BATCH)),
    }
}

pub(super) fn read() -> Box<dyn Piece> {
    Box::new(engine(Layout::Indirect))
}

pub(super) fn write() -> Box<dyn Piece> {
    Box::new(engine(Layout::Write))
}

impl Engine {
    fn start(&mut self, (head, loaded): Popped) -> Step {
        let (chain, request) = self.queue.request(head);
        self.device.start(loaded, chain, request)
    }

    fn resume(&mut self, head: u16) {
        let (chain, request) = self.queue.request(head);
        let step = self.device.resume(chain, request, BLOCK as i32);
        let Step::Done { written } = step else {
            panic!("{step:?} for a finished transfer");
        };
        self.queue.finish(head, written);
    }
}

impl Piece for Engine {
    fn prepare(&mut self) {
        self.guest.offer();
    }

    fn run(&mut self) {
        while let Ok(Some(popped)) = self.queue.pop() {
            let head = popped.0;
            match self.start(popped) {
                Step::Read { buffer, .. } => {
                    black_box(self.queue.read_target(head, buffer));
                    self.queue.read_done(head, buffer, u64::from(BLOCK));
                    self.heads.push((head, buffer));
                }
                Step::Write { buffer, .. } => {
                    black_box(self.queue.write_source(head, buffer));
                    self.queue.write_done(head, u64::from(BLOCK));
                    self.heads.push((head, buffer));
                }
                step => panic!("{step:?} for a transfer"),
            }
        }
        assert_eq!(self.heads.len(), usize::from(BATCH));
        while let Some((head, _)) = self.heads.pop() {
            self.resume(head);
        }
        black_box(self.queue.publish());
    }
}

/// Headers read and checked: the requests were popped before, and end after.
struct Parse {
    engine: Engine,
    popped: Vec<Popped>,
}

pub(super) fn parse() -> Box<dyn Piece> {
    Box::new(Parse {
        engine: engine(Layout::Indirect),
        popped: Vec::with_capacity(usize::from(BATCH)),
    })
}

impl Piece for Parse {
    fn prepare(&mut self) {
        for (head, _) in std::mem::take(&mut self.popped) {
            self.engine.resume(head);
        }
        self.engine.queue.publish();
        self.engine.guest.offer();
        while let Ok(Some(popped)) = self.engine.queue.pop() {
            self.popped.push(popped);
        }
        assert_eq!(self.popped.len(), usize::from(BATCH));
    }

    fn run(&mut self) {
        for n in 0..self.popped.len() {
            let step = self.engine.start(self.popped[n]);
            assert!(matches!(step, Step::Read { .. }), "{step:?} for a read");
            black_box(step);
        }
    }
}

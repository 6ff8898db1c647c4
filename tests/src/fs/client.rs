//! A guest that speaks FUSE over rings it builds by hand. [`Client::ask`] sends
//! a request and believes nothing of the reply; [`Client::send`] sends any bytes
//! in descriptors of any shape. The calls by name are in `calls.rs`.

use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;
use thiserror::Error;

use super::wire::{Agreed, Answer, Header, IN_HEADER, OUT_HEADER, Who};
use crate::bounded::poll;
use crate::frontend::{ADJACENT, Chain, Driver, DriverError, Setup, TABLE, UNTOUCHED, Used};

/// Guest memory of the request that is alone.
pub const REQUEST: u64 = ADJACENT;
/// Guest memory of its reply.
pub const AREA: u64 = ADJACENT + (8 << 20);
/// Bytes behind each reply that must stay as they were.
pub const GUARD: u32 = 64;
/// Requests that can be in flight side by side.
pub const SLOTS: u16 = 250;
/// Guest memory of the request in a slot, and half of it for the reply.
const SLOT: fn(u16) -> u64 = |slot| 0x40_0000 + slot as u64 * 0x2000;

/// How bytes are spread over descriptors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pieces {
    /// The header in one, the rest in another, as Linux does.
    #[default]
    HeaderAndRest,
    /// All in one.
    Whole,
    /// Each of this many bytes, the last maybe shorter.
    Of(u32),
}

impl Pieces {
    fn cut(self, len: u32, header: u32) -> Vec<u32> {
        match self {
            Pieces::Whole => vec![len],
            Pieces::HeaderAndRest if len > header => vec![header, len - header],
            Pieces::HeaderAndRest => vec![len],
            Pieces::Of(size) => (0..len)
                .step_by(size as usize)
                .map(|at| size.min(len - at))
                .collect(),
        }
    }
}

/// How a request and the room for its reply lie in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// The request.
    pub request: Pieces,
    /// The room for the reply.
    pub reply: Pieces,
    /// Through an indirect table.
    pub indirect: bool,
}

/// Why a call gave nothing.
#[derive(Debug, Error)]
pub enum Wrong {
    /// The server's word.
    #[error("{0}")]
    Refused(Errno),
    /// The reply is not one.
    #[error("malformed reply: {0}")]
    Malformed(String),
    /// It did not come.
    #[error(transparent)]
    Driver(#[from] DriverError),
}

impl Wrong {
    /// The server's word, if it had one.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Wrong::Refused(errno) => Some(*errno),
            _ => None,
        }
    }
}

/// The server must have said one of `allowed`.
///
/// # Errors
/// When it did something else.
pub fn refused<T: std::fmt::Debug>(
    answer: Result<T, Wrong>,
    allowed: &[Errno],
) -> Result<Errno, String> {
    match answer {
        Err(Wrong::Refused(errno)) if allowed.contains(&errno) => Ok(errno),
        Err(wrong) => Err(format!("{wrong}, not one of {allowed:?}")),
        Ok(value) => Err(format!("it worked ({value:?}), not one of {allowed:?}")),
    }
}

/// A session as a guest's kernel has it.
pub struct Client {
    /// The connection, the memory and the rings.
    pub driver: Driver,
    /// In whose name requests are sent.
    pub who: Who,
    /// The ring they go through; 0 is the high priority queue.
    pub queue: usize,
    /// How they lie in memory.
    pub shape: Shape,
    /// What INIT agreed on.
    pub agreed: Agreed,
    /// Flags of the open file, which Linux repeats in each WRITE.
    pub file_flags: u32,
    unique: u64,
}

impl Client {
    /// Connects with the high priority queue and one for requests; no INIT yet.
    ///
    /// # Errors
    /// When the server is not there or refuses a step.
    pub fn connect(socket: &Path, setup: &Setup) -> Result<Self, Wrong> {
        Ok(Client {
            driver: Driver::connect(socket, setup)?,
            who: Who::ROOT,
            queue: 1,
            shape: Shape::default(),
            agreed: Agreed::default(),
            file_flags: 0,
            unique: 100,
        })
    }

    /// Rings as most tests want them.
    pub fn setup() -> Setup {
        Setup {
            queues: 2,
            queue_size: 256,
            ..Setup::default()
        }
    }

    /// The bytes of a well-formed request, and its number.
    pub fn request(&mut self, opcode: u32, node: u64, body: &[u8]) -> (u64, Vec<u8>) {
        self.unique += 2;
        let header = Header {
            len: (IN_HEADER + body.len()) as u32,
            opcode,
            unique: self.unique,
            node,
            who: self.who,
        };
        (self.unique, [&header.bytes(), body].concat())
    }

    /// A chain for a request at `request` and a reply at `area`.
    pub fn chain(&self, request: (u64, u32), area: (u64, u32)) -> Chain {
        let mut chain = Chain::new();
        let mut at = request.0;
        for len in self.shape.request.cut(request.1, IN_HEADER as u32) {
            chain = chain.read(at, len);
            at += u64::from(len);
        }
        let mut at = area.0;
        for len in self.shape.reply.cut(area.1, OUT_HEADER as u32) {
            chain = chain.write(at, len);
            at += u64::from(len);
        }
        // A room of nothing is no descriptor.
        chain.0.retain(|place| place.len > 0);
        chain
    }

    /// Sends any bytes with `room` writable bytes behind them. What lies behind
    /// the room must stay as it was.
    ///
    /// # Errors
    /// When the request is not completed, or more than the room is written.
    pub fn send(&mut self, request: &[u8], room: u32) -> Result<Answer, Wrong> {
        self.driver.poke(REQUEST, request)?;
        self.spoil(AREA, room)?;
        let chain = self.chain((REQUEST, request.len() as u32), (AREA, room));
        let used = self.play(&chain)?;
        self.read_back(used, AREA, room)
    }

    /// Offers a chain and waits for it.
    ///
    /// # Errors
    /// When it is not completed and signalled in time.
    pub fn play(&mut self, chain: &Chain) -> Result<Used, DriverError> {
        let size = usize::from(self.driver.rings[self.queue].size());
        if self.shape.indirect || chain.0.len() > size {
            self.driver.place_indirect(self.queue, 0, 0, chain)?;
            self.driver.offer(self.queue, 0);
            self.driver.settled(self.queue, 0)
        } else {
            self.driver.play(self.queue, chain)
        }
    }

    /// Fills the room for a reply, and what lies behind it, with a pattern.
    ///
    /// # Errors
    /// When it is not in guest memory.
    pub fn spoil(&self, at: u64, room: u32) -> Result<(), DriverError> {
        self.driver
            .poke(at, &vec![UNTOUCHED; (room + GUARD) as usize])
    }

    /// The answer in a room that [`Client::spoil`] prepared.
    ///
    /// # Errors
    /// When more was written than the room holds, or than the used ring says.
    pub fn read_back(&self, used: Used, at: u64, room: u32) -> Result<Answer, Wrong> {
        let area = self.driver.peek(at, (room + GUARD) as usize)?;
        let (area, guard) = area.split_at(room as usize);
        if guard.iter().any(|byte| *byte != UNTOUCHED) {
            return Err(Wrong::Malformed("written behind its room".into()));
        }
        if used.len > room {
            let said = format!("{} bytes written into a room of {room}", used.len);
            return Err(Wrong::Malformed(said));
        }
        Ok(Answer::parse(used.len, area))
    }

    /// Sends a well-formed request with room for `room` bytes of answer; the
    /// reply must be well-formed, too.
    ///
    /// # Errors
    /// What the server says, or what is wrong with its reply.
    pub fn ask(
        &mut self,
        opcode: u32,
        node: u64,
        body: impl Into<Vec<u8>>,
        room: u32,
    ) -> Result<Vec<u8>, Wrong> {
        let (unique, request) = self.request(opcode, node, &body.into());
        let answer = self.send(&request, OUT_HEADER as u32 + room)?;
        judged(answer, unique)
    }

    /// Sends a request that has no reply.
    ///
    /// # Errors
    /// When it is not completed, or answered.
    pub fn tell(&mut self, opcode: u32, node: u64, body: impl Into<Vec<u8>>) -> Result<(), Wrong> {
        let (_, request) = self.request(opcode, node, &body.into());
        match self.send(&request, 0)?.used {
            0 => Ok(()),
            used => Err(Wrong::Malformed(format!("{used} bytes of no reply"))),
        }
    }

    /// Offers a request in `slot` that nobody waits for yet, at most 4 KiB each
    /// way. Gives its number.
    ///
    /// # Errors
    /// When it does not fit.
    pub fn begin(
        &mut self,
        slot: u16,
        opcode: u32,
        node: u64,
        body: impl Into<Vec<u8>>,
        room: u32,
    ) -> Result<u64, Wrong> {
        let (unique, request) = self.request(opcode, node, &body.into());
        let area = SLOT(slot) + 0x1000;
        self.driver.poke(SLOT(slot), &request)?;
        let room = if room == 0 {
            0
        } else {
            OUT_HEADER as u32 + room
        };
        // Half a slot has no place for a guard behind 4 KiB.
        let spoilt = vec![UNTOUCHED; room as usize];
        self.driver.poke(area, &spoilt)?;
        let chain = self.chain((SLOT(slot), request.len() as u32), (area, room));
        self.driver
            .place_indirect(self.queue, slot, u64::from(slot), &chain)?;
        self.driver.rings[self.queue].queue(slot);
        Ok(unique)
    }

    /// Makes all that was begun visible at once, and kicks.
    pub fn go(&mut self) {
        self.driver.rings[self.queue].publish();
        self.driver.rings[self.queue].notify();
    }

    /// Waits for `count` of what was begun: slots and answers in the order they
    /// came, each slot once.
    ///
    /// # Errors
    /// When they do not all come, or something else does.
    pub fn finish(&mut self, count: usize) -> Result<Vec<(u16, Answer)>, Wrong> {
        let limit = self.driver.limit;
        let used = self.driver.rings[self.queue].wait(count, limit)?;
        let mut all: Vec<(u16, Answer)> = Vec::new();
        for used in used {
            let slot = used.head as u16;
            if slot >= SLOTS || all.iter().any(|(other, _)| *other == slot) {
                let said = format!("head {} completed for no reason", used.head);
                return Err(Wrong::Malformed(said));
            }
            let area = self.driver.peek(SLOT(slot) + 0x1000, 0x1000)?;
            let room = area.get(..used.len as usize).unwrap_or(&area);
            all.push((slot, Answer::parse(used.len, room)));
        }
        Ok(all)
    }

    /// What has come of all that was begun, without waiting for it.
    ///
    /// # Errors
    /// When something comes that was not begun.
    pub fn come(&mut self) -> Result<Vec<(u16, Answer)>, Wrong> {
        let mut all = Vec::new();
        for used in self.driver.rings[self.queue].take() {
            let slot = used.head as u16;
            if slot >= SLOTS {
                let said = format!("head {} completed for no reason", used.head);
                return Err(Wrong::Malformed(said));
            }
            let area = self.driver.peek(SLOT(slot) + 0x1000, 0x1000)?;
            let room = area.get(..used.len as usize).unwrap_or(&area);
            all.push((slot, Answer::parse(used.len, room)));
        }
        Ok(all)
    }

    /// Goes on with a successor of the server; the guest notices nothing.
    ///
    /// # Errors
    /// When it is not there in time, or refuses a step.
    pub fn reconnect(&mut self, socket: &Path) -> Result<(), Wrong> {
        let mut last = Ok(());
        let connected = poll(Duration::from_secs(20), || {
            last = self.driver.reconnect(socket);
            last.is_ok().then_some(())
        });
        match connected {
            Some(()) => Ok(()),
            None => last.map_err(Wrong::from),
        }
    }

    /// Bytes of the indirect table of slot 0, for tests that build their own.
    pub fn table() -> u64 {
        TABLE(0)
    }
}

/// The body of a reply that is what the protocol demands.
pub(super) fn judged(answer: Answer, unique: u64) -> Result<Vec<u8>, Wrong> {
    let malformed = |what: String| Err(Wrong::Malformed(what));
    if (answer.used as usize) < OUT_HEADER {
        return malformed(format!("{} bytes are no reply", answer.used));
    }
    if answer.unique != unique {
        return malformed(format!("number {} instead of {unique}", answer.unique));
    }
    if answer.len != answer.used {
        let (len, used) = (answer.len, answer.used);
        return malformed(format!("it claims {len} bytes, the used ring {used}"));
    }
    match (answer.error, answer.errno()) {
        (0, _) => Ok(answer.body),
        (-4095..=-1, Some(errno)) if answer.body.is_empty() => Err(Wrong::Refused(errno)),
        (error, _) => malformed(format!(
            "error {error} with {} bytes of body",
            answer.body.len()
        )),
    }
}

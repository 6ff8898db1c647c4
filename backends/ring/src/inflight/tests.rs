//! Kills at every store, and records that lie. A guest keeps the books: what it
//! made available and has not seen completed must be exactly what a successor
//! does again and pops, in that order.

use std::cell::Cell;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use proptest::prelude::*;

use super::*;
use crate::RequestQueue;
use crate::memory::tests::memfd;
use crate::queue::{QueueLayout, SplitQueue};
use crate::testing::Guest;

const SIZE: u16 = 8;
const DATA: u64 = 0x1_0000;

thread_local! {
    /// Stores that are survived.
    static LIVES: Cell<Option<u32>> = const { Cell::new(None) };
}

/// What a kill unwinds with.
struct Killed;

pub(crate) fn strike() {
    LIVES.with(|lives| match lives.get() {
        Some(0) => {
            lives.set(None);
            resume_unwind(Box::new(Killed));
        }
        Some(left) => lives.set(Some(left - 1)),
        None => {}
    });
}

/// Runs `act`; `None` when it was killed.
fn mortal<T>(act: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(act)) {
        Ok(value) => Some(value),
        Err(cause) if cause.is::<Killed>() => None,
        Err(cause) => resume_unwind(cause),
    }
}

fn open(file: &File) -> Arc<InflightMemory> {
    let file = file.try_clone().unwrap();
    Arc::new(InflightMemory::open(file, 0, 1, SIZE, [7; IDENTITY_BYTES]).unwrap())
}

fn records() -> File {
    memfd(InflightMemory::bytes(1, SIZE))
}

/// A process that serves the queue.
struct Backend {
    queue: RequestQueue<()>,
    /// Popped and not finished.
    busy: Vec<u16>,
}

/// A guest, its memory and the record, which outlive every backend.
struct World {
    guest: Guest,
    file: File,
    /// What the guest waits for, oldest first.
    waiting: Vec<u16>,
    seen: u16,
    offered: u64,
    done: u64,
}

impl World {
    fn new() -> Self {
        Self {
            guest: Guest::new(SIZE),
            file: records(),
            waiting: Vec::new(),
            seen: 0,
            offered: 0,
            done: 0,
        }
    }

    /// Makes a free head available, if there is one.
    fn offer(&mut self, choice: u16) {
        let free: Vec<u16> = (0..SIZE).filter(|h| !self.waiting.contains(h)).collect();
        if free.is_empty() {
            return;
        }
        let head = free[usize::from(choice) % free.len()];
        let address = DATA + 16 * (self.offered % 512);
        self.guest.descriptor(head, (address, 16, 2, 0));
        self.guest.offer(head);
        self.waiting.push(head);
        self.offered += 1;
    }

    /// Sees what is completed: each of them once.
    fn look(&mut self) {
        while self.seen != self.guest.used_idx() {
            let (head, _) = self.guest.used(self.seen);
            let at = self.waiting.iter().position(|&h| u32::from(h) == head);
            self.waiting
                .remove(at.expect("completed twice, or never asked for"));
            self.seen = self.seen.wrapping_add(1);
            self.done += 1;
        }
    }

    /// A successor, which must know exactly what the guest waits for.
    fn succeed(&mut self) -> Option<Backend> {
        let (mut queue, found) = mortal(|| {
            let mut ring = self.guest.queue(true);
            // What QEMU sends when its backend has vanished.
            ring.resume_at(ring.published());
            let record = open(&self.file).queue(0).unwrap();
            let (recovered, found) = record.recover(&mut ring, &self.guest.layout()).unwrap();
            (RequestQueue::new(ring).with_record(Some(recovered)), found)
        })?;
        self.look();
        assert!(!matches!(found, Found::Stranger(_)), "{found:?}");
        let mut busy = Vec::new();
        while let Some((head, loaded)) = queue.pop_again() {
            loaded.unwrap();
            busy.push(head);
        }
        let left: Vec<u16> = (queue.ring().next_avail()..queue.ring().driver_index())
            .map(|at| {
                self.guest
                    .get_u16(crate::testing::AVAILABLE + 4 + 2 * u64::from(at % SIZE))
            })
            .collect();
        assert_eq!([busy.as_slice(), &left].concat(), self.waiting);
        Some(Backend { queue, busy })
    }

    /// A successor that is not killed while it starts.
    fn spared(&mut self) -> Backend {
        LIVES.with(|lives| lives.set(None));
        self.succeed().expect("nobody kills it")
    }
}

#[derive(Debug, Clone, Copy)]
enum Act {
    Offer(u16),
    Pop,
    Finish(u16),
    Publish,
    /// Kill after this many more stores.
    Doom(u32),
}

impl Backend {
    fn act(&mut self, act: Act) {
        match act {
            Act::Pop => {
                if let Some((head, loaded)) = self.queue.pop().unwrap() {
                    loaded.unwrap();
                    self.busy.push(head);
                }
            }
            Act::Finish(choice) if !self.busy.is_empty() => {
                let at = usize::from(choice) % self.busy.len();
                let head = self.busy.remove(at);
                self.queue.finish(head, 1);
            }
            Act::Publish => {
                self.queue.publish();
            }
            _ => {}
        }
    }
}

/// Plays a history, with a successor for each that is killed, to its end.
/// Returns how many were killed.
fn play(acts: &[Act]) -> usize {
    let mut world = World::new();
    let mut backend = Some(world.spared());
    let mut killed = 0;
    for &act in acts {
        match act {
            Act::Offer(choice) => world.offer(choice),
            Act::Doom(lives) => LIVES.with(|cell| cell.set(Some(lives))),
            act => {
                let mut served = match backend.take() {
                    Some(served) => served,
                    None => match world.succeed() {
                        Some(born) => born,
                        None => {
                            killed += 1;
                            continue;
                        }
                    },
                };
                if mortal(|| served.act(act)).is_some() {
                    backend = Some(served);
                } else {
                    killed += 1;
                }
                world.look();
            }
        }
    }
    LIVES.with(|lives| lives.set(None));
    let mut last = backend.unwrap_or_else(|| world.spared());
    for _ in 0..=SIZE {
        last.act(Act::Pop);
    }
    while !last.busy.is_empty() {
        last.act(Act::Finish(0));
    }
    last.act(Act::Publish);
    world.look();
    assert_eq!(world.waiting, Vec::<u16>::new());
    assert_eq!(world.offered, world.done);
    killed
}

/// A history that goes everywhere: batches of one and of many, out of order,
/// heads used again.
fn tour() -> Vec<Act> {
    use Act::{Finish, Offer, Pop, Publish};
    let mut acts = Vec::new();
    for round in 0..3 {
        acts.extend([Offer(3), Offer(round), Offer(1), Offer(0), Pop, Pop, Pop]);
        acts.extend([Finish(1), Publish, Pop, Finish(2), Finish(0), Publish]);
        acts.extend([Offer(5), Offer(2), Pop, Pop, Finish(1), Finish(0), Publish]);
    }
    acts
}

#[test]
fn a_kill_at_any_store_loses_and_repeats_nothing() {
    assert_eq!(play(&tour()), 0);
    let mut first = 0;
    loop {
        let killed = play(&[vec![Act::Doom(first)], tour()].concat());
        if killed == 0 {
            break;
        }
        first += 1;
    }
    assert!(first > 80, "{first} stores");
}

#[test]
fn a_kill_while_recovering_from_a_kill_is_one_more_kill() {
    let acts = tour();
    for at in 0..acts.len() {
        for first in 0..5 {
            for second in 0..12 {
                let (before, after) = acts.split_at(at);
                let dooms = vec![Act::Doom(first)];
                // The next act after the first kill finds the second doom.
                let (kill, rest) = after.split_at(after.len().min(3));
                let again = vec![Act::Doom(second)];
                play(&[before, &dooms, kill, &again, rest].concat());
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn no_history_loses_or_repeats_a_request(
        acts in proptest::collection::vec(
            prop_oneof![
                4 => (0u16..8).prop_map(Act::Offer),
                4 => Just(Act::Pop),
                4 => (0u16..8).prop_map(Act::Finish),
                2 => Just(Act::Publish),
                2 => (0u32..24).prop_map(Act::Doom),
            ],
            0..120,
        )
    ) {
        play(&acts);
    }

    /// Whatever a front end writes there: no panic, no hang, no head twice.
    #[test]
    fn a_record_full_of_lies_does_no_harm(
        bytes in proptest::collection::vec((HEADER..InflightMemory::bytes(1, SIZE) as usize, any::<u8>()), 0..40),
        flags in any::<u8>(),
        ahead in 0u16..12,
    ) {
        let mut world = World::new();
        for choice in 0..4 {
            world.offer(choice);
        }
        let mut backend = world.spared();
        backend.act(Act::Pop);
        backend.act(Act::Pop);
        backend.act(Act::Finish(0));
        drop(backend);
        for head in (0..SIZE).filter(|h| flags >> h & 1 == 1) {
            world.file.write_all_at(&[1], (HEADER + REGION + ENTRY * usize::from(head)) as u64).unwrap();
        }
        for (at, byte) in bytes {
            world.file.write_all_at(&[byte], at as u64).unwrap();
        }
        world.guest.set_avail_idx(ahead);
        let mut ring = world.guest.queue(true);
        let record = open(&world.file).queue(0).unwrap();
        let (recovered, found) = record.recover(&mut ring, &world.guest.layout()).unwrap();
        let mut heads = recovered.again.clone();
        let count = match found {
            Found::Requests(count) => count,
            _ => 0,
        };
        prop_assert_eq!(heads.len(), usize::from(count));
        heads.sort_unstable();
        heads.dedup();
        prop_assert_eq!(heads.len(), usize::from(count));
        prop_assert!(heads.iter().all(|&head| head < SIZE));
        let mut queue = RequestQueue::<()>::new(ring).with_record(Some(recovered));
        while let Some((head, _)) = queue.pop_again() {
            queue.finish(head, 0);
        }
        while let Ok(Some((head, _))) = queue.pop() {
            queue.finish(head, 0);
        }
        queue.publish();
    }
}

/// Leaves one request in flight, then changes something.
fn left_behind(
    change: impl FnOnce(&mut World) -> Option<QueueLayout>,
) -> (World, SplitQueue, Found) {
    let mut world = World::new();
    world.offer(0);
    world.offer(0);
    let mut backend = world.spared();
    backend.act(Act::Pop);
    drop(backend);
    let layout = change(&mut world).unwrap_or(world.guest.layout());
    let mut ring = SplitQueue::new(Arc::clone(&world.guest.memory), layout, 2, true).unwrap();
    let record = open(&world.file).queue(0).unwrap();
    let (_, found) = record.recover(&mut ring, &layout).unwrap();
    (world, ring, found)
}

#[test]
fn a_record_of_another_ring_is_dropped_and_the_base_counts() {
    let (_, ring, found) = left_behind(|_| None);
    assert_eq!((found, ring.next_avail()), (Found::Requests(1), 1));
    type Change = fn(&mut World) -> Option<QueueLayout>;
    let changes: [(&str, Change); 6] = [
        ("size", |w| {
            Some(QueueLayout {
                size: SIZE / 2,
                ..w.guest.layout()
            })
        }),
        ("address", |w| {
            let used = w.guest.layout().used + 0x100;
            Some(QueueLayout {
                used,
                ..w.guest.layout()
            })
        }),
        ("used index", |w| {
            w.guest.put(crate::testing::USED + 2, &100u16.to_le_bytes());
            None
        }),
        ("descriptor", |w| {
            w.guest.descriptor(0, (DATA, 17, 2, 0));
            None
        }),
        ("avail index", |w| {
            w.guest.set_avail_idx(0);
            None
        }),
        ("version", |w| {
            w.file.write_all_at(&[9], (HEADER + 8) as u64).unwrap();
            None
        }),
    ];
    for (what, change) in changes {
        let (world, ring, found) = left_behind(change);
        assert!(matches!(found, Found::Stranger(_)), "{what}: {found:?}");
        assert_eq!(ring.next_avail(), 2, "{what}");
        // And it is gone.
        let mut ring = world.guest.queue(true);
        let record = open(&world.file).queue(0).unwrap();
        let (_, found) = record.recover(&mut ring, &world.guest.layout()).unwrap();
        assert_eq!(found, Found::Nothing, "{what}");
    }
}

#[test]
fn only_memory_of_the_same_device_is_opened() {
    let file = records();
    drop(open(&file));
    let open = |queues, size, identity| {
        InflightMemory::open(file.try_clone().unwrap(), 0, queues, size, identity).map(drop)
    };
    let mine = [7; IDENTITY_BYTES];
    assert!(open(1, SIZE, mine).is_ok());
    assert!(matches!(
        open(1, SIZE, [8; IDENTITY_BYTES]),
        Err(InflightError::Mismatch)
    ));
    assert!(matches!(
        open(1, SIZE / 2, mine),
        Err(InflightError::Mismatch)
    ));
    assert!(matches!(
        open(1000, SIZE, mine),
        Err(InflightError::Short { .. })
    ));
    for (queues, size) in [
        (0, 8),
        (1, 0),
        (1, MAX_QUEUE_SIZE + 1),
        (u16::MAX, u16::MAX),
    ] {
        assert!(matches!(
            open(queues, size, mine),
            Err(InflightError::BadGeometry { .. })
        ));
    }
    file.write_all_at(b"\x7fELF", 0).unwrap();
    assert!(matches!(open(1, SIZE, mine), Err(InflightError::Foreign)));
}

#[test]
fn the_first_part_is_laid_out_as_the_specification_says() {
    let mut world = World::new();
    let mut backend = world.spared();
    for choice in [3, 0] {
        world.offer(choice);
        backend.act(Act::Pop);
    }
    backend.act(Act::Finish(1));
    let read = |at: usize| {
        let mut bytes = [0; 16];
        world
            .file
            .read_exact_at(&mut bytes, (HEADER + at) as u64)
            .unwrap();
        bytes
    };
    // features, version 1, desc_num, last_batch_head, used_idx.
    assert_eq!(
        read(0),
        [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, SIZE as u8, 0, 0, 0, 0, 0]
    );
    // inflight, padding, next, counter: heads 0 (second) and 3 (first).
    assert_eq!(read(16), [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(
        read(16 + 3 * 16),
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    );
    backend.act(Act::Publish);
    let used = read(0);
    assert_eq!(used[12..], [0, 0, 1, 0]);
    assert_eq!(read(16)[0], 0);
}

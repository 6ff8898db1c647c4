//! Shared syncs: the flushes of one file that one worker has wait for one
//! fdatasync together. The worker's loop calls it.
//!
//! A flush must make durable what was complete before it came (virtio 1.3,
//! 5.2.6.2). An fdatasync covers all that was complete before it *started*,
//! by whichever queue or worker it was written. So a flush may share every
//! fdatasync that starts after the flush was taken from its ring, and none that
//! runs already: it waits for the next. There is at most one in the kernel for
//! each file and worker, so 1000 flushes take one thread and not 1000.
//!
//! Workers do not share with each other: that would need a lock here, and gains
//! little, because the file system joins syncs of one file itself.

use pericarp_uring::FileSlot;

use super::token::Token;

/// A request that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Waiter {
    /// Index of the queue.
    pub(super) slot: usize,
    /// Descriptor head.
    pub(super) head: u16,
}

/// The flushes of one file.
#[derive(Debug)]
struct Group {
    file: FileSlot,
    /// Served by the sync that runs; empty when none does.
    running: Vec<Waiter>,
    /// Served by the next one.
    next: Vec<Waiter>,
}

/// All flushes of a worker.
#[derive(Debug, Default)]
pub(super) struct Syncs {
    /// One for each file that ever had a flush.
    groups: Vec<Group>,
    /// Some group may be ready to start.
    due: bool,
}

impl Syncs {
    /// A request waits for a sync of `file` that has not started yet.
    pub(super) fn join(&mut self, file: FileSlot, waiter: Waiter) {
        self.due = true;
        match self.groups.iter_mut().find(|group| group.file == file) {
            Some(group) => group.next.push(waiter),
            None => self.groups.push(Group {
                file,
                running: Vec::new(),
                next: vec![waiter],
            }),
        }
    }

    /// Starts what can start; once per turn, so that all flushes of a turn are
    /// together.
    pub(super) fn start(&mut self, mut sync: impl FnMut(FileSlot, u64)) {
        if !std::mem::take(&mut self.due) {
            return;
        }
        for (index, group) in self.groups.iter_mut().enumerate() {
            if group.running.is_empty() && !group.next.is_empty() {
                std::mem::swap(&mut group.running, &mut group.next);
                sync(group.file, Token::sync(index));
            }
        }
    }

    /// A sync ended: whom to tell. The next one may start.
    pub(super) fn ended(&mut self, index: usize) -> Vec<Waiter> {
        self.due = true;
        self.groups
            .get_mut(index)
            .map(|group| std::mem::take(&mut group.running))
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::fs::File;
    use std::os::fd::AsRawFd;

    use pericarp_uring::{Engine, EngineKind};

    use super::*;

    /// Slots can only be had from an engine.
    fn slots<const N: usize>() -> [FileSlot; N] {
        let mut engine = Engine::new(EngineKind::Sync, 1, N as u32).unwrap();
        let file = File::open("/dev/null").unwrap();
        [(); N].map(|()| engine.add_file(file.as_raw_fd()).unwrap())
    }

    fn waiter(head: u16) -> Waiter {
        Waiter { slot: 0, head }
    }

    fn started(syncs: &mut Syncs) -> Vec<FileSlot> {
        let mut files = Vec::new();
        syncs.start(|file, _| files.push(file));
        files
    }

    #[test]
    fn the_flushes_of_a_turn_share_one_sync() {
        let [file] = slots();
        let mut syncs = Syncs::default();
        (0..32).for_each(|head| syncs.join(file, waiter(head)));
        assert_eq!(started(&mut syncs), [file]);
        let told = syncs.ended(0);
        assert_eq!(told, (0..32).map(waiter).collect::<Vec<_>>());
        assert_eq!(started(&mut syncs), []);
    }

    #[test]
    fn a_flush_waits_for_the_next_sync_and_not_for_the_running_one() {
        let [file] = slots();
        let mut syncs = Syncs::default();
        syncs.join(file, waiter(1));
        assert_eq!(started(&mut syncs), [file]);
        syncs.join(file, waiter(2));
        syncs.join(file, waiter(3));
        assert_eq!(started(&mut syncs), [], "one at a time");
        assert_eq!(syncs.ended(0), [waiter(1)]);
        assert_eq!(started(&mut syncs), [file]);
        assert_eq!(syncs.ended(0), [waiter(2), waiter(3)]);
    }

    #[test]
    fn files_do_not_wait_for_each_other() {
        let [a, b] = slots();
        let mut syncs = Syncs::default();
        syncs.join(a, waiter(1));
        assert_eq!(started(&mut syncs), [a]);
        syncs.join(b, waiter(2));
        assert_eq!(started(&mut syncs), [b]);
        assert_eq!(syncs.ended(1), [waiter(2)]);
        assert_eq!(syncs.ended(0), [waiter(1)]);
    }

    /// Random histories: every flush is told once, by a sync that started after
    /// it joined, and no file has two syncs at a time.
    #[test]
    fn every_flush_is_told_once_by_a_sync_that_started_after_it() {
        let files = slots::<3>();
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = |below: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % below
        };
        for _ in 0..200 {
            let mut syncs = Syncs::default();
            let mut joined = Vec::new();
            let mut told = HashSet::new();
            let mut running: Vec<(usize, usize, u64)> = Vec::new();
            for clock in 0..400u64 {
                match random(4) {
                    0 | 1 => {
                        let file = random(3) as usize;
                        syncs.join(files[file], waiter(joined.len() as u16));
                        joined.push((file, clock));
                    }
                    2 => syncs.start(|file, token| {
                        let Token::Sync(index) = Token::parse(token) else {
                            panic!("{token:#x}");
                        };
                        let file = files.iter().position(|f| *f == file).unwrap();
                        assert!(running.iter().all(|sync| sync.1 != file), "two at a time");
                        running.push((index, file, clock));
                    }),
                    _ if running.is_empty() => {}
                    _ => {
                        let (index, file, start) =
                            running.swap_remove(random(running.len() as u64) as usize);
                        for Waiter { head, .. } in syncs.ended(index) {
                            let (of, at) = joined[usize::from(head)];
                            assert!(
                                of == file && at < start,
                                "told by a sync it did not wait for"
                            );
                            assert!(told.insert(head), "told twice");
                        }
                    }
                }
            }
            // What is left ends in two rounds.
            for _ in 0..2 {
                syncs.start(|_, token| {
                    let Token::Sync(index) = Token::parse(token) else {
                        panic!("{token:#x}");
                    };
                    running.push((index, 0, 0));
                });
                for (index, ..) in running.drain(..) {
                    told.extend(syncs.ended(index).iter().map(|w| w.head));
                }
            }
            assert_eq!(told.len(), joined.len());
        }
    }
}

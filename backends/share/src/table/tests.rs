//! The table without any file system: counts, generations, ages, the budget.

use proptest::prelude::*;
use rustix::fs::MemfdFlags;

use super::*;

fn held() -> Arc<Held> {
    let file = rustix::fs::memfd_create(c"node", MemfdFlags::CLOEXEC).unwrap();
    Held::new(file, None)
}

fn record(ino: u64) -> Record {
    Record {
        identity: Identity {
            mount: 1,
            device: 2,
            ino,
        },
        kind: FileType::RegularFile,
        mount: Arc::new(Mount::with_handles()),
        hold: Hold::Descriptor(held()),
    }
}

fn add(table: &Table, ino: u64) -> NodeId {
    match table.intern(&record(ino), None, &Noted::default()) {
        Ok(Interned::Node(id)) => id,
        other => panic!("{other:?}"),
    }
}

/// The handle of some file that is there, which differs from file to file.
fn handle(of: &str) -> FileHandle {
    let file = std::fs::File::open(of).unwrap();
    crate::calls::handle_of(&file).unwrap()
}

#[test]
fn a_file_is_one_node_until_as_many_forgets() {
    let table = Table::new(100);
    let id = add(&table, 5);
    assert_eq!(add(&table, 5), id);
    assert_eq!(table.known(&record(5).identity, None).unwrap().0, id);
    table.forget(id, 2);
    assert!(table.get(id).is_some());
    table.forget(id, 1);
    assert!(table.get(id).is_none());
    assert_eq!(table.len(), 0);
    // The slot is used again, and the old id is not.
    let new = add(&table, 5);
    assert_ne!(new, id);
    table.forget(id, u64::MAX);
    assert!(table.get(new).is_some());
}

#[test]
fn more_forgets_than_lookups_are_as_many() {
    let table = Table::new(100);
    let id = add(&table, 5);
    table.forget(id, 0);
    table.forget(id, u64::MAX);
    table.forget(id, u64::MAX);
    assert_eq!(table.len(), 0);
    for id in [0, 1, 2, 15, 16, u64::MAX, 1 << 32, u64::MAX << 4] {
        assert!(table.get(NodeId(id)).is_none());
        table.forget(NodeId(id), 1);
    }
}

#[test]
fn the_number_of_nodes_is_bounded() {
    let table = Table::new(3);
    let ids: Vec<_> = (0..3).map(|ino| add(&table, ino)).collect();
    assert_eq!(
        table.intern(&record(9), None, &Noted::default()),
        Err(Errno::NFILE)
    );
    table.forget(ids[1], 1);
    add(&table, 9);
    table.clear();
    assert_eq!(table.len(), 0);
    assert!(ids.iter().all(|id| table.get(*id).is_none()));
    assert!(table.known(&record(9).identity, None).is_none());
    assert!(table.oldest().is_none());
}

#[test]
fn a_number_used_again_is_another_node() {
    let table = Table::new(100);
    let id = add(&table, 5);
    table.demote(id, handle("/proc/self/exe"));
    assert!(table.known(&record(5).identity, None).is_none());
    assert_eq!(
        table.intern(&record(5), None, &Noted::default()),
        Ok(Interned::Compare)
    );
    let same = handle("/proc/self/exe");
    assert_eq!(
        table.intern(&record(5), Some(Ok(&same)), &Noted::default()),
        Ok(Interned::Node(id))
    );
    table.demote(id, same);
    let other = handle("/");
    let Ok(Interned::Node(new)) = table.intern(&record(5), Some(Ok(&other)), &Noted::default())
    else {
        panic!("no node");
    };
    assert_ne!(new, id);
    assert!(matches!(table.get(id).unwrap().hold, Hold::Handle(_)));
    assert_eq!(table.known(&record(5).identity, None).unwrap().0, new);
    table.forget(id, 2);
    assert!(table.get(id).is_none());
    assert_eq!(table.known(&record(5).identity, None).unwrap().0, new);
}

#[test]
fn a_budget_is_given_back_with_the_descriptor() {
    let budget = Budget::new(2);
    let (one, two) = (budget.take().unwrap(), budget.take().unwrap());
    assert!(budget.take().is_none());
    let held = Held::new(held_file(), Some(one));
    drop(two);
    assert!(budget.take().is_some());
    assert_eq!(budget.taken(), 1);
    drop(held);
    assert_eq!(budget.taken(), 0);
}

fn held_file() -> OwnedFd {
    rustix::fs::memfd_create(c"node", MemfdFlags::CLOEXEC).unwrap()
}

proptest! {
    /// Against one list for each shard, in order of use.
    #[test]
    fn the_oldest_of_a_shard_goes_first(
        steps in proptest::collection::vec((0u8..4, 0u64..40), 1..200),
    ) {
        let table = Table::new(1000);
        let shard = |ino| record(ino).identity.shard();
        let mut lists: [Vec<(u64, NodeId)>; SHARDS] = Default::default();
        let mut turn = 0;
        for (step, ino) in steps {
            let list = &mut lists[shard(ino)];
            let place = list.iter().position(|(i, _)| *i == ino);
            match (step, place) {
                // Taken off by `oldest`, perhaps, and still a node.
                (0, None) => {
                    let known = table.known(&record(ino).identity, None);
                    let id = known.map_or_else(|| add(&table, ino), |(id, _)| id);
                    list.push((ino, id));
                }
                (1, Some(place)) => {
                    let used = list.remove(place);
                    prop_assert!(table.get(used.1).is_some());
                    list.push(used);
                }
                (2, Some(place)) => {
                    table.forget(list.remove(place).1, u64::MAX);
                }
                (3, _) => {
                    let expected = (0..SHARDS).find_map(|_| {
                        let list = &mut lists[turn % SHARDS];
                        turn += 1;
                        (!list.is_empty()).then(|| list.remove(0))
                    });
                    prop_assert_eq!(table.oldest().map(|(id, _)| id), expected.map(|e| e.1));
                }
                _ => {}
            }
        }
    }
}

/// A kill closes all descriptors, so that a number may be given away while the
/// guest still knows the node of the file that had it.
#[test]
fn a_successor_finds_one_file_by_a_number() {
    let memory = crate::state::tests::memory();
    let state = Arc::new(State::open(memory, 0, (2, 16), [0; 64]).unwrap());
    let begin = || {
        let mut table = Table::new(100);
        table.remember(state.clone());
        table
    };
    let intern = |table: &Table, born| {
        let noted = Noted {
            born,
            ..Noted::default()
        };
        match table.intern(&record(5), None, &noted) {
            Ok(Interned::Node(id)) => id,
            other => panic!("{other:?}"),
        }
    };
    let old = intern(&begin(), 1);
    let table = begin();
    let lost = Record {
        hold: Hold::Place,
        ..record(5)
    };
    assert!(table.put_back(old, 1, lost));
    table.put_back_all(|shard| state.generation(shard));
    let new = intern(&table, 2);
    assert_ne!(new, old);
    assert!(table.get(old).is_some());
    let stored: Vec<_> = state.stored().map(|(_, stored)| stored.id).collect();
    assert_eq!(stored, [new]);
}

/// The node of a file that is gone is not handed over in the place of the one that has its number
/// now, whichever slots they have.
#[test]
fn a_number_leads_to_its_file_after_a_hand_over() {
    let memory = crate::state::tests::memory();
    let state = Arc::new(State::open(memory, 0, (2, 16), [0; 64]).unwrap());
    let begin = || {
        let mut table = Table::new(100);
        table.remember(state.clone());
        table
    };
    let intern = |table: &Table, ino, born| {
        let noted = Noted {
            born,
            ..Noted::default()
        };
        match table.intern(&record(ino), None, &noted) {
            Ok(Interned::Node(id)) => id,
            other => panic!("{other:?}"),
        }
    };
    let shard = |ino| record(ino).identity.shard();
    let beside = (6..).find(|ino| shard(*ino) == shard(5)).unwrap();
    let first = begin();
    let below = intern(&first, beside, 1);
    let old = intern(&first, 5, 1);
    first.forget(below, 1);
    // After a kill, which leaves it its place; the new file has the slot below.
    let table = begin();
    let lost = Record {
        hold: Hold::Place,
        ..record(5)
    };
    assert!(table.put_back(old, 1, lost));
    table.put_back_all(|shard| state.generation(shard));
    let new = intern(&table, 5, 2);
    let next = begin();
    for known in table.all() {
        assert!(next.put_back_known(known));
    }
    assert_eq!(next.find(&record(5).identity), Some(new));
}

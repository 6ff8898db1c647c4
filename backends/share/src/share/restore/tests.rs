//! Moves that a kill interrupted, before and after the host made them.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::*;
use crate::ShareOptions;
use crate::state::Spot;
use crate::state::tests::memory;

struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn share(root: &Path, state: &File) -> Share {
    let options = ShareOptions {
        descriptors: 128,
        open_files: 64,
        file_handles: false,
        ..ShareOptions::default()
    };
    let state = State::open(state.try_clone().unwrap(), 0, (2, 16), [0; 64]).unwrap();
    let share = Share::open(File::open(root).unwrap().into(), options).unwrap();
    let (share, _) = share.remember(state);
    share.state().unwrap().set_session(1);
    share
}

/// `a/b/file` is known; `a` is on its way to `z`, `b` to the root as `c`, and
/// `file` to another name. Any of that may have been done.
#[test]
fn moves_are_found_where_they_are() {
    for done in 0..8 {
        let name = format!("pericarp-share-moves-{}-{done}", std::process::id());
        let root = Directory(std::env::temp_dir().join(name));
        fs::create_dir_all(root.0.join("a/b")).unwrap();
        fs::write(root.0.join("a/b/file"), "x").unwrap();
        let ino = |path: &str| fs::metadata(root.0.join(path)).unwrap().ino();
        let wanted = [ino("a"), ino("a/b"), ino("a/b/file")];
        let state = memory();
        let before = share(&root.0, &state);
        let a = before.lookup(NodeId::ROOT, c"a").unwrap().node;
        let b = before.lookup(a, c"b").unwrap().node;
        let file = before.lookup(b, c"file").unwrap().node;
        let begin = |parent, name, to, new| {
            let parent = before.nodes.get(parent).unwrap();
            let spot = Spot {
                parent: to,
                name: new,
            };
            // It never ends.
            before.nodes.begin_move(&parent, name, spot).unwrap();
        };
        begin(NodeId::ROOT, c"a", NodeId::ROOT, c"z");
        begin(a, c"b", NodeId::ROOT, c"c");
        begin(b, c"file", b, c"other");
        let rename = |from: &str, to: &str| {
            fs::rename(root.0.join(from), root.0.join(to)).unwrap();
        };
        if done & 1 != 0 {
            rename("a/b/file", "a/b/other");
        }
        if done & 2 != 0 {
            rename("a/b", "c");
        }
        if done & 4 != 0 {
            rename("a", "z");
        }
        drop(before);
        // Twice: what was found out is written down.
        for _ in 0..2 {
            let after = share(&root.0, &state);
            let found = [a, b, file].map(|node| after.attributes(node, None).unwrap().ino);
            assert_eq!(found, wanted, "{done:b}");
            assert!(state_is_settled(&after));
        }
    }
}

fn state_is_settled(share: &Share) -> bool {
    share.state().unwrap().take_moves().is_empty()
}

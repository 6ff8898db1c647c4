//! What the jobs of a profile work on: made before its first turn, the same for
//! all its targets.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;

use pericarp_benches::trees::{self, Tree};
use pericarp_benches::{Outcome, disk};
use pericarp_tests::fuse::Fuse;
use pericarp_tests::parts::Part;
use pericarp_tests::scratch::Scratch;
use rustix::fs::{Advice, fadvise};

use crate::profiles::{Ground, Profile};

/// The size of the file on the store, which is all in memory.
const SHARE_BYTES: u64 = 256 << 20;

/// A disk, or two and a directory.
#[derive(Debug)]
pub(crate) struct Place {
    /// The image that guests have as their disk.
    pub(crate) image: PathBuf,
    /// Where trees may grow.
    nursery: Option<PathBuf>,
    /// The file system that the image is on.
    store: Option<Fuse>,
    /// The page cache has all of the image at the beginning of a turn.
    warm: bool,
}

impl Place {
    /// Makes what is not there yet. `file` is the user's.
    pub(crate) fn prepare(profile: &Profile, file: &Path, scratch: &Scratch) -> Outcome<Self> {
        let mut place = Place {
            image: file.to_owned(),
            nursery: None,
            store: None,
            warm: profile.ground == Ground::Warm,
        };
        match profile.ground {
            Ground::Image | Ground::Warm => disk::prepare(&place.image)?,
            Ground::Tree => {
                // The ext4 in it is made anew for each turn: not the user's file.
                place.image = file.with_extension("tree.img");
                disk::prepare(&place.image)?;
                let parent = place.image.parent().unwrap_or(Path::new("."));
                trees::remove_old(parent);
                place.nursery = Some(fs::canonicalize(if parent == Path::new("") {
                    Path::new(".")
                } else {
                    parent
                })?);
            }
            Ground::Store(least, most) => {
                let mut bytes = Vec::new();
                disk::fill(&mut bytes, SHARE_BYTES)?;
                let store = Fuse::mount_share(&scratch.path("store"), bytes)?;
                store.behaviour.delay(least, most);
                place.image = store.file();
                place.store = Some(store);
            }
        }
        place.image = fs::canonicalize(&place.image)?;
        Ok(place)
    }

    /// True if operations are those of a store, whose CPU time is our own.
    pub(crate) fn is_stored(&self) -> bool {
        self.store.is_some()
    }

    /// Brings everything to the state in which a turn is to begin: nothing of the
    /// image cached or all of it, nothing counted.
    pub(crate) fn renew(&self) -> Outcome<()> {
        match &self.store {
            Some(store) => store.behaviour.most_in_flight.store(0, Ordering::SeqCst),
            None => {
                let image = File::open(&self.image)?;
                image.sync_all()?;
                if self.warm {
                    io::copy(&mut &image, &mut io::sink())?;
                } else {
                    fadvise(&image, 0, None, Advice::DontNeed)?;
                }
            }
        }
        Ok(())
    }

    /// The most operations that the store had in flight in this turn.
    pub(crate) fn most_in_flight(&self) -> Option<usize> {
        let store = self.store.as_ref()?;
        Some(store.behaviour.most_in_flight.load(Ordering::SeqCst))
    }

    /// An empty directory beside the image.
    pub(crate) fn tree(&self) -> Outcome<Tree> {
        let nursery = self.nursery.as_ref().ok_or("no directory for trees")?;
        Tree::make(nursery, "turn")
    }

    /// An empty ext4 on the image. All of it is written now: what the file system
    /// would finish in the background belongs to no turn.
    pub(crate) fn format(&self) -> Outcome<()> {
        let program = Part::MkfsExt4.find().ok_or("no mkfs.ext4")?;
        let output = Command::new(program)
            .args(["-q", "-F", "-E"])
            // Discarded blocks would be holes, which cost the first write.
            .arg("nodiscard,lazy_itable_init=0,lazy_journal_init=0")
            .arg(&self.image)
            .output()?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(format!("mkfs.ext4 failed: {}", said.trim()).into());
        }
        Ok(())
    }
}

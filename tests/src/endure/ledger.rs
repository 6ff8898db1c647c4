//! What a pod's writer has said was flushed, and what the next one on the same volume finds: nothing
//! may be missing. Called by `tenant`, with the lines of containers' logs.

use std::collections::BTreeMap;

/// Targets that outlive a pod.
const KEPT: [&str; 2] = ["disk", "file"];
/// Those and the others, all of which have to go on.
pub(super) const TARGETS: [&str; 4] = ["disk", "file", "tree", "net"];

/// What is known of one target.
#[derive(Clone, Debug, Default)]
struct Book {
    /// The newest generation of each block that was said to be flushed.
    flushed: BTreeMap<usize, u32>,
    /// What was there when the writer that runs began.
    found: BTreeMap<usize, u32>,
    ready: bool,
    /// Steps of the writer that runs.
    steps: u64,
    compared: u64,
    /// When the last step was told, nanoseconds.
    last: Option<i128>,
    /// The longest time between two steps since somebody set it to zero, nanoseconds.
    pause: i128,
}

/// What is known of a pod's volumes.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    books: BTreeMap<String, Book>,
    /// Blocks that were flushed in one pod and found by the next.
    pub checked: u64,
    /// Steps that were told, of all pods.
    pub steps: u64,
    /// Blocks and files that were read and compared, of pods that have ended.
    compared: u64,
}

impl Ledger {
    /// Another writer begins on the same volumes.
    pub fn begin(&mut self) {
        self.compared = self.compared();
        for (name, book) in &mut self.books {
            let flushed = match KEPT.contains(&name.as_str()) {
                true => std::mem::take(&mut book.flushed),
                false => BTreeMap::new(),
            };
            *book = Book {
                flushed,
                ..Book::default()
            };
        }
    }

    /// Takes in a line that was written at this time, in nanoseconds.
    ///
    /// # Errors
    /// What is lost, or what the writer says is wrong.
    pub fn take(&mut self, time: i128, line: &str) -> Result<(), String> {
        let words: Vec<&str> = line.split(' ').collect();
        let book = |books: &mut BTreeMap<String, Book>, name: &str| -> Book {
            books.remove(name).unwrap_or_default()
        };
        let number = |at: usize| words.get(at).and_then(|word| word.parse::<u64>().ok());
        let (Some(&kind), Some(&name)) = (words.first(), words.get(1)) else {
            return Err(format!("the writer says {line:?}"));
        };
        let mut one = book(&mut self.books, name);
        let done = match (kind, number(2), number(3), number(4)) {
            ("found", Some(block), Some(generation), None) => {
                one.found.insert(block as usize, generation as u32);
                Ok(())
            }
            ("ready", None, None, None) => {
                one.ready = true;
                self.checked += one.flushed.len() as u64;
                one.lost(name)
            }
            ("flushed", Some(block), Some(generation), Some(compared)) => {
                self.steps += 1;
                one.step(time, block as usize, generation as u32, compared)
            }
            _ => Err(format!("the writer says {line:?}")),
        };
        self.books.insert(name.to_owned(), one);
        done
    }

    /// Blocks and files that were read and compared while a pod ran.
    pub fn compared(&self) -> u64 {
        self.compared + self.books.values().map(|book| book.compared).sum::<u64>()
    }

    /// How many steps of the writer that runs there are, of the target that has fewest.
    pub fn least(&self) -> u64 {
        let of = |name: &&str| self.books.get(*name).map_or(0, |book| book.steps);
        TARGETS.iter().map(of).min().unwrap_or(0)
    }

    /// Steps of each target.
    pub fn told(&self) -> BTreeMap<&'static str, u64> {
        let of = |name: &'static str| (name, self.books.get(name).map_or(0, |book| book.steps));
        TARGETS.into_iter().map(of).collect()
    }

    /// From now on pauses count anew.
    pub fn mark(&mut self) {
        for book in self.books.values_mut() {
            book.pause = 0;
        }
    }

    /// The longest time without a step of some target since [`Ledger::mark`], milliseconds.
    pub fn pause(&self) -> u64 {
        let longest = self.books.values().map(|book| book.pause).max();
        u64::try_from(longest.unwrap_or(0) / 1_000_000).unwrap_or(0)
    }
}

impl Book {
    fn lost(&self, name: &str) -> Result<(), String> {
        for (block, generation) in &self.flushed {
            let found = self.found.get(block).copied().unwrap_or(0);
            if found < *generation {
                return Err(format!(
                    "LOST: {name}: block {block} was flushed in generation {generation}, \
                     and {found} is there"
                ));
            }
        }
        Ok(())
    }

    fn step(&mut self, time: i128, block: usize, to: u32, compared: u64) -> Result<(), String> {
        self.steps += 1;
        self.compared = compared;
        if let Some(last) = self.last.replace(time) {
            self.pause = self.pause.max(time - last);
        }
        let known = [&self.flushed, &self.found].map(|one| one.get(&block).copied());
        let before = known.into_iter().flatten().max().unwrap_or(0);
        self.flushed.insert(block, to.max(before));
        if to <= before || !self.ready {
            return Err(format!("block {block} goes from {before} to {to}"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(lines: &[&str]) -> (Ledger, Result<(), String>) {
        let mut ledger = Ledger::default();
        let mut done = Ok(());
        for (at, line) in lines.iter().enumerate() {
            if *line == "-" {
                ledger.begin();
            } else {
                done = done.and(ledger.take(at as i128 * 1_000_000, line));
            }
        }
        (ledger, done)
    }

    #[test]
    fn what_was_flushed_must_be_found() {
        let begin = [
            "ready disk",
            "flushed disk 5 1 1",
            "flushed disk 5 2 2",
            "-",
        ];
        let with = |more: &[&'static str]| told(&[&begin[..], more].concat());
        let (ledger, done) = with(&["found disk 5 2", "ready disk"]);
        assert_eq!((done, ledger.checked, ledger.steps), (Ok(()), 1, 2));
        // More was flushed than its pod lived to say.
        with(&["found disk 5 3", "ready disk", "flushed disk 5 4 1"])
            .1
            .unwrap();
        for lost in [&["found disk 5 1", "ready disk"][..], &["ready disk"]] {
            let error = with(lost).1.unwrap_err();
            assert!(error.starts_with("LOST: disk: block 5"), "{error}");
        }
        // It is still known two pods later.
        let error = with(&["-", "-", "ready disk"]).1.unwrap_err();
        assert!(error.starts_with("LOST"), "{error}");
    }

    #[test]
    fn what_ends_with_a_pod_is_not_lost() {
        told(&[
            "ready net",
            "flushed net 0 1 1",
            "-",
            "ready net",
            "flushed net 0 1 1",
        ])
        .1
        .unwrap();
    }

    #[test]
    fn a_writer_that_goes_back_or_complains_is_wrong() {
        for lines in [
            &["ready disk", "flushed disk 1 2 1", "flushed disk 1 2 2"][..],
            &["flushed disk 1 1 1"],
            &["error disk: Input/output error"],
            &["what"],
            &[""],
        ] {
            assert!(told(lines).1.is_err(), "{lines:?}");
        }
    }

    #[test]
    fn the_longest_pause_is_between_two_steps() {
        let (mut ledger, _) = told(&[
            "ready net",
            "flushed net 0 1 1",
            "ready disk",
            "flushed disk 0 1 1",
            "flushed disk 0 2 2",
            "flushed net 0 2 2",
        ]);
        assert_eq!((ledger.pause(), ledger.least()), (4, 0));
        ledger.mark();
        assert_eq!(ledger.pause(), 0);
    }
}

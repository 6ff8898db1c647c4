//! What `SECURITY.md` promises of each process, read from its table, and whether a process
//! keeps to it. The words of the table's cells are those below: any other is an error,
//! since nobody would notice that it promises nothing.

use std::collections::BTreeSet;

use rustix::thread::CapabilitySet;

use super::facts::{Facts, Root};

/// The document as it was when this was built.
const DOCUMENT: &str = include_str!("../../../SECURITY.md");
/// How the table begins.
const COLUMNS: [&str; 8] = [
    "program",
    "own namespaces",
    "capabilities at most",
    "gains privileges",
    "system call filter",
    "root directory",
    "core and `ptrace`",
    "has open",
];
const NAMESPACES: [&str; 5] = ["mnt", "net", "ipc", "uts", "cgroup"];
const KINDS: [&str; 18] = [
    "device",
    "directory",
    "disk",
    "epoll",
    "eventfd",
    "file",
    "kvm",
    "memory",
    "namespace",
    "null",
    "path",
    "pipe",
    "process",
    "ring",
    "signals",
    "socket",
    "tap",
    "timer",
];
const ANY: &str = "any";

/// The table in `SECURITY.md` is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum BadTable {
    /// There is no row of these columns.
    #[error("SECURITY.md has no table with the columns {COLUMNS:?}")]
    Missing,
    /// A row has other columns.
    #[error("SECURITY.md: {row:?} has not {} columns", COLUMNS.len())]
    Row {
        /// The row.
        row: String,
    },
    /// A cell has a word that means nothing.
    #[error("SECURITY.md: {program}: {column}: {word:?} is no such word")]
    Word {
        /// Of the row.
        program: String,
        /// Of the table.
        column: &'static str,
        /// What is there.
        word: String,
    },
}

/// What the root directory may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reach {
    Empty,
    Trees,
    Host,
}

/// What others may see of the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dumps {
    /// No core file, and no look by a process of the same rights.
    Neither,
    /// No core file.
    NoCore,
    Any,
}

/// What is promised of a program.
#[derive(Clone, Debug)]
pub struct Promise {
    /// The name of its file.
    pub program: String,
    namespaces: BTreeSet<&'static str>,
    /// `None` is any.
    capabilities: Option<u64>,
    no_new_privileges: bool,
    filtered: bool,
    root: Reach,
    dumps: Dumps,
    /// `None` is any.
    open: Option<BTreeSet<&'static str>>,
}

/// Reads the table.
///
/// # Errors
/// It is not there, or has words that mean nothing.
pub fn promises() -> Result<Vec<Promise>, BadTable> {
    parse(DOCUMENT)
}

fn parse(document: &str) -> Result<Vec<Promise>, BadTable> {
    let header = format!("| {} |", COLUMNS.join(" | "));
    let mut lines = document.lines().skip_while(|line| *line != header);
    lines.next().ok_or(BadTable::Missing)?;
    // The line below the names.
    let rows = lines.skip(1).take_while(|line| line.starts_with('|'));
    let promises: Vec<Promise> = rows.map(Promise::parse).collect::<Result<_, _>>()?;
    match promises.is_empty() {
        true => Err(BadTable::Missing),
        false => Ok(promises),
    }
}

impl Promise {
    fn parse(row: &str) -> Result<Self, BadTable> {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [
            program,
            namespaces,
            capabilities,
            gains,
            filter,
            root,
            dumps,
            open,
        ] = cells[..]
        else {
            return Err(BadTable::Row {
                row: row.to_owned(),
            });
        };
        let program = program.trim_matches('`').to_owned();
        let wrong = |column: usize, word: &str| BadTable::Word {
            program: program.clone(),
            column: COLUMNS[column],
            word: word.to_owned(),
        };
        let yes = |column: usize, word: &str| match word {
            "yes" => Ok(true),
            "no" => Ok(false),
            other => Err(wrong(column, other)),
        };
        Ok(Self {
            namespaces: match namespaces {
                "none" => BTreeSet::new(),
                list => words(list, &NAMESPACES).map_err(|word| wrong(1, word))?,
            },
            capabilities: match capabilities {
                ANY => None,
                "none" => Some(0),
                list => Some(set(list).map_err(|word| wrong(2, word))?),
            },
            no_new_privileges: !yes(3, gains)?,
            filtered: yes(4, filter)?,
            root: match root {
                "empty" => Reach::Empty,
                "its trees" => Reach::Trees,
                "the host's" => Reach::Host,
                other => return Err(wrong(5, other)),
            },
            dumps: match dumps {
                "neither" => Dumps::Neither,
                "no core" => Dumps::NoCore,
                ANY => Dumps::Any,
                other => return Err(wrong(6, other)),
            },
            open: match open {
                ANY => None,
                list => Some(words(list, &KINDS).map_err(|word| wrong(7, word))?),
            },
            program,
        })
    }

    /// Each way in which a process is looser than this.
    pub fn looser(&self, facts: &Facts) -> Vec<String> {
        let mut looser = Vec::new();
        for name in &self.namespaces {
            if !facts.namespaces.contains(name) {
                looser.push(format!("its {name} namespace is not its own"));
            }
        }
        if let Some(most) = self.capabilities {
            let more = facts.capabilities & !most;
            if more != 0 {
                looser.push(format!("has capabilities: {}", names(more)));
            }
            if facts.passed_on != 0 {
                let on = names(facts.passed_on);
                looser.push(format!("passes capabilities on: {on}"));
            }
        }
        if self.no_new_privileges && !facts.no_new_privileges {
            looser.push("may gain privileges".to_owned());
        }
        if self.filtered && !facts.filtered {
            looser.push("has a thread without a filter for system calls".to_owned());
        }
        let reach = match facts.root {
            Root::Empty => true,
            Root::Trees(_) => self.root != Reach::Empty,
            Root::Other(_) => self.root == Reach::Host,
        };
        if !reach {
            looser.push(format!("has another root directory: {:?}", facts.root));
        }
        if self.dumps != Dumps::Any && !facts.no_core {
            looser.push("may write a core file".to_owned());
        }
        if self.dumps == Dumps::Neither && facts.dumpable == Some(true) {
            looser.push("may be looked into by a process of its user".to_owned());
        }
        if let Some(open) = &self.open {
            for (kind, count) in &facts.descriptors {
                if !open.contains(kind) {
                    looser.push(format!("has {count} open of kind {kind}"));
                }
            }
        }
        looser
    }
}

/// The words of a cell, each one of `known`.
fn words<'a>(list: &'a str, known: &[&'static str]) -> Result<BTreeSet<&'static str>, &'a str> {
    let find = |word: &'a str| {
        known
            .iter()
            .find(|known| **known == word)
            .copied()
            .ok_or(word)
    };
    list.split_whitespace().map(find).collect()
}

/// Capabilities by their names, without `CAP_`.
fn set(list: &str) -> Result<u64, &str> {
    let mut set = CapabilitySet::empty();
    for word in list.split_whitespace() {
        set |= CapabilitySet::from_name(word).ok_or(word)?;
    }
    Ok(set.bits())
}

/// Capabilities as people write them.
pub(super) fn names(set: u64) -> String {
    let known = CapabilitySet::from_bits_retain(set);
    let names: Vec<String> = known
        .iter_names()
        .map(|(name, _)| name.to_owned())
        .collect();
    match (set, names.len()) {
        (0, _) => "none".to_owned(),
        (_, count) if count > 9 => format!("{count} of them"),
        (_, 0) => format!("{set:#x}"),
        _ => names.join(" "),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn held() -> Facts {
        Facts {
            user: 0,
            threads: 3,
            capabilities: 0,
            passed_on: 0,
            no_new_privileges: true,
            filtered: true,
            filters: (3, 3),
            namespaces: NAMESPACES.into_iter().collect(),
            root: Root::Empty,
            mounts: 1,
            descriptors: BTreeMap::from([("socket", 2), ("ring", 1)]),
            files: Vec::new(),
            no_core: true,
            dumpable: Some(false),
            open_files: "1024".into(),
            cgroup: "/".into(),
        }
    }

    fn block() -> Promise {
        let all = promises().unwrap();
        all.into_iter()
            .find(|promise| promise.program == "pericarp-block")
            .unwrap()
    }

    #[test]
    fn the_documents_table_has_every_program_of_a_pod() {
        let all = promises().unwrap();
        let names: Vec<&str> = all.iter().map(|promise| promise.program.as_str()).collect();
        for program in [
            "pericarp-block",
            "pericarp-fs",
            "pericarp-net",
            "pericarp-vsock",
            "pericarp-vmm",
            "qemu-system-x86_64",
            "pericarp",
            "containerd-shim-pericarp-v2",
        ] {
            assert!(names.contains(&program), "{program}");
        }
        assert_eq!(block().looser(&held()), Vec::<String>::new());
    }

    #[test]
    fn anything_looser_is_said() {
        let looser = |change: fn(&mut Facts)| {
            let mut facts = held();
            change(&mut facts);
            let found = block().looser(&facts);
            assert_eq!(found.len(), 1, "{found:?}");
            found[0].clone()
        };
        assert!(looser(|f| f.capabilities = 1 << 21).contains("SYS_ADMIN"));
        assert!(looser(|f| f.passed_on = 1).contains("CHOWN"));
        assert!(looser(|f| f.no_new_privileges = false).contains("gain"));
        assert!(looser(|f| f.filtered = false).contains("filter"));
        assert!(looser(|f| f.namespaces.retain(|n| *n != "net")).contains("net"));
        assert!(looser(|f| f.root = Root::Other(20)).contains("root"));
        assert!(looser(|f| f.root = Root::Trees(1)).contains("root"));
        assert!(looser(|f| f.no_core = false).contains("core"));
        assert!(looser(|f| f.dumpable = Some(true)).contains("looked into"));
        assert!(looser(|f| f.descriptors.extend([("tap", 1)])).contains("tap"));
    }

    #[test]
    fn a_table_that_means_nothing_is_an_error() {
        let header = format!("| {} |\n|---|\n", COLUMNS.join(" | "));
        let row = |cells: &str| parse(&format!("{header}{cells}\n"));
        let good = "| `x` | mnt net | CHOWN FOWNER | no | yes | its trees | neither | socket |";
        assert_eq!(row(good).unwrap()[0].capabilities, Some(0b1001));
        for (from, to) in [
            ("mnt net", "mnt nett"),
            ("CHOWN", "CHOWNED"),
            ("| no |", "| maybe |"),
            ("its trees", "trees"),
            ("neither", "none"),
            ("socket", "sockets"),
        ] {
            let error = row(&good.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains("is no such word"), "{error}");
        }
        assert!(matches!(row("| x | y |"), Err(BadTable::Row { .. })));
        assert!(matches!(parse("no table"), Err(BadTable::Missing)));
        assert!(matches!(parse(&header), Err(BadTable::Missing)));
    }
}

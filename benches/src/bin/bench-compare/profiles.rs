//! What is measured: the job files, and what each runs on.

use std::time::Duration;

/// What a job works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ground {
    /// The disk image: a file on the host and in a container, a disk in a guest.
    Image,
    /// A directory: on the host's file system, or on an ext4 in a guest's disk.
    Tree,
    /// As an image, all of which is in the host's page cache. Natively the job
    /// reads it through that cache; to a guest it is a disk or file of a server
    /// that does so.
    Warm,
    /// As an image, but on a file system whose every operation takes a time
    /// between these.
    Store(Duration, Duration),
}

/// One job, the same everywhere.
#[derive(Debug)]
pub(crate) struct Profile {
    /// The job file's name.
    pub(crate) name: &'static str,
    /// The job file itself: a container and a guest see few of our directories.
    pub(crate) job: &'static str,
    pub(crate) ground: Ground,
}

macro_rules! profile {
    ($ground:ident, $name:literal) => {
        profile!(=> Ground::$ground, $name)
    };
    ($least:literal..$most:literal ms, $name:literal) => {
        profile!(=> Ground::Store(Duration::from_millis($least), Duration::from_millis($most)), $name)
    };
    (=> $ground:expr, $name:literal) => {
        Profile {
            name: $name,
            job: include_str!(concat!("../../../../fio-profiles/", $name, ".fio")),
            ground: $ground,
        }
    };
}

/// Everything that can be measured.
pub(crate) const PROFILES: &[Profile] = &[
    profile!(Image, "randread-4k-qd1-psync"),
    profile!(Image, "randread-4k-qd32"),
    profile!(Image, "randread-4k-qd128"),
    profile!(Image, "randwrite-4k-qd32"),
    profile!(Image, "seqread-128k-qd8"),
    profile!(Image, "database-8k-fsync"),
    profile!(Image, "logwriter-4k-fdatasync"),
    profile!(Image, "coldscan-1m"),
    profile!(Warm, "warmread-4k-qd32"),
    profile!(Tree, "buildtree-16k-files"),
    profile!(Tree, "metadata-storm"),
    profile!(1..10 ms, "azurefiles-randread-4k-qd64"),
    profile!(1..10 ms, "azurefiles-mixed-8k-qd16"),
    profile!(2..2 ms, "slowstore-randread-4k-qd64"),
    profile!(10..10 ms, "slowstore-randread-4k-qd256"),
];

/// Those of `--quick`.
pub(crate) const QUICK: &[&str] = &[
    "randread-4k-qd1-psync",
    "randread-4k-qd32",
    "database-8k-fsync",
    "logwriter-4k-fdatasync",
];

/// Where a job runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rig {
    /// On the host, in a container or not.
    Native,
    /// In a guest.
    Guest,
}

impl Profile {
    /// What the table says above it.
    pub(crate) fn heading(&self) -> String {
        let ground = match self.ground {
            Ground::Image => "one disk image".to_owned(),
            Ground::Tree => {
                "a directory of the host's file system; in guests an ext4 on the disk".to_owned()
            }
            Ground::Warm => "one disk image that the host has in its page cache".to_owned(),
            Ground::Store(least, most) if least == most => {
                format!("one disk image on a store where each operation takes {least:?}")
            }
            Ground::Store(least, most) => format!(
                "one disk image on a store where each operation takes {least:?} to {most:?}"
            ),
        };
        format!("{}: {ground}", self.name)
    }

    /// What its job asks for besides the disk or directory. The work of a tree
    /// is fixed.
    pub(crate) fn environment(
        &self,
        place: &str,
        seconds: u64,
        rig: Rig,
    ) -> Vec<(&'static str, String)> {
        if self.ground == Ground::Tree {
            return vec![("FIO_DIR", place.to_owned())];
        }
        let mut variables = vec![
            ("FIO_FILE", place.to_owned()),
            ("FIO_SECONDS", seconds.to_string()),
        ];
        if self.ground == Ground::Warm {
            // The cache that is measured is the host's, never the guest's own.
            let direct = u8::from(rig == Rig::Guest);
            variables.push(("FIO_DIRECT", direct.to_string()));
        }
        variables
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_job_says_what_it_stands_for_and_takes_what_it_is_given() {
        for profile in PROFILES {
            let Profile { name, job, .. } = profile;
            assert!(job.starts_with("; ") && job.contains("\n\n["), "{name}");
            for (variable, _) in profile.environment("x", 1, Rig::Guest) {
                assert!(job.contains(&format!("${{{variable}}}")), "{name}");
            }
            let given = profile.environment("x", 1, Rig::Guest).len();
            assert_eq!(job.matches("=${FIO_").count(), given, "{name}");
        }
    }

    #[test]
    fn no_container_runs_what_its_filter_forbids() {
        for Profile { name, job, .. } in PROFILES {
            assert!(!job.contains("ioengine=io_uring"), "{name}");
        }
    }

    #[test]
    fn the_quick_ones_are_among_all() {
        let known = |name: &&str| PROFILES.iter().any(|profile| profile.name == *name);
        assert!(QUICK.iter().all(known));
    }
}

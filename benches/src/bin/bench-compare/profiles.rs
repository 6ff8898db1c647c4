//! What is measured: the job files, and what each runs on.

/// What a job works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ground {
    /// The disk image: a file on the host and in a container, a disk in a guest.
    Image,
    /// A directory: on the host's file system, or on an ext4 in a guest's disk.
    Tree,
    /// As an image, but on a file system whose every operation takes
    /// milliseconds.
    Share,
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
        Profile {
            name: $name,
            job: include_str!(concat!("../../../../fio-profiles/", $name, ".fio")),
            ground: Ground::$ground,
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
    profile!(Tree, "buildtree-16k-files"),
    profile!(Tree, "metadata-storm"),
    profile!(Share, "azurefiles-randread-4k-qd64"),
    profile!(Share, "azurefiles-mixed-8k-qd16"),
];

/// Those of `--quick`.
pub(crate) const QUICK: &[&str] = &[
    "randread-4k-qd1-psync",
    "randread-4k-qd32",
    "database-8k-fsync",
    "logwriter-4k-fdatasync",
];

impl Profile {
    /// What the table says above it.
    pub(crate) fn heading(&self) -> String {
        let ground = match self.ground {
            Ground::Image => "one disk image",
            Ground::Tree => "a directory of the host's file system; in guests an ext4 on the disk",
            Ground::Share => "one disk image on a store where each operation takes 1 to 10 ms",
        };
        format!("{}: {ground}", self.name)
    }

    /// What its job asks for besides the disk or directory. The work of a tree
    /// is fixed.
    pub(crate) fn environment(&self, place: &str, seconds: u64) -> Vec<(&'static str, String)> {
        match self.ground {
            Ground::Tree => vec![("FIO_DIR", place.to_owned())],
            Ground::Image | Ground::Share => vec![
                ("FIO_FILE", place.to_owned()),
                ("FIO_SECONDS", seconds.to_string()),
            ],
        }
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
            for (variable, _) in profile.environment("x", 1) {
                assert!(job.contains(&format!("${{{variable}}}")), "{name}");
            }
            let given = profile.environment("x", 1).len();
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

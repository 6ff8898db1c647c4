//! A pod's processes on the CPUs of the host that its profile names (the key `cpus`): this one with all
//! of its threads, and so all that it starts. The kernel's own threads for rings follow
//! (`pericarp-uring`). That none of them goes elsewhere later is the control group's to see to
//! (`cgroup`), where it has CPUs.
//!
//! Called by `machine`.

use std::{collections::BTreeSet, fs};

use pericarp_config::CpuSet;
use rustix::{
    io::Errno,
    process::Pid,
    thread::{CpuSet as Mask, sched_getaffinity, sched_setaffinity},
};

use crate::{
    bundle::refused,
    error::{ShimError, during},
};

const THREADS: &str = "/proc/self/task";

/// Where this process is now.
pub(crate) fn here() -> Result<Mask, ShimError> {
    sched_getaffinity(None).map_err(during("the CPUs of this thread"))
}

/// As long as this is there, this process is on those CPUs alone; its children stay there.
#[derive(Debug)]
pub(crate) struct Pinned(Mask);

impl Pinned {
    /// On these from now on, and where it was `before` afterwards.
    pub(crate) fn to(cpus: &CpuSet, before: Mask) -> Result<Self, ShimError> {
        let mut mask = Mask::new();
        for cpu in cpus.iter() {
            match usize::try_from(cpu) {
                Ok(cpu) if cpu < Mask::MAX_CPU => mask.set(cpu),
                _ => return Err(refused(&field(cpus), &format!("there is no CPU {cpu}"))),
            }
        }
        // From now on it is undone, too.
        let pinned = Self(before);
        move_all(&mask).map_err(during(field(cpus)))?;
        // The kernel leaves out without a word what this process may not use.
        if here()? != mask {
            let rule = "not all of these are CPUs that the pod's control group may use; name \
                        others, or give that group more (cpuset.cpus)";
            return Err(refused(&field(cpus), rule));
        }
        Ok(pinned)
    }
}

/// What says so, for messages.
pub(crate) fn field(cpus: &CpuSet) -> String {
    format!("cpus '{cpus}'")
}

/// All threads of this process. A thread that comes meanwhile is where the one was that made it.
fn move_all(mask: &Mask) -> Result<(), Errno> {
    let mut moved = BTreeSet::new();
    loop {
        let before = moved.len();
        let threads = fs::read_dir(THREADS).map_err(|_| Errno::NOENT)?;
        let threads = threads.flatten().filter_map(|entry| {
            let number = entry.file_name().to_str()?.parse().ok()?;
            Pid::from_raw(number)
        });
        for thread in threads {
            if !moved.insert(thread.as_raw_nonzero()) {
                continue;
            }
            match sched_setaffinity(Some(thread), mask) {
                // It has ended.
                Ok(()) | Err(Errno::SRCH) => {}
                Err(error) => return Err(error),
            }
        }
        if moved.len() == before {
            return Ok(());
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Err(error) = move_all(&self.0) {
            log::warn!("the shim stays on its pod's CPUs: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc::channel, thread};

    use super::*;

    #[test]
    fn all_threads_are_where_they_are_to_be_and_then_where_they_were() {
        let before = here().unwrap();
        let cpu = (0..Mask::MAX_CPU).find(|cpu| before.is_set(*cpu)).unwrap();
        let name = format!("pericarp-pinned-{}.toml", std::process::id());
        let file = std::env::temp_dir().join(name);
        let text = format!(
            "features = [\"cpu-pinning\"]\n[profiles.a]\ncpus = \"{cpu}\"\n[profiles.b]\ncpus = \"1023\"\n"
        );
        std::fs::write(&file, text).unwrap();
        let config = pericarp_config::Config::load(Some(&file)).unwrap();
        std::fs::remove_file(file).unwrap();
        let cpus = |name: &str| {
            config
                .profile(name)
                .unwrap()
                .settings()
                .cpus
                .clone()
                .unwrap()
        };
        // Another thread that is there already.
        let (ask, asked) = channel();
        let (tell, told) = channel();
        let other = thread::spawn(move || {
            for () in asked {
                tell.send(here().unwrap()).unwrap();
            }
        });
        let both = || {
            ask.send(()).unwrap();
            [here().unwrap(), told.recv().unwrap()]
        };
        let pinned = Pinned::to(&cpus("a"), before).unwrap();
        assert_eq!(both().map(|mask| mask.count()), [1, 1]);
        drop(pinned);
        assert_eq!(both(), [before, before]);
        let error = Pinned::to(&cpus("b"), before).unwrap_err().to_string();
        assert!(error.starts_with("cpus '1023': "), "{error}");
        assert_eq!(both(), [before, before]);
        drop(ask);
        other.join().unwrap();
    }
}

//! A pod's processes on the CPUs of the host that its profile names (the key `cpus`).

use pericarp_config::CpuSet;
use rustix::thread::{CpuSet as Mask, sched_getaffinity, sched_setaffinity};

use crate::{
    bundle::refused,
    error::{ShimError, during},
};

/// As long as this is there, this thread is on those CPUs alone; its children stay there.
#[derive(Debug)]
pub(crate) struct Pinned(Mask);

impl Pinned {
    pub(crate) fn to(cpus: &CpuSet) -> Result<Self, ShimError> {
        let before = sched_getaffinity(None).map_err(during("the CPUs of this thread"))?;
        let mut mask = Mask::new();
        for cpu in cpus.iter() {
            match usize::try_from(cpu) {
                Ok(cpu) if cpu < Mask::MAX_CPU => mask.set(cpu),
                _ => return Err(refused("cpus", &format!("there is no CPU {cpu}"))),
            }
        }
        sched_setaffinity(None, &mask).map_err(during(format!("cpus '{cpus}'")))?;
        Ok(Self(before))
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Err(error) = sched_setaffinity(None, &self.0) {
            log::warn!("the shim stays on its pod's CPUs: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_are_where_they_are_to_be_and_we_are_not() {
        let before = sched_getaffinity(None).unwrap();
        let cpu = (0..Mask::MAX_CPU).find(|cpu| before.is_set(*cpu)).unwrap();
        let name = format!("pericarp-pinned-{}.toml", std::process::id());
        let file = std::env::temp_dir().join(name);
        let text = format!("features = [\"cpu-pinning\"]\n[profiles.a]\ncpus = \"{cpu}\"\n");
        std::fs::write(&file, text).unwrap();
        let config = pericarp_config::Config::load(Some(&file)).unwrap();
        std::fs::remove_file(file).unwrap();
        let cpus = config.profile("a").unwrap().settings().cpus.clone();
        let pinned = Pinned::to(&cpus.unwrap()).unwrap();
        assert_eq!(sched_getaffinity(None).unwrap().count(), 1);
        drop(pinned);
        assert_eq!(sched_getaffinity(None).unwrap(), before);
    }
}

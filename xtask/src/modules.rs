//! Which kernel modules a guest loads, and in which order.
//!
//! Called by `kernel` with the files `depmod` and the kernel package provide.
//! Pure text work: no file is touched here.

use std::collections::{BTreeMap, BTreeSet};

use crate::command::Failure;

/// The parts of a kernel's module tree that decide the load order.
pub(crate) struct Tree {
    /// Module name to its path and the paths it needs, from `modules.dep`.
    loadable: BTreeMap<String, (String, Vec<String>)>,
    /// Names of what is part of the kernel image, from `modules.builtin`.
    builtin: BTreeSet<String>,
}

impl Tree {
    /// Reads the text of `modules.dep` and of `modules.builtin`.
    pub(crate) fn parse(dep: &str, builtin: &str) -> Self {
        let loadable = dep
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(path, needs)| {
                let needs = needs.split_whitespace().map(str::to_owned).collect();
                (module_name(path), (path.to_owned(), needs))
            })
            .collect();
        let builtin = builtin.lines().map(module_name).collect();
        Self { loadable, builtin }
    }

    /// The paths of `wanted` and of all they need, each once, each after what
    /// it needs. What is built into the kernel needs no loading; a name that is
    /// neither loadable nor built in is an error.
    pub(crate) fn load_order(&self, wanted: &[&str]) -> Result<Vec<String>, Failure> {
        let mut order = Vec::new();
        for &name in wanted {
            if !self.builtin.contains(name) {
                self.add(name, &mut order, 0)?;
            }
        }
        Ok(order)
    }

    fn add(&self, name: &str, order: &mut Vec<String>, depth: usize) -> Result<(), Failure> {
        let (path, needs) = self
            .loadable
            .get(name)
            .ok_or_else(|| format!("the guest kernel has no module {name}"))?;
        // No chain of modules is longer than the number of modules.
        if depth > self.loadable.len() {
            return Err(format!("modules.dep has a cycle at {name}").into());
        }
        if order.contains(path) {
            return Ok(());
        }
        for need in needs {
            self.add(&module_name(need), order, depth + 1)?;
        }
        if !order.contains(path) {
            order.push(path.clone());
        }
        Ok(())
    }
}

/// The name the kernel knows a module file by: no directory, no suffix, and
/// underscores where the file name has dashes.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    let stem = file.split_once(".ko").map_or(file, |(stem, _)| stem);
    stem.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "\
kernel/drivers/block/virtio_blk.ko.xz:
kernel/net/core/failover.ko.xz:
kernel/drivers/net/net_failover.ko.xz: kernel/net/core/failover.ko.xz
kernel/drivers/net/virtio_net.ko.xz: kernel/drivers/net/net_failover.ko.xz kernel/net/core/failover.ko.xz
kernel/crypto/one-two.ko.xz: kernel/net/core/failover.ko.xz
";
    const BUILTIN: &str = "kernel/fs/ext4/ext4.ko\nkernel/drivers/virtio/virtio_pci.ko\n";

    #[test]
    fn needs_come_first_and_once() {
        let tree = Tree::parse(DEP, BUILTIN);
        assert_eq!(
            tree.load_order(&["virtio_net", "virtio_blk", "one_two"])
                .unwrap(),
            [
                "kernel/net/core/failover.ko.xz",
                "kernel/drivers/net/net_failover.ko.xz",
                "kernel/drivers/net/virtio_net.ko.xz",
                "kernel/drivers/block/virtio_blk.ko.xz",
                "kernel/crypto/one-two.ko.xz",
            ]
        );
    }

    #[test]
    fn builtin_modules_need_no_loading() {
        let tree = Tree::parse(DEP, BUILTIN);
        assert!(tree.load_order(&["ext4", "virtio_pci"]).unwrap().is_empty());
    }

    #[test]
    fn unknown_modules_are_an_error() {
        let failure = Tree::parse(DEP, BUILTIN)
            .load_order(&["nonesuch"])
            .unwrap_err();
        assert_eq!(
            failure.to_string(),
            "the guest kernel has no module nonesuch"
        );
    }

    #[test]
    fn a_cycle_is_an_error_rather_than_a_hang() {
        let tree = Tree::parse("a.ko: b.ko\nb.ko: a.ko\n", "");
        let failure = tree.load_order(&["a"]).unwrap_err().to_string();
        assert!(failure.starts_with("modules.dep has a cycle"), "{failure}");
    }
}

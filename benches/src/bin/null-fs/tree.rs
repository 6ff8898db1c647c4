//! Names and sizes, and nothing else. `device` asks; a test of it is a guest
//! that sees what it made.

use std::collections::HashMap;

/// The directory that is mounted.
pub(crate) const ROOT: u64 = 1;

/// What is known of a node.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Node {
    pub(crate) mode: u32,
    pub(crate) size: u64,
}

/// All nodes, and which name leads to which.
#[derive(Debug)]
pub(crate) struct Tree {
    names: HashMap<(u64, Vec<u8>), u64>,
    nodes: HashMap<u64, Node>,
    next: u64,
}

impl Default for Tree {
    fn default() -> Self {
        let root = Node {
            mode: libc::S_IFDIR | 0o755,
            size: 0,
        };
        Self {
            names: HashMap::new(),
            nodes: HashMap::from([(ROOT, root)]),
            next: ROOT + 1,
        }
    }
}

impl Tree {
    pub(crate) fn find(&self, parent: u64, name: &[u8]) -> Option<(u64, Node)> {
        let node = *self.names.get(&(parent, name.to_vec()))?;
        Some((node, self.get(node)?))
    }

    pub(crate) fn get(&self, node: u64) -> Option<Node> {
        self.nodes.get(&node).copied()
    }

    /// Makes a name, or gives what has it.
    pub(crate) fn make(&mut self, parent: u64, name: &[u8], mode: u32) -> (u64, Node) {
        if let Some(found) = self.find(parent, name) {
            return found;
        }
        let (made, node) = (Node { mode, size: 0 }, self.next);
        self.next += 1;
        self.names.insert((parent, name.to_vec()), node);
        self.nodes.insert(node, made);
        (node, made)
    }

    /// False when there is no such name.
    pub(crate) fn remove(&mut self, parent: u64, name: &[u8]) -> bool {
        let node = self.names.remove(&(parent, name.to_vec()));
        node.is_some_and(|node| self.nodes.remove(&node).is_some())
    }

    /// The file is so large now.
    pub(crate) fn resize(&mut self, node: u64, size: u64) -> Option<Node> {
        let found = self.nodes.get_mut(&node)?;
        found.size = size;
        Some(*found)
    }

    /// The file is at least so large now.
    pub(crate) fn grow(&mut self, node: u64, size: u64) {
        if let Some(found) = self.nodes.get_mut(&node) {
            found.size = found.size.max(size);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_made_is_found_until_it_is_removed() {
        let mut tree = Tree::default();
        assert!(tree.find(ROOT, b"a").is_none());
        let (node, _) = tree.make(ROOT, b"a", libc::S_IFREG | 0o644);
        assert_eq!(tree.make(ROOT, b"a", libc::S_IFREG).0, node);
        tree.grow(node, 10);
        tree.grow(node, 5);
        assert_eq!(tree.find(ROOT, b"a").map(|(_, found)| found.size), Some(10));
        assert!(tree.resize(node, 3).is_some());
        assert!(tree.remove(ROOT, b"a") && !tree.remove(ROOT, b"a"));
        assert!(tree.get(node).is_none() && tree.resize(node, 1).is_none());
    }
}

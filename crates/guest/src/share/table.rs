//! What the kernel calls by number, and where it is.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use cubicle_protocol::share::{FileRef, Kind, RelativePath, Status, Time};
use rustix::io::Errno;

use super::abi::ROOT;

/// A name in a directory.
type Name = (u64, Box<[u8]>);

/// All nodes that the kernel knows.
#[derive(Debug)]
pub(super) struct Table {
    nodes: HashMap<u64, Node>,
    names: HashMap<Name, u64>,
    next: u64,
}

#[derive(Debug)]
struct Node {
    /// Where it is; `None` for the root, and for what has no name any more.
    place: Option<Name>,
    /// How often the kernel has been told of it.
    lookups: u64,
    /// How many nodes are in it.
    children: u64,
    /// How many times it is open.
    opens: u32,
    /// Whether it was removed while it was open, and has a name only until it is closed.
    unlinked: bool,
    inode: u64,
    kind: Kind,
    /// What the kernel was told last, and when.
    size: u64,
    modified: Time,
    told: Option<Instant>,
}

/// What is to be done for a file that was closed for the last time.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Closed {
    pub(super) inode: u64,
    /// Where it lies if it is to be removed.
    pub(super) remove: Option<RelativePath>,
}

impl Table {
    pub(super) fn new() -> Self {
        let root = Node {
            place: None,
            lookups: 1,
            children: 0,
            opens: 0,
            unlinked: false,
            inode: 0,
            kind: Kind::Directory,
            size: 0,
            modified: Time::default(),
            told: None,
        };
        Self {
            nodes: HashMap::from([(ROOT, root)]),
            names: HashMap::new(),
            next: ROOT + 1,
        }
    }

    /// Where a node is.
    pub(super) fn path(&self, node: u64) -> Result<RelativePath, Errno> {
        let mut names: Vec<&[u8]> = Vec::new();
        let mut at = node;
        while at != ROOT {
            let place = self.nodes.get(&at).and_then(|node| node.place.as_ref());
            let (parent, name) = place.ok_or(Errno::STALE)?;
            names.push(name);
            at = *parent;
        }
        names.reverse();
        RelativePath::new(names.join(&b'/')).map_err(|_| Errno::NAMETOOLONG)
    }

    /// The path of a name in a directory.
    pub(super) fn path_of(&self, parent: u64, name: &[u8]) -> Result<RelativePath, Errno> {
        let path = self.path(parent)?;
        path.join(name).map_err(|_| Errno::NAMETOOLONG)
    }

    /// The file that a node is, wherever it is now.
    pub(super) fn file(&self, node: u64) -> Result<FileRef, Errno> {
        let path = self.path(node)?;
        let inode = self.nodes.get(&node).map_or(0, |node| node.inode);
        Ok(FileRef { path, inode })
    }

    /// The node for what the host has found under a name; the kernel is about to be told of it.
    pub(super) fn found(&mut self, parent: u64, name: &[u8], status: &Status) -> u64 {
        let place: Name = (parent, name.into());
        if let Some(&id) = self.names.get(&place)
            && let Some(node) = self.nodes.get_mut(&id)
            && node.inode == status.inode
            && node.kind == status.kind
        {
            node.lookups += 1;
            node.tell(status);
            return id;
        }
        // What had this name, if anything, has been replaced by somebody else. It keeps its place:
        // the host sees by its inode that it is no longer there.
        let id = self.next;
        self.next += 1;
        let mut node = Node {
            place: Some(place.clone()),
            lookups: 1,
            children: 0,
            opens: 0,
            unlinked: false,
            inode: status.inode,
            kind: status.kind,
            size: 0,
            modified: Time::default(),
            told: None,
        };
        node.tell(status);
        self.nodes.insert(id, node);
        self.names.insert(place, id);
        self.enter(parent);
        id
    }

    /// The kernel is about to be told what a node is. Whether that differs from what it was told
    /// before.
    pub(super) fn tell(&mut self, node: u64, status: &Status) -> bool {
        self.nodes
            .get_mut(&node)
            .is_some_and(|node| node.tell(status))
    }

    /// The nodes of which the kernel may still believe what it was told within `age`.
    pub(super) fn told_within(&self, age: Duration) -> Vec<u64> {
        let recent = |node: &Node| node.told.is_some_and(|told| told.elapsed() < age);
        let nodes = self.nodes.iter().filter(|(_, node)| recent(node));
        nodes.map(|(id, _)| *id).collect()
    }

    pub(super) fn forget(&mut self, node: u64, lookups: u64) {
        if let Some(known) = self.nodes.get_mut(&node) {
            known.lookups = known.lookups.saturating_sub(lookups);
        }
        self.drop_unused(node);
    }

    pub(super) fn opened(&mut self, node: u64) {
        if let Some(node) = self.nodes.get_mut(&node) {
            node.opens += 1;
        }
    }

    /// One opening of a node has ended; what is to be done if it was the last one.
    pub(super) fn closed(&mut self, node: u64) -> Option<Closed> {
        let known = self.nodes.get_mut(&node)?;
        known.opens = known.opens.saturating_sub(1);
        if known.opens > 0 {
            return None;
        }
        let (inode, unlinked) = (known.inode, known.unlinked);
        let remove = if unlinked { self.path(node).ok() } else { None };
        if unlinked {
            self.unname(node);
        }
        Some(Closed { inode, remove })
    }

    /// Whether what has this name is open.
    pub(super) fn is_open(&self, parent: u64, name: &[u8]) -> bool {
        let id = self.names.get(&(parent, name.into()));
        id.and_then(|id| self.nodes.get(id))
            .is_some_and(|node| node.opens > 0)
    }

    /// Something has been removed.
    pub(super) fn removed(&mut self, parent: u64, name: &[u8]) {
        if let Some(&id) = self.names.get(&(parent, name.into())) {
            self.unname(id);
        }
    }

    /// A file that is open has lost its name, and lies in the root under another until it is
    /// closed. `false`: it has been closed meanwhile.
    pub(super) fn hidden(&mut self, parent: u64, name: &[u8], hidden: &[u8]) -> bool {
        let Some(&id) = self.names.get(&(parent, name.into())) else {
            return false;
        };
        let Some(node) = self.nodes.get_mut(&id) else {
            return false;
        };
        if node.opens == 0 {
            self.unname(id);
            return false;
        }
        node.unlinked = true;
        self.place(id, (ROOT, hidden.into()));
        true
    }

    /// Something has been renamed, and what had the new name is gone.
    pub(super) fn renamed(&mut self, from: (u64, &[u8]), to: (u64, &[u8])) {
        let moved = self.names.get(&(from.0, from.1.into())).copied();
        let replaced = self.names.get(&(to.0, to.1.into())).copied();
        if moved == replaced {
            return;
        }
        if let Some(replaced) = replaced {
            self.unname(replaced);
        }
        if let Some(moved) = moved {
            self.place(moved, (to.0, to.1.into()));
        }
    }

    /// Two things have each other's names.
    pub(super) fn exchanged(&mut self, one: (u64, &[u8]), other: (u64, &[u8])) {
        let first = self.names.get(&(one.0, one.1.into())).copied();
        let second = self.names.get(&(other.0, other.1.into())).copied();
        for id in [first, second].into_iter().flatten() {
            self.unname_only(id);
        }
        if let Some(first) = first {
            self.place(first, (other.0, other.1.into()));
        }
        if let Some(second) = second {
            self.place(second, (one.0, one.1.into()));
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Gives a node another place.
    fn place(&mut self, node: u64, place: Name) {
        self.unname_only(node);
        self.enter(place.0);
        self.names.insert(place.clone(), node);
        if let Some(node) = self.nodes.get_mut(&node) {
            node.place = Some(place);
        }
    }

    /// Takes a node's place from it.
    fn unname(&mut self, node: u64) {
        self.unname_only(node);
        self.drop_unused(node);
    }

    fn unname_only(&mut self, node: u64) {
        let Some(place) = self.nodes.get_mut(&node).and_then(|node| node.place.take()) else {
            return;
        };
        if self.names.get(&place) == Some(&node) {
            self.names.remove(&place);
        }
        self.leave(place.0);
    }

    fn enter(&mut self, parent: u64) {
        if let Some(parent) = self.nodes.get_mut(&parent) {
            parent.children += 1;
        }
    }

    fn leave(&mut self, parent: u64) {
        if let Some(known) = self.nodes.get_mut(&parent) {
            known.children = known.children.saturating_sub(1);
        }
        self.drop_unused(parent);
    }

    /// Drops a node that neither the kernel nor another node needs.
    fn drop_unused(&mut self, node: u64) {
        let unused = |node: &Node| node.lookups == 0 && node.children == 0 && node.opens == 0;
        if node == ROOT || !self.nodes.get(&node).is_some_and(unused) {
            return;
        }
        // At most as deep as a path is long.
        self.unname_only(node);
        self.nodes.remove(&node);
    }
}

impl Node {
    fn tell(&mut self, status: &Status) -> bool {
        let known = self.told.is_some();
        let differs = (self.size, self.modified) != (status.size, status.modified);
        (self.size, self.modified) = (status.size, status.modified);
        self.told = Some(Instant::now());
        known && differs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(inode: u64, kind: Kind) -> Status {
        Status {
            inode,
            kind,
            permissions: 0o644,
            links: 1,
            size: 0,
            blocks: 0,
            accessed: Time::default(),
            modified: Time::default(),
            changed: Time::default(),
        }
    }

    fn path(table: &Table, node: u64) -> Option<String> {
        table.path(node).ok().map(|path| path.to_string())
    }

    #[test]
    fn paths_follow_renames_of_what_they_lead_through() {
        let mut table = Table::new();
        let a = table.found(ROOT, b"a", &status(10, Kind::Directory));
        let b = table.found(a, b"b", &status(11, Kind::Directory));
        let file = table.found(b, b"file", &status(12, Kind::File));
        assert_eq!(path(&table, file).unwrap(), "a/b/file");
        table.renamed((a, b"b"), (ROOT, b"c"));
        assert_eq!(path(&table, file).unwrap(), "c/file");
        table.exchanged((ROOT, b"a"), (ROOT, b"c"));
        assert_eq!(path(&table, file).unwrap(), "a/file");
        assert_eq!(path(&table, a).unwrap(), "c");
        assert_eq!(path(&table, ROOT).unwrap(), "");
    }

    #[test]
    fn what_was_replaced_by_somebody_else_gets_a_new_number() {
        let mut table = Table::new();
        let old = table.found(ROOT, b"a", &status(10, Kind::File));
        assert_eq!(table.found(ROOT, b"a", &status(10, Kind::File)), old);
        let new = table.found(ROOT, b"a", &status(11, Kind::File));
        assert_ne!(old, new);
        assert_eq!(table.file(old).unwrap().inode, 10);
        table.forget(old, 2);
        assert_eq!(path(&table, new).unwrap(), "a");
        assert!(table.path(old).is_err());
    }

    #[test]
    fn a_node_lives_as_long_as_the_kernel_knows_it_or_what_is_in_it() {
        let mut table = Table::new();
        let a = table.found(ROOT, b"a", &status(10, Kind::Directory));
        let b = table.found(a, b"b", &status(11, Kind::File));
        table.found(a, b"b", &status(11, Kind::File));
        table.forget(a, 1);
        assert_eq!(path(&table, b).unwrap(), "a/b");
        table.forget(b, 1);
        assert_eq!(path(&table, b).unwrap(), "a/b");
        table.forget(b, 1);
        assert_eq!(table.len(), 1);
        table.forget(ROOT, 100);
        assert_eq!(table.len(), 1);
    }

    #[test]
    fn a_file_that_is_removed_while_it_is_open_stays_until_it_is_closed() {
        let mut table = Table::new();
        let file = table.found(ROOT, b"a", &status(10, Kind::File));
        table.opened(file);
        table.opened(file);
        assert!(table.is_open(ROOT, b"a"));
        assert!(table.hidden(ROOT, b"a", b".hidden"));
        assert!(!table.is_open(ROOT, b"a"));
        let new = table.found(ROOT, b"a", &status(11, Kind::File));
        assert_ne!(new, file);
        assert_eq!(table.closed(file), None);
        assert_eq!(path(&table, file).unwrap(), ".hidden");
        let closed = table.closed(file).unwrap();
        assert_eq!(closed.inode, 10);
        assert_eq!(closed.remove.unwrap().as_bytes(), b".hidden");
        assert!(table.path(file).is_err());
        table.forget(file, 1);
        table.forget(new, 1);
        assert_eq!(table.len(), 1);
    }

    #[test]
    fn a_file_that_is_closed_before_it_is_hidden_is_not_waited_for() {
        let mut table = Table::new();
        let file = table.found(ROOT, b"a", &status(10, Kind::File));
        table.opened(file);
        assert_eq!(table.closed(file).unwrap().remove, None);
        assert!(!table.hidden(ROOT, b"a", b".hidden"));
        assert!(table.path(file).is_err());
        assert!(!table.hidden(ROOT, b"unknown", b".hidden"));
    }

    #[test]
    fn what_a_rename_replaces_has_no_place_any_more() {
        let mut table = Table::new();
        let a = table.found(ROOT, b"a", &status(10, Kind::File));
        let b = table.found(ROOT, b"b", &status(11, Kind::File));
        table.renamed((ROOT, b"a"), (ROOT, b"b"));
        assert_eq!(path(&table, a).unwrap(), "b");
        assert!(table.path(b).is_err());
        // The kernel may rename what we never heard of.
        table.renamed((ROOT, b"x"), (ROOT, b"b"));
        assert!(table.path(a).is_err());
    }
}

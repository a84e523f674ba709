//! # The file tree of an image, in memory
//!
//! Layers are not unpacked onto the host. They are applied to this tree, which holds names and
//! metadata; file contents are already in the image file and the tree knows where. So a device
//! node, a set-uid program or a symbolic link to `/etc/shadow` in a layer is a row in a table
//! here and never an object of the host's file system, and there is no path through which a
//! layer could reach one.
//!
//! ```text
//!   root ── "bin"  layer 0 ──► dir ── "sh"   layer 0 ──► file {block 12, 1.1 MB}  links 2
//!        │                        └─ "ash"   layer 2 ──►   (the same node)
//!        └─ "tmp"  layer 1 ──► dir (mode 1777)
//! ```
//!
//! The layer number stands at the *name*, not at the node: a whiteout hides the names that
//! lower layers gave, and a hard link made by an upper layer to a lower file is an upper name.
//! A directory that an upper layer adds something to takes that layer's number too, so that a
//! whiteout of it in the same layer hides its old contents and keeps the new.
//!
//! Paths are resolved as a kernel would inside a chroot: symbolic links are followed in every
//! component but the last, absolute targets start at the image's root, `..` stops there.

use std::collections::{BTreeMap, VecDeque};

use crate::limits::LINK_HOPS;

/// The place of a node in [`Tree`].
pub(crate) type Id = usize;

/// Who owns a file and what may be done with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Meta {
    /// Permission bits with set-uid, set-gid and sticky (`0o7777`).
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Modification time: seconds since 1970, and nanoseconds.
    pub mtime: (i64, u32),
    /// Extended attributes by full name (`security.capability`).
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// Where a regular file's bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// Here: few enough to stand beside the inode.
    Inline(Box<[u8]>),
    /// In the image file, from block `start` on.
    Blocks { start: u32, size: u64 },
}

/// What a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    Directory(BTreeMap<Box<[u8]>, Name>),
    File(Content),
    Symlink(Box<[u8]>),
    /// Major and minor number.
    Character(u32, u32),
    /// Major and minor number.
    Block(u32, u32),
    Fifo,
    /// Removed; the place is not used again.
    Gone,
}

/// A name in a directory: what it stands for, and the layer that gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Name {
    pub id: Id,
    pub layer: usize,
}

/// A file of any type.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub meta: Meta,
    pub body: Body,
    /// How many names point here (directories: always 1; the writer counts for them).
    pub links: u32,
}

/// Why a path cannot be walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WalkError {
    /// A component is a file, a device or the like.
    NotDirectory,
    /// More symbolic links than [`LINK_HOPS`].
    TooManyLinks,
    /// Deeper than the tree's limit.
    TooDeep,
}

/// What to do where a directory on the way is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Walk {
    /// Answer that there is nothing.
    Look,
    /// Make it, for this layer.
    Create(usize),
}

/// The tree. Node 0 is the root directory.
#[derive(Debug)]
pub(crate) struct Tree {
    nodes: Vec<Node>,
    depth: usize,
}

impl Tree {
    /// The node of the root directory.
    pub(crate) const ROOT: Id = 0;

    /// An empty root directory; `depth` is the deepest allowed nesting.
    pub(crate) fn new(depth: usize) -> Self {
        let root = Node {
            meta: Meta { mode: 0o755, ..Meta::default() },
            body: Body::Directory(BTreeMap::new()),
            links: 1,
        };
        Self { nodes: vec![root], depth }
    }

    pub(crate) fn node(&self, id: Id) -> &Node {
        &self.nodes[id]
    }

    pub(crate) fn node_mut(&mut self, id: Id) -> &mut Node {
        &mut self.nodes[id]
    }

    /// How many nodes were ever made; ids are below this.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// The entries of a directory; none for anything else.
    pub(crate) fn entries(&self, dir: Id) -> Option<&BTreeMap<Box<[u8]>, Name>> {
        match &self.nodes[dir].body {
            Body::Directory(entries) => Some(entries),
            _ => None,
        }
    }

    fn entries_mut(&mut self, dir: Id) -> Option<&mut BTreeMap<Box<[u8]>, Name>> {
        match &mut self.nodes[dir].body {
            Body::Directory(entries) => Some(entries),
            _ => None,
        }
    }

    /// What `name` stands for in `dir`.
    pub(crate) fn lookup(&self, dir: Id, name: &[u8]) -> Option<Id> {
        self.entries(dir)?.get(name).map(|n| n.id)
    }

    /// Walks `path` from the root through directories and symbolic links to a directory.
    pub(crate) fn directory(&mut self, path: &[&[u8]], walk: Walk) -> Result<Option<Id>, WalkError> {
        let mut here = vec![Self::ROOT];
        let mut left: VecDeque<Box<[u8]>> = path.iter().map(|&c| c.into()).collect();
        let mut hops = 0;
        while let Some(part) = left.pop_front() {
            let dir = here.last().copied().unwrap_or(Self::ROOT);
            match &*part {
                b"" | b"." => continue,
                b".." => {
                    if here.len() > 1 {
                        here.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let Some(id) = self.lookup(dir, &part) else {
                let Walk::Create(layer) = walk else {
                    return Ok(None);
                };
                if here.len() >= self.depth {
                    return Err(WalkError::TooDeep);
                }
                let meta = Meta { mode: 0o755, ..Meta::default() };
                here.push(self.insert(dir, &part, layer, meta, Body::Directory(BTreeMap::new())));
                continue;
            };
            match &self.nodes[id].body {
                Body::Directory(_) => {
                    self.touch(dir, &part, walk);
                    here.push(id);
                }
                Body::Symlink(target) => {
                    hops += 1;
                    if hops > LINK_HOPS {
                        return Err(WalkError::TooManyLinks);
                    }
                    if target.first() == Some(&b'/') {
                        here.truncate(1);
                    }
                    for step in target.rsplit(|&b| b == b'/') {
                        left.push_front(step.into());
                    }
                }
                _ => return Err(WalkError::NotDirectory),
            }
            if here.len() > self.depth {
                return Err(WalkError::TooDeep);
            }
        }
        Ok(here.last().copied())
    }

    /// Gives a name the number of the layer that now adds something below it.
    fn touch(&mut self, dir: Id, name: &[u8], walk: Walk) {
        if let Walk::Create(layer) = walk
            && let Some(entry) = self.entries_mut(dir).and_then(|e| e.get_mut(name))
        {
            entry.layer = layer;
        }
    }

    /// Puts a new node at `name` in `dir`, in place of whatever was there.
    pub(crate) fn insert(&mut self, dir: Id, name: &[u8], layer: usize, meta: Meta, body: Body) -> Id {
        self.remove(dir, name);
        let id = self.nodes.len();
        self.nodes.push(Node { meta, body, links: 1 });
        if let Some(entries) = self.entries_mut(dir) {
            entries.insert(name.into(), Name { id, layer });
        }
        id
    }

    /// A directory entry of a layer: a directory that is there keeps its contents and takes the
    /// new metadata; anything else that is there makes room.
    pub(crate) fn merge_directory(&mut self, dir: Id, name: &[u8], layer: usize, meta: Meta) {
        match self.lookup(dir, name) {
            Some(id) if self.entries(id).is_some() => {
                self.nodes[id].meta = meta;
                self.touch(dir, name, Walk::Create(layer));
            }
            _ => {
                self.insert(dir, name, layer, meta, Body::Directory(BTreeMap::new()));
            }
        }
    }

    /// Gives `target`, which is no directory, one more name.
    pub(crate) fn link(&mut self, dir: Id, name: &[u8], layer: usize, target: Id) {
        if self.lookup(dir, name) == Some(target) {
            return;
        }
        // The count goes up first: removing what stood at `name` must not end the target.
        self.nodes[target].links = self.nodes[target].links.saturating_add(1);
        self.remove(dir, name);
        if let Some(entries) = self.entries_mut(dir) {
            entries.insert(name.into(), Name { id: target, layer });
        }
    }

    /// Removes a name, with all that is below it when it is a directory.
    pub(crate) fn remove(&mut self, dir: Id, name: &[u8]) {
        let Some(gone) = self.entries_mut(dir).and_then(|e| e.remove(name)) else {
            return;
        };
        let mut ids = vec![gone.id];
        while let Some(id) = ids.pop() {
            let node = &mut self.nodes[id];
            node.links = node.links.saturating_sub(1);
            if node.links > 0 {
                continue;
            }
            if let Body::Directory(entries) = std::mem::replace(&mut node.body, Body::Gone) {
                ids.extend(entries.values().map(|n| n.id));
            }
            node.meta.xattrs.clear();
        }
    }

    /// A whiteout: hides what layers below `layer` put at `name`, and keeps what `layer` did.
    pub(crate) fn hide(&mut self, dir: Id, name: &[u8], layer: usize) {
        let Some(entry) = self.entries(dir).and_then(|e| e.get(name)).copied() else {
            return;
        };
        if entry.layer < layer {
            self.remove(dir, name);
        } else {
            self.hide_contents(entry.id, layer);
        }
    }

    /// An opaque whiteout: hides all that layers below `layer` put into `dir`.
    pub(crate) fn hide_contents(&mut self, dir: Id, layer: usize) {
        let mut dirs = vec![dir];
        while let Some(dir) = dirs.pop() {
            let Some(entries) = self.entries(dir) else {
                continue;
            };
            let mut old = Vec::new();
            for (name, entry) in entries {
                if entry.layer < layer {
                    old.push(name.clone());
                } else {
                    dirs.push(entry.id);
                }
            }
            for name in old {
                self.remove(dir, &name);
            }
        }
    }

    /// Follows plain names only; for tests.
    #[cfg(test)]
    pub(crate) fn at(&self, path: &str) -> Option<&Node> {
        let mut id = Self::ROOT;
        for part in path.split('/').filter(|p| !p.is_empty()) {
            id = self.lookup(id, part.as_bytes())?;
        }
        Some(&self.nodes[id])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree_with(links: &[(&str, &str)]) -> Tree {
        let mut tree = Tree::new(16);
        for (name, target) in links {
            let body = Body::Symlink(target.as_bytes().into());
            tree.insert(Tree::ROOT, name.as_bytes(), 0, Meta::default(), body);
        }
        tree
    }

    fn split(path: &str) -> Vec<&[u8]> {
        path.split('/').map(str::as_bytes).collect()
    }

    #[test]
    fn a_link_to_the_hosts_root_is_the_images_root() {
        let mut tree = tree_with(&[("out", "/"), ("up", "../../../.."), ("etc-link", "/etc")]);
        for path in ["out", "up", "out/up/out"] {
            assert_eq!(tree.directory(&split(path), Walk::Look), Ok(Some(Tree::ROOT)), "{path}");
        }
        let etc = tree.directory(&split("out/etc-link"), Walk::Create(0)).unwrap();
        assert_eq!(tree.lookup(Tree::ROOT, b"etc"), etc);
    }

    #[test]
    fn links_in_a_ring_end_with_an_error() {
        let mut tree = tree_with(&[("a", "b"), ("b", "a")]);
        assert_eq!(tree.directory(&split("a/x"), Walk::Look), Err(WalkError::TooManyLinks));
    }

    #[test]
    fn links_cannot_make_a_tree_deeper_than_allowed() {
        let mut tree = tree_with(&[("s", "d/d/d/d/d/d/d/d/d/d")]);
        assert!(tree.directory(&split("s/d/d/d/d"), Walk::Create(0)).is_ok());
        let deep = "s/".to_owned() + &"d/".repeat(12);
        assert_eq!(tree.directory(&split(&deep), Walk::Create(0)), Err(WalkError::TooDeep));
    }

    #[test]
    fn a_whiteout_keeps_what_its_own_layer_added() {
        let mut tree = Tree::new(16);
        let dir = tree.directory(&[b"d"], Walk::Create(0)).unwrap().unwrap();
        tree.insert(dir, b"old", 0, Meta::default(), Body::Fifo);
        let old = tree.lookup(dir, b"old").unwrap();
        tree.directory(&[b"d"], Walk::Create(1)).unwrap();
        tree.insert(dir, b"new", 1, Meta::default(), Body::Fifo);
        tree.link(dir, b"hard", 1, old);
        tree.hide(Tree::ROOT, b"d", 1);
        assert!(tree.at("d/new").is_some());
        assert!(tree.at("d/old").is_none());
        assert_eq!(tree.at("d/hard").unwrap().links, 1);
    }

    #[test]
    fn a_node_lives_as_long_as_it_has_a_name() {
        let mut tree = Tree::new(16);
        let id = tree.insert(Tree::ROOT, b"a", 0, Meta::default(), Body::Fifo);
        tree.link(Tree::ROOT, b"b", 0, id);
        tree.link(Tree::ROOT, b"b", 0, id);
        assert_eq!(tree.node(id).links, 2);
        tree.remove(Tree::ROOT, b"a");
        assert_eq!(tree.node(id).body, Body::Fifo);
        tree.remove(Tree::ROOT, b"b");
        assert_eq!(tree.node(id).body, Body::Gone);
    }
}

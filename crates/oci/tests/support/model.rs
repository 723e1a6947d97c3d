//! What layers mean, over a file system that is a table of nodes.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::Entry;

/// What can be seen of a file from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Text of a file, `-> target`, `fifo` or `dir`.
    pub(crate) content: String,
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    /// Negative if it is not determined.
    pub(crate) mtime: i64,
    /// The first name of the same file, in order.
    pub(crate) same_as: Option<String>,
    pub(crate) note: Option<String>,
}

#[derive(Debug, Clone)]
enum Kind {
    Directory(BTreeMap<String, usize>),
    Symlink(String),
    Other(String),
}

#[derive(Debug, Clone)]
struct Node {
    kind: Kind,
    mode: u32,
    owner: (u32, u32),
    mtime: i64,
    note: Option<String>,
}

const ROOT: usize = 0;
/// How many links the kernel follows on one path.
const MAX_LINKS: u32 = 40;

#[derive(Debug)]
pub(crate) struct Model {
    nodes: Vec<Node>,
}

type Refusal = &'static str;

impl Model {
    pub(crate) fn new() -> Model {
        Model {
            nodes: vec![directory()],
        }
    }

    /// Puts a layer on top. Whiteouts take what is there and was not put there by the layer.
    pub(crate) fn apply(&mut self, layer: &[Entry]) -> Result<(), Refusal> {
        let mut made: HashSet<(usize, String)> = HashSet::new();
        let mut times: Vec<(Vec<String>, i64)> = Vec::new();
        for entry in layer {
            let path = String::from_utf8(entry.name.clone()).unwrap();
            let mut names: Vec<String> = path
                .split('/')
                .filter(|name| !name.is_empty())
                .map(ToOwned::to_owned)
                .collect();
            let name = names.pop().unwrap();
            if name == ".wh..wh..opq" {
                if let Ok(Some(parent)) = self.lookup(&names) {
                    let children: Vec<String> = self.children(parent).keys().cloned().collect();
                    for child in children {
                        self.remove_lower(parent, &child, &made);
                    }
                    self.touch(parent);
                }
            } else if let Some(hidden) = name.strip_prefix(".wh.") {
                if let Ok(Some(parent)) = self.lookup(&names) {
                    self.remove_lower(parent, hidden, &made);
                    self.touch(parent);
                }
            } else {
                let parent = self.lookup_or_make(&names)?;
                self.make(parent, &name, entry)?;
                made.insert((parent, name.clone()));
                if entry.kind == b'5' {
                    names.push(name);
                    times.push((names, entry.mtime.cast_signed()));
                }
            }
        }
        for (mut names, mtime) in times {
            let name = names.pop().unwrap();
            if let Ok(Some(parent)) = self.lookup(&names)
                && let Some(&node) = self.children(parent).get(&name)
                && matches!(self.nodes[node].kind, Kind::Directory(_))
            {
                self.nodes[node].mtime = mtime;
            }
        }
        Ok(())
    }

    pub(crate) fn seen(&self) -> BTreeMap<String, Seen> {
        let mut paths = Vec::new();
        self.list(ROOT, "", &mut paths);
        // As paths are sorted: by their components.
        paths.sort_by(|(a, _), (b, _)| a.split('/').cmp(b.split('/')));
        let mut first_names: HashMap<usize, String> = HashMap::new();
        let mut found = BTreeMap::new();
        for (path, id) in paths {
            let node = &self.nodes[id];
            let same_as = match node.kind {
                Kind::Directory(_) => None,
                _ => Some(first_names.entry(id).or_insert(path.clone()).clone()),
            };
            let content = match &node.kind {
                Kind::Directory(_) => "dir".to_owned(),
                Kind::Symlink(target) => format!("-> {target}"),
                Kind::Other(content) => content.clone(),
            };
            let is_link = matches!(node.kind, Kind::Symlink(_));
            let seen = Seen {
                content,
                mode: if is_link { 0 } else { node.mode },
                owner: node.owner,
                mtime: node.mtime,
                same_as,
                note: node.note.clone(),
            };
            found.insert(path, seen);
        }
        found
    }

    fn list(&self, directory: usize, prefix: &str, paths: &mut Vec<(String, usize)>) {
        for (name, &id) in self.children(directory) {
            let path = format!("{prefix}{name}");
            if matches!(self.nodes[id].kind, Kind::Directory(_)) {
                self.list(id, &format!("{path}/"), paths);
            }
            paths.push((path, id));
        }
    }

    fn children(&self, directory: usize) -> &BTreeMap<String, usize> {
        match &self.nodes[directory].kind {
            Kind::Directory(children) => children,
            _ => panic!("node {directory} is no directory"),
        }
    }

    fn children_mut(&mut self, directory: usize) -> &mut BTreeMap<String, usize> {
        self.touch(directory);
        match &mut self.nodes[directory].kind {
            Kind::Directory(children) => children,
            _ => panic!("node {directory} is no directory"),
        }
    }

    fn touch(&mut self, directory: usize) {
        self.nodes[directory].mtime = -1;
    }

    /// The directory at a path, as somebody would find it whose root this is.
    fn lookup(&self, names: &[String]) -> Result<Option<usize>, Refusal> {
        let mut stack = vec![ROOT];
        let mut waiting: Vec<String> = names.iter().rev().cloned().collect();
        let mut links = 0;
        while let Some(name) = waiting.pop() {
            let here = *stack.last().unwrap();
            if name == ".." {
                if stack.len() > 1 {
                    stack.pop();
                }
                continue;
            }
            let Some(&next) = self.children(here).get(&name) else {
                return Ok(None);
            };
            match &self.nodes[next].kind {
                Kind::Directory(_) => stack.push(next),
                Kind::Symlink(target) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err("too many links");
                    }
                    if target.starts_with('/') {
                        stack.truncate(1);
                    }
                    let target = target.split('/').filter(|name| !name.is_empty());
                    waiting.extend(target.rev().map(ToOwned::to_owned));
                }
                Kind::Other(_) => return Err("not a directory"),
            }
        }
        Ok(stack.last().copied())
    }

    fn lookup_or_make(&mut self, names: &[String]) -> Result<usize, Refusal> {
        let mut parent = ROOT;
        for end in 1..=names.len() {
            parent = match self.lookup(&names[..end])? {
                Some(directory) => directory,
                None => {
                    let name = &names[end - 1];
                    if self.children(parent).contains_key(name) {
                        return Err("a link to nowhere");
                    }
                    let made = self.add(directory());
                    self.children_mut(parent).insert(name.clone(), made);
                    made
                }
            };
        }
        Ok(parent)
    }

    fn make(&mut self, parent: usize, name: &str, entry: &Entry) -> Result<(), Refusal> {
        let there = self.children(parent).get(name).copied();
        let kind = match entry.kind {
            b'5' => {
                let kind = match there.map(|node| &self.nodes[node].kind) {
                    Some(Kind::Directory(children)) => Kind::Directory(children.clone()),
                    _ => Kind::Directory(BTreeMap::new()),
                };
                if let (Some(node), Kind::Directory(_)) =
                    (there, &self.nodes[there.unwrap_or(0)].kind)
                {
                    // Merged: what it holds stays, and a note that the entry does not have.
                    let note = note(entry).or(self.nodes[node].note.take());
                    self.nodes[node] = describe(entry, kind);
                    self.nodes[node].note = note;
                    return Ok(());
                }
                kind
            }
            b'1' => {
                let path = String::from_utf8(entry.link.clone()).unwrap();
                let mut names: Vec<String> = path.split('/').map(ToOwned::to_owned).collect();
                let last = names.pop().unwrap();
                let directory = self.lookup(&names).ok().flatten().ok_or("no target")?;
                let target = *self.children(directory).get(&last).ok_or("no target")?;
                if matches!(self.nodes[target].kind, Kind::Directory(_)) {
                    return Err("a directory");
                }
                if there == Some(target) {
                    return Ok(());
                }
                if let Some(there) = there
                    && self.is_below(there, directory)
                {
                    return Err("the target is in what has to go");
                }
                self.children_mut(parent).insert(name.to_owned(), target);
                return Ok(());
            }
            b'2' => Kind::Symlink(String::from_utf8(entry.link.clone()).unwrap()),
            b'6' => Kind::Other("fifo".to_owned()),
            _ => Kind::Other(String::from_utf8(entry.data.clone()).unwrap()),
        };
        let node = self.add(describe(entry, kind));
        self.children_mut(parent).insert(name.to_owned(), node);
        Ok(())
    }

    fn is_below(&self, top: usize, wanted: usize) -> bool {
        let Kind::Directory(children) = &self.nodes[top].kind else {
            return false;
        };
        top == wanted || children.values().any(|&child| self.is_below(child, wanted))
    }

    /// Says whether nothing is left there.
    fn remove_lower(&mut self, parent: usize, name: &str, made: &HashSet<(usize, String)>) -> bool {
        let Some(&node) = self.children(parent).get(name) else {
            return true;
        };
        let mut gone = !made.contains(&(parent, name.to_owned()));
        if let Kind::Directory(children) = &self.nodes[node].kind {
            for child in children.keys().cloned().collect::<Vec<_>>() {
                gone &= self.remove_lower(node, &child, made);
                self.touch(node);
            }
        }
        if gone {
            self.children_mut(parent).remove(name);
        }
        gone
    }

    fn add(&mut self, node: Node) -> usize {
        self.nodes.push(node);
        self.nodes.len() - 1
    }
}

fn directory() -> Node {
    Node {
        kind: Kind::Directory(BTreeMap::new()),
        mode: 0o755,
        owner: (0, 0),
        mtime: -1,
        note: None,
    }
}

fn describe(entry: &Entry, kind: Kind) -> Node {
    Node {
        kind,
        mode: entry.mode & 0o7777,
        owner: (entry.uid as u32, entry.gid as u32),
        mtime: entry.mtime.cast_signed(),
        note: note(entry),
    }
}

fn note(entry: &Entry) -> Option<String> {
    let (_, value) = entry
        .pax
        .iter()
        .find(|(key, _)| key == b"SCHILY.xattr.user.note")?;
    Some(String::from_utf8(value.clone()).unwrap())
}

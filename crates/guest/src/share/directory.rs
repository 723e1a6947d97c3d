//! A directory while it is being read.

use std::time::{Duration, Instant};

use bytes::Bytes;
use cubicle_protocol::share::{Answer, Entry, Operation, UNLINKED_PREFIX, entries};
use rustix::io::Errno;

use super::{
    abi::{self, Attributes, Body, ROOT},
    session::{Session, VALID},
};

/// How many bytes of entries the host is asked for at once. The kernel takes them a page at a time.
const ROOM: u32 = 64 << 10;

/// How old what the host said of an entry may be when the kernel is told.
const MAX_AGE: Duration = Duration::from_millis(500);

/// What the host has been asked for and the kernel has not taken yet.
#[derive(Debug, Default)]
pub(super) struct Directory {
    /// The cookie before the first of `entries`.
    after: u64,
    entries: Vec<Entry>,
    /// Whether none come after them.
    end: bool,
    asked: Option<Instant>,
}

impl Directory {
    /// The entries after the one with the cookie `after`, as many as `room` bytes hold.
    pub(super) async fn read(
        &mut self,
        session: &Session,
        unique: u64,
        node: u64,
        after: u64,
        room: usize,
        plus: bool,
    ) -> Result<Bytes, Errno> {
        let mut after = after;
        loop {
            if self.position(after).is_none() {
                self.fetch(session, unique, node, after).await?;
            }
            let Some(at) = self.position(after) else {
                return Ok(Bytes::new());
            };
            let mut body = Body::new();
            let mut left = room;
            let mut last = after;
            for entry in &self.entries[at..] {
                last = entry.cookie;
                // In the way of nobody who wants to remove all that is there.
                if node == ROOT && entry.name.starts_with(UNLINKED_PREFIX.as_bytes()) {
                    continue;
                }
                let len =
                    abi::directory_entry_len(&entry.name) + if plus { abi::ENTRY_LEN } else { 0 };
                let Some(rest) = left.checked_sub(len) else {
                    return Ok(body.into());
                };
                left = rest;
                if plus {
                    session.put_entry(&mut body, node, entry);
                }
                body.directory_entry(entry.cookie, &entry.status, &entry.name);
            }
            // An empty reply would mean that there are no more.
            if left < room || self.end {
                return Ok(body.into());
            }
            after = last;
        }
    }

    /// Where the entries after that cookie begin in what is here. `None`: the host has to be asked.
    fn position(&self, after: u64) -> Option<usize> {
        self.asked.filter(|asked| asked.elapsed() < MAX_AGE)?;
        let at = if after == self.after {
            0
        } else {
            self.entries
                .iter()
                .position(|entry| entry.cookie == after)?
                + 1
        };
        (at < self.entries.len() || self.end).then_some(at)
    }

    async fn fetch(
        &mut self,
        session: &Session,
        unique: u64,
        node: u64,
        after: u64,
    ) -> Result<(), Errno> {
        let directory = session.table().path(node)?;
        let operation = Operation::List {
            directory,
            after,
            room: ROOM,
        };
        let (answer, data) = session.queue.ask(unique, operation, Bytes::new()).await?;
        let Answer::Entries { end } = answer else {
            return Err(Errno::PROTO);
        };
        self.after = after;
        self.entries = entries(&data).map_err(|_| Errno::PROTO)?;
        // Nothing and not the end: it would be asked for without end.
        self.end = end || self.entries.is_empty();
        self.asked = Some(Instant::now());
        Ok(())
    }
}

impl Session {
    /// What is known of an entry, as if the kernel had looked it up.
    fn put_entry(&self, body: &mut Body, parent: u64, entry: &Entry) {
        let attributes = self.attributes(entry.status);
        match &*entry.name {
            // The kernel knows these.
            b"." | b".." => body.entry(0, &attributes, 0),
            name => {
                let node = self.table().found(parent, name, &entry.status);
                body.entry(node, &attributes, VALID)
            }
        };
    }

    pub(super) fn attributes(&self, status: cubicle_protocol::share::Status) -> Attributes {
        let (uid, gid) = self.owner;
        Attributes { status, uid, gid }
    }
}

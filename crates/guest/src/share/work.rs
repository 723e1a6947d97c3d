//! What the kernel asks of a share, put as questions to the host.

use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use cubicle_protocol::share::{
    Answer, Change, FileRef, MAX_DATA, Operation, RelativePath, RenameHow, Status, UNLINKED_PREFIX,
    Usage,
};
use rustix::{fs::OFlags, io::Errno};

use super::{
    abi::{self, Body},
    decode::{Name, What, Work},
    session::{Answered, Session, VALID},
};

/// The only attributes that are the host's business.
const ATTRIBUTES: &[u8] = b"user.";

/// How often a file's path is looked up again because a rename overtook a request.
const ATTEMPTS: usize = 8;

/// A piece of work with what it needs.
struct Run<'a> {
    session: &'a Session,
    unique: u64,
    node: u64,
}

impl Work {
    /// Does it, and gives the body of the reply.
    pub(super) async fn run(self, session: &Session, unique: u64) -> Answered {
        let node = self.node;
        let run = Run {
            session,
            unique,
            node,
        };
        run.what(self.what).await
    }
}

impl Run<'_> {
    async fn what(&self, what: What) -> Answered {
        match what {
            What::Refused(errno) => Err(errno),
            What::Lookup(name) => {
                let of = FileRef {
                    path: self.path_of(&name)?,
                    inode: 0,
                };
                let status = self.status(Operation::Stat { of }).await?;
                Ok(self.entry(&name, status))
            }
            What::GetAttributes => {
                let status = self.on_file(|of| Operation::Stat { of }).await?;
                Ok(self.attributes(status))
            }
            What::SetAttributes(change) => {
                let status = self
                    .on_file(|file| match change {
                        // Nothing that there is here.
                        Change {
                            mode: None,
                            size: None,
                            accessed: None,
                            modified: None,
                        } => Operation::Stat { of: file },
                        change => Operation::Change { file, change },
                    })
                    .await?;
                Ok(self.attributes(status))
            }
            What::ReadLink => {
                let path = self.session.table().path(self.node)?;
                self.data(Operation::ReadLink { path }).await
            }
            What::MakeSymlink(name, target) => {
                let path = self.path_of(&name)?;
                let made = self
                    .ask_with(Operation::MakeSymlink { path }, target)
                    .await?;
                Ok(self.entry(&name, status_of(made.0)?))
            }
            What::MakeFile { name, mode } => {
                let status = self.create(&name, mode, true).await?;
                Ok(self.entry(&name, status))
            }
            What::MakeDirectory { name, mode } => {
                let path = self.path_of(&name)?;
                let made = self.status(Operation::MakeDirectory { path, mode }).await?;
                Ok(self.entry(&name, made))
            }
            What::Remove(name) => self.remove(&name).await,
            What::RemoveDirectory(name) => {
                let path = self.path_of(&name)?;
                self.ask(Operation::RemoveDirectory { path }).await?;
                self.session.table().removed(name.parent, &name.name);
                Ok(Bytes::new())
            }
            What::Rename { from, to, how } => self.rename(&from, &to, how).await,
            What::Link { from, to } => {
                let source = self.session.table().path(from)?;
                let operation = Operation::MakeLink {
                    from: source,
                    to: self.path_of(&to)?,
                };
                let status = self.status(operation).await?;
                // The other name has one link more now.
                self.session.invalidate(from);
                Ok(self.entry(&to, status))
            }
            What::Open { flags } => self.open(flags).await,
            What::Create { name, mode, flags } => {
                let exclusive = flags.contains(OFlags::EXCL);
                let mut status = self.create(&name, mode, exclusive).await?;
                if flags.contains(OFlags::TRUNC) && status.size > 0 {
                    let file = FileRef {
                        path: self.path_of(&name)?,
                        inode: status.inode,
                    };
                    let change = Change {
                        size: Some(0),
                        ..Change::default()
                    };
                    status = self.status(Operation::Change { file, change }).await?;
                }
                let mut body = Body::new();
                let node = self.remember(&name, &status);
                self.session.table().opened(node);
                body.entry(node, &self.session.attributes(status), VALID);
                body.u64(0).u32(abi::FOPEN_NOFLUSH).u32(0);
                Ok(body.into())
            }
            What::Read { offset, len } => {
                let len = len.min(MAX_DATA as u32);
                let read = self
                    .ask_on_file(|file| (Operation::Read { file, offset, len }, Bytes::new()))
                    .await?;
                data_of(read)
            }
            What::Write {
                offset,
                append,
                data,
            } => {
                let write = |file| Operation::Write {
                    file,
                    offset,
                    append,
                };
                let wrote = self.ask_on_file(|file| (write(file), data.clone())).await?;
                match wrote.0 {
                    Answer::Written(len) if len as usize <= data.len() => {
                        let mut body = Body::new();
                        body.u32(len).u32(0);
                        Ok(body.into())
                    }
                    _ => Err(Errno::PROTO),
                }
            }
            What::Release => {
                self.close().await;
                Ok(Bytes::new())
            }
            What::Sync { data_only } => {
                self.ask_on_file(|file| (Operation::Sync { file, data_only }, Bytes::new()))
                    .await?;
                Ok(Bytes::new())
            }
            What::Allocate { flags, offset, len } => {
                let allocate = |file| Operation::Allocate {
                    file,
                    flags,
                    offset,
                    len,
                };
                self.ask_on_file(|file| (allocate(file), Bytes::new()))
                    .await?;
                Ok(Bytes::new())
            }
            What::Usage => match self.ask(Operation::Usage).await?.0 {
                Answer::Usage(usage) => Ok(statfs(&usage)),
                _ => Err(Errno::PROTO),
            },
            What::GetAttribute { name, room } => {
                let path = self.attribute_path(&name).map_err(|errno| match errno {
                    Errno::OPNOTSUPP => Errno::NODATA,
                    errno => errno,
                })?;
                let value = self.data(Operation::GetAttribute { path, name }).await?;
                sized(value, room)
            }
            What::SetAttribute { name, flags, value } => {
                let path = self.attribute_path(&name)?;
                let operation = Operation::SetAttribute { path, name, flags };
                self.ask_with(operation, value).await?;
                Ok(Bytes::new())
            }
            What::ListAttributes { room } => {
                let path = self.session.table().path(self.node)?;
                sized(self.data(Operation::ListAttributes { path }).await?, room)
            }
            What::RemoveAttribute { name } => {
                let path = self.attribute_path(&name)?;
                self.ask(Operation::RemoveAttribute { path, name }).await?;
                Ok(Bytes::new())
            }
            What::OpenDirectory => {
                let mut directories = self
                    .session
                    .directories
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                // The kernel's number of this request is as good as any.
                directories.insert(self.unique, Arc::default());
                let mut body = Body::new();
                body.u64(self.unique).u64(0);
                Ok(body.into())
            }
            What::ReadDirectory {
                handle,
                after,
                room,
                plus,
            } => {
                let directory = self
                    .session
                    .directories
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .get(&handle)
                    .cloned();
                let directory = directory.ok_or(Errno::BADF)?;
                let mut directory = directory.lock().await;
                let (session, unique, node) = (self.session, self.unique, self.node);
                directory
                    .read(session, unique, node, after, room as usize, plus)
                    .await
            }
            What::ReleaseDirectory { handle } => {
                self.session
                    .directories
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .remove(&handle);
                Ok(Bytes::new())
            }
        }
    }

    async fn open(&self, flags: OFlags) -> Answered {
        let write = flags.intersects(OFlags::WRONLY | OFlags::RDWR);
        // Counted before the host is asked, so that a removal that comes meanwhile finds it open.
        self.session.table().opened(self.node);
        let opened = self.on_file(|file| Operation::Open { file, write }).await;
        let status = match opened {
            Ok(status) => status,
            Err(errno) => {
                self.close().await;
                return Err(errno);
            }
        };
        // Whoever opens a file sees what was in it then.
        if self.session.table().tell(self.node, &status) {
            self.session.invalidate(self.node);
        }
        let mut body = Body::new();
        body.u64(0).u32(abi::FOPEN_NOFLUSH).u32(0);
        Ok(body.into())
    }

    async fn close(&self) {
        let closed = self.session.table().closed(self.node);
        if let Some(closed) = closed {
            self.session.queue.release(closed.inode);
            if let Some(path) = closed.remove {
                let _ = self.ask(Operation::Remove { path }).await;
            }
        }
    }

    async fn create(&self, name: &Name, mode: u32, exclusive: bool) -> Result<Status, Errno> {
        self.status(Operation::Create {
            path: self.path_of(name)?,
            mode,
            exclusive,
        })
        .await
    }

    /// Removes a name. The host doesn't know what is open, so a file that is gets another name,
    /// which is removed when it is closed.
    async fn remove(&self, name: &Name) -> Answered {
        let path = self.path_of(name)?;
        if self.session.table().is_open(name.parent, &name.name) {
            let hidden = hidden_name();
            let to = RelativePath::ROOT.join(&hidden).map_err(|_| Errno::IO)?;
            let operation = Operation::Rename {
                from: path,
                to: to.clone(),
                how: RenameHow::Replace,
            };
            self.ask(operation).await?;
            self.hide(name, &hidden, to).await;
        } else {
            self.ask(Operation::Remove { path }).await?;
            self.session.table().removed(name.parent, &name.name);
        }
        Ok(Bytes::new())
    }

    /// What had a name has the hidden one now, until it is closed.
    async fn hide(&self, name: &Name, hidden: &[u8], path: RelativePath) {
        let waits = (self.session.table()).hidden(name.parent, &name.name, hidden);
        if !waits {
            let _ = self.ask(Operation::Remove { path }).await;
        }
    }

    async fn rename(&self, from: &Name, to: &Name, how: RenameHow) -> Answered {
        let (source, target) = (self.path_of(from)?, self.path_of(to)?);
        let open = self.session.table().is_open(to.parent, &to.name);
        let mut spare = None;
        if how == RenameHow::Replace && open && source != target {
            // A second name for what is about to lose its only one.
            let hidden = hidden_name();
            let path = RelativePath::ROOT.join(&hidden).map_err(|_| Errno::IO)?;
            let operation = Operation::MakeLink {
                from: target.clone(),
                to: path.clone(),
            };
            if self.ask(operation).await.is_ok() {
                spare = Some((hidden, path));
            }
        }
        let operation = Operation::Rename {
            from: source,
            to: target,
            how,
        };
        let renamed = self.ask(operation).await;
        if let (Err(_), Some((_, path))) = (&renamed, &spare) {
            let path = path.clone();
            let _ = self.ask(Operation::Remove { path }).await;
        }
        renamed?;
        if let Some((hidden, path)) = spare {
            self.hide(to, &hidden, path).await;
        }
        let mut table = self.session.table();
        match how {
            RenameHow::Exchange => table.exchanged(from.key(), to.key()),
            RenameHow::Replace | RenameHow::Keep => table.renamed(from.key(), to.key()),
        }
        Ok(Bytes::new())
    }

    /// Asks something of this node's file, by the path that it has.
    async fn ask_on_file(
        &self,
        question: impl Fn(FileRef) -> (Operation, Bytes),
    ) -> Result<(Answer, Bytes), Errno> {
        let mut file = self.session.table().file(self.node)?;
        for _ in 0..ATTEMPTS {
            let (operation, data) = question(file.clone());
            let answer = self.ask_with(operation, data).await;
            if !matches!(answer, Err(Errno::NOENT | Errno::STALE | Errno::NOTDIR)) {
                return answer;
            }
            // Perhaps something on its path has been renamed meanwhile.
            let now = self.session.table().file(self.node)?;
            if now == file {
                break;
            }
            file = now;
        }
        // Makes the kernel look the name up again, if a program has named it.
        Err(Errno::STALE)
    }

    async fn on_file(&self, question: impl Fn(FileRef) -> Operation) -> Result<Status, Errno> {
        let answer = self
            .ask_on_file(|file| (question(file), Bytes::new()))
            .await?;
        status_of(answer.0)
    }

    async fn status(&self, operation: Operation) -> Result<Status, Errno> {
        status_of(self.ask(operation).await?.0)
    }

    async fn data(&self, operation: Operation) -> Answered {
        data_of(self.ask(operation).await?)
    }

    async fn ask(&self, operation: Operation) -> Result<(Answer, Bytes), Errno> {
        self.ask_with(operation, Bytes::new()).await
    }

    async fn ask_with(&self, operation: Operation, data: Bytes) -> Result<(Answer, Bytes), Errno> {
        self.session.queue.ask(self.unique, operation, data).await
    }

    fn path_of(&self, name: &Name) -> Result<RelativePath, Errno> {
        self.session.table().path_of(name.parent, &name.name)
    }

    /// The path of this node, for an attribute that the host may know.
    fn attribute_path(&self, name: &[u8]) -> Result<RelativePath, Errno> {
        if !name.starts_with(ATTRIBUTES) {
            return Err(Errno::OPNOTSUPP);
        }
        self.session.table().path(self.node)
    }

    fn remember(&self, name: &Name, status: &Status) -> u64 {
        let mut table = self.session.table();
        table.found(name.parent, &name.name, status)
    }

    fn entry(&self, name: &Name, status: Status) -> Bytes {
        let node = self.remember(name, &status);
        let mut body = Body::new();
        body.entry(node, &self.session.attributes(status), VALID);
        body.into()
    }

    fn attributes(&self, status: Status) -> Bytes {
        self.session.table().tell(self.node, &status);
        let mut body = Body::new();
        body.u64(VALID)
            .u64(0)
            .attributes(&self.session.attributes(status));
        body.into()
    }
}

fn status_of(answer: Answer) -> Result<Status, Errno> {
    match answer {
        Answer::Status(status) => Ok(status),
        _ => Err(Errno::PROTO),
    }
}

fn data_of((answer, data): (Answer, Bytes)) -> Answered {
    match answer {
        Answer::Data => Ok(data),
        _ => Err(Errno::PROTO),
    }
}

/// An attribute's value, or its length if that is all that is wanted.
fn sized(value: Bytes, room: u32) -> Answered {
    let len = u32::try_from(value.len()).map_err(|_| Errno::RANGE)?;
    match room {
        0 => {
            let mut body = Body::new();
            body.u32(len).u32(0);
            Ok(body.into())
        }
        room if room < len => Err(Errno::RANGE),
        _ => Ok(value),
    }
}

/// `struct fuse_kstatfs`.
fn statfs(usage: &Usage) -> Bytes {
    let mut body = Body::new();
    body.u64(usage.blocks)
        .u64(usage.free)
        .u64(usage.available)
        .u64(usage.files)
        .u64(usage.files_free)
        .u32(usage.block_size)
        .u32(cubicle_protocol::share::MAX_NAME as u32)
        .u32(usage.block_size)
        .zeros(28);
    body.into()
}

fn hidden_name() -> Vec<u8> {
    let number = uuid::Uuid::new_v4().simple();
    format!("{UNLINKED_PREFIX}{number}").into_bytes()
}

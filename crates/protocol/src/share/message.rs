use serde::{Deserialize, Serialize};

use super::RelativePath;

/// What the guest asks. Data that an operation needs follows the request in its frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the guest, unique among the requests that wait for an answer.
    pub id: u64,
    /// Whether it was sent before, in a life that ended before the answer came, so that it may have
    /// been done already: what is no longer there to be removed is success then, and so is what is
    /// there already and was to be made.
    pub again: bool,
    /// What is to be done.
    pub operation: Operation,
}

/// What the host answers. Data that belongs to an answer follows it in its frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// [`Request::id`].
    pub id: u64,
    /// What came of it.
    pub outcome: Result<Answer, Errno>,
}

/// An error number of Linux, positive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Errno(pub i32);

/// A file, by its path and by what it was when the guest looked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRef {
    /// Where it is.
    pub path: RelativePath,
    /// Its [`Status::inode`]. If another file has taken its place, the answer is `ESTALE`. 0:
    /// whatever is there is meant.
    pub inode: u64,
}

/// What is to be done. No operation follows a symbolic link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    /// [`Answer::Status`].
    Stat {
        /// Of what.
        of: FileRef,
    },
    /// [`Answer::Entries`], then the entries, each put there by [`push_entry`](super::push_entry).
    List {
        /// Which directory.
        directory: RelativePath,
        /// [`Entry::cookie`] of the last entry that the guest has; 0: from the beginning.
        after: u64,
        /// How many bytes of entries the guest wants at most.
        room: u32,
    },
    /// [`Answer::Data`], then the target.
    ReadLink {
        /// Which symbolic link.
        path: RelativePath,
    },
    /// Checks that a regular file can be opened: [`Answer::Status`].
    Open {
        /// Which one.
        file: FileRef,
        /// Whether it is going to be written to.
        write: bool,
    },
    /// [`Answer::Data`], then the data: less than was asked for only at the end of the file.
    Read {
        /// Of which file.
        file: FileRef,
        /// From where on.
        offset: u64,
        /// How many bytes, at most [`MAX_DATA`](super::MAX_DATA).
        len: u32,
    },
    /// [`Answer::Written`]. The data follows the request.
    Write {
        /// To which file.
        file: FileRef,
        /// From where on. If `append`: where the guest believes that the file ends.
        offset: u64,
        /// At the end of the file, wherever that is by now.
        append: bool,
    },
    /// Makes a regular file: [`Answer::Status`].
    Create {
        /// Where.
        path: RelativePath,
        /// Its permissions.
        mode: u32,
        /// Whether it is an error if something is there.
        exclusive: bool,
    },
    /// [`Answer::Status`].
    MakeDirectory {
        /// Where.
        path: RelativePath,
        /// Its permissions.
        mode: u32,
    },
    /// [`Answer::Status`]. The target follows the request.
    MakeSymlink {
        /// Where.
        path: RelativePath,
    },
    /// Gives a file another name: [`Answer::Status`].
    MakeLink {
        /// One that it has.
        from: RelativePath,
        /// The new one.
        to: RelativePath,
    },
    /// Removes what is no directory: [`Answer::Done`].
    Remove {
        /// Which one.
        path: RelativePath,
    },
    /// Removes an empty directory: [`Answer::Done`].
    RemoveDirectory {
        /// Which one.
        path: RelativePath,
    },
    /// [`Answer::Done`].
    Rename {
        /// The old name.
        from: RelativePath,
        /// The new name.
        to: RelativePath,
        /// What happens to what has the new name.
        how: RenameHow,
    },
    /// Changes what a file is: [`Answer::Status`] afterwards.
    Change {
        /// Which one.
        file: FileRef,
        /// How.
        change: Change,
    },
    /// Waits until a file, or a directory, is on the disk: [`Answer::Done`].
    Sync {
        /// Which one.
        file: FileRef,
        /// Whether its times may be left out.
        data_only: bool,
    },
    /// `fallocate(2)`: [`Answer::Done`].
    Allocate {
        /// Which file.
        file: FileRef,
        /// `FALLOC_FL_*`.
        flags: u32,
        /// From where on.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// [`Answer::Usage`].
    Usage,
    /// [`Answer::Data`], then the value.
    GetAttribute {
        /// Of what.
        path: RelativePath,
        /// Its name, with the `user.` before it.
        #[serde(with = "serde_bytes")]
        name: Vec<u8>,
    },
    /// [`Answer::Done`]. The value follows the request.
    SetAttribute {
        /// Of what.
        path: RelativePath,
        /// Its name, with the `user.` before it.
        #[serde(with = "serde_bytes")]
        name: Vec<u8>,
        /// `XATTR_CREATE`, `XATTR_REPLACE` or 0.
        flags: u32,
    },
    /// [`Answer::Data`], then the names, each with a NUL behind it.
    ListAttributes {
        /// Of what.
        path: RelativePath,
    },
    /// [`Answer::Done`].
    RemoveAttribute {
        /// Of what.
        path: RelativePath,
        /// Its name, with the `user.` before it.
        #[serde(with = "serde_bytes")]
        name: Vec<u8>,
    },
    /// The last program has closed the file. There is no answer, and it is never sent again.
    Release {
        /// [`Status::inode`].
        inode: u64,
    },
}

impl Operation {
    /// Whether it would change something, so that a read-only share refuses it.
    #[must_use]
    pub const fn changes(&self) -> bool {
        match self {
            Self::Stat { .. }
            | Self::List { .. }
            | Self::ReadLink { .. }
            | Self::Read { .. }
            | Self::Usage
            | Self::GetAttribute { .. }
            | Self::ListAttributes { .. }
            | Self::Sync { .. }
            | Self::Release { .. } => false,
            Self::Open { write, .. } => *write,
            Self::Write { .. }
            | Self::Create { .. }
            | Self::MakeDirectory { .. }
            | Self::MakeSymlink { .. }
            | Self::MakeLink { .. }
            | Self::Remove { .. }
            | Self::RemoveDirectory { .. }
            | Self::Rename { .. }
            | Self::Change { .. }
            | Self::Allocate { .. }
            | Self::SetAttribute { .. }
            | Self::RemoveAttribute { .. } => true,
        }
    }
}

/// What happens to what has the new name when something is renamed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RenameHow {
    /// It is replaced.
    Replace,
    /// It is an error.
    Keep,
    /// It gets the old name.
    Exchange,
}

/// What is to change; what is `None` stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Permissions.
    pub mode: Option<u32>,
    /// Length, in bytes.
    pub size: Option<u64>,
    /// When it was last read.
    pub accessed: Option<Moment>,
    /// When it was last written to.
    pub modified: Option<Moment>,
}

/// A time to be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Moment {
    /// What the host's clock shows.
    Now,
    /// That one.
    At(Time),
}

/// Time since the Unix epoch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Time {
    /// Whole seconds.
    pub seconds: i64,
    /// Nanoseconds after that.
    pub nanos: u32,
}

/// What an operation gives if it succeeds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// It is done.
    Done,
    /// What is there.
    Status(Status),
    /// The data follows.
    Data,
    /// The entries follow.
    Entries {
        /// Whether there are none after them.
        end: bool,
    },
    /// So many bytes are written.
    Written(u32),
    /// How full the file system is.
    Usage(Usage),
}

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Tells it from all other files of the share, for as long as it exists.
    pub inode: u64,
    /// What kind of file.
    pub kind: Kind,
    /// The nine bits of `rwxrwxrwx`.
    pub permissions: u16,
    /// How many names it has.
    pub links: u32,
    /// Length, in bytes.
    pub size: u64,
    /// Space that it takes, in units of 512 bytes.
    pub blocks: u64,
    /// When it was last read.
    pub accessed: Time,
    /// When it was last written to.
    pub modified: Time,
    /// When anything of this last changed.
    pub changed: Time,
}

/// What kinds of files there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A device, socket or named pipe: visible, and not to be opened.
    Other,
}

/// One name in a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Where it is in the directory: see [`Operation::List::after`].
    pub cookie: u64,
    /// What it is.
    pub status: Status,
    /// Its name.
    #[serde(with = "serde_bytes")]
    pub name: Vec<u8>,
}

/// How full a file system is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Unit of the next three, in bytes.
    pub block_size: u32,
    /// Size.
    pub blocks: u64,
    /// Not in use.
    pub free: u64,
    /// What programs may use of that.
    pub available: u64,
    /// How many files there can be.
    pub files: u64,
    /// How many more there can be.
    pub files_free: u64,
}

//! What goes over a zygote's sockets. Both ends are of one build: there are no versions. Numbers are
//! in the byte order of the machine.

use std::{
    ffi::{CStr, CString},
    io,
};

/// A process to fork, apart from its descriptors. Those come with the message, in this order: the
/// stream for replies, its network namespace, its standard input, its standard output and error,
/// then those of `inherit`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// User and group.
    pub uid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Resource limits: `RLIMIT_*` and the value of both bounds.
    pub limits: Vec<(u32, u64)>,
    /// Numbers under which the child inherits descriptors.
    pub inherit: Vec<i32>,
    /// Arguments, the program's name first.
    pub arguments: Vec<CString>,
}

impl Request {
    /// Descriptors that come before those of [`Request::inherit`].
    pub const OWN_DESCRIPTORS: usize = 4;

    /// As one message.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut message = Vec::with_capacity(2048);
        let count = |message: &mut Vec<u8>, count: usize| {
            message.extend(u32::try_from(count).unwrap_or(u32::MAX).to_ne_bytes());
        };
        message.extend(self.uid.to_ne_bytes());
        count(&mut message, self.groups.len());
        message.extend(self.groups.iter().flat_map(|group| group.to_ne_bytes()));
        count(&mut message, self.limits.len());
        for (what, value) in &self.limits {
            message.extend(what.to_ne_bytes());
            message.extend(value.to_ne_bytes());
        }
        count(&mut message, self.inherit.len());
        message.extend(self.inherit.iter().flat_map(|fd| fd.to_ne_bytes()));
        for argument in &self.arguments {
            message.extend(argument.as_bytes_with_nul());
        }
        message
    }

    /// Reads a message; `None` if it is none.
    #[must_use]
    pub fn decode(message: &[u8]) -> Option<Self> {
        let mut rest = message;
        let uid = u32::from_ne_bytes(take(&mut rest)?);
        let groups = list(&mut rest, |rest| take(rest).map(u32::from_ne_bytes))?;
        let limits = list(&mut rest, |rest| {
            let what = u32::from_ne_bytes(take(rest)?);
            Some((what, u64::from_ne_bytes(take(rest)?)))
        })?;
        let inherit = list(&mut rest, |rest| take(rest).map(i32::from_ne_bytes))?;
        let mut arguments = Vec::new();
        while !rest.is_empty() {
            let argument = CStr::from_bytes_until_nul(rest).ok()?;
            rest = rest.get(argument.count_bytes() + 1..)?;
            arguments.push(argument.to_owned());
        }
        (!arguments.is_empty()).then_some(Self {
            uid,
            groups,
            limits,
            inherit,
            arguments,
        })
    }
}

fn take<const LEN: usize>(rest: &mut &[u8]) -> Option<[u8; LEN]> {
    let (taken, left) = rest.split_first_chunk()?;
    *rest = left;
    Some(*taken)
}

fn list<T>(rest: &mut &[u8], mut one: impl FnMut(&mut &[u8]) -> Option<T>) -> Option<Vec<T>> {
    let count = u32::from_ne_bytes(take(rest)?);
    (0..count).map(|_| one(rest)).collect()
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// The child runs the program. A pidfd of it comes with this.
    Forked {
        /// Its process id.
        pid: i32,
    },
    /// No child is left.
    Failed {
        /// Index into [`STEPS`](crate::STEPS).
        step: u32,
        /// The error number of the step.
        errno: i32,
    },
}

impl Reply {
    /// Bytes on the stream.
    pub const LEN: usize = 12;

    /// As it is written to the stream.
    #[must_use]
    pub fn encode(self) -> [u8; Self::LEN] {
        let (pid, step, errno) = match self {
            Self::Forked { pid } => (pid, 0, 0),
            Self::Failed { step, errno } => (0, step, errno),
        };
        let mut message = [0; Self::LEN];
        message[..4].copy_from_slice(&pid.to_ne_bytes());
        message[4..8].copy_from_slice(&step.to_ne_bytes());
        message[8..].copy_from_slice(&errno.to_ne_bytes());
        message
    }

    /// Reads what [`Reply::encode`] wrote.
    #[must_use]
    pub fn decode(message: [u8; Self::LEN]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l] = message;
        match i32::from_ne_bytes([a, b, c, d]) {
            0 => Self::Failed {
                step: u32::from_ne_bytes([e, f, g, h]),
                errno: i32::from_ne_bytes([i, j, k, l]),
            },
            pid => Self::Forked { pid },
        }
    }

    /// The failure as an error, and the name of the step.
    #[must_use]
    pub fn failure(step: u32, errno: i32) -> (&'static str, io::Error) {
        let name = usize::try_from(step)
            .ok()
            .and_then(|at| crate::STEPS.get(at));
        (
            name.copied().unwrap_or("prepare it"),
            io::Error::from_raw_os_error(errno),
        )
    }
}

/// How a child ended, as `waitpid` tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It returned this code.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
}

impl Ending {
    /// Bytes on the stream.
    pub const LEN: usize = 4;

    /// As it is written to the stream: the wait status.
    #[must_use]
    pub fn encode(status: i32) -> [u8; Self::LEN] {
        status.to_ne_bytes()
    }

    /// Reads what [`Ending::encode`] wrote.
    #[must_use]
    pub fn decode(status: [u8; Self::LEN]) -> Self {
        let status = i32::from_ne_bytes(status);
        if libc::WIFSIGNALED(status) {
            Self::Signal(libc::WTERMSIG(status))
        } else {
            Self::Code(libc::WEXITSTATUS(status))
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn request() -> Request {
        Request {
            uid: 200_001,
            groups: vec![7],
            limits: vec![(1, u64::MAX), (2, 0)],
            inherit: vec![12, 5],
            arguments: vec![c"qemu".into(), c"".into(), c"-name".into()],
        }
    }

    #[test]
    fn a_request_arrives_as_it_was_sent() {
        assert_eq!(Request::decode(&request().encode()), Some(request()));
    }

    #[test]
    fn what_is_cut_short_is_no_request() {
        let message = request().encode();
        let whole = message.len();
        for len in 0..whole {
            let cut = Request::decode(&message[..len]);
            assert_ne!(cut, Some(request()), "{len} of {whole} bytes");
        }
        // A count of four billion must not be believed.
        assert_eq!(Request::decode(&[0xff; 64]), None);
    }

    #[test]
    fn a_reply_arrives_as_it_was_sent() {
        let failed = Reply::Failed { step: 3, errno: 13 };
        for reply in [Reply::Forked { pid: 4711 }, failed] {
            assert_eq!(Reply::decode(reply.encode()), reply);
        }
        let (step, error) = Reply::failure(3, 13);
        assert_eq!(step, crate::STEPS[3]);
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }
}

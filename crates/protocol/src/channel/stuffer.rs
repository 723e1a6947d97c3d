use memchr::memmem;

use super::{ESCAPE, MAGIC, partial_match};

/// The sending half of the stuffing: says after which byte of the payload an escape is due.
///
/// A writer that may write less than it wants asks [`peek`](Self::peek) what it may write and tells
/// [`advance`](Self::advance) what it wrote; [`stuff`](Self::stuff) does both into a buffer.
#[derive(Debug, Clone, Default)]
pub struct Stuffer {
    /// How many bytes of MAGIC the bytes written so far end with: 0 to 7.
    matched: usize,
}

/// A stretch of payload that can be written as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// How many bytes of the payload the run covers.
    pub len: usize,
    /// Whether an escape byte must follow the run's last byte before any other.
    pub escape: bool,
}

impl Stuffer {
    /// A stuffer at the beginning of a life.
    #[must_use]
    pub const fn new() -> Self {
        Self { matched: 0 }
    }

    /// The longest run at the beginning of `payload`. Empty only if `payload` is.
    #[must_use]
    pub fn peek(&self, payload: &[u8]) -> Run {
        if self.matched > 0 {
            let missing = &MAGIC[self.matched..];
            if payload.starts_with(missing) {
                return Run {
                    len: missing.len(),
                    escape: true,
                };
            }
        }
        // A match that fails can only begin again at MAGIC's first byte, which the bytes that
        // continued it are not: searching from the beginning of `payload` misses nothing.
        match memmem::find(payload, &MAGIC) {
            Some(at) => Run {
                len: at + MAGIC.len(),
                escape: true,
            },
            None => Run {
                len: payload.len(),
                escape: false,
            },
        }
    }

    /// Notes that `written`, a part of a run from its beginning, has gone out. Returns whether it
    /// ended with the last byte of a magic, so that the escape byte is due now.
    #[must_use = "an escape that is due and not written ends the life on the other side"]
    pub fn advance(&mut self, written: &[u8]) -> bool {
        let continues = self.matched > 0 && {
            let missing = &MAGIC[self.matched..];
            let common = written.len().min(missing.len());
            written[..common] == missing[..common]
        };
        let total = self.matched + written.len();
        if continues && total <= MAGIC.len() {
            self.matched = total % MAGIC.len();
            return total == MAGIC.len();
        }
        self.matched = partial_match(written);
        written.ends_with(&MAGIC)
    }

    /// Appends `payload`, stuffed, to `out`.
    pub fn stuff(&mut self, mut payload: &[u8], out: &mut Vec<u8>) {
        while !payload.is_empty() {
            let (run, rest) = payload.split_at(self.peek(payload).len);
            out.extend_from_slice(run);
            if self.advance(run) {
                out.push(ESCAPE);
            }
            payload = rest;
        }
    }
}

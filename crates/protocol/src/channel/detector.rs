use memchr::memmem;

use super::{BODY_LEN, ESCAPE, HELLO, Hello, MAGIC, partial_match};

/// What the receiving side finds in its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// Payload of the current life. Never empty.
    Data(&'a [u8]),
    /// The current life is over and this one begins.
    Hello(Hello),
}

/// The receiving half of the stuffing: takes the escapes out and finds each [`Hello`].
///
/// Payload is passed on as soon as it arrives, also while it may be the beginning of a magic; only
/// a complete magic waits for the byte behind it, which the sender never withholds. Where nothing
/// is pending and a piece holds no magic, it costs one vectorised search and no copy. The price: a
/// Hello that arrives in several pieces may leave up to seven bytes of its magic in the life that it
/// ends. They are the last that life gets.
#[derive(Debug, Clone)]
pub struct Detector {
    state: State,
}

#[derive(Debug, Clone)]
enum State {
    /// The bytes so far end with this many bytes of MAGIC (0 to 7), all passed on already.
    Payload { matched: usize },
    /// MAGIC is complete; its last `held` bytes have not been passed on.
    Magic { held: usize },
    /// Behind `MAGIC 0x01`.
    Body { bytes: [u8; BODY_LEN], len: usize },
}

impl Default for Detector {
    fn default() -> Self {
        Self::new()
    }
}

impl Detector {
    /// A detector at the beginning of a stream.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            state: State::Payload { matched: 0 },
        }
    }

    /// The next event in `input`, which is advanced past what was used. `None`: all of it was used,
    /// go on with the next piece.
    pub fn next<'a>(&mut self, input: &mut &'a [u8]) -> Option<Event<'a>> {
        loop {
            match &mut self.state {
                State::Payload { matched } => {
                    let (data, next) = scan_payload(*matched, input)?;
                    self.state = next;
                    if !data.is_empty() {
                        return Some(Event::Data(data));
                    }
                }
                State::Magic { held } => {
                    let held = *held;
                    let (&kind, rest) = input.split_first()?;
                    if kind == HELLO {
                        *input = rest;
                        self.state = State::Body {
                            bytes: [0; BODY_LEN],
                            len: 0,
                        };
                        continue;
                    }
                    if kind == ESCAPE {
                        *input = rest;
                    }
                    self.state = State::Payload { matched: 0 };
                    if held > 0 {
                        return Some(Event::Data(&MAGIC[MAGIC.len() - held..]));
                    }
                }
                State::Body { bytes, len } => {
                    let (taken, rest) = input.split_at(input.len().min(BODY_LEN - *len));
                    bytes[*len..*len + taken.len()].copy_from_slice(taken);
                    *len += taken.len();
                    *input = rest;
                    if *len < BODY_LEN {
                        return None;
                    }
                    let bytes = *bytes;
                    self.state = State::Payload { matched: 0 };
                    if let Some(hello) = Hello::decode(&bytes) {
                        return Some(Event::Hello(hello));
                    }
                    self.rescan(&bytes);
                }
            }
        }
    }

    /// A host died within its Hello. What stands in the place of the rest belongs to no life, but a
    /// later host's Hello may begin in it.
    fn rescan(&mut self, mut body: &[u8]) {
        while self.next(&mut body).is_some() {}
        if let State::Magic { held } = &mut self.state {
            *held = 0;
        }
    }
}

/// Passes payload on up to the next complete magic. `None`: `input` is empty.
fn scan_payload<'a>(matched: usize, input: &mut &'a [u8]) -> Option<(&'a [u8], State)> {
    let bytes = *input;
    if bytes.is_empty() {
        return None;
    }
    if matched > 0 {
        let missing = &MAGIC[matched..];
        if let Some(rest) = bytes.strip_prefix(missing) {
            *input = rest;
            return Some((
                &[],
                State::Magic {
                    held: missing.len(),
                },
            ));
        }
        if missing.starts_with(bytes) {
            *input = &[];
            return Some((
                bytes,
                State::Payload {
                    matched: matched + bytes.len(),
                },
            ));
        }
    }
    match memmem::find(bytes, &MAGIC) {
        Some(at) => {
            *input = &bytes[at + MAGIC.len()..];
            Some((&bytes[..at], State::Magic { held: MAGIC.len() }))
        }
        None => {
            *input = &[];
            Some((
                bytes,
                State::Payload {
                    matched: partial_match(bytes),
                },
            ))
        }
    }
}

//! Requests to the kernel over netlink, answered before the call returns.
//!
//! The kernel works off a netlink request inside the `sendmsg` that carries it, so its answer is
//! already queued when that returns. Nothing here ever waits, and no event loop is needed: an
//! answer that is not there is an error.
//!
//! A socket belongs for good to the network namespace of the thread that opened it.

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use netlink_packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST,
    NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable, Nla,
    NlasIterator, Parseable,
};
use netlink_packet_netfilter::NetfilterMessage;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{
    Socket, SocketAddr,
    protocols::{NETLINK_NETFILTER, NETLINK_ROUTE},
};

/// Room for one datagram from the kernel, which sends at most 32 KiB in a piece.
const RECEIVE_BYTES: usize = 64 << 10;
/// A request longer than this needs a larger send buffer than sockets have by default.
const COMFORTABLE_SEND_BYTES: usize = 64 << 10;
/// How often a listing is begun anew because the listed changed meanwhile.
const DUMP_ATTEMPTS: usize = 16;
/// `NLMSGERR_ATTR_MSG` of `linux/netlink.h`: the kernel's own words about a refusal.
const EXPLANATION: u16 = 1;
/// Length of the header that an answer repeats of its request, `struct nlmsghdr`.
const HEADER_LEN: usize = 16;

/// A netlink socket that speaks `T`.
#[derive(Debug)]
pub(crate) struct Netlink<T> {
    socket: Socket,
    sequence: u32,
    speaks: PhantomData<fn(T) -> T>,
}

/// Links, addresses, routes, neighbours.
pub(crate) type Route = Netlink<RouteNetlinkMessage>;
/// Rules and connections.
pub(crate) type Netfilter = Netlink<NetfilterMessage>;

impl Route {
    /// A socket in the current thread's network namespace.
    pub(crate) fn open() -> io::Result<Self> {
        Self::with_protocol(NETLINK_ROUTE)
    }
}

impl Netfilter {
    /// A socket in the current thread's network namespace.
    pub(crate) fn open() -> io::Result<Self> {
        Self::with_protocol(NETLINK_NETFILTER)
    }
}

impl<T> Netlink<T>
where
    T: NetlinkSerializable + NetlinkDeserializable,
{
    fn with_protocol(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Refusals come with an explanation and without a copy of the request.
        socket.set_ext_ack(true)?;
        socket.set_cap_ack(true)?;
        Ok(Self {
            socket,
            sequence: 0,
            speaks: PhantomData,
        })
    }

    /// Sends one request and returns once the kernel has carried it out.
    pub(crate) fn request(&mut self, message: T, flags: u16) -> io::Result<()> {
        self.requests(vec![(message, flags | NLM_F_ACK)])
    }

    /// Sends requests in one datagram. The last one that asks for an acknowledgement tells the
    /// outcome, together with any refusal before it.
    pub(crate) fn requests(&mut self, messages: Vec<(T, u16)>) -> io::Result<()> {
        let mut datagram = Vec::new();
        let mut last = None;
        for (message, flags) in messages {
            let sequence = self.append(&mut datagram, message, flags);
            if flags & NLM_F_ACK != 0 {
                last = Some(sequence);
            }
        }
        self.send(&datagram)?;
        let mut refusal = None;
        while let Some(last) = last {
            // A refusal that ends everything is reported for the first message alone.
            let answers = match self.receive() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(refusal.unwrap_or_else(unanswered));
                }
                answers => answers?,
            };
            let mut seen = false;
            for answer in answers {
                if let NetlinkPayload::Error(error) = answer.payload {
                    if let Some(code) = error.code {
                        refusal.get_or_insert_with(|| {
                            explained(code.get(), answer.header.flags, &error.header)
                        });
                    }
                    seen |= answer.header.sequence_number == last;
                }
            }
            if seen {
                break;
            }
        }
        // Leave nothing behind that the next request could take for its own answer.
        while self.receive().is_ok() {}
        refusal.map_or(Ok(()), Err)
    }

    /// Asks for a list and returns all of it. The list is of one moment: if it changed while it
    /// was read, it is read again.
    pub(crate) fn dump(&mut self, message: T, flags: u16) -> io::Result<Vec<T>>
    where
        T: Clone,
    {
        for _ in 0..DUMP_ATTEMPTS {
            if let Some(list) = self.dump_once(message.clone(), flags)? {
                return Ok(list);
            }
        }
        Err(io::Error::other("the list changed each time it was read"))
    }

    fn dump_once(&mut self, message: T, flags: u16) -> io::Result<Option<Vec<T>>> {
        let mut datagram = Vec::new();
        let sequence = self.append(&mut datagram, message, flags | NLM_F_DUMP);
        self.send(&datagram)?;
        let mut list = Vec::new();
        let mut consistent = true;
        loop {
            for answer in self.receive().map_err(answered)? {
                if answer.header.sequence_number != sequence {
                    continue;
                }
                consistent &= answer.header.flags & NLM_F_DUMP_INTR == 0;
                match answer.payload {
                    NetlinkPayload::InnerMessage(item) => list.push(item),
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        return Err(io::Error::from_raw_os_error(-done.code));
                    }
                    NetlinkPayload::Done(_) => return Ok(consistent.then_some(list)),
                    NetlinkPayload::Error(error) => {
                        if let Some(code) = error.code {
                            let flags = answer.header.flags;
                            return Err(explained(code.get(), flags, &error.header));
                        }
                    }
                    _ => {}
                }
            }
        }
    }

    fn append(&mut self, datagram: &mut Vec<u8>, message: T, flags: u16) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags | NLM_F_REQUEST;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let start = datagram.len();
        datagram.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut datagram[start..]);
        self.sequence
    }

    fn send(&self, datagram: &[u8]) -> io::Result<()> {
        if datagram.len() > COMFORTABLE_SEND_BYTES {
            self.enlarge_send_buffer(2 * datagram.len())?;
        }
        self.socket.send(datagram, 0).map(drop)
    }

    fn receive(&self) -> io::Result<Vec<NetlinkMessage<T>>> {
        let mut buffer = Vec::with_capacity(RECEIVE_BYTES);
        let received = self
            .socket
            .recv(&mut buffer, libc::MSG_DONTWAIT | libc::MSG_TRUNC)?;
        if received > buffer.len() {
            return Err(io::Error::other(
                "the kernel's answer is longer than netlink allows",
            ));
        }
        let mut messages = Vec::new();
        let mut rest = &buffer[..];
        while rest.len() >= HEADER_LEN {
            let message = NetlinkMessage::<T>::deserialize(rest).map_err(io::Error::other)?;
            let length = (message.header.length as usize)
                .next_multiple_of(4)
                .min(rest.len());
            messages.push(message);
            rest = &rest[length..];
        }
        Ok(messages)
    }

    fn enlarge_send_buffer(&self, bytes: usize) -> io::Result<()> {
        let bytes = libc::c_int::try_from(bytes).map_err(io::Error::other)?;
        // SAFETY: the descriptor is open as long as `self.socket`, and the option's value is an
        // int that lives until the call returns.
        let result = unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_SNDBUFFORCE,
                (&raw const bytes).cast(),
                size_of_val(&bytes) as libc::socklen_t,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

impl<T> AsFd for Netlink<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn unanswered() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the kernel did not answer")
}

fn answered(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock {
        unanswered()
    } else {
        error
    }
}

/// A refusal with the kernel's explanation, if it gave one.
fn explained(code: i32, flags: u16, answer: &[u8]) -> io::Error {
    let error = io::Error::from_raw_os_error(code.abs());
    if flags & NLM_F_ACK_TLVS == 0 || answer.len() <= HEADER_LEN {
        return error;
    }
    let explanation = NlasIterator::new(&answer[HEADER_LEN..])
        .filter_map(|attribute| DefaultNla::parse(&attribute.ok()?).ok())
        .find(|attribute| attribute.kind() == EXPLANATION)
        .map(|attribute| {
            let mut text = vec![0; attribute.value_len()];
            attribute.emit_value(&mut text);
            String::from_utf8_lossy(&text)
                .trim_end_matches('\0')
                .to_owned()
        });
    match explanation {
        Some(text) => io::Error::new(error.kind(), Refusal { code: error, text }),
        None => error,
    }
}

/// What the kernel answered and what it said about it.
#[derive(Debug)]
struct Refusal {
    code: io::Error,
    text: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.code, self.text)
    }
}

impl std::error::Error for Refusal {}

/// The number of the error that the kernel answered with, with or without an explanation.
pub(crate) fn errno(error: &io::Error) -> Option<i32> {
    error.raw_os_error().or_else(|| {
        error
            .get_ref()?
            .downcast_ref::<Refusal>()
            .and_then(|refusal| refusal.code.raw_os_error())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_keeps_its_number_and_says_the_kernels_words() {
        // An answer's copy of the request header, then attribute 1 with a text.
        let mut answer = vec![0; HEADER_LEN];
        answer.extend([11, 0, 1, 0]);
        answer.extend(b"no luck\0");
        let error = explained(-libc::EBUSY, NLM_F_ACK_TLVS, &answer);
        assert_eq!(errno(&error), Some(libc::EBUSY));
        assert!(error.to_string().ends_with(": no luck"), "{error}");
        let plain = explained(-libc::ENOENT, 0, &answer);
        assert_eq!(errno(&plain), Some(libc::ENOENT));
    }

    #[test]
    fn listing_links_finds_the_loopback() {
        let mut route = Route::open().unwrap();
        let all = route
            .dump(RouteNetlinkMessage::GetLink(Default::default()), 0)
            .unwrap();
        assert!(!all.is_empty());
    }
}

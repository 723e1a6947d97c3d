//! The framing against a model, and the handshake over a stream that cuts at will.
#![allow(clippy::unwrap_used, missing_docs)]

use cubicle_protocol::channel::{
    Detector, Error, Event, HELLO_LEN, Hello, MAGIC, Nonce, Stuffer, VERSION,
    host::{HostChannel, handshake},
    introduction,
};
use proptest::{collection::vec, prelude::*, sample::Index};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

/// One life: what came between one Hello and the next.
type Lives = Vec<(Option<Nonce>, Vec<u8>)>;

/// Payload that is full of magics, their beginnings, and the bytes that mean something behind one.
fn payload() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        3 => (0..=MAGIC.len()).prop_map(|len| MAGIC[..len].to_vec()),
        2 => Just(MAGIC.to_vec()),
        2 => vec(prop_oneof![Just(0), Just(1), Just(2), Just(MAGIC[0])], 1..4),
        2 => vec(any::<u8>(), 0..40),
        1 => Just(Hello::new(Nonce::from_bytes([9; 16])).to_bytes().to_vec()),
        1 => Just([b'x'; 3000].to_vec()),
    ];
    vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

/// Cuts `bytes` at every one of `cuts`.
fn pieces<'a>(bytes: &'a [u8], cuts: &[Index]) -> Vec<&'a [u8]> {
    let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
    at.extend([0, bytes.len()]);
    at.sort_unstable();
    at.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect()
}

fn detect(pieces: &[&[u8]]) -> Lives {
    let mut detector = Detector::new();
    let mut lives: Lives = vec![(None, Vec::new())];
    for &piece in pieces {
        let mut input = piece;
        while let Some(event) = detector.next(&mut input) {
            match event {
                Event::Data(data) => {
                    assert!(!data.is_empty());
                    lives.last_mut().unwrap().1.extend_from_slice(data);
                }
                Event::Hello(hello) => lives.push((Some(hello.nonce), Vec::new())),
            }
        }
        assert!(input.is_empty());
    }
    lives
}

fn stuff(pieces: &[&[u8]]) -> Vec<u8> {
    let mut stuffer = Stuffer::new();
    let mut out = Vec::new();
    for piece in pieces {
        stuffer.stuff(piece, &mut out);
    }
    out
}

/// What stuffing means, written down in the simplest way.
fn model_stuff(payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut fresh = 0;
    for &byte in payload {
        out.push(byte);
        if out[fresh..].ends_with(&MAGIC) {
            out.push(0);
            fresh = out.len();
        }
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn stuffing_does_not_depend_on_the_pieces(p in payload(), cuts in vec(any::<Index>(), 0..8)) {
        prop_assert_eq!(stuff(&pieces(&p, &cuts)), model_stuff(&p));
    }

    #[test]
    fn a_partial_write_is_told_to_the_stuffer_as_it_was(
        p in payload(),
        limits in vec(1usize..12, 1..40),
    ) {
        let mut stuffer = Stuffer::new();
        let (mut out, mut rest, mut limits) = (Vec::new(), &p[..], limits.into_iter().cycle());
        while !rest.is_empty() {
            let run = stuffer.peek(rest);
            prop_assert!(run.len > 0);
            let written = run.len.min(limits.next().unwrap());
            out.extend_from_slice(&rest[..written]);
            let due = stuffer.advance(&rest[..written]);
            prop_assert_eq!(due, run.escape && written == run.len);
            if due {
                out.push(0);
            }
            rest = &rest[written..];
        }
        prop_assert_eq!(out, model_stuff(&p));
    }

    /// Garbage of an interrupted life, then lives of which each may be cut off anywhere, in the
    /// middle of an escape or of a hello too: every later life arrives whole, none is invented.
    #[test]
    fn every_life_is_found_and_its_payload_is_exact(
        lives in vec((any::<[u8; 16]>(), payload(), any::<Index>(), any::<bool>()), 1..5),
        cuts in vec(any::<Index>(), 0..12),
    ) {
        let mut wire = Vec::new();
        let mut whole = Vec::new();
        let last = lives.len() - 1;
        for (i, (nonce, payload, cut, interrupted)) in lives.iter().enumerate() {
            let nonce = Nonce::from_bytes(*nonce);
            let mut life = Hello::new(nonce).to_bytes().to_vec();
            life.extend(stuff(&[payload]));
            if *interrupted && i != last {
                life.truncate(cut.index(life.len() + 1));
            } else {
                whole.push((Some(nonce), payload.clone()));
            }
            wire.extend(life);
        }
        let found = detect(&pieces(&wire, &cuts));
        let mut left = found.iter();
        for want in &whole {
            let hit = left.find(|(nonce, _)| *nonce == want.0);
            prop_assert!(hit.is_some(), "life {:?} was not found", want.0);
            // A life that was not interrupted may be followed by the torn beginning of the next.
            let got = &hit.unwrap().1;
            prop_assert!(got.starts_with(&want.1), "payload of {:?} differs", want.0);
        }
        prop_assert_eq!(found.last(), whole.last());
        let known = |n: &Option<Nonce>| lives.iter().any(|l| Some(Nonce::from_bytes(l.0)) == *n);
        prop_assert!(found.iter().skip(1).all(|(nonce, _)| known(nonce)));
    }

    #[test]
    fn what_a_detector_finds_does_not_depend_on_the_pieces(
        mut garbage in payload(),
        p in payload(),
        cuts in vec(any::<Index>(), 0..12),
    ) {
        garbage.extend(Hello::new(Nonce::from_bytes([3; 16])).to_bytes());
        garbage.extend(stuff(&[&p]));
        let bytes: Vec<&[u8]> = garbage.chunks(1).collect();
        let whole = detect(&[&garbage]);
        for found in [detect(&pieces(&garbage, &cuts)), detect(&bytes)] {
            // What a torn hello leaves behind in the life it ends may differ, nothing else.
            let nonces = |lives: &Lives| lives.iter().map(|life| life.0).collect::<Vec<_>>();
            prop_assert_eq!(nonces(&found), nonces(&whole));
            prop_assert_eq!(found.last(), whole.last());
        }
        prop_assert_eq!(&whole.last().unwrap().1, &p);
    }

    /// Nothing but a complete magic is held back, and that only until the escape is there.
    #[test]
    fn payload_is_passed_on_at_once(p in payload()) {
        let mut stuffer = Stuffer::new();
        let mut detector = Detector::new();
        let mut received = 0;
        for (i, byte) in p.iter().enumerate() {
            let mut wire = Vec::new();
            stuffer.stuff(&[*byte], &mut wire);
            let mut input = &wire[..];
            while let Some(event) = detector.next(&mut input) {
                match event {
                    Event::Data(data) => received += data.len(),
                    Event::Hello(hello) => prop_assert!(false, "{hello:?}"),
                }
            }
            prop_assert_eq!(received, i + 1);
        }
    }
}

#[test]
fn a_hello_in_one_piece_never_leaks_into_the_life_before() {
    let hello = Hello::new(Nonce::from_bytes([5; 16])).to_bytes();
    let wire = [b"tail".as_slice(), &hello, b"head"].concat();
    assert_eq!(
        detect(&[&wire]),
        [
            (None, b"tail".to_vec()),
            (Some(Nonce::from_bytes([5; 16])), b"head".to_vec())
        ]
    );
}

#[test]
fn a_hello_with_a_wrong_checksum_begins_nothing() {
    let mut hello = Hello::new(Nonce::from_bytes([5; 16])).to_bytes();
    hello[HELLO_LEN - 1] ^= 1;
    assert_eq!(detect(&[&hello, b"after"]), [(None, b"after".to_vec())]);
}

/// A guest that answers the last hello, after `garbage`, and echoes payload until `len` bytes.
async fn echo_guest(mut io: DuplexStream, garbage: Vec<u8>, reply_version: u16, len: usize) {
    io.write_all(&garbage).await.unwrap();
    let (mut detector, mut buf, mut echoed) = (Detector::new(), [0; 7], None);
    loop {
        let read = io.read(&mut buf).await.unwrap();
        let mut input = &buf[..read];
        while let Some(event) = detector.next(&mut input) {
            match event {
                Event::Data(data) => {
                    if let Some(echoed) = &mut echoed {
                        io.write_all(data).await.unwrap();
                        *echoed += data.len();
                    }
                }
                Event::Hello(hello) => {
                    echoed = Some(0);
                    let reply = Hello {
                        version: reply_version,
                        ..hello
                    };
                    // One write with the first bytes of the life: the host must keep them.
                    io.write_all(&[&reply.to_reply_bytes()[..], b"hi"].concat())
                        .await
                        .unwrap();
                }
            }
        }
        if read == 0 || echoed.is_some_and(|echoed| echoed >= len) {
            return;
        }
    }
}

fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn the_host_discards_old_lives_and_reads_its_own(
        mut garbage in payload(),
        p in payload(),
        capacity in 1usize..200,
    ) {
        block_on(async {
            // An older life's reply, whole and torn, is garbage as well.
            let old = Hello::new(Nonce::from_bytes([8; 16])).to_reply_bytes();
            garbage.extend(old);
            garbage.extend(&old[..20]);
            let (host, guest) = duplex(capacity);
            let guest = tokio::spawn(echo_guest(guest, garbage, VERSION, p.len()));
            let channel = handshake(host, Nonce::from_bytes([7; 16])).await.unwrap();
            let (mut read, mut write) = tokio::io::split(channel);
            let sent = p.clone();
            let writer = tokio::spawn(async move {
                write.write_all(&sent).await.unwrap();
                write.flush().await.unwrap();
                write
            });
            let mut received = vec![0; 2 + p.len()];
            read.read_exact(&mut received).await.unwrap();
            assert_eq!(&received[..2], b"hi");
            assert_eq!(&received[2..], &p[..]);
            drop((writer.await.unwrap(), read));
            guest.await.unwrap();
        });
    }
}

#[test]
fn vectored_writes_are_stuffed_too() {
    block_on(async {
        let (host, guest) = duplex(1 << 16);
        let slices: [&[u8]; 5] = [b"a", &MAGIC[..3], &MAGIC[3..], &MAGIC, b"z"];
        let want = slices.concat();
        let guest = tokio::spawn(echo_guest(guest, Vec::new(), VERSION, want.len()));
        let mut channel = handshake(host, Nonce::generate()).await.unwrap();
        let mut left: Vec<&[u8]> = slices.to_vec();
        while !left.is_empty() {
            let bufs: Vec<_> = left
                .iter()
                .map(|slice| std::io::IoSlice::new(slice))
                .collect();
            let mut written = channel.write_vectored(&bufs).await.unwrap();
            assert!(written > 0);
            while written > 0 {
                let len = written.min(left[0].len());
                left[0] = &left[0][len..];
                written -= len;
                if left[0].is_empty() {
                    left.remove(0);
                }
            }
        }
        channel.flush().await.unwrap();
        let mut received = vec![0; 2 + want.len()];
        channel.read_exact(&mut received).await.unwrap();
        assert_eq!(&received[2..], &want[..]);
        guest.await.unwrap();
    });
}

#[test]
fn a_guest_of_another_version_and_one_that_goes_away_are_told_apart() {
    block_on(async {
        let (host, guest) = duplex(1 << 10);
        tokio::spawn(echo_guest(guest, Vec::new(), VERSION + 1, 1));
        let error = handshake(host, Nonce::generate())
            .await
            .map(drop)
            .unwrap_err();
        assert!(matches!(error, Error::Version { guest, host: VERSION } if guest == VERSION + 1));

        let (host, mut guest) = duplex(1 << 10);
        let gone = tokio::spawn(async move {
            guest.write_all(b"half a frame").await.unwrap();
            let mut hello = [0; HELLO_LEN];
            guest.read_exact(&mut hello).await.unwrap();
        });
        let result: Result<HostChannel<_>, _> = handshake(host, Nonce::generate()).await;
        assert!(matches!(result.map(drop), Err(Error::Closed)));
        gone.await.unwrap();
    });
}

/// A guest of that version, which is told a number and answers the next one.
async fn counting_guest(mut io: DuplexStream, version: u16) {
    let mut hello = [0; HELLO_LEN];
    io.read_exact(&mut hello).await.unwrap();
    let (mut detector, mut input) = (Detector::new(), &hello[..]);
    let Some(Event::Hello(hello)) = detector.next(&mut input) else {
        panic!("no hello");
    };
    let reply = Hello { version, ..hello };
    io.write_all(&reply.to_reply_bytes()).await.unwrap();
    if version == VERSION {
        let number: u32 = introduction::hear(&mut io).await.unwrap();
        introduction::say(&mut io, &(number + 1)).await.unwrap();
        return;
    }
    // Version 2: the length, 32 bits and big-endian, and so many bytes of JSON.
    let mut json = vec![0; io.read_u32().await.unwrap() as usize];
    io.read_exact(&mut json).await.unwrap();
    let number: u32 = serde_json::from_slice(&json).unwrap();
    let json = serde_json::to_vec(&(number + 1)).unwrap();
    io.write_u32(json.len() as u32).await.unwrap();
    io.write_all(&json).await.unwrap();
}

#[test]
fn a_guest_of_this_version_and_one_of_the_version_before_are_introduced() {
    block_on(async {
        for version in [VERSION, 2] {
            let (host, guest) = duplex(1 << 10);
            tokio::spawn(counting_guest(guest, version));
            let mut channel = handshake(host, Nonce::generate()).await.unwrap();
            let answer: u32 = channel.introduce(&1000_u32).await.unwrap();
            assert_eq!(answer, 1001, "version {version}");
        }
    });
}

use proptest::prelude::*;

use super::*;

fn path() -> impl Strategy<Value = RelativePath> {
    proptest::collection::vec("[a-z. ]{1,9}", 0..5).prop_map(|names| {
        let names: Vec<_> = names
            .into_iter()
            .map(|name| {
                if matches!(&*name, "." | "..") {
                    "dots".to_owned()
                } else {
                    name
                }
            })
            .collect();
        RelativePath::new(names.join("/").into_bytes()).unwrap()
    })
}

fn operation() -> impl Strategy<Value = Operation> {
    let file = (path(), any::<u64>())
        .prop_map(|(path, inode)| FileRef { path, inode })
        .boxed();
    prop_oneof![
        file.clone().prop_map(|of| Operation::Stat { of }),
        (path(), any::<u64>(), any::<u32>()).prop_map(|(directory, after, room)| {
            Operation::List {
                directory,
                after,
                room,
            }
        }),
        (file, any::<u64>(), any::<bool>()).prop_map(|(file, offset, append)| Operation::Write {
            file,
            offset,
            append
        }),
        (path(), path()).prop_map(|(from, to)| Operation::Rename {
            from,
            to,
            how: RenameHow::Exchange
        }),
        (path(), proptest::collection::vec(any::<u8>(), 0..200))
            .prop_map(|(path, name)| Operation::GetAttribute { path, name }),
        Just(Operation::Usage),
    ]
}

proptest! {
    #[test]
    fn frames_come_out_as_they_went_in_however_the_stream_is_cut(
        messages in proptest::collection::vec(
            (any::<u64>(), any::<bool>(), operation(), proptest::collection::vec(any::<u8>(), 0..300)),
            1..8,
        ),
        cut in 1_usize..700,
    ) {
        let messages: Vec<_> = messages
            .into_iter()
            .map(|(id, again, operation, data)| (Request { id, again, operation }, data))
            .collect();
        let stream: Vec<u8> = messages
            .iter()
            .flat_map(|(request, data)| {
                let apart = [&encode_head(request, data.len()).unwrap()[..], data].concat();
                assert_eq!(encode(request, data).unwrap(), apart);
                apart
            })
            .collect();
        let mut frames = Frames::new();
        let mut out = Vec::new();
        for piece in stream.chunks(cut) {
            frames.push(piece);
            while let Some(frame) = frames.take::<Request>().unwrap() {
                out.push((frame.message, frame.data.to_vec()));
            }
        }
        prop_assert_eq!(out, messages);
    }

    #[test]
    fn no_stream_makes_a_reader_panic_or_keep_more_than_a_frame(
        stream in proptest::collection::vec(any::<u8>(), 0..4000),
    ) {
        let mut frames = Frames::new();
        for piece in stream.chunks(97) {
            frames.push(piece);
            loop {
                match frames.take::<Request>() {
                    Ok(Some(frame)) => prop_assert!(frame.data.len() <= MAX_DATA),
                    Ok(None) => break,
                    Err(_) => return Ok(()),
                }
            }
        }
    }

    #[test]
    fn a_path_has_no_way_up(bytes in proptest::collection::vec(
        prop_oneof![Just(b'.'), Just(b'/'), Just(0), any::<u8>()], 0..20))
    {
        if let Ok(path) = RelativePath::new(bytes) {
            for name in path.as_bytes().split(|&byte| byte == b'/') {
                prop_assert!(path.as_bytes().is_empty() || !matches!(name, b"" | b"." | b".."));
                prop_assert!(!name.contains(&0));
            }
        }
    }
}

#[test]
fn paths_that_lead_elsewhere_are_refused() {
    for bad in [
        "/", "/a", "a/", "a//b", ".", "..", "a/../b", "a/./b", "a\0b",
    ] {
        assert_eq!(
            RelativePath::new(bad.into()),
            Err(InvalidPath::NotAName),
            "{bad}"
        );
    }
    for bad in ["", ".", "..", "a/b"] {
        assert!(RelativePath::ROOT.join(bad.as_bytes()).is_err(), "{bad}");
    }
    assert!(RelativePath::new(vec![b'a'; 256]).is_err());
    let long = ["a"; 2049].join("/");
    assert!(matches!(
        RelativePath::new(long.into()),
        Err(InvalidPath::TooLong(_))
    ));
}

#[test]
fn a_path_is_refused_when_it_is_decoded() {
    #[derive(serde::Serialize)]
    struct Same<'a> {
        id: u64,
        again: bool,
        variant: u8,
        #[serde(with = "serde_bytes")]
        path: &'a [u8],
        inode: u64,
    }
    let same = |path| Same {
        id: 1,
        again: false,
        variant: 0,
        path,
        inode: 0,
    };
    let mut frames = Frames::new();
    frames.push(&encode(&same(b"a/b"), b"").unwrap());
    let good = frames.take::<Request>().unwrap().unwrap();
    assert!(
        matches!(good.message.operation, Operation::Stat { of } if of.path.as_bytes() == b"a/b")
    );
    frames.push(&encode(&same(b"a/../../etc"), b"").unwrap());
    assert!(matches!(frames.take::<Request>(), Err(Error::Message(_))));
}

#[test]
fn the_longest_request_fits_into_a_frame() {
    let long = vec![[b'n'; 255].as_slice(); 16].join(&b'/');
    let path = RelativePath::new(long).unwrap();
    let request = Request {
        id: u64::MAX,
        again: true,
        operation: Operation::Rename {
            from: path.clone(),
            to: path,
            how: RenameHow::Replace,
        },
    };
    let frame = encode(&request, &vec![0; MAX_DATA]).unwrap();
    assert!(frame.len() <= MAX_FRAME);
    assert!(encode(&request, &vec![0; MAX_DATA + 1]).is_err());
}

#[test]
fn entries_stop_where_there_is_no_more_room() {
    let time = Time::default();
    let entry = |n: u64| Entry {
        cookie: n,
        status: Status {
            inode: n,
            kind: Kind::File,
            permissions: 0o644,
            links: 1,
            size: 0,
            blocks: 0,
            accessed: time,
            modified: time,
            changed: time,
        },
        name: format!("file-{n}").into_bytes(),
    };
    let mut data = Vec::new();
    let mut count = 0;
    while push_entry(&mut data, &entry(count), 1000).unwrap() {
        count += 1;
    }
    assert!(data.len() <= 1000 && count > 10);
    let read = entries(&data).unwrap();
    assert_eq!(read, (0..count).map(entry).collect::<Vec<_>>());
}

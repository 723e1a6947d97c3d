//! Layers over one another, against a model that knows nothing of descriptors.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "this is all tests")]

mod support;

use std::{
    collections::{BTreeMap, HashMap},
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::Path,
};

use cubicle_oci::{
    Digest, Error, Limits,
    unpack::{Stop, Unpacker},
};
use proptest::prelude::*;
use support::{
    Entry,
    canary::Ground,
    gzip,
    model::{Model, Seen},
    tar, zstd,
};

/// What is in a tree, as [`Model::seen`] tells it.
fn seen(root: &Path) -> BTreeMap<String, Seen> {
    let mut found = BTreeMap::new();
    let mut first_names: HashMap<u64, String> = HashMap::new();
    let mut waiting = vec![root.to_owned()];
    let mut paths = Vec::new();
    while let Some(directory) = waiting.pop() {
        for entry in fs_err::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.symlink_metadata().unwrap().is_dir() {
                waiting.push(path.clone());
            }
            paths.push(path);
        }
    }
    paths.sort();
    for path in paths {
        let meta = path.symlink_metadata().unwrap();
        let name = path
            .strip_prefix(root)
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned();
        let kind = meta.file_type();
        let content = if kind.is_symlink() {
            let target = fs_err::read_link(&path).unwrap();
            format!("-> {}", target.display())
        } else if kind.is_file() {
            String::from_utf8(fs_err::read(&path).unwrap()).unwrap()
        } else if kind.is_fifo() {
            "fifo".to_owned()
        } else {
            "dir".to_owned()
        };
        // Names of one file are told by the first of them.
        let same_as = (!kind.is_dir()).then(|| {
            let first = first_names.entry(meta.ino());
            first.or_insert_with(|| name.clone()).clone()
        });
        let note = xattr::get(&path, "user.note").ok().flatten();
        found.insert(
            name,
            Seen {
                content,
                mode: if kind.is_symlink() {
                    0
                } else {
                    meta.mode() & 0o7777
                },
                owner: (meta.uid(), meta.gid()),
                mtime: meta.mtime(),
                same_as,
                note: note.map(|note| String::from_utf8(note).unwrap()),
            },
        );
    }
    found
}

fn path() -> impl Strategy<Value = String> {
    let name = prop::sample::select(vec!["a", "b", "c"]);
    prop::collection::vec(name, 1..4).prop_map(|names| names.join("/"))
}

fn link_target() -> impl Strategy<Value = String> {
    (path(), 0..6_u8).prop_map(|(path, how)| match how {
        0 => format!("/{path}"),
        1 => format!("../{path}"),
        2 => format!("../../../../{path}"),
        3 => "/".to_owned(),
        _ => path,
    })
}

fn entry() -> impl Strategy<Value = Entry> {
    let split = |path: &str| match path.rsplit_once('/') {
        Some((parent, name)) => (format!("{parent}/"), name.to_owned()),
        None => (String::new(), path.to_owned()),
    };
    let kind = prop_oneof![
        4 => (path(), "[x-z]{0,3}").prop_map(|(path, data)| Entry::file(path, data)),
        4 => path().prop_map(Entry::dir),
        2 => (path(), link_target()).prop_map(|(path, to)| Entry::symlink(path, to)),
        2 => (path(), path()).prop_map(|(path, to)| Entry::hard_link(path, to)),
        1 => path().prop_map(|path| Entry::new(b'6', path)),
        2 => path().prop_map(move |path| {
            let (parent, name) = split(&path);
            Entry::file(format!("{parent}.wh.{name}"), "")
        }),
        1 => path().prop_map(move |path| {
            let (parent, _) = split(&path);
            Entry::file(format!("{parent}.wh..wh..opq"), "")
        }),
    ];
    let owner = (0..3_u64, 1000..1003_u64);
    (kind, 0..0o10000_u32, owner, 0..1_000_000_u64, any::<bool>()).prop_map(
        |(entry, mode, (uid, gid), mtime, noted)| {
            let has_notes = matches!(entry.kind, b'0' | b'5');
            let entry = entry.mode(mode).owner(uid, gid).mtime(mtime);
            if noted && has_notes {
                entry.xattr("user.note", format!("{mtime}"))
            } else {
                entry
            }
        },
    )
}

fn layers() -> impl Strategy<Value = Vec<Vec<Entry>>> {
    prop::collection::vec(prop::collection::vec(entry(), 0..9), 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    /// Whatever real entries come in whatever order, through whatever links: the tree is the one
    /// that the model has, or both refuse the same layer, and nothing beside it changes.
    #[test]
    fn the_tree_is_what_the_model_says(layers in layers(), packed in 0..3_u8) {
        let ground = Ground::new();
        let mut unpacker =
            Unpacker::new(&ground.target(), Limits::default(), Stop::default()).unwrap();
        let mut model = Model::new();
        for layer in &layers {
            let archive = tar(layer);
            let blob = match packed {
                0 => archive.clone(),
                1 => gzip(&archive),
                _ => zstd(&archive),
            };
            let expected = model.apply(layer);
            match unpacker.layer(&*blob) {
                Ok(unpacked) => {
                    prop_assert!(expected.is_ok(), "the model refuses: {expected:?}");
                    prop_assert_eq!(unpacked.digest, Digest::of(&archive));
                    prop_assert_eq!(unpacked.entries, layer.len() as u64);
                }
                Err(error @ Error::Layer { .. }) => {
                    prop_assert!(expected.is_err(), "{error}: {:?}", error);
                    break;
                }
                Err(other) => prop_assert!(false, "{other}"),
            }
            let (mut now, model) = (seen(&ground.target()), model.seen());
            // Directories that no entry describes have the time when they were changed.
            for (name, seen) in &mut now {
                if model.get(name).is_some_and(|modelled| modelled.mtime < 0) {
                    seen.mtime = -1;
                }
            }
            prop_assert_eq!(now, model);
        }
        ground.check();
    }

    /// Whiteouts mean the same before, after and between the other entries of their layer.
    #[test]
    fn the_order_of_whiteouts_means_nothing(
        lower in prop::collection::vec(plain_entry(), 0..12),
        upper in prop::collection::vec(plain_entry(), 0..8),
        hidden in prop::collection::vec((path(), any::<bool>()), 1..4),
        places in prop::collection::vec(any::<prop::sample::Index>(), 4),
    ) {
        let whiteouts: Vec<Entry> = hidden
            .iter()
            .map(|(path, opaque)| {
                let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
                let name = if *opaque { ".wh..opq" } else { name };
                Entry::file(format!("{parent}/.wh.{name}"), "")
            })
            .collect();
        let upper = with_parents(&upper);
        let first: Vec<Entry> = whiteouts.iter().chain(&upper).cloned().collect();
        let last: Vec<Entry> = upper.iter().chain(&whiteouts).cloned().collect();
        let mut between = upper.clone();
        for (whiteout, place) in whiteouts.iter().zip(&places) {
            between.insert(place.index(between.len() + 1), whiteout.clone());
        }
        let lower = with_parents(&lower);
        let trees: Vec<_> = [first, last, between]
            .iter()
            .map(|layer| unpack(&[&lower, layer]))
            .collect();
        prop_assert_eq!(&trees[0], &trees[1]);
        prop_assert_eq!(&trees[0], &trees[2]);
    }

    /// What is no archive at all is refused or empty, but never a panic.
    #[test]
    fn noise_is_no_layer(noise in prop::collection::vec(any::<u8>(), 0..3000)) {
        let ground = Ground::new();
        let mut unpacker =
            Unpacker::new(&ground.target(), Limits::default(), Stop::default()).unwrap();
        if let Ok(unpacked) = unpacker.layer(&*noise) {
            prop_assert_eq!(unpacked.entries, 0);
        }
        ground.check();
    }
}

fn plain_entry() -> impl Strategy<Value = Entry> {
    prop_oneof![
        (path(), "[x-z]{1,3}").prop_map(|(path, data)| Entry::file(format!("{path}.f"), data)),
        path().prop_map(Entry::dir),
    ]
}

/// The entries with all directories above them named before them.
fn with_parents(entries: &[Entry]) -> Vec<Entry> {
    let mut all: Vec<Entry> = Vec::new();
    for entry in entries {
        let name = String::from_utf8(entry.name.clone()).unwrap();
        for (end, _) in name.match_indices('/') {
            all.push(Entry::dir(&name[..end]));
        }
        all.push(entry.clone());
    }
    all
}

fn unpack(layers: &[&[Entry]]) -> BTreeMap<String, Seen> {
    let ground = Ground::new();
    let mut unpacker = Unpacker::new(&ground.target(), Limits::default(), Stop::default()).unwrap();
    for layer in layers {
        unpacker.layer(&*tar(layer)).unwrap();
    }
    let mut seen = seen(&ground.target());
    for seen in seen.values_mut() {
        // It was changed just now, and no entry says when it was to have been.
        if seen.mtime > 1_700_000_000 {
            seen.mtime = -1;
        }
    }
    seen
}

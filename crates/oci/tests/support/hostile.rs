//! Archives from somebody who means harm, and accidents.

use std::{os::unix::ffi::OsStrExt as _, path::Path};

use rand::{RngExt as _, rngs::StdRng};

use super::Entry;
use crate::support;

const NAMES: [&str; 12] = [
    "a",
    "b",
    "c",
    "a",
    "d",
    "..",
    ".",
    "",
    ".wh.a",
    ".wh.b",
    ".wh..wh..opq",
    ".wh..wh.plnk",
];
/// Some of them are also in the canary.
const TAME_NAMES: [&str; 8] = [
    "a",
    "b",
    "dir",
    "file",
    "a",
    "secret",
    ".wh.file",
    ".wh..wh..opq",
];
const TAME_KINDS: &[u8] = b"000000555555552222134655";
const KINDS: &[u8] = b"000055551122223467SxgLKV\0Z";
const INTERESTING: [u64; 16] = [
    0,
    1,
    511,
    512,
    513,
    4095,
    4096,
    65_535,
    0x7fff_ffff,
    0xffff_fffe,
    0xffff_ffff,
    0x1_0000_0000,
    0x1_ffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0xffff_ffff_ffff_fe00,
    u64::MAX,
];
const KEYS: [&str; 18] = [
    "path",
    "linkpath",
    "size",
    "uid",
    "gid",
    "mtime",
    "SCHILY.xattr.user.a",
    "SCHILY.xattr.security.capability",
    "SCHILY.xattr.trusted.x",
    "SCHILY.xattr.system.posix_acl_access",
    "SCHILY.xattr.system.posix_acl_default",
    "GNU.sparse.major",
    "GNU.sparse.name",
    "GNU.sparse.realsize",
    "GNU.sparse.map",
    "GNU.sparse.offset",
    "GNU.sparse.numbytes",
    "GNU.sparse.size",
];

/// Makes layers, new ones and ones that are like those that it is given.
pub(crate) struct Mutator {
    canary: Vec<u8>,
}

impl Mutator {
    pub(crate) fn new(canary: &Path) -> Mutator {
        Mutator {
            canary: canary.as_os_str().as_bytes().to_vec(),
        }
    }

    pub(crate) fn layer(&self, random: &mut StdRng, pool: &[Vec<u8>]) -> Vec<u8> {
        let mut layer = if pool.is_empty() || random.random_bool(0.5) {
            self.archive(random)
        } else {
            pool[random.random_range(0..pool.len())].clone()
        };
        if random.random_bool(0.4) {
            for _ in 0..random.random_range(1..6) {
                self.mutate(random, &mut layer, pool);
            }
        }
        layer.truncate(1 << 16);
        match random.random_range(0..20) {
            0 | 1 => support::gzip(&layer),
            2 | 3 => support::zstd(&layer),
            4 => garbled(random, support::gzip(&layer)),
            5 => garbled(random, support::zstd(&layer)),
            6 => [support::gzip(&layer), support::gzip(&layer)].concat(),
            _ => layer,
        }
    }

    fn archive(&self, random: &mut StdRng) -> Vec<u8> {
        let count = random.random_range(0..14);
        // One that is refused at its first entry says little about what comes after.
        let hostility = [0.0, 0.05, 0.15, 1.0][random.random_range(0..4)];
        let entry = |random: &mut StdRng| {
            if random.random_bool(hostility) {
                self.entry(random)
            } else {
                self.tame(random)
            }
        };
        let entries: Vec<Entry> = (0..count).map(|_| entry(random)).collect();
        support::tar(&entries)
    }

    /// An entry as it may be in a real layer, among few names, so that entries meet.
    fn tame(&self, random: &mut StdRng) -> Entry {
        let path = |random: &mut StdRng| {
            let depth = [1, 1, 1, 2, 2, 3][random.random_range(0..6)];
            let mut parts: Vec<&str> = (1..depth)
                .map(|_| TAME_NAMES[random.random_range(0..4)])
                .collect();
            parts.push(TAME_NAMES[random.random_range(0..TAME_NAMES.len())]);
            parts.join("/").into_bytes()
        };
        let kind = TAME_KINDS[random.random_range(0..TAME_KINDS.len())];
        let mut entry = Entry::new(kind, path(random));
        entry.link = path(random);
        if kind == b'2' && random.random_bool(0.7) {
            entry.link = self.way_out(random);
        }
        entry.mode = random.random_range(0..0o10000);
        entry.device = (random.random_range(0..300), random.random_range(0..300));
        if kind == b'0' {
            entry.data = data(random);
            if random.random_bool(0.1) {
                entry = sparse(random, entry);
            }
        }
        if random.random_bool(0.1) {
            entry = entry.xattr("user.note", "x");
        }
        entry
    }

    /// What a link must be that leads to the canary, or towards it.
    fn way_out(&self, random: &mut StdRng) -> Vec<u8> {
        let canary = &*self.canary;
        match random.random_range(0..8) {
            0 | 1 => canary.to_vec(),
            2 => [canary, b"/dir"].concat(),
            3 => [canary, b"/secret"].concat(),
            4 => b"../canary".to_vec(),
            5 => [
                &b"../".repeat(random.random_range(1..5)),
                &b"canary/dir"[..],
            ]
            .concat(),
            6 => [&b"../".repeat(random.random_range(5..12)), canary].concat(),
            _ => b"..".to_vec(),
        }
    }

    fn entry(&self, random: &mut StdRng) -> Entry {
        let kind = KINDS[random.random_range(0..KINDS.len())];
        let name = self.path(random);
        let mut entry = Entry::new(kind, name);
        entry.link = if random.random_bool(0.3) {
            self.way_out(random)
        } else {
            self.path(random)
        };
        entry.mode = random.random_range(0..0o10000);
        if random.random_bool(0.1) {
            entry.uid = interesting(random);
            entry.gid = interesting(random);
            entry.mtime = interesting(random);
        }
        entry.device = (random.random_range(0..300), random.random_range(0..300));
        if matches!(kind, b'0' | b'7' | b'S' | 0) {
            entry.data = data(random);
        } else if matches!(kind, b'L' | b'K') {
            entry.data = self.path(random);
            entry.data.push(0);
        }
        if random.random_bool(0.05) {
            entry.size = Some(interesting(random));
        }
        if kind == b'S' || random.random_bool(0.2) {
            for _ in 0..random.random_range(1..5) {
                let key = KEYS[random.random_range(0..KEYS.len())];
                entry = entry.pax(key, self.value(random, key));
            }
        }
        if random.random_bool(0.05) {
            entry = sparse(random, entry);
        }
        entry
    }

    fn value(&self, random: &mut StdRng, key: &str) -> Vec<u8> {
        match key {
            "path" | "linkpath" | "GNU.sparse.name" => self.path(random),
            _ if key.starts_with("SCHILY") => {
                let length = [0, 1, 20, 100, 4000, 5000][random.random_range(0..6)];
                (0..length).map(|_| random.random()).collect()
            }
            "GNU.sparse.map" => (0..random.random_range(0..6))
                .map(|_| interesting(random).to_string())
                .collect::<Vec<_>>()
                .join(",")
                .into_bytes(),
            "GNU.sparse.major" => b"1".to_vec(),
            _ if random.random_bool(0.2) => b"-12.5".to_vec(),
            _ => interesting(random).to_string().into_bytes(),
        }
    }

    fn path(&self, random: &mut StdRng) -> Vec<u8> {
        match random.random_range(0..24) {
            0 => return self.canary.clone(),
            1 => return [&*self.canary, b"/secret"].concat(),
            2 => return [&*self.canary, b"/dir/file"].concat(),
            3 => return b"../canary/secret".to_vec(),
            4 => return b"a/../../canary".to_vec(),
            5 => return b"/proc/self/root".to_vec(),
            6 => return b"/".to_vec(),
            7 => {
                let length = [100, 255, 256, 4095, 4096, 5000][random.random_range(0..6)];
                let part = if random.random_bool(0.5) { "x" } else { "x/" };
                return part.repeat(length).into_bytes();
            }
            _ => {}
        }
        let depth = random.random_range(1..5);
        let parts: Vec<&str> = (0..depth)
            .map(|_| {
                // Names that are good for something are wanted more often than those that are not.
                let most = if random.random_bool(0.8) {
                    5
                } else {
                    NAMES.len()
                };
                NAMES[random.random_range(0..most)]
            })
            .collect();
        let mut path = parts.join("/").into_bytes();
        match random.random_range(0..12) {
            0 => path.insert(0, b'/'),
            1 => path.push(b'/'),
            2 => path.extend_from_slice(b"/canary/secret"),
            3 => path.extend_from_slice(&self.canary),
            4 => path = [b"../".repeat(random.random_range(1..12)), path].concat(),
            _ => {}
        }
        path
    }

    fn mutate(&self, random: &mut StdRng, layer: &mut Vec<u8>, pool: &[Vec<u8>]) {
        let blocks = layer.len() / 512;
        if blocks == 0 {
            *layer = self.archive(random);
            return;
        }
        let at = random.random_range(0..blocks) * 512;
        match random.random_range(0..9) {
            // A field of what may be a header, made right again.
            0..=3 => {
                let fields = [
                    (0, 100),
                    (100, 8),
                    (108, 8),
                    (116, 8),
                    (124, 12),
                    (136, 12),
                    (156, 1),
                    (157, 100),
                    (257, 8),
                    (329, 8),
                    (345, 155),
                    (386, 12),
                    (398, 12),
                    (482, 1),
                    (483, 12),
                ];
                let (offset, length) = fields[random.random_range(0..fields.len())];
                let value = match random.random_range(0..4) {
                    0 => self.path(random),
                    1 => format!("{:o}\0", interesting(random)).into_bytes(),
                    2 => [&[0x80][..], &interesting(random).to_be_bytes()].concat(),
                    _ => vec![KINDS[random.random_range(0..KINDS.len())]],
                };
                let n = value.len().min(length);
                layer[at + offset..at + offset + n].copy_from_slice(&value[..n]);
                support::seal(&mut layer[at..at + 512]);
            }
            4 => {
                let index = random.random_range(0..layer.len());
                layer[index] ^= 1 << random.random_range(0..8);
            }
            5 => {
                let end = (at + 512 * random.random_range(1..4)).min(layer.len());
                layer.drain(at..end);
            }
            6 => {
                let block = layer[at..at + 512].to_vec();
                let to = random.random_range(0..=blocks) * 512;
                layer.splice(to..to, block);
            }
            7 => {
                let length = random.random_range(0..layer.len());
                layer.truncate(length);
            }
            _ => {
                let other = match pool.len() {
                    0 => self.archive(random),
                    n => pool[random.random_range(0..n)].clone(),
                };
                layer.splice(at..at, other);
            }
        }
    }
}

fn interesting(random: &mut StdRng) -> u64 {
    match random.random_range(0..3) {
        0 => INTERESTING[random.random_range(0..INTERESTING.len())],
        1 => random.random_range(0..2000),
        _ => 1 << random.random_range(0..64),
    }
}

fn data(random: &mut StdRng) -> Vec<u8> {
    let length = [0, 1, 100, 511, 512, 513, 4096, 9000][random.random_range(0..8)];
    let byte = [0, b'x'][random.random_range(0..2)];
    let mut data = vec![byte; length];
    if length > 5000 && random.random_bool(0.5) {
        data[4096..4100].fill(b'y');
    }
    data
}

/// A sparse file in GNU's newest form, right or nearly so.
fn sparse(random: &mut StdRng, mut entry: Entry) -> Entry {
    let runs = random.random_range(0..4_u64);
    let mut map = format!("{runs}\n");
    let mut data = Vec::new();
    for run in 0..runs {
        let length = random.random_range(0..600_usize);
        map.push_str(&format!("{}\n{length}\n", run * 8192));
        data.resize(data.len() + length, b'd');
    }
    let mut map = map.into_bytes();
    map.resize(map.len().next_multiple_of(512), 0);
    let length = runs * 8192 + random.random_range(0..10_000);
    entry.kind = b'0';
    entry.data = [map, data].concat();
    entry
        .pax("GNU.sparse.major", "1")
        .pax("GNU.sparse.minor", "0")
        .pax("GNU.sparse.realsize", length.to_string())
}

fn garbled(random: &mut StdRng, mut bytes: Vec<u8>) -> Vec<u8> {
    for _ in 0..random.random_range(1..5) {
        let index = random.random_range(0..bytes.len());
        bytes[index] = random.random();
    }
    if random.random_bool(0.3) {
        let length = random.random_range(0..bytes.len());
        bytes.truncate(length);
    }
    bytes
}

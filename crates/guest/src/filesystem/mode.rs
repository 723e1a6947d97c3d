//! File modes in letters.

use rustix::fs::{FileType, Mode};

/// A mode in the letters that Go's `fs.FileMode` uses, which is what clients show: `drwxr-xr-x`,
/// `-rw-r--r--`, `Lrwxrwxrwx`. Special bits come in front, not among the permissions: `dtrwxrwxrwx`.
pub(super) fn letters(mode: u32) -> String {
    let bits = Mode::from_raw_mode(mode);
    let mut letters = String::with_capacity(12);
    letters.push_str(match FileType::from_raw_mode(mode) {
        FileType::Directory => "d",
        FileType::Symlink => "L",
        FileType::BlockDevice => "D",
        FileType::Fifo => "p",
        FileType::Socket => "S",
        FileType::CharacterDevice => "D",
        _ => "",
    });
    for (bit, letter) in [(Mode::SUID, 'u'), (Mode::SGID, 'g')] {
        if bits.contains(bit) {
            letters.push(letter);
        }
    }
    if FileType::from_raw_mode(mode) == FileType::CharacterDevice {
        letters.push('c');
    }
    if bits.contains(Mode::SVTX) {
        letters.push('t');
    }
    if FileType::from_raw_mode(mode) == FileType::Unknown {
        letters.push('?');
    }
    if letters.is_empty() {
        letters.push('-');
    }
    for (index, letter) in "rwxrwxrwx".chars().enumerate() {
        letters.push(if mode & (0o400 >> index) == 0 {
            '-'
        } else {
            letter
        });
    }
    letters
}

#[cfg(test)]
mod tests {
    use super::letters;

    #[test]
    fn modes_look_like_those_of_go() {
        for (mode, want) in [
            (0o100_644, "-rw-r--r--"),
            (0o100_000, "----------"),
            (0o040_755, "drwxr-xr-x"),
            (0o120_777, "Lrwxrwxrwx"),
            (0o041_777, "dtrwxrwxrwx"),
            (0o104_755, "urwxr-xr-x"),
            (0o102_755, "grwxr-xr-x"),
            (0o010_600, "prw-------"),
            (0o140_777, "Srwxrwxrwx"),
            (0o020_666, "Dcrw-rw-rw-"),
            (0o060_660, "Drw-rw----"),
        ] {
            assert_eq!(letters(mode), want, "{mode:o}");
        }
    }
}

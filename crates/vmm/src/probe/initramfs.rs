//! The smallest initial file system: one program that says a word and waits.

/// The word.
pub(super) const MARKER: &[u8] = b"CUBICLE PROBE: THE KERNEL RUNS\n";

/// Address at which the program is loaded: the customary one.
const BASE: u64 = 0x40_0000;

/// Lengths of an ELF file header and of one program header.
const HEADERS: u64 = 64 + 56;

/// An archive in the kernel's `newc` format: a console device and the program `/init`.
pub(super) fn build() -> Vec<u8> {
    let mut archive = Vec::new();
    entry(&mut archive, "dev", 0o040_755, &[], (0, 0));
    // What process 1 finds as its standard output.
    entry(&mut archive, "dev/console", 0o020_600, &[], (5, 1));
    entry(&mut archive, "init", 0o100_755, &program(), (0, 0));
    entry(&mut archive, "TRAILER!!!", 0, &[], (0, 0));
    archive
}

/// Appends an entry: 13 numbers of 8 hexadecimal digits after the magic, then name and content,
/// each padded to a multiple of 4.
fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8], device: (u32, u32)) {
    let length = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let name_len = length(name.as_bytes()) + 1;
    archive.extend_from_slice(b"070701");
    // inode, mode, uid, gid, links, mtime, size, device of the file (2), of the node (2), name, sum
    let fields = [
        0,
        mode,
        0,
        0,
        1,
        0,
        length(content),
        0,
        0,
        device.0,
        device.1,
        name_len,
        0,
    ];
    for field in fields {
        archive.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend_from_slice(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

/// `mov r32, imm32`, which clears the upper half of the register.
const MOV_EAX: u8 = 0xb8;
const MOV_EDX: u8 = 0xba;
const MOV_ESI: u8 = 0xbe;
const MOV_EDI: u8 = 0xbf;
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// `jmp` to itself.
const FOREVER: [u8; 2] = [0xeb, 0xfe];

/// Numbers of the system calls.
const WRITE: u32 = 1;
const PAUSE: u32 = 34;

/// Bytes of the instructions in [`program`].
const CODE_LEN: u64 = 5 * 5 + 3 * 2;

/// A static x86-64 program of a few instructions, as an ELF file: `write` the word to standard
/// output, then `pause`. It does not turn the machine off, which would be faster than the console.
fn program() -> Vec<u8> {
    let address = u32::try_from(BASE + HEADERS + CODE_LEN).unwrap_or(0);
    let length = u32::try_from(MARKER.len()).unwrap_or(0);
    let write = [
        (MOV_EAX, WRITE),
        (MOV_EDI, 1),
        (MOV_ESI, address),
        (MOV_EDX, length),
    ];
    let mut code = Vec::new();
    for call in [&write[..], &[(MOV_EAX, PAUSE)]] {
        for (instruction, value) in call {
            code.push(*instruction);
            code.extend_from_slice(&value.to_le_bytes());
        }
        code.extend_from_slice(&SYSCALL);
    }
    code.extend_from_slice(&FOREVER);

    let len = HEADERS + CODE_LEN + u64::try_from(MARKER.len()).unwrap_or(0);
    // 64-bit, little-endian, version 1, System V; executable, x86-64, version 1.
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
    // Entry point; program headers follow this one; there are no sections.
    for value in [BASE + HEADERS, 64, 0] {
        file.extend_from_slice(&value.to_le_bytes());
    }
    // Flags; lengths of this header and of a program header, number of those; sections.
    file.extend_from_slice(&[0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    // To be loaded, readable and executable: the whole file, headers included.
    file.extend_from_slice(&[1, 0, 0, 0, 5, 0, 0, 0]);
    for value in [0, BASE, BASE, len, len, 0x1000] {
        file.extend_from_slice(&value.to_le_bytes());
    }
    file.extend_from_slice(&code);
    file.extend_from_slice(MARKER);
    file
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_program_says_its_word() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("init");
        let mut program = program();
        assert_eq!(
            program.len() as u64,
            HEADERS + CODE_LEN + MARKER.len() as u64
        );
        // As nothing would end it, the last call becomes `exit`, with what was the first's file.
        let pause = [MOV_EAX, PAUSE as u8, 0, 0, 0];
        let at = program.windows(5).position(|bytes| bytes == pause).unwrap();
        program[at + 1] = 60;
        std::fs::write(&path, &program).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let output = std::process::Command::new(&path).output().unwrap();
        assert_eq!(output.stdout, MARKER);
        assert_eq!(output.status.code(), Some(1));
    }

    #[test]
    fn the_archive_is_aligned_and_ends() {
        let archive = build();
        assert_eq!(archive.len() % 4, 0);
        assert!(archive.starts_with(b"070701"));
        assert!(archive.windows(11).any(|bytes| bytes == b"TRAILER!!!\0"));
    }
}

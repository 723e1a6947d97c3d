//! The x86 boot protocol's kernel file ("bzImage"): a setup part and a compressed ELF kernel.
//!
//! Offsets are those of the kernel's own documentation, `Documentation/arch/x86/boot.rst`.

use std::{borrow::Cow, path::Path};

use memchr::memmem;

use crate::{
    compression::Format,
    error::{Error, Result},
};

const SETUP_SECTS: usize = 0x1f1;
const BOOT_SIGNATURE: usize = 0x1fe;
const HEADER_MAGIC: usize = 0x202;
const PROTOCOL_VERSION: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
/// The first protocol version whose header has the payload's place: 2.08 (Linux 2.6.26).
const FIRST_WITH_PAYLOAD: u16 = 0x0208;
const SECTOR: usize = 512;
const ELF_MAGIC: &[u8] = b"\x7fELF";

/// The ELF kernel in a kernel file: the payload of a bzImage, or the file itself if it is ELF
/// already. `path` is for errors.
pub(crate) fn vmlinux<'a>(file: &'a [u8], path: &Path) -> Result<Cow<'a, [u8]>> {
    if file.starts_with(ELF_MAGIC) {
        return Ok(Cow::Borrowed(file));
    }
    let wrong = |reason: String| Error::Kernel {
        path: path.to_owned(),
        reason,
    };
    let payload = payload(file).map_err(|reason| wrong(reason.into()))?;
    let Some(format) = Format::detect(payload) else {
        let start = hex::encode(&payload[..payload.len().min(8)]);
        return Err(wrong(format!(
            "its payload is compressed in an unknown way (it begins with {start}); xz, zstd, gzip \
             and lz4 are known"
        )));
    };
    let vmlinux = format.decompress(payload, &format!("the kernel `{}`", path.display()))?;
    if !vmlinux.starts_with(ELF_MAGIC) {
        return Err(wrong("its payload is not an ELF file".into()));
    }
    Ok(Cow::Owned(vmlinux))
}

/// The release of an ELF kernel, such as `6.1.0-50-cloud-amd64`: what `uname -r` says in it.
pub(crate) fn release(vmlinux: &[u8]) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    memmem::find_iter(vmlinux, BANNER).find_map(|at| {
        let rest = &vmlinux[at + BANNER.len()..];
        let end = rest.iter().take(65).position(|&byte| byte == b' ')?;
        let text = std::str::from_utf8(&rest[..end]).ok()?;
        // The kernel also holds the format string of its banner.
        text.starts_with(|c: char| c.is_ascii_digit())
            .then(|| text.to_owned())
    })
}

fn payload(file: &[u8]) -> Result<&[u8], &'static str> {
    let u16_at = |at: usize| {
        file.get(at..at + 2)
            .map(|b| u16::from_le_bytes([b[0], b[1]]))
    };
    let u32_at = |at: usize| {
        let four = file.get(at..)?.first_chunk::<4>()?;
        Some(u32::from_le_bytes(*four) as usize)
    };
    if u16_at(BOOT_SIGNATURE) != Some(0xaa55)
        || file.get(HEADER_MAGIC..HEADER_MAGIC + 4) != Some(&b"HdrS"[..])
    {
        return Err("it is neither an ELF kernel nor an x86 boot image");
    }
    if u16_at(PROTOCOL_VERSION).is_none_or(|version| version < FIRST_WITH_PAYLOAD) {
        return Err("its boot protocol is older than 2.08");
    }
    // Zero means four, for the sake of very old boot loaders.
    let sectors = match file[SETUP_SECTS] {
        0 => 4,
        n => usize::from(n),
    };
    let protected_mode = (sectors + 1) * SECTOR;
    let bounds = || {
        let start = protected_mode.checked_add(u32_at(PAYLOAD_OFFSET)?)?;
        Some(start..start.checked_add(u32_at(PAYLOAD_LENGTH)?)?)
    };
    bounds()
        .and_then(|range| file.get(range))
        .ok_or("it is cut short: its payload is not in it")
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

    use super::*;

    /// A minimal boot image with the given payload.
    fn image(payload: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 3 * SECTOR];
        file[SETUP_SECTS] = 2;
        file[BOOT_SIGNATURE..][..2].copy_from_slice(&[0x55, 0xaa]);
        file[HEADER_MAGIC..][..4].copy_from_slice(b"HdrS");
        file[PROTOCOL_VERSION..][..2].copy_from_slice(&0x020f_u16.to_le_bytes());
        file[PAYLOAD_OFFSET..][..4].copy_from_slice(&16_u32.to_le_bytes());
        file[PAYLOAD_LENGTH..][..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        file.extend_from_slice(&[0x90; 16]);
        file.extend_from_slice(payload);
        file.extend_from_slice(b"what follows");
        file
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Default::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    const KERNEL: &[u8] =
        b"\x7fELF...Linux version %s (%s)\n\0Linux version 6.1.0-50-cloud-amd64 (builder@host) #1";

    #[test]
    fn the_payload_is_found_and_unpacked() {
        let file = image(&gzip(KERNEL));
        let vmlinux = vmlinux(&file, Path::new("k")).unwrap();
        assert_eq!(&*vmlinux, KERNEL);
        assert_eq!(release(&vmlinux).as_deref(), Some("6.1.0-50-cloud-amd64"));
    }

    #[test]
    fn an_elf_kernel_is_taken_as_it_is() {
        assert_eq!(&*vmlinux(KERNEL, Path::new("k")).unwrap(), KERNEL);
    }

    #[test]
    fn wrong_files_are_refused_by_reason() {
        let reason = |file: &[u8]| vmlinux(file, Path::new("k")).unwrap_err().to_string();
        assert!(reason(b"hello").contains("neither an ELF kernel"));
        assert!(reason(&image(b"BZh91AY&SY")).contains("begins with 425a683931415926"));
        assert!(reason(&image(&gzip(b"text"))).contains("payload is not an ELF file"));
        let file = image(&gzip(KERNEL));
        assert!(reason(&file[..file.len() - 40]).contains("cut short"));
    }

    proptest! {
        #[test]
        fn damaged_headers_never_panic(at in 0_usize..700, value: u8, cut in 0_usize..1700) {
            let mut file = image(&gzip(KERNEL));
            file[at] = value;
            file.truncate(cut);
            vmlinux(&file, Path::new("k")).ok();
        }
    }
}

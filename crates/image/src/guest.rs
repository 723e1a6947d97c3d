use std::{
    borrow::Cow,
    env,
    path::{Path, PathBuf},
};

use object::{
    Endianness,
    elf::{EM_X86_64, FileHeader64, PT_INTERP},
    read::elf::{FileHeader as _, ProgramHeader as _},
};

use crate::{
    error::{During as _, Error, Result},
    fingerprint::Fingerprint,
};

/// The guest daemon's executable, proven to be able to run as the first process of a VM: an
/// x86-64 ELF file that needs no dynamic linker.
#[derive(Debug, Clone)]
pub struct GuestBinary {
    bytes: Cow<'static, [u8]>,
    fingerprint: Fingerprint,
}

impl GuestBinary {
    /// Name of the file that [`GuestBinary::locate`] looks for.
    pub const FILE_NAME: &'static str = "cubicle-guest";
    /// Environment variable that names the file instead.
    pub const ENV: &'static str = "CUBICLE_GUEST";

    /// Takes an executable that the caller has, for example one embedded by `include_bytes!`.
    pub fn from_bytes(bytes: impl Into<Cow<'static, [u8]>>) -> Result<GuestBinary> {
        GuestBinary::parse(bytes.into(), Path::new("(embedded)"))
    }

    /// Reads an executable from a file.
    pub fn load(path: &Path) -> Result<GuestBinary> {
        let bytes = fs_err::read(path).during("read the guest daemon")?;
        GuestBinary::parse(bytes.into(), path)
    }

    /// Finds the executable: where `CUBICLE_GUEST` says, else beside the running executable.
    pub fn locate() -> Result<GuestBinary> {
        if let Some(path) = env::var_os(GuestBinary::ENV) {
            return GuestBinary::load(Path::new(&path));
        }
        let this = env::current_exe().during("find the running executable")?;
        let beside = this.with_file_name(GuestBinary::FILE_NAME);
        if beside.exists() {
            return GuestBinary::load(&beside);
        }
        Err(Error::GuestBinaryMissing {
            searched: vec![beside],
        })
    }

    /// The executable.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// SHA-256 of the executable.
    pub fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    fn parse(bytes: Cow<'static, [u8]>, path: &Path) -> Result<GuestBinary> {
        let wrong = |reason: &str| Error::GuestBinary {
            path: PathBuf::from(path),
            reason: reason.into(),
        };
        let header = FileHeader64::<Endianness>::parse(&*bytes)
            .map_err(|_| wrong("it is not a 64-bit ELF file"))?;
        let endian = header
            .endian()
            .map_err(|_| wrong("it has an unknown byte order"))?;
        if header.e_machine(endian) != EM_X86_64 {
            return Err(wrong("it is not for x86-64"));
        }
        let segments = header
            .program_headers(endian, &*bytes)
            .map_err(|_| wrong("its program headers are damaged"))?;
        if segments
            .iter()
            .any(|segment| segment.p_type(endian) == PT_INTERP)
        {
            return Err(wrong(
                "it is linked dynamically; link it with RUSTFLAGS=\"-C target-feature=+crt-static\"",
            ));
        }
        let fingerprint = Fingerprint::of_bytes(&bytes);
        Ok(GuestBinary { bytes, fingerprint })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamically_linked_program_is_refused_with_the_remedy() {
        let this_test = env::current_exe().unwrap();
        let error = GuestBinary::load(&this_test).unwrap_err().to_string();
        assert!(
            error.contains("linked dynamically") && error.contains("crt-static"),
            "{error}"
        );
    }

    #[test]
    fn a_script_is_refused() {
        let error = GuestBinary::from_bytes(&b"#!/bin/sh\n"[..])
            .unwrap_err()
            .to_string();
        assert!(error.contains("not a 64-bit ELF file"), "{error}");
    }
}

//! The first root file system of a VM: the guest daemon and the drivers that its kernel lacks.

use std::{
    io::{self, BufWriter},
    path::Path,
};

use crate::{cpio::Archive, guest::GuestBinary};

/// Changes whenever the layout below does, so that cached files of an older layout are not used.
pub(crate) const LAYOUT: u32 = 2;

/// Writes `/init`, `/modules/<name>.ko`, and `/modules/order`: the file names in the order in
/// which they are to be loaded, one a line. `modules` are those files, in that order.
///
/// Not compressed: unpacking would cost every cold boot more than reading does.
pub(crate) fn write(
    to: &Path,
    guest: &GuestBinary,
    modules: &[(String, Vec<u8>)],
) -> io::Result<()> {
    let file = fs_err::File::create(to)?;
    let mut archive = Archive::new(BufWriter::new(file));
    for directory in ["dev", "modules", "proc", "run", "sys", "sysroot"] {
        archive.directory(directory, 0o755)?;
    }
    archive.device("dev/console", 0o600, (5, 1))?;
    archive.device("dev/null", 0o666, (1, 3))?;
    archive.file("init", 0o755, guest.bytes())?;
    let mut order = String::new();
    for (file_name, bytes) in modules {
        archive.file(&format!("modules/{file_name}"), 0o644, bytes)?;
        order.push_str(file_name);
        order.push('\n');
    }
    archive.file("modules/order", 0o644, order.as_bytes())?;
    let file = archive
        .finish()?
        .into_inner()
        .map_err(io::IntoInnerError::into_error)?;
    file.sync_all()
}

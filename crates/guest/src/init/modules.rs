use std::{fs, io, path::Path};

use rustix::{io::Errno, system::finit_module};

use super::{Error, console::say};

const DIRECTORY: &str = "/modules";

/// Loads the drivers that `/modules/order` names, one file name a line. One that fails is said: the
/// machine may do without, or fail later for a reason that is clear by then.
pub(super) fn load_all() {
    let directory = Path::new(DIRECTORY);
    // An initramfs without drivers belongs to a kernel that has them built in.
    let order = fs::read_to_string(directory.join("order")).unwrap_or_default();
    for name in order.lines().map(str::trim).filter(|name| !name.is_empty()) {
        if let Err(source) = load(&directory.join(name)) {
            say(&Error::Module {
                name: name.to_owned(),
                source,
            }
            .to_string());
        }
    }
}

fn load(path: &Path) -> io::Result<()> {
    let file = fs::File::open(path)?;
    match finit_module(&file, c"", 0) {
        // Built in, or loaded already.
        Err(Errno::EXIST) => Ok(()),
        result => Ok(result?),
    }
}

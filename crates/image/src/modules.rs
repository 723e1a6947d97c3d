//! Which modules of a kernel the guest must load, and in what order.

use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
};

use object::{Endianness, elf::FileHeader64, read::elf::FileHeader as _};

use crate::{
    compression::Format,
    error::{During as _, Error, Result},
};

/// Without these drivers a sandbox cannot start.
pub(crate) const REQUIRED: [&str; 5] = [
    "virtio_mmio",
    "virtio_console",
    "virtio_blk",
    "virtio_net",
    "ext4",
];
/// These are loaded where the kernel has them: more entropy, and the file systems that containers
/// and user-level mounts inside a sandbox expect.
pub(crate) const OPTIONAL: [&str; 3] = ["virtio_rng", "overlay", "fuse"];

/// A module as the guest's kernel takes it: an ELF object, not compressed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Module {
    /// Its name, words joined by `_`.
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
}

/// The modules that came with a kernel: a directory like `/lib/modules/<release>`.
#[derive(Debug)]
pub(crate) struct ModuleTree {
    release: String,
    files: HashMap<String, PathBuf>,
    built_in: HashSet<String>,
}

impl ModuleTree {
    /// Reads the names of all modules in `directory`, the kernel's `release`.
    pub(crate) fn open(directory: &Path, release: &str) -> Result<ModuleTree> {
        let list = directory.join("modules.builtin");
        let built_in = fs_err::read_to_string(list).during("list the kernel's own drivers")?;
        let built_in = built_in
            .lines()
            .filter_map(|line| name_of(Path::new(line)))
            .collect();
        let mut files = HashMap::new();
        collect(directory, &mut files).during("list the kernel's modules")?;
        Ok(ModuleTree {
            release: release.to_owned(),
            files,
            built_in,
        })
    }

    /// The modules that provide all of `required` and what there is of `optional`, each after
    /// those that it depends on.
    pub(crate) fn load_order(&self, required: &[&str], optional: &[&str]) -> Result<Vec<Module>> {
        let mut order = Vec::new();
        let mut seen = HashSet::new();
        for name in required {
            self.visit(name, &mut seen, &mut order)?;
        }
        for name in optional {
            if self.files.contains_key(*name) {
                self.visit(name, &mut seen, &mut order)?;
            }
        }
        Ok(order)
    }

    fn visit(&self, name: &str, seen: &mut HashSet<String>, order: &mut Vec<Module>) -> Result<()> {
        if self.built_in.contains(name) || !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let missing = || Error::DriverMissing {
            version: self.release.clone(),
            module: name.to_owned(),
        };
        let path = self.files.get(name).ok_or_else(missing)?;
        let bytes = fs_err::read(path).during("read a kernel module")?;
        let bytes = match Format::detect(&bytes) {
            Some(format) => format.decompress(&bytes, &format!("the module `{name}`"))?,
            None => bytes,
        };
        for dependency in dependencies(&bytes, path)? {
            self.visit(&dependency, seen, order)?;
        }
        order.push(Module {
            name: name.to_owned(),
            bytes,
        });
        Ok(())
    }
}

/// The module's name for a file such as `virtio-rng.ko.xz`: `virtio_rng`.
fn name_of(path: &Path) -> Option<String> {
    let (stem, suffix) = path.file_name()?.to_str()?.split_once(".ko")?;
    matches!(suffix, "" | ".xz" | ".zst" | ".gz").then(|| stem.replace('-', "_"))
}

fn collect(directory: &Path, files: &mut HashMap<String, PathBuf>) -> std::io::Result<()> {
    for entry in fs_err::read_dir(directory)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            collect(&entry.path(), files)?;
        } else if kind.is_file()
            && let Some(name) = name_of(&entry.path())
        {
            files.insert(name, entry.path());
        }
    }
    Ok(())
}

/// What a module says of itself that it needs: its `depends`, and those of its `softdep`s that
/// want to be there first.
///
/// The module is asked rather than `modules.dep`, because a package that was only unpacked has
/// none: it is made when a package is installed.
fn dependencies(module: &[u8], path: &Path) -> Result<Vec<String>> {
    let modinfo = modinfo(module).ok_or_else(|| Error::Kernel {
        path: path.to_owned(),
        reason: "it is not a kernel module (no readable .modinfo section)".into(),
    })?;
    let values = |key: &'static str| {
        let fields = modinfo
            .split(|&byte| byte == 0)
            .filter_map(|f| std::str::from_utf8(f).ok());
        fields.filter_map(move |field| field.split_once('=').filter(|f| f.0 == key).map(|f| f.1))
    };
    let depends = values("depends").flat_map(|names| names.split(','));
    let names = depends
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"));
    Ok(names.collect())
}

fn modinfo(module: &[u8]) -> Option<&[u8]> {
    let header = FileHeader64::<Endianness>::parse(module).ok()?;
    let endian = header.endian().ok()?;
    let sections = header.sections(endian, module).ok()?;
    let (_, section) = sections.section_by_name(endian, b".modinfo")?;
    object::read::elf::SectionHeader::data(section, endian, module).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn module_names_use_underscores_whatever_the_file_is_called() {
        let name = |path: &str| name_of(Path::new(path));
        assert_eq!(
            name("drivers/virtio-rng.ko.xz").as_deref(),
            Some("virtio_rng")
        );
        assert_eq!(name("ext4.ko").as_deref(), Some("ext4"));
        assert_eq!(name("a.ko.zst").as_deref(), Some("a"));
        assert_eq!(name("modules.order"), None);
        assert_eq!(name("x.kobold"), None);
    }

    #[test]
    fn a_built_in_driver_needs_no_module_and_a_missing_one_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let builtin = "kernel/fs/ext4/ext4.ko\nkernel/drivers/virtio/virtio-mmio.ko\n";
        fs_err::write(directory.path().join("modules.builtin"), builtin).unwrap();
        let tree = ModuleTree::open(directory.path(), "6.0.0").unwrap();
        assert_eq!(
            tree.load_order(&["ext4", "virtio_mmio"], &["overlay"])
                .unwrap(),
            []
        );
        let error = tree
            .load_order(&["virtio_blk"], &[])
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "the kernel 6.0.0 has no driver `virtio_blk`, neither built in nor as a module"
        );
    }

    #[test]
    fn a_file_that_is_no_module_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        fs_err::write(directory.path().join("modules.builtin"), "").unwrap();
        fs_err::write(directory.path().join("ext4.ko"), "text").unwrap();
        let tree = ModuleTree::open(directory.path(), "6.0.0").unwrap();
        let error = tree.load_order(&["ext4"], &[]).unwrap_err().to_string();
        assert!(error.contains("not a kernel module"), "{error}");
    }
}

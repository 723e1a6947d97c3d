use std::path::PathBuf;

use tracing::level_filters::LevelFilter;

/// What the kernel's command line says to us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Options {
    /// `cubicle.root`: the disk with the root file system.
    pub(super) root: PathBuf,
    /// `cubicle.rootfstype`.
    pub(super) root_type: String,
    /// `cubicle.log`: `error`, `warn`, `info`, `debug` or `trace`.
    pub(super) log: LevelFilter,
    /// `cubicle.network=off`: leave the network alone.
    pub(super) network: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            root: PathBuf::from("/dev/vda"),
            root_type: "ext4".to_owned(),
            log: LevelFilter::WARN,
            network: true,
        }
    }
}

impl Options {
    /// From `/proc/cmdline`.
    pub(super) fn read() -> Self {
        Self::parse(&std::fs::read_to_string("/proc/cmdline").unwrap_or_default())
    }

    /// What is unknown or makes no sense is passed over, what comes later wins.
    fn parse(line: &str) -> Self {
        let mut options = Self::default();
        for word in line.split_ascii_whitespace() {
            let Some((name, value)) = word.split_once('=') else {
                continue;
            };
            match name {
                "cubicle.root" => options.root = PathBuf::from(value),
                "cubicle.rootfstype" => options.root_type = value.to_owned(),
                "cubicle.log" => options.log = value.parse().unwrap_or(options.log),
                "cubicle.network" => options.network = value != "off",
                _ => {}
            }
        }
        options
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_words_are_found_among_the_kernels() {
        let line = "quiet root=/dev/sda cubicle.root=/dev/vdb panic=-1 cubicle.rootfstype=erofs \
                    cubicle.log=debug cubicle.network=off cubicle.other=1\n";
        let want = Options {
            root: PathBuf::from("/dev/vdb"),
            root_type: "erofs".to_owned(),
            log: LevelFilter::DEBUG,
            network: false,
        };
        assert_eq!(Options::parse(line), want);
        assert_eq!(
            Options::parse("quiet cubicle.log=loud cubicle.root"),
            Options::default()
        );
    }
}

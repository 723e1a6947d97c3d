//! Finds the kernels that an image has: by their kernelspecs, and by what is installed without one.
//! Nothing is run for it; a search takes some ten system calls in an image without kernels.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::Language;

/// What stands in a kernelspec's arguments for the path of the connection file.
const CONNECTION_FILE: &str = "{connection_file}";
const RESOURCE_DIR: &str = "{resource_dir}";

/// How a kernel's code is interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Interrupt {
    /// By SIGINT.
    #[default]
    Signal,
    /// By a message.
    Message,
}

/// A kernel that can be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernelspec {
    /// Its name, unique in an image.
    pub name: String,
    /// The language it runs.
    pub language: Language,
    argv: Vec<String>,
    /// Environment that it wants besides the usual.
    pub env: BTreeMap<String, String>,
    /// How it is interrupted.
    pub interrupt: Interrupt,
    /// It may send a value after it has said that all has been said.
    pub(crate) straggles: bool,
}

/// Where kernels and their programs are looked for.
#[derive(Debug, Clone)]
pub struct Search {
    /// Directories of programs, as in `PATH`. Beside each, `share/jupyter/kernels` and Python's
    /// packages are looked for.
    pub path: Vec<PathBuf>,
    /// Home directories, whose `.local/share/jupyter/kernels` go first.
    pub homes: Vec<PathBuf>,
    /// Where R's packages are.
    pub r_libraries: Vec<PathBuf>,
    /// The processor is emulated: a program is translated once more after its compiler is done
    /// with it.
    pub emulated: bool,
}

impl Kernelspec {
    /// The command line for that connection file.
    pub(crate) fn command(&self, connection_file: &Path) -> Vec<String> {
        let file = connection_file.to_string_lossy();
        self.argv
            .iter()
            .map(|argument| argument.replace(CONNECTION_FILE, &file))
            .collect()
    }

    /// A kernelspec as its file says, with what this daemon knows of some kernels beyond that.
    fn read(directory: &Path, emulated: bool) -> Option<Self> {
        #[derive(Deserialize)]
        struct File {
            argv: Vec<String>,
            #[serde(default)]
            language: String,
            #[serde(default)]
            env: BTreeMap<String, String>,
            #[serde(default)]
            interrupt_mode: Interrupt,
        }
        let name = directory.file_name()?.to_string_lossy().into_owned();
        let file = fs::read(directory.join("kernel.json")).ok()?;
        let file: File = serde_json::from_slice(&file)
            .inspect_err(|error| tracing::warn!(kernel = name, %error, "no kernelspec"))
            .ok()?;
        let resources = directory.to_string_lossy();
        let argv: Vec<String> = file
            .argv
            .iter()
            .map(|argument| argument.replace(RESOURCE_DIR, &resources))
            .collect();
        argv.first()?;
        let language = match file.language.is_empty() {
            true => &name,
            false => &file.language,
        };
        let spec = Self {
            language: Language::parse(language).of_kernel().clone(),
            name,
            argv,
            env: file.env,
            interrupt: file.interrupt_mode,
            straggles: false,
        };
        Some(spec.adjusted(emulated))
    }

    fn new(name: &str, language: Language, argv: &[&str]) -> Self {
        Self {
            name: name.to_owned(),
            language,
            argv: argv.iter().map(|&argument| argument.to_owned()).collect(),
            env: BTreeMap::new(),
            interrupt: Interrupt::Signal,
            straggles: false,
        }
        .adjusted(false)
    }

    fn adjusted(mut self, emulated: bool) -> Self {
        let program = Path::new(&self.argv[0]);
        if program.file_name().is_some_and(|name| name == "deno") {
            // Its own kernelspec doesn't say so, but a signal ends it.
            self.interrupt = Interrupt::Message;
            self.straggles = true;
            for (name, value) in [
                ("NO_COLOR", "1"),
                // `import 'fs'` as in Node, not only `import 'node:fs'`.
                ("DENO_UNSTABLE_BARE_NODE_BUILTINS", "1"),
                ("DENO_NO_UPDATE_CHECK", "1"),
            ] {
                self.env
                    .entry(name.to_owned())
                    .or_insert_with(|| value.to_owned());
            }
        }
        if self
            .argv
            .iter()
            .any(|argument| argument.starts_with("ipykernel"))
        {
            // A database of all input, and a thread that writes it, which nobody reads here.
            self.argv.push("--HistoryManager.enabled=False".to_owned());
        }
        if let Some(at) = self
            .argv
            .iter()
            .position(|argument| argument.ends_with("/jjava-launcher.jar"))
            && at > 0
            && self.argv[at - 1] == "-jar"
        {
            // All it does is to start another machine, with these options.
            let mut options = vec![
                "--add-opens".to_owned(),
                "jdk.jshell/jdk.jshell=ALL-UNNAMED".to_owned(),
            ];
            let classes = Path::new(&self.argv[at]).with_file_name("jjava.jsa");
            if classes.is_file() {
                // Loading them takes most of a start. One that does not fit is not used.
                options.push(format!("-XX:SharedArchiveFile={}", classes.display()));
            }
            if emulated {
                // The optimising compiler would be busy with the kernel itself for seconds.
                options.push("-XX:TieredStopAtLevel=1".to_owned());
            }
            options.push("-jar".to_owned());
            self.argv.splice(at - 1..=at, options);
        }
        self
    }
}

/// Whether this machine's processor is one of QEMU's software emulator, which says so in its name.
fn emulated() -> bool {
    fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("QEMU TCG CPU"))
}

impl Search {
    /// Where a system has them.
    #[must_use]
    pub fn system() -> Self {
        let paths = |paths: &[&str]| paths.iter().map(PathBuf::from).collect();
        Self {
            path: paths(&crate::PATH.split(':').collect::<Vec<_>>()),
            homes: paths(&["/root", "/home/user"]),
            r_libraries: paths(&[
                "/usr/local/lib/R/site-library",
                "/usr/lib/R/site-library",
                "/usr/lib/R/library",
            ]),
            emulated: emulated(),
        }
    }

    /// Every kernel there is, the preferred one of a language first.
    #[must_use]
    pub fn kernels(&self) -> Vec<Kernelspec> {
        let mut found: Vec<Kernelspec> = Vec::new();
        let mut add = |spec: Kernelspec| {
            if !found.iter().any(|known| known.name == spec.name) {
                found.push(spec);
            }
        };
        for directory in self.directories() {
            let mut entries: Vec<PathBuf> = fs::read_dir(directory)
                .into_iter()
                .flatten()
                .flatten()
                .map(|entry| entry.path())
                .collect();
            entries.sort();
            entries
                .iter()
                .filter_map(|path| Kernelspec::read(path, self.emulated))
                .for_each(&mut add);
        }
        for spec in self.without_kernelspec() {
            if !found.iter().any(|known| known.language == spec.language) {
                found.push(spec);
            }
        }
        found
    }

    /// The kernel of a language, or of that name.
    #[must_use]
    pub fn kernel(&self, language: &Language) -> Option<Kernelspec> {
        let language = language.of_kernel();
        let mut kernels = self.kernels();
        let found = kernels
            .iter()
            .position(|spec| spec.language == *language)
            .or_else(|| kernels.iter().position(|spec| spec.name == language.name()))?;
        Some(kernels.swap_remove(found))
    }

    fn directories(&self) -> Vec<PathBuf> {
        let homes = self.homes.iter().map(|home| home.join(".local"));
        let mut directories: Vec<PathBuf> = Vec::new();
        for prefix in homes.chain(self.prefixes()) {
            let directory = prefix.join("share/jupyter/kernels");
            if !directories.contains(&directory) {
                directories.push(directory);
            }
        }
        directories
    }

    fn prefixes(&self) -> impl Iterator<Item = PathBuf> {
        self.path
            .iter()
            .filter_map(|bin| bin.parent().map(Path::to_owned))
    }

    fn without_kernelspec(&self) -> Vec<Kernelspec> {
        let mut found = Vec::new();
        if self.program("python3").is_some() {
            let packages = self.python_packages();
            for (module, language, argv) in [
                (
                    "ipykernel_launcher.py",
                    Language::Python,
                    &["python3", "-m", "ipykernel_launcher", "-f", CONNECTION_FILE],
                ),
                (
                    "bash_kernel",
                    Language::Bash,
                    &["python3", "-m", "bash_kernel", "-f", CONNECTION_FILE],
                ),
            ] {
                if packages
                    .iter()
                    .any(|directory| directory.join(module).exists())
                {
                    let name = language.name().to_owned();
                    found.push(Kernelspec::new(&name, language, argv));
                }
            }
        }
        if self.program("deno").is_some() {
            let argv = ["deno", "jupyter", "--kernel", "--conn", CONNECTION_FILE];
            found.push(Kernelspec::new("deno", Language::JavaScript, &argv));
        }
        let r_kernel = |library: &PathBuf| library.join("IRkernel").exists();
        if self.program("R").is_some() && self.r_libraries.iter().any(r_kernel) {
            let argv = [
                "R",
                "--slave",
                "-e",
                "IRkernel::main()",
                "--args",
                CONNECTION_FILE,
            ];
            found.push(Kernelspec::new("ir", Language::R, &argv));
        }
        found
    }

    /// The directories that Python may have packages in.
    fn python_packages(&self) -> Vec<PathBuf> {
        let mut packages = Vec::new();
        for prefix in self.prefixes() {
            for entry in fs::read_dir(prefix.join("lib"))
                .into_iter()
                .flatten()
                .flatten()
            {
                if entry.file_name().to_string_lossy().starts_with("python3") {
                    packages.extend(
                        ["site-packages", "dist-packages"].map(|name| entry.path().join(name)),
                    );
                }
            }
        }
        packages
    }

    /// The program of that name, or at that path.
    pub(crate) fn program(&self, name: &str) -> Option<PathBuf> {
        if name.contains('/') {
            return Some(PathBuf::from(name)).filter(|path| path.is_file());
        }
        self.path
            .iter()
            .map(|bin| bin.join(name))
            .find(|path| path.is_file())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Image {
        root: tempfile::TempDir,
        search: Search,
    }

    impl Image {
        fn new(files: &[(&str, &str)]) -> Self {
            let root = tempfile::tempdir().unwrap();
            for (path, content) in files {
                let path = root.path().join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, content).unwrap();
            }
            let search = Search {
                path: vec![
                    root.path().join("usr/local/bin"),
                    root.path().join("usr/bin"),
                ],
                homes: vec![root.path().join("root")],
                r_libraries: vec![root.path().join("usr/lib/R/site-library")],
                emulated: false,
            };
            Self { root, search }
        }

        fn command(&self, language: &Language) -> Option<Vec<String>> {
            let root = self.root.path().to_string_lossy().into_owned();
            let command = self.search.kernel(language)?.command(Path::new("/c.json"));
            Some(
                command
                    .iter()
                    .map(|argument| argument.replace(&root, ""))
                    .collect(),
            )
        }
    }

    #[test]
    fn kernelspecs_are_found_and_preferred() {
        let image = Image::new(&[
            ("usr/bin/python3", ""),
            ("usr/lib/python3/dist-packages/ipykernel_launcher.py", ""),
            (
                "usr/local/share/jupyter/kernels/mine/kernel.json",
                r#"{"argv": ["/opt/py", "-m", "ipykernel", "-f", "{connection_file}", "{resource_dir}"],
                    "language": "python", "env": {"A": "1"}, "interrupt_mode": "message"}"#,
            ),
            ("usr/share/jupyter/kernels/broken/kernel.json", "{"),
            (
                "usr/share/jupyter/kernels/empty/kernel.json",
                r#"{"argv": []}"#,
            ),
            (
                "usr/share/jupyter/kernels/kotlin/kernel.json",
                r#"{"argv": ["k"], "display_name": "Kotlin"}"#,
            ),
        ]);
        let python = image.search.kernel(&Language::Python).unwrap();
        assert_eq!(python.interrupt, Interrupt::Message);
        assert_eq!(python.env["A"], "1");
        assert_eq!(
            image.command(&Language::Python).unwrap(),
            [
                "/opt/py",
                "-m",
                "ipykernel",
                "-f",
                "/c.json",
                "/usr/local/share/jupyter/kernels/mine",
                "--HistoryManager.enabled=False"
            ]
        );
        let other = |name: &str| Language::Other(name.to_owned());
        assert_eq!(image.command(&other("kotlin")).unwrap(), ["k"]);
        assert_eq!(image.command(&other("mine")).unwrap()[0], "/opt/py");
        assert_eq!(image.search.kernels().len(), 2);
    }

    #[test]
    fn kernels_without_kernelspec_are_found() {
        let image = Image::new(&[
            ("usr/bin/python3", ""),
            (
                "usr/local/lib/python3.13/dist-packages/ipykernel_launcher.py",
                "",
            ),
            (
                "usr/local/lib/python3.13/dist-packages/bash_kernel/__main__.py",
                "",
            ),
            ("usr/local/bin/deno", ""),
            ("usr/bin/R", ""),
            ("usr/lib/R/site-library/IRkernel/DESCRIPTION", ""),
        ]);
        let names: Vec<String> = image
            .search
            .kernels()
            .into_iter()
            .map(|spec| spec.name)
            .collect();
        assert_eq!(names, ["python", "bash", "deno", "ir"]);
        let deno = image.search.kernel(&Language::TypeScript).unwrap();
        assert_eq!(deno.interrupt, Interrupt::Message);
        assert_eq!(
            image.command(&Language::R).unwrap(),
            [
                "R",
                "--slave",
                "-e",
                "IRkernel::main()",
                "--args",
                "/c.json"
            ]
        );
        assert_eq!(image.command(&Language::Java), None);
    }

    #[test]
    fn java_is_started_without_its_launcher() {
        let spec = (
            "usr/share/jupyter/kernels/java/kernel.json",
            r#"{"argv": ["java", "-jar", "{resource_dir}/jjava-launcher.jar", "{resource_dir}/jjava.jar",
                "{connection_file}"], "language": "java", "interrupt_mode": "message"}"#,
        );
        let command = |options: &[&str]| -> Vec<String> {
            let opens = ["--add-opens", "jdk.jshell/jdk.jshell=ALL-UNNAMED"];
            let jar = ["-jar", "/usr/share/jupyter/kernels/java/jjava.jar"];
            let all = [&["java"], &opens[..], options, &jar[..], &["/c.json"]].concat();
            all.iter().map(|&argument| argument.to_owned()).collect()
        };
        let image = Image::new(&[spec]);
        assert_eq!(image.command(&Language::Java).unwrap(), command(&[]));

        let mut image = Image::new(&[spec, ("usr/share/jupyter/kernels/java/jjava.jsa", "")]);
        image.search.emulated = true;
        assert_eq!(
            image.command(&Language::Java).unwrap(),
            command(&[
                "-XX:SharedArchiveFile=/usr/share/jupyter/kernels/java/jjava.jsa",
                "-XX:TieredStopAtLevel=1"
            ])
        );
    }

    #[test]
    fn an_image_without_kernels_has_none() {
        let image = Image::new(&[
            ("usr/bin/python3", ""),
            ("usr/lib/python3/dist-packages/x.py", ""),
        ]);
        assert_eq!(image.search.kernels(), []);
    }
}

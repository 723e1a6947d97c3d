//! What a recipe does to a tree beyond its packages: software from the registries of Python and
//! JavaScript, files, and programs of the tree itself.
//!
//! Everything runs inside the tree, at native speed, in namespaces of its own and with hardly a
//! capability. From a registry only what is ready to be used is taken: no build script and no
//! install script of a downloaded package ever runs.

use std::{
    fs::Permissions,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    cache::remove,
    command::Program,
    error::{During as _, Result},
    progress::{Progress, Step},
    registries::Registries,
};

/// How a program is started inside a tree; part of the fingerprint of every recipe with a setup.
pub(crate) const ENTER: &str = include_str!("../recipes/enter.sh");
/// Changes whenever the same setup would do something else.
pub(crate) const VERSION: u32 = 1;

/// Where programs are found in the tree.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const PIP: [&str; 11] = [
    "python3",
    "-m",
    "pip",
    "install",
    "--no-input",
    "--disable-pip-version-check",
    "--no-cache-dir",
    "--progress-bar=off",
    "--only-binary=:all:",
    "--root-user-action=ignore",
    "--constraint=/run/constraints.txt",
];
const NPM: [&str; 6] = [
    "npm",
    "install",
    "--global",
    "--ignore-scripts",
    "--no-audit",
    "--no-fund",
];

/// One thing that is done to a tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Setup {
    /// Installs Python packages, `name==version`, for the tree's own Python. Wheels only.
    Pip(Vec<String>),
    /// Unpacks Python packages, without what they depend on, into a directory.
    PipInto {
        /// An absolute path.
        directory: String,
        /// `name==version`.
        packages: Vec<String>,
    },
    /// Installs JavaScript packages, `name@version`, as `npm install --global` does, but runs none
    /// of their scripts.
    Npm(Vec<String>),
    /// Runs a program of the tree as root, by its name and arguments.
    Run(Vec<String>),
    /// The same as the user `user`, in its home.
    RunAsUser(Vec<String>),
    /// Writes a file.
    File {
        /// An absolute path; its directories are made.
        path: String,
        /// What is in it.
        content: String,
        /// Whether it is a program.
        #[serde(default)]
        executable: bool,
    },
}

impl Setup {
    /// What is wrong with it, for who wrote it.
    pub(crate) fn check(&self) -> std::result::Result<(), String> {
        let absolute = |path: &str| {
            let fine = path.starts_with('/') && !path.split('/').any(|part| part == "..");
            fine.then_some(())
                .ok_or_else(|| format!("`{path}` is not an absolute path"))
        };
        let pinned = |packages: &[String], split: &str| {
            let wrong = packages.iter().find(|p| !is_pinned(p, split));
            wrong.map_or(Ok(()), |package| {
                Err(format!("`{package}` is not `name{split}version`"))
            })
        };
        match self {
            Setup::Pip(packages) => pinned(packages, "=="),
            Setup::PipInto {
                directory,
                packages,
            } => pinned(packages, "==").and_then(|()| absolute(directory)),
            Setup::Npm(packages) => pinned(packages, "@"),
            Setup::Run(words) | Setup::RunAsUser(words) => match words.first() {
                Some(program) if !program.is_empty() && !program.starts_with('-') => Ok(()),
                _ => Err("it runs a program without a name".into()),
            },
            Setup::File { path, .. } => absolute(path),
        }
    }

    /// What it does, for who watches.
    fn title(&self) -> String {
        let names = |packages: &[String], split: &str| {
            let name = |p: &String| {
                p.rsplit_once(split)
                    .map_or(p.clone(), |(n, _)| n.to_owned())
            };
            packages.iter().map(name).collect::<Vec<_>>().join(", ")
        };
        match self {
            Setup::Pip(packages) | Setup::PipInto { packages, .. } => {
                format!("installing {}", names(packages, "=="))
            }
            Setup::Npm(packages) => format!("installing {}", names(packages, "@")),
            Setup::Run(words) | Setup::RunAsUser(words) => format!("running {}", words.join(" ")),
            Setup::File { path, .. } => format!("writing {path}"),
        }
    }
}

/// `name`, a separator and a version, all of it of characters that cannot become an option, a
/// path, an address or a range of versions.
pub(crate) fn is_pinned(package: &str, split: &str) -> bool {
    let Some((name, version)) = package.rsplit_once(split) else {
        return false;
    };
    let plain = |text: &str, others: &[u8]| {
        !text.is_empty()
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || others.contains(&b))
    };
    let name = match name.strip_prefix('@').and_then(|n| n.split_once('/')) {
        // A scope is npm's alone.
        Some((scope, name)) if split == "@" && plain(scope, b"-_.") => name,
        _ => name,
    };
    let first = |text: &str| text.starts_with(|c: char| c.is_ascii_alphanumeric());
    first(name) && plain(name, b"-_.") && first(version) && plain(version, b"-_.+!")
}

/// A bootstrapped tree and what is needed to work in it.
pub(crate) struct Workshop<'a> {
    tree: &'a Path,
    work: PathBuf,
    registries: Registries,
    log: &'a Path,
}

impl<'a> Workshop<'a> {
    /// `work` is a directory for what must not get into the image, with room for downloads.
    pub(crate) fn open(
        tree: &'a Path,
        work: PathBuf,
        constraints: &[String],
        log: &'a Path,
    ) -> Result<Workshop<'a>> {
        let prepare = || {
            fs_err::create_dir(&work)?;
            for name in ["run", "run/home", "tmp"] {
                fs_err::create_dir(work.join(name))?;
            }
            fs_err::set_permissions(work.join("tmp"), Permissions::from_mode(0o1777))?;
            for name in ["resolv.conf", "hosts"] {
                // A host may do without them.
                let text = fs_err::read(Path::new("/etc").join(name)).unwrap_or_default();
                fs_err::write(work.join(name), text)?;
            }
            fs_err::write(work.join("enter.sh"), ENTER)?;
            fs_err::write(work.join("run/constraints.txt"), constraints.join("\n"))
        };
        prepare().during("prepare the setup of a root file system")?;
        Ok(Workshop {
            tree,
            work,
            registries: Registries::of_host(),
            log,
        })
    }

    /// Does one thing after the other.
    pub(crate) async fn run(&self, steps: &[Setup], progress: &Progress) -> Result<()> {
        for (index, step) in steps.iter().enumerate() {
            let title = step.title();
            let fraction = index as f32 / steps.len() as f32;
            progress.fraction(Step::SETUP, &title, fraction);
            self.step(step, |detail| {
                progress.fraction(Step::SETUP, detail, fraction);
            })
            .await?;
        }
        progress.done(Step::SETUP, "set up");
        Ok(())
    }

    async fn step(&self, step: &Setup, on_detail: impl FnMut(String)) -> Result<()> {
        match step {
            Setup::Pip(packages) => {
                let arguments = PIP.iter().copied().chain(words(packages));
                self.install("pip", arguments, on_detail).await
            }
            Setup::PipInto {
                directory,
                packages,
            } => {
                let target = ["--no-deps", "--no-compile", "--target", directory];
                let arguments = PIP.iter().copied().chain(target).chain(words(packages));
                self.install("pip", arguments, on_detail).await
            }
            Setup::Npm(packages) => {
                let arguments = NPM.iter().copied().chain(words(packages));
                self.install("npm", arguments, on_detail).await
            }
            Setup::Run(line) => {
                let program = self.enter("a program of its setup", "root", "/run/home");
                program.args(line).run(|_| ()).await
            }
            Setup::RunAsUser(line) => {
                let program = self.enter("a program of its setup", "user", "/home/user");
                program.args(line).run(|_| ()).await
            }
            Setup::File {
                path,
                content,
                executable,
            } => {
                let draft = self.work.join("run/file");
                fs_err::write(&draft, content).during("write a file of a recipe")?;
                let mode = if *executable { "0755" } else { "0644" };
                let program = self.enter("install", "root", "/run/home");
                let installed = program
                    .args(["install", "-D", "-m", mode, "--", "/run/file", path])
                    .run(|_| ())
                    .await;
                remove(&draft).during("remove a draft")?;
                installed
            }
        }
    }

    async fn install<'w>(
        &self,
        known_as: &'static str,
        arguments: impl Iterator<Item = &'w str>,
        mut on_detail: impl FnMut(String),
    ) -> Result<()> {
        let lent = self.registries.lend(&self.work.join("run"))?;
        let mut program = self.enter(known_as, "root", "/run/home");
        for (name, value) in lent.variables() {
            program = program.env(name, value);
        }
        program
            .args(arguments)
            .run(|line| on_detail_of(line, &mut on_detail))
            .await
    }

    /// A program inside the tree; its name and arguments are yet to be added.
    fn enter(&self, known_as: &'static str, user: &str, home: &str) -> Program {
        Program::new("sh", "dash", "set up the root file system")
            .known_as(known_as)
            .isolated()
            .clean()
            .arg(self.work.join("enter.sh"))
            .arg(self.tree)
            .arg(&self.work)
            .arg(user)
            .env("PATH", PATH)
            .env("HOME", home)
            .env("USER", user)
            .log(self.log)
    }
}

fn words(packages: &[String]) -> impl Iterator<Item = &str> {
    packages.iter().map(String::as_str)
}

/// What a package manager says it does now.
fn on_detail_of(line: &str, on_detail: &mut impl FnMut(String)) {
    let line = line.trim();
    if let Some(file) = line.strip_prefix("Downloading ") {
        // pip: `Downloading numpy-2.3.5-cp311-cp311-manylinux_2_27_x86_64.whl (16.9 MB)`.
        let name = file.rsplit('/').next().unwrap_or(file);
        let name = name.split('-').next().unwrap_or(name);
        on_detail(format!("downloading {name}"));
    } else if line.starts_with("Installing collected packages") {
        on_detail("unpacking what was downloaded".into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_must_be_pinned_and_nothing_else_passes_for_one() {
        for fine in ["numpy==2.3.5", "matplotlib-inline==0.1.7", "x==1!2.0+local"] {
            assert!(is_pinned(fine, "=="), "{fine}");
        }
        for wrong in [
            "numpy",
            "numpy>=2",
            "--index-url==x",
            "-r==1",
            "../x==1",
            "x @ https://a.example/x==1",
            "x==",
            "x==1.*",
            "x== 1",
            "@a/b==1",
        ] {
            assert!(!is_pinned(wrong, "=="), "{wrong}");
        }
        for fine in ["npm@11.0.0", "@types/node@24.1.0"] {
            assert!(is_pinned(fine, "@"), "{fine}");
        }
        for wrong in [
            "npm",
            "npm@",
            "npm@^1",
            "git+ssh://x@1",
            "@a/@1",
            "a/b@1",
            "./x@1",
        ] {
            assert!(!is_pinned(wrong, "@"), "{wrong}");
        }
    }

    #[test]
    fn a_step_of_a_recipe_is_one_table() {
        let steps = |text: &str| {
            #[derive(Deserialize)]
            struct File {
                setup: Vec<Setup>,
            }
            toml::from_str::<File>(text).map(|file| file.setup)
        };
        let parsed =
            steps("[[setup]]\npip = [\"a==1\"]\n[[setup]]\nrun = [\"b\", \"c\"]\n").unwrap();
        let expected = [
            Setup::Pip(vec!["a==1".into()]),
            Setup::Run(vec!["b".into(), "c".into()]),
        ];
        assert_eq!(parsed, expected);
        assert!(steps("[[setup]]\nshell = \"rm -rf /\"\n").is_err());
    }

    #[test]
    fn what_is_wrong_with_a_step_is_said() {
        let wrong = |step: Setup| step.check().unwrap_err();
        let file = Setup::File {
            path: "/etc/../../x".into(),
            content: String::new(),
            executable: false,
        };
        assert_eq!(wrong(file), "`/etc/../../x` is not an absolute path");
        assert!(wrong(Setup::Run(vec!["--help".into()])).contains("without a name"));
        assert!(wrong(Setup::Pip(vec!["a".into()])).contains("`name==version`"));
    }
}

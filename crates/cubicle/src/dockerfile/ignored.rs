//! Patterns of paths, as `.dockerignore` and `COPY` write them.

use std::path::{Component, Path, PathBuf};

use globset::{Glob, GlobBuilder, GlobMatcher};

/// What a `.dockerignore` leaves out. The last pattern that matches a path, or a directory that it
/// is in, says; one with `!` before it takes the path back in.
#[derive(Debug, Default)]
pub(super) struct Ignored(Vec<(bool, GlobMatcher)>);

impl Ignored {
    pub(super) fn parse(text: &str) -> Result<Self, globset::Error> {
        let text = text.trim_start_matches('\u{feff}');
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let patterns = lines.map(str::trim).filter(|line| !line.is_empty());
        patterns
            .map(|line| {
                let (leaves_out, pattern) = match line.strip_prefix('!') {
                    Some(pattern) => (false, pattern.trim()),
                    None => (true, line),
                };
                Ok((leaves_out, glob(&clean(pattern))?.compile_matcher()))
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Whether a path, relative to the context, is left out.
    pub(super) fn matches(&self, path: &Path) -> bool {
        let says = |(_, matcher): &&(bool, GlobMatcher)| {
            path.ancestors()
                .filter(|part| !part.as_os_str().is_empty())
                .any(|part| matcher.is_match(part))
        };
        self.0
            .iter()
            .rev()
            .find(says)
            .is_some_and(|(leaves_out, _)| *leaves_out)
    }

    /// Whether something within a directory that is left out may be taken back in.
    pub(super) fn has_exceptions(&self) -> bool {
        self.0.iter().any(|(leaves_out, _)| !leaves_out)
    }
}

/// A pattern whose `*` and `?` do not cross a slash, and whose `**` does.
pub(super) fn glob(pattern: &str) -> Result<Glob, globset::Error> {
    // Braces are ordinary characters in Dockerfiles.
    let pattern = pattern.replace('{', "\\{").replace('}', "\\}");
    GlobBuilder::new(&pattern)
        .literal_separator(true)
        .backslash_escape(true)
        .build()
}

pub(super) fn has_wildcard(pattern: &str) -> bool {
    pattern.contains(['*', '?', '['])
}

/// A path without `.`, `..` and the slash before it. What leaves the top is empty.
pub(super) fn clean(path: &str) -> String {
    relative(path).map_or_else(String::new, |path| path.to_string_lossy().into_owned())
}

/// A path relative to the top of the context, or `None` if it leads out of it.
pub(super) fn relative(path: &str) -> Option<PathBuf> {
    let mut clean = PathBuf::new();
    for component in Path::new(path).components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir if !clean.pop() => return None,
            _ => {}
        }
    }
    Some(clean)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_leave_out_what_docker_would() {
        let ignored = Ignored::parse(
            "# comment\n/node_modules\n*.log\n**/*.pyc\ndocs/\n!docs/keep.md\n\nsecret?\n{a}\n",
        )
        .expect("patterns");
        let out = [
            "node_modules",
            "node_modules/a/b.js",
            "x.log",
            "a.pyc",
            "deep/er/a.pyc",
            "docs/other.md",
            "secret1/x",
            "{a}",
        ];
        let stays = [
            "sub/x.log",
            "docs/keep.md",
            "a/node_modules",
            "secret",
            "a",
            "README",
        ];
        for path in out {
            assert!(ignored.matches(Path::new(path)), "{path} is left out");
        }
        for path in stays {
            assert!(!ignored.matches(Path::new(path)), "{path} stays");
        }
        assert!(ignored.has_exceptions());
        assert!(!Ignored::default().has_exceptions());
    }

    #[test]
    fn paths_cannot_leave_the_context() {
        assert_eq!(relative("./a//b/../c"), Some("a/c".into()));
        assert_eq!(relative("/a"), Some("a".into()), "the top is the context's");
        assert_eq!(relative("."), Some("".into()));
        for out in ["..", "../a", "a/../../b"] {
            assert_eq!(relative(out), None, "{out}");
        }
    }
}

//! Image names that mean something else here.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use oci_client::Reference;

use crate::error::{Error, Result};

/// What a name in the map stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A recipe that this installation builds itself.
    Recipe(String),
    /// An image in an OCI layout, a directory; by its tag if the layout has several.
    Layout {
        /// The directory that `index.json` is in.
        path: PathBuf,
        /// The image's name in it.
        tag: Option<String>,
    },
    /// An image in a file that `docker save` wrote; by its name if the file has several.
    Archive {
        /// The file.
        path: PathBuf,
        /// The image's name in it, such as `python:3`.
        name: Option<String>,
    },
    /// An image in another registry, or of another name.
    Registry(String),
}

/// Image names, and beginnings of names, with what they stand for on this machine; so that builds
/// work where the registries of the world cannot be reached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageMap {
    rules: Vec<Rule>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    pattern: String,
    is_prefix: bool,
    target: Target,
}

impl ImageMap {
    /// Reads a map from a file, in TOML or JSON. Paths in it are relative to the file.
    ///
    /// # Errors
    /// [`Error::Map`] with the file and what is wrong with it.
    pub fn read(path: &Path) -> Result<ImageMap> {
        let in_file = |reason: String| Error::Map {
            path: Some(path.to_owned()),
            reason,
        };
        let text = fs_err::read_to_string(path).map_err(|error| in_file(error.to_string()))?;
        let base = path.parent().unwrap_or(Path::new("."));
        ImageMap::parse(&text, base).map_err(|error| match error {
            Error::Map { reason, .. } => in_file(reason),
            other => other,
        })
    }

    /// Understands a table of names and targets:
    ///
    /// ```toml
    /// "python:3" = "oci:/srv/images/python"        # or oci:/srv/images/python:TAG
    /// "node:*" = "docker-archive:/srv/images/node.tar"
    /// "debian" = "recipe:base"
    /// "docker.io/library/*" = "registry.local:5000/hub/*"
    /// ```
    ///
    /// Relative paths begin in `base`.
    ///
    /// # Errors
    /// [`Error::Map`].
    pub fn parse(text: &str, base: &Path) -> Result<ImageMap> {
        let wrong = |reason: String| Error::Map { path: None, reason };
        let table: BTreeMap<String, String> = if text.trim_start().starts_with('{') {
            serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?
        } else {
            toml::from_str(text).map_err(|error| wrong(error.to_string()))?
        };
        let mut rules = Vec::with_capacity(table.len());
        for (pattern, target) in table {
            let (name, is_prefix) = match pattern.strip_suffix('*') {
                Some(prefix) => (prefix.to_owned(), true),
                None => (pattern.clone(), false),
            };
            if name.contains('*') || (name.is_empty() && !is_prefix) {
                return Err(wrong(format!("`{pattern}`: a `*` may only be at the end")));
            }
            let target = parse_target(&target, base)
                .map_err(|reason| wrong(format!("`{pattern}` = `{target}`: {reason}")))?;
            rules.push(Rule {
                pattern: name,
                is_prefix,
                target,
            });
        }
        Ok(ImageMap { rules })
    }

    /// What a name stands for, if it is in the map: as it is written, or in any other way of
    /// writing the same name.
    pub fn find(&self, name: &str) -> Option<Target> {
        let spellings = spellings(name);
        let matches = self.rules.iter().filter_map(|rule| {
            let rests = spellings.iter().filter_map(|spelling| {
                let rest = spelling.strip_prefix(&rule.pattern)?;
                (rule.is_prefix || rest.is_empty()).then_some(rest)
            });
            Some((rule, rests.min_by_key(|rest| rest.len())?))
        });
        // The one that says most of the name decides. That is seen by what it leaves open, for the
        // same name is longer in some spellings than in others.
        let (rule, rest) = matches
            .min_by_key(|(rule, rest)| (rule.is_prefix, rest.len(), Reverse(rule.pattern.len())))?;
        Some(match &rule.target {
            Target::Registry(to) if rule.is_prefix => Target::Registry(to.replace('*', rest)),
            other => other.clone(),
        })
    }
}

fn parse_target(text: &str, base: &Path) -> Result<Target, String> {
    let file = |rest: &str| {
        let (path, name) = match rest.split_once(':') {
            Some((path, name)) => (path, Some(name.to_owned())),
            None => (rest, None),
        };
        if path.is_empty() || name.as_deref() == Some("") {
            return Err("the path or the name after it is missing".to_owned());
        }
        Ok((base.join(path), name))
    };
    if let Some(recipe) = text.strip_prefix("recipe:") {
        if recipe.is_empty() {
            return Err("the name of the recipe is missing".to_owned());
        }
        return Ok(Target::Recipe(recipe.to_owned()));
    }
    if let Some(rest) = text.strip_prefix("oci:") {
        let (path, tag) = file(rest)?;
        return Ok(Target::Layout { path, tag });
    }
    if let Some(rest) = text.strip_prefix("docker-archive:") {
        let (path, name) = file(rest)?;
        return Ok(Target::Archive { path, name });
    }
    // What a `*` in it stands for is not known yet; a name it must be in any case.
    let example = text.replace('*', "x");
    if text.matches('*').count() > 1 {
        return Err("it has more than one `*`".to_owned());
    }
    match Reference::try_from(example) {
        Ok(_) => Ok(Target::Registry(text.to_owned())),
        Err(error) => Err(format!(
            "it is none of `recipe:NAME`, `oci:DIRECTORY`, `docker-archive:FILE` and the name of \
             an image ({error})"
        )),
    }
}

/// All ways of writing an image's name, without its digest as well.
fn spellings(name: &str) -> Vec<String> {
    let mut found = vec![name.to_owned()];
    let mut add = |spelling: String| {
        if !found.contains(&spelling) {
            found.push(spelling);
        }
    };
    let Ok(reference) = Reference::try_from(name) else {
        return found;
    };
    let (registry, repository) = (reference.registry(), reference.repository());
    let mut names = vec![format!("{registry}/{repository}")];
    if registry == "docker.io" {
        names.push(repository.to_owned());
        if let Some(familiar) = repository.strip_prefix("library/") {
            names.push(familiar.to_owned());
        }
    }
    for name in names {
        if let Some(digest) = reference.digest() {
            if let Some(tag) = reference.tag() {
                add(format!("{name}:{tag}@{digest}"));
            }
            add(format!("{name}@{digest}"));
        }
        match reference.tag() {
            Some("latest") => {
                add(format!("{name}:latest"));
                add(name);
            }
            Some(tag) => add(format!("{name}:{tag}")),
            // What it is to be is said by the digest.
            None => add(name),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(text: &str) -> ImageMap {
        ImageMap::parse(text, Path::new("/base")).unwrap()
    }

    fn registry(name: &str) -> Option<Target> {
        Some(Target::Registry(name.to_owned()))
    }

    #[test]
    fn every_spelling_of_a_name_is_found() {
        let digest = format!("sha256:{}", "a".repeat(64));
        let map = map(r#"
            "python:3" = "r.local/python"
            "docker.io/library/node:latest" = "r.local/node"
            "debian" = "recipe:base"
            "#);
        for name in [
            "python:3".to_owned(),
            "docker.io/python:3".to_owned(),
            "library/python:3".to_owned(),
            "docker.io/library/python:3".to_owned(),
            format!("python:3@{digest}"),
        ] {
            assert_eq!(map.find(&name), registry("r.local/python"), "{name}");
        }
        assert_eq!(map.find("node"), registry("r.local/node"));
        assert_eq!(
            map.find("debian:latest"),
            Some(Target::Recipe("base".into()))
        );
        for name in [
            "python",
            "python:3.12",
            "debian:12",
            "x/python:3",
            "ghcr.io/python:3",
            "!",
        ] {
            assert_eq!(map.find(name), None, "{name}");
        }
    }

    #[test]
    fn the_longest_match_decides() {
        let map = map(r#"
            "*" = "recipe:any"
            "python*" = "oci:layouts/python"
            "python:3.1*" = "docker-archive:/a/b.tar:python:3.12"
            "python:3.12" = "r.local/p"
            "docker.io/library/*" = "r.local/hub/*"
            "#);
        let layout = Target::Layout {
            path: "/base/layouts/python".into(),
            tag: None,
        };
        let archive = Target::Archive {
            path: "/a/b.tar".into(),
            name: Some("python:3.12".into()),
        };
        assert_eq!(map.find("python:3.12"), registry("r.local/p"));
        assert_eq!(map.find("perl:5"), registry("r.local/hub/perl:5"));
        assert_eq!(map.find("ghcr.io/x"), Some(Target::Recipe("any".into())));
        assert_eq!(map.find("python:2"), Some(layout));
        assert_eq!(map.find("docker.io/python:3.11"), Some(archive));
    }

    #[test]
    fn json_does_as_well_and_mistakes_are_named() {
        let json = ImageMap::parse(r#"{"a": "recipe:base"}"#, Path::new("/")).unwrap();
        assert_eq!(json.find("a"), Some(Target::Recipe("base".into())));
        for (bad, what) in [
            ("\"a\" = \"oci:\"", "missing"),
            ("\"a*b\" = \"recipe:x\"", "at the end"),
            ("\"a\" = \"recipe:\"", "missing"),
            ("\"a\" = \"A//b\"", "none of"),
            ("\"a\" = 3", "expected"),
        ] {
            let error = ImageMap::parse(bad, Path::new("/"))
                .unwrap_err()
                .to_string();
            assert!(error.contains(what), "{bad}: {error}");
        }
    }
}

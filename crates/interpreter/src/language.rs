//! The languages that code may be in, and the few lines of each that the daemon runs by itself.

use std::collections::BTreeMap;

use serde_json::json;

/// A language that clients may name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Language {
    /// IPython.
    Python,
    /// JavaScript.
    JavaScript,
    /// TypeScript, which the kernel of JavaScript runs.
    TypeScript,
    /// R.
    R,
    /// Java.
    Java,
    /// Bash.
    Bash,
    /// The name of any other kernel that an image has.
    Other(String),
}

/// Variables to set and to remove, and whether random generators are to begin anew.
#[derive(Debug, Default)]
pub(crate) struct Change<'a> {
    pub(crate) set: BTreeMap<&'a str, &'a str>,
    pub(crate) unset: Vec<&'a str>,
    /// A random number.
    pub(crate) reseed: Option<Reseed>,
}

/// Makes clones of a sandbox draw different numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reseed {
    /// Fresh randomness.
    pub(crate) seed: u32,
    /// No code of a user has run in the kernel yet: a seed that a user has set is theirs to keep.
    pub(crate) untouched: bool,
}

impl Change<'_> {
    pub(crate) fn is_empty(&self) -> bool {
        self.set.is_empty() && self.unset.is_empty() && self.reseed.is_none()
    }
}

impl Language {
    /// The language of that name, as clients write it.
    #[must_use]
    pub fn parse(name: &str) -> Self {
        let name = name.trim().to_lowercase();
        match name.as_str() {
            "" | "python" | "python3" | "py" => Self::Python,
            "javascript" | "js" => Self::JavaScript,
            "typescript" | "ts" => Self::TypeScript,
            "r" => Self::R,
            "java" => Self::Java,
            "bash" => Self::Bash,
            _ => Self::Other(name),
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Python => "python",
            Self::JavaScript => "javascript",
            Self::TypeScript => "typescript",
            Self::R => "r",
            Self::Java => "java",
            Self::Bash => "bash",
            Self::Other(name) => name,
        }
    }

    /// The language whose kernel runs it.
    #[must_use]
    pub fn of_kernel(&self) -> &Self {
        match self {
            Self::TypeScript => &Self::JavaScript,
            other => other,
        }
    }

    /// How an image gets its kernel.
    #[must_use]
    pub fn how_to_add(&self) -> &'static str {
        match self {
            Self::Python => "pip install ipykernel",
            Self::JavaScript | Self::TypeScript => "pip install deno",
            Self::R => "apt-get install r-cran-irkernel",
            Self::Java => "apt-get install default-jdk-headless && pip install jjava",
            Self::Bash => "pip install bash_kernel",
            Self::Other(_) => "install a Jupyter kernel of that name or language",
        }
    }

    /// Runs once in each new kernel, before any other code.
    pub(crate) fn prologue(&self) -> Option<String> {
        match self {
            Self::Python => {
                let kernel = json!(include_str!("../python/kernel.py"));
                let charts = json!(include_str!("../python/charts.py"));
                // In a namespace of its own: the user's stays empty.
                Some(format!(
                    "exec(compile({kernel}, '<cubicle>', 'exec'), \
                     {{'__name__': '_cubicle', 'CHARTS': {charts}}})"
                ))
            }
            Self::JavaScript | Self::TypeScript => Some(JAVASCRIPT_PROLOGUE.to_owned()),
            _ => None,
        }
    }

    /// Does what showing a value does, and shows none.
    pub(crate) fn rehearsal(&self) -> Option<&'static str> {
        match self {
            Self::Python => Some("get_ipython().display_formatter.format(2)\nNone"),
            _ => None,
        }
    }

    /// Code that makes the change in a running kernel; none if there is nothing to change or no way.
    pub(crate) fn apply(&self, change: &Change<'_>) -> Option<String> {
        if change.is_empty() {
            return None;
        }
        let code = match self {
            Self::Python => python(change),
            Self::JavaScript | Self::TypeScript => javascript(change),
            Self::R => r(change),
            Self::Java => java(change),
            Self::Bash => bash(change),
            Self::Other(_) => String::new(),
        };
        (!code.is_empty()).then_some(code)
    }
}

/// `require`, which modules of Node's older kind need, from the working directory.
const JAVASCRIPT_PROLOGUE: &str = "\
globalThis.require ??= (await import('node:module')).createRequire(process.cwd() + '/');
void 0";

fn python(change: &Change<'_>) -> String {
    let mut code = Vec::new();
    if !change.set.is_empty() {
        let set = json!(change.set);
        code.push(format!("__import__('os').environ.update({set})"));
    }
    if !change.unset.is_empty() {
        let unset = json!(change.unset);
        code.push(format!(
            "[__import__('os').environ.pop(name, None) for name in {unset}]"
        ));
    }
    if let Some(Reseed {
        untouched: true, ..
    }) = change.reseed
    {
        code.push("__import__('random').seed()".to_owned());
        code.push(
            "[module.seed() for module in [__import__('sys').modules.get('numpy.random')] if module]"
                .to_owned(),
        );
    }
    code.join("\n")
}

fn javascript(change: &Change<'_>) -> String {
    let mut code = Vec::new();
    if !change.set.is_empty() {
        code.push(format!(
            "Object.assign(process.env, {});",
            json!(change.set)
        ));
    }
    if !change.unset.is_empty() {
        let unset = json!(change.unset);
        code.push(format!(
            "{unset}.forEach((name) => delete process.env[name]);"
        ));
    }
    if let Some(Reseed { seed, .. }) = change.reseed {
        // What the kernel draws ahead for `crypto`, or stretches a key of the system's to, is used up:
        // 64 KiB at the most, for each of the two functions. For `Math.random` it never asks the
        // system again, but a clone can go another way along the sequence.
        let steps = seed % (1 << 14);
        code.push(format!(
            "for (let i = 0; i < 3; i++) crypto.getRandomValues(new Uint8Array(65536)); \
             for (let i = 0; i < 4200; i++) crypto.randomUUID(); \
             for (let i = 0; i < {steps}; i++) Math.random();"
        ));
    }
    code.push("void 0".to_owned());
    code.join("\n")
}

fn r(change: &Change<'_>) -> String {
    let mut code = Vec::new();
    if !change.set.is_empty() {
        let set: Vec<String> = change
            .set
            .iter()
            .map(|(name, value)| format!("{} = {}", json!(name), json!(value)))
            .collect();
        code.push(format!("do.call(Sys.setenv, list({}))", set.join(", ")));
    }
    if !change.unset.is_empty() {
        let unset: Vec<String> = change
            .unset
            .iter()
            .map(|name| json!(name).to_string())
            .collect();
        code.push(format!("Sys.unsetenv(c({}))", unset.join(", ")));
    }
    if let Some(Reseed {
        seed,
        untouched: true,
    }) = change.reseed
    {
        code.push(format!("set.seed({})", seed >> 1));
    }
    code.push("invisible(NULL)".to_owned());
    code.join("\n")
}

/// A program in Java cannot change its environment; properties are what it can.
fn java(change: &Change<'_>) -> String {
    let set = change
        .set
        .iter()
        .map(|(name, value)| format!("System.setProperty({}, {});", json!(name), json!(value)));
    let unset = change
        .unset
        .iter()
        .map(|name| format!("System.clearProperty({});", json!(name)));
    set.chain(unset).collect::<Vec<_>>().join("\n")
}

fn bash(change: &Change<'_>) -> String {
    let mut code = Vec::new();
    for (name, value) in &change.set {
        if is_identifier(name) {
            code.push(format!("export {name}={}", bash_word(value)));
        }
    }
    for name in &change.unset {
        if is_identifier(name) {
            code.push(format!("unset {name}"));
        }
    }
    if let Some(Reseed {
        seed,
        untouched: true,
    }) = change.reseed
    {
        code.push(format!("RANDOM={seed}"));
    }
    code.join("\n")
}

/// What a shell can have as the name of a variable; others it would take for something else.
fn is_identifier(name: &str) -> bool {
    name.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
        && name
            .chars()
            .all(|char| char.is_ascii_alphanumeric() || char == '_')
}

/// One word on one line, whatever it holds.
fn bash_word(value: &str) -> String {
    let mut word = String::from("$'");
    for char in value.chars() {
        match char {
            '\'' | '\\' => word.extend(['\\', char]),
            control if control.is_ascii_control() => {
                word.push_str(&format!("\\x{:02x}", u32::from(control)));
            }
            other => word.push(other),
        }
    }
    word.push('\'');
    word
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const NASTY: &str = "a'b\"c\\d\ne\t$HOME `id` ä\u{1f600}\u{7f}";

    fn change(name: &'static str) -> Change<'static> {
        Change {
            set: BTreeMap::from([(name, NASTY)]),
            unset: vec!["GONE"],
            reseed: None,
        }
    }

    #[test]
    fn names_are_what_clients_write() {
        for (text, language) in [
            ("Python", Language::Python),
            (" JS ", Language::JavaScript),
            ("ts", Language::TypeScript),
            ("R", Language::R),
            ("kotlin", Language::Other("kotlin".into())),
        ] {
            assert_eq!(Language::parse(text), language);
        }
        assert_eq!(Language::TypeScript.of_kernel(), &Language::JavaScript);
    }

    /// What a program of the language prints after the change is what was set.
    fn printed(program: &str, option: &str, code: String) -> String {
        let output = Command::new(program)
            .args([option, &code])
            .env("GONE", "here")
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn python_sees_exactly_the_value() {
        let code = Language::Python.apply(&change("A")).unwrap();
        let code = format!(
            "{code}\nimport os, sys\nsys.stdout.write(os.environ['A'] + str(os.environ.get('GONE')))"
        );
        assert_eq!(printed("python3", "-c", code), format!("{NASTY}None"));
    }

    #[test]
    fn bash_sees_exactly_the_value() {
        let code = Language::Bash.apply(&change("A")).unwrap();
        assert_eq!(code.lines().count(), 2);
        let code = format!("{code}\nprintf %s \"$A${{GONE-None}}\"");
        assert_eq!(printed("bash", "-c", code), format!("{NASTY}None"));
        assert_eq!(Language::Bash.apply(&change("A;id")).unwrap(), "unset GONE");
    }

    #[test]
    fn only_an_untouched_generator_is_reseeded() {
        for untouched in [false, true] {
            let change = Change {
                reseed: Some(Reseed {
                    seed: 20_000,
                    untouched,
                }),
                ..Change::default()
            };
            let python = Language::Python.apply(&change);
            assert_eq!(python.is_some(), untouched);
            let javascript = Language::JavaScript.apply(&change).unwrap();
            assert!(javascript.contains("i < 3616;"));
        }
        assert_eq!(Language::JavaScript.apply(&Change::default()), None);
    }
}

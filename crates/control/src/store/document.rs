//! The catalogue as it is written down: JSON, versioned, read strictly.

use std::{collections::BTreeMap, time::Duration};

use serde::Deserialize;

use super::Entry;
use crate::template::{Action, BuildSpec, Origin, Probe, Reference, Size, Step};

/// The version of the schema that this server reads.
pub(super) const VERSION: u32 = 1;
/// Most templates in a catalogue.
const MAX_ENTRIES: usize = 1000;
/// Most steps of one of them.
const MAX_STEPS: usize = 100;

/// Reads a catalogue. What an entry does not say of itself, the recipe says that it is made by.
pub(super) fn parse(document: &[u8], recipes: &[Entry]) -> Result<Vec<Entry>, String> {
    // The version first: what other versions have in them is anybody's guess.
    let Versioned { version } = serde_json::from_slice(document).map_err(|e| e.to_string())?;
    if version != VERSION {
        return Err(format!(
            "it has version {version}, and this server reads version {VERSION}"
        ));
    }
    let document: Document = serde_json::from_slice(document).map_err(|e| e.to_string())?;
    if document.templates.len() > MAX_ENTRIES {
        return Err(format!("it has more than {MAX_ENTRIES} templates"));
    }
    let mut entries: Vec<Entry> = Vec::new();
    for item in document.templates {
        let name = item.name.clone();
        if entries.iter().any(|known| known.name == name) {
            return Err(format!("it has two templates called `{name}`"));
        }
        let entry = item.complete(recipes);
        entries.push(entry.map_err(|why| format!("template `{name}`: {why}"))?);
    }
    Ok(entries)
}

#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(rename = "version")]
    _version: u32,
    templates: Vec<Item>,
}

/// One template of the catalogue.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Item {
    name: String,
    from: From,
    description: Option<String>,
    category: Option<String>,
    cpu_count: Option<u32>,
    #[serde(rename = "memoryMB")]
    memory_mb: Option<u32>,
    #[serde(rename = "diskSizeMB")]
    disk_size_mb: Option<u32>,
    #[serde(default)]
    steps: Vec<Do>,
    env: Option<BTreeMap<String, String>>,
    ports: Option<Vec<u16>>,
    start: Option<String>,
    ready: Option<Ready>,
    ready_within_seconds: Option<u64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
enum From {
    Recipe(String),
    Image(String),
    Template(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
enum Ready {
    Command(String),
    Http { port: u16, path: String },
    Tcp { port: u16 },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
enum Do {
    Run(String),
    RunAs { user: String, command: String },
    Env(BTreeMap<String, String>),
    Workdir(String),
    User(String),
}

impl Item {
    fn complete(self, recipes: &[Entry]) -> Result<Entry, String> {
        let reference: Reference = self.name.parse().map_err(|e| format!("name: {e}"))?;
        reference.check_alias().map_err(|e| format!("name: {e}"))?;
        if reference.tag.is_some() {
            return Err("name: a name in the store has no tag".into());
        }
        if self.steps.len() > MAX_STEPS {
            return Err(format!("steps: there are more than {MAX_STEPS}"));
        }
        let recipe = match &self.from {
            From::Recipe(name) => {
                let known = recipes.iter().find(|recipe| recipe.name == *name);
                Some(known.ok_or_else(|| {
                    let names: Vec<_> = recipes.iter().map(|recipe| &*recipe.name).collect();
                    format!(
                        "this server has no recipe `{name}`, only {}",
                        names.join(", ")
                    )
                })?)
            }
            From::Image(_) | From::Template(_) => None,
        };
        let below = recipe.map(|recipe| recipe.spec.clone());
        let mut spec = below.unwrap_or_else(|| BuildSpec::new(self.from.origin()));
        let size = recipe.map_or_else(Size::default, |recipe| recipe.size);
        let size = Size {
            cpu_count: self.cpu_count.unwrap_or(size.cpu_count),
            memory_mib: self.memory_mb.unwrap_or(size.memory_mib),
            disk_mib: self.disk_size_mb.unwrap_or(size.disk_mib),
        };
        size.check().map_err(|e| e.to_string())?;

        // An image is what its maker says, down to the program that it runs.
        spec.run_image_command = matches!(self.from, From::Image(_)) && self.start.is_none();
        spec.steps = self.steps.into_iter().map(Do::step).collect();
        if let Some(env) = self.env {
            spec.env = env.into_iter().collect();
        }
        if let Some(ports) = self.ports {
            spec.ports = ports;
        }
        spec.start = self.start.or(spec.start);
        if let Some(ready) = self.ready {
            spec.ready = ready.probe();
        }
        if let Some(seconds) = self.ready_within_seconds {
            spec.ready_within = Duration::from_secs(seconds);
        }
        check(&spec)?;
        let text = |given: Option<String>, of: fn(&Entry) -> &String| {
            given.or_else(|| recipe.map(|recipe| of(recipe).clone()))
        };
        Ok(Entry {
            name: self.name,
            description: text(self.description, |recipe| &recipe.description)
                .ok_or("description: it has none")?,
            category: text(self.category, |recipe| &recipe.category)
                .ok_or("category: it has none")?,
            size,
            spec,
        })
    }
}

/// Refuses what no build could make sense of.
fn check(spec: &BuildSpec) -> Result<(), String> {
    let probed = match &spec.ready {
        Probe::Http { port, path } if path.starts_with('/') => Some(port),
        Probe::Http { path, .. } => return Err(format!("ready: `{path}` does not begin with `/`")),
        Probe::Tcp { port } => Some(port),
        Probe::None | Probe::Command(_) => None,
    };
    if spec.ports.iter().chain(probed).any(|port| *port == 0) {
        return Err("ports: there is no port 0".into());
    }
    let of_steps = spec.steps.iter().filter_map(|step| match &step.action {
        Action::Env(variables) => Some(variables),
        _ => None,
    });
    let mut names = spec
        .env
        .iter()
        .chain(of_steps.flatten())
        .map(|(name, _)| name);
    match names.find(|name| name.is_empty() || name.contains(['=', '\0'])) {
        Some(name) => Err(format!("env: `{name}` cannot be the name of a variable")),
        None => Ok(()),
    }
}

impl From {
    fn origin(&self) -> Origin {
        match self {
            Self::Recipe(name) => Origin::Recipe(name.clone()),
            Self::Image(reference) => Origin::image(reference),
            Self::Template(reference) => Origin::Template(reference.clone()),
        }
    }
}

impl Ready {
    fn probe(self) -> Probe {
        match self {
            Self::Command(command) => Probe::Command(command),
            Self::Http { port, path } => Probe::Http { port, path },
            Self::Tcp { port } => Probe::Tcp { port },
        }
    }
}

impl Do {
    fn step(self) -> Step {
        let action = match self {
            Self::Run(command) => Action::Run {
                command,
                user: None,
            },
            Self::RunAs { user, command } => Action::Run {
                command,
                user: Some(user),
            },
            Self::Env(variables) => Action::Env(variables.into_iter().collect()),
            Self::Workdir(path) => Action::Workdir(path),
            Self::User(user) => Action::User(user),
        };
        action.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node() -> Entry {
        Entry {
            name: "node".into(),
            description: "Node".into(),
            category: "code".into(),
            size: Size {
                memory_mib: 1024,
                ..Size::default()
            },
            spec: BuildSpec {
                ports: vec![3000],
                env: vec![("A".into(), "1".into())],
                ..BuildSpec::recipe("node")
            },
        }
    }

    fn read(templates: &str) -> Result<Vec<Entry>, String> {
        let document = format!(r#"{{"version": 1, "templates": [{templates}]}}"#);
        parse(document.as_bytes(), &[node()])
    }

    #[test]
    fn an_entry_inherits_what_its_recipe_says() {
        let entries = read(r#"{"name": "mine", "from": {"recipe": "node"}, "cpuCount": 4}"#);
        let mut expected = node();
        expected.name = "mine".into();
        expected.size.cpu_count = 4;
        assert_eq!(entries.unwrap(), [expected]);
    }

    #[test]
    fn an_entry_may_say_everything_itself() {
        let entries = read(
            r#"{"name": "web", "from": {"image": "nginx:1"}, "description": "d", "category": "web",
                "steps": [{"env": {"K": "v"}}, {"run": "true"},
                          {"runAs": {"user": "root", "command": "id"}}, {"workdir": "/srv"}],
                "ports": [80], "start": "nginx", "ready": {"http": {"port": 80, "path": "/"}},
                "readyWithinSeconds": 60}"#,
        );
        let entry = entries.unwrap().pop().unwrap();
        assert_eq!(entry.spec.origin, Origin::image("nginx:1"));
        assert_eq!(entry.spec.ready_within, Duration::from_secs(60));
        assert!(!entry.spec.run_image_command, "it says what to start");
        let actions: Vec<_> = entry
            .spec
            .steps
            .iter()
            .map(|s| s.action.to_string())
            .collect();
        assert_eq!(actions, ["ENV K", "RUN true", "RUN id", "WORKDIR /srv"]);
    }

    #[test]
    fn what_is_wrong_is_said_with_the_name_of_the_template() {
        let wrong = |templates: &str| read(templates).unwrap_err();
        assert_eq!(
            wrong(r#"{"name": "a", "from": {"recipe": "nope"}}"#),
            "template `a`: this server has no recipe `nope`, only node"
        );
        assert_eq!(
            wrong(r#"{"name": "a", "from": {"image": "x"}, "category": "web"}"#),
            "template `a`: description: it has none"
        );
        let two = r#"{"name": "a", "from": {"recipe": "node"}}"#;
        assert_eq!(
            wrong(&format!("{two},{two}")),
            "it has two templates called `a`"
        );
        let with = |field: &str| {
            wrong(&format!(
                r#"{{"name": "a", "from": {{"recipe": "node"}}, {field}}}"#
            ))
        };
        assert!(with(r#""cpucount": 1"#).contains("unknown field `cpucount`"));
        assert!(with(r#""memoryMB": 1"#).contains("memoryMB: 1 is not between"));
        assert!(with(r#""ports": [0]"#).contains("there is no port 0"));
        assert!(with(r#""env": {"": "x"}"#).contains("cannot be the name of a variable"));
        assert!(with(r#""ready": {"http": {"port": 1, "path": "x"}}"#).contains("does not begin"));
        assert!(wrong(r#"{"name": "a b", "from": {"recipe": "node"}}"#).contains("name: "));
        assert!(wrong(r#"{"name": "a:b", "from": {"recipe": "node"}}"#).contains("no tag"));
    }

    #[test]
    fn another_version_is_refused_before_anything_else() {
        let error = parse(br#"{"version": 2, "whatever": []}"#, &[]).unwrap_err();
        assert_eq!(error, "it has version 2, and this server reads version 1");
        assert!(parse(b"[]", &[]).is_err());
    }
}

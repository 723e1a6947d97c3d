//! The template store: templates that this server knows how to build, described in a catalogue.
//!
//! The catalogue is shipped with the server or comes from where its operator says. It is read
//! strictly: one that has anything in it that this server does not understand is refused as a
//! whole. What it describes is built like every other template: by a recipe of this server, from
//! an image or another template, with steps that run in a VM. A catalogue can name recipes, it
//! cannot bring any: those run outside of VMs.

mod document;

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use tokio::sync::Mutex;

use crate::{
    error::{Error, Result},
    template::{
        BuildSpec, BuildTemplate, Origin, Probe, Size, Started, Template, Templates, shorten,
    },
};

/// The catalogue that is part of this program.
const SHIPPED: &[u8] = include_bytes!("store/catalogue.json");
/// How old a catalogue from elsewhere may be, when it costs something to look.
const FRESH: Duration = Duration::from_secs(10 * 60);

/// Where a catalogue comes from that is not the shipped one.
#[async_trait]
pub trait CatalogueSource: fmt::Debug + Send + Sync + 'static {
    /// Its name for people: a path or an address, without credentials.
    fn name(&self) -> String;
    /// Whether reading it costs so little that it is read each time.
    fn is_local(&self) -> bool;
    /// The document, or why there is none.
    async fn read(&self) -> std::result::Result<Vec<u8>, String>;
}

/// What the store is made of.
#[derive(Debug, Clone, Default)]
pub struct StoreConfig {
    /// What this server's recipes make, each under the recipe's name.
    pub recipes: Vec<Entry>,
    /// The catalogue. `None`: the shipped one.
    pub source: Option<Arc<dyn CatalogueSource>>,
}

/// A template that could be built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name in the store, and the alias that it gets.
    pub name: String,
    /// What it is, in one line for people.
    pub description: String,
    /// What it is for, in one word.
    pub category: String,
    /// Size of its sandboxes.
    pub size: Size,
    /// How it is built.
    pub spec: BuildSpec,
}

/// A template of the store, and what became of it here.
#[derive(Debug, Clone)]
pub struct Listed {
    /// The template as the catalogue has it.
    pub entry: Entry,
    /// The template of this server that has its name, if one has.
    pub template: Option<Template>,
}

/// All of the store.
#[derive(Debug, Clone)]
pub struct Catalogue {
    /// Version of the schema.
    pub version: u32,
    /// Where it is from: `shipped`, or the name of its source.
    pub source: String,
    /// Why it could not be read anew; what is listed was read before.
    pub stale: Option<String>,
    /// In the catalogue's order.
    pub templates: Vec<Listed>,
}

/// What whoever installs a template wants to be different.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Install {
    /// `alias[:tag]`, in the place of the name in the store.
    pub alias: Option<String>,
    /// More tags for it.
    pub tags: Vec<String>,
    /// CPUs of its sandboxes.
    pub cpu_count: Option<u32>,
    /// Memory of its sandboxes.
    pub memory_mib: Option<u32>,
    /// Their root disk.
    pub disk_mib: Option<u32>,
    /// Build it even if it was built the same way before.
    pub force: bool,
}

/// The template store of this server. Cheap to clone.
#[derive(Clone)]
pub struct TemplateStore {
    templates: Templates,
    config: Arc<StoreConfig>,
    read: Arc<Mutex<Option<Read>>>,
}

/// A catalogue that was read.
#[derive(Clone)]
struct Read {
    entries: Arc<[Entry]>,
    at: Instant,
    stale: Option<String>,
}

impl TemplateStore {
    pub(crate) fn new(config: StoreConfig, templates: Templates) -> Self {
        Self {
            templates,
            config: Arc::new(config),
            read: Arc::default(),
        }
    }

    /// Everything in the store.
    ///
    /// # Errors
    /// [`Error::Catalogue`] if the catalogue cannot be read and never could.
    pub async fn list(&self) -> Result<Catalogue> {
        let read = self.catalogue().await?;
        let mut templates = Vec::with_capacity(read.entries.len());
        for entry in read.entries.iter() {
            templates.push(self.listed(entry).await?);
        }
        Ok(Catalogue {
            version: document::VERSION,
            source: self.source_name(),
            stale: read.stale,
            templates,
        })
    }

    /// One template of the store.
    ///
    /// # Errors
    /// [`Error::NotInStore`], and as [`Self::list`].
    pub async fn get(&self, name: &str) -> Result<Listed> {
        self.listed(&self.entry(name).await?).await
    }

    /// Starts to build a template of the store, and returns at once.
    ///
    /// # Errors
    /// [`Error::NotInStore`], and those of [`Templates::build`].
    pub async fn install(&self, name: &str, wanted: Install) -> Result<Started> {
        let Entry {
            name, size, spec, ..
        } = self.without_the_recipes(self.entry(name).await?);
        let request = BuildTemplate {
            tags: wanted.tags,
            size: Size {
                cpu_count: wanted.cpu_count.unwrap_or(size.cpu_count),
                memory_mib: wanted.memory_mib.unwrap_or(size.memory_mib),
                disk_mib: wanted.disk_mib.unwrap_or(size.disk_mib),
            },
            ..BuildTemplate::new(
                wanted.alias.unwrap_or(name),
                BuildSpec {
                    force: wanted.force,
                    ..spec
                },
            )
        };
        self.templates.build(request).await
    }

    /// Reads the catalogue now, however fresh it is.
    ///
    /// # Errors
    /// [`Error::Catalogue`].
    pub async fn refresh(&self) -> Result<()> {
        let mut known = self.read.lock().await;
        *known = Some(self.read_now().await?);
        Ok(())
    }

    async fn entry(&self, name: &str) -> Result<Entry> {
        let read = self.catalogue().await?;
        let found = read.entries.iter().find(|entry| entry.name == name);
        found.cloned().ok_or_else(|| Error::NotInStore {
            name: shorten(name),
        })
    }

    /// The entry without what its recipe brings about by itself: it would be started twice.
    fn without_the_recipes(&self, mut entry: Entry) -> Entry {
        let Origin::Recipe(name) = &entry.spec.origin else {
            return entry;
        };
        let recipe = self.config.recipes.iter().find(|r| r.name == *name);
        if let Some(Entry { spec: recipe, .. }) = recipe {
            let spec = &mut entry.spec;
            spec.start
                .take_if(|start| recipe.start.as_ref() == Some(start));
            if spec.ready == recipe.ready {
                spec.ready = Probe::None;
            }
        }
        entry
    }

    async fn listed(&self, entry: &Entry) -> Result<Listed> {
        let template = match self.templates.get(&entry.name).await {
            Ok(template) => Some(template),
            Err(Error::TemplateNotFound { .. }) => None,
            Err(error) => return Err(error),
        };
        Ok(Listed {
            entry: entry.clone(),
            template,
        })
    }

    /// The catalogue, read anew if it is time to. Held while it is read: who comes meanwhile waits
    /// for the same answer.
    async fn catalogue(&self) -> Result<Read> {
        let mut known = self.read.lock().await;
        let local = self.config.source.as_ref().is_some_and(|s| s.is_local());
        let fresh = |read: &&Read| match &self.config.source {
            None => true,
            Some(_) => !local && read.at.elapsed() < FRESH,
        };
        if let Some(read) = known.as_ref().filter(fresh) {
            return Ok(read.clone());
        }
        let read = match (self.read_now().await, known.take()) {
            (Ok(read), _) => read,
            (Err(error), Some(before)) => {
                tracing::warn!(%error, "the catalogue of the template store is not up to date");
                Read {
                    at: Instant::now(),
                    stale: Some(error.to_string()),
                    ..before
                }
            }
            (Err(error), None) => return Err(error),
        };
        *known = Some(read.clone());
        Ok(read)
    }

    async fn read_now(&self) -> Result<Read> {
        let document = match &self.config.source {
            None => Ok(SHIPPED.to_vec()),
            Some(source) => source.read().await,
        };
        let entries = document.and_then(|text| document::parse(&text, &self.config.recipes));
        let entries = entries.map_err(|why| Error::Catalogue {
            from: self.source_name(),
            why,
        })?;
        Ok(Read {
            entries: entries.into(),
            at: Instant::now(),
            stale: None,
        })
    }

    fn source_name(&self) -> String {
        let source = self.config.source.as_ref();
        source.map_or_else(|| "shipped".to_owned(), |source| source.name())
    }
}

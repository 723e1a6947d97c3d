use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use serde::Serialize;

use crate::{
    Error, Language, Surroundings,
    context::{Context, Shared, is_variable},
    kernelspec::Search,
    process,
    stream::{self, Source},
};

/// Where code runs unless a client says otherwise.
const DEFAULT_CWD: &str = "/home/user";
/// The languages that clients expect to be ready, where the image has them.
const DEFAULTS: [Language; 2] = [Language::Python, Language::JavaScript];
/// After which a start that failed is tried again, if somebody still asks.
const RETRY: Duration = Duration::from_secs(5);

/// All contexts of a sandbox.
pub struct Interpreter {
    shared: Arc<Shared>,
    default_cwd: PathBuf,
    /// In the order in which they were made.
    contexts: Mutex<Vec<Arc<Context>>>,
    /// The context of those who name only a language; locked while it is being made.
    defaults: Mutex<HashMap<Language, Default>>,
    warmth: Mutex<Warmth>,
}

type Default = Arc<tokio::sync::Mutex<Option<Arc<Context>>>>;

enum Warmth {
    Cold,
    Warming,
    Warm,
    Failed(String, Instant),
}

/// Whether the default contexts run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// They do.
    Ready,
    /// They are being started.
    Starting,
    /// They could not be started; the next question is another attempt.
    Failed(String),
}

/// A context, as clients see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ContextInfo {
    /// Names it in requests.
    pub id: String,
    /// Its language.
    pub language: String,
    /// Where its code runs.
    pub cwd: String,
}

/// The services that E2B's images run for this, by their names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Runs the kernels.
    Jupyter,
    /// Serves the clients.
    CodeInterpreter,
}

impl Unit {
    /// The unit of that name, with or without its ending.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        match name.strip_suffix(".service").unwrap_or(name) {
            "jupyter" => Some(Self::Jupyter),
            "code-interpreter" => Some(Self::CodeInterpreter),
            _ => None,
        }
    }
}

impl Interpreter {
    /// An interpreter with the kernels that `search` finds. `directory` is where the kernels' files
    /// are while they run; kernels that an earlier daemon left are ended.
    #[must_use]
    pub fn new(
        surroundings: Arc<dyn Surroundings>,
        search: Search,
        directory: PathBuf,
    ) -> Arc<Self> {
        process::sweep(&directory);
        Arc::new(Self {
            shared: Arc::new(Shared {
                surroundings,
                search,
                directory,
            }),
            default_cwd: PathBuf::from(DEFAULT_CWD),
            contexts: Mutex::default(),
            defaults: Mutex::default(),
            warmth: Mutex::new(Warmth::Cold),
        })
    }

    /// Whether the image has a kernel at all.
    #[must_use]
    pub fn has_kernels(&self) -> bool {
        !self.shared.search.kernels().is_empty()
    }

    /// Starts the default contexts if they do not run, and says how far that is.
    pub fn health(self: &Arc<Self>) -> Health {
        let mut warmth = self.warmth();
        let (health, start) = match &*warmth {
            Warmth::Warm => (Health::Ready, false),
            Warmth::Warming => (Health::Starting, false),
            Warmth::Cold => (Health::Starting, true),
            Warmth::Failed(reason, when) => {
                (Health::Failed(reason.clone()), when.elapsed() > RETRY)
            }
        };
        if start {
            *warmth = Warmth::Warming;
            tokio::spawn(Arc::clone(self).warm());
        }
        health
    }

    /// Starts the default contexts and waits until they run.
    ///
    /// # Errors
    /// [`Error`]; those that could be started run.
    pub async fn start(self: &Arc<Self>) -> Result<(), Error> {
        let kernels = self.shared.search.kernels();
        let has = |language: &Language| kernels.iter().any(|spec| spec.language == *language);
        let mut languages: Vec<Language> = DEFAULTS.into_iter().filter(has).collect();
        if languages.is_empty() {
            languages.extend(kernels.first().map(|spec| spec.language.clone()));
        }
        // Together: most of a start is waiting for files.
        let started = languages
            .iter()
            .map(|language| self.default_context(language));
        for context in futures::future::join_all(started).await {
            context?;
        }
        Ok(())
    }

    async fn warm(self: Arc<Self>) {
        let result = self.start().await;
        *self.warmth() = match result {
            Ok(()) => Warmth::Warm,
            Err(error) => {
                tracing::warn!(%error, "the default contexts do not start");
                Warmth::Failed(error.to_string(), Instant::now())
            }
        };
    }

    /// To be called when the sandbox has begun a new life: brings the kernel that most clients ask
    /// first up to date, while they are still on their way.
    pub async fn refresh(&self) {
        let default = {
            let defaults = self.defaults.lock().unwrap_or_else(PoisonError::into_inner);
            defaults.get(&DEFAULTS[0]).cloned()
        };
        let Some(default) = default else { return };
        let context = default
            .try_lock()
            .ok()
            .and_then(|default| (*default).clone());
        if let Some(context) = context {
            context.refresh().await;
        }
    }

    /// Ends every context, and starts the default ones anew.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn restart_all(self: &Arc<Self>) -> Result<(), Error> {
        self.stop_all().await;
        *self.warmth() = Warmth::Warming;
        let result = self.start().await;
        *self.warmth() = match &result {
            Ok(()) => Warmth::Warm,
            Err(error) => Warmth::Failed(error.to_string(), Instant::now()),
        };
        result
    }

    /// Ends every context.
    pub async fn stop_all(&self) {
        self.defaults
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        let contexts = std::mem::take(&mut *self.contexts());
        *self.warmth() = Warmth::Cold;
        futures::future::join_all(contexts.iter().map(|context| context.remove())).await;
    }

    /// Makes a context.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn create(
        &self,
        language: &Language,
        cwd: Option<PathBuf>,
    ) -> Result<ContextInfo, Error> {
        let cwd = cwd.unwrap_or_else(|| self.default_cwd.clone());
        let context = self.make(language, cwd).await?;
        Ok(info(&context))
    }

    /// All contexts, in the order in which they were made.
    #[must_use]
    pub fn list(&self) -> Vec<ContextInfo> {
        self.contexts()
            .iter()
            .map(|context| info(context))
            .collect()
    }

    /// Starts a context's kernel anew.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn restart(&self, id: &str) -> Result<(), Error> {
        self.find(id)?.restart().await
    }

    /// Ends a context.
    ///
    /// # Errors
    /// [`Error::NoContext`].
    pub async fn remove(&self, id: &str) -> Result<(), Error> {
        let context = self.find(id)?;
        self.contexts().retain(|other| other.id != id);
        context.remove().await;
        Ok(())
    }

    /// Runs code in the context of that id, or else in the language's default one.
    ///
    /// # Errors
    /// [`Error`]: nothing has run.
    pub(crate) async fn execute(
        &self,
        code: String,
        context: Option<&str>,
        language: Option<&str>,
        variables: BTreeMap<String, String>,
    ) -> Result<Source, Error> {
        if let Some((name, _)) = variables
            .iter()
            .find(|(name, value)| !is_variable(name, value))
        {
            return Err(Error::Variable(name.clone()));
        }
        let context = match (context, language) {
            (Some(_), Some(_)) => return Err(Error::Ambiguous),
            (Some(id), None) => self.find(id)?,
            (None, language) => {
                let language = Language::parse(language.unwrap_or_default());
                self.default_context(&language).await?
            }
        };
        let (sink, source) = stream::channel();
        tokio::spawn(async move { context.execute(&code, &variables, sink).await });
        Ok(source)
    }

    /// The context of those who name a language only. TypeScript's is JavaScript's, whose kernel
    /// runs both.
    async fn default_context(&self, language: &Language) -> Result<Arc<Context>, Error> {
        let language = language.of_kernel();
        let default = {
            let mut defaults = self.defaults.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(defaults.entry(language.clone()).or_default())
        };
        let mut default = default.lock().await;
        let exists = |context: &Arc<Context>| {
            self.contexts()
                .iter()
                .any(|other| Arc::ptr_eq(other, context))
        };
        if let Some(context) = default.as_ref().filter(|context| exists(context)) {
            return Ok(Arc::clone(context));
        }
        let cwd = match self.default_cwd.is_dir() {
            true => self.default_cwd.clone(),
            false => PathBuf::from("/"),
        };
        let context = self.make(language, cwd).await?;
        *default = Some(Arc::clone(&context));
        Ok(context)
    }

    async fn make(&self, language: &Language, cwd: PathBuf) -> Result<Arc<Context>, Error> {
        let context = Context::create(&self.shared, language.clone(), cwd).await?;
        self.contexts().push(Arc::clone(&context));
        Ok(context)
    }

    fn find(&self, id: &str) -> Result<Arc<Context>, Error> {
        let contexts = self.contexts();
        let context = contexts.iter().find(|context| context.id == id);
        context
            .cloned()
            .ok_or_else(|| Error::NoContext(id.to_owned()))
    }

    fn contexts(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Context>>> {
        self.contexts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn warmth(&self) -> std::sync::MutexGuard<'_, Warmth> {
        self.warmth.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn info(context: &Context) -> ContextInfo {
    ContextInfo {
        id: context.id.clone(),
        language: context.language.name().to_owned(),
        cwd: context.cwd.to_string_lossy().into_owned(),
    }
}

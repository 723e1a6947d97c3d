//! A context: one kernel after another under one id, and the executions in it, one at a time and in
//! the order in which they came.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::{sleep, timeout};
use uuid::Uuid;

use crate::{
    Error, Language, Surroundings,
    kernel::{Event, Kernel, Launch, MAX_MESSAGE, Pending, Whose},
    kernelspec::{Kernelspec, Search},
    language::{Change, Reseed},
    output::{Output, Rich, Text, content},
    stream::Sink,
    wire::Message,
};

/// How long the daemon's own few lines may take in a kernel.
const OWN_CODE: Duration = Duration::from_secs(60);
/// How long an interrupt has to work before there is another.
const INTERRUPT: Duration = Duration::from_secs(1);
/// Interrupts after which a kernel that goes on is restarted.
const INTERRUPTS: u32 = 15;
/// A kernel that is done says so twice, on two connections; how long after one the other may come.
const STRAGGLER: Duration = Duration::from_secs(2);

/// What contexts share.
pub(crate) struct Shared {
    pub(crate) surroundings: Arc<dyn Surroundings>,
    pub(crate) search: Search,
    pub(crate) directory: PathBuf,
}

/// A context of executions.
pub(crate) struct Context {
    pub(crate) id: String,
    pub(crate) language: Language,
    pub(crate) cwd: PathBuf,
    shared: Arc<Shared>,
    /// Held by whoever uses the kernel, and waited for in order.
    turn: tokio::sync::Mutex<Turn>,
    /// The running kernel, for those who end it without waiting for their turn.
    running: Mutex<Option<Arc<Kernel>>>,
    removed: AtomicBool,
}

/// What is known of the kernel.
#[derive(Default)]
struct Turn {
    kernel: Option<Arc<Kernel>>,
    /// The environment that it has, as far as it is the sandbox's.
    environment: BTreeMap<String, String>,
    /// The life of the sandbox that it last ran in.
    life: String,
    /// Code of a user has run in it.
    touched: bool,
    /// What the next execution is told first.
    notice: Option<String>,
}

/// How an execution went.
enum Outcome {
    Done,
    /// The client went away before the end.
    Abandoned(Pending),
    /// The kernel ended.
    Ended(String),
}

impl Context {
    /// A new context, with its kernel running.
    pub(crate) async fn create(
        shared: &Arc<Shared>,
        language: Language,
        cwd: PathBuf,
    ) -> Result<Arc<Self>, Error> {
        if !cwd.is_dir() {
            return Err(Error::Directory(cwd));
        }
        let context = Self {
            id: Uuid::new_v4().to_string(),
            language,
            cwd,
            shared: Arc::clone(shared),
            turn: tokio::sync::Mutex::default(),
            running: Mutex::default(),
            removed: AtomicBool::new(false),
        };
        context.start(&mut *context.turn.lock().await).await?;
        Ok(Arc::new(context))
    }

    /// Runs code; everything that comes of it goes to `sink`. The client going away interrupts it.
    pub(crate) async fn execute(
        &self,
        code: &str,
        variables: &BTreeMap<String, String>,
        mut sink: Sink,
    ) {
        let mut turn = tokio::select! {
            turn = self.turn.lock() => turn,
            () = sink.gone() => return,
        };
        let kernel = match self.kernel(&mut turn).await {
            Ok(kernel) => kernel,
            Err(error) => {
                sink.send(&failure("KernelError", error.to_string()));
                return sink.finish();
            }
        };
        if let Some(notice) = turn.notice.take() {
            sink.notice(&notice);
        }
        let outcome = self
            .run(&mut turn, &kernel, code, variables, &mut sink)
            .await;
        match outcome {
            Ok(Outcome::Done) => {
                sink.finish();
                drop(sink);
                self.restore(&turn, &kernel, variables).await;
            }
            Ok(Outcome::Abandoned(pending)) => {
                drop(sink);
                self.abandon(&mut turn, &kernel, pending, variables).await;
            }
            Ok(Outcome::Ended(how)) => {
                // E2B's name for it, which clients may look for.
                let value = match self.is_removed() {
                    true => "Context was removed".to_owned(),
                    false => format!("Context was restarted: {how}"),
                };
                sink.send(&failure("ContextRestarting", value));
                sink.finish();
                drop(sink);
                // Whoever comes next should not have to wait for it, nor be told again.
                if !self.is_removed() {
                    let _ = self.kernel(&mut turn).await;
                    turn.notice = None;
                }
            }
            Err(error) => {
                sink.send(&failure("KernelError", error.to_string()));
                sink.finish();
                drop(sink);
                kernel.kill().await;
            }
        }
    }

    /// Brings an idle kernel up to date with the sandbox's new life ahead of the first execution,
    /// which then need not wait for that.
    pub(crate) async fn refresh(&self) {
        let Ok(mut turn) = self.turn.try_lock() else {
            // Whoever uses the kernel has done the same.
            return;
        };
        let kernel = turn
            .kernel
            .clone()
            .filter(|kernel| kernel.ended().is_none());
        let Some(kernel) = kernel else { return };
        let touched = turn.touched;
        let Some(mut code) = self.prepare(&mut turn, &BTreeMap::new()) else {
            return;
        };
        let mut whose = Whose::Own;
        if let (false, Some(rehearsal)) = (touched, self.language.rehearsal()) {
            code.push('\n');
            code.push_str(rehearsal);
            whose = Whose::Rehearsal;
        }
        // Not waited for: the next execution is sent after it.
        if let Err(error) = kernel.execute(&code, whose).await {
            tracing::debug!(%error, "a kernel is not up to date");
        }
    }

    /// Starts the kernel anew. What runs in it ends.
    pub(crate) async fn restart(&self) -> Result<(), Error> {
        let old = self.running();
        if let Some(old) = &old {
            old.stop().await;
        }
        let mut turn = self.turn.lock().await;
        let same = |kernel: &Arc<Kernel>| old.as_ref().is_some_and(|old| Arc::ptr_eq(old, kernel));
        // Somebody in the queue may have started a new one already.
        if turn.kernel.as_ref().is_none_or(same) {
            self.start(&mut turn).await?;
        }
        turn.notice = None;
        Ok(())
    }

    /// Ends the kernel for good. What runs in it ends, what waits for it fails.
    pub(crate) async fn remove(&self) {
        self.removed.store(true, Ordering::Relaxed);
        if let Some(kernel) = self.running() {
            kernel.stop().await;
        }
    }

    fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Relaxed)
    }

    fn running(&self) -> Option<Arc<Kernel>> {
        self.running
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The running kernel; a new one if the last has ended.
    async fn kernel(&self, turn: &mut Turn) -> Result<Arc<Kernel>, Error> {
        if let Some(kernel) = &turn.kernel {
            let Some(how) = kernel.ended() else {
                return Ok(Arc::clone(kernel));
            };
            turn.notice = Some(format!(
                "The kernel had ended ({how}) and was started again: what it held is gone."
            ));
        }
        self.start(turn).await
    }

    async fn start(&self, turn: &mut Turn) -> Result<Arc<Kernel>, Error> {
        if self.is_removed() {
            return Err(Error::NoContext(self.id.clone()));
        }
        let spec = self.shared.kernelspec(&self.language)?;
        turn.kernel = None;
        let environment = self.shared.environment();
        let kernel = Kernel::start(&Launch {
            spec: &spec,
            search: &self.shared.search,
            environment: &environment,
            cwd: &self.cwd,
            directory: &self.shared.directory,
        })
        .await?;
        let kernel = Arc::new(kernel);
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&kernel));
        // It was removed while its kernel started, when there was none to end.
        if self.is_removed() {
            kernel.kill().await;
            return Err(Error::NoContext(self.id.clone()));
        }
        *turn = Turn {
            kernel: Some(Arc::clone(&kernel)),
            environment: match self.language {
                // It sees no variables but those that it is told of.
                Language::Java => BTreeMap::new(),
                _ => environment,
            },
            life: self.shared.surroundings.life(),
            touched: false,
            notice: turn.notice.take(),
        };
        if let Some(prologue) = self.language.prologue() {
            self.own(&kernel, &prologue).await?;
        }
        Ok(kernel)
    }

    /// Runs lines of the daemon's own and waits for them.
    async fn own(&self, kernel: &Kernel, code: &str) -> Result<(), Error> {
        let pending = kernel.execute(code, Whose::Own).await?;
        if timeout(OWN_CODE, pending.done()).await.is_err() {
            tracing::warn!(language = self.language.name(), "the kernel is slow");
        }
        Ok(())
    }

    /// Sends the code and passes on what comes of it.
    async fn run(
        &self,
        turn: &mut Turn,
        kernel: &Kernel,
        code: &str,
        variables: &BTreeMap<String, String>,
        sink: &mut Sink,
    ) -> Result<Outcome, Error> {
        // Both are sent at once: a kernel does one after the other.
        let prepared = match self.prepare(turn, variables) {
            Some(code) => Some(kernel.execute(&code, Whose::Own).await?),
            None => None,
        };
        turn.touched = true;
        let mut pending = kernel.execute(code, Whose::Users).await?;
        drop(prepared);
        let mut progress = Progress::default();
        while !progress.is_done() {
            let event = tokio::select! {
                event = pending.next() => event,
                () = sink.gone() => return Ok(Outcome::Abandoned(pending)),
                // Of the two messages that say so, one has come, and the other got lost.
                () = sleep(STRAGGLER), if progress.is_nearly_done() => break,
            };
            match event {
                Event::Message(message) => progress.take(&message, sink),
                Event::Oversized(size) => sink.notice(&format!(
                    "An output of {size} bytes was dropped: the most is {MAX_MESSAGE}."
                )),
                Event::Ended(how) => return Ok(Outcome::Ended(how)),
            }
        }
        if kernel.straggles && !progress.has_spoken() {
            self.wait_for_stragglers(kernel, &mut pending, &mut progress, sink)
                .await?;
        }
        Ok(Outcome::Done)
    }

    /// Takes what a kernel says late: nothing comes later than what it is asked after that.
    async fn wait_for_stragglers(
        &self,
        kernel: &Kernel,
        pending: &mut Pending,
        progress: &mut Progress,
        sink: &mut Sink,
    ) -> Result<(), Error> {
        let nothing = kernel.execute("void 0", Whose::Own).await?;
        let mut heard = std::pin::pin!(timeout(STRAGGLER, nothing.heard()));
        while !progress.has_spoken() {
            tokio::select! {
                biased;
                event = pending.next() => match event {
                    Event::Message(message) => progress.take(&message, sink),
                    Event::Ended(_) => break,
                    Event::Oversized(_) => {}
                },
                _ = &mut heard => break,
            }
        }
        Ok(())
    }

    /// The lines that bring the kernel up to date before code of a user runs.
    fn prepare(&self, turn: &mut Turn, variables: &BTreeMap<String, String>) -> Option<String> {
        let environment = self.shared.environment();
        let life = self.shared.surroundings.life();
        let reseed = (life != turn.life).then(|| Reseed {
            seed: Uuid::new_v4().as_fields().0,
            untouched: !turn.touched,
        });
        let code = {
            let mut change = difference(&turn.environment, &environment);
            change.set.extend(pairs(variables));
            change.unset.retain(|name| !variables.contains_key(*name));
            change.reseed = reseed;
            self.language.apply(&change)
        };
        turn.environment = environment;
        turn.life = life;
        code
    }

    /// Takes back the variables of one execution.
    async fn restore(&self, turn: &Turn, kernel: &Kernel, variables: &BTreeMap<String, String>) {
        if variables.is_empty() {
            return;
        }
        let mut change = Change::default();
        for name in variables.keys() {
            match turn.environment.get(name) {
                Some(value) => _ = change.set.insert(name, value),
                None => change.unset.push(name),
            }
        }
        if let Some(code) = self.language.apply(&change)
            && let Err(error) = self.own(kernel, &code).await
        {
            tracing::debug!(%error, "the kernel keeps variables of an execution");
        }
    }

    /// Interrupts what nobody waits for any more, so that the next execution does not have to.
    async fn abandon(
        &self,
        turn: &mut Turn,
        kernel: &Kernel,
        pending: Pending,
        variables: &BTreeMap<String, String>,
    ) {
        let mut done = std::pin::pin!(pending.done());
        for _ in 0..INTERRUPTS {
            kernel.interrupt().await;
            if timeout(INTERRUPT, &mut done).await.is_ok() {
                return self.restore(turn, kernel, variables).await;
            }
        }
        tracing::warn!(
            language = self.language.name(),
            "a kernel cannot be interrupted"
        );
        kernel.kill().await;
        if !self.is_removed() {
            let _ = self.kernel(turn).await;
            turn.notice = Some(
                "The kernel could not be interrupted and was started again: what it held is gone."
                    .to_owned(),
            );
        }
    }
}

impl Shared {
    /// The kernel for a language.
    pub(crate) fn kernelspec(&self, language: &Language) -> Result<Kernelspec, Error> {
        self.search.kernel(language).ok_or_else(|| {
            let mut available: Vec<String> = self
                .search
                .kernels()
                .into_iter()
                .map(|spec| spec.language.name().to_owned())
                .collect();
            available.sort();
            available.dedup();
            Error::no_kernel(language, available)
        })
    }

    /// The environment that a kernel has: what every program has, under what the sandbox has.
    fn environment(&self) -> BTreeMap<String, String> {
        let path = std::env::join_paths(&self.search.path).map_or_else(
            |_| crate::PATH.to_owned(),
            |path| path.to_string_lossy().into_owned(),
        );
        let home = self
            .search
            .homes
            .first()
            .map_or("/root".into(), |home| home.to_string_lossy());
        let mut environment: BTreeMap<String, String> = [
            ("PATH", path.as_str()),
            ("HOME", &home),
            ("USER", "root"),
            ("LOGNAME", "root"),
            ("SHELL", "/bin/bash"),
            ("LANG", "C.UTF-8"),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
        environment.extend(self.surroundings.environment());
        environment.retain(|name, value| is_variable(name, value));
        environment
    }
}

/// Whether a program can have such a variable.
pub(crate) fn is_variable(name: &str, value: &str) -> bool {
    !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0')
}

fn pairs(variables: &BTreeMap<String, String>) -> impl Iterator<Item = (&str, &str)> {
    variables
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
}

/// What makes the environment `old` into `new`.
fn difference<'a>(
    old: &'a BTreeMap<String, String>,
    new: &'a BTreeMap<String, String>,
) -> Change<'a> {
    Change {
        set: pairs(new)
            .filter(|(name, value)| old.get(*name).is_none_or(|before| before != value))
            .collect(),
        unset: pairs(old)
            .map(|(name, _)| name)
            .filter(|name| !new.contains_key(*name))
            .collect(),
        reseed: None,
    }
}

fn failure(name: &str, value: String) -> Output {
    Output::Error {
        name: name.to_owned(),
        value,
        traceback: String::new(),
    }
}

/// How far an execution is.
#[derive(Default)]
struct Progress {
    valued: bool,
    failed: bool,
    idle: bool,
    replied: bool,
}

impl Progress {
    fn is_done(&self) -> bool {
        self.idle && self.replied
    }

    /// Whether what the code came to is known: its value, or why it has none.
    fn has_spoken(&self) -> bool {
        self.valued || self.failed
    }

    fn is_nearly_done(&self) -> bool {
        self.idle || self.replied
    }

    /// Passes on what a message says.
    fn take(&mut self, message: &Message, sink: &mut Sink) {
        if let Err(error) = self.try_take(message, sink) {
            let kind = &message.header.msg_type;
            tracing::warn!(%error, kind, "a kernel's message is dropped");
        }
    }

    fn try_take(&mut self, message: &Message, sink: &mut Sink) -> Result<(), crate::wire::Error> {
        match message.header.msg_type.as_str() {
            "stream" => {
                let content::Stream { name, text } = message.content()?;
                let text = Text {
                    text,
                    timestamp: message.header.date.clone(),
                };
                sink.send(&match name.as_str() {
                    "stderr" => Output::Stderr(text),
                    _ => Output::Stdout(text),
                });
            }
            kind @ ("display_data" | "execute_result") => {
                let content::Display { data } = message.content()?;
                self.valued |= kind == "execute_result";
                let rich = Rich::new(data, kind == "execute_result");
                sink.send(&Output::Result(Box::new(rich)));
            }
            "execute_input" => {
                let content::Input { execution_count } = message.content()?;
                sink.send(&Output::NumberOfExecutions { execution_count });
            }
            "error" => self.fail(message.content()?, sink),
            "status" => self.idle |= message.is_idle(),
            "execute_reply" => {
                self.replied = true;
                let reply: content::Failure = message.content()?;
                match reply.status.as_str() {
                    "error" => self.fail(reply, sink),
                    "abort" | "aborted" => self.fail(
                        content::Failure {
                            ename: "ExecutionAborted".to_owned(),
                            evalue: "Execution was aborted".to_owned(),
                            ..content::Failure::default()
                        },
                        sink,
                    ),
                    _ => {}
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// A kernel says twice that code failed; clients want to hear it once.
    fn fail(&mut self, failure: content::Failure, sink: &mut Sink) {
        if !std::mem::replace(&mut self.failed, true) {
            sink.send(&Output::Error {
                name: failure.ename,
                value: failure.evalue,
                traceback: failure.traceback.concat(),
            });
        }
    }
}

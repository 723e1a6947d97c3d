//! The code interpreter on its port, in sandboxes whose image has kernels.
//!
//! An image may get its kernels at any time: a step of a template's build installs them, or a user
//! does. So they are looked for whenever somebody asks for the port in vain, and a while after
//! programs have run; not at the beginning of a life, where it would be a third of all that a restored
//! sandbox does. A sandbox without kernels leaves the port to whoever wants it.

use std::{collections::BTreeMap, net::Ipv4Addr, path::PathBuf, sync::Arc, time::Duration};

use axum::serve::ListenerExt as _;
use cubicle_interpreter::{Interpreter, Search, Surroundings};
use cubicle_protocol::INTERPRETER_PORT;
use futures::{FutureExt as _, future::BoxFuture};
use tokio::{net::TcpListener, sync::Mutex};

use crate::{access::State, units};

/// Where kernels' files are while they run.
const DIRECTORY: &str = "run/cubicle/kernels";

/// How long after a program's start or end kernels are looked for, so that the next one does not wait
/// for that. Less than the time for which a template is left alone before its freeze. Who asks for the
/// port does not wait for this.
const LOOK_AFTER: Duration = Duration::from_secs(2);

/// Opens the interpreter's port when there is something to serve on it.
#[derive(Clone)]
pub struct Door {
    state: Arc<State>,
    /// The interpreter, once its port is open.
    open: Arc<Mutex<Option<Arc<Interpreter>>>>,
}

impl Door {
    /// The door of the sandbox with that state, closed.
    #[must_use]
    pub fn new(state: Arc<State>) -> Self {
        Self {
            state,
            open: Arc::default(),
        }
    }

    /// Opens the port if the image has kernels and nobody else listens there. False: it stays shut.
    pub async fn open(&self) -> bool {
        let mut open = self.open.lock().await;
        if open.is_some() {
            return true;
        }
        let interpreter = self.interpreter();
        if !interpreter.has_kernels() {
            return false;
        }
        let listener = match TcpListener::bind((Ipv4Addr::UNSPECIFIED, INTERPRETER_PORT)).await {
            Ok(listener) => listener,
            Err(error) => {
                tracing::info!(%error, port = INTERPRETER_PORT, "the code interpreter stays away");
                return false;
            }
        };
        // A stream's lines are not held back until the one before is acknowledged.
        let listener = listener.tap_io(|connection| drop(connection.set_nodelay(true)));
        let router = interpreter.router();
        tokio::spawn(async move {
            // Never ends: errors of single connections are not its own.
            let _ = axum::serve(listener, router).await;
        });
        units::serve(self.state.root(), Arc::clone(&interpreter));
        *open = Some(interpreter);
        true
    }

    /// Looks after the interpreter at the beginning of a life.
    pub(crate) async fn begin_life(&self) {
        let interpreter = self.open.lock().await.clone();
        if let Some(interpreter) = interpreter {
            interpreter.refresh().await;
        }
    }

    /// Opens the port once programs have installed kernels. Returns then.
    pub(crate) async fn wait_for_kernels(&self) {
        let mut programs = self.state.programs();
        while !self.open().await {
            // The sender lives in the state.
            if programs.changed().await.is_err() {
                return;
            }
            tokio::time::sleep(LOOK_AFTER).await;
            programs.mark_unchanged();
        }
    }

    /// What to do when somebody asks for a port on which nobody listens. True: somebody does now.
    pub(crate) fn knock(&self, port: u16) -> BoxFuture<'static, bool> {
        let door = self.clone();
        async move { port == INTERPRETER_PORT && door.open().await }.boxed()
    }

    fn interpreter(&self) -> Arc<Interpreter> {
        let mut search = Search::system();
        // The user whom the image says may have installed kernels for itself.
        if let Ok(user) = self.state.user(None)
            && !search.homes.contains(&user.home)
        {
            search.homes.push(user.home);
        }
        let surroundings: Arc<dyn Surroundings> = Arc::new(Sandbox(Arc::clone(&self.state)));
        Interpreter::new(surroundings, search, self.directory())
    }

    fn directory(&self) -> PathBuf {
        self.state.root().join(DIRECTORY)
    }
}

/// The sandbox, as the interpreter sees it.
struct Sandbox(Arc<State>);

impl Surroundings for Sandbox {
    fn environment(&self) -> BTreeMap<String, String> {
        self.0.settings().environment()
    }

    fn life(&self) -> String {
        let settings = self.0.settings();
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let generation = settings.generation.unwrap_or_default();
        format!(
            "{} {generation} {}",
            text(&settings.sandbox_id),
            text(&settings.nonce)
        )
    }
}

//! The daemon: everything that answers, in one thread.

use std::{convert::Infallible, io, net::Ipv4Addr, os::fd::OwnedFd, sync::Arc, time::Duration};

use axum::{Router, serve::ListenerExt as _};
use cubicle_protocol::ENVD_PORT;
use futures::FutureExt as _;
use tokio::net::TcpListener;

use crate::{
    access::State,
    channel::{self, Doors, Introduce, Port},
    http::Api,
    interpreter::Door,
    journal::{Journal, Level},
    process::Processes,
    proto::process::ProcessExt as _,
};

/// Threads for calls that block, which are those to the file system.
const MAX_BLOCKING_THREADS: usize = 16;
/// Their stacks, in bytes.
const BLOCKING_STACK: usize = 256 << 10;
/// They stay. A thread that ends gives little back, and every clone of a snapshot would run the end of
/// each of its threads for the first time, some seconds after its start: 1.5 MB of translated code.
const BLOCKING_KEEP: Duration = Duration::from_secs(365 * 24 * 3600);

/// Why the daemon ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The runtime could not be made.
    #[error("cannot start the runtime: {0}")]
    Runtime(#[source] io::Error),
    /// The channel failed, without which the host can do nothing with this guest.
    #[error("the channel failed: {0}")]
    Channel(#[source] io::Error),
}

/// What the daemon serves.
pub struct Services {
    /// For everybody who reaches the sandbox's port.
    pub public: Router,
    /// For the host, on the channel.
    pub host: Router,
    /// Becomes who the host says.
    pub introduce: Introduce,
    /// Of the code interpreter.
    pub interpreter: Door,
    journal: Arc<Journal>,
}

impl Services {
    /// The services of a sandbox that nobody has told anything yet.
    #[must_use]
    pub fn new() -> Self {
        let state = Arc::new(State::new());
        let journal = Arc::new(Journal::default());
        let processes = Processes::new(Arc::clone(&state), Arc::clone(&journal));
        let rpc = Arc::new(processes).register(connectrpc::Router::new());
        let interpreter = Door::new(Arc::clone(&state));
        let api = Api::new(state, rpc);
        let host = Arc::clone(&journal).router().merge(api.host_router());
        Self {
            public: api.public_router(),
            host,
            introduce: and_look_after_kernels(api.introduce(), interpreter.clone()),
            interpreter,
            journal,
        }
    }
}

impl Default for Services {
    fn default() -> Self {
        Self::new()
    }
}

/// Serves until the channel fails; without a channel for ever.
///
/// # Errors
/// [`Error`].
pub fn run(port: Option<OwnedFd>) -> Result<Infallible, Error> {
    spare_memory();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(MAX_BLOCKING_THREADS)
        .thread_stack_size(BLOCKING_STACK)
        .thread_keep_alive(BLOCKING_KEEP)
        .build()
        .map_err(Error::Runtime)?;
    runtime.block_on(async {
        let services = Services::new();
        tokio::spawn(listen(services.public.clone(), services.journal));
        let interpreter = services.interpreter;
        tokio::spawn({
            let interpreter = interpreter.clone();
            async move { interpreter.wait_for_kernels().await }
        });
        match port {
            Some(port) => {
                let port = Port::new(port).map_err(Error::Channel)?;
                let doors = Doors {
                    introduce: services.introduce,
                    host: services.host,
                    public: services.public,
                    knock: Arc::new(move |port| interpreter.knock(port)),
                };
                channel::serve(port, doors).await.map_err(Error::Channel)
            }
            None => std::future::pending().await,
        }
    })
}

/// Kernels that run must know of a new life. Nobody waits for that.
fn and_look_after_kernels(introduce: Introduce, interpreter: Door) -> Introduce {
    Arc::new(move |request| {
        let (introduced, interpreter) = (introduce(request), interpreter.clone());
        async move {
            let answer = introduced.await;
            tokio::spawn(async move { interpreter.begin_life().await });
            answer
        }
        .boxed()
    })
}

/// Serves programs inside the sandbox, and tunnels from outside, over HTTP/1.1 and HTTP/2.
async fn listen(router: Router, journal: Arc<Journal>) {
    let served = async {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, ENVD_PORT)).await?;
        // A stream's messages are not held back until the one before is acknowledged, which takes
        // 40 ms. Where this fails, they come late.
        let listener = listener.tap_io(|connection| drop(connection.set_nodelay(true)));
        axum::serve(listener, router).await
    };
    if let Err(error) = served.await {
        tracing::error!(%error, port = ENVD_PORT, "cannot listen");
        let fields = [
            ("port", ENVD_PORT.to_string()),
            ("error", error.to_string()),
        ];
        journal.note(Level::Error, "the daemon cannot listen", fields);
    }
}

/// One arena for all threads: every page that the daemon dirties is paid for in each snapshot.
fn spare_memory() {
    // SAFETY: sets parameters of the allocator, before any other thread exists.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

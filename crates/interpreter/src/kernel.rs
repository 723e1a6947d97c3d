//! A running kernel and the connections to it.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rustix::process::Signal;
use serde_json::{Map, json};
use tokio::{
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep, timeout, timeout_at},
};
use uuid::Uuid;

use crate::{
    Error,
    kernelspec::{Interrupt, Kernelspec, Search},
    output::content,
    ports::Ports,
    process::Process,
    wire::{Key, Message, Request},
    zmtp::{self, Received, Receiver, Sender, Socket},
};

/// How long a kernel may take to answer after its start. Under emulation and load, with cold files,
/// the largest take tens of seconds.
const START: Duration = Duration::from_secs(180);
/// Between attempts to reach a kernel that is starting.
const ATTEMPT: Duration = Duration::from_millis(20);
/// After which a kernel that is starting is asked again whether its output can be heard yet.
const ASK_AGAIN: Duration = Duration::from_millis(250);
/// How long a kernel has to end by itself.
const GRACE: Duration = Duration::from_secs(2);
/// Largest message that is taken from a kernel, in bytes.
pub(crate) const MAX_MESSAGE: u64 = 128 << 20;

/// What a kernel is started with.
pub(crate) struct Launch<'a> {
    pub(crate) spec: &'a Kernelspec,
    pub(crate) search: &'a Search,
    pub(crate) environment: &'a BTreeMap<String, String>,
    pub(crate) cwd: &'a Path,
    /// Where its files are.
    pub(crate) directory: &'a Path,
}

/// Whose code is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Whose {
    /// A user's: it is counted, and its value shown.
    Users,
    /// The daemon's: nobody sees anything of it.
    Own,
    /// The daemon's, run as much like a user's as can be without a trace, so that the next of a user's
    /// finds everything in place.
    Rehearsal,
}

/// Something that happened to a request.
#[derive(Debug)]
pub(crate) enum Event {
    /// The kernel's answer, or a part of it.
    Message(Message),
    /// A part of the answer was too large.
    Oversized(u64),
    /// The kernel ended, this way.
    Ended(String),
}

/// Who waits for answers to which request.
#[derive(Debug, Default)]
struct Routes(Mutex<HashMap<String, mpsc::UnboundedSender<Event>>>);

/// A request that was sent. Dropping it gives up its answers.
#[derive(Debug)]
pub(crate) struct Pending {
    id: String,
    routes: Arc<Routes>,
    events: mpsc::UnboundedReceiver<Event>,
}

/// A running kernel. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct Kernel {
    process: Arc<Process>,
    interrupt: Interrupt,
    /// See [`Kernelspec::straggles`].
    pub(crate) straggles: bool,
    session: String,
    key: Key,
    shell: tokio::sync::Mutex<Sender<OwnedWriteHalf>>,
    control: tokio::sync::Mutex<Sender<OwnedWriteHalf>>,
    /// Nothing is sent there, but closing one direction would end the other.
    _subscription: Sender<OwnedWriteHalf>,
    routes: Arc<Routes>,
    _readers: JoinSet<()>,
    _files: Files,
}

/// A kernel's connection file and ports.
#[derive(Debug)]
struct Files {
    connection: PathBuf,
    ports: Ports,
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.connection);
    }
}

impl Files {
    fn make(launch: &Launch<'_>, id: &str, key: &str) -> Result<Self, Error> {
        let failed = |what| move |source| Error::Prepare { what, source };
        let ports = Ports::reserve().map_err(failed("find ports"))?;
        fs::create_dir_all(launch.directory).map_err(failed("make a directory"))?;
        let connection = launch.directory.join(format!("{id}.json"));
        let [shell, iopub, control, stdin, heartbeat] = ports.numbers;
        let content = json!({
            "transport": "tcp",
            "ip": Ipv4Addr::LOCALHOST,
            "shell_port": shell,
            "iopub_port": iopub,
            "control_port": control,
            "stdin_port": stdin,
            "hb_port": heartbeat,
            "key": key,
            "signature_scheme": "hmac-sha256",
            "kernel_name": launch.spec.name,
        });
        let files = Self { connection, ports };
        let mut options = fs::OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        options
            .open(&files.connection)
            .and_then(|mut file| io::Write::write_all(&mut file, content.to_string().as_bytes()))
            .map_err(failed("write a connection file"))?;
        Ok(files)
    }
}

impl Kernel {
    /// Starts a kernel and waits until it answers.
    pub(crate) async fn start(launch: &Launch<'_>) -> Result<Self, Error> {
        let deadline = Instant::now() + START;
        let id = Uuid::new_v4().to_string();
        let key_text = Uuid::new_v4().simple().to_string() + &Uuid::new_v4().simple().to_string();
        let key = Key::new(&key_text);
        let files = Files::make(launch, &id, &key_text)?;
        let process = Arc::new(launch.spawn(&id, &files.connection)?);

        let routes = Arc::new(Routes::default());
        let mut readers = JoinSet::new();
        let [shell, iopub, control, ..] = files.ports.numbers;
        let connected = async {
            let (shell, replies) = connect(shell, Socket::Dealer).await?;
            let (subscription, outputs) = connect(iopub, Socket::Subscriber).await?;
            let (control, control_replies) = connect(control, Socket::Dealer).await?;
            for receiver in [replies, outputs, control_replies] {
                let (key, routes) = (key.clone(), Arc::clone(&routes));
                readers.spawn(async move { routes.fill(receiver, &key).await });
            }
            Ok::<_, Error>((shell, subscription, control))
        };
        let (shell, subscription, control) = tokio::select! {
            connected = timeout_at(deadline, connected) => match connected {
                Ok(connected) => connected?,
                Err(_) => return Err(launch.silent(&process)),
            },
            how = process.end() => return Err(launch.stillborn(how, &process)),
        };
        readers.spawn({
            let (process, routes) = (Arc::clone(&process), Arc::clone(&routes));
            async move {
                let how = process.end().await;
                routes.tell_all(|| Event::Ended(how.clone()));
            }
        });
        let kernel = Self {
            process,
            interrupt: launch.spec.interrupt,
            straggles: launch.spec.straggles,
            session: id,
            key,
            shell: tokio::sync::Mutex::new(shell),
            control: tokio::sync::Mutex::new(control),
            _subscription: subscription,
            routes,
            _readers: readers,
            _files: files,
        };
        match timeout_at(deadline, kernel.answers()).await {
            Ok(Ok(())) => Ok(kernel),
            Ok(Err(Failure::Ended(how))) => Err(launch.stillborn(how, &kernel.process)),
            Ok(Err(Failure::Connection(error))) => Err(error),
            Err(_) => Err(launch.silent(&kernel.process)),
        }
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&self) -> Option<String> {
        self.process.ended()
    }

    /// Sends code to be run.
    pub(crate) async fn execute(&self, code: &str, whose: Whose) -> Result<Pending, Error> {
        let content = content::Execute {
            code,
            silent: whose == Whose::Own,
            store_history: whose == Whose::Users,
            user_expressions: Map::new(),
            allow_stdin: false,
            // Code of a user is only sent when the one before is done. What may be thrown away are the
            // daemon's own lines after code that failed, and those have to run.
            stop_on_error: false,
        };
        let request = Request::new(&self.session, "execute_request", &content);
        self.send(&self.shell, &request).await
    }

    /// Asks it to stop what it is doing.
    pub(crate) async fn interrupt(&self) {
        match self.interrupt {
            Interrupt::Signal => self.process.signal(Signal::INT),
            Interrupt::Message => {
                let request = Request::new(&self.session, "interrupt_request", &json!({}));
                if let Err(error) = self.send(&self.control, &request).await {
                    tracing::debug!(%error, "cannot interrupt the kernel");
                }
            }
        }
    }

    /// Lets it end by itself, and kills it if it doesn't.
    pub(crate) async fn stop(&self) {
        let request = Request::new(
            &self.session,
            "shutdown_request",
            &json!({"restart": false}),
        );
        if self.send(&self.control, &request).await.is_ok() {
            let _ = timeout(GRACE, self.process.end()).await;
        }
        self.kill().await;
    }

    /// Kills it, and waits until it is gone.
    pub(crate) async fn kill(&self) {
        self.process.signal(Signal::KILL);
        self.process.end().await;
    }

    async fn send(
        &self,
        channel: &tokio::sync::Mutex<Sender<OwnedWriteHalf>>,
        request: &Request,
    ) -> Result<Pending, Error> {
        let (sender, events) = mpsc::unbounded_channel();
        self.routes.lock().insert(request.id.clone(), sender);
        let pending = Pending {
            id: request.id.clone(),
            routes: Arc::clone(&self.routes),
            events,
        };
        // Whoever ends from here on tells this request, too.
        if let Some(how) = self.process.ended() {
            self.routes.tell_all(|| Event::Ended(how.clone()));
        }
        let frames = request.encode(&self.key);
        let frames: Vec<&[u8]> = frames.iter().map(Vec::as_slice).collect();
        channel.lock().await.send(&frames).await?;
        Ok(pending)
    }

    /// Waits until it answers and its output can be heard: a subscription takes its time, and what
    /// is published before is lost.
    async fn answers(&self) -> Result<(), Failure> {
        let (mut replied, mut heard) = (false, false);
        loop {
            let request = Request::new(&self.session, "kernel_info_request", &json!({}));
            let mut pending = self
                .send(&self.shell, &request)
                .await
                .map_err(Failure::Connection)?;
            let again = Instant::now() + ASK_AGAIN;
            while let Ok(event) = timeout_at(again, pending.next()).await {
                match event {
                    Event::Message(message) if message.header.msg_type == "status" => heard = true,
                    Event::Message(message) if message.header.msg_type.ends_with("_reply") => {
                        replied = true
                    }
                    Event::Ended(how) => return Err(Failure::Ended(how)),
                    _ => {}
                }
                if replied && heard {
                    return Ok(());
                }
            }
        }
    }
}

enum Failure {
    Ended(String),
    Connection(Error),
}

impl Launch<'_> {
    fn spawn(&self, id: &str, connection: &Path) -> Result<Process, Error> {
        let command = self.spec.command(connection);
        let (name, arguments) = command
            .split_first()
            .map_or(("", &[][..]), |(name, rest)| (name, rest));
        let failed = |source| Error::Spawn {
            program: name.to_owned(),
            language: self.spec.language.name().to_owned(),
            source,
        };
        let program = self.search.program(name);
        let program = program.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
        let mut environment = self.environment.clone();
        for (name, value) in &self.spec.env {
            environment
                .entry(name.clone())
                .or_insert_with(|| value.clone());
        }
        let record = self.directory.join(format!("{id}.pid"));
        Process::start(&program, arguments, &environment, self.cwd, record).map_err(failed)
    }

    fn stillborn(&self, how: String, process: &Process) -> Error {
        Error::Stillborn {
            language: self.spec.language.name().to_owned(),
            how,
            said: process.said(),
        }
    }

    fn silent(&self, process: &Process) -> Error {
        Error::Silent {
            language: self.spec.language.name().to_owned(),
            seconds: START.as_secs(),
            said: process.said(),
        }
    }
}

/// Connects to a port that is about to be opened. Goes on trying until dropped.
async fn connect(
    port: u16,
    socket: Socket,
) -> Result<(Sender<OwnedWriteHalf>, Receiver<OwnedReadHalf>), Error> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    loop {
        match TcpStream::connect(address).await {
            // With nobody listening, localhost may connect a port to itself.
            Ok(stream) if stream.local_addr().ok() != Some(address) => {
                stream.set_nodelay(true).map_err(zmtp::Error::Io)?;
                let (reader, writer) = stream.into_split();
                return Ok(zmtp::handshake(reader, writer, socket, MAX_MESSAGE).await?);
            }
            _ => sleep(ATTEMPT).await,
        }
    }
}

impl Routes {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, mpsc::UnboundedSender<Event>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands out what comes until the connection ends.
    async fn fill(&self, mut receiver: Receiver<OwnedReadHalf>, key: &Key) {
        loop {
            match receiver.receive().await {
                Ok(Received::Message(frames)) => match Message::decode(&frames, key) {
                    Ok(message) => {
                        if let Some(route) = self.lock().get(&message.parent) {
                            let _ = route.send(Event::Message(message));
                        }
                    }
                    Err(error) => tracing::warn!(%error, "a kernel's message is dropped"),
                },
                Ok(Received::Oversized(size)) => self.tell_all(|| Event::Oversized(size)),
                Err(error) => {
                    tracing::debug!(%error, "a kernel's connection ended");
                    return;
                }
            }
        }
    }

    fn tell_all(&self, event: impl Fn() -> Event) {
        for route in self.lock().values() {
            let _ = route.send(event());
        }
    }
}

impl Pending {
    /// The next thing that happens.
    pub(crate) async fn next(&mut self) -> Event {
        match self.events.recv().await {
            Some(event) => event,
            // Its sender is in the table until this is dropped.
            None => std::future::pending().await,
        }
    }

    /// Waits until all of it has been heard.
    pub(crate) async fn heard(mut self) {
        loop {
            match self.next().await {
                Event::Message(message) if message.is_idle() => return,
                Event::Ended(_) => return,
                _ => {}
            }
        }
    }

    /// Waits until it is done, whatever comes of it.
    pub(crate) async fn done(mut self) {
        loop {
            match self.next().await {
                Event::Message(message) if message.is_idle() || message.is_reply() => return,
                Event::Ended(_) => return,
                _ => {}
            }
        }
    }
}

impl Message {
    /// Whether it says that all has been said.
    pub(crate) fn is_idle(&self) -> bool {
        self.header.msg_type == "status"
            && self
                .content::<content::Status>()
                .is_ok_and(|status| status.execution_state == "idle")
    }

    /// Whether it says how a request ended.
    pub(crate) fn is_reply(&self) -> bool {
        self.header.msg_type.ends_with("_reply")
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.routes.lock().remove(&self.id);
    }
}

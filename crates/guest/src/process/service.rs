use std::sync::Arc;

use buffa::EnumValue;
use connectrpc::{
    ConnectError, InboundStream, RequestContext, Response, ServiceRequest, ServiceResult,
    ServiceStream,
};
use futures::StreamExt as _;
use rustix::{process::Signal, termios::Winsize};
use tokio::io::Interest;

use super::{
    Error,
    events::{Events, describe},
    launch::{Launch, Launched, Stdio},
    output::ExitStatus,
    running::Process,
    supervise::{Reader, supervise},
    table::Table,
};
use crate::{
    access::{self, State},
    blocking::blocking,
    fds,
    journal::{Journal, Level},
    proto::process::{
        CloseStdinRequest, CloseStdinResponse, ConnectRequest, ConnectResponse, ListRequest,
        ListResponse, PTY, Process as Service, ProcessConfig, ProcessInfo, ProcessInput,
        ProcessSelector, SendInputRequest, SendInputResponse, SendSignalRequest,
        SendSignalResponse, Signal as WireSignal, StartRequest, StartResponse, StreamInputRequest,
        StreamInputResponse, UpdateRequest, UpdateResponse, process_input::Input,
        stream_input_request::Event as InputEvent,
    },
};

/// A terminal's size when the request says none, or a nonsensical one.
const DEFAULT_COLS: u16 = 80;
const DEFAULT_ROWS: u16 = 24;

/// The `process.Process` service.
pub struct Processes {
    state: Arc<State>,
    journal: Arc<Journal>,
    table: Arc<Table>,
}

impl Processes {
    /// A service without any process. Starts and ends are noted in `journal`.
    #[must_use]
    pub fn new(state: Arc<State>, journal: Arc<Journal>) -> Self {
        Self {
            state,
            journal,
            table: Arc::default(),
        }
    }

    /// Starts the program and everything that watches over it.
    async fn launch(&self, launch: &Launch<'_>, tag: Option<String>) -> Result<Started, Error> {
        let config = launch.config;
        let launched = if self.state.shares.any() {
            // The program, or its directory, may be in a share. What waits for that waits for this
            // thread, which must not wait, too.
            let (state, config) = (Arc::clone(&self.state), config.clone());
            let (stdio, deadline) = (launch.stdio, launch.deadline);
            let user = launch.user.map(str::to_owned);
            blocking(move || {
                let launch = Launch {
                    config: &config,
                    stdio,
                    user: user.as_deref(),
                    deadline,
                };
                launch.start(&state)
            })
            .await
        } else {
            launch.start(&self.state)
        };
        let Launched {
            child,
            stdin,
            terminal,
            outputs,
        } = launched.inspect_err(|error| {
            let fields = [("cmd", command_line(config))];
            self.journal.note(Level::Warn, &error.to_string(), fields);
        })?;
        let pid = child.pid;
        // Registering a descriptor fails only when there is no memory for it; the process is
        // killed then, because nobody could ever learn of it.
        let adopt = || -> std::io::Result<_> {
            let process = Process::new(pid, config.clone(), tag, stdin, terminal)?;
            let readers = outputs
                .into_iter()
                .map(|(source, fd)| Reader::new(source, fd))
                .collect::<std::io::Result<Vec<_>>>()?;
            Ok((Arc::new(process), readers))
        };
        let pidfd = fds::watch(child.pidfd, Interest::READABLE);
        let (pidfd, (process, readers)) = match pidfd.and_then(|pidfd| Ok((pidfd, adopt()?))) {
            Ok(adopted) => adopted,
            Err(source) => {
                if let Some(group) = rustix::process::Pid::from_raw(pid.cast_signed()) {
                    let _ = rustix::process::kill_process_group(group, Signal::KILL);
                    let _ = rustix::process::waitpid(
                        Some(group),
                        rustix::process::WaitOptions::empty(),
                    );
                }
                return Err(Error::Stdio {
                    what: "room to follow the output",
                    cmd: config.cmd.clone(),
                    source,
                });
            }
        };
        let subscriber = process.subscribe();
        self.table.insert(Arc::clone(&process));
        self.state.note_program();
        self.journal.note(
            Level::Info,
            "process started",
            [("pid", pid.to_string()), ("cmd", command_line(config))],
        );
        let (table, journal) = (Arc::clone(&self.table), Arc::clone(&self.journal));
        let state = Arc::clone(&self.state);
        let deadline = launch.deadline;
        tokio::spawn(async move {
            let status = supervise(&process, pidfd, readers, deadline).await;
            table.ended(&process);
            state.note_program();
            let level = match status {
                ExitStatus::Exited(0) => Level::Info,
                _ => Level::Warn,
            };
            let fields = [("pid", pid.to_string()), ("status", describe(status))];
            journal.note(level, "process ended", fields);
        });
        Ok(Started { pid, subscriber })
    }

    async fn input(&self, process: &Process, input: Option<&ProcessInput>) -> Result<(), Error> {
        match input.and_then(|input| input.input.as_ref()) {
            Some(Input::Stdin(bytes)) => process.write_stdin(bytes).await,
            Some(Input::Pty(bytes)) => process.write_terminal(bytes).await,
            None => Err(Error::Missing("input")),
        }
    }

    fn running(&self, selector: Option<&ProcessSelector>) -> Result<Arc<Process>, Error> {
        self.table
            .find_running(selector.ok_or(Error::Missing("process"))?)
    }
}

struct Started {
    pid: u32,
    subscriber: super::output::Subscriber,
}

fn command_line(config: &ProcessConfig) -> String {
    let words = std::iter::once(&config.cmd).chain(&config.args);
    words.map(String::as_str).collect::<Vec<_>>().join(" ")
}

fn window(pty: &PTY) -> Winsize {
    let size = pty.size.as_option();
    let or = |cells: Option<u32>, default| match cells.and_then(|n| u16::try_from(n).ok()) {
        None | Some(0) => default,
        Some(cells) => cells,
    };
    Winsize {
        ws_row: or(size.map(|size| size.rows), DEFAULT_ROWS),
        ws_col: or(size.map(|size| size.cols), DEFAULT_COLS),
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

#[allow(
    refining_impl_trait,
    reason = "says what every method answers; nobody implements the trait again"
)]
impl Service for Processes {
    async fn list(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, ListRequest>,
    ) -> ServiceResult<ListResponse> {
        let processes = self.table.running().into_iter().map(|process| ProcessInfo {
            config: process.config.clone().into(),
            pid: process.pid,
            tag: process.tag.clone(),
            ..ProcessInfo::default()
        });
        Response::ok(ListResponse {
            processes: processes.collect(),
            ..ListResponse::default()
        })
    }

    async fn connect(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, ConnectRequest>,
    ) -> ServiceResult<ServiceStream<ConnectResponse>> {
        let request = request.to_owned_message();
        let selector = request
            .process
            .as_option()
            .ok_or(Error::Missing("process"))?;
        let process = self.table.find(selector)?;
        // The deadline is that of this call, not of the process, which belongs to another one.
        let subscriber = process.subscribe();
        let events = Events::new(
            process.pid,
            subscriber,
            context.headers(),
            context.deadline(),
        );
        Response::ok(events.into_stream(|event| ConnectResponse {
            event: event.into(),
            ..ConnectResponse::default()
        }))
    }

    async fn start(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, StartRequest>,
    ) -> ServiceResult<ServiceStream<StartResponse>> {
        let request = request.to_owned_message();
        let user = access::caller(context.headers());
        let launch = Launch {
            config: request
                .process
                .as_option()
                .ok_or(Error::Missing("process"))?,
            stdio: match request.pty.as_option() {
                Some(pty) => Stdio::Terminal(window(pty)),
                None => Stdio::Pipes {
                    stdin: request.stdin.unwrap_or(true),
                },
            },
            user: user.as_deref().filter(|name| !name.is_empty()),
            deadline: context.deadline(),
        };
        let Started { pid, subscriber } = self.launch(&launch, request.tag).await?;
        let events = Events::new(pid, subscriber, context.headers(), context.deadline());
        Response::ok(events.into_stream(|event| StartResponse {
            event: event.into(),
            ..StartResponse::default()
        }))
    }

    async fn update(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, UpdateRequest>,
    ) -> ServiceResult<UpdateResponse> {
        let request = request.to_owned_message();
        let process = self.running(request.process.as_option())?;
        if let Some(pty) = request.pty.as_option() {
            process.resize(window(pty)).await?;
        }
        Response::ok(UpdateResponse::default())
    }

    async fn stream_input(
        &self,
        _: RequestContext,
        mut requests: InboundStream<StreamInputRequest>,
    ) -> ServiceResult<StreamInputResponse> {
        let mut process = None;
        while let Some(message) = requests.next().await {
            match message?.to_owned_message().event {
                Some(InputEvent::Start(start)) => {
                    process = Some(self.running(start.process.as_option())?);
                }
                Some(InputEvent::Data(data)) => {
                    let process = process.as_deref().ok_or(Error::Missing("process"))?;
                    self.input(process, data.input.as_option()).await?;
                }
                Some(InputEvent::Keepalive(_)) | None => {}
            }
        }
        Response::ok(StreamInputResponse::default())
    }

    async fn send_input(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, SendInputRequest>,
    ) -> ServiceResult<SendInputResponse> {
        let request = request.to_owned_message();
        let process = self.running(request.process.as_option())?;
        self.input(&process, request.input.as_option()).await?;
        Response::ok(SendInputResponse::default())
    }

    async fn send_signal(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, SendSignalRequest>,
    ) -> ServiceResult<SendSignalResponse> {
        let request = request.to_owned_message();
        let process = self.running(request.process.as_option())?;
        let signal = match request.signal {
            EnumValue::Known(WireSignal::SIGNAL_SIGKILL) => Signal::KILL,
            EnumValue::Known(WireSignal::SIGNAL_SIGTERM) => Signal::TERM,
            other => return Err(ConnectError::from(Error::BadSignal(other.to_i32()))),
        };
        process.signal(signal)?;
        Response::ok(SendSignalResponse::default())
    }

    async fn close_stdin(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, CloseStdinRequest>,
    ) -> ServiceResult<CloseStdinResponse> {
        let request = request.to_owned_message();
        self.running(request.process.as_option())?
            .close_stdin()
            .await?;
        Response::ok(CloseStdinResponse::default())
    }
}

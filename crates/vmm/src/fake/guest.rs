//! The guest of a fake VM: handshake, HTTP/2, a handful of answers.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    io,
    sync::{Arc, atomic::Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use cubicle_protocol::{
    ENVD_VERSION, ERROR_HEADER, ERROR_PORT_CLOSED,
    channel::{
        CONNECTION_WINDOW, Detector, Event, MAX_FRAME_SIZE, MAX_STREAMS, STREAM_WINDOW,
        introduction,
    },
    guest_api::{InitRequest, InitResponse, Introduced},
};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, ReadHalf, WriteHalf},
    sync::watch,
    task::JoinSet,
};

use super::{Behaviour, Memory, World, add, vm::Phase};

/// Bytes at the beginning of guest memory that hold [`State`] as JSON, padded with zeroes.
pub(super) const STATE_LEN: usize = 64 << 10;

/// Room in each direction between a life's HTTP/2 and the port, in bytes.
const LIFE_ROOM: usize = 64 << 10;

/// One connection of the host, as the guest sees it.
pub(super) struct Connection {
    pub(super) world: Arc<World>,
    pub(super) memory: Arc<Memory>,
    pub(super) phase: watch::Receiver<Phase>,
    pub(super) cpus: u32,
}

/// What the guest remembers, in its memory and nowhere else.
#[derive(Debug, Default, Serialize, Deserialize)]
struct State {
    nonce: Option<String>,
    env_vars: BTreeMap<String, String>,
}

/// Serves until the host hangs up or the VM ends.
pub(super) async fn serve(connection: Connection, port: DuplexStream) {
    let world = Arc::clone(&connection.world);
    add(&world.tally.connections);
    let mut phase = connection.phase.clone();
    let connection = Arc::new(connection);
    tokio::select! {
        // How a connection ended tells a guest nothing.
        _ = lives(&connection, port) => {}
        _ = phase.wait_for(|phase| *phase == Phase::Ended) => {}
    }
    world.tally.connections.fetch_sub(1, Ordering::Relaxed);
}

/// Passes payload to the present life; each hello ends it and begins another.
async fn lives(connection: &Arc<Connection>, port: DuplexStream) -> io::Result<()> {
    let (mut from_host, to_host) = tokio::io::split(port);
    let mut to_host = Some(to_host);
    let mut detector = Detector::new();
    let mut life: Option<Life> = None;
    let mut buffer = vec![0; 16 << 10];
    let mut phase = connection.phase.clone();
    loop {
        let read = from_host.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        // A guest that is stopped reads nothing, and a silent one answers nothing.
        let _ = phase.wait_for(|phase| *phase != Phase::Paused).await;
        if connection.world.behaviour().silent {
            continue;
        }
        let mut input = &buffer[..read];
        while let Some(event) = detector.next(&mut input) {
            match event {
                Event::Data(data) => {
                    // Before the first hello, or after a life broke off: nobody's.
                    if let Some(life) = &mut life
                        && life.input.write_all(data).await.is_err()
                    {
                        tracing::debug!("payload for a life that is over");
                    }
                }
                Event::Hello(hello) => {
                    if let Some(life) = life.take() {
                        to_host = Some(life.end().await);
                    }
                    let Some(mut output) = to_host.take() else {
                        return Ok(());
                    };
                    output.write_all(&hello.to_reply_bytes()).await?;
                    life = Some(Life::begin(Arc::clone(connection), output));
                }
            }
        }
    }
}

/// One life: HTTP/2 between the port and [`answer`].
struct Life {
    input: WriteHalf<DuplexStream>,
    tasks: JoinSet<Option<WriteHalf<DuplexStream>>>,
    stop: watch::Sender<bool>,
}

impl Life {
    fn begin(connection: Arc<Connection>, mut output: WriteHalf<DuplexStream>) -> Self {
        let (near, far) = tokio::io::duplex(LIFE_ROOM);
        let (mut from_life, input) = tokio::io::split(near);
        let (stop, mut stopped) = watch::channel(false);
        let mut phase = connection.phase.clone();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            tokio::select! {
                _ = copy_while_running(&mut from_life, &mut output, &mut phase) => {}
                _ = stopped.wait_for(|stopped| *stopped) => {}
            }
            Some(output)
        });
        tasks.spawn(async move {
            let mut far = far;
            let heard = introduction::hear(&mut far).await.ok()?;
            let introduced = introduce(&connection, heard);
            introduction::say(&mut far, &introduced).await.ok()?;
            let requests = service_fn(move |request| {
                let connection = Arc::clone(&connection);
                async move { Ok::<_, Infallible>(answer(&connection, request).await) }
            });
            let served = http2::Builder::new(TokioExecutor::new())
                .initial_connection_window_size(CONNECTION_WINDOW)
                .initial_stream_window_size(STREAM_WINDOW)
                .max_frame_size(MAX_FRAME_SIZE)
                .max_concurrent_streams(MAX_STREAMS)
                .serve_connection(TokioIo::new(far), requests)
                .await;
            if let Err(error) = served {
                tracing::debug!(%error, "a life of a fake guest ended");
            }
            None
        });
        Self { input, tasks, stop }
    }

    /// Ends it and gives the port back for the next one.
    async fn end(mut self) -> WriteHalf<DuplexStream> {
        self.stop.send_replace(true);
        loop {
            if let Some(Ok(Some(output))) = self.tasks.join_next().await {
                return output;
            }
        }
    }
}

async fn copy_while_running(
    from: &mut ReadHalf<DuplexStream>,
    to: &mut WriteHalf<DuplexStream>,
    phase: &mut watch::Receiver<Phase>,
) -> io::Result<()> {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        let _ = phase.wait_for(|phase| *phase != Phase::Paused).await;
        to.write_all(&buffer[..read]).await?;
    }
}

type Body = Full<Bytes>;

async fn answer(connection: &Connection, request: Request<Incoming>) -> Response<Body> {
    let behaviour = connection.world.behaviour();
    if request.method() == Method::CONNECT {
        return tunnel(&behaviour, request);
    }
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/health") => empty(StatusCode::NO_CONTENT),
        (&Method::GET, "/envs") => json_body(&remembered(&connection.memory).env_vars),
        (&Method::GET, "/metrics") => metrics(connection),
        _ => plain(StatusCode::NOT_FOUND, "a fake guest knows no such thing"),
    }
}

fn introduce(connection: &Connection, init: InitRequest) -> Introduced {
    if connection.world.behaviour().refuses_init {
        return Introduced::Refused("told to refuse".to_owned());
    }
    let before = remembered(&connection.memory);
    let nonce = init.nonce.or_else(|| before.nonce.clone());
    let state = State {
        nonce,
        env_vars: init.env_vars,
    };
    if remember(&connection.memory, &state).is_none() {
        return Introduced::Refused("too much to remember".to_owned());
    }
    Introduced::Became(InitResponse {
        previous_nonce: before.nonce,
        envd_version: ENVD_VERSION.to_owned(),
    })
}

fn remembered(memory: &Memory) -> State {
    let bytes = memory.read(0, STATE_LEN).unwrap_or_default();
    let end = bytes
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(bytes.len());
    serde_json::from_slice(&bytes[..end]).unwrap_or_default()
}

/// `None`: it does not fit.
fn remember(memory: &Memory, state: &State) -> Option<()> {
    let mut bytes = serde_json::to_vec(state).ok()?;
    if bytes.len() >= STATE_LEN {
        return None;
    }
    bytes.resize(STATE_LEN, 0);
    memory.write(0, &bytes)
}

fn metrics(connection: &Connection) -> Response<Body> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let total = connection.memory.len();
    json_body(&json!({
        "ts": now.as_secs(),
        "cpu_count": connection.cpus,
        "cpu_used_pct": 1.25,
        "mem_total": total,
        "mem_used": total / 4,
        "mem_cache": total / 8,
        "mem_total_mib": total >> 20,
        "mem_used_mib": total >> 22,
        "disk_used": 1 << 28,
        "disk_total": 1 << 30,
    }))
}

/// Echoes what comes through the tunnel until the host has said all.
fn tunnel(behaviour: &Behaviour, request: Request<Incoming>) -> Response<Body> {
    let port = request
        .uri()
        .authority()
        .and_then(|authority| authority.port_u16());
    let Some(port) = port else {
        return plain(StatusCode::BAD_REQUEST, "which port?");
    };
    if behaviour.closed_ports.contains(&port) {
        let mut refused = empty(StatusCode::BAD_GATEWAY);
        let reason = http::HeaderValue::from_static(ERROR_PORT_CLOSED);
        refused.headers_mut().insert(ERROR_HEADER, reason);
        return refused;
    }
    tokio::spawn(async move {
        if let Ok(upgraded) = hyper::upgrade::on(request).await {
            let (mut read, mut write) = tokio::io::split(TokioIo::new(upgraded));
            if tokio::io::copy(&mut read, &mut write).await.is_ok() {
                let _ = write.shutdown().await;
            }
        }
    });
    empty(StatusCode::OK)
}

fn empty(status: StatusCode) -> Response<Body> {
    plain(status, "")
}

fn plain(status: StatusCode, text: &str) -> Response<Body> {
    let mut response = Response::new(Full::new(Bytes::copy_from_slice(text.as_bytes())));
    *response.status_mut() = status;
    response
}

fn json_body(value: &impl Serialize) -> Response<Body> {
    let Ok(text) = serde_json::to_vec(value) else {
        return plain(StatusCode::INTERNAL_SERVER_ERROR, "no JSON");
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    let json = http::HeaderValue::from_static("application/json");
    response
        .headers_mut()
        .insert(http::header::CONTENT_TYPE, json);
    response
}

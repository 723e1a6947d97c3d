//! Lives, tunnels and the absence of the host, over a socket pair in the port's place.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::{Router, body::Body, routing::get};
use bytes::Bytes;
use cubicle_protocol::{
    ENVD_AUTHORITY, HOST_AUTHORITY,
    channel::{
        Hello, MAGIC, Nonce,
        host::{HostChannel, handshake},
        introduction,
    },
    guest_api::{InitRequest, InitResponse, Introduced},
};
use futures::FutureExt as _;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    net::{TcpListener, UnixStream},
    time::timeout,
};

use super::{Doors, Introduce, Knock, Port, serve};

type Sender = http2::SendRequest<Full<Bytes>>;

const SOON: Duration = Duration::from_secs(5);

/// Becomes whatever it is told to be.
fn agree() -> Introduce {
    Arc::new(|_| std::future::ready(Introduced::Became(InitResponse::default())).boxed())
}

/// Opens no port.
fn nobody() -> Knock {
    Arc::new(|_| std::future::ready(false).boxed())
}

/// A guest on one end of a socket pair; the other end.
fn guest(router: Router) -> StdUnixStream {
    let (host, guest) = StdUnixStream::pair().unwrap();
    let port = Port::new(OwnedFd::from(guest)).unwrap();
    tokio::spawn(async move {
        serve(
            port,
            Doors {
                introduce: agree(),
                host: router.clone(),
                public: router,
                knock: nobody(),
            },
        )
        .await
        .map(|never| match never {})
    });
    host
}

/// A connection to the same end: dropping it is what a server that restarts does. QEMU has a
/// connection of its own to each, so that shutting one down means nothing to the guest.
fn attach(host: &StdUnixStream) -> Attached {
    let host = host.try_clone().unwrap();
    host.set_nonblocking(true).unwrap();
    Attached(UnixStream::from_std(host).unwrap())
}

struct Attached(UnixStream);

impl AsyncRead for Attached {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Attached {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

async fn begin(host: &StdUnixStream) -> Sender {
    let channel = handshake(attach(host), Nonce::generate());
    let mut channel: HostChannel<_> = timeout(SOON, channel).await.unwrap().unwrap();
    let init = InitRequest::default();
    introduction::say(&mut channel, &init).await.unwrap();
    let heard = timeout(SOON, introduction::hear(&mut channel));
    assert!(matches!(
        heard.await.unwrap().unwrap(),
        Introduced::Became(_)
    ));
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .initial_connection_window_size(cubicle_protocol::channel::CONNECTION_WINDOW)
        .initial_stream_window_size(cubicle_protocol::channel::STREAM_WINDOW)
        .handshake(TokioIo::new(channel))
        .await
        .unwrap();
    tokio::spawn(connection);
    sender
}

async fn get_text(sender: &mut Sender, path: &str) -> String {
    let request = Request::get(format!("http://envd{path}"))
        .body(Full::default())
        .unwrap();
    let response = timeout(SOON, sender.send_request(request))
        .await
        .unwrap()
        .unwrap();
    let body = timeout(SOON, response.into_body().collect())
        .await
        .unwrap()
        .unwrap();
    String::from_utf8(body.to_bytes().to_vec()).unwrap()
}

async fn connect(sender: &mut Sender, authority: &str) -> Response<Incoming> {
    let request = Request::connect(authority).body(Full::default()).unwrap();
    timeout(SOON, sender.send_request(request))
        .await
        .unwrap()
        .unwrap()
}

fn hello_router() -> Router {
    Router::new().route("/hello", get(async || "hello"))
}

/// A body that never ends, and counts how many of its kind are alive.
struct Endless(Arc<AtomicUsize>);

impl Endless {
    fn new(alive: &Arc<AtomicUsize>) -> Self {
        alive.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(alive))
    }
}

impl Drop for Endless {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl http_body::Body for Endless {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Self::Error>>> {
        // Everything that the detector must not fall for, over and over.
        let piece = [&MAGIC[..], &[1], &MAGIC[..5], &[0; 4000]].concat();
        Poll::Ready(Some(Ok(http_body::Frame::data(Bytes::from(piece)))))
    }
}

#[tokio::test]
async fn requests_are_answered_and_magic_in_bodies_is_payload() {
    let echo = Router::new().route("/echo", axum::routing::post(async |body: Bytes| body));
    let host = guest(echo.layer(axum::extract::DefaultBodyLimit::disable()));
    let mut sender = begin(&host).await;
    let hello = Hello::new(Nonce::generate()).to_bytes();
    for body in [
        MAGIC.to_vec(),
        hello.to_vec(),
        MAGIC[..7].to_vec(),
        [&hello[..], &MAGIC, &[0, 1, 2], &[5; 99]]
            .concat()
            .repeat(10_000),
    ] {
        let body = Bytes::from(body);
        let request = Request::post("http://envd/echo")
            .body(Full::new(body.clone()))
            .unwrap();
        let response = timeout(SOON, sender.send_request(request))
            .await
            .unwrap()
            .unwrap();
        let echoed = timeout(SOON, response.into_body().collect())
            .await
            .unwrap()
            .unwrap();
        let echoed = echoed.to_bytes();
        let wrong = echoed.iter().zip(&body).position(|(a, b)| a != b);
        assert_eq!((echoed.len(), wrong), (body.len(), None));
    }
}

#[tokio::test]
async fn a_new_life_drops_everything_of_the_old_one() {
    let alive = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&alive);
    let router = hello_router().route(
        "/endless",
        get(move || async move { Body::new(Endless::new(&counter)) }),
    );
    let host = guest(router);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let authority = listener.local_addr().unwrap().to_string();

    for life in 0..5 {
        let mut sender = begin(&host).await;
        assert_eq!(
            get_text(&mut sender, "/hello").await,
            "hello",
            "life {life}"
        );
        let mut streams = Vec::new();
        for _ in 0..10 {
            let request = Request::get("http://envd/endless")
                .body(Full::default())
                .unwrap();
            streams.push(sender.send_request(request).await.unwrap());
        }
        assert_eq!(alive.load(Ordering::SeqCst), 10);
        let tunnel = connect(&mut sender, &authority).await;
        let (mut server, _) = listener.accept().await.unwrap();
        // The host goes away in the middle of everything, and its next life begins.
        drop((streams, tunnel, sender));
        let mut next = begin(&host).await;
        assert_eq!(get_text(&mut next, "/hello").await, "hello");
        assert_eq!(
            alive.load(Ordering::SeqCst),
            0,
            "streams of life {life} are still there"
        );
        let end = timeout(SOON, server.read(&mut [0])).await.unwrap();
        assert!(
            matches!(end, Ok(0) | Err(_)),
            "the tunnel of life {life} is still there"
        );
    }
}

#[tokio::test]
async fn a_hello_ends_a_life_that_was_cut_off_within_a_frame() {
    let host = guest(hello_router());
    for cut in [1, 5, 9, 12, 20, 30] {
        let mut raw = handshake(attach(&host), Nonce::generate()).await.unwrap();
        // The preface, settings, and a frame that announces more than ever comes.
        raw.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
            .await
            .unwrap();
        let frame = [&b"\0\x40\0\x01\x04\0\0\0\x01"[..], &MAGIC, &MAGIC, &[7; 40]].concat();
        raw.write_all(&frame[..cut]).await.unwrap();
        raw.flush().await.unwrap();
        drop(raw);
        let mut sender = begin(&host).await;
        assert_eq!(
            get_text(&mut sender, "/hello").await,
            "hello",
            "cut at {cut}"
        );
    }
}

#[tokio::test]
async fn one_reader_that_is_stuck_blocks_nobody() {
    let alive = Arc::new(AtomicUsize::new(0));
    let router = hello_router().route(
        "/endless",
        get(move || async move { Body::new(Endless::new(&alive)) }),
    );
    let host = guest(router);
    let mut sender = begin(&host).await;
    let mut stuck = Vec::new();
    for _ in 0..20 {
        let request = Request::get("http://envd/endless")
            .body(Full::default())
            .unwrap();
        stuck.push(
            timeout(SOON, sender.send_request(request))
                .await
                .unwrap()
                .unwrap(),
        );
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    for _ in 0..50 {
        assert_eq!(get_text(&mut sender, "/hello").await, "hello");
    }
}

#[tokio::test]
async fn a_tunnel_keeps_half_close_in_both_directions() {
    let host = guest(Router::new());
    let mut sender = begin(&host).await;
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let listener = TcpListener::bind(address).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut all = String::new();
            stream.read_to_string(&mut all).await.unwrap();
            stream
                .write_all(format!("got {all}").as_bytes())
                .await
                .unwrap();
        });
        let response = connect(&mut sender, &format!("127.0.0.1:{port}")).await;
        assert_eq!(response.status(), StatusCode::OK);
        let mut tunnel = TokioIo::new(hyper::upgrade::on(response).await.unwrap());
        tunnel.write_all(b"everything").await.unwrap();
        tunnel.shutdown().await.unwrap();
        let mut answer = String::new();
        timeout(SOON, tunnel.read_to_string(&mut answer))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(answer, "got everything");
        server.await.unwrap();
    }
}

#[tokio::test]
async fn a_port_may_be_opened_for_whoever_asks_for_it() {
    let (host, guest) = StdUnixStream::pair().unwrap();
    let knocks = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&knocks);
    let doors = Doors {
        introduce: agree(),
        host: Router::new(),
        public: Router::new(),
        knock: Arc::new(move |port| {
            counted.fetch_add(1, Ordering::Relaxed);
            async move {
                let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
                tokio::spawn(async move { axum::serve(listener, hello_router()).await });
                true
            }
            .boxed()
        }),
    };
    let port = Port::new(OwnedFd::from(guest)).unwrap();
    tokio::spawn(async move { serve(port, doors).await.map(|never| match never {}) });
    let mut sender = begin(&host).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let authority = listener.local_addr().unwrap().to_string();
    drop(listener);
    for _ in 0..2 {
        let response = connect(&mut sender, &authority).await;
        assert_eq!(response.status(), StatusCode::OK);
    }
    assert_eq!(knocks.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_closed_port_is_said_to_be_closed() {
    let host = guest(hello_router());
    let mut sender = begin(&host).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let authority = listener.local_addr().unwrap().to_string();
    drop(listener);
    let response = connect(&mut sender, &authority).await;
    assert_eq!(response.status(), StatusCode::BAD_GATEWAY);
    assert_eq!(
        response.headers()[cubicle_protocol::ERROR_HEADER],
        "port-closed"
    );
    assert_eq!(get_text(&mut sender, "/hello").await, "hello");
}

#[tokio::test]
async fn only_the_host_itself_gets_what_is_the_hosts() {
    let services = crate::daemon::Services::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let authority = listener.local_addr().unwrap().to_string();
    let public = services.public.clone();
    tokio::spawn(async move { axum::serve(listener, public).await });
    let (host, port) = StdUnixStream::pair().unwrap();
    let port = Port::new(OwnedFd::from(port)).unwrap();
    let doors = Doors {
        introduce: services.introduce,
        host: services.host,
        public: services.public,
        knock: nobody(),
    };
    tokio::spawn(async move { serve(port, doors).await.map(|never| match never {}) });
    let mut sender = begin(&host).await;
    for (method, path) in [("POST", "/sync"), ("GET", "/logs")] {
        let mut statuses = Vec::new();
        for authority in [HOST_AUTHORITY, ENVD_AUTHORITY] {
            let uri = format!("http://{authority}{path}");
            let request = Request::builder().method(method).uri(uri);
            let request = request.header("content-type", "application/json");
            let request = request.body(Full::new(Bytes::from_static(b"{"))).unwrap();
            let response = timeout(SOON, sender.send_request(request))
                .await
                .unwrap()
                .unwrap();
            statuses.push(response.status());
        }
        assert_ne!(statuses[0], StatusCode::NOT_FOUND, "{path}");
        assert_eq!(statuses[1], StatusCode::NOT_FOUND, "{path}");

        let response = connect(&mut sender, &authority).await;
        let mut tunnel = TokioIo::new(hyper::upgrade::on(response).await.unwrap());
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: {HOST_AUTHORITY}\r\ncontent-length: 2\r\n\
             content-type: application/json\r\nconnection: close\r\n\r\n{{}}"
        );
        tunnel.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        timeout(SOON, tunnel.read_to_string(&mut answer))
            .await
            .unwrap()
            .unwrap();
        assert!(
            answer.starts_with("HTTP/1.1 404 "),
            "{path} through a tunnel: {answer}"
        );
    }
}

/// The other end is gone for good, so `poll` says hang-up and `read` says 0 without end: as the
/// virtio port does while nobody is connected.
#[test]
fn the_host_being_away_costs_no_time() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let (host, port) = StdUnixStream::pair().unwrap();
        let port = Port::new(OwnedFd::from(port)).unwrap();
        drop(host);
        let before = thread_time();
        let serving = serve(
            port,
            Doors {
                introduce: agree(),
                host: hello_router(),
                public: hello_router(),
                knock: nobody(),
            },
        );
        assert!(timeout(Duration::from_secs(1), serving).await.is_err());
        let spent = thread_time() - before;
        assert!(
            spent < Duration::from_millis(20),
            "{spent:?} of CPU time in a second"
        );
    });
}

fn thread_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(
        time.tv_sec.unsigned_abs(),
        u32::try_from(time.tv_nsec).unwrap(),
    )
}

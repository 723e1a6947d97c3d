//! The link against a guest in this process that misbehaves on request.

use std::{
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
};

use cubicle_protocol::channel::{Detector, Event, Hello};
use cubicle_vmm::{ChannelStream, GuestMemory, VmRecord, VmUsage};
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

use super::*;

/// How the guest behaves.
#[derive(Default)]
struct Behaviour {
    /// This many hellos get no reply.
    deaf_to: AtomicU32,
    /// Connections end after the reply instead of serving.
    hang_up: AtomicU32,
    /// What arrives is swallowed: a daemon that knows nothing of this life.
    oblivious: std::sync::atomic::AtomicBool,
    /// `/init` is refused.
    refuse_init: std::sync::atomic::AtomicBool,
}

struct TestVm {
    id: SandboxId,
    guest: Arc<Guest>,
    exited: CancellationToken,
    /// Ends the connection that is being served, as a daemon that dies does.
    sever: Mutex<CancellationToken>,
    connections: AtomicU32,
}

#[derive(Default)]
struct Guest {
    behaviour: Behaviour,
    inits: Mutex<Vec<InitRequest>>,
    nonce: Mutex<Option<String>>,
}

impl TestVm {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            id: SandboxId::generate(),
            guest: Arc::default(),
            exited: CancellationToken::new(),
            sever: Mutex::default(),
            connections: AtomicU32::new(0),
        })
    }

    fn sever(&self) {
        self.sever.lock().unwrap().cancel();
    }

    async fn link(self: &Arc<Self>) -> Link {
        self.open(Identity {
            init: InitRequest::default(),
            restored: None,
        })
        .await
        .unwrap()
    }

    async fn open(self: &Arc<Self>, identity: Identity) -> Result<Link> {
        let opened = Link::open(self.clone(), &self.id, identity, Duration::from_secs(5)).await?;
        Ok(opened.0)
    }
}

#[async_trait::async_trait]
impl Vm for TestVm {
    fn record(&self) -> VmRecord {
        unreachable!("a link does not ask")
    }
    async fn connect_channel(&self) -> cubicle_vmm::Result<ChannelStream> {
        if self.exited.is_cancelled() {
            return Err(cubicle_vmm::Error::Gone {
                id: self.id.clone(),
            });
        }
        self.connections.fetch_add(1, SeqCst);
        let (host, guest) = duplex(1 << 16);
        let severed = CancellationToken::new();
        // One connection at a time, as with QEMU.
        std::mem::replace(&mut *self.sever.lock().unwrap(), severed.clone()).cancel();
        let daemon = self.guest.clone();
        tokio::spawn(async move { severed.run_until_cancelled(daemon.serve(guest)).await });
        Ok(Box::pin(host))
    }
    async fn pause(&self) -> cubicle_vmm::Result<()> {
        Ok(())
    }
    async fn resume(&self) -> cubicle_vmm::Result<()> {
        Ok(())
    }
    async fn save_device_state(&self, _to: &Path) -> cubicle_vmm::Result<u64> {
        unreachable!("a link does not ask")
    }
    fn memory(&self) -> cubicle_vmm::Result<GuestMemory> {
        unreachable!("a link does not ask")
    }
    async fn usage(&self) -> cubicle_vmm::Result<VmUsage> {
        unreachable!("a link does not ask")
    }
    async fn kill(&self) -> cubicle_vmm::Result<()> {
        Ok(())
    }
    async fn exited(&self) {
        self.exited.cancelled().await;
    }
}

/// Lowers a counter that is not zero; whether it was not.
fn take_one(counter: &AtomicU32) -> bool {
    counter
        .fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1))
        .is_ok()
}

impl Guest {
    /// What the daemon does with one connection of the port.
    async fn serve(self: Arc<Self>, io: DuplexStream) {
        let (mut from_host, mut to_host) = tokio::io::split(io);
        let (daemon, ours) = duplex(1 << 16);
        let (mut from_daemon, mut to_daemon) = tokio::io::split(ours);
        let mut detector = Detector::new();
        let mut buffer = vec![0; 1 << 16];
        // Up to the hello; what comes behind it in the same read is payload.
        let mut early = Vec::new();
        'hello: loop {
            let Ok(n @ 1..) = from_host.read(&mut buffer).await else {
                return;
            };
            let mut input = &buffer[..n];
            while let Some(event) = detector.next(&mut input) {
                let Event::Hello(hello) = event else { continue };
                if take_one(&self.behaviour.deaf_to) {
                    continue;
                }
                to_host
                    .write_all(b"left over from an older life")
                    .await
                    .unwrap();
                to_host
                    .write_all(&Hello::new(hello.nonce).to_reply_bytes())
                    .await
                    .unwrap();
                while let Some(Event::Data(data)) = detector.next(&mut input) {
                    early.extend_from_slice(data);
                }
                break 'hello;
            }
        }
        if take_one(&self.behaviour.hang_up) {
            return;
        }
        let pump_in = async {
            to_daemon.write_all(&early).await?;
            loop {
                let n = from_host.read(&mut buffer).await?;
                if n == 0 {
                    return Ok::<_, std::io::Error>(());
                }
                if self.behaviour.oblivious.load(SeqCst) {
                    continue;
                }
                let mut input = &buffer[..n];
                while let Some(Event::Data(data)) = detector.next(&mut input) {
                    to_daemon.write_all(data).await?;
                }
            }
        };
        let pump_out = tokio::io::copy(&mut from_daemon, &mut to_host);
        let service = service_fn(|request| self.clone().answer(request));
        let serve = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .serve_connection(TokioIo::new(daemon), service);
        tokio::select! { _ = pump_in => {}, _ = pump_out => {}, _ = serve => {} }
    }

    async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, std::convert::Infallible> {
        let mut response = Response::new(empty_body());
        match (request.method().clone(), request.uri().path()) {
            (Method::CONNECT, _) if request.uri().port_u16() == Some(7) => {
                tokio::spawn(async move {
                    let stream = hyper::upgrade::on(request).await.unwrap();
                    let (mut read, mut write) = tokio::io::split(TokioIo::new(stream));
                    tokio::io::copy(&mut read, &mut write).await.ok();
                    write.shutdown().await.ok();
                });
            }
            (Method::CONNECT, _) => {
                *response.status_mut() = StatusCode::BAD_GATEWAY;
                let closed = request.uri().port_u16() == Some(8);
                let why = if closed {
                    ERROR_PORT_CLOSED
                } else {
                    "no-descriptors"
                };
                response
                    .headers_mut()
                    .insert(ERROR_HEADER, HeaderValue::from_static(why));
            }
            (Method::POST, "/init") => {
                let body = request.into_body().collect().await.unwrap().to_bytes();
                let init: InitRequest = serde_json::from_slice(&body).unwrap();
                if self.behaviour.refuse_init.load(SeqCst) {
                    *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
                    *response.body_mut() = full_body("the random number generator is gone");
                    return Ok(response);
                }
                let mut nonce = self.nonce.lock().unwrap();
                let answer = InitResponse {
                    previous_nonce: nonce.clone(),
                    envd_version: "0".to_owned(),
                };
                *nonce = init.nonce.clone();
                self.inits.lock().unwrap().push(init);
                *response.body_mut() = full_body(serde_json::to_vec(&answer).unwrap());
            }
            (Method::GET, "/forever") => {
                let endless = futures::stream::unfold((), |()| async {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                    let frame = http_body::Frame::data(Bytes::from_static(&[7; 16 << 10]));
                    Some((Ok::<_, BoxError>(frame), ()))
                });
                *response.body_mut() = http_body_util::StreamBody::new(endless).boxed_unsync();
            }
            (Method::GET, "/never") => std::future::pending().await,
            _ => {
                let authority = request.uri().authority().unwrap().to_string();
                let host = request.headers().contains_key(header::HOST);
                let path = request.uri().path_and_query().unwrap().to_string();
                let body = request.into_body().collect().await.unwrap().to_bytes();
                let text = format!("{authority} {host} {path} {}", body.len());
                *response.body_mut() = full_body(text);
            }
        }
        Ok(response)
    }
}

fn get(path: &'static str) -> Request<Body> {
    Request::get(path).body(empty_body()).unwrap()
}

async fn text(response: Response<Body>) -> String {
    let body = response.into_body().collect().await.unwrap().to_bytes();
    String::from_utf8(body.to_vec()).unwrap()
}

#[tokio::test]
async fn a_request_keeps_its_path_and_body_and_gets_the_daemons_authority() {
    let vm = TestVm::new();
    let link = vm.link().await;
    let request = Request::post("https://49983-i0.example:1/files?path=a%20b")
        .header(header::HOST, "49983-i0.example")
        .body(full_body(vec![0xcb; 3 << 20]))
        .unwrap();
    let answer = link.request(request).await.unwrap();
    assert_eq!(
        text(answer).await,
        format!("envd false /files?path=a%20b {}", 3 << 20)
    );
}

#[tokio::test]
async fn each_life_begins_with_the_identity_and_fresh_clock_and_entropy() {
    let vm = TestVm::new();
    let init = InitRequest {
        access_token: Some("t".to_owned()),
        nonce: Some("n".to_owned()),
        ..InitRequest::default()
    };
    let link = vm
        .open(Identity {
            init: init.clone(),
            restored: None,
        })
        .await
        .unwrap();
    vm.sever();
    while vm.guest.inits.lock().unwrap().len() < 2 {
        tokio::task::yield_now().await;
    }
    text(link.request(get("/x")).await.unwrap()).await;

    let inits = vm.guest.inits.lock().unwrap();
    let [first, second] = &inits[..] else {
        panic!("{inits:?}")
    };
    assert_ne!(first.entropy, second.entropy);
    assert!(first.timestamp < second.timestamp);
    for told in [first, second] {
        assert_eq!(
            InitRequest {
                timestamp: None,
                entropy: None,
                ..told.clone()
            },
            init
        );
    }
}

#[tokio::test]
async fn a_lost_hello_is_sent_again_on_a_fresh_connection() {
    let vm = TestVm::new();
    vm.guest.behaviour.deaf_to.store(2, SeqCst);
    vm.link().await;
    assert_eq!(vm.connections.load(SeqCst), 3);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_never_answers_is_given_up_on_time() {
    let vm = TestVm::new();
    vm.guest.behaviour.deaf_to.store(u32::MAX, SeqCst);
    let begun = tokio::time::Instant::now();
    let error = vm
        .open(Identity {
            init: InitRequest::default(),
            restored: None,
        })
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Unanswered { .. }), "{error}");
    let took = begun.elapsed();
    assert!(
        took >= Duration::from_secs(5) && took < Duration::from_secs(6),
        "{took:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_hangs_up_is_not_called_in_a_tight_loop() {
    let vm = TestVm::new();
    vm.guest.behaviour.hang_up.store(u32::MAX, SeqCst);
    let error = vm
        .open(Identity {
            init: InitRequest::default(),
            restored: None,
        })
        .await
        .unwrap_err();
    assert!(
        matches!(error, Error::Broken { .. } | Error::Unanswered { .. }),
        "{error}"
    );
    assert!(vm.connections.load(SeqCst) < 20);
}

#[tokio::test]
async fn a_guest_that_refuses_its_identity_or_holds_other_memory_is_not_used() {
    let vm = TestVm::new();
    let snapshot = SnapshotId::generate();
    let identity = |nonce: &str| Identity {
        init: InitRequest::default(),
        restored: Some((snapshot.clone(), nonce.to_owned())),
    };
    *vm.guest.nonce.lock().unwrap() = Some("right".to_owned());
    let error = vm.open(identity("wrong")).await.unwrap_err();
    assert!(
        matches!(&error, Error::WrongMemory { snapshot: s, .. } if *s == snapshot),
        "{error}"
    );

    *vm.guest.nonce.lock().unwrap() = Some("right".to_owned());
    vm.open(identity("right")).await.unwrap();

    vm.guest.behaviour.refuse_init.store(true, SeqCst);
    let error = vm.open(identity("right")).await.unwrap_err().to_string();
    assert!(
        error.contains("500") && error.contains("generator is gone"),
        "{error}"
    );
}

#[tokio::test]
async fn a_tunnel_carries_both_directions_and_a_closed_port_is_told_from_other_failures() {
    let vm = TestVm::new();
    let link = vm.link().await;
    let mut stream = link.connect(7).await.unwrap();
    let payload: Vec<u8> = (0..5 << 20).map(|n: u32| (n >> 8) as u8).collect();
    let (mut read, mut write) = tokio::io::split(&mut stream);
    let mut echo = Vec::new();
    let (sent, got) = tokio::join!(
        async {
            write.write_all(&payload).await?;
            write.shutdown().await
        },
        read.read_to_end(&mut echo),
    );
    sent.unwrap();
    got.unwrap();
    assert!(echo == payload);

    assert!(matches!(
        link.connect(8).await,
        Err(Error::PortClosed { port: 8, .. })
    ));
    assert!(matches!(
        link.connect(9).await,
        Err(Error::Tunnel { port: 9, .. })
    ));
}

#[tokio::test]
async fn a_reader_that_stopped_reading_holds_up_nobody_else() {
    let vm = TestVm::new();
    let link = vm.link().await;
    let mut stuck = Vec::new();
    for _ in 0..4 {
        stuck.push(link.request(get("/forever")).await.unwrap());
    }
    // Long enough for all of them to fill their windows.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let answer = tokio::time::timeout(Duration::from_secs(5), link.request(get("/x"))).await;
    assert_eq!(text(answer.unwrap().unwrap()).await, "envd false /x 0");
}

#[tokio::test]
async fn when_a_life_breaks_its_streams_fail_and_the_next_request_finds_a_new_one() {
    let vm = TestVm::new();
    let link = vm.link().await;
    let mut forever = link.request(get("/forever")).await.unwrap().into_body();
    let mut tunnel = link.connect(7).await.unwrap();
    let pending = link.request(get("/never"));
    let sever = async {
        tokio::task::yield_now().await;
        vm.sever();
    };
    let (pending, ()) = tokio::join!(pending, sever);
    assert!(
        matches!(pending, Err(Error::Broken { .. })),
        "never sent twice: {pending:?}"
    );
    let failed = loop {
        match forever.frame().await {
            Some(Ok(_)) => {}
            Some(Err(_)) => break true,
            None => break false,
        }
    };
    assert!(failed, "a body that was cut short must not look complete");
    assert!(!matches!(tunnel.read(&mut [0; 1]).await, Ok(1)));
    assert_eq!(
        text(link.request(get("/y")).await.unwrap()).await,
        "envd false /y 0"
    );
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_was_replaced_behind_our_back_is_found_out() {
    let vm = TestVm::new();
    let link = vm.link().await;
    let quiet = tokio::time::timeout(Duration::from_secs(300), link.request(get("/never"))).await;
    assert!(
        quiet.is_err(),
        "a healthy life is not ended for being quiet"
    );

    vm.guest.behaviour.oblivious.store(true, SeqCst);
    let begun = tokio::time::Instant::now();
    let lost = link.request(get("/x")).await;
    assert!(matches!(lost, Err(Error::Broken { .. })), "{lost:?}");
    assert!(begun.elapsed() < Duration::from_secs(60));
    vm.guest.behaviour.oblivious.store(false, SeqCst);
    assert_eq!(
        text(link.request(get("/y")).await.unwrap()).await,
        "envd false /y 0"
    );
}

#[tokio::test]
async fn closing_fails_what_is_under_way_and_everything_after() {
    let vm = TestVm::new();
    let link = vm.link().await;
    let never = link.request(get("/never"));
    let close = async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        link.close();
    };
    let (never, ()) = tokio::join!(never, close);
    assert!(matches!(never, Err(Error::Killed { .. })), "{never:?}");
    assert!(matches!(
        link.request(get("/x")).await,
        Err(Error::Killed { .. })
    ));
    assert!(matches!(link.connect(7).await, Err(Error::Killed { .. })));
    assert_eq!(vm.connections.load(SeqCst), 1, "no life after the end");
}

#[tokio::test]
async fn when_the_vm_ends_requests_fail_at_once() {
    let vm = TestVm::new();
    let link = vm.link().await;
    vm.exited.cancel();
    vm.sever();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let failed = tokio::time::timeout(Duration::from_secs(1), link.request(get("/x"))).await;
    assert!(
        matches!(failed, Ok(Err(Error::Killed { .. } | Error::Broken { .. }))),
        "{failed:?}"
    );
}

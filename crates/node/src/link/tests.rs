//! The link against a guest in this process that misbehaves on request.

use std::sync::atomic::Ordering::SeqCst;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;
use crate::testing::TestVm;

async fn open(vm: &Arc<TestVm>, identity: Identity) -> Result<Link> {
    Ok(
        Link::open(vm.clone(), &vm.id, identity, Duration::from_secs(5))
            .await?
            .0,
    )
}

async fn link(vm: &Arc<TestVm>) -> Link {
    open(vm, nobody()).await.unwrap()
}

fn nobody() -> Identity {
    Identity {
        init: InitRequest::default(),
        restored: None,
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
    let link = link(&vm).await;
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
    let link = open(
        &vm,
        Identity {
            init: init.clone(),
            restored: None,
        },
    )
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
    link(&vm).await;
    assert_eq!(vm.connections.load(SeqCst), 3);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_never_answers_is_given_up_on_time() {
    let vm = TestVm::new();
    vm.guest.behaviour.deaf_to.store(u32::MAX, SeqCst);
    let begun = tokio::time::Instant::now();
    let error = open(&vm, nobody()).await.unwrap_err();
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
    let error = open(&vm, nobody()).await.unwrap_err();
    assert!(
        matches!(error, Error::GuestAnswer { .. } | Error::Unanswered { .. }),
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
    let error = open(&vm, identity("wrong")).await.unwrap_err();
    assert!(
        matches!(&error, Error::WrongMemory { snapshot: s, .. } if *s == snapshot),
        "{error}"
    );

    *vm.guest.nonce.lock().unwrap() = Some("right".to_owned());
    open(&vm, identity("right")).await.unwrap();

    vm.guest.behaviour.refuse_init.store(true, SeqCst);
    let error = open(&vm, identity("right")).await.unwrap_err().to_string();
    assert!(error.contains("generator is gone"), "{error}");
}

#[tokio::test]
async fn a_tunnel_carries_both_directions_and_a_closed_port_is_told_from_other_failures() {
    let vm = TestVm::new();
    let link = link(&vm).await;
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
    let link = link(&vm).await;
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
    let link = link(&vm).await;
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
    let link = link(&vm).await;
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
    let link = link(&vm).await;
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
    let link = link(&vm).await;
    vm.exited.cancel();
    vm.sever();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let failed = tokio::time::timeout(Duration::from_secs(1), link.request(get("/x"))).await;
    assert!(
        matches!(failed, Ok(Err(Error::Killed { .. } | Error::Broken { .. }))),
        "{failed:?}"
    );
}

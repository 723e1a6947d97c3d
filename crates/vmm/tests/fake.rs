//! The driver for tests, spoken to the way the node does: handshake, HTTP/2, tunnels.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::{fs, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use cubicle_ids::SandboxId;
use cubicle_protocol::{
    ENVD_VERSION, ERROR_HEADER, ERROR_PORT_CLOSED,
    channel::{Nonce, host::handshake, introduction},
    guest_api::{InitRequest, InitResponse, Introduced},
};
use cubicle_vmm::{
    Boot, Error, Hypervisor as _, Vm, VmSpec,
    fake::{Behaviour, Counts, Fake, FakeVm, Step},
};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    time::timeout,
};

const SOON: Duration = Duration::from_millis(100);
const LATER: Duration = Duration::from_secs(10);

fn spec(dir: &Path, boot: Boot) -> VmSpec {
    let id = SandboxId::generate();
    VmSpec::new(id.clone(), dir.join(id.as_str()), 200_000, 1, 64, boot)
}

fn cold(dir: &Path) -> Boot {
    let file = dir.join("kernel");
    fs::write(&file, "a kernel").unwrap();
    Boot::Cold {
        kernel: file.clone(),
        initramfs: file,
        cmdline: String::new(),
    }
}

struct Client(http2::SendRequest<Full<Bytes>>);

impl Client {
    async fn connect(vm: &dyn Vm) -> Self {
        Self::introduce(vm, &json!({})).await.0
    }

    /// Says who the guest is to be; also what it said to that.
    async fn introduce(vm: &dyn Vm, init: &Value) -> (Self, InitResponse) {
        let stream = vm.connect_channel().await.unwrap();
        let mut channel = handshake(stream, Nonce::generate()).await.unwrap();
        let answer = match introduced(&mut channel, init).await {
            Introduced::Became(answer) => answer,
            Introduced::Refused(why) => panic!("{why}"),
        };
        (Self::over(channel).await, answer)
    }

    async fn over<T>(channel: T) -> Self
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(channel))
            .await
            .unwrap();
        tokio::spawn(connection);
        Self(sender)
    }

    async fn send(&mut self, method: Method, uri: &str, body: &Value) -> Response<Incoming> {
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        let request = Request::builder()
            .method(method)
            .uri(uri)
            .body(Full::from(body))
            .unwrap();
        self.0.send_request(request).await.unwrap()
    }
}

async fn introduced<T>(channel: &mut T, init: &Value) -> Introduced
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let init: InitRequest = serde_json::from_value(init.clone()).unwrap();
    introduction::say(channel, &init).await.unwrap();
    introduction::hear(channel).await.unwrap()
}

async fn json_of(response: Response<Incoming>) -> Value {
    let body = response.into_body().collect().await.unwrap().to_bytes();
    serde_json::from_slice(&body).unwrap()
}

/// Copies guest memory from outside, as the snapshot store does.
fn copy_memory(vm: &dyn Vm, to: &Path) {
    let memory = vm.memory().unwrap();
    let mut image = Vec::new();
    for range in &memory.ranges {
        let mut buffer = vec![0_u8; usize::try_from(range.len).unwrap()];
        let local = libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        let remote = libc::iovec {
            iov_base: range.host_address as *mut libc::c_void,
            iov_len: buffer.len(),
        };
        // SAFETY: the kernel checks the addresses; ours is a live buffer of that length.
        let read = unsafe {
            libc::process_vm_readv(memory.pid, &raw const local, 1, &raw const remote, 1, 0)
        };
        assert_eq!(usize::try_from(read).unwrap(), buffer.len());
        image.extend_from_slice(&buffer);
    }
    fs::write(to, image).unwrap();
}

#[tokio::test]
async fn a_guest_remembers_in_its_memory_what_it_was_told() {
    let (fake, dir) = (Fake::new(), tempfile::tempdir().unwrap());
    let vm = fake
        .launch(spec(dir.path(), cold(dir.path())))
        .await
        .unwrap();
    let told = json!({ "envVars": { "A": "1" }, "nonce": "n1" });
    let (mut client, first) = Client::introduce(&*vm, &told).await;
    assert_eq!(
        (first.previous_nonce, first.envd_version.as_str()),
        (None, ENVD_VERSION)
    );
    let health = client
        .send(Method::GET, "http://envd/health", &Value::Null)
        .await;
    assert_eq!(health.status(), StatusCode::NO_CONTENT);
    let metrics = json_of(
        client
            .send(Method::GET, "http://envd/metrics", &Value::Null)
            .await,
    )
    .await;
    assert_eq!(
        (&metrics["cpu_count"], &metrics["mem_total_mib"]),
        (&json!(1), &json!(64))
    );
    let own = fake.vm(&vm.record().id).unwrap();
    own.write_memory(FakeVm::RESERVED, b"dirty").unwrap();

    vm.pause().await.unwrap();
    let ping = client.send(Method::GET, "http://envd/health", &Value::Null);
    assert!(
        timeout(SOON, ping).await.is_err(),
        "a paused guest answers nothing"
    );
    let (memory, device_state) = (dir.path().join("memory"), dir.path().join("state"));
    let len = vm.save_device_state(&device_state).await.unwrap();
    assert_eq!(fs::metadata(&device_state).unwrap().len(), len);
    copy_memory(&*vm, &memory);
    vm.resume().await.unwrap();
    drop(client);
    Client::introduce(&*vm, &json!({ "nonce": "n2" })).await;

    let boot = Boot::Restore {
        memory,
        device_state,
    };
    let mut restored = spec(dir.path(), boot.clone());
    restored.start = false;
    let child = fake.launch(restored).await.unwrap();
    let own = fake.vm(&child.record().id).unwrap();
    assert_eq!(own.read_memory(FakeVm::RESERVED, 5).unwrap(), b"dirty");
    assert!(
        timeout(SOON, Client::connect(&*child)).await.is_err(),
        "it was not resumed"
    );
    child.resume().await.unwrap();
    let (_, answer) = Client::introduce(&*child, &json!({ "nonce": "n3" })).await;
    assert_eq!(answer.previous_nonce.as_deref(), Some("n1"));
    let (_, answer) = Client::introduce(&*vm, &json!({})).await;
    assert_eq!(answer.previous_nonce.as_deref(), Some("n2"));

    let mut wrong = spec(dir.path(), boot);
    wrong.cpus = 2;
    assert!(matches!(
        fake.launch(wrong).await,
        Err(Error::InvalidSpec { .. })
    ));
    for vm in [vm, child] {
        vm.kill().await.unwrap();
        assert!(!vm.record().run_dir.exists());
    }
    assert_eq!(fake.counts().running, 0);
}

#[tokio::test]
async fn tunnels_echo_and_say_when_a_port_is_closed() {
    let (fake, dir) = (Fake::new(), tempfile::tempdir().unwrap());
    fake.behave(Behaviour {
        closed_ports: [81].into(),
        ..Behaviour::default()
    });
    let vm = fake
        .launch(spec(dir.path(), cold(dir.path())))
        .await
        .unwrap();
    let mut client = Client::connect(&*vm).await;
    let refused = client
        .send(Method::CONNECT, "127.0.0.1:81", &Value::Null)
        .await;
    assert_eq!(refused.status(), StatusCode::BAD_GATEWAY);
    assert_eq!(refused.headers()[ERROR_HEADER], ERROR_PORT_CLOSED);

    let opened = client
        .send(Method::CONNECT, "127.0.0.1:80", &Value::Null)
        .await;
    assert_eq!(opened.status(), StatusCode::OK);
    let mut tunnel = TokioIo::new(hyper::upgrade::on(opened).await.unwrap());
    let sent = vec![0x5a; 300_000];
    let (mut read, mut write) = tokio::io::split(&mut tunnel);
    let writing = async {
        write.write_all(&sent).await.unwrap();
        write.shutdown().await.unwrap();
    };
    let mut received = Vec::new();
    let (_, result) = tokio::join!(writing, read.read_to_end(&mut received));
    result.unwrap();
    assert!(received == sent, "{} bytes came back", received.len());
    // A second life on a fresh connection does not depend on the first.
    let mut second = Client::connect(&*vm).await;
    let health = second
        .send(Method::GET, "http://envd/health", &Value::Null)
        .await;
    assert_eq!(health.status(), StatusCode::NO_CONTENT);
    drop((client, second, tunnel));
    vm.kill().await.unwrap();
    timeout(LATER, async {
        while fake.counts().connections > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("connections end with their VM");
}

#[tokio::test]
async fn a_second_hello_on_the_same_connection_begins_a_new_life() {
    let (fake, dir) = (Fake::new(), tempfile::tempdir().unwrap());
    let vm = fake
        .launch(spec(dir.path(), cold(dir.path())))
        .await
        .unwrap();
    let mut stream = vm.connect_channel().await.unwrap();
    for round in 0..3 {
        let channel = timeout(LATER, handshake(&mut stream, Nonce::generate()))
            .await
            .unwrap();
        let mut channel = channel.unwrap();
        // Half a request, so that a life is always in the middle of something.
        channel
            .write_all(b"PRI * HTTP/2.0\r\n\r\nSM")
            .await
            .unwrap();
        channel.flush().await.unwrap();
        assert_eq!(fake.counts().connections, 1, "round {round}");
    }
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn every_step_can_fail_and_nothing_is_left() {
    let (fake, dir) = (Fake::new(), tempfile::tempdir().unwrap());
    fake.behave(Behaviour::failing(Step::Launch));
    let refused = spec(dir.path(), cold(dir.path()));
    let run_dir = refused.run_dir.clone();
    assert!(matches!(
        fake.launch(refused).await,
        Err(Error::Injected { .. })
    ));
    assert!(!run_dir.exists());
    fake.behave(Behaviour::default());
    let vm = fake
        .launch(spec(dir.path(), cold(dir.path())))
        .await
        .unwrap();
    let record = vm.record();
    for step in [
        Step::Pause,
        Step::Resume,
        Step::SaveDeviceState,
        Step::Memory,
        Step::Usage,
    ] {
        fake.behave(Behaviour::failing(step));
        let outcome = match step {
            Step::Pause => vm.pause().await,
            Step::Resume => vm.resume().await,
            Step::SaveDeviceState => vm.save_device_state(&dir.path().join("s")).await.map(drop),
            Step::Memory => vm.memory().map(drop),
            _ => vm.usage().await.map(drop),
        };
        assert!(
            matches!(outcome, Err(Error::Injected { .. })),
            "{step:?}: {outcome:?}"
        );
    }
    fake.behave(Behaviour::failing(Step::Connect));
    assert!(matches!(
        vm.connect_channel().await,
        Err(Error::Injected { .. })
    ));
    fake.behave(Behaviour::failing(Step::Adopt));
    assert!(matches!(
        fake.adopt(&record).await,
        Err(Error::Injected { .. })
    ));
    fake.behave(Behaviour::failing(Step::Kill));
    assert!(vm.kill().await.is_err());
    assert_eq!(fake.counts().running, 1);
    fake.behave(Behaviour::default());
    drop(vm);
    let vm = fake
        .adopt(&record)
        .await
        .unwrap()
        .expect("it lives on in the driver");
    vm.kill().await.unwrap();
    vm.kill().await.unwrap();
    assert!(!record.run_dir.exists());
    assert!(fake.adopt(&record).await.unwrap().is_none());
    let expected = Counts {
        launched: 1,
        adopted: 1,
        killed: 1,
        ..Counts::default()
    };
    assert_eq!(fake.counts(), expected);
}

#[tokio::test]
async fn a_vm_can_be_silent_and_short_lived() {
    let (fake, dir) = (Fake::new(), tempfile::tempdir().unwrap());
    let dies_after = Some(Duration::from_millis(200));
    fake.behave(Behaviour {
        silent: true,
        dies_after,
        ..Behaviour::default()
    });
    let vm = fake
        .launch(spec(dir.path(), cold(dir.path())))
        .await
        .unwrap();
    let stream = vm.connect_channel().await.unwrap();
    assert!(
        timeout(SOON, handshake(stream, Nonce::generate()))
            .await
            .is_err()
    );
    let watched = Arc::clone(&vm);
    timeout(LATER, async move { watched.exited().await })
        .await
        .expect("it dies");
    assert!(matches!(
        vm.connect_channel().await,
        Err(Error::Gone { .. })
    ));
    assert!(matches!(vm.pause().await, Err(Error::Gone { .. })));
    assert!(
        vm.record().run_dir.exists(),
        "what it left is removed by a kill"
    );
    vm.kill().await.unwrap();
    assert!(!vm.record().run_dir.exists());
    let counts = fake.counts();
    assert_eq!((counts.died, counts.killed, counts.running), (1, 0, 0));
}

#[tokio::test]
async fn a_guest_can_refuse_its_init() {
    let (fake, dir) = (Fake::new(), tempfile::tempdir().unwrap());
    fake.behave(Behaviour {
        refuses_init: true,
        ..Behaviour::default()
    });
    let vm = fake
        .launch(spec(dir.path(), cold(dir.path())))
        .await
        .unwrap();
    let stream = vm.connect_channel().await.unwrap();
    let mut channel = handshake(stream, Nonce::generate()).await.unwrap();
    let answer = introduced(&mut channel, &json!({})).await;
    assert!(matches!(answer, Introduced::Refused(_)), "{answer:?}");
    vm.kill().await.unwrap();
}

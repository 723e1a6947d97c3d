//! A line to a registry that can be cut, and tells how much went over it.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

#[derive(Debug, Default)]
struct State {
    bytes: AtomicU64,
    cuts: AtomicU32,
    cuts_until_refusing: AtomicU32,
    counts_down: AtomicBool,
    refuses: AtomicBool,
}

pub(crate) struct Proxy {
    pub(crate) port: u16,
    state: Arc<State>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// To a port; `cuts` times a connection is closed when `length` bytes have come back.
    pub(crate) async fn start(to: u16, cuts: u32, length: u64) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(State::default());
        state.cuts.store(cuts, Ordering::Relaxed);
        let shared = state.clone();
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if !shared.refuses.load(Ordering::Relaxed) {
                    tokio::spawn(forward(client, to, length, shared.clone()));
                }
            }
        });
        Proxy { port, state, task }
    }

    /// How many bytes have come back.
    pub(crate) fn bytes(&self) -> u64 {
        self.state.bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn cuts_left(&self) -> u32 {
        self.state.cuts.load(Ordering::Relaxed)
    }

    /// Takes no connections any more when so many were cut.
    pub(crate) fn refuse_from_now_on_after(&self, cuts: u32) {
        self.state
            .cuts_until_refusing
            .store(cuts, Ordering::Relaxed);
        self.state.counts_down.store(true, Ordering::Relaxed);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn forward(client: TcpStream, to: u16, length: u64, state: Arc<State>) {
    let Ok(server) = TcpStream::connect(("127.0.0.1", to)).await else {
        return;
    };
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let upwards = tokio::spawn(async move {
        copy(&mut from_client, &mut to_server).await.ok();
    });
    let mut buffer = vec![0; 1 << 14];
    let mut passed = 0;
    while let Ok(n) = from_server.read(&mut buffer).await {
        if n == 0
            || state.refuses.load(Ordering::Relaxed)
            || to_client.write_all(&buffer[..n]).await.is_err()
        {
            break;
        }
        passed += n as u64;
        state.bytes.fetch_add(n as u64, Ordering::Relaxed);
        if length > 0 && passed >= length {
            let cuts = state.cuts.load(Ordering::Relaxed);
            if cuts > 0 {
                state.cuts.store(cuts - 1, Ordering::Relaxed);
                if state.counts_down.load(Ordering::Relaxed)
                    && state.cuts_until_refusing.fetch_sub(1, Ordering::Relaxed) == 1
                {
                    state.refuses.store(true, Ordering::Relaxed);
                }
                break;
            }
        }
    }
    upwards.abort();
}

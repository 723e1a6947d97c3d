//! A proxy on a real listener, with sandboxes that are servers on this machine: the guest daemon
//! behind HTTP/2, ports behind TCP, and all of it dying at once when a sandbox is killed.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "every test binary uses another part of this"
)]

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use axum::{Router, body::Body, routing::get};
use cubicle_ids::SandboxId;
use cubicle_proxy::{
    Availability, GuestIo, NotWoken, Proxy, Routes, SandboxRoute, SignedFile, Upstream,
    UpstreamError, intercept,
};
use http::{Request, Response};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// One sandbox.
pub(crate) struct Sandbox {
    pub(crate) route: SandboxRoute,
    /// As the machine counts; the route's own is what the routing table has heard of.
    pub(crate) generation: u64,
    pub(crate) signature: Option<SignedFile>,
    ports: HashMap<u16, SocketAddr>,
    envd: Router,
    life: CancellationToken,
}

/// All sandboxes, as routing table and as the way into them.
#[derive(Default)]
pub(crate) struct World {
    sandboxes: Mutex<HashMap<SandboxId, Sandbox>>,
    pub(crate) connections: AtomicUsize,
    /// Connections to ports that the proxy holds now.
    pub(crate) open: Arc<AtomicUsize>,
    /// How long a sandbox takes to wake up, and whether it does.
    pub(crate) wakes: Mutex<Wakes>,
    /// What a busy sandbox becomes, once that is known.
    pub(crate) becomes: watch::Sender<Option<Availability>>,
}

/// What happens when a request asks for a paused sandbox.
#[derive(Default)]
pub(crate) struct Wakes {
    pub(crate) asked: usize,
    pub(crate) takes: std::time::Duration,
    pub(crate) refuse: Option<NotWoken>,
}

impl World {
    pub(crate) fn add(&self, envd: Router) -> SandboxId {
        let id = SandboxId::generate();
        let route = SandboxRoute {
            generation: 1,
            availability: Availability::Running,
            traffic_token: None,
            mask_request_host: None,
        };
        let sandbox = Sandbox {
            route,
            generation: 1,
            signature: None,
            ports: HashMap::new(),
            envd,
            life: CancellationToken::new(),
        };
        self.sandboxes.lock().unwrap().insert(id.clone(), sandbox);
        id
    }

    pub(crate) fn change(&self, id: &SandboxId, change: impl FnOnce(&mut Sandbox)) {
        change(self.sandboxes.lock().unwrap().get_mut(id).unwrap());
    }

    pub(crate) fn open_port(&self, id: &SandboxId, port: u16, address: SocketAddr) {
        self.change(id, |sandbox| {
            sandbox.ports.insert(port, address);
        });
    }

    /// The sandbox is gone, with every stream into it.
    pub(crate) fn kill(&self, id: &SandboxId) {
        let sandbox = self.sandboxes.lock().unwrap().remove(id).unwrap();
        sandbox.life.cancel();
    }

    /// As after a rollback: the same sandbox in another life.
    pub(crate) fn next_generation(&self, id: &SandboxId) {
        self.change(id, |sandbox| {
            sandbox.generation += 1;
            std::mem::take(&mut sandbox.life).cancel();
            sandbox.route.generation = sandbox.generation;
        });
    }

    /// The same in the moment when the routing table has not heard of it yet.
    pub(crate) fn switch(&self, id: &SandboxId) {
        self.change(id, |sandbox| {
            sandbox.generation += 1;
            std::mem::take(&mut sandbox.life).cancel();
        });
    }

    /// Paused, so that requests wake it.
    pub(crate) fn sleep(&self, id: &SandboxId) {
        self.change(id, |sandbox| {
            std::mem::take(&mut sandbox.life).cancel();
            sandbox.route.availability = Availability::Asleep;
        });
    }

    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

#[async_trait::async_trait]
impl Routes for World {
    fn lookup(&self, id: &SandboxId) -> Option<SandboxRoute> {
        self.sandboxes
            .lock()
            .unwrap()
            .get(id)
            .map(|sandbox| sandbox.route.clone())
    }

    fn find_by_signature(&self, file: &SignedFile) -> Option<SandboxId> {
        let sandboxes = self.sandboxes.lock().unwrap();
        let found = sandboxes
            .iter()
            .find(|(_, sandbox)| sandbox.signature.as_ref() == Some(file));
        found.map(|(id, _)| id.clone())
    }

    async fn settled(&self, id: &SandboxId) {
        let mut becomes = self.becomes.subscribe();
        // Without anybody who settles it, it stays as it is.
        let Ok(availability) = becomes.wait_for(Option::is_some).await.map(|seen| *seen) else {
            return;
        };
        self.change(id, |sandbox| {
            if let Some(availability) = availability {
                sandbox.route.availability = availability;
            }
        });
    }

    async fn wake(&self, id: &SandboxId) -> Result<(), NotWoken> {
        let (takes, refuse) = {
            let mut wakes = self.wakes.lock().unwrap();
            wakes.asked += 1;
            (wakes.takes, wakes.refuse.clone())
        };
        tokio::time::sleep(takes).await;
        if let Some(why) = refuse {
            return Err(why);
        }
        self.change(id, |sandbox| {
            if sandbox.route.availability == Availability::Asleep {
                sandbox.route.availability = Availability::Running;
                sandbox.generation += 1;
                sandbox.route.generation = sandbox.generation;
            }
        });
        Ok(())
    }
}

#[async_trait::async_trait]
impl Upstream for World {
    async fn request(
        &self,
        id: &SandboxId,
        request: Request<Body>,
    ) -> Result<Response<Body>, UpstreamError> {
        let (envd, life) = {
            let sandboxes = self.sandboxes.lock().unwrap();
            let sandbox = sandboxes
                .get(id)
                .ok_or_else(|| UpstreamError::NotFound(id.clone()))?;
            (sandbox.envd.clone(), sandbox.life.clone())
        };
        let broken = |error: hyper::Error| UpstreamError::Unreachable {
            id: id.clone(),
            source: Box::new(error),
        };
        let (near, far) = tokio::io::duplex(64 << 10);
        let far = TokioIo::new(Mortal::new(far, &life));
        tokio::spawn(async move {
            let service = TowerToHyperService::new(envd);
            let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            let _ = server.serve_connection(far, service).await;
        });
        let near = TokioIo::new(Mortal::new(near, &life));
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), near)
                .await
                .map_err(broken)?;
        tokio::spawn(connection);
        let (mut parts, body) = request.into_parts();
        parts.headers.remove(http::header::HOST);
        parts.version = http::Version::HTTP_2;
        let path = parts.uri.path_and_query().unwrap().as_str();
        parts.uri = format!("http://envd{path}").parse().unwrap();
        let response = sender.send_request(Request::from_parts(parts, body)).await;
        response
            .map(|response| response.map(Body::new))
            .map_err(broken)
    }

    async fn connect(&self, id: &SandboxId, port: u16) -> Result<Box<dyn GuestIo>, UpstreamError> {
        let (address, life) = {
            let sandboxes = self.sandboxes.lock().unwrap();
            let sandbox = sandboxes
                .get(id)
                .ok_or_else(|| UpstreamError::NotFound(id.clone()))?;
            (sandbox.ports.get(&port).copied(), sandbox.life.clone())
        };
        let closed = || UpstreamError::PortClosed {
            id: id.clone(),
            port,
        };
        let stream = TcpStream::connect(address.ok_or_else(closed)?)
            .await
            .map_err(|_| closed())?;
        self.connections.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(Mortal::new(stream, &life).counted(&self.open)))
    }

    fn generation(&self, id: &SandboxId) -> Option<u64> {
        let sandboxes = self.sandboxes.lock().unwrap();
        sandboxes.get(id).map(|sandbox| sandbox.generation)
    }
}

/// A stream that fails when a sandbox dies, as streams over a channel do.
struct Mortal<T> {
    inner: T,
    dead: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Counts itself while it is there, if somebody counts.
    open: Option<Arc<AtomicUsize>>,
}

impl<T> Drop for Mortal<T> {
    fn drop(&mut self) {
        if let Some(open) = &self.open {
            open.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

impl<T> Mortal<T> {
    fn new(inner: T, life: &CancellationToken) -> Self {
        Self {
            inner,
            dead: Box::pin(life.clone().cancelled_owned()),
            open: None,
        }
    }

    fn counted(mut self, open: &Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Ordering::SeqCst);
        self.open = Some(Arc::clone(open));
        self
    }

    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        match self.dead.as_mut().poll(context) {
            Poll::Ready(()) => Err(io::ErrorKind::ConnectionReset.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Mortal<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(context)?;
        Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Mortal<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check(context)?;
        Pin::new(&mut self.inner).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

/// The proxy before an API of one route, on a listener.
pub(crate) struct Front {
    pub(crate) world: Arc<World>,
    pub(crate) proxy: Proxy,
    pub(crate) address: SocketAddr,
    pub(crate) client: reqwest::Client,
}

impl Front {
    pub(crate) async fn start() -> Self {
        let world = Arc::new(World::default());
        let proxy = Proxy::new(world.clone(), world.clone());
        let api = Router::new()
            .route("/sandboxes", get(|| async { "the API" }))
            .layer(axum::middleware::from_fn_with_state(
                proxy.clone(),
                intercept,
            ));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let service = api.into_make_service_with_connect_info::<SocketAddr>();
        tokio::spawn(async move { axum::serve(listener, service).await });
        // Nothing here is encrypted; but together with other crates the client is built with TLS, and
        // then insists on this.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .build()
            .unwrap();
        Self {
            world,
            proxy,
            address,
            client,
        }
    }

    /// A request that names a port of a sandbox in the given way.
    pub(crate) fn request(
        &self,
        method: http::Method,
        way: Way,
        id: &SandboxId,
        port: u16,
        path: &str,
    ) -> reqwest::RequestBuilder {
        let base = format!("http://{}", self.address);
        match way {
            Way::Headers => self
                .client
                .request(method, format!("{base}{path}"))
                .header("E2b-Sandbox-Id", id.as_str())
                .header("E2b-Sandbox-Port", port),
            Way::Host => self
                .client
                .request(method, format!("{base}{path}"))
                .header("Host", format!("{port}-{id}.sandboxes.example")),
            Way::Path => self
                .client
                .request(method, format!("{base}/sandbox/{id}/{port}{path}")),
        }
    }

    pub(crate) fn get(
        &self,
        way: Way,
        id: &SandboxId,
        port: u16,
        path: &str,
    ) -> reqwest::RequestBuilder {
        self.request(http::Method::GET, way, id, port, path)
    }

    /// Waits until no request is under way any more.
    pub(crate) async fn idle(&self) {
        for _ in 0..500 {
            if self.proxy.metrics().snapshot().active == 0 {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        panic!("{:?}", self.proxy.metrics().snapshot());
    }
}

/// A way of naming a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Headers,
    Host,
    Path,
}

pub(crate) const WAYS: [Way; 3] = [Way::Headers, Way::Host, Way::Path];

/// Serves a router on a port of this machine.
pub(crate) async fn serve(router: Router) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}

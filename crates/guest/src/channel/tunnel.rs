use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use axum::body::Body;
use cubicle_protocol::{ERROR_HEADER, ERROR_PORT_CLOSED, GUEST_ADDRESS};
use http::{HeaderValue, Request, Response, StatusCode};
use hyper::{body::Incoming, rt::Executor as _};
use hyper_util::rt::TokioIo;
use tokio::{
    io::copy_bidirectional_with_sizes,
    net::{TcpSocket, TcpStream},
};

use super::{Executor, Knock};

/// Where a server of the sandbox may listen, in the order in which it is tried: on localhost, on
/// IPv6's only, or on the sandbox's own address only.
const ADDRESSES: [IpAddr; 3] = [
    IpAddr::V4(Ipv4Addr::LOCALHOST),
    IpAddr::V6(Ipv6Addr::LOCALHOST),
    IpAddr::V4(GUEST_ADDRESS),
];

/// How much is copied at once in each direction, in bytes.
const BUFFER: usize = 32 << 10;

/// Answers a `CONNECT`: 200 when the port is open, and then joins the two; half-close is kept.
pub(super) async fn open(
    request: Request<Incoming>,
    executor: &Executor,
    knock: &Knock,
) -> Response<Body> {
    let Some(port) = request
        .uri()
        .authority()
        .and_then(|authority| authority.port_u16())
    else {
        return refuse(StatusCode::BAD_REQUEST, "no-port");
    };
    let mut connected = connect(port).await;
    if connected.is_err() && knock(port).await {
        connected = connect(port).await;
    }
    let mut tcp = match connected {
        Ok(tcp) => tcp,
        Err(error) => {
            tracing::debug!(port, %error, "port closed");
            return refuse(StatusCode::BAD_GATEWAY, ERROR_PORT_CLOSED);
        }
    };
    executor.execute(async move {
        // Both fail when either side breaks off, which the other one then sees.
        let Ok(upgraded) = hyper::upgrade::on(request).await else {
            return;
        };
        let mut host = TokioIo::new(upgraded);
        let _ = copy_bidirectional_with_sizes(&mut host, &mut tcp, BUFFER, BUFFER).await;
    });
    Response::new(Body::empty())
}

fn refuse(status: StatusCode, reason: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(ERROR_HEADER, HeaderValue::from_static(reason));
    response
}

/// The first address on which the port is open.
async fn connect(port: u16) -> std::io::Result<TcpStream> {
    let mut result = Err(std::io::ErrorKind::ConnectionRefused.into());
    for address in ADDRESSES {
        let address = SocketAddr::new(address, port);
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        };
        match async { socket?.connect(address).await }.await {
            // With nobody listening, localhost may connect a port to itself.
            Ok(tcp) if tcp.local_addr().ok() == Some(address) => {}
            Ok(tcp) => {
                tcp.set_nodelay(true)?;
                return Ok(tcp);
            }
            Err(error) if result.is_err() && address.is_ipv4() => result = Err(error),
            Err(_) => {}
        }
    }
    result
}

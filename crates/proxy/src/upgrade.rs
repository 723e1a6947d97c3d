//! Connections that stop being HTTP: WebSockets and whatever else two ends agree on.

use std::sync::Arc;

use http::{Request, Response, StatusCode};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;

use crate::metrics::{Metrics, add};

/// The client's end of a connection that may be upgraded.
pub(crate) fn client_end<B>(request: &mut Request<B>) -> Option<OnUpgrade> {
    request.extensions_mut().remove::<OnUpgrade>()
}

/// If the sandbox agreed to switch, joins both ends once the client has been told.
pub(crate) fn join<B>(
    client: Option<OnUpgrade>,
    response: &mut Response<B>,
    metrics: &Arc<Metrics>,
) {
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        return;
    }
    let (Some(client), sandbox) = (client, hyper::upgrade::on(response)) else {
        return;
    };
    let metrics = Arc::clone(metrics);
    add(&metrics.upgrades, 1);
    tokio::spawn(async move {
        let (client, sandbox) = match tokio::try_join!(client, sandbox) {
            Ok(ends) => ends,
            Err(error) => {
                tracing::debug!(%error, "an upgrade was not completed");
                return;
            }
        };
        let (mut client, mut sandbox) = (TokioIo::new(client), TokioIo::new(sandbox));
        match tokio::io::copy_bidirectional(&mut client, &mut sandbox).await {
            Ok((up, down)) => {
                add(&metrics.bytes_in, up);
                add(&metrics.bytes_out, down);
            }
            // One end is gone; dropping the other tells it.
            Err(error) => tracing::debug!(%error, "an upgraded connection broke"),
        }
    });
}

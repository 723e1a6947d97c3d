//! The directories of this machine that a sandbox has mounted, served for as long as its VM lives.
//!
//! What the guest has open and has asked for is the guest's, in its memory; here is nothing that
//! would be missed. So a life of the channel that ends, a server that is killed and a VM that is
//! restored need no more than that the next life is served, too.

use std::{
    num::NonZeroUsize,
    path::Path,
    sync::{Arc, LazyLock},
    time::Duration,
};

use cubicle_ids::SandboxId;
use cubicle_protocol::{
    HOST_AUTHORITY,
    guest_api::{InitRequest, Mount},
    share::SHARES_PATH,
};
use cubicle_share::{Access, Outgoing, Share, Workers};
use futures::{StreamExt as _, future, stream};
use http::{Method, Request, StatusCode};
use http_body_util::{BodyDataStream, BodyExt as _, StreamBody};
use hyper::{
    body::{Frame, Incoming},
    client::conn::http2::SendRequest,
};
use tokio::sync::mpsc;

use crate::{
    error::{Error, Result},
    link,
    node::blocking,
};

/// Threads that all sandboxes of this node have for their files together.
const WORKERS: NonZeroUsize = NonZeroUsize::new(32).unwrap();

/// Pause after a share's stream has ended in the middle of a life, which no sane guest makes it do.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

static ALL: LazyLock<Workers> = LazyLock::new(|| Workers::new(WORKERS));

/// The shares of one sandbox.
#[derive(Debug, Default)]
pub(crate) struct Shares {
    id: Option<SandboxId>,
    shares: Vec<(String, Arc<Share>)>,
}

impl Shares {
    /// Opens all that the guest is told to mount. What cannot be opened is not served: programs in
    /// the sandbox get errors from it, and the sandbox lives on.
    pub(crate) async fn open(id: &SandboxId, identity: &InitRequest) -> Self {
        let mounts = identity.mounts.clone().unwrap_or_default();
        if mounts.is_empty() {
            return Self::default();
        }
        let opened = blocking(move || {
            let shares = mounts.iter().map(|mount| (mount.tag.clone(), open(mount)));
            Ok(shares.collect::<Vec<_>>())
        });
        let shares = opened.await.unwrap_or_default().into_iter();
        let shares = shares.filter_map(|(tag, share)| match share {
            Ok(share) => Some((tag, Arc::new(share))),
            Err(error) => {
                tracing::error!(sandbox = %id, tag, %error, "a share is not served");
                None
            }
        });
        Self {
            id: Some(id.clone()),
            shares: shares.collect(),
        }
    }

    /// Serves all of them on a connection, until that ends or this is dropped.
    pub(crate) fn serve(
        &self,
        connection: &SendRequest<link::Outgoing>,
    ) -> impl Future<Output = ()> + Send + 'static {
        let each = self.shares.iter().map(|(tag, share)| {
            let (tag, share, connection) = (tag.clone(), share.clone(), connection.clone());
            let id = self.id.clone();
            async move {
                while !connection.is_closed() {
                    if let Err(reason) = serve_one(connection.clone(), &tag, &share).await {
                        let sandbox = id.as_ref().map(SandboxId::as_str).unwrap_or_default();
                        tracing::warn!(sandbox, tag, reason, "a share is not served");
                    }
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
            }
        });
        let each: Vec<_> = each.collect();
        async move {
            future::join_all(each).await;
        }
    }
}

/// One stream of a share, from its beginning to its end; the error says why it ended.
async fn serve_one(
    mut connection: SendRequest<link::Outgoing>,
    tag: &str,
    share: &Arc<Share>,
) -> Result<(), String> {
    let (sender, receiver) = mpsc::unbounded_channel::<Outgoing>();
    let replies = stream::unfold(receiver, |mut receiver| async {
        let reply = receiver.recv().await?.into_frame();
        Some((Ok(Frame::data(reply)), receiver))
    });
    let request = Request::builder()
        .method(Method::POST)
        .uri(format!("http://{HOST_AUTHORITY}{SHARES_PATH}/{tag}"))
        .body(StreamBody::new(replies).boxed_unsync())
        .map_err(|error| error.to_string())?;
    let response = connection.send_request(request).await;
    let response = response.map_err(|error| error.to_string())?;
    if response.status() != StatusCode::OK {
        return Err(format!("the guest answered {}", response.status()));
    }
    let requests: BodyDataStream<Incoming> = BodyDataStream::new(response.into_body());
    let served = cubicle_share::serve(share.clone(), ALL.clone(), requests.boxed(), sender);
    match served.await {
        // The life is over, as lives are.
        Ok(()) | Err(cubicle_share::Error::Broken(_)) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

/// Makes sure that all of these directories can be mounted, before anything is made for them.
pub(crate) async fn check(mounts: &[Mount]) -> Result<()> {
    if mounts.is_empty() {
        return Ok(());
    }
    let mounts = mounts.to_vec();
    blocking(move || mounts.iter().try_for_each(|mount| open(mount).map(drop))).await
}

/// What the guest is told of the mounts: not where they are on this machine.
pub(crate) fn told(mounts: Vec<Mount>) -> Vec<Mount> {
    let told = mounts.into_iter().map(|mount| Mount {
        root: None,
        ..mount
    });
    told.collect()
}

fn open(mount: &Mount) -> Result<Share> {
    let access = if mount.read_only {
        Access::ReadOnly
    } else {
        Access::ReadWrite
    };
    // One without a root is nowhere.
    let root = mount.root.as_deref().unwrap_or(Path::new(""));
    Share::open(root, access).map_err(Error::Share)
}

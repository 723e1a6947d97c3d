//! Directories of the host reach the guest, in each life, and nothing else does.

use cubicle_protocol::{
    guest_api::Mount,
    share::{Answer, FileRef, Frames, Kind, Operation, RelativePath, Reply, Request, encode},
};
use futures::StreamExt as _;
use http_body_util::{BodyDataStream, BodyExt as _, StreamBody};
use hyper::body::Incoming;

use super::*;
use crate::Body;

type Answered = Arc<std::sync::Mutex<Vec<(String, Reply)>>>;

/// The guest's side of a share: asks what its root is, once.
pub(crate) fn ask(request: http::Request<Incoming>, answered: &Answered) -> Body {
    let tag = request.uri().path().rsplit('/').next().unwrap().to_owned();
    let answered = Arc::clone(answered);
    tokio::spawn(async move {
        let mut replies = BodyDataStream::new(request.into_body());
        let mut frames = Frames::new();
        while let Some(Ok(piece)) = replies.next().await {
            frames.push(&piece);
            while let Some(frame) = frames.take::<Reply>().unwrap() {
                answered.lock().unwrap().push((tag.clone(), frame.message));
            }
        }
    });
    let of = FileRef {
        path: RelativePath::ROOT,
        inode: 0,
    };
    let request = Request {
        id: 1,
        again: false,
        operation: Operation::Stat { of },
    };
    let frame = hyper::body::Frame::data(encode(&request, b"").unwrap());
    let first = stream::once(async { Ok::<_, crate::BoxError>(frame) });
    StreamBody::new(first.chain(stream::pending())).boxed_unsync()
}

fn mount(tag: &str, root: &std::path::Path) -> Mount {
    Mount {
        tag: tag.to_owned(),
        path: format!("/mnt/{tag}"),
        read_only: tag == "ro",
        root: Some(root.to_owned()),
    }
}

/// Waits until the guest has been answered so often, always well.
async fn answers(machine: &Machine, id: &SandboxId, count: usize) -> Vec<String> {
    let answered = machine.hypervisor.vm(id).guest.answered.clone();
    until("answers of the shares", || {
        answered.lock().unwrap().len() >= count
    })
    .await;
    let answered = std::mem::take(&mut *answered.lock().unwrap());
    let tags = answered.into_iter().map(|(tag, reply)| {
        let Ok(Answer::Status(status)) = reply.outcome else {
            panic!("{reply:?}");
        };
        assert_eq!(status.kind, Kind::Directory);
        tag
    });
    let mut tags: Vec<_> = tags.collect();
    tags.sort();
    tags
}

#[tokio::test(flavor = "multi_thread")]
async fn shares_are_served_in_every_life_also_by_the_next_server() {
    let machine = Machine::new();
    let (node, _) = machine.open().await;
    let snapshot = template(&node, &machine).await;
    let shared = tempfile::tempdir().unwrap();
    let mut order = CreateSandbox::new(snapshot.clone());
    order.mounts = vec![mount("rw", shared.path()), mount("ro", shared.path())];
    let id = order.id.clone();
    node.create(order).await.unwrap();
    assert_eq!(answers(&machine, &id, 2).await, ["ro", "rw"]);
    let vm = machine.hypervisor.vm(&id);
    let told = vm.guest.inits.lock().unwrap().last().cloned().unwrap();
    let told = told.mounts.unwrap();
    assert_eq!(told.len(), 2);
    assert!(told.iter().all(|mount| mount.root.is_none()), "{told:?}");

    node.detach().await.unwrap();
    node.store().clone().close().await;
    drop(node);
    let (node, report) = machine.open().await;
    assert_eq!(report.adopted, std::slice::from_ref(&id));
    assert_eq!(answers(&machine, &id, 2).await, ["ro", "rw"]);

    // What is gone by then costs the share, not the sandbox.
    node.detach().await.unwrap();
    node.store().clone().close().await;
    drop(node);
    drop(shared);
    let (node, report) = machine.open().await;
    assert_eq!(report.adopted, std::slice::from_ref(&id));
    assert_eq!(get(&node, &id, "/health").await.unwrap(), 204);
    end(node, &machine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_is_not_there_fails_the_create_and_leaves_nothing() {
    let machine = Machine::new();
    let (node, _) = machine.open().await;
    let snapshot = template(&node, &machine).await;
    let mut order = CreateSandbox::new(snapshot);
    order.mounts = vec![mount("rw", std::path::Path::new("/no/such/directory"))];
    let error = node.create(order).await.unwrap_err();
    assert!(matches!(error, Error::Share(_)), "{error}");
    assert!(error.to_string().contains("/no/such/directory"), "{error}");
    assert_clean(&node, &machine).await;
    end(node, &machine).await;
}

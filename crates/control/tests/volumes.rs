//! Volumes and directories of the host: who has them, and for how long.
#![allow(clippy::expect_used, reason = "tests may panic")]

mod common;

use std::{fs, path::Path};

use common::{Plane, eventually, request};
use cubicle_control::{
    Error,
    sandbox::{CreateSandbox, ForkSandbox, Lifetime},
    volume::{Attributes, Directories, Mount, MountRequest, MountSource, VolumeConfig},
};
use futures::{StreamExt as _, stream};

fn volume(name: &str, path: &str) -> MountRequest {
    Mount {
        source: MountSource::volume(name),
        path: path.to_owned(),
        read_only: false,
    }
}

fn host(from: &Path, path: &str) -> MountRequest {
    Mount {
        source: MountSource::Host {
            path: from.to_owned(),
        },
        path: path.to_owned(),
        read_only: true,
    }
}

fn with(mounts: Vec<MountRequest>) -> CreateSandbox {
    CreateSandbox {
        mounts,
        ..request("base")
    }
}

#[tokio::test]
async fn volumes_are_made_found_and_deleted_with_all_that_is_in_them() {
    let plane = Plane::new().await;
    let volumes = &plane.control.volumes;
    let data = volumes.create(Some("data")).await.expect("volume");
    let unnamed = volumes.create(None).await.expect("volume");
    assert_eq!(unnamed.name, unnamed.id);
    assert_eq!(
        volumes.list().await.expect("list"),
        [data.clone(), unnamed.clone()]
    );
    for reference in [&data.id, &data.name] {
        assert_eq!(volumes.get(reference).await.expect("get"), data);
    }
    for taken in ["data", &data.id] {
        let error = volumes.create(Some(taken)).await.expect_err("taken");
        assert!(matches!(error, Error::NameTaken { .. }), "{error}");
    }
    for bad in ["", "a b", "../x", "a/b", "ü", &"x".repeat(129)] {
        let error = volumes.create(Some(bad)).await.expect_err("bad");
        assert!(matches!(error, Error::Invalid { .. }), "{bad}: {error}");
    }
    let root = plane.dir.path().join("volumes-data");
    let kept = || fs::read_dir(&root).expect("list").count();
    eventually("the end of the directories of what failed", || kept() == 2).await;

    fs::write(root.join(&data.id).join("file"), "content").expect("write");
    volumes.delete("data").await.expect("delete");
    assert!(!root.join(&data.id).exists());
    let error = volumes.delete("data").await.expect_err("gone");
    assert!(matches!(error, Error::VolumeNotFound { .. }), "{error}");
}

#[tokio::test]
async fn what_is_written_and_removed_in_a_volume_leaves_nothing_beside_it() {
    let plane = Plane::new().await;
    let root = plane.dir.path().join("volumes-data");
    let beside = || fs::read_dir(&root).expect("list").count() - 1;
    let volumes = &plane.control.volumes;
    let data = volumes.create(Some("data")).await.expect("volume");
    let error = volumes.content(&data.id, "").await.expect_err("no token");
    assert!(matches!(error, Error::VolumeToken { .. }), "{error}");
    let content = volumes.content(&data.id, &data.token).await;
    let content = content.expect("content");

    let any = Attributes::default();
    let made = content.make_directory("/deep", any, false).await;
    made.expect("directory");
    // Somebody who writes half of a file and goes away.
    let half = stream::once(async { Ok("half".into()) }).chain(stream::pending());
    {
        let mut writing = std::pin::pin!(content.write("/deep/file", any, false, half));
        while beside() == 0 {
            assert!(futures::poll!(&mut writing).is_pending());
            tokio::task::yield_now().await;
        }
    }
    eventually("the end of half a file", || beside() == 0).await;
    let error = content.item("/deep/file").await.expect_err("half a file");
    assert!(error.to_string().contains("/deep/file"), "{error}");

    let whole = stream::iter(["whole", " file"].map(|text| Ok(text.into())));
    let written = content.write("/deep/file", any, false, whole).await;
    assert_eq!(written.expect("written").size, 10);
    assert_eq!(beside(), 0);
    let path = root.join(&data.id).join("deep/file");
    assert_eq!(fs::read(path).expect("file"), b"whole file");
    content.remove("/deep").await.expect("remove");
    assert!(content.list("/", 9).await.expect("list").is_empty());
    eventually("the end of what was removed", || beside() == 0).await;

    // What a server that was killed leaves.
    fs::write(root.join(".draft-0"), "half").expect("write");
    fs::create_dir_all(root.join(".trash-0/deep")).expect("make");
    let _plane = plane.restart(|_| ()).await;
    assert_eq!(beside(), 0);
}

#[tokio::test]
async fn a_volume_is_not_deleted_while_a_sandbox_has_it_also_after_a_restart() {
    let plane = Plane::new().await;
    let data = plane
        .control
        .volumes
        .create(Some("data"))
        .await
        .expect("volume");
    let sandbox = plane.create(with(vec![volume("data", "/data")])).await;
    let order = plane.fleet.order(&sandbox.id).expect("order");
    assert_eq!(order.mounts, sandbox.mounts);
    let source = &order.mounts[0].source;
    assert!(matches!(source, MountSource::Volume { id, .. } if *id == data.id));

    let root = plane.dir.path().join("volumes-data");
    fs::write(root.join(&data.id).join("file"), "content").expect("write");
    fs::create_dir(root.join("vol-nobodys")).expect("orphan");
    let plane = plane.restart(|_| ()).await;
    assert!(!root.join("vol-nobodys").exists(), "orphans are swept");
    assert!(root.join(&data.id).join("file").exists());
    let error = plane
        .control
        .volumes
        .delete("data")
        .await
        .expect_err("in use");
    assert!(matches!(&error, Error::VolumeInUse { sandbox: by, .. } if *by == sandbox.id));
    plane
        .control
        .sandboxes
        .kill(&sandbox.id)
        .await
        .expect("kill");
    plane.control.volumes.delete("data").await.expect("delete");
}

#[tokio::test]
async fn mounts_survive_snapshot_fork_and_rollback() {
    let plane = Plane::new().await;
    plane
        .control
        .volumes
        .create(Some("data"))
        .await
        .expect("volume");
    let sandbox = plane.create(with(vec![volume("data", "/data")])).await;
    let snapshot = plane.snapshot(&sandbox.id, None).await;

    let request = ForkSandbox {
        count: 2,
        lifetime: Lifetime::Never,
    };
    let forked = plane.control.sandboxes.fork(&sandbox.id, request).await;
    for child in forked.expect("fork").children {
        let child = child.expect("child");
        let order = plane.fleet.order(&child.id).expect("order");
        assert_eq!(order.mounts, sandbox.mounts);
    }
    let id = snapshot.id.to_string();
    let back = plane.control.sandboxes.rollback(&sandbox.id, &id).await;
    assert_eq!(back.expect("rollback").sandbox.mounts, sandbox.mounts);

    // Also when the sandbox that it was taken of is gone.
    plane
        .control
        .sandboxes
        .kill(&sandbox.id)
        .await
        .expect("kill");
    let heir = plane.create(common::request(&id)).await;
    assert_eq!(heir.mounts, sandbox.mounts);
    let other = CreateSandbox {
        mounts: vec![volume("data", "/elsewhere")],
        ..common::request(&id)
    };
    assert_eq!(plane.create(other).await.mounts[0].path, "/elsewhere");
}

#[tokio::test]
async fn what_cannot_be_mounted_is_refused_before_anything_is_made() {
    let plane = Plane::new().await;
    plane
        .control
        .volumes
        .create(Some("data"))
        .await
        .expect("volume");
    for bad in [
        vec![volume("missing", "/data")],
        vec![volume("data", "relative")],
        vec![volume("data", "/proc/x")],
        vec![volume("data", "/a"), volume("data", "/a/b")],
    ] {
        let error = plane
            .control
            .sandboxes
            .create(with(bad))
            .await
            .expect_err("bad");
        assert!(
            matches!(
                error,
                Error::Invalid {
                    field: "volumeMounts",
                    ..
                }
            ),
            "{error}"
        );
    }
    let refused = with(vec![host(Path::new("/etc"), "/data")]);
    let error = plane
        .control
        .sandboxes
        .create(refused)
        .await
        .expect_err("host");
    assert!(matches!(error, Error::HostMountRefused { .. }), "{error}");
    assert!(error.to_string().contains("--host-mount-allow"), "{error}");
    assert!(plane.control.sandboxes.all().is_empty());
}

#[tokio::test]
async fn only_what_is_really_below_an_allowed_directory_is_mounted() {
    let dir = tempfile::tempdir().expect("tempdir");
    let root = dir.path().canonicalize().expect("path");
    for made in ["allowed/inside", "allowed-not", "secret"] {
        fs::create_dir_all(root.join(made)).expect("directory");
    }
    fs::write(root.join("allowed/file"), "").expect("file");
    let link = |from: &str, to: &str| {
        std::os::unix::fs::symlink(root.join(to), root.join(from)).expect("link");
    };
    link("allowed/out", "secret");
    link("allowed/within", "allowed/inside");
    link("alias", "allowed/inside");
    let allow = vec![root.join("allowed")];
    let plane = Plane::with(|config| config.volumes.host_allow = allow.clone()).await;
    let resolve = |path: String| {
        let request = vec![host(Path::new(&path), "/data")];
        plane.control.volumes.resolve(request)
    };
    let below = |path: &str| format!("{}/{path}", root.display());
    for (asked, real) in [
        ("allowed", "allowed"),
        ("allowed/inside", "allowed/inside"),
        ("allowed/within", "allowed/inside"),
        ("alias", "allowed/inside"),
    ] {
        let mounts = resolve(below(asked)).await.expect(asked);
        let source = &mounts[0].source;
        assert!(matches!(source, MountSource::Host { path } if *path == root.join(real)));
    }
    for asked in [
        below(""),
        below("secret"),
        below("allowed-not"),
        below("allowed/out"),
        below("allowed/../secret"),
        below("allowed/file"),
        below("allowed/missing"),
        below("secret/missing"),
        "allowed".to_owned(),
        "/".to_owned(),
    ] {
        let error = resolve(asked.clone()).await.expect_err(&asked);
        assert!(
            matches!(error, Error::HostMountRefused { .. }),
            "{asked}: {error}"
        );
    }
    // What is outside is the same whether it is there or not.
    let why = |error: Error| error.to_string().split(':').next_back().map(str::to_owned);
    let there = resolve(below("secret")).await.expect_err("there");
    let missing = resolve(below("secret/missing")).await.expect_err("missing");
    assert_eq!(why(there), why(missing));

    // A server that allows it no longer does not serve it any longer.
    let mounts = resolve(below("allowed")).await.expect("allowed");
    let config = VolumeConfig::beside(&root.join("cubicle.db"));
    let error = Directories::new(config)
        .root(&mounts[0])
        .await
        .expect_err("root");
    assert!(matches!(error, Error::HostMountRefused { .. }), "{error}");
}

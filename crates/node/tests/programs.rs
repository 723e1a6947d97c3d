//! What the builds of templates do in real VMs: programs, files, layers.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod support;

use std::time::{Duration, Instant};

use cubicle_cow::SnapshotKind;
use cubicle_ids::{SandboxId, SnapshotId};
use cubicle_image::Progress;
use cubicle_node::{
    Error, ImageSource, Node, Printed, ProgramEnd, RunProgram, TakeSnapshot, TemplateBuild,
    TemplateImage, WarmUp, full_body,
};
use cubicle_protocol::guest_api::CopyQuery;
use support::{
    image,
    world::{create, end, world},
};

fn bash(script: &str) -> RunProgram {
    RunProgram {
        program: "/bin/bash".into(),
        args: vec!["-c".into(), script.into()],
        deadline: Some(Duration::from_secs(60)),
        ..RunProgram::default()
    }
}

async fn run(node: &Node, id: &SandboxId, program: &RunProgram) -> (ProgramEnd, String, String) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let ended = node.run(id, program, |printed| match printed {
        Printed::Stdout(bytes) => out.extend_from_slice(&bytes),
        Printed::Stderr(bytes) => err.extend_from_slice(&bytes),
    });
    let ended = ended.await.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (ended, text(out), text(err))
}

/// An archive with a file, a program and a link below `app/`.
fn archive() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, mode, content) in [
        ("app/data", 0o640, "data\n"),
        ("app/bin/hello", 0o755, "#!/bin/sh\necho hello\n"),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_mode(mode);
        header.set_size(content.len() as u64);
        builder
            .append_data(&mut header, name, content.as_bytes())
            .unwrap();
    }
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_mode(0o777);
    header.set_size(0);
    builder
        .append_link(&mut header, "app/link", "data")
        .unwrap();
    builder.into_inner().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_and_files_come_into_vms_and_stay_in_their_layers() {
    let (machine, node, template) = world(|_| ()).await;
    let id = create(&node, &template).await;

    // As whom, where, with what.
    let program = RunProgram {
        user: Some("user".into()),
        env: [("NAME".to_owned(), "a b".to_owned())].into(),
        cwd: Some("/tmp".into()),
        ..bash("echo $(whoami) $PWD \"$NAME\"; echo oops >&2; exit 3")
    };
    let (ended, out, err) = run(&node, &id, &program).await;
    assert_eq!(
        (ended.exit_code, ended.status.as_str()),
        (Some(3), "exit status 3")
    );
    assert_eq!((out.as_str(), err.as_str()), ("user /tmp a b\n", "oops\n"));
    let numbers = RunProgram {
        user: Some("4711:12".into()),
        ..bash("id -u; id -g")
    };
    assert_eq!(run(&node, &id, &numbers).await.1, "4711\n12\n");
    let much = bash("head -c 3000000 /dev/zero | tr '\\0' x");
    assert_eq!(run(&node, &id, &much).await.1.len(), 3_000_000);

    let missing = RunProgram {
        program: "/bin/none".into(),
        ..bash("")
    };
    let refused = node.run(&id, &missing, drop).await;
    assert!(
        matches!(refused, Err(Error::NoProgram { .. })),
        "{refused:?}"
    );
    for wrong in [
        RunProgram {
            cwd: Some("/nowhere".into()),
            ..bash("true")
        },
        RunProgram {
            user: Some("nobody-at-all".into()),
            ..bash("true")
        },
        RunProgram {
            deadline: Some(Duration::from_secs(1)),
            ..bash("sleep 1000")
        },
    ] {
        let refused = node.run(&id, &wrong, drop).await;
        assert!(matches!(refused, Err(Error::Program { .. })), "{refused:?}");
    }
    assert_eq!(
        run(&node, &id, &bash("pgrep -c sleep; true")).await.1,
        "0\n"
    );

    // What is started and not waited for runs on, also in whatever is restored from here.
    let forever = RunProgram {
        deadline: None,
        ..bash("exec sleep 4711")
    };
    let started = node.run(&id, &forever, drop);
    assert!(
        tokio::time::timeout(Duration::from_secs(2), started)
            .await
            .is_err()
    );

    let query = CopyQuery {
        src: "app".into(),
        dest: "/srv/new/app".into(),
        owner: "user:sudo".into(),
        mode: None,
    };
    node.copy(&id, &query, full_body(archive())).await.unwrap();
    let absent = CopyQuery {
        src: "other".into(),
        ..query
    };
    let refused = node.copy(&id, &absent, full_body(archive())).await;
    assert!(
        matches!(&refused, Err(Error::Copy { reason, .. }) if reason.contains("other")),
        "{refused:?}"
    );

    let order = TakeSnapshot {
        quiesce: Some(Duration::from_secs(30)),
        require_healthy: true,
        ..TakeSnapshot::new(SnapshotKind::Template)
    };
    let begun = Instant::now();
    let layer = node.snapshot(&id, order).await.unwrap();
    eprintln!("a layer took {:?}: {}", begun.elapsed(), layer.timings);
    node.kill(&id).await.unwrap();
    let id = create(&node, &layer.manifest.id).await;
    let look = bash(
        "cd /srv/new/app; stat -c '%n %U:%G %a' data bin bin/hello; cat link; bin/hello; pgrep -c -x sleep",
    );
    assert_eq!(
        run(&node, &id, &look).await.1,
        "data user:sudo 640\nbin user:sudo 755\nbin/hello user:sudo 755\ndata\nhello\n1\n"
    );
    node.kill(&id).await.unwrap();

    another_shape(&node, &layer.manifest.id).await;
    end(machine, node).await;
}

/// The disk of a snapshot, booted with more CPUs and memory: what was written is there, what ran is
/// not.
async fn another_shape(node: &Node, of: &SnapshotId) {
    let disk = node.store().snapshot(of).unwrap().disk(0);
    let build = TemplateBuild {
        snapshot: SnapshotId::generate(),
        template: None,
        source: ImageSource::Ready(TemplateImage {
            rootfs: disk,
            ..image().await
        }),
        cpus: 2,
        memory_mib: 384,
        warm_up: vec![WarmUp::new("root", &["/bin/none"]).if_possible()],
        settle: Duration::ZERO,
    };
    let built = node
        .build_template(build, Progress::silent())
        .await
        .unwrap();
    let id = create(node, &built.snapshot).await;
    let look = bash("nproc; /srv/new/app/bin/hello; pgrep -c -x sleep; true");
    assert_eq!(run(node, &id, &look).await.1, "2\nhello\n0\n");
    let memory = bash("awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo");
    let mib: u32 = run(node, &id, &memory).await.1.trim().parse().unwrap();
    assert!((300..384).contains(&mib), "{mib}");
    node.kill(&id).await.unwrap();
}

//! What becomes of open connections when a sandbox is rolled back. Needs root.
//!
//! A program of its own: it counts the descriptors of its process.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod support;

use std::time::{Duration, Instant};

use support::{
    run,
    world::{back, create, end, snapshot, world},
};
use tokio::io::AsyncReadExt as _;

#[tokio::test(flavor = "multi_thread")]
async fn connections_across_a_rollback_are_closed_on_both_sides() {
    let (machine, node, template) = world(|_| ()).await;
    let id = create(&node, &template).await;
    let server = r#"
import asyncio, os
count = 0
async def serve(reader, writer):
    global count
    count += 1
    open("/dev/shm/open", "w").write(str(count))
    writer.write(b"hello"); await writer.drain()
    try: await reader.read()
    finally:
        count -= 1
        open("/dev/shm/open", "w").write(str(count))
        writer.close()
async def main():
    s = await asyncio.start_server(serve, "127.0.0.1", 8000)
    open("/dev/shm/open", "w").write("0")
    await s.serve_forever()
asyncio.run(main())
"#;
    let start = format!(
        "cat > /tmp/s.py <<'END'\n{server}\nEND\nsetsid python3 /tmp/s.py >/tmp/s.log 2>&1 & for i in $(seq 100); do [ -e /dev/shm/open ] && exit; sleep 0.1; done; cat /tmp/s.log; exit 1"
    );
    run(&node, &id, &["/bin/bash", "-c", &start]).await;
    // Frozen with three open connections in it, again and again.
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut stream = node.connect(&id, 8000).await.unwrap();
        stream.read_exact(&mut [0; 5]).await.unwrap();
        open.push(stream);
    }
    let frozen = snapshot(&node, &id).await;
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mut before = None;
    for round in 0..50 {
        node.rollback(back(&id, &frozen)).await.unwrap();
        let switched = Instant::now();
        for mut stream in open.drain(..) {
            let mut rest = Vec::new();
            let closed =
                tokio::time::timeout(Duration::from_secs(1), stream.read_to_end(&mut rest));
            assert!(
                closed.await.is_ok(),
                "round {round}: open after {:?}",
                switched.elapsed()
            );
        }
        for _ in 0..3 {
            let mut stream = node.connect(&id, 8000).await.unwrap();
            stream.read_exact(&mut [0; 5]).await.unwrap();
            open.push(stream);
        }
        // Those that were in the snapshot are closed inside, too: only the new ones are left.
        let inside = run(&node, &id, &["/bin/cat", "/dev/shm/open"]).await;
        assert_eq!(inside, "3", "round {round}");
        if round == 5 {
            before = Some(descriptors());
        }
    }
    let after = descriptors();
    let before = before.unwrap();
    assert!(after <= before + 3, "{before} descriptors became {after}");
    drop(open);
    end(machine, node).await;
}

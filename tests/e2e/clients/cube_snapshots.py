"""All that Cube's Python client does with snapshots; prints what came of it as JSON."""

import json
import sys

from cubesandbox import Sandbox

report = {}
sandbox = Sandbox.create("base")
clones = []


def sh(box, command):
    return box.commands.run(command, timeout=60).stdout.strip()


try:
    sh(sandbox, "echo one > /dev/shm/memory; echo one > /home/user/disk")
    snapshot = sandbox.create_snapshot()
    named = sandbox.create_snapshot("cube-client")
    report["names"] = named.names
    listed = Sandbox.list_snapshots(sandbox_id=sandbox.sandbox_id)
    listed = listed[0] if isinstance(listed, tuple) else getattr(listed, "snapshots", listed)
    report["listed"] = len(listed)

    sh(sandbox, "echo two > /dev/shm/memory; echo two > /home/user/disk")
    answer = sandbox.rollback(snapshot.snapshot_id)
    report["rollback"] = answer.get("status")
    report["rolled_back"] = sh(sandbox, "cat /dev/shm/memory /home/user/disk").split()

    clones = sandbox.clone(n=3, concurrency=3)
    report["clones"] = [sh(clone, "cat /dev/shm/memory /home/user/disk").split() for clone in clones]
    report["distinct"] = len({sh(clone, "cat /proc/sys/kernel/random/uuid") for clone in clones})
    if hasattr(sandbox, "fork"):
        forks = sandbox.fork(2)
        boxes = [getattr(fork, "sandbox", fork) for fork in forks]
        clones += boxes
        report["forks"] = [sh(box, "cat /dev/shm/memory") for box in boxes]

    sandbox.pause()
    report["paused"] = dict(sandbox.get_info())["state"]
    sandbox.resume(timeout=120)
    report["resumed"] = sh(sandbox, "cat /dev/shm/memory /home/user/disk").split()

    for each in (snapshot, named):
        Sandbox.delete_snapshot(each.snapshot_id)
finally:
    for box in [sandbox, *clones]:
        box.kill()
json.dump(report, sys.stdout)

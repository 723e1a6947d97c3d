"""All that E2B's Python client does with snapshots; prints what came of it as JSON."""

import json
import sys
import time

from e2b import Sandbox

report = {}
sandbox = Sandbox.create("base", timeout=120)
others = []
try:
    sandbox.commands.run("echo one > /dev/shm/memory; echo one > /home/user/disk")
    snapshot = sandbox.create_snapshot()
    sandbox.commands.run("echo two > /dev/shm/memory")
    again = Sandbox.create(snapshot.snapshot_id, timeout=120)
    others.append(again)
    report["from_snapshot"] = again.files.read("/dev/shm/memory").strip()

    # A process that was started before the pause is there after it, and so is its output.
    command = sandbox.commands.run("sleep 1000", background=True)
    sandbox.pause()
    report["running_while_paused"] = sandbox.is_running()
    time.sleep(2)
    sandbox.connect(timeout=120)
    report["resumed"] = sandbox.files.read("/dev/shm/memory").strip()
    report["processes"] = [p.cmd for p in sandbox.commands.list()].__len__()
    now = float(sandbox.commands.run("date +%s.%N").stdout)
    report["clock_off"] = abs(time.time() - now)
    Sandbox.delete_snapshot(snapshot.snapshot_id)
finally:
    for box in [sandbox, *others]:
        box.kill()
json.dump(report, sys.stdout)

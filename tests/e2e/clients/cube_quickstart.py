"""What a newcomer does first with Cube's Python client: plain HTTP, routed by the Host header."""

import json
import sys
import time

from cubesandbox import Sandbox

sandbox = Sandbox.create("base")
report = {"exits": {}}
try:
    report["sum"] = sandbox.commands.run("python3 -c 'print(2+2)'").stdout.strip()
    sandbox.files.write("/tmp/note.txt", "kept")
    report["note"] = sandbox.files.read("/tmp/note.txt")
    listed = Sandbox.list()
    report["listed"] = sandbox.sandbox_id in json.dumps(listed, default=str)
    for name, command in {
        "0": "exit 0",
        "1": "exit 1",
        "127": "no-such-program-anywhere",
        "kill": "kill -9 $$",
        "background": "sleep 30 & exit 3",
    }.items():
        started = time.monotonic()
        try:
            code = sandbox.commands.run(command, timeout=20).exit_code
        except Exception as error:  # older clients raise for what is not 0
            code = getattr(error, "exit_code", None)
            if code is None:
                raise
        report["exits"][name] = [code, round(time.monotonic() - started, 2)]
finally:
    sandbox.kill()
json.dump(report, sys.stdout)

"""A checkpoint after every step, and a return to any of them.

The agent works in a machine whose memory matters as much as its disk: a counter lives in a running
process and nowhere else. Going back restores both.
"""

import time

from cubesandbox import Sandbox

# Counts in memory; says where it is when asked.
COUNTER = """
import http.server
count = 0
class Counter(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global count
        if self.path == "/step": count += 1
        self.send_response(200); self.end_headers()
        self.wfile.write(str(count).encode())
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", 8000), Counter).serve_forever()
"""
ASK = "curl -sf --retry 30 --retry-connrefused --retry-delay 1 http://127.0.0.1:8000"


def run(sandbox: Sandbox, command: str) -> str:
    return sandbox.commands.run(command, timeout=60).stdout.strip()


sandbox = Sandbox.create("base")
checkpoints = []
try:
    sandbox.files.write("/tmp/counter.py", COUNTER)
    run(sandbox, "setsid python3 /tmp/counter.py >/tmp/counter.log 2>&1 & true")
    run(sandbox, f"{ASK}/")
    for step in range(1, 6):
        count = run(sandbox, f"{ASK}/step && echo {step} >> /tmp/journal")
        began = time.monotonic()
        checkpoints.append(sandbox.create_snapshot().snapshot_id)
        took = (time.monotonic() - began) * 1000
        print(f"step {step}: the counter says {count.splitlines()[0]}, checkpoint in {took:.0f} ms")

    for step in (2, 4, 1):
        began = time.monotonic()
        sandbox.rollback(checkpoints[step - 1])
        took = (time.monotonic() - began) * 1000
        count, lines = run(sandbox, f"{ASK}/; echo; wc -l < /tmp/journal").split()
        print(f"back at step {step} in {took:.0f} ms: the counter says {count}, the journal has {lines}")
        assert int(count) == int(lines) == step
finally:
    sandbox.kill()
    for checkpoint in checkpoints:
        Sandbox.delete_snapshot(checkpoint)

"""A step that breaks the machine is undone, and the agent tries another."""

from cubesandbox import Sandbox

# What an agent might come up with, worst first.
ATTEMPTS = [
    ("remove what looks unused", "sudo rm -rf /usr/lib/python3* && python3 -c 'print(1)'"),
    ("kill what looks stuck", "pkill -9 -f worker.py; curl -sf http://127.0.0.1:8000/"),
    ("make room", "rm -f /tmp/cache-* && python3 -c 'print(1)' && curl -sf http://127.0.0.1:8000/"),
]

sandbox = Sandbox.create("base")
try:
    sandbox.commands.run("for i in 1 2 3; do head -c 1M /dev/urandom > /tmp/cache-$i; done")
    sandbox.files.write(
        "/tmp/worker.py",
        "import http.server as h; "
        "h.HTTPServer(('127.0.0.1', 8000), h.SimpleHTTPRequestHandler).serve_forever()",
    )
    sandbox.commands.run("setsid python3 /tmp/worker.py >/dev/null 2>&1 & true")
    sandbox.commands.run(
        "curl -sf --retry 30 --retry-connrefused --retry-delay 1 http://127.0.0.1:8000/ >/dev/null"
    )
    good = sandbox.create_snapshot().snapshot_id
    for name, command in ATTEMPTS:
        outcome = sandbox.commands.run(command, timeout=60)
        if outcome.exit_code == 0:
            print(f"{name}: it works")
            break
        print(f"{name}: exit code {outcome.exit_code}, so it never happened")
        sandbox.rollback(good)
    else:
        raise SystemExit("nothing worked")
    # The worker of before still runs: it was never restarted, only undone.
    left = sandbox.commands.run("pgrep -fc '[w]orker.py'; ls /tmp/cache-* 2>/dev/null | wc -l")
    workers, files = left.stdout.split()
    print(f"{workers} worker runs, {files} cache files are left")
    assert int(workers) >= 1 and files == "0"
finally:
    sandbox.kill()
    Sandbox.delete_snapshot(good)

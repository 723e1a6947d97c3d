"""One machine becomes n, each tries its own way, and the best one goes on.

Setting the machine up is paid for once: the copies share its memory until they change it.
"""

import time
from concurrent.futures import ThreadPoolExecutor

from cubesandbox import Sandbox

WAYS = 3
# Walks at random from the same start, by a seed of its own, and keeps what it found.
SEARCH = """
import json, random, sys
table = json.load(open("/dev/shm/table.json"))
random.seed(int(sys.argv[1]))
at, total = 0, 0
for _ in range(50):
    at = random.randrange(len(table)); total += table[at]
open("/tmp/result", "w").write(str(total)); print(total)
"""

start = Sandbox.create("base")
copies = []
try:
    # The slow part, in memory: done once.
    start.files.write("/tmp/search.py", SEARCH)
    start.commands.run(
        "python3 -c 'import json; json.dump([(i * 7919) % 1000 for i in range(200000)],"
        ' open("/dev/shm/table.json", "w"))\''
    )
    began = time.monotonic()
    copies = start.clone(WAYS, concurrency=WAYS)
    print(f"{WAYS} copies in {(time.monotonic() - began) * 1000:.0f} ms")

    def explore(way: int) -> int:
        command = f"python3 /tmp/search.py {way}"
        return int(copies[way].commands.run(command, timeout=60).stdout)

    with ThreadPoolExecutor(WAYS) as pool:
        found = list(pool.map(explore, range(WAYS)))
    best = found.index(max(found))
    print(f"found {found}: way {best} goes on, the others end")
    assert copies[best].files.read("/tmp/result").strip() == str(max(found))
    untouched = start.commands.run("ls /tmp/result 2>/dev/null | wc -l").stdout.strip()
    assert untouched == "0", "what a copy does stays in the copy"
finally:
    for sandbox in [start, *copies]:
        sandbox.kill()

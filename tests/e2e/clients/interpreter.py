"""Runs code as users of E2B's code interpreter do, and reports what came of it.

    interpreter.py session           one sandbox, all that it can do
    interpreter.py start             from create to the first answer, and the answers after it
    interpreter.py random            what sandboxes of one snapshot draw
"""

import json
import sys
import threading
import time

from e2b import TimeoutException
from e2b_code_interpreter import Sandbox

CHART = """
import matplotlib.pyplot as plt
plt.plot([1, 2, 3], [4, 5, 6], label='a')
plt.xlabel('Time (s)'); plt.title('T')
plt.show()
"""


def session() -> dict:
    report = {}
    sandbox = Sandbox.create(timeout=900, envs={"SET": "at create"})
    try:
        sandbox.run_code("x = 40")
        report["state"] = sandbox.run_code("x + 2").text
        report["cwd"] = sandbox.run_code("import os; os.getcwd()").text

        heard = []
        execution = sandbox.run_code(
            "import sys, time\nprint('out', flush=True)\ntime.sleep(1)\nprint('err', file=sys.stderr)\n'value'",
            on_stdout=lambda message: heard.append(["stdout", message.line, time.monotonic()]),
            on_stderr=lambda message: heard.append(["stderr", message.line, time.monotonic()]),
            on_result=lambda result: heard.append(["result", result.text, time.monotonic()]),
        )
        report["heard"] = [each[:2] for each in heard]
        report["streamed"] = heard[-1][2] - heard[0][2] > 0.5
        report["count"] = execution.execution_count

        error = sandbox.run_code("def f():\n    return 1 / 0\nf()").error
        report["error"] = [error.name, error.value, "return 1 / 0" in error.traceback]

        chart = sandbox.run_code(CHART).results[0]
        report["chart"] = [chart.chart.type.value, chart.chart.title, chart.chart.x_unit, bool(chart.png)]
        frame = sandbox.run_code("import pandas as pd; pd.DataFrame({'a': [1, 2]})").results[0]
        report["frame"] = [frame.data, "<table" in frame.html]

        variables = "import os; [os.environ.get(n) for n in ('SET', 'ONCE')]"
        report["envs"] = [
            sandbox.run_code(variables).text,
            sandbox.run_code(variables, envs={"ONCE": "1", "SET": "over"}).text,
            sandbox.run_code(variables).text,
        ]

        try:
            sandbox.run_code("import time; time.sleep(300)", timeout=2)
        except TimeoutException:
            report["after timeout"] = sandbox.run_code("x + 3", timeout=30).text

        contexts = [sandbox.create_code_context() for _ in range(5)]
        values = {}

        def square(number, context):
            sandbox.run_code(f"import time; time.sleep(1); y = {number}", context=context)
            values[number] = sandbox.run_code("y * y", context=context).text

        threads = [threading.Thread(target=square, args=each) for each in enumerate(contexts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        report["side by side"] = [values[number] for number in range(5)]
        sandbox.restart_code_context(contexts[0])
        report["restarted"] = sandbox.run_code("y", context=contexts[0]).error.name
        for context in contexts:
            sandbox.remove_code_context(context)
        report["contexts"] = sorted(each.language for each in sandbox.list_code_contexts())

        report["languages"] = [
            sandbox.run_code("import { EOL } from 'os'; EOL.length", language="js").text,
            sandbox.run_code("const n: number = 2; await Promise.resolve(n)", language="ts").text,
            "".join(sandbox.run_code("echo $((6 * 7))", language="bash").logs.stdout),
        ]
        report["crash"] = sandbox.run_code("import os; os._exit(1)").error.name
        report["after crash"] = sandbox.run_code("1 + 1").text
        systemctl = sandbox.commands.run(
            "sudo systemctl restart jupyter && sudo systemctl is-active jupyter code-interpreter",
            timeout=180,
        )
        report["units"] = systemctl.stdout.split()
        report["after units"] = sandbox.run_code("'x' in globals()").text
    finally:
        sandbox.kill()
    return report


def start() -> dict:
    first, later = [], []
    memory = 0
    for _ in range(5):
        began = time.monotonic()
        sandbox = Sandbox.create(timeout=120)
        try:
            assert sandbox.run_code("1+1").text == "2"
            first.append(time.monotonic() - began)
            for number in range(5):
                began = time.monotonic()
                assert sandbox.run_code(f"{number}+1").text == str(number + 1)
                later.append(time.monotonic() - began)
            free = sandbox.commands.run("free -m").stdout.splitlines()[1].split()
            memory = int(free[2])
        finally:
            sandbox.kill()
    first.sort()
    later.sort()
    return {
        "first ms": [round(each * 1000) for each in first],
        "later ms": round(later[len(later) // 2] * 1000),
        "memory MiB": memory,
    }


def random() -> dict:
    python = "import uuid, secrets, random; print(uuid.uuid4(), secrets.token_hex(8), random.random())"
    javascript = "console.log(crypto.randomUUID(), Math.random())"

    def drawn(sandbox):
        lines = []
        for code, language in ((python, "python"), (javascript, "js")):
            lines += "".join(sandbox.run_code(code, language=language).logs.stdout).split()
        return lines

    sandboxes = [Sandbox.create(timeout=300) for _ in range(2)]
    try:
        created = [drawn(sandbox) for sandbox in sandboxes]
        sandboxes[0].run_code("random.seed(7)")
        snapshot = sandboxes[0].create_snapshot()
        clones = [Sandbox.create(snapshot.snapshot_id, timeout=300) for _ in range(2)]
        sandboxes += clones
        cloned = [drawn(sandbox) for sandbox in clones]
    finally:
        for sandbox in sandboxes:
            sandbox.kill()
    Sandbox.delete_snapshot(snapshot.snapshot_id)
    return {"created": created, "cloned": cloned}


json.dump({"session": session, "start": start, "random": random}[sys.argv[1]](), sys.stdout)

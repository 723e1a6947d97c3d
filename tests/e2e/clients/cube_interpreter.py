"""Runs code with Cube's client."""

import json
import sys

from cubesandbox import Sandbox

sandbox = Sandbox.create("code-interpreter-v1")
try:
    sandbox.run_code("x = 1")
    heard = []
    sandbox.run_code("print('out')", on_stdout=lambda message: heard.append(message.text))
    report = {
        "state": sandbox.run_code("x + 1").text,
        "heard": heard,
        "error": sandbox.run_code("1 / 0").error.name,
        "envs": sandbox.run_code("import os; os.environ['A']", envs={"A": "b"}).text,
        "language": sandbox.run_code("console.log(6 * 7)", language="javascript").logs.stdout,
    }
finally:
    sandbox.kill()
json.dump(report, sys.stdout)

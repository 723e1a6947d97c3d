"""A template with everything in it, by E2B's Python client: built, built again, used, and one that
fails. Arguments: the name of the template, the directory of its files."""

import json
import sys
import time
import traceback

from e2b import Sandbox, Template

name, context = sys.argv[1:]
READY = """python3 -c 'import socket; socket.create_connection(("127.0.0.1", 8000))'"""


def template():
    return (
        Template(file_context_path=context)
        .from_image("python:3.12")
        .copy("app", "/srv/app")
        .copy("note.txt", "/srv/note.txt", mode=0o640)
        .copy("*.md", "/srv/docs/")
        .set_envs({"GREETING": "hello"})
        .set_envs({"BOTH": "$GREETING world"})
        .run_cmd("mkdir -p /srv/out && chown user /srv/out", user="root")
        .set_workdir("/srv/out")
        .run_cmd('echo "$GREETING from $(id -un) in $PWD" > built && echo told >&2')
        .set_start_cmd("python3 -m http.server 8000 --directory /srv", READY)
    )


def build(target, **options):
    lines = []
    started = time.monotonic()
    info = Template.build(target, name, on_build_logs=lambda e: lines.append(e.message), **options)
    return {
        "seconds": round(time.monotonic() - started, 2),
        "lines": lines,
        "template": info.template_id,
        "tags": info.tags,
    }


report = {"exists before": Template.exists(name)}
report["first"] = build(template(), cpu_count=2, memory_mb=512, tags=["v1"])
report["second"] = build(template(), cpu_count=2, memory_mb=512)
report["exists after"] = Template.exists(name)
report["tags"] = sorted(tag.tag for tag in Template.get_tags(name))
assigned = Template.assign_tags(f"{name}:v1", ["stable"])
report["assigned"] = assigned.tags
Template.remove_tags(name, ["v1"])
report["left"] = sorted(tag.tag for tag in Template.get_tags(name))

sandbox = Sandbox.create(name, envs={"OWN": "1"})
try:
    run = lambda command: sandbox.commands.run(command).stdout.strip()
    report["sandbox"] = {
        "env": run('echo "$GREETING $BOTH $OWN"'),
        "where": run("pwd; id -un"),
        "built": run("cat /srv/out/built"),
        "app": run("cat /srv/app/main.py /srv/app/deep/er.txt"),
        "note": run("stat -c '%a %U' /srv/note.txt"),
        "docs": run("ls /srv/docs"),
        "ignored": run("ls /srv/app"),
        "server": run("""python3 -c '
import urllib.request
print(urllib.request.urlopen("http://127.0.0.1:8000/out/built").read().decode())'"""),
    }
finally:
    sandbox.kill()

broken = Template(file_context_path=context).from_image("python:3.12")
broken = broken.run_cmd("echo before")
broken = broken.run_cmd("echo why it fails; exit 7")  # this line
broken = broken.run_cmd("echo never")
try:
    build(broken)
    report["broken"] = "it did not fail"
except Exception as error:
    report["broken"] = {
        "error": type(error).__name__,
        "message": str(error),
        "line": "".join(traceback.format_tb(error.__traceback__)),
    }
json.dump(report, sys.stdout)

"""A template of an image, by Cube's Python client. Arguments: the image, the name of the template."""

import json
import sys
import time

from cubesandbox import Sandbox, Template

image, name = sys.argv[1:]


def finished(job):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        status = Template.get_build_status(job.template_id, job.job_id)
        if status.status in ("READY", "FAILED"):
            return status
        time.sleep(0.2)
    raise TimeoutError(status)


report = {}
started = time.monotonic()
job = Template.build(
    image=image, name=name, cpu_count=1000, memory_mb=512, envs={"OWN": "yes"}, exposed_ports=[8000]
)
status = finished(job)
report["status"] = [status.status, status.progress, status.error_message]
report["seconds"] = round(time.monotonic() - started, 2)
report["lines"] = Template.get_build_logs(job.template_id, job.job_id)["lines"]
report["listed"] = any(each.template_id == job.template_id for each in Template.list())
detail = Template.get(job.template_id)
report["detail"] = [detail.status, detail.image_info, detail.replicas[0]["status"]]

sandbox = Sandbox.create(job.template_id)
try:
    run = lambda command: sandbox.commands.run(command).stdout.strip()
    report["sandbox"] = {
        "image": run("cat /etc/image"),
        "env": run('echo "$FROM_IMAGE $OWN"'),
        "started": run("cat /tmp/started"),
    }
finally:
    sandbox.kill()

report["rebuilt"] = finished(Template.rebuild(job.template_id)).status
broken = finished(Template.build(image="127.0.0.1:1/nothing:here", name=f"{name}-broken"))
report["broken"] = [broken.status, broken.error_message]
for template in (job.template_id, broken.template_id):
    Template.delete(template)
report["left"] = [each.template_id for each in Template.list()]
report["template"] = job.template_id
json.dump(report, sys.stdout)

"""What a newcomer does first with E2B's Python client. Only the environment says which server."""

from e2b import Sandbox

sandbox = Sandbox.create("base")
try:
    print(sandbox.commands.run("python3 -c 'print(2+2)'").stdout.strip())
finally:
    assert sandbox.kill(), "the sandbox was not there any more"

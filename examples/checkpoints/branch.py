"""An old checkpoint becomes a second line of history, beside the first that goes on."""

from cubesandbox import Sandbox


def note(sandbox: Sandbox, line: str) -> None:
    sandbox.commands.run(f"echo '{line}' >> /tmp/history")


def history(sandbox: Sandbox) -> list[str]:
    return sandbox.files.read("/tmp/history").split("\n")[:-1]


trunk = Sandbox.create("base")
branch = None
snapshots = []
try:
    for step in ("plan", "draft", "review"):
        note(trunk, step)
        snapshots.append(trunk.create_snapshot(f"history-{step}").snapshot_id)

    # From the draft on, everything could have been different.
    branch = Sandbox.create(snapshots[1])
    note(branch, "rewrite")
    note(trunk, "publish")
    print("trunk: ", " -> ".join(history(trunk)))
    print("branch:", " -> ".join(history(branch)))
    assert history(trunk) == ["plan", "draft", "review", "publish"]
    assert history(branch) == ["plan", "draft", "rewrite"]

    # A branch has a history of its own: it can go back beyond the point where it began.
    branch.rollback(snapshots[0])
    note(branch, "start over")
    print("branch:", " -> ".join(history(branch)))
    assert history(branch) == ["plan", "start over"]
finally:
    for sandbox in filter(None, (trunk, branch)):
        sandbox.kill()
    for snapshot in snapshots:
        Sandbox.delete_snapshot(snapshot)

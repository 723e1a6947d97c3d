// A volume, filled and read with E2B's JavaScript client, while a sandbox has it mounted.
import assert from "node:assert/strict";
import { Sandbox, Volume } from "e2b";

const volume = await Volume.create(`client-${crypto.randomUUID().slice(0, 8)}`);
let sandbox;
try {
  await volume.makeDir("/in/deep", { force: true });
  const content = new Uint8Array(1 << 20).map((_, at) => at % 251);
  await volume.writeFile("/in/deep/file", content, { mode: 0o600 });
  await assert.rejects(volume.writeFile("/in/deep/file", "other"), /exists already/);

  sandbox = await Sandbox.create("base", { volumeMounts: { "/data": volume } });
  const seen = await sandbox.commands.run(
    "stat -c '%a %s %U' /data/in/deep/file; cd /data; cp -r in out",
  );
  assert.equal(seen.stdout, `600 ${content.length} user\n`);
  assert.deepEqual(await volume.readFile("/out/deep/file", { format: "bytes" }), content);
  const entries = await volume.list("/", { depth: 2 });
  assert.deepEqual(entries.map((entry) => entry.path), ["/in", "/in/deep", "/out", "/out/deep"]);

  await volume.remove("/out");
  assert.equal(await volume.exists("/out/deep"), false);
  console.log("done");
} finally {
  await sandbox?.kill();
  await Volume.destroy(volume.volumeId);
}

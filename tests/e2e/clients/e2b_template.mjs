// A template with everything in it, by E2B's JavaScript client. Arguments: the name of the template,
// the directory of its files.
import { Sandbox, Template } from "e2b";

const [name, context] = process.argv.slice(2);
const READY = `python3 -c 'import socket; socket.create_connection(("127.0.0.1", 8000))'`;

const template = () =>
  Template({ fileContextPath: context })
    .fromImage("python:3.12")
    .copy("app", "/srv/app")
    .copy("note.txt", "/srv/note.txt", { mode: 0o640 })
    .setEnvs({ GREETING: "hello" })
    .runCmd("mkdir -p /srv/out && chown user /srv/out", { user: "root" })
    .setWorkdir("/srv/out")
    .runCmd('echo "$GREETING from $(id -un)" > built')
    .setStartCmd("python3 -m http.server 8000 --directory /srv", READY);

async function build(target) {
  const lines = [];
  const started = performance.now();
  const info = await Template.build(target, name, {
    cpuCount: 2,
    memoryMB: 512,
    onBuildLogs: (entry) => lines.push(entry.message),
  });
  return { seconds: (performance.now() - started) / 1000, lines, template: info.templateId };
}

const report = { first: await build(template()), second: await build(template()) };
report.exists = await Template.exists(name);
const sandbox = await Sandbox.create(name);
try {
  const run = async (command) => (await sandbox.commands.run(command)).stdout.trim();
  report.sandbox = {
    built: await run("cat built"),
    app: await run("cat /srv/app/main.py"),
    note: await run("stat -c '%a' /srv/note.txt"),
    server: await run(
      `python3 -c 'import urllib.request as u; print(u.urlopen("http://127.0.0.1:8000/out/built").read().decode())'`,
    ),
  };
} finally {
  await sandbox.kill();
}
try {
  await build(Template().fromImage("python:3.12").runCmd("echo why it fails; exit 7"));
  report.broken = "it did not fail";
} catch (error) {
  report.broken = { error: error.name, message: error.message, stack: error.stack };
}
console.log(JSON.stringify(report));

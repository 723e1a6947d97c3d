// What a newcomer does first with E2B's JavaScript client. Only the environment says which server.
import { Sandbox } from "e2b";

const sandbox = await Sandbox.create("base");
try {
  const result = await sandbox.commands.run("python3 -c 'print(2+2)'");
  console.log(result.stdout.trim());
} finally {
  await sandbox.kill();
}

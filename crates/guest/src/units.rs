//! The services `jupyter` and `code-interpreter`, by the names that E2B's images run them under, for
//! those who start and restart them with `systemctl`.
//!
//! An image without systemd gets a `systemctl` that knows these two: a script that runs this program
//! again, which asks the daemon on a socket that only root may use.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use cubicle_interpreter::{Interpreter, Unit};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
};

const SOCKET: &str = "run/cubicle/units";
/// Directories in which an image's own `systemctl` would be.
const PROGRAMS: [&str; 4] = ["usr/local/bin", "usr/local/sbin", "usr/bin", "usr/sbin"];
const SCRIPT: &str = "\
#!/bin/sh
# This image has no systemd. The sandbox's daemon runs the services `jupyter` and
# `code-interpreter`, and this asks it about them.
exec /proc/1/exe systemctl \"$@\"
";
/// Longest question, in bytes.
const MAX_QUESTION: u64 = 1024;

/// What `systemctl` exits with, as its manual says.
const NOT_ACTIVE: u8 = 3;
const NO_SUCH_UNIT: u8 = 5;

/// Answers questions about the units. Nothing here is worth failing for.
pub(crate) fn serve(root: &Path, interpreter: Arc<Interpreter>) {
    if let Err(error) = listen(&root.join(SOCKET), interpreter) {
        tracing::warn!(%error, "nobody can ask about the units");
        return;
    }
    if let Err(error) = install(root) {
        tracing::info!(%error, "there is no systemctl");
    }
}

fn listen(path: &Path, interpreter: Arc<Interpreter>) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            let interpreter = Arc::clone(&interpreter);
            tokio::spawn(async move {
                if let Err(error) = answer(connection, &interpreter).await {
                    tracing::debug!(%error, "nobody waits for the answer");
                }
            });
        }
    });
    Ok(())
}

/// Puts the script where programs are found, unless the image has its own or no shell to run it.
fn install(root: &Path) -> io::Result<()> {
    let name = "systemctl";
    let exists = |directory: &str| root.join(directory).join(name).symlink_metadata().is_ok();
    if PROGRAMS.into_iter().any(exists) || !root.join("bin/sh").exists() {
        return Ok(());
    }
    let path: PathBuf = root.join(PROGRAMS[0]).join(name);
    fs::write(&path, SCRIPT)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
}

async fn answer(connection: UnixStream, interpreter: &Arc<Interpreter>) -> io::Result<()> {
    let (reader, mut writer) = connection.into_split();
    let mut question = String::new();
    BufReader::new(reader.take(MAX_QUESTION))
        .read_line(&mut question)
        .await?;
    let (code, text) = match question.trim_end().split_once(' ') {
        Some((verb, unit)) => act(verb, unit, interpreter).await,
        None => (1, "a verb and a unit are needed".to_owned()),
    };
    writer.write_all(format!("{code}\n{text}").as_bytes()).await
}

/// Does it; exit status and what there is to say.
async fn act(verb: &str, name: &str, interpreter: &Arc<Interpreter>) -> (u8, String) {
    let Some(unit) = Unit::parse(name) else {
        return (NO_SUCH_UNIT, format!("Unit {name} not found."));
    };
    // The port is open for as long as there are kernels to be had; the kernels come and go.
    let kernels = interpreter.list().len();
    let active = unit == Unit::CodeInterpreter || kernels > 0;
    let done = match verb {
        "start" => interpreter.start().await,
        "restart" | "try-restart" | "reload-or-restart" => interpreter.restart_all().await,
        "stop" | "kill" => {
            interpreter.stop_all().await;
            Ok(())
        }
        "enable" | "reset-failed" => Ok(()),
        "is-active" | "status" => {
            let state = if active { "active" } else { "inactive" };
            let text = match verb {
                "status" => format!("{name}: {state} ({kernels} kernels run)"),
                _ => state.to_owned(),
            };
            return (if active { 0 } else { NOT_ACTIVE }, text);
        }
        "is-enabled" => return (0, "enabled".to_owned()),
        other => return (1, format!("Unknown command verb {other}.")),
    };
    match done {
        Ok(()) => (0, String::new()),
        Err(error) => (1, format!("Job for {name} failed: {error}")),
    }
}

/// `systemctl`, in an image that has none.
#[must_use]
pub fn systemctl(arguments: impl Iterator<Item = String>) -> ExitCode {
    let mut words = arguments.filter(|argument| !argument.starts_with('-'));
    let Some(verb) = words.next() else {
        eprintln!("usage: systemctl start|stop|restart|status|is-active jupyter|code-interpreter");
        return ExitCode::FAILURE;
    };
    if verb == "daemon-reload" {
        return ExitCode::SUCCESS;
    }
    let units: Vec<String> = words.collect();
    if units.is_empty() {
        eprintln!("systemctl {verb}: which unit? There are jupyter and code-interpreter.");
        return ExitCode::FAILURE;
    }
    let mut worst = 0;
    for unit in units {
        match ask(Path::new("/").join(SOCKET).as_path(), &verb, &unit) {
            Ok((code, text)) => {
                worst = worst.max(code);
                match (code, text.as_str()) {
                    (_, "") => {}
                    (0 | NOT_ACTIVE, text) => println!("{text}"),
                    (_, text) => eprintln!("{text}"),
                }
            }
            Err(error) => {
                eprintln!("systemctl: cannot ask the sandbox's daemon: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::from(worst)
}

fn ask(socket: &Path, verb: &str, unit: &str) -> io::Result<(u8, String)> {
    use std::io::{Read as _, Write as _};
    let mut connection = std::os::unix::net::UnixStream::connect(socket)?;
    writeln!(connection, "{verb} {unit}")?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    let (code, text) = answer.split_once('\n').unwrap_or(("1", &answer));
    Ok((code.parse().unwrap_or(1), text.to_owned()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use cubicle_interpreter::{Search, Surroundings};

    use super::*;

    struct Nothing;

    impl Surroundings for Nothing {
        fn environment(&self) -> BTreeMap<String, String> {
            BTreeMap::new()
        }

        fn life(&self) -> String {
            String::new()
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn questions_are_answered_as_systemctl_would() {
        let root = tempfile::tempdir().unwrap();
        for directory in ["usr/local/bin", "bin"] {
            fs::create_dir_all(root.path().join(directory)).unwrap();
        }
        let search = Search {
            path: Vec::new(),
            homes: Vec::new(),
            r_libraries: Vec::new(),
            emulated: false,
        };
        let interpreter = Interpreter::new(Arc::new(Nothing), search, root.path().join("kernels"));
        let script = root.path().join("usr/local/bin/systemctl");
        serve(root.path(), Arc::clone(&interpreter));
        assert!(!script.exists(), "without a shell nobody can run it");
        fs::write(root.path().join("bin/sh"), "").unwrap();
        serve(root.path(), interpreter);
        assert_eq!(
            fs::metadata(&script).unwrap().permissions().mode() & 0o777,
            0o755
        );

        let socket = root.path().join(SOCKET);
        assert_eq!(
            fs::metadata(&socket).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let asked = move |verb: &str, unit: &str| ask(&socket, verb, unit).unwrap();
        let answer = |code, text: &str| (code, text.to_owned());
        assert_eq!(asked("is-active", "jupyter"), answer(3, "inactive"));
        assert_eq!(
            asked("is-active", "code-interpreter.service"),
            answer(0, "active")
        );
        assert_eq!(asked("restart", "jupyter"), answer(0, ""));
        assert_eq!(asked("stop", "jupyter.service"), answer(0, ""));
        assert_eq!(asked("start", "ssh"), answer(5, "Unit ssh not found."));
        assert_eq!(
            asked("edit", "jupyter"),
            answer(1, "Unknown command verb edit.")
        );
    }
}

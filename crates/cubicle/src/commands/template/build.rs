//! `cubicle template build`: from a Dockerfile, an image, a template or a recipe to a request.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, Read as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use serde_json::{Map, Value, json};

use super::follow;
use crate::{
    cli::{Probe, TemplateBuild},
    client::Client,
    dockerfile::{self, Action, Context, Files, Plan, Problem},
    error::Error,
    output,
};

/// Exit code of a command that was interrupted, as shells have it.
const INTERRUPTED: u8 = 130;

pub(super) async fn run(
    client: &Client,
    options: TemplateBuild,
    json: bool,
) -> Result<ExitCode, Error> {
    let name = options.name.clone();
    let password = options.registry_password_stdin.then(password).transpose()?;
    let built = async {
        let (body, files) = request(options, password).await?;
        for files in files {
            upload(client, files, json).await?;
        }
        let build = client.build_template(&name, &body).await?;
        follow::show(build, json).await
    };
    match built.await {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error @ Error::Interrupted { .. }) => {
            error.print(json);
            Ok(ExitCode::from(INTERRUPTED))
        }
        Err(error) => Err(error),
    }
}

fn password() -> Result<String, Error> {
    let mut line = String::new();
    let read = std::io::stdin().lock().read_line(&mut line);
    read.map_err(|source| Error::setup("read the password from standard input", source))?;
    let password = line.trim_end_matches(['\r', '\n']);
    if password.is_empty() {
        let why = "standard input has no password in its first line".to_owned();
        return Err(Error::Usage(why));
    }
    Ok(password.to_owned())
}

async fn upload(client: &Client, files: Files, json: bool) -> Result<(), Error> {
    if client.has_files(&files.hash).await? {
        return Ok(());
    }
    let bar = crate::commands::up::progress_bar(json);
    let what = format!(
        "uploading {} of {} files",
        output::bytes(files.bytes),
        files.count
    );
    if bar.is_hidden() && !json {
        eprintln!("{:>8}  {what}", "files");
    }
    bar.set_message(what.clone());
    let shown = bar.clone();
    let sent = move |bytes| {
        shown.inc(bytes);
        shown.set_message(format!("{what}: {}", output::bytes(shown.position())));
    };
    let uploaded = client.upload_files(files, sent).await;
    bar.finish_and_clear();
    uploaded
}

/// The body of the request, and the files that have to be there before it.
async fn request(
    options: TemplateBuild,
    password: Option<String>,
) -> Result<(Value, Vec<Files>), Error> {
    let TemplateBuild {
        name,
        context,
        file,
        build_args,
        image,
        from,
        recipe,
        start,
        ready,
        ready_within,
        cpus,
        memory,
        disk,
        tags,
        env,
        mut ports,
        dns,
        registry_user,
        registry_password_stdin: _,
        force,
    } = options;
    let mut body = Map::new();
    let mut put = |field: &str, value: Value| {
        let said = match &value {
            Value::Null => false,
            Value::Array(list) => !list.is_empty(),
            Value::Object(map) => !map.is_empty(),
            _ => true,
        };
        if said {
            body.insert(field.to_owned(), value);
        }
    };
    let mut files = Vec::new();
    if context.is_some() || file.is_some() {
        let context = context.unwrap_or_else(|| PathBuf::from("."));
        let read = move || read(&context, file.as_deref(), &build_args);
        let (plan, found) = tokio::task::spawn_blocking(read)
            .await
            .map_err(|why| Error::setup("read the Dockerfile", why))??;
        let (steps, uploads) = steps(&plan, found);
        put("image", json!(plan.image));
        put("steps", json!(steps));
        put("command", json!(command(&plan)));
        for port in plan.ports {
            if !ports.contains(&port) {
                ports.push(port);
            }
        }
        files = uploads;
    } else {
        match (image, from, recipe) {
            (Some(image), _, _) => put("image", json!(image)),
            (_, Some(template), _) => put("template", json!(template)),
            (_, _, Some(recipe)) => put("recipe", json!(recipe)),
            _ if name.split(':').next() == Some("base") => put("recipe", json!("base")),
            _ => {
                return Err(Error::Usage(format!(
                    "say what {name} is built of: a directory with a Dockerfile, --image, --from or \
                     --recipe"
                )));
            }
        }
    }
    if let (Some(username), Some(password)) = (registry_user, password) {
        put(
            "registryAuth",
            json!({ "username": username, "password": password }),
        );
    }
    put("start", json!(start));
    put("ready", json!(ready.as_ref().map(probe)));
    put("readyWithinSeconds", json!(ready_within));
    put("cpuCount", json!(cpus));
    put("memoryMB", json!(memory));
    put("diskSizeMB", json!(disk));
    put("tags", json!(tags));
    put("env", json!(BTreeMap::from_iter(env)));
    put("ports", json!(ports));
    put("dns", json!(dns));
    if force {
        put("force", json!(true));
    }
    Ok((Value::Object(body), files))
}

fn probe(probe: &Probe) -> Value {
    match probe {
        Probe::Command(command) => json!({ "type": "exec", "command": command }),
        Probe::Http { port, path } => json!({ "type": "http", "port": port, "path": path }),
        Probe::Tcp { port } => json!({ "type": "tcp", "port": port }),
    }
}

/// What a Dockerfile starts.
fn command(plan: &Plan) -> Option<Vec<String>> {
    let Plan {
        entrypoint, cmd, ..
    } = plan;
    let words: Vec<String> = entrypoint.iter().chain(cmd).flatten().cloned().collect();
    (!words.is_empty()).then_some(words)
}

/// Reads a Dockerfile and the files that it copies, in the order of its steps.
fn read(
    context: &Path,
    file: Option<&Path>,
    build_args: &[(String, String)],
) -> Result<(Plan, Vec<Files>), Error> {
    let standard_input = file == Some(Path::new("-"));
    let path = file.map_or_else(|| context.join("Dockerfile"), Path::to_owned);
    let read = if standard_input {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        std::fs::read_to_string(&path)
    };
    let text = read.map_err(|source| Error::File {
        action: "read",
        path: path.clone(),
        source,
    })?;
    let shown = if standard_input {
        "the Dockerfile".to_owned()
    } else {
        path.display().to_string()
    };
    let wrong = |problem: Problem| Error::Usage(format!("{shown}, {problem}"));
    let plan = dockerfile::read(&text, build_args).map_err(wrong)?;
    for note in &plan.notes {
        eprintln!("note: {shown}, {note}");
    }
    let context = Context::open(context, &path)?;
    let mut files = Vec::new();
    for step in &plan.steps {
        if let Action::Copy(copy) = &step.action {
            files.push(context.files(step.line, copy).map_err(wrong)?);
        }
    }
    Ok((plan, files))
}

/// The steps for the server, and the files that they need. The same files are needed once.
fn steps(plan: &Plan, found: Vec<Files>) -> (Vec<Value>, Vec<Files>) {
    let mut steps = Vec::new();
    let mut uploads: Vec<Files> = Vec::new();
    let mut found = found.into_iter();
    for step in &plan.steps {
        let value = match &step.action {
            Action::Run(command) => json!({ "type": "run", "command": command }),
            Action::Env(pairs) => {
                // Pairs of one line do not see each other, and the last of a name holds.
                let env: BTreeMap<_, _> = pairs.iter().cloned().collect();
                json!({ "type": "env", "env": env })
            }
            Action::Workdir(path) => json!({ "type": "workdir", "path": path }),
            Action::User(user) => json!({ "type": "user", "user": user }),
            Action::Copy(copy) => {
                let Some(files) = found.next() else { continue };
                let value = json!({
                    "type": "copy", "src": files.source, "dest": copy.dest, "files": files.hash,
                    "user": copy.owner, "mode": copy.mode.map(|mode| format!("{mode:04o}")),
                });
                if !uploads.iter().any(|other| other.hash == files.hash) {
                    uploads.push(files);
                }
                value
            }
        };
        steps.push(value);
    }
    (steps, uploads)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, Command, Template};

    fn options(line: &[&str]) -> TemplateBuild {
        let words = ["cubicle", "template", "build"].iter().chain(line);
        match Cli::try_parse_from(words).expect("a command").command {
            Command::Template(Template::Build(options)) => *options,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_directory_becomes_a_request() {
        let dir = tempfile::tempdir().expect("a directory");
        let dockerfile = "FROM python:3.12\nENV A=1\nWORKDIR /srv\nCOPY --chmod=755 a b ./\n\
                          RUN ./a\nUSER user\nCOPY a b ./\nEXPOSE 80\nCMD [\"python\", \"b\"]\n";
        for (name, text) in [("Dockerfile", dockerfile), ("a", "a"), ("b", "b")] {
            std::fs::write(dir.path().join(name), text).expect("a file");
        }
        let path = dir.path().to_str().expect("a path");
        let line = [
            "web:v2", path, "--start", "serve", "--ready", "tcp:80", "--memory", "1024", "-t",
            "new", "-e", "B=2", "--force",
        ];
        let (body, files) = request(options(&line), None).await.expect("a request");
        assert_eq!(files.len(), 1, "the same files are uploaded once");
        // Modes, and so the hash, depend on the umask.
        let hash = &files[0].hash;
        let body = serde_json::to_string_pretty(&body).expect("JSON");
        insta::assert_snapshot!(body.replace(hash, "HASH"));
    }

    #[tokio::test]
    async fn origins() {
        let body = |line: &'static [&'static str]| async {
            request(options(line), Some("secret".into()))
                .await
                .map(|(body, _)| body)
        };
        assert_eq!(body(&[]).await.expect("base"), json!({ "recipe": "base" }));
        assert_eq!(
            body(&["x", "--from", "y"]).await.expect("a template"),
            json!({ "template": "y" })
        );
        let image = [
            "x",
            "--image",
            "y",
            "--registry-user",
            "me",
            "--registry-password-stdin",
        ];
        let image: &'static [&'static str] = Box::leak(Box::new(image));
        let auth = json!({ "username": "me", "password": "secret" });
        assert_eq!(
            body(image).await.expect("an image"),
            json!({ "image": "y", "registryAuth": auth })
        );
        let error = body(&["x"]).await.expect_err("nothing said").to_string();
        assert!(error.contains("what x is built of"), "{error}");
        let error = body(&["x", "/nonexistent"]).await.expect_err("no file");
        assert!(
            error.to_string().contains("/nonexistent/Dockerfile"),
            "{error}"
        );
    }
}

//! Real kernels, from a virtual environment that the first test makes and all later runs use.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, OnceLock},
};

use axum::{Router, body::Body};
use cubicle_interpreter::{Interpreter, Search, Surroundings};
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tempfile::TempDir;
use tower::ServiceExt as _;

const REQUIREMENTS: &str = include_str!("requirements.txt");

/// The environment's directory of programs.
fn programs() -> PathBuf {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    MADE.get_or_init(|| {
        let cache = env::var_os("CUBICLE_TEST_CACHE").map(PathBuf::from);
        let home = || PathBuf::from(env::var_os("HOME").unwrap()).join(".cache/cubicle-test");
        let venv = cache.unwrap_or_else(home).join("kernels");
        fs::create_dir_all(&venv).unwrap();
        // Test programs may run side by side.
        let lock = fs::File::create(venv.with_extension("lock")).unwrap();
        lock.lock().unwrap();
        let done = venv.join("requirements.txt");
        if fs::read_to_string(&done).is_ok_and(|done| done == REQUIREMENTS) {
            return venv.join("bin");
        }
        run(Command::new("python3")
            .args(["-m", "venv", "--clear"])
            .arg(&venv));
        let wanted = venv.join("wanted.txt");
        fs::write(&wanted, REQUIREMENTS).unwrap();
        run(Command::new(venv.join("bin/pip"))
            .args([
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--requirement",
            ])
            .arg(&wanted));
        fs::rename(wanted, done).unwrap();
        venv.join("bin")
    })
    .clone()
}

fn run(command: &mut Command) {
    let status = command.status().unwrap();
    assert!(status.success(), "{command:?}: {status}");
}

/// A sandbox whose life and environment a test can change.
#[derive(Default)]
pub(crate) struct Sandbox {
    pub(crate) environment: Mutex<BTreeMap<String, String>>,
    pub(crate) life: Mutex<String>,
}

impl Surroundings for Sandbox {
    fn environment(&self) -> BTreeMap<String, String> {
        self.environment.lock().unwrap().clone()
    }

    fn life(&self) -> String {
        self.life.lock().unwrap().clone()
    }
}

/// An interpreter with all kernels of the environment.
pub(crate) struct Bench {
    pub(crate) interpreter: Arc<Interpreter>,
    pub(crate) sandbox: Arc<Sandbox>,
    pub(crate) directory: TempDir,
    router: Router,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let search = Search {
            path: [
                programs().as_path(),
                Path::new("/usr/bin"),
                Path::new("/bin"),
            ]
            .map(Path::to_owned)
            .to_vec(),
            homes: vec![directory.path().join("home")],
            r_libraries: Vec::new(),
            emulated: false,
        };
        let sandbox = Arc::new(Sandbox::default());
        let surroundings: Arc<dyn Surroundings> = Arc::clone(&sandbox) as _;
        let interpreter = Interpreter::new(surroundings, search, directory.path().join("run"));
        let router = interpreter.router();
        Self {
            interpreter,
            sandbox,
            directory,
            router,
        }
    }

    pub(crate) async fn send(&self, method: &str, path: &str, body: Value) -> Response<Body> {
        let body = match body {
            Value::Null => Body::empty(),
            body => Body::from(body.to_string()),
        };
        let request = Request::builder().method(method).uri(path);
        let request = request.body(body).unwrap();
        self.router.clone().oneshot(request).await.unwrap()
    }

    pub(crate) async fn json(&self, method: &str, path: &str, body: Value) -> Value {
        let response = self.send(method, path, body).await;
        let status = response.status();
        let text = text(response).await;
        assert_eq!(status, StatusCode::OK, "{text}");
        serde_json::from_str(&text).unwrap()
    }

    pub(crate) async fn refused(&self, method: &str, path: &str, body: Value) -> (u16, String) {
        let response = self.send(method, path, body).await;
        (response.status().as_u16(), text(response).await)
    }

    /// A context's id.
    pub(crate) async fn context(&self, language: &str) -> String {
        let body = json!({"language": language, "cwd": self.directory.path()});
        let context = self.json("POST", "/contexts", body).await;
        assert_eq!(context["language"], language);
        context["id"].as_str().unwrap().to_owned()
    }

    pub(crate) async fn execute(&self, body: Value) -> Lines {
        let response = self.send("POST", "/execute", body).await;
        let status = response.status();
        let text = text(response).await;
        assert_eq!(status, StatusCode::OK, "{text}");
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.last().unwrap()["type"], "end_of_execution");
        Lines(lines)
    }

    pub(crate) async fn run(&self, context: &str, code: &str) -> Lines {
        self.execute(json!({"context_id": context, "code": code}))
            .await
    }
}

pub(crate) async fn text(response: Response<Body>) -> String {
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// What an execution said.
#[derive(Debug)]
pub(crate) struct Lines(pub(crate) Vec<Value>);

impl Lines {
    pub(crate) fn of(&self, kind: &str) -> Vec<&Value> {
        self.0.iter().filter(|line| line["type"] == kind).collect()
    }

    /// All text of a stream.
    pub(crate) fn printed(&self, stream: &str) -> String {
        self.of(stream)
            .iter()
            .map(|line| line["text"].as_str().unwrap())
            .collect()
    }

    /// The text of the main result.
    pub(crate) fn value(&self) -> &str {
        let results = self.of("result");
        let main = results.iter().find(|line| line["is_main_result"] == true);
        main.unwrap_or_else(|| panic!("no result in {self:?}"))["text"]
            .as_str()
            .unwrap()
    }

    pub(crate) fn error(&self) -> &Value {
        let errors = self.of("error");
        assert_eq!(errors.len(), 1, "{self:?}");
        errors[0]
    }
}

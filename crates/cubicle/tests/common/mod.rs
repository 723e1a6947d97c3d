//! The command line against a server without machines: the real API and the real data plane, over
//! sandboxes that are nothing but a guest daemon which agrees to everything.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test binary uses a part of it"
)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a helper of tests may panic"
)]

use std::{
    process::Output,
    sync::{Arc, Mutex},
};

use axum::{
    body::Body,
    http::{Request, Response},
    middleware,
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use cubicle_api::{ApiConfig, AppState};
use cubicle_control::{
    Control, ControlConfig,
    fleet::memory::MemoryFleet,
    lifecycle::State,
    template::{BuildSpec, BuildTemplate, Size},
};
use cubicle_ids::SandboxId;
use cubicle_proxy::{
    Availability, GuestIo, Proxy, Routes, SandboxRoute, SignedFile, Upstream, UpstreamError,
};
use futures::TryStreamExt as _;
use serde_json::{Value, json};

pub struct Server {
    pub fleet: Arc<MemoryFleet>,
    pub control: Control,
    /// The commands that were run in sandboxes.
    pub commands: Arc<Mutex<Vec<String>>>,
    url: String,
    key: String,
    dir: tempfile::TempDir,
}

impl Server {
    pub async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let fleet: Arc<MemoryFleet> = Arc::default();
        let config = ControlConfig::new(dir.path().join("cubicle.db"));
        let (control, _) = Control::open(config, fleet.clone()).await.unwrap();
        let key = control.keys.ensure_default().await.unwrap().unwrap().key;
        let order = BuildTemplate {
            name: "base".into(),
            tags: Vec::new(),
            size: Size {
                cpu_count: 2,
                memory_mib: 512,
                disk_mib: 1024,
            },
            spec: BuildSpec {
                force: true,
                ..BuildSpec::recipe("base")
            },
            request_id: None,
        };
        let build = control.templates.build(order).await.unwrap().build;
        let lines = control.templates.follow(build.id);
        lines.try_collect::<Vec<_>>().await.unwrap();

        let commands = Arc::default();
        let guests = Arc::new(Guests {
            control: control.clone(),
            commands: Arc::clone(&commands),
        });
        let proxy = Proxy::new(guests.clone(), guests);
        let state = AppState::new(control.clone(), ApiConfig::default(), |_| ());
        let intercept = middleware::from_fn_with_state(proxy, cubicle_proxy::intercept);
        let router = cubicle_api::router(state).layer(intercept);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self {
            fleet,
            control,
            commands,
            url,
            key,
            dir,
        }
    }

    /// Runs the program with these words, separated by blanks.
    pub async fn run(&self, words: &str) -> Output {
        tokio::process::Command::new(env!("CARGO_BIN_EXE_cubicle"))
            .args(words.split_whitespace())
            .env_clear()
            .env("CUBICLE_URL", &self.url)
            .env("CUBICLE_API_KEY", &self.key)
            .env("CUBICLE_DATA_DIR", self.dir.path())
            .output()
            .await
            .unwrap()
    }

    /// What a command that works prints.
    #[track_caller]
    pub fn ok(output: Output) -> String {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(
            output.status.success(),
            "{}{}",
            text(&output.stdout),
            text(&output.stderr)
        );
        text(&output.stdout)
    }

    /// The first word that a command that works prints: an id, mostly.
    pub async fn id(&self, words: &str) -> String {
        let text = Self::ok(self.run(words).await);
        text.split_whitespace().next().unwrap().to_owned()
    }

    /// What a command that works prints as JSON.
    pub async fn json(&self, words: &str) -> Value {
        let text = Self::ok(self.run(&format!("--json {words}")).await);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// A session of commands as a person sees it, with ids and times that do not change.
    pub async fn session(&self, lines: &[String]) -> String {
        let mut shown = String::new();
        for line in lines {
            let output = self.run(line).await;
            shown += &format!("$ cubicle {line}\n");
            shown += &String::from_utf8_lossy(&output.stdout);
            for said in String::from_utf8_lossy(&output.stderr).lines() {
                shown += &format!("! {said}\n");
            }
            if !output.status.success() {
                shown += &format!("({})\n", output.status);
            }
        }
        shown
    }
}

/// What hides the parts of a session that differ from run to run.
pub fn filters() -> insta::Settings {
    let mut settings = insta::Settings::clone_current();
    settings.add_filter(r"snap-[a-z0-9]{15,25}", "<snapshot>");
    settings.add_filter(r"\bi[a-z0-9]{19}\b", "<sandbox>");
    settings.add_filter(r"tpl-[a-z0-9]+", "<template>");
    settings.add_filter(r"\d{4}-\d\d-\d\dT[0-9:.]+Z", "<time>");
    settings.add_filter(r"[0-9a-f]{8}-[0-9a-f-]{27}", "<uuid>");
    settings.add_filter(r"[0-9.]+ m?s in all", "<some> ms in all");
    settings.add_filter(r"rolled back in [0-9.]+ m?s", "rolled back in <some> ms");
    settings.add_filter(r"http://127.0.0.1:\d+", "<server>");
    settings.add_filter(r"\b(\d+m)?\d+s\b", "<age>");
    settings
}

/// Sandboxes that are a guest daemon and nothing else.
struct Guests {
    control: Control,
    commands: Arc<Mutex<Vec<String>>>,
}

impl Routes for Guests {
    fn lookup(&self, id: &SandboxId) -> Option<SandboxRoute> {
        let sandbox = self.control.sandboxes.get(id).ok()?;
        Some(SandboxRoute {
            generation: sandbox.generation,
            availability: match sandbox.state {
                State::Running => Availability::Running,
                _ => Availability::Away,
            },
            traffic_token: None,
            mask_request_host: None,
        })
    }

    fn find_by_signature(&self, _: &SignedFile) -> Option<SandboxId> {
        None
    }
}

#[async_trait::async_trait]
impl Upstream for Guests {
    async fn request(
        &self,
        _: &SandboxId,
        request: Request<Body>,
    ) -> Result<Response<Body>, UpstreamError> {
        assert_eq!(request.uri().path(), "/process.Process/Start");
        let body = axum::body::to_bytes(request.into_body(), 1 << 20)
            .await
            .unwrap();
        // One flag byte and four of length come before each message.
        let message: Value = serde_json::from_slice(&body[5..]).unwrap();
        let command = message["process"].to_string();
        let output = if command.contains("MemAvailable") {
            "400\n380\n"
        } else {
            ""
        };
        self.commands.lock().unwrap().push(command);
        let events = [
            json!({"event": {"start": {"pid": 1}}}),
            json!({"event": {"data": {"stdout": BASE64.encode(output)}}}),
            json!({"event": {"end": {"exited": true, "status": "exit status 0"}}}),
        ];
        let mut reply: Vec<u8> = events.iter().flat_map(|event| frame(0, event)).collect();
        reply.extend(frame(2, &json!({})));
        Ok(Response::new(Body::from(reply)))
    }

    async fn connect(&self, id: &SandboxId, port: u16) -> Result<Box<dyn GuestIo>, UpstreamError> {
        let id = id.clone();
        Err(UpstreamError::PortClosed { id, port })
    }
}

fn frame(flags: u8, message: &Value) -> Vec<u8> {
    let body = message.to_string();
    let length = u32::try_from(body.len()).unwrap();
    let head = [&[flags][..], &length.to_be_bytes()].concat();
    [head, body.into_bytes()].concat()
}

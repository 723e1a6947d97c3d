//! A build, shown as it goes.

use std::collections::VecDeque;

use indicatif::ProgressBar;
use reqwest::Response;
use serde_json::json;

use crate::{
    client::templates::{BuildEvent, Following},
    error::Error,
    output,
};

/// Lines of a failed step that are shown once more where they were not shown before.
const LAST_LINES: usize = 20;

/// Shows how a build goes until it ends.
pub(in crate::commands) async fn follow(response: Response, json: bool) -> Result<(), Error> {
    show(Following::new(response), json).await
}

/// The same. Interrupted, it says how to find the build again, which goes on.
pub(super) async fn show(mut build: Following, json: bool) -> Result<(), Error> {
    let mut shown = Shown::new(json);
    let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
    loop {
        let event = tokio::select! {
            event = build.next() => event?,
            _ = &mut interrupted => return Err(shown.interrupted()),
        };
        match event {
            Some(event) => {
                if let Some(end) = shown.event(event) {
                    return end;
                }
            }
            None => {
                let why = "the server stopped in the middle of the build";
                return Err(Error::Usage(why.to_owned()));
            }
        }
    }
}

/// What a person has seen of a build.
struct Shown {
    json: bool,
    bar: ProgressBar,
    template: String,
    build: String,
    /// Last lines of the step at work.
    last: VecDeque<String>,
    step: String,
}

impl Shown {
    fn new(json: bool) -> Self {
        Self {
            json,
            bar: crate::commands::up::progress_bar(json),
            template: String::new(),
            build: String::new(),
            last: VecDeque::new(),
            step: String::new(),
        }
    }

    /// How it ended, if this is the end.
    fn event(&mut self, event: BuildEvent) -> Option<Result<(), Error>> {
        match event {
            BuildEvent::Started {
                template_id,
                build_id,
            } => {
                self.template = template_id;
                self.build = build_id;
                None
            }
            BuildEvent::Progress {
                step,
                message,
                level,
            } => {
                self.progress(step, message.trim_end(), &level);
                None
            }
            BuildEvent::Done {
                template_id,
                build_id,
                cached,
            } => {
                self.bar.finish_and_clear();
                if self.json {
                    output::print_json(&json!({
                        "templateID": template_id, "buildID": build_id, "cached": cached,
                    }));
                } else {
                    let how = if cached { " (nothing had changed)" } else { "" };
                    println!("{template_id}{how}");
                }
                Some(Ok(()))
            }
            BuildEvent::Failed { step, message } => {
                self.bar.finish_and_clear();
                // Elsewhere they were printed as they came.
                if !self.bar.is_hidden() {
                    for line in &self.last {
                        eprintln!("{:>8}  {line}", self.step);
                    }
                }
                Some(Err(Error::Usage(match step.as_deref() {
                    None => message,
                    Some("base") => format!("the base of the template: {message}"),
                    Some("finalize") => format!("the end of the build: {message}"),
                    Some(step) => format!("step {step}: {message}"),
                })))
            }
        }
    }

    fn progress(&mut self, step: String, message: &str, level: &str) {
        if self.step != step {
            self.step = step;
            self.last.clear();
        }
        if self.last.len() == LAST_LINES {
            self.last.pop_front();
        }
        self.last.push_back(message.to_owned());
        let line = format!("{:>8}  {message}", self.step);
        if self.json {
            return;
        }
        if self.bar.is_hidden() {
            eprintln!("{line}");
        } else if level == "debug" {
            self.bar.set_message(line);
        } else {
            self.bar.println(&line);
            self.bar.set_message(line);
        }
    }

    fn interrupted(&self) -> Error {
        self.bar.finish_and_clear();
        Error::Interrupted {
            what: if self.template.is_empty() {
                "nothing is known of a build yet".to_owned()
            } else {
                format!("build {} goes on in the server", self.build)
            },
            hint: (!self.template.is_empty())
                .then(|| format!("cubicle template logs {} --follow", self.template)),
        }
    }
}

//! What an execution says: events of a kernel as lines of JSON, in the shapes that E2B's clients
//! read.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// One line of an execution's answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Output {
    /// Text that the code printed.
    Stdout(Text),
    /// Text that the code printed as an error.
    Stderr(Text),
    /// A value: of the last expression, or one that the code displayed.
    Result(Box<Rich>),
    /// The code failed.
    Error {
        /// What kind of error.
        name: String,
        /// What it says.
        value: String,
        /// Where it happened, for people.
        traceback: String,
    },
    /// How much code the context has run.
    NumberOfExecutions {
        /// Counts from 1.
        execution_count: u64,
    },
    /// The code still runs.
    Keepalive,
    /// There is nothing more to say.
    EndOfExecution,
}

/// Text and when it was printed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Text {
    /// The text, as it came.
    pub text: String,
    /// RFC 3339.
    pub timestamp: String,
}

/// A value in all the forms that its kernel has for it.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Rich {
    #[serde(flatten)]
    forms: BTreeMap<&'static str, Value>,
    /// Forms that have no name of their own, by MIME type.
    pub extra: Map<String, Value>,
    /// Whether it is the value of the last expression.
    pub is_main_result: bool,
}

/// MIME types that have a name in an answer.
const FORMS: [(&str, &str); 12] = [
    ("text/plain", "text"),
    ("text/html", "html"),
    ("text/markdown", "markdown"),
    ("image/svg+xml", "svg"),
    ("image/png", "png"),
    ("image/jpeg", "jpeg"),
    ("application/pdf", "pdf"),
    ("text/latex", "latex"),
    ("application/json", "json"),
    ("application/javascript", "javascript"),
    ("e2b/data", "data"),
    ("e2b/chart", "chart"),
];

impl Rich {
    /// The value in a kernel's bundle of MIME types.
    #[must_use]
    pub fn new(mut bundle: Map<String, Value>, is_main_result: bool) -> Self {
        let mut forms = BTreeMap::new();
        for (mime, name) in FORMS {
            if let Some(form) = bundle.remove(mime).filter(|form| !form.is_null()) {
                let form = if mime == "application/json" {
                    form
                } else {
                    joined(form)
                };
                forms.insert(name, form);
            }
        }
        if let Some(Value::String(text)) = forms.get_mut("text") {
            unquote(text);
        }
        Self {
            forms,
            extra: bundle,
            is_main_result,
        }
    }

    /// The form of that name.
    #[must_use]
    pub fn form(&self, name: &str) -> Option<&Value> {
        self.forms.get(name)
    }
}

/// Kernels may send a text as a list of its lines.
fn joined(form: Value) -> Value {
    match form {
        Value::Array(lines) if !lines.is_empty() && lines.iter().all(Value::is_string) => lines
            .iter()
            .filter_map(Value::as_str)
            .collect::<String>()
            .into(),
        other => other,
    }
}

/// A string is shown as what it holds.
fn unquote(text: &mut String) {
    let inner = ['\'', '"']
        .into_iter()
        .find_map(|quote| text.strip_prefix(quote)?.strip_suffix(quote));
    if let Some(inner) = inner {
        *text = inner.to_owned();
    }
}

impl Output {
    /// The line, with its end.
    #[must_use]
    pub fn line(&self) -> Bytes {
        // Maps with texts as keys, which cannot fail.
        let mut line = serde_json::to_vec(self).unwrap_or_default();
        line.push(b'\n');
        line.into()
    }
}

/// Contents of the messages that an execution leads to.
pub(crate) mod content {
    use super::{Deserialize, Map, Serialize, Value};

    #[derive(Debug, Serialize)]
    pub(crate) struct Execute<'a> {
        pub(crate) code: &'a str,
        pub(crate) silent: bool,
        pub(crate) store_history: bool,
        pub(crate) user_expressions: Map<String, Value>,
        pub(crate) allow_stdin: bool,
        pub(crate) stop_on_error: bool,
    }

    #[derive(Debug, Deserialize)]
    pub(crate) struct Status {
        pub(crate) execution_state: String,
    }

    #[derive(Debug, Deserialize)]
    pub(crate) struct Stream {
        pub(crate) name: String,
        #[serde(default)]
        pub(crate) text: String,
    }

    #[derive(Debug, Deserialize)]
    pub(crate) struct Display {
        #[serde(default)]
        pub(crate) data: Map<String, Value>,
    }

    #[derive(Debug, Deserialize)]
    pub(crate) struct Input {
        pub(crate) execution_count: u64,
    }

    #[derive(Debug, Default, Deserialize)]
    pub(crate) struct Failure {
        #[serde(default)]
        pub(crate) status: String,
        #[serde(default)]
        pub(crate) ename: String,
        #[serde(default)]
        pub(crate) evalue: String,
        #[serde(default)]
        pub(crate) traceback: Vec<String>,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn line(output: Output) -> Value {
        let line = output.line();
        assert_eq!(line.last(), Some(&b'\n'));
        serde_json::from_slice(&line).unwrap()
    }

    fn bundle(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn lines_have_the_shapes_that_clients_read() {
        let text = Text {
            text: "a\n".into(),
            timestamp: "2026-01-01T00:00:00Z".into(),
        };
        assert_eq!(
            line(Output::Stdout(text)),
            json!({"type": "stdout", "text": "a\n", "timestamp": "2026-01-01T00:00:00Z"})
        );
        assert_eq!(
            line(Output::NumberOfExecutions { execution_count: 3 }),
            json!({"type": "number_of_executions", "execution_count": 3})
        );
        assert_eq!(line(Output::Keepalive), json!({"type": "keepalive"}));
        assert_eq!(
            line(Output::EndOfExecution),
            json!({"type": "end_of_execution"})
        );
    }

    #[test]
    fn a_bundle_becomes_named_forms_and_the_rest() {
        let bundle = bundle(json!({
            "text/plain": "'it''s'",
            "image/png": "aGk=\n",
            "text/html": ["<b>", "x</b>"],
            "application/json": ["a", 1],
            "e2b/data": {"a": [1]},
            "e2b/chart": null,
            "application/vnd.x": {"y": 1},
        }));
        assert_eq!(
            line(Output::Result(Box::new(Rich::new(bundle, true)))),
            json!({
                "type": "result", "text": "it''s", "png": "aGk=\n", "html": "<b>x</b>",
                "json": ["a", 1], "data": {"a": [1]}, "extra": {"application/vnd.x": {"y": 1}},
                "is_main_result": true,
            })
        );
    }

    #[test]
    fn only_a_pair_of_quotes_is_taken_off() {
        for (text, shown) in [
            ("'a'", "a"),
            ("\"\"", ""),
            ("'", "'"),
            ("'a\"", "'a\""),
            ("12", "12"),
        ] {
            let bundle = bundle(json!({"text/plain": text}));
            assert_eq!(Rich::new(bundle, false).form("text"), Some(&json!(shown)));
        }
    }
}

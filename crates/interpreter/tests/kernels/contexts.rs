use std::time::{Duration, Instant};

use axum::body::Body;
use cubicle_interpreter::{Health, Unit};
use http::Response;
use http_body_util::BodyExt as _;
use serde_json::{Value, json};

use crate::support::Bench;

/// Reads an execution's answer until a line contains `text`.
async fn until(response: &mut Response<Body>, text: &str) -> String {
    let mut seen = String::new();
    while !seen.contains(text) {
        let frame = response.body_mut().frame().await.unwrap().unwrap();
        seen.push_str(&String::from_utf8_lossy(frame.data_ref().unwrap()));
    }
    seen
}

#[tokio::test]
async fn contexts_are_made_listed_restarted_and_removed() {
    let bench = Bench::new();
    assert_eq!(bench.json("GET", "/contexts", Value::Null).await, json!([]));
    let first = bench.context("python").await;
    let second = bench.context("python").await;
    let contexts = bench.json("GET", "/contexts", Value::Null).await;
    let ids: Vec<&str> = contexts
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["id"].as_str().unwrap())
        .collect();
    assert_eq!(ids, [&first, &second]);
    assert_eq!(contexts[0]["cwd"], bench.directory.path().to_str().unwrap());

    bench.run(&first, "x = 1").await;
    let missing = bench.run(&second, "x").await;
    assert_eq!(missing.error()["value"], "name 'x' is not defined");
    assert_eq!(bench.run(&first, "x").await.value(), "1");
    let restart = format!("/contexts/{first}/restart");
    assert_eq!(bench.json("POST", &restart, Value::Null).await, Value::Null);
    let gone = bench.run(&first, "x").await;
    assert_eq!(gone.error()["name"], "NameError");
    assert_eq!(gone.of("number_of_executions")[0]["execution_count"], 1);
    assert!(gone.of("stderr").is_empty());

    let path = format!("/contexts/{first}");
    assert_eq!(bench.json("DELETE", &path, Value::Null).await, Value::Null);
    for (method, path) in [("DELETE", &path), ("POST", &restart)] {
        let refused = bench.refused(method, path, Value::Null).await;
        assert_eq!(refused, (404, format!("Context {first} not found")));
    }
    assert_eq!(bench.interpreter.list().len(), 1);
}

#[tokio::test]
async fn what_cannot_be_done_is_refused_in_plain_text() {
    let bench = Bench::new();
    let refused = async |path, body| bench.refused("POST", path, body).await;
    let both = json!({"code": "1", "context_id": "x", "language": "python"});
    let expected = "Only one of context_id or language can be provided";
    assert_eq!(refused("/execute", both).await, (400, expected.to_owned()));
    let unknown = json!({"code": "1", "context_id": "x"});
    assert_eq!(
        refused("/execute", unknown).await,
        (404, "Context x not found".to_owned())
    );
    let (status, text) = refused("/execute", json!({"code": "1", "language": "java"})).await;
    assert_eq!(status, 500);
    assert!(text.contains("pip install jjava"), "{text}");
    assert!(text.contains("bash, javascript, python"), "{text}");
    let (status, text) = refused("/contexts", json!({"cwd": "/nowhere"})).await;
    assert_eq!((status, text.contains("/nowhere")), (400, true));
    let variable = json!({"code": "1", "env_vars": {"A=B": "1"}});
    assert_eq!(refused("/execute", variable).await.0, 400);
    assert_eq!(
        refused("/execute", json!({"language": "python"})).await.0,
        422
    );
    assert_eq!(bench.interpreter.list(), []);
}

#[tokio::test]
async fn executions_of_one_context_run_in_order_and_contexts_side_by_side() {
    let bench = Bench::new();
    let mut contexts = Vec::new();
    for _ in 0..5 {
        contexts.push(bench.context("python").await);
    }
    let started = Instant::now();
    let slow = contexts
        .iter()
        .map(|id| bench.run(id, "import time; time.sleep(1); order = []"));
    futures::future::join_all(slow).await;
    assert!(
        started.elapsed() < Duration::from_secs(4),
        "{:?}",
        started.elapsed()
    );

    let codes: Vec<String> = (0..20).map(|n| format!("order.append({n})")).collect();
    futures::future::join_all(codes.iter().map(|code| bench.run(&contexts[0], code))).await;
    let order = bench.run(&contexts[0], "order == list(range(20))").await;
    assert_eq!(order.value(), "True");
    let count = bench.run(&contexts[0], "1").await;
    assert_eq!(count.of("number_of_executions")[0]["execution_count"], 23);
}

#[tokio::test]
async fn a_client_that_goes_away_interrupts_and_one_that_stays_hears_that_it_runs() {
    let bench = Bench::new();
    let id = bench.context("python").await;
    let body = json!({"context_id": id, "code": "print('on', flush=True)\nimport time\ntime.sleep(1000)", "env_vars": {"A": "1"}});
    let mut response = bench.send("POST", "/execute", body).await;
    let seen = until(&mut response, "keepalive").await;
    assert!(seen.contains("\"on\\n\""), "{seen}");
    drop(response);
    let after = bench.run(&id, "import os; os.environ.get('A')").await;
    assert_eq!(after.of("stderr").len(), 0, "{after:?}");
    assert_eq!(after.0.len(), 2, "{after:?}");

    // One that never got its turn leaves no trace.
    let busy = bench.run(&id, "time.sleep(1); y = 1");
    let body = json!({"context_id": id, "code": "y = 2"});
    let waiting = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        drop(bench.send("POST", "/execute", body).await);
    };
    tokio::join!(busy, waiting);
    assert_eq!(bench.run(&id, "y").await.value(), "1");
}

#[tokio::test]
async fn a_kernel_that_does_not_stop_is_replaced() {
    let bench = Bench::new();
    let id = bench.context("python").await;
    let code = "import signal\n\
        signal.signal(signal.SIGINT, signal.SIG_IGN)\n\
        print('on', flush=True)\n\
        while True: pass";
    let mut response = bench
        .send("POST", "/execute", json!({"context_id": id, "code": code}))
        .await;
    until(&mut response, r#""on\n""#).await;
    drop(response);
    let after = bench.run(&id, "1 + 1").await;
    assert_eq!(after.value(), "2");
    assert!(
        after.printed("stderr").contains("could not be interrupted"),
        "{after:?}"
    );
}

#[tokio::test]
async fn a_kernel_that_crashes_is_reported_and_replaced() {
    let bench = Bench::new();
    let id = bench.context("python").await;
    let crash = bench
        .run(
            &id,
            "print('before', flush=True)\nimport os; os.kill(os.getpid(), 9)",
        )
        .await;
    assert_eq!(crash.error()["name"], "ContextRestarting");
    assert!(
        crash.error()["value"]
            .as_str()
            .unwrap()
            .contains("signal 9"),
        "{crash:?}"
    );
    let after = bench.run(&id, "1 + 1").await;
    assert_eq!((after.value(), after.of("stderr").len()), ("2", 0));

    // Nobody was told when it crashes with nobody listening.
    let code = "import threading, os; threading.Timer(0.3, os._exit, [5]).start()";
    bench.run(&id, code).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let after = bench.run(&id, "1 + 1").await;
    assert_eq!(after.value(), "2");
    assert!(
        after.printed("stderr").contains("it exited with 5"),
        "{after:?}"
    );
}

#[tokio::test]
async fn a_restart_ends_what_runs() {
    let bench = Bench::new();
    let id = bench.context("python").await;
    let running = bench.run(&id, "import time; time.sleep(1000)");
    let restart = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        bench
            .json("POST", &format!("/contexts/{id}/restart"), Value::Null)
            .await
    };
    let (running, _) = tokio::join!(running, restart);
    assert_eq!(running.error()["name"], "ContextRestarting");
    assert_eq!(bench.run(&id, "3").await.value(), "3");
}

#[tokio::test]
async fn health_starts_the_default_contexts_and_units_restart_them() {
    let bench = Bench::new();
    assert!(bench.interpreter.has_kernels());
    assert_eq!(bench.interpreter.health(), Health::Starting);
    let until = Instant::now() + Duration::from_secs(60);
    while bench.interpreter.health() != Health::Ready {
        assert!(Instant::now() < until, "{:?}", bench.interpreter.health());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(bench.json("GET", "/health", Value::Null).await, "OK");
    let languages = |bench: &Bench| -> Vec<String> {
        let mut languages: Vec<_> = bench
            .interpreter
            .list()
            .into_iter()
            .map(|c| c.language)
            .collect();
        languages.sort();
        languages
    };
    assert_eq!(languages(&bench), ["javascript", "python"]);
    bench.execute(json!({"code": "x = 1"})).await;
    bench
        .execute(json!({"code": "var x = 1", "language": "ts"}))
        .await;
    assert_eq!(languages(&bench).len(), 2);

    assert_eq!(Unit::parse("jupyter.service"), Some(Unit::Jupyter));
    assert_eq!(Unit::parse("code-interpreter"), Some(Unit::CodeInterpreter));
    assert_eq!(Unit::parse("ssh"), None);
    bench.interpreter.restart_all().await.unwrap();
    assert_eq!(languages(&bench), ["javascript", "python"]);
    let gone = bench.execute(json!({"code": "x"})).await;
    assert_eq!(gone.error()["name"], "NameError");
    bench.interpreter.stop_all().await;
    assert_eq!(bench.interpreter.list(), []);
    let left = std::fs::read_dir(bench.directory.path().join("run"))
        .unwrap()
        .count();
    assert_eq!(left, 0);
}

use serde_json::json;

use crate::support::Bench;

#[tokio::test]
async fn python_prints_fails_and_keeps_state() {
    let bench = Bench::new();
    let id = bench.context("python").await;
    let first = bench
        .run(
            &id,
            "import sys\nprint('out')\nprint('err', file=sys.stderr)\nx = 'it is'; x",
        )
        .await;
    let kinds: Vec<&str> = first
        .0
        .iter()
        .map(|line| line["type"].as_str().unwrap())
        .collect();
    assert_eq!(kinds[0], "number_of_executions");
    assert_eq!(first.printed("stdout"), "out\n");
    assert_eq!(first.printed("stderr"), "err\n");
    assert_eq!(first.value(), "it is");
    assert_eq!(first.of("number_of_executions")[0]["execution_count"], 1);

    let second = bench
        .run(&id, "    def f():\n        return 1 / 0\n    f()")
        .await;
    assert_eq!(second.error()["name"], "ZeroDivisionError");
    assert_eq!(second.error()["value"], "division by zero");
    let traceback = second.error()["traceback"].as_str().unwrap();
    assert!(traceback.contains("return 1 / 0"), "{traceback}");
    assert!(!traceback.contains('\u{1b}'), "{traceback}");
    assert_eq!(second.of("number_of_executions")[0]["execution_count"], 2);

    let shell = bench.run(&id, "!pwd").await;
    assert_eq!(
        shell.printed("stdout").trim(),
        bench.directory.path().to_str().unwrap()
    );
    // Nothing of the daemon's own is in the user's way.
    let names = bench
        .run(&id, "sorted(n for n in globals() if not n.startswith('_'))")
        .await;
    assert_eq!(
        names.value(),
        "['In', 'Out', 'exit', 'f', 'get_ipython', 'open', 'quit', 'sys', 'x']"
    );
}

#[tokio::test]
async fn javascript_and_typescript_run_in_deno() {
    let bench = Bench::new();
    let id = bench.context("javascript").await;
    let imports = bench
        .run(
            &id,
            "\n    import { readFileSync } from 'fs'\n    console.log(typeof readFileSync)\n",
        )
        .await;
    assert_eq!(imports.printed("stdout"), "function\n", "{imports:?}");
    let awaited = bench
        .run(&id, "await Promise.resolve('Hello World!')")
        .await;
    assert_eq!(awaited.value(), "Hello World!");
    assert_eq!(
        bench.run(&id, "process.cwd()").await.value(),
        bench.directory.path().to_str().unwrap()
    );
    assert_eq!(
        bench.run(&id, "require('os').EOL.length").await.value(),
        "1"
    );
    let typed = bench.run(&id, "const n: number = 3; console.log(n)").await;
    assert_eq!(typed.printed("stdout"), "3\n");
    let failed = bench.run(&id, "throw new TypeError('why')").await;
    assert_eq!(
        (
            failed.error()["name"].as_str(),
            failed.error()["value"].as_str()
        ),
        (Some("TypeError"), Some("why"))
    );
}

#[tokio::test]
async fn bash_runs() {
    let bench = Bench::new();
    let id = bench.context("bash").await;
    assert_eq!(
        bench.run(&id, "pwd").await.printed("stdout").trim(),
        bench.directory.path().to_str().unwrap()
    );
    bench.run(&id, "x=5").await;
    assert_eq!(
        bench.run(&id, "echo $((x + 1))").await.printed("stdout"),
        "6\n"
    );
}

#[tokio::test]
async fn variables_of_an_execution_are_gone_after_it_and_the_sandbox_s_are_kept() {
    let bench = Bench::new();
    bench
        .sandbox
        .environment
        .lock()
        .unwrap()
        .insert("KEPT".into(), "old".into());
    let nasty = "a'b\"c\\d $HOME\nä\u{1f600}";
    for (language, see) in [
        (
            "python",
            "import os; print([os.environ.get(n, '-') for n in ['KEPT', 'MINE']])",
        ),
        (
            "javascript",
            "console.log([process.env.KEPT ?? '-', process.env.MINE ?? '-'])",
        ),
        ("bash", "echo \"[ '${KEPT--}', '${MINE--}' ]\""),
    ] {
        let id = bench.context(language).await;
        let seen = async |variables| {
            let body = json!({"context_id": id, "code": see, "env_vars": variables});
            let printed = bench.execute(body).await.printed("stdout");
            printed.replace(['[', ']', ' ', '\n', '"', '\''], "")
        };
        assert_eq!(seen(json!({})).await, "old,-", "{language}");
        assert_eq!(seen(json!({"MINE": "x"})).await, "old,x", "{language}");
        assert_eq!(seen(json!({"KEPT": "over"})).await, "over,-", "{language}");
        assert_eq!(seen(json!(null)).await, "old,-", "{language}");
        // A restore may change the sandbox's.
        bench
            .sandbox
            .environment
            .lock()
            .unwrap()
            .insert("KEPT".into(), "new".into());
        assert_eq!(seen(json!({})).await, "new,-", "{language}");
        bench.sandbox.environment.lock().unwrap().remove("KEPT");
        assert_eq!(seen(json!({})).await, "-,-", "{language}");
        bench
            .sandbox
            .environment
            .lock()
            .unwrap()
            .insert("KEPT".into(), "old".into());

        let exact = match language {
            "python" => "print(len(os.environ['MINE'].encode()))",
            "javascript" => "console.log(new TextEncoder().encode(process.env.MINE).length)",
            _ => "printf %s \"$MINE\" | wc -c",
        };
        let body = json!({"context_id": id, "code": exact, "env_vars": {"MINE": nasty}});
        let printed = bench.execute(body).await.printed("stdout");
        assert_eq!(printed.trim(), nasty.len().to_string(), "{language}");
    }
}

#[tokio::test]
async fn a_restored_sandbox_draws_other_numbers_unless_they_are_seeded() {
    let bench = Bench::new();
    let live = |life: &str| *bench.sandbox.life.lock().unwrap() = life.to_owned();
    // Whether the state of the generator that code has set is kept.
    for (seeded, kept) in [(true, true), (false, false)] {
        live("template");
        let id = bench.context("python").await;
        if seeded {
            bench.run(&id, "import random; random.seed(7)").await;
        }
        live("sandbox");
        let drawn = bench.run(&id, "import random; random.random()").await;
        assert_eq!(drawn.value() == "0.32383276483316237", kept, "{drawn:?}");
    }
    // The default context may be told before anybody runs code in it, and nobody sees that.
    live("template");
    bench.interpreter.start().await.unwrap();
    let environment = &bench.sandbox.environment;
    environment.lock().unwrap().insert("NEW".into(), "1".into());
    live("sandbox");
    bench.interpreter.refresh().await;
    let code = "import os; print(os.environ['NEW'], [n for n in ('_', '__') if globals().get(n)])";
    let told = bench.execute(json!({"code": code})).await;
    assert_eq!(told.printed("stdout"), "1 []\n", "{told:?}");
    assert_eq!(told.of("number_of_executions")[0]["execution_count"], 1);
    assert_eq!(told.0.len(), 3);

    let id = bench.context("javascript").await;
    let draw = "Math.random()";
    live("another");
    let first = bench.run(&id, draw).await;
    assert!(first.value().starts_with("0."), "{first:?}");
    assert!(first.of("stderr").is_empty());
}

//! The service as clients see it: real processes, through the real router, over HTTP/1.1.

mod service;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use http_body_util::BodyExt as _;
use serde_json::{Value, json};

use service::*;

#[tokio::test]
async fn output_exit_code_and_order_are_those_of_the_program() {
    let service = Service::new().await;
    let outcome = service.run("echo out; echo err >&2; exit 3").await;
    assert_eq!(
        (outcome.stdout(), &outcome.stderr[..]),
        ("out\n", &b"err\n"[..])
    );
    assert_eq!(outcome.end, exited(3));
    assert_eq!(service.run("true").await.end, exited(0));
    assert_eq!(service.run("no-such-program-here").await.end, exited(127));
    assert_eq!(service.run("kill -9 $$").await.end, killed());
    let logs = service.journal.to_json_lines();
    assert_eq!(logs.matches("process started").count(), 4);
    assert!(logs.contains("\"status\":\"exit status 127\""), "{logs}");
}

#[tokio::test]
async fn the_end_comes_at_once_when_nothing_is_left_behind() {
    let service = Service::new().await;
    let mut fastest = Duration::MAX;
    for _ in 0..5 {
        let start = Instant::now();
        service.run("echo x").await;
        fastest = fastest.min(start.elapsed());
    }
    assert!(fastest < Duration::from_millis(100), "{fastest:?}");
}

#[tokio::test]
async fn ten_megabytes_arrive_intact() {
    let service = Service::new().await;
    let outcome = service.run("seq 1 1400000; exit 1").await;
    let want: String = (1..=1_400_000).map(|i| format!("{i}\n")).collect();
    assert!(want.len() > 9 << 20);
    assert!(outcome.stdout() == want);
    assert_eq!(outcome.end, exited(1));
}

#[tokio::test]
async fn a_background_child_does_not_delay_the_end_and_lives_on() {
    let service = Service::new().await;
    let start = Instant::now();
    let outcome = service
        .run("(while :; do echo tick; sleep 0.02; done) & echo pid $!; head -c 50000 /dev/zero")
        .await;
    assert!(start.elapsed() < Duration::from_secs(2));
    assert_eq!(outcome.end, exited(0));
    assert_eq!(
        outcome.stdout.iter().filter(|byte| **byte == 0).count(),
        50_000
    );
    let (_, rest) = outcome.stdout().split_once("pid ").unwrap();
    let child: u32 = rest.split(['\n', '\0']).next().unwrap().parse().unwrap();
    // More than a pipe holds, were it not read: it would block or be killed by SIGPIPE.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(alive(child));
    let pid = rustix::process::Pid::from_raw(child.cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

#[tokio::test]
async fn a_program_that_cannot_start_says_why() {
    let service = Service::new().await;
    let error = async |headers: &[(&str, &str)], request| {
        let end = service.start_with(headers, request).await.all().await.end;
        (
            end["code"].as_str().unwrap().to_owned(),
            end["message"].as_str().unwrap().to_owned(),
        )
    };
    let at = |cwd: &str| json!({"process": {"cmd": "true", "cwd": cwd}});
    let (code, message) = error(&[], at("/no/such")).await;
    assert_eq!(
        (&code[..], &message[..]),
        ("invalid_argument", "cwd '/no/such' does not exist")
    );
    assert_eq!(error(&[], at("/etc/passwd")).await.0, "invalid_argument");
    let nobody = [("authorization", "Basic bm9ib2R5LWhlcmU6")];
    let response = service
        .stream("Start", &nobody, sh("true"))
        .await
        .all()
        .await;
    assert_eq!(response.end["code"], "unauthenticated");
    assert_eq!(response.end["message"], "invalid username: 'nobody-here'");
    let cmd = |cmd: &str| json!({"process": {"cmd": cmd}});
    assert_eq!(error(&[], cmd("no-such-program")).await.0, "not_found");
    assert_eq!(error(&[], cmd("/no/such/program")).await.0, "not_found");
    assert_eq!(error(&[], cmd("/etc/passwd")).await.0, "permission_denied");
    assert_eq!(error(&[], cmd("")).await.0, "invalid_argument");
    assert_eq!(error(&[], json!({})).await.0, "invalid_argument");
    let bad = json!({"process": {"cmd": "true", "envs": {"A=B": "c"}}});
    assert_eq!(error(&[], bad).await.0, "invalid_argument");
}

#[tokio::test]
async fn user_directory_and_environment_are_the_requested_ones() {
    let service = Service::new().await;
    let home = service.home();
    let as_user = [("authorization", USER)];
    let run = async |request: Value| {
        let outcome = service.stream("Start", &as_user, request).await.all().await;
        assert_eq!(outcome.end, exited(0), "{outcome:?}");
        outcome.stdout().to_owned()
    };
    let ids = "id -u; id -g; id -G; pwd; cat /proc/self/oom_score_adj; umask";
    let want = format!("4321\n4322\n4322 4400\n{}\n0\n0022\n", home.display());
    assert_eq!(run(sh(ids)).await, want);
    // Without a user, the default one.
    let outcome = service.stream("Start", &[], sh("id -u")).await.all().await;
    assert_eq!(outcome.stdout(), "4321\n");

    service.state.update(|settings| {
        settings
            .env_vars
            .insert("A".to_owned(), "sandbox".to_owned());
        settings
            .env_vars
            .insert("B".to_owned(), "sandbox".to_owned());
    });
    let show = "echo $HOME $USER $LOGNAME $SHELL $A $B $E2B_SANDBOX $PATH";
    let mut request = sh(show);
    request["process"]["envs"] = json!({"A": "request"});
    let want = format!(
        "{} user user /bin/sh request sandbox true \
         /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n",
        home.display()
    );
    assert_eq!(run(request).await, want);
    // Nothing of the daemon's own environment gets through.
    let all = run(json!({"process": {"cmd": "env"}})).await;
    assert!(!all.contains("CARGO"), "{all}");

    let pwd = |cwd: &str| json!({"process": {"cmd": "pwd", "cwd": cwd}});
    let dir = home.join("dir");
    for (cwd, want) in [
        ("~", &home),
        ("~/dir", &dir),
        ("dir", &dir),
        ("/tmp", &PathBuf::from("/tmp")),
    ] {
        assert_eq!(Path::new(run(pwd(cwd)).await.trim()), want, "{cwd}");
    }
    service
        .state
        .update(|settings| settings.default_workdir = Some(dir.clone()));
    assert_eq!(Path::new(run(sh("pwd")).await.trim()), dir);
    service
        .state
        .update(|settings| settings.default_workdir = None);
    let lost = service
        .stream("Start", &[("authorization", "Basic bG9zdDo=")], sh("pwd"))
        .await;
    assert_eq!(lost.all().await.stdout(), "/\n");
}

#[tokio::test]
async fn the_program_inherits_nothing_of_the_daemon() {
    let service = Service::new().await;
    let run = async |cmd: &str, args: &[&str]| {
        let request = json!({"process": {"cmd": cmd, "args": args}});
        service
            .start_with(&[], request)
            .await
            .all()
            .await
            .stdout()
            .to_owned()
    };
    // The fourth is the directory that is being listed.
    assert_eq!(run("ls", &["/proc/self/fd"]).await, "0\n1\n2\n3\n");
    let none = "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n";
    assert_eq!(
        run("grep", &["-E", "Sig(Blk|Ign)", "/proc/self/status"]).await,
        none
    );
}

#[tokio::test]
async fn input_reaches_the_program_in_every_way() {
    let service = Service::new().await;
    let mut cat = service
        .start_with(&[], json!({"process": {"cmd": "cat"}}))
        .await;
    let process = json!({"pid": cat.pid().await});
    let input = |text: &str| json!({"stdin": BASE64_STANDARD.encode(text)});
    service
        .call(
            "SendInput",
            json!({"process": process, "input": input("one ")}),
        )
        .await
        .unwrap();
    let stream = [
        envelope(0, &json!({"start": {"process": process}})),
        envelope(0, &json!({"data": {"input": input("two ")}})),
        envelope(0, &json!({"keepalive": {}})),
        envelope(0, &json!({"data": {"input": input("three")}})),
    ]
    .concat();
    let headers = [("content-type", "application/connect+json")];
    let response = service.send("StreamInput", &headers, stream).await;
    let answer = response.into_body().collect().await.unwrap().to_bytes();
    assert!(
        answer.ends_with(b"{}") && !answer.windows(5).any(|w| w == b"error"),
        "{answer:?}"
    );
    let wrong = json!({"process": process, "input": {"pty": ""}});
    assert_eq!(
        service.call("SendInput", wrong).await.unwrap_err()["code"],
        "failed_precondition"
    );
    service
        .call("CloseStdin", json!({"process": process}))
        .await
        .unwrap();
    let outcome = cat.all().await;
    assert_eq!(outcome.stdout(), "one two three");
    assert_eq!(outcome.end, exited(0));

    let gone = json!({"process": process, "input": input("x")});
    assert_eq!(
        service.call("SendInput", gone).await.unwrap_err()["code"],
        "not_found"
    );
    let mut deaf = service.start("exec sleep 60").await;
    let request = json!({"process": {"pid": deaf.pid().await}, "input": input("x")});
    assert_eq!(
        service
            .call("SendInput", request.clone())
            .await
            .unwrap_err()["code"],
        "failed_precondition"
    );
    let signal = json!({"process": request["process"], "signal": "SIGNAL_SIGKILL"});
    service.call("SendSignal", signal).await.unwrap();
}

#[tokio::test]
async fn a_terminal_has_a_size_a_user_and_takes_keys() {
    let service = Service::new().await;
    let request = json!({
        "process": {"cmd": "/bin/sh", "args": ["-c",
            "stty size; stat -c %u $(tty); echo $TERM; read x; stty size; echo got $x"]},
        "pty": {"size": {"cols": 91, "rows": 17}},
    });
    let mut shell = service
        .stream("Start", &[("authorization", USER)], request)
        .await;
    let process = json!({"pid": shell.pid().await});
    let mut seen = String::new();
    while !seen.contains("xterm-256color") {
        let event = shell.next().await.unwrap();
        let bytes = BASE64_STANDARD
            .decode(event["data"]["pty"].as_str().unwrap())
            .unwrap();
        seen += std::str::from_utf8(&bytes).unwrap();
    }
    assert!(seen.starts_with("17 91\r\n4321\r\n"), "{seen:?}");
    let size = json!({"process": process, "pty": {"size": {"cols": 100, "rows": 30}}});
    service.call("Update", size).await.unwrap();
    let close = service
        .call("CloseStdin", json!({"process": process}))
        .await
        .unwrap_err();
    assert_eq!(close["code"], "failed_precondition");
    let keys = json!({"pty": BASE64_STANDARD.encode("hello\n")});
    service
        .call("SendInput", json!({"process": process, "input": keys}))
        .await
        .unwrap();
    let outcome = shell.all().await;
    let text = String::from_utf8(outcome.pty).unwrap();
    assert!(text.ends_with("30 100\r\ngot hello\r\n"), "{text:?}");
    assert_eq!(outcome.end, exited(0));
}

#[tokio::test]
async fn the_deadline_kills_the_process_and_everything_it_started() {
    let service = Service::new().await;
    let timeout = [("connect-timeout-ms", "300")];
    let start = Instant::now();
    let mut sleeper = service
        .start_with(&timeout, sh("sleep 60 & echo $!; wait"))
        .await;
    let shell = sleeper.pid().await;
    let outcome = sleeper.all().await;
    assert_eq!(outcome.end["code"], "deadline_exceeded");
    assert!(start.elapsed() >= Duration::from_millis(300));
    assert!(start.elapsed() < Duration::from_secs(2));
    let child: u32 = outcome.stdout().trim().parse().unwrap();
    eventually("both are gone", || !alive(shell) && !alive(child)).await;
    // One that floods its output is stopped in time all the same.
    let outcome = service.start_with(&timeout, sh("yes")).await.all().await;
    assert_eq!(outcome.end["code"], "deadline_exceeded");
    // And one that nobody listens to.
    let mut left = service.start_with(&timeout, sh("sleep 60")).await;
    let pid = left.pid().await;
    drop(left);
    eventually("it is gone", || !alive(pid)).await;
}

#[tokio::test]
async fn a_disconnect_kills_nothing_and_others_can_follow() {
    let service = Service::new().await;
    let mut request = sh("read x; echo $x; exit 5");
    request["stdin"] = json!(true);
    request["tag"] = json!("mine");
    let mut first = service.start_with(&[], request).await;
    let pid = first.pid().await;
    drop(first);
    let mut second = service.follow(json!({"tag": "mine"})).await;
    let mut third = service.follow(json!({"pid": pid})).await;
    assert_eq!((second.pid().await, third.pid().await), (pid, pid));
    let list = service.call("List", json!({})).await.unwrap();
    assert_eq!(list["processes"][0]["pid"], pid);
    assert_eq!(list["processes"][0]["tag"], "mine");
    assert_eq!(list["processes"][0]["config"]["cmd"], "/bin/bash");
    let input =
        json!({"process": {"tag": "mine"}, "input": {"stdin": BASE64_STANDARD.encode("hi\n")}});
    service.call("SendInput", input).await.unwrap();
    for follower in [second, third] {
        let outcome = follower.all().await;
        assert_eq!((outcome.stdout(), &outcome.end), ("hi\n", &exited(5)));
    }
    // Too late for its output, not for its end.
    for selector in [json!({"pid": pid}), json!({"tag": "mine"})] {
        let mut late = service.follow(selector).await;
        assert_eq!(late.pid().await, pid);
        assert_eq!(late.all().await.end, exited(5));
    }
    assert_eq!(service.call("List", json!({})).await.unwrap(), json!({}));
}

#[tokio::test]
async fn who_is_not_there_is_not_found() {
    let service = Service::new().await;
    let nobody = json!({"process": {"pid": 999_999_999}});
    for method in ["SendInput", "SendSignal", "CloseStdin", "Update"] {
        let error = service.call(method, nobody.clone()).await.unwrap_err();
        assert_eq!(error["code"], "not_found", "{method}");
    }
    let outcome = service
        .follow(json!({"pid": 999_999_999}))
        .await
        .all()
        .await;
    assert_eq!(outcome.end["code"], "not_found");
    assert_eq!(
        outcome.end["message"],
        "process with pid 999999999 not found"
    );
    let outcome = service.follow(json!({"tag": "nobody"})).await.all().await;
    assert_eq!(outcome.end["code"], "not_found");
}

#[tokio::test]
async fn a_kill_takes_the_children_along() {
    let service = Service::new().await;
    for (signal, want) in [
        ("SIGNAL_SIGKILL", "signal: killed"),
        ("SIGNAL_SIGTERM", "signal: terminated"),
    ] {
        let mut shell = service.start("sleep 60 & echo $!; wait").await;
        let process = json!({"pid": shell.pid().await});
        let line = shell.next().await.unwrap();
        let line = BASE64_STANDARD
            .decode(line["data"]["stdout"].as_str().unwrap())
            .unwrap();
        let child: u32 = String::from_utf8(line).unwrap().trim().parse().unwrap();
        let request = json!({"process": process, "signal": signal});
        service.call("SendSignal", request.clone()).await.unwrap();
        assert_eq!(shell.all().await.end["status"], want);
        eventually("the child is gone", || !alive(child)).await;
        assert_eq!(
            service.call("SendSignal", request).await.unwrap_err()["code"],
            "not_found"
        );
    }
}

#[tokio::test]
async fn a_follower_that_does_not_read_stops_the_process_and_loses_nothing() {
    let service = Service::new().await;
    let marker = service.home().join("done");
    let command = format!("head -c 30000000 /dev/zero; touch {}", marker.display());
    let mut slow = service.start(&command).await;
    slow.pid().await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!marker.exists(), "30 MB are buffered somewhere");
    let outcome = slow.all().await;
    assert_eq!(outcome.stdout.len(), 30_000_000);
    assert_eq!(outcome.end, exited(0));
    assert!(marker.exists());
}

#[tokio::test]
async fn silence_is_filled_with_keepalives() {
    let service = Service::new().await;
    let interval = [("keepalive-ping-interval", "1")];
    let outcome = service
        .start_with(&interval, sh("sleep 2.5"))
        .await
        .all()
        .await;
    assert_eq!(outcome.keepalives, 2);
    assert_eq!(outcome.end, exited(0));
}

//! Contents of files, both ways.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, symlink},
    time::Duration,
};

use axum::{
    body::{Body, Bytes},
    http::{Request, StatusCode, header},
};
use futures::{StreamExt as _, stream};
use serde_json::json;

use crate::support::{Answer, Sandbox, gunzip, gzip};

async fn get_with(sandbox: &Sandbox, uri: &str, headers: &[(&str, &str)]) -> Answer {
    let mut request = Request::get(uri);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    sandbox.send(request.body(Body::empty()).unwrap()).await
}

async fn post_with(
    sandbox: &Sandbox,
    uri: &str,
    headers: &[(&str, &str)],
    body: impl Into<Body>,
) -> Answer {
    let mut request = Request::post(uri);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    sandbox.send(request.body(body.into()).unwrap()).await
}

/// A form in the way that clients write it.
fn form(parts: &[(&str, Option<&str>, &str)]) -> (&'static str, String) {
    let mut body = String::new();
    for (name, file_name, content) in parts {
        let file_name = file_name
            .map(|name| format!("; filename=\"{name}\""))
            .unwrap_or_default();
        body += &format!(
            "--xyz\r\nContent-Disposition: form-data; name=\"{name}\"{file_name}\r\n\
             Content-Type: text/plain\r\n\r\n{content}\r\n"
        );
    }
    ("multipart/form-data; boundary=xyz", body + "--xyz--\r\n")
}

fn message(answer: &Answer) -> String {
    assert_eq!(answer.json()["code"], answer.status.as_u16());
    answer.json()["message"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn uploads_belong_to_the_user_and_come_back() {
    let sandbox = Sandbox::new();
    let answer = sandbox.upload("new/dir/a.txt", "hello").await;
    assert_eq!(answer.status, StatusCode::OK);
    let path = sandbox.home("new/dir/a.txt");
    let want = format!(
        r#"[{{"name":"a.txt","path":"{}","type":"file"}}]"#,
        path.display()
    );
    assert_eq!(answer.text(), want);
    let found = fs::metadata(&path).unwrap();
    assert_eq!((found.uid(), found.mode() & 0o777), (sandbox.uid, 0o644));
    assert_eq!(
        fs::metadata(sandbox.home("new")).unwrap().uid(),
        sandbox.uid
    );

    let answer = sandbox.get("/files?path=new/dir/a.txt").await;
    assert_eq!((answer.status, answer.text()), (StatusCode::OK, "hello"));
    assert_eq!(answer.header("content-length"), Some("5"));
    assert_eq!(
        answer.header("content-type"),
        Some("text/plain; charset=utf-8")
    );
    assert_eq!(
        answer.header("content-disposition"),
        Some("inline; filename=\"a.txt\"")
    );
    assert_eq!(answer.header("accept-ranges"), Some("bytes"));

    let inode = found.ino();
    sandbox.upload("new/dir/a.txt", "bye").await;
    assert_eq!(fs::read_to_string(&path).unwrap(), "bye");
    assert_eq!(
        fs::metadata(&path).unwrap().ino(),
        inode,
        "written in place"
    );

    let answer = sandbox.upload("x&username=root", "").await;
    let want = sandbox.root().join("root/x");
    assert_eq!(answer.json()[0]["path"], want.to_str().unwrap());
}

#[tokio::test]
async fn forms_hold_several_files() {
    let sandbox = Sandbox::new();
    let absolute = sandbox.root().join("elsewhere/c.txt");
    let (content_type, body) = form(&[
        ("file", Some("a.txt"), "A"),
        ("note", None, "ignored"),
        ("file", Some("deep/er/b.txt"), "B"),
        ("file", Some(absolute.to_str().unwrap()), "C"),
    ]);
    let answer = sandbox.post("/files", content_type, body).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    let files = answer.json();
    assert_eq!(files.as_array().unwrap().len(), 3);
    assert_eq!(
        (&files[1]["name"], &files[1]["type"]),
        (&json!("b.txt"), &json!("file"))
    );
    for (path, content) in [
        (sandbox.home("a.txt"), "A"),
        (sandbox.home("deep/er/b.txt"), "B"),
        (absolute, "C"),
    ] {
        assert_eq!(fs::read_to_string(path).unwrap(), content);
    }

    // The query says where, so that the part needs no name.
    let (content_type, body) = form(&[("file", None, "content")]);
    let answer = sandbox.post("/files?path=named", content_type, body).await;
    assert_eq!(
        answer.json()[0]["path"],
        sandbox.home("named").to_str().unwrap()
    );
    let (content_type, body) = form(&[("file", None, "content")]);
    let answer = sandbox.post("/files", content_type, body).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    let (content_type, body) = form(&[("file", Some("t"), "1"), ("file", Some("./t"), "2")]);
    let answer = sandbox.post("/files", content_type, body).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    assert!(message(&answer).starts_with("you cannot upload multiple files to the same path"));
    assert_eq!(fs::read_to_string(sandbox.home("t")).unwrap(), "1");
}

#[tokio::test]
async fn compression_is_transparent_both_ways() {
    let sandbox = Sandbox::new();
    let content = "Streamed and packed. ".repeat(50_000);
    let packed = gzip(content.as_bytes());
    let headers = [
        ("content-type", "application/octet-stream"),
        ("content-encoding", "gzip"),
    ];
    let answer = post_with(&sandbox, "/files?path=a", &headers, packed.clone()).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    assert_eq!(fs::read_to_string(sandbox.home("a")).unwrap(), content);

    let answer = get_with(
        &sandbox,
        "/files?path=a",
        &[("accept-encoding", "gzip, deflate")],
    )
    .await;
    assert_eq!(answer.header("content-encoding"), Some("gzip"));
    assert_eq!(answer.header("vary"), Some("Accept-Encoding"));
    assert!(answer.body.len() < content.len() / 10);
    assert_eq!(gunzip(&answer.body), content.as_bytes());

    let answer = get_with(
        &sandbox,
        "/files?path=a",
        &[("accept-encoding", "identity;q=0")],
    )
    .await;
    assert_eq!(answer.status, StatusCode::NOT_ACCEPTABLE);

    // Broken or cut compression leaves what was there.
    for bad in [&b"no gzip"[..], &packed[..packed.len() / 2]] {
        let answer = post_with(&sandbox, "/files?path=b", &headers, bad.to_vec()).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST);
        assert!(!sandbox.home("b").exists());
    }
    let headers = [
        ("content-type", "application/octet-stream"),
        ("content-encoding", "br"),
    ];
    let answer = post_with(&sandbox, "/files?path=a", &headers, "x").await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    assert_eq!(fs::read_to_string(sandbox.home("a")).unwrap(), content);
}

#[tokio::test]
async fn parts_can_be_asked_for() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.home("digits"), "0123456789").unwrap();
    let get =
        async |headers: &[(&str, &str)]| get_with(&sandbox, "/files?path=digits", headers).await;
    let answer = get(&[("range", "bytes=2-4"), ("accept-encoding", "gzip")]).await;
    assert_eq!(
        (answer.status, answer.text()),
        (StatusCode::PARTIAL_CONTENT, "234")
    );
    assert_eq!(answer.header("content-range"), Some("bytes 2-4/10"));
    assert_eq!(answer.header("content-length"), Some("3"));
    assert_eq!(answer.header("content-encoding"), None);
    let answer = get(&[("range", "bytes=-2")]).await;
    assert_eq!(answer.text(), "89");
    let answer = get(&[("range", "bytes=10-")]).await;
    assert_eq!(answer.status, StatusCode::RANGE_NOT_SATISFIABLE);
    assert_eq!(answer.header("content-range"), Some("bytes */10"));

    let modified = get(&[]).await.header("last-modified").unwrap().to_owned();
    let answer = get(&[("range", "bytes=0-0"), ("if-range", &modified)]).await;
    assert_eq!(answer.text(), "0");
    let old = "Thu, 01 Jan 1970 00:00:00 GMT";
    let answer = get(&[("range", "bytes=0-0"), ("if-range", old)]).await;
    assert_eq!(
        (answer.status, answer.text()),
        (StatusCode::OK, "0123456789")
    );
    let answer = get(&[("if-modified-since", &modified)]).await;
    assert_eq!(
        (answer.status, answer.text()),
        (StatusCode::NOT_MODIFIED, "")
    );
    assert_eq!(
        get(&[("if-modified-since", old)]).await.status,
        StatusCode::OK
    );
}

#[tokio::test]
async fn empty_and_unannounced_contents_are_told_apart() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.home("empty"), "").unwrap();
    for encoding in ["identity", "gzip, deflate"] {
        let answer = get_with(
            &sandbox,
            "/files?path=empty",
            &[("accept-encoding", encoding)],
        )
        .await;
        assert_eq!((answer.status, answer.text()), (StatusCode::OK, ""));
        assert_eq!(answer.header("content-length"), Some("0"));
        assert_eq!(answer.header("content-encoding"), None);
    }
    let answer = sandbox.get("/files?path=/proc/self/status").await;
    assert!(answer.text().contains("Pid:"));
}

#[tokio::test]
async fn what_is_no_file_is_refused() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.home("file"), "").unwrap();
    fs::create_dir(sandbox.home("dir")).unwrap();
    let home = sandbox.home("");
    let home = home.to_str().unwrap().trim_end_matches('/');
    for (uri, status, text) in [
        (
            "/files?path=nope",
            404,
            format!("path '{home}/nope' does not exist"),
        ),
        (
            "/files?path=dir",
            400,
            format!("path '{home}/dir' is a directory"),
        ),
        (
            "/files?path=/dev/null",
            400,
            "path '/dev/null' is not a regular file".to_owned(),
        ),
        (
            "/files?path=file/x",
            400,
            format!("a part of path '{home}/file/x' is not a directory"),
        ),
        (
            "/files?path=file&username=x",
            401,
            "invalid username: 'x'".to_owned(),
        ),
    ] {
        let answer = sandbox.get(uri).await;
        assert_eq!(answer.status.as_u16(), status, "{uri}");
        assert_eq!(message(&answer), text, "{uri}");
    }
    let answer = sandbox
        .get("/files?path=file&signature_expiration=soon")
        .await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);

    for path in ["dir", "/dev/null", "file/x"] {
        assert_eq!(
            sandbox.upload(path, "x").await.status,
            StatusCode::BAD_REQUEST,
            "{path}"
        );
    }
    for (uri, content_type) in [
        ("/files", "application/octet-stream"),
        ("/files?path=a", "text/plain"),
        ("/files", ""),
    ] {
        let answer = sandbox.post(uri, content_type, "x").await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST);
        message(&answer);
    }
}

#[tokio::test]
async fn metadata_is_replaced_by_every_upload() {
    let sandbox = Sandbox::new();
    let upload = async |headers: &[(&str, &str)]| {
        let octets = [("content-type", "application/octet-stream")];
        post_with(&sandbox, "/files?path=m", &[&octets, headers].concat(), "x").await
    };
    let answer = upload(&[("X-Metadata-Author", "mish"), ("x-metadata-a", "1")]).await;
    assert_eq!(
        answer.json()[0]["metadata"],
        json!({"author": "mish", "a": "1"})
    );
    let answer = upload(&[("x-metadata-a", "2")]).await;
    assert_eq!(answer.json()[0]["metadata"], json!({"a": "2"}));
    let long = format!("x-metadata-{}", "k".repeat(247));
    for bad in [
        ("x-metadata-a", "\t"),
        (long.as_str(), ""),
        ("x-metadata-a", &"v".repeat(4096)),
    ] {
        let answer = upload(&[bad]).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST);
        assert!(message(&answer).starts_with("invalid metadata: "));
    }
    let answer = upload(&[]).await;
    assert_eq!(answer.json()[0].get("metadata"), None);
    assert_eq!(xattr::list(sandbox.home("m")).unwrap().count(), 0);
}

/// A body of `chunks` pieces of 64 KiB that breaks off.
fn breaking_off(chunks: usize) -> Body {
    let pieces = stream::iter(0..chunks).map(|_| Ok(Bytes::from(vec![b'x'; 64 << 10])));
    Body::from_stream(pieces.chain(stream::iter([Err(std::io::Error::other("gone"))])))
}

#[tokio::test]
async fn uploads_that_break_off_spoil_little() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.home("old"), "old").unwrap();
    // Too little to have touched anything.
    for path in ["old", "new"] {
        let answer = sandbox.upload(path, breaking_off(2)).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST);
        assert!(message(&answer).contains("gone"));
    }
    assert_eq!(fs::read_to_string(sandbox.home("old")).unwrap(), "old");
    assert!(!sandbox.home("new").exists());
    // A file that the upload has made goes with it.
    assert_eq!(
        sandbox.upload("new", breaking_off(40)).await.status,
        StatusCode::BAD_REQUEST
    );
    assert!(!sandbox.home("new").exists());
    // One that was there is not removed.
    sandbox.upload("old", breaking_off(40)).await;
    assert!(sandbox.home("old").exists());
}

#[tokio::test]
async fn uploads_whose_client_is_gone_are_cleared_away() {
    let sandbox = Sandbox::new();
    let endless = stream::repeat_with(|| Ok::<_, std::io::Error>(Bytes::from(vec![0; 64 << 10])))
        .then(async |piece| {
            tokio::time::sleep(Duration::from_millis(1)).await;
            piece
        });
    let upload = sandbox.upload("endless", Body::from_stream(endless));
    assert!(
        tokio::time::timeout(Duration::from_millis(200), upload)
            .await
            .is_err()
    );
    let gone = async {
        while sandbox.home("endless").exists() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), gone)
        .await
        .unwrap();
}

/// Over a real connection, to which most clients write everything before they read.
#[tokio::test]
async fn refusals_reach_clients_that_are_still_sending() {
    let sandbox = Sandbox::new();
    fs::create_dir(sandbox.home("dir")).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(axum::serve(listener, sandbox.router.clone()).into_future());
    let client = tokio::task::spawn_blocking(move || {
        let mut connection = std::net::TcpStream::connect(address).unwrap();
        let body = vec![b'x'; 16 << 20];
        let head = format!(
            "POST /files?path=dir HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\
             Content-Type: application/octet-stream\r\n\r\n",
            body.len()
        );
        connection.write_all(head.as_bytes()).unwrap();
        connection.write_all(&body).unwrap();
        let mut answer = [0; 12];
        connection.read_exact(&mut answer).unwrap();
        answer
    });
    assert_eq!(&client.await.unwrap(), b"HTTP/1.1 400");
    server.abort();
}

#[tokio::test]
async fn large_files_pass_through_whole() {
    let sandbox = Sandbox::new();
    let piece: Vec<u8> = (0..1_000_003_u32)
        .map(|number| (number % 251) as u8)
        .collect();
    let pieces = stream::iter(0..16).map({
        let piece = Bytes::from(piece.clone());
        move |_| Ok::<_, std::io::Error>(piece.clone())
    });
    let answer = sandbox.upload("large", Body::from_stream(pieces)).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(
        fs::metadata(sandbox.home("large")).unwrap().len(),
        16 * piece.len() as u64
    );
    let answer = sandbox.get("/files?path=large").await;
    assert!(answer.body.chunks(piece.len()).all(|chunk| chunk == piece));
    assert_eq!(answer.body.len(), 16 * piece.len());
}

#[tokio::test]
async fn a_full_disk_has_a_status_of_its_own() {
    let sandbox = Sandbox::new();
    // /dev/full would do, but for being no regular file.
    let Ok(()) = rustix::mount::mount(
        "tmpfs",
        sandbox.home(""),
        "tmpfs",
        rustix::mount::MountFlags::empty(),
        Some(c"size=1m"),
    ) else {
        return; // Mounting takes privileges.
    };
    let answer = sandbox.upload("big", vec![0; 4 << 20]).await;
    let left = sandbox.home("big").exists();
    rustix::mount::unmount(sandbox.home(""), rustix::mount::UnmountFlags::DETACH).unwrap();
    assert_eq!(answer.status, StatusCode::INSUFFICIENT_STORAGE);
    assert!(message(&answer).starts_with("not enough disk space available"));
    assert!(!left);
}

#[tokio::test]
async fn parts_are_composed_and_removed() {
    let sandbox = Sandbox::new();
    for (path, content) in [
        ("p1", "one,"),
        ("p2", "two,"),
        ("p3", "three"),
        ("out", "before!!!"),
    ] {
        fs::write(sandbox.home(path), content).unwrap();
    }
    xattr::set(sandbox.home("out"), "user.e2b.stale", b"x").unwrap();
    let compose = async |request: serde_json::Value| {
        sandbox
            .post("/files/compose", "application/json", request.to_string())
            .await
    };
    for (request, status) in [
        (json!({"source_paths": [], "destination": "out"}), 400),
        (json!({"source_paths": ["p1"], "destination": ""}), 400),
        (
            json!({"source_paths": ["p1", "out"], "destination": "out"}),
            400,
        ),
        (
            json!({"source_paths": ["p1", "link"], "destination": "out"}),
            400,
        ),
        (
            json!({"source_paths": ["p1", "nope"], "destination": "out"}),
            404,
        ),
        (
            json!({"source_paths": ["p1", "/dev"], "destination": "out"}),
            400,
        ),
        (
            json!({"source_paths": ["p1"], "destination": "out", "username": "x"}),
            401,
        ),
        (json!("x"), 400),
    ] {
        let _ = symlink("out", sandbox.home("link"));
        let answer = compose(request.clone()).await;
        assert_eq!(answer.status.as_u16(), status, "{request}");
        message(&answer);
    }
    assert_eq!(
        fs::read_to_string(sandbox.home("out")).unwrap(),
        "before!!!"
    );

    let sources = json!(["p1", "p2", "p3"]);
    let answer = compose(json!({"source_paths": sources, "destination": "new/out"})).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    assert_eq!(answer.json()["name"], "out");
    assert_eq!(
        fs::read_to_string(sandbox.home("new/out")).unwrap(),
        "one,two,three"
    );
    assert!(
        ["p1", "p2", "p3"]
            .iter()
            .all(|path| !sandbox.home(path).exists())
    );

    fs::write(sandbox.home("p1"), "short").unwrap();
    let answer = compose(json!({"source_paths": ["p1"], "destination": "out"})).await;
    assert_eq!(answer.json().get("metadata"), None);
    assert_eq!(fs::read_to_string(sandbox.home("out")).unwrap(), "short");
}

#[tokio::test]
async fn tokens_and_signatures_open_files() {
    let sandbox = Sandbox::with_token("secret");
    fs::write(sandbox.home("a"), "text").unwrap();
    let token = [(
        header::HeaderName::from_static("x-access-token").to_string(),
        "secret",
    )];
    let token = [(token[0].0.as_str(), token[0].1)];
    let sign = |operation, expiration: Option<i64>| {
        use cubicle_guest::access::{Access, AccessToken};
        let access = Access {
            path: "a",
            operation,
            user: "user",
            expiration,
        };
        let signature = AccessToken::new("secret".to_owned()).unwrap().sign(&access);
        let signature = signature.replace('+', "%2B").replace('/', "%2F");
        let expiration = expiration.map(|time| format!("&signature_expiration={time}"));
        let expiration = expiration.unwrap_or_default();
        format!("/files?path=a&username=user&signature={signature}{expiration}")
    };
    use cubicle_guest::access::Operation::{Read, Write};

    assert_eq!(
        get_with(&sandbox, "/files?path=a", &token).await.text(),
        "text"
    );
    assert_eq!(sandbox.get(&sign(Read, None)).await.text(), "text");
    assert_eq!(sandbox.get(&sign(Read, Some(1 << 40))).await.text(), "text");
    let answer = sandbox
        .post(&sign(Write, None), "application/octet-stream", "new")
        .await;
    assert_eq!(answer.status, StatusCode::OK);

    let expired = sandbox.get(&sign(Read, Some(1_700_000_000))).await;
    assert_eq!(expired.status, StatusCode::UNAUTHORIZED);
    assert_eq!(
        expired.text(),
        r#"{"code":401,"message":"signature is already expired"}"#
    );
    let expired = sandbox
        .post(&sign(Write, Some(1)), "application/octet-stream", "x")
        .await;
    assert_eq!(
        expired.text(),
        r#"{"code":401,"message":"signature is already expired"}"#
    );
    for (uri, text) in [
        (
            "/files?path=a".to_owned(),
            "missing signature query parameter",
        ),
        (sign(Write, None), "invalid signature"),
        (
            sign(Read, Some(1)).replace("expiration=1", "expiration=99999999999"),
            "invalid signature",
        ),
        (
            sign(Read, None).replace("username=user", "username=root"),
            "invalid signature",
        ),
    ] {
        let answer = sandbox.get(&uri).await;
        assert_eq!(
            (answer.status, message(&answer).as_str()),
            (StatusCode::UNAUTHORIZED, text)
        );
    }
    // A wrong token is not made good by a signature.
    let answer = get_with(&sandbox, &sign(Read, None), &[("x-access-token", "wrong")]).await;
    assert_eq!(
        message(&answer),
        "access token present in header but does not match"
    );
    assert_eq!(fs::read_to_string(sandbox.home("a")).unwrap(), "new");
}

//! Looking at files and arranging them.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
};

use axum::http::StatusCode;
use serde_json::{Value, json};

use crate::support::Sandbox;

fn names(listed: &Value) -> Vec<&str> {
    listed["entries"]
        .as_array()
        .map(|entries| {
            entries
                .iter()
                .map(|entry| entry["name"].as_str().unwrap())
                .collect()
        })
        .unwrap_or_default()
}

#[tokio::test]
async fn directories_are_made_with_their_parents_for_the_user() {
    let sandbox = Sandbox::new();
    let made = sandbox.ask("MakeDir", json!({"path": "a/b/c"})).await;
    let entry = &made["entry"];
    assert_eq!(entry["name"], "c");
    assert_eq!(entry["path"], sandbox.home("a/b/c").to_str().unwrap());
    assert_eq!(entry["type"], "FILE_TYPE_DIRECTORY");
    assert_eq!(entry["mode"], 0o755);
    assert_eq!(entry["permissions"], "drwxr-xr-x");
    assert_eq!(
        (&entry["owner"], &entry["group"]),
        (&json!("user"), &json!("user"))
    );
    for path in ["a", "a/b", "a/b/c"] {
        assert_eq!(
            fs::metadata(sandbox.home(path)).unwrap().uid(),
            sandbox.uid,
            "{path}"
        );
    }
    fs::write(sandbox.home("file"), "").unwrap();
    for path in ["file", "file/below"] {
        let (status, code, _) = sandbox.fail("MakeDir", json!({"path": path})).await;
        assert_eq!(
            (status, code.as_str()),
            (StatusCode::BAD_REQUEST, "invalid_argument")
        );
    }
}

#[tokio::test]
async fn entries_say_what_they_are() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.home("file"), "text").unwrap();
    fs::set_permissions(sandbox.home("file"), fs::Permissions::from_mode(0o640)).unwrap();
    xattr::set(sandbox.home("file"), "user.e2b.author", b"mish").unwrap();
    xattr::set(sandbox.home("file"), "user.e2b.binary", b"\xff").unwrap();
    xattr::set(sandbox.home("file"), "user.other", b"x").unwrap();
    let entry = sandbox.ask("Stat", json!({"path": "~/file"})).await["entry"].take();
    assert_eq!(entry["size"], "4");
    assert_eq!(entry["mode"], 0o640);
    assert_eq!(entry["permissions"], "-rw-r-----");
    assert_eq!(entry["metadata"], json!({"author": "mish"}));
    assert_eq!(entry.get("symlinkTarget"), None);
}

#[tokio::test]
async fn links_have_the_type_of_what_they_lead_to() {
    let sandbox = Sandbox::new();
    let home = fs::canonicalize(sandbox.home("")).unwrap();
    fs::write(home.join("file"), "text").unwrap();
    fs::create_dir(home.join("dir")).unwrap();
    for (target, link) in [
        ("file", "to-file"),
        ("dir", "to-dir"),
        ("gone", "to-nothing"),
    ] {
        symlink(target, home.join(link)).unwrap();
    }
    let stat = async |path: &str| sandbox.ask("Stat", json!({"path": path})).await["entry"].take();
    let file = stat("to-file").await;
    assert_eq!(file["name"], "to-file");
    assert_eq!(file["type"], "FILE_TYPE_FILE");
    assert_eq!(file["symlinkTarget"], home.join("file").to_str().unwrap());
    assert_eq!(
        (&file["permissions"], &file["size"]),
        (&json!("Lrwxrwxrwx"), &json!("4"))
    );
    assert_eq!(file["mode"], 0o644);
    assert_eq!(stat("to-dir").await["type"], "FILE_TYPE_DIRECTORY");
    let nothing = stat("to-nothing").await;
    assert_eq!(nothing["type"], "FILE_TYPE_SYMLINK");
    assert_eq!(
        nothing["symlinkTarget"],
        sandbox.home("gone").to_str().unwrap()
    );
}

#[tokio::test]
async fn listings_go_as_deep_as_they_are_asked_to() {
    let sandbox = Sandbox::new();
    for path in ["d/sub1/a", "d/sub1/b", "d/sub2"] {
        fs::create_dir_all(sandbox.home(path)).unwrap();
    }
    fs::write(sandbox.home("d/file"), "").unwrap();
    symlink("sub1", sandbox.home("d/zlink")).unwrap();
    let list = async |request: Value| sandbox.ask("ListDir", request).await;
    for depth in [json!(null), json!(0), json!(1)] {
        let listed = list(json!({"path": "d", "depth": depth})).await;
        assert_eq!(names(&listed), ["file", "sub1", "sub2", "zlink"]);
    }
    let listed = list(json!({"path": "d", "depth": 2})).await;
    // The link is not entered.
    assert_eq!(names(&listed), ["file", "sub1", "a", "b", "sub2", "zlink"]);
    assert_eq!(
        names(&list(json!({"path": "d", "depth": 9})).await).len(),
        6
    );

    // Through a link, the path that was asked for stays.
    symlink("d", sandbox.home("link")).unwrap();
    let listed = list(json!({"path": "link"})).await;
    assert_eq!(
        listed["entries"][0]["path"],
        sandbox.home("link/file").to_str().unwrap()
    );
    assert_eq!(names(&list(json!({"path": "d/sub2"})).await), [""; 0]);

    let (_, code, _) = sandbox.fail("ListDir", json!({"path": "d/file"})).await;
    assert_eq!(code, "invalid_argument");
    let (_, code, _) = sandbox.fail("ListDir", json!({"path": "nope"})).await;
    assert_eq!(code, "not_found");
    symlink("loop", sandbox.home("loop")).unwrap();
    let (_, code, _) = sandbox.fail("ListDir", json!({"path": "loop"})).await;
    assert_eq!(code, "failed_precondition");
}

#[tokio::test]
async fn moves_make_room_at_their_destination() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.home("old"), "text").unwrap();
    xattr::set(sandbox.home("old"), "user.e2b.stage", b"moved").unwrap();
    let request = json!({"source": "old", "destination": "new/place/file"});
    let moved = sandbox.ask("Move", request).await;
    assert_eq!(
        moved["entry"]["path"],
        sandbox.home("new/place/file").to_str().unwrap()
    );
    assert_eq!(moved["entry"]["metadata"], json!({"stage": "moved"}));
    assert!(!sandbox.home("old").exists());
    assert_eq!(
        fs::read_to_string(sandbox.home("new/place/file")).unwrap(),
        "text"
    );
    assert_eq!(
        fs::metadata(sandbox.home("new")).unwrap().uid(),
        sandbox.uid
    );

    let request = json!({"source": "nope", "destination": "far/away"});
    let (status, code, _) = sandbox.fail("Move", request).await;
    assert_eq!(
        (status, code.as_str()),
        (StatusCode::NOT_FOUND, "not_found")
    );
    assert!(!sandbox.home("far").exists());
    fs::create_dir_all(sandbox.home("full/x")).unwrap();
    fs::create_dir(sandbox.home("dir")).unwrap();
    let (_, code, _) = sandbox
        .fail("Move", json!({"source": "dir", "destination": "full"}))
        .await;
    assert_eq!(code, "failed_precondition");
}

#[tokio::test]
async fn removal_takes_everything_below_and_nothing_beside() {
    let sandbox = Sandbox::new();
    fs::create_dir_all(sandbox.home("d/e")).unwrap();
    fs::write(sandbox.home("d/e/file"), "").unwrap();
    fs::create_dir(sandbox.home("kept")).unwrap();
    fs::write(sandbox.home("kept/file"), "").unwrap();
    symlink("../kept", sandbox.home("d/link")).unwrap();
    for path in ["d", "d", "nope", "kept/file/below"] {
        assert_eq!(
            sandbox.ask("Remove", json!({"path": path})).await,
            json!({})
        );
    }
    assert!(!sandbox.home("d").exists());
    symlink("kept", sandbox.home("link")).unwrap();
    sandbox.ask("Remove", json!({"path": "link"})).await;
    assert!(sandbox.home("kept/file").exists());
    let (_, code, _) = sandbox.fail("Remove", json!({"path": ""})).await;
    assert_eq!(code, "invalid_argument");
    assert!(sandbox.home("").exists());
}

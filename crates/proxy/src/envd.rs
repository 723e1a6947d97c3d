//! What of the guest daemon may be reached from outside.

use cubicle_protocol::ENVD_PORT;

use crate::route::Target;

/// Paths with REST calls.
const PATHS: [&str; 5] = ["/health", "/metrics", "/envs", "/files", "/files/compose"];
/// RPC services; a method's name follows.
const SERVICES: [&str; 2] = ["/process.Process/", "/filesystem.Filesystem/"];

/// Whether requests to this target go to the guest daemon.
pub(crate) fn is_envd(target: &Target) -> bool {
    target.port == ENVD_PORT
}

/// Whether anybody may call this path of the guest daemon.
///
/// The list is of what is allowed, and a path has to be spelled exactly so: through the channel
/// the daemon also serves calls that belong to the host alone, and what a router makes of `//init`,
/// `/./init`, `/files/../init` or `/%69nit` is not worth finding out.
pub(crate) fn is_public(path: &str) -> bool {
    let method_of = |service| path.strip_prefix(service);
    let is_name =
        |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric());
    PATHS.contains(&path) || SERVICES.into_iter().filter_map(method_of).any(is_name)
}

#[cfg(test)]
mod tests {
    use cubicle_protocol::guest_api::LOGS_PATH;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn clients_get_what_they_call_and_nothing_else() {
        for path in [
            "/health",
            "/files",
            "/files/compose",
            "/process.Process/Start",
            "/filesystem.Filesystem/WatchDir",
        ] {
            assert!(is_public(path), "{path}");
        }
        for path in [
            "/init",
            LOGS_PATH,
            "/freeze",
            "/unfreeze",
            "/collapse",
            "/fsfreeze",
            "/fsthaw",
            "//init",
            "/./init",
            "/%69nit",
            "/files/../init",
            "/health/../init",
            "/init/",
            "/INIT",
            "/init;x",
            "/process.Process/../init",
            "/process.Process/",
            "/process.Process/%2e%2e/init",
            "",
            "/",
            "init",
            "/health/",
            "/files//compose",
        ] {
            assert!(!is_public(path), "{path}");
        }
    }

    proptest! {
        #[test]
        fn no_spelling_of_a_host_call_is_public(
            before in "(/|\\.|%2e|%2f|files|health|process\\.Process){0,5}",
            call in prop::sample::select(vec!["init", "%69nit", "i%6eit", "Init", "logs", "freeze"]),
            after in "(/|\\?|;|%00|\\.){0,3}",
        ) {
            let path = format!("/{before}/{call}{after}");
            let plain = path.strip_prefix("/process.Process/").is_some_and(|rest| rest == call);
            prop_assert!(!is_public(&path) || plain, "{}", path);
        }
    }
}

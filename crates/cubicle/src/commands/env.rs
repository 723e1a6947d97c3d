//! `cubicle env`: everything that an unmodified client needs, as environment variables.

use crate::{
    cli::{EnvFormat, Global},
    client::Connection,
    error::Error,
    output,
};

/// The variables that E2B's and Cube's clients read.
pub(crate) fn variables(connection: &Connection) -> Vec<(&'static str, String)> {
    let url = &connection.url;
    let authority = url.split_once("://").map_or(url.as_str(), |(_, rest)| rest);
    let (host, port) = authority.rsplit_once(':').unwrap_or((authority, "80"));
    let mut variables = vec![
        ("E2B_API_URL", url.clone()),
        // One origin for both: requests that carry a sandbox id are the data plane's.
        ("E2B_SANDBOX_URL", url.clone()),
        ("E2B_VOLUME_API_URL", url.clone()),
        ("CUBE_API_URL", url.clone()),
        ("CUBE_TEMPLATE_ID", "base".to_owned()),
        (
            "CUBE_PROXY_NODE_IP",
            host.trim_matches(['[', ']']).to_owned(),
        ),
        ("CUBE_PROXY_PORT_HTTP", port.to_owned()),
        ("CUBE_SANDBOX_DOMAIN", connection.domain.clone()),
    ];
    // E2B's clients refuse to start without a key of this form, also where none is asked for.
    let key = match connection.api_key.as_str() {
        "" => format!("e2b_{}", "0".repeat(40)),
        key => key.to_owned(),
    };
    variables.push(("E2B_API_KEY", key.clone()));
    if !connection.api_key.is_empty() {
        variables.push(("CUBE_API_KEY", key));
    }
    variables
}

/// One variable in the words of a shell. The value is quoted: it may have come from an option.
fn line(format: EnvFormat, name: &str, value: &str) -> String {
    match format {
        EnvFormat::Sh => format!("export {name}='{}'", value.replace('\'', r"'\''")),
        EnvFormat::Fish => {
            format!(
                "set -gx {name} '{}'",
                value.replace('\\', r"\\").replace('\'', r"\'")
            )
        }
        EnvFormat::Dotenv => format!("{name}={value}"),
    }
}

pub(crate) fn run(global: &Global, format: EnvFormat) -> Result<(), Error> {
    let client = super::client(global)?;
    let variables = variables(client.connection());
    if global.json {
        let map: serde_json::Map<String, serde_json::Value> = variables
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.into()))
            .collect();
        output::print_json(&map);
        return Ok(());
    }
    for (name, value) in variables {
        println!("{}", line(format, name, &value));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(api_key: &str) -> String {
        let connection = Connection {
            url: "http://127.0.0.1:3000".into(),
            api_key: api_key.into(),
            domain: "cubicle.localhost".into(),
        };
        let lines: Vec<String> = variables(&connection)
            .iter()
            .map(|(name, value)| line(EnvFormat::Sh, name, value))
            .collect();
        lines.join("\n")
    }

    #[test]
    fn with_a_key() {
        insta::assert_snapshot!(shown("e2b_0123456789abcdef0123456789abcdef01234567"));
    }

    #[test]
    fn without_a_key() {
        insta::assert_snapshot!(shown(""));
    }

    #[test]
    fn a_value_cannot_leave_its_quotes() {
        assert_eq!(
            line(EnvFormat::Sh, "A", "x'; rm -rf /"),
            r"export A='x'\''; rm -rf /'"
        );
        assert_eq!(line(EnvFormat::Fish, "A", r"x\'"), r"set -gx A 'x\\\''");
    }
}

//! `cubicle sandbox network`: what a sandbox may reach.

use reqwest::Method;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    cli::Egress,
    client::{Client, segment},
    error::Error,
    output,
};

/// What is in force, as the server tells it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct InForce {
    /// Left out: nobody has said anything, which is yes.
    allow_internet_access: Option<bool>,
    network: Ranges,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Ranges {
    allow_out: Vec<String>,
    deny_out: Vec<String>,
}

/// Puts what a new sandbox may reach into the body of its create.
pub(super) fn add_to_create(body: &mut Value, egress: &Egress) {
    body["allow_internet_access"] = (!egress.no_internet).into();
    if !egress.allow_out.is_empty() || !egress.deny_out.is_empty() {
        body["network"] = ranges(egress);
    }
}

/// Replaces what a sandbox may reach, if anything is said of it, and shows what is in force.
pub(super) async fn run(
    client: &Client,
    id: &str,
    egress: &Egress,
    reset: bool,
    json: bool,
) -> Result<(), Error> {
    let sandbox = format!("/sandboxes/{}", segment(id)?);
    if reset || is_said(egress) {
        let mut body = ranges(egress);
        body["allow_internet_access"] = (!egress.no_internet).into();
        let request = client.request(Method::PUT, &format!("{sandbox}/network"));
        client.send(request.json(&body)).await?;
    }
    let request = client.request(Method::GET, &sandbox);
    let in_force: InForce = client.json(request, "get a sandbox").await?;
    if json {
        output::print_json(&in_force);
    } else {
        println!("{}", in_words(&in_force));
    }
    Ok(())
}

fn is_said(egress: &Egress) -> bool {
    egress.no_internet || !egress.allow_out.is_empty() || !egress.deny_out.is_empty()
}

fn ranges(egress: &Egress) -> Value {
    json!({ "allowOut": egress.allow_out, "denyOut": egress.deny_out })
}

fn in_words(in_force: &InForce) -> String {
    let list = |ranges: &[String]| match ranges {
        [] => "-".to_owned(),
        ranges => ranges.join(", "),
    };
    let internet = in_force.allow_internet_access.unwrap_or(true);
    [
        ("internet", if internet { "yes" } else { "no" }.to_owned()),
        ("allow-out", list(&in_force.network.allow_out)),
        ("deny-out", list(&in_force.network.deny_out)),
    ]
    .map(|(name, value)| format!("{name:9}  {value}"))
    .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_create_says_what_was_said() {
        let mut body = json!({});
        add_to_create(&mut body, &Egress::default());
        assert_eq!(body, json!({ "allow_internet_access": true }));
        let egress = Egress {
            no_internet: true,
            allow_out: vec!["1.1.1.1".to_owned()],
            deny_out: Vec::new(),
        };
        add_to_create(&mut body, &egress);
        let ranges = json!({ "allowOut": ["1.1.1.1"], "denyOut": [] });
        assert_eq!(
            body,
            json!({ "allow_internet_access": false, "network": ranges })
        );
    }

    #[test]
    fn what_is_in_force_is_three_lines() {
        let answer = json!({
            "sandboxID": "i1", "envdAccessToken": "secret", "allowInternetAccess": false,
            "network": { "allowOut": ["1.1.1.1/32", "8.8.0.0/16"], "denyOut": [], "allowPublicTraffic": true },
        });
        let in_force: InForce = serde_json::from_value(answer).expect("shape");
        assert_eq!(
            in_words(&in_force),
            "internet   no\nallow-out  1.1.1.1/32, 8.8.0.0/16\ndeny-out   -"
        );
    }
}

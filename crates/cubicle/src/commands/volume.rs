//! `cubicle volume`: make, list, fill and delete directories that outlive sandboxes.

use std::process::ExitCode;

use reqwest::Method;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::copy;
use crate::{
    cli::{Global, Volume},
    client::{Client, segment},
    error::Error,
    output,
};

/// A volume, as the server tells it.
#[derive(Debug, Serialize, Deserialize)]
struct Info {
    #[serde(rename = "volumeID")]
    id: String,
    name: String,
    // A token on a screen is a token in a screenshot, so the one that comes with it is not here.
}

pub(crate) async fn run(global: &Global, command: Volume) -> Result<ExitCode, Error> {
    let client = super::client(global)?;
    match command {
        Volume::Create { name } => {
            let request = client.request(Method::POST, "/volumes");
            let request = request.json(&json!({ "name": name }));
            let made: Info = client.json(request, "make a volume").await?;
            if global.json {
                output::print_json(&made);
            } else {
                println!("{}", made.id);
            }
        }
        Volume::Ls => {
            let request = client.request(Method::GET, "/volumes");
            let volumes: Vec<Info> = client.json(request, "list volumes").await?;
            if global.json {
                output::print_json(&volumes);
            } else {
                let mut table = output::table(&["VOLUME", "NAME"]);
                for volume in &volumes {
                    table.add_row([&volume.id, &volume.name]);
                }
                output::print_table(&table);
            }
        }
        Volume::Info { volume } => {
            let request = client.request(Method::GET, &path(&volume)?);
            let volume: Info = client.json(request, "get a volume").await?;
            output::print_json(&volume);
        }
        Volume::Cp {
            source,
            destination,
        } => {
            let copied = copy::copy(&client, copy::End::Volume, &source, &destination).await?;
            copied.print(global.json);
        }
        Volume::Rm { volumes } => return remove(&client, &volumes, global.json).await,
    }
    Ok(ExitCode::SUCCESS)
}

async fn remove(client: &Client, volumes: &[String], json: bool) -> Result<ExitCode, Error> {
    let mut removed = Vec::new();
    let mut missing = Vec::new();
    for volume in volumes {
        match client
            .send(client.request(Method::DELETE, &path(volume)?))
            .await
        {
            Ok(_) => removed.push(volume),
            Err(Error::Refused { status: 404, .. }) => missing.push(volume),
            Err(error) => return Err(error),
        }
    }
    if json {
        output::print_json(&json!({ "removed": removed, "notFound": missing }));
    } else {
        removed.iter().for_each(|id| println!("{id}"));
        for id in &missing {
            eprintln!("error: there is no volume {id}");
        }
    }
    Ok(if missing.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn path(volume: &str) -> Result<String, Error> {
    Ok(format!("/volumes/{}", segment(volume)?))
}

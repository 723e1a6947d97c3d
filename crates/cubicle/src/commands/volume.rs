//! `cubicle volume`: make, list, fill and delete directories that outlive sandboxes.

use std::process::ExitCode;

use reqwest::Method;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{copy, several};
use crate::{
    cli::{Global, Volume},
    client::segment,
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
        Volume::Rm { volumes } => {
            let delete = async |id: &str| client.delete(&path(id)?).await;
            return several::remove(&volumes, "volume", "removed", global.json, delete).await;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn path(volume: &str) -> Result<String, Error> {
    Ok(format!("/volumes/{}", segment(volume)?))
}

//! What the template store is made of: the recipes of this program, and the operator's catalogue.

use std::{path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use cubicle_control::{
    Control,
    store::{CatalogueSource, Entry, StoreConfig},
    template::{BuildSpec, Probe, Size},
};
use cubicle_image::{Ready, Recipe};
use reqwest::Url;

use crate::error::{Chain, Error};

/// Largest catalogue, in bytes.
const MAX_BYTES: u64 = 1 << 20;
/// How long a server may take to answer with one.
const PATIENCE: Duration = Duration::from_secs(15);

/// The store, with the catalogue that the option names.
pub(super) fn config(option: Option<&str>) -> Result<StoreConfig, Error> {
    Ok(StoreConfig {
        recipes: Recipe::all().into_iter().map(entry).collect(),
        source: option.map(source).transpose()?,
    })
}

/// Refuses to go on with a file that is no catalogue. An address may be out of reach for a while.
pub(super) async fn check(control: &Control, option: Option<&str>) -> Result<(), Error> {
    if option.is_some_and(|option| !option.contains("://")) {
        let refused = |error| Error::setup("use --store", error);
        control.store.refresh().await.map_err(refused)?;
    }
    Ok(())
}

/// What a recipe makes, in the words of the store.
fn entry(recipe: Recipe) -> Entry {
    let ready = match recipe.ready {
        None => Probe::None,
        Some(Ready::Command(command)) => Probe::Command(command),
        Some(Ready::Http { port, path }) => Probe::Http { port, path },
        Some(Ready::Tcp { port }) => Probe::Tcp { port },
    };
    Entry {
        description: recipe.description,
        category: recipe.category,
        size: Size {
            cpu_count: recipe.cpu_count,
            memory_mib: recipe.memory_mib,
            disk_mib: recipe.disk_mib,
        },
        spec: BuildSpec {
            start: recipe.start,
            ready,
            env: recipe.env,
            ports: recipe.ports,
            ..BuildSpec::recipe(&recipe.name)
        },
        name: recipe.name,
    }
}

fn source(option: &str) -> Result<Arc<dyn CatalogueSource>, Error> {
    if !option.contains("://") {
        return Ok(Arc::new(File(option.into())));
    }
    let usage = |why: &dyn std::fmt::Display| Error::Usage(format!("--store {option}: {why}"));
    let url: Url = option.parse().map_err(|error| usage(&error))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(usage(&"an address begins with http:// or https://"));
    }
    let http = reqwest::Client::builder()
        .timeout(PATIENCE)
        .build()
        .map_err(|error| Error::setup("make an HTTP client for --store", error))?;
    Ok(Arc::new(Address { url, http }))
}

/// A catalogue in a file.
#[derive(Debug)]
struct File(PathBuf);

#[async_trait]
impl CatalogueSource for File {
    fn name(&self) -> String {
        self.0.display().to_string()
    }

    fn is_local(&self) -> bool {
        true
    }

    async fn read(&self) -> Result<Vec<u8>, String> {
        let length = tokio::fs::metadata(&self.0).await;
        if length.map_err(|error| error.to_string())?.len() > MAX_BYTES {
            return Err(too_large());
        }
        tokio::fs::read(&self.0).await.map_err(|e| e.to_string())
    }
}

/// A catalogue on a server.
#[derive(Debug)]
struct Address {
    url: Url,
    http: reqwest::Client,
}

#[async_trait]
impl CatalogueSource for Address {
    fn name(&self) -> String {
        let mut url = self.url.clone();
        // What is in there is for the server alone. Only addresses without a host refuse, and
        // those have none.
        let _ = url.set_username("");
        let _ = url.set_password(None);
        url.set_query(None);
        url.to_string()
    }

    fn is_local(&self) -> bool {
        false
    }

    async fn read(&self) -> Result<Vec<u8>, String> {
        let failed = |error: reqwest::Error| Chain(&error.without_url()).to_string();
        let response = self.http.get(self.url.clone()).send().await;
        let mut response = response
            .and_then(reqwest::Response::error_for_status)
            .map_err(failed)?;
        let mut document = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            document.extend_from_slice(&chunk);
            if document.len() as u64 > MAX_BYTES {
                return Err(too_large());
            }
        }
        Ok(document)
    }
}

fn too_large() -> String {
    format!("it is larger than {MAX_BYTES} bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_recipe_is_in_the_store() {
        let config = config(None).expect("a configuration");
        let interpreter = config
            .recipes
            .iter()
            .find(|r| r.name == "code-interpreter-v1");
        let interpreter = interpreter.expect("the interpreter");
        assert_eq!(interpreter.spec.ports, [49999]);
        assert!(matches!(
            &interpreter.spec.ready,
            Probe::Http { port: 49999, .. }
        ));
        assert_eq!(config.recipes.len(), Recipe::all().len());
    }

    #[test]
    fn the_name_of_a_source_gives_no_password_away() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let source = source("https://me:secret@store.example/c.json?token=x").expect("a source");
        assert_eq!(source.name(), "https://store.example/c.json");
        assert!(!source.is_local());
    }

    #[test]
    fn other_schemes_are_refused() {
        let error = source("ftp://store.example/")
            .expect_err("no FTP")
            .to_string();
        assert!(error.contains("http:// or https://"), "{error}");
        assert!(source("./store.json").expect("a file").is_local());
    }
}

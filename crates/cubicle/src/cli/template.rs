//! What `cubicle template` understands.

use std::{net::Ipv4Addr, path::PathBuf};

use clap::{Args, Subcommand};

use super::{Store, parse_pair};

#[derive(Debug, Subcommand)]
pub(crate) enum Template {
    /// List templates
    #[command(visible_alias = "list")]
    Ls,
    /// Show one template: what it is made of, its builds and its tags
    Info {
        /// Its id or a name
        template: String,
    },
    /// Build a template, or build it again if its inputs changed
    ///
    /// Of a Dockerfile in a directory (`cubicle template build web ./web`), of an image
    /// (`--image python:3.12`), of another template (`--from base`), or of a recipe of the server
    /// (`--recipe base`; nothing else needs to be said for `base`). What was built before is not
    /// built again. The build goes on when this command is interrupted.
    Build(Box<TemplateBuild>),
    /// Print what a build said
    Logs {
        /// The template
        template: String,
        /// Which build of it [default: the latest]
        #[arg(long, value_name = "ID")]
        build: Option<String>,
        /// Go on printing until the build has ended
        #[arg(long, short)]
        follow: bool,
    },
    /// Give a build more tags, or take tags away
    Tag {
        /// The template; with `:TAG` for another build than the default one
        template: String,
        /// The tags
        #[arg(required = true)]
        tags: Vec<String>,
        /// Take them away
        #[arg(long, short)]
        delete: bool,
    },
    /// Look at the templates that there are to be had, and install them
    #[command(subcommand)]
    Store(Store),
    /// Remove templates; sandboxes made from them live on
    Rm {
        /// Their ids or aliases
        #[arg(required = true)]
        ids: Vec<String>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct TemplateBuild {
    /// What to call it: `name` or `name:tag`
    #[arg(default_value = "base", value_name = "NAME[:TAG]")]
    pub(crate) name: String,
    /// Directory with the Dockerfile and the files that it copies
    #[arg(value_name = "DIR", conflicts_with_all = ["image", "from", "recipe"])]
    pub(crate) context: Option<PathBuf>,
    /// The Dockerfile, `-` for standard input [default: `Dockerfile` in DIR]
    #[arg(long, short, value_name = "FILE", conflicts_with_all = ["image", "from", "recipe"])]
    pub(crate) file: Option<PathBuf>,
    /// Value of an ARG of the Dockerfile, may be repeated
    #[arg(long = "build-arg", value_name = "NAME=VALUE", value_parser = parse_pair)]
    pub(crate) build_args: Vec<(String, String)>,
    /// Begin with this container image
    #[arg(long, value_name = "REF", conflicts_with_all = ["from", "recipe"])]
    pub(crate) image: Option<String>,
    /// Begin with this template or snapshot
    #[arg(long, value_name = "TEMPLATE", conflicts_with = "recipe")]
    pub(crate) from: Option<String>,
    /// Begin with what the server makes by this recipe
    #[arg(long, value_name = "NAME")]
    pub(crate) recipe: Option<String>,
    /// Command that runs in every sandbox [default: what the image would start]
    #[arg(long, value_name = "COMMAND")]
    pub(crate) start: Option<String>,
    /// When it is ready: `tcp:PORT`, `http:PORT/PATH`, or a command that succeeds then
    #[arg(long, value_name = "PROBE", value_parser = parse_probe)]
    pub(crate) ready: Option<Probe>,
    /// How long it may take until it is
    #[arg(long, value_name = "SECONDS", requires = "ready")]
    pub(crate) ready_within: Option<u64>,
    /// CPUs of its sandboxes
    #[arg(long, value_name = "N")]
    pub(crate) cpus: Option<u32>,
    /// Memory of its sandboxes
    #[arg(long, value_name = "MIB")]
    pub(crate) memory: Option<u32>,
    /// Their root disk, which takes no room before it is written to
    #[arg(long, value_name = "MIB")]
    pub(crate) disk: Option<u32>,
    /// Another tag for it, may be repeated
    #[arg(long = "tag", short, value_name = "TAG")]
    pub(crate) tags: Vec<String>,
    /// Environment variable of its sandboxes, may be repeated
    #[arg(long, short, value_name = "NAME=VALUE", value_parser = parse_pair)]
    pub(crate) env: Vec<(String, String)>,
    /// Port that its servers listen on, may be repeated
    #[arg(long = "port", short, value_name = "PORT")]
    pub(crate) ports: Vec<u16>,
    /// Name server of its sandboxes, may be repeated
    #[arg(long, value_name = "IPV4")]
    pub(crate) dns: Vec<Ipv4Addr>,
    /// User at the image's registry
    #[arg(long, value_name = "USER", requires = "registry_password_stdin")]
    pub(crate) registry_user: Option<String>,
    /// Read that user's password from standard input
    #[arg(long, requires = "registry_user")]
    pub(crate) registry_password_stdin: bool,
    /// Build everything again, also what did not change
    #[arg(long, visible_alias = "no-cache")]
    pub(crate) force: bool,
}

/// How to find out whether a template is ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Probe {
    /// A command succeeds.
    Command(String),
    /// A request is answered.
    Http { port: u16, path: String },
    /// Something listens.
    Tcp { port: u16 },
}

fn parse_probe(text: &str) -> Result<Probe, String> {
    let port = |text: &str| match text.parse::<u16>() {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(format!("{text:?} is no port")),
    };
    if let Some(rest) = text.strip_prefix("tcp:") {
        return Ok(Probe::Tcp { port: port(rest)? });
    }
    if let Some(rest) = text.strip_prefix("http:") {
        if rest.starts_with("//") {
            return Err("write it as http:PORT/PATH: it is asked inside of the sandbox".to_owned());
        }
        let at = rest.find('/').unwrap_or(rest.len());
        let (number, path) = rest.split_at(at);
        return Ok(Probe::Http {
            port: port(number)?,
            path: if path.is_empty() { "/" } else { path }.to_owned(),
        });
    }
    if text.trim().is_empty() {
        return Err("it is empty".to_owned());
    }
    Ok(Probe::Command(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes() {
        let http = |port, path: &str| Probe::Http {
            port,
            path: path.to_owned(),
        };
        assert_eq!(parse_probe("tcp:80"), Ok(Probe::Tcp { port: 80 }));
        assert_eq!(parse_probe("http:80"), Ok(http(80, "/")));
        assert_eq!(parse_probe("http:80/a?b=c"), Ok(http(80, "/a?b=c")));
        let command = "curl -f http://localhost";
        assert_eq!(parse_probe(command), Ok(Probe::Command(command.into())));
        for bad in [
            "",
            " ",
            "tcp:",
            "tcp:0",
            "tcp:70000",
            "http:x/",
            "http://localhost:80",
        ] {
            assert!(parse_probe(bad).is_err(), "{bad}");
        }
    }
}

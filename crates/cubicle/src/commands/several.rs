//! Commands that do the same to several things: to all of them, whatever the server says to one.

use std::process::ExitCode;

use serde_json::json;

use super::code;
use crate::{error::Error, output};

/// What became of several things.
#[derive(Debug)]
pub(super) struct Several {
    json: bool,
    failed: bool,
}

impl Several {
    pub(super) fn new(json: bool) -> Self {
        let failed = false;
        Self { json, failed }
    }

    /// What was done, or nothing where the server refuses it for this one thing: that is said at once,
    /// and is no reason not to go on.
    ///
    /// # Errors
    /// Whatever would go wrong with the next one, too.
    pub(super) fn unless_refused<T>(
        &mut self,
        outcome: Result<T, Error>,
    ) -> Result<Option<T>, Error> {
        match outcome {
            Ok(done) => Ok(Some(done)),
            Err(
                error @ Error::Refused {
                    status: 400 | 404 | 409,
                    ..
                },
            ) => {
                error.print(self.json);
                self.failed = true;
                Ok(None)
            }
            Err(other) => Err(other),
        }
    }

    /// Says that one was not done, which has been told already.
    pub(super) fn fail(&mut self) {
        self.failed = true;
    }

    /// Success if all were done.
    pub(super) fn code(&self) -> ExitCode {
        code(!self.failed)
    }
}

/// Removes things by their ids; `remove` says whether there was one. In JSON, those that were there are
/// under `removed`, the others under `notFound`.
pub(super) async fn remove(
    ids: &[String],
    what: &str,
    removed: &str,
    json: bool,
    remove: impl AsyncFn(&str) -> Result<bool, Error>,
) -> Result<ExitCode, Error> {
    let mut several = Several::new(json);
    let mut gone = Vec::new();
    let mut missing = Vec::new();
    for id in ids {
        match several.unless_refused(remove(id).await)? {
            Some(true) => {
                if !json {
                    println!("{id}");
                }
                gone.push(id);
            }
            Some(false) => {
                if !json {
                    eprintln!("error: there is no {what} {id}");
                }
                several.fail();
                missing.push(id);
            }
            None => {}
        }
    }
    if json {
        output::print_json(&json!({ removed: gone, "notFound": missing }));
    }
    Ok(several.code())
}

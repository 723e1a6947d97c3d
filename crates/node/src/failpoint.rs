//! Points at which a test can make the node fail, panic or wait.
//!
//! Every step of create, kill, build and adoption passes one by its name. Without the feature
//! `failpoints` (outside of this crate's own tests) passing one compiles to nothing.

#[cfg(any(test, feature = "failpoints"))]
mod armed {
    use std::{
        collections::HashMap,
        sync::{Mutex, PoisonError},
        time::Duration,
    };

    use crate::error::{Error, Result};

    /// What happens at a point.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Failure {
        /// The step returns [`Error::Injected`].
        Error,
        /// The step panics.
        Panic,
        /// The step takes this much longer.
        Delay(Duration),
    }

    /// The points of one node.
    #[derive(Debug, Default)]
    pub struct FailPoints {
        armed: Mutex<HashMap<&'static str, Failure>>,
        passed: Mutex<HashMap<&'static str, u64>>,
    }

    impl FailPoints {
        /// Makes every later pass of `step` fail in that way.
        pub fn arm(&self, step: &'static str, failure: Failure) {
            self.armed
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(step, failure);
        }

        /// Lets all steps succeed again.
        pub fn disarm(&self) {
            self.armed
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clear();
        }

        /// How often `step` was passed, so that a test can tell that a point is there at all.
        pub fn passes(&self, step: &str) -> u64 {
            let passed = self.passed.lock().unwrap_or_else(PoisonError::into_inner);
            passed.get(step).copied().unwrap_or(0)
        }

        pub(crate) async fn pass(&self, step: &'static str) -> Result<()> {
            *self
                .passed
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .entry(step)
                .or_default() += 1;
            let failure = self
                .armed
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get(step)
                .copied();
            match failure {
                None => Ok(()),
                Some(Failure::Error) => Err(Error::Injected { step }),
                #[expect(clippy::panic, reason = "that is what was asked for")]
                Some(Failure::Panic) => panic!("told to panic at {step}"),
                Some(Failure::Delay(by)) => {
                    tokio::time::sleep(by).await;
                    Ok(())
                }
            }
        }
    }
}

#[cfg(any(test, feature = "failpoints"))]
pub use armed::{FailPoints, Failure};

/// Nothing: the feature `failpoints` is off.
#[cfg(not(any(test, feature = "failpoints")))]
#[derive(Debug, Default)]
pub(crate) struct FailPoints {}

#[cfg(not(any(test, feature = "failpoints")))]
impl FailPoints {
    pub(crate) async fn pass(&self, _step: &'static str) -> crate::error::Result<()> {
        Ok(())
    }
}

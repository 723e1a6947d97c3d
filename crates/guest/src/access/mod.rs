//! Who may call the daemon, and as which user of the sandbox a call acts.
//!
//! - [`State`] holds what the host told the daemon: the access token, the environment, defaults,
//!   names. It is shared by every service and cheap to read.
//! - [`Accounts`] are the users and groups of the sandbox, read from `/etc/passwd` and `/etc/group`
//!   themselves: a statically linked program has no name service.
//! - [`require_token`] guards every route but those that check by themselves, by a token or by a
//!   [signature](Access) in the URL.
//!
//! A user name in a request is a choice and not a proof: whoever holds the token may act as every
//! user. The daemon's file operations run as root and give to the user what they create.

mod accounts;
mod error;
mod guard;
mod state;
mod token;

pub use accounts::{Accounts, User};
pub use error::Error;
pub use guard::require_token;
pub(crate) use guard::{TOKEN_HEADER, caller};
pub use state::{Settings, State};
pub use token::{Access, AccessToken, Operation};

//! The time of day as text.

use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// Now, as RFC 3339 in UTC.
pub(crate) fn now() -> String {
    // Years of four digits can always be written.
    OffsetDateTime::now_utc()
        .format(&Rfc3339)
        .unwrap_or_default()
}

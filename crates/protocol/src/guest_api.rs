//! What only the host may say. The guest hears it on the channel and nowhere else: no TCP
//! port and no `CONNECT` tunnel leads there.
//!
//! After every boot, every restore and whenever the host comes back, the first that it says is an
//! [`InitRequest`], and the guest's answer is an [`Introduced`]
//! ([`channel::introduction`](crate::channel::introduction)). Then there are calls:
//!
//! | call | request | answer |
//! |---|---|---|
//! | `POST /sync` | | 204 once every file system is written back |
//! | `POST /copy?`[`CopyQuery`] | an archive, tar | 204 once its files are in their places |
//! | `GET /logs` | | 200, one [`LogEntry`] per line, oldest first |
//! | `POST /shares/{tag}` | replies to the guest's requests | 200, requests; see [`share`](crate::share) |

use std::{collections::BTreeMap, fmt, net::Ipv4Addr, path::PathBuf};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use cubicle_ids::{SandboxId, TemplateId};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// Path of the call that fetches the guest's lifecycle log.
pub const LOGS_PATH: &str = "/logs";

/// Path of the call that has the guest write back what its file systems hold.
pub const SYNC_PATH: &str = "/sync";

/// Path of the call that puts the files of an archive into their places.
pub const COPY_PATH: &str = "/copy";

/// What becomes of the files of an archive, by the rules of a Dockerfile's COPY.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyQuery {
    /// What was copied, relative to the root of the archive. Of a directory its contents are; a
    /// wildcard stands for every file that the archive has there.
    pub src: String,
    /// Where to, absolute. A directory if it ends in `/`, is one already, or takes several files;
    /// otherwise the file's new name. Whatever is missing on the way is made.
    pub dest: String,
    /// Who owns all of it: `user`, `user:group`, or numbers.
    pub owner: String,
    /// Mode of every file and directory. Absent: as in the archive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<u32>,
}

/// Everything that a guest cannot know about itself after a restore. An absent field leaves what
/// the guest has; E2B's field names where E2B has the field. On the channel it is postcard, in which every
/// field has its place and none can be left out; the host's own records of it are JSON.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct InitRequest {
    /// Environment of every process started from now on. Replaces the map of the call before.
    pub env_vars: BTreeMap<String, String>,
    /// What a request must carry in `X-Access-Token`. Absent: as before.
    pub access_token: Option<String>,
    /// The host's wall clock; the guest steps its own to it.
    pub timestamp: Option<Timestamp>,
    /// User of requests that name none.
    pub default_user: Option<String>,
    /// Working directory of processes that name none. Absent: the user's home.
    pub default_workdir: Option<String>,
    /// Fresh random bits for the kernel's generator, different for every restore.
    pub entropy: Option<Entropy>,
    /// The sandbox that this guest is now.
    #[serde(rename = "sandboxID")]
    pub sandbox_id: Option<SandboxId>,
    /// The template that it was made from.
    #[serde(rename = "templateID")]
    pub template_id: Option<TemplateId>,
    /// Host name to set.
    pub hostname: Option<String>,
    /// Content of `/etc/machine-id`: 32 lower-case hexadecimal digits.
    #[serde(rename = "machineID")]
    pub machine_id: Option<String>,
    /// Name servers to put into `/etc/resolv.conf`. Empty: leave the file alone.
    pub dns_servers: Vec<Ipv4Addr>,
    /// How often this sandbox has been restored or rolled back: the proxy's connections are keyed
    /// by it.
    pub generation: Option<u64>,
    /// Kept in the guest's RAM and nowhere else. The answer returns the one that was there before,
    /// which is in the memory image that this VM was restored from, and so proves which one it was.
    pub nonce: Option<String>,
    /// The directories of the host that are to be mounted: all of them, so what else is mounted is
    /// unmounted. Absent: as before.
    pub mounts: Option<Vec<Mount>>,
}

/// A directory of the host, mounted in the sandbox; see [`share`](crate::share).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Mount {
    /// Names the directory on the channel: `[A-Za-z0-9_-]`, at most 64. The same directory must
    /// keep its tag through all lives of a sandbox, and no other may ever get it.
    pub tag: String,
    /// Where it is mounted: absolute, without `.` and `..`.
    pub path: String,
    /// Whether the sandbox may not change it.
    #[serde(default)]
    pub read_only: bool,
    /// The directory on the host. For the host's own records: it is taken out of what the guest is
    /// told.
    #[serde(default)]
    pub root: Option<PathBuf>,
}

/// What the guest says to an [`InitRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Introduced {
    /// It is what it was told to be.
    Became(InitResponse),
    /// It is not, and must not be used; why not.
    Refused(String),
}

/// What a guest says that is what it was told to be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct InitResponse {
    /// [`InitRequest::nonce`] of the last call that carried one; absent after a cold boot.
    pub previous_nonce: Option<String>,
    /// Version of the envd protocol that the guest speaks.
    pub envd_version: String,
}

/// One line of the guest's lifecycle log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEntry {
    /// When it happened by the guest's wall clock.
    pub timestamp: Timestamp,
    /// `debug`, `info`, `warn` or `error`.
    pub level: String,
    /// What happened, for a person to read.
    pub message: String,
    /// Details: for example `pid`, `cmd`, `exitCode`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub fields: BTreeMap<String, String>,
}

/// A point in time, in nanoseconds since the Unix epoch.
///
/// In JSON an RFC 3339 text; a number of nanoseconds is understood, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// Whole seconds since the Unix epoch.
    #[must_use]
    pub const fn seconds(self) -> u64 {
        self.0 / 1_000_000_000
    }

    /// Nanoseconds past [`seconds`](Self::seconds).
    #[must_use]
    pub const fn subsec_nanos(self) -> u32 {
        // Below 10^9.
        (self.0 % 1_000_000_000) as u32
    }

    /// This machine's wall clock.
    #[must_use]
    pub fn now() -> Self {
        let since_epoch = std::time::SystemTime::UNIX_EPOCH
            .elapsed()
            .unwrap_or_default();
        Self(u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX))
    }
}

impl fmt::Display for Timestamp {
    /// RFC 3339, in UTC.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // 2^64 ns end in the year 2554, so neither step fails.
        let text = OffsetDateTime::from_unix_timestamp_nanos(i128::from(self.0))
            .map_err(|_| fmt::Error)?
            .format(&Rfc3339)
            .map_err(|_| fmt::Error)?;
        f.write_str(&text)
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            serializer.serialize_u64(self.0)
        }
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Timestamp;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an RFC 3339 time after 1970 or nanoseconds since the Unix epoch")
            }

            fn visit_u64<E: de::Error>(self, nanos: u64) -> Result<Timestamp, E> {
                Ok(Timestamp(nanos))
            }

            fn visit_i64<E: de::Error>(self, nanos: i64) -> Result<Timestamp, E> {
                u64::try_from(nanos)
                    .map(Timestamp)
                    .map_err(|_| E::invalid_value(de::Unexpected::Signed(nanos), &self))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Timestamp, E> {
                OffsetDateTime::parse(text, &Rfc3339)
                    .ok()
                    .and_then(|time| u64::try_from(time.unix_timestamp_nanos()).ok())
                    .map(Timestamp)
                    .ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        if deserializer.is_human_readable() {
            deserializer.deserialize_any(Visitor)
        } else {
            deserializer.deserialize_u64(Visitor)
        }
    }
}

/// 256 random bits. In JSON base64; never shown in logs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Entropy([u8; Self::LEN]);

impl Entropy {
    /// How many bytes there are.
    pub const LEN: usize = 32;

    /// Fresh bits from this machine's generator.
    #[must_use]
    pub fn generate() -> Self {
        Self(rand::random())
    }

    /// The bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }
}

impl fmt::Debug for Entropy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Entropy(..)")
    }
}

impl Serialize for Entropy {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.serialize_str(&BASE64_STANDARD.encode(self.0))
        } else {
            self.0.serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for Entropy {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if !deserializer.is_human_readable() {
            return <[u8; Self::LEN]>::deserialize(deserializer).map(Self);
        }
        let text = String::deserialize(deserializer)?;
        BASE64_STANDARD
            .decode(&text)
            .ok()
            .and_then(|bytes| <[u8; Self::LEN]>::try_from(bytes).ok())
            .map(Self)
            .ok_or_else(|| de::Error::custom("entropy is not the base64 of 32 bytes"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_init_request_has_e2b_names_and_round_trips() {
        let request = InitRequest {
            env_vars: BTreeMap::from([("A".to_owned(), "b c".to_owned())]),
            access_token: Some("envd_1".to_owned()),
            timestamp: Some(Timestamp(1_700_000_000_123_456_789)),
            entropy: Some(Entropy([7; 32])),
            sandbox_id: Some(SandboxId::generate()),
            machine_id: Some("0".repeat(32)),
            dns_servers: vec![Ipv4Addr::new(1, 1, 1, 1)],
            generation: Some(3),
            ..InitRequest::default()
        };
        let packed = postcard::to_allocvec(&request).unwrap();
        assert_eq!(
            postcard::from_bytes::<InitRequest>(&packed).unwrap(),
            request
        );
        let json = serde_json::to_value(&request).unwrap();
        for name in "accessToken defaultUser envVars machineID sandboxID templateID".split(' ') {
            assert!(json.get(name).is_some(), "{name} in {json}");
        }
        assert_eq!(json["timestamp"], "2023-11-14T22:13:20.123456789Z");
        assert_eq!(
            serde_json::from_value::<InitRequest>(json).unwrap(),
            request
        );
        assert_eq!(
            serde_json::from_str::<InitRequest>("{}").unwrap(),
            InitRequest::default()
        );
    }

    #[test]
    fn a_timestamp_is_a_text_or_nanoseconds() {
        let parse = |json: &str| serde_json::from_str::<Timestamp>(json).map_err(|e| e.to_string());
        assert_eq!(
            parse("\"1970-01-01T01:00:01+01:00\""),
            Ok(Timestamp(1_000_000_000))
        );
        assert_eq!(
            parse("1700000000123456789"),
            Ok(Timestamp(1_700_000_000_123_456_789))
        );
        for bad in [
            "\"yesterday\"",
            "-1",
            "\"1969-12-31T23:59:59Z\"",
            "1.5",
            "null",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert_eq!(Timestamp(1_000_000_007).seconds(), 1);
        assert_eq!(Timestamp(1_000_000_007).subsec_nanos(), 7);
        assert_eq!(
            Timestamp(u64::MAX).to_string(),
            "2554-07-21T23:34:33.709551615Z"
        );
    }

    #[test]
    fn entropy_is_secret_and_of_one_length() {
        assert_eq!(format!("{:?}", Entropy([1; 32])), "Entropy(..)");
        assert!(serde_json::from_str::<Entropy>("\"AAAA\"").is_err());
        assert_ne!(Entropy::generate(), Entropy::generate());
    }
}

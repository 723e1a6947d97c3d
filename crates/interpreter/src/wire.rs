//! Jupyter messages as frames, signed. See <https://jupyter-client.readthedocs.io/en/stable/messaging.html>.

use bytes::Bytes;
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::Sha256;
use uuid::Uuid;

/// Stands between the identities of a message's way and the message.
const DELIMITER: &[u8] = b"<IDS|MSG>";
/// The version of the protocol that is spoken.
const VERSION: &str = "5.3";
/// Who the kernels are told asks.
const USERNAME: &str = "cubicle";

/// Why frames are no message.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum Error {
    /// Frames are missing.
    #[error("the message has too few frames")]
    Frames,
    /// Somebody else sent it, or it was changed.
    #[error("the message's signature is wrong")]
    Signature,
    /// A part is not what it should be.
    #[error("the message's {part} makes no sense: {source}")]
    Part {
        /// `header`, `parent header` or `content`.
        part: &'static str,
        /// Why.
        source: serde_json::Error,
    },
}

/// What a kernel and its client sign messages with, so that no other user of the machine can run
/// code in the kernel.
#[derive(Clone)]
pub(crate) struct Key(Hmac<Sha256>);

impl std::fmt::Debug for Key {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Key(..)")
    }
}

impl Key {
    /// A key from its text, as it is in a connection file.
    #[must_use]
    pub(crate) fn new(text: &str) -> Self {
        #[expect(clippy::expect_used, reason = "HMAC takes keys of any length")]
        Self(Hmac::new_from_slice(text.as_bytes()).expect("a key of any length is a key"))
    }

    fn mac(&self, parts: &[impl AsRef<[u8]>]) -> Hmac<Sha256> {
        let mut mac = self.0.clone();
        for part in parts {
            mac.update(part.as_ref());
        }
        mac
    }
}

/// The part of a header that matters here.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Header {
    /// Which message this is.
    #[serde(default)]
    pub(crate) msg_id: String,
    /// What its content is.
    #[serde(default)]
    pub(crate) msg_type: String,
    /// When it was made, RFC 3339.
    #[serde(default)]
    pub date: String,
}

/// A message from a kernel.
#[derive(Debug, Clone)]
pub(crate) struct Message {
    /// What it is.
    pub(crate) header: Header,
    /// The id of the request that it belongs to; empty if there is none.
    pub(crate) parent: String,
    content: Bytes,
}

impl Message {
    /// Reads a message and checks that its sender knows the key.
    ///
    /// # Errors
    /// [`Error`].
    pub(crate) fn decode(frames: &[Bytes], key: &Key) -> Result<Self, Error> {
        let start = frames.iter().position(|frame| &frame[..] == DELIMITER);
        let parts = start.map_or(&[][..], |start| &frames[start + 1..]);
        let [signature, signed @ ..] = parts else {
            return Err(Error::Frames);
        };
        let Some([header, parent, _metadata, content]) = signed.first_chunk::<4>() else {
            return Err(Error::Frames);
        };
        let signature = hex::decode(signature).map_err(|_| Error::Signature)?;
        let mac = key.mac(&signed[..4]);
        mac.verify_slice(&signature).map_err(|_| Error::Signature)?;
        let part = |part| move |source| Error::Part { part, source };
        #[derive(Deserialize)]
        struct Parent {
            #[serde(default)]
            msg_id: String,
        }
        let parent: Parent = serde_json::from_slice(parent).map_err(part("parent header"))?;
        Ok(Self {
            header: serde_json::from_slice(header).map_err(part("header"))?,
            parent: parent.msg_id,
            content: content.clone(),
        })
    }

    /// The content, as what a message of this type has.
    ///
    /// # Errors
    /// [`Error::Part`].
    pub(crate) fn content<T: DeserializeOwned>(&self) -> Result<T, Error> {
        serde_json::from_slice(&self.content).map_err(|source| Error::Part {
            part: "content",
            source,
        })
    }
}

/// A request to a kernel, not sent yet.
#[derive(Debug)]
pub(crate) struct Request {
    /// Its id, which answers carry as their parent.
    pub(crate) id: String,
    frames: [Vec<u8>; 4],
}

impl Request {
    /// A request of that type in that session.
    #[must_use]
    pub(crate) fn new(session: &str, msg_type: &str, content: &impl Serialize) -> Self {
        #[derive(Serialize)]
        struct Full<'a> {
            msg_id: &'a str,
            session: &'a str,
            username: &'a str,
            date: String,
            msg_type: &'a str,
            version: &'a str,
        }
        let id = Uuid::new_v4().simple().to_string();
        let header = Full {
            msg_id: &id,
            session,
            username: USERNAME,
            date: crate::clock::now(),
            msg_type,
            version: VERSION,
        };
        // Structures of texts and numbers, which cannot fail.
        let header = serde_json::to_vec(&header).unwrap_or_default();
        let content = serde_json::to_vec(content).unwrap_or_default();
        let frames = [header, b"{}".to_vec(), b"{}".to_vec(), content];
        Self { id, frames }
    }

    /// The frames to send.
    #[must_use]
    pub(crate) fn encode(&self, key: &Key) -> Vec<Vec<u8>> {
        let signature = key.mac(&self.frames).finalize().into_bytes();
        let signature = hex::encode(signature).into_bytes();
        [DELIMITER.to_vec(), signature]
            .into_iter()
            .chain(self.frames.iter().cloned())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn frames(request: &Request, key: &Key) -> Vec<Bytes> {
        request.encode(key).into_iter().map(Bytes::from).collect()
    }

    #[test]
    fn signatures_are_those_of_rfc_4231() {
        let key = Key::new("Jefe");
        let mac = key.mac(&["what do ya want ", "for nothing?"]).finalize();
        assert_eq!(
            hex::encode(mac.into_bytes()),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
    }

    #[test]
    fn a_message_survives_and_a_changed_one_does_not() {
        let key = Key::new("secret");
        let request = Request::new("s", "execute_request", &json!({"code": "1"}));
        let mut frames = frames(&request, &key);
        // Identities and topics come before the delimiter, buffers after the content.
        frames.insert(0, Bytes::from_static(b"topic"));
        frames.push(Bytes::from_static(b"buffer"));
        let message = Message::decode(&frames, &key).unwrap();
        assert_eq!(message.header.msg_id, request.id);
        assert_eq!(message.header.msg_type, "execute_request");
        assert_eq!(message.parent, "");
        assert_eq!(message.content::<Value>().unwrap(), json!({"code": "1"}));

        assert!(matches!(
            Message::decode(&frames, &Key::new("other")),
            Err(Error::Signature)
        ));
        let mut changed = frames.clone();
        changed[6] = Bytes::from_static(b"{\"code\":\"2\"}");
        assert!(matches!(
            Message::decode(&changed, &key),
            Err(Error::Signature)
        ));
        for len in 0..7 {
            assert!(Message::decode(&frames[..len], &key).is_err());
        }
    }
}

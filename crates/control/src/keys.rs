//! API keys: who may call the control plane.
//!
//! A key is `e2b_` and 40 hex digits, the form that E2B's clients check before they send anything.
//! Only its SHA-256 is kept: the key has 160 random bits, so a plain hash cannot be reversed.

use std::sync::{Arc, RwLock};

use sha2::{Digest as _, Sha256};
use sqlx::Row as _;
use subtle::ConstantTimeEq as _;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    db::{Db, from_micros, now, to_micros},
    error::{Error, Result},
    secret,
};

/// Prefix of every key.
const PREFIX: &str = "e2b_";
/// Random bytes of a key; 40 hex digits.
const RANDOM_BYTES: usize = 20;
/// How much of a key is kept in clear, for a person to tell keys apart.
const HINT_LEN: usize = 8;
const MAX_NAME_LEN: usize = 64;

type Hash = [u8; 32];

/// The keys of this server. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Keys {
    db: Db,
    hashes: Arc<RwLock<Vec<(Uuid, Hash)>>>,
}

/// A key that was just made: the only moment in which its text exists.
#[derive(Clone)]
pub struct NewKey {
    /// What the server remembers about it.
    pub info: KeyInfo,
    /// The key itself.
    pub key: String,
}

impl std::fmt::Debug for NewKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewKey")
            .field("info", &self.info)
            .finish_non_exhaustive()
    }
}

/// What the server remembers about a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyInfo {
    /// Names the key.
    pub id: Uuid,
    /// What a person called it.
    pub name: String,
    /// Its first characters.
    pub hint: String,
    /// When it was made.
    pub created_at: OffsetDateTime,
}

impl Keys {
    pub(crate) async fn open(db: Db) -> Result<Self> {
        let rows = sqlx::query("SELECT id, hash FROM api_keys")
            .fetch_all(&db.read)
            .await
            .map_err(Error::database("read the API keys"))?;
        let mut hashes = Vec::with_capacity(rows.len());
        for row in rows {
            let id: String = row.get("id");
            let id = id
                .parse()
                .map_err(|e| Error::damaged(format!("API key {id}"), e))?;
            let hash: Vec<u8> = row.get("hash");
            let hash = Hash::try_from(hash.as_slice())
                .map_err(|e| Error::damaged(format!("API key {id}"), e))?;
            hashes.push((id, hash));
        }
        Ok(Self {
            db,
            hashes: Arc::new(RwLock::new(hashes)),
        })
    }

    /// Makes a first key called `default` if there is none at all. The caller shows or stores the
    /// answer: nobody can ask for it again.
    pub async fn ensure_default(&self) -> Result<Option<NewKey>> {
        if !self.read().is_empty() {
            return Ok(None);
        }
        self.create("default").await.map(Some)
    }

    /// Makes a key.
    pub async fn create(&self, name: &str) -> Result<NewKey> {
        if name.is_empty() || name.len() > MAX_NAME_LEN || name.chars().any(char::is_control) {
            return Err(Error::invalid(
                "name",
                format!("a key's name has 1 to {MAX_NAME_LEN} printable characters"),
            ));
        }
        let key = format!("{PREFIX}{}", secret::hex(RANDOM_BYTES));
        let info = KeyInfo {
            id: Uuid::new_v4(),
            name: name.to_owned(),
            hint: key[..HINT_LEN].to_owned(),
            created_at: now(),
        };
        let hash = hash(&key);
        sqlx::query(
            "INSERT INTO api_keys (id, name, hash, hint, created_at) VALUES (?, ?, ?, ?, ?)",
        )
        .bind(info.id.to_string())
        .bind(&info.name)
        .bind(hash.as_slice())
        .bind(&info.hint)
        .bind(to_micros(info.created_at))
        .execute(&self.db.write)
        .await
        .map_err(Error::database("store an API key"))?;
        self.write().push((info.id, hash));
        Ok(NewKey { info, key })
    }

    /// Every key, oldest first.
    pub async fn list(&self) -> Result<Vec<KeyInfo>> {
        let rows =
            sqlx::query("SELECT id, name, hint, created_at FROM api_keys ORDER BY created_at")
                .fetch_all(&self.db.read)
                .await
                .map_err(Error::database("list the API keys"))?;
        rows.into_iter()
            .map(|row| {
                let id: String = row.get("id");
                Ok(KeyInfo {
                    id: id
                        .parse()
                        .map_err(|e| Error::damaged(format!("API key {id}"), e))?,
                    name: row.get("name"),
                    hint: row.get("hint"),
                    created_at: from_micros(row.get("created_at")),
                })
            })
            .collect()
    }

    /// Forgets a key; it is refused from now on. False: there was none with this id.
    pub async fn revoke(&self, id: Uuid) -> Result<bool> {
        let done = sqlx::query("DELETE FROM api_keys WHERE id = ?")
            .bind(id.to_string())
            .execute(&self.db.write)
            .await
            .map_err(Error::database("delete an API key"))?;
        self.write().retain(|(known, _)| *known != id);
        Ok(done.rows_affected() > 0)
    }

    /// Which key this text is, if any. Takes the same time whichever key it is or resembles.
    #[must_use]
    pub fn verify(&self, presented: &str) -> Option<Uuid> {
        let presented = hash(presented);
        let mut found = None;
        for (id, known) in self.read().iter() {
            if bool::from(known.ct_eq(&presented)) {
                found = Some(*id);
            }
        }
        found
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Vec<(Uuid, Hash)>> {
        self.hashes
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Vec<(Uuid, Hash)>> {
        self.hashes
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn hash(key: &str) -> Hash {
    Sha256::digest(key.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn keys(dir: &tempfile::TempDir) -> Keys {
        let db = Db::open(&dir.path().join("cubicle.db"))
            .await
            .expect("database");
        Keys::open(db).await.expect("keys")
    }

    #[tokio::test]
    async fn the_first_key_is_made_once_and_only_its_hash_is_kept() {
        let dir = tempfile::tempdir().expect("tempdir");
        let first = keys(&dir).await;
        let made = first
            .ensure_default()
            .await
            .expect("made")
            .expect("a first key");
        assert!(
            made.key.starts_with("e2b_") && made.key.len() == 44,
            "{}",
            made.key
        );
        assert!(
            made.key[4..]
                .bytes()
                .all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase())
        );
        assert!(first.ensure_default().await.expect("second call").is_none());
        assert!(
            !format!("{made:?}").contains(&made.key),
            "Debug must not print a key"
        );

        first.db.close().await;
        let again = keys(&dir).await;
        assert!(
            again
                .ensure_default()
                .await
                .expect("after restart")
                .is_none()
        );
        assert_eq!(again.verify(&made.key), Some(made.info.id));
        again.db.close().await;
        for entry in std::fs::read_dir(dir.path()).expect("dir") {
            let bytes = std::fs::read(entry.expect("entry").path()).expect("file");
            let clear = made.key.as_bytes();
            assert!(
                !bytes.windows(clear.len()).any(|w| w == clear),
                "the key is on the disk"
            );
        }
    }

    #[tokio::test]
    async fn a_revoked_or_similar_key_is_refused() {
        let dir = tempfile::tempdir().expect("tempdir");
        let keys = keys(&dir).await;
        let a = keys.create("a").await.expect("a");
        let b = keys.create("b").await.expect("b");
        assert_eq!(
            keys.list().await.expect("list"),
            [a.info.clone(), b.info.clone()]
        );
        assert_eq!(keys.verify(&b.key), Some(b.info.id));
        for wrong in [
            "",
            "e2b_",
            &a.key[..43],
            &a.key.to_uppercase(),
            &format!("{} ", a.key),
        ] {
            assert_eq!(keys.verify(wrong), None, "{wrong:?}");
        }
        assert!(keys.revoke(a.info.id).await.expect("revoke"));
        assert!(!keys.revoke(a.info.id).await.expect("revoke again"));
        assert_eq!(keys.verify(&a.key), None);
        for bad in ["", "a\nb", &"n".repeat(10_000)] {
            assert!(matches!(keys.create(bad).await, Err(Error::Invalid { .. })));
        }
    }
}

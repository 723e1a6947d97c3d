//! Random secrets, from the operating system's generator.

use rand::Rng as _;

/// `bytes` random bytes as lower-case hex digits.
pub(crate) fn hex(bytes: usize) -> String {
    let mut buffer = vec![0; bytes];
    rand::rng().fill_bytes(&mut buffer);
    hex::encode(buffer)
}

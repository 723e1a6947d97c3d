//! The metadata filter of sandbox lists.
//!
//! It is encoded three times on its way: each key and value for itself, the pairs as a form, the
//! form as a query parameter. The last is undone when it gets here.

use std::{borrow::Cow, collections::BTreeMap};

use percent_encoding::percent_decode_str;

use crate::error::{ApiError, ApiResult};

/// Parses the value of the query parameter `metadata`.
pub(crate) fn parse(form: &str) -> ApiResult<BTreeMap<String, String>> {
    let decode = |text: &str| {
        percent_decode_str(text)
            .decode_utf8()
            .map(Cow::into_owned)
            .map_err(|_| ApiError::field("metadata", "is no UTF-8 after decoding"))
    };
    let mut pairs = BTreeMap::new();
    for (key, value) in form_urlencoded::parse(form.as_bytes()) {
        let (key, value) = (decode(&key)?, decode(&value)?);
        if key.is_empty() {
            return Err(ApiError::field("metadata", "has a pair without a key"));
        }
        if let Some(other) = pairs.insert(key.clone(), value.clone())
            && other != value
        {
            let why = format!("asks for two values of '{key}', which no sandbox has");
            return Err(ApiError::field("metadata", why));
        }
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
    use proptest::prelude::*;

    use super::*;

    /// What E2B's clients do, short of the query parameter's own encoding.
    fn encode(pairs: &BTreeMap<String, String>) -> String {
        let quote = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
        let mut form = form_urlencoded::Serializer::new(String::new());
        for (key, value) in pairs {
            form.append_pair(&quote(key), &quote(value));
        }
        form.finish()
    }

    #[test]
    fn as_recorded_from_a_client() {
        let query = "metadata=a%252520b%3Dc%252526d";
        let (_, form) = form_urlencoded::parse(query.as_bytes())
            .next()
            .expect("a pair");
        assert_eq!(parse(&form), Ok([("a b".into(), "c&d".into())].into()));
    }

    #[test]
    fn plain_pairs_and_nonsense() {
        let plain = parse("user=abc&app=prod").expect("plain");
        assert_eq!(
            plain,
            [("user".into(), "abc".into()), ("app".into(), "prod".into())].into()
        );
        assert_eq!(parse(""), Ok(BTreeMap::new()));
        assert_eq!(parse("a"), Ok([("a".into(), String::new())].into()));
        for bad in ["=x", "a=1&a=2", "a=%25ff"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_clients_encode_comes_back(
            pairs in prop::collection::btree_map("\\PC{1,12}", "\\PC{0,12}", 0..5),
        ) {
            prop_assert_eq!(parse(&encode(&pairs)), Ok(pairs));
        }

        #[test]
        fn nothing_panics(form in ".{0,100}") {
            let _ = parse(&form);
        }
    }
}

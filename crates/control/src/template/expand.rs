//! `$NAME` in the values of steps.

/// `text` with every `$NAME`, `${NAME}`, `${NAME:-default}` and `${NAME:+other}` replaced by what
/// `lookup` says; what it does not know is empty. `\$` stands for `$`.
pub(super) fn expand(text: &str, lookup: &impl Fn(&str) -> Option<String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(['$', '\\']) {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(tail) = rest.strip_prefix("\\$") {
            out.push('$');
            rest = tail;
        } else if let Some(tail) = rest.strip_prefix("${")
            && let Some(end) = closing(tail)
        {
            out.push_str(&braced(&tail[..end], lookup));
            rest = &tail[end + 1..];
        } else if rest.starts_with('$') && name_len(&rest[1..]) > 0 {
            let (name, tail) = rest[1..].split_at(name_len(&rest[1..]));
            out.push_str(&lookup(name).unwrap_or_default());
            rest = tail;
        } else {
            // Neither: both characters are one byte long.
            out.push_str(&rest[..1]);
            rest = &rest[1..];
        }
    }
    out.push_str(rest);
    out
}

fn braced(inner: &str, lookup: &impl Fn(&str) -> Option<String>) -> String {
    let (name, operator) = inner.split_at(name_len(inner));
    let value = lookup(name).filter(|value| !value.is_empty());
    match operator.get(..2) {
        Some(":-") => value.unwrap_or_else(|| expand(&operator[2..], lookup)),
        Some(":+") => value.map_or_else(String::new, |_| expand(&operator[2..], lookup)),
        _ => value.unwrap_or_default(),
    }
}

/// Where the brace is closed that was opened before `text`.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 0;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' if depth == 0 => return Some(at),
            b'}' => depth -= 1,
            _ => {}
        }
    }
    None
}

fn name_len(text: &str) -> usize {
    let begins = |b: u8| b.is_ascii_alphabetic() || b == b'_';
    if !text.as_bytes().first().copied().is_some_and(begins) {
        return 0;
    }
    let is_name = |b: &u8| b.is_ascii_alphanumeric() || *b == b'_';
    text.bytes().take_while(is_name).count()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn known(name: &str) -> Option<String> {
        match name {
            "HOME" => Some("/root".into()),
            "PATH" => Some("/bin".into()),
            "EMPTY" => Some(String::new()),
            _ => None,
        }
    }

    #[test]
    fn names_are_replaced() {
        for (text, wanted) in [
            ("$HOME/bin:$PATH", "/root/bin:/bin"),
            ("${HOME}x$HOMEx", "/rootx"),
            (r"\$HOME \n $", r"$HOME \n $"),
            ("${NO:-a ${PATH}}|${HOME:-b}|${EMPTY:-c}", "a /bin|/root|c"),
            ("${HOME:+yes}${NO:+no}", "yes"),
            ("$1 $ ${HOME", "$1 $ ${HOME"),
            ("ä$HOMEß", "ä/rootß"),
        ] {
            assert_eq!(expand(text, &known), wanted, "{text}");
        }
    }

    proptest! {
        #[test]
        fn nothing_breaks_it_and_plain_text_stays(text in r"[\PC${}\\:+-]*", plain in "[^$\\\\]*") {
            expand(&text, &known);
            prop_assert_eq!(expand(&plain, &known), plain);
        }
    }
}

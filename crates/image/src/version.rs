//! The order of Debian package versions, as the Debian policy manual defines it (5.6.12).

use std::cmp::Ordering;

/// Compares two package versions: epoch, then upstream version, then revision.
pub(crate) fn compare(a: &str, b: &str) -> Ordering {
    let (a, b) = (Parts::of(a), Parts::of(b));
    a.epoch
        .cmp(&b.epoch)
        .then_with(|| compare_part(a.upstream, b.upstream))
        .then_with(|| compare_part(a.revision, b.revision))
}

struct Parts<'a> {
    epoch: u64,
    upstream: &'a str,
    revision: &'a str,
}

impl Parts<'_> {
    fn of(version: &str) -> Parts<'_> {
        let (epoch, rest) = version.split_once(':').unwrap_or(("0", version));
        let (upstream, revision) = rest.rsplit_once('-').unwrap_or((rest, "0"));
        Parts {
            epoch: epoch.parse().unwrap_or(0),
            upstream,
            revision,
        }
    }
}

/// Compares stretches of non-digits and of digits in turn.
fn compare_part(mut a: &str, mut b: &str) -> Ordering {
    while !a.is_empty() || !b.is_empty() {
        let (text_a, rest_a) = split_where(a, |c| c.is_ascii_digit());
        let (text_b, rest_b) = split_where(b, |c| c.is_ascii_digit());
        let (number_a, rest_a) = split_where(rest_a, |c| !c.is_ascii_digit());
        let (number_b, rest_b) = split_where(rest_b, |c| !c.is_ascii_digit());
        let order = compare_text(text_a, text_b).then_with(|| compare_number(number_a, number_b));
        if order.is_ne() {
            return order;
        }
        (a, b) = (rest_a, rest_b);
    }
    Ordering::Equal
}

fn split_where(text: &str, end: impl Fn(char) -> bool) -> (&str, &str) {
    text.split_at(text.find(end).unwrap_or(text.len()))
}

/// `~` sorts before the end, the end before letters, letters before everything else.
fn compare_text(a: &str, b: &str) -> Ordering {
    fn weights(text: &str) -> impl Iterator<Item = i32> {
        let weight = |byte: u8| match byte {
            b'~' => -1,
            byte if byte.is_ascii_alphabetic() => i32::from(byte),
            byte => i32::from(byte) + 256,
        };
        text.bytes().map(weight).chain(std::iter::once(0))
    }
    weights(a).cmp(weights(b))
}

fn compare_number(a: &str, b: &str) -> Ordering {
    let (a, b) = (a.trim_start_matches('0'), b.trim_start_matches('0'));
    a.len().cmp(&b.len()).then_with(|| a.cmp(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_sort_as_the_policy_manual_says() {
        let ascending = [
            "1.0~rc1-1",
            "1.0-1",
            "1.0-1+b1",
            "1.0a-1",
            "1.0+dfsg-1",
            "1.2-1",
            "1.10-1",
            "6.1.176-1",
            "6.12.90-1~bpo12+1",
            "6.12.90-1",
            "6.12.90-2~bpo12+1",
            "6.12.101-1~deb12u1",
            "1:0.1-1",
        ];
        for (i, a) in ascending.iter().enumerate() {
            for (j, b) in ascending.iter().enumerate() {
                assert_eq!(compare(a, b), i.cmp(&j), "{a} against {b}");
            }
        }
        assert_eq!(compare("1.0-01", "1.0-1"), Ordering::Equal);
    }

    #[test]
    fn dpkg_agrees() {
        let versions = [
            "1.0~~", "1.0~", "1.0", "1.0-0", "1.0.", "2:1", "1.0+a", "1.0a~b", "09-1",
        ];
        for a in versions {
            for b in versions {
                let dpkg = |relation| {
                    let arguments = ["--compare-versions", a, relation, b];
                    let run = std::process::Command::new("dpkg").args(arguments).status();
                    run.unwrap().success()
                };
                let expected = if dpkg("lt") {
                    Ordering::Less
                } else if dpkg("eq") {
                    Ordering::Equal
                } else {
                    Ordering::Greater
                };
                assert_eq!(compare(a, b), expected, "{a} against {b}");
            }
        }
    }
}

//! Words of a Dockerfile: how a line is split, how quotes are taken off, and how variables are put
//! in.

use std::{iter::Peekable, str::Chars};

/// What a variable is, if anything.
pub(super) type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// What becomes of variables that nothing is known of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unknown {
    /// They are errors.
    Refuse,
    /// They stay, as `${NAME}`, for the server, which knows the image. Every other `$` is written
    /// as `\\$` then.
    Leave,
}

/// What is wrong with a word.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum WordError {
    #[error("a {0} is not closed")]
    Unclosed(char),
    #[error("${{ is not followed by a variable's name and }}")]
    BadSubstitution,
    #[error("${{{name}{operator}...}} is not supported, only :-, -, :+ and + are")]
    Operator { name: String, operator: String },
    #[error("${name} is not set: no ARG or ENV before this line says what it is")]
    Unset { name: String },
}

/// Splits a line at its blanks. Quotes and escapes keep blanks, and stay in the words.
pub(super) fn split(line: &str, escape: char) -> Result<Vec<String>, WordError> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quote = None;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match quote {
            None if c.is_whitespace() => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                continue;
            }
            None if c == '"' || c == '\'' => quote = Some(c),
            Some(open) if c == open => quote = None,
            _ => {}
        }
        word.push(c);
        if c == escape && quote != Some('\'') {
            word.extend(chars.next());
        }
    }
    if let Some(open) = quote {
        return Err(WordError::Unclosed(open));
    }
    if !word.is_empty() {
        words.push(word);
    }
    Ok(words)
}

/// `NAME=VALUE` pairs of `ENV`, `ARG` and `LABEL`, with quotes and variables as they are written.
/// `ENV NAME some words` is one pair.
pub(super) fn pairs(line: &str, escape: char) -> Result<Vec<(String, String)>, WordError> {
    let line = line.trim();
    let words = split(line, escape)?;
    let first = words.first().map_or("", String::as_str);
    if !first.contains('=') {
        let rest = line.strip_prefix(first).unwrap_or_default().trim();
        return Ok(vec![(first.to_owned(), rest.to_owned())]);
    }
    Ok(words
        .into_iter()
        .map(|word| match word.split_once('=') {
            Some((name, value)) => (name.to_owned(), value.to_owned()),
            None => (word, String::new()),
        })
        .collect())
}

/// Takes quotes and escapes off a word and puts variables in.
pub(super) fn expand(
    word: &str,
    escape: char,
    unknown: Unknown,
    lookup: Lookup<'_>,
) -> Result<String, WordError> {
    let mut expansion = Expansion {
        chars: word.chars().peekable(),
        escape,
        unknown,
        lookup,
    };
    expansion.until(None)
}

struct Expansion<'a> {
    chars: Peekable<Chars<'a>>,
    escape: char,
    unknown: Unknown,
    lookup: Lookup<'a>,
}

impl Expansion<'_> {
    /// Everything up to `end`, which is taken, or to the end of the word.
    fn until(&mut self, end: Option<char>) -> Result<String, WordError> {
        let mut out = String::new();
        while let Some(c) = self.chars.next() {
            match c {
                _ if Some(c) == end => return Ok(out),
                '\'' => self.single_quoted(&mut out)?,
                '"' => self.double_quoted(&mut out)?,
                '$' => out.push_str(&self.variable()?),
                _ if c == self.escape => {
                    if let Some(next) = self.chars.next() {
                        self.literal(&mut out, next);
                    }
                }
                _ => out.push(c),
            }
        }
        end.map_or(Ok(out), |end| Err(WordError::Unclosed(end)))
    }

    fn single_quoted(&mut self, out: &mut String) -> Result<(), WordError> {
        while let Some(c) = self.chars.next() {
            if c == '\'' {
                return Ok(());
            }
            self.literal(out, c);
        }
        Err(WordError::Unclosed('\''))
    }

    fn double_quoted(&mut self, out: &mut String) -> Result<(), WordError> {
        while let Some(c) = self.chars.next() {
            match c {
                '"' => return Ok(()),
                '$' => out.push_str(&self.variable()?),
                _ if c == self.escape => match self.chars.next() {
                    Some(next) if matches!(next, '"' | '$') || next == self.escape => {
                        self.literal(out, next);
                    }
                    next => {
                        out.push(self.escape);
                        out.extend(next);
                    }
                },
                _ => out.push(c),
            }
        }
        Err(WordError::Unclosed('"'))
    }

    /// A character that means itself.
    fn literal(&self, out: &mut String, c: char) {
        if c == '$' && self.unknown == Unknown::Leave {
            out.push('\\');
        }
        out.push(c);
    }

    /// What stands behind a `$`.
    fn variable(&mut self) -> Result<String, WordError> {
        if self.chars.next_if_eq(&'{').is_none() {
            let name = self.name();
            if name.is_empty() {
                let mut out = String::new();
                self.literal(&mut out, '$');
                return Ok(out);
            }
            return self.value(name);
        }
        let name = self.name();
        if name.is_empty() {
            return Err(WordError::BadSubstitution);
        }
        let mut operator = String::new();
        operator.extend(self.chars.next_if_eq(&':'));
        match self.chars.next() {
            Some('}') if operator.is_empty() => return self.value(name),
            Some(c) => operator.push(c),
            None => return Err(WordError::Unclosed('{')),
        }
        if !matches!(operator.as_str(), ":-" | "-" | ":+" | "+") {
            return Err(WordError::Operator { name, operator });
        }
        let word = self.until(Some('}'))?;
        let known = (self.lookup)(&name);
        if known.is_none() && self.unknown == Unknown::Leave {
            let kind = operator.trim_start_matches(':');
            return Ok(format!("${{{name}:{kind}{word}}}"));
        }
        let value = known.filter(|value| !(operator.starts_with(':') && value.is_empty()));
        Ok(match (value, operator.ends_with('-')) {
            (Some(value), true) => self.literals(&value),
            (None, false) => String::new(),
            (None, true) | (Some(_), false) => word,
        })
    }

    fn value(&self, name: String) -> Result<String, WordError> {
        match (self.lookup)(&name) {
            Some(value) => Ok(self.literals(&value)),
            None if self.unknown == Unknown::Leave => Ok(format!("${{{name}}}")),
            None => Err(WordError::Unset { name }),
        }
    }

    fn literals(&self, text: &str) -> String {
        let mut out = String::new();
        text.chars().for_each(|c| self.literal(&mut out, c));
        out
    }

    fn name(&mut self) -> String {
        let mut name = String::new();
        while let Some(c) = self.chars.next_if(|c| {
            c.is_ascii_alphabetic() || *c == '_' || (c.is_ascii_digit() && !name.is_empty())
        }) {
            name.push(c);
        }
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookup(name: &str) -> Option<String> {
        match name {
            "A" => Some("a b".into()),
            "EMPTY" => Some(String::new()),
            _ => None,
        }
    }

    #[test]
    fn words_are_expanded_as_docker_does() {
        let cases = [
            ("plain", "plain"),
            ("'$A'", "$A"),
            ("\"$A\"", "a b"),
            ("x${A}y", "xa by"),
            ("\\$A", "$A"),
            ("\"\\$A \\n \\\"\"", "$A \\n \""),
            ("a\\ b", "a b"),
            ("${B:-c}", "c"),
            ("${B-'d e'}", "d e"),
            ("${EMPTY:-x}${EMPTY-y}", "x"),
            ("${A:+set}${B:+set}${EMPTY:+set}${EMPTY+there}", "setthere"),
            ("${B:-${A}}", "a b"),
            ("5$", "5$"),
            ("$5", "$5"),
        ];
        for (word, expected) in cases {
            assert_eq!(
                expand(word, '\\', Unknown::Refuse, &lookup).as_deref(),
                Ok(expected),
                "{word}"
            );
        }
        let other = expand("C:`\\x", '`', Unknown::Refuse, &lookup);
        assert_eq!(other.as_deref(), Ok("C:\\x"));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let error = |word: &str| {
            expand(word, '\\', Unknown::Refuse, &lookup)
                .expect_err(word)
                .to_string()
        };
        assert_eq!(error("'x"), "a ' is not closed");
        assert_eq!(error("\"x"), "a \" is not closed");
        assert_eq!(error("${A"), "a { is not closed");
        assert_eq!(error("${A:-x"), "a } is not closed");
        assert_eq!(
            error("${}"),
            "${ is not followed by a variable's name and }"
        );
        assert_eq!(
            error("${A%x}"),
            "${A%...} is not supported, only :-, -, :+ and + are"
        );
        assert!(error("$B").starts_with("$B is not set"));
    }

    #[test]
    fn lines_are_split_at_blanks_that_are_not_quoted() {
        let words = |line| split(line, '\\').expect(line);
        assert_eq!(
            words("  a  'b c' d\\ e \"f \\\" g\" "),
            ["a", "'b c'", "d\\ e", "\"f \\\" g\""]
        );
        assert!(split("'a", '\\').is_err());
    }

    #[test]
    fn pairs_of_both_forms() {
        let pairs = |line| pairs(line, '\\').expect(line);
        assert_eq!(
            pairs("A=1 B='x y' C="),
            [
                ("A".into(), "1".into()),
                ("B".into(), "'x y'".into()),
                ("C".into(), String::new())
            ]
        );
        assert_eq!(pairs("A some words"), [("A".into(), "some words".into())]);
    }

    #[test]
    fn what_the_server_knows_is_left_to_it() {
        let cases = [
            ("$B:/bin", "${B}:/bin"),
            ("${B:+:$B}", "${B:+:${B}}"),
            ("${B-'$'}", "${B:-\\$}"),
            ("'$A' \\$ $A", "\\$A \\$ a b"),
        ];
        for (word, expected) in cases {
            let left = expand(word, '\\', Unknown::Leave, &lookup);
            assert_eq!(left.as_deref(), Ok(expected), "{word}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_word_panics(word in "[a-zA$B{}:+'\"\\\\ -]{0,24}") {
            let _ = expand(&word, '\\', Unknown::Refuse, &lookup);
            let _ = expand(&word, '\\', Unknown::Leave, &lookup);
            let _ = split(&word, '\\');
            let _ = pairs(&word, '\\');
        }
    }
}

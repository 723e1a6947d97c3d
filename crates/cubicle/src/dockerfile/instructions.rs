//! From the instructions of a Dockerfile to a [`Plan`].

use std::collections::BTreeMap;

use parse_dockerfile::{
    ArgInstruction, Command, CopyInstruction, EnvInstruction, ExposeInstruction, Flag,
    FromInstruction, Instruction, RunInstruction, Source, UnescapedString,
};

use super::{
    Action, Copy, Plan, Problem, Step,
    words::{self, Unknown, WordError},
};

type Result<T> = std::result::Result<T, Problem>;

/// Reads a Dockerfile. `build_args` are values of `ARG`s from outside.
pub(crate) fn read(text: &str, build_args: &[(String, String)]) -> Result<Plan> {
    // An editor's byte order mark and its line ends mean nothing.
    let text = text.trim_start_matches('\u{feff}').replace("\r\n", "\n");
    let parsed = parse_dockerfile::parse(&text).map_err(|error| {
        let message = error.to_string();
        // The position is said by us, as it is for every other error.
        let message = message.split(" at line ").next().unwrap_or(&message);
        here_document_before(&text, error.line())
            .unwrap_or_else(|| Problem::new(error.line(), message.trim()))
    })?;
    let mut reader = Reader {
        text: &text,
        escape: parsed
            .parser_directives
            .escape
            .as_ref()
            .map_or('\\', |escape| escape.value.value),
        build_args: build_args.iter().cloned().collect(),
        args: BTreeMap::new(),
        env: BTreeMap::new(),
        from: None,
        plan: Plan::default(),
    };
    for instruction in &parsed.instructions {
        reader.instruction(instruction)?;
    }
    reader.finish()
}

struct Reader<'a> {
    text: &'a str,
    escape: char,
    build_args: BTreeMap<String, String>,
    /// `ARG`s in reach: before `FROM` those of the file, after it those of the stage.
    args: BTreeMap<String, String>,
    /// `ENV`s so far; those that depend on the image have no value here.
    env: BTreeMap<String, Option<String>>,
    /// `ARG`s of the file, once `FROM` was read.
    from: Option<BTreeMap<String, String>>,
    plan: Plan,
}

impl Reader<'_> {
    fn instruction(&mut self, instruction: &Instruction<'_>) -> Result<()> {
        let (at, name) = self.place(instruction);
        if self.from.is_none() && !matches!(instruction, Instruction::Arg(_) | Instruction::From(_))
        {
            return Err(Problem::new(at, format!("{name} stands before FROM")));
        }
        match instruction {
            Instruction::From(from) => self.from(at, from),
            Instruction::Arg(arg) => self.arg(at, arg),
            Instruction::Env(env) => self.env(at, env),
            Instruction::Run(run) => self.run(at, run),
            Instruction::Copy(copy) => self.copy(at, copy),
            Instruction::Workdir(workdir) => {
                let path = self.text(at, &workdir.arguments)?;
                self.step(at, Action::Workdir(path));
                Ok(())
            }
            Instruction::User(user) => {
                let user = self.text(at, &user.arguments)?;
                self.step(at, Action::User(user));
                Ok(())
            }
            Instruction::Cmd(cmd) => {
                self.plan.cmd = Some(self.exec(at, &cmd.arguments)?);
                Ok(())
            }
            Instruction::Entrypoint(entrypoint) => {
                // What an image would have given it as arguments was meant for another.
                self.plan.cmd = None;
                self.plan.entrypoint = Some(self.exec(at, &entrypoint.arguments)?);
                Ok(())
            }
            Instruction::Expose(expose) => self.expose(at, expose),
            Instruction::Label(_) | Instruction::Maintainer(_) => {
                let note = format!("{name} has no effect: templates carry no labels");
                self.plan.notes.push(Problem::new(at, note));
                Ok(())
            }
            Instruction::Add(_) => Err(Problem::new(
                at,
                "ADD is not supported: use COPY for files of the context, and RUN with curl or tar \
                 for the rest",
            )),
            Instruction::Healthcheck(_) => Err(Problem::new(
                at,
                "HEALTHCHECK is not supported: say with --ready when the template is",
            )),
            Instruction::Shell(_) => Err(Problem::new(
                at,
                "SHELL is not supported: steps run in bash, or in sh where there is no bash; name \
                 another shell in the RUN itself",
            )),
            Instruction::Volume(_) => Err(Problem::new(
                at,
                "VOLUME is not supported: leave it out, or mount a volume when a sandbox is created",
            )),
            _ => Err(Problem::new(at, format!("{name} is not supported"))),
        }
    }

    fn from(&mut self, at: usize, from: &FromInstruction<'_>) -> Result<()> {
        if self.from.is_some() {
            return Err(Problem::new(
                at,
                "a second FROM: builds in several stages are not supported; build the first stage \
                 as a template of its own, or copy its result into the context",
            ));
        }
        for flag in &from.options {
            match (&*flag.name.value, self.flag(at, flag)?.as_str()) {
                ("platform", "linux/amd64" | "linux/x86_64") => {}
                ("platform", other) => {
                    let message = format!("--platform={other}: sandboxes are linux/amd64");
                    return Err(Problem::new(at, message));
                }
                _ => return Err(self.unknown_flag(at, "FROM", flag)),
            }
        }
        let image = self.word(at, &from.image)?;
        if image == "scratch" {
            let message = "FROM scratch has nothing to run a step with: name an image";
            return Err(Problem::new(at, message));
        }
        self.plan.image = image;
        self.from = Some(std::mem::take(&mut self.args));
        Ok(())
    }

    fn arg(&mut self, at: usize, arg: &ArgInstruction<'_>) -> Result<()> {
        let words = words::split(&arg.arguments.value, self.escape).map_err(said(at))?;
        for word in words {
            let (name, default) = match word.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(self.expand(at, value)?)),
                None => (word, None),
            };
            let of_file = self.from.as_ref().and_then(|args| args.get(&name));
            let value = self
                .build_args
                .get(&name)
                .cloned()
                .or(default)
                .or_else(|| of_file.cloned());
            // One without a value is not set, but another one of that name would be forgotten.
            match value {
                Some(value) => self.args.insert(name, value),
                None => self.args.remove(&name),
            };
        }
        Ok(())
    }

    fn env(&mut self, at: usize, env: &EnvInstruction<'_>) -> Result<()> {
        let pairs = words::pairs(&env.arguments.value, self.escape).map_err(said(at))?;
        // All of one line see what was before it.
        let (mut vars, mut known) = (Vec::new(), Vec::new());
        for (name, value) in pairs {
            if name.is_empty() {
                return Err(Problem::new(at, "ENV without a name before the ="));
            }
            vars.push((name.clone(), self.left(at, &value)?));
            known.push((name, self.expand(at, &value).ok()));
        }
        self.env.extend(known);
        self.step(at, Action::Env(vars));
        Ok(())
    }

    fn run(&mut self, at: usize, run: &RunInstruction<'_>) -> Result<()> {
        for flag in &run.options {
            match (&*flag.name.value, self.flag(at, flag)?.as_str()) {
                ("network", "default") | ("security", "sandbox") => {}
                _ => return Err(self.unknown_flag(at, "RUN", flag)),
            }
        }
        let command = match &run.arguments {
            Command::Exec(words) => shell_line(words.value.iter().map(|word| &*word.value)),
            Command::Shell(line) => {
                let line = joined(line.value, self.escape);
                match run.here_docs.first() {
                    Some(document) => here_document(at, &line, &document.value)?,
                    None => {
                        if let Some(word) = here_document_in(&line) {
                            return Err(misplaced(at, word));
                        }
                        line
                    }
                }
            }
            _ => return Err(Problem::new(at, "a RUN of this form is not supported")),
        };
        if command.trim().is_empty() {
            return Err(Problem::new(at, "RUN without a command"));
        }
        self.step(at, Action::Run(self.with_args(&command)));
        Ok(())
    }

    /// A command that sees the `ARG`s in reach as variables, as `ENV` of that name hides them.
    fn with_args(&self, command: &str) -> String {
        let exports: String = self
            .args
            .iter()
            .filter(|(name, _)| !self.env.contains_key(*name))
            .map(|(name, value)| format!("export {name}={}\n", quoted(value)))
            .collect();
        exports + command
    }

    fn copy(&mut self, at: usize, copy: &CopyInstruction<'_>) -> Result<()> {
        let (mut owner, mut mode) = (None, None);
        for flag in &copy.options {
            let value = self.flag(at, flag)?;
            match &*flag.name.value {
                "chown" => owner = Some(value),
                "chmod" => mode = Some(octal(at, &value)?),
                // It changes how layers are stored, not what is in them.
                "link" => {}
                "from" => {
                    let message = "COPY --from is not supported: there is one stage only, and what \
                                   it copies comes from the context";
                    return Err(Problem::new(at, message));
                }
                _ => return Err(self.unknown_flag(at, "COPY", flag)),
            }
        }
        let mut sources = Vec::new();
        for source in &copy.src {
            match source {
                Source::Path(path) => sources.push(self.word(at, path)?),
                _ => {
                    let message = "COPY of a here-document is not supported: put it into a file";
                    return Err(Problem::new(at, message));
                }
            }
        }
        let dest = self.text(at, &copy.dest)?;
        let copy = Copy {
            sources,
            dest,
            owner,
            mode,
        };
        self.step(at, Action::Copy(copy));
        Ok(())
    }

    fn expose(&mut self, at: usize, expose: &ExposeInstruction<'_>) -> Result<()> {
        for word in &expose.arguments {
            let word = self.word(at, word)?;
            let (ports, protocol) = word.split_once('/').unwrap_or((&word, "tcp"));
            let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
            let range = match (first.parse::<u16>(), last.parse::<u16>()) {
                (Ok(first), Ok(last)) if 0 < first && first <= last => first..=last,
                _ => return Err(Problem::new(at, format!("EXPOSE {word}: that is no port"))),
            };
            if !protocol.eq_ignore_ascii_case("tcp") {
                let note = format!("EXPOSE {word} has no effect: sandboxes are reached over TCP");
                self.plan.notes.push(Problem::new(at, note));
                continue;
            }
            for port in range {
                if !self.plan.ports.contains(&port) {
                    self.plan.ports.push(port);
                }
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<Plan> {
        if self.from.is_none() {
            return Err(Problem::new(0, "it has no FROM"));
        }
        Ok(self.plan)
    }

    fn step(&mut self, line: usize, action: Action) {
        self.plan.steps.push(Step { line, action });
    }

    /// The line and the name of an instruction.
    fn place(&self, instruction: &Instruction<'_>) -> (usize, String) {
        let keyword = match instruction {
            Instruction::Add(i) => &i.add,
            Instruction::Arg(i) => &i.arg,
            Instruction::Cmd(i) => &i.cmd,
            Instruction::Copy(i) => &i.copy,
            Instruction::Entrypoint(i) => &i.entrypoint,
            Instruction::Env(i) => &i.env,
            Instruction::Expose(i) => &i.expose,
            Instruction::From(i) => &i.from,
            Instruction::Healthcheck(i) => &i.healthcheck,
            Instruction::Label(i) => &i.label,
            Instruction::Maintainer(i) => &i.maintainer,
            Instruction::Onbuild(i) => &i.onbuild,
            Instruction::Run(i) => &i.run,
            Instruction::Shell(i) => &i.shell,
            Instruction::Stopsignal(i) => &i.stopsignal,
            Instruction::User(i) => &i.user,
            Instruction::Volume(i) => &i.volume,
            Instruction::Workdir(i) => &i.workdir,
            _ => return (0, "an instruction".to_owned()),
        };
        let span = keyword.span.clone();
        let before = self.text.get(..span.start).unwrap_or_default();
        let name = self.text.get(span).unwrap_or_default();
        let line = 1 + before.bytes().filter(|b| *b == b'\n').count();
        (line, name.to_ascii_uppercase())
    }

    fn word(&self, at: usize, word: &UnescapedString<'_>) -> Result<String> {
        let word = self.expand(at, word.value.trim())?;
        if word.is_empty() {
            return Err(Problem::new(at, "a word of it is empty"));
        }
        Ok(word)
    }

    /// A word for the server, which puts in what the image knows.
    fn text(&self, at: usize, word: &UnescapedString<'_>) -> Result<String> {
        let text = self.left(at, word.value.trim())?;
        if text.is_empty() {
            return Err(Problem::new(at, "a word of it is empty"));
        }
        Ok(text)
    }

    /// A word with every variable put in.
    fn expand(&self, at: usize, word: &str) -> Result<String> {
        let lookup = |name: &str| match self.env.get(name) {
            Some(value) => value.clone(),
            None => self.args.get(name).cloned(),
        };
        words::expand(word, self.escape, Unknown::Refuse, &lookup).map_err(said(at))
    }

    /// A word with the `ARG`s put in, of which the server knows nothing.
    fn left(&self, at: usize, word: &str) -> Result<String> {
        let lookup = |name: &str| {
            let hidden = self.env.contains_key(name);
            self.args.get(name).filter(|_| !hidden).cloned()
        };
        words::expand(word, self.escape, Unknown::Leave, &lookup).map_err(said(at))
    }

    fn flag(&self, at: usize, flag: &Flag<'_>) -> Result<String> {
        let value = flag.value.as_ref().map_or("", |value| &value.value);
        self.expand(at, value)
    }

    fn unknown_flag(&self, at: usize, name: &str, flag: &Flag<'_>) -> Problem {
        let written = match &flag.value {
            Some(value) => format!("--{}={}", flag.name.value, value.value),
            None => format!("--{}", flag.name.value),
        };
        Problem::new(at, format!("{name} {written} is not supported"))
    }

    fn exec(&self, at: usize, command: &Command<'_>) -> Result<Vec<String>> {
        match command {
            Command::Exec(words) => Ok(words.value.iter().map(|w| w.value.to_string()).collect()),
            Command::Shell(line) => {
                let line = joined(line.value, self.escape);
                Ok(vec!["/bin/sh".to_owned(), "-c".to_owned(), line])
            }
            _ => Err(Problem::new(at, "a command of this form is not supported")),
        }
    }
}

fn said(at: usize) -> impl Fn(WordError) -> Problem {
    move |error| Problem::new(at, error.to_string())
}

/// A command over several lines as one; comments between them are gone.
fn joined(text: &str, escape: char) -> String {
    let mut out = String::new();
    let mut continued = false;
    for line in text.lines() {
        let bare = line.trim();
        if continued && (bare.is_empty() || bare.starts_with('#')) {
            continue;
        }
        let body = line.trim_end().strip_suffix(escape);
        continued = body.is_some();
        out.push_str(body.unwrap_or(line));
    }
    out.trim().to_owned()
}

/// A `RUN` that begins with `<<WORD`: the document is the script, or the input of the command
/// behind it.
fn here_document(at: usize, line: &str, document: &str) -> Result<String> {
    let refuse = |message: &str| Err(Problem::new(at, message));
    if line.trim_start_matches("<<").contains("<<") {
        return refuse("more than one here-document in a RUN is not supported");
    }
    let rest = line.split_once(char::is_whitespace).map(|(_, rest)| rest);
    if rest.is_some_and(|rest| !rest.trim().is_empty()) {
        return refuse("RUN <<WORD takes nothing behind the word: put the command before it");
    }
    if document.starts_with("#!") {
        return refuse("a here-document with an interpreter of its own is not supported");
    }
    Ok(document.trim_end_matches('\n').to_owned())
}

/// The word of a here-document somewhere in a command.
fn here_document_in(line: &str) -> Option<&str> {
    let (_, behind) = line.split_once("<<")?;
    // `<<<` gives a word as input, and `$((1 << 2))` computes.
    let word = behind.strip_prefix('-').unwrap_or(behind);
    let first = word.chars().next()?;
    if !(first.is_ascii_alphabetic() || matches!(first, '_' | '"' | '\'')) {
        return None;
    }
    word.split(|c: char| c.is_whitespace() || c == ';').next()
}

/// What a line that makes no sense may come from: the here-document of a `RUN` before it, which the
/// grammar does not know there.
fn here_document_before(text: &str, line: usize) -> Option<Problem> {
    let lines = text.lines().enumerate().take(line.saturating_sub(1));
    let runs = lines.filter(|(_, line)| {
        let word = line.split_whitespace().next().unwrap_or_default();
        word.eq_ignore_ascii_case("RUN")
    });
    let mut found = runs.filter_map(|(index, line)| {
        let command = line.trim_start().get(3..)?.trim_start();
        let begins_with_it = command.starts_with("<<");
        let word = here_document_in(command).filter(|_| !begins_with_it)?;
        Some(misplaced(index + 1, word))
    });
    found.next()
}

fn misplaced(line: usize, word: &str) -> Problem {
    let message = format!(
        "the here-document {word} is supported at the start of a RUN only, as RUN <<{word}"
    );
    Problem::new(line, message)
}

fn octal(at: usize, text: &str) -> Result<u32> {
    let digits = (1..=4).contains(&text.len()) && text.bytes().all(|b| (b'0'..=b'7').contains(&b));
    match u32::from_str_radix(text, 8) {
        Ok(mode) if digits => Ok(mode),
        _ => {
            let message = format!("--chmod={text} is not supported: give it as 0644 or 755");
            Err(Problem::new(at, message))
        }
    }
}

/// A command's words as a line for a shell that gives them back.
fn shell_line<'a>(words: impl Iterator<Item = &'a str>) -> String {
    words.map(quoted).collect::<Vec<_>>().join(" ")
}

/// A word as a shell reads it back.
fn quoted(word: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_./:=@%+,".contains(&b);
    if !word.is_empty() && word.bytes().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(text: &str) -> Plan {
        read(text, &[]).unwrap_or_else(|problem| panic!("{problem}\n{text}"))
    }

    fn problem(text: &str) -> String {
        match read(text, &[]) {
            Ok(plan) => panic!("accepted: {plan:?}"),
            Err(problem) => problem.to_string(),
        }
    }

    #[test]
    fn a_usual_file() {
        let text = r#"# syntax=docker/dockerfile:1
ARG VERSION=3.12
FROM --platform=linux/amd64 python:${VERSION}-slim AS app
ARG VERSION
ARG EXTRA="a b"
LABEL org.example.title="x"
ENV APP=/srv/app \
    MODE='quick $APP'
WORKDIR $APP
COPY --chown=user:user --chmod=0755 run.sh requirements*.txt ./
RUN apt-get update && \
    # a comment between
    apt-get install -y curl \
 && rm -rf /var/lib/apt/lists/*
RUN ["echo", "it's", "$HOME"]
RUN <<EOF
set -e
echo "$APP"
EOF
USER user
EXPOSE 8080 9000-9001/tcp 53/udp
ENTRYPOINT ["python"]
CMD ["-m", "http.server"]
"#;
        insta::assert_debug_snapshot!(plan(text));
    }

    #[test]
    fn args_come_from_outside_too() {
        let text = "ARG TAG=1\nFROM x:$TAG\nARG TAG\nARG WHO=me\nRUN echo $TAG $WHO\n";
        let given = [("TAG".to_owned(), "2".to_owned())];
        let plan = read(text, &given).expect("a plan");
        assert_eq!(plan.image, "x:2");
        let run = "export TAG=2\nexport WHO=me\necho $TAG $WHO";
        assert_eq!(plan.steps[0].action, Action::Run(run.into()));
    }

    #[test]
    fn an_entrypoint_forgets_the_cmd_before_it() {
        let plan = plan("FROM x\nCMD a\nENTRYPOINT b c\n");
        assert_eq!(plan.cmd, None);
        let shell = ["/bin/sh", "-c", "b c"].map(str::to_owned);
        assert_eq!(plan.entrypoint.as_deref(), Some(&shell[..]));
    }

    #[test]
    fn windows_files_and_other_escapes() {
        let plan = plan("\u{feff}# escape=`\r\nFROM x\r\nRUN a `\r\n  b\r\n");
        assert_eq!(plan.steps[0].action, Action::Run("a   b".into()));
        assert_eq!(plan.steps[0].line, 3);
    }

    #[test]
    fn what_is_not_supported_is_named_with_its_line() {
        let files = [
            "",
            "# nothing\n",
            "RUN a\nFROM x\n",
            "FROM scratch\n",
            "FROM a AS b\nRUN c\n\nFROM d\n",
            "FROM --platform=linux/arm64 x\n",
            "FROM x:$NONE\n",
            "FROM x\nADD a b\n",
            "FROM x\nCOPY a\n",
            "FROM x\nCOPY --from=y a b\n",
            "FROM x\nCOPY --chmod=u+x a b\n",
            "FROM x\nCOPY --parents a b\n",
            "FROM x\nCOPY <<E /a\nb\nE\n",
            "FROM x\nRUN --mount=type=cache,target=/a b\n",
            "FROM x\nRUN\n",
            "FROM x\nRUN cat <<EOF > /a\nb\nEOF\n",
            "FROM x\nRUN <<EOF\nb\n",
            "FROM x\nRUN <<EOF\n#!/usr/bin/env python3\nEOF\n",
            "FROM x\nENV =1\n",
            "FROM x\nENV A='1\n",
            "FROM x\nCOPY $NONE /a\n",
            "FROM x\nEXPOSE web\n",
            "FROM x\nEXPOSE 70000\n",
            "FROM x\nHEALTHCHECK NONE\n",
            "FROM x\nONBUILD RUN a\n",
            "FROM x\nSHELL [\"a\"]\n",
            "FROM x\nSTOPSIGNAL 9\n",
            "FROM x\nVOLUME /a\n",
            "FROM x\n\nNONSENSE y\n",
        ];
        let said: Vec<String> = files
            .iter()
            .map(|file| format!("{file:?}\n  {}", problem(file)))
            .collect();
        insta::assert_snapshot!(said.join("\n"));
    }

    #[test]
    fn shifts_and_words_as_input_are_no_here_documents() {
        for line in ["echo $((1 << 2))", "cat <<< x", "echo a"] {
            assert_eq!(here_document_in(line), None, "{line}");
        }
        assert_eq!(here_document_in("cat <<-'EOF' > x"), Some("'EOF'"));
    }

    #[test]
    fn words_survive_the_shell() {
        for (word, line) in [
            ("a-b", "a-b"),
            ("", "''"),
            ("it's", r"'it'\''s'"),
            ("$A", "'$A'"),
        ] {
            assert_eq!(quoted(word), line);
        }
    }
}

//! `cubicle sandbox exec` and `shell`: a command in a sandbox, as if it ran here.

use std::{
    io::{IsTerminal as _, Write as _},
    process::ExitCode,
};

use rustix::termios::{self, OptionalActions, Termios};
use tokio::{
    io::AsyncReadExt as _,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use crate::{
    client::{
        Client, SandboxRef,
        envd::{Command, Event},
    },
    error::Error,
};

/// Exit code of a command that a signal ended, as shells count: 128 + signal. envd reports -1 and
/// names the signal in its status.
fn exit_code(code: i32, status: &str) -> u8 {
    if code >= 0 {
        return u8::try_from(code).unwrap_or(u8::MAX);
    }
    match status.rsplit(": ").next() {
        Some("terminated") => 143,
        Some("interrupt") => 130,
        Some("segmentation fault") => 139,
        Some("aborted") => 134,
        _ => 137,
    }
}

/// The command to start: a single word is a line for bash, more are a program and its arguments.
pub(crate) fn command_line(words: Vec<String>) -> (String, Vec<String>) {
    let mut words = words.into_iter();
    let first = words.next().unwrap_or_default();
    let rest: Vec<String> = words.collect();
    if rest.is_empty() {
        (
            "/bin/bash".to_owned(),
            vec!["-l".to_owned(), "-c".to_owned(), first],
        )
    } else {
        (first, rest)
    }
}

/// Runs a command and passes its output and its exit code on.
pub(crate) async fn exec(
    client: &Client,
    sandbox: &SandboxRef,
    command: Command,
) -> Result<ExitCode, Error> {
    let mut events = client.start(sandbox, &command).await?;
    let mut interrupts = signal(SignalKind::interrupt()).map_err(Error::Terminal)?;
    let mut pid = None;
    let mut input = command.stdin.then(read_input);
    loop {
        tokio::select! {
            event = events.next() => match event? {
                Some(Event::Started { pid: started }) => pid = Some(started),
                Some(Event::Stdout(bytes)) => write(std::io::stdout(), &bytes)?,
                Some(Event::Stderr(bytes)) => write(std::io::stderr(), &bytes)?,
                Some(Event::Ended { code, status }) => {
                    return Ok(ExitCode::from(exit_code(code, &status)));
                }
                None => return Err(Error::Usage("the sandbox went away during the command".into())),
            },
            // Without a terminal there is nobody to turn ^C into a signal, so it ends the command.
            _ = interrupts.recv() => if let Some(pid) = pid {
                client.signal_kill(sandbox, pid).await?;
            },
            bytes = next_input(&mut input), if pid.is_some() => {
                let pid = pid.unwrap_or_default();
                match bytes {
                    Some(bytes) => client.input(sandbox, pid, false, &bytes).await?,
                    None => {
                        input = None;
                        client.close_input(sandbox, pid).await?;
                    }
                }
            }
        }
    }
}

/// Opens a terminal: ours in raw mode, theirs of the same size.
pub(crate) async fn shell(client: &Client, sandbox: &SandboxRef) -> Result<ExitCode, Error> {
    if !std::io::stdin().is_terminal() || !std::io::stdout().is_terminal() {
        return Err(Error::Usage(
            "`sandbox shell` needs a terminal; use `sandbox exec -i` in a pipe".to_owned(),
        ));
    }
    let term = std::env::var("TERM").unwrap_or_else(|_| "xterm-256color".to_owned());
    let command = Command {
        program: "/bin/bash".to_owned(),
        args: vec!["-i".to_owned(), "-l".to_owned()],
        env: vec![
            ("TERM".to_owned(), term),
            ("LANG".to_owned(), "C.UTF-8".to_owned()),
            ("LC_ALL".to_owned(), "C.UTF-8".to_owned()),
        ],
        terminal: Some(window_size()?),
        ..Command::default()
    };
    let mut events = client.start(sandbox, &command).await?;
    let mut resizes = signal(SignalKind::window_change()).map_err(Error::Terminal)?;
    let raw = RawMode::enter()?;
    let mut input = Some(read_input());
    let mut pid = None;
    let code = loop {
        tokio::select! {
            event = events.next() => match event? {
                Some(Event::Started { pid: started }) => pid = Some(started),
                Some(Event::Stdout(bytes) | Event::Stderr(bytes)) => {
                    write(std::io::stdout(), &bytes)?;
                }
                Some(Event::Ended { code, status }) => break exit_code(code, &status),
                None => break 1,
            },
            _ = resizes.recv() => if let Some(pid) = pid {
                client.resize(sandbox, pid, window_size()?).await?;
            },
            bytes = next_input(&mut input), if pid.is_some() => match bytes {
                Some(bytes) => client.input(sandbox, pid.unwrap_or_default(), true, &bytes).await?,
                None => input = None,
            },
        }
    };
    drop(raw);
    Ok(ExitCode::from(code))
}

fn write(mut to: impl std::io::Write, bytes: &[u8]) -> Result<(), Error> {
    to.write_all(bytes)
        .and_then(|()| to.flush())
        .map_err(Error::Terminal)
}

/// Our standard input, read on a thread of the runtime's: it cannot be waited for otherwise.
fn read_input() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(4);
    tokio::spawn(async move {
        let mut stdin = tokio::io::stdin();
        let mut buffer = vec![0; 32 * 1024];
        while let Ok(length @ 1..) = stdin.read(&mut buffer).await {
            if sender.send(buffer[..length].to_vec()).await.is_err() {
                return;
            }
        }
    });
    receiver
}

async fn next_input(input: &mut Option<mpsc::Receiver<Vec<u8>>>) -> Option<Vec<u8>> {
    match input {
        Some(input) => input.recv().await,
        None => std::future::pending().await,
    }
}

fn window_size() -> Result<(u16, u16), Error> {
    let size = termios::tcgetwinsize(std::io::stdout()).map_err(|e| Error::Terminal(e.into()))?;
    Ok((size.ws_col.max(1), size.ws_row.max(1)))
}

/// Our terminal without line editing and echo, for as long as this lives.
struct RawMode(Termios);

impl RawMode {
    fn enter() -> Result<Self, Error> {
        let stdin = std::io::stdin();
        let before = termios::tcgetattr(&stdin).map_err(|e| Error::Terminal(e.into()))?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(&stdin, OptionalActions::Now, &raw)
            .map_err(|e| Error::Terminal(e.into()))?;
        Ok(Self(before))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // Nothing better can be done about a terminal that refuses its own old settings.
        let _ = termios::tcsetattr(std::io::stdin(), OptionalActions::Now, &self.0);
        let _ = std::io::stdout().flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_word_is_a_line_for_bash() {
        let words = |text: &[&str]| text.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        assert_eq!(
            command_line(words(&["ls | wc"])),
            ("/bin/bash".into(), words(&["-l", "-c", "ls | wc"]))
        );
        assert_eq!(
            command_line(words(&["ls", "-l"])),
            ("ls".into(), words(&["-l"]))
        );
    }

    #[test]
    fn signals_count_from_128() {
        assert_eq!(exit_code(0, "exit status 0"), 0);
        assert_eq!(exit_code(127, "exit status 127"), 127);
        assert_eq!(exit_code(-1, "signal: killed"), 137);
        assert_eq!(exit_code(-1, "signal: terminated"), 143);
    }
}

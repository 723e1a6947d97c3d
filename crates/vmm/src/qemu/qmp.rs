//! Client of QEMU's monitor protocol (QMP): JSON lines over a unix socket.
//!
//! Commands are written in batches, so that several cost one round trip; answers are matched by
//! id; events go to whoever subscribed. The connection may be made before QEMU runs: its greeting
//! then tells that QEMU is ready, and no one has to poll.

use std::{
    collections::HashMap,
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::BorrowedFd,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader, Interest},
    net::{UnixStream, unix::OwnedReadHalf, unix::OwnedWriteHalf},
    sync::{broadcast, oneshot},
    task::JoinHandle,
};

/// Longest line that is read; QEMU's answers to our commands are below 1 KiB.
const MAX_LINE: u64 = 1 << 20;

/// Events kept for a subscriber that is not looking; a launch sees fewer than ten.
const EVENT_BACKLOG: usize = 64;

/// A command and its arguments.
#[derive(Debug, Clone)]
pub(crate) struct Command {
    pub(crate) name: &'static str,
    pub(crate) arguments: Value,
}

impl Command {
    pub(crate) fn new(name: &'static str, arguments: Value) -> Self {
        Self { name, arguments }
    }

    pub(crate) fn plain(name: &'static str) -> Self {
        Self::new(name, json!({}))
    }
}

/// What QEMU tells unasked, as far as anybody here listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// The guest's CPUs run.
    Resume,
    /// The guest's CPUs are stopped.
    Stop,
    /// The state of an incoming migration: `setup`, `active`, `completed`, `failed`.
    Migration(String),
    /// Something else.
    Other(String),
}

/// Why a command did not succeed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The connection ended: QEMU is gone.
    #[error("the connection ended")]
    Closed,
    /// QEMU refused.
    #[error("{command}: {reason}")]
    Refused {
        command: &'static str,
        reason: String,
    },
    /// The socket failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// An answer did not have the form that the protocol promises.
    #[error("{0}")]
    Malformed(String),
}

/// One of QEMU's messages.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Message {
    Greeting {
        #[serde(rename = "QMP")]
        _version: serde::de::IgnoredAny,
    },
    Event {
        event: String,
        #[serde(default)]
        data: Value,
    },
    Return {
        #[serde(rename = "return")]
        value: Value,
        id: u64,
    },
    Error {
        error: Refusal,
        id: Option<u64>,
    },
}

#[derive(Debug, Deserialize)]
struct Refusal {
    desc: String,
}

type Answer = Result<Value, String>;

#[derive(Debug, Default)]
struct Pending {
    next_id: u64,
    waiting: HashMap<u64, oneshot::Sender<Answer>>,
    greeting: Option<oneshot::Sender<()>>,
    closed: bool,
}

/// A connection to QEMU's monitor.
#[derive(Debug)]
pub(crate) struct Qmp {
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    pending: Arc<Mutex<Pending>>,
    events: broadcast::Sender<Event>,
    reader: JoinHandle<()>,
}

impl Drop for Qmp {
    fn drop(&mut self) {
        // The reader holds half of the socket; QEMU serves the next connection when it is closed.
        self.reader.abort();
    }
}

impl Qmp {
    /// Connects to a monitor socket that may not be served yet. The receiver resolves with
    /// QEMU's greeting.
    pub(crate) async fn connect(path: &Path) -> io::Result<(Self, oneshot::Receiver<()>)> {
        let stream = UnixStream::connect(path).await?;
        Ok(Self::over(stream))
    }

    /// As [`Qmp::connect`], over a connection made already.
    pub(crate) fn over(stream: UnixStream) -> (Self, oneshot::Receiver<()>) {
        let (read, write) = stream.into_split();
        let (greeting, greeted) = oneshot::channel();
        let pending = Pending {
            greeting: Some(greeting),
            ..Pending::default()
        };
        let pending = Arc::new(Mutex::new(pending));
        let (events, _) = broadcast::channel(EVENT_BACKLOG);
        let reader = tokio::spawn(read_messages(read, Arc::clone(&pending), events.clone()));
        (
            Self {
                writer: tokio::sync::Mutex::new(write),
                pending,
                events,
                reader,
            },
            greeted,
        )
    }

    /// Events from now on.
    pub(crate) fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Sends commands in one piece and waits for all answers. QEMU executes them in order, each
    /// whether or not the one before succeeded; the first refusal is the error.
    pub(crate) async fn execute(&self, commands: &[Command]) -> Result<Vec<Value>, Failure> {
        self.execute_with_fd(commands, None).await
    }

    /// As [`Qmp::execute`], handing over a descriptor for the first command to take.
    pub(crate) async fn execute_with_fd(
        &self,
        commands: &[Command],
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Vec<Value>, Failure> {
        let mut text = Vec::new();
        let mut answers = Vec::with_capacity(commands.len());
        {
            let mut pending = lock(&self.pending);
            if pending.closed {
                return Err(Failure::Closed);
            }
            for Command { name, arguments } in commands {
                let id = pending.next_id;
                pending.next_id += 1;
                let (sender, receiver) = oneshot::channel();
                pending.waiting.insert(id, sender);
                answers.push((*name, receiver));
                let message = json!({ "execute": name, "arguments": arguments, "id": id });
                text.extend_from_slice(message.to_string().as_bytes());
                text.push(b'\n');
            }
        }
        self.send(&text, fd).await?;
        let mut values = Vec::with_capacity(answers.len());
        let mut refused = None;
        for (command, answer) in answers {
            match answer.await {
                Ok(Ok(value)) => values.push(value),
                Ok(Err(reason)) => {
                    refused.get_or_insert(Failure::Refused { command, reason });
                }
                Err(_) => return Err(Failure::Closed),
            }
        }
        refused.map_or(Ok(values), Err)
    }

    async fn send(&self, mut text: &[u8], mut fd: Option<BorrowedFd<'_>>) -> Result<(), Failure> {
        // One writer at a time, or two batches could interleave.
        let writer = self.writer.lock().await;
        let stream: &UnixStream = writer.as_ref();
        while !text.is_empty() {
            stream.writable().await?;
            let sent = stream.try_io(Interest::WRITABLE, || send_once(stream, text, fd));
            match sent {
                Ok(sent) => {
                    text = &text[sent..];
                    fd = None;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                    return Err(Failure::Closed);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

fn send_once(stream: &UnixStream, text: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("no room for a descriptor"));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    Ok(sendmsg(stream, &[IoSlice::new(text)], &mut control, flags)?)
}

fn lock(pending: &Mutex<Pending>) -> std::sync::MutexGuard<'_, Pending> {
    // Nothing panics while holding it; if something did, the table would still be whole.
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn read_messages(
    read: OwnedReadHalf,
    pending: Arc<Mutex<Pending>>,
    events: broadcast::Sender<Event>,
) {
    let mut read = BufReader::new(read);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut read)
            .take(MAX_LINE)
            .read_until(b'\n', &mut line)
            .await
        {
            Ok(0) | Err(_) => break,
            Ok(_) if line.last() != Some(&b'\n') => break,
            Ok(_) => {}
        }
        let Ok(message) = serde_json::from_slice::<Message>(&line) else {
            tracing::warn!(line = %String::from_utf8_lossy(&line), "unexpected message of QEMU");
            continue;
        };
        dispatch(message, &pending, &events);
    }
    let mut pending = lock(&pending);
    pending.closed = true;
    // Dropping the senders tells everyone who waits.
    pending.waiting.clear();
    pending.greeting = None;
}

fn dispatch(message: Message, pending: &Mutex<Pending>, events: &broadcast::Sender<Event>) {
    match message {
        Message::Greeting { .. } => {
            if let Some(greeting) = lock(pending).greeting.take() {
                let _ = greeting.send(());
            }
        }
        Message::Event { event, data } => {
            let status = || data["status"].as_str().unwrap_or_default().to_owned();
            // Nobody listening is no error.
            let _ = events.send(match event.as_str() {
                "RESUME" => Event::Resume,
                "STOP" => Event::Stop,
                "MIGRATION" => Event::Migration(status()),
                _ => Event::Other(event),
            });
        }
        Message::Return { value, id } => answer(pending, id, Ok(value)),
        Message::Error {
            error,
            id: Some(id),
        } => answer(pending, id, Err(error.desc)),
        Message::Error { error, id: None } => {
            tracing::warn!(
                error = error.desc,
                "QEMU refused something that was no command"
            );
        }
    }
}

fn answer(pending: &Mutex<Pending>, id: u64, answer: Answer) {
    // Whoever asked may have given up.
    if let Some(waiting) = lock(pending).waiting.remove(&id) {
        let _ = waiting.send(answer);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::fd::AsFd as _;

    use tokio::io::AsyncWriteExt as _;

    use super::*;

    async fn read_command(server: &mut BufReader<UnixStream>) -> Value {
        let mut line = String::new();
        server.read_line(&mut line).await.unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn pair() -> (Qmp, oneshot::Receiver<()>, BufReader<UnixStream>) {
        let (client, server) = UnixStream::pair().unwrap();
        let (qmp, greeted) = Qmp::over(client);
        (qmp, greeted, BufReader::new(server))
    }

    #[tokio::test]
    async fn answers_find_their_command_whatever_comes_between() {
        let (qmp, greeted, mut server) = pair();
        let mut events = qmp.events();
        let served = tokio::spawn(async move {
            server
                .write_all(b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n")
                .await
                .unwrap();
            let first = read_command(&mut server).await;
            let second = read_command(&mut server).await;
            assert_eq!(first["execute"], "stop");
            assert_eq!(second["arguments"]["n"], 2);
            let event = "{\"event\": \"MIGRATION\", \"data\": {\"status\": \"completed\"}, \
                         \"timestamp\": {\"seconds\": 1, \"microseconds\": 2}}\n";
            let answers = format!(
                "{{\"return\": 2, \"id\": {}}}\nnot json\n{event}{{\"return\": {{}}, \"id\": {}}}\n",
                second["id"], first["id"]
            );
            server.write_all(answers.as_bytes()).await.unwrap();
            server
        });
        let commands = [
            Command::plain("stop"),
            Command::new("query", json!({ "n": 2 })),
        ];
        let answers = qmp.execute(&commands).await.unwrap();
        assert_eq!(answers, [json!({}), json!(2)]);
        greeted.await.unwrap();
        assert_eq!(
            events.recv().await.unwrap(),
            Event::Migration("completed".to_owned())
        );
        served.await.unwrap();
    }

    #[tokio::test]
    async fn a_refusal_names_the_command_and_later_answers_are_taken() {
        let (qmp, _greeted, mut server) = pair();
        let served = tokio::spawn(async move {
            for _ in 0..2 {
                let command = read_command(&mut server).await;
                let id = &command["id"];
                let answer = if command["execute"] == "bad" {
                    format!(
                        "{{\"error\": {{\"class\": \"GenericError\", \"desc\": \"no\"}}, \"id\": {id}}}\n"
                    )
                } else {
                    format!("{{\"return\": {{}}, \"id\": {id}}}\n")
                };
                server.write_all(answer.as_bytes()).await.unwrap();
            }
            server
        });
        let commands = [Command::plain("bad"), Command::plain("good")];
        let error = qmp.execute(&commands).await.unwrap_err();
        assert_eq!(error.to_string(), "bad: no");
        assert!(lock(&qmp.pending).waiting.is_empty());
        served.await.unwrap();
    }

    #[tokio::test]
    async fn the_end_of_the_connection_ends_every_wait() {
        let (qmp, greeted, server) = pair();
        let waiting = async { qmp.execute(&[Command::plain("stop")]).await };
        let (result, ()) = tokio::join!(waiting, async { drop(server) });
        assert!(matches!(result, Err(Failure::Closed)), "{result:?}");
        assert!(greeted.await.is_err());
        let later = qmp.execute(&[Command::plain("stop")]).await;
        assert!(matches!(later, Err(Failure::Closed)), "{later:?}");
    }

    #[tokio::test]
    async fn a_descriptor_travels_with_the_first_command() {
        let (client, server) = UnixStream::pair().unwrap();
        let (qmp, _greeted) = Qmp::over(client);
        let file = tempfile::tempfile().unwrap();
        let commands = [Command::plain("add-fd")];
        let send = qmp.execute_with_fd(&commands, Some(file.as_fd()));
        let receive = async {
            server.readable().await.unwrap();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = rustix::net::RecvAncillaryBuffer::new(&mut space);
            let mut buffer = [0; 512];
            let mut slices = [io::IoSliceMut::new(&mut buffer)];
            let flags = rustix::net::RecvFlags::CMSG_CLOEXEC;
            rustix::net::recvmsg(&server, &mut slices, &mut control, flags).unwrap();
            let received = control.drain().any(|message| match message {
                rustix::net::RecvAncillaryMessage::ScmRights(mut fds) => fds.next().is_some(),
                _ => false,
            });
            drop(server);
            received
        };
        let (_, received) = tokio::join!(send, receive);
        assert!(received);
    }
}

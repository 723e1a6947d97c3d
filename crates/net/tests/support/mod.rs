//! A world to try slots in, made of network namespaces only: a host, an internet on the other
//! side of the host's uplink, and guests with a network stack of their own, each at the other end
//! of a slot's tap. Nothing leaves these namespaces.
//!
//! Needs root, `ip`, `nft` and `conntrack`.

#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(unreachable_pub, reason = "this is a module of each test program")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a broken world ends the test"
)]

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    process::Command,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use cubicle_net::{Counts, PoolConfig, Slot, SlotPool};
use rustix::{
    event::{PollFd, PollFlags, poll},
    mount::{UnmountFlags, unmount},
    net::{AddressFamily, SocketType, ipproto},
    thread::{LinkNameSpaceType, UnshareFlags, gettid, move_into_link_name_space, unshare_unsafe},
};
use tempfile::TempDir;

/// The host's address on its uplink.
pub const HOST: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// A machine on the internet.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// Another one.
pub const OTHER_SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
/// Addresses beyond the uplink that no guest may reach.
pub const FORBIDDEN: [Ipv4Addr; 5] = [
    Ipv4Addr::new(10, 1, 2, 3),
    Ipv4Addr::new(172, 16, 5, 5),
    Ipv4Addr::new(192, 168, 7, 7),
    Ipv4Addr::new(100, 64, 0, 9),
    Ipv4Addr::new(169, 254, 169, 254),
];
/// How long an answer that will come is waited for.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// How long an answer that must not come is waited for.
pub const SILENCE: Duration = Duration::from_millis(400);

/// What can be sent to a thread to be done there.
type Job = Box<dyn FnOnce() + Send>;

/// A network namespace with a thread in it.
pub struct Space {
    jobs: mpsc::Sender<Job>,
    /// Where the namespace is found as long as this exists.
    pub path: PathBuf,
}

impl Space {
    /// A new namespace.
    pub fn new() -> Self {
        Self::with(|| {
            // SAFETY: this thread does nothing else.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("root is needed");
            ip("link set lo up");
            fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
            fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0").unwrap();
            fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
        })
    }

    /// An existing namespace.
    pub fn of(namespace: OwnedFd) -> Self {
        Self::with(move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        })
    }

    fn with(enter: impl FnOnce() + Send + 'static) -> Self {
        let (jobs, todo) = mpsc::channel::<Job>();
        let (found, path) = mpsc::channel();
        thread::spawn(move || {
            enter();
            let tid = gettid().as_raw_nonzero();
            found
                .send(format!("/proc/{}/task/{tid}/ns/net", std::process::id()))
                .unwrap();
            todo.into_iter().for_each(|job| job());
        });
        Self {
            jobs,
            path: path.recv().expect("the namespace").into(),
        }
    }

    /// Runs `work` in the namespace and returns its result; panics if it does.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        self.jobs
            .send(Box::new(move || done.send(work()).unwrap()))
            .unwrap();
        result.recv().expect("the work in the namespace panicked")
    }

    /// Starts `work` in the namespace without waiting.
    pub fn start<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> mpsc::Receiver<T> {
        let (done, result) = mpsc::channel();
        self.jobs
            .send(Box::new(move || done.send(work()).unwrap_or(())))
            .unwrap();
        result
    }
}

/// Runs a program in the calling thread's namespace and returns what it prints.
pub fn sh(program: &str, arguments: &str) -> String {
    let run = Command::new(program)
        .args(arguments.split_whitespace())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{program} {arguments}: {said}");
    String::from_utf8(run.stdout).unwrap()
}

/// Runs `ip` in the calling thread's namespace.
pub fn ip(arguments: &str) -> String {
    sh("ip", arguments)
}

/// What a test gets.
pub struct World {
    pub internet: Space,
    pub dir: TempDir,
}

impl World {
    /// A configuration for a pool of this world.
    pub fn config(&self) -> PoolConfig {
        PoolConfig {
            run_dir: self.dir.path().to_owned(),
            size_min: 2,
            size_max: 8,
            ..PoolConfig::default()
        }
    }

    /// A pool and one slot of it with a guest.
    pub async fn guest(&self, config: PoolConfig) -> (SlotPool, Slot, Guest) {
        let (pool, _) = SlotPool::open(config).await.unwrap();
        let mut slot = pool.acquire().await.unwrap();
        let guest = Guest::attach(&mut slot);
        (pool, slot, guest)
    }
}

impl Drop for World {
    /// Tests end anywhere, by panic too: the namespaces that are kept alive by a mount would stay.
    fn drop(&mut self) {
        let here = self.dir.path().to_owned();
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        for at in mounts.lines().filter_map(|line| line.split(' ').nth(1)) {
            if Path::new(at).starts_with(&here) {
                let _ = unmount(at, UnmountFlags::DETACH);
            }
        }
    }
}

/// Runs a test in the host's namespace of a new world.
pub fn in_world<F>(test: impl FnOnce(World) -> F + Send + 'static)
where
    F: Future<Output = ()>,
{
    let host = Space::new();
    host.run(move || {
        let internet = Space::new();
        let path = internet.path.display();
        ip(&format!(
            "link add wan type veth peer name eth0 netns {path}"
        ));
        ip(&format!("addr add {HOST}/24 dev wan"));
        ip("link set wan up");
        ip(&format!("route add default via {SERVER}"));
        internet.run(|| {
            ip(&format!("addr add {SERVER}/24 dev eth0"));
            ip("link set eth0 up");
            for address in FORBIDDEN.iter().chain(&[OTHER_SERVER]) {
                ip(&format!("addr add {address}/32 dev lo"));
            }
        });
        let world = World {
            internet,
            dir: tempfile::tempdir().unwrap(),
        };
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(test(world));
    });
}

/// A machine with a network stack of its own at the other end of a slot's tap.
pub struct Guest {
    pub space: Space,
    /// The slot's tap, to put frames of any kind on.
    wire: OwnedFd,
    unplug: Option<io::PipeWriter>,
    cable: Option<thread::JoinHandle<()>>,
}

impl Guest {
    /// Takes the slot's tap and plugs a guest in, configured as guests are.
    pub fn attach(slot: &mut Slot) -> Self {
        Self::plug(slot.take_tap().expect("a tap"))
    }

    pub fn plug(tap: OwnedFd) -> Self {
        let space = Space::new();
        let own = space.run(|| {
            let own = open_tap("eth0");
            ip("link set eth0 address 02:cb:1c:1e:00:21 up");
            ip("addr add 169.254.0.21/30 dev eth0");
            ip("route add default via 169.254.0.22");
            own
        });
        let wire = tap.try_clone().unwrap();
        let (end, unplug) = io::pipe().unwrap();
        let cable = thread::spawn(move || carry(&tap, &own, &end));
        Self {
            space,
            wire,
            unplug: Some(unplug),
            cable: Some(cable),
        }
    }

    /// Puts a frame on the wire as if the guest's hardware had.
    pub fn inject(&self, frame: &[u8]) {
        let with_header = [&[0; 10][..], frame].concat();
        let written = rustix::io::write(&self.wire, &with_header).unwrap();
        assert_eq!(written, with_header.len());
    }

    /// What connecting gives: the connection and who the server says we are.
    pub fn connect(&self, to: Ipv4Addr, port: u16) -> io::Result<(TcpStream, Ipv4Addr)> {
        self.space.run(move || connect(to, port, PATIENCE))
    }

    /// Whether a server answers to a connection, or why not.
    pub fn reaches(&self, to: Ipv4Addr, port: u16) -> io::Result<()> {
        self.connect(to, port).map(drop)
    }

    /// Sends a datagram and returns the answer.
    pub fn ask(&self, to: Ipv4Addr, port: u16, text: &'static str) -> io::Result<String> {
        self.space.run(move || ask(to, port, text, PATIENCE))
    }

    /// Whether an echo request is answered.
    pub fn pings(&self, to: Ipv4Addr) -> io::Result<()> {
        self.space.run(move || ping(to, PATIENCE))
    }

    /// Asserts that neither a connection nor a datagram is answered.
    pub fn hears_nothing_from(&self, to: Ipv4Addr, port: u16) {
        self.space.run(move || hears_nothing_from(to, port));
    }

    /// Asserts that an echo request is not answered.
    pub fn hears_no_echo_from(&self, to: Ipv4Addr) {
        self.space.run(move || assert_silence(&ping(to, SILENCE)));
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        drop(self.unplug.take());
        if let Some(cable) = self.cable.take() {
            cable.join().unwrap();
        }
    }
}

/// Carries frames between two taps until the third descriptor closes.
fn carry(left: &OwnedFd, right: &OwnedFd, end: &io::PipeReader) {
    let mut frame = vec![0; 70_000];
    loop {
        let mut ready = [
            PollFd::new(left, PollFlags::IN),
            PollFd::new(right, PollFlags::IN),
            PollFd::new(end, PollFlags::IN),
        ];
        poll(&mut ready, None).unwrap();
        if !ready[2].revents().is_empty() {
            return;
        }
        for (side, from, to) in [(0, left, right), (1, right, left)] {
            if !ready[side].revents().is_empty()
                && let Ok(length) = rustix::io::read(from, &mut frame[..])
            {
                // A frame that does not fit is lost, as on any wire.
                let _ = rustix::io::write(to, &frame[..length]);
            }
        }
    }
}

fn open_tap(name: &str) -> OwnedFd {
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    // SAFETY: all zeroes are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the descriptor is open and the request lives until the call returns.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
    file.into()
}

/// Starts a server in the calling thread's namespace that tells each client its address and then
/// echoes.
pub fn serve(address: Ipv4Addr, port: u16) {
    let listener = TcpListener::bind((address, port)).unwrap();
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut client = client;
                let SocketAddr::V4(peer) = client.peer_addr()? else {
                    return Ok(());
                };
                client.write_all(&peer.ip().octets())?;
                io::copy(&mut client.try_clone()?, &mut client).map(drop)
            });
        }
    });
    let socket = UdpSocket::bind((address, port)).unwrap();
    thread::spawn(move || {
        let mut datagram = [0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut datagram) {
            let _ = socket.send_to(&datagram[..length], from);
        }
    });
}

pub fn connect(to: Ipv4Addr, port: u16, patience: Duration) -> io::Result<(TcpStream, Ipv4Addr)> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((to, port)), patience)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    let mut me = [0; 4];
    stream.read_exact(&mut me)?;
    Ok((stream, me.into()))
}

pub fn ask(to: Ipv4Addr, port: u16, text: &'static str, patience: Duration) -> io::Result<String> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_read_timeout(Some(patience))?;
    socket.connect((to, port))?;
    socket.send(text.as_bytes())?;
    let mut answer = [0; 2048];
    let length = socket.recv(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
}

pub fn ping(to: Ipv4Addr, patience: Duration) -> io::Result<()> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, Some(ipproto::ICMP))?;
    // The kernel fills in identifier and checksum of such a socket's requests.
    let socket = UdpSocket::from(socket);
    socket.set_read_timeout(Some(patience))?;
    socket.connect((to, 1))?;
    socket.send(&[8, 0, 0, 0, 0, 0, 0, 1, b'h', b'i'])?;
    let mut answer = [0; 64];
    let length = socket.recv(&mut answer)?;
    assert_eq!((answer[0], &answer[8..length]), (0, &b"hi"[..]));
    Ok(())
}

/// Asserts that neither a connection nor a datagram from the calling thread's namespace is
/// answered.
pub fn hears_nothing_from(to: Ipv4Addr, port: u16) {
    assert_silence(&connect(to, port, SILENCE));
    assert_silence(&ask(to, port, "x", SILENCE));
}

/// Asserts that the kernel said at once that something is not reachable.
pub fn assert_refused(outcome: &io::Result<impl Sized>) {
    match outcome {
        Ok(_) => panic!("reached what must not be reachable"),
        Err(error) => {
            assert_eq!(error.kind(), io::ErrorKind::HostUnreachable, "{error}");
        }
    }
}

/// Asserts that there was no answer.
pub fn assert_silence(outcome: &io::Result<impl Sized>) {
    match outcome {
        Ok(_) => panic!("reached what must not be reachable"),
        Err(error) => {
            let kinds = [io::ErrorKind::TimedOut, io::ErrorKind::WouldBlock];
            assert!(kinds.contains(&error.kind()), "{error}");
        }
    }
}

/// What slots consist of, counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inventory {
    pub links: Vec<String>,
    pub tables: Vec<String>,
    pub mounts: usize,
    pub files: Vec<String>,
    pub descriptors: usize,
    pub threads: usize,
    pub connections: usize,
}

impl Inventory {
    pub fn take(dir: &Path) -> Self {
        let lines = |text: String| text.lines().map(str::to_owned).collect::<Vec<_>>();
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let here = dir.to_str().unwrap();
        let netns = dir.join("netns");
        let files = fs::read_dir(netns).map_or_else(
            |_| Vec::new(),
            |files| {
                files
                    .map(|f| f.unwrap().file_name().into_string().unwrap())
                    .collect()
            },
        );
        Self {
            links: lines(ip("-o link"))
                .iter()
                .map(|line| line.split(':').nth(1).unwrap().trim().to_owned())
                .collect(),
            tables: lines(sh("nft", "list tables")),
            mounts: mounts.lines().filter(|line| line.contains(here)).count(),
            files,
            descriptors: fs::read_dir("/proc/self/fd").unwrap().count(),
            threads: fs::read_dir("/proc/self/task").unwrap().count(),
            connections: lines(sh("conntrack", "-L")).len(),
        }
    }
}

/// Waits until background work has brought the pool to a state.
pub async fn until(pool: &SlotPool, wanted: impl Fn(Counts) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !wanted(pool.counts()) {
        assert!(Instant::now() < deadline, "{:?}", pool.counts());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

//! A relay that stands still, written down for the program that goes on with it.
//!
//! The process executes another program in its own place ([`Link::stop`]): descriptors keep their numbers, and the kernel's
//! numbers of calls that wait are good for as long as somebody holds the listener. So the table of sockets is all that must
//! be written: what each of them has in both directions, and what it was told of its ends. Readiness is asked for anew; what
//! stands here of it is a hint, as ever.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Instant;

use netkernel_agent::notify::Notification;
use netkernel_service::{Close, Errno, Handle, SocketAddress, Stack, TcpCounts, take_descriptor};
use serde::{Deserialize, Serialize};

use crate::bulk::Piped;
use crate::relay::{Link, Relay, Request, Start, Stop, Waiting};
use crate::socket::{Buffer, Held, Socket, State};

/// Changes with what the fields mean.
pub const FORMAT: u32 = 2;
/// struct linger.
const LINGER: usize = 8;

/// A relay that was asked to stand still.
pub struct Stopping {
    pub(crate) answered: Receiver<Result<Left, String>>,
    pub(crate) go_on: Sender<()>,
}

/// A relay that stands still until this is dropped.
pub struct Still {
    pub left: Left,
    go_on: Sender<()>,
}

impl Still {
    /// Another one goes on with copies of all that it left: this one closes its own and ends, and nobody notices.
    pub fn end(self) {
        let _ = self.go_on.send(());
    }
}

/// What a relay left. Its descriptors are the relay's own, by number.
pub struct Left {
    /// For [`Relay::resume`].
    pub memory: OwnedFd,
    pub descriptors: Vec<RawFd>,
    /// How many of its sockets are known to their stack only, which must go on, too.
    pub bound: usize,
}

impl Stopping {
    /// `Ok(None)`: the relay is over. Errors say why its sockets cannot go on; it does then.
    pub fn wait(self, until: Instant) -> Result<Option<Still>, String> {
        match self.answered.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(left) => Ok(Some(Still { left: left?, go_on: self.go_on })),
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => Err("its relay does not stop".into()),
        }
    }
}

/// In the memory: how many descriptors, these, the length of the table, the table, payload.
#[derive(Debug, Serialize, Deserialize)]
struct Table {
    generation: u32,
    sockets: Vec<Entry>,
    waiting: Vec<Call>,
    over: Vec<(u32, u32)>,
    over_since_ns: Option<u64>,
    processes: Vec<u32>,
    /// Served, refused, let through.
    counts: [u64; 3],
}

/// A call that waits. Its number stays good.
#[derive(Debug, Serialize, Deserialize)]
struct Call {
    call: Notification,
    socket: u32,
    generation: u32,
    deadline_ns: u64,
    late: i32,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    id: u32,
    generation: u32,
    /// The stack's descriptor; -1: the stack knows it by its key.
    stack: RawFd,
    /// There is a socket of the stack.
    has_stack: bool,
    end: Option<RawFd>,
    inode: u64,
    /// Calls find it by its inode.
    known: bool,
    domain: i32,
    kind: i32,
    holder: (u32, u32),
    state: State,
    tcp: Option<[u32; 3]>,
    tcp_at: u64,
    error: Option<i32>,
    broken: Option<i32>,
    up: Bytes,
    down: Bytes,
    up_datagram: Option<Run>,
    down_datagram: Option<(Run, Option<RawFd>)>,
    down_urgent: Option<u8>,
    flags: u32,
    tokens: usize,
    returned: Vec<(u32, Vec<u8>)>,
    waiters: Vec<u32>,
    bytes: (u64, u64),
    counted: (u64, u64),
    /// If the stack keeps one.
    linger: Option<[u8; LINGER]>,
}

/// Where bytes stand in the payload, and how many.
type Run = (usize, usize);

#[derive(Debug, Serialize, Deserialize)]
enum Bytes {
    Here(Run),
    /// Reader, writer, and bytes in the pipe.
    Pipe(RawFd, RawFd, usize),
}

/// What a socket knows of its ends.
fn flags(socket: &mut Socket) -> [&mut bool; 22] {
    [
        &mut socket.end_readable,
        &mut socket.end_writable,
        &mut socket.wants_room,
        &mut socket.stack_readable,
        &mut socket.stack_writable,
        &mut socket.stack_error,
        &mut socket.end_urgent,
        &mut socket.stack_urgent,
        &mut socket.up_urgent,
        &mut socket.up_bulk,
        &mut socket.down_bulk,
        &mut socket.tuned,
        &mut socket.end_ended,
        &mut socket.end_hung_up,
        &mut socket.up_ended,
        &mut socket.up_shut,
        &mut socket.down_ended,
        &mut socket.down_closed,
        &mut socket.shut_read,
        &mut socket.shut_write,
        &mut socket.abort,
        &mut socket.unreported,
    ]
}

/// Collects descriptors and payload.
#[derive(Default)]
struct Writer {
    descriptors: Vec<RawFd>,
    payload: Vec<u8>,
}

impl Writer {
    fn note(&mut self, fd: &OwnedFd) -> RawFd {
        self.descriptors.push(fd.as_raw_fd());
        fd.as_raw_fd()
    }

    fn bytes(&mut self, bytes: &[u8]) -> Run {
        let at = self.payload.len();
        self.payload.extend_from_slice(bytes);
        (at, bytes.len())
    }

    fn buffer(&mut self, buffer: &mut Buffer) -> Bytes {
        match &buffer.piped {
            Some(piped) => {
                let (reader, writer, left) = piped.parts();
                Bytes::Pipe(self.note(reader), self.note(writer), left)
            }
            None => Bytes::Here(self.bytes(buffer.pending())),
        }
    }

    fn entry(&mut self, id: u32, known: bool, socket: &mut Socket, stack: &mut dyn Stack) -> Entry {
        let own = stack.lasting(socket.handle);
        self.descriptors.extend(own);
        let mut bits = 0;
        for (n, flag) in flags(socket).into_iter().enumerate() {
            bits |= u32::from(*flag) << n;
        }
        let mut linger = [0; LINGER];
        let kept = stack.option(socket.handle, libc::SOL_SOCKET, libc::SO_LINGER, &mut linger);
        let held = socket.down_datagram.as_ref();
        let held = held.map(|held| (self.bytes(&held.bytes), held.note.as_ref().map(|fd| self.note(fd))));
        Entry {
            id,
            generation: socket.generation,
            stack: own.unwrap_or(-1),
            has_stack: socket.handle != Handle::NONE,
            end: socket.end.as_ref().map(|end| self.note(end)),
            inode: socket.inode,
            known,
            domain: socket.domain,
            kind: socket.kind,
            holder: socket.holder,
            state: socket.state,
            tcp: socket.tcp.map(|tcp| [tcp.segments, tcp.retransmitted, tcp.rtt_us]),
            tcp_at: socket.tcp_at,
            error: socket.error.map(|errno| errno.0),
            broken: socket.broken.map(|errno| errno.0),
            up: self.buffer(&mut socket.up),
            down: self.buffer(&mut socket.down),
            up_datagram: socket.up_datagram.as_ref().map(|bytes| self.bytes(bytes)),
            down_datagram: held,
            down_urgent: socket.down_urgent,
            flags: bits,
            tokens: socket.tokens,
            returned: socket.returned.iter().map(|(id, peer)| (*id, peer.as_bytes().to_vec())).collect(),
            waiters: socket.waiters.clone(),
            bytes: (socket.bytes_in, socket.bytes_out),
            counted: socket.counted,
            linger: (kept == Ok(LINGER) && linger[0] != 0).then_some(linger),
        }
    }

    /// All of it, in memory that the next program reads.
    fn finish(self, table: &Table) -> io::Result<Left> {
        let bound = table.sockets.iter().filter(|entry| entry.stack < 0 && entry.has_stack).count();
        let memory = memory(&self.descriptors, table, &self.payload)?;
        Ok(Left { memory, descriptors: self.descriptors, bound })
    }
}

fn memory(descriptors: &[RawFd], table: &Table, payload: &[u8]) -> io::Result<OwnedFd> {
    // SAFETY: a C string and flags; the result is checked.
    let fd = unsafe { libc::memfd_create(c"netkernel-relay".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: new and owned by nobody else.
    let mut file = unsafe { File::from_raw_fd(fd) };
    let numbers: Vec<u8> = descriptors.iter().flat_map(|fd| fd.to_le_bytes()).collect();
    let table = serde_json::to_vec(table)?;
    for part in [&numbers, &table] {
        file.write_all(&(part.len() as u64).to_le_bytes())?;
        file.write_all(part)?;
    }
    file.write_all(payload)?;
    Ok(file.into())
}

/// What a relay left, with other numbers for its descriptors: `other` says for each which. Errors: it does not know one, or the
/// memory cannot be read or made.
pub fn renumber_left(left: OwnedFd, other: &dyn Fn(RawFd) -> Option<RawFd>) -> io::Result<OwnedFd> {
    let numbers = left_descriptors(&left);
    let mut found = Found::read(left)?;
    let new = |fd: RawFd| other(fd).ok_or_else(|| io::Error::other("a relay's descriptor is not there"));
    for entry in &mut found.table.sockets {
        if entry.stack >= 0 {
            entry.stack = new(entry.stack)?;
        }
        let note = entry.down_datagram.as_mut().and_then(|(_, note)| note.as_mut());
        for fd in entry.end.iter_mut().chain(note) {
            *fd = new(*fd)?;
        }
        for bytes in [&mut entry.up, &mut entry.down] {
            if let Bytes::Pipe(reader, writer, _) = bytes {
                (*reader, *writer) = (new(*reader)?, new(*writer)?);
            }
        }
    }
    let numbers = numbers.into_iter().map(new).collect::<io::Result<Vec<_>>>()?;
    memory(&numbers, &found.table, &found.payload)
}

fn part(file: &mut File) -> io::Result<Vec<u8>> {
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let mut part = Vec::new();
    file.take(u64::from_le_bytes(length)).read_to_end(&mut part)?;
    Ok(part)
}

/// The descriptors that a relay left, by their numbers. What cannot be read has none.
pub fn left_descriptors(memory: impl AsFd) -> Vec<RawFd> {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::from(memory.as_fd().try_clone_to_owned()?);
        file.seek(SeekFrom::Start(0))?;
        part(&mut file)
    };
    let numbers = read().unwrap_or_default();
    numbers.chunks_exact(4).map(|n| i32::from_le_bytes([n[0], n[1], n[2], n[3]])).collect()
}

/// How many sockets a relay left.
pub fn left_sockets(memory: impl AsFd) -> usize {
    let read = || Found::read(memory.as_fd().try_clone_to_owned()?);
    read().map_or(0, |found| found.table.sockets.len())
}

/// Closes what a relay left that nobody goes on with: peers see a reset, programs that nobody is there.
pub fn reset_left(memory: &OwnedFd) {
    left_descriptors(memory).into_iter().filter_map(|fd| take_descriptor(fd + 1)).for_each(reset);
}

fn reset(fd: OwnedFd) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let len = size_of::<libc::linger>() as libc::socklen_t;
    // SAFETY: linger is valid for reads of its size. What is no socket refuses it.
    unsafe {
        let (level, name) = (libc::SOL_SOCKET, libc::SO_LINGER);
        libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const linger).cast(), len);
    }
}

/// What an earlier relay left, read.
struct Found {
    table: Table,
    payload: Vec<u8>,
}

impl Found {
    fn read(memory: OwnedFd) -> io::Result<Found> {
        let mut file = File::from(memory);
        file.seek(SeekFrom::Start(0))?;
        part(&mut file)?;
        let table = serde_json::from_slice(&part(&mut file)?)?;
        let mut payload = Vec::new();
        file.read_to_end(&mut payload)?;
        Ok(Found { table, payload })
    }

    fn run(&self, (at, len): Run) -> Vec<u8> {
        self.payload.get(at..at.saturating_add(len)).unwrap_or_default().to_vec()
    }

    fn buffer(&self, bytes: &Bytes) -> Buffer {
        match *bytes {
            Bytes::Here(run) => Buffer::of(self.run(run)),
            Bytes::Pipe(reader, writer, left) => {
                // Open as all others are: see who keeps them.
                match [reader, writer].map(|fd| take_descriptor(fd + 1)) {
                    [Some(reader), Some(writer)] => Buffer::through(Piped::of(reader, writer, left)),
                    _ => Buffer::default(),
                }
            }
        }
    }

    /// The socket, without its stack's. Its end may be missing.
    fn socket(&self, entry: &Entry) -> Socket {
        let mut socket = Socket::new(entry.generation, Handle::NONE, entry.domain, entry.kind);
        for (n, flag) in flags(&mut socket).into_iter().enumerate() {
            *flag = entry.flags >> n & 1 != 0;
        }
        socket.inode = entry.inode;
        socket.holder = entry.holder;
        socket.state = entry.state;
        socket.tcp =
            entry.tcp.map(|[segments, retransmitted, rtt_us]| TcpCounts { segments, retransmitted, rtt_us });
        socket.tcp_at = entry.tcp_at;
        socket.error = entry.error.map(Errno);
        socket.broken = entry.broken.map(Errno);
        socket.up_datagram = entry.up_datagram.map(|run| self.run(run));
        socket.down_datagram = entry.down_datagram.map(|(run, note)| Held {
            bytes: self.run(run),
            note: note.and_then(|fd| take_descriptor(fd + 1)),
        });
        socket.down_urgent = entry.down_urgent;
        socket.tokens = entry.tokens;
        let returned = entry.returned.iter().map(|(id, peer)| (*id, SocketAddress::from_bytes(peer)));
        socket.returned = returned.collect();
        socket.waiters = entry.waiters.clone();
        (socket.bytes_in, socket.bytes_out) = entry.bytes;
        socket.counted = entry.counted;
        (socket.up, socket.down) = (self.buffer(&entry.up), self.buffer(&entry.down));
        socket.end = entry.end.and_then(|fd| take_descriptor(fd + 1));
        socket
    }
}

impl Link {
    /// Asks the relay to write everything down between two pieces of work, and to stand still.
    pub fn stop(&self) -> Stopping {
        let ((answer, answered), (go_on, told)) = (channel(), channel());
        self.ask(Request::Stop(Stop { answer, go_on: told }));
        Stopping { answered, go_on }
    }
}

impl Relay {
    /// Answers with all that there is, and waits until it is to go on, or to end.
    pub(crate) fn stand_still(&mut self, stop: &Stop) {
        // Who asked may not wait any more, then nobody holds the other end of this either.
        if stop.answer.send(self.write_down()).is_ok() && stop.go_on.recv() == Ok(()) {
            // All of it is another one's.
            self.run.clear();
            self.waiting.clear();
            self.sockets.clear();
            self.poll.remove(self.start.listener.fd());
            self.over_since_ns = Some(0);
        }
    }

    fn write_down(&mut self) -> Result<Left, String> {
        let mut writer = Writer::default();
        let mut sockets = Vec::new();
        for id in 0..self.sockets.len() as u32 {
            self.count(id);
            let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { continue };
            let known = self.ids.get(&socket.inode) == Some(&id);
            sockets.push(writer.entry(id, known, socket, &mut self.stack));
        }
        let waiting = self.waiting.values().map(|waiting| Call {
            call: waiting.call,
            socket: waiting.socket,
            generation: waiting.generation,
            deadline_ns: waiting.deadline_ns,
            late: waiting.late.0,
        });
        let counters = &self.start.counters;
        let table = Table {
            generation: self.generation,
            sockets,
            waiting: waiting.collect(),
            over: self.over.iter().copied().collect(),
            over_since_ns: self.over_since_ns,
            processes: counters.processes(),
            counts: [&counters.served, &counters.refused, &counters.let_through].map(|n| n.load(Relaxed)),
        };
        writer.finish(&table).map_err(|error| format!("its sockets cannot be written down: {error}"))
    }

    /// Goes on where a relay of the program before stood still. What of it cannot go on is reset, by itself.
    pub fn resume(start: Start, stack: Box<dyn Stack>, link: Link, left: OwnedFd) -> io::Result<Relay> {
        let mut relay = match Relay::new(start, stack, link) {
            Ok(relay) => relay,
            Err(error) => {
                reset_left(&left);
                return Err(error);
            }
        };
        let found = Found::read(left)?;
        let table = &found.table;
        relay.generation = table.generation;
        // Before the sockets: one that is lost fails the calls that wait for it.
        for one in &table.waiting {
            let waiting = Waiting {
                call: one.call,
                socket: one.socket,
                generation: one.generation,
                deadline_ns: one.deadline_ns,
                late: Errno(one.late),
            };
            relay.waiting.insert(one.call.pid, waiting);
        }
        let mut lost = 0;
        for entry in &table.sockets {
            lost += usize::from(!relay.resume_socket(&found, entry));
        }
        let holes = (0..relay.sockets.len() as u32).rev();
        relay.free = holes.filter(|id| relay.sockets[*id as usize].is_none()).collect();
        relay.over.extend(&table.over);
        if table.over_since_ns.is_some() {
            relay.filter_is_gone();
            relay.over_since_ns = table.over_since_ns;
        }
        let counters = &relay.start.counters;
        table.processes.iter().for_each(|&pid| counters.remember(pid));
        for (counter, count) in
            [&counters.served, &counters.refused, &counters.let_through].into_iter().zip(table.counts)
        {
            counter.fetch_add(count, Relaxed);
        }
        if lost > 0 {
            let guest = relay.start.guest;
            log::error!(guest; "guest {guest}: {lost} relayed sockets could not go on and are reset");
        }
        Ok(relay)
    }

    /// False: it is lost, and the program's socket says so.
    fn resume_socket(&mut self, found: &Found, entry: &Entry) -> bool {
        let (id, mut socket) = (entry.id, found.socket(entry));
        let tells = entry.kind != libc::SOCK_STREAM || entry.state != State::Fresh;
        let key = Relay::key(id);
        let handle = match take_descriptor(entry.stack + 1) {
            Some(own) => self.stack.adopt(key, own, tells),
            None => self.stack.resume(key, tells),
        };
        socket.handle = handle.unwrap_or(Handle::NONE);
        if let Some(linger) = entry.linger {
            let _ = self.stack.set_option(socket.handle, libc::SOL_SOCKET, libc::SO_LINGER, &linger);
        }
        let room = socket.wants_room;
        let watched = socket.end.as_ref().map(|end| self.watch(end, room, (socket.generation, id)));
        let whole = socket.handle != Handle::NONE && entry.end.is_some() == (watched == Some(true));
        while self.sockets.len() <= id as usize {
            self.sockets.push(None);
        }
        if entry.known {
            self.ids.insert(entry.inode, id);
        }
        self.sockets[id as usize] = Some(Box::new(socket));
        if whole {
            // Whatever happened meanwhile.
            self.queue(id);
        } else {
            self.lose(id, entry.end.is_some());
        }
        whole
    }

    /// Ends a socket that cannot go on. `held`: a program has, or had, the other end.
    fn lose(&mut self, id: u32, held: bool) {
        let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return };
        let errno = Errno(if socket.state == State::Listening { libc::ENETDOWN } else { libc::ECONNRESET });
        let handle = std::mem::replace(&mut socket.handle, Handle::NONE);
        (socket.up, socket.down) = (Buffer::default(), Buffer::default());
        self.stack.close(handle, Close::Abort);
        if held {
            self.break_off(id, errno);
        }
    }
}

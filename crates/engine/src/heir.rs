//! Who answers for an engine that died.
//!
//! The kernel fails a notified call with ENOSYS when nobody has the listener any more, on every descriptor of the program.
//! So an engine with agents has an *heir*: a small process that holds a duplicate of each listener and does nothing, until
//! the engine's end of a pair hangs up, or the engine says that a guest's agent is over. From then on it tells programs what
//! is true: new sockets, and calls that the engine had received and not answered, fail with ENETDOWN; any other call goes on
//! in the kernel, which knows what became of the descriptor. It ends with the last program that has a filter.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::Ordering::Relaxed;

use netkernel_agent::notify::{Listener, Notification};
use netkernel_shm::{Word, fds};

use crate::engine::lock;

/// AUDIT_ARCH_I386, and its number of socket().
const I386: u32 = 0x4000_0003;
const I386_SOCKET: i32 = 359;

/// What the engine says: of this guest, by its number.
const REMEMBER: u8 = 1;
const ANSWER: u8 = 2;
const FORGET: u8 = 3;
const MESSAGE: usize = 5;

/// The engine's hold on its heir, which is started when it is needed first.
#[derive(Default)]
pub(crate) struct Heirs(Mutex<State>);

#[derive(Default)]
enum State {
    #[default]
    None,
    There(Heir),
    /// It could not be started, or does not listen.
    Never,
}

struct Heir {
    control: OwnedFd,
    child: Child,
}

impl Heirs {
    /// When nobody answers this guest's listener any more, the heir will. `binary` is the program whose hidden subcommand
    /// calls [`main`]; without one there is no heir.
    /// `last`: where the agent notes its calls.
    pub fn remember(&self, binary: Option<&Path>, guest: u32, listener: &Listener, last: &OwnedFd) {
        let Some(binary) = binary else { return };
        let mut state = lock(&self.0);
        if matches!(*state, State::None) {
            *state = match Heir::start(binary) {
                Ok(heir) => State::There(heir),
                Err(error) => {
                    log::warn!("nobody will answer the programs of agents if this engine dies: {error}");
                    State::Never
                }
            };
        }
        tell(&mut state, REMEMBER, guest, &[listener.fd(), last.as_raw_fd()]);
    }

    /// The process of an NSM has the guest's agent from now on.
    pub fn forget(&self, guest: u32) {
        tell(&mut lock(&self.0), FORGET, guest, &[]);
    }

    /// Another process goes on for this one, and starts an heir of its own. This one must not answer.
    pub fn end(&self) {
        if let State::There(mut heir) = std::mem::take(&mut *lock(&self.0)) {
            let _ = heir.child.kill();
            let _ = heir.child.wait();
        }
    }

    /// The guest's agent answers no more: the heir does, as long as there is somebody to answer.
    pub fn answer(&self, guest: u32) {
        tell(&mut lock(&self.0), ANSWER, guest, &[]);
    }
}

fn tell(state: &mut State, what: u8, guest: u32, listener: &[i32]) {
    let State::There(heir) = state else { return };
    let mut message = [what; MESSAGE];
    message[1..].copy_from_slice(&guest.to_le_bytes());
    // A switch thread waits for nobody.
    let sent = fds::send(heir.control.as_raw_fd(), &message, listener, libc::MSG_DONTWAIT);
    if sent.is_err() {
        // One that does not listen would hold listeners that nobody answers: calls would wait for ever.
        let _ = heir.child.kill();
        let _ = heir.child.wait();
        *state = State::Never;
    }
}

impl Heir {
    fn start(binary: &Path) -> io::Result<Heir> {
        let (control, theirs) = fds::pair(libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC)?;
        let number = theirs.as_raw_fd();
        let mut command = Command::new(binary);
        command.arg("heir").arg("--control-fd").arg(number.to_string());
        // It outlives the engine: nobody's pipe may be kept open by it, and no terminal's signals end it.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
        // SAFETY: between fork and exec only setsid and fcntl are called, the latter on a descriptor that `theirs` keeps open.
        unsafe {
            command.pre_exec(move || match (libc::setsid(), libc::fcntl(number, libc::F_SETFD, 0)) {
                (1.., 0) => Ok(()),
                _ => Err(io::Error::last_os_error()),
            })
        };
        Ok(Heir { control, child: command.spawn()? })
    }
}

/// One guest's listener, in the heir.
struct Inherited {
    guest: u32,
    listener: Listener,
    /// The call that its agent received last.
    last: Word,
    /// Its agent is gone.
    answered: bool,
    /// And what it left is, too.
    settled: bool,
}

impl Inherited {
    /// The descriptors of a message. Nothing that is not what it should be is kept.
    fn new(guest: u32, sent: Vec<OwnedFd>) -> Option<Inherited> {
        let mut sent = sent.into_iter();
        let listener = Listener::new(sent.next()?).ok()?;
        let last = Word::open(&sent.next()?).ok()?;
        Some(Inherited { guest, listener, last, answered: false, settled: false })
    }

    fn settle(&mut self) {
        if !std::mem::replace(&mut self.settled, true) {
            self.listener.settle(self.last.load(Relaxed), libc::ENETDOWN);
        }
    }
}

/// The process; returns its exit code.
pub fn main(control: OwnedFd) -> i32 {
    let mut control = Some(control);
    let mut listeners: Vec<Inherited> = Vec::new();
    while control.is_some() || !listeners.is_empty() {
        let entry = |fd, events| libc::pollfd { fd, events, revents: 0 };
        listeners.iter_mut().filter(|one| control.is_none() || one.answered).for_each(Inherited::settle);
        let wanted = |one: &Inherited| if one.settled { libc::POLLIN } else { 0 };
        let mut polled: Vec<libc::pollfd> =
            listeners.iter().map(|one| entry(one.listener.fd(), wanted(one))).collect();
        polled.push(entry(control.as_ref().map_or(-1, OwnedFd::as_raw_fd), libc::POLLIN));
        // SAFETY: all entries are valid for reads and writes.
        if unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, -1) } < 0 {
            continue;
        }
        let of_control = polled.pop().map_or(0, |entry| entry.revents);
        let mut events = polled.iter().map(|entry| entry.revents);
        listeners.retain(|one| {
            let events = events.next().unwrap_or(0);
            if events & libc::POLLIN != 0 {
                // An error: the thread that asked is dead, or was interrupted.
                if let Ok(call) = one.listener.receive() {
                    let _ = answer(&one.listener, &call);
                    // An agent that died of its first call had noted none.
                    one.listener.settle(call.id.wrapping_sub(1), libc::ENETDOWN);
                }
                return true;
            }
            // Nobody has the filter any more.
            events == 0
        });
        if of_control != 0
            && let Some(from) = &control
        {
            let mut message = [0; MESSAGE];
            match fds::receive(from.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) {
                Ok((MESSAGE, sent)) => {
                    let guest = u32::from_le_bytes([message[1], message[2], message[3], message[4]]);
                    listeners.extend(Inherited::new(guest, sent));
                    if message[0] == FORGET {
                        listeners.retain(|one| one.guest != guest || one.answered);
                    }
                    if message[0] == ANSWER {
                        let own = listeners.iter_mut().filter(|one| one.guest == guest);
                        own.for_each(|one| one.answered = true);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // The engine is gone.
                _ => control = None,
            }
        }
    }
    0
}

fn answer(listener: &Listener, call: &Notification) -> io::Result<()> {
    let native = call.arch != I386;
    let [_, level, name, ..] = call.arguments.map(|word| word as i32);
    let socket = if native { i64::from(call.nr) == libc::SYS_socket } else { call.nr == I386_SOCKET };
    // What the module allowed of this nobody knows any more.
    let congestion = native
        && i64::from(call.nr) == libc::SYS_setsockopt
        && (level, name) == (libc::IPPROTO_TCP, libc::TCP_CONGESTION);
    if socket || congestion { listener.fail(call, libc::ENETDOWN) } else { listener.let_through(call) }
}

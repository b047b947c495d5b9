//! The kernel's notification calls (seccomp_unotify(2); layouts: include/uapi/linux/seccomp.h).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::Ordering::Relaxed;

use netkernel_shm::Word;

/// One call that waits for its answer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Notification {
    pub id: u64,
    /// Thread that made the call, as this process sees it; 0: not visible from here.
    pub pid: u32,
    pub flags: u32,
    pub nr: i32,
    pub arch: u32,
    pub instruction_pointer: u64,
    pub arguments: [u64; 6],
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Response {
    id: u64,
    value: i64,
    error: i32,
    flags: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct AddFd {
    id: u64,
    flags: u32,
    source: u32,
    number: u32,
    number_flags: u32,
}

const RECEIVE: libc::c_ulong = 0xc050_2100;
const SEND: libc::c_ulong = 0xc018_2101;
const ID_VALID: libc::c_ulong = 0x4008_2102;
const ADD_FD: libc::c_ulong = 0x4018_2103;
const SET_FLAGS: libc::c_ulong = 0x4008_2104;
const FLAG_CONTINUE: u32 = 1;
/// The agent is woken on the caller's core (Linux 6.6).
const SYNC_WAKE_UP: libc::c_ulong = 1;

const _: () =
    assert!(size_of::<Notification>() == 80 && size_of::<Response>() == 24 && size_of::<AddFd>() == 24);

/// The descriptor that [`crate::filter::install`] gives.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    /// The number of the call that was received last, for who comes after this process.
    last: Option<Word>,
}

/// How far back [`Listener::settle`] looks: some seconds of work.
const MAX_SETTLED: u64 = 1 << 24;

impl Listener {
    /// Gives the descriptor back that is no seccomp listener: a guest could hand over anything, also what blocks for ever.
    pub fn new(fd: OwnedFd) -> Result<Listener, OwnedFd> {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        if !link.is_ok_and(|link| link.as_os_str() == "anon_inode:seccomp notify") {
            return Err(fd);
        }
        // SAFETY: takes an integer. Older kernels refuse it, and lose some microseconds for each call.
        unsafe { libc::ioctl(fd.as_raw_fd(), SET_FLAGS, SYNC_WAKE_UP) };
        Ok(Listener { fd, last: None })
    }

    pub fn fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }

    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }

    /// From now on, the number of the call that was received last stands where another process can read it.
    pub fn share(&mut self) -> io::Result<OwnedFd> {
        let (word, fd) = Word::create()?;
        self.last = Some(word);
        Ok(fd)
    }

    /// Calls that were received before, up to this number, may not be answered yet. After [`Listener::share`].
    pub fn received(&self, last: u64) {
        if let Some(word) = &self.last {
            word.store(last, Relaxed);
        }
    }

    /// The next call. ENOENT: its thread died meanwhile.
    pub fn receive(&self) -> io::Result<Notification> {
        let mut notification = Notification::default();
        // SAFETY: the kernel writes a struct seccomp_notif, which is what `notification` is; it must be all zero before.
        check(unsafe { libc::ioctl(self.fd(), RECEIVE, &raw mut notification) })?;
        if let Some(last) = &self.last {
            last.store(notification.id, Relaxed);
        }
        Ok(notification)
    }

    /// Whether [`Listener::receive`] would not wait.
    pub fn has_call(&self) -> bool {
        self.is_ready(libc::POLLIN)
    }

    fn is_ready(&self, event: libc::c_short) -> bool {
        let mut poll = libc::pollfd { fd: self.fd(), events: event, revents: 0 };
        // SAFETY: one entry, valid for reads and writes.
        unsafe { libc::poll(&mut poll, 1, 0) == 1 && poll.revents & event != 0 }
    }

    /// Ends the calls that a process received that is dead, and never answered: they fail. Nobody knows their numbers, but
    /// the kernel counts them up (kernel/seccomp.c, `seccomp_next_notify_id`), says whether there are any, and refuses what
    /// is none. `last`: the number of a call received late, perhaps the last one; 0: none was.
    pub fn settle(&self, last: u64, errno: i32) {
        if last == 0 {
            return;
        }
        // One may have been received and not been noted.
        let mut id = last.wrapping_add(1);
        let mut unanswered = self.is_ready(libc::POLLOUT);
        for _ in 0..MAX_SETTLED {
            if !unanswered {
                return;
            }
            if self.answer(Response { id, error: -errno, ..Response::default() }).is_ok() {
                unanswered = self.is_ready(libc::POLLOUT);
            }
            id = id.wrapping_sub(1);
        }
    }

    /// Whether the thread still waits for this answer: what was read of its memory before is its own.
    pub fn is_valid(&self, notification: &Notification) -> bool {
        // SAFETY: the kernel reads eight bytes.
        unsafe { libc::ioctl(self.fd(), ID_VALID, &raw const notification.id) == 0 }
    }

    /// The call returns `value`.
    pub fn succeed(&self, notification: &Notification, value: i64) -> io::Result<()> {
        self.answer(Response { id: notification.id, value, ..Response::default() })
    }

    /// The call fails.
    pub fn fail(&self, notification: &Notification, errno: i32) -> io::Result<()> {
        self.answer(Response { id: notification.id, error: -errno, ..Response::default() })
    }

    /// The call is made as if there were no filter. Only for what needs no protection: the arguments may have changed.
    pub fn let_through(&self, notification: &Notification) -> io::Result<()> {
        self.answer(Response { id: notification.id, flags: FLAG_CONTINUE, ..Response::default() })
    }

    /// The call returns `fd`, which this process has no longer when the program goes on: the program's close is the last
    /// one from the first moment. (SECCOMP_ADDFD_FLAG_SEND would save a system call, but the program could bind and close
    /// the socket before this process has closed its own, and find the port still taken.) Errors: EMFILE, when the
    /// process has no number left for it.
    pub fn give(&self, notification: &Notification, fd: OwnedFd, close_on_exec: bool) -> io::Result<()> {
        let add = AddFd {
            id: notification.id,
            flags: 0,
            source: fd.as_raw_fd() as u32,
            number: 0,
            number_flags: if close_on_exec { libc::O_CLOEXEC as u32 } else { 0 },
        };
        // SAFETY: the kernel reads a struct seccomp_notif_addfd, which is what `add` is.
        let number = unsafe { libc::ioctl(self.fd(), ADD_FD, &raw const add) };
        check(number)?;
        drop(fd);
        self.succeed(notification, number.into())
    }

    /// The call returns `fd`, in one step: an interrupted call has no descriptor that it does not know of. This process has
    /// its copy until it drops it. `number`: replace that descriptor of the caller, and do not answer.
    /// Errors: ENOENT, the caller does not wait any more; EMFILE.
    pub fn give_at_once(
        &self,
        notification: &Notification,
        fd: &OwnedFd,
        close_on_exec: bool,
        number: Option<u32>,
    ) -> io::Result<i32> {
        const SET_FD: u32 = 1;
        const AND_SEND: u32 = 2;
        let add = AddFd {
            id: notification.id,
            flags: if number.is_some() { SET_FD } else { AND_SEND },
            source: fd.as_raw_fd() as u32,
            number: number.unwrap_or(0),
            number_flags: if close_on_exec { libc::O_CLOEXEC as u32 } else { 0 },
        };
        // SAFETY: the kernel reads a struct seccomp_notif_addfd, which is what `add` is.
        let number = unsafe { libc::ioctl(self.fd(), ADD_FD, &raw const add) };
        check(number)?;
        Ok(number)
    }

    fn answer(&self, response: Response) -> io::Result<()> {
        // SAFETY: the kernel reads a struct seccomp_notif_resp, which is what `response` is.
        check(unsafe { libc::ioctl(self.fd(), SEND, &raw const response) })
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

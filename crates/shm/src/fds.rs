//! Passing descriptors over Unix sockets (SCM_RIGHTS), pairs and eventfds.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Most descriptors in one message here.
pub const MAX_FDS: usize = 8;

const CONTROL_BYTES: usize = 64;

#[repr(C, align(8))]
struct Control([u8; CONTROL_BYTES]);

/// Sends `data` as one message with `fds` attached. `flags`: MSG_DONTWAIT etc.; MSG_NOSIGNAL is always set.
pub fn send(socket: RawFd, data: &[u8], fds: &[RawFd], flags: i32) -> io::Result<usize> {
    assert!(fds.len() <= MAX_FDS);
    let mut control = Control([0; CONTROL_BYTES]);
    let mut iov = libc::iovec { iov_base: data.as_ptr() as *mut _, iov_len: data.len() };
    // SAFETY: an all-zero msghdr is a valid value of that plain C struct.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut iov;
    message.msg_iovlen = 1;
    if !fds.is_empty() {
        let bytes = size_of_val(fds) as u32;
        message.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: CMSG_* only compute; the control buffer is aligned and, by MAX_FDS, large enough; fds is valid for reads.
        unsafe {
            message.msg_controllen = libc::CMSG_SPACE(bytes) as _;
            let cmsg = libc::CMSG_FIRSTHDR(&message);
            (*cmsg).cmsg_level = libc::SOL_SOCKET;
            (*cmsg).cmsg_type = libc::SCM_RIGHTS;
            (*cmsg).cmsg_len = libc::CMSG_LEN(bytes) as _;
            std::ptr::copy_nonoverlapping(fds.as_ptr().cast::<u8>(), libc::CMSG_DATA(cmsg), bytes as usize);
        }
    }
    // SAFETY: message points to live buffers with their true lengths.
    let sent = unsafe { libc::sendmsg(socket, &message, flags | libc::MSG_NOSIGNAL) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(sent as usize) }
}

/// Receives one message: its bytes and descriptors (close-on-exec).
pub fn receive(socket: RawFd, data: &mut [u8], flags: i32) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut control = Control([0; CONTROL_BYTES]);
    let mut iov = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    let mut message = header(&mut iov, &mut control);
    // SAFETY: message points to live buffers with their true lengths.
    let received = unsafe { libc::recvmsg(socket, &mut message, flags | libc::MSG_CMSG_CLOEXEC) };
    if received < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel filled it just now.
    Ok((received as usize, unsafe { descriptors(&message) }))
}

/// Most messages of one [`receive_some`].
pub const MANY: usize = 8;

/// One message of [`receive_some`].
pub struct Received<const N: usize> {
    /// Bytes of it that are in `bytes`; what was beyond is lost.
    pub len: usize,
    pub bytes: [u8; N],
    pub descriptors: Vec<OwnedFd>,
}

/// Receives what messages there are, at most `most` and [`MANY`], and appends them to `into`; says how many. It does not wait. Fewer than
/// asked for: there are no more for now. A closed other end is a message of length 0, each time.
pub fn receive_some<const N: usize>(
    socket: RawFd,
    most: usize,
    into: &mut Vec<Received<N>>,
) -> io::Result<usize> {
    let most = most.min(MANY);
    let mut controls = [const { Control([0; CONTROL_BYTES]) }; MANY];
    let mut bytes = [[0u8; N]; MANY];
    let mut iovs = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: N }; MANY];
    // SAFETY: all-zero mmsghdrs are valid values of that plain C struct.
    let mut messages: [libc::mmsghdr; MANY] = unsafe { std::mem::zeroed() };
    for (i, message) in messages.iter_mut().enumerate().take(most) {
        iovs[i].iov_base = bytes[i].as_mut_ptr().cast();
        message.msg_hdr = header(&mut iovs[i], &mut controls[i]);
    }
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: each message points to live buffers with their true lengths.
    let received = unsafe {
        libc::recvmmsg(socket, messages.as_mut_ptr(), most as u32, flags as _, std::ptr::null_mut())
    };
    if received < 0 {
        return Err(io::Error::last_os_error());
    }
    for (message, bytes) in messages.iter().zip(bytes).take(received as usize) {
        // SAFETY: the kernel filled it just now.
        let descriptors = unsafe { descriptors(&message.msg_hdr) };
        into.push(Received { len: message.msg_len as usize, bytes, descriptors });
    }
    Ok(received as usize)
}

fn header(iov: &mut libc::iovec, control: &mut Control) -> libc::msghdr {
    // SAFETY: an all-zero msghdr is a valid value of that plain C struct.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iov;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = CONTROL_BYTES as _;
    message
}

/// The descriptors that came with a message.
///
/// # Safety
/// The kernel filled the header and its control buffer, which is alive, and nobody took the descriptors.
unsafe fn descriptors(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: CMSG_* walk the control buffer within msg_controllen; each descriptor in a SCM_RIGHTS message is new and owned
    // by us alone (contract).
    unsafe {
        let mut cmsg = libc::CMSG_FIRSTHDR(message);
        while !cmsg.is_null() {
            if (*cmsg).cmsg_level == libc::SOL_SOCKET && (*cmsg).cmsg_type == libc::SCM_RIGHTS {
                let count = ((*cmsg).cmsg_len as usize - libc::CMSG_LEN(0) as usize) / size_of::<RawFd>();
                for i in 0..count {
                    let fd = libc::CMSG_DATA(cmsg).cast::<RawFd>().add(i).read_unaligned();
                    fds.push(OwnedFd::from_raw_fd(fd));
                }
            }
            cmsg = libc::CMSG_NXTHDR(message, cmsg);
        }
    }
    fds
}

/// A pipe: its reading and its writing end. `flags`: O_CLOEXEC, O_NONBLOCK. `bytes`: how much it should hold, if not what the
/// kernel gives; a refusal of that (`/proc/sys/fs/pipe-max-size`) changes nothing.
pub fn pipe(flags: i32, bytes: Option<usize>) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: fds is valid for two descriptors.
    if unsafe { libc::pipe2(fds.as_mut_ptr(), flags) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if let Some(bytes) = bytes {
        // SAFETY: plain system call.
        unsafe { libc::fcntl(fds[1], libc::F_SETPIPE_SZ, bytes as libc::c_int) };
    }
    // SAFETY: both are new and owned by nobody else.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

/// Who connected the Unix socket at the other end, or made the pair, as the kernel says (SO_PEERCRED). The pid is 0 for a
/// process of a PID namespace that is not seen from here.
pub fn peer(socket: BorrowedFd<'_>) -> io::Result<libc::ucred> {
    let mut peer = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: peer and len are valid for writes; len is peer's size.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &mut len,
        )
    };
    if result != 0 { Err(io::Error::last_os_error()) } else { Ok(peer) }
}

/// A connected pair of Unix sockets; `kind`: SOCK_STREAM or SOCK_SEQPACKET, with SOCK_NONBLOCK or SOCK_CLOEXEC as wanted.
pub fn pair(kind: i32) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: fds is valid for two descriptors.
    if unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both are new and owned by nobody else.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

/// A non-blocking, close-on-exec eventfd.
pub fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: plain system call; the result is checked.
    let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: new and owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

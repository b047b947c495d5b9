//! Bytes between a program's Unix socket and its stack's connection.

use std::os::fd::{AsRawFd as _, OwnedFd};

use netkernel_service::{Close, Errno, Handle, SendFlags, Shutdown, Stack};

use crate::bulk::{BULK, Pipes};
use crate::relay::{CHUNK, Relay};
use crate::socket::{Buffer, Socket, State};
use crate::sys;

/// Bytes of one socket in one turn, before others are looked at.
const BUDGET: usize = 1 << 20;

/// What moving bytes came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moved {
    /// Until something is reported.
    AsFarAsItGoes,
    /// There may be more.
    More,
    /// The program closed its socket; with unread data, or to reset the connection.
    Closed { abort: bool },
}

impl Relay {
    pub(crate) fn pump(&mut self, id: u32) {
        let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return };
        match socket.state {
            State::Connected => {}
            State::Listening => return self.listener_event(id),
            State::Connecting { .. } => {
                if socket.end_hung_up {
                    return self.remove(id, Close::Graceful);
                }
                return self.check_connect(id);
            }
            State::Fresh => {
                if socket.end_hung_up {
                    self.remove(id, Close::Graceful);
                }
                return;
            }
            State::Over => return,
        }
        if socket.broken.is_some() && socket.end_hung_up {
            return self.remove(id, Close::Graceful);
        }
        let mut budget = BUDGET;
        let stack: &mut dyn Stack = &mut self.stack;
        let mut moved = Moved::AsFarAsItGoes;
        if socket.broken.is_none() {
            moved = up(socket, stack, &mut self.pipes, &mut self.scratch, &mut budget);
        }
        if !matches!(moved, Moved::Closed { .. }) {
            let down = down(socket, stack, &mut self.pipes, &mut self.scratch, &mut budget);
            if down != Moved::AsFarAsItGoes {
                moved = down;
            }
        }
        self.program_next |= BUDGET - budget >= BULK;
        // Of a stream that ended, reading does not tell.
        if std::mem::take(&mut socket.stack_error)
            && socket.broken.is_none()
            && let Err(errno) = stack.take_error(socket.handle)
        {
            socket.broken = Some(errno);
        }
        let drained = socket.down.is_empty() && (!socket.stack_readable || socket.down_ended);
        match (moved, socket.broken) {
            (Moved::Closed { abort }, _) => {
                if socket.may_be_held() {
                    let _ = stack.shutdown(socket.handle, Shutdown::Both);
                    socket.state = State::Over;
                    socket.end = None;
                    let generation = socket.generation;
                    self.push_over(id, generation);
                } else {
                    // What nobody will read makes it a reset.
                    let abort = abort || has_unread(socket, stack);
                    self.remove(id, if abort { Close::Abort } else { Close::Graceful });
                }
            }
            (_, Some(errno)) if drained => self.break_off(id, errno),
            (Moved::More, _) => self.queue(id),
            (Moved::AsFarAsItGoes, _) => {}
        }
        self.tune(id);
    }

    /// The connection is reset, or a connect failed: the program's socket shows POLLERR and POLLHUP, reads fail.
    pub(crate) fn break_off(&mut self, id: u32, errno: Errno) {
        let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return };
        let generation = socket.generation;
        if socket.end_hung_up && !socket.may_be_held() {
            return self.remove(id, Close::Graceful);
        }
        let (inode, (pid, number)) = (socket.inode, socket.holder);
        socket.error = Some(errno);
        socket.state = State::Over;
        // A Unix socket learns of a reset when its peer is closed with something unread. That something is sent by the
        // program's own end.
        if let Some(end) = socket.end.take() {
            if sys::unread(&end) == 0 {
                match self.threads.descriptor(pid, number, inode).or_else(|_| self.find_holder(inode)) {
                    Ok(theirs) => _ = sys::send(&theirs, &[0]),
                    Err(errno) => log::debug!(
                        guest = self.start.guest, errno = errno.0;
                        "guest {}: a broken connection looks ended, its descriptor is not found (errno {})",
                        self.start.guest,
                        errno.0
                    ),
                }
            }
            drop(end);
        }
        self.push_over(id, generation);
        self.retry(id, generation);
    }

    /// The program dissolved its connection: its socket ends.
    pub(crate) fn hang_up(&mut self, id: u32) {
        let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return };
        socket.state = State::Over;
        socket.end = None;
        let generation = socket.generation;
        self.push_over(id, generation);
    }

    /// Looks for the descriptor in all of the guest's processes.
    fn find_holder(&mut self, inode: u64) -> Result<OwnedFd, Errno> {
        let census = netkernel_agent::Census::of(self.start.counters.processes());
        let &(pid, number) = census.inodes().get(&inode).ok_or(Errno(libc::ENOENT))?;
        self.threads.descriptor(pid, number, inode)
    }
}

fn has_unread(socket: &Socket, stack: &mut dyn Stack) -> bool {
    let mut byte = [0];
    socket.stack_readable
        && !socket.down_ended
        && stack.recv(socket.handle, &sys::segments(&mut byte)).is_ok_and(|received| received.bytes > 0)
}

/// Gives the stack what waits for it: how much it took.
fn give_stack(
    up: &mut Buffer,
    urgent: &mut bool,
    (stack, handle): (&mut dyn Stack, Handle),
    pipes: &mut Pipes,
) -> Result<usize, Errno> {
    let given = match (&mut up.piped, stack.descriptor(handle)) {
        (Some(piped), Some(to)) => {
            let n = piped.pour(to)?;
            stack.moved(0, n as u64);
            n
        }
        _ => {
            up.unpipe();
            let flags = SendFlags { more: false, urgent: *urgent };
            let n = stack.send(handle, &sys::segments(up.pending()), flags)?;
            *urgent &= n == 0;
            n
        }
    };
    up.given(given, pipes);
    Ok(given)
}

/// Gives the program's end what waits for it.
fn give_program(down: &mut Buffer, end: &OwnedFd, pipes: &mut Pipes) -> Result<(), Errno> {
    let given = match &mut down.piped {
        Some(piped) => piped.pour(end.as_raw_fd())?,
        None => sys::send(end, down.pending())?,
    };
    down.given(given, pipes);
    Ok(())
}

/// From the program to the stack.
fn up(
    socket: &mut Socket,
    stack: &mut dyn Stack,
    pipes: &mut Pipes,
    scratch: &mut [u8],
    budget: &mut usize,
) -> Moved {
    let Some(end) = &socket.end else { return Moved::AsFarAsItGoes };
    loop {
        if *budget == 0 {
            return Moved::More;
        }
        if !socket.up.is_empty() {
            if !socket.stack_writable {
                return Moved::AsFarAsItGoes;
            }
            match give_stack(&mut socket.up, &mut socket.up_urgent, (stack, socket.handle), pipes) {
                Ok(n) => {
                    socket.bytes_out += n as u64;
                    socket.stack_writable = socket.up.is_empty();
                }
                Err(errno) if errno.would_block() => socket.stack_writable = false,
                Err(errno) => {
                    socket.broken = Some(errno);
                    socket.stack_readable = true;
                    return Moved::AsFarAsItGoes;
                }
            }
            continue;
        }
        if socket.up_ended {
            if socket.end_hung_up {
                let abort = socket.abort || !socket.down.is_empty();
                return Moved::Closed { abort };
            }
            if !socket.up_shut {
                socket.up_shut = true;
                let _ = stack.shutdown(socket.handle, Shutdown::Write);
            }
            return Moved::AsFarAsItGoes;
        }
        if !socket.end_readable || !socket.stack_writable {
            return Moved::AsFarAsItGoes;
        }
        if socket.end_urgent && sys::at_mark(end) {
            socket.end_urgent = false;
            if let Ok(1) = sys::receive(end, &mut scratch[..1], 0) {
                socket.up.push(&scratch[..1]);
                socket.up_urgent = true;
            }
            continue;
        }
        if socket.up_bulk
            && !socket.end_urgent
            && stack.descriptor(socket.handle).is_some()
            && let Some(filled) = pipes.fill(end.as_raw_fd())
        {
            match filled {
                Ok(piped) => {
                    *budget = budget.saturating_sub(piped.len());
                    socket.up_bulk = piped.len() >= BULK;
                    if piped.is_empty() {
                        socket.up_ended = true;
                        pipes.take_back(piped);
                    } else {
                        socket.up.piped = Some(piped);
                    }
                }
                Err(errno) if errno.would_block() => socket.end_readable = false,
                // Closed with unread data.
                Err(_) => return Moved::Closed { abort: true },
            }
            continue;
        }
        match sys::receive(end, &mut scratch[..CHUNK], 0) {
            Ok(0) => socket.up_ended = true,
            Ok(n) => {
                // A short read means that nothing is left, unless the end stands behind it.
                socket.end_readable = n == CHUNK || socket.end_ended || socket.end_urgent;
                *budget = budget.saturating_sub(n);
                socket.up_bulk = n >= BULK;
                let sent = match stack.send(
                    socket.handle,
                    &sys::segments(&mut scratch[..n]),
                    SendFlags::default(),
                ) {
                    Ok(sent) => sent,
                    Err(errno) if errno.would_block() => 0,
                    Err(errno) => {
                        socket.broken = Some(errno);
                        socket.stack_readable = true;
                        return Moved::AsFarAsItGoes;
                    }
                };
                socket.bytes_out += sent as u64;
                if sent < n {
                    socket.stack_writable = false;
                    socket.up.push(&scratch[sent..n]);
                }
            }
            Err(errno) if errno.would_block() => (socket.end_readable, socket.end_urgent) = (false, false),
            // Closed with unread data.
            Err(_) => return Moved::Closed { abort: true },
        }
    }
}

/// From the stack to the program.
fn down(
    socket: &mut Socket,
    stack: &mut dyn Stack,
    pipes: &mut Pipes,
    scratch: &mut [u8],
    budget: &mut usize,
) -> Moved {
    let Some(end) = &socket.end else { return Moved::AsFarAsItGoes };
    loop {
        if *budget == 0 {
            return Moved::More;
        }
        if !socket.down.is_empty() {
            if !socket.end_writable {
                return Moved::AsFarAsItGoes;
            }
            match give_program(&mut socket.down, end, pipes) {
                Ok(()) => socket.end_writable = socket.down.is_empty(),
                Err(errno) if errno.would_block() => socket.end_writable = false,
                Err(_) => {
                    socket.down_closed = true;
                    if socket.end_hung_up {
                        return Moved::AsFarAsItGoes;
                    }
                    socket.down.clear();
                }
            }
            continue;
        }
        if let Some(byte) = socket.down_urgent {
            if !socket.end_writable {
                return Moved::AsFarAsItGoes;
            }
            match sys::send_urgent(end, byte) {
                Err(errno) if errno.would_block() => socket.end_writable = false,
                _ => socket.down_urgent = None,
            }
            continue;
        }
        if socket.stack_urgent && stack.at_mark(socket.handle) == Ok(true) {
            match stack.recv_urgent(socket.handle) {
                Ok(byte) => (socket.stack_urgent, socket.down_urgent) = (false, Some(byte)),
                // Announced, and not there yet.
                Err(errno) if errno.would_block() => {}
                Err(_) => socket.stack_urgent = false,
            }
            if socket.down_urgent.is_some() {
                continue;
            }
        }
        if socket.down_ended || !socket.stack_readable || !(socket.end_writable || socket.down_closed) {
            return Moved::AsFarAsItGoes;
        }
        if socket.down_bulk
            && !socket.stack_urgent
            && !socket.down_closed
            && let Some(from) = stack.descriptor(socket.handle)
            && let Some(filled) = pipes.fill(from)
        {
            match filled {
                Ok(piped) if piped.is_empty() => {
                    pipes.take_back(piped);
                    socket.down_ended = true;
                    sys::shutdown(end, libc::SHUT_WR);
                }
                Ok(piped) => {
                    let n = piped.len();
                    stack.moved(n as u64, 0);
                    *budget = budget.saturating_sub(n);
                    socket.bytes_in += n as u64;
                    socket.down_bulk = n >= BULK;
                    socket.down.piped = Some(piped);
                }
                Err(errno) if errno.would_block() => socket.stack_readable = false,
                Err(errno) => {
                    socket.stack_readable = false;
                    socket.broken.get_or_insert(errno);
                    return Moved::AsFarAsItGoes;
                }
            }
            continue;
        }
        match stack.recv(socket.handle, &sys::segments(&mut scratch[..CHUNK])) {
            Ok(received) if received.bytes == 0 => {
                socket.down_ended = true;
                sys::shutdown(end, libc::SHUT_WR);
            }
            Ok(received) => {
                let n = received.bytes.min(CHUNK);
                socket.stack_readable = received.more || socket.stack_urgent;
                socket.bytes_in += n as u64;
                socket.down_bulk = n >= BULK;
                *budget = budget.saturating_sub(n);
                if socket.down_closed {
                    continue;
                }
                match sys::send(end, &scratch[..n]) {
                    Ok(sent) if sent == n => {}
                    Ok(sent) => {
                        socket.end_writable = false;
                        socket.down.push(&scratch[sent..n]);
                    }
                    Err(errno) if errno.would_block() => {
                        socket.end_writable = false;
                        socket.down.push(&scratch[..n]);
                    }
                    Err(_) => {
                        // Nobody reads. When the program is gone, what was lost makes the close a reset.
                        socket.down_closed = true;
                        socket.abort |= socket.end_hung_up && !socket.may_be_held();
                    }
                }
            }
            Err(errno) if errno.would_block() => socket.stack_readable = false,
            Err(errno) => {
                socket.stack_readable = false;
                socket.broken.get_or_insert(errno);
                return Moved::AsFarAsItGoes;
            }
        }
    }
}

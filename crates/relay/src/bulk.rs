//! Bulk data between two sockets of the kernel: by splice, without a copy in the relay.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use netkernel_service::Errno;
use netkernel_shm::fds;

use crate::sys;

/// A read of this many bytes says that more of them are worth a splice, which costs two system calls more.
pub const BULK: usize = 32 << 10;

/// Bytes of one splice.
const PIECE: usize = 128 << 10;
/// Empty pipes that are kept for the next time.
const IDLE: usize = 4;

#[derive(Debug)]
struct Pipe {
    reader: OwnedFd,
    writer: OwnedFd,
}

impl Pipe {
    fn new() -> io::Result<Pipe> {
        // A smaller pipe moves less at once.
        let (reader, writer) = fds::pipe(libc::O_CLOEXEC | libc::O_NONBLOCK, Some(2 * PIECE))?;
        Ok(Pipe { reader, writer })
    }
}

/// The pipes of a relay: a connection has one only while bytes stand in it.
#[derive(Debug, Default)]
pub struct Pipes {
    idle: Vec<Pipe>,
}

/// Bytes on their way, without a copy of them here.
#[derive(Debug)]
pub struct Piped {
    pipe: Pipe,
    left: usize,
}

impl Pipes {
    /// Takes what a socket has, up to [`PIECE`]; nothing left in it: the end. `None`: no pipe can be had.
    pub fn fill(&mut self, from: RawFd) -> Option<Result<Piped, Errno>> {
        let pipe = self.idle.pop().or_else(|| Pipe::new().ok())?;
        match splice(from, pipe.writer.as_raw_fd(), PIECE) {
            Ok(left) => Some(Ok(Piped { pipe, left })),
            Err(errno) => {
                self.give(pipe);
                Some(Err(errno))
            }
        }
    }

    /// Takes back an empty pipe.
    pub fn take_back(&mut self, piped: Piped) {
        if piped.left == 0 {
            self.give(piped.pipe);
        }
    }

    fn give(&mut self, pipe: Pipe) {
        if self.idle.len() < IDLE {
            self.idle.push(pipe);
        }
    }
}

impl Piped {
    pub fn len(&self) -> usize {
        self.left
    }

    pub fn is_empty(&self) -> bool {
        self.left == 0
    }

    /// Reader, writer, and how many bytes stand between them.
    pub fn parts(&self) -> (&OwnedFd, &OwnedFd, usize) {
        (&self.pipe.reader, &self.pipe.writer, self.left)
    }

    /// Of another relay's parts.
    pub fn of(reader: OwnedFd, writer: OwnedFd, left: usize) -> Piped {
        Piped { pipe: Pipe { reader, writer }, left }
    }

    /// Gives a socket what it takes: all, or until it is full. Errors: those of send(2).
    pub fn pour(&mut self, to: RawFd) -> Result<usize, Errno> {
        let given = splice(self.pipe.reader.as_raw_fd(), to, self.left)?;
        self.left -= given;
        Ok(given)
    }

    /// What could not be poured, for who needs the bytes themselves.
    pub fn read(self) -> Vec<u8> {
        let mut bytes = vec![0; self.left];
        let mut got = 0;
        while got < bytes.len() {
            let rest = &mut bytes[got..];
            // SAFETY: the buffer is valid for writes of its length. The pipe does not block.
            let n = unsafe { libc::read(self.pipe.reader.as_raw_fd(), rest.as_mut_ptr().cast(), rest.len()) };
            let Some(n) = usize::try_from(n).ok().filter(|&n| n > 0) else { break };
            got += n;
        }
        bytes.truncate(got);
        bytes
    }
}

fn splice(from: RawFd, to: RawFd, length: usize) -> Result<usize, Errno> {
    let flags = libc::SPLICE_F_NONBLOCK | libc::SPLICE_F_MOVE;
    // SAFETY: no offsets; the descriptors are open.
    let n = unsafe { libc::splice(from, std::ptr::null_mut(), to, std::ptr::null_mut(), length, flags) };
    if n < 0 { Err(sys::errno()) } else { Ok(n as usize) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use netkernel_shm::fds;

    #[test]
    fn bytes_are_moved_and_what_is_not_taken_is_kept() {
        let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let ((a, from), (to, b)) = (fds::pair(kind).unwrap(), fds::pair(kind).unwrap());
        sys::set_int_option(&to, libc::SO_SNDBUF, 1);
        let data: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        let mut pipes = Pipes::default();
        let mut buffer = vec![0; 1 << 20];
        for poured in [true, false] {
            assert_eq!(sys::send(&a, &data), Ok(data.len()));
            let (mut got, mut full) = (Vec::new(), 0);
            let mut piped = pipes.fill(from.as_raw_fd()).unwrap().unwrap();
            assert_eq!(piped.len(), data.len());
            while !piped.is_empty() && (poured || full == 0) {
                let left = piped.len();
                let given = piped.pour(to.as_raw_fd()).unwrap_or_else(|errno| {
                    assert!(errno.would_block(), "{errno:?}");
                    0
                });
                assert_eq!(piped.len(), left - given);
                full += usize::from(given < left);
                while let Ok(n) = sys::receive(&b, &mut buffer, 0) {
                    got.extend(&buffer[..n]);
                }
            }
            assert!(full > 0);
            match poured {
                true => pipes.take_back(piped),
                false => got.extend(piped.read()),
            }
            assert!(got == data);
        }
        assert_eq!(pipes.fill(from.as_raw_fd()).unwrap().unwrap_err(), Errno::AGAIN);
        drop(a);
        let end = pipes.fill(from.as_raw_fd()).unwrap().unwrap();
        assert!(end.is_empty());
        pipes.take_back(end);
        assert!(pipes.idle.len() <= IDLE);
    }
}

//! What requests come over: a Unix socket, or TLS over TCP. No read or write goes past a deadline, however little comes at a time.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use netkernel_shm::fds;

/// Sockets that can be waited for as long as one likes.
pub(crate) trait Socket: Read + Write {
    fn wait_at_most(&self, time: Duration) -> io::Result<()>;
}

impl Socket for UnixStream {
    fn wait_at_most(&self, time: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(time))?;
        self.set_write_timeout(Some(time))
    }
}

impl Socket for TcpStream {
    fn wait_at_most(&self, time: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(time))?;
        self.set_write_timeout(Some(time))
    }
}

/// A socket with a deadline. Errors of kind TimedOut: it has passed.
#[derive(Debug)]
pub(crate) struct Timed<S> {
    pub socket: S,
    deadline: Instant,
}

impl<S: Socket> Timed<S> {
    pub fn new(socket: S, time: Duration) -> Timed<S> {
        Timed { socket, deadline: Instant::now() + time }
    }

    fn arm(&self) -> io::Result<()> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.socket.wait_at_most(left)
    }
}

/// A socket's own word for "it took too long" is another one.
fn late<T>(result: io::Result<T>) -> io::Result<T> {
    result.map_err(|e| if e.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { e })
}

impl<S: Socket> Read for Timed<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.arm()?;
        late(self.socket.read(buffer))
    }
}

impl<S: Socket> Write for Timed<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.arm()?;
        late(self.socket.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

/// A connection that HTTP is spoken over.
pub(crate) trait Wire: Read + Write + Send + std::fmt::Debug {
    /// All reads and writes from now on end within this time, together.
    fn allow(&mut self, time: Duration);
    /// Sends the beginning of `message` with descriptors. Returns how much went.
    fn send_descriptors(&mut self, message: &[u8], descriptors: &[RawFd]) -> io::Result<usize>;
    /// As `read`, with descriptors that came.
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)>;
}

impl Wire for Timed<UnixStream> {
    fn allow(&mut self, time: Duration) {
        self.deadline = Instant::now() + time;
    }

    fn send_descriptors(&mut self, message: &[u8], descriptors: &[RawFd]) -> io::Result<usize> {
        self.arm()?;
        late(fds::send(self.socket.as_raw_fd(), message, descriptors, 0))
    }

    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        self.arm()?;
        late(fds::receive(self.socket.as_raw_fd(), buffer, 0))
    }
}

impl<C, D> Wire for rustls::StreamOwned<C, Timed<TcpStream>>
where
    C: std::ops::DerefMut<Target = rustls::ConnectionCommon<D>> + Send + std::fmt::Debug,
    D: rustls::SideData + std::fmt::Debug,
{
    fn allow(&mut self, time: Duration) {
        self.sock.deadline = Instant::now() + time;
    }

    fn send_descriptors(&mut self, _: &[u8], _: &[RawFd]) -> io::Result<usize> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "descriptors do not go over TCP"))
    }

    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        Ok((self.read(buffer)?, Vec::new()))
    }
}

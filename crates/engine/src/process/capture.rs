//! Captures of an NSM in a process of its own: its worker writes pcapng to a pipe, and the engine takes the packets from there.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;

use netkernel_capture::{Session, pcapng};
use netkernel_shm::fds;

/// How soon the end of a capture is noticed, in milliseconds.
const LOOK_MS: i32 = 200;
/// Of a block beyond its packet, at most.
const BLOCK: usize = 64 << 10;

/// The end of a pipe from which a thread takes packets of stack `nsm`, until the session is over or the worker is gone.
pub fn pipe(session: &Arc<Session>, nsm: usize) -> io::Result<OwnedFd> {
    let (reader, writer) = fds::pipe(libc::O_CLOEXEC, Some(1 << 20))?;
    let session = Arc::clone(session);
    let take = move || {
        if let Err(error) = take(&session, nsm, File::from(reader)) {
            log::warn!("what the process of a stack captures is not understood, and left out: {error}");
        }
    };
    std::thread::Builder::new().name("nk-captured".into()).spawn(take)?;
    Ok(writer)
}

fn take(session: &Session, nsm: usize, mut pipe: File) -> io::Result<()> {
    let mut reader = pcapng::Reader::default();
    let mut bytes = vec![0; 256 << 10];
    while !session.is_over() {
        let mut one = libc::pollfd { fd: pipe.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, valid for reads and writes.
        if unsafe { libc::poll(&mut one, 1, LOOK_MS) } <= 0 {
            continue;
        }
        let n = pipe.read(&mut bytes)?;
        if n == 0 {
            break;
        }
        let tell = |packet: pcapng::Packet<'_>| session.taken(nsm as u32, packet);
        reader
            .take(&bytes[..n], session.snap() + BLOCK, tell)
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    }
    Ok(())
}

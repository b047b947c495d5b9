//! Kernel sockets that were taken out of a stack and handed over to processes of the guest.
//!
//! The engine keeps one descriptor for each as long as the guest has the socket's placeholder: another process that still
//! holds that gets the socket too when it comes to use it. What a guest can do with such a socket (let its close wait, by
//! SO_LINGER) must not stop a switch thread, so that a thread of the guest's own closes them.

use std::collections::HashMap;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::mpsc::{Sender, channel};

use netkernel_service::{Errno, Violation};
use netkernel_shm::fds;

/// The handed-over sockets of one guest, by id.
#[derive(Default)]
pub(crate) struct Handed {
    sockets: HashMap<u32, OwnedFd>,
    /// To the thread that closes them; it ends with this.
    closer: Option<Sender<OwnedFd>>,
}

impl Handed {
    /// A descriptor for socket `id`; `first` takes it out of the stack when that was not done before. Errors: an errno.
    pub fn give(
        &mut self,
        id: u32,
        first: impl FnOnce() -> Result<Result<OwnedFd, Errno>, Violation>,
    ) -> Result<Result<OwnedFd, i32>, Violation> {
        if let Some(fd) = self.sockets.get(&id) {
            return Ok(fd.try_clone().map_err(|e| e.raw_os_error().unwrap_or(libc::ENFILE)));
        }
        if self.closer.is_none() {
            let (sender, receiver) = channel::<OwnedFd>();
            let closer = move || receiver.into_iter().for_each(drop);
            let thread =
                std::thread::Builder::new().name("nk-closer".into()).stack_size(64 << 10).spawn(closer);
            if thread.is_err() {
                return Ok(Err(libc::EAGAIN));
            }
            self.closer = Some(sender);
        }
        let fd = match first()? {
            Ok(fd) => fd,
            Err(Errno(errno)) => return Ok(Err(errno)),
        };
        let copy = fd.try_clone().map_err(|e| e.raw_os_error().unwrap_or(libc::ENFILE));
        self.sockets.insert(id, fd);
        Ok(copy)
    }

    /// No process has the placeholder any more.
    pub fn close(&mut self, id: u32) {
        if let (Some(fd), Some(closer)) = (self.sockets.remove(&id), &self.closer) {
            let _ = closer.send(fd);
        }
    }
}

impl Drop for Handed {
    fn drop(&mut self) {
        if let Some(closer) = &self.closer {
            for (_, fd) in self.sockets.drain() {
                let _ = closer.send(fd);
            }
        }
    }
}

/// Answers on the guest's pair, should anybody still listen.
pub(crate) fn answer(pair: &OwnedFd, result: Result<OwnedFd, i32>) {
    let (errno, fd) = match result {
        Ok(fd) => (0, Some(fd)),
        Err(errno) => (errno, None),
    };
    let list: Vec<i32> = fd.iter().map(|fd| fd.as_raw_fd()).collect();
    let _ = fds::send(pair.as_raw_fd(), &errno.to_le_bytes(), &list, libc::MSG_DONTWAIT);
}

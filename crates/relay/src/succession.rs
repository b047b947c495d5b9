//! A relay whose guest is put on another stack: new sockets are of that one, those that are open stay with their own until they end.

use std::os::fd::AsRawFd as _;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use netkernel_agent::Policy;
use netkernel_service::{Close, Several, Stack};

use crate::relay::{Link, Relay, STACK};

/// Another stack for new sockets.
pub struct Successor {
    pub name: String,
    pub stack: Box<dyn Stack>,
    pub policy: Policy,
}

/// What other threads have for a relay, and what they may know of its stacks.
#[derive(Default)]
pub(crate) struct Succession {
    waiting: Mutex<Vec<(Successor, Sender<()>)>>,
    /// Stacks that it had before and that have sockets.
    elders: AtomicUsize,
}

/// A stack as it is called, and what becomes of a program's own congestion control there.
#[derive(Clone)]
pub(crate) struct Rules {
    pub name: String,
    pub policy: Policy,
}

impl Link {
    /// Holds for all sockets that are made once it is answered. No answer comes when the relay is over.
    pub fn succeed(&self, successor: Successor) -> Receiver<()> {
        let (done, receiver) = channel();
        self.succession.waiting.lock().unwrap_or_else(PoisonError::into_inner).push((successor, done));
        let one = 1u64;
        // SAFETY: eight bytes, valid for reads; the eventfd is non-blocking.
        unsafe { libc::write(self.wake.as_raw_fd(), (&raw const one).cast(), 8) };
        receiver
    }

    /// Whether sockets are open of stacks that the guest was on before.
    pub fn has_elders(&self) -> bool {
        self.succession.elders.load(Relaxed) > 0
    }
}

impl Relay {
    pub(crate) fn succeed_all(&mut self) {
        let succession = Arc::clone(&self.link.succession);
        let waiting = std::mem::take(&mut *succession.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        for (successor, done) in waiting {
            self.succeed(successor);
            let _ = done.send(());
        }
    }

    fn succeed(&mut self, new: Successor) {
        let Several { stacks, .. } = &mut self.stack;
        let free = (1..stacks.len()).find(|place| stacks[*place].is_none()).unwrap_or(stacks.len());
        let wake = new.stack.wake_fd();
        let watched = wake.is_none_or(|fd| self.poll.add(fd, libc::EPOLLIN, STACK).is_ok());
        if free >= netkernel_service::MOST_STACKS || !watched {
            log::error!(guest = self.start.guest; "guest {}: its relay has no room for one more stack", self.start.guest);
            return;
        }
        if free == stacks.len() {
            stacks.push(None);
            self.rules.push(self.rules[0].clone());
        }
        stacks[free] = stacks[0].replace(new.stack);
        self.rules[free] =
            std::mem::replace(&mut self.rules[0], Rules { name: new.name, policy: new.policy });
        for socket in self.sockets.iter_mut().flatten().filter(|socket| socket.handle.place() == 0) {
            match socket.handle.at(free) {
                Some(handle) => socket.handle = handle,
                // No stack has so many.
                None => self.stack.close(socket.handle, Close::Abort),
            }
        }
        self.leave_elders();
    }

    /// Forgets stacks that have no socket any more.
    pub(crate) fn leave_elders(&mut self) {
        let mut used = vec![false; self.stack.stacks.len()];
        for socket in self.sockets.iter().flatten() {
            if let Some(used) = used.get_mut(socket.handle.place()) {
                *used = true;
            }
        }
        for (place, used) in used.iter().enumerate().skip(1).filter(|(_, used)| !**used) {
            let _ = used;
            if let Some(stack) = self.stack.stacks[place].take()
                && let Some(fd) = stack.wake_fd()
            {
                self.poll.remove(fd);
            }
        }
        while self.stack.stacks.len() > 1 && self.stack.stacks.last().is_some_and(Option::is_none) {
            self.stack.stacks.pop();
            self.rules.pop();
        }
        let all = || self.stack.stacks.iter().flatten();
        self.stack_wakes = all().all(|stack| stack.wake_fd().is_some());
        self.link.succession.elders.store(all().count() - 1, Relaxed);
    }
}

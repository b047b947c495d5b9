//! Whether connections are let in.
//!
//! While the process executes another program in its place nobody may come: the kernel makes no threads then (clone(2) fails with EAGAIN), and
//! who came would get no answer. They wait in the listening socket, which the next program has.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

#[derive(Debug, Default)]
pub(crate) struct Door {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    /// Who was let in and has not got the first answer.
    unanswered: usize,
}

/// A connection that waits for its first answer, until this is dropped.
#[derive(Debug)]
pub(crate) struct Entered(Arc<Door>);

/// Nobody is let in, until this is dropped.
#[derive(Debug)]
pub struct Closed<'a>(&'a Door);

impl Door {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while it is closed. To be called before the connection is accepted.
    pub fn enter(self: &Arc<Self>) -> Entered {
        let open = self.changed.wait_while(self.state(), |state| state.closed);
        open.unwrap_or_else(PoisonError::into_inner).unanswered += 1;
        Entered(Arc::clone(self))
    }

    /// Those inside get their first answer before, if they do not take longer than `patience`.
    pub fn close(&self, patience: Duration) -> Closed<'_> {
        let mut state = self.state();
        state.closed = true;
        let _ = self.changed.wait_timeout_while(state, patience, |state| state.unanswered > 0);
        Closed(self)
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.state().unanswered -= 1;
        self.0.changed.notify_all();
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.0.state().closed = false;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    #[test]
    fn who_is_inside_is_answered_and_who_comes_waits() {
        let door = Arc::new(Door::default());
        let first = door.enter();
        let (say, said) = channel();
        thread::scope(|scope| {
            let closing = scope.spawn(|| door.close(LONG));
            while !door.state().closed {
                thread::yield_now();
            }
            assert!(!closing.is_finished(), "somebody waits for an answer");
            let second = scope.spawn(|| {
                let entered = door.enter();
                say.send(()).unwrap();
                entered
            });
            drop(first);
            let closed = closing.join().unwrap();
            assert!(said.try_recv().is_err());
            assert_eq!(door.state().unanswered, 0);
            drop(closed);
            said.recv_timeout(LONG).unwrap();
            drop(second.join().unwrap());
        });
        // One that says nothing is not waited for any longer.
        let _silent = door.enter();
        drop(door.close(Duration::from_millis(1)));
        drop(door.enter());
    }
}

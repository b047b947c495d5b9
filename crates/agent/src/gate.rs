//! Lets a thread be stopped between two pieces of work: an agent with no call received and not answered, for one.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Passed by one thread for each piece of work.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    busy: bool,
}

/// A call is under way while this lives.
pub struct Passed<'a>(&'a Gate);

impl Gate {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while the gate is closed.
    pub fn pass(&self) -> Passed<'_> {
        let closed = self.changed.wait_while(self.state(), |state| state.closed);
        closed.unwrap_or_else(PoisonError::into_inner).busy = true;
        Passed(self)
    }

    /// Nothing begins any more. False: something is still under way after `patience`, and the gate is open.
    pub fn close(&self, patience: Duration) -> bool {
        let mut state = self.state();
        state.closed = true;
        let waited = self.changed.wait_timeout_while(state, patience, |state| state.busy);
        let over = !waited.unwrap_or_else(PoisonError::into_inner).0.busy;
        if !over {
            self.open();
        }
        over
    }

    pub fn open(&self) {
        self.state().closed = false;
        self.changed.notify_all();
    }
}

impl Drop for Passed<'_> {
    fn drop(&mut self) {
        self.0.state().busy = false;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    #[test]
    fn a_closed_gate_waits_for_the_call_under_way_and_lets_none_begin() {
        let gate = Arc::new(Gate::default());
        let passed = gate.pass();
        assert!(!gate.close(Duration::from_millis(1)), "a call is under way");
        drop(passed);
        drop(gate.pass());
        assert!(gate.close(Duration::from_secs(10)));
        let (sender, receiver) = channel();
        let own = Arc::clone(&gate);
        let agent = std::thread::spawn(move || {
            let _passed = own.pass();
            sender.send(()).unwrap();
        });
        assert!(receiver.recv_timeout(Duration::from_millis(50)).is_err(), "it begins at a closed gate");
        gate.open();
        receiver.recv_timeout(Duration::from_secs(10)).unwrap();
        agent.join().unwrap();
    }
}

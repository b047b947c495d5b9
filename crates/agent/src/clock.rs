//! Processor time of one thread, which others may ask for while it runs and afterwards.

use std::sync::Mutex;

/// Nothing until [`ThreadClock::of_this_thread`].
#[derive(Debug, Default)]
pub struct ThreadClock(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Thread id; 0: none runs.
    thread: i32,
    /// Of threads that are over.
    over_ns: u64,
}

/// While it lives, its thread's clock counts.
#[derive(Debug)]
pub struct Running<'a>(&'a ThreadClock);

impl ThreadClock {
    /// From now on the calling thread's.
    pub fn of_this_thread(&self) -> Running<'_> {
        // SAFETY: cannot fail and touches no memory.
        self.lock().thread = unsafe { libc::gettid() };
        Running(self)
    }

    /// Nanoseconds.
    pub fn ns(&self) -> u64 {
        // Under the lock a thread that runs cannot end, and its id cannot become another's.
        let state = self.lock();
        state.over_ns + if state.thread == 0 { 0 } else { thread_cpu_ns(state.thread) }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.over_ns += thread_cpu_ns(state.thread);
        state.thread = 0;
    }
}

/// Processor time of a thread of this process, in nanoseconds; 0: there is no such thread.
fn thread_cpu_ns(thread: i32) -> u64 {
    // clock_gettime(2), dynamic clocks: CPUCLOCK_PERTHREAD and CPUCLOCK_SCHED.
    let clock = (!thread << 3) | 6;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: time is valid for writes.
    if unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
        return 0;
    }
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_threads_time_is_known_while_it_runs_and_afterwards() {
        let clock = std::sync::Arc::new(ThreadClock::default());
        assert_eq!(clock.ns(), 0);
        let own = std::sync::Arc::clone(&clock);
        let (begun, wait) = std::sync::mpsc::channel();
        let (go, end) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let _running = own.of_this_thread();
            let until = thread_cpu_ns(own.lock().thread) + 20_000_000;
            while own.ns() < until {}
            begun.send(()).unwrap();
            let _ = end.recv();
        });
        wait.recv().unwrap();
        let running = clock.ns();
        assert!(running >= 20_000_000, "{running}");
        drop(go);
        thread.join().unwrap();
        let over = clock.ns();
        assert!(over >= running && over == clock.ns(), "{running} {over}");
    }
}

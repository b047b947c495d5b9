//! Answers that nobody got: a signal interrupted the call after it was carried out.
//!
//! The kernel makes such a call again (SA_RESTART), or its program does, which saw EINTR. Carried out a second time, connect would say
//! EISCONN, bind EINVAL, and a datagram would go twice. So the answer is kept for a moment, for the same thread and the same call.
//! What is read is not kept: its bytes stand in the program's memory, which may be something else by now.

use std::collections::HashMap;

use netkernel_agent::notify::Notification;
use netkernel_service::Errno;

/// A signal handler has run by then, or the number may be another thread's.
const KEPT_NS: u64 = 1_000_000_000;
/// With so many, those that are too old are dropped.
const MANY: usize = 64;

#[derive(Default)]
pub(crate) struct LostAnswers(HashMap<u32, Lost>);

struct Lost {
    call: Notification,
    answer: Result<i64, Errno>,
    at_ns: u64,
}

impl LostAnswers {
    /// `answer` did not reach who made the call.
    pub fn keep(&mut self, call: &Notification, answer: Result<i64, Errno>, now_ns: u64) {
        let changes = match i64::from(call.nr) {
            libc::SYS_connect => true,
            libc::SYS_bind | libc::SYS_sendto | libc::SYS_sendmsg | libc::SYS_sendmmsg => answer.is_ok(),
            _ => false,
        };
        if !changes {
            return;
        }
        if self.0.len() >= MANY {
            self.0.retain(|_, lost| now_ns.saturating_sub(lost.at_ns) < KEPT_NS);
        }
        self.0.insert(call.pid, Lost { call: *call, answer, at_ns: now_ns });
    }

    /// The answer of `call`, if that is one made again. Whatever else its thread calls, it is over.
    pub fn take(&mut self, call: &Notification, now_ns: u64) -> Option<Result<i64, Errno>> {
        if self.0.is_empty() {
            return None;
        }
        let lost = self.0.remove(&call.pid)?;
        let same = lost.call.nr == call.nr
            && lost.call.arguments == call.arguments
            && lost.call.instruction_pointer == call.instruction_pointer;
        (same && now_ns.saturating_sub(lost.at_ns) < KEPT_NS).then_some(lost.answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(pid: u32, nr: i64, number: u64) -> Notification {
        Notification { pid, nr: nr as i32, arguments: [number, 0, 0, 0, 0, 0], ..Notification::default() }
    }

    #[test]
    fn the_same_call_gets_the_same_answer_once() {
        let mut lost = LostAnswers::default();
        let connect = call(7, libc::SYS_connect, 3);
        lost.keep(&connect, Err(Errno(libc::EINPROGRESS)), 5);
        assert!(lost.take(&call(8, libc::SYS_connect, 3), 6).is_none());
        assert_eq!(lost.take(&connect, 6), Some(Err(Errno(libc::EINPROGRESS))));
        assert!(lost.take(&connect, 7).is_none());
    }

    #[test]
    fn another_call_or_a_late_one_does_not() {
        let mut lost = LostAnswers::default();
        for other in [call(7, libc::SYS_connect, 4), call(7, libc::SYS_bind, 3)] {
            lost.keep(&call(7, libc::SYS_connect, 3), Ok(0), 0);
            assert!(lost.take(&other, 1).is_none());
            assert!(lost.take(&call(7, libc::SYS_connect, 3), 2).is_none(), "its thread went on");
        }
        lost.keep(&call(7, libc::SYS_bind, 3), Ok(0), 0);
        assert!(lost.take(&call(7, libc::SYS_bind, 3), KEPT_NS).is_none());
    }

    #[test]
    fn what_changes_nothing_is_made_again() {
        let mut lost = LostAnswers::default();
        for (nr, answer) in [
            (libc::SYS_getsockname, Ok(0)),
            (libc::SYS_recvfrom, Ok(5)),
            (libc::SYS_sendto, Err(Errno(libc::EAGAIN))),
            (libc::SYS_bind, Err(Errno(libc::EADDRINUSE))),
        ] {
            lost.keep(&call(1, nr, 3), answer, 0);
            assert!(lost.take(&call(1, nr, 3), 1).is_none(), "{nr}");
        }
    }

    #[test]
    fn they_do_not_pile_up() {
        let mut lost = LostAnswers::default();
        for pid in 0..10_000 {
            lost.keep(&call(pid, libc::SYS_bind, 3), Ok(0), u64::from(pid) * KEPT_NS / 8);
        }
        assert!(lost.0.len() <= MANY);
    }
}

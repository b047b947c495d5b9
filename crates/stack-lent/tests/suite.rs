//! The conformance suite of stacks, against stacks that another thread drives as a switch thread would.

use std::sync::Arc;
use std::sync::mpsc::channel;

use netkernel_service::{Readiness, Stack, now_ns};
use netkernel_stack_kernel::{KernelConfig, KernelStack};
use netkernel_stack_lent::{Lender, Lent, lend};
use netkernel_stack_shm::{Hub, Settings, ShmStack};
use netkernel_stack_smoltcp::{SmoltcpConfig, SmoltcpStack};
use netkernel_stack_suite::{Rig, Subject};

/// Drives the stack until the borrower is dropped.
fn drive(mut lender: Lender, mut stack: Box<dyn Stack>) {
    let mut ready = Vec::new();
    while !lender.is_over() {
        let timeout =
            stack.deadline_ns().map_or(-1, |due| due.saturating_sub(now_ns()).div_ceil(1_000_000) as i32);
        let entry = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut entries = [entry(lender.bell()), entry(stack.wake_fd().unwrap_or(-1))];
        // SAFETY: two entries, valid during the call.
        unsafe { libc::poll(entries.as_mut_ptr(), 2, timeout) };
        lender.serve(&mut *stack, 4);
        stack.poll(&mut ready, 16);
        ready.drain(..).for_each(|report| lender.report(report));
    }
    assert_eq!(lender.sockets(), 0);
}

/// Borrows what `make` makes from a thread of its own, which ends with the borrower.
fn borrow(make: impl FnOnce() -> Box<dyn Stack> + Send + 'static) -> Lent {
    let (lent, borrowed) = channel();
    std::thread::spawn(move || {
        let (lender, half) = lend(1 << 31).unwrap();
        // The keys are guest 0's, which must belong to somebody to be joined in memory.
        let mut stack = make();
        stack.guest(0, 1);
        lent.send(half).unwrap();
        drive(lender, stack);
    });
    borrowed.recv().unwrap()
}

fn kernel() -> Box<dyn Stack> {
    Box::new(KernelStack::new(KernelConfig::default()).unwrap())
}

fn loopback(make: impl FnOnce() -> Box<dyn Stack> + Send + 'static) -> Subject {
    // A host may have no IPv6 on its loopback.
    let v6 = std::net::TcpListener::bind("[::1]:0").is_ok().then(|| "::1".parse().unwrap());
    Subject { stack: Box::new(borrow(make)), v4: [127, 0, 0, 1].into(), v6 }
}

fn shm() -> Subject {
    loopback(|| Box::new(ShmStack::new(kernel(), Arc::new(Hub::default()), Settings::default()).unwrap()))
}

mod of_the_kernel {
    netkernel_stack_suite::tests!(|| super::loopback(super::kernel));
}

mod of_shm {
    netkernel_stack_suite::tests!(super::shm);
}

mod of_smoltcp {
    use super::*;

    fn make() -> Subject {
        let config = SmoltcpConfig {
            addresses: vec!["10.9.0.2/24".parse().unwrap(), "fd00:9::2/64".parse().unwrap()],
            ..SmoltcpConfig::default()
        };
        let stack = borrow(move || Box::new(SmoltcpStack::new(&config).unwrap()));
        Subject { stack: Box::new(stack), v4: [10, 9, 0, 2].into(), v6: Some("fd00:9::2".parse().unwrap()) }
    }

    netkernel_stack_suite::tests!(make);
}

#[test]
fn what_is_offered_stays_while_the_borrowers_memory_changes() {
    let mut rig = Rig::new(shm());
    let (client, server) = rig.pair();
    assert!(rig.stack.way(client).unwrap().starts_with("in memory"));
    let segments = |bytes: &mut [u8]| {
        // SAFETY: the callers' buffers outlive the calls that they make with this.
        let first = unsafe { netkernel_service::GuestBytes::new(bytes.as_mut_ptr(), bytes.len()) };
        netkernel_service::Segments { first, second: netkernel_service::GuestBytes::EMPTY }
    };
    // Too much for the link's queue: the stack looks at it where it is.
    let mut bytes = vec![7; 100_000];
    let sent = rig.stack.send(client, &segments(&mut bytes), Default::default());
    assert!(sent.is_ok_and(|n| n < bytes.len()) || sent.is_err_and(|errno| errno.would_block()));
    bytes.fill(8);
    drop(bytes);
    rig.stack.close(client, netkernel_service::Close::Graceful);
    let mut all = Vec::new();
    rig.until("all of it comes", |rig| {
        let mut piece = vec![0; 30_000];
        match rig.stack.recv(server, &segments(&mut piece)) {
            Ok(received) => {
                all.extend_from_slice(&piece[..received.bytes]);
                (received.bytes == 0).then_some(())
            }
            Err(errno) => {
                assert!(errno.would_block());
                None
            }
        }
    });
    assert!(all.len() == 100_000 && all.iter().all(|&byte| byte == 7), "{}", all.len());
}

#[test]
fn a_lender_that_is_gone_answers_nothing_and_nobody_waits() {
    let (lender, mut lent) = lend(1 << 31).unwrap();
    let asks = std::thread::spawn(move || {
        // Nobody serves this call.
        let errno = lent.open(1 << 32 | 5, libc::AF_INET, libc::SOCK_STREAM, 0);
        (errno, lent)
    });
    // Either before the call or while it waits.
    drop(lender);
    let (opened, mut lent) = asks.join().unwrap();
    assert_eq!(opened.unwrap_err().0, libc::ENETDOWN);
    assert_eq!(lent.listen(netkernel_service::Handle(1), 5).unwrap_err().0, libc::ENETDOWN);
}

#[test]
fn sockets_of_a_lender_that_ends_are_told_as_broken() {
    let mut stack = kernel();
    let (mut lender, mut lent) = lend(1 << 31).unwrap();
    let asks = std::thread::spawn(move || {
        lent.open(1 << 32 | 5, libc::AF_INET, libc::SOCK_STREAM, 0).unwrap();
        lent
    });
    while lender.sockets() == 0 {
        lender.serve(&mut *stack, 4);
        std::thread::yield_now();
    }
    let mut lent = asks.join().unwrap();
    lender.end(&mut *stack);
    assert_eq!(lender.sockets(), 0);
    let mut ready = Vec::new();
    lent.poll(&mut ready, 8);
    assert_eq!(ready.len(), 1);
    assert!(ready[0].key == 1 << 32 | 5 && ready[0].readiness.has(Readiness::ERROR));
}

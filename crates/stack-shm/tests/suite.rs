//! The conformance suite of stacks, against guests that are joined in memory, in front of the host's kernel.

use std::sync::Arc;

use netkernel_service::Stack;
use netkernel_stack_kernel::{KernelConfig, KernelStack};
use netkernel_stack_shm::{Hub, Settings, ShmStack};
use netkernel_stack_suite::Subject;

fn make() -> Subject {
    // A host may have no IPv6 on its loopback.
    let v6 = std::net::TcpListener::bind("[::1]:0").is_ok().then(|| "::1".parse().unwrap());
    let kernel = Box::new(KernelStack::new(KernelConfig::default()).unwrap());
    let mut stack = ShmStack::new(kernel, Arc::new(Hub::default()), Settings::default()).unwrap();
    // The suite's keys are those of guest 0, which must belong to somebody to be joined.
    stack.guest(0, 1);
    Subject { stack: Box::new(stack), v4: [127, 0, 0, 1].into(), v6 }
}

netkernel_stack_suite::tests!(make);

/// What the suite tests is the memory, not the kernel behind it.
#[test]
fn streams_of_the_suite_are_joined_in_memory() {
    let mut rig = netkernel_stack_suite::Rig::new(make());
    let (client, server) = rig.pair();
    for end in [client, server] {
        let way = rig.stack.way(end).unwrap();
        assert!(way.starts_with("in memory"), "{way}");
    }
}

//! The conformance suite of stacks, against the host's kernel over its loopback.

use netkernel_stack_kernel::{KernelConfig, KernelStack};
use netkernel_stack_suite::Subject;

fn make() -> Subject {
    // A host may have no IPv6 on its loopback.
    let v6 = std::net::TcpListener::bind("[::1]:0").is_ok().then(|| "::1".parse().unwrap());
    let stack = KernelStack::new(KernelConfig::default()).unwrap();
    Subject { stack: Box::new(stack), v4: [127, 0, 0, 1].into(), v6 }
}

netkernel_stack_suite::tests!(make);

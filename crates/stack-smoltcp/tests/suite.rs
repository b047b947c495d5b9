//! The conformance suite of stacks, against smoltcp that talks to itself without a wire.

use netkernel_stack_smoltcp::{SmoltcpConfig, SmoltcpStack};
use netkernel_stack_suite::Subject;

fn make() -> Subject {
    let config = SmoltcpConfig {
        addresses: vec!["10.9.0.2/24".parse().unwrap(), "fd00:9::2/64".parse().unwrap()],
        ..SmoltcpConfig::default()
    };
    Subject {
        stack: Box::new(SmoltcpStack::new(&config).unwrap()),
        v4: [10, 9, 0, 2].into(),
        v6: Some("fd00:9::2".parse().unwrap()),
    }
}

netkernel_stack_suite::tests!(make);

//! One conformance suite for stacks.
//!
//! What ServiceLib relies on, as cases that a stack's crate runs against itself: a stack talks to itself by one of its own
//! addresses. Linux is the specification; every case passes with the kernel stack. A crate that has a stack writes
//!
//! ```text
//! netkernel_stack_suite::tests!(|| Subject { stack: Box::new(MyStack::new()?), v4: [10, 9, 0, 2].into(), v6: None });
//! ```
//!
//! in a file of its `tests` directory. Every wait has a watchdog, and none is timed.

mod cases;
mod rig;

use std::net::{Ipv4Addr, Ipv6Addr};

use netkernel_service::Stack;

pub use cases::{CASES, run};
pub use rig::Rig;

/// A stack, and addresses by which it reaches itself.
pub struct Subject {
    pub stack: Box<dyn Stack>,
    pub v4: Ipv4Addr,
    /// `None`: it has no IPv6.
    pub v6: Option<Ipv6Addr>,
}

/// A test for each case. The argument makes a [`Subject`], a new one for each.
#[macro_export]
macro_rules! tests {
    ($make:expr) => {
        $crate::tests!(@ $make;
            connecting_names_both_ends connecting_to_nobody_is_refused bytes_arrive_in_order_through_full_buffers
            readiness_is_told_again_after_would_block one_direction_ends_before_the_other an_abort_is_a_reset
            a_graceful_close_delivers data_for_a_closed_socket_is_a_reset a_full_backlog_holds_connects_back
            a_listener_that_closes_resets_what_waits ports_are_taken_once addresses_must_be_ones_own
            a_port_is_found_for_who_has_none what_a_socket_cannot_do streams_can_be_disconnected
            options_are_kept_and_unknown_ones_refused datagrams_keep_their_bounds_and_senders
            a_connected_datagram_socket_hears_its_peer_only datagrams_to_nobody_are_refused
            datagrams_have_a_largest_size an_ipv6_socket_serves_both_families a_closed_handle_is_nothing
            datagrams_are_cut_to_what_there_is_room_for a_receiver_that_does_not_read_holds_nobody_up
            runs_of_memory_of_any_shape memory_that_changes_under_ones_feet addresses_of_any_bytes calls_in_any_order
            nothing_to_do_lets_the_engine_sleep one_who_stops_reading_sees_the_end
            less_may_be_offered_than_before
        );
    };
    (@ $make:expr; $($case:ident)*) => {
        $(#[test]
        fn $case() {
            $crate::run(stringify!($case), $make);
        })*

        #[test]
        fn every_case_of_the_suite_is_run() {
            let here = [$(stringify!($case)),*];
            for (name, _) in $crate::CASES {
                assert!(here.contains(name), "{name} is not run");
            }
        }
    };
}

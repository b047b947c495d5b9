//! GuestLib, preloaded: turns the libc socket calls of an unmodified program into queue elements.
//!
//! `hooks` are the exported symbols, thin: each finds out whether a descriptor is a guest socket (one load) and either
//! serves the call here or passes it on to the next definition of the symbol. What serves: `socket` (calls on one socket),
//! `epoll`, `poll`, `options`; what they stand on: `guest` (the process's view of its guest), `table` (descriptors),
//! `queue` (jobs and sends), `wait` (sleeping), `next` (the symbols behind ours), `sys` (raw system calls).

mod epoll;
mod guest;
mod handover;
mod hooks;
mod next;
mod offer;
mod options;
mod pair;
mod passing;
mod poll;
mod queue;
mod socket;
mod spare;
mod sys;
mod table;
mod target;
mod wait;

/// The library's own heap: nothing here may depend on, or disturb, the program's malloc.
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

/// Runs when the loader has mapped the library, before the program's own constructors.
extern "C" fn constructor() {
    guest::attach();
}

/// Runs when the program exits in order.
extern "C" fn destructor() {
    queue::settle();
}

#[used]
#[unsafe(link_section = ".fini_array")]
static DESTRUCTOR: extern "C" fn() = destructor;

#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = constructor;

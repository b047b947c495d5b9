//! What a stack leaves that is more than descriptors, to the program that its process executes next.

use std::os::fd::RawFd;

/// A guest's sockets of one stack. Asked when all threads stand still: until then, stacks of other threads may change it.
pub trait Remains: Send {
    /// A text for [`Stack::take_up`](crate::Stack::take_up), and the descriptors that it names.
    fn written(&self) -> (String, Vec<RawFd>);
}

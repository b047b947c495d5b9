//! Buffers of connections that carry much.

use crate::relay::Relay;
use crate::sys;

/// Of the program's end, once it sent [`MUCH`]. With less the program and the relay wait for each other more often; with more,
/// what waits is in no cache any more when it is copied. The kernel doubles it, and cuts it to `net.core.wmem_max`.
const PROGRAM_BUFFER: i32 = 416 << 10;
/// Bytes.
const MUCH: u64 = 1 << 20;

impl Relay {
    /// The connection carried something. Its program's end gets more room once it is seen to send much: until then a small
    /// buffer is better, which a connect that does not wait has to fill.
    pub(crate) fn tune(&mut self, id: u32) {
        let Some(Some(socket)) = self.sockets.get_mut(id as usize) else { return };
        if socket.tuned || socket.bytes_out < MUCH || !socket.is_stream() {
            return;
        }
        socket.tuned = true;
        let (inode, (pid, number)) = (socket.inode, socket.holder);
        // Whoever closed that number, or passed the socket on, keeps what there is.
        if let Ok(theirs) = self.threads.descriptor(pid, number, inode) {
            sys::set_int_option(&theirs, libc::SO_SNDBUF, PROGRAM_BUFFER);
        }
    }
}

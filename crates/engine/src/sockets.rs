//! One list of the sockets of guests, whatever their attachment and stack.

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, OwnedFd};

use netkernel_agent::{Census, Processes, process_name};
use netkernel_service::{Handle, SocketAddress, SocketInfo, Stack};

use netkernel_shm::fds;

use crate::status::SocketStatus;

/// Sockets that a switch thread tells of in one go: each costs it about six system calls.
pub(crate) const LIST_BATCH: usize = 128;

/// A queued socket: what ServiceLib knows of it, and what its stack does.
pub(crate) fn queued(guest: u32, socket: SocketInfo, stack: &mut dyn Stack) -> SocketStatus {
    let text = |name: Option<SocketAddress>| name.map(|name| name.to_string());
    let mut status = SocketStatus {
        guest,
        id: socket.id,
        attachment: "queued",
        reason: socket.way.map_or("the preloaded library serves it".into(), Into::into),
        kind: socket.kind,
        state: socket.state,
        local: text(socket.local),
        peer: text(socket.peer),
        receive_ring_bytes: socket.receive_ring_bytes,
        send_ring_bytes: socket.send_ring_bytes,
        unread_bytes: socket.unread_bytes,
        unsent_bytes: socket.unsent_bytes,
        inode: socket.inode,
        ..SocketStatus::default()
    };
    ask(&mut status, stack, socket.handle);
    status.pair = stack.paired(socket.handle).is_some();
    if status.kind == "listener" {
        // Those in the ring were accepted ahead.
        status.receive_queue += socket.unread_bytes / netkernel_abi::socket::ACCEPT_RECORD;
        status.unread_bytes = 0;
    } else {
        status.receive_queue += socket.unread_bytes;
        status.send_queue += socket.unsent_bytes;
    }
    status
}

/// Asks the stack what it knows.
fn ask(status: &mut SocketStatus, stack: &mut dyn Stack, handle: Handle) {
    if handle == Handle::NONE {
        return;
    }
    let asked = netkernel_relay::ask(stack, handle, status.kind);
    (status.tcp, status.congestion_control) = (asked.tcp, asked.congestion_control);
    (status.receive_queue, status.send_queue) = (asked.receive_queue, asked.send_queue);
}

/// Who made the process's pair, and so the process, as the kernel says.
pub(crate) fn process_of(pair: &OwnedFd) -> Option<u32> {
    fds::peer(pair.as_fd()).ok().and_then(|peer| u32::try_from(peer.pid).ok()).filter(|&pid| pid != 0)
}

/// Says which process holds each socket: the first of its guest's that has a descriptor with its inode. What a guest claims
/// of inodes leads to no process but its own.
pub(crate) fn find_holders(sockets: &mut [SocketStatus], processes: &Processes, known: &[u32]) {
    if sockets.is_empty() {
        return;
    }
    let inodes = Census::inodes(&processes.of(known.iter().copied()));
    let mut names: BTreeMap<u32, String> = BTreeMap::new();
    for socket in sockets {
        if let Some(&(pid, fd)) = inodes.get(&socket.inode) {
            (socket.pid, socket.fd) = (pid, fd);
        }
        if socket.pid != 0 {
            let name =
                names.entry(socket.pid).or_insert_with_key(|&pid| process_name(pid).unwrap_or_default());
            socket.process.clone_from(name);
        }
    }
}

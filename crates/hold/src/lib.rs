//! Packets that are about to leave chosen ports wait in the kernel until they are let go.
//!
//! A table of nf_tables sends them to a queue (nfnetlink_queue), as a whole: what the kernel cuts into segments later waits as one.
//! Only their first bytes are looked at. They stay charged to the socket that they are of, so that who sends faster than
//! packets are let go waits in its own send buffer, and nothing is dropped; and TCP does not repeat what has not left the host. Who
//! holds acknowledgements back slows those who send to it.
//!
//! The queue is this process's, and so is the table: when it dies, all goes on as if there were none. Needs CAP_NET_ADMIN, and a
//! kernel with nf_tables and nfnetlink_queue.

mod netlink;
mod packet;
mod table;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink::{Messages, Netlink, attributes, each, half, put, put_word, word};
use table::Table;

pub use packet::{Flow, Packet};

/// `IPPROTO_TCP` or `IPPROTO_UDP`, and the port.
pub type Port = (u8, u16);

/// NFNL_SUBSYS_QUEUE, as part of a message's kind.
const SYSTEM: u16 = 3 << 8;
const PACKET: u16 = SYSTEM;
const VERDICT: u16 = SYSTEM | 1;
const CONFIGURE: u16 = SYSTEM | 2;
const ACCEPT: u32 = 1;
/// Headers of IP and TCP, with some extensions.
const COPIED: u32 = 192;
/// Packets that may wait at a time; more go on at once.
const MOST: u32 = 32_768;
/// NFQA_CFG_F_FAIL_OPEN and NFQA_CFG_F_GSO.
const FLAGS: u32 = 1 | 4;
/// Queues of 65536 of one network namespace that are tried, from this one.
const FIRST: u16 = 20_043;
const TRIED: u16 = 64;

/// The packets of one network namespace. What waits is dropped with it: [`Hold::release`] all before.
pub struct Hold {
    queue: Netlink,
    table: Table,
    number: u16,
    /// Verdicts that were not sent yet.
    verdicts: Messages,
    buffer: Vec<u8>,
}

impl AsFd for Hold {
    /// Readable when packets wait.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }
}

impl Hold {
    /// To be called in the network namespace. Nothing waits before [`Hold::watch`], but what begins a connection of TCP. Errors: no
    /// CAP_NET_ADMIN, or the kernel cannot.
    pub fn open() -> io::Result<Hold> {
        let queue = Netlink::open()?;
        let mut last = io::Error::from(io::ErrorKind::AddrInUse);
        for number in FIRST..FIRST + TRIED {
            // EBUSY, which is EPERM here: somebody else has it.
            match configure(&queue, number, |to| put(to, 1, &[1, 0, 0, 0])) {
                Ok(()) => {
                    let mode = [&COPIED.to_be_bytes()[..], &[2]].concat();
                    configure(&queue, number, |to| put(to, 2, &mode))?;
                    configure(&queue, number, |to| put_word(to, 3, MOST))?;
                    configure(&queue, number, |to| {
                        put_word(to, 4, FLAGS);
                        put_word(to, 5, FLAGS);
                    })?;
                    // Each waits in the socket's own queue until it was seen.
                    let _ = rustix::net::sockopt::set_socket_recv_buffer_size_force(&queue, 32 << 20);
                    let table = Table::make(number)?;
                    return Ok(Hold {
                        queue,
                        table,
                        number,
                        verdicts: Messages::default(),
                        buffer: vec![0; 16 << 10],
                    });
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// From now on, packets from these ports wait, and from no others.
    pub fn watch(&mut self, ports: &BTreeSet<Port>) -> io::Result<()> {
        self.table.watch(ports)
    }

    /// Packets that came since the last call. What is not understood goes on.
    pub fn receive(&mut self, most: usize, mut call: impl FnMut(Packet)) {
        for _ in 0..most {
            let mut buffer = std::mem::take(&mut self.buffer);
            // An error: some were lost on the way here, and went on (NFQA_CFG_F_FAIL_OPEN).
            let received = self.queue.receive(&mut buffer).unwrap_or(None);
            let mut strange = Vec::new();
            let none = received.is_none();
            each(received.unwrap_or_default(), |kind, body| {
                if kind == PACKET {
                    let (id, packet) = parse(body.get(4..).unwrap_or_default());
                    match packet {
                        Some(packet) => call(packet),
                        None => strange.push(id),
                    }
                }
            });
            self.buffer = buffer;
            strange.into_iter().for_each(|id| self.release(id));
            if none {
                return;
            }
        }
    }

    /// It goes on, once [`Hold::flush`] is called; in the order of these calls.
    pub fn release(&mut self, id: u32) {
        self.verdicts.raw(VERDICT, 0, 0, self.number, |to| {
            put(to, 2, &[ACCEPT.to_be_bytes(), id.to_be_bytes()].concat());
        });
        if self.verdicts.bytes.len() > 2048 {
            self.flush();
        }
    }

    pub fn flush(&mut self) {
        if !self.verdicts.bytes.is_empty() {
            // Fails for what is not there any more.
            let _ = self.queue.send(&self.verdicts.bytes);
            self.verdicts.bytes.clear();
        }
    }
}

fn configure(queue: &Netlink, number: u16, fill: impl FnOnce(&mut Vec<u8>)) -> io::Result<()> {
    let mut messages = Messages::default();
    messages.message(CONFIGURE, 0, 0, number, fill);
    queue.ask(&messages.bytes, messages.count)
}

/// Attributes of a packet's message.
fn parse(body: &[u8]) -> (u32, Option<Packet>) {
    let (mut id, mut whole, mut packet) = (0, None, None);
    attributes(body, |kind, value| match kind {
        1 => id = word(value, 0).swap_bytes(),
        10 => packet = Some(value.to_vec()),
        13 => whole = Some(word(value, 0).swap_bytes() as usize),
        _ => {}
    });
    debug_assert!(half(body, 0) > 0);
    let packet = packet.and_then(|bytes| Packet::parse(id, &bytes, whole.unwrap_or(bytes.len())));
    (id, packet)
}

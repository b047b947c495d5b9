//! The table of nf_tables that sends packets to the queue. It is its socket's: the kernel takes it away when that is closed, however
//! its process ends (NFT_TABLE_F_OWNER, Linux 5.12).

use std::collections::BTreeSet;
use std::io;

use crate::Port;
use crate::netlink::{CREATE, Messages, Netlink, nest, put, put_text, put_word};

/// NFNL_SUBSYS_NFTABLES.
const SYSTEM: u16 = 10;
/// NFPROTO_INET: both versions of IP.
const FAMILY: u8 = 1;
// Messages.
const NEW_TABLE: u16 = SYSTEM << 8;
const NEW_CHAIN: u16 = SYSTEM << 8 | 3;
const NEW_RULE: u16 = SYSTEM << 8 | 6;
const NEW_SET: u16 = SYSTEM << 8 | 9;
const NEW_ELEMENT: u16 = SYSTEM << 8 | 12;
const DELETE_ELEMENT: u16 = SYSTEM << 8 | 14;

const APPEND: u16 = 0x800;
const OWNER: u32 = 2;
const LOCAL_OUT: u32 = 3;
/// Behind all that changes packets, names and marks.
const PRIORITY: u32 = 500;
const TRANSPORT: u32 = 2;
const L4_PROTOCOL: u32 = 16;
const REGISTER: u32 = 1;
const CHAIN: &str = "out";
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;

/// How the kernel can be told to queue; the first way that it knows is taken.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// nft_queue.
    Expression,
    /// xt_NFQUEUE by nft_compat.
    Target,
}

pub(crate) struct Table {
    netlink: Netlink,
    name: String,
    ports: BTreeSet<Port>,
}

impl Table {
    /// Packets go to this queue; if nobody listens to it, they go on.
    pub fn make(queue: u16) -> io::Result<Table> {
        let mut last = io::Error::from(io::ErrorKind::Unsupported);
        for way in [Way::Expression, Way::Target] {
            let netlink = Netlink::open()?;
            let name = format!("netkernel-{queue}");
            match netlink.ask_for(&table(&name, queue, way)) {
                Ok(()) => return Ok(Table { netlink, name, ports: BTreeSet::new() }),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Only packets from these ports, from now on; and those that begin connections.
    pub fn watch(&mut self, ports: &BTreeSet<Port>) -> io::Result<()> {
        let mut messages = Messages::default();
        messages.begin(SYSTEM);
        for (kind, one, other) in [(NEW_ELEMENT, ports, &self.ports), (DELETE_ELEMENT, &self.ports, ports)] {
            for protocol in [TCP, UDP] {
                let changed: Vec<u16> =
                    one.difference(other).filter(|port| port.0 == protocol).map(|port| port.1).collect();
                // An attribute is of at most 64 KiB.
                for some in changed.chunks(1024) {
                    messages.message(kind, CREATE, FAMILY, 0, |to| elements(to, &self.name, protocol, some));
                }
            }
        }
        if messages.count == 0 {
            return Ok(());
        }
        messages.end(SYSTEM);
        self.netlink.ask_for(&messages)?;
        self.ports.clone_from(ports);
        Ok(())
    }
}

impl Netlink {
    fn ask_for(&self, messages: &Messages) -> io::Result<()> {
        self.ask(&messages.bytes, messages.count)
    }
}

fn set_name(protocol: u8) -> &'static str {
    if protocol == TCP { "tcp" } else { "udp" }
}

fn elements(to: &mut Vec<u8>, table: &str, protocol: u8, ports: &[u16]) {
    put_text(to, 1, table);
    put_text(to, 2, set_name(protocol));
    nest(to, 3, |to| {
        for port in ports {
            nest(to, 1, |to| nest(to, 1, |to| put(to, 1, &port.to_be_bytes())));
        }
    });
}

fn table(name: &str, queue: u16, way: Way) -> Messages {
    let mut all = Messages::default();
    all.begin(SYSTEM);
    all.message(NEW_TABLE, CREATE, FAMILY, 0, |to| {
        put_text(to, 1, name);
        put_word(to, 2, OWNER);
    });
    for (number, protocol) in [TCP, UDP].into_iter().enumerate() {
        all.message(NEW_SET, CREATE, FAMILY, 0, |to| {
            put_text(to, 1, name);
            put_text(to, 2, set_name(protocol));
            put_word(to, 3, 0);
            // inet_service, as nft(8) calls it.
            put_word(to, 4, 13);
            put_word(to, 5, 2);
            put_word(to, 10, number as u32 + 1);
        });
    }
    all.message(NEW_CHAIN, CREATE, FAMILY, 0, |to| {
        put_text(to, 1, name);
        put_text(to, 3, CHAIN);
        nest(to, 4, |to| {
            put_word(to, 1, LOCAL_OUT);
            put_word(to, 2, PRIORITY);
        });
        put_text(to, 7, "filter");
    });
    for protocol in [TCP, UDP] {
        rule(&mut all, name, |to| {
            is_protocol(to, protocol);
            payload(to, 0, 2);
            expression(to, "lookup", |to| {
                put_text(to, 1, set_name(protocol));
                put_word(to, 2, REGISTER);
            });
            to_queue(to, queue, way);
        });
    }
    // SYN without ACK: whose it is, is seen before it is gone.
    rule(&mut all, name, |to| {
        is_protocol(to, TCP);
        payload(to, 13, 1);
        expression(to, "bitwise", |to| {
            put_word(to, 1, REGISTER);
            put_word(to, 2, REGISTER);
            put_word(to, 3, 1);
            nest(to, 4, |to| put(to, 1, &[0x12]));
            nest(to, 5, |to| put(to, 1, &[0]));
        });
        is_equal(to, 2);
        to_queue(to, queue, way);
    });
    all.end(SYSTEM);
    all
}

fn rule(to: &mut Messages, table: &str, expressions: impl FnOnce(&mut Vec<u8>)) {
    to.message(NEW_RULE, CREATE | APPEND, FAMILY, 0, |to| {
        put_text(to, 1, table);
        put_text(to, 2, CHAIN);
        nest(to, 4, expressions);
    });
}

fn expression(to: &mut Vec<u8>, name: &str, fill: impl FnOnce(&mut Vec<u8>)) {
    nest(to, 1, |to| {
        put_text(to, 1, name);
        nest(to, 2, fill);
    });
}

fn is_protocol(to: &mut Vec<u8>, protocol: u8) {
    expression(to, "meta", |to| {
        put_word(to, 1, REGISTER);
        put_word(to, 2, L4_PROTOCOL);
    });
    is_equal(to, protocol);
}

fn is_equal(to: &mut Vec<u8>, value: u8) {
    expression(to, "cmp", |to| {
        put_word(to, 1, REGISTER);
        put_word(to, 2, 0);
        nest(to, 3, |to| put(to, 1, &[value]));
    });
}

/// Bytes of the header of TCP or UDP.
fn payload(to: &mut Vec<u8>, offset: u32, length: u32) {
    expression(to, "payload", |to| {
        put_word(to, 1, REGISTER);
        put_word(to, 2, TRANSPORT);
        put_word(to, 3, offset);
        put_word(to, 4, length);
    });
}

fn to_queue(to: &mut Vec<u8>, queue: u16, way: Way) {
    const BYPASS: u16 = 1;
    match way {
        Way::Expression => expression(to, "queue", |to| {
            put(to, 1, &queue.to_be_bytes());
            put(to, 2, &1u16.to_be_bytes());
            put(to, 3, &BYPASS.to_be_bytes());
        }),
        Way::Target => expression(to, "target", |to| {
            put_text(to, 1, "NFQUEUE");
            put_word(to, 2, 3);
            // struct xt_NFQ_info_v3, padded.
            let info = [queue, 1, BYPASS, 0].map(u16::to_ne_bytes).concat();
            put(to, 3, &info);
        }),
    }
}

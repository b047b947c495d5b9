//! What is read from bytes of the other side, without state: region headers, rings, messages, requests.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use netkernel_abi::ancillary::{self, HEADER};
use netkernel_abi::control::Message;
use netkernel_abi::socket::{DatagramHeader, datagram_record};
use netkernel_abi::{Header, Layout, Nqe};
use netkernel_ring::bytes;
use netkernel_ring::queue::Queue;

use crate::input::Input;

/// A region header of the other side: what is accepted has its parts inside the mapping, in order.
pub fn region(data: &[u8]) {
    const WORDS: usize = size_of::<Header>() / 8;
    #[repr(C, align(4096))]
    struct Page([AtomicU64; WORDS]);
    let page = Page(std::array::from_fn(|i| {
        let mut word = [0; 8];
        let from = data.get(8 * i..).unwrap_or_default();
        let n = from.len().min(8);
        word[..n].copy_from_slice(&from[..n]);
        AtomicU64::new(u64::from_le_bytes(word))
    }));
    // SAFETY: a page that is as large and as aligned as a header; both consist of atomics and plain words.
    let header = unsafe { &*(&raw const page).cast::<Header>() };
    // The fuzzer need not find the magic number and the version itself.
    header.magic.store(netkernel_abi::MAGIC, Relaxed);
    header.abi_version.store(netkernel_abi::ABI_VERSION, Relaxed);
    let mapped = header.region_bytes.load(Relaxed);
    let Ok(layout) = Layout::from_header(header, mapped) else { return };
    let sockets_end = layout.sockets_offset + u64::from(layout.limits.sockets) * 256;
    let queues_end = layout.queue_set(layout.limits.queue_sets - 1).map(|at| at + 65536);
    assert!(layout.sockets_offset >= 4096 && sockets_end <= layout.queue_sets_offset);
    assert!(queues_end.is_some_and(|end| end <= layout.payload_offset));
    assert!(layout.payload_offset + layout.payload_bytes <= mapped);
    assert!(layout.socket(0).is_none() && layout.socket(layout.limits.sockets).is_none());
    assert!(layout.queue_set(layout.limits.queue_sets).is_none());
}

/// Both rings with any positions: nothing outside of them is touched, and nothing that was not there comes out.
pub fn ring(data: &[u8]) {
    let mut input = Input::new(data);
    let slots: Vec<[AtomicU64; 4]> = (0..16).map(|i| std::array::from_fn(|_| AtomicU64::new(i))).collect();
    let (head, tail) = (AtomicU32::new(input.u32()), AtomicU32::new(input.u32()));
    let queue = Queue::new(&head, &tail, &slots);
    let (mut pushed, mut popped) = (tail.load(Relaxed), head.load(Relaxed));
    while !input.is_empty() {
        match input.below(4) {
            0 => {
                let _ = queue.push(&mut pushed, [input.u64(), 1, 2, 3]);
            }
            1 => {
                if let Ok(Some(words)) = queue.pop(&mut popped) {
                    let nqe = Nqe::from_words(words);
                    assert_eq!(nqe.to_words(), words, "an element changes when it is read");
                }
            }
            2 => head.store(input.u32(), Relaxed),
            _ => tail.store(input.u32(), Relaxed),
        }
        let size = 1 << input.below(22);
        let (base, position, len) = (input.u32(), input.u32(), input.u32());
        let runs = bytes::segments(base, position, len, size);
        for (at, len) in [runs.first, runs.second] {
            assert!(at <= size && len <= size - at, "a run leaves its ring");
        }
        assert_eq!(runs.first.1 + runs.second.1, len.min(size));
        if let Ok(used) = bytes::used(base, position, size) {
            assert!(used <= size);
        }
    }
}

/// Messages of the channel, headers of datagrams, control messages.
pub fn channel(data: &[u8]) {
    let mut input = Input::new(data);
    let message = Message::from_bytes(&input.take());
    assert_eq!(Message::from_bytes(&message.to_bytes()), message);
    let header = DatagramHeader { len: input.u32() >> 1, address_len: input.u32(), address: [0; 6] };
    if header.len <= 65536 {
        assert!(header.record() >= datagram_record(header.len) && header.record() - header.len >= 32);
    }
    let control = &data[data.len().min(40)..];
    let mut taken = 0;
    for ancillary in ancillary::messages(control) {
        let Ok(ancillary) = ancillary else { break };
        taken += HEADER + ancillary.data.len();
        assert!(taken <= control.len(), "more control messages than bytes");
        let _ = (ancillary.fate(false), ancillary.fate(true));
    }
}

/// A request to the control socket.
pub fn control(data: &[u8]) {
    netkernel_control::examine(data);
}

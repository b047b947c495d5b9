//! The layout of any configuration, elements and messages as bytes, and headers that nobody should believe.

use std::sync::atomic::Ordering::Relaxed;

use netkernel_abi::control::Message;
use netkernel_abi::layout::{
    ACTIVE_WORDS, COMPLETE_OFFSET, COMPLETE_SLOTS, JOB_OFFSET, JOB_SLOTS, MIN_PAYLOAD, QUEUE_SET_STRIDE,
    RECEIVE_OFFSET, RECEIVE_SLOTS, SEND_OFFSET, SEND_SLOTS,
};
use netkernel_abi::{
    ABI_VERSION, Header, Layout, LayoutError, Limits, MAGIC, Nqe, QueueSet, SocketEntry, feature,
};
use proptest::prelude::*;

/// A header on the heap, all zero.
fn header() -> Box<Header> {
    // SAFETY: a header consists of atomics and integers, for which zeroes are valid.
    unsafe { Box::<Header>::new_zeroed().assume_init() }
}

fn limits() -> impl Strategy<Value = Limits> {
    // Also what is out of range, and every size that is just enough or not.
    let sockets = prop_oneof![0..40u32, 16..70_000u32, (1u32 << 20) - 2..(1 << 20) + 3];
    let queue_sets = prop_oneof![0..4u32, 1..1030u32];
    (sockets, queue_sets, -4i64..4, prop_oneof![Just(0u64), 0..1u64 << 38]).prop_map(
        |(sockets, queue_sets, pages, more)| {
            let least =
                (4096 + sockets as u64 * 256).next_multiple_of(4096) + queue_sets as u64 * QUEUE_SET_STRIDE;
            let least = (least.next_multiple_of(2 << 20) + MIN_PAYLOAD) as i64;
            let region_bytes = (least + pages * 4096) as u64 + more / 4096 * 4096;
            Limits { region_bytes, sockets, queue_sets }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn parts_lie_inside_and_do_not_overlap(limits in limits()) {
        let in_range = (16..=1 << 20).contains(&limits.sockets)
            && (1..=ACTIVE_WORDS as u32 * 64).contains(&limits.queue_sets)
            && limits.region_bytes <= 1 << 37;
        let layout = match Layout::new(limits) {
            Ok(layout) => layout,
            Err(error) => {
                prop_assert_eq!(error, LayoutError::Sizes);
                let sets = (4096 + limits.sockets as u64 * 256).next_multiple_of(4096);
                let payload = (sets + limits.queue_sets as u64 * QUEUE_SET_STRIDE).next_multiple_of(2 << 20);
                prop_assert!(!in_range || payload + MIN_PAYLOAD > limits.region_bytes, "refused without need");
                return Ok(());
            }
        };
        prop_assert!(in_range);
        let parts = [
            (0, size_of::<Header>() as u64),
            (layout.sockets_offset, limits.sockets as u64 * size_of::<SocketEntry>() as u64),
            (layout.queue_sets_offset, limits.queue_sets as u64 * QUEUE_SET_STRIDE),
            (layout.payload_offset, layout.payload_bytes),
        ];
        for pair in parts.windows(2) {
            prop_assert!(pair[0].0 + pair[0].1 <= pair[1].0);
        }
        prop_assert_eq!(layout.payload_offset + layout.payload_bytes, limits.region_bytes);
        prop_assert!(layout.payload_bytes >= MIN_PAYLOAD);
        prop_assert!(layout.payload_offset.is_multiple_of(2 << 20), "payload can stand on huge pages");
        prop_assert!(layout.guest_sockets >= 1 && layout.guest_sockets < limits.sockets);

        prop_assert_eq!(layout.socket(0), None);
        prop_assert_eq!(layout.socket(limits.sockets), None);
        prop_assert_eq!(layout.socket(u32::MAX), None);
        for id in [1, limits.sockets / 2, limits.sockets - 1] {
            let at = layout.socket(id).unwrap();
            prop_assert!(at.is_multiple_of(align_of::<SocketEntry>() as u64));
            prop_assert!(at >= layout.sockets_offset && at + 256 <= layout.queue_sets_offset);
        }
        prop_assert_eq!(layout.queue_set(limits.queue_sets), None);
        prop_assert_eq!(layout.queue_set(u32::MAX), None);
        for q in [0, limits.queue_sets - 1] {
            let at = layout.queue_set(q).unwrap();
            prop_assert!(at.is_multiple_of(align_of::<QueueSet>() as u64));
            prop_assert!(at >= layout.queue_sets_offset && at + QUEUE_SET_STRIDE <= layout.payload_offset);
        }

        // Both sides agree on it, and the reader on no more than what is mapped.
        let header = header();
        layout.initialise(&header, 3, feature::EVENTFD, 50_000);
        prop_assert_eq!(Layout::from_header(&header, limits.region_bytes), Ok(layout));
        prop_assert_eq!(Layout::from_header(&header, limits.region_bytes - 1), Err(LayoutError::Sizes));
    }

    /// Whatever stands in a header: a clear error, or a layout that fits what is mapped.
    #[test]
    fn hostile_headers_are_refused(
        sockets in any::<u32>(),
        guest_sockets in any::<u32>(),
        queue_sets in any::<u32>(),
        features in prop_oneof![0..16u64, any::<u64>()],
        region_bytes in prop_oneof![any::<u64>(), 0..1u64 << 38],
        version in prop_oneof![4 => Just(ABI_VERSION), 1 => any::<u32>()],
        magic in prop_oneof![8 => Just(MAGIC), 1 => any::<u64>()],
        plausible in any::<[bool; 4]>(),
        mapped in 4096..1u64 << 38,
    ) {
        let header = header();
        let good = Layout::new(Limits::default()).unwrap();
        good.initialise(&header, 1, feature::ALL, 0);
        header.magic.store(magic, Relaxed);
        header.abi_version.store(version, Relaxed);
        // Mostly one lie at a time.
        if !plausible[0] { header.sockets.store(sockets, Relaxed); }
        if !plausible[1] { header.guest_sockets.store(guest_sockets, Relaxed); }
        if !plausible[2] { header.queue_sets.store(queue_sets, Relaxed); }
        if !plausible[3] { header.region_bytes.store(region_bytes, Relaxed); }
        header.features.store(features, Relaxed);
        let got = Layout::from_header(&header, mapped);
        if magic != MAGIC {
            prop_assert_eq!(got, Err(LayoutError::Magic));
        } else if version != ABI_VERSION {
            prop_assert_eq!(got, Err(LayoutError::Version(version)));
        } else if features & !feature::ALL != 0 {
            prop_assert_eq!(got, Err(LayoutError::Features(features & !feature::ALL)));
        } else if let Ok(layout) = got {
            prop_assert!(layout.limits.region_bytes <= mapped);
            prop_assert!(layout.payload_offset + layout.payload_bytes <= mapped);
            prop_assert_eq!(Layout::new(layout.limits), Ok(layout));
        } else {
            prop_assert_eq!(got, Err(LayoutError::Sizes));
        }
    }

    #[test]
    fn elements_survive_their_words(words in any::<[u64; 4]>()) {
        prop_assert_eq!(Nqe::from_words(words).to_words(), words);
    }

    #[test]
    fn options_survive_their_word(level in 0..1i32 << 15, name in 0..1i32 << 16, value in any::<i32>()) {
        prop_assert_eq!(Nqe::split_option(Nqe::option_data(level, name, value)), (level, name, value));
    }

    #[test]
    fn messages_survive_their_bytes(kind: u32, a: u32, b: u32, c: u32, d: u32) {
        let message = Message { kind, a, b, c, d, ..Message::default() };
        prop_assert_eq!(Message::from_bytes(&message.to_bytes()), message);
    }
}

#[test]
fn rings_of_a_queue_set_do_not_overlap() {
    let head = size_of::<QueueSet>() as u64;
    let rings = [
        (JOB_OFFSET, JOB_SLOTS),
        (COMPLETE_OFFSET, COMPLETE_SLOTS),
        (SEND_OFFSET, SEND_SLOTS),
        (RECEIVE_OFFSET, RECEIVE_SLOTS),
    ];
    let mut end = head;
    for (offset, slots) in rings {
        assert!(offset >= end && offset.is_multiple_of(32) && slots.is_power_of_two());
        end = offset + slots as u64 * 32;
    }
    assert!(end <= QUEUE_SET_STRIDE);
}

#[test]
fn errors_say_what_to_do() {
    let text = |error: LayoutError| error.to_string();
    assert!(
        text(LayoutError::Version(7)).contains("ABI 7") && text(LayoutError::Version(7)).contains("restart")
    );
    assert!(text(LayoutError::Sizes).contains("region_bytes"));
    assert!(text(LayoutError::Features(16)).contains("0x10"));
    assert!(text(LayoutError::Magic).contains("not a NetKernel region"));
}

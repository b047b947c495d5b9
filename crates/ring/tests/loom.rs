//! All interleavings of the ring's two sides, and of doorbell suppression: `cargo xtask loom`.
#![cfg(loom)]

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst, fence};
use loom::thread;
use netkernel_ring::queue::Queue;

struct Shared {
    head: AtomicU32,
    tail: AtomicU32,
    slots: Vec<[AtomicU64; 4]>,
    waiting: AtomicU32,
    rung: AtomicU32,
}

fn shared(n: usize) -> Arc<Shared> {
    let slot = || [AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0)];
    Arc::new(Shared {
        head: AtomicU32::new(0),
        tail: AtomicU32::new(0),
        slots: (0..n).map(|_| slot()).collect(),
        waiting: AtomicU32::new(0),
        rung: AtomicU32::new(0),
    })
}

#[test]
fn elements_arrive_whole_and_in_order() {
    loom::model(|| {
        let ring = shared(2);
        let producer = {
            let ring = ring.clone();
            thread::spawn(move || {
                let queue = Queue::new(&ring.head, &ring.tail, &ring.slots);
                let mut tail = 0;
                for n in 1..=3u64 {
                    while queue.push(&mut tail, [n, n, n, n]) == Ok(false) {
                        thread::yield_now();
                    }
                }
            })
        };
        let queue = Queue::new(&ring.head, &ring.tail, &ring.slots);
        let mut head = 0;
        for n in 1..=3u64 {
            let element = loop {
                match queue.pop(&mut head) {
                    Ok(Some(element)) => break element,
                    Ok(None) => thread::yield_now(),
                    Err(corrupt) => panic!("{corrupt:?}"),
                }
            };
            assert_eq!(element, [n, n, n, n]);
        }
        producer.join().unwrap();
    });
}

/// The sleeper sets a flag, fences and looks again; the waker publishes, fences and looks at the flag. One of the two must
/// see the other: a sleeper that found nothing is rung for.
#[test]
fn no_wake_up_is_lost() {
    loom::model(|| {
        let ring = shared(2);
        let waker = {
            let ring = ring.clone();
            thread::spawn(move || {
                let queue = Queue::new(&ring.head, &ring.tail, &ring.slots);
                assert_eq!(queue.push(&mut 0, [7; 4]), Ok(true));
                fence(SeqCst);
                if ring.waiting.load(SeqCst) == 1 && ring.waiting.swap(0, SeqCst) == 1 {
                    ring.rung.store(1, SeqCst);
                }
            })
        };
        ring.waiting.store(1, SeqCst);
        fence(SeqCst);
        let queue = Queue::new(&ring.head, &ring.tail, &ring.slots);
        let saw = queue.pop(&mut 0).unwrap().is_some();
        waker.join().unwrap();
        assert!(saw || ring.rung.load(SeqCst) == 1, "asleep with an element in the ring");
    });
}

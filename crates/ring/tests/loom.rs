//! All interleavings of the ring's two sides, and of doorbell suppression: `cargo xtask loom`.
#![cfg(loom)]

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst, fence};
use loom::thread;
use netkernel_ring::bell::must_ring;
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

#[test]
fn batches_arrive_whole_and_in_order() {
    loom::model(|| {
        let ring = shared(2);
        let producer = {
            let ring = ring.clone();
            thread::spawn(move || {
                let queue = Queue::new(&ring.head, &ring.tail, &ring.slots);
                let (mut tail, mut numbers) = (0, (1..=3u64).map(|n| [n; 4]));
                while tail < 3 {
                    if queue.push_all(&mut tail, &mut numbers) == Ok(0) {
                        thread::yield_now();
                    }
                }
            })
        };
        let queue = Queue::new(&ring.head, &ring.tail, &ring.slots);
        let (mut head, mut next) = (0, 1u64);
        while head < 3 {
            let mut batch = queue.batch(head, 2).unwrap();
            for element in batch.by_ref() {
                assert_eq!(element, [next; 4]);
                next += 1;
            }
            let was = head;
            head = batch.finish();
            if head == was {
                thread::yield_now();
            }
        }
        assert_eq!(next, 4);
        producer.join().unwrap();
    });
}

/// A switch between a producer's ring and a consumer's: what the consumer sees is whole.
#[test]
fn what_is_transferred_arrives_whole() {
    loom::model(|| {
        let (from, to) = (shared(2), shared(2));
        let producer = {
            let from = from.clone();
            thread::spawn(move || {
                let queue = Queue::new(&from.head, &from.tail, &from.slots);
                assert_eq!(queue.push_all(&mut 0, &mut [[1; 4], [2; 4]].into_iter()), Ok(2));
            })
        };
        let consumer = {
            let to = to.clone();
            thread::spawn(move || {
                let queue = Queue::new(&to.head, &to.tail, &to.slots);
                if let Some(element) = queue.pop(&mut 0).unwrap() {
                    assert_eq!(element, [11; 4]);
                }
            })
        };
        let queue = Queue::new(&from.head, &from.tail, &from.slots);
        let target = Queue::new(&to.head, &to.tail, &to.slots);
        let (mut head, mut tail) = (0, 0);
        while head < 2 {
            let moved = queue.transfer(&mut head, &target, &mut tail, 2, |words| Some(words.map(|w| w + 10)));
            if moved == Ok(0) {
                thread::yield_now();
            }
        }
        assert_eq!(tail, 2);
        producer.join().unwrap();
        consumer.join().unwrap();
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
                if must_ring(&ring.waiting) {
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

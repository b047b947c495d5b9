//! What two cores can do at most for a stream through memory: one copies into a ring, the other out of it, and nothing else.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::sys;

/// As in the library: a ring of 1 MiB, made visible in pieces of 32 KiB (`netkernel_abi::pair::RING_BYTES`).
const PIECE: usize = 32 << 10;
const PIECES: u64 = netkernel_abi::pair::RING_BYTES as u64 / PIECE as u64;
/// Each program's own buffer, as of `iperf3 -l 128K`.
const BUFFER: usize = 128 << 10;

/// Gbit/s through such a ring, for so long. `cores`: the reader's and the writer's.
pub fn gbit_s(cores: Option<[usize; 2]>, time: Duration) -> Result<f64> {
    let ring: Vec<Mutex<Vec<u8>>> = (0..PIECES).map(|_| Mutex::new(vec![0; PIECE])).collect();
    let (head, tail, over) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let (ring, head, tail, over) = (&ring, &head, &tail, &over);
    let stay = |core: Option<usize>| core.map_or(Ok(()), sys::stay_on);
    let piece = |at: u64| (at % PIECES) as usize;
    let part = |at: u64| (at as usize * PIECE) % BUFFER;
    // Waits until there is something to do; `None`: the time is over.
    let wait = |ready: &dyn Fn() -> bool| {
        while !ready() {
            if over.load(Ordering::Relaxed) {
                return None;
            }
            std::hint::spin_loop();
        }
        (!over.load(Ordering::Relaxed)).then_some(())
    };
    thread::scope(|threads| {
        let writer = threads.spawn(move || -> Result<()> {
            stay(cores.map(|[_, writer]| writer)).context("the writer's core")?;
            let buffer = vec![1; BUFFER];
            let mut at = 0;
            while wait(&|| at - tail.load(Ordering::Acquire) < PIECES).is_some() {
                if let Ok(mut into) = ring[piece(at)].lock() {
                    into.copy_from_slice(&buffer[part(at)..][..PIECE]);
                }
                at += 1;
                head.store(at, Ordering::Release);
            }
            Ok(())
        });
        let reader = threads.spawn(move || -> Result<f64> {
            stay(cores.map(|[reader, _]| reader)).context("the reader's core")?;
            let mut buffer = vec![0; BUFFER];
            let (mut at, begin) = (0, Instant::now());
            while wait(&|| head.load(Ordering::Acquire) > at).is_some() {
                if let Ok(from) = ring[piece(at)].lock() {
                    buffer[part(at)..][..PIECE].copy_from_slice(&from);
                }
                at += 1;
                tail.store(at, Ordering::Release);
            }
            std::hint::black_box(&buffer);
            Ok((at * PIECE as u64 * 8) as f64 / begin.elapsed().as_secs_f64() / 1e9)
        });
        thread::sleep(time);
        over.store(true, Ordering::Relaxed);
        let rate = reader.join().unwrap_or_else(|_| anyhow::bail!("the reader panicked"));
        writer.join().unwrap_or_else(|_| anyhow::bail!("the writer panicked"))?;
        rate
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn something_passes() {
        assert!(gbit_s(None, Duration::from_millis(20)).unwrap() > 0.0);
    }
}

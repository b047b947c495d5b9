//! One capture: whom it is of, and the way of its packets to who reads them.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::pcapng::{self, Packet};

/// Most that waits for a slow reader; what comes beyond it is lost, and counted.
pub const QUEUED_BYTES: usize = 32 << 20;
/// How soon a reader that went away is noticed when there are no packets.
const LOOK: Duration = Duration::from_millis(200);

/// Whose packets are wanted. All that is given must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    pub guest: Option<u32>,
    pub tenant: Option<String>,
    /// The user who asked for the guest.
    pub uid: Option<u32>,
}

impl Target {
    pub fn is(&self, guest: u32, tenant: &str, uid: u32) -> bool {
        self.guest.is_none_or(|wanted| wanted == guest)
            && self.tenant.as_deref().is_none_or(|wanted| wanted == tenant)
            && self.uid.is_none_or(|wanted| wanted == uid)
    }
}

/// A packet on its way to the reader.
struct Kept {
    nsm: u32,
    at_ns: u64,
    length: usize,
    data: Vec<u8>,
}

pub struct Session {
    pub target: Target,
    /// Most that is kept of a packet.
    snap: usize,
    queue: Mutex<Queue>,
    more: Condvar,
    over: AtomicBool,
    lost: AtomicU64,
    /// Each is one higher for this capture while it is not over.
    marks: Mutex<Vec<Arc<AtomicU32>>>,
}

#[derive(Default)]
struct Queue {
    packets: VecDeque<Kept>,
    bytes: usize,
}

/// What became of a capture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    pub packets: u64,
    pub lost: u64,
}

impl Session {
    /// `snap`: bytes of each packet, at most.
    pub fn new(target: Target, snap: usize) -> Session {
        Session {
            target,
            snap,
            queue: Mutex::default(),
            more: Condvar::new(),
            over: AtomicBool::new(false),
            lost: AtomicU64::new(0),
            marks: Mutex::default(),
        }
    }

    /// Takes a packet; never waits for the reader.
    pub fn packet(&self, nsm: u32, data: Vec<u8>) {
        self.keep(nsm, now_ns(), data.len(), data);
    }

    /// Takes a packet of another capture.
    pub fn taken(&self, nsm: u32, packet: Packet<'_>) {
        self.keep(nsm, packet.at_ns, packet.length, packet.data.to_vec());
    }

    fn keep(&self, nsm: u32, at_ns: u64, length: usize, mut data: Vec<u8>) {
        data.truncate(self.snap);
        let mut queue = self.queue();
        if queue.bytes + data.len() > QUEUED_BYTES {
            self.lost.fetch_add(1, Relaxed);
            return;
        }
        queue.bytes += data.len();
        queue.packets.push_back(Kept { nsm, at_ns, length, data });
        self.more.notify_one();
    }

    /// So many packets were lost before they came here.
    pub fn lose(&self, packets: u64) {
        self.lost.fetch_add(packets, Relaxed);
    }

    pub fn is_over(&self) -> bool {
        self.over.load(Relaxed)
    }

    /// Bytes kept of a packet, at most.
    pub fn snap(&self) -> usize {
        self.snap
    }

    /// Counts in `captures` until it is over.
    pub fn mark(&self, captures: &Arc<AtomicU32>) {
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.is_over() {
            captures.fetch_add(1, Relaxed);
            marks.push(Arc::clone(captures));
        }
    }

    /// Nothing more is wanted.
    pub fn end(&self) {
        {
            let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
            self.over.store(true, Relaxed);
            marks.drain(..).for_each(|captures| _ = captures.fetch_sub(1, Relaxed));
        }
        self.more.notify_all();
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What came, when something did or a while passed.
    fn take(&self) -> VecDeque<Kept> {
        let queue = self.queue();
        let waits = |queue: &mut Queue| queue.packets.is_empty() && !self.is_over();
        let (mut queue, _) =
            self.more.wait_timeout_while(queue, LOOK, waits).unwrap_or_else(PoisonError::into_inner);
        queue.bytes = 0;
        std::mem::take(&mut queue.packets)
    }
}

fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64
}

/// Writes a session's packets until it is over, the reader is gone (`gone`), or writing fails. Ends the session. `about`: what
/// is to be known of it.
pub fn write(
    session: &Session,
    about: &str,
    nsms: &[String],
    mut to: impl Write,
    gone: impl Fn() -> bool,
) -> io::Result<Written> {
    let mut written = Written::default();
    let result = (|| {
        to.write_all(&pcapng::section(
            "netkernel",
            &format!(
                "Headers are synthetic: packets are made from what guests and their stacks exchanged; those of direct sockets are the kernel's. {about}"
            ),
        ))?;
        // One for all: libpcap takes no second interface of raw packets. Whose a packet is stands in its comment.
        let about = "sockets of guests; headers are synthetic";
        to.write_all(&pcapng::interface("netkernel", about, session.snap as u32))?;
        loop {
            to.flush()?;
            let packets = session.take();
            if packets.is_empty() && (session.is_over() || gone()) {
                break;
            }
            for kept in packets {
                let nsm = nsms.get(kept.nsm as usize).map_or("?", String::as_str);
                let comment = format!("stack {nsm}");
                written.packets += 1;
                to.write_all(&pcapng::packet(0, kept.at_ns, kept.length, &kept.data, &comment))?;
            }
        }
        written.lost = session.lost.load(Relaxed);
        to.write_all(&pcapng::statistics(0, now_ns(), written.packets + written.lost, written.lost))?;
        to.flush()
    })();
    session.end();
    result.map(|()| written)
}

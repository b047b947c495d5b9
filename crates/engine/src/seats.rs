//! Guests that change their switch thread: by hand, and by load.
//!
//! A guest comes on a thread where there is room ([`crate::placement`]). When the guests of a thread have grown so that they want
//! more than one core can give, one of them goes to another thread, with its open sockets; when what several threads do would fit
//! on one again, they come back together, so that the others sleep. Only with [`Placement::Pack`]: guests that are spread by turns
//! stay where they are.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;

use netkernel_service::now_ns;

use crate::engine::{Command, Engine, Shared, lock};
use crate::placement::{Placement, Wanted};
use crate::{EngineError, Usage};

/// How often it is looked where guests should be.
const EVERY: Duration = Duration::from_secs(1);
/// How long a guest stays where it came, or where it could not go away.
const STAYS_NS: u64 = 10_000_000_000;

impl Engine {
    /// Puts a guest on another switch thread; its sockets, and what waits in its queues, go along. False: it is there.
    /// Errors: it cannot be moved (its stack is a process, it has relayed sockets or sockets in memory, it is captured), and stays
    /// where it is.
    pub fn seat_guest(&self, guest: u32, thread: usize) -> Result<bool, EngineError> {
        seat_guest(&self.shared, guest, thread)
    }
}

fn seat_guest(shared: &Arc<Shared>, guest: u32, thread: usize) -> Result<bool, EngineError> {
    if thread >= shared.workers.len() {
        return Err(EngineError::Refused(format!("there are {} switch threads", shared.workers.len())));
    }
    let _alone = shared.seats.write().unwrap_or_else(PoisonError::into_inner);
    let (from, tenant) = {
        let registry = lock(&shared.registry);
        let known = registry.guests.get(&guest).ok_or(EngineError::UnknownGuest(guest))?;
        (known.worker, Arc::clone(&known.tenant))
    };
    if from == thread {
        return Ok(false);
    }
    if from >= shared.workers.len() {
        return Err(EngineError::Refused(format!("guest {guest}: its stack is a process of its own")));
    }
    let (answer, answered) = channel();
    shared.tell(from, Command::Depart(guest, answer));
    // Not given up while the thread may answer: the guest is in the answer.
    let left = loop {
        match answered.recv_timeout(EVERY) {
            Ok(left) => break left?,
            Err(RecvTimeoutError::Timeout) if !shared.stopping.load(Relaxed) => {}
            Err(_) => return Err(EngineError::Stopped),
        }
    };
    if let Some(known) = lock(&shared.registry).guests.get_mut(&guest) {
        known.worker = thread;
    }
    let came = shared.ask(thread, |answer| Command::Recover(left, tenant, true, answer));
    if let Err(error) = came.and_then(|came| came) {
        log::error!(guest; "guest {guest} is lost on the way to another thread: {error}");
        shared.guest_over(guest, Usage::default());
        return Err(error);
    }
    Ok(true)
}

/// Starts the thread that looks after it, where it is wanted. It ends with the engine.
pub(crate) fn start(shared: &Arc<Shared>) -> io::Result<()> {
    if shared.config.placement != Placement::Pack || shared.workers.len() < 2 || shared.root.is_some() {
        return Ok(());
    }
    let shared = Arc::downgrade(shared);
    std::thread::Builder::new().name("nk-seats".into()).spawn(move || look_after(&shared))?;
    Ok(())
}

fn look_after(shared: &Weak<Shared>) {
    let (mut wanted, mut spent_before) = (Wanted::default(), HashMap::new());
    // By guest, until when it stays.
    let mut stays: HashMap<u32, u64> = HashMap::new();
    let mut asked_ns = 0;
    loop {
        std::thread::sleep(EVERY);
        let Some(shared) = shared.upgrade() else { return };
        if shared.stopping.load(Relaxed) {
            return;
        }
        let now = now_ns();
        // Asking wakes a thread: those that sleep are left alone.
        let works = |at: &usize| shared.workers[*at].load.told(now) > 0;
        let working: Vec<usize> = (0..shared.workers.len()).filter(works).collect();
        let one_with_room =
            working.len() < 2 && working.iter().all(|at| !shared.workers[*at].load.is_full(now));
        if one_with_room {
            wanted = Wanted::default();
            continue;
        }
        let elapsed_ns = now - std::mem::replace(&mut asked_ns, now);
        let mut loads = vec![Vec::new(); shared.workers.len()];
        let mut spent_now = HashMap::new();
        for at in working {
            let Ok(all) = shared.ask(at, Command::Spent) else { continue };
            for (guest, spent_ns) in all {
                spent_now.insert(guest, spent_ns);
                let Some(before) = spent_before.get(&guest) else { continue };
                let permille = spent_ns.saturating_sub(*before).saturating_mul(1000) / elapsed_ns.max(1);
                loads[at].push((guest, permille.min(1000) as u32));
            }
        }
        spent_before = spent_now;
        stays.retain(|_, until| *until > now);
        let Some((guest, thread)) = wanted.tick(&loads, |guest| stays.contains_key(&guest)) else { continue };
        stays.insert(guest, now + STAYS_NS);
        match seat_guest(&shared, guest, thread) {
            Ok(_) => log::info!(guest, thread; "guest {guest} goes on in switch thread {thread}: {loads:?}"),
            Err(error) => log::debug!(guest; "guest {guest} stays on its switch thread: {error}"),
        }
    }
}

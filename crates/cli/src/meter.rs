//! Keeps what guests used, every second.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail};
use netkernel_engine::{Engine, Usage};
use netkernel_meter::{Amount, Attained, Entry, Grouping, Price, Promise, Row, Store, report};
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::sys;

/// At most this much is lost when the engine's process dies.
const TICK: Duration = Duration::from_secs(1);

/// The book of one engine.
pub struct Meter {
    store: Store,
    prices: Mutex<HashMap<String, Price>>,
    last: Mutex<Last>,
}

#[derive(Default)]
struct Last {
    /// What of each guest is in the store, or in `pending`.
    counted: HashMap<Who, Usage>,
    /// Not written yet: minute, tenant, NSM, guest.
    pending: BTreeMap<(u64, String, String, String), Amount>,
    /// As that, without a guest: guarantees.
    promises: BTreeMap<(u64, String, String), Attained>,
    failing: bool,
}

/// A guest, an NSM, and which of its stays there.
type Who = (u32, String, u32);

/// What of a guest's use of an NSM is in the store.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Counted {
    guest: u32,
    nsm: String,
    #[serde(default)]
    stay: u32,
    usage: Usage,
}

/// A book in which nothing is written.
pub struct Held<'a>(MutexGuard<'a, Last>);

impl Held<'_> {
    /// What of each guest is in the store.
    pub fn counted(&self) -> Vec<Counted> {
        let all = self.0.counted.iter();
        all.map(|((guest, nsm, stay), usage)| Counted {
            guest: *guest,
            nsm: nsm.clone(),
            stay: *stay,
            usage: *usage,
        })
        .collect()
    }
}

impl Meter {
    pub fn open(path: &Path, config: &Config) -> Result<Arc<Meter>> {
        let meter = Meter { store: Store::open(path)?, prices: Mutex::default(), last: Mutex::default() };
        meter.set_prices(config);
        Ok(Arc::new(meter))
    }

    pub fn set_prices(&self, config: &Config) {
        let prices = config
            .nsms
            .iter()
            .filter_map(|nsm| {
                let price = Price {
                    per_hour: nsm.price_per_hour.as_ref().map_or(0.0, |p| *p.get_ref()),
                    per_gb: nsm.price_per_gb.as_ref().map_or(0.0, |p| *p.get_ref()),
                };
                let has = nsm.price_per_hour.is_some() || nsm.price_per_gb.is_some();
                has.then(|| (nsm.name.get_ref().clone(), price))
            })
            .collect();
        *self.prices.lock().unwrap_or_else(PoisonError::into_inner) = prices;
    }

    /// Reads the engine's counts every second from now on, as long as both live.
    pub fn start(self: &Arc<Meter>, engine: &Arc<Engine>) -> Result<()> {
        let (meter, engine) = (Arc::downgrade(self), Arc::downgrade(engine));
        std::thread::Builder::new().name("meter".into()).spawn(move || {
            loop {
                std::thread::sleep(TICK);
                let (Some(meter), Some(engine)) = (meter.upgrade(), engine.upgrade()) else { return };
                meter.tick(&engine);
            }
        })?;
        Ok(())
    }

    /// Adds what was used since the last time. What cannot be written now is kept, and written with the next.
    pub fn tick(&self, engine: &Engine) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let Last { counted, pending, promises, failing } = &mut *last;
        let minute = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() / 60;
        for guest in engine.usage() {
            // One that is put on another NSM counts from nothing there.
            let who = (guest.guest, guest.nsm.clone(), guest.stay);
            let used = guest.usage.since(&counted.get(&who).copied().unwrap_or_default());
            let amount = Amount {
                bytes_in: used.bytes_in,
                bytes_out: used.bytes_out,
                operations: used.operations,
                connections: used.connections,
                guest_ms: used.lived_ms,
                cpu_ns: used.cpu_ns,
                tcp_connections: used.tcp_connections,
                segments: used.segments,
                retransmitted: used.retransmitted,
                rtt_us: used.rtt_us,
                rtt_samples: used.rtt_samples,
            };
            if guest.over {
                counted.remove(&who);
            } else {
                counted.insert(who, guest.usage);
            }
            if !amount.is_zero() {
                let user = || sys::user_name(guest.uid).unwrap_or_else(|| guest.uid.to_string());
                let tenant = guest.tenant.unwrap_or_else(user);
                let sum = pending.entry((minute, tenant, guest.nsm, guest.name)).or_default();
                *sum = sum.plus(&amount);
            }
        }
        for attained in engine.take_attained() {
            let sum = promises.entry((minute, attained.tenant, attained.nsm)).or_default();
            *sum = sum.plus(&Attained { seconds: attained.seconds, met: attained.met });
        }
        if pending.is_empty() && promises.is_empty() {
            return;
        }
        let entries: Vec<Entry> = pending
            .iter()
            .map(|((minute, tenant, nsm, guest), amount)| Entry {
                minute: *minute,
                tenant: tenant.clone(),
                nsm: nsm.clone(),
                guest: guest.clone(),
                amount: *amount,
            })
            .collect();
        let kept: Vec<Promise> = promises
            .iter()
            .map(|((minute, tenant, nsm), attained)| Promise {
                minute: *minute,
                tenant: tenant.clone(),
                nsm: nsm.clone(),
                attained: *attained,
            })
            .collect();
        match self.store.add(&entries, &kept) {
            Ok(()) => {
                pending.clear();
                promises.clear();
                if std::mem::take(failing) {
                    log::info!("usage is written again");
                }
            }
            Err(error) => {
                if !std::mem::replace(failing, true) {
                    log::error!("usage is kept in memory, as it cannot be written: {error}");
                }
            }
        }
    }

    /// What of each guest is in the store, as the program before this one left it.
    pub fn go_on(&self, counted: Vec<Counted>) {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).counted =
            counted.into_iter().map(|one| ((one.guest, one.nsm, one.stay), one.usage)).collect();
    }

    /// Nothing is counted any more while the value lives. An error: something counted could not be written yet, and would be lost.
    pub fn hold(&self) -> Result<Held<'_>> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if !last.pending.is_empty() || !last.promises.is_empty() {
            bail!("what was used cannot be written, and would be lost");
        }
        Ok(Held(last))
    }

    /// Sums of the minutes `from..to`, of one tenant or of all.
    pub fn report(&self, from: u64, to: u64, by: Grouping, tenant: Option<&str>) -> Result<Vec<Row>> {
        let mut entries = Vec::new();
        self.store.read(from, to, |entry| {
            if tenant.is_none_or(|tenant| tenant == entry.tenant) {
                entries.push(entry);
            }
        })?;
        let mut promises = Vec::new();
        self.store.read_promises(from, to, |promise| {
            if tenant.is_none_or(|tenant| tenant == promise.tenant) {
                promises.push(promise);
            }
        })?;
        let prices = self.prices.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(report(entries, promises, by, |nsm| prices.get(nsm).copied()))
    }
}

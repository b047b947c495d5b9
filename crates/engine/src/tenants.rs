//! Tenants: who they are, what they may use, and how what is left of a module is shared among them.

use std::cell::OnceCell;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use netkernel_service::{Bucket, Limits, Police, Quota, UNLIMITED, namespace_path};

use crate::{EngineError, NsmConfig};

/// How often shares are computed anew.
const SHARE_EVERY: Duration = Duration::from_millis(10);

/// Rates of one direction, in bytes per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Rates {
    /// What the tenant gets whatever others do; 0: nothing.
    pub guaranteed: u64,
    /// What it never gets more than; `None`: no limit.
    pub most: Option<u64>,
}

/// How a tenant's guests are known. What is given counts by what the kernel says of who asks; one match is enough.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recognise {
    pub users: Vec<u32>,
    /// Paths in the cgroup file system, such as `/system.slice/web.service`; what is below counts too.
    pub cgroups: Vec<String>,
    /// Network namespaces: names in `/run/netns`, or paths.
    pub netns: Vec<String>,
    /// Whoever shows it.
    pub token: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TenantConfig {
    pub name: String,
    pub recognise: Recognise,
    /// NSMs that it may use, the first one is its default; empty: all.
    pub nsms: Vec<String>,
    pub send: Rates,
    pub receive: Rates,
    /// Queue elements per second.
    pub operations: Option<u64>,
    /// Connections at a time.
    pub connections: Option<u64>,
    /// Guests at a time.
    pub guests: Option<u64>,
    /// Bytes of each guest's region.
    pub region_bytes: Option<u64>,
    /// Its part of what is left over, in relation to the others' weights.
    pub weight: u32,
}

impl TenantConfig {
    pub fn new(name: &str) -> TenantConfig {
        TenantConfig {
            name: name.into(),
            recognise: Recognise::default(),
            nsms: Vec::new(),
            send: Rates::default(),
            receive: Rates::default(),
            operations: None,
            connections: None,
            guests: None,
            region_bytes: None,
            weight: 1,
        }
    }

    /// Whether it may use the NSM.
    pub fn may_use(&self, nsm: &str) -> bool {
        self.nsms.is_empty() || self.nsms.iter().any(|own| own == nsm)
    }
}

/// What an NSM can carry; `None`: not said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Capacity {
    /// Bytes per second, in each direction.
    pub rate: Option<u64>,
    /// Queue elements per second.
    pub operations: Option<u64>,
    pub connections: Option<u64>,
}

/// Who asks for a guest, as the kernel says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asker<'a> {
    pub pid: i32,
    pub uid: u32,
    pub token: Option<&'a str>,
}

/// One direction of a tenant's part of one NSM's capacity.
struct Share {
    bucket: Arc<Bucket>,
    used_before: AtomicU64,
}

impl Share {
    fn new() -> Share {
        Share { bucket: Arc::new(Bucket::new(UNLIMITED)), used_before: AtomicU64::new(0) }
    }
}

/// A tenant at work.
pub(crate) struct Tenant {
    config: Mutex<TenantConfig>,
    send: Arc<Bucket>,
    receive: Arc<Bucket>,
    operations: Arc<Bucket>,
    connections: Arc<Quota>,
    guests: Quota,
    /// Place in the list of tenants.
    index: usize,
    weight: AtomicU32,
    /// For each NSM: of sending and of receiving.
    shares: Vec<[Share; 2]>,
}

impl Tenant {
    fn new(config: TenantConfig, index: usize, nsms: usize) -> Tenant {
        let tenant = Tenant {
            index,
            weight: AtomicU32::new(1),
            send: Arc::new(Bucket::new(UNLIMITED)),
            receive: Arc::new(Bucket::new(UNLIMITED)),
            operations: Arc::new(Bucket::new(UNLIMITED)),
            connections: Arc::new(Quota::new(u64::MAX)),
            guests: Quota::new(u64::MAX),
            shares: (0..nsms).map(|_| [Share::new(), Share::new()]).collect(),
            config: Mutex::new(config),
        };
        tenant.apply();
        tenant
    }

    pub fn config(&self) -> TenantConfig {
        self.config.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn apply(&self) {
        let config = self.config();
        self.send.set_rate(config.send.most.unwrap_or(UNLIMITED));
        self.receive.set_rate(config.receive.most.unwrap_or(UNLIMITED));
        self.operations.set_rate(config.operations.unwrap_or(UNLIMITED));
        self.connections.set_most(config.connections.unwrap_or(u64::MAX));
        self.weight.store(config.weight.max(1), Relaxed);
        self.guests.set_most(config.guests.unwrap_or(u64::MAX));
    }

    /// What a guest of this tenant may use of an NSM.
    pub fn limits(&self, nsm: usize) -> Limits {
        let of = |own: &Arc<Bucket>, direction: usize| {
            Police::new(vec![Arc::clone(own), Arc::clone(&self.shares[nsm][direction].bucket)])
        };
        Limits {
            send: of(&self.send, 0),
            receive: of(&self.receive, 1),
            operations: Police::new(vec![Arc::clone(&self.operations)]),
            connections: Some(Arc::clone(&self.connections)),
        }
    }

    /// Which one of the configuration's it is; `None`: the one of those that it does not name.
    pub fn number(&self) -> Option<u32> {
        (self.config().name != OTHERS).then_some(self.index as u32)
    }

    pub fn index(&self) -> usize {
        self.index
    }

    pub fn weight(&self) -> u32 {
        self.weight.load(Relaxed)
    }

    /// True when kernel sockets that are given away would pass its limits by.
    pub fn needs_queues(&self) -> bool {
        let config = self.config();
        config.send.most.is_some() || config.receive.most.is_some() || config.connections.is_some()
    }

    /// True when something of what it does must be held back.
    pub fn has_limits(&self) -> bool {
        self.needs_queues() || self.config().operations.is_some()
    }

    pub fn status(&self) -> TenantStatus {
        let config = self.config();
        TenantStatus {
            name: config.name,
            weight: config.weight,
            send: config.send,
            receive: config.receive,
            operations_per_second: config.operations,
            most_connections: config.connections,
            guests: self.guests.now(),
            connections: self.connections.now(),
            bytes_out: self.send.used(),
            bytes_in: self.receive.used(),
            operations: self.operations.used(),
        }
    }
}

#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct TenantStatus {
    pub name: String,
    pub weight: u32,
    pub send: Rates,
    pub receive: Rates,
    pub operations_per_second: Option<u64>,
    pub most_connections: Option<u64>,
    pub guests: u64,
    pub connections: u64,
    /// Payload that its queued sockets sent and received, all guests that ever were.
    pub bytes_out: u64,
    pub bytes_in: u64,
    pub operations: u64,
}

/// All tenants of an engine. Without a configuration there is one that may do everything.
pub(crate) struct Tenants {
    list: Vec<Arc<Tenant>>,
    strict: bool,
    stop: Arc<AtomicBool>,
}

/// Name of the tenant of those that no configuration names.
pub const OTHERS: &str = "others";

impl Tenants {
    pub fn new(configs: &[TenantConfig], strict: bool, nsms: &[NsmConfig]) -> Result<Tenants, EngineError> {
        admit(configs, nsms)?;
        let others = TenantConfig::new(OTHERS);
        let list = configs.iter().chain([&others]).enumerate();
        let list = list.map(|(i, config)| Arc::new(Tenant::new(config.clone(), i, nsms.len()))).collect();
        let tenants = Tenants { list, strict, stop: Arc::default() };
        tenants.share(nsms);
        Ok(tenants)
    }

    pub fn all(&self) -> impl Iterator<Item = &Arc<Tenant>> {
        self.list.iter()
    }

    /// The tenant of those that no configuration names; it has no limits.
    pub fn others(&self) -> Arc<Tenant> {
        Arc::clone(&self.list[self.list.len() - 1])
    }

    /// The tenant of who asks.
    pub fn of(&self, asker: Asker) -> Result<Arc<Tenant>, EngineError> {
        // Who shows a token means it.
        let shown = asker.token.and_then(|token| self.by_token(token));
        let known = shown.or_else(|| self.by_process(asker.pid, Some(asker.uid)));
        match (known, self.list.last()) {
            (Some(tenant), _) => Ok(Arc::clone(tenant)),
            (None, Some(others)) if !self.strict => Ok(Arc::clone(others)),
            _ => Err(EngineError::Refused(format!(
                "uid {} (pid {}) belongs to no tenant of this engine: ask its provider for a [[tenant]], or show a token (--tenant-token FILE)",
                asker.uid, asker.pid
            ))),
        }
    }

    /// The tenant whose token it is.
    pub fn by_token(&self, token: &str) -> Option<&Arc<Tenant>> {
        let own = |tenant: &&Arc<Tenant>| {
            let config = tenant.config.lock().unwrap_or_else(PoisonError::into_inner);
            config.recognise.token.as_ref().is_some_and(|own| same(own, token))
        };
        self.list.iter().find(own)
    }

    /// The tenant that a process belongs to by its user, control group or network namespace; without `uid` the user does
    /// not count.
    pub fn by_process(&self, pid: i32, uid: Option<u32>) -> Option<&Arc<Tenant>> {
        let process = Process::new(pid);
        self.list.iter().find(|tenant| {
            let config = tenant.config.lock().unwrap_or_else(PoisonError::into_inner);
            uid.is_some_and(|uid| config.recognise.users.contains(&uid)) || process.is_in(&config.recognise)
        })
    }

    /// Takes a place for a guest; [`Tenants::guest_over`] gives it back.
    pub fn take_guest(&self, tenant: &Tenant) -> Result<(), EngineError> {
        if tenant.guests.take() {
            return Ok(());
        }
        Err(EngineError::Refused(format!(
            "tenant '{}' has {} guests already, as many as it may have",
            tenant.config().name,
            tenant.guests.most()
        )))
    }

    pub fn guest_over(tenant: &Tenant) {
        tenant.guests.give_back();
    }

    /// New limits for a tenant, for its connections of now too. Nothing changes when they are refused.
    pub fn change(
        &self,
        name: &str,
        nsms: &[NsmConfig],
        change: impl FnOnce(&mut TenantConfig),
    ) -> Result<(), EngineError> {
        let tenant = self.list.iter().find(|tenant| tenant.config().name == name).ok_or_else(|| {
            let known: Vec<String> = self.list.iter().map(|t| t.config().name).collect();
            EngineError::Refused(format!("there is no tenant '{name}'; there are {}", known.join(", ")))
        })?;
        let mut new = tenant.config();
        change(&mut new);
        let others = self.list.iter().map(|other| other.config()).filter(|other| other.name != name);
        admit(&others.chain([new.clone()]).collect::<Vec<_>>(), nsms)?;
        *tenant.config.lock().unwrap_or_else(PoisonError::into_inner) = new;
        tenant.apply();
        self.share(nsms);
        Ok(())
    }

    /// New configurations for all tenants, or none.
    pub fn change_all(&self, new: &[TenantConfig], nsms: &[NsmConfig]) -> Result<(), EngineError> {
        let names = |list: &[TenantConfig]| list.iter().map(|t| t.name.clone()).collect::<Vec<_>>();
        let old: Vec<TenantConfig> =
            self.list.iter().map(|t| t.config()).filter(|t| t.name != OTHERS).collect();
        if names(&old) != names(new) {
            return Err(EngineError::Config(format!(
                "tenants cannot be added, removed or put in another order while the engine runs: there are {}",
                names(&old).join(", ")
            )));
        }
        admit(new, nsms)?;
        for (tenant, config) in self.list.iter().zip(new) {
            *tenant.config.lock().unwrap_or_else(PoisonError::into_inner) = config.clone();
            tenant.apply();
        }
        self.share(nsms);
        Ok(())
    }

    /// Computes the shares of NSMs with a capacity again and again, as long as the engine lives.
    pub fn start(tenants: &Arc<Tenants>, nsms: Vec<NsmConfig>) -> std::io::Result<()> {
        if nsms.iter().all(|nsm| nsm.capacity.rate.is_none()) {
            return Ok(());
        }
        let stop = Arc::clone(&tenants.stop);
        let tenants: Weak<Tenants> = Arc::downgrade(tenants);
        std::thread::Builder::new().name("nk-shares".into()).spawn(move || {
            while !stop.load(Relaxed) {
                std::thread::sleep(SHARE_EVERY);
                let Some(tenants) = tenants.upgrade() else { return };
                tenants.share(&nsms);
            }
        })?;
        Ok(())
    }

    fn share(&self, nsms: &[NsmConfig]) {
        for (i, nsm) in nsms.iter().enumerate() {
            let Some(capacity) = nsm.capacity.rate else { continue };
            for direction in 0..2 {
                let demands: Vec<Demand> =
                    self.list.iter().map(|tenant| demand(tenant, &nsm.name, i, direction)).collect();
                for (tenant, rate) in self.list.iter().zip(divide(capacity, &demands)) {
                    tenant.shares[i][direction].bucket.set_rate(rate);
                }
            }
        }
    }
}

impl Drop for Tenants {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
}

/// What a tenant wants of a module's rate.
#[derive(Clone, Copy, Debug)]
struct Demand {
    guaranteed: u64,
    most: u64,
    weight: u32,
    /// Bytes per second; more than it had when it had to wait.
    wanted: u64,
}

fn demand(tenant: &Tenant, name: &str, nsm: usize, direction: usize) -> Demand {
    let config = tenant.config();
    let share = &tenant.shares[nsm][direction];
    let used = share.bucket.used();
    let moved = used.saturating_sub(share.used_before.swap(used, Relaxed));
    let rate = moved.saturating_mul(1000) / SHARE_EVERY.as_millis() as u64;
    // One that did not have to wait may want a bit more next time.
    let wanted = if share.bucket.take_wanting() { UNLIMITED } else { rate.saturating_add(rate / 2) };
    let rates = if direction == 0 { config.send } else { config.receive };
    let guaranteed = if config.may_use(name) { rates.guaranteed } else { 0 };
    Demand { guaranteed, most: rates.most.unwrap_or(UNLIMITED), weight: config.weight, wanted }
}

/// Divides a capacity: guarantees first, as far as they are wanted, then by weight what is left, nobody more than it wants
/// (max-min fairness). Who wants nothing now may begin with what its guarantee and weight would give it; that lasts until the
/// next division.
fn divide(capacity: u64, demands: &[Demand]) -> Vec<u64> {
    let limit = |d: &Demand| d.wanted.min(d.most);
    let mut given: Vec<u64> = demands.iter().map(|d| d.guaranteed.min(limit(d))).collect();
    let mut left = capacity.saturating_sub(given.iter().sum());
    loop {
        let open: Vec<usize> = (0..demands.len()).filter(|&i| given[i] < limit(&demands[i])).collect();
        let weights: u64 = open.iter().map(|&i| u64::from(demands[i].weight)).sum();
        if open.is_empty() || left < weights || weights == 0 {
            break;
        }
        let before = left;
        for &i in &open {
            let part = (before as u128 * u128::from(demands[i].weight) / u128::from(weights)) as u64;
            let part = part.min(limit(&demands[i]) - given[i]).min(left);
            given[i] += part;
            left -= part;
        }
        if before == left {
            break;
        }
    }
    let weights: u64 = demands.iter().map(|d| u64::from(d.weight)).sum::<u64>().max(1);
    given
        .into_iter()
        .zip(demands)
        .map(|(given, d)| {
            let start =
                d.guaranteed.max((capacity as u128 * u128::from(d.weight) / u128::from(weights)) as u64);
            let start = if d.wanted == UNLIMITED { 0 } else { start };
            given.max(start).min(d.most).max(1)
        })
        .collect()
}

/// Promises that cannot be kept are not made.
fn admit(tenants: &[TenantConfig], nsms: &[NsmConfig]) -> Result<(), EngineError> {
    for tenant in tenants {
        if let Some(unknown) = tenant.nsms.iter().find(|name| !nsms.iter().any(|nsm| nsm.name == **name)) {
            return Err(EngineError::Config(format!(
                "tenant '{}' may use '{unknown}', but there is no such [[nsm]]",
                tenant.name
            )));
        }
        for (what, rates) in [("send", tenant.send), ("receive", tenant.receive)] {
            if rates.most.is_some_and(|most| most < rates.guaranteed) {
                return Err(EngineError::Config(format!(
                    "tenant '{}': {what} is guaranteed {} but at most {}",
                    tenant.name,
                    bits(rates.guaranteed),
                    bits(rates.most.unwrap_or(0))
                )));
            }
        }
    }
    for nsm in nsms {
        let Some(capacity) = nsm.capacity.rate else { continue };
        for (what, of) in [("send", (|t| t.send) as fn(&TenantConfig) -> Rates), ("receive", |t| t.receive)] {
            let promised: Vec<(&str, u64)> = tenants
                .iter()
                .filter(|tenant| tenant.may_use(&nsm.name))
                .map(|tenant| (tenant.name.as_str(), of(tenant).guaranteed))
                .filter(|(_, rate)| *rate > 0)
                .collect();
            let sum = promised.iter().fold(0u64, |sum, (_, rate)| sum.saturating_add(*rate));
            if sum > capacity {
                let terms: Vec<String> =
                    promised.iter().map(|(name, rate)| format!("{name} {}", bits(*rate))).collect();
                return Err(EngineError::Config(format!(
                    "NSM '{}' can carry {}, but {what} is guaranteed {} = {}: lower a guarantee, raise `capacity`, or let fewer tenants use it",
                    nsm.name,
                    bits(capacity),
                    terms.join(" + "),
                    bits(sum)
                )));
            }
        }
    }
    Ok(())
}

/// Bytes per second as people say it.
pub fn bits(rate: u64) -> String {
    let bits = rate as f64 * 8.0;
    let (value, unit) = match bits {
        b if b >= 1e9 => (b / 1e9, "Gbit/s"),
        b if b >= 1e6 => (b / 1e6, "Mbit/s"),
        b if b >= 1e3 => (b / 1e3, "kbit/s"),
        b => (b, "bit/s"),
    };
    let text = format!("{value:.3}");
    format!("{} {unit}", text.trim_end_matches('0').trim_end_matches('.'))
}

/// Where a process is, looked up once however many tenants are compared with it, and only if one is.
struct Process {
    pid: i32,
    cgroups: OnceCell<String>,
    netns: OnceCell<Option<(u64, u64)>>,
}

impl Process {
    fn new(pid: i32) -> Process {
        Process { pid, cgroups: OnceCell::new(), netns: OnceCell::new() }
    }

    fn is_in(&self, by: &Recognise) -> bool {
        by.cgroups.iter().any(|wanted| self.in_cgroup(wanted))
            || by.netns.iter().any(|name| self.in_netns(name))
    }

    fn in_cgroup(&self, wanted: &str) -> bool {
        let read = || std::fs::read_to_string(format!("/proc/{}/cgroup", self.pid)).unwrap_or_default();
        let wanted = wanted.trim_end_matches('/');
        self.cgroups
            .get_or_init(read)
            .lines()
            .filter_map(|line| line.splitn(3, ':').nth(2))
            .any(|path| path == wanted || path.strip_prefix(wanted).is_some_and(|rest| rest.starts_with('/')))
    }

    fn in_netns(&self, name: &str) -> bool {
        let inode = |path: PathBuf| std::fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
        let own = self.netns.get_or_init(|| inode(format!("/proc/{}/ns/net", self.pid).into()));
        own.is_some() && *own == inode(namespace_path(name).into())
    }
}

/// Whether two tokens are the same. Takes as long for wrong bytes as for right ones.
pub fn same(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    a.len() == b.len() && a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demand(guaranteed: u64, weight: u32, wanted: u64) -> Demand {
        Demand { guaranteed, most: UNLIMITED, weight, wanted }
    }

    #[test]
    fn a_capacity_is_divided_by_guarantee_weight_and_want() {
        let all = UNLIMITED;
        assert_eq!(divide(900, &[demand(0, 1, all), demand(0, 1, all)]), [450, 450]);
        assert_eq!(divide(900, &[demand(0, 1, all), demand(0, 2, all)]), [300, 600]);
        assert_eq!(divide(1000, &[demand(600, 1, all), demand(0, 1, all)]), [800, 200]);
        // What one does not want is the others'; it may begin with its part nevertheless.
        assert_eq!(divide(900, &[demand(0, 1, all), demand(0, 2, 30)])[0], 870);
        let idle = divide(1000, &[demand(0, 1, all), demand(400, 1, 0)]);
        assert_eq!((idle[0], idle[1]), (1000, 500));
        let capped = divide(1000, &[Demand { most: 100, ..demand(0, 1, all) }, demand(0, 1, all)]);
        assert_eq!(capped, [100, 900]);
        assert!(divide(1, &[demand(0, 1, all), demand(0, 1, all)]).iter().all(|&rate| rate > 0));
    }

    #[test]
    fn promises_that_cannot_be_kept_are_refused_with_the_arithmetic() {
        let mut nsm = NsmConfig::kernel("bbr", None);
        nsm.capacity.rate = Some(1_250_000_000);
        let tenant = |name: &str, gbit: u64| TenantConfig {
            send: Rates { guaranteed: gbit * 125_000_000, most: None },
            ..TenantConfig::new(name)
        };
        let (a, b) = (tenant("a", 6), tenant("b", 5));
        let error = admit(&[a.clone(), b.clone()], &[nsm.clone()]).unwrap_err().to_string();
        assert!(
            error.contains("'bbr' can carry 10 Gbit/s")
                && error.contains("a 6 Gbit/s + b 5 Gbit/s = 11 Gbit/s"),
            "{error}"
        );
        let elsewhere = TenantConfig { nsms: vec!["cubic".into()], ..b };
        let cubic = NsmConfig::kernel("cubic", None);
        assert_eq!(admit(&[a.clone(), elsewhere], &[nsm.clone(), cubic]), Ok(()));
        let unknown = TenantConfig { nsms: vec!["reno".into()], ..a };
        assert!(admit(&[unknown], &[nsm]).unwrap_err().to_string().contains("no such [[nsm]]"));
    }

    #[test]
    fn tenants_are_known_by_what_the_kernel_says() {
        let own = Asker { pid: std::process::id() as i32, uid: 1234, token: None };
        let recognises = |recognise: &Recognise, asker: Asker| {
            let config = TenantConfig { recognise: recognise.clone(), ..TenantConfig::new("a") };
            let tenants = Tenants::new(&[config], true, &[]).unwrap();
            tenants.of(asker).is_ok()
        };
        let by = |recognise: Recognise| recognises(&recognise, own);
        assert!(!by(Recognise::default()));
        assert!(by(Recognise { users: vec![7, 1234], ..Recognise::default() }));
        assert!(by(Recognise { netns: vec!["/proc/self/ns/net".into()], ..Recognise::default() }));
        assert!(!by(Recognise { netns: vec!["no-such".into()], ..Recognise::default() }));
        assert!(by(Recognise { cgroups: vec!["/".into()], ..Recognise::default() }));
        assert!(!by(Recognise { cgroups: vec!["/no/such".into()], ..Recognise::default() }));
        let with = Recognise { token: Some("secret".into()), ..Recognise::default() };
        assert!(recognises(&with, Asker { token: Some("secret"), ..own }));
        for wrong in [None, Some(""), Some("secreT"), Some("secret2")] {
            assert!(!recognises(&with, Asker { token: wrong, ..own }), "{wrong:?}");
        }
    }

    #[test]
    fn rates_are_told_as_people_say_them() {
        for (rate, text) in [
            (125_000_000, "1 Gbit/s"),
            (62_500_000, "500 Mbit/s"),
            (187_500_000, "1.5 Gbit/s"),
            (1, "8 bit/s"),
        ] {
            assert_eq!(bits(rate), text);
        }
    }
}

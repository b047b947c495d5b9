//! The engine, as the control server sees it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, RwLock};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use netkernel_control::{
    ApiError, Caller, CaptureInfo, Destination, EngineApi, EngineChange, ErrorCode, Grant, Moved, NewCapture,
    NewGuest, NsmInfo, PROTOCOL_VERSION, Peer, Restarted, SocketInfo, StackChange, Status, Stayed,
    TenantChange, TenantInfo, UsageQuery, VersionInfo,
};
use netkernel_engine::{Attach, Engine, EngineError, Form, GuestFds, GuestSpec, NsmChange, Policy, Target};

use netkernel_meter::{Grouping, Row};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::catalog::{self, convert};
use crate::config::Config;
use crate::meter::{Counted, Meter};
use crate::restart::{Left, Told};

pub struct Adapter {
    engine: Arc<Engine>,
    socket: PathBuf,
    private: bool,
    started: Instant,
    meter: Option<Arc<Meter>>,
    /// Tenants, and stacks, with lines of their own in /metrics.
    labels: usize,
    /// Who shows it is the provider.
    provider_token: Option<String>,
    /// What was read last, and where from.
    config_file: Option<PathBuf>,
    /// What the catalogue says of each stack and the engine need not know.
    offers: Mutex<HashMap<String, Map<String, Value>>>,
    /// An eventfd.
    stop: File,
    /// Another program is to go on; readable once somebody asked for that.
    again: File,
    program: Mutex<Option<(PathBuf, bool)>>,
    /// Where this program was started from.
    own_program: Option<PathBuf>,
    told: Mutex<Told>,
    /// Held while guests are made, and while everything is written down.
    gate: RwLock<()>,
    /// Guests made so far.
    made: Mutex<u64>,
    first: Condvar,
}

impl Adapter {
    /// `left`: what the program before this one wrote down.
    pub fn start(
        config: &Config,
        socket: &Path,
        private: bool,
        left: Option<OwnedFd>,
    ) -> Result<Arc<Adapter>> {
        let catalog = catalog::of(config)?;
        let own_program = catalog.process_binary.clone();
        let (engine, resumed) = match left {
            None => Engine::start(catalog).map(|engine| (engine, None)),
            Some(document) => Engine::resume(catalog, document).map(|(engine, of)| (engine, Some(of))),
        }
        .map_err(|e| anyhow!("{}", refusal(e)))?;
        let besides: Besides = resumed
            .as_ref()
            .and_then(|resumed| serde_json::from_value(resumed.besides.clone()).ok())
            .unwrap_or_default();
        let mut told = besides.told;
        if let Some(resumed) = &resumed {
            let (guests, pause_us) = (resumed.guests, resumed.pause.as_micros() as u64);
            let (lost, reset) = (resumed.lost.clone(), resumed.reset.clone());
            told = Told { count: told.count + 1, pause_us, guests, lost, reset, ..told };
            log::info!(guests, pause_us; "goes on with {guests} guests, which waited {:.1} ms", pause_us as f64 / 1000.0);
        }
        let lived = Duration::from_millis(besides.lived_ms);
        let meter = match &config.engine.usage {
            Some(path) => {
                let meter = Meter::open(path, config)?;
                meter.go_on(besides.counted);
                meter.start(&engine)?;
                Some(meter)
            }
            None => None,
        };
        let adapter = Adapter {
            engine,
            meter,
            labels: config.engine.metrics_labels.unwrap_or(crate::metrics::LABELS),
            provider_token: config.provider_token()?,
            config_file: config.file.clone(),
            offers: Mutex::new(offers(config)),
            socket: socket.into(),
            private,
            started: Instant::now().checked_sub(lived).unwrap_or_else(Instant::now),
            again: netkernel_shm::fds::eventfd().context("cannot make an eventfd")?.into(),
            program: Mutex::default(),
            own_program,
            told: Mutex::new(told),
            gate: RwLock::default(),
            stop: netkernel_shm::fds::eventfd().context("cannot make an eventfd")?.into(),
            made: Mutex::new(besides.made),
            first: Condvar::new(),
        };
        // What was configured by name must be there; of the built-in catalogue, what is there is offered.
        if !config.nsms.is_empty() {
            catalog::check(&adapter.stacks())?;
        }
        Ok(Arc::new(adapter))
    }

    /// Readable once somebody asked this process to end.
    pub fn stop_requested(&self) -> BorrowedFd<'_> {
        self.stop.as_fd()
    }

    /// Requests a stop when no guest came within `first`, and after the last one.
    pub fn stop_when_unused(self: &Arc<Self>, first: Duration) -> Result<()> {
        let adapter = self.clone();
        let watch = move || {
            let made = adapter.made.lock().unwrap_or_else(|e| e.into_inner());
            let waited = adapter.first.wait_timeout_while(made, first, |made| *made == 0);
            let any = *waited.unwrap_or_else(|e| e.into_inner()).0 > 0;
            if any {
                adapter.engine.wait_idle();
            }
            adapter.stop();
        };
        std::thread::Builder::new().name("last-guest".into()).spawn(watch).context("no thread")?;
        Ok(())
    }

    /// Readable once somebody asked for another program.
    pub fn restart_requested(&self) -> BorrowedFd<'_> {
        self.again.as_fd()
    }

    /// Executes the program that was asked for; comes back if that fails, with everything as before. `listening`: the control
    /// socket, and its lock.
    pub fn restart(&self, listening: (RawFd, Option<RawFd>)) {
        let mut count = [0; 8];
        let _ = (&self.again).read(&mut count);
        let Some((program, lose)) = lock(&self.program).take() else { return };
        if let Err(error) = self.exchange(&program, lose, listening) {
            log::error!("this program goes on: {error:#}");
            let mut told = lock(&self.told);
            told.failures += 1;
            told.error = Some(format!("{error:#}"));
        }
    }

    fn exchange(
        &self,
        program: &Path,
        lose: bool,
        (listener, socket_lock): (RawFd, Option<RawFd>),
    ) -> Result<()> {
        let _nobody_comes = self.gate.write().unwrap_or_else(|e| e.into_inner());
        let counted = match &self.meter {
            Some(meter) => {
                meter.tick(&self.engine);
                Some(meter.hold()?)
            }
            None => None,
        };
        let besides = || {
            let besides = Besides {
                counted: counted.as_ref().map(|held| held.counted()).unwrap_or_default(),
                told: lock(&self.told).clone(),
                lived_ms: self.started.elapsed().as_millis() as u64,
                made: *lock(&self.made),
            };
            serde_json::to_value(besides).unwrap_or_default()
        };
        let stopped = self.engine.stop_for(lose, besides).map_err(|e| anyhow!("{}", refusal(e)))?;
        let left =
            Left { document: stopped.document(), listener, lock: socket_lock, path: self.socket.clone() };
        stopped.keep(true);
        self.engine.end_heir();
        let result = crate::restart::execute(program, &left);
        stopped.keep(false);
        result
    }

    pub fn shutdown(&self) {
        self.engine.shutdown();
        if let Some(meter) = &self.meter {
            meter.tick(&self.engine);
        }
    }
}

/// What goes with the engine's state to the next program.
#[derive(Default, Serialize, Deserialize)]
struct Besides {
    counted: Vec<Counted>,
    told: Told,
    lived_ms: u64,
    made: u64,
}

impl Adapter {
    fn details(&self, status: &netkernel_engine::Status) -> Map<String, Value> {
        let mut all = details(status);
        let told = lock(&self.told).clone();
        if told.count + told.failures > 0 {
            all.insert("restart".into(), serde_json::to_value(told).unwrap_or_default());
        }
        all
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl EngineApi for Adapter {
    fn can_restart(&self, change: EngineChange) -> Result<(), ApiError> {
        let bad = |text: String| ApiError::new(ErrorCode::BadRequest, text);
        if self.private {
            return Err(bad("a private engine is not exchanged: it ends with its program".into()));
        }
        let program = change.binary.clone().map(PathBuf::from).or_else(|| self.own_program.clone());
        let program = program.filter(|path| path.is_absolute() && path.is_file());
        let program = program.ok_or_else(|| bad("binary: is no file, or its path is not absolute".into()))?;
        crate::restart::check(&program).map_err(|e| bad(format!("{e:#}")))?;
        if let Some(file) = &self.config_file {
            let config = Config::read(file).map_err(|e| bad(format!("{e:#}")))?;
            crate::restart::check_config(&program, file).map_err(|e| bad(format!("{e:#}")))?;
            let offered = catalog::of(&config).map_err(|e| bad(format!("{e:#}")))?.nsms;
            for (guest, used) in self.engine.stacks_in_use() {
                let stack = &used.name;
                let why = match offered.iter().find(|nsm| nsm.name == *stack) {
                    None => "is not there, and",
                    Some(now) if now.form != used.form => "has another form, and",
                    // A process goes on as it is.
                    Some(_) if used.form == Form::Process || change.lose => continue,
                    Some(now) if now.is_same_kind(&used) => continue,
                    Some(_) => "is of another kind (--lose resets sockets of it), and",
                };
                return Err(bad(format!("{}: stack '{stack}' {why} guest {guest} has it", file.display())));
            }
        }
        self.engine.can_be_exchanged(change.lose).map_err(refusal)?;
        *lock(&self.program) = Some((program, change.lose));
        Ok(())
    }

    fn restart_now(&self) {
        let _ = (&self.again).write(&1u64.to_ne_bytes());
    }

    fn version(&self) -> VersionInfo {
        VersionInfo {
            program: env!("CARGO_PKG_VERSION").into(),
            protocol_version: PROTOCOL_VERSION,
            abi_version: netkernel_abi::ABI_VERSION,
            pid: std::process::id(),
            uid: crate::sys::effective_uid(),
        }
    }

    fn create_guest(&self, guest: NewGuest, peer: Peer) -> Result<Grant, ApiError> {
        let _gate = self.gate.read().unwrap_or_else(|e| e.into_inner());
        let spec = GuestSpec {
            name: guest.name.unwrap_or_else(|| "guest".into()),
            stack: guest.stack.unwrap_or_default(),
            tenant_token: guest.tenant_token,
            pid: peer.pid,
            uid: peer.uid,
            limits: None,
            huge_pages: None,
        };
        let grant = self.engine.create_guest(spec).map(grant).map_err(refusal)?;
        *self.made.lock().unwrap_or_else(|e| e.into_inner()) += 1;
        self.first.notify_all();
        Ok(grant)
    }

    fn attach(&self, token: [u8; 16]) -> Result<Grant, ApiError> {
        let _gate = self.gate.read().unwrap_or_else(|e| e.into_inner());
        self.engine.attach(&token).map(grant).map_err(refusal)
    }

    fn status(&self) -> Status {
        let status = self.engine.status();
        Status {
            engine: self.version(),
            socket: self.socket.display().to_string(),
            private: self.private,
            uptime_seconds: self.started.elapsed().as_secs(),
            guests: status.guests.iter().filter_map(convert).collect(),
            details: self.details(&status),
        }
    }

    fn stacks(&self) -> Vec<NsmInfo> {
        let mut stacks: Vec<NsmInfo> = self.engine.stacks().iter().filter_map(convert).collect();
        let offers = self.offers.lock().unwrap_or_else(|e| e.into_inner());
        for nsm in &mut stacks {
            nsm.details.extend(offers.get(&nsm.name).cloned().unwrap_or_default());
        }
        stacks
    }

    fn sockets(&self, guests: &[u32]) -> Result<Vec<SocketInfo>, ApiError> {
        Ok(self.engine.sockets_of(guests).iter().filter_map(convert).collect())
    }

    fn end_guest(&self, guest: u32) -> Result<(), ApiError> {
        self.engine.end_guest(guest).map_err(refusal)
    }

    fn move_guest(&self, guest: u32, to: &Destination) -> Result<Moved, ApiError> {
        let _gate = self.gate.read().unwrap_or_else(|e| e.into_inner());
        let stack = &to.stack;
        let moved = self.engine.move_guest(guest, stack, to.all_or_nothing).map_err(refusal)?;
        let left: usize = moved.stayed.iter().map(|left| left.sockets).sum();
        log::info!(
            guest, nsm:% = stack;
            "guest {guest} was moved to stack {stack} with {} sockets; {left} stay where they were",
            moved.sockets
        );
        let stayed = moved.stayed.into_iter();
        let stayed =
            stayed.map(|left| Stayed { sockets: left.sockets, stack: left.stack, reason: left.reason });
        Ok(Moved { sockets: moved.sockets, stayed: stayed.collect() })
    }

    fn restart_stack(&self, name: &str) -> Result<Restarted, ApiError> {
        let _gate = self.gate.read().unwrap_or_else(|e| e.into_inner());
        let pause = self.engine.restart_nsm(name).map_err(refusal)?;
        Ok(Restarted { pause_us: pause.map(|pause| pause.as_micros() as u64) })
    }

    fn swap_stack(&self, name: &str, change: StackChange) -> Result<Restarted, ApiError> {
        let policy = change.congestion_policy.as_deref().map(|policy| match policy {
            "allow" => Ok(Policy::Allow),
            "ignore" => Ok(Policy::Ignore),
            "refuse" => Ok(Policy::Refuse),
            _ => Err(ApiError::new(
                ErrorCode::BadRequest,
                format!("congestion_policy '{policy}' is none of allow, ignore, refuse"),
            )),
        });
        let told = serde_json::to_string(&change).unwrap_or_default();
        let binary = change.binary.map(PathBuf::from);
        if let Some(path) = binary.as_ref().filter(|path| !path.is_absolute() || !path.is_file()) {
            let text = format!("{}: is no file, or its path is not absolute", path.display());
            return Err(ApiError::new(ErrorCode::BadRequest, text));
        }
        let change = NsmChange {
            binary,
            congestion_control: change.congestion_control,
            congestion_policy: policy.transpose()?,
            pacing: change.pacing,
            mark: change.mark,
        };
        let _gate = self.gate.read().unwrap_or_else(|e| e.into_inner());
        let pause = self.engine.swap_nsm(name, &change).map_err(refusal)?;
        log::info!(nsm = name; "stack {name} was swapped: {told}");
        Ok(Restarted { pause_us: pause.map(|pause| pause.as_micros() as u64) })
    }

    fn stop(&self) {
        let _ = (&self.stop).write(&1u64.to_ne_bytes());
    }

    fn capture(
        &self,
        capture: NewCapture,
        of: Option<u32>,
    ) -> Result<(std::os::fd::OwnedFd, CaptureInfo), ApiError> {
        if let Some(name) = &capture.tenant
            && !self.engine.tenants().iter().any(|tenant| tenant.name == *name)
        {
            let text = format!("no tenant '{name}': `netkernel tenants` lists them");
            return Err(ApiError::new(ErrorCode::BadRequest, text));
        }
        let target = Target { guest: capture.guest, tenant: capture.tenant, uid: of };
        let snap = capture.snap_bytes.map_or(usize::MAX, |bytes| bytes as usize);
        let (pipe, unseen) = self.engine.capture(target, snap).map_err(refusal)?;
        let info = convert(&unseen).unwrap_or_default();
        Ok((pipe, CaptureInfo { unseen: unseen.sentence(), ..info }))
    }

    fn tenants(&self) -> Vec<TenantInfo> {
        self.engine.tenants().iter().filter_map(convert).collect()
    }

    fn change_tenant(&self, name: &str, change: TenantChange) -> Result<(), ApiError> {
        // 0 takes a limit away.
        let set = |to: &mut Option<u64>, new: Option<u64>| {
            if let Some(new) = new {
                *to = (new > 0).then_some(new);
            }
        };
        if change.weight == Some(0) {
            return Err(ApiError::new(ErrorCode::BadRequest, "a weight is 1 to 10000"));
        }
        let apply = |tenant: &mut netkernel_engine::TenantConfig| {
            set(&mut tenant.send.most, change.max_send);
            set(&mut tenant.receive.most, change.max_receive);
            set(&mut tenant.operations, change.max_operations);
            set(&mut tenant.connections, change.max_connections);
            tenant.guaranteed_operations =
                change.guaranteed_operations.unwrap_or(tenant.guaranteed_operations);
            tenant.guaranteed_connections =
                change.guaranteed_connections.unwrap_or(tenant.guaranteed_connections);
            set(&mut tenant.guests, change.max_guests);
            tenant.send.guaranteed = change.guaranteed_send.unwrap_or(tenant.send.guaranteed);
            tenant.receive.guaranteed = change.guaranteed_receive.unwrap_or(tenant.receive.guaranteed);
            tenant.weight = change.weight.unwrap_or(tenant.weight);
        };
        self.engine.change_tenant(name, apply).map_err(refusal)?;
        log::info!(tenant = name; "the limits of tenant {name} were changed");
        Ok(())
    }

    fn reload(&self) -> Result<(), ApiError> {
        let bad = |text: String| ApiError::new(ErrorCode::BadRequest, text);
        let file = self
            .config_file
            .as_ref()
            .ok_or_else(|| bad("this engine was started without a configuration file".into()))?;
        let config = Config::read(file).map_err(|e| bad(format!("{e:#}")))?;
        let tenants = config.tenants().map_err(|e| bad(format!("{e:#}")))?;
        self.engine.change_tenants(&tenants).map_err(refusal)?;
        if let Some(meter) = &self.meter {
            meter.set_prices(&config);
        }
        *self.offers.lock().unwrap_or_else(|e| e.into_inner()) = offers(&config);
        log::info!(file:% = file.display(); "the configuration was read again");
        Ok(())
    }

    fn tenant_of(&self, pid: i32, uid: Option<u32>) -> Option<String> {
        self.engine.tenant_of_process(pid, uid)
    }

    fn by_token(&self, token: &str) -> Option<Caller> {
        if self.provider_token.as_deref().is_some_and(|own| netkernel_engine::same(own, token)) {
            return Some(Caller::Provider);
        }
        self.engine.tenant_by_token(token).map(Caller::Tenant)
    }

    fn nsms_of(&self, tenant: &str) -> Option<Vec<String>> {
        self.engine.nsms_of(tenant)
    }

    fn usage(&self, query: &UsageQuery, caller: &Caller) -> Result<Vec<Row>, ApiError> {
        let bad = |text: String| ApiError::new(ErrorCode::BadRequest, text);
        let by = Grouping::parse(query.by.as_deref().unwrap_or("tenant,nsm")).map_err(bad)?;
        let meter = self.meter.as_ref().ok_or_else(|| {
            bad("this engine keeps no usage: name a file in its configuration, `usage` in [engine]".into())
        })?;
        // With the last second in it.
        meter.tick(&self.engine);
        let (from, to) = (query.from.unwrap_or(0) / 60, query.to.map_or(u64::MAX, |to| to / 60));
        let tenant = match caller {
            Caller::Provider => None,
            Caller::Tenant(name) => Some(name.clone()),
            // With tenants, what others use is counted together: nobody's own.
            Caller::User(_) if self.engine.tenants().len() > 1 => return Ok(Vec::new()),
            Caller::User(uid) => Some(crate::sys::user_name(*uid).unwrap_or_else(|| uid.to_string())),
        };
        meter
            .report(from, to, by, tenant.as_deref())
            .map_err(|e| ApiError::new(ErrorCode::Engine, e.to_string()))
    }

    fn metrics(&self) -> String {
        let (status, totals) = self.engine.overview();
        let tenants: Vec<String> = self.engine.tenants().into_iter().map(|tenant| tenant.name).collect();
        crate::metrics::render(&status, &totals, &self.engine.attainment(), &tenants, self.labels)
    }
}

fn offers(config: &Config) -> HashMap<String, Map<String, Value>> {
    let one = |nsm: &crate::config::NsmSection| {
        let keys = [
            ("cores", &nsm.cores),
            ("price_per_hour", &nsm.price_per_hour),
            ("price_per_gb", &nsm.price_per_gb),
        ];
        let told = |(key, value): (&str, &Option<toml::Spanned<f64>>)| {
            Some((key.to_owned(), Value::from(*value.as_ref()?.get_ref())))
        };
        (nsm.name.get_ref().clone(), keys.into_iter().filter_map(told).collect())
    };
    config.nsms.iter().map(one).collect()
}

/// What else the engine counts.
fn details(status: &netkernel_engine::Status) -> Map<String, Value> {
    let mut all: Map<String, Value> = convert(status).unwrap_or_default();
    for told_elsewhere in ["guests", "stacks", "uptime_seconds"] {
        all.remove(told_elsewhere);
    }
    all
}

fn grant(fds: GuestFds) -> Grant {
    let GuestFds { id, token, attach, direct, region, channel, doorbell } = fds;
    let attach = match attach {
        Attach::Auto => "auto",
        Attach::Queued => "queued",
        Attach::Direct => "direct",
        Attach::Relay => "relay",
    };
    Grant { id, token, attach: attach.into(), direct, region, channel, doorbell }
}

fn refusal(error: EngineError) -> ApiError {
    let code = match &error {
        EngineError::UnknownStack { .. } | EngineError::StackUnavailable { .. } => ErrorCode::UnknownStack,
        EngineError::UnknownGuest(_) => ErrorCode::UnknownGuest,
        EngineError::BadToken => ErrorCode::BadToken,
        EngineError::TooManyGuests(_) => ErrorCode::Limit,
        EngineError::Refused(_) => ErrorCode::Permission,
        EngineError::Config(_) | EngineError::Resource(_) | EngineError::Stopped => ErrorCode::Engine,
    };
    let message = match error {
        EngineError::UnknownStack { name, mut known } => {
            known.sort();
            format!("no stack named '{name}'; this engine offers {}", known.join(", "))
        }
        other => other.to_string(),
    };
    ApiError::new(code, message)
}

//! The engine's side of an NSM in a process of its own: takes the commands of a switch thread.

use std::collections::HashMap;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command as Process, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use netkernel_agent::gate::Gate;
use netkernel_capture::Session;
use netkernel_shm::fds;
use serde::{Deserialize, Serialize};

use super::journal::Left;
use super::transit::{Packed, Used};
use super::wire::{Answer, Call, NewGuest, Reader, Report, Request, Start, send};
use crate::engine::{Command, Shared, lock};
use crate::status::{GuestStatus, SocketStatus};
use crate::tenants::Tenant;
use crate::usage::Usage;
use crate::{EngineError, NsmConfig};

use super::{succession, transit};

pub(crate) struct Remote {
    nsm: usize,
    /// Held while nobody knows which process is the next.
    gate: Mutex<()>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    running: Option<Running>,
    serial: u64,
    pending: HashMap<u64, Pending>,
    reader: Option<JoinHandle<()>>,
    stopped: bool,
    /// What its worker was told to capture.
    captures: Vec<Arc<Session>>,
    /// Who waits for the next worker to serve.
    restarting: Vec<Sender<()>>,
    /// The process that runs is a successor that did not serve yet. If it ends, its guests are not lost.
    on_trial: bool,
    /// What it is started with, if not with the engine's own program.
    binary: Option<PathBuf>,
    /// Guests on their way, and who wants to know where they are.
    on_the_way: Vec<(u32, Sender<Fate>)>,
}

/// What was heard of a guest that is on its way into the process, or out of it.
enum Fate {
    /// What the worker says.
    Answered(Result<(), String>),
    /// There is another worker, by its number; it has the guest, or not.
    Next(u32, bool),
    /// There is no worker any more, nor will be.
    Gone,
}

impl State {
    fn runs(&self, control: &OwnedFd) -> bool {
        self.running.as_ref().is_some_and(|running| running.control.as_raw_fd() == control.as_raw_fd())
    }
}

struct Running {
    control: Arc<OwnedFd>,
    holder: u32,
    /// Of its reader, which passes for each message.
    gate: Arc<Gate>,
    /// 0: none said yet that it serves.
    worker: u32,
}

/// A process as it is written down for another program of this engine, whose child it stays.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct LeftRunning {
    pub nsm: NsmConfig,
    /// Number of this very process.
    pub control: RawFd,
    /// In tenants' memory.
    pub place: usize,
    holder: u32,
    worker: u32,
    binary: Option<PathBuf>,
}

/// Nothing is said to the process, and nothing that it says is taken, while this lives.
pub(crate) struct Still<'a> {
    remote: &'a Remote,
    reader: Option<Arc<Gate>>,
    _nobody_asks: MutexGuard<'a, ()>,
}

impl Drop for Still<'_> {
    fn drop(&mut self) {
        self.reader.iter().for_each(|gate| gate.open());
    }
}

impl Still<'_> {
    /// What another program goes on with; `None`: no process runs.
    pub fn left(&self, shared: &Shared) -> Option<LeftRunning> {
        let state = lock(&self.remote.state);
        let running = state.running.as_ref()?;
        Some(LeftRunning {
            nsm: (*shared.nsm(self.remote.nsm)).clone(),
            control: running.control.as_raw_fd(),
            place: shared.tenants.place(self.remote.nsm)?,
            holder: running.holder,
            worker: running.worker,
            binary: state.binary.clone(),
        })
    }
}

/// What it is waited for.
struct OnTheWay {
    guest: u32,
    /// Who served when it was asked for; 0: nobody had said so yet.
    worker: u32,
    fate: Receiver<Fate>,
}

/// Where a guest is that was on its way.
enum Settled {
    /// As the worker says: where it was to go, or where it was.
    Answered(Result<(), String>),
    /// The process has it, or it does not.
    Is,
    IsNot,
    Gone,
}

/// A child of this process, or of the program that it executed before.
struct Child(u32);

impl Child {
    /// Kills it, if it is still there, and waits for it.
    fn end(&self) {
        // SAFETY: plain system calls; the number is that of a child that was not waited for.
        unsafe {
            libc::kill(self.0 as i32, libc::SIGKILL);
            libc::waitpid(self.0 as i32, std::ptr::null_mut(), 0);
        }
    }
}

/// Ends a process that was left to nobody: its stack is not configured any more.
pub(crate) fn abandon(left: &LeftRunning, control: OwnedFd) {
    let child = Child(left.holder);
    drop(control);
    child.end();
}

/// How long the process may take to end, and a worker to stop between two turns.
const PATIENCE: Duration = Duration::from_secs(5);

/// Who waits for an answer. Dropped: it gets none.
enum Pending {
    Done(Sender<Result<(), EngineError>>),
    Status(Sender<Vec<GuestStatus>>),
    Usage(Sender<Vec<(u32, Usage)>>),
    Sockets(Sender<(Vec<SocketStatus>, Option<u32>)>),
    Transit(Sender<Fate>),
}

impl Remote {
    pub fn new(nsm: usize) -> Remote {
        Remote { nsm, gate: Mutex::default(), state: Mutex::default() }
    }

    pub fn nsm(&self) -> usize {
        self.nsm
    }

    /// Passes a command on. Whoever waits for its answer gets one, or sees that the sender is gone.
    pub fn send(&self, shared: &Arc<Shared>, command: Command) {
        let _one = lock(&self.gate);
        let mut state = lock(&self.state);
        let mut keep = Vec::new();
        let (request, fds, pending) = match command {
            Command::Add(guest, answer) => {
                let limits = guest.region.layout().limits;
                let (name, pid, uid) = shared.who(guest.id);
                let tenant = shared.whose(guest.id).map(|(tenant, ..)| tenant).unwrap_or_default();
                let request = Request::Add(NewGuest {
                    id: guest.id,
                    name,
                    tenant,
                    pid,
                    uid,
                    privileged: guest.privileged,
                    limits: (limits.region_bytes, limits.sockets, limits.queue_sets),
                });
                let mut fds = vec![guest.region.fd(), guest.channel.as_raw_fd(), guest.doorbell.as_raw_fd()];
                fds.extend(guest.tenant.memory().map(|memory| memory.as_raw_fd()));
                keep.push(guest);
                (request, fds, Some(Pending::Done(answer)))
            }
            Command::Channel(id, channel, answer) => {
                let pending = Some(Pending::Done(answer));
                return self.call(&mut state, Request::Channel(id), &[channel.as_raw_fd()], pending);
            }
            Command::End(id) => (Request::End(id), Vec::new(), None),
            Command::Status(answer) => (Request::Status, Vec::new(), Some(Pending::Status(answer))),
            Command::Usage(answer) => (Request::Usage, Vec::new(), Some(Pending::Usage(answer))),
            Command::Recover(..)
            | Command::Freeze(_)
            | Command::Move(..)
            | Command::Leave(..)
            | Command::Spent(..)
            | Command::Pack(..)
            | Command::Prepare(..)
            | Command::Depart(..) => return,
            // All at once: it has a switch thread of its own, which is asked in parts.
            Command::Sockets(id, _, answer) => {
                (Request::Sockets(id), Vec::new(), Some(Pending::Sockets(answer)))
            }
            Command::Capture(session, answer) => {
                // One that is started later is told then.
                return self.capture(&mut state, &session, Some(Pending::Done(answer)));
            }
            Command::Stop => {
                state.stopped = true;
                (Request::Stop, Vec::new(), None)
            }
        };
        if state.running.is_none() {
            if !matches!(request, Request::Add(_)) || state.stopped {
                // Nothing runs, nothing is there to tell of.
                match pending {
                    Some(Pending::Status(answer)) => _ = answer.send(Vec::new()),
                    Some(Pending::Usage(answer)) => _ = answer.send(Vec::new()),
                    Some(Pending::Sockets(answer)) => _ = answer.send((Vec::new(), None)),
                    Some(Pending::Done(_) | Pending::Transit(_)) | None => {}
                }
                return;
            }
            if let Err(reason) = self.start(&mut state, shared) {
                let name = shared.config.nsms[self.nsm].name.clone();
                if let Some(Pending::Done(answer)) = pending {
                    let _ = answer.send(Err(EngineError::StackUnavailable { name, reason }));
                }
                return;
            }
        }
        self.call(&mut state, request, &fds, pending);
        drop(state);
        // Mapped and open until the packet has them.
        drop(keep);
    }

    /// Waits until all that was asked is answered, and stops.
    pub fn still(&self) -> Result<Still<'_>, EngineError> {
        let late = || EngineError::Refused("a process of a stack does not answer: see `netkernel ps`".into());
        let nobody_asks = lock(&self.gate);
        let until = Instant::now() + PATIENCE;
        loop {
            let reader = {
                let state = lock(&self.state);
                let idle = state.pending.is_empty() && state.restarting.is_empty();
                idle.then(|| state.running.as_ref().map(|running| Arc::clone(&running.gate)))
            };
            if let Some(reader) = reader {
                if let Some(gate) = &reader
                    && !gate.close(until.saturating_duration_since(Instant::now()))
                {
                    return Err(late());
                }
                return Ok(Still { remote: self, reader, _nobody_asks: nobody_asks });
            }
            if Instant::now() >= until {
                return Err(late());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Goes on with a process that the program before started. Its guests are known already.
    pub fn adopt(&self, shared: &Arc<Shared>, left: LeftRunning, control: OwnedFd) -> Result<(), String> {
        let mut state = lock(&self.state);
        state.binary = left.binary;
        self.run(&mut state, shared, control, Child(left.holder))?;
        if let Some(running) = &mut state.running {
            running.worker = left.worker;
        }
        Ok(())
    }

    /// Has the process capture what this session wants, unless it knows.
    fn capture(&self, state: &mut State, session: &Arc<Session>, pending: Option<Pending>) {
        state.captures.retain(|told| !told.is_over());
        if state.running.is_none() || state.captures.iter().any(|told| Arc::ptr_eq(told, session)) {
            return;
        }
        match super::capture::pipe(session, self.nsm) {
            Ok(pipe) => {
                state.captures.push(Arc::clone(session));
                let request = Request::Capture(session.target.clone(), session.snap());
                self.call(state, request, &[pipe.as_raw_fd()], pending);
            }
            Err(error) => log::error!("the process of a stack is not captured: {error}"),
        }
    }

    /// A process that knows of no capture was started.
    fn tell_of_captures(&self, state: &mut State, shared: &Shared) {
        for session in shared.captures.running() {
            self.capture(state, &session, None);
        }
    }

    fn call(&self, state: &mut State, request: Request, fds: &[i32], pending: Option<Pending>) {
        let Some(running) = &state.running else { return };
        state.serial += 1;
        let serial = state.serial;
        let control = Arc::clone(&running.control);
        if let Some(pending) = pending {
            state.pending.insert(serial, pending);
        }
        if send(control.as_raw_fd(), &Call { serial, request }, fds).is_err() {
            // The reader sees the end; who waits sees that nobody answers.
            state.pending.remove(&serial);
        }
    }

    fn start(&self, state: &mut State, shared: &Arc<Shared>) -> Result<(), String> {
        if let Some(reader) = state.reader.take() {
            // It told of the end of the process before and does nothing any more.
            drop(reader);
        }
        let binary = state.binary.clone().or_else(|| shared.config.process_binary.clone());
        let (control, child) = self.spawn(shared, binary, (*shared.nsm(self.nsm)).clone(), None)?;
        self.run(state, shared, control, child)?;
        self.tell_of_captures(state, shared);
        Ok(())
    }

    /// A holder, and what to be. `before`: where the descriptors of the one before come from.
    fn spawn(
        &self,
        shared: &Shared,
        binary: Option<PathBuf>,
        nsm: NsmConfig,
        before: Option<&OwnedFd>,
    ) -> Result<(OwnedFd, Child), String> {
        let (control, child) = spawn(binary, &nsm)?;
        let start = Start {
            nsm,
            spin_us: shared.config.spin_us,
            max_guests: shared.config.max_guests,
            successor: before.is_some(),
            place: shared.tenants.place(self.nsm).unwrap_or_default(),
        };
        let fds: Vec<i32> = before.into_iter().map(|fd| fd.as_raw_fd()).collect();
        send(control.as_raw_fd(), &start, &fds).map_err(|e| {
            child.end();
            format!("its process ended at once ({e}): is it netkernel?")
        })?;
        Ok((control, child))
    }

    /// From now on this is the process that is meant.
    fn run(
        &self,
        state: &mut State,
        shared: &Arc<Shared>,
        control: OwnedFd,
        child: Child,
    ) -> Result<(), String> {
        let control = Arc::new(control);
        let gate = Arc::<Gate>::default();
        state.running = Some(Running {
            control: Arc::clone(&control),
            holder: child.0,
            gate: Arc::clone(&gate),
            worker: 0,
        });
        let weak = Arc::downgrade(shared);
        let index = self.nsm;
        let reader = std::thread::Builder::new()
            .name(format!("nk-nsm-{index}"))
            .spawn(move || read(&weak, index, &control, &child, &gate))
            .map_err(|e| format!("no thread for its process: {e}"))?;
        state.reader = Some(reader);
        Ok(())
    }

    /// Has a new process, of another program or with another configuration, go on for this one. As [`restart`](Self::restart),
    /// but if the new one does not come to serve, the one before goes on, and the error says why.
    pub fn swap(
        &self,
        shared: &Arc<Shared>,
        binary: Option<PathBuf>,
        nsm: &NsmConfig,
    ) -> Result<Option<Duration>, EngineError> {
        let refused =
            |reason: String| EngineError::Config(format!("stack `{}` goes on as it was: {reason}", nsm.name));
        let resource =
            |e: std::io::Error| EngineError::Resource(format!("no descriptors for a new process: {e}"));
        let _one = lock(&self.gate);
        let program = binary.clone().or_else(|| lock(&self.state).binary.clone());
        let (before, after) = fds::pair(libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC).map_err(resource)?;
        let (control, child) = self
            .spawn(
                shared,
                program.clone().or_else(|| shared.config.process_binary.clone()),
                nsm.clone(),
                Some(&after),
            )
            .map_err(refused)?;
        drop(after);
        // Nothing has changed yet for anybody.
        if let Err(reason) = understands(&control) {
            child.end();
            return Err(refused(reason));
        }
        let (given, begun, old) = {
            let mut state = lock(&self.state);
            let Some(old) = state.running.as_ref().filter(|running| running.worker != 0) else {
                // The next guest's process is the new one.
                child.end();
                state.binary = program;
                shared.set_nsm(self.nsm, nsm.clone());
                return Ok(None);
            };
            let old = Arc::clone(&old.control);
            let (answer, given) = channel();
            self.call(&mut state, Request::Succession, &[before.as_raw_fd()], Some(Pending::Done(answer)));
            (given, Instant::now(), old)
        };
        drop(before);
        let given = given.recv_timeout(PATIENCE).unwrap_or_else(|error| {
            if error == RecvTimeoutError::Timeout {
                self.kill(|running| Some(running.worker).filter(|&worker| worker != 0));
            }
            Err(EngineError::Resource("the process before did not give its descriptors".into()))
        });
        if let Err(error) = given {
            child.end();
            // Its worker is started again by itself.
            return Err(refused(error.to_string()));
        }
        let (served, next) = channel();
        let (was, reader) = {
            let mut state = lock(&self.state);
            let before = (state.running.take(), state.reader.take());
            state.on_trial = true;
            state.restarting.push(served);
            state.captures.clear();
            self.run(&mut state, shared, control, child).map_err(EngineError::Resource)?;
            before
        };
        let result = next.recv_timeout(PATIENCE);
        let mut state = lock(&self.state);
        state.on_trial = false;
        if result.is_ok() {
            let _ = send(old.as_raw_fd(), &Call { serial: 0, request: Request::Stop }, &[]);
            state.binary = program;
            shared.set_nsm(self.nsm, nsm.clone());
            return Ok(Some(begun.elapsed()));
        }
        // Ended by its reader when it has to be waited for.
        if let Some(running) = std::mem::replace(&mut state.running, was) {
            // SAFETY: plain system call; the reader, who waits for it, needs the lock that is held.
            unsafe { libc::kill(running.holder as i32, libc::SIGKILL) };
        }
        state.reader = reader;
        state.pending.clear();
        let (served, next) = channel();
        state.restarting.push(served);
        self.call(&mut state, Request::Restart, &[], None);
        drop(state);
        next.recv_timeout(PATIENCE).map_err(|_| EngineError::Stopped)?;
        Err(refused("the new process does not serve its guests; the engine's log says why".into()))
    }

    /// Starts the process, unless it runs.
    pub fn begin(&self, shared: &Arc<Shared>) -> Result<(), EngineError> {
        let _one = lock(&self.gate);
        let mut state = lock(&self.state);
        if state.running.is_some() {
            return Ok(());
        }
        let name = shared.config.nsms[self.nsm].name.clone();
        self.start(&mut state, shared).map_err(|reason| EngineError::StackUnavailable { name, reason })
    }

    /// Has the worker give a guest away. On error it has it still.
    pub fn depart(&self, shared: &Arc<Shared>, guest: u32) -> Result<(Box<Left>, Used), EngineError> {
        let _one = lock(&self.gate);
        let resource =
            |e: std::io::Error| EngineError::Resource(format!("guest {guest} stays: no descriptors: {e}"));
        let (new, tenant, region, doorbell) = {
            let registry = lock(&shared.registry);
            let known = registry.guests.get(&guest).ok_or(EngineError::UnknownGuest(guest))?;
            let copies =
                known.region.try_clone().and_then(|region| Ok((region, known.doorbell.try_clone()?)));
            let (region, doorbell) = copies.map_err(resource)?;
            (NewGuest::of(guest, known), Arc::clone(&known.tenant), region, doorbell)
        };
        let (ours, theirs) = transit::pair().map_err(resource)?;
        let request = Request::Depart(guest, succession::format());
        let on_the_way = self.send_off(guest, request, &[theirs.as_raw_fd()])?;
        drop(theirs);
        let (asked, process) = (Instant::now(), transit::hear(&ours));
        let hangs = process.is_none() && asked.elapsed() >= transit::PATIENCE;
        let taken = match transit::take(&ours, new.sizes()) {
            Ok((used, journal)) => {
                let left = Left::new(new, self.nsm, tenant.limits(self.nsm), (region, doorbell), journal);
                // What comes from here on decides.
                let said = transit::say(&ours, transit::ALL);
                let packed = Packed::new(Box::new(left));
                said.map(|()| (packed, used))
            }
            Err(error) => Err(error),
        };
        drop(ours);
        let settled = self.settle(on_the_way, process, hangs);
        match (taken, settled) {
            (Ok((packed, used)), Settled::Answered(Ok(())) | Settled::IsNot | Settled::Gone) => {
                Ok((packed.unpack().ok_or(EngineError::Stopped)?, used))
            }
            (_, Settled::Answered(Err(reason))) => Err(EngineError::Refused(reason)),
            (Ok(_), Settled::Is) => Err(EngineError::Refused(format!(
                "guest {guest} stays: the process of its stack died meanwhile, and was started again"
            ))),
            (Err(_), Settled::IsNot | Settled::Gone) => {
                // Given up by the next worker, or gone with the last one, as if nobody had asked for it.
                log::info!(guest; "guest {guest} is over: the process of its stack lost it");
                shared.guest_over(guest, Usage::default());
                Err(EngineError::UnknownGuest(guest))
            }
            (Err(error), _) => Err(EngineError::Refused(format!("guest {guest} stays: {error}"))),
        }
    }

    /// Has the worker go on with a guest. On error it does not; without the guest, nobody does.
    pub fn arrive(
        &self,
        shared: &Arc<Shared>,
        mut packed: Packed,
        tenant: &Tenant,
    ) -> Result<(), (EngineError, Option<Packed>)> {
        let _one = lock(&self.gate);
        let begun = {
            let mut state = lock(&self.state);
            if state.running.is_some() { Ok(()) } else { self.start(&mut state, shared) }
        };
        let name = &shared.config.nsms[self.nsm].name;
        if let Err(reason) = begun {
            return Err((EngineError::StackUnavailable { name: name.clone(), reason }, Some(packed)));
        }
        let (Some(left), Some(memory), Ok((ours, theirs))) =
            (packed.left(), tenant.memory(), transit::pair())
        else {
            return Err((EngineError::Resource("no descriptors for a guest".into()), Some(packed)));
        };
        let guest = left.guest.id;
        let stays = |why: String| EngineError::Refused(format!("guest {guest} stays: {why}"));
        let fds =
            [theirs.as_raw_fd(), left.region.as_raw_fd(), left.doorbell.as_raw_fd(), memory.as_raw_fd()];
        let request = Request::Arrive(left.guest.clone(), succession::format());
        let on_the_way = match self.send_off(guest, request, &fds) {
            Ok(on_the_way) => on_the_way,
            Err(error) => return Err((error, Some(packed))),
        };
        drop(theirs);
        let (asked, process) = (Instant::now(), transit::hear(&ours));
        let hangs = process.is_none() && asked.elapsed() >= transit::PATIENCE;
        let given = process.map(|_| transit::give(&ours, left, Used::default()));
        // All of it came, and there is room. What comes from here on decides.
        let came = if matches!(given, Some(Ok(()))) { transit::hear(&ours) } else { None };
        let told = came.map(|came| transit::say(&ours, came));
        drop(ours);
        match (told, self.settle(on_the_way, process, hangs)) {
            (_, Settled::Answered(Ok(())) | Settled::Is) => Ok(()),
            (_, Settled::Answered(Err(reason))) => Err((stays(reason), Some(packed))),
            (_, Settled::IsNot) => Err((stays(format!("the process of stack {name} died")), Some(packed))),
            (Some(_), Settled::Gone) => Err((stays(format!("the process of stack {name} is gone")), None)),
            (None, Settled::Gone) => {
                Err((stays(format!("the process of stack {name} is gone")), Some(packed)))
            }
        }
    }

    /// Asks for something that is settled later, see [`Remote::settle`].
    fn send_off(&self, guest: u32, request: Request, fds: &[RawFd]) -> Result<OnTheWay, EngineError> {
        let mut state = lock(&self.state);
        let Some(running) = &state.running else { return Err(EngineError::Stopped) };
        let worker = running.worker;
        let (sender, fate) = channel();
        state.on_the_way.push((guest, sender.clone()));
        self.call(&mut state, request, fds, Some(Pending::Transit(sender)));
        Ok(OnTheWay { guest, worker, fate })
    }

    /// Waits until it is known where a guest is. `process`: the worker that was spoken to, if it said anything; what those before it had
    /// does not matter. One that hangs is killed: the next one knows. `hangs`: it does not listen.
    fn settle(
        &self,
        OnTheWay { guest, worker, fate }: OnTheWay,
        process: Option<u32>,
        hangs: bool,
    ) -> Settled {
        let mut killed = false;
        let mut patience = if hangs { Duration::ZERO } else { PATIENCE };
        let mut of_those_after = process.is_none_or(|process| process == worker);
        let settled = loop {
            match fate.recv_timeout(std::mem::replace(&mut patience, PATIENCE)) {
                Ok(Fate::Answered(result)) => break Settled::Answered(result),
                Ok(Fate::Next(worker, _)) if Some(worker) == process => of_those_after = true,
                // Said before the one that was spoken to came.
                Ok(Fate::Next(..)) if !of_those_after => {}
                Ok(Fate::Next(_, has)) => break if has { Settled::Is } else { Settled::IsNot },
                Ok(Fate::Gone) | Err(RecvTimeoutError::Disconnected) => break Settled::Gone,
                Err(RecvTimeoutError::Timeout) => {
                    // Its holder, if there is no next one.
                    let which = |running: &Running| {
                        let worker = Some(running.worker).filter(|worker| *worker != 0);
                        if killed { Some(running.holder) } else { worker.or(Some(running.holder)) }
                    };
                    log::warn!(guest; "guest {guest}: the process of a stack hangs while the guest goes over, and is killed");
                    self.kill(which);
                    killed = true;
                }
            }
        };
        let mut state = lock(&self.state);
        state.on_the_way.retain(|(on_the_way, _)| *on_the_way != guest);
        state.pending.retain(|_, pending| !matches!(pending, Pending::Transit(_)));
        drop(state);
        settled
    }

    /// Exchanges the worker. Returns when the next one serves, with the time that guests had none; `None`: there is no process,
    /// and the next guest gets a new one. A worker that hangs is killed: the next one goes on as after a crash.
    pub fn restart(&self) -> Result<Option<Duration>, EngineError> {
        let _one = lock(&self.gate);
        let (served, next) = channel();
        let (worker, begun) = {
            let mut state = lock(&self.state);
            let Some(worker) = state.running.as_ref().map(|running| running.worker) else { return Ok(None) };
            state.restarting.push(served);
            state.captures.clear();
            self.call(&mut state, Request::Restart, &[], None);
            (worker, Instant::now())
        };
        if next.recv_timeout(PATIENCE).is_err() {
            log::warn!("the process of a stack does not stop for its successor and is killed");
            self.kill(|running| Some(running.worker).filter(|&now| now == worker && now != 0));
            next.recv_timeout(PATIENCE).map_err(|_| EngineError::Stopped)?;
        }
        Ok(Some(begun.elapsed()))
    }

    /// After Stop: waits for the process, which is killed if it hangs.
    pub fn join(&self) {
        let Some(reader) = lock(&self.state).reader.take() else { return };
        let until = Instant::now() + PATIENCE;
        while !reader.is_finished() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
        if !reader.is_finished() {
            // The worker goes with its holder.
            self.kill(|running| Some(running.holder));
        }
        let _ = reader.join();
    }

    /// Ends a worker that does not answer; the next one goes on for it.
    pub fn kill_worker(&self) {
        self.kill(|running| Some(running.worker).filter(|&worker| worker != 0));
    }

    fn kill(&self, which: impl Fn(&Running) -> Option<u32>) {
        // Held, so that the reader has not waited for the process yet.
        let state = lock(&self.state);
        if let Some(pid) = state.running.as_ref().and_then(which) {
            // SAFETY: plain system call.
            unsafe { libc::kill(pid as i32, libc::SIGKILL) };
        }
    }

    fn answer(&self, serial: u64, answer: Answer) {
        let pending = lock(&self.state).pending.remove(&serial);
        match (pending, answer) {
            (Some(Pending::Done(to)), Answer::Done(result)) => {
                _ = to.send(result.map_err(EngineError::Resource));
            }
            (Some(Pending::Status(to)), Answer::Status(list)) => _ = to.send(list),
            (Some(Pending::Usage(to)), Answer::Usage(list)) => _ = to.send(list),
            (Some(Pending::Sockets(to)), Answer::Sockets(list)) => _ = to.send((list, None)),
            (Some(Pending::Transit(to)), Answer::Done(result)) => _ = to.send(Fate::Answered(result)),
            _ => {}
        }
    }
}

fn spawn(binary: Option<PathBuf>, nsm: &NsmConfig) -> Result<(OwnedFd, Child), String> {
    let binary =
        binary.ok_or("this engine does not know the program to start NSMs with: use form = \"engine\"")?;
    let (ours, theirs) = fds::pair(libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC)
        .map_err(|e| format!("no descriptors for its process: {e}"))?;
    let number = theirs.as_raw_fd();
    let mut command = Process::new(&binary);
    command.arg("nsm-process").arg("--control-fd").arg(number.to_string()).arg(&nsm.name);
    // In a group of its own: what the terminal sends to the engine's must not end it before its guests were told.
    command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
    // SAFETY: between fork and exec only fcntl is called, on a descriptor that `theirs` keeps open.
    unsafe {
        command.pre_exec(move || match libc::fcntl(number, libc::F_SETFD, 0) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        })
    };
    let child = command.spawn().map_err(|e| format!("{} cannot be started: {e}", binary.display()))?;
    Ok((ours, Child(child.id())))
}

/// The thread that takes what the process tells.
fn read(shared: &Weak<Shared>, index: usize, control: &OwnedFd, child: &Child, gate: &Gate) {
    let mut reader = Reader::default();
    let mut next = || {
        wait_readable(control, -1);
        let passed = gate.pass();
        (passed, reader.receive::<Report>(control))
    };
    // What comes after the end is not to be interrupted either.
    let _passed = loop {
        let (passed, received) = next();
        let Ok(Some((report, _))) = received else { break passed };
        let Some(shared) = shared.upgrade() else { break passed };
        let Some(remote) = shared.remote(index) else { break passed };
        match report {
            Report::Answer(serial, answer) => remote.answer(serial, answer),
            Report::Over(id, usage, violation) => shared.remote_guest_over(id, usage, violation),
            Report::Ready(worker, alive) => {
                let missing = !shared.missing_of(index, &alive).is_empty();
                {
                    let mut state = lock(&remote.state);
                    if missing && state.on_trial && state.runs(control) {
                        // Its predecessor has them still.
                        log::error!(
                            nsm:% = shared.config.nsms[index].name;
                            "a new process of stack {} cannot go on with all guests", shared.config.nsms[index].name
                        );
                        state.restarting.clear();
                        continue;
                    }
                }
                shared.keep_guests_of(index, &alive);
                shared.tenants.process_is_back(index);
                let mut state = lock(&remote.state);
                for (guest, waiter) in &state.on_the_way {
                    let _ = waiter.send(Fate::Next(worker, alive.contains(guest)));
                }
                if let Some(running) = &mut state.running {
                    running.worker = worker;
                }
                remote.tell_of_captures(&mut state, &shared);
                state.restarting.drain(..).for_each(|waiter| _ = waiter.send(()));
            }
            Report::Died(how) => {
                let name = &shared.config.nsms[index].name;
                log::error!(nsm:% = name; "the process of stack {name} died ({how}) and is started again");
                // Of what it was asked nobody knows how far it came.
                let mut state = lock(&remote.state);
                // Whether the next one was asked, or who died, those who wait for a guest hear by other ways.
                state.pending.retain(|_, pending| matches!(pending, Pending::Transit(_)));
                state.captures.clear();
                if state.on_trial && state.runs(control) {
                    // Who waits need not wait longer.
                    state.restarting.clear();
                }
            }
            Report::Waiting(_) => {}
        }
    };
    if let Some(shared) = shared.upgrade()
        && let Some(remote) = shared.remote(index)
    {
        let mut state = lock(&remote.state);
        let mine = state.runs(control);
        if mine && state.on_trial {
            state.restarting.clear();
        } else if mine {
            state.running = None;
            state.pending.clear();
            state.on_the_way.drain(..).for_each(|(_, waiter)| _ = waiter.send(Fate::Gone));
            // Before the next one is started.
            shared.tenants.process_is_gone(index);
            if !state.stopped {
                let name = &shared.config.nsms[index].name;
                log::error!(nsm:% = name; "the process of stack {name} is gone");
            }
            drop(state);
            shared.keep_guests_of(index, &[]);
        }
    }
    // Closed by the kernel a moment before it can be waited for; or it never understood us.
    child.end();
}

/// At most so many milliseconds; -1: however long it takes. False: nothing came.
fn wait_readable(control: &OwnedFd, ms: i32) -> bool {
    let mut poll = libc::pollfd { fd: control.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&mut poll, 1, ms) == 1 }
}

/// Waits until a successor says that it understands what the one before leaves.
fn understands(control: &OwnedFd) -> Result<(), String> {
    if !wait_readable(control, PATIENCE.as_millis() as i32) {
        return Err("the new program does not answer: is it netkernel?".into());
    }
    let own = succession::format();
    match Reader::default().receive::<Report>(control) {
        Ok(Some((Report::Waiting(format), _))) if format == own => Ok(()),
        Ok(Some((Report::Waiting(format), _))) => Err(format!(
            "the new program's memory has another layout ({format}, not {own}): restart the engine with it instead"
        )),
        _ => {
            Err("the new program does not understand this engine: is it netkernel, and of this version?"
                .into())
        }
    }
}

//! The process that serves the guests of an NSM: an engine of one switch thread and one module.

use std::cell::Cell;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use super::Form;
use super::holder::{AGAIN, ENDED, STAND_BY};
use super::journal::{Left, Root};
use super::transit::{Packed, Used};
use super::wire::{Answer, Call, NewGuest, Reader, Report, Request, Start, send};
use super::{succession, transit};
use crate::engine::{Engine, lock};
use crate::{Capacity, EngineConfig, EngineError, NsmConfig, direct, far};
use netkernel_abi::Limits;
use netkernel_agent::Processes;
use netkernel_service::{Service, TenantMemory};
use netkernel_shm::Region;

/// Exit code: the stack cannot be had.
const FAILED: i32 = 41;

/// Serves until the engine is gone or says stop; returns the exit code.
pub fn run(control: &OwnedFd, start: &Start, root: &Arc<Root>) -> i32 {
    // SAFETY: plain system call: who holds the descriptors must not be outlived.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
    // No other thread runs yet.
    collect_garbage(control, root);
    let (reports, queue) = channel::<(Report, Option<Sender<()>>)>();
    let socket = control.as_raw_fd();
    let sender = std::thread::Builder::new().name("nk-reports".into()).spawn(move || {
        for (report, sent) in queue {
            if send(socket, &report, &[]).is_err() {
                return;
            }
            drop(sent);
        }
    });
    let Ok(sender) = sender else { return FAILED };
    let over = reports.clone();
    let config = EngineConfig {
        // What it can carry is divided by the engine.
        nsms: vec![NsmConfig { form: Form::Engine, capacity: Capacity::default(), ..start.nsm.clone() }],
        switch_threads: 1,
        spin_us: start.spin_us,
        max_guests: usize::MAX,
        // Its threads' own descriptor tables would die with it.
        placeholders_in_main_table: Some(usize::MAX),
        ..EngineConfig::default()
    };
    let hook =
        Box::new(move |id, usage, violation| _ = over.send((Report::Over(id, usage, violation), None)));
    let engine = match Engine::start_with(config, Some(hook), Some(Arc::clone(root)), &[]) {
        Ok(engine) => engine,
        Err(error) => {
            log::error!(nsm:% = start.nsm.name; "the process of stack {} cannot start: {error}", start.nsm.name);
            return FAILED;
        }
    };
    match engine.recover(start.place) {
        Ok(alive) => _ = reports.send((Report::Ready(std::process::id(), alive), None)),
        Err(id) => {
            // What was made for it is undone by who comes next, which finds what else there is as it stands here.
            root.doom(id);
            std::mem::forget(engine);
            return AGAIN;
        }
    }
    let mut reader = Reader::default();
    loop {
        let mut socket_for_successor = None;
        let call: Call = match reader.receive::<Call>(control) {
            Ok(Some((call, mut fds))) => {
                if matches!(call.request, Request::Succession) {
                    socket_for_successor = fds.pop();
                }
                if let Some(answer) = serve(&engine, start.place, &call, fds) {
                    let _ = reports.send((Report::Answer(call.serial, answer), None));
                }
                call
            }
            Ok(None) => return ENDED,
            Err(error) => {
                log::error!(nsm:% = start.nsm.name; "stack {}: what the engine said is not understood: {error}", start.nsm.name);
                return ENDED;
            }
        };
        if UNFIT.with(|unfit| unfit.take()) {
            // What was made for a guest that could not come is undone by who comes next.
            engine.freeze();
            root.stopped();
            let (sent, all) = channel();
            let _ = reports.send((Report::Answer(0, Answer::Done(Ok(()))), Some(sent)));
            let _ = all.recv();
            std::mem::forget(engine);
            return AGAIN;
        }
        if matches!(call.request, Request::Restart) {
            engine.freeze();
            root.stopped();
            let (sent, all) = channel();
            let _ = reports.send((Report::Answer(call.serial, Answer::Done(Ok(()))), Some(sent)));
            // Ends when everything before was sent.
            let _ = all.recv();
            // Its end would wait for the thread that stands still.
            std::mem::forget(engine);
            return AGAIN;
        }
        if matches!(call.request, Request::Succession) {
            engine.freeze();
            root.stopped();
            let given = match socket_for_successor {
                Some(socket) => succession::give(&socket, root).map_err(|error| error.to_string()),
                None => Err("this NSM has no descriptor left".into()),
            };
            let code = if given.is_ok() { STAND_BY } else { AGAIN };
            let (sent, all) = channel();
            let _ = reports.send((Report::Answer(call.serial, Answer::Done(given)), Some(sent)));
            let _ = all.recv();
            std::mem::forget(engine);
            return code;
        }
        if matches!(call.request, Request::Stop) {
            engine.shutdown();
            drop(engine);
            drop(reports);
            // What it has to tell before the end: usage of guests that were there.
            let _ = sender.join();
            return ENDED;
        }
    }
}

fn serve(engine: &Engine, place: usize, call: &Call, fds: Vec<OwnedFd>) -> Option<Answer> {
    let text = |error: crate::EngineError| error.to_string();
    Some(match &call.request {
        Request::Add(guest) => Answer::Done(add(engine, place, guest, fds)),
        Request::Channel(id) => Answer::Done(match fds.into_iter().next() {
            Some(channel) => engine.add_channel(*id, channel).map_err(text),
            None => Err("this NSM has no descriptor left".into()),
        }),
        Request::End(id) => {
            let _ = engine.end_guest(*id);
            return None;
        }
        Request::Depart(id, format) => Answer::Done(depart(engine, *id, format, fds)),
        Request::Arrive(guest, format) => Answer::Done(arrive(engine, place, guest, format, fds)),
        Request::Status => Answer::Status(engine.status().guests),
        Request::Usage => Answer::Usage(
            engine.usage().into_iter().filter(|one| !one.over).map(|one| (one.guest, one.usage)).collect(),
        ),
        Request::Sockets(id) => Answer::Sockets(engine.sockets_without_holders(*id, &Processes::look())),
        Request::Capture(target, snap) => Answer::Done(match fds.into_iter().next() {
            Some(pipe) => engine.capture_into(target.clone(), *snap, pipe).map_err(text),
            None => Err("this NSM has no descriptor left".into()),
        }),
        Request::Restart | Request::Succession | Request::Stop => return None,
    })
}

fn add(engine: &Engine, place: usize, guest: &NewGuest, fds: Vec<OwnedFd>) -> Result<(), String> {
    let Ok([region, channel, doorbell, memory]) = <[OwnedFd; 4]>::try_from(fds) else {
        return Err("this NSM has no descriptors left for a guest".into());
    };
    let (region_bytes, sockets, queue_sets) = guest.limits;
    let limits = Limits { region_bytes, sockets, queue_sets };
    let region = Region::open(region, limits).map_err(|e| e.to_string())?;
    let memory = TenantMemory::open(memory).map_err(|e| e.to_string())?;
    let tenant = engine.shared().tenants.join(&guest.tenant, memory, place, false);
    engine.adopt_guest(guest, tenant, region, channel, doorbell).map_err(|e| e.to_string())
}

thread_local! {
    /// A guest that was to come could not be gone on with: what was done for it stands around.
    static UNFIT: Cell<bool> = const { Cell::new(false) };
}

fn same_format(format: &str) -> Result<(), String> {
    let own = succession::format();
    if format == own {
        return Ok(());
    }
    Err(format!(
        "the memory of the process of its stack has another layout ({own}, not {format}): exchange it by `netkernel nsm swap` first"
    ))
}

/// Gives a guest away. While the list of guests has it, it is this process's, or that of the one after it.
fn depart(engine: &Engine, id: u32, format: &str, fds: Vec<OwnedFd>) -> Result<(), String> {
    let text = |error: EngineError| error.to_string();
    same_format(format)?;
    let socket = fds.into_iter().next().ok_or("this NSM has no descriptor left")?;
    transit::say(&socket, std::process::id()).map_err(|e| e.to_string())?;
    let shared = engine.shared();
    let tenant = lock(&shared.registry).guests.get(&id).map(|known| Arc::clone(&known.tenant));
    let tenant = tenant.ok_or(EngineError::UnknownGuest(id)).map_err(text)?;
    let (mut packed, goes_on) = far::pack(shared, id).map_err(text)?;
    let (direct, carried) = direct::moved_books(shared, id);
    let mut all = goes_on;
    all.carry(Some(&carried));
    let given = match packed.left() {
        Some(left) => transit::give(&socket, left, Used { all, goes_on, direct }),
        None => Ok(()),
    };
    if given.is_ok() && transit::hear(&socket).is_some() {
        if let Some(root) = &shared.root {
            root.remove(id);
        }
        let _ = direct::last_carried(shared, id);
        shared.forget(id);
        return Ok(());
    }
    // Its descriptors are where they were.
    if let Err(error) = far::unpack(shared, packed, tenant, 0) {
        log::error!(guest = id; "guest {id} is lost: {error}");
        shared.root.iter().for_each(|root| root.remove(id));
        shared.guest_over(id, goes_on);
        UNFIT.set(true);
    }
    Err(given.err().map_or_else(|| "nobody took it".into(), |error| error.to_string()))
}

/// Goes on with a guest that another process gives.
fn arrive(
    engine: &Engine,
    place: usize,
    guest: &NewGuest,
    format: &str,
    fds: Vec<OwnedFd>,
) -> Result<(), String> {
    same_format(format)?;
    let Ok([socket, region, doorbell, memory]) = <[OwnedFd; 4]>::try_from(fds) else {
        return Err("its process has no descriptors left for a guest".into());
    };
    transit::say(&socket, std::process::id()).map_err(|e| e.to_string())?;
    let limits = guest.sizes();
    let memory = TenantMemory::open(memory).map_err(|e| e.to_string())?;
    let (_, journal) = transit::take(&socket, limits).map_err(|e| e.to_string())?;
    let (_, connections) = Service::journal_sockets(&journal.memory, limits);
    let tenant = engine.shared().tenants.join(&guest.tenant, memory, place, false);
    let may_use = tenant.limits(0);
    let has_room = far::has_room(may_use.connections.as_ref(), connections);
    let packed = Packed::new(Box::new(Left::new(guest.clone(), 0, may_use, (region, doorbell), journal)));
    if !has_room {
        return Err(format!("there is no room for its {connections} connections on the other stack"));
    }
    transit::say(&socket, transit::ALL).map_err(|e| e.to_string())?;
    if transit::hear(&socket).is_none() {
        return Err("it was not given after all".into());
    }
    engine.take_in(packed, tenant).inspect_err(|_| UNFIT.set(true)).map_err(|error| error.to_string())
}

/// Closes what nobody knows of: a worker that died may have left it half-way. Peers of guests that are lost see a reset: what
/// they were sent is not all.
fn collect_garbage(control: &OwnedFd, root: &Root) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let len = size_of::<libc::linger>() as libc::socklen_t;
    for fd in root.lost() {
        // SAFETY: linger is valid for reads of its size; what is no socket is an error.
        unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), len) };
    }
    let mut keep = root.descriptors();
    keep.extend([0, 1, 2, control.as_raw_fd()]);
    let Ok(open) = std::fs::read_dir("/proc/self/fd") else { return };
    let numbers = open.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<RawFd>().ok());
    let unknown: Vec<RawFd> = numbers.filter(|fd| !keep.contains(fd)).collect();
    for fd in unknown {
        // SAFETY: the process has no other thread, and nothing in it refers to descriptors that are not in the list. The
        // directory's own is closed already.
        unsafe { libc::close(fd) };
    }
}

//! Tenants with limits on NSMs in processes: the same hold as on those of the engine's threads, together with these, and whatever
//! becomes of the process. As in tenants.rs rates are checked from below only.

mod common;

use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use common::python::Python;
use common::tenants::{Rig, Running};
use common::{Engine, children, until};

/// An NSM in a process and one in the engine.
const NSMS: &str = "[[nsm]]\nname = \"apart\"\nform = \"process\"\n[[nsm]]\nname = \"inside\"\n";

fn up(rig: &Rig, limits: &str) -> Engine {
    rig.up_with(&format!("{NSMS}{}", Rig::own(limits)))
}

/// Without a relay, which an engine that is exchanged could not go on with.
fn guest(rig: &Rig, stack: &str) -> Python {
    Python::start_with(&rig.place, &["--socket", &rig.socket, "--attach", "queued", "--stack", stack])
}

/// Makes `n` more connections to the server, kept in `k`, and says how many it got.
fn connect(guest: &mut Python, rig: &Rig, n: usize) -> usize {
    let port = &rig.port;
    let line = format!(
        "k = globals().get('k', []); new = [socket.socket() for _ in range({n})]; \
         ok = [s for s in new if s.connect_ex(('127.0.0.1', {port})) == 0]; k += ok; say(len(ok))"
    );
    guest.run(&line).parse().unwrap()
}

fn connections(rig: &Rig) -> u64 {
    rig.tenant("own")["connections"].as_u64().unwrap()
}

/// Holder and worker.
fn processes(engine: &Engine) -> (i32, i32) {
    let mut found = None;
    until("holder and worker are there", || {
        let pairs = children(engine.pid()).into_iter();
        found = pairs.filter_map(|holder| Some((holder, *children(holder).first()?))).next();
        found.is_some()
    });
    found.unwrap()
}

fn kill(pid: i32) {
    // SAFETY: plain system call; the process is a descendant of this test's engine.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
}

/// Kills the worker, and waits for the next one.
fn kill_worker(engine: &Engine) {
    let (holder, worker) = processes(engine);
    kill(worker);
    until("there is another worker", || children(holder).first().is_some_and(|next| *next != worker));
}

/// How many memories of tenants a process has open.
fn memories(pid: i32) -> Vec<std::path::PathBuf> {
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten().map(|entry| entry.path());
    let is_one = |path: &std::path::PathBuf| {
        std::fs::read_link(path).is_ok_and(|name| name.to_string_lossy().contains("netkernel-words"))
    };
    open.filter(is_one).collect()
}

#[test]
fn a_rate_is_kept_in_both_directions_with_guests_on_both_forms_until_it_is_lifted() {
    let rig = Rig::new("apart-rates");
    // 1 MB/s.
    let engine = up(&rig, "max_send = \"8 Mbit/s\"\nmax_receive = \"8 Mbit/s\"");
    for act in ["send", "receive"] {
        let began = Instant::now();
        let mut alone = rig.client(&["--stack", "apart"], &[act, "500000"]);
        assert_eq!(alone.line(), act);
        // What a bucket holds, and what stands in buffers, goes at once.
        let took = began.elapsed();
        assert!(took > Duration::from_millis(400), "{act} took {took:?} for half a second's worth");
        alone.end();
        let began = Instant::now();
        let both = ["apart", "inside"].map(|stack| rig.client(&["--stack", stack], &[act, "400000"]));
        for mut client in both {
            assert_eq!(client.line(), act);
            client.end();
        }
        let took = began.elapsed();
        assert!(took > Duration::from_millis(650), "{act} took {took:?} for 0.8 s worth of two");
    }
    let used = rig.tenant("own");
    for way in ["bytes_out", "bytes_in"] {
        assert!(used[way].as_u64() >= Some(1_300_000), "what went through the process is listed: {used}");
    }
    // It would take ten minutes.
    let mut clients: Vec<Running> =
        (0..2).map(|_| rig.client(&["--stack", "apart"], &["send", "300000000"])).collect();
    until("they are under way", || {
        rig.tenant("own")["bytes_out"].as_u64() > used["bytes_out"].as_u64().map(|before| before + 500_000)
    });
    rig.ask(&["tenant", "own", "--max-send", "none"]).succeeds();
    for mut client in clients.drain(..) {
        assert_eq!(client.line(), "send");
        client.end();
    }
    // And by the file, for a guest that is there already.
    let mut client = guest(&rig, "apart");
    assert_eq!(connect(&mut client, &rig, 1), 1);
    up_again_with(&rig, "max_send = \"80 Mbit/s\"");
    rig.ask(&["reload"]).succeeds();
    let began = Instant::now();
    assert_eq!(client.run("k[0].sendall(b's' + bytes(8000000)); say('sent')"), "sent");
    let took = began.elapsed();
    assert!(took > Duration::from_millis(400), "took {took:?} for most of a second's worth");
    client.ends();
    engine.end();
}

/// Writes the file that the engine was started with anew.
fn up_again_with(rig: &Rig, limits: &str) {
    rig.place.file("engine.toml", &format!("{NSMS}{}", Rig::own(limits)));
}

#[test]
fn operations_of_both_forms_are_counted_together_and_slowed() {
    let rig = Rig::new("apart-operations");
    let engine = up(&rig, "max_operations = 500");
    let began = Instant::now();
    let clients = ["apart", "inside"].map(|stack| rig.client(&["--stack", stack], &["connect", "150"]));
    for mut client in clients {
        for _ in 0..150 {
            assert_eq!(client.line(), "0");
        }
        client.end();
    }
    let (took, operations) = (began.elapsed(), rig.tenant("own")["operations"].as_u64().unwrap());
    assert!(operations >= 600, "a socket and a connect each, of both: {operations}");
    // 256 pass at once.
    let least = Duration::from_millis((operations - 300) * 1000 / 500 * 8 / 10);
    assert!(took > least, "{operations} operations took {took:?}");
    engine.end();
}

#[test]
fn connections_are_counted_once_whatever_becomes_of_the_process() {
    let rig = Rig::new("apart-connections");
    let engine = up(&rig, "max_connections = 6");
    let (mut apart, mut inside) = (guest(&rig, "apart"), guest(&rig, "inside"));
    assert_eq!(connect(&mut apart, &rig, 2), 2);
    assert_eq!(connect(&mut inside, &rig, 3), 3);
    assert_eq!(connect(&mut apart, &rig, 3), 1);
    assert_eq!((connections(&rig), connect(&mut inside, &rig, 1)), (6, 0));
    // Killed, exchanged, and followed by another program's: nobody gets a place that is taken.
    for round in 0..6 {
        match round {
            0..=2 => kill_worker(&engine),
            3 => _ = rig.ask(&["nsm", "restart", "apart"]).succeeds(),
            4 => _ = rig.ask(&["nsm", "swap", "apart", "--congestion-control", "reno"]).succeeds(),
            _ => _ = rig.ask(&["restart"]).succeeds(),
        }
        assert_eq!(connect(&mut inside, &rig, 1), 0, "round {round}");
        assert_eq!(connect(&mut apart, &rig, 1), 0, "round {round}");
        assert_eq!(connections(&rig), 6, "round {round}");
        // One is given back on each side, and had by the other one.
        for _ in 0..2 {
            apart.run("k.pop().close(); say(1)");
            until("it can be had", || connect(&mut inside, &rig, 1) == 1);
            std::mem::swap(&mut apart, &mut inside);
        }
        assert_eq!(connections(&rig), 6, "round {round}");
    }
    apart.ends();
    until("the process's are given back", || connections(&rig) == 3);
    assert_eq!(connect(&mut inside, &rig, 9), 3);
    inside.ends();
    until("nothing is counted any more", || connections(&rig) == 0);
    engine.end();
}

#[test]
fn connections_are_counted_once_wherever_the_guest_is_moved() {
    let rig = Rig::new("apart-moved");
    let engine = up(&rig, "max_connections = 6");
    for attach in ["queued", "relay"] {
        let guest = |stack: &str| {
            let arguments = ["--socket", &rig.socket, "--attach", attach, "--stack", stack];
            Python::start_with(&rig.place, &arguments)
        };
        let (mut moved, mut stays) = (guest("inside"), guest("apart"));
        assert_eq!(connect(&mut moved, &rig, 2), 2);
        assert_eq!(connect(&mut stays, &rig, 3), 3);
        let id = rig.place.run(&["ps", "--json"]).json()["engines"][0]["guests"][0]["id"].to_string();
        for round in 0..8 {
            let to = ["apart", "inside"][round % 2];
            rig.place.run(&["guest", "move", &id, to]).succeeds();
            until("the count is right", || connections(&rig) == 5);
            if round % 3 == 0 && attach == "queued" {
                kill_worker(&engine);
                until("the count is right", || connections(&rig) == 5);
            }
            assert_eq!(connect(&mut moved, &rig, 2), 1, "round {round}");
            assert_eq!(connect(&mut stays, &rig, 1), 0, "round {round}");
            moved.run("k.pop().close(); say(1)");
            until("it is given back", || connections(&rig) == 5);
        }
        moved.ends();
        stays.ends();
        until("nothing is counted any more", || connections(&rig) == 0);
    }
    engine.end();
}

/// The process dies while connections come and go, so that counts and journals are at odds in every way they can be.
#[test]
fn counts_are_right_after_deaths_at_any_moment() {
    let rig = Rig::new("apart-churn");
    let engine = up(&rig, "max_connections = 8");
    let churn = "
import socket, sys, threading
over = threading.Event()
def work():
    while not over.is_set():
        try:
            s = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
            s.close()
        except OSError: pass
threads = [threading.Thread(target=work) for _ in range(4)]
for t in threads: t.start()
print('up', flush=True); sys.stdin.readline(); over.set()
for t in threads: t.join()
kept = []
for _ in range(20):
    s = socket.socket(); kept.append(s)
    print(s.connect_ex(('127.0.0.1', int(sys.argv[1]))) == 0, flush=True)
sys.stdin.readline()";
    let program = rig.place.file("churn.py", churn);
    let mut command =
        rig.place.netkernel(&["run", "--socket", &rig.socket, "--stack", "apart", "--", "python3"]);
    command.arg(program).arg(&rig.port);
    let mut child =
        command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let lines = common::lines(child.stdout.take().unwrap());
    let line = || lines.recv_timeout(common::WATCHDOG).unwrap();
    let tell = |child: &mut std::process::Child| {
        std::io::Write::write_all(child.stdin.as_mut().unwrap(), b"\n").unwrap();
    };
    assert_eq!(line(), "up");
    for _ in 0..20 {
        let before = rig.tenant("own")["operations"].as_u64();
        until("it is at work", || rig.tenant("own")["operations"].as_u64() > before);
        assert!(connections(&rig) <= 8);
        kill_worker(&engine);
    }
    tell(&mut child);
    // Those that the churning left may be counted until the process has closed them.
    let got = (0..20).filter(|_| line() == "True").count();
    assert!(got <= 8, "{got} connections of 8");
    until("all that may be are counted, and not more", || connections(&rig) == got as u64);
    tell(&mut child);
    assert!(common::wait(&mut child, "the guest ends").success());
    until("nothing is counted any more", || connections(&rig) == 0);
    // And all can be had.
    let mut next = guest(&rig, "apart");
    assert_eq!(connect(&mut next, &rig, 9), 8);
    next.ends();
    engine.end();
}

#[test]
fn what_a_dead_holder_counted_is_given_back() {
    let rig = Rig::new("apart-holder");
    let engine = up(&rig, "max_connections = 5");
    let (mut apart, mut inside) = (guest(&rig, "apart"), guest(&rig, "inside"));
    assert_eq!((connect(&mut apart, &rig, 3), connect(&mut inside, &rig, 9)), (3, 2));
    let (holder, _) = processes(&engine);
    kill(holder);
    until("its guests' are given back", || connections(&rig) == 2);
    assert_eq!(connect(&mut inside, &rig, 1), 1);
    let mut next = guest(&rig, "apart");
    assert_eq!(connect(&mut next, &rig, 9), 2);
    next.ends();
    inside.ends();
    drop(apart);
    until("nothing is counted any more", || connections(&rig) == 0);
    engine.end();
}

#[test]
fn a_capacity_is_shared_by_weight_and_its_connections_by_guarantee() {
    let rig = Rig::new("apart-capacity");
    let token = |name: &str, digit: char| {
        rig.place.file(name, &format!("{}\n", digit.to_string().repeat(32))).to_str().unwrap().to_owned()
    };
    let (light, heavy) = (token("light", '1'), token("heavy", '2'));
    // 2 MB/s.
    let engine = rig.up_with(&format!(
        "[[nsm]]\nname = \"apart\"\nform = \"process\"\ncapacity = \"16 Mbit/s\"\ncapacity_connections = 5\n\
         [[tenant]]\nname = \"light\"\ntoken_file = \"{light}\"\nguaranteed_connections = 3\n\
         [[tenant]]\nname = \"heavy\"\ntoken_file = \"{heavy}\"\nweight = 3\n"
    ));
    let mut clients =
        [&light, &heavy].map(|token| rig.client(&["--tenant-token", token], &["send", "100000000"]));
    let sent = |name: &str| rig.tenant(name)["bytes_out"].as_u64().unwrap();
    until("both are under way", || sent("light") > 200_000 && sent("heavy") > 200_000);
    let (before, began) = ([sent("light"), sent("heavy")], Instant::now());
    until("they have sent for a while", || sent("light") + sent("heavy") > before[0] + before[1] + 3_000_000);
    let took = began.elapsed();
    let [light_sent, heavy_sent] = [sent("light") - before[0], sent("heavy") - before[1]];
    assert!(took > Duration::from_millis(1200), "{took:?} for one and a half seconds' worth");
    let ratio = heavy_sent as f64 / light_sent as f64;
    assert!((2.0..4.5).contains(&ratio), "{heavy_sent} to {light_sent}: {ratio}");
    // More weight holds at once.
    rig.ask(&["tenant", "light", "--weight", "9"]).succeeds();
    let before = [sent("light"), sent("heavy")];
    until("they have sent for a while", || sent("light") + sent("heavy") > before[0] + before[1] + 3_000_000);
    let [light_sent, heavy_sent] = [sent("light") - before[0], sent("heavy") - before[1]];
    let ratio = light_sent as f64 / heavy_sent as f64;
    assert!((2.0..4.5).contains(&ratio), "{light_sent} to {heavy_sent}: {ratio}");
    for client in &mut clients {
        client.kill();
    }
    let none = || [("light", 0), ("heavy", 0)].iter().all(|(name, n)| rig.tenant(name)["connections"] == *n);
    until("no connection is counted", none);

    let connects =
        |client: &mut Running, n: usize| -> Vec<String> { (0..n).map(|_| client.line()).collect() };
    let mut greedy = rig.client(&["--tenant-token", &heavy], &["connect", "4"]);
    assert_eq!(connects(&mut greedy, 4), ["0", "0", "EADDRNOTAVAIL", "EADDRNOTAVAIL"]);
    // Its guarantee is kept, too, by the next process.
    kill_worker(&engine);
    let mut modest = rig.client(&["--tenant-token", &light], &["connect", "4"]);
    assert_eq!(connects(&mut modest, 4), ["0", "0", "0", "EADDRNOTAVAIL"]);
    greedy.end();
    until("places are free", || rig.tenant("heavy")["connections"] == 0);
    rig.ask(&["tenant", "light", "--guaranteed-connections", "0"]).succeeds();
    let mut greedy = rig.client(&["--tenant-token", &heavy], &["connect", "6"]);
    let got = connects(&mut greedy, 6).iter().filter(|line| *line == "0").count();
    // Three that light has are its own no more, and there are five beyond all guarantees.
    assert_eq!(got, 5);
    greedy.end();
    modest.end();
    engine.end();
}

#[test]
fn limits_of_a_new_configuration_hold_for_guests_in_processes_that_were_there_before() {
    let rig = Rig::new("apart-restart");
    let engine = up(&rig, "");
    let (mut apart, mut inside) = (guest(&rig, "apart"), guest(&rig, "inside"));
    assert_eq!((connect(&mut apart, &rig, 3), connect(&mut inside, &rig, 1)), (3, 1));
    // 1 MB/s, and one connection more; another NSM comes first.
    let more = "[[nsm]]\nname = \"first\"\nform = \"process\"\n";
    let limits = Rig::own("max_send = \"8 Mbit/s\"\nmax_connections = 5");
    rig.place.file("engine.toml", &format!("{more}{NSMS}{limits}"));
    rig.ask(&["restart"]).succeeds();
    assert_eq!(connections(&rig), 4);
    assert_eq!((connect(&mut apart, &rig, 2), connect(&mut inside, &rig, 1)), (1, 0));
    let began = Instant::now();
    assert_eq!(apart.run("k[0].sendall(b's' + bytes(700000)); say('sent')"), "sent");
    let took = began.elapsed();
    assert!(took > Duration::from_millis(400), "took {took:?} for most of a second's worth");
    // The new NSM counts together with the others.
    apart.run("k.pop().close(); say(1)");
    let mut first = guest(&rig, "first");
    until("its place is free", || connect(&mut first, &rig, 1) == 1);
    assert_eq!((connect(&mut apart, &rig, 1), connect(&mut first, &rig, 1)), (0, 0));
    kill_worker(&engine);
    assert_eq!((connect(&mut apart, &rig, 1), connect(&mut first, &rig, 1)), (0, 0));
    // A tenant that there is no more has no limits.
    rig.place.file("engine.toml", &format!("{more}{NSMS}"));
    rig.ask(&["restart"]).succeeds();
    assert_eq!((connect(&mut apart, &rig, 9), connect(&mut inside, &rig, 9)), (9, 9));
    for guest in [apart, inside, first] {
        guest.ends();
    }
    engine.end();
}

#[test]
fn limits_hold_for_programs_that_pass_the_library_by() {
    let rig = Rig::new("apart-bare");
    let engine = up(&rig, "max_send = \"8 Mbit/s\"\nmax_receive = \"8 Mbit/s\"\nmax_connections = 1");
    let program = &rig.bare();
    let none_left = || until("no connection is counted", || connections(&rig) == 0);
    for act in ["send", "receive"] {
        none_left();
        let began = Instant::now();
        let done = rig.ask(&["run", "--stack", "apart", "--", program, &rig.port, act, "900000"]);
        assert_eq!(done.succeeds().out, format!("{act}\n"));
        let took = began.elapsed();
        // Unix sockets' buffers are filled at once.
        assert!(took > Duration::from_millis(400), "{act} took {took:?} for most of a second's worth");
    }
    rig.ask(&["run", "--stack", "apart", "--attach", "direct", "--", program, &rig.port, "send", "1"])
        .fails(125, &["no kernel sockets to give away", "the tenant has limits"]);
    none_left();
    let mut inside = guest(&rig, "inside");
    assert_eq!(connect(&mut inside, &rig, 1), 1);
    let full = rig.ask(&["run", "--stack", "apart", "--", program, &rig.port, "send", "1"]);
    assert_eq!((full.code, full.err.as_str()), (Some(1), "bare: Cannot assign requested address\n"));
    inside.ends();
    // A relay's connection that its process took along.
    until("the guest's is given back", || connections(&rig) == 0);
    let mut command = rig.place.netkernel(&["run", "--socket", &rig.socket, "--stack", "apart", "--"]);
    command.args([program, &rig.port, "send", "900000000"]).stdout(std::process::Stdio::null());
    let mut relayed = command.stderr(std::process::Stdio::null()).spawn().unwrap();
    until("it is connected", || connections(&rig) == 1);
    kill_worker(&engine);
    common::wait(&mut relayed, "what lost its relay ends");
    until("its connection is given back", || connections(&rig) == 0);
    engine.end();
}

#[test]
fn guests_joined_in_memory_in_a_process_are_limited_too() {
    let rig = Rig::new("apart-joined");
    let nsm = "[[nsm]]\nname = \"joined\"\nstack = \"shm\"\nform = \"process\"\n";
    let engine = rig.up_with(&format!("{nsm}{}", Rig::own("max_send = \"8 Mbit/s\"\nmax_connections = 3")));
    let (mut server, mut client) = (guest(&rig, "joined"), guest(&rig, "joined"));
    let port = server.run("l = socket.create_server(('127.0.0.1', 0)); say(l.getsockname()[1])");
    let join = |server: &mut Python, client: &mut Python| {
        let connect = format!("c = socket.create_connection(('127.0.0.1', {port})); say(1)");
        assert_eq!(client.run(&connect), "1");
        assert_eq!(server.run("a, _ = l.accept(); say(1)"), "1");
    };
    join(&mut server, &mut client);
    assert_eq!(connections(&rig), 2, "both ends are the tenant's");
    let take = "import threading; t = threading.Thread(target=lambda: a.recv(900000, socket.MSG_WAITALL)); t.start(); say(1)";
    assert_eq!(server.run(take), "1");
    let began = Instant::now();
    assert_eq!(client.run("c.sendall(bytes(900000)); say('sent')"), "sent");
    assert_eq!(server.run("t.join(); say(1)"), "1");
    let took = began.elapsed();
    assert!(took > Duration::from_millis(400), "took {took:?} for most of a second's worth");
    let explained = rig.ask(&["explain"]).succeeds().out.clone();
    assert!(explained.contains("their tenant's rates are limited"), "{explained}");
    // Without a limit they map the memory of a new connection.
    rig.ask(&["tenant", "own", "--max-send", "none"]).succeeds();
    client.run("c.close(); say(1)");
    server.run("a.close(); say(1)");
    until("places are free", || connections(&rig) == 0);
    join(&mut server, &mut client);
    let explained = rig.ask(&["explain"]).succeeds().out.clone();
    assert!(explained.contains("in memory that both map, with guest"), "{explained}");
    client.ends();
    server.ends();
    engine.end();
}

/// What a process that somebody took over may do to what tenants use: to its own guests' tenants, and to nobody else.
#[test]
fn a_process_that_writes_anything_spoils_its_own_tenants_only() {
    let rig = Rig::new("apart-hostile");
    let token = |name: &str, digit: char| {
        rig.place.file(name, &format!("{}\n", digit.to_string().repeat(32))).to_str().unwrap().to_owned()
    };
    let (victim, bystander) = (token("victim", '1'), token("bystander", '2'));
    let engine = rig.up_with(&format!(
        "{NSMS}[[tenant]]\nname = \"victim\"\ntoken_file = \"{victim}\"\nmax_send = \"8 Mbit/s\"\nmax_connections = 4\n\
         [[tenant]]\nname = \"bystander\"\ntoken_file = \"{bystander}\"\nmax_connections = 4\nmax_send = \"80 Mbit/s\"\n"
    ));
    let start = |token: &str, stack: &str| {
        Python::start_with(&rig.place, &["--socket", &rig.socket, "--tenant-token", token, "--stack", stack])
    };
    let (mut apart, mut inside, mut other) =
        (start(&victim, "apart"), start(&victim, "inside"), start(&bystander, "inside"));
    assert_eq!(connect(&mut apart, &rig, 1), 1);
    assert_eq!(connect(&mut other, &rig, 2), 2);
    let (_, worker) = processes(&engine);
    let [memory] = &memories(worker)[..] else { panic!("the process has the memory of one tenant") };
    let memory = std::fs::OpenOptions::new().read(true).write(true).open(memory).unwrap();
    assert!(memory.set_len(8).is_err(), "nobody makes it shorter");
    let bytes = memory.metadata().unwrap().len() as usize;
    for value in [0u64, 1, u64::MAX, u64::MAX / 2, 0x0101_0101_0101_0101] {
        memory.write_all_at(&value.to_le_bytes().repeat(bytes / 8), 0).unwrap();
        // The engine serves everybody, and keeps its own terms.
        inside.run("s = socket.socket(); s.close(); say(1)");
        let listed = rig.tenant("victim");
        assert_eq!((&listed["most_connections"], &listed["name"]), (&4.into(), &"victim".into()), "{listed}");
        assert_eq!(other.run("k[0].sendall(b's' + bytes(100000)); say('sent')"), "sent");
        assert_eq!(rig.tenant("bystander")["connections"], 2);
        let got = connect(&mut inside, &rig, 9);
        assert!(got <= 4, "{got} of 4: what may be stands elsewhere");
        inside.run("[s.close() for s in k]; k.clear(); say(1)");
    }
    assert_eq!(connect(&mut other, &rig, 9), 2);
    rig.ask(&["tenant", "victim", "--max-connections", "2"]).succeeds();
    rig.ask(&["nsm", "restart", "apart"]).succeeds();
    for guest in [apart, inside, other] {
        guest.ends();
    }
    until("nothing is counted for the bystander", || rig.tenant("bystander")["connections"] == 0);
    engine.end();
}

#[test]
fn a_thousand_tenants_cost_no_descriptors_until_they_have_guests() {
    let rig = Rig::new("apart-many");
    let many: String = (0..1000)
        .map(|i| format!("[[tenant]]\nname = \"t{i}\"\nusers = [{}]\nmax_send = \"8 Mbit/s\"\n", 70_000 + i))
        .collect();
    let engine = rig.up_with(&format!("{NSMS}{}{many}", Rig::own("max_connections = 2")));
    assert_eq!(memories(engine.pid()).len(), 0);
    let (mut one, mut two) = (guest(&rig, "apart"), guest(&rig, "apart"));
    assert_eq!((connect(&mut one, &rig, 1), connect(&mut two, &rig, 9)), (1, 1));
    let (_, worker) = processes(&engine);
    assert_eq!((memories(engine.pid()).len(), memories(worker).len()), (1, 1));
    one.ends();
    two.ends();
    until("the process has closed it", || memories(worker).is_empty());
    let mut again = guest(&rig, "apart");
    until("all can be had again", || connect(&mut again, &rig, 2) == 2);
    assert_eq!((memories(engine.pid()).len(), memories(worker).len()), (1, 1));
    again.ends();
    engine.end();
}

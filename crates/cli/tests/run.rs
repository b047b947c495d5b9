//! `netkernel run`: exit codes, what the program finds, private engines.

mod common;

use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::process::Stdio;

use common::{Place, finish, until, wait};
use netkernel_abi::control::env;
use netkernel_abi::{ABI_VERSION, Limits};
use netkernel_shm::{HugePages, Region, fds};

#[test]
fn the_exit_code_is_the_programs_own() {
    let place = Place::new("exit");
    place.run(&["run", "--", "true"]).succeeds();
    assert_eq!(place.run(&["run", "--", "sh", "-c", "exit 7"]).code, Some(7));
    assert_eq!(place.run(&["run", "--", "sh", "-c", "kill -TERM $$"]).signal, Some(15));
}

#[test]
fn a_program_that_is_not_there_is_127() {
    let place = Place::new("127");
    place
        .run(&["run", "--", "no-such-program"])
        .fails(127, &["'no-such-program' was not found in PATH", "check"]);
    place.run(&["run", "--", "/no/such/program"]).fails(127, &["'/no/such/program' was not found"]);
    assert!(place.engine_files().is_empty(), "no engine was started for it");
}

#[test]
fn a_program_that_cannot_be_executed_is_126() {
    let place = Place::new("126");
    let text = place.file("notes.txt", "hello");
    place.run(&["run", "--", text.to_str().unwrap()]).fails(126, &["is not executable", "chmod +x"]);
    place.run(&["run", "--", "/tmp"]).fails(126, &["/tmp is a directory"]);
}

#[test]
fn wrong_usage_is_2() {
    let place = Place::new("usage");
    assert_eq!(place.run(&["run"]).code, Some(2));
    assert_eq!(place.run(&["run", "--no-such-option", "true"]).code, Some(2));
    assert_eq!(place.run(&["frobnicate"]).code, Some(2));
}

#[test]
fn an_unknown_stack_is_125_and_names_those_there_are() {
    let place = Place::new("stack");
    place
        .run(&["run", "--stack", "bbrr", "--", "true"])
        .fails(125, &["no stack named 'bbrr'; this engine offers ", "reno"]);
    until("the private engine is gone", || place.engine_files().is_empty());
}

#[test]
fn an_engine_that_was_named_must_be_there() {
    let place = Place::new("named");
    let socket = place.socket();
    place
        .run(&["run", "--socket", socket.to_str().unwrap(), "--", "true"])
        .fails(125, &["no engine answers at", "netkernel up"]);
    let mut command = place.netkernel(&["run", "--", "true"]);
    command.env("NETKERNEL_SOCKET_PATH", &socket);
    finish(command).fails(125, &["no engine answers at"]);
}

#[test]
fn the_program_finds_its_environment_and_descriptors() {
    let place = Place::new("environment");
    let script = r#"
        echo "$NETKERNEL_FDS"; echo "$NETKERNEL_SOCKET"; echo "$NETKERNEL_TOKEN"; echo "$NETKERNEL_LIBRARY"
        echo "$LD_PRELOAD"; echo "$NETKERNEL_TRACE"; cat"#;
    // Not a guest's process itself, so that the library changes nothing of what is seen.
    let mut command = place.netkernel(&["run", "--trace=0", "--", "sh", "-c", script]);
    command
        .env("LD_PRELOAD", "/nonexistent/other.so")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"to the program").unwrap();
    let mut out = String::new();
    child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    assert_eq!(wait(&mut child, "run").code(), Some(0));
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[0].split(',').filter(|n| n.parse::<u32>().unwrap() > 2).count(), 3, "{out}");
    assert!(lines[1].starts_with(place.dir.to_str().unwrap()), "{out}");
    assert_eq!(lines[2].len(), 32, "{out}");
    assert!(lines[3].ends_with("/libnetkernel.so"), "{out}");
    assert_eq!(lines[4], format!("{}:/nonexistent/other.so", lines[3]));
    assert_eq!(lines[5..], ["0", "to the program"]);
}

#[test]
fn a_script_without_a_first_line_runs_by_the_shell() {
    use std::os::unix::fs::PermissionsExt as _;
    let place = Place::new("script");
    let script = place.file("script", "echo \"$0 $1\"; exit 3\n");
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let done = place.run(&["run", "--", script.to_str().unwrap(), "one"]);
    assert_eq!(
        (done.code, done.out.trim_end()),
        (Some(3), &*format!("{} one", script.display())),
        "{done:?}"
    );
}

#[test]
fn sigpipe_is_as_the_caller_had_it() {
    let place = Place::new("sigpipe");
    let ignored = |command: std::process::Command| {
        let done = finish(command);
        let mask = done.out.split_whitespace().last().unwrap().to_owned();
        u64::from_str_radix(&mask, 16).unwrap() & (1 << (libc::SIGPIPE - 1)) != 0
    };
    let command = place.netkernel(&["run", "--", "grep", "SigIgn", "/proc/self/status"]);
    assert!(!ignored(command), "the default stays the default");
    let mut command = std::process::Command::new("sh");
    let netkernel = place.netkernel(&[]);
    command.args(["-c", "trap '' PIPE; exec \"$0\" run -- grep SigIgn /proc/self/status"]);
    command.arg(netkernel.get_program());
    command.envs(netkernel.get_envs().filter_map(|(k, v)| Some((k, v?))));
    assert!(ignored(command), "ignored stays ignored");
}

#[test]
fn a_private_engine_ends_with_its_guest_and_leaves_nothing() {
    let place = Place::new("private");
    let mut child = place
        .netkernel(&["run", "--name", "lonely", "--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut pid = 0;
    until("ps shows the guest", || {
        let engines = place.run(&["ps", "--json"]).json()["engines"].clone();
        let Some(engine) = engines.get(0).filter(|e| !e["guests"].as_array().unwrap().is_empty()) else {
            return false;
        };
        assert_eq!(engine["private"], true);
        assert_eq!(engine["guests"][0]["name"], "lonely");
        assert_eq!(engine["guests"][0]["pid"], child.id());
        pid = engine["engine"]["pid"].as_u64().unwrap();
        true
    });
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<u32> =
        stat.rsplit_once(')').unwrap().1.split(' ').skip(2).map(|n| n.parse().unwrap_or(0)).collect();
    assert_ne!(fields[0], child.id(), "the engine is no child of the program");
    assert_ne!(fields[2], std::os::unix::process::parent_id(), "and in a session of its own");
    drop(child.stdin.take());
    assert_eq!(wait(&mut child, "cat").code(), Some(0));
    until("the engine's process is gone", || !std::path::Path::new(&format!("/proc/{pid}")).exists());
    assert_eq!(place.engine_files(), [""; 0]);
}

#[test]
fn a_caller_that_waits_for_the_end_of_output_does_not_wait_for_the_engine() {
    let place = Place::new("pipes");
    // The guest's background process outlives the program and keeps the engine alive; it holds no pipe of ours.
    let done = place.run(&["run", "--", "sh", "-c", "sleep 3 >/dev/null 2>&1 </dev/null & echo done"]);
    assert_eq!(done.succeeds().out, "done\n");
    until("the engine is gone", || place.engine_files().is_empty());
}

#[test]
fn what_a_killed_private_engine_left_is_swept() {
    let place = Place::new("killed");
    let mut child = place.netkernel(&["run", "--", "sleep", "30"]).stdout(Stdio::null()).spawn().unwrap();
    let mut pid = 0;
    until("the engine runs", || {
        pid = place.run(&["ps", "--json"]).json()["engines"][0]["engine"]["pid"].as_i64().unwrap_or(0);
        pid != 0
    });
    // SAFETY: the engine that this test's `run` started.
    unsafe { libc::kill(pid as i32, libc::SIGKILL) };
    until("it is dead", || !std::path::Path::new(&format!("/proc/{pid}")).exists());
    child.kill().unwrap();
    wait(&mut child, "sleep");
    assert!(!place.engine_files().is_empty(), "a killed engine cannot clean up");
    place.run(&["run", "--", "true"]).succeeds();
    until("nothing is left", || place.engine_files().is_empty());
}

#[test]
fn a_run_inside_a_run_is_a_guest_of_its_own() {
    let place = Place::new("nested");
    let netkernel = env!("CARGO_BIN_EXE_netkernel");
    let script = format!(
        "echo $NETKERNEL_TOKEN $LD_PRELOAD; {netkernel} run --private -- sh -c 'echo $NETKERNEL_TOKEN $LD_PRELOAD'"
    );
    let done = place.run(&["run", "--", "sh", "-c", &script]);
    let lines: Vec<Vec<&str>> = done.succeeds().out.lines().map(|l| l.split(' ').collect()).collect();
    assert_ne!(lines[0][0], lines[1][0], "two guests");
    assert_eq!(lines[0][1], lines[1][1], "the library is preloaded once");
    until("both engines are gone", || place.engine_files().is_empty());
}

/// Says what becomes of an INET socket, twice.
const SOCKETS: &str = "
import os, socket
for _ in range(2):
    try:
        socket.socket().close()
        print('made')
    except OSError as error:
        print(error.errno)
";

#[test]
fn a_program_that_cannot_attach_gets_no_socket_in_silence() {
    let place = Place::new("unattached");
    let inside = "exec env NETKERNEL_FDS=0,0,0 NETKERNEL_SOCKET=/nowhere python3 -c \"$0\"";
    let attempt = |words: &[&str]| {
        let mut all = vec!["run"];
        all.extend(words);
        all.extend(["--", "sh", "-c", inside, SOCKETS]);
        let done = place.run(&all);
        (done.succeeds().out.replace('\n', " "), done.err)
    };
    let refused = format!("{0} {0} ", libc::ENETDOWN);
    let (out, err) = attempt(&["--attach", "queued"]);
    assert_eq!(out, refused);
    assert!(err.contains("no INET sockets (ENETDOWN): the engine at /nowhere does not answer"), "{err}");
    assert_eq!(err.lines().count(), 1, "it is said once: {err}");
    let (out, err) = attempt(&["--attach", "queued", "--fail-open"]);
    assert_eq!(out, "made made ");
    assert!(err.contains("warning: this program's sockets are the host's own"), "{err}");
    assert_eq!(err.lines().count(), 1, "it is said once: {err}");
    // The agent serves them.
    assert_eq!(attempt(&["--attach", "auto"]), ("made made ".into(), String::new()));
}

#[test]
fn a_library_of_another_version_says_so() {
    let region = Region::create(Limits::default(), 1, 0, HugePages::Off).unwrap();
    let (channel, _theirs) = fds::pair(libc::SOCK_SEQPACKET).unwrap();
    let doorbell = fds::eventfd().unwrap();
    let inherited = |fd: i32| {
        // SAFETY: a duplicate that the program inherits; it is closed with this process.
        let copy = unsafe { libc::dup(fd) };
        assert!(copy >= 0);
        copy.to_string()
    };
    let numbers = [region.fd(), channel.as_raw_fd(), doorbell.as_raw_fd()].map(inherited).join(",");
    let attempt = || {
        let mut command = std::process::Command::new("python3");
        let library = std::path::Path::new(env!("CARGO_BIN_EXE_netkernel")).with_file_name("libnetkernel.so");
        command.args(["-c", SOCKETS]).env("LD_PRELOAD", library).env(env::FDS, &numbers);
        finish(command)
    };
    region.header().abi_version.store(ABI_VERSION + 1, std::sync::atomic::Ordering::Relaxed);
    let done = attempt();
    assert_eq!(done.succeeds().out, format!("{0}\n{0}\n", libc::ENETDOWN));
    let words = format!("the engine speaks region ABI {}, this library {ABI_VERSION}", ABI_VERSION + 1);
    assert!(done.err.contains(&words), "{}", done.err);
}

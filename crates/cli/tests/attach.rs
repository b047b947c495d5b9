//! Attachment: programs that no library can be preloaded to, direct sockets, and who may do what. Network: loopback, and a
//! namespace that the test makes and removes.

mod common;

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{Done, Place, finish, until};

/// Asks for sockets and says what became of it: one line for each argument.
const PROGRAM: &str = r#"
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
static int made(const char *what, int fd) { printf("%s %d\n", what, fd < 0 ? -errno : 1); return fd; }
int main(int argc, char **argv) {
    setvbuf(stdout, 0, _IONBF, 0);
    for (int i = 1; i < argc; i++) {
        char *a = argv[i];
        if (!strcmp(a, "cc")) {
            char name[16] = ""; socklen_t length = sizeof name;
            int fd = socket(AF_INET6, SOCK_STREAM, 0);
            if (fd < 0) { made("cc", fd); continue; }
            getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, &length);
            printf("cc %s\n", name);
            int other = setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, argv[i + 1], strlen(argv[i + 1]));
            int error = other ? errno : 0;
            length = sizeof name;
            getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, &length);
            printf("set %d now %s\n", error, name);
            i++;
        } else if (!strcmp(a, "flood")) {
            /* Sockets without end, and processes up to the limit, until standard input says stop. */
            struct pollfd end = {0, POLLIN, 0};
            for (int n = 0; n < 8; n++) {
                if (fork()) continue;
                while (!poll(&end, 1, 0)) {
                    int fds[200], made = 0;
                    while (made < 200 && (fds[made] = socket(AF_INET, SOCK_STREAM, 0)) >= 0) made++;
                    while (made) close(fds[--made]);
                }
                _exit(0);
            }
            printf("flooding\n");
            while (wait(0) > 0) {}
        } else if (!strcmp(a, "forks")) {
            struct rlimit limit = {40, 40};
            int count = 0, error = 0, gate[2];
            pipe(gate);
            setuid(65534);
            setrlimit(RLIMIT_NPROC, &limit);
            for (;;) {
                pid_t pid = fork();
                if (pid < 0) { error = errno; break; }
                count++;
                if (!pid) { char b; close(gate[1]); read(gate[0], &b, 1); _exit(socket(AF_INET, SOCK_DGRAM, 0) < 0); }
            }
            close(gate[1]);
            int failed = 0, status;
            while (wait(&status) > 0) failed += status != 0;
            printf("forks %d %d failed %d\n", count > 10 && count <= 40, -error, failed);
        } else if (!strcmp(a, "limits")) {
            /* What the module set, and what becomes of attempts to change it. */
            int fd = socket(AF_INET, SOCK_STREAM, 0), mark = 0;
            unsigned long rate = 0, more = ~0ul;
            socklen_t length = sizeof rate;
            getsockopt(fd, SOL_SOCKET, SO_MAX_PACING_RATE, &rate, &length);
            length = sizeof mark;
            getsockopt(fd, SOL_SOCKET, SO_MARK, &mark, &length);
            printf("limits %lu %d\n", rate, mark);
            made("pace", setsockopt(fd, SOL_SOCKET, SO_MAX_PACING_RATE, &more, sizeof more));
            made("mark", setsockopt(fd, SOL_SOCKET, SO_MARK, &mark, sizeof mark));
        } else if (!strcmp(a, "udp")) made("udp", socket(AF_INET, SOCK_DGRAM, 0));
        else if (!strcmp(a, "bare")) made("bare", syscall(SYS_socket, AF_INET, SOCK_STREAM, 0));
        else if (!strcmp(a, "raw")) made("raw", socket(AF_INET, SOCK_RAW, IPPROTO_ICMP));
        else if (!strcmp(a, "smc")) made("smc", socket(43, SOCK_STREAM, 0));
        else if (!strcmp(a, "mptcp")) made("mptcp", socket(AF_INET, SOCK_STREAM, 262));
        else if (!strcmp(a, "type")) made("type", socket(AF_INET, 0x100 | SOCK_STREAM, 0));
        else if (!strcmp(a, "unix")) made("unix", socket(AF_UNIX, SOCK_STREAM, 0));
        else if (!strcmp(a, "uring")) { char p[256] = ""; made("uring", syscall(SYS_io_uring_setup, 4, p)); }
        else if (!strcmp(a, "full")) {
            struct rlimit limit = {32, 32};
            setrlimit(RLIMIT_NOFILE, &limit);
            int fd, count = 0;
            while ((fd = socket(AF_INET, SOCK_STREAM, 0)) >= 0 && count < 100) count++;
            printf("full %d %d\n", count > 10, -errno);
        } else if (!strcmp(a, "flags")) {
            int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
            char b;
            printf("flags %d %d\n", (int)syscall(SYS_fcntl, fd, 1, 0), (int)syscall(SYS_fcntl, fd, 3, 0) & 04000 ? 1 : 0);
            (void)b;
        } else if (!strcmp(a, "close")) {
            /* The last close is this one: the port is free at once. */
            int taken = 0;
            for (int n = 0; n < 300; n++) {
                struct sockaddr_in any = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
                socklen_t length = sizeof any;
                int again = socket(AF_INET, SOCK_DGRAM, 0), fd = socket(AF_INET, SOCK_DGRAM, 0);
                bind(fd, (void *)&any, sizeof any);
                getsockname(fd, (void *)&any, &length);
                close(fd);
                taken += bind(again, (void *)&any, sizeof any) != 0;
                close(again);
            }
            printf("close %d\n", taken);
        } else if (!strcmp(a, "listen")) {
            struct sockaddr_in any = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
            socklen_t length = sizeof any;
            int fd = socket(AF_INET, SOCK_STREAM, 0);
            if (bind(fd, (void *)&any, sizeof any) || listen(fd, 5) || getsockname(fd, (void *)&any, &length)) made("listen", -1);
            else printf("listen %d\n", ntohs(any.sin_port));
        } else if (!strcmp(a, "carry")) {
            /* To itself: N connections, each closed after 1000 bytes there and 100 back. */
            struct sockaddr_in any = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
            socklen_t length = sizeof any;
            static char b[1000];
            int from = socket(AF_INET, SOCK_STREAM, 0);
            if (bind(from, (void *)&any, sizeof any) || listen(from, 5) || getsockname(from, (void *)&any, &length)) return 1;
            for (int n = atoi(argv[++i]); n > 0; n--) {
                int to = socket(AF_INET, SOCK_STREAM, 0), fd;
                if (connect(to, (void *)&any, length) || (fd = accept(from, 0, 0)) < 0) return 1;
                if (write(to, b, 1000) != 1000 || recv(fd, b, 1000, MSG_WAITALL) != 1000) return 1;
                if (write(fd, b, 100) != 100 || recv(to, b, 100, MSG_WAITALL) != 100) return 1;
                close(to), close(fd);
            }
            close(from);
            printf("carried\n");
        } else if (!strcmp(a, "connect")) {
            struct sockaddr_in to = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK), .sin_port = htons(atoi(argv[++i]))};
            int fd = socket(AF_INET, SOCK_STREAM, 0);
            made("connect", connect(fd, (void *)&to, sizeof to));
        } else if (!strcmp(a, "wait")) { char b; while (read(0, &b, 1) < 0 && errno == EINTR) {} }
        else if (!strcmp(a, "exec")) { execv(argv[i + 1], argv + i + 1); perror("exec"); return 1; }
    }
    return 0;
}
"#;

struct Programs {
    place: Place,
    fixed: PathBuf,
    dynamic: PathBuf,
}

fn programs(name: &str) -> Programs {
    let place = Place::new(name);
    let fixed = place.program("static", PROGRAM, &["-static"]);
    let dynamic = place.program("dynamic", PROGRAM, &[]);
    Programs { place, fixed, dynamic }
}

impl Programs {
    fn run(&self, options: &[&str], program: &Path, arguments: &[&str]) -> Done {
        let program = program.to_str().unwrap();
        self.place.run(&[&["run"], options, &["--", program], arguments].concat())
    }
}

fn is_root() -> bool {
    // SAFETY: cannot fail and touches no memory.
    unsafe { libc::geteuid() == 0 }
}

#[test]
fn a_static_program_gets_the_stack_that_was_chosen() {
    let p = programs("static-cc");
    for stack in ["reno", "cubic"] {
        let other = if stack == "reno" { "cubic" } else { "reno" };
        let done = p.run(&["--stack", stack], &p.fixed, &["cc", other, "cc", stack]);
        let expected =
            format!("cc {stack}\nset {} now {stack}\ncc {stack}\nset 0 now {stack}\n", libc::EPERM);
        assert_eq!(done.succeeds().out, expected, "{done:?}");
        assert_eq!(done.err, "");
    }
}

#[test]
fn what_the_library_does_not_see_is_served_too() {
    let p = programs("behind");
    // A bare system call; a static program that a dynamic one becomes, and the way back.
    let fixed = p.fixed.to_str().unwrap();
    let dynamic = p.dynamic.to_str().unwrap();
    let done = p.run(
        &["--stack", "reno"],
        &p.dynamic,
        &["cc", "reno", "bare", "exec", fixed, "cc", "reno", "exec", dynamic, "cc", "reno"],
    );
    let one = "cc reno\nset 0 now reno\n";
    assert_eq!(done.succeeds().out, format!("{one}bare 1\n{one}{one}"), "{done:?}");
    let script = format!("{fixed} cc reno | cat; {dynamic} cc reno | cat; exec {fixed} udp");
    let done = p.place.run(&["run", "--stack", "reno", "--", "sh", "-c", &script]);
    assert_eq!(done.succeeds().out, format!("{one}{one}udp 1\n"), "{done:?}");
}

#[test]
fn there_is_no_way_around() {
    let p = programs("around");
    let all = ["uring", "smc", "mptcp", "type", "unix"];
    let expected = format!(
        "uring -{}\nsmc -{}\nmptcp -{}\ntype -{}\nunix 1\n",
        libc::ENOSYS,
        libc::EAFNOSUPPORT,
        libc::EPROTONOSUPPORT,
        libc::EINVAL
    );
    assert_eq!(p.run(&[], &p.fixed, &all).succeeds().out, expected);
}

#[test]
fn limits_and_flags_are_the_programs_own() {
    let p = programs("limits");
    let done = p.run(&[], &p.fixed, &["flags", "full"]);
    assert_eq!(done.succeeds().out, format!("flags 1 1\nfull 1 -{}\n", libc::EMFILE));
}

#[test]
fn a_flood_of_sockets_and_processes_is_its_guests_own_trouble() {
    let p = programs("flood");
    let engine = p.place.up(&["--socket", p.place.socket().to_str().unwrap()]);
    let socket = p.place.socket();
    let socket = socket.to_str().unwrap();
    for (attach, program) in [("direct", &p.fixed), ("auto", &p.dynamic)] {
        let options = ["run", "--socket", socket, "--attach", attach, "--"];
        let mut command = p.place.netkernel(&options);
        command.arg(program).arg("flood").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut flood = command.spawn().unwrap();
        let mut line = String::new();
        let mut out = std::io::BufReader::new(flood.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut out, &mut line).unwrap();
        assert_eq!(line, "flooding\n");
        // Others get everything that they ask for meanwhile.
        for (attach, program) in [("direct", &p.fixed), ("auto", &p.dynamic)] {
            let done = p.run(&["--socket", socket, "--attach", attach], program, &["udp", "listen", "full"]);
            let text = &done.succeeds().out;
            let full = format!("\nfull 1 -{}\n", libc::EMFILE);
            assert!(text.starts_with("udp 1\nlisten ") && text.ends_with(&full), "{text}");
        }
        assert!(flood.try_wait().unwrap().is_none(), "the flood goes on");
        drop(flood.stdin.take());
        assert!(common::wait(&mut flood, "the flood").success());
        if is_root() {
            let done = p.run(&["--socket", socket, "--attach", attach], program, &["forks"]);
            assert_eq!(done.succeeds().out, format!("forks 1 -{} failed 0\n", libc::EAGAIN), "{attach}");
        }
    }
    until("all guests are over", || !p.place.run(&["explain", "--socket", socket]).out.contains("guest"));
    engine.end();
}

#[test]
fn the_programs_close_is_the_last_one() {
    let p = programs("close");
    assert_eq!(p.run(&[], &p.fixed, &["close"]).succeeds().out, "close 0\n");
}

#[test]
fn a_user_without_the_right_gets_no_raw_socket_from_a_privileged_engine() {
    if !is_root() {
        eprintln!("NOT RUN: only root can run an engine for another user");
        return;
    }
    let p = programs("raw");
    let config = p.place.file("engine.toml", "[engine]\nallow_users = [65534]\n");
    let engine =
        p.place.up(&["--socket", p.place.socket().to_str().unwrap(), "--config", config.to_str().unwrap()]);
    let ask = |uid: u32| {
        let mut command = p.place.netkernel(&["run", "--socket", p.place.socket().to_str().unwrap(), "--"]);
        command.arg(&p.fixed).args(["raw", "udp"]).uid(uid);
        finish(command).succeeds().out.clone()
    };
    assert_eq!(ask(65534), format!("raw -{}\nudp 1\n", libc::EPERM));
    assert_eq!(ask(0), "raw 1\nudp 1\n");
    engine.end();
}

#[test]
fn the_policy_for_a_programs_own_congestion_control() {
    let p = programs("policy");
    let nsm = |policy: &str| {
        format!(
            "[[nsm]]\nname = \"{policy}\"\ncongestion_control = \"cubic\"\ncongestion_policy = \"{policy}\"\n"
        )
    };
    let text = ["allow", "ignore", "refuse"].map(nsm).concat();
    let config = p.place.file("engine.toml", &text);
    let engine =
        p.place.up(&["--socket", p.place.socket().to_str().unwrap(), "--config", config.to_str().unwrap()]);
    let socket = p.place.socket();
    for (how, program) in [("direct", &p.fixed), ("queued", &p.dynamic)] {
        let ask = |policy: &str, wanted: &str| {
            let options = ["--socket", socket.to_str().unwrap(), "--stack", policy, "--attach", how];
            p.run(&options, program, &["cc", wanted]).succeeds().out.clone()
        };
        assert_eq!(ask("allow", "reno"), "cc cubic\nset 0 now reno\n", "{how}");
        assert_eq!(ask("ignore", "reno"), "cc cubic\nset 0 now cubic\n", "{how}");
        assert_eq!(ask("refuse", "reno"), format!("cc cubic\nset {} now cubic\n", libc::EPERM), "{how}");
        for policy in ["allow", "refuse"] {
            let unknown = format!("cc cubic\nset {} now cubic\n", libc::ENOENT);
            assert_eq!(ask(policy, "no-such-cc"), unknown, "{how}");
        }
    }
    engine.end();
}

#[test]
fn a_stack_says_how_programs_are_attached_and_what_they_may_send() {
    let p = programs("limits");
    let text = "[[nsm]]\nname = \"near\"\nattach = \"direct\"\npacing = \"8 Mbit/s\"\n\
        [[nsm]]\nname = \"far\"\nattach = \"queued\"\npacing = \"8 Mbit/s\"\n\
        [[nsm]]\nname = \"free\"\n";
    let text = if is_root() {
        text.replace("pacing", "mark = 7\npacing")
    } else {
        println!("NOT ROOT: marks cannot be set and are not tested");
        text.to_owned()
    };
    let mark = if is_root() { 7 } else { 0 };
    let config = p.place.file("engine.toml", &text);
    let socket = p.place.socket();
    let socket = socket.to_str().unwrap();
    let engine = p.place.up(&["--socket", socket, "--config", config.to_str().unwrap()]);
    for (stack, attached) in [("near", "direct"), ("far", "queued")] {
        let done = p.run(&["--socket", socket, "--stack", stack], &p.dynamic, &["limits"]);
        let expected = format!("limits 1000000 {mark}\npace -{EPERM}\nmark -{EPERM}\n", EPERM = libc::EPERM);
        if is_root() {
            assert_eq!(done.succeeds().out, expected, "{stack}");
        } else {
            assert!(done.succeeds().out.starts_with("limits 1000000 0\npace -1\n"), "{stack}");
        }
        let stacks = p.place.run(&["stacks", "--json", "--socket", socket]);
        assert!(stacks.out.contains(&format!("\"attach\": \"{attached}\"")), "{}", stacks.out);
    }
    // The command line wins, and who sets no limit lets the program choose.
    let done = p.run(&["--socket", socket, "--stack", "far", "--attach", "direct"], &p.fixed, &["limits"]);
    assert!(done.succeeds().out.starts_with("limits 1000000 "), "{}", done.out);
    let free = p.run(&["--socket", socket, "--stack", "free", "--attach", "direct"], &p.fixed, &["limits"]);
    assert!(free.succeeds().out.contains("\npace 1\n"), "{}", free.out);
    let refused = p.run(&["--socket", socket, "--stack", "far"], &p.fixed, &["limits"]);
    refused.fails(125, &["statically linked", "--attach direct"]);
    engine.end();
}

#[test]
fn explain_names_each_direct_socket_and_the_guest_ends_with_its_last_process() {
    let p = programs("explain");
    let engine = p.place.up(&["--socket", p.place.socket().to_str().unwrap()]);
    let mut command =
        p.place.netkernel(&["run", "--socket", p.place.socket().to_str().unwrap(), "--stack", "reno", "--"]);
    command.arg(&p.fixed).args(["listen", "wait"]).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut child = command.spawn().unwrap();
    let socket = p.place.socket();
    let pid = child.id().to_string();
    let explain = |more: &[&str]| {
        let done = p.place.run(&[&["explain", "--socket", socket.to_str().unwrap()], more].concat());
        done.out
    };
    until("the listener is seen", || explain(&[&pid]).contains("listening"));
    let text = explain(&[&pid]);
    assert!(text.contains("stack reno, attachment direct"), "{text}");
    assert!(text.contains("given directly 1, refused 0"), "{text}");
    assert!(text.contains("the guest has no preloaded library; reno"), "{text}");
    assert!(text.contains(&format!("held by pid {pid}")), "{text}");
    let json = explain(&["--json"]);
    assert!(json.contains("\"attachment\": \"direct\""), "{json}");
    let stranger = p.place.run(&["explain", "--socket", socket.to_str().unwrap(), "1"]);
    stranger.fails(125, &["process 1 belongs to no guest"]);
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
    until("the guest is over", || !explain(&[]).contains("guest"));
    engine.end();
}

#[test]
fn what_direct_connections_carried_is_told_once_when_they_are_closed_too() {
    let p = programs("carried");
    let socket = p.place.socket();
    let socket = socket.to_str().unwrap();
    let database = p.place.dir.join("usage.redb");
    let text = format!("[engine]\nusage = \"{}\"\n", database.display());
    let config = p.place.file("engine.toml", &text);
    let engine = p.place.up(&["--socket", socket, "--config", config.to_str().unwrap()]);
    let mut command = p.place.netkernel(&["run", "--socket", socket, "--stack", "reno", "--"]);
    command.arg(&p.fixed).args(["carry", "50", "wait", "carry", "7", "wait"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    let mut stdin = child.stdin.take().unwrap();
    // Each byte is sent and received by the guest; an end of a stream that was received is one byte more.
    let told = |connections: u64| {
        let ps = p.place.run(&["ps", "--json", "--socket", socket]).json();
        let guest = &ps["engines"][0]["guests"][0];
        let (bytes_in, bytes_out) =
            (guest["bytes_in"].as_u64().unwrap_or(0), guest["bytes_out"].as_u64().unwrap_or(0));
        let least = connections * 1100;
        assert!(bytes_out <= least && bytes_in <= least + 2 * connections, "{bytes_in} {bytes_out}");
        bytes_out == least && bytes_in >= least
    };
    assert_eq!(lines.next().unwrap().unwrap(), "carried");
    until("50 connections are told of", || told(50));
    assert!(told(50), "and once");
    std::io::Write::write_all(&mut stdin, b"x").unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "carried");
    until("57 connections are told of", || told(57));
    drop(stdin);
    assert!(child.wait().unwrap().success());
    let usage = || {
        let args = ["usage", "--socket", socket, "--by", "nsm", "--format", "json"];
        let rows = p.place.run(&args).json();
        rows[0]["bytes_out"].as_u64().unwrap_or(0)
    };
    until("it is written down", || usage() >= 57 * 1100);
    until("the guest is over", || !p.place.run(&["ps", "--socket", socket]).out.contains("static"));
    assert_eq!(usage(), 57 * 1100);
    engine.end();
}

#[test]
fn an_engine_that_dies_leaves_direct_sockets_alive_and_no_call_waiting() {
    let p = programs("dies");
    let engine = p.place.up(&["--socket", p.place.socket().to_str().unwrap()]);
    let mut command = p.place.netkernel(&["run", "--socket", p.place.socket().to_str().unwrap(), "--"]);
    command
        .arg(&p.fixed)
        .args(["listen", "wait", "udp", "wait"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    let port = lines.next().unwrap().unwrap().strip_prefix("listen ").unwrap().parse::<u16>().unwrap();
    engine.signal(libc::SIGKILL);
    let _ = engine.wait();
    std::net::TcpStream::connect(("127.0.0.1", port)).expect("the listener lives on");
    let mut stdin = child.stdin.take().unwrap();
    std::io::Write::write_all(&mut stdin, b"x").unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), format!("udp -{}", libc::ENETDOWN));
    drop(stdin);
    assert!(child.wait().unwrap().success());
}

/// A network namespace with loopback, removed with the value.
struct Netns(String);

impl Netns {
    fn new(name: &str) -> Netns {
        let netns = Netns(format!("nk-test-{}-{name}", std::process::id()));
        for arguments in [&["netns", "add", &netns.0][..], &["-n", &netns.0, "link", "set", "lo", "up"]] {
            let mut command = Command::new("ip");
            command.args(arguments);
            finish(command).succeeds();
        }
        netns
    }

    /// The configuration of an engine whose only stack is here.
    fn config(&self) -> String {
        format!("[[nsm]]\nname = \"there\"\nnetns = \"{}\"\n", self.0)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

#[test]
fn sockets_are_made_in_the_stacks_network_namespace() {
    if !is_root() {
        eprintln!("NOT RUN: only root can make a network namespace");
        return;
    }
    let p = programs("namespace");
    let netns = Netns::new("there");
    let config = p.place.file("engine.toml", &netns.config());
    let engine =
        p.place.up(&["--socket", p.place.socket().to_str().unwrap(), "--config", config.to_str().unwrap()]);
    // A listener of the host is not there.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let socket = p.place.socket();
    let socket = socket.to_str().unwrap();
    let done = p.run(&["--socket", socket], &p.fixed, &["connect", &port]);
    assert_eq!(done.succeeds().out, format!("connect -{}\n", libc::ECONNREFUSED));
    let done = p.run(&["--socket", socket, "--attach", "direct"], &p.dynamic, &["connect", &port]);
    assert_eq!(done.succeeds().out, format!("connect -{}\n", libc::ECONNREFUSED));
    engine.end();
}

/// Answers every question for an address with 192.0.2.7.
const DNS_SERVER: &str = r#"
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("127.0.0.1", 53))
print("ready", flush=True)
while True:
    q, peer = s.recvfrom(512)
    end = q.index(b"\0", 12) + 5
    a = q[end - 4:end - 2] == b"\0\1"
    head = q[:2] + b"\x81\x80" + q[4:6] + (b"\0\1" if a else b"\0\0") + b"\0\0\0\0"
    s.sendto(head + q[12:end] + (b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4\xc0\0\2\x07" if a else b""), peer)
"#;

#[test]
fn names_are_asked_for_by_way_of_the_stack() {
    if !is_root() {
        eprintln!("NOT RUN: only root can make a network namespace");
        return;
    }
    let p = programs("names");
    let netns = Netns::new("names");
    let script = p.place.file("dns.py", DNS_SERVER);
    let mut server = Command::new("ip");
    server.args(["netns", "exec", &netns.0, "/usr/bin/python3"]).arg(script).stdout(Stdio::piped());
    let mut server = server.spawn().unwrap();
    let mut line = String::new();
    let mut out = std::io::BufReader::new(server.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut out, &mut line).unwrap();
    assert_eq!(line, "ready\n");

    let config = p.place.file("engine.toml", &netns.config());
    let engine =
        p.place.up(&["--socket", p.place.socket().to_str().unwrap(), "--config", config.to_str().unwrap()]);
    let resolv = p.place.file("resolv.conf", "nameserver 127.0.0.1\noptions timeout:2 attempts:1\n");
    // The C library's resolver makes its sockets past every preloaded library.
    for attach in ["auto", "direct"] {
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "sh", "-c", "mount --bind \"$0\" /etc/resolv.conf && exec \"$@\""])
            .arg(&resolv);
        let netkernel = p.place.netkernel(&[]);
        command.arg(netkernel.get_program());
        for (key, value) in netkernel.get_envs() {
            match value {
                Some(value) => command.env(key, value),
                None => command.env_remove(key),
            };
        }
        command.args(["run", "--attach", attach, "--socket"]).arg(p.place.socket());
        command.args(["--", "getent", "ahostsv4", "somewhere.test"]).stdin(Stdio::null());
        let done = finish(command);
        assert!(done.succeeds().out.starts_with("192.0.2.7 "), "{attach}: {done:?}");
    }
    server.kill().unwrap();
    server.wait().unwrap();
    engine.end();
}

#[test]
fn a_debugger_and_a_tracer_see_a_served_program() {
    let p = programs("tracer");
    let fixed = p.fixed.to_str().unwrap();
    for tracer in
        [&["strace", "-f", "-o", "/dev/null"][..], &["gdb", "-q", "-batch", "-ex", "run", "--args"][..]]
    {
        let line = [&["run", "--stack", "reno", "--"], tracer, &[fixed, "cc", "reno"]].concat();
        let done = p.place.run(&line);
        if done.err.contains("was not found") {
            eprintln!("NOT RUN: {} is not installed (scripts/deps)", tracer[0]);
            continue;
        }
        assert!(done.succeeds().out.contains("cc reno\nset 0 now reno\n"), "{done:?}");
    }
}

#[test]
fn attachments_that_cannot_be_are_refused_in_one_sentence() {
    let p = programs("refused");
    p.run(&["--attach", "queued"], &p.fixed, &["udp"])
        .fails(125, &["statically linked", "--attach direct", "--fail-open"]);
    // A filter with a listener in a process that has one.
    let netkernel = env!("CARGO_BIN_EXE_netkernel");
    let fixed = p.fixed.to_str().unwrap();
    p.place
        .run(&["run", "--", netkernel, "run", "--private", "--attach", "direct", "--", fixed, "udp"])
        .fails(125, &["another agent watches this process already"]);
}

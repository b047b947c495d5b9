//! Descriptor life: sockets that are inherited across exec, spawned to, and passed over Unix sockets, between programs that the
//! library serves (dynamic) and such that it does not (static), each way. Network: loopback.

mod common;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Stdio};

use common::{Place, WATCHDOG, wait};

const PROGRAM: &str = r#"
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
extern char **environ;
static void die(const char *what) { fprintf(stderr, "%s: %s\n", what, strerror(errno)); exit(1); }
static int listener(void) {
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof any;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(fd, (void *)&any, sizeof any) || listen(fd, 16) || getsockname(fd, (void *)&any, &length)) die("listener");
    printf("port %d\n", ntohs(any.sin_port));
    return fd;
}
static const char *family(int fd) {
    struct sockaddr_storage peer;
    socklen_t length = sizeof peer;
    if (getpeername(fd, (void *)&peer, &length)) return strerror(errno);
    return peer.ss_family == AF_INET ? "inet" : "other";
}
/* Greets, then gives back what comes until the end. */
static void echo(int in, int out) {
    char b[4096];
    ssize_t n = snprintf(b, sizeof b, "hello %s\n", family(in));
    do { if (write(out, b, n) != n) die("write"); } while ((n = read(in, b, sizeof b)) > 0);
    if (n < 0) die("read");
}
static void put(int fd, int number) { if (fd != number) { if (dup2(fd, number) < 0) die("dup2"); close(fd); } }
static void reap(pid_t pid) { int s; if (waitpid(pid, &s, 0) != pid || s) { fprintf(stderr, "child: %x\n", s); exit(1); } }
static void send_fd(int over, int fd) {
    char b = 'x', space[CMSG_SPACE(sizeof(int))] = "";
    struct iovec iov = {&b, 1};
    struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space};
    struct cmsghdr *c = CMSG_FIRSTHDR(&m);
    c->cmsg_level = SOL_SOCKET, c->cmsg_type = SCM_RIGHTS, c->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(c), &fd, sizeof fd);
    if (sendmsg(over, &m, 0) != 1) die("sendmsg");
}
static int receive_fd(int over) {
    char b, space[CMSG_SPACE(sizeof(int))];
    int fd = -1;
    struct iovec iov = {&b, 1};
    struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space};
    if (recvmsg(over, &m, 0) != 1 || !CMSG_FIRSTHDR(&m)) die("recvmsg");
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof fd);
    return fd;
}
int main(int argc, char **argv) {
    char *how = argv[1], **next = argv + 2;
    setvbuf(stdout, 0, _IONBF, 0);
    alarm(60);
    if (!strcmp(how, "echo")) { echo(0, 1); return 0; }
    if (!strcmp(how, "serve")) {
        /* As sd_listen_fds(3) has it. */
        if (!getenv("LISTEN_FDS") || atoi(getenv("LISTEN_PID")) != getpid()) die("LISTEN_FDS");
        for (int n = 0; n < 2; n++) { int fd = accept(3, 0, 0); if (fd < 0) die("accept"); echo(fd, fd); close(fd); }
        return 0;
    }
    if (!strcmp(how, "serve-one")) { int fd = accept(0, 0, 0); if (fd < 0) die("accept"); echo(fd, fd); return 0; }
    if (!strcmp(how, "talk")) {
        char b[64];
        if (write(0, "second\n", 7) != 7) die("write");
        shutdown(0, SHUT_WR);
        ssize_t n = read(0, b, sizeof b);
        printf("%s %.*s", family(0), (int)(n > 0 ? n : 0), b);
        return 0;
    }
    if (!strcmp(how, "datagram")) {
        char b[64];
        struct sockaddr_in from;
        socklen_t length = sizeof from;
        ssize_t n = recvfrom(0, b, sizeof b, 0, (void *)&from, &length);
        if (n < 0 || sendto(0, b, n, 0, (void *)&from, length) != n) die("datagram");
        return 0;
    }
    if (!strcmp(how, "take")) { int fd = receive_fd(0); echo(fd, fd); return 0; }
    if (!strcmp(how, "take-ready")) { if (write(0, "r", 1) != 1) die("ready"); int fd = receive_fd(0); echo(fd, fd); return 0; }
    if (!strcmp(how, "take-listener")) {
        if (write(0, "r", 1) != 1) die("ready");
        int from = receive_fd(0);
        for (int n = 0; n < 2; n++) { int fd = accept(from, 0, 0); if (fd < 0) die("accept"); echo(fd, fd); close(fd); }
        return 0;
    }
    if (!strcmp(how, "take-datagram")) {
        char b[64];
        if (write(0, "r", 1) != 1) die("ready");
        struct sockaddr_in from;
        socklen_t length = sizeof from;
        int fd = receive_fd(0);
        ssize_t n = recvfrom(fd, b, sizeof b, 0, (void *)&from, &length);
        if (n < 0 || sendto(fd, b, n, 0, (void *)&from, length) != n) die("datagram");
        return 0;
    }
    if (!strcmp(how, "listen-fds")) {
        char pid[16];
        put(listener(), 3);
        snprintf(pid, sizeof pid, "%d", getpid());
        setenv("LISTEN_FDS", "1", 1);
        setenv("LISTEN_PID", pid, 1);
        execv(next[0], next);
        die("exec");
    }
    if (!strcmp(how, "inetd") || !strcmp(how, "spawn")) {
        int from = listener();
        for (int n = 0; n < 2; n++) {
            pid_t pid;
            int fd = accept4(from, 0, 0, SOCK_CLOEXEC);
            if (fd < 0) die("accept");
            if (*how == 's') {
                posix_spawn_file_actions_t actions;
                posix_spawn_file_actions_init(&actions);
                posix_spawn_file_actions_adddup2(&actions, fd, 0);
                posix_spawn_file_actions_adddup2(&actions, fd, 1);
                if ((errno = posix_spawn(&pid, next[0], &actions, 0, next, environ))) die("spawn");
            } else if (!(pid = fork())) {
                dup2(fd, 0), dup2(fd, 1);
                execv(next[0], next);
                die("exec");
            }
            close(fd);
            reap(pid);
        }
        /* And it still serves by itself. */
        int fd = accept(from, 0, 0);
        echo(fd, fd);
        return 0;
    }
    if (!strcmp(how, "inetd-wait")) {
        /* The server gets the listener; inetd waits for connections by poll, or by epoll. */
        int from = listener(), set = epoll_create1(EPOLL_CLOEXEC);
        struct epoll_event event = {.events = EPOLLIN, .data.u32 = 7};
        epoll_ctl(set, EPOLL_CTL_ADD, from, &event);
        for (int n = 0; n < 4; n++) {
            struct pollfd p = {from, POLLIN, 0};
            if (n & 1 ? poll(&p, 1, 30000) != 1 || p.revents != POLLIN
                      : epoll_wait(set, &event, 1, 30000) != 1 || event.data.u32 != 7) die("poll");
            pid_t pid = fork();
            if (!pid) { put(from, 0); execv(next[0], next); die("exec"); }
            reap(pid);
        }
        return 0;
    }
    if (!strcmp(how, "client")) {
        struct sockaddr_in to = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK), .sin_port = htons(atoi(*next++))};
        put(socket(AF_INET, SOCK_STREAM, 0), 0);
        if (connect(0, (void *)&to, sizeof to) || write(0, "first\n", 6) != 6) die("connect");
        execv(next[0], next);
        die("exec");
    }
    if (!strcmp(how, "udp")) {
        struct sockaddr_in any = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        socklen_t length = sizeof any;
        put(socket(AF_INET, SOCK_DGRAM, 0), 0);
        if (bind(0, (void *)&any, sizeof any) || getsockname(0, (void *)&any, &length)) die("bind");
        printf("port %d\n", ntohs(any.sin_port));
        execv(next[0], next);
        die("exec");
    }
    if (!strncmp(how, "pass", 4)) {
        /* pass: at once, whatever the child is by then. pass-ready: when the other program runs. pass-read: after a word was
           read; pass-more: two. pass-listener, pass-datagram, pass-accepted (a listener that accepted). */
        char b[64];
        int pair[2], datagram = !strcmp(how, "pass-datagram");
        struct sockaddr_in any = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        socklen_t length = sizeof any;
        int from = datagram ? socket(AF_INET, SOCK_DGRAM, 0) : listener(), fd = from;
        if (datagram) {
            if (bind(fd, (void *)&any, sizeof any) || getsockname(fd, (void *)&any, &length)) die("bind");
            printf("port %d\n", ntohs(any.sin_port));
        } else if (strcmp(how, "pass-listener") && (fd = accept(from, 0, 0)) < 0) die("accept");
        if (!strcmp(how, "pass-accepted")) { echo(fd, fd); close(fd); fd = from; }
        socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
        pid_t pid = fork();
        if (!pid) { close(from), close(fd), close(pair[0]); put(pair[1], 0); execv(next[0], next); die("exec"); }
        close(pair[1]);
        if (strcmp(how, "pass") && read(pair[0], b, 1) != 1) die("ready");
        if (!strcmp(how, "pass-read") && (read(fd, b, 6) != 6 || memcmp(b, "first ", 6))) die("first");
        send_fd(pair[0], fd);
        close(fd);
        if (!strcmp(how, "pass-accepted")) printf("passed\n");
        reap(pid);
        return 0;
    }
    if (!strcmp(how, "daemon")) {
        /* Closes everything, as daemons do, and serves then. */
        int out = dup2(1, 200);
        for (int fd = 0; fd < 4096; fd++) if (fd != out) close(fd);
        pid_t pid = fork();
        if (pid) { reap(pid); return 0; }
        dup2(out, 1), close(out);
        put(listener(), 3);
        int fd = accept(3, 0, 0);
        dup2(fd, 0), dup2(fd, 1);
        execv(next[0], next);
        die("exec");
    }
    return 2;
}
"#;

struct Programs {
    place: Place,
    fixed: PathBuf,
    dynamic: PathBuf,
}

/// A launcher under `netkernel run`, killed with the value if it does not end.
struct Launched {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Programs {
    fn new(name: &str) -> Programs {
        let place = Place::new(name);
        let fixed = place.program("static", PROGRAM, &["-static"]);
        let dynamic = place.program("dynamic", PROGRAM, &[]);
        Programs { place, fixed, dynamic }
    }

    /// Launcher and server, each way.
    fn pairs(&self) -> [(&str, &str); 4] {
        let (fixed, dynamic) = (self.fixed.to_str().unwrap(), self.dynamic.to_str().unwrap());
        [(dynamic, fixed), (fixed, dynamic), (dynamic, dynamic), (fixed, fixed)]
    }

    fn launch(&self, options: &[&str], line: &[&str]) -> Launched {
        let mut command = self.place.netkernel(&[&["run"], options, &["--"], line].concat());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Launched { child, lines }
    }
}

impl Launched {
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line
    }

    fn port(&mut self) -> u16 {
        let line = self.line();
        let port = line.trim().strip_prefix("port ").and_then(|port| port.parse().ok());
        port.unwrap_or_else(|| panic!("no port but {line:?}: {}", self.errors()))
    }

    fn errors(&mut self) -> String {
        let mut text = String::new();
        let _ = self.child.kill();
        self.child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        text
    }

    /// Waits for its end; what it said on standard error.
    fn succeeds(mut self) -> String {
        let status = wait(&mut self.child, "the launcher");
        let mut text = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        assert!(status.success(), "{status}: {text}");
        text
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A conversation with an `echo`: greeted over INET, answered, ended.
fn converse(port: u16, first: bool, what: &str) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap_or_else(|e| panic!("{what}: {e}"));
    stream.set_read_timeout(Some(WATCHDOG)).unwrap();
    if first {
        stream.write_all(b"early ").unwrap();
        // Long enough on its way to be there before the server is.
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let mut lines = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    lines.read_line(&mut line).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(line, "hello inet\n", "{what}");
    stream.write_all(b"word\n").unwrap();
    line.clear();
    lines.read_line(&mut line).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(line, if first { "early word\n" } else { "word\n" }, "{what}");
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    line.clear();
    assert_eq!(lines.read_line(&mut line).unwrap_or_else(|e| panic!("{what}: {e}")), 0, "{what}: {line}");
}

/// A datagram socket that answers, which its program has just given away or taken through an exec.
fn echoes(port: u16, what: &str) {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(WATCHDOG)).unwrap();
    // That may still be on its way; a datagram that comes before it would be received into the queues.
    std::thread::sleep(std::time::Duration::from_millis(100));
    socket.send_to(b"ping", ("127.0.0.1", port)).unwrap();
    let mut bytes = [0; 16];
    let n = socket.recv(&mut bytes).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(&bytes[..n], b"ping");
}

#[test]
fn a_listener_is_inherited_as_descriptor_three() {
    let p = Programs::new("listen-fds");
    for (launcher, server) in p.pairs() {
        let mut run = p.launch(&[], &[launcher, "listen-fds", server, "serve"]);
        let port = run.port();
        converse(port, false, server);
        converse(port, true, server);
        assert_eq!(run.succeeds(), "");
    }
}

#[test]
fn a_connection_becomes_standard_input_and_output() {
    let p = Programs::new("inetd");
    for (launcher, server) in p.pairs() {
        for how in ["inetd", "spawn"] {
            let what = format!("{launcher} {how} {server}");
            let mut run = p.launch(&[], &[launcher, how, server, "echo"]);
            let port = run.port();
            for early in [true, false, true] {
                converse(port, early, &what);
            }
            assert_eq!(run.succeeds(), "", "{what}");
        }
    }
}

#[test]
fn what_came_before_the_server_was_there_is_the_servers() {
    let p = Programs::new("early");
    let bytes: Vec<u8> = (0..600_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    for (launcher, server) in p.pairs() {
        let mut run = p.launch(&[], &[launcher, "inetd", server, "echo"]);
        let port = run.port();
        // More than fits into any ring, and an end; the same, in pieces; an end only.
        for (sent, pause) in [(&bytes[..], 0), (&bytes[..90_000], 1), (&[], 0)] {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
            stream.set_read_timeout(Some(WATCHDOG)).unwrap();
            let mut writer = stream.try_clone().unwrap();
            let piece = if pause == 0 { sent.len().max(1) } else { 10_000 };
            let mine = sent.to_vec();
            let writer = std::thread::spawn(move || {
                for piece in mine.chunks(piece) {
                    writer.write_all(piece).unwrap();
                    std::thread::sleep(std::time::Duration::from_millis(pause));
                }
                writer.shutdown(std::net::Shutdown::Write).unwrap();
            });
            let mut got = Vec::new();
            stream.read_to_end(&mut got).unwrap_or_else(|e| panic!("{launcher} {server}: {e}"));
            writer.join().unwrap();
            assert!(got.starts_with(b"hello inet\n"), "{launcher} {server}: {}", run.errors());
            assert!(got[11..] == *sent, "{launcher} {server}: {} of {} bytes", got.len() - 11, sent.len());
        }
        assert_eq!(run.succeeds(), "", "{launcher} {server}");
    }
}

#[test]
fn sockets_are_passed_to_programs_with_the_library_and_without() {
    let p = Programs::new("passed");
    for (launcher, server) in p.pairs() {
        for (how, take, early) in
            [("pass", "take", false), ("pass-ready", "take-ready", false), ("pass-ready", "take-ready", true)]
        {
            let what = format!("{launcher} {how} {server} {early}");
            let mut run = p.launch(&[], &[launcher, how, server, take]);
            converse(run.port(), early, &what);
            assert_eq!(run.succeeds(), "", "{what}");
        }
        // A part of what came was read already.
        let mut run = p.launch(&[], &[launcher, "pass-read", server, "take-ready"]);
        let mut stream = TcpStream::connect(("127.0.0.1", run.port())).unwrap();
        stream.set_read_timeout(Some(WATCHDOG)).unwrap();
        stream.write_all(b"first second").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello inet\nsecond", "{launcher} {server}: {}", run.errors());
        assert_eq!(run.succeeds(), "", "{launcher} {server}");

        let mut run = p.launch(&[], &[launcher, "pass-listener", server, "take-listener"]);
        let port = run.port();
        converse(port, false, server);
        converse(port, true, server);
        assert_eq!(run.succeeds(), "", "{launcher} {server}");

        let mut run = p.launch(&[], &[launcher, "pass-accepted", server, "take-listener"]);
        let port = run.port();
        converse(port, false, server);
        // A connection that was accepted ahead would be lost (docs/COMPAT.md, 9).
        assert_eq!(run.line(), "passed\n", "{launcher} {server}");
        converse(port, true, server);
        converse(port, false, server);
        assert_eq!(run.succeeds(), "", "{launcher} {server}");

        let mut run = p.launch(&[], &[launcher, "pass-datagram", server, "take-datagram"]);
        let port = run.port();
        echoes(port, &format!("{launcher} {server}"));
        assert_eq!(run.succeeds(), "");
    }
}

#[test]
fn a_socket_that_the_receiver_could_not_use_is_not_sent() {
    let p = Programs::new("unsent");
    let (fixed, dynamic) = (p.fixed.to_str().unwrap(), p.dynamic.to_str().unwrap());
    let mut run = p.launch(&["--attach", "queued"], &[dynamic, "pass-ready", fixed, "take-ready"]);
    let _stream = TcpStream::connect(("127.0.0.1", run.port())).unwrap();
    assert!(!wait(&mut run.child, "the launcher").success());
    let text = run.errors();
    assert!(text.contains("does not have the preloaded library"), "{text}");
    assert!(text.contains("--attach auto") && text.contains("sendmsg: Operation not permitted"), "{text}");
}

#[test]
fn a_listener_goes_to_a_server_and_comes_back() {
    let p = Programs::new("inetd-wait");
    for (launcher, server) in p.pairs() {
        let mut run = p.launch(&[], &[launcher, "inetd-wait", server, "serve-one"]);
        let port = run.port();
        for _ in 0..4 {
            converse(port, false, &format!("{launcher} {server}"));
        }
        assert_eq!(run.succeeds(), "");
    }
}

#[test]
fn a_connection_and_a_datagram_socket_live_through_exec() {
    let p = Programs::new("through");
    for (launcher, server) in p.pairs() {
        let peer = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = peer.local_addr().unwrap().port().to_string();
        let mut run = p.launch(&[], &[launcher, "client", &port, server, "talk"]);
        let (mut stream, _) = peer.accept().unwrap();
        stream.set_read_timeout(Some(WATCHDOG)).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert_eq!(text, "first\nsecond\n", "{launcher} {server}: {}", run.errors());
        stream.write_all(b"answer\n").unwrap();
        assert_eq!(run.line(), "inet answer\n", "{launcher} {server}");
        assert_eq!(run.succeeds(), "");

        let mut run = p.launch(&[], &[launcher, "udp", server, "datagram"]);
        let port = run.port();
        echoes(port, &format!("{launcher} {server}"));
        assert_eq!(run.succeeds(), "");
    }
}

#[test]
fn a_daemon_that_closes_everything_is_served_still() {
    let p = Programs::new("daemon");
    for (launcher, server) in p.pairs() {
        let mut run = p.launch(&[], &[launcher, "daemon", server, "echo"]);
        let port = run.port();
        converse(port, false, &format!("{launcher} {server}"));
        run.succeeds();
    }
}

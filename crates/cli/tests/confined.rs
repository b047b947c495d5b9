//! Filters that cannot be put on, programs with filters of their own, and programs of 32 bits. Network: loopback.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Done, Place, finish};

/// `outer ERRNO PROGRAM...`: a sandbox in which seccomp(2) fails so. The others do what their names say.
const PROGRAM: &str = r#"
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>
static void forbid(int number, int error) {
    struct sock_filter code[] = {
        {BPF_LD | BPF_W | BPF_ABS, 0, 0, offsetof(struct seccomp_data, nr)},
        {BPF_JMP | BPF_JEQ | BPF_K, 0, 1, number},
        {BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ERRNO | error},
        {BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ALLOW},
    };
    struct sock_fprog program = {4, code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) { perror("filter"); exit(1); }
}
static void talk(void) {
    /* To itself, over a connection. */
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof any;
    char name[16] = "", b[8];
    int from = socket(AF_INET, SOCK_STREAM, 0), to = socket(AF_INET, SOCK_STREAM, 0);
    if (from < 0) { printf("socket -%d\n", errno); return; }
    if (bind(from, (void *)&any, sizeof any) || listen(from, 5) || getsockname(from, (void *)&any, &length)) { perror("listen"); exit(1); }
    if (connect(to, (void *)&any, length)) { perror("connect"); exit(1); }
    int fd = accept(from, 0, 0);
    if (send(to, "hello", 5, 0) != 5 || recv(fd, b, 8, 0) != 5) { perror("bytes"); exit(1); }
    length = sizeof name;
    getsockopt(to, IPPROTO_TCP, TCP_CONGESTION, name, &length);
    printf("talked %s\n", name);
}
int main(int argc, char **argv) {
    setvbuf(stdout, 0, _IONBF, 0);
    alarm(60);
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "outer")) {
            forbid(SYS_seccomp, atoi(argv[i + 1]));
            execv(argv[i + 2], argv + i + 2);
            perror("exec");
            return 1;
        } else if (!strcmp(argv[i], "talk")) talk();
        else if (!strcmp(argv[i], "forbid-ppid")) { forbid(SYS_getppid, EPERM); printf("ppid %ld\n", syscall(SYS_getppid)); }
        else if (!strcmp(argv[i], "forbid-socket")) forbid(SYS_socket, EACCES);
        else if (!strcmp(argv[i], "listener")) {
            struct sock_filter code[] = {{BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ALLOW}};
            struct sock_fprog program = {1, code};
            prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            int fd = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
            printf("listener %d\n", fd < 0 ? -errno : 1);
        } else if (!strcmp(argv[i], "exec")) { execv(argv[i + 1], argv + i + 1); perror("exec"); return 1; }
    }
    return 0;
}
"#;

struct Programs {
    place: Place,
    fixed: PathBuf,
    dynamic: PathBuf,
}

impl Programs {
    fn new(name: &str) -> Programs {
        let place = Place::new(name);
        let source = place.file("program.c", PROGRAM);
        let fixed = build(&place, &source, "static", &["-static"]).expect("cc builds a static program");
        let dynamic = build(&place, &source, "dynamic", &[]).expect("cc builds a program");
        Programs { place, fixed, dynamic }
    }

    fn run(&self, options: &[&str], program: &Path, arguments: &[&str]) -> Done {
        let program = program.to_str().unwrap();
        self.place.run(&[&["run", "--stack", "reno"], options, &["--", program], arguments].concat())
    }

    /// `netkernel` itself in a sandbox.
    fn run_inside(&self, errno: i32, options: &[&str], program: &Path, arguments: &[&str]) -> Done {
        let netkernel = self.place.netkernel(&[]);
        let mut command = Command::new(&self.dynamic);
        for (key, value) in netkernel.get_envs() {
            match value {
                Some(value) => command.env(key, value),
                None => command.env_remove(key),
            };
        }
        command.args(["outer", &errno.to_string()]).arg(netkernel.get_program());
        command.args(["run", "--stack", "reno"]).args(options).arg("--").arg(program).args(arguments);
        command.stdin(std::process::Stdio::null());
        finish(command)
    }
}

fn build(place: &Place, source: &Path, output: &str, flags: &[&str]) -> Option<PathBuf> {
    let path = place.dir.join(output);
    let mut command = Command::new("cc");
    command.arg("-w").args(flags).arg("-o").arg(&path).arg(source);
    (finish(command).code == Some(0)).then_some(path)
}

#[test]
fn a_filter_that_is_forbidden_is_said_in_one_sentence_with_the_way_out() {
    let p = Programs::new("forbidden");
    for (errno, words) in [(libc::EPERM, "sandbox"), (libc::ENOSYS, "Linux 5.14 is needed")] {
        for attach in ["direct", "relay", "auto"] {
            let done = p.run_inside(errno, &["--attach", attach], &p.fixed, &["talk"]);
            done.fails(125, &[words, "--attach queued", "--fail-open"]);
        }
        // A program that can be preloaded to is served, with a warning of what is not.
        let done = p.run_inside(errno, &[], &p.dynamic, &["talk"]);
        assert_eq!(done.succeeds().out, "talked reno\n");
        assert!(done.err.contains(words) && done.err.lines().count() == 1, "{done:?}");
        assert!(
            done.err.contains("sockets that the preloaded library does not see are not served"),
            "{done:?}"
        );
        // The way out is one.
        let done = p.run_inside(errno, &["--attach", "queued"], &p.dynamic, &["talk"]);
        assert_eq!((done.succeeds().out.as_str(), done.err.as_str()), ("talked reno\n", ""));
        let done = p.run_inside(errno, &["--fail-open"], &p.fixed, &["talk"]);
        assert!(done.succeeds().out.starts_with("talked ") && done.err.contains("--fail-open"), "{done:?}");
    }
}

#[test]
fn a_process_without_new_privileges_is_served() {
    let p = Programs::new("no-new-privs");
    let netkernel = p.place.netkernel(&["run", "--stack", "reno", "--attach", "direct", "--"]);
    let mut command = Command::new("setpriv");
    command.args(["--no-new-privs", "--"]).arg(netkernel.get_program()).args(netkernel.get_args());
    for (key, value) in netkernel.get_envs() {
        match value {
            Some(value) => command.env(key, value),
            None => command.env_remove(key),
        };
    }
    command.arg(&p.fixed).arg("talk");
    assert_eq!(finish(command).succeeds().out, "talked reno\n");
}

#[test]
fn a_programs_own_filter_works_as_ever() {
    let p = Programs::new("own-filter");
    let fixed = p.fixed.to_str().unwrap();
    for (attach, program) in
        [("direct", &p.fixed), ("relay", &p.fixed), ("auto", &p.dynamic), ("queued", &p.dynamic)]
    {
        let options = ["--attach", attach];
        let done = p.run(&options, program, &["talk", "forbid-ppid", "talk"]);
        assert_eq!(done.succeeds().out, "talked reno\nppid -1\ntalked reno\n", "{attach}: {done:?}");
        if attach != "queued" {
            // Inherited by a program that cannot be preloaded to.
            let done = p.run(&options, program, &["forbid-ppid", "exec", fixed, "talk"]);
            assert_eq!(done.succeeds().out, "ppid -1\ntalked reno\n", "{attach}: {done:?}");
        }
    }
    // What it forbids is forbidden: the agent is not even asked.
    let done = p.run(&["--attach", "direct"], &p.fixed, &["forbid-socket", "talk"]);
    assert_eq!(done.succeeds().out, format!("socket -{}\n", libc::EACCES));
    // The kernel gives each process one listener (docs/COMPAT.md, 9).
    for attach in ["direct", "relay"] {
        let done = p.run(&["--attach", attach], &p.fixed, &["listener", "talk"]);
        assert_eq!(done.succeeds().out, format!("listener -{}\ntalked reno\n", libc::EBUSY), "{attach}");
    }
    let done = p.run(&["--attach", "queued"], &p.dynamic, &["listener"]);
    assert_eq!(done.succeeds().out, "listener 1\n");
}

#[test]
fn a_program_of_32_bits_is_refused_in_one_sentence_and_none_of_its_sockets_escapes() {
    let p = Programs::new("narrow");
    let source = p.place.dir.join("program.c");
    let Some(narrow) = build(&p.place, &source, "narrow", &["-m32", "-static"]) else {
        println!("NOT RUN: cc -m32 builds nothing (scripts/deps: gcc-multilib)");
        return;
    };
    for attach in ["auto", "queued", "direct", "relay"] {
        let done = p.run(&["--attach", attach], &narrow, &["talk"]);
        done.fails(125, &["is a 32-bit program", "use a 64-bit build", "--fail-open"]);
    }
    let done = p.run(&["--fail-open"], &narrow, &["talk"]);
    assert!(done.succeeds().out.starts_with("talked ") && done.err.contains("--fail-open"), "{done:?}");
    // Started by one that is served: it gets no socket, and the engine says why.
    let path = narrow.to_str().unwrap();
    for (attach, errno) in [("direct", libc::ENOSYS), ("auto", libc::ENOSYS), ("relay", libc::EAFNOSUPPORT)] {
        let program = if attach == "auto" { &p.dynamic } else { &p.fixed };
        let done = p.run(&["--attach", attach], program, &["talk", "exec", path, "talk"]);
        let expected = format!("talked reno\nsocket -{errno}\n");
        assert_eq!(done.succeeds().out, expected, "{attach}: {done:?}");
    }
}

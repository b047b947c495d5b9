/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Sockets over fork, exec, spawn, daemon, and the death of their holders. */
#include "socktest.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>

extern char **environ;

CASE(fork_child_uses_parents_socket)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        hear(s[1], "to child");
        say(s[1], "from child");
        _exit(0);
    }
    say(s[0], "to child");
    hear(s[0], "from child");
    reap(p, 0);
    say(s[0], "parent too");
    hear(s[1], "parent too");
}

CASE(fork_child_closes_parent_goes_on)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        OK(close(s[1]));
        OK(close(s[0]));
        _exit(0);
    }
    reap(p, 0);
    EV(poll_ms(s[0], POLLIN | POLLRDHUP, 20), 0);
    say(s[0], "x");
    hear(s[1], "x");
    say(s[1], "y");
    hear(s[0], "y");
}

CASE(fork_parent_closes_child_goes_on)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        OK(close(s[0]));
        hear(s[1], "x");
        say(s[1], "y");
        hear_eof(s[1]);
        _exit(0);
    }
    OK(close(s[1]));
    say(s[0], "x");
    hear(s[0], "y");
    OK(shutdown(s[0], SHUT_WR));
    hear_eof(s[0]);
    reap(p, 0);
}

CASE(fork_child_exit_does_not_end_connection)
{
    int s[2];
    tcp_pair(s);
    for (int i = 0; i < 20; i++) {
        pid_t p = fork_child();
        if (!p)
            _exit(0);
        reap(p, 0);
    }
    EV(poll_ms(s[0], POLLIN | POLLRDHUP, 20), 0);
    say(s[0], "x");
    hear(s[1], "x");
}

CASE(fork_child_exit_with_atexit)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p)
        exit(0); /* destructors run; the parent's sockets stay */
    reap(p, 0);
    say(s[0], "x");
    hear(s[1], "x");
}

CASE(fork_shutdown_in_child_is_for_all)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        OK(shutdown(s[1], SHUT_WR));
        _exit(0);
    }
    reap(p, 0);
    hear_eof(s[0]);
    ERR(send(s[1], "x", 1, MSG_NOSIGNAL), EPIPE);
}

CASE(fork_unread_bytes_are_shared)
{
    int s[2];
    tcp_pair(s);
    say(s[0], "abcdef");
    wait_bytes(s[1], 6);
    pid_t p = fork_child();
    if (!p) {
        hear(s[1], "abc");
        _exit(0);
    }
    reap(p, 0);
    hear(s[1], "def");
    ERR(recv(s[1], &(char){0}, 1, MSG_DONTWAIT), EAGAIN);
}

CASE(fork_child_makes_its_own_sockets)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        int t[2];
        OK(close(s[0]));
        OK(close(s[1]));
        tcp_pair(t);
        for (int i = 0; i < 100; i++) {
            say(t[0], "child");
            hear(t[1], "child");
        }
        _exit(0);
    }
    for (int i = 0; i < 100; i++) {
        say(s[0], "parent");
        hear(s[1], "parent");
    }
    reap(p, 0);
}

CASE(fork_child_connects_to_parent)
{
    int l = listener(AF_INET, 8);
    pid_t p[4];
    for (int i = 0; i < 4; i++)
        if (!(p[i] = fork_child())) {
            int c = connected(l);
            say(c, "hello");
            hear(c, "world");
            hear_eof(c);
            _exit(0);
        }
    for (int i = 0; i < 4; i++) {
        int a = accepted(l);
        hear(a, "hello");
        say(a, "world");
        OK(close(a));
    }
    for (int i = 0; i < 4; i++)
        reap(p[i], 0);
}

CASE(fork_child_inherits_listener_parent_closes)
{
    int l = listener(AF_INET, 8);
    union addr a;
    socklen_t n = name_of(l, &a);
    pid_t p = fork_child();
    if (!p) {
        int c = accepted(l);
        hear(c, "x");
        say(c, "y");
        _exit(0);
    }
    OK(close(l));
    int c = OK(socket(AF_INET, SOCK_STREAM, 0));
    OK(connect(c, &a.sa, n));
    say(c, "x");
    hear(c, "y");
    hear_eof(c);
    reap(p, 0);
}

CASE(fork_two_children_accept_on_one_listener)
{
    int l = listener(AF_INET, 32);
    pid_t p[2];
    for (int i = 0; i < 2; i++)
        if (!(p[i] = fork_child()))
            for (;;) {
                int a = accepted(l);
                char c;
                recv_all(a, &c, 1);
                EQ(send(a, &c, 1, 0), 1);
                OK(close(a));
                if (c == 'q')
                    _exit(0);
            }
    for (int i = 0; i < 40; i++) {
        int c = connected(l);
        say(c, "w");
        hear(c, "w");
        hear_eof(c);
        OK(close(c));
    }
    for (int i = 0; i < 2; i++) {
        int c = connected(l);
        say(c, "q");
        hear(c, "q");
        OK(close(c));
    }
    reap(p[0], 0);
    reap(p[1], 0);
}

static void epoll_worker(int l, unsigned how)
{
    int e = ep_new();
    ep_add(e, l, EPOLLIN | how);
    for (;;) {
        struct epoll_event v[4];
        int n = epoll_wait(e, v, 4, 15000);
        TRUE(n > 0);
        for (int i = 0; i < n; i++) {
            int fd = v[i].data.fd;
            if (fd == l) {
                int a = accept4(l, NULL, NULL, SOCK_NONBLOCK);
                if (a < 0) {
                    TRUE(errno == EAGAIN); /* the other one was faster */
                    continue;
                }
                ep_add(e, a, EPOLLIN);
                continue;
            }
            char c;
            ssize_t r = OK(recv(fd, &c, 1, 0));
            if (r == 0) {
                OK(close(fd));
                continue;
            }
            EQ(send(fd, &c, 1, 0), 1);
            if (c == 'q')
                _exit(0);
        }
    }
}

static void epoll_workers(unsigned how)
{
    int l = listener(AF_INET, 64);
    set_nonblock(l, 1);
    pid_t p[2];
    for (int i = 0; i < 2; i++)
        if (!(p[i] = fork_child()))
            epoll_worker(l, how);
    for (int i = 0; i < 60; i++) {
        int c = connected(l);
        for (int k = 0; k < 3; k++) {
            say(c, "w");
            hear(c, "w");
        }
        OK(close(c));
    }
    for (int i = 0; i < 2; i++) {
        int c = connected(l);
        say(c, "q");
        hear(c, "q");
        hear_eof(c); /* the worker's exit closes it */
        OK(close(c));
    }
    reap(p[0], 0);
    reap(p[1], 0);
}

CASE(fork_two_epoll_workers) { epoll_workers(0); }
CASE(fork_two_epoll_workers_exclusive) { epoll_workers(EPOLLEXCLUSIVE); }

CASE(fork_worker_is_replaced)
{
    int l = listener(AF_INET, 32);
    for (int gen = 0; gen < 5; gen++) {
        pid_t p = fork_child();
        if (!p) {
            for (;;) {
                int a = accepted(l);
                say(a, "x");
                OK(close(a));
            }
        }
        for (int i = 0; i < 5; i++) {
            int c = connected(l);
            hear(c, "x");
            hear_eof(c);
            OK(close(c));
        }
        OK(kill(p, SIGKILL));
        reap(p, 128 + SIGKILL);
    }
    int c = connected(l);
    int a = accepted(l);
    say(a, "x");
    hear(c, "x");
}

CASE(fork_connection_ends_with_last_holder)
{
    int s[2];
    tcp_pair(s);
    struct gate g;
    gate_init(&g);
    pid_t p = fork_child();
    if (!p) {
        OK(close(s[0]));
        gate_wait(&g);
        _exit(0);
    }
    OK(close(s[1]));
    EV(poll_ms(s[0], POLLIN | POLLRDHUP, 20), 0);
    gate_open(&g);
    hear_eof(s[0]);
    reap(p, 0);
}

static void ends_by(int how)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        OK(close(s[0]));
        say(s[1], "last words");
        if (how == 0)
            exit(3);
        if (how == -1)
            _exit(3);
        signal(how, SIG_DFL);
        kill(getpid(), how);
        for (;;)
            pause();
    }
    OK(close(s[1]));
    hear(s[0], "last words");
    hear_eof(s[0]);
    reap(p, how > 0 ? 128 + how : 3);
}

CASE(fork_holder_exit) { ends_by(0); }
CASE(fork_holder__exit) { ends_by(-1); }
CASE(fork_holder_sigkill) { ends_by(SIGKILL); }
CASE(fork_holder_abort) { ends_by(SIGABRT); }
CASE(fork_holder_sigterm) { ends_by(SIGTERM); }
CASE(fork_holder_segv) { ends_by(SIGSEGV); }

CASE(fork_holder_killed_with_unread_data_resets)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        OK(close(s[0]));
        wait_bytes(s[1], 6);
        OK(raise(SIGKILL));
    }
    OK(close(s[1]));
    say(s[0], "unread");
    reap(p, 128 + SIGKILL);
    wait_all(s[0], POLLERR | POLLHUP);
    ERR(recv(s[0], &(char){0}, 1, 0), ECONNRESET);
}

CASE(fork_killed_while_receiving)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        OK(close(s[0]));
        stream_recv(s[1], 1ull << 40, 3, 70000);
        _exit(0);
    }
    OK(close(s[1]));
    static char b[65536];
    for (int i = 0; i < 20; i++) {
        fill_pattern((unsigned char *)b, sizeof b, (uint64_t)i * sizeof b, 3);
        send_all(s[0], b, sizeof b);
    }
    OK(kill(p, SIGKILL));
    reap(p, 128 + SIGKILL);
    ssize_t r;
    while ((r = send(s[0], b, sizeof b, MSG_NOSIGNAL)) > 0)
        ;
    TRUE(r < 0 && (errno == EPIPE || errno == ECONNRESET));
    int t[2];
    tcp_pair(t);
    say(t[0], "x");
    hear(t[1], "x");
}

CASE(fork_killed_while_sending)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        OK(close(s[0]));
        stream_send(s[1], 1ull << 40, 3, 70000);
        _exit(0);
    }
    OK(close(s[1]));
    static unsigned char b[65536], w[65536];
    uint64_t got = 0;
    for (;;) {
        ssize_t r = OK(recv(s[0], b, sizeof b, 0));
        if (r == 0)
            break;
        fill_pattern(w, r, got, 3);
        MEMEQ(b, w, r);
        got += r;
        if (got > (4 << 20) && p) {
            OK(kill(p, SIGKILL));
            reap(p, 128 + SIGKILL);
            p = 0;
        }
    }
    EQ(p, 0);
}

CASE(fork_killed_while_blocked_in_accept)
{
    int l = listener(AF_INET, 4);
    pid_t p = fork_child();
    if (!p) {
        accept(l, NULL, NULL);
        _exit(0);
    }
    nap(20);
    OK(kill(p, SIGKILL));
    reap(p, 128 + SIGKILL);
    int c = connected(l), a = accepted(l);
    say(c, "x");
    hear(a, "x");
}

CASE(fork_double_fork_daemon)
{
    int l = listener(AF_INET, 4);
    pid_t p = fork_child();
    if (!p) {
        OK(setsid());
        pid_t q = fork_child();
        if (q) {
            note_daemon(q);
            _exit(0);
        }
        OK(chdir("/"));
        int n = OK(open("/dev/null", O_RDWR));
        dup2(n, 0);
        dup2(n, 1);
        int a = accepted(l);
        hear(a, "are you there");
        say(a, "yes");
        _exit(0);
    }
    reap(p, 0);
    int c = connected(l);
    OK(close(l));
    say(c, "are you there");
    hear(c, "yes");
    hear_eof(c);
}

CASE(fork_daemon_call)
{
    struct gate g;
    gate_init(&g);
    int l = listener(AF_INET, 4);
    pid_t p = fork_child();
    if (!p) {
        OK(daemon(0, 0));
        note_daemon(getpid());
        int a = accepted(l);
        say(a, "daemon");
        gate_open(&g);
        _exit(0);
    }
    reap(p, 0);
    int c = connected(l);
    hear(c, "daemon");
    gate_wait(&g);
}

CASE(fork_grandchild_uses_socket)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        pid_t q = fork_child();
        if (!q) {
            hear(s[1], "x");
            say(s[1], "y");
            _exit(0);
        }
        reap(q, 0);
        _exit(0);
    }
    say(s[0], "x");
    hear(s[0], "y");
    reap(p, 0);
}

CASE(fork_while_other_thread_transfers)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        OK(close(s[0]));
        stream_recv(s[1], 16 << 20, 2, 60000);
        _exit(0);
    }
    OK(close(s[1]));
    struct { int fd; } a = {s[0]};
    void *send_it(void *x)
    {
        stream_send(*(int *)x, 16 << 20, 2, 60000);
        return NULL;
    }
    pthread_t t = thread(send_it, &a);
    for (int i = 0; i < 30; i++) {
        pid_t q = fork_child();
        if (!q) {
            int v[2];
            if (i % 5 == 0) {
                tcp_pair(v);
                say(v[0], "x");
                hear(v[1], "x");
            }
            _exit(0);
        }
        reap(q, 0);
    }
    join(t);
    reap(p, 0);
}

CASE(fork_process_per_connection)
{
    int l = listener(AF_INET, 16);
    pid_t srv = fork_child();
    if (!srv) {
        for (int i = 0; i < 30; i++) {
            int a = accepted(l);
            pid_t p = fork_child();
            if (!p) {
                OK(close(l));
                char c;
                while (OK(recv(a, &c, 1, 0)) == 1)
                    EQ(send(a, &c, 1, 0), 1);
                _exit(0);
            }
            OK(close(a));
        }
        for (int i = 0; i < 30; i++)
            TRUE(wait(NULL) > 0);
        _exit(0);
    }
    int c[30];
    for (int i = 0; i < 30; i++)
        c[i] = connected(l);
    for (int k = 0; k < 3; k++)
        for (int i = 0; i < 30; i++) {
            say(c[i], "z");
            hear(c[i], "z");
        }
    for (int i = 0; i < 30; i++)
        OK(close(c[i]));
    reap(srv, 0);
}

/* ---------------------------------------------------------------- exec */

/* echo FD: sends back what comes until end of file */
HELPER(echo)
{
    int fd = atoi(argv[0]);
    char b[4096];
    ssize_t r;
    while ((r = read(fd, b, sizeof b)) > 0)
        if (write(fd, b, r) != r)
            return 2;
    return r < 0 ? 3 : 0;
}

/* closed FD: the descriptor must not be open */
HELPER(closed) { return fcntl(atoi(argv[0]), F_GETFD) < 0 && errno == EBADF ? 0 : 9; }

static char *num(int n)
{
    static char b[4][16];
    static int i;
    char *s = b[i++ & 3];
    sprintf(s, "%d", n);
    return s;
}

CASE(exec_inherits_socket)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        OK(close(s[0]));
        exec_self("echo", num(s[1]), NULL);
    }
    OK(close(s[1]));
    say(s[0], "over exec");
    hear(s[0], "over exec");
    OK(shutdown(s[0], SHUT_WR));
    hear_eof(s[0]);
    reap(p, 0);
}

CASE(exec_inherits_unread_data)
{
    int s[2];
    tcp_pair(s);
    say(s[0], "one two");
    wait_bytes(s[1], 7);
    hear(s[1], "one ");
    OK(shutdown(s[0], SHUT_WR));
    pid_t p = fork_child();
    if (!p) {
        OK(close(s[0]));
        exec_self("echo", num(s[1]), NULL);
    }
    OK(close(s[1]));
    hear(s[0], "two");
    hear_eof(s[0]);
    reap(p, 0);
}

/* inspect FD PORT PEER: O_NONBLOCK, TCP_NODELAY and the names are there */
HELPER(inspect)
{
    int fd = atoi(argv[0]);
    EQ(fcntl(fd, F_GETFL), O_RDWR | O_NONBLOCK);
    EQ(getopt_int(fd, IPPROTO_TCP, TCP_NODELAY), 1);
    EQ(getopt_int(fd, SOL_SOCKET, SO_TYPE), SOCK_STREAM);
    EQ(port_of(fd), atoi(argv[1]));
    union addr a;
    peer_of(fd, &a);
    EQ(ntohs(a.in.sin_port), atoi(argv[2]));
    ERR(recv(fd, &(char){0}, 1, 0), EAGAIN);
    return 0;
}

CASE(exec_keeps_state_and_options)
{
    int s[2];
    tcp_pair(s);
    set_nonblock(s[1], 1);
    setopt_int(s[1], IPPROTO_TCP, TCP_NODELAY, 1);
    int port = port_of(s[1]), peer = port_of(s[0]);
    pid_t p = fork_child();
    if (!p)
        exec_self("inspect", num(s[1]), num(port), num(peer), NULL);
    reap(p, 0);
    say(s[0], "x");
    hear(s[1], "x");
}

CASE(exec_cloexec_is_closed)
{
    int l = listener(AF_INET, 4), c = connected(l);
    int a = OK(accept4(l, NULL, NULL, SOCK_CLOEXEC));
    pid_t p = fork_child();
    if (!p)
        exec_self("closed", num(a), NULL);
    reap(p, 0);
    say(c, "x");
    hear(a, "x");
}

/* wait FD: until something comes there */
HELPER(wait)
{
    char c;
    return read(atoi(argv[0]), &c, 1) == 1 ? 0 : 4;
}

CASE(exec_cloexec_peer_sees_eof)
{
    int l = listener(AF_INET, 4), c = connected(l);
    int a = OK(accept4(l, NULL, NULL, SOCK_CLOEXEC));
    struct gate g;
    gate_init(&g);
    pid_t p = fork_child();
    if (!p) {
        OK(close(c));
        OK(close(l));
        exec_self("wait", num(g.fd[0]), NULL);
    }
    OK(close(a));
    hear_eof(c); /* at the exec: the program is still there */
    EQ(waitpid(p, NULL, WNOHANG), 0);
    gate_open(&g);
    reap(p, 0);
}

/* serve FD N: accepts N connections, greets each */
HELPER(serve)
{
    int l = atoi(argv[0]);
    for (int i = 0; i < atoi(argv[1]); i++) {
        int a = accepted(l);
        say(a, "served");
        OK(close(a));
    }
    return 0;
}

CASE(exec_inherits_listener)
{
    int l = listener(AF_INET, 8);
    pid_t p = fork_child();
    if (!p)
        exec_self("serve", num(l), "3", NULL);
    for (int i = 0; i < 3; i++) {
        int c = connected(l);
        hear(c, "served");
        hear_eof(c);
    }
    reap(p, 0);
}

CASE(exec_inherits_queued_connections)
{
    int l = listener(AF_INET, 8), c[3];
    for (int i = 0; i < 3; i++)
        c[i] = connected(l);
    pid_t p = fork_child();
    if (!p)
        exec_self("serve", num(l), "3", NULL);
    OK(close(l));
    for (int i = 0; i < 3; i++)
        hear(c[i], "served");
    reap(p, 0);
}

/* again N FD: executes itself N times, then echoes */
HELPER(again)
{
    int n = atoi(argv[0]);
    if (n == 0) {
        char *a[] = {argv[1], NULL};
        return helper_echo(1, a);
    }
    exec_self("again", num(n - 1), argv[1], NULL);
}

CASE(exec_ten_times)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        OK(close(s[0]));
        exec_self("again", "10", num(s[1]), NULL);
    }
    OK(close(s[1]));
    say(s[0], "still here");
    hear(s[0], "still here");
    OK(close(s[0]));
    reap(p, 0);
}

/* fresh: a new program makes sockets of its own */
HELPER(fresh)
{
    int s[2];
    tcp_pair(s);
    say(s[0], "x");
    hear(s[1], "x");
    return 0;
}

CASE(exec_new_program_makes_sockets)
{
    pid_t p = fork_child();
    if (!p)
        exec_self("fresh", NULL);
    reap(p, 0);
}

CASE(exec_replaces_process_with_sockets_open)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        /* many of its own, all without close-on-exec */
        int v[2];
        for (int i = 0; i < 10; i++)
            tcp_pair(v);
        OK(close(s[0]));
        exec_self("echo", num(s[1]), NULL);
    }
    OK(close(s[1]));
    say(s[0], "x");
    hear(s[0], "x");
    OK(close(s[0]));
    reap(p, 0);
}

CASE(exec_failed_leaves_sockets)
{
    int s[2];
    tcp_pair(s);
    char *argv[] = {"none", NULL};
    ERR(execv("/nonexistent/program", argv), ENOENT);
    say(s[0], "x");
    hear(s[1], "x");
}

CASE(exec_from_thread)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        OK(close(s[0]));
        void *go(void *x) { exec_self("echo", num(*(int *)x), NULL); }
        join(thread(go, &s[1]));
        _exit(1);
    }
    OK(close(s[1]));
    say(s[0], "x");
    hear(s[0], "x");
    OK(close(s[0]));
    reap(p, 0);
}

CASE(exec_socket_as_stdin_and_stdout_of_cat)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        dup2(s[1], 0);
        dup2(s[1], 1);
        OK(close_range(3, ~0u, 0));
        execlp("cat", "cat", NULL);
        _exit(1);
    }
    OK(close(s[1]));
    say(s[0], "through cat");
    hear(s[0], "through cat");
    OK(shutdown(s[0], SHUT_WR));
    hear_eof(s[0]);
    reap(p, 0);
}

CASE(exec_shell_writes_to_socket)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        dup2(s[1], 1);
        OK(close_range(3, ~0u, 0));
        execl("/bin/sh", "sh", "-c", "echo one; echo two; exec echo three", NULL);
        _exit(1);
    }
    OK(close(s[1]));
    hear(s[0], "one\ntwo\nthree\n");
    hear_eof(s[0]);
    reap(p, 0);
}

CASE(exec_shell_reads_from_socket)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        dup2(s[1], 0);
        dup2(s[1], 1);
        OK(close_range(3, ~0u, 0));
        execl("/bin/sh", "sh", "-c", "read a; read b; echo $b $a", NULL);
        _exit(1);
    }
    OK(close(s[1]));
    say(s[0], "first\nsecond\n");
    hear(s[0], "second first\n");
    hear_eof(s[0]);
    reap(p, 0);
}

CASE(exec_system_with_socket_as_stdout)
{
    int s[2], keep = OK(fcntl(1, F_DUPFD_CLOEXEC, 10));
    tcp_pair(s);
    OK(dup2(s[1], 1));
    EQ(system("printf abc; printf def | cat"), 0);
    OK(dup2(keep, 1));
    OK(close(s[1]));
    hear(s[0], "abcdef");
    hear_eof(s[0]);
}

CASE(exec_popen_beside_sockets)
{
    int s[2];
    char b[16];
    tcp_pair(s);
    FILE *f = popen("echo popen", "r");
    TRUE(f);
    TRUE(fgets(b, sizeof b, f));
    EQ(pclose(f), 0);
    say(s[0], b);
    hear(s[1], "popen\n");
}

CASE(exec_popen_reads_the_socket)
{
    int s[2];
    char b[16];
    tcp_pair(s);
    say(s[0], "data\n");
    OK(close(s[0]));
    OK(dup2(s[1], 9));
    FILE *f = popen("cat <&9", "r");
    TRUE(f);
    TRUE(fgets(b, sizeof b, f));
    TRUE(!strcmp(b, "data\n"));
    EQ(pclose(f), 0);
}

CASE(spawn_with_dup2_and_parent_closing)
{
    int s[2];
    pid_t p;
    tcp_pair(s);
    OK(fcntl(s[0], F_SETFD, FD_CLOEXEC));
    OK(fcntl(s[1], F_SETFD, FD_CLOEXEC));
    posix_spawn_file_actions_t fa;
    posix_spawn_file_actions_init(&fa);
    EQ(posix_spawn_file_actions_adddup2(&fa, s[1], 0), 0);
    EQ(posix_spawn_file_actions_adddup2(&fa, s[1], 1), 0);
    char *argv[] = {"cat", NULL};
    EQ(posix_spawnp(&p, "cat", &fa, NULL, argv, environ), 0);
    OK(close(s[1]));
    say(s[0], "spawned");
    hear(s[0], "spawned");
    OK(shutdown(s[0], SHUT_WR));
    hear_eof(s[0]);
    reap(p, 0);
}

CASE(spawn_self_on_another_number)
{
    int s[2];
    pid_t p;
    tcp_pair(s);
    OK(fcntl(s[0], F_SETFD, FD_CLOEXEC));
    OK(fcntl(s[1], F_SETFD, FD_CLOEXEC));
    posix_spawn_file_actions_t fa;
    posix_spawn_file_actions_init(&fa);
    EQ(posix_spawn_file_actions_adddup2(&fa, s[1], 50), 0);
    char *argv[] = {"socktest", "helper", "echo", "50", NULL};
    EQ(posix_spawn(&p, "/proc/self/exe", &fa, NULL, argv, environ), 0);
    OK(close(s[1]));
    say(s[0], "fifty");
    hear(s[0], "fifty");
    OK(close(s[0]));
    reap(p, 0);
}

CASE(spawn_addclose)
{
    int s[2];
    pid_t p;
    tcp_pair(s);
    posix_spawn_file_actions_t fa;
    posix_spawn_file_actions_init(&fa);
    EQ(posix_spawn_file_actions_addclose(&fa, s[1]), 0);
    char *argv[] = {"socktest", "helper", "closed", num(s[1]), NULL};
    EQ(posix_spawn(&p, "/proc/self/exe", &fa, NULL, argv, environ), 0);
    reap(p, 0);
    say(s[0], "x");
    hear(s[1], "x");
}

CASE(spawn_many)
{
    int s[2];
    tcp_pair(s);
    for (int i = 0; i < 20; i++) {
        pid_t p;
        char *argv[] = {"true", NULL};
        EQ(posix_spawnp(&p, "true", NULL, NULL, argv, environ), 0);
        reap(p, 0);
        say(s[0], "x");
        hear(s[1], "x");
    }
}

CASE(vfork_exec)
{
    int s[2];
    tcp_pair(s);
    char *n = num(s[1]);
    char *argv[] = {"socktest", "helper", "echo", n, NULL};
    OK(fcntl(s[0], F_SETFD, FD_CLOEXEC));
    pid_t p = vfork();
    if (p == 0) {
        execv("/proc/self/exe", argv);
        _exit(96);
    }
    OK(p);
    OK(close(s[1]));
    say(s[0], "vfork");
    hear(s[0], "vfork");
    OK(shutdown(s[0], SHUT_WR));
    hear_eof(s[0]);
    reap(p, 0);
}

/* What the child of vfork does to descriptors is not done to the parent's. */
CASE(vfork_child_dup2_and_close)
{
    int s[2];
    tcp_pair(s);
    int a = s[0], b = s[1];
    pid_t p = vfork();
    if (p == 0) {
        dup2(b, 0);
        dup2(b, 1);
        close(a);
        close(b);
        execlp("cat", "cat", NULL);
        _exit(96);
    }
    OK(p);
    OK(fcntl(a, F_GETFD));
    OK(fcntl(b, F_GETFD));
    OK(close(b));
    say(a, "x");
    hear(a, "x");
    OK(shutdown(a, SHUT_WR));
    hear_eof(a);
    reap(p, 0);
}

CASE(vfork_child_exits)
{
    int s[2];
    tcp_pair(s);
    pid_t p = vfork();
    if (p == 0) {
        close(s[0]);
        close(s[1]);
        _exit(7);
    }
    reap(p, 7);
    say(s[0], "x");
    hear(s[1], "x");
}

/* sshd's first process: forked with a connection, no descriptors to come, few system calls left. */
CASE(fork_child_in_a_sandbox)
{
    static const int allowed[] = {
        __NR_read, __NR_write, __NR_close, __NR_poll, __NR_ppoll, __NR_select, __NR_pselect6, __NR_futex,
        __NR_clock_gettime, __NR_gettimeofday, __NR_nanosleep, __NR_clock_nanosleep, __NR_getpid, __NR_gettid,
        __NR_getuid, __NR_getrandom, __NR_brk, __NR_mmap, __NR_munmap, __NR_mremap, __NR_madvise,
        __NR_rt_sigprocmask, __NR_shutdown, __NR_exit, __NR_exit_group,
    };
    enum { N = sizeof allowed / sizeof *allowed };
    int s[2];
    tcp_pair(s);
    pid_t pid = fork_child();
    if (pid == 0) {
        struct sock_filter f[N + 4];
        int n = 0;
        f[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
        for (int i = 0; i < N; i++)
            f[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, allowed[i], N - i, 0);
        f[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
        f[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
        struct sock_fprog prog = {n, f};
        struct rlimit none = {1, 1};
        OK(close(s[0]));
        OK(setrlimit(RLIMIT_NOFILE, &none));
        OK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
        OK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &prog));
        char buf[8];
        for (int i = 0; i < 100; i++) {
            struct pollfd p = {s[1], POLLIN, 0};
            if (i & 1)
                while (poll(&p, 1, -1) != 1)
                    ;
            if (read(s[1], buf, 4) != 4 || write(s[1], buf, 4) != 4)
                _exit(1);
        }
        _exit(read(s[1], buf, 1) == 0 ? 0 : 2);
    }
    OK(close(s[1]));
    for (int i = 0; i < 100; i++) {
        if (i % 10 == 9)
            usleep(5000);
        say(s[0], "ping");
        hear(s[0], "ping");
    }
    OK(shutdown(s[0], SHUT_WR));
    reap(pid, 0);
    hear_eof(s[0]);
}

/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* SCM_RIGHTS over a Unix socket. */
#include "socktest.h"

static void send_fds(int ux, const int *fds, int n, const char *with)
{
    char cb[CMSG_SPACE(sizeof(int) * 8)];
    memset(cb, 0, sizeof cb);
    struct iovec v = {(char *)with, strlen(with)};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = cb,
                       .msg_controllen = CMSG_SPACE(sizeof(int) * n)};
    struct cmsghdr *c = CMSG_FIRSTHDR(&m);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int) * n);
    memcpy(CMSG_DATA(c), fds, sizeof(int) * n);
    EQ(sendmsg(ux, &m, 0), strlen(with));
}

static void recv_fds(int ux, int *fds, int n, int flags)
{
    char cb[CMSG_SPACE(sizeof(int) * 8)], b[16];
    struct iovec v = {b, 1};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = cb,
                       .msg_controllen = sizeof cb};
    EQ(recvmsg(ux, &m, flags), 1);
    struct cmsghdr *c = CMSG_FIRSTHDR(&m);
    TRUE(c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS);
    EQ(c->cmsg_len, CMSG_LEN(sizeof(int) * n));
    memcpy(fds, CMSG_DATA(c), sizeof(int) * n);
}

static void ux_pair(int x[2]) { OK(socketpair(AF_UNIX, SOCK_STREAM, 0, x)); }

CASE(fdpass_connected_to_child)
{
    int x[2], s[2];
    ux_pair(x);
    pid_t p = fork_child();
    if (!p) { /* forked before the socket was there */
        int fd;
        OK(close(x[0]));
        recv_fds(x[1], &fd, 1, 0);
        hear(fd, "to child");
        say(fd, "from child");
        _exit(0);
    }
    tcp_pair(s);
    send_fds(x[0], &s[1], 1, "f");
    say(s[0], "to child");
    hear(s[0], "from child");
    reap(p, 0);
    say(s[1], "mine too");
    hear(s[0], "mine too");
}

CASE(fdpass_sender_closes_before_it_is_received)
{
    int x[2], s[2];
    ux_pair(x);
    struct gate g;
    gate_init(&g);
    pid_t p = fork_child();
    if (!p) {
        int fd;
        gate_wait(&g);
        recv_fds(x[1], &fd, 1, 0);
        hear(fd, "in flight");
        say(fd, "landed");
        _exit(0);
    }
    tcp_pair(s);
    say(s[0], "in flight");
    send_fds(x[0], &s[1], 1, "f");
    OK(close(s[1]));
    EV(poll_ms(s[0], POLLIN | POLLRDHUP, 30), 0);
    gate_open(&g);
    hear(s[0], "landed");
    hear_eof(s[0]);
    reap(p, 0);
}

CASE(fdpass_sender_exits_before_it_is_received)
{
    int x[2], fd;
    ux_pair(x);
    int l = listener(AF_INET, 4);
    pid_t p = fork_child();
    if (!p) {
        int a = accepted(l);
        send_fds(x[0], &a, 1, "f");
        _exit(0);
    }
    int c = connected(l);
    reap(p, 0);
    say(c, "x");
    recv_fds(x[1], &fd, 1, 0);
    hear(fd, "x");
    OK(close(fd));
    hear_eof(c);
}

CASE(fdpass_in_one_process)
{
    int x[2], s[2], fd;
    ux_pair(x);
    tcp_pair(s);
    send_fds(x[0], &s[1], 1, "f");
    recv_fds(x[1], &fd, 1, 0);
    TRUE(fd != s[1]);
    say(s[0], "a");
    hear(fd, "a");
    OK(close(s[1]));
    say(s[0], "b");
    hear(fd, "b");
    OK(close(fd));
    hear_eof(s[0]);
}

CASE(fdpass_in_one_process_closed_in_flight)
{
    int x[2], s[2], fd;
    ux_pair(x);
    tcp_pair(s);
    send_fds(x[0], &s[1], 1, "f");
    OK(close(s[1]));
    recv_fds(x[1], &fd, 1, 0);
    say(s[0], "b");
    hear(fd, "b");
    union addr a, b;
    peer_of(fd, &a);
    name_of(s[0], &b);
    TRUE(same_addr(&a, &b));
}

CASE(fdpass_never_received_is_closed)
{
    int x[2], s[2];
    ux_pair(x);
    tcp_pair(s);
    send_fds(x[0], &s[1], 1, "f");
    OK(close(s[1]));
    EV(poll_ms(s[0], POLLIN | POLLRDHUP, 20), 0);
    OK(close(x[0]));
    OK(close(x[1]));
    hear_eof(s[0]);
}

CASE(fdpass_cmsg_cloexec)
{
    int x[2], s[2], fd;
    ux_pair(x);
    tcp_pair(s);
    send_fds(x[0], &s[1], 1, "f");
    recv_fds(x[1], &fd, 1, MSG_CMSG_CLOEXEC);
    EQ(fcntl(fd, F_GETFD), FD_CLOEXEC);
    say(s[0], "x");
    hear(fd, "x");
}

CASE(fdpass_listener_to_child)
{
    int x[2];
    ux_pair(x);
    pid_t p = fork_child();
    if (!p) {
        int l;
        recv_fds(x[1], &l, 1, 0);
        EQ(getopt_int(l, SOL_SOCKET, SO_ACCEPTCONN), 1);
        for (int i = 0; i < 3; i++) {
            int a = accepted(l);
            say(a, "child");
            OK(close(a));
        }
        _exit(0);
    }
    int l = listener(AF_INET, 4);
    union addr a;
    socklen_t n = name_of(l, &a);
    send_fds(x[0], &l, 1, "f");
    OK(close(l));
    for (int i = 0; i < 3; i++) {
        int c = OK(socket(AF_INET, SOCK_STREAM, 0));
        OK(connect(c, &a.sa, n));
        hear(c, "child");
        OK(close(c));
    }
    reap(p, 0);
}

CASE(fdpass_accepted_connections_to_workers)
{
    int x[2][2], l = listener(AF_INET, 32);
    pid_t p[2];
    for (int i = 0; i < 2; i++) {
        ux_pair(x[i]);
        if (!(p[i] = fork_child())) {
            for (int k = 0; k < 10; k++) {
                int fd;
                recv_fds(x[i][1], &fd, 1, 0);
                hear(fd, "ask");
                say(fd, "answer");
                OK(close(fd));
            }
            _exit(0);
        }
    }
    for (int k = 0; k < 20; k++) {
        int c = connected(l), a = accepted(l);
        send_fds(x[k & 1][0], &a, 1, "f");
        OK(close(a));
        say(c, "ask");
        hear(c, "answer");
        hear_eof(c);
        OK(close(c));
    }
    reap(p[0], 0);
    reap(p[1], 0);
}

CASE(fdpass_several_mixed)
{
    int x[2], s[2], q[2], u[2], got[4];
    ux_pair(x);
    tcp_pair(s);
    udp_pair(AF_INET, u);
    OK(pipe(q));
    int fds[4] = {s[0], q[0], s[1], u[1]};
    send_fds(x[0], fds, 4, "f");
    for (int i = 0; i < 4; i++)
        OK(close(fds[i]));
    recv_fds(x[1], got, 4, 0);
    say(got[0], "x");
    hear(got[2], "x");
    EQ(write(q[1], "p", 1), 1);
    char b[4];
    EQ(read(got[1], b, 4), 1);
    say(u[0], "u");
    hear(got[3], "u");
}

CASE(fdpass_same_socket_twice)
{
    int x[2], s[2], got[2];
    ux_pair(x);
    tcp_pair(s);
    int fds[2] = {s[1], s[1]};
    send_fds(x[0], fds, 2, "f");
    OK(close(s[1]));
    recv_fds(x[1], got, 2, 0);
    TRUE(got[0] != got[1]);
    OK(close(got[0]));
    say(s[0], "x");
    hear(got[1], "x");
    OK(close(got[1]));
    hear_eof(s[0]);
}

CASE(fdpass_with_unread_data_and_nonblock)
{
    int x[2], s[2], fd;
    ux_pair(x);
    tcp_pair(s);
    say(s[0], "abcd");
    wait_bytes(s[1], 4);
    hear(s[1], "ab");
    set_nonblock(s[1], 1);
    pid_t p = fork_child();
    if (!p) {
        OK(close(s[0]));
        OK(close(s[1]));
        recv_fds(x[1], &fd, 1, 0);
        EQ(fcntl(fd, F_GETFL), O_RDWR | O_NONBLOCK);
        hear(fd, "cd");
        ERR(recv(fd, &(char){0}, 1, 0), EAGAIN);
        _exit(0);
    }
    send_fds(x[0], &s[1], 1, "f");
    OK(close(s[1]));
    reap(p, 0);
    OK(close(x[0]));
    hear_eof(s[0]);
}

CASE(fdpass_epoll_after_receiving)
{
    int x[2], s[2], fd, e = ep_new();
    ux_pair(x);
    tcp_pair(s);
    send_fds(x[0], &s[1], 1, "f");
    OK(close(s[1]));
    ep_add(e, x[1], EPOLLIN);
    EV(ep_one(e, x[1], 15000), EPOLLIN);
    recv_fds(x[1], &fd, 1, 0);
    ep_add(e, fd, EPOLLIN);
    EV(ep_one(e, fd, 0), 0);
    say(s[0], "x");
    EV(ep_one(e, fd, 15000), EPOLLIN);
}

/* passed FD: receives a descriptor over FD in a new program */
HELPER(passed)
{
    int fd;
    recv_fds(atoi(argv[0]), &fd, 1, 0);
    hear(fd, "to program");
    say(fd, "from program");
    return 0;
}

CASE(fdpass_to_new_program)
{
    int x[2], s[2];
    ux_pair(x);
    OK(fcntl(x[0], F_SETFD, FD_CLOEXEC));
    pid_t p = fork_child();
    if (!p) {
        char n[16];
        sprintf(n, "%d", x[1]);
        exec_self("passed", n, NULL);
    }
    tcp_pair(s);
    send_fds(x[0], &s[1], 1, "f");
    OK(close(s[1]));
    say(s[0], "to program");
    hear(s[0], "from program");
    hear_eof(s[0]);
    reap(p, 0);
}

CASE(fdpass_udp_socket)
{
    int x[2], u[2], fd;
    ux_pair(x);
    udp_pair(AF_INET, u);
    send_fds(x[0], &u[1], 1, "f");
    OK(close(u[1]));
    recv_fds(x[1], &fd, 1, 0);
    say(u[0], "x");
    hear(fd, "x");
}

CASE(fdpass_there_and_back)
{
    int x[2], s[2], fd;
    ux_pair(x);
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        OK(close(s[0]));
        OK(close(s[1]));
        recv_fds(x[1], &fd, 1, 0);
        say(fd, "by child");
        send_fds(x[1], &fd, 1, "f");
        _exit(0);
    }
    send_fds(x[0], &s[1], 1, "f");
    OK(close(s[1]));
    recv_fds(x[0], &fd, 1, 0);
    reap(p, 0);
    hear(s[0], "by child");
    say(fd, "by parent");
    hear(s[0], "by parent");
}

CASE(fdpass_pidfd_getfd_like_proc_open_fails)
{
    /* a socket cannot be opened through /proc, only passed */
    int s[2];
    char n[64];
    tcp_pair(s);
    sprintf(n, "/dev/fd/%d", s[0]);
    ERR(open(n, O_RDWR), ENXIO);
}

/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* One case per bug that users of neighbouring systems reported: named after
 * the system and the number of the report. What needs an engine or a second
 * guest to show is tested elsewhere (see the list at the end). */
#include "socktest.h"

#define SOON 15000

/* an epoll within an epoll never woke */
CASE(peers_nested_epoll_libvma_219)
{
    int s[2], in = ep_new(), out = ep_new();
    tcp_pair(s);
    ep_add(out, in, EPOLLIN);
    ep_add(in, s[1], EPOLLIN); /* added later than the inner one */
    pid_t p = fork_child();
    if (!p) {
        nap(20);
        say(s[0], "x");
        _exit(0);
    }
    EV(ep_one(out, in, SOON), EPOLLIN);
    EV(ep_one(in, s[1], SOON), EPOLLIN);
    hear(s[1], "x");
    EV(ep_one(out, in, 0), 0);
    reap(p, 0);
}

/* EPOLL_CTL_MOD to EPOLLOUT was not reported */
CASE(peers_epoll_ctl_mod_libvma_1037)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[0], EPOLLIN);
    for (int i = 0; i < 50; i++) {
        EV(ep_one(e, s[0], 0), 0);
        ep_mod(e, s[0], EPOLLIN | EPOLLOUT);
        EV(ep_one(e, s[0], SOON), EPOLLOUT);
        ep_mod(e, s[0], EPOLLIN);
    }
    say(s[1], "x");
    EV(ep_one(e, s[0], SOON), EPOLLIN);
}

/* server and client as threads of one process over loopback */
CASE(peers_thread_to_thread_loopback_libvma_1009)
{
    int l = listener(AF_INET, 4);
    void *client(void *a)
    {
        int c = connected(*(int *)a);
        stream_send(c, 4 << 20, 9, 40000);
        hear(c, "thanks");
        OK(close(c));
        return NULL;
    }
    pthread_t t = thread(client, &l);
    int s = accepted(l);
    stream_recv(s, 4 << 20, 9, 40000);
    say(s, "thanks");
    hear_eof(s);
    join(t);
}

/* getsockname said port 0 after bind to port 0 */
CASE(peers_bind_port_zero_libkrun_818)
{
    int s = bound(AF_INET, SOCK_STREAM);
    int before = port_of(s);
    TRUE(before != 0);
    OK(listen(s, 4));
    EQ(port_of(s) == before, 1);
    int c = connected(s), a = accepted(s);
    EQ(port_of(a) == before, 1);
    TRUE(port_of(c) != 0 && port_of(c) != before);
    int u = bound(AF_INET, SOCK_DGRAM);
    TRUE(port_of(u) != 0);
}

/* names of an accepted socket were wrong */
CASE(peers_names_after_accept_libkrun_819)
{
    int l = listener(AF_INET, 8);
    for (int i = 0; i < 5; i++) {
        union addr given, got, want;
        socklen_t n = sizeof given;
        int c = connected(l), a = OK(accept(l, &given.sa, &n));
        peer_of(a, &got);
        name_of(c, &want);
        TRUE(same_addr(&got, &want));
        TRUE(same_addr(&given, &want));
        name_of(a, &got);
        peer_of(c, &want);
        TRUE(same_addr(&got, &want));
        name_of(l, &want);
        TRUE(same_addr(&got, &want));
    }
}

/* SO_REUSEPORT was forced on: two could share a port unasked */
CASE(peers_no_shared_port_unasked_libkrun_860)
{
    int l = listener(AF_INET, 4);
    EQ(getopt_int(l, SOL_SOCKET, SO_REUSEPORT), 0);
    union addr a;
    socklen_t n = name_of(l, &a);
    pid_t p = fork_child();
    if (!p) { /* another process */
        int s = OK(socket(AF_INET, SOCK_STREAM, 0));
        ERR(bind(s, &a.sa, n), EADDRINUSE);
        setopt_int(s, SOL_SOCKET, SO_REUSEPORT, 1);
        ERR(bind(s, &a.sa, n), EADDRINUSE);
        _exit(0);
    }
    reap(p, 0);
}

/* a half-closed idle connection lost its other direction */
CASE(peers_half_closed_and_idle_libkrun_772)
{
    int s[2];
    tcp_pair(s);
    OK(shutdown(s[0], SHUT_WR));
    hear_eof(s[1]);
    nap(2500); /* longer than the retransmission and fin timers of a test */
    say(s[1], "late answer");
    hear(s[0], "late answer");
    OK(close(s[1]));
    hear_eof(s[0]);
}

/* a child's close ended the parent's connection */
CASE(peers_child_closes_parent_goes_on_nanvix_2609)
{
    int s[2], l = listener(AF_INET, 4);
    tcp_pair(s);
    for (int i = 0; i < 3; i++) {
        pid_t p = fork_child();
        if (!p) {
            OK(close(s[0]));
            OK(close(s[1]));
            OK(close(l));
            _exit(0);
        }
        reap(p, 0);
        say(s[0], "x");
        hear(s[1], "x");
        int c = connected(l), a = accepted(l);
        OK(close(c));
        OK(close(a));
    }
}

/* a registration made before connect() was lost */
CASE(peers_epoll_registered_before_connect_unsock_2)
{
    int l = listener(AF_INET, 4), e = ep_new();
    int s = OK(socket(AF_INET, SOCK_STREAM, 0));
    ep_add(e, s, EPOLLIN);
    OK(try_connect(s, l));
    int a = accepted(l);
    EV(ep_one(e, s, 0), 0);
    say(a, "x");
    EV(ep_one(e, s, SOON), EPOLLIN);
    hear(s, "x");
    OK(close(a));
    EV(ep_one(e, s, SOON), EPOLLIN);
}

/* reload under load: old workers finish, new ones accept, none is refused */
CASE(peers_reload_under_load_vpp_3547_fstack_12)
{
    int l = listener(AF_INET, 128), ctl[2];
    pid_t w[2], old[2] = {0, 0};
    OK(pipe(ctl));
    struct gate stop[6][1];
    pid_t load = fork_child();
    if (!load) {
        for (int i = 0; i < 300; i++) {
            int c = connected(l);
            say(c, "get");
            hear(c, "answer");
            hear_eof(c);
            OK(close(c));
        }
        _exit(0);
    }
    for (int gen = 0; gen < 6; gen++) {
        gate_init(stop[gen]);
        for (int i = 0; i < 2; i++)
            if (!(w[i] = fork_child())) {
                int e = ep_new();
                set_nonblock(l, 1);
                ep_add(e, l, EPOLLIN);
                ep_add(e, stop[gen]->fd[0], EPOLLIN);
                for (;;) {
                    struct epoll_event v;
                    EQ(epoll_wait(e, &v, 1, SOON), 1);
                    if (v.data.fd != l)
                        _exit(0); /* gracefully: nothing is open */
                    int a = accept(l, NULL, NULL);
                    if (a < 0) {
                        TRUE(errno == EAGAIN);
                        continue;
                    }
                    hear(a, "get");
                    say(a, "answer");
                    OK(close(a));
                }
            }
        for (int i = 0; i < 2; i++)
            if (old[i]) {
                if (i == 0)
                    gate_open(stop[gen - 1]); /* stays readable: for both */
                reap(old[i], 0);
            }
        old[0] = w[0];
        old[1] = w[1];
        nap(20);
    }
    reap(load, 0);
    gate_open(stop[5]);
    reap(old[0], 0);
    reap(old[1], 0);
}

/* the level was forgotten after a partial read */
CASE(peers_level_trigger_after_partial_read_mtcp_297)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN);
    static char b[10000];
    send_all(s[0], b, sizeof b);
    wait_bytes(s[1], sizeof b);
    for (int left = sizeof b; left; left -= 1000) {
        EV(ep_one(e, s[1], SOON), EPOLLIN);
        recv_all(s[1], b, 1000);
    }
    EV(ep_one(e, s[1], 0), 0);
}

/* only one epoll per descriptor */
CASE(peers_several_epolls_on_one_descriptor_libvma_816)
{
    int s[2], e[5];
    tcp_pair(s);
    for (int i = 0; i < 5; i++) {
        e[i] = ep_new();
        ep_add(e[i], s[1], EPOLLIN);
    }
    say(s[0], "x");
    for (int i = 0; i < 5; i++)
        EV(ep_one(e[i], s[1], SOON), EPOLLIN);
    hear(s[1], "x");
    OK(close(e[2]));
    say(s[0], "y");
    for (int i = 0; i < 5; i++)
        if (i != 2)
            EV(ep_one(e[i], s[1], SOON), EPOLLIN);
}

/* EPOLLHUP did not come after a reset */
CASE(peers_epollhup_after_reset_gvisor_7331)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN | EPOLLRDHUP);
    linger0_close(s[0]);
    wait_all(s[1], POLLERR | POLLHUP);
    EV(ep_one(e, s[1], SOON), EPOLLIN | EPOLLERR | EPOLLHUP | EPOLLRDHUP);
    ERR(recv(s[1], &(char){0}, 1, 0), ECONNRESET);
    EV(ep_one(e, s[1], SOON), EPOLLIN | EPOLLHUP | EPOLLRDHUP);
}

/* accept with SO_REUSEPORT and epoll in several processes */
CASE(peers_reuseport_accept_with_epoll_onload_223)
{
    union addr a;
    socklen_t n = 0;
    int first = OK(socket(AF_INET, SOCK_STREAM, 0));
    setopt_int(first, SOL_SOCKET, SO_REUSEPORT, 1);
    OK(bind(first, &a.sa, loop_addr(AF_INET, 0, &a)));
    n = name_of(first, &a);
    struct gate up, stop;
    gate_init(&up);
    gate_init(&stop);
    pid_t p[3];
    for (int i = 0; i < 3; i++)
        if (!(p[i] = fork_child())) {
            int l = OK(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0)), e = ep_new();
            setopt_int(l, SOL_SOCKET, SO_REUSEPORT, 1);
            OK(bind(l, &a.sa, n));
            OK(listen(l, 64));
            ep_add(e, l, EPOLLIN);
            ep_add(e, stop.fd[0], EPOLLIN);
            gate_open(&up);
            for (;;) {
                struct epoll_event v;
                EQ(epoll_wait(e, &v, 1, SOON), 1);
                if (v.data.fd != l)
                    _exit(0);
                int c = accept(l, NULL, NULL);
                OK(c);
                say(c, "x");
                OK(close(c));
            }
        }
    for (int i = 0; i < 3; i++)
        gate_wait(&up);
    for (int i = 0; i < 60; i++) {
        int c = OK(socket(AF_INET, SOCK_STREAM, 0));
        OK(connect(c, &a.sa, n));
        hear(c, "x");
        hear_eof(c);
        OK(close(c));
    }
    gate_open(&stop);
    for (int i = 0; i < 3; i++)
        reap(p[i], 0);
}

/* recvmsg on an empty queue said 0, which is end of file */
CASE(peers_recv_on_empty_is_eagain_never_zero_vpp)
{
    int s[2], u[2];
    char b[8];
    struct iovec v = {b, 8};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
    tcp_pair(s);
    udp_pair(AF_INET, u);
    set_nonblock(s[1], 1);
    set_nonblock(u[1], 1);
    for (int i = 0; i < 2; i++) {
        int fd = i ? u[1] : s[1];
        ERR(recvmsg(fd, &m, 0), EAGAIN);
        ERR(recv(fd, b, 8, 0), EAGAIN);
        ERR(recv(fd, b, 8, MSG_PEEK), EAGAIN);
        ERR(recvfrom(fd, b, 8, 0, NULL, NULL), EAGAIN);
        ERR(read(fd, b, 8), EAGAIN);
        ERR(readv(fd, &v, 1), EAGAIN);
        struct mmsghdr mm = {.msg_hdr = m};
        ERR(recvmmsg(fd, &mm, 1, 0, NULL), EAGAIN);
    }
    say(s[0], "x");
    wait_ev(s[1], POLLIN);
    hear(s[1], "x");
    ERR(recvmsg(s[1], &m, 0), EAGAIN);
}

/* an unknown option was accepted silently */
CASE(peers_unknown_option_is_enoprotoopt)
{
    int s[2], v = 1;
    socklen_t n = sizeof v;
    tcp_pair(s);
    ERR(setsockopt(s[0], SOL_SOCKET, 30000, &v, n), ENOPROTOOPT);
    ERR(getsockopt(s[0], SOL_SOCKET, 30000, &v, &n), ENOPROTOOPT);
    ERR(setsockopt(s[0], IPPROTO_TCP, 30000, &v, n), ENOPROTOOPT);
    ERR(getsockopt(s[0], IPPROTO_TCP, 30000, &v, &n), ENOPROTOOPT);
}

/* TCP_CONGESTION always said cubic, TCP_INFO was zero */
CASE(peers_tcp_info_and_congestion_are_real_vpp_707)
{
    int s[2];
    char a[32] = "", b[32] = "";
    socklen_t n = sizeof a;
    tcp_pair(s);
    OK(getsockopt(s[0], IPPROTO_TCP, TCP_CONGESTION, a, &n));
    TRUE(a[0]);
    /* reno is in every kernel: what is set is what is told */
    OK(setsockopt(s[0], IPPROTO_TCP, TCP_CONGESTION, "reno", 4));
    n = sizeof b;
    OK(getsockopt(s[0], IPPROTO_TCP, TCP_CONGESTION, b, &n));
    TRUE(!strcmp(b, "reno"));
    stream_send(s[0], 20000, 1, 20000);
    stream_recv(s[1], 20000, 1, 20000);
    struct tcp_info i;
    n = sizeof i;
    OK(getsockopt(s[0], IPPROTO_TCP, TCP_INFO, &i, &n));
    EQ(i.tcpi_state, TCP_ESTABLISHED);
    TRUE(i.tcpi_snd_cwnd > 0 && i.tcpi_rtt > 0 && i.tcpi_snd_mss > 0);
}

/* fork and daemon: the parent leaves, the child serves */
CASE(peers_daemon_on_vpp_3463_libvma_87)
{
    int l = listener(AF_INET, 8), e = ep_new();
    set_nonblock(l, 1);
    ep_add(e, l, EPOLLIN); /* made before the daemon is */
    pid_t p = fork_child();
    if (!p) {
        pid_t q = fork_child();
        if (q) {
            note_daemon(q);
            _exit(0);
        }
        OK(setsid());
        for (int i = 0; i < 5; i++) {
            EV(ep_one(e, l, SOON), EPOLLIN);
            int a = accepted(l);
            say(a, "x");
            OK(close(a));
        }
        _exit(0);
    }
    reap(p, 0);
    for (int i = 0; i < 5; i++) {
        int c = connected(l);
        hear(c, "x");
        hear_eof(c);
        OK(close(c));
    }
}

/* a snapshot child while the parent serves (redis saving) */
CASE(peers_snapshot_child_under_load_vpp)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        char c;
        OK(close(s[1]));
        for (int i = 0; i < 3000; i++) {
            EQ(send(s[0], "q", 1, 0), 1);
            EQ(recv(s[0], &c, 1, 0), 1);
        }
        _exit(0);
    }
    OK(close(s[0]));
    char c;
    pid_t snap = 0;
    for (int i = 0; OK(recv(s[1], &c, 1, 0)) == 1; i++) {
        EQ(send(s[1], "a", 1, 0), 1);
        if (i % 500 == 0) {
            if (snap)
                reap(snap, 0);
            snap = fork_child();
            if (!snap) {
                char *m = malloc(1 << 20); /* its heap works */
                memset(m, 1, 1 << 20);
                free(m);
                exit(0);
            }
        }
    }
    reap(snap, 0);
    reap(p, 0);
}

/* Elsewhere, as they need more than one process tree on one engine: two guests
 * and one port (libkrun 860), an engine that restarts is noticed (Calico/VPP
 * 617), nginx itself reloaded under load. */

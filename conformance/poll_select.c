/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* poll(), ppoll(), select(), pselect(). */
#include "socktest.h"

CASE(poll_connected)
{
    int s[2];
    tcp_pair(s);
    EV(poll_now(s[0], POLLIN | POLLOUT | POLLPRI | POLLRDHUP), POLLOUT);
    EV(poll_now(s[0], POLLIN), 0);
    say(s[1], "x");
    EV(wait_ev(s[0], POLLIN), POLLIN);
    EV(poll_now(s[0], POLLIN | POLLOUT | POLLRDNORM | POLLWRNORM),
       POLLIN | POLLOUT | POLLRDNORM | POLLWRNORM);
    hear(s[0], "x");
    EV(poll_now(s[0], POLLIN), 0);
}

CASE(poll_unconnected)
{
    int s = OK(socket(AF_INET, SOCK_STREAM, 0));
    EV(poll_now(s, POLLIN | POLLOUT | POLLRDHUP), POLLOUT | POLLHUP);
    EV(poll_now(s, 0), POLLHUP);
    int b = bound(AF_INET, SOCK_STREAM);
    EV(poll_now(b, POLLIN | POLLOUT), POLLOUT | POLLHUP);
}

CASE(poll_eof)
{
    int s[2];
    tcp_pair(s);
    OK(shutdown(s[1], SHUT_WR));
    EV(wait_ev(s[0], POLLIN | POLLRDHUP), POLLIN | POLLRDHUP);
    EV(poll_now(s[0], POLLIN | POLLOUT), POLLIN | POLLOUT);
    hear_eof(s[0]);
    EV(poll_now(s[0], POLLIN), POLLIN);
}

CASE(poll_own_shutdown)
{
    int s[2];
    tcp_pair(s);
    OK(shutdown(s[0], SHUT_WR));
    EV(poll_now(s[0], POLLIN | POLLOUT | POLLRDHUP), POLLOUT);
    OK(shutdown(s[0], SHUT_RD));
    EV(poll_now(s[0], POLLIN | POLLOUT | POLLRDHUP),
       POLLIN | POLLOUT | POLLHUP | POLLRDHUP);
}

CASE(poll_full_send_buffer)
{
    int s[2];
    tcp_pair(s);
    size_t n = fill_sndbuf(s[0]);
    EV(poll_now(s[0], POLLOUT), 0);
    char *b = malloc(n);
    recv_all(s[1], b, n);
    EV(wait_ev(s[0], POLLOUT), POLLOUT);
}

CASE(poll_full_send_buffer_and_peer_gone)
{
    int s[2];
    tcp_pair(s);
    fill_sndbuf(s[0]);
    OK(close(s[1])); /* with unread data: reset */
    wait_all(s[0], POLLOUT | POLLERR | POLLHUP);
    EV(poll_now(s[0], POLLIN | POLLOUT), POLLIN | POLLOUT | POLLERR | POLLHUP);
}

CASE(poll_nval)
{
    int s[2];
    tcp_pair(s);
    int n = s[0];
    OK(close(s[0]));
    EV(poll_now(n, POLLIN), POLLNVAL);
    struct pollfd p[2] = {{n, POLLIN, 0}, {s[1], POLLOUT, 0}};
    EQ(poll(p, 2, 0), 2);
    EV(p[0].revents, POLLNVAL);
    EV(p[1].revents, POLLOUT);
}

CASE(poll_negative_is_skipped)
{
    int s[2];
    tcp_pair(s);
    struct pollfd p[3] = {{-1, POLLIN, 77}, {s[0], POLLOUT, 0}, {-5, POLLOUT, 77}};
    EQ(poll(p, 3, 1000), 1);
    EQ(p[0].revents, 0);
    EV(p[1].revents, POLLOUT);
    EQ(p[2].revents, 0);
}

CASE(poll_same_fd_twice)
{
    int s[2];
    tcp_pair(s);
    say(s[1], "x");
    wait_ev(s[0], POLLIN);
    struct pollfd p[2] = {{s[0], POLLIN, 0}, {s[0], POLLOUT, 0}};
    EQ(poll(p, 2, 0), 2);
    EV(p[0].revents, POLLIN);
    EV(p[1].revents, POLLOUT);
}

CASE(poll_timeouts)
{
    int s[2];
    tcp_pair(s);
    struct pollfd p = {s[0], POLLIN, 77};
    EQ(poll(&p, 1, 0), 0);
    EQ(p.revents, 0);
    EQ(poll(&p, 1, 20), 0);
    EQ(poll(NULL, 0, 5), 0);
    struct timespec t = {0, 5000000};
    EQ(ppoll(&p, 1, &t, NULL), 0);
    EQ(ppoll(NULL, 0, &t, NULL), 0);
    t.tv_nsec = 1000000000;
    ERR(ppoll(&p, 1, &t, NULL), EINVAL);
}

CASE(poll_mixed_set)
{
    int s[2], q[2], u[2], x[2], l = listener(AF_INET, 4);
    tcp_pair(s);
    udp_pair(AF_INET, u);
    OK(pipe(q));
    OK(socketpair(AF_UNIX, SOCK_STREAM, 0, x));
    int ev = OK(eventfd(0, 0));
    struct pollfd p[6] = {{s[1], POLLIN, 0}, {q[0], POLLIN, 0}, {u[1], POLLIN, 0},
                          {x[1], POLLIN, 0}, {l, POLLIN, 0}, {ev, POLLIN, 0}};
    EQ(poll(p, 6, 0), 0);
    for (int i = 0; i < 6; i++) {
        uint64_t one = 1;
        switch (i) {
        case 0: say(s[0], "x"); break;
        case 1: EQ(write(q[1], "x", 1), 1); break;
        case 2: say(u[0], "x"); break;
        case 3: say(x[0], "x"); break;
        case 4: connected(l); break;
        case 5: EQ(write(ev, &one, 8), 8); break;
        }
        wait_ev(p[i].fd, POLLIN);
        EQ(poll(p, 6, 15000), i + 1);
        for (int k = 0; k < 6; k++)
            EQ(p[k].revents, k <= i ? POLLIN : 0);
    }
}

CASE(poll_woken_by_socket_in_mixed_set)
{
    int s[2], q[2];
    tcp_pair(s);
    OK(pipe(q));
    pid_t c = fork_child();
    if (!c) {
        nap(20);
        say(s[0], "x");
        nap(20);
        _exit(write(q[1], "x", 1) != 1);
    }
    struct pollfd p[2] = {{q[0], POLLIN, 0}, {s[1], POLLIN, 0}};
    TRUE(poll(p, 2, 15000) >= 1);
    EV(p[1].revents, POLLIN);
    hear(s[1], "x");
    EQ(poll(p, 2, 15000), 1);
    EV(p[0].revents, POLLIN);
    reap(c, 0);
}

CASE(poll_forever_woken_by_close_of_peer)
{
    int s[2];
    tcp_pair(s);
    pid_t c = fork_child();
    if (!c) {
        OK(close(s[1]));
        struct pollfd p = {s[0], POLLRDHUP, 0};
        EQ(poll(&p, 1, -1), 1);
        EV(p.revents, POLLRDHUP);
        _exit(0);
    }
    nap(20);
    OK(close(s[1]));
    reap(c, 0);
}

CASE(poll_many_sockets)
{
    int l = listener(AF_INET, 128), c[100];
    struct pollfd p[100];
    for (int i = 0; i < 100; i++) {
        c[i] = connected(l);
        p[i] = (struct pollfd){accepted(l), POLLIN, 0};
    }
    EQ(poll(p, 100, 0), 0);
    say(c[37], "x");
    EQ(poll(p, 100, 15000), 1);
    EV(p[37].revents, POLLIN);
    for (int i = 0; i < 100; i++)
        if (i != 37)
            say(c[i], "x");
    for (int i = 0; i < 100; i++)
        wait_ev(p[i].fd, POLLIN);
    EQ(poll(p, 100, 0), 100);
}

CASE(poll_interest_zero_sees_reset)
{
    int s[2];
    tcp_pair(s);
    EV(poll_now(s[1], 0), 0);
    linger0_close(s[0]);
    struct pollfd p = {s[1], 0, 0};
    EQ(poll(&p, 1, 15000), 1);
    wait_all(s[1], POLLERR | POLLHUP);
    EV(poll_now(s[1], 0), POLLERR | POLLHUP);
}

CASE(ppoll_mask)
{
    int s[2];
    tcp_pair(s);
    on_signal(SIGUSR1, 0);
    sigset_t block, none;
    sigemptyset(&none);
    sigemptyset(&block);
    sigaddset(&block, SIGUSR1);
    OK(sigprocmask(SIG_BLOCK, &block, NULL));
    OK(raise(SIGUSR1));
    struct pollfd p = {s[1], POLLIN, 0};
    EQ(poll(&p, 1, 0), 0);
    EQ(sig_count, 0);
    ERR(ppoll(&p, 1, NULL, &none), EINTR);
    EQ(sig_count, 1);
}

CASE(select_basic)
{
    int s[2];
    tcp_pair(s);
    fd_set r, w, x;
    struct timeval t = {0, 0};
    int n = (s[0] > s[1] ? s[0] : s[1]) + 1;
#define SETS                                                                   \
    do {                                                                       \
        FD_ZERO(&r);                                                           \
        FD_ZERO(&w);                                                           \
        FD_ZERO(&x);                                                           \
        FD_SET(s[0], &r);                                                      \
        FD_SET(s[0], &w);                                                      \
        FD_SET(s[0], &x);                                                      \
    } while (0)
    SETS;
    EQ(select(n, &r, &w, &x, &t), 1);
    EQ(FD_ISSET(s[0], &w) && !FD_ISSET(s[0], &r) && !FD_ISSET(s[0], &x), 1);
    say(s[1], "x");
    wait_ev(s[0], POLLIN);
    SETS;
    EQ(select(n, &r, &w, &x, NULL), 2);
    EQ(FD_ISSET(s[0], &w) && FD_ISSET(s[0], &r) && !FD_ISSET(s[0], &x), 1);
}

CASE(select_timeout_clears_sets)
{
    int s[2];
    tcp_pair(s);
    fd_set r;
    FD_ZERO(&r);
    FD_SET(s[0], &r);
    struct timeval t = {0, 10000};
    EQ(select(s[0] + 1, &r, NULL, NULL, &t), 0);
    EQ(FD_ISSET(s[0], &r), 0);
    EQ(t.tv_sec == 0 && t.tv_usec == 0, 1); /* Linux writes the rest back */
    t.tv_usec = 1000;
    EQ(select(0, NULL, NULL, NULL, &t), 0);
}

CASE(select_remaining_time_is_written)
{
    int s[2];
    tcp_pair(s);
    say(s[1], "x");
    fd_set r;
    FD_ZERO(&r);
    FD_SET(s[0], &r);
    struct timeval t = {1000, 0};
    EQ(select(s[0] + 1, &r, NULL, NULL, &t), 1);
    EQ(t.tv_sec == 999 || t.tv_sec == 1000 || t.tv_sec > 900, 1);
}

CASE(select_errors)
{
    int s[2];
    tcp_pair(s);
    fd_set r;
    FD_ZERO(&r);
    FD_SET(s[0], &r);
    int n = s[0];
    struct timeval t = {0, 0};
    ERR(select(-1, &r, NULL, NULL, &t), EINVAL);
    t.tv_sec = -1;
    ERR(select(n + 1, &r, NULL, NULL, &t), EINVAL);
    OK(close(n));
    t.tv_sec = 0;
    FD_SET(n, &r);
    ERR(select(n + 1, &r, NULL, NULL, &t), EBADF);
}

CASE(select_mixed)
{
    int s[2], p[2];
    tcp_pair(s);
    OK(pipe(p));
    fd_set r, w;
    int n = 200;
    FD_ZERO(&r);
    FD_SET(s[1], &r);
    FD_SET(p[0], &r);
    struct timeval t = {0, 0};
    EQ(select(n, &r, NULL, NULL, &t), 0);
    pid_t c = fork_child();
    if (!c) {
        nap(20);
        say(s[0], "x");
        _exit(0);
    }
    FD_SET(s[1], &r);
    FD_SET(p[0], &r);
    EQ(select(n, &r, NULL, NULL, NULL), 1);
    EQ(!!FD_ISSET(s[1], &r), 1);
    EQ(write(p[1], "x", 1), 1);
    FD_ZERO(&w);
    FD_SET(p[1], &w);
    FD_SET(s[1], &w);
    FD_SET(p[0], &r);
    EQ(select(n, &r, &w, NULL, NULL), 4);
    reap(c, 0);
}

CASE(select_eof_and_reset)
{
    int s[2], u[2];
    tcp_pair(s);
    tcp_pair(u);
    OK(shutdown(s[0], SHUT_WR));
    linger0_close(u[0]);
    wait_ev(s[1], POLLIN);
    wait_all(u[1], POLLHUP);
    fd_set r, w, x;
    FD_ZERO(&r);
    FD_ZERO(&w);
    FD_ZERO(&x);
    FD_SET(s[1], &r);
    FD_SET(u[1], &r);
    FD_SET(u[1], &w);
    FD_SET(u[1], &x);
    EQ(select(200, &r, &w, &x, NULL), 3);
    EQ(!!FD_ISSET(s[1], &r), 1);
    EQ(!!FD_ISSET(u[1], &r), 1);
    EQ(!!FD_ISSET(u[1], &w), 1);
    EQ(!!FD_ISSET(u[1], &x), 0);
}

CASE(select_connect_completion)
{
    int l = listener(AF_INET, 4), s = OK(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
    ERR(try_connect(s, l), EINPROGRESS);
    fd_set r, w;
    FD_ZERO(&r);
    FD_ZERO(&w);
    FD_SET(s, &w);
    FD_SET(s, &r);
    struct timeval t = {15, 0};
    EQ(select(s + 1, &r, &w, NULL, &t), 1);
    EQ(!!FD_ISSET(s, &w), 1);
    EQ(!!FD_ISSET(s, &r), 0);
}

CASE(select_high_descriptor)
{
    int s[2];
    tcp_pair(s);
    OK(dup2(s[1], 1023));
    say(s[0], "x");
    fd_set r;
    FD_ZERO(&r);
    FD_SET(1023, &r);
    EQ(select(1024, &r, NULL, NULL, NULL), 1);
    EQ(!!FD_ISSET(1023, &r), 1);
}

CASE(pselect_mask)
{
    int s[2];
    tcp_pair(s);
    on_signal(SIGUSR1, 0);
    sigset_t block, none;
    sigemptyset(&none);
    sigemptyset(&block);
    sigaddset(&block, SIGUSR1);
    OK(sigprocmask(SIG_BLOCK, &block, NULL));
    OK(raise(SIGUSR1));
    fd_set r;
    FD_ZERO(&r);
    FD_SET(s[1], &r);
    struct timespec t = {0, 0};
    EQ(pselect(s[1] + 1, &r, NULL, NULL, &t, NULL), 0);
    FD_SET(s[1], &r);
    ERR(pselect(s[1] + 1, &r, NULL, NULL, NULL, &none), EINTR);
    EQ(sig_count, 1);
    say(s[0], "x");
    FD_ZERO(&r);
    FD_SET(s[1], &r);
    t.tv_sec = 15;
    EQ(pselect(s[1] + 1, &r, NULL, NULL, &t, &block), 1);
    EQ(t.tv_sec, 15); /* pselect leaves it alone */
}

/* A thread that polls a socket twice (ssh: in and out are one), while another waits to write. */
static void *poll_twice(void *a)
{
    int fd = *(int *)a;
    struct pollfd p[2] = {{fd, POLLIN, 0}, {fd, POLLIN, 0}};
    EQ(poll(p, 2, -1), 2);
    return NULL;
}

CASE(poll_socket_twice)
{
    int s[2];
    tcp_pair(s);
    for (int i = 0; i < 50; i++) {
        pthread_t t = thread(poll_twice, &s[1]);
        if (i % 2)
            usleep(2000);
        say(s[0], "x");
        OK(-pthread_join(t, NULL));
        hear(s[1], "x");
    }
}

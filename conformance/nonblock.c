/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Non-blocking sockets. */
#include "socktest.h"

CASE(nonblock_recv_empty)
{
    int s[2];
    char b[4];
    tcp_pair(s);
    set_nonblock(s[1], 1);
    ERR(recv(s[1], b, 4, 0), EAGAIN);
    ERR(read(s[1], b, 4), EAGAIN);
    struct iovec v = {b, 4};
    ERR(readv(s[1], &v, 1), EAGAIN);
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
    ERR(recvmsg(s[1], &m, 0), EAGAIN);
    ERR(recvfrom(s[1], b, 4, 0, NULL, NULL), EAGAIN);
    say(s[0], "x");
    wait_ev(s[1], POLLIN);
    hear(s[1], "x");
    ERR(recv(s[1], b, 4, 0), EAGAIN);
    OK(close(s[0]));
    wait_ev(s[1], POLLIN);
    EQ(recv(s[1], b, 4, 0), 0);
}

CASE(nonblock_dontwait_does_not_stick)
{
    int s[2];
    char b[4];
    tcp_pair(s);
    ERR(recv(s[1], b, 4, MSG_DONTWAIT), EAGAIN);
    EQ(fcntl(s[1], F_GETFL), O_RDWR);
    pid_t p = fork_child();
    if (!p) {
        nap(20);
        say(s[0], "x");
        _exit(0);
    }
    hear(s[1], "x");
    reap(p, 0);
}

CASE(nonblock_send_until_full)
{
    int s[2];
    tcp_pair(s);
    set_nonblock(s[0], 1);
    size_t n = fill_sndbuf(s[0]);
    ERR(send(s[0], "x", 1, MSG_NOSIGNAL), EAGAIN);
    ERR(write(s[0], "x", 1), EAGAIN);
    EV(poll_now(s[0], POLLOUT), 0);
    char *b = malloc(n);
    recv_all(s[1], b, n);
    EV(wait_ev(s[0], POLLOUT), POLLOUT);
    say(s[0], "x");
    hear(s[1], "x");
}

CASE(nonblock_send_is_partial)
{
    int s[2];
    size_t n = 64 << 20;
    char *b = calloc(1, n);
    tcp_pair(s);
    set_nonblock(s[0], 1);
    ssize_t r = send(s[0], b, n, 0);
    TRUE(r > 0 && (size_t)r < n);
    recv_all(s[1], b, r);
    ERR(recv(s[1], b, 1, MSG_DONTWAIT), EAGAIN);
}

CASE(nonblock_transfer_with_poll)
{
    int s[2];
    tcp_pair(s);
    set_nonblock(s[0], 1);
    set_nonblock(s[1], 1);
    uint64_t n = 8 << 20, at = 0, got = 0, st = 99;
    static unsigned char b[1 << 16], w[1 << 16];
    while (got < n) {
        struct pollfd p[2] = {{s[0], at < n ? POLLOUT : 0, 0}, {s[1], POLLIN, 0}};
        TRUE(poll(p, 2, 15000) > 0);
        if (p[0].revents & POLLOUT) {
            size_t c = 1 + rnd(&st) % sizeof b;
            if (c > n - at)
                c = n - at;
            fill_pattern(b, c, at, 5);
            ssize_t r = send(s[0], b, c, 0);
            if (r < 0)
                TRUE(errno == EAGAIN);
            else
                at += r;
        }
        if (p[1].revents & POLLIN) {
            ssize_t r = OK(recv(s[1], b, 1 + rnd(&st) % sizeof b, 0));
            fill_pattern(w, r, got, 5);
            MEMEQ(b, w, r);
            got += r;
        }
    }
    ERR(recv(s[1], b, 1, 0), EAGAIN);
}

CASE(nonblock_transfer_with_epoll_et)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    set_nonblock(s[0], 1);
    set_nonblock(s[1], 1);
    ep_add(e, s[0], EPOLLOUT | EPOLLET);
    ep_add(e, s[1], EPOLLIN | EPOLLET);
    uint64_t n = 16 << 20, at = 0, got = 0, st = 99;
    static unsigned char b[1 << 16], w[1 << 16];
    while (got < n) {
        struct epoll_event v[2];
        int k = OK(epoll_wait(e, v, 2, 15000));
        TRUE(k > 0);
        for (int i = 0; i < k; i++) {
            if (v[i].events & EPOLLOUT)
                while (at < n) {
                    size_t c = 1 + rnd(&st) % sizeof b;
                    if (c > n - at)
                        c = n - at;
                    fill_pattern(b, c, at, 5);
                    ssize_t r = send(s[0], b, c, 0);
                    if (r < 0) {
                        TRUE(errno == EAGAIN);
                        break;
                    }
                    at += r;
                }
            if (v[i].events & EPOLLIN)
                for (;;) {
                    ssize_t r = recv(s[1], b, 1 + rnd(&st) % sizeof b, 0);
                    if (r < 0) {
                        TRUE(errno == EAGAIN);
                        break;
                    }
                    TRUE(r > 0);
                    fill_pattern(w, r, got, 5);
                    MEMEQ(b, w, r);
                    got += r;
                }
        }
    }
}

CASE(nonblock_set_on_listener_and_accepted_blocks)
{
    int l = listener(AF_INET, 4);
    set_nonblock(l, 1);
    int c = connected(l);
    wait_ev(l, POLLIN);
    int a = accepted(l);
    pid_t p = fork_child();
    if (!p) {
        nap(20);
        say(c, "x");
        _exit(0);
    }
    hear(a, "x"); /* blocks */
    reap(p, 0);
}

CASE(nonblock_many_connects_at_once)
{
    int l = listener(AF_INET, 128), e = ep_new(), ready = 0;
    for (int i = 0; i < 100; i++) {
        int c = OK(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
        if (try_connect(c, l) < 0)
            TRUE(errno == EINPROGRESS);
        ep_add(e, c, EPOLLOUT | EPOLLONESHOT);
    }
    while (ready < 100) {
        struct epoll_event v[16];
        int n = OK(epoll_wait(e, v, 16, 15000));
        TRUE(n > 0);
        for (int i = 0; i < n; i++) {
            EQ(v[i].events, EPOLLOUT);
            EQ(getopt_int(v[i].data.fd, SOL_SOCKET, SO_ERROR), 0);
        }
        ready += n;
    }
    for (int i = 0; i < 100; i++)
        accepted(l);
    set_nonblock(l, 1);
    ERR(accept(l, NULL, NULL), EAGAIN);
}

CASE(nonblock_toggle_while_connected)
{
    int s[2];
    char b[4];
    tcp_pair(s);
    for (int i = 0; i < 50; i++) {
        set_nonblock(s[1], 1);
        if (i == 0)
            ERR(recv(s[1], b, 4, 0), EAGAIN);
        set_nonblock(s[1], 0);
        say(s[0], "x");
        hear(s[1], "x");
    }
}

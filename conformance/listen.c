/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* bind(), listen(), accept(). */
#include "socktest.h"

CASE(accept_fifo_order)
{
    int l = listener(AF_INET, 32), c[10];
    for (int i = 0; i < 10; i++)
        c[i] = connected(l);
    for (int i = 0; i < 10; i++) {
        int a = accepted(l);
        union addr p, q;
        peer_of(a, &p);
        name_of(c[i], &q);
        TRUE(same_addr(&p, &q));
    }
}

CASE(accept_gives_peer_name)
{
    int l = listener(AF_INET, 4), c = connected(l);
    union addr a, b;
    socklen_t n = sizeof a;
    OK(accept(l, &a.sa, &n));
    EQ(n, sizeof a.in);
    name_of(c, &b);
    TRUE(same_addr(&a, &b));
}

CASE(accept_name_is_truncated)
{
    int l = listener(AF_INET, 4);
    connected(l);
    union addr a;
    memset(&a, 0xee, sizeof a);
    socklen_t n = 6;
    OK(accept(l, &a.sa, &n));
    EQ(n, sizeof a.in);
    EQ(((unsigned char *)&a)[6], 0xee);
}

CASE(accept_does_not_inherit_flags)
{
    int l = listener(AF_INET, 4);
    OK(fcntl(l, F_SETFL, O_NONBLOCK));
    OK(fcntl(l, F_SETFD, FD_CLOEXEC));
    connected(l);
    wait_ev(l, POLLIN);
    int a = accepted(l);
    EQ(fcntl(a, F_GETFL), O_RDWR);
    EQ(fcntl(a, F_GETFD), 0);
}

CASE(accept4_flags)
{
    int l = listener(AF_INET, 4);
    connected(l);
    connected(l);
    connected(l);
    int a = OK(accept4(l, NULL, NULL, SOCK_NONBLOCK));
    EQ(fcntl(a, F_GETFL), O_RDWR | O_NONBLOCK);
    EQ(fcntl(a, F_GETFD), 0);
    ERR(recv(a, &(char){0}, 1, 0), EAGAIN);
    a = OK(accept4(l, NULL, NULL, SOCK_CLOEXEC));
    EQ(fcntl(a, F_GETFL), O_RDWR);
    EQ(fcntl(a, F_GETFD), FD_CLOEXEC);
    a = OK(accept4(l, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK));
    EQ(fcntl(a, F_GETFL), O_RDWR | O_NONBLOCK);
    EQ(fcntl(a, F_GETFD), FD_CLOEXEC);
}

CASE(accept4_bad_flags)
{
    int l = listener(AF_INET, 4);
    connected(l);
    ERR(accept4(l, NULL, NULL, 1), EINVAL);
    accepted(l);
}

CASE(accept_nonblocking_eagain)
{
    int l = listener(AF_INET, 4);
    set_nonblock(l, 1);
    ERR(accept(l, NULL, NULL), EAGAIN);
    int c = connected(l);
    EV(wait_ev(l, POLLIN | POLLOUT), POLLIN);
    accepted(l);
    ERR(accept(l, NULL, NULL), EAGAIN);
    EV(poll_now(l, POLLIN | POLLOUT), 0);
    OK(c);
}

CASE(accept_rcvtimeo)
{
    int l = listener(AF_INET, 4);
    struct timeval tv = {0, 30000};
    OK(setsockopt(l, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv));
    ERR(accept(l, NULL, NULL), EAGAIN);
    connected(l);
    accepted(l);
}

CASE(accept_errors)
{
    int s = OK(socket(AF_INET, SOCK_STREAM, 0)), u = bound(AF_INET, SOCK_DGRAM), p[2];
    OK(pipe(p));
    ERR(accept(s, NULL, NULL), EINVAL);
    ERR(accept(u, NULL, NULL), EOPNOTSUPP);
    ERR(accept(p[0], NULL, NULL), ENOTSOCK);
    ERR(accept(-1, NULL, NULL), EBADF);
    int v[2];
    tcp_pair(v);
    ERR(accept(v[0], NULL, NULL), EINVAL);
    int b = bound(AF_INET, SOCK_STREAM);
    ERR(accept(b, NULL, NULL), EINVAL);
}

CASE(accept_blocks_until_connect)
{
    int l = listener(AF_INET, 4);
    pid_t p = fork_child();
    if (!p) {
        nap(20);
        int c = connected(l);
        hear(c, "x");
        _exit(0);
    }
    int a = accepted(l);
    say(a, "x");
    reap(p, 0);
}

CASE(accept_after_client_closed_still_has_data)
{
    int l = listener(AF_INET, 4), c = connected(l);
    say(c, "left");
    OK(close(c));
    int a = accepted(l);
    hear(a, "left");
    hear_eof(a);
}

CASE(accept_after_client_reset)
{
    int l = listener(AF_INET, 4), c = connected(l);
    wait_ev(l, POLLIN);
    linger0_close(c);
    int a = accepted(l); /* Linux still hands the socket out */
    wait_all(a, POLLERR | POLLHUP);
    ERR(recv(a, &(char){0}, 1, 0), ECONNRESET);
}

CASE(accept_inherits_options)
{
    int l = bound(AF_INET, SOCK_STREAM);
    setopt_int(l, SOL_SOCKET, SO_KEEPALIVE, 1);
    setopt_int(l, IPPROTO_TCP, TCP_NODELAY, 1);
    setopt_int(l, IPPROTO_TCP, TCP_KEEPIDLE, 77);
    setopt_int(l, SOL_SOCKET, SO_RCVBUF, 30000);
    struct linger g = {1, 7};
    OK(setsockopt(l, SOL_SOCKET, SO_LINGER, &g, sizeof g));
    OK(listen(l, 4));
    connected(l);
    int a = accepted(l);
    EQ(getopt_int(a, SOL_SOCKET, SO_KEEPALIVE), 1);
    EQ(getopt_int(a, IPPROTO_TCP, TCP_NODELAY), 1);
    EQ(getopt_int(a, IPPROTO_TCP, TCP_KEEPIDLE), 77);
    EQ(getopt_int(a, SOL_SOCKET, SO_RCVBUF), 60000);
    socklen_t n = sizeof g;
    g.l_linger = 0;
    OK(getsockopt(a, SOL_SOCKET, SO_LINGER, &g, &n));
    EQ(g.l_linger, 7);
    EQ(getopt_int(a, SOL_SOCKET, SO_ACCEPTCONN), 0);
}

CASE(listen_acceptconn)
{
    int s = bound(AF_INET, SOCK_STREAM);
    EQ(getopt_int(s, SOL_SOCKET, SO_ACCEPTCONN), 0);
    OK(listen(s, 1));
    EQ(getopt_int(s, SOL_SOCKET, SO_ACCEPTCONN), 1);
}

CASE(listen_errors)
{
    int u = OK(socket(AF_INET, SOCK_DGRAM, 0)), s[2], p[2];
    tcp_pair(s);
    OK(pipe(p));
    ERR(listen(u, 1), EOPNOTSUPP);
    ERR(listen(s[0], 1), EINVAL);
    ERR(listen(s[1], 1), EINVAL);
    ERR(listen(p[0], 1), ENOTSOCK);
    ERR(listen(-1, 1), EBADF);
}

CASE(listen_twice_changes_backlog)
{
    int l = listener(AF_INET, 1), c[6];
    EQ(listen(l, 16), 0);
    for (int i = 0; i < 6; i++)
        c[i] = connected(l);
    for (int i = 0; i < 6; i++)
        accepted(l);
    OK(c[0]);
}

CASE(listen_without_bind_takes_a_port)
{
    int l = OK(socket(AF_INET, SOCK_STREAM, 0));
    OK(listen(l, 4));
    union addr a;
    name_of(l, &a);
    EQ(a.in.sin_addr.s_addr, 0);
    TRUE(a.in.sin_port != 0);
    int c = OK(socket(AF_INET, SOCK_STREAM, 0));
    loop_addr(AF_INET, port_of(l), &a);
    OK(connect(c, &a.sa, sizeof a.in));
    union addr n;
    int s = accepted(l);
    name_of(s, &n);
    TRUE(same_addr(&n, &a)); /* the accepted one has the real local address */
}

CASE(listen_negative_backlog)
{
    int l = bound(AF_INET, SOCK_STREAM);
    OK(listen(l, -1));
    int c = connected(l);
    accepted(l);
    OK(c);
}

CASE(listen_backlog_overflow_then_all_arrive)
{
    int l = listener(AF_INET, 1), c[4];
    for (int i = 0; i < 4; i++) {
        c[i] = OK(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
        ERR(try_connect(c[i], l), EINPROGRESS);
    }
    for (int i = 0; i < 4; i++) {
        int a = accepted(l);
        say(a, "w");
    }
    for (int i = 0; i < 4; i++) {
        wait_ev(c[i], POLLIN);
        hear(c[i], "w");
    }
}

CASE(listen_close_resets_pending)
{
    int l = listener(AF_INET, 4), c = connected(l), d = connected(l);
    wait_ev(l, POLLIN);
    OK(close(l));
    wait_all(c, POLLERR | POLLHUP);
    ERR(recv(c, &(char){0}, 1, 0), ECONNRESET);
    wait_all(d, POLLERR | POLLHUP);
    ERR(recv(d, &(char){0}, 1, 0), ECONNRESET);
}

CASE(listen_close_then_refused)
{
    int l = listener(AF_INET, 4), c = OK(socket(AF_INET, SOCK_STREAM, 0));
    union addr a;
    socklen_t n = name_of(l, &a);
    OK(close(l));
    ERR(connect(c, &a.sa, n), ECONNREFUSED);
}

CASE(listen_close_keeps_accepted)
{
    int l = listener(AF_INET, 4), c = connected(l), a = accepted(l);
    OK(close(l));
    say(c, "x");
    hear(a, "x");
}

CASE(listen_shutdown_wakes_accept)
{
    int l = listener(AF_INET, 4);
    pid_t p = fork_child();
    if (!p) {
        ERR(accept(l, NULL, NULL), EINVAL);
        _exit(0);
    }
    nap(20);
    EQ(shutdown(l, SHUT_RD), 0);
    reap(p, 0);
    int c = OK(socket(AF_INET, SOCK_STREAM, 0));
    ERR(try_connect(c, l), ECONNREFUSED);
    EQ(getopt_int(l, SOL_SOCKET, SO_ACCEPTCONN), 0);
    OK(listen(l, 4)); /* and it can listen again on its port */
    OK(try_connect(c, l));
    accepted(l);
}

CASE(listen_shutdown_wr_does_nothing)
{
    int l = listener(AF_INET, 4);
    EQ(shutdown(l, SHUT_WR), 0);
    connected(l);
    accepted(l);
}

CASE(listen_shutdown_poll)
{
    int l = listener(AF_INET, 4);
    EV(poll_now(l, POLLIN | POLLOUT | POLLRDHUP), 0);
    OK(shutdown(l, SHUT_RD));
    EV(poll_now(l, POLLIN | POLLOUT | POLLRDHUP),
       POLLOUT | POLLHUP);
}

CASE(listen_50_queued)
{
    int l = listener(AF_INET, 64), c[50];
    for (int i = 0; i < 50; i++) {
        c[i] = connected(l);
        EQ(send(c[i], &i, sizeof i, 0), sizeof i);
    }
    for (int i = 0; i < 50; i++) {
        int v, a = accepted(l);
        recv_all(a, &v, sizeof v);
        EQ(v, i);
        OK(close(a));
    }
}

CASE(listen_defer_accept)
{
    int l = bound(AF_INET, SOCK_STREAM);
    setopt_int(l, IPPROTO_TCP, TCP_DEFER_ACCEPT, 5);
    OK(listen(l, 4));
    int c = connected(l);
    EV(poll_ms(l, POLLIN, 30), 0);
    say(c, "x");
    EV(wait_ev(l, POLLIN), POLLIN);
    int a = accepted(l);
    hear(a, "x");
}

CASE(bind_port_zero_gives_a_port)
{
    int s = bound(AF_INET, SOCK_STREAM), t = bound(AF_INET, SOCK_STREAM);
    TRUE(port_of(s) != 0);
    TRUE(port_of(t) != 0);
    TRUE(port_of(s) != port_of(t));
}

CASE(bind_keeps_address)
{
    int s = bound(AF_INET, SOCK_STREAM);
    union addr a;
    EQ(name_of(s, &a), sizeof a.in);
    EQ(ntohl(a.in.sin_addr.s_addr), INADDR_LOOPBACK);
}

CASE(bind_errors)
{
    int s = OK(socket(AF_INET, SOCK_STREAM, 0)), p[2];
    union addr a;
    socklen_t n = loop_addr(AF_INET, 0, &a);
    OK(pipe(p));
    ERR(bind(s, &a.sa, n - 1), EINVAL);
    ERR(bind(s, &a.sa, 0), EINVAL);
    ERR(bind(s, &a.sa, -1), EINVAL);
    ERR(bind(s, NULL, n), EFAULT);
    ERR(bind(-1, &a.sa, n), EBADF);
    ERR(bind(p[0], &a.sa, n), ENOTSOCK);
    a.sa.sa_family = AF_INET6;
    ERR(bind(s, &a.sa, sizeof a.in6), EAFNOSUPPORT);
    a.sa.sa_family = AF_UNIX;
    ERR(bind(s, &a.sa, n), EAFNOSUPPORT);
    a.sa.sa_family = AF_UNSPEC; /* accepted only with the any address */
    ERR(bind(s, &a.sa, n), EAFNOSUPPORT);
    a.in.sin_addr.s_addr = 0;
    EQ(bind(s, &a.sa, n), 0);
    TRUE(port_of(s) != 0);
}

CASE(bind_twice)
{
    int s = bound(AF_INET, SOCK_STREAM);
    union addr a;
    ERR(bind(s, &a.sa, loop_addr(AF_INET, 0, &a)), EINVAL);
    int v[2];
    tcp_pair(v);
    ERR(bind(v[0], &a.sa, loop_addr(AF_INET, 0, &a)), EINVAL);
}

CASE(bind_foreign_address)
{
    int s = OK(socket(AF_INET, SOCK_STREAM, 0));
    union addr a;
    loop_addr(AF_INET, 0, &a);
    a.in.sin_addr.s_addr = htonl(0xcb007101); /* TEST-NET-3 */
    ERR(bind(s, &a.sa, sizeof a.in), EADDRNOTAVAIL);
}

CASE(bind_in_use)
{
    int l = listener(AF_INET, 4), s = OK(socket(AF_INET, SOCK_STREAM, 0));
    union addr a;
    socklen_t n = name_of(l, &a);
    ERR(bind(s, &a.sa, n), EADDRINUSE);
    a.in.sin_addr.s_addr = 0;
    ERR(bind(s, &a.sa, n), EADDRINUSE);
    setopt_int(s, SOL_SOCKET, SO_REUSEADDR, 1);
    ERR(bind(s, &a.sa, n), EADDRINUSE);
    OK(close(l));
    OK(bind(s, &a.sa, n));
}

CASE(bind_in_use_not_listening)
{
    int b = bound(AF_INET, SOCK_STREAM), s = OK(socket(AF_INET, SOCK_STREAM, 0));
    union addr a;
    socklen_t n = name_of(b, &a);
    ERR(bind(s, &a.sa, n), EADDRINUSE);
    /* tcp and udp ports are apart */
    int u = OK(socket(AF_INET, SOCK_DGRAM, 0)), r = -1;
    for (int i = 0; i < 20; i++) { /* a stranger may have the udp port: another, then */
        if ((r = bind(u, &a.sa, n)) == 0 || errno != EADDRINUSE)
            break;
        n = name_of(bound(AF_INET, SOCK_STREAM), &a);
    }
    OK(r);
}

CASE(bind_reuseaddr_both_second_listen_fails)
{
    int x = OK(socket(AF_INET, SOCK_STREAM, 0)), y = OK(socket(AF_INET, SOCK_STREAM, 0));
    union addr a;
    setopt_int(x, SOL_SOCKET, SO_REUSEADDR, 1);
    setopt_int(y, SOL_SOCKET, SO_REUSEADDR, 1);
    OK(bind(x, &a.sa, loop_addr(AF_INET, 0, &a)));
    socklen_t n = name_of(x, &a);
    OK(bind(y, &a.sa, n));
    OK(listen(x, 4));
    ERR(listen(y, 4), EADDRINUSE);
}

CASE(bind_reuseaddr_over_old_connections)
{
    int l = listener(AF_INET, 4), c = connected(l), s = accepted(l);
    union addr a;
    socklen_t n = name_of(l, &a);
    OK(close(l));
    OK(close(s)); /* the server's side closes first and lingers */
    hear_eof(c);
    OK(close(c));
    int t = OK(socket(AF_INET, SOCK_STREAM, 0));
    ERR(bind(t, &a.sa, n), EADDRINUSE);
    /* SO_REUSEADDR must have been set on the old one's port too */
    l = OK(socket(AF_INET, SOCK_STREAM, 0));
    setopt_int(l, SOL_SOCKET, SO_REUSEADDR, 1);
    OK(bind(l, &a.sa, loop_addr(AF_INET, 0, &a)));
    n = name_of(l, &a);
    OK(listen(l, 4));
    c = connected(l);
    s = accepted(l);
    OK(close(l));
    OK(close(s));
    hear_eof(c);
    OK(close(c));
    setopt_int(t, SOL_SOCKET, SO_REUSEADDR, 1);
    OK(bind(t, &a.sa, n));
    OK(listen(t, 4));
    c = connected(t);
    accepted(t);
}

CASE(bind_reuseaddr_with_live_connection)
{
    int l = OK(socket(AF_INET, SOCK_STREAM, 0));
    union addr a;
    setopt_int(l, SOL_SOCKET, SO_REUSEADDR, 1);
    OK(bind(l, &a.sa, loop_addr(AF_INET, 0, &a)));
    OK(listen(l, 4));
    socklen_t n = name_of(l, &a);
    int c = connected(l), s = accepted(l);
    OK(close(l));
    int t = OK(socket(AF_INET, SOCK_STREAM, 0));
    setopt_int(t, SOL_SOCKET, SO_REUSEADDR, 1);
    OK(bind(t, &a.sa, n));
    OK(listen(t, 4));
    connected(t);
    accepted(t);
    say(c, "old");
    hear(s, "old");
}

CASE(bind_reuseport_two_listeners)
{
    int x = OK(socket(AF_INET, SOCK_STREAM, 0)), y = OK(socket(AF_INET, SOCK_STREAM, 0));
    union addr a;
    setopt_int(x, SOL_SOCKET, SO_REUSEPORT, 1);
    setopt_int(y, SOL_SOCKET, SO_REUSEPORT, 1);
    OK(bind(x, &a.sa, loop_addr(AF_INET, 0, &a)));
    socklen_t n = name_of(x, &a);
    OK(bind(y, &a.sa, n));
    OK(listen(x, 64));
    OK(listen(y, 64));
    int got = 0;
    for (int i = 0; i < 40; i++)
        connected(x);
    set_nonblock(x, 1);
    set_nonblock(y, 1);
    while (got < 40) {
        struct pollfd p[2] = {{x, POLLIN, 0}, {y, POLLIN, 0}};
        TRUE(poll(p, 2, 10000) > 0);
        for (int i = 0; i < 2; i++)
            if (p[i].revents) {
                accepted(p[i].fd);
                got++;
            }
    }
    EV(poll_now(x, POLLIN), 0);
    EV(poll_now(y, POLLIN), 0);
}

CASE(bind_reuseport_needs_both)
{
    int x = OK(socket(AF_INET, SOCK_STREAM, 0)), y = OK(socket(AF_INET, SOCK_STREAM, 0));
    union addr a;
    setopt_int(y, SOL_SOCKET, SO_REUSEPORT, 1);
    OK(bind(x, &a.sa, loop_addr(AF_INET, 0, &a)));
    socklen_t n = name_of(x, &a);
    ERR(bind(y, &a.sa, n), EADDRINUSE);
    OK(listen(x, 4));
    ERR(bind(y, &a.sa, n), EADDRINUSE);
}

CASE(bind_privileged_port)
{
    if (geteuid() == 0)
        skip("root may bind every port");
    int s = OK(socket(AF_INET, SOCK_STREAM, 0));
    union addr a;
    ERR(bind(s, &a.sa, loop_addr(AF_INET, 1, &a)), EACCES);
}

/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* socket(), connect() and what names they leave. */
#include "socktest.h"

static int refusing(void) { return bound(AF_INET, SOCK_STREAM); }

CASE(connect_names_match)
{
    int l = listener(AF_INET, 4), c = connected(l), s = accepted(l);
    union addr cl, cp, sl, sp, ll;
    name_of(c, &cl);
    peer_of(c, &cp);
    name_of(s, &sl);
    peer_of(s, &sp);
    name_of(l, &ll);
    TRUE(same_addr(&cl, &sp));
    TRUE(same_addr(&cp, &sl));
    TRUE(same_addr(&cp, &ll));
    TRUE(ntohs(cl.in.sin_port) != 0);
    TRUE(!same_addr(&cl, &sl));
}

CASE(connect_name_before_is_any)
{
    int s = OK(socket(AF_INET, SOCK_STREAM, 0));
    union addr a;
    EQ(name_of(s, &a), sizeof(struct sockaddr_in));
    EQ(a.in.sin_family, AF_INET);
    EQ(a.in.sin_port, 0);
    EQ(a.in.sin_addr.s_addr, 0);
}

CASE(connect_name_length_is_truncated)
{
    int s[2];
    union addr a;
    tcp_pair(s);
    memset(&a, 0xee, sizeof a);
    socklen_t l = 4;
    OK(getsockname(s[0], &a.sa, &l));
    EQ(l, sizeof(struct sockaddr_in));
    EQ(((unsigned char *)&a)[4], 0xee);
    EQ(a.in.sin_family, AF_INET);
    l = 0;
    OK(getpeername(s[0], &a.sa, &l));
    EQ(l, sizeof(struct sockaddr_in));
    l = -1;
    ERR(getsockname(s[0], &a.sa, &l), EINVAL);
}

CASE(connect_uses_bound_port)
{
    int l = listener(AF_INET, 4), c = bound(AF_INET, SOCK_STREAM);
    union addr a, b;
    name_of(c, &a);
    TRUE(a.in.sin_port != 0);
    OK(try_connect(c, l));
    int s = accepted(l);
    peer_of(s, &b);
    TRUE(same_addr(&a, &b));
}

CASE(connect_refused)
{
    int r = refusing(), s = OK(socket(AF_INET, SOCK_STREAM, 0));
    ERR(try_connect(s, r), ECONNREFUSED);
    EQ(getopt_int(s, SOL_SOCKET, SO_ERROR), 0);
}

CASE(connect_refused_twice_then_works)
{
    int r = refusing(), s = OK(socket(AF_INET, SOCK_STREAM, 0));
    ERR(try_connect(s, r), ECONNREFUSED);
    ERR(try_connect(s, r), ECONNREFUSED);
    OK(listen(r, 4));
    OK(try_connect(s, r));
    int a = accepted(r);
    say(s, "x");
    hear(a, "x");
}

CASE(connect_refused_nonblocking)
{
    int r = refusing(), s = OK(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
    ERR(try_connect(s, r), EINPROGRESS);
    EV(wait_ev(s, POLLIN | POLLOUT | POLLRDHUP),
       POLLIN | POLLOUT | POLLERR | POLLHUP | POLLRDHUP);
    EQ(getopt_int(s, SOL_SOCKET, SO_ERROR), ECONNREFUSED);
    EQ(getopt_int(s, SOL_SOCKET, SO_ERROR), 0);
    EV(poll_now(s, POLLIN | POLLOUT), POLLIN | POLLOUT | POLLHUP);
}

CASE(connect_refused_nonblocking_again_tells_error)
{
    int r = refusing(), s = OK(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
    ERR(try_connect(s, r), EINPROGRESS);
    wait_ev(s, POLLOUT);
    ERR(try_connect(s, r), ECONNREFUSED);
    ERR(try_connect(s, r), EINPROGRESS);
}

/* When SO_ERROR has taken the error, the next connect() says ECONNABORTED. */
CASE(connect_refused_so_error_read_then_connect)
{
    int r = refusing(), s = OK(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
    ERR(try_connect(s, r), EINPROGRESS);
    wait_ev(s, POLLOUT);
    EQ(getopt_int(s, SOL_SOCKET, SO_ERROR), ECONNREFUSED);
    ERR(try_connect(s, r), ECONNABORTED);
    ERR(try_connect(s, r), EINPROGRESS);
}

CASE(connect_refused_nonblocking_recv_and_send)
{
    int r = refusing(), s = OK(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
    ERR(try_connect(s, r), EINPROGRESS);
    wait_ev(s, POLLOUT);
    ERR(recv(s, &(char){0}, 1, 0), ECONNREFUSED);
    EQ(recv(s, &(char){0}, 1, 0), 0);
    ERR(send(s, "x", 1, MSG_NOSIGNAL), EPIPE);
}

CASE(connect_nonblocking_completes)
{
    int l = listener(AF_INET, 4), s = OK(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
    ERR(try_connect(s, l), EINPROGRESS);
    EV(wait_ev(s, POLLIN | POLLOUT), POLLOUT);
    EQ(getopt_int(s, SOL_SOCKET, SO_ERROR), 0);
    int a = accepted(l);
    say(a, "hi");
    wait_ev(s, POLLIN);
    hear(s, "hi");
}

/* The connect() that follows a completed one returns 0 once, then EISCONN. */
CASE(connect_nonblocking_second_call_is_zero_once)
{
    int l = listener(AF_INET, 4), s = OK(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
    ERR(try_connect(s, l), EINPROGRESS);
    EV(wait_ev(s, POLLOUT), POLLOUT);
    EQ(try_connect(s, l), 0);
    ERR(try_connect(s, l), EISCONN);
}

CASE(connect_eisconn)
{
    int l = listener(AF_INET, 4), c = connected(l), s = accepted(l);
    ERR(try_connect(c, l), EISCONN);
    ERR(try_connect(s, l), EISCONN);
    say(c, "x");
    hear(s, "x");
}

CASE(connect_on_listener)
{
    int l = listener(AF_INET, 4), m = listener(AF_INET, 4);
    ERR(try_connect(m, l), EISCONN);
    int c = connected(m);
    OK(c);
}

CASE(connect_ealready_while_backlog_is_full)
{
    int q, l = full_listener(&q);
    int s = OK(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
    ERR(try_connect(s, l), EINPROGRESS);
    ERR(try_connect(s, l), EALREADY);
    EV(poll_now(s, POLLIN | POLLOUT), 0);
    ERR(recv(s, &(char){0}, 1, 0), EAGAIN);
    ERR(send(s, "x", 1, MSG_NOSIGNAL), EAGAIN);
    union addr a;
    socklen_t n = sizeof a;
    ERR(getpeername(s, &a.sa, &n), ENOTCONN);
    TRUE(port_of(s) != 0);
}

CASE(connect_completes_when_backlog_drains)
{
    int q, l = full_listener(&q);
    int s = OK(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
    ERR(try_connect(s, l), EINPROGRESS);
    EV(poll_ms(s, POLLOUT, 50), 0);
    int a = accepted(l);
    EV(wait_ev(s, POLLOUT), POLLOUT);
    int b = accepted(l);
    say(s, "second");
    hear(b, "second");
    say(q, "first");
    hear(a, "first");
}

CASE(connect_blocking_waits_for_backlog)
{
    int q, l = full_listener(&q);
    pid_t p = fork_child();
    if (!p) {
        int s = connected(l);
        say(s, "in");
        _exit(0);
    }
    nap(30);
    int a = accepted(l), b = accepted(l);
    (void)a;
    hear(b, "in");
    reap(p, 0);
}

/* A connect() that runs into SO_SNDTIMEO says EINPROGRESS, not EAGAIN. */
CASE(connect_sndtimeo)
{
    int q, l = full_listener(&q);
    int s = OK(socket(AF_INET, SOCK_STREAM, 0));
    struct timeval tv = {0, 50000};
    OK(setsockopt(s, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof tv));
    ERR(try_connect(s, l), EINPROGRESS);
    ERR(try_connect(s, l), EALREADY);
}

CASE(connect_close_while_in_progress)
{
    int q, l = full_listener(&q);
    int s = OK(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
    ERR(try_connect(s, l), EINPROGRESS);
    OK(close(s));
    int a = accepted(l);
    say(q, "x");
    hear(a, "x");
}

CASE(connect_shutdown_while_in_progress)
{
    int q, l = full_listener(&q);
    int s = OK(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
    ERR(try_connect(s, l), EINPROGRESS);
    EQ(shutdown(s, SHUT_RDWR), 0);
    EV(poll_now(s, POLLIN | POLLOUT), POLLOUT | POLLERR | POLLHUP);
    ERR(recv(s, &(char){0}, 1, 0), ECONNRESET);
    ERR(recv(s, &(char){0}, 1, 0), ENOTCONN);
    ERR(send(s, "x", 1, MSG_NOSIGNAL), EPIPE);
}

CASE(connect_bad_arguments)
{
    int l = listener(AF_INET, 4), s = OK(socket(AF_INET, SOCK_STREAM, 0));
    union addr a;
    socklen_t n = name_of(l, &a);
    ERR(connect(s, &a.sa, n - 1), EINVAL);
    ERR(connect(s, &a.sa, 0), EINVAL);
    ERR(connect(s, &a.sa, -1), EINVAL);
    ERR(connect(s, &a.sa, 4096), EINVAL);
    ERR(connect(s, NULL, n), EFAULT);
    ERR(connect(-1, &a.sa, n), EBADF);
    int p[2];
    OK(pipe(p));
    ERR(connect(p[0], &a.sa, n), ENOTSOCK);
    OK(connect(s, &a.sa, sizeof a.ss)); /* longer than needed is fine */
}

CASE(connect_wrong_family)
{
    int l = listener(AF_INET, 4), s = OK(socket(AF_INET, SOCK_STREAM, 0));
    union addr a;
    name_of(l, &a);
    a.sa.sa_family = AF_INET6;
    ERR(connect(s, &a.sa, sizeof a.in6), EAFNOSUPPORT);
    a.sa.sa_family = AF_UNIX;
    ERR(connect(s, &a.sa, sizeof a.in), EAFNOSUPPORT);
    a.sa.sa_family = 255;
    ERR(connect(s, &a.sa, sizeof a.in), EAFNOSUPPORT);
    a.sa.sa_family = AF_INET;
    OK(connect(s, &a.sa, sizeof a.in));
}

/* AF_UNSPEC disconnects: the peer sees a reset, the socket can go again. */
CASE(connect_unspec_disconnects)
{
    int l = listener(AF_INET, 4), c = connected(l), s = accepted(l);
    union addr a;
    memset(&a, 0, sizeof a);
    a.sa.sa_family = AF_UNSPEC;
    EQ(connect(c, &a.sa, sizeof a.in), 0);
    wait_all(s, POLLERR | POLLHUP);
    ERR(recv(s, &(char){0}, 1, 0), ECONNRESET);
    ERR(recv(c, &(char){0}, 1, 0), ECONNRESET); /* also told to ourselves */
    ERR(recv(c, &(char){0}, 1, 0), ENOTCONN);
    OK(try_connect(c, l));
    int t = accepted(l);
    say(c, "again");
    hear(t, "again");
}

CASE(connect_port_zero_is_refused)
{
    int s = OK(socket(AF_INET, SOCK_STREAM, 0));
    union addr a;
    socklen_t n = loop_addr(AF_INET, 0, &a);
    ERR(connect(s, &a.sa, n), ECONNREFUSED);
}

CASE(connect_to_any_means_loopback)
{
    int l = listener(AF_INET, 4), s = OK(socket(AF_INET, SOCK_STREAM, 0));
    union addr a, b, w;
    loop_addr(AF_INET, port_of(l), &a);
    w = a;
    a.in.sin_addr.s_addr = 0;
    OK(connect(s, &a.sa, sizeof a.in));
    peer_of(s, &b);
    TRUE(same_addr(&b, &w));
    accepted(l);
}

CASE(connect_to_broadcast_is_enetunreach)
{
    int s = OK(socket(AF_INET, SOCK_STREAM, 0));
    union addr a;
    loop_addr(AF_INET, 9, &a);
    a.in.sin_addr.s_addr = 0xffffffff;
    ERR(connect(s, &a.sa, sizeof a.in), ENETUNREACH);
    a.in.sin_addr.s_addr = htonl(0xe0000001);
    ERR(connect(s, &a.sa, sizeof a.in), ENETUNREACH);
}

CASE(connect_to_itself)
{
    int s = bound(AF_INET, SOCK_STREAM);
    OK(try_connect(s, s));
    union addr a, b;
    name_of(s, &a);
    peer_of(s, &b);
    TRUE(same_addr(&a, &b));
    say(s, "echo");
    hear(s, "echo");
    OK(shutdown(s, SHUT_WR));
    hear_eof(s);
}

CASE(connect_two_to_one_port_have_own_ports)
{
    int l = listener(AF_INET, 4), a = connected(l), b = connected(l);
    TRUE(port_of(a) != port_of(b));
    TRUE(port_of(a) != port_of(l));
}

CASE(connect_peer_closed_before_first_read)
{
    int l = listener(AF_INET, 4), c = connected(l), s = accepted(l);
    say(s, "bye");
    OK(close(s));
    hear(c, "bye");
    hear_eof(c);
}

CASE(socket_flags)
{
    int s = OK(socket(AF_INET, SOCK_STREAM, 0));
    EQ(fcntl(s, F_GETFL), O_RDWR);
    EQ(fcntl(s, F_GETFD), 0);
    s = OK(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
    EQ(fcntl(s, F_GETFL), O_RDWR | O_NONBLOCK);
    EQ(fcntl(s, F_GETFD), 0);
    s = OK(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, IPPROTO_TCP));
    EQ(fcntl(s, F_GETFL), O_RDWR);
    EQ(fcntl(s, F_GETFD), FD_CLOEXEC);
    s = OK(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, IPPROTO_UDP));
    EQ(fcntl(s, F_GETFL), O_RDWR | O_NONBLOCK);
    EQ(fcntl(s, F_GETFD), FD_CLOEXEC);
}

CASE(socket_bad_arguments)
{
    ERR(socket(AF_INET, SOCK_STREAM, IPPROTO_UDP), EPROTONOSUPPORT);
    ERR(socket(AF_INET, SOCK_DGRAM, IPPROTO_TCP), EPROTONOSUPPORT);
    ERR(socket(AF_INET, SOCK_STREAM, -1), EINVAL);
    ERR(socket(AF_INET, SOCK_STREAM, 300), EINVAL);
    ERR(socket(AF_INET, SOCK_STREAM, 255), EPROTONOSUPPORT);
    ERR(socket(AF_INET, 9, 0), ESOCKTNOSUPPORT);
    ERR(socket(AF_INET, 11, 0), EINVAL);
    ERR(socket(AF_INET, SOCK_SEQPACKET, 0), ESOCKTNOSUPPORT);
    ERR(socket(AF_INET, SOCK_STREAM | 0x100, 0), EINVAL);
    ERR(socket(77, SOCK_STREAM, 0), EAFNOSUPPORT);
    ERR(socket(-1, SOCK_STREAM, 0), EAFNOSUPPORT);
}

CASE(socketpair_inet_is_refused)
{
    int s[2];
    ERR(socketpair(AF_INET, SOCK_STREAM, 0, s), EOPNOTSUPP);
}

CASE(socket_kind_options)
{
    int s = OK(socket(AF_INET, SOCK_STREAM, 0));
    EQ(getopt_int(s, SOL_SOCKET, SO_TYPE), SOCK_STREAM);
    EQ(getopt_int(s, SOL_SOCKET, SO_DOMAIN), AF_INET);
    EQ(getopt_int(s, SOL_SOCKET, SO_PROTOCOL), IPPROTO_TCP);
    EQ(getopt_int(s, SOL_SOCKET, SO_ACCEPTCONN), 0);
    EQ(getopt_int(s, SOL_SOCKET, SO_ERROR), 0);
    s = OK(socket(AF_INET, SOCK_DGRAM, 0));
    EQ(getopt_int(s, SOL_SOCKET, SO_TYPE), SOCK_DGRAM);
    EQ(getopt_int(s, SOL_SOCKET, SO_PROTOCOL), IPPROTO_UDP);
}

CASE(socket_limit_emfile)
{
    int fds[64], n = 0, r;
    fill_fd_holes();
    int top = OK(dup(0));
    OK(close(top));
    limit_fds(top + 5);
    while (n < 64 && (r = socket(AF_INET, SOCK_STREAM, 0)) >= 0)
        fds[n++] = r;
    ERR(socket(AF_INET, SOCK_STREAM, 0), EMFILE);
    obs("%d", n);
    EQ(n, 5);
    OK(close(fds[2]));
    EQ(socket(AF_INET, SOCK_STREAM, 0) == fds[2], 1);
}

CASE(socket_accept_emfile)
{
    int l = listener(AF_INET, 4), c = connected(l);
    wait_ev(l, POLLIN);
    fill_fd_holes();
    int top = OK(dup(0));
    OK(close(top));
    limit_fds(top);
    ERR(accept(l, NULL, NULL), EMFILE);
    limit_fds(top + 1);
    int a = accepted(l); /* the connection was not lost */
    say(c, "x");
    hear(a, "x");
}

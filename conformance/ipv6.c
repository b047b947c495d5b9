/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include "socktest.h"

CASE(ipv6_stream)
{
    need_ipv6();
    int s[2];
    tcp_pair_fam(AF_INET6, s);
    say(s[0], "six");
    hear(s[1], "six");
    OK(close(s[0]));
    hear_eof(s[1]);
}

CASE(ipv6_names)
{
    need_ipv6();
    int s[2];
    union addr a, b;
    tcp_pair_fam(AF_INET6, s);
    EQ(name_of(s[0], &a), sizeof a.in6);
    EQ(peer_of(s[1], &b), sizeof b.in6);
    TRUE(same_addr(&a, &b));
    TRUE(IN6_IS_ADDR_LOOPBACK(&a.in6.sin6_addr));
    peer_of(s[0], &a);
    name_of(s[1], &b);
    TRUE(same_addr(&a, &b));
    EQ(a.in6.sin6_scope_id, 0);
}

CASE(ipv6_kind)
{
    need_ipv6();
    int s = OK(socket(AF_INET6, SOCK_STREAM, 0));
    EQ(getopt_int(s, SOL_SOCKET, SO_DOMAIN), AF_INET6);
    EQ(getopt_int(s, SOL_SOCKET, SO_PROTOCOL), IPPROTO_TCP);
    EQ(getopt_int(s, IPPROTO_IPV6, IPV6_V6ONLY), 0);
    union addr a;
    EQ(name_of(s, &a), sizeof a.in6);
    EQ(a.sa.sa_family, AF_INET6);
    EQ(a.in6.sin6_port, 0);
}

CASE(ipv6_refused)
{
    need_ipv6();
    int b = bound(AF_INET6, SOCK_STREAM), s = OK(socket(AF_INET6, SOCK_STREAM, 0));
    ERR(try_connect(s, b), ECONNREFUSED);
}

CASE(ipv6_nonblocking_connect)
{
    need_ipv6();
    int l = listener(AF_INET6, 4), s = OK(socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK, 0));
    ERR(try_connect(s, l), EINPROGRESS);
    EV(wait_ev(s, POLLOUT), POLLOUT);
    accepted(l);
}

static int any6(int only)
{
    int l = OK(socket(AF_INET6, SOCK_STREAM, 0));
    union addr a;
    setopt_int(l, IPPROTO_IPV6, IPV6_V6ONLY, only);
    loop_addr(AF_INET6, 0, &a);
    a.in6.sin6_addr = in6addr_any;
    OK(bind(l, &a.sa, sizeof a.in6));
    OK(listen(l, 4));
    return l;
}

CASE(ipv6_dual_listener_takes_v4)
{
    need_ipv6();
    int l = any6(0), c = OK(socket(AF_INET, SOCK_STREAM, 0));
    union addr a;
    OK(connect(c, &a.sa, loop_addr(AF_INET, port_of(l), &a)));
    int s = accepted(l);
    EQ(peer_of(s, &a), sizeof a.in6);
    TRUE(IN6_IS_ADDR_V4MAPPED(&a.in6.sin6_addr));
    EQ(ntohs(a.in6.sin6_port) == port_of(c), 1);
    name_of(s, &a);
    TRUE(IN6_IS_ADDR_V4MAPPED(&a.in6.sin6_addr));
    say(c, "x");
    hear(s, "x");
    int d = OK(socket(AF_INET6, SOCK_STREAM, 0));
    OK(connect(d, &a.sa, loop_addr(AF_INET6, port_of(l), &a)));
    s = accepted(l);
    peer_of(s, &a);
    TRUE(IN6_IS_ADDR_LOOPBACK(&a.in6.sin6_addr));
}

CASE(ipv6_only_listener_refuses_v4)
{
    need_ipv6();
    int l = any6(1), c = OK(socket(AF_INET, SOCK_STREAM, 0));
    union addr a;
    socklen_t n = loop_addr(AF_INET, port_of(l), &a);
    ERR(connect(c, &a.sa, n), ECONNREFUSED);
    int d = OK(socket(AF_INET6, SOCK_STREAM, 0));
    n = loop_addr(AF_INET6, port_of(l), &a);
    OK(connect(d, &a.sa, n));
    accepted(l);
}

CASE(ipv6_v6only_and_v4_share_a_port)
{
    need_ipv6();
    int l = any6(1), m = OK(socket(AF_INET, SOCK_STREAM, 0)), r = -1;
    union addr a;
    for (int i = 0; i < 20; i++) { /* a stranger may have the v4 port: another, then */
        socklen_t n = loop_addr(AF_INET, port_of(l), &a);
        if ((r = bind(m, &a.sa, n)) == 0 || errno != EADDRINUSE)
            break;
        l = any6(1);
    }
    OK(r);
    OK(listen(m, 4));
    int c = connected(m);
    accepted(m);
    OK(c);
}

CASE(ipv6_dual_conflicts_with_v4)
{
    need_ipv6();
    int l = any6(0), m = OK(socket(AF_INET, SOCK_STREAM, 0));
    union addr a;
    socklen_t n = loop_addr(AF_INET, port_of(l), &a);
    ERR(bind(m, &a.sa, n), EADDRINUSE);
}

CASE(ipv6_v6only_after_bind)
{
    need_ipv6();
    int s = bound(AF_INET6, SOCK_STREAM), v = 1;
    ERR(setsockopt(s, IPPROTO_IPV6, IPV6_V6ONLY, &v, sizeof v), EINVAL);
}

static socklen_t mapped(int port, union addr *a)
{
    loop_addr(AF_INET6, port, a);
    inet_pton(AF_INET6, "::ffff:127.0.0.1", &a->in6.sin6_addr);
    return sizeof a->in6;
}

CASE(ipv6_connect_to_mapped_v4)
{
    need_ipv6();
    int l = listener(AF_INET, 4), s = OK(socket(AF_INET6, SOCK_STREAM, 0));
    union addr a, b;
    socklen_t n = mapped(port_of(l), &a);
    OK(connect(s, &a.sa, n));
    int t = accepted(l);
    peer_of(t, &b);
    EQ(b.sa.sa_family, AF_INET);
    name_of(s, &b);
    EQ(b.sa.sa_family, AF_INET6);
    TRUE(IN6_IS_ADDR_V4MAPPED(&b.in6.sin6_addr));
    peer_of(s, &b);
    TRUE(same_addr(&a, &b));
    say(s, "mapped");
    hear(t, "mapped");
}

CASE(ipv6_only_cannot_reach_mapped)
{
    need_ipv6();
    int l = listener(AF_INET, 4), s = OK(socket(AF_INET6, SOCK_STREAM, 0));
    setopt_int(s, IPPROTO_IPV6, IPV6_V6ONLY, 1);
    union addr a;
    socklen_t n = mapped(port_of(l), &a);
    ERR(connect(s, &a.sa, n), ENETUNREACH);
}

CASE(ipv6_bind_mapped)
{
    need_ipv6();
    int l = OK(socket(AF_INET6, SOCK_STREAM, 0)), c = OK(socket(AF_INET, SOCK_STREAM, 0));
    union addr a;
    OK(bind(l, &a.sa, mapped(0, &a)));
    OK(listen(l, 4));
    OK(connect(c, &a.sa, loop_addr(AF_INET, port_of(l), &a)));
    accepted(l);
    name_of(l, &a);
    TRUE(IN6_IS_ADDR_V4MAPPED(&a.in6.sin6_addr));
}

CASE(ipv6_connect_any_means_loopback)
{
    need_ipv6();
    int l = listener(AF_INET6, 4), s = OK(socket(AF_INET6, SOCK_STREAM, 0));
    union addr a;
    socklen_t n = loop_addr(AF_INET6, port_of(l), &a);
    a.in6.sin6_addr = in6addr_any;
    OK(connect(s, &a.sa, n));
    accepted(l);
    peer_of(s, &a);
    TRUE(IN6_IS_ADDR_LOOPBACK(&a.in6.sin6_addr));
}

CASE(ipv6_bad_arguments)
{
    need_ipv6();
    int s = OK(socket(AF_INET6, SOCK_STREAM, 0));
    union addr a;
    loop_addr(AF_INET6, 0, &a);
    ERR(bind(s, &a.sa, 20), EINVAL);
    loop_addr(AF_INET, 0, &a);
    ERR(bind(s, &a.sa, sizeof a.in6), EAFNOSUPPORT);
    loop_addr(AF_INET6, 0, &a);
    a.in6.sin6_addr.s6_addr[0] = 0x20;
    a.in6.sin6_addr.s6_addr[1] = 1;
    a.in6.sin6_addr.s6_addr[2] = 0xd;
    a.in6.sin6_addr.s6_addr[3] = 0xb8; /* documentation prefix */
    ERR(bind(s, &a.sa, sizeof a.in6), EADDRNOTAVAIL);
}

CASE(ipv6_options)
{
    need_ipv6();
    int s = OK(socket(AF_INET6, SOCK_STREAM, 0));
    setopt_int(s, IPPROTO_IPV6, IPV6_V6ONLY, 1);
    EQ(getopt_int(s, IPPROTO_IPV6, IPV6_V6ONLY), 1);
    setopt_int(s, IPPROTO_IPV6, IPV6_TCLASS, 0x20);
    EQ(getopt_int(s, IPPROTO_IPV6, IPV6_TCLASS), 0x20);
    setopt_int(s, IPPROTO_IPV6, IPV6_UNICAST_HOPS, 9);
    EQ(getopt_int(s, IPPROTO_IPV6, IPV6_UNICAST_HOPS), 9);
    setopt_int(s, IPPROTO_TCP, TCP_NODELAY, 1);
    EQ(getopt_int(s, IPPROTO_TCP, TCP_NODELAY), 1);
    int v = 1;
    socklen_t n = sizeof v;
    ERR(setsockopt(s, IPPROTO_IPV6, 9999, &v, n), ENOPROTOOPT);
    ERR(getsockopt(s, IPPROTO_IPV6, 9999, &v, &n), ENOPROTOOPT);
}

CASE(ipv6_udp)
{
    need_ipv6();
    int a = bound(AF_INET6, SOCK_DGRAM), b = bound(AF_INET6, SOCK_DGRAM);
    union addr n, from;
    socklen_t l = name_of(b, &n);
    char c[4];
    EQ(sendto(a, "six", 3, 0, &n.sa, l), 3);
    l = sizeof from;
    EQ(recvfrom(b, c, 4, 0, &from.sa, &l), 3);
    EQ(l, sizeof from.in6);
    name_of(a, &n);
    TRUE(same_addr(&n, &from));
}

CASE(ipv6_udp_connected)
{
    need_ipv6();
    int s[2];
    udp_pair(AF_INET6, s);
    say(s[0], "x");
    hear(s[1], "x");
    OK(close(s[1]));
    EQ(send(s[0], "x", 1, 0), 1);
    wait_all(s[0], POLLERR);
    ERR(recv(s[0], &(char){0}, 1, 0), ECONNREFUSED);
}

CASE(ipv6_udp_dual)
{
    need_ipv6();
    int r = OK(socket(AF_INET6, SOCK_DGRAM, 0)), s = OK(socket(AF_INET, SOCK_DGRAM, 0));
    union addr a;
    loop_addr(AF_INET6, 0, &a);
    a.in6.sin6_addr = in6addr_any;
    OK(bind(r, &a.sa, sizeof a.in6));
    OK(connect(s, &a.sa, loop_addr(AF_INET, port_of(r), &a)));
    say(s, "x");
    socklen_t l = sizeof a;
    char c;
    EQ(recvfrom(r, &c, 1, 0, &a.sa, &l), 1);
    EQ(l, sizeof a.in6);
    TRUE(IN6_IS_ADDR_V4MAPPED(&a.in6.sin6_addr));
    EQ(sendto(r, "y", 1, 0, &a.sa, l), 1);
    hear(s, "y");
}

CASE(ipv6_epoll_and_transfer)
{
    need_ipv6();
    int s[2], e = ep_new();
    tcp_pair_fam(AF_INET6, s);
    ep_add(e, s[1], EPOLLIN);
    pid_t p = fork_child();
    if (!p) {
        stream_send(s[0], 4 << 20, 1, 70000);
        _exit(0);
    }
    EV(ep_one(e, s[1], 15000), EPOLLIN);
    stream_recv(s[1], 4 << 20, 1, 70000);
    reap(p, 0);
    linger0_close(s[0]);
    wait_all(s[1], POLLERR | POLLHUP);
    EV(ep_one(e, s[1], 15000), EPOLLIN | EPOLLERR | EPOLLHUP);
}

CASE(ipv6_udp_largest)
{
    need_ipv6();
    int s[2];
    static char b[70000];
    udp_pair(AF_INET6, s);
    EQ(send(s[0], b, 65000, 0), 65000);
    EQ(recv(s[1], b, sizeof b, 0), 65000);
    ERR(send(s[0], b, 65536, 0), EMSGSIZE);
}

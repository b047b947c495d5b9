/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* getsockopt() and setsockopt(). */
#include "socktest.h"

static int tcp4(void) { return OK(socket(AF_INET, SOCK_STREAM, 0)); }

static void toggles(int fd, int level, int name)
{
    int before = getopt_int(fd, level, name);
    EQ(before, 0);
    setopt_int(fd, level, name, 1);
    EQ(getopt_int(fd, level, name), 1);
    setopt_int(fd, level, name, 5); /* any non-zero is one */
    EQ(getopt_int(fd, level, name), 1);
    setopt_int(fd, level, name, 0);
    EQ(getopt_int(fd, level, name), 0);
}

CASE(opt_reuseaddr) { toggles(tcp4(), SOL_SOCKET, SO_REUSEADDR); }
CASE(opt_reuseport) { toggles(tcp4(), SOL_SOCKET, SO_REUSEPORT); }
CASE(opt_keepalive) { toggles(tcp4(), SOL_SOCKET, SO_KEEPALIVE); }
CASE(opt_broadcast) { toggles(OK(socket(AF_INET, SOCK_DGRAM, 0)), SOL_SOCKET, SO_BROADCAST); }
CASE(opt_oobinline) { toggles(tcp4(), SOL_SOCKET, SO_OOBINLINE); }
CASE(opt_dontroute) { toggles(tcp4(), SOL_SOCKET, SO_DONTROUTE); }
CASE(opt_timestamp) { toggles(tcp4(), SOL_SOCKET, SO_TIMESTAMP); }
CASE(opt_nodelay) { toggles(tcp4(), IPPROTO_TCP, TCP_NODELAY); }
CASE(opt_cork) { toggles(tcp4(), IPPROTO_TCP, TCP_CORK); }
CASE(opt_ip_recvtos) { toggles(OK(socket(AF_INET, SOCK_DGRAM, 0)), IPPROTO_IP, IP_RECVTOS); }
CASE(opt_ip_pktinfo) { toggles(OK(socket(AF_INET, SOCK_DGRAM, 0)), IPPROTO_IP, IP_PKTINFO); }
CASE(opt_ip_freebind) { toggles(tcp4(), IPPROTO_IP, IP_FREEBIND); }

CASE(opt_nodelay_on_connected)
{
    int s[2];
    tcp_pair(s);
    toggles(s[0], IPPROTO_TCP, TCP_NODELAY);
    toggles(s[1], IPPROTO_TCP, TCP_NODELAY);
    toggles(s[1], SOL_SOCKET, SO_KEEPALIVE);
}

CASE(opt_keepalive_times)
{
    int s = tcp4();
    TRUE(getopt_int(s, IPPROTO_TCP, TCP_KEEPIDLE) > 0);
    TRUE(getopt_int(s, IPPROTO_TCP, TCP_KEEPINTVL) > 0);
    TRUE(getopt_int(s, IPPROTO_TCP, TCP_KEEPCNT) > 0);
    setopt_int(s, IPPROTO_TCP, TCP_KEEPIDLE, 11);
    setopt_int(s, IPPROTO_TCP, TCP_KEEPINTVL, 12);
    setopt_int(s, IPPROTO_TCP, TCP_KEEPCNT, 13);
    EQ(getopt_int(s, IPPROTO_TCP, TCP_KEEPIDLE), 11);
    EQ(getopt_int(s, IPPROTO_TCP, TCP_KEEPINTVL), 12);
    EQ(getopt_int(s, IPPROTO_TCP, TCP_KEEPCNT), 13);
    int v = 0;
    ERR(setsockopt(s, IPPROTO_TCP, TCP_KEEPIDLE, &v, sizeof v), EINVAL);
    ERR(setsockopt(s, IPPROTO_TCP, TCP_KEEPINTVL, &v, sizeof v), EINVAL);
    ERR(setsockopt(s, IPPROTO_TCP, TCP_KEEPCNT, &v, sizeof v), EINVAL);
    v = 40000;
    ERR(setsockopt(s, IPPROTO_TCP, TCP_KEEPIDLE, &v, sizeof v), EINVAL);
    ERR(setsockopt(s, IPPROTO_TCP, TCP_KEEPCNT, &v, sizeof v), EINVAL);
}

CASE(opt_user_timeout)
{
    int s = tcp4();
    EQ(getopt_int(s, IPPROTO_TCP, TCP_USER_TIMEOUT), 0);
    setopt_int(s, IPPROTO_TCP, TCP_USER_TIMEOUT, 4321);
    EQ(getopt_int(s, IPPROTO_TCP, TCP_USER_TIMEOUT), 4321);
    int v = -1;
    ERR(setsockopt(s, IPPROTO_TCP, TCP_USER_TIMEOUT, &v, sizeof v), EINVAL);
}

CASE(opt_syncnt)
{
    int s = tcp4(), v = 0;
    setopt_int(s, IPPROTO_TCP, TCP_SYNCNT, 3);
    EQ(getopt_int(s, IPPROTO_TCP, TCP_SYNCNT), 3);
    ERR(setsockopt(s, IPPROTO_TCP, TCP_SYNCNT, &v, sizeof v), EINVAL);
}

CASE(opt_linger2_and_defer)
{
    int s = tcp4();
    setopt_int(s, IPPROTO_TCP, TCP_LINGER2, 5);
    EQ(getopt_int(s, IPPROTO_TCP, TCP_LINGER2), 5);
    EQ(getopt_int(s, IPPROTO_TCP, TCP_DEFER_ACCEPT), 0);
    setopt_int(s, IPPROTO_TCP, TCP_DEFER_ACCEPT, 1);
    TRUE(getopt_int(s, IPPROTO_TCP, TCP_DEFER_ACCEPT) >= 1);
}

CASE(opt_quickack)
{
    int s[2];
    tcp_pair(s);
    setopt_int(s[0], IPPROTO_TCP, TCP_QUICKACK, 1);
    setopt_int(s[0], IPPROTO_TCP, TCP_QUICKACK, 0);
    EQ(getopt_int(s[0], IPPROTO_TCP, TCP_QUICKACK), 0);
}

CASE(opt_maxseg)
{
    int s = tcp4();
    EQ(getopt_int(s, IPPROTO_TCP, TCP_MAXSEG), 536);
    setopt_int(s, IPPROTO_TCP, TCP_MAXSEG, 1000);
    int v = 10;
    ERR(setsockopt(s, IPPROTO_TCP, TCP_MAXSEG, &v, sizeof v), EINVAL);
    int p[2];
    tcp_pair(p);
    v = getopt_int(p[0], IPPROTO_TCP, TCP_MAXSEG);
    TRUE(v >= 536 && v <= 65536);
}

CASE(opt_congestion)
{
    int s[2];
    char n[32] = "", m[32] = "";
    socklen_t l = sizeof n;
    tcp_pair(s);
    OK(getsockopt(s[0], IPPROTO_TCP, TCP_CONGESTION, n, &l));
    TRUE(l == 16 && strlen(n) > 0 && strlen(n) < 16);
    l = 3;
    OK(getsockopt(s[0], IPPROTO_TCP, TCP_CONGESTION, m, &l));
    EQ(l, 3);
    TRUE(!strncmp(n, m, 3));
    OK(setsockopt(s[0], IPPROTO_TCP, TCP_CONGESTION, n, strlen(n))); /* the one it has */
    ERR(setsockopt(s[0], IPPROTO_TCP, TCP_CONGESTION, "nosuchcc", 8), ENOENT);
    ERR(setsockopt(s[0], IPPROTO_TCP, TCP_CONGESTION, "", 0), EINVAL);
}

CASE(opt_tcp_info_states)
{
    int l = listener(AF_INET, 4), c = tcp4();
    struct tcp_info i;
    socklen_t n = sizeof i;
    OK(getsockopt(c, IPPROTO_TCP, TCP_INFO, &i, &n));
    EQ(i.tcpi_state, TCP_CLOSE);
    n = sizeof i;
    OK(getsockopt(l, IPPROTO_TCP, TCP_INFO, &i, &n));
    EQ(i.tcpi_state, TCP_LISTEN);
    OK(try_connect(c, l));
    int a = accepted(l);
    n = sizeof i;
    OK(getsockopt(a, IPPROTO_TCP, TCP_INFO, &i, &n));
    EQ(i.tcpi_state, TCP_ESTABLISHED);
    TRUE(i.tcpi_snd_mss >= 500);
    TRUE(i.tcpi_snd_cwnd > 0);
    OK(shutdown(c, SHUT_WR));
    hear_eof(a);
    n = sizeof i;
    OK(getsockopt(a, IPPROTO_TCP, TCP_INFO, &i, &n));
    EQ(i.tcpi_state, TCP_CLOSE_WAIT);
    n = 1; /* a short buffer gets the first field */
    OK(getsockopt(a, IPPROTO_TCP, TCP_INFO, &i, &n));
    EQ(n, 1);
    EQ(i.tcpi_state, TCP_CLOSE_WAIT);
}

CASE(opt_linger)
{
    int s = tcp4();
    struct linger g = {9, 9};
    socklen_t n = sizeof g;
    OK(getsockopt(s, SOL_SOCKET, SO_LINGER, &g, &n));
    EQ(n, sizeof g);
    EQ(g.l_onoff, 0);
    EQ(g.l_linger, 0);
    g = (struct linger){1, 17};
    OK(setsockopt(s, SOL_SOCKET, SO_LINGER, &g, sizeof g));
    g = (struct linger){0, 0};
    OK(getsockopt(s, SOL_SOCKET, SO_LINGER, &g, &n));
    EQ(g.l_onoff, 1);
    EQ(g.l_linger, 17);
    ERR(setsockopt(s, SOL_SOCKET, SO_LINGER, &g, 4), EINVAL);
}

CASE(opt_linger_close_waits_and_delivers)
{
    int s[2];
    struct linger g = {1, 10};
    tcp_pair(s);
    OK(setsockopt(s[0], SOL_SOCKET, SO_LINGER, &g, sizeof g));
    say(s[0], "all of it");
    OK(close(s[0]));
    hear(s[1], "all of it");
    hear_eof(s[1]);
}

CASE(opt_timeouts_get_after_set)
{
    int s = tcp4();
    struct timeval t = {9, 9};
    socklen_t n = sizeof t;
    OK(getsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &t, &n));
    EQ(t.tv_sec, 0);
    EQ(t.tv_usec, 0);
    t = (struct timeval){7, 500000};
    OK(setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t));
    OK(setsockopt(s, SOL_SOCKET, SO_SNDTIMEO, &t, sizeof t));
    t = (struct timeval){0, 0};
    OK(getsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &t, &n));
    EQ(t.tv_sec, 7);
    EQ(t.tv_usec, 500000);
    t = (struct timeval){0, 0};
    OK(getsockopt(s, SOL_SOCKET, SO_SNDTIMEO, &t, &n));
    EQ(t.tv_sec, 7);
    t = (struct timeval){0, 1000000};
    ERR(setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t), EDOM);
    ERR(setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &t, 4), EINVAL);
}

CASE(opt_rcvtimeo_eagain)
{
    int s[2];
    char b[4];
    struct timeval t = {0, 30000};
    tcp_pair(s);
    OK(setsockopt(s[1], SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t));
    ERR(recv(s[1], b, 4, 0), EAGAIN);
    ERR(read(s[1], b, 4), EAGAIN);
    say(s[0], "ab");
    EQ(recv(s[1], b, 4, MSG_WAITALL), 2); /* what came before the timeout */
}

CASE(opt_sndtimeo_eagain)
{
    int s[2];
    static char b[1 << 20];
    struct timeval t = {0, 30000};
    tcp_pair(s);
    fill_sndbuf(s[0]);
    OK(setsockopt(s[0], SOL_SOCKET, SO_SNDTIMEO, &t, sizeof t));
    ERR(send(s[0], b, sizeof b, MSG_NOSIGNAL), EAGAIN);
}

CASE(opt_sndtimeo_partial)
{
    int s[2];
    size_t n = 64 << 20;
    char *b = calloc(1, n);
    struct timeval t = {0, 100000};
    tcp_pair(s);
    OK(setsockopt(s[0], SOL_SOCKET, SO_SNDTIMEO, &t, sizeof t));
    ssize_t r = send(s[0], b, n, MSG_NOSIGNAL);
    TRUE(r > 0 && (size_t)r < n);
}

CASE(opt_rcvbuf_doubles)
{
    int s = tcp4();
    setopt_int(s, SOL_SOCKET, SO_RCVBUF, 50000);
    EQ(getopt_int(s, SOL_SOCKET, SO_RCVBUF), 100000);
    setopt_int(s, SOL_SOCKET, SO_SNDBUF, 60000);
    EQ(getopt_int(s, SOL_SOCKET, SO_SNDBUF), 120000);
}

CASE(opt_rcvbuf_smallest)
{
    int s = tcp4();
    setopt_int(s, SOL_SOCKET, SO_RCVBUF, 1);
    obs("%d", getopt_int(s, SOL_SOCKET, SO_RCVBUF));
    setopt_int(s, SOL_SOCKET, SO_SNDBUF, 1);
    obs("%d", getopt_int(s, SOL_SOCKET, SO_SNDBUF));
}

CASE(opt_buffers_have_defaults)
{
    int s[2];
    tcp_pair(s);
    TRUE(getopt_int(s[0], SOL_SOCKET, SO_RCVBUF) >= 4096);
    TRUE(getopt_int(s[0], SOL_SOCKET, SO_SNDBUF) >= 4096);
}

CASE(opt_small_buffers_carry_data)
{
    int l = bound(AF_INET, SOCK_STREAM), c = tcp4();
    setopt_int(l, SOL_SOCKET, SO_RCVBUF, 4096);
    setopt_int(c, SOL_SOCKET, SO_SNDBUF, 4096);
    OK(listen(l, 4));
    OK(try_connect(c, l));
    int a = accepted(l);
    pid_t p = fork_child();
    if (!p) {
        stream_send(c, 300000, 6, 20000);
        _exit(0);
    }
    stream_recv(a, 300000, 6, 20000);
    reap(p, 0);
}

CASE(opt_rcvlowat)
{
    int s[2];
    tcp_pair(s);
    EQ(getopt_int(s[1], SOL_SOCKET, SO_RCVLOWAT), 1);
    setopt_int(s[1], SOL_SOCKET, SO_RCVLOWAT, 4);
    EQ(getopt_int(s[1], SOL_SOCKET, SO_RCVLOWAT), 4);
    say(s[0], "ab");
    wait_bytes(s[1], 2);
    EV(poll_ms(s[1], POLLIN, 20), 0);
    say(s[0], "cd");
    EV(wait_ev(s[1], POLLIN), POLLIN);
    hear(s[1], "abcd");
    setopt_int(s[1], SOL_SOCKET, SO_RCVLOWAT, 0);
    EQ(getopt_int(s[1], SOL_SOCKET, SO_RCVLOWAT), 1);
}

CASE(opt_sndlowat_cannot_change)
{
    int s = tcp4(), v = 5;
    EQ(getopt_int(s, SOL_SOCKET, SO_SNDLOWAT), 1);
    ERR(setsockopt(s, SOL_SOCKET, SO_SNDLOWAT, &v, sizeof v), ENOPROTOOPT);
}

CASE(opt_read_only_ones)
{
    int s = tcp4(), v = 1;
    ERR(setsockopt(s, SOL_SOCKET, SO_TYPE, &v, sizeof v), ENOPROTOOPT);
    ERR(setsockopt(s, SOL_SOCKET, SO_ERROR, &v, sizeof v), ENOPROTOOPT);
    ERR(setsockopt(s, SOL_SOCKET, SO_DOMAIN, &v, sizeof v), ENOPROTOOPT);
    ERR(setsockopt(s, SOL_SOCKET, SO_PROTOCOL, &v, sizeof v), ENOPROTOOPT);
    ERR(setsockopt(s, SOL_SOCKET, SO_ACCEPTCONN, &v, sizeof v), ENOPROTOOPT);
}

CASE(opt_unknown)
{
    int s = tcp4(), v = 1;
    socklen_t n = sizeof v;
    ERR(setsockopt(s, SOL_SOCKET, 9999, &v, n), ENOPROTOOPT);
    ERR(getsockopt(s, SOL_SOCKET, 9999, &v, &n), ENOPROTOOPT);
    ERR(setsockopt(s, IPPROTO_TCP, 9999, &v, n), ENOPROTOOPT);
    ERR(getsockopt(s, IPPROTO_TCP, 9999, &v, &n), ENOPROTOOPT);
    ERR(setsockopt(s, IPPROTO_IP, 9999, &v, n), ENOPROTOOPT);
    ERR(getsockopt(s, IPPROTO_IP, 9999, &v, &n), ENOPROTOOPT);
    ERR(setsockopt(s, 12345, 1, &v, n), ENOPROTOOPT);
    ERR(getsockopt(s, 12345, 1, &v, &n), EOPNOTSUPP);
    ERR(setsockopt(s, IPPROTO_UDP, 1, &v, n), ENOPROTOOPT);
    ERR(setsockopt(s, IPPROTO_IPV6, IPV6_V6ONLY, &v, n), ENOPROTOOPT);
}

CASE(opt_set_short_length)
{
    int s = tcp4(), v = 1;
    ERR(setsockopt(s, SOL_SOCKET, SO_KEEPALIVE, &v, 3), EINVAL);
    ERR(setsockopt(s, SOL_SOCKET, SO_KEEPALIVE, &v, 0), EINVAL);
    ERR(setsockopt(s, SOL_SOCKET, SO_KEEPALIVE, &v, -1), EINVAL);
    ERR(setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &v, 1), EINVAL);
    OK(setsockopt(s, IPPROTO_TCP, TCP_NODELAY, (char[8]){1}, 8));
    EQ(getopt_int(s, IPPROTO_TCP, TCP_NODELAY), 1);
    EQ(getopt_int(s, SOL_SOCKET, SO_KEEPALIVE), 0);
}

CASE(opt_get_length)
{
    int s = tcp4();
    unsigned char b[16];
    memset(b, 0xee, sizeof b);
    socklen_t n = 16;
    OK(getsockopt(s, SOL_SOCKET, SO_TYPE, b, &n));
    EQ(n, 4);
    EQ(b[4], 0xee);
    n = 1;
    memset(b, 0xee, sizeof b);
    OK(getsockopt(s, SOL_SOCKET, SO_TYPE, b, &n));
    EQ(n, 1);
    EQ(b[0], SOCK_STREAM);
    EQ(b[1], 0xee);
    n = 0;
    OK(getsockopt(s, SOL_SOCKET, SO_TYPE, b, &n));
    EQ(n, 0);
    n = -1;
    ERR(getsockopt(s, SOL_SOCKET, SO_TYPE, b, &n), EINVAL);
    n = 4;
    ERR(getsockopt(s, SOL_SOCKET, SO_TYPE, NULL, &n), EFAULT);
    ERR(getsockopt(s, SOL_SOCKET, SO_TYPE, b, NULL), EFAULT);
    ERR(setsockopt(s, SOL_SOCKET, SO_KEEPALIVE, NULL, 4), EFAULT);
}

CASE(opt_ip_tos_ttl)
{
    int s = tcp4(), v;
    EQ(getopt_int(s, IPPROTO_IP, IP_TOS), 0);
    setopt_int(s, IPPROTO_IP, IP_TOS, 0x10);
    EQ(getopt_int(s, IPPROTO_IP, IP_TOS), 0x10);
    EQ(getopt_int(s, IPPROTO_IP, IP_TTL), 64);
    setopt_int(s, IPPROTO_IP, IP_TTL, 33);
    EQ(getopt_int(s, IPPROTO_IP, IP_TTL), 33);
    v = 300;
    ERR(setsockopt(s, IPPROTO_IP, IP_TTL, &v, sizeof v), EINVAL);
    v = 0;
    ERR(setsockopt(s, IPPROTO_IP, IP_TTL, &v, sizeof v), EINVAL);
}

CASE(opt_ip_mtu)
{
    int s[2], v;
    socklen_t n = sizeof v;
    int u = tcp4();
    ERR(getsockopt(u, IPPROTO_IP, IP_MTU, &v, &n), ENOTCONN);
    tcp_pair(s);
    TRUE(getopt_int(s[0], IPPROTO_IP, IP_MTU) >= 576);
    TRUE(getopt_int(s[0], IPPROTO_IP, IP_MTU_DISCOVER) >= 0);
}

CASE(opt_multicast_on_udp)
{
    int u = OK(socket(AF_INET, SOCK_DGRAM, 0));
    EQ(getopt_int(u, IPPROTO_IP, IP_MULTICAST_TTL), 1);
    EQ(getopt_int(u, IPPROTO_IP, IP_MULTICAST_LOOP), 1);
    setopt_int(u, IPPROTO_IP, IP_MULTICAST_TTL, 3);
    EQ(getopt_int(u, IPPROTO_IP, IP_MULTICAST_TTL), 3);
}

CASE(opt_priority_and_mark_read)
{
    int s = tcp4();
    EQ(getopt_int(s, SOL_SOCKET, SO_PRIORITY), 0);
    setopt_int(s, SOL_SOCKET, SO_PRIORITY, 3);
    EQ(getopt_int(s, SOL_SOCKET, SO_PRIORITY), 3);
    EQ(getopt_int(s, SOL_SOCKET, SO_MARK), 0);
    TRUE(getopt_int(s, SOL_SOCKET, SO_INCOMING_CPU) >= -1);
}

CASE(opt_set_before_connect_stays)
{
    int l = listener(AF_INET, 4), c = tcp4();
    setopt_int(c, IPPROTO_TCP, TCP_NODELAY, 1);
    setopt_int(c, SOL_SOCKET, SO_KEEPALIVE, 1);
    setopt_int(c, IPPROTO_TCP, TCP_KEEPIDLE, 50);
    setopt_int(c, SOL_SOCKET, SO_RCVBUF, 40000);
    OK(try_connect(c, l));
    EQ(getopt_int(c, IPPROTO_TCP, TCP_NODELAY), 1);
    EQ(getopt_int(c, SOL_SOCKET, SO_KEEPALIVE), 1);
    EQ(getopt_int(c, IPPROTO_TCP, TCP_KEEPIDLE), 50);
    EQ(getopt_int(c, SOL_SOCKET, SO_RCVBUF), 80000);
}

CASE(opt_cork_holds_and_releases)
{
    int s[2];
    tcp_pair(s);
    setopt_int(s[0], IPPROTO_TCP, TCP_CORK, 1);
    say(s[0], "abc");
    say(s[0], "def");
    setopt_int(s[0], IPPROTO_TCP, TCP_CORK, 0);
    hear(s[1], "abcdef");
    setopt_int(s[0], IPPROTO_TCP, TCP_CORK, 1);
    say(s[0], "last");
    OK(close(s[0]));
    hear(s[1], "last");
    hear_eof(s[1]);
}

CASE(opt_notsent_lowat)
{
    int s = tcp4();
    setopt_int(s, IPPROTO_TCP, TCP_NOTSENT_LOWAT, 16384);
    EQ(getopt_int(s, IPPROTO_TCP, TCP_NOTSENT_LOWAT), 16384);
}

CASE(opt_bindtodevice_empty)
{
    int s = tcp4();
    char n[32] = "?";
    socklen_t l = sizeof n;
    OK(getsockopt(s, SOL_SOCKET, SO_BINDTODEVICE, n, &l));
    EQ(l, 0);
}

CASE(opt_fastopen_queue)
{
    int l = listener(AF_INET, 4);
    setopt_int(l, IPPROTO_TCP, TCP_FASTOPEN, 5);
    EQ(getopt_int(l, IPPROTO_TCP, TCP_FASTOPEN), 5);
    connected(l);
    accepted(l);
}

CASE(opt_tcp_on_udp_socket)
{
    int u = OK(socket(AF_INET, SOCK_DGRAM, 0)), v = 1;
    socklen_t n = sizeof v;
    ERR(setsockopt(u, IPPROTO_TCP, TCP_NODELAY, &v, n), ENOPROTOOPT);
    ERR(getsockopt(u, IPPROTO_TCP, TCP_NODELAY, &v, &n), EOPNOTSUPP);
}

CASE(opt_shared_over_fork)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        setopt_int(s[0], IPPROTO_TCP, TCP_NODELAY, 1);
        struct timeval t = {0, 20000};
        OK(setsockopt(s[0], SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t));
        _exit(0);
    }
    reap(p, 0);
    EQ(getopt_int(s[0], IPPROTO_TCP, TCP_NODELAY), 1);
    ERR(recv(s[0], &(char){0}, 1, 0), EAGAIN);
}

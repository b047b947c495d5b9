/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include "socktest.h"

static int udp4(void) { return OK(socket(AF_INET, SOCK_DGRAM, 0)); }

static void send_to(int from, int to, const char *s)
{
    union addr a;
    socklen_t n = name_of(to, &a);
    EQ(sendto(from, s, strlen(s), 0, &a.sa, n), strlen(s));
}

CASE(udp_sendto_recvfrom_names)
{
    int a = bound(AF_INET, SOCK_DGRAM), b = bound(AF_INET, SOCK_DGRAM);
    union addr from, want;
    socklen_t n = sizeof from;
    char buf[16];
    send_to(a, b, "hello");
    EQ(recvfrom(b, buf, 16, 0, &from.sa, &n), 5);
    EQ(n, sizeof from.in);
    name_of(a, &want);
    TRUE(same_addr(&from, &want));
    EQ(sendto(b, "back", 4, 0, &from.sa, n), 4);
    EQ(recv(a, buf, 16, 0), 4);
}

CASE(udp_unbound_gets_a_port_when_sending)
{
    int a = udp4(), b = bound(AF_INET, SOCK_DGRAM);
    EQ(port_of(a), 0);
    send_to(a, b, "x");
    TRUE(port_of(a) != 0);
    union addr n;
    name_of(a, &n);
    EQ(n.in.sin_addr.s_addr, 0); /* still any address */
    union addr from;
    socklen_t l = sizeof from;
    char c;
    EQ(recvfrom(b, &c, 1, 0, &from.sa, &l), 1);
    EQ(ntohs(from.in.sin_port) == port_of(a), 1);
    EQ(ntohl(from.in.sin_addr.s_addr), INADDR_LOOPBACK);
}

CASE(udp_boundaries)
{
    int a = bound(AF_INET, SOCK_DGRAM), b = bound(AF_INET, SOCK_DGRAM);
    char buf[32];
    send_to(a, b, "one");
    send_to(a, b, "three");
    send_to(a, b, "seventeen");
    EQ(recv(b, buf, 32, 0), 3);
    EQ(recv(b, buf, 32, 0), 5);
    EQ(recv(b, buf, 32, 0), 9);
    ERR(recv(b, buf, 32, MSG_DONTWAIT), EAGAIN);
}

CASE(udp_truncation)
{
    int a = bound(AF_INET, SOCK_DGRAM), b = bound(AF_INET, SOCK_DGRAM);
    char buf[8] = "";
    send_to(a, b, "abcdefgh");
    send_to(a, b, "second");
    EQ(recv(b, buf, 3, 0), 3); /* the rest is lost */
    MEMEQ(buf, "abc", 3);
    EQ(recv(b, buf, 3, MSG_TRUNC), 6); /* the real length */
    MEMEQ(buf, "sec", 3);
    ERR(recv(b, buf, 3, MSG_DONTWAIT), EAGAIN);
}

CASE(udp_recvmsg_says_trunc)
{
    int a = bound(AF_INET, SOCK_DGRAM), b = bound(AF_INET, SOCK_DGRAM);
    char buf[8];
    struct iovec v = {buf, 3};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
    send_to(a, b, "abcdefgh");
    EQ(recvmsg(b, &m, 0), 3);
    EQ(m.msg_flags, MSG_TRUNC);
    send_to(a, b, "abc");
    EQ(recvmsg(b, &m, 0), 3);
    EQ(m.msg_flags, 0);
    send_to(a, b, "abcdef");
    EQ(recvmsg(b, &m, MSG_TRUNC | MSG_PEEK), 6);
    EQ(recvmsg(b, &m, MSG_TRUNC), 6);
}

CASE(udp_zero_length_datagram)
{
    int a = bound(AF_INET, SOCK_DGRAM), b = bound(AF_INET, SOCK_DGRAM);
    char buf[8];
    union addr n, from;
    socklen_t l = name_of(b, &n);
    EQ(sendto(a, NULL, 0, 0, &n.sa, l), 0);
    EV(wait_ev(b, POLLIN), POLLIN);
    l = sizeof from;
    EQ(recvfrom(b, buf, 8, 0, &from.sa, &l), 0);
    EQ(ntohs(from.in.sin_port) == port_of(a), 1);
    ERR(recv(b, buf, 8, MSG_DONTWAIT), EAGAIN);
}

CASE(udp_write_of_nothing_sends_a_datagram)
{
    int s[2];
    char b[4];
    udp_pair(AF_INET, s);
    EQ(write(s[0], "", 0), 0);
    EQ(send(s[0], "", 0, 0), 0);
    wait_ev(s[1], POLLIN);
    EQ(read(s[1], b, 4), 0);
    EQ(recv(s[1], b, 4, 0), 0);
    ERR(recv(s[1], b, 4, MSG_DONTWAIT), EAGAIN);
}

CASE(udp_peek)
{
    int s[2];
    char b[8];
    udp_pair(AF_INET, s);
    say(s[0], "abc");
    EQ(recv(s[1], b, 2, MSG_PEEK), 2);
    EQ(recv(s[1], b, 8, MSG_PEEK | MSG_TRUNC), 3);
    EQ(recv(s[1], b, 8, 0), 3);
}

CASE(udp_connected)
{
    int s[2];
    udp_pair(AF_INET, s);
    union addr a, b;
    peer_of(s[0], &a);
    name_of(s[1], &b);
    TRUE(same_addr(&a, &b));
    say(s[0], "x");
    hear(s[1], "x");
    EQ(write(s[1], "yz", 2), 2);
    hear(s[0], "yz");
}

CASE(udp_connected_gets_only_from_its_peer)
{
    int s[2], o = bound(AF_INET, SOCK_DGRAM);
    char b[8];
    udp_pair(AF_INET, s);
    send_to(o, s[1], "stranger");
    say(s[0], "peer");
    hear(s[1], "peer");
    ERR(recv(s[1], b, 8, MSG_DONTWAIT), EAGAIN);
}

CASE(udp_connected_sendto_elsewhere)
{
    int s[2], o = bound(AF_INET, SOCK_DGRAM);
    udp_pair(AF_INET, s);
    send_to(s[0], o, "other");
    hear(o, "other");
    say(s[0], "peer");
    hear(s[1], "peer");
}

CASE(udp_connect_again_and_disconnect)
{
    int a = bound(AF_INET, SOCK_DGRAM), b = bound(AF_INET, SOCK_DGRAM), s = udp4();
    OK(try_connect(s, a));
    say(s, "a");
    hear(a, "a");
    OK(try_connect(s, b));
    say(s, "b");
    hear(b, "b");
    union addr u;
    memset(&u, 0, sizeof u);
    u.sa.sa_family = AF_UNSPEC;
    OK(connect(s, &u.sa, sizeof u.sa));
    ERR(send(s, "c", 1, 0), EDESTADDRREQ);
    socklen_t n = sizeof u;
    ERR(getpeername(s, &u.sa, &n), ENOTCONN);
    send_to(s, a, "d");
    hear(a, "d");
}

CASE(udp_connect_fixes_local_address)
{
    int b = bound(AF_INET, SOCK_DGRAM), s = udp4();
    OK(try_connect(s, b));
    union addr a;
    name_of(s, &a);
    EQ(ntohl(a.in.sin_addr.s_addr), INADDR_LOOPBACK);
    TRUE(a.in.sin_port != 0);
}

CASE(udp_destination_required)
{
    int s = udp4();
    ERR(send(s, "x", 1, 0), EDESTADDRREQ);
    ERR(write(s, "x", 1), EDESTADDRREQ);
    struct iovec v = {"x", 1};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
    ERR(sendmsg(s, &m, 0), EDESTADDRREQ);
}

CASE(udp_bad_destinations)
{
    int s = udp4();
    union addr a;
    socklen_t n = loop_addr(AF_INET, 9, &a);
    ERR(sendto(s, "x", 1, 0, &a.sa, n - 1), EINVAL);
    a.in.sin_port = 0;
    ERR(sendto(s, "x", 1, 0, &a.sa, n), EINVAL);
    a.in.sin_port = htons(9);
    a.sa.sa_family = AF_UNIX;
    ERR(sendto(s, "x", 1, 0, &a.sa, n), EAFNOSUPPORT);
    a.sa.sa_family = AF_INET;
    a.in.sin_addr.s_addr = htonl(0x7fffffff);
    ERR(sendto(s, "x", 1, 0, &a.sa, n), EACCES);
    ERR(connect(s, &a.sa, n), EACCES);
}

/* A datagram to a closed port comes back as ECONNREFUSED, once. */
CASE(udp_econnrefused)
{
    int s[2];
    udp_pair(AF_INET, s);
    OK(close(s[1]));
    EQ(send(s[0], "x", 1, 0), 1);
    wait_all(s[0], POLLERR);
    EV(poll_now(s[0], POLLIN | POLLOUT), POLLOUT | POLLERR);
    ERR(recv(s[0], &(char){0}, 1, 0), ECONNREFUSED);
    ERR(recv(s[0], &(char){0}, 1, MSG_DONTWAIT), EAGAIN);
    EQ(send(s[0], "x", 1, 0), 1);
    wait_all(s[0], POLLERR);
    ERR(send(s[0], "x", 1, 0), ECONNREFUSED);
    EQ(send(s[0], "x", 1, 0), 1);
    wait_all(s[0], POLLERR);
    EQ(getopt_int(s[0], SOL_SOCKET, SO_ERROR), ECONNREFUSED);
    EQ(getopt_int(s[0], SOL_SOCKET, SO_ERROR), 0);
}

CASE(udp_unconnected_sees_no_refusal)
{
    int a = bound(AF_INET, SOCK_DGRAM), b = bound(AF_INET, SOCK_DGRAM);
    union addr n;
    socklen_t l = name_of(b, &n);
    OK(close(b));
    EQ(sendto(a, "x", 1, 0, &n.sa, l), 1);
    EV(poll_ms(a, POLLIN, 20), 0);
    EQ(sendto(a, "x", 1, 0, &n.sa, l), 1);
}

CASE(udp_refusal_wakes_blocked_recv)
{
    int s[2];
    udp_pair(AF_INET, s);
    OK(close(s[1]));
    pid_t p = fork_child();
    if (!p) {
        nap(20);
        EQ(send(s[0], "x", 1, 0), 1);
        _exit(0);
    }
    ERR(recv(s[0], &(char){0}, 1, 0), ECONNREFUSED);
    reap(p, 0);
}

CASE(udp_largest)
{
    int s[2];
    static char b[70000], r[70000];
    udp_pair(AF_INET, s);
    for (int i = 0; i < 65507; i++)
        b[i] = i * 7;
    EQ(send(s[0], b, 65507, 0), 65507);
    EQ(recv(s[1], r, sizeof r, 0), 65507);
    MEMEQ(b, r, 65507);
    ERR(send(s[0], b, 65508, 0), EMSGSIZE);
    ERR(send(s[0], b, 70000, 0), EMSGSIZE);
    ERR(recv(s[1], r, 1, MSG_DONTWAIT), EAGAIN);
}

CASE(udp_all_sizes)
{
    int s[2];
    unsigned char b[3000], r[3000];
    udp_pair(AF_INET, s);
    for (int n = 0; n <= 3000; n += n < 64 ? 1 : 97) {
        fill_pattern(b, n, 0, n);
        EQ(send(s[0], b, n, 0), n);
        EQ(recv(s[1], r, sizeof r, 0), n);
        MEMEQ(b, r, n);
    }
}

CASE(udp_fionread)
{
    int s[2], n = -1;
    udp_pair(AF_INET, s);
    OK(ioctl(s[1], FIONREAD, &n));
    EQ(n, 0);
    say(s[0], "abc");
    say(s[0], "defgh");
    wait_ev(s[1], POLLIN);
    OK(ioctl(s[1], FIONREAD, &n));
    EQ(n, 3); /* the next datagram's */
    hear(s[1], "abc");
    wait_ev(s[1], POLLIN);
    OK(ioctl(s[1], FIONREAD, &n));
    EQ(n, 5);
}

CASE(udp_poll)
{
    int s[2];
    udp_pair(AF_INET, s);
    EV(poll_now(s[0], POLLIN | POLLOUT | POLLRDHUP), POLLOUT);
    say(s[1], "x");
    EV(wait_ev(s[0], POLLIN), POLLIN);
    int u = udp4();
    EV(poll_now(u, POLLIN | POLLOUT), POLLOUT);
}

CASE(udp_epoll_et)
{
    int s[2], e = ep_new();
    udp_pair(AF_INET, s);
    ep_add(e, s[1], EPOLLIN | EPOLLET);
    EV(ep_one(e, s[1], 0), 0);
    say(s[0], "a");
    EV(ep_one(e, s[1], 15000), EPOLLIN);
    EV(ep_one(e, s[1], 20), 0);
    say(s[0], "b");
    EV(ep_one(e, s[1], 15000), EPOLLIN);
    hear(s[1], "a");
    EV(ep_one(e, s[1], 20), 0);
    hear(s[1], "b");
}

CASE(udp_epoll_lt)
{
    int s[2], e = ep_new();
    udp_pair(AF_INET, s);
    ep_add(e, s[1], EPOLLIN);
    say(s[0], "a");
    say(s[0], "b");
    EV(ep_one(e, s[1], 15000), EPOLLIN);
    hear(s[1], "a");
    EV(ep_one(e, s[1], 15000), EPOLLIN);
    hear(s[1], "b");
    EV(ep_one(e, s[1], 0), 0);
}

CASE(udp_nonblocking_and_timeout)
{
    int s = bound(AF_INET, SOCK_DGRAM);
    char b[4];
    ERR(recv(s, b, 4, MSG_DONTWAIT), EAGAIN);
    struct timeval t = {0, 20000};
    OK(setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t));
    ERR(recv(s, b, 4, 0), EAGAIN);
    set_nonblock(s, 1);
    ERR(read(s, b, 4), EAGAIN);
}

CASE(udp_recvfrom_blocks)
{
    int s[2];
    udp_pair(AF_INET, s);
    pid_t p = fork_child();
    if (!p) {
        nap(20);
        say(s[0], "x");
        _exit(0);
    }
    hear(s[1], "x");
    reap(p, 0);
}

CASE(udp_sendmmsg_recvmmsg)
{
    int s[2];
    struct mmsghdr m[5] = {0};
    struct iovec v[5];
    char b[5][16];
    udp_pair(AF_INET, s);
    for (int i = 0; i < 5; i++) {
        v[i] = (struct iovec){"abcdefgh", i + 1};
        m[i].msg_hdr.msg_iov = &v[i];
        m[i].msg_hdr.msg_iovlen = 1;
    }
    EQ(sendmmsg(s[0], m, 5, 0), 5);
    for (int i = 0; i < 5; i++)
        EQ(m[i].msg_len, i + 1);
    union addr from[5];
    for (int i = 0; i < 5; i++) {
        v[i] = (struct iovec){b[i], 16};
        m[i].msg_hdr.msg_name = &from[i];
        m[i].msg_hdr.msg_namelen = sizeof from[i];
        m[i].msg_len = 99;
    }
    EQ(recvmmsg(s[1], m, 3, 0, NULL), 3);
    EQ(recvmmsg(s[1], m + 3, 2, MSG_WAITFORONE, NULL), 2);
    for (int i = 0; i < 5; i++) {
        EQ(m[i].msg_len, i + 1);
        EQ(ntohs(from[i].in.sin_port) == port_of(s[0]), 1);
        MEMEQ(b[i], "abcdefgh", i + 1);
    }
    ERR(recvmmsg(s[1], m, 5, MSG_DONTWAIT, NULL), EAGAIN);
}

CASE(udp_recvmmsg_takes_what_is_there)
{
    int s[2];
    struct mmsghdr m[5] = {0};
    struct iovec v[5];
    char b[5][16];
    udp_pair(AF_INET, s);
    for (int i = 0; i < 5; i++) {
        v[i] = (struct iovec){b[i], 16};
        m[i].msg_hdr.msg_iov = &v[i];
        m[i].msg_hdr.msg_iovlen = 1;
    }
    say(s[0], "a");
    say(s[0], "bb");
    wait_ev(s[1], POLLIN);
    /* The second is on its way: nothing tells how many wait, and only a busy
     * machine takes this long. */
    nap(50);
    EQ(recv(s[1], b[0], 16, MSG_PEEK), 1);
    EQ(recvmmsg(s[1], m, 5, MSG_DONTWAIT, NULL), 2);
    say(s[0], "c");
    EQ(recvmmsg(s[1], m, 5, MSG_WAITFORONE, NULL), 1);
}

CASE(udp_sendmsg_iov)
{
    int a = bound(AF_INET, SOCK_DGRAM), b = bound(AF_INET, SOCK_DGRAM);
    union addr n, from;
    socklen_t l = name_of(b, &n);
    struct iovec v[3] = {{"ab", 2}, {"", 0}, {"cde", 3}};
    struct msghdr m = {.msg_name = &n, .msg_namelen = l, .msg_iov = v, .msg_iovlen = 3};
    EQ(sendmsg(a, &m, 0), 5);
    char x[2], y[8];
    struct iovec w[2] = {{x, 2}, {y, 8}};
    m = (struct msghdr){.msg_name = &from, .msg_namelen = sizeof from, .msg_iov = w, .msg_iovlen = 2};
    EQ(recvmsg(b, &m, 0), 5);
    EQ(m.msg_namelen, sizeof from.in);
    EQ(m.msg_controllen, 0);
    MEMEQ(x, "ab", 2);
    MEMEQ(y, "cde", 3);
    name_of(a, &n);
    TRUE(same_addr(&n, &from));
}

CASE(udp_pktinfo)
{
    int a = bound(AF_INET, SOCK_DGRAM), b = bound(AF_INET, SOCK_DGRAM);
    setopt_int(b, IPPROTO_IP, IP_PKTINFO, 1);
    send_to(a, b, "x");
    char buf[4], cb[128];
    struct iovec v = {buf, 4};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = cb, .msg_controllen = sizeof cb};
    EQ(recvmsg(b, &m, 0), 1);
    struct cmsghdr *c = CMSG_FIRSTHDR(&m);
    TRUE(c && c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_PKTINFO);
    struct in_pktinfo i;
    memcpy(&i, CMSG_DATA(c), sizeof i);
    EQ(ntohl(i.ipi_addr.s_addr), INADDR_LOOPBACK);
}

/* Receives one datagram and notes its control messages: level, type, and the value if it is an int (a time is none). */
static void control_of(int fd, size_t room)
{
    _Alignas(8) char buf[4], cb[512];
    struct iovec v = {buf, 4};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = room ? cb : NULL, .msg_controllen = room};
    EQ(recvmsg(fd, &m, 0), 1);
    obs(m.msg_flags & MSG_CTRUNC ? "CTRUNC" : "whole");
    obs("%zu", m.msg_controllen);
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c)) {
        int value = 0;
        size_t n = c->cmsg_len - CMSG_LEN(0);
        if (n <= sizeof value && c->cmsg_level != SOL_SOCKET)
            memcpy(&value, CMSG_DATA(c), n);
        obs("%d/%d/%zu/%d", c->cmsg_level, c->cmsg_type, n, value);
    }
}

static void ask_for_control(int fd)
{
    setopt_int(fd, IPPROTO_IP, IP_PKTINFO, 1);
    setopt_int(fd, IPPROTO_IP, IP_RECVTTL, 1);
    setopt_int(fd, IPPROTO_IP, IP_RECVTOS, 1);
    setopt_int(fd, SOL_SOCKET, SO_TIMESTAMPNS, 1);
}

CASE(udp_control_received)
{
    int a = bound(AF_INET, SOCK_DGRAM), b = bound(AF_INET, SOCK_DGRAM);
    setopt_int(a, IPPROTO_IP, IP_TTL, 77);
    setopt_int(a, IPPROTO_IP, IP_TOS, 0x10);
    send_to(a, b, "x");
    control_of(b, 512); /* nothing was asked for */
    ask_for_control(b);
    for (int i = 0; i < 6; i++)
        send_to(a, b, "x");
    control_of(b, 512);
    control_of(b, 0);
    control_of(b, 8);
    control_of(b, 20); /* cut in the first one */
    control_of(b, CMSG_SPACE(16) + CMSG_LEN(4));
    control_of(b, CMSG_SPACE(16) + CMSG_SPACE(12) + 3);
}

CASE(udp_control_of_a_stamped_time)
{
    int a = bound(AF_INET, SOCK_DGRAM), b = bound(AF_INET, SOCK_DGRAM);
    setopt_int(b, SOL_SOCKET, SO_TIMESTAMP, 1);
    struct timespec before, after;
    OK(clock_gettime(CLOCK_REALTIME, &before));
    send_to(a, b, "x");
    _Alignas(8) char buf[4], cb[128];
    struct iovec v = {buf, 4};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = cb, .msg_controllen = sizeof cb};
    EQ(recvmsg(b, &m, 0), 1);
    OK(clock_gettime(CLOCK_REALTIME, &after));
    struct cmsghdr *c = CMSG_FIRSTHDR(&m);
    TRUE(c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SO_TIMESTAMP);
    struct timeval t;
    memcpy(&t, CMSG_DATA(c), sizeof t);
    TRUE(t.tv_sec >= before.tv_sec - 1 && t.tv_sec <= after.tv_sec + 1);
}

CASE(udp_control_received_v6)
{
    need_ipv6();
    int a = bound(AF_INET6, SOCK_DGRAM), b = bound(AF_INET6, SOCK_DGRAM);
    setopt_int(b, IPPROTO_IPV6, IPV6_RECVPKTINFO, 1);
    setopt_int(b, IPPROTO_IPV6, IPV6_RECVHOPLIMIT, 1);
    setopt_int(b, IPPROTO_IPV6, IPV6_RECVTCLASS, 1);
    setopt_int(a, IPPROTO_IPV6, IPV6_UNICAST_HOPS, 33);
    send_to(a, b, "x");
    control_of(b, 512);
}

static ssize_t send_control(int from, const union addr *to, socklen_t n, const char *s, void *cb, size_t len)
{
    struct iovec v = {(void *)s, strlen(s)};
    struct msghdr m = {.msg_name = (void *)&to->sa, .msg_namelen = n, .msg_iov = &v, .msg_iovlen = 1};
    m.msg_control = cb;
    m.msg_controllen = len;
    return sendmsg(from, &m, 0);
}

static size_t add_control(char *cb, size_t at, int level, int type, const void *data, size_t n)
{
    struct cmsghdr *c = (struct cmsghdr *)(cb + at);
    c->cmsg_len = CMSG_LEN(n);
    c->cmsg_level = level;
    c->cmsg_type = type;
    memcpy(CMSG_DATA(c), data, n);
    return at + CMSG_SPACE(n);
}

CASE(udp_control_sent)
{
    int a = udp4(), b = bound(AF_INET, SOCK_DGRAM), ttl = 9, tos = 0x10;
    _Alignas(8) char cb[256] = {0};
    union addr to, from;
    socklen_t n = name_of(b, &to), l = sizeof from;
    struct in_pktinfo i = {0};
    char buf[8];
    i.ipi_spec_dst.s_addr = htonl(0x7f000002);
    size_t at = add_control(cb, 0, IPPROTO_IP, IP_PKTINFO, &i, sizeof i);
    at = add_control(cb, at, IPPROTO_IP, IP_TTL, &ttl, sizeof ttl);
    at = add_control(cb, at, IPPROTO_IP, IP_TOS, &tos, sizeof tos);
    setopt_int(b, IPPROTO_IP, IP_RECVTTL, 1);
    setopt_int(b, IPPROTO_IP, IP_RECVTOS, 1);
    EQ(send_control(a, &to, n, "x", cb, at), 1);
    control_of(b, 512);
    EQ(send_control(a, &to, n, "yz", cb, at), 2);
    EQ(recvfrom(b, buf, 8, 0, &from.sa, &l), 2);
    EQ(ntohl(from.in.sin_addr.s_addr), 0x7f000002);
    send_to(a, b, "x"); /* the socket's own again */
    control_of(b, 512);
}

CASE(udp_control_sent_v6)
{
    need_ipv6();
    int a = OK(socket(AF_INET6, SOCK_DGRAM, 0)), b = bound(AF_INET6, SOCK_DGRAM), hops = 9;
    _Alignas(8) char cb[256] = {0};
    union addr to;
    socklen_t n = name_of(b, &to);
    struct in6_pktinfo i = {.ipi6_addr = IN6ADDR_LOOPBACK_INIT};
    size_t at = add_control(cb, 0, IPPROTO_IPV6, IPV6_PKTINFO, &i, sizeof i);
    at = add_control(cb, at, IPPROTO_IPV6, IPV6_HOPLIMIT, &hops, sizeof hops);
    setopt_int(b, IPPROTO_IPV6, IPV6_RECVHOPLIMIT, 1);
    EQ(send_control(a, &to, n, "x", cb, at), 1);
    control_of(b, 512);
}

CASE(udp_control_that_is_wrong)
{
    int a = udp4(), b = bound(AF_INET, SOCK_DGRAM), v = 1;
    _Alignas(8) char cb[256] = {0};
    union addr to;
    socklen_t n = name_of(b, &to);
    size_t at = add_control(cb, 0, IPPROTO_IP, IP_TTL, &v, sizeof v);
    ERR(send_control(a, &to, n, "x", cb, CMSG_LEN(4) - 1), EINVAL);
    EQ(send_control(a, &to, n, "x", cb, 15), 1); /* too short to be one */
    add_control(cb, 0, IPPROTO_IP, 99, &v, sizeof v);
    ERR(send_control(a, &to, n, "x", cb, at), EINVAL);
    add_control(cb, 0, IPPROTO_IP, IP_PKTINFO, &v, sizeof v);
    ERR(send_control(a, &to, n, "x", cb, at), EINVAL);
    add_control(cb, 0, SOL_SOCKET, 99, &v, sizeof v);
    ERR(send_control(a, &to, n, "x", cb, at), EINVAL);
    add_control(cb, 0, IPPROTO_TCP, 1, &v, sizeof v); /* another level is not looked at */
    EQ(send_control(a, &to, n, "x", cb, at), 1);
    ERR(send_control(a, &to, n, "x", NULL, at), EFAULT);
    hear(b, "x");
    hear(b, "x");
    ERR(recv(b, cb, 8, MSG_DONTWAIT), EAGAIN);
}

/* What an ICMP message says of a datagram, with the datagram. */
CASE(udp_error_queue)
{
    int s = udp4(), gone = bound(AF_INET, SOCK_DGRAM);
    _Alignas(8) char buf[16], cb[256];
    union addr to, name;
    socklen_t n = name_of(gone, &to);
    OK(close(gone));
    struct iovec v = {buf, sizeof buf};
    struct msghdr m = {.msg_name = &name, .msg_namelen = sizeof name, .msg_iov = &v, .msg_iovlen = 1};
    m.msg_control = cb;
    m.msg_controllen = sizeof cb;
    setopt_int(s, IPPROTO_IP, IP_RECVERR, 1);
    ERR(recvmsg(s, &m, MSG_ERRQUEUE), EAGAIN);
    for (int i = 0; i < 2; i++) {
        m.msg_namelen = sizeof name;
        m.msg_controllen = sizeof cb;
        EQ(sendto(s, "lost", 4, 0, &to.sa, n), 4);
        wait_all(s, POLLERR);
        EQ(recvmsg(s, &m, MSG_ERRQUEUE), 4);
        MEMEQ(buf, "lost", 4);
        EQ(m.msg_flags, MSG_ERRQUEUE);
        TRUE(same_addr(&name, &to));
        struct cmsghdr *c = CMSG_FIRSTHDR(&m);
        TRUE(c && c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_RECVERR);
        unsigned e[4];
        memcpy(e, CMSG_DATA(c), sizeof e);
        EQ(e[0], ECONNREFUSED);
        obs("%zu", m.msg_controllen);
        EV(poll_now(s, POLLIN), 0);
        ERR(recvmsg(s, &m, MSG_ERRQUEUE), EAGAIN);
    }
    ERR(recv(s, buf, 4, MSG_DONTWAIT), EAGAIN); /* the error went with it */
}

CASE(udp_control_segments)
{
    int a = udp4(), b = bound(AF_INET, SOCK_DGRAM);
    _Alignas(8) char cb[64] = {0};
    union addr to;
    socklen_t n = name_of(b, &to);
    unsigned short size = 3;
    size_t at = add_control(cb, 0, 17 /* SOL_UDP */, 103 /* UDP_SEGMENT */, &size, sizeof size);
    EQ(send_control(a, &to, n, "abcdefgh", cb, at), 8);
    hear(b, "abc");
    hear(b, "def");
    hear(b, "gh");
}

CASE(udp_broadcast_needs_option)
{
    int s = udp4();
    union addr a;
    socklen_t n = loop_addr(AF_INET, 9, &a);
    a.in.sin_addr.s_addr = htonl(0x7fffffff); /* loopback's broadcast */
    ERR(sendto(s, "x", 1, 0, &a.sa, n), EACCES);
    setopt_int(s, SOL_SOCKET, SO_BROADCAST, 1);
    EQ(sendto(s, "x", 1, 0, &a.sa, n), 1);
}

CASE(udp_bind_rules)
{
    int a = bound(AF_INET, SOCK_DGRAM), b = udp4();
    union addr n;
    socklen_t l = name_of(a, &n);
    TRUE(n.in.sin_port != 0);
    ERR(bind(b, &n.sa, l), EADDRINUSE);
    OK(close(a));
    OK(bind(b, &n.sa, l));
    ERR(bind(b, &n.sa, l), EINVAL);
}

CASE(udp_reuseport)
{
    int a = udp4(), b = udp4();
    union addr n;
    setopt_int(a, SOL_SOCKET, SO_REUSEPORT, 1);
    setopt_int(b, SOL_SOCKET, SO_REUSEPORT, 1);
    OK(bind(a, &n.sa, loop_addr(AF_INET, 0, &n)));
    socklen_t l = name_of(a, &n);
    OK(bind(b, &n.sa, l));
    int s = udp4();
    OK(connect(s, &n.sa, l));
    say(s, "x");
    struct pollfd p[2] = {{a, POLLIN, 0}, {b, POLLIN, 0}};
    EQ(poll(p, 2, 15000), 1);
    hear(p[0].revents ? a : b, "x");
}

CASE(udp_shutdown)
{
    int s[2], u = udp4();
    char b[4];
    udp_pair(AF_INET, s);
    ERR(shutdown(u, SHUT_RDWR), ENOTCONN);
    OK(shutdown(s[0], SHUT_WR));
    ERR(send(s[0], "x", 1, MSG_NOSIGNAL), EPIPE);
    say(s[1], "still");
    hear(s[0], "still");
    OK(shutdown(s[0], SHUT_RD));
    EQ(recv(s[0], b, 4, 0), 0);
}

CASE(udp_calls_of_streams)
{
    int s = bound(AF_INET, SOCK_DGRAM);
    ERR(listen(s, 1), EOPNOTSUPP);
    ERR(accept(s, NULL, NULL), EOPNOTSUPP);
    ERR(send(s, "x", 1, MSG_OOB), EOPNOTSUPP);
}

CASE(udp_over_fork)
{
    int s[2];
    udp_pair(AF_INET, s);
    pid_t p = fork_child();
    if (!p) {
        hear(s[1], "to child");
        say(s[1], "from child");
        _exit(0);
    }
    say(s[0], "to child");
    hear(s[0], "from child");
    reap(p, 0);
    say(s[0], "x");
    hear(s[1], "x");
}

CASE(udp_to_itself)
{
    int s = bound(AF_INET, SOCK_DGRAM);
    send_to(s, s, "me");
    hear(s, "me");
}

CASE(udp_1000_in_order)
{
    int s[2], v;
    udp_pair(AF_INET, s);
    for (int i = 0; i < 1000; i++) {
        EQ(send(s[0], &i, sizeof i, 0), sizeof i);
        if (i % 20 == 19)
            for (int k = i - 19; k <= i; k++) {
                EQ(recv(s[1], &v, sizeof v, 0), sizeof v);
                EQ(v, k);
            }
    }
}

CASE(udp_many_senders)
{
    int r = bound(AF_INET, SOCK_DGRAM), s[20];
    for (int i = 0; i < 20; i++) {
        s[i] = bound(AF_INET, SOCK_DGRAM);
        send_to(s[i], r, "q");
    }
    for (int i = 0; i < 20; i++) {
        union addr a;
        socklen_t n = sizeof a;
        char c;
        EQ(recvfrom(r, &c, 1, 0, &a.sa, &n), 1);
        EQ(ntohs(a.in.sin_port) == port_of(s[i]), 1);
        EQ(sendto(r, "a", 1, 0, &a.sa, n), 1);
    }
    for (int i = 0; i < 20; i++)
        hear(s[i], "a");
}

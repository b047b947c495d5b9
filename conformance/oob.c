/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Urgent data. */
#include "socktest.h"

CASE(oob_receive)
{
    int s[2];
    char c = 0;
    tcp_pair(s);
    EQ(send(s[0], "!", 1, MSG_OOB), 1);
    wait_all(s[1], POLLPRI);
    EQ(recv(s[1], &c, 1, MSG_OOB), 1);
    EQ(c, '!');
    ERR(recv(s[1], &c, 1, MSG_OOB), EINVAL); /* once */
}

CASE(oob_none_there)
{
    int s[2];
    char c;
    tcp_pair(s);
    ERR(recv(s[1], &c, 1, MSG_OOB), EINVAL);
}

CASE(oob_is_out_of_the_stream)
{
    int s[2];
    char b[8];
    tcp_pair(s);
    say(s[0], "ab");
    EQ(send(s[0], "!", 1, MSG_OOB), 1);
    say(s[0], "cd");
    wait_all(s[1], POLLPRI);
    EQ(recv(s[1], b, 8, 0), 2); /* stops at the mark */
    MEMEQ(b, "ab", 2);
    EQ(recv(s[1], b, 1, MSG_OOB), 1);
    EQ(b[0], '!');
    hear(s[1], "cd");
}

CASE(oob_last_byte_of_a_longer_send_is_urgent)
{
    int s[2];
    char b[8];
    tcp_pair(s);
    EQ(send(s[0], "abc", 3, MSG_OOB), 3);
    wait_all(s[1], POLLPRI);
    EQ(recv(s[1], b, 8, MSG_OOB), 1);
    EQ(b[0], 'c');
    hear(s[1], "ab");
}

CASE(oob_poll_events)
{
    int s[2], e = ep_new();
    char c;
    tcp_pair(s);
    ep_add(e, s[1], EPOLLPRI);
    EV(ep_one(e, s[1], 0), 0);
    EQ(send(s[0], "!", 1, MSG_OOB), 1);
    EV(ep_one(e, s[1], 15000), EPOLLPRI);
    EV(poll_now(s[1], POLLPRI), POLLPRI);
    fd_set x;
    FD_ZERO(&x);
    FD_SET(s[1], &x);
    EQ(select(s[1] + 1, NULL, NULL, &x, NULL), 1);
    EQ(recv(s[1], &c, 1, MSG_OOB), 1);
    EV(poll_now(s[1], POLLPRI), 0);
}

CASE(oob_inline)
{
    int s[2];
    char b[8];
    tcp_pair(s);
    setopt_int(s[1], SOL_SOCKET, SO_OOBINLINE, 1);
    say(s[0], "ab");
    EQ(send(s[0], "!", 1, MSG_OOB), 1);
    say(s[0], "cd");
    wait_all(s[1], POLLPRI);
    ERR(recv(s[1], b, 1, MSG_OOB), EINVAL);
    EQ(recv(s[1], b, 8, 0), 2);
    hear(s[1], "!cd");
}

CASE(oob_siocatmark)
{
    int s[2], m = -1;
    char b[8];
    tcp_pair(s);
    OK(ioctl(s[1], SIOCATMARK, &m));
    EQ(m, 0);
    say(s[0], "ab");
    EQ(send(s[0], "!", 1, MSG_OOB), 1);
    wait_all(s[1], POLLPRI);
    OK(ioctl(s[1], SIOCATMARK, &m));
    EQ(m, 0);
    EQ(recv(s[1], b, 8, 0), 2);
    OK(ioctl(s[1], SIOCATMARK, &m));
    EQ(m, 1);
    EQ(sockatmark(s[1]), 1);
}

CASE(oob_sigurg)
{
    int s[2];
    tcp_pair(s);
    on_signal(SIGURG, SA_RESTART);
    OK(fcntl(s[1], F_SETOWN, getpid()));
    EQ(send(s[0], "!", 1, MSG_OOB), 1);
    wait_all(s[1], POLLPRI);
    for (int i = 0; i < 5000 && !sig_count; i++)
        nap(1);
    TRUE(sig_count >= 1);
}

/* Each of many is told of, at its own place. */
CASE(oob_many)
{
    int s[2];
    char b[8], want;
    tcp_pair(s);
    for (int i = 0; i < 50; i++) {
        want = 'a' + i % 26;
        say(s[0], "xyz");
        EQ(send(s[0], &want, 1, MSG_OOB), 1);
        say(s[0], "12");
        wait_all(s[1], POLLPRI);
        EQ(recv(s[1], b, 1, MSG_OOB), 1);
        EQ(b[0], want);
        recv_all(s[1], b, 3);
        MEMEQ(b, "xyz", 3);
        EQ(sockatmark(s[1]), 1);
        recv_all(s[1], b, 2);
        MEMEQ(b, "12", 2);
        EQ(sockatmark(s[1]), 0);
    }
}

CASE(oob_sigio)
{
    int s[2], l = listener(AF_INET, 4);
    char c;
    tcp_pair(s);
    on_signal(SIGIO, SA_RESTART);
    OK(fcntl(s[1], F_SETOWN, getpid()));
    OK(fcntl(s[1], F_SETFL, O_ASYNC | O_NONBLOCK));
    EQ(fcntl(s[1], F_GETFL) & (O_ASYNC | O_NONBLOCK), O_ASYNC | O_NONBLOCK);
    for (int n = 0; n < 1000; n++) {
        sig_count = 0;
        say(s[0], "!");
        for (int i = 0; i < 5000 && !sig_count; i++)
            nap(1);
        TRUE(sig_count >= 1);
        wait_ev(s[1], POLLIN);
        EQ(recv(s[1], &c, 1, 0), 1);
    }
    int on = 1, me = getpid();
    OK(ioctl(l, SIOCSPGRP, &me));
    OK(ioctl(l, FIOASYNC, &on));
    sig_count = 0;
    connected(l);
    for (int i = 0; i < 5000 && !sig_count; i++)
        nap(1);
    TRUE(sig_count >= 1);
}

CASE(oob_udp_refuses)
{
    int s[2];
    udp_pair(AF_INET, s);
    ERR(send(s[0], "x", 1, MSG_OOB), EOPNOTSUPP);
    say(s[0], "x");
    char c;
    EQ(recv(s[1], &c, 1, MSG_OOB), 1); /* receiving ignores the flag */
}

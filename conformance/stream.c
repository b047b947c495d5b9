/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Connected TCP: data, shutdown, close, reset. */
#include "socktest.h"

CASE(stream_send_recv)
{
    int s[2];
    tcp_pair(s);
    EQ(send(s[0], "hello", 5, 0), 5);
    hear(s[1], "hello");
    EQ(send(s[1], "world!", 6, 0), 6);
    hear(s[0], "world!");
}

CASE(stream_read_write)
{
    int s[2];
    char b[16];
    tcp_pair(s);
    EQ(write(s[0], "abc", 3), 3);
    EQ(read(s[1], b, sizeof b), 3);
    MEMEQ(b, "abc", 3);
}

CASE(stream_short_read_leaves_the_rest)
{
    int s[2];
    char b[16];
    tcp_pair(s);
    say(s[0], "abcdef");
    wait_bytes(s[1], 6);
    EQ(recv(s[1], b, 2, 0), 2);
    EQ(recv(s[1], b + 2, 16 - 2, 0), 4);
    MEMEQ(b, "abcdef", 6);
}

CASE(stream_no_message_boundaries)
{
    int s[2];
    char b[16];
    tcp_pair(s);
    say(s[0], "ab");
    say(s[0], "cd");
    say(s[0], "ef");
    wait_bytes(s[1], 6);
    EQ(recv(s[1], b, 16, 0), 6);
    MEMEQ(b, "abcdef", 6);
}

CASE(stream_zero_length_send_is_nothing)
{
    int s[2];
    char b[4];
    tcp_pair(s);
    EQ(send(s[0], "", 0, 0), 0);
    EQ(write(s[0], "", 0), 0);
    ERR(recv(s[1], b, 4, MSG_DONTWAIT), EAGAIN);
    say(s[0], "x");
    hear(s[1], "x");
}

/* read() of nothing returns at once; recv() of nothing waits for data. */
CASE(stream_zero_length_read_and_recv)
{
    int s[2];
    char b[4];
    tcp_pair(s);
    EQ(read(s[1], b, 0), 0);
    ERR(recv(s[1], b, 0, MSG_DONTWAIT), EAGAIN);
    say(s[0], "x");
    wait_bytes(s[1], 1);
    EQ(recv(s[1], b, 0, MSG_DONTWAIT), 0);
    hear(s[1], "x");
}

CASE(stream_peek)
{
    int s[2];
    char b[8] = "";
    tcp_pair(s);
    say(s[0], "abc");
    wait_bytes(s[1], 3);
    EQ(recv(s[1], b, 8, MSG_PEEK), 3);
    EQ(recv(s[1], b, 2, MSG_PEEK), 2);
    EQ(recv(s[1], b, 8, MSG_PEEK), 3);
    EQ(recv(s[1], b, 8, 0), 3);
    MEMEQ(b, "abc", 3);
    ERR(recv(s[1], b, 8, MSG_PEEK | MSG_DONTWAIT), EAGAIN);
}

CASE(stream_peek_waits)
{
    int s[2];
    char b[8];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        nap(20);
        say(s[0], "abc");
        _exit(0);
    }
    EQ(recv(s[1], b, 1, MSG_PEEK), 1);
    hear(s[1], "abc");
    reap(p, 0);
}

CASE(stream_peek_then_eof)
{
    int s[2];
    char b[8];
    tcp_pair(s);
    say(s[0], "abc");
    OK(close(s[0]));
    wait_bytes(s[1], 3);
    EQ(recv(s[1], b, 8, MSG_PEEK), 3);
    hear(s[1], "abc");
    EQ(recv(s[1], b, 8, MSG_PEEK), 0);
    hear_eof(s[1]);
}

CASE(stream_waitall)
{
    int s[2];
    char b[8];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        for (int i = 0; i < 6; i++) {
            EQ(send(s[0], "abcdef" + i, 1, 0), 1);
            nap(2);
        }
        _exit(0);
    }
    EQ(recv(s[1], b, 6, MSG_WAITALL), 6);
    MEMEQ(b, "abcdef", 6);
    reap(p, 0);
}

CASE(stream_waitall_ends_at_eof)
{
    int s[2];
    char b[8];
    tcp_pair(s);
    say(s[0], "abc");
    OK(shutdown(s[0], SHUT_WR));
    EQ(recv(s[1], b, 8, MSG_WAITALL), 3);
    EQ(recv(s[1], b, 8, MSG_WAITALL), 0);
}

CASE(stream_waitall_nonblocking_returns_what_is_there)
{
    int s[2];
    char b[8];
    tcp_pair(s);
    say(s[0], "abc");
    wait_bytes(s[1], 3);
    EQ(recv(s[1], b, 8, MSG_WAITALL | MSG_DONTWAIT), 3);
    ERR(recv(s[1], b, 8, MSG_WAITALL | MSG_DONTWAIT), EAGAIN);
}

/* On TCP, MSG_TRUNC throws bytes away without copying them. */
CASE(stream_msg_trunc_discards)
{
    int s[2];
    char b[8] = "zzzz";
    tcp_pair(s);
    say(s[0], "abcdef");
    wait_bytes(s[1], 6);
    EQ(recv(s[1], b, 4, MSG_TRUNC), 4);
    MEMEQ(b, "zzzz", 4);
    hear(s[1], "ef");
}

CASE(stream_msg_more_is_delivered)
{
    int s[2];
    tcp_pair(s);
    EQ(send(s[0], "abc", 3, MSG_MORE), 3);
    EQ(send(s[0], "def", 3, 0), 3);
    hear(s[1], "abcdef");
}

CASE(stream_half_close_other_way_works)
{
    int s[2];
    tcp_pair(s);
    say(s[0], "request");
    OK(shutdown(s[0], SHUT_WR));
    hear(s[1], "request");
    hear_eof(s[1]);
    hear_eof(s[1]);
    for (int i = 0; i < 100; i++)
        say(s[1], "answer");
    for (int i = 0; i < 100; i++)
        hear(s[0], "answer");
    OK(close(s[1]));
    hear_eof(s[0]);
}

CASE(stream_half_close_big_answer)
{
    int s[2];
    tcp_pair(s);
    OK(shutdown(s[0], SHUT_WR));
    hear_eof(s[1]);
    pid_t p = fork_child();
    if (!p) {
        stream_send(s[1], 4 << 20, 5, 50000);
        _exit(0);
    }
    OK(close(s[1]));
    stream_recv(s[0], 4 << 20, 5, 50000);
    hear_eof(s[0]);
    reap(p, 0);
}

CASE(stream_shutdown_wr_then_send_is_epipe)
{
    int s[2];
    tcp_pair(s);
    OK(shutdown(s[0], SHUT_WR));
    ERR(send(s[0], "x", 1, MSG_NOSIGNAL), EPIPE);
    say(s[1], "back");
    hear(s[0], "back");
}

CASE(stream_shutdown_rd_reads_eof)
{
    int s[2];
    tcp_pair(s);
    OK(shutdown(s[0], SHUT_RD));
    hear_eof(s[0]);
    EV(poll_now(s[0], POLLIN | POLLOUT | POLLRDHUP), POLLIN | POLLOUT | POLLRDHUP);
    say(s[0], "other way");
    hear(s[1], "other way");
    ERR(recv(s[1], &(char){0}, 1, MSG_DONTWAIT), EAGAIN);
}

/* Linux keeps receiving after SHUT_RD; only "nothing there" turns into EOF. */
CASE(stream_shutdown_rd_data_is_still_readable)
{
    int s[2];
    tcp_pair(s);
    OK(shutdown(s[0], SHUT_RD));
    say(s[1], "late");
    wait_bytes(s[0], 4);
    hear(s[0], "late");
    hear_eof(s[0]);
}

CASE(stream_shutdown_rd_wakes_reader)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        hear_eof(s[0]);
        _exit(0);
    }
    nap(20);
    OK(shutdown(s[0], SHUT_RD));
    reap(p, 0);
}

CASE(stream_shutdown_rdwr)
{
    int s[2];
    tcp_pair(s);
    OK(shutdown(s[0], SHUT_RDWR));
    hear_eof(s[0]);
    ERR(send(s[0], "x", 1, MSG_NOSIGNAL), EPIPE);
    hear_eof(s[1]);
    EV(poll_now(s[0], POLLIN | POLLOUT | POLLRDHUP),
       POLLIN | POLLOUT | POLLHUP | POLLRDHUP);
}

CASE(stream_shutdown_wr_twice)
{
    int s[2];
    tcp_pair(s);
    EQ(shutdown(s[0], SHUT_WR), 0);
    EQ(shutdown(s[0], SHUT_WR), 0);
    EQ(shutdown(s[0], SHUT_RD), 0);
    hear_eof(s[1]);
}

CASE(stream_shutdown_bad_how)
{
    int s[2];
    tcp_pair(s);
    ERR(shutdown(s[0], 3), EINVAL);
    ERR(shutdown(s[0], -1), EINVAL);
    say(s[0], "x");
    hear(s[1], "x");
}

CASE(stream_shutdown_unconnected)
{
    int s = OK(socket(AF_INET, SOCK_STREAM, 0));
    ERR(shutdown(s, SHUT_WR), ENOTCONN);
    ERR(shutdown(s, SHUT_RD), ENOTCONN);
    ERR(shutdown(s, SHUT_RDWR), ENOTCONN);
}

CASE(stream_shutdown_after_both_ended)
{
    int s[2];
    tcp_pair(s);
    OK(shutdown(s[0], SHUT_WR));
    hear_eof(s[1]);
    OK(shutdown(s[1], SHUT_WR));
    hear_eof(s[0]);
    wait_all(s[1], POLLHUP);
    ERR(shutdown(s[1], SHUT_RDWR), ENOTCONN);
}

CASE(stream_close_with_data_then_eof)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        stream_send(s[0], 1 << 20, 3, 30000);
        _exit(0);
    }
    OK(close(s[0]));
    stream_recv(s[1], 1 << 20, 3, 30000);
    hear_eof(s[1]);
    hear_eof(s[1]);
    reap(p, 0);
}

CASE(stream_close_at_once_after_send)
{
    for (int i = 0; i < 20; i++) {
        int s[2];
        tcp_pair(s);
        stream_send(s[0], 30000, i, 30000);
        OK(close(s[0]));
        stream_recv(s[1], 30000, i, 30000);
        hear_eof(s[1]);
        OK(close(s[1]));
    }
}

CASE(stream_close_unread_data_resets)
{
    int s[2];
    tcp_pair(s);
    say(s[0], "unread");
    wait_bytes(s[1], 6);
    OK(close(s[1]));
    wait_all(s[0], POLLERR | POLLHUP);
    ERR(recv(s[0], &(char){0}, 1, 0), ECONNRESET);
    hear_eof(s[0]);
    ERR(send(s[0], "x", 1, MSG_NOSIGNAL), EPIPE);
}

CASE(stream_shutdown_wr_keeps_unread_data)
{
    int s[2];
    tcp_pair(s);
    say(s[0], "data");
    wait_bytes(s[1], 4);
    OK(shutdown(s[1], SHUT_WR));
    hear_eof(s[0]);
    hear(s[1], "data");
    say(s[0], "more");
    hear(s[1], "more");
}

CASE(stream_linger0_close_resets)
{
    int s[2];
    tcp_pair(s);
    linger0_close(s[0]);
    wait_all(s[1], POLLERR | POLLHUP);
    EV(poll_now(s[1], POLLIN | POLLOUT | POLLRDHUP),
       POLLIN | POLLOUT | POLLERR | POLLHUP | POLLRDHUP);
    ERR(recv(s[1], &(char){0}, 1, 0), ECONNRESET);
    hear_eof(s[1]);
}

CASE(stream_reset_wakes_blocked_reader)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        OK(close(s[0]));
        ERR(recv(s[1], &(char){0}, 1, 0), ECONNRESET);
        _exit(0);
    }
    nap(20);
    linger0_close(s[0]);
    reap(p, 0);
}

CASE(stream_reset_discards_unread_data_error_first)
{
    int s[2];
    tcp_pair(s);
    say(s[0], "abc");
    wait_bytes(s[1], 3);
    linger0_close(s[0]);
    wait_all(s[1], POLLERR | POLLHUP);
    /* Data that had arrived before the reset is still handed out. */
    char b[8];
    ssize_t r = recv(s[1], b, 8, 0);
    obs("%zd", r);
    EQ(r, 3);
    ERR(recv(s[1], b, 8, 0), ECONNRESET);
    EQ(recv(s[1], b, 8, 0), 0);
}

CASE(stream_so_error_after_reset)
{
    int s[2];
    tcp_pair(s);
    linger0_close(s[0]);
    wait_all(s[1], POLLERR | POLLHUP);
    EQ(getopt_int(s[1], SOL_SOCKET, SO_ERROR), ECONNRESET);
    EQ(getopt_int(s[1], SOL_SOCKET, SO_ERROR), 0);
    hear_eof(s[1]);
    EV(poll_now(s[1], POLLIN | POLLOUT), POLLIN | POLLOUT | POLLHUP);
}

CASE(stream_send_after_reset_first_econnreset_then_epipe)
{
    int s[2];
    tcp_pair(s);
    linger0_close(s[0]);
    wait_all(s[1], POLLERR | POLLHUP);
    ERR(send(s[1], "x", 1, MSG_NOSIGNAL), ECONNRESET);
    ERR(send(s[1], "x", 1, MSG_NOSIGNAL), EPIPE);
    hear_eof(s[1]);
}

/* The first write to a closed peer succeeds and provokes a reset, which then
 * shows as EPIPE because the peer's FIN had been seen. */
CASE(stream_write_after_peer_close)
{
    int s[2];
    tcp_pair(s);
    OK(close(s[0]));
    hear_eof(s[1]);
    EQ(send(s[1], "x", 1, MSG_NOSIGNAL), 1);
    wait_all(s[1], POLLERR | POLLHUP);
    EQ(getopt_int(s[1], SOL_SOCKET, SO_ERROR), EPIPE);
    ERR(send(s[1], "x", 1, MSG_NOSIGNAL), EPIPE);
    hear_eof(s[1]);
}

/* Nor does that reset hide the end that came in order. */
CASE(stream_end_stays_before_reset)
{
    int s[2];
    tcp_pair(s);
    OK(close(s[0]));
    hear_eof(s[1]);
    EQ(send(s[1], "x", 1, MSG_NOSIGNAL), 1);
    wait_all(s[1], POLLERR | POLLHUP);
    hear_eof(s[1]);
    EQ(recv(s[1], &(char){0}, 1, MSG_PEEK), 0);
    EQ(getopt_int(s[1], SOL_SOCKET, SO_ERROR), EPIPE);
    hear_eof(s[1]);
}

CASE(stream_epipe_raises_sigpipe)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        OK(shutdown(s[0], SHUT_WR));
        send(s[0], "x", 1, 0);
        _exit(1);
    }
    reap(p, 128 + SIGPIPE);
    p = fork_child();
    if (!p) {
        ssize_t r = write(s[0], "x", 1);
        _exit(r < 0 ? 2 : 1);
    }
    reap(p, 128 + SIGPIPE);
}

CASE(stream_epipe_with_sigpipe_ignored)
{
    int s[2];
    tcp_pair(s);
    signal(SIGPIPE, SIG_IGN);
    OK(shutdown(s[0], SHUT_WR));
    ERR(write(s[0], "x", 1), EPIPE);
    ERR(send(s[0], "x", 1, 0), EPIPE);
}

CASE(stream_sigpipe_handler_runs_once_per_write)
{
    int s[2];
    tcp_pair(s);
    on_signal(SIGPIPE, 0);
    OK(shutdown(s[0], SHUT_WR));
    ERR(write(s[0], "x", 1), EPIPE);
    ERR(send(s[0], "x", 1, MSG_NOSIGNAL), EPIPE);
    ERR(send(s[0], "x", 1, 0), EPIPE);
    EQ(sig_count, 2);
}

CASE(stream_unconnected_calls)
{
    int s = OK(socket(AF_INET, SOCK_STREAM, 0));
    char b[4];
    ERR(recv(s, b, 4, 0), ENOTCONN);
    ERR(read(s, b, 4), ENOTCONN);
    ERR(send(s, b, 4, MSG_NOSIGNAL), EPIPE);
    union addr a;
    socklen_t l = sizeof a;
    ERR(getpeername(s, &a.sa, &l), ENOTCONN);
}

CASE(stream_listener_cannot_carry_data)
{
    int l = listener(AF_INET, 1);
    char b[4];
    ERR(recv(l, b, 4, 0), ENOTCONN);
    ERR(send(l, b, 4, MSG_NOSIGNAL), EPIPE);
    union addr a;
    socklen_t n = sizeof a;
    ERR(getpeername(l, &a.sa, &n), ENOTCONN);
}

CASE(stream_sendto_address_is_ignored_when_connected)
{
    int s[2];
    union addr a;
    tcp_pair(s);
    EQ(sendto(s[0], "abc", 3, 0, &a.sa, loop_addr(AF_INET, 9, &a)), 3);
    hear(s[1], "abc");
}

CASE(stream_recvfrom_gives_no_address)
{
    int s[2];
    union addr a;
    socklen_t l = sizeof a;
    char b[4];
    tcp_pair(s);
    say(s[0], "abc");
    EQ(recvfrom(s[1], b, 3, MSG_WAITALL, &a.sa, &l), 3);
    EQ(l, 0);
}

CASE(stream_names_after_peer_close)
{
    int s[2];
    union addr a, b;
    tcp_pair(s);
    peer_of(s[1], &a);
    OK(close(s[0]));
    hear_eof(s[1]);
    peer_of(s[1], &b);
    TRUE(same_addr(&a, &b));
}

CASE(stream_names_after_reset)
{
    int s[2];
    tcp_pair(s);
    int port = port_of(s[1]);
    linger0_close(s[0]);
    wait_all(s[1], POLLERR | POLLHUP);
    union addr a;
    socklen_t l = sizeof a;
    ERR(getpeername(s[1], &a.sa, &l), ENOTCONN);
    EQ(port_of(s[1]) == port, 1);
}

CASE(stream_64mib_one_way)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        OK(close(s[1]));
        stream_send(s[0], 64ull << 20, 11, 256 * 1024);
        _exit(0);
    }
    OK(close(s[0]));
    stream_recv(s[1], 64ull << 20, 11, 256 * 1024);
    hear_eof(s[1]);
    reap(p, 0);
}

static void *sender32(void *arg)
{
    stream_send((int)(intptr_t)arg, 32ull << 20, 21, 100000);
    return NULL;
}

CASE(stream_both_directions_at_once)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        OK(close(s[1]));
        pthread_t t = thread(sender32, (void *)(intptr_t)s[0]);
        stream_recv(s[0], 32ull << 20, 21, 70000);
        join(t);
        _exit(0);
    }
    OK(close(s[0]));
    pthread_t t = thread(sender32, (void *)(intptr_t)s[1]);
    stream_recv(s[1], 32ull << 20, 21, 70000);
    join(t);
    hear_eof(s[1]);
    reap(p, 0);
}

CASE(stream_one_big_send)
{
    int s[2];
    size_t n = 8 << 20;
    unsigned char *b = malloc(n);
    tcp_pair(s);
    fill_pattern(b, n, 0, 9);
    pid_t p = fork_child();
    if (!p) {
        EQ(send(s[0], b, n, 0), n); /* a blocking send takes all */
        _exit(0);
    }
    stream_recv(s[1], n, 9, 60000);
    reap(p, 0);
}

CASE(stream_one_big_recv_waitall)
{
    int s[2];
    size_t n = 8 << 20;
    unsigned char *b = malloc(n), *w = malloc(n);
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        stream_send(s[0], n, 9, 60000);
        _exit(0);
    }
    EQ(recv(s[1], b, n, MSG_WAITALL), n);
    fill_pattern(w, n, 0, 9);
    MEMEQ(b, w, n);
    reap(p, 0);
}

CASE(stream_many_single_bytes)
{
    int s[2];
    tcp_pair(s);
    setopt_int(s[0], IPPROTO_TCP, TCP_NODELAY, 1);
    pid_t p = fork_child();
    if (!p) {
        stream_send(s[0], 20000, 4, 1);
        _exit(0);
    }
    stream_recv(s[1], 20000, 4, 4096);
    reap(p, 0);
}

CASE(stream_big_writes_tiny_reads)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        stream_send(s[0], 300000, 4, 100000);
        _exit(0);
    }
    stream_recv(s[1], 300000, 4, 13);
    reap(p, 0);
}

CASE(stream_ping_pong_2000)
{
    int s[2];
    char c;
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        OK(close(s[1]));
        while (OK(recv(s[0], &c, 1, 0)) == 1) {
            c++;
            EQ(send(s[0], &c, 1, 0), 1);
        }
        _exit(0);
    }
    OK(close(s[0]));
    for (int i = 0; i < 2000; i++) {
        char w = (char)i;
        EQ(send(s[1], &w, 1, 0), 1);
        EQ(recv(s[1], &c, 1, 0), 1);
        EQ(c, (char)(w + 1));
    }
    OK(close(s[1]));
    reap(p, 0);
}

CASE(stream_pause_then_resume)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        stream_send(s[0], 16 << 20, 8, 200000);
        _exit(0);
    }
    OK(close(s[0]));
    nap(100); /* the sender fills every buffer and waits */
    stream_recv(s[1], 16 << 20, 8, 200000);
    hear_eof(s[1]);
    reap(p, 0);
}

CASE(stream_300_connections_in_turn)
{
    int l = listener(AF_INET, 16);
    for (int i = 0; i < 300; i++) {
        int c = connected(l), a = accepted(l);
        say(c, "hi");
        hear(a, "hi");
        OK(close(c));
        hear_eof(a);
        OK(close(a));
    }
}

CASE(stream_200_connections_open_together)
{
    int l = listener(AF_INET, 256), c[200], a[200];
    for (int i = 0; i < 200; i++) {
        c[i] = connected(l);
        a[i] = accepted(l);
    }
    for (int i = 0; i < 200; i++)
        EQ(send(c[i], &i, sizeof i, 0), sizeof i);
    for (int i = 199; i >= 0; i--) {
        int v;
        recv_all(a[i], &v, sizeof v);
        EQ(v, i);
    }
}

/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* epoll over sockets and over mixed sets. */
#include "socktest.h"

#define SOON 15000 /* something comes: only a guard */
#define NEVER 40   /* nothing comes: how long that is looked at */

CASE(epoll_lt_repeats_until_read)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN);
    EV(ep_one(e, s[1], 0), 0);
    say(s[0], "abcd");
    EV(ep_one(e, s[1], SOON), EPOLLIN);
    EV(ep_one(e, s[1], SOON), EPOLLIN);
    wait_bytes(s[1], 4);
    hear(s[1], "ab");
    EV(ep_one(e, s[1], 0), EPOLLIN);
    hear(s[1], "cd");
    EV(ep_one(e, s[1], 0), 0);
}

CASE(epoll_et_once_per_arrival)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN | EPOLLET);
    say(s[0], "a");
    EV(ep_one(e, s[1], SOON), EPOLLIN);
    EV(ep_one(e, s[1], NEVER), 0);
    say(s[0], "b");
    EV(ep_one(e, s[1], SOON), EPOLLIN);
    EV(ep_one(e, s[1], NEVER), 0);
    hear(s[1], "ab");
    EV(ep_one(e, s[1], 0), 0);
}

CASE(epoll_et_partial_read_no_report)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN | EPOLLET);
    say(s[0], "abcd");
    EV(ep_one(e, s[1], SOON), EPOLLIN);
    hear(s[1], "ab");
    EV(ep_one(e, s[1], NEVER), 0);
    say(s[0], "e");
    EV(ep_one(e, s[1], SOON), EPOLLIN);
    hear(s[1], "cde");
}

CASE(epoll_et_add_with_data_waiting)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    say(s[0], "a");
    wait_bytes(s[1], 1);
    ep_add(e, s[1], EPOLLIN | EPOLLET);
    EV(ep_one(e, s[1], SOON), EPOLLIN);
    EV(ep_one(e, s[1], NEVER), 0);
}

CASE(epoll_et_mod_reports_again)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN | EPOLLET);
    say(s[0], "a");
    EV(ep_one(e, s[1], SOON), EPOLLIN);
    EV(ep_one(e, s[1], 0), 0);
    ep_mod(e, s[1], EPOLLIN | EPOLLET);
    EV(ep_one(e, s[1], SOON), EPOLLIN);
    EV(ep_one(e, s[1], 0), 0);
}

CASE(epoll_et_eof_reported_once)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN | EPOLLRDHUP | EPOLLET);
    OK(shutdown(s[0], SHUT_WR));
    EV(ep_one(e, s[1], SOON), EPOLLIN | EPOLLRDHUP);
    EV(ep_one(e, s[1], NEVER), 0);
    hear_eof(s[1]);
}

CASE(epoll_et_out_once)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[0], EPOLLOUT | EPOLLET);
    EV(ep_one(e, s[0], SOON), EPOLLOUT);
    EV(ep_one(e, s[0], NEVER), 0);
}

CASE(epoll_et_out_after_full)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    setopt_int(s[0], SOL_SOCKET, SO_SNDBUF, 65536);
    set_nonblock(s[0], 1);
    ep_add(e, s[0], EPOLLOUT | EPOLLET);
    EV(ep_one(e, s[0], SOON), EPOLLOUT);
    size_t n = fill_sndbuf(s[0]);
    EV(ep_one(e, s[0], 0) & ~EPOLLOUT, 0); /* an edge may have been noted on the way */
    char *b = malloc(n);
    recv_all(s[1], b, n);
    EV(ep_one(e, s[0], SOON), EPOLLOUT);
}

CASE(epoll_oneshot)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN | EPOLLONESHOT);
    say(s[0], "a");
    EV(ep_one(e, s[1], SOON), EPOLLIN);
    EV(ep_one(e, s[1], 0), 0);
    say(s[0], "b");
    EV(ep_one(e, s[1], NEVER), 0);
    ep_mod(e, s[1], EPOLLIN | EPOLLONESHOT);
    EV(ep_one(e, s[1], SOON), EPOLLIN);
    EV(ep_one(e, s[1], 0), 0);
    hear(s[1], "ab");
    ep_mod(e, s[1], EPOLLIN | EPOLLONESHOT);
    EV(ep_one(e, s[1], 0), 0);
    say(s[0], "c");
    EV(ep_one(e, s[1], SOON), EPOLLIN);
}

/* A disarmed one-shot entry is silent even about HUP. */
CASE(epoll_oneshot_disarmed_hides_hup)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN | EPOLLONESHOT);
    say(s[0], "a");
    EV(ep_one(e, s[1], SOON), EPOLLIN);
    hear(s[1], "a");
    linger0_close(s[0]);
    wait_all(s[1], POLLERR | POLLHUP);
    EV(ep_one(e, s[1], 0), 0);
    ep_mod(e, s[1], EPOLLIN);
    EV(ep_one(e, s[1], SOON), EPOLLIN | EPOLLERR | EPOLLHUP);
}

CASE(epoll_mod_changes_interest)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN);
    EV(ep_one(e, s[1], 0), 0);
    ep_mod(e, s[1], EPOLLOUT);
    EV(ep_one(e, s[1], SOON), EPOLLOUT);
    ep_mod(e, s[1], EPOLLIN | EPOLLOUT);
    EV(ep_one(e, s[1], SOON), EPOLLOUT);
    say(s[0], "a");
    wait_bytes(s[1], 1);
    EV(ep_one(e, s[1], SOON), EPOLLIN | EPOLLOUT);
    ep_mod(e, s[1], 0);
    EV(ep_one(e, s[1], 0), 0);
}

CASE(epoll_mod_changes_data)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    struct epoll_event v = {.events = EPOLLOUT, .data.u64 = 0x1122334455667788ull}, o;
    OK(epoll_ctl(e, EPOLL_CTL_ADD, s[0], &v));
    EQ(epoll_wait(e, &o, 1, SOON), 1);
    TRUE(o.data.u64 == 0x1122334455667788ull);
    v.data.u64 = ~0ull;
    OK(epoll_ctl(e, EPOLL_CTL_MOD, s[0], &v));
    EQ(epoll_wait(e, &o, 1, SOON), 1);
    TRUE(o.data.u64 == ~0ull);
}

CASE(epoll_del)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN);
    say(s[0], "a");
    EV(ep_one(e, s[1], SOON), EPOLLIN);
    OK(epoll_ctl(e, EPOLL_CTL_DEL, s[1], NULL));
    EV(ep_one(e, s[1], NEVER), 0);
    ep_add(e, s[1], EPOLLIN);
    EV(ep_one(e, s[1], SOON), EPOLLIN);
}

CASE(epoll_ctl_errors)
{
    int s[2], e = ep_new();
    struct epoll_event v = {.events = EPOLLIN};
    tcp_pair(s);
    ERR(epoll_ctl(e, EPOLL_CTL_MOD, s[0], &v), ENOENT);
    ERR(epoll_ctl(e, EPOLL_CTL_DEL, s[0], &v), ENOENT);
    OK(epoll_ctl(e, EPOLL_CTL_ADD, s[0], &v));
    ERR(epoll_ctl(e, EPOLL_CTL_ADD, s[0], &v), EEXIST);
    ERR(epoll_ctl(e, 77, s[0], &v), EINVAL);
    ERR(epoll_ctl(e, EPOLL_CTL_ADD, e, &v), EINVAL);
    ERR(epoll_ctl(e, EPOLL_CTL_ADD, -1, &v), EBADF);
    ERR(epoll_ctl(-1, EPOLL_CTL_ADD, s[0], &v), EBADF);
    ERR(epoll_ctl(s[1], EPOLL_CTL_ADD, s[0], &v), EINVAL);
    ERR(epoll_ctl(e, EPOLL_CTL_ADD, s[1], NULL), EFAULT);
    int f = OK(open("/proc/self/exe", O_RDONLY));
    ERR(epoll_ctl(e, EPOLL_CTL_ADD, f, &v), EPERM);
    OK(close(s[1]));
    ERR(epoll_ctl(e, EPOLL_CTL_ADD, s[1], &v), EBADF);
}

CASE(epoll_wait_errors)
{
    int s[2], e = ep_new();
    struct epoll_event v[2];
    tcp_pair(s);
    ERR(epoll_wait(e, v, 0, 0), EINVAL);
    volatile int minus = -1;
    ERR(epoll_wait(e, v, minus, 0), EINVAL);
    ERR(epoll_wait(-1, v, 1, 0), EBADF);
    ERR(epoll_wait(s[0], v, 1, 0), EINVAL);
    ERR(epoll_create(0), EINVAL);
    ERR(epoll_create1(1), EINVAL);
    EQ(epoll_wait(e, v, 2, 0), 0);
    EQ(epoll_wait(e, v, 2, 10), 0);
}

CASE(epoll_create_flags)
{
    EQ(fcntl(OK(epoll_create(1)), F_GETFD), 0);
    EQ(fcntl(OK(epoll_create1(EPOLL_CLOEXEC)), F_GETFD), FD_CLOEXEC);
}

CASE(epoll_closed_fd_leaves)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN | EPOLLOUT);
    EV(ep_one(e, s[1], SOON), EPOLLOUT);
    OK(close(s[1]));
    EV(ep_one(e, s[1], NEVER), 0);
}

/* The entry belongs to the open file description: it stays while a dup lives. */
CASE(epoll_closed_fd_with_dup_stays)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN);
    int old = s[1], d = OK(dup(s[1]));
    OK(close(s[1]));
    say(s[0], "a");
    EV(ep_one(e, old, SOON), EPOLLIN);
    hear(d, "a");
    EV(ep_one(e, old, 0), 0);
    struct epoll_event v = {.events = EPOLLIN};
    ERR(epoll_ctl(e, EPOLL_CTL_DEL, old, &v), EBADF);
    OK(close(d));
    EV(ep_one(e, old, NEVER), 0);
}

CASE(epoll_dup_registered_separately)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    int d = OK(dup(s[1]));
    ep_add(e, s[1], EPOLLIN);
    ep_add(e, d, EPOLLIN);
    say(s[0], "a");
    wait_bytes(s[1], 1);
    struct epoll_event v[4];
    EQ(epoll_wait(e, v, 4, SOON), 2);
    TRUE(v[0].data.fd != v[1].data.fd);
    OK(epoll_ctl(e, EPOLL_CTL_DEL, d, NULL));
    EV(ep_one(e, s[1], SOON), EPOLLIN);
}

CASE(epoll_number_reused_by_another_socket)
{
    int s[2], t[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[0], EPOLLIN);
    int n = s[0];
    OK(close(s[0]));
    OK(close(s[1]));
    tcp_pair(t);
    if (t[0] != n) {
        EQ(dup2(t[0], n), n);
        OK(close(t[0]));
        t[0] = n;
    }
    say(t[1], "x");
    wait_bytes(n, 1);
    EV(ep_one(e, n, NEVER), 0);
    ep_add(e, n, EPOLLIN); /* not there any more: no EEXIST */
    EV(ep_one(e, n, SOON), EPOLLIN);
}

CASE(epoll_dup2_over_registered)
{
    int s[2], t[2], e = ep_new();
    tcp_pair(s);
    tcp_pair(t);
    ep_add(e, s[1], EPOLLIN);
    EQ(dup2(t[1], s[1]), s[1]);
    say(t[0], "x");
    wait_bytes(s[1], 1);
    EV(ep_one(e, s[1], NEVER), 0);
    hear_eof(s[0]);
}

CASE(epoll_nested)
{
    int s[2], in = ep_new(), out = ep_new();
    tcp_pair(s);
    ep_add(in, s[1], EPOLLIN);
    ep_add(out, in, EPOLLIN);
    EV(ep_one(out, in, 0), 0);
    say(s[0], "a");
    EV(ep_one(out, in, SOON), EPOLLIN);
    EV(ep_one(in, s[1], SOON), EPOLLIN);
    EV(ep_one(out, in, SOON), EPOLLIN);
    hear(s[1], "a");
    EV(ep_one(out, in, 0), 0);
}

CASE(epoll_nested_three_deep)
{
    int s[2], a = ep_new(), b = ep_new(), c = ep_new();
    tcp_pair(s);
    ep_add(a, s[1], EPOLLIN);
    ep_add(b, a, EPOLLIN);
    ep_add(c, b, EPOLLIN);
    EV(ep_one(c, b, 0), 0);
    say(s[0], "a");
    EV(ep_one(c, b, SOON), EPOLLIN);
    EV(poll_now(c, POLLIN), POLLIN);
    hear(s[1], "a");
    EV(poll_now(c, POLLIN), 0);
}

CASE(epoll_nested_loop_is_eloop)
{
    int a = ep_new(), b = ep_new();
    struct epoll_event v = {.events = EPOLLIN};
    OK(epoll_ctl(a, EPOLL_CTL_ADD, b, &v));
    ERR(epoll_ctl(b, EPOLL_CTL_ADD, a, &v), ELOOP);
}

CASE(epoll_polled)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN);
    EV(poll_now(e, POLLIN | POLLOUT), 0);
    say(s[0], "a");
    EV(wait_ev(e, POLLIN | POLLOUT), POLLIN);
    hear(s[1], "a");
    EV(poll_now(e, POLLIN), 0);
}

CASE(epoll_polled_wakes_sleeper)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN);
    pid_t p = fork_child();
    if (!p) {
        nap(20);
        say(s[0], "a");
        _exit(0);
    }
    EV(wait_ev(e, POLLIN), POLLIN);
    reap(p, 0);
}

CASE(epoll_selected)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN);
    say(s[0], "a");
    fd_set r;
    FD_ZERO(&r);
    FD_SET(e, &r);
    EQ(select(e + 1, &r, NULL, NULL, NULL), 1);
    TRUE(FD_ISSET(e, &r));
}

CASE(epoll_several_on_one_socket)
{
    int s[2], a = ep_new(), b = ep_new(), c = ep_new();
    tcp_pair(s);
    ep_add(a, s[1], EPOLLIN);
    ep_add(b, s[1], EPOLLIN | EPOLLET);
    ep_add(c, s[1], EPOLLOUT);
    say(s[0], "x");
    EV(ep_one(a, s[1], SOON), EPOLLIN);
    EV(ep_one(b, s[1], SOON), EPOLLIN);
    EV(ep_one(c, s[1], SOON), EPOLLOUT);
    EV(ep_one(a, s[1], 0), EPOLLIN);
    EV(ep_one(b, s[1], 0), 0);
    OK(epoll_ctl(a, EPOLL_CTL_DEL, s[1], NULL));
    say(s[0], "y");
    EV(ep_one(b, s[1], SOON), EPOLLIN);
    EV(ep_one(a, s[1], 0), 0);
}

CASE(epoll_exclusive_two_epolls)
{
    int l = listener(AF_INET, 8), a = ep_new(), b = ep_new();
    ep_add(a, l, EPOLLIN | EPOLLEXCLUSIVE);
    ep_add(b, l, EPOLLIN | EPOLLEXCLUSIVE);
    connected(l);
    wait_ev(l, POLLIN);
    /* nobody was sleeping: a level is there for both to see */
    EV(ep_one(a, l, SOON), EPOLLIN);
    accepted(l);
    EV(ep_one(a, l, 0), 0);
    EV(ep_one(b, l, 0), 0);
}

CASE(epoll_exclusive_rules)
{
    int l = listener(AF_INET, 8), e = ep_new(), f = ep_new();
    struct epoll_event v = {.events = EPOLLIN | EPOLLEXCLUSIVE | EPOLLONESHOT};
    ERR(epoll_ctl(e, EPOLL_CTL_ADD, l, &v), EINVAL);
    v.events = EPOLLIN | EPOLLEXCLUSIVE | EPOLLRDHUP;
    ERR(epoll_ctl(e, EPOLL_CTL_ADD, l, &v), EINVAL);
    v.events = EPOLLIN | EPOLLEXCLUSIVE;
    ERR(epoll_ctl(e, EPOLL_CTL_ADD, f, &v), EINVAL);
    OK(epoll_ctl(e, EPOLL_CTL_ADD, l, &v));
    ERR(epoll_ctl(e, EPOLL_CTL_MOD, l, &v), EINVAL);
    v.events = EPOLLIN;
    ERR(epoll_ctl(e, EPOLL_CTL_MOD, l, &v), EINVAL);
    OK(epoll_ctl(e, EPOLL_CTL_DEL, l, NULL));
}

/* A never connected TCP socket reports OUT|HUP. */
CASE(epoll_unconnected_stream)
{
    int s = OK(socket(AF_INET, SOCK_STREAM, 0)), e = ep_new();
    ep_add(e, s, EPOLLIN | EPOLLOUT | EPOLLRDHUP);
    EV(ep_one(e, s, 0), EPOLLOUT | EPOLLHUP);
    ep_mod(e, s, EPOLLIN);
    EV(ep_one(e, s, 0), EPOLLHUP);
    ep_mod(e, s, 0);
    EV(ep_one(e, s, 0), EPOLLHUP);
}

CASE(epoll_added_before_connect)
{
    int l = listener(AF_INET, 4), e = ep_new();
    int s = OK(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
    ep_add(e, s, EPOLLIN | EPOLLOUT | EPOLLET);
    EV(ep_one(e, s, 0), EPOLLOUT | EPOLLHUP);
    ERR(try_connect(s, l), EINPROGRESS);
    EV(ep_one(e, s, SOON), EPOLLOUT);
    EV(ep_one(e, s, NEVER), 0);
    int a = accepted(l);
    say(a, "x");
    EV(ep_one(e, s, SOON), EPOLLIN | EPOLLOUT);
}

CASE(epoll_added_before_listen)
{
    int s = bound(AF_INET, SOCK_STREAM), e = ep_new();
    ep_add(e, s, EPOLLIN);
    EV(ep_one(e, s, 0), EPOLLHUP);
    OK(listen(s, 4));
    EV(ep_one(e, s, 0), 0);
    connected(s);
    EV(ep_one(e, s, SOON), EPOLLIN);
}

CASE(epoll_connect_completion)
{
    int q, l = full_listener(&q), e = ep_new();
    int s = OK(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
    ERR(try_connect(s, l), EINPROGRESS);
    ep_add(e, s, EPOLLIN | EPOLLOUT);
    EV(ep_one(e, s, NEVER), 0);
    accepted(l);
    EV(ep_one(e, s, SOON), EPOLLOUT);
    EQ(getopt_int(s, SOL_SOCKET, SO_ERROR), 0);
}

CASE(epoll_connect_refused)
{
    int r = bound(AF_INET, SOCK_STREAM), e = ep_new();
    int s = OK(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
    ERR(try_connect(s, r), EINPROGRESS);
    ep_add(e, s, EPOLLOUT);
    EV(ep_one(e, s, SOON), EPOLLOUT | EPOLLERR | EPOLLHUP);
    EQ(getopt_int(s, SOL_SOCKET, SO_ERROR), ECONNREFUSED);
    EV(ep_one(e, s, SOON), EPOLLOUT | EPOLLHUP);
}

CASE(epoll_listener)
{
    int l = listener(AF_INET, 4), e = ep_new();
    ep_add(e, l, EPOLLIN | EPOLLOUT | EPOLLRDHUP);
    EV(ep_one(e, l, 0), 0);
    connected(l);
    EV(ep_one(e, l, SOON), EPOLLIN);
    EV(ep_one(e, l, SOON), EPOLLIN);
    accepted(l);
    EV(ep_one(e, l, 0), 0);
}

CASE(epoll_listener_et)
{
    int l = listener(AF_INET, 4), e = ep_new();
    ep_add(e, l, EPOLLIN | EPOLLET);
    connected(l);
    EV(ep_one(e, l, SOON), EPOLLIN);
    EV(ep_one(e, l, NEVER), 0);
    connected(l);
    EV(ep_one(e, l, SOON), EPOLLIN);
    accepted(l);
    EV(ep_one(e, l, NEVER), 0);
    accepted(l);
}

CASE(epoll_rdhup)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN | EPOLLRDHUP);
    OK(shutdown(s[0], SHUT_WR));
    EV(ep_one(e, s[1], SOON), EPOLLIN | EPOLLRDHUP);
    ep_mod(e, s[1], EPOLLIN);
    EV(ep_one(e, s[1], SOON), EPOLLIN);
    ep_mod(e, s[1], EPOLLRDHUP);
    EV(ep_one(e, s[1], SOON), EPOLLRDHUP);
    ep_mod(e, s[1], EPOLLOUT);
    EV(ep_one(e, s[1], SOON), EPOLLOUT);
}

CASE(epoll_hup_when_both_directions_end)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    OK(shutdown(s[0], SHUT_WR));
    hear_eof(s[1]);
    OK(shutdown(s[1], SHUT_WR));
    hear_eof(s[0]);
    wait_all(s[1], POLLHUP);
    ep_add(e, s[1], EPOLLIN | EPOLLOUT | EPOLLRDHUP);
    EV(ep_one(e, s[1], SOON), EPOLLIN | EPOLLOUT | EPOLLHUP | EPOLLRDHUP);
    ep_mod(e, s[1], 0);
    EV(ep_one(e, s[1], SOON), EPOLLHUP);
}

CASE(epoll_err_hup_after_reset)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[1], 0);
    EV(ep_one(e, s[1], 0), 0);
    linger0_close(s[0]);
    wait_all(s[1], POLLERR | POLLHUP);
    EV(ep_one(e, s[1], SOON), EPOLLERR | EPOLLHUP);
    ep_mod(e, s[1], EPOLLIN | EPOLLOUT | EPOLLRDHUP);
    EV(ep_one(e, s[1], SOON), EPOLLIN | EPOLLOUT | EPOLLERR | EPOLLHUP | EPOLLRDHUP);
    EQ(getopt_int(s[1], SOL_SOCKET, SO_ERROR), ECONNRESET);
    EV(ep_one(e, s[1], SOON), EPOLLIN | EPOLLOUT | EPOLLHUP | EPOLLRDHUP);
}

CASE(epoll_out_follows_buffer)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[0], EPOLLOUT);
    EV(ep_one(e, s[0], SOON), EPOLLOUT);
    size_t n = fill_sndbuf(s[0]);
    EV(ep_one(e, s[0], 0), 0);
    char *b = malloc(n);
    recv_all(s[1], b, n);
    EV(ep_one(e, s[0], SOON), EPOLLOUT);
}

CASE(epoll_maxevents)
{
    int e = ep_new(), a[8], b[8], seen[8] = {0};
    for (int i = 0; i < 8; i++) {
        int s[2];
        tcp_pair(s);
        a[i] = s[0];
        b[i] = s[1];
        struct epoll_event v = {.events = EPOLLIN, .data.u32 = i};
        OK(epoll_ctl(e, EPOLL_CTL_ADD, b[i], &v));
    }
    for (int i = 0; i < 8; i++) {
        say(a[i], "x");
        wait_bytes(b[i], 1);
    }
    struct epoll_event v[16];
    EQ(epoll_wait(e, v, 3, SOON), 3);
    EQ(epoll_wait(e, v, 16, SOON), 8);
    for (int i = 0; i < 8; i++)
        seen[v[i].data.u32]++;
    for (int i = 0; i < 8; i++)
        EQ(seen[i], 1);
}

/* With room for fewer than are ready, all get their turn. */
CASE(epoll_rotation)
{
    int e = ep_new(), a[8], b[8], seen[8] = {0};
    for (int i = 0; i < 8; i++) {
        int s[2];
        tcp_pair(s);
        a[i] = s[0];
        b[i] = s[1];
        struct epoll_event v = {.events = EPOLLIN, .data.u32 = i};
        OK(epoll_ctl(e, EPOLL_CTL_ADD, b[i], &v));
        say(a[i], "x");
        wait_bytes(b[i], 1);
    }
    struct epoll_event v[2];
    for (int k = 0; k < 8; k++) {
        EQ(epoll_wait(e, v, 2, SOON), 2);
        seen[v[0].data.u32]++;
        seen[v[1].data.u32]++;
    }
    for (int i = 0; i < 8; i++)
        EQ(seen[i], 2);
}

/* ... a socket and a pipe together too */
CASE(epoll_rotation_mixed)
{
    int e = ep_new(), s[2], p[2], seen[2] = {0};
    tcp_pair(s);
    OK(pipe(p));
    say(s[0], "x");
    wait_bytes(s[1], 1);
    EQ(write(p[1], "x", 1), 1);
    ep_add(e, s[1], EPOLLIN);
    ep_add(e, p[0], EPOLLIN);
    for (int k = 0; k < 10; k++) {
        struct epoll_event v;
        EQ(epoll_wait(e, &v, 1, SOON), 1);
        seen[v.data.fd == s[1]]++;
    }
    obs("%d %d", seen[0], seen[1]);
    EQ(seen[0], 5);
}

CASE(epoll_mixed_set)
{
    int e = ep_new(), s[2], p[2];
    tcp_pair(s);
    OK(pipe(p));
    int ev = OK(eventfd(0, EFD_NONBLOCK));
    int tm = OK(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK));
    sigset_t m;
    sigemptyset(&m);
    sigaddset(&m, SIGUSR1);
    OK(sigprocmask(SIG_BLOCK, &m, NULL));
    int sg = OK(signalfd(-1, &m, SFD_NONBLOCK));
    int in = OK(inotify_init1(IN_NONBLOCK));
    char dir[] = "/tmp/socktestXXXXXX", f[64];
    TRUE(mkdtemp(dir));
    OK(inotify_add_watch(in, dir, IN_CREATE));
    int fds[] = {s[1], p[0], ev, tm, sg, in};
    for (int i = 0; i < 6; i++) {
        ep_add(e, fds[i], EPOLLIN);
        EV(ep_one(e, fds[i], 0), 0);
    }
    say(s[0], "x");
    EV(ep_one(e, s[1], SOON), EPOLLIN);
    hear(s[1], "x");
    EQ(write(p[1], "x", 1), 1);
    EV(ep_one(e, p[0], SOON), EPOLLIN);
    char b[256];
    EQ(read(p[0], b, 1), 1);
    uint64_t one = 1;
    EQ(write(ev, &one, 8), 8);
    EV(ep_one(e, ev, SOON), EPOLLIN);
    EQ(read(ev, b, 8), 8);
    struct itimerspec t = {.it_value.tv_nsec = 1000000};
    OK(timerfd_settime(tm, 0, &t, NULL));
    EV(ep_one(e, tm, SOON), EPOLLIN);
    EQ(read(tm, b, 8), 8);
    OK(kill(getpid(), SIGUSR1));
    EV(ep_one(e, sg, SOON), EPOLLIN);
    EQ(read(sg, b, 128), 128);
    snprintf(f, sizeof f, "%s/f", dir);
    int fd = OK(open(f, O_CREAT | O_WRONLY, 0600));
    EV(ep_one(e, in, SOON), EPOLLIN);
    TRUE(read(in, b, sizeof b) > 0);
    OK(close(fd));
    EV(ep_one(e, s[1], 0), 0);
    say(s[0], "y");
    EV(ep_one(e, s[1], SOON), EPOLLIN);
    unlink(f);
    rmdir(dir);
}

CASE(epoll_mixed_all_at_once)
{
    int e = ep_new(), s[2], p[2], l = listener(AF_INET, 4), u[2];
    tcp_pair(s);
    udp_pair(AF_INET, u);
    OK(pipe(p));
    int ev = OK(eventfd(1, 0)), x[2];
    OK(socketpair(AF_UNIX, SOCK_STREAM, 0, x));
    int fds[] = {s[1], p[0], l, ev, u[1], x[1]};
    for (int i = 0; i < 6; i++)
        ep_add(e, fds[i], EPOLLIN);
    say(s[0], "x");
    say(u[0], "x");
    EQ(write(p[1], "x", 1), 1);
    EQ(write(x[0], "x", 1), 1);
    connected(l);
    for (int i = 0; i < 6; i++)
        wait_ev(fds[i], POLLIN);
    struct epoll_event v[8];
    EQ(epoll_wait(e, v, 8, SOON), 6);
    for (int i = 0; i < 6; i++)
        EQ(v[i].events, EPOLLIN);
}

CASE(epoll_wakes_by_pipe_while_sockets_are_quiet)
{
    int e = ep_new(), s[2], p[2];
    tcp_pair(s);
    OK(pipe(p));
    ep_add(e, s[1], EPOLLIN);
    ep_add(e, p[0], EPOLLIN);
    pid_t c = fork_child();
    if (!c) {
        nap(30);
        _exit(write(p[1], "x", 1) != 1);
    }
    EV(ep_one(e, p[0], SOON), EPOLLIN);
    reap(c, 0);
}

CASE(epoll_wakes_by_socket_while_pipes_are_quiet)
{
    int e = ep_new(), s[2], p[2];
    tcp_pair(s);
    OK(pipe(p));
    ep_add(e, p[0], EPOLLIN);
    ep_add(e, s[1], EPOLLIN);
    pid_t c = fork_child();
    if (!c) {
        nap(30);
        say(s[0], "x");
        _exit(0);
    }
    EV(ep_one(e, s[1], SOON), EPOLLIN);
    reap(c, 0);
}

static void *add_later(void *arg)
{
    int *a = arg;
    nap(20);
    ep_add(a[0], a[1], EPOLLIN);
    return NULL;
}

CASE(epoll_add_while_other_thread_waits)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    say(s[0], "x");
    wait_bytes(s[1], 1);
    int a[2] = {e, s[1]};
    pthread_t t = thread(add_later, a);
    EV(ep_one(e, s[1], SOON), EPOLLIN);
    join(t);
}

static void *mod_later(void *arg)
{
    int *a = arg;
    nap(20);
    ep_mod(a[0], a[1], EPOLLOUT);
    return NULL;
}

CASE(epoll_mod_while_other_thread_waits)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN);
    int a[2] = {e, s[1]};
    pthread_t t = thread(mod_later, a);
    EV(ep_one(e, s[1], SOON), EPOLLOUT);
    join(t);
}

CASE(epoll_pwait_mask)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN);
    on_signal(SIGUSR1, 0);
    sigset_t block, none;
    sigemptyset(&none);
    sigemptyset(&block);
    sigaddset(&block, SIGUSR1);
    OK(sigprocmask(SIG_BLOCK, &block, NULL));
    OK(raise(SIGUSR1));
    struct epoll_event v;
    EQ(epoll_wait(e, &v, 1, 0), 0);
    EQ(sig_count, 0);
    ERR(epoll_pwait(e, &v, 1, 15000, &none), EINTR);
    EQ(sig_count, 1);
    sigset_t now;
    OK(sigprocmask(SIG_SETMASK, NULL, &now));
    EQ(sigismember(&now, SIGUSR1), 1);
}

CASE(epoll_pwait_blocks_signal_while_waiting)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN);
    on_signal(SIGUSR1, 0);
    sigset_t block;
    sigemptyset(&block);
    sigaddset(&block, SIGUSR1);
    pid_t me = getpid(), c = fork_child();
    if (!c) {
        nap(20);
        OK(kill(me, SIGUSR1));
        nap(20);
        say(s[0], "x");
        _exit(0);
    }
    struct epoll_event v;
    EQ(epoll_pwait(e, &v, 1, SOON, &block), 1);
    EQ(v.events, EPOLLIN);
    EQ(sig_count, 1); /* delivered when the old mask came back */
    reap(c, 0);
}

CASE(epoll_pwait2)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN);
    struct timespec t = {0, 1000};
    struct epoll_event v;
    EQ(epoll_pwait2(e, &v, 1, &t, NULL), 0);
    say(s[0], "x");
    EQ(epoll_pwait2(e, &v, 1, NULL, NULL), 1);
    EQ(v.events, EPOLLIN);
    EQ(v.data.fd == s[1], 1);
}

CASE(epoll_inherited_over_fork)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN);
    pid_t c = fork_child();
    if (!c) {
        EV(ep_one(e, s[1], SOON), EPOLLIN);
        hear(s[1], "x");
        _exit(0);
    }
    say(s[0], "x");
    reap(c, 0);
    EV(ep_one(e, s[1], 0), 0);
    say(s[0], "y");
    EV(ep_one(e, s[1], SOON), EPOLLIN);
}

CASE(epoll_child_changes_are_shared)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    pid_t c = fork_child();
    if (!c) {
        ep_add(e, s[1], EPOLLOUT);
        _exit(0);
    }
    reap(c, 0);
    EV(ep_one(e, s[1], SOON), EPOLLOUT);
    struct epoll_event v = {.events = EPOLLIN};
    ERR(epoll_ctl(e, EPOLL_CTL_ADD, s[1], &v), EEXIST);
}

CASE(epoll_closed_while_sockets_live)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN);
    OK(close(e));
    say(s[0], "x");
    hear(s[1], "x");
    int f = ep_new();
    EV(ep_one(f, s[1], NEVER), 0);
    ep_add(f, s[1], EPOLLOUT);
    EV(ep_one(f, s[1], SOON), EPOLLOUT);
}

CASE(epoll_dup_of_epoll)
{
    int s[2], e = ep_new(), d = OK(dup(e));
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN);
    say(s[0], "x");
    EV(ep_one(d, s[1], SOON), EPOLLIN);
    OK(close(e));
    EV(ep_one(d, s[1], SOON), EPOLLIN);
    OK(epoll_ctl(d, EPOLL_CTL_DEL, s[1], NULL));
    EV(ep_one(d, s[1], 0), 0);
}

CASE(epoll_300_sockets)
{
    int e = ep_new(), l = listener(AF_INET, 300), c[150];
    for (int i = 0; i < 150; i++) {
        c[i] = connected(l);
        int a = accepted(l);
        ep_add(e, a, EPOLLIN | EPOLLET);
        ep_add(e, c[i], EPOLLIN | EPOLLET);
    }
    for (int i = 0; i < 150; i++)
        say(c[i], "x");
    int got = 0;
    struct epoll_event v[64];
    while (got < 150) {
        int n = OK(epoll_wait(e, v, 64, SOON));
        TRUE(n > 0);
        for (int i = 0; i < n; i++)
            hear(v[i].data.fd, "x");
        got += n;
    }
    EQ(epoll_wait(e, v, 64, NEVER), 0);
}

CASE(epoll_echo_server_loop)
{
    int l = listener(AF_INET, 64), e = ep_new();
    set_nonblock(l, 1);
    pid_t p = fork_child();
    if (!p) {
        for (int i = 0; i < 40; i++) {
            int c = connected(l);
            for (int k = 0; k < 5; k++) {
                say(c, "ping");
                hear(c, "ping");
            }
            OK(close(c));
        }
        _exit(0);
    }
    ep_add(e, l, EPOLLIN);
    int ended = 0, bytes = 0;
    while (ended < 40) {
        struct epoll_event v[8];
        int n = OK(epoll_wait(e, v, 8, SOON));
        TRUE(n > 0);
        for (int i = 0; i < n; i++) {
            int fd = v[i].data.fd;
            if (fd == l) {
                int a;
                while ((a = accept4(l, NULL, NULL, SOCK_NONBLOCK)) >= 0)
                    ep_add(e, a, EPOLLIN | EPOLLRDHUP);
                TRUE(errno == EAGAIN);
                continue;
            }
            char b[64];
            ssize_t r = OK(recv(fd, b, sizeof b, 0));
            bytes += r;
            if (r == 0) {
                OK(close(fd));
                ended++;
            } else
                send_all(fd, b, r);
        }
    }
    obs("%d", bytes);
    EQ(bytes, 40 * 5 * 4);
    reap(p, 0);
}

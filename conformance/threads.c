/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Threads in one socket, in one epoll, and each with its own. */
#include "socktest.h"

static void *send_1mib(void *a)
{
    static char b[4096];
    for (int i = 0; i < 256; i++)
        send_all(*(int *)a, b, sizeof b);
    return NULL;
}

static uint64_t drain(int fd)
{
    static __thread char b[65536];
    uint64_t n = 0;
    ssize_t r;
    while ((r = OK(recv(fd, b, sizeof b, 0))) > 0)
        n += r;
    return n;
}

static void *drain_thread(void *a)
{
    return (void *)(uintptr_t)drain(*(int *)a);
}

CASE(thread_many_send_into_one_socket)
{
    int s[2];
    pthread_t t[8], d;
    void *n;
    tcp_pair(s);
    d = thread(drain_thread, &s[1]);
    for (int i = 0; i < 8; i++)
        t[i] = thread(send_1mib, &s[0]);
    for (int i = 0; i < 8; i++)
        join(t[i]);
    OK(shutdown(s[0], SHUT_WR));
    EQ(pthread_join(d, &n), 0);
    EQ((uintptr_t)n, 8 << 20);
}

CASE(thread_many_receive_from_one_socket)
{
    int s[2];
    pthread_t t[4];
    uint64_t sum = 0;
    tcp_pair(s);
    for (int i = 0; i < 4; i++)
        t[i] = thread(drain_thread, &s[1]);
    for (int i = 0; i < 4; i++)
        send_1mib(&s[0]);
    OK(shutdown(s[0], SHUT_WR));
    for (int i = 0; i < 4; i++) {
        void *n;
        EQ(pthread_join(t[i], &n), 0); /* each sees the end */
        sum += (uintptr_t)n;
    }
    EQ(sum, 4 << 20);
}

/* A send of one byte is whole; each value arrives as often as it was sent. */
static void *send_letters(void *a)
{
    int *p = a;
    char c = 'a' + p[1];
    for (int i = 0; i < 2000; i++)
        EQ(send(p[0], &c, 1, 0), 1);
    return NULL;
}

CASE(thread_bytes_of_many_senders_are_all_there)
{
    int s[2], a[4][2], count[4] = {0};
    pthread_t t[4];
    tcp_pair(s);
    for (int i = 0; i < 4; i++) {
        a[i][0] = s[0];
        a[i][1] = i;
        t[i] = thread(send_letters, a[i]);
    }
    for (int n = 0; n < 8000;) {
        char b[512];
        ssize_t r = OK(recv(s[1], b, sizeof b, 0));
        TRUE(r > 0);
        for (int k = 0; k < r; k++) {
            TRUE(b[k] >= 'a' && b[k] < 'e');
            count[b[k] - 'a']++;
        }
        n += r;
    }
    for (int i = 0; i < 4; i++) {
        join(t[i]);
        EQ(count[i], 2000);
    }
}

static void *send_pattern(void *a)
{
    stream_send(*(int *)a, 8 << 20, 3, 50000);
    return NULL;
}

CASE(thread_one_sends_while_other_receives)
{
    int s[2];
    tcp_pair(s);
    pthread_t t = thread(send_pattern, &s[0]), u = thread(send_pattern, &s[1]);
    void *r(void *a)
    {
        stream_recv(*(int *)a, 8 << 20, 3, 50000);
        return NULL;
    }
    pthread_t v = thread(r, &s[0]);
    stream_recv(s[1], 8 << 20, 3, 50000);
    join(t);
    join(u);
    join(v);
}

struct own { int l, i; };

static void *own_client(void *a)
{
    struct own *o = a;
    int c = connected(o->l);
    for (int k = 0; k < 30; k++) {
        int v = o->i * 1000 + k, w;
        EQ(send(c, &v, sizeof v, 0), sizeof v);
        recv_all(c, &w, sizeof w);
        EQ(w, v + 1);
    }
    OK(close(c));
    return NULL;
}

static void *own_server(void *a)
{
    int fd = (int)(intptr_t)a, v;
    while (OK(recv(fd, &v, sizeof v, MSG_WAITALL)) == sizeof v) {
        v++;
        EQ(send(fd, &v, sizeof v, 0), sizeof v);
    }
    OK(close(fd));
    return NULL;
}

CASE(thread_64_each_with_own_connection)
{
    int l = listener(AF_INET, 128);
    struct own o[64];
    pthread_t t[64], u[64];
    for (int i = 0; i < 64; i++) {
        o[i] = (struct own){l, i};
        t[i] = thread(own_client, &o[i]);
    }
    for (int i = 0; i < 64; i++)
        u[i] = thread(own_server, (void *)(intptr_t)accepted(l));
    for (int i = 0; i < 64; i++) {
        join(t[i]);
        join(u[i]);
    }
}

static void *connect_close(void *a)
{
    for (int i = 0; i < 50; i++) {
        int c = connected(*(int *)a);
        hear(c, "x");
        hear_eof(c);
        OK(close(c));
    }
    return NULL;
}

static void *accept_close(void *a)
{
    for (int i = 0; i < 50; i++) {
        int c = accepted(*(int *)a);
        say(c, "x");
        OK(close(c));
    }
    return NULL;
}

CASE(thread_accept_and_connect_storm)
{
    int l = listener(AF_INET, 64);
    pthread_t t[8];
    for (int i = 0; i < 8; i++)
        t[i] = thread(i & 1 ? accept_close : connect_close, &l);
    for (int i = 0; i < 8; i++)
        join(t[i]);
    set_nonblock(l, 1);
    ERR(accept(l, NULL, NULL), EAGAIN);
}

static void *make_and_close(void *a)
{
    (void)a;
    for (int i = 0; i < 300; i++) {
        int s = OK(socket(AF_INET, SOCK_STREAM, 0)), d = OK(dup(s));
        OK(close(s));
        OK(close(d));
    }
    return NULL;
}

CASE(thread_socket_close_storm)
{
    pthread_t t[8];
    int n = OK(dup(0));
    OK(close(n));
    for (int i = 0; i < 8; i++)
        t[i] = thread(make_and_close, NULL);
    for (int i = 0; i < 8; i++)
        join(t[i]);
    EQ(OK(dup(0)) == n, 1);
}

struct shared_epoll { int e; uint64_t total; int left; };

static void *epoll_worker(void *a)
{
    struct shared_epoll *x = a;
    char b[4096];
    while (__atomic_load_n(&x->left, __ATOMIC_SEQ_CST) > 0) {
        struct epoll_event v;
        int n = OK(epoll_wait(x->e, &v, 1, 50));
        if (n == 0)
            continue;
        int fd = v.data.fd;
        ssize_t r;
        while ((r = recv(fd, b, sizeof b, MSG_DONTWAIT)) > 0)
            __atomic_add_fetch(&x->total, r, __ATOMIC_SEQ_CST);
        if (r < 0) {
            TRUE(errno == EAGAIN);
            ep_mod(x->e, fd, EPOLLIN | EPOLLONESHOT);
        } else
            __atomic_sub_fetch(&x->left, 1, __ATOMIC_SEQ_CST);
    }
    return NULL;
}

CASE(thread_many_in_one_epoll_oneshot)
{
    struct shared_epoll x = {ep_new(), 0, 16};
    int c[16];
    pthread_t t[4];
    for (int i = 0; i < 16; i++) {
        int s[2];
        tcp_pair(s);
        c[i] = s[0];
        ep_add(x.e, s[1], EPOLLIN | EPOLLONESHOT);
    }
    for (int i = 0; i < 4; i++)
        t[i] = thread(epoll_worker, &x);
    static char b[1000];
    for (int k = 0; k < 100; k++)
        for (int i = 0; i < 16; i++)
            send_all(c[i], b, sizeof b);
    for (int i = 0; i < 16; i++)
        OK(close(c[i]));
    for (int i = 0; i < 4; i++)
        join(t[i]);
    EQ(x.total, 16 * 100 * 1000);
}

struct once { int e, fd, got; };

static void *et_waiter(void *a)
{
    struct once *o = a;
    struct epoll_event v;
    int n = OK(epoll_wait(o->e, &v, 1, 300));
    __atomic_add_fetch(&o->got, n, __ATOMIC_SEQ_CST);
    return NULL;
}

/* One edge wakes one of the threads that wait in one epoll. */
CASE(thread_edge_wakes_one)
{
    int s[2];
    pthread_t t[4];
    tcp_pair(s);
    struct once o = {ep_new(), s[1], 0};
    ep_add(o.e, s[1], EPOLLIN | EPOLLET);
    for (int i = 0; i < 4; i++)
        t[i] = thread(et_waiter, &o);
    nap(50);
    say(s[0], "x");
    for (int i = 0; i < 4; i++)
        join(t[i]);
    EQ(o.got, 1);
}

static void *close_later(void *a)
{
    nap(20);
    OK(close(*(int *)a));
    return NULL;
}

CASE(thread_other_closes_peer)
{
    int s[2];
    tcp_pair(s);
    pthread_t t = thread(close_later, &s[0]);
    hear_eof(s[1]);
    join(t);
}

CASE(thread_other_closes_while_epoll_waits)
{
    static int s[2], q[2];
    int e = ep_new();
    tcp_pair(s);
    OK(pipe(q));
    ep_add(e, s[1], EPOLLIN);
    ep_add(e, q[0], EPOLLIN);
    void *f(void *a)
    {
        nap(20);
        OK(close(s[1]));
        hear_eof(s[0]);
        EQ(write(q[1], "x", 1), 1);
        return NULL;
    }
    pthread_t t = thread(f, NULL);
    EV(ep_one(e, q[0], 15000), EPOLLIN);
    join(t);
    EV(ep_one(e, q[0], 0), EPOLLIN);
}

static void *shutdown_later(void *a)
{
    nap(20);
    OK(shutdown(*(int *)a, SHUT_RDWR));
    return NULL;
}

CASE(thread_shutdown_by_other_wakes_reader)
{
    int s[2];
    tcp_pair(s);
    pthread_t t = thread(shutdown_later, &s[1]);
    hear_eof(s[1]);
    join(t);
    ERR(send(s[1], "x", 1, MSG_NOSIGNAL), EPIPE);
}

CASE(thread_shutdown_by_other_wakes_writer)
{
    int s[2];
    static char b[1 << 20];
    tcp_pair(s);
    pthread_t t = thread(shutdown_later, &s[0]);
    ssize_t r;
    while ((r = send(s[0], b, sizeof b, MSG_NOSIGNAL)) > 0)
        ;
    TRUE(r == -1 && errno == EPIPE);
    join(t);
}

CASE(thread_shutdown_by_other_wakes_accept)
{
    int l = listener(AF_INET, 4);
    pthread_t t = thread(shutdown_later, &l);
    ERR(accept(l, NULL, NULL), EINVAL);
    join(t);
}

CASE(thread_shutdown_by_other_wakes_poll_and_epoll)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN | EPOLLRDHUP);
    pthread_t t = thread(shutdown_later, &s[1]);
    EV(ep_one(e, s[1], 15000), EPOLLIN | EPOLLRDHUP | EPOLLHUP);
    join(t);
    EV(poll_now(s[1], POLLIN), POLLIN | POLLHUP);
}

CASE(thread_blocked_reader_and_writer_of_one_socket)
{
    int s[2];
    tcp_pair(s);
    void *rd(void *a)
    {
        hear(*(int *)a, "for the reader");
        return NULL;
    }
    pthread_t t = thread(rd, &s[0]), u = thread(send_pattern, &s[0]);
    nap(30);
    say(s[1], "for the reader"); /* the writer is blocked meanwhile */
    join(t);
    stream_recv(s[1], 8 << 20, 3, 50000);
    join(u);
}

CASE(thread_exits_its_sockets_stay)
{
    static int s[2];
    void *mk(void *a)
    {
        (void)a;
        tcp_pair(s);
        say(s[0], "made by thread");
        return NULL;
    }
    join(thread(mk, NULL));
    hear(s[1], "made by thread");
    say(s[1], "back");
    hear(s[0], "back");
}

CASE(thread_300_short_threads)
{
    static int s[2];
    tcp_pair(s);
    void *one(void *a)
    {
        (void)a;
        say(s[0], "x");
        hear(s[1], "x");
        return NULL;
    }
    for (int i = 0; i < 300; i++)
        join(thread(one, NULL));
}

CASE(thread_loopback_echo)
{
    int l = listener(AF_INET, 4);
    void *srv(void *a)
    {
        int c = accepted(*(int *)a);
        char b[4096];
        ssize_t r;
        while ((r = OK(recv(c, b, sizeof b, 0))) > 0)
            send_all(c, b, r);
        OK(close(c));
        return NULL;
    }
    pthread_t t = thread(srv, &l);
    int c = connected(l);
    for (int i = 0; i < 500; i++) {
        say(c, "ping");
        hear(c, "ping");
    }
    OK(shutdown(c, SHUT_WR));
    hear_eof(c);
    join(t);
}

CASE(thread_cancelled_in_recv)
{
    int s[2];
    void *res;
    tcp_pair(s);
    void *rd(void *a)
    {
        char b[4];
        recv(*(int *)a, b, 4, 0);
        return NULL;
    }
    pthread_t t = thread(rd, &s[1]);
    nap(20);
    EQ(pthread_cancel(t), 0);
    EQ(pthread_join(t, &res), 0);
    TRUE(res == PTHREAD_CANCELED);
    say(s[0], "x");
    hear(s[1], "x");
}

CASE(thread_cancelled_in_accept_and_epoll)
{
    int l = listener(AF_INET, 4), s[2], e = ep_new();
    void *res;
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN);
    void *ac(void *a)
    {
        accept(*(int *)a, NULL, NULL);
        return NULL;
    }
    void *ew(void *a)
    {
        struct epoll_event v;
        epoll_wait(*(int *)a, &v, 1, -1);
        return NULL;
    }
    pthread_t t = thread(ac, &l), u = thread(ew, &e);
    nap(20);
    EQ(pthread_cancel(t), 0);
    EQ(pthread_cancel(u), 0);
    EQ(pthread_join(t, &res), 0);
    TRUE(res == PTHREAD_CANCELED);
    EQ(pthread_join(u, &res), 0);
    TRUE(res == PTHREAD_CANCELED);
    int c = connected(l), a = accepted(l);
    say(c, "x");
    hear(a, "x");
    say(s[0], "x");
    EV(ep_one(e, s[1], 15000), EPOLLIN);
}

CASE(thread_fork_from_thread)
{
    static int s[2];
    tcp_pair(s);
    void *f(void *a)
    {
        (void)a;
        pid_t p = fork_child();
        if (!p) {
            hear(s[1], "x");
            say(s[1], "y");
            _exit(0);
        }
        say(s[0], "x");
        hear(s[0], "y");
        reap(p, 0);
        return NULL;
    }
    join(thread(f, NULL));
}

/* Two threads wait in one instance; the one that got an event does not come back: the other gets the next. */
struct waits { int ep; struct gate got, go; int fd; };

static void *wait_once(void *a)
{
    struct waits *w = a;
    struct epoll_event ev;
    EQ(epoll_wait(w->ep, &ev, 1, -1), 1);
    w->fd = ev.data.fd;
    gate_open(&w->got);
    gate_wait(&w->go);
    return NULL;
}

CASE(thread_epoll_next_event_wakes_the_other)
{
    for (int round = 0; round < 20; round++) {
        int a[2], b[2], ep = ep_new();
        struct waits w[2];
        pthread_t t[2];
        tcp_pair(a);
        tcp_pair(b);
        ep_add(ep, a[1], EPOLLIN | EPOLLONESHOT);
        ep_add(ep, b[1], EPOLLIN | EPOLLONESHOT);
        for (int i = 0; i < 2; i++) {
            w[i].ep = ep;
            gate_init(&w[i].got);
            gate_init(&w[i].go);
            t[i] = thread(wait_once, &w[i]);
        }
        usleep(3000);
        say(a[0], "a");
        struct pollfd p[2] = {{w[0].got.fd[0], POLLIN, 0}, {w[1].got.fd[0], POLLIN, 0}};
        TRUE(poll(p, 2, -1) >= 1);
        int first = p[0].revents ? 0 : 1;
        EQ(w[first].fd == a[1], 1);
        if (round & 1)
            usleep(1000);
        say(b[0], "b");
        gate_wait(&w[!first].got);
        EQ(w[!first].fd == b[1], 1);
        for (int i = 0; i < 2; i++) {
            gate_open(&w[i].go);
            OK(-pthread_join(t[i], NULL));
            close(w[i].got.fd[0]), close(w[i].got.fd[1]), close(w[i].go.fd[0]), close(w[i].go.fd[1]);
        }
        close(ep), close(a[0]), close(a[1]), close(b[0]), close(b[1]);
    }
}

/* Writers that wait for room must not eat the wake-ups of a reader of the same socket. */
static void *blocked_writer(void *a)
{
    static char big[4 << 20];
    size_t done = 0;
    ssize_t n;
    while (done < sizeof big && (n = send(*(int *)a, big + done, sizeof big - done, MSG_NOSIGNAL)) > 0)
        done += n;
    return NULL;
}

static void *echo_reader(void *a)
{
    struct { int fd, out; } *r = a;
    char c;
    while (recv(r->fd, &c, 1, 0) == 1)
        EQ(write(r->out, &c, 1), 1);
    return NULL;
}

CASE(thread_reader_wakes_among_blocked_writers)
{
    int s[2], p[2];
    pthread_t t[4];
    tcp_pair(s);
    OK(pipe(p));
    for (int i = 0; i < 3; i++)
        t[i] = thread(blocked_writer, &s[1]);
    usleep(50000);
    struct { int fd, out; } r = {s[1], p[1]};
    t[3] = thread(echo_reader, &r);
    for (int i = 0; i < 300; i++) {
        char c = 'a' + i % 26, d = 0;
        if (i % 3 == 0)
            usleep(1500);
        EQ(send(s[0], &c, 1, 0), 1);
        EQ(read(p[0], &d, 1), 1);
        EQ(d, c);
    }
    OK(shutdown(s[1], SHUT_RDWR));
    OK(close(s[0]));
    for (int i = 0; i < 4; i++)
        OK(-pthread_join(t[i], NULL));
}

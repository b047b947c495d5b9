/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Signals that meet blocked calls. */
#include "socktest.h"

/* Calls until a signal that keeps coming has interrupted one. */
#define INTERRUPTED(call)                                                      \
    do {                                                                       \
        on_signal(SIGUSR1, 0);                                                 \
        struct pinger pg_;                                                     \
        pinger_start(&pg_, SIGUSR1);                                           \
        ERR(call, EINTR);                                                      \
        pinger_stop(&pg_);                                                     \
        TRUE(sig_count > 0);                                                   \
    } while (0)

/* Waits until the handler has run a few times more. */
static void *after_signals(void *a)
{
    struct gate *g = a;
    int base = __atomic_load_n(&sig_count, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&sig_count, __ATOMIC_SEQ_CST) < base + 5)
        nap(2);
    gate_open(g);
    return NULL;
}

CASE(signal_eintr_recv)
{
    int s[2];
    char b[4];
    tcp_pair(s);
    INTERRUPTED(recv(s[1], b, 4, 0));
    say(s[0], "x");
    hear(s[1], "x");
}

CASE(signal_eintr_read_variants)
{
    int s[2];
    char b[4];
    struct iovec v = {b, 4};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
    tcp_pair(s);
    INTERRUPTED(read(s[1], b, 4));
    INTERRUPTED(readv(s[1], &v, 1));
    INTERRUPTED(recvmsg(s[1], &m, 0));
    INTERRUPTED(recvfrom(s[1], b, 4, 0, NULL, NULL));
    INTERRUPTED(recv(s[1], b, 4, MSG_PEEK));
}

CASE(signal_eintr_recv_waitall_returns_partial)
{
    int s[2];
    char b[4];
    tcp_pair(s);
    say(s[0], "ab");
    wait_bytes(s[1], 2);
    on_signal(SIGUSR1, 0);
    struct pinger p;
    pinger_start(&p, SIGUSR1);
    EQ(recv(s[1], b, 4, MSG_WAITALL), 2);
    pinger_stop(&p);
}

CASE(signal_eintr_send)
{
    int s[2];
    static char b[1 << 20];
    tcp_pair(s);
    fill_sndbuf(s[0]);
    on_signal(SIGUSR1, 0);
    struct pinger p;
    pinger_start(&p, SIGUSR1);
    ssize_t r;
    while ((r = send(s[0], b, sizeof b, 0)) > 0) /* some may fit first */
        ;
    TRUE(r == -1 && errno == EINTR);
    pinger_stop(&p);
}

CASE(signal_eintr_send_returns_partial)
{
    int s[2];
    size_t n = 64 << 20;
    char *b = calloc(1, n);
    tcp_pair(s);
    on_signal(SIGUSR1, 0);
    struct pinger p;
    pinger_start(&p, SIGUSR1);
    ssize_t r = send(s[0], b, n, 0);
    pinger_stop(&p);
    TRUE(r > 0 && (size_t)r < n);
}

CASE(signal_eintr_accept)
{
    int l = listener(AF_INET, 4);
    INTERRUPTED(accept(l, NULL, NULL));
    INTERRUPTED(accept4(l, NULL, NULL, SOCK_CLOEXEC));
    int c = connected(l), a = accepted(l);
    say(c, "x");
    hear(a, "x");
}

CASE(signal_eintr_connect)
{
    int q, l = full_listener(&q);
    int s = OK(socket(AF_INET, SOCK_STREAM, 0));
    union addr to;
    socklen_t len = name_of(l, &to);
    INTERRUPTED(connect(s, &to.sa, len));
    /* and it goes on in the background */
    accepted(l);
    EV(wait_ev(s, POLLOUT), POLLOUT);
    int a = accepted(l);
    say(s, "x");
    hear(a, "x");
}

CASE(signal_eintr_epoll_wait)
{
    int s[2], e = ep_new();
    struct epoll_event v;
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN);
    INTERRUPTED(epoll_wait(e, &v, 1, -1));
    INTERRUPTED(epoll_wait(e, &v, 1, 15000));
    say(s[0], "x");
    EV(ep_one(e, s[1], 15000), EPOLLIN);
}

CASE(signal_eintr_poll_and_select)
{
    int s[2];
    tcp_pair(s);
    struct pollfd p = {s[1], POLLIN, 0};
    INTERRUPTED(poll(&p, 1, -1));
    INTERRUPTED(poll(&p, 1, 15000));
    struct timespec t = {15, 0};
    INTERRUPTED(ppoll(&p, 1, &t, NULL));
    fd_set r;
    FD_ZERO(&r);
    FD_SET(s[1], &r);
    INTERRUPTED(select(s[1] + 1, &r, NULL, NULL, NULL));
    FD_SET(s[1], &r);
    INTERRUPTED(pselect(s[1] + 1, &r, NULL, NULL, NULL, NULL));
}

/* poll, select and epoll_wait are never restarted. */
CASE(signal_sa_restart_does_not_restart_waiting_calls)
{
    int s[2], e = ep_new();
    struct epoll_event v;
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN);
    on_signal(SIGUSR1, SA_RESTART);
    struct pinger p;
    struct pollfd q = {s[1], POLLIN, 0};
    fd_set r;
    FD_ZERO(&r);
    FD_SET(s[1], &r);
    pinger_start(&p, SIGUSR1);
    ERR(poll(&q, 1, -1), EINTR);
    ERR(select(s[1] + 1, &r, NULL, NULL, NULL), EINTR);
    ERR(epoll_wait(e, &v, 1, -1), EINTR);
    pinger_stop(&p);
}

CASE(signal_sa_restart_recv)
{
    int s[2];
    tcp_pair(s);
    on_signal(SIGUSR1, SA_RESTART);
    struct gate g;
    gate_init(&g);
    struct pinger p;
    pid_t c = fork_child();
    if (!c) {
        gate_wait(&g);
        say(s[0], "after signals");
        _exit(0);
    }
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &old);
    pthread_t t = thread(after_signals, &g);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pinger_start(&p, SIGUSR1);
    char b[32];
    EQ(recv(s[1], b, 32, 0), 13);
    pinger_stop(&p);
    join(t);
    TRUE(sig_count >= 5);
    while (waitpid(c, NULL, 0) < 0 && errno == EINTR)
        ;
}

CASE(signal_sa_restart_accept)
{
    int l = listener(AF_INET, 4);
    on_signal(SIGUSR1, SA_RESTART);
    struct gate g;
    gate_init(&g);
    struct pinger p;
    pid_t c = fork_child();
    if (!c) {
        gate_wait(&g);
        int s = connected(l);
        hear(s, "x");
        _exit(0);
    }
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &old);
    pthread_t t = thread(after_signals, &g);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pinger_start(&p, SIGUSR1);
    int a = accepted(l);
    pinger_stop(&p);
    say(a, "x");
    join(t);
    reap(c, 0);
}

CASE(signal_sa_restart_connect)
{
    int q, l = full_listener(&q);
    int s = OK(socket(AF_INET, SOCK_STREAM, 0));
    on_signal(SIGUSR1, SA_RESTART);
    struct gate g;
    gate_init(&g);
    struct pinger p;
    pid_t c = fork_child();
    if (!c) {
        gate_wait(&g);
        accepted(l);
        int a = accepted(l);
        hear(a, "x");
        _exit(0);
    }
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &old);
    pthread_t t = thread(after_signals, &g);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pinger_start(&p, SIGUSR1);
    EQ(try_connect(s, l), 0);
    pinger_stop(&p);
    say(s, "x");
    join(t);
    reap(c, 0);
}

CASE(signal_ignored_does_not_interrupt)
{
    int s[2];
    tcp_pair(s);
    signal(SIGUSR2, SIG_IGN);
    struct pinger p;
    pid_t c = fork_child();
    if (!c) {
        nap(60);
        say(s[0], "x");
        _exit(0);
    }
    pinger_start(&p, SIGUSR2);
    char b[4];
    EQ(recv(s[1], b, 1, 0), 1);
    pinger_stop(&p);
    reap(c, 0);
}

/* With a timeout set a call is interrupted even under SA_RESTART. */
CASE(signal_rcvtimeo_is_eintr_even_with_sa_restart)
{
    int s[2];
    char b[4];
    struct timeval t = {15, 0};
    tcp_pair(s);
    OK(setsockopt(s[1], SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t));
    on_signal(SIGUSR1, SA_RESTART);
    struct pinger p;
    pinger_start(&p, SIGUSR1);
    ERR(recv(s[1], b, 4, 0), EINTR);
    pinger_stop(&p);
}

CASE(signal_rcvtimeo_eintr)
{
    int s[2];
    char b[4];
    struct timeval t = {15, 0};
    tcp_pair(s);
    OK(setsockopt(s[1], SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t));
    INTERRUPTED(recv(s[1], b, 4, 0));
}

CASE(signal_data_before_signal_wins)
{
    int s[2];
    char b[8];
    tcp_pair(s);
    say(s[0], "abc");
    wait_bytes(s[1], 3);
    on_signal(SIGUSR1, 0);
    struct pinger p;
    pinger_start(&p, SIGUSR1);
    EQ(recv(s[1], b, 8, 0), 3);
    pinger_stop(&p);
}

static int h_read, h_write;
static volatile int h_done;

static void io_in_handler(int sig)
{
    (void)sig;
    int e = errno;
    char b[8];
    if (send(h_write, "sig", 3, 0) == 3 && recv(h_read, b, 3, MSG_WAITALL) == 3)
        h_done++;
    errno = e;
}

CASE(signal_handler_uses_sockets)
{
    int s[2], t[2];
    tcp_pair(s);
    tcp_pair(t);
    h_write = t[0];
    h_read = t[1];
    struct sigaction a = {.sa_handler = io_in_handler, .sa_flags = SA_RESTART};
    OK(sigaction(SIGUSR1, &a, NULL));
    struct pinger p;
    pinger_start(&p, SIGUSR1);
    for (int i = 0; i < 3000; i++) {
        say(s[0], "main");
        hear(s[1], "main");
    }
    while (h_done < 3)
        nap(1);
    pinger_stop(&p);
}

static void write_pipe(int sig)
{
    (void)sig;
    int e = errno;
    ssize_t r = write(h_write, "x", 1);
    (void)r;
    errno = e;
}

/* the self-pipe trick, on a TCP connection */
CASE(signal_self_pipe_wakes_epoll)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    h_write = s[0];
    struct sigaction a = {.sa_handler = write_pipe};
    OK(sigaction(SIGUSR1, &a, NULL));
    ep_add(e, s[1], EPOLLIN);
    pid_t me = getpid(), c = fork_child();
    if (!c) {
        nap(20);
        OK(kill(me, SIGUSR1));
        _exit(0);
    }
    struct epoll_event v;
    int n;
    while ((n = epoll_wait(e, &v, 1, 15000)) < 0 && errno == EINTR)
        ;
    EQ(n, 1);
    hear(s[1], "x");
    reap(c, 0);
}

CASE(signal_storm_during_transfer)
{
    int s[2];
    tcp_pair(s);
    on_signal(SIGUSR1, SA_RESTART);
    pid_t c = fork_child();
    if (!c) {
        struct pinger p;
        pinger_start(&p, SIGUSR1);
        stream_send(s[0], 8 << 20, 7, 50000);
        pinger_stop(&p);
        _exit(0);
    }
    OK(close(s[0]));
    struct pinger p;
    pinger_start(&p, SIGUSR1);
    stream_recv(s[1], 8 << 20, 7, 50000);
    pinger_stop(&p);
    hear_eof(s[1]);
    reap(c, 0);
}

CASE(signal_alarm_interrupts_recv)
{
    int s[2];
    char b[4];
    tcp_pair(s);
    on_signal(SIGALRM, 0);
    struct itimerval t = {{0, 20000}, {0, 20000}};
    OK(setitimer(ITIMER_REAL, &t, NULL));
    ERR(recv(s[1], b, 4, 0), EINTR);
    t = (struct itimerval){{0, 0}, {0, 0}};
    OK(setitimer(ITIMER_REAL, &t, NULL));
    TRUE(sig_count > 0);
}

/* Signals as a profiler sends them, or Go's scheduler. */
static void *storm(void *a)
{
    struct pinger *p = a;
    while (!__atomic_load_n(&p->stop, __ATOMIC_SEQ_CST)) {
        struct timespec t = {0, 300000};
        nanosleep(&t, NULL);
        pthread_kill(p->target, p->sig);
    }
    return NULL;
}

static void storm_start(struct pinger *p, int flags)
{
    on_signal(SIGUSR1, flags);
    *p = (struct pinger){.target = pthread_self(), .sig = SIGUSR1};
    p->t = thread(storm, p);
}

CASE(signal_restart_of_everything_short)
{
    struct pinger p;
    storm_start(&p, SA_RESTART);
    for (int n = 0; n < 50 || sig_count < 50; n++) {
        int l = listener(AF_INET, 8);
        union addr to, at;
        socklen_t len = name_of(l, &to);
        int s = OK(socket(AF_INET, SOCK_STREAM, 0));
        union addr any = {.in = {.sin_family = AF_INET, .sin_addr = to.in.sin_addr}};
        OK(bind(s, &any.sa, sizeof any.in));
        OK(connect(s, &to.sa, len));
        int a = accepted(l);
        name_of(s, &any);
        len = sizeof at;
        OK(getpeername(a, &at.sa, &len));
        EQ(at.in.sin_port, any.in.sin_port);
        setopt_int(s, IPPROTO_TCP, TCP_NODELAY, 1);
        OK(shutdown(a, SHUT_WR));
        hear_eof(s);
        OK(close(a));
        OK(close(s));
        OK(close(l));
    }
    pinger_stop(&p);
}

/* Without SA_RESTART: what does not wait on Linux is not interrupted there. */
CASE(signal_leaves_short_calls_alone)
{
    struct pinger p;
    int l = listener(AF_INET, 8);
    storm_start(&p, 0);
    for (int n = 0; n < 1000 || sig_count < 50; n++) {
        union addr to;
        name_of(l, &to);
        setopt_int(l, SOL_SOCKET, SO_KEEPALIVE, n & 1);
        EQ(getopt_int(l, SOL_SOCKET, SO_KEEPALIVE), n & 1);
        OK(listen(l, 8 + (n & 1)));
    }
    pinger_stop(&p);
}

CASE(signal_stop_and_continue)
{
    int s[2];
    tcp_pair(s);
    pid_t c = fork_child();
    if (!c) {
        OK(close(s[0]));
        hear(s[1], "x");
        say(s[1], "y");
        _exit(0);
    }
    OK(close(s[1]));
    int st;
    OK(kill(c, SIGSTOP));
    OK(waitpid(c, &st, WUNTRACED));
    TRUE(WIFSTOPPED(st));
    say(s[0], "x");
    EV(poll_ms(s[0], POLLIN, 30), 0);
    OK(kill(c, SIGCONT));
    hear(s[0], "y");
    reap(c, 0);
}

CASE(signal_sigurg_is_ignored_by_default)
{
    int s[2];
    tcp_pair(s);
    OK(fcntl(s[1], F_SETOWN, getpid()));
    EQ(send(s[0], "!", 1, MSG_OOB), 1);
    wait_ev(s[1], POLLPRI);
    say(s[0], "x");
    hear(s[1], "x");
}

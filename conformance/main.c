/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* The runner and the helpers that all case files share. */
#define SOCKTEST_MAIN
#include "socktest.h"
#include <fnmatch.h>
#include <sys/prctl.h>
#include <sys/resource.h>

extern const struct tcase *const __start_socktest_cases[];
extern const struct tcase *const __stop_socktest_cases[];

/* Lives in shared memory, so a killed case leaves what it had noted. */
struct report {
    pid_t pid;
    int done, failed, skipped;
    char obs[2048];
    char fail[1024];
    pid_t daemons[8];
    int ndaemons;
};
static struct report *rep;

/* ------------------------------------------------------------ reporting */

const char *ename(int e)
{
    if (e == 0)
        return "0";
    const char *n = strerrorname_np(e);
    return n ? n : "E?";
}

const char *evnames(unsigned ev)
{
    static __thread char b[160];
    static const struct { unsigned bit; const char *name; } names[] = {
        {EPOLLIN, "IN"}, {EPOLLPRI, "PRI"}, {EPOLLOUT, "OUT"},
        {EPOLLERR, "ERR"}, {EPOLLHUP, "HUP"}, {POLLNVAL, "NVAL"},
        {EPOLLRDNORM, "RDNORM"}, {EPOLLRDBAND, "RDBAND"},
        {EPOLLWRNORM, "WRNORM"}, {EPOLLWRBAND, "WRBAND"},
        {EPOLLRDHUP, "RDHUP"},
    };
    b[0] = 0;
    for (unsigned i = 0; i < sizeof names / sizeof *names; i++)
        if (ev & names[i].bit) {
            if (b[0])
                strcat(b, "|");
            strcat(b, names[i].name);
            ev &= ~names[i].bit;
        }
    if (ev)
        snprintf(b + strlen(b), 32, "%s0x%x", b[0] ? "|" : "", ev);
    return b[0] ? b : "none";
}

void obs(const char *fmt, ...)
{
    if (!rep || getpid() != rep->pid || gettid() != rep->pid)
        return;
    int saved = errno;
    size_t n = strlen(rep->obs);
    if (n + 2 < sizeof rep->obs) {
        if (n)
            rep->obs[n++] = ' ';
        va_list ap;
        va_start(ap, fmt);
        vsnprintf(rep->obs + n, sizeof rep->obs - n, fmt, ap);
        va_end(ap);
    }
    errno = saved;
}

/* The first failure of any process of the case is the one that is told; the
 * whole group ends with it, so that nobody waits for the one that failed. */
__thread struct place at_place;

void fail_at(const char *file, int line, const char *fmt, ...)
{
    char b[900];
    if (!strcmp(file, __FILE__) && at_place.file) {
        file = at_place.file;
        line = at_place.line;
    }
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(b, sizeof b, fmt, ap);
    va_end(ap);
    if (!rep) {
        fprintf(stderr, "helper: FAIL %s:%d %s\n", file, line, b);
        _exit(97);
    }
    if (!__atomic_exchange_n(&rep->failed, 1, __ATOMIC_SEQ_CST)) {
        snprintf(rep->fail, sizeof rep->fail, "%s:%d %s", file, line, b);
        __atomic_store_n(&rep->failed, 2, __ATOMIC_SEQ_CST);
    } else {
        while (__atomic_load_n(&rep->failed, __ATOMIC_SEQ_CST) != 2)
            sched_yield();
    }
    if (getpgid(0) == rep->pid)
        kill(-rep->pid, SIGKILL);
    kill(rep->pid, SIGKILL);
    _exit(97);
}

void skip(const char *why)
{
    snprintf(rep->obs, sizeof rep->obs, "skipped: %s", why);
    rep->done = 1;
    _exit(0);
}

/* ------------------------------------------------------------ sockets */

socklen_t loop_addr(int fam, int port, union addr *a)
{
    memset(a, 0, sizeof *a);
    if (fam == AF_INET6) {
        a->in6.sin6_family = AF_INET6;
        a->in6.sin6_port = htons(port);
        a->in6.sin6_addr = in6addr_loopback;
        return sizeof a->in6;
    }
    a->in.sin_family = AF_INET;
    a->in.sin_port = htons(port);
    a->in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return sizeof a->in;
}

socklen_t name_of(int fd, union addr *a)
{
    socklen_t l = sizeof *a;
    memset(a, 0, sizeof *a);
    OK(getsockname(fd, &a->sa, &l));
    return l;
}

socklen_t peer_of(int fd, union addr *a)
{
    socklen_t l = sizeof *a;
    memset(a, 0, sizeof *a);
    OK(getpeername(fd, &a->sa, &l));
    return l;
}

int port_of(int fd)
{
    union addr a;
    name_of(fd, &a);
    return ntohs(a.sa.sa_family == AF_INET6 ? a.in6.sin6_port : a.in.sin_port);
}

int same_addr(const union addr *a, const union addr *b)
{
    if (a->sa.sa_family != b->sa.sa_family)
        return 0;
    if (a->sa.sa_family == AF_INET6)
        return a->in6.sin6_port == b->in6.sin6_port &&
               !memcmp(&a->in6.sin6_addr, &b->in6.sin6_addr, 16);
    return a->in.sin_port == b->in.sin_port &&
           a->in.sin_addr.s_addr == b->in.sin_addr.s_addr;
}

void need_ipv6(void)
{
    int s = socket(AF_INET6, SOCK_STREAM, 0);
    union addr a;
    if (s < 0 || bind(s, &a.sa, loop_addr(AF_INET6, 0, &a)) < 0)
        skip("no ipv6 loopback");
    close(s);
}

int bound(int fam, int type)
{
    union addr a;
    int s = OK(socket(fam, type, 0));
    OK(bind(s, &a.sa, loop_addr(fam, 0, &a)));
    return s;
}

int listener(int fam, int backlog)
{
    int s = bound(fam, SOCK_STREAM);
    OK(listen(s, backlog));
    return s;
}

int try_connect(int fd, int to)
{
    union addr a;
    socklen_t l = name_of(to, &a);
    return connect(fd, &a.sa, l);
}

int connected(int lfd)
{
    union addr a;
    name_of(lfd, &a);
    int s = OK(socket(a.sa.sa_family, SOCK_STREAM, 0));
    OK(try_connect(s, lfd));
    return s;
}

int accepted(int lfd) { return OK(accept(lfd, NULL, NULL)); }

void tcp_pair_fam(int fam, int sv[2])
{
    int l = listener(fam, 4);
    sv[0] = connected(l);
    sv[1] = accepted(l);
    OK(close(l));
}

void tcp_pair(int sv[2]) { tcp_pair_fam(AF_INET, sv); }

void udp_pair(int fam, int sv[2])
{
    sv[0] = bound(fam, SOCK_DGRAM);
    sv[1] = bound(fam, SOCK_DGRAM);
    OK(try_connect(sv[0], sv[1]));
    OK(try_connect(sv[1], sv[0]));
}

int full_listener(int *queued)
{
    int l = listener(AF_INET, 0);
    *queued = connected(l);
    wait_ev(l, POLLIN);
    return l;
}

int getopt_int(int fd, int level, int name)
{
    int v = -12345;
    socklen_t l = sizeof v;
    if (getsockopt(fd, level, name, &v, &l) < 0)
        fail_at(__FILE__, __LINE__, "getsockopt(%d, %d) got -1 (errno %s)",
                level, name, ename(errno));
    EQ(l, sizeof v);
    return v;
}

void setopt_int(int fd, int level, int name, int v)
{
    if (setsockopt(fd, level, name, &v, sizeof v) < 0)
        fail_at(__FILE__, __LINE__, "setsockopt(%d, %d, %d) got -1 (errno %s)",
                level, name, v, ename(errno));
}

void set_nonblock(int fd, int on)
{
    int f = OK(fcntl(fd, F_GETFL));
    OK(fcntl(fd, F_SETFL, on ? f | O_NONBLOCK : f & ~O_NONBLOCK));
}

void linger0_close(int fd)
{
    struct linger l = {1, 0};
    OK(setsockopt(fd, SOL_SOCKET, SO_LINGER, &l, sizeof l));
    OK(close(fd));
}

/* ------------------------------------------------------------ waiting */

static long now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

void nap(int ms)
{
    struct timespec t = {ms / 1000, ms % 1000 * 1000000L};
    while (nanosleep(&t, &t) < 0 && errno == EINTR)
        ;
}

short poll_ms(int fd, short ev, int ms)
{
    struct pollfd p = {fd, ev, 0};
    long end = now_ms() + ms;
    int r;
    while ((r = poll(&p, 1, ms)) < 0 && errno == EINTR) {
        long left = end - now_ms();
        ms = left > 0 ? left : 0;
    }
    OK(r);
    return p.revents;
}

short poll_now(int fd, short ev) { return poll_ms(fd, ev, 0); }

short wait_ev(int fd, short ev)
{
    short r = poll_ms(fd, ev, 15000);
    if (!r)
        fail_at(__FILE__, __LINE__, "poll for %s got 0 (errno 0)", evnames(ev));
    return r;
}

void wait_all(int fd, short ev)
{
    long end = now_ms() + 15000;
    for (;;) {
        short r = poll_ms(fd, ev, 1000);
        if ((r & ev) == ev)
            return;
        if (now_ms() > end)
            fail_at(__FILE__, __LINE__, "poll for all of %x got %s (errno 0)",
                    (unsigned)ev, evnames(r));
        nap(1);
    }
}

void wait_bytes(int fd, size_t n)
{
    static __thread char b[1 << 17];
    long end = now_ms() + 15000;
    ssize_t r;
    if (n > sizeof b)
        abort();
    while ((r = recv(fd, b, n, MSG_PEEK | MSG_DONTWAIT)) < (ssize_t)n) {
        if (r < 0 && errno != EAGAIN && errno != EINTR)
            OK(r);
        if (now_ms() > end)
            fail_at(__FILE__, __LINE__,
                    "peek for %zu bytes got %zd (errno %s)", n, r,
                    ename(r < 0 ? errno : 0));
        nap(1);
    }
}

/* ------------------------------------------------------------ data */

void send_all(int fd, const void *b, size_t n)
{
    const char *p = b;
    while (n) {
        ssize_t r = OK(send(fd, p, n, MSG_NOSIGNAL));
        p += r;
        n -= r;
    }
}

void recv_all(int fd, void *b, size_t n)
{
    char *p = b;
    while (n) {
        ssize_t r = OK(recv(fd, p, n, 0));
        if (r == 0)
            fail_at(__FILE__, __LINE__, "recv got 0 with %zu wanted (errno 0)", n);
        p += r;
        n -= r;
    }
}

void say(int fd, const char *s) { send_all(fd, s, strlen(s)); }

void hear(int fd, const char *s)
{
    char b[4096];
    size_t n = strlen(s);
    recv_all(fd, b, n);
    b[n] = 0;
    if (strcmp(b, s))
        fail_at(__FILE__, __LINE__, "recv got \"%s\" want \"%s\" (errno 0)", b, s);
}

void hear_eof(int fd)
{
    char c;
    EQ(recv(fd, &c, 1, 0), 0);
}

uint64_t rnd(uint64_t *s)
{
    *s ^= *s << 13;
    *s ^= *s >> 7;
    *s ^= *s << 17;
    return *s;
}

void fill_pattern(unsigned char *b, size_t n, uint64_t at, uint64_t seed)
{
    for (size_t i = 0; i < n; i++, at++)
        b[i] = (unsigned char)((at * 0x9E3779B97F4A7C15ull + seed) >> 56);
}

size_t fill_sndbuf(int fd)
{
    static char b[65536];
    size_t total = 0;
    for (int full = 0; full < 12;) {
        ssize_t r = send(fd, b, sizeof b, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (r >= 0) {
            total += r;
            full = 0;
        } else {
            if (errno != EAGAIN)
                OK(r);
            /* Delayed acknowledgements and window probes (at 40 and 200 ms on
             * Linux) still move some into the peer's buffer: settle. */
            full++;
            nap(50);
        }
    }
    return total;
}

void stream_send(int fd, uint64_t n, uint64_t seed, size_t max_chunk)
{
    unsigned char *b = malloc(max_chunk);
    uint64_t st = seed | 1, at = 0;
    while (at < n) {
        size_t c = 1 + rnd(&st) % max_chunk;
        if (c > n - at)
            c = n - at;
        fill_pattern(b, c, at, seed);
        send_all(fd, b, c);
        at += c;
    }
    free(b);
}

void stream_recv(int fd, uint64_t n, uint64_t seed, size_t max_chunk)
{
    unsigned char *b = malloc(max_chunk), *w = malloc(max_chunk);
    uint64_t st = (seed + 77) | 1, at = 0;
    while (at < n) {
        size_t c = 1 + rnd(&st) % max_chunk;
        if (c > n - at)
            c = n - at;
        ssize_t r = OK(recv(fd, b, c, 0));
        if (r == 0)
            fail_at(__FILE__, __LINE__, "recv got 0 before the end (errno 0)");
        fill_pattern(w, r, at, seed);
        MEMEQ(b, w, r);
        at += r;
    }
    free(b);
    free(w);
}

/* ------------------------------------------------------------ processes */

pid_t fork_child(void)
{
    fflush(NULL);
    return OK(fork());
}

void reap(pid_t pid, int want)
{
    int st;
    pid_t r;
    while ((r = waitpid(pid, &st, 0)) < 0 && errno == EINTR)
        ;
    OK(r);
    int got = WIFEXITED(st) ? WEXITSTATUS(st) : 128 + WTERMSIG(st);
    if (got != want)
        fail_at(__FILE__, __LINE__, "child's status got %d want %d (errno 0)",
                got, want);
}

void fill_fd_holes(void)
{
    for (int i = 0; i < 16; i++)
        OK(dup(0));
}

void limit_fds(int n)
{
    struct rlimit r;
    OK(getrlimit(RLIMIT_NOFILE, &r));
    r.rlim_cur = n;
    OK(setrlimit(RLIMIT_NOFILE, &r));
}

void note_daemon(pid_t pid)
{
    if (rep->ndaemons < 8)
        rep->daemons[rep->ndaemons++] = pid;
}

void exec_self(const char *helper, ...)
{
    char *argv[16] = {"socktest", "helper", (char *)helper};
    int n = 3;
    va_list ap;
    va_start(ap, helper);
    while (n < 15 && (argv[n] = va_arg(ap, char *)))
        n++;
    va_end(ap);
    execv("/proc/self/exe", argv);
    _exit(96);
}

pthread_t thread(void *(*fn)(void *), void *arg)
{
    pthread_t t;
    EQ(pthread_create(&t, NULL, fn, arg), 0);
    return t;
}

void join(pthread_t t) { EQ(pthread_join(t, NULL), 0); }

void gate_init(struct gate *g) { OK(pipe(g->fd)); }
void gate_open(struct gate *g) { EQ(write(g->fd[1], "x", 1), 1); }
void gate_wait(struct gate *g)
{
    char c;
    ssize_t r;
    while ((r = read(g->fd[0], &c, 1)) < 0 && errno == EINTR)
        ;
    EQ(r, 1);
}

/* ------------------------------------------------------------ epoll */

int ep_new(void) { return OK(epoll_create1(EPOLL_CLOEXEC)); }

void ep_add(int ep, int fd, unsigned ev)
{
    struct epoll_event e = {.events = ev, .data.fd = fd};
    OK(epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e));
}

void ep_mod(int ep, int fd, unsigned ev)
{
    struct epoll_event e = {.events = ev, .data.fd = fd};
    OK(epoll_ctl(ep, EPOLL_CTL_MOD, fd, &e));
}

unsigned ep_one(int ep, int fd, int ms)
{
    struct epoll_event e[4];
    int n = OK(epoll_wait(ep, e, 4, ms));
    if (n == 0)
        return 0;
    EQ(n, 1);
    EQ(e[0].data.fd == fd, 1);
    return e[0].events;
}

/* ------------------------------------------------------------ signals */

volatile int sig_count;
static void count_signal(int s)
{
    (void)s;
    __atomic_add_fetch(&sig_count, 1, __ATOMIC_SEQ_CST);
}

void on_signal(int sig, int flags)
{
    struct sigaction a = {.sa_handler = count_signal, .sa_flags = flags};
    OK(sigaction(sig, &a, NULL));
}

static void *pinger_main(void *arg)
{
    struct pinger *p = arg;
    /* The call that is to be interrupted should wait by then. */
    nap(20);
    while (!__atomic_load_n(&p->stop, __ATOMIC_SEQ_CST)) {
        pthread_kill(p->target, p->sig);
        nap(5);
    }
    return NULL;
}

void pinger_start(struct pinger *p, int sig)
{
    p->target = pthread_self();
    p->sig = sig;
    p->stop = 0;
    /* The new thread must not take signals sent to the process. */
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &old);
    p->t = thread(pinger_main, p);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

void pinger_stop(struct pinger *p)
{
    __atomic_store_n(&p->stop, 1, __ATOMIC_SEQ_CST);
    join(p->t);
}

/* ------------------------------------------------------------ the runner */

static const struct tcase **all;
static int nall;

static int by_place(const void *a, const void *b)
{
    const struct tcase *x = *(const struct tcase *const *)a;
    const struct tcase *y = *(const struct tcase *const *)b;
    int c = strcmp(x->file, y->file);
    return c ? c : x->line - y->line;
}

static int timeout_s = 20;

static int run_one(const struct tcase *t)
{
    memset(rep, 0, sizeof *rep);
    fflush(NULL);
    sigset_t chld, old;
    sigemptyset(&chld);
    sigaddset(&chld, SIGCHLD);
    sigprocmask(SIG_BLOCK, &chld, &old);
    pid_t pid = fork();
    if (pid < 0) {
        printf("%s: FAIL main.c:%d fork got -1 (errno %s)\n", t->name, __LINE__,
               ename(errno));
        return 0;
    }
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        setpgid(0, 0);
        sigprocmask(SIG_SETMASK, &old, NULL);
        rep->pid = getpid();
        t->fn();
        rep->done = 1;
        exit(0);
    }
    setpgid(pid, pid);
    int st = 0, hung = 0;
    long end = now_ms() + timeout_s * 1000L;
    while (waitpid(pid, &st, WNOHANG) == 0) {
        long left = end - now_ms();
        if (left <= 0) {
            hung = 1;
            kill(-pid, SIGKILL);
            kill(pid, SIGKILL);
            waitpid(pid, &st, 0);
            break;
        }
        struct timespec ts = {left / 1000, left % 1000 * 1000000L};
        sigtimedwait(&chld, NULL, &ts);
    }
    kill(-pid, SIGKILL);
    for (int i = 0; i < rep->ndaemons && i < 8; i++)
        kill(rep->daemons[i], SIGKILL);
    /* We are the subreaper: what the case left behind ends here. */
    end = now_ms() + 3000;
    while (waitpid(-1, NULL, WNOHANG) >= 0 && now_ms() < end)
        nap(1);
    sigprocmask(SIG_SETMASK, &old, NULL);

    int ok = 0;
    if (rep->failed)
        printf("%s: FAIL %s\n", t->name, rep->fail);
    else if (hung)
        printf("%s: HANG\n", t->name);
    else if (WIFSIGNALED(st))
        printf("%s: SIGNAL %d\n", t->name, WTERMSIG(st));
    else if (!rep->done || WEXITSTATUS(st))
        printf("%s: FAIL exit status %d%s\n", t->name, WEXITSTATUS(st),
               rep->done ? "" : " before the end");
    else {
        printf("%s: ok%s%s\n", t->name, rep->obs[0] ? " " : "", rep->obs);
        ok = 1;
    }
    fflush(stdout);
    return ok;
}

static int usage(void)
{
    fprintf(stderr, "usage: socktest list | run [--repeat N] [NAME or PATTERN]...\n");
    return 2;
}

int main(int argc, char **argv)
{
    nall = __stop_socktest_cases - __start_socktest_cases;
    all = malloc(nall * sizeof *all);
    memcpy(all, __start_socktest_cases, nall * sizeof *all);
    qsort(all, nall, sizeof *all, by_place);

    if (argc >= 3 && !strcmp(argv[1], "helper")) {
        for (int i = 0; i < nall; i++)
            if (all[i]->helper && !strcmp(all[i]->name, argv[2]))
                return all[i]->helper(argc - 3, argv + 3);
        return 95;
    }
    if (argc == 2 && !strcmp(argv[1], "list")) {
        for (int i = 0; i < nall; i++)
            if (all[i]->fn)
                puts(all[i]->name);
        return 0;
    }
    if (argc < 2 || strcmp(argv[1], "run"))
        return usage();
    argc -= 2;
    argv += 2;
    int repeat = 1;
    if (argc >= 2 && !strcmp(argv[0], "--repeat")) {
        repeat = atoi(argv[1]);
        argc -= 2;
        argv += 2;
    }
    char *use = calloc(nall, 1);
    for (int a = 0; a < argc; a++) {
        int hit = 0;
        for (int i = 0; i < nall; i++)
            if (all[i]->fn && !fnmatch(argv[a], all[i]->name, 0))
                use[i] = hit = 1;
        if (!hit) {
            fprintf(stderr, "socktest: no case matches %s; see `socktest list`\n",
                    argv[a]);
            return 2;
        }
    }
    if (getenv("SOCKTEST_TIMEOUT"))
        timeout_s = atoi(getenv("SOCKTEST_TIMEOUT"));
    rep = mmap(NULL, sizeof *rep, PROT_READ | PROT_WRITE,
               MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (rep == MAP_FAILED) {
        perror("socktest: mmap");
        return 2;
    }
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    signal(SIGPIPE, SIG_DFL);
    int passed = 0, failed = 0;
    for (int r = 0; r < repeat; r++)
        for (int i = 0; i < nall; i++)
            if (all[i]->fn && (argc == 0 || use[i])) {
                if (run_one(all[i]))
                    passed++;
                else
                    failed++;
            }
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}

/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * socktest: the socket conformance program. See README.md.
 *
 * A case is `CASE(name) { ... }` in any *.c file of this directory. It asserts
 * what Linux does and notes short observations; both must be the same on every
 * native run, so: no ports, pids, descriptor numbers, addresses or times.
 */
#ifndef SOCKTEST_H
#define SOCKTEST_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/sendfile.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct tcase {
    const char *name, *file;
    int line;
    void (*fn)(void);
    int (*helper)(int argc, char **argv);
};

#define REGISTER_(n, f, h)                                                     \
    static const struct tcase tc_##n = {#n, __FILE__, __LINE__, f, h};         \
    static const struct tcase *const tp_##n                                    \
        __attribute__((used, section("socktest_cases"))) = &tc_##n

/* A case; returning normally is success. */
#define CASE(n)                                                                \
    static void case_##n(void);                                                \
    REGISTER_(n, case_##n, NULL);                                              \
    static void case_##n(void)

/* A subcommand that cases execute as a new program: see exec_self(). */
#define HELPER(n)                                                              \
    static int helper_##n(int argc, char **argv);                              \
    REGISTER_(n, NULL, helper_##n);                                            \
    static int helper_##n(int argc, char **argv)

/* ---- assertions; usable in every process and thread of a case ---- */
void fail_at(const char *file, int line, const char *fmt, ...)
    __attribute__((noreturn, format(printf, 3, 4)));
/* Appends to the case's line (only from the case's first thread). */
void obs(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void skip(const char *why) __attribute__((noreturn));
const char *ename(int e);
const char *evnames(unsigned ev); /* poll and epoll bits as IN|OUT|... */

/* Where the case is, for failures inside the helpers below. */
struct place { const char *file; int line; };
extern __thread struct place at_place;
#ifdef SOCKTEST_MAIN
#define AT_ ((void)0)
#else
#define AT_ ((void)(at_place = (struct place){__FILE__, __LINE__}))
#endif

/* the call succeeds (result not negative); yields the result */
#define OK(e)                                                                  \
    ({                                                                         \
        AT_;                                                                   \
        long r_ = (long)(e);                                                   \
        if (r_ < 0)                                                            \
            fail_at(__FILE__, __LINE__, "%s got %ld (errno %s)", #e, r_,       \
                    ename(errno));                                             \
        r_;                                                                    \
    })
/* the expression has exactly this value */
#define EQ(e, want)                                                            \
    ({                                                                         \
        AT_;                                                                   \
        errno = 0;                                                             \
        long r_ = (long)(e);                                                   \
        int e_ = errno;                                                        \
        long w_ = (long)(want);                                                \
        if (r_ != w_)                                                          \
            fail_at(__FILE__, __LINE__, "%s got %ld want %ld (errno %s)", #e,  \
                    r_, w_, ename(r_ < 0 ? e_ : 0));                           \
        r_;                                                                    \
    })
/* the call fails with this errno, which is also noted */
#define ERR(e, want)                                                           \
    do {                                                                       \
        AT_;                                                                   \
        errno = 0;                                                             \
        long r_ = (long)(e);                                                   \
        int e_ = errno;                                                        \
        if (r_ != -1 || e_ != (want))                                          \
            fail_at(__FILE__, __LINE__, "%s got %ld (errno %s) want %s", #e,   \
                    r_, ename(r_ < 0 ? e_ : 0), ename(want));                  \
        obs("%s", ename(e_));                                                  \
    } while (0)
#define TRUE(e)                                                                \
    do {                                                                       \
        AT_;                                                                   \
        if (!(e))                                                              \
            fail_at(__FILE__, __LINE__, "%s got 0 (errno %s)", #e,             \
                    ename(errno));                                             \
    } while (0)
/* these poll/epoll bits exactly; also noted */
#define EV(e, want)                                                            \
    do {                                                                       \
        AT_;                                                                   \
        unsigned g_ = (unsigned)(e), x_ = (unsigned)(want);                    \
        if (g_ != x_) {                                                        \
            char b_[128];                                                      \
            snprintf(b_, sizeof b_, "%s", evnames(g_));                        \
            fail_at(__FILE__, __LINE__, "%s got %s want %s (errno 0)", #e, b_, \
                    evnames(x_));                                              \
        }                                                                      \
        obs("%s", evnames(g_));                                                \
    } while (0)
#define MEMEQ(a, b, n) TRUE(memcmp((a), (b), (n)) == 0)

/* ---- addresses and sockets (fam is AF_INET or AF_INET6; loopback only) ---- */
union addr {
    struct sockaddr sa;
    struct sockaddr_in in;
    struct sockaddr_in6 in6;
    struct sockaddr_storage ss;
};
socklen_t loop_addr(int fam, int port, union addr *a);
socklen_t name_of(int fd, union addr *a);
socklen_t peer_of(int fd, union addr *a);
int port_of(int fd);                        /* local port, host order */
int same_addr(const union addr *a, const union addr *b);
void need_ipv6(void);                       /* skips the case without ::1 */
int bound(int fam, int type);               /* socket bound to loopback:0 */
int listener(int fam, int backlog);
int try_connect(int fd, int to);            /* connect(fd) to to's name */
int connected(int lfd);                     /* new stream socket connected to lfd */
int accepted(int lfd);                      /* accept without a name */
void tcp_pair(int sv[2]);                   /* [0] client, [1] accepted */
void tcp_pair_fam(int fam, int sv[2]);
void udp_pair(int fam, int sv[2]);          /* bound, each connected to the other */
int full_listener(int *queued);             /* backlog 0 and full: connects stay in SYN_SENT */
int getopt_int(int fd, int level, int name);
void setopt_int(int fd, int level, int name, int v);
void set_nonblock(int fd, int on);
void linger0_close(int fd);                 /* RST */

/* ---- waiting: until the state is there, never for a time ---- */
short wait_ev(int fd, short ev);            /* polls, fails after 15 s; revents */
void wait_all(int fd, short ev);            /* until all bits of ev are there */
void wait_bytes(int fd, size_t n);          /* until n bytes can be peeked */
short poll_now(int fd, short ev);           /* timeout 0; revents */
short poll_ms(int fd, short ev, int ms);    /* for "nothing comes" checks */
void nap(int ms);

/* ---- data ---- */
void send_all(int fd, const void *b, size_t n);
void recv_all(int fd, void *b, size_t n);   /* exactly n */
void say(int fd, const char *s);            /* send a short string */
void hear(int fd, const char *s);           /* receive exactly it */
void hear_eof(int fd);
void fill_pattern(unsigned char *b, size_t n, uint64_t at, uint64_t seed);
uint64_t rnd(uint64_t *state);
size_t fill_sndbuf(int fd);                 /* non-blocking sends until EAGAIN; bytes */
/* Send or receive n patterned bytes in chunks of random size. */
void stream_send(int fd, uint64_t n, uint64_t seed, size_t max_chunk);
void stream_recv(int fd, uint64_t n, uint64_t seed, size_t max_chunk);

/* ---- processes and threads ---- */
pid_t fork_child(void);                     /* 0 in the child, which must _exit */
void reap(pid_t pid, int want_status);      /* exit status, or 128+signal */
void fill_fd_holes(void);                   /* what the starter left open has no gaps now */
void limit_fds(int n);                      /* RLIMIT_NOFILE, soft */
void note_daemon(pid_t pid);                /* a process outside the group to clean up */
/* argv for /proc/self/exe running HELPER(name); ends with NULL */
void exec_self(const char *helper, ...) __attribute__((noreturn, sentinel));
pthread_t thread(void *(*fn)(void *), void *arg);
void join(pthread_t t);
struct gate { int fd[2]; };                 /* one-shot signals over a pipe */
void gate_init(struct gate *g);
void gate_open(struct gate *g);
void gate_wait(struct gate *g);

/* ---- epoll ---- */
int ep_new(void);
void ep_add(int ep, int fd, unsigned ev);   /* data is fd */
void ep_mod(int ep, int fd, unsigned ev);
unsigned ep_one(int ep, int fd, int ms);    /* events of the only ready one, 0 if none; must be fd */

/* ---- signals: `sig` is sent to the calling thread every few ms until stopped ---- */
struct pinger { pthread_t target, t; int sig, stop; };
extern volatile int sig_count;
void on_signal(int sig, int flags);
void pinger_start(struct pinger *p, int sig);
void pinger_stop(struct pinger *p);
#ifndef SOCKTEST_MAIN
#define bound(...) (AT_, bound(__VA_ARGS__))
#define listener(...) (AT_, listener(__VA_ARGS__))
#define try_connect(...) (AT_, try_connect(__VA_ARGS__))
#define connected(...) (AT_, connected(__VA_ARGS__))
#define accepted(...) (AT_, accepted(__VA_ARGS__))
#define tcp_pair(...) (AT_, tcp_pair(__VA_ARGS__))
#define tcp_pair_fam(...) (AT_, tcp_pair_fam(__VA_ARGS__))
#define udp_pair(...) (AT_, udp_pair(__VA_ARGS__))
#define full_listener(...) (AT_, full_listener(__VA_ARGS__))
#define getopt_int(...) (AT_, getopt_int(__VA_ARGS__))
#define setopt_int(...) (AT_, setopt_int(__VA_ARGS__))
#define set_nonblock(...) (AT_, set_nonblock(__VA_ARGS__))
#define linger0_close(...) (AT_, linger0_close(__VA_ARGS__))
#define wait_ev(...) (AT_, wait_ev(__VA_ARGS__))
#define wait_all(...) (AT_, wait_all(__VA_ARGS__))
#define wait_bytes(...) (AT_, wait_bytes(__VA_ARGS__))
#define poll_now(...) (AT_, poll_now(__VA_ARGS__))
#define poll_ms(...) (AT_, poll_ms(__VA_ARGS__))
#define send_all(...) (AT_, send_all(__VA_ARGS__))
#define recv_all(...) (AT_, recv_all(__VA_ARGS__))
#define say(...) (AT_, say(__VA_ARGS__))
#define hear(...) (AT_, hear(__VA_ARGS__))
#define hear_eof(...) (AT_, hear_eof(__VA_ARGS__))
#define fill_sndbuf(...) (AT_, fill_sndbuf(__VA_ARGS__))
#define stream_send(...) (AT_, stream_send(__VA_ARGS__))
#define stream_recv(...) (AT_, stream_recv(__VA_ARGS__))
#define reap(...) (AT_, reap(__VA_ARGS__))
#define gate_wait(...) (AT_, gate_wait(__VA_ARGS__))
#define ep_add(...) (AT_, ep_add(__VA_ARGS__))
#define ep_mod(...) (AT_, ep_mod(__VA_ARGS__))
#define ep_one(...) (AT_, ep_one(__VA_ARGS__))
#define port_of(...) (AT_, port_of(__VA_ARGS__))
#define name_of(...) (AT_, name_of(__VA_ARGS__))
#define peer_of(...) (AT_, peer_of(__VA_ARGS__))
#define join(...) (AT_, join(__VA_ARGS__))
#endif
#endif

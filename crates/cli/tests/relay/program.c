/* Does what its arguments say, and prints what it saw: the same on the plain kernel and in a relay. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

typedef struct sockaddr_in in;
static in loopback(int port)
{
    return (in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK), .sin_port = htons(port)};
}
static int port_of(int fd)
{
    in name = {0};
    socklen_t length = sizeof name;
    if (getsockname(fd, (void *)&name, &length) || length != sizeof name || name.sin_family != AF_INET)
        return -1;
    return ntohs(name.sin_port);
}
static int peer_of(int fd)
{
    in name = {0};
    socklen_t length = sizeof name;
    if (getpeername(fd, (void *)&name, &length))
        return -errno;
    return name.sin_family == AF_INET ? ntohs(name.sin_port) : -1;
}
static int listener(void)
{
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    in name = loopback(0);
    if (bind(fd, (void *)&name, sizeof name) || listen(fd, 16))
        perror("listen");
    return fd;
}
static int dial(int port)
{
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    in to = loopback(port);
    return connect(fd, (void *)&to, sizeof to) ? -errno : fd;
}
static int option(int fd, int level, int name)
{
    int value = -1;
    socklen_t length = sizeof value;
    return getsockopt(fd, level, name, &value, &length) ? -errno : value;
}
static int events(int fd, int wanted)
{
    struct pollfd p = {fd, wanted, 0};
    poll(&p, 1, 20000);
    return p.revents;
}
static int closed_port(void)
{
    int fd = listener(), port = port_of(fd);
    close(fd);
    return port;
}
static void on_alarm(int signal) { (void)signal; }
static void alarm_in(int ms, int flags)
{
    struct sigaction action = {.sa_handler = on_alarm, .sa_flags = flags};
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &(struct itimerval){.it_value = {ms / 1000, ms % 1000 * 1000}}, NULL);
}

static void names(void)
{
    int l = listener(), c = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    in to = loopback(port_of(l)), from = {0};
    socklen_t length = sizeof from;
    int begun = connect(c, (void *)&to, sizeof to);
    printf("connect %d out %d error %d\n", begun == 0 || errno == EINPROGRESS, !!(events(c, POLLOUT) & POLLOUT),
           option(c, SOL_SOCKET, SO_ERROR));
    int a = accept4(l, (void *)&from, &length, SOCK_CLOEXEC);
    printf("accepted %d names %d %d %d\n", length == sizeof from && from.sin_family == AF_INET,
           ntohs(from.sin_port) == port_of(c), peer_of(a) == port_of(c), peer_of(c) == port_of(l));
    printf("cloexec %d type %d domain %d protocol %d listens %d %d\n", fcntl(a, F_GETFD), option(a, SOL_SOCKET, SO_TYPE),
           option(a, SOL_SOCKET, SO_DOMAIN), option(a, SOL_SOCKET, SO_PROTOCOL), option(l, SOL_SOCKET, SO_ACCEPTCONN),
           option(a, SOL_SOCKET, SO_ACCEPTCONN));
    int one = 1;
    setsockopt(c, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct tcp_info info = {0};
    length = sizeof info;
    printf("nodelay %d info %d unconnected %d\n", option(c, IPPROTO_TCP, TCP_NODELAY),
           getsockopt(c, IPPROTO_TCP, TCP_INFO, &info, &length) == 0 && info.tcpi_state == 1, peer_of(l) == -ENOTCONN);
    char b[8];
    if (fork() == 0) {
        /* Half-close, then the answer. */
        if (write(a, "ping", 4) == 4 && shutdown(a, SHUT_WR) == 0 && read(a, b, 8) == 4 && read(a, b, 8) == 0)
            _exit(7);
        _exit(1);
    }
    close(a);
    fcntl(c, F_SETFL, 0);
    int n = recv(c, b, 4, MSG_WAITALL), end = recv(c, b + 4, 4, 0);
    printf("heard %d %.4s then %d hup %d\n", n, b, end, !!(events(c, POLLRDHUP) & POLLRDHUP));
    int status = 0;
    printf("said %d", (int)write(c, "pong", 4));
    shutdown(c, SHUT_WR);
    wait(&status);
    printf(" child %d\n", WEXITSTATUS(status));
}

static void refused(void)
{
    int port = closed_port(), c = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    in to = loopback(port);
    connect(c, (void *)&to, sizeof to);
    int seen = events(c, POLLIN | POLLOUT);
    int begun = errno;
    printf("refused %d events %d error %d\n", begun, (seen & (POLLERR | POLLHUP)) == (POLLERR | POLLHUP),
           option(c, SOL_SOCKET, SO_ERROR));
    printf("error %d\n", option(c, SOL_SOCKET, SO_ERROR));
    printf("blocking %d %d\n", dial(port), peer_of(c) == -ENOTCONN);
    int l = listener(), again = socket(AF_INET, SOCK_STREAM, 0);
    int first = connect(again, (void *)&to, sizeof to);
    to = loopback(port_of(l));
    printf("again %d %d\n", first, connect(again, (void *)&to, sizeof to));
    in low = loopback(0);
    low.sin_addr.s_addr = htonl(0xc0000201);
    printf("bind %d %d\n", bind(socket(AF_INET, SOCK_STREAM, 0), (void *)&low, sizeof low), errno);
    printf("fault %d", connect(c, (void *)8, sizeof to));
    printf(" %d\n", errno);
}

static void reset(void)
{
    int l = listener(), c = dial(port_of(l)), a = accept(l, NULL, NULL);
    char b[4];
    struct linger now = {1, 0};
    (void)!write(a, "abcd", 4);
    events(c, POLLIN);
    setsockopt(a, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    close(a);
    printf("reset %d", (events(c, POLLIN) & POLLIN) != 0);
    while (!(events(c, 0) & POLLERR)) {}
    int n = recv(c, b, 4, 0), m = recv(c, b, 4, 0);
    printf(" data %d then %d %d", n, m, errno);
    printf(" then %d\n", (int)recv(c, b, 4, 0));
    /* Closed with something unread: the peer sees a reset. */
    c = dial(port_of(l)), a = accept(l, NULL, NULL);
    (void)!write(c, "unread", 6);
    events(a, POLLIN);
    close(a);
    while (!(events(c, 0) & POLLERR)) {}
    printf("unread %d %d\n", (int)recv(c, b, 4, 0), errno);
}

static void signals(void)
{
    int l = listener();
    alarm_in(200, 0);
    printf("accept %d", accept(l, NULL, NULL));
    printf(" %d\n", errno == EINTR);
    /* Restarted: the connection comes later. */
    alarm_in(100, SA_RESTART);
    int port = port_of(l);
    pid_t child = fork();
    if (child == 0) {
        usleep(400000);
        _exit(dial(port) < 0);
    }
    int a = accept(l, NULL, NULL);
    printf("restarted %d\n", a >= 0);
    waitpid(child, NULL, 0);
    struct timeval limit = {0, 100000};
    setsockopt(l, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    printf("late %d", accept(l, NULL, NULL));
    printf(" %d\n", errno);
    fcntl(l, F_SETFL, O_NONBLOCK);
    printf("none %d", accept(l, NULL, NULL));
    printf(" %d readable %d\n", errno, (int)poll(&(struct pollfd){l, POLLIN, 0}, 1, 0));
}

static void datagrams(void)
{
    int s = socket(AF_INET, SOCK_DGRAM, 0), c = socket(AF_INET, SOCK_DGRAM, 0), d = socket(AF_INET, SOCK_DGRAM, 0);
    in name = loopback(0), from = {0};
    bind(s, (void *)&name, sizeof name);
    in to = loopback(port_of(s));
    char b[64];
    socklen_t length = sizeof from;
    for (int i = 0; i < 2; i++)
        sendto(i ? d : c, i ? "two" : "one", 3, 0, (void *)&to, sizeof to);
    for (int i = 0; i < 2; i++) {
        int n = recvfrom(s, b, sizeof b, 0, (void *)&from, &length);
        printf("from %d %.*s %d\n", n, n, b, ntohs(from.sin_port) == port_of(*b == 'o' ? c : d));
    }
    connect(c, (void *)&to, sizeof to);
    int sent = send(c, "three", 5, 0);
    printf("send %d none %d\n", sent, (int)recv(c, b, 1, MSG_DONTWAIT));
    struct iovec run = {b, 2};
    struct msghdr message = {.msg_name = &from, .msg_namelen = sizeof from, .msg_iov = &run, .msg_iovlen = 1};
    int n = recvmsg(s, &message, 0);
    printf("cut %d %d name %d\n", n, !!(message.msg_flags & MSG_TRUNC), ntohs(from.sin_port) == port_of(c));
    sendto(s, "back", 4, 0, (void *)&from, sizeof from);
    n = recv(c, b, 8, 0);
    printf("back %d %.4s type %d\n", n, b, option(c, SOL_SOCKET, SO_TYPE));
    struct mmsghdr many[2] = {{.msg_hdr = {.msg_iov = &(struct iovec){"m1", 2}, .msg_iovlen = 1}},
                              {.msg_hdr = {.msg_iov = &(struct iovec){"m22", 3}, .msg_iovlen = 1}}};
    n = sendmmsg(c, many, 2, 0);
    printf("many %d %d %d\n", n, many[0].msg_len, many[1].msg_len);
    n = recv(s, b, 8, 0);
    n += recv(s, b, 8, 0);
    printf("got %d\n", n);
    close(s);
    send(c, "x", 1, 0);
    events(c, POLLIN);
    length = sizeof from;
    n = recvfrom(c, b, 8, 0, (void *)&from, &length);
    printf("refused %d %d\n", n, errno);
}

struct way {
    int fd;
    unsigned sum;
    size_t left;
};
static void *reader(void *argument)
{
    struct way *way = argument;
    unsigned char b[20000];
    ssize_t n;
    while ((n = read(way->fd, b, sizeof b)) > 0)
        for (ssize_t i = 0; i < n; i++)
            way->sum = way->sum * 31 + b[i];
    return NULL;
}
static void *writer(void *argument)
{
    struct way *way = argument;
    unsigned char b[50000];
    unsigned seed = 1;
    while (way->left) {
        size_t n = 1 + rand_r(&seed) % sizeof b, done = 0;
        if (n > way->left)
            n = way->left;
        for (size_t i = 0; i < n; i++) {
            b[i] = rand_r(&seed);
            way->sum = way->sum * 31 + b[i];
        }
        while (done < n) {
            ssize_t m = write(way->fd, b + done, n - done);
            if (m <= 0)
                return NULL;
            done += m;
        }
        way->left -= n;
    }
    shutdown(way->fd, SHUT_WR);
    return NULL;
}
static void bulk(void)
{
    int l = listener(), c = dial(port_of(l)), a = accept(l, NULL, NULL);
    struct way ways[4] = {{c, 0, 20 << 20}, {a, 0, 20 << 20}, {a, 0, 0}, {c, 0, 0}};
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, i < 2 ? writer : reader, &ways[i]);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    printf("bulk %d %d\n", ways[0].sum == ways[2].sum && !ways[0].left, ways[1].sum == ways[3].sum && !ways[1].left);
}

static volatile int racing = 1;
static void *swapper(void *argument)
{
    int *fds = argument;
    /* What stands under number 100 is a relayed stream, a datagram socket, a pipe, a Unix socket, or nothing. */
    for (int i = 0; racing; i++) {
        dup2(fds[i % 5], 100);
        if (i % 7 == 0) close(100);
    }
    return NULL;
}
static void race(void)
{
    int fds[5] = {socket(AF_INET, SOCK_STREAM, 0), socket(AF_INET, SOCK_DGRAM, 0), listener()}, pair[2];
    fcntl(fds[2], F_SETFL, O_NONBLOCK);
    (void)!pipe(pair);
    fds[3] = pair[0];
    socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
    fds[4] = pair[0];
    for (int i = 0; i < 5; i++) fcntl(fds[i], F_SETFL, O_NONBLOCK);
    pthread_t thread;
    pthread_create(&thread, NULL, swapper, fds);
    in to = loopback(1);
    char b[128];
    for (int i = 0; i < 3000; i++) {
        socklen_t length = sizeof b;
        int value = 1;
        switch (i % 10) {
        case 0: connect(100, (void *)&to, sizeof to); break;
        case 1: bind(100, (void *)&to, i); break;
        case 2: listen(100, 1); break;
        case 3: close(accept(100, (void *)b, &length)); break;
        case 4: getsockname(100, (void *)b, &length); break;
        case 5: setsockopt(100, SOL_SOCKET, SO_REUSEADDR, &value, 4); break;
        case 6: sendto(100, b, sizeof b, MSG_DONTWAIT, (void *)&to, sizeof to); break;
        case 7: recvfrom(100, b, sizeof b, MSG_DONTWAIT, (void *)&to, &length); break;
        case 8: shutdown(100, i % 3); break;
        case 9: recvmsg(100, (void *)(long)(i * 64), MSG_DONTWAIT); break;
        }
    }
    racing = 0;
    pthread_join(thread, NULL);
    printf("raced\n");
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IONBF, 0);
    signal(SIGPIPE, SIG_IGN);
    alarm(0);
    for (int i = 1; i < argc; i++) {
        char *a = argv[i];
        if (!strcmp(a, "names")) names();
        else if (!strcmp(a, "refused")) refused();
        else if (!strcmp(a, "reset")) reset();
        else if (!strcmp(a, "signals")) signals();
        else if (!strcmp(a, "datagrams")) datagrams();
        else if (!strcmp(a, "bulk")) bulk();
        else if (!strcmp(a, "race")) race();
        else if (!strcmp(a, "raw")) printf("raw %d\n", socket(AF_INET, SOCK_RAW, IPPROTO_ICMP) < 0 ? errno : 0);
        else if (!strcmp(a, "socket")) {
            int fd = socket(AF_INET, SOCK_STREAM, 0);
            printf("socket %d\n", fd < 0 ? -errno : 1);
        } else if (!strcmp(a, "cc")) {
            char name[16] = "";
            socklen_t length = sizeof name;
            getsockopt(socket(AF_INET6, SOCK_STREAM, 0), IPPROTO_TCP, TCP_CONGESTION, name, &length);
            printf("cc %s\n", name);
        } else if (!strcmp(a, "echo")) {
            /* One connection, until its end. */
            int l = listener();
            printf("listen %d\n", port_of(l));
            int fd = accept(l, NULL, NULL);
            char b[4096];
            ssize_t n;
            while ((n = read(fd, b, sizeof b)) > 0) (void)!write(fd, b, n);
            printf("over %d %d\n", (int)n, n < 0 ? errno : 0);
            close(l);
        } else if (!strcmp(a, "flood")) {
            /* More sockets than anybody needs, connects that nobody answers, closes at once. */
            struct rlimit limit = {256, 256};
            setrlimit(RLIMIT_NOFILE, &limit);
            int made = 0;
            for (int round = 0; round < 20; round++) {
                int fds[300], n = 0;
                while (n < 300 && (fds[n] = socket(AF_INET, n % 2 ? SOCK_STREAM : SOCK_DGRAM, 0)) >= 0) n++;
                made += n;
                while (n--) close(fds[n]);
            }
            printf("flood %d %d\n", made > 2000, errno == EMFILE);
        } else if (!strcmp(a, "wait")) {
            char b;
            while (read(0, &b, 1) < 0 && errno == EINTR) {}
        }
    }
    return 0;
}

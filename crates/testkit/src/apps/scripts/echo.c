/* server PORT: an echo by poll(), IPv4 and IPv6 in one socket; ends by SIGTERM.
   client PORT: 8 connections of 1 MiB each by threads, names, options, a half-close, datagrams, what a closed port says. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
enum { CONNECTIONS = 8, TOTAL = 1 << 20 };
static int port;
static void die(const char *what) { fprintf(stderr, "%s: %s\n", what, strerror(errno)); exit(1); }
static void check(int good, const char *what) { if (!good) die(what); }
static void end(int s) { (void)s; _exit(0); }
static void server(void) {
    struct pollfd set[64];
    static char kept[64][65536];
    static size_t have[64];
    int count = 1, on = 1, off = 0;
    struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
    int from = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    check(from >= 0, "socket");
    setsockopt(from, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    check(!setsockopt(from, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off), "V6ONLY");
    check(!bind(from, (void *)&any, sizeof any) && !listen(from, 16), "listen");
    set[0] = (struct pollfd){from, POLLIN, 0};
    for (;;) {
        if (poll(set, count, -1) < 0) die("poll");
        for (int i = count - 1; i > 0; i--) {
            int fd = set[i].fd, over = 0;
            if (set[i].revents & (POLLIN | POLLHUP | POLLERR) && have[i] < sizeof kept[i]) {
                ssize_t n = read(fd, kept[i] + have[i], sizeof kept[i] - have[i]);
                if (n > 0) have[i] += n; else if (n == 0 || errno != EAGAIN) over = 1;
            }
            if (have[i]) {
                ssize_t n = write(fd, kept[i], have[i]);
                if (n > 0) { memmove(kept[i], kept[i] + n, have[i] - n); have[i] -= n; }
                else if (errno != EAGAIN) over = 1, have[i] = 0;
            }
            if (over && !have[i]) {
                close(fd);
                count--;
                set[i] = set[count], have[i] = have[count];
                memcpy(kept[i], kept[count], have[count]);
                have[count] = 0;
                continue;
            }
            set[i].events = (have[i] < sizeof kept[i] && !over ? POLLIN : 0) | (have[i] ? POLLOUT : 0);
        }
        if (set[0].revents & POLLIN && count < 64) {
            int fd = accept4(from, 0, 0, SOCK_NONBLOCK | SOCK_CLOEXEC);
            if (fd >= 0) set[count++] = (struct pollfd){fd, POLLIN, 0};
        }
    }
}
static int connected(int family) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_in6 to6 = {.sin6_family = AF_INET6, .sin6_port = htons(port), .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    int fd = socket(family, SOCK_STREAM, 0);
    check(fd >= 0, "socket");
    check(!(family == AF_INET ? connect(fd, (void *)&to, sizeof to) : connect(fd, (void *)&to6, sizeof to6)), "connect");
    return fd;
}
static void *writer(void *of) {
    int fd = *(int *)of;
    unsigned char b[9999];
    for (size_t done = 0; done < TOTAL;) {
        size_t n = TOTAL - done < sizeof b ? TOTAL - done : sizeof b;
        for (size_t i = 0; i < n; i++) b[i] = (done + i) * 2654435761u >> 13;
        ssize_t put = send(fd, b, n, MSG_NOSIGNAL);
        check(put > 0, "send");
        done += put;
    }
    check(!shutdown(fd, SHUT_WR), "shutdown");
    return 0;
}
static void *reader(void *of) {
    int fd = *(int *)of;
    unsigned char b[7777];
    size_t done = 0;
    ssize_t n;
    while ((n = recv(fd, b, sizeof b, 0)) > 0)
        for (ssize_t i = 0; i < n; i++, done++) check(b[i] == (unsigned char)(done * 2654435761u >> 13), "other bytes");
    check(n == 0 && done == TOTAL, "cut off");
    return 0;
}
static void client(void) {
    int fds[CONNECTIONS];
    pthread_t threads[2 * CONNECTIONS];
    for (int i = 0; i < CONNECTIONS; i++) fds[i] = connected(i % 2 ? AF_INET : AF_INET6);
    struct sockaddr_storage peer;
    socklen_t length = sizeof peer;
    check(!getpeername(fds[1], (void *)&peer, &length) && peer.ss_family == AF_INET, "getpeername");
    check(ntohs(((struct sockaddr_in *)&peer)->sin_port) == port, "the peer's port");
    int on = 1, got = 0;
    length = sizeof got;
    check(!setsockopt(fds[0], IPPROTO_TCP, TCP_NODELAY, &on, sizeof on), "TCP_NODELAY");
    check(!getsockopt(fds[0], IPPROTO_TCP, TCP_NODELAY, &got, &length) && got, "TCP_NODELAY again");
    for (int i = 0; i < CONNECTIONS; i++) {
        check(!pthread_create(threads + 2 * i, 0, writer, fds + i), "thread");
        check(!pthread_create(threads + 2 * i + 1, 0, reader, fds + i), "thread");
    }
    for (int i = 0; i < 2 * CONNECTIONS; i++) pthread_join(threads[i], 0);
    struct addrinfo *found, hints = {.ai_socktype = SOCK_STREAM};
    check(!getaddrinfo("localhost", "1", &hints, &found), "getaddrinfo");
    for (struct addrinfo *a = found; a; a = a->ai_next) {
        int fd = socket(a->ai_family, SOCK_STREAM, 0);
        check(connect(fd, a->ai_addr, a->ai_addrlen) && errno == ECONNREFUSED, "a closed port");
        close(fd);
    }
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)}, from;
    length = sizeof any;
    int one = socket(AF_INET, SOCK_DGRAM, 0), two = socket(AF_INET, SOCK_DGRAM, 0);
    check(!bind(one, (void *)&any, sizeof any) && !getsockname(one, (void *)&any, &length), "bind");
    check(sendto(two, "ping", 4, 0, (void *)&any, length) == 4, "sendto");
    char b[16];
    struct pollfd p = {one, POLLIN, 0};
    check(poll(&p, 1, 20000) == 1, "no datagram");
    length = sizeof from;
    check(recvfrom(one, b, sizeof b, 0, (void *)&from, &length) == 4 && !memcmp(b, "ping", 4), "recvfrom");
    check(from.sin_family == AF_INET && from.sin_port, "who sent it");
    puts("ok");
}
int main(int argc, char **argv) {
    alarm(60);
    signal(SIGTERM, end);
    port = argc > 2 ? atoi(argv[2]) : 0;
    if (argc > 2 && !strcmp(argv[1], "server")) server(); else client();
    return 0;
}

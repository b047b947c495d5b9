//! A static program that does what it is told.

use super::Place;

/// A program as Go would make it: static, with bare kernel sockets. It does what it is told, line by line.
const PROGRAM: &str = r#"
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
static unsigned char at(unsigned long n) { return n * n % 251 + n / 65536; }
static const char *cc(int fd) {
    static char name[16];
    socklen_t length = sizeof name;
    memset(name, 0, sizeof name);
    return getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, &length) ? "?" : name;
}
static int from, to, end;
static unsigned long total, seen;
static void *write_all(void *unused) {
    static unsigned char b[100000];
    for (unsigned long n = 0; n < total;) {
        unsigned long some = total - n < sizeof b ? total - n : sizeof b;
        for (unsigned long i = 0; i < some; i++) b[i] = at(n + i);
        for (unsigned long done = 0; done < some;) {
            ssize_t r = write(to, b + done, some - done);
            if (r <= 0) { perror("write"); exit(1); }
            done += r;
        }
        n += some;
    }
    shutdown(to, SHUT_WR);
    return unused;
}
static void read_some(unsigned long most) {
    static unsigned char b[100000];
    for (unsigned long n = 0; n < most;) {
        ssize_t r = read(end, b, most - n < sizeof b ? most - n : sizeof b);
        if (r < 0) { perror("read"); exit(1); }
        if (!r) return;
        for (ssize_t i = 0; i < r; i++)
            if (b[i] != at(seen + i)) { printf("wrong byte at %lu\n", seen + i); exit(1); }
        seen += r, n += r;
    }
}
int main(void) {
    char line[100];
    pthread_t writer;
    setvbuf(stdout, 0, _IONBF, 0);
    while (fgets(line, sizeof line, stdin)) {
        if (!strncmp(line, "pair", 4)) {
            struct sockaddr_in any = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
            socklen_t length = sizeof any;
            from = socket(AF_INET, SOCK_STREAM, 0), to = socket(AF_INET, SOCK_STREAM, 0);
            if (bind(from, (void *)&any, length) || listen(from, 5) || getsockname(from, (void *)&any, &length)) return 1;
            if (connect(to, (void *)&any, length) || (end = accept(from, 0, 0)) < 0) return 1;
            printf("%s", cc(from)), printf(" %s", cc(to)), printf(" %s\n", cc(end));
        } else if (!strncmp(line, "old", 3)) {
            printf("%s", cc(from)), printf(" %s", cc(to)), printf(" %s\n", cc(end));
        } else if (!strncmp(line, "new", 3)) {
            int fd = socket(AF_INET6, SOCK_STREAM, 0);
            printf("%s\n", fd < 0 ? strerror(errno) : cc(fd));
            close(fd);
        } else if (!strncmp(line, "set ", 4)) {
            line[strlen(line) - 1] = 0;
            int r = setsockopt(to, IPPROTO_TCP, TCP_CONGESTION, line + 4, strlen(line + 4));
            printf("%d %s\n", r ? errno : 0, cc(to));
        } else if (!strncmp(line, "write ", 6)) {
            total = strtoul(line + 6, 0, 10);
            printf("%d\n", pthread_create(&writer, 0, write_all, 0));
        } else if (!strncmp(line, "read ", 5)) {
            read_some(strtoul(line + 5, 0, 10));
            printf("%lu\n", seen);
        }
    }
    return 0;
}
"#;

/// Builds it.
pub fn static_program(place: &Place) -> std::path::PathBuf {
    place.program("program", PROGRAM, &["-O2", "-static", "-pthread"])
}

/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Descriptor numbers, dup, fcntl, ioctl, fstat, close_range, stdio. */
#include "socktest.h"

static int lowest(void)
{
    int d = OK(dup(0));
    OK(close(d));
    return d;
}

CASE(fd_socket_takes_lowest)
{
    fill_fd_holes();
    int n = lowest(), s = OK(socket(AF_INET, SOCK_STREAM, 0));
    EQ(s == n, 1);
    int t = OK(socket(AF_INET, SOCK_STREAM, 0)), u = OK(socket(AF_INET, SOCK_DGRAM, 0));
    EQ(t - s, 1);
    EQ(u - s, 2);
    OK(close(t));
    EQ(OK(open("/dev/null", O_RDONLY)) == t, 1);
    OK(close(s));
    EQ(OK(socket(AF_INET, SOCK_STREAM, 0)) == s, 1);
}

CASE(fd_accept_takes_lowest)
{
    int l = listener(AF_INET, 4), c = connected(l), n = lowest();
    EQ(accepted(l) == n, 1);
    OK(c);
}

CASE(fd_connect_takes_no_number)
{
    fill_fd_holes();
    int l = listener(AF_INET, 4), c = OK(socket(AF_INET, SOCK_STREAM, 0)), n = lowest();
    OK(try_connect(c, l));
    EQ(lowest() == n, 1);
    say(c, "x");
    EQ(lowest() == n, 1);
    int a = accepted(l);
    EQ(a == n, 1);
    hear(a, "x");
    EQ(lowest() - n, 1);
}

CASE(fd_failed_socket_takes_no_number)
{
    fill_fd_holes();
    int n = lowest();
    ERR(socket(AF_INET, SOCK_STREAM, IPPROTO_UDP), EPROTONOSUPPORT);
    int l = listener(AF_INET, 4);
    EQ(l == n, 1);
    set_nonblock(l, 1);
    ERR(accept(l, NULL, NULL), EAGAIN);
    EQ(lowest() - n, 1);
}

CASE(fd_epoll_takes_lowest)
{
    fill_fd_holes();
    int n = lowest(), e = ep_new(), s[2];
    EQ(e == n, 1);
    tcp_pair(s);
    ep_add(e, s[0], EPOLLIN);
    n = lowest();
    EV(ep_one(e, s[0], 0), 0);
    EQ(lowest() == n, 1);
}

CASE(fd_socket_on_zero_one_two)
{
    int l = listener(AF_INET, 4);
    OK(close(0));
    int c = connected(l);
    EQ(c, 0);
    int a = accepted(l);
    say(0, "in");
    hear(a, "in");
    EQ(dup2(a, 1), 1);
    EQ(write(1, "out", 3), 3);
    hear(0, "out");
}

CASE(fd_dup_shares_stream)
{
    int s[2];
    tcp_pair(s);
    int d = OK(dup(s[1]));
    say(s[0], "abcdef");
    wait_bytes(d, 6);
    hear(s[1], "ab");
    hear(d, "cd");
    OK(close(s[1]));
    hear(d, "ef");
    say(d, "back");
    hear(s[0], "back");
}

CASE(fd_dup_last_close_ends)
{
    int s[2];
    tcp_pair(s);
    int d = OK(dup(s[1]));
    OK(close(s[1]));
    EV(poll_ms(s[0], POLLIN | POLLRDHUP, 30), 0);
    OK(close(d));
    EV(wait_ev(s[0], POLLIN | POLLRDHUP), POLLIN | POLLRDHUP);
    hear_eof(s[0]);
}

CASE(fd_dup_shares_names_and_options)
{
    int s[2];
    tcp_pair(s);
    int d = OK(dup(s[0]));
    union addr a, b;
    name_of(s[0], &a);
    name_of(d, &b);
    TRUE(same_addr(&a, &b));
    setopt_int(s[0], IPPROTO_TCP, TCP_NODELAY, 1);
    EQ(getopt_int(d, IPPROTO_TCP, TCP_NODELAY), 1);
}

CASE(fd_dup2_onto_socket_closes_it)
{
    int s[2], t[2];
    tcp_pair(s);
    tcp_pair(t);
    EQ(dup2(s[1], t[1]) == t[1], 1);
    hear_eof(t[0]);
    say(t[1], "x");
    hear(s[0], "x");
}

CASE(fd_dup2_file_onto_socket)
{
    int s[2], f = OK(open("/dev/zero", O_RDONLY));
    char b[4] = "xxx";
    tcp_pair(s);
    EQ(dup2(f, s[1]) == s[1], 1);
    hear_eof(s[0]);
    EQ(read(s[1], b, 4), 4);
    EQ(b[0], 0);
    ERR(recv(s[1], b, 4, 0), ENOTSOCK);
}

CASE(fd_dup2_socket_onto_file)
{
    int s[2], f = OK(open("/dev/zero", O_RDONLY));
    tcp_pair(s);
    EQ(dup2(s[1], f) == f, 1);
    say(s[0], "x");
    hear(f, "x");
}

CASE(fd_dup2_same)
{
    int s[2];
    tcp_pair(s);
    EQ(dup2(s[0], s[0]) == s[0], 1);
    say(s[0], "x");
    hear(s[1], "x");
}

CASE(fd_dup3)
{
    int s[2];
    tcp_pair(s);
    int d = OK(dup3(s[0], 77, O_CLOEXEC));
    EQ(d, 77);
    EQ(fcntl(d, F_GETFD), FD_CLOEXEC);
    EQ(fcntl(s[0], F_GETFD), 0);
    ERR(dup3(s[0], s[0], 0), EINVAL);
    ERR(dup3(s[0], 78, O_APPEND), EINVAL);
    say(77, "x");
    hear(s[1], "x");
}

CASE(fd_dup_errors)
{
    ERR(dup(-1), EBADF);
    ERR(dup2(900, 5), EBADF);
    int s = OK(socket(AF_INET, SOCK_STREAM, 0));
    ERR(dup2(s, -1), EBADF);
    OK(close(s));
    ERR(dup(s), EBADF);
}

CASE(fd_f_dupfd)
{
    fill_fd_holes();
    int s[2];
    tcp_pair(s);
    int d = OK(fcntl(s[0], F_DUPFD, 60));
    EQ(d, 60);
    EQ(fcntl(s[0], F_DUPFD, 60), 61);
    EQ(fcntl(d, F_GETFD), 0);
    EQ(fcntl(s[0], F_DUPFD_CLOEXEC, 60), 62);
    EQ(fcntl(62, F_GETFD), FD_CLOEXEC);
    say(62, "x");
    hear(s[1], "x");
    OK(close(s[0]));
    OK(close(60));
    OK(close(61));
    EV(poll_ms(s[1], POLLIN, 20), 0);
    OK(close(62));
    hear_eof(s[1]);
}

CASE(fd_o_nonblock_is_shared_by_dup)
{
    int s[2];
    char b[4];
    tcp_pair(s);
    int d = OK(dup(s[1]));
    set_nonblock(d, 1);
    EQ(fcntl(s[1], F_GETFL), O_RDWR | O_NONBLOCK);
    ERR(recv(s[1], b, 4, 0), EAGAIN);
    set_nonblock(s[1], 0);
    EQ(fcntl(d, F_GETFL), O_RDWR);
}

CASE(fd_o_nonblock_is_shared_by_fork)
{
    int s[2];
    char b[4];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        set_nonblock(s[1], 1);
        _exit(0);
    }
    reap(p, 0);
    EQ(fcntl(s[1], F_GETFL), O_RDWR | O_NONBLOCK);
    ERR(recv(s[1], b, 4, 0), EAGAIN);
}

CASE(fd_cloexec_is_not_shared_by_dup)
{
    int s = OK(socket(AF_INET, SOCK_STREAM, 0)), d = OK(dup(s));
    OK(fcntl(d, F_SETFD, FD_CLOEXEC));
    EQ(fcntl(s, F_GETFD), 0);
    EQ(fcntl(d, F_GETFD), FD_CLOEXEC);
    EQ(fcntl(OK(dup(d)), F_GETFD), 0);
}

CASE(fd_getfl_keeps_other_flags_out)
{
    int s = OK(socket(AF_INET, SOCK_STREAM, 0));
    OK(fcntl(s, F_SETFL, O_NONBLOCK | O_APPEND));
    EQ(fcntl(s, F_GETFL), O_RDWR | O_NONBLOCK | O_APPEND);
    OK(fcntl(s, F_SETFL, 0));
    EQ(fcntl(s, F_GETFL), O_RDWR);
}

CASE(fd_fcntl_owner)
{
    int s = OK(socket(AF_INET, SOCK_STREAM, 0));
    EQ(fcntl(s, F_GETOWN), 0);
    OK(fcntl(s, F_SETOWN, getpid()));
    EQ(fcntl(s, F_GETOWN) == getpid(), 1);
}

CASE(fd_ioctl_fionread)
{
    int s[2], n = -1;
    tcp_pair(s);
    OK(ioctl(s[1], FIONREAD, &n));
    EQ(n, 0);
    say(s[0], "abcde");
    wait_bytes(s[1], 5);
    OK(ioctl(s[1], FIONREAD, &n));
    EQ(n, 5);
    hear(s[1], "abc");
    OK(ioctl(s[1], FIONREAD, &n));
    EQ(n, 2);
    hear(s[1], "de");
    OK(shutdown(s[0], SHUT_WR));
    wait_ev(s[1], POLLRDHUP);
    OK(ioctl(s[1], FIONREAD, &n));
    EQ(n, 0);
}

CASE(fd_ioctl_fionread_listener)
{
    int l = listener(AF_INET, 4), n;
    ERR(ioctl(l, FIONREAD, &n), EINVAL);
}

CASE(fd_ioctl_fionbio)
{
    int s[2], on = 1, off = 0;
    char b[4];
    tcp_pair(s);
    OK(ioctl(s[1], FIONBIO, &on));
    EQ(fcntl(s[1], F_GETFL), O_RDWR | O_NONBLOCK);
    ERR(recv(s[1], b, 4, 0), EAGAIN);
    OK(ioctl(s[1], FIONBIO, &off));
    EQ(fcntl(s[1], F_GETFL), O_RDWR);
    say(s[0], "x");
    hear(s[1], "x");
}

CASE(fd_ioctl_siocoutq)
{
    int s[2], n = -1;
    tcp_pair(s);
    OK(ioctl(s[0], TIOCOUTQ, &n));
    EQ(n, 0);
    fill_sndbuf(s[0]);
    OK(ioctl(s[0], TIOCOUTQ, &n));
    TRUE(n > 0);
    OK(ioctl(s[0], 0x894B /* SIOCOUTQNSD */, &n));
    TRUE(n > 0);
}

CASE(fd_ioctl_fioclex)
{
    int s = OK(socket(AF_INET, SOCK_STREAM, 0));
    OK(ioctl(s, FIOCLEX));
    EQ(fcntl(s, F_GETFD), FD_CLOEXEC);
    OK(ioctl(s, FIONCLEX));
    EQ(fcntl(s, F_GETFD), 0);
}

CASE(fd_ioctl_unknown)
{
    int s = OK(socket(AF_INET, SOCK_STREAM, 0)), n;
    ERR(ioctl(s, TCGETS, &(char[256]){0}), ENOTTY);
    ERR(ioctl(s, 0xabcd1234, &n), ENOTTY);
    EQ(isatty(s), 0);
}

CASE(fd_fstat_is_socket)
{
    int s[2];
    struct stat st;
    tcp_pair(s);
    OK(fstat(s[0], &st));
    EQ(S_ISSOCK(st.st_mode), 1);
    EQ(st.st_size, 0);
    struct stat d;
    OK(fstat(OK(dup(s[0])), &d));
    TRUE(d.st_ino == st.st_ino);
    OK(fstat(s[1], &d));
    TRUE(d.st_ino != st.st_ino);
}

CASE(fd_proc_link_says_socket)
{
    int s[2];
    char p[64], b[64] = "";
    tcp_pair(s);
    snprintf(p, sizeof p, "/proc/self/fd/%d", s[0]);
    OK(readlink(p, b, sizeof b - 1));
    b[7] = 0;
    obs("%s", b);
    TRUE(!strcmp(b, "socket:"));
    ERR(open(p, O_RDWR), ENXIO);
}

CASE(fd_lseek_espipe)
{
    int s[2];
    char b[4];
    tcp_pair(s);
    ERR(lseek(s[0], 0, SEEK_CUR), ESPIPE);
    ERR(lseek(s[0], 0, SEEK_END), ESPIPE);
    ERR(pread(s[0], b, 4, 0), ESPIPE);
    ERR(pwrite(s[0], b, 4, 0), ESPIPE);
    struct iovec v = {b, 4};
    ERR(preadv(s[0], &v, 1, 0), ESPIPE);
    ERR(pwritev(s[0], &v, 1, 0), ESPIPE);
}

CASE(fd_file_calls_on_sockets)
{
    int s[2];
    tcp_pair(s);
    ERR(ftruncate(s[0], 0), EINVAL);
    ERR(fsync(s[0]), EINVAL);
    ERR(fdatasync(s[0]), EINVAL);
    ERR(posix_fallocate(s[0], 0, 1) ? (errno = ENODEV, -1) : 0, ENODEV);
    ERR(fchdir(s[0]), ENOTDIR);
}

CASE(fd_bad_descriptor_everywhere)
{
    char b[4];
    struct iovec v = {b, 4};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
    union addr a;
    socklen_t l = sizeof a;
    int n = 0;
    socklen_t nl = sizeof n;
    int s = OK(socket(AF_INET, SOCK_STREAM, 0));
    OK(close(s));
    ERR(close(s), EBADF);
    ERR(read(s, b, 4), EBADF);
    ERR(write(s, b, 4), EBADF);
    ERR(readv(s, &v, 1), EBADF);
    ERR(writev(s, &v, 1), EBADF);
    ERR(recv(s, b, 4, 0), EBADF);
    ERR(send(s, b, 4, 0), EBADF);
    ERR(recvmsg(s, &m, 0), EBADF);
    ERR(sendmsg(s, &m, 0), EBADF);
    ERR(recvfrom(s, b, 4, 0, &a.sa, &l), EBADF);
    ERR(sendto(s, b, 4, 0, NULL, 0), EBADF);
    ERR(shutdown(s, SHUT_WR), EBADF);
    ERR(getsockname(s, &a.sa, &l), EBADF);
    ERR(getpeername(s, &a.sa, &l), EBADF);
    ERR(getsockopt(s, SOL_SOCKET, SO_TYPE, &n, &nl), EBADF);
    ERR(setsockopt(s, SOL_SOCKET, SO_KEEPALIVE, &n, nl), EBADF);
    ERR(fcntl(s, F_GETFL), EBADF);
    ERR(ioctl(s, FIONREAD, &n), EBADF);
}

CASE(fd_not_a_socket_everywhere)
{
    char b[4];
    struct iovec v = {b, 4};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
    union addr a;
    socklen_t l = sizeof a;
    int n = 0, p[2];
    socklen_t nl = sizeof n;
    OK(pipe(p));
    ERR(recv(p[0], b, 4, 0), ENOTSOCK);
    ERR(send(p[1], b, 4, 0), ENOTSOCK);
    ERR(recvmsg(p[0], &m, 0), ENOTSOCK);
    ERR(sendmsg(p[1], &m, 0), ENOTSOCK);
    ERR(recvfrom(p[0], b, 4, 0, &a.sa, &l), ENOTSOCK);
    ERR(sendto(p[1], b, 4, 0, NULL, 0), ENOTSOCK);
    ERR(shutdown(p[0], SHUT_WR), ENOTSOCK);
    ERR(getsockname(p[0], &a.sa, &l), ENOTSOCK);
    ERR(getpeername(p[0], &a.sa, &l), ENOTSOCK);
    ERR(getsockopt(p[0], SOL_SOCKET, SO_TYPE, &n, &nl), ENOTSOCK);
    ERR(setsockopt(p[0], SOL_SOCKET, SO_KEEPALIVE, &n, nl), ENOTSOCK);
}

CASE(fd_close_range)
{
    int s[2], t[2];
    tcp_pair(s);
    tcp_pair(t);
    int keep = OK(fcntl(s[0], F_DUPFD, 200));
    (void)keep;
    OK(close(s[0]));
    OK(dup2(s[1], 100));
    OK(close(s[1]));
    OK(dup2(t[1], 101));
    OK(close(t[1]));
    OK(close_range(100, 101, 0));
    hear_eof(200);
    hear_eof(t[0]);
    ERR(fcntl(100, F_GETFD), EBADF);
    ERR(close_range(101, 100, 0), EINVAL);
}

CASE(fd_close_range_cloexec)
{
    int s[2];
    tcp_pair(s);
    OK(dup2(s[1], 100));
    OK(close_range(100, 100, CLOSE_RANGE_CLOEXEC));
    EQ(fcntl(100, F_GETFD), FD_CLOEXEC);
    say(s[0], "x");
    hear(100, "x");
}

CASE(fd_close_everything_then_new_sockets)
{
    int s[2], e = ep_new();
    tcp_pair(s);
    ep_add(e, s[1], EPOLLIN);
    OK(close_range(3, ~0u, 0));
    int t[2];
    tcp_pair(t);
    EQ(t[0], 4);
    EQ(t[1], 5);
    say(t[0], "x");
    hear(t[1], "x");
    e = ep_new();
    ep_add(e, t[1], EPOLLIN);
    say(t[0], "y");
    EV(ep_one(e, t[1], 15000), EPOLLIN);
}

CASE(fd_closefrom_then_new_sockets)
{
    int s[2];
    tcp_pair(s);
    closefrom(3);
    ERR(send(s[0], "x", 1, 0), EBADF);
    tcp_pair(s);
    say(s[0], "x");
    hear(s[1], "x");
}

/* the old daemons' loop */
CASE(fd_close_loop_then_new_sockets)
{
    int s[2];
    tcp_pair(s);
    for (int i = 3; i < 4096; i++)
        close(i);
    tcp_pair(s);
    EQ(s[0], 4);
    say(s[0], "x");
    hear(s[1], "x");
    pid_t p = fork_child();
    if (!p) {
        hear(s[1], "y");
        _exit(0);
    }
    say(s[0], "y");
    reap(p, 0);
}

CASE(fd_proc_loop_then_new_sockets)
{
    int s[2], high = 0;
    tcp_pair(s);
    /* what programs do that look at /proc/self/fd: nothing but ours is there */
    for (int i = 3; i < 1024; i++)
        if (fcntl(i, F_GETFD) >= 0)
            high = i;
    for (int i = 3; i <= high; i++)
        close(i);
    tcp_pair(s);
    stream_send(s[0], 30000, 1, 30000);
    stream_recv(s[1], 30000, 1, 30000);
}

CASE(fd_reopen_many_times)
{
    int n = lowest();
    for (int i = 0; i < 3000; i++) {
        int s = OK(socket(AF_INET, i & 1 ? SOCK_STREAM : SOCK_DGRAM, 0));
        EQ(s == n, 1);
        OK(close(s));
    }
}

CASE(stdio_fdopen)
{
    int s[2];
    char line[64];
    tcp_pair(s);
    FILE *w = fdopen(s[0], "w"), *r = fdopen(s[1], "r");
    TRUE(w && r);
    fprintf(w, "line %d\nand another\n", 1);
    EQ(fflush(w), 0);
    TRUE(fgets(line, sizeof line, r));
    TRUE(!strcmp(line, "line 1\n"));
    TRUE(fgets(line, sizeof line, r));
    TRUE(!strcmp(line, "and another\n"));
    EQ(fclose(w), 0);
    TRUE(!fgets(line, sizeof line, r));
    EQ(!!feof(r), 1);
    EQ(ferror(r), 0);
}

CASE(stdio_dprintf)
{
    int s[2];
    tcp_pair(s);
    EQ(dprintf(s[0], "%s-%d", "n", 42), 4);
    hear(s[1], "n-42");
}

CASE(stdio_read_write_stream)
{
    int s[2];
    char b[32];
    tcp_pair(s);
    FILE *f = fdopen(s[0], "r+");
    TRUE(f);
    setvbuf(f, NULL, _IONBF, 0);
    EQ(fputs("ask\n", f) >= 0, 1);
    hear(s[1], "ask\n");
    say(s[1], "answer\n");
    TRUE(fgets(b, sizeof b, f));
    TRUE(!strcmp(b, "answer\n"));
}

CASE(stdio_big_buffered_write)
{
    int s[2];
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        FILE *w = fdopen(s[0], "w");
        for (int i = 0; i < 20000; i++)
            fprintf(w, "%07d\n", i);
        EQ(fclose(w), 0);
        _exit(0);
    }
    OK(close(s[0]));
    FILE *r = fdopen(s[1], "r");
    char b[32], x[32];
    for (int i = 0; i < 20000; i++) {
        snprintf(x, sizeof x, "%07d\n", i);
        TRUE(fgets(b, sizeof b, r));
        TRUE(!strcmp(b, x));
    }
    TRUE(!fgets(b, sizeof b, r));
    reap(p, 0);
}

CASE(stdio_getline_and_fread)
{
    int s[2];
    tcp_pair(s);
    say(s[0], "one\ntwo\nrest");
    OK(close(s[0]));
    FILE *r = fdopen(s[1], "r");
    char *l = NULL, b[16];
    size_t n = 0;
    EQ(getline(&l, &n, r), 4);
    EQ(getline(&l, &n, r), 4);
    EQ(fread(b, 1, sizeof b, r), 4);
    MEMEQ(b, "rest", 4);
    EQ(fclose(r), 0);
}

CASE(unix_socketpair_untouched)
{
    int x[2], n;
    OK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, x));
    EQ(fcntl(x[0], F_GETFD), FD_CLOEXEC);
    say(x[0], "abc");
    OK(ioctl(x[1], FIONREAD, &n));
    EQ(n, 3);
    hear(x[1], "abc");
    EQ(getopt_int(x[0], SOL_SOCKET, SO_DOMAIN), AF_UNIX);
    OK(shutdown(x[0], SHUT_WR));
    hear_eof(x[1]);
}

CASE(unix_datagram_pair_untouched)
{
    int x[2];
    char b[8];
    OK(socketpair(AF_UNIX, SOCK_DGRAM, 0, x));
    EQ(send(x[0], "ab", 2, 0), 2);
    EQ(send(x[0], "cde", 3, 0), 3);
    EQ(recv(x[1], b, 8, 0), 2);
    EQ(recv(x[1], b, 8, 0), 3);
}

CASE(unix_listener_untouched)
{
    int l = OK(socket(AF_UNIX, SOCK_STREAM, 0)), c = OK(socket(AF_UNIX, SOCK_STREAM, 0));
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    snprintf(a.sun_path + 1, 60, "socktest-%d", getpid());
    socklen_t n = offsetof(struct sockaddr_un, sun_path) + 1 + strlen(a.sun_path + 1);
    OK(bind(l, (struct sockaddr *)&a, n));
    OK(listen(l, 4));
    OK(connect(c, (struct sockaddr *)&a, n));
    int s = accepted(l);
    say(c, "x");
    hear(s, "x");
    struct ucred u;
    socklen_t ul = sizeof u;
    OK(getsockopt(s, SOL_SOCKET, SO_PEERCRED, &u, &ul));
    EQ(u.pid == getpid(), 1);
}

CASE(pipe_untouched)
{
    int p[2], n;
    OK(pipe2(p, O_CLOEXEC | O_NONBLOCK));
    ERR(read(p[0], &n, 1), EAGAIN);
    EQ(write(p[1], "ab", 2), 2);
    OK(ioctl(p[0], FIONREAD, &n));
    EQ(n, 2);
    EV(poll_now(p[0], POLLIN), POLLIN);
}

/* A shell's redirection: stdout is a socket for a while. */
CASE(fd_stdout_redirected_for_a_while)
{
    int s[2], p[2], keep = OK(dup(1));
    tcp_pair(s);
    OK(pipe(p));
    OK(fflush(stdout));
    OK(dup2(p[1], 1));
    printf("be");
    OK(dup2(s[0], 1));
    printf("fore %d\n", 1);
    OK(fflush(stdout));
    hear(s[1], "before 1\n");
    puts("socket");
    OK(fflush(stdout));
    hear(s[1], "socket\n");
    printf("af");
    OK(dup2(p[1], 1));
    printf("ter %d", 2);
    OK(fflush(stdout));
    char buf[64] = "";
    EQ(read(p[0], buf, sizeof buf), 7);
    EQ(strcmp(buf, "after 2"), 0);
    OK(dup2(s[0], 1));
    OK(close(s[0]));
    printf("last");
    OK(fflush(stdout));
    hear(s[1], "last");
    OK(dup2(keep, 1));
    EQ(recv(s[1], buf, sizeof buf, 0), 0);
}

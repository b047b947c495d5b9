/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* The many ways to move bytes. */
#include "socktest.h"
#include <sys/syscall.h>

CASE(io_readv_writev)
{
    int s[2];
    char a[3], b[2], c[8];
    tcp_pair(s);
    struct iovec w[3] = {{"abc", 3}, {"", 0}, {"defg", 4}};
    EQ(writev(s[0], w, 3), 7);
    wait_bytes(s[1], 7);
    struct iovec r[3] = {{a, 3}, {b, 2}, {c, 8}};
    EQ(readv(s[1], r, 3), 7);
    MEMEQ(a, "abc", 3);
    MEMEQ(b, "de", 2);
    MEMEQ(c, "fg", 2);
}

CASE(io_iov_limits)
{
    int s[2];
    static struct iovec v[1025];
    static char x[1025];
    tcp_pair(s);
    for (int i = 0; i < 1025; i++)
        v[i] = (struct iovec){&x[i], 1};
    EQ(writev(s[0], v, 1024), 1024);
    ERR(writev(s[0], v, 1025), EINVAL);
    volatile int minus = -1;
    ERR(writev(s[0], v, minus), EINVAL);
    EQ(writev(s[0], v, 0), 0);
    EQ(readv(s[1], v, 0), 0);
    wait_bytes(s[1], 1024);
    EQ(readv(s[1], v, 1024), 1024);
    struct msghdr m = {.msg_iov = v, .msg_iovlen = 1025};
    ERR(sendmsg(s[0], &m, 0), EMSGSIZE);
    ERR(recvmsg(s[1], &m, MSG_DONTWAIT), EMSGSIZE);
}

CASE(io_sendmsg_recvmsg)
{
    int s[2];
    char a[2], b[8];
    tcp_pair(s);
    struct iovec w[2] = {{"ab", 2}, {"cdef", 4}};
    struct msghdr m = {.msg_iov = w, .msg_iovlen = 2};
    EQ(sendmsg(s[0], &m, 0), 6);
    wait_bytes(s[1], 6);
    struct iovec r[2] = {{a, 2}, {b, 8}};
    union addr n;
    char cb[64];
    m = (struct msghdr){.msg_name = &n, .msg_namelen = sizeof n, .msg_iov = r, .msg_iovlen = 2,
                        .msg_control = cb, .msg_controllen = sizeof cb, .msg_flags = -1};
    EQ(recvmsg(s[1], &m, 0), 6);
    EQ(m.msg_namelen, 0);
    EQ(m.msg_controllen, 0);
    EQ(m.msg_flags & ~MSG_EOR, 0);
    MEMEQ(a, "ab", 2);
    MEMEQ(b, "cdef", 4);
}

CASE(io_recvmsg_eof_and_error)
{
    int s[2];
    char b[8];
    struct iovec v = {b, 8};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
    tcp_pair(s);
    ERR(recvmsg(s[1], &m, MSG_DONTWAIT), EAGAIN);
    OK(shutdown(s[0], SHUT_WR));
    EQ(recvmsg(s[1], &m, 0), 0);
    linger0_close(s[0]);
}

CASE(io_recvmsg_peek_and_waitall)
{
    int s[2];
    char b[8];
    struct iovec v[2] = {{b, 2}, {b + 2, 4}};
    struct msghdr m = {.msg_iov = v, .msg_iovlen = 2};
    tcp_pair(s);
    say(s[0], "abc");
    wait_bytes(s[1], 3);
    EQ(recvmsg(s[1], &m, MSG_PEEK), 3);
    pid_t p = fork_child();
    if (!p) {
        say(s[0], "def");
        _exit(0);
    }
    EQ(recvmsg(s[1], &m, MSG_WAITALL), 6);
    MEMEQ(b, "abcdef", 6);
    reap(p, 0);
}

CASE(io_sendmmsg_recvmmsg_on_stream)
{
    int s[2];
    char b[2][8];
    tcp_pair(s);
    struct iovec v[2] = {{"abc", 3}, {"de", 2}};
    struct mmsghdr m[2] = {{{.msg_iov = &v[0], .msg_iovlen = 1}, 0},
                           {{.msg_iov = &v[1], .msg_iovlen = 1}, 0}};
    EQ(sendmmsg(s[0], m, 2, 0), 2);
    EQ(m[0].msg_len, 3);
    EQ(m[1].msg_len, 2);
    wait_bytes(s[1], 5);
    v[0] = (struct iovec){b[0], 4};
    v[1] = (struct iovec){b[1], 4};
    EQ(recvmmsg(s[1], m, 2, MSG_WAITFORONE, NULL), 2);
    EQ(m[0].msg_len, 4);
    EQ(m[1].msg_len, 1);
}

static int temp_file(size_t n, uint64_t seed)
{
    int f = OK(memfd_create("socktest", 0));
    unsigned char *b = malloc(n);
    fill_pattern(b, n, 0, seed);
    EQ(write(f, b, n), n);
    free(b);
    EQ(lseek(f, 0, SEEK_SET), 0);
    return f;
}

CASE(io_sendfile)
{
    int s[2], f = temp_file(100000, 5);
    tcp_pair(s);
    pid_t p = fork_child();
    if (!p) {
        stream_recv(s[1], 100000, 5, 9000);
        _exit(0);
    }
    size_t n = 100000;
    while (n)
        n -= OK(sendfile(s[0], f, NULL, n));
    EQ(lseek(f, 0, SEEK_CUR), 100000);
    EQ(sendfile(s[0], f, NULL, 10), 0); /* at the end of the file */
    reap(p, 0);
}

CASE(io_sendfile_offset)
{
    int s[2], f = temp_file(5000, 5);
    unsigned char b[1000], w[1000];
    tcp_pair(s);
    off_t o = 1234;
    EQ(sendfile(s[0], f, &o, 1000), 1000);
    EQ(o, 2234);
    EQ(lseek(f, 0, SEEK_CUR), 0);
    recv_all(s[1], b, 1000);
    fill_pattern(w, 1000, 1234, 5);
    MEMEQ(b, w, 1000);
}

CASE(io_sendfile_real_file)
{
    int s[2];
    char p[] = "/tmp/socktestXXXXXX";
    int f = OK(mkstemp(p));
    unlink(p);
    EQ(write(f, "file content", 12), 12);
    off_t o = 5;
    tcp_pair(s);
    EQ(sendfile(s[0], f, &o, 100), 7); /* as much as there is */
    hear(s[1], "content");
}

CASE(io_sendfile_errors)
{
    int s[2], f = temp_file(10, 1), p[2];
    tcp_pair(s);
    OK(pipe(p));
    ERR(sendfile(f, s[0], NULL, 10), EINVAL); /* not from a socket */
    ERR(sendfile(s[0], s[1], NULL, 10), EINVAL);
    ERR(sendfile(s[0], -1, NULL, 10), EBADF);
    ERR(sendfile(-1, f, NULL, 10), EBADF);
    off_t neg = -1;
    ERR(sendfile(s[0], f, &neg, 10), EINVAL);
    signal(SIGPIPE, SIG_IGN);
    OK(shutdown(s[0], SHUT_WR));
    ERR(sendfile(s[0], f, NULL, 10), EPIPE);
}

CASE(io_sendfile_nonblocking_partial)
{
    int s[2], f = temp_file(1 << 20, 5);
    tcp_pair(s);
    OK(ftruncate(f, 64 << 20));
    set_nonblock(s[0], 1);
    ssize_t r = OK(sendfile(s[0], f, NULL, 64 << 20));
    TRUE(r > 0 && r < (64 << 20));
    EQ(lseek(f, 0, SEEK_CUR) == r, 1);
}

CASE(io_splice_pipe_to_socket)
{
    int s[2], p[2];
    tcp_pair(s);
    OK(pipe(p));
    EQ(write(p[1], "spliced", 7), 7);
    EQ(splice(p[0], NULL, s[0], NULL, 100, 0), 7);
    hear(s[1], "spliced");
    OK(close(p[1]));
    EQ(splice(p[0], NULL, s[0], NULL, 100, 0), 0);
}

CASE(io_splice_socket_to_pipe)
{
    int s[2], p[2];
    char b[16];
    tcp_pair(s);
    OK(pipe(p));
    say(s[0], "spliced");
    wait_bytes(s[1], 7);
    EQ(splice(s[1], NULL, p[1], NULL, 100, 0), 7);
    EQ(read(p[0], b, 16), 7);
    MEMEQ(b, "spliced", 7);
    set_nonblock(s[1], 1); /* SPLICE_F_NONBLOCK speaks of the pipe only */
    ERR(splice(s[1], NULL, p[1], NULL, 100, 0), EAGAIN);
    OK(shutdown(s[0], SHUT_WR));
    wait_ev(s[1], POLLRDHUP);
    EQ(splice(s[1], NULL, p[1], NULL, 100, 0), 0);
}

CASE(io_splice_proxy)
{
    int a[2], b[2], p[2];
    tcp_pair(a);
    tcp_pair(b);
    OK(pipe(p));
    pid_t w = fork_child();
    if (!w) {
        OK(close(a[1]));
        stream_send(a[0], 4 << 20, 6, 50000);
        _exit(0);
    }
    OK(close(a[0]));
    pid_t r = fork_child();
    if (!r) {
        OK(close(b[0]));
        stream_recv(b[1], 4 << 20, 6, 50000);
        hear_eof(b[1]);
        _exit(0);
    }
    OK(close(b[1]));
    ssize_t n;
    while ((n = OK(splice(a[1], NULL, p[1], NULL, 65536, 0))) > 0)
        while (n)
            n -= OK(splice(p[0], NULL, b[0], NULL, n, 0));
    OK(close(b[0]));
    reap(w, 0);
    reap(r, 0);
}

CASE(io_splice_errors)
{
    int s[2], t[2], p[2];
    loff_t o = 0;
    tcp_pair(s);
    tcp_pair(t);
    OK(pipe(p));
    ERR(splice(s[0], NULL, t[0], NULL, 10, 0), EINVAL); /* one must be a pipe */
    ERR(splice(s[0], &o, p[1], NULL, 10, 0), EINVAL);
    EQ(write(p[1], "x", 1), 1);
    ERR(splice(p[0], NULL, s[0], &o, 10, 0), EINVAL);
    ERR(splice(p[0], &o, s[0], NULL, 10, 0), ESPIPE);
}

CASE(io_vmsplice_through_pipe)
{
    int s[2], p[2];
    tcp_pair(s);
    OK(pipe(p));
    struct iovec v = {"pages", 5};
    EQ(vmsplice(p[1], &v, 1, 0), 5);
    EQ(splice(p[0], NULL, s[0], NULL, 5, 0), 5);
    hear(s[1], "pages");
}

CASE(io_copy_file_range_refuses_sockets)
{
    int s[2], f = temp_file(10, 1);
    tcp_pair(s);
    ERR(copy_file_range(f, NULL, s[0], NULL, 10, 0), EINVAL);
}

CASE(io_preadv2_minus_one_is_readv)
{
    int s[2];
    char b[8];
    tcp_pair(s);
    struct iovec w = {"abc", 3}, r = {b, 8};
    EQ(pwritev2(s[0], &w, 1, -1, 0), 3);
    wait_bytes(s[1], 3);
    EQ(preadv2(s[1], &r, 1, -1, 0), 3);
    ERR(preadv2(s[1], &r, 1, -1, RWF_NOWAIT), EAGAIN);
    ERR(preadv2(s[1], &r, 1, -1, 1 << 20), EOPNOTSUPP);
    EQ(pwritev2(s[0], &w, 1, -1, RWF_NOWAIT), 3);
    wait_bytes(s[1], 3);
    EQ(preadv2(s[1], &r, 1, -1, RWF_NOWAIT), 3);
}

/* Names that glibc has besides. */
extern ssize_t __read(int, void *, size_t), __write(int, const void *, size_t), __send(int, const void *, size_t, int);
extern int __close(int), __dup2(int, int), __connect(int, const struct sockaddr *, socklen_t), __fcntl(int, int, ...);
extern int __poll(struct pollfd *, nfds_t, int), __select(int, fd_set *, fd_set *, fd_set *, struct timeval *);

CASE(io_second_names)
{
    int s[2], l = listener(AF_INET, 4);
    char b[8];
    tcp_pair(s);
    EQ(__write(s[0], "ab", 2), 2);
    EQ(__send(s[0], "cd", 2, 0), 2);
    wait_bytes(s[1], 4);
    struct pollfd p = {s[1], POLLIN, 0};
    EQ(__poll(&p, 1, 0), 1);
    fd_set r;
    FD_ZERO(&r);
    FD_SET(s[1], &r);
    EQ(__select(s[1] + 1, &r, NULL, NULL, NULL), 1);
    EQ(__read(s[1], b, 8), 4);
    EQ(__fcntl(s[1], F_GETFL) & O_NONBLOCK, 0);
    EQ(__dup2(s[1], s[0]), s[0]);
    EQ(read(s[0], b, 8), 0);
    OK(__close(s[0]));
    union addr a;
    socklen_t n = name_of(l, &a);
    int c = OK(socket(AF_INET, SOCK_STREAM, 0));
    OK(__connect(c, &a.sa, n));
}

CASE(io_bare_system_calls)
{
    int s[2], l = listener(AF_INET, 4), e = ep_new(), v = 0;
    char b[8];
    socklen_t n = sizeof v;
    tcp_pair(s);
    struct iovec w = {"abc", 3}, r = {b, 8};
    struct mmsghdr m = {.msg_hdr = {.msg_iov = &w, .msg_iovlen = 1}};
    EQ(syscall(SYS_writev, s[0], &w, 1), 3);
    EQ(syscall(SYS_sendmmsg, s[0], &m, 1, 0), 1);
    wait_bytes(s[1], 6);
    EQ(syscall(SYS_readv, s[1], &r, 1), 6);
    m.msg_hdr.msg_iov = &r;
    ERR(syscall(SYS_recvmmsg, s[1], &m, 1, MSG_DONTWAIT, NULL), EAGAIN);
    EQ(syscall(SYS_getsockopt, s[0], SOL_SOCKET, SO_TYPE, &v, &n), 0);
    EQ(v, SOCK_STREAM);
    EQ(syscall(SYS_fcntl, s[1], F_SETFL, O_NONBLOCK), 0);
    EQ(fcntl(s[1], F_GETFL) & O_NONBLOCK, O_NONBLOCK);
    connected(l);
    int a = OK(syscall(SYS_accept4, l, NULL, NULL, SOCK_NONBLOCK));
    struct epoll_event ev = {.events = EPOLLIN, .data.fd = s[1]};
    EQ(syscall(SYS_epoll_ctl, e, EPOLL_CTL_ADD, s[1], &ev), 0);
    say(s[0], "x");
    EQ(syscall(SYS_epoll_wait, e, &ev, 1, 15000), 1);
    int d = OK(syscall(SYS_dup, s[1]));
    EQ(recv(d, b, 8, 0), 1);
    EQ(syscall(SYS_shutdown, s[0], SHUT_WR), 0);
    wait_all(s[1], POLLIN);
    EQ(recv(d, b, 8, 0), 0);
    OK(syscall(SYS_close_range, a, a, 0));
    ERR(recv(a, b, 8, 0), EBADF);
    EQ(syscall(SYS_socket, AF_INET, SOCK_STREAM, 0) >= 0, 1);
}

CASE(io_bad_buffers)
{
    int s[2];
    tcp_pair(s);
    char *bad = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ERR(send(s[0], bad, 10, 0), EFAULT);
    ERR(write(s[0], bad, 10), EFAULT);
    say(s[0], "kept");
    wait_bytes(s[1], 4);
    ERR(recv(s[1], bad, 10, 0), EFAULT);
    hear(s[1], "kept"); /* nothing was lost */
}

CASE(io_mixed_calls_on_one_stream)
{
    int s[2];
    char b[64] = "";
    tcp_pair(s);
    struct iovec v = {"4", 1};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
    EQ(write(s[0], "1", 1), 1);
    EQ(send(s[0], "2", 1, 0), 1);
    EQ(writev(s[0], &(struct iovec){"3", 1}, 1), 1);
    EQ(sendmsg(s[0], &m, 0), 1);
    EQ(sendto(s[0], "5", 1, 0, NULL, 0), 1);
    EQ(dprintf(s[0], "6"), 1);
    wait_bytes(s[1], 6);
    EQ(read(s[1], b, 1), 1);
    EQ(recv(s[1], b + 1, 1, 0), 1);
    EQ(readv(s[1], &(struct iovec){b + 2, 1}, 1), 1);
    v.iov_base = b + 3;
    EQ(recvmsg(s[1], &m, 0), 1);
    EQ(recvfrom(s[1], b + 4, 1, 0, NULL, NULL), 1);
    EQ(recv(s[1], b + 5, 1, 0), 1);
    TRUE(!strcmp(b, "123456"));
}

CASE(io_unknown_send_flags_are_ignored)
{
    int s[2];
    tcp_pair(s);
    EQ(send(s[0], "x", 1, MSG_EOR | MSG_CONFIRM | MSG_DONTROUTE), 1);
    hear(s[1], "x");
}

CASE(io_msg_errqueue_is_empty)
{
    int s[2];
    char b[4];
    tcp_pair(s);
    ERR(recv(s[0], b, 4, MSG_ERRQUEUE), EAGAIN);
}

CASE(io_zerocopy_flag_without_option)
{
    int s[2];
    tcp_pair(s);
    EQ(send(s[0], "plain", 5, MSG_ZEROCOPY), 5); /* ignored without SO_ZEROCOPY */
    hear(s[1], "plain");
}

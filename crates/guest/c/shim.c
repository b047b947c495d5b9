// What C's ABI demands and stable Rust cannot define: functions with variable arguments, and stdio streams over sockets.
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdio_ext.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <wchar.h>
#include <sys/types.h>

extern int nk_execve(const char *path, char *const argv[], char *const envp[]);
extern int nk_execvpe(const char *file, char *const argv[], char *const envp[]);
extern ssize_t nk_stdio_read(int fd, void *buf, size_t n);
extern ssize_t nk_stdio_write(int fd, const void *buf, size_t n);
extern int nk_stdio_close(int fd);

extern char **environ;

#define NK_LINE_BUF 0x200 // glibc's _IO_LINE_BUF, which its headers do not give

#define COLLECT(first)                                                                      \
    size_t n = 1;                                                                           \
    va_list ap, count;                                                                      \
    va_start(ap, first);                                                                    \
    va_copy(count, ap);                                                                     \
    while (va_arg(count, char *)) n++;                                                      \
    va_end(count);                                                                          \
    char *argv[n + 1];                                                                      \
    argv[0] = (char *)(first);                                                              \
    for (size_t i = 1; i <= n; i++) argv[i] = va_arg(ap, char *);

// `first` is argv[0]; a NULL argv[0] is passed on as an empty list.
int nk_c_execl(const char *path, const char *first, ...)
{
    if (!first) { char *none[] = {NULL}; return nk_execve(path, none, environ); }
    COLLECT(first)
    va_end(ap);
    return nk_execve(path, argv, environ);
}

int nk_c_execlp(const char *file, const char *first, ...)
{
    if (!first) { char *none[] = {NULL}; return nk_execvpe(file, none, environ); }
    COLLECT(first)
    va_end(ap);
    return nk_execvpe(file, argv, environ);
}

int nk_c_execle(const char *path, const char *first, ...)
{
    if (!first) { errno = EINVAL; return -1; }
    COLLECT(first)
    char *const *envp = va_arg(ap, char *const *);
    va_end(ap);
    return nk_execve(path, argv, envp);
}

// glibc's own streams read and write by internal calls that no library can interpose; a stream over a guest socket
// is a cookie stream instead, with its descriptor number in place so that fileno() tells the truth.
static ssize_t cookie_read(void *cookie, char *buf, size_t n) { return nk_stdio_read((int)(long)cookie, buf, n); }
static ssize_t cookie_write(void *cookie, const char *buf, size_t n)
{
    size_t done = 0;
    while (done < n) {
        ssize_t r = nk_stdio_write((int)(long)cookie, buf + done, n - done);
        if (r < 0) return done ? (ssize_t)done : 0;
        done += (size_t)r;
    }
    return (ssize_t)done;
}
static void forget_standard(int fd);
static int cookie_close(void *cookie)
{
    int r = nk_stdio_close((int)(long)cookie);
    forget_standard((int)(long)cookie);
    return r;
}

FILE *nk_c_fdopen(int fd, const char *mode)
{
    cookie_io_functions_t io = {cookie_read, cookie_write, NULL, cookie_close};
    FILE *f = fopencookie((void *)(long)fd, mode, io);
    if (f) f->_fileno = fd;
    return f;
}

// Streams 0-2. While a guest socket stands at one of these numbers (inherited, or by dup2: a shell's redirection), the
// program's stream is a cookie stream; what stands unwritten in a stream goes along, as it would in one stream.
static struct { FILE *ours, *theirs; } standard[3];

static void take_over(FILE *from, FILE *to)
{
    if (ftrylockfile(from)) return;
    if (__fwritable(from) && fwide(from, 0) <= 0) {
        size_t pending = __fpending(from);
        if (pending && fwrite_unlocked(from->_IO_write_base, 1, pending, to) == pending) __fpurge(from);
    }
    if (__flbf(from)) to->_flags |= NK_LINE_BUF;
    else to->_flags &= ~NK_LINE_BUF;
    funlockfile(from);
}

// The program closed the stream.
static void forget_standard(int fd)
{
    if (fd >= 0 && fd < 3) standard[fd].ours = NULL;
}

void nk_c_standard_stream(int fd, int guest)
{
    FILE **now = fd == 0 ? &stdin : fd == 1 ? &stdout : &stderr, *was = *now;
    FILE **ours = &standard[fd].ours;
    if (guest) {
        // A stream that the program put there itself stays.
        if (!was || was == *ours || was->_fileno != fd) return;
        if (!*ours) {
            *ours = nk_c_fdopen(fd, fd == 0 ? "r" : "w");
            if (!*ours) return;
            if (fd == 2) setvbuf(*ours, NULL, _IONBF, 0);
        }
        standard[fd].theirs = was;
        take_over(was, *ours);
        *now = *ours;
    } else if (*ours && was == *ours) {
        take_over(was, standard[fd].theirs);
        *now = standard[fd].theirs;
    }
}

// dprintf writes past every hook, too.
static int guest_vdprintf(int fd, const char *format, va_list ap)
{
    char *text;
    int n = vasprintf(&text, format, ap);
    if (n < 0) return n;
    ssize_t r = cookie_write((void *)(long)fd, text, (size_t)n);
    free(text);
    return r == n ? n : -1;
}

extern int nk_is_guest(int fd);
extern int nk_next_vdprintf(int fd, const char *format, va_list ap);

int nk_c_vdprintf(int fd, const char *format, va_list ap)
{
    return nk_is_guest(fd) ? guest_vdprintf(fd, format, ap) : nk_next_vdprintf(fd, format, ap);
}

int nk_c_dprintf(int fd, const char *format, ...)
{
    va_list ap;
    va_start(ap, format);
    int n = nk_c_vdprintf(fd, format, ap);
    va_end(ap);
    return n;
}

int nk_c_dprintf_chk(int fd, int flag, const char *format, ...)
{
    (void)flag;
    va_list ap;
    va_start(ap, format);
    int n = nk_c_vdprintf(fd, format, ap);
    va_end(ap);
    return n;
}

int nk_c_vdprintf_chk(int fd, int flag, const char *format, va_list ap)
{
    (void)flag;
    return nk_c_vdprintf(fd, format, ap);
}

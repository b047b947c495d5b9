// What C's ABI demands and stable Rust cannot define: functions with variable arguments, and stdio streams over sockets.
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <sys/types.h>

extern int nk_execve(const char *path, char *const argv[], char *const envp[]);
extern int nk_execvpe(const char *file, char *const argv[], char *const envp[]);
extern ssize_t nk_stdio_read(int fd, void *buf, size_t n);
extern ssize_t nk_stdio_write(int fd, const void *buf, size_t n);
extern int nk_stdio_close(int fd);

extern char **environ;

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
static int cookie_close(void *cookie) { return nk_stdio_close((int)(long)cookie); }

FILE *nk_c_fdopen(int fd, const char *mode)
{
    cookie_io_functions_t io = {cookie_read, cookie_write, NULL, cookie_close};
    FILE *f = fopencookie((void *)(long)fd, mode, io);
    if (f) f->_fileno = fd;
    return f;
}

// Streams 0-2 of a program that was started with a guest socket there (inetd style).
void nk_c_standard_stream(int fd)
{
    FILE *f = nk_c_fdopen(fd, fd == 0 ? "r" : "w");
    if (!f) return;
    if (fd == 0) stdin = f;
    if (fd == 1) stdout = f;
    if (fd == 2) { setvbuf(f, NULL, _IONBF, 0); stderr = f; }
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

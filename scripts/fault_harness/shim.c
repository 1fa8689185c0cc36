/* Makes the n-th file operation of a process fail, stop half-way, or kill it.
 *
 * Preloaded (LD_PRELOAD) it stands between a program, whatever language its parts are written in,
 * and the C library's calls that change files. Only files below a prefix count. Armed by fault_arm. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum kind { NONE, ERROR, FULL, SHORT, KILL_BEFORE, KILL_AFTER, KILL_HALF };

static char prefix[PATH_MAX];
static enum kind armed = NONE;
static long target, seen;

void fault_arm(const char *below, int kind, long at) {
    strncpy(prefix, below, sizeof prefix - 1);
    armed = (enum kind)kind;
    target = at;
    seen = 0;
}

long fault_seen(void) { return seen; }

static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

static int is_watched(const char *path) {
    return prefix[0] && strncmp(path, prefix, strlen(prefix)) == 0;
}

static int is_watched_fd(int fd) {
    char link[64], path[PATH_MAX];
    if (!prefix[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return is_watched(path);
}

/* What happens to this operation: 0 for nothing, else an errno. `needs_room`: a full disk stops it. */
static int before(int needs_room) {
    long number = seen++;
    if (number == target) {
        if (armed == ERROR) return EIO;
        if (armed == KILL_BEFORE) die();
    }
    if (armed == FULL && needs_room && number >= target) return ENOSPC;
    return 0;
}

static void after(void) {
    if (seen - 1 == target && armed == KILL_AFTER) die();
}

static int is_half(void) { return seen - 1 == target && (armed == SHORT || armed == KILL_HALF); }

#define NEXT(name) \
    static __typeof__(name) *next; \
    if (!next) next = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define FAIL(code) do { errno = (code); return -1; } while (0)

#define CALL(watched, needs_room, call) \
    if (!(watched)) return call; \
    int code = before(needs_room); \
    if (code) FAIL(code); \
    __typeof__(call) result = call; \
    after(); \
    return result

ssize_t write(int fd, const void *data, size_t size) {
    NEXT(write);
    if (is_watched_fd(fd)) {
        int code = before(1);
        if (code) FAIL(code);
        if (is_half()) {
            ssize_t half = next(fd, data, size / 2);
            if (armed == KILL_HALF) die();
            armed = FULL; /* the rest, and everything after it, finds no room */
            return half;
        }
        ssize_t result = next(fd, data, size);
        after();
        return result;
    }
    return next(fd, data, size);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    NEXT(pwrite64);
    if (is_watched_fd(fd)) {
        int code = before(1);
        if (code) FAIL(code);
        if (is_half()) {
            ssize_t half = next(fd, data, size / 2, at);
            if (armed == KILL_HALF) die();
            armed = FULL;
            return half;
        }
        ssize_t result = next(fd, data, size, at);
        after();
        return result;
    }
    return next(fd, data, size, at);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { return pwrite64(fd, data, size, at); }

int fsync(int fd) { NEXT(fsync); CALL(is_watched_fd(fd), 0, next(fd)); }
int fdatasync(int fd) { NEXT(fdatasync); CALL(is_watched_fd(fd), 0, next(fd)); }
int ftruncate64(int fd, off64_t size) { NEXT(ftruncate64); CALL(is_watched_fd(fd), 0, next(fd, size)); }
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }
int rename(const char *from, const char *to) { NEXT(rename); CALL(is_watched(to), 0, next(from, to)); }
int unlink(const char *path) { NEXT(unlink); CALL(is_watched(path), 0, next(path)); }
int rmdir(const char *path) { NEXT(rmdir); CALL(is_watched(path), 0, next(path)); }
int mkdir(const char *path, mode_t mode) { NEXT(mkdir); CALL(is_watched(path), 1, next(path, mode)); }

int open64(const char *path, int flags, ...) {
    NEXT(open64);
    mode_t mode = 0;
    if (flags & (O_CREAT | O_TMPFILE)) {
        va_list rest;
        va_start(rest, flags);
        mode = va_arg(rest, mode_t);
        va_end(rest);
    }
    CALL((flags & O_CREAT) && is_watched(path), 1, next(path, flags, mode));
}

int open(const char *path, int flags, ...) {
    mode_t mode = 0;
    if (flags & (O_CREAT | O_TMPFILE)) {
        va_list rest;
        va_start(rest, flags);
        mode = va_arg(rest, mode_t);
        va_end(rest);
    }
    return open64(path, flags, mode);
}

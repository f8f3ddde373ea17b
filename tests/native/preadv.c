/* Stands between the native reader and the system: read.c is compiled with -Dpreadv=hooked_preadv, and with
 * -Dpreadv2=hooked_preadv2, by which nothing, or half of a part, is found in the page cache. */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/uio.h>
#include <unistd.h>

typedef ssize_t (*read_fn)(int, const struct iovec *, int, off_t);

read_fn preadv_hook;
int preadv_delay; /* microseconds before each read */
int preadv_count;
int preadv_told = 1; /* does the file system tell what is cached? 2: it has some */

ssize_t hooked_preadv(int handle, const struct iovec *parts, int count, off_t offset);

ssize_t hooked_preadv(int handle, const struct iovec *parts, int count, off_t offset) {
    __atomic_fetch_add(&preadv_count, 1, __ATOMIC_RELAXED);
    if (preadv_delay) usleep((unsigned)preadv_delay);
    return preadv_hook ? preadv_hook(handle, parts, count, offset) : preadv(handle, parts, count, offset);
}

ssize_t hooked_preadv2(int handle, const struct iovec *parts, int count, off_t offset, int flags);

ssize_t hooked_preadv2(int handle, const struct iovec *parts, int count, off_t offset, int flags) {
    (void)count, (void)flags;
    if (preadv_told == 2) return pread(handle, parts[0].iov_base, (parts[0].iov_len + 1) / 2, offset);
    errno = preadv_told ? EAGAIN : EOPNOTSUPP;
    return -1;
}

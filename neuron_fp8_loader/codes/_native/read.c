#define _GNU_SOURCE /* preadv2, madvise */
#include "read.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define BUFFERS 256 /* of one preadv; Linux takes 1024 */
#define ALIGNED ((uint64_t)4096)

static uint64_t nanoseconds(clockid_t clock) {
    struct timespec now;
    if (clock_gettime(clock, &now)) return 0;
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint64_t down(uint64_t x, uint64_t unit) { return x / unit * unit; }
static uint64_t up(uint64_t x, uint64_t unit) { return down(x + unit - 1, unit); }
static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }
static uint64_t most(uint64_t a, uint64_t b) { return a > b ? a : b; }

/* -- fresh memory ------------------------------------------------------------------------------------------------- */

/* Backing a stretch at once is cheaper than a fault for each page as it is written to, and a page of 2 MiB costs a
 * third of 512 small ones. But where the host of a virtual machine has taken back what the guest left free, large
 * pages come from what is slow to get; then small ones are asked for after all. */
#define HUGE ((uint64_t)2 << 20)
#define STEP ((uint64_t)1 << 20)
#define WORTH_POPULATING ((uint64_t)1 << 16)
#define SLOW_ONES 2

#if defined(__linux__) && !defined(MADV_POPULATE_WRITE)
#define MADV_POPULATE_WRITE 23 /* from Linux 5.14 on; before, it is refused */
#endif

#ifdef MADV_POPULATE_WRITE
static int advise(uint64_t first, uint64_t last, int advice) {
    return madvise((void *)(uintptr_t)first, (size_t)(last - first), advice);
}

/* Back memory from `ready` on, at least up to `end`, with that of the tensor behind it that makes a step; returns how
 * far it went. `state`: how many large pages were slow. */
static uint64_t back(uint64_t ready, uint64_t end, const fp8_segment *segment, uint8_t *state) {
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), last = segment->at + segment->size;
    while (ready < end) {
        const uint8_t slow = __atomic_load_n(state, __ATOMIC_RELAXED);
        const uint64_t block = down(ready, HUGE), first = most(block, down(segment->from, page));
        const uint64_t beyond = least(block + HUGE, up(segment->to, page));
        const int large = slow < SLOW_ONES && segment->to - segment->from >= HUGE;
        const uint64_t stop = least(last, large ? block + HUGE : ready + STEP);
        if (large) advise(first, beyond, MADV_HUGEPAGE); /* of the whole block: others may fill its other parts */
        const uint64_t begin = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
        if (advise(down(ready, page), up(stop, page), MADV_POPULATE_WRITE)) return UINT64_MAX; /* not here, then */
        if (large && beyond - first == HUGE && stop - ready >= HUGE / 2) {
            const int was_slow = nanoseconds(CLOCK_THREAD_CPUTIME_ID) - begin > HUGE / 2; /* 2 GB/s */
            if (was_slow) __atomic_store_n(state, (uint8_t)(slow + 1), __ATOMIC_RELAXED);
        }
        ready = stop;
    }
    return ready;
}
#else
static uint64_t back(uint64_t ready, uint64_t end, const fp8_segment *segment, uint8_t *state) {
    (void)ready, (void)end, (void)segment, (void)state;
    return UINT64_MAX;
}
#endif

/* -- a piece ------------------------------------------------------------------------------------------------------ */

typedef struct {
    size_t count, bytes;
    struct iovec part[BUFFERS];
} piece;

/* The next bytes from `begin` of the first segment on, up to `limit` of them. */
static void gather(const fp8_segment *segments, size_t n, uint64_t begin, uint64_t limit, piece *p) {
    p->count = p->bytes = 0;
    for (size_t i = 0; i < n && p->bytes < limit && p->count < BUFFERS; i++, begin = 0) {
        const uint64_t at = segments[i].at + begin, room = limit - p->bytes;
        uint64_t take = segments[i].size - begin;
        if (take > room) { /* the next piece begins at a page: copies to aligned memory are faster */
            const uint64_t whole = down(at + room, ALIGNED);
            take = whole > at ? whole - at : room;
        }
        p->part[p->count++] = (struct iovec){(void *)(uintptr_t)at, (size_t)take};
        p->bytes += (size_t)take;
        if (begin + take < segments[i].size) return;
    }
}

/* Fill a piece from `offset` on, of which there are `total` bytes. Returns how many there are then; fewer than the piece
 * has: *error says why. */
static size_t fill(int handle, uint64_t offset, const piece *p, size_t total, int *error) {
    size_t first = 0, into = total; /* the next byte goes into part `first`, after `into` bytes */
    while (first < p->count && into >= p->part[first].iov_len) into -= p->part[first++].iov_len;
    while (total < p->bytes) {
        struct iovec left[BUFFERS];
        for (size_t i = first; i < p->count; i++) left[i - first] = p->part[i];
        left[0].iov_base = (uint8_t *)left[0].iov_base + into;
        left[0].iov_len -= into;
        const ssize_t got = preadv(handle, left, (int)(p->count - first), (off_t)(offset + total));
        if (got <= 0) {
            *error = got ? errno : FP8_FILE_ENDS;
            return total;
        }
        total += (size_t)got;
        into += (size_t)got;
        while (first < p->count && into >= p->part[first].iov_len) into -= p->part[first++].iov_len;
    }
    return total;
}

/* -- past the page cache ------------------------------------------------------------------------------------------ */

/* A second descriptor, and memory as aligned as the system wants it, that every byte goes through: a copy in the core's
 * own cache costs a small part of what the page cache costs, and tensors may lie where they like. */
typedef struct {
    int handle; /* -1: not open */
    uint8_t *bounce;
    size_t size;
} direct;

static void end_direct(direct *d) {
    if (d->handle >= 0) close(d->handle);
    free(d->bounce);
    *d = (direct){-1, NULL, 0};
}

static int begin_direct(direct *d, int handle, size_t piece) {
#ifdef O_DIRECT
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", handle); /* the same file, whatever has its name by now */
    d->size = (size_t)up(piece, ALIGNED) + 2 * ALIGNED;
    d->bounce = aligned_alloc(ALIGNED, d->size);
    d->handle = d->bounce ? open(path, O_RDONLY | O_DIRECT | O_CLOEXEC) : -1;
#else
    (void)handle, (void)piece;
#endif
    if (d->handle < 0) end_direct(d);
    return d->handle >= 0;
}

/* As fill; what cannot be had, an error and the end of the file included, is left to it. */
static size_t fill_direct(const direct *d, uint64_t offset, const piece *p, size_t total) {
    size_t first = 0, into = total;
    while (first < p->count && into >= p->part[first].iov_len) into -= p->part[first++].iov_len;
    while (total < p->bytes) {
        const uint64_t at = offset + total, begin = down(at, ALIGNED), end = up(offset + p->bytes, ALIGNED);
        const ssize_t got = pread(d->handle, d->bounce, (size_t)least(end - begin, d->size), (off_t)begin);
        if (got <= (ssize_t)(at - begin)) break;
        const uint8_t *from = d->bounce + (at - begin);
        size_t some = (size_t)least((uint64_t)got - (at - begin), p->bytes - total);
        total += some;
        while (some) {
            const size_t room = (size_t)least(p->part[first].iov_len - into, some);
            memcpy((uint8_t *)p->part[first].iov_base + into, from, room);
            from += room, some -= room, into += room;
            if (into == p->part[first].iov_len) first++, into = 0;
        }
    }
    return total;
}

/* -- what becomes of it ------------------------------------------------------------------------------------------- */

/* Count and translate `n` bytes of a segment, from `begin` on. */
static void settle(const fp8_reader *reader, fp8_segment *s, uint64_t begin, size_t n) {
    uint8_t *const at = (uint8_t *)(uintptr_t)(s->at + begin), *const cell = reader->cells + s->cell;
    const uint8_t *const table = reader->tables + s->table * FP8_CODES;
    fp8_counts counts = {0, 0, 0, 0};
    if (s->how == FP8_KEEP) return;
    const int decided = s->how == FP8_DECIDE && __atomic_load_n(cell, __ATOMIC_RELAXED);
    reader->translate(at, decided ? at : NULL, n, table, &counts);
    if (s->how == FP8_DECIDE && !decided) {
        if (counts.above) {
            fp8_counts again = {0, 0, 0, 0};
            __atomic_store_n(cell, 1, __ATOMIC_RELAXED);
            reader->translate(at, at, n, table, &again);
        } else {
            s->put_off = begin + n; /* all before is, too: a decision is not taken back */
        }
    }
    s->max = most(s->max, counts.max);
    s->above += counts.above;
    s->lossy += counts.lossy;
    s->nan += counts.nan;
}

/* Bytes that are not in the page cache are worth more at once: so many pieces; and more where the file system does not
 * tell, which is mostly one on a network. */
#define UNCACHED 4
#define UNKNOWN 16

typedef enum { TELLS, TELLS_NOT } system_kind;

/* Fill as much of a piece as is in the page cache. A file system that does not tell what is there is asked to read
 * twice as far ahead. */
static size_t fill_cached(int handle, uint64_t offset, const piece *p, system_kind *kind) {
#ifdef RWF_NOWAIT
    const ssize_t got = preadv2(handle, p->part, (int)p->count, (off_t)offset, RWF_NOWAIT);
    if (got >= 0 || errno == EAGAIN) return got > 0 ? (size_t)got : 0;
#else
    (void)handle, (void)offset, (void)p;
#endif
#ifdef POSIX_FADV_SEQUENTIAL
    (void)posix_fadvise(handle, 0, 0, POSIX_FADV_SEQUENTIAL);
#endif
    *kind = TELLS_NOT; /* or it fails: the read that waits will tell how */
    return 0;
}

static uint64_t make_room(const piece *p, const fp8_segment *segments, uint64_t ready, uint8_t *state) {
    for (size_t i = 0; i < p->count && ready != UINT64_MAX; i++) {
        const fp8_segment *s = segments + i;
        const uint64_t at = (uint64_t)(uintptr_t)p->part[i].iov_base;
        if (s->size < WORTH_POPULATING) continue;
        if (ready < at || ready > s->at + s->size) ready = at;
        ready = back(ready, at + p->part[i].iov_len, s, state);
    }
    return ready;
}

uint64_t fp8_read(const fp8_reader *reader, fp8_segment *segments, size_t n, uint64_t done, int *error) {
    const uint64_t stop = nanoseconds(CLOCK_MONOTONIC) + reader->nanoseconds;
    uint64_t begin = done; /* in the first of the segments that are left */
    uint64_t ready = 0;    /* memory is backed up to here; UINT64_MAX: that cannot be had */
    system_kind kind = TELLS;
    direct past = {-1, NULL, 0};
    int try_direct = reader->direct;
    piece p;
    *error = 0;
    while (n && begin >= segments->size) begin -= segments->size, segments++, n--;
    while (n) {
        const uint64_t offset = reader->offset + done;
        size_t got = 0;
        if (kind == TELLS && past.handle < 0) { /* once a piece was not cached, asking might have the others read ahead */
            gather(segments, n, begin, reader->piece, &p);
            ready = make_room(&p, segments, ready, reader->cells);
            got = fill_cached(reader->handle, offset, &p, &kind);
        }
        if (kind == TELLS_NOT || past.handle >= 0 || got < p.bytes) {
            gather(segments, n, begin, reader->piece * (kind == TELLS ? UNCACHED : UNKNOWN), &p);
            ready = make_room(&p, segments, ready, reader->cells);
            if (try_direct && kind == TELLS && past.handle < 0)
                try_direct = begin_direct(&past, reader->handle, reader->piece * UNCACHED);
            if (past.handle >= 0) {
                got = fill_direct(&past, offset, &p, got);
                if (got < p.bytes) end_direct(&past), try_direct = 0;
            }
            got = fill(reader->handle, offset, &p, got, error);
            if (got < p.bytes) {
                done += *error == EINTR ? 0 : got;
                if (*error == EINTR) *error = 0; /* the caller lets Python see to the signal, and calls again */
                break;
            }
        }
        for (size_t i = 0; i < p.count; i++) settle(reader, segments + i, i ? 0 : begin, p.part[i].iov_len);
        done += p.bytes;
        begin += p.bytes;
        while (n && begin >= segments->size) begin -= segments->size, segments++, n--;
        if (nanoseconds(CLOCK_MONOTONIC) >= stop) break;
    }
    end_direct(&past);
    return done;
}

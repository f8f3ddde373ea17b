/* One instruction set's kernel (-DPATH=portable, avx2 or neon) against a loop that shares nothing with it.
 *
 * Prints what failed; exit status 0 if nothing did, 77 where this CPU does not have the instruction set. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "codes.h"

#define JOIN(a, b) a##b
#define NAMED(a, b) JOIN(a, b)
#define TRANSLATE NAMED(fp8_translate_, PATH)

enum { EDGE = 32 };

static uint64_t state = 88172645463325252ull;

static uint8_t random_byte(void) { /* xorshift64 */
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint8_t)(state >> 32);
}

/* One byte at a time, by branches. */
static void reference(const uint8_t *src, uint8_t *dst, size_t n, const uint8_t *table, fp8_counts *counts) {
    for (size_t i = 0; i < n; i++) {
        unsigned code = src[i] % 128, entry = table[code];
        if (code > counts->max) counts->max = (uint8_t)code;
        if (code == 127) counts->nan++;
        else if (code >= 120) counts->above++;
        if (entry >= 128) counts->lossy++;
        dst[i] = (uint8_t)((src[i] >= 128 ? 128 : 0) + entry % 128);
    }
}

static int same(const fp8_counts *a, const fp8_counts *b) {
    return a->max == b->max && a->above == b->above && a->lossy == b->lossy && a->nan == b->nan;
}

static int check(const uint8_t *given, size_t n, size_t shift, const uint8_t *table, const char *what) {
    uint8_t *src = malloc(n + 2 * EDGE), *dst = malloc(n + 2 * EDGE), *expected = malloc(n + 1);
    fp8_counts wanted = {1, 2, 3, 0x05}, counts = wanted, counted = wanted, inplace = wanted;
    int bad = 0;
    memset(dst, 0xa5, n + 2 * EDGE);
    memcpy(src + shift, given, n);
    reference(given, expected, n, table, &wanted);
    TRANSLATE(src + shift, NULL, n, table, &counted);
    TRANSLATE(src + shift, dst + EDGE - shift, n, table, &counts);
    bad |= memcmp(src + shift, given, n) != 0; /* the source is read only */
    bad |= memcmp(dst + EDGE - shift, expected, n) != 0;
    for (size_t i = 0; i < EDGE - shift; i++) bad |= dst[i] != 0xa5;
    for (size_t i = EDGE - shift + n; i < n + 2 * EDGE; i++) bad |= dst[i] != 0xa5;
    TRANSLATE(src + shift, src + shift, n, table, &inplace);
    bad |= memcmp(src + shift, expected, n) != 0;
    bad |= !same(&counts, &wanted) || !same(&counted, &wanted) || !same(&inplace, &wanted);
    if (bad) printf("%s: wrong at length %zu, shift %zu\n", what, n, shift);
    free(src);
    free(dst);
    free(expected);
    return bad;
}

int main(void) {
    static uint8_t half[128], any[128], given[3 * 255 * 32 + 64];
    size_t checks = 0;
#ifdef FP8_HAVE_AVX2
    if (TRANSLATE == fp8_translate_avx2 && !__builtin_cpu_supports("avx2")) return 77;
#endif
    int bad = 0;
    for (int m = 0; m < 128; m++) {
        int down = m / 2, odd = m % 2;
        half[m] = (uint8_t)(m == 127 ? 127 : m >= 16 ? m - 8 : (down + (odd && down % 2)) + 128 * odd);
        any[m] = random_byte();
    }
    for (size_t i = 0; i < sizeof given; i++) given[i] = random_byte();
    for (int which = 0; which < 2; which++) {
        const uint8_t *table = which ? any : half;
        const char *name = which ? "any table" : "half";
        for (size_t n = 0; n <= 100; n++)
            for (size_t shift = 0; shift <= EDGE; shift += 4, checks++) bad |= check(given, n, shift, table, name);
        for (size_t n = 255 * 32 - 33; n <= 255 * 32 + 33; n++, checks++) bad |= check(given, n, n % 32, table, name);
        for (size_t n = 2 * 255 * 32 - 1; n <= 2 * 255 * 32 + 1; n++, checks++) bad |= check(given, n, 3, table, name);
        static uint8_t every[3 * 255 * 32];
        for (int byte = 0; byte < 256; byte++, checks++) { /* every lane counts at every step */
            memset(every, byte, sizeof every);
            bad |= check(every, sizeof every, 0, table, name);
        }
    }
    printf("%zu checks\n", checks);
    return bad || checks < 1000;
}

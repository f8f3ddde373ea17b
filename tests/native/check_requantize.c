/* A path's requantizer against the plain one, bit for bit. Compiled with -DPATH=portable, avx2 or neon.
 * Prints what failed; exit status 0 if nothing did, 77 where this CPU does not have the instruction set. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "requantize.h"

#define JOIN(a, b) a##b
#define NAMED(a, b) JOIN(a, b)
#define REQUANTIZER NAMED(fp8_requantizer_, PATH)

static uint64_t state = 88172645463325252ull;

static uint32_t draw(void) { /* xorshift64 */
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 32);
}

static int failed(const char *what, size_t n) {
    printf("%s: wrong at length %zu\n", what, n);
    return 1;
}

static int check_parts(const uint8_t *src, size_t n, const uint8_t *table) {
    const fp8_requantizer *path = &REQUANTIZER, *plain = &fp8_requantizer_portable;
    const float ratio[FP8_CANDIDATES] = {(float)(draw() % 1000 + 1) / 2000, (float)(draw() % 1000 + 1) / 2000};
    double sums[1 + FP8_CANDIDATES] = {1, 2, 3}, expected[1 + FP8_CANDIDATES] = {1, 2, 3};
    uint8_t *got = malloc(n + 1), *wanted = malloc(n + 1);
    int bad = path->max(src, n) != plain->max(src, n) ? failed("max", n) : 0;
    path->measure(src, n, ratio, sums);
    plain->measure(src, n, ratio, expected);
    if (memcmp(sums, expected, sizeof sums)) bad |= failed("measure", n);
    path->look_up(src, got, n, table);
    plain->look_up(src, wanted, n, table);
    if (memcmp(got, wanted, n)) bad |= failed("look_up", n);
    free(got);
    free(wanted);
    return bad;
}

/* `small`: codes of a part of the range only, so that there are runs all of which is a step away. */
static int check_whole(size_t rows, size_t columns, size_t height, size_t width, int small) {
    const fp8_grid grid = {rows, columns, height, width};
    const size_t across = (columns + width - 1) / width, down = (rows + height - 1) / height, n = rows * columns;
    uint8_t *src = malloc(n), *dst[2];
    double *scales = malloc(across * down * sizeof *scales);
    float *row_scales[2], errors[FP8_ERRORS];
    fp8_error error[2] = {{0, 0}, {0, 0}};
    int bad = 0;
    for (size_t i = 0; i < n; i++) src[i] = (uint8_t)(small ? (draw() & 0x80) + 40 + draw() % 80 : draw());
    for (size_t i = 0; small && i < n / 99; i++) src[draw() % n] = (uint8_t)(draw() & 0x8f);
    for (size_t i = 0; i < across * down; i++) scales[i] = 1e-4 * (double)(small ? 99 + draw() % 99 : 1 + draw() % 1000);
    for (size_t i = 0; i < FP8_ERRORS; i++) errors[i] = (float)(draw() % 1000); /* so any mantissa may be the best */
    for (int k = 0; k < 2; k++) {
        const fp8_requantizer *path = k ? &REQUANTIZER : &fp8_requantizer_portable;
        dst[k] = malloc(n), row_scales[k] = malloc(rows * sizeof **row_scales);
        bad |= fp8_requantize(path, src, dst[k], &grid, scales, errors, row_scales[k], &error[k]);
    }
    bad |= fp8_requantize(&REQUANTIZER, src, src, &grid, scales, errors, row_scales[1], &error[1]); /* in place */
    error[1].signal /= 2, error[1].noise /= 2;
    bad |= memcmp(dst[0], dst[1], n) || memcmp(dst[0], src, n) ||
           memcmp(row_scales[0], row_scales[1], rows * sizeof(float)) ||
           fabs(error[0].signal - error[1].signal) > 1e-3 * error[0].signal ||
           fabs(error[0].noise - error[1].noise) > 1e-3 * error[0].noise + 1e-6 * error[0].signal;
    if (bad) failed("requantize", columns);
    for (int k = 0; k < 2; k++) free(dst[k]), free(row_scales[k]);
    free(src), free(scales);
    return bad;
}

int main(void) {
    static uint8_t given[FP8_RUN], table[FP8_CODES];
    size_t checks = 0;
    int bad = 0;
#ifdef FP8_HAVE_AVX2
    const fp8_requantizer *path = &REQUANTIZER;
    if (path == &fp8_requantizer_avx2 && !__builtin_cpu_supports("avx2")) return 77;
#endif
    for (size_t i = 0; i < sizeof given; i++) given[i] = (uint8_t)draw();
    for (size_t i = 0; i < sizeof table; i++) table[i] = draw() % FP8_CODES;
    for (size_t n = 1; n <= 300; n++, checks++) bad |= check_parts(given + n % 7, n, table);
    bad |= check_parts(given, FP8_RUN, table);
    for (int small = 0; small < 2; small++) {
        for (size_t columns = 1; columns < 700; columns += 37, checks++) bad |= check_whole(9, columns, 4, 64, small);
        for (size_t width = 16; width <= 9000; width += width / 2, checks++) bad |= check_whole(5, 9100, 2, width, small);
        bad |= check_whole(130, 1000, 128, 128, small);
    }
    printf("%zu checks\n", checks);
    return bad;
}

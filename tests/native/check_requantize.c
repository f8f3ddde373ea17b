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

static int check_whole(size_t rows, size_t columns, size_t height, size_t width) {
    const fp8_grid grid = {rows, columns, height, width};
    const size_t across = (columns + width - 1) / width, down = (rows + height - 1) / height, n = rows * columns;
    uint8_t *src = malloc(n), *dst[2], *runs[2], *blocks[2];
    double *scales = malloc(across * down * sizeof *scales), *mantissas = malloc(down * sizeof *mantissas);
    float *row_scales[2];
    fp8_error error[2] = {{0, 0}, {0, 0}};
    int bad = 0;
    for (size_t i = 0; i < n; i++) src[i] = (uint8_t)draw();
    for (size_t i = 0; i < across * down; i++) scales[i] = 1e-4 * (1 + draw() % 1000);
    for (size_t i = 0; i < down; i++) mantissas[i] = 1 + (draw() % 1000) / 1001.0;
    for (int k = 0; k < 2; k++) {
        const fp8_requantizer *path = k ? &REQUANTIZER : &fp8_requantizer_portable;
        dst[k] = malloc(n), runs[k] = malloc(rows * across), blocks[k] = malloc(down * across);
        row_scales[k] = malloc(rows * sizeof **row_scales);
        fp8_run_max(path, src, &grid, runs[k], blocks[k]);
        bad |= fp8_requantize(path, src, dst[k], &grid, scales, mantissas, runs[k], row_scales[k], &error[k]);
    }
    bad |= memcmp(dst[0], dst[1], n) || memcmp(runs[0], runs[1], rows * across) ||
           memcmp(blocks[0], blocks[1], down * across) || memcmp(row_scales[0], row_scales[1], rows * sizeof(float)) ||
           fabs(error[0].signal - error[1].signal) > 1e-3 * error[0].signal ||
           fabs(error[0].noise - error[1].noise) > 1e-3 * error[0].noise;
    if (bad) failed("requantize", columns);
    for (int k = 0; k < 2; k++) free(dst[k]), free(runs[k]), free(blocks[k]), free(row_scales[k]);
    free(src), free(scales), free(mantissas);
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
    for (size_t columns = 1; columns < 700; columns += 37, checks++) bad |= check_whole(9, columns, 4, 64);
    bad |= check_whole(130, 1000, 128, 128);
    printf("%zu checks\n", checks);
    return bad;
}

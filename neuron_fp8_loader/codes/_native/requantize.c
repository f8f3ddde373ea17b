#include "requantize.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define NEURON_MAX 240.0

typedef struct {
    double value[FP8_NAN]; /* of each magnitude code */
} number_line;

static void draw(number_line *line) {
    for (int code = 0; code < FP8_NAN; code++) {
        const int exponent = code >> 3, mantissa = code & 7;
        line->value[code] = exponent ? ldexp(8 + mantissa, exponent - 10) : ldexp(mantissa, -9);
    }
}

/* -- the scale of a row ------------------------------------------------------------------------------------------- */

/* The smallest mantissa x 2^exponent that takes `largest` to 240 or less. */
static float fitting(double mantissa, double largest) {
    int exponent;
    frexp(largest / (NEURON_MAX * mantissa), &exponent);
    if (largest <= NEURON_MAX * ldexp(mantissa, exponent - 1)) exponent--; /* exactly a power of two */
    return (float)ldexp(mantissa, exponent < -126 ? -126 : exponent);
}

int fp8_best(const double noise[FP8_CANDIDATES], const int exact[FP8_CANDIDATES], double signal) {
    /* Measured in single precision, each value x ratio is off by 2^-23 of itself at most, so (by the triangle
     * inequality) the root of the true error is off by 2^-23 of the root of the signal; the sums by 2^-13. */
    const double slack = 0x1p-22 * sqrt(signal);
    const double least = sqrt(noise[0]) * (1 - 0x1p-12) - (exact[0] ? 0 : slack);
    const double most = sqrt(noise[1]) * (1 + 0x1p-12) + (exact[1] ? 0 : slack);
    return most <= (least > 0 ? least : 0);
}

int fp8_best_estimate(const fp8_weighed *found) {
    /* what a measurement is off by at most, as above, and more than enough for what estimating rounds */
    const double slack = 0x1p-21 * sqrt(found->signal), less = 1 - 0x1p-12, more = 1 + 0x1p-12;
    double low[FP8_CANDIDATES], high[FP8_CANDIDATES];
    for (int k = 0; k < FP8_CANDIDATES; k++) {
        const double sure = found->noise[k] - found->doubt[k];
        const double least = sqrt(sure > 0 ? sure : 0) * less - slack;
        const double most = sqrt(found->noise[k] + found->doubt[k]) * more + slack;
        low[k] = least > 0 ? least * least : 0;
        high[k] = most * most;
    }
    const double for_first[FP8_CANDIDATES] = {high[0], low[1]}, for_second[FP8_CANDIDATES] = {low[0], high[1]};
    if (fp8_best(for_second, found->exact, found->signal) == 1) return 1;
    return fp8_best(for_first, found->exact, found->signal) == 0 ? 0 : -1;
}

static void measure_row(const fp8_requantizer *path, const uint8_t *src, const fp8_grid *grid, const double *scales,
                        const uint8_t *runs, const float candidate[FP8_CANDIDATES], fp8_weighed *found) {
    const size_t across = grid->columns / grid->width + (grid->columns % grid->width != 0);
    double part[1 + FP8_CANDIDATES] = {0};
    *found = (fp8_weighed){0, {0, 0}, {0, 0}, {1, 1}};
    for (size_t block = 0; block < across; block++) {
        if (!runs[block]) continue;
        const size_t left = block * grid->width;
        const size_t right = grid->columns - left < grid->width ? grid->columns : left + grid->width;
        float ratio[FP8_CANDIDATES];
        for (int k = 0; k < FP8_CANDIDATES; k++) ratio[k] = fp8_ratio(scales[block], candidate[k], &found->exact[k]);
        part[0] = 0;
        for (size_t i = left; i < right; i += FP8_RUN)
            path->measure(src + i, right - i < FP8_RUN ? right - i : FP8_RUN, ratio, part);
        found->signal += part[0] * scales[block] * scales[block];
    }
    for (int k = 0; k < FP8_CANDIDATES; k++)
        found->noise[k] = part[1 + k] * (double)candidate[k] * (double)candidate[k];
}

/* One row: its scale; adds to the error. */
static float choose(const fp8_requantizer *path, const uint8_t *src, const fp8_grid *grid, const double *scales,
                    const uint8_t *runs, double mantissa, const number_line *line, fp8_squares *known,
                    fp8_error *error) {
    const size_t across = grid->columns / grid->width + (grid->columns % grid->width != 0);
    double largest = 0, any = 0;
    for (size_t block = 0; block < across; block++) {
        const double value = line->value[runs[block]] * scales[block];
        largest = value > largest ? value : largest;
        any = scales[block] > any ? scales[block] : any;
    }
    if (!(largest > 0)) return (float)any > 0 ? (float)any : 1;
    float candidate[FP8_CANDIDATES];
    candidate[1] = fitting(mantissa, largest);
    const float public_one = (float)(largest / NEURON_MAX);
    candidate[0] = public_one >= FLT_MIN ? public_one : candidate[1];
    int best = -1;
    fp8_weighed found;
    if (path->estimate) {
        path->estimate(src, grid->columns, grid->width, scales, runs, candidate, known, &found);
        best = fp8_best_estimate(&found);
    }
    if (best < 0) {
        measure_row(path, src, grid, scales, runs, candidate, &found);
        best = fp8_best(found.noise, found.exact, found.signal);
    }
    error->signal += found.signal;
    error->noise += found.noise[best];
    return candidate[best];
}

/* -- the codes under it ------------------------------------------------------------------------------------------- */

/* One pair of scales and its table. */
typedef struct {
    double before;
    float after;
    uint8_t table[FP8_CODES];
} pair;

#define WAYS ((size_t)16)
#define ENTRIES (FP8_KNOWN * WAYS)

static double power_of_two(int exponent) {
    const uint64_t bits = (uint64_t)(exponent + 1023) << 52;
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static double rounded(double x) { return (x + 0x1p52) - 0x1p52; } /* of 0 to 16 */

static void begin(pair *p, const number_line *line, double before, float after) {
    const double ratio = before / (double)after;
    int normal = 0; /* were the results of the last eight codes normal numbers, and no less than twice the smallest? */
    for (int first = 0; first < FP8_CODES; first += 8) {
        int least = FP8_NAN;
        for (int i = 0; i < 8; i++) {
            const int code = first + i;
            int nearest;
            if (normal) { /* twice the value */
                nearest = p->table[code - 8] + 8;
            } else if (code == FP8_NAN) {
                nearest = FP8_LARGEST_FIT;
            } else { /* adding a number whose last bit is that of the result rounds: to nearest, ties to even */
                const double value = line->value[code] * ratio, large = value > 0x1p-6 ? value : 0x1p-6;
                uint64_t bits;
                memcpy(&bits, &large, sizeof bits);
                const int exponent = (int)(bits >> 52) - 1023;
                nearest = exponent > 7 ? FP8_LARGEST_FIT
                                       : (exponent + 6) * 8 + (int)rounded(value * power_of_two(3 - exponent));
            }
            nearest = nearest < FP8_LARGEST_FIT ? nearest : FP8_LARGEST_FIT;
            least = nearest < least ? nearest : least;
            p->table[code] = (uint8_t)nearest;
        }
        normal = first && least > 8;
    }
    p->table[FP8_NAN] = FP8_NAN;
    p->before = before;
    p->after = after;
}

/* Entries of one block; within them the exponents tell the pairs apart: the row scales of a block row
 * mostly differ in nothing else. */
static size_t slot(size_t block, double before, float after) {
    uint64_t a;
    uint32_t b;
    memcpy(&a, &before, sizeof a);
    memcpy(&b, &after, sizeof b);
    return block % FP8_KNOWN * WAYS + (5 * (a >> 52) + (b >> 23)) % WAYS;
}

/* One run of codes, not all zeros and NaN, under new scales. */
static void rewrite(const fp8_requantizer *path, const uint8_t *src, uint8_t *dst, size_t n, pair *p,
                    fp8_steps *steps, const number_line *line, double before, float after) {
    const int some = path->steps && path->steps(before / (double)after, steps);
    size_t done = 0;
    for (;;) {
        if (some) done += path->step(src + done, dst + done, n - done, steps);
        if (done == n) return;
        if (p->before != before || p->after != after) begin(p, line, before, after);
        const size_t part = some && n - done > FP8_GROUP ? FP8_GROUP : n - done;
        path->look_up(src + done, dst + done, part, p->table);
        done += part;
    }
}

int fp8_requantize(const fp8_requantizer *path, const uint8_t *src, uint8_t *dst, const fp8_grid *grid,
                   const double *scales, const double *mantissas, const uint8_t *runs, float *row_scales,
                   fp8_error *error) {
    const size_t rows = grid->rows, columns = grid->columns, width = grid->width;
    const size_t across = columns / width + (columns % width != 0);
    number_line line;
    fp8_squares known[FP8_KNOWN] = {0};
    fp8_steps steps[FP8_KNOWN] = {0};
    pair *cache = calloc(ENTRIES, sizeof *cache); /* no row scale is 0, so an empty entry matches nothing */
    if (!cache) return -1;
    draw(&line);
    for (size_t row = 0; row < rows; row++, src += columns, dst += columns, runs += across) {
        if (row && row % grid->height == 0) scales += across, mantissas++;
        /* at once, while the row is in the first cache */
        const float after = choose(path, src, grid, scales, runs, *mantissas, &line, known, error);
        row_scales[row] = after;
        for (size_t block = 0; block < across; block++) {
            const size_t left = block * width, n = columns - left < width ? columns - left : width;
            if (runs[block]) {
                pair *p = cache + slot(block, scales[block], after);
                rewrite(path, src + left, dst + left, n, p, steps + block % FP8_KNOWN, &line, scales[block], after);
            } else if (dst != src) { /* zeros and NaN stay what they are */
                memcpy(dst + left, src + left, n);
            }
        }
    }
    free(cache);
    return 0;
}

void fp8_run_max(const fp8_requantizer *path, const uint8_t *src, const fp8_grid *grid, uint8_t *runs,
                 uint8_t *blocks) {
    const size_t across = grid->columns / grid->width + (grid->columns % grid->width != 0);
    for (size_t row = 0; row < grid->rows; row++, src += grid->columns, runs += across) {
        const int first = row % grid->height == 0;
        if (first && row) blocks += across;
        for (size_t block = 0; block < across; block++) {
            const size_t left = block * grid->width;
            const size_t n = grid->columns - left < grid->width ? grid->columns - left : grid->width;
            runs[block] = path->max(src + left, n);
            if (first || runs[block] > blocks[block]) blocks[block] = runs[block];
        }
    }
}

/* -- plain C ------------------------------------------------------------------------------------------------------ */

static uint8_t max_portable(const uint8_t *src, size_t n) {
    uint8_t max = 0;
    for (size_t i = 0; i < n; i++) {
        /* + 1 makes NaN 0x80, whose low bits are 0: no branch, so that this becomes vector code */
        const uint8_t code = (uint8_t)(((src[i] & FP8_MAGNITUDE) + 1) & FP8_MAGNITUDE);
        max = code > max ? code : max;
    }
    return max ? (uint8_t)(max - 1) : 0;
}

static float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* x minus the nearest of the format's numbers, exactly. */
static float rounding(float x) {
    /* the last bit of 2^20 times x's power of two, or of 2^-6, is the last bit of the nearest code */
    const float large = as_float((bits_of(x > 0x1p-6f ? x : 0x1p-6f) & 0x7f800000) + ((uint32_t)20 << 23));
    return x - ((x + large) - large);
}

static void measure_portable(const uint8_t *src, size_t n, const float ratio[FP8_CANDIDATES],
                             double sums[1 + FP8_CANDIDATES]) {
    float lanes[1 + FP8_CANDIDATES][FP8_LANES] = {{0}};
    for (size_t i = 0; i < n; i++) {
        const uint8_t code = src[i] & FP8_MAGNITUDE;
        /* the difference of the exponents' biases; subnormals come out right, too */
        const float value = code == FP8_NAN ? 0 : as_float((uint32_t)code << 20) * 0x1p120f;
        lanes[0][i % FP8_LANES] += value * value;
        for (int k = 0; k < FP8_CANDIDATES; k++) {
            const float change = rounding(value * ratio[k]);
            lanes[1 + k][i % FP8_LANES] += change * change;
        }
    }
    for (int k = 0; k < 1 + FP8_CANDIDATES; k++)
        for (int lane = 0; lane < FP8_LANES; lane++) sums[k] += (double)lanes[k][lane];
}

static void look_up_portable(const uint8_t *src, uint8_t *dst, size_t n, const uint8_t table[FP8_CODES]) {
    for (size_t i = 0; i < n; i++) dst[i] = (uint8_t)((src[i] & FP8_SIGN) | table[src[i] & FP8_MAGNITUDE]);
}

const fp8_requantizer fp8_requantizer_portable = {max_portable, measure_portable, NULL, look_up_portable, NULL, NULL};

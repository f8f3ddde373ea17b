#include "requantize.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define NEURON_MAX 240.0

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
    const double slack = 0x1p-20 * sqrt(found->signal), less = 1 - 0x1p-12, more = 1 + 0x1p-12;
    double low[FP8_CANDIDATES], high[FP8_CANDIDATES];
    for (int k = 0; k < FP8_CANDIDATES; k++) {
        const double sure = found->noise[k] - found->doubt[k];
        const double least = sqrt(sure > 0 ? sure : 0) * less - slack;
        const double most = sqrt(found->noise[k] + found->doubt[k]) * more + slack;
        low[k] = least > 0 ? least * least : 0;
        high[k] = most * most;
    }
    const double for_first[FP8_CANDIDATES] = {high[0], low[1]}, for_second[FP8_CANDIDATES] = {low[0], high[1]};
    const int inexact[FP8_CANDIDATES] = {0, 0}, exact[FP8_CANDIDATES] = {1, 1}; /* whichever makes it harder */
    if (fp8_best(for_second, inexact, found->signal) == 1) return 1;
    return fp8_best(for_first, exact, found->signal) == 0 ? 0 : -1;
}

static void measure_row(const fp8_requantizer *path, const uint8_t *src, const fp8_band *band,
                        const float candidate[FP8_CANDIDATES], fp8_weighed *found) {
    double part[1 + FP8_CANDIDATES] = {0};
    *found = (fp8_weighed){0, {0, 0}, {0, 0}, {1, 1}};
    for (size_t block = 0; block < band->across; block++, src += band->width) {
        const size_t n = fp8_length(band, block);
        float ratio[FP8_CANDIDATES];
        if (!band->top[block]) continue;
        for (int k = 0; k < FP8_CANDIDATES; k++)
            ratio[k] = fp8_ratio(band->scales[block], candidate[k], &found->exact[k]);
        part[0] = 0;
        for (size_t i = 0; i < n; i += FP8_RUN)
            path->measure(src + i, n - i < FP8_RUN ? n - i : FP8_RUN, ratio, part);
        found->signal += part[0] * band->scales[block] * band->scales[block];
    }
    for (int k = 0; k < FP8_CANDIDATES; k++)
        found->noise[k] = part[1 + k] * (double)candidate[k] * (double)candidate[k];
}

/* One row whose largest value is more than 0: its scale; adds to the error. */
static float choose(const fp8_requantizer *path, const uint8_t *src, const fp8_band *band, double largest,
                    fp8_error *error, int *second) {
    float candidate[FP8_CANDIDATES];
    candidate[1] = fitting(band->mantissa, largest);
    const float public_one = (float)(largest / NEURON_MAX);
    candidate[0] = public_one >= FLT_MIN ? public_one : candidate[1];
    int best = -1;
    fp8_weighed found;
    if (band->known.there) {
        path->estimate(src, band, candidate, &found);
        best = candidate[0] == candidate[1] ? 1 : fp8_best_estimate(&found);
    }
    if (best < 0) {
        measure_row(path, src, band, candidate, &found);
        best = fp8_best(found.noise, found.exact, found.signal);
    }
    error->signal += found.signal;
    error->noise += found.noise[best];
    *second = best == 1;
    return candidate[best];
}

/* -- the codes under it ------------------------------------------------------------------------------------------- */

/* One pair of scales and its table. */
typedef struct {
    double before;
    float after;
    uint8_t table[FP8_CODES];
} pair;

#define BLOCKS ((size_t)64) /* of which tables are kept */
#define WAYS ((size_t)16)

static void begin(pair *p, double before, float after) {
    const double ratio = before / (double)after;
    int normal = 0; /* were the results of the last eight codes normal numbers, and no less than twice the smallest? */
    for (int first = 0; first < FP8_CODES; first += 8) {
        int least = FP8_NAN;
        for (int i = 0; i < 8; i++) {
            const int code = first + i;
            int nearest;
            if (normal) { /* twice the value */
                nearest = p->table[code - 8] + 8;
            } else {
                nearest = code == FP8_NAN ? FP8_LARGEST_FIT : fp8_nearest((uint8_t)code, ratio);
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
    return block % BLOCKS * WAYS + (5 * (a >> 52) + (b >> 23)) % WAYS;
}

/* One row under its new scale. Zeros and NaN stay what they are. */
static void rewrite(const fp8_requantizer *path, const uint8_t *src, uint8_t *dst, const fp8_band *band, pair *tables,
                    float after, int second) {
    memcpy(band->left, band->top, band->across);
    if (dst != src && memchr(band->top, 0, band->across)) memcpy(dst, src, band->columns);
    if (band->known.there) path->step(src, dst, band, after, second);
    for (size_t block = 0; block < band->across; block++) {
        if (!band->left[block]) continue;
        const double before = band->scales[block];
        pair *p = tables + slot(block, before, after);
        if (p->before != before || p->after != after) begin(p, before, after);
        path->look_up(src + block * band->width, dst + block * band->width, fp8_length(band, block), p->table);
    }
}

/* -- block row by block row --------------------------------------------------------------------------------------- */

/* The mantissa for rows whose blocks are not all 0; those count for nothing. `filled`: `across` numbers to work with. */
static double common_mantissa(const fp8_requantizer *path, const uint8_t *src, size_t rows, const fp8_band *band,
                              const float errors[FP8_ERRORS], double *filled) {
    size_t empty = band->across;
    double mantissa;
    for (size_t block = 0; block < band->across; block++) filled[block] = 0;
    for (size_t row = 0; row < rows && empty; row++, src += band->columns) /* mostly the first tells of all */
        for (size_t block = 0; block < band->across; block++) {
            if (filled[block] > 0 || !band->scales[block]) continue;
            if (!path->max(src + block * band->width, fp8_length(band, block))) continue;
            filled[block] = band->scales[block];
            empty--;
        }
    fp8_best_mantissas(filled, 1, band->across, errors, &mantissa);
    return mantissa;
}

#define MOST_KNOWN ((size_t)1 << 16) /* blocks; more of them are narrow, and not worth it */

typedef struct {
    double *scales; /* those of the blocks, and zeros that vector code may read; then as many for common_mantissa */
    pair *tables; /* no row scale is 0, so an empty entry matches nothing */
    uint8_t *codes;
    uint64_t *words;
} scratch;

static void give_back(scratch *s) { free(s->scales), free(s->tables), free(s->codes), free(s->words); }

/* Memory for a band of as many blocks; 0 if there is none. */
static int get(const fp8_requantizer *path, fp8_band *band, scratch *s) {
    const size_t n = band->across + 8;
    const int known = path->know && n <= MOST_KNOWN;
    s->scales = calloc(n, 2 * sizeof *s->scales);
    s->tables = calloc(BLOCKS * WAYS, sizeof *s->tables);
    s->codes = calloc(n, 3);
    s->words = known ? calloc(n, 3 * sizeof(uint64_t) + 4 * sizeof(float)) : NULL;
    if (!s->scales || !s->tables || !s->codes || (known && !s->words)) return 0;
    band->top = s->codes, band->least = s->codes + n, band->left = s->codes + 2 * n;
    if (known) {
        fp8_known *k = &band->known;
        k->squares = s->words, k->add = s->words + 2 * n;
        k->scale = (float *)(s->words + 3 * n), k->ratio = k->scale + n, k->worth = k->scale + 2 * n;
        k->exponent = (int32_t *)(k->scale + 3 * n);
    }
    return 1;
}

int fp8_requantize(const fp8_requantizer *path, const uint8_t *src, uint8_t *dst, const fp8_grid *grid,
                   const double *scales, const float errors[FP8_ERRORS], float *row_scales, fp8_error *error) {
    const size_t across = grid->columns / grid->width + (grid->columns % grid->width != 0);
    fp8_band band = {.columns = grid->columns, .width = grid->width, .across = across};
    scratch memory;
    if (!get(path, &band, &memory)) return give_back(&memory), -1;
    band.scales = memory.scales;
    for (size_t first = 0; first < grid->rows; first += grid->height, scales += across) {
        const size_t rows = grid->rows - first < grid->height ? grid->rows - first : grid->height;
        double any = 0;
        memcpy(memory.scales, scales, across * sizeof *scales);
        band.mantissa = common_mantissa(path, src, rows, &band, errors, memory.scales + across + 8);
        for (size_t block = 0; block < across; block++) any = scales[block] > any ? scales[block] : any;
        if (memory.words) path->know(&band);
        for (size_t row = 0; row < rows; row++, src += band.columns, dst += band.columns) {
            const double largest = path->scan(src, &band);
            int second = 0;
            if (largest > 0)
                *row_scales = choose(path, src, &band, largest, error, &second);
            else
                *row_scales = (float)any > 0 ? (float)any : 1;
            rewrite(path, src, dst, &band, memory.tables, *row_scales++, second);
        }
    }
    give_back(&memory);
    return 0;
}

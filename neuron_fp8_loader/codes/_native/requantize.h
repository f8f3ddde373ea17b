/* Moving a matrix of FP8 codes from one scale a block to one scale a row.
 *
 * Each row tries two scales and keeps the one with the least squared error, measured on the row itself:
 *   0  row amax / 240, what the public preprocess scripts take; the other is kept only if it is no worse for certain
 *   1  the mantissa that suits its block row best, with the smallest exponent that keeps the row within +-240
 * Then the codes are rewritten: a code times block scale over row scale has 127 possible results for a given pair of
 * scales, which are in a table, and most of which are a step away that depends on the code's mantissa alone.
 *
 * A run is what a row has of one block. All of a row is done while it is in the first cache.
 */
#ifndef NEURON_FP8_REQUANTIZE_H
#define NEURON_FP8_REQUANTIZE_H

#include <string.h>

#include "format.h"

#define FP8_CANDIDATES 2
#define FP8_LANES 8 /* single precision sums: one for every 8th code, the same on every path */

typedef struct {
    size_t rows, columns, height, width; /* the last two of a block */
} fp8_grid;

/* What vector code works out once for each block of a block row; arrays of `across` and up to 7 more, which are 0. */
typedef struct {
    int there;         /* it was worked out */
    double times;      /* a power of two, about one over the largest scale: what follows is within single precision */
    float *scale;      /* x times */
    float *ratio;      /* scale over the mantissa of the second candidate, so all but the power of two of a ratio */
    float *worth;      /* the ratio's power of two, times the largest change that its mantissa makes */
    int32_t *exponent; /* of the ratio */
    uint64_t *squares; /* of the changes of the eight mantissas under it: low bytes of whole numbers, then the high */
    uint64_t *add;     /* the steps of the eight mantissas under it, less those of the exponent */
} fp8_known;

/* A block row, and what is known of the row at hand. */
typedef struct {
    size_t columns, width, across;
    const double *scales; /* of the blocks; then zeros, 7 at least */
    double mantissa;      /* of the second candidate: from 1 up to 2, exact in single precision */
    uint8_t *top;         /* of each run the largest finite code; then zeros, 7 at least */
    uint8_t *least;       /* and the smallest but 0. Or 0: it was not looked for, or there are NaN */
    uint8_t *left;        /* not 0: the run is still to be rewritten */
    fp8_known known;
} fp8_band;

/* Largest finite magnitude code of n codes. */
typedef uint8_t (*fp8_max_fn)(const uint8_t *src, size_t n);

/* Sets top and least of a row. Returns the largest value: a top's times its block scale. */
typedef double (*fp8_scan_fn)(const uint8_t *src, const fp8_band *band);

/* Adds to sums[0] the squares of the values, and to sums[1 + k] those of the changes that rounding (value x ratio[k])
 * to a code makes, in units of the new scale; NaN codes count for nothing. No product may be above 240 by more than
 * the rounding of a float. n is at most FP8_RUN. */
typedef void (*fp8_measure_fn)(const uint8_t *src, size_t n, const float ratio[FP8_CANDIDATES],
                               double sums[1 + FP8_CANDIDATES]);

/* A row under both candidates. */
typedef struct {
    double signal, noise[FP8_CANDIDATES]; /* sums of squares, in the values' own units */
    double doubt[FP8_CANDIDATES];         /* by how much the noise may be more or less; 0 where it was measured */
    int exact[FP8_CANDIDATES];            /* all ratios are powers of two, so that measuring rounds nothing */
} fp8_weighed;

/* Works out `known` for the scales and the mantissa of a band, or leaves it. NULL: never. */
typedef void (*fp8_know_fn)(fp8_band *band);

/* What measuring the runs of a row gives, within the doubt, without looking at how each code is rounded. Called where
 * `known` is there. Says of nothing that it is exact. */
typedef void (*fp8_estimate_fn)(const uint8_t *src, const fp8_band *band, const float candidate[FP8_CANDIDATES],
                                fp8_weighed *found);

/* dst[i] = sign of src[i] | table[magnitude of src[i]]; dst may be src. */
typedef void (*fp8_look_up_fn)(const uint8_t *src, uint8_t *dst, size_t n, const uint8_t table[FP8_CODES]);

/* Rewrites those of the runs that are left most of whose codes are a step away; they are not left then. `second`: the
 * scale is the second candidate. Called where `known` is there; dst may be src. */
typedef void (*fp8_step_fn)(const uint8_t *src, uint8_t *dst, const fp8_band *band, float after, int second);

#define FP8_RUN ((size_t)4096) /* codes whose squares are added in single precision */

typedef struct {
    fp8_max_fn max;
    fp8_scan_fn scan;
    fp8_measure_fn measure;
    fp8_look_up_fn look_up;
    fp8_know_fn know; /* and what comes after it: all NULL, or none */
    fp8_estimate_fn estimate;
    fp8_step_fn step;
} fp8_requantizer;

/* A block's scale over a candidate. Below 2^-40 every code becomes 0, and what is lost is far below any doubt. */
FP8_INLINE float fp8_ratio(double scale, float candidate, int *exact) {
    const double ratio = scale / (double)candidate;
    uint64_t bits;
    if (ratio < 0x1p-40) return *exact = 0, 0.0f;
    memcpy(&bits, &ratio, sizeof bits);
    *exact &= !(bits & (((uint64_t)1 << 52) - 1));
    return (float)ratio;
}

/* The value of a magnitude code, NaN for no number. */
FP8_INLINE double fp8_value(uint8_t code) {
    const uint32_t bits = (uint32_t)code << 20;
    float value;
    memcpy(&value, &bits, sizeof value);
    return (double)(value * 0x1p120f); /* the difference of the exponents' biases; subnormals come out right, too */
}

/* The magnitude code that value x ratio rounds to, ties to even; if that is above 240, any above it. */
FP8_INLINE int fp8_nearest(uint8_t code, double ratio) {
    const double value = fp8_value(code) * ratio, large = value > 0x1p-6 ? value : 0x1p-6;
    uint64_t bits;
    double times;
    memcpy(&bits, &large, sizeof bits);
    const int exponent = (int)(bits >> 52) - 1023;
    if (exponent > 7) return FP8_NAN;
    bits = (uint64_t)(1023 + 3 - exponent) << 52;
    memcpy(&times, &bits, sizeof times);
    /* adding a number whose last bit is that of the result rounds */
    return (exponent + 6) * 8 + (int)((value * times + 0x1p52) - 0x1p52);
}

/* How many codes run `block` has. */
FP8_INLINE size_t fp8_length(const fp8_band *band, size_t block) {
    const size_t left = band->columns - block * band->width;
    return left < band->width ? left : band->width;
}

extern const fp8_requantizer fp8_requantizer_portable;
#ifdef FP8_HAVE_AVX2
extern const fp8_requantizer fp8_requantizer_avx2;
#endif
#ifdef FP8_HAVE_NEON
extern const fp8_requantizer fp8_requantizer_neon;
#endif

typedef struct {
    double signal; /* sum of the squares of the values before */
    double noise;  /* sum of the squares of the changes */
} fp8_error;

#define FP8_ERRORS 4096

/* For each block row of scales, from 0 up, the mantissa from 1 up to 2 that rounds its blocks least; errors[i]: what is
 * expected of a ratio of 1 + i / FP8_ERRORS. */
void fp8_best_mantissas(const double *scales, size_t rows, size_t across, const float errors[FP8_ERRORS],
                        double *mantissas);

/* scales: of the blocks; errors: as above. Writes row_scales, rows of them, and dst, which may be src; adds to `error`.
 * Returns 0, or -1 when out of memory. */
int fp8_requantize(const fp8_requantizer *path, const uint8_t *src, uint8_t *dst, const fp8_grid *grid,
                   const double *scales, const float errors[FP8_ERRORS], float *row_scales, fp8_error *error);

/* A path's scan where it has no better one: by its max, with no least. */
double fp8_scan(fp8_max_fn max, const uint8_t *src, const fp8_band *band);

/* How fp8_requantize picks: the index of the candidate, from the sums of fp8_measure_fn in the values' own units.
 * exact[k]: all of its ratios are powers of two, so that measuring rounded nothing. */
int fp8_best(const double noise[FP8_CANDIDATES], const int exact[FP8_CANDIDATES], double signal);

/* The same from estimates; -1 where measuring might come out otherwise. */
int fp8_best_estimate(const fp8_weighed *found);

#endif

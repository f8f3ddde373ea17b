/* Moving a matrix of FP8 codes from one scale a block to one scale a row.
 *
 * Each row tries two scales and keeps the one with the least squared error, measured on the row itself:
 *   0  row amax / 240, what the public preprocess scripts take; the other is kept only if it is no worse for certain
 *   1  the mantissa that suits its block row best, with the smallest exponent that keeps the row within +-240
 * Then the codes are rewritten: a code times block scale over row scale has 127 possible results for a given pair of
 * scales, which are in a table, and most of which are a step away that depends on the code's mantissa alone.
 */
#ifndef NEURON_FP8_REQUANTIZE_H
#define NEURON_FP8_REQUANTIZE_H

#include <string.h>

#include "format.h"

#define FP8_CANDIDATES 2
#define FP8_LANES 8 /* single precision sums: one for every 8th code, the same on every path */

/* Largest finite magnitude code of n codes. */
typedef uint8_t (*fp8_max_fn)(const uint8_t *src, size_t n);

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

/* What an estimate works out for a ratio, for the next that is a power of two times it; fraction 0: nothing yet. */
typedef struct {
    float fraction;
    uint8_t low[16], high[16];
} fp8_squares;

#define FP8_KNOWN 64 /* blocks of which what is known is kept from row to row */

/* What measuring the runs of a row gives, within the doubt, without looking at how each code is rounded. scales, runs:
 * of the blocks along the row. NULL: there is no quicker way. */
typedef void (*fp8_estimate_fn)(const uint8_t *src, size_t columns, size_t width, const double *scales,
                                const uint8_t *runs, const float candidate[FP8_CANDIDATES],
                                fp8_squares known[FP8_KNOWN], fp8_weighed *found);

/* dst[i] = sign of src[i] | table[magnitude of src[i]]; dst may be src. */
typedef void (*fp8_look_up_fn)(const uint8_t *src, uint8_t *dst, size_t n, const uint8_t table[FP8_CODES]);

/* The table of one ratio in short: while its results are normal numbers, a code and its result are as far apart as
 * eight codes further up. */
typedef struct {
    uint64_t fraction; /* of the ratio, as a double's bits: add is that of all ratios with it; 0: of none */
    uint8_t add[8];    /* by the code's lowest three bits; modulo 256 */
    uint8_t more;      /* to be added for the ratio's exponent; modulo 256 */
    uint8_t first;     /* a multiple of 8: the first code from which on it is so */
} fp8_steps;

/* Makes `steps` those of a ratio. Returns 0 where the table is to be used for all codes. NULL: always. */
typedef int (*fp8_steps_fn)(double ratio, fp8_steps *steps);

/* dst[i] = src[i] + step, until codes come that want the table, or fewer than are worked on at a time; returns how many
 * were before them. dst may be src. No result may be above 240. */
typedef size_t (*fp8_step_fn)(const uint8_t *src, uint8_t *dst, size_t n, const fp8_steps *steps);

#define FP8_GROUP ((size_t)32) /* as many at a time, at least */
#define FP8_RUN ((size_t)4096) /* codes whose squares are added in single precision */

typedef struct {
    fp8_max_fn max;
    fp8_measure_fn measure;
    fp8_estimate_fn estimate;
    fp8_look_up_fn look_up;
    fp8_steps_fn steps;
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

extern const fp8_requantizer fp8_requantizer_portable;
#ifdef FP8_HAVE_AVX2
extern const fp8_requantizer fp8_requantizer_avx2;
#endif
#ifdef FP8_HAVE_NEON
extern const fp8_requantizer fp8_requantizer_neon;
#endif

typedef struct {
    size_t rows, columns, height, width; /* the last two of a block */
} fp8_grid;

typedef struct {
    double signal; /* sum of the squares of the values before */
    double noise;  /* sum of the squares of the changes */
} fp8_error;

/* Largest finite magnitude codes: runs, rows x ceil(columns / width); and blocks, ceil(rows / height) of those. */
void fp8_run_max(const fp8_requantizer *path, const uint8_t *src, const fp8_grid *grid, uint8_t *runs,
                 uint8_t *blocks);

#define FP8_ERRORS 4096

/* For each block row of scales, from 0 up, the mantissa from 1 up to 2 that rounds its blocks least; errors[i]: what is
 * expected of a ratio of 1 + i / FP8_ERRORS. */
void fp8_best_mantissas(const double *scales, size_t rows, size_t across, const float errors[FP8_ERRORS],
                        double *mantissas);

/* scales: of the blocks; mantissas: from 1 up to 2, one a block row; runs: as fp8_run_max gives them.
 * Writes row_scales, rows of them, and dst, which may be src. Returns 0, or -1 when out of memory. */
int fp8_requantize(const fp8_requantizer *path, const uint8_t *src, uint8_t *dst, const fp8_grid *grid,
                   const double *scales, const double *mantissas, const uint8_t *runs, float *row_scales,
                   fp8_error *error);

/* How fp8_requantize picks: the index of the candidate, from the sums of fp8_measure_fn in the values' own units.
 * exact[k]: all of its ratios are powers of two, so that measuring rounded nothing. */
int fp8_best(const double noise[FP8_CANDIDATES], const int exact[FP8_CANDIDATES], double signal);

/* The same from estimates; -1 where measuring might come out otherwise. */
int fp8_best_estimate(const fp8_weighed *found);

#endif

/* Moving a matrix of FP8 codes from one scale a block to one scale a row.
 *
 * A code times block scale over row scale has 127 possible results for a given pair of scales, so this too is a
 * table look-up: a small cache holds the tables of the pairs met last.
 */
#ifndef NEURON_FP8_REQUANTIZE_H
#define NEURON_FP8_REQUANTIZE_H

#include "format.h"

/* One run of codes under one pair of scales.
 *
 * dst[i] = sign of src[i] | table[magnitude of src[i]], dst may be src. Adds to error[0] the squares of the values
 * before, in units of the scale before, and to error[1] the squares of (value before x ratio - value after), in
 * units of the scale after; NaN codes count for nothing. */
typedef void (*fp8_run_fn)(const uint8_t *src, uint8_t *dst, size_t n, const uint8_t table[FP8_CODES], float ratio,
                           double error[2]);

void fp8_run_portable(const uint8_t *src, uint8_t *dst, size_t n, const uint8_t table[FP8_CODES], float ratio,
                      double error[2]);
#ifdef FP8_HAVE_AVX2
void fp8_run_avx2(const uint8_t *src, uint8_t *dst, size_t n, const uint8_t table[FP8_CODES], float ratio,
                  double error[2]);
#endif

typedef struct {
    double signal; /* sum of the squares of the values before */
    double noise;  /* sum of the squares of the changes */
} fp8_error;

/* Largest finite magnitude code of each run of `width` codes of each row; out is rows x ceil(columns / width). */
void fp8_run_max(const uint8_t *src, size_t rows, size_t columns, size_t width, uint8_t *out);

/* before: block scales, ceil(rows / height) x ceil(columns / width); after: one scale a row, none of them 0.
 * src and dst are rows x columns codes without gaps; dst may be src. Returns 0, or -1 when out of memory. */
int fp8_requantize(fp8_run_fn run, const uint8_t *src, uint8_t *dst, size_t rows, size_t columns,
                   size_t height, size_t width, const double *before, const double *after, fp8_error *error);

#endif

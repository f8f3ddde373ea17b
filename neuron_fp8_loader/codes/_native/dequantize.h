/* FP8 codes times a scale, as bfloat16: the exact product, rounded once, to nearest, ties to even.
 *
 * In float32 the product of a code (4 bits) and a scale (24) would be rounded twice. Here each scale gets a table,
 * made with integers; as long as all results are normal numbers, sixteen entries tell all codes, because an exponent
 * more in the code is one more in the result.
 */
#ifndef NEURON_FP8_DEQUANTIZE_H
#define NEURON_FP8_DEQUANTIZE_H

#include "format.h"

#define FP8_BF16_SIGN 0x8000
#define FP8_BF16_INF 0x7f80
#define FP8_BF16_NAN 0x7fc0

/* What the codes become under one scale. */
typedef struct {
    /* bfloat16 of each magnitude code times the scale's magnitude; of a regular table perhaps the first 16 only */
    uint16_t of[FP8_CODES];
    uint8_t low[16];        /* the bytes of the first sixteen, for shuffles */
    uint8_t high[16];
    uint16_t lift;   /* to be added to what low and high tell of all codes but 0 */
    uint8_t flip;    /* FP8_SIGN where the scale is negative */
    uint8_t regular; /* of[code] == of[i] + ((code - i) << 4), i the code of the same mantissa among the first 16 */
} fp8_bf16_table;

/* Translates n codes, and tells whether one was NaN: that keeps its sign, changed by the scale's, and is FP8_BF16_NAN
 * otherwise. */
typedef int (*fp8_bf16_fn)(const uint8_t *src, uint16_t *dst, size_t n, const fp8_bf16_table *table);

/* The same with a lift for each sixteen codes, instead of the table's: small groups whose scales differ in the exponent
 * alone, as all of MX do, have one table. `table` is regular and has no flip; `lifts` has an even number of entries. */
typedef int (*fp8_bf16_lifted_fn)(const uint8_t *src, uint16_t *dst, size_t n, const fp8_bf16_table *table,
                                  const uint16_t *lifts);

typedef struct {
    fp8_bf16_fn run;
    fp8_bf16_lifted_fn lifted;
    int whole; /* whether they need all codes of a regular table, not only what its first sixteen tell */
} fp8_dequantizer;

extern const fp8_dequantizer fp8_dequantizer_portable;
int fp8_bf16_portable(const uint8_t *src, uint16_t *dst, size_t n, const fp8_bf16_table *table);
#ifdef FP8_HAVE_AVX2
extern const fp8_dequantizer fp8_dequantizer_avx2;
#endif

/* A part of a matrix whose blocks have a scale each. */
typedef struct {
    size_t rows, columns;         /* of the part */
    size_t src_stride, dst_stride; /* from row to row, in items */
    size_t height, width;         /* of a block */
    size_t top, left;             /* where in its first block the part begins: less than height, width */
} fp8_part;

/* scales: of the blocks that the part touches, ceil((top + rows) / height) x ceil((left + columns) / width). Tells
 * whether a code was NaN. */
int fp8_dequantize(const fp8_dequantizer *by, const uint8_t *src, uint16_t *dst, const fp8_part *part,
                   const float *scales);

#endif

/* Translating FP8 magnitude codes, one byte a weight.
 *
 * Contract, the same for every path:
 *   src    n bytes, float8_e4m3fn codes, any alignment
 *   dst    n bytes, or NULL to count only, or src itself; no other overlap
 *   table  indexed by the magnitude code: bits 0-6 are the new magnitude code, bit 7 (FP8_SIGN) says that the code
 *          loses a bit. The sign bit is carried over.
 *   counts are added to, so that a tensor may be done in pieces.
 */
#ifndef NEURON_FP8_CODES_H
#define NEURON_FP8_CODES_H

#include "format.h"

typedef struct {
    uint64_t above; /* above FP8_LARGEST_FIT and not NaN: 256..448, what Neuron reads as inf or nan */
    uint64_t lossy; /* codes whose table entry has bit 7 set */
    uint64_t nan;   /* FP8_NAN */
    uint8_t max;    /* largest magnitude code, FP8_NAN included */
} fp8_counts;

typedef void (*fp8_translate_fn)(const uint8_t *src, uint8_t *dst, size_t n, const uint8_t table[FP8_CODES],
                                 fp8_counts *counts);

void fp8_translate_portable(const uint8_t *src, uint8_t *dst, size_t n, const uint8_t table[FP8_CODES],
                            fp8_counts *counts);
#ifdef FP8_HAVE_AVX2
void fp8_translate_avx2(const uint8_t *src, uint8_t *dst, size_t n, const uint8_t table[FP8_CODES],
                        fp8_counts *counts);
#endif
#ifdef FP8_HAVE_NEON
void fp8_translate_neon(const uint8_t *src, uint8_t *dst, size_t n, const uint8_t table[FP8_CODES],
                        fp8_counts *counts);
#endif

/* Adds to counts[b] how often the byte b occurs in src. */
void fp8_histogram(const uint8_t *src, size_t n, uint64_t counts[256]);

#endif

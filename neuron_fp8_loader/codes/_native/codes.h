/* Translating FP8 magnitude codes, one byte a weight.
 *
 * Contract, the same for every path:
 *   src    n bytes, float8_e4m3fn codes, any alignment
 *   dst    n bytes, or NULL to count only, or src itself; no other overlap
 *   table  128 bytes, indexed by the magnitude code (byte & 0x7f): bits 0-6 are
 *          the new magnitude code, bit 7 says that the code loses a bit.
 *          The sign bit is carried over.
 *   counts are added to, so that a tensor may be done in pieces.
 */
#ifndef NEURON_FP8_CODES_H
#define NEURON_FP8_CODES_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    uint64_t above; /* 0x78..0x7e: 256..448, what Neuron reads as inf or nan */
    uint64_t lossy; /* codes whose table entry has bit 7 set */
    uint64_t nan;   /* 0x7f */
    uint8_t max;    /* largest magnitude code, 0x7f included */
} fp8_counts;

typedef void (*fp8_translate_fn)(const uint8_t *src, uint8_t *dst, size_t n,
                                 const uint8_t table[128], fp8_counts *counts);

void fp8_translate_portable(const uint8_t *src, uint8_t *dst, size_t n,
                            const uint8_t table[128], fp8_counts *counts);

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FP8_HAVE_AVX2 1
void fp8_translate_avx2(const uint8_t *src, uint8_t *dst, size_t n,
                        const uint8_t table[128], fp8_counts *counts);
#endif

#if defined(__aarch64__)
#define FP8_HAVE_NEON 1
void fp8_translate_neon(const uint8_t *src, uint8_t *dst, size_t n,
                        const uint8_t table[128], fp8_counts *counts);
#endif

/* Adds to counts[b] how often the byte b occurs in src. */
void fp8_histogram(const uint8_t *src, size_t n, uint64_t counts[256]);

#endif

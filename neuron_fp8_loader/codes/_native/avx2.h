/* What the AVX2 files share: 32 bytes at a time. */
#ifndef NEURON_FP8_AVX2_H
#define NEURON_FP8_AVX2_H

#include <immintrin.h>

#include "format.h"

#define AVX2 __attribute__((target("avx2")))

AVX2 FP8_INLINE __m256i load32(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }

AVX2 FP8_INLINE void store32(void *p, __m256i v) { _mm256_storeu_si256((__m256i *)p, v); }

/* A table of 16 bytes in both halves, as the shuffle wants it. */
AVX2 FP8_INLINE __m256i twice(const uint8_t *sixteen) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)sixteen));
}

/* Entries of 32 magnitude codes in a table of eight times 16. */
AVX2 FP8_INLINE __m256i look_up_any(__m256i code, const __m256i part[8]) {
    __m256i entry = _mm256_setzero_si256();
    for (int p = 0; p < 8; p++) {
        /* pshufb gives 0 where the index's top bit is set: + 0x70 sets it from 16 up */
        __m256i index = _mm256_xor_si256(code, _mm256_set1_epi8((char)(p << 4)));
        index = _mm256_adds_epu8(index, _mm256_set1_epi8(0x70));
        entry = _mm256_or_si256(entry, _mm256_shuffle_epi8(part[p], index));
    }
    return entry;
}

AVX2 FP8_INLINE uint8_t max_byte(__m256i v) {
    __m128i m = _mm_max_epu8(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epu8(m, _mm_srli_si128(m, 8));
    m = _mm_max_epu8(m, _mm_srli_si128(m, 4));
    m = _mm_max_epu8(m, _mm_srli_si128(m, 2));
    m = _mm_max_epu8(m, _mm_srli_si128(m, 1));
    return (uint8_t)_mm_cvtsi128_si32(m);
}

#endif

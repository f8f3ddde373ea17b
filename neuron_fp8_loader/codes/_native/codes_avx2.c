/* AVX2, 32 codes at a time. Compiled for AVX2 by attribute, called only where the CPU has it. */
#include "codes.h"
#include "requantize.h"

#ifdef FP8_HAVE_AVX2
#include <immintrin.h>
#include <string.h>

#define AVX2 __attribute__((target("avx2")))
/* Byte-wide counters hold 255; flush them before they wrap. */
#define BLOCK ((size_t)255 * 32)

/* From 0x10 up `half` is "minus 8" (one exponent step), so one shuffle serves the 16 codes
 * below; any other table takes eight. */
static int is_minus_eight_above_16(const uint8_t table[128]) {
    for (int m = 16; m < 127; m++)
        if (table[m] != m - 8) return 0;
    return table[127] == 127;
}

AVX2 static inline __m256i twice(const uint8_t *sixteen) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)sixteen));
}

AVX2 static inline uint64_t sum_bytes(__m256i v) {
    __m256i s = _mm256_sad_epu8(v, _mm256_setzero_si256());
    return (uint64_t)_mm256_extract_epi64(s, 0) + (uint64_t)_mm256_extract_epi64(s, 1) +
           (uint64_t)_mm256_extract_epi64(s, 2) + (uint64_t)_mm256_extract_epi64(s, 3);
}

/* Entries for 32 magnitude codes. */
AVX2 static inline __m256i look_up_half(__m256i code, __m256i low) {
    const __m256i is_low = _mm256_cmpgt_epi8(_mm256_set1_epi8(16), code);
    const __m256i is_nan = _mm256_cmpeq_epi8(code, _mm256_set1_epi8(0x7f));
    __m256i entry = _mm256_sub_epi8(code, _mm256_set1_epi8(8));
    entry = _mm256_blendv_epi8(entry, _mm256_shuffle_epi8(low, code), is_low);
    return _mm256_blendv_epi8(entry, code, is_nan);
}

AVX2 static inline __m256i look_up_any(__m256i code, const __m256i part[8]) {
    __m256i entry = _mm256_setzero_si256();
    for (int p = 0; p < 8; p++) {
        /* pshufb gives 0 where the index's top bit is set: + 0x70 sets it from 16 up */
        __m256i index = _mm256_xor_si256(code, _mm256_set1_epi8((char)(p << 4)));
        index = _mm256_adds_epu8(index, _mm256_set1_epi8(0x70));
        entry = _mm256_or_si256(entry, _mm256_shuffle_epi8(part[p], index));
    }
    return entry;
}

#define TRANSLATE(NAME, LOOK_UP, TABLE_ARG)                                                       \
    AVX2 static size_t NAME(const uint8_t *src, uint8_t *dst, size_t n, TABLE_ARG,                \
                            fp8_counts *counts) {                                                 \
        const __m256i magnitude = _mm256_set1_epi8(0x7f), sign = _mm256_set1_epi8((char)0x80);    \
        const __m256i fits = _mm256_set1_epi8(0x77);                                              \
        __m256i max = _mm256_setzero_si256();                                                     \
        uint64_t over = 0, lossy = 0, nan = 0;                                                    \
        size_t i = 0, whole = n & ~(size_t)31;                                                    \
        while (i < whole) {                                                                       \
            const size_t stop = whole - i < BLOCK ? whole : i + BLOCK;                            \
            __m256i n_over = _mm256_setzero_si256(), n_lossy = n_over, n_nan = n_over;            \
            for (; i < stop; i += 32) {                                                           \
                const __m256i byte = _mm256_loadu_si256((const __m256i *)(src + i));              \
                const __m256i code = _mm256_and_si256(byte, magnitude);                           \
                const __m256i entry = LOOK_UP(code, table);                                       \
                max = _mm256_max_epu8(max, code);                                                 \
                n_over = _mm256_sub_epi8(n_over, _mm256_cmpgt_epi8(code, fits));                  \
                n_nan = _mm256_sub_epi8(n_nan, _mm256_cmpeq_epi8(code, magnitude));               \
                n_lossy = _mm256_sub_epi8(n_lossy,                                                \
                                          _mm256_cmpgt_epi8(_mm256_setzero_si256(), entry));      \
                if (dst)                                                                          \
                    _mm256_storeu_si256((__m256i *)(dst + i),                                     \
                                        _mm256_or_si256(_mm256_and_si256(byte, sign),             \
                                                        _mm256_and_si256(entry, magnitude)));     \
            }                                                                                     \
            over += sum_bytes(n_over);                                                            \
            lossy += sum_bytes(n_lossy);                                                          \
            nan += sum_bytes(n_nan);                                                              \
        }                                                                                         \
        uint8_t lanes[32];                                                                        \
        _mm256_storeu_si256((__m256i *)lanes, max);                                               \
        for (int k = 0; k < 32; k++)                                                              \
            if (lanes[k] > counts->max) counts->max = lanes[k];                                   \
        counts->above += over - nan;                                                              \
        counts->lossy += lossy;                                                                   \
        counts->nan += nan;                                                                       \
        return whole;                                                                             \
    }

TRANSLATE(translate_half, look_up_half, const __m256i table)
TRANSLATE(translate_any, look_up_any, const __m256i table[8])

AVX2 void fp8_translate_avx2(const uint8_t *src, uint8_t *dst, size_t n, const uint8_t table[128],
                             fp8_counts *counts) {
    size_t done = 0;
    if (n >= 32) {
        if (is_minus_eight_above_16(table)) {
            done = translate_half(src, dst, n, twice(table), counts);
        } else {
            __m256i part[8];
            for (int p = 0; p < 8; p++) part[p] = twice(table + 16 * p);
            done = translate_any(src, dst, n, part, counts);
        }
    }
    fp8_translate_portable(src + done, dst ? dst + done : NULL, n - done, table, counts);
}

/* The values of 8 codes: exponent and mantissa in a float's place, then its bias made up for; subnormals too. */
AVX2 static inline __m256 values_of(const uint8_t *codes) {
    const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)codes)), 20);
    return _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(0x1p120f));
}

AVX2 static inline double sum_floats(__m256 v) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

AVX2 void fp8_run_avx2(const uint8_t *src, uint8_t *dst, size_t n, const uint8_t table[128], float ratio,
                       double error[2]) {
    const __m256i magnitude = _mm256_set1_epi8(0x7f);
    const __m256 times = _mm256_set1_ps(ratio);
    __m256 signal = _mm256_setzero_ps(), noise = signal;
    __m256i part[8];
    for (int p = 0; p < 8; p++) part[p] = twice(table + 16 * p);
    size_t i = 0;
    for (; i + 32 <= n; i += 32) {
        const __m256i byte = _mm256_loadu_si256((const __m256i *)(src + i));
        const __m256i code = _mm256_and_si256(byte, magnitude), entry = look_up_any(code, part);
        const __m256i is_nan = _mm256_cmpeq_epi8(code, magnitude);
        uint8_t before[32], after[32];
        _mm256_storeu_si256((__m256i *)before, _mm256_andnot_si256(is_nan, code));
        _mm256_storeu_si256((__m256i *)after, _mm256_andnot_si256(is_nan, entry));
        _mm256_storeu_si256((__m256i *)(dst + i), _mm256_or_si256(_mm256_andnot_si256(magnitude, byte), entry));
        for (int k = 0; k < 32; k += 8) {
            const __m256 was = values_of(before + k);
            const __m256 change = _mm256_sub_ps(_mm256_mul_ps(was, times), values_of(after + k));
            signal = _mm256_add_ps(signal, _mm256_mul_ps(was, was));
            noise = _mm256_add_ps(noise, _mm256_mul_ps(change, change));
        }
    }
    error[0] += sum_floats(signal);
    error[1] += sum_floats(noise);
    if (i < n) fp8_run_portable(src + i, dst + i, n - i, table, ratio, error);
}
#endif

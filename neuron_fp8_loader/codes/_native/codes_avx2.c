/* AVX2, 32 codes at a time. Compiled for AVX2 by attribute, called only where the CPU has it. */
#include "codes.h"
#include "requantize.h"

#ifdef FP8_HAVE_AVX2
#include "avx2.h"

/* Byte-wide counters hold 255; flush them before they wrap. */
#define BLOCK ((size_t)255 * 32)

/* From 0x10 up `half` is "minus 8" (one exponent step), so one shuffle serves the 16 codes
 * below; any other table takes eight. */
static int is_minus_eight_above_16(const uint8_t table[FP8_CODES]) {
    for (int m = 16; m < FP8_NAN; m++)
        if (table[m] != m - 8) return 0;
    return table[FP8_NAN] == FP8_NAN;
}

AVX2 static inline uint64_t sum_bytes(__m256i v) {
    const __m256i s = _mm256_sad_epu8(v, _mm256_setzero_si256());
    return (uint64_t)_mm256_extract_epi64(s, 0) + (uint64_t)_mm256_extract_epi64(s, 1) +
           (uint64_t)_mm256_extract_epi64(s, 2) + (uint64_t)_mm256_extract_epi64(s, 3);
}

AVX2 static inline __m256i look_up_half(__m256i code, __m256i low) {
    const __m256i is_low = _mm256_cmpgt_epi8(_mm256_set1_epi8(16), code);
    const __m256i is_nan = _mm256_cmpeq_epi8(code, _mm256_set1_epi8(FP8_NAN));
    __m256i entry = _mm256_sub_epi8(code, _mm256_set1_epi8(8));
    entry = _mm256_blendv_epi8(entry, _mm256_shuffle_epi8(low, code), is_low);
    return _mm256_blendv_epi8(entry, code, is_nan);
}

/* All whole steps of 32; `half` is a constant where this is called, and part has one vector then, otherwise eight. */
AVX2 FP8_INLINE size_t translate(const uint8_t *src, uint8_t *dst, size_t n, const __m256i *part, const int half,
                                 fp8_counts *counts) {
    const __m256i magnitude = _mm256_set1_epi8(FP8_MAGNITUDE), nan = _mm256_set1_epi8(FP8_NAN);
    const __m256i sign = _mm256_set1_epi8((char)FP8_SIGN), fits = _mm256_set1_epi8(FP8_LARGEST_FIT);
    __m256i max = _mm256_setzero_si256();
    uint64_t over = 0, lossy = 0, nans = 0;
    size_t i = 0;
    const size_t whole = n & ~(size_t)31;
    while (i < whole) {
        const size_t stop = whole - i < BLOCK ? whole : i + BLOCK;
        __m256i n_over = _mm256_setzero_si256(), n_lossy = n_over, n_nan = n_over;
        for (; i < stop; i += 32) {
            const __m256i byte = load32(src + i), code = _mm256_and_si256(byte, magnitude);
            const __m256i entry = half ? look_up_half(code, part[0]) : look_up_any(code, part);
            max = _mm256_max_epu8(max, code);
            n_over = _mm256_sub_epi8(n_over, _mm256_cmpgt_epi8(code, fits));
            n_nan = _mm256_sub_epi8(n_nan, _mm256_cmpeq_epi8(code, nan));
            n_lossy = _mm256_sub_epi8(n_lossy, _mm256_cmpgt_epi8(_mm256_setzero_si256(), entry));
            if (dst)
                store32(dst + i, _mm256_or_si256(_mm256_and_si256(byte, sign), _mm256_and_si256(entry, magnitude)));
        }
        over += sum_bytes(n_over);
        lossy += sum_bytes(n_lossy);
        nans += sum_bytes(n_nan);
    }
    const uint8_t largest = max_byte(max);
    if (largest > counts->max) counts->max = largest;
    counts->above += over - nans;
    counts->lossy += lossy;
    counts->nan += nans;
    return whole;
}

AVX2 void fp8_translate_avx2(const uint8_t *src, uint8_t *dst, size_t n, const uint8_t table[FP8_CODES],
                             fp8_counts *counts) {
    size_t done = 0;
    if (n >= 32) {
        __m256i part[8];
        for (int p = 0; p < 8; p++) part[p] = twice(table + 16 * p);
        done = is_minus_eight_above_16(table) ? translate(src, dst, n, part, 1, counts)
                                              : translate(src, dst, n, part, 0, counts);
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
    return (double)_mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

AVX2 void fp8_run_avx2(const uint8_t *src, uint8_t *dst, size_t n, const uint8_t table[FP8_CODES], float ratio,
                       double error[2]) {
    const __m256i magnitude = _mm256_set1_epi8(FP8_MAGNITUDE), nan = _mm256_set1_epi8(FP8_NAN);
    const __m256 times = _mm256_set1_ps(ratio);
    __m256 signal = _mm256_setzero_ps(), noise = signal;
    __m256i part[8];
    for (int p = 0; p < 8; p++) part[p] = twice(table + 16 * p);
    size_t i = 0;
    for (; i + 32 <= n; i += 32) {
        const __m256i byte = load32(src + i);
        const __m256i code = _mm256_and_si256(byte, magnitude), entry = look_up_any(code, part);
        const __m256i is_nan = _mm256_cmpeq_epi8(code, nan);
        uint8_t before[32], after[32];
        store32(before, _mm256_andnot_si256(is_nan, code));
        store32(after, _mm256_andnot_si256(is_nan, entry));
        store32(dst + i, _mm256_or_si256(_mm256_andnot_si256(magnitude, byte), entry));
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

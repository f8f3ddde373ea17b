/* 32 codes to bfloat16 at a time. */
#include "dequantize.h"

#ifdef FP8_HAVE_AVX2
#include <string.h>

#include "avx2.h"

/* lifts: as of fp8_bf16_lifted_fn, or NULL for the table's own. */
AVX2 FP8_INLINE int translate(const uint8_t *src, uint16_t *dst, size_t n, const fp8_bf16_table *table,
                              const uint16_t *lifts) {
    const __m256i low = twice(table->low), high = twice(table->high), zero = _mm256_setzero_si256();
    const __m256i flip = _mm256_set1_epi8((char)table->flip), sign_bit = _mm256_set1_epi8((char)FP8_SIGN);
    const __m256i seven = _mm256_set1_epi8(7), eight = _mm256_set1_epi8(8), nan_code = _mm256_set1_epi8(FP8_NAN);
    const __m256i magnitude = _mm256_set1_epi8(FP8_MAGNITUDE), nan = _mm256_set1_epi16(FP8_BF16_NAN);
    __m256i lift = _mm256_set1_epi16((short)table->lift), lift_b = lift;
    __m256i any_nan = zero;
    uint8_t last[32] = {0};
    uint16_t last_out[32];
    if (n % 32) memcpy(last, src + n - n % 32, n % 32);
    for (size_t i = 0; i < n; i += 32) {
        const int full = n - i >= 32; /* the table may lack what a loop over single codes would need */
        uint16_t *to = full ? dst + i : last_out;
        if (lifts) {
            lift = _mm256_set1_epi16((short)lifts[i / 16]);
            lift_b = _mm256_set1_epi16((short)lifts[i / 16 + 1]);
        }
        /* quarters 0 2 1 3, so that what unpacks from both halves is in order again */
        const __m256i byte = _mm256_permute4x64_epi64(load32(full ? src + i : last), 0xd8);
        const __m256i code = _mm256_and_si256(byte, magnitude);
        const __m256i sign = _mm256_and_si256(_mm256_xor_si256(byte, flip), sign_bit);
        const __m256i is_nan = _mm256_cmpeq_epi8(code, nan_code);
        any_nan = _mm256_or_si256(any_nan, is_nan);
        const __m256i is_zero = _mm256_cmpeq_epi8(code, zero);
        /* the code of the same mantissa among the first sixteen, and what it lacks */
        const __m256i first = _mm256_min_epu8(code, _mm256_or_si256(_mm256_and_si256(code, seven), eight));
        const __m256i steps = _mm256_sub_epi8(code, first);
        const __m256i l = _mm256_shuffle_epi8(low, first), h = _mm256_shuffle_epi8(high, first);
        __m256i a = _mm256_add_epi16(_mm256_unpacklo_epi8(l, h), _mm256_slli_epi16(_mm256_unpacklo_epi8(steps, zero), 4));
        __m256i b = _mm256_add_epi16(_mm256_unpackhi_epi8(l, h), _mm256_slli_epi16(_mm256_unpackhi_epi8(steps, zero), 4));
        a = _mm256_andnot_si256(_mm256_unpacklo_epi8(is_zero, is_zero), _mm256_add_epi16(a, lift));
        b = _mm256_andnot_si256(_mm256_unpackhi_epi8(is_zero, is_zero), _mm256_add_epi16(b, lift_b));
        a = _mm256_blendv_epi8(a, nan, _mm256_unpacklo_epi8(is_nan, is_nan));
        b = _mm256_blendv_epi8(b, nan, _mm256_unpackhi_epi8(is_nan, is_nan));
        store32(to, _mm256_or_si256(a, _mm256_unpacklo_epi8(zero, sign)));
        store32(to + 16, _mm256_or_si256(b, _mm256_unpackhi_epi8(zero, sign)));
    }
    if (n % 32) memcpy(dst + n - n % 32, last_out, n % 32 * sizeof *dst);
    return !_mm256_testz_si256(any_nan, any_nan);
}

AVX2 static int regular(const uint8_t *src, uint16_t *dst, size_t n, const fp8_bf16_table *table) {
    return translate(src, dst, n, table, NULL);
}

AVX2 static int lifted(const uint8_t *src, uint16_t *dst, size_t n, const fp8_bf16_table *table, const uint16_t *lifts) {
    return translate(src, dst, n, table, lifts);
}

static int any(const uint8_t *src, uint16_t *dst, size_t n, const fp8_bf16_table *table) {
    return (table->regular ? regular : fp8_bf16_portable)(src, dst, n, table);
}

const fp8_dequantizer fp8_dequantizer_avx2 = {any, lifted, 0};
#endif

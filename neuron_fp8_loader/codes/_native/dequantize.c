#include "dequantize.h"

#include <math.h>
#include <string.h>

#define PANEL ((size_t)32) /* blocks whose tables are at hand at a time: 10 kB, which stay in cache */

/* bfloat16 nearest to a value from 0 up that may be subnormal, infinite or NaN there. */
static uint16_t nearest(double value) {
    int exponent;
    if (isnan(value)) return FP8_BF16_NAN;
    if (value >= 0x1p128) return FP8_BF16_INF;
    frexp(value, &exponent);
    const int unit = exponent - 8 > -133 ? exponent - 8 : -133; /* eight bits, but no less than 2^-133 */
    /* the last bit of a double this large counts units, so adding it rounds to them */
    const double large = ldexp(0x1p52, unit);
    const double rounded = (value + large) - large;
    const float exact = (float)rounded; /* 2^128 becomes infinite here */
    uint32_t bits;
    memcpy(&bits, &exact, sizeof bits);
    return (uint16_t)(bits >> 16);
}

/* The first sixteen entries: i x 2^-9 x a scale of `significand` x 2^(exponent - 23), rounded to eight bits. */
static void multiples(uint32_t significand, int exponent, uint16_t of[16]) {
    of[0] = 0;
    for (uint32_t i = 1; i < 16; i++) {
        const uint32_t product = i * significand;
        const int shift = 32 - __builtin_clz(product) - 8;
        const uint32_t half = (uint32_t)1 << (shift - 1), rest = product & (2 * half - 1);
        uint32_t kept = product >> shift;
        kept += rest > half || (rest == half && (kept & 1));
        of[i] = (uint16_t)((shift + exponent + 101) * 128 + (int)kept); /* 256 kept: one step up */
    }
}

/* The first sixteen entries, from those of a scale that is 2^steps times as small. */
static void shifted(uint16_t of[16], const uint16_t before[16], int steps) {
    for (int i = 0; i < 16; i++) of[i] = (uint16_t)(before[i] + steps * 128);
    of[0] = 0;
}

/* `before`: another table, or NULL; a scale that differs from its scale in the exponent alone is made of it.
 * `whole`: all codes, not only what a regular table's first sixteen tell. */
static void draw(fp8_bf16_table *table, float scale, const fp8_bf16_table *before, float scale_before, int whole) {
    const float size = fabsf(scale);
    uint32_t bits, bits_before;
    memcpy(&bits, &size, sizeof bits);
    memcpy(&bits_before, &scale_before, sizeof bits_before);
    table->flip = signbit(scale) ? FP8_SIGN : 0;
    /* the least code is 2^-9 and the largest 448: all products are normal, and none overflows */
    table->regular = size >= 0x1p-117f && size < 0x1p118f;
    if (!table->regular) {
        for (int code = 0; code < FP8_NAN; code++) {
            const int exponent = code >> 3, mantissa = code & 7;
            const double value = exponent ? ldexp(8 + mantissa, exponent - 10) : ldexp(mantissa, -9);
            table->of[code] = nearest(value * (double)size);
        }
        table->of[FP8_NAN] = FP8_BF16_NAN;
        return;
    }
    table->lift = 0;
    const int same = before && before->regular && !((bits ^ bits_before) & 0x7fffff);
    if (same && !whole) { /* one instruction more for each code, and far less here, where groups are small */
        memcpy(table->low, before->low, sizeof table->low);
        memcpy(table->high, before->high, sizeof table->high);
        table->lift = (uint16_t)(before->lift + ((int)(bits >> 23 & 0xff) - (int)(bits_before >> 23 & 0xff)) * 128);
        return;
    }
    if (same)
        shifted(table->of, before->of, (int)(bits >> 23 & 0xff) - (int)(bits_before >> 23 & 0xff));
    else
        multiples((bits & 0x7fffff) | 0x800000, (int)(bits >> 23) - 127, table->of);
    for (int i = 0; i < 16; i++) {
        table->low[i] = (uint8_t)(table->of[i] & 0xff);
        table->high[i] = (uint8_t)(table->of[i] >> 8);
    }
    if (!whole) return;
    for (int code = 16; code < FP8_NAN; code += 8)
        for (int i = 0; i < 8; i++) table->of[code + i] = (uint16_t)(table->of[8 + i] + ((code - 8) << 4));
    table->of[FP8_NAN] = FP8_BF16_NAN;
}

int fp8_bf16_portable(const uint8_t *src, uint16_t *dst, size_t n, const fp8_bf16_table *table) {
    int nan = 0;
    for (size_t i = 0; i < n; i++) {
        const int sign = (src[i] ^ table->flip) & FP8_SIGN, code = src[i] & FP8_MAGNITUDE;
        dst[i] = (uint16_t)(table->of[code] | sign << 8);
        nan |= code == FP8_NAN;
    }
    return nan;
}

int fp8_dequantize(fp8_bf16_fn run, const uint8_t *src, uint16_t *dst, const fp8_part *part, const float *scales) {
    const size_t end = part->left + part->columns; /* columns are counted from the edge of the first block */
    const size_t across = end / part->width + (end % part->width != 0);
    fp8_bf16_table tables[PANEL];
    int nan = 0;
    for (size_t top = 0, bottom; top < part->rows; top = bottom, scales += across) {
        const size_t height = part->height - (top ? 0 : part->top);
        bottom = part->rows - top < height ? part->rows : top + height;
        for (size_t first = 0; first < across; first += PANEL) {
            const size_t count = across - first < PANEL ? across - first : PANEL;
            for (size_t k = 0; k < count; k++)
                draw(tables + k, scales[first + k], k ? tables + k - 1 : NULL, k ? scales[first + k - 1] : 0,
                     run == fp8_bf16_portable);
            for (size_t row = top; row < bottom; row++) {
                for (size_t k = 0; k < count; k++) {
                    const size_t from = (first + k) * part->width, left = from > part->left ? from - part->left : 0;
                    const size_t right = end - from < part->width ? part->columns : from + part->width - part->left;
                    nan |= run(src + row * part->src_stride + left, dst + row * part->dst_stride + left,
                               right - left, tables + k);
                }
            }
        }
    }
    return nan;
}

#include "dequantize.h"

#include <math.h>
#include <string.h>

/* Blocks whose tables are at hand at a time: 38 kB, of which a regular table's 36 bytes are read. Fewer would go through
 * wide rows in pieces, which costs more than it saves. */
#define PANEL ((size_t)128)
#define NARROW ((size_t)128)  /* groups up to this wide are worth a lift each instead of a table */
#define SIXTEENS ((size_t)1024) /* that have their lifts at hand; no fewer than those of a group, and even */

/* Scales of regular tables. The least code is 2^-9 and the largest 448: all products are normal, and none overflows. */
#define LEAST 0x1p-117f
#define END 0x1p118f

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
    table->regular = size >= LEAST && size < END;
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

static int lifted(const uint8_t *src, uint16_t *dst, size_t n, const fp8_bf16_table *table, const uint16_t *lifts) {
    int nan = 0;
    for (size_t i = 0; i < n; i++) {
        const int sign = src[i] & FP8_SIGN, code = src[i] & FP8_MAGNITUDE;
        const int lift = code && code != FP8_NAN ? lifts[i / 16] : 0;
        dst[i] = (uint16_t)((table->of[code] + lift) | sign << 8);
        nan |= code == FP8_NAN;
    }
    return nan;
}

const fp8_dequantizer fp8_dequantizer_portable = {fp8_bf16_portable, lifted, 1};

static uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* One row of n codes in groups of `width`, a multiple of sixteen, the first of which begins `left` earlier. `odd`: the
 * table of a scale that shares none, `odd_bits` its scale: it often recurs, for groups of zeros all have the same. */
static int narrow(const fp8_dequantizer *by, const uint8_t *src, uint16_t *dst, size_t n, size_t width, size_t left,
                  const float *scales, fp8_bf16_table *odd, uint32_t *odd_bits) {
    fp8_bf16_table table;
    uint16_t lifts[SIXTEENS];
    int nan = 0;
    for (size_t done = 0; done < n;) {
        const uint32_t first = bits_of(*scales);
        if (!(*scales >= LEAST && *scales < END)) {
            const size_t count = n - done < width - left ? n - done : width - left;
            if (first != *odd_bits) draw(odd, *scales, NULL, 0, by->whole);
            *odd_bits = first;
            nan |= by->run(src + done, dst + done, count, odd);
            done += count;
            left = 0;
            scales++;
            continue;
        }
        size_t count = 0, from = done; /* sixteens */
        draw(&table, *scales, NULL, 0, by->whole);
        for (; done < n && *scales >= LEAST && *scales < END && !((bits_of(*scales) ^ first) & 0x7fffff); scales++) {
            const size_t more = (width - left) / 16;
            if (count + more > SIXTEENS) break;
            const uint16_t lift = (uint16_t)(((int)(bits_of(*scales) >> 23) - (int)(first >> 23)) * 128);
            for (size_t k = 0; k < more; k++) lifts[count + k] = lift;
            count += more;
            done = n - done < width - left ? n : done + width - left;
            left = 0;
        }
        if (count % 2) lifts[count] = 0;
        nan |= by->lifted(src + from, dst + from, done - from, &table, lifts);
    }
    return nan;
}

int fp8_dequantize(const fp8_dequantizer *by, const uint8_t *src, uint16_t *dst, const fp8_part *part,
                   const float *scales) {
    const size_t end = part->left + part->columns; /* columns are counted from the edge of the first block */
    const size_t across = end / part->width + (end % part->width != 0);
    fp8_bf16_table tables[PANEL];
    int nan = 0;
    if (part->height == 1 && part->width <= NARROW && part->width % 16 == 0 && part->left % 16 == 0) {
        uint32_t odd_bits = bits_of(1); /* not odd, so none is drawn yet */
        for (size_t row = 0; row < part->rows; row++)
            nan |= narrow(by, src + row * part->src_stride, dst + row * part->dst_stride, part->columns, part->width,
                          part->left, scales + row * across, tables, &odd_bits);
        return nan;
    }
    for (size_t top = 0, bottom; top < part->rows; top = bottom, scales += across) {
        const size_t height = part->height - (top ? 0 : part->top);
        bottom = part->rows - top < height ? part->rows : top + height;
        for (size_t first = 0; first < across; first += PANEL) {
            const size_t count = across - first < PANEL ? across - first : PANEL;
            for (size_t k = 0; k < count; k++)
                draw(tables + k, scales[first + k], k ? tables + k - 1 : NULL, k ? scales[first + k - 1] : 0,
                     by->whole);
            for (size_t row = top; row < bottom; row++) {
                for (size_t k = 0; k < count; k++) {
                    const size_t from = (first + k) * part->width, left = from > part->left ? from - part->left : 0;
                    const size_t right = end - from < part->width ? part->columns : from + part->width - part->left;
                    nan |= by->run(src + row * part->src_stride + left, dst + row * part->dst_stride + left,
                                   right - left, tables + k);
                }
            }
        }
    }
    return nan;
}

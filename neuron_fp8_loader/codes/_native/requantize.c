#include "requantize.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The value of each magnitude code, and the midpoints between neighbours up to 240. */
typedef struct {
    double value[FP8_NAN], midpoint[FP8_LARGEST_FIT];
} number_line;

static void draw(number_line *line) {
    for (int code = 0; code < FP8_NAN; code++) {
        const int exponent = code >> 3, mantissa = code & 7;
        line->value[code] = exponent ? ldexp(8 + mantissa, exponent - 10) : ldexp(mantissa, -9);
    }
    for (int code = 0; code < FP8_LARGEST_FIT; code++)
        line->midpoint[code] = (line->value[code] + line->value[code + 1]) / 2;
}

/* One pair of scales and its table. */
typedef struct {
    double before, after;
    float ratio;
    uint8_t table[FP8_CODES];
} entry;

#define PANEL ((size_t)32) /* blocks */
#define WAYS ((size_t)16)
#define ENTRIES (PANEL * WAYS)
#define RUN ((size_t)4096) /* single precision sums are kept no longer than this */

static void begin(entry *e, const number_line *line, double before, double after) {
    const double ratio = before / after;
    /* Both sides ascend, so one walk along the midpoints rounds every code: to nearest, ties to even. */
    int nearest = 0;
    for (int code = 0; code < FP8_NAN; code++) {
        const double value = line->value[code] * ratio;
        while (nearest < FP8_LARGEST_FIT &&
               (value > line->midpoint[nearest] || (value == line->midpoint[nearest] && (nearest & 1))))
            nearest++;
        e->table[code] = (uint8_t)nearest;
    }
    e->table[FP8_NAN] = FP8_NAN;
    e->before = before;
    e->after = after;
    e->ratio = ratio < FLT_MAX ? (float)ratio : FLT_MAX; /* only zeros can meet a ratio like this */
}

/* Entries of one block of the panel; within it the exponents tell the pairs apart: the row scales of a block row
 * differ in nothing else. */
static size_t slot(size_t block, double before, double after) {
    uint64_t a, b;
    memcpy(&a, &before, sizeof a);
    memcpy(&b, &after, sizeof b);
    return block % PANEL * WAYS + (5 * (a >> 52) + (b >> 52)) % WAYS;
}

int fp8_requantize(fp8_run_fn run, const uint8_t *src, uint8_t *dst, size_t rows, size_t columns, size_t height,
                   size_t width, const double *before, const double *after, fp8_error *error) {
    const size_t across = (columns + width - 1) / width;
    number_line line;
    entry *cache = calloc(ENTRIES, sizeof *cache); /* no row scale is 0, so an empty entry matches nothing */
    if (!cache) return -1;
    draw(&line);
    for (size_t top = 0; top < rows; top += height) {
        const size_t bottom = rows - top < height ? rows : top + height;
        const double *scales = before + top / height * across;
        /* panels: long enough runs of memory a row, few enough tables to stay in cache */
        for (size_t first = 0; first < across; first += PANEL) {
            const size_t last = across - first < PANEL ? across : first + PANEL;
            for (size_t row = top; row < bottom; row++) {
                for (size_t block = first; block < last; block++) {
                    const size_t left = block * width, right = columns - left < width ? columns : left + width;
                    entry *e = cache + slot(block, scales[block], after[row]);
                    if (e->before != scales[block] || e->after != after[row])
                        begin(e, &line, scales[block], after[row]);
                    double change[2] = {0, 0};
                    for (size_t i = left; i < right; i += RUN) {
                        const size_t at = row * columns + i, n = right - i < RUN ? right - i : RUN;
                        run(src + at, dst + at, n, e->table, e->ratio, change);
                    }
                    error->signal += change[0] * e->before * e->before;
                    error->noise += change[1] * e->after * e->after;
                }
            }
        }
    }
    free(cache);
    return 0;
}

void fp8_run_max(const uint8_t *src, size_t rows, size_t columns, size_t width, uint8_t *out) {
    for (size_t row = 0; row < rows; row++, src += columns) {
        for (size_t left = 0; left < columns; left += width) {
            const size_t right = columns - left < width ? columns : left + width;
            uint8_t max = 0;
            for (size_t i = left; i < right; i++) {
                /* + 1 makes NaN 0x80, whose low bits are 0: no branch, so that this becomes vector code */
                const uint8_t code = (uint8_t)(((src[i] & FP8_MAGNITUDE) + 1) & FP8_MAGNITUDE);
                max = code > max ? code : max;
            }
            *out++ = max ? max - 1 : 0;
        }
    }
}

static float value_of(uint8_t code) {
    const uint32_t bits = (uint32_t)code << 20;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value * 0x1p120f; /* the difference of the exponents' biases; subnormals come out right, too */
}

void fp8_run_portable(const uint8_t *src, uint8_t *dst, size_t n, const uint8_t table[FP8_CODES], float ratio,
                      double error[2]) {
    float signal[8] = {0}, noise[8] = {0};
    for (size_t i = 0; i < n; i++) {
        const uint8_t code = src[i] & FP8_MAGNITUDE, entry = table[code];
        dst[i] = (uint8_t)((src[i] & FP8_SIGN) | entry);
        if (code == FP8_NAN) continue;
        const float was = value_of(code), change = was * ratio - value_of(entry);
        signal[i & 7] += was * was;
        noise[i & 7] += change * change;
    }
    for (int k = 0; k < 8; k++) {
        error[0] += signal[k];
        error[1] += noise[k];
    }
}

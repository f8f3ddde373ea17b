#include "codes.h"

/* Three counts of 16 bits in one word, so that counting costs one addition a byte;
 * unpacked before a field can wrap. */
#define ABOVE ((uint64_t)1)
#define LOSSY ((uint64_t)1 << 16)
#define NAN_CODE ((uint64_t)1 << 32)
#define BLOCK ((size_t)32768)

void fp8_translate_portable(const uint8_t *src, uint8_t *dst, size_t n, const uint8_t table[FP8_CODES],
                            fp8_counts *counts) {
    uint8_t out[256];
    uint64_t class_of[256];
    if (n == 0) return;
    for (int byte = 0; byte < 256; byte++) {
        const int code = byte & FP8_MAGNITUDE;
        out[byte] = (uint8_t)((byte & FP8_SIGN) | (table[code] & FP8_MAGNITUDE));
        class_of[byte] = (code == FP8_NAN ? NAN_CODE : code > FP8_LARGEST_FIT ? ABOVE : 0) + (table[code] & FP8_SIGN ? LOSSY : 0);
    }
    uint8_t max = counts->max;
    for (size_t i = 0; i < n;) {
        const size_t stop = n - i < BLOCK ? n : i + BLOCK;
        uint64_t seen = 0;
        /* apart from the look-ups: compilers turn this loop into vector code */
        for (size_t k = i; k < stop; k++) {
            const uint8_t code = src[k] & FP8_MAGNITUDE;
            max = code > max ? code : max;
        }
        if (dst) {
            for (; i < stop; i++) {
                const uint8_t byte = src[i];
                seen += class_of[byte];
                dst[i] = out[byte];
            }
        } else {
            for (; i < stop; i++) seen += class_of[src[i]];
        }
        counts->above += seen & 0xffff;
        counts->lossy += seen >> 16 & 0xffff;
        counts->nan += seen >> 32;
    }
    counts->max = max;
}

void fp8_histogram(const uint8_t *src, size_t n, uint64_t counts[256]) {
    /* Four tables: an increment need not wait for the one before when a byte is repeated. A field
     * holds 32 bits; it is emptied before it can wrap. */
    while (n > 0) {
        uint32_t part[4][256] = {{0}};
        const size_t take = n < ((size_t)1 << 30) ? n : (size_t)1 << 30;
        size_t i = 0;
        for (; i + 4 <= take; i += 4) {
            part[0][src[i]]++;
            part[1][src[i + 1]]++;
            part[2][src[i + 2]]++;
            part[3][src[i + 3]]++;
        }
        for (; i < take; i++) part[0][src[i]]++;
        for (int b = 0; b < 256; b++)
            counts[b] += (uint64_t)part[0][b] + part[1][b] + part[2][b] + part[3][b];
        src += take;
        n -= take;
    }
}

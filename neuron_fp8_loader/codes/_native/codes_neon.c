/* NEON, 16 codes at a time; part of every aarch64 CPU, so chosen when compiling. */
#include "codes.h"

#ifdef FP8_HAVE_NEON
#include <arm_neon.h>

/* Byte-wide counters hold 255; flush them before they wrap. */
#define BLOCK ((size_t)255 * 16)

static inline uint8x16x4_t load64(const uint8_t *p) {
    uint8x16x4_t t = {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}};
    return t;
}

void fp8_translate_neon(const uint8_t *src, uint8_t *dst, size_t n, const uint8_t table[FP8_CODES],
                        fp8_counts *counts) {
    const uint8x16x4_t low = load64(table), high = load64(table + 64);
    const uint8x16_t magnitude = vdupq_n_u8(FP8_MAGNITUDE), fits = vdupq_n_u8(FP8_LARGEST_FIT);
    uint8x16_t max = vdupq_n_u8(counts->max);
    uint64_t over = 0, lossy = 0, nan = 0;
    size_t i = 0;
    const size_t whole = n & ~(size_t)15;
    while (i < whole) {
        const size_t stop = whole - i < BLOCK ? whole : i + BLOCK;
        uint8x16_t n_over = vdupq_n_u8(0), n_lossy = n_over, n_nan = n_over;
        for (; i < stop; i += 16) {
            const uint8x16_t byte = vld1q_u8(src + i);
            const uint8x16_t code = vandq_u8(byte, magnitude);
            /* an index out of a table's 64 entries gives 0 */
            const uint8x16_t entry = vorrq_u8(vqtbl4q_u8(low, code),
                                              vqtbl4q_u8(high, vsubq_u8(code, vdupq_n_u8(64))));
            max = vmaxq_u8(max, code);
            n_over = vsubq_u8(n_over, vcgtq_u8(code, fits));
            n_nan = vsubq_u8(n_nan, vceqq_u8(code, vdupq_n_u8(FP8_NAN)));
            n_lossy = vaddq_u8(n_lossy, vshrq_n_u8(entry, 7));
            if (dst) vst1q_u8(dst + i, vbslq_u8(magnitude, entry, byte));
        }
        over += vaddlvq_u8(n_over);
        lossy += vaddlvq_u8(n_lossy);
        nan += vaddlvq_u8(n_nan);
    }
    counts->above += over - nan;
    counts->lossy += lossy;
    counts->nan += nan;
    counts->max = vmaxvq_u8(max);
    fp8_translate_portable(src + i, dst ? dst + i : NULL, n - i, table, counts);
}
#endif

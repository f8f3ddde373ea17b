/* The byte: sign, 4 bits of exponent (bias 7), 3 of mantissa. What every C file here knows of it is said once, here. */
#ifndef NEURON_FP8_FORMAT_H
#define NEURON_FP8_FORMAT_H

#include <stddef.h>
#include <stdint.h>

#define FP8_SIGN 0x80
#define FP8_MAGNITUDE 0x7f   /* mask of the magnitude code */
#define FP8_NAN 0x7f         /* the one magnitude code of e4m3fn that is NaN */
#define FP8_LARGEST_FIT 0x77 /* 240: the largest code that Neuron reads as a finite value */
#define FP8_CODES 128        /* magnitude codes */

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FP8_HAVE_AVX2 1
#endif
#if defined(__aarch64__)
#define FP8_HAVE_NEON 1
#endif

/* A function of its own to read and debug; inlined, so that constant arguments cost nothing. */
#define FP8_INLINE static inline __attribute__((always_inline))

#endif

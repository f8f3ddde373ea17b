/* Reading a long run of a file into many places, and translating what is FP8 while it is in cache. */
#ifndef NEURON_FP8_READ_H
#define NEURON_FP8_READ_H

#include "codes.h"

/* What becomes of the bytes of a segment. */
enum {
    FP8_KEEP,   /* nothing */
    FP8_COUNT,  /* they are counted */
    FP8_DECIDE, /* they are counted; and translated from the first piece on that finds the decision made, or makes it,
                   because one of its codes is above FP8_LARGEST_FIT */
    FP8_HOWS
};

/* Bytes that follow each other in the file and in memory. All fields are one word each: Python writes and reads them
 * as an array. */
typedef struct {
    uint64_t at, size;     /* where they go */
    uint64_t from, to;     /* the tensor that they are a part of: memory in the same mapping, all of it fresh */
    uint64_t how;
    uint64_t table;        /* which one; of FP8_KEEP any */
    uint64_t cell;         /* of FP8_DECIDE: which decision */
    uint64_t max, above, lossy, nan; /* what was counted is added to these */
    uint64_t put_off;      /* so many bytes from `at` on wait for the decision, translated by nobody yet */
} fp8_segment;
#define FP8_SEGMENT_WORDS 12

typedef struct {
    int handle;
    uint64_t offset;           /* in the file, of the first segment */
    size_t piece;              /* bytes to read before they are translated; of what is not cached, a few times that */
    uint64_t nanoseconds;      /* return after about so long, that the caller may look after signals */
    int direct;                /* read what is not cached past the cache, where the file system lets it */
    fp8_translate_fn translate;
    const uint8_t *tables;     /* FP8_CODES bytes each */
    uint8_t *cells;            /* cell 0 is for this function and begins as 0; in the others, one byte a decision, not
                                  0 says that it is made. Threads share them. */
} fp8_reader;

#define FP8_FILE_ENDS (-1)

/* Go on after `done` bytes of the segments. Returns how many are done then; of the others some may be read, but none
 * is translated or counted. *error: 0; or what ended it at the byte returned: an errno, or FP8_FILE_ENDS. */
uint64_t fp8_read(const fp8_reader *reader, fp8_segment *segments, size_t n, uint64_t done, int *error);

#endif

#include "module.h" /* first: it includes Python.h */
#include "read.h"

/* Would the reader write where it may, and look up what is there? */
static int check_segments(const fp8_segment *segments, size_t n, size_t tables, size_t cells, uint64_t *total) {
    *total = 0;
    for (size_t i = 0; i < n; i++) {
        const fp8_segment *s = segments + i;
        const char *wrong = s->how >= FP8_HOWS                                      ? "does nothing known"
                            : s->table >= tables && s->how != FP8_KEEP              ? "has no such table"
                            : s->cell >= cells || (!s->cell && s->how == FP8_DECIDE) ? "has no such cell"
                            : !s->at || !s->size || s->size > UINT64_MAX - s->at    ? "has no memory"
                            : s->at < s->from || s->at + s->size > s->to            ? "is not within its tensor"
                            : s->size > PY_SSIZE_T_MAX - *total                     ? "is larger than any memory"
                                                                                    : NULL;
        if (wrong) {
            PyErr_Format(PyExc_ValueError, "read: segment %zu %s", i, wrong);
            return 0;
        }
        *total += s->size;
    }
    return 1;
}

PyObject *module_read(PyObject *self, PyObject *args) {
    const char *name;
    span segments, tables, cells;
    int handle, direct;
    unsigned long long offset, done, piece, nanoseconds;
    uint64_t total;
    (void)self;
    if (!PyArg_ParseTuple(args, "siKKKKpKnKnKn:read", &name, &handle, &offset, &done, &piece, &nanoseconds, &direct,
                          &segments.at, &segments.size, &tables.at, &tables.size, &cells.at, &cells.size))
        return NULL;
    const size_t n = segments.size < 0 ? 0 : (size_t)segments.size / sizeof(fp8_segment);
    const size_t n_tables = tables.size < 0 ? 0 : (size_t)tables.size / FP8_CODES;
    const size_t n_cells = cells.size < 0 ? 0 : (size_t)cells.size;
    if (!check_span("read: segments", segments, n * FP8_SEGMENT_WORDS, sizeof(uint64_t)) ||
        !check_span("read: tables", tables, n_tables * FP8_CODES, 1) ||
        !check_span("read: cells", cells, n_cells, 1))
        return NULL;
    fp8_segment *first = (fp8_segment *)(uintptr_t)segments.at;
    if (!check_segments(first, n, n_tables, n_cells, &total)) return NULL;
    if (!n_cells || !piece || piece > UINT32_MAX || done > total || offset > INT64_MAX - total) {
        PyErr_SetString(PyExc_ValueError, "read: no cell, no piece, or nothing of the file is meant");
        return NULL;
    }
    const fp8_reader reader = {handle, offset, (size_t)piece, nanoseconds, direct, translator(name),
                               (const uint8_t *)(uintptr_t)tables.at, (uint8_t *)(uintptr_t)cells.at};
    if (!reader.translate) return NULL;
    int error;
    Py_BEGIN_ALLOW_THREADS
    done = fp8_read(&reader, first, n, done, &error);
    Py_END_ALLOW_THREADS
    return Py_BuildValue("(Ki)", done, error);
}

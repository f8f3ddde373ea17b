/* Python binding of the kernels: stable ABI, one wheel for every Python from 3.10.
 *
 * Memory is passed as an address and a size (the buffer protocol joined the stable ABI only with Python 3.11);
 * kernel.py, the one caller, holds the tensors alive. Every size is checked against the shapes before it is used.
 */
#include "arguments.h" /* first: it includes Python.h */

#include <math.h>
#include <string.h>

#include "codes.h"
#include "dequantize.h"
#include "module.h"
#include "place.h"
#include "requantize.h"

/* Below this a call is shorter than giving up the GIL and taking it back. */
#define RELEASE_GIL_FROM 4096

static const struct {
    const char *name;
    fp8_translate_fn translate;
    const fp8_requantizer *requantizer;
    const fp8_dequantizer *dequantizer;
} PATHS[] = {
#ifdef FP8_HAVE_AVX2
    {"avx2", fp8_translate_avx2, &fp8_requantizer_avx2, &fp8_dequantizer_avx2},
#endif
#ifdef FP8_HAVE_NEON
    {"neon", fp8_translate_neon, &fp8_requantizer_neon, &fp8_dequantizer_portable},
#endif
    {"portable", fp8_translate_portable, &fp8_requantizer_portable, &fp8_dequantizer_portable},
};
#define N_PATHS (sizeof PATHS / sizeof *PATHS)

static int runs_here(const char *name) {
#ifdef FP8_HAVE_AVX2
    if (!strcmp(name, "avx2")) {
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx2") != 0;
    }
#endif
    (void)name;
    return 1;
}

static PyObject *paths(PyObject *self, PyObject *none) {
    (void)self;
    (void)none;
    PyObject *names = PyList_New(0);
    for (size_t i = 0; names && i < N_PATHS; i++) {
        if (!runs_here(PATHS[i].name)) continue;
        PyObject *name = PyUnicode_FromString(PATHS[i].name);
        if (!name || PyList_Append(names, name)) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

/* Index of a path that runs here, or -1 with an exception set. */
static int path_called(const char *name) {
    for (size_t i = 0; i < N_PATHS; i++)
        if (!strcmp(PATHS[i].name, name) && runs_here(name)) return (int)i;
    PyErr_Format(PyExc_ValueError, "no kernel path '%s' here", name);
    return -1;
}

fp8_translate_fn translator(const char *path) {
    const int found = path_called(path);
    return found < 0 ? NULL : PATHS[found].translate;
}

static const uint8_t *bytes_at(span memory) { return (const uint8_t *)(uintptr_t)memory.at; }

static uint8_t *writable(span memory) { return (uint8_t *)(uintptr_t)memory.at; }

static PyObject *translate(PyObject *self, PyObject *args) {
    const char *name;
    char *table;
    PyObject *bytes;
    span src, dst;
    Py_ssize_t table_size;
    (void)self;
    /* no "y#": what Python 3.13's headers make of it fails in older Pythons, and one build serves them all */
    if (!PyArg_ParseTuple(args, "sKnKnS:translate", &name, &src.at, &src.size, &dst.at, &dst.size, &bytes) ||
        PyBytes_AsStringAndSize(bytes, &table, &table_size) < 0)
        return NULL;
    const size_t n = src.size < 0 ? 0 : (size_t)src.size;
    if (!check_span("translate: src", src, n, 1) ||
        ((dst.at || dst.size) &&
         (!check_span("translate: dst", dst, n, 1) || !check_apart("translate: src and dst", src, dst))))
        return NULL;
    if (table_size != FP8_CODES) {
        PyErr_SetString(PyExc_ValueError, "translate: a table has 128 bytes");
        return NULL;
    }
    const int path = path_called(name);
    if (path < 0) return NULL;
    const fp8_translate_fn run = PATHS[path].translate;
    fp8_counts counts = {0, 0, 0, 0};
    if (n >= RELEASE_GIL_FROM) {
        Py_BEGIN_ALLOW_THREADS
        run(bytes_at(src), writable(dst), n, (const uint8_t *)table, &counts);
        Py_END_ALLOW_THREADS
    } else {
        run(bytes_at(src), writable(dst), n, (const uint8_t *)table, &counts);
    }
    return Py_BuildValue("(iKKK)", (int)counts.max, (unsigned long long)counts.above,
                         (unsigned long long)counts.lossy, (unsigned long long)counts.nan);
}

static PyObject *histogram(PyObject *self, PyObject *args) {
    span src;
    uint64_t counts[256] = {0};
    (void)self;
    if (!PyArg_ParseTuple(args, "Kn:histogram", &src.at, &src.size)) return NULL;
    const size_t n = src.size < 0 ? 0 : (size_t)src.size;
    if (!check_span("histogram: src", src, n, 1)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    fp8_histogram(bytes_at(src), n, counts);
    Py_END_ALLOW_THREADS
    return PyBytes_FromStringAndSize((const char *)counts, sizeof counts);
}

/* A matrix of codes and its blocks: two sizes and what is to lie at the two spans. */
static int check_grid(const char *what, const Py_ssize_t shape[4], fp8_grid *grid, size_t *codes, size_t *all_blocks) {
    for (int k = 0; k < 4; k++)
        if (k < 2 ? !check_length(what, shape[k]) : !check_block(what, shape[k])) return 0;
    *grid = (fp8_grid){(size_t)shape[0], (size_t)shape[1], (size_t)shape[2], (size_t)shape[3]};
    const size_t across = blocks(grid->columns, grid->width);
    return check_product(what, grid->rows, grid->columns, codes) &&
           check_product(what, blocks(grid->rows, grid->height), across, all_blocks);
}

/* Are all of them from `least` up, and below `end`? Others would make tables of nonsense. */
static int check_values(const char *what, const double *values, size_t n, double least, double end) {
    for (size_t i = 0; i < n; i++) {
        if (values[i] >= least && values[i] < end) continue;
        PyErr_Format(PyExc_ValueError, "%s: value %zu is out of range", what, i);
        return 0;
    }
    return 1;
}

static PyObject *best_mantissas(PyObject *self, PyObject *args) {
    span scales, errors, mantissas;
    Py_ssize_t rows, across;
    size_t n;
    (void)self;
    if (!PyArg_ParseTuple(args, "KnnnKnKn:best_mantissas", &scales.at, &scales.size, &rows, &across, &errors.at,
                          &errors.size, &mantissas.at, &mantissas.size))
        return NULL;
    if (!check_length("best_mantissas: rows", rows) || !check_length("best_mantissas: columns", across) ||
        !check_product("best_mantissas: shape", (size_t)rows, (size_t)across, &n) ||
        !check_span("best_mantissas: scales", scales, n, sizeof(double)) ||
        !check_span("best_mantissas: errors", errors, FP8_ERRORS, sizeof(float)) ||
        !check_span("best_mantissas: mantissas", mantissas, (size_t)rows, sizeof(double)))
        return NULL;
    const double *given = (const double *)(uintptr_t)scales.at;
    if (!check_values("best_mantissas: scales", given, n, 0, HUGE_VAL)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    fp8_best_mantissas(given, (size_t)rows, (size_t)across, (const float *)(uintptr_t)errors.at,
                       (double *)(uintptr_t)mantissas.at);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *requantize(PyObject *self, PyObject *args) {
    const char *name;
    span src, dst, scales, errors, row_scales;
    Py_ssize_t shape[4];
    fp8_grid grid;
    size_t n, n_blocks;
    (void)self;
    if (!PyArg_ParseTuple(args, "sKnKnnnnnKnKnKn:requantize", &name, &src.at, &src.size, &dst.at, &dst.size, shape,
                          shape + 1, shape + 2, shape + 3, &scales.at, &scales.size, &errors.at, &errors.size,
                          &row_scales.at, &row_scales.size))
        return NULL;
    if (!check_grid("requantize: shape", shape, &grid, &n, &n_blocks) ||
        !check_span("requantize: src", src, n, 1) || !check_span("requantize: dst", dst, n, 1) ||
        !check_apart("requantize: src and dst", src, dst) ||
        !check_span("requantize: scales", scales, n_blocks, sizeof(double)) ||
        !check_span("requantize: errors", errors, FP8_ERRORS, sizeof(float)) ||
        !check_span("requantize: row_scales", row_scales, grid.rows, sizeof(float)))
        return NULL;
    const double *old = (const double *)(uintptr_t)scales.at;
    /* a row's largest value may be 448 times its scale, and the new scale must be a float */
    if (!check_values("requantize: scales", old, n_blocks, 0, 0x1p126)) return NULL;
    const int path = path_called(name);
    if (path < 0) return NULL;
    fp8_error error = {0, 0};
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = fp8_requantize(PATHS[path].requantizer, bytes_at(src), writable(dst), &grid, old,
                            (const float *)(uintptr_t)errors.at, (float *)(uintptr_t)row_scales.at, &error);
    Py_END_ALLOW_THREADS
    if (failed) return PyErr_NoMemory();
    return Py_BuildValue("(dd)", error.signal, error.noise);
}

static PyObject *dequantize(PyObject *self, PyObject *args) {
    const char *name;
    span src, dst, scales;
    Py_ssize_t src_stride, dst_stride, rows, columns, height, width, top, left;
    size_t grid;
    (void)self;
    if (!PyArg_ParseTuple(args, "sKnnKnnnnnnnnKn:dequantize", &name, &src.at, &src.size, &src_stride, &dst.at,
                          &dst.size, &dst_stride, &rows, &columns, &height, &width, &top, &left, &scales.at,
                          &scales.size))
        return NULL;
    if (!check_length("dequantize: rows", rows) || !check_length("dequantize: columns", columns) ||
        !check_block("dequantize: height", height) || !check_block("dequantize: width", width) ||
        !check_length("dequantize: src_stride", src_stride) || !check_length("dequantize: dst_stride", dst_stride) ||
        !check_within("dequantize: top", top, height, rows) ||
        !check_within("dequantize: left", left, width, columns))
        return NULL;
    const fp8_part part = {(size_t)rows, (size_t)columns, (size_t)src_stride, (size_t)dst_stride,
                           (size_t)height, (size_t)width, (size_t)top, (size_t)left};
    if (!check_rows("dequantize: src", src, part.rows, part.columns, part.src_stride, 1) ||
        !check_rows("dequantize: dst", dst, part.rows, part.columns, part.dst_stride, sizeof(uint16_t)) ||
        !check_product("dequantize: scales", blocks(part.top + part.rows, part.height),
                       blocks(part.left + part.columns, part.width), &grid) ||
        !check_span("dequantize: scales", scales, grid, sizeof(float)))
        return NULL;
    const int path = path_called(name);
    if (path < 0) return NULL;
    int nan = 0;
    if (rows && columns) {
        Py_BEGIN_ALLOW_THREADS
        nan = fp8_dequantize(PATHS[path].dequantizer, bytes_at(src), (uint16_t *)(uintptr_t)dst.at, &part,
                             (const float *)(uintptr_t)scales.at);
        Py_END_ALLOW_THREADS
    }
    return PyBool_FromLong(nan);
}

static PyObject *place(PyObject *self, PyObject *args) {
    const char *name;
    span src, dst;
    Py_ssize_t rows, columns, stride;
    size_t n;
    (void)self;
    if (!PyArg_ParseTuple(args, "sKnnnKnn:place", &name, &src.at, &src.size, &rows, &columns, &dst.at, &dst.size,
                          &stride))
        return NULL;
    if (!check_length("place: rows", rows) || !check_length("place: columns", columns) ||
        !check_length("place: stride", stride) ||
        !check_product("place: src", (size_t)rows, (size_t)columns, &n) || !check_span("place: src", src, n, 1) ||
        !check_rows("place: dst", dst, (size_t)columns, (size_t)rows, (size_t)stride, 1))
        return NULL;
    const size_t reach = n ? (size_t)(columns - 1) * (size_t)stride + (size_t)rows : 0;
    if (n && src.at < dst.at + reach && dst.at < src.at + n) {
        PyErr_SetString(PyExc_ValueError, "place: src and dst overlap");
        return NULL;
    }
    const int path = path_called(name);
    if (path < 0) return NULL;
    const int vector = strcmp(name, "portable") != 0;
    Py_BEGIN_ALLOW_THREADS
    fp8_place(bytes_at(src), (size_t)rows, (size_t)columns, writable(dst), (size_t)stride, vector);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef METHODS[] = {
    {"paths", paths, METH_NOARGS, "paths() -> list[str]: the paths that run here, fastest first."},
    {"translate", translate, METH_VARARGS,
     "translate(path, src, src_size, dst, dst_size, table) -> (max, above, lossy, nan); dst 0, 0: count only."},
    {"histogram", histogram, METH_VARARGS, "histogram(src, size) -> bytes: 256 native uint64, how often each byte occurs."},
    {"best_mantissas", best_mantissas, METH_VARARGS,
     "best_mantissas(scales, size, rows, columns, errors, size, mantissas, size): one a row of scales."},
    {"requantize", requantize, METH_VARARGS,
     "requantize(path, src, size, dst, size, rows, columns, height, width, scales, size, errors, size, row_scales,"
     " size) -> (signal, noise)."},
    {"dequantize", dequantize, METH_VARARGS,
     "dequantize(path, src, size, stride, dst, size, stride, rows, columns, height, width, top, left, scales, size)."},
    {"place", place, METH_VARARGS,
     "place(path, src, size, rows, columns, dst, size, stride): dst[c * stride + r] = src[r * columns + c], bytes."},
    {"read", module_read, METH_VARARGS,
     "read(path, handle, offset, done, piece, nanoseconds, direct, segments, size, tables, size, cells, size) -> (done, error)."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, "_kernel", "FP8 code translation.", -1, METHODS, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__kernel(void) { return PyModule_Create(&MODULE); }

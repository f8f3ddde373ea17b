/* Python binding of the kernels: stable ABI, one wheel for every Python from 3.10.
 *
 * Memory is passed as an address and a length (the buffer protocol joined the stable ABI only with
 * Python 3.11); kernel.py, the one caller, holds the tensors alive and has checked their sizes.
 */
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <string.h>

#include "codes.h"
#include "place.h"
#include "requantize.h"

/* Below this a call is shorter than giving up the GIL and taking it back. */
#define RELEASE_GIL_FROM 4096

static const struct {
    const char *name;
    fp8_translate_fn translate;
    fp8_run_fn run;
} PATHS[] = {
#ifdef FP8_HAVE_AVX2
    {"avx2", fp8_translate_avx2, fp8_run_avx2},
#endif
#ifdef FP8_HAVE_NEON
    {"neon", fp8_translate_neon, fp8_run_portable},
#endif
    {"portable", fp8_translate_portable, fp8_run_portable},
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

static PyObject *translate(PyObject *self, PyObject *args) {
    const char *name;
    unsigned long long src, dst;
    Py_ssize_t n, table_size;
    const char *table;
    (void)self;
    if (!PyArg_ParseTuple(args, "sKKny#:translate", &name, &src, &dst, &n, &table, &table_size))
        return NULL;
    if (table_size != 128 || n < 0) {
        PyErr_SetString(PyExc_ValueError, "translate: a table has 128 bytes, a length is not negative");
        return NULL;
    }
    const int path = path_called(name);
    if (path < 0) return NULL;
    const fp8_translate_fn run = PATHS[path].translate;
    fp8_counts counts = {0, 0, 0, 0};
    const uint8_t *from = (const uint8_t *)(uintptr_t)src;
    uint8_t *to = (uint8_t *)(uintptr_t)dst;
    if (n >= RELEASE_GIL_FROM) {
        Py_BEGIN_ALLOW_THREADS
        run(from, to, (size_t)n, (const uint8_t *)table, &counts);
        Py_END_ALLOW_THREADS
    } else {
        run(from, to, (size_t)n, (const uint8_t *)table, &counts);
    }
    return Py_BuildValue("(iKKK)", (int)counts.max, (unsigned long long)counts.above,
                         (unsigned long long)counts.lossy, (unsigned long long)counts.nan);
}

static PyObject *histogram(PyObject *self, PyObject *args) {
    unsigned long long src;
    Py_ssize_t n;
    uint64_t counts[256] = {0};
    (void)self;
    if (!PyArg_ParseTuple(args, "Kn:histogram", &src, &n)) return NULL;
    if (n < 0) {
        PyErr_SetString(PyExc_ValueError, "histogram: a length is not negative");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    fp8_histogram((const uint8_t *)(uintptr_t)src, (size_t)n, counts);
    Py_END_ALLOW_THREADS
    return PyBytes_FromStringAndSize((const char *)counts, sizeof counts);
}

static PyObject *run_max(PyObject *self, PyObject *args) {
    unsigned long long src, out;
    Py_ssize_t rows, columns, width;
    (void)self;
    if (!PyArg_ParseTuple(args, "KnnnK:run_max", &src, &rows, &columns, &width, &out)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    fp8_run_max((const uint8_t *)(uintptr_t)src, (size_t)rows, (size_t)columns, (size_t)width,
                (uint8_t *)(uintptr_t)out);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *requantize(PyObject *self, PyObject *args) {
    const char *name;
    unsigned long long src, dst, before, after;
    Py_ssize_t rows, columns, height, width;
    (void)self;
    if (!PyArg_ParseTuple(args, "sKKnnnnKK:requantize", &name, &src, &dst, &rows, &columns, &height, &width,
                          &before, &after))
        return NULL;
    const int path = path_called(name);
    if (path < 0) return NULL;
    fp8_error error = {0, 0};
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = fp8_requantize(PATHS[path].run, (const uint8_t *)(uintptr_t)src, (uint8_t *)(uintptr_t)dst,
                            (size_t)rows, (size_t)columns, (size_t)height, (size_t)width,
                            (const double *)(uintptr_t)before, (const double *)(uintptr_t)after, &error);
    Py_END_ALLOW_THREADS
    if (failed) return PyErr_NoMemory();
    return Py_BuildValue("(dd)", error.signal, error.noise);
}

static PyMethodDef METHODS[] = {
    {"paths", paths, METH_NOARGS, "paths() -> list[str]: the paths that run here, fastest first."},
    {"translate", translate, METH_VARARGS,
     "translate(path, src, dst, n, table) -> (max, above, lossy, nan); dst 0: count only."},
    {"histogram", histogram, METH_VARARGS, "histogram(src, n) -> bytes: 256 native uint64, how often each byte occurs."},
    {"run_max", run_max, METH_VARARGS,
     "run_max(src, rows, columns, width, out): largest finite magnitude code of each run of each row."},
    {"requantize", requantize, METH_VARARGS,
     "requantize(path, src, dst, rows, columns, height, width, before, after) -> (signal, noise)."},
    FP8_PLACE_METHOD,
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, "_kernel", "FP8 code translation.", -1, METHODS, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__kernel(void) { return PyModule_Create(&MODULE); }

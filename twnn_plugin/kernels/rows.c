/* What a step of a solve does besides evaluating f, row by row, in one pass over the rows.
 *
 * Written as operations of torch, the same arithmetic is a dozen calls and as many passes over memory: on small
 * states the calls are the time, on large ones the passes. Here each row is read while it is in the cache.
 *
 * The functions are given addresses; kernels/rows.py checks what lies there.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define VERSION 11 /* of the arguments; another one in kernels/switch.py means that this was built before it */
#define MARKS 4   /* of a row */
#define SLOTS 64  /* of a history at most, as in kernels/rows.py */
#define LANES 32   /* partial sums, see passes.h */
#define BLOCK 4096 /* numbers whose sum is added in double, a multiple of LANES */

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

/* One build for every x86-64 machine: the wider instructions are taken where they are found at run time. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES __attribute__((target_clones("avx2", "default")))
#endif
#else
#define CLONES
#endif

enum { GONE, GOING, LEAVING };       /* of a row */
enum { ABSOLUTE, RELATIVE, SCALED }; /* of a stopping rule */
enum { PLAIN, BROYDEN, NEWTON };     /* who has a row, as in solvers/auto.py */
/* Of a row in kelley.h, as in kernels/kelley.py: the smallest residual so far, what it must fall to before patience
 * ends, the last change, evaluations without a grip, steps since the method began, steps that are kept, who has the
 * row, whether it was put back, and what the tolerance is relative to. */
enum { BEST, GOAL, CHANGE, WAITED, AGE, COUNT, MODE, LOST, SCALE, FIELDS };

typedef struct {
    int wide; /* double */
    ptrdiff_t rows, width;
    const void *f, *z;
    void *r, *measured; /* measured: or NULL */
    void *marks, *alive;
    const int64_t *parts; /* widths of `count` parts of a row to measure apart; 0: the row is one */
    int count;
    const void *born;   /* evaluations there had been when a row came */
    const void *places; /* of the rows in the whole batch */
    void *status, *steps, *residual;
    double tol, floor, growth, still, tiny;
    int rule, largest;
    int64_t now, patience, most; /* evaluations: so far, between looks for stagnation, of a row at most */
    int converged, max_iter, diverged, non_finite, stagnated;
} Look;

typedef struct {
    ptrdiff_t rows, width;
    const void *f, *z;
    const int64_t *places; /* of the rows of z in f; or NULL */
    const int64_t *status; /* of those, of which `meant` are looked at; or NULL: all */
    int64_t meant;
    double tol, floor, slack, rounding;
    int relative, largest;
    const int64_t *parts;
    int count;
} Moving;

typedef struct {
    int wide;
    ptrdiff_t rows, width;
    const void *f, *f_last, *last;
    void *r, *numbers, *next;
    double damping, restart, noise, blurred;
    int slots, newest, start;
    const int64_t *parts; /* widths of `count` parts of a row that may differ in units; 0: the row is one */
    int count;
    void *slot[SLOTS]; /* a pair of vectors a row; those that do not exist yet have no weight */
} Anderson;

typedef struct {
    int wide;
    ptrdiff_t rows, width;
    const void *z, *f, *r;
    void *numbers, *back, *next;
    double least; /* square of a step that is one */
    double singular, restart, tossed, soon, tol, floor;
    int memory, patience, rule, largest;
    const int64_t *parts; /* widths of `count` parts of a row to measure apart; 0: the row is one */
    int count;
    void *slot[SLOTS]; /* a vector a row; those that do not exist yet are nobody's */
} Kelley;

/* What a pass tells: rows that finished, and those among them whose value is the newest, not the last. */
typedef struct {
    ptrdiff_t rows, newest;
} Ended;

#define T float
#define N(name) name##_float
#define SQRT sqrtf
#define FABS fabsf
#include "passes.h"
#include "kelley.h"
#undef T
#undef N
#undef SQRT
#undef FABS

#define T double
#define N(name) name##_double
#define SQRT sqrt
#define FABS fabs
#include "passes.h"
#include "kelley.h"
#undef T
#undef N
#undef SQRT
#undef FABS

#include "gate.h"

typedef Ended Kernel(ptrdiff_t from, ptrdiff_t to, const void *job);

/* The rows in as many parts as there are threads; the sum of what the parts return. */
static Ended in_parts(Kernel *kernel, ptrdiff_t rows, const void *job, int threads)
{
    ptrdiff_t ended = 0, newest = 0;
    if (threads < 2)
        return kernel(0, rows, job);
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) reduction(+ : ended, newest)
#endif
    for (int part = 0; part < threads; part++) {
        const Ended some = kernel(rows * part / threads, rows * (part + 1) / threads, job);
        ended += some.rows;
        newest += some.newest;
    }
    const Ended sum = {ended, newest};
    return sum;
}

/* Arguments in order, until one is not what it should be: then PyErr_Occurred. */
typedef struct {
    PyObject *const *next;
} Given;

static void *address(Given *given)
{
    return PyLong_AsVoidPtr(*given->next++); /* 0: NULL */
}

static ptrdiff_t whole(Given *given)
{
    return PyLong_AsSsize_t(*given->next++);
}

static double real(Given *given)
{
    return PyFloat_AsDouble(*given->next++);
}

static int counted(Py_ssize_t count, Py_ssize_t wanted)
{
    if (count != wanted)
        PyErr_Format(PyExc_TypeError, "%zd arguments wanted; got %zd", wanted, count);
    return count == wanted;
}

/* A job from the bytes in which it was kept. */
static int made_before(PyObject *bytes, void *job, size_t size)
{
    if (!PyBytes_Check(bytes) || PyBytes_Size(bytes) != (Py_ssize_t)size) {
        PyErr_SetString(PyExc_TypeError, "a job that was made before is wanted first");
        return 0;
    }
    memcpy(job, PyBytes_AsString(bytes), size);
    return 1;
}

static PyObject *run(Kernel *kernel, ptrdiff_t rows, const void *job, int threads)
{
    Ended ended;
    if (PyErr_Occurred()) /* an argument is not what it should be */
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    ended = in_parts(kernel, rows, job, threads);
    Py_END_ALLOW_THREADS;
    return Py_BuildValue("nn", ended.rows, ended.newest);
}

/* What stays the same from look to look, as bytes: the arrays in it must outlive them. */
static PyObject *look_settings(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    if (!counted(count, 25))
        return NULL;
    Given given = {args};
    Look job = {.wide = (int)whole(&given)};
    job.width = whole(&given);
    job.marks = address(&given);
    job.alive = address(&given);
    job.born = address(&given);
    job.places = address(&given);
    job.status = address(&given);
    job.steps = address(&given);
    job.residual = address(&given);
    job.tol = real(&given);
    job.floor = real(&given);
    job.growth = real(&given);
    job.still = real(&given);
    job.tiny = real(&given);
    job.rule = (int)whole(&given);
    job.largest = (int)whole(&given);
    job.patience = whole(&given);
    job.most = whole(&given);
    job.converged = (int)whole(&given);
    job.max_iter = (int)whole(&given);
    job.diverged = (int)whole(&given);
    job.non_finite = (int)whole(&given);
    job.stagnated = (int)whole(&given);
    job.parts = address(&given);
    job.count = (int)whole(&given);
    if (PyErr_Occurred())
        return NULL;
    return PyBytes_FromStringAndSize((const char *)&job, sizeof(job));
}

static PyObject *look(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    if (!counted(count, 8))
        return NULL;
    Look job;
    if (!made_before(args[0], &job, sizeof(job)))
        return NULL;
    Given given = {args + 1};
    const int threads = (int)whole(&given);
    job.now = whole(&given);
    job.rows = whole(&given);
    job.f = address(&given);
    job.z = address(&given);
    job.r = address(&given);
    job.measured = address(&given);
    return run(job.wide ? look_double : look_float, job.rows, &job, threads);
}

/* How many rows lie farther apart than a rule and rounding allow. */
static PyObject *moving(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    if (!counted(count, 17))
        return NULL;
    Given given = {args};
    const int wide = (int)whole(&given), threads = (int)whole(&given);
    Moving job = {.rows = whole(&given)};
    job.width = whole(&given);
    job.f = address(&given);
    job.z = address(&given);
    job.places = address(&given);
    job.status = address(&given);
    job.meant = whole(&given);
    job.tol = real(&given);
    job.floor = real(&given);
    job.slack = real(&given);
    job.rounding = real(&given);
    job.relative = (int)whole(&given);
    job.largest = (int)whole(&given);
    job.parts = address(&given);
    job.count = (int)whole(&given);
    return run(wide ? moving_double : moving_float, job.rows, &job, threads);
}

/* Whether a row leaves with its newest value; one that is done does with the one that was measured. */
INLINE int given_up(int64_t status, int64_t max_iter, int64_t non_finite)
{
    return status == max_iter || status == non_finite;
}

/* The values of the rows that leave, one after the other, and their places in the whole batch; of rows that ran out
 * of evaluations or broke, the newest. */
static PyObject *store(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    if (!counted(count, 11))
        return NULL;
    Given given = {args};
    const ptrdiff_t rows = whole(&given);
    const size_t width = (size_t)whole(&given); /* bytes of a row */
    const char *f = address(&given), *z = address(&given);
    unsigned char *alive = address(&given);
    const int64_t *places = address(&given), *status = address(&given);
    char *value = address(&given);
    int64_t *stored = address(&given);
    const int64_t max_iter = whole(&given), non_finite = whole(&given);
    if (PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    for (ptrdiff_t row = 0; row < rows; row++) {
        if (alive[row] != LEAVING)
            continue;
        const int64_t place = places[row];
        memcpy(value, (given_up(status[place], max_iter, non_finite) ? f : z) + (size_t)row * width, width);
        value += width;
        *stored++ = place;
        alive[row] = GONE;
    }
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

/* Rows that lie one after the other, to their places in the whole batch. */
static PyObject *spread(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    if (!counted(count, 5))
        return NULL;
    Given given = {args};
    const ptrdiff_t rows = whole(&given);
    const size_t width = (size_t)whole(&given); /* bytes of a row */
    const char *value = address(&given);
    const int64_t *places = address(&given);
    char *batch = address(&given);
    if (PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    for (ptrdiff_t row = 0; row < rows; row++)
        memcpy(batch + (size_t)places[row] * width, value + (size_t)row * width, width);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

/* All rows of a batch come at once, and go on. */
static PyObject *begin(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    if (!counted(count, 4))
        return NULL;
    Given given = {args};
    const ptrdiff_t rows = whole(&given);
    unsigned char *alive = address(&given);
    int64_t *born = address(&given), *places = address(&given);
    if (PyErr_Occurred())
        return NULL;
    for (ptrdiff_t row = 0; row < rows; row++) {
        alive[row] = GOING;
        born[row] = 0;
        places[row] = row;
    }
    Py_RETURN_NONE;
}

/* A list of whole numbers; NULL with an error set. */
static PyObject *list_of(Given *given)
{
    PyObject *list = *given->next++;
    if (PyList_Check(list))
        return list;
    PyErr_SetString(PyExc_TypeError, "a list of whole numbers is wanted");
    return NULL;
}

/* Rows come one by one: they go on, their evaluations count from now, and what becomes of them is to be written to
 * the places in the second list. */
static PyObject *enter(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    if (!counted(count, 6))
        return NULL;
    Given given = {args};
    unsigned char *alive = address(&given);
    int64_t *born = address(&given), *places = address(&given);
    const int64_t now = whole(&given);
    PyObject *rows = list_of(&given), *to = rows ? list_of(&given) : NULL;
    if (!to || PyErr_Occurred())
        return NULL;
    if (!counted(PyList_Size(to), PyList_Size(rows)))
        return NULL;
    for (Py_ssize_t at = 0; at < PyList_Size(rows); at++) {
        const ptrdiff_t row = PyLong_AsSsize_t(PyList_GetItem(rows, at));
        const int64_t place = PyLong_AsLongLong(PyList_GetItem(to, at));
        if (PyErr_Occurred())
            return NULL;
        alive[row] = GOING;
        born[row] = now;
        places[row] = place;
    }
    Py_RETURN_NONE;
}

/* The rows that finished in the last look, as a list; their values to their places among all, of rows that ran out of
 * evaluations or broke the newest. */
static PyObject *leave(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    if (!counted(count, 10))
        return NULL;
    Given given = {args};
    const ptrdiff_t rows = whole(&given);
    const size_t width = (size_t)whole(&given); /* bytes of a row */
    const char *f = address(&given), *z = address(&given);
    unsigned char *alive = address(&given);
    const int64_t *places = address(&given), *status = address(&given);
    char *values = address(&given);
    const int64_t max_iter = whole(&given), non_finite = whole(&given);
    if (PyErr_Occurred())
        return NULL;
    PyObject *left = PyList_New(0);
    for (ptrdiff_t row = 0; left && row < rows; row++) {
        if (alive[row] != LEAVING)
            continue;
        PyObject *number = PyLong_FromSsize_t(row);
        if (!number || PyList_Append(left, number) < 0)
            Py_CLEAR(left);
        Py_XDECREF(number);
        const int64_t place = places[row];
        const char *from = given_up(status[place], max_iter, non_finite) ? f : z;
        memcpy(values + (size_t)place * width, from + (size_t)row * width, width);
        alive[row] = GONE;
    }
    return left;
}

/* The rows that go on, moved to the front of their arrays; where they were goes to `kept`. */
static PyObject *compact(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    if (!counted(count, 6))
        return NULL;
    Given given = {args};
    const size_t width = (size_t)whole(&given) * MARKS; /* bytes of a row's marks */
    const ptrdiff_t rows = whole(&given);
    char *marks = address(&given);
    unsigned char *alive = address(&given);
    int64_t *places = address(&given), *kept = address(&given);
    if (PyErr_Occurred())
        return NULL;
    ptrdiff_t there = 0;
    for (ptrdiff_t row = 0; row < rows; row++) {
        if (alive[row] != GOING)
            continue;
        memmove(marks + (size_t)there * width, marks + (size_t)row * width, width);
        places[there] = places[row];
        alive[there] = GOING;
        kept[there++] = row;
    }
    return PyLong_FromSsize_t(there);
}

/* Rows of matrices moved to the front of each, in the order of `kept`, which ascends. */
static PyObject *shrink(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    if (count < 2 || count % 2)
        return PyErr_Format(PyExc_TypeError, "rows, and a pair for each matrix, wanted; got %zd arguments", count);
    Given given = {args};
    const int64_t *kept = address(&given);
    const ptrdiff_t rows = whole(&given);
    for (Py_ssize_t at = 2; at < count; at += 2) {
        char *matrix = address(&given);
        const size_t width = (size_t)whole(&given); /* bytes of a row */
        if (PyErr_Occurred())
            return NULL;
        Py_BEGIN_ALLOW_THREADS;
        for (ptrdiff_t row = 0; row < rows; row++)
            if (kept[row] != row)
                memcpy(matrix + (size_t)row * width, matrix + (size_t)kept[row] * width, width);
        Py_END_ALLOW_THREADS;
    }
    Py_RETURN_NONE;
}

/* What stays the same from step to step, as bytes. */
static PyObject *anderson_settings(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    if (!counted(count, 10))
        return NULL;
    Given given = {args};
    Anderson job = {.wide = (int)whole(&given)};
    job.width = whole(&given);
    job.damping = real(&given);
    job.restart = real(&given);
    job.noise = real(&given);
    job.blurred = real(&given);
    job.slots = (int)whole(&given);
    job.start = (int)whole(&given);
    job.parts = address(&given);
    job.count = (int)whole(&given);
    if (PyErr_Occurred())
        return NULL;
    return PyBytes_FromStringAndSize((const char *)&job, sizeof(job));
}

static PyObject *anderson(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    if (count < 10 || count > 10 + SLOTS)
        return PyErr_Format(PyExc_TypeError, "10 to %d arguments wanted; got %zd", 10 + SLOTS, count);
    Anderson job;
    if (!made_before(args[0], &job, sizeof(job)))
        return NULL;
    Given given = {args + 1};
    const int threads = (int)whole(&given);
    job.rows = whole(&given);
    job.newest = (int)whole(&given);
    job.f = address(&given);
    job.r = address(&given);
    job.f_last = address(&given);
    job.last = address(&given);
    job.numbers = address(&given);
    job.next = address(&given);
    for (Py_ssize_t slot = 0; slot < count - 10; slot++)
        job.slot[slot] = address(&given);
    return run(job.wide ? anderson_double : anderson_float, job.rows, &job, threads);
}

/* What stays the same from step to step, as bytes. */
static PyObject *kelley_settings(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    if (!counted(count, 15))
        return NULL;
    Given given = {args};
    Kelley job = {.wide = (int)whole(&given)};
    job.width = whole(&given);
    job.least = real(&given);
    job.singular = real(&given);
    job.restart = real(&given);
    job.tossed = real(&given);
    job.soon = real(&given);
    job.tol = real(&given);
    job.floor = real(&given);
    job.memory = (int)whole(&given);
    job.patience = (int)whole(&given);
    job.rule = (int)whole(&given);
    job.largest = (int)whole(&given);
    job.parts = address(&given);
    job.count = (int)whole(&given);
    if (PyErr_Occurred())
        return NULL;
    return PyBytes_FromStringAndSize((const char *)&job, sizeof(job));
}

static PyObject *kelley(PyObject *const *args, Py_ssize_t count, Kernel *single, Kernel *wide)
{
    if (count < 9 || count > 9 + SLOTS)
        return PyErr_Format(PyExc_TypeError, "9 to %d arguments wanted; got %zd", 9 + SLOTS, count);
    Kelley job;
    if (!made_before(args[0], &job, sizeof(job)))
        return NULL;
    Given given = {args + 1};
    const int threads = (int)whole(&given);
    job.rows = whole(&given);
    job.z = address(&given);
    job.f = address(&given);
    job.r = address(&given);
    job.numbers = address(&given);
    job.back = address(&given);
    job.next = address(&given);
    for (Py_ssize_t slot = 0; slot < count - 9; slot++)
        job.slot[slot] = address(&given);
    return run(job.wide ? wide : single, job.rows, &job, threads);
}

static PyObject *broyden(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    return kelley(args, count, broyden_float, broyden_double);
}

static PyObject *judge(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    return kelley(args, count, judge_float, judge_double);
}

static PyObject *automatic(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    return kelley(args, count, automatic_float, automatic_double);
}

/* What stays the same from pass to pass, as bytes. */
static PyObject *glance_settings(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    if (!counted(count, 14))
        return NULL;
    Given given = {args};
    Glance job = {.channels = whole(&given)};
    job.parts = whole(&given);
    job.hidden = whole(&given);
    job.scores = whole(&given);
    job.w1 = address(&given);
    job.b1 = address(&given);
    job.w2 = address(&given);
    job.b2 = address(&given);
    job.threshold = address(&given);
    job.mean = address(&given);
    job.variance = address(&given);
    job.eps = real(&given);
    job.least = real(&given);
    job.slope = (float)real(&given);
    if (PyErr_Occurred())
        return NULL;
    return PyBytes_FromStringAndSize((const char *)&job, sizeof(job));
}

/* The scores, as bytes, and the threshold if nothing is above it; else None. */
static PyObject *glance(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    if (!counted(count, 6))
        return NULL;
    Glance job;
    if (!made_before(args[0], &job, sizeof(job)))
        return NULL;
    Given given = {args + 1};
    job.rows = whole(&given);
    job.positions = whole(&given);
    job.per_channel = whole(&given);
    job.per_position = whole(&given);
    job.x = address(&given);
    if (PyErr_Occurred())
        return NULL;
    const ptrdiff_t width = job.parts * job.channels;
    float *space = PyMem_Malloc((size_t)(width + ABREAST * (width + job.hidden)) * sizeof(float));
    if (!space)
        return PyErr_NoMemory();
    PyObject *told = NULL;
    PyObject *scores = PyByteArray_FromStringAndSize(NULL, job.rows * job.scores * (Py_ssize_t)sizeof(float));
    if (scores) {
        int closed;
        job.score = (float *)PyByteArray_AsString(scores);
        Py_BEGIN_ALLOW_THREADS;
        closed = all_closed(&job, space);
        Py_END_ALLOW_THREADS;
        told = closed ? Py_BuildValue("Od", scores, (double)*job.threshold) : Py_NewRef(Py_None);
        Py_DECREF(scores);
    }
    PyMem_Free(space);
    return told;
}

static PyMethodDef methods[] = {
    {"glance_settings", (PyCFunction)(void (*)(void))glance_settings, METH_FASTCALL, NULL},
    {"glance", (PyCFunction)(void (*)(void))glance, METH_FASTCALL, NULL},
    {"look_settings", (PyCFunction)(void (*)(void))look_settings, METH_FASTCALL, NULL},
    {"look", (PyCFunction)(void (*)(void))look, METH_FASTCALL, NULL},
    {"moving", (PyCFunction)(void (*)(void))moving, METH_FASTCALL, NULL},
    {"store", (PyCFunction)(void (*)(void))store, METH_FASTCALL, NULL},
    {"spread", (PyCFunction)(void (*)(void))spread, METH_FASTCALL, NULL},
    {"begin", (PyCFunction)(void (*)(void))begin, METH_FASTCALL, NULL},
    {"enter", (PyCFunction)(void (*)(void))enter, METH_FASTCALL, NULL},
    {"leave", (PyCFunction)(void (*)(void))leave, METH_FASTCALL, NULL},
    {"compact", (PyCFunction)(void (*)(void))compact, METH_FASTCALL, NULL},
    {"shrink", (PyCFunction)(void (*)(void))shrink, METH_FASTCALL, NULL},
    {"anderson_settings", (PyCFunction)(void (*)(void))anderson_settings, METH_FASTCALL, NULL},
    {"anderson", (PyCFunction)(void (*)(void))anderson, METH_FASTCALL, NULL},
    {"kelley_settings", (PyCFunction)(void (*)(void))kelley_settings, METH_FASTCALL, NULL},
    {"broyden", (PyCFunction)(void (*)(void))broyden, METH_FASTCALL, NULL},
    {"judge", (PyCFunction)(void (*)(void))judge, METH_FASTCALL, NULL},
    {"automatic", (PyCFunction)(void (*)(void))automatic, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static int fill(PyObject *module)
{
#if defined(_OPENMP)
    const int threaded = 1;
#else
    const int threaded = 0;
#endif
    if (PyModule_AddIntConstant(module, "VERSION", VERSION) < 0)
        return -1;
    return PyModule_AddIntConstant(module, "THREADED", threaded);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)fill}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_rows", "Passes over the rows of a batch; see kernels/rows.py.", 0, methods, slots,
    NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__rows(void)
{
    return PyModuleDef_Init(&definition);
}

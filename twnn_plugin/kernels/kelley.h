/* Broyden's method by its steps, for one type of numbers: included behind passes.h, whose sums it uses.
 *
 * A row's numbers are those of Row, and behind them 1 / ||s||^2 of each step s that it has kept.
 */

/* v, which holds the residual of a row, goes on by the steps of the row's past (Kelley 1995, section 7.3); what the
 * newest of them leaves to divide v by: 1 - c_m. */
INLINE T N(past)(const Kelley *job, ptrdiff_t row, T *restrict v, const T *inverse, int count)
{
    const ptrdiff_t at = row * job->width;
    T c = 0;
    for (int k = 0; k < count; k++) {
        c = inverse[k] * (T)N(dot)((const T *)job->slot[k] + at, v, job->width);
        if (k + 1 < count)
            N(subtract)(v, (const T *)job->slot[k + 1] + at, -c, job->width);
    }
    return 1 - c;
}

/* 1 / ||s||^2; zero for no step and where it would overflow. */
INLINE T N(inverted)(const T *s, ptrdiff_t n, T least)
{
    const T square = (T)N(dot)(s, s, n);
    return square > least ? 1 / square : 0;
}

/* The step from z by what is left in v, written to v as the next iterate and kept as the row's step number `count`,
 * if there is a place for it. */
INLINE void N(go)(const Kelley *job, ptrdiff_t row, T *restrict v, T rest, T *inverse, int count)
{
    const ptrdiff_t n = job->width;
    const T *restrict z = (const T *)job->z + row * n;
    T *restrict s = count < job->memory ? (T *)job->slot[count] + row * n : NULL;
    for (ptrdiff_t i = 0; i < n; i++)
        v[i] /= rest;
    if (s) {
        memcpy(s, v, (size_t)n * sizeof(T));
        inverse[count] = N(inverted)(s, n, (T)job->least);
    }
    for (ptrdiff_t i = 0; i < n; i++)
        v[i] += z[i];
}

/* A plain step, which is all of the past that is kept. */
INLINE void N(begin)(const Kelley *job, ptrdiff_t row, T *v, T *inverse)
{
    const size_t n = (size_t)job->width;
    const T *r = (const T *)job->r + row * job->width;
    memcpy(v, (const T *)job->f + row * job->width, n * sizeof(T));
    memcpy((T *)job->slot[0] + row * job->width, r, n * sizeof(T));
    *inverse = N(inverted)(r, job->width, (T)job->least);
}

/* Rows from..to of a step of Broyden's method; solvers/broyden.py says what is computed and why. */
CLONES static Ended N(broyden)(ptrdiff_t from, ptrdiff_t to, const void *given)
{
    const Kelley *job = given;
    const ptrdiff_t n = job->width;
    const Ended none = {0, 0};
    for (ptrdiff_t row = from; row < to; row++) {
        const T *r = (const T *)job->r + row * n;
        T *numbers = (T *)job->numbers + row * (FIELDS + job->memory), *inverse = numbers + FIELDS;
        T *v = (T *)job->next + row * n;
        const T norm = N(norm)(r, n), best = numbers[BEST];
        if (numbers[AGE] == 0) {
            numbers[BEST] = norm;
            N(begin)(job, row, v, inverse);
            numbers[AGE] = numbers[COUNT] = 1;
            continue;
        }
        if (norm < best || norm != norm)
            numbers[BEST] = norm;
        memcpy(v, r, (size_t)n * sizeof(T));
        const T rest = N(past)(job, row, v, inverse, (int)numbers[COUNT]);
        const int sound = norm <= (T)job->restart * best && FABS(rest) > (T)job->singular;
        const int full = numbers[AGE] == job->memory;
        numbers[AGE] = full ? 1 : numbers[AGE] + 1;
        if (sound) {
            const int count = full ? 0 : (int)numbers[COUNT];
            N(go)(job, row, v, rest, inverse, count);
            numbers[COUNT] = count + 1;
        } else {
            N(begin)(job, row, v, inverse);
            numbers[COUNT] = 1;
        }
    }
    return none;
}

/* Rows from..to before a step of auto: those that plain steps will not finish soon are accelerated from now on. How
 * many are, now or since earlier; the last plain step of the others is kept. */
CLONES static Ended N(judge)(ptrdiff_t from, ptrdiff_t to, const void *given)
{
    const Kelley *job = given;
    const ptrdiff_t n = job->width;
    const T tol = (T)job->tol, floor = (T)job->floor;
    Ended fast = {0, 0};
    for (ptrdiff_t row = from; row < to; row++) {
        const T *r = (const T *)job->r + row * n;
        T *numbers = (T *)job->numbers + row * (FIELDS + job->memory);
        if (numbers[MODE] != PLAIN) {
            fast.rows++;
            continue;
        }
        T change, size;
        N(worst)((const T *)job->f + row * n, (const T *)job->z + row * n, NULL, 0, n, job->parts, job->count,
                 job->largest, floor, &change, &size);
        const T bound = job->rule == SCALED ? tol * numbers[SCALE] : job->rule == RELATIVE ? tol * (size + floor) : tol;
        const T before = numbers[CHANGE];
        numbers[CHANGE] = change;
        /* Plain steps still needed: log(change / bound) / log(before / change). */
        const int soon = change < before && change / bound <= (T)pow((double)(before / change), job->soon);
        if (!soon && isfinite(before)) {
            numbers[MODE] = BROYDEN;
            numbers[COUNT] = 1;
            numbers[FIELDS] = N(inverted)((const T *)job->slot[0] + row * n, n, (T)job->least);
            fast.rows++;
        } else {
            memcpy((T *)job->slot[0] + row * n, r, (size_t)n * sizeof(T));
        }
    }
    return fast;
}

/* Rows from..to of a step of auto, but for what Newton's method does in its rows; solvers/auto.py says what is
 * computed and why. How many rows were put back to their best state, and how many are Newton's now. */
CLONES static Ended N(automatic)(ptrdiff_t from, ptrdiff_t to, const void *given)
{
    const Kelley *job = given;
    const ptrdiff_t n = job->width;
    Ended told = {0, 0};
    for (ptrdiff_t row = from; row < to; row++) {
        const T *f = (const T *)job->f + row * n, *r = (const T *)job->r + row * n;
        T *numbers = (T *)job->numbers + row * (FIELDS + job->memory), *inverse = numbers + FIELDS;
        T *v = (T *)job->next + row * n, *back = (T *)job->back + row * n;
        numbers[LOST] = 0;
        if (numbers[MODE] == PLAIN) {
            memcpy(v, f, (size_t)n * sizeof(T));
            continue;
        }
        const int newton = numbers[MODE] == NEWTON;
        if (!newton) {
            const int count = (int)numbers[COUNT];
            memcpy(v, r, (size_t)n * sizeof(T));
            const T rest = N(past)(job, row, v, inverse, count);
            if (FABS(rest) > (T)job->singular && numbers[AGE] < job->memory) {
                N(go)(job, row, v, rest, inverse, count);
                numbers[COUNT] = count < job->memory ? count + 1 : count;
                numbers[AGE] += 1;
            } else {
                N(begin)(job, row, v, inverse);
                numbers[COUNT] = 1;
                numbers[AGE] = 0;
            }
        }
        const T norm = N(norm)(r, n);
        if (norm < numbers[BEST]) {
            numbers[BEST] = norm;
            memcpy(back, f, (size_t)n * sizeof(T));
        }
        const T best = numbers[BEST];
        if (best <= numbers[GOAL]) {
            numbers[GOAL] = (T)0.5 * best;
            numbers[WAITED] = 0;
        } else if (newton || norm > (T)job->tossed * best) {
            numbers[WAITED] += 1;
        }
        const int weary = numbers[WAITED] >= job->patience;
        if (weary) {
            numbers[GOAL] = (T)0.5 * best;
            numbers[WAITED] = 0;
            numbers[MODE] = newton ? BROYDEN : NEWTON;
        }
        if (weary || norm > (T)job->restart * best) {
            numbers[LOST] = 1;
            numbers[AGE] = numbers[COUNT] = 0;
            memcpy(v, back, (size_t)n * sizeof(T));
            told.rows++;
        }
        told.newest += numbers[MODE] == NEWTON;
    }
    return told;
}

/* Broyden's method by its steps, for one type of numbers: included behind passes.h, whose sums it uses.
 *
 * A row's numbers are those of Row, and behind them 1 / ||s||^2 of each step s that it has kept.
 */

/* v becomes v + c * s; the product of s with it, in the same pass. */
INLINE T N(along)(T *restrict v, const T *restrict s, T c, ptrdiff_t n)
{
    double sum = 0;
    for (ptrdiff_t from = 0; from < n; from += BLOCK) {
        const ptrdiff_t to = from + BLOCK < n ? from + BLOCK : n;
        T lane[LANES] = {0};
        ptrdiff_t i = from;
        for (; i + LANES <= to; i += LANES)
            for (int j = 0; j < LANES; j++) {
                v[i + j] += c * s[i + j];
                lane[j] += s[i + j] * v[i + j];
            }
        for (int j = 0; i < to; i++, j++) {
            v[i] += c * s[i];
            lane[j] += s[i] * v[i];
        }
        sum += N(folded)(lane);
    }
    return (T)sum;
}

/* v becomes the residual r of a row, and goes on by the steps of the row's past (Kelley 1995, section 7.3); what the
 * newest of them leaves to divide v by: 1 - c_m. */
INLINE T N(past)(const Kelley *job, ptrdiff_t row, T *restrict v, const T *restrict r, const T *inverse, int count)
{
    const ptrdiff_t at = row * job->width, n = job->width;
    memcpy(v, r, (size_t)n * sizeof(T));
    if (count == 0)
        return 1;
    T c = inverse[0] * (T)N(dot)((const T *)job->slot[0] + at, v, n);
    for (int k = 1; k < count; k++)
        c = inverse[k] * N(along)(v, (const T *)job->slot[k] + at, c, n);
    return 1 - c;
}

/* 1 / ||s||^2 of its square; zero for no step and where it would overflow. */
INLINE T N(inverted)(T square, T least)
{
    return square > least ? 1 / square : 0;
}

/* The step from z by what is left in v, written to v as the next iterate and kept as the row's step number `count`,
 * if there is a place for it. */
INLINE void N(go)(const Kelley *job, ptrdiff_t row, T *restrict v, T rest, T *inverse, int count)
{
    const ptrdiff_t n = job->width;
    const T *restrict z = (const T *)job->z + row * n;
    if (count >= job->memory) {
        for (ptrdiff_t i = 0; i < n; i++)
            v[i] = z[i] + v[i] / rest;
        return;
    }
    T *restrict s = (T *)job->slot[count] + row * n;
    double square = 0;
    for (ptrdiff_t from = 0; from < n; from += BLOCK) {
        const ptrdiff_t to = from + BLOCK < n ? from + BLOCK : n;
        T lane[LANES] = {0};
        ptrdiff_t i = from;
        for (; i + LANES <= to; i += LANES)
            for (int j = 0; j < LANES; j++) {
                const T step = v[i + j] / rest;
                s[i + j] = step;
                lane[j] += step * step;
                v[i + j] = z[i + j] + step;
            }
        for (int j = 0; i < to; i++, j++) {
            const T step = v[i] / rest;
            s[i] = step;
            lane[j] += step * step;
            v[i] = z[i] + step;
        }
        square += N(folded)(lane);
    }
    inverse[count] = N(inverted)((T)square, (T)job->least);
}

/* A plain step, which is all of the past that is kept. */
INLINE void N(begin)(const Kelley *job, ptrdiff_t row, T *v, T *inverse)
{
    const size_t n = (size_t)job->width;
    const T *r = (const T *)job->r + row * job->width;
    memcpy(v, (const T *)job->f + row * job->width, n * sizeof(T));
    memcpy((T *)job->slot[0] + row * job->width, r, n * sizeof(T));
    *inverse = N(inverted)((T)N(dot)(r, r, job->width), (T)job->least);
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
        const T rest = N(past)(job, row, v, r, inverse, (int)numbers[COUNT]);
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
            const T *s = (const T *)job->slot[0] + row * n;
            numbers[FIELDS] = N(inverted)((T)N(dot)(s, s, n), (T)job->least);
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
            const T rest = N(past)(job, row, v, r, inverse, count);
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

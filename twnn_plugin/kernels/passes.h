/* The kernels for one type of numbers. Included once for each:
 *   T      the type
 *   N(x)   the name of x for that type
 *   SQRT   its square root
 *   FABS   its absolute value
 *
 * Sums run in LANES partial sums, so that the compiler may use vector registers without being allowed to
 * reorder anything, and in blocks whose sums are added in double: what long rows lose to rounding stays small.
 */

INLINE double N(folded)(T *lane)
{
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++)
            lane[i] += lane[i + width];
    return (double)lane[0];
}

INLINE double N(dot)(const T *restrict a, const T *restrict b, ptrdiff_t n)
{
    double sum = 0;
    for (ptrdiff_t from = 0; from < n; from += BLOCK) {
        const ptrdiff_t to = from + BLOCK < n ? from + BLOCK : n;
        T lane[LANES] = {0};
        ptrdiff_t i = from;
        for (; i + LANES <= to; i += LANES)
            for (int j = 0; j < LANES; j++)
                lane[j] += a[i + j] * b[i + j];
        for (int j = 0; i < to; i++, j++)
            lane[j] += a[i] * b[i];
        sum += N(folded)(lane);
    }
    return sum;
}

/* y -= c * x, in place */
INLINE void N(subtract)(T *restrict y, const T *restrict x, T c, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i++)
        y[i] -= c * x[i];
}

/* The largest |f - z|; NaN if there is one. */
INLINE T N(largest)(const T *f, const T *z, ptrdiff_t n)
{
    T lane[LANES] = {0}, none = 0;
    ptrdiff_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) {
            const T size = FABS(f[i + j] - z[i + j]);
            lane[j] = size > lane[j] ? size : lane[j];
            none += size != size;
        }
    for (int j = 0; i < n; i++, j++) {
        const T size = FABS(f[i] - z[i]);
        lane[j] = size > lane[j] ? size : lane[j];
        none += size != size;
    }
    for (int j = 1; j < LANES; j++)
        lane[0] = lane[j] > lane[0] ? lane[j] : lane[0];
    return none > 0 ? (T)NAN : lane[0];
}

INLINE T N(norm)(const T *x, ptrdiff_t n)
{
    return n == 1 ? FABS(*x) : SQRT((T)N(dot)(x, x, n)); /* as torch, which squares no single number */
}

/* A row's residual r = f - z, which is written if it is to be kept, ||r|| and ||f||. */
INLINE void N(residual)(const T *restrict f, const T *restrict z, T *restrict r, int keep, ptrdiff_t n, T *change,
                        T *size)
{
    double rr = 0, ff = 0;
    for (ptrdiff_t from = 0; from < n; from += BLOCK) {
        const ptrdiff_t to = from + BLOCK < n ? from + BLOCK : n;
        T lane_r[LANES] = {0}, lane_f[LANES] = {0};
        ptrdiff_t i = from;
        for (; i + LANES <= to; i += LANES)
            for (int j = 0; j < LANES; j++) {
                const T d = f[i + j] - z[i + j];
                if (keep)
                    r[i + j] = d;
                lane_r[j] += d * d;
                lane_f[j] += f[i + j] * f[i + j];
            }
        for (int j = 0; i < to; i++, j++) {
            const T d = f[i] - z[i];
            if (keep)
                r[i] = d;
            lane_r[j] += d * d;
            lane_f[j] += f[i] * f[i];
        }
        rr += N(folded)(lane_r);
        ff += N(folded)(lane_f);
    }
    *change = n == 1 ? FABS(*f - *z) : SQRT((T)rr);
    *size = n == 1 ? FABS(*f) : SQRT((T)ff);
}

/* The same of the part of a row that is farthest from rest, relative to its own size; all of r is written, or none. */
INLINE void N(worst)(const T *f, const T *z, T *r, int keep, ptrdiff_t n, const int64_t *parts, int count, int largest,
                     T floor, T *change, T *size)
{
    T worst = -1;
    *change = *size = 0;
    for (int part = 0; part < (count ? count : 1); part++) {
        const ptrdiff_t width = count ? (ptrdiff_t)parts[part] : n;
        T c, s;
        N(residual)(f, z, r, keep, width, &c, &s);
        if (largest) {
            c = N(largest)(f, z, width);
            s /= SQRT((T)width);
        }
        /* NaN counts as the largest, and so does a part too large for its norm: no change is small beside that. */
        const T ratio = s < (T)INFINITY ? c / (s + floor) : (T)NAN;
        if (ratio > worst || (ratio != ratio && worst == worst)) {
            worst = ratio;
            *change = c;
            *size = s;
        }
        f += width;
        z += width;
        if (keep)
            r += width;
    }
}

/* Rows from..to of a look: measured, judged, and written down if they are finished. solvers/book.py has the
 * rules. A row's marks are the change from which on it has diverged, the change when stagnation was last looked
 * for, whether its last change was beyond the limit, and what the tolerance is relative to. */
CLONES static Ended N(look)(ptrdiff_t from, ptrdiff_t to, const void *given)
{
    const Look *job = given;
    const ptrdiff_t n = job->width;
    const T tol = (T)job->tol, floor = (T)job->floor, growth = (T)job->growth;
    Ended ended = {0, 0};
    for (ptrdiff_t row = from; row < to; row++) {
        T *r = (T *)job->r + row * n, *marks = (T *)job->marks + row * MARKS;
        T *limit = marks, *earlier = marks + 1, *over = marks + 2, *scale = marks + 3;
        T change, size;
        N(worst)((const T *)job->f + row * n, (const T *)job->z + row * n, r, 1, n, job->parts, job->count,
                 job->largest, floor, &change, &size);
        const T bound = job->rule == SCALED ? tol * *scale : job->rule == RELATIVE ? tol * (size + floor) : tol;
        if (job->measured) {
            ((T *)job->measured)[row] = change;
            ((T *)job->measured)[row + job->rows] = size;
            ((T *)job->measured)[row + 2 * job->rows] = bound;
        }
        const int64_t age = job->now - ((const int64_t *)job->born)[row];
        if (age == 1) { /* nothing is known of it yet */
            *limit = growth * (change + size);
            *earlier = (T)NAN;
            *over = 0;
        }
        int low = change < *limit; /* false for NaN */
        if (low) {
            *over = 0;
        } else { /* an accelerated step may overshoot and the next plain one return: twice over is divergence */
            low = *over == 0 && change < (T)INFINITY;
            *over = change < (T)INFINITY;
        }
        int stalled = 0;
        if (age % job->patience == 0) {
            stalled = change > (T)0.9 * *earlier && change <= (T)job->still * size;
            *earlier = change;
        }
        unsigned char *alive = (unsigned char *)job->alive + row;
        const int going_on = change > bound && low && !stalled;
        if (*alive != GOING || (going_on && age < job->most))
            continue;
        const int finite = isfinite(change) && isfinite(bound);
        const int close = change <= bound && finite;
        const int status = going_on ? job->max_iter : close ? job->converged : !finite ? job->non_finite
                           : stalled ? job->stagnated : job->diverged;
        const int64_t place = ((const int64_t *)job->places)[row];
        *alive = LEAVING;
        ended.rows++;
        ended.newest += going_on || !finite;
        ((int64_t *)job->status)[place] = status;
        ((int64_t *)job->steps)[place] = age;
        T *residual = (T *)job->residual + place;
        if (job->rule == SCALED)
            *residual = change / (*scale > (T)job->tiny ? *scale : (T)job->tiny);
        else
            *residual = job->rule == RELATIVE ? change / (size + floor) : change;
    }
    return ended;
}

/* Of rows from..to those whose worst part is farther apart than `slack` times the rule's bound and `rounding` times
 * its size, or has no distance (NaN). */
CLONES static Ended N(moving)(ptrdiff_t from, ptrdiff_t to, const void *given)
{
    const Moving *job = given;
    const ptrdiff_t n = job->width;
    const T floor = (T)job->floor, slack = (T)(job->slack * job->tol), rounding = (T)job->rounding;
    Ended found = {0, 0};
    for (ptrdiff_t row = from; row < to; row++) {
        if (job->status && job->status[row] != job->meant)
            continue;
        const T *f = (const T *)job->f + (job->places ? (ptrdiff_t)job->places[row] : row) * n;
        const T *z = (const T *)job->z + row * n;
        T change, size;
        N(worst)(f, z, NULL, 0, n, job->parts, job->count, job->largest, floor, &change, &size);
        found.rows += !(change <= slack * (job->relative ? size + floor : 1) + rounding * size);
    }
    return found;
}

/* A power of two near the rms of a part. */
INLINE T N(unit)(const T *f, ptrdiff_t width)
{
    int exponent;
    const T rms = N(norm)(f, width) / SQRT((T)width);
    if (!isfinite(rms) || !(rms > 0))
        return 1;
    frexp((double)rms, &exponent);
    return (T)ldexp(1.0, exponent - 1);
}

/* Rows from..to of a step of Anderson acceleration; solvers/anderson.py says what is computed and why. A row's
 * numbers are gamma and weight of each slot, the smallest residual so far, its blur, its age, and the unit of each
 * part of the state; the residual is left in units, as the next step's last one. */
CLONES static Ended N(anderson)(ptrdiff_t from, ptrdiff_t to, const void *given)
{
    const Anderson *job = given;
    const ptrdiff_t n = job->width;
    const int slots = job->slots, newest = job->newest, start = job->start;
    const int first = start > 1 ? start : 1; /* the age at which differences begin */
    const int64_t whole = n, *widths = job->count ? job->parts : &whole;
    const int count = job->count ? job->count : 1;
    const T restart = (T)job->restart, noise = (T)job->noise, blurred = (T)job->blurred;
    const T left = (T)(1 - job->damping); /* of the residual */
    const Ended none = {0, 0};
    for (ptrdiff_t row = from; row < to; row++) {
        const T *f = (const T *)job->f + row * n, *last = (const T *)job->last + row * n;
        T *r = (T *)job->r + row * n, *z = (T *)job->next + row * n;
        T *gamma = (T *)job->numbers + row * (2 * slots + 3 + job->count), *weight = gamma + slots;
        T *best = weight + slots, *blur = best + 1, *units = best + 3;
        const double age = best[2];
        best[2] += 1;
        memcpy(z, f, (size_t)n * sizeof(T));
        if (left != 0)
            N(subtract)(z, r, left, n);
        if (age < first - 1)
            continue;
        T *q = age < first ? NULL : (T *)job->slot[newest] + 2 * row * n; /* there may be no slot yet */
        T ff = 0; /* ||f||^2, in units */
        ptrdiff_t at = 0;
        for (int part = 0; part < count; part++) {
            const ptrdiff_t width = (ptrdiff_t)widths[part];
            if (job->count && age == first - 1)
                units[part] = N(unit)(f + at, width);
            const T inverse = job->count ? 1 / units[part] : 1; /* exact */
            if (job->count)
                for (ptrdiff_t i = at; i < at + width; i++)
                    r[i] *= inverse;
            if (age == start) {
                const T size = N(norm)(f + at, width) * inverse;
                ff = count > 1 ? ff + size * size : size;
            }
            at += width;
        }
        if (age < start)
            continue;
        const T norm = N(norm)(r, n);
        if (age == start) {
            *best = norm;
            *blur = blurred * (count > 1 ? SQRT(ff) : ff);
        } else if (norm < *best || norm != norm) {
            *best = norm;
        }
        if (age < first)
            continue;
        T *p = q + n;
        const T *f_last = (const T *)job->f_last + row * n;
        const int sound = norm <= *best * restart;
        for (ptrdiff_t i = 0; i < n; i++) {
            q[i] = r[i] - last[i];
            p[i] = f[i] - f_last[i];
        }
        for (int k = 1; k < slots; k++) { /* oldest first */
            const int slot = (newest + k) % slots;
            if (!sound)
                weight[slot] = 0;
            if (weight[slot] == 0)
                continue;
            const T *q_old = (const T *)job->slot[slot] + 2 * row * n;
            const T h = (T)N(dot)(q_old, q, n);
            N(subtract)(q, q_old, h, n);
            N(subtract)(p, q_old + n, h, n);
            gamma[slot] += h; /* q.r from q.(last r), which is known, and q.dr */
        }
        const T rest = N(norm)(q, n);
        weight[newest] = sound && rest > *blur + noise * norm;
        if (weight[newest] != 0) {
            const T inverse = 1 / rest;
            for (ptrdiff_t i = 0; i < n; i++) {
                q[i] *= inverse;
                p[i] *= inverse;
            }
            gamma[newest] = (T)N(dot)(q, r, n);
        }
        for (int k = 1; k <= slots; k++) {
            const int slot = (newest + k) % slots;
            if (weight[slot] == 0)
                continue;
            const T *q_old = (const T *)job->slot[slot] + 2 * row * n;
            N(subtract)(z, q_old + n, gamma[slot], n);
            if (left == 0)
                continue;
            at = 0; /* p holds differences of f; damping takes its share of q's back */
            for (int part = 0; part < count; part++) {
                const T unit = job->count ? units[part] : 1;
                N(subtract)(z + at, q_old + at, -left * gamma[slot] * unit, (ptrdiff_t)widths[part]);
                at += (ptrdiff_t)widths[part];
            }
        }
    }
    return none;
}

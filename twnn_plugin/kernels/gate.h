/* A gate's look at activations: means over positions and, with two parts, maxima, layer norm, standardisation, a
 * hidden layer, scores; in float. */

typedef struct {
    ptrdiff_t rows, channels, positions, parts, hidden, scores;
    ptrdiff_t per_channel, per_position; /* steps in memory; one of them is 1 */
    const float *x, *w1, *b1, *w2, *b2, *threshold, *mean, *variance;
    float *score; /* (rows, scores) */
    double eps, least;
    float slope;
} Glance;

#define LARGER(a, b) ((b) > (a) ? (b) : (a)) /* what is not a number is passed by; the means have it */

/* The means over positions that lie next to each other, less than lanes are worth; the maxima unless NULL. */
INLINE void few(const float *restrict x, ptrdiff_t channels, ptrdiff_t positions, float *restrict mean,
                float *restrict most)
{
    for (ptrdiff_t c = 0; c < channels; c++) {
        const float *run = x + c * positions;
        float sum[4] = {0};
        ptrdiff_t p = 0;
        for (; p + 4 <= positions; p += 4)
            for (int j = 0; j < 4; j++)
                sum[j] += run[p + j];
        for (; p < positions; p++)
            sum[0] += run[p];
        mean[c] = ((sum[0] + sum[1]) + (sum[2] + sum[3])) / (float)positions;
    }
    if (!most)
        return;
    for (ptrdiff_t c = 0; c < channels; c++) {
        const float *run = x + c * positions;
        float top[4] = {run[0], run[0], run[0], run[0]};
        ptrdiff_t p = 0;
        for (; p + 4 <= positions; p += 4)
            for (int j = 0; j < 4; j++)
                top[j] = LARGER(top[j], run[p + j]);
        for (; p < positions; p++)
            top[0] = LARGER(top[0], run[p]);
        const float one = LARGER(top[0], top[1]), other = LARGER(top[2], top[3]);
        most[c] = LARGER(one, other);
    }
}

/* Means, and maxima unless NULL, over positions that lie next to each other. */
INLINE void many(const float *restrict x, ptrdiff_t channels, ptrdiff_t positions, float *restrict mean,
                 float *restrict most)
{
    for (ptrdiff_t c = 0; c < channels; c++) {
        const float *run = x + c * positions;
        float lane[16] = {0}, top[16];
        ptrdiff_t p = 0;
        for (int j = 0; j < 16; j++)
            top[j] = run[j];
        for (; p + 16 <= positions; p += 16)
            for (int j = 0; j < 16; j++) {
                lane[j] += run[p + j];
                if (most)
                    top[j] = LARGER(top[j], run[p + j]);
            }
        for (int j = 0; p < positions; p++, j++) {
            lane[j] += run[p];
            if (most)
                top[j] = LARGER(top[j], run[p]);
        }
        for (int width = 8; width > 0; width /= 2)
            for (int j = 0; j < width; j++) {
                lane[j] += lane[j + width];
                top[j] = LARGER(top[j], top[j + width]);
            }
        mean[c] = lane[0] / (float)positions;
        if (most)
            most[c] = top[0];
    }
}

CLONES static void pooled(const Glance *job, const float *restrict x, float *restrict mean)
{
    const ptrdiff_t channels = job->channels, positions = job->positions;
    float *restrict most = job->parts > 1 ? mean + channels : NULL;
    if (job->per_channel == 1) {
        for (ptrdiff_t c = 0; c < channels; c++)
            mean[c] = x[c];
        if (most)
            for (ptrdiff_t c = 0; c < channels; c++)
                most[c] = x[c];
        for (ptrdiff_t p = 1; p < positions; p++) {
            const float *at = x + p * job->per_position;
            for (ptrdiff_t c = 0; c < channels; c++)
                mean[c] += at[c];
            if (most)
                for (ptrdiff_t c = 0; c < channels; c++)
                    most[c] = LARGER(most[c], at[c]);
        }
        for (ptrdiff_t c = 0; c < channels; c++)
            mean[c] /= (float)positions;
    } else if (positions == 4) { /* the last maps of images of 64 and of 224 pixels: loops of known length */
        few(x, channels, 4, mean, most);
    } else if (positions == 49) {
        few(x, channels, 49, mean, most);
    } else if (positions < 64) {
        few(x, channels, positions, mean, most);
    } else {
        many(x, channels, positions, mean, most);
    }
}

/* The sum of x, or of the squares of its distances from a mean, in double. */
INLINE double summed(const float *x, ptrdiff_t n, int squares, double mean)
{
    double lane[8] = {0};
    ptrdiff_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++) {
            const double d = x[i + j] - mean;
            lane[j] += squares ? d * d : d;
        }
    for (int j = 0; i < n; i++, j++) {
        const double d = x[i] - mean;
        lane[j] += squares ? d * d : d;
    }
    for (int width = 4; width > 0; width /= 2)
        for (int j = 0; j < width; j++)
            lane[j] += lane[j + width];
    return lane[0];
}

/* Layer norm of n numbers, each then as far from `centre` as `inverse` says. */
CLONES static void normalised(float *restrict x, ptrdiff_t n, double eps, const float *restrict centre,
                              const float *restrict inverse)
{
    const double mean = summed(x, n, 0, 0) / (double)n;
    const double scale = 1 / sqrt(summed(x, n, 1, mean) / (double)n + eps);
    for (ptrdiff_t i = 0; i < n; i++)
        x[i] = ((float)((x[i] - mean) * scale) - centre[i]) * inverse[i];
}

#define ABREAST 4 /* sums that are made at once, of numbers that are read once */

/* out[k * step] = a[k * across] . b[k * along] for k < ABREAST, n numbers each */
INLINE void products(const float *restrict a, ptrdiff_t across, const float *restrict b, ptrdiff_t along, ptrdiff_t n,
                     float *restrict out, ptrdiff_t step)
{
    float lane0[16] = {0}, lane1[16] = {0}, lane2[16] = {0}, lane3[16] = {0};
    const float *a0 = a, *a1 = a + across, *a2 = a1 + across, *a3 = a2 + across;
    const float *b0 = b, *b1 = b + along, *b2 = b1 + along, *b3 = b2 + along;
    ptrdiff_t c = 0;
    for (; c + 16 <= n; c += 16)
        for (int j = 0; j < 16; j++) {
            lane0[j] += a0[c + j] * b0[c + j];
            lane1[j] += a1[c + j] * b1[c + j];
            lane2[j] += a2[c + j] * b2[c + j];
            lane3[j] += a3[c + j] * b3[c + j];
        }
    float *lanes[ABREAST] = {lane0, lane1, lane2, lane3};
    for (int k = 0; k < ABREAST; k++) {
        float *lane = lanes[k];
        double rest = 0;
        for (ptrdiff_t at = c; at < n; at++)
            rest += a[k * across + at] * b[k * along + at];
        for (int width = 8; width > 0; width /= 2)
            for (int j = 0; j < width; j++)
                lane[j] += lane[j + width];
        out[k * step] = (float)(lane[0] + rest);
    }
}

/* The hidden layer before its bias, (rows, hidden), of (rows, parts * channels) x. */
INLINE void hidden_layer(const Glance *job, const float *x, ptrdiff_t rows, float *hidden)
{
    const ptrdiff_t channels = job->parts * job->channels, count = job->hidden;
    ptrdiff_t h = 0;
    if (rows == ABREAST) { /* the weights are read once for them all */
        for (; h < count; h++)
            products(x, channels, job->w1 + h * channels, 0, channels, hidden + h, count);
        return;
    }
    for (ptrdiff_t row = 0; row < rows; row++) {
        for (h = 0; h + ABREAST <= count; h += ABREAST)
            products(job->w1 + h * channels, channels, x + row * channels, 0, channels, hidden + row * count + h, 1);
        for (; h < count; h++)
            hidden[row * count + h] = (float)dot_float(job->w1 + h * channels, x + row * channels, channels);
    }
}

/* Whether no score is above the threshold; one that is not a number is. `space` holds width numbers, and width +
 * hidden for ABREAST rows, of width = parts * channels. */
CLONES static int all_closed(const Glance *job, float *space)
{
    const ptrdiff_t channels = job->channels, width = job->parts * channels, count = job->hidden;
    float *inverse = space, *x = inverse + width, *hidden = x + ABREAST * width;
    int closed = 1;
    for (ptrdiff_t i = 0; i < width; i++)
        inverse[i] = (float)(1 / sqrt((double)job->variance[i] + job->least));
    for (ptrdiff_t from = 0; from < job->rows; from += ABREAST) {
        const ptrdiff_t rows = job->rows - from < ABREAST ? job->rows - from : ABREAST;
        for (ptrdiff_t row = 0; row < rows; row++) {
            float *own = x + row * width;
            pooled(job, job->x + (from + row) * channels * job->positions, own);
            for (ptrdiff_t at = 0; at < width; at += channels)
                normalised(own + at, channels, job->eps, job->mean + at, inverse + at);
        }
        hidden_layer(job, x, rows, hidden);
        for (ptrdiff_t row = 0; row < rows; row++) {
            float *score = job->score + (from + row) * job->scores, *own = hidden + row * count;
            for (ptrdiff_t h = 0; h < count; h++) {
                const float sum = own[h] + job->b1[h];
                own[h] = sum < 0 ? sum * job->slope : sum; /* not a number stays so */
            }
            for (ptrdiff_t s = 0; s < job->scores; s++) {
                score[s] = (float)dot_float(job->w2 + s * count, own, count) + job->b2[s];
                closed &= score[s] - *job->threshold <= 0;
            }
        }
    }
    return closed;
}

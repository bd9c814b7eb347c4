/* A gate's look at activations: means over positions, layer norm, a hidden layer, scores; in float. */

typedef struct {
    ptrdiff_t rows, channels, positions, hidden, scores;
    ptrdiff_t per_channel, per_position; /* steps in memory; one of them is 1 */
    const float *x, *w1, *b1, *w2, *b2, *threshold;
    float *score; /* (rows, scores) */
    double eps;
} Glance;

CLONES static void pooled(const Glance *job, const float *x, float *mean)
{
    const ptrdiff_t channels = job->channels, positions = job->positions;
    if (job->per_channel == 1) {
        for (ptrdiff_t c = 0; c < channels; c++)
            mean[c] = 0;
        for (ptrdiff_t p = 0; p < positions; p++)
            for (ptrdiff_t c = 0; c < channels; c++)
                mean[c] += x[p * job->per_position + c];
    } else {
        for (ptrdiff_t c = 0; c < channels; c++) {
            const float *run = x + c * job->per_channel;
            ptrdiff_t p = 0;
            if (positions < 64) { /* less than lanes cost */
                float sum[4] = {0};
                for (; p + 4 <= positions; p += 4)
                    for (int j = 0; j < 4; j++)
                        sum[j] += run[p + j];
                for (; p < positions; p++)
                    sum[0] += run[p];
                mean[c] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
                continue;
            }
            float lane[16] = {0};
            for (; p + 16 <= positions; p += 16)
                for (int j = 0; j < 16; j++)
                    lane[j] += run[p + j];
            for (int j = 0; p < positions; p++, j++)
                lane[j] += run[p];
            for (int width = 8; width > 0; width /= 2)
                for (int j = 0; j < width; j++)
                    lane[j] += lane[j + width];
            mean[c] = lane[0];
        }
    }
    for (ptrdiff_t c = 0; c < channels; c++)
        mean[c] /= (float)positions;
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

CLONES static void normalised(float *x, ptrdiff_t n, double eps)
{
    const double mean = summed(x, n, 0, 0) / (double)n;
    const double scale = 1 / sqrt(summed(x, n, 1, mean) / (double)n + eps);
    for (ptrdiff_t i = 0; i < n; i++)
        x[i] = (float)((x[i] - mean) * scale);
}

#define ABREAST 4 /* sums that one reading of x serves */

/* out[i] = w[i] . x for `count` rows of a matrix, n numbers each */
INLINE void products(const float *restrict w, const float *restrict x, ptrdiff_t n, ptrdiff_t count, float *restrict out)
{
    ptrdiff_t i = 0;
    for (; i + ABREAST <= count; i += ABREAST) {
        const float *row = w + i * n;
        float lane[ABREAST][16] = {{0}};
        ptrdiff_t c = 0;
        for (; c + 16 <= n; c += 16)
            for (int k = 0; k < ABREAST; k++)
                for (int j = 0; j < 16; j++)
                    lane[k][j] += row[k * n + c + j] * x[c + j];
        for (int k = 0; k < ABREAST; k++) {
            double rest = 0;
            for (ptrdiff_t at = c; at < n; at++)
                rest += row[k * n + at] * x[at];
            for (int width = 8; width > 0; width /= 2)
                for (int j = 0; j < width; j++)
                    lane[k][j] += lane[k][j + width];
            out[i + k] = (float)(lane[k][0] + rest);
        }
    }
    for (; i < count; i++)
        out[i] = (float)dot_float(w + i * n, x, n);
}

/* Whether no score is above the threshold; one that is not a number is. `space` holds channels + hidden. */
CLONES static int all_closed(const Glance *job, float *space)
{
    float *x = space, *hidden = space + job->channels;
    int closed = 1;
    for (ptrdiff_t row = 0; row < job->rows; row++) {
        float *score = job->score + row * job->scores;
        pooled(job, job->x + row * job->channels * job->positions, x);
        normalised(x, job->channels, job->eps);
        products(job->w1, x, job->channels, job->hidden, hidden);
        for (ptrdiff_t h = 0; h < job->hidden; h++) {
            const float sum = hidden[h] + job->b1[h];
            hidden[h] = sum > 0 || sum != sum ? sum : 0;
        }
        products(job->w2, hidden, job->hidden, job->scores, score);
        for (ptrdiff_t s = 0; s < job->scores; s++) {
            score[s] += job->b2[s];
            closed &= score[s] - *job->threshold <= 0;
        }
    }
    return closed;
}

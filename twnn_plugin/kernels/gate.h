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
                float sum = 0;
                for (; p < positions; p++)
                    sum += run[p];
                mean[c] = sum;
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

CLONES static void normalised(float *x, ptrdiff_t n, double eps)
{
    double sum = 0, square = 0;
    for (ptrdiff_t i = 0; i < n; i++)
        sum += x[i];
    const double mean = sum / (double)n;
    for (ptrdiff_t i = 0; i < n; i++)
        square += (x[i] - mean) * (x[i] - mean);
    const double scale = 1 / sqrt(square / (double)n + eps);
    for (ptrdiff_t i = 0; i < n; i++)
        x[i] = (float)((x[i] - mean) * scale);
}

/* Whether no score is above the threshold; one that is not a number is. `space` holds channels + hidden. */
CLONES static int all_closed(const Glance *job, float *space)
{
    float *x = space, *hidden = space + job->channels;
    int closed = 1;
    for (ptrdiff_t row = 0; row < job->rows; row++) {
        pooled(job, job->x + row * job->channels * job->positions, x);
        normalised(x, job->channels, job->eps);
        for (ptrdiff_t h = 0; h < job->hidden; h++) {
            const float sum = (float)dot_float(job->w1 + h * job->channels, x, job->channels) + job->b1[h];
            hidden[h] = sum > 0 || sum != sum ? sum : 0;
        }
        for (ptrdiff_t s = 0; s < job->scores; s++) {
            const float score = (float)dot_float(job->w2 + s * job->hidden, hidden, job->hidden) + job->b2[s];
            job->score[row * job->scores + s] = score;
            closed &= score - *job->threshold <= 0;
        }
    }
    return closed;
}

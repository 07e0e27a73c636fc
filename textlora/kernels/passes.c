/* Bias, residual and norm in one pass over memory, forward and back, embeddings, and means of texts.
 *
 * Written for no processor in particular: vectors of sixteen, which compilers turn into what there is; each function is compiled for several
 * kinds of x86 processors and chosen when the library is loaded. Widths are multiples of LANES. Called by __init__.py, which checks all arguments.
 */
#include <string.h>

#include "native.h"

#define EACH __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define INLINE static inline __attribute__((always_inline))

#define LANES 16
#define NAME(f) f
#include "vectors.h"

/* s = y + bias + residual, x = (s - mean) / deviation of each row, out = x weight + shift; y becomes x, scale (rows), if wanted, 1 / deviation. */
EACH void textlora_norm(float *y, const float *bias, const float *residual, const float *weight, const float *shift, float *out, float *scale, long rows, long width, float eps)
{
    for (long r = 0; r < rows; r++, y += width, residual += width, out += width) {
        vector sum = {0}, squares = {0};
        for (long i = 0; i < width; i += LANES) {
            vector s = load(y + i) + load(residual + i);
            if (bias) s += load(bias + i);
            store(y + i, s);
            sum += s;
        }
        float mean = total(sum) / width;
        for (long i = 0; i < width; i += LANES) {
            vector s = load(y + i) - mean;
            squares += s * s;
        }
        float one = 1.0f / __builtin_sqrtf(total(squares) / width + eps);
        for (long i = 0; i < width; i += LANES) {
            vector x = (load(y + i) - mean) * one;
            store(y + i, x);
            store(out + i, x * load(weight + i) + load(shift + i));
        }
        if (scale) scale[r] = one;
    }
}

/* The gradient of s from that of out: with g = d weight, scale (g - mean g - x mean(g x)). x, as textlora_norm left it, becomes the gradient. */
EACH void textlora_norm_back(const float *d, const float *weight, float *x, const float *scale, long rows, long width)
{
    for (long r = 0; r < rows; r++, d += width, x += width) {
        vector sum = {0}, along = {0};
        for (long i = 0; i < width; i += LANES) {
            vector g = load(d + i) * load(weight + i);
            sum += g;
            along += g * load(x + i);
        }
        float mean = total(sum) / width, share = total(along) / width;
        for (long i = 0; i < width; i += LANES) store(x + i, (load(d + i) * load(weight + i) - mean - load(x + i) * share) * scale[r]);
    }
}

/* out = layer_norm(word + type + position), a row of each of three tables for a token; type may be missing. */
void textlora_embed(const int64_t *ids, const int64_t *types, const int64_t *positions, const float *word, const float *type, const float *position,
                    const float *weight, const float *shift, float *out, long rows, long width, float eps)
{
    for (long r = 0; r < rows; r++) {
        memcpy(out + r * width, word + ids[r] * width, width * sizeof(float));
        textlora_norm(out + r * width, type ? type + types[r] * width : 0, position + positions[r] * width, weight, shift, out + r * width, 0, 1, width, eps);
    }
}

enum { APART = 32 }; /* rows summed by themselves: the error of a long sum grows with the rows of a part, and with the parts */

/* out (texts, width) = the mean of rows starts[t] to starts[t + 1] - 1 of x (rows, width) for each text t. */
EACH void textlora_mean(const float *x, const int32_t *starts, float *out, long texts, long width)
{
    for (long t = 0; t < texts; t++, out += width) {
        float one = 1.0f / (starts[t + 1] - starts[t]);
        for (long i = 0; i < width; i += LANES) {
            vector sum = {0};
            for (long from = starts[t]; from < starts[t + 1]; from += APART) {
                long to = from + APART < starts[t + 1] ? from + APART : starts[t + 1];
                vector part = {0};
                for (long r = from; r < to; r++) part += load(x + r * width + i);
                sum += part;
            }
            store(out + i, sum * one);
        }
    }
}

/* The gradient of x from that of out. */
EACH void textlora_mean_back(const float *d, const int32_t *starts, float *dx, long texts, long width)
{
    for (long t = 0; t < texts; t++, d += width) {
        float one = 1.0f / (starts[t + 1] - starts[t]);
        for (long r = starts[t]; r < starts[t + 1]; r++)
            for (long i = 0; i < width; i += LANES) store(dx + r * width + i, load(d + i) * one);
    }
}

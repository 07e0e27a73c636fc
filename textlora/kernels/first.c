/* Attention of the first tokens alone, forward and back, for train.c: no key or value is formed. For head h
 *
 *   keys_h = q_h W_k,h + u_k,h A_k,  u_k,h = q_h (scaling B_k,h)       scores_h = keys_h X^T
 *   means_h = softmax(scores_h) X,   u_v,h = means_h A_v^T             context_h = means_h W_v,h^T + u_v,h (scaling B_v,h)^T + b_v,h
 *
 * where X are the rows of a text, q its first row's query by the square root of a head's width, and the key's bias adds the same to all scores of a text.
 */
#include <string.h>

#include "train.h"

#define EACH __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define INLINE static inline __attribute__((always_inline))
#define LANES 16
#define NAME(f) f
#include "vectors.h"

enum { LONGEST = 512 };

/* What the largest part of an adapter takes, laid out. */
long textlora_look_panels(const struct encoder *e, const struct adapter *adapters, long count)
{
    long H = e->width, d = H / e->heads, most = 0;
    for (long a = 0; a < count; a++) {
        long r = adapters[a].r;
        most = larger(most, larger(larger(size(e, H, r), size(e, r, H)), larger(size(e, d, r), size(e, r, d))));
    }
    return most;
}

/* The adapter of query, key or value, and where its u begins; that of its gradient lies as far into b->du. */
static const struct adapter *adapter_of(const struct stage *s, int slot, float *u, float **its)
{
    for (long a = 0, from = 0; a < s->count; from += s->adapters[a++].r)
        if (s->adapters[a].column == slot * s->e->width) {
            *its = u + s->rows * s->e->heads * from;
            return s->adapters + a;
        }
    return 0;
}

/* y (rows, out) of x (rows, inner), with A or with rows of B, s in it: A or B^T, or turned. */
static void times(const struct stage *s, const float *w, long next_in, long next_out, float factor, const float *x, long x_stride, float *y, long y_stride, long rows, long inner, long out, int then)
{
    textlora_product_lay_out(w, s->panels, inner, out, next_in, next_out, factor, s->e->lanes);
    textlora_product(x, x_stride, s->panels, 0, y, y_stride, 0, rows, inner, out, then, s->e->lanes);
}

/* dB of outputs first to first + width - 1 of an adapter: scaling times u^T d, (r, width), turned. */
static void sum_B(const struct stage *s, const struct adapter *a, long first, long width, const float *u, long u_stride, const float *d)
{
    textlora_cross(u, u_stride, d, s->e->width, s->turned, s->rows, a->r, width, a->scaling, s->e->lanes);
    for (long i = 0; i < width; i++)
        for (long r = 0; r < a->r; r++) a->dB[(first + i) * a->r + r] = s->turned[r * width + i];
}

EACH static void scale(float *x, float factor, long numbers)
{
    for (long i = 0; i < numbers; i += LANES) store(x + i, load(x + i) * factor);
}

EACH static void add(float *x, const float *y, long numbers)
{
    for (long i = 0; i < numbers; i += LANES) store(x + i, load(x + i) + load(y + i));
}

/* Columns of scores (length, wide), each of a head, become their softmax. */
EACH static void softmax(float *scores, long length, long wide)
{
    for (long h = 0; h < wide; h += LANES) {
        vector most = load(scores + h), sum = {0};
        for (long k = 1; k < length; k++) {
            vector s = load(scores + k * wide + h);
            most = where(s < most, most, s);
        }
        for (long k = 0; k < length; k++) {
            vector share = exponential(load(scores + k * wide + h) - most);
            sum += share;
            store(scores + k * wide + h, share);
        }
        vector one = 1.0f / sum;
        for (long k = 0; k < length; k++) store(scores + k * wide + h, load(scores + k * wide + h) * one);
    }
}

/* From d of shares, (length, wide) both, that of scores. */
EACH static void softmax_back(float *d, const float *shares, long length, long wide)
{
    for (long h = 0; h < wide; h += LANES) {
        vector along = {0};
        for (long k = 0; k < length; k++) along += load(d + k * wide + h) * load(shares + k * wide + h);
        for (long k = 0; k < length; k++) store(d + k * wide + h, load(shares + k * wide + h) * (load(d + k * wide + h) - along));
    }
}

long textlora_look_size(const struct encoder *e)
{
    return larger(size(e, e->width, e->heads), size(e, e->heads, e->width)) + LONGEST * whole(e->heads);
}

/* A text's scores, shares and means. */
static void look(const void *what, long n, int number)
{
    const struct stage *s = what;
    const struct encoder *e = s->e;
    long H = e->width, heads = e->heads, wide = whole(heads), at = s->c->starts[n], length = s->c->starts[n + 1] - at;
    float *panels = s->hands + number * s->own, *shares = s->b.shares + at * wide;
    memset(shares, 0, length * wide * sizeof(float));
    textlora_product_lay_out(s->b.keys + n * heads * H, panels, H, heads, 1, H, 1, e->lanes);
    textlora_product(s->x + at * H, H, panels, 0, shares, wide, 0, length, H, heads, STORE, e->lanes);
    softmax(shares, length, wide);
    textlora_cross(shares, wide, s->x + at * H, H, s->b.means + n * heads * H, length, heads, H, 1, e->lanes);
}

/* From d of a text's means, which lie in their place, to those of its rows and of its keys, which take the keys' place. */
static void look_back(const void *what, long n, int number)
{
    const struct stage *s = what;
    const struct encoder *e = s->e;
    long H = e->width, heads = e->heads, wide = whole(heads), at = s->c->starts[n], length = s->c->starts[n + 1] - at;
    float *panels = s->hands + number * s->own, *d = panels + larger(size(e, H, heads), size(e, heads, H)), *keys = s->b.keys + n * heads * H;
    const float *shares = s->b.shares + at * wide, *means = s->b.means + n * heads * H;
    memset(d, 0, length * wide * sizeof(float));
    textlora_product_lay_out(means, panels, H, heads, 1, H, 1, e->lanes);
    textlora_product(s->x + at * H, H, panels, 0, d, wide, 0, length, H, heads, STORE, e->lanes);
    softmax_back(d, shares, length, wide);
    if (s->dx) {
        textlora_product_lay_out(means, panels, heads, H, H, 1, 1, e->lanes);
        textlora_product(shares, wide, panels, 0, s->dx + at * H, H, 0, length, heads, H, STORE, e->lanes);
        textlora_product_lay_out(keys, panels, heads, H, H, 1, 1, e->lanes);
        textlora_product(d, wide, panels, 0, s->dx + at * H, H, 0, length, heads, H, PLUS, e->lanes);
    }
    textlora_cross(d, wide, s->x + at * H, H, keys, length, heads, H, 1, e->lanes);
}

/* From x to the context of first tokens (texts, width); what `textlora_look_back` needs goes to s->b. */
void textlora_look(struct stage *s)
{
    const struct encoder *e = s->e;
    const struct body *b = &s->b;
    long n = s->rows, H = e->width, heads = e->heads, d = H / heads, to_keys = textlora_product_size(d, H, e->lanes), to_values = textlora_product_size(H, d, e->lanes);
    const float *bias = s->k->qkv.bias;
    const struct adapter *a;
    float *u;
    for (long t = 0; t < n; t++) memcpy(b->x + t * H, s->x + s->c->starts[t] * H, H * sizeof(float));
    textlora_product(b->x, H, e->query.forward, bias, b->s, H, 0, n, H, H, STORE, e->lanes);
    if ((a = adapter_of(s, 0, b->u, &u))) {
        times(s, a->A, 1, H, 1, b->x, H, u, a->r, n, H, a->r, STORE);
        times(s, a->B, 1, a->r, a->scaling, u, a->r, b->s, H, n, a->r, H, PLUS);
    }
    scale(b->s, 1 / __builtin_sqrtf((float)d), n * H);
    for (long h = 0; h < heads; h++)
        textlora_product(b->s + h * d, H, e->key.forward + h * to_keys, 0, b->keys + h * H, heads * H, 0, n, d, H, STORE, e->lanes);
    if ((a = adapter_of(s, 1, b->u, &u))) {
        for (long h = 0; h < heads; h++) times(s, a->B + h * d * a->r, a->r, 1, a->scaling, b->s + h * d, H, u + h * a->r, heads * a->r, n, d, a->r, STORE);
        times(s, a->A, H, 1, 1, u, a->r, b->keys, H, n * heads, a->r, H, PLUS);
    }
    textlora_share(look, s, n, s->c->hands);
    for (long h = 0; h < heads; h++)
        textlora_product(b->means + h * H, heads * H, e->value.forward + h * to_values, bias + 2 * H + h * d, s->context + h * d, H, 0, n, H, d, STORE, e->lanes);
    if ((a = adapter_of(s, 2, b->u, &u))) {
        times(s, a->A, 1, H, 1, b->means, H, u, a->r, n * heads, H, a->r, STORE);
        for (long h = 0; h < heads; h++) times(s, a->B + h * d * a->r, 1, a->r, a->scaling, u + h * a->r, heads * a->r, s->context + h * d, H, n, a->r, d, PLUS);
    }
}

/* From the gradients of context and of the first sum to those of x, where it is asked for, and of every A and B. Writes over both and over s->b. */
void textlora_look_back(struct stage *s)
{
    const struct encoder *e = s->e;
    const struct body *b = &s->b;
    long n = s->rows, H = e->width, heads = e->heads, d = H / heads, to_keys = textlora_product_size(d, H, e->lanes), to_values = textlora_product_size(H, d, e->lanes);
    float *u = b->u, *context = s->context, *dq = context;
    const struct adapter *a = adapter_of(s, 2, b->u, &u);
    float *du = b->du + (u - b->u);
    if (a) {
        for (long h = 0; h < heads; h++) {
            times(s, a->B + h * d * a->r, a->r, 1, a->scaling, context + h * d, H, du + h * a->r, heads * a->r, n, d, a->r, STORE);
            sum_B(s, a, h * d, d, u + h * a->r, heads * a->r, context + h * d);
        }
        textlora_cross(du, a->r, b->means, H, a->dA, n * heads, a->r, H, 1, e->lanes);
    }
    for (long h = 0; h < heads; h++)
        textlora_product(context + h * d, H, e->value.back + h * to_keys, 0, b->means + h * H, heads * H, 0, n, d, H, STORE, e->lanes);
    if (a) times(s, a->A, H, 1, 1, du, a->r, b->means, H, n * heads, a->r, H, PLUS);
    textlora_share(look_back, s, n, s->c->hands);
    for (long h = 0; h < heads; h++)
        textlora_product(b->keys + h * H, heads * H, e->key.back + h * to_values, 0, dq + h * d, H, 0, n, H, d, STORE, e->lanes);
    if ((a = adapter_of(s, 1, b->u, &u))) {
        du = b->du + (u - b->u);
        times(s, a->A, 1, H, 1, b->keys, H, du, a->r, n * heads, H, a->r, STORE);
        textlora_cross(u, a->r, b->keys, H, a->dA, n * heads, a->r, H, 1, e->lanes);
        for (long h = 0; h < heads; h++) {
            times(s, a->B + h * d * a->r, 1, a->r, a->scaling, du + h * a->r, heads * a->r, dq + h * d, H, n, a->r, d, PLUS);
            sum_B(s, a, h * d, d, du + h * a->r, heads * a->r, b->s + h * d);
        }
    }
    scale(dq, 1 / __builtin_sqrtf((float)d), n * H);
    if (s->dx) textlora_product(dq, H, e->query.back, 0, b->first, H, 0, n, H, H, PLUS, e->lanes);
    if ((a = adapter_of(s, 0, b->u, &u))) {
        du = b->du + (u - b->u);
        times(s, a->B, a->r, 1, a->scaling, dq, H, du, a->r, n, H, a->r, STORE);
        sum_B(s, a, 0, H, u, a->r, dq);
        textlora_cross(du, a->r, b->x, H, a->dA, n, a->r, H, 1, e->lanes);
        if (s->dx) times(s, a->A, H, 1, 1, du, a->r, b->first, H, n, a->r, H, PLUS);
    }
    for (long t = 0; s->dx && t < n; t++) add(s->dx + s->c->starts[t] * H, b->first + t * H, H);
}

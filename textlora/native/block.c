/* A whole block of the frozen encoder with LoRA on query, key or value, forward and back, in one call each: what Python and torch do
 * between thirty calls is a twentieth of a step on long texts, and more on short ones.
 *
 *   s = x Wqkv^T + b, with u = x A^T added for each adapter: s_k += u_k (scaling B)^T
 *   x1 = norm(attention(s) Wo^T + bo + x)
 *   y = norm(gelu(x1 Wu^T + bu) Wd^T + bd + x1)
 *
 * Kept for the way back: s, u, GELU's slope, both normed sums and what they were divided by. There gradients take the place of slope and sums.
 * Composed of the other files' functions. Called by block.py, which checks all arguments.
 */
#include <string.h>

#include "native.h"

enum { MOST = 3 };

/* A dense layer laid out forward and back, its bias, and a norm. */
struct dense { const float *forward, *back, *bias; };
struct norm { const float *weight, *shift; };

struct frozen {
    struct dense qkv, output, up, down;
    struct norm first, second;
    long width, inner, heads;
    float eps;
    int lanes;
};

/* A (r, width), B (width, r), contiguous, on output column; gradients of both, or none. */
struct adapter { const float *A, *B; float *dA, *dB; long r, column; float scaling; };

struct call {
    const float *x;
    const int32_t *starts;
    float *kept, *y; /* kept: textlora_block_kept numbers; on the way back y is the gradient of x, or none */
    float *scratch;  /* textlora_block_scratch numbers */
    struct room *room;
    long rows, texts, adapters, rank; /* rank: of all together */
    int slopes; /* whether there will be a way back */
    struct adapter adapter[MOST];
};

struct kept { float *s, *u, *slope, *first, *second, *one, *two; };

static struct kept of(const struct frozen *f, const struct call *c)
{
    long T = c->rows, H = f->width;
    struct kept k;
    k.s = c->kept;
    k.first = k.s + 3 * T * H;
    k.second = k.first + T * H;
    k.slope = k.second + T * H;
    k.u = k.slope + (c->slopes ? T * f->inner : 0);
    k.one = k.u + T * c->rank;
    k.two = k.one + T;
    return k;
}

long textlora_block_kept(const struct frozen *f, const struct call *c)
{
    return c->rows * (5 * f->width + (c->slopes ? f->inner : 0) + c->rank + 2);
}

/* Of A and B laid out, rounded up to whole lines. */
static long whole(long numbers) { return (numbers + 15) / 16 * 16; }

static long panels_of(const struct frozen *f, const struct call *c)
{
    long H = f->width, most = whole(textlora_product_size(H, c->rank, f->lanes)), back = whole(textlora_product_size(c->rank, H, f->lanes));
    return most > back ? most : back;
}

long textlora_block_scratch(const struct frozen *f, const struct call *c)
{
    long T = c->rows, H = f->width, inside = T * (f->inner > 4 * H ? f->inner : 4 * H);
    return panels_of(f, c) + T * (2 * H + c->rank) + inside + c->rank * H;
}

static void product(const struct frozen *f, const struct call *c, const float *x, const float *panels, const float *bias, float *y, float *slope, long inner, long out, int then)
{
    textlora_product(x, inner, panels, bias, y, out, slope, c->rows, inner, out, then, f->lanes);
}

/* All A, one under the other: (rank, width). */
static const float *joined(const struct frozen *f, const struct call *c, float *to)
{
    float *next = to;
    for (const struct adapter *a = c->adapter; a < c->adapter + c->adapters; next += a++->r * f->width) memcpy(next, a->A, a->r * f->width * sizeof(float));
    return to;
}

void textlora_block(const struct frozen *f, const struct call *c)
{
    struct kept k = of(f, c);
    long T = c->rows, H = f->width, at = 0;
    float *panels = c->scratch, *context = panels + panels_of(f, c), *between = context + T * H, *wide = between + T * H;
    product(f, c, c->x, f->qkv.forward, f->qkv.bias, k.s, 0, H, 3 * H, STORE);
    if (c->rank) {
        textlora_product_lay_out(joined(f, c, wide), panels, H, c->rank, 1, H, 1, f->lanes);
        product(f, c, c->x, panels, 0, k.u, 0, H, c->rank, STORE);
    }
    for (const struct adapter *a = c->adapter; a < c->adapter + c->adapters; at += a++->r) {
        textlora_product_lay_out(a->B, panels, a->r, H, 1, a->r, a->scaling, f->lanes);
        textlora_product(k.u + at, c->rank, panels, 0, k.s + a->column, 3 * H, 0, T, a->r, H, PLUS, f->lanes);
    }
    textlora_attention(k.s, 0, context, c->starts, c->room, c->texts, f->heads, 0, f->heads, H / f->heads, 1 / __builtin_sqrtf((float)H / f->heads), f->lanes);
    product(f, c, context, f->output.forward, 0, k.first, 0, H, H, STORE);
    textlora_norm(k.first, f->output.bias, c->x, f->first.weight, f->first.shift, between, k.one, T, H, f->eps);
    product(f, c, between, f->up.forward, f->up.bias, wide, c->slopes ? k.slope : 0, H, f->inner, GELU);
    product(f, c, wide, f->down.forward, 0, k.second, 0, f->inner, H, STORE);
    textlora_norm(k.second, f->down.bias, between, f->second.weight, f->second.shift, c->y, k.two, T, H, f->eps);
}

/* From the gradient of y (rows, width) that of x, added up in c->y where it is given, and of A and B. What was kept is written over. */
void textlora_block_back(const struct frozen *f, const struct call *c, const float *grad)
{
    struct kept k = of(f, c);
    long T = c->rows, H = f->width, at = 0;
    float *panels = c->scratch, *context = panels + panels_of(f, c), *ds = context + T * H, *du = ds + 3 * T * H, *turned = du + T * c->rank;
    textlora_norm_back(grad, f->second.weight, k.second, k.two, T, H);
    product(f, c, k.second, f->down.back, 0, k.slope, 0, H, f->inner, TIMES);
    product(f, c, k.slope, f->up.back, 0, k.second, 0, f->inner, H, PLUS);
    textlora_norm_back(k.second, f->first.weight, k.first, k.one, T, H);
    product(f, c, k.first, f->output.back, 0, context, 0, H, H, STORE);
    textlora_attention(k.s, context, ds, c->starts, c->room, c->texts, f->heads, 0, f->heads, H / f->heads, 1 / __builtin_sqrtf((float)H / f->heads), f->lanes);
    if (c->y) {
        memcpy(c->y, k.first, T * H * sizeof(float));
        product(f, c, ds, f->qkv.back, 0, c->y, 0, 3 * H, H, PLUS);
    }
    for (const struct adapter *a = c->adapter; a < c->adapter + c->adapters; at += a++->r) {
        const float *d = ds + a->column;
        textlora_product_lay_out(a->B, panels, H, a->r, a->r, 1, a->scaling, f->lanes);
        textlora_product(d, 3 * H, panels, 0, du + at, c->rank, 0, T, H, a->r, STORE, f->lanes);
        textlora_cross(k.u + at, c->rank, d, 3 * H, turned, T, a->r, H, a->scaling, f->lanes);
        for (long i = 0; i < H; i++)
            for (long r = 0; r < a->r; r++) a->dB[i * a->r + r] = turned[r * H + i];
        textlora_cross(du + at, c->rank, c->x, H, a->dA, T, a->r, H, 1, f->lanes);
    }
    if (c->y && c->rank) {
        textlora_product_lay_out(joined(f, c, turned), panels, c->rank, H, H, 1, 1, f->lanes);
        product(f, c, du, panels, 0, c->y, 0, c->rank, H, PLUS);
    }
}

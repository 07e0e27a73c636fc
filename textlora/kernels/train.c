/* Blocks of the frozen encoder with LoRA on query, key or value, forward and back, a call each for a piece of a step: what Python and torch do between the
 * calls of single blocks is a fifth of the time of a piece of short texts.
 *
 *   s = x Wqkv^T + b, with u = x A^T added for each adapter: s_k += u_k (scaling B)^T
 *   x1 = norm(attention(s) Wo^T + bo + x)
 *   y = norm(gelu(x1 Wu^T + bu) Wd^T + bd + x1)
 *
 * Kept for the way back: each block's x, s, u, GELU's slope, both normed sums and what they were divided by, there gradients take the place of slope and
 * sums; or x alone, and the rest is computed again (arXiv 1604.06174). Where only first tokens are asked for, first.c has the last block's attention.
 *
 * A stage's chunks are rows, texts, heads or adapters (crew.c). Composed of the other files' functions. Called by train.py, which checks all arguments.
 */
#include <string.h>

#include "train.h"

enum { PIECE = 64 /* rows at a time */ };

static int looks(const struct encoder *e, const struct call *c, long i) { return c->firsts && i == e->layers - 1; }

static long rank_of(const struct call *c, long i)
{
    long rank = 0;
    for (long a = c->ends[i]; a < c->ends[i + 1]; a++) rank += c->adapters[a].r;
    return rank;
}

/* Where what a block keeps lies from `at` on; returns its end. Rows behind attention are texts in a block of first tokens. */
static float *body_at(const struct encoder *e, const struct call *c, long i, float *at, int slopes, struct body *b)
{
    long T = c->rows, H = e->width, n = looks(e, c, i) ? c->texts : T, rank = rank_of(c, i);
#define NEXT(name, numbers) b->name = at, at += whole(numbers)
    NEXT(first, n * H);
    NEXT(second, n * H);
    NEXT(slope, slopes ? n * e->inner : 0);
    NEXT(one, n);
    NEXT(two, n);
    if (looks(e, c, i)) {
        NEXT(x, n * H);
        NEXT(s, n * H);
        NEXT(u, n * e->heads * rank);
        NEXT(du, n * e->heads * rank);
        NEXT(keys, n * e->heads * H);
        NEXT(means, n * e->heads * H);
        NEXT(shares, T * whole(e->heads));
    } else {
        NEXT(s, 3 * T * H);
        NEXT(u, T * rank);
    }
#undef NEXT
    return at;
}

static long body_size(const struct encoder *e, const struct call *c, long i, int slopes)
{
    struct body b;
    return body_at(e, c, i, (float *)64, slopes, &b) - (float *)64;
}

/* An input that the call was not given. */
static long input_size(const struct encoder *e, const struct call *c, long i) { return i > c->first ? whole(c->rows * e->width) : 0; }

/* What blocks from `lowest` to i - 1 keep: each its input, and behind that its body, unless it is computed again. */
static long kept_before(const struct encoder *e, const struct call *c, long i)
{
    long size = 0;
    for (long k = c->lowest; k < i; k++) size += input_size(e, c, k) + (c->again ? 0 : body_size(e, c, k, 1));
    return size;
}

long textlora_train_kept(const struct encoder *e, const struct call *c) { return kept_before(e, c, c->last); }

static float *input_of(const struct encoder *e, const struct call *c, long i) { return c->kept + kept_before(e, c, i); }

static float *body_of(const struct encoder *e, const struct call *c, long i) { return input_of(e, c, i) + input_size(e, c, i); }

/* What the adapters of block i take, laid out. */
static long panels_size(const struct encoder *e, const struct call *c, long i)
{
    const struct adapter *first = c->adapters + c->ends[i], *end = c->adapters + c->ends[i + 1];
    long H = e->width, rank = rank_of(c, i), sum = larger(size(e, H, rank), size(e, rank, H));
    if (looks(e, c, i)) return textlora_look_panels(e, first, end - first);
    for (const struct adapter *a = first; a < end; a++) sum += larger(size(e, H, a->r), size(e, a->r, H));
    return sum;
}

/* Scratch of a call: parts that all threads share, then a part of each. */
struct shared { float *state, *context, *ds, *g, *du, *turned, *panels, *body, *hands; };

static struct shared shared_of(const struct encoder *e, const struct call *c, long *own)
{
    struct shared s;
    float *at = c->scratch;
    long T = c->rows, H = e->width, rank = 0, panels = 0, body = 0;
    for (long i = c->first; i < c->last; i++) {
        rank = larger(rank, rank_of(c, i)), panels = larger(panels, panels_size(e, c, i));
        if (i >= c->lowest && !c->again) continue;
        body = larger(body, body_size(e, c, i, i >= c->lowest));
    }
#define NEXT(name, numbers) s.name = at, at += whole(numbers)
    NEXT(state, T * H);
    NEXT(context, T * H);
    NEXT(ds, c->lowest < c->last ? 3 * T * H : 0);
    NEXT(g, c->lowest < c->last ? T * H : 0);
    NEXT(du, T * rank);
    NEXT(turned, rank * H);
    NEXT(panels, panels);
    NEXT(body, body);
#undef NEXT
    s.hands = at;
    *own = larger(textlora_look_size(e), whole(PIECE * (e->width + e->inner)));
    return s;
}

long textlora_train_scratch(const struct encoder *e, const struct call *c)
{
    long own;
    struct shared s = shared_of(e, c, &own);
    return s.hands - c->scratch + c->hands * own;
}

static void product(const struct encoder *e, const float *x, const float *panels, const float *bias, float *y, float *slope, long rows, long inner, long out, int then)
{
    textlora_product(x, inner, panels, bias, y, out, slope, rows, inner, out, then, e->lanes);
}

/* Adapters of a block of all tokens: all A, one under the other, and each B, as they are multiplied with forward or back. */
static void lay_out_adapters(struct stage *s, int back)
{
    const struct encoder *e = s->e;
    long H = e->width, from = 0;
    if (!s->rank) return;
    for (long a = 0; a < s->count; from += s->adapters[a++].r) memcpy(s->turned + from * H, s->adapters[a].A, s->adapters[a].r * H * sizeof(float));
    float *at = s->panels;
    if (back) textlora_product_lay_out(s->turned, at, s->rank, H, H, 1, 1, e->lanes);
    else textlora_product_lay_out(s->turned, at, H, s->rank, 1, H, 1, e->lanes);
    s->A = at, at += back ? size(e, s->rank, H) : size(e, H, s->rank);
    for (long a = 0; a < s->count; a++) {
        const struct adapter *one = s->adapters + a;
        if (back) textlora_product_lay_out(one->B, at, H, one->r, one->r, 1, one->scaling, e->lanes);
        else textlora_product_lay_out(one->B, at, one->r, H, 1, one->r, one->scaling, e->lanes);
        s->B[a] = at, at += back ? size(e, H, one->r) : size(e, one->r, H);
    }
}

/* Rows of a chunk: the first, and how many. */
static long rows_of(const struct stage *s, long chunk, long *count)
{
    long at = chunk * s->piece;
    *count = s->rows - at < s->piece ? s->rows - at : s->piece;
    return at;
}

static void project(const void *what, long chunk, int number)
{
    const struct stage *s = what;
    const struct encoder *e = s->e;
    long H = e->width, n, at = rows_of(s, chunk, &n), from = 0;
    float *to = s->b.s + at * 3 * H;
    (void)number;
    product(e, s->x + at * H, s->k->qkv.forward, s->k->qkv.bias, to, 0, n, H, 3 * H, STORE);
    if (!s->rank) return;
    float *u = s->b.u + at * s->rank;
    product(e, s->x + at * H, s->A, 0, u, 0, n, H, s->rank, STORE);
    for (long a = 0; a < s->count; from += s->adapters[a++].r)
        textlora_product(u + from, s->rank, s->B[a], 0, to + s->adapters[a].column, 3 * H, 0, n, s->adapters[a].r, H, PLUS, e->lanes);
}

static void attend(const void *what, long chunk, int number)
{
    const struct stage *s = what;
    const struct encoder *e = s->e;
    textlora_attention_chunk(s->b.s, 0, s->context, s->c->starts, s->c->rooms, s->c->texts, e->heads, e->width / e->heads, e->lanes, chunk, number);
}

static void attend_back(const void *what, long chunk, int number)
{
    const struct stage *s = what;
    const struct encoder *e = s->e;
    textlora_attention_chunk(s->b.s, s->context, s->ds, s->c->starts, s->c->rooms, s->c->texts, e->heads, e->width / e->heads, e->lanes, chunk, number);
}

static void behind(const void *what, long chunk, int number)
{
    const struct stage *s = what;
    const struct encoder *e = s->e;
    const struct block *k = s->k;
    long H = e->width, I = e->inner, n, at = rows_of(s, chunk, &n);
    float *between = s->hands + number * s->own, *wide = between + PIECE * H, *first = s->b.first + at * H, *second = s->b.second + at * H;
    product(e, s->context + at * H, k->output.forward, 0, first, 0, n, H, H, STORE);
    textlora_norm(first, k->output.bias, s->residual + at * H, k->first.weight, k->first.shift, between, s->b.one + at, n, H, e->eps);
    product(e, between, k->up.forward, k->up.bias, wide, s->slopes ? s->b.slope + at * I : 0, n, H, I, GELU);
    product(e, wide, k->down.forward, 0, second, 0, n, I, H, STORE);
    textlora_norm(second, k->down.bias, between, k->second.weight, k->second.shift, s->y + at * H, s->b.two + at, n, H, e->eps);
}

/* From the gradient of y to those of context and of the first sum, which take its place. */
static void behind_back(const void *what, long chunk, int number)
{
    const struct stage *s = what;
    const struct encoder *e = s->e;
    const struct block *k = s->k;
    long H = e->width, I = e->inner, n, at = rows_of(s, chunk, &n);
    float *first = s->b.first + at * H, *second = s->b.second + at * H, *slope = s->b.slope + at * I;
    (void)number;
    textlora_norm_back(s->grad + at * H, k->second.weight, second, s->b.two + at, n, H);
    product(e, second, k->down.back, 0, slope, 0, n, H, I, TIMES);
    product(e, slope, k->up.back, 0, second, 0, n, I, H, PLUS);
    textlora_norm_back(second, k->first.weight, first, s->b.one + at, n, H);
    product(e, first, k->output.back, 0, s->context + at * H, 0, n, H, H, STORE);
}

static void project_back(const void *what, long chunk, int number)
{
    const struct stage *s = what;
    const struct encoder *e = s->e;
    long H = e->width, n, at = rows_of(s, chunk, &n), from = 0;
    const float *ds = s->ds + at * 3 * H;
    float *du = s->du + at * s->rank;
    (void)number;
    for (long a = 0; a < s->count; from += s->adapters[a++].r)
        textlora_product(ds + s->adapters[a].column, 3 * H, s->B[a], 0, du + from, s->rank, 0, n, H, s->adapters[a].r, STORE, e->lanes);
    if (!s->dx) return;
    memcpy(s->dx + at * H, s->b.first + at * H, n * H * sizeof(float));
    product(e, ds, s->k->qkv.back, 0, s->dx + at * H, 0, n, 3 * H, H, PLUS);
    if (s->rank) product(e, du, s->A, 0, s->dx + at * H, 0, n, s->rank, H, PLUS);
}

/* An adapter's dB, in even chunks, or dA. */
static void sum_up(const void *what, long chunk, int number)
{
    const struct stage *s = what;
    const struct adapter *a = s->adapters + chunk / 2;
    long T = s->rows, H = s->e->width, from = 0;
    (void)number;
    for (const struct adapter *b = s->adapters; b < a; b++) from += b->r;
    if (chunk % 2) {
        textlora_cross(s->du + from, s->rank, s->x, H, a->dA, T, a->r, H, 1, s->e->lanes);
        return;
    }
    float *turned = s->turned + from * H;
    textlora_cross(s->b.u + from, s->rank, s->ds + a->column, 3 * H, turned, T, a->r, H, a->scaling, s->e->lanes);
    for (long i = 0; i < H; i++)
        for (long r = 0; r < a->r; r++) a->dB[i * a->r + r] = turned[r * H + i];
}

/* What the stages of block i have in common. */
static struct stage stage_of(const struct encoder *e, const struct call *c, long i, const struct shared *p, long own, const float *x)
{
    struct stage s = {e, c, e->blocks + i, .adapters = c->adapters + c->ends[i], .count = c->ends[i + 1] - c->ends[i], .rank = rank_of(c, i)};
    s.rows = looks(e, c, i) ? c->texts : c->rows;
    s.piece = piece_of(s.rows, PIECE, c->hands);
    s.x = x, s.context = p->context, s.ds = p->ds, s.du = p->du, s.turned = p->turned, s.panels = p->panels, s.hands = p->hands, s.own = own;
    return s;
}

/* Block i from x to y; what lies between goes to `body`. */
static void forward(struct stage *s, float *body, float *y, int slopes, long i)
{
    const struct encoder *e = s->e;
    const struct call *c = s->c;
    body_at(e, c, i, body, slopes, &s->b);
    s->y = y, s->slopes = slopes, s->residual = s->x;
    if (looks(e, c, i)) {
        textlora_look(s);
        s->residual = s->b.x;
    } else {
        lay_out_adapters(s, 0);
        textlora_share(project, s, pieces(s->rows, s->piece), c->hands);
        textlora_share(attend, s, textlora_attention_chunks(c->texts, e->heads), c->hands);
    }
    textlora_share(behind, s, pieces(s->rows, s->piece), c->hands);
}

static void train(const void *encoder, const void *call)
{
    const struct encoder *e = encoder;
    const struct call *c = call;
    long own;
    struct shared p = shared_of(e, c, &own);
    const float *x = c->x;
    for (long i = c->first; i < c->last; i++) {
        int kept = i >= c->lowest;
        struct stage s = stage_of(e, c, i, &p, own, x);
        float *y = i == c->last - 1 ? c->y : i + 1 >= c->lowest ? input_of(e, c, i + 1) : p.state;
        forward(&s, kept && !c->again ? body_of(e, c, i) : p.body, y, kept && !c->again, i);
        x = y;
    }
}

static void train_back(const void *encoder, const void *call)
{
    const struct encoder *e = encoder;
    const struct call *c = call;
    long own;
    struct shared p = shared_of(e, c, &own);
    const float *grad = c->grad;
    for (long i = c->last - 1; i >= c->lowest; i--) {
        struct stage s = stage_of(e, c, i, &p, own, i > c->first ? input_of(e, c, i) : c->x);
        if (c->again) forward(&s, p.body, p.ds, 1, i); /* y is not asked for */
        else body_at(e, c, i, body_of(e, c, i), 1, &s.b);
        s.grad = grad, s.dx = i > c->lowest ? p.g : c->dx;
        textlora_share(behind_back, &s, pieces(s.rows, s.piece), c->hands);
        if (looks(e, c, i)) textlora_look_back(&s);
        else {
            lay_out_adapters(&s, 1);
            textlora_share(attend_back, &s, textlora_attention_chunks(c->texts, e->heads), c->hands);
            textlora_share(project_back, &s, pieces(s.rows, s.piece), c->hands);
            textlora_share(sum_up, &s, 2 * s.count, c->hands);
        }
        grad = p.g;
    }
}

/* Blocks `first` to `last` - 1: from x to y. */
void textlora_train(const struct encoder *e, const struct call *c) { textlora_with_hands(train, e, c, c->hands); }

/* From the gradient of y to those of every A and B from block `lowest` on, and of x where dx is given. What was kept is written over. */
void textlora_train_back(const struct encoder *e, const struct call *c) { textlora_with_hands(train_back, e, c, c->hands); }

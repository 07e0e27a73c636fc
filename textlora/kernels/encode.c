/* The blocks of the frozen encoder forward, one call for a batch, with the adapters that own its texts: what Python and torch do between twelve calls of
 * a block holds up the other threads, too.
 *
 *   s = x Wqkv^T + b,  x1 = norm(attention(s) Wo^T + bo + x),  y = norm(gelu(x1 Wu^T + bu) Wd^T + bd + x1)
 *
 * to each of the four products of which adapters add theirs (grouped_lora.c). Where only the first token of each text is asked for, the last block forms no keys
 * and values: scores of head h are (q_h W_k,h) X^T, where the key's bias adds the same to all of a text, and its output is (p_h X) W_v,h^T + b_v,h.
 *
 * Composed of the other files' functions. Called by encode.py, which checks all arguments.
 */
#include <string.h>

#include "native.h"

#define EACH __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define INLINE static inline __attribute__((always_inline))
#define LANES 16
#define NAME(f) f
#include "vectors.h"

enum { QKV, OUTPUT, UP, DOWN, PRODUCTS, LONGEST = 512, TEXTS = 32 /* at a time in the last block */, PIECE = 128 /* rows at a time */ };

/* Panels of product.c, or of amx.c where the encoder has `halves`. */
struct dense { const void *panels; const float *bias; };
struct norm { const float *weight, *shift; };
struct block { struct dense of[PRODUCTS]; struct norm first, second; };

struct encoder {
    const struct block *blocks;
    const float *query, *key, *value; /* of the last block, panels of product.c: W_q; of each head W_k, turned, and W_v */
    long layers, width, inner, heads;
    float eps;
    int lanes, halves;
};

struct batch {
    const float *x; /* (rows, width), the input of block `first` */
    float *y;       /* (rows, width), the output of block `last` - 1; (texts, width) with `firsts`, where `last` is the end */
    const int32_t *starts;
    const struct job *jobs; /* those of product p of block i are ends[4 i + p] to ends[4 i + p + 1]; rows are texts in a last block with `firsts` */
    const int64_t *ends;
    float *scratch; /* textlora_encode_scratch numbers */
    uint8_t *rooms, *halves; /* scratch of attention.c and, with `halves`, of amx.c, one after the other for each core */
    long rows, texts, first, last;
    int firsts, hands; /* so many threads may share the rows, of products, and the heads or texts, of attention */
};

/* What a stage of block i works on, `piece` of so many rows at a time. */
struct stage {
    const struct encoder *e;
    const struct batch *b;
    long i, rows, piece;
    const float *x, *residual;
    float *y, *firsts;
};

static long own_scratch(const struct encoder *e)
{
    return PIECE * (2 * e->width + e->inner) + TEXTS * (e->heads + 1) * e->width + e->heads * (LONGEST + LANES);
}

long textlora_encode_scratch(const struct encoder *e, const struct batch *b) { return b->rows * 5 * e->width + b->hands * own_scratch(e); }

/* A thread's own part of a call's scratch. */
static float *own(const struct encoder *e, const struct batch *b, int number) { return b->scratch + b->rows * 5 * e->width + number * own_scratch(e); }

static const struct job *first_job(const struct batch *b, long i, int p) { return b->jobs + b->ends[PRODUCTS * i + p]; }

static long jobs_of(const struct batch *b, long i, int p) { return b->ends[PRODUCTS * i + p + 1] - b->ends[PRODUCTS * i + p]; }

/* y = (y + bias) factor, rows of width numbers. */
EACH static void shift(float *y, const float *bias, float factor, long rows, long width)
{
    for (long r = 0; r < rows; r++, y += width)
        for (long i = 0; i < width; i += LANES) store(y + i, (load(y + i) + load(bias + i)) * factor);
}

EACH static void multiply(float *y, const float *factor, long width)
{
    for (long i = 0; i < width; i += LANES) store(y + i, load(y + i) * load(factor + i));
}

/* Of an adapter's rows those among at to at + rows, counted from at. */
static struct job among(const struct job *job, long at, long rows)
{
    struct job part = *job;
    long first = job->row > at ? job->row - at : 0, last = job->row + job->rows - at;
    part.row = first;
    part.rows = (last < rows ? last : rows) - first;
    if (part.rows < 0) part.rows = 0;
    return part;
}

/* y = x W^T of rows at to at + rows of a batch, with what adapters add to it, and the bias where `biased`; GELU of that in the third. */
static void product(const struct encoder *e, const struct batch *b, int number, long i, int p, const float *x, float *y, long at, long rows, int biased)
{
    const struct dense *d = e->blocks[i].of + p;
    long inner = p == DOWN ? e->inner : e->width, out = p == QKV ? 3 * e->width : p == UP ? e->inner : e->width, jobs = jobs_of(b, i, p);
    int then = p == UP && !jobs ? GELU : STORE;
    const float *bias = biased && !jobs ? d->bias : 0; /* an adapter may have a factor on what is before the bias */
    if (e->halves) textlora_amx_product(x, d->panels, bias, 0, y, b->halves + number * textlora_amx_scratch(), rows, inner, out, then == GELU);
    else textlora_product(x, inner, d->panels, bias, y, out, 0, rows, inner, out, then, e->lanes);
    if (!jobs) return;
    for (const struct job *job = first_job(b, i, p), *end = job + jobs; job < end; job++) {
        struct job mine = among(job, at, rows);
        textlora_lora(x, y, &mine, 1, inner, out, p == QKV ? e->width : out);
    }
    if (p == UP) textlora_gelu(y, d->bias, y, rows, out, 0, e->lanes);
    else if (biased) shift(y, d->bias, 1, rows, out);
}

/* Query, key and value of some rows. */
static void project(const void *what, long chunk, int number)
{
    const struct stage *s = what;
    long H = s->e->width, at = chunk * s->piece, count = s->rows - at < s->piece ? s->rows - at : s->piece;
    product(s->e, s->b, number, s->i, QKV, s->x + at * H, s->y + at * 3 * H, at, count, 1);
}

static void attend(const void *what, long chunk, int number)
{
    const struct stage *s = what;
    const struct encoder *e = s->e;
    textlora_attention_chunk(s->x, 0, s->y, s->b->starts, s->b->rooms, s->b->texts, e->heads, e->width / e->heads, e->lanes, chunk, number);
}

/* What comes behind attention for some rows, of context and residual, so that what lies between stays in a core's cache. */
static void rest(const void *what, long chunk, int number)
{
    const struct stage *s = what;
    const struct encoder *e = s->e;
    const struct batch *b = s->b;
    const struct block *k = e->blocks + s->i;
    long H = e->width, at = chunk * s->piece, count = s->rows - at < s->piece ? s->rows - at : s->piece;
    float *sum = own(e, b, number), *between = sum + PIECE * H, *wide = between + PIECE * H;
    product(e, b, number, s->i, OUTPUT, s->x + at * H, sum, at, count, 0);
    textlora_norm(sum, k->of[OUTPUT].bias, s->residual + at * H, k->first.weight, k->first.shift, between, 0, count, H, e->eps);
    product(e, b, number, s->i, UP, between, wide, at, count, 1);
    product(e, b, number, s->i, DOWN, wide, sum, at, count, 0);
    textlora_norm(sum, k->of[DOWN].bias, between, k->second.weight, k->second.shift, s->y + at * H, 0, count, H, e->eps);
}

/* Shares of one query's scores of a text; places behind the last up to a whole vector are written. */
INLINE void softmax(float *row, long length)
{
    float most = row[0];
    for (long k = 1; k < length; k++) most = row[k] > most ? row[k] : most;
    for (long k = length; k % LANES; k++) row[k] = -__builtin_inff();
    vector sum = {0};
    for (long k = 0; k < length; k += LANES) {
        vector share = exponential(load(row + k) - most);
        sum += share;
        store(row + k, share);
    }
    float one = 1.0f / total(sum);
    for (long k = 0; k < length; k += LANES) store(row + k, load(row + k) * one);
}

/* of (heads, width), queries that meet x as it is, become means of x (length, width), weighted by their softmax. */
EACH static void look(float *of, const float *x, float *shares, long length, long heads, long width)
{
    long room = LONGEST + LANES;
    for (long k = 0; k < length; k++)
        for (long h = 0; h < heads; h++) {
            vector sum[2] = {0};
            long i = 0;
            for (; i + 2 * LANES <= width; i += 2 * LANES) {
                sum[0] += load(of + h * width + i) * load(x + k * width + i);
                sum[1] += load(of + h * width + i + LANES) * load(x + k * width + i + LANES);
            }
            if (i < width) sum[0] += load(of + h * width + i) * load(x + k * width + i);
            shares[h * room + k] = total(sum[0] + sum[1]);
        }
    for (long h = 0; h < heads; h++, of += width, shares += room) {
        softmax(shares, length);
        for (long i = 0; i < width; i += LANES) {
            vector sum = {0};
            for (long k = 0; k < length; k++) sum += shares[k] * load(x + k * width + i);
            store(of + i, sum);
        }
    }
}

/* An adapter of the key on q (width) of one text: to of head h += (q_h B_h) A, rows of width numbers. DoRA's factor is in q. */
EACH static void add_to_keys(const struct job *job, const float *q, float *to, long heads, long width)
{
    long d = width / heads;
    for (long h = 0; h < heads; h++, to += width)
        for (long r = 0; r < job->r; r++) {
            vector sum = {0};
            for (long i = h * d; i < (h + 1) * d; i += LANES) sum += load(q + i) * load(job->B + r * width + i);
            float along = total(sum);
            for (long i = 0; i < width; i += LANES) store(to + i, load(to + i) + along * load(job->A + r * width + i));
        }
}

/* An adapter of the value on means of x (heads, width) of one text: to (width), of head h, becomes (to + (mean_h A^T) B_h) scale. */
EACH static void add_to_values(const struct job *job, const float *means, float *to, long heads, long width)
{
    long d = width / heads;
    for (long h = 0; h < heads; h++, means += width)
        for (long r = 0; r < job->r; r++) {
            vector sum = {0};
            for (long i = 0; i < width; i += LANES) sum += load(means + i) * load(job->A + r * width + i);
            float along = total(sum);
            for (long i = h * d; i < (h + 1) * d; i += LANES) store(to + i, load(to + i) + along * load(job->B + r * width + i));
        }
    if (job->scale) multiply(to, job->scale, width);
}

/* Attention of the first tokens of count texts from at on, in the last block: their context (count, width) and x (count, width). means: (count, heads,
 * width), q (count, width), shares (heads, LONGEST + LANES). */
static void look_first(const struct encoder *e, const struct batch *b, const float *x, long at, long count, float *firsts, float *q, float *means, float *shares, float *context)
{
    long H = e->width, heads = e->heads, d = H / heads, i = e->layers - 1, keys = textlora_product_size(d, H, e->lanes), values = textlora_product_size(H, d, e->lanes);
    const struct job *jobs = first_job(b, i, QKV), *end = jobs + jobs_of(b, i, QKV);
    const float *bias = e->blocks[i].of[QKV].bias;
    for (long n = 0; n < count; n++) memcpy(firsts + n * H, x + b->starts[at + n] * H, H * sizeof(float));
    textlora_product(firsts, H, e->query, 0, q, H, 0, count, H, H, STORE, e->lanes);
    for (const struct job *job = jobs; job < end; job++) {
        struct job part = among(job, at, count);
        if (!job->column) textlora_lora(firsts, q, &part, 1, H, H, H);
    }
    shift(q, bias, 1 / __builtin_sqrtf((float)d), count, H);
    for (const struct job *job = jobs; job < end; job++) {
        struct job part = among(job, at, count);
        for (long n = part.row; n < part.row + part.rows && job->column == H && job->scale; n++) multiply(q + n * H, job->scale, H);
    }
    for (long h = 0; h < heads; h++) textlora_product(q + h * d, H, e->key + h * keys, 0, means + h * H, heads * H, 0, count, d, H, STORE, e->lanes);
    for (const struct job *job = jobs; job < end; job++) {
        struct job part = among(job, at, count);
        for (long n = part.row; n < part.row + part.rows && job->column == H; n++) add_to_keys(job, q + n * H, means + n * heads * H, heads, H);
    }
    for (long n = 0; n < count; n++) look(means + n * heads * H, x + b->starts[at + n] * H, shares, b->starts[at + n + 1] - b->starts[at + n], heads, H);
    for (long h = 0; h < heads; h++) textlora_product(means + h * H, heads * H, e->value + h * values, 0, context + h * d, H, 0, count, H, d, STORE, e->lanes);
    for (const struct job *job = jobs; job < end; job++) {
        struct job part = among(job, at, count);
        for (long n = part.row; n < part.row + part.rows && job->column == 2 * H; n++) add_to_values(job, means + n * heads * H, context + n * H, heads, H);
    }
    shift(context, bias + 2 * H, 1, count, H);
}

/* The first tokens of some texts. */
static void look_at_some(const void *what, long chunk, int number)
{
    const struct stage *s = what;
    const struct encoder *e = s->e;
    long H = e->width, at = chunk * s->piece, count = s->rows - at < s->piece ? s->rows - at : s->piece;
    float *q = own(e, s->b, number) + PIECE * (2 * H + e->inner), *shares = q + TEXTS * H, *means = shares + e->heads * (LONGEST + LANES);
    look_first(e, s->b, s->x, at, count, s->firsts + at * H, q, means, shares, s->y + at * H);
}

static void encode(const void *encoder, const void *batch)
{
    const struct encoder *e = encoder;
    const struct batch *b = batch;
    long T = b->rows, H = e->width, n = b->texts, piece = piece_of(T, PIECE, b->hands), last = b->last - (b->firsts ? 1 : 0);
    float *state = b->scratch, *s = state + T * H, *context = s + 3 * T * H, *firsts = s;
    const float *x = b->x;
    for (long i = b->first; i < last; i++) {
        float *y = i == b->last - 1 ? b->y : state;
        textlora_share(project, &(struct stage){e, b, i, T, piece, .x = x, .y = s}, pieces(T, piece), b->hands);
        textlora_share(attend, &(struct stage){e, b, i, T, piece, .x = s, .y = context}, textlora_attention_chunks(n, e->heads), b->hands);
        textlora_share(rest, &(struct stage){e, b, i, T, piece, .x = context, .residual = x, .y = y}, pieces(T, piece), b->hands);
        x = y;
    }
    if (!b->firsts) return;
    piece = piece_of(n, TEXTS, b->hands);
    textlora_share(look_at_some, &(struct stage){e, b, last, n, piece, .x = x, .y = context, .firsts = firsts}, pieces(n, piece), b->hands);
    textlora_share(rest, &(struct stage){e, b, last, n, piece, .x = context, .residual = firsts, .y = b->y}, pieces(n, piece), b->hands);
}

/* Blocks `first` to `last` - 1 of a batch. */
void textlora_encode(const struct encoder *e, const struct batch *b) { textlora_with_hands(encode, e, b, b->hands); }

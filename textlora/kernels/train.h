/* What train.c and first.c have in common. */
#include "native.h"

enum { MOST = 3 };

/* A dense layer laid out forward and back, and its bias; of key and value of first tokens head by head. */
struct dense { const float *forward, *back, *bias; };
struct norm { const float *weight, *shift; };
struct block { struct dense qkv, output, up, down; struct norm first, second; };

struct encoder {
    const struct block *blocks;
    struct dense query, key, value; /* of the last block */
    long layers, width, inner, heads;
    float eps;
    int lanes;
};

/* A (r, width), B (width, r), contiguous, on the output of the stacked q, k, v that begins at column; gradients of both, or none. */
struct adapter { const float *A, *B; float *dA, *dB; long r, column; float scaling; };

struct call {
    const float *x; /* (rows, width), the input of block `first` */
    const int32_t *starts;
    float *kept;    /* textlora_train_kept numbers */
    float *y;       /* (rows, width), the output of block `last` - 1; (texts, width) with `firsts`, where `last` is the end */
    const float *grad; /* of y, on the way back */
    float *dx;      /* the gradient of x, or none */
    float *scratch; /* textlora_train_scratch numbers */
    uint8_t *rooms; /* scratch of attention.c for each hand */
    const struct adapter *adapters; /* those of block i are ends[i] to ends[i + 1], at most one to a column */
    const int64_t *ends;
    long rows, texts, first, last, lowest; /* lowest: the first block with a way back; `last` where there is none */
    int firsts, again, hands; /* again: keep no more than each block's x */
};

/* What a block keeps. In a block of first tokens rows are texts; there s is the query, scaled, u has the rows (q, heads k, heads v) of one adapter after the
 * other, keys are (texts, heads, width), queries turned to what meets x, shares (rows, heads up to a whole vector) the softmax of scores, and means (texts, heads, width) what they give. */
struct body { float *x, *s, *u, *du, *first, *second, *slope, *one, *two, *keys, *means, *shares; };

struct stage {
    const struct encoder *e;
    const struct call *c;
    const struct block *k;
    const struct adapter *adapters;
    long count, rank, rows, piece, own;
    struct body b;
    const float *x, *residual, *grad;
    float *y, *context, *ds, *du, *dx, *turned, *panels, *hands; /* hands: each thread's own part of the scratch */
    const float *A, *B[MOST]; /* adapters laid out */
    int slopes;
};

static inline long larger(long a, long b) { return a > b ? a : b; }

/* Numbers of a weight laid out, up to a whole line. */
static inline long size(const struct encoder *e, long inner, long out) { return whole(textlora_product_size(inner, out, e->lanes)); }

long textlora_look_panels(const struct encoder *e, const struct adapter *adapters, long count);
long textlora_look_size(const struct encoder *e);
void textlora_look(struct stage *s);
void textlora_look_back(struct stage *s);

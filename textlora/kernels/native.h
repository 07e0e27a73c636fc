/* What the files here need of each other: described where it is written. */
#include <stdint.h>

struct room;
enum { STORE, GELU, TIMES, PLUS };

/* A chunk of something, by the thread of that number. */
typedef void work(const void *what, long chunk, int number);

/* An adapter's layer on rows of a batch. */
struct job {
    int64_t row, rows; /* of x and y */
    const float *A, *B, *scale; /* (r, in), (r, out) with s in it, and DoRA's factor (out) or nothing */
    int64_t r, column; /* of y, the first of out */
};

/* Numbers rounded up to whole lines of memory. */
static inline long whole(long numbers) { return (numbers + 15) / 16 * 16; }

static inline long pieces(long rows, long piece) { return (rows + piece - 1) / piece; }

/* So many rows at a time that each hand gets 32 or more, where there are as many, `most` at most, a multiple of 8. */
static inline long piece_of(long rows, long most, int hands)
{
    long count = pieces(rows, most), least = rows / 32 < hands ? rows / 32 : hands;
    return (pieces(rows, count > least ? count : least) + 7) / 8 * 8;
}

void textlora_attention(const float *qkv, const float *grad, float *out, const int32_t *starts, struct room *room, long texts, long heads, long first, long last, long d, float scale, int lanes);
long textlora_attention_scratch(void);
long textlora_attention_chunks(long texts, long heads);
void textlora_attention_chunk(const float *qkv, const float *grad, float *out, const int32_t *starts, uint8_t *rooms, long texts, long heads, long d, int lanes, long chunk, int number);
void textlora_norm(float *y, const float *bias, const float *residual, const float *weight, const float *shift, float *out, float *scale, long rows, long width, float eps);
void textlora_norm_back(const float *d, const float *weight, float *x, const float *scale, long rows, long width);
long textlora_product_size(long inner, long out, int lanes);
void textlora_product_lay_out(const float *w, float *to, long inner, long out, long next_in, long next_out, float factor, int lanes);
void textlora_product(const float *x, long x_stride, const float *panels, const float *bias, float *y, long y_stride, float *slope, long rows, long inner, long out, int then, int lanes);
void textlora_cross(const float *a, long a_stride, const float *b, long b_stride, float *to, long rows, long count, long columns, float factor, int lanes);
void textlora_gelu(float *h, const float *bias, float *out, long rows, long columns, int slope, int lanes);
void textlora_lora(const float *x, float *y, const struct job *jobs, long count, long in, long width, long out);
void textlora_amx_product(const float *x, const uint8_t *w, const float *bias, const float *residual, float *y, uint8_t *scratch, long rows, long in, long out, int with_gelu);
long textlora_amx_scratch(void);
void textlora_share(work *work, const void *what, long chunks, int hands);
void textlora_with_hands(void (*call)(const void *, const void *), const void *first, const void *second, int hands);

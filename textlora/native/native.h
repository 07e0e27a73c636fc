/* What the files here need of each other: described where it is written. */
#include <stdint.h>

struct room;
enum { STORE, GELU, TIMES, PLUS };

void textlora_attention(const float *qkv, const float *grad, float *out, const int32_t *starts, struct room *room, long texts, long heads, long d, float scale, int lanes);
void textlora_norm(float *y, const float *bias, const float *residual, const float *weight, const float *shift, float *out, float *scale, long rows, long width, float eps);
void textlora_norm_back(const float *d, const float *weight, float *x, const float *scale, long rows, long width);
long textlora_product_size(long inner, long out, int lanes);
void textlora_product_lay_out(const float *w, float *to, long inner, long out, long next_in, long next_out, float factor, int lanes);
void textlora_product(const float *x, long x_stride, const float *panels, const float *bias, float *y, long y_stride, float *slope, long rows, long inner, long out, int then, int lanes);
void textlora_cross(const float *a, long a_stride, const float *b, long b_stride, float *to, long rows, long count, long columns, float factor, int lanes);

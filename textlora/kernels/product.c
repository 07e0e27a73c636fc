/* Float32 products of the frozen base on one core, with what follows them, and GELU alone: torch's multiply anew-packed weights
 * and leave the rest to passes of their own.
 *
 * Written in vectors of the compiler's, once (product.h), compiled for AVX-512 and for AVX2. Called by __init__.py, which checks all arguments.
 */
#include <string.h>

#include "native.h"

enum { BLOCK = 1 << 15 /* numbers of x, or LEAST rows where that is more, that meet one panel after the other */, LEAST = 64 };

#define TARGET __attribute__((target("arch=x86-64-v4")))
#define LANES 16
#define ROWS 8
#define WIDE 3
#define STEPS 4
#define NAME(f) f##_of_16
#include "product.h"
#undef TARGET
#undef LANES
#undef ROWS
#undef WIDE
#undef STEPS
#undef NAME

#define TARGET __attribute__((target("arch=x86-64-v3")))
#define LANES 8
#define ROWS 4
#define WIDE 3
#define STEPS 8
#define NAME(f) f##_of_8
#include "product.h"

/* Of W laid out, in numbers. */
long textlora_product_size(long inner, long out, int lanes)
{
    long width = out > lanes ? 3 * lanes : lanes;
    return (out + width - 1) / width * width * inner;
}

/* factor W^T (inner, out) in panels; a step along inner is next_in numbers of w, one along out next_out. */
void textlora_product_lay_out(const float *w, float *to, long inner, long out, long next_in, long next_out, float factor, int lanes)
{
    if (lanes == 16) lay_out_of_16(w, to, inner, out, next_in, next_out, factor);
    else lay_out_of_8(w, to, inner, out, next_in, next_out, factor);
}

/* With s = x W^T + bias, x (rows, inner) and y (rows, out): y = s, gelu(s), y s or y + s as `then` says; slope, where it is given, that of gelu. Rows
 * of x are x_stride numbers apart, those of y and slope y_stride. Panels begin at multiples of 64 bytes. */
void textlora_product(const float *x, long x_stride, const float *panels, const float *bias, float *y, long y_stride, float *slope, long rows, long inner, long out, int then, int lanes)
{
    if (lanes == 16) product_of_16(x, x_stride, panels, bias, y, y_stride, slope, rows, inner, out, then);
    else product_of_8(x, x_stride, panels, bias, y, y_stride, slope, rows, inner, out, then);
}

/* to (count, columns) = factor a^T b: a (rows, count), b (rows, columns), rows a_stride and b_stride apart; columns a multiple of 16. */
void textlora_cross(const float *a, long a_stride, const float *b, long b_stride, float *to, long rows, long count, long columns, float factor, int lanes)
{
    if (lanes == 16) cross_of_16(a, a_stride, b, b_stride, to, rows, count, columns, factor);
    else cross_of_8(a, a_stride, b, b_stride, to, rows, count, columns, factor);
}

/* out = gelu(h + bias), (rows, columns); h becomes the slope there, or stays where slope is 0. columns a multiple of 16. */
void textlora_gelu(float *h, const float *bias, float *out, long rows, long columns, int slope, int lanes)
{
    if (lanes == 16) bend_of_16(h, bias, out, rows, columns, slope);
    else bend_of_8(h, bias, out, rows, columns, slope);
}

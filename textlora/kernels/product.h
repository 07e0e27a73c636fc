/* Float32 products of one kind of processor: product.c includes this once for each, as attention.c does attention.h, with
 *   TARGET, LANES, NAME  as there
 *   ROWS, WIDE           rows of x and vectors of outputs whose sums are in registers at a time
 *   STEPS                of the inner dimension that are written out: as many as the compiler keeps in registers
 *
 * W^T lies in panels of PANEL outputs, a panel's rows one after the other, so that a step of the inner loop reads what lies side by side; x is read as it
 * lies. A block of rows meets all panels before the next block does, and while it meets one, the next panel, and after it the next rows, are called into the
 * core's second cache. What follows a product (bias, GELU, another factor or addend) is done on a tile that has just left the registers.
 *
 * The sum over the inner dimension has one order, whatever rows lie beside a row.
 */
#define INLINE TARGET static inline __attribute__((always_inline))
#define vector NAME(vector)
#define integers NAME(integers)
#define loose NAME(loose)
#define PANEL (WIDE * LANES)

#include "vectors.h"
#include "gelu.h"

/* sum += row[i] panel for one step of the inner dimension, count rows and wide vectors. */
INLINE void NAME(step)(const float *const *row, long i, const float *panel, int count, int wide, vector (*sum)[WIDE])
{
    vector w[WIDE];
#pragma GCC unroll 4
    for (int v = 0; v < wide; v++) w[v] = NAME(load)(panel + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < count; r++)
#pragma GCC unroll 4
        for (int v = 0; v < wide; v++) sum[r][v] += row[r][i] * w[v];
}

/* tile = x panel for count rows of x, of which there are `there`; calls two lines of next each STEPS steps. */
INLINE void NAME(tile)(const float *x, long x_stride, const float *panel, float *tile, long inner, long there, int count, int wide, const float *next)
{
    vector sum[ROWS][WIDE];
    const float *row[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < count; r++) {
        row[r] = x + (r < there ? r : 0) * x_stride;
#pragma GCC unroll 4
        for (int v = 0; v < wide; v++) sum[r][v] = (vector){0};
    }
    long i = 0;
    for (; i + STEPS <= inner; i += STEPS, next += 32) {
        __builtin_prefetch(next, 0, 2);
        __builtin_prefetch(next + 16, 0, 2);
#pragma GCC unroll 8
        for (int u = 0; u < STEPS; u++, panel += wide * LANES) NAME(step)(row, i + u, panel, count, wide, sum);
    }
    for (; i < inner; i++, panel += wide * LANES) NAME(step)(row, i, panel, count, wide, sum);
#pragma GCC unroll 8
    for (int r = 0; r < count; r++)
#pragma GCC unroll 4
        for (int v = 0; v < wide; v++) NAME(store)(tile + r * PANEL + v * LANES, sum[r][v]);
}

/* Of whole rows, of half as many, and of one vector: functions of their own, or the compiler does not keep all sums in registers. */
TARGET __attribute__((noinline)) static void NAME(whole)(const float *x, long x_stride, const float *panel, float *tile, long inner, long there, const float *next)
{
    NAME(tile)(x, x_stride, panel, tile, inner, there, ROWS, WIDE, next);
}

TARGET __attribute__((noinline)) static void NAME(half)(const float *x, long x_stride, const float *panel, float *tile, long inner, long there, const float *next)
{
    NAME(tile)(x, x_stride, panel, tile, inner, there, ROWS / 2, WIDE, next);
}

TARGET __attribute__((noinline)) static void NAME(narrow)(const float *x, long x_stride, const float *panel, float *tile, long inner, long there, const float *next)
{
    NAME(tile)(x, x_stride, panel, tile, inner, there, ROWS, 1, next);
}

/* One vector of a tile, with its bias, to where it belongs. */
INLINE void NAME(put)(vector s, float *y, float *slope, int then)
{
    if (then == GELU) {
        vector one;
        s = NAME(gelu)(s, slope ? &one : 0);
        if (slope) NAME(store)(slope, one);
    } else if (then == TIMES) s *= NAME(load)(y);
    else if (then == PLUS) s += NAME(load)(y);
    NAME(store)(y, s);
}

/* out = gelu(h + bias), rows of columns numbers, a multiple of LANES; h becomes the slope there, or stays where slope is 0. */
TARGET static void NAME(bend)(float *h, const float *bias, float *out, long rows, long columns, int slope)
{
    for (long r = 0; r < rows; r++, h += columns, out += columns)
        for (long i = 0; i < columns; i += LANES) {
            vector x = NAME(load)(h + i), one;
            if (bias) x += NAME(load)(bias + i);
            NAME(store)(out + i, NAME(gelu)(x, slope ? &one : 0));
            if (slope) NAME(store)(h + i, one);
        }
}

/* A tile of there rows and columns to y and slope, rows of which are out numbers apart. */
INLINE void NAME(finish_as)(const float *tile, const float *bias, float *y, float *slope, long there, long columns, long out, int then)
{
    for (long r = 0; r < there; r++, tile += PANEL, y += out, slope += slope ? out : 0) {
        long c = 0;
        for (; c + LANES <= columns; c += LANES) {
            vector s = NAME(load)(tile + c);
            NAME(put)(bias ? s + NAME(load)(bias + c) : s, y + c, slope ? slope + c : 0, then);
        }
        if (c == columns) continue;
        float before[LANES] = {0}, after[LANES] = {0}, more[LANES] = {0}; /* the last columns of a width that is no multiple of LANES */
        long size = (columns - c) * sizeof(float);
        if (bias) memcpy(more, bias + c, size);
        memcpy(after, y + c, size);
        NAME(put)(NAME(load)(tile + c) + NAME(load)(more), after, slope ? before : 0, then);
        memcpy(y + c, after, size);
        if (slope) memcpy(slope + c, before, size);
    }
}

TARGET static void NAME(finish)(const float *tile, const float *bias, float *y, float *slope, long there, long columns, long out, int then)
{
    if (then == STORE && !bias) NAME(finish_as)(tile, 0, y, 0, there, columns, out, STORE);
    else if (then == STORE) NAME(finish_as)(tile, bias, y, 0, there, columns, out, STORE);
    else if (then == TIMES) NAME(finish_as)(tile, bias, y, 0, there, columns, out, TIMES);
    else if (then == PLUS) NAME(finish_as)(tile, bias, y, 0, there, columns, out, PLUS);
    else NAME(finish_as)(tile, bias, y, slope, there, columns, out, GELU);
}

/* Rows of a tile that will be written are called into the core's first cache. */
INLINE void NAME(expect)(float *y, long there, long out)
{
    for (long r = 0; r < there; r++)
        for (long c = 0; c < PANEL; c += 16) __builtin_prefetch(y + r * out + c, 1, 3);
}

/* Panels have one vector where that is enough. */
INLINE long NAME(width_for)(long out) { return out > LANES ? PANEL : LANES; }

TARGET static void NAME(lay_out)(const float *w, float *to, long inner, long out, long next_in, long next_out, float factor)
{
    long width = NAME(width_for)(out);
    for (long p = 0; p < out; p += width)
        for (long i = 0; i < inner; i++)
            for (long c = 0; c < width; c++) *to++ = p + c < out ? w[(p + c) * next_out + i * next_in] * factor : 0;
}

TARGET static void NAME(product)(const float *x, long x_stride, const float *panels, const float *bias, float *y, long y_stride, float *slope, long rows, long inner, long out, int then)
{
    float tile[ROWS * PANEL] __attribute__((aligned(64)));
    long block = BLOCK / inner / ROWS * ROWS, calls = inner / STEPS * 2; /* lines that one tile calls */
    long width = NAME(width_for)(out);
    if (block < LEAST) block = LEAST;
    for (long start = 0; start < rows; start += block) {
        long end = start + block < rows ? start + block : rows, after = end + block < rows ? end + block : rows;
        long called = 0; /* lines of the rows of the next block: late, or panels push them out again */
        for (long p = 0; p < out; p += width) {
            const float *panel = panels + p * inner, *next = p + width < out ? panel + width * inner : panels;
            long lines = width * inner / 16; /* of the next panel, not called yet */
            for (long m = start; m < end; m += ROWS, lines -= calls) {
                long there = end - m < ROWS ? end - m : ROWS;
                const float *from = x + m * x_stride, *ahead = panel;
                float *to = y + m * y_stride + p, *beside = slope ? slope + m * y_stride + p : 0;
                if (lines > 0) ahead = next + width * inner - lines * 16;
                else if (p + 4 * PANEL >= out && called * 16 < (after - end) * x_stride) ahead = x + end * x_stride + called * 16, called += calls;
                NAME(expect)(to, there, y_stride);
                if (slope) NAME(expect)(beside, there, y_stride);
                if (width < PANEL) NAME(narrow)(from, x_stride, panel, tile, inner, there, ahead);
                else if (there > ROWS / 2) NAME(whole)(from, x_stride, panel, tile, inner, there, ahead);
                else NAME(half)(from, x_stride, panel, tile, inner, there, ahead);
                NAME(finish)(tile, bias ? bias + p : 0, to, beside, there, out - p < width ? out - p : width, y_stride, then);
            }
        }
    }
}

/* to (count, columns) of a block of both: count rows, wide vectors. */
INLINE void NAME(crossed)(const float *a, long a_stride, const float *b, long b_stride, float *to, long columns, long rows, long count, int wide, float factor)
{
    vector sum[ROWS][WIDE];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < wide; v++) sum[r][v] = (vector){0};
    for (long t = 0; t < rows; t++, a += a_stride, b += b_stride) {
        vector w[WIDE];
#pragma GCC unroll 4
        for (int v = 0; v < wide; v++) w[v] = NAME(load)(b + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int v = 0; v < wide; v++) sum[r][v] += a[r < count ? r : 0] * w[v];
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
        if (r < count)
#pragma GCC unroll 4
            for (int v = 0; v < wide; v++) NAME(store)(to + r * columns + v * LANES, sum[r][v] * factor);
}

/* to = factor a^T b: a (rows, count), b (rows, columns), columns a multiple of LANES. */
TARGET static void NAME(cross)(const float *a, long a_stride, const float *b, long b_stride, float *to, long rows, long count, long columns, float factor)
{
    for (long r = 0; r < count; r += ROWS)
        for (long c = 0; c < columns; c += PANEL) {
            long there = count - r < ROWS ? count - r : ROWS, wide = (columns - c) / LANES;
            const float *from = a + r, *beside = b + c;
            float *at = to + r * columns + c;
            if (wide >= 3) NAME(crossed)(from, a_stride, beside, b_stride, at, columns, rows, there, 3, factor);
            else if (wide == 2) NAME(crossed)(from, a_stride, beside, b_stride, at, columns, rows, there, 2, factor);
            else NAME(crossed)(from, a_stride, beside, b_stride, at, columns, rows, there, 1, factor);
        }
}
#undef vector
#undef integers
#undef loose
#undef INLINE
#undef PANEL

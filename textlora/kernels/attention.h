/* Attention of one kind of processor: attention.c includes this once for each, with
 *   TARGET  what its functions are compiled for
 *   LANES   numbers in a vector
 *   ROWS    queries at a time, 4 or 8: as many as registers hold sums of, two vectors each
 *   NAME(f) f with the kind's name behind it
 *
 * Of a text and a head the keys (and on the way back the values, too) are turned once, so that scores of one query are vectors: in blocks of two vectors of
 * keys, d rows each. A softmax is that of a whole row. On the way back it is computed again, so nothing is kept but q, k and v.
 */
#define INLINE TARGET static inline __attribute__((always_inline))
#define vector NAME(vector)
#define integers NAME(integers)
#define loose NAME(loose)

#include "vectors.h"

/* LANES vectors as the columns of what they were the rows of: each round puts the numbers of the first half and of the second in turns. */
INLINE void NAME(transpose)(vector *rows)
{
    integers places = NAME(places)(), low = (places >> 1) + (places & 1) * LANES, high = low + LANES / 2;
#pragma GCC unroll 4
    for (int round = 1; round < LANES; round *= 2) {
        vector mixed[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            mixed[2 * i] = __builtin_shuffle(rows[i], rows[i + LANES / 2], low);
            mixed[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + LANES / 2], high);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) rows[i] = mixed[i];
    }
}

/* Keys (length of d numbers, stride apart) turned. Places behind the last are zero. */
INLINE void NAME(turn)(const float *keys, float *turned, long length, long stride, int d)
{
    for (long first = 0; first < length; first += 2 * LANES, turned += 2 * LANES * d) {
        int wide = length - first > LANES ? 2 : 1;
        for (int w = 0; w < wide; w++)
            for (int part = 0; part < d; part += LANES) {
                vector rows[LANES];
#pragma GCC unroll 16
                for (int k = 0; k < LANES; k++) {
                    long key = first + w * LANES + k;
                    rows[k] = key < length ? NAME(load)(keys + key * stride + part) : (vector){0};
                }
                NAME(transpose)(rows);
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) NAME(store)(turned + ((part + i) * wide + w) * LANES, rows[i]);
            }
    }
}

/* sum (count, wide vectors) = a b: a (count, n), b (n, wide vectors), rows of a and b a_stride and b_stride apart. */
INLINE void NAME(product)(const float *a, long a_stride, const float *b, long b_stride, long n, int count, int wide, vector (*sum)[2])
{
#pragma GCC unroll 8
    for (int r = 0; r < count; r++)
#pragma GCC unroll 2
        for (int w = 0; w < wide; w++) sum[r][w] = (vector){0};
    for (long k = 0; k < n; k++, b += b_stride) {
        vector row[2];
#pragma GCC unroll 2
        for (int w = 0; w < wide; w++) row[w] = NAME(load)(b + w * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < count; r++)
#pragma GCC unroll 2
            for (int w = 0; w < wide; w++) sum[r][w] += a[r * a_stride + k] * row[w];
    }
}

/* Count rows of d numbers times all keys, as rows of ROOM numbers. */
INLINE void NAME(scores)(const float *rows, const float *turned, float *to, long length, int count, int d)
{
    vector sum[ROWS][2];
    long k = 0;
    for (; length - k > LANES; k += 2 * LANES, turned += 2 * LANES * d) {
        NAME(product)(rows, d, turned, 2 * LANES, d, count, 2, sum);
#pragma GCC unroll 8
        for (int r = 0; r < count; r++)
#pragma GCC unroll 2
            for (int w = 0; w < 2; w++) NAME(store)(to + r * ROOM + k + w * LANES, sum[r][w]);
    }
    if (k < length) {
        NAME(product)(rows, d, turned, LANES, d, count, 1, sum);
#pragma GCC unroll 8
        for (int r = 0; r < count; r++) NAME(store)(to + r * ROOM + k, sum[r][0]);
    }
}

/* A row of scores as shares up to a factor, which is returned; places behind length become zero. */
INLINE float NAME(softmax)(float *row, long length)
{
    long last = (length - 1) / LANES * LANES;
    vector lowest = NAME(all)(-__builtin_inff()), most = lowest, sum = {0}, end = NAME(load)(row + last);
    end = NAME(where)(NAME(places)() < (int32_t)(length - last), end, lowest);
    for (long k = 0; k < last; k += LANES) {
        vector s = NAME(load)(row + k);
        most = NAME(where)(s < most, most, s);
    }
    float top = NAME(largest)(NAME(where)(end < most, most, end));
    for (long k = 0; k < last; k += LANES) {
        vector share = NAME(exponential)(NAME(load)(row + k) - top);
        sum += share;
        NAME(store)(row + k, share);
    }
    end = NAME(exponential)(end - top);
    NAME(store)(row + last, end);
    return 1.0f / NAME(total)(sum + end);
}

/* to = factor (shares times values): count rows of shares, length values of d numbers; two vectors of a row at a time. */
INLINE void NAME(mean)(const float *shares, const float *values, long length, float *to, long stride, int there, int count, int d, const float *factors)
{
    int wide = d > LANES ? 2 : 1;
    for (int part = 0; part < d; part += wide * LANES) {
        vector sum[ROWS][2];
        NAME(product)(shares, ROOM, values + part, d, length, count, wide, sum);
#pragma GCC unroll 8
        for (int r = 0; r < count; r++)
            for (int w = 0; w < wide && r < there; w++) NAME(store)(to + r * stride + part + w * LANES, sum[r][w] * factors[r]);
    }
}

/* to (length, d) += shares^T rows: count rows of d numbers. */
INLINE void NAME(spread)(const float *shares, const float *rows, float *to, long length, int count, int d)
{
    int wide = d > LANES ? 2 : 1;
    for (int part = 0; part < d; part += wide * LANES) {
        vector row[ROWS][2];
#pragma GCC unroll 8
        for (int r = 0; r < count; r++)
#pragma GCC unroll 2
            for (int w = 0; w < wide; w++) row[r][w] = NAME(load)(rows + r * d + part + w * LANES);
        for (long k = 0; k < length; k++) {
            vector sum[2];
#pragma GCC unroll 2
            for (int w = 0; w < wide; w++) sum[w] = NAME(load)(to + k * d + part + w * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < count; r++)
#pragma GCC unroll 2
                for (int w = 0; w < wide; w++) sum[w] += shares[r * ROOM + k] * row[r][w];
#pragma GCC unroll 2
            for (int w = 0; w < wide; w++) NAME(store)(to + k * d + part + w * LANES, sum[w]);
        }
    }
}

/* Rows (there of them, stride apart) times scale, side by side; behind them rows of zeros up to count. */
INLINE void NAME(gather)(const float *from, long stride, float *rows, long there, long count, int d, float scale)
{
    for (long r = 0; r < count; r++)
        for (int i = 0; i < d; i += LANES) NAME(store)(rows + r * d + i, r < there ? NAME(load)(from + r * stride + i) * scale : (vector){0});
}

/* Some queries of a text and head, there of them from q on: their rows of out. count is ROWS or half of it. */
INLINE void NAME(forward)(const struct room *room, const float *q, long stride, float *out, long out_stride, long length, int there, int count, int d, float scale)
{
    float shares[ROWS * ROOM] __attribute__((aligned(64))), rows[ROWS * WIDEST] __attribute__((aligned(64))), factors[ROWS];
    NAME(gather)(q, stride, rows, there, count, d, scale);
    NAME(scores)(rows, room->keys, shares, length, count, d);
    for (int r = 0; r < count; r++) factors[r] = NAME(softmax)(shares + r * ROOM, length);
    NAME(mean)(shares, room->rows, length, out, out_stride, there, count, d, factors);
}

/* The same queries' dq, and what they add to dk and dv. With p = softmax(scale q k^T): dp = grad v^T, ds = p (dp - sum of p dp), dq = scale ds k,
 * dk += ds^T scale q, dv += p^T grad. Rows that are not there have a gradient of zeros, and so add nothing. */
INLINE void NAME(backward)(struct room *room, const float *q, const float *grad, float *dq, long stride, long grad_stride, long length, int there, int count, int d, float scale)
{
    float shares[ROWS * ROOM] __attribute__((aligned(64))), slopes[ROWS * ROOM] __attribute__((aligned(64))), scales[ROWS];
    float rows[ROWS * WIDEST] __attribute__((aligned(64))), grads[ROWS * WIDEST] __attribute__((aligned(64)));
    NAME(gather)(q, stride, rows, there, count, d, scale);
    NAME(gather)(grad, grad_stride, grads, there, count, d, 1.0f);
    NAME(scores)(rows, room->keys, shares, length, count, d);
    NAME(scores)(grads, room->values, slopes, length, count, d);
    for (int r = 0; r < count; r++) {
        float *p = shares + r * ROOM, *s = slopes + r * ROOM, factor = NAME(softmax)(p, length);
        vector along = {0};
        for (long k = 0; k < length; k += LANES) {
            vector share = NAME(load)(p + k) * factor;
            NAME(store)(p + k, share);
            along += share * NAME(load)(s + k);
        }
        float mean = NAME(total)(along);
        for (long k = 0; k < length; k += LANES) NAME(store)(s + k, NAME(load)(p + k) * (NAME(load)(s + k) - mean));
        scales[r] = scale;
    }
    NAME(mean)(slopes, room->rows, length, dq, stride, there, count, d, scales);
    NAME(spread)(slopes, rows, room->dk, length, count, d);
    NAME(spread)(shares, grads, room->dv, length, count, d);
}

/* A text and head; out is the gradient of q where there is a grad, those of k and v lie one and two widths behind. Sums stay in registers because
 * count is a constant in each call. */
INLINE void NAME(head)(struct room *room, const float *q, const float *grad, float *out, long width, long length, int d, float scale)
{
    long stride = 3 * width;
    NAME(turn)(q + width, room->keys, length, stride, d);
    NAME(gather)(q + (grad ? width : 2 * width), stride, room->rows, length, length, d, 1.0f);
    if (grad) {
        NAME(turn)(q + 2 * width, room->values, length, stride, d);
        memset(room->dk, 0, length * d * sizeof(float));
        memset(room->dv, 0, length * d * sizeof(float));
    }
    for (long at = 0; at < length; at += ROWS) {
        int there = length - at < ROWS ? length - at : ROWS;
        if (grad && there > ROWS / 2) NAME(backward)(room, q + at * stride, grad + at * width, out + at * stride, stride, width, length, there, ROWS, d, scale);
        else if (grad) NAME(backward)(room, q + at * stride, grad + at * width, out + at * stride, stride, width, length, there, ROWS / 2, d, scale);
        else if (there > ROWS / 2) NAME(forward)(room, q + at * stride, stride, out + at * width, width, length, there, ROWS, d, scale);
        else NAME(forward)(room, q + at * stride, stride, out + at * width, width, length, there, ROWS / 2, d, scale);
    }
    if (grad)
        for (long k = 0; k < length; k++) {
            memcpy(out + k * stride + width, room->dk + k * d, d * sizeof(float));
            memcpy(out + k * stride + 2 * width, room->dv + k * d, d * sizeof(float));
        }
}

TARGET static void NAME(attention)(const float *qkv, const float *grad, float *out, const int32_t *starts, struct room *room, long texts, long heads, long first, long last, long d, float scale)
{
    long width = heads * d;
    for (long n = 0; n < texts; n++)
        for (long h = first; h < last; h++) {
            long at = starts[n] * width + h * d, length = starts[n + 1] - starts[n];
            const float *q = qkv + starts[n] * 3 * width + h * d;
            float *dq = out + starts[n] * 3 * width + h * d;
            if (d == 16 && grad) NAME(head)(room, q, grad + at, dq, width, length, 16, scale);
            else if (d == 32 && grad) NAME(head)(room, q, grad + at, dq, width, length, 32, scale);
            else if (grad) NAME(head)(room, q, grad + at, dq, width, length, 64, scale);
            else if (d == 16) NAME(head)(room, q, 0, out + at, width, length, 16, scale);
            else if (d == 32) NAME(head)(room, q, 0, out + at, width, length, 32, scale);
            else NAME(head)(room, q, 0, out + at, width, length, 64, scale);
        }
}

#undef vector
#undef integers
#undef loose
#undef INLINE

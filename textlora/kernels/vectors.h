/* Vectors of LANES numbers as compilers have them, and what attention.h, passes.c and product.h need of them. Included with
 *   INLINE  the head of its functions
 *   LANES   numbers in a vector, 8 or 16
 *   NAME(f) f as it is called there
 */
typedef float vector __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* in memory, anywhere */
typedef int32_t integers __attribute__((vector_size(4 * LANES)));

INLINE vector NAME(load)(const float *from) { return *(const loose *)from; }

INLINE void NAME(store)(float *to, vector v) { *(loose *)to = v; }

INLINE vector NAME(all)(float x) { return x - (vector){0}; }

INLINE vector NAME(where)(integers mask, vector a, vector b) { return (vector)((mask & (integers)a) | (~mask & (integers)b)); }

/* 0, 1, 2, ... */
INLINE integers NAME(places)(void)
{
    static const int32_t from[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    integers places;
    memcpy(&places, from, sizeof places);
    return places;
}

/* Each number beside the one half a vector, a quarter, ... away. */
INLINE vector NAME(other)(vector v, int half) { return __builtin_shuffle(v, NAME(places)() ^ half); }

INLINE float NAME(total)(vector v)
{
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2) v += NAME(other)(v, half);
    return v[0];
}

INLINE float NAME(largest)(vector v)
{
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2) {
        vector w = NAME(other)(v, half);
        v = NAME(where)(v < w, w, v);
    }
    return v[0];
}

INLINE vector NAME(polynomial)(vector t, const float *c, int degree)
{
    vector y = NAME(all)(c[degree]);
    while (degree--) y = y * t + c[degree];
    return y;
}

/* e^x for x <= 0: 2^n 2^f with f from -1/2 to 1/2, coefficients by least squares, error 2e-9; nothing below e^-87. */
INLINE vector NAME(exponential)(vector x)
{
    static const float C[] = {1.0f, 6.93147206e-1f, 2.40226469e-1f, 5.55032877e-2f, 9.61848912e-3f, 1.33999343e-3f, 1.53457690e-4f};
    const float round = 12582912.0f; /* 1.5 2^23: the sum's last bits are the nearest whole number */
    vector t = x * 1.44269504f, n = t + round, y = NAME(polynomial)(t - (n - round), C, 6), none = {0};
    return NAME(where)(x < -87.0f, none, (vector)((integers)y + ((integers)n << 23)));
}

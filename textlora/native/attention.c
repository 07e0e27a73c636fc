/* Attention inside each of many short texts, in one call: torch's has a cost per call, and packed texts are of many lengths.
 *
 * For a text and a head the keys are turned once, so that 16 scores are one vector; the softmax is that of whole rows (no text is long here).
 * Vectors are AVX-512's, float32, 16 numbers. Called by __init__.py, which checks all arguments.
 */
#include <cpuid.h>
#include <immintrin.h>
#include <stdint.h>

#define VECTORS __attribute__((target("avx512f,avx512dq,fma")))
#define INLINE VECTORS static inline __attribute__((always_inline))

enum { LANES = 16, LONGEST = 128, WIDEST = 64, ROWS = 4 /* queries at a time */ };

/* Of all functions here, in amx.c, lora.c and passes.c; __init__.py wants the one it knows. */
int textlora_version(void) { return 4; }

/* 1 where this processor has AVX-512 and the system saves its registers. */
int textlora_attention_usable(void)
{
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b >> 16 & 1) || !(b >> 17 & 1)) return 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & 0xe6) == 0xe6;
}

/* e^x for x <= 0: 2^n 2^f with f from -1/2 to 1/2, its series in f ln 2 to the seventh term. */
INLINE __m512 exponential(__m512 x)
{
    static const float C[] = {1.0f, 6.93147181e-1f, 2.40226507e-1f, 5.55041087e-2f, 9.61812911e-3f, 1.33335581e-3f, 1.54035304e-4f, 1.52527338e-5f};
    __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), n = _mm512_roundscale_ps(t, 0), f = _mm512_sub_ps(t, n), y = _mm512_set1_ps(C[7]);
    for (int i = 6; i >= 0; i--) y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(C[i]));
    return _mm512_scalef_ps(y, n);
}

/* Rows (at most ROWS) queries of one text and head against its length keys and values; parts vectors make a head. */
INLINE void rows_of(const float *q, const float *turned, const float *v, float *out, long rows, long length, long stride, long out_stride, int parts, float scale)
{
    float shares[ROWS][LONGEST] __attribute__((aligned(64)));
    __m512 sum[ROWS], most[ROWS];
    long vectors = (length + LANES - 1) / LANES, padded = vectors * LANES;
    __mmask16 last = 0xffff >> (padded - length);
    const float *query[ROWS];
    for (int r = 0; r < ROWS; r++) query[r] = q + (r < rows ? r : 0) * stride, most[r] = _mm512_set1_ps(-__builtin_inff()), sum[r] = _mm512_setzero_ps();
    for (long k = 0; k < vectors; k++) {
        __m512 score[ROWS];
        for (int r = 0; r < ROWS; r++) score[r] = _mm512_setzero_ps();
        for (long i = 0; i < parts * LANES; i++) {
            __m512 key = _mm512_load_ps(turned + i * padded + k * LANES);
            for (int r = 0; r < ROWS; r++) score[r] = _mm512_fmadd_ps(_mm512_set1_ps(query[r][i]), key, score[r]);
        }
        __mmask16 there = k == vectors - 1 ? last : 0xffff;
        for (int r = 0; r < ROWS; r++) {
            score[r] = _mm512_mask_mul_ps(_mm512_set1_ps(-__builtin_inff()), there, score[r], _mm512_set1_ps(scale));
            most[r] = _mm512_max_ps(most[r], score[r]);
            _mm512_store_ps(shares[r] + k * LANES, score[r]);
        }
    }
    for (int r = 0; r < ROWS; r++) {
        __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most[r]));
        for (long k = 0; k < vectors; k++) {
            __m512 share = exponential(_mm512_sub_ps(_mm512_load_ps(shares[r] + k * LANES), top));
            sum[r] = _mm512_add_ps(sum[r], share);
            _mm512_store_ps(shares[r] + k * LANES, share);
        }
    }
    __m512 mean[ROWS][4];
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < parts; p++) mean[r][p] = _mm512_setzero_ps();
    for (long k = 0; k < length; k++, v += stride) {
        __m512 value[4];
        for (int p = 0; p < parts; p++) value[p] = _mm512_loadu_ps(v + p * LANES);
        for (int r = 0; r < ROWS; r++)
            for (int p = 0; p < parts; p++) mean[r][p] = _mm512_fmadd_ps(_mm512_set1_ps(shares[r][k]), value[p], mean[r][p]);
    }
    for (int r = 0; r < rows; r++) {
        __m512 one = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sum[r]));
        for (int p = 0; p < parts; p++) _mm512_storeu_ps(out + r * out_stride + p * LANES, _mm512_mul_ps(mean[r][p], one));
    }
}

INLINE void attention(const float *qkv, float *out, const int32_t *starts, long texts, long heads, int parts, float scale)
{
    long d = parts * LANES, width = heads * d;
    float turned[WIDEST * LONGEST] __attribute__((aligned(64)));
    for (long t = 0; t < texts; t++) {
        long length = starts[t + 1] - starts[t], padded = (length + LANES - 1) / LANES * LANES;
        for (long h = 0; h < heads; h++) {
            const float *q = qkv + starts[t] * 3 * width + h * d, *k = q + width, *v = k + width;
            for (long i = 0; i < length; i++)
                for (long j = 0; j < d; j++) turned[j * padded + i] = k[i * 3 * width + j];
            for (long i = 0; i < length; i += ROWS)
                rows_of(q + i * 3 * width, turned, v, out + (starts[t] + i) * width + h * d, length - i < ROWS ? length - i : ROWS, length, 3 * width, width, parts, scale);
        }
    }
}

/* softmax(scale q k^T) v of each text and head: qkv (T, 3 heads d), out (T, heads d), starts (texts + 1); d 16, 32 or 64, texts of LONGEST at most. */
VECTORS void textlora_attention(const float *qkv, float *out, const int32_t *starts, long texts, long heads, long d, float scale)
{
    if (d == 16) attention(qkv, out, starts, texts, heads, 1, scale);
    else if (d == 32) attention(qkv, out, starts, texts, heads, 2, scale);
    else attention(qkv, out, starts, texts, heads, 4, scale);
}

/* Float32 products on the matrix units (AMX) of x86 servers, which multiply bfloat16 sixteen times as fast as the vector units multiply float32.
 *
 * x and W are taken as sums of two bfloat16 numbers, 16 bits of their 24, x = x0 + x1; of the four products in (x0 + x1)(w0 + w1) the one of the
 * lesser halves is left out and the others are summed in float32. A term is right to some 2^-16 (Henry, Tang, Heinecke 2019, arXiv 1904.06376).
 * Infinities give NaN, numbers below 2^-126 count as zero.
 *
 * Registers hold tiles of 16 rows of 64 bytes. Of x a tile has 16 rows and 32 columns; of W^T 32 rows in pairs, as the unit wants them, and 16 columns.
 * A step is 32 rows of x (or 32 outputs of W) by 32 columns: two tiles of the greater halves, two of the lesser.
 * W lies in panels of 32 outputs, a panel's steps one after the other; so do the 32 rows of a block of x, split when they are read.
 *
 * Called by __init__.py, which checks all arguments. Nothing here allocates or fails; every buffer of steps is aligned to 64 bytes.
 */
#include <cpuid.h>
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "native.h"

#define AMX __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,amx-tile,amx-bf16")))
#define INLINE AMX static inline __attribute__((always_inline))
#define LANES 16
#define NAME(f) f
#include "vectors.h"
#include "gelu.h"

enum { SIDE = 32, TILE = 1024, PAIR = 2 * TILE, STEP = 2 * PAIR, MOST_STEPS = 32, MOST_BLOCKS = 8, SCRATCH = 1 << 20 };

static long least(long a, long b) { return a < b ? a : b; }
static long steps_of(long columns) { return (columns + SIDE - 1) / SIDE; }

/* 1 where this processor has what is used here and the system lets this process use it. Linux wants to be asked (ARCH_REQ_XCOMP_PERM). */
int textlora_amx_usable(void)
{
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    int vectors = (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1), tiles = (d >> 22 & 1) && (d >> 24 & 1);
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1) || !vectors || !tiles) return 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 0x600e6) != 0x600e6) return 0; /* SSE, AVX, AVX-512 and tiles are saved when threads change */
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

/* Of what a product needs for the split rows of x: half of the cache of a core. */
long textlora_amx_scratch(void) { return SCRATCH; }

/* Of W laid out. */
long textlora_amx_bytes(long out, long in) { return steps_of(out) * steps_of(in) * STEP; }

/* 32 numbers as bfloat16, one row of a tile; what that leaves of them is left. */
INLINE void cut(__m512 *low, __m512 *high, uint8_t *row)
{
    __m512i piece = (__m512i)_mm512_cvtne2ps_pbh(*high, *low);
    _mm512_store_si512(row, piece);
    *low = _mm512_sub_ps(*low, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(piece)), 16));
    *high = _mm512_sub_ps(*high, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(piece, 1)), 16));
}

INLINE __mmask16 first(long count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

/* 32 rows of x (rows of them there) of in numbers each, the first columns of them split: the steps of a block. */
INLINE void split(const float *x, long rows, long columns, long in, uint8_t *block)
{
    for (long r = 0; r < SIDE; r++) {
        uint8_t *row = block + r / 16 * TILE + r % 16 * 64;
        for (long at = 0; at < columns; at += SIDE, row += STEP) {
            __m512 low = _mm512_setzero_ps(), high = low;
            if (r < rows) {
                low = _mm512_maskz_loadu_ps(first(columns - at), x + r * in + at);
                high = _mm512_maskz_loadu_ps(first(columns - at - 16), x + r * in + at + 16);
            }
            cut(&low, &high, row);
            cut(&low, &high, row + PAIR);
        }
    }
}

/* W (out, in) as panels. */
AMX void textlora_amx_lay_out(const float *w, long out, long in, uint8_t *panels)
{
    long steps = steps_of(in);
    memset(panels, 0, textlora_amx_bytes(out, in));
    for (long o = 0; o < out; o++)
        for (long i = 0; i < in; i += SIDE) {
            uint8_t rows[2][64] __attribute__((aligned(64)));
            __m512 low = _mm512_maskz_loadu_ps(first(in - i), w + o * in + i), high = _mm512_maskz_loadu_ps(first(in - i - 16), w + o * in + i + 16);
            uint8_t *step = panels + (o / SIDE * steps + i / SIDE) * STEP + o % SIDE / 16 * TILE + o % 16 * 4;
            for (int p = 0; p < 2; p++) {
                cut(&low, &high, rows[p]);
                for (long pair = 0; pair < 16; pair++) memcpy(step + p * PAIR + pair * 64, rows[p] + pair * 4, 4);
            }
        }
}

struct tiles {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

/* Eight whole tiles. What was set before is put back at the end: oneDNN remembers what it has set. */
INLINE void begin(struct tiles *before)
{
    struct tiles ours = {.palette = 1};
    for (int i = 0; i < 8; i++) ours.bytes[i] = 64, ours.rows[i] = 16;
    _tile_storeconfig(before);
    _tile_loadconfig(&ours);
}

#define LOAD_X(at) _tile_loadd(4, x + (at), 64); _tile_loadd(5, x + (at) + TILE, 64)
#define LOAD_W(at) _tile_loadd(6, w + (at), 64); _tile_loadd(7, w + (at) + TILE, 64)
#define MULTIPLY _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7)

/* Of the next step, two kilobytes each towards the first cache. */
INLINE void fetch(const uint8_t *x, const uint8_t *w)
{
    for (int at = 0; at < PAIR; at += 64) {
        _mm_prefetch((const char *)x + at, _MM_HINT_T0);
        _mm_prefetch((const char *)w + at, _MM_HINT_T0);
    }
}

/* A block of x times a panel of W: sum (32, 32). In this order each half is loaded once. */
INLINE void multiply(const uint8_t *x, const uint8_t *w, long steps, float *sum)
{
    __asm__ volatile("" ::: "memory"); /* compilers do not know that loads of tiles read memory */
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (long i = 0; i < steps; i++, x += STEP, w += STEP) {
        fetch(x + STEP, w + STEP);
        LOAD_X(PAIR); LOAD_W(0); MULTIPLY;
        LOAD_X(0); MULTIPLY;
        fetch(x + STEP + PAIR, w + STEP + PAIR);
        LOAD_W(PAIR); MULTIPLY;
    }
    _tile_stored(0, sum, 128); _tile_stored(1, sum + 16, 128); _tile_stored(2, sum + 16 * SIDE, 128); _tile_stored(3, sum + 16 * SIDE + 16, 128);
}

/* A panel of y, of rows of out numbers each: f(sum + bias + so_far) + residual, what is missing left out. */
INLINE void put(const float *sum, const float *bias, const float *so_far, const float *residual, float *y, long rows, long columns, long out, int with_gelu)
{
    __mmask16 left = first(columns), right = first(columns - 16);
    __m512 zero = _mm512_setzero_ps(), b = bias ? _mm512_maskz_loadu_ps(left, bias) : zero, c = bias ? _mm512_maskz_loadu_ps(right, bias + 16) : zero;
    for (long r = 0; r < rows; r++) {
        __m512 u = _mm512_add_ps(b, _mm512_load_ps(sum + r * SIDE)), v = _mm512_add_ps(c, _mm512_load_ps(sum + r * SIDE + 16));
        if (so_far) {
            u = _mm512_add_ps(u, _mm512_maskz_loadu_ps(left, so_far + r * out));
            v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(right, so_far + r * out + 16));
        }
        if (with_gelu) u = gelu(u, 0), v = gelu(v, 0);
        if (residual) {
            u = _mm512_add_ps(u, _mm512_maskz_loadu_ps(left, residual + r * out));
            v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(right, residual + r * out + 16));
        }
        _mm512_mask_storeu_ps(y + r * out, left, u);
        _mm512_mask_storeu_ps(y + r * out + 16, right, v);
    }
}

/* y = f(x W^T + bias) + residual: x (rows, in), W (out, in), f GELU or nothing; bias and residual may be missing.
 * Some blocks of x stay in the second cache while each panel of W passes by once; wide rows in parts, whose sums wait in y. */
AMX void textlora_amx_product(const float *x, const uint8_t *w, const float *bias, const float *residual, float *y, uint8_t *scratch, long rows, long in, long out, int with_gelu)
{
    long all = steps_of(in), parts = (all + MOST_STEPS - 1) / MOST_STEPS, steps = (all + parts - 1) / parts;
    long most = least(MOST_BLOCKS, SCRATCH / (steps * STEP));
    float sum[SIDE * SIDE] __attribute__((aligned(64)));
    struct tiles before;
    begin(&before);
    for (long start = 0; start < rows; start += most * SIDE)
        for (long from = 0; from < all; from += steps) {
            long blocks = least(most, steps_of(rows - start)), count = least(steps, all - from);
            int last = from + count == all;
            for (long i = 0; i < blocks; i++) {
                long row = start + i * SIDE;
                split(x + row * in + from * SIDE, rows - row, least(in - from * SIDE, count * SIDE), in, scratch + i * steps * STEP);
            }
            for (long o = 0; o < out; o += SIDE)
                for (long i = 0; i < blocks; i++) {
                    long row = start + i * SIDE, at = row * out + o;
                    multiply(scratch + i * steps * STEP, w + (o / SIDE * all + from) * STEP, count, sum);
                    put(sum, bias && !from ? bias + o : 0, from ? y + at : 0, residual && last ? residual + at : 0, y + at,
                        least(SIDE, rows - row), out - o, out, with_gelu && last);
                }
        }
    _tile_loadconfig(&before);
}

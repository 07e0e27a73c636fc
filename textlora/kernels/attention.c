/* Attention inside each of many texts, in one call: torch's has a cost per call, and packed texts are of many lengths.
 *
 * Written in vectors of the compiler's, once (attention.h), compiled for AVX-512 and for AVX2. Called by __init__.py, which checks all arguments.
 */
#include <string.h>

#include "native.h"

enum { LONGEST = 512, ROOM = LONGEST + 16 /* no power of two: rows at one place in the cache would push each other out */, WIDEST = 64, GROUPS = 8 /* of texts, where there are that many */ };

/* Of a text and a head: keys and values turned, rows of values, or of keys on the way back, and gradients. */
struct room {
    float keys[WIDEST * LONGEST], values[WIDEST * LONGEST], rows[WIDEST * LONGEST], dk[WIDEST * LONGEST], dv[WIDEST * LONGEST];
} __attribute__((aligned(64)));

long textlora_attention_scratch(void) { return sizeof(struct room); }

#define TARGET __attribute__((target("arch=x86-64-v4")))
#define LANES 16
#define ROWS 8
#define NAME(f) f##_of_16
#include "attention.h"
#undef TARGET
#undef LANES
#undef ROWS
#undef NAME

#define TARGET __attribute__((target("arch=x86-64-v3")))
#define LANES 8
#define ROWS 4
#define NAME(f) f##_of_8
#include "attention.h"

/* Of all functions in this folder; __init__.py wants the one it knows. */
int textlora_version(void) { return 9; }

/* Numbers in a vector of this processor's, 16 or 8; 0 where it has no AVX2, or the system does not save the registers. */
int textlora_attention_lanes(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("x86-64-v4") ? 16 : __builtin_cpu_supports("x86-64-v3") ? 8 : 0;
}

/* softmax(scale q k^T) v of each text and of heads `first` to `last` - 1: qkv (T, 3 heads d), out (T, heads d), starts (texts + 1);
 * d 16, 32 or 64, texts of LONGEST at most. With grad (T, heads d), the gradient of that, out is the gradient of qkv. room is scratch; lanes as textlora_attention_lanes says, or 8 where that is 16. */
void textlora_attention(const float *qkv, const float *grad, float *out, const int32_t *starts, struct room *room, long texts, long heads, long first, long last, long d, float scale, int lanes)
{
    if (lanes == 16) attention_of_16(qkv, grad, out, starts, room, texts, heads, first, last, d, scale);
    else attention_of_8(qkv, grad, out, starts, room, texts, heads, first, last, d, scale);
}

/* Chunks of that which do not depend on each other: some texts, or a head of all where texts are few. */
long textlora_attention_chunks(long texts, long heads) { return texts < GROUPS ? heads : GROUPS; }

/* One of these chunks, by the thread of that number, whose scratch lies in rooms; the rest as above. */
void textlora_attention_chunk(const float *qkv, const float *grad, float *out, const int32_t *starts, uint8_t *rooms, long texts, long heads, long d, int lanes, long chunk, int number)
{
    struct room *room = (struct room *)(rooms + number * sizeof(struct room));
    long all = texts >= GROUPS, at = all ? texts * chunk / GROUPS : 0, end = all ? texts * (chunk + 1) / GROUPS : texts;
    textlora_attention(qkv, grad, out, starts + at, room, end - at, heads, all ? 0 : chunk, all ? heads : chunk + 1, d, 1 / __builtin_sqrtf((float)d), lanes);
}

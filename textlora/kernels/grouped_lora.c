/* The small products of many adapters in one batch: y += (x A^T) B for each stretch of rows and the adapter that owns it, in one call.
 *
 * Written for no processor in particular: vectors of eight, which compilers turn into what there is; each function is compiled for several
 * kinds of x86 processors and chosen when the library is loaded. Called by __init__.py, which checks all arguments, and by encode.c.
 */
#include <string.h>

#include "native.h"

#define EACH __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))

typedef float vector __attribute__((vector_size(32), aligned(4)));

enum { LANES = 8, ROWS = 4, MOST_RANK = 256 };

static inline __attribute__((always_inline)) vector load(const float *from)
{
    vector v;
    memcpy(&v, from, sizeof v);
    return v;
}

/* x (T, in), y (T, width): rows of y in columns column to column + out become (y + (x A^T) B) scale. in and out are multiples of 8, r at most 256. */
EACH void textlora_lora(const float *x, float *y, const struct job *jobs, long count, long in, long width, long out)
{
    float inner[ROWS][MOST_RANK];
    for (const struct job *job = jobs; job < jobs + count; job++)
        for (long at = 0; at < job->rows; at += ROWS) {
            const float *from[ROWS];
            float *to[ROWS];
            long there = job->rows - at < ROWS ? job->rows - at : ROWS;
            for (int i = 0; i < ROWS; i++) { /* of a last few rows the first is computed several times */
                long row = job->row + at + (i < there ? i : 0);
                from[i] = x + row * in, to[i] = y + row * width + job->column;
            }
            for (long k = 0; k < job->r; k += 2) {
                const float *a = job->A + k * in, *b = k + 1 < job->r ? a + in : a;
                vector s[ROWS][2] = {0};
                for (long c = 0; c < in; c += LANES) {
                    vector va = load(a + c), vb = load(b + c);
                    for (int i = 0; i < ROWS; i++) {
                        vector vx = load(from[i] + c);
                        s[i][0] += vx * va, s[i][1] += vx * vb;
                    }
                }
                for (int i = 0; i < ROWS; i++)
                    for (int j = 0; j < 2; j++) {
                        vector v = s[i][j];
                        inner[i][k + j] = ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
                    }
            }
            for (long c = 0; c < out; c += LANES) {
                vector s[ROWS];
                for (int i = 0; i < ROWS; i++) s[i] = load(to[i] + c);
                for (long k = 0; k < job->r; k++) {
                    vector b = load(job->B + k * out + c);
                    for (int i = 0; i < ROWS; i++) s[i] += inner[i][k] * b;
                }
                for (int i = 0; i < there; i++) {
                    vector v = job->scale ? s[i] * load(job->scale + c) : s[i];
                    memcpy(to[i] + c, &v, sizeof v);
                }
            }
        }
}

/* Short convolution, SiLU and unit length of one projection on a CPU, and their gradients: one pass over memory each.

   The mathematics is front_end.py's; native.py compiles this file, once for float and once for double, and calls it through
   ctypes. A group of channels of all tokens is a task; one thread computes it in one order, so results do not depend on how many
   there are. */

#include "common.h"

#ifdef DOUBLE
typedef int64_t bits;
#define MANTISSA 52
#define BIAS 1023
#define FARTHEST 708
#else
typedef int32_t bits;
#define MANTISSA 23
#define BIAS 127
#define FARTHEST 87
#endif

#ifdef __clang__
#define EACH _Pragma("clang loop vectorize(assume_safety)") for /* no two of these rows overlap */
#else
#define EACH _Pragma("GCC ivdep") for /* no two of these rows overlap */
#endif
enum { MOST = 512, SUMS = 16 }; /* channels of a token at a time, lanes of a sum */
typedef real vec __attribute__((vector_size(SUMS * sizeof(real)), aligned(sizeof(real))));

typedef struct {
    idx tasks, tokens, span, channels, taps, unit, threads; /* tokens of a row, of a task; unit: channels that get length 1 */
    double eps;
    const int64_t *position; /* [tokens], of each token in its document; NULL: a row is one */
    const real *x, *weight;  /* [rows, tokens, channels]; [taps, channels], the newest token's first */
    real *y;                 /* as x; NULL: gradients are wanted */
    const real *d_y;
    real *d_x, *d_weight; /* [tasks, taps, channels] of zeros, to be added up; NULL: not wanted */
} Convolution;

/* exp(x) to a unit or two in the last place, as a compiler can vectorise it: 2^n times a polynomial of the rest. */
static inline real exponential(real x) {
    x = x > FARTHEST ? FARTHEST : x < -FARTHEST ? -FARTHEST : x; /* NaN stays */
#ifdef DOUBLE
    const real shift = 0x1.8p52, n = (x * 0x1.71547652b82fep0 + shift) - shift;
    const real r = (x - n * 0x1.62e42fefa39efp-1) - n * 0x1.abc9e3b39803fp-56;
    real p = 1. / 479001600;
    p = p * r + 1. / 39916800;
    p = p * r + 1. / 3628800;
    p = p * r + 1. / 362880;
    p = p * r + 1. / 40320;
    p = p * r + 1. / 5040;
    p = p * r + 1. / 720;
#else
    const real shift = 0x1.8p23f, n = (x * 0x1.715476p0f + shift) - shift;
    const real r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
    real p = 1.f / 5040;
    p = p * r + 1.f / 720;
#endif
    p = p * r + (real)(1. / 120);
    p = p * r + (real)(1. / 24);
    p = p * r + (real)(1. / 6);
    p = p * r + (real)0.5;
    p = p * r + 1;
    p = p * r + 1;
    union {
        bits i;
        real f;
    } power = {.i = ((bits)n + BIAS) << MANTISSA};
    return p * power.f;
}

static real dot(idx n, const real *a, const real *b) {
    vec sums = {0};
    idx i = 0;
    for (; i + SUMS <= n; i += SUMS) sums += *(const vec *)(a + i) * *(const vec *)(b + i);
    real sum = 0;
    for (int j = 0; j < SUMS; j++) sum += sums[j];
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* How many earlier tokens the convolution sees from token t of a row. */
static idx back(const Convolution *p, idx t) { return least(p->taps - 1, p->position ? least(t, p->position[t]) : t); }

typedef struct {
    real u[MOST], sigmoid[MOST], y[MOST], d[MOST], length[MOST];
} Work; /* of some channels of a token: u, its sigmoid, y; of a head: 1 over its length */

/* y = s, or s over its length, of s = u sigmoid(u) and n channels from x on. */
static void forward(const Convolution *p, Work *m, idx n, idx seen, const real *x, const real *w) {
    const idx C = p->channels;
    real *restrict u = m->u, *restrict sigmoid = m->sigmoid, *restrict y = m->y;
    EACH (idx c = 0; c < n; c++) u[c] = w[c] * x[c];
    for (idx b = 1; b <= seen; b++)
        EACH (idx c = 0; c < n; c++) u[c] += w[b * C + c] * x[c - b * C];
    EACH (idx c = 0; c < n; c++) sigmoid[c] = 1 / (1 + exponential(-u[c]));
    EACH (idx c = 0; c < n; c++) y[c] = u[c] * sigmoid[c];
    for (idx h = 0; p->unit && h < n; h += p->unit) {
        const real length = m->length[h / p->unit] = 1 / (real)sqrt((double)dot(p->unit, y + h, y + h) + p->eps);
        for (idx c = h; c < h + p->unit; c++) y[c] *= length;
    }
}

/* d of u, from d of y: y = s length gives d_s = length (d_y - y (y d_y)). */
static void backward(const Convolution *p, Work *m, idx n, const real *d_y) {
    real *restrict d = m->d;
    const real *u = m->u, *sigmoid = m->sigmoid;
    memcpy(d, d_y, n * sizeof(real));
    for (idx h = 0; p->unit && h < n; h += p->unit) {
        const real along = dot(p->unit, m->y + h, d + h), length = m->length[h / p->unit];
        for (idx c = h; c < h + p->unit; c++) d[c] = length * (d[c] - along * m->y[c]);
    }
    EACH (idx c = 0; c < n; c++) d[c] *= sigmoid[c] * (1 + u[c] * (1 - sigmoid[c]));
}

/* Some tokens of a row. Their d_x is whole: the tokens after them that see them are computed as well. */
static void task(const Convolution *p, Work *m, idx number) {
    const idx C = p->channels, W = p->taps, T = p->tokens, per_row = (T + p->span - 1) / p->span;
    const idx row = number / per_row, begin = number % per_row * p->span, end = least(T, begin + p->span);
    const idx width = p->unit ? p->unit * (MOST / p->unit) : MOST, last = p->y ? end : least(T, end + W - 1);
    real *d_weight = p->d_weight ? p->d_weight + number * W * C : NULL;
    for (idx t = begin; t < last; t++) {
        const idx seen = back(p, t);
        for (idx first = 0; first < C; first += width) {
            const idx n = least(width, C - first), at = (row * T + t) * C + first;
            const real *x = p->x + at, *w = p->weight + first;
            forward(p, m, n, seen, x, w);
            if (p->y) {
                memcpy(p->y + at, m->y, n * sizeof(real));
                continue;
            }
            backward(p, m, n, p->d_y + at);
            const real *d = m->d;
            for (idx b = 0; b <= seen; b++) {
                real *d_x = p->d_x + at - b * C, *d_w = d_weight + b * C + first;
                if (b == 0 && t < end)
                    EACH (idx c = 0; c < n; c++) d_x[c] = w[c] * d[c];
                else if (t - b >= begin && t - b < end)
                    EACH (idx c = 0; c < n; c++) d_x[c] += w[b * C + c] * d[c];
                if (d_weight && t < end)
                    EACH (idx c = 0; c < n; c++) d_w[c] += d[c] * x[c - b * C];
            }
        }
    }
}

static void *run(void *argument) {
    Queue *queue = argument;
    const Convolution *p = queue->problem;
    Work m;
    for (idx number; (number = atomic_fetch_add(&queue->next, 1)) < p->tasks;) task(p, &m, number);
    return NULL;
}

int convolve_all(const Convolution *p) { return work(p, least(p->threads, p->tasks), run); }

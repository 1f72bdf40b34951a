/* The root-mean-square norm of rows on a CPU, and its gradients: one pass over memory each; see norm.py. */

#include "common.h"

typedef struct {
    idx tasks, rows, span, size, threads; /* rows in all, and of a task */
    double eps;
    const real *x, *weight;
    real *y; /* as x; NULL: gradients are wanted */
    const real *d_y;
    real *d_x, *d_weight; /* [tasks, size], to be added up */
} Norm;

static double dot(idx n, const real *a, const real *b, const real *c) { /* sum a b c, of blocks that are added up in double */
    enum { LANES = 16 };
    double sum = 0;
    for (idx from = 0; from < n; from += 16 * LANES) {
        const idx end = least(n, from + 16 * LANES);
        real part[LANES] = {0};
        idx i = from;
        for (; i + LANES <= end; i += LANES)
            for (int j = 0; j < LANES; j++) part[j] += a[i + j] * b[i + j] * (c ? c[i + j] : 1);
        for (; i < end; i++) part[0] += a[i] * b[i] * (c ? c[i] : 1);
        for (int j = 0; j < LANES; j++) sum += part[j];
    }
    return sum;
}

static void *run(void *argument) {
    Queue *queue = argument;
    const Norm *p = queue->problem;
    const idx n = p->size;
    const real *restrict w = p->weight;
    for (idx task; (task = atomic_fetch_add(&queue->next, 1)) < p->tasks;)
        for (idx row = task * p->span; row < least(p->rows, (task + 1) * p->span); row++) {
            const real *restrict x = p->x + row * n, *restrict d_y = p->d_y ? p->d_y + row * n : NULL;
            const real scale = (real)(1 / sqrt(dot(n, x, x, NULL) / n + p->eps));
            if (p->y) {
                real *restrict y = p->y + row * n;
                for (idx i = 0; i < n; i++) y[i] = x[i] * scale * w[i];
                continue;
            }
            /* y = x scale w: d_x = scale (w d_y - x scale^2 (x w d_y) / n) */
            const real along = (real)(dot(n, x, d_y, w) / n) * scale * scale;
            real *restrict d_x = p->d_x + row * n, *restrict d_w = p->d_weight + task * n;
            for (idx i = 0; i < n; i++) {
                d_x[i] = scale * (w[i] * d_y[i] - along * x[i]);
                d_w[i] += d_y[i] * x[i] * scale;
            }
        }
    return NULL;
}

int normalise_all(const Norm *p) { return work(p, least(p->threads, p->tasks), run); }

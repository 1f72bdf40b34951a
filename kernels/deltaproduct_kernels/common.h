/* What the kernels for a CPU share: the float type they are compiled for, vectors of sums, and threads that take tasks. */

#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef DOUBLE
typedef double real;
#define TINY DBL_MIN
#else
typedef float real;
#define TINY FLT_MIN
#endif
typedef ptrdiff_t idx;

static inline idx least(idx a, idx b) { return a < b ? a : b; }

typedef struct {
    const void *problem;
    atomic_llong next; /* task that nobody has taken */
    atomic_int failed; /* set by a thread without memory */
} Queue;

/* `run` with a Queue in as many threads; returns 0, or 1 if one has failed. A thread that cannot be started is done without. */
static inline int work(const void *problem, idx threads, void *(*run)(void *)) {
    Queue queue = {problem, 0, 0};
    pthread_t *others = threads > 1 ? malloc(sizeof(pthread_t) * (threads - 1)) : NULL;
    idx started = 0;
    while (others && started < threads - 1 && !pthread_create(others + started, NULL, run, &queue)) started++;
    run(&queue);
    for (idx i = 0; i < started; i++) pthread_join(others[i], NULL);
    free(others);
    return atomic_load(&queue.failed);
}

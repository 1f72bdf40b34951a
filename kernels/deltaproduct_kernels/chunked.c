/* The chunked recurrence on a CPU: one head of one sequence after another, everything of a chunk in the cache.

   The mathematics and its equation numbers are chunked.py's; native.py compiles this file, once for float and once for double,
   and calls it through ctypes. A chunk's matrices are row-major in a workspace that each thread has, their rows padded to whole
   vectors. A head of a sequence is a task; one thread computes it in one order, so results do not depend on how many there are. */

#include "common.h"

/* A tile of a product is TALL rows by WIDE vectors: its sums, a row of B and an entry of A fill the vector registers. */
#if defined(__AVX512F__)
#define BYTES 64
#define TALL 8
#elif defined(__AVX__)
#define BYTES 32
#define TALL 6
#else
#define BYTES 16
#define TALL 6
#endif
#define WIDE 2
#define LANES ((idx)(BYTES / sizeof(real)))
typedef real vec __attribute__((vector_size(BYTES)));
#define AT(pointer) (*(vec *)(pointer))
#define SEEN(pointer) (*(const vec *)(pointer))
#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 8") /* early: arrays become registers */
#endif

static idx padded(idx n) { return (n + LANES - 1) / LANES * LANES; }
/* Distance of rows: an odd number of vectors, since rows a power of two apart would share few sets of the cache. */
static idx stride(idx n) { return (padded(n) / LANES | 1) * LANES; }

/* -- products ------------------------------------------------------------------------------------------------------ */

typedef struct {
    const real *at;
    idx row, col;
} View; /* of a matrix, as it is or transposed or backwards */

INLINE void tile(const int rows, const int vecs, idx K, View A, const real *B, idx ldb, real *C, idx ldc, real keep, real sign) {
    vec sum[TALL][WIDE];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < vecs; j++) sum[i][j] = (vec){0};
    for (idx k = 0; k < K; k++) {
        vec b[WIDE];
        UNROLL for (int j = 0; j < vecs; j++) b[j] = SEEN(B + k * ldb + j * LANES);
        UNROLL for (int i = 0; i < rows; i++) {
            const real a = A.at[i * A.row + k * A.col];
            UNROLL for (int j = 0; j < vecs; j++) sum[i][j] += a * b[j];
        }
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < vecs; j++) {
            real *c = C + i * ldc + j * LANES;
            AT(c) = keep == 0 ? sign * sum[i][j] : keep * AT(c) + sign * sum[i][j];
        }
}

#define TILE(rows, vecs)                                                                                                     \
    static __attribute__((noinline)) void tile_##rows##_##vecs(idx K, View A, const real *B, idx ldb, real *C, idx ldc,      \
                                                               real keep, real sign) {                                       \
        tile(rows, vecs, K, A, B, ldb, C, ldc, keep, sign);                                                                  \
    }
#define TILES(vecs) TILE(1, vecs) TILE(2, vecs) TILE(3, vecs) TILE(4, vecs) TILE(5, vecs) TILE(6, vecs)
TILES(1)
TILES(2)
#if TALL > 6
TILE(7, 1) TILE(8, 1) TILE(7, 2) TILE(8, 2)
#define ROW(vecs) \
    {tile_1_##vecs, tile_2_##vecs, tile_3_##vecs, tile_4_##vecs, tile_5_##vecs, tile_6_##vecs, tile_7_##vecs, tile_8_##vecs}
#else
#define ROW(vecs) {tile_1_##vecs, tile_2_##vecs, tile_3_##vecs, tile_4_##vecs, tile_5_##vecs, tile_6_##vecs}
#endif
typedef void (*Tile)(idx, View, const real *, idx, real *, idx, real, real);
static const Tile tiles[WIDE][TALL] = {ROW(1), ROW(2)};

/* C = keep C + sign A B for M rows, N columns (rounded up to whole vectors) and K terms; keep = 0 reads no C. */
static void product(idx M, idx N, idx K, View A, const real *B, idx ldb, real *C, idx ldc, real keep, real sign) {
    const idx vecs = padded(N) / LANES;
    for (idx j = 0; j < vecs; j += WIDE)
        for (idx i = 0; i < M; i += TALL) {
            const View a = {A.at + i * A.row, A.row, A.col};
            tiles[least(WIDE, vecs - j) - 1][least(TALL, M - i) - 1](K, a, B + j * LANES, ldb, C + i * ldc + j * LANES, ldc,
                                                                     keep, sign);
        }
}

/* Rows i of X in order: X_i -= sign sum_{j<i} A_ij Y_j, then Y_i = sign b_i X_i. Substitution within a block, products before it. */
enum { BLOCK = 8 };
INLINE void substitute(const int rows, idx vecs, View A, const real *b, idx step, real sign, real *X, idx ldx, real *Y, idx ldy) {
    for (idx c = 0; c < vecs; c++) {
        vec y[BLOCK];
        UNROLL for (int i = 0; i < rows; i++) {
            vec x = AT(X + i * ldx + c * LANES);
            UNROLL for (int j = 0; j < i; j++) x -= sign * A.at[i * A.row + j * A.col] * y[j];
            AT(X + i * ldx + c * LANES) = x;
            AT(Y + i * ldy + c * LANES) = y[i] = sign * b[i * step] * x;
        }
    }
}
static void solve(idx rows, idx N, View A, const real *b, idx step, real sign, real *X, idx ldx, real *Y, idx ldy) {
    const idx vecs = padded(N) / LANES;
    for (idx i = 0; i < rows; i += BLOCK) {
        const idx m = least(BLOCK, rows - i);
        const View diagonal = {A.at + i * (A.row + A.col), A.row, A.col};
        real *x = X + i * ldx, *y = Y + i * ldy;
        product(m, N, i, (View){A.at + i * A.row, A.row, A.col}, Y, ldy, x, ldx, 1, -sign);
        if (m == BLOCK)
            substitute(BLOCK, vecs, diagonal, b + i * step, step, sign, x, ldx, y, ldy);
        else
            substitute(m, vecs, diagonal, b + i * step, step, sign, x, ldx, y, ldy);
    }
}

/* -- rows ---------------------------------------------------------------------------------------------------------- */

#if BYTES / 4 == 16
#define LOW4 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH4 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define LOW8 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH8 4, 12, 5, 13, 6, 14, 7, 15
#elif BYTES / 4 == 8
#define LOW4 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH4 4, 12, 5, 13, 6, 14, 7, 15
#define LOW8 0, 4, 1, 5
#define HIGH8 2, 6, 3, 7
#else
#define LOW4 0, 4, 1, 5
#define HIGH4 2, 6, 3, 7
#define LOW8 0, 2
#define HIGH8 1, 3
#endif
#ifdef DOUBLE
#define LOW LOW8
#define HIGH HIGH8
typedef int64_t lane __attribute__((vector_size(BYTES)));
#else
#define LOW LOW4
#define HIGH HIGH4
typedef int32_t lane __attribute__((vector_size(BYTES)));
#endif
#ifdef __clang__
#define INTERLEAVE(a, b, which) __builtin_shufflevector(a, b, which)
#else
#define INTERLEAVE(a, b, which) __builtin_shuffle(a, b, (lane){which})
#endif

/* B = A^T in squares of LANES: interleaving row i with row i + LANES/2, log2(LANES) times, transposes a square. */
static void transpose(idx rows, idx cols, const real *A, idx lda, real *B, idx ldb) {
    enum { L = BYTES / sizeof(real) };
    for (idx i = 0; i < rows; i += L)
        for (idx j = 0; j < cols; j += L) {
            vec x[L], y[L];
            for (int k = 0; k < L; k++) x[k] = SEEN(A + (i + k) * lda + j);
            for (int half = L; half > 1; half /= 2) {
                for (int k = 0; k < L / 2; k++) {
                    y[2 * k] = INTERLEAVE(x[k], x[k + L / 2], LOW);
                    y[2 * k + 1] = INTERLEAVE(x[k], x[k + L / 2], HIGH);
                }
                for (int k = 0; k < L; k++) x[k] = y[k];
            }
            for (int k = 0; k < L; k++) AT(B + (j + k) * ldb + i) = x[k];
        }
}

/* Rows out of a tensor whose rows are `from` apart, and back into one. */
static void load(idx rows, idx width, const real *A, idx from, real scale, real *B, idx ldb) {
    for (idx i = 0; i < rows; i++) {
        for (idx j = 0; j < width; j++) B[i * ldb + j] = scale * A[i * from + j];
        for (idx j = width; j < padded(width); j++) B[i * ldb + j] = 0;
    }
}
static void store(idx rows, idx width, const real *B, idx ldb, real scale, real *A, idx to) {
    for (idx i = 0; i < rows; i++)
        for (idx j = 0; j < width; j++) A[i * to + j] = scale * B[i * ldb + j];
}
static void multiply(idx width, real *x, real factor) {
    for (idx j = 0; j < padded(width); j += LANES) AT(x + j) *= factor;
}
static void add(idx width, real *x, const real *y, real factor) {
    for (idx j = 0; j < padded(width); j += LANES) AT(x + j) += factor * SEEN(y + j);
}
/* Rows of Y are sign b_r times those of X. */
static void scale(idx rows, idx width, const real *b, real sign, const real *X, real *Y, idx ld) {
    for (idx r = 0; r < rows; r++)
        for (idx j = 0; j < padded(width); j += LANES) AT(Y + r * ld + j) = sign * b[r] * SEEN(X + r * ld + j);
}
static double dot(idx width, const real *x, const real *y) {
    vec sum = {0};
    idx j = 0;
    for (; j + LANES <= width; j += LANES) sum += SEEN(x + j) * SEEN(y + j);
    double total = 0;
    for (idx l = 0; l < LANES; l++) total += sum[l];
    for (; j < width; j++) total += (double)(x[j] * y[j]);
    return total;
}

/* -- a chunk ------------------------------------------------------------------------------------------------------- */

typedef struct {
    idx sequences, n, heads, groups, dk, dv, tokens; /* groups: of heads that share q and k; tokens: of a chunk */
    idx erase, threads;
    double scale;
    const int64_t *offsets, *chunks; /* [sequences + 1] the first token of each sequence and its first chunk */
    /* [all tokens, groups, dk], [all tokens, n, groups, dk], [.., heads, dv], [all tokens, n, heads], [all tokens, heads].
       Null: no outputs are wanted (q), of a backward pass dS alone (v), there is no gate (g) */
    const real *q, *k, *v, *beta, *g;
    real *o, *S, *states; /* S: [sequences, heads, dk, dv], initial, then final; states: before every chunk, or null */
    /* of a backward pass; null in a forward pass. dS: of the final states, then of the initial ones; d_q, d_k: of every head */
    const real *d_o;
    real *dS, *d_q, *d_k, *d_v, *d_beta, *d_g;
} Problem;

typedef struct {
    idx ldk, ldv, ldr;          /* distances of rows of dk, dv and R numbers */
    real *Y, *KT, *F, *D;       /* [C + R, dk] reads; [dk, R] keys; [C + R, R]; [C, R] */
    real *e, *b;                /* [C], [R] */
    real *S, *Z, *X, *U;        /* [dk, dv]; [C + R, dv] what is read of S; [R, dv] residuals; [R, dv] updates */
    real *dS, *W, *G;           /* [dk, dv]; [R, dv] gradients of updates; [C + R, dv] of what is read */
    real *dY, *dF, *UT, *ST;    /* [C + R, dk]; [C + R, R]; [dv, R]; [dv, dk] */
    real *crossing;             /* [R] */
    double *until;              /* [C] */
} Work;

/* Divides the memory at `base` among the matrices; returns its bytes. Null: only that. */
static idx divide(const Problem *p, Work *w, char *base) {
    const idx C = padded(p->tokens), R = padded(p->tokens * p->n), reads = C + R, dk = padded(p->dk), dv = padded(p->dv);
    const idx ldk = w->ldk = stride(dk), ldv = w->ldv = stride(dv), ldr = w->ldr = stride(R);
    idx used = 0;
#define TAKE(name, numbers) (w->name = (void *)(base ? base + used : NULL), used += (numbers) * (idx)sizeof(real))
    TAKE(Y, reads * ldk), TAKE(KT, dk * ldr), TAKE(F, reads * ldr), TAKE(D, C * ldr), TAKE(e, C), TAKE(b, R);
    TAKE(S, dk * ldv), TAKE(Z, reads * ldv), TAKE(X, R * ldv), TAKE(U, R * ldv);
    if (p->d_o) {
        TAKE(dS, dk * ldv), TAKE(W, R * ldv), TAKE(G, reads * ldv), TAKE(dY, reads * ldk), TAKE(dF, reads * ldr);
        TAKE(UT, dv * ldr), TAKE(ST, dv * ldk), TAKE(crossing, R), TAKE(until, C * (idx)(sizeof(double) / sizeof(real)));
    }
#undef TAKE
    return (used + 63) / 64 * 64;
}

/* A chunk: m tokens from `token` of a head. Its reads are m queries (absent: they begin at m), then, if erasing, R keys. */
typedef struct {
    idx token, head, m, R, begin, reads;
} Chunk;

static Chunk chunk_at(const Problem *p, idx head, idx token, idx end) {
    const idx m = least(p->tokens, end - token);
    return (Chunk){token, head, m, m * p->n, p->q ? 0 : m, m + (p->erase ? m * p->n : 0)};
}
static idx token_of(const Problem *p, Chunk c, idx read) { return read < c.m ? read : (read - c.m) / p->n; }
/* How many rows a read sees, and how many reads from this one on are taken together. */
static idx seen(const Problem *p, Chunk c, idx read) { return read < c.m ? (read + 1) * p->n : read - c.m; }
static idx block(Chunk c, idx read) { return least(TALL, (read < c.m ? c.m : c.reads) - read); }
/* Where rows of a tensor with so many numbers a row begin. */
static idx query(const Problem *p, Chunk c, idx width) { return (c.token * p->heads + c.head) * width; }
static idx row(const Problem *p, Chunk c, idx width) { return (c.token * p->n * p->heads + c.head) * width; }

/* D, e: running products, so that nothing overflows and a decay of zero is one like others. */
static void decays(const Problem *p, Work *w, Chunk c) {
    real along = 1;
    for (idx t = 0; t < c.m; t++) {
        const real a = p->g ? (real)exp((double)p->g[query(p, c, 1) + t * p->heads]) : 1;
        real *D = w->D + t * w->ldr, *before = D - w->ldr;
        for (idx r = 0; r < t * p->n; r++) {
            const real d = before[r] * a;
            D[r] = d < TINY ? 0 : d; /* arithmetic on denormal numbers is slow */
        }
        for (idx r = t * p->n; r < w->ldr; r++) D[r] = r < (t + 1) * p->n;
        along *= a;
        w->e[t] = along = along < TINY ? 0 : along;
    }
}

/* F (or dF) of rows that a read sees, times their decay; 0 for the others. */
static void decay(const Problem *p, Work *w, Chunk c, idx read, real *F) {
    const real *D = w->D + token_of(p, c, read) * w->ldr;
    const idx end = seen(p, c, read);
    idx r = 0;
    for (; r + LANES <= end; r += LANES) AT(F + r) *= SEEN(D + r);
    for (; r < end; r++) F[r] *= D[r];
    for (; r < w->ldr; r++) F[r] = 0;
}

/* Y, K^T, D, e, b and F (1). */
static void prepare(const Problem *p, Work *w, Chunk c) {
    const idx H = p->heads, G = p->groups, group = c.head / (H / G), dk = p->dk, ldk = w->ldk, ldr = w->ldr;
    real *K = w->Y + c.m * ldk;
    if (p->q) load(c.m, dk, p->q + (c.token * G + group) * dk, G * dk, (real)p->scale, w->Y, ldk);
    load(c.R, dk, p->k + (c.token * p->n * G + group) * dk, G * dk, 1, K, ldk);
    for (idx r = 0; r < c.R; r++) w->b[r] = p->beta[row(p, c, 1) + r * H];
    decays(p, w, c);
    transpose(c.R, dk, K, ldk, w->KT, ldr);
    for (idx i = c.begin, rows; i < c.reads; i += rows) {
        rows = block(c, i);
        product(rows, seen(p, c, i + rows - 1), dk, (View){w->Y + i * ldk, ldk, 1}, w->KT, ldr, w->F + i * ldr, ldr, 0, 1);
        for (idx r = i; r < i + rows; r++) decay(p, w, c, r, w->F + r * ldr);
    }
}

/* Z, X and U (2, 3). */
static void update(const Problem *p, Work *w, Chunk c, idx begin) {
    const idx dv = p->dv, ldk = w->ldk, ldv = w->ldv;
    product(c.reads - begin, dv, p->dk, (View){w->Y + begin * ldk, ldk, 1}, w->S, ldv, w->Z + begin * ldv, ldv, 0, 1);
    load(c.R, dv, p->v + row(p, c, dv), p->heads * dv, 1, w->X, ldv);
    for (idx i = c.m; i < c.reads; i++) add(dv, w->X + (i - c.m) * ldv, w->Z + i * ldv, -w->e[token_of(p, c, i)]);
    if (p->erase)
        solve(c.R, dv, (View){w->F + c.m * w->ldr, w->ldr, 1}, w->b, 1, 1, w->X, ldv, w->U, ldv);
    else
        scale(c.R, dv, w->b, 1, w->X, w->U, ldv);
}

static void forward(const Problem *p, Work *w, idx sequence, idx head) {
    const idx H = p->heads, dk = p->dk, dv = p->dv, ldk = w->ldk, ldv = w->ldv, ldr = w->ldr;
    const idx state = (sequence * H + head) * dk * dv, end = p->offsets[sequence + 1];
    load(dk, dv, p->S + state, dv, 1, w->S, ldv);
    for (idx token = p->offsets[sequence], i = p->chunks[sequence]; token < end; token += p->tokens, i++) {
        const Chunk c = chunk_at(p, head, token, end);
        prepare(p, w, c);
        if (p->states) store(dk, dv, w->S, ldv, 1, p->states + (i * H + head) * dk * dv, dv);
        update(p, w, c, c.begin);
        for (idx t = c.begin, rows; t < c.m; t += rows) { /* o (4) */
            rows = block(c, t);
            for (idx r = t; r < t + rows; r++) multiply(dv, w->Z + r * ldv, w->e[r]);
            product(rows, dv, seen(p, c, t + rows - 1), (View){w->F + t * ldr, ldr, 1}, w->U, ldv, w->Z + t * ldv, ldv, 1, 1);
        }
        if (p->q) store(c.m, dv, w->Z, ldv, 1, p->o + query(p, c, dv), H * dv);
        for (idx r = 0; r < c.R; r++) multiply(dv, w->U + r * ldv, w->D[(c.m - 1) * ldr + r]); /* S' (5) */
        product(dk, dv, c.R, (View){w->Y + c.m * ldk, 1, ldk}, w->U, ldv, w->S, ldv, w->e[c.m - 1], 1);
    }
    store(dk, dv, w->S, ldv, 1, p->S + state, dv);
}

/* W, the gradients of updates, and G, those of what is read, from those of outputs and of the state after the chunk (6-8). */
static void update_backward(const Problem *p, Work *w, Chunk c) {
    const idx H = p->heads, n = p->n, dv = p->dv, ldk = w->ldk, ldv = w->ldv, ldr = w->ldr;
    load(c.m, dv, p->d_o + query(p, c, dv), H * dv, 1, w->G, ldv);
    product(c.R, dv, p->dk, (View){w->Y + c.m * ldk, ldk, 1}, w->dS, ldv, w->W, ldv, 0, 1);
    for (idx r = 0; r < c.R; r++) multiply(dv, w->W + r * ldv, w->D[(c.m - 1) * ldr + r]);
    if (p->g && p->d_q) { /* of the gradient of g (13) what decays until S': S over all tokens, a row's update after its own */
        double until = 0;
        for (idx i = 0; i < p->dk; i++) until += dot(dv, w->S + i * ldv, w->dS + i * ldv);
        until *= w->e[c.m - 1];
        for (idx r = 0; r < c.R; r++) {
            if (r % n == 0) w->until[r / n] = until;
            until += dot(dv, w->U + r * ldv, w->W + r * ldv);
        }
    }
    for (idx r = 0, rows; r < c.R; r += rows) {
        rows = least(TALL, c.R - r);
        const idx t = r / n; /* the first query that sees row r */
        product(rows, dv, c.m - t, (View){w->F + t * ldr + r, 1, ldr}, w->G + t * ldv, ldv, w->W + r * ldv, ldv, 1, 1);
    }
    const idx last = c.R - 1; /* transposed and backwards */
    const View A = {w->F + (c.m + last) * ldr + last, -1, -ldr};
    if (p->erase)
        solve(c.R, dv, A, w->b + last, -1, -1, w->W + last * ldv, -ldv, w->G + (c.m + last) * ldv, -ldv);
    else
        scale(c.R, dv, w->b, -1, w->W, w->G + c.m * ldv, ldv);
}

/* Gradients of log decays (13) from dY of S alone and from dF without decays: for each token, whatever decays over it. Pairs of
   one token do not. Only terms of one kind are added up, so nothing cancels. */
static void gate_backward(const Problem *p, Work *w, Chunk c) {
    const idx n = p->n;
    double from = 0; /* what is read of S at this token or later */
    memset(w->crossing, 0, padded(c.R) * sizeof(real));
    for (idx t = c.m - 1; t >= 0; t--) {
        const idx before = t * n;
        double crossing = 0; /* what reads at this token or later see of rows before it */
        for (idx j = -1; j < (p->erase ? n : 0); j++) {
            const idx i = j < 0 ? t : c.m + before + j;
            const real *F = w->F + i * w->ldr, *dF = w->dF + i * w->ldr;
            from += dot(p->dk, w->Y + i * w->ldk, w->dY + i * w->ldk);
            for (idx r = 0; r < before; r++) w->crossing[r] += F[r] * dF[r];
        }
        for (idx r = 0; r < before; r++) crossing += (double)w->crossing[r];
        p->d_g[query(p, c, 1) + t * p->heads] = (real)(w->until[t] + from + crossing);
    }
}

/* Gradients of all inputs of a chunk from U, X, W, G and dS (8-11, 13). */
static void gradients(const Problem *p, Work *w, Chunk c) {
    const idx H = p->heads, n = p->n, dk = p->dk, dv = p->dv, ldk = w->ldk, ldv = w->ldv, ldr = w->ldr;
    real *K = w->Y + c.m * ldk, *dK = w->dY + c.m * ldk;
    for (idx r = 0; r < c.R; r++) p->d_beta[row(p, c, 1) + r * H] = (real)dot(dv, w->W + r * ldv, w->X + r * ldv);
    store(c.R, dv, w->G + c.m * ldv, ldv, -1, p->d_v + row(p, c, dv), H * dv);

    transpose(dk, dv, w->S, ldv, w->ST, ldk);
    product(c.reads, dk, dv, (View){w->G, ldv, 1}, w->ST, ldk, w->dY, ldk, 0, 1);
    for (idx i = 0; i < c.reads; i++) multiply(dk, w->dY + i * ldk, w->e[token_of(p, c, i)]);
    if (!p->erase) memset(dK, 0, c.R * ldk * sizeof(real));
    transpose(c.R, dv, w->U, ldv, w->UT, ldr);
    for (idx i = 0, rows; i < c.reads; i += rows) {
        rows = block(c, i);
        product(rows, seen(p, c, i + rows - 1), dv, (View){w->G + i * ldv, ldv, 1}, w->UT, ldr, w->dF + i * ldr, ldr, 0, 1);
    }
    if (p->g) gate_backward(p, w, c);

    for (idx i = 0, rows; i < c.reads; i += rows) { /* reads of earlier rows, as reads (10) */
        rows = block(c, i);
        real *dF = w->dF + i * ldr;
        for (idx r = 0; r < rows; r++) decay(p, w, c, i + r, dF + r * ldr);
        product(rows, dk, seen(p, c, i + rows - 1), (View){dF, ldr, 1}, K, ldk, w->dY + i * ldk, ldk, 1, 1);
    }
    for (idx r = 0, rows; r < c.R; r += rows) { /* and as rows (11) */
        rows = least(TALL, c.R - r);
        const idx t = r / n;
        product(rows, dk, c.m - t, (View){w->dF + t * ldr + r, 1, ldr}, w->Y + t * ldk, ldk, dK + r * ldk, ldk, 1, 1);
        if (!p->erase) continue;
        product(rows, dk, c.R - r, (View){w->dF + (c.m + r) * ldr + r, 1, ldr}, K + r * ldk, ldk, dK + r * ldk, ldk, 1, 1);
    }
    for (idx r = 0; r < c.R; r++) multiply(dv, w->U + r * ldv, w->D[(c.m - 1) * ldr + r]);
    transpose(dk, dv, w->dS, ldv, w->ST, ldk);
    product(c.R, dk, dv, (View){w->U, ldv, 1}, w->ST, ldk, dK, ldk, 1, 1);
    store(c.m, dk, w->dY, ldk, (real)p->scale, p->d_q + query(p, c, dk), H * dk);
    store(c.R, dk, dK, ldk, 1, p->d_k + row(p, c, dk), H * dk);
}

static void backward(const Problem *p, Work *w, idx sequence, idx head) {
    const idx H = p->heads, dk = p->dk, dv = p->dv, ldk = w->ldk, ldv = w->ldv;
    const idx state = (sequence * H + head) * dk * dv, begin = p->offsets[sequence], end = p->offsets[sequence + 1];
    load(dk, dv, p->dS + state, dv, 1, w->dS, ldv);
    for (idx i = (end - begin + p->tokens - 1) / p->tokens - 1; i >= 0; i--) {
        const Chunk c = chunk_at(p, head, begin + i * p->tokens, end);
        prepare(p, w, c);
        if (p->d_q) {
            load(dk, dv, p->states + ((p->chunks[sequence] + i) * H + head) * dk * dv, dv, 1, w->S, ldv);
            update(p, w, c, c.m);
        }
        update_backward(p, w, c);
        if (p->d_q) gradients(p, w, c);
        for (idx r = 0; r < c.reads; r++) multiply(dk, w->Y + r * ldk, w->e[token_of(p, c, r)]); /* dS (12) */
        product(dk, dv, c.reads, (View){w->Y, 1, ldk}, w->G, ldv, w->dS, ldv, w->e[c.m - 1], 1);
    }
    store(dk, dv, w->dS, ldv, 1, p->dS + state, dv);
}

/* -- tasks --------------------------------------------------------------------------------------------------------- */

static void *run(void *argument) {
    Queue *queue = argument;
    const Problem *p = queue->problem;
    Work w;
    const idx bytes = divide(p, &w, NULL), tasks = p->sequences * p->heads;
    char *memory = aligned_alloc(64, bytes);
    if (!memory) {
        atomic_store(&queue->failed, 1);
        return NULL;
    }
    memset(memory, 0, bytes); /* rows of zeros fill up squares that are transposed */
    divide(p, &w, memory);
    for (idx task; (task = atomic_fetch_add(&queue->next, 1)) < tasks;)
        (p->d_o ? backward : forward)(p, &w, task / p->heads, task % p->heads);
    free(memory);
    return NULL;
}

/* All of it; returns 0, or 1 where memory is missing. */
int solve_all(const Problem *p) { return work(p, least(p->threads, p->sequences * p->heads), run); }

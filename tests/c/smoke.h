/* A tiny paged KV cache, and plain attention over it, for the C and C++ smoke tests. */
#ifndef COMPACTATTN_SMOKE_H
#define COMPACTATTN_SMOKE_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "compactattn.h"

enum {
  kQHeads = 4,
  kKvHeads = 2,
  kHeadDim = 64,
  kPageSize = 16,
  kPages = 8,
  kWidth = 4,
  kReqs = 2,
  kTotalQ = 13
};

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      char text_[512];                                                    \
      compactattn_last_error(text_, sizeof text_);                        \
      fprintf(stderr, "line %d: %s (%s)\n", __LINE__, #condition, text_); \
      exit(1);                                                            \
    }                                                                     \
  } while (0)

/* Request 0: 8 queries, 40 tokens. Request 1: 5 queries, 21 tokens. Pages are handed out in no
 * order. */
static const int32_t kCuSeqlensQ[kReqs + 1] = {0, 8, 13};
static const int32_t kSeqLens[kReqs] = {40, 21};
static const int32_t kBlockTable[kReqs * kWidth] = {5, 2, 7, -1, 0, 6, 999, -7};

typedef struct {
  float q[kTotalQ * kQHeads * kHeadDim];
  float k[kPages * kPageSize * kKvHeads * kHeadDim];
  float v[kPages * kPageSize * kKvHeads * kHeadDim];
  float out[kTotalQ * kQHeads * kHeadDim];
  float lse[kQHeads * kTotalQ];
} Memory;

/* calloc gives 16 bytes of alignment, which q, k, v and out need. */
static Memory *new_memory(void) {
  Memory *m = (Memory *)calloc(1, sizeof(Memory));
  uint32_t state = 12345;
  size_t i;
  float *from[3];
  size_t count[3];
  int t;
  if (!m) exit(1);
  from[0] = m->q, from[1] = m->k, from[2] = m->v;
  count[0] = sizeof m->q / 4, count[1] = sizeof m->k / 4, count[2] = sizeof m->v / 4;
  for (t = 0; t < 3; ++t) {
    for (i = 0; i < count[t]; ++i) {
      state = state * 1664525u + 1013904223u;
      from[t][i] = (float)(state >> 8) / 8388608.0f - 1.0f;
    }
  }
  return m;
}

static compactattn_tensor tensor(const void *data, int32_t dtype, int32_t ndim,
                                 const int64_t *shape) {
  compactattn_tensor t;
  int64_t stride = 1;
  int i;
  memset(&t, 0, sizeof t);
  t.data = (void *)(uintptr_t)data;
  t.dtype = dtype;
  t.ndim = ndim;
  t.device_kind = COMPACTATTN_DEVICE_CPU;
  for (i = ndim - 1; i >= 0; --i) {
    t.shape[i] = shape[i];
    t.stride[i] = stride;
    stride *= shape[i];
  }
  t.storage_bytes = stride * 4;
  return t;
}

static compactattn_tensor q_like(const float *data) {
  const int64_t shape[3] = {kTotalQ, kQHeads, kHeadDim};
  return tensor(data, COMPACTATTN_DTYPE_F32, 3, shape);
}

static compactattn_tensor pool(const float *data) {
  const int64_t shape[4] = {kPages, kPageSize, kKvHeads, kHeadDim};
  return tensor(data, COMPACTATTN_DTYPE_F32, 4, shape);
}

static compactattn_tensor ints(const int32_t *data, int64_t count) {
  return tensor(data, COMPACTATTN_DTYPE_I32, 1, &count);
}

static compactattn_batch batch_of(const Memory *m) {
  const int64_t table[2] = {kReqs, kWidth};
  compactattn_batch batch;
  memset(&batch, 0, sizeof batch);
  batch.struct_size = sizeof batch;
  batch.q = q_like(m->q);
  batch.k = pool(m->k);
  batch.v = pool(m->v);
  batch.cu_seqlens_q = ints(kCuSeqlensQ, kReqs + 1);
  batch.seq_lens = ints(kSeqLens, kReqs);
  batch.block_table = tensor(kBlockTable, COMPACTATTN_DTYPE_I32, 2, table);
  return batch;
}

/* A plan for the cache above under dense settings; sizes as the plan tells them. */
static compactattn_plan *new_plan(const compactattn_context *context, compactattn_sizes *sizes) {
  compactattn_settings settings;
  compactattn_plan_desc desc;
  compactattn_plan *plan = NULL;
  char reason[320];
  memset(&settings, 0, sizeof settings);
  settings.struct_size = sizeof settings;
  CHECK(compactattn_settings_from_mode(COMPACTATTN_MODE_DENSE, &settings) == COMPACTATTN_OK);
  memset(&desc, 0, sizeof desc);
  desc.struct_size = sizeof desc;
  desc.num_q_heads = kQHeads;
  desc.num_kv_heads = kKvHeads;
  desc.head_dim = kHeadDim;
  desc.page_size = kPageSize;
  desc.dtype = COMPACTATTN_DTYPE_F32;
  desc.max_num_reqs = 4;
  desc.max_total_q = 32;
  desc.max_kv_len = 64;
  desc.settings = &settings;
  CHECK(compactattn_supports(context, &desc, reason, sizeof reason) == COMPACTATTN_OK);
  CHECK(reason[0] == '\0');
  CHECK(compactattn_plan_create(context, &desc, &plan) == COMPACTATTN_OK);
  memset(sizes, 0, sizeof *sizes);
  sizes->struct_size = sizeof *sizes;
  CHECK(compactattn_plan_sizes(plan, 0, NULL, sizes) == COMPACTATTN_OK);
  return plan;
}

static const float *row_of(const float *kv, int req, int token, int kv_head) {
  const int page = kBlockTable[req * kWidth + token / kPageSize];
  return kv + ((page * kPageSize + token % kPageSize) * kKvHeads + kv_head) * kHeadDim;
}

static double dot(const float *a, const float *b) {
  double sum = 0;
  int i;
  for (i = 0; i < kHeadDim; ++i) sum += (double)a[i] * b[i];
  return sum / sqrt((double)kHeadDim);
}

/* Softmax attention as it is written in a textbook, one query row; its log-sum-exp. */
static double naive_row(const Memory *m, int req, int token, int head, double *row) {
  const int q_at = kCuSeqlensQ[req] + token;
  const int q_len = kCuSeqlensQ[req + 1] - kCuSeqlensQ[req];
  const int visible = kSeqLens[req] - q_len + token + 1;
  const int kv_head = head / (kQHeads / kKvHeads);
  const float *q = m->q + (q_at * kQHeads + head) * kHeadDim;
  double sum = 0;
  int i, t;
  for (i = 0; i < kHeadDim; ++i) row[i] = 0;
  for (t = 0; t < visible; ++t) {
    /* |logit| stays below 64 / 8 with values in [-1, 1), so exp needs no shift. */
    const double p = exp(dot(q, row_of(m->k, req, t, kv_head)));
    const float *v = row_of(m->v, req, t, kv_head);
    for (i = 0; i < kHeadDim; ++i) row[i] += p * v[i];
    sum += p;
  }
  for (i = 0; i < kHeadDim; ++i) row[i] /= sum;
  return log(sum);
}

/* The largest difference between out, lse and plain attention. */
static double worst_error(const Memory *m) {
  double worst = 0, row[kHeadDim];
  int req, token, head, i;
  for (req = 0; req < kReqs; ++req) {
    for (token = 0; token < kCuSeqlensQ[req + 1] - kCuSeqlensQ[req]; ++token) {
      for (head = 0; head < kQHeads; ++head) {
        const int at = kCuSeqlensQ[req] + token;
        const double lse = naive_row(m, req, token, head, row);
        const float *out = m->out + (at * kQHeads + head) * kHeadDim;
        worst = fmax(worst, fabs(m->lse[head * kTotalQ + at] - lse));
        for (i = 0; i < kHeadDim; ++i) worst = fmax(worst, fabs(out[i] - row[i]));
      }
    }
  }
  return worst;
}

/* f32 sums of 64 products and at most 40 weights, all of magnitude below 8: 64 * 8 * 2^-24 = 3e-5.
 */
#define SMOKE_TOLERANCE 3e-5

#endif
